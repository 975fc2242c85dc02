package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
)

// alone is follow without the product: the process itself serves one SVID, made beforehand, at the socket. What it takes is what a
// program of this kind takes to start, to connect and to be answered on this machine; what follow takes beyond that is the product's.
func alone(socket string) error {
	answer, err := ownSVID()
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", strings.TrimPrefix(socket, "unix://"))
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, &ownAPI{answer: answer})
	go func() { _ = s.Serve(l) }()
	return follow(socket)
}

type ownAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	answer *workload.X509SVIDResponse
}

func (a *ownAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	if err := s.Send(a.answer); err != nil {
		return err
	}
	<-s.Context().Done()
	return s.Context().Err()
}

// ownSVID is signed by its own key.
func ownSVID() (*workload.X509SVIDResponse, error) {
	id := &url.URL{Scheme: "spiffe", Host: "alone.test", Path: "/pod"}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{id}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
	cert, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: id.String(), X509Svid: cert, X509SvidKey: pkcs8, Bundle: cert}}}, nil
}
