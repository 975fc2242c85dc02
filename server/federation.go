package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"

	"countersign.io/countersign/api"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// Federation is what the member needs to trust other trust domains, and to say how others come to trust this one; zero: neither.
type Federation struct {
	FederationState
	Writes    FederationWriter
	Refresher Refresher
	// RefreshHint is how often partners are to read our bundle; 0: 5 min.
	RefreshHint time.Duration
	// Endpoints are where this member serves the bundle.
	Endpoints []Endpoint
	// DialMember connects to another member, that very one, for what only the leader knows.
	DialMember func(ctx context.Context, m identity.Member) (*grpc.ClientConn, error)
}

// Endpoint is where our bundle is read.
type Endpoint struct{ Profile, URL string }

// FederationState reads the relationships.
type FederationState interface {
	// Federations are ordered by trust domain; nobody changes them afterwards.
	Federations() []identity.Federation
	// Federated is the bundle of another trust domain, nil if there is none. The same pointer means the same content.
	Federated(trustDomain string) *identity.Bundle
}

// FederationWriter changes relationships.
type FederationWriter interface {
	// PutFederation must refuse to replace with identity.ErrExists unless told to, and with identity.ErrPrecondition if ifRevision
	// is not 0 and not the relationship's.
	PutFederation(ctx context.Context, now time.Time, f identity.Federation, replace bool, ifRevision uint64) (identity.Federation, error)
	DeleteFederation(ctx context.Context, trustDomain string) error
	// PutFederatedBundle must refuse with identity.ErrPrecondition what was fetched by another revision of the relationship, and a
	// sequence that goes back.
	PutFederatedBundle(ctx context.Context, now time.Time, trustDomain string, of uint64, b identity.FederatedBundle) error
}

// Refresher asks partners for their bundles. *federation.Refresher does.
type Refresher interface {
	// Run must ask each relationship of source at its hint, and give what it got to take, until ctx ends.
	Run(ctx context.Context, source func() []identity.Federation, take func(context.Context, identity.Federation, *identity.Bundle) (warning string, err error)) error
	// Refresh does so once, for one, now.
	Refresh(ctx context.Context, trustDomain string, source func() []identity.Federation, take func(context.Context, identity.Federation, *identity.Bundle) (warning string, err error)) error
	// Status is how one stands; ok is false if this member has not asked it since it leads.
	Status(trustDomain string) (st identity.FederationStatus, ok bool)
	// Changed is called when source may have others.
	Changed()
}

func (f *Federation) on() bool { return f.FederationState != nil }

func (f *Federation) check() error {
	if f.on() && (f.Writes == nil || f.Refresher == nil || f.DialMember == nil) {
		return fmt.Errorf("%w: Federation: Writes, Refresher and DialMember go with its state", identity.ErrInvalid)
	}
	return nil
}

// FederationSettle is how long a new key must have been in the bundle before anything is signed with it, so that every partner
// has read it (SPIFFE Federation, section 4.1): three times the refresh hint where this trust domain federates with another,
// or serves its bundle to whoever may; else 0.
func (s *Server) FederationSettle() time.Duration {
	f := &s.cfg.Federation
	if len(f.Endpoints) == 0 && (!f.on() || len(f.Federations()) == 0) {
		return 0
	}
	return 3 * f.RefreshHint
}

// leadFederation refreshes the federated bundles: this member leads.
func (s *Server) leadFederation(ctx context.Context) {
	f := &s.cfg.Federation
	if err := f.Refresher.Run(ctx, f.Federations, s.takeFederated); err != nil && ctx.Err() == nil {
		s.cfg.Log.Error("the refreshing of federated bundles ended", "error", err)
	}
}

