package identity

import (
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
)

// oldForms are the checks as they were: one expression each.
func oldForms() map[string]*regexp.Regexp {
	return map[string]*regexp.Regexp{
		"dns":   regexp.MustCompile(`^(\*\.)?([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\.)*[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`),
		"kube":  regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$`),
		"label": regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`),
		"kind":  regexp.MustCompile(`^[A-Z][A-Za-z0-9]{0,62}$`),
	}
}

// TestFormsAreTheSame: what is checked by length and form is what one expression with counts in it took.
func TestFormsAreTheSame(t *testing.T) {
	now := map[string]func(string) bool{"dns": isDNSName, "kube": isKubeName, "label": isLabelName, "kind": isOwnerKind}
	rng := rand.New(rand.NewPCG(1, 2))
	var all []string
	for _, n := range []int{0, 1, 2, 3, 61, 62, 63, 64, 65, 126, 127, 128, 252, 253, 254, 255, 300} {
		run := strings.Repeat("a", n)
		for _, around := range []string{"%s", "-%s", "%s-", ".%s", "%s.", "A%s", "%sA", "x.%s", "%s.x", "*.%s", "x/%s", "%s/x", "/%s", "%s/", "x/y/%s", "x/%s.y", "%s\n", "\n%s", "a b%s", "é%s", "_%s", "a_%s", "a..%s", "a-.%s"} {
			all = append(all, strings.Replace(around, "%s", run, 1))
		}
	}
	const alphabet = "aaaa09zZ-._/*\n é\x00"
	for range 20_000 {
		b := make([]byte, rng.IntN(9))
		for i := range b {
			b[i] = alphabet[rng.IntN(len(alphabet))]
		}
		all = append(all, string(b))
	}
	for name, old := range oldForms() {
		took := 0
		for _, s := range all {
			want := old.MatchString(s) && (name != "dns" || len(s) <= 253)
			if got := now[name](s); got != want {
				t.Errorf("%s: %q: %t, and was %t", name, s, got, want)
			}
			if want {
				took++
			}
		}
		if took < 20 {
			t.Errorf("%s takes only %d of these: they show little", name, took)
		}
	}
}
