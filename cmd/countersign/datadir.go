package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"countersign.io/countersign/api"
	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/seal"
	"countersign.io/countersign/server"
	"countersign.io/countersign/store"
)

// dataDir is a member's folder:
//
//	lock              one process at a time
//	member.json       whose folder this is; written last, so that a crash before it starts over
//	kek               the key-encryption key, unless seal.key names another
//	keyring           the data keys, wrapped under it
//	authorities.json  the replicated, sealed authority records as last seen: a member needs its TLS certificate before
//	                  raft can have a leader, and a crash throws the state away
//	issued.json       until when what this member signed lasts, by authority
//	raft/, state/     the log and the state
type dataDir struct {
	path    string
	td      spiffeid.TrustDomain
	member  memberFile
	keyring *seal.Keyring
	keys    *sealKeys // keyring, and how it is kept
	lock    io.Closer
	// claimed is set once no other cluster can have been begun in this one's place, see memberFile.Unclaimed.
	claimed atomic.Bool
}

// memberFile is member.json.
type memberFile struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
	Name        string `json:"name"`
	Bootstrap   bool   `json:"bootstrap"` // this member began the cluster
	// As a pod of a StatefulSet, and does not know yet that no other was begun in its place, so it has served nobody.
	Unclaimed bool `json:"unclaimed,omitempty"`
}

const maxStateFile = 4 << 20

// openDataDir opens a member's folder, or makes it: as f finds out, if there is one; by joining a cluster if the configuration has a
// join token; else by beginning one.
func openDataDir(ctx context.Context, c *config.Server, f *former) (_ *dataDir, err error) {
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("%w: trust_domain: %v", identity.ErrInvalid, err)
	}
	if err := durable.PrivateDir(c.DataDir); err != nil {
		return nil, fmt.Errorf("opening data_dir: %w", err)
	}
	d := &dataDir{path: c.DataDir, td: td}
	if d.lock, err = durable.Lock(d.file("lock")); err != nil {
		return nil, fmt.Errorf("opening data_dir: %w", err)
	}
	defer func() {
		if err != nil {
			d.lock.Close()
		}
	}()
	kek, old, err := d.openKEKs(ctx, c)
	if err != nil {
		return nil, err
	}
	raw, err := durable.ReadPrivateFile(d.file("member.json"), maxStateFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = d.begin(ctx, c, f, kek)
	case err == nil:
		err = d.check(raw, c)
	}
	if err != nil {
		return nil, err
	}
	if err := d.openKeyring(ctx, kek, old); err != nil {
		return nil, err
	}
	d.claimed.Store(!d.member.Unclaimed)
	return d, nil
}

func (d *dataDir) file(name string) string { return filepath.Join(d.path, name) }

// check refuses a folder that is another's.
func (d *dataDir) check(raw []byte, c *config.Server) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	err := dec.Decode(&d.member)
	if _, more := dec.Token(); err == nil && !errors.Is(more, io.EOF) {
		err = errors.New("there is more after its end")
	}
	if err != nil {
		return fmt.Errorf("%w: %s is damaged: %v: restore it from a copy of this folder", identity.ErrInvalid, d.file("member.json"), err)
	}
	m := d.member
	switch {
	case m.Version != 1:
		return fmt.Errorf("%w: %s has version %d: this release reads version 1", identity.ErrInvalid, d.file("member.json"), m.Version)
	case m.TrustDomain != c.TrustDomain:
		return fmt.Errorf("%w: data_dir %s holds the state of trust domain %q, not %q, says its member.json: name another folder, or mend trust_domain", identity.ErrPrecondition, d.path, m.TrustDomain, c.TrustDomain)
	case m.Name != c.Name:
		return fmt.Errorf("%w: data_dir %s belongs to member %q, not %q, says its member.json: name another folder, or mend name", identity.ErrPrecondition, d.path, m.Name, c.Name)
	}
	return d.checkLog()
}

