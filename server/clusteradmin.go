package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"countersign.io/countersign/api"
	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/identity"
)

const (
	// maxLag is how many log entries a member may be behind without anybody having to look after it.
	maxLag = 2048
	// maxSilence is how long a healthy member has not heard from the leader at the most; elections take a second or two.
	maxSilence = 10 * time.Second
	// minDisk is what a member's disk must have free: a log and a snapshot of a large cluster's need that.
	minDisk = 128 << 20
)

// ClusterStatus asks every member how it stands. It answers without a leader too: then it says so.
func (s adminService) ClusterStatus(ctx context.Context, _ *adminv1.Empty) (*adminv1.ClusterStatusResponse, error) {
	all, err := s.cfg.Cluster.Health(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking the members: %w", err)
	}
	resp := &adminv1.ClusterStatusResponse{
		TrustDomain: s.cfg.TrustDomain.Name(), Level: s.cfg.State.Level(), FailureTolerance: uint32(tolerance(all)), Healthy: len(all) > 0,
	}
	agreed := agreedIndex(all)
	for _, h := range all {
		info, err := ParseMemberInfo(h.Info)
		if err != nil {
			s.cfg.Log.Warn("a member tells nonsense of itself", "member", h.ID, "error", err)
		}
		m := &adminv1.ClusterStatusResponse_Member{
			Id: h.ID, Address: h.Address, Voter: h.Voter, Leader: h.Leader, AppliedIndex: h.Applied, Lag: agreed - min(agreed, h.Applied),
			Version: info.Version, DiskFree: info.DiskFree, DiskTotal: info.DiskTotal,
			Issuing: info.Issuing, NotIssuingBecause: info.NotIssuingBecause, StartedAt: api.TimeToWire(info.StartedAt),
		}
		if h.Reachable {
			m.Level = info.Level
		} else {
			m.Lag = 0 // not known
		}
		if h.Reachable && len(h.Info) > 0 { // an older version does not say
			m.LastContact = durationpb.New(h.LastContact)
		}
		m.UnhealthyBecause = unhealthy(h, info, m.Lag)
		m.Healthy = m.UnhealthyBecause == ""
		resp.Healthy = resp.Healthy && m.Healthy
		if h.Leader {
			resp.LeaderId = h.ID
		}
		resp.Members = append(resp.Members, m)
	}
	resp.Healthy = resp.Healthy && resp.LeaderId != ""
	return resp, nil
}

// agreedIndex is how far the log is agreed on: the leader knows; without one, whoever knows most.
func agreedIndex(all []MemberHealth) uint64 {
	var most uint64
	for _, h := range all {
		if h.Leader && h.Commit > 0 {
			return h.Commit
		}
		most = max(most, h.Commit)
	}
	return most
}

// unhealthy says in words why somebody should look after the member; empty if nobody need.
func unhealthy(h MemberHealth, info MemberInfo, lag uint64) string {
	known := len(h.Info) > 0
	switch {
	case !h.Reachable && h.Problem == "":
		return "it cannot be reached"
	case !h.Reachable:
		return "it cannot be reached: " + infoText(h.Problem)
	case h.Problem != "":
		return infoText(h.Problem)
	case known && !info.Issuing:
		return "it does not issue: " + info.NotIssuingBecause
	case known && !h.Leader && h.LastContact > maxSilence:
		return fmt.Sprintf("it has not heard from a leader for %v", h.LastContact.Round(time.Second))
	case lag > maxLag:
		return fmt.Sprintf("it is %d log entries behind", lag)
	case !h.Voter:
		return "it has no vote yet: it gets one once it has caught up and is stable"
	case info.DiskTotal > 0 && info.DiskFree < minDisk:
		return fmt.Sprintf("its disk has %d MiB free, less than %d", info.DiskFree>>20, minDisk>>20)
	}
	return ""
}

// tolerance is how many of the voters that are up may fail while there is a leader still.
func tolerance(all []MemberHealth) int {
	voters, up := 0, 0
	for _, h := range all {
		if h.Voter {
			voters++
			if h.Reachable {
				up++
			}
		}
	}
	return max(0, up-quorum(voters))
}

func quorum(voters int) int { return voters/2 + 1 }

