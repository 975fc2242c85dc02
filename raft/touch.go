package raft

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"countersign.io/countersign/internal/durable"
)

// keepInTouch makes the others know this member's address, learns theirs, and whether this member was removed,
// until the node closes. While a leader speaks to this member there is nothing to do: the leader's questions
// carry what it knows. Without one, everybody is asked, wherever they may be.
func (n *Node) keepInTouch() {
	path := n.bookPath()
	defer n.saveBook(path)
	tick := time.NewTicker(n.cfg.HeartbeatTimeout)
	defer tick.Stop()
	for {
		if n.outOfTouch() {
			n.seek()
		}
		n.saveBook(path)
		n.peers.expire(time.Now())
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// outOfTouch tells whether this member should look for the others: it hears of no leader, or the cluster has it at
// another address.
func (n *Node) outOfTouch() bool {
	if n.raft.State() == hraft.Leader || n.gone.is() {
		return false
	}
	if n.contact() > 2*n.cfg.HeartbeatTimeout {
		return true
	}
	return slices.ContainsFunc(n.Members(), func(m Member) bool { return m.ID == n.cfg.ID && m.Address != n.cfg.Address })
}

// seek asks all other members, and whoever is at the hinted addresses: each learns by that where this member is,
// and says where it is and what it knows of the others.
func (n *Node) seek() {
	ctx, cancel := context.WithTimeout(n.ctx, min(n.cfg.RPCTimeout, healthWait))
	defer cancel()
	members := n.Members()
	if len(members) == 0 {
		return // not yet added anywhere: the leader comes by itself
	}
	var wg sync.WaitGroup
	for _, m := range members {
		if m.ID != n.cfg.ID {
			wg.Go(func() { n.askWord(ctx, m) }) // what it says is noted on the way
		}
	}
	for _, address := range n.cfg.Peers {
		if address != n.cfg.Address {
			wg.Go(func() { n.askHint(ctx, address) })
		}
	}
	wg.Wait()
}

// askHint asks whoever answers at an address.
func (n *Node) askHint(ctx context.Context, address string) {
	own, err := n.ownWord()
	if err != nil {
		return
	}
	l, err := n.connect(ctx, peerAddress{"", address})
	if err != nil {
		return // it may be down; the next round tries again
	}
	defer l.retire()
	a, err := l.ask(ctx, request{kindStatus, own})
	if err != nil || len(a.result) == 0 {
		return
	}
	w, err := parseWord(a.result)
	if err != nil {
		n.log.Warn("the status of the member at an address of the configuration makes no sense", "address", address, "error", err)
		return
	}
	if peer := n.peer(l.conn); peer == w.ID {
		n.learn(peer, w)
		n.hear(peer, w)
	}
}

// saveBook writes down where the members are, if that has changed.
func (n *Node) saveBook(path string) {
	ids := map[string]bool{}
	for _, m := range n.Members() {
		ids[m.ID] = true
	}
	if len(ids) > 0 {
		n.book.retain(ids)
	}
	if err := n.book.save(path); err != nil {
		n.log.Warn("writing down the members' addresses failed; they will be learned again", "error", err)
	}
}

func (n *Node) bookPath() string { return filepath.Join(n.cfg.Dir, "peers.json") }

// loadBook takes the addresses of the last run, before raft starts.
func (n *Node) loadBook() {
	if err := n.book.load(n.bookPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log.Warn("going on without the addresses of the last run; they are only hints, and are written anew", "error", err)
	}
}

// maxBookFile is more than the longest book has.
const maxBookFile = maxBook * maxCandidates * 8 << 10

const bookVersion = 1

// bookFile is the book on disk: JSON without white space, with a checksum of entries as they stand there.
type bookFile struct {
	Version int             `json:"version"`
	Sum     uint32          `json:"crc32c"`
	Entries json.RawMessage `json:"entries"`
}

// bookEntry is one member in it, with the address to be tried first in front.
type bookEntry struct {
	ID        string   `json:"id"`
	Addresses []string `json:"addresses"`
}

func marshalBook(entries []bookEntry) ([]byte, error) {
	raw, err := json.Marshal(entries)
	if err != nil {
		return nil, fmt.Errorf("encoding the book of addresses: %w", err)
	}
	b, err := json.Marshal(bookFile{bookVersion, crc32.Checksum(raw, castagnoli()), raw})
	if err != nil {
		return nil, fmt.Errorf("encoding the book of addresses: %w", err)
	}
	return b, nil
}

// parseBook decodes a book. There is one way to write each, so that any other byte is damage.
func parseBook(b []byte) ([]bookEntry, error) {
	var f bookFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	if crc32.Checksum(f.Entries, castagnoli()) != f.Sum {
		return nil, fmt.Errorf("the checksum does not match: %w", ErrCorrupt)
	}
	if f.Version != bookVersion {
		return nil, fmt.Errorf("version %d, this program reads version %d", f.Version, bookVersion)
	}
	var entries []bookEntry
	if err := json.Unmarshal(f.Entries, &entries); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	if again, err := marshalBook(entries); err != nil || !bytes.Equal(again, b) {
		return nil, fmt.Errorf("it is not as it was written: %w", ErrCorrupt)
	}
	for _, e := range entries {
		for _, a := range e.Addresses {
			if !validAddress(e.ID, a) {
				return nil, fmt.Errorf("member %.64q at address %.64q: %w", e.ID, a, ErrCorrupt)
			}
		}
	}
	return entries, nil
}

// load takes the addresses of the last run as hints, in their order.
func (b *book) load(path string) error {
	data, err := durable.ReadPrivateFile(path, maxBookFile)
	if err != nil {
		return err
	}
	entries, err := parseBook(data)
	if err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	for _, e := range entries {
		for _, a := range e.Addresses {
			b.heard(e.ID, a)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.changed = false
	return nil
}

// save writes the book if it has changed.
func (b *book) save(path string) error {
	b.mu.Lock()
	changed := b.changed
	b.changed = false
	entries := make([]bookEntry, 0, len(b.entries))
	for id, known := range b.entries {
		entries = append(entries, bookEntry{id, slices.Clone(known)})
	}
	b.mu.Unlock()
	if !changed {
		return nil
	}
	slices.SortFunc(entries, func(x, y bookEntry) int { return cmp.Compare(x.ID, y.ID) })
	data, err := marshalBook(entries)
	if err == nil {
		err = durable.WriteFile(path, data, 0o600)
	}
	if err != nil {
		b.mu.Lock()
		b.changed = true // to be tried again
		b.mu.Unlock()
	}
	return err
}