// checkLog refuses a folder whose log is gone: raft would take the member for a new one, which forgets what it acknowledged and
// whom it gave its vote, or begins the cluster once more.
func (d *dataDir) checkLog() error {
	path := filepath.Join(d.file("raft"), "log.db")
	info, err := os.Stat(path)
	if err == nil && info.Size() > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	ran := d.member.Bootstrap && exists(d.file("authorities.json")) || exists(filepath.Join(d.file("raft"), "peers.json"))
	if names, err := os.ReadDir(filepath.Join(d.file("raft"), "snapshots")); err == nil && len(names) > 0 {
		ran = true
	}
	if !ran {
		return nil
	}
	return fmt.Errorf("%w: %s is missing or empty, and this member has run: restore data_dir from a backup, or remove this member and join it again with an empty folder", identity.ErrInvalid, path)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// begin makes the folder's content. Each file is whole or absent, and member.json comes last: after a crash on the way a
// bootstrap starts over, and a join asks for a new token, its own being spent.
func (d *dataDir) begin(ctx context.Context, c *config.Server, f *former, kek seal.KEK) error {
	if _, err := os.Stat(d.file(restoringFile)); err == nil {
		return fmt.Errorf("%w: a restore of a backup broke off in %s: run countersign backup restore again, or empty the folder", identity.ErrPrecondition, d.path)
	}
	for _, name := range []string{"raft", "state"} {
		if _, err := os.Stat(d.file(name)); err == nil {
			return fmt.Errorf("%w: %s exists but member.json does not: this folder is incomplete; restore it, or start with an empty one", identity.ErrPrecondition, d.file(name))
		}
	}
	// What a join that broke off left is of a cluster that this folder may not come to belong to.
	for _, name := range []string{"authorities.json", "keyring"} {
		if err := os.Remove(d.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing what an earlier start left: %w", err)
		}
	}
	d.member = memberFile{Version: 1, TrustDomain: c.TrustDomain, Name: c.Name, Bootstrap: c.JoinTokenFile == ""}
	var keyring *seal.Keyring
	var err error
	switch {
	case f != nil:
		keyring, err = d.form(ctx, f)
	case d.member.Bootstrap:
		keyring, err = seal.NewKeyring()
	default:
		keyring, err = d.join(ctx, c)
	}
	if err != nil {
		return err
	}
	if err := seal.SaveKeyring(ctx, d.file("keyring"), kek, d.td, keyring); err != nil {
		return fmt.Errorf("saving the keyring: %w", err)
	}
	if err := d.saveIssued(map[string]time.Time{}); err != nil { // it has signed nothing, and knows it
		return err
	}
	return d.saveMember(d.member)
}

func (d *dataDir) saveMember(f memberFile) error {
	raw, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("encoding member.json: %w", err)
	}
	if err := durable.WriteFile(d.file("member.json"), raw, 0o600); err != nil {
		return fmt.Errorf("saving member.json: %w", err)
	}
	return nil
}

func (d *dataDir) isUnclaimed() bool { return !d.claimed.Load() }

// claim notes that this is the cluster. A crash before it is one before it was known: it is found out again.
func (d *dataDir) claim() error {
	f := d.member
	f.Unclaimed = false
	if err := d.saveMember(f); err != nil {
		return err
	}
	d.claimed.Store(true)
	return nil
}

// join spends the token at the first member that answers.
func (d *dataDir) join(ctx context.Context, c *config.Server) (*seal.Keyring, error) {
	raw, err := durable.ReadPrivateFile(c.JoinTokenFile, node.MaxTokenString+2)
	if err != nil {
		return nil, fmt.Errorf("reading join_token_file: %w", err)
	}
	t, err := node.ParseToken(strings.TrimSpace(string(raw)))
	clear(raw)
	if err != nil {
		return nil, fmt.Errorf("reading join_token_file %s: %w", c.JoinTokenFile, err)
	}
	if t.Purpose != identity.JoinServer {
		return nil, fmt.Errorf("%w: the token in %s admits an %s: make one with countersign token create --server", identity.ErrInvalid, c.JoinTokenFile, t.Purpose)
	}
	tlsConf, err := server.PinnedTLS(t.Pin, d.td)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, addr := range t.Addresses {
		res, err := d.joinAt(ctx, addr, tlsConf, &memberv1.JoinRequest{Secret: t.Secret, Id: c.Name, Address: c.Advertise, Version: version, Level: store.Level})
		if err == nil {
			return d.joined(res)
		}
		errs = append(errs, fmt.Errorf("joining by %s: %w", addr, err))
		if !errors.Is(err, errStranger) && !errors.Is(err, identity.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			break // an answer: the token is spent, expired or wrong, and the others would say the same
		}
	}
	return nil, errors.Join(errs...)
}

