package main

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"countersign.io/countersign/config"
)

// metrics checks what both halves tell after all of the above: numbers, in good form, and no name of anybody.
func (s *session) metrics() {
	s.t.Helper()
	host, err := os.Hostname()
	if err != nil {
		s.t.Fatal(err)
	}
	forbidden := []string{"dev.test", "spiffe", "kube.test", "unix:", "127.0.0.1", "cs1.", "not-mine", "truth", s.home, s.listen, s.health, s.agentHealth}
	if len(host) > 3 {
		forbidden = append(forbidden, host)
	}
	for address, want := range map[string][]string{
		s.health: {
			`^countersign_ready 1$`, `^countersign_leader 1$`, `^countersign_leader_known 1$`, `^countersign_leader_last_contact_seconds 0$`,
			`^countersign_applied_index [1-9]`, `^countersign_members{role="voter"} 1$`, `^countersign_members{role="non_voter"} 0$`,
			`^countersign_entries 1$`, `^countersign_agents{state="admitted"} 1$`, `^countersign_agents{state="banned"} 0$`, `^countersign_agents_connected 1$`,
			`^countersign_authorities{kind="x509",state="active"} 1$`, `^countersign_authorities{kind="jwt",state="active"} 1$`,
			`^countersign_authority_not_after_timestamp_seconds{kind="x509",state="active"} [1-9]`, `^countersign_own_svid_not_after_timestamp_seconds [1-9]`,
			`^countersign_issued_total{kind="x509"} [1-9]`, `^countersign_issued_total{kind="jwt"} [1-9]`, `^countersign_issued_total{kind="agent"} [1-9]`,
			`^countersign_issued_total{kind="downstream"} 0$`, `^countersign_refused_total{code="PermissionDenied"} [1-9]`, `^countersign_refused_total{code="NotFound"} [1-9]`,
			`^countersign_attestations_total{kind="join_token",outcome="accepted"} 1$`, `^countersign_attestations_total{kind="kube",outcome="refused"} 0$`,
			`^countersign_audit_events_total{outcome="ok"} [1-9]`, `^countersign_audit_events_total{outcome="refused"} [1-9]`, `^countersign_audit_failures_total 0$`,
			`^countersign_kube_clusters 0$`, `^countersign_kube_cluster_faults{part="api"} 0$`, `^countersign_disk_free_bytes [1-9]`, `^countersign_build_info{version=".+"} 1$`,
			`^go_goroutines [1-9]`, `^process_resident_memory_bytes [1-9]`,
		},
		s.agentHealth: {
			`^countersign_agent_ready 1$`, `^countersign_agent_connected 1$`, `^countersign_agent_last_contact_timestamp_seconds [1-9]`,
			`^countersign_agent_own_svid_not_after_timestamp_seconds [1-9]`, `^countersign_agent_workloads [1-9]`, `^countersign_agent_svids [1-9]`,
			`^countersign_agent_svid_earliest_not_after_timestamp_seconds [1-9]`, `^countersign_agent_svids_issued_total{kind="x509"} [1-9]`,
			`^countersign_agent_svids_issued_total{kind="jwt"} [1-9]`, `^countersign_agent_streams 0$`, `^countersign_build_info{version=".+"} 1$`, `^go_goroutines [1-9]`,
		},
	} {
		res, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			s.t.Fatal(err)
		}
		raw, err := io.ReadAll(res.Body)
		res.Body.Close()
		text := string(raw)
		if err != nil || res.StatusCode != http.StatusOK || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/plain") {
			s.t.Fatalf("%s: %s %v: %s", address, res.Status, err, text)
		}
		for _, w := range want {
			if !regexp.MustCompile("(?m)" + w).MatchString(text) {
				s.t.Errorf("%s is not in:\n%s", w, text)
			}
		}
		for _, f := range forbidden {
			if strings.Contains(text, f) {
				s.t.Errorf("metrics hold %q", f)
			}
		}
		if problems, err := promlint.New(strings.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
			s.t.Errorf("%v %v", problems, err)
		}
		res, err = http.Post("http://"+address+"/metrics", "text/plain", strings.NewReader("x"))
		if err != nil {
			s.t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusMethodNotAllowed {
			s.t.Errorf("POST: %s", res.Status)
		}
	}
}

// A member that is still looking for its cluster tells that, and nothing that is not there yet.
func TestMetricsBeforeReady(t *testing.T) {
	m := newMember(&config.Server{DataDir: filepath.Join(t.TempDir(), "absent")}, slog.New(slog.DiscardHandler))
	h, err := m.metrics()
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	text := w.Body.String()
	if w.Code != http.StatusOK || !strings.Contains(text, "\ncountersign_ready 0\n") || strings.Contains(text, "countersign_leader") || strings.Contains(text, "countersign_disk") {
		t.Errorf("%d: %s", w.Code, text)
	}
}

// Operators find every metric, and each that they find is there.
func TestMetricsPage(t *testing.T) {
	raw, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{"countersign_build_info": true}
	for _, d := range metricsTable() {
		known[d.Name] = true
		if !strings.Contains(string(raw), "| `"+d.Name) {
			t.Errorf("docs/OPERATIONS.md has no row of %s: %s", d.Name, d.Help)
		}
	}
	for _, name := range regexp.MustCompile(`\bcountersign_[a-z0-9_]+`).FindAllString(string(raw), -1) {
		if !known[name] && !strings.HasPrefix(name, "countersign_agent_") {
			t.Errorf("docs/OPERATIONS.md names %s, which there is not", name)
		}
	}
}
