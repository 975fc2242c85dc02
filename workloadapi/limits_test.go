package workloadapi

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/attestor"
)

// podOf attests a caller named POD-CONTAINER.
func podOf(_ context.Context, name string) (*attestor.Workload, error) {
	pod, _, _ := strings.Cut(name, "-")
	return &attestor.Workload{Key: name, PodUID: pod}, nil
}

func TestIdentifyPeer(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	l := must(net.Listen("unix", path))
	defer l.Close()
	var got []caller
	for range 2 {
		c := must(net.Dial("unix", path))
		defer c.Close()
		s := must(l.Accept())
		defer s.Close()
		got = append(got, must(identifyPeer(s.(*net.UnixConn))))
	}
	if got[0] != got[1] || got[0].uid != uint32(os.Getuid()) || got[0].key == "" {
		t.Errorf("one process is two callers: %+v", got)
	}
}

// What hanging up leaves behind does not grow, and is not forgotten so soon that hanging up would pay.
func TestSharesAreForgotten(t *testing.T) {
	a := newAdmission(DefaultLimits(), slog.New(slog.DiscardHandler))
	for i := range 10000 {
		c := new(conn)
		if err := a.open(c, caller{fmt.Sprint("caller ", i), uint32(i)}); err != nil {
			t.Fatal(err)
		}
		a.close(c)
		for _, s := range a.shares { // as if a second had passed
			s.idleAt = s.idleAt.Add(-2 * time.Second)
			break
		}
		if i%500 == 0 {
			for _, s := range a.shares {
				s.idleAt = s.idleAt.Add(-2 * time.Second)
			}
		}
	}
	if n := len(a.shares); n > 4096 {
		t.Errorf("%d shares are kept of callers that are gone", n)
	}
	c := new(conn)
	if err := a.open(c, caller{"quick", 1}); err != nil {
		t.Fatal(err)
	}
	a.close(c)
	a.forget()
	if a.shares["quick"] == nil {
		t.Error("hanging up makes a caller's measure of work new")
	}
	c = new(conn)
	if err := a.open(c, caller{"refused", 1}); err != nil {
		t.Fatal(err)
	}
	for range 100 * 80 { // 100 seconds' worth
		a.pay(c, workOfRefusal)
	}
	a.close(c)
	a.shares["refused"].idleAt = time.Now().Add(-2 * time.Second)
	a.forget()
	if a.shares["refused"] == nil {
		t.Error("what refusals cost is forgotten before it is paid")
	}
}
