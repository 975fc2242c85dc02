package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
)

// side is a trust domain of one member, in this process.
type side struct {
	t      *testing.T
	td     string
	socket string
	public string
	c      *config.Server
}

func newSide(t *testing.T, td, more string) *side {
	t.Helper()
	dir, err := os.MkdirTemp("", "cs-") // short: a socket lives in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &side{t: t, td: td, socket: filepath.Join(dir, "admin.sock"), public: freeAddress(t)}
	if s.c, err = config.ParseServer("x", fmt.Appendf(nil, "version: 1\ntrust_domain: %s\nname: ca-1\ndata_dir: %s\nlisten: %s\nadmin_socket: %s\nhealth: %s\n%s",
		td, filepath.Join(dir, "data"), freeAddress(t), s.socket, freeAddress(t), strings.ReplaceAll(more, "PUBLIC", s.public))); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- runMember(ctx, s.c, slog.New(slog.DiscardHandler), func() { close(ready) }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		done <- err
		t.Fatal(err)
	case <-time.After(time.Minute):
		t.Fatal("the member is not ready")
	}
	return s
}

// run is a command of an operator of the side; stdin goes to it.
func (s *side) run(code int, stdin string, args ...string) (out, errOut string) {
	s.t.Helper()
	var o, e bytes.Buffer
	root := newRoot()
	root.SetContext(s.t.Context())
	root.SetIn(strings.NewReader(stdin))
	if got := cli.Execute(root, append(args, "--socket", s.socket), &o, &e); got != code {
		s.t.Fatalf("%v: exit code %d, want %d: %s%s", args, got, code, o.String(), e.String())
	}
	return strings.TrimSpace(o.String()), e.String()
}

func (s *side) until(what string, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			out, _ := s.run(0, "", "federation", "list")
			s.t.Fatalf("never happened: %s:\n%s", what, out)
		}
	}
}

type listed struct {
	Federations []struct {
		TrustDomain string `json:"trust_domain"`
		Profile     string `json:"profile"`
		Sequence    string `json:"sequence"`
		Pinned      bool   `json:"pinned"`
		Status      *struct {
			LastSuccess string `json:"last_success"`
			LastError   string `json:"last_error"`
		} `json:"status"`
	} `json:"federations"`
}

func (s *side) list() (l listed) {
	s.t.Helper()
	out, _ := s.run(0, "", "federation", "list", "-o", "json")
	if err := json.Unmarshal([]byte(out), &l); err != nil {
		s.t.Fatal(err)
	}
	return l
}

func (s *side) refreshed() bool {
	l := s.list()
	return len(l.Federations) == 1 && l.Federations[0].Status != nil && l.Federations[0].Status.LastSuccess != ""
}

// TestFederationByInvites: one string each way, and both sides trust each other.
func TestFederationByInvites(t *testing.T) {
	const conf = "public: {listen: PUBLIC}\nfederation: {refresh_hint: 1s}\n"
	a, b := newSide(t, "a.test", conf), newSide(t, "b.test", conf)
	toB, _ := a.run(0, "", "federation", "invite")
	dry, _ := b.run(0, toB, "federation", "accept", "-", "--dry-run", "-o", "yaml")
	if !strings.Contains(dry, "endpoint_id: spiffe://a.test/countersign/bundle-endpoint") || len(b.list().Federations) != 0 {
		t.Errorf("dry run: %s", dry)
	}
	toA, says := b.run(0, "", "federation", "accept", toB)
	if !strings.HasPrefix(toA, "csf1.") || !strings.Contains(says, "a.test is trusted now") {
		t.Errorf("%s: %s", toA, says)
	}
	a.run(0, toA+"\n", "federation", "accept", "-", "--no-token")
	for _, s := range []*side{a, b} {
		s.until("the partner's bundle is refreshed", s.refreshed)
	}
	// Who is there already is not replaced by accident, and one's own invite is nobody's.
	_, says = b.run(cli.ExitFailure, "", "federation", "accept", toB)
	if !strings.Contains(says, "already exists") {
		t.Error(says)
	}
	b.run(0, "", "federation", "accept", toB, "--replace")
	_, says = a.run(cli.ExitUsage, "", "federation", "accept", toB)
	if !strings.Contains(says, "own trust domain") {
		t.Error(says)
	}
	_, says = a.run(cli.ExitUsage, "", "federation", "accept", toA[:len(toA)-9])
	if !strings.Contains(says, "invite") {
		t.Error(says)
	}
	// An update that leads nowhere leaves the last good bundle, and is seen.
	nowhere := "https://" + freeAddress(t) + "/bundle"
	a.run(0, "", "federation", "update", "b.test", "--url", nowhere)
	_, says = a.run(cli.ExitUnavailable, "", "federation", "refresh", "b.test")
	if !strings.Contains(says, "refreshing the bundle") {
		t.Error(says)
	}
	l := a.list().Federations[0]
	if l.Sequence == "" || l.Status == nil || l.Status.LastError == "" {
		t.Errorf("%+v", l)
	}
	if out, _ := a.run(0, "", "federation", "list"); !strings.Contains(out, "failures") {
		t.Error(out)
	}
	// The invite mends it; pinned, it begins anew.
	a.run(0, toA, "federation", "update", "b.test", "--invite", "-")
	a.run(0, "", "federation", "refresh", "b.test")
	_, says = a.run(cli.ExitUsage, toB, "federation", "update", "b.test", "--invite", "-")
	if !strings.Contains(says, "not of") {
		t.Error(says)
	}
	out, _ := a.run(0, "", "federation", "show", "b.test")
	if !strings.Contains(out, "spiffe://b.test/countersign/bundle-endpoint") {
		t.Error(out)
	}
	_, warned := a.run(0, "", "entry", "create", "-s", "k8s:ns:x", "--id", "spiffe://a.test/x", "--federates-with", "b.test,nobody.test")
	if !strings.Contains(warned, "warning: federates_with nobody.test") || strings.Contains(warned, "b.test has") {
		t.Error(warned)
	}
	var o, e bytes.Buffer
	t.Setenv("COUNTERSIGN_ADMIN_SOCKET", a.socket)
	if code := run(t.Context(), []string{"__complete", "federation", "show", ""}, &o, &e); code != 0 || !strings.Contains(o.String(), "b.test") {
		t.Errorf("completion: %s", o.String())
	}
	out, _ = a.run(0, "", "federation", "delete", "b.test", "--dry-run")
	if !strings.Contains(out, "entries that federate with it: 1") || len(a.list().Federations) != 1 {
		t.Error(out)
	}
	a.run(0, "", "federation", "delete", "b.test")
	if len(a.list().Federations) != 0 {
		t.Error("it is still there")
	}
	a.run(cli.ExitNotFound, "", "federation", "delete", "b.test")
}

