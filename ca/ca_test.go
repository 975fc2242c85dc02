package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	kmsapi "go.step.sm/crypto/kms/apiv1"

	"countersign.io/countersign/identity"
)

func TestNewRefuses(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no trust domain":                 func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"trust domain is an IP address":   func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("10.0.0.1") },
		"trust domain of an empty label":  func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("a..b") },
		"trust domain ends in a dot":      func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("example.org.") },
		"trust domain starts with a dot":  func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString(".example.org") },
		"no member name":                  func(c *Config) { c.MemberName = "" },
		"member name of two segments":     func(c *Config) { c.MemberName = "a/b" },
		"member name of dots":             func(c *Config) { c.MemberName = ".." },
		"X.509 TTL too short":             func(c *Config) { c.X509TTL = time.Second },
		"X.509 TTL too long":              func(c *Config) { c.X509TTL = 25 * time.Hour },
		"JWT TTL too short":               func(c *Config) { c.JWTTTL = time.Second },
		"JWT TTL negative":                func(c *Config) { c.JWTTTL = -time.Hour },
		"issuer TTL below twice a leaf's": func(c *Config) { c.X509TTL, c.IssuerTTL = time.Hour, 119*time.Minute },
	} {
		cfg := Config{TrustDomain: testTD(), MemberName: "m1"}
		change(&cfg)
		if _, err := New(cfg); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	// Two faults at once: both are told.
	_, err := New(Config{TrustDomain: testTD(), MemberName: "m1", X509TTL: 1, JWTTTL: 1})
	if err == nil || !strings.Contains(err.Error(), "X.509 TTL") || !strings.Contains(err.Error(), "JWT TTL") {
		t.Errorf("two faults: %v", err)
	}
}

// A trust domain name that is unusual but fine, up to the longest (SPIFFE-ID section 2.3), must work end to end.
func TestUnusualTrustDomains(t *testing.T) {
	for _, name := range []string{"a", "under_score.example", "-x-", "localhost", strings.Repeat("a.", 127) + "a", strings.Repeat("x", 255)} {
		td := spiffeid.RequireTrustDomainFromString(name)
		c, err := New(Config{TrustDomain: td, MemberName: "m1"})
		if err != nil {
			t.Errorf("%.40s: %v", name, err)
			continue
		}
		a, key, err := NewX509Authority(td, time.Hour, time.Now())
		if err != nil {
			t.Errorf("%.40s: %v", name, err)
			continue
		}
		v := &vault{keys: map[string][]byte{a.ID: key}, opened: map[string]int{}}
		if err := c.SetAuthorities([]identity.Authority{a}, v.open); err != nil {
			t.Errorf("%.40s: %v", name, err)
		}
	}
}

func TestNewX509Authority(t *testing.T) {
	now := newClock().now()
	for name, alg := range map[string]kmsapi.SignatureAlgorithm{"P-256": kmsapi.ECDSAWithSHA256, "P-384": kmsapi.ECDSAWithSHA384} {
		a, pkcs8, err := newX509Authority(testTD(), alg, time.Hour, now)
		if err != nil {
			t.Fatal(err)
		}
		cert := parse(t, a.Cert)
		if a.ID != hex.EncodeToString(cert.SubjectKeyId) || a.Kind != identity.AuthorityX509 || a.State != identity.AuthorityActive || len(a.SealedKey) != 0 {
			t.Errorf("%s: record %+v", name, a)
		}
		if !a.NotAfter.Equal(now.Add(time.Hour).Truncate(time.Second)) || !a.NotBefore.Equal(now.Add(-10*time.Second).Truncate(time.Second)) {
			t.Errorf("%s: from %v until %v", name, a.NotBefore, a.NotAfter)
		}
		key, err := x509.ParsePKCS8PrivateKey(pkcs8)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(der(t, key.(crypto.Signer).Public()), a.PublicKey) || key.(*ecdsa.PrivateKey).Params().Name != name {
			t.Errorf("%s: the key is not the record's", name)
		}
		// A member works under either.
		r := newRig(t)
		r.keep(a, pkcs8)
		if err := r.set(a, r.j); err != nil {
			t.Fatal(err)
		}
		svid, _ := r.mustIssue(t, r.request(t))
		if _, _, err := x509svid.Verify(chain(t, svid.Chain), r.bundle(t, a), x509svid.WithTime(r.clock.now())); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	one, _, _ := NewX509Authority(testTD(), time.Hour, now)
	two, _, _ := NewX509Authority(testTD(), time.Hour, now)
	if bytes.Equal(parse(t, one.Cert).RawSubject, parse(t, two.Cert).RawSubject) {
		t.Error("two authorities have one name")
	}
	for _, err := range []error{
		third(NewX509Authority(spiffeid.TrustDomain{}, time.Hour, now)),
		third(NewX509Authority(testTD(), 0, now)),
		third(NewJWTAuthority(ES256, -time.Hour, now)),
		third(NewJWTAuthority("", time.Hour, now)),
	} {
		wantErr(t, err, identity.ErrInvalid)
	}
}

func third(_ identity.Authority, _ []byte, err error) error { return err }

func TestForgetClearsKeys(t *testing.T) {
	ec, rs := newP256(t), newRSA(t, 2048)
	forget(ec)
	forget(rs)
	//lint:ignore SA1019 to see that it is cleared
	for _, n := range append([]interface{ Bytes() []byte }{ec.D, rs.D}, rs.Primes[0], rs.Primes[1]) {
		if b := n.Bytes(); len(bytes.Trim(b, "\x00")) != 0 {
			t.Errorf("%d bytes of the key are left", len(b))
		}
	}
}

func TestNotReadyBeforeAuthorities(t *testing.T) {
	c, err := New(Config{TrustDomain: testTD(), MemberName: "m1"})
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, c.Ready(), identity.ErrUnavailable)
	_, err = c.PrepareX509(identity.Issuance{ID: workload(), PublicKey: newP256(t).Public()})
	wantErr(t, err, identity.ErrUnavailable)
	_, err = c.PrepareJWT(workload(), []string{"db"}, 0)
	wantErr(t, err, identity.ErrUnavailable)
	_, err = c.MemberCertificate()
	wantErr(t, err, identity.ErrUnavailable)
	if c.IssuerChain() != nil {
		t.Error("a chain from nowhere")
	}
}

