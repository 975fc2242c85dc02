package csi

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"countersign.io/countersign/identity"
)

func seeds(f *testing.F, name string) {
	f.Helper()
	if found, err := filepath.Glob("testdata/fuzz/" + name + "/*"); err != nil || len(found) < 3 {
		f.Fatalf("found %d seeds: %v", len(found), err)
	}
}

// FuzzPublish: whatever the attributes and the target, a request is refused, or it is for the pod of its own target path and token, and its
// record says the same again.
func FuzzPublish(f *testing.F) {
	seeds(f, "FuzzPublish")
	d := &Driver{cfg: Config{KubeletDir: "/var/lib/kubelet", Audience: "countersign"}}
	w := &world{dir: "/var/lib"}
	f.Fuzz(func(t *testing.T, id, target, key, value, jwts, group string) {
		r := w.request(1, filesAttribute, "true")
		r.VolumeId = id
		if target != "" {
			r.TargetPath = target
		}
		if jwts != "" {
			r.VolumeContext[jwtAttribute] = jwts
		}
		r.VolumeCapability.GetMount().VolumeMountGroup = group
		r.VolumeContext[key] = value
		got, token, err := d.parsePublish(r)
		if err != nil {
			if got != nil && token != nil {
				t.Error("an error, and a token")
			}
			return
		}
		if !strings.HasPrefix(r.TargetPath, "/var/lib/kubelet/pods/"+got.Pod.UID+"/volumes/kubernetes.io~csi/"+got.Volume+"/") || strings.Contains(r.TargetPath, "..") {
			t.Errorf("target %q of %+v", r.TargetPath, got)
		}
		if len(token) == 0 || len(token) > identity.MaxTokenBytes {
			t.Errorf("a token of %d bytes", len(token))
		}
		for _, j := range got.JWTs {
			if filepath.Base(jwtPrefix+j.Name) != jwtPrefix+j.Name || len(j.Audience) > identity.MaxAudienceBytes {
				t.Errorf("%+v", j)
			}
		}
		data, err := json.Marshal(record{recordVersion, *got})
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseRecord(data)
		if err != nil || !again.same(got) {
			t.Errorf("%s: %+v, %v", data, again, err)
		}
	})
}

// FuzzTokens: no part of what was given is in an error, and what is returned was in it.
func FuzzTokens(f *testing.F) {
	seeds(f, "FuzzTokens")
	f.Fuzz(func(t *testing.T, value string) {
		token, err := parseTokens(value, "countersign")
		if (err == nil) == (len(token) == 0) {
			t.Errorf("%q: %q, %v", value, token, err)
		}
		if err == nil && (len(token) > identity.MaxTokenBytes || !strings.Contains(value, string(token))) {
			t.Errorf("%q: %q", value, token)
		}
	})
}

// FuzzRecord: a record that is read is one that a request could have made.
func FuzzRecord(f *testing.F) {
	seeds(f, "FuzzRecord")
	f.Fuzz(func(t *testing.T, data []byte) {
		w, err := parseRecord(data)
		if (err == nil) != (w != nil) {
			t.Fatalf("%+v, %v", w, err)
		}
		if err == nil {
			if err := w.check(); err != nil || strings.ContainsAny(w.Pod.UID+w.Volume+nameOf(w.ID), "/.") {
				t.Errorf("%+v, %v", w, err)
			}
		}
	})
}
