package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// seen is one line of what follow prints.
type seen struct {
	Time    time.Time `json:"time"`
	Event   string    `json:"event"` // start, svid, error
	ID      string    `json:"id,omitempty"`
	Serial  string    `json:"serial,omitempty"`
	Expires time.Time `json:"expires,omitzero"`
	Error   string    `json:"error,omitempty"`
}

func (s seen) print() {
	s.Time = time.Now()
	line, _ := json.Marshal(s)
	fmt.Println(string(line))
}

type follower struct{}

func (follower) OnX509ContextUpdate(x *workloadapi.X509Context) {
	for _, s := range x.SVIDs {
		c := s.Certificates[0]
		seen{Event: "svid", ID: s.ID.String(), Serial: c.SerialNumber.Text(16), Expires: c.NotAfter}.print()
	}
}

func (follower) OnX509ContextWatchError(err error) { seen{Event: "error", Error: err.Error()}.print() }

// follow prints when it began and all that its stream sees, and does not end when it is asked to, so that the end of its identity
// can be seen while it lives. It ends in order by SIGUSR1.
func follow(socket string) error {
	seen{Event: "start"}.print()
	signal.Ignore(syscall.SIGTERM)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGUSR1)
	defer stop()
	if socket == "" {
		socket = os.Getenv("SPIFFE_ENDPOINT_SOCKET")
	}
	if err := workloadapi.WatchX509Context(ctx, follower{}, workloadapi.WithAddr(socket)); ctx.Err() == nil {
		return err
	}
	return nil
}
