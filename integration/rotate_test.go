package integration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/integration/cluster"
)

// rotation is three members and two agents, with workloads of each that shake hands with those of the other all the time.
type rotation struct {
	*world
	agents  []*cluster.Agent
	clients []*eventLog
}

func newRotation(t *testing.T, yaml string) *rotation {
	t.Helper()
	return newRotationIn(t, newWorld(t, 3, yaml))
}

func newRotationIn(t *testing.T, w *world) *rotation {
	t.Helper()
	r := &rotation{world: w}
	for i := range 2 {
		node := fmt.Sprint("node-", i+1)
		a, err := w.StartAgent(w.ctx, "test/"+node, "--insecure-dev-pods", w.iss.Tokens)
		if err != nil {
			t.Fatal(err)
		}
		r.agents = append(r.agents, a)
	}
	id := func(sa string) string { return "spiffe://" + trustDomain + "/ns/shop/sa/" + sa }
	start := func(agent int, sa string, args ...string) *eventLog {
		token, err := w.iss.Pod("shop", sa, fmt.Sprint("node-", agent+1))
		if err != nil {
			t.Fatal(err)
		}
		log := newEventLog()
		argv := append([]string{filepath.Join(bin, "workload")}, args...)
		if _, err := w.Start(sa, []string{"SPIFFE_ENDPOINT_SOCKET=" + r.agents[agent].Endpoint(), "COUNTERSIGN_DEV_POD=" + token}, io.Writer(log), argv...); err != nil {
			t.Fatal(err)
		}
		log.wait(t, w.ctx, "the SVID of "+sa, func(e *eventLog) bool { return e.svids >= 1 })
		return log
	}
	for i := range 2 {
		addr, backend, frontend := freeAddress(t), fmt.Sprint("backend-", i), fmt.Sprint("frontend-", i)
		start(i, backend, "-listen", addr, "-peer", id(frontend))
		r.clients = append(r.clients, start(1-i, frontend, "-dial", addr, "-peer", id(backend), "-interval", "40ms"))
	}
	r.shaken()
	return r
}

// shaken waits for more handshakes of everyone, and none may have failed ever.
func (r *rotation) shaken() {
	r.t.Helper()
	for _, c := range r.clients {
		c.mu.Lock()
		ok := c.ok
		c.mu.Unlock()
		c.wait(r.t, r.ctx, "handshakes", func(e *eventLog) bool { return e.ok > ok+20 })
		if c.failures() > 0 {
			r.t.Errorf("%d handshakes failed: %v", c.failures(), c.errors())
		}
	}
}

// bundle is the trust domain's bundle and what it is made of.
type trustState struct {
	Bundle struct {
		Sequence        string   `json:"sequence"`
		X509Authorities []string `json:"x509_authorities"`
		JWTAuthorities  []struct{ Kid string }
	}
	Authorities []struct{ ID, Kind, State string }
}

func (r *rotation) state() (s trustState) {
	r.t.Helper()
	parseJSON(r.t, r.admin("bundle", "show", "-o", "json"), &s)
	parseJSON(r.t, r.admin("authority", "list", "-o", "json"), &s)
	return s
}

func (s trustState) in(kind, state string) (ids []string) {
	for _, a := range s.Authorities {
		if a.Kind == kind && a.State == state {
			ids = append(ids, a.ID)
		}
	}
	return ids
}

// rotationStatus is what the CLI tells of a rotation.
type rotationStatus struct {
	Kind, Phase, Why, Problem string
	NewAuthority              string `json:"new_authority"`
	OldAuthority              string `json:"old_authority"`
	Gate                      struct {
		Ready, Total int
		Waiting      []struct{ Name, Because string }
	}
}

func (r *rotation) rotationStatus(kind string) (rotationStatus, error) {
	var s struct{ Rotations []rotationStatus }
	out, err := r.Admin(r.ctx, "bundle", "status", "--kind", kind, "-o", "json")
	if err != nil {
		return rotationStatus{}, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.Rotations) != 1 {
		return rotationStatus{}, fmt.Errorf("%w: %s", err, out)
	}
	return s.Rotations[0], nil
}

// reaches waits until the rotation is as it should be.
func (r *rotation) reaches(kind, what string, ok func(rotationStatus) bool) rotationStatus {
	r.t.Helper()
	var s rotationStatus
	r.eventually(what, func() (err error) {
		if s, err = r.rotationStatus(kind); err == nil && !ok(s) {
			err = fmt.Errorf("%+v", s)
		}
		return err
	})
	return s
}

func phase(p string) func(rotationStatus) bool {
	return func(s rotationStatus) bool { return s.Phase == p }
}

