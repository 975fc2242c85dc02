// Package config is the one versioned file that each binary reads. Parsing is strict: an unknown field, a second
// document or a version from the future is an error, and every fault is reported at once with its line. Only cmd
// imports it; the packages take values.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"countersign.io/countersign/identity"
)

// Version is the file format that this release writes and reads.
const Version = 1

// maxFile bounds what is read: a configuration is a page, not a megabyte.
const maxFile = 1 << 20

// Server is the configuration of a member.
type Server struct {
	Version     int    `yaml:"version"`      // of this file's format
	TrustDomain string `yaml:"trust_domain"` // needed; such as example.org
	Name        string `yaml:"name"`         // of the member, unique in the cluster, part of its SPIFFE ID; fixed once it has data
	DataDir     string `yaml:"data_dir"`     // everything the member keeps; it must be its own alone (0700)
	Listen      string `yaml:"listen"`       // the one TLS port for members, agents and agentless pods
	Advertise   string `yaml:"advertise"`    // host:port by which the others reach it
	AdminSocket string `yaml:"admin_socket"` // for operators on this machine: root and the member's own user
	Health      string `yaml:"health"`       // host:port of /live and /ready, plain HTTP
	// a file with the output of "countersign token create --server"; without it, and without data, the member begins a new cluster
	JoinTokenFile string        `yaml:"join_token_file"`
	X509TTL       time.Duration `yaml:"x509_ttl"`      // lifetime of X.509-SVIDs whose entry names none, 5s to 24h
	JWTTTL        time.Duration `yaml:"jwt_ttl"`       // lifetime of JWT-SVIDs whose entry names none, 5s to 24h
	MaxStaleness  time.Duration `yaml:"max_staleness"` // how long the member issues without hearing from a leader; default x509_ttl
	CA            CA            `yaml:"ca"`
	X509Pop       X509Pop       `yaml:"x509pop"`
	Log           Log           `yaml:"log"`
}

// CA sets how the first authorities are made; it changes nothing once they are.
type CA struct {
	TTL          time.Duration `yaml:"ttl"`           // lifetime of the authorities that the cluster makes for itself
	JWTAlgorithm string        `yaml:"jwt_algorithm"` // ES256 or RS256
}

// X509Pop lets agents attest with certificates of an existing PKI.
type X509Pop struct {
	CAFile      string `yaml:"ca_file"`      // PEM certificates of the PKI by which agents may attest; empty: none may
	KubeCluster string `yaml:"kube_cluster"` // then the certificate's common name is the agent's node in this cluster
}

// Log sets the log on standard error.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn or error
	Format string `yaml:"format"` // text or json, on standard error
}

// Agent is the configuration of a node agent.
type Agent struct {
	Version     int      `yaml:"version"`      // of this file's format
	TrustDomain string   `yaml:"trust_domain"` // needed, but with a join token
	Servers     []string `yaml:"servers"`      // host:port of members, one at least; the others are learnt. A join token brings its own
	CAPin       string   `yaml:"ca_pin"`       // sha256:HEX of the CA's public key, from "countersign bundle show". A join token brings its own

	Attest   AgentAttest   `yaml:"attest"`
	Socket   string        `yaml:"socket"`    // the Workload API
	StateDir string        `yaml:"state_dir"` // keeps live SVIDs over a restart; it must be on tmpfs; "none" switches it off
	Health   string        `yaml:"health"`    // host:port of /live and /ready, plain HTTP
	KeyType  string        `yaml:"key_type"`  // of workloads' keys: ec-p256, ec-p384, ed25519 or rsa-2048
	Workload AgentWorkload `yaml:"workload"`
	Log      Log           `yaml:"log"`
}

// AgentAttest is how the agent proves its node: exactly one kind.
type AgentAttest struct {
	JoinTokenFile string      `yaml:"join_token_file"` // a file with the output of "countersign token create --agent"
	Kube          *AgentKube  `yaml:"kube"`
	X509Pop       *AgentCerts `yaml:"x509pop"`
}

// AgentKube attests with the agent pod's own service account token.
type AgentKube struct {
	Cluster   string `yaml:"cluster"`    // the name given to "countersign kube add"
	TokenPath string `yaml:"token_path"` // of the agent pod's own token
}

// AgentCerts attests with a certificate and proof of its key.
type AgentCerts struct {
	CertFile string `yaml:"cert_file"` // PEM, leaf first
	KeyFile  string `yaml:"key_file"`  // PEM, 0600
}

// AgentWorkload is how callers are told apart.
type AgentWorkload struct {
	TokenPath string `yaml:"token_path"` // of a pod's token, as the pod sees it
	SHA256    bool   `yaml:"sha256"`     // also hash each caller's binary (unix:sha256)
	Systemd   bool   `yaml:"systemd"`    // also tell each caller's systemd unit (systemd:unit)
}

