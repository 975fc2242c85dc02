package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
)

// Net gives each member a network namespace of its own, all on one bridge with this machine. It needs root and iproute2. Its
// methods can be called concurrently.
type Net struct {
	bridge, subnet string

	mu    sync.Mutex // guards what follows
	nodes map[string]int
}

// nowhere is a MAC address that nobody has: what is sent there is lost without a word, as on a broken wire.
const nowhere = "02:00:00:00:00:01"

// NewNet makes the bridge, under a name that this process's other nets do not have; Close removes it and the namespaces.
func NewNet(number int) (*Net, error) {
	n := &Net{bridge: fmt.Sprintf("cs%x-%d", os.Getpid(), number), nodes: map[string]int{}}
	n.subnet = fmt.Sprintf("10.%d.%d", 128+os.Getpid()%64*2+number/256, number%256)
	for _, args := range [][]string{
		{"link", "add", n.bridge, "type", "bridge"},
		{"addr", "add", n.subnet + ".254/24", "dev", n.bridge},
		{"link", "set", n.bridge, "up"},
	} {
		if err := ip(args...); err != nil {
			n.Close()
			return nil, err
		}
	}
	return n, nil
}

func ip(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Add makes the namespace of one member.
func (n *Net) Add(name string) error {
	n.mu.Lock()
	number := len(n.nodes) + 1
	n.nodes[name] = number
	n.mu.Unlock()
	port := fmt.Sprintf("%s-%d", n.bridge, number)
	for _, args := range [][]string{
		{"netns", "add", n.space(name)},
		{"link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", n.space(name)},
		{"link", "set", port, "master", n.bridge, "up"},
		{"-n", n.space(name), "addr", "add", n.IP(name) + "/24", "dev", "eth0"},
		{"-n", n.space(name), "link", "set", "eth0", "up"},
		{"-n", n.space(name), "link", "set", "lo", "up"},
	} {
		if err := ip(args...); err != nil {
			return err
		}
	}
	return nil
}

// IP is a member's address; that of "" is this machine's.
func (n *Net) IP(name string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if number, ok := n.nodes[name]; ok {
		return fmt.Sprintf("%s.%d", n.subnet, number)
	}
	return n.subnet + ".254"
}

func (n *Net) space(name string) string { return n.bridge + "-" + name }

// Wrap is what a command line begins with to run in a member's namespace.
func (n *Net) Wrap(name string) []string { return []string{"ip", "netns", "exec", n.space(name)} }

// Cut loses what one sends to the other, in that direction only; "" is this machine. Neither is told.
func (n *Net) Cut(from, to string) error {
	return n.at(from, "neigh", "replace", n.IP(to), "lladdr", nowhere, "nud", "permanent")
}

// Mend ends Cut.
func (n *Net) Mend(from, to string) error { return n.at(from, "neigh", "del", n.IP(to)) }

func (n *Net) at(name string, args ...string) error {
	if name == "" {
		return ip(append(args, "dev", n.bridge)...)
	}
	return ip(append(append([]string{"-n", n.space(name)}, args...), "dev", "eth0")...)
}

// Close removes everything.
func (n *Net) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name := range n.nodes {
		_ = ip("netns", "del", n.space(name)) // with its end of the wire
	}
	_ = ip("link", "del", n.bridge)
}
