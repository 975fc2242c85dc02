package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
)

// completeTime is how long somebody at the prompt waits for names.
const completeTime = 2 * time.Second

// complete asks the live cluster for the names that a command's one argument can have: what one member knows, without asking
// the leader. If none answers in time, there are none: a shell cannot show an error.
func (a *admin) complete(cmd *cobra.Command, args []string, f func(context.Context, adminv1.AdminClient) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	return a.completeBy(cmd, args, func(ctx context.Context, conn *grpc.ClientConn) ([]string, error) {
		return f(ctx, adminv1.NewAdminClient(conn))
	})
}

// completeBy is complete for the other services that operators have.
func (a *admin) completeBy(cmd *cobra.Command, args []string, f func(context.Context, *grpc.ClientConn) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	quick := *a
	quick.timeout, quick.stale = min(a.timeout, completeTime), true
	var names []string
	_ = quick.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		names, err = f(ctx, conn)
		return err
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *admin) completeEntries(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c adminv1.AdminClient) (out []string, err error) {
		res, err := c.ListEntries(ctx, &adminv1.ListRequest{PageSize: 1000})
		for _, e := range res.GetEntries() {
			out = append(out, e.Id+"\t"+e.SpiffeId)
		}
		return out, err
	})
}

func (a *admin) completeAgents(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c adminv1.AdminClient) (out []string, err error) {
		res, err := c.ListAgents(ctx, &adminv1.ListRequest{PageSize: 1000})
		for _, g := range res.GetAgents() {
			out = append(out, g.Id)
		}
		return out, err
	})
}

func (a *admin) completeKube(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c adminv1.AdminClient) (out []string, err error) {
		res, err := c.ListKubeClusters(ctx, &adminv1.ListRequest{})
		for _, k := range res.GetKubeClusters() {
			out = append(out, k.Name+"\t"+k.Issuer)
		}
		return out, err
	})
}

func (a *admin) completeMembers(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c adminv1.AdminClient) (out []string, err error) {
		res, err := c.Status(ctx, &adminv1.Empty{})
		for _, m := range res.GetMembers() {
			out = append(out, m.Id+"\t"+role(m.Voter, m.Leader)+" at "+m.Address)
		}
		return out, err
	})
}