// The defaults that more than one command needs.
const (
	DefaultPort        = "8443"
	DefaultAdminSocket = "/run/countersign/admin.sock"
	DefaultAgentSocket = "/run/countersign/agent.sock"
	DefaultDataDir     = "/var/lib/countersign"
	DefaultStateDir    = "/run/countersign/agent"
	DefaultTokenPath   = "/var/run/secrets/countersign.io/token"
	DefaultAudience    = "countersign"
)

// LoadServer reads, completes and checks a member's file.
func LoadServer(path string) (*Server, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	return ParseServer(path, data)
}

// LoadAgent reads, completes and checks an agent's file.
func LoadAgent(path string) (*Agent, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	return ParseAgent(path, data)
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%w: %s is larger than %d bytes", identity.ErrInvalid, path, maxFile)
	}
	return data, nil
}

// ParseServer parses a member's file; name is for messages.
func ParseServer(name string, data []byte) (*Server, error) {
	var c Server
	faults := decode(data, &c)
	c.complete()
	return &c, report(name, faults, c.Check())
}

// ParseAgent parses an agent's file.
func ParseAgent(name string, data []byte) (*Agent, error) {
	var c Agent
	faults := decode(data, &c)
	c.complete()
	return &c, report(name, faults, c.Check())
}

// decode returns every fault of form. What could be decoded is kept, so that Check can add its own.
func decode(data []byte, into any) error {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	err := dec.Decode(into)
	var te *yaml.TypeError
	switch {
	case errors.As(err, &te):
		errs := make([]error, len(te.Errors))
		for i, e := range te.Errors {
			errs[i] = fmt.Errorf("%w: %s", identity.ErrInvalid, strings.ReplaceAll(e, "in type config.", "in "))
		}
		return errors.Join(errs...)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: the file is empty", identity.ErrInvalid)
	case err != nil:
		return fmt.Errorf("%w: %v", identity.ErrInvalid, err)
	}
	var more yaml.Node
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: there is something after the first document", identity.ErrInvalid)
	}
	return nil
}

func report(name string, faults ...error) error {
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("configuration %s:\n%w", name, err)
	}
	return nil
}

func (c *Server) complete() {
	host, _ := os.Hostname()
	def(&c.Name, strings.ToLower(host))
	def(&c.DataDir, DefaultDataDir)
	def(&c.Listen, "0.0.0.0:"+DefaultPort)
	if c.Advertise == "" {
		if h, p, err := net.SplitHostPort(c.Listen); err == nil {
			if ip := net.ParseIP(h); h == "" || ip != nil && ip.IsUnspecified() {
				h = host
			}
			c.Advertise = net.JoinHostPort(h, p)
		}
	}
	def(&c.AdminSocket, DefaultAdminSocket)
	def(&c.Health, "127.0.0.1:8080")
	defDuration(&c.X509TTL, identity.DefaultX509TTL)
	defDuration(&c.JWTTTL, identity.DefaultJWTTL)
	defDuration(&c.MaxStaleness, c.X509TTL)
	defDuration(&c.CA.TTL, 365*24*time.Hour)
	def(&c.CA.JWTAlgorithm, "ES256")
	c.Log.complete()
}

func (c *Agent) complete() {
	def(&c.Socket, DefaultAgentSocket)
	def(&c.StateDir, DefaultStateDir)
	def(&c.Health, "127.0.0.1:8081")
	def(&c.KeyType, "ec-p256")
	def(&c.Workload.TokenPath, DefaultTokenPath)
	if c.Attest.Kube != nil {
		def(&c.Attest.Kube.TokenPath, DefaultTokenPath)
	}
	c.Log.complete()
}

func (l *Log) complete() { def(&l.Level, "info"); def(&l.Format, "text") }

func def(s *string, v string) {
	if *s == "" {
		*s = v
	}
}

