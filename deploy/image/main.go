// Command image builds the container images of Countersign: OCI archives with both architectures and their bills of materials,
// without a Docker daemon and without a network. The same commit and the same Go release give the same bytes, in whatever folder
// and on whatever machine. It is a module of its own, so that what it needs reaches no binary of the product.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// product is one image.
type product struct {
	Name  string // of the image and of its one binary, and the folder of its main package below cmd/
	Title string
	User  string // uid:gid of the process, where the pod does not say
	Roots bool   // whether it verifies certificates of the web: ACME, partners' endpoints, clouds
}

// products are all of them. A member needs no privilege. The agent is root: it looks into callers' processes and mounts pods' volumes
// (docs/KUBERNETES.md); it talks to members alone, by the trust domain's own roots.
func products() []product {
	return []product{
		{Name: "countersign", Title: "Countersign member: certificate authority and workload identity server", User: "65532:65532", Roots: true},
		{Name: "countersign-agent", Title: "Countersign node agent: SPIFFE Workload API and CSI driver", User: "0:0"},
	}
}

// options are what the images depend on, beside the source.
type options struct {
	root     string    // folder of the product's module
	out      string    // folder for the archives
	version  string    // of the product: the images' tag
	revision string    // commit
	created  time.Time // of everything in the images
	archs    []string
	repo     string // prefix of the names under which the archives are imported
	push     string // prefix of the repositories to push to; empty: none
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(ctx, args, stderr)
	if err == nil {
		err = makeAll(ctx, o, stdout)
	}
	if err != nil {
		fmt.Fprintln(stderr, "image:", err)
		return 1
	}
	return 0
}

// parse reads the flags, and asks git for what they and the environment do not say.
func parse(ctx context.Context, args []string, stderr io.Writer) (*options, error) {
	o := &options{}
	var archs string
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.root, "root", "../..", "folder of the product's module")
	f.StringVar(&o.out, "out", "../../bin/image", "folder for the archives")
	f.StringVar(&o.version, "version", "", "of the product, and the images' tag (default git describe)")
	f.StringVar(&archs, "arch", "amd64,arm64", "architectures, the first of them first in the index")
	f.StringVar(&o.repo, "repo", "countersign.io", "REPO/countersign:VERSION is the name by which ctr and others import an archive")
	f.StringVar(&o.push, "push", "", "push to PUSH/countersign:VERSION and PUSH/countersign-agent:VERSION as well, with the credentials of docker login")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() != 0 {
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	for a := range strings.SplitSeq(archs, ",") {
		if a != "amd64" && a != "arm64" {
			return nil, fmt.Errorf("-arch %s: it is amd64 or arm64", a)
		}
		o.archs = append(o.archs, a)
	}
	git := func(args ...string) string {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = o.root
		out, err := cmd.Output()
		if err != nil {
			return "" // no checkout: what was asked for stays unknown, or has a flag
		}
		return strings.TrimSpace(string(out))
	}
	if o.version == "" {
		o.version = git("describe", "--tags", "--always", "--dirty")
	}
	if o.version == "" {
		o.version = "dev"
	}
	if _, err := name.NewTag("x.invalid/x:" + o.version); err != nil {
		return nil, fmt.Errorf("-version %q cannot be an image's tag: %w", o.version, err)
	}
	o.revision = git("rev-parse", "HEAD")
	seconds := os.Getenv("SOURCE_DATE_EPOCH")
	if seconds == "" {
		seconds = git("log", "-1", "--format=%ct")
	}
	if seconds == "" {
		seconds = "0"
	}
	n, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil || n < 0 {
		return nil, fmt.Errorf("SOURCE_DATE_EPOCH %q: it is seconds since 1970", seconds)
	}
	o.created = time.Unix(n, 0).UTC()
	return o, nil
}

// makeAll builds every image, writes its archive and its bills of materials, and pushes it if asked to. It prints a line for each.
func makeAll(ctx context.Context, o *options, stdout io.Writer) error {
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return fmt.Errorf("making -out: %w", err)
	}
	for _, p := range products() {
		idx, err := makeImage(ctx, o, p)
		if err != nil {
			return fmt.Errorf("%s: %w", p.Name, err)
		}
		file := filepath.Join(o.out, p.Name+".tar")
		if err := writeArchive(file, idx, o.repo+"/"+p.Name+":"+o.version, o.version, o.created); err != nil {
			return fmt.Errorf("%s: writing the archive: %w", p.Name, err)
		}
		digest, err := idx.Digest()
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "%s  %s:%s  %s\n", digest, p.Name, o.version, file)
		if o.push == "" {
			continue
		}
		if err := pushIndex(ctx, o.push+"/"+p.Name+":"+o.version, idx); err != nil {
			return fmt.Errorf("%s: pushing: %w", p.Name, err)
		}
		fmt.Fprintf(stdout, "pushed  %s/%s@%s\n", o.push, p.Name, digest)
	}
	return nil
}

// pushIndex pushes everything below the index, bills of materials included. A registry without referrers finds them in the index.
func pushIndex(ctx context.Context, to string, idx v1.ImageIndex) error {
	ref, err := name.ParseReference(to)
	if err != nil {
		return err
	}
	return remote.WriteIndex(ref, idx, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain))
}
