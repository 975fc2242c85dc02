package identity

import (
	"fmt"
	"strings"
	"time"
)

// AdminRole is what an administrator who is not on a member's own machine may do. A higher role includes the lower ones; the
// empty one is none.
type AdminRole string

// The roles, the lowest first.
const (
	AdminReader   AdminRole = "reader"   // sees everything that is no secret
	AdminOperator AdminRole = "operator" // and decides which workloads and nodes have identities
	AdminSecurity AdminRole = "security" // and whom the trust domain trusts: keys, members, other clusters, admins
)

func (r AdminRole) rank() int {
	switch r {
	case AdminReader:
		return 1
	case AdminOperator:
		return 2
	case AdminSecurity:
		return 3
	}
	return 0
}

// Includes reports whether the role is at least the needed one. No role includes one that does not exist, or the empty one.
func (r AdminRole) Includes(need AdminRole) bool { return need.rank() > 0 && r.rank() >= need.rank() }

// Higher is the higher of two roles.
func (r AdminRole) Higher(o AdminRole) AdminRole {
	if o.rank() > r.rank() {
		return o
	}
	return r
}

// ParseAdminRole accepts a role by its name.
func ParseAdminRole(s string) (AdminRole, error) {
	if r := AdminRole(s); r.rank() > 0 {
		return r, nil
	}
	return "", fmt.Errorf("%w: role %q: want %s, %s or %s", ErrInvalid, s, AdminReader, AdminOperator, AdminSecurity)
}

// Power is the role that the entry gives to whoever has its SPIFFE ID; empty for nearly all entries. Admin alone, which is older
// than roles, means the highest.
func (e *Entry) Power() AdminRole {
	switch {
	case e.AdminRole != "":
		return e.AdminRole
	case e.Admin:
		return AdminSecurity
	}
	return ""
}

// powerSlack is what the clocks of the members that issue and that made the entry may differ by, with the second that is cut off in
// certificates.
const powerSlack = 2 * time.Second

// Empowers reports whether an SVID that was issued at that time has the entry's power. One from before does not: whoever could have
// the ID while it was a workload's like any other must not become an admin by waiting.
func (e *Entry) Empowers(issued time.Time) bool {
	since := e.PowerSince
	if since.IsZero() {
		since = e.CreatedAt // by a version that did not keep it
	}
	return !issued.Add(powerSlack).Before(since)
}

// Since sets when the entry's power began, at now unless the one that it takes the place of gave the same ID as much.
func (e *Entry) Since(old *Entry, now time.Time) {
	switch {
	case e.Power() == "":
		e.PowerSince = time.Time{}
	case old != nil && old.SPIFFEID == e.SPIFFEID && old.Power().Includes(e.Power()):
		e.PowerSince = old.PowerSince
	default:
		e.PowerSince = now
	}
}

// checkPower refuses entries by which somebody could make himself an admin.
func checkPower(e *Entry, bad func(format string, args ...any)) {
	if e.AdminRole != "" && e.AdminRole.rank() == 0 {
		_, err := ParseAdminRole(string(e.AdminRole))
		bad("%v", err)
		return
	}
	if e.Admin && e.AdminRole != "" && e.AdminRole != AdminSecurity {
		bad("admin and the role %s: admin alone means %s, so leave one of the two out", e.AdminRole, AdminSecurity)
	}
	if e.Power() == "" {
		return
	}
	if t, err := ParseTemplate(e.SPIFFEID); err == nil && len(t.Names()) > 0 {
		bad("SPIFFE ID %q of an admin entry has placeholders: one identity gets the power, so write its ID out", e.SPIFFEID)
	}
	for _, s := range e.Selectors {
		if beyondJoinToken(s) {
			return
		}
	}
	bad("the selectors of an admin entry rest on a join token: whoever may make tokens for agents could become that admin; name the agent (agent:id:...), a pod (k8s:...), or agents that attest by other means (agent:kind:kube, agent:kind:x509pop)")
}

// beyondJoinToken reports whether a selector is proven by more than that somebody was given a join token for an agent: operators
// may make those, with any kube node they say.
func beyondJoinToken(s Selector) bool {
	switch name := s.Name(); {
	case strings.HasPrefix(name, "k8s:"), name == "agent:id", name == "agent:x509-cn":
		return true
	case name == "agent:kind":
		return s.Value() != "join_token"
	}
	return false
}
