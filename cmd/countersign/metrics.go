package main

import (
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/cmd/internal/metrics"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/raft"
)

func metricsTable() []metrics.Def {
	authority := []metrics.Label{
		{Name: "kind", Values: []string{string(identity.AuthorityX509), string(identity.AuthorityJWT)}},
		{Name: "state", Values: []string{string(identity.AuthorityPrepared), string(identity.AuthorityActive), string(identity.AuthorityRetiring), string(identity.AuthorityTainted), string(identity.AuthorityRevoked)}},
	}
	var all []string
	for c := codes.OK + 1; c <= codes.Unauthenticated; c++ {
		all = append(all, c.String())
	}
	one := func(name string, values ...string) []metrics.Label {
		return []metrics.Label{{Name: name, Values: values}}
	}
	return []metrics.Def{
		{Name: "countersign_ready", Help: "1 if this member can issue now."},
		{Name: "countersign_degraded", Help: "Things that do not keep this member from issuing and that somebody should look after: countersign status names them."},
		{Name: "countersign_leader", Help: "1 on the member that leads."},
		{Name: "countersign_leader_known", Help: "1 if this member knows one that leads."},
		{Name: "countersign_leader_last_contact_seconds", Help: "How long ago this member heard from the leader; 0 on the leader. Absent if it has not since it started."},
		{Name: "countersign_applied_index", Help: "Last entry of the replicated log that this member has applied."},
		{Name: "countersign_members", Help: "Members as this one knows them.", Labels: one("role", "voter", "non_voter")},
		{Name: "countersign_entries", Help: "Entries."},
		{Name: "countersign_agents", Help: "Agents on record.", Labels: one("state", "admitted", "banned")},
		{Name: "countersign_agents_connected", Help: "Agents and clusters below that are connected to this member."},
		{Name: "countersign_authorities", Help: "Authorities by kind and state.", Labels: authority},
		{Name: "countersign_authority_not_after_timestamp_seconds", Help: "When the first authority of the kind and state ends.", Labels: authority},
		{Name: "countersign_bundle_sequence", Help: "Sequence number of the trust bundle."},
		{Name: "countersign_own_svid_not_after_timestamp_seconds", Help: "When this member's own SVID ends."},
		{Name: "countersign_issued_total", Help: "What this member recorded as issued since it started: SVIDs of workloads by kind, of agents, and authorities of clusters below.", Labels: one("kind", "x509", "jwt", "agent", "downstream")},
		{Name: "countersign_refused_total", Help: "Questions that this member refused or could not answer since it started, by gRPC code; those of strangers too.", Labels: one("code", all...)},
		{Name: "countersign_attestations_total", Help: "Nodes that tried to prove themselves to this member since it started.", Labels: append(one("kind", node.KindJoin, node.KindKube, node.KindX509Pop), one("outcome", "accepted", "refused")...)},
		{Name: "countersign_audit_events_total", Help: "Events that are durable in this member's audit log, since it started.", Labels: one("outcome", outcomes()...)},
		{Name: "countersign_audit_failures_total", Help: "Writes of the audit log that failed, since this member started."},
		{Name: "countersign_audit_waiting", Help: "Calls whose records wait to be written."},
		{Name: "countersign_audit_write_seconds", Help: "How long the write under way has taken; 0 if there is none."},
		{Name: "countersign_kube_clusters", Help: "Registered kube clusters."},
		{Name: "countersign_kube_cluster_faults", Help: "Registered kube clusters with a fault: tokens (none can be verified), keys (not fetched the last time), api (not asked or watched the last time).", Labels: one("part", "tokens", "keys", "api")},
		{Name: "countersign_kube_pods", Help: "Pods that are known to exist, of kube clusters whose pods are watched."},
		{Name: "countersign_backup_newest_timestamp_seconds", Help: "When the newest scheduled backup of this member was made. Absent if there is none."},
		{Name: "countersign_disk_free_bytes", Help: "Free on the file system of data_dir."},
		{Name: "countersign_disk_size_bytes", Help: "Size of the file system of data_dir."},
	}
}

func outcomes() []string {
	return []string{string(audit.Attempted), string(audit.OK), string(audit.Refused), string(audit.Failed)}
}

