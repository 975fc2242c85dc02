package controller

import (
	"errors"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"countersign.io/countersign/identity"
)

func TestOverlap(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want bool
	}{
		{"spiffe://x/a", "spiffe://x/a", true},
		{"spiffe://x/a", "spiffe://x/b", false},
		{"spiffe://x/a", "spiffe://x/a/b", false},
		{"spiffe://x/a/{k8s:ns}", "spiffe://x/a/b", true},
		{"spiffe://x/a/{k8s:ns}", "spiffe://x/b/{k8s:ns}", false},
		{"spiffe://x/a/{k8s:ns}", "spiffe://x/{k8s:sa}/b", true},
		{"spiffe://x/a/t-{k8s:ns}", "spiffe://x/a/u-{k8s:sa}", false},
		{"spiffe://x/a/t-{k8s:ns}", "spiffe://x/a/t-{k8s:ns}-x", true},
		{"spiffe://x/a/{k8s:ns}.a", "spiffe://x/a/{k8s:ns}.b", false},
		{"spiffe://x/a/t-{k8s:ns}", "spiffe://x/a/t-b", true},
	} {
		if got := overlap(tc.a, tc.b); got != tc.want || overlap(tc.b, tc.a) != tc.want {
			t.Errorf("%s and %s: %t", tc.a, tc.b, got)
		}
	}
}

func TestCheckShape(t *testing.T) {
	own := []string{identity.DefaultKubeID, "/k8s/{k8s:cluster}/{k8s:ns}/{k8s:sa}"}
	others := []string{identity.DefaultKubeID, "/west/{k8s:ns}/{k8s:sa}"}
	for _, tc := range []struct{ template, pinned, says string }{
		{"/ns/{k8s:ns}/sa/{k8s:sa}", "", ""},
		{"/ns/{k8s:ns}/sa/{k8s:sa}/more", "", ""},
		{"/k8s/{k8s:cluster}/{k8s:ns}/{k8s:sa}", "", ""},
		{"/apps/{k8s:ns}/web", "", ""},
		{"/web", "shop", ""},
		{"/ns/shop/sa/{k8s:sa}", "shop", ""},
		{"/ns/{k8s:ns}", "", ""}, // too short to be anybody's
		{"/web", "", "several namespaces"},
		{"/apps/{k8s:sa}", "", "several namespaces"},
		{"/apps/x-{k8s:ns}", "", "several namespaces"}, // a segment of its own: what else is in one is easily misread
		{"/ns/shop/sa/{k8s:sa}", "", "another account"},
		{"/ns/dev/sa/{k8s:sa}", "shop", "another account"},
		{"/ns/shop/sa/web", "shop", "another account"},
		{"/ns/{k8s:sa}/sa/{k8s:ns}", "", "another account"},
		{"/ns/{k8s:ns}/sa/web", "", "another account"},
		{"/ns/{k8s:ns}/sa/a-{k8s:sa}", "", "another account"},
		{"/ns/{k8s:ns}/{k8s:pod-name}/{k8s:sa}", "", "another account"},
		{"/k8s/main/{k8s:ns}/{k8s:sa}", "", "another account"}, // the name may be another cluster's
		{"/west/{k8s:ns}/{k8s:sa}", "", "another kube cluster"},
		{"/west/{k8s:ns}/web", "", "another kube cluster"},
		{"/west/shop/web", "shop", "another kube cluster"},
	} {
		err := checkShape("spiffe://example.org"+tc.template, tc.pinned, own, others)
		if tc.says == "" && err != nil || tc.says != "" && (!errors.Is(err, identity.ErrInvalid) || !strings.Contains(err.Error(), tc.says)) {
			t.Errorf("%s pinned to %q: %v, want %q", tc.template, tc.pinned, err, tc.says)
		}
	}
}

func TestCheckDNS(t *testing.T) {
	for _, tc := range []struct {
		name, pinned string
		good         bool
	}{
		{"web.{k8s:ns}.svc", "", true},
		{"web.{k8s:ns}.svc.cluster.local", "", true},
		{"{k8s:ns}.example.org", "", true},
		{"www.example.org", "shop", true},
		{"web.shop.svc", "shop", true},
		{"www.example.org", "", false},
		{"web.prod.svc", "", false},
		{"web.prod.svc", "shop", false},
		{"{k8s:ns}.prod.svc.cluster.local", "", false},
		{"web.{k8s:sa}.svc", "", false},
	} {
		if err := checkDNS(tc.name, tc.pinned); (err == nil) != tc.good {
			t.Errorf("%s pinned to %q: %v", tc.name, tc.pinned, err)
		}
	}
}

func TestSelectorSets(t *testing.T) {
	in := func(key string, op metav1.LabelSelectorOperator, values ...string) metav1.LabelSelectorRequirement {
		return metav1.LabelSelectorRequirement{Key: key, Operator: op, Values: values}
	}
	pods := &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}, MatchExpressions: []metav1.LabelSelectorRequirement{in("tier", "In", "a", "b", "a"), in("x", "Exists")}}
	all, err := terms(identity.SelectorPodLabel, identity.SelectorPodLabelKey, pods)
	if err != nil {
		t.Fatal(err)
	}
	sets, err := selectorSets("main", all)
	want := [][]identity.Selector{
		{"k8s:cluster:main", "k8s:pod-label-key:x", "k8s:pod-label:app:web", "k8s:pod-label:tier:a"},
		{"k8s:cluster:main", "k8s:pod-label-key:x", "k8s:pod-label:app:web", "k8s:pod-label:tier:b"},
	}
	if err != nil || !slices.EqualFunc(sets, want, slices.Equal[[]identity.Selector]) {
		t.Errorf("%v, %v", sets, err)
	}
	ns, err := terms(identity.SelectorNSLabel, identity.SelectorNSLabelKey, &metav1.LabelSelector{MatchLabels: map[string]string{nameLabel: "shop"}})
	if err != nil || pinnedTo(ns) != "shop" || pinnedTo(all) != "" {
		t.Errorf("%v pinned to %q, %v", ns, pinnedTo(ns), err)
	}
	if sets, err := selectorSets("main", ns); err != nil || !slices.Equal(sets[0], []identity.Selector{"k8s:cluster:main", "k8s:ns:shop"}) {
		t.Errorf("%v, %v", sets, err)
	}
	for what, s := range map[string]*metav1.LabelSelector{
		"none": nil, "empty": {}, "NotIn": {MatchExpressions: []metav1.LabelSelectorRequirement{in("a", "NotIn", "b")}},
		"DoesNotExist": {MatchExpressions: []metav1.LabelSelectorRequirement{in("a", "DoesNotExist")}},
		"too many":     {MatchExpressions: []metav1.LabelSelectorRequirement{in("a", "In", "1", "2", "3", "4", "5"), in("b", "In", "1", "2", "3", "4")}},
		"a bad key":    {MatchLabels: map[string]string{"-a": "b"}}, "a bad value": {MatchLabels: map[string]string{"a": "b c"}},
	} {
		all, err := terms(identity.SelectorPodLabel, identity.SelectorPodLabelKey, s)
		if err == nil {
			_, err = selectorSets("main", all)
		}
		if !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
