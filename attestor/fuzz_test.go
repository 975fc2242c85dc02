package attestor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestFuzzSeeds(t *testing.T) {
	for _, name := range []string{"FuzzParseCgroups", "FuzzTokenPodUID", "FuzzParseStartTime", "FuzzParseStatusUID"} {
		if seeds, err := os.ReadDir("testdata/fuzz/" + name); err != nil || len(seeds) < 3 {
			t.Errorf("%s has %d seeds, %v", name, len(seeds), err)
		}
	}
}

// Whatever a process adds below its own cgroups, it never becomes another pod or unit.
func FuzzParseCgroups(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte, below string) {
		place, err := parseCgroups(data)
		if err != nil {
			if place != (Place{}) {
				t.Fatalf("got %+v and %v", place, err)
			}
			return
		}
		if place.PodUID != "" && !isPodUID.MatchString(place.PodUID) || place.ContainerID != "" && len(place.ContainerID) != 64 {
			t.Fatalf("got %+v", place)
		}
		if place.PodUID == "" && place.Unit == "" || strings.ContainsAny(below, "\n") {
			return
		}
		var deeper bytes.Buffer
		for line := range bytes.Lines(data) {
			fmt.Fprintf(&deeper, "%s/%s\n", bytes.TrimSuffix(line, []byte("\n")), below)
		}
		got, err := parseCgroups(deeper.Bytes())
		if err == nil && place.PodUID != "" && got.PodUID != place.PodUID {
			t.Fatalf("from %+v to %+v by adding %q", place, got, below)
		}
		if err == nil && place.Unit != "" && got.PodUID == "" && got.Unit != place.Unit {
			t.Fatalf("from %+v to %+v by adding %q", place, got, below)
		}
	})
}

// Any UID that is put into a token comes out again; anything else is refused without being shown.
func FuzzTokenPodUID(f *testing.F) {
	f.Fuzz(func(t *testing.T, token []byte, uid string) {
		before := bytes.Clone(token)
		got, err := tokenPodUID(token)
		if (got == "") != (err != nil) {
			t.Fatalf("got %q, %v", got, err)
		}
		if !bytes.Equal(before, token) {
			t.Fatal("the token was changed")
		}
		if err != nil && len(token) > 24 && strings.Contains(err.Error(), string(token)) {
			t.Fatalf("the error shows the token: %v", err)
		}
		if uid == "" || len(uid) > 4096 || !utf8.ValidString(uid) {
			return
		}
		var same string // as JSON carries it
		if raw, err := json.Marshal(uid); err != nil || json.Unmarshal(raw, &same) != nil {
			return
		}
		if got, err := tokenPodUID(podToken(t, uid)); err != nil || got != same {
			t.Fatalf("got %q, %v; want %q", got, err, uid)
		}
	})
}

// Whatever a process calls itself, its start time comes out.
func FuzzParseStartTime(f *testing.F) {
	f.Fuzz(func(t *testing.T, raw []byte, comm string, start uint64) {
		parseStartTime(raw)
		stat := "7 (" + comm + ") S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 " + strconv.FormatUint(start, 10) + " 1000 10 18446744073709551615"
		if got, err := parseStartTime([]byte(stat)); err != nil || got != start {
			t.Fatalf("got %d, %v of %q", got, err, stat)
		}
	})
}

func FuzzParseStatusUID(f *testing.F) {
	f.Fuzz(func(t *testing.T, raw []byte, euid uint32) {
		parseStatusUID(raw)
		status := fmt.Sprintf("Name:\tx\\nUid:\nUmask:\t0022\nState:\tS (sleeping)\nUid:\t4294967294\t%d\t0\t0\nGid:\t1\t2\t3\t4\n", euid)
		if got, err := parseStatusUID([]byte(status)); err != nil || got != euid {
			t.Fatalf("got %d, %v", got, err)
		}
	})
}

func TestParseProcFiles(t *testing.T) {
	for _, bad := range []string{"", "7 (x", "7 (x) S 1 2 3", "7 (x) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 -5 1000", "7 (x) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 99999999999999999999 1"} {
		if n, err := parseStartTime([]byte(bad)); err == nil {
			t.Errorf("%q: got %d", bad, n)
		}
	}
	for _, bad := range []string{"", "Name:\tx\n", "Uid:\t1\t2\t3\n", "Uid:\t1\t-2\t3\t4\n", "Uid:\t1\t4294967296\t3\t4\n", " Uid:\t1\t2\t3\t4\n"} {
		if n, err := parseStatusUID([]byte(bad)); err == nil {
			t.Errorf("%q: got %d", bad, n)
		}
	}
}
