package ca

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"countersign.io/countersign/identity"
)

func extension(c *x509.Certificate, oid ...int) (critical, ok bool) {
	for _, e := range c.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier(oid)) {
			return e.Critical, true
		}
	}
	return false, false
}

// everyCert is one certificate of each kind that the CA makes, and every leaf profile.
func everyCert(t *testing.T, r *rig) (cas, leaves map[string]*x509.Certificate) {
	t.Helper()
	issuers := r.IssuerChain()
	cas = map[string]*x509.Certificate{"issuer": parse(t, issuers[0]), "root": parse(t, issuers[1])}
	member, err := r.MemberCertificate()
	if err != nil {
		t.Fatal(err)
	}
	leaves = map[string]*x509.Certificate{"member": member.Leaf}
	for name, pub := range publicKeys(t) {
		_, leaves[name] = r.mustIssue(t, identity.Issuance{ID: workload(), PublicKey: pub})
		_, leaves[name+" with DNS names"] = r.mustIssue(t, identity.Issuance{ID: workload(), PublicKey: pub, DNSNames: []string{"web.prod.svc", "*.web.prod.svc"}})
	}
	return cas, leaves
}

// X509-SVID section 3.1: a leaf's SPIFFE ID has a non-root path. Section 5.2 and RFC 5280 section 4.2.1.6: the
// subject alternative name is critical when the subject is empty.
func TestConformance06LeafHasPathAndCriticalSAN(t *testing.T) {
	r := newRig(t)
	_, leaves := everyCert(t, r)
	for name, leaf := range leaves {
		if len(leaf.URIs) != 1 || leaf.URIs[0].Path == "" || leaf.URIs[0].Path == "/" {
			t.Errorf("%s: URIs %v", name, leaf.URIs)
		}
		if leaf.Subject.String() != "" {
			t.Errorf("%s: subject %q: the profile has none", name, leaf.Subject)
		}
		if critical, ok := extension(leaf, 2, 5, 29, 17); !ok || !critical {
			t.Errorf("%s: subject alternative name: present %t, critical %t", name, ok, critical)
		}
	}
	pub := newP256(t).Public()
	for _, id := range []spiffeid.ID{r.td.ID(), {}, spiffeid.RequireFromString("spiffe://other.org/web")} {
		if _, err := r.PrepareX509(identity.Issuance{ID: id, PublicKey: pub}); err == nil {
			t.Errorf("prepared a leaf for %q", id)
		} else {
			wantErr(t, err, identity.ErrInvalid)
		}
		if _, err := r.PrepareJWT(id, []string{"a"}, 0); err == nil {
			t.Errorf("prepared a token for %q", id)
		}
	}
}

// X509-SVID section 3.2: a signing certificate's SPIFFE ID has no path, and it is never used to authenticate.
func TestConformance07CAHasNoPathAndAuthenticatesNobody(t *testing.T) {
	r := newRig(t)
	cas, _ := everyCert(t, r)
	for name, c := range cas {
		if len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://example.org" {
			t.Errorf("%s: URIs %v, want spiffe://example.org", name, c.URIs)
		}
		if len(c.ExtKeyUsage) != 0 || c.KeyUsage&x509.KeyUsageDigitalSignature != 0 {
			t.Errorf("%s: usages %v %v: it could authenticate", name, c.KeyUsage, c.ExtKeyUsage)
		}
		if _, _, err := x509svid.Verify([]*x509.Certificate{c}, r.bundle(t, r.x), x509svid.WithTime(r.clock.now())); err == nil {
			t.Errorf("%s: verifies as an SVID", name)
		}
	}
	// Nor does one of the CAs' keys get a leaf.
	for name, c := range cas {
		if _, err := r.PrepareX509(identity.Issuance{ID: workload(), PublicKey: c.PublicKey}); err == nil {
			t.Errorf("prepared a leaf for the key of the %s", name)
		} else {
			wantErr(t, err, identity.ErrInvalid)
		}
	}
	// The lint refuses a CA with a path.
	issuer := *cas["issuer"]
	issuer.URIs = []*url.URL{workload().URL()}
	refused(t, Lint(r.td, &issuer, KindIssuer), "X509-SVID section 3.2")
}

// X509-SVID section 4.1: cA is true on signing certificates and false on leaves.
func TestConformance08BasicConstraints(t *testing.T) {
	r := newRig(t)
	cas, leaves := everyCert(t, r)
	for name, c := range cas {
		if critical, ok := extension(c, 2, 5, 29, 19); !ok || !critical || !c.IsCA {
			t.Errorf("%s: basic constraints: present %t, critical %t, CA %t", name, ok, critical, c.IsCA)
		}
	}
	if c := cas["issuer"]; c.MaxPathLen != 0 || !c.MaxPathLenZero {
		t.Errorf("issuer: path length %d, %t; want 0", c.MaxPathLen, c.MaxPathLenZero)
	}
	for name, c := range leaves {
		if _, ok := extension(c, 2, 5, 29, 19); !ok || c.IsCA {
			t.Errorf("%s: basic constraints: present %t, CA %t", name, ok, c.IsCA)
		}
	}
	leaf, issuer := *leaves["P-256"], *cas["issuer"]
	leaf.IsCA, issuer.IsCA = true, false
	refused(t, Lint(r.td, &leaf, KindLeaf), "X509-SVID section 4.1")
	refused(t, Lint(r.td, &issuer, KindIssuer), "X509-SVID section 4.1")
}

