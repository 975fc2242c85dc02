package deploy_test

import (
	"encoding/json"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"countersign.io/countersign/deploy"
)

// monitor is what the chart's two kinds of the Prometheus operator have.
type monitor struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Metadata   json.RawMessage `json:"metadata"`
	Spec       struct {
		Selector struct {
			MatchLabels map[string]string `json:"matchLabels"`
		} `json:"selector"`
		Endpoints, PodMetricsEndpoints []struct{ Port, Path, Interval string }
	} `json:"spec"`
}

const withMonitoring = `
trustDomain: example.org
monitoring:
  enabled: true
  labels: {release: prometheus}
  interval: 15s
  from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]
`

func TestMonitors(t *testing.T) {
	got := render(t, deploy.Options{Values: values(t, withMonitoring)})
	for id, app := range map[string]string{"ServiceMonitor/countersign": "countersign", "PodMonitor/countersign-agent": "countersign-agent"} {
		o, ok := got[id]
		if !ok {
			t.Fatalf("there is no %s", id)
		}
		if o.APIVersion != "monitoring.coreos.com/v1" || o.Metadata.Labels["release"] != "prometheus" || o.Metadata.Labels["app.kubernetes.io/name"] != app {
			t.Errorf("%s: %+v", id, o.Metadata)
		}
		m := into[monitor](t, o)
		ends := append(m.Spec.Endpoints, m.Spec.PodMetricsEndpoints...)
		if len(ends) != 1 || ends[0].Port != "health" || ends[0].Path != "/metrics" || ends[0].Interval != "15s" || m.Spec.Selector.MatchLabels["app.kubernetes.io/name"] != app {
			t.Errorf("%s: %+v", id, m.Spec)
		}
	}
	for name, want := range map[string]bool{"countersign-members": true, "countersign": false} { // by which of the two, each member once
		s := into[corev1.Service](t, got["Service/"+name])
		has := false
		for _, p := range s.Spec.Ports {
			has = has || p.Name == "health" && p.Port == 8080
		}
		if has != want || s.Labels["app.kubernetes.io/name"] != "countersign" {
			t.Errorf("Service %s: %+v", name, s.Spec)
		}
	}
}

// Without a word about it there is nothing for Prometheus, and nobody is let in; an empty list of peers would be everybody.
func TestNoScraperIsLetIn(t *testing.T) {
	for what, text := range map[string]string{
		"the default": "trustDomain: example.org", "nobody named": "trustDomain: example.org\nmonitoring: {enabled: true}", "an empty list": "trustDomain: example.org\nmonitoring: {enabled: true, from: []}",
	} {
		got := render(t, deploy.Options{Values: values(t, text)})
		for _, name := range []string{"countersign", "countersign-agent"} {
			p := into[networkingv1.NetworkPolicy](t, got["NetworkPolicy/"+name])
			for _, rule := range p.Spec.Ingress {
				for _, port := range rule.Ports {
					if port.Port.String() != "tls" {
						t.Errorf("%s: %s lets in to port %s", what, name, port.Port)
					}
				}
			}
			if name == "countersign-agent" && len(p.Spec.Ingress) != 0 {
				t.Errorf("%s: somebody reaches the agents: %+v", what, p.Spec.Ingress)
			}
		}
		if _, ok := got["ServiceMonitor/countersign"]; ok != strings.Contains(text, "enabled") {
			t.Errorf("%s: a ServiceMonitor: %v", what, ok)
		}
	}
}

// Who is named reaches the port of health and no other, whether there is an operator or not.
func TestScrapersAreLetIn(t *testing.T) {
	for _, text := range []string{withMonitoring, strings.Replace(withMonitoring, "enabled: true", "enabled: false", 1), withMonitoring + "agent: {servers: ['ca.example.org:8443']}\nmembers: {enabled: true}\n"} {
		got := render(t, deploy.Options{Values: values(t, text)})
		for _, name := range []string{"countersign", "countersign-agent"} {
			p := into[networkingv1.NetworkPolicy](t, got["NetworkPolicy/"+name])
			n := 0
			for _, rule := range p.Spec.Ingress {
				if len(rule.From) == 0 {
					t.Errorf("%s lets everybody in: %+v", name, rule)
				}
				if rule.From[0].NamespaceSelector == nil || rule.From[0].NamespaceSelector.MatchLabels["kubernetes.io/metadata.name"] != "monitoring" {
					continue
				}
				if n++; len(rule.From) != 1 || len(rule.Ports) != 1 || rule.Ports[0].Port.String() != "health" {
					t.Errorf("%s: %+v", name, rule)
				}
			}
			if n != 1 {
				t.Errorf("%s has %d rules for who watches", name, n)
			}
		}
	}
}
