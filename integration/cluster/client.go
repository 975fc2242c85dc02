package cluster

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "countersign.io/countersign/api/admin/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/server"
)

// Client speaks to members as an agent does, without being one: to ask a certain member, and to measure.
type Client struct {
	ID   string
	pin  string
	cert tls.Certificate
}

// NewClient attests by a join token for kubeNode ("cluster/node").
func (c *Cluster) NewClient(ctx context.Context, kubeNode string) (*Client, error) {
	args := []string{"token", "create", "--agent"}
	if kubeNode != "" {
		args = append(args, "--kube-node", kubeNode)
	}
	raw, err := c.Admin(ctx, args...)
	if err != nil {
		return nil, err
	}
	t, err := node.ParseToken(strings.TrimSpace(raw))
	if err != nil {
		return nil, err
	}
	key, public, err := NewKey()
	if err != nil {
		return nil, err
	}
	cl := &Client{pin: t.Pin, cert: tls.Certificate{PrivateKey: key}}
	conn, err := cl.Dial(t.Addresses[0])
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stream, err := nodev1.NewNodeClient(conn).Attest(ctx)
	if err != nil {
		return nil, err
	}
	begin := &nodev1.AttestRequest_Begin{PublicKey: public, Evidence: &nodev1.AttestRequest_Begin_JoinToken{JoinToken: t.Secret}}
	if err := stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Begin_{Begin: begin}}); err != nil {
		return nil, err
	}
	res, err := stream.Recv()
	if err != nil {
		return nil, fmt.Errorf("attesting: %w", err)
	}
	svid := res.GetSvid()
	cl.ID, cl.cert.Certificate = svid.GetSpiffeId(), svid.GetChain()
	return cl, nil
}

// Dial connects to one member; without an SVID yet, as a stranger.
func (cl *Client) Dial(address string) (*grpc.ClientConn, error) {
	conf, err := server.PinnedTLS(cl.pin, spiffeid.TrustDomain{})
	if err != nil {
		return nil, err
	}
	if len(cl.cert.Certificate) > 0 {
		conf.Certificates = []tls.Certificate{cl.cert}
	}
	return grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(conf)))
}

// Issue asks one member for one X.509-SVID by a pod's token.
func Issue(ctx context.Context, c workloadv1.WorkloadClient, token string, public []byte) (*workloadv1.X509Result, error) {
	res, err := c.IssueX509(ctx, &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{PublicKey: public, Evidence: &workloadv1.Evidence{Token: token}}}})
	if err != nil {
		return nil, err
	}
	if len(res.Results) != 1 {
		return nil, fmt.Errorf("%d results for one request", len(res.Results))
	}
	if e := res.Results[0].Error; e != nil {
		return nil, fmt.Errorf("refused (%d): %s", e.Code, e.Message)
	}
	return res.Results[0], nil
}

// NewKey makes a P-256 key and its public half in PKIX.
func NewKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making a key: %w", err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, nil, fmt.Errorf("encoding a key: %w", err)
	}
	return key, public, nil
}

// AdminConn connects to a member's admin socket, for many calls.
func (m *Member) AdminConn() (adminv1.AdminClient, func(), error) {
	conn, err := grpc.NewClient("unix:"+m.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return adminv1.NewAdminClient(conn), func() { conn.Close() }, nil
}

// Trust connects to a member's admin socket, for its authorities.
func (m *Member) Trust() (adminv1.TrustClient, func(), error) {
	conn, err := grpc.NewClient("unix:"+m.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return adminv1.NewTrustClient(conn), func() { conn.Close() }, nil
}
