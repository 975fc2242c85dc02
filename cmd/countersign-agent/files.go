package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/api"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

// A folder of files for programs that read files. A certificate must never be seen with another one's key, so they change together,
// as in a Kubernetes volume: each generation is a folder of its own, ..data is a link to the newest, and svid.pem and the others are
// links through that. The generation before stays until the next. Whoever reads several files opens the folder ..data once, or is told to read again when all are there.
const (
	dataLink   = "..data"
	generation = "..at-" // and a random end
)

// published are the files of one generation.
type published []struct {
	name string
	data []byte
	mode os.FileMode
}

func publishedX509(x *workloadapi.X509Context) (published, error) {
	svid := x.DefaultSVID()
	certs, key, err := svid.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encoding the SVID: %w", err)
	}
	bundle, err := x.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return nil, fmt.Errorf("finding the bundle of %s: %w", svid.ID.TrustDomain(), err)
	}
	out := published{{"key.pem", key, 0o600}, {"svid.pem", certs, 0o644}, {"bundle.pem", nil, 0o644}}
	for _, r := range bundle.X509Authorities() {
		out[2].data = append(out[2].data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})...)
	}
	for _, b := range x.Bundles.Bundles() { // those of federated trust domains, each by itself: they are never merged
		if td := b.TrustDomain(); td != svid.ID.TrustDomain() {
			var data []byte
			for _, r := range b.X509Authorities() {
				data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})...)
			}
			out = append(out, published{{"bundle-" + td.Name() + ".pem", data, 0o644}}...)
		}
	}
	return out, nil
}

// publish makes files the newest generation in dir. A crash leaves the one before, and a folder that the next call removes.
func publish(dir string, files published) (err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the folder: %w", err)
	}
	for _, f := range files { // what a person put there is not ours to replace
		if info, err := os.Lstat(filepath.Join(dir, f.name)); err == nil && info.Mode().Type() != fs.ModeSymlink {
			return fmt.Errorf("%w: %s is there and is no link of ours: move it away, or name another folder", identity.ErrExists, filepath.Join(dir, f.name))
		}
	}
	at, err := os.MkdirTemp(dir, generation)
	if err != nil {
		return fmt.Errorf("making a folder for the files: %w", err)
	}
	defer func() {
		if err != nil {
			os.RemoveAll(at)
		}
	}()
	if err := os.Chmod(at, 0o755); err != nil { // the key is 0600
		return err
	}
	for _, f := range files {
		if err := durable.WriteFile(filepath.Join(at, f.name), f.data, f.mode); err != nil {
			return err
		}
	}
	before, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading the link to the newest files: %w", err)
	}
	if err := relink(filepath.Join(dir, dataLink), filepath.Base(at)); err != nil {
		return err
	}
	for _, f := range files {
		if err := relink(filepath.Join(dir, f.name), filepath.Join(dataLink, f.name)); err != nil {
			return err
		}
	}
	return removeOld(dir, filepath.Base(at), before) // who is reading the one before may end
}

// relink replaces a link, whole.
func relink(path, target string) error {
	if old, err := os.Readlink(path); err == nil && old == target {
		return nil
	}
	next := path + ".next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	if err := os.Symlink(target, next); err != nil {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	return nil
}

// removeOld takes older generations away, keys and all.
func removeOld(dir string, kept ...string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("looking for older files: %w", err)
	}
	var errs []error
	for _, n := range names {
		if strings.HasPrefix(n.Name(), generation) && !slices.Contains(kept, n.Name()) && n.IsDir() {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, n.Name())))
		}
	}
	return errors.Join(errs...)
}

// runTime bounds the command that is run after a change.
const runTime = time.Minute

// publisher keeps a folder as the Workload API says, and runs a command after each change. The client calls it from one goroutine,
// the mutex guards against its successor.
type publisher struct {
	printer
	ctx  context.Context
	dir  string
	run  string
	wmu  sync.Mutex
	fail error // of the first generation: nothing was written at all
	any  bool
	stop context.CancelFunc
}

func (p *publisher) OnX509ContextUpdate(x *workloadapi.X509Context) {
	p.wmu.Lock()
	defer p.wmu.Unlock()
	files, err := publishedX509(x)
	if err == nil {
		err = publish(p.dir, files)
		clear(files[0].data)
	}
	if err != nil {
		if !p.any { // a folder that cannot be written is no matter of time
			p.fail = err
			p.stop()
			return
		}
		fmt.Fprintf(p.errOut, "%s  %v\n", time.Now().Format("15:04:05.000"), err)
		return
	}
	p.any = true
	p.printer.OnX509ContextUpdate(x)
	if p.run == "" {
		return
	}
	ctx, cancel := context.WithTimeout(p.ctx, runTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", p.run)
	cmd.Stdout, cmd.Stderr = io.Writer(p.errOut), p.errOut
	if err := cmd.Run(); err != nil && p.ctx.Err() == nil {
		fmt.Fprintf(p.errOut, "%s  running %q: %v\n", time.Now().Format("15:04:05.000"), p.run, err)
	}
}

func (p *publisher) OnX509ContextWatchError(err error) {
	p.wmu.Lock()
	defer p.wmu.Unlock()
	fmt.Fprintf(p.errOut, "%s  %v (trying again; the files stay)\n", time.Now().Format("15:04:05.000"), api.FromStatus(err))
}
