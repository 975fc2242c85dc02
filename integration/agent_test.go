package integration

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/integration/cluster"
)

// again starts an agent's process anew and does not wait: without a member it is never ready.
func (w *world) again(a *cluster.Agent) {
	w.t.Helper()
	log, err := os.OpenFile(filepath.Join(a.Dir, "log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { log.Close() })
	a.Process, err = w.Start(a.Name, nil, log, filepath.Join(bin, "countersign-agent"), "run", "-c", filepath.Join(a.Dir, "agent.yaml"), "--insecure-dev-pods", w.iss.Tokens)
	if err != nil {
		w.t.Fatal(err)
	}
}

// fetch is one X.509-SVID of this process; its serial.
func (w *world) fetch(a *cluster.Agent) (string, error) {
	ctx, cancel := context.WithTimeout(w.ctx, 20*time.Second)
	defer cancel()
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(a.Endpoint()))
	if err != nil {
		return "", err
	}
	defer c.Close()
	x, err := c.FetchX509SVID(ctx)
	if err != nil {
		return "", err
	}
	return x.Certificates[0].SerialNumber.String(), nil
}

// notReady waits until a process says that it is not, and why.
func (w *world) notReady(health string, words ...string) {
	w.t.Helper()
	w.eventually("/ready says why not", func() error {
		code, why, err := readiness(w.ctx, health)
		if err != nil || code != http.StatusServiceUnavailable {
			return fmt.Errorf("%d %s %v", code, why, err)
		}
		for _, x := range words {
			if !strings.Contains(why, x) {
				return fmt.Errorf("%q is not in %q", x, why)
			}
		}
		return nil
	})
}

// TestAgentRestartsWithoutMembers takes all members away, and then the agent: live SVIDs come back from memory.
func TestAgentRestartsWithoutMembers(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 1, "")
	state := cluster.StateDir(w.Dir, "agent-1")
	if state == "none" {
		t.Skip("there is no /dev/shm: this machine offers no tmpfs to keep SVIDs in")
	}
	a := w.agent()
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/one")...)
	serial, err := w.fetch(a)
	if err != nil {
		t.Fatal(err)
	}
	w.eventually("the SVID is in the state folder", func() error {
		if files, err := filepath.Glob(filepath.Join(state, "svid", "*.json")); err != nil || len(files) != 1 {
			return fmt.Errorf("%v, %v", files, err)
		}
		return nil
	})
	w.Members[0].Kill()
	for name, end := range map[string]func(*cluster.Process){"stopped": (*cluster.Process).Stop, "killed": (*cluster.Process).Kill} {
		end(a.Process)
		if name == "stopped" && a.Process.Code() != 0 {
			t.Errorf("stopped: exit code %d", a.Process.Code())
		}
		w.again(a)
		w.eventually("the SVID after the agent was "+name, func() error {
			got, err := w.fetch(a)
			if err == nil && got != serial {
				t.Errorf("after the agent was %s: serial %s, before %s", name, got, serial)
			}
			return err
		})
		w.notReady(a.Health, "no member of the cluster can be used", "connection refused")
	}
	err = filepath.WalkDir(state, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("others can use %s: %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	s := w.watch(a)
	w.until(s, "the identity on a stream", func(ids []string) bool { return len(ids) == 1 })
	if err := w.RestartMember(w.ctx, w.Members[0]); err != nil {
		t.Fatal(err)
	}
	untilReady(t, w.ctx, a.Process, a.Health)
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/two")...)
	w.until(s, "a new entry, pushed", func(ids []string) bool { return len(ids) == 2 })
	s.unbroken(t)
}

// unbroken fails if the stream has ended in between.
func (s *stream) unbroken(t *testing.T) {
	t.Helper()
	select {
	case err := <-s.errs:
		t.Errorf("the stream ended: %v", err)
	default:
	}
}

// TestAgentLosesItsState is what a join token cannot help with: the agent says what to do.
func TestAgentLosesItsState(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 1, "")
	a := w.agent()
	a.Stop()
	if state := cluster.StateDir(w.Dir, a.Name); state != "none" {
		removeAll(t, state)
	}
	w.again(a)
	<-a.Done()
	log, err := os.ReadFile(filepath.Join(a.Dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(strings.TrimSpace(string(log)), "\n"); a.Code() != exitFailure || !strings.Contains(lines[len(lines)-1], "was used at") || !strings.Contains(lines[len(lines)-1], "make another one") {
		t.Errorf("exit code %d, said %s", a.Code(), lines[len(lines)-1])
	}
	writeFile(t, filepath.Join(a.Dir, "join"), []byte(w.admin("token", "create", "--agent")))
	if err := w.RestartAgent(w.ctx, a); err != nil {
		t.Error(err)
	}
}

// connectedTo finds the member that holds the agent's stream.
func (w *world) connectedTo() *cluster.Member {
	w.t.Helper()
	var found *cluster.Member
	w.eventually("a member holds the agent's stream", func() error {
		for _, m := range w.Members {
			if m.Exited() {
				continue
			}
			out, err := m.Admin(w.ctx, bin, "agent", "list", "-o", "json")
			if err != nil {
				return err
			}
			var list struct{ Agents []struct{ Connected bool } }
			if err := json.Unmarshal([]byte(out), &list); err != nil {
				return err
			}
			for _, g := range list.Agents {
				if g.Connected {
					found = m
					return nil
				}
			}
		}
		return fmt.Errorf("none does")
	})
	return found
}

// TestAgentFailsOver kills the member that an agent is connected to: the workload's stream stays open, what asks a member is
// answered by the next, and the next change of an entry arrives.
func TestAgentFailsOver(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 3, "")
	a := w.agent()
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/0")...)
	s := w.watch(a)
	w.until(s, "the identity", func(ids []string) bool { return len(ids) == 1 })
	c, err := workloadapi.New(w.ctx, workloadapi.WithAddr(a.Endpoint()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for round := range 2 {
		m := w.connectedTo()
		m.Kill()
		// The audience is new, so no cache can answer.
		if _, err := c.FetchJWTSVID(w.ctx, jwtsvid.Params{Audience: fmt.Sprint("round-", round)}); err != nil {
			t.Errorf("a JWT-SVID right after the kill: %v", err)
		}
		id := fmt.Sprintf("spiffe://%s/%d", trustDomain, round+1)
		w.eventually("a leader takes the entry", func() error {
			_, err := w.Admin(w.ctx, append([]string{"entry", "create", "--id", id}, uidSelectors()...)...)
			if err != nil && strings.Contains(err.Error(), "already exists") {
				return nil // an earlier try whose answer was lost
			}
			return err
		})
		w.until(s, "the entry, pushed", func(ids []string) bool { return slices.Contains(ids, id) })
		if err := w.RestartMember(w.ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	s.unbroken(t)
}

// pki is an existing PKI of the nodes'.
type pki struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newPKI(t *testing.T, dir, name string) *pki {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &pki{key: key, file: filepath.Join(dir, name+".pem")}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if p.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	writeFile(t, p.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return p
}

// node writes a node's certificate and key, and returns the line that names them.
func (p *pki) node(t *testing.T, dir, cn string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: cn}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, p.cert, key.Public(), p.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert, keyFile := filepath.Join(dir, "node.pem"), filepath.Join(dir, "node-key.pem")
	writeFile(t, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	writeFile(t, keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	return fmt.Sprintf("{x509pop: {cert_file: %s, key_file: %s}}", cert, keyFile)
}

// popAgent starts an agent that attests by a certificate and keeps nothing.
func (w *world) popAgent(ca *pki, name, cn string) *cluster.Agent {
	w.t.Helper()
	var b struct {
		CAPin string `json:"ca_pin"`
	}
	parseJSON(w.t, w.admin("bundle", "show", "-o", "json"), &b)
	a := &cluster.Agent{Name: name, Dir: filepath.Join(w.Dir, name), Health: freeAddress(w.t)}
	a.Socket = filepath.Join(a.Dir, "agent.sock")
	if err := os.Mkdir(a.Dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	writeFile(w.t, filepath.Join(a.Dir, "log"), nil)
	writeFile(w.t, filepath.Join(a.Dir, "agent.yaml"), fmt.Appendf(nil, "version: 1\ntrust_domain: %s\nservers: [%s]\nca_pin: %s\nsocket: %s\nstate_dir: none\nhealth: %s\nattest: %s\n",
		trustDomain, w.Members[0].Address, b.CAPin, a.Socket, a.Health, ca.node(w.t, a.Dir, cn)))
	w.again(a)
	return a
}

// ended waits for the stream's end.
func (s *stream) ended(t *testing.T, ctx context.Context) error {
	t.Helper()
	for {
		select {
		case <-s.updates:
		case err := <-s.errs:
			return err
		case <-ctx.Done():
			t.Fatalf("the stream did not end: %v", ctx.Err())
		}
	}
}

// TestAgentX509Pop attests an agent by a certificate of a PKI that is not ours; it comes back without an operator after a
// restart and after its eviction, and not after a ban.
func TestAgentX509Pop(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newPKI(t, dir, "nodes")
	w := worldOf(t, 1, "x509pop: {ca_file: "+ca.file+", kube_cluster: test}\n")
	a := w.popAgent(ca, "pop", "node-7")
	untilReady(t, w.ctx, a.Process, a.Health)
	var list struct {
		Agents []struct {
			ID, Kind, KubeCluster string
			KubeNode              string `json:"kube_node"`
			Selectors             []string
		}
	}
	parseJSON(t, w.admin("agent", "list", "-o", "json"), &list)
	if len(list.Agents) != 1 || list.Agents[0].Kind != "x509pop" || list.Agents[0].KubeNode != "node-7" {
		t.Fatalf("agents: %+v", list.Agents)
	}
	id := list.Agents[0].ID
	w.createEntry("-s", fmt.Sprintf("unix:uid:%d", os.Getuid()), "-s", "agent:x509-cn:node-7", "--id", "spiffe://"+trustDomain+"/node/{agent:x509-cn}")
	s := w.watch(a)
	w.until(s, "the identity", func(ids []string) bool {
		return slices.Equal(ids, []string{"spiffe://" + trustDomain + "/node/node-7"})
	})

	t.Run("its node's pods", func(t *testing.T) {
		for node, ok := range map[string]bool{"node-7": true, "node-8": false} {
			file, err := w.iss.Pod("shop", "pod-of-"+node, node)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(w.ctx, filepath.Join(bin, "countersign-agent"), "fetch", "x509", "--endpoint", a.Endpoint())
			cmd.Env = append(os.Environ(), "COUNTERSIGN_DEV_POD="+file)
			out, err := cmd.CombinedOutput()
			if got := err == nil && strings.Contains(string(out), "/ns/shop/sa/pod-of-"+node); got != ok {
				t.Errorf("a pod of %s: %v %s", node, err, out)
			}
		}
	})
	t.Run("restart", func(t *testing.T) {
		a.Kill()
		w.again(a)
		untilReady(t, w.ctx, a.Process, a.Health)
		s = w.watch(a)
		w.until(s, "the identity after a restart", func(ids []string) bool { return len(ids) == 1 })
	})
	t.Run("evicted", func(t *testing.T) {
		w.admin("agent", "evict", id)
		w.eventually("the agent has attested again", func() error {
			_, err := w.Admin(w.ctx, "agent", "show", id)
			return err
		})
		untilReady(t, w.ctx, a.Process, a.Health)
		second := w.createEntry("-s", fmt.Sprintf("unix:uid:%d", os.Getuid()), "-s", "agent:kind:x509pop", "--id", "spiffe://"+trustDomain+"/second")
		w.until(s, "a new entry, pushed", func(ids []string) bool { return len(ids) == 2 })
		s.unbroken(t) // the workload did nothing wrong
		w.admin("entry", "delete", second)
		w.until(s, "its end", func(ids []string) bool { return len(ids) == 1 })
	})
	t.Run("a certificate of another PKI", func(t *testing.T) {
		stranger := w.popAgent(newPKI(t, dir, "others"), "stranger", "node-7")
		w.notReady(stranger.Health, "x509pop", "roots of this member")
		stranger.Stop()
	})
	t.Run("banned", func(t *testing.T) {
		w.admin("agent", "ban", id)
		if err := s.ended(t, w.ctx); status.Code(err) != codes.PermissionDenied {
			t.Errorf("the stream ended with %v, want PermissionDenied", err)
		}
		w.notReady(a.Health, "is banned")
		a.Stop()
		w.again(a)
		w.notReady(a.Health, "is banned")
		if _, err := w.fetch(a); err == nil {
			t.Error("a banned agent serves an SVID")
		}
	})
}

// TestAgentBanned is the end of an agent by an operator's word: its workloads lose at once what it obtained, it says why, and
// its state folder does not bring anything back.
func TestAgentBanned(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 1, "")
	a := w.agent()
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/one")...)
	s := w.watch(a)
	w.until(s, "the identity", func(ids []string) bool { return len(ids) == 1 })
	var list struct{ Agents []struct{ ID string } }
	parseJSON(t, w.admin("agent", "list", "-o", "json"), &list)
	w.admin("agent", "ban", list.Agents[0].ID)
	if err := s.ended(t, w.ctx); status.Code(err) != codes.PermissionDenied {
		t.Errorf("the stream ended with %v, want PermissionDenied", err)
	}
	w.notReady(a.Health, "is banned")
	if _, err := w.fetch(a); err == nil {
		t.Error("it still serves an SVID")
	}
	if state := cluster.StateDir(w.Dir, a.Name); state != "none" {
		w.eventually("the SVID has left the state folder", func() error {
			if files, err := filepath.Glob(filepath.Join(state, "svid", "*.json")); err != nil || len(files) > 0 {
				return fmt.Errorf("%v, %v", files, err)
			}
			return nil
		})
	}
	a.Kill()
	w.again(a)
	w.eventually("it says after a restart too that it is banned, or ends", func() error {
		if a.Exited() {
			return nil
		}
		if _, err := w.fetch(a); err == nil {
			t.Error("it serves an SVID after a restart")
			return nil
		}
		code, why, err := readiness(w.ctx, a.Health)
		if code != http.StatusServiceUnavailable || !strings.Contains(why, "is banned") {
			return fmt.Errorf("%d %s %v", code, why, err)
		}
		return nil
	})
}

// TestAgentEvicted is an agent that an operator has forgotten and whose join token is spent: it cannot come back alone, says
// why, and a new token mends it.
func TestAgentEvicted(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 1, "")
	a := w.agent()
	var list struct{ Agents []struct{ ID string } }
	parseJSON(t, w.admin("agent", "list", "-o", "json"), &list)
	w.admin("agent", "evict", list.Agents[0].ID)
	w.notReady(a.Health, "agent "+list.Agents[0].ID)
	a.Stop()
	if state := cluster.StateDir(w.Dir, a.Name); state != "none" {
		removeAll(t, state)
	}
	writeFile(t, filepath.Join(a.Dir, "join"), []byte(w.admin("token", "create", "--agent")))
	if err := w.RestartAgent(w.ctx, a); err != nil {
		t.Error(err)
	}
}
