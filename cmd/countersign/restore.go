package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/backup"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/raft"
	"countersign.io/countersign/seal"
	"countersign.io/countersign/store"
)

// restoringFile is in a data folder from before the first thing that a restore puts there until after member.json, the
// last: what is beside it without member.json is of a restore that broke off.
const restoringFile = "restoring"

func backupRestore(a *admin) *cobra.Command {
	var key, file string
	restoreCmd := &cobra.Command{
		Use: "restore FILE -c FILE", Short: "Begin the cluster anew from a backup, on this machine", Args: cobra.ExactArgs(1),
		Long: `Begin the cluster anew from a backup, on this machine, when all its members are lost. The data folder of the
configuration must be absent or empty, but for the key (kek). The whole backup is verified before anything is written.

No member of the lost cluster may run, or come back later with its old folder: it would go on as if nothing had
happened, beside this one or against it.`,
		Example: `  countersign backup restore countersign.backup -c /etc/countersign/server.yaml
  countersign backup restore countersign.backup -c server.yaml --key file:/media/key/kek`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			configured := c.Backup.Key
			if key != "" {
				c.Backup.Key = key
			}
			res, err := restoreBackup(cmd, c, args[0], time.Now())
			if err != nil {
				return err
			}
			if inFolder(configured, c.DataDir) {
				res.Next = append(res.Next, "keep a copy of "+configured+" elsewhere: the backups that this member will make open with it, and it is lost with data_dir")
			}
			return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return res.table() })
		},
	}
	restoreCmd.Flags().StringVar(&key, "key", "", "URI of the key that opens the backup, if it is not backup.key")
	restoreCmd.Flags().StringVarP(&file, "config", "c", "/etc/countersign/server.yaml", "configuration file of the member to be")
	return restoreCmd
}

// inFolder reports whether a key is a file in a folder.
func inFolder(uri, dir string) bool {
	u, err := url.Parse(uri)
	return err == nil && u.Scheme == "file" && filepath.Dir(u.Path) == filepath.Clean(dir)
}

// restored is what a restore made, and what is to be done after it.
type restored struct {
	Member  string       `json:"member"`
	DataDir string       `json:"data_dir"`
	Backup  report       `json:"backup"`
	State   *stateReport `json:"state"` // as restored
	Next    []string     `json:"next"`
}

// restoreRevision is above every revision that the cluster, or an earlier restore of it, can have given: those go on by
// one for each write, and this one by a million a second.
func restoreRevision(of uint64, now time.Time) uint64 {
	return max(of+1<<32, uint64(now.Unix())<<20)
}

// restoreBackup makes a member's data folder from a backup.
//
// The file is read twice: once to verify all of it, and once to write. A folder made beside and renamed at the end would
// need one reading, but cannot take the place of a data folder that is a mount point, which it often is, and wants the room
// twice when the first try was of a damaged file. The second reading authenticates every byte again, so that a file that
// changes in between is found too, and leaves a folder that no member starts on.
func restoreBackup(cmd *cobra.Command, c *config.Server, path string, now time.Time) (*restored, error) {
	ctx := cmd.Context()
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("%w: trust_domain: %v", identity.ErrInvalid, err)
	}
	f, size, err := openBackupFile(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h, chunks, err := backup.ReadHeader(f)
	if err == nil {
		err = checkLength(size, h.FileSize(chunks))
	}
	if err != nil {
		return nil, named(path, err)
	}
	if h.TrustDomain != td.Name() {
		return nil, fmt.Errorf("%w: %s is of trust domain %q, and the configuration is of %q: take a backup of this trust domain, or correct trust_domain", identity.ErrPrecondition, path, h.TrustDomain, td.Name())
	}
	if h.Level > store.Level {
		return nil, fmt.Errorf("%w: %s is of a cluster at level %d, and this release knows up to %d: use release %s, which made it, or a newer one", identity.ErrPrecondition, path, h.Level, store.Level, h.Version)
	}
	d := &dataDir{path: c.DataDir, td: td}
	if err := d.emptyForRestore(); err != nil {
		return nil, err
	}
	sum, err := verifyBackup(cmd, c, f, td)
	if err != nil {
		return nil, named(path, err)
	}
	res := &restored{Member: c.Name, DataDir: c.DataDir, Backup: report{File: path, Header: h, State: reportOf(sum)}}
	out, err := d.restore(ctx, c, cmd.ErrOrStderr(), f, sum, now)
	if err != nil {
		return nil, fmt.Errorf("restoring %s into %s: %w", path, c.DataDir, err)
	}
	res.State = reportOf(out)
	res.Next = nextSteps(sum, h)
	return res, nil
}

