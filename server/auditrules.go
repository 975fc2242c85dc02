package server

import (
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	downstreamv1 "countersign.io/countersign/api/downstream/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"
	"countersign.io/countersign/audit"
	"countersign.io/countersign/identity"
)

// auditMode says when calls of a method are recorded. Every call that is refused is, whatever the mode, but auditNever's.
type auditMode uint8

const (
	auditNever  auditMode = iota + 1 // it decides nothing, and tells nothing that is not for everybody
	auditWalk                        // the method records what it decides, before it takes effect
	auditRead                        // once, after
	auditRescue                      // as auditRead, but that it cannot be recorded is no reason not to answer: it is how operators find out why
	auditChange                      // before, as attempted, and after, with the outcome: not for strangers, who would fill the disk
)

// auditRule is how a method's calls are recorded. What it takes from messages is named field by field: a new field of a message
// gets into no record by itself.
type auditRule struct {
	action  audit.Action
	mode    auditMode
	streams bool                           // a stream for as long as all is well: that it ends with an error means nothing
	on      func(req any) []string         // what it is done to
	with    func(req any) audit.Details    // what else is asked for; never a token, a key set or credentials
	after   func(resp any) (also []string) // what the method has made
}

// auditRuleFor is the one table of what is recorded of calls.
func auditRuleFor(method string) (auditRule, bool) {
	if r, ok := adminAuditRule(method); ok {
		return r, true
	}
	switch method {
	case workloadv1.Workload_IssueX509_FullMethodName:
		return auditRule{action: audit.IssueX509, mode: auditWalk}, true
	case workloadv1.Workload_IssueJWT_FullMethodName:
		return auditRule{action: audit.IssueJWT, mode: auditWalk}, true
	case nodev1.Node_Attest_FullMethodName:
		return auditRule{action: audit.AttestNode, mode: auditWalk}, true
	case nodev1.Node_Renew_FullMethodName:
		return auditRule{action: audit.RenewAgent, mode: auditWalk}, true
	case nodev1.Node_Sync_FullMethodName:
		return auditRule{action: audit.SyncAgent, mode: auditWalk, streams: true}, true
	case nodev1.Node_Follow_FullMethodName:
		return auditRule{action: audit.FollowPod, mode: auditWalk, streams: true}, true
	case memberv1.Member_Join_FullMethodName:
		return auditRule{action: audit.JoinMember, mode: auditWalk, on: func(req any) []string { return []string{req.(*memberv1.JoinRequest).Id} }}, true
	case memberv1.Member_Report_FullMethodName:
		return auditRule{action: audit.ReportUses, mode: auditWalk}, true // it decides nothing: only refusals are recorded
	case memberv1.Member_Keyring_FullMethodName:
		return auditRule{action: audit.GiveKeyring, mode: auditWalk}, true
	case memberv1.Refreshing_State_FullMethodName:
		return auditRule{action: "member.refresh_state", mode: auditRead}, true
	case memberv1.Refreshing_Refresh_FullMethodName:
		return auditRule{action: "member.refresh_federation", mode: auditRead, on: federationSubject}, true
	case downstreamv1.Downstream_Sign_FullMethodName:
		return auditRule{action: audit.IssueDownstream, mode: auditWalk}, true
	case downstreamv1.Downstream_Sync_FullMethodName:
		return auditRule{action: audit.PublishKeys, mode: auditWalk, streams: true}, true
	case "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo":
		return auditRule{action: audit.Call, mode: auditNever}, true
	}
	return auditRule{}, false
}

