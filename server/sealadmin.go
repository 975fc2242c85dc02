package server

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

// sealLook is how often a rotation's progress is looked at.
const sealLook = 100 * time.Millisecond

var errNoSealing = fmt.Errorf("%w: this member's seal does not change", identity.ErrPrecondition)

// SealStatus says which data keys there are, what is sealed under each, and what every member has.
func (s adminService) SealStatus(ctx context.Context, _ *adminv1.Empty) (*adminv1.SealStatusResponse, error) {
	c := &s.cfg.Sealing
	if !c.on() {
		return nil, errNoSealing
	}
	resp := &adminv1.SealStatusResponse{}
	under := map[uint32]uint64{}
	for _, a := range s.cfg.State.Authorities() {
		if len(a.SealedKey) == 0 {
			continue
		}
		resp.Values++
		if n, ok := c.TermOf(a.SealedKey); ok {
			under[n]++
		}
	}
	active, _ := s.activeTerm()
	resp.ValuesOld = resp.Values - under[active.Number]
	for _, t := range c.Terms() {
		resp.Terms = append(resp.Terms, &adminv1.SealStatusResponse_Term{
			Number: t.Number, KeyId: hex.EncodeToString(t.KeyID), State: string(t.State), Holders: t.Holders,
			CreatedAt: timestamppb.New(t.CreatedAt), Values: under[t.Number],
		})
	}
	if active.Number == 0 { // a level below, or before the first term is on record
		resp.ValuesOld = 0
	}
	resp.Members = s.sealReports(ctx)
	return resp, nil
}

// sealReports asks the members which keys they have: at least those on the list are in the answer.
func (s *Server) sealReports(ctx context.Context) []*adminv1.SealStatusResponse_Member {
	healths, err := s.cfg.Cluster.Health(ctx)
	byID := map[string]*adminv1.SealStatusResponse_Member{}
	for _, h := range healths {
		out := &adminv1.SealStatusResponse_Member{Id: h.ID, Problem: h.Problem}
		info, parseErr := ParseMemberInfo(h.Info)
		if h.Reachable && parseErr == nil {
			out.Kek, out.Terms = info.KEK, info.SealTerms
		} else if out.Problem == "" {
			out.Problem = "it cannot be asked"
		}
		byID[h.ID] = out
	}
	for _, m := range s.cfg.State.Members() {
		if byID[m.ID] == nil {
			byID[m.ID] = &adminv1.SealStatusResponse_Member{Id: m.ID, Problem: "it cannot be asked"}
			if err != nil {
				byID[m.ID].Problem = err.Error()
			}
		}
	}
	return slices.SortedFunc(maps.Values(byID), func(a, b *adminv1.SealStatusResponse_Member) int { return strings.Compare(a.Id, b.Id) })
}

// RotateSeal makes a data key, and tells how it becomes the one that seals. It can be asked of any member: this one makes the
// key, the leader does the rest, also after the caller has gone.
func (s adminService) RotateSeal(_ *adminv1.Empty, stream grpc.ServerStreamingServer[adminv1.SealProgress]) error {
	if !s.cfg.Sealing.on() {
		return errNoSealing
	}
	number, detail, err := s.beginRotation(stream.Context())
	if err != nil {
		return fmt.Errorf("rotating the seal: %w", err)
	}
	if err := s.followRotation(stream.Context(), number, detail, stream.Send); err != nil {
		return fmt.Errorf("rotating the seal to data key %d: %w", number, err)
	}
	return nil
}

func (s *Server) beginRotation(ctx context.Context) (number uint32, detail string, err error) {
	c := &s.cfg.Sealing
	if s.cfg.State.Level() < levelSeal {
		return 0, "", fmt.Errorf("%w: data keys cannot change until every member runs this version: countersign cluster status shows versions", identity.ErrPrecondition)
	}
	terms := c.Terms()
	if _, ok := s.activeTerm(); !ok {
		return 0, "", fmt.Errorf("%w: the first data key is not on record yet: try again shortly", identity.ErrUnavailable)
	}
	for _, t := range terms {
		if t.State == identity.SealPending {
			return t.Number, fmt.Sprintf("data key %d was on its way already", t.Number), nil
		}
		if !s.holds(&t) {
			return 0, "", fmt.Errorf("%w: this member has yet to fetch data key %d: try again, or ask another member", identity.ErrUnavailable, t.Number)
		}
	}
	number, id, err := c.Keys.Generate(ctx)
	if err != nil {
		return 0, "", err
	}
	// The key is on disk here: a crash from now on leaves at worst a key that nobody knows of.
	err = c.Writes.PutSealTerm(ctx, s.cfg.Now(), number, id)
	if errors.Is(err, identity.ErrPrecondition) || errors.Is(err, identity.ErrInvalid) {
		err = errors.Join(err, c.Keys.Forget(ctx, number, id))
	}
	if err != nil {
		return 0, "", fmt.Errorf("proposing data key %d: %w", number, err)
	}
	s.cfg.Log.Info("data key made", "term", number)
	return number, fmt.Sprintf("data key %d made", number), nil
}

