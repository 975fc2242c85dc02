package config

import (
	"strings"
	"testing"
)

func TestKubernetes(t *testing.T) {
	s, err := ParseServer("x", []byte("version: 1\ntrust_domain: example.org\nname: countersign-2\nlisten: ':9443'\nkubernetes: {cluster: main, namespace: ns, stateful_set: countersign, agent_accounts: [ns/countersign-agent]}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if s.Kubernetes.Kubeconfig != "in-cluster" || s.Kubernetes.JoinTokenPath != DefaultJoinTokenPath || s.Advertise != "countersign-2.countersign-members.ns.svc:9443" || !s.Kubernetes.Forms() {
		t.Errorf("%+v, advertise %s", s.Kubernetes, s.Advertise)
	}
	if s, err = ParseServer("x", []byte(goodServer+"kubernetes: {cluster: main}\n")); err != nil || s.Kubernetes.Forms() || strings.Contains(s.Advertise, "svc") {
		t.Errorf("%+v, %v", s.Kubernetes, err)
	}
	const set = "version: 1\ntrust_domain: example.org\nname: countersign-0\nkubernetes: {cluster: main, namespace: ns, stateful_set: countersign}\n"
	for name, c := range map[string]struct{ yaml, want string }{
		"without a cluster":  {goodServer + "kubernetes: {stateful_set: countersign}\n", "kubernetes.cluster is missing"},
		"cluster's name":     {goodServer + "kubernetes: {cluster: Main/x}\n", "kubernetes.cluster"},
		"kubeconfig":         {goodServer + "kubernetes: {cluster: main, kubeconfig: relative}\n", "kubernetes.kubeconfig"},
		"account":            {goodServer + "kubernetes: {cluster: main, agent_accounts: [countersign-agent]}\n", "namespace/name"},
		"no namespace":       {strings.Replace(set, "namespace: ns, ", "", 1), "kubernetes.namespace is missing"},
		"bad namespace":      {strings.Replace(set, "namespace: ns", "namespace: a.b", 1), "kubernetes.namespace"},
		"bad set":            {strings.Replace(set, "stateful_set: countersign", "stateful_set: a/b", 1), "kubernetes.stateful_set"},
		"not a pod's name":   {strings.Replace(set, "name: countersign-0", "name: ca-1", 1), "countersign-0 and so on"},
		"no ordinal":         {strings.Replace(set, "name: countersign-0", "name: countersign-00", 1), "countersign-0 and so on"},
		"two ways to join":   {set + "join_token_file: /x\n", "leave one of the two out"},
		"relative join path": {strings.Replace(set, "stateful_set", "join_token_path: x, stateful_set", 1), "kubernetes.join_token_path"},
	} {
		if _, err := ParseServer("x", []byte(c.yaml)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: the error does not say %q: %v", name, c.want, err)
		}
	}
}

func TestBundleFile(t *testing.T) {
	good := strings.Replace(goodAgent, "ca_pin: sha256:00", "bundle_file: /run/bundle.pem", 1)
	if a, err := ParseAgent("x", []byte(good)); err != nil || a.BundleFile != "/run/bundle.pem" {
		t.Fatal(err)
	}
	for says, yaml := range map[string]string{
		"leave one of the two out":    good + "ca_pin: sha256:00\n",
		"bundle_file \"x\"":           strings.Replace(good, "/run/bundle.pem", "x", 1),
		"the join token has the CA":   strings.Replace(good, "kube: {cluster: prod}", "join_token_file: /x", 1),
		"or name a file with the bun": strings.Replace(good, "bundle_file: /run/bundle.pem\n", "", 1),
	} {
		if _, err := ParseAgent("x", []byte(yaml)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
}
