package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

const (
	backupChunk = 256 << 10
	// maxBackups are streamed at once: each holds on to the state as it was at its beginning.
	maxBackups = 2
	// backupStall is how long a client may take nothing before its backup ends: what it holds on to is not for ever.
	backupStall = 2 * time.Minute
)

// SaveBackup streams a sealed backup of the state as it is now. Writes go on meanwhile.
func (s adminService) SaveBackup(_ *adminv1.Empty, stream grpc.ServerStreamingServer[adminv1.BackupChunk]) error {
	if s.cfg.Backup == nil {
		return fmt.Errorf("%w: this member makes no backups", identity.ErrPrecondition)
	}
	select {
	case s.backups <- struct{}{}:
		defer func() { <-s.backups }()
	default:
		return fmt.Errorf("%w: %d backups are being made already: wait for one to end", identity.ErrExhausted, maxBackups)
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	w := &chunkWriter{ctx: ctx, chunks: make(chan []byte), stall: s.backupStall}
	done := make(chan error, 1)
	go func() { done <- s.saveBackup(ctx, w) }()
	// Sending waits for the client for as long as it lives; only returning from here ends a send. So what makes the backup
	// runs beside it, and gives up.
	sending := make(chan error, 1)
	go func() { sending <- sendAll(stream, w.chunks) }()
	select {
	case err := <-done:
		if err != nil {
			return err
		}
		select {
		case err := <-sending:
			return err
		case <-time.After(s.backupStall):
			return fmt.Errorf("%w: for %v: %w", identity.ErrUnavailable, s.backupStall, errStalled)
		}
	case err := <-sending:
		cancel(err)
		if made := <-done; err == nil {
			return made
		}
		return err
	}
}

func (s *Server) saveBackup(ctx context.Context, w *chunkWriter) error {
	started := s.cfg.Now()
	err := s.cfg.Backup(ctx, w)
	if err == nil {
		err = w.flush()
	}
	if err != nil {
		s.cfg.Log.Warn("making a backup failed", "bytes", w.n, "error", err)
		return fmt.Errorf("making the backup: %w", err)
	}
	close(w.chunks) // what ends the sending is that all is there: after an error the client must not take it for whole
	s.cfg.Log.Info("backup made", "bytes", w.n, "duration", s.cfg.Now().Sub(started))
	return nil
}

func sendAll(stream grpc.ServerStreamingServer[adminv1.BackupChunk], chunks <-chan []byte) error {
	for {
		select {
		case b, ok := <-chunks:
			if !ok {
				return nil
			}
			if err := stream.Send(&adminv1.BackupChunk{Data: b}); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// chunkWriter hands over what is written to it in chunks.
type chunkWriter struct {
	ctx    context.Context
	chunks chan []byte
	stall  time.Duration
	buf    []byte
	n      int64
}

var errStalled = errors.New("the client takes nothing any more")

func (w *chunkWriter) Write(p []byte) (int, error) {
	w.n += int64(len(p))
	w.buf = append(w.buf, p...)
	for len(w.buf) >= backupChunk {
		if err := w.hand(w.buf[:backupChunk]); err != nil {
			return 0, err
		}
		w.buf = w.buf[backupChunk:]
	}
	return len(p), nil
}

func (w *chunkWriter) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	return w.hand(w.buf)
}

func (w *chunkWriter) hand(b []byte) error {
	t := time.NewTimer(w.stall)
	defer t.Stop()
	select {
	case w.chunks <- append([]byte(nil), b...):
		return nil
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	case <-t.C:
		return fmt.Errorf("%w: for %v: %w", identity.ErrUnavailable, w.stall, errStalled)
	}
}
