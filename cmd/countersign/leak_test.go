package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// encodings are the ways in which a secret might lie about. Base64 of it within something longer looks different by where in
// that it begins: each of the three alignments is cut to the characters that the secret alone decides.
func encodings(secret []byte) map[string][]byte {
	out := map[string][]byte{
		"raw": secret, "hex": []byte(hex.EncodeToString(secret)), "HEX": []byte(strings.ToUpper(hex.EncodeToString(secret))),
	}
	for name, enc := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
		for shift := range 3 {
			padded := append(make([]byte, shift), secret...)
			text := enc.EncodeToString(padded)
			from, to := (shift*8+5)/6, len(padded)*8/6
			out[fmt.Sprint(name, "+", shift)] = []byte(text[from:to])
		}
	}
	return out
}

// leaks names what of the secrets is in data.
func leaks(data []byte, secrets map[string][]byte) []string {
	var out []string
	for name, s := range secrets {
		for how, b := range encodings(s) {
			if bytes.Contains(data, b) {
				out = append(out, name+" as "+how)
			}
		}
	}
	return out
}

// ear keeps what goes over connections, in both directions.
type ear struct {
	mu      sync.Mutex
	in, out map[*eared]*bytes.Buffer
}

type eared struct {
	net.Conn
	ear *ear
}

func (e *ear) tap(c net.Conn) net.Conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	w := &eared{c, e}
	e.in[w], e.out[w] = &bytes.Buffer{}, &bytes.Buffer{}
	return w
}

func (c *eared) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.ear.mu.Lock()
	c.ear.in[c].Write(p[:n])
	c.ear.mu.Unlock()
	return n, err
}

func (c *eared) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.ear.mu.Lock()
	c.ear.out[c].Write(p[:n])
	c.ear.mu.Unlock()
	return n, err
}

// heard is everything, one connection's direction after the other.
func (e *ear) heard() []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []byte
	for _, side := range []map[*eared]*bytes.Buffer{e.in, e.out} {
		for _, b := range side {
			all = append(all, b.Bytes()...)
		}
	}
	return all
}

// leakMember is a member in this process.
type leakMember struct {
	*member
	stop context.CancelFunc
	done chan error
}

