//go:build race

package raft

// raceDetector tells that this test was built with it.
const raceDetector = true
