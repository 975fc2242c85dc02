// Package agent is a node's side of Countersign: it proves its node and keeps its own SVID, holds one mTLS
// connection to a member of the CA cluster with one Sync stream on it, and keeps SVIDs for the workloads that ask.
// It makes their keys, asks a member with fresh evidence, verifies every answer, renews at half-life while a caller
// lives, and hands out what it holds (it is the Source of package workloadapi).
//
// What it trusts: the newest bundle it has seen, and before the first one a CA pin or a given bundle. It takes
// nothing from a member on its word alone: an SVID must be for the key it made, of the trust domain, and chain to the bundle.
//
// When the members are away, SVIDs are served until they expire: to a pod's process as long as it shows a token that a member has
// verified (see cacheKey). Three things end one sooner: a member says that the
// pod is gone or denies the identity; every reachable member refuses the agent itself; or a member has said that
// the entries changed and no member confirms the identity within changedGrace. From the moment of such a
// change the old SVIDs are handed to no new caller.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"

	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

const (
	attemptTimeout    = 3 * time.Second        // to connect to one member and get its state: in the first round (see patience)
	mostPatience      = 24 * time.Second       // for that, after some rounds in vain
	stagger           = 250 * time.Millisecond // before the next member is tried beside one that does not answer
	retryAddress      = time.Second            // before a member that failed is tried again while others have not answered yet
	callTimeout       = 5 * time.Second        // one RPC
	attestNodeTimeout = 30 * time.Second       // to attest this node at one member, which may wait for a leader
	probeAfter        = 300 * time.Millisecond // a call that takes longer has its member probed
	probeTimeout      = 500 * time.Millisecond
	probeEvery        = time.Second
	callTries         = 3                      // members that one call is tried at
	issueWorkers      = 4                      // IssueX509 calls in flight for pods, and for processes
	renewWorkers      = 32                     // workloads being attested anew at once
	attestTimeout     = 5 * time.Second        // to attest one workload anew
	freshWait         = time.Second            // how long a caller waits for a newer SVID than a live one past half-life
	changedGrace      = 10 * time.Second       // see the package comment
	changedRetry      = 200 * time.Millisecond // between questions during the grace
	blameFor          = time.Minute            // a member that failed is tried after the others
	maxBackoff        = 10 * time.Second       // between rounds over the members
	provenAfter       = time.Second            // a session that lasted so long worked: its end is no reason to wait before the next member
	maxJWTs           = 4096                   // cached answers
)

// Config is what an agent needs. Servers, Credential and one of Pin, Bundle and Roots are mandatory.
type Config struct {
	// TrustDomain: zero takes that of the first member that Pin or Bundle vouches for.
	TrustDomain spiffeid.TrustDomain
	// Servers are members, host:port; the others are learnt.
	Servers    []string
	Credential Credential
	// Pod reads the service account token of the one pod that is served, in place of Credential: there is no node's agent then, and the
	// pod asks for itself, without a certificate. It is read at each connection. TrustDomain is needed, StateDir is not for it.
	Pod func() ([]byte, error)
	// Pin is sha256:HEX of the root's SubjectPublicKeyInfo: what verifies a member at first contact. Bundle does so too.
	Pin    string
	Bundle *identity.Bundle
	// Roots reads the trust domain's X.509 authorities (DER) from where they are published to this node, anew at each first contact,
	// beside Pin and Bundle; nil: nothing is published.
	Roots func() ([][]byte, error)
	// StateDir keeps live SVIDs and their keys over a restart. It must be on a tmpfs, and nobody else's; empty: none.
	StateDir string
	KeyType  KeyType // of workloads' keys; empty: KeyP256
	KubeNode string  // told to members, informational
	Version  string  // told to members, informational
	Log      *slog.Logger
	// Dial opens a connection to a member; nil: TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
}