func startEared(t *testing.T, dir, name, join string, e *ear) *leakMember {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
		t.Fatal(err)
	}
	addr := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	d := filepath.Join(dir, name)
	yaml := fmt.Sprintf("version: 1\ntrust_domain: leak.test\nname: %s\ndata_dir: %s/data\nlisten: %s\nadmin_socket: %s/s\nhealth: %s\nbackup:\n  dir: %s/data/backups\n", name, d, addr(), d, addr(), d)
	if join != "" {
		if err := os.WriteFile(filepath.Join(d, "join"), []byte(join), 0o600); err != nil {
			t.Fatal(err)
		}
		yaml += "join_token_file: " + d + "/join\n"
	}
	file := filepath.Join(d, "server.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.LoadServer(file)
	if err != nil {
		t.Fatal(err)
	}
	m := &leakMember{member: newMember(c, slog.New(slog.NewTextHandler(logTo{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))), done: make(chan error, 1)}
	m.tap = e.tap
	m.hooks.snapshotThreshold, m.hooks.trailingLogs, m.hooks.snapshotInterval = 8, 4, 50*time.Millisecond
	var ctx context.Context
	ctx, m.stop = context.WithCancel(context.Background())
	ready := make(chan struct{})
	go func() { m.done <- m.serve(ctx, func() { close(ready) }) }()
	t.Cleanup(m.stop)
	select {
	case <-ready:
	case err := <-m.done:
		t.Fatalf("%s ended: %v", name, err)
	case <-time.After(time.Minute):
		t.Fatalf("%s is not ready", name)
	}
	return m
}

// logTo writes to the test's log, as long as there is one.
type logTo struct{ t *testing.T }

func (l logTo) Write(p []byte) (int, error) { return len(p), nil }

func (m *leakMember) adminClient(t *testing.T) adminv1.AdminClient {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+m.c.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return adminv1.NewAdminClient(conn)
}

// TestNothingSecretIsReadable runs three members through joining, commands, snapshots, two rotations of the seal and a
// backup, and then looks for every secret there is in every byte on their disks and in all that raft sent, as it was inside TLS.
func TestNothingSecretIsReadable(t *testing.T) {
	dir, err := os.MkdirTemp("", "cs-") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	e := &ear{in: map[*eared]*bytes.Buffer{}, out: map[*eared]*bytes.Buffer{}}
	secrets := map[string][]byte{}
	members := []*leakMember{startEared(t, dir, "a", "", e)}
	client := members[0].adminClient(t)
	token := func(req *adminv1.CreateTokenRequest) string {
		res, err := client.CreateToken(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		tok, err := node.ParseToken(res.Token)
		if err != nil {
			t.Fatal(err)
		}
		secrets["the secret of a join token for "+tok.Purpose+" "+fmt.Sprint(len(secrets))] = []byte(tok.Secret)
		return res.Token
	}
	for _, name := range []string{"b", "c"} {
		members = append(members, startEared(t, dir, name, token(&adminv1.CreateTokenRequest{Purpose: identity.JoinServer}), e))
	}
	token(&adminv1.CreateTokenRequest{Purpose: identity.JoinAgent})
	waitSeal(t, ctx, client, 1)
	note := func() {
		for _, m := range members {
			plain := m.data.keyring.Plain()
			for i, n := range m.data.keyring.Terms() {
				secrets[fmt.Sprintf("data key %d", n)] = plain[5+36*i+4 : 5+36*(i+1)]
			}
			for _, a := range m.store.Authorities() {
				der, err := m.data.keyring.Open(a.SealedKey, identity.AuthorityAD(m.td, a.Kind, a.ID))
				if err != nil {
					t.Fatal(err)
				}
				key, err := x509.ParsePKCS8PrivateKey(der)
				if err != nil {
					t.Fatal(err)
				}
				d, err := key.(*ecdsa.PrivateKey).Bytes()
				if err != nil {
					t.Fatal(err)
				}
				secrets["the PKCS #8 of the "+string(a.Kind)+" authority"] = der
				secrets["the key of the "+string(a.Kind)+" authority"] = d
			}
		}
	}
	note()
	for round := range uint32(2) {
		for i := range 12 {
			if _, err := client.CreateEntry(ctx, &adminv1.Entry{Selectors: []string{"k8s:ns:prod", fmt.Sprintf("k8s:sa:sa-%d-%d", round, i)}, SpiffeId: fmt.Sprintf("spiffe://leak.test/known-to-the-test/%d/%d", round, i)}); err != nil {
				t.Fatal(err)
			}
		}
		stream, err := members[round+1].adminClient(t).RotateSeal(ctx, &adminv1.Empty{})
		for err == nil {
			_, err = stream.Recv()
		}
		waitSeal(t, ctx, client, round+2)
		note()
	}
	var backup bytes.Buffer
	if err := members[1].saveBackup(ctx, &backup); err != nil {
		t.Fatal(err)
	}
	until(t, "a snapshot on every member", func() bool {
		for _, m := range members {
			if found, _ := filepath.Glob(filepath.Join(m.data.path, "raft", "snapshots", "*", "state.bin")); len(found) == 0 {
				return false
			}
		}
		return true
	})
	if len(secrets) < 10 {
		t.Fatalf("only %d secrets are known", len(secrets))
	}
	for _, m := range members {
		m.stop()
	}
	for _, m := range members {
		if err := <-m.done; err != nil {
			t.Errorf("a member ended with %v", err)
		}
	}

	places := map[string][]byte{"raft's traffic": e.heard(), "a backup": backup.Bytes()}
	for _, m := range members {
		kek, err := os.ReadFile(filepath.Join(m.data.path, "kek"))
		if err != nil {
			t.Fatal(err)
		}
		secrets["the key-encryption key of "+m.c.Name] = kek
		err = filepath.WalkDir(m.data.path, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				places[path], err = os.ReadFile(path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	for where, data := range places {
		for _, what := range leaks(data, secrets) {
			// The key-encryption key is in its own file: that is what the file is.
			if strings.HasSuffix(where, "/kek") && strings.HasPrefix(what, "the key-encryption key of ") {
				seen++
				continue
			}
			t.Errorf("%s holds %s", where, what)
		}
	}
	// The grep looks where it should, and can see: a known value and the ciphertexts are there, and what is planted is found.
	if seen != 3 {
		t.Errorf("found %d key-encryption keys in their files, want 3", seen)
	}
	if !bytes.Contains(places["raft's traffic"], []byte("/known-to-the-test")) {
		t.Error("the capture is not inside TLS: a known value is not in it")
	}
	sealed := 0
	for _, a := range members[0].data.mustAuthorities(t) {
		for _, data := range places {
			if bytes.Contains(data, []byte(base64.StdEncoding.EncodeToString(a.SealedKey))) {
				sealed++
			}
		}
	}
	if sealed < 4 {
		t.Errorf("the sealed keys were seen %d times only", sealed)
	}
	for name, s := range secrets {
		for how, b := range encodings(s) {
			planted := append(append(bytes.Clone(places["raft's traffic"]), b...), "tail"...)
			if found := leaks(planted, map[string][]byte{name: s}); len(found) == 0 {
				t.Errorf("%s, planted as %s, is not found", name, how)
			}
		}
		break // each costs a copy of everything
	}
	if len(places) < 20 {
		t.Errorf("looked at %d places only", len(places))
	}
}

// TestEncodingsAreFound: whatever stands before and after a secret, each way of writing it is found.
func TestEncodingsAreFound(t *testing.T) {
	secret := []byte("0123456789abcdef\xff\xfe\xfd\xfc+/+/\x00\x01")
	for before := range 7 {
		for after := range 4 {
			text := append(append(bytes.Repeat([]byte{0xa5}, before), secret...), bytes.Repeat([]byte{0x5a}, after)...)
			for how, b := range map[string]string{
				"raw": string(text), "hex": hex.EncodeToString(text), "HEX": strings.ToUpper(hex.EncodeToString(text)),
				"base64": base64.StdEncoding.EncodeToString(text), "base64url": base64.URLEncoding.EncodeToString(text),
			} {
				if found := leaks([]byte(b), map[string][]byte{"s": secret}); len(found) == 0 {
					t.Errorf("%s with %d bytes before and %d after is not found", how, before, after)
				}
			}
			if found := leaks(bytes.ReplaceAll(text, secret[:8], []byte("--------")), map[string][]byte{"s": secret}); len(found) > 0 {
				t.Errorf("found what is not there: %v", found)
			}
		}
	}
}

func (d *dataDir) mustAuthorities(t *testing.T) []identity.Authority {
	t.Helper()
	list, err := d.loadAuthorities()
	if err != nil || len(list) == 0 {
		t.Fatalf("%d authorities, %v", len(list), err)
	}
	return list
}

func waitSeal(t *testing.T, ctx context.Context, c adminv1.AdminClient, active uint32) {
	t.Helper()
	until(t, fmt.Sprintf("data key %d seals everything", active), func() bool {
		s, err := c.SealStatus(ctx, &adminv1.Empty{})
		if err != nil || s.ValuesOld != 0 || s.Values == 0 {
			return false
		}
		for _, term := range s.Terms {
			if term.Number == active && term.State == string(identity.SealActive) {
				return true
			}
		}
		return false
	})
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}