func adminAuditRule(method string) (auditRule, bool) {
	switch method {
	case adminv1.Admin_CreateToken_FullMethodName:
		return auditRule{action: "admin.create_token", mode: auditChange, with: tokenDetails}, true // its ID: see CreateToken
	case adminv1.Admin_AddKubeCluster_FullMethodName:
		return auditRule{action: "admin.add_kube_cluster", mode: auditChange, on: func(req any) []string { return []string{req.(*adminv1.KubeCluster).Name} }, with: kubeDetails}, true
	case adminv1.Admin_ListKubeClusters_FullMethodName:
		return auditRule{action: "admin.list_kube_clusters", mode: auditRead}, true
	case adminv1.Admin_DeleteKubeCluster_FullMethodName:
		return auditRule{action: "admin.delete_kube_cluster", mode: auditChange, on: named}, true
	case adminv1.Admin_CreateEntry_FullMethodName:
		return auditRule{action: "admin.create_entry", mode: auditChange, on: entrySubjects, with: entryDetails, after: func(resp any) []string { return []string{resp.(*adminv1.Entry).GetId()} }}, true
	case adminv1.Admin_UpdateEntry_FullMethodName:
		return auditRule{action: "admin.update_entry", mode: auditChange, on: entrySubjects, with: entryDetails}, true
	case adminv1.Admin_DeleteEntry_FullMethodName:
		return auditRule{action: "admin.delete_entry", mode: auditChange, on: named}, true
	case adminv1.Admin_GetEntry_FullMethodName:
		return auditRule{action: "admin.get_entry", mode: auditRead, on: named}, true
	case adminv1.Admin_ListEntries_FullMethodName:
		return auditRule{action: "admin.list_entries", mode: auditRead}, true
	case adminv1.Admin_ListAgents_FullMethodName:
		return auditRule{action: "admin.list_agents", mode: auditRead}, true
	case adminv1.Admin_GetAgent_FullMethodName:
		return auditRule{action: "admin.get_agent", mode: auditRead, on: named}, true
	case adminv1.Admin_BanAgent_FullMethodName:
		return auditRule{action: "admin.ban_agent", mode: auditChange, on: named}, true
	case adminv1.Admin_EvictAgent_FullMethodName:
		return auditRule{action: "admin.evict_agent", mode: auditChange, on: named}, true
	case adminv1.Admin_GetBundle_FullMethodName:
		return auditRule{action: "admin.get_bundle", mode: auditRead}, true
	case adminv1.Admin_Status_FullMethodName:
		return auditRule{action: "admin.status", mode: auditRescue}, true
	case adminv1.Admin_ClusterStatus_FullMethodName:
		return auditRule{action: "admin.cluster_status", mode: auditRescue}, true
	case adminv1.Admin_RemoveMember_FullMethodName:
		return auditRule{action: "admin.remove_member", mode: auditChange, on: named}, true
	case adminv1.Admin_TransferLeader_FullMethodName:
		return auditRule{action: "admin.transfer_leader", mode: auditChange, on: named}, true
	case adminv1.Admin_ListAuthorities_FullMethodName:
		return auditRule{action: "admin.list_authorities", mode: auditRead}, true
	case adminv1.Admin_SealStatus_FullMethodName:
		return auditRule{action: "admin.seal_status", mode: auditRescue}, true
	case adminv1.Admin_RotateSeal_FullMethodName:
		return auditRule{action: "admin.rotate_seal", mode: auditChange}, true
	case adminv1.Admin_RewrapSeal_FullMethodName:
		return auditRule{action: "admin.rewrap_seal", mode: auditChange}, true
	case adminv1.Admin_SaveBackup_FullMethodName:
		return auditRule{action: "admin.save_backup", mode: auditChange}, true
	case adminv1.Preview_CreateEntry_FullMethodName, adminv1.Preview_UpdateEntry_FullMethodName:
		return auditRule{action: "admin.preview_entry", mode: auditRead, on: entrySubjects, with: entryDetails}, true
	case adminv1.Preview_AddKubeCluster_FullMethodName:
		return auditRule{action: "admin.preview_kube_cluster", mode: auditRead, on: func(req any) []string { return []string{req.(*adminv1.KubeCluster).Name} }, with: kubeDetails}, true
	case adminv1.Preview_DeleteEntry_FullMethodName, adminv1.Preview_DeleteKubeCluster_FullMethodName, adminv1.Preview_BanAgent_FullMethodName,
		adminv1.Preview_EvictAgent_FullMethodName, adminv1.Preview_RemoveMember_FullMethodName:
		return auditRule{action: "admin.preview", mode: auditRead, on: named}, true
	case adminv1.Preview_RotateSeal_FullMethodName:
		return auditRule{action: "admin.preview", mode: auditRead}, true
	case adminv1.Checkup_Examine_FullMethodName:
		return auditRule{action: "admin.examine", mode: auditRescue}, true
	case adminv1.Checkup_Clock_FullMethodName:
		return auditRule{action: "admin.clock", mode: auditRescue}, true
	case adminv1.Mint_MintX509_FullMethodName:
		return auditRule{action: audit.MintX509, mode: auditWalk, on: func(req any) []string { return []string{req.(*adminv1.MintX509Request).SpiffeId} }}, true
	case adminv1.Mint_MintJWT_FullMethodName:
		return auditRule{action: audit.MintJWT, mode: auditWalk, on: func(req any) []string { return []string{req.(*adminv1.MintJWTRequest).SpiffeId} }}, true
	case adminv1.Admin_QueryAudit_FullMethodName:
		return auditRule{action: "admin.query_audit", mode: auditRescue}, true
	}
	return trustAuditRule(method)
}

