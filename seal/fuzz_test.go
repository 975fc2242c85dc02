package seal

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// A fuzz test whose corpus is missing still passes: this one does not.
func TestFuzzSeedsExist(t *testing.T) {
	for _, name := range []string{"FuzzParseKeyring", "FuzzParseKeyringFile", "FuzzOpen"} {
		if files, err := os.ReadDir(filepath.Join("testdata", "fuzz", name)); err != nil || len(files) < 2 {
			t.Errorf("%s has %d seeds, %v", name, len(files), err)
		}
	}
}

func FuzzParseKeyring(f *testing.F) {
	f.Add(keyring(f).Plain())
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := ParseKeyring(b)
		if err == nil && !bytes.Equal(k.Plain(), b) {
			t.Error("parsing and writing changed the keyring")
		}
	})
}

func FuzzParseKeyringFile(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := parseKeyringFile(b)
		if (k == nil) == (err == nil) {
			t.Error("neither a file nor an error")
		}
	})
}

// Nobody without the key makes a ciphertext that opens.
func FuzzOpen(f *testing.F) {
	k := keyring(f)
	f.Fuzz(func(t *testing.T, b, ad []byte) {
		if plain, err := k.Open(b, ad); err == nil {
			t.Errorf("opened a forgery as %q", plain)
		}
	})
}
