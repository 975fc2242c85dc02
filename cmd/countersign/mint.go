package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
)

func x509Command(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "x509", Short: "Make X.509-SVIDs by your own decision, without a workload's evidence"}
	a.flags(cmd)
	cmd.AddCommand(x509Mint(a))
	return cmd
}

// minted is what is told of a minted SVID. PrivateKey is there only if it was asked for.
type minted struct {
	SPIFFEID    string    `json:"spiffe_id"`
	Serial      string    `json:"serial"`
	NotAfter    time.Time `json:"not_after"`
	DNSNames    []string  `json:"dns_names,omitempty"`
	Files       []string  `json:"files,omitempty"`
	Certificate string    `json:"certificate,omitempty"` // PEM, where no files were written
	PrivateKey  string    `json:"private_key,omitempty"`
	Bundle      string    `json:"bundle,omitempty"`
}

func x509Mint(a *admin) *cobra.Command {
	req := &adminv1.MintX509Request{}
	var ttl time.Duration
	var dir, keyType string
	var printKey bool
	cmd := &cobra.Command{
		Use: "mint --id SPIFFE-ID", Short: "Make a key here and have an X.509-SVID signed for it", Args: cobra.NoArgs,
		Long: `Make a key on this machine and have an X.509-SVID signed for it, for what cannot attest: a first test, a machine without an agent.
The private key never leaves this machine; it is written with mode 0600, or printed only with --print-key.

Nobody renews what is minted, and deleting an entry does not end it: it lasts until it expires, or its authority is given up. It needs the
role operator, and security for the ID of an admin or of a cluster below. Each is in the audit log as mint.x509.`,
		Example: `  countersign x509 mint --id spiffe://example.org/printer --write /etc/printer/svid --ttl 24h
  countersign x509 mint --id spiffe://example.org/web --dns web.example.org --print-key -o json
  countersign x509 mint --id spiffe://example.org/alice --write ~/.countersign/alice && countersign status --member ca-1:8443 --svid ~/.countersign/alice`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.SpiffeId == "" {
				return fmt.Errorf("%w: --id is needed: which identity?", identity.ErrInvalid)
			}
			if dir == "" && !printKey {
				return fmt.Errorf("%w: where is the private key to go? --write FOLDER, or --print-key to print it", identity.ErrInvalid)
			}
			if ttl != 0 {
				req.Ttl = durationpb.New(ttl)
			}
			key, err := mintKey(keyType)
			if err != nil {
				return err
			}
			if req.PublicKey, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
				return fmt.Errorf("encoding the public key: %w", err)
			}
			var res *adminv1.MintX509Response
			if err := a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
				res, err = adminv1.NewMintClient(conn).MintX509(ctx, req)
				return err
			}); err != nil {
				return err
			}
			out, err := mintedOf(req, res, key, dir, printKey)
			if err != nil {
				return err
			}
			if a.out.JSON() {
				return a.out.Print(cmd.OutOrStdout(), out, nil)
			}
			return out.print(cmd.OutOrStdout(), &a.out)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.SpiffeId, "id", "", "the SPIFFE ID")
	f.StringSliceVar(&req.DnsNames, "dns", nil, "DNS name in the certificate (repeatable)")
	f.DurationVar(&ttl, "ttl", 0, "lifetime, 5s to 24h (default the trust domain's)")
	f.StringVar(&keyType, "key-type", "ec-p256", "ec-p256, ec-p384, rsa-2048 or rsa-4096")
	f.StringVar(&dir, "write", "", "write svid.pem, key.pem (0600) and bundle.pem into this folder")
	f.BoolVar(&printKey, "print-key", false, "print the private key too, to standard output")
	_ = cmd.RegisterFlagCompletionFunc("key-type", cobra.FixedCompletions([]string{"ec-p256", "ec-p384", "rsa-2048", "rsa-4096"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func mintKey(kind string) (crypto.Signer, error) {
	switch kind {
	case "ec-p256":
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ec-p384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "rsa-2048":
		return rsa.GenerateKey(rand.Reader, 2048)
	case "rsa-4096":
		return rsa.GenerateKey(rand.Reader, 4096)
	}
	return nil, fmt.Errorf("%w: --key-type %q: want ec-p256, ec-p384, rsa-2048 or rsa-4096", identity.ErrInvalid, kind)
}

func mintedOf(req *adminv1.MintX509Request, res *adminv1.MintX509Response, key crypto.Signer, dir string, printKey bool) (*minted, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the private key: %w", err)
	}
	defer clear(der)
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	defer clear(keyPEM)
	certs, bundle := pemOf(res.Chain), pemOf(res.Bundle.GetX509Authorities())
	out := &minted{SPIFFEID: req.SpiffeId, Serial: res.Serial, NotAfter: res.NotAfter.AsTime().UTC(), DNSNames: req.DnsNames}
	if dir != "" {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("making the folder of --write: %w", err)
		}
		for _, f := range []struct {
			name string
			data []byte
			mode os.FileMode
		}{{"key.pem", keyPEM, 0o600}, {"svid.pem", certs, 0o644}, {"bundle.pem", bundle, 0o644}} {
			path := filepath.Join(dir, f.name)
			if err := durable.WriteFile(path, f.data, f.mode); err != nil {
				return nil, err
			}
			out.Files = append(out.Files, path)
		}
	}
	if printKey {
		out.Certificate, out.PrivateKey, out.Bundle = string(certs), string(keyPEM), string(bundle)
	}
	return out, nil
}

func pemOf(ders [][]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// print is for people, and with --print-key the PEM alone, which can be piped on.
func (m *minted) print(w io.Writer, out *cli.Output) error {
	if m.PrivateKey != "" {
		_, err := io.WriteString(w, m.Certificate+m.PrivateKey)
		return err
	}
	return out.Print(w, m, func() cli.Table {
		return cli.Table{Rows: [][]string{
			{"spiffe id", m.SPIFFEID}, {"serial", m.Serial}, {"until", m.NotAfter.Format(time.RFC3339)}, {"dns names", orDash(strings.Join(m.DNSNames, " "))},
			{"files", strings.Join(m.Files, " ")},
		}}
	})
}

func jwtCommand(a *admin) *cobra.Command {
	cmd := &cobra.Command{Use: "jwt", Short: "Make JWT-SVIDs by your own decision, without a workload's evidence"}
	a.flags(cmd)
	req := &adminv1.MintJWTRequest{}
	var ttl time.Duration
	mint := &cobra.Command{
		Use: "mint --id SPIFFE-ID --audience NAME", Short: "Have a JWT-SVID signed", Args: cobra.NoArgs,
		Long: `Have a JWT-SVID signed, and print it: the bare token, so that it can be piped on. Whoever has it is that identity towards the audience
until it expires. It needs the role operator, and security for the ID of an admin or of a cluster below. Each is in the audit log as mint.jwt,
without the token.`,
		Example: `  countersign jwt mint --id spiffe://example.org/ci --audience registry
  countersign jwt mint --id spiffe://example.org/ci --audience registry --ttl 10m -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.SpiffeId == "" || len(req.Audience) == 0 {
				return fmt.Errorf("%w: --id and --audience are needed: which identity, and who is to accept the token?", identity.ErrInvalid)
			}
			if ttl != 0 {
				req.Ttl = durationpb.New(ttl)
			}
			return a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) error {
				res, err := adminv1.NewMintClient(conn).MintJWT(ctx, req)
				if err != nil {
					return err
				}
				return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table { return cli.Table{Rows: [][]string{{res.Token}}} })
			})
		},
	}
	f := mint.Flags()
	f.StringVar(&req.SpiffeId, "id", "", "the SPIFFE ID")
	f.StringSliceVar(&req.Audience, "audience", nil, "who is to accept the token (repeatable)")
	f.DurationVar(&ttl, "ttl", 0, "lifetime, 5s to 24h (default the trust domain's)")
	cmd.AddCommand(mint)
	return cmd
}
