package csi

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/workloadapi"
	"countersign.io/countersign/workloadapi/files"
)

const (
	jwtPrefix   = "jwt-"
	keyFile     = "key.pem"
	fetchLimit  = 10 * time.Second // for the JWT-SVIDs of one volume
	retryFirst  = time.Second
	retryAtMost = time.Minute
)

// isSecret reports whether a file's content is to be wiped.
func isSecret(name string) bool { return name == keyFile || strings.HasPrefix(name, jwtPrefix) }

// keeper keeps the files of one volume as its identity is. What it has written stays when the identity is withdrawn, until it
// expires, as what a program got from the socket does.
type keeper struct {
	v      *volume
	dir    string
	source workloadapi.Source
	log    *slog.Logger
	now    func() time.Time
	retry  time.Duration // after the first failure; it doubles up to retryAtMost

	cancel context.CancelFunc
	wg     sync.WaitGroup
	first  chan struct{} // closed once all files are there

	mu     sync.Mutex
	update *identity.Update // the newest
	ended  error            // why the identity is not followed at the moment
	unmade error            // why the files are not as the identity is
	wake   chan struct{}    // cap 1: the update is another one
	again  chan struct{}    // cap 1: watch need not wait any longer
}

// start keeps the files until stop.
func (k *keeper) start() {
	ctx, cancel := context.WithCancel(context.Background())
	k.cancel, k.first, k.wake, k.again = cancel, make(chan struct{}), make(chan struct{}, 1), make(chan struct{}, 1)
	k.wg.Go(func() { k.watch(ctx) })
	k.wg.Go(func() { k.write(ctx) })
}

func (k *keeper) stop() { k.cancel(); k.wg.Wait() }

// wait returns once the files are there, or says why they are not when ctx ends.
func (k *keeper) wait(ctx context.Context) error {
	select {
	case <-k.first:
		return nil
	case <-ctx.Done():
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := errors.Join(k.ended, k.unmade); err != nil {
		return fmt.Errorf("%w: the volume's files: %w", identity.ErrUnavailable, err)
	}
	return fmt.Errorf("%w: the volume's files could not be written in time", identity.ErrUnavailable)
}

// failed notes in one of ended and unmade why.
func (k *keeper) failed(where *error, what string, err error) {
	k.log.Warn(what, "namespace", k.v.Pod.Namespace, "pod", k.v.Pod.Name, "volume", k.v.Volume, "error", err)
	k.mu.Lock()
	defer k.mu.Unlock()
	*where = err
}

// poke has what went wrong tried again at once: there is a newer token.
func (k *keeper) poke() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ended != nil {
		signal(k.again)
	}
	if k.unmade != nil {
		signal(k.wake)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// watch follows the identity. When it ends, there may be one again.
func (k *keeper) watch(ctx context.Context) {
	for wait := k.retry; ; wait = min(2*wait, retryAtMost) {
		err := k.source.Updates(ctx, k.v.attest, func(u *identity.Update) error {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.update, k.ended, wait = u, nil, k.retry
			signal(k.wake)
			return nil
		})
		if ctx.Err() != nil {
			return
		}
		k.failed(&k.ended, "the identity for a volume's files ended: asking again", err)
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-k.again:
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// write writes what watch finds, and renews the JWT-SVIDs.
func (k *keeper) write(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	var held []identity.JWTSVID // as the volume's JWTs; an empty one is none
	var done bool
	retry := k.retry
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.wake:
		case <-timer.C:
		}
		k.mu.Lock()
		u := k.update
		k.mu.Unlock()
		if u == nil || len(u.SVIDs) == 0 {
			continue
		}
		var next time.Time
		var err error
		if len(k.v.JWTs) > 0 {
			held, next, err = k.renewJWTs(ctx, u.SVIDs[0].ID, held)
		}
		if err == nil || done { // the first time all or nothing; later one is not held up by the other
			if werr := k.publish(u, held); werr != nil {
				err = errors.Join(err, werr)
			} else if err == nil && !done {
				done = true
				close(k.first)
			}
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			k.failed(&k.unmade, "a volume's files could not be renewed: trying again", err)
			timer.Reset(retry)
			retry = min(2*retry, retryAtMost)
			continue
		}
		retry = k.retry
		k.mu.Lock()
		k.unmade = nil
		k.mu.Unlock()
		if !next.IsZero() {
			timer.Reset(max(next.Sub(k.now()), time.Second))
		}
	}
}

// renewJWTs fetches those of an ID that are past half of their life, and says when the next one is. On an error the others are returned all the
// same.
func (k *keeper) renewJWTs(ctx context.Context, id spiffeid.ID, held []identity.JWTSVID) ([]identity.JWTSVID, time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchLimit)
	defer cancel()
	out := make([]identity.JWTSVID, len(k.v.JWTs))
	var next time.Time
	var errs []error
	for i, j := range k.v.JWTs {
		if len(held) > i && held[i].ID == id {
			out[i] = held[i]
		}
		if half := halfLife(&out[i]); out[i].Token == "" || !k.now().Before(half) {
			got, err := k.source.FetchJWT(ctx, k.v.attest, []string{j.Audience}, id)
			if err == nil && len(got) == 0 {
				err = fmt.Errorf("%w: no JWT-SVID", identity.ErrUnavailable)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("fetching the JWT-SVID for %s: %w", jwtPrefix+j.Name, err))
				continue
			}
			out[i] = got[0]
		}
		if half := halfLife(&out[i]); next.IsZero() || half.Before(next) {
			next = half
		}
	}
	return out, next, errors.Join(errs...)
}