// tokens exchanges JWT-SVIDs between workloads of both agents until stop is called: each must verify at the other.
func (r *rotation) tokens() (stop func() (exchanged int)) {
	r.t.Helper()
	r.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/me")...)
	ctx, cancel := context.WithCancel(r.ctx)
	var wg sync.WaitGroup
	n := 0
	wg.Go(func() {
		var clients []*workloadapi.Client
		for _, a := range r.agents {
			c, err := workloadapi.New(ctx, workloadapi.WithAddr(a.Endpoint()))
			if err != nil {
				r.t.Error(err)
				return
			}
			defer c.Close()
			clients = append(clients, c)
		}
		for ; pause(ctx, 20*time.Millisecond); n++ {
			from, to := clients[n%2], clients[1-n%2]
			svid, err := from.FetchJWTSVID(ctx, jwtsvid.Params{Audience: fmt.Sprint("audience-", n)})
			if err == nil {
				_, err = to.ValidateJWTSVID(ctx, svid.Marshal(), svid.Audience[0])
			}
			if err != nil && ctx.Err() == nil {
				r.t.Errorf("exchanging JWT-SVIDs: %v", err)
				return
			}
		}
	})
	return func() int {
		cancel()
		wg.Wait()
		return n
	}
}

// fileServer is an HTTPS server that knows nothing but files: its certificate and key, and the bundle that its clients' certificates
// must lead to, read anew for each connection. A client with an SVID calls it until stop is called.
func (r *rotation) fileServer() (stop func() (calls int)) {
	r.t.Helper()
	dir := filepath.Join(r.Dir, "files")
	token, err := r.iss.Pod("shop", "https", "node-1")
	if err != nil {
		r.t.Fatal(err)
	}
	log := newEventLog()
	if _, err := r.Start("https", []string{"COUNTERSIGN_DEV_POD=" + token}, io.Writer(log), filepath.Join(bin, "countersign-agent"), "watch", "--endpoint", r.agents[0].Endpoint(), "--write", dir); err != nil {
		r.t.Fatal(err)
	}
	conf := func() (*tls.Config, error) {
		at, err := filepath.EvalSymlinks(filepath.Join(dir, "..data"))
		if err != nil {
			return nil, err
		}
		cert, err := tls.LoadX509KeyPair(filepath.Join(at, "svid.pem"), filepath.Join(at, "key.pem"))
		if err != nil {
			return nil, err
		}
		pem, err := os.ReadFile(filepath.Join(at, "bundle.pem"))
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		return &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert, SessionTicketsDisabled: true}, nil
	}
	r.eventually("the files are there", func() error { _, err := conf(); return err })
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	srv.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return conf() }}
	srv.Config.SetKeepAlivesEnabled(false)
	srv.StartTLS()
	source, err := workloadapi.NewX509Source(r.ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(r.agents[1].Endpoint())))
	if err != nil {
		r.t.Fatal(err)
	}
	id := spiffeid.RequireFromString("spiffe://" + trustDomain + "/ns/shop/sa/https")
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id))}}
	ctx, cancel := context.WithCancel(r.ctx)
	var wg sync.WaitGroup
	n := 0
	wg.Go(func() {
		for ; pause(ctx, 20*time.Millisecond); n++ {
			res, err := client.Get(srv.URL)
			if err == nil {
				_, err = io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
			if err != nil {
				r.t.Errorf("call %d of the server that reads files: %v", n, err)
				return
			}
		}
	})
	return func() int {
		cancel()
		wg.Wait()
		srv.Close()
		source.Close()
		return n
	}
}

// pin is the CA pin of now.
func (r *rotation) pin() string {
	r.t.Helper()
	var b struct {
		CAPin string `json:"ca_pin"`
	}
	parseJSON(r.t, r.admin("bundle", "show", "-o", "json"), &b)
	return b.CAPin
}

