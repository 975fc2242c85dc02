package main

import (
	"fmt"
	"strings"
)

// row is a line of the table: what a user feels or pays, and against what it is held.
type row struct {
	key, what, reference, limit, bar, moonshot string
}

// table is every row, in the order of the design's table. The reference is the field's leading workload identity server on a
// machine of this kind.
func table() []*row {
	return []*row{
		{"x509-batch", "member CPU per X.509-SVID, batch 50, 8 callers", "502 us", "one P-256 signature", "250 us", "120 us"},
		{"x509-single", "member CPU per X.509-SVID, single calls, 8 callers", "1056 us", "as above + one RPC", "400 us", "250 us"},
		{"jwt", "member CPU per JWT-SVID, 8 callers", "733 us", "one P-256 signature + one RPC", "250 us", "130 us"},
		{"entry-created", "entry created -> SVID on an open Workload API stream", "p50 3.2 s, max 9.4 s (polled)", "one commit + two hops", "p50 20 ms, p99 100 ms", "p50 5 ms"},
		{"entry-deleted", "entry deleted -> stream told", "p50 3.1 s", "one commit + two hops", "p50 20 ms, p99 100 ms", "p50 5 ms"},
		{"first-svid", "new pod: connect -> first SVID, nothing cached", "seconds to minutes where an entry must appear first", "token check + key + signature", "p50 10 ms, p99 50 ms", "p50 4 ms"},
		{"agent-start", "agent start, 5,000 identities -> all live", "9.8 s", "5,000 keys and signatures", "2.5 s", "1 s"},
		{"cached-x509", "Workload API, cached X.509, open connection, 1 caller", "p50 0.89 ms, agent CPU 850 us", "one RPC", "p50 0.4 ms, 250 us", "100 us"},
		{"cached-jwt", "Workload API, cached JWT, open connection", "p50 0.59 ms, agent CPU 570 us", "one RPC", "200 us", "100 us"},
		{"agent-memory", "agent memory: 1 identity / 5,000 identities", "64 MiB / 107 MiB", "-", "30 / 60 MiB", "20 / 40 MiB"},
		{"member-memory", "member memory, idle", "144 MiB", "-", "60 MiB", "40 MiB"},
		{"fleet", "10,000 workloads on 5,000 agents", "published sizing: 8 servers x 16 cores, 16 GB", "-", "3 members on one 2-core machine, with headroom", "100,000 workloads on the same"},
		{"failover-write", "leader killed -> first committed write", "needs an external database's failover", "-", "2.5 s", "0.5 s"},
		{"failover-issue", "leader killed -> issuance interrupted on other members", "-", "0", "0 failed issuances", "0"},
		{"taint", "authority compromised: 5,000 SVIDs replaced on one agent, by three members", "-", "5,000 keys and signatures", "60 s", "10 s"},
		{"commits", "Raft commits, 64 writers, 3 members, one disk", "-", "grouped fsyncs", "3,000/s", "6,000/s"},
		{kubePodsKey, "200 pods at once on a real node: program's start -> first SVID from its volume", "-", "one signature, 200 in turn", "p99 250 ms beyond the same pods without the product", "p99 50 ms"},
		{"flat", "cost with 1k / 10k / 100k entries", "-", "the same", "within 20 %", "within 5 %"},
	}
}

// result is what was measured for a row.
type result struct {
	text   []string // figures, as the table shows them
	checks []check
	notes  []string
	err    error
}

// check compares one figure with its bar and moonshot; zero: there is none. More is better where the bar is a floor.
type check struct {
	got, bar, moonshot float64
	floor              bool
}

func (c check) meets(limit float64) bool {
	if c.floor {
		return c.got >= limit
	}
	return c.got <= limit
}

func (b *bench) result(key string) *result {
	r := b.results[key]
	if r == nil {
		r = &result{}
		b.results[key] = r
	}
	return r
}

// verdict is short: a row meets its bar when every figure of it does.
func (r *result) verdict() string {
	switch {
	case r == nil:
		return "not measured: not asked for"
	case r.err != nil:
		return "not measured: " + firstLine(r.err.Error())
	case len(r.checks) == 0:
		return "not measured"
	}
	moon := true
	for _, c := range r.checks {
		if c.bar != 0 && !c.meets(c.bar) {
			return "SHORT"
		}
		moon = moon && (c.moonshot == 0 || c.meets(c.moonshot))
	}
	if moon {
		return "meets, moonshot too"
	}
	return "meets"
}

func (r *result) measured() string {
	if r == nil || len(r.text) == 0 {
		return "-"
	}
	return strings.Join(r.text, "; ")
}

// add records one figure.
func (r *result) add(c check, format string, args ...any) {
	r.checks = append(r.checks, c)
	r.text = append(r.text, fmt.Sprintf(format, args...))
}

func (r *result) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// sample prints a line that benchstat reads: a name, how often it was done, and pairs of a value and its unit.
func (b *bench) sample(name string, n int, pairs ...any) {
	fmt.Fprintf(b.stdout, "Benchmark%s \t%8d", name, n)
	for i := 0; i+1 < len(pairs); i += 2 {
		fmt.Fprintf(b.stdout, "\t%12.4g %s", pairs[i], pairs[i+1])
	}
	fmt.Fprintln(b.stdout)
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}
