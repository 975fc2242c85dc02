package workloadapi

import (
	"runtime"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"
)

// What is made of an update is made once, and kept as long as the update, no longer.
func TestViewsLiveAsLongAsTheirUpdate(t *testing.T) {
	d := newDomain("example.org")
	var v views
	u := d.update(d.svid("/web", ""))
	one, two := must(v.x509(u)), must(v.x509(u))
	if one != two {
		t.Error("an update was encoded twice")
	}
	other := *u // another value that says the same
	if m := must(v.x509(&other)); m == one || m.digest != one.digest {
		t.Error("an update that says the same has another digest")
	}
	if a, b := must(v.jwtBundles(u)), must(v.jwtBundles(&other)); a == b || a.digest != b.digest {
		t.Error("bundles that say the same have another digest")
	}
	count := func() (n int) {
		for _, m := range []interface{ Range(func(any, any) bool) }{&v.updates.m, &v.bundles.m} {
			m.Range(func(any, any) bool { n++; return true })
		}
		return n
	}
	if n := count(); n != 3 { // two updates, and the one bundle that they share
		t.Errorf("%d views", n)
	}
	runtime.KeepAlive(u)
	runtime.KeepAlive(&other)
	u, other = nil, *d.update()
	eventually(t, "the views are forgotten", func() bool { runtime.GC(); return count() <= 1 })
	runtime.KeepAlive(&other)
}

func TestCodecIsProtobuf(t *testing.T) {
	d := newDomain("example.org")
	var v views
	m := must(v.x509(d.update(d.svid("/web", "hint"))))
	c := newCodec()
	var resp workload.X509SVIDResponse
	if err := c.Unmarshal(must(c.Marshal(m)), &resp); err != nil || ids(&resp) != "spiffe://example.org/web" {
		t.Errorf("%v, %v", ids(&resp), err)
	}
	again := must(c.Marshal(&resp))
	var same workload.X509SVIDResponse
	if err := c.Unmarshal(again, &same); err != nil || !proto.Equal(&resp, &same) {
		t.Errorf("what is not encoded yet: %v", err)
	}
}
