package workloadapi

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"weak"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	protobuf "google.golang.org/protobuf/proto"

	"countersign.io/countersign/identity"
)

// message is a response as it goes over the wire, encoded once for all who are to get it.
type message struct {
	data   []byte
	digest digest
}

type digest [sha256.Size]byte

func encode(m protobuf.Message) (*message, error) {
	data, err := protobuf.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encoding a response: %w", err)
	}
	return &message{data, sha256.Sum256(data)}, nil
}

// codec is gRPC's own for protobuf, but for messages that are encoded already.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*message); ok {
		return mem.BufferSlice{mem.SliceBuffer(m.data)}, nil
	}
	return c.CodecV2.Marshal(v)
}

// views keeps what was made of an update or a bundle for as long as somebody holds that.
type views struct {
	updates cache[identity.Update, updateView]
	bundles cache[identity.Bundle, bundleView]
}

// cache maps a pointer to what was made of its value, which must not change, and forgets it with the value.
type cache[K, V any] struct{ m sync.Map } // weak.Pointer[K] -> *V

func (c *cache[K, V]) of(k *K, fresh func(*K) *V) *V {
	key := weak.Make(k)
	if v, ok := c.m.Load(key); ok {
		return v.(*V)
	}
	v, found := c.m.LoadOrStore(key, fresh(k))
	if !found {
		runtime.AddCleanup(k, func(key weak.Pointer[K]) { c.m.Delete(key) }, key)
	}
	return v.(*V)
}

// updateView is the responses that tell an update. It must not point at the update, which would then never be
// forgotten.
type updateView struct {
	x509, x509Bundles, jwtBundles lazy
}

// lazy makes one response on first use.
type lazy struct {
	once sync.Once
	m    *message
	err  error
}

func (l *lazy) get(u *identity.Update, fresh func(*identity.Update) (protobuf.Message, error)) (*message, error) {
	l.once.Do(func() {
		var m protobuf.Message
		if m, l.err = fresh(u); l.err == nil {
			l.m, l.err = encode(m)
		}
	})
	return l.m, l.err
}

func (v *views) update(u *identity.Update) *updateView {
	return v.updates.of(u, func(*identity.Update) *updateView { return new(updateView) })
}

// x509 is the answer to FetchX509SVID (Workload API section 5.2.1).
func (v *views) x509(u *identity.Update) (*message, error) {
	return v.update(u).x509.get(u, func(u *identity.Update) (protobuf.Message, error) {
		resp := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
		hints, own := uniqueHints{}, map[spiffeid.TrustDomain]bool{}
		for i := range u.SVIDs {
			svid := &u.SVIDs[i]
			if err := checkSVID(svid); err != nil {
				return nil, fmt.Errorf("serving the X.509-SVID %s: %w", svid.ID, err)
			}
			bundle, err := authorities(u, svid.ID.TrustDomain())
			if err != nil {
				return nil, err
			}
			own[svid.ID.TrustDomain()] = true
			resp.Svids = append(resp.Svids, &workload.X509SVID{
				SpiffeId: svid.ID.String(), X509Svid: bytes.Join(svid.Chain, nil), X509SvidKey: svid.Key,
				Bundle: bundle, Hint: hints.take(svid.Hint),
			})
		}
		for td, b := range u.Bundles {
			if !own[td] {
				resp.FederatedBundles[td.IDString()] = bytes.Join(b.X509, nil)
			}
		}
		return resp, nil
	})
}

// x509Bundles is the answer to FetchX509Bundles (Workload API section 5.2.2).
func (v *views) x509Bundles(u *identity.Update) (*message, error) {
	return v.update(u).x509Bundles.get(u, func(u *identity.Update) (protobuf.Message, error) {
		resp := &workload.X509BundlesResponse{Bundles: map[string][]byte{}}
		for td, b := range u.Bundles {
			resp.Bundles[td.IDString()] = bytes.Join(b.X509, nil)
		}
		_, err := authorities(u, u.SVIDs[0].ID.TrustDomain())
		return resp, err
	})
}

// jwtBundles is the answer to FetchJWTBundles (Workload API section 6.2.2).
func (v *views) jwtBundles(u *identity.Update) (*message, error) {
	return v.update(u).jwtBundles.get(u, func(u *identity.Update) (protobuf.Message, error) {
		resp := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
		for td, b := range u.Bundles {
			view := v.bundle(b)
			if view.err != nil {
				return nil, view.err
			}
			resp.Bundles[td.IDString()] = view.jwks
		}
		_, err := authorities(u, u.SVIDs[0].ID.TrustDomain())
		return resp, err
	})
}

// authorities is the X.509 bundle of a trust domain that SVIDs are of: without it they are of no use.
func authorities(u *identity.Update, td spiffeid.TrustDomain) ([]byte, error) {
	b := u.Bundles[td]
	if b == nil || len(b.X509) == 0 {
		return nil, fmt.Errorf("%w: the bundle of trust domain %q has not arrived", identity.ErrUnavailable, td.Name())
	}
	return bytes.Join(b.X509, nil), nil
}

// checkSVID refuses to serve what a client would have to refuse (X509-SVID sections 2 and 5.2), so that a fault
// shows here and not in every workload.
func checkSVID(s *identity.X509SVID) error {
	if len(s.Chain) == 0 || len(s.Key) == 0 {
		return errors.New("it has no certificate or no key")
	}
	leaf, err := x509.ParseCertificate(s.Chain[0])
	switch {
	case err != nil:
		return fmt.Errorf("parsing its certificate: %w", err)
	case len(leaf.URIs) != 1:
		return fmt.Errorf("its certificate has %d URI SANs, not one", len(leaf.URIs))
	case leaf.URIs[0].String() != s.ID.String():
		return fmt.Errorf("its certificate is for %q", leaf.URIs[0])
	case leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("its certificate is an authority's")
	}
	return nil
}

// uniqueHints keeps hints unique within a response (Workload API section 5.2.1): the first of a kind stays.
type uniqueHints map[string]bool

func (h uniqueHints) take(hint string) string {
	if h[hint] {
		return ""
	}
	h[hint] = true
	return hint
}

// bundleView is what is made of one bundle.
type bundleView struct {
	jwks []byte // its JWT keys alone
	keys map[string]crypto.PublicKey
	err  error
}

func (v *views) bundle(b *identity.Bundle) *bundleView {
	return v.bundles.of(b, func(b *identity.Bundle) *bundleView {
		keys := jwtKeys(b)
		jwks, err := marshalJWKS(b, jwtJWKs(keys))
		return &bundleView{jwks, keys, err}
	})
}