// Agent is a node agent. Its methods may be called at any time; callers who want an identity wait for Run.
type Agent struct {
	cfg   Config
	log   *slog.Logger
	state *stateDir // nil without one

	trust   atomic.Pointer[trust]    // nil until the first bundle
	own     atomic.Pointer[ownSVID]  // nil until attested
	members atomic.Pointer[[]string] // as pushed; nil until then
	trustMu sync.Mutex               // serialises replacing trust
	anew    atomic.Bool              // of a pod: members are to be verified as at first contact, see podContact

	link  link
	cache cache
	burst burst
	// What waits for an SVID: pods, whose tokens a member may have to ask a slow API server about, and apart from them processes.
	pods, processes issueQueue
	jwts            *lru.Cache[jwtKey, jwtAnswer]
	jwtGo           singleflight.Group
	jwtsIssued      atomic.Uint64
	keygen          chan struct{} // bounds the keys being made at once
	usesLost        bool          // of runPersister: something that was handed out could not be written
	ownSooner       chan struct{} // cap 1: the agent's own SVID is to be renewed sooner than it was
	loaded          chan struct{} // closed once the state dir has been read: callers wait for it
}

// New checks the configuration and starts nothing. Every fault is in the error.
func New(cfg Config) (*Agent, error) {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{identity.ErrInvalid}, args...)...))
	}
	if len(cfg.Servers) == 0 {
		bad("no servers: give at least one member's host:port")
	}
	for _, s := range cfg.Servers {
		if _, _, err := net.SplitHostPort(s); err != nil {
			bad("server %q: want host:port: %v", s, err)
		}
	}
	switch {
	case cfg.Pod != nil && (cfg.Credential != nil || cfg.StateDir != "" || cfg.TrustDomain.IsZero()):
		bad("a pod that asks for itself has a trust domain, and neither another credential nor a state folder")
	case cfg.Credential == nil && cfg.Pod == nil:
		bad("no credential: give a join token, a Kubernetes token or a certificate")
	}
	if cfg.KeyType == "" {
		cfg.KeyType = KeyP256
	}
	errs = append(errs, cfg.KeyType.check())
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &Agent{cfg: cfg, log: cfg.Log, keygen: make(chan struct{}, keysAtOnce()), loaded: make(chan struct{}), ownSooner: make(chan struct{}, 1)}
	if err := a.firstTrust(); err != nil {
		errs = append(errs, err)
	}
	if cfg.StateDir != "" {
		dir, err := openStateDir(cfg.StateDir, durable.OnMemory)
		if err != nil {
			errs = append(errs, err)
		}
		a.state = dir
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configuring the agent: %w", err)
	}
	var err error
	if a.jwts, err = lru.New[jwtKey, jwtAnswer](maxJWTs); err != nil {
		return nil, fmt.Errorf("configuring the agent: %w", err)
	}
	a.link.init()
	a.cache.init(a.state != nil)
	a.burst.init()
	a.pods.init()
	a.processes.init()
	return a, nil
}

// firstTrust checks what verifies members at first contact.
func (a *Agent) firstTrust() error {
	if a.cfg.Pin == "" && a.cfg.Bundle == nil && a.cfg.Roots == nil {
		return fmt.Errorf("%w: nothing to verify members by: give a CA pin or a bundle", identity.ErrInvalid)
	}
	if a.cfg.Pin != "" {
		if err := node.CheckPin(a.cfg.Pin); err != nil {
			return err
		}
	}
	if b := a.cfg.Bundle; b != nil {
		if a.cfg.TrustDomain.IsZero() {
			a.cfg.TrustDomain = b.TrustDomain
		}
		t, err := newTrust(nil, a.cfg.TrustDomain, b, nil)
		if err != nil {
			return err
		}
		a.trust.Store(t)
	}
	return nil
}