func halfLife(s *identity.JWTSVID) time.Time { return s.IssuedAt.Add(s.ExpiresAt.Sub(s.IssuedAt) / 2) }

// publish writes all files as one generation.
//
// Whoever reaches the volume may connect to the socket in it and be given the same key, so the key's mode guards nothing that the
// folder does not. With a group (the pod's fsGroup) the secrets are 0640, as programs demand that look at the mode of their
// key; without one they are 0644, or a pod whose user is not root could not read them at all.
func (k *keeper) publish(u *identity.Update, jwts []identity.JWTSVID) error {
	mode, gid := os.FileMode(0o644), 0
	if g := k.v.Group; g != nil {
		mode, gid = 0o640, *g
	}
	svid := &u.SVIDs[0]
	bundle := u.Bundles[svid.ID.TrustDomain()]
	if bundle == nil || len(svid.Chain) == 0 || len(svid.Key) == 0 {
		return fmt.Errorf("the identity %s lacks its key, chain or bundle", svid.ID)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: svid.Key})
	defer clear(key)
	list := []files.File{
		{Name: keyFile, Data: key, Mode: mode, GID: gid},
		{Name: "svid.pem", Data: certificates(svid.Chain), Mode: 0o644, GID: gid},
		{Name: "bundle.pem", Data: certificates(bundle.X509), Mode: 0o644, GID: gid},
	}
	for td, b := range u.Bundles { // those of federated trust domains, each by itself: they are never merged
		if td != svid.ID.TrustDomain() {
			list = append(list, files.File{Name: "bundle-" + td.Name() + ".pem", Data: certificates(b.X509), Mode: 0o644, GID: gid})
		}
	}
	for i := range jwts {
		if jwts[i].Token != "" {
			list = append(list, files.File{Name: jwtPrefix + k.v.JWTs[i].Name, Data: []byte(jwts[i].Token), Mode: mode, GID: gid})
		}
	}
	slices.SortFunc(list, func(a, b files.File) int { return strings.Compare(a.Name, b.Name) })
	return files.Publish(k.dir, list)
}

func certificates(ders [][]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// sleep reports whether ctx goes on.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
