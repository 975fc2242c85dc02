package server

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// Home is the kube cluster that the members live in, as every member is configured; zero: none.
type Home struct {
	API HomeAPI // nil: none
	// Cluster is the name under which the leader registers it, with the rest, if it is not registered yet.
	Cluster, Kubeconfig string
	AgentAccounts       []string
	DefaultID           string // empty: the usual one
	// Forms says that the members are pods that form the cluster by themselves: they are admitted by their tokens, and find the
	// bundle in the ConfigMap that the leader makes.
	Forms bool
	// Data is what the ConfigMap is to hold of a bundle. Needed with Forms.
	Data func(*identity.Bundle) (map[string]string, error)
	// Unclaimed reports whether this member began the cluster and has yet to learn that no other one was begun in its place: it issues
	// nothing and admits nobody until then. nil: it is not.
	Unclaimed func() bool
	// Claim ends that. It must be durable when it returns.
	Claim func() error
	// Rival is called when another cluster was begun: this member's must end.
	Rival func(error)
}

// HomeAPI asks the API server of the members' kube cluster. *kube.Home does. Errors wrap identity.ErrUnavailable where nobody can tell.
type HomeAPI interface {
	// VerifyMember must accept only the token, for the audience of members, of the pod of that name which is there now, of the members' own
	// StatefulSet, namespace and service account. It must ask the API server each time.
	VerifyMember(ctx context.Context, token []byte, name string) (*kube.Claims, error)
	// Issuer is what the cluster's tokens name.
	Issuer(ctx context.Context) (string, error)
	// Bundle is what is published; its error wraps identity.ErrNotFound where nothing is.
	Bundle(ctx context.Context) (*kube.PublishedBundle, error)
	// CreateBundle must never overwrite: its error wraps identity.ErrExists then.
	CreateBundle(ctx context.Context, b kube.PublishedBundle) error
	// ConfigMapName says where, for messages.
	ConfigMapName() string
}

const (
	homeAudience = "countersign"
	// homeKeys is where every API server has the keys of its tokens. Keys tell its tokens from those of another cluster that has the same
	// issuer, as many have; TokenReview still decides.
	homeKeys      = "https://kubernetes.default.svc/openid/v1/jwks"
	homeEvery     = time.Minute
	homeRetryMost = 30 * time.Second
)

func (h *Home) check() error {
	if h.API == nil {
		return nil
	}
	if h.Cluster == "" || h.Kubeconfig == "" || h.Forms && h.Data == nil {
		return fmt.Errorf("%w: Home is not whole", identity.ErrInvalid)
	}
	return nil
}

// homeTending is what the leader knows of it.
type homeTending struct {
	problem atomic.Pointer[string] // nil: none
	warn    sync.Once              // of accounts that the registered cluster lacks
}

// say is for operators.
func (h *homeTending) say() []string {
	if p := h.problem.Load(); p != nil {
		return []string{*p}
	}
	return nil
}

// unclaimed says why a member that began a cluster does not serve it yet.
func (s *Server) unclaimed() error {
	if u := s.cfg.Home.Unclaimed; u == nil || !u() {
		return nil
	}
	why := "it is about to publish its bundle"
	if p := s.home.problem.Load(); p != nil {
		why = *p
	}
	return fmt.Errorf("%w: this member has begun a cluster, and must know that no other was begun in its place before it serves anybody: %s", identity.ErrUnavailable, why)
}

// leadHome registers the kube cluster, and keeps its ConfigMap there, for as long as this member leads.
func (s *Server) leadHome(ctx context.Context) {
	said := ""
	for wait := retryFirst; ; wait = min(2*wait, homeRetryMost) {
		err := errors.Join(s.publishHome(ctx), s.registerHome(ctx))
		if ctx.Err() != nil {
			return
		}
		next := wait
		switch {
		case err == nil:
			s.home.problem.Store(nil)
			said, wait, next = "", retryFirst, homeEvery
		case errors.Is(err, errNoRoots):
			wait, next = retryFirst, retryFirst // it will not take long, and says so elsewhere
		default:
			text := err.Error()
			s.home.problem.Store(&text)
			if text != said {
				s.cfg.Log.Warn("cannot do all that this member leads for in its kube cluster: trying again", "kube_cluster", s.cfg.Home.Cluster, "error", err)
			}
			said = text
		}
		if !sleep(ctx, next) {
			return
		}
	}
}

var errNoRoots = fmt.Errorf("%w: the trust domain has no X.509 authority yet", identity.ErrUnavailable)

// publishHome creates the ConfigMap by which the other members find this cluster, if there is none. What it finds is never changed
// here: another cluster's means that this one should not be, or that somebody put it there.
//
// A crash after the creation finds at the next start a ConfigMap with its own root; one before it, none.
func (s *Server) publishHome(ctx context.Context) error {
	h := &s.cfg.Home
	if !h.Forms {
		return nil
	}
	own := s.cfg.State.Bundle()
	if len(own.X509) == 0 {
		return errNoRoots
	}
	found, err := h.API.Bundle(ctx)
	if errors.Is(err, identity.ErrNotFound) {
		if found, err = s.createHome(ctx, own); errors.Is(err, identity.ErrExists) {
			found, err = h.API.Bundle(ctx)
		}
	}
	if err != nil {
		return err
	}
	if err := s.sameCluster(own, found); err != nil {
		if h.Unclaimed != nil && h.Unclaimed() {
			err = fmt.Errorf("%w: another cluster was begun before this member's: it has served nobody. If the other is the one to keep, delete this member's volume and its pod, and it joins; if the ConfigMap is left over from an installation that is gone, delete the ConfigMap (kubectl -n %s delete configmap %s) and start this member again", err, namespaceOf(h.API.ConfigMapName()), kube.BundleConfigMap)
			h.Rival(err)
		}
		return err
	}
	if h.Unclaimed == nil || !h.Unclaimed() {
		return nil
	}
	if err := h.Claim(); err != nil {
		return fmt.Errorf("noting that this cluster is the one: %w", err)
	}
	s.cfg.Log.Info("the cluster that this member began is published: others may join", "config_map", h.API.ConfigMapName())
	return nil
}

