// Package workloadapi serves the SPIFFE Workload API on a Unix socket that every process of the node may
// connect to (SPIFFE Workload Endpoint and SPIFFE Workload API standards).
//
// The callers are not trusted, least of all to be polite: one of them may open connections without end, never
// read what it asked for, or send frames as fast as it can. Nothing here waits for one caller while it holds
// what another needs; what one caller can hold (connections, streams) is counted against it,
// and what it can make the agent do is paid for by reading slower from its own connections. See Limits.
//
// What is served comes from a Source; this package says it in the standard's words.
package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// Source knows the identities. Updates and bundles that it hands out are immutable and may be shared between
// callers. Its errors wrap the identity sentinels: ErrDenied when the workload has no identity, ErrUnavailable
// when nothing can be told yet. All methods return soon after ctx ends.
//
// The first call of attest answers with what this connection's caller showed at the most 30 s ago, now checked to
// be the same process still: it costs next to nothing and serves to find a cached identity. Every further call
// collects evidence anew. What attest returns is the Source's to wipe. An error of attest that wraps
// attestor.ErrPeerChanged is final.
type Source interface {
	// Updates calls send with the full state at once and again on every change, until ctx ends, send fails,
	// or the workload has no identity any more, and says which. It MUST NOT call send concurrently; send never
	// waits for the caller to read.
	Updates(ctx context.Context, attest attestor.Func, send func(*identity.Update) error) error
	// Current is the newest state, once.
	Current(ctx context.Context, attest attestor.Func) (*identity.Update, error)
	// FetchJWT issues or finds JWT-SVIDs for one of the workload's identities, or for all when id is zero. An
	// id that is not the workload's is ErrDenied.
	FetchJWT(ctx context.Context, attest attestor.Func, audience []string, id spiffeid.ID) ([]identity.JWTSVID, error)
}

// Attestor finds out what a caller is. It returns soon after ctx ends, whatever file system the caller may have
// put in its way. Whoever calls it owns the Workload and wipes it.
type Attestor interface {
	Attest(context.Context, *attestor.Peer) (*attestor.Workload, error)
}

// Config of a Server. Path, Source and one of Attestor and Pod are required.
type Config struct {
	// Path of the socket: absolute, at the most 107 bytes. A folder that is not there is made, 0755.
	Path string
	// Mode of the socket; zero means 0777: whoever may reach it may connect, and gets what is its own.
	Mode     os.FileMode
	Source   Source
	Attestor Attestor
	// Pod says who everybody is that connects, at each call, as on a private socket (see Private): the socket is in one pod alone.
	Pod    attestor.Func
	Limits Limits // zero fields mean DefaultLimits
	Log    *slog.Logger
	// Now is the clock against which JWT-SVIDs are validated and evidence ages; nil means time.Now.
	Now func() time.Time
}

// Server is one Workload API socket.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer // WIT-SVID profile: Workload API section 7

	source   Source
	attestor Attestor
	log      *slog.Logger
	now      func() time.Time

	listener *listener
	grpc     *grpc.Server // of this socket and of the private ones
	admit    *admission
	views    views
	// stopping ends every stream; it is not a parent of the calls' contexts, which belong to gRPC.
	stopping context.Context
	stop     context.CancelFunc
	// Only tests change these: there one process plays many callers, and time is short.
	identify                      func(*net.UnixConn) (caller, error)
	handshakeTimeout, callTimeout time.Duration
}

// How long a caller may take, and how much it may send in one piece. All of it is generous: a client that
// meets one of these is broken or hostile.
const (
	maxMessageBytes  = 64 << 10 // 32 audiences of 512 bytes, or one token of 16 KiB, and room
	maxHeaderBytes   = 8 << 10
	streamsPerConn   = 64
	handshakeTimeout = 10 * time.Second // of a connection that sends nothing, or half a preface
	pingAfter        = 2 * time.Minute  // without a word from a client: is it there, and reading?
	pingTimeout      = 20 * time.Second
	idleTimeout      = 30 * time.Minute // of a connection without a stream
	callTimeout      = 30 * time.Second // of a call that is no stream, and of an attestation
	drainTimeout     = 3 * time.Second  // for clients to take their last message when the agent stops
)

