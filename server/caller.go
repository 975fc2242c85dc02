package server

import (
	"context"
	"crypto/x509"
	"net"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"countersign.io/countersign/identity"
)

// kind is what a connection proved about its other end. The zero kind may do nothing.
type kind uint8

const (
	guest    kind = 1 << iota // TLS without a certificate
	workload                  // an SVID of ours that is not the cluster's own part
	member
	agent
	local  // on the Unix socket, root or the server's own user
	remote // an SVID of ours on a connection for admins: see power for what it may do
)

func (k kind) String() string {
	switch k {
	case guest:
		return "a caller without a certificate"
	case workload:
		return "a workload"
	case member:
		return "a member"
	case agent:
		return "an agent"
	case local:
		return "a local operator"
	case remote:
		return "a remote admin"
	}
	return "an unknown caller"
}

// caller is the other end of a connection.
type caller struct {
	kind    kind
	id      spiffeid.ID          // of its SVID
	serial  string               // of its SVID's certificate, in hex
	chain   *[]*x509.Certificate // what it showed, its SVID first
	expires time.Time            // of its SVID
	issued  time.Time            // NotBefore of its SVID
	addr    netip.Addr           // of its TLS connection
	uid     uint32               // on the Unix socket
	proven  func()               // of a guest: ends its part in the limits of strangers; nil: it has none
}

// AuthType makes a caller the grpc AuthInfo of its connection.
func (caller) AuthType() string { return "countersign" }

// GetCommonAuthInfo says that what goes over the connection is private: TLS, or a Unix socket.
func (caller) GetCommonAuthInfo() credentials.CommonAuthInfo {
	return credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
}

// callerOf is who makes a call; the zero caller if the connection says nothing.
func callerOf(ctx context.Context) caller {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.AuthInfo.(caller); ok {
			return c
		}
	}
	return caller{}
}

// tlsCaller derives the caller from a finished handshake. The certificate, if there is one, has been verified
// against the bundle by then (see ServerTLS).
func tlsCaller(certs []*x509.Certificate, addr netip.Addr) (caller, error) {
	c := caller{kind: guest, addr: addr}
	if len(certs) == 0 {
		return c, nil
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return caller{}, err
	}
	c.chain = &certs
	c.serial = certs[0].SerialNumber.Text(16)
	c.id, c.issued, c.expires = id, certs[0].NotBefore, certs[0].NotAfter
	switch identity.RoleOf(id) {
	case identity.RoleAgent:
		c.kind = agent
	case identity.RoleMember:
		c.kind = member
	default:
		c.kind = workload
	}
	return c, nil
}

// addrOf is the address that limits count: one host's IPv6 addresses count as one.
func addrOf(a net.Addr) netip.Addr {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}
	ip := ap.Addr().Unmap()
	if ip.Is6() {
		p, _ := ip.WithZone("").Prefix(64)
		return p.Addr()
	}
	return ip
}
