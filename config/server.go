package config

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"countersign.io/countersign/identity"
)

// Server is the configuration of a member.
type Server struct {
	Version     int    `yaml:"version"`      // of this file's format
	TrustDomain string `yaml:"trust_domain"` // needed; such as example.org
	Name        string `yaml:"name"`         // of the member, unique in the cluster, part of its SPIFFE ID; fixed once it has data
	DataDir     string `yaml:"data_dir"`     // everything the member keeps; it must be its own alone (0700)
	Listen      string `yaml:"listen"`       // the one TLS port for members, agents and agentless pods
	Advertise   string `yaml:"advertise"`    // host:port by which the others reach it
	AdminSocket string `yaml:"admin_socket"` // for operators on this machine: root and the member's own user
	Health      string `yaml:"health"`       // host:port of /live, /ready and /metrics, plain HTTP
	// a file with the output of "countersign token create --server"; without it, and without data, the member begins a new cluster
	JoinTokenFile string        `yaml:"join_token_file"`
	X509TTL       time.Duration `yaml:"x509_ttl"`      // lifetime of X.509-SVIDs whose entry names none, 5s to 24h
	JWTTTL        time.Duration `yaml:"jwt_ttl"`       // lifetime of JWT-SVIDs whose entry names none, 5s to 24h
	MaxStaleness  time.Duration `yaml:"max_staleness"` // how long the member issues without hearing from a leader; default x509_ttl
	CA            CA            `yaml:"ca"`
	Seal          Seal          `yaml:"seal"`
	Admin         Admins        `yaml:"admin"`
	Cluster       Cluster       `yaml:"cluster"`
	Kubernetes    Kubernetes    `yaml:"kubernetes"`
	Audit         Audit         `yaml:"audit"`
	Backup        Backup        `yaml:"backup"`
	X509Pop       X509Pop       `yaml:"x509pop"`
	Public        Public        `yaml:"public"`
	Federation    Federation    `yaml:"federation"`
	OIDC          OIDC          `yaml:"oidc"`
	Log           Log           `yaml:"log"`
}

// The values of ca.rotation.
const (
	RotationAuto   = "auto"
	RotationManual = "manual"
)

// CA sets how the first authorities are made; it changes nothing once they are.
type CA struct {
	TTL          time.Duration `yaml:"ttl"`           // lifetime of the authorities that the cluster makes for itself
	JWTAlgorithm string        `yaml:"jwt_algorithm"` // ES256 or RS256
	// URI of the x509 authority's key in a KMS or HSM that every member can use, such as pkcs11:..., named on every member; empty: the cluster makes one and keeps it sealed
	Key string `yaml:"key"`
	// URIs of keys in the KMS or HSM that the authority had before, until it is rotated away from them
	OldKeys  []string `yaml:"old_keys"`
	Rotation string   `yaml:"rotation"` // auto: prepare the next authority at half of the life of one, and let it sign at five sixths; or manual
	Upstream Upstream `yaml:"upstream"`
}

// Upstream puts the x509 authority below an existing one: at the most one kind. It must be the same on every member.
type Upstream struct {
	Disk        *UpstreamDisk        `yaml:"disk"`
	Vault       *UpstreamVault       `yaml:"vault"`
	Countersign *UpstreamCountersign `yaml:"countersign"`
	Google      *UpstreamGoogle      `yaml:"google"`
}

// UpstreamDisk is a certificate authority in files, read again when they change.
type UpstreamDisk struct {
	CertFile  string `yaml:"cert_file"`  // PEM, the signing certificate first, then what leads to the root
	KeyFile   string `yaml:"key_file"`   // PEM, 0600; or the URI of a KMS or HSM key
	RootsFile string `yaml:"roots_file"` // PEM; needed unless cert_file ends with a self-signed root
}

// UpstreamVault is the PKI engine of Vault or OpenBao.
type UpstreamVault struct {
	Vault `yaml:",inline"`
	PKI   string `yaml:"pki"` // mount of the PKI engine
}

// UpstreamCountersign is another Countersign cluster of the same trust domain.
type UpstreamCountersign struct {
	Servers []string `yaml:"servers"` // host:port of its members
	Socket  string   `yaml:"socket"`  // the Workload API of its agent on this machine, which gives the member its downstream identity
}

