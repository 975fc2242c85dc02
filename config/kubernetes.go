package config

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// namespaceFile is where the kubelet tells a pod its namespace, beside the token for the API server.
const namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// DefaultJoinTokenPath is where a member's pod finds the token by which it joins.
const DefaultJoinTokenPath = "/var/run/secrets/countersign.io/join/token"

// Kubernetes is the kube cluster that the members live in. It must be the same on every member.
type Kubernetes struct {
	Cluster    string `yaml:"cluster"`    // turns it on: the name under which the leader registers this kube cluster, if it is not yet
	Kubeconfig string `yaml:"kubeconfig"` // in-cluster, or a path
	Namespace  string `yaml:"namespace"`  // of the members; default: the pod's own
	// the members are the pods of this StatefulSet, and form the cluster by themselves (docs/KUBERNETES.md says whom that trusts); empty: they do not
	StatefulSet   string   `yaml:"stateful_set"`
	JoinTokenPath string   `yaml:"join_token_path"` // of the pod's token by which it joins, for audience countersign-member
	AgentAccounts []string `yaml:"agent_accounts"`  // service accounts whose pods may be node agents, namespace/name; for a cluster that the leader registers
	DefaultID     string   `yaml:"default_id"`      // of its pods, as in countersign kube add --default-id; for a cluster that the leader registers
	Bundle        Bundle   `yaml:"bundle"`
	Resources     bool     `yaml:"resources"` // the leader follows WorkloadIdentity, FederatedTrustDomain and KubeCluster (docs/KUBERNETES.md says whom that trusts)
}

// Bundle is where the leader publishes the trust domain's bundle in the kube cluster.
type Bundle struct {
	ConfigMap          string `yaml:"config_map"`           // its name; with stateful_set it is countersign-bundle; off: none, as it is where no namespace is known
	Namespaces         string `yaml:"namespaces"`           // label selector of the namespaces that have it beside the members' own, such as countersign.io/bundle=true; empty: none
	ClusterTrustBundle string `yaml:"cluster_trust_bundle"` // auto: where the API server has the kind; or off
}

// The values of kubernetes.bundle.
const (
	BundleAuto = "auto"
	BundleOff  = "off"
	bundleName = "countersign-bundle"
)

// Forms reports whether the members form the cluster by themselves.
func (k *Kubernetes) Forms() bool { return k.StatefulSet != "" }

// PodHost is the DNS name by which the others reach a pod of the StatefulSet.
func (k *Kubernetes) PodHost(pod string) string {
	return pod + "." + k.StatefulSet + "-members." + k.Namespace + ".svc"
}

func (k *Kubernetes) complete() {
	if k.Cluster == "" {
		return
	}
	def(&k.Kubeconfig, "in-cluster")
	def(&k.Bundle.ClusterTrustBundle, BundleAuto)
	def(&k.JoinTokenPath, DefaultJoinTokenPath)
	if k.Namespace == "" {
		if raw, err := os.ReadFile(namespaceFile); err == nil && len(raw) <= 64 {
			k.Namespace = strings.TrimSpace(string(raw))
		}
	}
	if k.Namespace == "" && !k.Forms() { // a member outside of the cluster: there is no namespace of its own
		def(&k.Bundle.ConfigMap, BundleOff)
	}
	def(&k.Bundle.ConfigMap, bundleName)
}

// advertised is the address of the pod of that name: the DNS name that it keeps when its address changes.
func (k *Kubernetes) advertised(pod, listen string) string {
	_, port, err := net.SplitHostPort(listen)
	if err != nil || !k.Forms() || k.Namespace == "" {
		return ""
	}
	return net.JoinHostPort(k.PodHost(pod), port)
}

