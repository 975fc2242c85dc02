package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	downstreamv1 "countersign.io/countersign/api/downstream/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/ca"
	"countersign.io/countersign/identity"
)

func newUpperCluster(t *testing.T) *world {
	t.Helper()
	var w *world
	w = newWorldOn(t, ListenConfig{Downstream: func(id spiffeid.ID) bool { _, ok := w.state.Downstream(id.String()); return ok }})
	w.srv.cfg.Outside, w.srv.cfg.Authorities = w.state, w.state
	return w.start(t)
}

func (w *world) downstreamEntry(t *testing.T, path string, edits ...func(*adminv1.Entry)) *adminv1.Entry {
	t.Helper()
	e := &adminv1.Entry{Selectors: []string{"k8s:ns:ca", "k8s:sa:" + strings.Trim(path, "/")}, SpiffeId: "spiffe://example.org" + path, Downstream: true}
	for _, f := range edits {
		f(e)
	}
	return w.createEntry(t, e)
}

func TestDownstreamSign(t *testing.T) {
	w := newUpperCluster(t)
	w.downstreamEntry(t, "/below")
	c := downstreamv1.NewDownstreamClient(w.dial(t, w.certificate(t, "/below")))
	key, pub := newKey(t)
	res, err := c.Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(res.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) || !cert.IsCA || cert.MaxPathLen != 1 || cert.PermittedURIDomains[0] != "example.org" {
		t.Errorf("it is not an authority for the key, of the trust domain alone: %+v", cert)
	}
	if len(res.Chain) != 0 || len(res.Bundle.X509Authorities) != 1 || res.Bundle.TrustDomain != "example.org" {
		t.Errorf("chain of %d, %d roots", len(res.Chain), len(res.Bundle.X509Authorities))
	}
	if d := time.Until(cert.NotAfter).Round(time.Hour); d != ca.DefaultDownstreamTTL {
		t.Errorf("it lasts %v", d)
	}
	for ttl, want := range map[int64]time.Duration{3600: time.Hour, 1 << 40: ca.MaxDownstreamTTL, 1<<63 - 1: ca.MaxDownstreamTTL} {
		res, err := c.Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub, TtlSeconds: ttl})
		if err != nil {
			t.Fatal(err)
		}
		if cert, err = x509.ParseCertificate(res.Certificate); err != nil || time.Until(cert.NotAfter).Round(time.Minute) != want {
			t.Errorf("TTL of %d s: %v, %v", ttl, cert.NotAfter, err)
		}
	}
	// It ends with its entry.
	w.downstreamEntry(t, "/short", func(e *adminv1.Entry) { e.ExpiresAt = timestamppb.New(time.Now().Add(10 * time.Minute)) })
	short := downstreamv1.NewDownstreamClient(w.dial(t, w.certificate(t, "/short")))
	if res, err = short.Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub}); err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(res.Certificate); err != nil || time.Until(cert.NotAfter) > 10*time.Minute {
		t.Errorf("until %v, %v", cert.NotAfter, err)
	}
}

