package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	downstreamv1 "countersign.io/countersign/api/downstream/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

const (
	sourceTime = 15 * time.Second // for an agent to give the member its SVID
	signTime   = 20 * time.Second // for one member above to sign
	// pause between two rounds over the members above, when the last one ended well: a member there restarts, or our SVID
	// is a new one.
	pause     = time.Second
	maxAnswer = 4 << 20 // bytes
)

// CountersignConfig is how to reach a cluster above.
type CountersignConfig struct {
	TrustDomain spiffeid.TrustDomain
	Servers     []string // host:port of its members
	Socket      string   // path of the Workload API socket of its agent on this machine
}

// Countersign is another Countersign cluster of the same trust domain. This member is a workload of it: an agent of that
// cluster, on this machine, gives it the SVID whose entry is marked downstream.
type Countersign struct{ cfg CountersignConfig }

// NewCountersign checks the configuration, and asks nobody yet.
func NewCountersign(cfg CountersignConfig) (*Countersign, error) {
	if cfg.TrustDomain.IsZero() || len(cfg.Servers) == 0 || cfg.Socket == "" {
		return nil, fmt.Errorf("%w: the cluster above needs a trust domain, servers and an agent's socket", identity.ErrInvalid)
	}
	return &Countersign{cfg: cfg}, nil
}

// String names the cluster by its servers, in whatever order they are configured.
func (c *Countersign) String() string {
	return "countersign:" + strings.Join(slices.Sorted(slices.Values(c.cfg.Servers)), ",")
}

// source is this member's SVID in the cluster above, kept up to date by the agent there.
func (c *Countersign) source(ctx context.Context) (*workloadapi.X509Source, error) {
	ctx, cancel := context.WithTimeout(ctx, sourceTime)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+c.cfg.Socket)))
	if err != nil {
		return nil, fmt.Errorf("%w: getting this member's SVID in the cluster above from its agent at %s: %v", identity.ErrUnavailable, c.cfg.Socket, err)
	}
	return s, nil
}

// dial is for one member above. It is shown our SVID, and must be a member of the trust domain.
func (c *Countersign) dial(address string, source *workloadapi.X509Source) (*grpc.ClientConn, error) {
	conf := &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			svid, err := source.GetX509SVID()
			if err != nil {
				return nil, err
			}
			out := &tls.Certificate{PrivateKey: svid.PrivateKey}
			for _, cert := range svid.Certificates {
				out.Certificate = append(out.Certificate, cert.Raw)
			}
			return out, nil
		},
		InsecureSkipVerify: true, // SVIDs have no host names: VerifyPeerCertificate verifies
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			id, chains, err := x509svid.ParseAndVerify(raw, source)
			if err != nil {
				return err
			}
			svid, err := source.GetX509SVID()
			if err != nil {
				return err
			}
			// Another cluster below could pass for the one above, and give us roots of its own.
			if err := identity.CheckSameCluster(chains, svid.Certificates); err != nil {
				return err
			}
			if id.TrustDomain() != c.cfg.TrustDomain || identity.RoleOf(id) != identity.RoleMember {
				return fmt.Errorf("the other side is %s, which is not a member of trust domain %s", id, c.cfg.TrustDomain.Name())
			}
			return nil
		},
	}
	return grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(conf)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}))
}

