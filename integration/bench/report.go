package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// machine is where and when the figures were taken, and what the same machine needs for the cryptography alone.
type machine struct {
	cpu, kernel, goVersion, commit string
	cores                          int
	memory                         string
	date                           time.Time
	took                           time.Duration
	load                           string // before the run... see describe
	steal                          float64
	sign, verify, create           time.Duration
}

func describe(ctx context.Context, started time.Time) machine {
	m := machine{date: started.UTC(), took: time.Since(started).Round(time.Second), cores: runtime.NumCPU(), goVersion: runtime.Version()}
	m.cpu = field("/proc/cpuinfo", "model name")
	m.memory = field("/proc/meminfo", "MemTotal")
	if data, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.kernel = strings.TrimSpace(string(data))
	}
	if data, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.load = strings.Join(strings.Fields(string(data))[:3], " ")
	}
	if out, err := exec.CommandContext(ctx, "git", "describe", "--tags", "--always", "--dirty").Output(); err == nil {
		m.commit = strings.TrimSpace(string(out))
	}
	if steal, total := stolen(); total > 0 {
		m.steal = 100 * steal / total
	}
	m.sign, m.verify, m.create = primitives()
	return m
}

func field(file, name string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// primitives are a P-256 signature, its verification, and x509.CreateCertificate of a leaf, each the median of many.
func primitives() (sign, verify, create time.Duration) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, 0, 0
	}
	sum := sha256.Sum256([]byte("countersign"))
	sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		return 0, 0, 0
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	median := func(f func()) time.Duration {
		var samples []float64
		for range 400 {
			t := time.Now()
			f()
			samples = append(samples, float64(time.Since(t)))
		}
		return time.Duration(spreadOf(samples).p50)
	}
	return median(func() { _, _ = ecdsa.SignASN1(rand.Reader, key, sum[:]) }),
		median(func() { ecdsa.VerifyASN1(&key.PublicKey, sum[:], sig) }),
		median(func() { _, _ = x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key) })
}

// markdown is the table, the notes and what is short.
func (b *bench) markdown(w io.Writer, m machine) {
	fmt.Fprintln(w, "| what a user feels or pays | reference | limit | our bar | moonshot | measured | verdict |")
	fmt.Fprintln(w, "| --- | --- | --- | --- | --- | --- | --- |")
	var short, notes []string
	for _, r := range b.rows {
		res := b.results[r.key]
		if res == nil && !b.only.MatchString(r.key) {
			continue
		}
		v := res.verdict()
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s | %s |\n", r.what, r.reference, r.limit, r.bar, r.moonshot, res.measured(), v)
		if v != "meets" && v != "meets, moonshot too" {
			short = append(short, fmt.Sprintf("- %s (`%s`): %s: bar %s, measured %s", r.what, r.key, v, r.bar, res.measured()))
		}
		if res != nil {
			for _, n := range res.notes {
				notes = append(notes, fmt.Sprintf("- `%s`: %s", r.key, n))
			}
		}
	}
	if len(short) == 0 {
		fmt.Fprintln(w, "\nNothing is short of its bar.")
	} else {
		fmt.Fprintf(w, "\nShort of its bar:\n\n%s\n", strings.Join(short, "\n"))
	}
	if len(notes) > 0 {
		fmt.Fprintf(w, "\nIn detail:\n\n%s\n", strings.Join(notes, "\n"))
	}
	fmt.Fprintf(w, "\nOn the same machine, right after: one P-256 signature %.0f us, one verification %.0f us, x509.CreateCertificate %.0f us.\n", us(m.sign), us(m.verify), us(m.create))
}

func (b *bench) print(w io.Writer, m machine) {
	fmt.Fprintf(w, "\n%s\n\n", m)
	b.markdown(w, m)
}

func (m machine) String() string {
	return fmt.Sprintf("%s, %d cores, %s RAM, Linux %s, %s, %s, commit %s; run of %s, load average at its end %s, %.1f %% of CPU time stolen by the host since boot",
		m.cpu, m.cores, m.memory, m.kernel, m.goVersion, m.date.Format("2006-01-02 15:04 MST"), m.commit, m.took, m.load, m.steal)
}

const preamble = `# Benchmarks

Written by ` + "`make bench`" + ` (` + "`go run ./integration/bench`" + `); do not edit. Real processes: members and agents as a user builds them,
three members unless a row says otherwise, on loopback and one disk, with the load on the same cores. CPU is the measured
process's own (user and system time from /proc/PID/stat), not the load's; memory is its resident set (VmRSS).

The reference is the field's leading workload identity server on one shared 2-core machine; what counts is CPU per operation and the
ratio to what the cryptography alone takes on the same machine. A figure of CPU per operation is the median of several samples.

`

func (b *bench) write(path string, m machine) error {
	var out bytes.Buffer
	out.WriteString(preamble)
	fmt.Fprintf(&out, "%s.\n\n", m)
	b.markdown(&out, m)
	out.WriteString(methods)
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		return fmt.Errorf("writing the results: %w", err)
	}
	b.say("wrote %s", filepath.Base(path))
	return nil
}

const methods = `
## How each row is measured

- X.509-SVID and JWT-SVID: eight callers, each with its own mTLS connection as an agent, ask one member, the leader, which also
  does a leader's work meanwhile. Every request shows a pod's service account token (ES256). For X.509-SVIDs the member has not seen
  it before, or has forgotten it: it verifies the signature. For JWT-SVIDs it has: an agent asks for a pod's X.509-SVID first,
  by the same token, and a member remembers for some thousands of tokens that their signature was good.
- Entry created, deleted: from before the operator's call, at each member in turn, until the message has arrived on a stream that a
  workload holds open at a node agent. The workload has another identity all the time.
- New pod: 200 processes one after the other, each another pod: from before the connection to the agent's socket until the X.509-SVID
  is there. The process's own start is not counted.
- Agent start: package agent, in a process of its own, with 5,000 callers whose tokens lie in files, from before the node's
  attestation until the last caller has its SVID, its state kept on tmpfs. The memory for 5,000 is that process's 10 s later, every
  caller still waiting for updates (without the 5,000 connections that real callers would have); for 1 it is
  countersign-agent's with one open stream.
- Workload API, cached: one caller, one connection: a new FetchX509SVID stream up to its first message, or a FetchJWTSVID call, again and again.
- Fleet: 5,000 agents (package agent in one process), each with its own attestation, mTLS connection, Sync stream and two
  workloads, renewing 30 times as often as with the default lifetimes.
- Leader killed: SIGKILL, while writers at both other members try and try again; issuance goes on at both from before until
  after, and every call must succeed.
- Raft commits: 64 writers create entries by the admin socket of the leader, and of all three members. An acknowledged entry is on
  the disks of two members at least and readable at the member that took it.
- 200 pods: a Deployment of them on a real node (API server, controllers, kubelet, containerd, runc, three members and the agent by the chart,
  all on the same cores): from the program's first statement until it has its X.509-SVID from the socket in its CSI volume. First with the
  volume as it is by default, which holds the container back until the identity is there; then with volumes that do not wait.
- Flatness: the first and the fourth row again with 1,000, 10,000 and 100,000 entries of other workloads.
`
