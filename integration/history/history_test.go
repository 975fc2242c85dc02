package history

import (
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// op is one operation with its time; end 0 is an unknown outcome.
type op struct {
	call, end int64
	in        Input
	out       Output
}

func recorded(ops ...op) *Recorder {
	r := NewRecorder()
	for i, o := range ops {
		end := o.end
		if o.out.Result == Unknown {
			end = 1<<63 - 1
		}
		r.ops = append(r.ops, porcupine.Operation{ClientId: i, Input: o.in, Call: o.call, Output: o.out, Return: end})
	}
	return r
}

func made(call, end int64, id string, rev uint64) op {
	return op{call, end, Input{Kind: Create, Key: "k", Hint: id}, Output{Result: OK, ID: id, Revision: rev}}
}

func read(call, end int64, id string, rev uint64, hint string) op {
	return op{call, end, Input{Kind: Get, Key: "k", ID: id}, Output{Result: OK, ID: id, Revision: rev, Hint: hint}}
}

func updated(call, end int64, id string, ifRev, rev uint64, hint string) op {
	return op{call, end, Input{Kind: Update, Key: "k", ID: id, IfRevision: ifRev, Hint: hint}, Output{Result: OK, ID: id, Revision: rev}}
}

func deleted(call, end int64, id string) op {
	return op{call, end, Input{Kind: Delete, Key: "k", ID: id}, Output{Result: OK}}
}

func lost(call int64, in Input) op {
	in.Key = "k"
	return op{call, 0, in, Output{Result: Unknown}}
}

func absent(call, end int64, kind Kind, id string) op {
	return op{call, end, Input{Kind: kind, Key: "k", ID: id}, Output{Result: NotFound}}
}

func TestCheckAccepts(t *testing.T) {
	for name, ops := range map[string][]op{
		"a life":                             {made(1, 2, "a", 5), read(3, 4, "a", 5, "a"), updated(5, 6, "a", 5, 7, "x"), read(7, 8, "a", 7, "x"), deleted(9, 10, "a"), absent(11, 12, Get, "a"), made(13, 14, "b", 12)},
		"a read during a write sees the old": {made(1, 2, "a", 5), updated(3, 10, "a", 5, 7, "x"), read(4, 5, "a", 5, "a")},
		"a read during a write sees the new": {made(1, 2, "a", 5), updated(3, 10, "a", 5, 7, "x"), read(4, 5, "a", 7, "x")},
		"a lost create that happened":        {lost(1, Input{Kind: Create, Hint: "a"}), read(3, 4, "a", 5, "a")},
		"a lost create that did not happen":  {lost(1, Input{Kind: Create, Hint: "a"}), made(3, 4, "b", 9), read(5, 6, "b", 9, "b")},
		"a lost create that happened late":   {lost(1, Input{Kind: Create, Hint: "a"}), absent(2, 3, Get, "a"), op{4, 5, Input{Kind: Create, Key: "k", Hint: "b"}, Output{Result: Exists, ID: "a"}}},
		"a lost update that happened":        {made(1, 2, "a", 5), lost(3, Input{Kind: Update, ID: "a", IfRevision: 5, Hint: "x"}), read(5, 6, "a", 8, "x")},
		"a lost update that did not happen":  {made(1, 2, "a", 5), lost(3, Input{Kind: Update, ID: "a", IfRevision: 5, Hint: "x"}), read(5, 6, "a", 5, "a"), updated(7, 8, "a", 5, 9, "y")},
		"a lost delete that happened":        {made(1, 2, "a", 5), lost(3, Input{Kind: Delete, ID: "a"}), absent(4, 5, Update, "a")},
		"a conflict":                         {made(1, 2, "a", 5), updated(3, 4, "a", 0, 7, "x"), op{5, 6, Input{Kind: Update, Key: "k", ID: "a", IfRevision: 5, Hint: "y"}, Output{Result: Conflict}}},
	} {
		if v := recorded(ops...).Check(time.Minute); !v.Linearizable || v.Unchecked || v.Why != "" {
			t.Errorf("%s: %+v", name, v)
		}
	}
}

// TestCheckRefuses feeds the checker histories that no single cluster can have told: it must be able to fail.
func TestCheckRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		ops []op
		why string
	}{
		"a stale read":             {[]op{made(1, 2, "a", 5), updated(3, 4, "a", 5, 7, "x"), read(5, 6, "a", 5, "a")}, "get k id=a"},
		"a lost create":            {[]op{made(1, 2, "a", 5), absent(3, 4, Get, "a")}, "not found"},
		"made twice":               {[]op{made(1, 2, "a", 5), made(3, 4, "b", 7)}, "create"},
		"two updates of one read":  {[]op{made(1, 2, "a", 5), updated(3, 9, "a", 5, 7, "x"), updated(3, 9, "a", 5, 8, "y")}, "update"},
		"back from the dead":       {[]op{made(1, 2, "a", 5), deleted(3, 4, "a"), read(5, 6, "a", 5, "a")}, "get"},
		"deleted twice":            {[]op{made(1, 2, "a", 5), deleted(3, 4, "a"), deleted(5, 6, "a")}, "delete"},
		"a read of nothing":        {[]op{made(1, 2, "a", 5), read(3, 4, "a", 5, "never written")}, "never written"},
		"a lost update flickers":   {[]op{made(1, 2, "a", 5), lost(3, Input{Kind: Update, ID: "a", IfRevision: 5, Hint: "x"}), read(4, 5, "a", 8, "x"), read(6, 7, "a", 5, "a")}, "get"},
		"a revision goes back":     {[]op{made(1, 2, "a", 5), updated(3, 4, "a", 0, 4, "x")}, "lower revision"},
		"a revision is used twice": {[]op{made(1, 2, "a", 5), deleted(3, 4, "a"), made(5, 6, "b", 5)}, "lower revision"},
		"a conflict without cause": {[]op{made(1, 2, "a", 5), op{3, 4, Input{Kind: Update, Key: "k", ID: "a", IfRevision: 5}, Output{Result: Conflict}}}, "conflict"},
		"exists without cause":     {[]op{op{1, 2, Input{Kind: Create, Key: "k"}, Output{Result: Exists, ID: "a"}}}, "exists"},
		"other registers' order": {[]op{made(1, 2, "a", 50), made(3, 4, "b", 60),
			op{5, 6, Input{Kind: Create, Key: "k2", Hint: "c"}, Output{Result: OK, ID: "c", Revision: 55}}}, "lower revision"},
	} {
		v := recorded(c.ops...).Check(time.Minute)
		if v.Linearizable || v.Unchecked || !strings.Contains(v.Why, c.why) {
			t.Errorf("%s: %+v, want a reason with %q", name, v, c.why)
		}
	}
}

