package server

import (
	"sync"
	"time"

	"countersign.io/countersign/identity"
)

// outliving knows for each authority when the last of what this member signed under it for nobody's agent ends: no agent can be
// asked whether that is still in use, so an authority is not given up before.
type outliving struct {
	mu   sync.Mutex
	last map[authorityName]time.Time
}

type authorityName struct {
	kind identity.AuthorityKind
	id   string
}

// outlives is called with all of it before it is handed out.
func (s *Server) outlives(kind identity.AuthorityKind, id string, notAfter time.Time) {
	s.beyond.mu.Lock()
	defer s.beyond.mu.Unlock()
	if s.beyond.last == nil {
		s.beyond.last = map[authorityName]time.Time{}
	}
	if n := (authorityName{kind, id}); s.beyond.last[n].Before(notAfter) {
		s.beyond.last[n] = notAfter
	}
}

// lastBeyond is when the last of it ends; zero: nothing was signed.
func (s *Server) lastBeyond(kind identity.AuthorityKind, id string) time.Time {
	s.beyond.mu.Lock()
	defer s.beyond.mu.Unlock()
	return s.beyond.last[authorityName{kind, id}]
}
