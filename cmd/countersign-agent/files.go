package main

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"os/exec"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/api"
	"countersign.io/countersign/workloadapi/files"
)

func publishedX509(x *workloadapi.X509Context) ([]files.File, error) {
	svid := x.DefaultSVID()
	certs, key, err := svid.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encoding the SVID: %w", err)
	}
	bundle, err := x.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return nil, fmt.Errorf("finding the bundle of %s: %w", svid.ID.TrustDomain(), err)
	}
	out := []files.File{{Name: "key.pem", Data: key, Mode: 0o600}, {Name: "svid.pem", Data: certs, Mode: 0o644}, {Name: "bundle.pem", Mode: 0o644}}
	for _, r := range bundle.X509Authorities() {
		out[2].Data = append(out[2].Data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})...)
	}
	for _, b := range x.Bundles.Bundles() { // those of federated trust domains, each by itself: they are never merged
		if td := b.TrustDomain(); td != svid.ID.TrustDomain() {
			var data []byte
			for _, r := range b.X509Authorities() {
				data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})...)
			}
			out = append(out, files.File{Name: "bundle-" + td.Name() + ".pem", Data: data, Mode: 0o644})
		}
	}
	return out, nil
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
	list, err := publishedX509(x)
	if err == nil {
		err = files.Publish(p.dir, list)
		clear(list[0].Data)
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