// metrics reads what is there already: a scrape asks no other member and no API server.
func (m *member) metrics() (*metrics.Metrics, error) {
	return metrics.New(version, metricsTable(), func(set metrics.Sink) {
		set("countersign_ready", metrics.Bool(m.ready() == nil))
		var fs unix.Statfs_t
		if unix.Statfs(m.c.DataDir, &fs) == nil {
			set("countersign_disk_free_bytes", float64(fs.Bavail)*float64(fs.Bsize))
			set("countersign_disk_size_bytes", float64(fs.Blocks)*float64(fs.Bsize))
		}
		if m.serving.Load() == nil {
			return // the rest is being made
		}
		m.tellCluster(set)
		m.tellState(set)
		m.tellDecisions(set)
		m.tellKube(set)
	}, m.log)
}

func (m *member) tellCluster(set metrics.Sink) {
	leader, _ := m.node.Leader()
	set("countersign_leader", metrics.Bool(m.node.IsLeader()))
	set("countersign_leader_known", metrics.Bool(leader != ""))
	if since := m.node.Staleness(); since < raft.Never {
		set("countersign_leader_last_contact_seconds", since.Seconds())
	}
	set("countersign_applied_index", float64(m.node.AppliedIndex()))
	voters, others := 0, 0
	for _, x := range m.node.Members() {
		if x.Voter {
			voters++
		} else {
			others++
		}
	}
	set("countersign_members", float64(voters), "voter")
	set("countersign_members", float64(others), "non_voter")
}

func (m *member) tellState(set metrics.Sink) {
	n := m.store.Counts()
	set("countersign_entries", float64(n.Entries))
	set("countersign_agents", float64(n.Agents-n.Banned), "admitted")
	set("countersign_agents", float64(n.Banned), "banned")
	type group struct{ kind, state string }
	count, first := map[group]int{}, map[group]time.Time{}
	for _, a := range m.store.Authorities() {
		g := group{string(a.Kind), string(a.State)}
		count[g]++
		if at := first[g]; at.IsZero() || a.NotAfter.Before(at) {
			first[g] = a.NotAfter
		}
	}
	for g, n := range count {
		set("countersign_authorities", float64(n), g.kind, g.state)
		set.Time("countersign_authority_not_after_timestamp_seconds", first[g], g.kind, g.state)
	}
	if b := m.store.Bundle(); b != nil {
		set("countersign_bundle_sequence", float64(b.Sequence))
	}
	if own, err := m.ca.MemberCertificate(); err == nil && own.Leaf != nil {
		set.Time("countersign_own_svid_not_after_timestamp_seconds", own.Leaf.NotAfter)
	}
	if m.backups != nil {
		_, newest := m.backups.Newest()
		set.Time("countersign_backup_newest_timestamp_seconds", newest)
	}
}

func (m *member) tellDecisions(set metrics.Sink) {
	set("countersign_degraded", float64(len(m.server.Degraded())))
	s := m.server.Stats()
	set("countersign_agents_connected", float64(s.Agents))
	for code, n := range s.Refused {
		set("countersign_refused_total", float64(n), code.String())
	}
	for kind, n := range s.Attestations {
		set("countersign_attestations_total", float64(n.Accepted), kind, "accepted")
		set("countersign_attestations_total", float64(n.Refused), kind, "refused")
	}
	log := m.audit.Stats()
	issued := func(kind string, actions ...audit.Action) {
		n := uint64(0)
		for _, a := range actions {
			n += log.Events[audit.Count{Action: a, Outcome: audit.OK}]
		}
		set("countersign_issued_total", float64(n), kind)
	}
	issued("x509", audit.IssueX509, audit.MintX509)
	issued("agent", audit.AttestNode, audit.RenewAgent)
	issued("jwt", audit.IssueJWT, audit.MintJWT)
	issued("downstream", audit.IssueDownstream)
	events := map[string]uint64{}
	for c, n := range log.Events {
		events[string(c.Outcome)] += n
	}
	for _, o := range outcomes() {
		set("countersign_audit_events_total", float64(events[o]), o)
	}
	set("countersign_audit_failures_total", float64(log.Failures))
	set("countersign_audit_waiting", float64(log.Waiting))
	set("countersign_audit_write_seconds", log.Writing.Seconds())
}

func (m *member) tellKube(set metrics.Sink) {
	all := m.pods.Status()
	faults := map[string]int{}
	pods := 0
	for _, s := range all {
		for part, err := range map[string]error{"tokens": s.Fault, "keys": s.JWKSFault, "api": s.APIFault} {
			if err != nil {
				faults[part]++
			}
		}
		pods += s.Pods
	}
	set("countersign_kube_clusters", float64(len(all)))
	for _, part := range []string{"tokens", "keys", "api"} {
		set("countersign_kube_cluster_faults", float64(faults[part]), part)
	}
	set("countersign_kube_pods", float64(pods))
}
