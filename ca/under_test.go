package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"countersign.io/countersign/identity"
)

// above is an upstream of a root and an intermediate, whose answers a test spoils.
type above struct {
	now     func() time.Time
	root    *x509.Certificate
	rootKey crypto.Signer
	mid     *x509.Certificate
	midKey  crypto.Signer

	tmpl   func(*x509.Certificate)                                               // changes what is signed
	pub    crypto.PublicKey                                                      // signed instead of the request's
	answer func(cert []byte, chain, roots [][]byte) ([]byte, [][]byte, [][]byte) // changes what is answered
	err    error
}

func (u *above) String() string { return "test:upstream" }

func plainCA(name string, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1,
	}
}

func certify(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, der)
}

// newAbove makes one; change alters the templates of the root and the intermediate.
func newAbove(t testing.TB, now func() time.Time, change ...func(root, mid *x509.Certificate)) *above {
	t.Helper()
	u := &above{now: now, rootKey: newRSA(t, 2048), midKey: newEC(t, elliptic.P384())}
	root, mid := plainCA("Company Root", now()), plainCA("Company Issuing CA", now())
	for _, f := range change {
		f(root, mid)
	}
	u.root = certify(t, root, root, u.rootKey.Public(), u.rootKey)
	u.mid = certify(t, mid, u.root, u.midKey.Public(), u.rootKey)
	return u
}

func (u *above) Sign(_ context.Context, req *x509.CertificateRequest, ttl time.Duration) ([]byte, [][]byte, [][]byte, error) {
	if u.err != nil {
		return nil, nil, nil, u.err
	}
	tmpl := plainCA("", u.now())
	tmpl.Subject, tmpl.RawSubject, tmpl.URIs, tmpl.NotAfter = pkix.Name{}, req.RawSubject, req.URIs, u.now().Add(ttl)
	if u.tmpl != nil {
		u.tmpl(tmpl)
	}
	pub := req.PublicKey
	if u.pub != nil {
		pub = u.pub
	}
	cert, err := x509.CreateCertificate(rand.Reader, tmpl, u.mid, pub, u.midKey)
	if err != nil {
		return nil, nil, nil, err
	}
	chain, roots := [][]byte{u.mid.Raw}, [][]byte{u.root.Raw}
	if u.answer != nil {
		cert, chain, roots = u.answer(cert, chain, roots)
	}
	return cert, chain, roots, nil
}

func (r *rig) under(u Upstream) (identity.Authority, error) {
	a, key, err := NewX509AuthorityUnder(context.Background(), r.td, u, 10*24*time.Hour, r.clock.now)
	if err == nil {
		r.keep(a, key)
	}
	return a, err
}

