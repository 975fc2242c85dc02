package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func install(t *testing.T, args ...string) (out, faults string, code int) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code = run(context.Background(), append([]string{"install", "kube"}, args...), &stdout, &stderr)
	return stdout.String(), stderr.String(), code
}

// TestInstallKube: the objects come with the values of the files and flags, the last of them winning.
func TestInstallKube(t *testing.T) {
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte("trustDomain: other.example\nmembers: {replicas: 5, config: {x509_ttl: 20m, jwt_ttl: 1m}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, faults, code := install(t, "-f", file, "--set", "members.config.x509_ttl=30m", "--trust-domain", "example.org", "-n", "ids", "--kube-version", "1.37.2")
	if code != 0 || faults != "" {
		t.Fatalf("exit code %d: %s", code, faults)
	}
	for _, want := range []string{
		"kind: Namespace\nmetadata:\n  name: ids\n", "    trust_domain: example.org\n", "  replicas: 5\n", "    x509_ttl: 30m\n", "    jwt_ttl: 1m\n",
		"      namespace: ids\n", "    - countersign.ids.svc:8443\n", "  serviceAccountTokenInSecrets: true\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("it has no %q", want)
		}
	}
	if strings.Contains(out, "other.example") || strings.Contains(out, "countersign-test") {
		t.Error("it has the trust domain of the file, or the test's pod")
	}
	out, faults, code = install(t, "--trust-domain", "example.org", "--create-namespace=false")
	if code != 0 || strings.Contains(out, "kind: Namespace") || strings.Contains(out, "serviceAccountTokenInSecrets") {
		t.Errorf("exit code %d: %s: a namespace, or what old API servers refuse: %v", code, faults, out)
	}
}

// TestInstallKubeBad: what would not start is not printed.
func TestInstallKubeBad(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "--trust-domain is needed"},
		{[]string{"--trust-domain", "Example.Org"}, "trustDomain"},
		{[]string{"--trust-domain", "example.org", "--set", "members.replica=3"}, "members: additional properties 'replica' not allowed"},
		{[]string{"--trust-domain", "example.org", "--set", "members"}, "KEY.PATH=VALUE"},
		{[]string{"--trust-domain", "example.org", "-f", "/nonexistent"}, "reading values from /nonexistent"},
		{[]string{"--trust-domain", "example.org", "--set", "members.config.x509_tll=1h"}, "x509_tll"},
		{[]string{"--trust-domain", "example.org", "--set", "members.config.x509_ttl=1s"}, "x509_ttl"},
		{[]string{"--trust-domain", "example.org", "--set", "members.config.name=me"}, "members.config.name"},
		{[]string{"--trust-domain", "example.org", "--set", "agent.config.key_type=rsa-512"}, "key_type"},
		{[]string{"--trust-domain", "example.org", "--kube-version", "1.20.0"}, "the chart is for >=1.30"},
		{[]string{"--trust-domain", "example.org", "--kube-version", "new"}, "Kubernetes version"},
		{[]string{"--trust-domain", "example.org", "-n", "A B"}, "namespace"},
	} {
		out, faults, code := install(t, c.args...)
		if code == 0 || out != "" || !strings.Contains(faults, c.want) {
			t.Errorf("install kube %q: exit code %d, %d bytes, %q; want %q", c.args, code, len(out), faults, c.want)
		}
	}
}
