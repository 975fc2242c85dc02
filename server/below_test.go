package server

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	downstreamv1 "countersign.io/countersign/api/downstream/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

// nested is the CA of a member named m1 of a cluster below, whose downstream entry has the path.
func (w *world) nested(t *testing.T, path string) *ca.CA {
	t.Helper()
	w.downstreamEntry(t, path)
	key, pub := newKey(t)
	res, err := downstreamv1.NewDownstreamClient(w.dial(t, w.certificate(t, path))).Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(res.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ca.New(ca.Config{TrustDomain: w.td, MemberName: "m1"})
	if err != nil {
		t.Fatal(err)
	}
	err = c.SetAuthorities([]identity.Authority{{
		ID: hex.EncodeToString(cert.SubjectKeyId), Kind: identity.AuthorityX509, State: identity.AuthorityActive, Cert: cert.Raw, PublicKey: pub,
		Chain: res.Chain, Roots: w.state.Bundle().X509, NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, SealedKey: []byte("x"),
	}}, func(identity.Authority) (crypto.Signer, error) { return key, nil })
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A cluster below may sign any name of the trust domain, those of members here among them: it is not let in by that.
func TestClustersBelowAreNotThisOne(t *testing.T) {
	w := newUpperCluster(t)
	below := w.nested(t, "/below")
	member, err := below.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	issued := func(path string) *tls.Certificate {
		key, _ := newKey(t)
		p, err := below.PrepareX509(identity.Issuance{ID: spiffeid.RequireFromPath(w.td, path), PublicKey: key.Public()})
		if err != nil {
			t.Fatal(err)
		}
		svid, err := p.Issue()
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Certificate{Certificate: svid.Chain, PrivateKey: key}
	}
	if _, err := memberv1.NewMemberClient(w.dial(t, w.certificate(t, "/countersign/member/m1"))).Keyring(testContext(t), &memberv1.KeyringRequest{}); err != nil {
		t.Fatal(err)
	}
	if res, err := memberv1.NewMemberClient(w.dial(t, member)).Keyring(testContext(t), &memberv1.KeyringRequest{}); err == nil {
		t.Errorf("a member below got the data keys: %q", res.Keyring)
	}
	a, _ := w.agent(t, "a1", "")
	_, pub := newKey(t)
	if _, err := nodev1.NewNodeClient(w.dial(t, issued(spiffeid.RequireFromString(a.ID).Path()))).Renew(testContext(t), &nodev1.RenewRequest{PublicKey: pub}); err == nil {
		t.Error("an agent below passed for one of ours")
	}
	w.downstreamEntry(t, "/beside")
	if _, err := downstreamv1.NewDownstreamClient(w.dial(t, issued("/beside"))).Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub}); err == nil {
		t.Error("a cluster below got the authority of the one beside it")
	}
}

// Below an upstream's root others may sign too, without a mark: they are not given data keys.
func TestMembersByAnotherAuthorityGetNoKeys(t *testing.T) {
	w, u := newUpperWorld(t)
	w.start(t)
	member := w.certificate(t, "/countersign/member/m1")
	if _, err := memberv1.NewMemberClient(w.dial(t, member)).Keyring(testContext(t), &memberv1.KeyringRequest{}); err != nil {
		t.Fatal(err)
	}
	a, key, err := ca.NewX509AuthorityUnder(testContext(t), w.td, u, time.Hour, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ca.New(ca.Config{TrustDomain: w.td, MemberName: "m1"})
	if err != nil {
		t.Fatal(err)
	}
	a.SealedKey = []byte("x")
	err = other.SetAuthorities([]identity.Authority{a}, func(identity.Authority) (crypto.Signer, error) {
		k, err := x509.ParsePKCS8PrivateKey(key)
		return k.(crypto.Signer), err
	})
	if err != nil {
		t.Fatal(err)
	}
	if member, err = other.MemberCertificate(); err != nil {
		t.Fatal(err)
	}
	_, err = memberv1.NewMemberClient(w.dial(t, member)).Keyring(testContext(t), &memberv1.KeyringRequest{})
	wantCode(t, err, codes.PermissionDenied)
}

// Members tell their own from those below and beside on both ends of a connection.
func TestMembersOfOneClusterOnly(t *testing.T) {
	w := newUpperCluster(t)
	conf := func(c *ca.CA) TLSConfig {
		return TLSConfig{TrustDomain: w.td, Certificate: c.MemberCertificate, Bundle: w.state.Bundle}
	}
	here, below, beside := conf(w.ca), conf(w.nested(t, "/below")), conf(w.nested(t, "/beside"))
	// One that has yet to take up the authority below another cluster knows that it is on its way.
	moving := here
	lower, err := below.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	moving.Authorities = func() []identity.Authority {
		return []identity.Authority{{Kind: identity.AuthorityX509, State: identity.AuthorityPrepared, Cert: lower.Certificate[2]}}
	}
	moved := below
	moved.Authorities = w.state.Authorities // with the retiring one of its own
	for name, row := range map[string]struct {
		server, client TLSConfig
		ok             bool
	}{
		"one cluster":                 {here, here, true},
		"the one below, by itself":    {below, below, true},
		"from below":                  {here, below, false},
		"to below":                    {below, here, false},
		"to beside":                   {below, beside, false},
		"one that moved":              {moved, moving, true},
		"one that moves":              {moving, moved, true},
		"beside, with one that moves": {moving, beside, false},
	} {
		a, b := net.Pipe()
		done := make(chan error, 1)
		go func() {
			s := tls.Server(a, ServerTLS(row.server))
			err := s.Handshake()
			a.Close()
			done <- err
		}()
		b.SetDeadline(time.Now().Add(deadline))
		c := tls.Client(b, MemberTLS(row.client, "m1"))
		err := c.Handshake()
		if err == nil {
			_, _ = c.Read(make([]byte, 1)) // in TLS 1.3 the server looks at the client last
		}
		b.Close()
		err = errors.Join(err, <-done)
		if ok := err == nil; ok != row.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