// emptyForRestore refuses a folder with anything in it that is not the key, the lock, or of a restore that broke off.
func (d *dataDir) emptyForRestore() error {
	list, err := os.ReadDir(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: data_dir: %w", identity.ErrPrecondition, err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	if slices.Contains(names, restoringFile) && !slices.Contains(names, "member.json") {
		return nil
	}
	names = slices.DeleteFunc(names, func(n string) bool { return n == "kek" || n == "lock" || n == "lost+found" })
	if len(names) > 0 {
		return fmt.Errorf("%w: data_dir %s is not empty (%s): restoring replaces no state: move what is there away, or name another folder", identity.ErrPrecondition, d.path, strings.Join(names[:min(len(names), 5)], ", "))
	}
	return nil
}

// restore writes the folder. A crash before the restoring file leaves it as it was; from then until member.json is there no
// member starts on it, and restoring again begins by removing what is there; with member.json all is there.
func (d *dataDir) restore(ctx context.Context, c *config.Server, stderr io.Writer, f *os.File, sum store.Summary, now time.Time) (_ store.Summary, err error) {
	if err := durable.PrivateDir(d.path); err != nil {
		return store.Summary{}, err
	}
	lock, err := durable.Lock(d.file("lock"))
	if err != nil {
		return store.Summary{}, err
	}
	defer lock.Close()
	if err := d.emptyForRestore(); err != nil { // nobody was kept out when it was asked first
		return store.Summary{}, err
	}
	kek, err := openSealKey(ctx, c)
	if err != nil {
		return store.Summary{}, err
	}
	if k, ok := kek.(io.Closer); ok {
		defer k.Close()
	}
	if err := durable.WriteFile(d.file(restoringFile), []byte("A restore of a backup was begun here and has not ended.\n"), 0o600); err != nil {
		return store.Summary{}, err
	}
	for _, name := range []string{"raft", "raft.restoring", "state", "keyring", "authorities.json"} {
		if err := os.RemoveAll(d.file(name)); err != nil {
			return store.Summary{}, err
		}
	}
	out, keyring, err := d.restoreState(ctx, c, stderr, f, sum, now)
	if err != nil {
		return store.Summary{}, err
	}
	if err := seal.SaveKeyring(ctx, d.file("keyring"), kek, d.td, keyring); err != nil {
		return store.Summary{}, err
	}
	// Without authorities.json the member has no certificate until it has its state; it needs none before, being alone. And
	// it is no bootstrap: should raft/ be lost, it must not begin another cluster under this one's name.
	raw, err := json.Marshal(memberFile{Version: 1, TrustDomain: c.TrustDomain, Name: c.Name})
	if err != nil {
		return store.Summary{}, err
	}
	if err := durable.WriteFile(d.file("member.json"), raw, 0o600); err != nil {
		return store.Summary{}, err
	}
	return out, os.Remove(d.file(restoringFile))
}

// openSealKey opens the key that the keyring will rest under, and tries it: a token without its PIN is better known before.
func openSealKey(ctx context.Context, c *config.Server) (seal.KEK, error) {
	o, err := sealOptions(c)
	if err != nil {
		return nil, err
	}
	kek, err := seal.OpenKEK(ctx, c.Seal.Key, o)
	if err == nil {
		_, err = kek.Wrap(ctx, make([]byte, 32), []byte("countersign/1|"+c.TrustDomain+"|trial"))
	}
	if err != nil {
		return nil, fmt.Errorf("%w: seal.key: %w", identity.ErrPrecondition, err)
	}
	return kek, nil
}

