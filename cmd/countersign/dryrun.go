package main

import (
	"context"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	adminv1 "countersign.io/countersign/api/admin/v1"
	"countersign.io/countersign/cmd/internal/cli"
)

// dryRun adds --dry-run to a command that changes whom the trust domain trusts.
func dryRun(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("dry-run", false, "check it, say what it would do, and change nothing")
}

// preview asks what a change would do, and prints it.
func (a *admin) preview(cmd *cobra.Command, f func(context.Context, adminv1.PreviewClient) (*adminv1.PreviewResponse, error)) error {
	return a.connect(cmd, func(ctx context.Context, conn *grpc.ClientConn) error {
		return a.previewOn(ctx, cmd, conn, f)
	})
}

func (a *admin) previewOn(ctx context.Context, cmd *cobra.Command, conn *grpc.ClientConn, f func(context.Context, adminv1.PreviewClient) (*adminv1.PreviewResponse, error)) error {
	res, err := f(ctx, adminv1.NewPreviewClient(conn))
	if err != nil {
		return err
	}
	return a.out.Print(cmd.OutOrStdout(), res, func() cli.Table {
		var t cli.Table
		for _, e := range res.Effects {
			t.Rows = append(t.Rows, []string{e})
		}
		t.Rows = append(t.Rows, []string{"nothing was changed (--dry-run)"})
		return t
	})
}

// named is a change of one thing by its name, or its preview.
func (a *admin) named(cmd *cobra.Command, dry bool, name string,
	change func(context.Context, adminv1.AdminClient, *adminv1.NameRequest) error,
	preview func(context.Context, adminv1.PreviewClient, *adminv1.NameRequest) (*adminv1.PreviewResponse, error)) error {
	req := &adminv1.NameRequest{Name: name}
	if dry {
		return a.preview(cmd, func(ctx context.Context, c adminv1.PreviewClient) (*adminv1.PreviewResponse, error) {
			return preview(ctx, c, req)
		})
	}
	return a.call(cmd, func(ctx context.Context, c adminv1.AdminClient) error { return change(ctx, c, req) })
}
