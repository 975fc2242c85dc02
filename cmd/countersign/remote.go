package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"countersign.io/countersign/api"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

const (
	// dialTime is how long one member may take to answer before the next is asked.
	dialTime = 5 * time.Second
	// maxAnswer bounds what a member may send in one message.
	maxAnswer = 16 << 20
)

// remote is where the members are, and who one is towards them: from the Workload API of this machine, or from files.
type remote struct {
	members           []string
	svid, key, bundle string
	as                string
}

func (r *remote) flags(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.StringSliceVar(&r.members, "member", nil, "host:port of a member to ask by an SVID that makes you an admin (repeatable: the first that answers; default $COUNTERSIGN_MEMBER, or the admin socket)")
	f.StringVar(&r.svid, "svid", "", "with --member: folder with svid.pem, key.pem and bundle.pem, or the certificate's file (default the Workload API)")
	f.StringVar(&r.key, "svid-key", "", "with --svid FILE: its private key, PEM (0600)")
	f.StringVar(&r.bundle, "svid-bundle", "", "with --svid FILE: the trust bundle, PEM")
	f.StringVar(&r.as, "as", "", "with --member: which of your SPIFFE IDs, if the Workload API gives several (default the first)")
}

// of are the members to ask; none: this machine's own is to be asked by its socket. A socket that was named is meant.
func (a *admin) members() []string {
	if len(a.remote.members) > 0 {
		return a.remote.members
	}
	if env := os.Getenv("COUNTERSIGN_MEMBER"); env != "" && a.socket == "" && os.Getenv("COUNTERSIGN_ADMIN_SOCKET") == "" {
		return strings.Split(env, ",")
	}
	return nil
}

// identitySource is who one is, and whom one trusts.
type identitySource struct {
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
}

func (r *remote) source(ctx context.Context, socket string) (*identitySource, error) {
	if r.svid == "" {
		if r.key != "" || r.bundle != "" {
			return nil, fmt.Errorf("%w: --svid-key and --svid-bundle go with --svid FILE", identity.ErrInvalid)
		}
		return r.fromWorkloadAPI(ctx, socket)
	}
	cert, key, bundle := r.svid, r.key, r.bundle
	if info, err := os.Stat(cert); err == nil && info.IsDir() {
		cert = filepath.Join(r.svid, "svid.pem")
		for file, name := range map[*string]string{&key: "key.pem", &bundle: "bundle.pem"} {
			if *file == "" {
				*file = filepath.Join(r.svid, name)
			}
		}
	}
	if key == "" || bundle == "" {
		return nil, fmt.Errorf("%w: --svid %s: name its key (--svid-key) and the trust bundle (--svid-bundle), or a folder with all three", identity.ErrInvalid, cert)
	}
	return fromFiles(cert, key, bundle)
}

func fromFiles(cert, key, bundle string) (*identitySource, error) {
	svid, err := readPair(fmt.Sprintf("--svid %s with key %s", cert, key), func() (certPEM, keyPEM []byte, err error) {
		if certPEM, err = readInput(cert); err != nil {
			return nil, nil, fmt.Errorf("reading --svid: %w", err)
		}
		if keyPEM, err = durable.ReadPrivateFile(key, maxInput); err != nil {
			return nil, nil, fmt.Errorf("%w: reading the key of --svid: %v", identity.ErrInvalid, err)
		}
		return certPEM, keyPEM, nil
	})
	if err != nil {
		return nil, err
	}
	bundlePEM, err := readInput(bundle)
	if err != nil {
		return nil, fmt.Errorf("reading --svid-bundle: %w", err)
	}
	b, err := x509bundle.Parse(svid.ID.TrustDomain(), bundlePEM)
	if err == nil && b.Empty() {
		err = errors.New("it holds no PEM certificate")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: --svid-bundle %s: %v", identity.ErrInvalid, bundle, err)
	}
	if end := svid.Certificates[0].NotAfter; time.Now().After(end) {
		return nil, fmt.Errorf("%w: the SVID in %s expired at %s: get a new one", identity.ErrUnauthenticated, cert, end.UTC().Format(time.RFC3339))
	}
	return &identitySource{svid, b}, nil
}

