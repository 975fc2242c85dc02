//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/integration/history"
)

// faultRun is the account of one fault.
type faultRun struct {
	*faultWorld
	t        *testing.T
	n        int
	ctx      context.Context // of the clients
	wg       sync.WaitGroup
	history  *history.Recorder
	ledger   *history.Ledger
	registry registers

	mu        sync.Mutex // guards what follows
	healedAt  time.Time
	acked     time.Time     // last acknowledged write, by anybody
	gap       time.Duration // longest time without one
	issued    map[string]int
	wrote     map[string]int // acknowledged, by the member that was asked
	failures  []string
	authority []string
	jwts      int
	slowest   time.Duration // JWT-SVID through the agent
}

// runFault breaks something under a full load, and checks everything that is promised whatever breaks. fault returns when it
// is over and what it killed runs again; it calls healed when nothing was broken any more. What the fault itself makes
// impossible, it takes down.
func runFault(t *testing.T, f *faultWorld, name string, fault func(t *testing.T, r *faultRun)) {
	t.Run(name, func(t *testing.T) {
		if f.stuck {
			t.Skip("the cluster did not recover from an earlier fault")
		}
		f.stuck = true
		f.runs++
		r := &faultRun{faultWorld: f, t: t, n: f.runs, history: history.NewRecorder(), ledger: history.NewLedger(), issued: map[string]int{}, wrote: map[string]int{}}
		r.registry.prefix = fmt.Sprintf("run-%d", r.n)
		ctx, stop := context.WithCancel(f.ctx)
		defer func() { stop(); r.wg.Wait() }()
		r.ctx = ctx
		r.start()
		r.progress("before the fault")
		f.eventually("the workload has most of its SVID's life before it", func() error {
			f.gaps.mu.Lock()
			defer f.gaps.mu.Unlock()
			if left := time.Until(f.gaps.until); left < 4*time.Second {
				return fmt.Errorf("%v are left", left)
			}
			return nil
		})
		r.mu.Lock()
		r.gap = 0
		r.mu.Unlock()
		began := time.Now()
		fault(t, r)
		r.mu.Lock()
		if r.healedAt.IsZero() {
			r.healedAt = time.Now()
		}
		healed := r.healedAt
		r.mu.Unlock()
		broken := healed.Sub(began)
		r.progress("after the fault")
		recovery := time.Since(healed)
		f.stuck = false
		stop()
		r.wg.Wait()
		r.verdict(name, broken, recovery)
	})
}

// healed notes that nothing is broken from now on.
func (r *faultRun) healed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.healedAt = time.Now()
}

// hold lets the fault last.
func (r *faultRun) hold(d time.Duration) { pause(r.ctx, d) }

// start puts the clients to work.
func (r *faultRun) start() {
	for _, m := range r.Members {
		conn, err := r.client.Dial(m.Address)
		if err != nil {
			r.t.Fatal(err)
		}
		r.wg.Go(func() { defer conn.Close(); r.keepIssuing(m, conn) })
		r.wg.Go(func() { r.keepWriting(m) })
		r.wg.Go(func() { r.keepLooking(m) })
	}
	r.wg.Go(r.keepFetching)
	for client := range 2 * len(r.Members) {
		r.wg.Go(func() { r.keepAsking(client) })
	}
}