func namespaceOf(configMap string) string {
	ns, _, _ := strings.Cut(configMap, "/")
	return ns
}

func (s *Server) createHome(ctx context.Context, own *identity.Bundle) (*kube.PublishedBundle, error) {
	data, err := s.cfg.Home.Data(own)
	if err != nil {
		return nil, fmt.Errorf("encoding the bundle: %w", err)
	}
	b := kube.PublishedBundle{TrustDomain: s.cfg.TrustDomain.Name(), Data: data}
	if err := s.cfg.Home.API.CreateBundle(ctx, b); err != nil {
		return nil, err
	}
	s.cfg.Log.Info("published the trust bundle", "config_map", s.cfg.Home.API.ConfigMapName(), "sequence", own.Sequence)
	return &b, nil
}

// sameCluster refuses a ConfigMap that shares no root with this cluster.
func (s *Server) sameCluster(own *identity.Bundle, found *kube.PublishedBundle) error {
	name := s.cfg.Home.API.ConfigMapName()
	if td := found.TrustDomain; td != "" && td != s.cfg.TrustDomain.Name() {
		return fmt.Errorf("%w: ConfigMap %s is of trust domain %q, not of %q", identity.ErrExists, name, td, s.cfg.TrustDomain.Name())
	}
	for rest := []byte(found.Data[kube.BundlePEM]); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if slices.ContainsFunc(own.X509, func(der []byte) bool { return bytes.Equal(der, b.Bytes) }) {
			return nil
		}
	}
	return fmt.Errorf("%w: ConfigMap %s holds no X.509 authority of this cluster: it is another cluster's, or older than its last rotation", identity.ErrExists, name)
}

// registerHome registers the kube cluster as an operator would with countersign kube add. One that is registered stays as it is.
func (s *Server) registerHome(ctx context.Context) error {
	h := &s.cfg.Home
	if _, ok := s.cfg.State.KubeCluster(h.Cluster); !ok {
		if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil { // it may be there, and this member not know of it
			return fmt.Errorf("registering kube cluster %q: %w", h.Cluster, err)
		}
	}
	if k, ok := s.cfg.State.KubeCluster(h.Cluster); ok {
		s.home.warn.Do(func() {
			for _, a := range h.AgentAccounts {
				if !slices.Contains(k.AgentAccounts, a) {
					s.cfg.Log.Warn("a service account that kubernetes.agent_accounts names may have no agents, for the kube cluster is registered without it: allow it with countersign kube add --replace --agent-account", "kube_cluster", h.Cluster, "account", a)
				}
			}
		})
		return nil
	}
	issuer, err := h.API.Issuer(ctx)
	if err != nil {
		return fmt.Errorf("registering kube cluster %q: %w", h.Cluster, err)
	}
	req := &adminv1.KubeCluster{
		Name: h.Cluster, Issuer: issuer, Audience: homeAudience, JwksUrl: homeKeys, Kubeconfig: h.Kubeconfig, TokenReview: true,
		AgentAccounts: h.AgentAccounts, DefaultId: h.DefaultID,
	}
	return s.asSelf(ctx, adminv1.Admin_AddKubeCluster_FullMethodName, req, func(ctx context.Context) (any, error) {
		return adminService{Server: s}.AddKubeCluster(ctx, req)
	})
}

// asSelf does by this member's own decision what operators do by a call, recorded as theirs are.
func (s *Server) asSelf(ctx context.Context, method string, req any, do func(context.Context) (any, error)) error {
	ctx, a := s.beginAudit(ctx, caller{}, method)
	a.who = audit.Who{Kind: "self"}
	if err := s.attempt(ctx, a, req); err != nil {
		return err
	}
	resp, err := do(ctx)
	return errors.Join(err, s.ended(ctx, a, resp, err))
}

// verifyPod asks the API server about the token of a pod that wants to be a member. A stranger waits for his turn, and is told little
// until his token has proved something.
func (s *Server) verifyPod(ctx context.Context, token []byte, name string) (*kube.Claims, error) {
	if s.cfg.Home.API == nil || !s.cfg.Home.Forms {
		return nil, fmt.Errorf("%w: this member admits no pods by their tokens: set kubernetes.stateful_set on all members, or make a join token (countersign token create --server)", identity.ErrPrecondition)
	}
	release, err := s.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	claims, err := s.cfg.Home.API.VerifyMember(ctx, token, name)
	if err != nil && !errors.Is(err, identity.ErrDenied) && !errors.Is(err, identity.ErrPrecondition) {
		err = &withheld{err, "verifying the pod's token: " + kube.Reason(err)}
	}
	return claims, err
}
