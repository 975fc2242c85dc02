package raft

import (
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// TestFramesOfProtocol1 pins the bytes that members of the first release send and understand.
func TestFramesOfProtocol1(t *testing.T) {
	t.Parallel()
	for want, f := range map[string]frame{
		"0101000000000000000700000003636d64":             {kindPropose, 7, []byte("cmd")},
		"0102000000000000000700000006696400613a31":       {kindAdd, 7, []byte("id\x00a:1")},
		"01030000000000000007000000026964":               {kindRemove, 7, []byte("id")},
		"0104000000000000000700000000":                   {kindBarrier, 7, nil},
		"0105000000000000000700000000":                   {kindStatus, 7, nil},
		"0106000000000000000000000000":                   {kindPing, 0, nil},
		"0181000000000000000700000009000000000000000578": {kindOK, 7, answer{5, []byte("x")}.payload()},
		"0182000000000000000700000003776879":             {kindNotExecuted, 7, []byte("why")},
		"0183000000000000000700000003776879":             {kindUnknown, 7, []byte("why")},
		"0184000000000000000700000003776879":             {kindRefused, 7, []byte("why")},
		"0185000000000000000700000000":                   {kindPong, 7, nil},
		"0186000000000000000000000000":                   {kindGoodbye, 0, nil},
	} {
		if b, err := appendFrame(nil, f); err != nil || hex.EncodeToString(b) != want {
			t.Errorf("kind %#x: %x, %v; want %s", f.kind, b, err, want)
		}
	}
	for k := range frameKind(0xff) {
		want := uint32(1)
		if k > kindPing && k < kindOK && k.known() {
			want = 2
		}
		if k.since() != want {
			t.Errorf("kind %#x is since protocol %d", k, k.since())
		}
	}
}

// TestSkew: members of both protocols in one cluster, each as leader. What the older one does not know is never
// sent to it, does without, or is refused; and nobody's requests are lost by it.
func TestSkew(t *testing.T) {
	t.Parallel()
	for _, olds := range [][]string{{"m1"}, {"m3"}, {"m1", "m2"}, {"m2", "m3"}} {
		t.Run(strings.Join(olds, ","), func(t *testing.T) {
			t.Parallel()
			old := map[string]bool{}
			for _, o := range olds {
				old[o] = true
			}
			logged := &syncBuffer{}
			c := newCluster(t, 3, func(c *Config) {
				if old[c.ID] {
					c.protocol = 1
				}
				c.Info = func() []byte { return []byte("here") }
				c.Log = slog.New(slog.NewTextHandler(logged, nil))
			})
			for round, leader := range c.members {
				for !leader.IsLeader() {
					l := c.leader()
					l.raft.LeadershipTransferToServer(leader.self, leader.transport.LocalAddr()).Error()
					c.leader()
				}
				for _, m := range c.members {
					cmd := fmt.Sprint(round, m.name)
					c.propose(m, cmd)
					if old[m.name] {
						continue // it does not know what follows
					}
					if err := m.ReadBarrier(within(t)); err != nil {
						t.Fatalf("%s led by %s: barrier: %v", m.name, leader.name, err)
					}
					all, err := m.Health(within(t))
					if err != nil {
						t.Fatal(err)
					}
					for _, h := range all {
						if !h.Reachable || old[h.ID] != (h.Info == nil) {
							t.Errorf("%s led by %s: %+v", m.name, leader.name, h)
						}
					}
				}
			}
			for _, m := range c.members {
				if m.IsLeader() && old[m.name] {
					for _, o := range c.others(m) {
						if old[o.name] {
							continue
						}
						if err := o.TransferLeader(within(t), o.name); !errors.Is(err, ErrRefused) {
							t.Errorf("handing over by an older leader: %v", err)
						}
					}
				}
			}
			if strings.Contains(logged.String(), "makes no sense") {
				t.Error("somebody did not understand another")
			}
		})
	}
}
