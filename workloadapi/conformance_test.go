package workloadapi

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	spiffe "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"

	"countersign.io/countersign/identity"
)

// idCases asks for JWT-SVIDs by ID and validates tokens whose subject it is: the two places where a caller
// hands the Workload API a SPIFFE ID.
func idCases(t *testing.T, good, bad []string) {
	f := start(t)
	f.source.jwt = func(_ string, _ []string, id spiffeid.ID) ([]identity.JWTSVID, error) {
		return []identity.JWTSVID{{ID: id, Token: "a.b.c"}}, nil
	}
	client := f.client("web")
	fetch := func(id string) error {
		_, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}, SpiffeId: id})
		return err
	}
	validate := func(id string) error {
		_, err := client.ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: f.d.token(id, nil, nil)})
		return err
	}
	for _, id := range good {
		// The keys are the same for every trust domain here, so that nothing but the ID can make a difference.
		u := f.d.update(f.d.svid("/web", ""))
		u.Bundles[spiffeid.RequireFromString(id).TrustDomain()] = f.d.bundle()
		f.source.set("web", u)
		if err := fetch(id); err != nil {
			t.Errorf("asking for %.80q: %v", id, err)
		}
		if err := validate(id); err != nil {
			t.Errorf("a token of %.80q: %v", id, err)
		}
	}
	for _, id := range bad {
		err := fetch(id)
		wantCode(t, err, codes.InvalidArgument)
		if !strings.Contains(err.Error(), "SPIFFE ID") && !strings.Contains(err.Error(), "trust domain name") {
			t.Errorf("asking for %.80q: the error does not say what is wrong: %v", id, err)
		}
		err = validate(id)
		wantCode(t, err, codes.InvalidArgument)
		if !strings.Contains(err.Error(), "sub") {
			t.Errorf("a token of %.80q: the error does not say what is wrong: %v", id, err)
		}
	}
}

// SPIFFE-ID section 2: scheme spiffe, no query, no fragment.
func TestConformance01SchemeQueryFragment(t *testing.T) {
	idCases(t, []string{"spiffe://example.org/web"},
		[]string{"http://example.org/web", "example.org/web", "/web", "://example.org/web", "spiffe:example.org/web",
			"spiffe://example.org/web?q=1", "spiffe://example.org/web?", "spiffe://example.org/web#f", "spiffe://example.org/web#"})
}

// SPIFFE-ID section 2.1: the trust domain's characters; no userinfo, no port, no percent-encoding.
func TestConformance02TrustDomainName(t *testing.T) {
	idCases(t, []string{"spiffe://a/web", "spiffe://a-b_c.0/web", "spiffe://127.0.0.1/web"},
		[]string{"spiffe:///web", "spiffe://", "spiffe://Example.org/web", "spiffe://user@example.org/web", "spiffe://example.org:8443/web",
			"spiffe://exa%6dple.org/web", "spiffe://exämple.org/web", "spiffe://[::1]/web", "spiffe://exa mple/web"})
}

// SPIFFE-ID section 2.2: the path's segments and their characters.
func TestConformance03PathSegments(t *testing.T) {
	idCases(t, []string{"spiffe://example.org/A-b_c.0/..../.x", "spiffe://example.org"},
		[]string{"spiffe://example.org/", "spiffe://example.org/a/", "spiffe://example.org/a//b", "spiffe://example.org//a",
			"spiffe://example.org/./a", "spiffe://example.org/a/..", "spiffe://example.org/a%2fb", "spiffe://example.org/ä",
			"spiffe://example.org/a b", "spiffe://example.org/a\x00", "spiffe://example.org/a:b"})
}

// SPIFFE-ID section 2.3: IDs of 2048 bytes and trust domain names of 255 are accepted, longer ones are not.
func TestConformance04Lengths(t *testing.T) {
	id := func(n int) string {
		return "spiffe://example.org/" + strings.Repeat("a", n-len("spiffe://example.org/"))
	}
	td := func(n int) string { return "spiffe://" + strings.Repeat("a", n) + "/web" }
	idCases(t, []string{id(2048), td(255)}, []string{id(2049), id(8000), td(256)})
}

