package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
	"countersign.io/countersign/identity"
)

// trust is call for what changes authorities.
func (a *admin) trust(cmd *cobra.Command, f func(context.Context, adminv1.TrustClient) error) error {
	return a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) error { return f(ctx, adminv1.NewTrustClient(conn)) })
}

// kindFlag adds --kind.
func kindFlag(cmd *cobra.Command, kind *string, standard string) {
	cmd.Flags().StringVar(kind, "kind", standard, "which authority: x509 or jwt")
	_ = cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions([]string{"x509", "jwt"}, cobra.ShellCompDirectiveNoFileComp))
}

// durations are flags that count only if they were given.
func given(cmd *cobra.Command, flag string, d time.Duration) *durationpb.Duration {
	if !cmd.Flags().Changed(flag) {
		return nil
	}
	return durationpb.New(d)
}

// trustCommands are the life of authorities.
func trustCommands(a *admin) []*cobra.Command {
	return []*cobra.Command{rotateCommand(a), rotationStatusCommand(a), rotationChangeCommand(a), rollbackCommand(a),
		stepCommand(a, "prepare", "Make an authority that everyone trusts and that signs nothing yet", "",
			func(c adminv1.TrustClient) step { return c.PrepareAuthority }),
		stepCommand(a, "activate", "Let the prepared authority sign, once everyone trusts it", "[ID]",
			func(c adminv1.TrustClient) step { return c.ActivateAuthority }),
		taintCommand(a, "bundle"),
		stepCommand(a, "revoke", "Trust an authority no longer, once nothing live is under it", "[ID]",
			func(c adminv1.TrustClient) step { return c.RevokeAuthority }),
	}
}

func rotateCommand(a *admin) *cobra.Command {
	var req adminv1.RotateRequest
	var ack, use time.Duration
	var watch bool
	cmd := &cobra.Command{
		Use: "rotate", Short: "Replace an authority by a new one, safely", Args: cobra.NoArgs,
		Long: `Replace an authority by a new one. The leader makes a key and publishes it; lets it sign once every live agent, member and cluster
below has acknowledged that it trusts it; and revokes the old one once nothing live is under it. It goes on without this command, and
until its last step it can be rolled back (countersign bundle rollback). docs/ROTATION.md tells each step.

An agent that is stopped is waited for, by name: until it is back, or for --ack-deadline and --use-deadline, or until it is named by
--ignore here or in countersign bundle change. What the old authority signed is replaced at half of its life; with --taint, at once.`,
		Example: `  countersign bundle rotate --watch
  countersign bundle rotate --kind jwt --watch
  countersign bundle rotate --taint --ack-deadline 10m --watch
  countersign bundle rotate --dry-run`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req.AckDeadline, req.UseDeadline = given(cmd, "ack-deadline", ack), given(cmd, "use-deadline", use)
			return a.rotate(cmd, &req, watch)
		},
	}
	kindFlag(cmd, &req.Kind, "x509")
	cmd.Flags().DurationVar(&ack, "ack-deadline", 24*time.Hour, "how long it waits for those that have yet to trust the new authority, then goes on without them (0: for ever)")
	cmd.Flags().DurationVar(&use, "use-deadline", 0, "how long it waits for what is live under the old one, then revokes it all the same (0: for ever)")
	cmd.Flags().BoolVar(&req.Taint, "taint", false, "replace what the old authority signed at once, not at half of its life")
	cmd.Flags().StringSliceVar(&req.Ignore, "ignore", nil, "do not wait for this agent, member or cluster below (repeatable)")
	cmd.Flags().BoolVar(&watch, "watch", false, "show how it goes on, until it has ended")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "change nothing: say what would be done")
	return cmd
}

// rotate begins a rotation and, if told to, watches it.
func (a *admin) rotate(cmd *cobra.Command, req *adminv1.RotateRequest, watch bool) error {
	var res *adminv1.Rotation
	if err := a.trust(cmd, func(ctx context.Context, c adminv1.TrustClient) (err error) {
		res, err = c.Rotate(ctx, req)
		return err
	}); err != nil {
		return err
	}
	if watch && !req.DryRun {
		return a.watchRotation(cmd, req.Kind)
	}
	return a.printRotations(cmd, &adminv1.RotationList{Rotations: []*adminv1.Rotation{res}})
}

func rotationStatusCommand(a *admin) *cobra.Command {
	var kind string
	var watch bool
	cmd := &cobra.Command{
		Use: "status", Short: "Show how rotations stand, and whom they wait for", Args: cobra.NoArgs,
		Example: "  countersign bundle status\n  countersign bundle status --kind x509 --watch",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				if kind == "" {
					return fmt.Errorf("%w: --watch: name the --kind, x509 or jwt", identity.ErrInvalid)
				}
				return a.watchRotation(cmd, kind)
			}
			var res *adminv1.RotationList
			if err := a.trust(cmd, func(ctx context.Context, c adminv1.TrustClient) (err error) {
				res, err = c.GetRotation(ctx, &adminv1.RotationRequest{Kind: kind})
				return err
			}); err != nil {
				return err
			}
			return a.printRotations(cmd, res)
		},
	}
	kindFlag(cmd, &kind, "")
	cmd.Flags().BoolVar(&watch, "watch", false, "show how it goes on, until it has ended")
	return cmd
}

