//go:build integration

package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/integration/history"
)

// existing names the entry that is in the way of another.
var existing = regexp.MustCompile(`entry (\S+) has the same selectors`)

// registers are the entries whose whole history is recorded. One of which an answer was lost is laid aside: each lost answer
// doubles what the checker must consider.
type registers struct {
	prefix string
	mu     sync.Mutex // guards what follows
	next   int
	live   [3]*subject
	all    []*subject
}

// subject is one entry as its clients last saw it.
type subject struct {
	key      string
	mu       sync.Mutex // guards what follows
	id       string
	revision uint64
}

func (g *registers) pick(i int) *subject {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.live[i] == nil {
		g.live[i] = &subject{key: fmt.Sprintf("%s/register-%d", g.prefix, g.next)}
		g.all = append(g.all, g.live[i])
		g.next++
	}
	return g.live[i]
}

func (g *registers) retire(old *subject) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, r := range g.live {
		if r == old {
			g.live[i] = nil
		}
	}
}

func (g *registers) every() []*subject {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]*subject(nil), g.all...)
}

func (e *subject) saw(id string, revision uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.id, e.revision = id, revision
}

func (e *subject) last() (id string, revision uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.id, e.revision
}

// keepAsking is a client of one member that reads and writes registers which the other members' clients use too.
func (r *faultRun) keepAsking(client int) {
	rnd := rand.New(rand.NewPCG(uint64(r.n), uint64(client)))
	for n := 0; pause(r.ctx, 10*time.Millisecond); n++ {
		e := r.registry.pick(rnd.IntN(3))
		m := r.Members[client%len(r.Members)].Name
		id, revision := e.last()
		in := history.Input{Key: e.key, ID: id, Hint: fmt.Sprintf("%d.%d", client, n)}
		switch k := rnd.IntN(10); {
		case id == "":
			in.Kind = history.Create
		case k < 5:
			in.Kind, in.Hint = history.Get, ""
		case k < 9:
			in.Kind = history.Update
			if k < 8 {
				in.IfRevision = revision
			}
		default:
			in.Kind, in.Hint = history.Delete, ""
		}
		if r.ask(client, m, e, in) == history.Unknown {
			r.registry.retire(e)
		}
	}
}

// ask does one operation and records it.
func (r *faultRun) ask(client int, member string, e *subject, in history.Input) history.Result {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), writeTime)
	defer cancel()
	c := r.admins[member]
	entry := &adminv1.Entry{Id: in.ID, Revision: in.IfRevision, Hint: in.Hint, SpiffeId: "spiffe://" + trustDomain + "/" + e.key, Selectors: []string{"unix:uid:7", "agent:kind:join_token"}}
	answer := r.history.Begin(client, in)
	var got *adminv1.Entry
	var err error
	switch in.Kind {
	case history.Create:
		entry.Id = ""
		got, err = c.CreateEntry(ctx, entry)
	case history.Update:
		got, err = c.UpdateEntry(ctx, entry)
	case history.Delete:
		_, err = c.DeleteEntry(ctx, &adminv1.NameRequest{Name: in.ID})
	case history.Get:
		got, err = c.GetEntry(ctx, &adminv1.NameRequest{Name: in.ID})
	}
	out := history.Output{Result: history.OK, ID: got.GetId(), Revision: got.GetRevision()}
	switch code := status.Code(err); {
	case err == nil && in.Kind == history.Delete:
		e.saw("", 0)
	case err == nil:
		e.saw(got.Id, got.Revision)
		if in.Kind == history.Get {
			out.Hint = got.Hint
		}
	case code == codes.AlreadyExists:
		out.Result = history.Exists
		if found := existing.FindStringSubmatch(err.Error()); found != nil {
			out.ID = found[1]
		}
		e.saw(out.ID, 0)
	case code == codes.NotFound:
		out.Result = history.NotFound
		e.saw("", 0)
	case code == codes.FailedPrecondition && in.Kind == history.Update:
		out.Result = history.Conflict
		e.saw(in.ID, 0)
	case in.Kind == history.Get || notDone(err):
		return ""
	default:
		out.Result = history.Unknown
	}
	answer(out)
	if err == nil && in.Kind != history.Get {
		r.ack(member)
	}
	return out.Result
}

// readAll reads every register that there was through every member: what was acknowledged must fit what is there at the end.
func (r *faultRun) readAll() {
	for i, m := range r.Members {
		for _, e := range r.registry.every() {
			if id, _ := e.last(); id != "" {
				r.ask(100+i, m.Name, e, history.Input{Kind: history.Get, Key: e.key, ID: id})
			}
		}
	}
}
