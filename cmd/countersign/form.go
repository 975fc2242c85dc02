package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/seal"
	"countersign.io/countersign/server"
	"countersign.io/countersign/store"
	"countersign.io/countersign/workloadapi"
)

const (
	formRetryFirst = 500 * time.Millisecond
	formRetryMost  = 5 * time.Second
	peerTimeout    = 3 * time.Second // to find out who is at an address
	// maxPeers is how many of the StatefulSet's pods are looked for: the replicas are not known here, and nobody runs more members.
	maxPeers = 16
)

// formHome is the part of *kube.Home by which a member without data finds out what to do.
type formHome interface {
	CheckOwn(name string) error
	Bundle(ctx context.Context) (*kube.PublishedBundle, error)
	ConfigMapName() string
}

// former decides for a pod of the StatefulSet that has no data whether it begins the cluster or joins it. The ConfigMap with the
// bundle is what decides: pod 0 begins a cluster where there is none, and everybody else, and pod 0 too where there is one, joins.
type former struct {
	c     *config.Server
	td    spiffeid.TrustDomain
	home  formHome
	token func() ([]byte, error) // this pod's own, for the members
	log   *slog.Logger
	retry time.Duration // the first; 0: 1 s
	// dial opens connections to peers; nil: TCP.
	dial func(ctx context.Context, address string) (net.Conn, error)

	why atomic.Pointer[string] // it is still waiting, for /ready
}

func newFormer(c *config.Server, home formHome, log *slog.Logger) (*former, error) {
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("%w: trust_domain: %v", identity.ErrInvalid, err)
	}
	return &former{c: c, td: td, home: home, token: joinToken(c), log: log}, nil
}

// newHome makes the client of the kube cluster that this member lives in; nil if none is configured.
func (m *member) newHome() (*kube.Home, error) {
	k := m.c.Kubernetes
	if k.Cluster == "" {
		return nil, nil
	}
	return kube.NewHome(kube.HomeConfig{
		Cluster: k.Cluster, Kubeconfig: k.Kubeconfig, Namespace: k.Namespace, StatefulSet: k.StatefulSet, OwnToken: joinToken(m.c), Now: m.hooks.now,
	})
}

// joinToken reads the pod's token. Its mode is the kubelet's affair.
func joinToken(c *config.Server) func() ([]byte, error) {
	return func() ([]byte, error) { return cli.ReadFile(c.Kubernetes.JoinTokenPath, identity.MaxTokenBytes) }
}

// homeConfig is what the server does for its kube cluster.
func (m *member) homeConfig() server.Home {
	if m.home == nil {
		return server.Home{}
	}
	k := m.c.Kubernetes
	h := server.Home{
		API: m.home, Cluster: k.Cluster, Kubeconfig: k.Kubeconfig, AgentAccounts: k.AgentAccounts, DefaultID: k.DefaultID, Forms: k.Forms(),
	}
	if h.Forms {
		h.Data, h.Unclaimed, h.Claim = bundleData, m.data.isUnclaimed, m.data.claim
		h.Rival = func(err error) {
			select {
			case m.rival <- err:
			default: // one is enough
			}
		}
	}
	return h
}

// bundleData is what the ConfigMap holds.
func bundleData(b *identity.Bundle) (map[string]string, error) {
	var roots strings.Builder
	for _, der := range b.X509 {
		if err := pem.Encode(&roots, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return nil, fmt.Errorf("encoding the bundle: %w", err)
		}
	}
	doc, err := workloadapi.MarshalBundle(b)
	if err != nil {
		return nil, err
	}
	return map[string]string{kube.BundlePEM: roots.String(), kube.BundleJSON: string(doc)}, nil
}

