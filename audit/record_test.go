package audit

import (
	"bytes"
	"crypto/sha256"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func encode(e Event, c *Checkpoint) []byte {
	var prev [sha256.Size]byte
	if e.Time.IsZero() {
		e.Time = time.Unix(1800000000, 123456000)
	}
	return appendBody(appendPrefix(nil, 7, &prev), "m1", &e, c)
}

func TestRecordsAreReadAsWritten(t *testing.T) {
	for _, e := range []Event{
		{Action: "a", Outcome: OK},
		event(3),
		{Action: "a", Outcome: Refused, Reason: "a \"quote\", a \\, a line\nbreak, \x00\x1b[31m, \u202eright to left, 日本語, \U0001f600, \U000e0001", Count: 3, Audience: []string{"db", ""}},
		{Action: "a", Outcome: Failed, Details: Details{{"z", "1"}, {"a", "2"}, {"m", ""}}, Who: Who{Kind: "operator", UID: "0"}},
	} {
		line := encode(e, nil)
		r, err := Parse(line)
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		e.Details.sort()
		got := r.Event
		got.Time, got.NotAfter, e.NotAfter = time.Time{}, got.NotAfter.Local(), e.NotAfter.Local()
		if !reflect.DeepEqual(got, e) {
			t.Errorf("%s:\n got %+v\nwant %+v", line, got, e)
		}
	}
	cp := &Checkpoint{Signature: []byte{1, 2}, Chain: [][]byte{{3}, {4, 5}}}
	if r, err := Parse(encode(Event{Action: LogCheckpoint, Outcome: OK}, cp)); err != nil || !reflect.DeepEqual(r.Checkpoint, cp) {
		t.Errorf("%+v %v", r, err)
	}
}

// TestHostileTexts: whatever a text holds, the record is one line of printable UTF-8 below MaxLine, and reads as it is written.
func TestHostileTexts(t *testing.T) {
	for _, s := range []string{
		"\xff\xfe", "a\xc3", strings.Repeat("x", 1<<20), strings.Repeat("\x00", 1<<20), strings.Repeat("\"", 1<<16), strings.Repeat("\U000e0001", 5000),
		strings.Repeat("é", 5000), "\u2028\u2029\u202e\ufeff\x7f\u0085", "}\n{\"v\":1", strings.Repeat("\xff", 9999),
	} {
		many := make([]string, 200)
		for i := range many {
			many[i] = s
		}
		line := encode(Event{
			Action: Action(s), Outcome: Outcome(s), RequestID: s, Who: Who{s, s, s, s, s, s}, Subjects: many, Workload: many, Entry: s, Serial: s, Audience: many, Reason: s,
			Details: Details{{"a", s}, {"b", s}, {"b", "twice"}, {s, "not a key"}, {"", "nor this"}},
		}, nil)
		if len(line) >= MaxLine || bytes.ContainsAny(line, "\n\x00\x1b\x7f") || !utf8.Valid(line) {
			t.Errorf("%.20q: a line of %d bytes", s, len(line))
		}
		r, err := Parse(line)
		if err != nil {
			t.Errorf("%.20q: %v", s, err)
			continue
		}
		if len(r.Subjects) != maxSubjects || !strings.Contains(r.Subjects[maxSubjects-1], "193 more") || r.Details.Get("b") == "twice" {
			t.Errorf("%.20q: %d subjects, the last %.50q", s, len(r.Subjects), r.Subjects[len(r.Subjects)-1])
		}
	}
	for _, at := range []time.Time{time.Unix(-1<<60, 0), time.Unix(1<<40, 0), {}} {
		if _, err := Parse(encode(Event{Action: "a", Outcome: OK, Time: at, NotAfter: at}, nil)); err != nil {
			t.Errorf("%v: %v", at, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good := string(encode(event(1), nil))
	for name, line := range map[string]string{
		"nothing":       "",
		"not JSON":      "hello",
		"another field": strings.Replace(good, `"v":1`, `"v":1,"x":2`, 1),
		"a space":       strings.Replace(good, `"v":1`, `"v": 1`, 1),
		"newer format":  strings.Replace(good, `"v":1`, `"v":2`, 1),
		"no number":     strings.Replace(good, `"seq":7`, `"seq":0`, 1),
		"upper case":    strings.Replace(good, `"action"`, `"Action"`, 1),
		"twice":         strings.Replace(good, `"outcome":"ok"`, `"outcome":"refused","outcome":"ok"`, 1),
		"an escape":     strings.Replace(good, `"ok"`, `"\u006fk"`, 1),
		"more behind":   good + "{}",
		"cut":           good[:len(good)-1],
		"a short hash":  strings.Replace(good, `"prev":"00`, `"prev":"0`, 1),
		"details order": strings.Replace(good, `{"a":"1","b":"2"}`, `{"b":"2","a":"1"}`, 1),
		"too long":      good[:len(good)-1] + strings.Repeat(" ", MaxLine) + "}",
	} {
		if _, err := Parse([]byte(line)); err == nil {
			t.Errorf("%s: %s", name, line)
		}
		if name != "more behind" && line == good {
			t.Errorf("%s: the case changes nothing", name)
		}
	}
	if _, err := Parse([]byte(strings.Replace(good, `"v":1`, `"v":2,"new":3`, 1))); err == nil || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("a newer format: %v", err)
	}
}

func TestSeedsAreThere(t *testing.T) {
	for _, f := range []string{"FuzzParse", "FuzzVerify", "FuzzEncode"} {
		if seeds, err := filepath.Glob(filepath.Join("testdata", "fuzz", f, "*")); err != nil || len(seeds) < 2 {
			t.Errorf("%s has %d seeds", f, len(seeds))
		}
	}
}

// FuzzParse: what is taken for a record is written as it was read; its prefix says the same.
func FuzzParse(f *testing.F) {
	f.Add(encode(event(1), nil))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := Parse(line)
		if err != nil {
			return
		}
		prev, err := parseHash(r.Prev)
		if err != nil {
			t.Fatal(err)
		}
		again := appendBody(appendPrefix(nil, r.Seq, &prev), r.Member, &r.Event, r.Checkpoint)
		if !bytes.Equal(again, bytes.TrimSuffix(line, []byte{'\n'})) {
			t.Fatalf("%s\n%s", line, again)
		}
		if seq, p, ok := parsePrefix(again); !ok || seq != r.Seq || p != prev {
			t.Fatalf("the prefix of %s is %d %x %t", line, seq, p, ok)
		}
	})
}

// FuzzEncode: whatever it is made of, a record can be read again.
func FuzzEncode(f *testing.F) {
	f.Add("issue.x509", "a reason", "spiffe://example.org/a", "key", "value", int64(1800000000))
	f.Fuzz(func(t *testing.T, action, reason, subject, key, value string, at int64) {
		if action == "" {
			action = "a"
		}
		e := Event{Action: Action(action), Outcome: OK, Reason: reason, Subjects: []string{subject, value}, Details: Details{{key, value}, {value, key}}, Time: time.Unix(at, at), Who: Who{ID: subject}}
		line := encode(e, nil)
		if _, err := Parse(line); err != nil || len(line) >= MaxLine || bytes.IndexByte(line, '\n') >= 0 {
			t.Fatalf("%s: %v", line, err)
		}
	})
}

// FuzzVerify: nothing makes the verifier fall over, nor find more faults than it keeps.
func FuzzVerify(f *testing.F) {
	f.Add([]byte("\n\n"))
	var log []byte
	all, s := signedLog(f)
	for _, l := range all {
		log = append(log, l...)
	}
	f.Add(log)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, c := range []VerifyConfig{{}, {Roots: s.roots, Whole: true}, {Collected: true}} {
			v := NewVerifier(c)
			if err := v.Read("x", bytes.NewReader(data)); err != nil {
				t.Fatal(err)
			}
			rep := v.Done()
			if len(rep.Faults) > maxFaults+1 {
				t.Fatalf("%d faults", len(rep.Faults))
			}
			for _, f := range rep.Faults {
				_ = f.String()
			}
		}
	})
}
