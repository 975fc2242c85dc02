package server

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	adminv1 "countersign.io/countersign/api/admin/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

func attestBig(t *testing.T, conn *grpc.ClientConn) (*nodev1.AgentSVID, error) {
	_, pub := newKey(t)
	return attest(t, conn, &nodev1.AttestRequest_Begin{PublicKey: pub, Evidence: &nodev1.AttestRequest_Begin_KubeToken{KubeToken: strings.Repeat("a", 1<<20)}})
}

// joinToken makes a token as an operator does and takes it apart as a newcomer does.
func (w *world) joinToken(t *testing.T, req *adminv1.CreateTokenRequest) node.Token {
	t.Helper()
	resp, err := w.admin(t).CreateToken(testContext(t), req)
	if err != nil {
		t.Fatal(err)
	}
	tok, err := node.ParseToken(resp.Token)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func byJoin(secret string, pub []byte) *nodev1.AttestRequest_Begin {
	return &nodev1.AttestRequest_Begin{PublicKey: pub, Evidence: &nodev1.AttestRequest_Begin_JoinToken{JoinToken: secret}}
}

func byKube(token, name string, pub []byte) *nodev1.AttestRequest_Begin {
	return &nodev1.AttestRequest_Begin{PublicKey: pub, KubeCluster: name, Evidence: &nodev1.AttestRequest_Begin_KubeToken{KubeToken: token}}
}

func TestAttestByJoinToken(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	tok := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "agent", KubeCluster: cluster, KubeNode: "node-1"})
	if len(tok.Addresses) != 1 || tok.Addresses[0] != w.port.Addr().String() || tok.Purpose != identity.JoinAgent {
		t.Fatalf("token %v", tok)
	}
	conn := w.dial(t, nil)
	key, pub := newKey(t)

	// A bad key is found before the secret is spent.
	_, err := attest(t, conn, byJoin(tok.Secret, []byte("garbage")))
	wantCode(t, err, codes.InvalidArgument, "public key")
	svid, err := attest(t, conn, byJoin(tok.Secret, pub))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(svid.SpiffeId, "spiffe://example.org/countersign/agent/join/") || svid.Reattestable || svid.Bundle == nil {
		t.Fatalf("SVID %v", svid)
	}
	// It works at once.
	mine := w.dial(t, &tls.Certificate{Certificate: svid.Chain, PrivateKey: key})
	_, pub2 := newKey(t)
	renewed, err := nodev1.NewNodeClient(mine).Renew(testContext(t), &nodev1.RenewRequest{PublicKey: pub2})
	if err != nil || renewed.SpiffeId != svid.SpiffeId {
		t.Fatalf("renewed %v, error %v", renewed, err)
	}
	_, err = nodev1.NewNodeClient(mine).Renew(testContext(t), &nodev1.RenewRequest{PublicKey: []byte("garbage")})
	wantCode(t, err, codes.InvalidArgument)

	_, err = attest(t, conn, byJoin(tok.Secret, pub))
	wantCode(t, err, codes.FailedPrecondition, "used")
	w.wantNoSecrets(t, err, tok.Secret)

	late := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "agent"})
	w.ahead.Store(int64(11 * time.Minute))
	_, err = attest(t, conn, byJoin(late.Secret, pub))
	wantCode(t, err, codes.Unauthenticated, "expired")
	w.ahead.Store(0)
	forServers := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	_, err = attest(t, conn, byJoin(forServers.Secret, pub))
	wantCode(t, err, codes.PermissionDenied)
	none, _ := node.NewSecret()
	_, err = attest(t, conn, byJoin(none, pub))
	wantCode(t, err, codes.Unauthenticated)
	_, err = attest(t, conn, byJoin("short", pub))
	wantCode(t, err, codes.InvalidArgument)
	_, err = attest(t, conn, &nodev1.AttestRequest_Begin{PublicKey: pub})
	wantCode(t, err, codes.InvalidArgument, "no evidence")
	w.wantNoSecrets(t, err, late.Secret, forServers.Secret, none)
}

