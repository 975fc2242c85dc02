// Package cluster starts real Countersign processes on loopback for the demo, the process tests and the benchmarks:
// members, agents and workloads, each with its own log, and none left behind.
package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cluster is a trust domain's processes under one folder. Its methods are for one goroutine, but for Process's own.
type Cluster struct {
	Dir         string // holds everything; short, because sockets live in it
	Bin         string // folder of the binaries
	TrustDomain string
	// ServerYAML and AgentYAML are appended to every member's and agent's configuration.
	ServerYAML, AgentYAML string
	// Net, if set, has each member in a network namespace of its own; nil is loopback for all.
	Net *Net
	// Prepare, if set, is called with a new member before it starts, and may change what it is; PrepareAgent with a new agent.
	Prepare      func(*Member) error
	PrepareAgent func(*Agent) error

	Members []*Member
	Agents  []*Agent
	mu      sync.Mutex // guards procs: Close may come from a signal
	procs   []*Process
}

// Member is one server of the cluster.
type Member struct {
	Name, Dir, Address, Health, Socket string
	Bin                                string   // program to run instead of the cluster's own
	Env                                []string // more of its environment
	*Process
}

// Agent is one node agent.
type Agent struct {
	Name, Dir, Socket, Health string
	Space                     string // of Net, that it runs in; empty: this machine
	args                      []string
	*Process
}

// Endpoint is the agent's Workload API as SPIFFE_ENDPOINT_SOCKET names it.
func (a *Agent) Endpoint() string { return "unix://" + a.Socket }

// Build compiles both binaries and the test workload into dir.
func Build(ctx context.Context, root, dir string, race bool) error {
	args := []string{"build", "-o", dir + "/"}
	if race {
		args = append(args, "-race")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/countersign", "./cmd/countersign-agent", "./integration/workload")...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building: %w\n%s", err, out)
	}
	return nil
}

// FreeAddress picks a loopback address that nobody listens on right now, and that no other call of it, in any process, picks
// while this process lives: a UDP socket of the same number, which nothing else here uses, is held to the process's end. The
// port is below those that the kernel gives to connections (from 32768 on): one of those may be taken again before its
// listener is up, or while that restarts.
func FreeAddress() (string, error) {
	var last error
	for range 100 {
		port := 10000 + rand.IntN(22000)
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
		if err != nil {
			last = err
			continue
		}
		l.Close()
		if last = hold(port); last == nil {
			return l.Addr().String(), nil
		}
	}
	return "", fmt.Errorf("finding a free port: %w", last)
}

// hold binds a UDP socket that is never closed, nor garbage.
func hold(port int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("holding port %d: %w", port, err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		unix.Close(fd)
		return fmt.Errorf("holding port %d: %w", port, err)
	}
	return nil
}

// StartMember starts the next member: the first bootstraps, the others join by a token of the first live one.
func (c *Cluster) StartMember(ctx context.Context) (*Member, error) {
	name := fmt.Sprintf("ca-%d", len(c.Members)+1)
	m := &Member{Name: name, Dir: filepath.Join(c.Dir, name)}
	m.Socket = filepath.Join(m.Dir, "admin.sock")
	if err := c.place(m); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(m.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the member's folder: %w", err)
	}
	if c.Prepare != nil {
		if err := c.Prepare(m); err != nil {
			return nil, err
		}
	}
	yaml := fmt.Sprintf("version: 1\ntrust_domain: %s\nname: %s\ndata_dir: %s\nlisten: %s\nadmin_socket: %s\nhealth: %s\n%s",
		c.TrustDomain, name, filepath.Join(m.Dir, "data"), m.Address, m.Socket, m.Health, c.ServerYAML)
	if len(c.Members) > 0 {
		token, err := c.Admin(ctx, "token", "create", "--server")
		if err != nil {
			return nil, err
		}
		file := filepath.Join(m.Dir, "join")
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			return nil, fmt.Errorf("writing the join token: %w", err)
		}
		yaml += "join_token_file: " + file + "\n"
	}
	if err := os.WriteFile(filepath.Join(m.Dir, "server.yaml"), []byte(yaml), 0o600); err != nil {
		return nil, fmt.Errorf("writing the configuration: %w", err)
	}
	c.Members = append(c.Members, m)
	return m, c.RestartMember(ctx, m)
}

