package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"countersign.io/countersign/audit"
	"countersign.io/countersign/backup"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/vault"
	"countersign.io/countersign/raft"
	"countersign.io/countersign/seal"
)

// confirmTime is how long a backup waits for a leader to confirm that this member's state is current.
const confirmTime = 5 * time.Second

// saveBackup writes a backup of this member's state as of now.
func (m *member) saveBackup(ctx context.Context, w io.Writer) error {
	kek, closeKEK, err := openBackupKey(ctx, m.c)
	if err != nil {
		return err
	}
	defer closeKEK()
	confirmed := m.confirm(ctx)
	snap, keyring, err := m.freeze()
	if err != nil {
		return err
	}
	defer snap.Release()
	h := backup.Header{
		TrustDomain: m.td.Name(), Member: m.c.Name, Version: version, Level: m.store.Level(),
		CreatedAt: time.Now().UTC().Truncate(time.Second), Revision: m.store.Revision(), Confirmed: confirmed,
	}
	// How long it is, is said before it is written: whoever gets less knows it.
	n, err := snap.WriteTo(ending{ctx, io.Discard})
	if err != nil {
		return err
	}
	return backup.Save(ctx, w, kek, h, keyring, n, func(w io.Writer) error {
		_, err := snap.WriteTo(ending{ctx, w})
		return err
	})
}

// recordBackup is for those that nobody asked for: of the others the call is on record.
func (m *member) recordBackup(file string, err error) {
	e := audit.Event{Action: "backup.make", Outcome: audit.OK, Who: audit.Who{Kind: "self"}, Subjects: []string{file}, Revision: m.store.Revision()}
	if id, idErr := identity.MemberID(m.td, m.c.Name); idErr == nil {
		e.Who.ID = id.String()
	}
	if err != nil {
		e.Outcome, e.Reason = audit.Failed, err.Error()
	}
	m.audit.Note("", e)
}

// degraded says what of this member's own is not as configured.
func (m *member) degraded() []string {
	out := m.audit.Degraded()
	if m.backups == nil {
		return out
	}
	if err := m.backups.Health(); err != nil {
		out = append(out, err.Error())
	}
	return out
}

// confirm reports whether this member has all that was acknowledged anywhere. Without a leader a backup is wanted all the more:
// it then says that it is of what one member knew.
func (m *member) confirm(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, confirmTime)
	defer cancel()
	if err := m.node.ReadBarrier(ctx); err != nil {
		m.log.Warn("making a backup of what this member knows: no leader confirmed that it is all", "error", err)
		return false
	}
	return true
}

// freeze takes the state and a keyring that opens all that is sealed in it: one that did not change while the state was taken.
func (m *member) freeze() (raft.Snapshot, *seal.Keyring, error) {
	for range 10 {
		before := m.data.keyring.Plain()
		snap, err := m.store.Snapshot()
		if err != nil {
			clear(before)
			return nil, nil, err
		}
		after := m.data.keyring.Plain()
		same := bytes.Equal(before, after)
		clear(before)
		if same {
			keyring, err := seal.ParseKeyring(after)
			clear(after)
			if err != nil {
				snap.Release()
				return nil, nil, err
			}
			return snap, keyring, nil
		}
		clear(after)
		snap.Release()
	}
	return nil, nil, fmt.Errorf("%w: the seal's keys change all the time: try again", identity.ErrUnavailable)
}

// ending is a writer that fails once ctx has ended.
type ending struct {
	ctx context.Context
	w   io.Writer
}

func (e ending) Write(p []byte) (int, error) {
	if err := e.ctx.Err(); err != nil {
		return 0, err
	}
	return e.w.Write(p)
}

// openBackupKey opens the key that seals and opens backups. It is never made here: nobody would have a copy of it.
func openBackupKey(ctx context.Context, c *config.Server) (_ seal.KEK, closeKEK func(), err error) {
	o, err := sealOptions(c)
	if err != nil {
		return nil, nil, err
	}
	o.MustExist = true
	kek, err := seal.OpenKEK(ctx, c.Backup.Key, o)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: opening the key of backups (backup.key, or --key): %w", identity.ErrPrecondition, err)
	}
	return kek, func() {
		if k, ok := kek.(io.Closer); ok {
			_ = k.Close()
		}
	}, nil
}

// sealOptions is what key-encryption keys of some kinds need of the configuration.
func sealOptions(c *config.Server) (seal.Options, error) {
	v := c.Seal.Vault
	if v == nil {
		return seal.Options{}, nil
	}
	client, err := vault.New(vaultConfig(v))
	if err != nil {
		return seal.Options{}, fmt.Errorf("%w: seal.vault: %w", identity.ErrInvalid, err)
	}
	return seal.Options{Vault: client}, nil
}