func (r *rig) mustUnder(t testing.TB, u Upstream) identity.Authority {
	t.Helper()
	a, err := r.under(u)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAuthorityUnderAnUpstream(t *testing.T) {
	r := newRig(t)
	u := newAbove(t, r.clock.now)
	other := newAbove(t, r.clock.now)
	// Roots beside the one in use, repetitions and the root in the chain do no harm.
	u.answer = func(cert []byte, chain, roots [][]byte) ([]byte, [][]byte, [][]byte) {
		return cert, [][]byte{u.root.Raw, other.mid.Raw, u.mid.Raw}, [][]byte{other.root.Raw, u.root.Raw, u.root.Raw}
	}
	a := r.mustUnder(t, u)
	if a.State != identity.AuthorityActive || a.Kind != identity.AuthorityX509 || a.Upstream != "test:upstream" || len(a.SealedKey) != 0 {
		t.Errorf("%+v", a)
	}
	if len(a.Chain) != 1 || !bytes.Equal(a.Chain[0], u.mid.Raw) {
		t.Errorf("the chain is not the intermediate: %d certificates", len(a.Chain))
	}
	if len(a.Roots) != 2 || !bytes.Equal(a.Roots[0], u.root.Raw) {
		t.Error("the roots do not begin with the one in use")
	}
	if err := r.set(a, r.j); err != nil {
		t.Fatal(err)
	}
	svid, leaf := r.mustIssue(t, r.request(t))
	if len(svid.Chain) != 4 || !bytes.Equal(svid.Chain[2], a.Cert) || !bytes.Equal(svid.Chain[3], u.mid.Raw) {
		t.Fatalf("the chain of an SVID has %d certificates: want leaf, issuer, authority, intermediate", len(svid.Chain))
	}
	bundle := x509bundle.FromX509Authorities(r.td, []*x509.Certificate{u.root})
	if _, _, err := x509svid.ParseAndVerify(svid.Chain, bundle, x509svid.WithTime(r.clock.now())); err != nil {
		t.Error(err)
	}
	if leaf.NotAfter.Sub(r.clock.now()) < 59*time.Minute {
		t.Errorf("the leaf ends at %v", leaf.NotAfter)
	}
	member, err := r.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(member.Certificate); n != 5 || !bytes.Equal(member.Certificate[4], u.root.Raw) {
		t.Errorf("the member shows %d certificates, not up to the root", n)
	}
	if got := r.IssuerChain(); len(got) != 4 || !bytes.Equal(got[3], u.root.Raw) {
		t.Errorf("the issuer's chain has %d certificates", len(got))
	}
}

func TestEverythingEndsWithWhatIsAbove(t *testing.T) {
	r := newRig(t)
	// The intermediate above ends before the authority that it signed: that is the end of it.
	u := newAbove(t, r.clock.now, func(_, mid *x509.Certificate) { mid.NotAfter = r.clock.now().Add(30 * time.Minute) })
	a := r.mustUnder(t, u)
	if !a.NotAfter.Equal(u.mid.NotAfter) {
		t.Errorf("the authority ends at %v, what is above it at %v", a.NotAfter, u.mid.NotAfter)
	}
	if err := r.set(a, r.j); err != nil {
		t.Fatal(err)
	}
	_, leaf := r.mustIssue(t, r.request(t))
	issuer := parse(t, r.IssuerChain()[0])
	if !issuer.NotAfter.Equal(u.mid.NotAfter) || leaf.NotAfter.After(u.mid.NotAfter) {
		t.Errorf("issuer until %v, leaf until %v, above until %v", issuer.NotAfter, leaf.NotAfter, u.mid.NotAfter)
	}
	// Issuance goes on until then, and not after.
	r.clock.add(29 * time.Minute)
	if err := r.renew(); err != nil {
		t.Error(err)
	}
	r.mustIssue(t, r.request(t))
	r.clock.add(time.Minute)
	_, err := r.issue(r.request(t))
	wantErr(t, err, identity.ErrUnavailable)
}

func constrain(c *x509.Certificate, permitted ...string) {
	c.PermittedURIDomains, c.PermittedDNSDomainsCritical = permitted, true
}

func TestUpstreamsAnswerIsVerified(t *testing.T) {
	r := newRig(t)
	now := r.clock.now
	other := newP256(t).Public()
	sha1CA := func(u *above) []byte { return resign(t, u.mid, u.rootKey) }
	for name, row := range map[string]struct {
		change func(root, mid *x509.Certificate)
		spoil  func(*above)
		want   string
		kind   error
	}{
		"another key":       {spoil: func(u *above) { u.pub = other }, want: "another key"},
		"no CA":             {spoil: func(u *above) { u.tmpl = func(c *x509.Certificate) { c.IsCA, c.MaxPathLen = false, 0 } }, want: "not a certificate authority"},
		"no keyCertSign":    {spoil: func(u *above) { u.tmpl = func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature } }, want: "keyCertSign"},
		"path length 0":     {spoil: func(u *above) { u.tmpl = func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true } }, want: "path length is 0"},
		"path length above": {change: func(_, mid *x509.Certificate) { mid.MaxPathLen, mid.MaxPathLenZero = 0, true }, want: "path length above"},
		"path length 1":     {change: func(_, mid *x509.Certificate) { mid.MaxPathLen = 1 }, want: "path length above"},
		"expired":           {spoil: func(u *above) { u.tmpl = func(c *x509.Certificate) { c.NotAfter = now().Add(-time.Minute) } }, want: "ended", kind: identity.ErrUnavailable},
		"about to end":      {spoil: func(u *above) { u.tmpl = func(c *x509.Certificate) { c.NotAfter = now().Add(20 * time.Second) } }, want: "in less than"},
		"not yet valid":     {spoil: func(u *above) { u.tmpl = func(c *x509.Certificate) { c.NotBefore = now().Add(time.Minute) } }, want: "not valid before", kind: identity.ErrUnavailable},
		"expired above":     {change: func(_, mid *x509.Certificate) { mid.NotAfter = now().Add(-time.Minute) }, want: "Company Issuing CA) ended", kind: identity.ErrUnavailable},
		"other names":       {change: func(root, _ *x509.Certificate) { constrain(root, "example.com") }, want: "permit the URI domain example.org"},
		"excluded names": {change: func(_, mid *x509.Certificate) {
			mid.ExcludedURIDomains = []string{"example.org"}
			mid.PermittedDNSDomainsCritical = true
		}, want: "permit the URI domain example.org"},
		"names, no URI": {change: func(root, _ *x509.Certificate) { constrain(root, "example.com") }, spoil: func(u *above) { u.tmpl = func(c *x509.Certificate) { c.URIs = nil } }, want: "permit the URI domain example.org"},
		"other usage":   {change: func(_, mid *x509.Certificate) { mid.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }, want: "extended key usages"},
		"only servers":  {change: func(_, mid *x509.Certificate) { mid.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, want: "extended key usages"},
		"other trust domain": {spoil: func(u *above) {
			u.tmpl = func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://example.com")} }
		}, want: "not of trust domain"},
		"a workload's ID": {spoil: func(u *above) {
			u.tmpl = func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://example.org/web")} }
		}, want: "has a path"},
		"no root": {spoil: func(u *above) {
			u.answer = func(c []byte, ch, _ [][]byte) ([]byte, [][]byte, [][]byte) { return c, ch, nil }
		}, want: "without a root"},
		"another root": {spoil: func(u *above) {
			o := newAbove(t, now)
			u.answer = func(c []byte, ch, _ [][]byte) ([]byte, [][]byte, [][]byte) { return c, ch, [][]byte{o.root.Raw} }
		}, want: "does not lead to its roots"},
		"no chain": {spoil: func(u *above) {
			u.answer = func(c []byte, _, ro [][]byte) ([]byte, [][]byte, [][]byte) { return c, nil, ro }
		}, want: "does not lead to its roots"},
		"an intermediate for a root": {spoil: func(u *above) {
			u.answer = func(c []byte, ch, _ [][]byte) ([]byte, [][]byte, [][]byte) { return c, nil, ch }
		}, want: "not a self-signed certificate authority"},
		"garbage": {spoil: func(u *above) {
			u.answer = func(_ []byte, ch, ro [][]byte) ([]byte, [][]byte, [][]byte) { return []byte("<html>"), ch, ro }
		}, want: "parsing its certificate"},
		"nothing": {spoil: func(u *above) {
			u.answer = func([]byte, [][]byte, [][]byte) ([]byte, [][]byte, [][]byte) { return nil, nil, nil }
		}, want: "has 0 bytes"},
		"garbage above": {spoil: func(u *above) {
			u.answer = func(c []byte, _, ro [][]byte) ([]byte, [][]byte, [][]byte) { return c, [][]byte{{1}}, ro }
		}, want: "certificate 1 of its chain"},
		"a long chain": {spoil: func(u *above) {
			u.answer = func(c []byte, ch, ro [][]byte) ([]byte, [][]byte, [][]byte) {
				return c, slices.Repeat(ch, 1000), ro
			}
		}, want: "1000 certificates in its chain"},
		"SHA-1": {spoil: func(u *above) {
			mid := sha1CA(u)
			u.answer = func(c []byte, _, ro [][]byte) ([]byte, [][]byte, [][]byte) { return c, [][]byte{mid}, ro }
		}, want: "SHA1-RSA"},
		"a root of a curve that nobody has": {spoil: func(u *above) {
			key := newEC(t, elliptic.P224())
			odd := certify(t, plainCA("odd", now()), plainCA("odd", now()), key.Public(), key)
			u.answer = func(c []byte, ch, ro [][]byte) ([]byte, [][]byte, [][]byte) { return c, ch, append(ro, odd.Raw) }
		}, want: "root 2"},
		"a refusal": {spoil: func(u *above) { u.err = fmt.Errorf("%w: sealed", identity.ErrUnavailable) }, want: "sealed", kind: identity.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			var changes []func(root, mid *x509.Certificate)
			if row.change != nil {
				changes = append(changes, row.change)
			}
			u := newAbove(t, now, changes...)
			if row.spoil != nil {
				row.spoil(u)
			}
			a, err := r.under(u)
			if err == nil {
				t.Fatal("it was taken")
			}
			kind := row.kind
			if kind == nil {
				kind = identity.ErrInvalid
			}
			wantErr(t, err, kind)
			if !strings.Contains(err.Error(), row.want) || !strings.Contains(err.Error(), "test:upstream") {
				t.Errorf("it says %q: neither the upstream nor %q may be missing", err, row.want)
			}
			if a.ID != "" {
				t.Error("there is an authority with the error")
			}
		})
	}
	if err := r.Ready(); err != nil {
		t.Errorf("what there was is gone: %v", err)
	}
}

