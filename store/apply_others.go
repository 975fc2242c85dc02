package store

import (
	"errors"
	"fmt"
	"time"

	"countersign.io/countersign/identity"
)

func (a *applier) putKubeCluster(d *putKubeClusterData) (any, error) {
	k := d.KubeCluster
	if err := checkKey("kube cluster name", k.Name); err != nil {
		return nil, err
	}
	if err := needLevel(a.level, levelOfKube(&k), "a managed kube cluster"); err != nil {
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

// useJoinToken admits once. A wrong purpose leaves the token as it was.
func (a *applier) useJoinToken(d *useJoinTokenData) (any, error) {
	j, err := a.spent(d.Hash, d.Purpose)
	if err != nil {
		return nil, err
	}
	if err := put(a.state, kindJoinToken, string(j.Hash), j); err != nil {
		return nil, err
	}
	return j, nil
}

// spent is the token as it is to be stored once it has admitted. The look-up is by the hash of a 256-bit secret: how long
// it takes tells nothing about a secret that the caller does not have.
func (a *applier) spent(hash []byte, purpose string) (*identity.JoinToken, error) {
	if len(hash) == 0 {
		return nil, fmt.Errorf("%w: no join token", identity.ErrUnauthenticated)
	}
	j, err := get[identity.JoinToken](a.state, kindJoinToken, string(hash))
	switch {
	case err != nil:
		return nil, err
	case j == nil:
		return nil, fmt.Errorf("%w: no such join token: it was not made here, or it expired long ago; make another one", identity.ErrUnauthenticated)
	case j.Purpose != purpose:
		return nil, fmt.Errorf("%w: join token %s admits one %s, not one %s", identity.ErrDenied, j.ID, j.Purpose, purpose)
	case !j.UsedAt.IsZero():
		return nil, fmt.Errorf("%w: join token %s was used at %s: each admits once; make another one",
			identity.ErrPrecondition, j.ID, j.UsedAt.Format(time.RFC3339))
	case !a.now.Before(j.ExpiresAt):
		return nil, fmt.Errorf("%w: join token %s expired at %s: make another one",
			identity.ErrUnauthenticated, j.ID, j.ExpiresAt.Format(time.RFC3339))
	}
	j.UsedAt = a.now
	return j, nil
}

// admitAgent spends the token and records the agent, or does neither: a token is not lost to an agent that is refused, and
// admits no second one.
func (a *applier) admitAgent(d *admitAgentData) (any, error) {
	j, err := a.spent(d.Hash, identity.JoinAgent)
	if err != nil {
		return nil, err
	}
	r := &d.Agent
	if r.KubeCluster != j.KubeCluster || r.KubeNode != j.KubeNode {
		return nil, fmt.Errorf("%w: join token %s vouches for node %q of kube cluster %q, and agent %s is to speak for node %q of %q",
			identity.ErrDenied, j.ID, j.KubeNode, j.KubeCluster, r.ID, r.KubeNode, r.KubeCluster)
	}
	if err := a.checkAgent(r); err != nil {
		return nil, err
	}
	if err := errors.Join(storable(j), storable(r)); err != nil {
		return nil, err
	}
	if err := errors.Join(put(a.state, kindJoinToken, string(j.Hash), j), put(a.state, kindAgent, r.ID, r)); err != nil {
		return nil, err
	}
	a.changed(change{agent: r})
	return r, nil
}

func (a *applier) agentRecord(id string) (*identity.Agent, error) {
	r, err := get[identity.Agent](a.state, kindAgent, id)
	if err == nil && r == nil {
		err = fmt.Errorf("%w: agent %s: list the agents to see which there are", identity.ErrNotFound, id)
	}
	return r, err
}

// checkAgent makes the record what is to be stored.
func (a *applier) checkAgent(r *identity.Agent) error {
	if err := checkKey("agent ID", r.ID); err != nil {
		return err
	}
	old, err := get[identity.Agent](a.state, kindAgent, r.ID)
	if err != nil {
		return err
	}
	if old != nil && old.Banned {
		return fmt.Errorf("%w: agent %s is banned", identity.ErrDenied, r.ID)
	}
	r.AttestedAt, r.FirstAt, r.Banned, r.Revision = r.AttestedAt.UTC(), time.Time{}, false, a.index
	if old != nil && a.level >= level2 {
		if r.FirstAt = old.FirstAt; r.FirstAt.IsZero() {
			r.FirstAt = old.AttestedAt
		}
	}
	return nil
}

func (a *applier) putAgent(r *identity.Agent) (any, error) {
	if err := a.checkAgent(r); err != nil {
		return nil, err
	}
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
	return nil, errors.Join(a.membersChanged(), a.forgetHolder(d.Key))
}

func (a *applier) membersChanged() error {
	members, err := all[identity.Member](a.state, kindMember)
	a.changed(change{members: members, membersChanged: true})
	return err
}
