package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"countersign.io/countersign/identity"
)

// rootOnly closes connections of all but root. The sockets' modes keep others away; this does so where a mode or a folder is not what it
// should be.
type rootOnly struct {
	net.Listener
	caller func(net.Conn) (uint32, error)
	log    *slog.Logger
}

func (l *rootOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := l.caller(c)
		if err == nil && uid == 0 {
			return c, nil
		}
		l.log.Warn("refused a caller of the CSI driver that is not root", "socket", l.Addr().String(), "uid", uid, "error", err)
		c.Close()
	}
}

// peerUID asks the kernel who connected.
func peerUID(c net.Conn) (uint32, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%w: not a Unix socket", identity.ErrInvalid)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(ctlErr, err); err != nil {
		return 0, fmt.Errorf("reading the caller's credentials: %w", err)
	}
	return cred.Uid, nil
}

// server has nothing that shows a request: they hold tokens.
func (d *Driver) server() *grpc.Server {
	return grpc.NewServer(
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxConcurrentStreams(256),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			resp, err := handler(ctx, req)
			if err != nil {
				return nil, toStatus(err)
			}
			return resp, nil
		}),
	)
}

// toStatus is an error in the words of CSI. The kubelet shows its text as an event of the pod.
func toStatus(err error) error {
	var code codes.Code
	switch {
	case errors.Is(err, identity.ErrInvalid):
		code = codes.InvalidArgument
	case errors.Is(err, identity.ErrUnauthenticated):
		code = codes.Unauthenticated
	case errors.Is(err, identity.ErrDenied), errors.Is(err, identity.ErrNotFound):
		code = codes.PermissionDenied
	case errors.Is(err, identity.ErrExists):
		code = codes.AlreadyExists
	case errors.Is(err, identity.ErrExhausted):
		code = codes.ResourceExhausted
	case errors.Is(err, identity.ErrUnavailable):
		code = codes.Unavailable
	default:
		if s, ok := status.FromError(err); ok {
			return s.Err()
		}
		code = codes.Internal
	}
	return status.Error(code, err.Error())
}

// GetInfo tells the kubelet what the driver is, and where.
func (d *Driver) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: Name, Endpoint: d.cfg.Socket, SupportedVersions: []string{staticVersion}}, nil
}

// NotifyRegistrationStatus is told by the kubelet whether it has taken the driver.
func (d *Driver) NotifyRegistrationStatus(_ context.Context, r *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.told = nil; !r.GetPluginRegistered() {
		d.told = fmt.Errorf("%w: the kubelet did not register the CSI driver: %s", identity.ErrUnavailable, quote(r.GetError()))
		d.log.Error("the kubelet did not register the CSI driver", "error", quote(r.GetError()))
		return &registration.RegistrationStatusResponse{}, nil
	}
	d.log.Info("the kubelet has registered the CSI driver")
	return &registration.RegistrationStatusResponse{}, nil
}
