package federation

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/identity"
)

func (p *partner) invite(profile string) *Invite {
	i := &Invite{TrustDomain: p.td.Name(), URL: "https://bundle.partner.org/bundle", Profile: profile, Bundle: p.bundle()}
	if profile == identity.ProfileSPIFFE {
		i.EndpointID = p.endpointID()
	}
	return i
}

func TestInviteRoundTrip(t *testing.T) {
	p := newPartner(t, "partner.org")
	p.change(func(b *identity.Bundle) { b.RefreshHint = time.Minute })
	for _, profile := range []string{identity.ProfileWeb, identity.ProfileSPIFFE} {
		i := p.invite(profile)
		token, err := i.Format()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseInvite(token)
		if err != nil || !reflect.DeepEqual(got, i) {
			t.Errorf("%s: %+v, %v", profile, got, err)
		}
		if strings.ContainsAny(token, " \n+/=") {
			t.Errorf("a token that a shell or a mail would break: %s", token)
		}
	}
}

func TestInviteRefuses(t *testing.T) {
	p, other := newPartner(t, "partner.org"), newPartner(t, "other.org")
	for name, change := range map[string]func(*Invite){
		"no trust domain":             func(i *Invite) { i.TrustDomain = "" },
		"no URL":                      func(i *Invite) { i.URL = "" },
		"plain HTTP":                  func(i *Invite) { i.URL = "http://partner.org" },
		"a password":                  func(i *Invite) { i.URL = "https://u:p@partner.org" },
		"no profile":                  func(i *Invite) { i.Profile = "" },
		"no endpoint ID":              func(i *Invite) { i.EndpointID = "" },
		"another's endpoint":          func(i *Invite) { i.EndpointID = other.endpointID() },
		"no bundle":                   func(i *Invite) { i.Bundle = nil },
		"an empty one":                func(i *Invite) { i.Bundle = &identity.Bundle{TrustDomain: p.td} },
		"another trust domain's":      func(i *Invite) { i.Bundle = other.bundle() },
		"with another's trust domain": func(i *Invite) { i.TrustDomain = "other.org" },
	} {
		i := p.invite(identity.ProfileSPIFFE)
		change(i)
		if token, err := i.Format(); !errors.Is(err, identity.ErrInvalid) {
			t.Errorf("%s: %s, %v", name, token, err)
		}
	}
	good, err := p.invite(identity.ProfileSPIFFE).Format()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(good, invitePrefix))
	if err != nil {
		t.Fatal(err)
	}
	again := func(change func(string) string) string {
		return invitePrefix + base64.RawURLEncoding.EncodeToString([]byte(change(string(raw))))
	}
	for name, token := range map[string]string{
		"nothing":          "",
		"a join token":     "cs1." + good[5:],
		"a later version":  "csf2." + good[5:],
		"cut":              good[:len(good)-7],
		"more":             good + "AAAA",
		"padded":           good + "=",
		"no JSON":          again(func(string) string { return "x" }),
		"two documents":    again(func(s string) string { return s + s }),
		"an unknown field": again(func(s string) string { return `{"secret":"x",` + s[1:] }),
		"no bundle":        again(func(s string) string { return s[:strings.Index(s, `,"bundle"`)] + "}" }),
		"another's roots": again(func(s string) string {
			return strings.Replace(s, `"trust_domain":"partner.org"`, `"trust_domain":"other.org"`, 1)
		}),
		"huge": invitePrefix + strings.Repeat("A", MaxInvite),
	} {
		i, err := ParseInvite(token)
		if i != nil || !errors.Is(err, identity.ErrInvalid) || len(err.Error()) > 600 {
			t.Errorf("%s: %+v, %v", name, i, err)
		}
	}
}

// A mail that breaks lines does not break a token.
func TestInviteOfSeveralLines(t *testing.T) {
	p := newPartner(t, "partner.org")
	token, err := p.invite(identity.ProfileWeb).Format()
	if err != nil {
		t.Fatal(err)
	}
	if i, err := ParseInvite(token[:76] + "\r\n" + token[76:]); err != nil || i.TrustDomain != "partner.org" {
		t.Errorf("%+v, %v", i, err)
	}
}

// FuzzInvite: what is read from a token comes back the same from the token that it makes.
func FuzzInvite(f *testing.F) {
	seeds, err := filepath.Glob(filepath.Join("testdata", "fuzz", "FuzzInvite", "*"))
	if err != nil || len(seeds) < 3 {
		f.Fatalf("%d seeds, %v", len(seeds), err)
	}
	f.Fuzz(func(t *testing.T, token string) {
		i, err := ParseInvite(token)
		if err != nil {
			if !errors.Is(err, identity.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		again, err := i.Format()
		if err != nil {
			t.Fatal(err)
		}
		i2, err := ParseInvite(again)
		if err != nil || !reflect.DeepEqual(i, i2) {
			t.Fatalf("%+v became %+v, %v", i, i2, err)
		}
	})
}

// TestInviteSeeds writes them anew with COUNTERSIGN_SEEDS=1, and otherwise reads those that are there.
func TestInviteSeeds(t *testing.T) {
	dir := filepath.Join("testdata", "fuzz", "FuzzInvite")
	if os.Getenv("COUNTERSIGN_SEEDS") != "" {
		p := newPartner(t, "partner.org")
		seeds := map[string]string{"prefix": invitePrefix}
		for _, profile := range []string{identity.ProfileWeb, identity.ProfileSPIFFE} {
			token, err := p.invite(profile).Format()
			if err != nil {
				t.Fatal(err)
			}
			seeds[profile] = token
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, token := range seeds {
			if err := os.WriteFile(filepath.Join(dir, name), fmt.Appendf(nil, "go test fuzz v1\nstring(%q)\n", token), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A token that an earlier release made is read for ever.
	raw, err := os.ReadFile(filepath.Join(dir, identity.ProfileSPIFFE))
	if err != nil {
		t.Fatal(err)
	}
	_, quoted, _ := strings.Cut(string(raw), `string("`)
	if i, err := ParseInvite(strings.TrimSuffix(strings.TrimSpace(quoted), `")`)); err != nil || i.TrustDomain != "partner.org" {
		t.Errorf("%+v, %v", i, err)
	}
}
