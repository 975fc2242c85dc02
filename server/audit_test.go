package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// fakeAudit keeps events, and fails when told to.
type fakeAudit struct {
	mu     sync.Mutex
	events []audit.Event
	down   error
}

func (f *fakeAudit) Record(_ context.Context, events ...audit.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down != nil {
		return f.down
	}
	f.events = append(f.events, events...)
	return nil
}

func (f *fakeAudit) Note(_ string, e audit.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, e)
}

func (f *fakeAudit) Query(_ context.Context, _ audit.Query, yield func([]byte) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.events {
		if err := yield(fmt.Appendf(nil, "%s %s", e.Action, e.Outcome)); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeAudit) Ready() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.down
}

func (f *fakeAudit) fail(t testing.TB, down bool) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = nil
	if down {
		f.down = fmt.Errorf("%w: the audit log is down", identity.ErrUnavailable)
	}
}

// find returns the events of an action with an outcome.
func (f *fakeAudit) find(action audit.Action, outcome audit.Outcome) []audit.Event {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.events), func(e audit.Event) bool { return e.Action != action || e.Outcome != outcome })
}

// TestEveryRPCHasAnAuditRule: whatever any of the three servers answers.
func TestEveryRPCHasAnAuditRule(t *testing.T) {
	w := newWorld(t)
	n := 0
	for _, r := range slices.Concat(rpcsOf(w.srv.agents), rpcsOf(w.srv.guests), rpcsOf(w.srv.admin)) {
		n++
		rule, ok := auditRuleFor(r.method)
		if !ok || rule.action == "" || rule.mode == 0 {
			t.Errorf("%s has no audit rule", r.method)
			continue
		}
		if strings.Contains(r.method, ".Admin/") && (rule.mode == auditNever || rule.mode == auditWalk || !strings.HasPrefix(string(rule.action), "admin.")) {
			t.Errorf("%s is an operator's: its rule is %v %s", r.method, rule.mode, rule.action)
		}
		if rule.mode == auditNever && strings.HasPrefix(r.method, "/countersign.") {
			t.Errorf("%s is never recorded", r.method)
		}
		if r.streaming && (rule.on != nil || rule.with != nil) {
			t.Errorf("%s is a stream: its first message is not at hand when it is recorded", r.method)
		}
	}
	if n < 40 {
		t.Fatalf("only %d RPCs", n)
	}
	if _, ok := auditRuleFor("/countersign.admin.v1.Admin/New"); ok {
		t.Fatal("a method that is not there has a rule")
	}
}
