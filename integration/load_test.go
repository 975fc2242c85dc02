package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "countersign.io/countersign/api/admin/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/integration/cluster"
)

// stand is a process that the load counts upon from up, once it is ready, to down, before it is ended.
type stand struct {
	name  string
	mu    sync.Mutex // guards what follows
	life  context.Context
	end   context.CancelFunc
	began chan struct{} // closed when there is a life
}

func newStand(name string) *stand { return &stand{name: name, began: make(chan struct{})} }

func (s *stand) up(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life, s.end = context.WithCancel(ctx)
	close(s.began)
}

func (s *stand) down() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end()
	s.life, s.began = nil, make(chan struct{})
}

// alive waits until the process is up; nil when ctx has ended.
func (s *stand) alive(ctx context.Context) context.Context {
	for {
		s.mu.Lock()
		life, began := s.life, s.began
		s.mu.Unlock()
		if ctx.Err() != nil {
			return nil
		}
		if life != nil && life.Err() == nil {
			return life
		}
		select {
		case <-began:
		case <-ctx.Done():
			return nil
		}
	}
}

// load uses a cluster all the time and keeps account of what it was told.
type load struct {
	w       *world
	members []*stand
	agent   *stand
	client  *cluster.Client
	token   string
	ctx     context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup

	mu       sync.Mutex // guards what follows
	created  map[string]string
	deleted  map[string]bool
	refused  map[string]string
	unknown  int
	jwts     int
	issued   map[string]int
	failures []string
	attempts int
}

// newLoad is one that does nothing yet.
func newLoad(w *world) *load {
	w.t.Helper()
	l := &load{w: w, agent: newStand("the agent"), created: map[string]string{}, deleted: map[string]bool{}, refused: map[string]string{}, issued: map[string]int{}}
	var err error
	if l.client, err = w.NewClient(w.ctx, "test/node-1"); err != nil {
		w.t.Fatal(err)
	}
	l.token = w.token("busy", "node-1")
	l.ctx, l.stop = context.WithCancel(w.ctx)
	for _, m := range w.Members {
		// The client's record, and the pod's kube cluster, reach every member before it is counted upon.
		w.eventually(m.Name+" issues", func() error { return l.once(m) })
	}
	return l
}

// startLoad puts two writers, an issuer per member and a workload at the agent to work.
func startLoad(w *world, a *cluster.Agent) *load {
	w.t.Helper()
	l := newLoad(w)
	for _, m := range w.Members {
		s := newStand(m.Name)
		s.up(l.ctx)
		l.members = append(l.members, s)
		l.wg.Go(func() { l.issue(m, s) })
	}
	l.agent.up(l.ctx)
	l.wg.Go(func() { l.fetch(a) })
	for range 2 {
		l.wg.Go(l.write)
	}
	w.t.Cleanup(func() { l.stop(); l.wg.Wait() })
	return l
}

func (l *load) once(m *cluster.Member) error {
	conn, err := l.client.Dial(m.Address)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, public, err := cluster.NewKey()
	if err != nil {
		return err
	}
	_, err = cluster.Issue(l.w.ctx, workloadv1.NewWorkloadClient(conn), l.token, public)
	return err
}

