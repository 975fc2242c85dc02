package workloadapi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// caller is whom a new connection is counted against before it is attested.
type caller struct {
	key string
	uid uint32
}

// identifyPeer reads who connected. It may be called thousands of times a second by somebody who is refused
// every time, so it does no more than that.
func identifyPeer(uc *net.UnixConn) (caller, error) {
	raw, err := uc.SyscallConn()
	if err != nil {
		return caller{}, err
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(ctlErr, err); err != nil {
		return caller{}, fmt.Errorf("reading the caller's credentials: %w", err)
	}
	c := caller{key: "user:" + strconv.FormatUint(uint64(cred.Uid), 10) + " without a control group", uid: cred.Uid}
	// A PID reused by now names another control group: then the count is wrong by one connection, no more.
	if group, err := os.ReadFile("/proc/" + strconv.Itoa(int(cred.Pid)) + "/cgroup"); err == nil {
		sum := sha256.Sum256(group)
		// The hash, because a path of many lines is no key; its last element, so that a log line tells whose it is.
		c.key = "cgroup:" + hex.EncodeToString(sum[:8]) + ":" + lastElement(group)
	}
	return c, nil
}

// lastElement is the end of a cgroup file's last path, for people to read.
func lastElement(group []byte) string {
	group = bytes.TrimSpace(group)
	group = group[bytes.LastIndexByte(group, '/')+1:]
	return strconv.QuoteToASCII(string(group[max(0, len(group)-64):]))
}

// listener hands to gRPC only connections within the limits.
type listener struct {
	*socket
	server *Server
	own    *Private // nil: the socket of all
}

func (l *listener) Addr() net.Addr { return l.socket.UnixListener.Addr() }

// Accept closes what is over the limit, which a client sees as Unavailable. An error means that the socket
// itself is broken or closed.
func (l *listener) Accept() (net.Conn, error) {
	for {
		uc, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		c := &conn{UnixConn: uc, server: l.server, own: l.own, closed: make(chan struct{})}
		c.evidence.collecting = make(chan struct{}, 1)
		if err := l.admit(c); err != nil {
			uc.Close()
			continue
		}
		return c, nil
	}
}

// admit counts the connection against its caller.
func (l *listener) admit(c *conn) error {
	if l.own != nil {
		return l.own.open(c)
	}
	who, err := l.server.identify(c.UnixConn)
	if err != nil {
		return err
	}
	return l.server.admit.open(c, who)
}

// conn is one connection and what is known of its caller.
type conn struct {
	*net.UnixConn
	server *Server
	own    *Private // whose socket it came to; nil: the socket of all
	holder holder   // guarded by admission.mu

	// debt is the work caused since the last Read. Owned by the goroutine that reads, which is the one that taps
	// calls too.
	debt int

	peer     atomic.Pointer[attestor.Peer] // set when the caller is pinned, which it is not on a private socket
	spoken   atomic.Bool                   // the client's preface has come
	evidence evidence

	closing sync.Once
	closed  chan struct{}
}

// Read pays for what the caller has caused by being slow, which costs nobody else anything: not an error that
// a client would have to handle, no memory, and the caller's own socket fills up.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.UnixConn.Read(b)
	wait := c.server.admit.pay(c, c.debt+workOfRead+n/bytesPerWork)
	c.debt = 0
	if wait <= 0 {
		return n, err
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return n, err
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

// tapCall counts a call before anything is done for it, so that calls reset at once are paid for too. It must
// not refuse: gRPC forgets to free the context of a call that a tap refuses until the connection ends.
func tapCall(ctx context.Context, _ *tap.Info) (context.Context, error) {
	if c, ok := connOf(ctx); ok {
		c.debt += workOfCall
	}
	return ctx, nil
}

// unchanged reports an error unless the caller is the process that connected, and runs what it ran then. Whoever speaks on a private
// socket's connection is its workload.
func (c *conn) unchanged() error {
	if c.own != nil {
		return nil
	}
	return c.peer.Load().Unchanged()
}

// SetDeadline takes gRPC's word for the end of the handshake: it sets a deadline before and lifts it after.
func (c *conn) SetDeadline(t time.Time) error {
	c.spoken.Store(t.IsZero())
	return c.UnixConn.SetDeadline(t)
}

// Close gives back what the connection holds. Calls under way may still use it: they find their caller gone.
func (c *conn) Close() error {
	err := net.ErrClosed
	c.closing.Do(func() {
		close(c.closed)
		err = c.UnixConn.Close()
		c.server.admit.close(c)
		c.evidence.close()
		if p := c.peer.Load(); p != nil {
			err = errors.Join(err, p.Close())
		}
	})
	return err
}

// peerCredentials pins the caller in place of a TLS handshake (Workload Endpoint section 3.1: none may be asked
// for). It runs in a goroutine of the connection's own.
type peerCredentials struct{}

// authInfo leads from a call's context to its connection.
type authInfo struct {
	credentials.CommonAuthInfo
	conn *conn
}

func (authInfo) AuthType() string { return "unix-peer" }

func (peerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, fmt.Errorf("%w: not a connection of the Workload API socket", identity.ErrInvalid)
	}
	info := authInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c}
	if c.own != nil { // the socket says who it is
		return c, info, nil
	}
	p, err := attestor.PeerFromConn(c.UnixConn)
	if err != nil {
		c.server.log.Debug("a caller of the Workload API could not be pinned", "error", err)
		return nil, nil, err
	}
	c.peer.Store(p)
	select {
	case <-c.closed: // perhaps before Close could see the peer
		p.Close()
		return nil, nil, net.ErrClosed
	default:
	}
	return c, info, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("%w: these credentials are a server's", identity.ErrInvalid)
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}

func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

func (peerCredentials) OverrideServerName(string) error { return nil }

func connOf(ctx context.Context) (*conn, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	info, ok := p.AuthInfo.(authInfo)
	return info.conn, ok
}
