// Command kubeapi is a real Kubernetes control plane for tests, as small as it can be: an embedded etcd on Unix sockets
// and the real kube-apiserver, in one process on loopback. It is a module of its own, so that none of Kubernetes' own
// dependencies reach the product.
//
//	kubeapi -dir DIR -port 16443
//
// It writes DIR/pki (admin.kubeconfig among it) and prints READY once the API server says so.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"
	_ "time/tzdata"

	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() {
	dir := flag.String("dir", "", "state folder")
	port := flag.Int("port", 16443, "port on 127.0.0.1")
	issuer := flag.String("issuer", "https://kubernetes.default.svc.cluster.local", "issuer of service account tokens")
	flag.Parse()
	if err := run(*dir, *port, *issuer); err != nil {
		fmt.Fprintln(os.Stderr, "kubeapi:", err)
		os.Exit(1)
	}
}

func run(dir string, port int, issuer string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("-dir %q: want an absolute path", dir)
	}
	server := fmt.Sprintf("https://127.0.0.1:%d", port)
	pki := filepath.Join(dir, "pki")
	if err := writePKI(pki, server); err != nil {
		return fmt.Errorf("making the keys: %w", err)
	}
	etcd, client, err := startEtcd(dir)
	if err != nil {
		return fmt.Errorf("starting etcd: %w", err)
	}
	defer etcd.Close()
	go waitReady(server, pki)
	file := func(name string) string { return filepath.Join(pki, name) }
	cmd := app.NewAPIServerCommand()
	cmd.SetArgs(append([]string{
		"--etcd-servers=" + client,
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port),
		"--endpoint-reconciler-type=none",
		"--tls-cert-file=" + file("apiserver.crt"), "--tls-private-key-file=" + file("apiserver.key"),
		"--client-ca-file=" + file("ca.crt"),
		"--service-account-issuer=" + issuer,
		"--service-account-jwks-uri=" + server + "/openid/v1/jwks",
		"--service-account-signing-key-file=" + file("sa.key"),
		"--service-account-key-file=" + file("sa.pub"),
		"--authorization-mode=Node,RBAC",
		"--service-cluster-ip-range=10.96.0.0/24",
		"--cert-dir=" + pki,
	}, flag.Args()...))
	if code := cli.Run(cmd); code != 0 {
		return fmt.Errorf("the API server ended with %d", code)
	}
	return nil
}

// startEtcd listens on Unix sockets only, and does not sync: its state is thrown away.
func startEtcd(dir string) (*embed.Etcd, string, error) {
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel, cfg.UnsafeNoFsync = filepath.Join(dir, "etcd"), "error", true
	client := url.URL{Scheme: "unix", Path: filepath.Join(dir, "c.sock")}
	peer := url.URL{Scheme: "unix", Path: filepath.Join(dir, "p.sock")}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, "", err
	}
	select {
	case <-e.Server.ReadyNotify():
		return e, client.String(), nil
	case err := <-e.Err():
		return nil, "", err
	case <-time.After(time.Minute):
		e.Close()
		return nil, "", fmt.Errorf("not ready within a minute")
	}
}

func waitReady(server, pki string) {
	ca, err := os.ReadFile(filepath.Join(pki, "ca.crt"))
	if err != nil {
		return
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	cert, err := tls.LoadX509KeyPair(filepath.Join(pki, "admin.crt"), filepath.Join(pki, "admin.key"))
	if err != nil {
		return
	}
	c := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}}}
	for range time.Tick(100 * time.Millisecond) {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, server+"/readyz", nil)
		if err != nil {
			return
		}
		if res, err := c.Do(req); err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				fmt.Println("READY")
				return
			}
		}
	}
}
