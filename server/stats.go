package server

import (
	"sync/atomic"

	"google.golang.org/grpc/codes"

	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/attestor/node"
)

// lastCode is the last of gRPC's codes.
const lastCode = codes.Unauthenticated

// Attestations are how many nodes tried to prove themselves in one way.
type Attestations struct{ Accepted, Refused uint64 }

// Stats are numbers of this run.
type Stats struct {
	Agents       int // that have a Sync stream with this member
	Refused      map[codes.Code]uint64
	Attestations map[string]Attestations // by node.Kind...
}

// tally is counted with an atomic addition each: it is in every call's way.
type tally struct {
	refused  [lastCode + 1]atomic.Uint64
	attested [3]struct{ accepted, refused atomic.Uint64 } // in the order of attestKinds
}

func attestKinds() [3]string { return [3]string{node.KindJoin, node.KindKube, node.KindX509Pop} }

func (s *tally) refuse(c codes.Code) {
	if c > lastCode {
		c = codes.Unknown
	}
	s.refused[c].Add(1)
}

// attest counts an attestation that has ended. What came without evidence of a kind is none.
func (s *tally) attest(begin *nodev1.AttestRequest_Begin, err error) {
	kind := 0
	switch begin.GetEvidence().(type) {
	case *nodev1.AttestRequest_Begin_JoinToken:
	case *nodev1.AttestRequest_Begin_KubeToken:
		kind = 1
	case *nodev1.AttestRequest_Begin_X509Pop:
		kind = 2
	default:
		return
	}
	if err != nil {
		s.attested[kind].refused.Add(1)
		return
	}
	s.attested[kind].accepted.Add(1)
}

// Stats may be called at any time, and waits for nothing.
func (s *Server) Stats() Stats {
	out := Stats{Agents: s.hub.agents(), Refused: map[codes.Code]uint64{}, Attestations: map[string]Attestations{}}
	for c := codes.OK + 1; c <= lastCode; c++ {
		out.Refused[c] = s.stats.refused[c].Load()
	}
	for i, k := range attestKinds() {
		a := &s.stats.attested[i]
		out.Attestations[k] = Attestations{Accepted: a.accepted.Load(), Refused: a.refused.Load()}
	}
	return out
}
