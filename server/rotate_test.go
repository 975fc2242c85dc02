package server

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// operator calls as one who sits at this member does.
func (r *rotor) operator() (context.Context, trustService) {
	return context.WithValue(r.t.Context(), callKey{}, call{caller: caller{kind: local}}), trustService{Server: r.srv}
}

// TestRotationWalk takes a rotation from its beginning to its end, and looks at each gate on the way.
func TestRotationWalk(t *testing.T) {
	r := newRotor(t)
	a := r.node("a")
	s := r.connect(a)
	r.says(s)
	old := r.active(x509Kind)
	r.begin(x509Kind)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	fresh := r.by(x509Kind, identity.AuthorityPrepared)
	if len(fresh) != 1 || r.active(x509Kind).ID != old.ID || r.srv.cfg.CA.Signs(x509Kind) != old.ID {
		t.Fatalf("prepared: %+v", fresh)
	}
	r.now = r.now.Add(time.Hour)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate) // the agent has not acknowledged it
	r.says(s, used(old.ID, 2, time.Time{}))
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate) // and those behind it may not have read it
	r.now = r.now.Add(ackSettle)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationRevoke)
	if r.active(x509Kind).ID != fresh[0].ID || r.srv.cfg.CA.Signs(x509Kind) != fresh[0].ID || r.authorityNow(x509Kind, old.ID).State != identity.AuthorityRetiring {
		t.Fatalf("%+v", r.state.Authorities())
	}
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationRevoke)
	r.says(s, used(fresh[0].ID, 2, time.Time{}))
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationDone)
	if got := r.authorityNow(x509Kind, old.ID); got.State != identity.AuthorityRevoked || got.SealedKey != nil || len(r.state.Bundle().X509) != 1 {
		t.Errorf("%+v", got)
	}
	if phases := r.audit.text(); !strings.Contains(phases, "activate") || !strings.Contains(phases, "done") {
		t.Error("it is not on record")
	}
	rev := r.state.Revision()
	r.led(x509Kind)
	if r.state.Revision() != rev {
		t.Error("it goes on after its end")
	}
}

// TestRotationSurvives: each write in turn is lost, or happens though the leader does not learn it; then another leads. Whatever
// was lost, it ends as it would have, and one authority signs at every moment.
func TestRotationSurvives(t *testing.T) {
	for _, kind := range []identity.AuthorityKind{x509Kind, jwtKind} {
		for _, happened := range []bool{false, true} {
			for n := 0; ; n++ {
				r := newRotor(t)
				old := r.active(kind)
				writes := 0
				r.begin(kind, func(x *identity.Rotation) { x.Taint = kind == x509Kind })
				r.state.fault = func() (lost, late error) {
					if writes++; writes != n+1 {
						return nil, nil
					}
					if happened {
						return nil, errLost
					}
					return errLost, nil
				}
				fell := false
				for range 12 {
					if err := r.lead(kind); err != nil {
						fell = true
						r.srv.rotations.say(kind, "") // another leads, who knows the state alone
						r.srv.rotations.whole = map[identity.AuthorityKind]whole{}
					}
					r.active(kind)
					r.now = r.now.Add(ackSettle)
				}
				r.at(kind, identity.RotationDone)
				if len(r.by(kind, identity.AuthorityPrepared)) != 0 || r.authorityNow(kind, old.ID).State != identity.AuthorityRevoked || r.active(kind).ID == old.ID || len(r.by(kind, identity.AuthorityRetiring)) != 0 {
					t.Errorf("%s, write %d lost (it happened: %v): %+v", kind, n, happened, r.state.Authorities())
				}
				if !fell {
					if n < 6 {
						t.Errorf("%s: a whole rotation in %d writes", kind, n)
					}
					break
				}
			}
		}
	}
}

