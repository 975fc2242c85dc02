package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const sourceURL = "https://countersign.io/countersign"

// makeImage builds the binaries of one product and assembles their index: for each architecture the image, then its bill of
// materials, which refers to the image by its digest.
func makeImage(ctx context.Context, o *options, p product) (v1.ImageIndex, error) {
	var images, boms []mutate.IndexAddendum
	for _, arch := range o.archs {
		binary, err := buildBinary(ctx, o, p, arch)
		if err != nil {
			return nil, err
		}
		img, err := imageOf(o, p, arch, binary)
		if err != nil {
			return nil, err
		}
		desc, err := partial.Descriptor(img)
		if err != nil {
			return nil, err
		}
		bom, err := bomOf(o, p, arch, binary, desc.Digest)
		if err != nil {
			return nil, fmt.Errorf("bill of materials for %s: %w", arch, err)
		}
		if err := os.WriteFile(filepath.Join(o.out, p.Name+"-"+arch+".cdx.json"), bom, 0o644); err != nil {
			return nil, fmt.Errorf("writing the bill of materials: %w", err)
		}
		artifact, err := newArtifact(bom, desc)
		if err != nil {
			return nil, err
		}
		images = append(images, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		// The platform that no machine has keeps runtimes from taking it for an image to run.
		boms = append(boms, mutate.IndexAddendum{Add: artifact, Descriptor: v1.Descriptor{
			ArtifactType: bomType, Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"},
		}})
	}
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	return mutate.AppendManifests(idx, slices.Concat(images, boms)...), nil
}

// buildBinary compiles one static binary, the same on every machine: no cgo, no paths, no state of the checkout, no flags from
// the environment, and the lowest level of the processor that the architecture has.
func buildBinary(ctx context.Context, o *options, p product, arch string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, p.Name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-mod=readonly",
		"-ldflags", "-s -w -buildid= -X main.version="+o.version, "-o", out, "./cmd/"+p.Name)
	cmd.Dir = o.root
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"GOFLAGS", "GOEXPERIMENT", "GODEBUG", "GOWORK", "GOFIPS140"}, name) || strings.HasPrefix(name, "CGO_")
	}), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0", "GOWORK=off")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("building for %s: %w\n%s", arch, err, log.Bytes())
	}
	return os.ReadFile(out)
}

// imageOf puts the layers together: what seldom changes first.
func imageOf(o *options, p product, arch string, binary []byte) (v1.Image, error) {
	base, err := baseLayer(p, o.created)
	if err != nil {
		return nil, err
	}
	top, err := layerOf([]entry{{path: p.Name, mode: 0o755, data: binary}}, o.created)
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	created := v1.Time{Time: o.created}
	if img, err = mutate.Append(img,
		mutate.Addendum{Layer: base, History: v1.History{Created: created, CreatedBy: "make image", Comment: "users, /tmp and roots"}},
		mutate.Addendum{Layer: top, History: v1.History{Created: created, CreatedBy: "make image", Comment: p.Name}},
	); err != nil {
		return nil, err
	}
	conf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	conf = conf.DeepCopy()
	conf.OS, conf.Architecture, conf.Created = "linux", arch, created
	conf.Config = v1.Config{
		User: p.User, Entrypoint: []string{"/" + p.Name}, WorkingDir: "/",
		Env: []string{"PATH=/"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    p.Title,
			"org.opencontainers.image.version":  o.version,
			"org.opencontainers.image.revision": o.revision,
			"org.opencontainers.image.created":  o.created.Format("2006-01-02T15:04:05Z"),
			"org.opencontainers.image.source":   sourceURL,
			"org.opencontainers.image.licenses": "Apache-2.0",
		},
	}
	return mutate.ConfigFile(img, conf)
}

// artifact is a manifest that is no image: one blob, about another manifest.
type artifact struct {
	manifest []byte
	blob     v1.Layer
}

// emptyJSON is the configuration of a manifest that has none (OCI image specification 1.1, "Guidance for an Empty Descriptor").
const emptyJSON = "{}"

func newArtifact(data []byte, subject *v1.Descriptor) (v1.Image, error) {
	layer := static.NewLayer(data, bomType)
	desc, err := partial.Descriptor(layer)
	if err != nil {
		return nil, err
	}
	conf := static.NewLayer([]byte(emptyJSON), "application/vnd.oci.empty.v1+json")
	confDesc, err := partial.Descriptor(conf)
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: bomType,
		Config: *confDesc, Layers: []v1.Descriptor{*desc},
		Subject: &v1.Descriptor{MediaType: subject.MediaType, Size: subject.Size, Digest: subject.Digest},
	})
	if err != nil {
		return nil, fmt.Errorf("encoding the manifest: %w", err)
	}
	return partial.CompressedToImage(&artifact{raw, layer})
}

func (a *artifact) RawConfigFile() ([]byte, error)      { return []byte(emptyJSON), nil }
func (a *artifact) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
func (a *artifact) RawManifest() ([]byte, error)        { return a.manifest, nil }
func (a *artifact) Compressed() (io.ReadCloser, error)  { return a.blob.Compressed() }
func (a *artifact) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	if own, err := a.blob.Digest(); err != nil || own != h {
		return nil, fmt.Errorf("no blob %s", h)
	}
	return a.blob, nil
}
