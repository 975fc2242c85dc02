// Package countersign holds nothing but this test, which keeps the house in order: who may import whom, and the
// conventions that a reader relies on. docs/WALK.md draws the house.
package countersign

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "countersign.io/countersign"

// house says for each package what of ours it may import. A package's subfolders live under the same rule and may
// import each other.
var house = map[string][]string{
	"identity":         {},
	"internal/durable": {},
	"internal/hsm":     {"internal/durable"},
	"internal/vault":   {},
	"seal":             {"internal/durable", "internal/hsm", "internal/vault"},
	"raft":             {"internal/durable"},
	"config":           {"identity"},
	"api":              {"identity"},
	"store":            {"identity", "raft", "internal/durable"},
	"ca":               {"identity"},
	"ca/kmskey":        {"identity", "internal/hsm"},
	"ca/upstream":      {"identity", "api", "ca/kmskey", "internal/vault"},
	"audit":            {"identity", "internal/durable"},
	"backup":           {"identity", "seal", "internal/durable"},
	"attestor":         {"identity"},
	"server":           {"identity", "api", "ca", "attestor", "audit"},
	"agent":            {"identity", "api", "attestor", "internal/durable"},
	"workloadapi":      {"identity", "attestor", "internal/durable"},
	"federation":       {"identity"},
	"controller":       {"identity", "api"},
	"deploy":           {"identity"},
	"cmd":              {"*"},
	"integration":      {"*"},
}

// agentMustNotLink is what the node agent must never carry: what it does not link, it cannot do, and need not keep in memory.
var agentMustNotLink = []string{"raft", "store", "ca", "seal", "server", "audit", "backup", "federation", "controller", "deploy", "internal/vault", "internal/hsm"}

type source struct {
	path string // slash-separated, from the root
	pkg  string // folder
	test bool
	file *ast.File
	fset *token.FileSet
	n    int // lines
}

func sources(t *testing.T) []source {
	t.Helper()
	var out []source
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); name != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin") {
				return filepath.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil && path != "." {
				return filepath.SkipDir // a module of its own
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, ".pb.go") || path == "house_test.go" {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, data, parser.ParseComments)
		if err != nil {
			return err
		}
		out = append(out, source{
			path: filepath.ToSlash(path), pkg: filepath.ToSlash(filepath.Dir(path)), test: strings.HasSuffix(path, "_test.go"),
			file: f, fset: fset, n: strings.Count(string(data), "\n"),
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 50 {
		t.Fatalf("found only %d source files: this test looks in the wrong place", len(out))
	}
	return out
}

// owner is the entry of the house that a folder lives under.
func owner(pkg string) (string, bool) {
	for p := pkg; p != "."; p = filepath.ToSlash(filepath.Dir(p)) {
		if _, ok := house[p]; ok {
			return p, true
		}
	}
	return "", false
}

func imports(s source) []string {
	var out []string
	for _, i := range s.file.Imports {
		if p, ok := strings.CutPrefix(strings.Trim(i.Path.Value, `"`), module+"/"); ok {
			out = append(out, p)
		}
	}
	return out
}

func TestHouseImportsGoDown(t *testing.T) {
	for _, s := range sources(t) {
		own, ok := owner(s.pkg)
		if !ok {
			t.Errorf("%s: no place in the house for package %s", s.path, s.pkg)
			continue
		}
		if s.test && strings.HasSuffix(s.file.Name.Name, "_test") {
			continue // an external test may use what it likes
		}
		for _, imp := range imports(s) {
			to, ok := owner(imp)
			if !ok || to != own && !slices.Contains(house[own], to) && !slices.Contains(house[own], "*") && !s.test {
				t.Errorf("%s: %s may not import %s (it may: %v)", s.path, own, imp, house[own])
			}
			if to == "controller" && own != "cmd" && own != "controller" {
				t.Errorf("%s: only cmd imports controller", s.path)
			}
			if to == "config" && own != "cmd" && own != "integration" {
				t.Errorf("%s: only cmd imports config", s.path)
			}
		}
	}
}

func TestHouseAgentLinksOnlyItsSide(t *testing.T) {
	all := map[string][]string{}
	for _, s := range sources(t) {
		if !s.test {
			all[s.pkg] = append(all[s.pkg], imports(s)...)
		}
	}
	seen := map[string]bool{}
	var visit func(pkg, via string)
	visit = func(pkg, via string) {
		if seen[pkg] {
			return
		}
		seen[pkg] = true
		own, _ := owner(pkg)
		if slices.Contains(agentMustNotLink, own) || pkg == "attestor/kube" {
			t.Errorf("countersign-agent links %s by way of %s", pkg, via)
		}
		for _, i := range all[pkg] {
			visit(i, via+" > "+i)
		}
	}
	visit("cmd/countersign-agent", "cmd/countersign-agent")
	if len(seen) < 5 {
		t.Fatalf("saw only %d packages", len(seen))
	}
}

func TestHouseConventions(t *testing.T) {
	documented := map[string]bool{}
	for _, s := range sources(t) {
		if s.file.Doc != nil && !s.test {
			documented[s.pkg] = true
		} else if _, ok := documented[s.pkg]; !ok && !s.test {
			documented[s.pkg] = false
		}
		base := filepath.Base(s.pkg)
		if slices.Contains([]string{"util", "utils", "common", "helpers", "misc"}, base) {
			t.Errorf("%s: a package called %s says nothing about what is in it", s.path, base)
		}
		if s.test {
			continue
		}
		if s.n > 600 {
			t.Errorf("%s has %d lines: at the most 600", s.path, s.n)
		}
		for _, d := range s.file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				checkFunc(t, s, d)
			case *ast.GenDecl:
				if d.Tok == token.VAR {
					checkVars(t, s, d)
				}
			}
		}
	}
	for pkg, ok := range documented {
		if !ok {
			t.Errorf("package %s has no package comment", pkg)
		}
	}
}

