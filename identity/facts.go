package identity

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// The selectors of facts: what a kube cluster's API server says of a pod beyond its token. Labels and owners can change while the pod
// lives; the others cannot.
const (
	SelectorPodLabel    = "k8s:pod-label"     // KEY:VALUE
	SelectorPodLabelKey = "k8s:pod-label-key" // KEY, with whatever value
	SelectorNSLabel     = "k8s:ns-label"      // of the pod's namespace
	SelectorNSLabelKey  = "k8s:ns-label-key"
	SelectorPodOwner    = "k8s:pod-owner" // KIND:NAME of its controller, or of its ReplicaSet's
)

func factNames() []string {
	return []string{SelectorNSLabel, SelectorNSLabelKey, SelectorPodLabel, SelectorPodLabelKey, SelectorPodOwner}
}

// Fact reports whether an API server, and nothing else, proves the selector.
func (s Selector) Fact() bool { return slices.Contains(factNames(), s.Name()) }

// WithoutFacts are the selectors that are no facts, in a slice of its own where there are any.
func WithoutFacts(sel []Selector) []Selector {
	if !slices.ContainsFunc(sel, Selector.Fact) {
		return sel
	}
	return slices.DeleteFunc(slices.Clone(sel), Selector.Fact)
}

var (
	labelName   = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
	labelPrefix = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	ownerKind   = regexp.MustCompile(`^[A-Z][A-Za-z0-9]*$`)
)

func isLabelName(s string) bool { return len(s) <= 63 && labelName.MatchString(s) }

func isOwnerKind(s string) bool { return len(s) <= 63 && ownerKind.MatchString(s) }

// ParseLabelKey accepts the key of a label as Kubernetes does: a name of at most 63 bytes, with or without a DNS name before it.
func ParseLabelKey(s string) error {
	prefix, name, ok := strings.Cut(s, "/")
	if !ok {
		prefix, name = "", s
	}
	if ok && (len(prefix) > 253 || !labelPrefix.MatchString(prefix)) || !isLabelName(name) {
		return fmt.Errorf("%w: label key %q: want a name such as app, or with a domain before it, app.kubernetes.io/name", ErrInvalid, s)
	}
	return nil
}

// ParseLabelValue accepts the value of a label as Kubernetes does; it may be empty.
func ParseLabelValue(s string) error {
	if s != "" && !isLabelName(s) {
		return fmt.Errorf("%w: label value %q: want at the most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or a digit", ErrInvalid, s)
	}
	return nil
}

// checkFact checks the value of a fact's selector: a misspelt one would never match.
func checkFact(name, value string) error {
	switch name {
	case SelectorPodLabelKey, SelectorNSLabelKey:
		return ParseLabelKey(value)
	case SelectorPodLabel, SelectorNSLabel:
		key, v, ok := strings.Cut(value, ":")
		if !ok {
			return fmt.Errorf("%w: want %s:KEY:VALUE, or %s-key:KEY for whatever value", ErrInvalid, name, name)
		}
		if err := ParseLabelKey(key); err != nil {
			return err
		}
		return ParseLabelValue(v)
	case SelectorPodOwner:
		kind, n, _ := strings.Cut(value, ":")
		if !isOwnerKind(kind) || len(n) > 253 || !labelPrefix.MatchString(n) {
			return fmt.Errorf("%w: want %s:KIND:NAME, such as %s:Deployment:web", ErrInvalid, name, name)
		}
	}
	return nil
}

// Interest is which facts of a kube cluster's pods entries name. What nobody names need not be kept.
type Interest struct {
	PodLabels, NamespaceLabels []string // keys, sorted
	Owners                     bool
}

// Empty reports whether no entry names any.
func (i Interest) Empty() bool {
	return len(i.PodLabels) == 0 && len(i.NamespaceLabels) == 0 && !i.Owners
}

// LabelKey is the key that a label's selector names; empty for another selector.
func (s Selector) LabelKey() string {
	switch name, value, _ := s.cut(); name {
	case SelectorPodLabelKey, SelectorNSLabelKey:
		return value
	case SelectorPodLabel, SelectorNSLabel:
		key, _, _ := strings.Cut(value, ":")
		return key
	}
	return ""
}

// KubeClusterOf is the one kube cluster that the selectors name; empty if they name none, or several.
func KubeClusterOf(sel []Selector) string {
	out := ""
	for _, s := range sel {
		if s.Name() == "k8s:cluster" {
			if out != "" {
				return ""
			}
			out = s.Value()
		}
	}
	return out
}
