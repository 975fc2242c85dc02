package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// plant tries all that could mislead whoever looks into the folder later, and then waits.
func plant(dir string) {
	file := func(name string) string { return filepath.Join(dir, name) }
	for what, err := range map[string]error{
		"plant a symlink":   os.Symlink("/etc/shadow", file("svid.pem")),
		"plant a file":      os.WriteFile(file("planted"), []byte("planted"), 0o644),
		"remove the socket": os.Remove(file("agent.sock")),
		"move the socket":   os.Rename(file("agent.sock"), file("moved")),
		"make a folder":     os.Mkdir(file("folder"), 0o755),
		"open it to all":    os.Chmod(dir, 0o777),
	} {
		report(what, err)
	}
	wait()
}

// files reads an SVID from files, as a program that knows nothing of SPIFFE does.
func files(dir string) error {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	bundle, err := os.ReadFile(filepath.Join(dir, "bundle.pem"))
	if err != nil {
		return err
	}
	if !roots.AppendCertsFromPEM(bundle) {
		return errors.New("no certificate in bundle.pem")
	}
	between := x509.NewCertPool()
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		between.AddCert(c)
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return err
	}
	key, err := os.Stat(filepath.Join(dir, "key.pem"))
	if err != nil {
		return err
	}
	tokens, err := filepath.Glob(filepath.Join(dir, "jwt-*"))
	if err != nil {
		return err
	}
	for i, t := range tokens {
		tokens[i] = filepath.Base(t)
	}
	fmt.Println("files", pair.Leaf.URIs[0], pair.Leaf.SerialNumber, key.Mode(), tokens)
	return nil
}

// dial tries to connect, and to be listened to.
func dial(socket string) {
	conn, err := net.Dial("unix", socket)
	if err == nil {
		// gRPC over HTTP/2: whoever is served is sent settings.
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
		_, err = io.ReadFull(conn, make([]byte, 9))
		conn.Close()
	}
	report("use the socket", err)
	wait()
}

func report(what string, err error) {
	if err == nil {
		fmt.Println("could", what)
	} else {
		fmt.Println("failed to", what+":", err)
	}
}

func wait() {
	fmt.Println("done")
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	<-end
}