// UpstreamGoogle is a certificate authority of Google Cloud CAS; only in builds with the tag gcp.
type UpstreamGoogle struct {
	Authority   string `yaml:"authority"`        // projects/P/locations/L/caPools/C/certificateAuthorities/A
	Credentials string `yaml:"credentials_file"` // empty: those of the machine
}

// Vault is how to reach a Vault or OpenBao, and as whom: exactly one way to log in.
type Vault struct {
	Address    string           `yaml:"address"` // https://host:port
	CAFile     string           `yaml:"ca_file"` // PEM; empty: the system's roots
	Namespace  string           `yaml:"namespace"`
	TokenFile  string           `yaml:"token_file"` // a file with a token, which is renewed; 0600
	AppRole    *VaultAppRole    `yaml:"approle"`
	Kubernetes *VaultKubernetes `yaml:"kubernetes"`
}

// VaultAppRole logs in by AppRole.
type VaultAppRole struct {
	Mount        string `yaml:"mount"` // default approle
	RoleID       string `yaml:"role_id"`
	SecretIDFile string `yaml:"secret_id_file"`
}

// VaultKubernetes logs in by this pod's service account token.
type VaultKubernetes struct {
	Mount     string `yaml:"mount"` // default kubernetes
	Role      string `yaml:"role"`
	TokenPath string `yaml:"token_path"`
}

// Seal is what the member's keyring is wrapped under on its disk.
type Seal struct {
	Key     string   `yaml:"key"`      // URI of the key-encryption key; default file:DATA_DIR/kek
	OldKeys []string `yaml:"old_keys"` // tried where key does not open the keyring, which is then wrapped under key
	Vault   *Vault   `yaml:"vault"`    // for transit: keys
}

// Admins are who may administer the cluster with an SVID, beside those whom entries make admins (docs/ADMIN.md). It should be the
// same on every member: each goes by its own.
type Admins struct {
	IDs []AdminID `yaml:"ids"`
}

// AdminID is one of them.
type AdminID struct {
	ID   string `yaml:"id"`   // SPIFFE ID of the trust domain
	Role string `yaml:"role"` // reader, operator or security
}

// Cluster is how the members find and keep each other.
type Cluster struct {
	Peers           []string      `yaml:"peers"`             // host:port at which some members may be found, should all have moved since they last met
	RemoveDeadAfter time.Duration `yaml:"remove_dead_after"` // how long a member is not heard before it is removed, never below quorum; "never" is -1s
}

// Audit is where decisions are recorded before they take effect.
type Audit struct {
	File     *AuditFile    `yaml:"file"` // default: in data_dir
	Stdout   bool          `yaml:"stdout"`
	Syslog   *AuditSyslog  `yaml:"syslog"`
	Deadline time.Duration `yaml:"deadline"` // how long a decision waits for its record; after it, it is refused
}

// AuditFile are files in a folder of their own.
type AuditFile struct {
	Dir       string        `yaml:"dir"`        // default: audit in data_dir
	MaxSize   int64         `yaml:"max_size"`   // bytes of one file
	Keep      time.Duration `yaml:"keep"`       // how long a full file is kept
	KeepBytes int64         `yaml:"keep_bytes"` // how much all files may have; the oldest go first. 0: at most 80 % of the file system that holds dir, as it is at the start
	Reserve   int64         `yaml:"reserve"`    // bytes held back on the disk, to tell what happened when it is full
	Off       bool          `yaml:"off"`        // no files: another sink must be set
}

// AuditSyslog is a collector that speaks RFC 5424 over TLS (RFC 5425).
type AuditSyslog struct {
	Address  string `yaml:"address"` // host:port
	CAFile   string `yaml:"ca_file"`
	CertFile string `yaml:"cert_file"` // of this member towards it; empty: none
	KeyFile  string `yaml:"key_file"`
	Required bool   `yaml:"required"` // a decision also waits for this sink
}

// Backup are scheduled snapshots of the cluster's state on this member's disk.
type Backup struct {
	Dir   string        `yaml:"dir"` // empty: none
	Every time.Duration `yaml:"every"`
	Keep  int           `yaml:"keep"` // how many
	Key   string        `yaml:"key"`  // URI of the key that opens backups; default seal.key
}

