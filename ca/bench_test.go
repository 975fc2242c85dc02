package ca

import (
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"

	"countersign.io/countersign/identity"
)

// What a member pays for one X.509-SVID without the RPC: the key parsed from the wire, checked, linted, signed.
func BenchmarkIssueX509(b *testing.B) {
	r := newRig(b)
	wire := der(b, newP256(b).Public())
	b.ReportAllocs()
	for b.Loop() {
		pub, err := ParsePublicKey(wire)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := r.issue(identity.Issuance{ID: workload(), PublicKey: pub, DNSNames: []string{"web.prod.svc"}}); err != nil {
			b.Fatal(err)
		}
	}
}

// The part of it that needs no key.
func BenchmarkPrepareX509(b *testing.B) {
	r := newRig(b)
	iss := r.request(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.PrepareX509(iss); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncodeLeaf(b *testing.B) {
	is, l := benchLeaf(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := is.encoder.encode(l); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncodeAndSignLeaf(b *testing.B) {
	is, l := benchLeaf(b)
	b.ReportAllocs()
	for b.Loop() {
		tbs, err := is.encoder.encode(l)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := is.sign(tbs); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLibraryCreateLeaf(b *testing.B) {
	is, l := benchLeaf(b)
	pub := newP256(b).Public()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := x509.CreateCertificate(rand.Reader, l.template(pub), is.cert, pub, is.key); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSoftCASCreateLeaf(b *testing.B) {
	is, l := benchLeaf(b)
	pub := newP256(b).Public()
	cas, err := softcas.New(b.Context(), casapi.Options{CertificateChain: []*x509.Certificate{is.cert}, Signer: is.key})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := cas.CreateCertificate(&casapi.CreateCertificateRequest{Template: l.template(pub), Lifetime: time.Hour}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkIssueJWT(b *testing.B) {
	for _, alg := range []string{ES256, RS256} {
		b.Run(alg, func(b *testing.B) {
			r := newRig(b)
			if err := r.set(r.x, r.newJWT(b, alg, time.Hour)); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				p, err := r.PrepareJWT(workload(), []string{"db"}, 0)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := p.Issue(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func benchLeaf(b *testing.B) (*issuer, *leaf) {
	b.Helper()
	l := someLeaf()
	l.publicKey, l.keyID = der(b, newP256(b).Public()), make([]byte, 20)
	return newRig(b).state.Load().issuer, l
}
