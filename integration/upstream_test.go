package integration

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/integration/cluster"
)

// companyPKI is a company's own: a root that signs an intermediate, which is the upstream, in files.
type companyPKI struct {
	t          *testing.T
	dir        string
	root, cert *x509.Certificate
}

func newCompanyPKI(t *testing.T) *companyPKI {
	p := &companyPKI{t: t, dir: t.TempDir()}
	p.replace()
	return p
}

// replace makes everything anew, and puts the files in place one by one, each whole.
func (p *companyPKI) replace() {
	p.t.Helper()
	sign := func(name string, length int, parent *x509.Certificate, by *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			p.t.Fatal(err)
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{Organization: []string{"A Company"}, CommonName: name + " " + rand.Text()},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
			BasicConstraintsValid: true, IsCA: true, MaxPathLen: length,
		}
		if parent == nil {
			parent, by = tmpl, key
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), by)
		if err != nil {
			p.t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			p.t.Fatal(err)
		}
		return cert, key
	}
	root, rootKey := sign("Root", -1, nil, nil)
	cert, key := sign("Issuing CA", 2, root, rootKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	p.put("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	p.put("chain.pem", append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})...))
	p.root, p.cert = root, cert
}

func (p *companyPKI) put(name string, data []byte) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name+".new"), data, 0o600); err != nil {
		p.t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(p.dir, name+".new"), filepath.Join(p.dir, name)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *companyPKI) yaml() string {
	return fmt.Sprintf("ca:\n  ttl: 2h\n  upstream:\n    disk:\n      cert_file: %s\n      key_file: %s\n", filepath.Join(p.dir, "chain.pem"), filepath.Join(p.dir, "key.pem"))
}

func x509Of(t *testing.T, ctx context.Context, a *cluster.Agent) *x509svid.SVID {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(a.Endpoint()))
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

// bundleRoots are the roots that operators are shown.
func (w *world) bundleRoots() []*x509.Certificate {
	w.t.Helper()
	rest := []byte(w.admin("bundle", "show", "--format", "pem"))
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			w.t.Fatal(err)
		}
		out = append(out, c)
	}
}

type listedAuthority struct{ ID, Kind, State, Upstream string }

func (w *world) x509Authorities() map[string]listedAuthority {
	w.t.Helper()
	var res struct{ Authorities []listedAuthority }
	if err := json.Unmarshal([]byte(w.admin("authority", "list", "-o", "json")), &res); err != nil {
		w.t.Fatal(err)
	}
	out := map[string]listedAuthority{}
	for _, a := range res.Authorities {
		if a.Kind == "x509" {
			out[a.State] = a
		}
	}
	return out
}

// degraded waits until the first member says that it is, in status and on /ready, which stays 200.
func (w *world) degraded(why string) {
	w.t.Helper()
	w.eventually("the member says that it is degraded", func() error {
		var s struct {
			Issuing  bool
			Degraded []string
		}
		if err := json.Unmarshal([]byte(w.admin("status", "-o", "json")), &s); err != nil {
			return err
		}
		if !s.Issuing {
			w.t.Fatal("it does not issue any longer")
		}
		if len(s.Degraded) == 0 || !strings.Contains(s.Degraded[0], why) {
			return fmt.Errorf("degraded: %q, not for %q", s.Degraded, why)
		}
		return nil
	})
	res, err := http.Get("http://" + w.Members[0].Health + "/ready")
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusOK || !bytes.HasPrefix(body, []byte("ready\ndegraded: ")) {
		w.t.Errorf("/ready: %d %q", res.StatusCode, body)
	}
}

func verifyUnder(t *testing.T, svid *x509svid.SVID, roots ...*x509.Certificate) error {
	t.Helper()
	bundle := x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString(trustDomain), roots)
	_, _, err := x509svid.Verify(svid.Certificates, bundle)
	return err
}