// place gives the member its addresses.
func (c *Cluster) place(m *Member) (err error) {
	if c.Net != nil {
		if err := c.Net.Add(m.Name); err != nil {
			return err
		}
		m.Address, m.Health = c.Net.IP(m.Name)+":8443", c.Net.IP(m.Name)+":8080"
		return nil
	}
	if m.Address, err = FreeAddress(); err != nil {
		return err
	}
	m.Health, err = FreeAddress()
	return err
}

// AllVote waits until every member has its vote: before that, what kills some tests a smaller cluster.
func (c *Cluster) AllVote(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		votes := 0
		out, err := c.Admin(ctx, "status", "-o", "json")
		var s Status
		if err == nil && json.Unmarshal([]byte(out), &s) == nil {
			for _, m := range s.Members {
				if m.Voter {
					votes++
				}
			}
		}
		if votes >= len(c.Members) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the members' votes: %d of %d have one: %w", votes, len(c.Members), errors.Join(err, ctx.Err()))
		case <-tick.C:
		}
	}
}

// RestartMember starts the member's process again, on its own data, and waits until it is ready.
func (c *Cluster) RestartMember(ctx context.Context, m *Member) error {
	if err := c.LaunchMember(m); err != nil {
		return err
	}
	return waitReady(ctx, m.Process, m.Health)
}

// LaunchMember starts the member's process again, and waits for nothing.
func (c *Cluster) LaunchMember(m *Member) error {
	argv := []string{filepath.Join(c.Bin, "countersign"), "server", "run", "-c", filepath.Join(m.Dir, "server.yaml")}
	if m.Bin != "" {
		argv[0] = m.Bin
	}
	if c.Net != nil {
		argv = append(c.Net.Wrap(m.Name), argv...)
	}
	p, err := c.start(m.Name, filepath.Join(m.Dir, "log"), m.Env, argv...)
	if err != nil {
		return err
	}
	m.Process = p
	return nil
}

// WaitReady waits until a member that was launched can issue.
func (c *Cluster) WaitReady(ctx context.Context, m *Member) error {
	return waitReady(ctx, m.Process, m.Health)
}

// Admin runs an operator's command against the first live member and returns its output.
func (c *Cluster) Admin(ctx context.Context, args ...string) (string, error) {
	var last error = errors.New("no member is running")
	for _, m := range c.Members {
		if m.Process == nil || m.Exited() {
			continue
		}
		out, err := m.Admin(ctx, c.Bin, args...)
		if err == nil {
			return out, nil
		}
		last = err
	}
	return "", last
}