// errStranger: who answered is not of the token's cluster. It was not shown the secret.
var errStranger = fmt.Errorf("%w: not a member of the token's cluster", identity.ErrUnauthenticated)

func (d *dataDir) joinAt(ctx context.Context, addr string, pinned *tls.Config, req *memberv1.JoinRequest) (*memberv1.JoinResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	// gRPC calls a certificate that is refused unavailable; trying that again would not help.
	stranger := make(chan error, 1)
	conf := pinned.Clone()
	conf.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) error {
		err := pinned.VerifyPeerCertificate(raw, chains)
		if err != nil {
			select {
			case stranger <- fmt.Errorf("%w: %v", errStranger, err):
			default:
			}
		}
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(conf)))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	res, err := memberv1.NewMemberClient(conn).Join(ctx, req)
	select {
	case err := <-stranger:
		return nil, err
	default:
		return res, api.FromStatus(err)
	}
}

func (d *dataDir) joined(res *memberv1.JoinResponse) (*seal.Keyring, error) {
	defer clear(res.Keyring)
	if res.TrustDomain != d.td.Name() {
		return nil, fmt.Errorf("%w: the cluster's trust domain is %q, the configuration's %q", identity.ErrInvalid, res.TrustDomain, d.td.Name())
	}
	var authorities []identity.Authority
	if err := json.Unmarshal(res.Authorities, &authorities); err != nil {
		return nil, fmt.Errorf("%w: reading the cluster's authorities: %v", identity.ErrInvalid, err)
	}
	if err := d.saveAuthorities(authorities); err != nil {
		return nil, err
	}
	keyring, err := seal.ParseKeyring(res.Keyring)
	if err != nil {
		return nil, fmt.Errorf("reading the cluster's keyring: %w", err)
	}
	return keyring, nil
}

// authoritiesFile is authorities.json: what it holds is sealed, as in the log.
type authoritiesFile struct {
	Version     int             `json:"version"`
	Authorities json.RawMessage `json:"authorities"`
	CRC32C      *uint32         `json:"crc32c,omitempty"` // of the former's bytes; an earlier release wrote none
}

func (d *dataDir) saveAuthorities(a []identity.Authority) error {
	list, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("encoding the authorities: %w", err)
	}
	sum := crc32.Checksum(list, crc32.MakeTable(crc32.Castagnoli))
	raw, err := json.Marshal(authoritiesFile{Version: 1, Authorities: list, CRC32C: &sum})
	if err != nil {
		return fmt.Errorf("encoding the authorities: %w", err)
	}
	if err := durable.WriteFile(d.file("authorities.json"), raw, 0o600); err != nil {
		return fmt.Errorf("saving the authorities: %w", err)
	}
	return nil
}

// loadAuthorities returns nothing on a member that has not seen any yet.
func (d *dataDir) loadAuthorities() ([]identity.Authority, error) {
	raw, err := durable.ReadPrivateFile(d.file("authorities.json"), maxStateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the authorities: %w", err)
	}
	var f authoritiesFile
	var list []identity.Authority
	err = json.Unmarshal(raw, &f)
	switch {
	case err != nil:
	case f.Version != 1:
		err = fmt.Errorf("it has version %d", f.Version)
	case f.CRC32C != nil && *f.CRC32C != crc32.Checksum(f.Authorities, crc32.MakeTable(crc32.Castagnoli)):
		err = errors.New("its checksum does not match")
	default:
		err = json.Unmarshal(f.Authorities, &list)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s is damaged or of a newer release (%v): remove it if another member lives, else restore it", identity.ErrInvalid, d.file("authorities.json"), err)
	}
	return list, nil
}

// Close lets the folder go.
func (d *dataDir) Close() error { return d.lock.Close() }
