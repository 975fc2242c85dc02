// Package server is a member towards the outside: the TLS port that agents, pods and newcomers call, the Unix socket
// that operators use, the decision who gets which SVID, and the pushing of what changes. issue.go is the walk from
// evidence to SVID; rules.go is the one table of who may call what; hub.go finds whom a change concerns.
//
// It knows the replicated state through the interfaces in state.go and does not know how members agree, nor any
// disk: leadership, sealing and membership arrive as functions.
package server

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	adminv1 "countersign.io/countersign/api/admin/v1"
	downstreamv1 "countersign.io/countersign/api/downstream/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

// Config is all that a Server needs. Every field without "0:" or "empty:" in its comment must be set.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	MemberID    string // this member's name
	Version     string
	Level       uint32 // the highest that this version knows, see Admission

	// Agents, Guests, Admins and Candidates are a Listener's; Admin is of ListenAdmin. Without the third and fourth no admin is served
	// but on the socket.
	Agents, Guests, Admins, Candidates, Admin net.Listener
	// AdminRoles are SPIFFE IDs that are admins by this member's configuration, beside those that entries mark.
	AdminRoles map[spiffeid.ID]identity.AdminRole

	CA      *ca.CA
	State   State
	Writes  Writes
	Pods    Pods
	Cluster Cluster

	// Seal seals what is about to be replicated; Open opens an authority's key. Keyring returns the keyring in plain,
	// for other members only; it is the caller's, who clears it once it is sent.
	Seal    func(plaintext, ad []byte) ([]byte, error)
	Open    func(identity.Authority) (crypto.Signer, error)
	Keyring func() ([]byte, error)
	// Sealing is how the data keys change; zero: they do not.
	Sealing Sealing
	// X509Key opens the key of the x509 authority in a KMS or HSM, or makes it, and says where it is; nil: the leader makes a
	// key, which rests sealed.
	X509Key func(ctx context.Context) (key crypto.Signer, uri string, err error)
	// Keep is called with the authorities (their keys sealed) when they have changed, so that this member can show
	// its certificate after a restart, before it has any state.
	Keep func([]identity.Authority) error
	// Degraded says what else of this member somebody should see to, though it issues; nil: nothing.
	Degraded func() []string
	// Backup writes a backup of the state as of the call; nil: this member makes none. It must end when ctx does.
	Backup func(ctx context.Context, w io.Writer) error

	// MaxStaleness is how long this member issues without hearing from a leader; 0: X509TTL.
	MaxStaleness time.Duration
	// X509TTL is the default lifetime of X.509-SVIDs, JWTTTL that of JWT-SVIDs, as the CA has them; 0: the
	// defaults of package identity.
	X509TTL, JWTTTL time.Duration
	// AuthorityTTL and JWTAlgorithm are for authorities that this member makes as a leader; 0: one year; empty: ES256.
	AuthorityTTL time.Duration
	JWTAlgorithm string
	// X509PopRoots verify the certificates of nodes that attest by x509pop; nil: none may. X509PopKubeCluster is
	// the kube cluster whose nodes their common names are; empty: such agents serve no pods.
	X509PopRoots       *x509.CertPool
	X509PopKubeCluster string
	// Upstream is above the x509 authority; nil: there is none, and the leader makes a root. Outside and Authorities are
	// needed for it, and for clusters below; nil: neither.
	Upstream    Upstream
	Outside     Outside
	Authorities AuthorityWriter
	// Rotating is how authorities are replaced; zero: they are not.
	Rotating Rotating
	// IssuedUntil is what KeepIssued was given last, by an earlier process as well: until when something may be live, by the ID of
	// an authority; nil: that is not known. KeepIssued must have it on the disk when it returns; nil: it is not kept.
	IssuedUntil map[string]time.Time
	KeepIssued  func(map[string]time.Time) error
	// Reports asks another member what its agents have and use; nil: a rotation waits for that member for ever.
	Reports Reports
	// PublishAhead is how long a new key of a kind must have been published before it signs, for those who read the keys now and then
	// and do not federate; nil, or 0: nobody does.
	PublishAhead func(identity.AuthorityKind) time.Duration
	// NewX509Key reports whether X509Key opens another key than the one at this URI; nil: it does not.
	NewX509Key func(uri string) bool
	// RootSettle is how long a new root must have been in the bundle before anything is signed below it; 0: twice the bundle's
	// refresh hint.
	RootSettle time.Duration
	// Home is the kube cluster that the members live in; zero: none.
	Home Home
	// Federation is with other trust domains; zero: none.
	Federation Federation
	// SealTerm tells the term that a sealed key was sealed under, for operators; nil: it is not told.
	SealTerm func(sealed []byte) (uint32, bool)

	// Audit remembers every decision, before it takes effect: what it cannot record is not done.
	Audit Audit

	Limits Limits
	Now    func() time.Time // nil: time.Now
	Log    *slog.Logger

	operator func(uid uint32) bool // who may use the Admin socket; nil: root and this process's user
}