// readPair reads a certificate and its key. Two that do not belong together are read again: somebody may be replacing them.
func readPair(what string, read func() (certPEM, keyPEM []byte, err error)) (*x509svid.SVID, error) {
	var first error
	for range 2 {
		certPEM, keyPEM, err := read()
		if err == nil {
			var svid *x509svid.SVID
			svid, err = x509svid.Parse(certPEM, keyPEM)
			clear(keyPEM)
			if err == nil {
				return svid, nil
			}
			err = fmt.Errorf("%w: %s: %v", identity.ErrInvalid, what, err)
		}
		if first == nil { // a second reading of standard input finds nothing
			first = err
		}
	}
	return nil, first
}

func (r *remote) fromWorkloadAPI(ctx context.Context, socket string) (*identitySource, error) {
	addr, err := workloadSocket(socket)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	x, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(addr))
	if err != nil {
		if err = api.FromStatus(err); errors.Is(err, identity.ErrDenied) {
			return nil, fmt.Errorf("the agent at %s gives you no SVID, so no member can know you: %w", addr, err)
		}
		return nil, fmt.Errorf("%w: getting your SVID from the Workload API at %s: %v: name it with --socket, or use --svid", identity.ErrUnavailable, addr, err)
	}
	svid := x.DefaultSVID()
	if r.as != "" {
		svid = nil
		var have []string
		for _, s := range x.SVIDs {
			have = append(have, s.ID.String())
			if s.ID.String() == r.as {
				svid = s
			}
		}
		if svid == nil {
			return nil, fmt.Errorf("%w: --as %s: the Workload API gives you %s", identity.ErrNotFound, r.as, strings.Join(have, ", "))
		}
	}
	b, err := x.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return nil, fmt.Errorf("finding the trust bundle of %s: %w", svid.ID, err)
	}
	return &identitySource{svid, b}, nil
}

// workloadSocket finds the Workload API: as told, by the environment, or the first socket that is there.
func workloadSocket(told string) (string, error) {
	if told == "" {
		told = os.Getenv("SPIFFE_ENDPOINT_SOCKET")
	}
	if strings.HasPrefix(told, "/") {
		told = "unix://" + told
	}
	if told != "" {
		if err := workloadapi.ValidateAddress(told); err != nil {
			return "", fmt.Errorf("%w: Workload API socket %q: %v: want unix:///PATH or tcp://IP:PORT", identity.ErrInvalid, told, err)
		}
		return told, nil
	}
	candidates := []string{config.DefaultAgentSocket}
	if dir, err := devDataDir(); err == nil {
		candidates = append(candidates, filepath.Join(dir, "agent.sock"))
	}
	for _, c := range candidates {
		if _, err := os.Stat(c); err == nil {
			return "unix://" + c, nil
		}
	}
	return "", fmt.Errorf("%w: no agent is running here that could tell who you are: looked for %s; name its socket with --socket, or use --svid", identity.ErrUnavailable, strings.Join(candidates, " and "))
}

// tls shows the SVID, and wants a member of its own cluster.
func (s *identitySource) tls() *tls.Config {
	cert := &tls.Certificate{PrivateKey: s.svid.PrivateKey}
	for _, c := range s.svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return &tls.Config{
		MinVersion:           tls.VersionTLS13,
		NextProtos:           []string{api.ALPNAdmin},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		InsecureSkipVerify:   true, // SVIDs have no host names: VerifyPeerCertificate verifies
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			id, chains, err := x509svid.ParseAndVerify(raw, s.bundle)
			if err != nil {
				return fmt.Errorf("%w: %v", identity.ErrUnauthenticated, err)
			}
			if id.TrustDomain() != s.svid.ID.TrustDomain() || identity.RoleOf(id) != identity.RoleMember {
				return fmt.Errorf("%w: the other side is %s, which is not a member of trust domain %s", identity.ErrUnauthenticated, id, s.svid.ID.TrustDomain().Name())
			}
			// A cluster below may sign any name, a member's too, and would be told what is meant for its superior.
			return identity.CheckSameCluster(chains, s.svid.Certificates)
		},
	}
}