func defDuration(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

// faults collects what is wrong, each with the field and what to do.
type faults struct{ errs []error }

func (f *faults) add(format string, args ...any) {
	f.errs = append(f.errs, fmt.Errorf("%w: "+format, append([]any{identity.ErrInvalid}, args...)...))
}

// Check reports every fault of a member's values, joined.
func (c *Server) Check() error {
	var f faults
	f.version(c.Version)
	f.trustDomain(c.TrustDomain, true)
	if err := spiffeid.ValidatePathSegment(c.Name); err != nil {
		f.add("name %q: a member's name is part of its SPIFFE ID: %v", c.Name, err)
	}
	f.absolute("data_dir", c.DataDir)
	f.absolute("admin_socket", c.AdminSocket)
	f.address("listen", c.Listen)
	f.address("advertise", c.Advertise)
	if h, _, err := net.SplitHostPort(c.Advertise); err == nil {
		if ip := net.ParseIP(h); ip != nil && ip.IsUnspecified() {
			f.add("advertise %q: the others cannot reach an unspecified address; name one", c.Advertise)
		}
	}
	f.address("health", c.Health)
	f.ttl("x509_ttl", c.X509TTL, identity.MinTTL, identity.MaxX509TTL)
	f.ttl("jwt_ttl", c.JWTTTL, identity.MinTTL, identity.MaxJWTTL)
	f.ttl("max_staleness", c.MaxStaleness, time.Second, 7*24*time.Hour)
	f.ttl("ca.ttl", c.CA.TTL, time.Hour, 10*365*24*time.Hour)
	if c.CA.JWTAlgorithm != "ES256" && c.CA.JWTAlgorithm != "RS256" {
		f.add("ca.jwt_algorithm %q: want ES256 or RS256", c.CA.JWTAlgorithm)
	}
	if c.X509Pop.CAFile == "" && c.X509Pop.KubeCluster != "" {
		f.add("x509pop.kube_cluster without x509pop.ca_file")
	}
	f.log(c.Log)
	return errors.Join(f.errs...)
}

// Check reports every fault of an agent's values, joined.
func (c *Agent) Check() error {
	var f faults
	f.version(c.Version)
	join := c.Attest.JoinTokenFile != ""
	f.trustDomain(c.TrustDomain, !join)
	kinds := 0
	for _, set := range []bool{join, c.Attest.Kube != nil, c.Attest.X509Pop != nil} {
		if set {
			kinds++
		}
	}
	if kinds != 1 {
		f.add("attest: name exactly one of join_token_file, kube, x509pop (%d are set)", kinds)
	}
	if k := c.Attest.Kube; k != nil && k.Cluster == "" {
		f.add("attest.kube.cluster is missing: the name given to countersign kube add")
	}
	if x := c.Attest.X509Pop; x != nil && (x.CertFile == "" || x.KeyFile == "") {
		f.add("attest.x509pop: cert_file and key_file are both needed")
	}
	if !join && len(c.Servers) == 0 {
		f.add("servers is empty: name at least one member, host:port")
	}
	for _, s := range c.Servers {
		f.address("servers", s)
	}
	if !join && c.CAPin == "" {
		f.add("ca_pin is missing: countersign bundle show prints it")
	}
	f.absolute("socket", c.Socket)
	if c.StateDir != "none" {
		f.absolute("state_dir", c.StateDir)
	}
	f.address("health", c.Health)
	switch c.KeyType {
	case "ec-p256", "ec-p384", "ed25519", "rsa-2048":
	default:
		f.add("key_type %q: want ec-p256, ec-p384, ed25519 or rsa-2048", c.KeyType)
	}
	f.absolute("workload.token_path", c.Workload.TokenPath)
	f.log(c.Log)
	return errors.Join(f.errs...)
}

func (f *faults) version(v int) {
	switch {
	case v == 0:
		f.add("version is missing: write version: %d", Version)
	case v > Version:
		f.add("version %d is newer than this release reads (%d): upgrade it, or write the older format", v, Version)
	case v < 0:
		f.add("version %d: write version: %d", v, Version)
	}
}

func (f *faults) trustDomain(s string, required bool) {
	if s == "" {
		if required {
			f.add("trust_domain is missing: such as example.org")
		}
		return
	}
	if td, err := spiffeid.TrustDomainFromString(s); err != nil {
		f.add("trust_domain %q: %v", s, err)
	} else if td.Name() != s {
		f.add("trust_domain %q: write the bare name %q", s, td.Name())
	}
}

func (f *faults) absolute(field, path string) {
	if !filepath.IsAbs(path) {
		f.add("%s %q: want an absolute path", field, path)
	}
}

func (f *faults) address(field, addr string) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		f.add("%s %q: want host:port: %v", field, addr, err)
		return
	}
	if n, err := net.LookupPort("tcp", port); err != nil || n < 0 {
		f.add("%s %q: bad port %q", field, addr, port)
	}
	if host == "" && field != "listen" {
		f.add("%s %q has no host", field, addr)
	}
}

func (f *faults) ttl(field string, v, min, max time.Duration) {
	if v < min || v > max {
		f.add("%s is %v: it must be from %v to %v", field, v, min, max)
	}
}

func (f *faults) log(l Log) {
	switch l.Level {
	case "debug", "info", "warn", "error":
	default:
		f.add("log.level %q: want debug, info, warn or error", l.Level)
	}
	if l.Format != "text" && l.Format != "json" {
		f.add("log.format %q: want text or json", l.Format)
	}
}
