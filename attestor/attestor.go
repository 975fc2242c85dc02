// Package attestor turns what a caller is into evidence: the agent's half. (The members' half, which
// verifies evidence, is in attestor/kube and attestor/node.)
//
// A caller is a Peer: a process pinned by a pidfd first, and only then looked at through /proc, so that a
// reused PID is never mistaken for it. Where it runs is told by its cgroups. Two kinds of evidence follow:
//
//   - A process in a pod shows the pod's own service account token, bound to our audience, which the agent
//     reads inside the caller's root and never follows out of it. The token must be bound to the very pod
//     that the caller's cgroup names. A pod without a token has no identity; it is never taken for a plain
//     process. Whoever may run code in the pod, as any user, has the pod's identity.
//   - A plain process shows what the kernel says of it: unix:uid, unix:gid, unix:user, unix:group, unix:path,
//     and if configured unix:sha256 and systemd:unit. These are the agent's word and prove nothing to a
//     member that does not trust this agent for it.
//
// What unix:path and unix:sha256 do not say: that the program does what its author meant. A user who may run
// a program may also run it with a library of their own preloaded, trace it, or connect first, hand the
// connection on and execute the program then. So an entry should name the user (unix:uid) whose processes
// are all trusted, or the systemd unit, which an ordinary user cannot choose; path and hash narrow it
// down further. A path is only told when the agent's host has the caller's very file there: in a mount
// namespace of its own anyone can have anything as /usr/bin/x. The unit is taken from the cgroup path, which
// systemd alone lays out above a unit; systemd itself is not asked.
//
// After the evidence is collected the process is looked at again: if it has exited, or has executed another
// program, there is no evidence.
package attestor

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"path/filepath"
	"strconv"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"countersign.io/countersign/identity"
)

// Defaults of Config.
const (
	DefaultTokenPath    = "/var/run/secrets/countersign.io/token"
	DefaultMaxHashBytes = 256 << 20
	DefaultTimeout      = 10 * time.Second
)

// Config is what an Attestor needs. The zero Config is a good one.
type Config struct {
	// TokenPath is where pods have their token, absolute, inside their own root. Default: DefaultTokenPath.
	TokenPath string
	// SHA256 adds unix:sha256, the hash of the caller's executable. Each version of a file is read once, which
	// costs about a second of one processor per GiB.
	SHA256 bool
	// MaxHashBytes is the size above which an executable is not hashed. Default: DefaultMaxHashBytes.
	MaxHashBytes int64
	// Systemd adds systemd:unit to plain processes.
	Systemd bool
	// Timeout is how long one attestation may wait for file systems and user databases. Default: DefaultTimeout.
	Timeout time.Duration
	// Locate tells where a caller runs. Default: by its cgroups. Only a development agent that plays pods
	// without a kubelet, and tests, give another: whoever decides this decides which pod a caller is.
	Locate func(*Peer) (Place, error)
	// Now is the clock. Default: time.Now.
	Now func() time.Time
	// Log gets what keeps evidence incomplete. Default: nowhere.
	Log *slog.Logger
}

// Attestor collects evidence. Its methods may be called concurrently.
type Attestor struct {
	cfg    Config
	names  names
	hasher *hasher
	gate   gate
}

// Workload is one attested caller.
type Workload struct {
	// Key is a stable name of what was attested, of 64 hex digits: two callers with the same pod, container
	// and selectors have the same Key, in every run of the agent. It says nothing of tokens. Or that of a volume, see VolumeKey.
	Key         string
	PodUID      string // empty: a plain process
	ContainerID string // may be empty
	// Evidence belongs to whoever called Attest, who calls Wipe as soon as the token has been used.
	Evidence identity.Evidence
}

// Wipe zeroes the token and drops it. The rest of the Workload remains good.
func (w *Workload) Wipe() {
	clear(w.Evidence.Token)
	w.Evidence.Token = nil
}