// firstContact is somebody who knows nothing but a pin.
func (r *rotation) firstContact(pin string) error {
	r.t.Helper()
	file, err := r.iss.Pod("shop", "newcomer", "node-9")
	if err != nil {
		r.t.Fatal(err)
	}
	out, err := exec.CommandContext(r.ctx, filepath.Join(bin, "countersign-agent"), "fetch", "x509", "--direct", "--server", r.Members[0].Address, "--ca-pin", pin, "--token-path", file).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

const shortLives = "x509_ttl: 12s\njwt_ttl: 8s\nmax_staleness: 1m\n"

// TestRotation replaces both authorities under load: no handshake fails, every token verifies, and afterwards nothing of the
// old ones is left.
func TestRotation(t *testing.T) {
	t.Parallel()
	r := newRotation(t, shortLives)
	stop := r.tokens()
	stopFiles := r.fileServer()
	before, pin := r.state(), r.pin()
	for _, kind := range []string{"x509", "jwt"} {
		out := r.admin("bundle", "rotate", "--kind", kind, "--dry-run")
		if !strings.Contains(out, "nothing was changed") {
			t.Errorf("a dry run says: %s", out)
		}
		if out := r.admin("bundle", "rotate", "--kind", kind, "--watch"); !strings.Contains(out, "has taken the place of "+before.in(kind, "active")[0]) {
			t.Errorf("the rotation of %s ended with: %s", kind, out)
		}
		r.shaken()
	}
	exchanged, called := stop(), stopFiles()
	after := r.state()
	for _, kind := range []string{"x509", "jwt"} {
		if active := after.in(kind, "active"); len(active) != 1 || active[0] == before.in(kind, "active")[0] || len(after.in(kind, "revoked")) != 1 {
			t.Errorf("%s authorities: %+v", kind, after.Authorities)
		}
	}
	if len(after.Bundle.X509Authorities) != 1 || after.Bundle.X509Authorities[0] == before.Bundle.X509Authorities[0] {
		t.Errorf("the bundle has %d x509 authorities, the old one perhaps among them", len(after.Bundle.X509Authorities))
	}
	// Who comes by the old pin is led to the new root.
	if err := r.firstContact(pin); err != nil || r.pin() == pin {
		t.Errorf("first contact by the old pin: %v", err)
	}
	// The whole of it is on record.
	audit := r.admin("audit", "query", "--action", "rotation.change", "-o", "json")
	for _, phase := range []string{"prepare", "activate", "revoke", "done"} {
		if !strings.Contains(audit, phase) {
			t.Errorf("no record of the phase %s", phase)
		}
	}
	t.Logf("%d tokens exchanged, %d calls of the server that reads files", exchanged, called)
}

// TestRotationLeaderDies: the leader dies, and an agent cannot be reached, in the middle of a rotation. It waits for the agent by
// name, goes on under another leader, and no handshake fails.
func TestRotationLeaderDies(t *testing.T) {
	t.Parallel()
	r := newRotation(t, "x509_ttl: 40s\nmax_staleness: 1m\n")
	away := r.agents[1]
	away.Signal(syscall.SIGSTOP)
	r.admin("bundle", "rotate", "--taint")
	s := r.reaches("x509", "the rotation waits for the agent that is away", func(s rotationStatus) bool {
		return s.Phase == "activate" && len(s.Gate.Waiting) == 1 && strings.Contains(s.Gate.Waiting[0].Name, "/countersign/agent/")
	})
	leader := r.Leader(r.ctx)
	if leader == nil {
		t.Fatal("no leader")
	}
	leader.Kill()
	r.reaches("x509", "it goes on waiting under another leader, for the dead member too", func(n rotationStatus) bool {
		return n.Phase == "activate" && n.NewAuthority == s.NewAuthority && len(n.Gate.Waiting) >= 2
	})
	away.Signal(syscall.SIGCONT)
	if err := r.RestartMember(r.ctx, leader); err != nil {
		t.Fatal(err)
	}
	r.reaches("x509", "the rotation ends", phase("done"))
	r.shaken()
}

// TestRotationAgentStopped: an agent that is gone is waited for, by name, until somebody says not to, or the deadline.
func TestRotationAgentStopped(t *testing.T) {
	t.Parallel()
	r := newRotation(t, shortLives)
	extra, err := r.StartAgent(r.ctx, "test/node-3")
	if err != nil {
		t.Fatal(err)
	}
	extra.Kill()
	r.admin("bundle", "rotate", "--taint")
	s := r.reaches("x509", "the rotation waits for the agent", func(s rotationStatus) bool {
		return s.Phase == "activate" && s.Gate.Ready == s.Gate.Total-1 && len(s.Gate.Waiting) == 1
	})
	gone := s.Gate.Waiting[0].Name
	if out := r.admin("bundle", "status", "--kind", "x509"); !strings.Contains(out, gone) || !strings.Contains(out, "connected") {
		t.Errorf("the status does not name it: %s", out)
	}
	if _, err := r.Admin(r.ctx, "bundle", "rotate"); err == nil || !strings.Contains(err.Error(), "under way") {
		t.Errorf("a second rotation: %v", err)
	}
	if _, err := r.Admin(r.ctx, "bundle", "activate"); err == nil || !strings.Contains(err.Error(), "under way") {
		t.Errorf("by hand beside it: %v", err)
	}
	r.admin("bundle", "change", "--ignore", gone)
	r.reaches("x509", "it goes on without it", phase("done"))
	if out := r.admin("audit", "query", "--action", "rotation.change", "-o", "json"); !strings.Contains(out, "without") || !strings.Contains(out, gone) {
		t.Errorf("who was left behind is not on record: %s", out)
	}
	r.shaken()

	r.admin("bundle", "rotate", "--kind", "jwt", "--ack-deadline", "7s")
	r.reaches("jwt", "it goes on at the deadline", phase("done"))
	r.shaken()
}

// TestRotationBack undoes a rotation before and after the new authority signs.
func TestRotationBack(t *testing.T) {
	t.Parallel()
	r := newRotation(t, shortLives)
	before := r.state().in("x509", "active")[0]
	if _, err := r.Admin(r.ctx, "bundle", "rollback"); err == nil {
		t.Error("rolled back what never was")
	}
	r.admin("bundle", "rotate")
	r.reaches("x509", "the new authority is prepared", phase("activate"))
	r.admin("bundle", "rollback")
	if s := r.state(); s.in("x509", "active")[0] != before || len(s.in("x509", "prepared")) != 0 || len(s.Bundle.X509Authorities) != 1 {
		t.Errorf("after rolling back: %+v", s)
	}
	r.admin("bundle", "rotate")
	r.reaches("x509", "the new authority signs", phase("revoke"))
	r.shaken()
	out := r.admin("bundle", "rollback")
	if !strings.Contains(out, before) {
		t.Errorf("rolling back says: %s", out)
	}
	r.reaches("x509", "the new authority is gone", phase("done"))
	if s := r.state(); s.in("x509", "active")[0] != before || len(s.Bundle.X509Authorities) != 1 {
		t.Errorf("after rolling back: %+v", s)
	}
	if _, err := r.Admin(r.ctx, "bundle", "rollback"); err == nil || !strings.Contains(err.Error(), "rotate anew") {
		t.Errorf("rolling back what is over: %v", err)
	}
	r.shaken()
}

// TestRotationByHand takes each step by itself; none is taken too soon.
func TestRotationByHand(t *testing.T) {
	t.Parallel()
	r := newRotation(t, shortLives)
	old := r.state().in("jwt", "active")[0]
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"bundle", "activate", "--kind", "jwt"}, "no such jwt authority"},
		{[]string{"bundle", "revoke", "--kind", "jwt", old}, "is active"},
		{[]string{"bundle", "taint", "--kind", "jwt", old}, "is active"},
		{[]string{"bundle", "prepare", "--kind", "wit"}, "want x509 or jwt"},
	} {
		if _, err := r.Admin(r.ctx, c.args...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v; want %q", c.args, err, c.want)
		}
	}
	r.admin("bundle", "prepare", "--kind", "jwt")
	if _, err := r.Admin(r.ctx, "bundle", "activate", "--kind", "jwt"); err == nil || !strings.Contains(err.Error(), "settling") {
		t.Errorf("activating at once: %v", err)
	}
	r.eventually("everyone has it", func() error { _, err := r.Admin(r.ctx, "bundle", "activate", "--kind", "jwt"); return err })
	r.admin("bundle", "taint", "--kind", "jwt")
	stop := r.tokens()
	r.eventually("nothing is under the old one", func() error { _, err := r.Admin(r.ctx, "bundle", "revoke", "--kind", "jwt", old); return err })
	stop()
	if s := r.state(); len(s.in("jwt", "revoked")) != 1 || len(s.in("jwt", "active")) != 1 {
		t.Errorf("%+v", s.Authorities)
	}
}

