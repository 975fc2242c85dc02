package cli

import (
	"fmt"
	"net"
	"strings"
	"time"
)

// Asking adds whom a failed call asked, and, only where nobody listens on the socket, the question whether it runs: one that
// runs and has no leader, say, would send the operator the wrong way. hint is what starts it, or empty.
func Asking(what, socket, hint string, err error) error {
	if strings.HasPrefix(socket, "tcp:") {
		return fmt.Errorf("asking the %s at %s: %w", what, socket, err)
	}
	conn, dialErr := net.DialTimeout("unix", strings.TrimPrefix(strings.TrimPrefix(socket, "unix:"), "//"), time.Second)
	if dialErr != nil {
		if hint != "" {
			hint = " " + hint
		}
		return fmt.Errorf("asking the %s at %s (is it running?%s): %w", what, socket, hint, err)
	}
	conn.Close()
	return fmt.Errorf("asking the %s at %s: %w", what, socket, err)
}
