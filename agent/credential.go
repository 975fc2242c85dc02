package agent

import (
	"crypto"
	"fmt"

	nodev1 "countersign.io/countersign/api/node/v1"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/identity"
)

// Credential is how an agent proves its node: JoinToken, KubeToken or X509Pop.
type Credential interface {
	// begin makes the evidence anew, since what it is read from may have changed. prove answers a challenge for the
	// public key; nil for a kind without one.
	begin() (b *nodev1.AttestRequest_Begin, prove func(challenge, public []byte) ([]byte, error), err error)
	// reusable: the same credential works again.
	reusable() bool
	// String never shows a secret.
	String() string
}

// JoinToken proves the node by the one-time secret of a join token (node.Token.Secret).
func JoinToken(secret string) Credential { return &joinToken{secret: secret} }

// KubeToken proves the node by the service account token of the agent's own pod, in the kube cluster of that registered
// name. read is called at each attestation: the kubelet replaces the token.
func KubeToken(cluster string, read func() ([]byte, error)) Credential {
	return &kubeToken{cluster: cluster, read: read}
}

// X509Pop proves the node by a certificate (DER, leaf first) and its key. load is called at each attestation.
func X509Pop(load func() (chain [][]byte, key crypto.Signer, err error)) Credential {
	return &x509Pop{load: load}
}

type joinToken struct{ secret string }

func (c *joinToken) reusable() bool   { return false }
func (c *joinToken) String() string   { return "join token" }
func (c *joinToken) GoString() string { return c.String() }

func (c *joinToken) begin() (*nodev1.AttestRequest_Begin, func(_, _ []byte) ([]byte, error), error) {
	if err := node.CheckSecret(c.secret); err != nil {
		return nil, nil, err
	}
	return &nodev1.AttestRequest_Begin{Evidence: &nodev1.AttestRequest_Begin_JoinToken{JoinToken: c.secret}}, nil, nil
}

type kubeToken struct {
	cluster string
	read    func() ([]byte, error)
}

func (c *kubeToken) reusable() bool { return true }
func (c *kubeToken) String() string {
	return fmt.Sprintf("service account token of kube cluster %q", c.cluster)
}

func (c *kubeToken) begin() (*nodev1.AttestRequest_Begin, func(_, _ []byte) ([]byte, error), error) {
	token, err := c.read()
	if err != nil {
		return nil, nil, fmt.Errorf("reading the agent pod's service account token: %w", err)
	}
	if len(token) == 0 || len(token) > identity.MaxTokenBytes {
		return nil, nil, fmt.Errorf("%w: the agent pod's service account token has %d bytes: want 1 to %d", identity.ErrInvalid, len(token), identity.MaxTokenBytes)
	}
	return &nodev1.AttestRequest_Begin{
		Evidence:    &nodev1.AttestRequest_Begin_KubeToken{KubeToken: string(token)},
		KubeCluster: c.cluster,
	}, nil, nil
}

type x509Pop struct {
	load func() ([][]byte, crypto.Signer, error)
}

func (c *x509Pop) reusable() bool { return true }
func (c *x509Pop) String() string { return "x509pop certificate" }

func (c *x509Pop) begin() (*nodev1.AttestRequest_Begin, func(_, _ []byte) ([]byte, error), error) {
	chain, key, err := c.load()
	if err != nil {
		return nil, nil, fmt.Errorf("reading the x509pop certificate and key: %w", err)
	}
	b := &nodev1.AttestRequest_Begin{Evidence: &nodev1.AttestRequest_Begin_X509Pop{X509Pop: &nodev1.AttestRequest_X509Pop{Chain: chain}}}
	return b, func(challenge, public []byte) ([]byte, error) { return node.SignX509Pop(key, challenge, public) }, nil
}
