package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"countersign.io/countersign/config"
	"countersign.io/countersign/deploy"
	"countersign.io/countersign/identity"
)

func installCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "install", Short: "Print what installs Countersign elsewhere"}
	cmd.AddCommand(installKube())
	return cmd
}

func installKube() *cobra.Command {
	var o deploy.Options
	var domain string
	var valueFiles, sets []string
	cmd := &cobra.Command{
		Use: "kube --trust-domain NAME", Short: "Print the objects that install Countersign on Kubernetes", Args: cobra.NoArgs,
		Long: `Print the objects that install Countersign on Kubernetes, for kubectl apply: members, agents, the CSI driver, and what each of them may do.
They are those of the Helm chart (deploy/chart), which this program carries, with the same values: docs/KUBERNETES.md explains them. It asks no
cluster, and the same values give the same output.`,
		Example: `  countersign install kube --trust-domain example.org | kubectl apply -f -
  countersign install kube --trust-domain example.org --set members.replicas=5 --set 'members.config={x509_ttl: 30m}' | kubectl diff -f -
  countersign install kube -f values.yaml --test | kubectl apply -f -     # a pod that fetches an SVID from its volume`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			values, err := installValues(cmd.InOrStdin(), domain, valueFiles, sets)
			if err != nil {
				return err
			}
			o.Values = values
			if version != "dev" {
				o.AppVersion = version
			}
			out, err := deploy.Render(o)
			if err != nil {
				return err
			}
			if err := checkInstalled(out); err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(out)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&domain, "trust-domain", "", "the first part of every identity, such as example.org; cannot be changed later")
	f.StringVarP(&o.Namespace, "namespace", "n", "countersign", "of members and agents")
	f.StringArrayVarP(&valueFiles, "values", "f", nil, "YAML file of values, - for standard input (repeatable; the last one wins)")
	f.StringArrayVar(&sets, "set", nil, "one value, KEY.PATH=VALUE, where VALUE is YAML (repeatable; over the files)")
	f.StringVar(&o.KubeVersion, "kube-version", "", "of the API server, for what older ones do not know (default the oldest that will do)")
	f.BoolVar(&o.NewSpace, "create-namespace", true, "print the namespace too, with the Pod Security label that its pods need")
	f.BoolVar(&o.CRDs, "crds", true, "print the definitions of our resources too")
	f.BoolVar(&o.Test, "test", false, "print nothing but a pod that fetches an SVID from its volume, as helm test does")
	return cmd
}

// checkInstalled parses the configurations among the objects as the pods will: what members.config and agent.config say is not the
// chart's to know, and a pod that refuses to start would say it later.
func checkInstalled(objects []byte) error {
	dec := yaml.NewDecoder(bytes.NewReader(objects))
	for {
		var o struct {
			Kind string            `yaml:"kind"`
			Data map[string]string `yaml:"data"`
		}
		err := dec.Decode(&o)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: what the values give is not YAML: %v", identity.ErrInvalid, err)
		}
		if o.Kind != "ConfigMap" {
			continue
		}
		// Each pod's name is its own, and so is each node's: one stands for all.
		if text, ok := o.Data["server.yaml"]; ok {
			err = checkFile("server.yaml, by the chart and members.config", text, func(c map[string]any) { c["name"] = "countersign-0" }, func(name string, raw []byte) error {
				_, err := config.ParseServer(name, raw)
				return err
			})
		}
		if text, ok := o.Data["agent.yaml"]; ok {
			err = checkFile("agent.yaml, by the chart and agent.config", text, func(c map[string]any) {
				if csi, ok := c["csi"].(map[string]any); ok {
					csi["node"] = "node"
				}
			}, func(name string, raw []byte) error {
				_, err := config.ParseAgent(name, raw)
				return err
			})
		}
		if err != nil {
			return err
		}
	}
}

func checkFile(name, text string, complete func(map[string]any), parse func(string, []byte) error) error {
	c := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		return fmt.Errorf("%w: %s: %v", identity.ErrInvalid, name, err)
	}
	complete(c)
	raw, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("%w: %s: %v", identity.ErrInvalid, name, err)
	}
	return parse(name, raw)
}

// installValues puts together what files and flags say, each over those before it.
func installValues(stdin io.Reader, domain string, valueFiles, sets []string) (map[string]any, error) {
	values := map[string]any{}
	for _, name := range valueFiles {
		v, err := readValues(stdin, name)
		if err != nil {
			return nil, fmt.Errorf("reading values from %s: %w", name, err)
		}
		values = deploy.Merge(values, v)
	}
	for _, s := range sets {
		var err error
		if values, err = deploy.Set(values, s); err != nil {
			return nil, fmt.Errorf("--set: %w", err)
		}
	}
	if domain != "" {
		values = deploy.Merge(values, map[string]any{"trustDomain": domain})
	}
	if d, _ := values["trustDomain"].(string); d == "" {
		return nil, fmt.Errorf("%w: --trust-domain is needed, such as example.org: the first part of every identity", identity.ErrInvalid)
	}
	return values, nil
}

func readValues(stdin io.Reader, name string) (map[string]any, error) {
	if name == "-" {
		return deploy.ReadValues(stdin)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return deploy.ReadValues(f)
}
