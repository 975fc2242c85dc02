package store

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

func (a *applier) putKubeCluster(d *putKubeClusterData) (any, error) {
	k := d.KubeCluster
	if err := checkKey("kube cluster name", k.Name); err != nil {
		return nil, err
	}
	old, err := get[identity.KubeCluster](a.state, kindKubeCluster, k.Name)
	if err != nil {
		return nil, err
	}
	if old != nil {
		if !d.Replace {
			return nil, fmt.Errorf("%w: kube cluster %s: ask for it to be replaced, or choose another name", identity.ErrExists, k.Name)
		}
		k.Revision = old.Revision
		if same(&k, old) {
			return old, nil
		}
	}
	k.Revision = a.index
	if err := put(a.state, kindKubeCluster, k.Name, &k); err != nil {
		return nil, err
	}
	a.changed(change{putKube: &k})
	return &k, nil
}

func (a *applier) deleteKubeCluster(d *keyData) (any, error) {
	if a.table(kindKubeCluster).Get([]byte(d.Key)) == nil {
		return nil, fmt.Errorf("%w: kube cluster %s", identity.ErrNotFound, d.Key)
	}
	if err := a.table(kindKubeCluster).Delete([]byte(d.Key)); err != nil {
		return nil, err
	}
	a.changed(change{deleteKube: d.Key})
	return nil, a.evictAgentsOf(d.Key)
}

// evictAgentsOf ends the agents that were let in on the word of a kube cluster: it counts no more, and another one may be
// registered under the same name. Bans stay.
func (a *applier) evictAgentsOf(cluster string) error {
	agents, err := all[identity.Agent](a.state, kindAgent)
	if err != nil {
		return err
	}
	for _, r := range agents {
		if r.Kind != "kube" || r.KubeCluster != cluster || r.Banned {
			continue
		}
		if err := a.table(kindAgent).Delete([]byte(r.ID)); err != nil {
			return err
		}
		a.changed(change{agent: r, agentGone: true})
	}
	return nil
}

func (a *applier) createJoinToken(j *identity.JoinToken) (any, error) {
	j.ExpiresAt, j.UsedAt = j.ExpiresAt.UTC(), time.Time{}
	if err := checkToken(j); err != nil {
		return nil, err
	}
	if a.table(kindJoinToken).Get(j.Hash) != nil || a.tx.Bucket([]byte(bucketTokenIDs)).Get([]byte(j.ID)) != nil {
		return nil, fmt.Errorf("%w: join token %s: make another one", identity.ErrExists, j.ID)
	}
	return nil, a.putToken(j)
}

// useJoinToken admits once. The look-up is by the hash of a 256-bit secret: how long it takes tells nothing about
// a secret that the caller does not have. A wrong purpose leaves the token as it was.
func (a *applier) useJoinToken(d *useJoinTokenData) (any, error) {
	if len(d.Hash) == 0 {
		return nil, fmt.Errorf("%w: no join token", identity.ErrUnauthenticated)
	}
	j, err := get[identity.JoinToken](a.state, kindJoinToken, string(d.Hash))
	switch {
	case err != nil:
		return nil, err
	case j == nil:
		return nil, fmt.Errorf("%w: no such join token: it was not made here, or it expired long ago; make another one", identity.ErrUnauthenticated)
	case j.Purpose != d.Purpose:
		return nil, fmt.Errorf("%w: join token %s admits one %s, not one %s", identity.ErrDenied, j.ID, j.Purpose, d.Purpose)
	case !j.UsedAt.IsZero():
		return nil, fmt.Errorf("%w: join token %s was used at %s: each admits once; make another one",
			identity.ErrPrecondition, j.ID, j.UsedAt.Format(time.RFC3339))
	case !a.now.Before(j.ExpiresAt):
		return nil, fmt.Errorf("%w: join token %s expired at %s: make another one",
			identity.ErrUnauthenticated, j.ID, j.ExpiresAt.Format(time.RFC3339))
	}
	j.UsedAt = a.now
	if err := put(a.state, kindJoinToken, string(j.Hash), j); err != nil {
		return nil, err
	}
	return j, nil
}

func (a *applier) agentRecord(id string) (*identity.Agent, error) {
	r, err := get[identity.Agent](a.state, kindAgent, id)
	if err == nil && r == nil {
		err = fmt.Errorf("%w: agent %s: list the agents to see which there are", identity.ErrNotFound, id)
	}
	return r, err
}

func (a *applier) putAgent(r *identity.Agent) (any, error) {
	if err := checkKey("agent ID", r.ID); err != nil {
		return nil, err
	}
	old, err := get[identity.Agent](a.state, kindAgent, r.ID)
	if err != nil {
		return nil, err
	}
	if old != nil && old.Banned {
		return nil, fmt.Errorf("%w: agent %s is banned", identity.ErrDenied, r.ID)
	}
	r.AttestedAt, r.Banned, r.Revision = r.AttestedAt.UTC(), false, a.index
	if err := put(a.state, kindAgent, r.ID, r); err != nil {
		return nil, err
	}
	a.changed(change{agent: r})
	return r, nil
}