// Without a record nothing is done.
func TestRotationUnrecorded(t *testing.T) {
	r := newRotor(t)
	step := func() error {
		_, err := r.srv.leadRotation(t.Context(), jwtKind)
		r.srv.takeAuthorities()
		return err
	}
	r.begin(jwtKind)
	for _, phase := range []identity.RotationPhase{identity.RotationPrepare, identity.RotationActivate, identity.RotationRevoke} {
		r.at(jwtKind, phase)
		if phase == identity.RotationActivate {
			if err := step(); err != nil { // all have it, and it settles
				t.Fatal(err)
			}
			r.now = r.now.Add(ackSettle)
		}
		rev := r.state.Revision()
		r.audit.set(func() { r.audit.down = errAuditDown })
		if err := step(); err == nil || !strings.Contains(err.Error(), errAuditDown.Error()) {
			t.Errorf("%s: %v", phase, err)
		}
		if r.state.Revision() != rev {
			t.Errorf("%s: something was written without a record", phase)
		}
		r.audit.set(func() { r.audit.down = nil })
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	r.at(jwtKind, identity.RotationDone)
}

// TestRotationDeadlines: past them it goes on without those that are missing, and says so.
func TestRotationDeadlines(t *testing.T) {
	r := newRotor(t)
	gone := r.node("gone")
	r.begin(x509Kind, func(x *identity.Rotation) { x.AckDeadline, x.UseDeadline = time.Hour, 30*time.Minute })
	r.led(x509Kind)
	r.now = r.now.Add(time.Hour - time.Second)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	r.now = r.now.Add(time.Second)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationRevoke)
	r.now = r.now.Add(30*time.Minute - time.Second)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationRevoke)
	r.now = r.now.Add(time.Second)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationDone)
	left := 0
	for _, e := range r.audit.find(audit.RotationChange, audit.Attempted) {
		if strings.Contains(e.Details.Get("without"), gone.ID) && strings.Contains(e.Details.Get("because"), "deadline") {
			left++
		}
	}
	if left != 2 {
		t.Errorf("who was left behind is recorded %d times", left)
	}

	r = newRotor(t)
	r.node("gone")
	r.begin(x509Kind) // no deadline
	r.led(x509Kind)
	r.now = r.now.Add(23 * time.Hour)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	r.begun(func(x *identity.Rotation) { x.Ignore = []string{gone.ID} })
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationDone)
	if e := r.audit.find(audit.RotationChange, audit.Attempted); !strings.Contains(fmt.Sprint(e), "told to ignore them") {
		t.Error("it is not on record that somebody was ignored")
	}
}

// begun changes the rotation that is under way.
func (r *rotor) begun(change func(*identity.Rotation)) {
	r.t.Helper()
	x := r.rotation(x509Kind)
	rev := x.Revision
	change(&x)
	if _, err := r.state.PutRotation(r.t.Context(), r.now, x, rev); err != nil {
		r.t.Fatal(err)
	}
}

// TestRotationNeedsTheLeader: a member that cannot make sure that it leads takes no step.
func TestRotationNeedsTheLeader(t *testing.T) {
	r := newRotor(t)
	r.begin(x509Kind)
	r.srv.cfg.Cluster.ReadBarrier = func(context.Context) error { return fmt.Errorf("%w: it leads no longer", identity.ErrUnavailable) }
	rev := r.state.Revision()
	if err := r.lead(x509Kind); err == nil || !strings.Contains(err.Error(), "leads no longer") || r.state.Revision() != rev {
		t.Errorf("%v", err)
	}
}

// TestRotationAtLevel1: what older members do not know is not begun.
func TestRotationAtLevel1(t *testing.T) {
	r := newRotor(t)
	r.state.level = 1
	r.srv.cfg.Rotating.Manual = false
	r.now = r.now.Add(300 * 24 * time.Hour)
	r.led(x509Kind)
	if len(r.state.Rotations()) != 0 {
		t.Error("begun")
	}
	ctx, trust := r.operator()
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509"}); err == nil || !strings.Contains(err.Error(), "every member runs this version") {
		t.Errorf("%v", err)
	}
}

