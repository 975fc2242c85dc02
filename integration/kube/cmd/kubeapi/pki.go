package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// writePKI makes a throw-away CA, the pairs of the API server, the administrator and the node's parts, and the service account
// key; once, since a control plane that starts again is the same one.
func writePKI(dir string, p place) error {
	done := filepath.Join(dir, "sa.key")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := template("kubeapi test CA")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	if err := issue(dir, "ca", ca, ca, caKey, caKey); err != nil {
		return err
	}
	api := template("kube-apiserver")
	api.DNSNames = []string{"localhost", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	api.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.ParseIP(p.address), net.IPv4(10, 96, 0, 1)} // the last: service "kubernetes"
	api.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	pairs := map[string]*x509.Certificate{"apiserver": api, "admin": client("test-admin", "system:masters")}
	if p.node != "" {
		kubelet := client("system:node:"+p.node, "system:nodes")
		kubelet.ExtKeyUsage = append(kubelet.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		kubelet.DNSNames, kubelet.IPAddresses = []string{p.node}, []net.IP{net.ParseIP(p.address)}
		pairs["kubelet"] = kubelet
		pairs["controller-manager"] = client("system:kube-controller-manager")
		pairs["scheduler"] = client("system:kube-scheduler")
	}
	for name, t := range pairs {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		if err := issue(dir, name, t, ca, key, caKey); err != nil {
			return err
		}
		if err := writeKubeconfig(dir, name, p.server()); err != nil {
			return err
		}
	}
	sa, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	pub, err := x509.MarshalPKIXPublicKey(sa.Public())
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", pub); err != nil {
		return err
	}
	return writeKey(done, sa)
}

func writeKubeconfig(dir, name, server string) error {
	file := func(name string) string { return filepath.Join(dir, name) }
	return os.WriteFile(file(name+".kubeconfig"), fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: %[1]s}}]
clusters: [{name: test, cluster: {server: %[2]q, certificate-authority: %[3]q}}]
users: [{name: %[1]s, user: {client-certificate: %[4]q, client-key: %[5]q}}]
`, name, server, file("ca.crt"), file(name+".crt"), file(name+".key")), 0o600)
}

// client is of one that the API server knows by these names.
func client(user string, groups ...string) *x509.Certificate {
	t := template(user)
	t.Subject.Organization, t.ExtKeyUsage = groups, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return t
}

func template(cn string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: cn},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}
}

func issue(dir, name string, t, parent *x509.Certificate, key *ecdsa.PrivateKey, signer crypto.Signer) error {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(dir, name+".crt"), "CERTIFICATE", der); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, name+".key"), key)
}

func writeKey(path string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
