//go:build integration

package integration

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/integration/cluster"
	"countersign.io/countersign/integration/history"
	"countersign.io/countersign/integration/issuer"
)

// faultWorld is a cluster whose members live in network namespaces, and what is done with it all the time: faultRun adds to
// that one fault and a fresh account. What is counted upon is a stand: down is what the fault takes away by itself.
type faultWorld struct {
	*world
	agent   *cluster.Agent
	client  *cluster.Client
	pod     string // token of the pod that asks members
	admins  map[string]adminv1.AdminClient
	stands  map[string]*stand
	agentUp *stand
	serials *history.Serials
	runs    int
	stuck   bool // what is broken stayed so
	gaps    *gaps
}

// nets numbers the bridges of this process.
var nets atomic.Int32

// needTools skips a test that needs what this machine has not.
func needTools(t *testing.T, tools ...string) {
	t.Helper()
	needRoot(t)
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%v: make integration installs it", err)
		}
	}
}

// newFaultWorld starts three members and an agent. prepare, if not nil, sees each member before it starts.
func newFaultWorld(t *testing.T, limit time.Duration, serverYAML string, prepare func(*cluster.Member) error) *faultWorld {
	t.Helper()
	needTools(t, "ip", "strace")
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	dir, err := os.MkdirTemp("", "cs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	net, err := cluster.NewNet(int(nets.Add(1)))
	if err != nil {
		t.Skipf("no network namespaces here: %v", err)
	}
	t.Cleanup(net.Close)
	f := &faultWorld{
		world:  &world{t: t, ctx: ctx, Cluster: &cluster.Cluster{Dir: dir, Bin: bin, TrustDomain: trustDomain, ServerYAML: serverYAML, Net: net, Prepare: prepare}},
		admins: map[string]adminv1.AdminClient{}, stands: map[string]*stand{}, agentUp: newStand("the agent"), serials: history.NewSerials(),
	}
	t.Cleanup(func() { soundLogs(t, dir) })
	t.Cleanup(func() {
		f.Close()
		if t.Failed() {
			f.logs()
		}
	})
	for i := range 3 {
		m, err := f.StartMember(ctx)
		if err != nil && i == 0 && strings.Contains(err.Error(), "ip netns") {
			t.Skipf("no network namespaces here: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.admins[m.Name] = adminOf(t, m)
		f.stands[m.Name] = newStand(m.Name)
	}
	for _, m := range f.Members {
		untilVoter(t, f.world, m.Name)
	}
	if f.iss, err = issuer.New(dir); err != nil {
		t.Fatal(err)
	}
	f.admin("kube", "add", "test", "--issuer", f.iss.URL, "--jwks-file", f.iss.JWKSFile)
	f.createEntry("-s", "k8s:ns:shop", "--id", "spiffe://"+trustDomain+"/shop/{k8s:sa}")
	f.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/me", "--x509-ttl", "20s")...) // to be renewed on the way; half of it is more than a client waits before it connects again
	f.agent = f.world.agent()
	if f.client, err = f.NewClient(ctx, "test/node-1"); err != nil {
		t.Fatal(err)
	}
	f.pod = f.token("busy", "node-1")
	f.watchAgent()
	for _, m := range f.Members {
		f.eventually(m.Name+" issues", func() error { return f.issueOnce(ctx, m) })
		f.stands[m.Name].up(ctx)
	}
	f.agentUp.up(ctx)
	return f
}

// adminOf is one connection for a member's whole time: it is made again soon after the member is back.
func adminOf(t *testing.T, m *cluster.Member) adminv1.AdminClient {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+m.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()), soonAgain())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return adminv1.NewAdminClient(conn)
}

func soonAgain() grpc.DialOption {
	return grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}, MinConnectTimeout: 2 * time.Second})
}

// issueOnce asks a member for one SVID over a new connection.
func (f *faultWorld) issueOnce(ctx context.Context, m *cluster.Member) error {
	conn, err := f.client.Dial(m.Address)
	if err != nil {
		return err
	}
	defer conn.Close()
	return f.issue(ctx, m, workloadv1.NewWorkloadClient(conn))
}

func (f *faultWorld) issue(ctx context.Context, m *cluster.Member, c workloadv1.WorkloadClient) error {
	_, public, err := cluster.NewKey()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	res, err := cluster.Issue(ctx, c, f.pod, public)
	if err != nil {
		return err
	}
	for _, s := range res.Svids {
		if err := f.certificate(s.Leaf, m.Name); err != nil {
			return err
		}
	}
	return nil
}

// certificate keeps account of a serial number.
func (f *faultWorld) certificate(der []byte, from string) error {
	serial, err := serialOf(der)
	if err == nil {
		f.serials.Add(serial, fmt.Sprintf("%x", sha256.Sum256(der)), from)
	}
	return err
}

// gaps watches what a workload at the agent has.
type gaps struct {
	mu      sync.Mutex // guards what follows
	until   time.Time  // end of the newest SVID
	updates int
	gone    []string // when it had run out
}

// watchAgent has this process be a workload that must never be without an SVID.
func (f *faultWorld) watchAgent() {
	f.gaps = &gaps{}
	ctx, cancel := context.WithCancel(f.ctx)
	done := make(chan struct{})
	f.t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		_ = workloadapi.WatchX509Context(ctx, watcher{f}, workloadapi.WithAddr(f.agent.Endpoint()))
	}()
	go func() {
		for pause(ctx, 100*time.Millisecond) {
			f.gaps.mu.Lock()
			if !f.gaps.until.IsZero() && time.Now().After(f.gaps.until) {
				f.gaps.gone = append(f.gaps.gone, fmt.Sprintf("at %s the workload's SVID had run out at %s", time.Now().Format("15:04:05.0"), f.gaps.until.Format("15:04:05")))
				f.gaps.until = time.Time{}
			}
			f.gaps.mu.Unlock()
		}
	}()
	f.eventually("the workload has its SVID", func() error {
		f.gaps.mu.Lock()
		defer f.gaps.mu.Unlock()
		if f.gaps.updates == 0 {
			return errors.New("none")
		}
		return nil
	})
}

type watcher struct{ f *faultWorld }

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (w watcher) OnX509ContextUpdate(x *workloadapi.X509Context) {
	for _, s := range x.SVIDs {
		if err := w.f.certificate(s.Certificates[0].Raw, "the agent"); err != nil {
			continue
		}
		w.f.gaps.mu.Lock()
		if leaf := s.Certificates[0]; time.Until(leaf.NotBefore) > time.Second || time.Now().After(leaf.NotAfter) {
			w.f.gaps.gone = append(w.f.gaps.gone, fmt.Sprintf("at %s the workload got an SVID for %s to %s", time.Now().Format("15:04:05.0"), leaf.NotBefore.Format("15:04:05"), leaf.NotAfter.Format("15:04:05")))
		}
		w.f.gaps.until = s.Certificates[0].NotAfter
		w.f.gaps.updates++
		w.f.gaps.mu.Unlock()
	}
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher: a stream that ends is no gap, an SVID that does is.
func (w watcher) OnX509ContextWatchError(error) {}

// jwt asks the agent for a JWT-SVID of an audience that it has not in its cache.
func (f *faultWorld) jwt(ctx context.Context, c *workloadapi.Client, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	_, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: fmt.Sprint("audience-", f.runs, "-", n)})
	return err
}

// notDone reports whether an error says that nothing was changed, or that the question was never sent.
func notDone(err error) bool {
	return definite(err) || status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "Error while dialing")
}

func serialOf(der []byte) (string, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return "", err
	}
	return cert.SerialNumber.String(), nil
}
