package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/config"
	"countersign.io/countersign/identity"
	"countersign.io/countersign/internal/durable"
	"countersign.io/countersign/raft"
)

func recoverCommand() *cobra.Command {
	var file, confirm string
	cmd := &cobra.Command{
		Use: "recover -c FILE", Short: "Make this member a cluster of its own: for when a majority is lost for good", Args: cobra.NoArgs,
		Long: `Make the member of this configuration a cluster of its own, with the data that it has: for when a majority of the members is
lost for good. The member must be stopped. It says what it will do, and asks for the member's name before it does it.

What the others acknowledged and this member has not heard of is lost. The others must never run with their old data again:
a majority of them would be the old cluster, and both would issue (split brain). docs/OPERATIONS.md says what to do before and after.`,
		Example: "  countersign cluster recover -c /etc/countersign/server.yaml\n  countersign cluster recover -c /etc/countersign/server.yaml --confirm ca-2",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			return recoverMember(c, confirm, cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&file, "config", "c", "/etc/countersign/server.yaml", "configuration file of the member")
	cmd.Flags().StringVar(&confirm, "confirm", "", "the member's name, in place of asking for it")
	_ = cmd.MarkFlagRequired("config")
	return cmd
}

// recoverMember changes nothing before the name is confirmed, and holds the folder's lock all the time.
func recoverMember(c *config.Server, confirm string, in io.Reader, out io.Writer) (err error) {
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return fmt.Errorf("%w: trust_domain: %v", identity.ErrInvalid, err)
	}
	d := &dataDir{path: c.DataDir, td: td}
	raw, err := durable.ReadPrivateFile(d.file("member.json"), maxStateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: data_dir %s holds no member: name the configuration of the one to recover", identity.ErrPrecondition, c.DataDir)
	}
	if err != nil {
		return fmt.Errorf("opening data_dir: %w", err)
	}
	if err := d.check(raw, c); err != nil {
		return err
	}
	if d.lock, err = durable.Lock(d.file("lock")); err != nil {
		return fmt.Errorf("opening data_dir: the member is running: %w", err)
	}
	defer func() { err = errors.Join(err, d.lock.Close()) }()
	changed := false
	err = raft.Recover(raft.RecoverConfig{Dir: d.file("raft"), ID: c.Name, Address: c.Advertise, Confirm: func(r raft.Recovery) error {
		explain(out, c, r)
		if err := confirmed(c.Name, confirm, in, out); err != nil {
			return err
		}
		changed = true
		return nil
	}})
	if err != nil {
		return err
	}
	if !changed {
		fmt.Fprintf(out, "%s is a cluster of its own already: nothing was changed.\n", c.Name)
		return nil
	}
	fmt.Fprintf(out, `
%s is a cluster of its own now. Next:
  countersign server run        as you run it always: it leads alone
  countersign cluster status    it is healthy, and may not fail
Then empty the data_dirs of the members that were given up, and join each again with a new token (countersign token create --server).
`, c.Name)
	return nil
}

// explain says what will happen, in full, before anything does.
func explain(out io.Writer, c *config.Server, r raft.Recovery) {
	fmt.Fprintf(out, `This makes member %s of trust domain %s a cluster of its own, from the data in %s.

It keeps everything in its log, up to entry %d of term %d. At the end of it there may be changes that were never acknowledged: they
take effect. Changes that were acknowledged by a majority that %s was not part of are lost.

These members are given up:
`, c.Name, c.TrustDomain, c.DataDir, r.Last, r.Term, c.Name)
	for _, m := range r.Members {
		if m.ID == c.Name {
			continue
		}
		vote := ""
		if !m.Voter {
			vote = ", which has no vote"
		}
		fmt.Fprintf(out, "  %s at %s%s\n", m.ID, m.Address, vote)
	}
	fmt.Fprintf(out, `
They must be off, and must never run with their old data again. If a majority of them does, there are two clusters of one name
(split brain): both issue identities, and who is banned in one is not in the other. If they can come back, do not go on: start them
instead.

`)
}

// confirmed wants the member's name, typed or given.
func confirmed(name, given string, in io.Reader, out io.Writer) error {
	if given == "" {
		fmt.Fprintf(out, "Type the member's name (%s) to go on: ", name)
		line, err := bufio.NewReader(io.LimitReader(in, 4096)).ReadString('\n')
		fmt.Fprintln(out)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("reading the confirmation: %w", err)
		}
		given = strings.TrimSpace(line)
	}
	if given != name {
		return fmt.Errorf("%w: not confirmed: the member is %s, not %q: nothing was changed", identity.ErrPrecondition, name, given)
	}
	return nil
}
