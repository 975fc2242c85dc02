// Command vaultd is a Vault for tests: in memory, unsealed, on loopback, with the PKI and transit engines and AppRole. It is
// a module of its own, so that nothing of Vault gets near the product. Vault 1.14 is the last release under the MPL.
//
//	vaultd -listen 127.0.0.1:0 -dir DIR
//
// writes DIR/ca.pem (its TLS certificate) and DIR/token (a root token), then prints its address, and serves until it is
// ended.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"syscall"
	"time"
	"unsafe"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/logical/pki"
	"github.com/hashicorp/vault/builtin/logical/transit"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "vaultd:", err)
		os.Exit(1)
	}
}

func run() error {
	listen := flag.String("listen", "127.0.0.1:0", "host:port")
	dir := flag.String("dir", "", "folder for ca.pem and token")
	flag.Parse()
	if *dir == "" {
		return errors.New("-dir is missing")
	}
	log := hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: os.Stderr})
	storage, err := inmem.NewInmem(nil, log)
	if err != nil {
		return err
	}
	core, err := vault.NewCore(&vault.CoreConfig{
		Physical: storage, DisableMlock: true, Logger: log,
		LogicalBackends:    map[string]logical.Factory{"pki": pki.Factory, "transit": transitEngine},
		CredentialBackends: map[string]logical.Factory{"approle": approle.Factory},
		BuiltinRegistry:    noPlugins{},
		DefaultLeaseTTL:    time.Hour, MaxLeaseTTL: 24 * time.Hour,
	})
	if err != nil {
		return fmt.Errorf("making the core: %w", err)
	}
	defer core.Shutdown()
	init, err := core.Initialize(context.Background(), &vault.InitParams{BarrierConfig: &vault.SealConfig{SecretShares: 1, SecretThreshold: 1}, RecoveryConfig: &vault.SealConfig{SecretShares: 1, SecretThreshold: 1}})
	if err != nil {
		return fmt.Errorf("initializing: %w", err)
	}
	for _, share := range init.SecretShares {
		if _, err := core.Unseal(share); err != nil {
			return fmt.Errorf("unsealing: %w", err)
		}
	}
	completePaths(core)
	cert, pemCert, err := certificate()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{"ca.pem": pemCert, "token": []byte(init.RootToken)} {
		if err := os.WriteFile(filepath.Join(*dir, name), data, 0o600); err != nil {
			return err
		}
	}
	s := &http.Server{
		Handler:           vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core}),
		ReadHeaderTimeout: 10 * time.Second,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, func() { s.Close() })
	fmt.Println(l.Addr())
	if err := s.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// noPlugins is an empty catalogue: the engines are given to the core as they are.
type noPlugins struct{}

func (noPlugins) Contains(string, consts.PluginType) bool { return false }
func (noPlugins) Get(string, consts.PluginType) (func() (interface{}, error), bool) {
	return nil, false
}
func (noPlugins) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
func (noPlugins) Keys(consts.PluginType) []string                   { return nil }
func (noPlugins) DeprecationStatus(string, consts.PluginType) (consts.DeprecationStatus, bool) {
	return 0, false
}

// completePaths gives the paths of Vault's own backend the check that the published SDK demands of them. Vault 1.14 is built with
// the SDK of its own tree, which cannot be had as a module; the nearest that can panics at a path of the enterprise edition, which
// nobody calls here.
func completePaths(core *vault.Core) {
	field := reflect.ValueOf(core).Elem().FieldByName("systemBackend")
	system := *(**vault.SystemBackend)(unsafe.Pointer(field.UnsafeAddr()))
	complete(system.Paths)
}

// transitEngine is transit.Factory, with the same care.
func transitEngine(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b, err := transit.Backend(ctx, conf)
	if err != nil {
		return nil, err
	}
	complete(b.Paths)
	return b, b.Setup(ctx, conf)
}

func complete(paths []*framework.Path) {
	for _, p := range paths {
		_, operation := p.Operations[logical.CreateOperation]
		_, callback := p.Callbacks[logical.CreateOperation]
		if p.ExistenceCheck == nil && (operation || callback) {
			p.ExistenceCheck = func(context.Context, *logical.Request, *framework.FieldData) (bool, error) { return false, nil }
		}
	}
}

func certificate() (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "vaultd"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}