func (r *faultRun) fail(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

func (r *faultRun) keepIssuing(m *cluster.Member, conn grpc.ClientConnInterface) {
	c := workloadv1.NewWorkloadClient(conn)
	for {
		life := r.stands[m.Name].alive(r.ctx)
		if life == nil {
			return
		}
		for pause(life, 10*time.Millisecond) && r.ctx.Err() == nil {
			err := r.issue(r.ctx, m, c)
			if err != nil && (life.Err() != nil || r.ctx.Err() != nil) {
				continue
			}
			if err != nil {
				r.fail("%s did not issue: %v", m.Name, err)
				continue
			}
			r.mu.Lock()
			r.issued[m.Name]++
			r.mu.Unlock()
		}
	}
}

func (r *faultRun) keepFetching() {
	for n := 0; ; {
		life := r.agentUp.alive(r.ctx)
		if life == nil {
			return
		}
		c, err := workloadapi.New(life, workloadapi.WithAddr(r.agent.Endpoint()))
		if err != nil {
			r.fail("%v", err)
			return
		}
		for ; pause(life, 20*time.Millisecond) && r.ctx.Err() == nil; n++ {
			began := time.Now()
			err := r.jwt(r.ctx, c, n)
			if life.Err() != nil || r.ctx.Err() != nil {
				continue
			}
			if err != nil {
				r.fail("the agent gave no JWT-SVID: %v", err)
				continue
			}
			r.mu.Lock()
			r.jwts++
			r.slowest = max(r.slowest, time.Since(began))
			r.mu.Unlock()
		}
		c.Close()
	}
}

// keepLooking asks a member for its signing keys all the time.
func (r *faultRun) keepLooking(m *cluster.Member) {
	for pause(r.ctx, 200*time.Millisecond) {
		if err := r.look(m); err != nil {
			r.mu.Lock()
			r.authority = append(r.authority, m.Name+": "+err.Error())
			r.mu.Unlock()
		}
	}
}

// look returns an error if the member has two active authorities of a kind.
func (r *faultRun) look(m *cluster.Member) error {
	ctx, cancel := context.WithTimeout(r.ctx, 3*time.Second)
	defer cancel()
	if res, err := r.admins[m.Name].ListAuthorities(ctx, &adminv1.Empty{}); err == nil {
		var list []history.Authority
		for _, a := range res.Authorities {
			list = append(list, history.Authority{ID: a.Id, Kind: a.Kind, State: a.State})
		}
		return history.OneActive(list)
	}
	// Nothing is rotated in these tests: what is in the bundle is active.
	res, err := r.admins[m.Name].GetBundle(ctx, &adminv1.Empty{})
	if err != nil {
		return nil // nothing seen
	}
	if b := res.Bundle; len(b.X509Authorities) > 1 || len(b.JwtAuthorities) > 1 {
		return fmt.Errorf("%d x509 and %d jwt authorities in the bundle", len(b.X509Authorities), len(b.JwtAuthorities))
	}
	return nil
}

// ack notes an acknowledged write.
func (r *faultRun) ack(m string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if !r.acked.IsZero() {
		r.gap = max(r.gap, now.Sub(r.acked))
	}
	r.acked = now
	r.wrote[m]++
}

const writeTime = 3 * time.Second

// keepWriting creates entries through one member and deletes every fourth again.
func (r *faultRun) keepWriting(m *cluster.Member) {
	c := r.admins[m.Name]
	for n := 0; pause(r.ctx, 15*time.Millisecond); n++ {
		e := &adminv1.Entry{SpiffeId: fmt.Sprintf("spiffe://%s/run-%d/%s/%d", trustDomain, r.n, m.Name, n), Selectors: []string{fmt.Sprint("unix:uid:", 1000000+n), "agent:kind:join_token"}}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), writeTime)
		made, err := c.CreateEntry(ctx, e)
		cancel()
		switch {
		case err == nil:
			r.ledger.Made(e.SpiffeId, made.Id)
			r.ack(m.Name)
		case notDone(err):
			r.ledger.Refused(e.SpiffeId, err.Error())
			continue
		default:
			r.ledger.Unsure(e.SpiffeId)
			continue
		}
		if n%4 != 0 {
			continue
		}
		ctx, cancel = context.WithTimeout(context.WithoutCancel(r.ctx), writeTime)
		_, err = c.DeleteEntry(ctx, &adminv1.NameRequest{Name: made.Id})
		cancel()
		switch {
		case err == nil:
			r.ledger.Deleted(e.SpiffeId)
			r.ack(m.Name)
		case !notDone(err):
			r.ledger.Unsure(e.SpiffeId)
		}
	}
}

// progress waits until everything that is not down has done more: recovered.
func (r *faultRun) progress(when string) {
	r.t.Helper()
	r.mu.Lock()
	jwts, issued, wrote := r.jwts, clone(r.issued), clone(r.wrote)
	r.mu.Unlock()
	deadline := time.Now().Add(60 * time.Second)
	for {
		err := r.moved(jwts, issued, wrote)
		if err == nil {
			return
		}
		if time.Now().After(deadline) || !pause(r.ctx, 10*time.Millisecond) {
			r.t.Fatalf("%s: nothing moves: %v", when, err)
		}
	}
}

