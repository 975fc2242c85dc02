package agent

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

const (
	stateVersion = 1
	maxStateFile = 4 << 20 // bytes
	maxStateSVID = 1 << 20 // bytes
	maxRestored  = 20000   // workloads
)

// stateDir is the folder in memory where live SVIDs outlive the agent's process, keys and all:
//
//	lock         held while an agent runs
//	agent.json   the agent's own SVID
//	trust.json   bundles and members
//	uses.json    until when SVIDs last that callers have who are gone
//	svid/HEX.json  one workload each
//
// Every file is replaced whole. A crash leaves the old one, at worst an SVID that was dropped a moment before: the
// first member the next process connects to says so, since it is told what the agent serves.
type stateDir struct{ path string }

func openStateDir(path string, memory func(string) (bool, error)) (*stateDir, error) {
	for _, p := range []string{path, filepath.Join(path, "svid")} {
		if err := durable.PrivateDir(p); err != nil {
			return nil, fmt.Errorf("opening the agent's state folder: %w: %w", identity.ErrInvalid, err)
		}
		ok, err := memory(p)
		if err != nil {
			return nil, fmt.Errorf("opening the agent's state folder: %w", err)
		}
		if !ok {
			return nil, fmt.Errorf("opening the agent's state folder: %w: %s is not on a tmpfs, and keys are not written to a disk: use a folder below /run, or none", identity.ErrInvalid, p)
		}
	}
	return &stateDir{path: path}, nil
}

func (d *stateDir) lock() (io.Closer, error) { return durable.Lock(filepath.Join(d.path, "lock")) }
func (d *stateDir) own() string              { return filepath.Join(d.path, "agent.json") }
func (d *stateDir) trust() string            { return filepath.Join(d.path, "trust.json") }
func (d *stateDir) uses() string             { return filepath.Join(d.path, "uses.json") }

func (d *stateDir) svid(key string) string {
	h := sha256.Sum256([]byte(key))
	return filepath.Join(d.path, "svid", hex.EncodeToString(h[:16])+".json")
}

// The files' contents. A field may be added by raising stateVersion only: a file of another version is not read.
type ownFile struct {
	Version      int      `json:"version"`
	SPIFFEID     string   `json:"spiffe_id"`
	Chain        [][]byte `json:"chain"`
	Key          []byte   `json:"key"`
	Reattestable bool     `json:"reattestable"`
}

type trustFile struct {
	Version int          `json:"version"`
	Anchor  string       `json:"anchor"` // what first vouched for it, see Agent.anchor
	Own     bundleJSON   `json:"own"`
	Others  []bundleJSON `json:"others"`
	Members []string     `json:"members"`
}

type usesFile struct {
	Version int                  `json:"version"`
	Stray   map[string]time.Time `json:"stray"` // by the ID of an authority
}

type bundleJSON struct {
	TrustDomain string            `json:"trust_domain"`
	Sequence    uint64            `json:"sequence"`
	RefreshHint time.Duration     `json:"refresh_hint"`
	X509        [][]byte          `json:"x509"`
	JWT         map[string][]byte `json:"jwt"`
}

type svidFile struct {
	Version   int        `json:"version"`
	Key       string     `json:"workload"`
	Selectors []string   `json:"selectors"`
	SVIDs     []svidJSON `json:"svids"`
}

type svidJSON struct {
	EntryID       string   `json:"entry_id"`
	EntryRevision uint64   `json:"entry_revision"`
	SPIFFEID      string   `json:"spiffe_id"`
	Chain         [][]byte `json:"chain"`
	Key           []byte   `json:"key"`
	Hint          string   `json:"hint"`
	FederatesWith []string `json:"federates_with"`
}

// decode is a strict parse: known fields, one value, the right version.
func decode[T any](data []byte, out *T, version func(*T) int) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(out); err != nil {
		return fmt.Errorf("%w: %v", identity.ErrInvalid, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: there is more after its end", identity.ErrInvalid)
	}
	if v := version(out); v != stateVersion {
		return fmt.Errorf("%w: it has version %d: this agent reads %d", identity.ErrInvalid, v, stateVersion)
	}
	return nil
}

func bundleToJSON(b *identity.Bundle) bundleJSON {
	return bundleJSON{TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, RefreshHint: b.RefreshHint, X509: b.X509, JWT: b.JWT}
}

func (b *bundleJSON) bundle() (*identity.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(b.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", identity.ErrInvalid, err)
	}
	return &identity.Bundle{TrustDomain: td, Sequence: b.Sequence, RefreshHint: b.RefreshHint, X509: b.X509, JWT: b.JWT}, nil
}

// encodeTrust and parseTrust are each other's inverse.
func encodeTrust(t *trust, anchor string, members []string) ([]byte, error) {
	f := trustFile{Version: stateVersion, Anchor: anchor, Own: bundleToJSON(t.own), Members: members}
	for _, b := range t.federated() {
		f.Others = append(f.Others, bundleToJSON(b))
	}
	return json.Marshal(f)
}

func parseTrust(data []byte) (t *trust, anchor string, members []string, err error) {
	var f trustFile
	if err := decode(data, &f, func(f *trustFile) int { return f.Version }); err != nil {
		return nil, "", nil, err
	}
	own, err := f.Own.bundle()
	if err != nil {
		return nil, "", nil, err
	}
	others := make([]*identity.Bundle, len(f.Others))
	for i := range f.Others {
		if others[i], err = f.Others[i].bundle(); err != nil {
			return nil, "", nil, err
		}
	}
	t, err = newTrust(nil, own.TrustDomain, own, others)
	return t, f.Anchor, f.Members, err
}