func rotationChangeCommand(a *admin) *cobra.Command {
	var req adminv1.ChangeRotationRequest
	var ack, use time.Duration
	cmd := &cobra.Command{
		Use: "change", Short: "Have a rotation that is under way go on without somebody, or set its deadlines", Args: cobra.NoArgs,
		Example: `  countersign bundle change --ignore spiffe://example.org/countersign/agent/kube/prod/node-7
  countersign bundle change --kind jwt --ack-deadline 1h`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req.AckDeadline, req.UseDeadline = given(cmd, "ack-deadline", ack), given(cmd, "use-deadline", use)
			if len(req.Ignore) == 0 && req.AckDeadline == nil && req.UseDeadline == nil {
				return fmt.Errorf("%w: say what to change: --ignore, --ack-deadline or --use-deadline", identity.ErrInvalid)
			}
			var res *adminv1.Rotation
			if err := a.trust(cmd, func(ctx context.Context, c adminv1.TrustClient) (err error) {
				res, err = c.ChangeRotation(ctx, &req)
				return err
			}); err != nil {
				return err
			}
			return a.printRotations(cmd, &adminv1.RotationList{Rotations: []*adminv1.Rotation{res}})
		},
	}
	kindFlag(cmd, &req.Kind, "x509")
	cmd.Flags().StringSliceVar(&req.Ignore, "ignore", nil, "do not wait for this agent, member or cluster below (repeatable)")
	cmd.Flags().DurationVar(&ack, "ack-deadline", 0, "from the beginning of the phase activate (0: none)")
	cmd.Flags().DurationVar(&use, "use-deadline", 0, "from the beginning of the phase revoke (0: none)")
	return cmd
}

func rollbackCommand(a *admin) *cobra.Command {
	var req adminv1.RollbackRequest
	cmd := &cobra.Command{
		Use: "rollback", Short: "Undo a rotation that is under way", Args: cobra.NoArgs,
		Long: `Undo a rotation that is under way: before the new authority signs, it is dropped; after that, the old one signs again and the new
one is revoked once nothing live is under it. What is revoked cannot come back.`,
		Example: "  countersign bundle rollback\n  countersign bundle rollback --kind jwt --dry-run",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var res *adminv1.Rotation
			if err := a.trust(cmd, func(ctx context.Context, c adminv1.TrustClient) (err error) {
				res, err = c.Rollback(ctx, &req)
				return err
			}); err != nil {
				return err
			}
			return a.printRotations(cmd, &adminv1.RotationList{Rotations: []*adminv1.Rotation{res}})
		},
	}
	kindFlag(cmd, &req.Kind, "x509")
	cmd.Flags().BoolVar(&req.Force, "force", false, "also back to an authority that was tainted")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "change nothing: say what would be done")
	return cmd
}

// step is one change of an authority.
type step = func(context.Context, *adminv1.AuthorityRequest, ...grpc.CallOption) (*adminv1.AuthorityResponse, error)

func stepCommand(a *admin, name, short, arg string, do func(adminv1.TrustClient) step) *cobra.Command {
	var req adminv1.AuthorityRequest
	args := cobra.MaximumNArgs(1)
	if arg == "" {
		args = cobra.NoArgs
	}
	cmd := &cobra.Command{
		Use: strings.TrimSpace(name + " " + arg), Short: short, Args: args,
		Long: short + `.

This is one step of a rotation by hand; countersign bundle rotate takes them all. It is refused while somebody would be left behind, and
says who. Without an ID it is the only authority that the step can be about.`,
		Example: "  countersign bundle " + name + " --kind x509\n  countersign bundle " + name + " --kind jwt --dry-run",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				req.Id = args[0]
			}
			return a.step(cmd, &req, do)
		},
	}
	if arg != "" {
		cmd.ValidArgsFunction = a.completeAuthorities
		cmd.Flags().StringSliceVar(&req.Ignore, "ignore", nil, "do not wait for this agent, member or cluster below (repeatable)")
		cmd.Flags().BoolVar(&req.Force, "force", false, "wait for nobody")
	}
	kindFlag(cmd, &req.Kind, "x509")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "change nothing: say what would be done, and who would be waited for")
	return cmd
}

func (a *admin) step(cmd *cobra.Command, req *adminv1.AuthorityRequest, do func(adminv1.TrustClient) step) error {
	var res *adminv1.AuthorityResponse
	if err := a.trust(cmd, func(ctx context.Context, c adminv1.TrustClient) (err error) {
		res, err = do(c)(ctx, req)
		return err
	}); err != nil {
		return err
	}
	return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table {
		t := cli.Table{Rows: [][]string{{"authority", orDash(res.Id)}, {"kind", res.Kind}, {"state", res.State}}}
		if res.DryRun {
			t.Rows = append(t.Rows, []string{"dry run", "nothing was changed"})
		}
		t.Rows = append(t.Rows, gateRows(res.Gate)...)
		return t
	})
}