func TestAttestByKubeToken(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	conn := w.dial(t, nil)
	_, pub := newKey(t)
	mine := pod{ns: "countersign", sa: "agent", name: "agent-x", node: "node-7"}
	for range 2 { // again after a restart
		svid, err := attest(t, conn, byKube(w.podToken(t, mine), cluster, pub))
		if err != nil {
			t.Fatal(err)
		}
		if svid.SpiffeId != "spiffe://example.org/countersign/agent/kube/c1/node-7" || !svid.Reattestable {
			t.Fatalf("SVID %v", svid)
		}
	}
	_, err := attest(t, conn, byKube(w.podToken(t, pod{}), cluster, pub))
	wantCode(t, err, codes.PermissionDenied, "prod/web", "agent-account")
	_, err = attest(t, conn, byKube(w.podToken(t, mine), "c2", pub))
	wantCode(t, err, codes.PermissionDenied, `"c1"`, `"c2"`)
	_, err = attest(t, conn, byKube(strings.Repeat("a", identity.MaxTokenBytes+1), cluster, pub))
	wantCode(t, err, codes.InvalidArgument)
	_, err = attest(t, conn, byKube("", cluster, pub))
	wantCode(t, err, codes.InvalidArgument)

	// Another agent of the node was banned: its pod's token is no way around that, a new token of an operator's is.
	other, _ := w.agent(t, "a9", "node-9")
	if err := w.state.BanAgent(testContext(t), other.ID); err != nil {
		t.Fatal(err)
	}
	onNine := pod{ns: "countersign", sa: "agent", name: "agent-z", node: "node-9"}
	_, err = attest(t, conn, byKube(w.podToken(t, onNine), cluster, pub))
	wantCode(t, err, codes.PermissionDenied, "node-9", "banned")
	again := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "agent", KubeCluster: cluster, KubeNode: "node-9"})
	if _, err := attest(t, conn, byJoin(again.Secret, pub)); err != nil {
		t.Errorf("with a new join token: %v", err)
	}

	// Without a leader, who is known comes in again; who is not does not.
	w.state.mu.Lock()
	w.state.down = fmt.Errorf("%w: no leader", identity.ErrUnavailable)
	w.state.mu.Unlock()
	if _, err := attest(t, conn, byKube(w.podToken(t, mine), cluster, pub)); err != nil {
		t.Fatalf("a known agent is kept out for want of a leader: %v", err)
	}
	_, err = attest(t, conn, byKube(w.podToken(t, pod{ns: "countersign", sa: "agent", name: "agent-y", node: "node-8"}), cluster, pub))
	wantCode(t, err, codes.Unavailable)
	w.state.mu.Lock()
	w.state.down = nil
	w.state.mu.Unlock()

	if err := w.state.BanAgent(testContext(t), "spiffe://example.org/countersign/agent/kube/c1/node-7"); err != nil {
		t.Fatal(err)
	}
	_, err = attest(t, conn, byKube(w.podToken(t, mine), cluster, pub))
	wantCode(t, err, codes.PermissionDenied, "banned")
}

