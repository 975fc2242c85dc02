package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"countersign.io/countersign/api"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// jwtKey is what a cached answer is for. The epoch is the workload's: a change of its entries leaves the old answers behind.
type jwtKey struct {
	epoch    uint64
	audience string
	id       string
}

type jwtAnswer struct {
	svids []identity.JWTSVID
	until time.Time // half-life of the first to expire
}

// FetchJWT returns JWT-SVIDs for the audience: of the identity id, or of every identity of the workload if id is zero. An
// answer is used again for the same workload, audience set and ID until half of its life is over.
//
// Only a workload with a live X.509-SVID gets one: it is by that one's entries that a member says when the identity is over. The
// error wraps identity.ErrInvalid for a bad audience, else as for Updates.
func (a *Agent) FetchJWT(ctx context.Context, attest attestor.Func, audience []string, id spiffeid.ID) ([]identity.JWTSVID, error) {
	audience, err := checkAudience(audience)
	if err != nil {
		return nil, err
	}
	wl, err := identify(ctx, attest)
	if err != nil {
		return nil, err
	}
	defer wl.Wipe()
	w, err := a.find(ctx, wl, nil)
	if err != nil {
		return nil, err
	}
	key := jwtKey{audience: strings.Join(audience, "\x00"), id: id.String()}
	if key.epoch, err = a.cache.epochOf(w); err != nil {
		return nil, err
	}
	if got, ok := a.jwts.Get(key); ok && time.Now().Before(got.until) {
		return got.svids, nil
	}
	if err := tokenNeeded(wl.Key, wl.Evidence.Token); err != nil {
		return nil, err
	}
	// Whoever waits may go; the question is asked once and its answer kept. So it has a token of its own.
	ev := cloneEvidence(wl.Evidence)
	res := a.jwtGo.DoChan(fmt.Sprintf("%d\x00%s\x00%s", key.epoch, key.id, key.audience), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTries*callTimeout)
		defer cancel()
		defer clear(ev.Token)
		got, err := a.issueJWT(ctx, ev, audience, id)
		if err != nil {
			return nil, err
		}
		if now, err := a.cache.epochOf(w); err == nil && now == key.epoch {
			a.jwts.Add(key, got)
		}
		return got.svids, nil
	})
	select {
	case r := <-res:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.([]identity.JWTSVID), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// checkAudience returns the audience sorted, without duplicates.
func checkAudience(in []string) ([]string, error) {
	if len(in) == 0 || len(in) > identity.MaxAudiences {
		return nil, fmt.Errorf("%w: %d audiences: want 1 to %d", identity.ErrInvalid, len(in), identity.MaxAudiences)
	}
	for i, a := range in {
		if a == "" || len(a) > identity.MaxAudienceBytes || strings.ContainsRune(a, 0) {
			return nil, fmt.Errorf("%w: audience %d is empty, has a NUL, or more than %d bytes", identity.ErrInvalid, i+1, identity.MaxAudienceBytes)
		}
	}
	out := slices.Clone(in)
	slices.Sort(out)
	return slices.Compact(out), nil
}

func (a *Agent) issueJWT(ctx context.Context, ev identity.Evidence, audience []string, id spiffeid.ID) (jwtAnswer, error) {
	req := &workloadv1.IssueJWTRequest{Evidence: evidenceToWire(ev), Audience: audience}
	if !id.IsZero() {
		req.SpiffeId = id.String()
	}
	var out jwtAnswer
	var verdict error // about the workload: the call itself succeeded
	err := a.call(ctx, func(ctx context.Context, s *session) error {
		resp, err := workloadv1.NewWorkloadClient(s.conn).IssueJWT(ctx, req)
		if err = api.FromStatus(err); err != nil {
			// One request, one status: a refusal is the workload's. If it were the agent's, the Sync stream ends as well.
			if !transient(err) {
				verdict = denied(err)
				return nil
			}
			return fmt.Errorf("asking for JWT-SVIDs: %w", err)
		}
		out, err = takeJWTs(a.trust.Load().jwt, resp.Svids, audience, id, time.Now())
		a.jwtsIssued.Add(uint64(len(out.svids)))
		return err
	})
	return out, errors.Join(err, verdict)
}

// takeJWTs verifies an answer by the bundle's JWT authorities: signature, audience, subject, expiry (JWT-SVID section 5).
func takeJWTs(bundle *jwtbundle.Bundle, svids []*workloadv1.JWTSVID, audience []string, id spiffeid.ID, now time.Time) (jwtAnswer, error) {
	var out jwtAnswer
	fail := func(format string, args ...any) (jwtAnswer, error) {
		return jwtAnswer{}, fmt.Errorf("asking for JWT-SVIDs: %w: "+format, append([]any{errAnswer}, args...)...)
	}
	if len(svids) == 0 {
		return fail("no SVID in it")
	}
	for _, s := range svids {
		got, err := jwtsvid.ParseAndValidate(s.Token, bundle, audience[:1])
		if err != nil {
			return fail("%v", err)
		}
		if got.ID.String() != s.SpiffeId || !id.IsZero() && got.ID != id {
			return fail("a token of %s was announced as one of %q (asked for: %q)", got.ID, s.SpiffeId, id)
		}
		if _, err := identity.ParseWorkloadID(bundle.TrustDomain(), got.ID.String()); err != nil {
			return fail("%v", err)
		}
		for _, want := range audience {
			if !slices.Contains(got.Audience, want) {
				return fail("the token of %s is not for audience %q", got.ID, want)
			}
		}
		if !now.Before(got.Expiry) || len(s.Hint) > identity.MaxHintBytes {
			return fail("the token of %s has expired, or its hint has %d bytes", got.ID, len(s.Hint))
		}
		out.svids = append(out.svids, identity.JWTSVID{
			ID: got.ID, Token: s.Token, Hint: s.Hint, IssuedAt: api.TimeFromWire(s.IssuedAt), ExpiresAt: got.Expiry,
		})
		if until := now.Add(got.Expiry.Sub(now) / 2); out.until.IsZero() || until.Before(out.until) {
			out.until = until
		}
	}
	return out, nil
}