// X509Pop lets agents attest with certificates of an existing PKI.
type X509Pop struct {
	CAFile      string `yaml:"ca_file"`      // PEM certificates of the PKI by which agents may attest; empty: none may
	KubeCluster string `yaml:"kube_cluster"` // then the certificate's common name is the agent's node in this cluster
}

func (c *Server) complete() {
	host, _ := os.Hostname()
	def(&c.Name, strings.ToLower(host))
	def(&c.DataDir, DefaultDataDir)
	def(&c.Listen, "0.0.0.0:"+DefaultPort)
	c.Kubernetes.complete()
	def(&c.Advertise, c.Kubernetes.advertised(c.Name, c.Listen))
	if c.Advertise == "" {
		if h, p, err := net.SplitHostPort(c.Listen); err == nil {
			if ip := net.ParseIP(h); h == "" || ip != nil && ip.IsUnspecified() {
				h = host
			}
			c.Advertise = net.JoinHostPort(h, p)
		}
	}
	def(&c.AdminSocket, DefaultAdminSocket)
	def(&c.Health, "127.0.0.1:8080")
	defDuration(&c.X509TTL, identity.DefaultX509TTL)
	defDuration(&c.JWTTTL, identity.DefaultJWTTL)
	defDuration(&c.MaxStaleness, c.X509TTL)
	defDuration(&c.CA.TTL, 365*24*time.Hour)
	def(&c.CA.JWTAlgorithm, "ES256")
	def(&c.CA.Rotation, RotationAuto)
	def(&c.Seal.Key, "file:"+filepath.Join(c.DataDir, "kek"))
	defDuration(&c.Cluster.RemoveDeadAfter, 24*time.Hour)
	c.Seal.Vault.complete()
	if v := c.CA.Upstream.Vault; v != nil {
		v.complete()
		def(&v.PKI, "pki")
	}
	if u := c.CA.Upstream.Countersign; u != nil {
		def(&u.Socket, DefaultAgentSocket)
	}
	c.Audit.complete(c.DataDir)
	defDuration(&c.Backup.Every, 24*time.Hour)
	if c.Backup.Keep == 0 {
		c.Backup.Keep = 7
	}
	def(&c.Backup.Key, c.Seal.Key)
	c.OIDC.complete(&c.Public)
	c.Public.complete(c.Advertise)
	defDuration(&c.Federation.RefreshHint, identity.DefaultRefreshHint)
	c.Log.complete()
}

func (a *Audit) complete(dataDir string) {
	if a.File == nil {
		a.File = &AuditFile{}
	}
	def(&a.File.Dir, filepath.Join(dataDir, "audit"))
	if a.File.MaxSize == 0 {
		a.File.MaxSize = 64 << 20
	}
	if a.File.Reserve == 0 {
		a.File.Reserve = 8 << 20
	}
	defDuration(&a.File.Keep, 90*24*time.Hour)
	defDuration(&a.Deadline, 2*time.Second)
}

