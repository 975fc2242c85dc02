//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestAuditOnAFullDisk: with no room for records nothing is decided, the reserve says so, and the member goes on by itself once
// there is room. Then somebody with the disk alters a record, and is found out with the bundle alone.
func TestAuditOnAFullDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=4m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	w := worldOf(t, 1, fmt.Sprintf("audit: {file: {dir: %q, max_size: 1048576, reserve: 65536}}\n", dir))
	w.admin("entry", "create", "-s", "k8s:ns:a", "--id", "spiffe://"+trustDomain+"/a")
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	for block := make([]byte, 1024); err == nil; {
		_, err = fill.Write(block)
	}
	fill.Close()
	end := time.Now().Add(time.Minute)
	var failed error
	for i := 0; failed == nil; i++ {
		if time.Now().After(end) {
			t.Fatal("a full disk stops nothing")
		}
		_, failed = w.Admin(w.ctx, "entry", "create", "-s", fmt.Sprintf("k8s:ns:b%d", i), "--id", fmt.Sprintf("spiffe://%s/b%d", trustDomain, i))
	}
	if !strings.Contains(failed.Error(), "audit") {
		t.Errorf("the operator is told: %v", failed)
	}
	if out := w.admin("status"); !strings.Contains(out, "is full") {
		t.Errorf("status does not say why nothing is issued: %s", out)
	}
	if err := os.Remove(fill.Name()); err != nil {
		t.Fatal(err)
	}
	for strings.Contains(w.admin("status"), "is full") {
		if time.Now().After(end) {
			t.Fatal("there is room, and it does not go on")
		}
		time.Sleep(50 * time.Millisecond)
	}
	w.admin("entry", "create", "-s", "k8s:ns:c", "--id", "spiffe://"+trustDomain+"/c")
	for _, action := range []string{"audit.full", "audit.recovered"} {
		if out := w.admin("audit", "query", "--action", action); !strings.Contains(out, action) {
			t.Errorf("no record of %s", action)
		}
	}
	if out := w.admin("audit", "tail", "-n", "5"); strings.Count(out, "\n") != 4 {
		t.Errorf("tail: %s", out)
	}
	w.admin("audit", "verify")
	bundle := filepath.Join(t.TempDir(), "bundle.pem")
	if err := os.WriteFile(bundle, []byte(w.admin("bundle", "show", "--format", "pem")), 0o600); err != nil {
		t.Fatal(err)
	}
	w.Members[0].Stop()
	verify := func(more ...string) (string, error) {
		return w.Members[0].Admin(w.ctx, w.Bin, append([]string{"audit", "verify", dir, "--bundle", bundle}, more...)...)
	}
	if out, err := verify(); err != nil || !strings.Contains(out, "nothing altered") || !strings.Contains(out, "0 are behind it") {
		t.Fatalf("%s %v", out, err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "audit-*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	raw, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(raw, []byte{'\n'})
	at := 0
	for i, l := range lines {
		if bytes.Contains(l, []byte("/c\"")) && bytes.Contains(l, []byte("create_entry")) {
			at = i
			break
		}
	}
	lines[at] = bytes.Replace(lines[at], []byte("k8s:ns:c"), []byte("k8s:ns:d"), 1)
	if err := os.WriteFile(files[0], bytes.Join(lines, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := verify(); err == nil || !strings.Contains(out+err.Error(), fmt.Sprintf("record %d altered", at+1)) || !strings.Contains(out+err.Error(), "covers it") {
		t.Fatalf("record %d is altered: %s %v", at+1, out, err)
	}
}
