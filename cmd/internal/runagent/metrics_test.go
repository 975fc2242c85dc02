package runagent

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"countersign.io/countersign/agent"
)

// An agent that has no member yet tells that.
func TestMetricsBeforeReady(t *testing.T) {
	a, err := agent.New(agent.Config{
		Servers: []string{"member.test:1"}, Pin: "sha256:" + strings.Repeat("0", 64), Credential: agent.JoinToken(strings.Repeat("0", 32)),
	})
	if err != nil {
		t.Fatal(err)
	}
	m, err := newMetrics("v", a, nil, a.Ready, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	m.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	text := w.Body.String()
	for _, want := range []string{"countersign_agent_ready 0\n", "countersign_agent_connected 0\n", "countersign_agent_workloads 0\n", `countersign_build_info{version="v"} 1`} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in:\n%s", want, text)
		}
	}
	for _, not := range []string{"countersign_agent_last_contact", "not_after", "countersign_agent_csi", "member.test"} {
		if strings.Contains(text, not) {
			t.Errorf("%q is in:\n%s", not, text)
		}
	}
	if problems, err := promlint.New(strings.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}

// Operators find every metric, and each that they find is there.
func TestMetricsPage(t *testing.T) {
	raw, err := os.ReadFile("../../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, d := range metricsTable() {
		known[d.Name] = true
		if !strings.Contains(string(raw), "| `"+d.Name) {
			t.Errorf("docs/OPERATIONS.md has no row of %s: %s", d.Name, d.Help)
		}
	}
	for _, name := range regexp.MustCompile(`\bcountersign_agent_[a-z0-9_]+`).FindAllString(string(raw), -1) {
		if !known[name] {
			t.Errorf("docs/OPERATIONS.md names %s, which there is not", name)
		}
	}
}