// servers are all of them, in an order that spreads callers.
func (c *Countersign) servers() []string {
	out := append([]string(nil), c.cfg.Servers...)
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// Sign asks one member above after the other, until one signs or one says no.
func (c *Countersign) Sign(ctx context.Context, req *x509.CertificateRequest, ttl time.Duration) ([]byte, [][]byte, [][]byte, error) {
	pub, err := x509.MarshalPKIXPublicKey(req.PublicKey)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("%w: encoding the key: %v", identity.ErrInvalid, err)
	}
	source, err := c.source(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	defer source.Close()
	var errs []error
	for _, address := range c.servers() {
		resp, err := c.signAt(ctx, address, source, &downstreamv1.SignRequest{PublicKey: pub, TtlSeconds: int64(ttl / time.Second)})
		if err == nil {
			f, err := c.foreign(resp.Bundle)
			if err != nil {
				return nil, nil, nil, fmt.Errorf("asking %s: %w", address, err)
			}
			return resp.Certificate, resp.Chain, f.X509, nil
		}
		errs = append(errs, fmt.Errorf("asking %s: %w", address, err))
		if errors.Is(err, identity.ErrInvalid) {
			break // the others would say the same
		}
	}
	return nil, nil, nil, errors.Join(errs...)
}

func (c *Countersign) signAt(ctx context.Context, address string, source *workloadapi.X509Source, req *downstreamv1.SignRequest) (*downstreamv1.SignResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, signTime)
	defer cancel()
	conn, err := c.dial(address, source)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := downstreamv1.NewDownstreamClient(conn).Sign(ctx, req)
	return resp, fromStatus(err)
}

// fromStatus also names what has no name of ours: a deadline is a member that does not answer.
func fromStatus(err error) error {
	err = api.FromStatus(err)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", identity.ErrUnavailable, err)
	}
	return err
}

// foreign is what a bundle of the cluster above vouches for.
func (c *Countersign) foreign(w *workloadv1.Bundle) (*identity.Above, error) {
	b, err := api.BundleFromWire(w)
	if err != nil {
		return nil, err
	}
	if b.TrustDomain != c.cfg.TrustDomain {
		return nil, fmt.Errorf("%w: the cluster above is of trust domain %q, this one of %q", identity.ErrInvalid, b.TrustDomain.Name(), c.cfg.TrustDomain.Name())
	}
	f := &identity.Above{Foreign: identity.Foreign{Source: identity.SourceUpstream, X509: b.X509}, Sequence: b.Sequence, Ending: b.Ending}
	for kid, key := range b.JWT {
		f.JWT = append(f.JWT, identity.JWTKey{ID: kid, PublicKey: key})
	}
	return f, nil
}

// Follow keeps a Sync stream to one member above. It gives up, for a while, when a whole round over them told nothing.
func (c *Countersign) Follow(ctx context.Context, keys <-chan identity.Below, tell func(*identity.Above, error)) error {
	source, err := c.source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	var last identity.Below
	select { // no member above hears of us before we know our keys: one message would take those of before out
	case last = <-keys:
	case <-ctx.Done():
		return nil
	}
	for {
		var errs []error
		told := false
		for _, address := range c.servers() {
			err := c.syncAt(ctx, address, source, &last, keys, func(f *identity.Above) { told = true; tell(f, nil) })
			if ctx.Err() != nil {
				return nil
			}
			errs = append(errs, fmt.Errorf("following %s: %w", address, err))
			if told {
				break
			}
		}
		if !told {
			return errors.Join(errs...)
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

func (c *Countersign) syncAt(ctx context.Context, address string, source *workloadapi.X509Source, last *identity.Below, keys <-chan identity.Below, tell func(*identity.Above)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := c.dial(address, source)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := downstreamv1.NewDownstreamClient(conn).Sync(ctx)
	if err != nil {
		return fromStatus(err)
	}
	// A refused Send says nothing but that the stream has ended; Recv says why.
	_ = stream.Send(belowToWire(*last))
	received := make(chan error, 1)
	go func() {
		for {
			b, err := stream.Recv()
			if err != nil {
				received <- fromStatus(err)
				return
			}
			f, err := c.foreign(b)
			if err != nil {
				received <- err
				return
			}
			tell(f)
		}
	}()
	for {
		select {
		case err := <-received:
			return err
		case *last = <-keys:
			_ = stream.Send(belowToWire(*last))
		}
	}
}

func belowToWire(b identity.Below) *downstreamv1.Keys {
	out := &downstreamv1.Keys{AckedSequence: b.Acked, Tells: true, Uses: b.Uses}
	for _, k := range b.Keys {
		out.Keys = append(out.Keys, &downstreamv1.Keys_Key{Kid: k.ID, PublicKey: k.PublicKey, NotAfter: timestamppb.New(k.NotAfter)})
	}
	return out
}