// resign signs a certificate again, by SHA-1 and RSA, which x509 does not do any longer.
func resign(t testing.TB, cert *x509.Certificate, key crypto.Signer) []byte {
	t.Helper()
	alg := pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 5}, Parameters: asn1.NullRawValue}
	// The algorithm is inside of what is signed as well.
	var outer struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(cert.Raw, &outer); err != nil {
		t.Fatal(err)
	}
	algDER, err := asn1.Marshal(alg)
	if err != nil {
		t.Fatal(err)
	}
	var body []byte
	for i, rest := 0, outer.TBS.Bytes; len(rest) > 0; i++ {
		var v asn1.RawValue
		if rest, err = asn1.Unmarshal(rest, &v); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			v.FullBytes = algDER
		}
		body = append(body, v.FullBytes...)
	}
	newTBS, err := asn1.Marshal(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: body})
	if err != nil {
		t.Fatal(err)
	}
	digest := sha1.Sum(newTBS)
	sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA1)
	if err != nil {
		t.Fatal(err)
	}
	outer.TBS, outer.Algorithm, outer.Signature = asn1.RawValue{FullBytes: newTBS}, alg, asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}
	der, err := asn1.Marshal(outer)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// A root that signed itself by SHA-1 is trusted by its key, not by that signature.