// takeFederated keeps a bundle that was fetched, in the replicated state first: an agent is told of it by the change. What is no
// news, or no good, costs no write, however often a partner publishes it.
func (s *Server) takeFederated(ctx context.Context, f identity.Federation, b *identity.Bundle) (warning string, err error) {
	next := identity.FederatedBundle{Sequence: b.Sequence, RefreshHint: b.RefreshHint, X509: b.X509, JWT: b.JWT}
	if err := f.CheckNext(next.Sequence); err != nil {
		return "", err
	}
	if was := f.Bundle; was != nil && was.SameKeys(&next) && was.Sequence == next.Sequence && was.RefreshHint == next.RefreshHint {
		return "", nil
	}
	if err := s.checkNobodyElses(f.TrustDomain, &next); err != nil {
		return "", err
	}
	if f.Bundle != nil && f.Bundle.Sequence == next.Sequence && !f.Bundle.SameKeys(&next) {
		warning = fmt.Sprintf("the partner changed its bundle and not its sequence, %d: an older one could be taken for a newer", next.Sequence)
		s.cfg.Log.Warn("a federated bundle changed without its sequence", "trust_domain", f.TrustDomain, "sequence", next.Sequence)
	}
	// The outcome is recorded by every member, as a change of the federation.
	e := audit.Event{Action: audit.FederationTake, Outcome: audit.Attempted, Subjects: []string{f.TrustDomain}, Details: bundleDetails(&next)}
	if err := s.audit(ctx, e); err != nil {
		return "", fmt.Errorf("recording it: %w", err)
	}
	if err := s.cfg.Federation.Writes.PutFederatedBundle(ctx, s.cfg.Now(), f.TrustDomain, f.Revision, next); err != nil {
		s.failed(e, err)
		return "", err
	}
	s.cfg.Log.Info("a federated bundle was taken", "trust_domain", f.TrustDomain, "sequence", next.Sequence, "x509_authorities", len(next.X509), "jwt_authorities", len(next.JWT))
	return warning, nil
}

// checkNobodyElses refuses authorities of ours, or of another partner's, in a partner's bundle: whoever signs with them could
// sign that partner's names, so the trust domains would be one. Most often the URL is wrong.
func (s *Server) checkNobodyElses(td string, b *identity.FederatedBundle) error {
	others := map[string]*identity.Bundle{s.cfg.TrustDomain.Name(): s.cfg.State.Bundle()}
	for _, f := range s.cfg.Federation.Federations() {
		if f.TrustDomain != td {
			others[f.TrustDomain] = s.cfg.Federation.Federated(f.TrustDomain)
		}
	}
	for name, o := range others {
		if o == nil {
			continue
		}
		for _, der := range b.X509 {
			if slices.ContainsFunc(o.X509, func(x []byte) bool { return bytes.Equal(x, der) }) {
				return fmt.Errorf("%w: the bundle of %q has an X.509 authority (sha256 %s) that is one of %q: is the URL right? Whoever signs for both could take the names of either", identity.ErrPrecondition, td, fingerprint(der), name)
			}
		}
		for kid, key := range b.JWT {
			for _, k := range o.JWT {
				if bytes.Equal(k, key) {
					return fmt.Errorf("%w: the bundle of %q has a JWT key (%q) that is one of %q: is the URL right? Whoever signs for both could take the names of either", identity.ErrPrecondition, td, infoText(kid), name)
				}
			}
		}
	}
	return nil
}

func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// bundleDetails say what is vouched for: the roots by their hash, the JWT keys by their IDs.
func bundleDetails(b *identity.FederatedBundle) audit.Details {
	roots := make([]string, len(b.X509))
	for i, der := range b.X509 {
		roots[i] = fingerprint(der)
	}
	kids := make([]string, 0, len(b.JWT))
	for kid := range b.JWT {
		kids = append(kids, infoText(kid))
	}
	slices.Sort(kids)
	return audit.Details{
		{Key: "sequence", Value: strconv.FormatUint(b.Sequence, 10)},
		{Key: "x509_sha256", Value: strings.Join(roots, " ")}, {Key: "jwt_kids", Value: strings.Join(kids, " ")},
	}
}

// federationChanged takes up changes of relationships, and tells the refresher.
func (s *Server) federationChanged(changes []identity.Change) {
	if !s.cfg.Federation.on() || !slices.ContainsFunc(changes, func(c identity.Change) bool { return c.Federation != "" || c.Reset }) {
		return
	}
	s.cfg.Federation.Refresher.Changed()
}

