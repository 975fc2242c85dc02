package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"countersign.io/countersign/identity"
)

// settle is how long the files must be quiet before they are read: whoever replaces several does so one by one.
const settle = 200 * time.Millisecond

// DiskConfig names the files of a certificate authority.
type DiskConfig struct {
	CertFile  string // PEM: the signing certificate first, then what leads to the root
	KeyFile   string // PEM, which nobody else may read; or the URI of a key in a KMS or HSM
	RootsFile string // PEM; may be empty if CertFile ends with a self-signed root
	// OpenKey opens a key by its URI; nil: files only. A signer that is an io.Closer is closed after use.
	OpenKey func(ctx context.Context, uri string) (crypto.Signer, error)
	Now     func() time.Time // nil: time.Now
}

// Disk is a certificate authority in files. They are read at each use, so that what is there now is what signs.
type Disk struct{ cfg DiskConfig }

// NewDisk reads nothing: files that are missing or wrong are said when they are needed, and what was signed before lasts.
func NewDisk(cfg DiskConfig) (*Disk, error) {
	if cfg.CertFile == "" || cfg.KeyFile == "" {
		return nil, fmt.Errorf("%w: the upstream on disk needs a certificate file and a key", identity.ErrInvalid)
	}
	if isURI(cfg.KeyFile) && cfg.OpenKey == nil {
		return nil, fmt.Errorf("%w: the upstream's key %s: this build opens no keys by URI", identity.ErrInvalid, cfg.KeyFile)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Disk{cfg: cfg}, nil
}

func isURI(key string) bool { return !filepath.IsAbs(key) && strings.Contains(key, ":") }

// String names the certificate file.
func (d *Disk) String() string { return "disk:" + d.cfg.CertFile }

// diskCA is what the files held at one moment.
type diskCA struct {
	cert         *x509.Certificate
	chain, roots [][]byte // chain begins with cert, unless that is a root itself
}

func (d *Disk) read() (*diskCA, error) {
	raw, err := readFile(d.cfg.CertFile, false)
	if err != nil {
		return nil, err
	}
	certs, err := parsePEM(d.cfg.CertFile, raw)
	if err != nil {
		return nil, err
	}
	out := &diskCA{cert: certs[0]}
	if !out.cert.IsCA {
		return nil, fmt.Errorf("%w: the first certificate of %s (%s) is not a certificate authority's: put the one that signs first", identity.ErrInvalid, d.cfg.CertFile, out.cert.Subject)
	}
	out.chain, out.roots = split(certs)
	if d.cfg.RootsFile != "" {
		if raw, err = readFile(d.cfg.RootsFile, false); err != nil {
			return nil, err
		}
		roots, err := parsePEM(d.cfg.RootsFile, raw)
		if err != nil {
			return nil, err
		}
		out.roots = nil
		for _, r := range roots {
			out.roots = append(out.roots, r.Raw)
		}
	}
	if len(out.roots) == 0 {
		return nil, fmt.Errorf("%w: %s does not end with a self-signed root: append it, or set roots_file", identity.ErrInvalid, d.cfg.CertFile)
	}
	return out, nil
}

func (d *Disk) signer(ctx context.Context) (crypto.Signer, error) {
	if isURI(d.cfg.KeyFile) {
		return d.cfg.OpenKey(ctx, d.cfg.KeyFile)
	}
	raw, err := readFile(d.cfg.KeyFile, true)
	if err != nil {
		return nil, err
	}
	defer clear(raw)
	for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
		var key any
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			err = fmt.Errorf("it is encrypted: there is nobody to ask for the passphrase. Keep it in an HSM instead")
		default: // EC PARAMETERS, which openssl writes first
			continue
		}
		clear(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: the key in %s: %v", identity.ErrInvalid, d.cfg.KeyFile, err)
		}
		if s, ok := key.(crypto.Signer); ok {
			return s, nil
		}
		return nil, fmt.Errorf("%w: the key in %s cannot sign", identity.ErrInvalid, d.cfg.KeyFile)
	}
	return nil, fmt.Errorf("%w: %s holds no PEM private key", identity.ErrInvalid, d.cfg.KeyFile)
}