// encodeUses and parseUses are each other's inverse.
func encodeUses(stray map[string]time.Time) ([]byte, error) {
	return json.Marshal(usesFile{Version: stateVersion, Stray: stray})
}

func parseUses(data []byte) (map[string]time.Time, error) {
	var f usesFile
	if err := decode(data, &f, func(f *usesFile) int { return f.Version }); err != nil {
		return nil, err
	}
	return f.Stray, nil
}

// encodeOwn and parseOwn are each other's inverse.
func encodeOwn(o *ownSVID) ([]byte, error) {
	return json.Marshal(ownFile{Version: stateVersion, SPIFFEID: o.id.String(), Chain: o.chain, Key: o.key, Reattestable: o.reattestable})
}

// parseOwn checks the SVID as if a member had sent it.
func parseOwn(data []byte, t *trust, now time.Time) (*ownSVID, error) {
	var f ownFile
	if err := decode(data, &f, func(f *ownFile) int { return f.Version }); err != nil {
		return nil, err
	}
	key, err := pairOf(f.Key)
	if err != nil {
		return nil, err
	}
	o, err := newOwnSVID(t, f.SPIFFEID, f.Chain, key, f.Reattestable, now)
	if err != nil {
		return nil, err
	}
	o.renewAt = renewRestored(o.tls.Leaf.NotBefore, o.notAfter, now)
	return o, nil
}

// pairOf adds the public half to a stored key.
func pairOf(private []byte) (keyPair, error) {
	key, err := x509.ParsePKCS8PrivateKey(private)
	if err != nil {
		return keyPair{}, fmt.Errorf("%w: its key cannot be parsed", identity.ErrInvalid)
	}
	signer, ok := key.(interface{ Public() crypto.PublicKey })
	if !ok {
		return keyPair{}, fmt.Errorf("%w: its key cannot sign", identity.ErrInvalid)
	}
	public, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return keyPair{}, fmt.Errorf("%w: its key has no public half", identity.ErrInvalid)
	}
	return keyPair{private: private, public: public}, nil
}

// renewRestored is the half-life of an SVID that was issued to an earlier process. What is past it is spread over a tenth of
// its life, so that an agent's restart is no burst.
func renewRestored(notBefore, notAfter, now time.Time) time.Time {
	life := notAfter.Sub(notBefore)
	at := notBefore.Add(life/2 - life/20 + spread(life/10))
	if at.After(now) {
		return at
	}
	return now.Add(spread(min(life/10, notAfter.Sub(now)/2)))
}

// savedWorkload is what the state dir holds of one workload.
type savedWorkload struct {
	key       string
	selectors []string
	svids     []identity.X509SVID
}

// encodeWorkload and parseWorkload are each other's inverse.
func encodeWorkload(w *savedWorkload) ([]byte, error) {
	f := svidFile{Version: stateVersion, Key: w.key, Selectors: w.selectors}
	for i := range w.svids {
		s := &w.svids[i]
		j := svidJSON{EntryID: s.EntryID, EntryRevision: s.EntryRevision, SPIFFEID: s.ID.String(), Chain: s.Chain, Key: s.Key, Hint: s.Hint}
		for _, td := range s.FederatesWith {
			j.FederatesWith = append(j.FederatesWith, td.Name())
		}
		f.SVIDs = append(f.SVIDs, j)
	}
	return json.Marshal(f)
}

// parseWorkload checks every SVID as if a member had sent it.
func parseWorkload(data []byte, t *trust, now time.Time) (*savedWorkload, error) {
	var f svidFile
	if err := decode(data, &f, func(f *svidFile) int { return f.Version }); err != nil {
		return nil, err
	}
	if f.Key == "" || len(f.SVIDs) == 0 || len(f.Selectors) > 2*identity.MaxSelectors {
		return nil, fmt.Errorf("%w: no workload, no SVID, or %d selectors", identity.ErrInvalid, len(f.Selectors))
	}
	w := &savedWorkload{key: f.Key, selectors: f.Selectors}
	var key keyPair
	for i := range f.SVIDs {
		j := &f.SVIDs[i]
		id, err := spiffeid.FromString(j.SPIFFEID)
		if err != nil {
			return nil, fmt.Errorf("%w: %v", identity.ErrInvalid, err)
		}
		if !bytes.Equal(key.private, j.Key) || key.private == nil { // one key for all of a workload's, usually
			if key, err = pairOf(j.Key); err != nil {
				return nil, err
			}
		}
		s := identity.X509SVID{EntryID: j.EntryID, EntryRevision: j.EntryRevision, ID: id, Chain: j.Chain, Hint: j.Hint}
		if err := t.checkWorkload(&s, key, now); err != nil {
			return nil, err
		}
		for _, name := range j.FederatesWith {
			td, err := spiffeid.TrustDomainFromString(name)
			if err != nil {
				return nil, fmt.Errorf("%w: %v", identity.ErrInvalid, err)
			}
			s.FederatesWith = append(s.FederatesWith, td)
		}
		w.svids = append(w.svids, s)
	}
	return w, nil
}

// files lists the workloads' files, and what a crash left of writing one.
func (d *stateDir) files() (whole, torn []string, err error) {
	dir := filepath.Join(d.path, "svid")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the agent's state folder: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), ".") && strings.HasSuffix(e.Name(), ".tmp"):
			torn = append(torn, path)
		case strings.HasSuffix(e.Name(), ".json"):
			whole = append(whole, path)
		}
	}
	return whole, torn, nil
}

func readState(path string, limit int64) ([]byte, error) {
	data, err := durable.ReadPrivateFile(path, limit)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return data, err
}
