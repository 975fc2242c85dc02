package csi

import (
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"

	"countersign.io/countersign/attestor"
	"countersign.io/countersign/identity"
)

// What the kubelet puts into a volume's context, besides the attributes of the pod's own.
const (
	kubeletKeys      = "csi.storage.k8s.io/"
	ephemeralKey     = kubeletKeys + "ephemeral"
	podNameKey       = kubeletKeys + "pod.name"
	podNamespaceKey  = kubeletKeys + "pod.namespace"
	podUIDKey        = kubeletKeys + "pod.uid"
	podAccountKey    = kubeletKeys + "serviceAccount.name"
	tokensKey        = kubeletKeys + "serviceAccount.tokens"
	maxContextValues = 64
)

// The attributes of a volume.
const (
	filesAttribute = "files"
	jwtAttribute   = "jwtAudiences"
	waitAttribute  = "wait"
	maxJWTs        = 8
)

// The forms of what names something; lengths apart, since a count in an expression costs each agent memory.
var (
	isVolumeIDForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	isUIDForm      = regexp.MustCompile(`^[0-9a-f]+-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+$`)
	isLabelForm    = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	isNameForm     = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$`)
	isAudienceForm = regexp.MustCompile(`^[!-+\--~]+$`) // printable ASCII without space and comma
)

func isVolumeID(s string) bool { return len(s) <= 128 && isVolumeIDForm.MatchString(s) }
func isLabel(s string) bool    { return len(s) <= 63 && isLabelForm.MatchString(s) }
func isName(s string) bool     { return len(s) <= 253 && isNameForm.MatchString(s) }
func isJWTName(s string) bool  { return len(s) <= 63 && isVolumeIDForm.MatchString(s) }
func isAudience(s string) bool { return len(s) <= 512 && isAudienceForm.MatchString(s) }

// isUID is RFC 9562's form, as API servers write it.
func isUID(s string) bool {
	return len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' && isUIDForm.MatchString(s)
}

// pod is whose volume it is, as the kubelet says.
type pod struct {
	UID            string `json:"uid"`
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"service_account"`
}

func (p pod) check() error {
	for _, f := range []struct {
		key, value string
		form       func(string) bool
	}{
		{podUIDKey, p.UID, isUID}, {podNameKey, p.Name, isName}, {podNamespaceKey, p.Namespace, isLabel}, {podAccountKey, p.ServiceAccount, isName},
	} {
		if f.value == "" {
			return fmt.Errorf("%w: the volume context has no %s: the CSIDriver object must have podInfoOnMount: true", identity.ErrInvalid, f.key)
		}
		if !f.form(f.value) {
			return fmt.Errorf("%w: the volume context's %s %s is not well formed", identity.ErrInvalid, f.key, quote(f.value))
		}
	}
	return nil
}

// quote shows a value that may be anything.
func quote(s string) string {
	if len(s) > 80 {
		s = s[:80] + "..."
	}
	return strconv.QuoteToASCII(s)
}

// jwtFile is a file with a JWT-SVID.
type jwtFile struct {
	Name     string `json:"name"` // the file is jwt-NAME
	Audience string `json:"audience"`
}

// wanted is a volume as a pod asks for it.
type wanted struct {
	ID     string    `json:"id"`
	Pod    pod       `json:"pod"`
	Volume string    `json:"volume"` // its name in the pod
	Files  bool      `json:"files"`
	JWTs   []jwtFile `json:"jwts"`
	Wait   bool      `json:"wait"`
	Group  *int      `json:"group"` // of the files: the pod's fsGroup
}

func (w *wanted) place() place { return place{podUID: w.Pod.UID, volume: w.Volume} }

// same reports whether two are one and the same volume.
func (w *wanted) same(o *wanted) bool {
	group := func(g *int) int {
		if g == nil {
			return -1
		}
		return *g
	}
	return w.ID == o.ID && w.Pod == o.Pod && w.Volume == o.Volume && w.Files == o.Files && w.Wait == o.Wait &&
		group(w.Group) == group(o.Group) && slices.Equal(w.JWTs, o.JWTs)
}

// check is for what comes from a record: what a request is checked for as well.
func (w *wanted) check() error {
	if err := checkVolumeID(w.ID); err != nil {
		return err
	}
	if err := w.Pod.check(); err != nil {
		return err
	}
	if !isLabel(w.Volume) {
		return fmt.Errorf("%w: the volume's name %s is not well formed", identity.ErrInvalid, quote(w.Volume))
	}
	if len(w.JWTs) > maxJWTs || len(w.JWTs) > 0 && !w.Files {
		return fmt.Errorf("%w: %d JWT-SVIDs: at the most %d, and only with files", identity.ErrInvalid, len(w.JWTs), maxJWTs)
	}
	for _, j := range w.JWTs {
		if !isJWTName(j.Name) || !isAudience(j.Audience) {
			return fmt.Errorf("%w: file %s for audience %s: not well formed", identity.ErrInvalid, quote(j.Name), quote(j.Audience))
		}
	}
	return nil
}

