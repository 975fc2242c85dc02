package workloadapi

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// Private is one more socket of a Server that stands for one workload: whoever connects to it is that one, and no process is
// looked at. That is for sockets that only the workload can reach, such as one in a volume that is mounted into its pod alone: where
// the sandbox of a pod hides its processes (gVisor) there is nothing else to go by.
//
// What its callers hold is counted against it alone. An idle one costs a descriptor and a goroutine that accepts.
type Private struct {
	server *Server
	attest attestor.Func
	who    string // in a log and in what is refused
	socket *socket
	done   chan struct{} // closed when nothing is accepted any more
	close  func() error
}

// Open binds a socket and serves on it until Close, or until the Server stops. attest says who the callers are at each call: it must be
// cheap, and its error is what they get. who names the workload for people. mode zero means 0777. Errors are those of New.
func (s *Server) Open(path string, mode os.FileMode, who string, attest attestor.Func) (*Private, error) {
	if attest == nil || who == "" {
		return nil, fmt.Errorf("%w: a private Workload API socket needs a name and an attestation", identity.ErrInvalid)
	}
	if mode == 0 {
		mode = 0o777
	}
	socket, err := listen(path, mode)
	if err != nil {
		return nil, err
	}
	p := &Private{server: s, attest: attest, who: who, socket: socket, done: make(chan struct{})}
	p.close = sync.OnceValue(func() error {
		err := p.socket.Close()
		<-p.done
		s.admit.closeConns(func(c *conn) bool { return c.own == p })
		return err
	})
	go func() {
		defer close(p.done)
		// It ends with the socket, or with the server. A socket that breaks is not mended: clients see it, and so does the log.
		if err := s.grpc.Serve(&listener{socket: socket, server: s, own: p}); err != nil && s.stopping.Err() == nil {
			s.log.Debug("a private Workload API socket ended", "socket", path, "error", err)
		}
	}()
	return p, nil
}

// Close ends the socket and every call on it, and takes its file away.
func (p *Private) Close() error { return p.close() }

// open counts a connection against the socket.
func (p *Private) open(c *conn) error { return p.server.admit.openPrivate(c, "volume:"+p.who) }

// collect asks who the callers are.
func (p *Private) collect(ctx context.Context) (*attestor.Workload, error) {
	w, err := p.attest(ctx)
	if err != nil {
		return nil, err
	}
	if w == nil {
		return nil, fmt.Errorf("%w: nothing is known of this socket's workload", identity.ErrUnavailable)
	}
	return w, nil
}

// Listen binds a Unix socket as New does: it replaces the file of a process that has died and nothing else, refuses a folder that
// others may write to, and Close takes away only what it made.
func Listen(path string, mode os.FileMode) (net.Listener, error) { return listen(path, mode) }
