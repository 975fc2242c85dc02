package kube

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"countersign.io/countersign/identity"
)

const (
	testIssuer   = "https://kubernetes.default.svc.cluster.local"
	testAudience = "countersign"
	testUID      = "6a1f1b6c-0c1e-4b39-9d0a-5d1f4a1f9c01"
)

// deadline is for what must happen; it is never what a test waits for when all is well.
const deadline = 30 * time.Second

// clock is a clock that stands still until it is told to move.
type clock struct{ t atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.t.Store(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC).UnixNano())
	return c
}
func (c *clock) now() time.Time      { return time.Unix(0, c.t.Load()).UTC() }
func (c *clock) add(d time.Duration) { c.t.Add(int64(d)) }

// issuer signs tokens as a kube API server does.
type issuer struct {
	kid string
	key crypto.Signer
	alg jose.SignatureAlgorithm
	now func() time.Time
}

func newIssuer(t testing.TB, kid string, now func() time.Time) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{kid: kid, key: key, alg: jose.ES256, now: now}
}

func newRSAIssuer(t testing.TB, kid string, now func() time.Time) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{kid: kid, key: key, alg: jose.RS256, now: now}
}

func jwksOf(t testing.TB, issuers ...*issuer) []byte {
	t.Helper()
	var set jose.JSONWebKeySet
	for _, i := range issuers {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: i.key.Public(), KeyID: i.kid, Algorithm: string(i.alg), Use: "sig"})
	}
	b, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// claims are those of a good token for the pod web-0 on node-1.
func (i *issuer) claims() map[string]any {
	now := i.now()
	return map[string]any{
		"iss": testIssuer, "aud": []string{testAudience}, "sub": "system:serviceaccount:prod:web",
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(), "jti": "0c0ffee0-0000-4000-8000-000000000001",
		"kubernetes.io": map[string]any{
			"namespace":      "prod",
			"serviceaccount": map[string]any{"name": "web", "uid": "sa-uid-1"},
			"pod":            map[string]any{"name": "web-0", "uid": testUID},
			"node":           map[string]any{"name": "node-1", "uid": "node-uid-1"},
		},
	}
}

func kubeClaim(c map[string]any) map[string]any { return c["kubernetes.io"].(map[string]any) }

func sign(t testing.TB, alg jose.SignatureAlgorithm, kid string, key any, claims any) []byte {
	t.Helper()
	opts := (&jose.SignerOptions{})
	if kid != "" {
		opts = opts.WithHeader("kid", kid)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	o, err := s.Sign(b)
	if err != nil {
		t.Fatal(err)
	}
	out, err := o.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return []byte(out)
}

// token is a good token, changed by the edits before it is signed.
func (i *issuer) token(t testing.TB, edits ...func(map[string]any)) []byte {
	t.Helper()
	c := i.claims()
	for _, e := range edits {
		e(c)
	}
	return sign(t, i.alg, i.kid, i.key, c)
}

func forPod(name, uid string) func(map[string]any) {
	return func(c map[string]any) { kubeClaim(c)["pod"] = map[string]any{"name": name, "uid": uid} }
}

type podEvent struct {
	Type   string                       `json:"type"`
	Object metav1.PartialObjectMetadata `json:"object"`
}

// fakeAPI stands in for a kube API server: JWKS, TokenReview, and pods to list, get and watch.
type fakeAPI struct {
	*httptest.Server
	token string // bearer that it wants

	jwksFetches, reviews, lists, gets atomic.Int64
	silent, endless                   atomic.Bool   // watches tell nothing; lists go on for ever
	watching                          chan struct{} // one per watch that has begun

	mu       sync.Mutex
	jwks     http.HandlerFunc
	review   func(*authv1.TokenReview)
	refuse   map[string]int // "list pods" and so on -> HTTP status
	pods     map[string]metav1.PartialObjectMetadata
	revision int
	oldest   int // watches from before it get 410
	streams  map[chan podEvent]bool
	finished map[string]bool // UIDs of pods that have succeeded or failed

	namespaces, replicaSets fakeObjects

	configMaps map[string]*configMap // by namespace/name
}

func newFakeAPI(t testing.TB) *fakeAPI {
	t.Helper()
	f := &fakeAPI{
		token: "member-credential", watching: make(chan struct{}, 1000), refuse: make(map[string]int),
		pods: make(map[string]metav1.PartialObjectMetadata), revision: 100, streams: make(map[chan podEvent]bool), configMaps: make(map[string]*configMap),
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /openid/v1/jwks", func(w http.ResponseWriter, r *http.Request) {
		f.jwksFetches.Add(1)
		f.mu.Lock()
		h := f.jwks
		f.mu.Unlock()
		h(w, r)
	})
	mux.HandleFunc("POST /apis/authentication.k8s.io/v1/tokenreviews", f.serveReview)
	mux.HandleFunc("GET /api/v1/pods", f.servePods)
	mux.HandleFunc("GET /api/v1/namespaces", f.namespaces.serveAll(f, "namespaces"))
	mux.HandleFunc("GET /api/v1/namespaces/{name}", f.namespaces.serveOne(f, "namespaces"))
	mux.HandleFunc("GET /apis/apps/v1/replicasets", f.replicaSets.serveAll(f, "replicasets"))
	mux.HandleFunc("GET /apis/apps/v1/namespaces/{ns}/replicasets/{name}", f.replicaSets.serveOne(f, "replicasets"))
	mux.HandleFunc("GET /api/v1/namespaces/{ns}/pods", f.serveOne)
	mux.HandleFunc("GET /api/v1/namespaces/{ns}/pods/{name}", f.serveGet)
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		if f.allowed(w, r, "discovery") {
			fmt.Fprintf(w, `{"issuer": %q, "jwks_uri": "https://elsewhere/openid/v1/jwks"}`, testIssuer)
		}
	})
	mux.HandleFunc("GET /api/v1/namespaces/{ns}/configmaps/{name}", f.serveGetConfigMap)
	mux.HandleFunc("POST /api/v1/namespaces/{ns}/configmaps", f.serveCreateConfigMap)
	f.Server = httptest.NewUnstartedServer(mux)
	f.Config.ErrorLog = log.New(io.Discard, "", 0)
	f.StartTLS()
	t.Cleanup(func() { f.dropWatches(); f.CloseClientConnections(); f.Close() })
	return f
}

