package deploy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/text/language"
	"golang.org/x/text/message"
	"sigs.k8s.io/yaml"

	"countersign.io/countersign/identity"
)

// maxValues bounds a file of values.
const maxValues = 1 << 20

// ReadValues parses a file of values: one YAML mapping. A key that is there twice is an error.
func ReadValues(r io.Reader) (map[string]any, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxValues+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxValues {
		return nil, fmt.Errorf("%w: it is larger than %d bytes", identity.ErrInvalid, maxValues)
	}
	out := map[string]any{}
	if err := yaml.UnmarshalStrict(raw, &out); err != nil {
		return nil, fmt.Errorf("%w: it is not a YAML mapping: %v", identity.ErrInvalid, err)
	}
	return out, nil
}

// Merge lays values over others, as -f after -f does. Neither is changed.
func Merge(base, over map[string]any) map[string]any {
	out := merge(base, nil)
	for k, v := range over {
		if v == nil {
			out[k] = nil // it must still take away what the chart has
			continue
		}
		m, ok := v.(map[string]any)
		if below, isMap := out[k].(map[string]any); ok && isMap {
			out[k] = Merge(below, m)
			continue
		}
		out[k] = v
	}
	return out
}

// Set is one value from a command line: KEY.PATH=VALUE, where VALUE is YAML, such as 3, true, text, [a, b] or null.
func Set(values map[string]any, setting string) (map[string]any, error) {
	key, text, ok := strings.Cut(setting, "=")
	keys := strings.Split(key, ".")
	if !ok || slices.Contains(keys, "") {
		return nil, fmt.Errorf("%w: %q: want KEY.PATH=VALUE, such as members.replicas=5", identity.ErrInvalid, setting)
	}
	var v any
	if err := yaml.UnmarshalStrict([]byte(text), &v); err != nil {
		return nil, fmt.Errorf("%w: %s: %q is not a YAML value: %v", identity.ErrInvalid, key, text, err)
	}
	if text == "" {
		v = "" // the empty text: null is written as such
	}
	slices.Reverse(keys)
	for _, k := range keys {
		v = map[string]any{k: v}
	}
	return Merge(values, v.(map[string]any)), nil
}

// checkValues goes by the chart's values.schema.json. Its error names every fault, and where it is.
func checkValues(values map[string]any) error {
	raw, err := files.ReadFile("chart/values.schema.json")
	if err != nil {
		return fmt.Errorf("reading the embedded chart: %w", err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("reading the embedded chart's schema: %w", err)
	}
	c := jsonschema.NewCompiler()
	c.UseLoader(jsonschema.SchemeURLLoader{}) // it refers to nothing else, and nothing is fetched
	if err := c.AddResource("values.schema.json", doc); err != nil {
		return fmt.Errorf("reading the embedded chart's schema: %w", err)
	}
	schema, err := c.Compile("values.schema.json")
	if err != nil {
		return fmt.Errorf("reading the embedded chart's schema: %w", err)
	}
	// As JSON: the schema's numbers are JSON's.
	asJSON, err := yaml.Marshal(values)
	if err == nil {
		asJSON, err = yaml.YAMLToJSON(asJSON)
	}
	if err != nil {
		return fmt.Errorf("%w: the values: %v", identity.ErrInvalid, err)
	}
	instance, err := jsonschema.UnmarshalJSON(bytes.NewReader(asJSON))
	if err != nil {
		return fmt.Errorf("%w: the values: %v", identity.ErrInvalid, err)
	}
	err = schema.Validate(instance)
	var fault *jsonschema.ValidationError
	if !errors.As(err, &fault) {
		return err
	}
	p := message.NewPrinter(language.English)
	var faults []string
	var walk func(*jsonschema.ValidationError)
	walk = func(e *jsonschema.ValidationError) {
		if len(e.Causes) == 0 {
			where := strings.Join(e.InstanceLocation, ".")
			if where == "" {
				where = "the values"
			}
			faults = append(faults, where+": "+e.ErrorKind.LocalizedString(p))
		}
		for _, c := range e.Causes {
			walk(c)
		}
	}
	walk(fault)
	if t, _ := values["trustDomain"].(string); t == "" {
		return fmt.Errorf("%w: trustDomain is missing: name the trust domain, such as example.org", identity.ErrInvalid)
	}
	return fmt.Errorf("%w: values: %s", identity.ErrInvalid, strings.Join(faults, "; "))
}