// Who takes a service account off a cluster's list ends its agents with it: those connected, and those that come back.
func TestAgentsOfADroppedAccount(t *testing.T) {
	w := newWorld(t).start(t)
	w.registerCluster(t)
	key, pub := newKey(t)
	token := w.podToken(t, pod{ns: "countersign", sa: "agent", name: "agent-x", node: "node-7"})
	svid, err := attest(t, w.dial(t, nil), byKube(token, cluster, pub))
	if err != nil {
		t.Fatal(err)
	}
	conn := w.dial(t, &tls.Certificate{Certificate: svid.Chain, PrivateKey: key})
	renew := func(conn *grpc.ClientConn) error {
		_, err := nodev1.NewNodeClient(conn).Renew(testContext(t), &nodev1.RenewRequest{PublicKey: pub})
		return err
	}
	// Two that the list says nothing about: one with a join token, one on record since before accounts were kept.
	_, joined := w.agent(t, "a1", "node-1")
	before, err := node.KubeAgent(w.td, cluster, "node-8", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.state.PutAgent(testContext(t), before); err != nil {
		t.Fatal(err)
	}
	others := []*grpc.ClientConn{w.dial(t, joined), w.dial(t, w.certificate(t, "/countersign/agent/kube/c1/node-8"))}
	s, other := w.sync(t, conn), w.sync(t, others[1])

	w.registerCluster(t, func(k *identity.KubeCluster) { k.AgentAccounts = append(k.AgentAccounts, "countersign/agent2") })
	if err := renew(conn); err != nil {
		t.Fatalf("the account is on the list: %v", err)
	}
	s.settle()
	w.registerCluster(t, func(k *identity.KubeCluster) { k.AgentAccounts = []string{"countersign/agent2"} })
	s.wantEnd(codes.PermissionDenied, "countersign/agent", "no longer")
	wantCode(t, renew(conn), codes.PermissionDenied, "countersign/agent", "--agent-account")
	_, err = attest(t, w.dial(t, nil), byKube(token, cluster, pub))
	wantCode(t, err, codes.PermissionDenied, "agent-account")
	for _, c := range others {
		if err := renew(c); err != nil {
			t.Errorf("an agent of no account: %v", err)
		}
	}
	other.settle()
	w.registerCluster(t)
	if err := renew(conn); err != nil {
		t.Errorf("the account is on the list again: %v", err)
	}
}

func TestAttestByX509Pop(t *testing.T) {
	caKey, _ := newKey(t)
	caTmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machines"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	caDER, err := x509.CreateCertificate(rand.Reader, caTmpl, caTmpl, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	caCert, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(caCert)
	machine := func(parent *x509.Certificate, signer *ecdsa.PrivateKey) (crypto.Signer, [][]byte) {
		key, _ := newKey(t)
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "node-3"}, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		}, parent, key.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		return key, [][]byte{der}
	}
	w := newWorld(t, func(c *Config) { c.X509PopRoots, c.X509PopKubeCluster = pool, cluster }).start(t)
	w.registerCluster(t)
	key, chain := machine(caCert, caKey)
	_, pub := newKey(t)
	run := func(w *world, chain [][]byte, prove func(challenge []byte) []byte) (*nodev1.AgentSVID, error) {
		s, err := nodev1.NewNodeClient(w.dial(t, nil)).Attest(testContext(t))
		if err != nil {
			return nil, err
		}
		begin := &nodev1.AttestRequest_Begin{PublicKey: pub, Evidence: &nodev1.AttestRequest_Begin_X509Pop{X509Pop: &nodev1.AttestRequest_X509Pop{Chain: chain}}}
		if err := s.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Begin_{Begin: begin}}); err != nil {
			return nil, err
		}
		resp, err := s.Recv()
		if err != nil {
			return nil, err
		}
		if err := s.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Proof{Proof: prove(resp.GetChallenge())}}); err != nil {
			return nil, err
		}
		resp, err = s.Recv()
		return resp.GetSvid(), err
	}
	sign := func(k crypto.Signer, pub []byte) func([]byte) []byte {
		return func(challenge []byte) []byte {
			sig, err := node.SignX509Pop(k, challenge, pub)
			if err != nil {
				t.Fatal(err)
			}
			return sig
		}
	}
	svid, err := run(w, chain, sign(key, pub))
	if err != nil || !svid.Reattestable || !strings.HasPrefix(svid.SpiffeId, "spiffe://example.org/countersign/agent/x509pop/") {
		t.Fatalf("SVID %v, error %v", svid, err)
	}
	if a, _ := w.state.Agent(svid.SpiffeId); a.KubeNode != "node-3" || a.KubeCluster != cluster {
		t.Fatalf("record %v", a)
	}
	stranger, _ := newKey(t)
	_, err = run(w, chain, sign(stranger, pub))
	wantCode(t, err, codes.Unauthenticated)
	_, otherPub := newKey(t)
	_, err = run(w, chain, sign(key, otherPub)) // a proof relayed for another SVID key
	wantCode(t, err, codes.Unauthenticated)
	_, err = run(w, chain, func([]byte) []byte { return nil })
	wantCode(t, err, codes.InvalidArgument)
	_, foreign := machine(caTmpl, stranger)
	_, err = run(w, foreign, nil) // refused before a challenge
	wantCode(t, err, codes.Unauthenticated)
	_, err = run(newWorld(t).start(t), chain, sign(key, pub))
	wantCode(t, err, codes.FailedPrecondition, "x509pop.ca_file")
}

func TestAttestWantsBegin(t *testing.T) {
	w := newWorld(t).start(t)
	s, err := nodev1.NewNodeClient(w.dial(t, nil)).Attest(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Proof{Proof: []byte("x")}}); err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv()
	wantCode(t, err, codes.InvalidArgument, "Begin")
}

func TestNotReadySpendsNothing(t *testing.T) {
	w := newWorld(t).start(t)
	tok := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "agent"})
	srv := w.joinToken(t, &adminv1.CreateTokenRequest{Purpose: "server"})
	_, pub := newKey(t)
	conn := w.dial(t, nil)
	w.stale.Store(int64(2 * time.Hour))
	_, err := attest(t, conn, byJoin(tok.Secret, pub))
	wantCode(t, err, codes.Unavailable)
	_, err = memberv1.NewMemberClient(conn).Join(testContext(t), &memberv1.JoinRequest{Secret: srv.Secret, Id: "m2", Address: "10.0.0.2:8443", Level: 2})
	wantCode(t, err, codes.Unavailable)
	w.stale.Store(0)
	if _, err := attest(t, conn, byJoin(tok.Secret, pub)); err != nil {
		t.Fatal(err)
	}
	if _, err := memberv1.NewMemberClient(conn).Join(testContext(t), &memberv1.JoinRequest{Secret: srv.Secret, Id: "m2", Address: "10.0.0.2:8443", Level: 2}); err != nil {
		t.Fatal(err)
	}
}