// A company's PKI on disk is above the trust domain: its root is the bundle, a new one is taken up before anything is signed
// below it, and what is wrong with the files stops nothing.
func TestUpstreamOnDisk(t *testing.T) {
	p := newCompanyPKI(t)
	w := newWorld(t, 1, p.yaml())
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/me")...)
	a := w.agent()
	svid := x509Of(t, w.ctx, a)
	if err := verifyUnder(t, svid, p.root); err != nil {
		t.Fatalf("the SVID does not verify under the company's root: %v", err)
	}
	if n := len(svid.Certificates); n != 4 { // leaf, the member's issuer, the authority, the company's intermediate
		t.Errorf("the chain has %d certificates", n)
	}
	if roots := w.bundleRoots(); len(roots) != 1 || !roots[0].Equal(p.root) {
		t.Fatalf("the bundle is not the company's root: %d certificates", len(roots))
	}
	before := w.x509Authorities()["active"]
	if before.Upstream != "disk:"+filepath.Join(p.dir, "chain.pem") {
		t.Errorf("the authority is under %q", before.Upstream)
	}

	// A new PKI: both roots are out before the new authority signs.
	old := p.root
	p.replace()
	w.eventually("both roots in the bundle, and an authority prepared below the new one", func() error {
		roots, all := w.bundleRoots(), w.x509Authorities()
		if len(roots) != 2 || all["prepared"].ID == "" {
			return fmt.Errorf("%d roots, authorities %+v", len(roots), all)
		}
		if all["active"].ID != before.ID {
			t.Fatal("the new authority signs before its root can be known")
		}
		return nil
	})
	if err := verifyUnder(t, x509Of(t, w.ctx, a), old); err != nil {
		t.Error(err)
	}

	// A certificate without its key: said, and nothing lost.
	other := newCompanyPKI(t)
	data, err := os.ReadFile(filepath.Join(other.dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	p.put("key.pem", data)
	w.degraded("is not the one of the certificate in")
	w.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/also-me")...)
	s := w.watch(a)
	w.until(s, "issuance under a broken upstream", func(ids []string) bool { return len(ids) == 2 })

	// The member starts again with what it has.
	m := w.Members[0]
	m.Kill()
	if err := w.RestartMember(w.ctx, m); err != nil {
		t.Fatal(err)
	}
	w.degraded("is not the one of the certificate in")
}

// A member whose upstream never signed is not ready, and says why.
func TestUpstreamThatIsNotThere(t *testing.T) {
	p := newCompanyPKI(t)
	if err := os.Remove(filepath.Join(p.dir, "key.pem")); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "cs-")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster.Cluster{Dir: dir, Bin: bin, TrustDomain: trustDomain, ServerYAML: p.yaml()}
	t.Cleanup(func() { c.Close(); os.RemoveAll(dir) })
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	started := make(chan error, 1)
	go func() {
		_, err := c.StartMember(ctx)
		started <- err
	}()
	deadline := time.Now().Add(time.Minute)
	for {
		var body []byte
		var err error = errors.New("it has not started")
		if raw, readErr := os.ReadFile(filepath.Join(dir, "ca-1", "server.yaml")); readErr == nil {
			health := strings.TrimSpace(strings.SplitN(strings.SplitN(string(raw), "\nhealth:", 2)[1], "\n", 2)[0])
			var res *http.Response
			if res, err = http.Get("http://" + health + "/ready"); err == nil {
				body, _ = io.ReadAll(res.Body)
				res.Body.Close()
			}
		}
		if bytes.Contains(body, []byte("there is no x509 authority yet")) && bytes.Contains(body, []byte("key.pem: no such file")) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not say why it is not ready: %q, %v", body, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	p.replace() // now it is there
	if err := <-started; err != nil {
		t.Fatal(err)
	}
}

// A cluster below another one of the same trust domain: each side's SVIDs, X.509 and JWT, verify with the other's bundle;
// and the cluster below goes on when the one above is gone.
func TestNestedCluster(t *testing.T) {
	above := newWorld(t, 1, "")
	aboveAgent := above.agent()
	id := "spiffe://" + trustDomain + "/below"
	above.createEntry(append(uidSelectors(), "--id", id, "--downstream")...)

	below := newWorld(t, 1, fmt.Sprintf("ca:\n  upstream:\n    countersign:\n      servers: [%s]\n      socket: %s\n", above.Members[0].Address, aboveAgent.Socket))
	below.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/workload")...)
	belowAgent := below.agent()

	up, down := x509Of(t, above.ctx, aboveAgent), x509Of(t, below.ctx, belowAgent)
	if up.ID.String() != id || down.ID.Path() != "/workload" {
		t.Fatalf("got %s and %s", up.ID, down.ID)
	}
	if err := verifyUnder(t, down, above.bundleRoots()...); err != nil {
		t.Errorf("an SVID of the cluster below does not verify above: %v", err)
	}
	if err := verifyUnder(t, up, below.bundleRoots()...); err != nil {
		t.Errorf("an SVID of the cluster above does not verify below: %v", err)
	}
	crossVerify := func(name string, from, to *cluster.Agent) {
		t.Helper()
		below.eventually("a JWT-SVID verifies "+name, func() error {
			ctx, cancel := context.WithTimeout(below.ctx, 10*time.Second)
			defer cancel()
			svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "them"}, workloadapi.WithAddr(from.Endpoint()))
			if err != nil {
				return err
			}
			bundles, err := workloadapi.FetchJWTBundles(ctx, workloadapi.WithAddr(to.Endpoint()))
			if err != nil {
				return err
			}
			_, err = jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{"them"})
			return err
		})
	}
	crossVerify("above", belowAgent, aboveAgent)
	crossVerify("below", aboveAgent, belowAgent)
	if a := below.x509Authorities()["active"]; !strings.HasPrefix(a.Upstream, "countersign:") {
		t.Errorf("the authority is under %q", a.Upstream)
	}

	// Without the entry there is no authority below.
	out, err := above.Admin(above.ctx, "entry", "create", "-s", "unix:uid:4242", "-s", "agent:kind:join_token", "--id", "spiffe://"+trustDomain+"/{unix:uid}", "--downstream")
	if err == nil || !strings.Contains(err.Error(), "placeholder") {
		t.Errorf("a downstream entry with a placeholder: %s, %v", out, err)
	}

	// The cluster above is gone.
	above.Members[0].Kill()
	below.degraded("the upstream has not told its roots since")
	below.createEntry(append(uidSelectors(), "--id", "spiffe://"+trustDomain+"/new")...)
	s := below.watch(belowAgent)
	below.until(s, "issuance without the cluster above", func(ids []string) bool { return len(ids) == 2 })
	if out, err := below.Admin(below.ctx, "status"); err != nil || !strings.Contains(out, "degraded") {
		t.Errorf("status: %s, %v", out, err)
	}
}
