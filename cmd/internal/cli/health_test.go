package cli

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// Connections that say nothing keep nobody from asking, and do not add up.
func TestHealthUnderSilentConnections(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	why := errors.New("for a reason")
	go func() { done <- ServeHealth(ctx, l, func() error { return why }, nil) }()
	var silent []net.Conn
	for range 3 * maxHealthConns {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	client := http.Client{Timeout: 30 * time.Second}
	resp, err := client.Get("http://" + l.Addr().String() + "/ready")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || string(body) != "not ready: for a reason\n" {
		t.Errorf("answered %d %q", resp.StatusCode, body)
	}
	// The oldest had to go, before its own time was up.
	silent[0].SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := silent[0].Read(make([]byte, 1)); err == nil {
		t.Error("the oldest connection got an answer")
	} else if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
		t.Error("the oldest connection is still open")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