// check opens the key and compares it with the certificate.
func (d *Disk) check(ctx context.Context, c *diskCA) (crypto.Signer, error) {
	key, err := d.signer(ctx)
	if err != nil {
		return nil, err
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(c.cert.PublicKey) {
		closeSigner(key)
		return nil, fmt.Errorf("%w: the key at %s is not the one of the certificate in %s: were both replaced?", identity.ErrInvalid, d.cfg.KeyFile, d.cfg.CertFile)
	}
	return key, nil
}

func closeSigner(s crypto.Signer) {
	if c, ok := s.(io.Closer); ok {
		_ = c.Close() // it was read from, nothing is lost
	}
}

// Sign signs the request: constrained to the URIs of its trust domain, and for no longer than what signs it lasts.
func (d *Disk) Sign(ctx context.Context, req *x509.CertificateRequest, ttl time.Duration) ([]byte, [][]byte, [][]byte, error) {
	c, err := d.read()
	if err != nil {
		return nil, nil, nil, err
	}
	length := pathLength
	if n := c.cert.MaxPathLen; n > 0 || c.cert.MaxPathLenZero {
		if n < 2 {
			return nil, nil, nil, fmt.Errorf("%w: the certificate in %s has a path length of %d, and an authority below it with its members' issuers needs 2", identity.ErrInvalid, d.cfg.CertFile, n)
		}
		length = min(n-1, pathLength)
	}
	if len(req.URIs) != 1 {
		return nil, nil, nil, fmt.Errorf("%w: the request names %d URIs, not the trust domain alone", identity.ErrInvalid, len(req.URIs))
	}
	key, err := d.check(ctx, c)
	if err != nil {
		return nil, nil, nil, err
	}
	defer closeSigner(key)
	now := d.cfg.Now()
	end := now.Add(ttl)
	if c.cert.NotAfter.Before(end) {
		end = c.cert.NotAfter
	}
	begin := now.Add(-10 * time.Second) // for clocks that are behind
	if begin.Before(c.cert.NotBefore) {
		begin = c.cert.NotBefore
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] |= 0x40 // not short
	serial[0] &= 0x7f
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), RawSubject: req.RawSubject, URIs: req.URIs,
		NotBefore: begin.UTC().Truncate(time.Second), NotAfter: end.UTC().Truncate(time.Second),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: length,
		PermittedURIDomains: []string{req.URIs[0].Host}, PermittedDNSDomainsCritical: true, // of all name constraints
	}, c.cert, req.PublicKey, key)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("signing with the key at %s: %w", d.cfg.KeyFile, err)
	}
	return der, c.chain, c.roots, nil
}

// roots reads the files as Sign does, so that what would not sign is known before it is needed.
func (d *Disk) rootsNow(ctx context.Context) ([][]byte, error) {
	c, err := d.read()
	if err != nil {
		return nil, err
	}
	key, err := d.check(ctx, c)
	if err != nil {
		return nil, err
	}
	closeSigner(key)
	if now := d.cfg.Now(); now.After(c.cert.NotAfter) || now.Before(c.cert.NotBefore) {
		return nil, fmt.Errorf("%w: the certificate in %s is valid from %v to %v", identity.ErrUnavailable, d.cfg.CertFile, c.cert.NotBefore, c.cert.NotAfter)
	}
	return c.roots, nil
}

// Follow tells the roots, and tells them anew when the files change. The folders are watched, not the files: a file that
// is replaced, and the link to a folder that Kubernetes exchanges, are other files afterwards.
func (d *Disk) Follow(ctx context.Context, _ <-chan identity.Below, tell func(*identity.Above, error)) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching the upstream's files: %w", err)
	}
	defer watcher.Close()
	seen := map[string]bool{}
	for _, f := range []string{d.cfg.CertFile, d.cfg.KeyFile, d.cfg.RootsFile} {
		dir := filepath.Dir(f)
		if f == "" || isURI(f) || seen[dir] {
			continue
		}
		seen[dir] = true
		if err := watcher.Add(dir); err != nil {
			return fmt.Errorf("watching the folder of the upstream's files: %s: %w", dir, err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wake := make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() {
		err := watchFiles(ctx, watcher, wake)
		cancel()
		done <- err
	}()
	poll(ctx, wake, d.rootsNow, tell)
	cancel()
	return <-done
}

func watchFiles(ctx context.Context, watcher *fsnotify.Watcher, wake chan<- struct{}) error {
	quiet := time.NewTimer(0)
	<-quiet.C
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-watcher.Events:
			if !ok {
				return fmt.Errorf("watching the upstream's files ended")
			}
			quiet.Reset(settle)
		case err := <-watcher.Errors:
			return fmt.Errorf("watching the upstream's files: %w", err)
		case <-quiet.C:
			select {
			case wake <- struct{}{}:
			default:
			}
		}
	}
}

// readFile reads a small regular file; links are followed, since that is how Kubernetes mounts secrets. One with a key must
// not be for others, but for the group's reading.
func readFile(path string, secret bool) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", identity.ErrUnavailable, err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", identity.ErrInvalid, path)
	}
	if secret && st.Mode().Perm()&0o027 != 0 {
		return nil, fmt.Errorf("%w: %s can be read or changed by others (mode %04o): chmod 0600", identity.ErrInvalid, path, st.Mode().Perm())
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", identity.ErrUnavailable, err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, fmt.Errorf("%w: reading %s: %v", identity.ErrUnavailable, path, err)
	}
	return bytes.TrimSpace(raw), nil
}