// followRotation sends what changes until the key seals everything.
func (s *Server) followRotation(ctx context.Context, number uint32, detail string, send func(*adminv1.SealProgress) error) error {
	tick := time.NewTicker(sealLook)
	defer tick.Stop()
	var last *adminv1.SealProgress
	for {
		p, err := s.rotationProgress(number)
		if err != nil {
			return err
		}
		if detail != "" {
			p.Detail, detail = detail, ""
		}
		if last == nil || !sameProgress(last, p) {
			if err := send(p); err != nil {
				return err
			}
			last = p
		}
		if p.Phase == "done" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: it goes on without you (countersign seal status shows how): %w", identity.ErrUnavailable, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func sameProgress(a, b *adminv1.SealProgress) bool {
	x, y := proto.CloneOf(a), proto.CloneOf(b)
	x.Detail, y.Detail = "", ""
	return proto.Equal(x, y)
}

func (s *Server) rotationProgress(number uint32) (*adminv1.SealProgress, error) {
	terms := s.cfg.Sealing.Terms()
	i := slices.IndexFunc(terms, func(t identity.SealTerm) bool { return t.Number == number })
	if i < 0 {
		return nil, fmt.Errorf("%w: it was given up, since no other member had the key when its maker was lost: nothing changed, rotate again", identity.ErrUnavailable)
	}
	t := terms[i]
	if t.State == identity.SealPending {
		waiting := s.waitingFor(&t)
		total := uint64(max(1, len(s.cfg.State.Members())))
		p := &adminv1.SealProgress{Phase: "distribute", Done: total - uint64(len(waiting)), Total: total, WaitingFor: waiting}
		if len(waiting) == 0 {
			p.Phase = "activate"
		} else {
			p.Detail = "waiting for " + strings.Join(waiting, ", ")
		}
		return p, nil
	}
	if t.State == identity.SealRetired {
		return &adminv1.SealProgress{Phase: "done", Detail: fmt.Sprintf("data key %d has a successor already", number)}, nil
	}
	var total, done uint64
	for _, a := range s.cfg.State.Authorities() {
		if len(a.SealedKey) == 0 {
			continue
		}
		total++
		if n, ok := s.cfg.Sealing.TermOf(a.SealedKey); ok && n == number {
			done++
		}
	}
	if done < total {
		return &adminv1.SealProgress{Phase: "reseal", Done: done, Total: total, Detail: fmt.Sprintf("data key %d seals from now on", number)}, nil
	}
	return &adminv1.SealProgress{Phase: "done", Done: done, Total: total, Detail: fmt.Sprintf("everything is sealed under data key %d; the ones before open what is in old logs, snapshots and backups", number)}, nil
}

// RewrapSeal seals everything under the active data key, and wraps this member's keyring under its present key-encryption key.
func (s adminService) RewrapSeal(_ *adminv1.Empty, stream grpc.ServerStreamingServer[adminv1.SealProgress]) error {
	c := &s.cfg.Sealing
	if !c.on() {
		return errNoSealing
	}
	ctx := stream.Context()
	if err := c.Rewrap(ctx); err != nil {
		return fmt.Errorf("wrapping this member's keyring: %w", err)
	}
	s.cfg.Log.Info("keyring wrapped anew")
	if err := stream.Send(&adminv1.SealProgress{Phase: "rewrap", Done: 1, Total: 1, Detail: "this member's keyring is wrapped under its present key-encryption key"}); err != nil {
		return err
	}
	n, err := 0, error(nil)
	if s.cfg.State.Level() >= levelSeal {
		n, err = s.reseal(ctx, func(done, total int) error {
			return stream.Send(&adminv1.SealProgress{Phase: "reseal", Done: uint64(done), Total: uint64(total)})
		})
	}
	if err != nil {
		return fmt.Errorf("sealing anew: %w", err)
	}
	return stream.Send(&adminv1.SealProgress{Phase: "done", Done: uint64(n), Total: uint64(n), Detail: fmt.Sprintf("%d values were under an older data key", n)})
}
