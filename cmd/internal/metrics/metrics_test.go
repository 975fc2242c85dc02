package metrics

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

func table() []Def {
	return []Def{
		{Name: "countersign_x", Help: "X."},
		{Name: "countersign_y_total", Help: "Y.", Labels: []Label{{Name: "kind", Values: []string{"a", "b"}}}},
		{Name: "countersign_when_timestamp_seconds", Help: "When."},
	}
}

func scrape(t *testing.T, method string, read func(Sink)) (int, string) {
	t.Helper()
	m, err := New("1.2.3", table(), read, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	m.ServeHTTP(w, httptest.NewRequest(method, "/metrics", nil))
	return w.Code, w.Body.String()
}

func TestMetrics(t *testing.T) {
	code, text := scrape(t, http.MethodGet, func(set Sink) {
		set("countersign_x", 7)
		set("countersign_y_total", 1, "a")
		set("countersign_y_total", 2, "b")
		set.Time("countersign_when_timestamp_seconds", time.Unix(1_700_000_000, 500e6))
	})
	if code != http.StatusOK {
		t.Fatalf("%d: %s", code, text)
	}
	for _, want := range []string{
		"# HELP countersign_x X.\n# TYPE countersign_x gauge\ncountersign_x 7\n", "# TYPE countersign_y_total counter\n",
		`countersign_y_total{kind="a"} 1`, `countersign_y_total{kind="b"} 2`, "countersign_when_timestamp_seconds 1.7000000005e+09\n",
		`countersign_build_info{version="1.2.3"} 1`, "\ngo_goroutines ", "\nprocess_resident_memory_bytes ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in:\n%s", want, text)
		}
	}
	if problems, err := promlint.New(strings.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}

func TestNoTimeIsNotTold(t *testing.T) {
	if _, text := scrape(t, http.MethodGet, func(set Sink) { set.Time("countersign_when_timestamp_seconds", time.Time{}) }); strings.Contains(text, "countersign_when") {
		t.Error(text)
	}
}

// What is not in the table is a mistake, and might be somebody's name: nothing is told then, not even that name.
func TestOnlyTheTable(t *testing.T) {
	for what, read := range map[string]func(Sink){
		"a metric":         func(set Sink) { set("countersign_secret", 1) },
		"a label's value":  func(set Sink) { set("countersign_y_total", 1, "secret") },
		"a label too many": func(set Sink) { set("countersign_x", 1, "secret") },
		"a label too few":  func(set Sink) { set("countersign_y_total", 1) },
		"twice":            func(set Sink) { set("countersign_x", 1); set("countersign_x", 1) },
	} {
		if code, text := scrape(t, http.MethodGet, read); code != http.StatusInternalServerError || strings.Contains(text, "secret") || strings.Contains(text, "go_") {
			t.Errorf("%s: %d %s", what, code, text)
		}
	}
}

func TestMethods(t *testing.T) {
	for _, method := range []string{http.MethodPost, http.MethodHead, http.MethodPut, http.MethodDelete, http.MethodOptions} {
		asked := errors.New("not asked")
		if code, text := scrape(t, method, func(Sink) { asked = nil }); code != http.StatusMethodNotAllowed || strings.Contains(text, "go_") || asked == nil {
			t.Errorf("%s: %d %s", method, code, text)
		}
	}
}

func TestBadTable(t *testing.T) {
	for _, d := range [][]Def{{{Name: "a", Help: "B."}}, {{Name: "countersign_a"}}, {{Name: "countersign_a", Help: "A."}, {Name: "countersign_a", Help: "A."}}, {{Name: "countersign_build_info", Help: "Ours."}}} {
		if _, err := New("", d, func(Sink) {}, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%v is accepted", d)
		}
	}
}
