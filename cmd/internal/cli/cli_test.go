package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
)

// TestExitCode: scripts rely on these numbers.
func TestExitCode(t *testing.T) {
	for err, want := range map[error]int{
		nil:                         0,
		errors.New("anything else"): 1,
		identity.ErrExists:          1,
		identity.ErrPrecondition:    1,
		identity.ErrExhausted:       1,
		identity.ErrInvalid:         2,
		identity.ErrNotFound:        3,
		identity.ErrDenied:          4,
		identity.ErrUnauthenticated: 4,
		identity.ErrUnavailable:     5,
	} {
		if got := ExitCode(err); got != want {
			t.Errorf("%v: %d, want %d", err, got, want)
		}
		if err != nil {
			if got := ExitCode(fmt.Errorf("doing something: %w", err)); got != want {
				t.Errorf("%v, wrapped: %d, want %d", err, got, want)
			}
		}
	}
}

func output(t *testing.T, format string, v any, table Table) string {
	t.Helper()
	var o Output
	o.Flag(&cobra.Command{})
	if err := o.Set(format); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := o.Print(&b, v, func() Table { return table }); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestOutput(t *testing.T) {
	// The YAML keeps the order of the fields, and texts that look like something else stay texts.
	e := &adminv1.Entry{Id: "7", SpiffeId: "spiffe://example.org/web", Selectors: []string{"k8s:ns:shop"}, X509Ttl: durationpb.New(90e9), Hint: "2026-01-02T03:04:05Z"}
	table := Table{Header: []string{"ID", "SPIFFE ID"}, Rows: [][]string{{"7", "spiffe://example.org/web"}}}
	for format, want := range map[string]string{
		"table": "ID  SPIFFE ID\n7   spiffe://example.org/web\n",
		"json": `{
  "id": "7",
  "selectors": [
    "k8s:ns:shop"
  ],
  "spiffe_id": "spiffe://example.org/web",
  "x509_ttl": "90s",
  "hint": "2026-01-02T03:04:05Z"
}
`,
		"yaml": `id: "7"
selectors:
    - k8s:ns:shop
spiffe_id: spiffe://example.org/web
x509_ttl: 90s
hint: "2026-01-02T03:04:05Z"
`,
	} {
		if got := output(t, format, e, table); got != want {
			t.Errorf("%s:\n%s\nwant\n%s", format, got, want)
		}
	}
	if got := output(t, "yaml", []map[string]any{{"a": true, "b": "true", "c": nil}}, Table{}); got != "- a: true\n  b: \"true\"\n  c: null\n" {
		t.Errorf("plain values: %s", got)
	}
	var o Output
	o.Flag(&cobra.Command{})
	if o.String() != "table" || o.JSON() {
		t.Errorf("the default is %s", o.String())
	}
	for _, bad := range []string{"", "xml", "JSON", "json "} {
		if err := o.Set(bad); err == nil || o.String() != "table" {
			t.Errorf("%q: %v, %s", bad, err, o.String())
		}
	}
}

func TestExecute(t *testing.T) {
	ran := 0
	root := func() *cobra.Command {
		root := &cobra.Command{Use: "tool"}
		group := &cobra.Command{Use: "group"}
		group.AddCommand(&cobra.Command{Use: "do NAME", Args: cobra.ExactArgs(1), RunE: func(*cobra.Command, []string) error { ran++; return identity.ErrNotFound }})
		root.AddCommand(group)
		return root
	}
	for line, want := range map[string]struct {
		code int
		says string
	}{
		"":                   {ExitOK, ""},
		"group":              {ExitOK, ""},
		"group do x":         {ExitNotFound, "tool: not found\n"},
		"group do":           {ExitUsage, "tool: invalid input: accepts 1 arg(s), received 0: see tool group do --help\n"},
		"group dp x":         {ExitUsage, "tool: invalid input: unknown command \"dp\", perhaps do: see tool group --help\n"},
		"grup":               {ExitUsage, "tool: invalid input: unknown command \"grup\", perhaps group: see tool --help\n"},
		"group do x --loud":  {ExitUsage, "tool: invalid input: unknown flag: --loud: see tool group do --help\n"},
		"completion nothing": {ExitUsage, "tool: invalid input: unknown command \"nothing\": see tool completion --help\n"},
	} {
		var out, errOut bytes.Buffer
		if got := Execute(root(), strings.Fields(line), &out, &errOut); got != want.code || errOut.String() != want.says {
			t.Errorf("%q: %d %q, want %d %q", line, got, errOut.String(), want.code, want.says)
		}
	}
	if ran != 1 {
		t.Errorf("the command ran %d times", ran)
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	file, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(file, []byte("12345678"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadFile(file, 8); err != nil || string(got) != "12345678" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := ReadFile(file, 7); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "larger than 7 bytes") {
		t.Errorf("too large: %v", err)
	}
	for _, path := range []string{fifo, dir, "/dev/zero"} {
		if _, err := ReadFile(path, 8); !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := ReadFile(filepath.Join(dir, "absent"), 8); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}

func TestLogger(t *testing.T) {
	var b bytes.Buffer
	log := Logger(&b, config.Log{Level: "warn", Format: "json"})
	log.Info("not this")
	log.Warn("but this", "key", "value")
	if got := b.String(); strings.Contains(got, "not this") || !strings.HasPrefix(got, "{") || !strings.Contains(got, `"msg":"but this","key":"value"`) {
		t.Error(got)
	}
}

func TestServeHealth(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	why := make(chan error, 1)
	done := make(chan error, 1)
	go func() { done <- ServeHealth(ctx, l, func() error { return <-why }, nil) }()
	ask := func(method, path string) (int, string) {
		req, err := http.NewRequest(method, "http://"+l.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(body)
	}
	why <- errors.New("no leader")
	if code, body := ask("GET", "/ready"); code != 503 || body != "not ready: no leader\n" {
		t.Errorf("%d %q", code, body)
	}
	why <- nil
	if code, body := ask("GET", "/ready"); code != 200 || body != "ready\n" {
		t.Errorf("%d %q", code, body)
	}
	if code, _ := ask("GET", "/live"); code != 200 {
		t.Errorf("/live: %d", code)
	}
	if code, _ := ask("GET", "/"); code != 404 {
		t.Errorf("/: %d", code)
	}
	if code, _ := ask("POST", "/ready"); code != 405 {
		t.Errorf("POST: %d", code)
	}
	stop()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("stopped: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it does not stop")
	}
}
