package attestor

import (
	"os/user"
	"strconv"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

// nameFor is how long the name of a user or group is remembered, or that it has none.
const nameFor = time.Minute

// names looks up users and groups in the agent's own user database, which may ask the network.
type names struct {
	now   func() time.Time
	cache *lru.Cache[nameKey, name]
}

type nameKey struct {
	group bool
	id    uint32
}

type name struct {
	value string // empty: none
	at    time.Time
}

func (n *names) user(id uint32) string {
	return n.get(nameKey{false, id}, func(s string) (string, error) {
		u, err := user.LookupId(s)
		if err != nil {
			return "", err
		}
		return u.Username, nil
	})
}

func (n *names) group(id uint32) string {
	return n.get(nameKey{true, id}, func(s string) (string, error) {
		g, err := user.LookupGroupId(s)
		if err != nil {
			return "", err
		}
		return g.Name, nil
	})
}

func (n *names) get(key nameKey, lookup func(string) (string, error)) string {
	now := n.now()
	if e, ok := n.cache.Get(key); ok && now.Sub(e.at) < nameFor {
		return e.value
	}
	value, err := lookup(strconv.FormatUint(uint64(key.id), 10))
	if err != nil {
		value = ""
	}
	n.cache.Add(key, name{value, now})
	return value
}
