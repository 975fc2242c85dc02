package config

import (
	"net"
	"net/url"
	"strings"
	"time"

	"countersign.io/countersign/identity"
)

// Public is the HTTPS port that anybody may read, without a certificate of his own: the trust domain's bundle, and what oidc says.
type Public struct {
	Listen string    `yaml:"listen"` // host:port; empty: none
	URL    string    `yaml:"url"`    // https://host[:port] by which others reach listen, on whichever member; default from advertise and listen
	TLS    PublicTLS `yaml:"tls"`
	// host:port of one more port, which shows the bundle endpoint's SVID, beside one with a certificate of the web's: for partners who federate by https_spiffe
	SPIFFEListen string `yaml:"spiffe_listen"`
	SPIFFEURL    string `yaml:"spiffe_url"` // https://host[:port] by which others reach spiffe_listen; default from advertise and spiffe_listen
}

// PublicTLS is the certificate of public.listen, at the most one kind; without, it shows the bundle endpoint's SVID, which browsers and partners who federate by https_web do not take.
type PublicTLS struct {
	CertFile string      `yaml:"cert_file"` // PEM, leaf first; read again when it changes
	KeyFile  string      `yaml:"key_file"`  // PEM
	ACME     *PublicACME `yaml:"acme"`
}

// PublicACME gets the certificate from an ACME CA, whose terms of service are accepted by naming it. The account and the certificates are kept in data_dir/acme.
type PublicACME struct {
	Directory  string   `yaml:"directory"`   // https URL; default Let's Encrypt's
	Hosts      []string `yaml:"hosts"`       // default the host of public.url
	Email      string   `yaml:"email"`       // for the CA's notices
	CAFile     string   `yaml:"ca_file"`     // PEM, for the directory itself; empty: the system's roots
	HTTPListen string   `yaml:"http_listen"` // host:port, for challenges by http-01; empty: tls-alpn-01 on public.listen alone
}

// Federation is how the bundle is kept in step with other trust domains'.
type Federation struct {
	RefreshHint time.Duration `yaml:"refresh_hint"` // how often partners are to read the bundle; the same on every member
	WebCAFile   string        `yaml:"web_ca_file"`  // PEM, for partners' endpoints of profile https_web; empty: the system's roots
}

func (p *Public) complete(advertise string) {
	host, _, _ := net.SplitHostPort(advertise)
	if p.Listen != "" && p.URL == "" {
		p.URL = urlOf(host, p.Listen)
	}
	if p.SPIFFEListen != "" && p.SPIFFEURL == "" {
		p.SPIFFEURL = urlOf(host, p.SPIFFEListen)
	}
	p.URL, p.SPIFFEURL = strings.TrimSuffix(p.URL, "/"), strings.TrimSuffix(p.SPIFFEURL, "/")
	if a := p.TLS.ACME; a != nil {
		def(&a.Directory, "https://acme-v02.api.letsencrypt.org/directory")
		if u, err := url.Parse(p.URL); err == nil && len(a.Hosts) == 0 {
			a.Hosts = []string{u.Hostname()}
		}
	}
}

func urlOf(host, listen string) string {
	h, port, err := net.SplitHostPort(listen)
	if err != nil {
		return ""
	}
	if ip := net.ParseIP(h); h != "" && (ip == nil || !ip.IsUnspecified()) {
		host = h
	}
	if port == "443" {
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		return "https://" + host
	}
	return "https://" + net.JoinHostPort(host, port)
}

func (p *Public) check(f *faults) {
	for _, x := range []struct{ name, listen, url string }{{"", p.Listen, p.URL}, {"spiffe_", p.SPIFFEListen, p.SPIFFEURL}} {
		if x.listen == "" {
			if x.url != "" {
				f.add("public.%surl without public.%slisten", x.name, x.name)
			}
			continue
		}
		f.listenAddress("public."+x.name+"listen", x.listen)
		if err := identity.CheckBundleURL(x.url); err != nil {
			f.add("public.%surl: %v", x.name, strings.TrimPrefix(err.Error(), identity.ErrInvalid.Error()+": "))
		} else if u, err := url.Parse(x.url); err != nil || u.Path != "" || u.RawQuery != "" {
			f.add("public.%surl %q: want https://host[:port] alone: what is served there has paths of its own", x.name, x.url)
		}
	}
	t := p.TLS
	switch {
	case (t.CertFile == "") != (t.KeyFile == ""):
		f.add("public.tls: cert_file and key_file go together")
	case t.CertFile != "" && t.ACME != nil:
		f.add("public.tls: name cert_file and key_file, or acme, not both")
	}
	if t.CertFile != "" {
		f.absolute("public.tls.cert_file", t.CertFile)
		f.absolute("public.tls.key_file", t.KeyFile)
	}
	if p.Listen == "" && (t.CertFile != "" || t.ACME != nil) {
		f.add("public.tls without public.listen")
	}
	if p.SPIFFEListen != "" && t.CertFile == "" && t.ACME == nil {
		f.add("public.spiffe_listen: public.listen shows the SVID already: give that one a certificate of the web's (public.tls), or leave this one out")
	}
	if a := t.ACME; a != nil {
		a.check(f)
	}
}

func (a *PublicACME) check(f *faults) {
	if err := identity.CheckBundleURL(a.Directory); err != nil {
		f.add("public.tls.acme.directory: %v", strings.TrimPrefix(err.Error(), identity.ErrInvalid.Error()+": "))
	}
	for _, h := range a.Hosts {
		if net.ParseIP(h) != nil || identity.ParseDNSName(h) != nil || strings.HasPrefix(h, "*") {
			f.add("public.tls.acme.hosts %q: want a host name, in lower case", h)
		}
	}
	if a.CAFile != "" {
		f.absolute("public.tls.acme.ca_file", a.CAFile)
	}
	if a.HTTPListen != "" {
		f.listenAddress("public.tls.acme.http_listen", a.HTTPListen)
	}
}

// listenAddress may have no host: it is where to listen, not where to connect.
func (f *faults) listenAddress(field, addr string) {
	if h, p, err := net.SplitHostPort(addr); err == nil && h == "" {
		addr = net.JoinHostPort("0.0.0.0", p)
	}
	f.address(field, addr)
}