// X509-SVID section 2: exactly one URI SAN. What breaks this is not handed out, and if it were, go-spiffe would
// not take it.
func TestConformance05OneURISAN(t *testing.T) {
	f := start(t)
	two := f.d.svid("/web", "", "spiffe://example.org/web", "spiffe://example.org/admin")
	for name, bad := range map[string]identity.X509SVID{
		"two": two, "none": f.d.svid("/web", "", []string{}...), "another": f.d.svid("/web", "", "spiffe://example.org/admin"),
	} {
		f.source.set("web", f.d.update(bad))
		_, err := f.spiffe().FetchX509SVID(f.ctx())
		wantCode(t, err, codes.Internal)
		if strings.Contains(err.Error(), "admin") {
			t.Errorf("%s: the error tells a stranger what is inside: %v", name, err)
		}
	}
	if _, err := x509svid.ParseRaw(two.Chain[0], two.Key); err == nil {
		t.Error("go-spiffe takes a certificate with two URI SANs")
	}
	f.source.set("web", f.d.update(f.d.svid("/web", "")))
	if _, err := f.spiffe().FetchX509SVID(f.ctx()); err != nil {
		t.Errorf("one URI SAN: %v", err)
	}
}

// X509-SVID section 5.1: RFC 5280 path validation, against the bundle of the SVID's own trust domain only. A
// client can do that with what is served: the bundles of its own and of a federated trust domain stay apart.
func TestConformance11PathValidationByTrustDomain(t *testing.T) {
	f := start(t)
	other, stranger := newDomain("other.org"), newDomain("stranger.org")
	u := f.d.update(f.d.svid("/web", ""))
	u.Bundles[other.td] = other.bundle()
	f.source.set("web", u)
	source, err := spiffe.NewX509Source(f.ctx(), spiffe.WithClient(f.spiffe()))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	forged := *other // signs with its own authority for our trust domain
	forged.td = f.d.td
	for name, tc := range map[string]struct {
		svid identity.X509SVID
		ok   bool
	}{
		"own": {f.d.svid("/api", ""), true}, "federated": {other.svid("/api", ""), true}, "unknown": {stranger.svid("/api", ""), false},
		"own name, federated authority": {forged.svid("/api", ""), false},
	} {
		id, _, err := x509svid.ParseAndVerify(tc.svid.Chain[:1], source)
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil && id != tc.svid.ID {
			t.Errorf("%s: verified as %s", name, id)
		}
	}
}

// JWT-SVID section 3: sub is the SPIFFE ID; aud is not empty and matched; exp is required and in the future.
func TestConformance15SubjectAudienceExpiry(t *testing.T) {
	f := start(t)
	client := f.client("web")
	id := "spiffe://example.org/api"
	now := time.Now()
	for name, tc := range map[string]struct {
		sub    string
		claims map[string]any
		says   string // empty: it is good
	}{
		"good":             {id, nil, ""},
		"aud a string":     {id, map[string]any{"aud": "test"}, ""},
		"one aud of many":  {id, map[string]any{"aud": []string{"x", "test"}}, ""},
		"no sub":           {"", map[string]any{"sub": nil}, "sub"},
		"sub no SPIFFE ID": {"api", nil, "sub"},
		"sub a number":     {"", map[string]any{"sub": 5}, "claims"},
		"no aud":           {id, map[string]any{"aud": nil}, "audience"},
		"empty aud":        {id, map[string]any{"aud": []string{}}, "audience"},
		"another aud":      {id, map[string]any{"aud": []string{"tes", "test2", "TEST"}}, "audience"},
		"no exp":           {id, map[string]any{"exp": nil}, "exp"},
		"exp in the past":  {id, map[string]any{"exp": now.Add(-time.Second).Unix()}, "expired"},
		"exp a string":     {id, map[string]any{"exp": "tomorrow"}, "verifying"},
		"nbf to come":      {id, map[string]any{"nbf": now.Add(time.Hour).Unix()}, "holds from"},
		"nbf just to come": {id, map[string]any{"nbf": now.Add(3 * time.Second).Unix()}, ""},
	} {
		resp, err := client.ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: f.d.token(tc.sub, tc.claims, nil)})
		switch {
		case tc.says == "":
			if err != nil || resp.SpiffeId != id {
				t.Errorf("%s: %v, %v", name, resp, err)
			}
		case err == nil:
			t.Errorf("%s: accepted", name)
		default:
			wantCode(t, err, codes.InvalidArgument)
			if !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%s: the error does not say %q: %v", name, tc.says, err)
			}
		}
	}
}