// taintCommand is below bundle with the other steps, and below authority, where whoever knows of a compromise looks first.
func taintCommand(a *admin, group string) *cobra.Command {
	var req adminv1.AuthorityRequest
	var use, ack time.Duration
	var now, watch bool
	cmd := &cobra.Command{
		Use: "taint [ID]", Short: "Give an authority up: have everything replaced that it signed", Args: cobra.MaximumNArgs(1),
		Long: `Give an authority up that signs no longer: everything that it signed is replaced, spread over members and agents.

With --now it is one that is compromised and may sign still: another one is made and signs after a few seconds, for which only those
that are connected are waited for; everything that the compromised one signed is replaced, in the clusters below as well; then it
is revoked, after an hour at the latest (--use-deadline).`,
		Example: strings.ReplaceAll(`  countersign GROUP taint --kind x509
  countersign GROUP taint --now --watch
  countersign GROUP taint --now --kind jwt --use-deadline 10m`, "GROUP", group),
		ValidArgsFunction: a.completeAuthorities,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				req.Id = args[0]
			}
			active := ""
			if now {
				var err error
				if active, err = a.activeAuthority(cmd, req.Kind); err != nil {
					return err
				}
			}
			if !now || req.Id != "" && req.Id != active {
				return a.step(cmd, &req, func(c adminv1.TrustClient) step { return c.TaintAuthority })
			}
			return a.rotate(cmd, &adminv1.RotateRequest{
				Kind: req.Kind, Compromised: active, Ignore: req.Ignore, DryRun: req.DryRun,
				AckDeadline: given(cmd, "ack-deadline", ack), UseDeadline: given(cmd, "use-deadline", use),
			}, watch)
		},
	}
	kindFlag(cmd, &req.Kind, "x509")
	cmd.Flags().BoolVar(&now, "now", false, "it is compromised: also if it is the one that signs")
	cmd.Flags().DurationVar(&ack, "ack-deadline", 10*time.Second, "with --now: how long those are waited for that have yet to trust the new authority")
	cmd.Flags().DurationVar(&use, "use-deadline", time.Hour, "with --now: when the compromised one is revoked at the latest")
	cmd.Flags().StringSliceVar(&req.Ignore, "ignore", nil, "do not wait for this agent, member or cluster below (repeatable)")
	cmd.Flags().BoolVar(&watch, "watch", false, "with --now: show how it goes on, until it has ended")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "change nothing: say what would be done")
	return cmd
}

func (a *admin) activeAuthority(cmd *cobra.Command, kind string) (string, error) {
	var res *adminv1.ListAuthoritiesResponse
	if err := a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) (err error) {
		res, err = c.ListAuthorities(ctx, &adminv1.Empty{})
		return err
	}); err != nil {
		return "", err
	}
	for _, x := range res.Authorities {
		if x.Kind == kind && x.State == string(identity.AuthorityActive) {
			return x.Id, nil
		}
	}
	return "", fmt.Errorf("%w: there is no active %s authority", identity.ErrNotFound, kind)
}

// completeAuthorities names the authorities of the live cluster.
func (a *admin) completeAuthorities(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c adminv1.AdminClient) (out []string, err error) {
		res, err := c.ListAuthorities(ctx, &adminv1.Empty{})
		for _, x := range res.GetAuthorities() {
			out = append(out, x.Id+"\t"+x.Kind+", "+x.State)
		}
		return out, err
	})
}

// watchPause is how long a watch waits before it connects again.
const watchPause = time.Second

// watchRotation shows how a rotation goes on until it has ended. The member that it asks may go: the rotation does not.
func (a *admin) watchRotation(cmd *cobra.Command, kind string) error {
	p := newRotationProgress(cmd.ErrOrStderr())
	var last *adminv1.Rotation
	for {
		err := a.connectFor(cmd, 0, func(ctx context.Context, conn *grpc.ClientConn) error {
			stream, err := adminv1.NewTrustClient(conn).WatchRotation(ctx, &adminv1.RotationRequest{Kind: kind})
			for err == nil {
				var r *adminv1.Rotation
				if r, err = stream.Recv(); err == nil {
					last = r
					p.show(r)
				}
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		})
		switch {
		case err == nil:
			p.end()
			if a.out.String() != "table" {
				return a.out.Print(cmd.OutOrStdout(), last, nil)
			}
			if last.GetPhase() == string(identity.RotationRolledBack) {
				return fmt.Errorf("%w: the rotation was rolled back: %s", identity.ErrPrecondition, last.Why)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s authority %s has taken the place of %s\n", last.GetKind(), last.GetNewAuthority(), orDash(last.GetOldAuthority()))
			return nil
		case cmd.Context().Err() != nil, !errors.Is(err, identity.ErrUnavailable), last == nil:
			p.end()
			return err
		}
		p.note("the member that is asked went away: the rotation goes on; asking again")
		select {
		case <-cmd.Context().Done():
			return cmd.Context().Err()
		case <-time.After(watchPause):
		}
	}
}