func TestDownstreamSignRefuses(t *testing.T) {
	w := newUpperCluster(t)
	entry := w.downstreamEntry(t, "/below")
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:x"}, SpiffeId: "spiffe://example.org/web"})
	w.downstreamEntry(t, "/ended", func(e *adminv1.Entry) { e.ExpiresAt = timestamppb.New(time.Now().Add(30 * time.Minute)) })
	_, pub := newKey(t)
	der := func(key any) []byte {
		out, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	_, agentCert := w.agent(t, "a1", "")
	for name, row := range map[string]struct {
		conn *grpc.ClientConn
		code codes.Code
	}{
		"an ordinary workload": {w.dial(t, w.certificate(t, "/web")), codes.PermissionDenied},
		"no entry at all":      {w.dial(t, w.certificate(t, "/other")), codes.PermissionDenied},
		"an ID that starts so": {w.dial(t, w.certificate(t, "/below/x")), codes.PermissionDenied},
		"an agent":             {w.dial(t, agentCert), codes.PermissionDenied},
		"a member":             {w.dial(t, w.certificate(t, "/countersign/member/m1")), codes.PermissionDenied},
		"a guest":              {w.dial(t, nil), codes.PermissionDenied},
	} {
		c := downstreamv1.NewDownstreamClient(row.conn)
		_, err := c.Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub})
		if status.Code(err) != row.code {
			t.Errorf("Sign by %s: %v", name, err)
		}
		stream, err := c.Sync(testContext(t))
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != row.code {
			t.Errorf("Sync by %s: %v", name, err)
		}
	}
	ended := downstreamv1.NewDownstreamClient(w.dial(t, w.certificate(t, "/ended")))
	c := downstreamv1.NewDownstreamClient(w.dial(t, w.certificate(t, "/below")))
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, req := range map[string]*downstreamv1.SignRequest{
		"no key":          {},
		"garbage":         {PublicKey: []byte("<html>")},
		"a large key":     {PublicKey: bytes.Repeat([]byte{1}, 10000)},
		"RSA":             {PublicKey: der(rsaKey.Public())},
		"P-521":           {PublicKey: der(p521.Public())},
		"a negative TTL":  {PublicKey: pub, TtlSeconds: -1},
		"a very negative": {PublicKey: pub, TtlSeconds: -1 << 62},
		"a short TTL":     {PublicKey: pub, TtlSeconds: 1},
	} {
		if _, err := c.Sign(testContext(t), req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	w.ahead.Store(int64(31 * time.Minute))
	_, err = ended.Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub})
	wantCode(t, err, codes.PermissionDenied)
	// The SVID of the connection has expired.
	w.ahead.Store(int64(2 * time.Hour))
	_, err = c.Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub})
	wantCode(t, err, codes.Unauthenticated)
	w.ahead.Store(0)
	// Neither entry nor authority: no more.
	if err := w.state.DeleteEntry(context.Background(), entry.Id); err != nil {
		t.Fatal(err)
	}
	_, err = c.Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub})
	wantCode(t, err, codes.PermissionDenied)
}

func TestDownstreamIsRateLimited(t *testing.T) {
	w := newUpperCluster(t)
	w.downstreamEntry(t, "/below")
	w.downstreamEntry(t, "/other")
	_, pub := newKey(t)
	c := downstreamv1.NewDownstreamClient(w.dial(t, w.certificate(t, "/below")))
	var err error
	for i := 0; i < 100 && err == nil; i++ {
		_, err = c.Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub})
	}
	wantCode(t, err, codes.ResourceExhausted)
	_, err = downstreamv1.NewDownstreamClient(w.dial(t, w.certificate(t, "/other"))).Sign(testContext(t), &downstreamv1.SignRequest{PublicKey: pub})
	if err != nil {
		t.Errorf("another cluster suffers: %v", err)
	}
}

type below struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[downstreamv1.Keys, workloadv1.Bundle]
}

func (w *world) below(t *testing.T, path string) *below {
	t.Helper()
	return belowOn(t, w.dial(t, w.certificate(t, path)))
}