// Workload Endpoint section 3: gRPC on a Unix socket; sections 3 and 6: without the metadata
// workload.spiffe.io: true every request is refused with InvalidArgument.
func TestConformance26SecurityHeader(t *testing.T) {
	f := start(t)
	conn := f.conn("web")
	api := workload.NewSpiffeWorkloadAPIClient(conn)
	first := func(stream interface{ RecvMsg(any) error }, err error, m any) error {
		if err != nil {
			return err
		}
		return stream.RecvMsg(m)
	}
	calls := map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			s, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			return first(s, err, new(workload.X509SVIDResponse))
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			s, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			return first(s, err, new(workload.X509BundlesResponse))
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			s, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			return first(s, err, new(workload.JWTBundlesResponse))
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"test"}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: f.d.token("spiffe://example.org/web", nil, nil)})
			return err
		},
		"reflection": func(ctx context.Context) error {
			s, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
			if err != nil {
				return err
			}
			// Its error, if any, comes with the answer.
			s.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}})
			_, err = s.Recv()
			return err
		},
	}
	for name, call := range calls {
		for _, header := range [][]string{nil, {"False"}, {"True"}, {"truex"}, {"true", "true"}, {"1"}} {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			for _, h := range header {
				ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", h)
			}
			err := call(ctx)
			cancel()
			if err == nil {
				t.Fatalf("%s with header %q was served", name, header)
			}
			wantCode(t, err, codes.InvalidArgument)
		}
		if err := call(f.ctx()); err != nil {
			t.Errorf("%s with the header: %v", name, err)
		}
	}
}

// Workload Endpoint section 6: Unavailable while initialising and when load is shed, PermissionDenied without
// an identity; section 7: server reflection.
func TestConformance28CodesAndReflection(t *testing.T) {
	f := start(t, withLimits(Limits{Caller: Quota{Streams: 2}}))
	f.source.set("early", fmt.Errorf("%w: no member has answered yet", identity.ErrUnavailable))
	f.source.set("nobody", nil)
	for name, want := range map[string]codes.Code{"early": codes.Unavailable, "nobody": codes.PermissionDenied} {
		_, err := f.x509(name).Recv()
		wantCode(t, err, want)
		_, err = f.client(name).FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
		wantCode(t, err, want)
		_, err = f.client(name).ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: "a.b.c"})
		wantCode(t, err, want)
	}
	f.source.set("late", errors.New("a secret of the inside"))
	_, err := f.x509("late").Recv()
	wantCode(t, err, codes.Internal)
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the error tells a stranger what is inside: %v", err)
	}
	for range 2 { // as many as the caller may hold
		if _, err := f.x509("web").Recv(); err != nil {
			t.Fatal(err)
		}
	}
	_, err = f.x509("web").Recv()
	wantCode(t, err, codes.Unavailable)

	f.source.set("tool", f.d.update(f.d.svid("/tool", "")))
	stream, err := grpc_reflection_v1.NewServerReflectionClient(f.conn("tool")).ServerReflectionInfo(f.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_FileContainingSymbol{
		FileContainingSymbol: "SpiffeWorkloadAPI"}}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || resp.GetFileDescriptorResponse() == nil {
		t.Fatalf("reflection of the Workload API: %v, %v", resp, err)
	}
}

// Workload API section 1: the X.509 and JWT profiles are both served; section 2: the service is not extended;
// section 7: the WIT profile, which is not served, answers Unimplemented.
func TestConformance29Profiles(t *testing.T) {
	f := start(t)
	client := f.spiffe()
	if _, err := client.FetchX509Context(f.ctx()); err != nil {
		t.Errorf("FetchX509SVID: %v", err)
	}
	if _, err := client.FetchX509Bundles(f.ctx()); err != nil {
		t.Errorf("FetchX509Bundles: %v", err)
	}
	if _, err := client.FetchJWTBundles(f.ctx()); err != nil {
		t.Errorf("FetchJWTBundles: %v", err)
	}
	f.source.jwt = func(_ string, aud []string, id spiffeid.ID) ([]identity.JWTSVID, error) {
		return []identity.JWTSVID{{ID: f.d.svid("/web", "").ID, Token: f.d.token("spiffe://example.org/web", map[string]any{"aud": aud}, nil)}}, nil
	}
	svid, err := client.FetchJWTSVID(f.ctx(), jwtsvid.Params{Audience: "test"})
	if err != nil {
		t.Fatalf("FetchJWTSVID: %v", err)
	}
	if _, err := client.ValidateJWTSVID(f.ctx(), svid.Marshal(), "test"); err != nil {
		t.Errorf("ValidateJWTSVID: %v", err)
	}
	wit, err := f.client("web").FetchWITSVID(f.ctx(), &workload.WITSVIDRequest{})
	if err == nil {
		_, err = wit.Recv()
	}
	wantCode(t, err, codes.Unimplemented)
	witBundles, err := f.client("web").FetchWITBundles(f.ctx(), &workload.WITBundlesRequest{})
	if err == nil {
		_, err = witBundles.Recv()
	}
	wantCode(t, err, codes.Unimplemented)

	var methods []string
	services := f.server.grpcServer().GetServiceInfo()
	for _, m := range services["SpiffeWorkloadAPI"].Methods {
		methods = append(methods, m.Name)
	}
	if len(methods) != 7 || len(services) != 3 { // and reflection in two versions
		t.Errorf("the endpoint serves %d services, and the Workload API has the methods %q", len(services), methods)
	}
}