func (f *fakeAPI) caPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
}

func (f *fakeAPI) kubeconfig(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: u, user: {token: %s}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, f.URL, base64.StdEncoding.EncodeToString(f.caPEM()), f.token)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (f *fakeAPI) allowed(w http.ResponseWriter, r *http.Request, what string) bool {
	f.mu.Lock()
	code := f.refuse[what]
	f.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+f.token {
		code = http.StatusUnauthorized
	}
	if code == 0 {
		return true
	}
	reason := map[int]metav1.StatusReason{401: metav1.StatusReasonUnauthorized, 403: metav1.StatusReasonForbidden, 404: metav1.StatusReasonNotFound, 410: metav1.StatusReasonExpired}[code]
	f.status(w, code, reason, "refused "+what)
	return false
}

func (f *fakeAPI) status(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: reason, Message: message})
}

func (f *fakeAPI) setRefuse(what string, code int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse[what] = code
}

func (f *fakeAPI) serveReview(w http.ResponseWriter, r *http.Request) {
	f.reviews.Add(1)
	if !f.allowed(w, r, "review") {
		return
	}
	var tr authv1.TokenReview
	if err := json.NewDecoder(r.Body).Decode(&tr); err != nil {
		http.Error(w, err.Error(), 400)
		return
	}
	f.mu.Lock()
	f.review(&tr)
	f.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(tr)
}

// agree is a TokenReview answer that says what the good token says.
func agree(tr *authv1.TokenReview) {
	tr.Status = authv1.TokenReviewStatus{
		Authenticated: true, Audiences: tr.Spec.Audiences,
		User: authv1.UserInfo{Username: "system:serviceaccount:prod:web", UID: "sa-uid-1", Extra: map[string]authv1.ExtraValue{
			extraPodName: {"web-0"}, extraPodUID: {testUID}, extraNodeName: {"node-1"}, extraNodeUID: {"node-uid-1"},
		}},
	}
}

func (f *fakeAPI) setReview(r func(*authv1.TokenReview)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.review = r
}

func partial(ns, name, uid string, revision int) metav1.PartialObjectMetadata {
	return metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"},
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(uid), ResourceVersion: strconv.Itoa(revision)},
	}
}

func (f *fakeAPI) addPod(name, uid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revision++
	f.pods[uid] = partial("prod", name, uid, f.revision)
	f.send(podEvent{"ADDED", f.pods[uid]})
}

func (f *fakeAPI) deletePod(uid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revision++
	p := f.pods[uid]
	p.ResourceVersion = strconv.Itoa(f.revision)
	delete(f.pods, uid)
	f.send(podEvent{"DELETED", p})
}

// finishPod lets a pod succeed, or fail: to a watch for those that have not, it is as if it had been deleted.
func (f *fakeAPI) finishPod(uid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revision++
	p := f.pods[uid]
	p.ResourceVersion = strconv.Itoa(f.revision)
	f.pods[uid] = p
	if f.finished == nil {
		f.finished = make(map[string]bool)
	}
	f.finished[uid] = true
	f.send(podEvent{"DELETED", p})
}

