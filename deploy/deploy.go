// Package deploy is the Helm chart, embedded, and renders it as Helm does: for those who have no Helm, and for tests. It asks no
// cluster.
package deploy

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
	"text/template"

	"github.com/Masterminds/semver/v3"
	"github.com/Masterminds/sprig/v3"
	"sigs.k8s.io/yaml"

	"countersign.io/countersign/identity"
)

//go:embed all:chart
var files embed.FS

// Options are what the chart's objects depend on.
type Options struct {
	Release     string         // of Helm; a label of all objects. Default countersign
	Namespace   string         // of members and agents. Default countersign
	KubeVersion string         // of the API server, such as 1.37.2. Default the oldest that the chart is for
	AppVersion  string         // the images' tag where the values name none. Default the chart's own
	Values      map[string]any // over the chart's own values.yaml; null takes one of those away
	CRDs        bool           // the definitions of resources too
	NewSpace    bool           // the namespace too, with the Pod Security label that the pods in it need
	Test        bool           // instead of all else: the pod of helm test
}

// chartFile is Chart.yaml, and the template's .Chart.
type chartFile struct {
	Name        string `json:"name"`
	Version     string `json:"version"`
	AppVersion  string `json:"appVersion"`
	KubeVersion string `json:"kubeVersion"`
}

// oldest is the first release of Kubernetes that the chart is for: its kubeVersion.
const oldest = "1.30.0"

// Render returns the objects as YAML documents, in the order in which Helm installs them, and byte for byte what helm template
// prints. An error wraps identity.ErrInvalid where the values are at fault, and names each of them.
func Render(o Options) ([]byte, error) {
	chart, values, err := prepare(&o)
	if err != nil {
		return nil, err
	}
	manifests, err := execute(&o, chart, values)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if o.NewSpace && !o.Test {
		out.WriteString(namespaceOf(&o, values))
	}
	if o.CRDs && !o.Test {
		if err := writeCRDs(&out, chart); err != nil {
			return nil, err
		}
	}
	for _, m := range manifests {
		if m.test == o.Test {
			fmt.Fprintf(&out, "---\n# Source: %s\n%s\n", m.source, m.text)
		}
	}
	return out.Bytes(), nil
}

