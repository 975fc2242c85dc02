package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/audit"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
)

// TestAuditOutputs: one sink at least must be waited for.
func TestAuditOutputs(t *testing.T) {
	syslog := &config.AuditSyslog{Address: "logs.example.org:6514"}
	for name, tc := range map[string]struct {
		c    config.Audit
		want string // names and whether required
	}{
		"files alone":                      {config.Audit{File: &config.AuditFile{}}, ""},
		"files and all":                    {config.Audit{File: &config.AuditFile{}, Stdout: true, Syslog: syslog}, "stdout false, syslog logs.example.org:6514 false"},
		"a required collector":             {config.Audit{File: &config.AuditFile{}, Syslog: &config.AuditSyslog{Address: "x:1", Required: true}}, "syslog x:1 true"},
		"stdout alone":                     {config.Audit{File: &config.AuditFile{Off: true}, Stdout: true}, "stdout true"},
		"no files, stdout and a collector": {config.Audit{File: &config.AuditFile{Off: true}, Stdout: true, Syslog: syslog}, "stdout false, syslog logs.example.org:6514 true"},
	} {
		out, err := auditOutputs(&tc.c, "ca-1")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, o := range out {
			got = append(got, fmt.Sprintf("%s %t", o.Name, o.Required))
		}
		if strings.Join(got, ", ") != tc.want {
			t.Errorf("%s: %v, want %s", name, got, tc.want)
		}
	}
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]config.AuditSyslog{
		"no file":          {Address: "x:1", CAFile: junk + "-absent"},
		"no certificate":   {Address: "x:1", CAFile: junk},
		"no key pair":      {Address: "x:1", CertFile: junk, KeyFile: junk},
		"no host and port": {Address: "x"},
	} {
		if _, err := auditOutputs(&config.Audit{File: &config.AuditFile{}, Syslog: &s}, "ca-1"); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// auditLog makes a log without a member: its checkpoints are not signed.
func auditLog(t *testing.T, n int) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "audit")
	l, err := audit.New(audit.Config{Member: "ca-1", Dir: dir, Reserve: 1 << 16, Deadline: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	for l.Ready() != nil {
		time.Sleep(time.Millisecond)
	}
	for i := range n {
		if err := l.Record(ctx, audit.Event{Action: "admin.create_entry", Outcome: audit.Attempted, Subjects: []string{fmt.Sprintf("entry-%d", i)}}); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestAuditVerifyCommand(t *testing.T) {
	dir := auditLog(t, 5)
	verify := func(code int, word string, args ...string) {
		t.Helper()
		var out, errOut bytes.Buffer
		if got := run(context.Background(), append([]string{"audit", "verify"}, args...), &out, &errOut); got != code || !strings.Contains(out.String()+errOut.String(), word) {
			t.Errorf("%v: exit code %d, want %d, and %q: %s%s", args, got, code, word, out.String(), errOut.String())
		}
	}
	verify(cli.ExitOK, "nothing altered", dir, "--no-signatures")
	verify(cli.ExitUsage, "--bundle", dir)
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	verify(cli.ExitUsage, "no PEM certificate", dir, "--bundle", junk)
	verify(cli.ExitFailure, "no such file", filepath.Join(dir, "absent"), "--no-signatures")
	files, err := filepath.Glob(filepath.Join(dir, "audit-*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	verify(cli.ExitOK, `"records": 7`, files[0], "--no-signatures", "-o", "json")
	raw, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0], bytes.Replace(raw, []byte("entry-2"), []byte("entry-9"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	verify(cli.ExitFailure, "line 4: record 4 altered", dir, "--no-signatures")
	verify(cli.ExitFailure, "no checkpoint covers it", files[0], "--no-signatures")
}

// TestRecordLine: what strangers wrote cannot act on a terminal, nor look like something else.
func TestRecordLine(t *testing.T) {
	r := &audit.Record{Event: audit.Event{
		Action: "agent.attest", Outcome: audit.Refused, Who: audit.Who{Kind: "guest", Address: "10.0.0.1:1"}, Subjects: []string{"a\x1b[2Jb"},
		Reason: "bad\ntoken \u202e", RequestID: "Q-1", Details: audit.Details{{Key: "k", Value: "v\r"}},
	}}
	line := recordLine(r)
	if strings.ContainsAny(line, "\n\r\x1b\u202e") || !strings.Contains(line, "[Q-1]") || !strings.Contains(line, `bad\ntoken`) {
		t.Errorf("%q", line)
	}
}

func TestAuditFilterTimes(t *testing.T) {
	now := time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC)
	q, err := (&auditFilter{since: "2h", until: "2027-01-31T11:30:00Z"}).query(now)
	if err != nil || !q.Since.AsTime().Equal(now.Add(-2*time.Hour)) || !q.Until.AsTime().Equal(now.Add(-30*time.Minute)) {
		t.Errorf("%v %v", q, err)
	}
	if _, err := (&auditFilter{since: "yesterday"}).query(now); cli.ExitCode(err) != cli.ExitUsage {
		t.Errorf("yesterday: %v", err)
	}
}
