package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"
	"time"

	hraft "github.com/hashicorp/raft"
)

func header(version, kind byte, id uint64, size uint32) []byte {
	b := binary.BigEndian.AppendUint64([]byte{version, kind}, id)
	return binary.BigEndian.AppendUint32(b, size)
}

func TestFrameRoundTrip(t *testing.T) {
	for _, f := range []frame{
		{kindPropose, 1, []byte("cmd")},
		{kindPing, 0, nil},
		{kindOK, 1<<64 - 1, bytes.Repeat([]byte{9}, maxPayload)},
		{kindUnknown, 7, []byte("why")},
	} {
		b, err := appendFrame(nil, f)
		if err != nil {
			t.Fatal(err)
		}
		got, err := readFrame(iotest.HalfReader(bytes.NewReader(b)))
		if err != nil || got.kind != f.kind || got.id != f.id || !bytes.Equal(got.payload, f.payload) {
			t.Fatalf("kind %d: %v, %v", f.kind, got.kind, err)
		}
	}
	if _, err := appendFrame(nil, frame{kind: kindPropose, payload: make([]byte, maxPayload+1)}); !errors.Is(err, errFrame) {
		t.Errorf("too large to send: %v", err)
	}
}

func TestBadFrames(t *testing.T) {
	whole, err := appendFrame(nil, frame{kindPropose, 1, []byte("command")})
	if err != nil {
		t.Fatal(err)
	}
	for cut := 1; cut < len(whole); cut++ {
		if _, err := readFrame(bytes.NewReader(whole[:cut])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
	if _, err := readFrame(bytes.NewReader(nil)); err != io.EOF {
		t.Errorf("nothing: %v", err)
	}
	for name, b := range map[string][]byte{
		"version 0":  header(0, 1, 1, 0),
		"version 2":  header(2, 1, 1, 0),
		"kind 0":     header(1, 0, 1, 0),
		"kind 10":    header(1, 10, 1, 0),
		"kind 0x80":  header(1, 0x80, 1, 0),
		"kind 0x87":  header(1, 0x87, 1, 0),
		"oversize":   header(1, 1, 1, maxPayload+1),
		"size max":   header(1, 1, 1, 1<<32-1),
		"plain text": []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		if _, err := readFrame(bytes.NewReader(b)); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := parseAnswer(make([]byte, 7)); !errors.Is(err, errFrame) {
		t.Errorf("short answer: %v", err)
	}
}

// seeds checks that a fuzz target has its seeds: without them it would pass and show little.
func seeds(f *testing.F) {
	names, err := filepath.Glob(filepath.Join("testdata", "fuzz", f.Name(), "*"))
	if err != nil || len(names) < 3 {
		f.Fatalf("seeds: %d found, %v", len(names), err)
	}
}

// FuzzFrame: what parses is what would be written, and nothing takes more memory than has come in.
func FuzzFrame(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		for {
			start := len(b) - r.Len()
			got, err := readFrame(r)
			if err != nil {
				return
			}
			again, err := appendFrame(nil, got)
			if err != nil {
				t.Fatal(err)
			}
			if used := b[start : len(b)-r.Len()]; !bytes.Equal(again, used) {
				t.Fatalf("read %x, would write %x", used, again)
			}
			if a, err := parseAnswer(got.payload); err == nil && !bytes.Equal(a.payload(), got.payload) {
				t.Fatalf("answer %x, would write %x", got.payload, a.payload())
			}
		}
	})
}

// FuzzRecord: what parses is what would be written. The sum is fitted, so that the fuzzer gets past it.
func FuzzRecord(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, index uint64, b []byte) {
		var l hraft.Log
		if parseRecord(index, b, &l) == nil && len(b) > 0 && b[0] != recordVersion {
			t.Fatal("parsed another version")
		}
		if len(b) < recordSum {
			return
		}
		b = resum(indexKey(index), b)
		if parseRecord(index, b, &l) != nil {
			return
		}
		again, err := marshalRecord(&l)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again, b) {
			t.Fatalf("read %x, would write %x", b, again)
		}
		if parseRecord(index+1, b, &l) == nil {
			t.Fatal("accepted at another index")
		}
		b[len(b)/2] ^= 1
		if parseRecord(index, b, &l) == nil {
			t.Fatal("accepted with a flipped bit")
		}
	})
}

func TestRecordRoundTrip(t *testing.T) {
	at := time.Date(2026, 11, 23, 1, 2, 3, 456, time.UTC)
	for _, want := range []hraft.Log{
		{Index: 1, Term: 1, Type: hraft.LogConfiguration, Data: []byte("x")},
		{Index: 1 << 60, Term: 1 << 50, Type: hraft.LogCommand, Data: bytes.Repeat([]byte{1}, 1<<16), Extensions: []byte("ext"), AppendedAt: at},
		{Index: 3, Term: 2, Type: hraft.LogNoop},
	} {
		b, err := marshalRecord(&want)
		if err != nil {
			t.Fatal(err)
		}
		var got hraft.Log
		if err := parseRecord(want.Index, b, &got); err != nil {
			t.Fatal(err)
		}
		if got.Index != want.Index || got.Term != want.Term || got.Type != want.Type || !bytes.Equal(got.Data, want.Data) ||
			!bytes.Equal(got.Extensions, want.Extensions) || !got.AppendedAt.Equal(want.AppendedAt) {
			t.Errorf("got %+v, want %+v", got, want)
		}
		for i := range b { // every single bit counts
			b[i] ^= 0x40
			if len(b) < 200 && parseRecord(want.Index, b, &got) == nil {
				t.Fatalf("accepted with byte %d changed", i)
			}
			b[i] ^= 0x40
		}
	}
}

// TestSeedsRead keeps the folder of seeds from being left out of a checkout unnoticed.
func TestSeedsRead(t *testing.T) {
	for _, name := range []string{"FuzzFrame", "FuzzRecord"} {
		if entries, err := os.ReadDir(filepath.Join("testdata", "fuzz", name)); err != nil || len(entries) < 3 {
			t.Errorf("%s: %d seeds, %v", name, len(entries), err)
		}
	}
}
