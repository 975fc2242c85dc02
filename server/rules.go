package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	downstreamv1 "countersign.io/countersign/api/downstream/v1"
	memberv1 "countersign.io/countersign/api/member/v1"
	nodev1 "countersign.io/countersign/api/node/v1"
	workloadv1 "countersign.io/countersign/api/workload/v1"

	"countersign.io/countersign/identity"
)

const anyone = guest | workload | member | agent | local

// rule says who may call a method.
type rule struct {
	by   kind
	role identity.AdminRole // that a remote admin needs at the least; see demand for what a message adds to it
}

// operators are those on the admin socket, and remote admins of the role.
func operators(role identity.AdminRole) rule { return rule{local | remote, role} }

// ruleFor is the one table of who may call what. A method that is not in it may be called by nobody.
func ruleFor(method string) rule {
	switch method {
	case nodev1.Node_Attest_FullMethodName,
		memberv1.Member_Join_FullMethodName:
		return rule{by: anyone}
	case "/grpc.health.v1.Health/Check":
		return rule{by: anyone | remote, role: identity.AdminReader}

	case nodev1.Node_Renew_FullMethodName,
		nodev1.Node_Sync_FullMethodName:
		return rule{by: agent}

	case downstreamv1.Downstream_Sign_FullMethodName,
		downstreamv1.Downstream_Sync_FullMethodName:
		return rule{by: workload} // with a downstream entry, see downstreamEntry

	case memberv1.Member_Keyring_FullMethodName,
		memberv1.Member_Report_FullMethodName,
		memberv1.Refreshing_State_FullMethodName,
		memberv1.Refreshing_Refresh_FullMethodName:
		return rule{by: member} // on the list, see currentMember

	case nodev1.Node_Follow_FullMethodName:
		return rule{by: guest} // one pod, by its own token

	case workloadv1.Workload_IssueX509_FullMethodName,
		workloadv1.Workload_IssueJWT_FullMethodName:
		return rule{by: agent | guest}

	case "/grpc.health.v1.Health/Watch":
		return rule{by: local | agent | remote, role: identity.AdminReader}
	}
	return operators(adminRoleFor(method)).orNone()
}

// adminRoleFor is the part of the table that is for operators: the least role of a remote admin. docs/ADMIN.md argues each.
func adminRoleFor(method string) identity.AdminRole {
	switch method {
	case adminv1.Admin_ListKubeClusters_FullMethodName,
		adminv1.Admin_GetEntry_FullMethodName,
		adminv1.Admin_ListEntries_FullMethodName,
		adminv1.Admin_ListAgents_FullMethodName,
		adminv1.Admin_GetAgent_FullMethodName,
		adminv1.Admin_GetBundle_FullMethodName,
		adminv1.Admin_Status_FullMethodName,
		adminv1.Admin_ClusterStatus_FullMethodName,
		adminv1.Admin_ListAuthorities_FullMethodName,
		adminv1.Admin_SealStatus_FullMethodName,
		adminv1.Admin_QueryAudit_FullMethodName, // who audits need not be able to change anything
		adminv1.Trust_GetRotation_FullMethodName,
		adminv1.Trust_WatchRotation_FullMethodName,
		adminv1.Federation_ListFederations_FullMethodName,
		adminv1.Federation_GetFederation_FullMethodName,
		adminv1.Federation_DescribeEndpoint_FullMethodName,
		adminv1.Checkup_Examine_FullMethodName,
		adminv1.Checkup_Clock_FullMethodName,
		"/grpc.health.v1.Health/List",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo":
		return identity.AdminReader

	case adminv1.Admin_CreateToken_FullMethodName, // for an agent, see demand
		adminv1.Admin_CreateEntry_FullMethodName,
		adminv1.Admin_UpdateEntry_FullMethodName,
		adminv1.Admin_DeleteEntry_FullMethodName,
		adminv1.Admin_BanAgent_FullMethodName,
		adminv1.Admin_EvictAgent_FullMethodName,
		adminv1.Admin_TransferLeader_FullMethodName,
		adminv1.Federation_RefreshFederation_FullMethodName,
		adminv1.Preview_CreateEntry_FullMethodName, // a preview needs what the change does: it tells as much
		adminv1.Preview_UpdateEntry_FullMethodName,
		adminv1.Preview_DeleteEntry_FullMethodName,
		adminv1.Preview_BanAgent_FullMethodName,
		adminv1.Preview_EvictAgent_FullMethodName,
		adminv1.Mint_MintX509_FullMethodName,
		adminv1.Mint_MintJWT_FullMethodName:
		return identity.AdminOperator

	case adminv1.Admin_AddKubeCluster_FullMethodName, // what its key signs is believed, also of admins' pods
		adminv1.Admin_DeleteKubeCluster_FullMethodName,
		adminv1.Admin_RotateSeal_FullMethodName,
		adminv1.Admin_RewrapSeal_FullMethodName,
		adminv1.Admin_RemoveMember_FullMethodName,
		adminv1.Admin_SaveBackup_FullMethodName,
		adminv1.Federation_CreateFederation_FullMethodName,
		adminv1.Federation_UpdateFederation_FullMethodName,
		adminv1.Federation_DeleteFederation_FullMethodName,
		adminv1.Trust_Rotate_FullMethodName,
		adminv1.Trust_ChangeRotation_FullMethodName,
		adminv1.Trust_Rollback_FullMethodName,
		adminv1.Trust_PrepareAuthority_FullMethodName,
		adminv1.Trust_ActivateAuthority_FullMethodName,
		adminv1.Trust_TaintAuthority_FullMethodName,
		adminv1.Trust_RevokeAuthority_FullMethodName,
		adminv1.Preview_AddKubeCluster_FullMethodName,
		adminv1.Preview_DeleteKubeCluster_FullMethodName,
		adminv1.Preview_RemoveMember_FullMethodName,
		adminv1.Preview_RotateSeal_FullMethodName:
		return identity.AdminSecurity
	}
	return ""
}

