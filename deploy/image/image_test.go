package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

const testEpoch = "1700000000"

// built is the product's images, made once: of one architecture, for time's sake, from a copy of the source in a folder of its own.
var built = sync.OnceValues(func() (string, error) { return buildCopy("first") })

func buildCopy(folder string) (string, error) {
	dir, err := os.MkdirTemp("", "image-test-"+folder+"-")
	if err != nil {
		return "", err
	}
	src, out := filepath.Join(dir, folder, "src"), filepath.Join(dir, "out")
	if err := copySource("../..", src); err != nil {
		return "", err
	}
	var log bytes.Buffer
	args := []string{"-root", src, "-out", out, "-version", "1.2.3", "-arch", "amd64"}
	if code := run(context.Background(), args, &log, &log); code != 0 {
		return "", fmt.Errorf("image %v: exit code %d: %s", args, code, log.Bytes())
	}
	return out, nil
}

func TestMain(m *testing.M) {
	os.Setenv("SOURCE_DATE_EPOCH", testEpoch)
	code := m.Run()
	if old, err := filepath.Glob(filepath.Join(os.TempDir(), "image-test-*")); err == nil {
		for _, dir := range old {
			os.RemoveAll(dir)
		}
	}
	os.Exit(code)
}

// copySource copies what the product is built from.
func copySource(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); rel != "." && (strings.HasPrefix(name, ".") || slices.Contains([]string{"bin", "integration", "docs", "node_modules", "testdata"}, name)) {
				return filepath.SkipDir
			}
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		if !d.Type().IsRegular() || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), data, 0o644)
	})
}

func out(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("builds the product")
	}
	dir, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// unpack writes a tar file into a new folder, and says what was in it: paths with modes and owners.
func unpack(t *testing.T, r io.Reader) (dir string, entries []string) {
	t.Helper()
	dir = t.TempDir()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.ModTime.Unix() != 1700000000 {
			t.Errorf("%s is of %v, not of SOURCE_DATE_EPOCH", h.Name, h.ModTime)
		}
		entries = append(entries, fmt.Sprintf("%s %o %d:%d", h.Name, h.Mode, h.Uid, h.Gid))
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, fs.FileMode(h.Mode&0o777))); err != nil {
			t.Fatal(err)
		}
	}
	return dir, entries
}

// open reads an archive as other programs do: as an OCI image layout.
func open(t *testing.T, dir, product string) (top, idx v1.ImageIndex) {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, product+".tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	folder, _ := unpack(t, f)
	if top, err = layout.ImageIndexFromPath(folder); err != nil {
		t.Fatal(err)
	}
	m, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != 1 {
		t.Fatalf("index.json lists %d manifests: tools that push a layout want one", len(m.Manifests))
	}
	if idx, err = top.ImageIndex(m.Manifests[0].Digest); err != nil {
		t.Fatal(err)
	}
	return top, idx
}

// TestReproducible: the same source in two folders gives the same bytes, archives and bills of materials alike.
func TestReproducible(t *testing.T) {
	first := out(t)
	second, err := buildCopy("second-folder-with-a-longer-name")
	if err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir(first)
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != 4 {
		t.Errorf("%d files were made: %v; want two archives and two bills of materials", len(names), names)
	}
	for _, n := range names {
		a, errA := os.ReadFile(filepath.Join(first, n.Name()))
		b, errB := os.ReadFile(filepath.Join(second, n.Name()))
		if err := errors.Join(errA, errB); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs between two builds", n.Name())
		}
	}
}

