// Package kube is the members' half of pod attestation. It verifies that a service account token is a pod's own:
// signed by the kube cluster (JWKS, held offline or fetched), vouched for by its API server (TokenReview), or both;
// meant for Countersign, bound to a pod and a node, and not of a pod that is gone or has finished.
//
// Tokens are looked at and forgotten: nothing here keeps, logs or repeats one, and no error contains any part of
// one but the claims that name things (issuer, audience, namespace, pod), quoted and cut short.
//
// With a kubeconfig a member also watches the cluster's pods, remembering nothing but their UIDs, so that the
// tokens of a pod are refused, and its identity ended, as soon as it is gone; and, while entries name labels or owners, those
// labels and owners (facts.go). The kubeconfig's user needs: create on
// tokenreviews.authentication.k8s.io (ClusterRole system:auth-delegator) for TokenReview; get, list and watch on
// pods, and for labels of namespaces and owners on namespaces and replicasets.apps; and for a JWKS behind the API server
// ClusterRole system:service-account-issuer-discovery.
//
// One faulty cluster (a kubeconfig that cannot be read, a JWKS endpoint that hangs) never affects another.
package kube

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"countersign.io/countersign/identity"
)

// Config is what a Verifier needs. Zero durations and counts mean the defaults.
type Config struct {
	Log *slog.Logger
	Now func() time.Time
	// MaxTombstones bounds, per cluster, the remembered UIDs of pods that are gone; default 16384. A forgotten one
	// costs a question to the API server, never an identity.
	MaxTombstones int
	// FetchInterval is the least time between two fetches of one JWKS, however many unknown key IDs are shown;
	// default 10 s.
	FetchInterval time.Duration
	// RefreshInterval is how often Run fetches each JWKS anew, so that a withdrawn key stops being trusted; default 5 min.
	RefreshInterval time.Duration
	// RequestTimeout is for what a pod waits for: one fetch, one TokenReview or one question about a pod; default 3 s. It must
	// end before the agent gives up on the member (5 s): the pod is to hear that it is the API server that hangs, and the agent not
	// to look for another member.
	RequestTimeout time.Duration
	// ListTimeout is for one page of the list of pods; default 15 s.
	ListTimeout time.Duration
	// WatchTime is how long a watch lasts at the least, and half of how long at the most; default 5 min.
	WatchTime time.Duration
	// RetryInterval is the wait before a watch is tried again, doubling up to 32 times itself, and the least time between two
	// readings of a faulty kubeconfig; default 1 s.
	RetryInterval time.Duration
}

// Verifier verifies service account tokens of the clusters it was given. It is safe for concurrent use.
type Verifier struct {
	cfg      Config
	clusters atomic.Pointer[clusterSet]
	setMu    sync.Mutex // held by SetClusters and SetInterest
	// interests is what SetInterest was given last
	interests map[string]identity.Interest
	changed   chan struct{} // tells Run that clusters has changed; of capacity 1
	running   atomic.Bool
}

// clusterSet is immutable once published.
type clusterSet struct {
	all      []*cluster // sorted by name
	byIssuer map[string][]*cluster
}

// cluster is one registered kube cluster. It is immutable; keys and api live on from one cluster to the one that
// replaces it as long as what they were made of stays the same.
type cluster struct {
	identity.KubeCluster
	keys  *keySource // nil: TokenReview alone
	api   *apiServer // nil: no kubeconfig
	fault error      // not nil: no token of this cluster can be verified; wraps a sentinel
}

// New checks the configuration and starts nothing.
func New(cfg Config) (*Verifier, error) {
	if cfg.Log == nil || cfg.Now == nil {
		return nil, errors.New("making kube verifier: Log and Now must be set")
	}
	if cfg.MaxTombstones < 0 || cfg.FetchInterval < 0 || cfg.RefreshInterval < 0 || cfg.RequestTimeout < 0 || cfg.ListTimeout < 0 || cfg.WatchTime < 0 || cfg.RetryInterval < 0 {
		return nil, errors.New("making kube verifier: a negative limit")
	}
	orDefault(&cfg.MaxTombstones, 16384)
	orDefault(&cfg.FetchInterval, 10*time.Second)
	orDefault(&cfg.RefreshInterval, 5*time.Minute)
	orDefault(&cfg.RequestTimeout, 3*time.Second)
	orDefault(&cfg.ListTimeout, 15*time.Second)
	orDefault(&cfg.WatchTime, 5*time.Minute)
	orDefault(&cfg.RetryInterval, time.Second)
	v := &Verifier{cfg: cfg, changed: make(chan struct{}, 1)}
	v.clusters.Store(&clusterSet{})
	return v, nil
}

func orDefault[T ~int | ~int64](p *T, v T) {
	if *p == 0 {
		*p = v
	}
}