// TestTaintNow: a compromised authority signs no more within seconds, everything that it signed is replaced, though it would
// last an hour, and it is revoked as soon as that is so.
func TestTaintNow(t *testing.T) {
	t.Parallel()
	r := newRotation(t, "") // SVIDs last an hour
	before, pin := r.state(), r.pin()
	began := time.Now()
	r.admin("authority", "taint", "--now")
	r.reaches("x509", "everything is replaced", phase("done"))
	t.Logf("revoked after %v", time.Since(began))
	after := r.state()
	if len(after.Bundle.X509Authorities) != 1 || after.Bundle.X509Authorities[0] == before.Bundle.X509Authorities[0] {
		t.Errorf("the bundle: %+v", after.Bundle)
	}
	r.shaken()
	// Nobody is led on by a key that somebody else has.
	if err := r.firstContact(pin); err == nil || !strings.Contains(err.Error(), "given up") {
		t.Errorf("first contact by the pin of the compromised one: %v", err)
	}
	if err := r.firstContact(r.pin()); err != nil {
		t.Errorf("first contact by the new pin: %v", err)
	}
	if _, err := r.Admin(r.ctx, "authority", "taint", "--now", before.in("x509", "active")[0]); err == nil {
		t.Error("tainted what is revoked")
	}
}
