package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
	"countersign.io/countersign/server"
	"countersign.io/countersign/store"
)

// dial connects to another member: to that one, or, for no id, to whichever answers.
func (m *member) dial(ctx context.Context, id, address string) (net.Conn, error) {
	d := tls.Dialer{Config: server.MemberTLS(m.tls, id)}
	c, err := d.DialContext(ctx, "tcp", address)
	if err == nil && m.tap != nil {
		c = m.tap(c)
	}
	return c, err
}

// alone refuses to be one of two: a copy of the data folder that runs elsewhere would vote twice, and each would undo what the
// other does. It asks at the address that the cluster has of this member, if that is not the one it is about to tell.
func (m *member) alone(ctx context.Context) error {
	for _, x := range m.node.Members() {
		if x.ID != m.c.Name || x.Address == m.c.Advertise {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		c, err := m.dial(ctx, x.ID, x.Address)
		if err != nil {
			return nil // nobody is there any more, or another member
		}
		defer c.Close()
		theirs := c.(*tls.Conn).ConnectionState().PeerCertificates
		ours, err := m.ca.MemberCertificate()
		if err != nil {
			return fmt.Errorf("reading this member's certificate: %w", err)
		}
		// Each process has an issuer of its own. By another name for the same address, this is ourselves.
		if len(theirs) > 1 && len(ours.Certificate) > 1 && bytes.Equal(theirs[1].Raw, ours.Certificate[1]) {
			return nil
		}
		return fmt.Errorf("%w: a member named %q runs at %s already, with the same keys: data_dir %s is a copy of its folder. Two of them would break the cluster's promises: stop that one, or empty this folder and join under another name",
			identity.ErrPrecondition, x.ID, x.Address, m.c.DataDir)
	}
	return nil
}

// cluster is the inner life of the cluster as the server may see it.
func (m *member) cluster() server.Cluster {
	return server.Cluster{
		Staleness: m.node.Staleness,
		Members: func() []server.MemberStatus {
			var out []server.MemberStatus
			for _, x := range m.node.Members() {
				out = append(out, memberStatus(x))
			}
			return out
		},
		Health: func(ctx context.Context) ([]server.MemberHealth, error) {
			all, err := m.node.Health(ctx)
			var out []server.MemberHealth
			for _, h := range all {
				out = append(out, server.MemberHealth{
					MemberStatus: memberStatus(h.Member), Reachable: h.Reachable, Problem: h.Problem, LastContact: h.LastContact, Applied: h.Applied, Commit: h.Commit, Info: h.Info,
				})
			}
			return out, raftError(err)
		},
		AddMember: func(ctx context.Context, id, address string) error {
			return raftError(m.node.AddMember(ctx, id, address))
		},
		RemoveMember:   func(ctx context.Context, id string) error { return raftError(m.node.RemoveMember(ctx, id)) },
		TransferLeader: func(ctx context.Context, id string) error { return raftError(m.node.TransferLeader(ctx, id)) },
		ReadBarrier:    func(ctx context.Context) error { return raftError(m.node.ReadBarrier(ctx)) },
		Removed:        m.node.Removed(),
	}
}

func memberStatus(x raft.Member) server.MemberStatus {
	return server.MemberStatus{ID: x.ID, Address: x.Address, Voter: x.Voter, Leader: x.Leader}
}

// raftError says in identity's words what an error of raft's means for who asked.
func raftError(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, raft.ErrRefused):
		return fmt.Errorf("%w: %w", identity.ErrPrecondition, err)
	}
	return fmt.Errorf("%w: %w", identity.ErrUnavailable, err)
}

// info is what this member tells the others of itself. It is asked for often, and by others: it waits for nothing.
func (m *member) info() []byte {
	i := server.MemberInfo{Version: version, Level: store.Level, StartedAt: m.started.UTC(), Issuing: true, KEK: m.c.Seal.Key}
	if err := m.ready(); err != nil {
		i.Issuing, i.NotIssuingBecause = false, err.Error()
	}
	i.Now, i.Admins = m.hooks.now().UTC(), server.AdminsHash(m.adminRoles())
	if m.serving.Load() != nil && m.backups != nil { // before, it may be being set
		b := m.backups
		every, newest := b.Newest()
		i.BackupEvery, i.BackupAt = max(int64(every/time.Second), 1), newest.UTC()
	}
	if k := m.data.keyring; k != nil {
		i.SealTerms = k.Terms()
	}
	var fs unix.Statfs_t
	if unix.Statfs(m.c.DataDir, &fs) == nil {
		i.DiskFree, i.DiskTotal = fs.Bavail*uint64(fs.Bsize), fs.Blocks*uint64(fs.Bsize)
	}
	raw, err := i.Marshal()
	if err != nil {
		m.log.Error("cannot tell the others of this member", "error", err)
	}
	return raw
}