// TestFederationByWeb: a certificate of the web's, in files, beside the SVID's port, and a relationship by parameters.
func TestFederationByWeb(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	der := writeWebCert(t, certFile, keyFile, "127.0.0.1")
	svidPort := freeAddress(t)
	web := newSide(t, "web.test", fmt.Sprintf("public: {listen: PUBLIC, tls: {cert_file: %s, key_file: %s}, spiffe_listen: %s}\nfederation: {refresh_hint: 1s}\n", certFile, keyFile, svidPort))
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSide(t, "client.test", "federation: {refresh_hint: 1s, web_ca_file: "+ca+"}\n")
	url := "https://" + web.public + "/bundle"
	s.run(0, "", "federation", "create", "web.test", "--profile", "https_web", "--url", url)
	s.until("the bundle is fetched", s.refreshed)
	if l := s.list().Federations[0]; l.Profile != "https_web" || l.Pinned || l.Sequence == "" {
		t.Errorf("%+v", l)
	}
	// By the other profile its bundle is needed first, as it is now.
	_, says := s.run(cli.ExitUsage, "", "federation", "create", "other.test", "--profile", "https_spiffe", "--url", "https://"+svidPort+"/bundle", "--endpoint-id", "spiffe://other.test/x")
	if !strings.Contains(says, "--bundle-file") {
		t.Error(says)
	}
	doc := fetchRaw(t, url)
	file := filepath.Join(dir, "bundle.json")
	if err := os.WriteFile(file, doc, 0o600); err != nil {
		t.Fatal(err)
	}
	_, says = s.run(cli.ExitUsage, "", "federation", "create", "other.test", "--profile", "https_spiffe", "--url", "https://"+svidPort+"/bundle", "--endpoint-id", "spiffe://other.test/x", "--bundle-file", file)
	if !strings.Contains(says, "not of trust domain") {
		t.Error(says)
	}
	s.run(0, "", "federation", "delete", "web.test")
	s.run(0, "", "federation", "create", "web.test", "--profile", "https_spiffe", "--url", "https://"+svidPort+"/bundle", "--endpoint-id", "spiffe://web.test/countersign/bundle-endpoint", "--bundle-file", file)
	s.until("the bundle is fetched from the SVID's port", s.refreshed)
	// Both ports can be told of; one that is not served cannot.
	for _, profile := range []string{"https_web", "https_spiffe"} {
		web.run(0, "", "federation", "invite", "--profile", profile)
	}
	_, says = s.run(cli.ExitFailure, "", "federation", "invite")
	if !strings.Contains(says, "public.listen") {
		t.Error(says)
	}
	// Who cannot be told of is not left with half a federation.
	token, _ := web.run(0, "", "federation", "invite")
	s.run(0, "", "federation", "delete", "web.test")
	s.run(cli.ExitFailure, token, "federation", "accept", "-")
	if len(s.list().Federations) != 0 {
		t.Error("half a federation")
	}
	s.run(0, token, "federation", "accept", "-", "--no-token")
}

func fetchRaw(t *testing.T, url string) []byte {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr, Timeout: 30 * time.Second}).Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