// Server is one member's services.
type Server struct {
	cfg    Config
	limits *limits
	turns  chan struct{} // see verify
	// what strangers may cause of log lines: refusals, and faults of ours
	refusals, faults *lineLimit
	requestPrefix    string // of the IDs of calls, and how many there were
	requestCount     atomic.Uint64
	stats            tally
	stopping         chan struct{} // closed when the member stops
	seal             sealTending
	home             homeTending
	orphanAfter      time.Duration // see settleTerm
	backups          chan struct{} // a place for each that is being made
	backupStall      time.Duration

	hub       *hub
	evicted   evictions
	issued    issued
	rotations rotations
	shown     shown
	opened    atomic.Value // string: the prepared authority whose key this member could open; see opens
	startedAt time.Time
	// clusters are the kube clusters that the verifier was given, by name, and their revisions; nil before the first
	clusters atomic.Pointer[map[string]uint64]
	caughtUp atomic.Bool // see Ready

	upstream     upstreamHealth
	upstreamWake chan struct{} // has an element when the leader's loop is to look, see runUpstream
	downstreams  *downstreams
	health       *health.Server
	agents       *grpc.Server
	guests       *grpc.Server
	admin        *grpc.Server // on the socket
	admins       *grpc.Server // on the TLS port
	candidates   *grpc.Server // the same for those who are none
}

// New checks the configuration and starts nothing.
func New(cfg Config) (*Server, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("making the server: %w", err)
	}
	orDefault(&cfg.X509TTL, identity.DefaultX509TTL)
	orDefault(&cfg.JWTTTL, identity.DefaultJWTTL)
	orDefault(&cfg.MaxStaleness, cfg.X509TTL)
	orDefault(&cfg.AuthorityTTL, 365*24*time.Hour)
	orDefault(&cfg.Federation.RefreshHint, identity.DefaultRefreshHint)
	if cfg.JWTAlgorithm == "" {
		cfg.JWTAlgorithm = "ES256"
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.operator == nil {
		cfg.operator = rootOrSelf
	}
	limits, err := newLimits(cfg.Limits)
	if err != nil {
		return nil, fmt.Errorf("making the server: %w", err)
	}
	s := &Server{cfg: cfg, limits: limits, turns: make(chan struct{}, maxTurns), refusals: newLineLimit(), faults: newLineLimit(), seal: newSealTending(), orphanAfter: orphanAfter, backups: make(chan struct{}, maxBackups), backupStall: backupStall, health: health.NewServer()}
	s.requestPrefix, s.stopping = newID()[:10]+"-", make(chan struct{})
	s.upstreamWake = make(chan struct{}, 1)
	s.rotations = rotations{wake: make(chan struct{}, 1), problem: map[identity.AuthorityKind]string{}, waits: map[identity.AuthorityKind]string{}, whole: map[identity.AuthorityKind]whole{}}
	s.startedAt = cfg.Now()
	s.issued.begin(cfg.IssuedUntil, cfg.KeepIssued, s.startedAt)
	if s.downstreams, err = newDownstreams(); err != nil {
		return nil, fmt.Errorf("making the server: %w", err)
	}
	s.hub = newHub(s.matching, cfg.Now)
	s.agents = s.newGRPC(handshaken{}, maxAgentMessage, 256, keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second})
	// Whoever proved nothing gets little memory and little time.
	s.guests = s.newGRPC(handshaken{}, maxGuestMessage, 2, keepalive.ServerParameters{
		MaxConnectionIdle: 10 * time.Second, MaxConnectionAge: time.Minute, MaxConnectionAgeGrace: attestTime, Time: 10 * time.Second, Timeout: 5 * time.Second,
	}, grpc.StatsHandler(wiper{}))
	s.admin = s.newGRPC(localPeer{operator: cfg.operator}, maxAgentMessage, 64, keepalive.ServerParameters{})
	for _, g := range []*grpc.Server{s.agents, s.guests} {
		nodev1.RegisterNodeServer(g, nodeService{Server: s})
		workloadv1.RegisterWorkloadServer(g, workloadService{Server: s})
		memberv1.RegisterMemberServer(g, memberService{Server: s})
		memberv1.RegisterRefreshingServer(g, refreshingService{Server: s})
		downstreamv1.RegisterDownstreamServer(g, downstreamService{Server: s})
		healthv1.RegisterHealthServer(g, healthService{s.health, s.refreshHealth})
	}
	// Connections end now and then, between calls, so that who is no admin any longer is a candidate at the next.
	s.admins = s.newGRPC(handshaken{}, maxAgentMessage, 64, keepalive.ServerParameters{MaxConnectionIdle: time.Minute, MaxConnectionAge: 5 * time.Minute, Time: 30 * time.Second, Timeout: 10 * time.Second})
	s.candidates = s.newGRPC(handshaken{}, maxGuestMessage, 2, keepalive.ServerParameters{
		MaxConnectionIdle: 10 * time.Second, MaxConnectionAge: time.Minute, MaxConnectionAgeGrace: firstFrame, Time: 10 * time.Second, Timeout: 5 * time.Second,
	})
	for _, g := range []*grpc.Server{s.admin, s.admins, s.candidates} {
		adminv1.RegisterAdminServer(g, adminService{Server: s})
		adminv1.RegisterFederationServer(g, federationService{Server: s})
		adminv1.RegisterTrustServer(g, trustService{Server: s})
		adminv1.RegisterMintServer(g, mintService{Server: s})
		adminv1.RegisterCheckupServer(g, checkupService{Server: s})
		adminv1.RegisterPreviewServer(g, previewService{Server: s})
		healthv1.RegisterHealthServer(g, healthService{s.health, s.refreshHealth})
		reflection.Register(g)
	}
	return s, nil
}

