package attestor

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// volumeMark begins the Key of a volume. That of a process never does, for it is hexadecimal.
const volumeMark = "volume:"

// VolumeKey is the Workload.Key of whoever uses a pod's volume: one that only the containers of that pod can reach, so that the volume
// itself says which pod they are of. Each volume has one of its own.
func VolumeKey(podUID, volume string) string {
	h := sha256.Sum256([]byte("countersign volume 1\x00" + podUID + "\x00" + volume))
	return volumeMark + hex.EncodeToString(h[:])
}

// IsVolume reports whether a Workload.Key is one of VolumeKey.
func IsVolume(key string) bool { return strings.HasPrefix(key, volumeMark) }