// Check reports every fault of a member's values, joined.
func (c *Server) Check() error {
	var f faults
	f.version(c.Version)
	f.trustDomain(c.TrustDomain, true)
	if err := spiffeid.ValidatePathSegment(c.Name); err != nil {
		f.add("name %q: a member's name is part of its SPIFFE ID: %v", c.Name, err)
	}
	f.absolute("data_dir", c.DataDir)
	f.absolute("admin_socket", c.AdminSocket)
	f.address("listen", c.Listen)
	f.address("advertise", c.Advertise)
	if h, _, err := net.SplitHostPort(c.Advertise); err == nil {
		if ip := net.ParseIP(h); ip != nil && ip.IsUnspecified() {
			f.add("advertise %q: the others cannot reach an unspecified address; name one", c.Advertise)
		}
	}
	f.address("health", c.Health)
	f.ttl("x509_ttl", c.X509TTL, identity.MinTTL, identity.MaxX509TTL)
	f.ttl("jwt_ttl", c.JWTTTL, identity.MinTTL, identity.MaxJWTTL)
	f.ttl("max_staleness", c.MaxStaleness, time.Second, 7*24*time.Hour)
	f.ttl("ca.ttl", c.CA.TTL, time.Hour, 10*365*24*time.Hour)
	if c.CA.JWTAlgorithm != "ES256" && c.CA.JWTAlgorithm != "RS256" {
		f.add("ca.jwt_algorithm %q: want ES256 or RS256", c.CA.JWTAlgorithm)
	}
	c.CA.Upstream.check(&f, c.CA.Key)
	c.Admin.check(&f, c.TrustDomain)
	if c.CA.Rotation != RotationAuto && c.CA.Rotation != RotationManual {
		f.add("ca.rotation: %q: want auto or manual", c.CA.Rotation)
	}
	for i, uri := range c.CA.OldKeys {
		f.uri(fmt.Sprintf("ca.old_keys[%d]", i), uri)
	}
	if len(c.CA.OldKeys) > 0 && c.CA.Key == "" {
		f.add("ca.old_keys: without ca.key there is no key to rotate to: name it")
	}
	c.Seal.check(&f)
	for _, p := range c.Cluster.Peers {
		f.address("cluster.peers", p)
	}
	if d := c.Cluster.RemoveDeadAfter; d > 0 && d < time.Minute {
		f.add("cluster.remove_dead_after is %v: it must be at least 1m, or -1s for never", d)
	}
	c.Kubernetes.check(&f, c.Name, c.JoinTokenFile)
	c.Audit.check(&f)
	if c.Backup.Dir != "" {
		f.absolute("backup.dir", c.Backup.Dir)
		f.ttl("backup.every", c.Backup.Every, time.Minute, 365*24*time.Hour)
	}
	if c.Backup.Keep < 1 || c.Backup.Keep > 10000 {
		f.add("backup.keep is %d: it must be from 1 to 10000", c.Backup.Keep)
	}
	f.uri("backup.key", c.Backup.Key)
	if c.X509Pop.CAFile == "" && c.X509Pop.KubeCluster != "" {
		f.add("x509pop.kube_cluster without x509pop.ca_file")
	}
	c.Public.check(&f)
	c.OIDC.check(&f)
	f.ttl("federation.refresh_hint", c.Federation.RefreshHint, time.Second, 24*time.Hour)
	if c.Federation.WebCAFile != "" {
		f.absolute("federation.web_ca_file", c.Federation.WebCAFile)
	}
	f.log(c.Log)
	return errors.Join(f.errs...)
}

// uri wants a key's URI, and nothing in it that must not be seen: it is shown beside what it wraps.
func (f *faults) uri(field, uri string) {
	scheme, rest, ok := strings.Cut(uri, ":")
	switch {
	case !ok || scheme == "" || rest == "":
		f.add("%s %q: want the URI of a key, such as file:/etc/countersign/kek or pkcs11:token=...", field, uri)
	case scheme == "file" && !filepath.IsAbs(rest):
		f.add("%s %q: the path must be absolute", field, uri)
	case strings.Contains(uri, "pin-value="):
		f.add("%s holds a PIN: put it into a file (0600) and name that as pin-source=/path", field)
	}
}

func (a *Admins) check(f *faults, trustDomain string) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	seen := map[string]bool{}
	for _, x := range a.IDs {
		if err == nil {
			if _, err := identity.ParseWorkloadID(td, x.ID); err != nil {
				f.add("admin.ids: %v", err)
			}
		}
		if _, err := identity.ParseAdminRole(x.Role); err != nil {
			f.add("admin.ids: %s: %v", x.ID, err)
		}
		if seen[x.ID] {
			f.add("admin.ids: %s is there twice", x.ID)
		}
		seen[x.ID] = true
	}
}

func (s *Seal) check(f *faults) {
	f.uri("seal.key", s.Key)
	for _, k := range s.OldKeys {
		f.uri("seal.old_keys", k)
	}
	if s.Vault != nil {
		s.Vault.check(f, "seal.vault")
	}
}