func TestSetAuthorities(t *testing.T) {
	r := newRig(t)
	if err := r.Ready(); err != nil {
		t.Fatal(err)
	}
	first := r.IssuerChain()
	if err := r.set(r.x, r.j); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first[0], r.IssuerChain()[0]) || r.vault.count(r.x.ID) != 1 {
		t.Error("the issuer was remade though nothing changed")
	}
	prepared := r.newX509(t, time.Hour)
	prepared.State = identity.AuthorityPrepared
	if err := r.set(r.x, prepared, r.j); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first[0], r.IssuerChain()[0]) || r.vault.count(prepared.ID) != 0 {
		t.Error("a prepared authority changed the issuer or had its key opened")
	}
	// Activation.
	retiring := r.x
	retiring.State, prepared.State = identity.AuthorityRetiring, identity.AuthorityActive
	if err := r.set(retiring, prepared, r.j); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(r.IssuerChain()[1], prepared.Cert) {
		t.Error("the issuer is not under the authority that is active now")
	}
	member, err := r.MemberCertificate()
	if err != nil || !bytes.Equal(member.Certificate[2], prepared.Cert) {
		t.Errorf("the member's certificate is not under it either: %v", err)
	}
	// None is active any more: nothing may sign.
	if err := r.set(retiring, r.j); err != nil {
		t.Fatal(err)
	}
	wantErr(t, r.Ready(), identity.ErrUnavailable)
	_, err = r.PrepareX509(r.request(t))
	wantErr(t, err, identity.ErrUnavailable)
	if _, err := r.PrepareJWT(workload(), []string{"db"}, 0); err != nil {
		t.Errorf("the JWT authority is not concerned: %v", err)
	}
	if err := r.set(); err != nil {
		t.Fatal(err)
	}
	_, err = r.PrepareJWT(workload(), []string{"db"}, 0)
	wantErr(t, err, identity.ErrUnavailable)
}

