package store

import (
	"encoding/json"
	"fmt"
)

// handler is what this version does with a type of command.
type handler struct {
	// check says whether this version understands the data: an error wraps errUnknownCommand.
	check func(raw json.RawMessage) error
	apply func(a *applier, raw json.RawMessage) (any, error)
}

// handle makes the handler of a command whose data is a T. An error of f that wraps an identity sentinel is a refusal; any
// other is a fault of this member.
func handle[T any](typ string, level uint32, f func(*applier, *T) (any, error)) (handler, bool) {
	decode := func(raw json.RawMessage) (*T, error) {
		data := new(T)
		err := decodeStrict(raw, data)
		if d, ok := any(data).(interface{ known() error }); err == nil && ok {
			err = d.known()
		}
		if err != nil {
			return nil, fmt.Errorf("%w (%s: %v)", errUnknownCommand, typ, err)
		}
		return data, nil
	}
	return handler{
		check: func(raw json.RawMessage) error { _, err := decode(raw); return err },
		apply: func(a *applier, raw json.RawMessage) (any, error) {
			data, err := decode(raw)
			if err == nil {
				err = needLevel(a.level, level, typ)
			}
			if err != nil {
				return nil, err
			}
			return f(a, data)
		},
	}, true
}

func handlerOf(typ string) (handler, bool) {
	switch typ {
	case createEntry:
		return handle(typ, 1, (*applier).createEntry)
	case updateEntry:
		return handle(typ, 1, (*applier).updateEntry)
	case deleteEntry:
		return handle(typ, 1, (*applier).deleteEntryByID)
	case putKubeCluster:
		return handle(typ, 1, (*applier).putKubeCluster)
	case deleteKubeCluster:
		return handle(typ, 1, (*applier).deleteKubeCluster)
	case createJoinToken:
		return handle(typ, 1, (*applier).createJoinToken)
	case useJoinToken:
		return handle(typ, 1, (*applier).useJoinToken)
	case putAgent:
		return handle(typ, 1, (*applier).putAgent)
	case banAgent:
		return handle(typ, 1, (*applier).banAgent)
	case evictAgent:
		return handle(typ, 1, (*applier).evictAgent)
	case createAuthority:
		return handle(typ, 1, (*applier).createAuthority)
	case putMember:
		return handle(typ, 1, (*applier).putMember)
	case removeMember:
		return handle(typ, 1, (*applier).removeMember)
	case sweep:
		return handle(typ, 1, (*applier).sweep)
	case setLevel:
		return handle(typ, 1, (*applier).setLevel)
	}
	return handlerOfLevel2(typ)
}

func handlerOfLevel2(typ string) (handler, bool) {
	switch typ {
	case admitAgent:
		return handle(typ, level2, (*applier).admitAgent)
	case putSealTerm:
		return handle(typ, level2, (*applier).putSealTerm)
	case ackSealTerm:
		return handle(typ, level2, (*applier).ackSealTerm)
	case activateSealTerm:
		return handle(typ, level2, (*applier).activateSealTerm)
	case dropSealTerm:
		return handle(typ, level2, (*applier).dropSealTerm)
	case resealAuthority:
		return handle(typ, level2, (*applier).resealAuthority)
	case prepareAuthority:
		return handle(typ, level2, (*applier).prepareAuthority)
	case activateAuthority:
		return handle(typ, level2, (*applier).activateAuthority)
	case dropAuthority:
		return handle(typ, level2, (*applier).dropAuthority)
	case putForeign:
		return handle(typ, level2, (*applier).putForeign)
	case taintAuthority:
		return handle(typ, level2, (*applier).taintAuthority)
	case revokeAuthority:
		return handle(typ, level2, (*applier).revokeAuthority)
	case putRotation:
		return handle(typ, level2, (*applier).putRotation)
	case putFederation:
		return handle(typ, level2, (*applier).putFederation)
	case deleteFederation:
		return handle(typ, level2, (*applier).deleteFederation)
	case putFederatedBundle:
		return handle(typ, level2, (*applier).putFederatedBundle)
	}
	return handler{}, false
}

// decode finds the handler of a command.
func decode(raw []byte) (command, handler, error) {
	c, err := decodeCommand(raw)
	if err != nil {
		return c, handler{}, err
	}
	h, ok := handlerOf(c.Type)
	if !ok {
		return c, handler{}, fmt.Errorf("%w (command %q)", errUnknownCommand, c.Type)
	}
	return c, h, nil
}

// Check reports whether this version understands a command. A leader asks it before it appends a member's command to the log,
// where one that is not understood would stop every member of this version.
func Check(cmd []byte) error {
	if len(cmd) > maxCommandBytes {
		return fmt.Errorf("%w: a command of %d bytes: at the most %d", errUnknownCommand, len(cmd), maxCommandBytes)
	}
	c, h, err := decode(cmd)
	if err != nil {
		return err
	}
	return h.check(c.Data)
}