// New checks the configuration and binds the socket, so that early callers wait in its queue until Run. Errors
// wrap identity.ErrInvalid, or ErrExists when another process listens there. Close undoes it.
func New(c Config) (*Server, error) {
	if c.Source == nil || (c.Attestor == nil) == (c.Pod == nil) {
		return nil, fmt.Errorf("%w: the Workload API needs a source and an attestor, or the pod that all its callers are of", identity.ErrInvalid)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Mode == 0 {
		c.Mode = 0o777
	}
	limits, err := c.Limits.withDefaults()
	if err != nil {
		return nil, err
	}
	if n := openFiles() / filesPerConn / 2; n < limits.Total.Connections {
		c.Log.Warn("the limit of open files allows fewer Workload API connections than configured", "connections", n, "configured", limits.Total.Connections)
		limits.Total.Connections = n
	}
	socket, err := listen(c.Path, c.Mode)
	if err != nil {
		return nil, err
	}
	s := &Server{source: c.Source, attestor: c.Attestor, log: c.Log, now: c.Now,
		identify: identifyPeer, handshakeTimeout: handshakeTimeout, callTimeout: callTimeout}
	s.admit = newAdmission(limits, c.Log)
	s.listener = &listener{socket: socket, server: s}
	if c.Pod != nil {
		s.listener.own = &Private{server: s, attest: c.Pod, who: "pod", socket: socket}
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	s.grpc = s.grpcServer()
	return s, nil
}

// openFiles is how many descriptors the process may have open.
func openFiles() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 1024
	}
	return int(min(r.Cur, 1<<20))
}

// Run serves until ctx ends, which is no error, or the socket fails. It then ends every stream with
// Unavailable, waits for at most drainTimeout, and closes what a client still holds on to.
func (s *Server) Run(ctx context.Context) error {
	defer s.Close()
	g := s.grpc
	failed := make(chan error, 1)
	go func() { failed <- g.Serve(s.listener) }()
	var err error
	select {
	case err = <-failed:
		err = fmt.Errorf("serving the Workload API on %s: %w", s.listener.socket.path, err)
	case <-ctx.Done():
	}
	s.stop()
	s.admit.closeConns(func(c *conn) bool { return !c.spoken.Load() }) // gRPC would wait for the preface of each
	drained := make(chan struct{})
	go func() { g.GracefulStop(); close(drained) }()
	timer := time.NewTimer(drainTimeout)
	defer timer.Stop()
	select {
	case <-drained:
	case <-timer.C:
		s.admit.closeConns(func(*conn) bool { return true })
		g.Stop()
	}
	return err
}

// Close gives the socket and the private ones back: to be called when Run is not, and harmless after it.
func (s *Server) Close() error {
	s.stop()
	s.grpc.Stop()
	if err := s.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("closing the Workload API socket: %w", err)
	}
	return nil
}

// Address is what clients put into SPIFFE_ENDPOINT_SOCKET (Workload Endpoint section 4).
func (s *Server) Address() string { return "unix://" + filepath.ToSlash(s.listener.socket.path) }

func (s *Server) grpcServer() *grpc.Server {
	g := grpc.NewServer(
		grpc.Creds(peerCredentials{}),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.InTapHandle(tapCall),
		grpc.StreamInterceptor(s.call),
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(streamsPerConn),
		grpc.ConnectionTimeout(s.handshakeTimeout),
		// Windows that do not grow with what a client sends, and small buffers: there may be thousands of
		// connections, and a message is a few KiB.
		grpc.StaticStreamWindowSize(64<<10),
		grpc.StaticConnWindowSize(64<<10),
		grpc.ReadBufferSize(4<<10),
		grpc.WriteBufferSize(8<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingAfter, Timeout: pingTimeout, MaxConnectionIdle: idleTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	g.RegisterService(s.serviceDesc(), s)
	reflection.Register(g) // Workload Endpoint section 7
	return g
}
