package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"

	memberv1 "countersign.io/countersign/api/member/v1"
	"countersign.io/countersign/attestor/kube"
	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// memberService admits members.
type memberService struct {
	memberv1.UnimplementedMemberServer
	*Server
}

// Join spends a server token, or takes the token of a pod of the members' own StatefulSet, and answers with all that a member
// needs to take part: the keyring, which opens the
// sealed authorities, and those. The caller is nobody but the one who has the secret: the token is as good as the
// trust domain, until it is used or expires; a pod's token, until a member of its name has a vote or its pod is gone.
func (s memberService) Join(ctx context.Context, req *memberv1.JoinRequest) (*memberv1.JoinResponse, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	if req.PodToken != "" && req.Secret != "" {
		return nil, fmt.Errorf("%w: both a join token's secret and a pod's token: give one", identity.ErrInvalid)
	}
	if req.PodToken == "" {
		if err := node.CheckSecret(req.Secret); err != nil {
			return nil, err
		}
	}
	if _, err := identity.MemberID(s.cfg.TrustDomain, req.Id); err != nil {
		return nil, fmt.Errorf("%w: member name %q: it is part of a SPIFFE ID: %v", identity.ErrInvalid, req.Id, err)
	}
	if err := checkAddress(req.Address); err != nil {
		return nil, err
	}
	if len(req.Version) > maxVersion {
		return nil, fmt.Errorf("%w: a version of %d bytes: at the most %d", identity.ErrInvalid, len(req.Version), maxVersion)
	}
	pod, err := s.admit(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("admitting member %q: %w", req.Id, err)
	}
	if err := s.cfg.Writes.PutMember(ctx, identity.Member{ID: req.Id, Address: req.Address}); err != nil {
		s.cfg.Log.Warn("cannot tell the agents of a new member yet: the leader will", "member", req.Id, "error", err)
	}
	// Before the keyring is handed out.
	if err := s.audit(ctx, joinEvent(req, pod, audit.OK)); err != nil {
		return nil, err
	}
	authorities, err := json.Marshal(s.cfg.State.Authorities())
	if err != nil {
		return nil, fmt.Errorf("encoding the authorities: %w", err)
	}
	keyring, err := s.cfg.Keyring()
	if err != nil {
		return nil, fmt.Errorf("reading the keyring: %w", err)
	}
	wipeAfter(ctx, keyring)
	resp := &memberv1.JoinResponse{TrustDomain: s.cfg.TrustDomain.Name(), Keyring: keyring, Authorities: authorities}
	for _, m := range s.cfg.State.Members() {
		resp.Members = append(resp.Members, &memberv1.Peer{Id: m.ID, Address: m.Address})
	}
	s.cfg.Log.Info("member joins", "member", req.Id, "address", req.Address, "version", req.Version)
	return resp, nil
}