func trustAuditRule(method string) (auditRule, bool) {
	switch method {
	case adminv1.Trust_Rotate_FullMethodName:
		return auditRule{action: "admin.rotate", mode: auditChange, on: kindOn, with: rotateDetails}, true
	case adminv1.Trust_GetRotation_FullMethodName:
		return auditRule{action: "admin.get_rotation", mode: auditRead}, true
	case adminv1.Trust_WatchRotation_FullMethodName:
		return auditRule{action: "admin.watch_rotation", mode: auditRead}, true
	case adminv1.Trust_ChangeRotation_FullMethodName:
		return auditRule{action: "admin.change_rotation", mode: auditChange, on: kindOn, with: rotateDetails}, true
	case adminv1.Trust_Rollback_FullMethodName:
		return auditRule{action: "admin.rollback_rotation", mode: auditChange, on: kindOn, with: rotateDetails}, true
	case adminv1.Trust_PrepareAuthority_FullMethodName:
		return auditRule{action: "admin.prepare_authority", mode: auditChange, on: kindOn, with: rotateDetails}, true
	case adminv1.Trust_ActivateAuthority_FullMethodName:
		return auditRule{action: "admin.activate_authority", mode: auditChange, on: kindOn, with: rotateDetails}, true
	case adminv1.Trust_TaintAuthority_FullMethodName:
		return auditRule{action: "admin.taint_authority", mode: auditChange, on: kindOn, with: rotateDetails}, true
	case adminv1.Trust_RevokeAuthority_FullMethodName:
		return auditRule{action: "admin.revoke_authority", mode: auditChange, on: kindOn, with: rotateDetails}, true
	}
	return federationAuditRule(method)
}

func federationAuditRule(method string) (auditRule, bool) {
	switch method {
	case adminv1.Federation_CreateFederation_FullMethodName:
		return auditRule{action: "admin.create_federation", mode: auditChange, on: federationSubject, with: federationDetails}, true
	case adminv1.Federation_UpdateFederation_FullMethodName:
		return auditRule{action: "admin.update_federation", mode: auditChange, on: federationSubject, with: federationDetails}, true
	case adminv1.Federation_DeleteFederation_FullMethodName:
		return auditRule{action: "admin.delete_federation", mode: auditChange, on: federationSubject, with: func(req any) audit.Details {
			return audit.Details{{Key: "dry_run", Value: strconv.FormatBool(req.(*adminv1.DeleteFederationRequest).DryRun)}}
		}}, true
	case adminv1.Federation_ListFederations_FullMethodName:
		return auditRule{action: "admin.list_federations", mode: auditRead}, true
	case adminv1.Federation_GetFederation_FullMethodName:
		return auditRule{action: "admin.get_federation", mode: auditRead, on: named}, true
	case adminv1.Federation_RefreshFederation_FullMethodName:
		return auditRule{action: "admin.refresh_federation", mode: auditChange, on: named}, true
	case adminv1.Federation_DescribeEndpoint_FullMethodName:
		return auditRule{action: "admin.describe_endpoint", mode: auditRead}, true
	}
	return auditRule{}, false
}

// kindOn is the kind of authority, and which one where that is named.
func kindOn(req any) []string {
	kind := req.(interface{ GetKind() string }).GetKind()
	if r, ok := req.(interface{ GetId() string }); ok && r.GetId() != "" {
		return []string{kind + " " + r.GetId()}
	}
	return []string{kind}
}

