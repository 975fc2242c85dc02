package server

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"

	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/identity"
)

const (
	// maxPodSessions bounds the streams of pods without an agent, of this member: each is a connection.
	maxPodSessions = 8192
	// maxPodWatches is more than the one workload that a pod is, for it may have been known by an earlier token.
	maxPodWatches = 4
	// followTime bounds a stream: then the token is shown again, which a pod that is gone cannot.
	followTime = 2 * time.Minute
	// podIDPrefix begins the name of such a pod's sessions. No agent's is like it: that is a SPIFFE ID.
	podIDPrefix = "pod:"
)

var (
	errTooManyPods  = fmt.Errorf("%w: this member serves %d pods without an agent already: use another", identity.ErrUnavailable, maxPodSessions)
	errTooManyOfPod = fmt.Errorf("%w: a pod follows at the most %d workloads: its own", identity.ErrExhausted, maxPodWatches)
)

func isPodID(id string) bool { return strings.HasPrefix(id, podIDPrefix) }

// podID names the sessions of the pod with these selectors, so that a member can tell later whether it is still served.
func podID(sel []identity.Selector) string {
	var cluster, node, uid string
	for _, x := range sel {
		for prefix, to := range map[string]*string{"k8s:cluster:": &cluster, "k8s:node-name:": &node, "k8s:pod-uid:": &uid} {
			if v, ok := strings.CutPrefix(string(x), prefix); ok {
				*to = v
			}
		}
	}
	return podIDPrefix + cluster + "/" + node + "/" + uid
}

// podRefused says why a pod without an agent is served no longer.
func (s *Server) podRefused(id string) error {
	parts := strings.Split(strings.TrimPrefix(id, podIDPrefix), "/")
	if len(parts) != 3 {
		return fmt.Errorf("%w: %q names no pod", identity.ErrDenied, id)
	}
	if _, ok := s.cfg.State.KubeCluster(parts[0]); !ok {
		return fmt.Errorf("%w: kube cluster %q is not registered", identity.ErrDenied, parts[0])
	}
	if s.cfg.State.NodeBanned(parts[0], parts[1]) {
		return fmt.Errorf("%w: the agent of node %q of kube cluster %q is banned, and so are the node's pods without an agent", identity.ErrDenied, parts[1], parts[0])
	}
	return nil
}

// Follow is the one stream of a pod that has no agent (a sidecar): it is told what agents are told, of itself alone. It ends with what ends an
// agent's, with the ban of its node's agent and the removal of its kube cluster, and after two minutes at the most: then the pod shows
// its token again.
func (s nodeService) Follow(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse]) error {
	who := callOf(stream.Context())
	hello, err := s.hello(stream, "Follow")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(stream.Context(), attestTime)
	defer cancel()
	sel, err := s.prove(ctx, who, &workloadv1.Evidence{Token: hello.Token})
	if err != nil {
		return err
	}
	sess := newSession(podID(sel), hello.Version)
	sess.proven = identity.WithoutFacts(sel)
	if sess, err = s.hub.take(sess); err != nil {
		return err
	}
	defer s.hub.remove(sess)
	// Asked once more now that the hub knows the session: a ban between the two would have ended nothing.
	if err := s.podRefused(sess.agentID); err != nil {
		return err
	}
	if who.proven != nil {
		who.proven() // it has proved who it is: strangers must not cost it its connection, nor it them theirs
	}
	s.cfg.Log.Debug("a pod without an agent follows", "pod", sess.agentID, "version", hello.Version, "address", who.addr)
	return s.converse(stream, sess, followTime, fmt.Errorf("%w: show the pod's token again", identity.ErrUnavailable))
}
