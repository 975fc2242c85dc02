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
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/server"
)

// admin is what every operator's command needs: the socket, the format, and one call's deadline.
type admin struct {
	socket  string
	timeout time.Duration
	stale   bool
	out     cli.Output
}

// flags adds the common flags to a command group.
func (a *admin) flags(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&a.socket, "socket", "", "admin socket of a member on this machine (default $COUNTERSIGN_ADMIN_SOCKET, "+config.DefaultAdminSocket+", or that of countersign dev)")
	cmd.PersistentFlags().DurationVar(&a.timeout, "timeout", 15*time.Second, "how long a call may take")
	cmd.PersistentFlags().BoolVar(&a.stale, "stale", false, "read what this member knows, without asking the leader: it may be of the past")
	a.out.Flag(cmd)
}

// call connects and runs f with the caller's deadline; errors of the other side come back as sentinels.
func (a *admin) call(cmd *cobra.Command, f func(context.Context, adminv1.AdminClient) error) error {
	path, err := adminSocket(a.socket)
	if err != nil {
		return err
	}
	var failed requestID
	conn, err := failed.dial(path)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), a.timeout)
	defer cancel()
	if a.stale {
		ctx = metadata.AppendToOutgoingContext(ctx, server.MetadataStale, "true")
	}
	return failed.explain(path, f(ctx, adminv1.NewAdminClient(conn)))
}

// requestID is the ID of the last call, if it failed: by it the member's records of the call are found.
type requestID struct {
	mu sync.Mutex
	id string
}

// dial connects to a member's admin socket.
func (r *requestID) dial(path string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			var trailer metadata.MD
			err := next(ctx, method, req, reply, cc, append(opts, grpc.Trailer(&trailer))...)
			r.note(trailer, err)
			return err
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := next(ctx, desc, cc, method, opts...)
			return notedStream{s, r}, err
		}))
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", path, err)
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

// explain words the error of a call to the member at path.
func (r *requestID) explain(path string, err error) error {
	if err == nil {
		return nil
	}
	r.mu.Lock()
	id := r.id
	r.mu.Unlock()
	err = unexplained(path, err)
	if id == "" {
		return err
	}
	return fmt.Errorf("%w (request ID %s)", err, id)
}

func unexplained(path string, err error) error {
	if status.Code(err) == codes.Unimplemented {
		return fmt.Errorf("%w: the member at %s runs a version that cannot do this: upgrade it, or ask one that can (%v)", identity.ErrPrecondition, path, err)
	}
	if err = api.FromStatus(err); errors.Is(err, identity.ErrUnavailable) {
		return cli.Asking("member", path, "countersign server run, or countersign dev", err)
	}
	return err
}

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
