package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// belowPrefix begins the organizational unit that marks the authority of a cluster below another.
const belowPrefix = "Countersign cluster below "

// BelowMark is the organizational unit of the subject of an authority that is signed for a cluster below: whose downstream
// entry it is. It stays the same when the authority is renewed, and has less than 64 bytes (RFC 5280 appendix A).
func BelowMark(downstream spiffeid.ID) string {
	sum := sha256.Sum256([]byte(downstream.String()))
	return belowPrefix + hex.EncodeToString(sum[:16])
}

// belowMarks are the marks on a chain, sorted. A cluster below cannot get rid of its own: a verified chain from anything that it
// signed leads through the certificate that has it.
func belowMarks(chain []*x509.Certificate) []string {
	var out []string
	for _, c := range chain {
		for _, ou := range c.Subject.OrganizationalUnit {
			if c.IsCA && strings.HasPrefix(ou, belowPrefix) {
				out = append(out, ou)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// CheckSameCluster refuses, with ErrDenied, a peer whose certificate another cluster of the trust domain issued: one below, which may
// sign whatever name it likes, or one beside or above. chains are the verified ones of the peer's certificate, own are those that
// members of this cluster may show.
func CheckSameCluster(chains [][]*x509.Certificate, own ...[]*x509.Certificate) error {
	for _, o := range own {
		want := belowMarks(o)
		for _, chain := range chains {
			if slices.Equal(belowMarks(chain), want) {
				return nil
			}
		}
	}
	return fmt.Errorf("%w: its certificate was issued by another cluster of the trust domain, below this one or beside", ErrDenied)
}