func TestSetAuthoritiesRefuses(t *testing.T) {
	r := newRig(t)
	edit := func(a identity.Authority, f func(*identity.Authority)) []identity.Authority {
		f(&a)
		return []identity.Authority{a}
	}
	elsewhere, elsewhereKey, err := NewX509Authority(spiffeid.RequireTrustDomainFromString("other.org"), time.Hour, r.clock.now())
	if err != nil {
		t.Fatal(err)
	}
	r.keep(elsewhere, elsewhereKey)
	tampered := bytes.Clone(r.x.Cert)
	tampered[len(tampered)-1] ^= 1
	mixed := r.newX509(t, time.Hour)
	r.vault.keys[mixed.ID] = r.vault.keys[r.x.ID]
	p384JWT := r.j
	p384JWT.PublicKey = der(t, newEC(t, elliptic.P384()).Public())
	future := r.newX509(t, time.Hour)
	r.clock.add(-time.Hour)
	late := r.newX509(t, time.Minute)
	r.clock.add(time.Hour)

	for name, as := range map[string][]identity.Authority{
		"no certificate":        edit(r.x, func(a *identity.Authority) { a.Cert = nil }),
		"malformed certificate": edit(r.x, func(a *identity.Authority) { a.Cert = []byte("x") }),
		"not self-signed":       edit(r.x, func(a *identity.Authority) { a.Cert = tampered }),
		"the issuer's certificate": edit(r.x, func(a *identity.Authority) {
			a.Cert = r.IssuerChain()[0]
			a.ID = hex.EncodeToString(parse(t, a.Cert).SubjectKeyId)
		}),
		"another ID":                   edit(r.x, func(a *identity.Authority) { a.ID = "00" }),
		"another trust domain":         {elsewhere},
		"another authority's key":      {mixed},
		"ended":                        {late},
		"JWT without ID":               edit(r.j, func(a *identity.Authority) { a.ID = "" }),
		"JWT without key":              edit(r.j, func(a *identity.Authority) { a.PublicKey = nil }),
		"JWT key of another algorithm": {p384JWT},
		"JWT key that is not its own":  edit(r.j, func(a *identity.Authority) { a.PublicKey = der(t, newP256(t).Public()) }),
	} {
		t.Run(name, func(t *testing.T) {
			r := &rig{td: r.td, clock: r.clock, vault: r.vault}
			var err error
			if r.CA, err = New(Config{TrustDomain: r.td, MemberName: "m1", Now: r.clock.now}); err != nil {
				t.Fatal(err)
			}
			if err := r.set(as...); err == nil {
				t.Error("accepted")
			}
			if as[0].Kind == identity.AuthorityX509 {
				_, err = r.PrepareX509(r.request(t))
			} else {
				_, err = r.PrepareJWT(workload(), []string{"db"}, 0)
			}
			wantErr(t, err, identity.ErrUnavailable)
		})
	}
	t.Run("two active", func(t *testing.T) {
		wantErr(t, r.set(r.x, r.newX509(t, time.Hour), r.j), identity.ErrInvalid)
		r.mustIssue(t, r.request(t))
		if !bytes.Equal(r.IssuerChain()[1], r.x.Cert) {
			t.Error("the first does not sign")
		}
	})
	t.Run("a clock before the authority", func(t *testing.T) {
		r.clock.add(-24 * time.Hour)
		if err := r.set(future); !errors.Is(err, identity.ErrUnavailable) || !strings.Contains(err.Error(), "clock") {
			t.Errorf("got %v", err)
		}
		r.clock.add(24 * time.Hour)
	})
	t.Run("nothing opens", func(t *testing.T) {
		for _, open := range []func(identity.Authority) (crypto.Signer, error){
			nil,
			func(identity.Authority) (crypto.Signer, error) { return nil, nil },
			func(identity.Authority) (crypto.Signer, error) { return nil, errors.New("sealed") },
		} {
			if err := r.SetAuthorities([]identity.Authority{r.newX509(t, time.Hour), r.newJWT(t, ES256, time.Hour)}, open); err == nil {
				t.Error("accepted")
			}
			wantErr(t, r.Ready(), identity.ErrUnavailable)
		}
	})
}

// A renewal that fails costs nothing while the old issuer is good; and the authority's key is opened only to renew.
func TestRunRenewsAtHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := newRig(t, func(c *Config) {
			c.Now, c.X509TTL, c.IssuerTTL = time.Now, time.Hour, 4*time.Hour
			c.Log = slog.New(slog.NewTextHandler(&log, nil))
		})
		x, j := r.newX509(t, 1000*time.Hour), r.newJWT(t, ES256, 1000*time.Hour)
		if err := r.set(x, j); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		issuer := func() *x509.Certificate { return parse(t, r.IssuerChain()[0]) }
		member := func() *x509.Certificate {
			c, err := r.MemberCertificate()
			if err != nil {
				t.Fatal(err)
			}
			return c.Leaf
		}
		issuer1, member1 := issuer(), member()

		time.Sleep(29 * time.Minute)
		if !member().Equal(member1) {
			t.Error("the member's certificate was renewed before half-life")
		}
		time.Sleep(2 * time.Minute)
		if member().Equal(member1) {
			t.Error("the member's certificate was not renewed at half-life")
		}
		if !issuer().Equal(issuer1) || r.vault.count(x.ID) != 1 {
			t.Error("the issuer was renewed too, or the authority's key opened")
		}
		time.Sleep(90 * time.Minute) // 2:01
		issuer2 := issuer()
		if issuer2.Equal(issuer1) || r.vault.count(x.ID) != 2 {
			t.Error("the issuer was not renewed at half-life")
		}
		if m := member(); m.CheckSignatureFrom(issuer2) != nil {
			t.Error("the member's certificate is not under the new issuer")
		}

		r.vault.fail(errors.New("the seal does not answer"))
		time.Sleep(3 * time.Hour) // 5:01, the second issuer is good until 6:00
		if !issuer().Equal(issuer2) {
			t.Error("the issuer changed though the seal does not answer")
		}
		if err := r.Ready(); err != nil {
			t.Errorf("not ready though the issuer is good: %v", err)
		}
		_, leaf := r.mustIssue(t, r.request(t))
		if leaf.NotAfter.After(issuer2.NotAfter) {
			t.Error("a leaf outlives its issuer")
		}
		tries := r.vault.count(x.ID)
		if tries < 10 || tries > 300 {
			t.Errorf("%d tries in an hour: want one every 30 s or so", tries)
		}
		time.Sleep(time.Hour) // 6:01
		err := r.Ready()
		wantErr(t, err, identity.ErrUnavailable)
		if err != nil && !strings.Contains(err.Error(), "the seal does not answer") {
			t.Errorf("the reason is not told: %v", err)
		}
		r.vault.fail(nil)
		time.Sleep(time.Minute)
		if err := r.Ready(); err != nil {
			t.Errorf("not ready again: %v", err)
		}
		if !strings.Contains(log.String(), "renewing what signs failed") {
			t.Error("the failure was not logged")
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestRunRetriesAuthoritiesThatDidNotOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Now = time.Now })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		synctest.Wait()
		r.vault.fail(errors.New("down"))
		if err := r.set(r.newX509(t, time.Hour), r.newJWT(t, ES256, time.Hour)); err == nil {
			t.Error("no error")
		}
		wantErr(t, r.Ready(), identity.ErrUnavailable)
		r.vault.fail(nil)
		time.Sleep(2 * minRetry)
		if err := r.Ready(); err != nil {
			t.Error(err)
		}
		cancel()
		<-done
	})
}

