package node

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"time"
)

// Image is a container image of static programs and nothing else.
type Image struct {
	Name       string   // with a tag
	Programs   []string // files of this machine, each put into the root folder
	Entrypoint []string
	User       string // "uid:gid"; empty: root
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Write writes the image as an OCI image layout in a tar archive (OCI image specification 1.1), as containerd imports it.
func (i Image) Write(w io.Writer) error {
	layer, err := i.layer()
	if err != nil {
		return fmt.Errorf("making image %s: %w", i.Name, err)
	}
	out := tar.NewWriter(w)
	blob := func(kind string, data []byte) descriptor {
		sum := fmt.Sprintf("%x", sha256.Sum256(data))
		if err == nil {
			err = addFile(out, "blobs/sha256/"+sum, 0o644, data)
		}
		return descriptor{MediaType: kind, Digest: "sha256:" + sum, Size: len(data)}
	}
	object := func(kind string, v any) descriptor {
		data, e := json.Marshal(v)
		if e != nil && err == nil {
			err = e
		}
		return blob(kind, data)
	}
	const oci = "application/vnd.oci.image."
	l := blob(oci+"layer.v1.tar", layer)
	config := object(oci+"config.v1+json", map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": i.Entrypoint, "User": i.User, "Env": []string{"PATH=/"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{l.Digest}},
	})
	manifest := object(oci+"manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": oci + "manifest.v1+json", "config": config, "layers": []descriptor{l},
	})
	manifest.Annotations = map[string]string{"io.containerd.image.name": i.Name, "org.opencontainers.image.ref.name": i.Name}
	index, e := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": oci + "index.v1+json", "manifests": []descriptor{manifest}})
	if e != nil && err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("making image %s: %w", i.Name, err)
	}
	if err := addFile(out, "index.json", 0o644, index); err != nil {
		return err
	}
	if err := addFile(out, "oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	return out.Close()
}

func (i Image) layer() ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, dir := range []string{"dev/", "etc/", "proc/", "run/", "sys/", "tmp/", "var/"} {
		mode := int64(0o755)
		if dir == "tmp/" {
			mode = 0o1777
		}
		if err := w.WriteHeader(&tar.Header{Name: dir, Mode: mode, Typeflag: tar.TypeDir, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
	}
	for _, p := range i.Programs {
		data, err := os.ReadFile(p)
		if err != nil {
			return nil, err
		}
		if err := addFile(w, path.Base(p), 0o755, data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func addFile(w *tar.Writer, name string, mode int64, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}