func TestOldRootsMayHaveSignedThemselvesBySHA1(t *testing.T) {
	r := newRig(t)
	u := newAbove(t, r.clock.now)
	root := resign(t, u.root, u.rootKey)
	u.answer = func(c []byte, ch, _ [][]byte) ([]byte, [][]byte, [][]byte) { return c, ch, [][]byte{root} }
	r.mustUnder(t, u)
}

// The SVID of an authority whose record was tampered with is not signed.
func TestStoredAuthoritiesAreVerifiedAgain(t *testing.T) {
	r := newRig(t)
	a := r.mustUnder(t, newAbove(t, r.clock.now))
	o := newAbove(t, r.clock.now)
	for name, change := range map[string]func(*identity.Authority){
		"no roots":     func(a *identity.Authority) { a.Roots = nil },
		"other roots":  func(a *identity.Authority) { a.Roots = [][]byte{o.root.Raw} },
		"no chain":     func(a *identity.Authority) { a.Chain = nil },
		"another ID":   func(a *identity.Authority) { a.ID = "00" },
		"another cert": func(a *identity.Authority) { a.Cert = o.mid.Raw },
	} {
		bad := a
		change(&bad)
		wantErr(t, r.set(bad, r.j), identity.ErrInvalid)
		if r.Ready() == nil {
			t.Errorf("%s: it signs", name)
		}
	}
}