func checkFunc(t *testing.T, s source, d *ast.FuncDecl) {
	if d.Name.Name == "init" && d.Recv == nil {
		t.Errorf("%s: no init: what must happen happens in main, in order", s.path)
	}
	from, to := s.fset.Position(d.Pos()).Line, s.fset.Position(d.End()).Line
	if to-from+1 > 100 {
		t.Errorf("%s:%d: %s has %d lines: at the most 100", s.path, from, d.Name.Name, to-from+1)
	}
	if d.Name.IsExported() && d.Doc == nil && d.Recv == nil && !strings.HasPrefix(s.pkg, "integration") {
		t.Errorf("%s:%d: %s is exported and has no comment", s.path, from, d.Name.Name)
	}
}

// checkVars allows what does not change: sentinel errors, compiled expressions, embedded files, interface assertions, and the
// linker's version.
func checkVars(t *testing.T, s source, d *ast.GenDecl) {
	for _, spec := range d.Specs {
		v := spec.(*ast.ValueSpec)
		for i, name := range v.Names {
			if name.Name == "_" || name.Name == "version" || d.Doc != nil && strings.Contains(d.Doc.Text(), "go:embed") || embedded(d) {
				continue
			}
			if i < len(v.Values) && allowedValue(v.Values[i]) {
				continue
			}
			t.Errorf("%s:%d: package variable %s: state belongs to a value that New returns", s.path, s.fset.Position(name.Pos()).Line, name.Name)
		}
	}
}

func embedded(d *ast.GenDecl) bool {
	return d.Doc != nil && slices.ContainsFunc(d.Doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//go:embed") })
}

func allowedValue(e ast.Expr) bool {
	call, ok := e.(*ast.CallExpr)
	if !ok {
		return false
	}
	switch fmt.Sprint(name(call.Fun)) {
	case "errors.New", "fmt.Errorf", "regexp.MustCompile", "base64.RawURLEncoding.Strict":
		return true
	}
	return false
}

func name(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return name(e.X) + "." + e.Sel.Name
	}
	return ""
}
