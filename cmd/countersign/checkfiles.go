package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/config"
)

// localConfig is a member's configuration and where it was read from.
type localConfig struct {
	path string
	*config.Server
}

// examineFiles looks at who may read and write what the member on this machine trusts. It opens nothing.
func examineFiles(r *checkReport, c *localConfig) {
	r.Examined = append(r.Examined, "files", "kek-here")
	f := fileCheck{r}
	f.writableByOthers(c.path, "who writes the configuration owns the member")
	f.private(c.DataDir, "everything the member keeps is in it")
	for _, name := range []string{"keyring", "member.json", "authorities.json", "kek"} {
		f.private(filepath.Join(c.DataDir, name), "it is the member's own")
	}
	if !c.Audit.File.Off {
		f.private(c.Audit.File.Dir, "the audit log names everybody")
	}
	f.private(c.AdminSocket, "who can connect to it and is the member's user, or root, has all power")
	f.writableByOthers(filepath.Dir(c.AdminSocket), "others could put a socket of their own there")
	if c.Backup.Dir != "" {
		f.writableByOthers(c.Backup.Dir, "others could take backups away, or put old ones there")
	}
	if c.JoinTokenFile != "" {
		f.private(c.JoinTokenFile, "a token that was not spent admits a member")
	}
	for _, key := range append([]string{c.Seal.Key, c.Backup.Key}, c.Seal.OldKeys...) {
		if path, ok := strings.CutPrefix(key, "file:"); ok {
			f.private(path, "it opens the member's keyring")
			f.beside(path, c.DataDir)
		}
	}
	for _, v := range []*config.Vault{c.Seal.Vault, vaultOf(c.CA.Upstream.Vault)} {
		if v == nil {
			continue
		}
		if v.TokenFile != "" {
			f.private(v.TokenFile, "it holds a token")
		}
		if v.AppRole != nil {
			f.private(v.AppRole.SecretIDFile, "it holds a secret")
		}
	}
	if d := c.CA.Upstream.Disk; d != nil && !strings.Contains(d.KeyFile, ":") {
		f.private(d.KeyFile, "it is the key of the authority above")
	}
	if s := c.Audit.Syslog; s != nil && s.KeyFile != "" {
		f.private(s.KeyFile, "it is a private key")
	}
}

func vaultOf(u *config.UpstreamVault) *config.Vault {
	if u == nil {
		return nil
	}
	return &u.Vault
}

type fileCheck struct{ r *checkReport }

func (f fileCheck) stat(path string) (os.FileInfo, bool) {
	info, err := os.Stat(path)
	switch {
	case err == nil:
		return info, true
	case errors.Is(err, fs.ErrNotExist):
		return nil, false // the member says so itself if it needs it
	}
	f.once(isWarning, "files", path, "it cannot be looked at: "+err.Error(), "run countersign check as the member's user, or as root")
	return nil, false
}

// once keeps a path that several settings name from being told of several times.
func (f fileCheck) once(severity, check, path, what, todo string) {
	for _, have := range f.r.Findings {
		if have.Check == check && have.Where == path {
			return
		}
	}
	f.r.find(severity, check, path, what, todo)
}

// private wants a file or folder that nobody but its owner can open.
func (f fileCheck) private(path, why string) {
	info, ok := f.stat(path)
	if !ok {
		return
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		f.once(isError, "files", path, fmt.Sprintf("others than its owner can open it (%#o): %s", mode, why), "chmod go= "+path)
	}
}

// writableByOthers wants a file or folder that only its owner can change, and that root or this process's user owns.
func (f fileCheck) writableByOthers(path, why string) {
	info, ok := f.stat(path)
	if !ok {
		return
	}
	if mode := info.Mode(); mode.Perm()&0o022 != 0 && mode&fs.ModeSticky == 0 {
		f.once(isError, "files", path, fmt.Sprintf("others can change it (%#o): %s", mode.Perm(), why), "chmod go-w "+path)
	}
}

// beside warns of a key on the file system of what it protects: a stolen disk has both.
func (f fileCheck) beside(key, data string) {
	var k, d unix.Stat_t
	if unix.Stat(key, &k) != nil || unix.Stat(data, &d) != nil || k.Dev != d.Dev {
		return
	}
	f.once(isWarning, "kek-here", key, "the key-encryption key is on the file system of what it protects ("+data+"): whoever has the disk has both", "put it on another, or name an HSM, a KMS or Vault (docs/SEALING.md)")
}
