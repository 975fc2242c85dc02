package store

import (
	"fmt"
	"time"

	"countersign.io/countersign/identity"
)

type putRotationData struct {
	Rotation   identity.Rotation `json:"rotation"`
	IfRevision uint64            `json:"if_revision,omitempty"` // 0: there is none under way
}

// putRotation begins a rotation, or moves one on. Two leaders in a row, or two operators, cannot both: each names the revision
// that it saw.
func (a *applier) putRotation(d *putRotationData) (any, error) {
	r := &d.Rotation
	if err := r.Check(); err != nil {
		return nil, err
	}
	old, err := get[identity.Rotation](a.state, kindRotation, string(r.Kind))
	if err != nil {
		return nil, err
	}
	switch {
	case d.IfRevision == 0 && old != nil && !old.Ended():
		return nil, fmt.Errorf("%w: a rotation of the %s authority is under way since %s: wait for it, or roll it back", identity.ErrPrecondition, r.Kind, old.StartedAt.Format(time.RFC3339))
	case d.IfRevision != 0 && (old == nil || old.Revision != d.IfRevision):
		return nil, fmt.Errorf("%w: the rotation of the %s authority has moved on meanwhile: look at it again", identity.ErrPrecondition, r.Kind)
	}
	r.StartedAt, r.PhaseAt, r.NotBefore = r.StartedAt.UTC(), r.PhaseAt.UTC(), r.NotBefore.UTC()
	r.Revision = a.index
	if err := put(a.state, kindRotation, string(r.Kind), r); err != nil {
		return nil, err
	}
	all, err := all[identity.Rotation](a.state, kindRotation)
	if err != nil {
		return nil, err
	}
	a.changed(change{rotations: all})
	return r, nil
}