// form gets the keyring of a member without data: a new one, or by joining. It tries until ctx ends; only what no waiting mends is an error.
func (d *dataDir) form(ctx context.Context, f *former) (*seal.Keyring, error) {
	if err := f.home.CheckOwn(f.c.Name); err != nil {
		return nil, fmt.Errorf("forming the cluster: %w", err)
	}
	said := ""
	for wait := max(f.retry, formRetryFirst); ; wait = min(2*wait, formRetryMost) {
		if f.retry > 0 {
			wait = f.retry
		}
		keyring, err := d.formOnce(ctx, f)
		if err == nil {
			return keyring, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("forming the cluster was interrupted: %w", err)
		}
		text := err.Error()
		f.why.Store(&text)
		if text != said {
			f.log.Warn("this member cannot begin or join the cluster yet: trying again", "error", err)
		}
		said = text
		if !sleepFor(ctx, wait) {
			return nil, fmt.Errorf("forming the cluster was interrupted: %w", err)
		}
	}
}

func (d *dataDir) formOnce(ctx context.Context, f *former) (*seal.Keyring, error) {
	published, err := f.home.Bundle(ctx)
	switch {
	case errors.Is(err, identity.ErrNotFound):
		return d.formWithout(ctx, f)
	case err != nil:
		return nil, err
	case published.TrustDomain != "" && published.TrustDomain != f.td.Name():
		return nil, fmt.Errorf("%w: ConfigMap %s is of trust domain %q, and trust_domain here is %q: each trust domain's members need a namespace of their own; if that installation is gone, delete the ConfigMap", identity.ErrPrecondition, f.home.ConfigMapName(), published.TrustDomain, f.td.Name())
	}
	roots, err := f.roots(published)
	if err != nil {
		return nil, err
	}
	d.member.Bootstrap, d.member.Unclaimed = false, false
	return d.joinByPod(ctx, f, roots)
}

func (f *former) roots(b *kube.PublishedBundle) ([]*x509.Certificate, error) {
	ders, err := cli.ParseRoots([]byte(b.Data[kube.BundlePEM]))
	if err != nil {
		return nil, fmt.Errorf("ConfigMap %s, key %s: %w", f.home.ConfigMapName(), kube.BundlePEM, err)
	}
	var out []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("ConfigMap %s, key %s: %w", f.home.ConfigMapName(), kube.BundlePEM, err)
		}
		out = append(out, c)
	}
	return out, nil
}