// X509-SVID section 4.3: key usage is set and critical; keyCertSign on signing certificates; digitalSignature and
// neither keyCertSign nor cRLSign on leaves.
func TestConformance09KeyUsage(t *testing.T) {
	r := newRig(t)
	cas, leaves := everyCert(t, r)
	for name, c := range cas {
		if critical, ok := extension(c, 2, 5, 29, 15); !ok || !critical || c.KeyUsage != x509.KeyUsageCertSign {
			t.Errorf("%s: key usage: present %t, critical %t, %b", name, ok, critical, c.KeyUsage)
		}
	}
	for name, c := range leaves {
		if critical, ok := extension(c, 2, 5, 29, 15); !ok || !critical || c.KeyUsage != x509.KeyUsageDigitalSignature {
			t.Errorf("%s: key usage: present %t, critical %t, %b", name, ok, critical, c.KeyUsage)
		}
	}
	for _, more := range []x509.KeyUsage{x509.KeyUsageCertSign, x509.KeyUsageCRLSign} {
		leaf := *leaves["P-256"]
		leaf.KeyUsage |= more
		refused(t, Lint(r.td, &leaf, KindLeaf), "X509-SVID section 4.3")
	}
	issuer := *cas["issuer"]
	issuer.KeyUsage = x509.KeyUsageDigitalSignature
	refused(t, Lint(r.td, &issuer, KindIssuer), "X509-SVID section 4.3")
}

// X509-SVID section 4.4: a leaf with extended key usage has both serverAuth and clientAuth.
func TestConformance10ExtendedKeyUsage(t *testing.T) {
	r := newRig(t)
	_, leaves := everyCert(t, r)
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for name, c := range leaves {
		if !slices.Equal(c.ExtKeyUsage, both) || len(c.UnknownExtKeyUsage) != 0 {
			t.Errorf("%s: extended key usage %v %v", name, c.ExtKeyUsage, c.UnknownExtKeyUsage)
		}
	}
	for _, one := range both {
		leaf := *leaves["P-256"]
		leaf.ExtKeyUsage = []x509.ExtKeyUsage{one}
		refused(t, Lint(r.td, &leaf, KindLeaf), "X509-SVID section 4.4")
	}
}

// JWT-SVID sections 1 and 5.1: the compact serialization only. Section 2: no header but alg, kid and typ.
func TestConformance13CompactTokenWithThreeHeaders(t *testing.T) {
	for _, alg := range []string{ES256, RS256} {
		t.Run(alg, func(t *testing.T) {
			r := newRig(t)
			a := r.newJWT(t, alg, time.Hour)
			if err := r.set(r.x, a); err != nil {
				t.Fatal(err)
			}
			header, claims := r.token(t)
			if len(header) != 3 || header["alg"] != alg || header["kid"] != a.ID || header["typ"] != "JWT" {
				t.Errorf("headers %v", header)
			}
			for name := range claims {
				if !slices.Contains([]string{"sub", "aud", "iat", "exp"}, name) {
					t.Errorf("unasked claim %q", name)
				}
			}
		})
	}
}

// token issues one and splits it by hand: a library would forgive what the standard does not.
func (r *rig) token(t *testing.T) (header, claims map[string]any) {
	t.Helper()
	p, err := r.PrepareJWT(workload(), []string{"db"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(svid.Token, ".")
	if len(parts) != 3 {
		t.Fatalf("%d parts: not the compact serialization", len(parts))
	}
	for i, into := range []*map[string]any{&header, &claims} {
		raw, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(raw, into); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := base64.RawURLEncoding.DecodeString(parts[2]); err != nil || parts[2] == "" {
		t.Fatalf("signature: %v", err)
	}
	return header, claims
}

// JWT-SVID section 2.1: alg is one of RS, ES and PS with 256, 384 or 512; here ES256 or RS256. Section 2.3: typ is JWT
// or JOSE. Section 3: sub, aud and exp, as the reference library verifies them.
func TestConformance14AlgorithmAndType(t *testing.T) {
	for _, alg := range []string{ES256, RS256} {
		t.Run(alg, func(t *testing.T) {
			r := newRig(t)
			// The reference library reads the wall clock.
			r.clock.t = time.Now()
			a := r.newJWT(t, alg, time.Hour)
			if err := r.set(r.x, a); err != nil {
				t.Fatal(err)
			}
			header, _ := r.token(t)
			if header["alg"] != alg || header["typ"] != "JWT" {
				t.Errorf("alg %v, typ %v", header["alg"], header["typ"])
			}
			pub, err := x509.ParsePKIXPublicKey(a.PublicKey)
			if err != nil {
				t.Fatal(err)
			}
			bundle := jwtbundle.New(r.td)
			if err := bundle.AddJWTAuthority(a.ID, pub); err != nil {
				t.Fatal(err)
			}
			p, err := r.PrepareJWT(workload(), []string{"db", "cache"}, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			svid, err := p.Issue()
			if err != nil {
				t.Fatal(err)
			}
			got, err := jwtsvid.ParseAndValidate(svid.Token, bundle, []string{"cache"})
			if err != nil {
				t.Fatal(err)
			}
			if got.ID != workload() || !slices.Equal(got.Audience, []string{"db", "cache"}) || !got.Expiry.Equal(svid.ExpiresAt) {
				t.Errorf("validated as %v for %v until %v", got.ID, got.Audience, got.Expiry)
			}
			if _, err := jwtsvid.ParseAndValidate(svid.Token, bundle, []string{"other"}); err == nil {
				t.Error("validates for an audience that it was not made for")
			}
		})
	}
	if _, _, err := NewJWTAuthority("HS256", time.Hour, time.Now()); err == nil {
		t.Error("made an HS256 authority")
	}
	if _, _, err := NewJWTAuthority("none", time.Hour, time.Now()); err == nil {
		t.Error("made a none authority")
	}
}
