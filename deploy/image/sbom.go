package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// bomType is the media type of a bill of materials.
const bomType = "application/vnd.cyclonedx+json"

// bomOf lists what is in one image, by what its binary says of itself: every module that is linked, with version and checksum, and
// the Go release; and the web's roots, where the image has them. It names the image by its digest.
func bomOf(o *options, p product, arch string, binary []byte, image v1.Hash) ([]byte, error) {
	info, err := buildinfo.Read(bytes.NewReader(binary))
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(binary)
	main := cdx.Component{
		BOMRef: purl(info.Main.Path, o.version), Type: cdx.ComponentTypeApplication, Name: p.Name, Version: o.version,
		PackageURL: purl(info.Main.Path, o.version), Licenses: &cdx.Licenses{{License: &cdx.License{ID: "Apache-2.0"}}},
		Hashes:     &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum[:])}},
		Properties: &[]cdx.Property{{Name: "countersign:revision", Value: o.revision}, {Name: "countersign:architecture", Value: arch}},
	}
	components := []cdx.Component{component("std", info.GoVersion, "")}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		components = append(components, component(m.Path, m.Version, m.Sum))
	}
	if p.Roots {
		roots, err := ownDependency(rootsModule)
		if err != nil {
			return nil, err
		}
		c := component(roots.Path, roots.Version, roots.Sum)
		c.Type, c.Description = cdx.ComponentTypeData, "/etc/ssl/certs/ca-certificates.crt"
		components = append(components, c)
	}
	slices.SortFunc(components, func(a, b cdx.Component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
	refs := make([]string, len(components))
	for i, c := range components {
		refs[i] = c.BOMRef
	}
	bom := cdx.NewBOM()
	bom.SerialNumber = serial(image)
	bom.Metadata = &cdx.Metadata{Timestamp: o.created.Format("2006-01-02T15:04:05Z"), Component: &main,
		Properties: &[]cdx.Property{{Name: "countersign:image", Value: image.String()}}}
	bom.Components = &components
	bom.Dependencies = &[]cdx.Dependency{{Ref: main.BOMRef, Dependencies: &refs}}
	var out bytes.Buffer
	if err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false).EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func component(path, version, sum string) cdx.Component {
	c := cdx.Component{BOMRef: purl(path, version), Type: cdx.ComponentTypeLibrary, Name: path, Version: version, PackageURL: purl(path, version)}
	if sum != "" {
		c.Properties = &[]cdx.Property{{Name: "golang:sum", Value: sum}}
	}
	return c
}

// purl is a package URL of the type golang. Module paths and versions have no character that it would have to escape but "+".
func purl(path, version string) string {
	return "pkg:golang/" + path + "@" + strings.ReplaceAll(version, "+", "%2B")
}

// serial makes a UUID (version 8: of our own making, RFC 9562) of the image's digest, so that the same image has the same.
func serial(h v1.Hash) string {
	id := sha256.Sum256([]byte("countersign bill of materials " + h.String()))
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", id[0:4], id[4:6], id[6:8], id[8:10], id[10:16])
}

// ownDependency is a module that this program itself is built with.
func ownDependency(path string) (*debug.Module, error) {
	info, ok := debug.ReadBuildInfo()
	if ok {
		for _, m := range info.Deps {
			if m.Path == path {
				return m, nil
			}
		}
	}
	return nil, fmt.Errorf("%s is not in this program's build info", path)
}
