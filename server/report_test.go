package server

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

// Strangers must not fill the log; what agents are refused, and what fails inside, is still seen, and so is how much is not.
func TestStrangersDoNotFillTheLog(t *testing.T) {
	w := newWorld(t)
	now := time.Now()
	w.srv.cfg.Now = func() time.Time { return now } // no time passes
	denied := fmt.Errorf("%w: no", identity.ErrDenied)
	lines := func(kind kind, level string) int {
		n := 0
		for line := range strings.Lines(w.log.String()) {
			if strings.Contains(line, "call refused") && strings.Contains(line, "level="+level) && strings.Contains(line, "caller=\""+kind.String()) {
				n++
			}
		}
		return n
	}
	const calls = 10 * strangerBurst
	for range calls {
		for _, k := range []kind{guest, workload, agent} {
			if err := w.srv.report(caller{kind: k}, "/x", denied); err == nil {
				t.Fatal("a refusal became a success")
			}
		}
	}
	if n := lines(guest, "INFO") + lines(workload, "INFO"); n != strangerBurst {
		t.Errorf("%d lines about strangers: want %d", n, strangerBurst)
	}
	if n := lines(agent, "INFO"); n != calls {
		t.Errorf("%d lines about agents: want all %d", n, calls)
	}
	for range calls {
		w.srv.report(caller{kind: guest}, "/x", io.EOF)
	}
	if n := lines(guest, "ERROR"); n != strangerBurst {
		t.Errorf("%d lines about faults: want %d, whatever was refused before", n, strangerBurst)
	}
	now = now.Add(time.Second)
	w.srv.report(caller{kind: guest}, "/x", denied)
	if want := fmt.Sprintf("left_out_before=%d", 2*calls-strangerBurst); !strings.Contains(w.log.String(), want) {
		t.Errorf("the log does not say %s", want)
	}
}

// Strangers are told what kind of fault it is, and nothing of what is registered; agents and the log get all of it.
func TestStrangersAreNotToldWhatIsRegistered(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	_, cert := w.agent(t, "a1", "node-1")
	_, pub := newKey(t)
	guests, conn := w.dial(t, nil), w.dial(t, cert)
	register := func(edit func(*identity.KubeCluster)) {
		t.Helper()
		k, _ := w.state.KubeCluster(cluster)
		c := *k
		c.Audience = "our-own-audience"
		edit(&c)
		if err := w.pods.SetClusters([]identity.KubeCluster{c}); err != nil && !errors.Is(err, identity.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	check := func(name, token string, code codes.Code, class string, full ...string) {
		t.Helper()
		ev := &workloadv1.Evidence{Token: token}
		_, x509 := workloadv1.NewWorkloadClient(guests).IssueX509(testContext(t), &workloadv1.IssueX509Request{Requests: []*workloadv1.X509Request{{PublicKey: pub, Evidence: ev}}})
		_, jwt := workloadv1.NewWorkloadClient(guests).IssueJWT(testContext(t), &workloadv1.IssueJWTRequest{Evidence: ev, Audience: []string{"db"}})
		_, node := attest(t, guests, byKube(token, "", pub))
		for way, err := range map[string]error{"X.509": x509, "JWT": jwt, "attest": node} {
			if status.Code(err) != code || !strings.Contains(err.Error(), class) {
				t.Errorf("%s, %s: %v: want %v and %q", name, way, err, code, class)
				continue
			}
			for _, said := range append([]string{"our-own", ".kubeconfig", "c1"}, full...) {
				if strings.Contains(err.Error(), said) {
					t.Errorf("%s, %s: a stranger is told %q: %v", name, way, said, err)
				}
			}
			_, at, ok := strings.Cut(err.Error(), "see the member's log, request at ")
			if !ok || !strings.Contains(w.log.String(), "request_at="+at) {
				t.Errorf("%s, %s: %v: it does not lead to the log's line", name, way, err)
			}
		}
		wantError(t, w.issueOne(t, conn, ev), code, full...)
		for _, said := range full {
			if !strings.Contains(w.log.String(), strings.ReplaceAll(said, `"`, `\"`)) {
				t.Errorf("%s: the log does not say %q", name, said)
			}
		}
		w.wantNoSecrets(t, nil, token)
	}
	w.srv.refusals.lines.SetLimit(rate.Inf) // what follows is many lines
	register(func(*identity.KubeCluster) {})
	ours := w.podToken(t, pod{aud: "our-own-audience"})
	check("expired", w.podToken(t, pod{aud: "our-own-audience", exp: -time.Hour}), codes.Unauthenticated, "expired", "ago")
	check("wrong audience", w.podToken(t, pod{aud: "vault"}), codes.Unauthenticated, "wrong audience", `"our-own-audience"`)
	check("wrong signature", ours[:len(ours)-8]+"AAAAAAAA", codes.Unauthenticated, "not signed", `"k1"`, `"c1"`)
	check("garbage", "a.b.c", codes.InvalidArgument, "not a well-formed token", "JWS")
	register(func(k *identity.KubeCluster) { k.Issuer = "https://other.test" })
	check("unknown issuer", ours, codes.Unauthenticated, "issuer is unknown", "of the 1 registered")
	register(func(k *identity.KubeCluster) { k.TokenReview, k.Kubeconfig = true, "/nowhere/our-own.kubeconfig" })
	check("API server out of reach", ours, codes.Unavailable, "try again", "/nowhere/our-own.kubeconfig")

	w.srv.refusals.lines.SetLimit(0)
	w.srv.refusals.lines.SetBurst(0)
	_, err := attest(t, guests, byKube(ours, "", pub))
	wantCode(t, err, codes.Unavailable, "left out why")
}