func (d *dataDir) restoreState(ctx context.Context, c *config.Server, stderr io.Writer, f *os.File, sum store.Summary, now time.Time) (out store.Summary, _ *seal.Keyring, err error) {
	kek, closeKEK, err := openBackupKey(ctx, c)
	if err != nil {
		return out, nil, err
	}
	defer closeKEK()
	p := newProgress(stderr, "restoring")
	defer p.end()
	r, err := p.rewound(f)
	if err != nil {
		return out, nil, err
	}
	b, err := backup.Open(ctx, r, kek, d.td)
	if err != nil {
		return out, nil, err
	}
	revision := restoreRevision(sum.Revision, now)
	err = raft.RestoreSnapshot(d.file("raft"), c.Name, c.Advertise, revision, now, func(w io.Writer) error {
		var err error
		if out, err = store.Rewrite(w, b.State, store.RewriteOptions{Now: now, Revision: revision, TrustDomain: d.td}); err != nil {
			return err
		}
		return drained(b.State)
	})
	return out, b.Keyring, err
}

// nextSteps is what only the operator can do.
func nextSteps(sum store.Summary, h backup.Header) []string {
	at := h.CreatedAt.UTC().Format(time.RFC3339)
	out := []string{
		"make sure that no member of the lost cluster runs, or can come back with its old folder",
		"start this member: countersign server run (it is the whole cluster now)",
		"let the others join anew, with empty folders: countersign token create --server",
		fmt.Sprintf("repeat what was changed since %s: of bans, evictions, entries and rotations made later nothing is known (the backup has %d agents, %d of them banned)", at, sum.Agents, sum.Banned),
		"make new join tokens where some are under way: all are spent",
		"see to the agents: those that are on record go on once this member has an address that they know, others attest again",
	}
	return out
}

func (r *restored) table() cli.Table {
	t := r.Backup.table()
	t.Rows = append(t.Rows, []string{"restored as", fmt.Sprintf("member %s in %s", r.Member, r.DataDir)},
		[]string{"goes on at", fmt.Sprintf("revision %d, bundle sequence %d", r.State.Revision, r.State.Sequence)})
	for i, n := range r.Next {
		t.Rows = append(t.Rows, []string{"next (" + strconv.Itoa(i+1) + ")", n})
	}
	return t
}

// stateReport is what a state holds.
type stateReport struct {
	TrustDomain  string `json:"trust_domain"`
	Revision     uint64 `json:"revision"`
	Sequence     uint64 `json:"bundle_sequence"`
	Level        uint32 `json:"level"`
	Entries      int    `json:"entries"`
	KubeClusters int    `json:"kube_clusters"`
	JoinTokens   int    `json:"join_tokens"`
	Agents       int    `json:"agents"`
	Banned       int    `json:"banned_agents"`
	Authorities  int    `json:"authorities"`
	Members      int    `json:"members"`
	SealTerms    int    `json:"seal_terms"`
	Foreign      int    `json:"foreign_bundles"`
	Federations  int    `json:"federations"`
}

func reportOf(s store.Summary) *stateReport {
	return &stateReport{
		TrustDomain: s.TrustDomain, Revision: s.Revision, Sequence: s.Sequence, Level: s.Level,
		Entries: s.Entries, KubeClusters: s.KubeClusters, JoinTokens: s.JoinTokens, Agents: s.Agents, Banned: s.Banned,
		Authorities: s.Authorities, Members: s.Members, SealTerms: s.SealTerms, Foreign: s.Foreign, Federations: s.Federations,
	}
}

func (s *stateReport) rows() [][]string {
	return [][]string{
		{"holds", fmt.Sprintf("revision %d, bundle sequence %d, level %d", s.Revision, s.Sequence, s.Level)},
		{"", fmt.Sprintf("%d entries, %d kube clusters, %d agents (%d banned), %d join tokens", s.Entries, s.KubeClusters, s.Agents, s.Banned, s.JoinTokens)},
		{"", fmt.Sprintf("%d authorities, %d members, %d terms of the seal, %d foreign bundles, %d federations", s.Authorities, s.Members, s.SealTerms, s.Foreign, s.Federations)},
	}
}
