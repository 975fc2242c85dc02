package config

import (
	"errors"
	"os"
)

// Agent is the configuration of a node agent.
type Agent struct {
	Version     int      `yaml:"version"`      // of this file's format
	TrustDomain string   `yaml:"trust_domain"` // needed, but with a join token
	Servers     []string `yaml:"servers"`      // host:port of members, one at least; the others are learnt. A join token brings its own
	CAPin       string   `yaml:"ca_pin"`       // sha256:HEX of the CA's public key, from "countersign bundle show". A join token brings its own
	// instead of ca_pin: a file with the trust domain's X.509 authorities (PEM) or its bundle (SPIFFE JSON), read again at each first contact
	BundleFile string `yaml:"bundle_file"`

	Attest   AgentAttest   `yaml:"attest"`
	Socket   string        `yaml:"socket"`    // the Workload API
	StateDir string        `yaml:"state_dir"` // keeps live SVIDs over a restart; it must be on tmpfs; "none" switches it off
	Health   string        `yaml:"health"`    // host:port of /live, /ready and /metrics, plain HTTP
	KeyType  string        `yaml:"key_type"`  // of workloads' keys: ec-p256, ec-p384, ed25519 or rsa-2048
	Workload AgentWorkload `yaml:"workload"`
	CSI      *AgentCSI     `yaml:"csi"`
	Log      Log           `yaml:"log"`
}

// AgentAttest is how the agent proves its node: exactly one kind.
type AgentAttest struct {
	JoinTokenFile string      `yaml:"join_token_file"` // a file with the output of "countersign token create --agent"
	Kube          *AgentKube  `yaml:"kube"`
	X509Pop       *AgentCerts `yaml:"x509pop"`
}

// AgentKube attests with the agent pod's own service account token.
type AgentKube struct {
	Cluster   string `yaml:"cluster"`    // the name given to "countersign kube add"
	TokenPath string `yaml:"token_path"` // of the agent pod's own token
}

// AgentCerts attests with a certificate and proof of its key.
type AgentCerts struct {
	CertFile string `yaml:"cert_file"` // PEM, leaf first
	KeyFile  string `yaml:"key_file"`  // PEM, 0600
}

// AgentWorkload is how callers are told apart.
type AgentWorkload struct {
	TokenPath string `yaml:"token_path"` // of a pod's token, as the pod sees it
	SHA256    bool   `yaml:"sha256"`     // also hash each caller's binary (unix:sha256)
	Systemd   bool   `yaml:"systemd"`    // also tell each caller's systemd unit (systemd:unit)
}

// AgentCSI is the CSI driver for pods' volumes: its presence turns it on. It needs root, CAP_SYS_ADMIN, and both folders of the kubelet
// under the paths that they have on the host.
type AgentCSI struct {
	Socket          string `yaml:"socket"`           // of the driver, for the kubelet; its folder must be its own alone
	RegistrationDir string `yaml:"registration_dir"` // where the kubelet looks for drivers
	KubeletDir      string `yaml:"kubelet_dir"`      // the kubelet's --root-dir
	Dir             string `yaml:"dir"`              // one folder for each volume; on tmpfs, at the most 55 bytes, and its own alone
	Node            string `yaml:"node"`             // the node's name; default: the environment variable NODE_NAME
	Audience        string `yaml:"audience"`         // of the pods' tokens, as in tokenRequests of the CSIDriver object
}

func (c *AgentCSI) complete() {
	def(&c.Socket, DefaultKubeletDir+"/plugins/csi.countersign.io/csi.sock")
	def(&c.RegistrationDir, DefaultKubeletDir+"/plugins_registry")
	def(&c.KubeletDir, DefaultKubeletDir)
	def(&c.Dir, DefaultCSIDir)
	def(&c.Node, os.Getenv("NODE_NAME"))
	def(&c.Audience, DefaultAudience)
}

func (c *AgentCSI) check(f *faults) {
	f.absolute("csi.socket", c.Socket)
	f.absolute("csi.registration_dir", c.RegistrationDir)
	f.absolute("csi.kubelet_dir", c.KubeletDir)
	f.absolute("csi.dir", c.Dir)
	if c.Node == "" {
		f.add("csi.node is missing: the name of this node, or set the environment variable NODE_NAME to it")
	}
}

func (c *Agent) complete() {
	def(&c.Socket, DefaultAgentSocket)
	def(&c.StateDir, DefaultStateDir)
	def(&c.Health, "127.0.0.1:8081")
	def(&c.KeyType, "ec-p256")
	def(&c.Workload.TokenPath, DefaultTokenPath)
	if c.Attest.Kube != nil {
		def(&c.Attest.Kube.TokenPath, DefaultTokenPath)
	}
	if c.CSI != nil {
		c.CSI.complete()
	}
	c.Log.complete()
}

// Check reports every fault of an agent's values, joined.
func (c *Agent) Check() error {
	var f faults
	f.version(c.Version)
	join := c.Attest.JoinTokenFile != ""
	f.trustDomain(c.TrustDomain, !join)
	kinds := 0
	for _, set := range []bool{join, c.Attest.Kube != nil, c.Attest.X509Pop != nil} {
		if set {
			kinds++
		}
	}
	if kinds != 1 {
		f.add("attest: name exactly one of join_token_file, kube, x509pop (%d are set)", kinds)
	}
	if k := c.Attest.Kube; k != nil && k.Cluster == "" {
		f.add("attest.kube.cluster is missing: the name given to countersign kube add")
	}
	if x := c.Attest.X509Pop; x != nil && (x.CertFile == "" || x.KeyFile == "") {
		f.add("attest.x509pop: cert_file and key_file are both needed")
	}
	if !join && len(c.Servers) == 0 {
		f.add("servers is empty: name at least one member, host:port")
	}
	for _, s := range c.Servers {
		f.address("servers", s)
	}
	switch {
	case !join && c.CAPin == "" && c.BundleFile == "":
		f.add("ca_pin is missing: countersign bundle show prints it; or name a file with the bundle (bundle_file)")
	case c.BundleFile != "" && c.CAPin != "":
		f.add("ca_pin and bundle_file: leave one of the two out")
	case c.BundleFile != "" && join:
		f.add("bundle_file: the join token has the CA pin: leave bundle_file out")
	case c.BundleFile != "":
		f.absolute("bundle_file", c.BundleFile)
	}
	f.absolute("socket", c.Socket)
	if c.StateDir != "none" {
		f.absolute("state_dir", c.StateDir)
	}
	f.address("health", c.Health)
	switch c.KeyType {
	case "ec-p256", "ec-p384", "ed25519", "rsa-2048":
	default:
		f.add("key_type %q: want ec-p256, ec-p384, ed25519 or rsa-2048", c.KeyType)
	}
	f.absolute("workload.token_path", c.Workload.TokenPath)
	if c.CSI != nil {
		c.CSI.check(&f)
	}
	f.log(c.Log)
	return errors.Join(f.errs...)
}