func (l *load) fail(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures = append(l.failures, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// issue asks one member for SVIDs: as long as it lives, none may fail.
func (l *load) issue(m *cluster.Member, s *stand) {
	_, public, err := cluster.NewKey()
	if err != nil {
		l.fail("%v", err)
		return
	}
	for {
		life := s.alive(l.ctx)
		if life == nil {
			return
		}
		conn, err := l.client.Dial(m.Address)
		if err != nil {
			l.fail("%v", err)
			return
		}
		c := workloadv1.NewWorkloadClient(conn)
		for pause(life, 5*time.Millisecond) {
			ctx, cancel := context.WithTimeout(life, 30*time.Second)
			_, err := cluster.Issue(ctx, c, l.token, public)
			cancel()
			if err == nil {
				l.mu.Lock()
				l.issued[m.Name]++
				l.mu.Unlock()
			} else if life.Err() == nil {
				l.fail("%s did not issue: %v", m.Name, err)
			}
		}
		conn.Close()
	}
}

// fetch asks the agent for what it must ask a member for: it may lose its member, and is to find the next.
func (l *load) fetch(a *cluster.Agent) {
	for n := 0; ; {
		life := l.agent.alive(l.ctx)
		if life == nil {
			return
		}
		c, err := workloadapi.New(life, workloadapi.WithAddr(a.Endpoint()))
		if err != nil {
			l.fail("%v", err)
			return
		}
		for ; pause(life, 10*time.Millisecond); n++ {
			ctx, cancel := context.WithTimeout(life, 30*time.Second)
			_, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: fmt.Sprint("audience-", n)})
			cancel()
			if err == nil {
				l.mu.Lock()
				l.jwts++
				l.mu.Unlock()
			} else if life.Err() == nil {
				l.fail("the agent gave no JWT-SVID: %v", err)
			}
		}
		c.Close()
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// write creates entries through any member that is up, and deletes every fourth again.
func (l *load) write() {
	for pause(l.ctx, 5*time.Millisecond) {
		i := rand.IntN(len(l.members))
		l.members[i].mu.Lock()
		up := l.members[i].life != nil
		l.members[i].mu.Unlock()
		if !up {
			continue
		}
		n, spiffeID, id := l.create(i)
		if id != "" && n%4 == 0 {
			l.delete(i, spiffeID, id)
		}
	}
}

// create tries to create one more entry; id is empty if that failed.
func (l *load) create(member int) (n int, spiffeID, id string) {
	l.mu.Lock()
	n = l.attempts
	l.attempts++
	l.mu.Unlock()
	e := &adminv1.Entry{SpiffeId: fmt.Sprintf("spiffe://%s/load/%d", trustDomain, n), Selectors: []string{fmt.Sprint("unix:uid:", 1000000+n), "agent:kind:join_token"}}
	var made *adminv1.Entry
	err := l.ask(member, func(ctx context.Context, c adminv1.AdminClient) (err error) {
		made, err = c.CreateEntry(ctx, e)
		return err
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.created[e.SpiffeId] = made.Id
	case definite(err):
		l.refused[e.SpiffeId] = err.Error()
	default:
		l.unknown++
	}
	return n, e.SpiffeId, made.GetId()
}

func (l *load) delete(member int, spiffeID, id string) {
	err := l.ask(member, func(ctx context.Context, c adminv1.AdminClient) error {
		_, err := c.DeleteEntry(ctx, &adminv1.NameRequest{Name: id})
		return err
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.deleted[spiffeID] = true
	}
	if err == nil || !definite(err) {
		delete(l.created, spiffeID) // gone, or perhaps gone
	}
}

func (l *load) ask(member int, f func(context.Context, adminv1.AdminClient) error) error {
	c, done, err := l.w.Members[member].AdminConn()
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(l.ctx, 30*time.Second)
	defer cancel()
	return f(ctx, c)
}

// definite reports whether an error says that nothing was changed. A lost connection says nothing.
func definite(err error) bool {
	switch s := status.Convert(err); s.Code() {
	case codes.InvalidArgument, codes.AlreadyExists, codes.NotFound, codes.FailedPrecondition, codes.PermissionDenied, codes.Unauthenticated, codes.ResourceExhausted:
		return true
	case codes.Unavailable:
		return !strings.Contains(s.Message(), "unknown outcome") && (strings.Contains(s.Message(), "no leader") || strings.Contains(s.Message(), "raft node closed"))
	}
	return false
}

// progress waits until everything that is up has done more: what is meant by going on.
func (l *load) progress() {
	l.w.t.Helper()
	l.mu.Lock()
	created, jwts, issued := len(l.created), l.jwts, map[string]int{}
	for k, v := range l.issued {
		issued[k] = v
	}
	l.mu.Unlock()
	isUp := func(s *stand) bool { s.mu.Lock(); defer s.mu.Unlock(); return s.life != nil }
	l.w.eventually("the survivors go on", func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if n := len(l.created) - created; n < 10 {
			return fmt.Errorf("%d new entries", n)
		}
		if n := l.jwts - jwts; isUp(l.agent) && n < 10 {
			return fmt.Errorf("%d new JWT-SVIDs", n)
		}
		for _, s := range l.members {
			if n := l.issued[s.name] - issued[s.name]; isUp(s) && n < 20 {
				return fmt.Errorf("%d new X.509-SVIDs of %s", n, s.name)
			}
		}
		return nil
	})
}

// check compares every member with the account. It may be called while the load goes on: what was acknowledged before is to
// be there.
func (l *load) check(t *testing.T) {
	t.Helper()
	l.mu.Lock()
	created, deleted, refused := clone(l.created), clone(l.deleted), clone(l.refused)
	failures := l.failures
	l.failures = nil
	t.Logf("%d entries created, %d of them deleted again, %d refused, %d with an unknown outcome; issued %v, %d JWT-SVIDs through the agent",
		len(created)+len(deleted), len(deleted), len(refused), l.unknown, l.issued, l.jwts)
	l.mu.Unlock()
	for i, f := range failures {
		if i == 10 {
			t.Errorf("and %d more", len(failures)-i)
			break
		}
		t.Error(f)
	}
	for i, m := range l.w.Members {
		var there map[string]string
		l.w.eventually(m.Name+" has every entry", func() error {
			var err error
			if there, err = l.list(i); err != nil {
				return err
			}
			missing, example := 0, ""
			for spiffeID, id := range created {
				if there[spiffeID] == id {
					continue
				}
				l.mu.Lock()
				_, still := l.created[spiffeID] // the writers may have deleted it since
				l.mu.Unlock()
				if still {
					missing, example = missing+1, spiffeID
				}
			}
			if missing > 0 {
				return fmt.Errorf("%d of %d acknowledged entries are lost, such as %s", missing, len(created), example)
			}
			return nil
		})
		for id := range deleted {
			if there[id] != "" {
				t.Errorf("%s: %s was deleted, and is there", m.Name, id)
			}
		}
		for id, why := range refused {
			if there[id] != "" {
				t.Errorf("%s: %s is there, though its creation was refused: %s", m.Name, id, why)
			}
		}
	}
}

func clone[V any](m map[string]V) map[string]V {
	out := make(map[string]V, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// list is a member's entries: SPIFFE ID to ID.
func (l *load) list(member int) (map[string]string, error) {
	out := map[string]string{}
	c, done, err := l.w.Members[member].AdminConn()
	if err != nil {
		return nil, err
	}
	defer done()
	for page := ""; ; {
		res, err := c.ListEntries(l.w.ctx, &adminv1.ListRequest{PageToken: page, PageSize: 1000})
		if err != nil {
			return nil, err
		}
		for _, e := range res.Entries {
			out[e.SpiffeId] = e.Id
		}
		if page = res.NextPageToken; page == "" {
			return out, nil
		}
	}
}