// TestScheduledRotation: prepared at half of the authority's life, active at five sixths, and without everyone before the end.
func TestScheduledRotation(t *testing.T) {
	r := newRotor(t)
	r.srv.cfg.Rotating.Manual = false
	old := r.active(x509Kind)
	life := old.NotAfter.Sub(old.NotBefore)
	at := func(part float64) { r.now = old.NotBefore.Add(time.Duration(float64(life) * part)) }
	at(0.499)
	r.led(x509Kind)
	if len(r.state.Rotations()) != 0 {
		t.Fatal("begun too soon")
	}
	at(0.501)
	r.node("gone")
	r.led(x509Kind)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	if why := r.rotation(x509Kind).Why; !strings.Contains(why, "half of the life") {
		t.Error(why)
	}
	at(0.83)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	at(0.94)
	r.srv.hub.seen["spiffe://example.org/countersign/agent/join/gone"] = r.now // it comes and goes
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	at(0.952)
	r.srv.hub.seen["spiffe://example.org/countersign/agent/join/gone"] = r.now
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationRevoke) // better without it than nobody
}

func TestScheduledRotationInTime(t *testing.T) {
	for _, manual := range []bool{false, true} {
		r := newRotor(t)
		r.srv.cfg.Rotating.Manual = manual
		old := r.active(x509Kind)
		life := old.NotAfter.Sub(old.NotBefore)
		for _, part := range []float64{0.51, 0.6, 0.83} {
			r.now = old.NotBefore.Add(time.Duration(float64(life) * part))
			r.led(x509Kind)
			r.led(x509Kind)
		}
		if manual {
			if len(r.state.Rotations()) != 0 {
				t.Error("begun though it is for people to do")
			}
			continue
		}
		r.at(x509Kind, identity.RotationActivate)
		r.now = old.NotBefore.Add(time.Duration(float64(life) * 0.834))
		r.led(x509Kind)
		r.now = r.now.Add(ackSettle)
		r.led(x509Kind)
		r.at(x509Kind, identity.RotationDone)
	}
}

// Whoever rolls a scheduled rotation back is not given another one a moment later; but there is one before the end.
func TestScheduledRotationRolledBack(t *testing.T) {
	r := newRotor(t)
	r.srv.cfg.Rotating.Manual = false
	old := r.active(x509Kind)
	life := old.NotAfter.Sub(old.NotBefore)
	r.now = old.NotBefore.Add(life * 51 / 100)
	r.led(x509Kind)
	r.led(x509Kind)
	ctx, trust := r.operator()
	if _, err := trust.Rollback(ctx, &adminv1.RollbackRequest{Kind: "x509"}); err != nil {
		t.Fatal(err)
	}
	r.at(x509Kind, identity.RotationRolledBack)
	r.now = r.now.Add(life/pauseAfter - time.Minute)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationRolledBack)
	r.now = r.now.Add(time.Minute)
	r.led(x509Kind)
	if x := r.rotation(x509Kind); x.Ended() {
		t.Error("never again")
	}
}