// formWithout is what to do where nothing is published. Pod 0 begins a cluster, unless a member of one answers: then somebody has
// deleted the ConfigMap, and this volume was lost, and a second cluster must not be. Nobody vouches for who answers; all that a liar
// gains is that nothing begins.
func (d *dataDir) formWithout(ctx context.Context, f *former) (*seal.Keyring, error) {
	if n, _ := kube.Ordinal(f.c.Kubernetes.StatefulSet, f.c.Name); n != 0 {
		return nil, fmt.Errorf("%w: there is no ConfigMap %s yet: pod %s-0 makes it once it has begun the cluster", identity.ErrUnavailable, f.home.ConfigMapName(), f.c.Kubernetes.StatefulSet)
	}
	for _, p := range f.ask(ctx, nil) {
		if p.err == nil {
			return nil, fmt.Errorf("%w: there is no ConfigMap %s, and yet %s answers at %s: this member has lost its volume, and does not begin a second cluster. The leader makes the ConfigMap again within a minute or so; where it does not, its log and its status say why", identity.ErrPrecondition, f.home.ConfigMapName(), p.id, p.address)
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	keyring, err := seal.NewKeyring()
	if err != nil {
		return nil, err
	}
	f.log.Info("no bundle is published in this namespace: beginning a new cluster", "config_map", f.home.ConfigMapName())
	d.member.Bootstrap, d.member.Unclaimed = true, true
	return keyring, nil
}

// joinByPod asks the members that answer, one after the other, by this pod's own token.
func (d *dataDir) joinByPod(ctx context.Context, f *former, roots []*x509.Certificate) (*seal.Keyring, error) {
	token, err := f.token()
	if err != nil {
		return nil, fmt.Errorf("reading kubernetes.join_token_path: %w", err)
	}
	defer clear(token)
	conf := server.RootsTLS(roots, d.td)
	var errs []error
	members := 0
	for _, p := range f.ask(ctx, conf) {
		if p.err != nil {
			errs = append(errs, p.err)
			continue
		}
		members++
		res, err := d.joinAt(ctx, p.address, conf, &memberv1.JoinRequest{
			PodToken: strings.TrimSpace(string(token)), Id: f.c.Name, Address: f.c.Advertise, Version: version, Level: store.Level,
		})
		if err == nil {
			return d.joined(res)
		}
		errs = append(errs, fmt.Errorf("joining by %s: %w", p.address, err))
		if errors.Is(err, identity.ErrDenied) || errors.Is(err, identity.ErrExists) || errors.Is(err, identity.ErrPrecondition) {
			break // an answer: the others would say the same
		}
	}
	if members == 0 {
		errs = append(errs, fmt.Errorf("%w: ConfigMap %s says that there is a cluster, and no member of it answers. It may be starting. If it is left over from an installation whose volumes are gone, delete it (kubectl -n %s delete configmap %s), and %s-0 begins a new cluster; if the volumes were lost and there is a backup, see docs/BACKUP.md",
			identity.ErrUnavailable, f.home.ConfigMapName(), f.c.Kubernetes.Namespace, kube.BundleConfigMap, f.c.Kubernetes.StatefulSet))
	}
	return nil, errors.Join(errs...)
}

// peer is who answered at an address, or why nobody that counts did.
type peer struct {
	address string
	id      spiffeid.ID
	err     error
}

// addresses are where members may be: cluster.peers, or the other pods of the StatefulSet.
func (f *former) addresses() (out []string) {
	if len(f.c.Cluster.Peers) > 0 {
		return slices.DeleteFunc(slices.Clone(f.c.Cluster.Peers), func(a string) bool { return a == f.c.Advertise })
	}
	_, port, err := net.SplitHostPort(f.c.Listen)
	if err != nil {
		return nil // the configuration was checked
	}
	for i := range maxPeers {
		pod := f.c.Kubernetes.StatefulSet + "-" + strconv.Itoa(i)
		if pod != f.c.Name {
			out = append(out, net.JoinHostPort(f.c.Kubernetes.PodHost(pod), port))
		}
	}
	return out
}

// ask finds out side by side who answers at each address, by conf or, if that is nil, by nothing: then whoever says that he is a
// member of the trust domain is taken for one. Names that nobody has are left out, unless all are such.
func (f *former) ask(ctx context.Context, conf *tls.Config) []peer {
	addresses := f.addresses()
	all := make([]peer, len(addresses))
	var wg sync.WaitGroup
	for i, a := range addresses {
		wg.Go(func() { all[i] = f.askOne(ctx, a, conf) })
	}
	wg.Wait()
	known := slices.DeleteFunc(slices.Clone(all), func(p peer) bool {
		var dns *net.DNSError
		return errors.As(p.err, &dns) && dns.IsNotFound
	})
	if len(known) == 0 && len(all) > 0 {
		return all[:1]
	}
	return known
}

func (f *former) askOne(ctx context.Context, address string, conf *tls.Config) peer {
	p := peer{address: address}
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	dial := f.dial
	if dial == nil {
		dial = func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
	}
	raw, err := dial(ctx, address)
	if err != nil {
		p.err = fmt.Errorf("asking who is at %s: %w", address, err)
		return p
	}
	defer raw.Close()
	if conf == nil {
		conf = &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true} // see ask
	}
	c := tls.Client(raw, conf)
	if err := c.HandshakeContext(ctx); err != nil {
		p.err = fmt.Errorf("asking who is at %s: %w", address, err)
		return p
	}
	if p.id, err = x509svid.IDFromCert(c.ConnectionState().PeerCertificates[0]); err == nil && (p.id.TrustDomain() != f.td || identity.RoleOf(p.id) != identity.RoleMember) {
		err = fmt.Errorf("%w: it is %s, no member of %s", identity.ErrUnauthenticated, p.id, f.td)
	}
	if err != nil {
		p.err = fmt.Errorf("asking who is at %s: %w", address, err)
	}
	return p
}
