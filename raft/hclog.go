package raft

import (
	"context"
	"io"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// newHCLog is a logger for hashicorp/raft that hands warnings and errors to log, and drops the rest: its
// informational lines tell a developer of raft much and an operator nothing. Nothing is logged above the
// given level (a connection that broke is no error of this member's), nor while quiet says so.
func newHCLog(log *slog.Logger, top slog.Level, quiet func() bool) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Off})
	l.RegisterSink(&slogSink{log, top, quiet})
	return l
}

type slogSink struct {
	log   *slog.Logger
	top   slog.Level
	quiet func() bool
}

// Accept implements hclog.SinkAdapter.
func (s *slogSink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	var to slog.Level
	switch level {
	case hclog.Warn:
		to = slog.LevelWarn
	case hclog.Error:
		to = min(slog.LevelError, s.top)
	default:
		return
	}
	if s.quiet != nil && s.quiet() {
		return
	}
	attrs := make([]slog.Attr, 0, len(args)/2)
	for i := 0; i+1 < len(args); i += 2 {
		key, ok := args[i].(string)
		if !ok {
			key = "arg"
		}
		attrs = append(attrs, slog.Any(key, args[i+1]))
	}
	s.log.LogAttrs(context.Background(), to, "raft: "+msg, attrs...)
}
