package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
	"countersign.io/countersign/seal"
	"countersign.io/countersign/server"
	"countersign.io/countersign/store"
)

func serverCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "server", Short: "Run a member of the CA cluster"}
	var file string
	run := &cobra.Command{
		Use: "run -c FILE", Short: "Run a member until it is interrupted", Args: cobra.NoArgs,
		Long: `Run a member until it is interrupted. With an empty data folder it joins the cluster of its join token, or, without one,
begins a new cluster. docs/CONFIG.md lists the settings.`,
		Example: `  countersign server run -c /etc/countersign/server.yaml

  # server.yaml
  version: 1
  trust_domain: example.org
  advertise: ca-1.example.org:8443
  # on all but the first, from "countersign token create --server":
  # join_token_file: /etc/countersign/join`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			return runMember(cmd.Context(), c, cli.Logger(cmd.ErrOrStderr(), c.Log), nil)
		},
	}
	run.Flags().StringVarP(&file, "config", "c", "/etc/countersign/server.yaml", "configuration file")
	cmd.AddCommand(run)
	return cmd
}

// member is one member's parts, in the order in which they are made; Close undoes them in reverse.
type member struct {
	c       *config.Server
	log     *slog.Logger
	td      spiffeid.TrustDomain
	tcp     net.Listener
	health  net.Listener
	home    *kube.Home // nil: none is configured
	rival   chan error // another cluster was begun in this one's place
	data    *dataDir
	cached  *identity.Bundle // of the last run, until the state knows better
	store   *store.Store
	ca      *ca.CA
	pods    *kube.Verifier
	audit   *audit.Log
	tls     server.TLSConfig
	port    *server.Listener
	admin   net.Listener
	node    *raft.Node
	server  *server.Server
	public  public
	backups *schedule // nil: none are configured
	closers []io.Closer

	hooks    hooks
	tap      func(net.Conn) net.Conn // a test's ear inside TLS, at every connection of raft's; nil but there
	started  time.Time
	popRoots *x509.CertPool
	serving  atomic.Pointer[server.Server] // set once there is one: health is asked for before
	forming  atomic.Pointer[former]        // while it looks for its cluster
}

// runMember runs a member until ctx ends. ready, if not nil, is called once it can issue.
func runMember(ctx context.Context, c *config.Server, log *slog.Logger, ready func()) error {
	return newMember(c, log).serve(ctx, ready)
}

func newMember(c *config.Server, log *slog.Logger) *member {
	return &member{c: c, log: log, hooks: newHooks(), started: time.Now(), rival: make(chan error, 1)}
}

func (m *member) serve(ctx context.Context, ready func()) (err error) {
	c, log := m.c, m.log
	defer func() {
		for i := len(m.closers) - 1; i >= 0; i-- {
			err = errors.Join(err, m.closers[i].Close())
		}
	}()
	if err := m.listen(); err != nil {
		return err
	}
	// Joining, and replaying a long log, take their time: the member is live meanwhile, and says that it is not ready.
	numbers, err := m.metrics()
	if err != nil {
		return err
	}
	m.run(ctx, func(ctx context.Context) error { return cli.ServeHealth(ctx, m.health, m.ready, numbers, m.notes) })
	if err := m.open(ctx); err != nil {
		return err
	}
	// The port serves the others before raft starts, and until it has ended: they need it to agree that we leave.
	m.run(context.WithoutCancel(ctx), m.port.Run)
	if err := m.replicate(ctx); err != nil {
		return err
	}
	if err := m.alone(ctx); err != nil {
		return err
	}
	m.runPublic(context.WithoutCancel(ctx))
	m.serving.Store(m.server)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.server.Run(ctx) })
	g.Go(func() error { return m.store.Run(ctx) })
	g.Go(func() error { return m.node.Run(ctx) })
	g.Go(func() error {
		m.node.Leadership(ctx, func(ctx context.Context) {
			done := make(chan struct{})
			go func() { defer close(done); m.control(ctx) }()
			defer func() { <-done }()
			if err := m.server.RunLeader(ctx); err != nil {
				log.Error("the leader's work ended", "error", err)
			}
		})
		return nil
	})
	g.Go(func() error {
		select {
		case err := <-m.rival:
			return err
		case <-ctx.Done():
			return nil
		}
	})
	if m.backups != nil {
		g.Go(func() error { return m.backups.Run(ctx) })
	}
	if ready != nil {
		g.Go(func() error { return m.whenReady(ctx, ready) })
	}
	log.Info("member started", "name", c.Name, "trust_domain", c.TrustDomain, "address", m.port.Addr().String(), "version", version)
	return g.Wait()
}

type closerFunc func() error

func (f closerFunc) Close() error { return f() }