// Workload API section 4.3: the first message at once; every message is the full state; pushed when an SVID or a
// bundle changes.
func TestConformance30FullStatePushed(t *testing.T) {
	f := start(t)
	one, two := f.d.svid("/one", ""), f.d.svid("/two", "")
	f.source.set("web", f.d.update(one))
	stream := f.x509("web")
	recv := func() *workload.X509SVIDResponse {
		t.Helper()
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if got := ids(recv()); got != "spiffe://example.org/one" {
		t.Fatalf("first message: %s", got)
	}
	f.source.set("web", f.d.update(one, two))
	if got := ids(recv()); got != "spiffe://example.org/one spiffe://example.org/two" {
		t.Fatalf("an SVID more: %s", got)
	}
	f.source.set("web", f.d.update(one, two)) // another value that says the same: nothing is sent, see the next message
	rotated := f.d.svid("/two", "")
	f.source.set("web", f.d.update(one, rotated))
	if m := recv(); string(m.Svids[1].X509SvidKey) != string(rotated.Key) {
		t.Fatal("an SVID rotated: its key is not the new one")
	}
	u := f.d.update(one, rotated)
	ca := newDomain("example.org").ca
	u.Bundles[f.d.td].X509 = append(u.Bundles[f.d.td].X509, ca.Raw)
	f.source.set("web", u)
	if m := recv(); len(must(x509.ParseCertificates(m.Svids[0].Bundle))) != 2 || ids(m) != "spiffe://example.org/one spiffe://example.org/two" {
		t.Fatalf("an authority more: %v", ids(m))
	}
	f.source.set("web", f.d.update(two))
	if m := recv(); ids(m) != "spiffe://example.org/two" || len(must(x509.ParseCertificates(m.Svids[0].Bundle))) != 1 {
		t.Fatalf("an SVID and an authority less: %s", ids(m))
	}
}

// Workload API section 4.5: a mandatory field left at its default is InvalidArgument.
func TestConformance31MandatoryFields(t *testing.T) {
	f := start(t)
	client := f.client("web")
	for _, audience := range [][]string{nil, {""}, {"test", ""}} {
		_, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: audience})
		wantCode(t, err, codes.InvalidArgument)
	}
	good := f.d.token("spiffe://example.org/web", nil, nil)
	for _, req := range []*workload.ValidateJWTSVIDRequest{{}, {Audience: "test"}, {Svid: good}} {
		_, err := client.ValidateJWTSVID(f.ctx(), req)
		wantCode(t, err, codes.InvalidArgument)
	}
	if _, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}}); err != nil {
		t.Error(err)
	}
	if _, err := client.ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: good}); err != nil {
		t.Error(err)
	}
}

