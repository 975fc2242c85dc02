package runagent

import (
	"log/slog"

	"countersign.io/countersign/agent"
	"countersign.io/countersign/cmd/internal/metrics"
	"countersign.io/countersign/workloadapi/csi"
)

func metricsTable() []metrics.Def {
	kinds := []metrics.Label{{Name: "kind", Values: []string{"x509", "jwt"}}}
	return []metrics.Def{
		{Name: "countersign_agent_ready", Help: "1 if new SVIDs can be had; live ones are served all the same."},
		{Name: "countersign_agent_connected", Help: "1 if a member is connected."},
		{Name: "countersign_agent_last_contact_timestamp_seconds", Help: "When a member was last connected: now, if one is. Absent if none was since the start."},
		{Name: "countersign_agent_own_svid_not_after_timestamp_seconds", Help: "When the agent's own SVID ends. Absent until it has one."},
		{Name: "countersign_agent_bundle_sequence", Help: "Sequence number of the trust bundle that the agent has."},
		{Name: "countersign_agent_workloads", Help: "Workloads that the agent holds an X.509-SVID for."},
		{Name: "countersign_agent_svids", Help: "X.509-SVIDs that the agent holds for workloads."},
		{Name: "countersign_agent_streams", Help: "Open streams of workloads on the Workload API."},
		{Name: "countersign_agent_svid_earliest_not_after_timestamp_seconds", Help: "When the first of the workloads' X.509-SVIDs ends. Absent if there are none."},
		{Name: "countersign_agent_svids_issued_total", Help: "SVIDs that members issued for workloads of this agent since it started.", Labels: kinds},
		{Name: "countersign_agent_renewals_total", Help: "Workloads' X.509-SVIDs that were replaced by newer ones."},
		{Name: "countersign_agent_renewal_failures_total", Help: "Times that no member renewed a workload's X.509-SVID; it is tried again until the SVID ends."},
		{Name: "countersign_agent_issue_failures_total", Help: "Questions for a workload without an SVID that no member answered."},
		{Name: "countersign_agent_denials_total", Help: "Questions for a workload to which a member said no."},
		{Name: "countersign_agent_csi_ready", Help: "1 if the kubelet has taken the CSI driver. Absent without the driver."},
		{Name: "countersign_agent_csi_volumes", Help: "Volumes that the CSI driver has mounted. Absent without the driver."},
	}
}

// newMetrics tells of the agent and, if there is one, of the CSI driver.
func newMetrics(version string, a *agent.Agent, driver *csi.Driver, ready func() error, log *slog.Logger) (*metrics.Metrics, error) {
	return metrics.New(version, metricsTable(), func(set metrics.Sink) {
		s := a.Status()
		set("countersign_agent_ready", metrics.Bool(ready() == nil))
		set("countersign_agent_connected", metrics.Bool(s.Member != ""))
		set.Time("countersign_agent_last_contact_timestamp_seconds", s.LastContact)
		set.Time("countersign_agent_own_svid_not_after_timestamp_seconds", s.ExpiresAt)
		set("countersign_agent_bundle_sequence", float64(s.BundleSequence))
		set("countersign_agent_workloads", float64(s.Workloads))
		set("countersign_agent_svids", float64(s.SVIDs))
		set("countersign_agent_streams", float64(s.Streams))
		set.Time("countersign_agent_svid_earliest_not_after_timestamp_seconds", s.FirstExpiry)
		set("countersign_agent_svids_issued_total", float64(s.X509Issued), "x509")
		set("countersign_agent_svids_issued_total", float64(s.JWTIssued), "jwt")
		set("countersign_agent_renewals_total", float64(s.Renewed))
		set("countersign_agent_renewal_failures_total", float64(s.RenewalFailed))
		set("countersign_agent_issue_failures_total", float64(s.Failed))
		set("countersign_agent_denials_total", float64(s.Denied))
		if driver != nil {
			set("countersign_agent_csi_ready", metrics.Bool(driver.Ready() == nil))
			set("countersign_agent_csi_volumes", float64(driver.Volumes()))
		}
	}, log)
}
