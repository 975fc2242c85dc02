package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// handshaken is what gRPC gets in place of TLS: the Listener has done the handshake, under its own limits.
type handshaken struct{}

// ServerHandshake takes only what came through a Listener.
func (handshaken) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	done, ok := c.(*conn)
	if !ok {
		return nil, nil, fmt.Errorf("a connection of type %T did not come through the TLS listener", c)
	}
	return done, done.caller, nil
}

// ClientHandshake is not for servers.
func (handshaken) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}

// Info names the protocol.
func (handshaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone returns the same: there is no state.
func (h handshaken) Clone() credentials.TransportCredentials { return h }

// OverrideServerName does nothing: there are no names.
func (handshaken) OverrideServerName(string) error { return nil }

// localPeer asks the kernel who is at the other end of a Unix socket. Root and the user that this process runs as are
// operators; everybody else gets an answer, and it is no.
type localPeer struct {
	handshaken
	operator func(uid uint32) bool
}

func rootOrSelf(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// ServerHandshake reads SO_PEERCRED: who connected, not who holds the socket since.
func (l localPeer) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uid, err := peerUID(c)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the peer's credentials: %w", err)
	}
	who := caller{uid: uid}
	if l.operator(uid) {
		who.kind = local
	}
	return c, who, nil
}

// Clone returns the same.
func (l localPeer) Clone() credentials.TransportCredentials { return l }

func peerUID(c net.Conn) (uint32, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%T is not a Unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}
