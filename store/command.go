package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"countersign.io/countersign/identity"
)

// commandVersion is the first byte of every command.
const commandVersion = 1

// maxCommandBytes bounds a command; the largest one is a kube cluster with its JWKS.
const maxCommandBytes = 2 << 20

// The commands. A name is never used again with another meaning.
const (
	createEntry       = "create_entry"
	updateEntry       = "update_entry"
	deleteEntry       = "delete_entry"
	putKubeCluster    = "put_kube_cluster"
	deleteKubeCluster = "delete_kube_cluster"
	createJoinToken   = "create_join_token"
	useJoinToken      = "use_join_token"
	putAgent          = "put_agent"
	banAgent          = "ban_agent"
	evictAgent        = "evict_agent"
	createAuthority   = "create_authority"
	putMember         = "put_member"
	removeMember      = "remove_member"
	sweep             = "sweep"

	// From level 2 on; set_level is what leads there.
	setLevel          = "set_level"
	admitAgent        = "admit_agent"
	putSealTerm       = "put_seal_term"
	ackSealTerm       = "ack_seal_term"
	activateSealTerm  = "activate_seal_term"
	dropSealTerm      = "drop_seal_term"
	resealAuthority   = "reseal_authority"
	prepareAuthority  = "prepare_authority"
	activateAuthority = "activate_authority"
	dropAuthority     = "drop_authority"
	putForeign        = "put_foreign"
	taintAuthority    = "taint_authority"
	revokeAuthority   = "revoke_authority"
	putRotation       = "put_rotation"

	putFederation      = "put_federation"
	deleteFederation   = "delete_federation"
	putFederatedBundle = "put_federated_bundle"
)

// command is what follows the version byte.
type command struct {
	Type string          `json:"type"`
	Time time.Time       `json:"time,omitzero"` // the proposer's clock, where the command needs one
	Data json.RawMessage `json:"data"`
}

type (
	updateEntryData struct {
		Entry      identity.Entry `json:"entry"`
		IfRevision uint64         `json:"if_revision,omitempty"` // 0: any
	}
	putKubeClusterData struct {
		KubeCluster identity.KubeCluster `json:"kube_cluster"`
		Replace     bool                 `json:"replace,omitempty"`
	}
	useJoinTokenData struct {
		Hash    []byte `json:"hash"`
		Purpose string `json:"purpose"`
	}
	admitAgentData struct {
		Hash  []byte         `json:"hash"` // of the join token
		Agent identity.Agent `json:"agent"`
	}
	keyData struct {
		Key string `json:"key"`
	}
	sweepData struct {
		Limit int `json:"limit"` // at the most so many removals, so that no batch takes long
	}
	sweepResult struct {
		Removed int `json:"removed"`
	}
)

// errUnknownCommand: the log has something that this version cannot apply.
var errUnknownCommand = errors.New("a command that this version does not understand: upgrade this member to the version of the others")

func encodeCommand(typ string, now time.Time, data any) ([]byte, error) {
	raw, err := json.Marshal(data)
	if err != nil {
		return nil, fmt.Errorf("%w: encoding %s: %v", identity.ErrInvalid, typ, err)
	}
	raw, err = json.Marshal(command{Type: typ, Time: now.UTC(), Data: raw})
	if err != nil {
		return nil, fmt.Errorf("%w: encoding %s: %v", identity.ErrInvalid, typ, err)
	}
	if len(raw) >= maxCommandBytes {
		return nil, fmt.Errorf("%w: %s of %d bytes: at the most %d", identity.ErrInvalid, typ, len(raw), maxCommandBytes)
	}
	return append([]byte{commandVersion}, raw...), nil
}

func decodeCommand(raw []byte) (command, error) {
	var c command
	if len(raw) == 0 {
		return c, fmt.Errorf("%w (it is empty)", errUnknownCommand)
	}
	if raw[0] != commandVersion {
		return c, fmt.Errorf("%w (command version %d, known is %d)", errUnknownCommand, raw[0], commandVersion)
	}
	if err := decodeStrict(raw[1:], &c); err != nil {
		return c, fmt.Errorf("%w (%v)", errUnknownCommand, err)
	}
	return c, nil
}

// decodeStrict refuses fields that this version does not know: ignoring one that a newer version acts on would
// make the states differ.
func decodeStrict(raw []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("data after the JSON value")
	}
	return nil
}