func (a *applier) banAgent(d *keyData) (any, error) {
	r, err := a.agentRecord(d.Key)
	if err != nil || r.Banned {
		return nil, err
	}
	r.Banned, r.Revision = true, a.index
	if err := put(a.state, kindAgent, r.ID, r); err != nil {
		return nil, err
	}
	a.changed(change{agent: r, agentGone: true})
	return nil, nil
}

func (a *applier) evictAgent(d *keyData) (any, error) {
	r, err := a.agentRecord(d.Key)
	if err != nil {
		return nil, err
	}
	if r.Banned {
		return nil, fmt.Errorf("%w: agent %s is banned: its record is what keeps it out", identity.ErrPrecondition, r.ID)
	}
	if err := a.table(kindAgent).Delete([]byte(r.ID)); err != nil {
		return nil, err
	}
	a.changed(change{agent: r, agentGone: true})
	return nil, nil
}

// createAuthority answers with the active authority of the kind if there is one: two leaders in a row that both
// made one end up with the same.
func (a *applier) createAuthority(r *identity.Authority) (any, error) {
	if err := errors.Join(checkKey("authority ID", r.ID), checkKey("authority kind", string(r.Kind))); err != nil {
		return nil, err
	}
	before, err := all[identity.Authority](a.state, kindAuthority)
	if err != nil {
		return nil, err
	}
	for _, b := range before {
		if b.Kind == r.Kind && b.State == identity.AuthorityActive {
			return b, nil
		}
		if b.Kind == r.Kind && b.ID == r.ID {
			return nil, fmt.Errorf("%w: authority %s", identity.ErrExists, authorityKey(r))
		}
	}
	r.NotBefore, r.NotAfter, r.Revision = r.NotBefore.UTC(), r.NotAfter.UTC(), a.index
	if err := put(a.state, kindAuthority, authorityKey(r), r); err != nil {
		return nil, err
	}
	after := append(slices.Clone(before), r)
	slices.SortFunc(after, func(x, y *identity.Authority) int { return strings.Compare(authorityKey(x), authorityKey(y)) })
	return r, a.authoritiesChanged(before, after)
}

// authoritiesChanged counts the bundle's sequence up exactly when what the bundle says changed.
func (a *applier) authoritiesChanged(before, after []*identity.Authority) error {
	sequence := a.counter(metaSequence)
	b := makeBundle(a.td, after, sequence)
	if !same(makeBundle(a.td, before, sequence), b) {
		b.Sequence = sequence + 1
		if err := a.setCounter(metaSequence, b.Sequence); err != nil {
			return err
		}
	}
	a.changed(change{authorities: after, bundle: b})
	return nil
}

// refreshHint is how often a consumer should read the bundle again (SPIFFE Trust Domain and Bundle, section 4.1.2).
const refreshHint = 5 * time.Minute

// makeBundle holds every authority that somebody may rely on; they come sorted.
func makeBundle(td spiffeid.TrustDomain, authorities []*identity.Authority, sequence uint64) *identity.Bundle {
	b := &identity.Bundle{TrustDomain: td, Sequence: sequence, RefreshHint: refreshHint, JWT: make(map[string][]byte)}
	for _, r := range authorities {
		switch r.State {
		case identity.AuthorityPrepared, identity.AuthorityActive, identity.AuthorityRetiring:
		default:
			continue
		}
		switch r.Kind {
		case identity.AuthorityX509:
			b.X509 = append(b.X509, r.Cert)
		case identity.AuthorityJWT:
			b.JWT[r.ID] = r.PublicKey
		}
	}
	return b
}

func (a *applier) putMember(m *identity.Member) (any, error) {
	if err := checkKey("member ID", m.ID); err != nil {
		return nil, err
	}
	old, err := get[identity.Member](a.state, kindMember, m.ID)
	if err != nil || old != nil && *old == *m {
		return nil, err
	}
	if err := put(a.state, kindMember, m.ID, m); err != nil {
		return nil, err
	}
	return nil, a.membersChanged()
}

func (a *applier) removeMember(d *keyData) (any, error) {
	if a.table(kindMember).Get([]byte(d.Key)) == nil {
		return nil, fmt.Errorf("%w: member %s", identity.ErrNotFound, d.Key)
	}
	if err := a.table(kindMember).Delete([]byte(d.Key)); err != nil {
		return nil, err
	}
	return nil, a.membersChanged()
}

func (a *applier) membersChanged() error {
	members, err := all[identity.Member](a.state, kindMember)
	a.changed(change{members: members, membersChanged: true})
	return err
}
