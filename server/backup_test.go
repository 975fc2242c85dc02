package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "countersign.io/countersign/api/admin/v1"
)

// receive reads a backup to its end.
func receive(t *testing.T, c adminv1.AdminClient) ([]byte, error) {
	t.Helper()
	stream, err := c.SaveBackup(testContext(t), &adminv1.Empty{})
	if err != nil {
		return nil, err
	}
	var out []byte
	for {
		res, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, res.Data...)
	}
}

func TestSaveBackup(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	var fail error
	w := newWorld(t, func(c *Config) {
		c.Backup = func(_ context.Context, w io.Writer) error {
			for b := want; len(b) > 0; b = b[min(len(b), 70_001):] {
				if _, err := w.Write(b[:min(len(b), 70_001)]); err != nil {
					return err
				}
			}
			return fail
		}
	}).start(t)
	got, err := receive(t, w.admin(t))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	fail = errors.New("the disk fails")
	if got, err := receive(t, w.admin(t)); err == nil || len(got) > len(want) {
		t.Errorf("a failed one ended well, with %d bytes", len(got))
	}
	fail = nil
	want = nil
	if got, err := receive(t, w.admin(t)); err != nil || len(got) != 0 {
		t.Errorf("nothing: %d bytes, %v", len(got), err)
	}
}

func TestSaveBackupWithout(t *testing.T) {
	w := newWorld(t).start(t)
	_, err := receive(t, w.admin(t))
	wantCode(t, err, codes.FailedPrecondition, "makes no backups")
}

// endless is a member whose backups have no end, and which tells how each ended.
func endless(t *testing.T) (*world, chan error) {
	t.Helper()
	ended := make(chan error, 8)
	return newWorld(t, func(c *Config) {
		c.Backup = func(ctx context.Context, w io.Writer) error {
			block := make([]byte, 1<<20)
			for ctx.Err() == nil {
				if _, err := w.Write(block); err != nil {
					ended <- err
					return err
				}
			}
			ended <- ctx.Err()
			return ctx.Err()
		}
	}), ended
}

// Each backup that is being made holds on to a state: a third has to wait, and one whose client goes away ends at once.
func TestSaveBackupIsBounded(t *testing.T) {
	w, ended := endless(t)
	w.start(t)
	c := w.admin(t)
	ctx, cancel := context.WithCancel(testContext(t))
	for range maxBackups {
		s, err := c.SaveBackup(ctx, &adminv1.Empty{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil { // and no more
			t.Fatal(err)
		}
	}
	_, err := receive(t, c)
	wantCode(t, err, codes.ResourceExhausted, "wait for one to end")
	cancel()
	for range maxBackups {
		if err := <-ended; err == nil || errors.Is(err, errStalled) {
			t.Errorf("without its client it ended with %v", err)
		}
	}
}

// A client that lives and takes nothing is given up.
func TestSaveBackupStalls(t *testing.T) {
	w, ended := endless(t)
	w.srv.backupStall = 50 * time.Millisecond
	w.start(t)
	if _, err := w.admin(t).SaveBackup(testContext(t), &adminv1.Empty{}); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, errStalled) {
		t.Errorf("it ended with %v", err)
	}
}
