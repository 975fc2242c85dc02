package federation

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// Invite is what one side tells the other for it to federate: where its bundle is, who may serve it, and the bundle as it is
// now. There is no secret in it; but whoever can change it on the way can have himself trusted in place of its maker, so it
// travels on a way that both sides trust.
type Invite struct {
	TrustDomain string
	URL         string
	Profile     string
	EndpointID  string           // https_spiffe only
	Bundle      *identity.Bundle // never nil, with an X.509 authority in it
}

const (
	invitePrefix = "csf1."
	// MaxInvite bounds a token: four thirds of the largest bundle, and what is around it.
	MaxInvite = 128 << 10
)

func strictBase64() *base64.Encoding { return base64.RawURLEncoding.Strict() }

// inviteJSON is what a token encodes.
type inviteJSON struct {
	TrustDomain string          `json:"trust_domain"`
	URL         string          `json:"url"`
	Profile     string          `json:"profile"`
	EndpointID  string          `json:"endpoint_id,omitempty"`
	Bundle      json.RawMessage `json:"bundle"` // a document in SPIFFE format
}

// Format checks an invite and writes its token.
func (i *Invite) Format() (string, error) {
	if err := i.check(); err != nil {
		return "", err
	}
	doc, err := Marshal(i.Bundle, i.Bundle.RefreshHint)
	if err != nil {
		return "", err
	}
	raw, err := json.Marshal(inviteJSON{i.TrustDomain, i.URL, i.Profile, i.EndpointID, doc})
	if err != nil {
		return "", fmt.Errorf("writing the invite: %w", err)
	}
	out := invitePrefix + strictBase64().EncodeToString(raw)
	if len(out) > MaxInvite {
		return "", fmt.Errorf("%w: an invite of %d bytes: at the most %d", identity.ErrInvalid, len(out), MaxInvite)
	}
	return out, nil
}

func (i *Invite) check() error {
	f := identity.Federation{TrustDomain: i.TrustDomain, URL: i.URL, Profile: i.Profile, EndpointID: i.EndpointID}
	if err := identity.CheckFederation(spiffeid.TrustDomain{}, &f); err != nil {
		return fmt.Errorf("the invite: %w", err)
	}
	if i.Bundle == nil || i.Bundle.TrustDomain.Name() != i.TrustDomain || len(i.Bundle.X509) == 0 {
		return fmt.Errorf("%w: the invite has no X.509 authority of %q", identity.ErrInvalid, i.TrustDomain)
	}
	if err := CheckBounds(i.Bundle); err != nil {
		return fmt.Errorf("%w: the invite's bundle: %w", identity.ErrInvalid, err)
	}
	return nil
}

// ParseInvite reads a token; nothing of it is trusted but that it is well formed. Its errors
// wrap identity.ErrInvalid.
func ParseInvite(token string) (*Invite, error) {
	if len(token) > MaxInvite {
		return nil, fmt.Errorf("%w: an invite of %d bytes: at the most %d", identity.ErrInvalid, len(token), MaxInvite)
	}
	text, ok := strings.CutPrefix(token, invitePrefix)
	if !ok {
		return nil, fmt.Errorf("%w: this is no invite: one begins with %q (countersign federation invite makes it)", identity.ErrInvalid, invitePrefix)
	}
	raw, err := strictBase64().DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%w: the invite is damaged: was all of it copied? %w", identity.ErrInvalid, err)
	}
	var j inviteJSON
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&j); err != nil {
		return nil, fmt.Errorf("%w: the invite is damaged, or of a newer release: %w", identity.ErrInvalid, plain(err))
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("%w: the invite is damaged: there is something after its end", identity.ErrInvalid)
	}
	i := &Invite{TrustDomain: j.TrustDomain, URL: j.URL, Profile: j.Profile, EndpointID: j.EndpointID}
	td, err := spiffeid.TrustDomainFromString(j.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("%w: the invite's trust domain: %w", identity.ErrInvalid, plain(err))
	}
	if i.Bundle, err = Parse(td, j.Bundle); err != nil {
		return nil, fmt.Errorf("the invite: %w", err)
	}
	if err := i.check(); err != nil {
		return nil, err
	}
	return i, nil
}
