package audit

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Version of the line format: see docs/AUDIT.md.
const Version = 1

// MaxLine bounds a line, in bytes with its end.
const MaxLine = 64 << 10

// The bounds of what is in a line, in bytes as encoded. Together they stay below MaxLine.
const (
	maxShort    = 256
	maxText     = 2100 // a SPIFFE ID has at the most 2048
	maxReason   = 2048
	maxSubjects = 8
	maxWorkload = 16
	maxAudience = 32
	maxDetails  = 16
	maxKey      = 64
	maxDetail   = 512
)

const (
	timeFormat = "2006-01-02T15:04:05.000000Z"
	dateFormat = "2006-01-02T15:04:05Z"
)

// prefix begins a line: what only the writer knows.
func appendPrefix(b []byte, seq uint64, prev *[sha256.Size]byte) []byte {
	b = append(b, `{"v":1,"seq":`...)
	b = strconv.AppendUint(b, seq, 10)
	b = append(b, `,"prev":"`...)
	b = hex.AppendEncode(b, prev[:])
	return append(b, '"', ',')
}

// appendBody appends the rest of a line, without its end. The line is written by hand because every issuance pays for it.
func appendBody(b []byte, member string, e *Event, c *Checkpoint) []byte {
	b = append(b, `"time":"`...)
	b = appendTime(b, e.Time, timeFormat)
	b = append(b, '"')
	b = appendField(b, "member", member, maxShort)
	b = appendField(b, "action", string(e.Action), maxShort)
	b = appendField(b, "outcome", string(e.Outcome), maxShort)
	b = appendOptional(b, "request", e.RequestID, maxShort)
	b = appendWho(b, &e.Who)
	b = appendList(b, "on", e.Subjects, maxSubjects, maxText)
	b = appendList(b, "workload", e.Workload, maxWorkload, maxShort)
	b = appendOptional(b, "entry", e.Entry, maxShort)
	b = appendNumber(b, "entry_revision", e.EntryRevision)
	b = appendNumber(b, "revision", e.Revision)
	b = appendOptional(b, "serial", e.Serial, maxShort)
	if end := clampTime(e.NotAfter); !end.IsZero() {
		b = append(b, `,"not_after":"`...)
		b = appendTime(b, end, dateFormat)
		b = append(b, '"')
	}
	b = appendList(b, "audience", e.Audience, maxAudience, maxShort)
	b = appendNumber(b, "count", e.Count)
	b = appendOptional(b, "reason", e.Reason, maxReason)
	b = appendDetails(b, e.Details)
	if c != nil {
		b = append(b, `,"checkpoint":{"sig":"`...)
		b = base64.StdEncoding.AppendEncode(b, c.Signature)
		b = append(b, `","chain":[`...)
		for i, der := range c.Chain {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, '"')
			b = base64.StdEncoding.AppendEncode(b, der)
			b = append(b, '"')
		}
		b = append(b, `]}`...)
	}
	return append(b, '}')
}

func appendTime(b []byte, t time.Time, format string) []byte {
	return clampTime(t).AppendFormat(b, format)
}

// clampTime keeps to the years that the format has room for.
func clampTime(t time.Time) time.Time {
	t = t.UTC()
	switch y := t.Year(); {
	case y < 1:
		return time.Time{}
	case y > 9999:
		return time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
	}
	return t
}

func appendWho(b []byte, w *Who) []byte {
	if *w == (Who{}) {
		return b
	}
	b = append(b, `,"who":`...)
	at := len(b)
	b = appendOptional(b, "kind", w.Kind, maxShort)
	b = appendOptional(b, "id", w.ID, maxText)
	b = appendOptional(b, "serial", w.Serial, maxShort)
	b = appendOptional(b, "addr", w.Address, maxShort)
	b = appendOptional(b, "uid", w.UID, maxShort)
	b = appendOptional(b, "role", w.Role, maxShort)
	b[at] = '{' // in place of the first comma
	return append(b, '}')
}

func appendDetails(b []byte, d Details) []byte {
	if len(d) == 0 {
		return b
	}
	if !slices.IsSortedFunc(d, byKey) {
		d = slices.Clone(d)
		d.sort()
	}
	start := len(b)
	b = append(b, `,"details":`...)
	at, n, last := len(b), 0, ""
	for _, x := range d {
		if x.Key == "" || x.Key == last || len(x.Key) > maxKey || !plain(x.Key) || n == maxDetails {
			continue // it would not be one object, or not in this order
		}
		last = x.Key
		b = appendField(b, x.Key, x.Value, maxDetail)
		n++
	}
	if n == 0 {
		return b[:start]
	}
	b[at] = '{' // in place of the first comma
	return append(b, '}')
}

func byKey(a, b Detail) int { return strings.Compare(a.Key, b.Key) }

func appendOptional(b []byte, name, value string, limit int) []byte {
	if value == "" {
		return b
	}
	return appendField(b, name, value, limit)
}

func appendField(b []byte, name, value string, limit int) []byte {
	b = append(b, ',', '"')
	b = append(b, name...)
	b = append(b, '"', ':')
	return appendString(b, value, limit)
}

func appendNumber(b []byte, name string, n uint64) []byte {
	if n == 0 {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, name...)
	b = append(b, '"', ':')
	return strconv.AppendUint(b, n, 10)
}

// appendList keeps the first few, and says how many there were more.
func appendList(b []byte, name string, values []string, most, limit int) []byte {
	if len(values) == 0 {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, name...)
	b = append(b, '"', ':', '[')
	for i, v := range values {
		if i > 0 {
			b = append(b, ',')
		}
		if i == most-1 && len(values) > most {
			b = appendString(b, "… and "+strconv.Itoa(len(values)-i)+" more", limit)
			break
		}
		b = appendString(b, v, limit)
	}
	return append(b, ']')
}

// appendString writes a JSON string of at the most limit bytes between its quotes. Encoding what it decodes to gives the same
// bytes again.
func appendString(b []byte, s string, limit int) []byte {
	b = append(b, '"')
	if len(s) <= limit && plain(s) {
		b = append(b, s...)
		return append(b, '"')
	}
	start := len(b)
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		mark := len(b)
		b = appendRune(b, r)
		i += n
		used := len(b) - start
		if used > limit || i < len(s) && used > limit-len("…") {
			b = append(b[:mark], "…"...)
			break
		}
	}
	return append(b, '"')
}

func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// appendRune escapes what a terminal might act on, or a reader not see.
func appendRune(b []byte, r rune) []byte {
	switch {
	case r == '"' || r == '\\':
		return append(b, '\\', byte(r))
	case unicode.IsPrint(r):
		return utf8.AppendRune(b, r)
	case r > 0xffff:
		hi, lo := utf16.EncodeRune(r)
		return appendEscape(appendEscape(b, hi), lo)
	}
	return appendEscape(b, r)
}

func appendEscape(b []byte, r rune) []byte {
	const digits = "0123456789abcdef"
	return append(b, '\\', 'u', digits[r>>12&15], digits[r>>8&15], digits[r>>4&15], digits[r&15])
}