// run runs f until ctx ends or the member closes.
func (m *member) run(ctx context.Context, f func(context.Context) error) {
	ctx, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	m.closers = append(m.closers, closerFunc(func() error { stop(); return <-done }))
}

// ready says why the member cannot issue now; nil if it can.
func (m *member) ready() error {
	if s := m.serving.Load(); s != nil {
		return s.Ready()
	}
	if why := m.forming.Load(); why != nil {
		if text := (*why).why.Load(); text != nil {
			return fmt.Errorf("%w: this member is looking for its cluster: %s", identity.ErrUnavailable, *text)
		}
	}
	return fmt.Errorf("%w: this member is starting", identity.ErrUnavailable)
}

// listen takes what this machine has one of: what is in use, or missing, is said before anything is changed or a join
// token spent.
func (m *member) listen() error {
	c := m.c
	var err error
	if c.X509Pop.CAFile != "" {
		if m.popRoots, err = rootsIn("x509pop.ca_file", c.X509Pop.CAFile); err != nil {
			return err
		}
	}
	if m.tcp, err = net.Listen("tcp", c.Listen); err != nil {
		return fmt.Errorf("listening (listen: %s): %w: end what uses the port, or name another", c.Listen, err)
	}
	m.closers = append(m.closers, ignoreClosed(m.tcp))
	if m.health, err = net.Listen("tcp", c.Health); err != nil {
		return fmt.Errorf("listening for health (health: %s): %w: end what uses the port, or name another", c.Health, err)
	}
	m.closers = append(m.closers, ignoreClosed(m.health))
	if err := os.MkdirAll(filepath.Dir(c.AdminSocket), 0o755); err != nil {
		return fmt.Errorf("making the folder of admin_socket: %w", err)
	}
	if m.admin, err = server.ListenAdmin(c.AdminSocket); err != nil {
		return err
	}
	m.closers = append(m.closers, ignoreClosed(m.admin))
	return m.listenPublic()
}

// open makes everything that needs no other member but for joining.
func (m *member) open(ctx context.Context) error {
	c := m.c
	var err error
	if m.home, err = m.newHome(); err != nil {
		return err
	}
	var f *former
	if c.Kubernetes.Forms() {
		if f, err = newFormer(c, m.home, m.log); err != nil {
			return err
		}
		m.forming.Store(f)
	}
	if m.data, err = openDataDir(ctx, c, f); err != nil {
		return err
	}
	m.forming.Store(nil)
	m.closers = append(m.closers, m.data)
	m.td = m.data.td
	if m.store, err = store.Open(store.Config{Dir: m.data.file("state"), TrustDomain: m.td, Log: m.log}); err != nil {
		return err
	}
	m.closers = append(m.closers, m.store)
	if m.ca, err = ca.New(ca.Config{TrustDomain: m.td, MemberName: c.Name, X509TTL: c.X509TTL, JWTTTL: c.JWTTTL, JWTIssuer: c.OIDC.Issuer, Now: m.hooks.now, Log: m.log}); err != nil {
		return err
	}
	if err := m.openAudit(); err != nil {
		return err
	}
	m.run(context.WithoutCancel(ctx), m.audit.Run) // it outlives what is recorded in it
	if err := m.lastAuthorities(); err != nil {
		return err
	}
	if m.pods, err = kube.New(kube.Config{Log: m.log, Now: m.hooks.now}); err != nil {
		return err
	}
	m.tls = server.TLSConfig{TrustDomain: m.td, Certificate: m.ca.MemberCertificate, Bundle: m.bundle, Authorities: m.store.Authorities, Now: m.hooks.now}
	m.port, err = server.NewListener(server.ListenConfig{TCP: m.tcp, TLS: server.ServerTLS(m.tls), Downstream: m.isDownstream, Admin: m.isAdmin, Log: m.log})
	return err
}

// lastAuthorities makes the CA able to show this member's certificate before there is any state.
func (m *member) lastAuthorities() error {
	authorities, err := m.data.loadAuthorities()
	if err != nil || len(authorities) == 0 {
		return err
	}
	m.cached = &identity.Bundle{TrustDomain: m.td, JWT: map[string][]byte{}}
	for _, a := range authorities {
		if a.Kind == identity.AuthorityX509 && a.State.Vouched() {
			m.cached.X509 = append(m.cached.X509, rootsOf(&a)...)
		}
	}
	if err := m.ca.SetAuthorities(authorities, m.openKey); err != nil {
		return fmt.Errorf("using the authorities of the last run: %w", err)
	}
	return nil
}

// bundle is what other members' and agents' certificates are verified against.
func (m *member) bundle() *identity.Bundle {
	if b := m.store.Bundle(); b != nil && len(b.X509) > 0 {
		return b
	}
	return m.cached
}

