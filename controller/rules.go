package controller

import (
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"countersign.io/countersign/identity"
)

// What a WorkloadIdentity may not ask for, beyond what its schema refuses: the ID of a pod of another namespace or of another account.

const (
	nsPart = "{k8s:ns}"
	saPart = "{k8s:sa}"
	// nameLabel is on every namespace, with its name; nobody can change it.
	nameLabel = "kubernetes.io/metadata.name"
	// maxEntries bounds what one resource becomes: each way to choose one value for each label that may have several.
	maxEntries = 16
)

// pathOf are the segments of an ID template's path.
func pathOf(template string) []string {
	rest, _ := strings.CutPrefix(template, "spiffe://")
	_, path, ok := strings.Cut(rest, "/")
	if !ok {
		return nil
	}
	return strings.Split(path, "/")
}

// mayEqual reports whether two segments could come to the same. With a placeholder on either side it is taken to be so, unless what is
// written before the first placeholder, or behind the last, tells them apart.
func mayEqual(a, b string) bool {
	ha, ta, pa := ends(a)
	hb, tb, pb := ends(b)
	if !pa && !pb {
		return a == b
	}
	return (strings.HasPrefix(ha, hb) || strings.HasPrefix(hb, ha)) && (strings.HasSuffix(ta, tb) || strings.HasSuffix(tb, ta))
}

// ends are what is before the first placeholder of a segment and behind the last.
func ends(s string) (head, tail string, placeholder bool) {
	i, j := strings.IndexByte(s, '{'), strings.LastIndexByte(s, '}')
	if i < 0 || j < i {
		return s, s, false
	}
	return s[:i], s[j+1:], true
}

// overlap reports whether two ID templates could come to the same ID.
func overlap(a, b string) bool {
	x, y := pathOf(a), pathOf(b)
	if len(x) != len(y) {
		return false
	}
	for i := range x {
		if !mayEqual(x[i], y[i]) {
			return false
		}
	}
	return true
}

// below reports whether a template could come to an ID that begins as one by the shape does.
func below(template, shape []string) bool {
	if len(template) < len(shape) {
		return false
	}
	for i := range shape {
		if !mayEqual(template[i], shape[i]) {
			return false
		}
	}
	return true
}

// ownOnly reports whether an ID by the template says whose it is, namespace and account, so that no pod can have another's by it.
func ownOnly(template []string) bool {
	return slices.Contains(template, nsPart) && slices.Contains(template, saPart)
}

// checkShape keeps a template from the IDs that pods have by default. own are the default IDs of this kube cluster, others those of others.
func checkShape(template, pinned string, own, others []string) error {
	path := pathOf(template)
	for _, shape := range others {
		if below(path, pathOf("spiffe://x"+shape)) && !slices.Contains(own, shape) {
			return fmt.Errorf("%w: the ID could be one of another kube cluster, whose pods have %s", identity.ErrInvalid, shape)
		}
	}
	for _, shape := range own {
		s := pathOf("spiffe://x" + shape)
		if !below(path, s) {
			continue
		}
		for i := range s {
			if path[i] != s[i] && (s[i] != nsPart || pinned == "" || path[i] != pinned) {
				return fmt.Errorf("%w: the ID could be another account's, since pods have %s by default: write %q in place of %q there, or put the ID elsewhere", identity.ErrInvalid, shape, s[i], path[i])
			}
		}
	}
	if pinned == "" && !slices.Contains(path, nsPart) {
		return fmt.Errorf("%w: pods of several namespaces could have this ID: give it a path segment %s, or pin one namespace by the label %s", identity.ErrInvalid, nsPart, nameLabel)
	}
	return nil
}

// checkDNS keeps a DNS name from being that of a service in another namespace.
func checkDNS(name, pinned string) error {
	labels := strings.Split(name, ".")
	ours := func(l string) bool { return l == nsPart || pinned != "" && l == pinned }
	if i := slices.Index(labels, "svc"); i > 0 && !ours(labels[i-1]) {
		return fmt.Errorf("%w: DNS name %q is of a service in another namespace, or could be: write %s before svc", identity.ErrInvalid, name, nsPart)
	}
	if pinned == "" && !slices.ContainsFunc(labels, ours) {
		return fmt.Errorf("%w: pods of several namespaces could have DNS name %q: give it a label %s, or pin one namespace by the label %s", identity.ErrInvalid, name, nsPart, nameLabel)
	}
	return nil
}

// term is one label that must be there, with one of the values, or with any.
type term struct {
	name, keyName string // the selectors' names
	key           string
	values        []string // nil: any
}

// terms turn the selectors of a resource into what entries can name. Absence cannot be proved, so there is no term for it.
func terms(label, key string, s *metav1.LabelSelector) ([]term, error) {
	if s == nil {
		return nil, nil
	}
	var out []term
	for k, v := range s.MatchLabels {
		out = append(out, term{label, key, k, []string{v}})
	}
	for _, e := range s.MatchExpressions {
		switch e.Operator {
		case metav1.LabelSelectorOpIn:
			values := slices.Clone(e.Values)
			slices.Sort(values)
			out = append(out, term{label, key, e.Key, slices.Compact(values)})
		case metav1.LabelSelectorOpExists:
			out = append(out, term{label, key, e.Key, nil})
		default:
			return nil, fmt.Errorf("%w: operator %s of label %q: want In or Exists; that a label is absent proves nothing", identity.ErrInvalid, e.Operator, e.Key)
		}
	}
	slices.SortFunc(out, func(a, b term) int { return strings.Compare(a.key, b.key) })
	return out, nil
}

// pinnedTo is the one namespace that the terms allow; empty: they allow several.
func pinnedTo(all []term) string {
	for _, t := range all {
		if t.name == identity.SelectorNSLabel && t.key == nameLabel && len(t.values) == 1 {
			return t.values[0]
		}
	}
	return ""
}

// selectorSets are the entries' selectors: one set for each way to choose the values.
func selectorSets(cluster string, all []term) ([][]identity.Selector, error) {
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: it names no pods: give podSelector, namespaceSelector, or both; with neither it would match every pod of the cluster", identity.ErrInvalid)
	}
	sets := [][]identity.Selector{{identity.Selector("k8s:cluster:" + cluster)}}
	for _, t := range all {
		var choices []identity.Selector
		switch {
		case t.values == nil:
			choices = append(choices, identity.Selector(t.keyName+":"+t.key))
		case t.name == identity.SelectorNSLabel && t.key == nameLabel: // the token proves it: nobody needs to be asked
			for _, v := range t.values {
				choices = append(choices, identity.Selector("k8s:ns:"+v))
			}
		default:
			for _, v := range t.values {
				choices = append(choices, identity.Selector(t.name+":"+t.key+":"+v))
			}
		}
		if len(sets)*len(choices) > maxEntries {
			return nil, fmt.Errorf("%w: its selectors come to more than %d entries, one for each choice of values: use fewer values, or several resources", identity.ErrInvalid, maxEntries)
		}
		var next [][]identity.Selector
		for _, s := range sets {
			for _, c := range choices {
				next = append(next, append(slices.Clone(s), c))
			}
		}
		sets = next
	}
	for _, s := range sets {
		if _, err := identity.ParseSelectors(selectorTexts(s)); err != nil {
			return nil, err
		}
		identity.SortSelectors(s)
	}
	return sets, nil
}

func selectorTexts(in []identity.Selector) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = string(s)
	}
	return out
}