// TestRollback in each phase.
func TestRollback(t *testing.T) {
	roll := func(r *rotor, force bool) error {
		ctx, trust := r.operator()
		_, err := trust.Rollback(ctx, &adminv1.RollbackRequest{Kind: "x509", Force: force})
		return err
	}
	for _, phase := range []string{"none", "prepare", "activate", "activate, and the leader is quicker", "activate, and it signs meanwhile", "revoke", "revoke, half done", "revoke, tainted", "done"} {
		t.Run(phase, func(t *testing.T) {
			r := newRotor(t)
			old := r.active(x509Kind)
			if phase != "none" {
				r.begin(x509Kind, func(x *identity.Rotation) { x.Taint = phase == "revoke, tainted" })
			}
			name, detail, _ := strings.Cut(phase, ", ")
			s := r.connect(r.node("a"))
			switch name {
			case "activate":
				r.led(x509Kind)
			case "revoke", "done":
				r.led(x509Kind)
				r.says(s, used(old.ID, 1, time.Time{}))
				r.led(x509Kind)
				r.now = r.now.Add(ackSettle)
				r.led(x509Kind)
				if name == "done" {
					r.says(s)
					r.led(x509Kind)
				}
				r.at(x509Kind, identity.RotationPhase(name))
			}
			fresh := r.rotationOrNone().New
			want := identity.RotationRolledBack
			var wantErr string
			switch phase {
			case "none", "done":
				wantErr = "no rotation"
			case "activate, and the leader is quicker":
				r.audit.set(func() {
					r.audit.before = func(e audit.Event) {
						if e.Action != audit.RotationChange || e.Details.Get("phase") != "rolledback" || len(r.by(x509Kind, identity.AuthorityPrepared)) > 0 {
							return
						}
						x := r.rotation(x509Kind)
						rev := x.Revision
						x.Phase = identity.RotationRolledBack
						r.state.PutRotation(t.Context(), r.now, x, rev)
					}
				})
			case "activate, and it signs meanwhile":
				r.audit.set(func() {
					r.audit.before = func(e audit.Event) {
						if e.Action == audit.AuthorityChange && e.Details.Get("to") == "revoked" {
							if err := r.state.ActivateAuthority(t.Context(), r.now, x509Kind, fresh, false); err != nil {
								t.Error(err)
							}
						}
					}
				})
				wantErr = "roll back again"
			case "revoke", "revoke, half done":
				want = identity.RotationRevoke
			case "revoke, tainted":
				wantErr = "--force"
			}
			if detail == "half done" {
				r.state.fault = func() (error, error) { r.state.fault = nil; return nil, errLost } // the old one signs, and that is all
				if err := roll(r, false); err == nil {
					t.Fatal("it did not notice")
				}
				if err := r.lead(x509Kind); err == nil || !strings.Contains(err.Error(), "roll back") {
					t.Errorf("the leader says: %v", err)
				}
			}
			err := roll(r, false)
			r.audit.set(func() { r.audit.before = nil })
			if wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), wantErr) {
					t.Fatalf("%v; want %q", err, wantErr)
				}
				if phase != "revoke, tainted" && phase != "activate, and it signs meanwhile" {
					return
				}
				if err := roll(r, true); err != nil {
					t.Fatal(err)
				}
				want = identity.RotationRevoke
			} else if err != nil {
				t.Fatal(err)
			}
			r.at(x509Kind, want)
			if got := r.active(x509Kind); got.ID != old.ID || !got.TaintedAt.IsZero() && phase != "revoke, tainted" {
				t.Errorf("%s signs", got.ID)
			}
			r.srv.takeAuthorities()
			for range 4 {
				r.says(s)
				r.led(x509Kind)
				r.now = r.now.Add(answerTime)
			}
			if want == identity.RotationRevoke {
				r.at(x509Kind, identity.RotationDone)
				if got := r.authorityNow(x509Kind, fresh); got.State != identity.AuthorityRevoked {
					t.Errorf("the new one is %s", got.State)
				}
			}
			if len(r.by(x509Kind, identity.AuthorityPrepared)) != 0 || len(r.state.Bundle().X509) != 1 || r.active(x509Kind).ID != old.ID {
				t.Errorf("%+v", r.state.Authorities())
			}
		})
	}
}

func (r *rotor) rotationOrNone() identity.Rotation {
	x, _ := r.srv.rotation(x509Kind)
	return x
}