func checkVolumeID(id string) error {
	if id == "" {
		return fmt.Errorf("%w: the volume ID is missing", identity.ErrInvalid)
	}
	if !isVolumeID(id) {
		return fmt.Errorf("%w: the volume ID %s is not well formed: want 1 to 128 letters, digits, '.', '_' and '-'", identity.ErrInvalid, quote(id))
	}
	return nil
}

// parsePublish reads a request and refuses what is missing, unknown or contradictory. The token is the caller's to wipe.
func (d *Driver) parsePublish(req *csispec.NodePublishVolumeRequest) (*wanted, []byte, error) {
	w := &wanted{ID: req.GetVolumeId(), Wait: true}
	if err := checkVolumeID(w.ID); err != nil {
		return nil, nil, err
	}
	at, err := d.parseTarget(req.GetTargetPath())
	if err != nil {
		return nil, nil, err
	}
	if w.Group, err = checkCapability(req); err != nil {
		return nil, nil, err
	}
	values := req.GetVolumeContext()
	if len(values) > maxContextValues {
		return nil, nil, fmt.Errorf("%w: the volume context has %d values: at the most %d", identity.ErrInvalid, len(values), maxContextValues)
	}
	if values[ephemeralKey] != "true" {
		return nil, nil, fmt.Errorf("%w: only inline volumes of a pod (spec.volumes[].csi) are served: the volume context's %s is %s, not \"true\"", identity.ErrInvalid, ephemeralKey, quote(values[ephemeralKey]))
	}
	w.Pod = pod{UID: values[podUIDKey], Name: values[podNameKey], Namespace: values[podNamespaceKey], ServiceAccount: values[podAccountKey]}
	if err := w.Pod.check(); err != nil {
		return nil, nil, err
	}
	if at.podUID != w.Pod.UID {
		return nil, nil, fmt.Errorf("%w: the target path is of pod %s, and the volume context's %s is %s", identity.ErrInvalid, at.podUID, podUIDKey, w.Pod.UID)
	}
	w.Volume = at.volume
	if err := w.attributes(values); err != nil {
		return nil, nil, err
	}
	token, err := d.tokenOf(w.Pod, values, req.GetSecrets())
	return w, token, err
}

// parseTarget takes the one form that the kubelet's target paths have.
func (d *Driver) parseTarget(path string) (place, error) {
	if path == "" {
		return place{}, fmt.Errorf("%w: the target path is missing", identity.ErrInvalid)
	}
	bad := fmt.Errorf("%w: the target path %s is not %s/pods/UID/volumes/kubernetes.io~csi/NAME/mount (is csi.kubelet_dir the kubelet's --root-dir?)", identity.ErrInvalid, quote(path), d.cfg.KubeletDir)
	rest, ok := strings.CutPrefix(path, filepath.Join(d.cfg.KubeletDir, "pods")+"/")
	if !ok {
		return place{}, bad
	}
	p := strings.Split(rest, "/")
	if len(p) != 5 || p[1] != "volumes" || p[2] != "kubernetes.io~csi" || p[4] != "mount" || !isUID(p[0]) || !isLabel(p[3]) {
		return place{}, bad
	}
	return place{podUID: p[0], volume: p[3]}, nil
}

// checkCapability checks how the volume is to be mounted, and returns the group that its files are to have.
func checkCapability(req *csispec.NodePublishVolumeRequest) (*int, error) {
	bad := func(format string, args ...any) (*int, error) {
		return nil, fmt.Errorf("%w: "+format, append([]any{identity.ErrInvalid}, args...)...)
	}
	c := req.GetVolumeCapability()
	switch {
	case c == nil:
		return bad("the volume capability is missing")
	case c.GetMount() == nil:
		return bad("the volume's access type must be mount")
	case c.GetMount().GetFsType() != "":
		return bad("fsType %s: the volume has no file system of its own: leave it out", quote(c.GetMount().GetFsType()))
	case len(c.GetMount().GetMountFlags()) > 0:
		return bad("mount flags are not taken: leave them out")
	case req.GetStagingTargetPath() != "" || len(req.GetPublishContext()) > 0:
		return bad("a staging path or publish context belongs to a persistent volume, and only inline ones are served")
	}
	switch c.GetAccessMode().GetMode() {
	case csispec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csispec.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
		csispec.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER, csispec.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
	default:
		return bad("access mode %s: want a single node's", c.GetAccessMode().GetMode())
	}
	if !req.GetReadonly() {
		return bad("the volume must be readOnly: true (spec.volumes[].csi.readOnly)")
	}
	group := c.GetMount().GetVolumeMountGroup()
	if group == "" {
		return nil, nil
	}
	n, err := strconv.ParseUint(group, 10, 32)
	if err != nil || strconv.FormatUint(n, 10) != group || n >= 1<<31-1 {
		return bad("the volume mount group %s is no group's number", quote(group))
	}
	gid := int(n)
	return &gid, nil
}

