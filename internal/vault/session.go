package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

const (
	// Run looks at the token at least this often, since a suspended machine stops timers, and at the most this often.
	maxLook = time.Minute
	minLook = time.Second
	// defaultLife is what a token is taken to last whose life the server does not tell: then it is read anew.
	defaultLife = time.Hour
)

// session is a token and how long it lasts.
type session struct {
	token     string
	renewable bool
	renewAt   time.Time // at half its life; zero: never
	endsAt    time.Time // zero: never
}

// auth is what a login answers.
type auth struct {
	ClientToken   string `json:"client_token"`
	LeaseDuration int64  `json:"lease_duration"` // seconds
	Renewable     bool   `json:"renewable"`
}

// login returns a live token. stale is one that the server did not know any longer, or empty.
func (c *Client) login(ctx context.Context, stale string) (string, error) {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return "", fmt.Errorf("%w: waiting to log in: %v", ErrUnavailable, ctx.Err())
	}
	now := c.cfg.Now()
	s := &c.token
	if s.token != "" && s.token != stale && (s.endsAt.IsZero() || now.Before(s.endsAt)) {
		if !s.renewAt.IsZero() && !now.Before(s.renewAt) {
			c.renew(ctx, now)
		}
		if c.token.token != "" {
			return c.token.token, nil
		}
	}
	fresh, err := c.enter(ctx, now)
	if err != nil {
		return "", fmt.Errorf("logging in: %w", err)
	}
	c.token = fresh
	return fresh.token, nil
}

// renew renews the token; where that fails, the token serves on, while it lasts, and the next call tries again. One
// that the server denies is given up. The caller holds turn.
func (c *Client) renew(ctx context.Context, now time.Time) {
	if !c.token.renewable {
		// It cannot be renewed, so log in anew, while the old one still lasts.
		if fresh, err := c.enter(ctx, now); err == nil {
			c.token = fresh
		} else {
			c.postpone(now)
		}
		return
	}
	var a answer
	err := c.call(ctx, http.MethodPost, "auth/token/renew-self", c.token.token, map[string]string{}, &a)
	switch {
	case errors.Is(err, ErrDenied):
		c.token = session{}
	case err != nil || a.Auth == nil:
		c.postpone(now)
	default:
		// A token at the end of its greatest life is renewed to ever shorter ones: then log in anew.
		old := c.token
		a.Auth.ClientToken = old.token
		c.token = newSession(now, *a.Auth)
		if !old.endsAt.IsZero() && !c.token.endsAt.IsZero() && !c.token.endsAt.After(old.endsAt.Add(time.Second)) {
			c.token.renewable = false
		}
	}
}

// postpone puts the next renewal at half of what is left.
func (c *Client) postpone(now time.Time) {
	if left := c.token.endsAt.Sub(now); left > 0 {
		c.token.renewAt = now.Add(max(left/4, minLook))
	}
}

// newSession reckons from before the call, so that it is never later than the server.
func newSession(now time.Time, a auth) session {
	s := session{token: a.ClientToken, renewable: a.Renewable}
	if a.LeaseDuration > 0 {
		life := time.Duration(min(a.LeaseDuration, 1<<31)) * time.Second
		s.renewAt, s.endsAt = now.Add(life/2), now.Add(life)
	}
	return s
}

// enter logs in.
func (c *Client) enter(ctx context.Context, now time.Time) (session, error) {
	switch cfg := c.cfg; {
	case cfg.AppRole != nil:
		secret, err := readSecret(cfg.AppRole.SecretIDFile, true)
		if err != nil {
			return session{}, fmt.Errorf("reading the secret ID: %w", err)
		}
		return c.exchange(ctx, now, mount(cfg.AppRole.Mount, "approle"), map[string]string{"role_id": cfg.AppRole.RoleID, "secret_id": secret})
	case cfg.Kubernetes != nil:
		jwt, err := readSecret(cfg.Kubernetes.TokenPath, false)
		if err != nil {
			return session{}, fmt.Errorf("reading the service account's token: %w", err)
		}
		return c.exchange(ctx, now, mount(cfg.Kubernetes.Mount, "kubernetes"), map[string]string{"role": cfg.Kubernetes.Role, "jwt": jwt})
	}
	token, err := readSecret(c.cfg.TokenFile, true)
	if err != nil {
		return session{}, fmt.Errorf("reading the token: %w", err)
	}
	var look struct {
		TTL       int64 `json:"ttl"` // seconds left; 0: for ever
		Renewable bool  `json:"renewable"`
	}
	switch err := c.call(ctx, http.MethodGet, "auth/token/lookup-self", token, nil, &answer{Data: &look}); {
	case errors.Is(err, ErrDenied):
		// A bad token, or a policy that does not let it look at itself; what is asked for next tells. Read it anew in time.
		return session{token: token, renewAt: now.Add(defaultLife)}, nil
	case err != nil:
		return session{}, fmt.Errorf("looking the token up: %w", err)
	}
	return newSession(now, auth{ClientToken: token, LeaseDuration: look.TTL, Renewable: look.Renewable}), nil
}

func mount(m, def string) string {
	if m == "" {
		return def
	}
	return m
}

func (c *Client) exchange(ctx context.Context, now time.Time, mount string, in map[string]string) (session, error) {
	var a answer
	if err := c.call(ctx, http.MethodPost, "auth/"+mount+"/login", "", in, &a); err != nil {
		// A wrong secret ID is a bad request to the server.
		return session{}, fmt.Errorf("at auth/%s/login: %w", mount, err)
	}
	if a.Auth == nil || a.Auth.ClientToken == "" {
		return session{}, fmt.Errorf("%w: at auth/%s/login: the answer has no token", ErrInvalid, mount)
	}
	return newSession(now, *a.Auth), nil
}

// Run keeps the token alive between calls that are far apart. It returns nil when ctx ends. Without it the token is
// renewed by calls alone.
func (c *Client) Run(ctx context.Context) error {
	for {
		timer := time.NewTimer(c.look(ctx))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// look renews the token if that is due, and returns the time until it is to be looked at again.
func (c *Client) look(ctx context.Context) time.Duration {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return maxLook
	}
	now := c.cfg.Now()
	if c.token.token == "" || c.token.renewAt.IsZero() {
		return maxLook
	}
	if !now.Before(c.token.renewAt) {
		c.renew(ctx, now)
	}
	if c.token.renewAt.IsZero() {
		return maxLook
	}
	return min(max(c.token.renewAt.Sub(now), minLook), maxLook)
}
