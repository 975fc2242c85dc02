package server

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

// The callers run in a process of their own, so that the CPU time of this one is the member's.

const benchEnv = "COUNTERSIGN_BENCH_CALLERS"

// benchCallers is what the callers' process is told.
type benchCallers struct {
	Address, Pin string
	Chain        [][]byte
	Key          []byte
	Token        string
	JWT          bool
	Batch, Calls int
}

const callers = 8

func TestMain(m *testing.M) {
	if conf := os.Getenv(benchEnv); conf != "" {
		if err := runCallers(conf); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func runCallers(conf string) error {
	var c benchCallers
	if err := json.Unmarshal([]byte(conf), &c); err != nil {
		return err
	}
	key, err := x509.ParsePKCS8PrivateKey(c.Key)
	if err != nil {
		return err
	}
	tlsConf, err := PinnedTLS(c.Pin, spiffeid.TrustDomain{})
	if err != nil {
		return err
	}
	tlsConf.Certificates = []tls.Certificate{{Certificate: c.Chain, PrivateKey: key}}
	pub, err := x509.MarshalPKIXPublicKey(key.(crypto.Signer).Public())
	if err != nil {
		return err
	}
	ev := &workloadv1.Evidence{Selectors: []string{"unix:uid:1000", "unix:gid:1000", "unix:path:/usr/bin/app"}, Token: c.Token}
	req := &workloadv1.IssueX509Request{}
	for range c.Batch {
		req.Requests = append(req.Requests, &workloadv1.X509Request{Evidence: ev, PublicKey: pub})
	}
	conn, err := grpc.NewClient("passthrough:///"+c.Address, grpc.WithTransportCredentials(credentials.NewTLS(tlsConf)))
	if err != nil {
		return err
	}
	defer conn.Close()
	w := workloadv1.NewWorkloadClient(conn)
	var left atomic.Int64
	left.Store(int64(c.Calls))
	errs := make(chan error, callers)
	for range callers {
		go func() {
			for left.Add(-1) >= 0 {
				if c.JWT {
					if _, err := w.IssueJWT(context.Background(), &workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"db"}}); err != nil {
						errs <- err
						return
					}
					continue
				}
				resp, err := w.IssueX509(context.Background(), req)
				if err == nil && resp.Results[0].Error != nil {
					err = fmt.Errorf("%v", resp.Results[0].Error)
				}
				if err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range callers {
		if err := <-errs; err != nil {
			return err
		}
	}
	return nil
}

func cpuTime() time.Duration {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func benchmarkIssue(b *testing.B, jwt, token bool, batch int) {
	w := newWorld(b, func(c *Config) { c.Log = slog.New(slog.DiscardHandler) }).start(b)
	var err error
	if w.kubeKey, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		b.Fatal(err)
	}
	w.registerCluster(b)
	_, cert := w.agent(b, "a1", "node-1")
	if _, err := w.state.CreateEntry(context.Background(), time.Now(), identity.Entry{ID: "e", Selectors: []identity.Selector{"agent:kube-node:node-1"}, SPIFFEID: "spiffe://example.org/bench/app"}); err != nil {
		b.Fatal(err)
	}
	root, err := x509.ParseCertificate(w.state.Bundle().X509[0])
	if err != nil {
		b.Fatal(err)
	}
	c := benchCallers{Address: w.port.Addr().String(), Pin: node.Pin(root.RawSubjectPublicKeyInfo), Chain: cert.Certificate, JWT: jwt, Batch: batch}
	if c.Key, err = x509.MarshalPKCS8PrivateKey(cert.PrivateKey); err != nil {
		b.Fatal(err)
	}
	if token {
		c.Token = w.podToken(b, pod{})
	}
	run := func(calls int) {
		c.Calls = calls
		conf, err := json.Marshal(c)
		if err != nil {
			b.Fatal(err)
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), benchEnv+"="+string(conf))
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
	}
	run(callers) // connections and buffers
	calls := max((b.N+batch-1)/batch, callers)
	b.ResetTimer()
	before := cpuTime()
	run(calls)
	spent := cpuTime() - before
	b.StopTimer()
	b.ReportMetric(float64(spent.Microseconds())/float64(calls*batch), "cpu-us/svid")
}

func BenchmarkIssueX509Batch50(b *testing.B)      { benchmarkIssue(b, false, false, 50) }
func BenchmarkIssueX509Batch50Token(b *testing.B) { benchmarkIssue(b, false, true, 50) }
func BenchmarkIssueX509Single(b *testing.B)       { benchmarkIssue(b, false, false, 1) }
func BenchmarkIssueX509SingleToken(b *testing.B)  { benchmarkIssue(b, false, true, 1) }
func BenchmarkIssueJWT(b *testing.B)              { benchmarkIssue(b, true, false, 1) }
func BenchmarkIssueJWTToken(b *testing.B)         { benchmarkIssue(b, true, true, 1) }

// BenchmarkEntryChange shows that the cost of a change does not grow with the workloads that it does not concern.
func BenchmarkEntryChange(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("workloads=%d", n), func(b *testing.B) {
			var mu sync.Mutex
			e := &identity.Entry{ID: "e", Selectors: []identity.Selector{"k8s:ns:ns-7", "k8s:sa:sa-7"}, Revision: 1}
			h := newHub(func(sel []identity.Selector) ([]*identity.Entry, bool) {
				mu.Lock()
				defer mu.Unlock()
				if identity.Subset(e.Selectors, sel) {
					return []*identity.Entry{e}, true
				}
				return nil, true
			}, time.Now)
			var s *session
			for i := range n {
				if i%1000 == 0 {
					s, _ = h.open(fmt.Sprintf("agent-%d", i/1000), "")
				}
				sel := identity.SortSelectors([]identity.Selector{"k8s:cluster:c1", identity.Selector(fmt.Sprintf("k8s:ns:ns-%d", i%1000)), identity.Selector(fmt.Sprintf("k8s:pod-uid:%d", i)), identity.Selector(fmt.Sprintf("k8s:sa:sa-%d", i))})
				if err := h.set(s, uint64(i), sel, nil); err != nil {
					b.Fatal(err)
				}
			}
			b.ResetTimer()
			for i := range b.N {
				mu.Lock()
				next := *e
				next.Revision = uint64(i + 2)
				old := e
				e = &next
				mu.Unlock()
				h.apply([]identity.Change{{OldEntry: old, NewEntry: &next}})
			}
		})
	}
}