// noteFederations records the relationships that changed as they are now.
func (s *Server) noteFederations(changes []identity.Change) {
	if !s.cfg.Federation.on() {
		return
	}
	changed, reset := map[string]bool{}, false
	for _, c := range changes {
		reset = reset || c.Reset
		if c.Federation != "" {
			changed[c.Federation] = true
		}
	}
	if !reset && len(changed) == 0 {
		return
	}
	rev := s.cfg.State.Revision()
	note := func(td string, d audit.Details) {
		s.cfg.Audit.Note("", audit.Event{Action: audit.FederationChange, Outcome: audit.OK, Who: audit.Who{Kind: "self"}, Subjects: []string{td}, Revision: rev, Details: d})
	}
	for _, f := range s.cfg.Federation.Federations() {
		if !reset && !changed[f.TrustDomain] {
			continue
		}
		delete(changed, f.TrustDomain)
		d := audit.Details{{Key: "url", Value: identity.RedactURL(f.URL)}, {Key: "profile", Value: f.Profile}}
		if f.EndpointID != "" {
			d = append(d, audit.Detail{Key: "endpoint_id", Value: f.EndpointID})
		}
		if f.Bundle != nil {
			d = append(append(d, bundleDetails(f.Bundle)...), audit.Detail{Key: "pinned", Value: strconv.FormatBool(f.Bundle.Pinned)})
		}
		note(f.TrustDomain, d)
	}
	for td := range changed {
		note(td, audit.Details{{Key: "deleted", Value: "true"}})
	}
}

// unfederated names the trust domains that an entry federates with and that there is no bundle of.
func (s *Server) unfederated(e *identity.Entry) []string {
	if !s.cfg.Federation.on() {
		return nil
	}
	var out []string
	for _, td := range e.FederatesWith {
		if s.cfg.Federation.Federated(td) != nil {
			continue
		}
		what := "there is no federation with it (countersign federation accept, or create)"
		if slices.ContainsFunc(s.cfg.Federation.Federations(), func(f identity.Federation) bool { return f.TrustDomain == td }) {
			what = "its bundle was never fetched (countersign federation show " + td + ")"
		}
		out = append(out, fmt.Sprintf("federates_with %s has no effect yet: %s", td, what))
	}
	return out
}

// federatedToWire are the bundles of those of the trust domains that there are bundles of.
func (s *Server) federatedToWire(tds []string) (out []*workloadv1.Bundle, of []string) {
	if !s.cfg.Federation.on() {
		return nil, nil
	}
	for _, td := range tds {
		if b := s.cfg.Federation.Federated(td); b != nil {
			out, of = append(out, api.BundleToWire(b)), append(of, td)
		}
	}
	return out, of
}

// federatedFor are the bundles that go with SVIDs which are about to be handed out, and that the caller may not have yet. A caller
// without a certificate has none; an agent gets them by its stream, but perhaps not soon enough.
func (s *Server) federatedFor(who call, results []*workloadv1.X509Result) []*workloadv1.Bundle {
	if !s.cfg.Federation.on() {
		return nil
	}
	var with []string
	for _, r := range results {
		for _, svid := range r.GetSvids() {
			with = append(with, svid.FederatesWith...)
		}
	}
	if len(with) == 0 {
		return nil
	}
	slices.Sort(with)
	with = slices.Compact(with)
	if who.agent != nil {
		with = s.hub.lacking(who.agent.ID, with)
	}
	out, _ := s.federatedToWire(with)
	return out
}

var errNoFederation = fmt.Errorf("%w: this member does no federation", identity.ErrUnavailable)

// leader is the member that leads, and whether that is this one.
func (s *Server) leader() (m MemberStatus, self bool, err error) {
	for _, m := range s.cfg.Cluster.Members() {
		if m.Leader {
			return m, m.ID == s.cfg.MemberID, nil
		}
	}
	return MemberStatus{}, false, errors.Join(identity.ErrUnavailable, errors.New("no member leads"))
}
