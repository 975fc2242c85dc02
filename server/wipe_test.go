package server

import (
	"bytes"
	"testing"

	memberv1 "countersign.io/countersign/api/member/v1"
)

func TestKeyringIsClearedOnceSent(t *testing.T) {
	var given [][]byte
	w := newWorld(t, func(c *Config) {
		c.Keyring = func() ([]byte, error) {
			given = append(given, []byte("the keyring"))
			return given[len(given)-1], nil
		}
	}).start(t)
	ask := memberv1.NewMemberClient(w.dial(t, w.certificate(t, "/countersign/member/m1")))
	for range 2 {
		res, err := ask.Keyring(testContext(t), &memberv1.KeyringRequest{})
		if err != nil || string(res.Keyring) != "the keyring" {
			t.Fatalf("%v, %v", res, err)
		}
	}
	w.stop()
	if err := <-w.finished; err != nil {
		t.Error(err)
	}
	for _, k := range given {
		if !bytes.Equal(k, make([]byte, len(k))) {
			t.Errorf("it is there still: %q", k)
		}
	}
}
