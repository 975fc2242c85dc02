package identity

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func td() spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString("example.org") }

func TestSelectors(t *testing.T) {
	for _, good := range append([]string{"k8s:ns:default", "unix:path:/usr/bin/x:y", "unix:user:jörg", "k8s:pod-label:app:", "k8s:pod-label:app.kubernetes.io/name:Web_1.0",
		"k8s:ns-label:team:a", "k8s:pod-owner:StatefulSet:db.x"}, samples()...) {
		s, err := ParseSelector(good)
		if err != nil || string(s) != good || s.Name()+":"+s.Value() != good {
			t.Errorf("%q: %v (%q, %q)", good, err, s.Name(), s.Value())
		}
	}
	for name, bad := range map[string]string{
		"empty": "", "no value": "k8s:ns:", "one part": "k8s", "two parts": "k8s:ns", "unknown": "k8s:namespace:x",
		"control": "k8s:ns:a\nb", "delete": "k8s:ns:a\x7f", "not UTF-8": "k8s:ns:\xff", "huge": "k8s:ns:" + strings.Repeat("x", MaxSelectorBytes),
		"label without value": "k8s:pod-label:app", "label key": "k8s:pod-label-key:-app", "label key, two slashes": "k8s:ns-label-key:a/b/c",
		"label domain": "k8s:ns-label-key:A.b/c", "label value": "k8s:pod-label:app:a b", "label value with colon": "k8s:ns-label:app:a:b",
		"long label": "k8s:pod-label-key:" + strings.Repeat("x", 64), "owner without name": "k8s:pod-owner:Deployment", "owner kind": "k8s:pod-owner:deployment:web",
		"owner name": "k8s:pod-owner:Deployment:Web", "owner with uid": "k8s:pod-owner:Deployment:web:x",
	} {
		if _, err := ParseSelector(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := ParseSelectors(make([]string, MaxSelectors+1)); !errors.Is(err, ErrInvalid) {
		t.Errorf("too many: got %v", err)
	}
	got, err := ParseSelectors([]string{"k8s:sa:b", "k8s:ns:a", "k8s:sa:b"})
	if err != nil || !slices.Equal(got, []Selector{"k8s:ns:a", "k8s:sa:b"}) {
		t.Errorf("got %v, %v", got, err)
	}
}

func samples() []string {
	var out []string
	for _, n := range SelectorNames() {
		switch n {
		case SelectorPodLabel, SelectorNSLabel:
			n += ":x"
		case SelectorPodOwner:
			n += ":Job"
		}
		out = append(out, n+":x")
	}
	return out
}

// TestFacts: labels and owners need the cluster whose API server says so, and fill no template.
func TestFacts(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for _, s := range []Selector{"k8s:pod-label:app:web", "k8s:pod-label-key:app", "k8s:ns-label:env:prod", "k8s:ns-label-key:env", "k8s:pod-owner:Deployment:web"} {
		if !s.Fact() || !s.Proven() {
			t.Errorf("%s: fact %t, proven %t", s, s.Fact(), s.Proven())
		}
		e := &Entry{Selectors: []Selector{"k8s:cluster:main", s}, SPIFFEID: "spiffe://example.org/web"}
		if err := CheckEntry(td, e); err != nil {
			t.Error(err)
		}
		for _, bad := range [][]Selector{{s}, {"k8s:ns:prod", s}, {"k8s:cluster:a", "k8s:cluster:b", s}} {
			e.Selectors = bad
			if err := CheckEntry(td, e); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "k8s:cluster:NAME") {
				t.Errorf("%v: %v", bad, err)
			}
		}
		if _, err := ParseTemplate("spiffe://example.org/{" + s.Name() + "}"); !errors.Is(err, ErrInvalid) {
			t.Errorf("a template of %s: %v", s.Name(), err)
		}
	}
	if s := Selector("k8s:pod-name:x"); s.Fact() || s.LabelKey() != "" {
		t.Errorf("%s is a fact", s)
	}
	all := []Selector{"k8s:cluster:main", "k8s:ns-label:a:b", "k8s:ns:prod"}
	if got := WithoutFacts(all); !slices.Equal(got, []Selector{"k8s:cluster:main", "k8s:ns:prod"}) || len(all) != 3 || all[1] != "k8s:ns-label:a:b" {
		t.Errorf("%v of %v", got, all)
	}
	for s, want := range map[Selector]string{"k8s:pod-label:a/b:c": "a/b", "k8s:ns-label-key:a": "a", "k8s:pod-owner:Job:x": ""} {
		if got := s.LabelKey(); got != want {
			t.Errorf("key of %s: %q", s, got)
		}
	}
}

func TestSubset(t *testing.T) {
	b := []Selector{"a", "c", "e"}
	for _, c := range []struct {
		a    []Selector
		want bool
	}{
		{nil, true}, {[]Selector{"a"}, true}, {[]Selector{"e"}, true}, {b, true}, {[]Selector{"a", "e"}, true},
		{[]Selector{"b"}, false}, {[]Selector{"a", "b"}, false}, {[]Selector{"f"}, false}, {[]Selector{"a", "c", "e", "f"}, false},
	} {
		if Subset(c.a, b) != c.want {
			t.Errorf("Subset(%v): want %v", c.a, c.want)
		}
	}
}

func TestTemplates(t *testing.T) {
	sel := []Selector{"k8s:ns:shop", "k8s:sa:web", "unix:group:a", "unix:group:b", "unix:path:/usr/bin/x"}
	for tmpl, want := range map[string]string{
		"spiffe://example.org/ns/{k8s:ns}/sa/{k8s:sa}": "spiffe://example.org/ns/shop/sa/web",
		"spiffe://example.org/{k8s:ns}-{k8s:sa}":       "spiffe://example.org/shop-web",
		"spiffe://example.org/fixed":                   "spiffe://example.org/fixed",
	} {
		p, err := ParseTemplate(tmpl)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := p.ExpandID(td(), sel); err != nil || id.String() != want {
			t.Errorf("%s: %v, %v", tmpl, id, err)
		}
	}
	for name, tmpl := range map[string]string{
		"missing selector":       "spiffe://example.org/{k8s:pod-name}",
		"ambiguous selector":     "spiffe://example.org/{unix:group}",
		"a value with a slash":   "spiffe://example.org/{unix:path}",
		"another trust domain":   "spiffe://example.com/{k8s:ns}",
		"no path":                "spiffe://example.org",
		"the reserved path":      "spiffe://example.org/countersign/member/{k8s:ns}",
		"the bare reserved path": "spiffe://example.org/countersign",
		"not a SPIFFE ID":        "https://example.org/{k8s:ns}",
		"a trailing slash":       "spiffe://example.org/{k8s:ns}/",
		"dots":                   "spiffe://example.org/../{k8s:ns}",
	} {
		p, err := ParseTemplate(tmpl)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if id, err := p.ExpandID(td(), sel); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, %v", name, id, err)
		}
	}
	for _, bad := range []string{"{", "}", "{k8s:ns", "a}b", "{}", "{nope:x}", "{k8s:ns}{", strings.Repeat("x", 2049)} {
		if _, err := ParseTemplate(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: got %v", bad, err)
		}
	}
	// A selector's value that looks like the reserved part cannot make one, whatever the template.
	p, err := ParseTemplate("spiffe://example.org/{k8s:ns}/agent/x")
	if err != nil {
		t.Fatal(err)
	}
	if id, err := p.ExpandID(td(), []Selector{"k8s:ns:countersign"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a namespace called countersign made %v, %v", id, err)
	}
}

func TestCheckEntry(t *testing.T) {
	good := Entry{Selectors: []Selector{"k8s:ns:shop"}, SPIFFEID: "spiffe://example.org/x", X509TTL: time.Hour, JWTTTL: time.Minute, DNSNames: []string{"{k8s:ns}.svc", "*.x.y"}, Hint: "h", FederatesWith: []string{"other.org"}}
	if err := CheckEntry(td(), &good); err != nil {
		t.Fatal(err)
	}
	below := good
	below.Downstream = true
	if err := CheckEntry(td(), &below); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		mend func(*Entry)
		want string
	}{
		"no selectors":       {func(e *Entry) { e.Selectors = nil }, "no selectors"},
		"bad selector":       {func(e *Entry) { e.Selectors = []Selector{"x"} }, "type:name:value"},
		"agent's word alone": {func(e *Entry) { e.Selectors = []Selector{"unix:uid:0", "systemd:unit:x"} }, "an agent's word"},
		"bad ID":             {func(e *Entry) { e.SPIFFEID = "spiffe://example.org/a//b" }, "SPIFFE ID"},
		"bad template":       {func(e *Entry) { e.SPIFFEID = "spiffe://example.org/{k8s:what}" }, "unknown placeholder"},
		"no ID":              {func(e *Entry) { e.SPIFFEID = "" }, "SPIFFE ID"},
		"reserved":           {func(e *Entry) { e.SPIFFEID = "spiffe://example.org/countersign/agent/x" }, "cluster's own"},
		"long ID":            {func(e *Entry) { e.SPIFFEID = "spiffe://example.org/" + strings.Repeat("x", 2048) }, "2048"},
		"short TTL":          {func(e *Entry) { e.X509TTL = time.Second }, "x509_ttl"},
		"long TTL":           {func(e *Entry) { e.JWTTTL = 25 * time.Hour }, "jwt_ttl"},
		"negative TTL":       {func(e *Entry) { e.JWTTTL = -time.Hour }, "jwt_ttl"},
		"bad DNS":            {func(e *Entry) { e.DNSNames = []string{"Not A Name"} }, "DNS name"},
		"many DNS":           {func(e *Entry) { e.DNSNames = slices.Repeat([]string{"a.b"}, MaxDNSNames+1) }, "DNS names"},
		"long hint":          {func(e *Entry) { e.Hint = strings.Repeat("h", MaxHintBytes+1) }, "hint"},
		"bad federation":     {func(e *Entry) { e.FederatesWith = []string{"Not/One"} }, "federates_with"},
		"downstream":         {func(e *Entry) { e.Downstream, e.SPIFFEID = true, "spiffe://example.org/{k8s:ns}/ca" }, "placeholders"},
		"admin template":     {func(e *Entry) { e.Admin, e.SPIFFEID = true, "spiffe://example.org/{k8s:ns}/admin" }, "placeholders"},
		"role template":      {func(e *Entry) { e.AdminRole, e.SPIFFEID = AdminReader, "spiffe://example.org/{k8s:ns}/admin" }, "placeholders"},
		"no role":            {func(e *Entry) { e.AdminRole, e.SPIFFEID = "root", "spiffe://example.org/admin" }, "want reader, operator or security"},
		"two roles":          {func(e *Entry) { e.Admin, e.AdminRole, e.SPIFFEID = true, AdminReader, "spiffe://example.org/admin" }, "leave one of the two out"},
		"admin by token":     {func(e *Entry) { adminBy(e, "agent:kind:join_token", "unix:uid:0") }, "rest on a join token"},
		"admin by node":      {func(e *Entry) { adminBy(e, "agent:kube-node:n", "agent:kube-cluster:c") }, "rest on a join token"},
		"own federation":     {func(e *Entry) { e.FederatesWith = []string{"example.org"} }, "own trust domain"},
	} {
		e := good
		c.mend(&e)
		if err := CheckEntry(td(), &e); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	two := good
	two.Hint, two.X509TTL = strings.Repeat("h", MaxHintBytes+1), time.Second
	if err := CheckEntry(td(), &two); !strings.Contains(err.Error(), "hint") || !strings.Contains(err.Error(), "x509_ttl") {
		t.Errorf("two faults, not both told: %v", err)
	}
}

func adminBy(e *Entry, selectors ...Selector) {
	e.AdminRole, e.SPIFFEID, e.Selectors = AdminOperator, "spiffe://example.org/admin", SortSelectors(selectors)
}

func TestAdminEntries(t *testing.T) {
	for _, by := range [][]Selector{{"k8s:ns:ops"}, {"agent:id:spiffe://example.org/countersign/agent/join/x", "unix:uid:0"}, {"agent:kind:x509pop", "unix:uid:0"}, {"agent:x509-cn:host", "unix:uid:0"}} {
		e := Entry{ID: "e"}
		adminBy(&e, by...)
		if err := CheckEntry(td(), &e); err != nil {
			t.Errorf("%v: %v", by, err)
		}
	}
	for e, want := range map[markedAs]AdminRole{{}: "", {admin: true}: AdminSecurity, {role: AdminReader}: AdminReader, {admin: true, role: AdminSecurity}: AdminSecurity} {
		if got := (&Entry{Admin: e.admin, AdminRole: e.role}).Power(); got != want {
			t.Errorf("%+v: %q, want %q", e, got, want)
		}
	}
}

func TestPowerSince(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	reader := &Entry{SPIFFEID: "spiffe://example.org/a", AdminRole: AdminReader}
	reader.Since(nil, at(100))
	for name, row := range map[string]struct {
		next Entry
		want time.Time
	}{
		"the same": {Entry{SPIFFEID: reader.SPIFFEID, AdminRole: AdminReader, Hint: "x"}, at(100)},
		"more":     {Entry{SPIFFEID: reader.SPIFFEID, AdminRole: AdminOperator}, at(200)},
		"moved":    {Entry{SPIFFEID: "spiffe://example.org/b", AdminRole: AdminReader}, at(200)},
		"none":     {Entry{SPIFFEID: reader.SPIFFEID, PowerSince: at(1)}, time.Time{}},
	} {
		row.next.Since(reader, at(200))
		if !row.next.PowerSince.Equal(row.want) {
			t.Errorf("%s: since %v", name, row.next.PowerSince)
		}
	}
	less := &Entry{SPIFFEID: "spiffe://example.org/a", AdminRole: AdminSecurity, PowerSince: at(50)}
	reader.Since(less, at(200))
	if !reader.PowerSince.Equal(at(50)) {
		t.Errorf("less power: since %v", reader.PowerSince)
	}
	e := Entry{AdminRole: AdminReader, PowerSince: at(100), CreatedAt: at(50)}
	for s, want := range map[int]bool{0: false, 97: false, 98: true, 100: true, 200: true} {
		if got := e.Empowers(at(s)); got != want {
			t.Errorf("an SVID of %d: %t", s, got)
		}
	}
	e.PowerSince = time.Time{}
	if e.Empowers(at(40)) || !e.Empowers(at(60)) {
		t.Error("an entry of before is judged by when it was created")
	}
}

type markedAs struct {
	admin bool
	role  AdminRole
}

func TestAdminRoles(t *testing.T) {
	order := []AdminRole{"", AdminReader, AdminOperator, AdminSecurity}
	for i, have := range order {
		for j, need := range order {
			if got, want := have.Includes(need), j > 0 && i >= j; got != want {
				t.Errorf("%q includes %q: %t", have, need, got)
			}
			if got := have.Higher(need); got != order[max(i, j)] {
				t.Errorf("the higher of %q and %q is %q", have, need, got)
			}
		}
		if _, err := ParseAdminRole(string(have)); (err == nil) != (i > 0) {
			t.Errorf("parsing %q: %v", have, err)
		}
	}
	for _, none := range []AdminRole{"root", "Reader", "security "} {
		if AdminSecurity.Includes(none) || none.Includes(AdminReader) {
			t.Errorf("%q is a role", none)
		}
		if _, err := ParseAdminRole(string(none)); !errors.Is(err, ErrInvalid) {
			t.Errorf("parsing %q: %v", none, err)
		}
	}
}

func TestCheckKubeCluster(t *testing.T) {
	good := KubeCluster{Name: "prod", Issuer: "https://k", Audience: "countersign", JWKS: []byte("{}"), AgentAccounts: []string{"cs/agent"}, DefaultID: DefaultKubeID}
	if err := CheckKubeCluster(td(), &good); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		mend func(*KubeCluster)
		want string
	}{
		"name":               {func(k *KubeCluster) { k.Name = "A/b" }, "kube cluster name"},
		"issuer":             {func(k *KubeCluster) { k.Issuer = "" }, "no issuer"},
		"audience":           {func(k *KubeCluster) { k.Audience = "" }, "no audience"},
		"two key sources":    {func(k *KubeCluster) { k.JWKSURL = "https://x" }, "both"},
		"http":               {func(k *KubeCluster) { k.JWKS, k.JWKSURL = nil, "http://x" }, "not https"},
		"no way to verify":   {func(k *KubeCluster) { k.JWKS = nil }, "no way to verify"},
		"review without":     {func(k *KubeCluster) { k.TokenReview = true }, "needs a kubeconfig"},
		"relative path":      {func(k *KubeCluster) { k.Kubeconfig = "x/y" }, "absolute"},
		"account":            {func(k *KubeCluster) { k.AgentAccounts = []string{"agent"} }, "agent account"},
		"default ID":         {func(k *KubeCluster) { k.DefaultID = "x" }, "path template"},
		"default ID bad":     {func(k *KubeCluster) { k.DefaultID = "/a/../b" }, "SPIFFE ID"},
		"default ID reserve": {func(k *KubeCluster) { k.DefaultID = "/countersign/member/{k8s:sa}" }, "cluster's own"},
	} {
		k := good
		c.mend(&k)
		if err := CheckKubeCluster(td(), &k); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestRoles(t *testing.T) {
	m, err := MemberID(td(), "ca-1")
	if err != nil || RoleOf(m) != RoleMember {
		t.Errorf("%v: %v, %v", m, RoleOf(m), err)
	}
	a, err := AgentID(td(), "kube", "prod", "node-1")
	if err != nil || RoleOf(a) != RoleAgent {
		t.Errorf("%v: %v, %v", a, RoleOf(a), err)
	}
	for _, w := range []string{"spiffe://example.org/countersign/member", "spiffe://example.org/x/countersign/member/y", "spiffe://example.org/countersignx/member/y"} {
		if RoleOf(spiffeid.RequireFromString(w)) != RoleWorkload {
			t.Errorf("%s is not a workload's", w)
		}
	}
	if _, err := MemberID(td(), "a/b"); err == nil {
		t.Error("a member's name with a slash was accepted")
	}
}

func TestAuthorityADBindsEachPart(t *testing.T) {
	seen := map[string]bool{}
	for _, ad := range [][]byte{
		AuthorityAD(td(), AuthorityX509, "a"), AuthorityAD(td(), AuthorityJWT, "a"), AuthorityAD(td(), AuthorityX509, "b"),
		AuthorityAD(spiffeid.RequireTrustDomainFromString("example.com"), AuthorityX509, "a"),
	} {
		if seen[string(ad)] {
			t.Errorf("%q twice", ad)
		}
		seen[string(ad)] = true
	}
}

func seeded(f *testing.F, name string) {
	seeds, err := filepath.Glob("testdata/fuzz/" + name + "/*")
	if err != nil || len(seeds) < 2 {
		f.Fatalf("found %d seeds: %v", len(seeds), err)
	}
}

func FuzzParseSelector(f *testing.F) {
	seeded(f, "FuzzParseSelector")
	f.Fuzz(func(t *testing.T, s string) {
		sel, err := ParseSelector(s)
		if err == nil && (string(sel) != s || sel.Name()+":"+sel.Value() != s || sel.Value() == "") {
			t.Errorf("%q became %q", s, sel)
		}
	})
}

func FuzzTemplate(f *testing.F) {
	seeded(f, "FuzzTemplate")
	f.Fuzz(func(t *testing.T, tmpl, value string) {
		p, err := ParseTemplate(tmpl)
		if err != nil {
			return
		}
		if p.String() != tmpl {
			t.Fatalf("%q became %q", tmpl, p)
		}
		sel := sample(p)
		for i, s := range sel {
			sel[i] = Selector(s.Name() + ":" + value)
		}
		id, err := p.ExpandID(td(), sel)
		if err != nil {
			return
		}
		// Whatever the value: of our trust domain, outside the reserved part, and no more segments than the template has.
		if id.TrustDomain() != td() || RoleOf(id) != RoleWorkload || strings.HasPrefix(id.Path(), "/countersign/") || id.Path() == "" {
			t.Errorf("%q with %q became %s", tmpl, value, id)
		}
		if strings.Count(id.String(), "/") != strings.Count(strings.Join(literals(p), ""), "/") {
			t.Errorf("%q with %q became %s: a value added a segment", tmpl, value, id)
		}
	})
}

func literals(t Template) []string {
	var out []string
	for _, p := range t.parts {
		out = append(out, p.literal)
	}
	return out
}

// Two workloads must not get one ID because their names run into each other.
func TestAmbiguousTemplates(t *testing.T) {
	check := func(path string) error {
		return CheckEntry(td(), &Entry{Selectors: []Selector{"k8s:ns:shop"}, SPIFFEID: "spiffe://example.org" + path})
	}
	for _, good := range []string{
		"/{k8s:ns}/{k8s:sa}", "/{k8s:ns}_{k8s:sa}", "/{k8s:ns}-_-{k8s:sa}", "/a-{k8s:ns}-b/c-{k8s:sa}", "/{k8s:cluster}_{k8s:ns}_{k8s:sa}",
		"/{k8s:ns}-{unix:user}",
	} {
		if err := check(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{
		"/{k8s:ns}-{k8s:sa}", "/{k8s:ns}{k8s:sa}", "/{k8s:ns}.{k8s:sa}", "/x/{k8s:ns}-sa-{k8s:sa}/y", "/{k8s:cluster}_{k8s:ns}-{k8s:sa}",
		"/{k8s:ns}-{unix:user}-{k8s:sa}", "/{k8s:ns}-{k8s:ns}",
	} {
		if err := check(bad); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "in one path segment") {
			t.Errorf("%s: got %v", bad, err)
		}
		k := &KubeCluster{Name: "c", Issuer: "https://x", Audience: "a", JWKS: []byte("{}"), DefaultID: bad}
		if err := CheckKubeCluster(td(), k); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "in one path segment") {
			t.Errorf("default ID %s: got %v", bad, err)
		}
	}
}