// Admin runs an operator's command against this member.
func (m *Member) Admin(ctx context.Context, bin string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "countersign"), append(args, "--socket", m.Socket)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("countersign %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// Status is a member's view of the cluster.
type Status struct {
	MemberID string `json:"member_id"`
	LeaderID string `json:"leader_id"`
	Issuing  bool   `json:"issuing"`
	Members  []struct {
		ID, Address   string
		Voter, Leader bool
	} `json:"members"`
}

// Leader is the live member that another live one holds for the leader; nil while there is none.
func (c *Cluster) Leader(ctx context.Context) *Member {
	for _, m := range c.Members {
		if m.Process == nil || m.Exited() {
			continue
		}
		out, err := m.Admin(ctx, c.Bin, "status", "-o", "json")
		if err != nil {
			continue
		}
		var s Status
		if json.Unmarshal([]byte(out), &s) != nil {
			continue
		}
		for _, l := range c.Members {
			if l.Name == s.LeaderID && l.Process != nil && !l.Exited() {
				return l
			}
		}
	}
	return nil
}

// StartAgent starts an agent that attests by a join token for kubeNode ("cluster/node", or empty), with extra flags.
func (c *Cluster) StartAgent(ctx context.Context, kubeNode string, flags ...string) (*Agent, error) {
	name := fmt.Sprintf("agent-%d", len(c.Agents)+1)
	a := &Agent{Name: name, Dir: filepath.Join(c.Dir, name)}
	a.Socket = filepath.Join(a.Dir, "agent.sock")
	var err error
	if a.Health, err = FreeAddress(); err != nil {
		return nil, err
	}
	if c.PrepareAgent != nil {
		if err := c.PrepareAgent(a); err != nil {
			return nil, err
		}
	}
	args := []string{"token", "create", "--agent"}
	if kubeNode != "" {
		args = append(args, "--kube-node", kubeNode)
	}
	token, err := c.Admin(ctx, args...)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(a.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the agent's folder: %w", err)
	}
	if err := os.WriteFile(filepath.Join(a.Dir, "join"), []byte(token), 0o600); err != nil {
		return nil, fmt.Errorf("writing the join token: %w", err)
	}
	yaml := fmt.Sprintf("version: 1\ntrust_domain: %s\nsocket: %s\nstate_dir: %s\nhealth: %s\nattest:\n  join_token_file: %s\n%s",
		c.TrustDomain, a.Socket, StateDir(c.Dir, name), a.Health, filepath.Join(a.Dir, "join"), c.AgentYAML)
	if err := os.WriteFile(filepath.Join(a.Dir, "agent.yaml"), []byte(yaml), 0o600); err != nil {
		return nil, fmt.Errorf("writing the configuration: %w", err)
	}
	a.args = append([]string{"run", "-c", filepath.Join(a.Dir, "agent.yaml")}, flags...)
	c.Agents = append(c.Agents, a)
	return a, c.RestartAgent(ctx, a)
}

// StateDir is a place on tmpfs for an agent's live SVIDs, or "none" where the machine has none.
func StateDir(dir, name string) string {
	shm := "/dev/shm"
	if info, err := os.Stat(shm); err != nil || !info.IsDir() {
		return "none"
	}
	return filepath.Join(shm, "countersign"+strings.ReplaceAll(dir, "/", "-")+"-"+name) // the whole path: two clusters may have folders of one name
}

// RestartAgent starts the agent's process again and waits until it is ready.
func (c *Cluster) RestartAgent(ctx context.Context, a *Agent) error {
	argv := append([]string{filepath.Join(c.Bin, "countersign-agent")}, a.args...)
	if a.Space != "" {
		argv = append(c.Net.Wrap(a.Space), argv...)
	}
	p, err := c.start(a.Name, filepath.Join(a.Dir, "log"), nil, argv...)
	if err != nil {
		return err
	}
	a.Process = p
	return waitReady(ctx, p, a.Health)
}

// Start runs any other program of the cluster's, such as a workload, with its output to out.
func (c *Cluster) Start(name string, env []string, out io.Writer, argv ...string) (*Process, error) {
	return c.launch(name, env, out, nil, argv...)
}

func (c *Cluster) start(name, log string, env []string, argv ...string) (*Process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", name, err)
	}
	return c.launch(name, env, f, f, argv...)
}

func (c *Cluster) launch(name string, env []string, out io.Writer, close io.Closer, argv ...string) (*Process, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = out, out
	// The kernel ends the child with us, however we end; and a terminal's interrupt goes to us alone, who ends it in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	p := &Process{Name: name, cmd: cmd, done: make(chan struct{})}
	if err := p.run(close); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.procs = append(c.procs, p)
	c.mu.Unlock()
	return p, nil
}

// Close ends every process and removes the agents' state; Dir is the caller's.
func (c *Cluster) Close() {
	c.mu.Lock()
	procs := c.procs
	c.procs = nil
	c.mu.Unlock()
	for i := len(procs) - 1; i >= 0; i-- {
		procs[i].Signal(syscall.SIGTERM)
	}
	for _, p := range procs {
		select {
		case <-p.done:
		case <-time.After(10 * time.Second):
			p.Kill()
		}
	}
	for _, a := range c.Agents {
		if dir := StateDir(c.Dir, a.Name); dir != "none" {
			os.RemoveAll(dir)
		}
	}
}

func waitReady(ctx context.Context, p *Process, health string) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := "no answer"
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+health+"/ready", nil)
		if err != nil {
			return fmt.Errorf("asking %s: %w", p.Name, err)
		}
		if res, err := http.DefaultClient.Do(req); err == nil {
			body, _ := io.ReadAll(io.LimitReader(res.Body, 4096))
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
			last = string(bytes.TrimSpace(body))
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended before it was ready (%v): see its log", p.Name, p.cmd.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w: %s", p.Name, ctx.Err(), last)
		case <-tick.C:
		}
	}
}
