package config

import (
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

const goodServer = `version: 1
trust_domain: example.org
name: ca-1
`

const goodAgent = `version: 1
trust_domain: example.org
servers: [ca-1.example.org:8443]
ca_pin: sha256:00
attest: {kube: {cluster: prod}}
`

func TestDefaults(t *testing.T) {
	s, err := ParseServer("x", []byte(goodServer))
	if err != nil {
		t.Fatal(err)
	}
	if s.X509TTL != time.Hour || s.JWTTTL != 5*time.Minute || s.MaxStaleness != time.Hour || s.DataDir != DefaultDataDir || s.CA.JWTAlgorithm != "ES256" {
		t.Errorf("defaults: %+v", s)
	}
	a, err := ParseAgent("x", []byte(goodAgent))
	if err != nil {
		t.Fatal(err)
	}
	if a.Socket != DefaultAgentSocket || a.KeyType != "ec-p256" || a.Attest.Kube.TokenPath != DefaultTokenPath {
		t.Errorf("defaults: %+v", a)
	}
}

func TestPublicDefaults(t *testing.T) {
	for yaml, want := range map[string]string{
		"public: {listen: '0.0.0.0:443'}\nadvertise: ca-1.example.org:8443":                   "https://ca-1.example.org",
		"public: {listen: ':8444'}\nadvertise: '[2001:db8::1]:8443'":                          "https://[2001:db8::1]:8444",
		"public: {listen: '192.0.2.1:8444'}\nadvertise: ca-1.example.org:8443":                "https://192.0.2.1:8444",
		"public: {listen: ':443', url: 'https://ca.example.org/'}\nadvertise: x.example:8443": "https://ca.example.org",
	} {
		s, err := ParseServer("x", []byte(goodServer+yaml))
		if err != nil || s.Public.URL != want || s.Federation.RefreshHint != 5*time.Minute {
			t.Errorf("%s: %q, %v", yaml, s.Public.URL, err)
		}
	}
	s, err := ParseServer("x", []byte(goodServer+"public: {listen: ':443', url: 'https://ca.example.org', tls: {acme: {}}, spiffe_listen: ':444'}\nadvertise: a.example:1"))
	if err != nil || len(s.Public.TLS.ACME.Hosts) != 1 || s.Public.TLS.ACME.Hosts[0] != "ca.example.org" || s.Public.SPIFFEURL != "https://a.example:444" {
		t.Errorf("%+v, %v", s.Public, err)
	}
}

// TestOIDCDefaults: the issuer is what every member says, or nothing.
func TestOIDCDefaults(t *testing.T) {
	for yaml, want := range map[string]string{
		"": "",
		"public: {listen: ':443'}\nadvertise: ca-1.example.org:8443":                      "", // its URL is this member's alone
		"public: {listen: ':443', url: 'https://ca.example.org/'}":                        "https://ca.example.org",
		"public: {listen: ':443', url: 'https://ca.example.org'}\noidc: {off: true}":      "",
		"public: {listen: ':443', url: 'https://a'}\noidc: {issuer: 'https://b.org/c/d'}": "https://b.org/c/d",
		"oidc: {issuer: 'https://b.org'}":                                                 "https://b.org",
	} {
		s, err := ParseServer("x", []byte(goodServer+yaml))
		if err != nil || s.OIDC.Issuer != want || s.OIDC.MaxAge != 5*time.Minute {
			t.Errorf("%s: %+v, %v", yaml, s, err)
		}
	}
}

func TestServerFaults(t *testing.T) {
	for name, c := range map[string]struct {
		yaml string
		want []string // all of them, in one error
	}{
		"empty":              {"", []string{"the file is empty", "version is missing", "trust_domain is missing"}},
		"unknown field":      {goodServer + "listn: x\n", []string{"line 4", "listn"}},
		"two faults at once": {goodServer + "listn: x\nx509_ttl: 1s\n", []string{"listn", "x509_ttl is 1s"}},
		"from the future":    {strings.Replace(goodServer, "version: 1", "version: 2", 1), []string{"version 2 is newer"}},
		"negative version":   {strings.Replace(goodServer, "version: 1", "version: -1", 1), []string{"version -1"}},
		"admins": {goodServer + "admin: {ids: [{id: spiffe://example.org/countersign/agent/x, role: root}, {id: spiffe://other.org/a, role: reader}, {id: spiffe://example.org/a, role: reader}, {id: spiffe://example.org/a, role: security}]}\n",
			[]string{"cluster's own", `role "root"`, "other.org", "spiffe://example.org/a is there twice"}},
		"second document":       {goodServer + "---\nversion: 1\n", []string{"after the first document"}},
		"not yaml":              {"\t{", []string{"invalid input"}},
		"wrong type":            {goodServer + "x509_ttl: [1]\n", []string{"line 4"}},
		"trust domain":          {strings.Replace(goodServer, "example.org", "Example.org/x", 1), []string{"trust_domain"}},
		"trust domain as URI":   {strings.Replace(goodServer, "example.org", "spiffe://example.org", 1), []string{"write the bare name"}},
		"name":                  {strings.Replace(goodServer, "ca-1", "a/b", 1), []string{"name \"a/b\""}},
		"relative folder":       {goodServer + "data_dir: x\n", []string{"data_dir", "absolute"}},
		"bad port":              {goodServer + "listen: 1.2.3.4:99999\n", []string{"bad port"}},
		"no port":               {goodServer + "listen: 1.2.3.4\n", []string{"want host:port"}},
		"unspecified advertise": {goodServer + "advertise: 0.0.0.0:1\n", []string{"advertise", "unspecified"}},
		"jwt algorithm":         {goodServer + "ca: {jwt_algorithm: none}\n", []string{"ES256 or RS256"}},
		"ttl beyond a day":      {goodServer + "x509_ttl: 25h\n", []string{"x509_ttl is 25h"}},
		"log":                   {goodServer + "log: {level: loud, format: xml}\n", []string{"log.level", "log.format"}},
		"public URL alone":      {goodServer + "public: {url: 'https://x.org'}\n", []string{"public.url without public.listen"}},
		"public URLs":           {goodServer + "public: {listen: ':443', url: 'http://u:secret@x.org', spiffe_listen: ':444', spiffe_url: 'https://x.org/path'}\n", []string{"public.url", "public.spiffe_url", "paths of its own", "public.spiffe_listen: public.listen shows the SVID already"}},
		"public certificates":   {goodServer + "public: {listen: ':443', tls: {cert_file: a, key_file: b, acme: {hosts: ['1.2.3.4', '*.x.org'], directory: 'http://x'}}}\n", []string{"cert_file \"a\"", "not both", "acme.hosts \"1.2.3.4\"", "acme.hosts \"*.x.org\"", "acme.directory"}},
		"oidc":                  {goodServer + "oidc: {issuer: 'http://x.org', max_age: 1ms}\n", []string{"oidc.issuer", "oidc.max_age is 1ms"}},
		"oidc issuer":           {goodServer + "oidc: {issuer: 'https://x.org/'}\n", []string{"no slash at its end"}},
		"oidc off with issuer":  {goodServer + "oidc: {off: true, issuer: 'https://x.org'}\n", []string{"oidc.issuer with oidc.off"}},
		"half a certificate":    {goodServer + "public: {tls: {cert_file: /a}}\n", []string{"go together", "without public.listen"}},
		"refresh hint":          {goodServer + "federation: {refresh_hint: 1ms, web_ca_file: x}\n", []string{"federation.refresh_hint is 1ms", "federation.web_ca_file"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseServer("file.yaml", []byte(c.yaml))
			if !errors.Is(err, identity.ErrInvalid) {
				t.Fatalf("got %v", err)
			}
			for _, w := range append(c.want, "file.yaml") {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q is not in: %v", w, err)
				}
			}
		})
	}
}