// rotateDetails are what overrides a gate, and what makes it a rehearsal.
func rotateDetails(req any) audit.Details {
	var d audit.Details
	add := func(key, value string) { d = append(d, audit.Detail{Key: key, Value: value}) }
	if r, ok := req.(interface{ GetIgnore() []string }); ok && len(r.GetIgnore()) > 0 {
		add("ignore", strings.Join(r.GetIgnore()[:min(len(r.GetIgnore()), maxNamed)], " "))
	}
	for key, f := range map[string]func() bool{
		"force":   func() bool { r, ok := req.(interface{ GetForce() bool }); return ok && r.GetForce() },
		"dry_run": func() bool { r, ok := req.(interface{ GetDryRun() bool }); return ok && r.GetDryRun() },
		"taint":   func() bool { r, ok := req.(interface{ GetTaint() bool }); return ok && r.GetTaint() },
	} {
		if f() {
			add(key, "true")
		}
	}
	if r, ok := req.(interface{ GetCompromised() string }); ok && r.GetCompromised() != "" {
		add("compromised", r.GetCompromised())
	}
	if r, ok := req.(interface{ GetAckDeadline() *durationpb.Duration }); ok && r.GetAckDeadline() != nil {
		add("ack_deadline", r.GetAckDeadline().AsDuration().String())
	}
	if r, ok := req.(interface{ GetUseDeadline() *durationpb.Duration }); ok && r.GetUseDeadline() != nil {
		add("use_deadline", r.GetUseDeadline().AsDuration().String())
	}
	slices.SortFunc(d, func(a, b audit.Detail) int { return strings.Compare(a.Key, b.Key) })
	return d
}

func named(req any) []string {
	if name := req.(*adminv1.NameRequest).Name; name != "" {
		return []string{name}
	}
	return nil
}

func tokenDetails(req any) audit.Details {
	r := req.(*adminv1.CreateTokenRequest)
	d := audit.Details{{Key: "purpose", Value: r.Purpose}}
	if ttl := r.Ttl.AsDuration(); ttl != 0 {
		d = append(d, audit.Detail{Key: "ttl", Value: ttl.String()})
	}
	if r.KubeCluster != "" || r.KubeNode != "" {
		d = append(d, audit.Detail{Key: "kube_node", Value: r.KubeCluster + "/" + r.KubeNode})
	}
	return d
}

func entrySubjects(req any) []string {
	r := req.(*adminv1.Entry)
	if r.Id == "" {
		return []string{r.SpiffeId}
	}
	return []string{r.Id, r.SpiffeId}
}

func entryDetails(req any) audit.Details {
	r := req.(*adminv1.Entry)
	d := audit.Details{{Key: "selectors", Value: strings.Join(r.Selectors, " ")}}
	if r.AdminRole != "" {
		d = append(d, audit.Detail{Key: "admin_role", Value: r.AdminRole})
	}
	if r.Admin || r.Downstream {
		d = append(d, audit.Detail{Key: "admin", Value: strconv.FormatBool(r.Admin)}, audit.Detail{Key: "downstream", Value: strconv.FormatBool(r.Downstream)})
	}
	if len(r.DnsNames) > 0 {
		d = append(d, audit.Detail{Key: "dns_names", Value: strings.Join(r.DnsNames, " ")})
	}
	if len(r.FederatesWith) > 0 {
		d = append(d, audit.Detail{Key: "federates_with", Value: strings.Join(r.FederatesWith, " ")})
	}
	if t := r.X509Ttl.AsDuration(); t != 0 {
		d = append(d, audit.Detail{Key: "x509_ttl", Value: t.String()})
	}
	if t := r.JwtTtl.AsDuration(); t != 0 {
		d = append(d, audit.Detail{Key: "jwt_ttl", Value: t.String()})
	}
	if r.ExpiresAt != nil {
		d = append(d, audit.Detail{Key: "expires_at", Value: r.ExpiresAt.AsTime().UTC().Format("2006-01-02T15:04:05Z")})
	}
	return d
}

// kubeDetails leave out the bodies of key sets and certificates, and show of addresses what names them.
func kubeDetails(req any) audit.Details {
	r := req.(*adminv1.KubeCluster)
	d := audit.Details{
		{Key: "issuer", Value: identity.RedactURL(r.Issuer)}, {Key: "audience", Value: r.Audience}, {Key: "jwks_held", Value: strconv.FormatBool(len(r.Jwks) > 0)},
		{Key: "token_review", Value: strconv.FormatBool(r.TokenReview)}, {Key: "replace", Value: strconv.FormatBool(r.Replace)},
		{Key: "agent_accounts", Value: strings.Join(r.AgentAccounts, " ")},
	}
	if r.JwksUrl != "" {
		d = append(d, audit.Detail{Key: "jwks_url", Value: identity.RedactURL(r.JwksUrl)})
	}
	if path := r.Kubeconfig; path != "" {
		if !strings.HasPrefix(path, "/") {
			path = identity.RedactURL(path)
		}
		d = append(d, audit.Detail{Key: "kubeconfig", Value: path})
	}
	if r.NoDefaultId {
		return append(d, audit.Detail{Key: "default_id", Value: "none"})
	}
	return append(d, audit.Detail{Key: "default_id", Value: r.DefaultId})
}
