package raft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	hraft "github.com/hashicorp/raft"
)

const (
	// MaxInfo is how many bytes Config.Info may have. More is not sent.
	MaxInfo = 4 << 10
	// maxWord bounds what is read of another member's word: the book and the info, escaped as JSON may have to.
	maxWord = 1 << 20
)

// errWord is wrapped by what is wrong with another member's word.
var errWord = errors.New("bad status of a member")

// word is what a member says of itself and knows of others. It goes with each status request and comes back
// with its answer. Fields that are not known are ignored: a newer member may say more.
type word struct {
	ID      string        `json:"id"`
	Address string        `json:"address"`
	Peers   []peerAddress `json:"peers,omitempty"` // where the others were, as far as it knows
	Info    []byte        `json:"info,omitempty"`

	Applied  uint64        `json:"applied,omitempty"`
	Last     uint64        `json:"last,omitempty"`
	LastTerm uint64        `json:"last_term,omitempty"`
	Commit   uint64        `json:"commit,omitempty"`
	Contact  time.Duration `json:"contact,omitempty"` // since it heard of the leader; 0 on the leader, Never
	// Member is said by one who asks: that it is a member, as far as it knows, or was.
	Member bool `json:"member,omitempty"`
	// Gone is said by the leader to one who is none.
	Gone bool `json:"gone,omitempty"`

	old bool // of protocol 1: only Applied was said
}

func (w word) marshal() ([]byte, error) {
	b, err := json.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encoding status: %w", err)
	}
	return b, nil
}

// parseWord decodes and checks a word.
func parseWord(b []byte) (word, error) {
	var w word
	if len(b) > maxWord {
		return word{}, fmt.Errorf("%d bytes, the limit is %d: %w", len(b), maxWord, errWord)
	}
	if err := json.Unmarshal(b, &w); err != nil {
		return word{}, fmt.Errorf("%w: %w", errWord, err)
	}
	switch {
	case !validAddress(w.ID, w.Address):
		return word{}, fmt.Errorf("id %.64q at address %.64q: %w", w.ID, w.Address, errWord)
	case len(w.Info) > MaxInfo:
		return word{}, fmt.Errorf("info of %d bytes, the limit is %d: %w", len(w.Info), MaxInfo, errWord)
	case len(w.Peers) > maxBook:
		return word{}, fmt.Errorf("%d members, the limit is %d: %w", len(w.Peers), maxBook, errWord)
	case w.Contact < 0:
		return word{}, fmt.Errorf("last contact %v ago: %w", w.Contact, errWord)
	}
	for _, p := range w.Peers {
		if !validAddress(p.ID, p.Address) {
			return word{}, fmt.Errorf("member %.64q at address %.64q: %w", p.ID, p.Address, errWord)
		}
	}
	return w, nil
}

// word is what this member says now.
func (n *Node) word() word {
	w := word{
		ID: n.cfg.ID, Address: n.cfg.Address, Peers: n.book.first(),
		Applied: n.fsm.appliedIndex(), Last: n.raft.LastIndex(), Commit: n.raft.CommitIndex(), Contact: n.contact(),
	}
	w.LastTerm = n.logs.lastTerm(n.raft.CurrentTerm())
	if n.cfg.Info != nil {
		if info := n.cfg.Info(); len(info) <= MaxInfo {
			w.Info = info
		} else {
			n.log.Error("the info of this member is too large to tell", "bytes", len(info), "limit", MaxInfo)
		}
	}
	return w
}

// contact is how long ago this member heard of the leader.
func (n *Node) contact() time.Duration {
	if n.raft.State() == hraft.Leader {
		return 0
	}
	last := n.raft.LastContact()
	if last.IsZero() {
		return Never
	}
	return since(last, time.Now())
}

// tell answers a status request. The asker's word counts only for what is known to be its own.
func (n *Node) tell(ctx context.Context, peer string, payload []byte) answer {
	asker, err := parseWord(payload)
	if err != nil {
		n.log.Warn("a member's status makes no sense", "member", peer, "error", err)
	} else {
		n.learn(peer, asker)
	}
	w := n.word()
	w.Gone = peer != "" && asker.Member && n.lacks(ctx, peer)
	b, err := w.marshal()
	if err != nil {
		n.log.Error("telling this member's status failed", "error", err)
		return answer{index: n.fsm.appliedIndex()}
	}
	return answer{index: w.Applied, result: b}
}

// askWord asks a member about itself. One of protocol 1 says only how far it is.
func (n *Node) askWord(ctx context.Context, m Member) (word, error) {
	own, err := n.ownWord()
	if err != nil {
		return word{}, err
	}
	a, err := n.askMember(ctx, m, request{kindStatus, own})
	if err != nil {
		return word{}, err
	}
	if len(a.result) == 0 {
		return word{ID: m.ID, Address: m.Address, Applied: a.index, Last: a.index, Contact: Never, old: true}, nil
	}
	w, err := parseWord(a.result)
	if err != nil {
		return word{}, fmt.Errorf("asking member %s: %w", m.ID, err)
	}
	if w.ID != m.ID {
		return word{}, fmt.Errorf("asking member %s: %q answers: %w", m.ID, w.ID, errOther)
	}
	n.learn(m.ID, w)
	n.hear(m.ID, w)
	return w, nil
}

// ownWord is this member's word as a status request carries it.
func (n *Node) ownWord() ([]byte, error) {
	w := n.word()
	w.Member = len(n.Members()) > 0 // a leader has sent a configuration, so this member was added once
	return w.marshal()
}

// learn takes over what a member says about where members are: of itself for sure, if it is known who speaks, of
// others as a hint. Only members are noted.
func (n *Node) learn(peer string, w word) {
	members := map[string]bool{}
	for _, m := range n.Members() {
		members[m.ID] = true
	}
	if peer != "" && w.ID == peer && members[peer] {
		n.book.found(peer, w.Address)
	}
	if peer != "" && !members[peer] {
		return // one that was removed, say
	}
	for _, p := range w.Peers {
		if p.ID != peer && members[p.ID] {
			n.book.heard(p.ID, p.Address)
		}
	}
}
