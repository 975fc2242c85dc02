package identity

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Selector is one attested property, "type:name:value", such as "k8s:ns:prod" or "unix:uid:1000".
type Selector string

// selectorNames lists every selector there is, and whether it is proven: by a verified token, by the API server or by the
// node's own attestation. The others are an agent's word.
func selectorProven(name string) (proven, known bool) {
	switch name {
	case "k8s:cluster", "k8s:ns", "k8s:sa", "k8s:pod-name", "k8s:pod-uid", "k8s:node-name",
		"agent:id", "agent:kind", "agent:kube-cluster", "agent:kube-node", "agent:x509-cn",
		SelectorPodLabel, SelectorPodLabelKey, SelectorNSLabel, SelectorNSLabelKey, SelectorPodOwner:
		return true, true
	case "unix:uid", "unix:gid", "unix:user", "unix:group", "unix:path", "unix:sha256", "systemd:unit":
		return false, true
	}
	return false, false
}

// SelectorNames are the known "type:name" pairs, for error messages and completion.
func SelectorNames() []string {
	return []string{"agent:id", "agent:kind", "agent:kube-cluster", "agent:kube-node", "agent:x509-cn",
		"k8s:cluster", "k8s:node-name", "k8s:ns", SelectorNSLabel, SelectorNSLabelKey, SelectorPodLabel, SelectorPodLabelKey,
		"k8s:pod-name", SelectorPodOwner, "k8s:pod-uid", "k8s:sa",
		"systemd:unit", "unix:gid", "unix:group", "unix:path", "unix:sha256", "unix:uid", "unix:user"}
}

// ParseSelector checks one selector. An unknown name is refused, because a misspelt selector would make an
// entry that never matches.
func ParseSelector(s string) (Selector, error) {
	if len(s) > MaxSelectorBytes {
		return "", fmt.Errorf("%w: selector of %d bytes: at the most %d", ErrInvalid, len(s), MaxSelectorBytes)
	}
	name, value, ok := Selector(s).cut()
	if !ok {
		return "", fmt.Errorf("%w: selector %q: want type:name:value, such as k8s:ns:default", ErrInvalid, s)
	}
	if _, known := selectorProven(name); !known {
		return "", fmt.Errorf("%w: selector %q: unknown kind %q: known are %s", ErrInvalid, s, name, strings.Join(SelectorNames(), ", "))
	}
	if value == "" {
		return "", fmt.Errorf("%w: selector %q has no value", ErrInvalid, s)
	}
	if !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
		return "", fmt.Errorf("%w: selector %q: the value has control characters or is not UTF-8", ErrInvalid, s)
	}
	if err := checkFact(name, value); err != nil {
		return "", fmt.Errorf("selector %q: %w", s, err)
	}
	return Selector(s), nil
}

func (s Selector) cut() (name, value string, ok bool) {
	i := strings.IndexByte(string(s), ':')
	if i < 0 {
		return "", "", false
	}
	j := strings.IndexByte(string(s[i+1:]), ':')
	if j < 0 {
		return "", "", false
	}
	return string(s[:i+1+j]), string(s[i+j+2:]), true
}

// Name is the "type:name" part, Value the rest.
func (s Selector) Name() string  { n, _, _ := s.cut(); return n }
func (s Selector) Value() string { _, v, _ := s.cut(); return v }

// Proven reports whether more than an agent's word stands behind a selector of this name.
func (s Selector) Proven() bool { p, _ := selectorProven(s.Name()); return p }

// ParseSelectors checks, sorts and removes duplicates.
func ParseSelectors(in []string) ([]Selector, error) {
	if len(in) > MaxSelectors {
		return nil, fmt.Errorf("%w: %d selectors: at the most %d", ErrInvalid, len(in), MaxSelectors)
	}
	out := make([]Selector, 0, len(in))
	for _, s := range in {
		sel, err := ParseSelector(s)
		if err != nil {
			return nil, err
		}
		out = append(out, sel)
	}
	return SortSelectors(out), nil
}

// SortSelectors sorts in place and drops duplicates.
func SortSelectors(s []Selector) []Selector {
	slices.Sort(s)
	return slices.Compact(s)
}

// Subset reports whether every selector of a is in b. Both must be sorted.
func Subset(a, b []Selector) bool {
	if len(a) > len(b) {
		return false
	}
	j := 0
	for _, s := range a {
		for j < len(b) && b[j] < s {
			j++
		}
		if j == len(b) || b[j] != s {
			return false
		}
		j++
	}
	return true
}
