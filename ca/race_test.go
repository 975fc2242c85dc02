package ca

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"countersign.io/countersign/identity"
)

// Authorities swap while certificates and tokens are issued: each is whole, under one authority or the other.
func TestSwapWhileIssuing(t *testing.T) {
	r := newRig(t)
	x2, j2 := r.newX509(t, time.Hour), r.newJWT(t, RS256, time.Hour)
	both := r.bundle(t, r.x, x2)
	retiring := func(a identity.Authority) identity.Authority {
		a.State = identity.AuthorityRetiring
		return a
	}
	pub := newP256(t).Public()
	var stop atomic.Bool
	var issued atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for !stop.Load() {
				svid, err := r.issue(identity.Issuance{ID: workload(), PublicKey: pub})
				if err != nil {
					t.Error(err)
					return
				}
				if _, _, err := x509svid.Verify(chain(t, svid.Chain), both, x509svid.WithTime(r.clock.now())); err != nil {
					t.Error(err)
					return
				}
				p, err := r.PrepareJWT(workload(), []string{"db"}, 0)
				if err == nil {
					_, err = p.Issue()
				}
				if err != nil {
					t.Error(err)
					return
				}
				if m, err := r.MemberCertificate(); err != nil || len(m.Certificate) != 3 {
					t.Error(err)
					return
				}
				if err := errors.Join(r.Ready()); err != nil || len(r.IssuerChain()) != 2 {
					t.Error(err)
					return
				}
				issued.Add(1)
			}
		})
	}
	for i := range 40 {
		var err error
		if i%2 == 0 {
			err = r.set(retiring(r.x), x2, retiring(r.j), j2)
		} else {
			err = r.set(r.x, retiring(x2), r.j, retiring(j2))
		}
		if err != nil {
			t.Error(err)
		}
	}
	for issued.Load() < 20 && !t.Failed() {
		if err := r.set(r.x, r.j); err != nil {
			t.Error(err)
		}
	}
	stop.Store(true)
	wg.Wait()
}
