package agent

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

// errAnswer is wrapped by whatever is wrong with a member's answer: the next member may give a right one.
var errAnswer = errors.New("the member's answer does not verify")

// maxIssuers bounds the issuer chains remembered as verified: members have one each, replaced once a day.
const maxIssuers = 64

// trust is what the agent believes and hands out: bundles, checked. It is immutable and replaced whole.
type trust struct {
	td      spiffeid.TrustDomain
	own     *identity.Bundle
	all     map[spiffeid.TrustDomain]*identity.Bundle
	ownOnly map[spiffeid.TrustDomain]*identity.Bundle // shared by every Update that federates with nobody
	roots   *x509.CertPool
	jwt     *jwtbundle.Bundle
	ending  map[string]identity.Ending // of own, by ID

	mu      sync.Mutex
	issuers map[[sha256.Size]byte]verifiedIssuer // a cache: what chains to roots
}

type verifiedIssuer struct {
	pool      *x509.CertPool
	authority string // ID of the one that signed it
	notAfter  time.Time
}

// newTrust checks the bundles. It keeps the old one's pointers where the content is the same, and returns old itself
// where nothing changed. An own bundle older than the old one is not taken: a member that lags must not undo a revocation.
func newTrust(old *trust, td spiffeid.TrustDomain, own *identity.Bundle, federated []*identity.Bundle) (*trust, error) {
	if own.TrustDomain != td {
		return nil, fmt.Errorf("%w: the bundle is of trust domain %q, not of %q", identity.ErrInvalid, own.TrustDomain, td)
	}
	if old != nil && (own.Sequence < old.own.Sequence || sameBundle(own, old.own)) {
		own = old.own
	}
	t := &trust{
		td: td, own: own, roots: x509.NewCertPool(), issuers: map[[sha256.Size]byte]verifiedIssuer{},
		all:     map[spiffeid.TrustDomain]*identity.Bundle{td: own},
		ownOnly: map[spiffeid.TrustDomain]*identity.Bundle{td: own},
		ending:  make(map[string]identity.Ending, len(own.Ending)),
	}
	for _, e := range own.Ending {
		t.ending[e.ID] = e
	}
	same := old != nil && own == old.own && len(old.all) == len(federated)+1
	for _, b := range federated {
		if b.TrustDomain == td || t.all[b.TrustDomain] != nil {
			return nil, fmt.Errorf("%w: two bundles of trust domain %q", identity.ErrInvalid, b.TrustDomain)
		}
		if old != nil && old.all[b.TrustDomain] != nil && sameBundle(b, old.all[b.TrustDomain]) {
			b = old.all[b.TrustDomain]
		} else {
			same = false
		}
		t.all[b.TrustDomain] = b
	}
	if same {
		return old, nil
	}
	if len(own.X509) == 0 {
		return nil, fmt.Errorf("%w: the bundle of %q has no X.509 authority: no member could be verified by it", identity.ErrInvalid, td)
	}
	for i, der := range own.X509 {
		c, err := x509.ParseCertificate(der)
		if err != nil || !c.IsCA {
			return nil, fmt.Errorf("%w: X.509 authority %d of the bundle of %q is not a CA certificate (%v)", identity.ErrInvalid, i+1, td, err)
		}
		t.roots.AddCert(c)
	}
	keys := make(map[string]crypto.PublicKey, len(own.JWT))
	for kid, der := range own.JWT {
		k, err := x509.ParsePKIXPublicKey(der)
		if err != nil || kid == "" {
			return nil, fmt.Errorf("%w: JWT authority %q of the bundle of %q: %v", identity.ErrInvalid, kid, td, err)
		}
		keys[kid] = k
	}
	t.jwt = jwtbundle.FromJWTAuthorities(td, keys)
	return t, nil
}

func sameBundle(a, b *identity.Bundle) bool {
	if a.TrustDomain != b.TrustDomain || a.Sequence != b.Sequence || a.RefreshHint != b.RefreshHint || len(a.JWT) != len(b.JWT) ||
		!slices.EqualFunc(a.X509, b.X509, bytes.Equal) || !slices.Equal(a.Ending, b.Ending) {
		return false
	}
	for kid, k := range a.JWT {
		if k2, ok := b.JWT[kid]; !ok || !bytes.Equal(k, k2) {
			return false
		}
	}
	return true
}

