package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/backup"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/store"
)

func backupCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{
		Use: "backup", Short: "Save the cluster's state, look into a saved one, bring a lost cluster back",
		Long: `Save the cluster's state, look into a saved one, bring a lost cluster back. docs/BACKUP.md tells the whole of it.

A backup is sealed under the key that backup.key names. Without that key it opens for nobody: keep a copy of it elsewhere.`,
	}
	a.flags(cmd)
	cmd.AddCommand(backupSave(a), backupInspect(a), backupRestore(a))
	return cmd
}

// backupTime is how long a backup may take: what stalls ends earlier, by the member.
const backupTime = 24 * time.Hour

func backupSave(a *admin) *cobra.Command {
	var force bool
	save := &cobra.Command{
		Use: "save FILE", Short: "Save the state as of now, while the cluster goes on", Args: cobra.ExactArgs(1),
		Long: `Save the state as of now, while the cluster goes on. FILE comes to its name whole or not at all, readable by its owner
only. "-" is standard output; then a failure may leave a part, which every other command refuses.`,
		Example: `  countersign backup save /srv/backup/countersign-$(date +%F)
  countersign backup save - | ssh vault 'cat > countersign.backup'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "-" {
				if f, ok := cmd.OutOrStdout().(*os.File); ok && isTerminal(f) {
					return fmt.Errorf("%w: a backup is not for a terminal: name a file, or pipe it on", identity.ErrInvalid)
				}
				_, err := a.receiveBackup(cmd, cmd.OutOrStdout())
				return err
			}
			f, err := backup.Create(args[0], force)
			if err != nil {
				return err
			}
			defer f.Abort()
			h, err := a.receiveBackup(cmd, f)
			if err != nil {
				return err
			}
			if err := f.Commit(); err != nil {
				return err
			}
			return a.out.Print(cmd.OutOrStdout(), report{File: args[0], Header: h}, func() cli.Table { return report{File: args[0], Header: h}.table() })
		},
	}
	save.Flags().BoolVar(&force, "force", false, "replace FILE if it is there")
	return save
}

// receiveBackup streams a backup from the member into w.
func (a *admin) receiveBackup(cmd *cobra.Command, w io.Writer) (backup.Header, error) {
	patient := *a
	patient.timeout = max(a.timeout, backupTime)
	var head bytes.Buffer // the beginning, to know the header by
	var h backup.Header
	err := patient.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error {
		stream, err := c.SaveBackup(ctx, &adminv1.Empty{})
		if err != nil {
			return err
		}
		p := newProgress(cmd.ErrOrStderr(), "saving")
		defer p.end()
		var total, size int64
		for {
			res, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			if _, err := w.Write(res.Data); err != nil {
				return fmt.Errorf("writing the backup: %w", err)
			}
			total += int64(len(res.Data))
			if head.Len() < backup.MaxPreamble {
				head.Write(res.Data)
			}
			if size == 0 {
				if got, chunks, err := backup.ReadHeader(bytes.NewReader(head.Bytes())); err == nil {
					h, size = got, got.FileSize(chunks)
				}
			}
			p.at(total, size)
		}
		if total != size || size == 0 {
			return fmt.Errorf("%w: the member sent %d bytes of a backup of %d", identity.ErrUnavailable, total, size)
		}
		return nil
	})
	if err == nil && !h.Confirmed {
		fmt.Fprintln(cmd.ErrOrStderr(), "warning: no leader could be asked: the backup has what this member knew, which may lack what was written last")
	}
	return h, err
}

func backupInspect(a *admin) *cobra.Command {
	var key, file string
	inspect := &cobra.Command{
		Use: "inspect FILE", Short: "Say what a backup is, and with its key, whether it is whole and what is in it", Args: cobra.ExactArgs(1),
		Long: `Say what a backup is. Without a key that is its header, for which only a checksum vouches, and whether its length is right.
With the key (--key, or backup.key of the configuration) every byte is verified, and what is in it is counted.`,
		Example: `  countersign backup inspect countersign.backup
  countersign backup inspect countersign.backup --key file:/media/key/kek
  countersign backup inspect countersign.backup -c /etc/countersign/server.yaml -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c := &config.Server{}
			if file != "" {
				var err error
				if c, err = config.LoadServer(file); err != nil {
					return err
				}
			}
			if key != "" {
				c.Backup.Key = key
			}
			f, size, err := openBackupFile(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			r := report{File: args[0]}
			var chunks int64
			if r.Header, chunks, err = backup.ReadHeader(f); err != nil {
				return named(args[0], err)
			}
			if err := checkLength(size, r.Header.FileSize(chunks)); err != nil {
				return named(args[0], err)
			}
			if c.Backup.Key != "" {
				sum, err := verifyBackup(cmd, c, f, spiffeid.TrustDomain{})
				if err != nil {
					return named(args[0], err)
				}
				r.State = reportOf(sum)
			}
			return a.out.Print(cmd.OutOrStdout(), r, func() cli.Table { return r.table() })
		},
	}
	inspect.Flags().StringVar(&key, "key", "", "URI of the key that opens the backup, such as file:/media/key/kek")
	inspect.Flags().StringVarP(&file, "config", "c", "", "configuration file whose backup.key opens the backup")
	return inspect
}

