package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
)

// openAudit opens the audit log, with the sinks that the configuration names.
func (m *member) openAudit() error {
	outputs, err := auditOutputs(&m.c.Audit, m.c.Name)
	if err != nil {
		return err
	}
	f := m.c.Audit.File
	c := audit.Config{
		Member: m.c.Name, MaxSize: f.MaxSize, Keep: f.Keep, KeepBytes: f.KeepBytes, Reserve: f.Reserve, Outputs: outputs,
		Deadline: m.c.Audit.Deadline, Sign: m.signCheckpoint, Now: m.hooks.now, Log: m.log,
	}
	if !f.Off {
		c.Dir = f.Dir
	}
	m.audit, err = audit.New(c)
	return err
}

// auditOutputs are the sinks beside the files. Without files, the best of the others is required: no decision may go unrecorded.
func auditOutputs(c *config.Audit, member string) ([]audit.Output, error) {
	var out []audit.Output
	if c.Stdout {
		out = append(out, audit.Output{Name: "stdout", Required: c.File.Off && c.Syslog == nil, Sink: audit.Stream(os.Stdout)})
	}
	s := c.Syslog
	if s == nil {
		return out, nil
	}
	conf := &tls.Config{}
	if s.CAFile != "" {
		raw, err := readInput(s.CAFile)
		if err != nil {
			return nil, fmt.Errorf("reading audit.syslog.ca_file: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(raw) {
			return nil, fmt.Errorf("%w: audit.syslog.ca_file %s holds no PEM certificate", identity.ErrInvalid, s.CAFile)
		}
	}
	if s.CertFile != "" {
		if _, err := tls.LoadX509KeyPair(s.CertFile, s.KeyFile); err != nil {
			return nil, fmt.Errorf("%w: audit.syslog.cert_file and key_file: %v", identity.ErrInvalid, err)
		}
		// Read for each connection: whoever renews it need not restart the member.
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(s.CertFile, s.KeyFile)
			return &cert, err
		}
	}
	sink, err := audit.Syslog(audit.SyslogConfig{Address: s.Address, TLS: conf, Member: member})
	if err != nil {
		return nil, err
	}
	return append(out, audit.Output{Name: "syslog " + s.Address, Required: s.Required || c.File.Off, Sink: sink}), nil
}

// signCheckpoint signs with the member's own SVID, so that the trust bundle is all that it takes to verify.
func (m *member) signCheckpoint(data []byte) (sig []byte, chain [][]byte, err error) {
	cert, err := m.ca.MemberCertificate()
	if err != nil {
		return nil, nil, err
	}
	key, ok := cert.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, nil, errors.New("the member's key cannot sign")
	}
	digest := sha256.Sum256(data)
	sig, err = key.Sign(rand.Reader, digest[:], crypto.SHA256)
	return sig, cert.Certificate, err
}

func auditCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{
		Use: "audit", Short: "See what a member decided, and check that nobody changed the record of it",
		Long: `Every decision of a member is in its audit log before it takes effect. The log is the member's own: ask each, or a collector of all.
docs/AUDIT.md describes the records.`,
	}
	a.flags(cmd)
	cmd.AddCommand(a.auditTail(), a.auditQuery(), a.auditVerify())
	return cmd
}

// auditFilter is what tail and query select by.
type auditFilter struct {
	since, until     string
	actions          []string
	outcome, who, on string
}

func (f *auditFilter) flags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringSliceVar(&f.actions, "action", nil, "only these actions; one that ends with a dot selects all that begin with it, such as issue. (repeatable)")
	fl.StringVar(&f.outcome, "outcome", "", "only this outcome: attempted, ok, refused or failed")
	fl.StringVar(&f.who, "who", "", "only what this did: a part of a SPIFFE ID, uid, address or kind")
	fl.StringVar(&f.on, "on", "", "only what this was done to: a part of a SPIFFE ID, entry, workload, serial number or request ID")
}

func (f *auditFilter) query(now time.Time) (*adminv1.AuditQuery, error) {
	q := &adminv1.AuditQuery{Actions: f.actions, Outcome: f.outcome, Who: f.who, Subject: f.on}
	for _, x := range []struct {
		name, value string
		to          **timestamppb.Timestamp
	}{{"--since", f.since, &q.Since}, {"--until", f.until, &q.Until}} {
		if x.value == "" {
			continue
		}
		if d, err := time.ParseDuration(x.value); err == nil {
			*x.to = timestamppb.New(now.Add(-d))
			continue
		}
		t, err := time.Parse(time.RFC3339, x.value)
		if err != nil {
			return nil, fmt.Errorf("%w: %s %q: want a time such as 2027-01-31T12:00:00Z, or how long ago, such as 2h", identity.ErrInvalid, x.name, x.value)
		}
		*x.to = timestamppb.New(t)
	}
	return q, nil
}

