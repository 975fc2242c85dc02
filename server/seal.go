package server

import (
	"context"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// Sealing is how the seal's data keys live and change: what the cluster remembers of them, and this member's own. The
// zero value is a seal that never changes. All of it must be set otherwise, but for what says so.
type Sealing struct {
	// Terms are this member's copy of the replicated ones.
	Terms  func() []identity.SealTerm
	Writes SealWriter
	Keys   SealKeys
	// Active is the data key that this member seals with; TermOf is the one that a ciphertext is sealed under.
	Active func() uint32
	TermOf func(ciphertext []byte) (uint32, bool)
	// Open opens what was sealed, to be sealed anew; the plaintext is cleared after that.
	Open func(ciphertext, ad []byte) ([]byte, error)
	// Rewrap wraps this member's keyring anew, under its present key-encryption key.
	Rewrap func(ctx context.Context) error
	// Fetch gets the data keys of another member, in plain, by its Member.Keyring.
	Fetch func(ctx context.Context, m identity.Member) ([]byte, error)
}

// SealWriter changes what the cluster remembers of data keys. See Writes. Only from level 2 on.
type SealWriter interface {
	// PutSealTerm must refuse with identity.ErrPrecondition while another is pending, and for numbers that are not new.
	PutSealTerm(ctx context.Context, now time.Time, number uint32, keyID []byte) error
	AckSealTerm(ctx context.Context, number uint32, member string) error
	// ActivateSealTerm must refuse with identity.ErrPrecondition unless every member has acknowledged it.
	ActivateSealTerm(ctx context.Context, number uint32) error
	DropSealTerm(ctx context.Context, number uint32) error
	// ResealAuthority must refuse with identity.ErrPrecondition if the authority changed since ifRevision.
	ResealAuthority(ctx context.Context, kind identity.AuthorityKind, id string, sealedKey []byte, ifRevision uint64) error
}

// SealKeys are this member's data keys. A change must be on its disk when the method returns.
type SealKeys interface {
	KeyID(number uint32) ([]byte, bool)
	// Generate adds a random key that seals nothing yet.
	Generate(ctx context.Context) (number uint32, keyID []byte, err error)
	// Take takes the key of that number out of another member's keyring (plain) if it is there and has that ID, in place of
	// what this member has under the number. It must leave plain as it is.
	Take(ctx context.Context, plain []byte, number uint32, keyID []byte) (taken bool, err error)
	// Forget drops a key that this member made and the cluster did not take. Another one that has come under its number must stay.
	Forget(ctx context.Context, number uint32, keyID []byte) error
	// Activate makes a key the one that seals; that needs not be on disk.
	Activate(number uint32) error
}

const (
	// levelSeal is the level from which on the cluster remembers data keys.
	levelSeal = 2
	fetchTime = 10 * time.Second
)

func (c *Sealing) on() bool { return c.Keys != nil }

func (c *Sealing) check() error {
	if !c.on() || c.Terms != nil && c.Writes != nil && c.Active != nil && c.TermOf != nil && c.Open != nil && c.Rewrap != nil && c.Fetch != nil {
		return nil
	}
	return fmt.Errorf("%w: Sealing is set in part only", identity.ErrInvalid)
}

// sealTending is the state of the seal's two loops.
type sealTending struct {
	member, leader chan struct{} // each has an element when its loop should look again
}

func newSealTending() sealTending {
	return sealTending{make(chan struct{}, 1), make(chan struct{}, 1)}
}

func (t sealTending) wake() {
	for _, c := range []chan struct{}{t.member, t.leader} {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// concernsSeal reports whether a change may be something for the seal's loops.
func concernsSeal(c identity.Change) bool {
	return c.Reset || c.Seal || c.Members || c.Level || c.Bundle
}

// Keyring gives another member the data keys, all that this one has: one that was down while they changed, or all of them
// while they do. The caller must be on the list of members now, not only have the SVID of one.
func (s memberService) Keyring(ctx context.Context, _ *memberv1.KeyringRequest) (*memberv1.KeyringResponse, error) {
	name, err := s.currentMember(ctx, callOf(ctx).caller)
	if err != nil {
		return nil, err
	}
	if err := s.audit(ctx, audit.Event{Action: audit.GiveKeyring, Outcome: audit.OK, Subjects: []string{name}}); err != nil {
		return nil, err
	}
	plain, err := s.cfg.Keyring()
	if err != nil {
		return nil, fmt.Errorf("reading the keyring: %w", err)
	}
	wipeAfter(ctx, plain)
	s.cfg.Log.Info("data keys given to a member", "member", name)
	return &memberv1.KeyringResponse{Keyring: plain}, nil
}

func (s *Server) currentMember(ctx context.Context, c caller) (string, error) {
	prefix := "/" + identity.ReservedPath + "/member/"
	name, ok := strings.CutPrefix(c.id.Path(), prefix)
	if !ok || c.kind != member || c.id.TrustDomain() != s.cfg.TrustDomain {
		return "", fmt.Errorf("%w: data keys are for members only", identity.ErrDenied)
	}
	if now := s.cfg.Now(); !now.Before(c.expires) {
		return "", fmt.Errorf("%w: the SVID that this connection was made with expired at %s", identity.ErrUnauthenticated, c.expires.UTC().Format(time.RFC3339))
	}
	// A member that was removed must not get keys from one that has yet to hear of it.
	if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
		return "", fmt.Errorf("%w: making sure who is a member: %w", identity.ErrUnavailable, err)
	}
	// The roots of an upstream are in the bundle, and whoever else signs below them could sign a member's name.
	if !s.issuedHere(c) {
		return "", fmt.Errorf("%w: the certificate of %s was not issued by a member of this cluster", identity.ErrDenied, c.id)
	}
	for _, m := range s.cfg.State.Members() {
		if m.ID == name {
			return name, nil
		}
	}
	return "", fmt.Errorf("%w: %s is not on the list of members: it was removed, or is not registered yet", identity.ErrDenied, c.id)
}

// issuedHere reports whether a member's issuer, below an authority of this cluster's own, signed the caller's certificate.
func (s *Server) issuedHere(c caller) bool {
	if c.chain == nil || len(*c.chain) < 2 {
		return false
	}
	leaf, issuer, now := (*c.chain)[0], (*c.chain)[1], s.cfg.Now()
	if !issuer.MaxPathLenZero || issuer.MaxPathLen != 0 || now.After(issuer.NotAfter) || leaf.CheckSignatureFrom(issuer) != nil {
		return false
	}
	return slices.ContainsFunc(s.cfg.State.Authorities(), func(a identity.Authority) bool {
		if a.Kind != identity.AuthorityX509 || !a.State.Vouched() { // below an upstream, what is revoked chains to the bundle still
			return false
		}
		cert, err := x509.ParseCertificate(a.Cert)
		return err == nil && issuer.CheckSignatureFrom(cert) == nil
	})
}

// tendSeal keeps this member's data keys what the cluster's state says, until ctx ends.
func (s *Server) tendSeal(ctx context.Context) error {
	var told string
	for wait := retryFirst; ; {
		urgent, err := s.takeTerms(ctx)
		switch {
		case err == nil: // there is nothing to do before something changes
			wait, told = retryFirst, ""
		case ctx.Err() == nil && err.Error() != told:
			told = err.Error()
			s.cfg.Log.Warn("this member's data keys are not what the cluster's are: trying again", "error", err)
			wait = min(2*wait, retryMost)
		case urgent:
			wait = min(2*wait, retryMost)
		default: // a retired key that is lost, perhaps for good: the others are not to be asked all the time
			wait = min(2*wait, sweepEvery)
		}
		timer := time.NewTimer(wait)
		if err == nil {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-s.seal.member:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// takeTerms fetches the keys that this member lacks, seals with the active one, and says of a pending one that it is kept
// here: by then it is on disk. What a crash leaves is a key too much, or one that is fetched after the start. urgent says
// that more than retired keys is missing.
func (s *Server) takeTerms(ctx context.Context) (urgent bool, err error) {
	c := &s.cfg.Sealing
	var errs []error
	for _, t := range c.Terms() {
		if !s.holds(&t) {
			if err := s.fetchTerm(ctx, t); err != nil {
				urgent = urgent || t.State != identity.SealRetired
				errs = append(errs, err)
				continue
			}
		}
		switch t.State {
		case identity.SealActive:
			if err := c.Keys.Activate(t.Number); err != nil {
				urgent = true
				errs = append(errs, err)
			}
		case identity.SealPending:
			if slices.Contains(t.Holders, s.cfg.MemberID) {
				continue
			}
			if err := c.Writes.AckSealTerm(ctx, t.Number, s.cfg.MemberID); err != nil {
				urgent = true
				errs = append(errs, fmt.Errorf("acknowledging data key %d: %w", t.Number, err))
			}
		}
	}
	return urgent, errors.Join(errs...)
}

// holds reports whether this member has the very key.
func (s *Server) holds(t *identity.SealTerm) bool {
	id, ok := s.cfg.Sealing.Keys.KeyID(t.Number)
	return ok && subtle.ConstantTimeCompare(id, t.KeyID) == 1
}

// fetchTerm asks the other members for a key, those first that said they keep it.
func (s *Server) fetchTerm(ctx context.Context, t identity.SealTerm) error {
	c := &s.cfg.Sealing
	if _, other := c.Keys.KeyID(t.Number); other {
		// What this member has under the number was made by it and never taken by the cluster, or the state here is old. A number
		// that was once active is never used again: as of now, the state is right.
		if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
			return fmt.Errorf("data key %d is another one here: making sure: %w", t.Number, err)
		}
		if !slices.ContainsFunc(c.Terms(), func(n identity.SealTerm) bool {
			return n.Number == t.Number && subtle.ConstantTimeCompare(n.KeyID, t.KeyID) == 1
		}) {
			return fmt.Errorf("%w: data key %d changed meanwhile", identity.ErrUnavailable, t.Number)
		}
	}
	members := slices.DeleteFunc(s.cfg.State.Members(), func(m identity.Member) bool { return m.ID == s.cfg.MemberID })
	slices.SortStableFunc(members, func(a, b identity.Member) int {
		return holderRank(&t, a) - holderRank(&t, b)
	})
	var errs []error
	for _, m := range members {
		taken, err := s.takeFrom(ctx, m, &t)
		if taken {
			s.cfg.Log.Info("data key fetched", "term", t.Number, "from", m.ID)
			return nil
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("from %s: %w", m.ID, err))
		}
	}
	return fmt.Errorf("%w: data key %d (%s) is not here, and no other member gave it: %w", identity.ErrUnavailable, t.Number, t.State, errors.Join(errs...))
}

func holderRank(t *identity.SealTerm, m identity.Member) int {
	if slices.Contains(t.Holders, m.ID) {
		return 0
	}
	return 1
}

func (s *Server) takeFrom(ctx context.Context, m identity.Member, t *identity.SealTerm) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	plain, err := s.cfg.Sealing.Fetch(ctx, m)
	if err != nil {
		return false, err
	}
	defer clear(plain)
	return s.cfg.Sealing.Keys.Take(ctx, plain, t.Number, t.KeyID)
}
