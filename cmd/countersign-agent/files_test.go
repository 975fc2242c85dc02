package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/workloadapi/files"
)

// aContext is an X.509 context with one self-made identity, and a federated bundle.
func aContext(t *testing.T) *workloadapi.X509Context {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromString("spiffe://example.org/web")
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "x"}, NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	other := spiffeid.RequireTrustDomainFromString("partner.test")
	return &workloadapi.X509Context{
		SVIDs:   []*x509svid.SVID{{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}},
		Bundles: x509bundle.NewSet(x509bundle.FromX509Authorities(id.TrustDomain(), []*x509.Certificate{cert}), x509bundle.FromX509Authorities(other, []*x509.Certificate{cert})),
	}
}

// TestPublish: whoever opens ..data sees a certificate with its own key, whenever he looks; nothing old is left.
func TestPublish(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "web")
	put := func() {
		list, err := publishedX509(aContext(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := files.Publish(dir, list); err != nil {
			t.Fatal(err)
		}
	}
	put()
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	read := 0
	wg.Go(func() {
		for ; ctx.Err() == nil; read++ {
			at, err := os.OpenRoot(filepath.Join(dir, "..data"))
			if errors.Is(err, os.ErrNotExist) {
				continue // two were published between two steps of the kernel: on a busy machine
			}
			if err != nil {
				t.Error(err)
				return
			}
			cert, err1 := at.ReadFile("svid.pem")
			key, err2 := at.ReadFile("key.pem")
			at.Close()
			if errors.Is(errors.Join(err1, err2), os.ErrNotExist) {
				continue // it has been replaced since: that is told from a mismatch
			}
			if _, err := tls.X509KeyPair(cert, key); errors.Join(err, err1, err2) != nil {
				t.Errorf("%v %v %v", err, err1, err2)
				return
			}
		}
	})
	for range 50 {
		put()
	}
	stop()
	wg.Wait()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range names {
		got = append(got, strings.Split(n.Name(), "-")[0])
	}
	if want := "..at ..at ..data bundle bundle.pem key.pem svid.pem"; strings.Join(got, " ") != want {
		t.Errorf("the folder has %v", names)
	}
	if info, err := os.Stat(filepath.Join(dir, "key.pem")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key: %v, %v", info.Mode(), err)
	}
	if partner, err := os.ReadFile(filepath.Join(dir, "bundle-partner.test.pem")); err != nil || !bytes.Contains(partner, []byte("CERTIFICATE")) {
		t.Errorf("the partner's bundle: %v", err)
	}
	t.Logf("read %d times", read)
}

func TestPublishRefuses(t *testing.T) {
	list, err := publishedX509(aContext(t))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "svid.pem"), []byte("somebody's own"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := files.Publish(dir, list); !errors.Is(err, identity.ErrExists) {
		t.Errorf("over somebody's own file: %v", err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "svid.pem")); err != nil || string(data) != "somebody's own" {
		t.Errorf("it is gone: %q, %v", data, err)
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 1 {
		t.Errorf("left there: %v, %v", names, err)
	}
	if err := files.Publish(filepath.Join(dir, "svid.pem", "x"), list); err == nil {
		t.Error("below a file")
	}
}

// TestPublisherEnds: a folder that cannot be written ends the command; afterwards it does not.
func TestPublisherEnds(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	ctx, stop := context.WithCancel(t.Context())
	p := &publisher{printer: printer{out: &out, errOut: &errs}, ctx: ctx, dir: filepath.Join(file, "x"), stop: stop}
	p.OnX509ContextUpdate(aContext(t))
	if p.fail == nil || ctx.Err() == nil {
		t.Errorf("it goes on: %v", p.fail)
	}
	ctx, stop = context.WithCancel(t.Context())
	defer stop()
	p = &publisher{printer: printer{out: &out, errOut: &errs}, ctx: ctx, dir: filepath.Join(dir, "good"), stop: stop, run: "echo ran; exit 3"}
	p.OnX509ContextUpdate(aContext(t))
	if p.fail != nil || !strings.Contains(errs.String(), "ran") || !strings.Contains(errs.String(), "exit status 3") || !strings.Contains(out.String(), "spiffe://example.org/web") {
		t.Errorf("%v; said %q and %q", p.fail, out.String(), errs.String())
	}
	p.dir = filepath.Join(file, "x")
	p.OnX509ContextUpdate(aContext(t))
	if p.fail != nil || ctx.Err() != nil || !strings.Contains(errs.String(), "not a directory") {
		t.Errorf("%v, %v: %s", p.fail, ctx.Err(), errs.String())
	}
}
