// Package metrics exposes numbers in the text format of Prometheus. A process has one table of what it tells, and a function that reads
// its state when somebody asks: nothing is kept, and nothing but reading is done. Whoever reaches the port learns numbers and the
// version: labels come from the table alone, so no name of a workload, a caller or an address can get into one.
package metrics

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
)

// Def is a metric of a table. Its type goes by its name, as names are made: _total is a counter.
type Def struct {
	Name, Help string
	Labels     []Label
}

// Label is a label with all the values that it may have.
type Label struct {
	Name   string
	Values []string
}

// Sink takes one value. labels are in the order of the Def.
type Sink func(name string, value float64, labels ...string)

// Metrics answers GET with a process's numbers.
type Metrics struct {
	registry *prometheus.Registry
	log      *slog.Logger
	one      sync.Mutex // a scrape costs memory: the next one waits
}

// New makes the metrics of a table, and those of the Go runtime and of the process. read is called for each scrape, from one
// goroutine at a time; it must not wait for anything. The error is one of the table's.
func New(version string, table []Def, read func(Sink), log *slog.Logger) (*Metrics, error) {
	c := &collector{read: read, defs: map[string]*described{}}
	for _, d := range table {
		if !strings.HasPrefix(d.Name, "countersign_") || d.Help == "" || c.defs[d.Name] != nil {
			return nil, fmt.Errorf("making the table of metrics: %q: want a name that begins with countersign_, once, and a help text", d.Name)
		}
		names := make([]string, len(d.Labels))
		for i, l := range d.Labels {
			names[i] = l.Name
		}
		c.defs[d.Name] = &described{def: d, desc: prometheus.NewDesc(d.Name, d.Help, names, nil)}
	}
	build := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "countersign_build_info", Help: "1; the label is the version of the program.", ConstLabels: prometheus.Labels{"version": version},
	}, func() float64 { return 1 })
	m := &Metrics{registry: prometheus.NewPedanticRegistry(), log: log}
	for _, c := range []prometheus.Collector{c, build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := m.registry.Register(c); err != nil {
			return nil, fmt.Errorf("making the table of metrics: %w", err)
		}
	}
	return m, nil
}

// ServeHTTP answers with everything or, if something is wrong with it, with nothing.
func (m *Metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "want GET", http.StatusMethodNotAllowed)
		return
	}
	m.one.Lock()
	text, err := m.text()
	m.one.Unlock()
	if err != nil {
		m.log.Error("cannot tell the metrics", "error", err)
		http.Error(w, "the metrics could not be read: see the log", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Write(text)
}

func (m *Metrics) text() ([]byte, error) {
	families, err := m.registry.Gather()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}

// Time gives a moment, as seconds since 1970; the zero time is not told.
func (s Sink) Time(name string, t time.Time, labels ...string) {
	if !t.IsZero() {
		s(name, float64(t.UnixMilli())/1000, labels...)
	}
}

// Bool is 1 for true.
func Bool(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// described is a metric of the table as the library knows it.
type described struct {
	def  Def
	desc *prometheus.Desc
}

type collector struct {
	read func(Sink)
	defs map[string]*described
}

// Describe is for the library.
func (c *collector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range c.defs {
		to <- d.desc
	}
}

// Collect is for the library.
func (c *collector) Collect(to chan<- prometheus.Metric) {
	c.read(func(name string, value float64, labels ...string) {
		d := c.defs[name]
		if d == nil {
			to <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(fmt.Errorf("metric %s is not in the table", name)), fmt.Errorf("metric %s is not in the table", name))
			return
		}
		m, err := d.metric(value, labels)
		if err != nil {
			m = prometheus.NewInvalidMetric(d.desc, err)
		}
		to <- m
	})
}

// metric refuses a label that the table does not have: it could be somebody's name.
func (d *described) metric(value float64, labels []string) (prometheus.Metric, error) {
	if len(labels) != len(d.def.Labels) {
		return nil, fmt.Errorf("metric %s has %d labels, not %d", d.def.Name, len(d.def.Labels), len(labels))
	}
	for i, l := range d.def.Labels {
		if !slices.Contains(l.Values, labels[i]) {
			return nil, fmt.Errorf("metric %s: its label %s has a value that is not in the table", d.def.Name, l.Name)
		}
	}
	t := prometheus.GaugeValue
	if strings.HasSuffix(d.def.Name, "_total") {
		t = prometheus.CounterValue
	}
	return prometheus.NewConstMetric(d.desc, t, value, labels...)
}
