package agent

import (
	"fmt"
	"strings"
	"time"

	"countersign.io/countersign/identity"
)

// This file is what differs where the agent is a pod's own, a sidecar: it shows no certificate but the pod's token, and serves that pod alone.

// podMove is when a pod moves to a new connection, less up to a quarter: a member ends one without a certificate after a minute or so.
const podMove = 50 * time.Second

// podContact is what verifies a member towards a pod: the newest bundle, and before the first one, or in some of the rounds in which nobody
// could be verified by that, what is configured.
func (a *Agent) podContact() contact {
	if t := a.trust.Load(); t != nil && !a.anew.Load() {
		return contact{td: t.td, trust: t}
	}
	return a.firstContact()
}

// podToken reads the pod's token, which the kubelet replaces.
func (a *Agent) podToken() (string, error) {
	raw, err := a.cfg.Pod()
	if err != nil {
		return "", fmt.Errorf("%w: reading the pod's token: %v", identity.ErrUnavailable, err)
	}
	defer clear(raw)
	token := strings.TrimSpace(string(raw))
	if len(token) == 0 || len(token) > identity.MaxTokenBytes {
		return "", fmt.Errorf("%w: the pod's token has %d bytes: want 1 to %d", identity.ErrUnavailable, len(token), identity.MaxTokenBytes)
	}
	return token, nil
}
