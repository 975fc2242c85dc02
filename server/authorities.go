package server

import (
	"context"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
)

// ListAuthorities lists the keys that the trust domain vouches for, by kind, the oldest first.
func (s adminService) ListAuthorities(context.Context, *adminv1.Empty) (*adminv1.ListAuthoritiesResponse, error) {
	resp := &adminv1.ListAuthoritiesResponse{}
	for _, a := range s.cfg.State.Authorities() {
		out := &adminv1.ListAuthoritiesResponse_Authority{
			Id: a.ID, Kind: string(a.Kind), State: string(a.State), NotBefore: api.TimeToWire(a.NotBefore), NotAfter: api.TimeToWire(a.NotAfter),
			Key: "sealed", Upstream: a.Upstream,
		}
		switch {
		case a.KeyURI != "":
			out.Key = a.KeyURI
		case len(a.SealedKey) == 0: // it is revoked
			out.Key = "gone"
		case s.cfg.SealTerm != nil:
			out.SealTerm, _ = s.cfg.SealTerm(a.SealedKey)
		}
		resp.Authorities = append(resp.Authorities, out)
	}
	return resp, nil
}
