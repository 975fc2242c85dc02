package main

import (
	"context"
	"crypto"
	"fmt"

	"google.golang.org/grpc"

	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/ca/kmskey"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/server"
	"countersign.io/countersign/store"
)

// rotating is the life of the authorities as the server sees it.
func (m *member) rotating(w *store.Writer) server.Rotating {
	return server.Rotating{Rotations: m.store.Rotations, Writes: w, Manual: m.c.CA.Rotation == config.RotationManual}
}

// askReport asks another member, that very one, what its agents have of the bundle.
func (m *member) askReport(ctx context.Context, from identity.Member, req *memberv1.ReportRequest) (grpc.ServerStreamingClient[memberv1.ReportResponse], func(), error) {
	conn, err := m.dialMember(ctx, from)
	if err != nil {
		return nil, nil, err
	}
	stream, err := memberv1.NewMemberClient(conn).Report(ctx, req)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return stream, func() { conn.Close() }, nil
}

// newX509Key reports whether ca.key names another key than the one at uri; nil if there is no ca.key.
func (m *member) newX509Key() func(uri string) bool {
	if m.c.CA.Key == "" {
		return nil
	}
	return func(uri string) bool { return uri != "" && kmskey.CheckSame(m.c.CA.Key, uri) != nil }
}

// keyFor is this member's own way to the key that a record names: ca.key, or one of ca.old_keys.
func (m *member) keyFor(a *identity.Authority) (uri string, err error) {
	err = kmskey.CheckSame(m.c.CA.Key, a.KeyURI)
	if err == nil {
		return m.c.CA.Key, nil
	}
	for _, old := range m.c.CA.OldKeys {
		if kmskey.CheckSame(old, a.KeyURI) == nil {
			return old, nil
		}
	}
	return "", fmt.Errorf("opening the key of %s authority %s: ca.key, ca.old_keys: %w", a.Kind, a.ID, err)
}

func openKMS(uri string) (crypto.Signer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), kmsTime)
	defer cancel()
	key, err := kmskey.Open(ctx, uri)
	if err != nil {
		return nil, fmt.Errorf("opening ca.key: %w", err)
	}
	return key, nil
}
