package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// previewService says what a change would do. It makes the checks of the change itself, by the same functions where they are this
// package's; those that only the state makes when it applies it (a duplicate, a level) are made here on what the state has now, so that what
// is previewed can still be refused if somebody changes something in between.
type previewService struct {
	adminv1.UnimplementedPreviewServer
	*Server
}

// levelPower is the level that downstream entries and roles of admins need.
const levelPower = 2

type effects []string

func (e *effects) add(format string, args ...any) { *e = append(*e, fmt.Sprintf(format, args...)) }

func (e *effects) answer() (*adminv1.PreviewResponse, error) {
	return &adminv1.PreviewResponse{Effects: *e}, nil
}

// CreateEntry previews a new entry.
func (s previewService) CreateEntry(_ context.Context, req *adminv1.Entry) (*adminv1.PreviewResponse, error) {
	if req.Id != "" {
		return nil, fmt.Errorf("%w: entry ID %q: leave it out, the server makes it", identity.ErrInvalid, req.Id)
	}
	e, err := s.entryFromWire(req)
	if err != nil {
		return nil, err
	}
	if err := s.mayBeEntry(e); err != nil {
		return nil, err
	}
	var out effects
	out.add("an entry would be created: workloads with %s get %s", api.SelectorsToWire(e.Selectors), e.SPIFFEID)
	s.gains(&out, e)
	return out.answer()
}

// mayBeEntry makes the checks that the state makes.
func (s *Server) mayBeEntry(e *identity.Entry) error {
	if (e.Downstream || e.AdminRole != "" || e.ManagedBy != "" || slices.ContainsFunc(e.Selectors, identity.Selector.Fact)) && s.cfg.State.Level() < levelPower {
		return fmt.Errorf("%w: a downstream entry, an admin's role, or a selector of labels or owners must wait until every member runs this version: countersign cluster status shows versions", identity.ErrPrecondition)
	}
	for _, o := range s.cfg.State.Match(e.Selectors) {
		if o.ID != e.ID && o.SPIFFEID == e.SPIFFEID && slices.Equal(o.Selectors, e.Selectors) {
			return fmt.Errorf("%w: entry %s has the same selectors and the same SPIFFE ID %s: update that one", identity.ErrExists, o.ID, e.SPIFFEID)
		}
	}
	return nil
}

// gains says who would have what by an entry.
func (s *Server) gains(out *effects, e *identity.Entry) {
	if rest := identity.WithoutFacts(e.Selectors); len(rest) < len(e.Selectors) {
		out.add("%d workloads that agents serve at this member have these selectors now, but for labels and owners: %s", s.hub.count(rest), api.SelectorsToWire(rest))
	} else {
		out.add("%d workloads that agents serve at this member have these selectors now", s.hub.count(e.Selectors))
	}
	if role := e.Power(); role != "" {
		out.add("whoever has %s becomes an admin with the role %s, with the next SVID", e.SPIFFEID, role)
	}
	if e.Downstream {
		out.add("whoever has %s may have a certificate authority signed", e.SPIFFEID)
	}
	if !e.ExpiresAt.IsZero() {
		out.add("it ends at %s", e.ExpiresAt.UTC().Format(time.RFC3339))
	}
}

// UpdateEntry previews a change of an entry.
func (s previewService) UpdateEntry(_ context.Context, req *adminv1.Entry) (*adminv1.PreviewResponse, error) {
	if req.Id == "" {
		return nil, fmt.Errorf("%w: which entry? give its ID", identity.ErrInvalid)
	}
	e, err := s.entryFromWire(req)
	if err != nil {
		return nil, err
	}
	old, ok := s.cfg.State.Entry(req.Id)
	switch {
	case !ok:
		return nil, fmt.Errorf("%w: entry %q", identity.ErrNotFound, req.Id)
	case req.Revision != 0 && req.Revision != old.Revision:
		return nil, fmt.Errorf("%w: entry %s is at revision %d, not %d: somebody changed it meanwhile; read it again", identity.ErrPrecondition, old.ID, old.Revision, req.Revision)
	}
	if err := s.mayBeEntry(e); err != nil {
		return nil, err
	}
	var out effects
	changed := changedFields(old, e)
	if len(changed) == 0 {
		out.add("nothing would change")
		return out.answer()
	}
	out.add("entry %s would change: %s", old.ID, strings.Join(changed, ", "))
	out.add("%d workloads that agents serve at this member have an SVID by it now, and get another or none", s.hub.holding(old.ID))
	if role := old.Power(); role != "" && role != e.Power() {
		out.add("whoever has %s is no longer an admin with the role %s by it", old.SPIFFEID, role)
	}
	s.gains(&out, e)
	return out.answer()
}

// changedFields names the fields that differ, as they are called on the wire.
func changedFields(a, b *identity.Entry) (out []string) {
	x, y := api.EntryToWire(a), api.EntryToWire(b)
	x.Revision, y.Revision, x.CreatedAt, y.CreatedAt = 0, 0, nil, nil
	fields := x.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if x.ProtoReflect().Has(f) != y.ProtoReflect().Has(f) || !x.ProtoReflect().Get(f).Equal(y.ProtoReflect().Get(f)) {
			out = append(out, string(f.Name()))
		}
	}
	return out
}

// DeleteEntry previews the end of an entry.
func (s previewService) DeleteEntry(_ context.Context, req *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
	e, ok := s.cfg.State.Entry(req.Name)
	if !ok {
		return nil, fmt.Errorf("%w: entry %q", identity.ErrNotFound, req.Name)
	}
	var out effects
	out.add("entry %s would be deleted: workloads with %s get %s by it no longer", e.ID, api.SelectorsToWire(e.Selectors), e.SPIFFEID)
	out.add("%d workloads that agents serve at this member have an SVID by it now, and lose it at once unless another entry gives one", s.hub.holding(e.ID))
	if role := e.Power(); role != "" {
		out.add("whoever has %s is no longer an admin with the role %s by it", e.SPIFFEID, role)
	}
	if e.Downstream {
		out.add("the cluster below that has %s gets no authority any more; the one it has lasts until it ends", e.SPIFFEID)
	}
	return out.answer()
}

