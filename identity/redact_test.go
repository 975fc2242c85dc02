package identity

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// However they are printed, in a log as well, alone or within something else.
func TestSecretsDoNotPrint(t *testing.T) {
	const secret = "a secret"
	id := spiffeid.RequireFromString("spiffe://example.org/web")
	x := X509SVID{ID: id, Key: []byte(secret)}
	for name, v := range map[string]any{
		"evidence": Evidence{Token: []byte(secret)}, "X.509-SVID": x, "JWT-SVID": JWTSVID{ID: id, Token: secret},
		"update": Update{SVIDs: []X509SVID{x}}, "pointers": []*X509SVID{&x}, "in a struct": struct{ E Evidence }{Evidence{Token: []byte(secret)}},
	} {
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("x", "v", v)
		out := fmt.Sprintf("%v %+v %#v %s %s", v, v, v, v, log.String())
		for _, bad := range []string{secret, fmt.Sprint([]byte(secret)), strings.Trim(fmt.Sprintf("%#v", []byte(secret)), "[]byte{}")} {
			if strings.Contains(out, bad) {
				t.Errorf("%s: %s", name, out)
			}
		}
	}
}