// federated lists the bundles other than the own one.
func (t *trust) federated() []*identity.Bundle {
	var out []*identity.Bundle
	for td, b := range t.all {
		if td != t.td {
			out = append(out, b)
		}
	}
	return out
}

// bundlesFor is what a workload with these SVIDs is to see.
func (t *trust) bundlesFor(svids []identity.X509SVID) map[spiffeid.TrustDomain]*identity.Bundle {
	out := t.ownOnly
	for i := range svids {
		for _, td := range svids[i].FederatesWith {
			b := t.all[td]
			if b == nil || td == t.td {
				continue
			}
			if len(out) == 1 {
				out = map[spiffeid.TrustDomain]*identity.Bundle{t.td: t.own}
			}
			out[td] = b
		}
	}
	return out
}

// verifySVID checks a chain as issued to the agent for the public key: live at now, not a CA's, its one URI SAN an ID of
// the trust domain, leading to the bundle (X509-SVID sections 2 to 5).
func (t *trust) verifySVID(chain [][]byte, public []byte, now time.Time) (verifiedSVID, error) {
	var none verifiedSVID
	if len(chain) == 0 {
		return none, fmt.Errorf("%w: no certificate", errAnswer)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return none, fmt.Errorf("%w: parsing the leaf: %v", errAnswer, err)
	}
	if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, public) {
		return none, fmt.Errorf("%w: the certificate is for another key", errAnswer)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return none, fmt.Errorf("%w: %v", errAnswer, err)
	}
	if id.TrustDomain() != t.td {
		return none, fmt.Errorf("%w: %s is not of trust domain %q", errAnswer, id, t.td)
	}
	if leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 || leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return none, fmt.Errorf("%w: the certificate of %s has not the key usage of a leaf", errAnswer, id)
	}
	issuer, err := t.issuer(chain[1:], now)
	if err != nil {
		return none, err
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: issuer.pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return none, fmt.Errorf("%w: the certificate of %s: %v (if it is a matter of time: is this node's clock right?)", errAnswer, id, err)
	}
	if len(chain) == 1 {
		issuer.authority = hex.EncodeToString(leaf.AuthorityKeyId)
	}
	return verifiedSVID{id: id, leaf: leaf, authority: issuer.authority}, nil
}

// verifiedSVID is what verifySVID found; authority is the ID of the x509 authority that it is under.
type verifiedSVID struct {
	id        spiffeid.ID
	leaf      *x509.Certificate
	authority string
}

// issuer verifies what stands behind a leaf, once per chain: a leaf then costs one signature check and not two.
func (t *trust) issuer(chain [][]byte, now time.Time) (verifiedIssuer, error) {
	var none verifiedIssuer
	if len(chain) == 0 {
		return verifiedIssuer{pool: t.roots}, nil
	}
	h := sha256.New()
	for _, der := range chain {
		fmt.Fprintf(h, "%d:", len(der))
		h.Write(der)
	}
	key := [sha256.Size]byte(h.Sum(nil))
	t.mu.Lock()
	defer t.mu.Unlock()
	if v, ok := t.issuers[key]; ok && now.Before(v.notAfter) {
		return v, nil
	}
	certs, err := parseChain(chain)
	if err != nil {
		return none, fmt.Errorf("%w: %v", errAnswer, err)
	}
	path, err := certs[0].Verify(x509.VerifyOptions{
		Roots: t.roots, Intermediates: poolOf(certs[1:]), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil || !certs[0].IsCA {
		return none, fmt.Errorf("%w: the issuer does not chain to the bundle of %q (%v)", errAnswer, t.td, err)
	}
	v := verifiedIssuer{pool: poolOf(certs[:1]), authority: hex.EncodeToString(certs[0].AuthorityKeyId), notAfter: certs[0].NotAfter}
	for _, c := range path[0] {
		if c.NotAfter.Before(v.notAfter) {
			v.notAfter = c.NotAfter
		}
	}
	if len(t.issuers) >= maxIssuers {
		clear(t.issuers)
	}
	t.issuers[key] = v
	return v, nil
}

func parseChain(chain [][]byte) ([]*x509.Certificate, error) {
	out := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parsing certificate %d: %w", i+1, err)
		}
		out[i] = c
	}
	return out, nil
}

