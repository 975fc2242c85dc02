// Package caller makes up the callers of a node agent, for measurements that need more of them than there can be processes.
package caller

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// Pod attests a made-up caller: what an attestor finds at a pod's process, with the token that read gives.
func Pod(uid string, read func() ([]byte, error)) attestor.Func {
	key := sha256.Sum256([]byte(uid))
	w := attestor.Workload{Key: hex.EncodeToString(key[:]), PodUID: uid}
	w.Evidence.Selectors = []identity.Selector{"unix:gid:1000", "unix:path:/usr/local/bin/web", "unix:uid:1000"}
	return func(context.Context) (*attestor.Workload, error) {
		token, err := read()
		if err != nil {
			return nil, fmt.Errorf("%w: reading the token: %v", identity.ErrUnavailable, err)
		}
		out := w
		out.Evidence.Token = token
		return &out, nil
	}
}
