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

// Log sets the log on standard error.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn or error
	Format string `yaml:"format"` // text or json, on standard error
}

// The defaults that more than one command needs.
const (
	DefaultPort        = "8443"
	DefaultServerFile  = "/etc/countersign/server.yaml"
	DefaultAdminSocket = "/run/countersign/admin.sock"
	DefaultAgentSocket = "/run/countersign/agent.sock"
	DefaultDataDir     = "/var/lib/countersign"
	DefaultStateDir    = "/run/countersign/agent"
	DefaultTokenPath   = "/var/run/secrets/countersign.io/token"
	DefaultKubeletDir  = "/var/lib/kubelet"
	DefaultCSIDir      = "/run/countersign/csi"
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
