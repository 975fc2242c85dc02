package store

import (
	"fmt"
	"math/rand/v2"
	"time"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

// randomLog makes commands of every kind, many of which are refused.
type randomLog struct {
	rnd   *rand.Rand
	out   []raft.Entry
	index uint64
	clock time.Time
}

// randomCommands is a log of n commands; after the first third the cluster rises to level 2.
func randomCommands(rnd *rand.Rand, n int) []raft.Entry {
	l := &randomLog{rnd: rnd, clock: now}
	for i := range n {
		if i == n/3 {
			l.add(setLevel, setLevelData{2})
		}
		if rnd.IntN(3) == 0 {
			l.level2()
		} else {
			l.level1()
		}
	}
	return l.out
}

func (l *randomLog) add(typ string, data any) {
	l.index += 1 + uint64(l.rnd.IntN(3)) // raft's own entries leave gaps
	l.clock = l.clock.Add(time.Duration(l.rnd.IntN(30)) * time.Second)
	cmd, err := encodeCommand(typ, l.clock, data)
	if err != nil {
		panic(err)
	}
	l.out = append(l.out, raft.Entry{Index: l.index, Term: 1, Data: cmd})
}

func (l *randomLog) id(what string) string  { return fmt.Sprintf("%s-%d", what, l.rnd.IntN(25)) }
func (l *randomLog) few(what string) string { return fmt.Sprintf("%s-%d", what, l.rnd.IntN(6)) }
func (l *randomLog) yes() bool              { return l.rnd.IntN(2) == 0 }

func (l *randomLog) entry() identity.Entry {
	e := entryFor(l.id("e"), "/"+l.id("w"), "k8s:ns:"+l.id("n"), "k8s:sa:"+l.id("s"))
	if l.rnd.IntN(3) == 0 {
		e.ExpiresAt = l.clock.Add(time.Duration(l.rnd.IntN(3600)) * time.Second).In(time.FixedZone("", 7200))
	}
	e.Downstream = l.rnd.IntN(8) == 0
	return e
}

func (l *randomLog) kind() identity.AuthorityKind {
	return []identity.AuthorityKind{identity.AuthorityX509, identity.AuthorityJWT}[l.rnd.IntN(2)]
}

func (l *randomLog) authority() identity.Authority {
	a := authority(l.kind(), l.few("auth"))
	a.NotAfter = l.clock.Add(time.Duration(l.rnd.IntN(200)) * time.Minute)
	if l.yes() {
		a.State = identity.AuthorityPrepared
	}
	if l.rnd.IntN(6) == 0 && a.Kind == identity.AuthorityX509 {
		a.Chain, a.Roots, a.Upstream = [][]byte{[]byte("chain")}, [][]byte{[]byte(l.id("root")), []byte("root")}, "disk"
	}
	return a
}

func (l *randomLog) agent() identity.Agent {
	a := agent(l.id("a"))
	if l.yes() {
		a.Kind, a.KubeCluster, a.KubeNode = "kube", l.id("k"), l.id("n")
	}
	return a
}

func (l *randomLog) level1() {
	switch l.rnd.IntN(16) {
	case 0, 1, 2:
		l.add(createEntry, l.entry())
	case 3, 4:
		l.add(updateEntry, updateEntryData{Entry: l.entry(), IfRevision: uint64(l.rnd.IntN(2)) * l.index / 2})
	case 5:
		l.add(deleteEntry, keyData{l.id("e")})
	case 6:
		l.add(putKubeCluster, putKubeClusterData{cluster(l.id("k")), l.yes()})
	case 7:
		l.add(deleteKubeCluster, keyData{l.id("k")})
	case 8:
		l.add(createJoinToken, token(l.id("t"), identity.JoinAgent, l.clock.Add(time.Hour)))
	case 9:
		l.add(useJoinToken, useJoinTokenData{hashOf(l.id("t")), identity.JoinAgent})
	case 10:
		l.add(putAgent, l.agent())
	case 11:
		l.add([]string{banAgent, evictAgent}[l.rnd.IntN(2)], keyData{agent(l.id("a")).ID})
	case 12:
		l.add(createAuthority, l.authority())
	case 13:
		l.add(putMember, identity.Member{ID: fmt.Sprint("m-", l.rnd.IntN(3)), Address: l.id("host") + ":1"})
	case 14:
		l.add(removeMember, keyData{fmt.Sprint("m-", l.rnd.IntN(3))})
	case 15:
		l.clock = l.clock.Add(time.Duration(max(0, l.rnd.IntN(40)-30)) * time.Hour)
		l.add(sweep, sweepData{Limit: 1 + l.rnd.IntN(5)})
	}
}

func (l *randomLog) level2() {
	// Terms get somewhere only if the numbers are near each other; they grow with the log.
	term := 1 + uint32(l.index)/600 + uint32(l.rnd.IntN(2))
	switch l.rnd.IntN(18) {
	case 14, 15:
		f := partnerFederation([]string{"a.org", "b.org", "c.org", "example.org"}[l.rnd.IntN(13)/4])
		if l.yes() {
			f.Bundle = &identity.FederatedBundle{Sequence: uint64(l.rnd.IntN(9)), X509: [][]byte{[]byte(l.id("root"))}}
		}
		l.add(putFederation, putFederationData{Federation: f, Replace: l.yes(), IfRevision: uint64(l.rnd.IntN(3)/2) * l.index / 2})
	case 16:
		l.add(deleteFederation, keyData{[]string{"c.org", "c.org", "d.org", "a.org"}[l.rnd.IntN(7)/2]})
	case 17:
		b := identity.FederatedBundle{Sequence: uint64(l.rnd.IntN(20)), X509: [][]byte{[]byte(l.id("root"))}, JWT: map[string][]byte{l.few("k"): []byte("key"), l.few("k"): []byte("key")}}
		d := putFederatedBundleData{TrustDomain: "a.org", Bundle: b}
		for i := len(l.out) - 1; i >= 0 && d.Of == 0; i-- { // most often the newest relationship there is
			var f putFederationData
			if c, err := decodeCommand(l.out[i].Data); err == nil && c.Type == putFederation && decodeStrict(c.Data, &f) == nil && l.rnd.IntN(4) > 0 {
				d.TrustDomain, d.Of = f.Federation.TrustDomain, l.out[i].Index
			}
		}
		l.add(putFederatedBundle, d)
	case 0:
		l.add(setLevel, setLevelData{1 + uint32(l.rnd.IntN(1+min(1, len(l.out)/500)))})
	case 1:
		a := l.agent()
		if l.rnd.IntN(4) > 0 {
			a.KubeCluster, a.KubeNode = "", ""
		}
		l.add(admitAgent, admitAgentData{Hash: hashOf(l.id("t")), Agent: a})
	case 2:
		l.add(putSealTerm, putSealTermData{Number: term, KeyID: hashOf(fmt.Sprint(term))[:16]})
	case 3, 4, 5:
		l.add(ackSealTerm, ackSealTermData{Number: term, KeyID: hashOf(fmt.Sprint(term))[:16-l.rnd.IntN(8)/7], Member: fmt.Sprint("m-", l.rnd.IntN(3))})
	case 6:
		l.add(putSealTerm, putSealTermData{Number: term, KeyID: hashOf(fmt.Sprint(term))[:16]})
		for m := range 3 * l.rnd.IntN(2) {
			l.add(ackSealTerm, ackSealTermData{Number: term, KeyID: hashOf(fmt.Sprint(term))[:16], Member: fmt.Sprint("m-", m)})
		}
		l.add(activateSealTerm, sealTermData{term})
	case 7:
		l.add(dropSealTerm, sealTermData{term - uint32(l.rnd.IntN(8)+6)/7})
	case 8:
		l.add(resealAuthority, resealData{Kind: l.kind(), ID: l.few("auth"), SealedKey: []byte(l.id("sealed")), IfRevision: uint64(l.rnd.IntN(3)/2) * l.index / 2})
	case 9:
		l.add(prepareAuthority, l.authority())
	case 10:
		switch d := (authorityData{l.kind(), l.few("auth")}); l.rnd.IntN(5) {
		case 0:
			l.add(taintAuthority, taintData{d.Kind, d.ID, time.Second * time.Duration(l.rnd.IntN(4000)), l.rnd.IntN(4) == 0})
		case 1:
			l.add(revokeAuthority, d)
		case 2:
			l.add(putRotation, putRotationData{identity.Rotation{
				Kind: d.Kind, New: d.ID, Phase: []identity.RotationPhase{identity.RotationPrepare, identity.RotationActivate, identity.RotationDone}[l.rnd.IntN(3)],
			}, uint64(l.rnd.IntN(2)) * l.index / 2})
		default:
			l.add(activateAuthority, activateData{d.Kind, d.ID, l.rnd.IntN(3) == 0})
		}
	case 11:
		l.add(dropAuthority, authorityData{l.kind(), l.few("auth")})
	default:
		f := identity.Foreign{Source: []string{identity.SourceUpstream, "spiffe://example.org/ca/1", "spiffe://example.org/ca/2"}[l.rnd.IntN(3)]}
		for i := range l.rnd.IntN(3) {
			id := l.few("auth")
			f.JWT = append(f.JWT, identity.JWTKey{ID: id, PublicKey: []byte([]string{"public " + id, f.Source}[l.rnd.IntN(8)/7]), NotAfter: l.clock.Add(time.Duration(i) * time.Hour)})
			if f.Source == identity.SourceUpstream {
				f.X509 = append(f.X509, []byte(l.id("root")))
			}
		}
		l.add(putForeign, f)
	}
}