// reach connects to the first member that answers, and says which that was.
func (a *admin) reach(ctx context.Context, servers []string) (*link, error) {
	source, err := a.remote.source(ctx, a.socket)
	if err != nil {
		return nil, err
	}
	dialer := &tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTime}, Config: source.tls()}
	var errs []error
	for _, server := range servers {
		if _, _, err := net.SplitHostPort(server); err != nil {
			return nil, fmt.Errorf("%w: --member %q: want host:port: %v", identity.ErrInvalid, server, err)
		}
		first, err := dialOnce(ctx, dialer, server)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		l := &link{where: server, remote: true, who: source.svid.ID.String(), expires: source.svid.Certificates[0].NotAfter}
		l.unused.Store(&first)
		l.conn, err = l.failed.dial("passthrough:///"+server, insecure.NewCredentials(), // TLS is the dialer's: gRPC wants a protocol name of its own
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				if c := l.unused.Swap(nil); c != nil {
					return *c, nil
				}
				return dialOnce(ctx, dialer, addr)
			}))
		if err != nil {
			first.Close()
			return nil, err
		}
		return l, nil
	}
	return nil, errors.Join(errs...)
}

func dialOnce(ctx context.Context, d *tls.Dialer, server string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	c, err := d.DialContext(ctx, "tcp", server)
	switch {
	case err == nil && c.(*tls.Conn).ConnectionState().NegotiatedProtocol != api.ALPNAdmin:
		c.Close()
		return nil, fmt.Errorf("%w: the member at %s does not take admins by SVID: its version is older", identity.ErrPrecondition, server)
	case err == nil:
		return c, nil
	case errors.Is(err, identity.ErrUnauthenticated), errors.Is(err, identity.ErrDenied):
		return nil, fmt.Errorf("connecting to %s: %w", server, err)
	case strings.Contains(err.Error(), "no application protocol"):
		return nil, fmt.Errorf("%w: the member at %s does not take admins by SVID: its version is older, or you have an agent's or a member's SVID", identity.ErrPrecondition, server)
	}
	return nil, fmt.Errorf("%w: connecting to the member at %s: %v", identity.ErrUnavailable, server, err)
}

// link is a connection to one member.
type link struct {
	conn   *grpc.ClientConn
	where  string // its socket, or host:port
	remote bool
	who    string // one's own SPIFFE ID, where remote
	// expires is when the SVID ends that the connection was made with, where remote.
	expires time.Time
	failed  requestID
	unused  atomic.Pointer[net.Conn] // until gRPC takes it
}

// Close hangs up.
func (l *link) Close() error {
	err := l.conn.Close()
	if c := l.unused.Swap(nil); c != nil { // a dialer of gRPC's may still be about to take it
		err = errors.Join(err, (*c).Close())
	}
	return err
}

// dial connects to a member: to a remote one, or to this machine's by its socket.
func (a *admin) dial(ctx context.Context) (*link, error) {
	if servers := a.members(); len(servers) > 0 {
		return a.reach(ctx, servers)
	}
	if r := a.remote; r.svid != "" || r.key != "" || r.bundle != "" || r.as != "" {
		return nil, fmt.Errorf("%w: --svid, --svid-key, --svid-bundle and --as say who you are towards a remote member: name it with --member", identity.ErrInvalid)
	}
	path, err := adminSocket(a.socket)
	if err != nil {
		return nil, err
	}
	l := &link{where: path}
	l.conn, err = l.failed.dial("unix:"+path, insecure.NewCredentials())
	return l, err
}

// explain words the error of a call.
func (l *link) explain(err error) error {
	if err == nil {
		return nil
	}
	l.failed.mu.Lock()
	id := l.failed.id
	l.failed.mu.Unlock()
	if err = l.unexplained(err); id == "" {
		return err
	}
	return fmt.Errorf("%w (request ID %s)", err, id)
}

func (l *link) unexplained(err error) error {
	if unimplemented(err) {
		return fmt.Errorf("%w: the member at %s runs a version that cannot do this: upgrade it, or ask one that can (%v)", identity.ErrPrecondition, l.where, err)
	}
	text := err.Error()
	err = api.FromStatus(err)
	switch {
	case l.remote && strings.Contains(text, "remote error: tls:"):
		return fmt.Errorf("%w: the member at %s does not accept the certificate of %s: it may have expired, or be of another cluster (%v)", identity.ErrUnauthenticated, l.where, l.who, err)
	case l.remote && errors.Is(err, identity.ErrUnavailable):
		return fmt.Errorf("asking the member at %s as %s: %w", l.where, l.who, err)
	case errors.Is(err, identity.ErrUnavailable):
		return cli.Asking("member", l.where, "countersign server run, or countersign dev", err)
	}
	return err
}
