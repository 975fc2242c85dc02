package server

import (
	"context"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"countersign.io/countersign/api"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// Audit remembers what was decided. *audit.Log does.
type Audit interface {
	// Record must return nil only once the events are durable: what they announce takes effect then. Its errors must wrap
	// identity.ErrUnavailable, and it must return within a few seconds whatever happens to a disk.
	Record(ctx context.Context, events ...audit.Event) error
	// Note records what nobody waits for, and must not block. Refusals and failures of one kind may be counted only; with an
	// empty kind they may not.
	Note(kind string, e audit.Event)
	// Query calls f with the selected lines, in order.
	Query(ctx context.Context, q audit.Query, f func(line []byte) error) error
	// Ready says why nothing can be recorded now; nil if it can.
	Ready() error
}

// RequestIDKey is the gRPC trailer that tells a caller the ID of its call, by which operators find its records.
const RequestIDKey = "countersign-request"

// requestIDs are unique over all members and all their runs.
func (s *Server) nextRequest() string {
	return s.requestPrefix + strconv.FormatUint(s.requestCount.Add(1), 36)
}

// audited is what the records of one call have in common.
type audited struct {
	rule    auditRule
	request string
	who     audit.Who

	mu       sync.Mutex
	subjects []string
	details  audit.Details
	tried    bool // it was recorded as attempted
}

type auditKey struct{}

// auditOf is the call's; an empty one outside of calls.
func auditOf(ctx context.Context) *audited {
	if a, ok := ctx.Value(auditKey{}).(*audited); ok {
		return a
	}
	return &audited{}
}

// about adds to what the call's last record says, what only its method knows.
func about(ctx context.Context, subject string, details ...audit.Detail) {
	a := auditOf(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	if subject != "" && !slices.Contains(a.subjects, subject) {
		a.subjects = append(a.subjects, subject)
	}
	a.details = append(a.details, details...)
}

// event begins a record of the call. Without a call, it is this member's own doing.
func (s *Server) event(ctx context.Context, action audit.Action, outcome audit.Outcome) audit.Event {
	a := auditOf(ctx)
	e := audit.Event{Action: action, Outcome: outcome, RequestID: a.request, Who: a.who}
	if e.Who.Kind == "" {
		e.Who.Kind = "self"
	}
	return e
}

// audit records events; an error means that what they announce must not be done. What it is not told of who and in which call
// it takes from ctx.
func (s *Server) audit(ctx context.Context, events ...audit.Event) error {
	for i := range events {
		e := &events[i]
		base := s.event(ctx, e.Action, e.Outcome)
		if e.Who == (audit.Who{}) {
			e.Who = base.Who
		}
		if e.RequestID == "" {
			e.RequestID = base.RequestID
		}
	}
	return s.cfg.Audit.Record(ctx, events...)
}

// beginAudit gives the call its ID.
func (s *Server) beginAudit(ctx context.Context, who caller, method string) (context.Context, *audited) {
	rule, ok := auditRuleFor(method)
	if !ok {
		rule = auditRule{action: audit.Call, mode: auditWalk} // nobody may call it: see ruleFor
	}
	a := &audited{rule: rule, request: s.nextRequest(), who: s.auditWho(ctx, who)}
	return context.WithValue(ctx, auditKey{}, a), a
}

func (s *Server) auditWho(ctx context.Context, c caller) audit.Who {
	w := audit.Who{Serial: c.serial}
	switch c.kind {
	case remote:
		// Who has no power is not somebody we know: what such callers have recorded is bounded.
		w.Kind = "workload"
		if role := s.power(c); role != "" {
			w.Kind, w.Role = "admin", string(role)
		}
	case guest:
		w.Kind = "guest"
	case workload:
		w.Kind = "workload"
	case member:
		w.Kind = "member"
	case agent:
		w.Kind = "agent"
	case local:
		w.Kind = "operator"
	default:
		w.Kind = "guest"
	}
	if !c.id.IsZero() {
		w.ID = c.id.String()
	}
	if !c.addr.IsValid() {
		w.UID = strconv.FormatUint(uint64(c.uid), 10)
		return w
	}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		w.Address = p.Addr.String()
	}
	return w
}

// outcomeOf says how a call ended, and whether that is worth a record: a caller that went away is none.
func outcomeOf(err error) (o audit.Outcome, kind string, ok bool) {
	code := api.Code(err)
	switch code {
	case codes.Canceled:
		return "", "", false
	case codes.Internal, codes.Unavailable, codes.DeadlineExceeded, codes.Unknown:
		return audit.Failed, code.String(), !errors.Is(err, io.EOF)
	}
	return audit.Refused, code.String(), true
}

// attempt records a change before it is made.
func (s *Server) attempt(ctx context.Context, a *audited, req any) error {
	if a.rule.on != nil && req != nil {
		a.subjects = a.rule.on(req)
	}
	if a.rule.with != nil && req != nil {
		a.details = a.rule.with(req)
	}
	if a.rule.mode != auditChange {
		return nil
	}
	e := s.event(ctx, a.rule.action, audit.Attempted)
	e.Subjects, e.Details = slices.Clone(a.subjects), slices.Clone(a.details)
	if err := s.cfg.Audit.Record(ctx, e); err != nil {
		return err
	}
	a.tried = true
	return nil
}

// ended records how a call ended. Its error is for a read that must not be answered unrecorded.
func (s *Server) ended(ctx context.Context, a *audited, resp any, err error) error {
	if a.rule.mode == auditNever {
		return nil
	}
	e := s.event(ctx, a.rule.action, audit.OK)
	a.mu.Lock()
	e.Subjects, e.Details = slices.Clone(a.subjects), slices.Clone(a.details)
	a.mu.Unlock()
	if err != nil {
		if _, done := err.(reported); done {
			return nil // the walk recorded it
		}
		kind, ok := "", false
		if e.Outcome, kind, ok = outcomeOf(err); !ok && !a.tried {
			return nil
		}
		if !ok {
			e.Outcome = audit.Failed
		}
		if e.Outcome == audit.Failed && a.rule.streams {
			return nil // it goes on at another member, or later: a stream that ends decides nothing
		}
		if a.tried {
			kind = "" // each attempt has its outcome
		}
		e.Reason = err.Error()
		s.cfg.Audit.Note(kind, e)
		return nil
	}
	switch a.rule.mode {
	case auditChange:
		if a.rule.after != nil && resp != nil {
			e.Subjects = append(e.Subjects, a.rule.after(resp)...)
		}
		if r, ok := resp.(interface{ GetRevision() uint64 }); ok {
			e.Revision = r.GetRevision()
		} else {
			e.Revision = s.cfg.State.Revision()
		}
		s.cfg.Audit.Note("", e) // it is done: there is nothing to refuse
	case auditRead:
		return s.cfg.Audit.Record(ctx, e)
	case auditRescue:
		s.cfg.Audit.Note("", e)
	}
	return nil
}

// failed records that something announced as OK did not come to be.
func (s *Server) failed(e audit.Event, err error) {
	e.Outcome, e.Reason = audit.Failed, err.Error()
	s.cfg.Audit.Note("", e)
}

// refused records why a part of a call got nothing.
func (s *Server) refused(ctx context.Context, action audit.Action, err error, subjects, workload []string) {
	outcome, kind, ok := outcomeOf(err)
	if !ok {
		return
	}
	e := s.event(ctx, action, outcome)
	e.Reason, e.Subjects, e.Workload = err.Error(), subjects, workload
	s.cfg.Audit.Note(kind, e)
}

// tellRequest puts the call's ID into its trailer.
func tellRequest(a *audited) metadata.MD { return metadata.Pairs(RequestIDKey, a.request) }

// auditedUnary is unary without the wording of errors.
func (s *Server) auditedUnary(ctx context.Context, who caller, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, a := s.beginAudit(ctx, who, info.FullMethod)
	_ = grpc.SetTrailer(ctx, tellRequest(a)) // without one, the call goes on
	resp, err := func() (any, error) {
		ctx, err := s.authorize(ctx, who, info.FullMethod)
		if err != nil {
			return nil, err
		}
		if err := s.readBarrier(ctx, info.FullMethod); err != nil {
			return nil, err
		}
		if err := s.demand(ctx, a, info.FullMethod, req); err != nil {
			return nil, err
		}
		if err := s.attempt(ctx, a, req); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}()
	if auditErr := s.ended(ctx, a, resp, err); err == nil && auditErr != nil {
		return nil, auditErr
	}
	return resp, err
}

// auditedStream is stream without the wording of errors. What is read by a stream is recorded before it begins.
func (s *Server) auditedStream(srv any, ss grpc.ServerStream, who caller, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, a := s.beginAudit(ss.Context(), who, info.FullMethod)
	ss.SetTrailer(tellRequest(a))
	err := func() error {
		ctx, err := s.authorize(ctx, who, info.FullMethod)
		if err != nil {
			return err
		}
		if err := s.demand(ctx, a, info.FullMethod, nil); err != nil {
			return err
		}
		if err := s.attempt(ctx, a, nil); err != nil {
			return err
		}
		if m := a.rule.mode; m == auditRead || m == auditRescue {
			if err := s.ended(ctx, a, nil, nil); err != nil {
				return err
			}
		}
		if who.kind == remote {
			return s.whilePowerful(ctx, who, info.FullMethod, func(ctx context.Context) error { return next(srv, &callStream{ss, ctx}) })
		}
		return next(srv, &callStream{ss, ctx})
	}()
	if m := a.rule.mode; err != nil || m == auditChange {
		return errors.Join(err, s.ended(ctx, a, nil, err))
	}
	return nil
}

// workloadOf are the selectors that say which workload it was: the pod, or the process.
func workloadOf(sel []identity.Selector) []string {
	var out []string
	for _, x := range sel {
		switch x.Name() {
		case "k8s:cluster", "k8s:ns", "k8s:pod-name", "k8s:pod-uid", "unix:uid", "unix:path", "unix:sha256", "systemd:unit":
			out = append(out, string(x))
		}
	}
	return out
}

// noteChanges records what this member sees change in the replicated state by nobody's call: the leader's loops do it, whoever
// leads.
func (s *Server) noteChanges(changes []identity.Change) {
	var bundle, members, seal, level bool
	for _, c := range changes {
		bundle = bundle || c.Bundle || c.Reset
		members = members || c.Members || c.Reset
		seal = seal || c.Seal || c.Reset
		level = level || c.Level || c.Reset
	}
	rev := s.cfg.State.Revision()
	note := func(action audit.Action, subjects []string, details ...audit.Detail) {
		s.cfg.Audit.Note("", audit.Event{Action: action, Outcome: audit.OK, Who: audit.Who{Kind: "self"}, Subjects: subjects, Revision: rev, Details: details})
	}
	if b := s.cfg.State.Bundle(); bundle && b.Sequence > 0 { // or it is a state that is still being rebuilt
		var authorities []string
		for _, a := range s.cfg.State.Authorities() {
			authorities = append(authorities, string(a.Kind)+" "+a.ID+" "+string(a.State))
		}
		note(audit.BundleChange, authorities, audit.Detail{Key: "sequence", Value: strconv.FormatUint(b.Sequence, 10)},
			audit.Detail{Key: "x509_roots", Value: strconv.Itoa(len(b.X509))}, audit.Detail{Key: "jwt_keys", Value: strconv.Itoa(len(b.JWT))})
	}
	if members && len(s.cfg.State.Members()) > 0 {
		var all []string
		for _, m := range s.cfg.State.Members() {
			all = append(all, m.ID+" "+m.Address)
		}
		note(audit.MemberChange, all)
	}
	if (seal || level) && s.cfg.Sealing.on() && len(s.cfg.Sealing.Terms()) > 0 {
		var terms []string
		for _, t := range s.cfg.Sealing.Terms() {
			terms = append(terms, strconv.FormatUint(uint64(t.Number), 10)+" "+string(t.State)+" "+strings.Join(t.Holders, ","))
		}
		note(audit.SealChange, terms, audit.Detail{Key: "level", Value: strconv.FormatUint(uint64(s.cfg.State.Level()), 10)})
	}
}