// TestContent: an image holds its binary and what is listed here, with these owners and modes, and nothing else; the binary runs
// with that as its whole world.
func TestContent(t *testing.T) {
	base := []string{"etc/ 755 0:0", "etc/passwd 644 0:0", "etc/group 644 0:0", "tmp/ 1777 0:0"}
	roots := []string{"etc/ssl/ 755 0:0", "etc/ssl/certs/ 755 0:0", "etc/ssl/certs/ca-certificates.crt 644 0:0"}
	for product, want := range map[string][]string{
		"countersign":       slices.Concat(base, roots, []string{"countersign 755 0:0"}),
		"countersign-agent": slices.Concat(base, []string{"countersign-agent 755 0:0"}),
	} {
		t.Run(product, func(t *testing.T) {
			_, idx := open(t, out(t), product)
			img := imageFor(t, idx, "amd64")
			rootfs := mutate.Extract(img)
			defer rootfs.Close()
			dir, got := unpack(t, rootfs)
			clean := func(list []string) []string {
				for i, e := range list {
					list[i] = strings.Replace(e, "/ ", " ", 1)
				}
				slices.Sort(list)
				return list
			}
			if got, want = clean(got), clean(want); !slices.Equal(got, want) {
				t.Errorf("the image holds\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			conf, err := img.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			user := map[string]string{"countersign": "65532:65532", "countersign-agent": "0:0"}[product]
			if conf.Config.User != user || !slices.Equal(conf.Config.Entrypoint, []string{"/" + product}) || conf.Created.Unix() != 1700000000 ||
				conf.Config.Labels["org.opencontainers.image.version"] != "1.2.3" || conf.Architecture != "amd64" || conf.OS != "linux" {
				t.Errorf("configuration %+v, %s/%s of %v", conf.Config, conf.OS, conf.Architecture, conf.Created)
			}
			if os.Getuid() != 0 {
				t.Skip("running it with nothing else needs root")
			}
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("/"+product, "--version")
			cmd.Dir, cmd.Env = "/", conf.Config.Env
			cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir, Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
			said, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(said), "1.2.3") {
				t.Errorf("%s --version in its own root: %v: %s", product, err, said)
			}
		})
	}
}

func imageFor(t *testing.T, idx v1.ImageIndex, arch string) v1.Image {
	t.Helper()
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range m.Manifests {
		if d.Platform != nil && d.Platform.Architecture == arch {
			img, err := idx.Image(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			return img
		}
	}
	t.Fatalf("no image for %s in %v", arch, m.Manifests)
	return nil
}

// TestBillOfMaterials: it lists each module that the binary links, in the version of go.mod, and no other; it is about the image;
// and the one in the index is the one beside it.
func TestBillOfMaterials(t *testing.T) {
	for _, p := range products() {
		t.Run(p.Name, func(t *testing.T) {
			raw, err := os.ReadFile(filepath.Join(out(t), p.Name+"-amd64.cdx.json"))
			if err != nil {
				t.Fatal(err)
			}
			var bom cdx.BOM
			if err := json.Unmarshal(raw, &bom); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range *bom.Components {
				if c.Name != "std" && c.Name != rootsModule {
					got = append(got, c.Name+" "+c.Version)
				}
				if c.Version == "" || c.PackageURL == "" {
					t.Errorf("%s has no version or no package URL", c.Name)
				}
			}
			hasRoots := slices.ContainsFunc(*bom.Components, func(c cdx.Component) bool { return c.Name == rootsModule })
			if hasRoots != p.Roots {
				t.Errorf("the web's roots are listed: %v, and in the image: %v", hasRoots, p.Roots)
			}
			cmd := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}", "./cmd/"+p.Name)
			cmd.Dir = "../.."
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
			list, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			want := slices.DeleteFunc(strings.Split(string(list), "\n"), func(l string) bool { return l == "" })
			slices.Sort(want)
			want = slices.Compact(want)
			slices.Sort(got)
			if len(want) == 0 || !slices.Equal(got, want) {
				t.Errorf("it lists\n%s\nand the binary links\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}

			_, idx := open(t, out(t), p.Name)
			digest, err := imageFor(t, idx, "amd64").Digest()
			if err != nil {
				t.Fatal(err)
			}
			attached := imageFor(t, idx, "unknown")
			m, err := attached.Manifest()
			if err != nil {
				t.Fatal(err)
			}
			if m.Subject == nil || m.Subject.Digest != digest || m.ArtifactType != bomType || len(m.Layers) != 1 {
				t.Fatalf("the attached bill of materials is %+v, of image %s", m, digest)
			}
			layer, err := attached.LayerByDigest(m.Layers[0].Digest)
			if err != nil {
				t.Fatal(err)
			}
			r, err := layer.Compressed()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			inside, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(inside, raw) {
				t.Errorf("the attached one differs from the file beside the archive: %v", err)
			}
		})
	}
}

// TestPush: what is pushed is what is in the archive, digest for digest, and a registry that knows referrers lists the bill of materials.
func TestPush(t *testing.T) {
	top, idx := open(t, out(t), "countersign")
	if err := validate.Index(idx); err != nil {
		t.Errorf("the index is not valid: %v", err)
	}
	m, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if a := m.Manifests[0].Annotations; a["io.containerd.image.name"] != "countersign.io/countersign:1.2.3" || a["org.opencontainers.image.ref.name"] != "1.2.3" {
		t.Errorf("the archive names its image %v", a)
	}
	srv := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	repo := strings.TrimPrefix(srv.URL, "http://") + "/team/countersign"
	if err := pushIndex(t.Context(), repo+":1.2.3", idx); err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(repo + ":1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	got, err := remote.Index(ref)
	if err != nil {
		t.Fatal(err)
	}
	gotDigest, errGot := got.Digest()
	wantDigest, errWant := idx.Digest()
	if err := errors.Join(errGot, errWant); err != nil || gotDigest != wantDigest {
		t.Errorf("pushed %s, have %s: %v", wantDigest, gotDigest, err)
	}
	image, err := imageFor(t, idx, "amd64").Digest()
	if err != nil {
		t.Fatal(err)
	}
	referrers, err := remote.Referrers(ref.Context().Digest(image.String()))
	if err != nil {
		t.Fatal(err)
	}
	list, err := referrers.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	bom, err := imageFor(t, idx, "unknown").Digest()
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Manifests) != 1 || list.Manifests[0].Digest != bom {
		t.Errorf("the registry knows of referrers %+v; want the bill of materials, %s", list.Manifests, bom)
	}
	if err := pushIndex(t.Context(), "Not A Name", idx); err == nil {
		t.Error("pushed to a name that is none")
	}
}

// TestRoots: the file of the web's roots is one that Go's verifier takes, without roots that have ended.
func TestRoots(t *testing.T) {
	now := time.Unix(1700000000, 0)
	pem, err := webRoots(now)
	if err != nil {
		t.Fatal(err)
	}
	if !x509.NewCertPool().AppendCertsFromPEM(pem) {
		t.Error("no certificate in it is read")
	}
	if n := bytes.Count(pem, []byte("BEGIN CERTIFICATE")); n < 80 {
		t.Errorf("%d roots", n)
	}
	if _, err := webRoots(now.AddDate(100, 0, 0)); err == nil {
		t.Error("a list of ended roots was taken")
	}
}

// TestTwoArchitectures: of a program that is quickly built, an image for each, and the flags of the environment change nothing.
func TestTwoArchitectures(t *testing.T) {
	src, dir := t.TempDir(), t.TempDir()
	for file, text := range map[string]string{
		"go.mod":                        "module example.org/small\n\ngo 1.26.0\n",
		"cmd/countersign/main.go":       "package main\n\nvar version string\n\nfunc main() { println(version) }\n",
		"cmd/countersign-agent/main.go": "package main\n\nvar version string\n\nfunc main() { println(version) }\n",
	} {
		path := filepath.Join(src, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	digest := func(sub string) string {
		t.Helper()
		var log bytes.Buffer
		if code := run(t.Context(), []string{"-root", src, "-out", filepath.Join(dir, sub), "-version", "v2", "-repo", "r.example/x"}, &log, &log); code != 0 {
			t.Fatalf("exit code %d: %s", code, log.Bytes())
		}
		_, idx := open(t, filepath.Join(dir, sub), "countersign")
		for _, arch := range []string{"amd64", "arm64"} {
			conf, err := imageFor(t, idx, arch).ConfigFile()
			if err != nil || conf.Architecture != arch {
				t.Errorf("image for %s: %+v, %v", arch, conf, err)
			}
		}
		h, err := idx.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return h.String()
	}
	plain := digest("plain")
	t.Setenv("GOFLAGS", "-tags=other")
	t.Setenv("CGO_ENABLED", "1")
	t.Setenv("GOAMD64", "v3")
	if other := digest("other"); other != plain {
		t.Errorf("with other flags in the environment the image is %s, not %s", other, plain)
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-arch", "s390x"}, "amd64 or arm64"},
		{[]string{"-version", "not a tag"}, "cannot be an image's tag"},
		{[]string{"more"}, "unexpected argument"},
		{[]string{"-root", t.TempDir(), "-out", t.TempDir(), "-version", "1"}, "building for amd64"},
	} {
		var log bytes.Buffer
		if code := run(t.Context(), c.args, io.Discard, &log); code == 0 || !strings.Contains(log.String(), c.want) {
			t.Errorf("image %v: exit code %d, %q; want %q", c.args, code, log.String(), c.want)
		}
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	var log bytes.Buffer
	if code := run(t.Context(), []string{"-version", "1"}, io.Discard, &log); code == 0 || !strings.Contains(log.String(), "SOURCE_DATE_EPOCH") {
		t.Errorf("exit code %d, %q", code, log.String())
	}
}
