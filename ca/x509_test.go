package ca

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"countersign.io/countersign/identity"
)

func TestIssueX509(t *testing.T) {
	r := newRig(t)
	now := r.clock.now()
	for kind, pub := range publicKeys(t) {
		t.Run(kind, func(t *testing.T) {
			svid, leaf := r.mustIssue(t, identity.Issuance{ID: workload(), PublicKey: pub, DNSNames: []string{"web.prod.svc", "web"}, TTL: 10 * time.Minute})
			if len(svid.Chain) != 2 || !slices.Equal(svid.Chain[1], r.IssuerChain()[0]) {
				t.Errorf("chain of %d certificates: want the leaf and the issuer", len(svid.Chain))
			}
			if len(svid.Key) != 0 || svid.ID != workload() {
				t.Errorf("SVID of %v with a key of %d bytes", svid.ID, len(svid.Key))
			}
			if want := now.Add(-10 * time.Second).Truncate(time.Second); !leaf.NotBefore.Equal(want) || !svid.NotBefore.Equal(want) {
				t.Errorf("valid from %v, told %v; want %v", leaf.NotBefore, svid.NotBefore, want)
			}
			if want := now.Add(10 * time.Minute).Truncate(time.Second); !leaf.NotAfter.Equal(want) || !svid.NotAfter.Equal(want) {
				t.Errorf("valid until %v, told %v; want %v", leaf.NotAfter, svid.NotAfter, want)
			}
			if !slices.Equal(leaf.DNSNames, []string{"web.prod.svc", "web"}) {
				t.Errorf("DNS names %v", leaf.DNSNames)
			}
			if !leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(pub) {
				t.Error("another key is certified")
			}
			id, _, err := x509svid.Verify(chain(t, svid.Chain), r.bundle(t, r.x), x509svid.WithTime(now))
			if err != nil || id != workload() {
				t.Errorf("the reference library verifies it as %v, %v", id, err)
			}
		})
	}
}

func TestIssueX509Defaults(t *testing.T) {
	r := newRig(t)
	svid, _ := r.mustIssue(t, r.request(t))
	if got := svid.NotAfter.Sub(svid.NotBefore); got != identity.DefaultX509TTL+backdate {
		t.Errorf("valid for %v", got)
	}
	seen := map[string]bool{}
	var bits int
	for range 200 {
		_, leaf := r.mustIssue(t, r.request(t))
		if s := leaf.SerialNumber.String(); seen[s] {
			t.Fatalf("serial %s twice", s)
		} else {
			seen[s] = true
		}
		bits = max(bits, leaf.SerialNumber.BitLen())
	}
	if bits != 128 {
		t.Errorf("200 serials have at the most %d bits: want 128", bits)
	}
}

func TestDNSNamesAreNotRepeated(t *testing.T) {
	r := newRig(t)
	iss := r.request(t)
	iss.DNSNames = []string{"web", "db", "web"}
	if _, leaf := r.mustIssue(t, iss); !slices.Equal(leaf.DNSNames, []string{"web", "db"}) {
		t.Errorf("DNS names %v", leaf.DNSNames)
	}
}