func belowOn(t *testing.T, conn *grpc.ClientConn) *below {
	t.Helper()
	stream, err := downstreamv1.NewDownstreamClient(conn).Sync(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return &below{t, stream}
}

func (b *below) send(keys ...*downstreamv1.Keys_Key) {
	b.t.Helper()
	if err := b.stream.Send(&downstreamv1.Keys{Keys: keys}); err != nil {
		b.t.Fatal(err)
	}
}

// until takes bundles until one satisfies ok.
func (b *below) until(ok func(keys map[string]bool) bool) {
	b.t.Helper()
	for {
		m, err := b.stream.Recv()
		if err != nil {
			b.t.Fatal(err)
		}
		keys := map[string]bool{}
		for _, k := range m.JwtAuthorities {
			keys[k.Kid] = true
		}
		if ok(keys) {
			return
		}
	}
}

// end is how the stream ends.
func (b *below) end() error {
	for {
		if _, err := b.stream.Recv(); err != nil {
			return err
		}
	}
}

func jwtKey(t *testing.T, kid string, ttl time.Duration) *downstreamv1.Keys_Key {
	_, pub := newKey(t)
	return &downstreamv1.Keys_Key{Kid: kid, PublicKey: pub, NotAfter: timestamppb.New(time.Now().Add(ttl))}
}

func TestDownstreamSync(t *testing.T) {
	w := newUpperCluster(t)
	entry := w.downstreamEntry(t, "/below")
	b := w.below(t, "/below")
	b.until(func(keys map[string]bool) bool { return len(keys) == 1 }) // ours, at once
	b.send(jwtKey(t, "one", time.Hour), jwtKey(t, "past", -time.Hour), jwtKey(t, "long", 1000*24*time.Hour))
	b.until(func(keys map[string]bool) bool { return len(keys) == 3 && keys["one"] && keys["long"] && !keys["past"] })
	for _, f := range w.state.Foreign() {
		for _, k := range f.JWT {
			if k.NotAfter.After(time.Now().Add(maxForeignKeyLife)) || f.Source != "spiffe://example.org/below" {
				t.Errorf("%s of %s until %v", k.ID, f.Source, k.NotAfter)
			}
		}
	}
	// A message is the whole: what is not in it goes.
	b.send(jwtKey(t, "two", time.Hour))
	b.until(func(keys map[string]bool) bool { return len(keys) == 2 && keys["two"] })
	// The entry goes: the stream ends, and the keys stay until their end, since what they signed lives on.
	if err := w.state.DeleteEntry(context.Background(), entry.Id); err != nil {
		t.Fatal(err)
	}
	wantCode(t, b.end(), codes.PermissionDenied)
	if w.state.Bundle().JWT["two"] == nil {
		t.Error("the keys went with the entry")
	}
}

// Keys last no longer after their entry than a token that was signed by them before may.
func TestKeysBelowEndAfterTheirEntry(t *testing.T) {
	w := newUpperCluster(t)
	entry := w.downstreamEntry(t, "/below")
	b := w.below(t, "/below")
	b.send(jwtKey(t, "long", 300*24*time.Hour), jwtKey(t, "short", time.Hour))
	b.until(func(keys map[string]bool) bool { return keys["long"] && keys["short"] })
	if err := w.state.DeleteEntry(context.Background(), entry.Id); err != nil {
		t.Fatal(err)
	}
	wantCode(t, b.end(), codes.PermissionDenied)
	eventually(t, "the long one ends soon", func() bool {
		w.srv.endKeysBelow(context.Background())
		for _, k := range w.state.Foreign()[0].JWT {
			if k.NotAfter.After(time.Now().Add(identity.MaxJWTTL)) {
				return false
			}
		}
		return len(w.state.Foreign()[0].JWT) == 2
	})
	for _, k := range w.state.Foreign()[0].JWT {
		if k.ID == "short" && k.NotAfter.After(time.Now().Add(time.Hour)) {
			t.Errorf("%s got more time: %v", k.ID, k.NotAfter)
		}
	}
}

// A template, or an entry for other workloads, does not lead to the ID of a cluster below.
func TestOnlyDownstreamEntriesGiveTheirIDs(t *testing.T) {
	w := newUpperCluster(t)
	w.registerCluster(t)
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:shop"}, SpiffeId: "spiffe://example.org/{k8s:ns}/{k8s:sa}"})
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:ca"}, SpiffeId: "spiffe://example.org/shop/web"})
	sel := func(ns string) []identity.Selector {
		return []identity.Selector{identity.Selector("k8s:ns:" + ns), "k8s:sa:web"}
	}
	for _, ns := range []string{"shop", "ca"} {
		if g, _, err := w.srv.entitled(sel(ns), time.Now()); err != nil || len(g) != 1 || g[0].id.Path() != "/shop/web" {
			t.Fatalf("%s: %v, %v", ns, g, err)
		}
	}
	w.createEntry(t, &adminv1.Entry{Selectors: []string{"k8s:ns:below"}, SpiffeId: "spiffe://example.org/shop/web", Downstream: true})
	for _, ns := range []string{"shop", "ca"} {
		if g, _, err := w.srv.entitled(sel(ns), time.Now()); err == nil || len(g) != 0 {
			t.Errorf("%s: %v", ns, g)
		}
	}
	if g, _, err := w.srv.entitled(sel("below"), time.Now()); err != nil || len(g) != 1 {
		t.Errorf("the downstream entry itself: %v, %v", g, err)
	}
}

func TestDownstreamSyncEndsWithItsSVID(t *testing.T) {
	w := newUpperCluster(t)
	w.downstreamEntry(t, "/below")
	b := w.below(t, "/below")
	b.until(func(map[string]bool) bool { return true })
	w.ahead.Store(int64(2 * time.Hour))
	wantCode(t, b.end(), codes.Unauthenticated)
}

func TestDownstreamSyncRefuses(t *testing.T) {
	w := newUpperCluster(t)
	var own string
	for kid := range w.state.Bundle().JWT {
		own = kid
	}
	many := make([]*downstreamv1.Keys_Key, 1000)
	for i := range many {
		many[i] = jwtKey(t, fmt.Sprint(i), time.Hour)
	}
	weak := jwtKey(t, "weak", time.Hour)
	weak.PublicKey = weak.PublicKey[:20]
	endless := jwtKey(t, "endless", time.Hour)
	endless.NotAfter = nil
	odd := jwtKey(t, "odd", time.Hour)
	odd.NotAfter = &timestamppb.Timestamp{Seconds: 1 << 60}
	n := 0
	for name, row := range map[string]struct {
		keys []*downstreamv1.Keys_Key
		code codes.Code
	}{
		"1000 keys":         {many, codes.InvalidArgument},
		"a broken key":      {[]*downstreamv1.Keys_Key{weak}, codes.InvalidArgument},
		"no end":            {[]*downstreamv1.Keys_Key{endless}, codes.InvalidArgument},
		"a strange end":     {[]*downstreamv1.Keys_Key{odd}, codes.InvalidArgument},
		"no ID":             {[]*downstreamv1.Keys_Key{jwtKey(t, "", time.Hour)}, codes.InvalidArgument},
		"a long ID":         {[]*downstreamv1.Keys_Key{jwtKey(t, strings.Repeat("a", 1000), time.Hour)}, codes.InvalidArgument},
		"a control in it":   {[]*downstreamv1.Keys_Key{jwtKey(t, "a\nb", time.Hour)}, codes.InvalidArgument},
		"an ID twice":       {[]*downstreamv1.Keys_Key{jwtKey(t, "a", time.Hour), jwtKey(t, "a", time.Hour)}, codes.InvalidArgument},
		"the ID of our key": {[]*downstreamv1.Keys_Key{jwtKey(t, own, time.Hour)}, codes.AlreadyExists},
		"nothing in a key":  {[]*downstreamv1.Keys_Key{{}}, codes.InvalidArgument},
	} {
		n++
		path := fmt.Sprintf("/below-%d", n) // each its own allowance
		w.downstreamEntry(t, path)
		b := w.below(t, path)
		before := w.state.Bundle()
		b.send(row.keys...)
		if err := b.end(); status.Code(err) != row.code {
			t.Errorf("%s: %v", name, err)
		}
		if w.state.Bundle() != before {
			t.Errorf("%s: the bundle changed", name)
		}
	}
}

func TestDownstreamStreamsAreBounded(t *testing.T) {
	w := newUpperCluster(t)
	w.downstreamEntry(t, "/below")
	conn := w.dial(t, w.certificate(t, "/below"))
	var streams []*below
	for range maxDownstreamStreams {
		b := belowOn(t, conn)
		b.until(func(map[string]bool) bool { return true })
		streams = append(streams, b)
	}
	wantCode(t, belowOn(t, conn).end(), codes.ResourceExhausted)
	// All end when the member stops.
	w.stop()
	for _, b := range streams {
		if err := b.end(); status.Code(err) != codes.Unavailable {
			t.Fatalf("it ends by %v", err)
		}
	}
	if n := len(w.srv.downstreams.streams); n > maxDownstreamStreams {
		t.Errorf("%d streams are counted", n)
	}
}

func FuzzDownstreamKeys(f *testing.F) {
	f.Add("kid", []byte{1, 2, 3}, int64(1<<40))
	f.Add("", []byte{}, int64(-1))
	w := newWorld(f)
	w.srv.cfg.Outside, w.srv.cfg.Authorities = w.state, w.state
	f.Fuzz(func(t *testing.T, kid string, key []byte, end int64) {
		msg := &downstreamv1.Keys{Keys: []*downstreamv1.Keys_Key{{Kid: kid, PublicKey: key, NotAfter: &timestamppb.Timestamp{Seconds: end}}}}
		got, err := w.srv.foreignKeys("spiffe://example.org/below", msg)
		if err != nil {
			return
		}
		for _, k := range got.JWT {
			if _, err := ca.ParsePublicKey(k.PublicKey); err != nil || k.ID == "" || k.NotAfter.IsZero() || !k.NotAfter.After(w.srv.cfg.Now()) {
				t.Fatalf("taken: %+v", k)
			}
		}
		_ = identity.Foreign(got)
	})
}
