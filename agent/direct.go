package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/api"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

// DirectConfig is for a workload that has no agent beside it and asks a member itself. Servers, Token and one of Pin, Bundle and
// Roots are mandatory.
type DirectConfig struct {
	TrustDomain spiffeid.TrustDomain // zero: that of the member that Pin or Bundle vouches for
	Servers     []string             // host:port
	Pin         string               // sha256:HEX of the root's SubjectPublicKeyInfo
	Bundle      *identity.Bundle
	Roots       func() ([][]byte, error) // as in Config
	Token       []byte                   // the pod's own service account token, bound to the cluster's audience
	KeyType     KeyType
	Log         *slog.Logger
	Dial        func(ctx context.Context, address string) (net.Conn, error) // nil: TCP
}

// Direct asks the members in turn for the X.509-SVIDs of the pod that the token names, with a key made here. What comes back is
// verified as an agent would. The error wraps identity.ErrDenied or ErrUnauthenticated for a refusal, ErrUnavailable when no
// member answers, ErrInvalid for a bad configuration.
func Direct(ctx context.Context, cfg DirectConfig) (*identity.Update, error) {
	var out *identity.Update
	err := direct(ctx, cfg, func(ctx context.Context, c workloadv1.WorkloadClient, kt KeyType, seen memberSeen) error {
		key, err := kt.makePair()
		if err != nil {
			return err
		}
		resp, err := c.IssueX509(ctx, &workloadv1.IssueX509Request{
			Requests: []*workloadv1.X509Request{{Evidence: &workloadv1.Evidence{Token: string(cfg.Token)}, PublicKey: key.public}},
		})
		if err != nil {
			return api.FromStatus(err)
		}
		if len(resp.Results) != 1 {
			return fmt.Errorf("%w: %d results for one request", errAnswer, len(resp.Results))
		}
		if e := resp.Results[0].GetError(); e != nil && e.Code != 0 { // decided, whether or not a bundle came along
			res, err := takeResult(nil, resp.Results[0], nil, 0, key, time.Time{})
			return errors.Join(err, res.err)
		}
		t, err := trustFromAnswer(resp.Bundle, seen.trustDomain(), resp.Federated...)
		if err != nil {
			return err
		}
		res, err := takeResult(t, resp.Results[0], resp.IssuerChain, resp.Revision, key, time.Now())
		if err = errors.Join(err, res.err); err != nil {
			return err
		}
		out = &identity.Update{SVIDs: res.svids, Bundles: t.bundlesFor(res.svids)}
		return nil
	})
	return out, err
}

// DirectJWT asks the members in turn for JWT-SVIDs of the pod that the token names: of the identity id, or of all if id is zero.
// Errors are as those of Direct.
func DirectJWT(ctx context.Context, cfg DirectConfig, audience []string, id spiffeid.ID) ([]identity.JWTSVID, *identity.Bundle, error) {
	audience, err := checkAudience(audience)
	if err != nil {
		return nil, nil, err
	}
	var out jwtAnswer
	var bundle *identity.Bundle
	err = direct(ctx, cfg, func(ctx context.Context, c workloadv1.WorkloadClient, _ KeyType, seen memberSeen) error {
		req := &workloadv1.IssueJWTRequest{Evidence: &workloadv1.Evidence{Token: string(cfg.Token)}, Audience: audience}
		if !id.IsZero() {
			req.SpiffeId = id.String()
		}
		resp, err := c.IssueJWT(ctx, req)
		if err != nil {
			return api.FromStatus(err)
		}
		t, err := trustFromAnswer(resp.Bundle, seen.trustDomain())
		if err != nil {
			return err
		}
		bundle = t.own
		out, err = takeJWTs(t.jwt, resp.Svids, audience, id, time.Now())
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return out.svids, bundle, nil
}

// trustFromAnswer takes the bundle in an answer to a caller without a certificate. It came from a member that the pin or the
// given bundle vouched for.
func trustFromAnswer(b *workloadv1.Bundle, td spiffeid.TrustDomain, federated ...*workloadv1.Bundle) (*trust, error) {
	own, err := api.BundleFromWire(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errAnswer, err)
	}
	others := make([]*identity.Bundle, len(federated))
	for i, f := range federated {
		if others[i], err = api.BundleFromWire(f); err != nil {
			return nil, fmt.Errorf("%w: %w", errAnswer, err)
		}
	}
	t, err := newTrust(nil, td, own, others)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errAnswer, err)
	}
	return t, nil
}

// question is one call to a member that seen has verified.
type question func(ctx context.Context, c workloadv1.WorkloadClient, kt KeyType, seen memberSeen) error

func direct(ctx context.Context, cfg DirectConfig, ask question) error {
	if len(cfg.Token) == 0 || len(cfg.Token) > identity.MaxTokenBytes {
		return fmt.Errorf("asking a member directly: %w: the token has %d bytes: want 1 to %d", identity.ErrInvalid, len(cfg.Token), identity.MaxTokenBytes)
	}
	// An agent that is never run has all the rest: the checks of the configuration, the dialling, what verifies a member.
	a, err := New(Config{
		TrustDomain: cfg.TrustDomain, Servers: cfg.Servers, Pin: cfg.Pin, Bundle: cfg.Bundle, Roots: cfg.Roots, KeyType: cfg.KeyType,
		Credential: KubeToken("", nil), Log: cfg.Log, Dial: cfg.Dial,
	})
	if err != nil {
		return fmt.Errorf("asking a member directly: %w", err)
	}
	var errs []error
	for _, addr := range a.addresses() {
		err := a.askDirect(ctx, addr, ask)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("asking member %s: %w", addr, err)
		if !transient(err) || ctx.Err() != nil {
			return err
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("%w: %w", identity.ErrUnavailable, errors.Join(errs...))
}

func (a *Agent) askDirect(ctx context.Context, addr string, ask question) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	seen := make(memberSeen, 1)
	conn, err := a.dial(addr, clientTLS(a.firstContact, nil, seen), attemptTimeout, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	return ask(ctx, workloadv1.NewWorkloadClient(conn), a.cfg.KeyType, seen)
}