func TestPrepareX509Refuses(t *testing.T) {
	r := newRig(t)
	var many []string
	for i := range identity.MaxDNSNames + 1 {
		many = append(many, fmt.Sprintf("n%d", i))
	}
	for _, c := range []struct {
		name   string
		change func(*identity.Issuance)
		want   error
	}{
		{"no ID", func(i *identity.Issuance) { i.ID = spiffeid.ID{} }, identity.ErrInvalid},
		{"no path", func(i *identity.Issuance) { i.ID = r.td.ID() }, identity.ErrInvalid},
		{"another trust domain", func(i *identity.Issuance) { i.ID = spiffeid.RequireFromString("spiffe://other.org/web") }, identity.ErrInvalid},
		{"a trust domain below ours", func(i *identity.Issuance) { i.ID = spiffeid.RequireFromString("spiffe://a.example.org/web") }, identity.ErrInvalid},
		{"ID too long", func(i *identity.Issuance) {
			i.ID = spiffeid.RequireFromString("spiffe://example.org/" + strings.Repeat("x", 2048))
		}, identity.ErrInvalid},
		{"a member", func(i *identity.Issuance) { i.ID = spiffeid.RequireFromPath(r.td, "/countersign/member/m2") }, identity.ErrDenied},
		{"this member", func(i *identity.Issuance) { i.ID = r.member }, identity.ErrDenied},
		{"no key", func(i *identity.Issuance) { i.PublicKey = nil }, identity.ErrInvalid},
		{"a private key", func(i *identity.Issuance) { i.PublicKey = newP256(t) }, identity.ErrInvalid},
		{"TTL too short", func(i *identity.Issuance) { i.TTL = identity.MinTTL - 1 }, identity.ErrInvalid},
		{"negative TTL", func(i *identity.Issuance) { i.TTL = -time.Hour }, identity.ErrInvalid},
		{"TTL too long", func(i *identity.Issuance) { i.TTL = identity.MaxX509TTL + 1 }, identity.ErrInvalid},
		{"too many DNS names", func(i *identity.Issuance) { i.DNSNames = many }, identity.ErrInvalid},
		{"upper-case DNS name", func(i *identity.Issuance) { i.DNSNames = []string{"Web"} }, identity.ErrInvalid},
		{"empty DNS name", func(i *identity.Issuance) { i.DNSNames = []string{""} }, identity.ErrInvalid},
		{"DNS name with a zero byte", func(i *identity.Issuance) { i.DNSNames = []string{"web\x00.example.org"} }, identity.ErrInvalid},
		{"DNS name that is not ASCII", func(i *identity.Issuance) { i.DNSNames = []string{"wéb"} }, identity.ErrInvalid},
		{"our issuer's key", func(i *identity.Issuance) { i.PublicKey = r.state.Load().issuer.key.Public() }, identity.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			iss := r.request(t)
			c.change(&iss)
			p, err := r.PrepareX509(iss)
			wantErr(t, err, c.want)
			if p != nil {
				t.Error("and yet there is a token")
			}
		})
	}
	iss := r.request(t)
	iss.ID = spiffeid.RequireFromPath(r.td, "/countersign/agent/join/a")
	if _, err := r.issue(iss); err != nil {
		t.Errorf("an agent: %v", err)
	}
}

func TestX509NeverOutlivesItsIssuer(t *testing.T) {
	r := newRig(t, func(c *Config) { c.X509TTL, c.IssuerTTL = time.Hour, 2*time.Hour })
	issuer := parse(t, r.IssuerChain()[0])
	r.clock.add(110 * time.Minute) // Run is not running: the issuer is old
	svid, leaf := r.mustIssue(t, r.request(t))
	if !leaf.NotAfter.Equal(issuer.NotAfter) || !svid.NotAfter.Equal(issuer.NotAfter) {
		t.Errorf("until %v, told %v; the issuer's end is %v", leaf.NotAfter, svid.NotAfter, issuer.NotAfter)
	}
	r.clock.add(10*time.Minute - identity.MinTTL/2)
	_, err := r.PrepareX509(r.request(t))
	wantErr(t, err, identity.ErrUnavailable)
	r.clock.add(-3 * time.Hour)
	_, err = r.PrepareX509(r.request(t))
	wantErr(t, err, identity.ErrUnavailable)
}

func TestIssuerNeverOutlivesItsRoot(t *testing.T) {
	r := newRig(t)
	short := r.newX509(t, time.Hour)
	if err := r.set(short, r.j); err != nil {
		t.Fatal(err)
	}
	issuer := parse(t, r.IssuerChain()[0])
	if issuer.NotAfter.After(short.NotAfter) || issuer.NotBefore.Before(short.NotBefore) {
		t.Errorf("issuer valid from %v to %v, its root from %v to %v", issuer.NotBefore, issuer.NotAfter, short.NotBefore, short.NotAfter)
	}
	iss := r.request(t)
	iss.TTL = identity.MaxX509TTL
	if svid, _ := r.mustIssue(t, iss); svid.NotAfter.After(short.NotAfter) {
		t.Errorf("leaf until %v, root until %v", svid.NotAfter, short.NotAfter)
	}
}

