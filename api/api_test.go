package api

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

func TestErrorsGoThereAndBack(t *testing.T) {
	for _, row := range table() {
		err := fmt.Errorf("%w: token of pod x: do this", row.err)
		there := ToStatus(err)
		if status.Code(there) != row.code {
			t.Errorf("%v became %v, want %v", row.err, status.Code(there), row.code)
		}
		back := FromStatus(there)
		if !errors.Is(back, row.err) || back.Error() != err.Error() {
			t.Errorf("%v came back as %v", err, back)
		}
		if !errors.Is(FromCode(row.code, ""), row.err) {
			t.Errorf("%v without a message is not the sentinel", row.code)
		}
	}
	if ToStatus(nil) != nil || FromStatus(nil) != nil || FromCode(codes.OK, "x") != nil {
		t.Error("nil is not nil")
	}
	plain := errors.New("a plain error")
	if FromStatus(plain) != plain {
		t.Error("an error that is no status was changed")
	}
}

func TestInternalErrorsStayHere(t *testing.T) {
	err := ToStatus(errors.New("opening /var/lib/secret: boom"))
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "boom") {
		t.Errorf("got %v", err)
	}
	if Code(status.Error(codes.Unimplemented, "x")) != codes.Unimplemented {
		t.Error("a status lost its code")
	}
	if Code(context.Canceled) != codes.Canceled {
		t.Error("a cancelled context has another code")
	}
}

func TestBundleGoesThereAndBack(t *testing.T) {
	b := &identity.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Sequence: 7, RefreshHint: 5 * time.Minute, X509: [][]byte{{1}, {2}}, JWT: map[string][]byte{"k": {3}}}
	got, err := BundleFromWire(BundleToWire(b))
	if err != nil || !reflect.DeepEqual(got, b) {
		t.Errorf("%+v, %v", got, err)
	}
	for name, w := range map[string]*workloadv1.Bundle{"none": nil, "no trust domain": {}, "bad trust domain": {TrustDomain: "A/b"}} {
		if _, err := BundleFromWire(w); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestEntryGoesThereAndBack(t *testing.T) {
	e := &identity.Entry{
		ID: "1", Selectors: []identity.Selector{"k8s:ns:a"}, SPIFFEID: "spiffe://example.org/x", X509TTL: time.Hour, JWTTTL: time.Minute,
		DNSNames: []string{"a.b"}, Hint: "h", FederatesWith: []string{"o.org"}, Admin: true, ExpiresAt: time.Unix(5, 0).UTC(), Revision: 9,
	}
	e.AdminRole = identity.AdminReader
	for _, e.Downstream = range []bool{false, true} {
		got, err := EntryFromWire(EntryToWire(e))
		if err != nil || !reflect.DeepEqual(got, e) {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if _, err := EntryFromWire(&adminv1.Entry{Selectors: []string{"nonsense"}}); !errors.Is(err, identity.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

func TestKubeClusterGoesThereAndBack(t *testing.T) {
	k := &identity.KubeCluster{Name: "a", Issuer: "i", Audience: "u", JWKS: []byte("x"), Kubeconfig: "/k", TokenReview: true, AgentAccounts: []string{"a/b"}, DefaultID: "/x", Revision: 3, JWKSURL: "u", CAPEM: []byte("p")}
	got := KubeClusterFromWire(KubeClusterToWire(k))
	got.Revision = k.Revision // the state gives it, nobody sends it
	if !reflect.DeepEqual(got, k) {
		t.Errorf("%+v", got)
	}
	if got := KubeClusterFromWire(&adminv1.KubeCluster{}); got.DefaultID != identity.DefaultKubeID {
		t.Errorf("the usual default ID is %q", got.DefaultID)
	}
	if got := KubeClusterFromWire(&adminv1.KubeCluster{NoDefaultId: true}); got.DefaultID != "" {
		t.Errorf("a default ID that was switched off is %q", got.DefaultID)
	}
}

func TestX509SVIDFromWire(t *testing.T) {
	got, err := X509SVIDFromWire(&workloadv1.X509SVID{EntryId: "e", SpiffeId: "spiffe://example.org/x", Leaf: []byte{1}, FederatesWith: []string{"o.org"}}, [][]byte{{2}})
	if err != nil || len(got.Chain) != 2 || got.FederatesWith[0].Name() != "o.org" {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []*workloadv1.X509SVID{{SpiffeId: "x"}, {SpiffeId: "spiffe://example.org/x", FederatesWith: []string{"/"}}} {
		if _, err := X509SVIDFromWire(bad, nil); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("got %v", err)
		}
	}
}
