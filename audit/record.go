package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"countersign.io/countersign/identity"
)

// Parse reads one line, with its end or without. It takes nothing but what this package writes, byte for byte: a record has
// one form. Errors wrap identity.ErrInvalid.
func Parse(line []byte) (*Record, error) {
	line = bytes.TrimSuffix(line, []byte{'\n'})
	if len(line) >= MaxLine {
		return nil, fmt.Errorf("%w: a line of %d bytes: at the most %d", identity.ErrInvalid, len(line), MaxLine)
	}
	var v struct {
		Version int `json:"v"`
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	var r Record
	if err := dec.Decode(&r); err != nil {
		if json.Unmarshal(line, &v) == nil && v.Version > Version {
			return nil, fmt.Errorf("%w: a record of format %d: this release reads format %d", identity.ErrInvalid, v.Version, Version)
		}
		return nil, fmt.Errorf("%w: it is not a record: %v", identity.ErrInvalid, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: there is more after the record", identity.ErrInvalid)
	}
	if r.Version != Version {
		return nil, fmt.Errorf("%w: a record of format %d: this release reads format %d", identity.ErrInvalid, r.Version, Version)
	}
	prev, err := parseHash(r.Prev)
	if err != nil || r.Seq == 0 || r.Action == "" || r.Outcome == "" {
		return nil, fmt.Errorf("%w: it is not a record: seq, prev, action or outcome are missing", identity.ErrInvalid)
	}
	again := appendBody(appendPrefix(make([]byte, 0, len(line)), r.Seq, &prev), r.Member, &r.Event, r.Checkpoint)
	if !bytes.Equal(again, line) {
		return nil, fmt.Errorf("%w: it is not written as records are", identity.ErrInvalid)
	}
	return &r, nil
}

func parseHash(s string) (h [sha256.Size]byte, err error) {
	if len(s) != 2*len(h) {
		return h, errors.New("not a hash")
	}
	_, err = hex.Decode(h[:], []byte(s))
	return h, err
}

// parsePrefix reads what chains a line, without the rest.
func parsePrefix(line []byte) (seq uint64, prev [sha256.Size]byte, ok bool) {
	rest, ok := bytes.CutPrefix(line, []byte(`{"v":1,"seq":`))
	if !ok {
		return 0, prev, false
	}
	i := bytes.IndexByte(rest, ',')
	if i <= 0 || i > 20 {
		return 0, prev, false
	}
	seq, err := strconv.ParseUint(string(rest[:i]), 10, 64)
	if err != nil || seq == 0 {
		return 0, prev, false
	}
	rest, ok = bytes.CutPrefix(rest[i:], []byte(`,"prev":"`))
	if !ok || len(rest) < 2*sha256.Size+2 || rest[2*sha256.Size] != '"' {
		return 0, prev, false
	}
	if _, err := hex.Decode(prev[:], rest[:2*sha256.Size]); err != nil {
		return 0, prev, false
	}
	return seq, prev, bytes.HasSuffix(line, []byte{'}'})
}

// SignedBytes are what the checkpoint that is record seq signs: its place, and the hash of the record before it.
func SignedBytes(member string, seq uint64, prev string) []byte {
	return fmt.Appendf(nil, "countersign audit checkpoint 1\n%s\n%d\n%s\n", member, seq, prev)
}
