package server

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"countersign.io/countersign/api"
)

// A few lines a second say what strangers do wrong; more would let them fill the disk that the state is on, and bury
// what agents were refused.
const (
	strangerLines = 5 // a second
	strangerBurst = 20
)

// lineLimit bounds the log lines that callers can cause who have no agent's certificate.
type lineLimit struct {
	lines   *rate.Limiter
	leftOut atomic.Uint64 // since the last line
}

func newLineLimit() *lineLimit {
	return &lineLimit{lines: rate.NewLimiter(strangerLines, strangerBurst)}
}

// allow reports whether one more line may be written, and how many were left out before it.
func (l *lineLimit) allow(now time.Time) (leftOut uint64, ok bool) {
	if !l.lines.AllowN(now, 1) {
		l.leftOut.Add(1)
		return 0, false
	}
	return l.leftOut.Swap(0), true
}

// reported is a status that report made already: it is not logged again, nor worded again.
type reported struct{ error }

// report logs a failed call once and makes it fit for the wire.
func (s *Server) report(c caller, method string, err error) error {
	if done, ok := err.(reported); ok {
		return done.error
	}
	s.stats.refuse(api.Code(err))
	level := slog.LevelInfo
	switch api.Code(err) {
	case codes.Internal:
		level = slog.LevelError
	case codes.Canceled, codes.Unavailable, codes.ResourceExhausted:
		level = slog.LevelDebug // the caller went away, or is told to come back: nothing to look into
	}
	attrs := []any{"method", method, "caller", c.kind, "id", c.id, "address", c.addr, "error", err}
	var w *withheld
	if !errors.As(err, &w) || api.Code(err) == codes.Internal {
		s.logRefusal(c, level, attrs...)
		return api.ToStatus(err)
	}
	if api.Code(err) == codes.Unavailable {
		level = slog.LevelInfo // the log is where the reason can be found
	}
	at := s.cfg.Now().UTC().Format("2006-01-02T15:04:05.000Z07:00")
	where := "see the member's log, request at " + at
	if !s.logRefusal(c, level, append(attrs, "request_at", at)...) {
		where = "the member's log left out why, for it has too many such lines: try again"
	}
	return status.Error(api.Code(err), w.instead+": "+where)
}

// withheld is an error whose text says what is registered here: audiences, hosts, paths. Strangers are told something else
// instead, and its text is in the log.
type withheld struct {
	error
	instead string
}

func (w *withheld) Unwrap() error { return w.error }

// logRefusal writes the line, if it is an agent's or an operator's or the strangers have not had too many; it reports whether
// it did.
func (s *Server) logRefusal(c caller, level slog.Level, attrs ...any) bool {
	ctx := context.Background()
	if !s.cfg.Log.Enabled(ctx, level) {
		return false
	}
	if c.kind&(agent|member|local) == 0 && level > slog.LevelDebug { // who turns Debug on wants to see all
		limit := s.refusals
		if level >= slog.LevelError {
			limit = s.faults // faults of ours must not drown in refusals
		}
		leftOut, ok := limit.allow(s.cfg.Now())
		if !ok {
			return false
		}
		if leftOut > 0 {
			attrs = append(attrs, "left_out_before", leftOut)
		}
	}
	s.cfg.Log.Log(ctx, level, "call refused", attrs...)
	return true
}
