package identity

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Template is a SPIFFE ID or DNS name with placeholders {type:name}, filled from the workload's selectors:
// spiffe://example.org/ns/{k8s:ns}/sa/{k8s:sa}. What fills a placeholder cannot add a path segment.
type Template struct {
	parts []part
}

type part struct{ literal, name string } // one of the two

// ParseTemplate splits a template and checks its placeholders' names.
func ParseTemplate(s string) (Template, error) {
	var t Template
	if len(s) > 2048 {
		return t, fmt.Errorf("%w: template of %d bytes: at the most 2048", ErrInvalid, len(s))
	}
	for rest := s; rest != ""; {
		open := strings.IndexByte(rest, '{')
		if open < 0 {
			open = len(rest)
		}
		if lit := rest[:open]; lit != "" {
			if strings.IndexByte(lit, '}') >= 0 {
				return Template{}, fmt.Errorf("%w: template %q: } without {", ErrInvalid, s)
			}
			t.parts = append(t.parts, part{literal: lit})
		}
		if open == len(rest) {
			break
		}
		end := strings.IndexByte(rest[open:], '}')
		if end < 0 {
			return Template{}, fmt.Errorf("%w: template %q: { without }", ErrInvalid, s)
		}
		name := rest[open+1 : open+end]
		if _, known := selectorProven(name); !known || slices.Contains(factNames(), name) {
			names := slices.DeleteFunc(SelectorNames(), func(n string) bool { return slices.Contains(factNames(), n) })
			return Template{}, fmt.Errorf("%w: template %q: unknown placeholder {%s}: known are %s", ErrInvalid, s, name, strings.Join(names, ", "))
		}
		t.parts = append(t.parts, part{name: name})
		rest = rest[open+end+1:]
	}
	return t, nil
}

// Names are the placeholders in order.
func (t Template) Names() []string {
	var out []string
	for _, p := range t.parts {
		if p.name != "" {
			out = append(out, p.name)
		}
	}
	return out
}

// String is the template as written.
func (t Template) String() string {
	var b strings.Builder
	for _, p := range t.parts {
		b.WriteString(p.literal)
		if p.name != "" {
			b.WriteString("{" + p.name + "}")
		}
	}
	return b.String()
}

// Expand fills the placeholders. A placeholder whose selector is missing or ambiguous, or whose value is not
// one path segment ([a-zA-Z0-9.-_], SPIFFE-ID section 2.2), is an error.
func (t Template) Expand(sel []Selector) (string, error) {
	var b strings.Builder
	for _, p := range t.parts {
		if p.name == "" {
			b.WriteString(p.literal)
			continue
		}
		value, n := "", 0
		for _, s := range sel {
			if s.Name() == p.name {
				value, n = s.Value(), n+1
			}
		}
		if n != 1 {
			return "", fmt.Errorf("%w: template %q: the workload has %d values for {%s}, not one", ErrInvalid, t, n, p.name)
		}
		if err := spiffeid.ValidatePathSegment(value); err != nil {
			return "", fmt.Errorf("%w: template %q: {%s} is %q, which cannot be part of an ID: %v", ErrInvalid, t, p.name, value, err)
		}
		b.WriteString(value)
	}
	return b.String(), nil
}

// ExpandID fills an ID template and checks the result: a valid SPIFFE ID of the trust domain with a path,
// outside the reserved part.
func (t Template) ExpandID(td spiffeid.TrustDomain, sel []Selector) (spiffeid.ID, error) {
	s, err := t.Expand(sel)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return ParseWorkloadID(td, s)
}

// ParseWorkloadID accepts the SPIFFE IDs that a workload of the trust domain may have.
func ParseWorkloadID(td spiffeid.TrustDomain, s string) (spiffeid.ID, error) {
	if len(s) > 2048 { // SPIFFE-ID section 2.3
		return spiffeid.ID{}, fmt.Errorf("%w: SPIFFE ID of %d bytes: at the most 2048", ErrInvalid, len(s))
	}
	id, err := spiffeid.FromString(s)
	switch {
	case err != nil:
		return spiffeid.ID{}, fmt.Errorf("%w: SPIFFE ID %q: %v", ErrInvalid, s, err)
	case id.TrustDomain() != td:
		return spiffeid.ID{}, fmt.Errorf("%w: SPIFFE ID %q is not of trust domain %q", ErrInvalid, s, td.Name())
	case id.Path() == "":
		return spiffeid.ID{}, fmt.Errorf("%w: SPIFFE ID %q has no path: a workload needs one (X509-SVID section 3.1)", ErrInvalid, s)
	case id.Path() == "/"+ReservedPath || strings.HasPrefix(id.Path(), "/"+ReservedPath+"/"):
		return spiffeid.ID{}, fmt.Errorf("%w: SPIFFE ID %q: paths below /%s are the cluster's own", ErrInvalid, s, ReservedPath)
	}
	return id, nil
}