// openKey opens an authority's key: the sealed one, or one that is elsewhere.
func (m *member) openKey(a identity.Authority) (crypto.Signer, error) {
	if a.KeyURI != "" {
		return m.openKeyAt(a)
	}
	der, err := m.data.keyring.Open(a.SealedKey, identity.AuthorityAD(m.td, a.Kind, a.ID))
	if err != nil {
		return nil, fmt.Errorf("opening the key of %s authority %s: %w", a.Kind, a.ID, err)
	}
	defer clear(der)
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parsing the key of %s authority %s: %w", a.Kind, a.ID, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("the key of %s authority %s cannot sign", a.Kind, a.ID)
	}
	return signer, nil
}

// replicate starts raft, and makes what writes through it.
func (m *member) replicate(ctx context.Context) error {
	c := m.c
	var err error
	m.node, err = raft.Open(raft.Config{
		ID: c.Name, Address: c.Advertise, Dir: m.data.file("raft"), Machine: m.store, Listener: m.port.Raft(), Dial: m.dial,
		Peer: func(c net.Conn) string { return server.PeerMember(m.td, c) }, Info: m.info, Check: store.Check,
		Peers: c.Cluster.Peers, RemoveDeadAfter: max(0, c.Cluster.RemoveDeadAfter), Bootstrap: m.data.member.Bootstrap, Log: m.log,
		SnapshotThreshold: m.hooks.snapshotThreshold, SnapshotInterval: m.hooks.snapshotInterval, TrailingLogs: m.hooks.trailingLogs,
	})
	if err != nil {
		return err
	}
	m.closers = append(m.closers, m.node)
	up, err := m.upstream(ctx)
	if err != nil {
		return err
	}
	w := m.store.Writer(m.node)
	fed, err := m.federation(w)
	if err != nil {
		return err
	}
	m.server, err = server.New(server.Config{
		TrustDomain: m.td, MemberID: c.Name, Version: version, Level: store.Level,
		Agents: m.port.Agents(), Guests: m.port.Guests(), Admins: m.port.Admins(), Candidates: m.port.Candidates(), Admin: m.admin, AdminRoles: m.adminRoles(),
		CA: m.ca, State: server.State{EntryReader: m.store, Registry: m.store, Trust: m.store, Admission: m.store},
		Writes:  server.Writes{EntryWriter: w, KubeWriter: w, TokenWriter: w, AgentWriter: w, ClusterWriter: w},
		Pods:    m.pods,
		Cluster: m.cluster(),
		Seal:    m.data.keyring.Seal, Open: m.openKey, Keyring: func() ([]byte, error) { return m.data.keyring.Plain(), nil }, Keep: m.data.saveAuthorities,
		Upstream: up, Outside: m.store, Authorities: w, SealTerm: seal.TermOf,
		IssuedUntil: m.issuedUntil(), KeepIssued: m.data.saveIssued,
		Rotating: m.rotating(w), Reports: m.askReport, NewX509Key: m.newX509Key(), PublishAhead: m.publishAhead,
		Home: m.homeConfig(), Federation: fed, Sealing: m.sealing(w), X509Key: m.x509Key(), Backup: m.saveBackup, Degraded: m.degraded,
		MaxStaleness: c.MaxStaleness, X509TTL: c.X509TTL, JWTTTL: c.JWTTTL, AuthorityTTL: c.CA.TTL, JWTAlgorithm: c.CA.JWTAlgorithm,
		X509PopRoots: m.popRoots, X509PopKubeCluster: c.X509Pop.KubeCluster,
		Audit: m.audit, Now: m.hooks.now, Log: m.log,
	})
	if b := c.Backup; b.Dir != "" {
		m.backups = newSchedule(b.Dir, c.Name, b.Every, b.Keep, m.saveBackup, m.recordBackup, m.log)
	}
	return err
}

// whenReady calls ready once the member can issue.
func (m *member) whenReady(ctx context.Context, ready func()) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for m.server.Ready() != nil {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	ready()
	return nil
}

// rootsIn reads the PEM certificates of a setting's file.
func rootsIn(field, path string) (*x509.CertPool, error) {
	raw, err := readInput(path)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", field, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("%w: %s %s holds no PEM certificate", identity.ErrInvalid, field, path)
	}
	return pool, nil
}

// ignoreClosed closes a listener that its user may have closed already.
func ignoreClosed(l net.Listener) io.Closer {
	var once sync.Once
	return closerFunc(func() (err error) {
		once.Do(func() {
			if err = l.Close(); errors.Is(err, net.ErrClosed) {
				err = nil
			}
		})
		return err
	})
}