// otherSigner stands for a KMS whose URI leads to another key than it says.
type otherSigner struct{ crypto.Signer }

func (o otherSigner) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return k.Sign(random, digest, opts)
}

func TestAuthorityAtAKMS(t *testing.T) {
	r := newRig(t)
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		key := newEC(t, curve)
		a, err := NewX509AuthorityAt(r.td, key, "pkcs11:token=t;object=ca", 24*time.Hour, r.clock.now())
		if err != nil {
			t.Fatal(err)
		}
		if a.KeyURI != "pkcs11:token=t;object=ca" || len(a.SealedKey) != 0 || a.State != identity.AuthorityActive {
			t.Errorf("%+v", a)
		}
		open := func(x identity.Authority) (crypto.Signer, error) {
			if x.Kind == identity.AuthorityX509 {
				return key, nil
			}
			return r.vault.open(x)
		}
		if err := r.SetAuthorities([]identity.Authority{a, r.j}, open); err != nil {
			t.Fatal(err)
		}
		svid, _ := r.mustIssue(t, r.request(t))
		if _, _, err := x509svid.ParseAndVerify(svid.Chain, r.bundle(t, a), x509svid.WithTime(r.clock.now())); err != nil {
			t.Error(err)
		}
	}
	key := newP256(t)
	for name, f := range map[string]func() (identity.Authority, error){
		"RSA": func() (identity.Authority, error) {
			return NewX509AuthorityAt(r.td, newRSA(t, 2048), "u:", time.Hour, r.clock.now())
		},
		"P-521": func() (identity.Authority, error) {
			return NewX509AuthorityAt(r.td, newEC(t, elliptic.P521()), "u:", time.Hour, r.clock.now())
		},
		"no URI": func() (identity.Authority, error) { return NewX509AuthorityAt(r.td, key, "", time.Hour, r.clock.now()) },
		"no key": func() (identity.Authority, error) {
			return NewX509AuthorityAt(r.td, nil, "u:", time.Hour, r.clock.now())
		},
		"a short TTL": func() (identity.Authority, error) {
			return NewX509AuthorityAt(r.td, key, "u:", time.Second, r.clock.now())
		},
	} {
		a, err := f()
		if wantErr(t, err, identity.ErrInvalid); a.ID != "" {
			t.Errorf("%s: an authority with the error", name)
		}
	}
	if _, err := NewX509AuthorityAt(r.td, otherSigner{key}, "u:", time.Hour, r.clock.now()); err == nil {
		t.Error("a KMS that signs with another key was taken")
	}
}

