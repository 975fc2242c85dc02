package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/crypto/acme/autocert"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/federation"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/server"
)

// public are the ports that anybody may read.
type public struct {
	ports []*federation.Public
	acme  *federation.ACME // nil: none
	http  net.Listener     // for ACME's challenges; nil: none
}

// listenPublic takes the ports of public, and makes what serves them. What all of them serve hangs on here.
func (m *member) listenPublic() error {
	c := m.c.Public
	if c.Listen != "" {
		certificate, protocols, err := m.publicCertificate()
		if err != nil {
			return err
		}
		if err := m.openPublic("public.listen", c.Listen, certificate, protocols); err != nil {
			return err
		}
	}
	if c.SPIFFEListen != "" {
		if err := m.openPublic("public.spiffe_listen", c.SPIFFEListen, m.endpointCertificate, nil); err != nil {
			return err
		}
	}
	// Nothing is served before the store and the CA are there: see runPublic.
	bundle := func() *identity.Bundle { return m.store.Bundle() }
	endpoint := federation.NewEndpoint(federation.EndpointConfig{Bundle: bundle, RefreshHint: m.c.Federation.RefreshHint, Log: m.log})
	for _, p := range m.public.ports {
		p.Handle(federation.EndpointPath, endpoint)
	}
	if c.Listen == "" || m.c.OIDC.Issuer == "" {
		return nil
	}
	// Consumers of these verify by the web's roots: they are on that port alone.
	oidc := federation.OIDCConfig{Issuer: m.c.OIDC.Issuer, Bundle: bundle, MaxAge: m.c.OIDC.MaxAge, Log: m.log}
	discovery, err := federation.NewDiscovery(oidc)
	if err != nil {
		return err
	}
	at, keys := federation.OIDCPaths(m.c.OIDC.Issuer)
	m.public.ports[0].Handle(at, discovery)
	m.public.ports[0].Handle(keys, federation.NewKeys(oidc))
	return nil
}

// publishAhead holds wherever the keys are read, on this member's port or on another's.
func (m *member) publishAhead(kind identity.AuthorityKind) time.Duration {
	if m.c.OIDC.Issuer == "" || kind != identity.AuthorityJWT {
		return 0
	}
	return federation.PublishAhead(m.c.OIDC.MaxAge)
}

func (m *member) openPublic(field, address string, certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), protocols []string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("listening (%s: %s): %w: end what uses the port, or name another", field, address, err)
	}
	m.closers = append(m.closers, ignoreClosed(l))
	p, err := federation.NewPublic(federation.PublicConfig{TCP: l, Certificate: certificate, Protocols: protocols, Log: m.log})
	if err != nil {
		return err
	}
	m.public.ports = append(m.public.ports, p)
	return nil
}

// runPublic serves until the member closes: it goes on serving what is known while there is no leader.
func (m *member) runPublic(ctx context.Context) {
	for _, p := range m.public.ports {
		m.run(ctx, p.Run)
	}
	if m.public.acme != nil {
		m.run(ctx, m.public.acme.Run)
	}
	if l := m.public.http; l != nil {
		s := &http.Server{Handler: m.public.acme.Challenges(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 10 * time.Second, MaxHeaderBytes: 8 << 10}
		m.run(ctx, func(ctx context.Context) error {
			stop := context.AfterFunc(ctx, func() { s.Close() })
			defer stop()
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serving public.tls.acme.http_listen: %w", err)
			}
			return nil
		})
	}
}

func (m *member) endpointCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return m.ca.EndpointCertificate()
}

// publicCertificate is what public.listen shows, and what it speaks besides HTTP.
func (m *member) publicCertificate() (func(*tls.ClientHelloInfo) (*tls.Certificate, error), []string, error) {
	t := m.c.Public.TLS
	switch {
	case t.CertFile != "":
		files := &certFiles{cert: t.CertFile, key: t.KeyFile}
		if _, err := files.load(time.Now()); err != nil {
			return nil, nil, fmt.Errorf("%w: public.tls: %w", identity.ErrInvalid, err)
		}
		return func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := files.load(time.Now())
			if err != nil {
				m.log.Error("cannot use the changed public.tls: going on with the certificate before", "error", err)
			}
			return c, nil
		}, nil, nil
	case t.ACME != nil:
		a, err := m.openACME()
		if err != nil {
			return nil, nil, err
		}
		return a.Certificate, a.Protocols(), nil
	}
	return m.endpointCertificate, nil, nil
}

