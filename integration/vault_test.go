//go:build integration

package integration

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/internal/vault"
)

// realVault is a Vault 1.14 in a process of its own, see integration/vault.
type realVault struct {
	t             *testing.T
	proc          *cluster.Process
	dir, address  string
	root          *vault.Client
	caFile, token string
}

func startVault(t *testing.T) *realVault {
	t.Helper()
	program, err := filepath.Abs("vault/bin/vaultd")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("the Vault is not built: make integration does it: %v", err)
	}
	v := &realVault{t: t, dir: t.TempDir()}
	v.caFile, v.token = filepath.Join(v.dir, "ca.pem"), filepath.Join(v.dir, "token")
	c := &cluster.Cluster{Dir: v.dir}
	t.Cleanup(c.Close)
	r, w := io.Pipe()
	if v.proc, err = c.Start("vaultd", nil, w, program, "-dir", v.dir); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(r)
	address := make(chan string, 1)
	go func() { // to its end, or the process would stand still
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "127.0.0.1:") {
				address <- lines.Text()
			}
		}
	}()
	select {
	case v.address = <-address:
	case <-time.After(time.Minute):
		t.Fatal("Vault does not start")
	}
	if v.root, err = vault.New(vault.Config{Address: "https://" + v.address, CAFile: v.caFile, TokenFile: v.token}); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *realVault) do(method, path string, in, out any) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := v.root.Do(ctx, method, path, in, out); err != nil {
		v.t.Fatal(err)
	}
}

// pki mounts an engine whose authority is an intermediate below a root in another engine, as companies have it.
func (v *realVault) pki() *x509.Certificate {
	v.t.Helper()
	for _, mount := range []string{"root-pki", "pki"} {
		v.do(http.MethodPost, "sys/mounts/"+mount, map[string]any{"type": "pki", "config": map[string]any{"max_lease_ttl": "24h"}}, nil)
	}
	var root struct{ Certificate string }
	v.do(http.MethodPost, "root-pki/root/generate/internal", map[string]any{"common_name": "A Company Root", "ttl": "24h", "key_type": "ec", "key_bits": 384}, &root)
	var req struct{ CSR string }
	v.do(http.MethodPost, "pki/intermediate/generate/internal", map[string]any{"common_name": "A Company Issuing CA", "key_type": "rsa", "key_bits": 2048}, &req)
	var signed struct{ Certificate string }
	v.do(http.MethodPost, "root-pki/root/sign-intermediate", map[string]any{"csr": req.CSR, "common_name": "A Company Issuing CA", "ttl": "20h"}, &signed)
	v.do(http.MethodPost, "pki/intermediate/set-signed", map[string]any{"certificate": signed.Certificate + "\n" + root.Certificate}, nil)
	block, _ := pem.Decode([]byte(root.Certificate))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		v.t.Fatal(err)
	}
	return cert
}

// appRole makes a role that may have authorities signed and use the transit key, and nothing else.
func (v *realVault) appRole() (roleID, secretFile string) {
	v.t.Helper()
	v.do(http.MethodPost, "sys/policies/acl/countersign", map[string]any{"policy": `
path "pki/root/sign-intermediate" { capabilities = ["update"] }
path "pki/cert/ca_chain"          { capabilities = ["read"] }
path "transit/encrypt/countersign" { capabilities = ["update"] }
path "transit/decrypt/countersign" { capabilities = ["update"] }
`}, nil)
	v.do(http.MethodPost, "sys/auth/approle", map[string]any{"type": "approle"}, nil)
	v.do(http.MethodPost, "auth/approle/role/countersign", map[string]any{"token_policies": "countersign", "token_ttl": "20s", "token_max_ttl": "1m"}, nil)
	var role struct {
		RoleID string `json:"role_id"`
	}
	v.do(http.MethodGet, "auth/approle/role/countersign/role-id", nil, &role)
	var secret struct {
		SecretID string `json:"secret_id"`
	}
	v.do(http.MethodPost, "auth/approle/role/countersign/secret-id", map[string]any{}, &secret)
	secretFile = filepath.Join(v.dir, "secret-id")
	if err := os.WriteFile(secretFile, []byte(secret.SecretID), 0o600); err != nil {
		v.t.Fatal(err)
	}
	return role.RoleID, secretFile
}

// A real Vault signs the authority and keeps the key-encryption key; its tokens are so short that they are renewed, and end,
// meanwhile; and when it is gone, issuance goes on.
func TestVaultUpstreamAndTransit(t *testing.T) {
	v := startVault(t)
	root := v.pki()
	v.do(http.MethodPost, "sys/mounts/transit", map[string]any{"type": "transit"}, nil)
	v.do(http.MethodPost, "transit/keys/countersign", map[string]any{}, nil)
	role, secret := v.appRole()
	login := func(indent string) string {
		return strings.ReplaceAll(fmt.Sprintf("\naddress: https://%s\nca_file: %s\napprole: {role_id: %s, secret_id_file: %s}", v.address, v.caFile, role, secret), "\n", "\n"+indent)
	}
	w := newWorld(t, 1, "ca:\n  ttl: 10h\n  upstream:\n    vault:\n      pki: pki"+login("      ")+"\nseal:\n  key: transit:transit/countersign\n  vault:"+login("    ")+"\n")
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/me")...)
	a := w.agent()
	svid := x509Of(t, w.ctx, a)
	if err := verifyUnder(t, svid, root); err != nil {
		t.Fatalf("the SVID does not verify under Vault's root: %v", err)
	}
	if roots := w.bundleRoots(); len(roots) != 1 || !roots[0].Equal(root) {
		t.Fatalf("the bundle is not Vault's root: %d certificates", len(roots))
	}
	if up := w.x509Authorities()["active"].Upstream; up != "vault:"+v.address+"/pki" {
		t.Errorf("the authority is under %q", up)
	}
	// The keyring is opened by Vault alone.
	m := w.Members[0]
	if _, err := os.Stat(filepath.Join(m.Dir, "data", "kek")); err == nil {
		t.Error("there is a key-encryption key on the disk")
	}
	m.Kill()
	if err := w.RestartMember(w.ctx, m); err != nil {
		t.Fatal(err)
	}

	v.proc.Kill()
	w.degraded("the upstream has not told its roots since")
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/new")...)
	s := w.watch(a)
	w.until(s, "issuance without Vault", func(ids []string) bool { return len(ids) == 2 })
	// Without Vault the keyring stays shut: the member says so.
	m.Kill()
	if err := w.LaunchMember(m); err != nil {
		t.Fatal(err)
	}
	w.eventually("the member says that its key-encryption key is out of reach", func() error {
		data, err := os.ReadFile(filepath.Join(m.Dir, "log"))
		if err == nil && !strings.Contains(string(data), "transit") {
			err = fmt.Errorf("its log says nothing of transit")
		}
		return err
	})
}
