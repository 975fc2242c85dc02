package federation

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"countersign.io/countersign/identity"
)

// EndpointPath is where a member serves the bundle's document, behind the public URL.
const EndpointPath = "/bundle"

// EndpointConfig configures the bundle endpoint.
type EndpointConfig struct {
	// Bundle returns the own bundle; the same pointer means the same content. One with sequence 0 is not there yet.
	Bundle func() *identity.Bundle
	// RefreshHint is how often partners are to ask.
	RefreshHint time.Duration
	Log         *slog.Logger
}

// NewEndpoint makes the handler of the bundle endpoint: the newest bundle in SPIFFE format, to anybody. The document is made
// once for each bundle, whoever asks how often.
func NewEndpoint(cfg EndpointConfig) http.Handler {
	return &endpoint{
		bundle: cfg.Bundle, log: cfg.Log, fresh: cfg.RefreshHint / freshShare,
		marshal: func(b *identity.Bundle) ([]byte, error) { return Marshal(b, cfg.RefreshHint) },
	}
}

// endpoint serves a document that is made of the own bundle.
type endpoint struct {
	bundle  func() *identity.Bundle
	marshal func(*identity.Bundle) ([]byte, error)
	fresh   time.Duration // how long caches may keep it
	anyone  bool          // scripts of any web page may read it
	log     *slog.Logger
	doc     atomic.Pointer[served]
}

// served is a document, and what it was made of.
type served struct {
	of   *identity.Bundle
	raw  []byte
	etag string
}

// freshShare is which part of the refresh hint a cache on the way may keep the document: what a partner gets is newer than
// its last poll, and three times the hint, which a rotation waits, is enough.
const freshShare = 5

// ServeHTTP answers GET and HEAD.
func (e *endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "this is read with GET", http.StatusMethodNotAllowed)
		return
	}
	doc, err := e.document()
	if err != nil {
		e.log.Error("cannot serve the bundle", "error", err)
	}
	if doc == nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, "the trust domain's bundle is not there yet", http.StatusServiceUnavailable)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("ETag", doc.etag)
	h.Set("Cache-Control", "public, must-revalidate, max-age="+strconv.Itoa(int(e.fresh/time.Second)))
	h.Set("X-Content-Type-Options", "nosniff")
	if e.anyone {
		h.Set("Access-Control-Allow-Origin", "*")
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(doc.raw))
}

// document is nil while there is no bundle.
func (e *endpoint) document() (*served, error) {
	b := e.bundle()
	if b == nil || b.Sequence == 0 {
		return nil, nil
	}
	if doc := e.doc.Load(); doc != nil && doc.of == b {
		return doc, nil
	}
	raw, err := e.marshal(b)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(raw)
	doc := &served{of: b, raw: raw, etag: fmt.Sprintf("%q", hex.EncodeToString(sum[:16]))}
	e.doc.Store(doc)
	return doc, nil
}
