package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// other is where connect expects a second program, another file with this same content.
const other = "/bin/other"

// connect opens a connection, waits until the agent has spoken on it, and so knows who called, and then asks for an identity:
// by itself (stay), after having become another program (exec), or from a child when it is gone itself (exit).
func connect(socket, then string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return fmt.Errorf("making a socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		return fmt.Errorf("connecting: %w", err)
	}
	var b [1]byte
	if n, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK); err != nil || n != 1 {
		return fmt.Errorf("waiting for the agent's first byte: %d, %w", n, err)
	}
	f := os.NewFile(uintptr(fd), "connection")
	switch then {
	case "stay":
		return ask(f)
	case "exec":
		if fd != 3 {
			if err := unix.Dup2(fd, 3); err != nil {
				return fmt.Errorf("keeping the connection: %w", err)
			}
		}
		return unix.Exec(other, []string{other, "call", "0"}, os.Environ())
	case "exit":
		child := exec.Command(other, "call", strconv.Itoa(os.Getpid()))
		child.Stdin, child.Stdout, child.Stderr, child.ExtraFiles = os.Stdin, os.Stdout, os.Stderr, []*os.File{f}
		return child.Start()
	}
	return fmt.Errorf("%q: want stay, exec or exit", then)
}

// call uses the connection at descriptor 3 once the parent of that PID has ended; 0 for none.
func call(parent string) error {
	pid, err := strconv.Atoi(parent)
	if err != nil {
		return fmt.Errorf("parent: %w", err)
	}
	for os.Getppid() == pid {
		time.Sleep(time.Millisecond)
	}
	return ask(os.NewFile(3, "connection"))
}

// ask prints the identity, or the answer's gRPC code and message.
func ask(f *os.File) error {
	conn, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("taking the connection: %w", err)
	}
	f.Close()
	var once sync.Once
	cc, err := grpc.NewClient("passthrough:///inherited", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			err := errors.New("the agent closed the connection")
			once.Do(func() { err = nil })
			return conn, err
		}))
	if err != nil {
		return fmt.Errorf("making a client: %w", err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"), 30*time.Second)
	defer cancel()
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err == nil {
		var res *workload.X509SVIDResponse
		if res, err = stream.Recv(); err == nil {
			fmt.Println("identity", res.Svids[0].SpiffeId)
			return nil
		}
	}
	fmt.Println("refused", status.Code(err), status.Convert(err).Message())
	return nil
}
