package csi

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"countersign.io/countersign/identity"
)

const (
	maxTokensBytes = 128 << 10 // of all audiences that the CSIDriver object names
	maxAudiences   = 16
)

// parseTokens finds the token for an audience in what the kubelet hands over: a JSON object of objects by audience, each with a token. The
// result is the caller's to wipe. No part of a token is in an error.
func parseTokens(value, audience string) ([]byte, error) {
	bad := func(format string, args ...any) ([]byte, error) {
		return nil, fmt.Errorf("%w: the tokens that the kubelet handed over: "+format, append([]any{identity.ErrInvalid}, args...)...)
	}
	if len(value) > maxTokensBytes {
		return bad("%d bytes: at the most %d", len(value), maxTokensBytes)
	}
	data := []byte(value)
	defer clear(data)
	var byAudience map[string]json.RawMessage
	defer func() {
		for _, raw := range byAudience {
			clear(raw)
		}
	}()
	if json.Unmarshal(data, &byAudience) != nil {
		return bad("not a JSON object")
	}
	if len(byAudience) > maxAudiences {
		return bad("%d audiences: at the most %d", len(byAudience), maxAudiences)
	}
	raw, ok := byAudience[audience]
	if !ok {
		var names []string
		for _, n := range slices.Sorted(maps.Keys(byAudience)) {
			names = append(names, quote(n))
		}
		return bad("they are for %s, and none is for %q: set tokenRequests of the CSIDriver object, or csi.audience of the agent", strings.Join(names, ", "), audience)
	}
	var one map[string]json.RawMessage
	if json.Unmarshal(raw, &one) != nil {
		return bad("the one for %q is not a JSON object", audience)
	}
	defer func() {
		for _, raw := range one {
			clear(raw)
		}
	}()
	// As it is written, so that no copy of it becomes a string: a token needs no escapes.
	t := one["token"]
	if len(t) < 3 || t[0] != '"' || t[len(t)-1] != '"' {
		return bad("the one for %q has no token", audience)
	}
	t = t[1 : len(t)-1]
	if len(t) > identity.MaxTokenBytes {
		return bad("the one for %q has %d bytes: at the most %d", audience, len(t), identity.MaxTokenBytes)
	}
	return slices.Clone(t), nil
}