func TestSignDownstream(t *testing.T) {
	r := newRig(t)
	check := func(roots ...*x509.Certificate) {
		t.Helper()
		key := newP256(t)
		der, chain, err := r.SignDownstream(workload(), key.Public(), 0)
		if err != nil {
			t.Fatal(err)
		}
		cert := parse(t, der)
		if f := append(Lint(r.td, cert, KindAuthority), lintDownstream(r.td, cert)...); len(f) != 0 {
			t.Error(f)
		}
		if d := cert.NotAfter.Sub(r.clock.now()).Round(time.Minute); d != DefaultDownstreamTTL {
			t.Errorf("it lasts %v", d)
		}
		// A whole cluster below works with it.
		below, err := New(Config{TrustDomain: r.td, MemberName: "below", Now: r.clock.now})
		if err != nil {
			t.Fatal(err)
		}
		var rootDER [][]byte
		for _, c := range roots {
			rootDER = append(rootDER, c.Raw)
		}
		a, err := checkAnswer(r.td, key, der, chain, rootDER, r.clock.now())
		if err != nil {
			t.Fatal(err)
		}
		if a.PublicKey, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
			t.Fatal(err)
		}
		if err := below.SetAuthorities([]identity.Authority{a}, func(identity.Authority) (crypto.Signer, error) { return key, nil }); err != nil {
			t.Fatal(err)
		}
		p, err := below.PrepareX509(r.request(t))
		if err != nil {
			t.Fatal(err)
		}
		svid, err := p.Issue()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.ParseAndVerify(svid.Chain, x509bundle.FromX509Authorities(r.td, roots), x509svid.WithTime(r.clock.now())); err != nil {
			t.Error(err)
		}
		// But not a second level: there is no room for it.
		if _, _, err := below.SignDownstream(workload(), newP256(t).Public(), 0); err == nil || !errors.Is(err, identity.ErrPrecondition) {
			t.Errorf("an authority below one below: %v", err)
		}
	}
	check(parse(t, r.x.Cert))
	u := newAbove(t, r.clock.now)
	if err := r.set(r.mustUnder(t, u), r.j); err != nil {
		t.Fatal(err)
	}
	check(u.root)

	opened := r.vault.count(r.x.ID)
	for name, pub := range map[string]crypto.PublicKey{"RSA": newRSA(t, 2048).Public(), "P-521": newEC(t, elliptic.P521()).Public(), "none": nil} {
		_, _, err := r.SignDownstream(workload(), pub, 0)
		if wantErr(t, err, identity.ErrInvalid); r.vault.count(r.x.ID) != opened {
			t.Errorf("%s: the authority's key was opened", name)
		}
	}
	for _, ttl := range []time.Duration{-time.Hour, time.Second} {
		_, _, err := r.SignDownstream(workload(), newP256(t).Public(), ttl)
		wantErr(t, err, identity.ErrInvalid)
	}
	if err := r.set(r.x, r.j); err != nil {
		t.Fatal(err)
	}
	der, _, err := r.SignDownstream(workload(), newP256(t).Public(), 1<<62)
	if err != nil || parse(t, der).NotAfter.Sub(r.clock.now()) > MaxDownstreamTTL {
		t.Errorf("a huge TTL: %v", err)
	}
	short := r.newX509(t, time.Hour)
	if err := r.set(short, r.j); err != nil {
		t.Fatal(err)
	}
	if der, _, err = r.SignDownstream(workload(), newP256(t).Public(), 0); err != nil || parse(t, der).NotAfter.After(short.NotAfter) {
		t.Errorf("it outlives its authority: %v", err)
	}
	if err := r.set(r.j); err != nil {
		t.Fatal(err)
	}
	_, _, err = r.SignDownstream(workload(), newP256(t).Public(), 0)
	wantErr(t, err, identity.ErrUnavailable)
}

// FuzzUpstreamAnswer looks for an answer that is taken though its certificate is for another key, and for crashes.
func FuzzUpstreamAnswer(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzUpstreamAnswer")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	td, key := testTD(), newP256(f)
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	u := newAbove(f, func() time.Time { return now })
	req, err := newRequest(td, key)
	if err != nil {
		f.Fatal(err)
	}
	cert, chain, roots, err := u.Sign(context.Background(), req, time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(cert, chain[0], roots[0])
	f.Fuzz(func(t *testing.T, cert, chain, root []byte) {
		a, err := checkAnswer(td, key, cert, [][]byte{chain}, [][]byte{root}, now)
		if err != nil {
			return
		}
		c, err := x509.ParseCertificate(a.Cert)
		if err != nil || !key.PublicKey.Equal(c.PublicKey) || !c.IsCA || a.NotAfter.Before(now) || len(a.Roots) != 1 {
			t.Fatalf("taken: %v", err)
		}
	})
}