const (
	maxAgentMessage = 4 << 20  // 50 requests with the largest tokens and selectors are 2.5 MiB
	maxGuestMessage = 64 << 10 // a token and a key, or a chain of certificates
	// firstFrame is how long a connection has to start speaking HTTP/2.
	firstFrame = 10 * time.Second
	// stopTime is how long calls have to end when the member stops.
	stopTime = 5 * time.Second
)

func (c *Config) check() error {
	var errs []error
	need := func(ok bool, name string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%w: %s is not set", identity.ErrInvalid, name))
		}
	}
	need(!c.TrustDomain.IsZero(), "TrustDomain")
	need(c.MemberID != "", "MemberID")
	need(c.Level > 0, "Level")
	need(c.Agents != nil && c.Guests != nil && c.Admin != nil, "Agents, Guests or Admin")
	need(c.CA != nil, "CA")
	need(c.State.EntryReader != nil && c.State.Registry != nil && c.State.Trust != nil && c.State.Admission != nil, "State")
	w := c.Writes
	need(w.EntryWriter != nil && w.KubeWriter != nil && w.TokenWriter != nil && w.AgentWriter != nil && w.ClusterWriter != nil, "Writes")
	need(c.Pods != nil, "Pods")
	cl := c.Cluster
	need(cl.Staleness != nil && cl.Members != nil && cl.Health != nil && cl.AddMember != nil && cl.RemoveMember != nil && cl.TransferLeader != nil && cl.ReadBarrier != nil, "Cluster")
	need(c.Seal != nil && c.Open != nil && c.Keyring != nil && c.Keep != nil, "Seal, Open, Keyring or Keep")
	need(c.Audit != nil, "Audit")
	need(c.Log != nil, "Log")
	errs = append(errs, c.Sealing.check(), c.checkAdmins(), c.Federation.check(), c.Home.check())
	return errors.Join(errs...)
}

func (s *Server) newGRPC(creds credentials.TransportCredentials, maxMessage int, maxStreams uint32, ka keepalive.ServerParameters, more ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append(more,
		grpc.Creds(creds),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(16<<10),
		grpc.ConnectionTimeout(firstFrame),
		grpc.KeepaliveParams(ka),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		// A connection is one agent, idle nearly always.
		grpc.ReadBufferSize(4<<10),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	)...)
}

// Run serves until ctx ends or a part fails, then lets calls end. It runs Pods and CA too, which nobody else
// may; the Listener has a Run of its own.
func (s *Server) Run(ctx context.Context) error {
	if err := s.issued.save(); err != nil {
		return fmt.Errorf("saving until when what this member signed lasts: %w", err)
	}
	told := ctx // ends first: a listener that its owner closes at the same moment is no fault
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ended(told, s.cfg.State.Watch(ctx, s.changed)) })
	g.Go(func() error {
		return ended(told, s.cfg.Pods.Run(ctx, kube.Events{Gone: s.hub.podGone, Changed: s.hub.podChanged}))
	})
	g.Go(func() error { return ended(told, s.cfg.CA.Run(ctx)) })
	g.Go(func() error { return s.watchReady(ctx) })
	if s.cfg.Sealing.on() {
		g.Go(func() error { return s.tendSeal(ctx) })
	}
	for _, x := range []struct {
		srv *grpc.Server
		on  net.Listener
	}{{s.agents, s.cfg.Agents}, {s.guests, s.cfg.Guests}, {s.admin, s.cfg.Admin}, {s.admins, s.cfg.Admins}, {s.candidates, s.cfg.Candidates}} {
		if x.on == nil {
			continue
		}
		g.Go(func() error { return ended(told, x.srv.Serve(x.on)) })
	}
	g.Go(func() error {
		<-ctx.Done()
		s.stop()
		return nil
	})
	return g.Wait()
}