// attributes reads those of the pod's own. A key of the kubelet's that is not known here is let pass: a newer one may say more, and it
// gives nothing.
func (w *wanted) attributes(values map[string]string) error {
	flag := func(key, value string) (bool, error) {
		if value != "true" && value != "false" {
			return false, fmt.Errorf("%w: volume attribute %s is %s: want \"true\" or \"false\"", identity.ErrInvalid, key, quote(value))
		}
		return value == "true", nil
	}
	var unknown []string
	var err error
	for _, key := range slices.Sorted(maps.Keys(values)) {
		value := values[key]
		switch key {
		case filesAttribute:
			w.Files, err = flag(key, value)
		case waitAttribute:
			w.Wait, err = flag(key, value)
		case jwtAttribute:
			w.JWTs, err = parseJWTs(value)
		default:
			if !strings.HasPrefix(key, kubeletKeys) {
				unknown = append(unknown, quote(key))
			}
		}
		if err != nil {
			return err
		}
	}
	if len(unknown) > 0 {
		return fmt.Errorf("%w: unknown volume attributes %s: want %s, %s or %s", identity.ErrInvalid, strings.Join(unknown, ", "), filesAttribute, jwtAttribute, waitAttribute)
	}
	if len(w.JWTs) > 0 && !w.Files {
		return fmt.Errorf("%w: volume attribute %s needs %s: \"true\": it names files", identity.ErrInvalid, jwtAttribute, filesAttribute)
	}
	return nil
}

// parseJWTs reads the audiences that there are to be files for, with commas between: NAME=AUDIENCE makes the file jwt-NAME, and
// AUDIENCE alone, where it is a name as well, jwt-AUDIENCE.
func parseJWTs(value string) ([]jwtFile, error) {
	items := strings.Split(value, ",")
	if len(items) > maxJWTs {
		return nil, fmt.Errorf("%w: volume attribute %s names %d audiences: at the most %d", identity.ErrInvalid, jwtAttribute, len(items), maxJWTs)
	}
	var out []jwtFile
	for _, item := range items {
		name, audience, ok := strings.Cut(item, "=")
		if !ok {
			audience = name
		}
		if !isJWTName(name) || !isAudience(audience) {
			return nil, fmt.Errorf("%w: volume attribute %s: %s: want AUDIENCE or NAME=AUDIENCE, the name of at the most 63 letters, digits, '.', '_' and '-', the audience without spaces and commas",
				identity.ErrInvalid, jwtAttribute, quote(item))
		}
		if slices.ContainsFunc(out, func(j jwtFile) bool { return j.Name == name }) {
			return nil, fmt.Errorf("%w: volume attribute %s names %s twice", identity.ErrInvalid, jwtAttribute, quote(name))
		}
		out = append(out, jwtFile{Name: name, Audience: audience})
	}
	return out, nil
}

// tokenOf finds the pod's token for our audience, in the volume context or, from kubelets that are told to, in the secrets, and checks
// that it says to be of this pod. Who says so is for a member to verify.
func (d *Driver) tokenOf(p pod, values, secrets map[string]string) ([]byte, error) {
	for _, key := range slices.Sorted(maps.Keys(secrets)) {
		if key != tokensKey {
			return nil, fmt.Errorf("%w: the volume takes no secrets (%s): leave nodePublishSecretRef out", identity.ErrInvalid, quote(key))
		}
	}
	fromContext, inContext := values[tokensKey]
	fromSecrets, inSecrets := secrets[tokensKey]
	if inContext && inSecrets {
		return nil, fmt.Errorf("%w: tokens both in the volume context and in the secrets: a pod must not name the attribute %s", identity.ErrInvalid, tokensKey)
	}
	if !inContext && !inSecrets {
		return nil, fmt.Errorf("%w: the kubelet handed over no token: the CSIDriver object must have tokenRequests with the audience %q", identity.ErrInvalid, d.cfg.Audience)
	}
	token, err := parseTokens(fromContext+fromSecrets, d.cfg.Audience)
	if err != nil {
		return nil, err
	}
	c, err := attestor.ReadClaims(token)
	if err == nil {
		err = matches(c, p, d.cfg.Audience)
	}
	if err != nil {
		clear(token)
		return nil, err
	}
	return token, nil
}

// matches says in what a token is not the pod's.
func matches(c attestor.Claims, p pod, audience string) error {
	if !slices.Contains(c.Audience, audience) {
		return fmt.Errorf("%w: the token that was handed over is not for the audience %q", identity.ErrUnauthenticated, audience)
	}
	for _, f := range []struct{ what, token, pod string }{
		{"pod UID", c.PodUID, p.UID}, {"pod", c.PodName, p.Name}, {"namespace", c.Namespace, p.Namespace}, {"service account", c.ServiceAccount, p.ServiceAccount},
	} {
		if f.token != f.pod {
			return fmt.Errorf("%w: the token that was handed over is another pod's: its %s is %s, the volume's %s", identity.ErrUnauthenticated, f.what, quote(f.token), quote(f.pod))
		}
	}
	return nil
}