// The member's chain serves TLS towards a client with the bundle, and one that knows nothing but the hash of the
// root's key finds the root in it.
func TestMemberCertificateServesTLS(t *testing.T) {
	r := newRig(t)
	r.clock.t = time.Now() // TLS reads the wall clock
	x := r.newX509(t, time.Hour)
	if err := r.set(x, r.j); err != nil {
		t.Fatal(err)
	}
	cert, err := r.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.Certificate) != 3 || !bytes.Equal(cert.Certificate[1], r.IssuerChain()[0]) || !bytes.Equal(cert.Certificate[2], x.Cert) {
		t.Fatalf("chain of %d: want leaf, issuer, root", len(cert.Certificate))
	}
	id := spiffeid.RequireFromString("spiffe://example.org/countersign/member/m1")
	server := &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return r.MemberCertificate() }}
	if got, err := handshake(t, server, tlsconfig.TLSClientConfig(r.bundle(t, x), tlsconfig.AuthorizeID(id))); err != nil || len(got.PeerCertificates) != 3 {
		t.Errorf("with the bundle: %v", err)
	}
	if _, err := handshake(t, server, tlsconfig.TLSClientConfig(r.bundle(t, r.newX509(t, time.Hour)), tlsconfig.AuthorizeID(id))); err == nil {
		t.Error("verified against another root")
	}
	if _, err := handshake(t, server, tlsconfig.TLSClientConfig(r.bundle(t, x), tlsconfig.AuthorizeID(workload()))); err == nil {
		t.Error("verified as somebody else")
	}
}

func handshake(t *testing.T, server, client *tls.Config) (tls.ConnectionState, error) {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go func() {
		s := tls.Server(a, server)
		if s.Handshake() == nil {
			_, _ = io.Copy(io.Discard, s)
		}
	}()
	c := tls.Client(b, client)
	err := c.HandshakeContext(t.Context())
	return c.ConnectionState(), err
}

func TestNothingSecretIsLogged(t *testing.T) {
	var log bytes.Buffer
	r := newRig(t, func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	p, err := r.PrepareJWT(workload(), []string{"db"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	if log.Len() == 0 || strings.Contains(log.String(), svid.Token) || strings.Contains(log.String(), "PRIVATE") {
		t.Errorf("log: %s", &log)
	}
}

// An opener that gives a signer of its own, as a KMS does: no key in this process.
type remoteSigner struct{ key *ecdsa.PrivateKey }

func (s remoteSigner) Public() crypto.PublicKey { return s.key.Public() }
func (s remoteSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.key.Sign(rand.Reader, digest, opts)
}

func TestAuthoritiesMayBeRemoteSigners(t *testing.T) {
	r := newRig(t)
	x, j := r.newX509(t, time.Hour), r.newJWT(t, ES256, time.Hour)
	err := r.SetAuthorities([]identity.Authority{x, j}, func(a identity.Authority) (crypto.Signer, error) {
		s, err := r.vault.open(a)
		if err != nil {
			return nil, err
		}
		return remoteSigner{s.(*ecdsa.PrivateKey)}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	r.mustIssue(t, r.request(t))
	r.token(t)
}
