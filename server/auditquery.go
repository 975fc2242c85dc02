package server

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// auditBatch is how many bytes of lines go into one message.
const auditBatch = 64 << 10

// QueryAudit streams records of this member's files. How slowly they are taken holds up nobody.
func (s adminService) QueryAudit(req *adminv1.AuditQuery, stream grpc.ServerStreamingServer[adminv1.AuditRecords]) error {
	if len(req.Actions) > 64 {
		return fmt.Errorf("%w: %d actions: at the most 64", identity.ErrInvalid, len(req.Actions))
	}
	q := audit.Query{
		Filter: audit.Filter{Outcome: audit.Outcome(req.Outcome), Who: req.Who, Subject: req.Subject},
		Tail:   int(min(req.Tail, audit.MaxTail+1)), Follow: req.Follow,
	}
	if req.Since != nil {
		q.Since = req.Since.AsTime()
	}
	if req.Until != nil {
		q.Until = req.Until.AsTime()
	}
	for _, a := range req.Actions {
		q.Actions = append(q.Actions, audit.Action(a))
	}
	batch, size := &adminv1.AuditRecords{}, 0
	flush := func() error {
		if size == 0 {
			return nil
		}
		err := stream.Send(batch)
		batch, size = &adminv1.AuditRecords{}, 0
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	go func() { // who follows must not keep the member from stopping
		select {
		case <-s.stopping:
			cancel(fmt.Errorf("%w: this member is stopping", identity.ErrUnavailable))
		case <-ctx.Done():
		}
	}()
	err := s.cfg.Audit.Query(ctx, q, func(line []byte) error {
		batch.Lines, size = append(batch.Lines, strings.ToValidUTF8(string(line), "\uFFFD")), size+len(line)
		if req.Follow || size >= auditBatch { // who follows wants to see each at once
			return flush()
		}
		return nil
	})
	if errors.Is(err, context.Canceled) {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("reading the audit log: %w", err)
	}
	return flush()
}
