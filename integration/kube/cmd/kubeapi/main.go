// Command kubeapi is a real Kubernetes control plane for tests, as small as it can be: an embedded etcd on Unix sockets
// and the real kube-apiserver, in one process on loopback. It is a module of its own, so that none of Kubernetes' own
// dependencies reach the product.
//
//	kubeapi -dir DIR -port 16443 [-node NAME] [-bind ADDRESS] [-address ADDRESS] [flag of the API server ...]
//
// It writes DIR/pki (admin.kubeconfig among it), where there is none yet, and prints READY once the API server says so. With
// -node it is the control plane of a node with that name: it has pairs for the kubelet, the controller manager and the
// scheduler as well, and may call the kubelet.
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
	port := flag.Int("port", 16443, "port")
	bind := flag.String("bind", "127.0.0.1", "address to listen on")
	address := flag.String("address", "127.0.0.1", "address by which clients and the node reach it")
	node := flag.String("node", "", "name of the node, if there is one")
	issuer := flag.String("issuer", "https://kubernetes.default.svc.cluster.local", "issuer of service account tokens")
	flag.Parse()
	if err := run(place{*dir, *bind, *address, *port, *node}, *issuer); err != nil {
		fmt.Fprintln(os.Stderr, "kubeapi:", err)
		os.Exit(1)
	}
}

// place is where the control plane is, and what it is of.
type place struct {
	dir, bind, address string
	port               int
	node               string
}

func (p place) server() string { return fmt.Sprintf("https://%s:%d", p.address, p.port) }

func run(p place, issuer string) error {
	if !filepath.IsAbs(p.dir) {
		return fmt.Errorf("-dir %q: want an absolute path", p.dir)
	}
	server, pki := p.server(), filepath.Join(p.dir, "pki")
	if err := writePKI(pki, p); err != nil {
		return fmt.Errorf("making the keys: %w", err)
	}
	etcd, client, err := startEtcd(p.dir)
	if err != nil {
		return fmt.Errorf("starting etcd: %w", err)
	}
	defer etcd.Close()
	go waitReady(server, pki)
	file := func(name string) string { return filepath.Join(pki, name) }
	args := []string{
		"--etcd-servers=" + client,
		"--bind-address=" + p.bind, fmt.Sprintf("--secure-port=%d", p.port),
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
	}
	if p.node != "" {
		args = append(args,
			"--advertise-address="+p.address,
			"--allow-privileged=true",
			"--enable-admission-plugins=NodeRestriction",
			"--kubelet-client-certificate="+file("admin.crt"), "--kubelet-client-key="+file("admin.key"),
			"--kubelet-certificate-authority="+file("ca.crt"),
			"--kubelet-preferred-address-types=InternalIP",
		)
	}
	cmd := app.NewAPIServerCommand()
	cmd.SetArgs(append(args, flag.Args()...))
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
