package main

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// rootsModule is where the web's roots come from: Mozilla's list, in a Go module, so that go.sum pins it.
const rootsModule = "golang.org/x/crypto/x509roots/fallback"

// entry is a file of an image, or a folder where data is nil. All belong to root.
type entry struct {
	path string // relative
	mode int64
	data []byte
}

// baseLayer is all that is in an image beside its binary.
func baseLayer(p product, created time.Time) (v1.Layer, error) {
	entries := []entry{
		{path: "etc/", mode: 0o755},
		{path: "etc/passwd", mode: 0o644, data: []byte("root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/tmp:/sbin/nologin\n")},
		{path: "etc/group", mode: 0o644, data: []byte("root:x:0:\nnonroot:x:65532:\n")},
		{path: "tmp/", mode: 0o1777},
	}
	if p.Roots {
		roots, err := webRoots(created)
		if err != nil {
			return nil, fmt.Errorf("reading the web's roots: %w", err)
		}
		entries = append(entries, entry{path: "etc/ssl/", mode: 0o755}, entry{path: "etc/ssl/certs/", mode: 0o755},
			entry{path: "etc/ssl/certs/ca-certificates.crt", mode: 0o644, data: roots})
	}
	return layerOf(entries, created)
}

// webRoots are the web's roots as PEM. One that is trusted for certificates of before some date only is left out: a file cannot say
// so, and such a root is on its way out. So is one that has ended.
func webRoots(now time.Time) ([]byte, error) {
	var out bytes.Buffer
	n := 0
	for r := range bundle.Roots() {
		cert, err := x509.ParseCertificate(r.Certificate)
		if err != nil {
			return nil, err
		}
		if r.Constraint != nil || now.After(cert.NotAfter) {
			continue
		}
		fmt.Fprintf(&out, "# %s\n", strings.ReplaceAll(cert.Subject.String(), "\n", " "))
		if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate}); err != nil {
			return nil, err
		}
		n++
	}
	if n < 50 {
		return nil, fmt.Errorf("only %d: that cannot be the whole list", n)
	}
	return out.Bytes(), nil
}

func layerOf(entries []entry, created time.Time) (v1.Layer, error) {
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	for _, e := range entries {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: e.path, Mode: e.mode, Size: int64(len(e.data)), ModTime: created, Format: tar.FormatUSTAR}
		if e.data == nil {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
}
