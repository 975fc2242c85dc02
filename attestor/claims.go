package attestor

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"

	"countersign.io/countersign/identity"
)

// Claims are what a service account token says, unverified: a member verifies. They serve to refuse the wrong token before it
// leaves the node, and to say what is wrong with it. What it does not say is empty.
type Claims struct {
	Audience                                      []string
	PodUID, PodName, Namespace, ServiceAccountUID string
	ServiceAccount                                string
}

// ReadClaims reads a service account token (a compact JWS, RFC 7515 section 7.1). Errors wrap identity.ErrUnauthenticated, and no part
// of the token is in one.
func ReadClaims(token []byte) (Claims, error) {
	bad := func(why string) (Claims, error) {
		return Claims{}, fmt.Errorf("%w: no service account token: %s", identity.ErrUnauthenticated, why)
	}
	if len(token) > identity.MaxTokenBytes {
		return bad("too long")
	}
	_, rest, ok := bytes.Cut(token, []byte{'.'})
	payload, signature, ok2 := bytes.Cut(rest, []byte{'.'})
	if !ok || !ok2 || bytes.IndexByte(signature, '.') >= 0 {
		return bad("want three parts with dots between")
	}
	for _, c := range token {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return bad("a character that is not base64url")
		}
	}
	decoded := make([]byte, base64.RawURLEncoding.DecodedLen(len(payload)))
	defer clear(decoded)
	n, err := base64.RawURLEncoding.Strict().Decode(decoded, payload)
	if err != nil {
		return bad("the second part is not base64url")
	}
	// Maps and not structs: JSON names are matched exactly, as a member does.
	var top, kube map[string]json.RawMessage
	if json.Unmarshal(decoded[:n], &top) != nil {
		return bad("the claims are not a JSON object")
	}
	var out Claims
	if json.Unmarshal(top["aud"], &out.Audience) != nil {
		var one string
		if out.Audience = nil; json.Unmarshal(top["aud"], &one) == nil { // RFC 7519 section 4.1.3: one may stand alone
			out.Audience = []string{one}
		}
	}
	if json.Unmarshal(top["kubernetes.io"], &kube) != nil {
		return bad("it is not bound to a pod")
	}
	_ = json.Unmarshal(kube["namespace"], &out.Namespace) // empty where it is not a string
	out.PodName, out.PodUID = objectOf(kube["pod"])
	out.ServiceAccount, out.ServiceAccountUID = objectOf(kube["serviceaccount"])
	if out.PodUID == "" {
		return bad("it is not bound to a pod")
	}
	return out, nil
}

// objectOf reads a reference to an object; what is not there is empty.
func objectOf(data json.RawMessage) (name, uid string) {
	var o map[string]json.RawMessage
	if json.Unmarshal(data, &o) != nil {
		return "", ""
	}
	_ = json.Unmarshal(o["name"], &name)
	_ = json.Unmarshal(o["uid"], &uid)
	return name, uid
}
