package raft

import (
	"context"
	"io"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// newHCLog is a logger for hashicorp/raft that hands warnings and errors to log, and drops the rest: its
// informational lines tell a developer of raft much and an operator nothing.
func newHCLog(log *slog.Logger) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Off})
	l.RegisterSink(slogSink{log})
	return l
}

type slogSink struct{ log *slog.Logger }

// Accept implements hclog.SinkAdapter.
func (s slogSink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelWarn
	switch level {
	case hclog.Warn:
	case hclog.Error:
		to = slog.LevelError
	default:
		return
	}
	attrs := make([]slog.Attr, 0, 1+len(args)/2)
	for i := 0; i+1 < len(args); i += 2 {
		key, ok := args[i].(string)
		if !ok {
			key = "arg"
		}
		attrs = append(attrs, slog.Any(key, args[i+1]))
	}
	s.log.LogAttrs(context.Background(), to, "raft: "+msg, attrs...)
}