func prepare(o *Options) (*chartFile, map[string]any, error) {
	orDefault(&o.Release, "countersign")
	orDefault(&o.Namespace, "countersign")
	if !regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`).MatchString(o.Namespace) {
		return nil, nil, fmt.Errorf("%w: %q does not have the form of a namespace", identity.ErrInvalid, o.Namespace)
	}
	var chart chartFile
	if err := decode("Chart.yaml", &chart); err != nil {
		return nil, nil, err
	}
	if o.KubeVersion == "" {
		o.KubeVersion = oldest
	}
	v, err := semver.NewVersion(o.KubeVersion)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %q does not have the form of a Kubernetes version, such as 1.37.2", identity.ErrInvalid, o.KubeVersion)
	}
	if c, err := semver.NewConstraint(chart.KubeVersion); err != nil || !c.Check(v) {
		return nil, nil, fmt.Errorf("%w: Kubernetes %s: the chart is for %s", identity.ErrInvalid, o.KubeVersion, chart.KubeVersion)
	}
	o.KubeVersion = "v" + v.String()
	if o.AppVersion != "" {
		chart.AppVersion = o.AppVersion
	}
	values := map[string]any{}
	if err := decode("values.yaml", &values); err != nil {
		return nil, nil, err
	}
	values = merge(values, o.Values)
	return &chart, values, checkValues(values)
}

func orDefault(s *string, to string) {
	if *s == "" {
		*s = to
	}
}

func decode(name string, into any) error {
	raw, err := files.ReadFile("chart/" + name)
	if err != nil {
		return fmt.Errorf("reading the embedded chart: %w", err)
	}
	if err := yaml.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("reading the embedded chart's %s: %w", name, err)
	}
	return nil
}

// merge lays over on base, neither of which it changes. A list replaces a list; null takes away what is below it.
func merge(base, over map[string]any) map[string]any {
	out := make(map[string]any, len(base))
	for k, v := range base {
		if m, ok := v.(map[string]any); ok {
			v = merge(m, nil)
		}
		out[k] = v
	}
	for k, v := range over {
		below, isMap := out[k].(map[string]any)
		switch m, ok := v.(map[string]any); {
		case v == nil:
			delete(out, k)
		case ok && isMap:
			out[k] = merge(below, m)
		default:
			out[k] = v
		}
	}
	return out
}

// manifest is one object.
type manifest struct {
	source string // the template's name
	kind   string
	test   bool // of helm test
	text   string
}

// execute renders every template, splits what comes of them into objects, and sorts these as Helm does: by kind, and within one kind as
// they come in the order of the templates' names.
func execute(o *Options, chart *chartFile, values map[string]any) ([]manifest, error) {
	t, names, err := parse(chart)
	if err != nil {
		return nil, err
	}
	data := map[string]any{
		"Values": values, "Chart": chart,
		"Capabilities": map[string]any{"KubeVersion": map[string]any{"Version": o.KubeVersion}},
		"Release":      map[string]any{"Name": o.Release, "Namespace": o.Namespace, "Service": "Helm", "IsInstall": true, "IsUpgrade": false, "Revision": 1},
	}
	var out []manifest
	for _, name := range names {
		if base := path.Base(name); strings.HasPrefix(base, "_") || base == "NOTES.txt" {
			continue
		}
		var text strings.Builder
		if err := t.ExecuteTemplate(&text, name, data); err != nil {
			return nil, fmt.Errorf("%w: rendering the chart: %v", identity.ErrInvalid, err)
		}
		list, err := split(name, text.String())
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
	}
	slices.SortStableFunc(out, func(a, b manifest) int { return compareKinds(a.kind, b.kind) })
	return out, nil
}

// parse reads the templates with the functions that they may use. The names that it returns are sorted.
func parse(chart *chartFile) (*template.Template, []string, error) {
	t := template.New("chart").Option("missingkey=zero")
	funcs := sprig.HermeticTxtFuncMap() // nothing of the environment, the clock or chance: the same values give the same objects
	funcs["toYaml"] = func(v any) (string, error) {
		raw, err := yaml.Marshal(v)
		return strings.TrimSuffix(string(raw), "\n"), err
	}
	funcs["include"] = func(name string, data any) (string, error) {
		var text strings.Builder
		err := t.ExecuteTemplate(&text, name, data)
		return text.String(), err
	}
	t.Funcs(funcs)
	var names []string
	err := fs.WalkDir(files, "chart/templates", func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := files.ReadFile(file)
		if err != nil {
			return err
		}
		name := chart.Name + strings.TrimPrefix(file, "chart")
		names = append(names, name)
		_, err = t.New(name).Parse(string(raw))
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("reading the embedded chart's templates: %w", err)
	}
	slices.Sort(names)
	return t, names, nil
}

// split parts what one template gave into its objects.
func split(name, text string) ([]manifest, error) {
	var out []manifest
	for _, doc := range regexp.MustCompile(`(?:^|\s*\n)---\s*`).Split(strings.TrimSpace(text), -1) {
		doc = strings.TrimSpace(doc)
		if doc == "" {
			continue
		}
		var head struct {
			Kind     string `json:"kind"`
			Metadata struct {
				Annotations map[string]string `json:"annotations"`
			} `json:"metadata"`
		}
		if err := yaml.Unmarshal([]byte(doc), &head); err != nil {
			return nil, fmt.Errorf("%w: what the values make of the chart's %s is not YAML: %v", identity.ErrInvalid, name, err)
		}
		if head.Kind == "" {
			return nil, fmt.Errorf("what the values make of the chart's %s has no kind: %w", name, errors.ErrUnsupported)
		}
		hook := head.Metadata.Annotations["helm.sh/hook"]
		if hook != "" && hook != "test" {
			return nil, fmt.Errorf("the chart's %s is a hook %q, and no more than helm test is known: %w", name, hook, errors.ErrUnsupported)
		}
		out = append(out, manifest{source: name, kind: head.Kind, test: hook == "test", text: doc})
	}
	return out, nil
}

// compareKinds says which kind Helm installs first. Kinds that it does not know come last, by name.
func compareKinds(a, b string) int {
	order := []string{
		"PriorityClass", "Namespace", "NetworkPolicy", "ResourceQuota", "LimitRange", "PodDisruptionBudget", "ServiceAccount", "Secret", "ConfigMap",
		"StorageClass", "PersistentVolume", "PersistentVolumeClaim", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "Role",
		"RoleBinding", "Service", "DaemonSet", "Pod", "Deployment", "StatefulSet", "Job", "CronJob",
	}
	rank := func(kind string) int {
		if i := slices.Index(order, kind); i >= 0 {
			return i
		}
		return len(order)
	}
	if d := rank(a) - rank(b); d != 0 || rank(a) < len(order) {
		return d
	}
	return strings.Compare(a, b)
}

func writeCRDs(out *bytes.Buffer, chart *chartFile) error {
	names, err := fs.Glob(files, "chart/crds/*.yaml")
	if err != nil {
		return err
	}
	for _, name := range names {
		raw, err := files.ReadFile(name)
		if err != nil {
			return fmt.Errorf("reading the embedded chart: %w", err)
		}
		fmt.Fprintf(out, "---\n# Source: %s\n%s\n", chart.Name+strings.TrimPrefix(name, "chart"), raw)
	}
	return nil
}

// namespaceOf is the namespace's own object. Agents need what Pod Security calls privileged; members alone need nothing of it.
func namespaceOf(o *Options, values map[string]any) string {
	level := "restricted"
	if agent, ok := values["agent"].(map[string]any); ok && agent["enabled"] == true {
		level = "privileged"
	}
	return fmt.Sprintf(`---
apiVersion: v1
kind: Namespace
metadata:
  name: %s
  labels:
    app.kubernetes.io/part-of: countersign
    pod-security.kubernetes.io/enforce: %s
`, o.Namespace, level)
}
