package server

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"countersign.io/countersign/api"
	downstreamv1 "countersign.io/countersign/api/downstream/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

const (
	// maxDownstreamKeys is how many JWT keys a cluster below may have in our bundle: two while one is rotated.
	maxDownstreamKeys = 16
	maxKeyID          = 128 // bytes
	// maxForeignKeyLife is how long a key of a cluster below can stay in the bundle without being told again.
	maxForeignKeyLife = 400 * 24 * time.Hour
	// downstreamRate is how many calls a second one downstream identity may make, downstreamBurst how many at once.
	downstreamRate, downstreamBurst = 1, 20
	// maxDownstreamStreams bounds the Sync streams of one downstream identity: one for each member that led.
	maxDownstreamStreams = 16
	// downstreamLook is how often a Sync stream looks whether it may go on.
	downstreamLook = time.Second
)

// downstreamService serves CA clusters below ours.
type downstreamService struct {
	downstreamv1.UnimplementedDownstreamServer
	*Server
}

// downstreams are what the calls of the clusters below share.
type downstreams struct {
	rates *lru.Cache[string, *rate.Limiter] // by SPIFFE ID

	mu      sync.Mutex
	streams map[string]int          // open Sync streams by SPIFFE ID
	told    map[string]clusterBelow // what each said last, by SPIFFE ID
	bundle  chan struct{}           // closed and replaced when the bundle may have changed
	stopped bool
}

func newDownstreams() (*downstreams, error) {
	rates, err := lru.New[string, *rate.Limiter](1024)
	if err != nil {
		return nil, err
	}
	return &downstreams{rates: rates, streams: map[string]int{}, told: map[string]clusterBelow{}, bundle: make(chan struct{})}, nil
}

// clusterBelow is what a cluster below says of the bundle from here.
type clusterBelow struct {
	at       time.Time
	sequence uint64 // that everyone in it has
	tells    bool
	uses     []string // IDs of the authorities here that anything live in it is under
}

func (d *downstreams) tell(id string, b clusterBelow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.told[id] = b
}

// parties lists the clusters below that this member knows of.
func (d *downstreams) parties(authority string) []party {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]party, 0, len(d.told))
	for id, b := range d.told {
		p := party{id: id, connected: d.streams[id] > 0, seen: b.at, sequence: b.sequence, tells: b.tells}
		if slices.Contains(b.uses, authority) {
			p.svids = 1
		}
		out = append(out, p)
	}
	return out
}

// changed wakes the streams.
func (d *downstreams) changed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.bundle)
	d.bundle = make(chan struct{})
}

// stop makes the streams end.
func (d *downstreams) stop() {
	d.mu.Lock()
	d.stopped = true
	d.mu.Unlock()
	d.changed()
}

func (d *downstreams) wait() (<-chan struct{}, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bundle, d.stopped
}

func (d *downstreams) open(id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams[id] >= maxDownstreamStreams {
		return fmt.Errorf("%w: %s has %d streams here already", identity.ErrExhausted, id, maxDownstreamStreams)
	}
	d.streams[id]++
	return nil
}

func (d *downstreams) close(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams[id]--; d.streams[id] == 0 {
		delete(d.streams, id)
	}
}

// downstreamEntry is the entry by which the caller may have an authority below ours. The rule table has let workloads
// only as far as this.
func (s *Server) downstreamEntry(who caller) (*identity.Entry, error) {
	if who.kind != workload {
		return nil, fmt.Errorf("%w: an authority below ours is for a workload with a downstream entry, not for %s", identity.ErrDenied, who.kind)
	}
	now := s.cfg.Now()
	if !now.Before(who.expires) {
		return nil, fmt.Errorf("%w: the SVID that this connection was made with has expired: connect anew with a renewed one", identity.ErrUnauthenticated)
	}
	if s.cfg.Outside == nil || s.cfg.Authorities == nil {
		return nil, fmt.Errorf("%w: this member has no clusters below", identity.ErrPrecondition)
	}
	e, ok := s.cfg.Outside.Downstream(who.id.String())
	if !ok || e.Expired(now) {
		return nil, fmt.Errorf("%w: no entry marks %s as downstream: countersign entry create --downstream --spiffe-id %s", identity.ErrDenied, who.id, who.id)
	}
	return e, nil
}

