//go:build integration

package integration

import (
	"os"
	"strings"
	"testing"

	"countersign.io/countersign/integration/cluster"
)

// TestRotationPartitioned: an agent is cut off from every member, and the leader dies, in the middle of a rotation. The agent
// serves on, with the bundle of before; so nothing may sign that it does not trust, and no handshake of its workloads fails.
func TestRotationPartitioned(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	network, err := cluster.NewNet(int(nets.Add(1)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(network.Close)
	const away = "agent-2"
	w := newWorldOf(t, bin, 3, "x509_ttl: 2m\nmax_staleness: 5m\n", func(c *cluster.Cluster) {
		c.Net = network
		c.PrepareAgent = func(a *cluster.Agent) error {
			if a.Name != away {
				return nil
			}
			a.Space = a.Name
			err := network.Add(a.Space)
			a.Health = network.IP(a.Space) + ":8081"
			return err
		}
	})
	r := newRotationIn(t, w)
	wires := func(do func(from, to string) error) {
		t.Helper()
		for _, m := range r.Members {
			for _, pair := range [][2]string{{away, m.Name}, {m.Name, away}} {
				if err := do(pair[0], pair[1]); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	wires(network.Cut)
	r.admin("bundle", "rotate", "--taint")
	s := r.reaches("x509", "the rotation waits for the agent that is cut off", func(s rotationStatus) bool {
		return s.Phase == "activate" && len(s.Gate.Waiting) == 1 && strings.Contains(s.Gate.Waiting[0].Name, "/countersign/agent/")
	})
	leader := r.Leader(r.ctx)
	if leader == nil {
		t.Fatal("no leader")
	}
	leader.Kill()
	r.reaches("x509", "it goes on waiting under another leader", func(n rotationStatus) bool {
		return n.Phase == "activate" && n.NewAuthority == s.NewAuthority && len(n.Gate.Waiting) >= 2
	})
	r.shaken()
	wires(network.Mend)
	if err := r.RestartMember(r.ctx, leader); err != nil {
		t.Fatal(err)
	}
	r.reaches("x509", "the rotation ends", phase("done"))
	r.shaken()
	if s := r.state(); len(s.Bundle.X509Authorities) != 1 || s.in("x509", "active")[0] != r.must("x509").NewAuthority {
		t.Errorf("%+v", s)
	}
}

func (r *rotation) must(kind string) rotationStatus {
	r.t.Helper()
	s, err := r.rotationStatus(kind)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}
