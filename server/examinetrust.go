package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"countersign.io/countersign/api"
	"countersign.io/countersign/identity"
)

// partners looks whether the trust domains that ours federates with can be read. Only the member that leads asks them.
func (x *examination) partners(ctx context.Context) {
	c := &x.cfg.Federation
	if !c.on() {
		return
	}
	all := c.Federations()
	if len(all) == 0 {
		return
	}
	known, err := x.refreshStates(ctx)
	if err != nil {
		x.find(isWarning, "cluster", "whether partners answer is not known: "+infoText(err.Error()), "see to the member that leads, and check again")
	}
	for _, f := range all {
		where := "trust domain " + f.TrustDomain
		held := c.Federated(f.TrustDomain)
		if held == nil {
			x.find(isError, where, "there is no bundle of it: nothing of it is trusted", "countersign federation refresh "+f.TrustDomain+" says why")
		}
		st := known[f.TrustDomain]
		if st == nil {
			continue
		}
		if st.Failures > 0 {
			since := "it has not been read since this leader leads"
			severity := isWarning
			if at := api.TimeFromWire(st.LastSuccess); !at.IsZero() {
				since = "it was read last at " + at.UTC().Format(time.RFC3339)
			}
			if st.Failures < toleratedFailures {
				severity = isNotice // the next attempt may well do
			}
			x.find(severity, where, fmt.Sprintf("its bundle endpoint cannot be read, %d times in a row (%s): %s", st.Failures, since, st.LastError),
				"see that its URL is right and reachable from every member (countersign federation show "+f.TrustDomain+"), and ask its operators")
		}
		if st.Warning != "" {
			x.find(isWarning, where, "what it publishes is odd: "+st.Warning, "ask its operators")
		}
	}
}

// toleratedFailures is how many attempts in a row may fail before that is more than a notice.
const toleratedFailures = 3

// stuck looks whether a rotation that is under way waits for something that does not come by itself.
func (x *examination) stuck(ctx context.Context) {
	if !x.rotates() {
		return
	}
	for _, kind := range []identity.AuthorityKind{identity.AuthorityX509, identity.AuthorityJWT} {
		r, ok := x.rotation(kind)
		if !ok || r.Ended() {
			continue
		}
		where, age := string(kind)+" rotation", x.now.Sub(r.PhaseAt)
		w := x.rotationToWire(ctx, r)
		if w.Problem != "" {
			x.find(isWarning, where, "it does not go on: "+w.Problem, "see to that; countersign bundle status shows how it stands")
			continue
		}
		var who []string
		for _, p := range w.GetGate().GetWaiting() {
			if p.Until == nil {
				who = append(who, p.Name)
			}
		}
		if len(who) == 0 || age < rotationTime {
			continue
		}
		slices.Sort(who)
		names := strings.Join(who[:min(len(who), 3)], ", ")
		if more := len(who) - 3 + int(w.Gate.More); more > 0 {
			names += fmt.Sprintf(" and %d more", more)
		}
		x.find(isWarning, where, fmt.Sprintf("in its phase %s it has waited for %v for %s", w.Phase, age.Round(time.Minute), names), "bring those up, or countersign bundle change --kind "+string(kind)+" --ignore them")
	}
}