func (m *member) openACME() (*federation.ACME, error) {
	c := m.c.Public.TLS.ACME
	var roots *x509.CertPool
	if c.CAFile != "" {
		var err error
		if roots, err = rootsIn("public.tls.acme.ca_file", c.CAFile); err != nil {
			return nil, err
		}
	}
	if c.HTTPListen != "" {
		l, err := net.Listen("tcp", c.HTTPListen)
		if err != nil {
			return nil, fmt.Errorf("listening (public.tls.acme.http_listen: %s): %w: end what uses the port, or name another", c.HTTPListen, err)
		}
		m.closers = append(m.closers, ignoreClosed(l))
		m.public.http = l
	}
	a, err := federation.NewACME(federation.ACMEConfig{
		Directory: c.Directory, Hosts: c.Hosts, Email: c.Email, HTTP: c.HTTPListen != "", Roots: roots, Cache: acmeFiles(filepath.Join(m.c.DataDir, "acme")), Log: m.log,
	})
	if err != nil {
		return nil, fmt.Errorf("public.tls.acme: %w", err)
	}
	m.public.acme = a
	return a, nil
}

// certFiles is a certificate in files, read again when they change.
type certFiles struct {
	cert, key string

	mu     sync.Mutex
	loaded *tls.Certificate // nil before the first
	stamp  [2]fileStamp     // of what was tried last
	looked time.Time
}

type fileStamp struct {
	size int64
	mod  time.Time
}

// certLook is how long changed files may go unseen.
const certLook = 2 * time.Second

// load returns the newest good certificate; with an error, the one before.
func (f *certFiles) load(now time.Time) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.loaded != nil && now.Sub(f.looked) < certLook {
		return f.loaded, nil
	}
	f.looked = now
	var stamp [2]fileStamp
	for i, path := range []string{f.cert, f.key} {
		info, err := os.Stat(path)
		if err != nil {
			return f.loaded, err
		}
		stamp[i] = fileStamp{info.Size(), info.ModTime()}
	}
	if f.loaded != nil && stamp == f.stamp {
		return f.loaded, nil
	}
	var pem [2][]byte
	for i, path := range []string{f.cert, f.key} {
		var err error
		if pem[i], err = cli.ReadFile(path, maxInput); err != nil {
			return f.loaded, err
		}
	}
	f.stamp = stamp
	c, err := tls.X509KeyPair(pem[0], pem[1])
	clear(pem[1])
	if err != nil {
		return f.loaded, fmt.Errorf("%s and %s: %w", f.cert, f.key, err)
	}
	f.loaded = &c
	return f.loaded, nil
}

// acmeFiles keeps what ACME must not lose: its folder is the member's alone.
type acmeFiles string

// Get reads one.
func (d acmeFiles) Get(_ context.Context, key string) ([]byte, error) {
	raw, err := durable.ReadPrivateFile(d.file(key), maxInput)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, autocert.ErrCacheMiss
	}
	return raw, err
}

// Put writes one, 0600, whole or not at all.
func (d acmeFiles) Put(_ context.Context, key string, data []byte) error {
	if err := durable.PrivateDir(string(d)); err != nil {
		return err
	}
	return durable.WriteFile(d.file(key), data, 0o600)
}

// Delete removes one.
func (d acmeFiles) Delete(_ context.Context, key string) error {
	if err := os.Remove(d.file(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// file has a name that leads nowhere else, whatever the key: host names come from the network.
func (d acmeFiles) file(key string) string { return filepath.Join(string(d), url.QueryEscape(key)) }

// federation is the trust of other trust domains as the server sees it.
func (m *member) federation(w server.FederationWriter) (server.Federation, error) {
	c := m.c
	var roots *x509.CertPool
	if file := c.Federation.WebCAFile; file != "" {
		var err error
		if roots, err = rootsIn("federation.web_ca_file", file); err != nil {
			return server.Federation{}, err
		}
	}
	client := federation.NewClient(federation.ClientConfig{WebRoots: roots, Now: m.hooks.now})
	f := server.Federation{
		FederationState: m.store, Writes: w, RefreshHint: c.Federation.RefreshHint, DialMember: m.dialMember,
		Refresher: federation.NewRefresher(federation.RefresherConfig{Fetch: client.Fetch, Log: m.log}),
	}
	if c.Public.Listen != "" {
		profile := identity.ProfileSPIFFE
		if c.Public.TLS.CertFile != "" || c.Public.TLS.ACME != nil {
			profile = identity.ProfileWeb
		}
		f.Endpoints = append(f.Endpoints, server.Endpoint{Profile: profile, URL: c.Public.URL + federation.EndpointPath})
	}
	if c.Public.SPIFFEListen != "" {
		f.Endpoints = append(f.Endpoints, server.Endpoint{Profile: identity.ProfileSPIFFE, URL: c.Public.SPIFFEURL + federation.EndpointPath})
	}
	return f, nil
}

// dialMember connects to another member, that very one.
func (m *member) dialMember(_ context.Context, to identity.Member) (*grpc.ClientConn, error) {
	conf := server.MemberTLS(m.tls, to.ID)
	conf.NextProtos = []string{"h2"}
	return grpc.NewClient("passthrough:///"+to.Address, grpc.WithTransportCredentials(credentials.NewTLS(conf)))
}
