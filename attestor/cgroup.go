package attestor

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"countersign.io/countersign/identity"
)

// Place is where a process runs, as the kernel tells it. The zero Place is a plain process in no unit.
type Place struct {
	PodUID      string // as the API server writes it; empty: not in a pod
	ContainerID string // 64 hex digits; empty outside of pods, and where the runtime names no container
	Unit        string // of systemd, such as "nginx.service"; empty: none, or a pod
	TokenPath   string // where this pod's token is; empty: Config.TokenPath
}

const (
	// podUID is what the API server gives (RFC 9562), or the hash of its manifest that the kubelet gives to a
	// static pod.
	podUID      = `[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}`
	containerID = `[0-9a-f]{64}`
)

var (
	isPodUID = regexp.MustCompile(`^(?:` + podUID + `)$`)
	// cgroupfs driver: the ID alone, with CRI-O "crio-" before it; systemd driver: RUNTIME-ID.scope.
	// crio-conmon-ID.scope is CRI-O's monitor, which is not in the container.
	isContainer = regexp.MustCompile(`^(?:cri-containerd-|containerd-|crio-|docker-|libpod-)?(` + containerID + `)(?:\.scope)?$`)
	isUnit      = regexp.MustCompile(`^[a-zA-Z0-9:_.\\@-]+\.(?:service|scope)$`)
)

// parseCgroups reads a /proc/PID/cgroup (cgroups(7)): one line for each version 1 hierarchy and one for
// version 2, ID:CONTROLLERS:PATH.
//
// A process may be allowed to make cgroups below its own, and to name them as it likes, but never above. So
// in each path the outermost pod counts, a pod's cgroup whose UID cannot be read is an error and not passed
// over, and all hierarchies that name a pod must name the same pod and container. A plain process that
// imitates a pod gains nothing: it would have to show that pod's token.
func parseCgroups(data []byte) (Place, error) {
	var place Place
	refuse := func(format string, args ...any) (Place, error) {
		return Place{}, fmt.Errorf("%w: reading the caller's cgroups: "+format, append([]any{identity.ErrUnauthenticated}, args...)...)
	}
	lines, systemd := 0, false
	for line := range bytes.Lines(data) {
		parts := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			return refuse("line %q: want ID:CONTROLLERS:PATH", line)
		}
		lines++
		here, err := parseCgroupPath(parts[2])
		if err != nil {
			return refuse("%v", err)
		}
		switch {
		case here.PodUID == "":
		case place.PodUID == "":
			place.PodUID, place.ContainerID = here.PodUID, here.ContainerID
		case here.PodUID != place.PodUID || here.ContainerID != place.ContainerID:
			return refuse("two hierarchies contradict each other: pod %s container %q, and pod %s container %q",
				place.PodUID, place.ContainerID, here.PodUID, here.ContainerID)
		}
		// systemd's own hierarchy is name=systemd where there is one, else version 2. Where both are, a container
		// may be left in its runtime's unit on version 2.
		if parts[1] == "name=systemd" || parts[1] == "" && !systemd {
			place.Unit, systemd = here.Unit, parts[1] != ""
		}
	}
	if lines == 0 {
		return refuse("the file is empty")
	}
	if place.PodUID != "" {
		place.Unit = ""
	}
	return place, nil
}

// parseCgroupPath finds the outermost pod of one path, or else the outermost systemd unit. Seen from inside
// a private cgroup namespace, as an agent's own pod may have, a path starts with one "/.." for each level
// between that namespace's root and the nearest common ancestor.
func parseCgroupPath(path string) (Place, error) {
	names := strings.Split(strings.TrimPrefix(path, "/"), "/")
	outside := false
	for len(names) > 0 && names[0] == ".." {
		names, outside = names[1:], true
	}
	for i, name := range names {
		name, inner, joined := strings.Cut(name, ":") // SLICE:RUNTIME:CONTAINER, where the drivers do not agree
		uid, ok := podOf(name, names[:i])
		if !ok {
			continue
		}
		if !isPodUID.MatchString(uid) {
			return Place{}, fmt.Errorf("%q looks like a pod's cgroup, but %q is no pod UID", path, uid)
		}
		place := Place{PodUID: uid}
		if joined {
			_, inner, _ = strings.Cut(inner, ":")
		} else if i+1 < len(names) {
			inner = names[i+1]
		}
		if m := isContainer.FindStringSubmatch(inner); m != nil {
			place.ContainerID = m[1]
		}
		return place, nil
	}
	if outside && len(names) > 0 && isContainer.MatchString(names[0]) {
		return Place{}, fmt.Errorf("%q is a container beside the agent's own, and its pod cannot be seen from the agent's cgroup namespace: "+
			"run the agent in the host's, and workloads outside of its pod", path)
	}
	return Place{Unit: unitOf(names)}, nil
}

// podOf reports whether a cgroup is one that the kubelet makes for a pod, and what stands in it for the UID.
//
//	systemd driver:  [ROOT-]kubepods[-QOS]-podUID.slice, with _ for the - of the UID
//	cgroupfs driver: podUID, within kubepods, burstable or besteffort
//
// With the cgroupfs driver a private cgroup namespace can hide what a pod's cgroup is in, so there a
// well-formed name alone is enough.
func podOf(name string, outer []string) (uid string, ok bool) {
	if _, rest, found := strings.Cut(name, "kubepods"); found {
		if rest, found = strings.CutSuffix(rest, ".slice"); found {
			if _, uid, found = strings.Cut(rest, "-pod"); found {
				return strings.ReplaceAll(uid, "_", "-"), true
			}
		}
	}
	uid, ok = strings.CutPrefix(name, "pod")
	if !ok {
		return "", false
	}
	if isPodUID.MatchString(uid) {
		return uid, true
	}
	within := ""
	if len(outer) > 0 {
		within = outer[len(outer)-1]
	}
	return uid, within == "kubepods" || within == "burstable" || within == "besteffort"
}

// unitOf is the outermost service or scope: below it is the unit's own ground, where a user's systemd or the
// program itself may name cgroups as it likes.
func unitOf(names []string) string {
	for _, name := range names {
		if strings.HasSuffix(name, ".slice") {
			continue
		}
		// systemd puts _ before a unit's name that would clash with a file of the cgroup file system.
		if name = strings.TrimPrefix(name, "_"); isUnit.MatchString(name) {
			return name
		}
		return ""
	}
	return ""
}