// AddKubeCluster previews a registration.
func (s previewService) AddKubeCluster(_ context.Context, req *adminv1.KubeCluster) (*adminv1.PreviewResponse, error) {
	k, err := s.kubeFromWire(req)
	if err != nil {
		return nil, err
	}
	var out effects
	old, ok := s.cfg.State.KubeCluster(k.Name)
	switch {
	case ok && !req.Replace:
		return nil, fmt.Errorf("%w: kube cluster %q: say --replace to change it", identity.ErrExists, k.Name)
	case ok:
		out.add("kube cluster %s would be replaced", k.Name)
		for _, a := range old.AgentAccounts {
			if !slices.Contains(k.AgentAccounts, a) {
				out.add("agents that were attested as service account %s would end", a)
			}
		}
	default:
		out.add("kube cluster %s would be registered: what issuer %s signs is believed about its pods", k.Name, identity.RedactURL(k.Issuer))
	}
	if k.DefaultID != "" {
		out.add("a pod without an entry is %s%s", s.cfg.TrustDomain.IDString(), k.DefaultID)
	} else {
		out.add("a pod without an entry has no identity")
	}
	for _, a := range k.AgentAccounts {
		out.add("pods of service account %s may be agents of their nodes", a)
	}
	return out.answer()
}

// DeleteKubeCluster previews the end of a registration.
func (s previewService) DeleteKubeCluster(_ context.Context, req *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
	if _, ok := s.cfg.State.KubeCluster(req.Name); !ok {
		return nil, fmt.Errorf("%w: kube cluster %q", identity.ErrNotFound, req.Name)
	}
	var out effects
	out.add("kube cluster %s would be forgotten: its pods and agents get nothing more", req.Name)
	out.add("%d of its workloads are served by agents at this member now, and lose their SVIDs at once", s.hub.count([]identity.Selector{identity.Selector("k8s:cluster:" + req.Name)}))
	return out.answer()
}

// BanAgent previews a ban.
func (s previewService) BanAgent(_ context.Context, req *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
	return s.agentGoes(req.Name, "would be shut out for good: it cannot attest again")
}

// EvictAgent previews an eviction.
func (s previewService) EvictAgent(_ context.Context, req *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
	return s.agentGoes(req.Name, "would be forgotten: it must attest again")
}

func (s previewService) agentGoes(id, what string) (*adminv1.PreviewResponse, error) {
	a, ok := s.cfg.State.Agent(id)
	if !ok {
		return nil, fmt.Errorf("%w: agent %q", identity.ErrNotFound, id)
	}
	var out effects
	out.add("agent %s %s", a.ID, what)
	if a.Banned {
		out.add("it is banned already")
	}
	if a.KubeNode != "" {
		out.add("it speaks for node %s of kube cluster %s", a.KubeNode, a.KubeCluster)
	}
	if st := s.hub.status(id); st.connected {
		out.add("it is connected to this member and serves %d workloads, which get no new SVIDs meanwhile", st.workloads)
	} else {
		out.add("it is not connected to this member")
	}
	return out.answer()
}

// RemoveMember previews a removal.
func (s previewService) RemoveMember(ctx context.Context, req *adminv1.NameRequest) (*adminv1.PreviewResponse, error) {
	all, err := s.cfg.Cluster.Health(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking the members: %w", err)
	}
	m, err := mayRemove(all, req.Name)
	if err != nil {
		return nil, err
	}
	rest := slices.DeleteFunc(slices.Clone(all), func(h MemberHealth) bool { return h.ID == m.ID })
	var out effects
	out.add("member %s at %s would be removed for good", m.ID, m.Address)
	if m.Leader {
		out.add("it leads: another would first")
	}
	out.add("of the %d that are left, %d could fail and there would still be a leader", len(rest), tolerance(rest))
	return out.answer()
}

// RotateSeal previews a new data key.
func (s previewService) RotateSeal(ctx context.Context, _ *adminv1.Empty) (*adminv1.PreviewResponse, error) {
	c := &s.cfg.Sealing
	if !c.on() {
		return nil, errNoSealing
	}
	if s.cfg.State.Level() < levelSeal {
		return nil, fmt.Errorf("%w: data keys cannot change until every member runs this version: countersign cluster status shows versions", identity.ErrPrecondition)
	}
	active, ok := s.activeTerm()
	if !ok {
		return nil, fmt.Errorf("%w: the first data key is not on record yet: try again shortly", identity.ErrUnavailable)
	}
	var out effects
	next := active.Number + 1
	for _, t := range c.Terms() {
		next = max(next, t.Number+1)
		if t.State == identity.SealPending {
			out.add("data key %d is on its way already: it would be waited for", t.Number)
			next = t.Number
		}
	}
	if len(out) == 0 {
		out.add("data key %d would be made, given to every member, and everything sealed anew under it; data key %d stays, to open what is old", next, active.Number)
	}
	for _, m := range s.sealReports(ctx) {
		if m.Problem != "" {
			out.add("member %s would be waited for: %s", m.Id, m.Problem)
		}
	}
	return out.answer()
}

// count is how many workloads have all of the selectors; holding how many have an SVID by an entry.
func (h *hub) count(sel []identity.Selector) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	found := map[*watch]struct{}{}
	h.having(sel, found)
	return len(found)
}

func (h *hub) holding(entry string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.holders[entry])
}