// Workload API section 5.2.1: at least one SVID; leaf first; DER; PKCS #8; hints unique in a response; the loss
// of all identities ends the stream with PermissionDenied. Section 8: the first is the default; a hint may have
// 1024 bytes.
func TestConformance32X509SVIDs(t *testing.T) {
	f := start(t)
	long := strings.Repeat("h", 1024)
	f.source.set("web", f.d.update(f.d.svid("/first", "internal"), f.d.svid("/second", "external"), f.d.svid("/third", "internal"),
		f.d.svid("/fourth", ""), f.d.svid("/fifth", ""), f.d.svid("/sixth", long)))
	svids, err := f.spiffe().FetchX509SVIDs(f.ctx()) // go-spiffe parses DER and PKCS #8, and drops what repeats a hint
	if err != nil {
		t.Fatal(err)
	}
	if svids[0].ID.Path() != "/first" || len(svids) != 6 {
		t.Errorf("got %d SVIDs, %s first", len(svids), svids[0].ID)
	}
	stream := f.x509("web")
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"internal", "external", "", "", "", long} {
		if m.Svids[i].Hint != want {
			t.Errorf("hint of SVID %d: %q, want %q", i, m.Svids[i].Hint, want)
		}
		chain := must(x509.ParseCertificates(m.Svids[i].X509Svid))
		if len(chain) != 2 || chain[0].IsCA || !chain[1].IsCA || chain[0].URIs[0].String() != m.Svids[i].SpiffeId {
			t.Errorf("chain of SVID %d: the leaf is not first", i)
		}
	}
	jwts, err := f.client("web").FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"test"}})
	if err != nil {
		t.Fatal(err)
	}
	if jwts.Svids[0].Hint != "internal" || jwts.Svids[2].Hint != "" {
		t.Errorf("hints of JWT-SVIDs: %v", jwts.Svids)
	}
	f.source.set("web", f.d.update()) // no SVID left
	_, err = stream.Recv()
	wantCode(t, err, codes.PermissionDenied)
	// And the other way for a source to say it, on every kind of stream.
	f.source.set("web", f.d.update(f.d.svid("/again", "")))
	again := f.x509("web")
	x509Bundles := must(f.client("web").FetchX509Bundles(f.ctx(), &workload.X509BundlesRequest{}))
	jwtBundles := must(f.client("web").FetchJWTBundles(f.ctx(), &workload.JWTBundlesRequest{}))
	must(again.Recv())
	must(x509Bundles.Recv())
	must(jwtBundles.Recv())
	f.source.set("web", fmt.Errorf("%w: the entry was deleted", identity.ErrDenied))
	_, err = again.Recv()
	wantCode(t, err, codes.PermissionDenied)
	_, err = x509Bundles.Recv()
	wantCode(t, err, codes.PermissionDenied)
	_, err = jwtBundles.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

// Workload API sections 5.2.2 and 6.2.2: bundles include that of the own trust domain and are keyed by the trust
// domain's ID.
func TestConformance33BundlesByTrustDomainID(t *testing.T) {
	f := start(t)
	other := newDomain("other.org")
	u := f.d.update(f.d.svid("/web", ""))
	u.Bundles[other.td] = other.bundle()
	f.source.set("web", u)
	keys := func(m map[string][]byte) string {
		if len(m) == 2 && m["spiffe://example.org"] != nil && m["spiffe://other.org"] != nil {
			return "both"
		}
		return fmt.Sprint(len(m), " others")
	}
	m := must(must(f.client("web").FetchX509Bundles(f.ctx(), &workload.X509BundlesRequest{})).Recv())
	if got := keys(m.Bundles); got != "both" {
		t.Errorf("X.509 bundles: %s", got)
	}
	j := must(must(f.client("web").FetchJWTBundles(f.ctx(), &workload.JWTBundlesRequest{})).Recv())
	if got := keys(j.Bundles); got != "both" {
		t.Errorf("JWT bundles: %s", got)
	}
	s := must(f.x509("web").Recv())
	if len(s.FederatedBundles) != 1 || string(s.FederatedBundles["spiffe://other.org"]) != string(other.ca.Raw) || string(s.Svids[0].Bundle) != string(f.d.ca.Raw) {
		t.Error("FetchX509SVID mixes up bundles")
	}
	set, err := f.spiffe().FetchX509Bundles(f.ctx())
	if err != nil || set.Len() != 2 || !set.Has(f.d.td) {
		t.Errorf("go-spiffe reads %v, %v", set, err)
	}
	delete(u.Bundles, f.d.td) // a source that lost it must not make clients drop it
	f.source.set("web", &identity.Update{SVIDs: u.SVIDs, Bundles: u.Bundles})
	_, err = f.spiffe().FetchX509Bundles(f.ctx())
	wantCode(t, err, codes.Unavailable)
	_, err = f.spiffe().FetchJWTBundles(f.ctx())
	wantCode(t, err, codes.Unavailable)
	_, err = f.spiffe().FetchX509SVID(f.ctx())
	wantCode(t, err, codes.Unavailable)
}

