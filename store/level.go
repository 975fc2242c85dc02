package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"countersign.io/countersign/identity"
)

// Level is the highest level that this version knows. A cluster's level says which commands, kinds of records and fields
// of them its members can all apply: 1 is what there was before levels, 2 adds set_level itself, admit_agent, the seal's
// terms, the life of authorities and their rotations, what other clusters of the trust domain publish, downstream entries,
// roles of admin entries, selectors of labels and owners, and federation. It is part of the
// state and only goes up. What a level adds is refused below it, by the Writer before it proposes, since a member that knows
// less would stop, and by Apply.
const Level = 2

// level2 is what most of a version's additions need; those of the next one get a constant of their own.
const level2 = 2

// clusterRecord is what the state says of itself, under the key clusterKey. There is none at level 1, whose snapshots
// are those of the version before levels.
type clusterRecord struct {
	Level uint32 `json:"level"`
}

const clusterKey = "cluster"

func (c *clusterRecord) check() error {
	if c.Level < level2 || c.Level > Level {
		return fmt.Errorf("%w: the state has level %d, and this version knows up to %d: upgrade this member to the version of the others", identity.ErrInvalid, c.Level, Level)
	}
	return nil
}

func (t state) level() (uint32, error) {
	c, err := get[clusterRecord](t, kindCluster, clusterKey)
	if err != nil || c == nil {
		return 1, err
	}
	return c.Level, c.check()
}

func levelOfEntry(e *identity.Entry) uint32 {
	if e.Downstream || e.AdminRole != "" || !e.PowerSince.IsZero() || e.ManagedBy != "" || slices.ContainsFunc(e.Selectors, identity.Selector.Fact) {
		return level2
	}
	return 1
}

func levelOfKube(k *identity.KubeCluster) uint32 {
	if k.ManagedBy != "" {
		return level2
	}
	return 1
}

func levelOfAuthority(a *identity.Authority) uint32 {
	later := a.State == identity.AuthorityTainted || a.State == identity.AuthorityRevoked || a.Sequence > 0 || a.Spread > 0 || len(a.Vouched) > 0
	for _, t := range []time.Time{a.PreparedAt, a.ActivatedAt, a.RetiredAt, a.TaintedAt, a.RevokedAt} {
		later = later || !t.IsZero()
	}
	if later || a.KeyURI != "" || len(a.Chain) > 0 || len(a.Roots) > 0 || a.Upstream != "" {
		return level2
	}
	return 1
}

func needLevel(have, need uint32, what string) error {
	if have >= need {
		return nil
	}
	return fmt.Errorf("%w: %s must wait until every member runs this version (level %d; the cluster is at level %d): countersign cluster status shows versions",
		identity.ErrPrecondition, what, need, have)
}

// Level is what the cluster's members can all apply: see the constant.
func (s *Store) Level() uint32 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.view.level
}

// SetLevel raises the cluster's level; a level that it has already is no error, a lower one is ErrPrecondition. The caller
// knows that every member knows the level: one that does not stops at this command.
func (w *Writer) SetLevel(ctx context.Context, level uint32) error {
	if level < 1 || level > Level {
		return fmt.Errorf("%w: level %d: this version knows 1 to %d", identity.ErrInvalid, level, Level)
	}
	if level == w.store.Level() {
		return nil
	}
	return w.do(ctx, setLevel, time.Time{}, setLevelData{level})
}

type setLevelData struct {
	Level uint32 `json:"level"`
}

// known makes a member stop that does not know what is to come.
func (d *setLevelData) known() error {
	if d.Level > Level {
		return fmt.Errorf("level %d, known is %d", d.Level, Level)
	}
	return nil
}

// setLevel brings the bundle into the order of the new level, which is no change of what it says.
func (a *applier) setLevel(d *setLevelData) (any, error) {
	if d.Level < a.level {
		return nil, fmt.Errorf("%w: the cluster is at level %d, and a level never goes down", identity.ErrPrecondition, a.level)
	}
	if d.Level == a.level {
		return nil, nil
	}
	if err := put(a.state, kindCluster, clusterKey, clusterRecord{d.Level}); err != nil {
		return nil, err
	}
	a.level = d.Level
	now, err := a.vouched()
	if err != nil {
		return nil, err
	}
	a.changed(change{level: d.Level, vouched: now})
	return nil, nil
}
