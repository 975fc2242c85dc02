package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A frame on a forwarding connection, version 1, big endian:
//
//	0  version
//	1  kind
//	2  request id     8 bytes, chosen by the asker, repeated in the answer
//	10 payload        4 bytes of length, then the bytes
//
// Many requests are under way on one connection; answers come in any order.
const (
	frameVersion = 1
	frameHeader  = 1 + 1 + 8 + 4
	maxPayload   = MaxCommand + 1024 // an answer has an index or an error before its bytes
)

// protocol is what this program speaks on forwarding connections. The frames of protocol 1 are unchanged in it.
const protocol = 2

type frameKind byte

const (
	kindPropose frameKind = 1 // payload: the command
	kindAdd     frameKind = 2 // payload: id, 0, address
	kindRemove  frameKind = 3 // payload: id
	kindBarrier frameKind = 4 // no payload
	// kindStatus is answered by any member: its applied index. Since protocol 2 it has a payload, the asker's
	// word; then the answerer's is the result. An older member ignores the one and sends none.
	kindStatus frameKind = 5
	kindPing   frameKind = 6 // no payload; answered at once

	// Since protocol 2. An older member takes them for garbage and closes the connection, so they are sent only
	// to one that has said its protocol in a pong.
	kindTerm      frameKind = 7 // no payload; answered by any member: its term in the index's place
	kindReadIndex frameKind = 8 // no payload
	kindTransfer  frameKind = 9 // payload: id of the next leader, or none

	kindOK          frameKind = 0x81 // payload: index (8 bytes), result
	kindNotExecuted frameKind = 0x82 // payload: why; trying again is safe
	kindUnknown     frameKind = 0x83 // payload: why; the outcome is unknown
	kindRefused     frameKind = 0x84 // payload: why; trying again is useless
	kindPong        frameKind = 0x85 // payload: the protocol (1 byte); none is protocol 1
	kindGoodbye     frameKind = 0x86 // no payload, to no request: ask another member from now on
)

// errFrame is wrapped by what is wrong with a frame.
var errFrame = errors.New("bad frame")

type frame struct {
	kind    frameKind
	id      uint64
	payload []byte
}

func (k frameKind) known() bool {
	return k >= kindPropose && k <= kindTransfer || k >= kindOK && k <= kindGoodbye
}

// since is the protocol that a request came with.
func (k frameKind) since() uint32 {
	if k >= kindTerm && k <= kindTransfer {
		return 2
	}
	return 1
}

// appendFrame encodes a frame.
func appendFrame(b []byte, f frame) ([]byte, error) {
	if len(f.payload) > maxPayload {
		return nil, fmt.Errorf("payload of %d bytes, the limit is %d: %w", len(f.payload), maxPayload, errFrame)
	}
	b = append(b, frameVersion, byte(f.kind))
	b = binary.BigEndian.AppendUint64(b, f.id)
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.payload)))
	return append(b, f.payload...), nil
}

// readFrame reads one frame. At the end of the input between two frames it returns io.EOF itself; within
// one, an error that wraps io.ErrUnexpectedEOF.
func readFrame(r io.Reader) (frame, error) {
	var h [frameHeader]byte
	if n, err := io.ReadFull(r, h[:]); err != nil {
		if n == 0 {
			return frame{}, err
		}
		return frame{}, fmt.Errorf("reading frame header: %w", err)
	}
	if h[0] != frameVersion {
		return frame{}, fmt.Errorf("frame version %d, this program speaks version %d: %w", h[0], frameVersion, errFrame)
	}
	f := frame{kind: frameKind(h[1]), id: binary.BigEndian.Uint64(h[2:10])}
	if !f.kind.known() {
		return frame{}, fmt.Errorf("frame kind %#x: %w", h[1], errFrame)
	}
	n := binary.BigEndian.Uint32(h[10:14])
	if n > maxPayload {
		return frame{}, fmt.Errorf("frame payload of %d bytes, the limit is %d: %w", n, maxPayload, errFrame)
	}
	if n == 0 {
		return f, nil
	}
	// The memory grows with what has come, not with what the header promises.
	var b bytes.Buffer
	b.Grow(int(min(n, 64<<10)))
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, fmt.Errorf("reading frame payload: %w", err)
	}
	f.payload = b.Bytes()
	return f, nil
}

// answer is what a request came to.
type answer struct {
	index  uint64
	result []byte
}

func (a answer) payload() []byte {
	return append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(a.result)), a.index), a.result...)
}

func parseAnswer(b []byte) (answer, error) {
	if len(b) < 8 {
		return answer{}, fmt.Errorf("answer of %d bytes: %w", len(b), errFrame)
	}
	a := answer{index: binary.BigEndian.Uint64(b)}
	if len(b) > 8 {
		a.result = b[8:]
	}
	return a, nil
}
