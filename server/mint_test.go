package server

import (
	"bytes"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

func TestMintX509(t *testing.T) {
	w := newWorld(t).start(t)
	_, pub := newKey(t)
	req := &adminv1.MintX509Request{SpiffeId: "spiffe://example.org/printer", PublicKey: pub, DnsNames: []string{"printer.example.org"}, Ttl: durationpb.New(2 * time.Hour)}
	for name, c := range map[string]adminv1.MintClient{
		"operator": adminv1.NewMintClient(dialWith(t, w.socket, insecure.NewCredentials())),
		"admin":    adminv1.NewMintClient(w.asConn(t, identity.AdminOperator)),
	} {
		res, err := c.MintX509(testContext(t), req)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(res.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKIXPublicKey(leaf.PublicKey)
		if err != nil || !bytes.Equal(der, pub) || leaf.URIs[0].String() != req.SpiffeId || leaf.DNSNames[0] != req.DnsNames[0] || res.Serial != leaf.SerialNumber.Text(16) {
			t.Errorf("%s got %v of %v, %v", name, leaf.URIs, leaf.DNSNames, err)
		}
		if d := time.Until(leaf.NotAfter).Round(time.Minute); d != 2*time.Hour || !res.NotAfter.AsTime().Equal(leaf.NotAfter) {
			t.Errorf("%s got one for %v", name, d)
		}
		issuer, err := x509.ParseCertificate(res.Chain[1])
		if err != nil || leaf.CheckSignatureFrom(issuer) != nil {
			t.Errorf("the chain does not hold: %v", err)
		}
		e := w.wantEvent(t, audit.MintX509, audit.OK)
		if e.Who.Kind != name || e.Serial != res.Serial || e.Subjects[0] != req.SpiffeId || !e.NotAfter.Equal(leaf.NotAfter) || e.RequestID == "" || e.Details.Get("dns_names") == "" {
			t.Errorf("recorded as %+v", e)
		}
		// Its end is what the authority has to wait for.
		for _, a := range w.state.Authorities() {
			if a.Kind == identity.AuthorityX509 && w.srv.issued.last(a.ID).Before(leaf.NotAfter) {
				t.Errorf("of authority %s nothing is known to last until %v", a.ID, leaf.NotAfter)
			}
		}
	}
}

func TestMintJWT(t *testing.T) {
	w := newWorld(t).start(t)
	c := adminv1.NewMintClient(w.asConn(t, identity.AdminOperator))
	res, err := c.MintJWT(testContext(t), &adminv1.MintJWTRequest{SpiffeId: "spiffe://example.org/ci", Audience: []string{"registry"}, Ttl: durationpb.New(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(res.Token, ".") != 2 || res.KeyId == "" || time.Until(res.ExpiresAt.AsTime()).Round(time.Minute) != time.Hour {
		t.Errorf("got %d bytes by key %q until %v", len(res.Token), res.KeyId, res.ExpiresAt.AsTime())
	}
	e := w.wantEvent(t, audit.MintJWT, audit.OK)
	if e.Who.Role != "operator" || e.Subjects[0] != "spiffe://example.org/ci" || e.Audience[0] != "registry" || e.Details.Get("kid") != res.KeyId {
		t.Errorf("recorded as %+v", e)
	}
	if w.srv.issued.last(res.KeyId).Before(res.ExpiresAt.AsTime()) {
		t.Error("nothing is known to last under its key")
	}
	w.wantNoSecrets(t, nil, res.Token, strings.Split(res.Token, ".")[2])
}

func TestMintRefuses(t *testing.T) {
	w := newWorld(t).start(t)
	c := adminv1.NewMintClient(dialWith(t, w.socket, insecure.NewCredentials()))
	_, pub := newKey(t)
	ctx := testContext(t)
	for name, edit := range map[string]func(*adminv1.MintX509Request){
		"no ID":            func(r *adminv1.MintX509Request) { r.SpiffeId = "" },
		"a member's ID":    func(r *adminv1.MintX509Request) { r.SpiffeId = "spiffe://example.org/countersign/member/m2" },
		"an agent's ID":    func(r *adminv1.MintX509Request) { r.SpiffeId = "spiffe://example.org/countersign/agent/join/x" },
		"a reserved ID":    func(r *adminv1.MintX509Request) { r.SpiffeId = "spiffe://example.org/countersign/x" },
		"the trust domain": func(r *adminv1.MintX509Request) { r.SpiffeId = "spiffe://example.org" },
		"another one's":    func(r *adminv1.MintX509Request) { r.SpiffeId = "spiffe://other.org/x" },
		"a template":       func(r *adminv1.MintX509Request) { r.SpiffeId = "spiffe://example.org/{k8s:ns}" },
		"no key":           func(r *adminv1.MintX509Request) { r.PublicKey = nil },
		"a broken key":     func(r *adminv1.MintX509Request) { r.PublicKey = pub[:40] },
		"too long":         func(r *adminv1.MintX509Request) { r.Ttl = durationpb.New(24*time.Hour + time.Second) },
		"too short":        func(r *adminv1.MintX509Request) { r.Ttl = durationpb.New(time.Second) },
		"negative":         func(r *adminv1.MintX509Request) { r.Ttl = durationpb.New(-time.Hour) },
		"a broken name":    func(r *adminv1.MintX509Request) { r.DnsNames = []string{"Not A Name"} },
		"too many names":   func(r *adminv1.MintX509Request) { r.DnsNames = manyNames(identity.MaxDNSNames + 1) },
	} {
		r := &adminv1.MintX509Request{SpiffeId: "spiffe://example.org/x", PublicKey: pub}
		edit(r)
		if _, err := c.MintX509(ctx, r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, r := range map[string]*adminv1.MintJWTRequest{
		"no audience":   {SpiffeId: "spiffe://example.org/x"},
		"too many":      {SpiffeId: "spiffe://example.org/x", Audience: manyNames(identity.MaxAudiences + 1)},
		"a member's ID": {SpiffeId: "spiffe://example.org/countersign/member/m1", Audience: []string{"a"}},
		"too long":      {SpiffeId: "spiffe://example.org/x", Audience: []string{"a"}, Ttl: durationpb.New(25 * time.Hour)},
	} {
		if _, err := c.MintJWT(ctx, r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(w.audit.find(audit.MintX509, audit.OK)) + len(w.audit.find(audit.MintJWT, audit.OK)); n != 0 {
		t.Errorf("%d were recorded as minted", n)
	}
	if e := w.wantEvent(t, audit.MintX509, audit.Refused); e.Who.Kind != "operator" || e.Reason == "" {
		t.Errorf("recorded as %+v", e)
	}
	// What cannot be recorded is not signed.
	w.audit.set(func() { w.audit.deaf = errAuditDown })
	_, err := c.MintX509(ctx, &adminv1.MintX509Request{SpiffeId: "spiffe://example.org/x", PublicKey: pub})
	wantCode(t, err, codes.Unavailable)
	_, err = c.MintJWT(ctx, &adminv1.MintJWTRequest{SpiffeId: "spiffe://example.org/x", Audience: []string{"a"}})
	wantCode(t, err, codes.Unavailable)
	w.audit.set(func() { w.audit.deaf = nil })
	// A member that may not issue does not mint either.
	w.stale.Store(int64(2 * time.Hour))
	_, err = c.MintX509(ctx, &adminv1.MintX509Request{SpiffeId: "spiffe://example.org/x", PublicKey: pub})
	wantCode(t, err, codes.Unavailable)
}

func manyNames(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = "n" + strings.Repeat("x", i) + ".test"
	}
	return out
}