// TestRotateTwice: of two who begin one, one does.
func TestRotateTwice(t *testing.T) {
	r := newRotor(t)
	ctx, trust := r.operator()
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509", DryRun: true}); err != nil || len(r.state.Rotations()) != 0 {
		t.Fatalf("a rehearsal: %v, %+v", err, r.state.Rotations())
	}
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509"}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, api.ToStatus(errOf(trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509"}))), codes.FailedPrecondition, "under way")
	// At the same moment: each looked before the other wrote.
	seen := r.srv.cfg.Rotating.Rotations
	r.srv.cfg.Rotating.Rotations = func() []identity.Rotation { return nil }
	wantCode(t, api.ToStatus(errOf(trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509"}))), codes.FailedPrecondition, "moved on")
	r.srv.cfg.Rotating.Rotations = seen
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "jwt"}); err != nil {
		t.Errorf("the other kind: %v", err)
	}
}

func errOf[T any](_ T, err error) error { return err }

// TestTaintNowMeanwhile: a compromise does not wait for a rotation that is under way.
func TestTaintNowMeanwhile(t *testing.T) {
	r := newRotor(t)
	ctx, trust := r.operator()
	old := r.active(x509Kind)
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509", Compromised: "another"}); err == nil || !strings.Contains(err.Error(), old.ID) {
		t.Errorf("%v", err)
	}
	gone := r.node("gone")
	r.begin(x509Kind, func(x *identity.Rotation) { x.Ignore = []string{"m7"} })
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	fresh := r.rotation(x509Kind).New
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509", Compromised: old.ID, Ignore: []string{"m8"}}); err != nil {
		t.Fatal(err)
	}
	if x := r.rotation(x509Kind); x.New != fresh || !x.Taint || x.AckDeadline != hastyAckDeadline || x.UseDeadline != hastyUseDeadline || len(x.Ignore) != 2 || !strings.Contains(x.Why, "compromised") {
		t.Errorf("hurried: %+v", x)
	}
	r.now = r.now.Add(hastyAckDeadline)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationRevoke)
	if got := r.authorityNow(x509Kind, old.ID); got.State != identity.AuthorityTainted || got.Spread < time.Second {
		t.Errorf("%+v", got)
	}
	// And the one that has just come is compromised as well, while the agent that is gone keeps the first from ending.
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509", Compromised: fresh}); err != nil {
		t.Fatal(err)
	}
	x := r.rotation(x509Kind)
	if x.Phase != identity.RotationPrepare || x.Old != fresh || x.New != "" || !strings.Contains(x.Why, old.ID) {
		t.Errorf("begun anew: %+v", x)
	}
	r.led(x509Kind)
	r.now = r.now.Add(hastyAckDeadline)
	r.led(x509Kind)
	if got := r.active(x509Kind).ID; got == fresh || got == old.ID || r.authorityNow(x509Kind, fresh).State != identity.AuthorityTainted || r.authorityNow(x509Kind, old.ID).State != identity.AuthorityTainted {
		t.Errorf("%+v", r.state.Authorities())
	}
	_ = gone
}

// TestTaintOfARotation: what one waits for may be hurried by its name.
func TestTaintOfARotation(t *testing.T) {
	r := newRotor(t)
	ctx, trust := r.operator()
	s := r.connect(r.node("a"))
	if _, err := trust.TaintAuthority(ctx, &adminv1.AuthorityRequest{Kind: "x509"}); err == nil {
		t.Error("nothing is retiring")
	}
	old := r.active(x509Kind)
	r.begin(x509Kind)
	r.led(x509Kind)
	wantCode(t, api.ToStatus(errOf(trust.TaintAuthority(ctx, &adminv1.AuthorityRequest{Kind: "x509", Id: old.ID}))), codes.FailedPrecondition, "under way")
	r.says(s, used(old.ID, 600, time.Time{}))
	r.led(x509Kind)
	r.now = r.now.Add(ackSettle)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationRevoke)
	if _, err := trust.TaintAuthority(ctx, &adminv1.AuthorityRequest{Kind: "x509", Id: old.ID}); err != nil {
		t.Fatal(err)
	}
	r.led(x509Kind)
	if got := r.authorityNow(x509Kind, old.ID); got.State != identity.AuthorityTainted || got.Spread != 2*time.Second {
		t.Errorf("%+v", got)
	}
}