func poolOf(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

// contact is what a member is verified by. At first contact that may be the pin; later it is the newest bundle alone, since
// a pin cannot be revoked.
type contact struct {
	td    spiffeid.TrustDomain     // zero: any
	trust *trust                   // nil: none yet
	pin   string                   // empty: not to be used
	roots func() ([][]byte, error) // nil: none are published
}

// verify takes the chain that a member presented, leaf first, and says which member it is.
func (c contact) verify(certs []*x509.Certificate, now time.Time) (spiffeid.ID, error) {
	var none spiffeid.ID
	if len(certs) == 0 {
		return none, fmt.Errorf("%w: the server shows no certificate", identity.ErrUnauthenticated)
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return none, fmt.Errorf("%w: the server's certificate: %v", identity.ErrUnauthenticated, err)
	}
	if identity.RoleOf(id) != identity.RoleMember {
		return none, fmt.Errorf("%w: the server is %s: not a member of a CA cluster", identity.ErrUnauthenticated, id)
	}
	if !c.td.IsZero() && id.TrustDomain() != c.td {
		return none, fmt.Errorf("%w: the server is %s: not of trust domain %q", identity.ErrUnauthenticated, id, c.td)
	}
	opts := x509.VerifyOptions{Intermediates: poolOf(certs[1:]), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	why := errors.New("there is nothing to verify it by")
	if c.trust != nil {
		opts.Roots = c.trust.roots
		if _, why = certs[0].Verify(opts); why == nil {
			return id, nil
		}
	}
	if c.pin != "" {
		if opts.Roots, err = pinnedRoot(certs[1:], c.pin, now); err != nil {
			return none, err
		}
		if _, why = certs[0].Verify(opts); why == nil {
			return id, nil
		}
	}
	if c.roots != nil {
		if opts.Roots, err = publishedRoots(c.roots); err != nil {
			return none, err
		}
		if _, why = certs[0].Verify(opts); why == nil {
			return id, nil
		}
	}
	return none, fmt.Errorf("%w: the server %s: %v", identity.ErrUnauthenticated, id, why)
}

// publishedRoots are the authorities that are published now.
func publishedRoots(read func() ([][]byte, error)) (*x509.CertPool, error) {
	ders, err := read()
	if err != nil {
		return nil, fmt.Errorf("reading the published bundle: %w", err)
	}
	certs, err := parseChain(ders)
	if err != nil || len(certs) == 0 {
		return nil, fmt.Errorf("%w: the published bundle has no X.509 authority, or one that cannot be read (%v)", identity.ErrInvalid, err)
	}
	for _, c := range certs {
		if !c.IsCA {
			return nil, fmt.Errorf("%w: the published bundle has a certificate that is no authority (%s)", identity.ErrInvalid, c.Subject)
		}
	}
	return poolOf(certs), nil
}

// pinnedRoot are the CA certificates among those presented that the pin vouches for: see node.PinnedRoots.
func pinnedRoot(certs []*x509.Certificate, pin string, now time.Time) (*x509.CertPool, error) {
	if believed := node.PinnedRoots(certs, pin, now); len(believed) > 0 {
		return poolOf(believed), nil
	}
	return nil, fmt.Errorf("%w: no CA that the server shows has the pinned key %s: is it a member of this cluster, was the pin mistyped, or was its authority given up?", identity.ErrUnauthenticated, pin)
}

// memberSeen gets the ID of the first member verified on a connection; it has room for one.
type memberSeen chan spiffeid.ID

// trustDomain is that of the member; to be called once, after a call has succeeded on the connection.
func (m memberSeen) trustDomain() spiffeid.TrustDomain { return (<-m).TrustDomain() }

// clientTLS verifies the member by c and shows what own returns, or no certificate if own is nil. seen may be nil.
func clientTLS(c func() contact, own func() *ownSVID, seen memberSeen) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"h2"},
		InsecureSkipVerify: true, // the name is a SPIFFE ID: VerifyConnection checks chain and ID
		VerifyConnection: func(cs tls.ConnectionState) error {
			id, err := c().verify(cs.PeerCertificates, time.Now())
			if err != nil {
				return err
			}
			select {
			case seen <- id:
			default: // nobody asks, or a connection made again
			}
			return nil
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if own == nil {
				return &tls.Certificate{}, nil
			}
			o := own()
			if o == nil {
				return nil, fmt.Errorf("%w: the agent has no SVID", identity.ErrUnavailable)
			}
			return o.tls, nil
		},
	}
}