// Run does the agent's work until ctx ends; it is called once. It returns nil then, or at once an error that no waiting would mend: the state
// dir cannot be used, or a join token was refused and there is nothing to serve.
func (a *Agent) Run(ctx context.Context) error {
	if a.state != nil {
		unlock, err := a.state.lock()
		if err != nil {
			return fmt.Errorf("running the agent: %w", err)
		}
		defer unlock.Close()
		a.restore(time.Now())
	} else {
		a.cache.forget(time.Now())
	}
	close(a.loaded)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.runLink(ctx) })
	g.Go(func() error { return a.runTimers(ctx) })
	g.Go(func() error { return a.runSettler(ctx) })
	for range issueWorkers {
		g.Go(func() error { return a.runIssuer(ctx, &a.pods) })
		g.Go(func() error { return a.runIssuer(ctx, &a.processes) })
	}
	if a.state != nil {
		g.Go(func() error { return a.runPersister(ctx) })
	}
	err := g.Wait()
	stopped := fmt.Errorf("%w: the agent is stopping", identity.ErrUnavailable)
	a.link.down(stopped)
	for _, r := range slices.Concat(a.pods.stop(), a.processes.stop()) {
		a.finish(r, nil, stopped)
	}
	if a.state != nil {
		a.persistDirty() // before the streams end: what is live now is what a restart should find
	}
	a.cache.endStreams(stopped)
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("running the agent: %w", err)
	}
	return nil
}

// Status is what an operator may want to know.
type Status struct {
	ID             string    `json:"id"` // the agent's own SPIFFE ID; empty until attested
	ExpiresAt      time.Time `json:"expires_at,omitzero"`
	Member         string    `json:"member"` // address of the member it is connected to; empty: none
	Problem        string    `json:"problem,omitempty"`
	Revision       uint64    `json:"revision"` // of the last push
	BundleSequence uint64    `json:"bundle_sequence"`
	Workloads      int       `json:"workloads"` // with an identity in the cache
	Streams        int       `json:"streams"`
	Stats
}

// Stats are numbers for whoever watches many agents.
type Stats struct {
	SVIDs         int       `json:"svids"`                 // held for workloads
	FirstExpiry   time.Time `json:"first_expiry,omitzero"` // of those
	LastContact   time.Time `json:"last_contact,omitzero"` // when a member was last connected; now, if one is
	X509Issued    uint64    `json:"x509_issued"`           // to this agent for workloads, since it started
	JWTIssued     uint64    `json:"jwt_issued"`
	Renewed       uint64    `json:"renewed"`        // workloads that were given newer SVIDs
	Denied        uint64    `json:"denied"`         // questions about workloads to which a member said no
	Failed        uint64    `json:"failed"`         // that no member answered, for workloads without an SVID
	RenewalFailed uint64    `json:"renewal_failed"` // the same, for workloads that have one still
}

// Status reports the agent's state.
func (a *Agent) Status() Status {
	var s Status
	if o := a.own.Load(); o != nil {
		s.ID, s.ExpiresAt = o.id.String(), o.notAfter
	}
	if t := a.trust.Load(); t != nil {
		s.BundleSequence = t.own.Sequence
	}
	s.Member, s.Revision = a.link.status()
	s.Workloads, s.Streams = a.cache.counts()
	s.Stats = a.cache.stats()
	s.JWTIssued, s.LastContact = a.jwtsIssued.Load(), a.link.lastContact(time.Now())
	if err := a.Ready(); err != nil {
		s.Problem = err.Error()
	}
	return s
}

// Ready is nil while new SVIDs can be had: the agent's own SVID is live and a member is connected. Otherwise it says
// why not; live SVIDs are served all the same.
func (a *Agent) Ready() error {
	if a.cfg.Pod != nil {
		return a.link.why()
	}
	if o := a.own.Load(); o == nil || !time.Now().Before(o.notAfter) {
		if err := a.link.why(); err != nil {
			return err
		}
		return fmt.Errorf("%w: the agent has no live SVID of its own yet", identity.ErrUnavailable)
	}
	return a.link.why()
}
