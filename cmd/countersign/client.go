package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/server"
)

// admin is what every operator's command needs: the socket, the format, and one call's deadline.
type admin struct {
	socket  string
	remote  remote
	timeout time.Duration
	stale   bool
	out     cli.Output
}

// flags adds the common flags to a command group.
func (a *admin) flags(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&a.socket, "socket", "", "admin socket of a member on this machine (default $COUNTERSIGN_ADMIN_SOCKET, "+config.DefaultAdminSocket+", or that of countersign dev); with --member, the Workload API socket that gives you your SVID (default $SPIFFE_ENDPOINT_SOCKET, "+config.DefaultAgentSocket+")")
	a.remote.flags(cmd)
	cmd.PersistentFlags().DurationVar(&a.timeout, "timeout", 15*time.Second, "how long a call may take")
	cmd.PersistentFlags().BoolVar(&a.stale, "stale", false, "read what this member knows, without asking the leader: it may be of the past")
	a.out.Flag(cmd)
}

// call connects and runs f with the caller's deadline; errors of the other side come back as sentinels.
func (a *admin) call(cmd *cobra.Command, f func(context.Context, adminv1.AdminClient) error) error {
	return a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) error { return f(ctx, adminv1.NewAdminClient(conn)) })
}

// connect is call for the other services that operators have.
func (a *admin) connect(cmd *cobra.Command, f func(context.Context, *grpc.ClientConn) error) error {
	return a.connectFor(cmd, a.timeout, f)
}

// connectFor is connect with a deadline of its own; 0: none.
func (a *admin) connectFor(cmd *cobra.Command, timeout time.Duration, f func(context.Context, *grpc.ClientConn) error) error {
	ctx, cancel := context.WithCancel(cmd.Context())
	if timeout > 0 {
		ctx, cancel = context.WithTimeout(cmd.Context(), timeout)
	}
	defer cancel()
	l, err := a.dial(ctx)
	if err != nil {
		return err
	}
	defer l.Close()
	if a.stale {
		ctx = metadata.AppendToOutgoingContext(ctx, server.MetadataStale, "true")
	}
	return l.explain(f(ctx, l.conn))
}

// requestID is the ID of the last call, if it failed: by it the member's records of the call are found.
type requestID struct {
	mu sync.Mutex
	id string
}

// dial connects to a member.
func (r *requestID) dial(target string, creds credentials.TransportCredentials, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient(target, append(more, grpc.WithTransportCredentials(creds),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			var trailer metadata.MD
			err := next(ctx, method, req, reply, cc, append(opts, grpc.Trailer(&trailer))...)
			r.note(trailer, err)
			return err
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := next(ctx, desc, cc, method, opts...)
			return notedStream{s, r}, err
		}))...)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", target, err)
	}
	return conn, nil
}

func (r *requestID) note(trailer metadata.MD, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.id = ""
	if ids := trailer.Get(server.RequestIDKey); err != nil && len(ids) == 1 {
		r.id = ids[0]
	}
}

// notedStream tells how its stream ended.
type notedStream struct {
	grpc.ClientStream
	id *requestID
}

// RecvMsg notes the error that ends the stream.
func (s notedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err != nil && !errors.Is(err, io.EOF) {
		s.id.note(s.Trailer(), err)
	}
	return err
}

// unimplemented reports whether the other side does not know the method at all.
func unimplemented(err error) bool { return status.Code(err) == codes.Unimplemented }

// adminSocket finds the socket: as told, or the first that is there.
func adminSocket(told string) (string, error) {
	if told == "" {
		told = os.Getenv("COUNTERSIGN_ADMIN_SOCKET")
	}
	if told != "" {
		return filepath.Abs(told)
	}
	candidates := []string{config.DefaultAdminSocket}
	if dir, err := devDataDir(); err == nil {
		candidates = append(candidates, filepath.Join(dir, "admin.sock"))
	}
	for _, c := range candidates {
		if _, err := os.Stat(c); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return c, nil
		}
	}
	return "", fmt.Errorf("%w: no member is running here: looked for %v; name its socket with --socket", identity.ErrUnavailable, candidates)
}

// devDataDir is where countersign dev keeps everything unless told otherwise.
func devDataDir() (string, error) {
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("finding the home folder: %w", err)
	}
	return filepath.Join(home, ".countersign", "dev"), nil
}
