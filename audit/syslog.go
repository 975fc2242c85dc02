package audit

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"
)

// SyslogConfig is a collector that speaks syslog over TLS.
type SyslogConfig struct {
	Address string      // host:port
	TLS     *tls.Config // RootCAs and, if the collector asks who we are, certificates; the host's name is verified
	Member  string      // HOSTNAME of the messages
	// Timeout is for connecting, and for each write; 0: 5 s.
	Timeout time.Duration
}

// facility 13 is "log audit"; see RFC 5424 section 6.2.1.
const facility = 13

// Syslog is a Sink that sends each record as the message of an RFC 5424 line, framed by counting (RFC 5425 section 4.3). The
// protocol has no acknowledgement: handed over means that the connection took it, and a collector that dies takes along what
// it had not read. It can tell by the records' numbers.
func Syslog(c SyslogConfig) (Sink, error) {
	host, _, err := net.SplitHostPort(c.Address)
	if err != nil || c.TLS == nil || c.Member == "" {
		return nil, fmt.Errorf("making the syslog sink: address %q: want host:port, with TLS", c.Address)
	}
	c.TLS = c.TLS.Clone()
	c.TLS.MinVersion = max(c.TLS.MinVersion, tls.VersionTLS12)
	if c.TLS.ServerName == "" {
		c.TLS.ServerName = host
	}
	def(&c.Timeout, 5*time.Second)
	return &syslog{c: c}, nil
}

// syslog is used by one goroutine.
type syslog struct {
	c    SyslogConfig
	conn *tls.Conn
	gone chan struct{} // closed once the collector has hung up
	buf  []byte
}

// Write connects if need be.
func (s *syslog) Write(ctx context.Context, lines []Line) error {
	if s.conn != nil {
		select {
		case <-s.gone:
			s.Close() // what it had not read is lost; a write would not tell at once
		default:
		}
	}
	if s.conn == nil {
		if err := s.connect(ctx); err != nil {
			return err
		}
	}
	s.buf = s.buf[:0]
	for i := range lines {
		s.buf = s.frame(s.buf, &lines[i])
	}
	conn := s.conn
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.SetWriteDeadline(time.Now().Add(s.c.Timeout)); err != nil {
		s.Close()
		return err
	}
	if _, err := conn.Write(s.buf); err != nil {
		s.Close()
		return fmt.Errorf("sending to %s: %w", s.c.Address, err)
	}
	return nil
}

func (s *syslog) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.c.Timeout)
	defer cancel()
	d := tls.Dialer{Config: s.c.TLS}
	conn, err := d.DialContext(ctx, "tcp", s.c.Address)
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", s.c.Address, err)
	}
	s.conn, s.gone = conn.(*tls.Conn), make(chan struct{})
	// Collectors say nothing (RFC 5425 section 4.4): whatever can be read is the end, or a TLS 1.3 refusal of our certificate.
	go func(c net.Conn, gone chan struct{}) {
		var one [1]byte
		for {
			if _, err := c.Read(one[:]); err != nil {
				close(gone)
				return
			}
		}
	}(s.conn, s.gone)
	return nil
}

// frame appends one message: its length, a space, and the message.
func (s *syslog) frame(b []byte, l *Line) []byte {
	severity := 6 // informational
	switch l.Outcome {
	case Refused:
		severity = 5 // notice
	case Failed:
		severity = 4 // warning
	}
	var head [512]byte
	h := append(head[:0], '<')
	h = strconv.AppendInt(h, int64(facility*8+severity), 10)
	h = append(h, ">1 "...)
	h = appendTime(h, l.Time, timeFormat)
	h = append(h, ' ')
	h = appendToken(h, s.c.Member, 255)
	h = append(h, " countersign - "...)
	h = appendToken(h, string(l.Action), 32)
	h = append(h, " - "...)
	b = strconv.AppendInt(b, int64(len(h)+len(l.Text)), 10)
	b = append(b, ' ')
	b = append(b, h...)
	return append(b, l.Text...)
}

// appendToken writes a field of the header: printable ASCII without a space.
func appendToken(b []byte, s string, limit int) []byte {
	if s == "" {
		return append(b, '-')
	}
	for i := range min(len(s), limit) {
		if c := s[i]; c > ' ' && c < 0x7f {
			b = append(b, c)
		} else {
			b = append(b, '_')
		}
	}
	return b
}

// Close ends the connection.
func (s *syslog) Close() error {
	if s.conn == nil {
		return nil
	}
	err := s.conn.Close()
	s.conn = nil
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