// Func attests one caller, again each time it is called: a held connection and what to do with it. Whoever
// calls it owns the Workload, see Workload.Evidence.
type Func func(context.Context) (*Workload, error)

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Attestor, error) {
	if cfg.TokenPath == "" {
		cfg.TokenPath = DefaultTokenPath
	}
	if !filepath.IsAbs(cfg.TokenPath) {
		return nil, fmt.Errorf("%w: token path %q: want an absolute path, as pods see it", identity.ErrInvalid, cfg.TokenPath)
	}
	if cfg.MaxHashBytes == 0 {
		cfg.MaxHashBytes = DefaultMaxHashBytes
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.MaxHashBytes < 0 || cfg.Timeout < 0 {
		return nil, fmt.Errorf("%w: attestor: hash limit %d, timeout %v: want positive values", identity.ErrInvalid, cfg.MaxHashBytes, cfg.Timeout)
	}
	if cfg.Locate == nil {
		cfg.Locate = byCgroups
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	h, err := newHasher(cfg.MaxHashBytes, cfg.Now, cfg.Log)
	if err != nil {
		return nil, err
	}
	cache, err := lru.New[nameKey, name](1024)
	if err != nil {
		return nil, fmt.Errorf("making the cache of names: %w", err)
	}
	return &Attestor{cfg: cfg, names: names{now: cfg.Now, cache: cache}, hasher: h}, nil
}

// byCgroups reads where the caller's first thread is. One that is exiting, while others of the process live on, is at the
// root of all version 1 hierarchies (cgroups(7)): a pod's process could so pass for a plain one. The flag is
// read after the cgroups, and never taken back.
func byCgroups(p *Peer) (Place, error) {
	data, err := p.cgroups()
	if err != nil {
		return Place{}, err
	}
	gone, err := p.exiting()
	if err != nil {
		return Place{}, err
	}
	if gone {
		return Place{}, fmt.Errorf("process %d: its first thread is exiting: %w", p.pid, ErrPeerChanged)
	}
	return parseCgroups(data)
}

// Attest collects the evidence of one caller. The caller of Attest owns it and calls Wipe.
//
// Errors: ErrPeerChanged when the process has exited or executed another program, at any time before Attest
// returns; identity.ErrDenied when a pod has no token; identity.ErrUnauthenticated when the evidence
// contradicts itself (a token of another pod, a device in the token's place, cgroups that disagree);
// identity.ErrUnavailable when trying again is right, or the agent lacks privileges.
func (a *Attestor) Attest(ctx context.Context, p *Peer) (*Workload, error) {
	w, err := a.collect(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("attesting process %d of user %d: %w", p.pid, p.uid, err)
	}
	// Everything above was read of one process in one state only if this holds.
	if err := p.Unchanged(); err != nil {
		w.Wipe()
		return nil, fmt.Errorf("attesting process %d of user %d: %w", p.pid, p.uid, err)
	}
	return w, nil
}

func (a *Attestor) collect(ctx context.Context, p *Peer) (*Workload, error) {
	if err := p.Unchanged(); err != nil {
		return nil, err
	}
	place, err := a.cfg.Locate(p)
	if err != nil {
		return nil, err
	}
	path, err := p.exePath()
	if err != nil {
		return nil, err
	}
	seen, err := a.inspect(ctx, p, place, path)
	if err != nil {
		return nil, err
	}
	w := &Workload{PodUID: place.PodUID, ContainerID: place.ContainerID}
	w.Evidence.Token = seen.token
	if place.PodUID != "" {
		uid, err := tokenPodUID(seen.token)
		if err == nil && uid != place.PodUID {
			err = fmt.Errorf("%w: the caller is in pod %s, but the token in its root is of pod %q", identity.ErrUnauthenticated, place.PodUID, uid)
		}
		if err != nil {
			w.Wipe()
			return nil, err
		}
	}
	w.Evidence.Selectors = a.selectors(p, place, path, seen)
	w.Key = workloadKey(w)
	return w, nil
}

// selectors are the agent's own words. In a pod, names of users and units would be the host's for things of
// the pod, so they are left out; its path is that of the pod's own image.
func (a *Attestor) selectors(p *Peer, place Place, path string, s sight) []identity.Selector {
	var out []identity.Selector
	add := func(name, value string) {
		if value == "" {
			return
		}
		sel, err := identity.ParseSelector(name + ":" + value)
		if err != nil {
			a.cfg.Log.Debug("what was seen of a process makes no selector", "selector", name, "pid", p.pid, "error", err)
			return
		}
		out = append(out, sel)
	}
	add("unix:uid", strconv.FormatUint(uint64(p.uid), 10))
	add("unix:gid", strconv.FormatUint(uint64(p.gid), 10))
	add("unix:user", s.user)
	add("unix:group", s.group)
	add("unix:sha256", s.sha256)
	if place.PodUID != "" || s.onHost {
		add("unix:path", path)
	} else {
		a.cfg.Log.Debug("the host has another file at the path of a process's executable: no unix:path selector", "pid", p.pid, "path", path)
	}
	if a.cfg.Systemd && place.PodUID == "" {
		add("systemd:unit", place.Unit)
	}
	return identity.SortSelectors(out)
}

// workloadKey hashes each part with its length before it, so that parts cannot be shifted into each other.
func workloadKey(w *Workload) string {
	h := sha256.New()
	part := func(s string) {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(s))))
		h.Write([]byte(s))
	}
	part("countersign workload 1")
	part(w.PodUID)
	part(w.ContainerID)
	for _, s := range w.Evidence.Selectors {
		part(string(s))
	}
	return hex.EncodeToString(h.Sum(nil))
}
