package raft

// keepInTouch makes the others know this member's address, learns theirs, and whether this member was removed.
func (n *Node) keepInTouch() {}