// stop ends the streams first, so that agents turn to another member while calls still end well here.
func (s *Server) stop() {
	close(s.stopping)
	s.health.Shutdown()
	s.hub.endAll(fmt.Errorf("%w: this member is stopping: use another", identity.ErrUnavailable), true)
	s.downstreams.stop()
	var g errgroup.Group
	for _, srv := range []*grpc.Server{s.agents, s.guests, s.admin, s.admins, s.candidates} {
		g.Go(func() error {
			t := time.AfterFunc(stopTime, srv.Stop)
			defer t.Stop()
			srv.GracefulStop()
			return nil
		})
	}
	g.Wait()
}

// ended is nil for what ended because it was to end.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	if err == nil {
		return errors.New("a part of the server ended by itself")
	}
	return err
}

// changed takes up changes of the state, in order. What verifies and signs comes before those who will ask.
func (s *Server) changed(changes []identity.Change) {
	var reset, banned, bundle, clusters, rotation, facts bool
	if slices.ContainsFunc(changes, concernsSeal) {
		s.seal.wake()
	}
	for _, c := range changes {
		reset = reset || c.Reset
		bundle = bundle || c.Bundle || c.Reset
		rotation = rotation || c.Rotation
		if c.NewEntry != nil {
			s.issued.lasts(c.NewEntry)
		}
		if c.AgentGone && c.Agent != nil {
			s.evicted.add(c.Agent.ID, s.cfg.Now())
		}
		facts = facts || c.Reset || namesFacts(c.OldEntry) || namesFacts(c.NewEntry)
		banned = banned || c.AgentGone
		clusters = clusters || c.KubeCluster != "" || c.Reset
	}
	if reset {
		s.scanTTLs()
	}
	if bundle || rotation {
		s.rotations.poke()
	}
	if bundle {
		s.takeAuthorities()
		s.wakeUpstream()
		s.downstreams.changed()
	}
	if clusters {
		s.takeClusters()
	}
	if facts {
		s.cfg.Pods.SetInterest(s.cfg.State.Interests())
	}
	if reset || clusters || banned { // a cluster may have taken the agents' account off its list; a ban is also that of the node's pods
		s.hub.endIf(s.agentGone)
	}
	s.federationChanged(changes)
	s.hub.apply(changes)
	s.noteChanges(changes)
	s.noteFederations(changes)
}

// takeClusters gives the verifier the registered kube clusters.
func (s *Server) takeClusters() {
	all := s.cfg.State.KubeClusters()
	if err := s.cfg.Pods.SetClusters(all); err != nil {
		s.cfg.Log.Error("a kube cluster cannot be used as registered", "error", err)
	}
	taken := make(map[string]uint64, len(all))
	for _, k := range all {
		taken[k.Name] = k.Revision
	}
	s.clusters.Store(&taken)
}

// verifierCurrent reports whether the verifier has what the state has. The state is read before its watchers hear of it, at a
// start by far: a token must not be refused for a cluster that is only about to be known, for a refusal ends an identity.
func (s *Server) verifierCurrent() bool {
	taken := s.clusters.Load()
	all := s.cfg.State.KubeClusters()
	if taken == nil || len(all) != len(*taken) {
		return false
	}
	for _, k := range all {
		if rev, ok := (*taken)[k.Name]; !ok || rev != k.Revision {
			return false
		}
	}
	return true
}

// takeAuthorities gives the CA the authorities to sign with. A state without any is one that is still being
// rebuilt: what the CA has, from before the restart, is newer.
func (s *Server) takeAuthorities() {
	all := s.cfg.State.Authorities()
	if len(all) == 0 {
		return
	}
	if err := s.cfg.CA.SetAuthorities(all, s.cfg.Open); err != nil {
		s.cfg.Log.Error("cannot use the authorities", "error", err)
		return
	}
	if err := s.cfg.Keep(all); err != nil {
		s.cfg.Log.Error("cannot keep the authorities for the next start", "error", err)
	}
}

func (s *Server) agentGone(id string) error {
	if isPodID(id) {
		return s.podRefused(id)
	}
	a, ok := s.cfg.State.Agent(id)
	if !ok {
		a = &identity.Agent{ID: id}
	}
	if !ok || a.Banned {
		return goneError(a)
	}
	return s.accountAllowed(a)
}
