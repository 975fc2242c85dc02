package upstream

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/vault"
)

// Vault is the PKI engine of Vault or OpenBao.
type Vault struct {
	client *vault.Client
	pki    string
}

// NewVault takes the mount of the PKI engine, such as "pki". It asks nothing yet.
func NewVault(client *vault.Client, pki string) (*Vault, error) {
	pki = strings.Trim(pki, "/")
	if client == nil || pki == "" || strings.Contains(pki, "..") || strings.ContainsAny(pki, "?# ") {
		return nil, fmt.Errorf("%w: the upstream in Vault needs a client and the mount of a PKI engine, such as pki", identity.ErrInvalid)
	}
	return &Vault{client: client, pki: pki}, nil
}

// String names the server and the engine.
func (v *Vault) String() string { return "vault:" + v.client.String() + "/" + v.pki }

// pemList is a list of PEM certificates: an array, or one string with all of them, as different calls answer.
type pemList []string

// UnmarshalJSON takes either.
func (l *pemList) UnmarshalJSON(raw []byte) error {
	var one string
	if err := json.Unmarshal(raw, &one); err == nil {
		if *l = nil; one != "" {
			*l = pemList{one}
		}
		return nil
	}
	return json.Unmarshal(raw, (*[]string)(l))
}

// Sign asks for root/sign-intermediate. The engine decides on the path length and the lifetime, as its own settings say;
// the policy needs "update" on it.
func (v *Vault) Sign(ctx context.Context, req *x509.CertificateRequest, ttl time.Duration) ([]byte, [][]byte, [][]byte, error) {
	in := map[string]any{
		"csr":            string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: req.Raw})),
		"common_name":    req.Subject.CommonName,
		"use_csr_values": true,
		"format":         "pem",
		"ttl":            strconv.FormatInt(int64(ttl/time.Second), 10) + "s",
	}
	var out struct {
		Certificate string  `json:"certificate"`
		IssuingCA   string  `json:"issuing_ca"`
		CAChain     pemList `json:"ca_chain"`
	}
	if err := v.client.Do(ctx, http.MethodPost, v.pki+"/root/sign-intermediate", in, &out); err != nil {
		return nil, nil, nil, wrapVault(err)
	}
	cert, err := parsePEM("the certificate that Vault signed", []byte(out.Certificate))
	if err != nil {
		return nil, nil, nil, err
	}
	rest := cert[1:]
	for _, s := range append(pemList{out.IssuingCA}, out.CAChain...) {
		if s == "" {
			continue
		}
		more, err := parsePEM("the chain that Vault answered", []byte(s))
		if err != nil {
			return nil, nil, nil, err
		}
		rest = append(rest, more...)
	}
	chain, roots := split(rest)
	if len(roots) == 0 {
		if roots, err = v.roots(ctx); err != nil {
			return nil, nil, nil, err
		}
	}
	return cert[0].Raw, chain, roots, nil
}

// roots are the self-signed ends of the engine's chain.
func (v *Vault) roots(ctx context.Context) ([][]byte, error) {
	var out struct {
		Certificate string  `json:"certificate"`
		CAChain     pemList `json:"ca_chain"`
	}
	if err := v.client.Do(ctx, http.MethodGet, v.pki+"/cert/ca_chain", nil, &out); err != nil {
		return nil, wrapVault(err)
	}
	all := out.Certificate
	if all == "" {
		all = strings.Join(out.CAChain, "\n")
	}
	certs, err := parsePEM("Vault's "+v.pki+"/cert/ca_chain", []byte(all))
	if err != nil {
		return nil, err
	}
	_, roots := split(certs)
	if len(roots) == 0 {
		return nil, fmt.Errorf("%w: Vault's %s/cert/ca_chain does not end with a self-signed root: import the root into the engine (%s/config/ca, or %s/issuers/import/cert)", identity.ErrInvalid, v.pki, v.pki, v.pki)
	}
	return roots, nil
}

// Follow asks for the roots every now and then, and keeps the token alive meanwhile.
func (v *Vault) Follow(ctx context.Context, _ <-chan identity.Below, tell func(*identity.Above, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- v.client.Run(ctx) }()
	poll(ctx, nil, v.roots, tell)
	cancel()
	return <-done
}

// wrapVault gives the client's errors their names in this house.
func wrapVault(err error) error {
	for from, to := range map[error]error{
		vault.ErrInvalid: identity.ErrInvalid, vault.ErrDenied: identity.ErrDenied,
		vault.ErrNotFound: identity.ErrNotFound, vault.ErrUnavailable: identity.ErrUnavailable,
	} {
		if errors.Is(err, from) {
			return fmt.Errorf("%w: %w", to, err)
		}
	}
	return err
}
