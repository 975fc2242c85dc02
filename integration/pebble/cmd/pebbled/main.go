// Command pebbled is a Pebble, the ACME CA for tests, on loopback, with a DNS server that knows every host at 127.0.0.1. It is a
// module of its own, so that nothing of it gets near the product.
//
//	pebbled -dir DIR -tls-port PORT -http-port PORT -validity 30s
//
// writes DIR/ca.pem (its own TLS certificate) and DIR/root.pem (the root of what it issues), prints its address, and serves
// until it is ended. Challenges are looked for at the two ports.
package main

import (
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
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "pebbled:", err)
		os.Exit(1)
	}
}

func run() error {
	dir := flag.String("dir", "", "folder for ca.pem and root.pem")
	tlsPort := flag.Int("tls-port", 0, "where tls-alpn-01 is looked for")
	httpPort := flag.Int("http-port", 0, "where http-01 is looked for")
	validity := flag.Duration("validity", time.Hour, "of what is issued")
	flag.Parse()
	if *dir == "" {
		return errors.New("-dir is missing")
	}
	resolver, err := serveDNS()
	if err != nil {
		return err
	}
	logger := log.New(os.Stderr, "", log.LstdFlags)
	store := db.NewMemoryStore()
	authority := ca.New(logger, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "short", ValidityPeriod: uint64(validity.Seconds())}})
	front := wfe.New(logger, store, va.New(logger, *httpPort, *tlsPort, true, resolver, store), authority, []string{"pebble.test"}, true, false, 1, 1)
	cert, raw, err := selfSigned()
	if err != nil {
		return err
	}
	root := authority.GetRootCert(0)
	if root == nil {
		return errors.New("there is no root")
	}
	for name, b := range map[string][]byte{"ca.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}), "root.pem": root.PEM()} {
		if err := os.WriteFile(filepath.Join(*dir, name), b, 0o600); err != nil {
			return err
		}
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}})
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	return http.Serve(l, front.Handler())
}

// serveDNS answers on TCP, as Pebble asks.
func serveDNS() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go func() {
		_ = dns.ActivateAndServe(l, nil, dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			a := new(dns.Msg).SetReply(q)
			if len(q.Question) == 1 && q.Question[0].Qtype == dns.TypeA {
				a.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(127, 0, 0, 1)}}
			}
			_ = w.WriteMsg(a)
		}))
	}()
	return l.Addr().String(), nil
}

func selfSigned() (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "pebbled"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, der, err
}