// SetClusters replaces the clusters whose tokens are accepted. What is known of an unchanged cluster (fetched keys, its
// pods, tombstones) stays. The error joins one error per faulty cluster, naming it; the others work all the same,
// and a fault that can heal (a kubeconfig not there yet) is tried again when a token needs it.
func (v *Verifier) SetClusters(in []identity.KubeCluster) error {
	v.setMu.Lock()
	defer v.setMu.Unlock()
	old := make(map[string]*cluster)
	for _, c := range v.clusters.Load().all {
		old[c.Name] = c
	}
	set := &clusterSet{byIssuer: make(map[string][]*cluster)}
	var errs []error
	seen := make(map[string]bool)
	for _, k := range in {
		if seen[k.Name] {
			errs = append(errs, fmt.Errorf("%w: kube cluster %q is given twice: the first one counts", identity.ErrExists, k.Name))
			continue
		}
		seen[k.Name] = true
		c, err := v.makeCluster(k, old[k.Name])
		errs = append(errs, err)
		set.all = append(set.all, c)
		set.byIssuer[k.Issuer] = append(set.byIssuer[k.Issuer], c)
	}
	for _, same := range set.byIssuer {
		errs = append(errs, faultAmbiguous(same)...)
	}
	slices.SortFunc(set.all, func(a, b *cluster) int { return strings.Compare(a.Name, b.Name) })
	v.clusters.Store(set)
	select {
	case v.changed <- struct{}{}:
	default:
	}
	return errors.Join(errs...)
}

// makeCluster returns the cluster even with an error, which may only concern a part of it.
func (v *Verifier) makeCluster(k identity.KubeCluster, old *cluster) (*cluster, error) {
	c := &cluster{KubeCluster: k}
	if k.Kubeconfig != "" {
		if old != nil && old.api != nil && old.api.kubeconfig == k.Kubeconfig {
			c.api = old.api
		} else {
			c.api = newAPIServer(v.cfg, k.Name, k.Kubeconfig)
			c.api.setInterest(newInterest(v.interests[k.Name]))
		}
	}
	if len(k.JWKS) > 0 || k.JWKSURL != "" {
		if old != nil && old.keys.madeFrom(&k) {
			c.keys = old.keys
		} else if c.keys, c.fault = newKeySource(v.cfg, &k, c.api); c.fault != nil {
			return c, c.fault
		}
	}
	if c.keys == nil && !k.TokenReview {
		c.fault = fmt.Errorf("%w: kube cluster %q has no way to verify a token: give a JWKS, a JWKS URL, or a kubeconfig for TokenReview", identity.ErrInvalid, k.Name)
		return c, c.fault
	}
	if k.TokenReview && c.api == nil {
		c.fault = fmt.Errorf("%w: kube cluster %q: TokenReview needs a kubeconfig (a path on each member, or %s)", identity.ErrInvalid, k.Name, inCluster)
		return c, c.fault
	}
	if c.api != nil {
		if _, err := c.api.client(); err != nil {
			return c, err
		}
	}
	return c, nil
}

// faultAmbiguous refuses, among clusters of the same issuer, those without keys: nothing but keys tells whose token
// it is, and asking every API server would show a token of one cluster to another.
func faultAmbiguous(same []*cluster) []error {
	if len(same) < 2 {
		return nil
	}
	var errs []error
	for _, c := range same {
		if c.keys == nil && c.fault == nil {
			c.fault = fmt.Errorf("%w: kube cluster %q has the same issuer as %s and no keys to tell their tokens apart: give each a JWKS or a JWKS URL", identity.ErrInvalid, c.Name, othersOf(same, c))
			errs = append(errs, c.fault)
		}
	}
	return errs
}

func othersOf(same []*cluster, c *cluster) string {
	var names []string
	for _, o := range same {
		if o != c {
			names = append(names, fmt.Sprintf("%q", o.Name))
		}
	}
	return strings.Join(names, ", ")
}

// Status is how one cluster stands at this member.
type Status struct {
	Cluster string
	// Fault is why no token of the cluster can be verified, JWKSFault why its keys could not be fetched the last time
	// (those known stay in use), APIFault why its API server could not be asked or watched the last time; nil: all is well.
	Fault, JWKSFault, APIFault error
	Keys                       int  // how many are known
	Watching                   bool // its pods are being watched
	Pods                       int  // how many are known to exist
}

// Status tells how each cluster stands, sorted by name.
func (v *Verifier) Status() []Status {
	var out []Status
	for _, c := range v.clusters.Load().all {
		s := Status{Cluster: c.Name, Fault: c.fault}
		if c.keys != nil {
			s.Keys, s.JWKSFault = c.keys.status()
		}
		if c.api != nil {
			s.Watching, s.Pods, s.APIFault = c.api.status()
		}
		out = append(out, s)
	}
	return out
}

// CheckAgent reports whether the pod that the claims describe may be a node agent of its cluster, by the service
// accounts that the cluster allow-lists.
func CheckAgent(k *identity.KubeCluster, c *Claims) error {
	account := c.Namespace + "/" + c.ServiceAccount
	if k.Name != c.Cluster || !slices.Contains(k.AgentAccounts, account) {
		return fmt.Errorf("%w: service account %s of kube cluster %q may not be a node agent: add it to the cluster's agent accounts", identity.ErrDenied, account, c.Cluster)
	}
	return nil
}