// TestRotationInAToken: where keys are made by people, none is made of the key that is there.
func TestRotationInAToken(t *testing.T) {
	r := newRotor(t)
	ctx, trust := r.operator()
	key, _ := newKey(t)
	r.srv.cfg.X509Key = r.keyAt(key, "pkcs11:object=same")
	for _, other := range []func(string) bool{nil, func(string) bool { return false }} {
		r.srv.cfg.NewX509Key = other
		wantCode(t, api.ToStatus(errOf(trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509"}))), codes.FailedPrecondition, "ca.old_keys")
		wantCode(t, api.ToStatus(errOf(trust.PrepareAuthority(ctx, &adminv1.AuthorityRequest{Kind: "x509"}))), codes.FailedPrecondition, "ca.old_keys")
	}
	// Begun at a member that has another key; the leader has not.
	r.begin(x509Kind)
	before := len(r.audit.find(audit.AuthorityCreate, audit.Attempted))
	if err := r.lead(x509Kind); err == nil || !strings.Contains(err.Error(), "ca.old_keys") {
		t.Errorf("%v", err)
	}
	if len(r.audit.find(audit.AuthorityCreate, audit.Attempted)) != before || len(r.by(x509Kind, identity.AuthorityPrepared)) != 0 {
		t.Error("an authority with the same key")
	}
	r.srv.cfg.NewX509Key = func(uri string) bool { return true }
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	if got := r.by(x509Kind, identity.AuthorityPrepared); len(got) != 1 || got[0].KeyURI != "pkcs11:object=same" {
		t.Errorf("%+v", got)
	}
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "jwt"}); err != nil {
		t.Errorf("a JWT key is not in the token: %v", err)
	}
	// Nor does it sign before this member can open it.
	r.now = r.now.Add(time.Hour)
	r.led(x509Kind)
	r.at(x509Kind, identity.RotationActivate)
	wire := r.srv.rotationToWire(ctx, r.rotation(x509Kind))
	if wire.Gate == nil || len(wire.Gate.Waiting) != 1 || !strings.Contains(wire.Gate.Waiting[0].Because, "could not sign under it") {
		t.Errorf("%v", wire)
	}
}

// TestByHand: each step is refused while somebody would be left behind, and says who; --ignore and --force are on record.
func TestByHand(t *testing.T) {
	r := newRotor(t)
	ctx, trust := r.operator()
	gone := r.node("gone")
	p, err := trust.PrepareAuthority(ctx, &adminv1.AuthorityRequest{Kind: "x509"})
	if err != nil || p.State != "prepared" || p.Gate.Open {
		t.Fatalf("%v, %v", p, err)
	}
	wantCode(t, api.ToStatus(errOf(trust.PrepareAuthority(ctx, &adminv1.AuthorityRequest{Kind: "x509"}))), codes.AlreadyExists, p.Id)
	activate := func(req *adminv1.AuthorityRequest) error {
		req.Kind = "x509"
		return api.ToStatus(errOf(trust.ActivateAuthority(ctx, req)))
	}
	wantCode(t, activate(&adminv1.AuthorityRequest{}), codes.FailedPrecondition, gone.ID, "--ignore", "--force")
	r.now = r.now.Add(ackSettle)
	if dry, err := trust.ActivateAuthority(ctx, &adminv1.AuthorityRequest{Kind: "x509", DryRun: true}); err != nil || dry.Gate.Open || len(dry.Gate.Waiting) != 1 || !dry.DryRun {
		t.Errorf("%v, %v", dry, err)
	}
	wantCode(t, activate(&adminv1.AuthorityRequest{Ignore: []string{"spiffe://example.org/another"}}), codes.FailedPrecondition, gone.ID)
	wantCode(t, activate(&adminv1.AuthorityRequest{Id: "unknown"}), codes.NotFound, p.Id)
	wantCode(t, activate(&adminv1.AuthorityRequest{Id: strings.Repeat("x", maxKeyID+1)}), codes.InvalidArgument, "bytes")
	wantCode(t, activate(&adminv1.AuthorityRequest{Ignore: []string{strings.Repeat("x", 2049)}}), codes.InvalidArgument, "2049")
	old := r.active(x509Kind)
	if err := activate(&adminv1.AuthorityRequest{Ignore: []string{gone.ID}}); err != nil {
		t.Fatal(err)
	}
	r.srv.takeAuthorities()
	revoke := func(req *adminv1.AuthorityRequest) error {
		req.Kind = "x509"
		return api.ToStatus(errOf(trust.RevokeAuthority(ctx, req)))
	}
	wantCode(t, revoke(&adminv1.AuthorityRequest{}), codes.FailedPrecondition, gone.ID)
	if r.authorityNow(x509Kind, old.ID).State != identity.AuthorityRetiring {
		t.Error("revoked all the same")
	}
	wantCode(t, revoke(&adminv1.AuthorityRequest{Id: p.Id}), codes.FailedPrecondition, "active")
	if err := revoke(&adminv1.AuthorityRequest{Force: true}); err != nil || r.authorityNow(x509Kind, old.ID).State != identity.AuthorityRevoked {
		t.Errorf("%v", err)
	}
}

// TestRotationRequests: what no request can be.
func TestRotationRequests(t *testing.T) {
	r := newRotor(t)
	ctx, trust := r.operator()
	many := make([]string, identity.MaxIgnored+1)
	for i := range many {
		many[i] = fmt.Sprint("agent-", i)
	}
	for name, req := range map[string]*adminv1.RotateRequest{
		"want x509 or jwt": {Kind: "wit"},
		"at the most 1000": {Kind: "x509", Ignore: many},
		"0 bytes":          {Kind: "x509", Ignore: []string{""}},
		"deadline":         {Kind: "x509", AckDeadline: durationpb.New(-time.Second)},
		"a deadline":       {Kind: "x509", UseDeadline: &durationpb.Duration{Seconds: 1, Nanos: -1}},
	} {
		wantCode(t, api.ToStatus(errOf(trust.Rotate(ctx, req))), codes.InvalidArgument, name)
	}
	wantCode(t, api.ToStatus(errOf(trust.ChangeRotation(ctx, &adminv1.ChangeRotationRequest{Kind: "x509", Ignore: []string{"m2"}}))), codes.FailedPrecondition, "no rotation")
	wantCode(t, api.ToStatus(errOf(trust.GetRotation(ctx, &adminv1.RotationRequest{Kind: "wit"}))), codes.InvalidArgument, "wit")
	if _, err := trust.Rotate(ctx, &adminv1.RotateRequest{Kind: "x509", Ignore: []string{"b", "a", "b"}, AckDeadline: durationpb.New(0)}); err != nil {
		t.Fatal(err)
	}
	got, err := trust.ChangeRotation(ctx, &adminv1.ChangeRotationRequest{Kind: "x509", Ignore: []string{"c"}, UseDeadline: durationpb.New(time.Hour)})
	if err != nil || strings.Join(got.Ignore, " ") != "a b c" || r.rotation(x509Kind).UseDeadline != time.Hour || r.rotation(x509Kind).AckDeadline != 0 {
		t.Errorf("%v, %v", got, err)
	}
	if len(r.state.Rotations()) != 1 {
		t.Errorf("%+v", r.state.Rotations())
	}
}

// TestAckBounds: one agent cannot name more than a few authorities, nor long ones, nor speak for the future.
func TestAckBounds(t *testing.T) {
	r := newRotor(t)
	s := r.connect(r.node("a"))
	var uses []*nodev1.Ack_Use
	for i := range maxUses + 1 {
		uses = append(uses, used(fmt.Sprint("authority-", i), 1, time.Time{}))
	}
	if err := r.srv.takeAck(s, &nodev1.Ack{Tells: true, Uses: uses}); err == nil || !strings.Contains(err.Error(), "at the most 64") {
		t.Errorf("%v", err)
	}
	if err := r.srv.takeAck(s, &nodev1.Ack{Tells: true, Uses: []*nodev1.Ack_Use{used(strings.Repeat("x", maxKeyID+1), 1, time.Time{})}}); err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("%v", err)
	}
	if s.used().tells {
		t.Error("some of it was taken")
	}
	if err := r.srv.takeAck(s, &nodev1.Ack{Tells: true, Uses: uses[:maxUses], Since: timestamppb.New(r.now.Add(1000 * time.Hour))}); err != nil {
		t.Error(err)
	}
}