// Lengths are checked apart: an expression that counts is large in memory, and agents link this package.
var (
	labelForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	nameForm  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`)
	ordinal   = regexp.MustCompile(`^(0|[1-9][0-9]{0,3})$`)
)

// isClusterName is as identity.CheckKubeCluster wants it.
func isClusterName(s string) bool { return len(s) <= 63 && nameForm.MatchString(s) }

// isKubeLabel is the form of a namespace's name.
func isKubeLabel(s string) bool { return len(s) <= 63 && labelForm.MatchString(s) }

// isKubeAccount is namespace/name of a service account.
func isKubeAccount(s string) bool {
	namespace, name, ok := strings.Cut(s, "/")
	return ok && isKubeLabel(namespace) && len(name) <= 253 && nameForm.MatchString(name)
}

func (k *Kubernetes) check(f *faults, name, joinTokenFile string) {
	if k.Cluster == "" {
		if k.StatefulSet != "" || k.Kubeconfig != "" || k.Namespace != "" || k.JoinTokenPath != "" || len(k.AgentAccounts) > 0 || k.DefaultID != "" || k.Bundle != (Bundle{}) || k.Resources {
			f.add("kubernetes.cluster is missing: the name under which the kube cluster is registered turns the others on")
		}
		return
	}
	if !isClusterName(k.Cluster) {
		f.add("kubernetes.cluster %q: want lower-case letters, digits, - and .", k.Cluster)
	}
	if k.Kubeconfig != "in-cluster" && !filepath.IsAbs(k.Kubeconfig) {
		f.add("kubernetes.kubeconfig %q: want in-cluster or an absolute path", k.Kubeconfig)
	}
	for _, a := range k.AgentAccounts {
		if !isKubeAccount(a) {
			f.add("kubernetes.agent_accounts: %q: want namespace/name", a)
		}
	}
	k.Bundle.check(f, k)
	if !k.Forms() {
		return
	}
	switch {
	case k.Namespace == "":
		f.add("kubernetes.namespace is missing, and there is no %s to take it from: name the members' namespace", namespaceFile)
	case !isKubeLabel(k.Namespace):
		f.add("kubernetes.namespace %q does not have the form of one", k.Namespace)
	}
	if !isKubeLabel(k.StatefulSet) {
		f.add("kubernetes.stateful_set %q does not have the form of one", k.StatefulSet)
	} else if n, ok := strings.CutPrefix(name, k.StatefulSet+"-"); !ok || !ordinal.MatchString(n) {
		f.add("name %q: with kubernetes.stateful_set it is the pod's: %s-0 and so on; leave name out in the pod", name, k.StatefulSet)
	}
	f.absolute("kubernetes.join_token_path", k.JoinTokenPath)
	if joinTokenFile != "" {
		f.add("join_token_file: with kubernetes.stateful_set the members join by their pods' tokens: leave one of the two out")
	}
}

func (b *Bundle) check(f *faults, k *Kubernetes) {
	if b.ClusterTrustBundle != BundleAuto && b.ClusterTrustBundle != BundleOff {
		f.add("kubernetes.bundle.cluster_trust_bundle %q: want %s or %s", b.ClusterTrustBundle, BundleAuto, BundleOff)
	}
	switch {
	case k.Forms() && b.ConfigMap != bundleName:
		f.add("kubernetes.bundle.config_map %q: with kubernetes.stateful_set it is %s, by which members and agents find the cluster", b.ConfigMap, bundleName)
	case b.ConfigMap == BundleOff && b.Namespaces != "":
		f.add("kubernetes.bundle.namespaces: there is no ConfigMap for them: leave it out, or kubernetes.bundle.config_map")
	case b.ConfigMap != BundleOff && !isClusterName(b.ConfigMap):
		f.add("kubernetes.bundle.config_map %q does not have the form of a name", b.ConfigMap)
	case b.ConfigMap != BundleOff && k.Namespace == "" && !k.Forms():
		f.add("kubernetes.namespace is missing, and there is no %s to take it from: name the namespace that is to have ConfigMap %s", namespaceFile, b.ConfigMap)
	}
}