func named(file string, err error) error { return fmt.Errorf("%s: %w", file, err) }

// openBackupFile opens a regular file: a backup is read twice.
func openBackupFile(path string) (*os.File, int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: opening the backup: %w", identity.ErrInvalid, err)
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, 0, errors.Join(fmt.Errorf("%w: %s is not a regular file: copy the backup into one", identity.ErrInvalid, path), err)
	}
	return f, info.Size(), nil
}

// checkLength finds a file that ends early without its key.
func checkLength(have, want int64) error {
	switch {
	case have < want:
		return &backup.DamageError{From: have, To: have, Reason: fmt.Sprintf("the file ends here, and lacks the %d bytes that follow", want-have)}
	case have > want:
		return &backup.DamageError{From: want, To: want, Reason: "the backup ends before this byte, and the file goes on"}
	}
	return nil
}

// verifyBackup reads the whole file and everything in it.
func verifyBackup(cmd *cobra.Command, c *config.Server, f *os.File, td spiffeid.TrustDomain) (store.Summary, error) {
	kek, closeKEK, err := openBackupKey(cmd.Context(), c)
	if err != nil {
		return store.Summary{}, err
	}
	defer closeKEK()
	p := newProgress(cmd.ErrOrStderr(), "verifying")
	defer p.end()
	r, err := p.rewound(f)
	if err != nil {
		return store.Summary{}, err
	}
	b, err := backup.Open(cmd.Context(), r, kek, td)
	if err != nil {
		return store.Summary{}, err
	}
	sum, err := store.Inspect(b.State)
	if err == nil {
		err = drained(b.State)
	}
	if err != nil {
		return store.Summary{}, fmt.Errorf("reading the state in the backup: %w", err)
	}
	if sum.TrustDomain != b.Header.TrustDomain {
		return store.Summary{}, fmt.Errorf("%w: the backup says that it is of trust domain %q, and its state of %q", identity.ErrInvalid, b.Header.TrustDomain, sum.TrustDomain)
	}
	return sum, nil
}

// drained wants the end: only there the file is known to be whole.
func drained(r io.Reader) error {
	n, err := io.Copy(io.Discard, r)
	if err == nil && n > 0 {
		err = fmt.Errorf("%w: %d bytes follow the state", identity.ErrInvalid, n)
	}
	return err
}

// report is what is told of a backup.
type report struct {
	File   string        `json:"file"`
	Header backup.Header `json:"header"`
	State  *stateReport  `json:"state,omitempty"` // only where all was verified
}

func (r report) table() cli.Table {
	h := r.Header
	t := cli.Table{Rows: [][]string{
		{"file", r.File}, {"trust domain", h.TrustDomain}, {"made", h.CreatedAt.UTC().Format(time.RFC3339) + " by member " + h.Member + ", version " + h.Version},
		{"state", fmt.Sprintf("%s, revision %d, level %d", bytesOf(h.Size), h.Revision, h.Level)},
		{"confirmed", map[bool]string{true: "yes: it lacks nothing that was acknowledged before", false: "no: there was no leader, it may lack what was written last"}[h.Confirmed]},
		{"opens with", h.Key + " (keep a copy of it elsewhere)"},
	}}
	if r.State != nil {
		t.Rows = append(t.Rows, []string{"verified", "every byte"})
		t.Rows = append(t.Rows, r.State.rows()...)
	}
	return t
}

// isTerminal reports whether a person looks at f.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func bytesOf(n int64) string {
	if n < 10<<10 {
		return strconv.FormatInt(n, 10) + " bytes"
	}
	if n < 10<<20 {
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}
