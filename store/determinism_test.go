package store

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"countersign.io/countersign/raft"
)

// The same log gives the same bytes and the same answers, however it is batched, snapshotted, restored and restarted
// on the way.
func TestSameLogSameBytes(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			log := randomCommands(rnd, 1500)
			plain := openAt(t, stateDir(t))
			want := plain.ApplyBatch(log)
			checkConsistent(t, plain)

			dir := stateDir(t)
			s := openAt(t, dir)
			for at := 0; at < len(log); {
				n := min(1+rnd.IntN(100), len(log)-at)
				back := min(at, rnd.IntN(3)) // raft may tell again what was applied before a restart
				got := s.ApplyBatch(log[at-back : at+n])
				for i, res := range got {
					if i < back && res != nil {
						t.Fatalf("entry %d was applied twice", log[at-back+i].Index)
					}
					if i >= back && !bytes.Equal(res, want[at-back+i]) {
						t.Fatalf("entry %d: answers differ:\n%s\n%s", log[at-back+i].Index, res, want[at-back+i])
					}
				}
				at += n
				switch rnd.IntN(5) {
				case 0: // restart
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					s = openAt(t, dir)
				case 1: // go on at another member, from a snapshot
					snap := snapshotOf(t, s)
					dir = stateDir(t)
					s = openAt(t, dir)
					if err := s.Restore(bytes.NewReader(snap)); err != nil {
						t.Fatal(err)
					}
					if again := snapshotOf(t, s); !bytes.Equal(again, snap) {
						t.Fatal("a restored store gives another snapshot")
					}
				}
				if index, err := s.AppliedIndex(); err != nil || index != log[at-1].Index {
					t.Fatalf("AppliedIndex is %d, %v; applied %d", index, err, log[at-1].Index)
				}
				checkConsistent(t, s)
			}
			if !bytes.Equal(snapshotOf(t, s), snapshotOf(t, plain)) {
				t.Fatal("snapshots differ")
			}
		})
	}
}

// The random log is worth something only if it gets somewhere.
func TestRandomLogReachesEverything(t *testing.T) {
	s := openAt(t, stateDir(t))
	seen := map[string]int{}
	foreign := 0
	for _, e := range randomCommands(rand.New(rand.NewPCG(3, 1)), 1500) {
		c, err := decodeCommand(e.Data)
		if err != nil {
			t.Fatal(err)
		}
		var r result
		if err := decodeResult(s.ApplyBatch([]raft.Entry{e})[0], nil); err != nil {
			r.Code = "refused"
		}
		seen[c.Type+" "+r.Code]++
		foreign = max(foreign, len(s.Foreign()))
	}
	if foreign < 2 || len(s.SealTerms()) == 0 || s.Level() != 2 || len(s.view.downstream) == 0 {
		t.Errorf("level %d, terms %v, %d with foreign keys, downstream entries %v", s.Level(), s.SealTerms(), foreign, s.view.downstream)
	}
	for _, typ := range []string{createEntry, updateEntry, deleteEntry, putKubeCluster, deleteKubeCluster, createJoinToken, useJoinToken,
		putAgent, banAgent, evictAgent, createAuthority, putMember, removeMember, sweep, setLevel, admitAgent,
		putSealTerm, ackSealTerm, activateSealTerm, dropSealTerm, resealAuthority, prepareAuthority, activateAuthority, dropAuthority, putForeign} {
		if seen[typ+" "] == 0 {
			t.Errorf("no %s was applied", typ)
		}
		if seen[typ+" refused"] == 0 && typ != sweep && typ != putMember {
			t.Errorf("no %s was refused", typ)
		}
	}
}
