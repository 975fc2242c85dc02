//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	adminv1 "countersign.io/countersign/api/admin/v1"
)

// TestBackupOnAFullDisk: what does not fit leaves what was there, and nothing half.
func TestBackupOnAFullDisk(t *testing.T) {
	w := worldOf(t, 1, "")
	small := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=128k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	file := filepath.Join(small, "backup")
	w.admin("backup", "save", file)
	c, closeConn, err := w.Members[0].AdminConn()
	if err != nil {
		t.Fatal(err)
	}
	defer closeConn()
	for i := range 60 {
		var names []string
		for j := range 30 {
			names = append(names, fmt.Sprintf("n%d.%s.%s.internal", j, strings.Repeat("x", 60), strings.Repeat("y", 60)))
		}
		if _, err := c.CreateEntry(w.ctx, &adminv1.Entry{SpiffeId: fmt.Sprintf("spiffe://%s/w/%d", trustDomain, i), Selectors: []string{fmt.Sprintf("k8s:ns:n%d", i)}, DnsNames: names}); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"backup", "save", file + "2"}, {"backup", "save", file, "--force"}} {
		if _, err := w.Admin(w.ctx, args...); err == nil || !strings.Contains(err.Error(), "no space left on device") {
			t.Errorf("%v: %v", args, err)
		}
		list, err := os.ReadDir(small)
		if err != nil || len(list) != 1 {
			t.Errorf("%v left %v, %v", args, list, err)
		}
		w.admin("backup", "inspect", file)
	}
	// The member restores onto no full disk either.
	p := newPlace(t, "ca-1", "")
	if err := os.RemoveAll(file); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(p.Member.Dir, "large")
	w.admin("backup", "save", large)
	p.yaml = strings.Replace(p.yaml, p.data(""), filepath.Join(small, "data"), 1)
	p.configure(t, "seal: {key: 'file:"+p.Member.Dir+"/kek'}\nbackup: {key: 'file:"+filepath.Join(w.Members[0].Dir, "data", "kek")+"'}\n")
	conf := filepath.Join(p.Member.Dir, "server.yaml")
	p.refused(t, exitFailure, []string{"no space left on device"}, "countersign", "backup", "restore", large, "-c", conf)
	p.refused(t, exitFailure, []string{"a restore of a backup broke off"}, "countersign", "server", "run", "-c", conf)
}