// TestReport: only members that are on the list are told, of what is asked for, all agents in bounded messages.
func TestReport(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.IssuedUntil = map[string]time.Time{} }).start(t)
	old := ""
	for _, a := range w.state.Authorities() {
		if a.Kind == x509Kind {
			old = a.ID
		}
	}
	for i := range partyChunk + 1 {
		s, err := w.srv.hub.open(fmt.Sprint("spiffe://example.org/countersign/agent/join/", i), "test")
		if err != nil {
			t.Fatal(err)
		}
		s.use(uses{tells: true, by: map[string]use{old: {svids: uint32(i)}}})
	}
	_, cert := w.agent(t, "a", "")
	ask := func(c *memberv1.ReportRequest, as string) (n, messages int, err error) {
		conn := w.dial(t, w.certificate(t, "/countersign/member/m1"))
		if as == "agent" {
			conn = w.dial(t, cert)
		}
		stream, err := memberv1.NewMemberClient(conn).Report(testContext(t), c)
		for err == nil {
			var m *memberv1.ReportResponse
			if m, err = stream.Recv(); err == nil {
				if (messages == 0) != (m.Self != nil) || len(m.Parties) > partyChunk {
					t.Errorf("message %d: %v, %d parties", messages, m.Self, len(m.Parties))
				}
				messages++
				n += len(m.Parties)
			}
		}
		return n, messages, err
	}
	n, messages, err := ask(&memberv1.ReportRequest{Kind: "x509", Authority: old}, "member")
	if n != partyChunk+1 || messages != 2 {
		t.Errorf("%d parties in %d messages: %v", n, messages, err)
	}
	for words, req := range map[string]*memberv1.ReportRequest{"kind": {Kind: "wit"}, "bytes": {Kind: "x509", Authority: strings.Repeat("x", maxKeyID+1)}} {
		_, messages, err := ask(req, "member")
		wantCode(t, err, codes.InvalidArgument, words)
		if messages != 0 {
			t.Error("an answer all the same")
		}
	}
	_, messages, err = ask(&memberv1.ReportRequest{Kind: "x509"}, "agent")
	if messages != 0 {
		t.Errorf("an agent is told: %v", err)
	}
	wantCode(t, err, codes.PermissionDenied)
}

// TestManyWatchOneCensus: whoever may look may not have the members asked as often as he likes.
func TestManyWatchOneCensus(t *testing.T) {
	r := newRotor(t)
	asked := 0
	r.other("m2", func(*memberv1.ReportResponse_Self) { asked++ })
	r.begin(x509Kind)
	r.led(x509Kind)
	ctx, trust := r.operator()
	began := time.Now()
	asked = 0
	for range 50 {
		got, err := trust.GetRotation(ctx, &adminv1.RotationRequest{Kind: "x509"})
		if err != nil || len(got.Rotations) != 1 || len(got.Rotations[0].Gate.GetWaiting()) == 0 {
			t.Fatalf("%v, %v", got, err)
		}
	}
	if most := int(time.Since(began)/rotateLook) + 1; asked > most {
		t.Errorf("another member was asked %d times", asked)
	}
	asked = 0
	if _, err := trust.ChangeRotation(ctx, &adminv1.ChangeRotationRequest{Kind: "x509", Ignore: []string{"m2"}}); err != nil || asked != 1 {
		t.Errorf("after a change it is asked anew: %v, %d", err, asked)
	}
}
