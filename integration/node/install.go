package node

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// Installation is Countersign on a node, by its chart.
type Installation struct {
	Countersign string // a program of this machine's, which renders the chart
	Programs    string // folder of the static programs countersign and countersign-agent
	TrustDomain string
	Members     int
	Set         []string // more values, as of countersign install kube
}

// Install makes images of the programs, applies what countersign install kube prints, and waits until the members and the agent
// are ready.
func (n *Node) Install(ctx context.Context, i Installation) error {
	image := func(name, user string) Image {
		return Image{Name: "node.test/" + name + ":it", Programs: []string{filepath.Join(i.Programs, name)}, Entrypoint: []string{"/" + name}, User: user}
	}
	if err := n.Build(ctx, image("countersign", "65532:65532"), image("countersign-agent", "")); err != nil {
		return err
	}
	if err := n.Volumes(ctx, i.Members); err != nil {
		return err
	}
	manifest, err := i.Render(ctx)
	if err != nil {
		return err
	}
	if err := n.Apply(ctx, manifest); err != nil {
		return err
	}
	if _, err := n.WaitReady(ctx, "countersign", "app.kubernetes.io/name=countersign", i.Members); err != nil {
		return err
	}
	_, err = n.WaitReady(ctx, "countersign", "app.kubernetes.io/name=countersign-agent", 1)
	return err
}

// Render is what Install applies, with more arguments of countersign install kube.
func (i Installation) Render(ctx context.Context, more ...string) (string, error) {
	args := []string{"install", "kube", "--trust-domain", i.TrustDomain}
	for _, set := range append([]string{
		"image.registry=node.test", "image.tag=it", fmt.Sprint("members.replicas=", i.Members), "members.antiAffinity=preferred",
	}, i.Set...) {
		args = append(args, "--set", set)
	}
	args = append(args, more...)
	var errs strings.Builder
	cmd := exec.CommandContext(ctx, i.Countersign, args...)
	cmd.Stderr = &errs
	manifest, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("countersign %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return string(manifest), nil
}