func (a *admin) auditTail() *cobra.Command {
	f := &auditFilter{}
	n := uint32(20)
	follow := false
	cmd := &cobra.Command{
		Use: "tail", Short: "Show the newest records, and with -f those to come", Args: cobra.NoArgs,
		Example: `  countersign audit tail -f
  countersign audit tail -f --outcome refused
  countersign audit tail -n 100 --action admin. -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := f.query(time.Now())
			if err != nil {
				return err
			}
			q.Tail, q.Follow = n, follow
			if n == 0 {
				q.Since = timestamppb.Now()
			}
			err = a.auditStream(cmd, q, func(line string) error { return a.printRecord(cmd.OutOrStdout(), line) })
			if follow && cmd.Context().Err() != nil {
				return nil // the usual way to end it
			}
			return err
		},
	}
	f.flags(cmd)
	cmd.Flags().Uint32VarP(&n, "lines", "n", n, "how many")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is recorded from now on")
	return cmd
}

func (a *admin) auditQuery() *cobra.Command {
	f := &auditFilter{}
	cmd := &cobra.Command{
		Use: "query", Short: "Show the records of a time, of somebody, or about something", Args: cobra.NoArgs,
		Example: `  countersign audit query --since 24h --on spiffe://example.org/ns/prod/sa/web
  countersign audit query --on 7cd1a05e        # which request got the certificate with this serial number?
  countersign audit query --since 2027-01-31T00:00:00Z --until 2027-02-01T00:00:00Z --action admin. -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := f.query(time.Now())
			if err != nil {
				return err
			}
			return a.auditStream(cmd, q, func(line string) error { return a.printRecord(cmd.OutOrStdout(), line) })
		},
	}
	f.flags(cmd)
	cmd.Flags().StringVar(&f.since, "since", "", "from this time on, or from so long ago")
	cmd.Flags().StringVar(&f.until, "until", "", "before this time, or before so long ago")
	return cmd
}

// auditStream asks the member; it has no deadline, for records may be many, or yet to come.
func (a *admin) auditStream(cmd *cobra.Command, q *adminv1.AuditQuery, f func(line string) error) error {
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	l, err := a.dial(ctx)
	if err != nil {
		return err
	}
	defer l.Close()
	stream, err := adminv1.NewAdminClient(l.conn).QueryAudit(ctx, q)
	for err == nil {
		var m *adminv1.AuditRecords
		if m, err = stream.Recv(); err != nil {
			break
		}
		for _, line := range m.Lines {
			if err := f(line); err != nil {
				return err
			}
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return l.explain(err)
}

// printRecord shows a line as it is, or what matters most of it to a person.
func (a *admin) printRecord(w io.Writer, line string) error {
	if a.out.JSON() {
		_, err := fmt.Fprintln(w, line)
		return err
	}
	r, err := audit.Parse([]byte(line))
	if err != nil {
		_, err := fmt.Fprintf(w, "%q is damaged: run countersign audit verify\n", line)
		return err
	}
	_, err = fmt.Fprintln(w, recordLine(r))
	return err
}

// recordLine is a record on one line. Texts of strangers are quoted: they may hold anything.
func recordLine(r *audit.Record) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %-9s %-22s", r.Time.UTC().Format("2006-01-02T15:04:05.000Z"), r.Outcome, r.Action)
	who := r.Who.Kind
	for _, x := range []string{r.Who.Role, r.Who.ID, r.Who.UID, r.Who.Address} {
		if x != "" {
			who += " " + x
		}
	}
	fmt.Fprintf(&b, "  %s", clean(who))
	if len(r.Subjects) > 0 {
		fmt.Fprintf(&b, "  -> %s", clean(strings.Join(r.Subjects, ", ")))
	}
	for _, x := range []struct{ name, value string }{{"entry", r.Entry}, {"serial", r.Serial}} {
		if x.value != "" {
			fmt.Fprintf(&b, "  %s=%s", x.name, clean(x.value))
		}
	}
	for _, d := range r.Details {
		fmt.Fprintf(&b, "  %s=%q", d.Key, d.Value)
	}
	if r.Count > 0 {
		fmt.Fprintf(&b, "  %d times", r.Count)
	}
	if r.Reason != "" {
		fmt.Fprintf(&b, "  %q", r.Reason)
	}
	if r.RequestID != "" {
		fmt.Fprintf(&b, "  [%s]", clean(r.RequestID))
	}
	return b.String()
}

func clean(s string) string {
	if q := fmt.Sprintf("%q", s); q[1:len(q)-1] != s {
		return q
	}
	return s
}