func TestCheckUnderRefuses(t *testing.T) {
	r := newRig(t)
	issuer := parse(t, r.IssuerChain()[0])
	_, good := r.mustIssue(t, r.request(t))
	if err := checkUnder(good, issuer); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"another issuer's name": func(c *x509.Certificate) { c.RawIssuer = []byte{0x30, 0} },
		"another issuer's key":  func(c *x509.Certificate) { c.AuthorityKeyId = []byte{1} },
		"starts before":         func(c *x509.Certificate) { c.NotBefore = issuer.NotBefore.Add(-time.Second) },
		"ends after":            func(c *x509.Certificate) { c.NotAfter = issuer.NotAfter.Add(time.Second) },
		"its issuer's key":      func(c *x509.Certificate) { c.SubjectKeyId = issuer.SubjectKeyId },
	} {
		c := *good
		change(&c)
		if checkUnder(&c, issuer) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A signer that signs wrongly is noticed when the issuer is made, before anything is issued.
func TestBrokenIssuerIsNotUsed(t *testing.T) {
	r := newRig(t)
	broken := *r.state.Load().issuer
	broken.key = newP256(t)
	if _, err := r.makeMember(r.clock.now(), &broken); err == nil {
		t.Error("a certificate that does not verify was made the member's")
	}
}

func TestPreparedX509IsSingleUse(t *testing.T) {
	r := newRig(t)
	p, err := r.PrepareX509(r.request(t))
	if err != nil {
		t.Fatal(err)
	}
	var issued, refused atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			switch _, err := p.Issue(); {
			case err == nil:
				issued.Add(1)
			case errors.Is(err, identity.ErrPrecondition):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if issued.Load() != 1 || refused.Load() != 7 {
		t.Errorf("issued %d times, refused %d times", issued.Load(), refused.Load())
	}
	for _, unprepared := range []*PreparedX509{nil, {}} {
		if _, err := unprepared.Issue(); err == nil {
			t.Error("signed what was not prepared")
		}
	}
	for _, unprepared := range []*PreparedJWT{nil, {}} {
		if _, err := unprepared.Issue(); err == nil {
			t.Error("signed what was not prepared")
		}
	}
}

func TestNothingPreparedIsSignedForARevokedAuthority(t *testing.T) {
	r := newRig(t)
	prepare := func() (*PreparedX509, *PreparedJWT) {
		p, err := r.PrepareX509(r.request(t))
		if err != nil {
			t.Fatal(err)
		}
		j, err := r.PrepareJWT(workload(), []string{"db"}, 0)
		if err != nil {
			t.Fatal(err)
		}
		return p, j
	}
	p, j := prepare()
	x2, j2 := r.newX509(t, time.Hour), r.newJWT(t, RS256, time.Hour)
	oldX, oldJ := r.x, r.j
	oldX.State, oldJ.State = identity.AuthorityRetiring, identity.AuthorityRetiring
	if err := r.set(oldX, x2, oldJ, j2); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Issue(); err != nil { // still in the bundle
		t.Errorf("retiring authority: %v", err)
	}
	if _, err := j.Issue(); err != nil {
		t.Errorf("retiring authority: %v", err)
	}
	p, j = prepare()
	if err := r.set(r.newX509(t, time.Hour), r.newJWT(t, ES256, time.Hour)); err != nil {
		t.Fatal(err)
	}
	_, err := p.Issue()
	wantErr(t, err, identity.ErrUnavailable)
	_, err = j.Issue()
	wantErr(t, err, identity.ErrUnavailable)
}