func (u *Upstream) check(f *faults, key string) {
	kinds := 0
	for _, set := range []bool{u.Disk != nil, u.Vault != nil, u.Countersign != nil, u.Google != nil} {
		if set {
			kinds++
		}
	}
	if kinds > 1 {
		f.add("ca.upstream: name at the most one of disk, vault, countersign, google (%d are set)", kinds)
	}
	if key != "" && kinds > 0 {
		f.add("ca.key: with ca.upstream the cluster makes the authority's key, and keeps it sealed: leave one of the two out")
	}
	if key != "" {
		f.uri("ca.key", key)
		if strings.HasPrefix(key, "file:") {
			f.add("ca.key %q: a key in a file is what the seal is for: leave ca.key out, or name a KMS or HSM", key)
		}
	}
	if d := u.Disk; d != nil {
		f.absolute("ca.upstream.disk.cert_file", d.CertFile)
		if !strings.Contains(d.KeyFile, ":") {
			f.absolute("ca.upstream.disk.key_file", d.KeyFile)
		}
		if d.RootsFile != "" {
			f.absolute("ca.upstream.disk.roots_file", d.RootsFile)
		}
	}
	if v := u.Vault; v != nil {
		v.check(f, "ca.upstream.vault")
	}
	if c := u.Countersign; c != nil {
		f.absolute("ca.upstream.countersign.socket", c.Socket)
		if len(c.Servers) == 0 {
			f.add("ca.upstream.countersign.servers is empty: name at least one member of the cluster above, host:port")
		}
		for _, a := range c.Servers {
			f.address("ca.upstream.countersign.servers", a)
		}
	}
	if g := u.Google; g != nil && g.Authority == "" {
		f.add("ca.upstream.google.authority is missing: projects/P/locations/L/caPools/C/certificateAuthorities/A")
	}
}

func (v *Vault) complete() {
	if v == nil {
		return
	}
	if v.AppRole != nil {
		def(&v.AppRole.Mount, "approle")
	}
	if v.Kubernetes != nil {
		def(&v.Kubernetes.Mount, "kubernetes")
		def(&v.Kubernetes.TokenPath, "/var/run/secrets/kubernetes.io/serviceaccount/token")
	}
}

func (v *Vault) check(f *faults, field string) {
	if !strings.HasPrefix(v.Address, "https://") {
		f.add("%s.address %q: want https://host:port", field, v.Address)
	}
	ways := 0
	for _, set := range []bool{v.TokenFile != "", v.AppRole != nil, v.Kubernetes != nil} {
		if set {
			ways++
		}
	}
	if ways != 1 {
		f.add("%s: name exactly one of token_file, approle, kubernetes (%d are set)", field, ways)
	}
	if v.TokenFile != "" {
		f.absolute(field+".token_file", v.TokenFile)
	}
	if a := v.AppRole; a != nil && (a.RoleID == "" || a.SecretIDFile == "") {
		f.add("%s.approle: role_id and secret_id_file are both needed", field)
	}
	if k := v.Kubernetes; k != nil && k.Role == "" {
		f.add("%s.kubernetes.role is missing", field)
	}
}

func (a *Audit) check(f *faults) {
	f.ttl("audit.deadline", a.Deadline, 100*time.Millisecond, time.Minute)
	if a.File.Off && !a.Stdout && a.Syslog == nil {
		f.add("audit: file.off leaves no sink: a decision whose record cannot be written is not made; set stdout or syslog")
	}
	if !a.File.Off {
		f.absolute("audit.file.dir", a.File.Dir)
		if a.File.MaxSize < 1<<20 || a.File.MaxSize > 1<<40 {
			f.add("audit.file.max_size is %d: it must be from 1048576 bytes", a.File.MaxSize)
		}
		if a.File.Reserve < 1<<16 || a.File.KeepBytes < 0 || a.File.KeepBytes != 0 && a.File.KeepBytes < 2*a.File.MaxSize {
			f.add("audit.file: reserve must be at least 65536 bytes, and keep_bytes 0 or at least twice max_size")
		}
		f.ttl("audit.file.keep", a.File.Keep, time.Hour, 100*365*24*time.Hour)
	}
	if s := a.Syslog; s != nil {
		f.address("audit.syslog.address", s.Address)
		if (s.CertFile == "") != (s.KeyFile == "") {
			f.add("audit.syslog: cert_file and key_file go together")
		}
	}
}