// RemoveMember takes a member out of the cluster for good.
func (s adminService) RemoveMember(ctx context.Context, req *adminv1.NameRequest) (*adminv1.Empty, error) {
	// Who decides knows the latest membership, and there is somebody to decide.
	if err := s.cfg.Cluster.ReadBarrier(ctx); err != nil {
		return nil, fmt.Errorf("removing member %q: %w", req.Name, err)
	}
	all, err := s.cfg.Cluster.Health(ctx)
	if err != nil {
		return nil, fmt.Errorf("removing member %q: asking the members: %w", req.Name, err)
	}
	target, err := mayRemove(all, req.Name)
	if err != nil {
		return nil, fmt.Errorf("removing member %q: %w", req.Name, err)
	}
	if target.Leader { // in order, and not by an election
		if err := s.cfg.Cluster.TransferLeader(ctx, ""); err != nil {
			return nil, fmt.Errorf("removing member %q: it leads, and handing that over failed: %w", req.Name, err)
		}
	}
	// The list that agents learn from comes second, so that a removal that is refused changes nothing; what a crash
	// leaves in between, the leader sweeps up. But a member that removes itself hears of nothing afterwards.
	self := target.ID == s.cfg.MemberID
	if self {
		if err := s.forgetMember(ctx, target.ID); err != nil {
			return nil, fmt.Errorf("removing member %q: %w", req.Name, err)
		}
	}
	if err := s.cfg.Cluster.RemoveMember(ctx, target.ID); err != nil {
		return nil, fmt.Errorf("removing member %q: %w", req.Name, err)
	}
	if !self {
		if err := s.forgetMember(ctx, target.ID); err != nil {
			s.cfg.Log.Warn("cannot tell the agents that a member is gone: the leader will", "member", target.ID, "error", err)
		}
	}
	s.cfg.Log.Info("member removed", "member", target.ID, "address", target.Address)
	return &adminv1.Empty{}, nil
}

func (s *Server) forgetMember(ctx context.Context, id string) error {
	// What it signed for others than agents it alone knows: this member says from now on that it is not known.
	if err := s.issued.lose(s.cfg.Now()); err != nil {
		return fmt.Errorf("keeping that nobody knows what it signed: %w", err)
	}
	if err := s.cfg.Writes.RemoveMember(ctx, id); err != nil && !errors.Is(err, identity.ErrNotFound) {
		return err
	}
	return nil
}

// mayRemove says whether a member can be spared right now.
func mayRemove(all []MemberHealth, id string) (*MemberHealth, error) {
	i := slices.IndexFunc(all, func(h MemberHealth) bool { return h.ID == id })
	if i < 0 {
		return nil, fmt.Errorf("%w: the members are %s", identity.ErrNotFound, memberNames(all))
	}
	if !all[i].Voter {
		return &all[i], nil
	}
	var rest []MemberHealth
	for _, h := range all {
		if h.Voter && h.ID != id {
			rest = append(rest, h)
		}
	}
	if len(rest) == 0 {
		return nil, fmt.Errorf("%w: it is the last member with a vote: let another join first", identity.ErrPrecondition)
	}
	up, why := 0, []string(nil)
	for _, h := range rest {
		if h.Reachable {
			up++
		} else {
			why = append(why, h.ID)
		}
	}
	if need := quorum(len(rest)); up < need {
		return nil, fmt.Errorf("%w: of the %d members that would be left, %d must be up to decide anything, and %d are (%s cannot be reached): bring up or remove those first, or if they are lost for good see countersign cluster recover",
			identity.ErrPrecondition, len(rest), need, up, strings.Join(why, ", "))
	}
	return &all[i], nil
}

func memberNames(all []MemberHealth) string {
	names := make([]string, len(all))
	for i, h := range all {
		names[i] = h.ID
	}
	return strings.Join(names, ", ")
}

// TransferLeader lets another member lead: the named one, or whoever is most up to date.
func (s adminService) TransferLeader(ctx context.Context, req *adminv1.NameRequest) (*adminv1.Empty, error) {
	members := s.cfg.Cluster.Members()
	if req.Name != "" {
		i := slices.IndexFunc(members, func(m MemberStatus) bool { return m.ID == req.Name })
		switch {
		case i < 0:
			names := make([]string, len(members))
			for i, m := range members {
				names[i] = m.ID
			}
			return nil, fmt.Errorf("%w: member %q: the members are %s", identity.ErrNotFound, req.Name, strings.Join(names, ", "))
		case !members[i].Voter:
			return nil, fmt.Errorf("%w: member %q has no vote yet: it cannot lead", identity.ErrPrecondition, req.Name)
		case members[i].Leader:
			return &adminv1.Empty{}, nil
		}
	} else if others := slices.DeleteFunc(slices.Clone(members), func(m MemberStatus) bool { return !m.Voter || m.Leader }); len(others) == 0 {
		return nil, fmt.Errorf("%w: there is no other member with a vote", identity.ErrPrecondition)
	}
	if err := s.cfg.Cluster.TransferLeader(ctx, req.Name); err != nil {
		return nil, fmt.Errorf("handing over leadership: %w", err)
	}
	s.cfg.Log.Info("leadership handed over", "to", req.Name)
	return &adminv1.Empty{}, nil
}