// admit checks the token, adds the member, and only then spends the token, so that a change of leader in the middle costs no
// token: until then the newcomer has nothing, and a member without the keyring is nobody. A member that is added and has no
// token left is one without a vote that never comes up, and goes again. pod is the one whose token was shown, if one was.
func (s *Server) admit(ctx context.Context, req *memberv1.JoinRequest) (pod *kube.Claims, err error) {
	// The token may have been made, or used, at another member a moment ago.
	if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
		return nil, err
	}
	hash := node.HashSecret(req.Secret)
	use := func() error {
		_, err := s.cfg.Writes.UseJoinToken(ctx, s.cfg.Now(), hash, identity.JoinServer)
		return err
	}
	spent := false
	if req.PodToken != "" {
		if pod, err = s.verifyPod(ctx, []byte(req.PodToken), req.Id); err != nil {
			return nil, err
		}
		spent = true // nothing is: it is good for this one name, until that one has a vote
	} else if t, ok := s.cfg.State.JoinToken(hash); !ok {
		return nil, errNoToken
	} else if t.Purpose != identity.JoinServer || !t.UsedAt.IsZero() || !s.cfg.Now().Before(t.ExpiresAt) {
		if err := use(); err != nil { // which says what is wrong with it
			return nil, err
		}
		spent = true
	}
	if err := s.checkLevel(req); err != nil {
		return nil, err
	}
	// Only now: strangers are not told the members' names. One that has a vote has promised things that a newcomer with an
	// empty log does not know of, so it cannot be the same member again. Without a vote it never came up: let it try again.
	there := false
	for _, m := range s.cfg.Cluster.Members() {
		if m.ID == req.Id && (m.Voter || m.Address != req.Address) && pod != nil {
			return nil, fmt.Errorf("%w: there is one at %s, and this pod's volume is blank: if that one's volume is lost for good, remove it (countersign cluster remove %s), and the pod joins by itself; if it is not, give the pod its volume back", identity.ErrExists, m.Address, req.Id)
		}
		if m.ID == req.Id && (m.Voter || m.Address != req.Address) {
			return nil, fmt.Errorf("%w: there is one at %s: choose another name, or remove that one first (countersign cluster remove)", identity.ErrExists, m.Address)
		}
		there = there || m.ID == req.Id
	}
	if err := s.audit(ctx, joinEvent(req, pod, audit.Attempted)); err != nil {
		return nil, err
	}
	if err := s.cfg.Cluster.AddMember(ctx, req.Id, req.Address); err != nil {
		return nil, fmt.Errorf("%w; try again with the same token", err)
	}
	if !spent {
		err = use()
	}
	if err == nil { // the level may have been raised since: see raiseLevel
		err = s.checkLevel(req)
	}
	// Lost the race for the token, that is: what has an unknown outcome may have been decided for us.
	if err != nil && !there && !errors.Is(err, identity.ErrUnavailable) && ctx.Err() == nil {
		if rerr := s.cfg.Cluster.RemoveMember(ctx, req.Id); rerr != nil {
			s.cfg.Log.Warn("cannot take back the admission of a member: remove it with countersign cluster remove", "member", req.Id, "error", rerr)
		}
	}
	return pod, err
}

// errNoToken is said without a write: strangers could have as many as they like.
var errNoToken = fmt.Errorf("%w: no such join token: it was not made here, or it expired long ago; make another one", identity.ErrUnauthenticated)

func joinEvent(req *memberv1.JoinRequest, pod *kube.Claims, outcome audit.Outcome) audit.Event {
	e := audit.Event{
		Action: audit.JoinMember, Outcome: outcome, Subjects: []string{req.Id},
		Details: audit.Details{{Key: "address", Value: req.Address}, {Key: "version", Value: infoText(req.Version)}},
	}
	if pod != nil {
		e.Details = append(e.Details, audit.Detail{Key: "pod", Value: pod.Namespace + "/" + pod.PodName}, audit.Detail{Key: "pod_uid", Value: pod.PodUID},
			audit.Detail{Key: "account", Value: pod.ServiceAccount}, audit.Detail{Key: "kube_node", Value: pod.Cluster + "/" + pod.NodeName})
	}
	return e
}

// checkLevel refuses a version that could not read the log.
func (s *Server) checkLevel(req *memberv1.JoinRequest) error {
	if level := s.cfg.State.Level(); max(req.Level, 1) < level {
		return fmt.Errorf("%w: the cluster is at level %d, and version %q of the new member knows level %d: install the version that the members run (%s) and start it again",
			identity.ErrPrecondition, level, infoText(req.Version), max(req.Level, 1), s.cfg.Version)
	}
	return nil
}

func checkAddress(a string) error {
	host, port, err := net.SplitHostPort(a)
	if err != nil || host == "" || port == "" || port == "0" || len(a) > 261 {
		return fmt.Errorf("%w: address %q: want host:port by which the other members and the agents reach it", identity.ErrInvalid, a)
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return fmt.Errorf("%w: address %q is unspecified: others cannot reach it; name one", identity.ErrInvalid, a)
	}
	return nil
}