func (s *Server) allowDownstream(who caller) (*identity.Entry, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	e, err := s.downstreamEntry(who)
	if err != nil {
		return nil, err
	}
	id := who.id.String()
	own, ok := s.downstreams.rates.Get(id)
	if !ok {
		own = rate.NewLimiter(downstreamRate, downstreamBurst)
		if prev, ok, _ := s.downstreams.rates.PeekOrAdd(id, own); ok {
			own = prev
		}
	}
	if !own.Allow() {
		return nil, fmt.Errorf("%w: too many calls of %s: at the most %d a second", identity.ErrExhausted, id, downstreamRate)
	}
	return e, nil
}

// Sign signs the authority of a cluster below.
func (s downstreamService) Sign(ctx context.Context, req *downstreamv1.SignRequest) (*downstreamv1.SignResponse, error) {
	who := callOf(ctx)
	e, err := s.allowDownstream(who.caller)
	if err != nil {
		return nil, err
	}
	key, err := ca.ParsePublicKey(req.PublicKey)
	if err != nil {
		return nil, err
	}
	if req.TtlSeconds < 0 {
		return nil, fmt.Errorf("%w: a TTL of %d seconds", identity.ErrInvalid, req.TtlSeconds)
	}
	ttl := ca.MaxDownstreamTTL
	if req.TtlSeconds < int64(ttl/time.Second) { // in seconds, where nothing overflows
		ttl = time.Duration(req.TtlSeconds) * time.Second
	}
	// An entry that ends takes along what it allowed, as with an SVID.
	if !e.ExpiresAt.IsZero() {
		if ttl == 0 {
			ttl = ca.DefaultDownstreamTTL
		}
		ttl = min(ttl, e.ExpiresAt.Sub(s.cfg.Now()))
	}
	record := audit.Event{
		Action: audit.IssueDownstream, Outcome: audit.Attempted, Subjects: []string{who.id.String()},
		Entry: e.ID, EntryRevision: e.Revision, Revision: s.cfg.State.Revision(), Details: audit.Details{{Key: "ttl", Value: ttl.String()}},
	}
	if err := s.audit(ctx, record); err != nil {
		return nil, err
	}
	bundle := s.cfg.State.Bundle() // before the signature: it holds the root of what signs
	cert, chain, err := s.cfg.CA.SignDownstream(who.id, key, ttl)
	if err != nil {
		return nil, err
	}
	record.Outcome = audit.OK
	if c, err := x509.ParseCertificate(cert); err == nil {
		record.Serial, record.NotAfter = c.SerialNumber.Text(16), c.NotAfter
	}
	// The answer waits for the serial number: what was signed for nobody's eyes is not out yet.
	if err := s.audit(ctx, record); err != nil {
		return nil, err
	}
	s.cfg.Log.Info("signed the authority of a cluster below", "caller", who.id.String(), "entry", e.ID, "address", who.addr)
	return &downstreamv1.SignResponse{Certificate: cert, Chain: chain, Bundle: api.BundleToWire(bundle)}, nil
}

