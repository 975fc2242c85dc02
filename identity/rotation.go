package identity

import (
	"fmt"
	"slices"
	"time"
)

// RotationPhase is what a rotation is at.
type RotationPhase string

// The phases in order. Done and RolledBack end it.
const (
	RotationPrepare    RotationPhase = "prepare"    // the new authority is to be made
	RotationActivate   RotationPhase = "activate"   // it is in the bundle, and waits for whoever must trust it
	RotationRevoke     RotationPhase = "revoke"     // it signs, and the old one waits until nothing live is under it
	RotationDone       RotationPhase = "done"       // the old one is revoked
	RotationRolledBack RotationPhase = "rolledback" // the new one is gone before it signed
)

// Rotation is the replacing of one authority by another, as replicated: the last one of its kind, or the one under way.
type Rotation struct {
	Kind  AuthorityKind `json:"kind"`
	New   string        `json:"new,omitempty"` // ID of the authority that comes; empty while it is to be made
	Old   string        `json:"old,omitempty"` // ID of the one that goes
	Phase RotationPhase `json:"phase"`
	Why   string        `json:"why"` // who began it, or that it was due

	StartedAt time.Time `json:"started_at"`
	PhaseAt   time.Time `json:"phase_at"` // when the phase began

	// NotBefore is when the new one signs at the earliest; zero: as soon as everyone trusts it.
	NotBefore time.Time `json:"not_before,omitzero"`
	// AckDeadline bounds the phase activate, and UseDeadline the phase revoke, each from its beginning: then it goes on without
	// those that it waits for. Zero: never.
	AckDeadline time.Duration `json:"ack_deadline,omitempty"`
	UseDeadline time.Duration `json:"use_deadline,omitempty"`
	// Taint has the old one tainted as soon as the new one signs: what it signed is replaced at once, not at half-life.
	Taint bool `json:"taint,omitempty"`
	// Compromised: whoever has pinned the old one, or one before, must not be led to the new one by it.
	Compromised bool `json:"compromised,omitempty"`
	// Ignore are SPIFFE IDs of agents and clusters below, and names of members, that it does not wait for; sorted.
	Ignore []string `json:"ignore,omitempty"`

	Revision uint64 `json:"revision,omitempty"`
}

// MaxIgnored bounds Rotation.Ignore.
const MaxIgnored = 1000

// Ended reports whether there is nothing left to do.
func (r *Rotation) Ended() bool { return r.Phase == RotationDone || r.Phase == RotationRolledBack }

// Check finds what no rotation can be.
func (r *Rotation) Check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: rotation of %q: "+format, append([]any{ErrInvalid, r.Kind}, args...)...)
	}
	if r.Kind != AuthorityX509 && r.Kind != AuthorityJWT {
		return bad("want a kind, %s or %s", AuthorityX509, AuthorityJWT)
	}
	switch r.Phase {
	case RotationPrepare, RotationRolledBack:
	case RotationActivate, RotationRevoke, RotationDone:
		if r.New == "" {
			return bad("phase %s without a new authority", r.Phase)
		}
	default:
		return bad("unknown phase %q", r.Phase)
	}
	if r.AckDeadline < 0 || r.UseDeadline < 0 {
		return bad("a deadline is negative")
	}
	if len(r.Ignore) > MaxIgnored || !slices.IsSorted(r.Ignore) || len(r.Why) > 4096 {
		return bad("%d names to ignore, at the most %d, sorted; %d bytes of why, at the most 4096", len(r.Ignore), MaxIgnored, len(r.Why))
	}
	return nil
}