func TestAgentFaults(t *testing.T) {
	for name, c := range map[string]struct{ yaml, want string }{
		"no attestation":   {strings.Replace(goodAgent, "{kube: {cluster: prod}}", "{}", 1), "exactly one"},
		"two attestations": {strings.Replace(goodAgent, "{kube: {cluster: prod}}", "{kube: {cluster: prod}, join_token_file: /x}", 1), "exactly one"},
		"no cluster":       {strings.Replace(goodAgent, "{cluster: prod}", "{}", 1), "attest.kube.cluster"},
		"no pin":           {strings.Replace(goodAgent, "ca_pin: sha256:00", "", 1), "ca_pin is missing"},
		"no servers":       {strings.Replace(goodAgent, "[ca-1.example.org:8443]", "[]", 1), "servers is empty"},
		"server's port":    {strings.Replace(goodAgent, "ca-1.example.org:8443", "ca-1.example.org", 1), "servers"},
		"key type":         {goodAgent + "key_type: dsa\n", "key_type"},
		"half a pair":      {strings.Replace(goodAgent, "{kube: {cluster: prod}}", "{x509pop: {cert_file: /x}}", 1), "both needed"},
		"relative socket":  {goodAgent + "socket: x\n", "socket"},
		"csi, no node":     {goodAgent + "csi: {}\n", "csi.node is missing"},
		"csi, relative":    {goodAgent + "csi: {node: n, dir: x}\n", "csi.dir"},
		"csi, relative 2":  {goodAgent + "csi: {node: n, kubelet_dir: x}\n", "csi.kubelet_dir"},
		"csi, unknown":     {goodAgent + "csi: {node: n, sockets: /x}\n", "sockets"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NODE_NAME", "")
			_, err := ParseAgent("x", []byte(c.yaml))
			if !errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want %q, got %v", c.want, err)
			}
		})
	}
}

func TestLoadRefusesAHugeFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.yaml")
	if err := os.WriteFile(path, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadServer(path); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("got %v", err)
	}
	if _, err := LoadAgent(filepath.Join(t.TempDir(), "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func FuzzParse(f *testing.F) {
	seeds, err := filepath.Glob("testdata/fuzz/FuzzParse/*")
	if err != nil || len(seeds) < 3 {
		f.Fatalf("found %d seeds: %v", len(seeds), err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		// What is accepted satisfies Check; what is not has an error; nothing panics.
		if s, err := ParseServer("x", data); err == nil && s.Check() != nil {
			t.Error("accepted a server that Check refuses")
		}
		if a, err := ParseAgent("x", data); err == nil && a.Check() != nil {
			t.Error("accepted an agent that Check refuses")
		}
	})
}

// TestCSIDefaults: the block alone turns the driver on, with the folders that a kubelet has.
func TestCSIDefaults(t *testing.T) {
	t.Setenv("NODE_NAME", "node-7")
	c, err := ParseAgent("x", []byte(goodAgent+"csi: {}\n"))
	want := AgentCSI{Socket: "/var/lib/kubelet/plugins/csi.countersign.io/csi.sock", RegistrationDir: "/var/lib/kubelet/plugins_registry",
		KubeletDir: "/var/lib/kubelet", Dir: "/run/countersign/csi", Node: "node-7", Audience: "countersign"}
	if err != nil || c.CSI == nil || *c.CSI != want {
		t.Errorf("%+v, %v", c.CSI, err)
	}
	if c, err := ParseAgent("x", []byte(goodAgent)); err != nil || c.CSI != nil {
		t.Errorf("without the block: %+v, %v", c.CSI, err)
	}
}

// TestDocumentation keeps docs/CONFIG.md equal to the structs and their comments: run with -update after a change.
func TestDocumentation(t *testing.T) {
	update := flag.Lookup("update").Value.String() == "true"
	want := document(t)
	path := filepath.Join("..", "docs", "CONFIG.md")
	if update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/CONFIG.md is out of date: go test ./config -update")
	}
}

var _ = flag.Bool("update", false, "write docs/CONFIG.md anew")

func document(t *testing.T) string {
	t.Setenv("NODE_NAME", "")
	comments := map[string]string{} // Type.Field -> comment
	inspect := func(n ast.Node) bool {
		ts, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if st, ok := ts.Type.(*ast.StructType); ok {
			for _, f := range st.Fields.List {
				for _, name := range f.Names {
					comments[ts.Name.Name+"."+name.Name] = strings.Join(strings.Fields(f.Doc.Text()+" "+f.Comment.Text()), " ")
				}
			}
		}
		return true
	}
	for _, name := range []string{"config.go", "server.go", "kubernetes.go", "public.go", "oidc.go", "agent.go"} {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, inspect)
	}
	var b strings.Builder
	b.WriteString("# Configuration\n\nGenerated from the comments in config/ (`go test ./config -update`). Every field has a default unless it says so in its description or is\n`version`, `trust_domain`. Durations are written as `1h30m`. An unknown field is an error.\n")
	s, _ := ParseServer("", []byte("version: 1\nname: HOSTNAME\nadvertise: HOSTNAME:8443\n"))
	a, _ := ParseAgent("", []byte("version: 1\nattest: {kube: {}, x509pop: {}}\ncsi: {}\n"))
	b.WriteString("\n## `countersign server run -c FILE`\n\n| field | default | |\n| --- | --- | --- |\n")
	fields(&b, "", reflect.ValueOf(*s), comments)
	b.WriteString("\n## `countersign-agent run -c FILE`\n\n| field | default | |\n| --- | --- | --- |\n")
	fields(&b, "", reflect.ValueOf(*a), comments)
	return b.String()
}

func fields(b *strings.Builder, prefix string, v reflect.Value, comments map[string]string) {
	for i := range v.NumField() {
		f, x := v.Type().Field(i), v.Field(i)
		name := prefix + f.Tag.Get("yaml")
		if x.Kind() == reflect.Pointer {
			if x.IsNil() {
				x = reflect.New(x.Type().Elem())
			}
			x = x.Elem()
		}
		if x.Kind() == reflect.Struct {
			if strings.HasSuffix(name, ",inline") {
				fields(b, prefix, x, comments)
			} else {
				fields(b, name+".", x, comments)
			}
			continue
		}
		def := fmt.Sprint(x.Interface())
		switch {
		case def == "false" || x.IsZero() || def == "[]":
			def = ""
		default:
			def = "`" + def + "`"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", name, def, comments[v.Type().Name()+"."+f.Name])
	}
}