func (r *faultRun) moved(jwts int, issued, wrote map[string]int) error {
	isUp := func(s *stand) bool { s.mu.Lock(); defer s.mu.Unlock(); return s.life != nil }
	r.mu.Lock()
	defer r.mu.Unlock()
	if isUp(r.agentUp) && r.jwts-jwts < 3 {
		return errors.New("no new JWT-SVIDs")
	}
	for _, m := range r.Members {
		if !isUp(r.stands[m.Name]) {
			continue
		}
		if r.issued[m.Name]-issued[m.Name] < 5 || r.wrote[m.Name]-wrote[m.Name] < 5 {
			return fmt.Errorf("%s: %d issued, %d written", m.Name, r.issued[m.Name]-issued[m.Name], r.wrote[m.Name]-wrote[m.Name])
		}
	}
	return nil
}

// verdict reads everything once more from every member, and writes the line of the table.
func (r *faultRun) verdict(name string, broken, recovery time.Duration) {
	t := r.t
	lost, wrong := r.compare()
	for i, s := range append(lost, wrong...) {
		if i < 10 {
			t.Error(s)
		}
	}
	r.readAll()
	v := r.history.Check(60 * time.Second)
	linearizable := "yes"
	if v.Unchecked {
		linearizable = "not decided"
		t.Errorf("the history could not be decided in time: %s", v.Why)
	} else if !v.Linearizable {
		linearizable = "NO"
		t.Error(v.Why)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, s := range append(r.failures, r.authority...) {
		if i < 10 {
			t.Error(s)
		}
	}
	r.gaps.mu.Lock()
	gone := r.gaps.gone
	r.gaps.gone = nil
	r.gaps.mu.Unlock()
	for _, s := range append(gone, r.serials.Twice()...) {
		t.Error(s)
	}
	issued := 0
	for _, n := range r.issued {
		issued += n
	}
	report(t, name, fmt.Sprintf("%.1f s", broken.Seconds()), fmt.Sprintf("%d / %d", r.ledger.Acknowledged(), len(lost)), fmt.Sprintf("%d: %s", r.history.Len(), linearizable),
		fmt.Sprintf("%d / %d", issued+r.jwts, len(r.failures)), fmt.Sprintf("%.1f s", r.gap.Seconds()), fmt.Sprintf("%.1f s", recovery.Seconds()))
}

// report prints a line of docs/RELIABILITY.md, and appends it to the file that COUNTERSIGN_FAULTS names.
func report(t *testing.T, cells ...string) {
	t.Helper()
	line := "| " + strings.Join(cells, " | ") + " |"
	t.Log("RESULT " + line)
	if path := os.Getenv("COUNTERSIGN_FAULTS"); path != "" {
		out, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		fmt.Fprintf(out, "%s %s\n", t.Name(), line)
	}
}

// compare compares every member that is up with the ledger.
func (r *faultRun) compare() (lost, wrong []string) {
	for _, m := range r.Members {
		r.t.Helper()
		deadline := time.Now().Add(30 * time.Second)
		for { // a member that was away may still be taking up the last writes
			there, err := r.list(m)
			l, w := r.ledger.Compare(there)
			if err == nil && len(l) == 0 || time.Now().After(deadline) {
				if err != nil {
					l = append(l, fmt.Sprintf("%s cannot be asked: %v", m.Name, err))
				}
				for i := range l {
					l[i] = m.Name + ": " + l[i]
				}
				lost, wrong = append(lost, l...), append(wrong, w...)
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return lost, wrong
}

func (r *faultRun) list(m *cluster.Member) (map[string]string, error) {
	out := map[string]string{}
	ctx, cancel := context.WithTimeout(r.faultWorld.ctx, 10*time.Second)
	defer cancel()
	for page := ""; ; {
		res, err := r.admins[m.Name].ListEntries(ctx, &adminv1.ListRequest{PageToken: page, PageSize: 1000})
		if err != nil {
			return nil, err
		}
		for _, e := range res.Entries {
			out[e.SpiffeId] = e.Id
		}
		if page = res.NextPageToken; page == "" {
			return out, nil
		}
	}
}