// Workload API section 6.2.1: without a spiffe_id all identities; one that the caller is not entitled to is
// PermissionDenied.
func TestConformance34JWTSVIDByID(t *testing.T) {
	f := start(t)
	f.source.set("web", f.d.update(f.d.svid("/one", ""), f.d.svid("/two", "")))
	client := f.client("web")
	fetch := func(id string) (string, error) {
		r, err := client.FetchJWTSVID(f.ctx(), &workload.JWTSVIDRequest{Audience: []string{"x", "y"}, SpiffeId: id})
		var out []string
		for _, s := range r.GetSvids() {
			out = append(out, s.SpiffeId+" "+s.Svid)
		}
		return strings.Join(out, ", "), err
	}
	if got, err := fetch(""); got != "spiffe://example.org/one a.x+y.c, spiffe://example.org/two a.x+y.c" || err != nil {
		t.Errorf("all: %q, %v", got, err)
	}
	if got, err := fetch("spiffe://example.org/two"); got != "spiffe://example.org/two a.x+y.c" || err != nil {
		t.Errorf("one: %q, %v", got, err)
	}
	_, err := fetch("spiffe://example.org/three")
	wantCode(t, err, codes.PermissionDenied)
	// A source that answers with another identity than was asked for is not believed.
	f.source.jwt = func(string, []string, spiffeid.ID) ([]identity.JWTSVID, error) {
		return []identity.JWTSVID{{ID: spiffeid.RequireFromString("spiffe://example.org/one"), Token: "a.b.c"}}, nil
	}
	_, err = fetch("spiffe://example.org/two")
	wantCode(t, err, codes.Internal)
}

// Workload API section 6.2.3: ValidateJWTSVID as the JWT-SVID standard says; claims are returned; what is not
// valid is InvalidArgument.
func TestConformance36ValidateJWTSVID(t *testing.T) {
	f := start(t)
	other := newDomain("other.org")
	u := f.d.update(f.d.svid("/web", ""))
	u.Bundles[other.td] = other.bundle()
	f.source.set("web", u)
	client := f.client("web")
	token := f.d.token("spiffe://example.org/api", map[string]any{"n": 1.5, "list": []any{"a", true, nil}, "deep": map[string]any{"k": "v"}}, nil)
	r, err := client.ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: token})
	if err != nil {
		t.Fatal(err)
	}
	claims := r.Claims.AsMap()
	if r.SpiffeId != "spiffe://example.org/api" || claims["sub"] != r.SpiffeId || claims["n"] != 1.5 || claims["exp"] == nil ||
		fmt.Sprint(claims["aud"], claims["list"], claims["deep"]) != "[test] [a true <nil>] map[k:v]" {
		t.Errorf("got %s, %v", r.SpiffeId, claims)
	}
	if _, err := f.spiffe().ValidateJWTSVID(f.ctx(), other.token("spiffe://other.org/api", nil, nil), "test"); err != nil {
		t.Errorf("a token of a federated trust domain: %v", err)
	}
	parts := strings.Split(token, ".")
	for name, bad := range map[string]string{
		"another's key":     other.token("spiffe://example.org/api", nil, nil),
		"no bundle":         newDomain("stranger.org").token("spiffe://stranger.org/api", nil, nil),
		"unknown kid":       f.d.token("spiffe://example.org/api", nil, map[string]any{"kid": "kid-2"}),
		"tampered claims":   parts[0] + "." + strings.Split(f.d.token("spiffe://example.org/admin", nil, nil), ".")[1] + "." + parts[2],
		"no signature":      parts[0] + "." + parts[1] + ".",
		"two parts":         parts[0] + "." + parts[1],
		"four parts":        token + ".x",
		"not a token":       "hello",
		"JSON":              `{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`,
		"over the limit":    strings.Repeat("a", identity.MaxTokenBytes+1),
		"binary":            "\x00\x01",
		"a claim not UTF-8": parts[0] + ".eyJzdWIiOiL_In0." + parts[2],
	} {
		_, err := client.ValidateJWTSVID(f.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: bad})
		if err == nil {
			t.Fatalf("%s: accepted", name)
		}
		wantCode(t, err, codes.InvalidArgument)
		if len(bad) > 20 && strings.Contains(err.Error(), bad[:20]) {
			t.Errorf("%s: the error quotes the token", name)
		}
	}
}