// TestRecorder records many clients of one map under a lock, which is linearizable, and then of a copy of it that lags.
func TestRecorder(t *testing.T) {
	for _, lag := range []bool{false, true} {
		r := NewRecorder()
		var mu sync.Mutex
		now, old, rev := Output{}, Output{}, uint64(0)
		done := r.Begin(0, Input{Kind: Create, Key: "k", Hint: "0"})
		now = Output{Result: OK, ID: "a", Revision: 1, Hint: "0"}
		old, rev = now, 1
		done(now)
		var wg sync.WaitGroup
		for client := range 4 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(1, uint64(client)))
				for i := range 50 {
					if rnd.IntN(2) == 0 {
						done := r.Begin(client, Input{Kind: Get, Key: "k", ID: "a"})
						mu.Lock()
						out := now
						if lag {
							out = old
						}
						mu.Unlock()
						done(out)
						continue
					}
					hint := string(rune('a'+client)) + string(rune('0'+i))
					done := r.Begin(client, Input{Kind: Update, Key: "k", ID: "a", Hint: hint})
					mu.Lock()
					rev++
					mine := rev
					old, now = now, Output{Result: OK, ID: "a", Revision: rev, Hint: hint}
					mu.Unlock()
					done(Output{Result: OK, ID: "a", Revision: mine})
				}
			})
		}
		wg.Wait()
		if v := r.Check(time.Minute); v.Linearizable == lag || v.Unchecked {
			t.Errorf("lag %v, %d operations: %+v", lag, r.Len(), v)
		}
	}
}

func TestLedger(t *testing.T) {
	l := NewLedger()
	l.Made("a", "1")
	l.Made("b", "2")
	l.Made("c", "3")
	l.Deleted("b")
	l.Unsure("c")
	l.Refused("d", "no leader")
	if l.Acknowledged() != 3 || l.Unknown() != 1 {
		t.Errorf("%d acknowledged, %d unknown", l.Acknowledged(), l.Unknown())
	}
	for name, c := range map[string]struct {
		there       map[string]string
		lost, wrong int
	}{
		"all is well":         {map[string]string{"a": "1"}, 0, 0},
		"the unsure is there": {map[string]string{"a": "1", "c": "3"}, 0, 0},
		"a write is lost":     {map[string]string{}, 1, 0},
		"it is another":       {map[string]string{"a": "9"}, 1, 0},
		"a deletion is lost":  {map[string]string{"a": "1", "b": "2"}, 1, 0},
		"a refused one":       {map[string]string{"a": "1", "d": "4"}, 0, 1},
	} {
		if lost, wrong := l.Compare(c.there); len(lost) != c.lost || len(wrong) != c.wrong {
			t.Errorf("%s: lost %v, wrong %v", name, lost, wrong)
		}
	}
}

func TestSerials(t *testing.T) {
	s := NewSerials()
	s.Add("1", "x", "ca-1")
	s.Add("2", "y", "ca-1")
	s.Add("1", "x", "ca-2") // the same certificate again
	if s.Len() != 2 || len(s.Twice()) != 0 {
		t.Errorf("%d serials, twice %v", s.Len(), s.Twice())
	}
	s.Add("2", "z", "ca-3")
	if twice := s.Twice(); len(twice) != 1 || !strings.Contains(twice[0], "ca-3") {
		t.Errorf("twice %v", twice)
	}
}

func TestOneActive(t *testing.T) {
	list := []Authority{{"1", "x509", "active"}, {"2", "x509", "retiring"}, {"3", "jwt", "active"}, {"4", "x509", "prepared"}}
	if err := OneActive(list); err != nil {
		t.Error(err)
	}
	list[1].State = "active"
	if err := OneActive(list); err == nil || !strings.Contains(err.Error(), "1 and 2") {
		t.Errorf("two active: %v", err)
	}
}