// orNone makes a rule without a role one for nobody: whoever adds a method must say who among the remote admins may call it.
func (r rule) orNone() rule {
	if r.role == "" {
		return rule{}
	}
	return r
}

// call is what the rule table established about one call.
type call struct {
	caller
	agent *identity.Agent // the record, if the caller is an agent and the rule is not for anyone
	rule  rule
}

type callKey struct{}

func callOf(ctx context.Context) call {
	c, _ := ctx.Value(callKey{}).(call)
	return c
}

// authorize decides whether the call may go on: the table, then for an agent its record, for a remote admin its role, and for
// everybody else the limits of strangers.
func (s *Server) authorize(ctx context.Context, who caller, method string) (context.Context, error) {
	c := call{caller: who, rule: ruleFor(method)}
	switch {
	case c.kind&c.rule.by != 0:
	case c.kind == guest && c.rule.by&agent != 0:
		return nil, fmt.Errorf("%w: %s needs the SVID of an agent", identity.ErrUnauthenticated, method)
	default:
		return nil, fmt.Errorf("%w: %s is not for %s%s", identity.ErrDenied, method, c.kind, idSuffix(c.caller))
	}
	switch {
	case c.kind == agent && c.rule.by != anyone:
		a, err := s.liveAgent(c.caller)
		if err != nil {
			return nil, err
		}
		c.agent = a
	case c.kind == remote:
		if err := s.limits.admin(c.caller, s.power(c.caller) != ""); err != nil {
			return nil, err
		}
		if err := s.remoteAdmin(c.caller, method, c.rule.role); err != nil {
			return nil, err
		}
	case c.kind != local:
		if err := s.limits.allow(c.addr); err != nil {
			return nil, err
		}
	}
	return context.WithValue(ctx, callKey{}, c), nil
}

func idSuffix(c caller) string {
	if c.id.IsZero() {
		return ""
	}
	return " (" + c.id.String() + ")"
}

// recordLag is how long an agent's record may take to reach every member, the difference of their clocks included:
// within it, a missing record means that this member is behind the one that attested the agent.
const recordLag = 2 * time.Minute

// backdate is how long before its issuance an SVID begins.
const backdate = 10 * time.Second

// evictions are the agents that were evicted within recordLag, so that they are told no at once and not "not yet".
type evictions struct {
	mu sync.Mutex
	at map[string]time.Time // by agent ID
}

// add notes an eviction, and forgets those that recordLag covers no longer.
func (e *evictions) add(id string, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.at == nil {
		e.at = map[string]time.Time{}
	}
	maps.DeleteFunc(e.at, func(_ string, at time.Time) bool { return now.Sub(at) > recordLag })
	e.at[id] = now
}

// after reports whether the agent was evicted after t: an SVID of later is of a new attestation that has yet to get here.
func (e *evictions) after(id string, t time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	at, ok := e.at[id]
	return ok && at.After(t)
}

// liveAgent returns the record of a connected agent: its SVID must still be valid, and it must be neither banned
// nor evicted, and its service account still be allowed to have agents.
func (s *Server) liveAgent(c caller) (*identity.Agent, error) {
	now := s.cfg.Now()
	if !now.Before(c.expires) {
		return nil, fmt.Errorf("%w: the SVID that this connection was made with expired at %s: renew it and connect anew", identity.ErrUnauthenticated, c.expires.UTC().Format(time.RFC3339))
	}
	a, ok := s.cfg.State.Agent(c.id.String())
	switch {
	case !ok && now.Sub(c.issued) < recordLag && !s.evicted.after(c.id.String(), c.issued.Add(backdate)):
		return nil, fmt.Errorf("%w: this member does not know agent %s yet: try again, or another member", identity.ErrUnavailable, c.id)
	case !ok:
		return nil, fmt.Errorf("%w: agent %s was evicted: it must attest again", identity.ErrDenied, c.id)
	case a.Banned:
		return nil, fmt.Errorf("%w: agent %s is banned", identity.ErrDenied, c.id)
	}
	if err := s.accountAllowed(a); err != nil {
		return nil, err
	}
	return a, nil
}

// accountAllowed refuses an agent whose pod's service account was taken off its kube cluster's list after it was attested:
// who takes it off does not want its agents any more, and must not have to find and evict each.
func (s *Server) accountAllowed(a *identity.Agent) error {
	if a.KubeAccount == "" {
		return nil
	}
	if k, ok := s.cfg.State.KubeCluster(a.KubeCluster); ok && slices.Contains(k.AgentAccounts, a.KubeAccount) {
		return nil
	}
	return fmt.Errorf("%w: agent %s was attested as service account %s, whose pods may no longer be agents of kube cluster %q: allow it with countersign kube add --replace --agent-account %s", identity.ErrDenied, a.ID, a.KubeAccount, a.KubeCluster, a.KubeAccount)
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	who := callerOf(ctx)
	resp, err := s.auditedUnary(ctx, who, req, info, next)
	if err != nil {
		return nil, s.report(who, info.FullMethod, err)
	}
	return resp, nil
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	who := callerOf(ss.Context())
	if err := s.auditedStream(srv, ss, who, info, next); err != nil {
		return s.report(who, info.FullMethod, err)
	}
	return nil
}

// callStream carries the call in its context.
type callStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (c *callStream) Context() context.Context { return c.ctx }