// Sync takes the JWT keys of a cluster below into our bundle, and tells it our bundle. It ends when the entry does, when
// the SVID of its connection expires, and when this member cannot issue; the keys then stay until their own end.
func (s downstreamService) Sync(stream grpc.BidiStreamingServer[downstreamv1.Keys, workloadv1.Bundle]) error {
	who := callOf(stream.Context())
	if _, err := s.allowDownstream(who.caller); err != nil {
		return err
	}
	id := who.id.String()
	if err := s.downstreams.open(id); err != nil {
		return err
	}
	defer s.downstreams.close(id)
	s.cfg.Log.Info("a cluster below connected", "caller", id, "address", who.addr)
	defer s.cfg.Log.Info("a cluster below disconnected", "caller", id, "address", who.addr)
	failed := make(chan error, 1)
	go func() { failed <- s.takeKeys(stream, id) }()
	var sent *identity.Bundle
	tick := time.NewTicker(downstreamLook)
	defer tick.Stop()
	for {
		wake, stopped := s.downstreams.wait() // before what it tells of is read
		if stopped {
			return fmt.Errorf("%w: this member is stopping: use another", identity.ErrUnavailable)
		}
		if err := s.Ready(); err != nil {
			return err
		}
		if _, err := s.downstreamEntry(who.caller); err != nil {
			return err
		}
		if b := s.cfg.State.Bundle(); b != sent {
			if err := stream.Send(api.BundleToWire(b)); err != nil {
				return err
			}
			sent = b
		}
		select {
		case err := <-failed:
			return err
		case <-wake:
		case <-tick.C:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// takeKeys takes messages until the cluster below hangs up. Each is a write: they are as limited as calls are.
func (s *Server) takeKeys(stream grpc.BidiStreamingServer[downstreamv1.Keys, workloadv1.Bundle], id string) error {
	for first := true; ; first = false {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		if !first {
			if own, ok := s.downstreams.rates.Get(id); ok && !own.Allow() {
				return fmt.Errorf("%w: too many messages of %s: at the most %d a second", identity.ErrExhausted, id, downstreamRate)
			}
		}
		f, err := s.foreignKeys(id, msg)
		if err != nil {
			return err
		}
		if len(msg.GetUses()) > maxUses {
			return fmt.Errorf("%w: %d authorities in use: at the most %d", identity.ErrInvalid, len(msg.GetUses()), maxUses)
		}
		s.downstreams.tell(id, clusterBelow{at: s.cfg.Now(), sequence: msg.GetAckedSequence(), tells: msg.GetTells(), uses: msg.GetUses()})
		if s.hasForeign(f) {
			continue
		}
		var kids []string
		for _, k := range f.JWT {
			kids = append(kids, k.ID)
		}
		if err := s.audit(stream.Context(), audit.Event{Action: audit.PublishKeys, Outcome: audit.OK, Subjects: append([]string{id}, kids...)}); err != nil {
			return err
		}
		if err := s.cfg.Authorities.PutForeign(stream.Context(), f); err != nil {
			return fmt.Errorf("taking the JWT keys of %s into the bundle: %w", id, err)
		}
		s.cfg.Log.Info("took the JWT keys of a cluster below into the bundle", "caller", id, "keys", len(f.JWT))
	}
}

// foreignKeys checks what a cluster below says that it signs with. A key cannot have the ID of one of ours: verifiers
// would take one for the other.
func (s *Server) foreignKeys(source string, msg *downstreamv1.Keys) (identity.Foreign, error) {
	f := identity.Foreign{Source: source}
	if len(msg.Keys) > maxDownstreamKeys {
		return f, fmt.Errorf("%w: %d JWT keys: at the most %d", identity.ErrInvalid, len(msg.Keys), maxDownstreamKeys)
	}
	now := s.cfg.Now()
	seen := map[string]bool{}
	for i, k := range msg.Keys {
		if err := checkKeyID(k.GetKid()); err != nil {
			return f, fmt.Errorf("JWT key %d: %w", i+1, err)
		}
		if seen[k.Kid] {
			return f, fmt.Errorf("%w: JWT key %q twice", identity.ErrInvalid, k.Kid)
		}
		seen[k.Kid] = true
		if _, err := ca.ParsePublicKey(k.PublicKey); err != nil {
			return f, fmt.Errorf("JWT key %q: %w", k.Kid, err)
		}
		if k.NotAfter == nil || !k.NotAfter.IsValid() {
			return f, fmt.Errorf("%w: JWT key %q has no end", identity.ErrInvalid, k.Kid)
		}
		end := k.NotAfter.AsTime().Truncate(time.Second)
		if !now.Before(end) {
			continue
		}
		if latest := now.Add(maxForeignKeyLife).UTC().Truncate(24 * time.Hour); end.After(latest) {
			end = latest
		}
		for _, a := range s.cfg.State.Authorities() {
			if a.Kind == identity.AuthorityJWT && a.ID == k.Kid && !bytes.Equal(a.PublicKey, k.PublicKey) {
				return f, fmt.Errorf("%w: JWT key %q has the ID of a key of this cluster", identity.ErrExists, k.Kid)
			}
		}
		f.JWT = append(f.JWT, identity.JWTKey{ID: k.Kid, PublicKey: k.PublicKey, NotAfter: end})
	}
	return f, nil
}

func checkKeyID(id string) error {
	if id == "" || len(id) > maxKeyID {
		return fmt.Errorf("%w: a key ID of %d bytes: want 1 to %d", identity.ErrInvalid, len(id), maxKeyID)
	}
	for _, r := range id {
		if r <= ' ' || r > '~' {
			return fmt.Errorf("%w: key ID %q: want printable ASCII", identity.ErrInvalid, id)
		}
	}
	return nil
}

// hasForeign reports whether the state has it already: a cluster below tells its keys at each new stream.
func (s *Server) hasForeign(f identity.Foreign) bool {
	for _, old := range s.cfg.Outside.Foreign() {
		if old.Source != f.Source {
			continue
		}
		if len(old.JWT) != len(f.JWT) {
			return false
		}
		byID := map[string]identity.JWTKey{}
		for _, k := range old.JWT {
			byID[k.ID] = k
		}
		for _, k := range f.JWT {
			if o, ok := byID[k.ID]; !ok || !bytes.Equal(o.PublicKey, k.PublicKey) || !o.NotAfter.Equal(k.NotAfter) {
				return false
			}
		}
		return true
	}
	return len(f.JWT) == 0
}
