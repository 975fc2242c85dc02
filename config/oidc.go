package config

import (
	"strings"
	"time"

	"countersign.io/countersign/identity"
)

// OIDC is what consumers of JWT-SVIDs go by that know nothing of SPIFFE. With an issuer, public.listen serves the discovery document and the keys. The same on every member.
type OIDC struct {
	Off    bool          `yaml:"off"`     // no iss in JWT-SVIDs, and nothing is served
	Issuer string        `yaml:"issuer"`  // https URL, the iss of JWT-SVIDs; default public.url, where that is written in this file
	MaxAge time.Duration `yaml:"max_age"` // how long consumers may keep the keys, 1s to 24h; a new key is published for twice as long before it signs
}

// complete is called before a public.url that nobody wrote is derived: it would be another one on each member.
func (o *OIDC) complete(p *Public) {
	if o.Issuer == "" && !o.Off {
		o.Issuer = strings.TrimSuffix(p.URL, "/")
	}
	defDuration(&o.MaxAge, 5*time.Minute)
}

func (o *OIDC) check(f *faults) {
	f.ttl("oidc.max_age", o.MaxAge, time.Second, 24*time.Hour)
	switch {
	case o.Issuer == "":
	case o.Off:
		f.add("oidc.issuer with oidc.off: name one of them")
	default:
		if err := identity.CheckIssuer(o.Issuer); err != nil {
			f.add("oidc.issuer: %v", strings.TrimPrefix(err.Error(), identity.ErrInvalid.Error()+": "))
		}
	}
}