// matches knows one field selector, with or without a name before it.
func (f *fakeAPI) matches(r *http.Request, p metav1.PartialObjectMetadata) bool {
	only := r.URL.Query().Get("fieldSelector")
	if name, rest, ok := strings.Cut(only, ","); ok && strings.HasPrefix(name, "metadata.name=") {
		if p.Name != strings.TrimPrefix(name, "metadata.name=") || p.Namespace != r.PathValue("ns") {
			return false
		}
		only = rest
	}
	if only != unfinished {
		panic("pods are to be selected by " + unfinished)
	}
	return !f.finished[string(p.UID)]
}

func (f *fakeAPI) send(e podEvent) {
	for c := range f.streams {
		c <- e
	}
}

// dropWatches ends every watch, and forgets the past: who comes back must list.
func (f *fakeAPI) dropWatches() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.streams {
		close(c)
		delete(f.streams, c)
	}
	f.revision++
	f.oldest = f.revision
}

func (f *fakeAPI) servePods(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("watch") == "" {
		f.serveList(w, r)
		return
	}
	if !f.allowed(w, r, "watch pods") {
		return
	}
	from, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	f.mu.Lock()
	if from < f.oldest {
		f.mu.Unlock()
		f.status(w, http.StatusGone, metav1.StatusReasonExpired, "too old")
		return
	}
	c := make(chan podEvent, 100)
	f.streams[c] = true
	f.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	f.watching <- struct{}{}
	for {
		select {
		case <-r.Context().Done():
			f.mu.Lock()
			delete(f.streams, c)
			f.mu.Unlock()
			return
		case e, ok := <-c:
			if !ok {
				return
			}
			if f.silent.Load() {
				continue
			}
			json.NewEncoder(w).Encode(e)
			w.(http.Flusher).Flush()
		}
	}
}

// serveList gives pages of two, whatever was asked for, so that paging is always tried.
func (f *fakeAPI) serveList(w http.ResponseWriter, r *http.Request) {
	f.lists.Add(1)
	if !f.allowed(w, r, "list pods") {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	l := metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadataList", APIVersion: "meta.k8s.io/v1"}}
	l.ResourceVersion = strconv.Itoa(f.revision)
	from := r.URL.Query().Get("continue")
	uids := make([]string, 0, len(f.pods))
	for uid := range maps.Keys(f.pods) {
		if uid > from && f.matches(r, f.pods[uid]) {
			uids = append(uids, uid)
		}
	}
	for range 2 {
		best := ""
		for _, u := range uids {
			if (best == "" || u < best) && (len(l.Items) == 0 || u > string(l.Items[len(l.Items)-1].UID)) {
				best = u
			}
		}
		if best != "" {
			l.Items = append(l.Items, f.pods[best])
		}
	}
	if len(uids) > len(l.Items) {
		l.Continue = string(l.Items[len(l.Items)-1].UID)
	}
	if f.endless.Load() {
		l.Continue = "0"
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(l)
}

// serveOne is a list of the pod of a name, if it matches.
func (f *fakeAPI) serveOne(w http.ResponseWriter, r *http.Request) {
	f.gets.Add(1)
	if !f.allowed(w, r, "get pods") {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	l := metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadataList", APIVersion: "meta.k8s.io/v1"}}
	for _, p := range f.pods {
		if f.matches(r, p) {
			l.Items = append(l.Items, p)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(l)
}

func (f *fakeAPI) serveGet(w http.ResponseWriter, r *http.Request) {
	f.gets.Add(1)
	if !f.allowed(w, r, "get pods") {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pods {
		if p.Namespace == r.PathValue("ns") && p.Name == r.PathValue("name") {
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(p)
			return
		}
	}
	f.status(w, http.StatusNotFound, metav1.StatusReasonNotFound, "no such pod")
}

// rig is a verifier with all that it logs.
type rig struct {
	*Verifier
	log *logBuffer
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
func (l *logBuffer) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

func newRig(t testing.TB, now func() time.Time, edit ...func(*Config)) *rig {
	t.Helper()
	l := &logBuffer{}
	cfg := Config{Log: slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug})), Now: now, RetryInterval: 10 * time.Millisecond, RequestTimeout: deadline}
	for _, e := range edit {
		e(&cfg)
	}
	v, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return &rig{Verifier: v, log: l}
}

func (r *rig) set(t testing.TB, clusters ...identity.KubeCluster) {
	t.Helper()
	if err := r.SetClusters(clusters); err != nil {
		t.Fatal(err)
	}
}

func offline(name string, jwks []byte) identity.KubeCluster {
	return identity.KubeCluster{Name: name, Issuer: testIssuer, Audience: testAudience, JWKS: jwks}
}

// noLeak fails the test if the text repeats any piece of the token.
func noLeak(t testing.TB, text string, token []byte) {
	t.Helper()
	for i := 0; i+16 <= len(text); i++ {
		if strings.Contains(string(token), text[i:i+16]) {
			t.Fatalf("text repeats a part of the token: %.200s", text)
		}
	}
}
