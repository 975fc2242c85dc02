package main

import (
	"fmt"

	"countersign.io/countersign/store"
)

func summaryRows(s store.Summary) [][]string {
	return [][]string{
		{"holds", fmt.Sprintf("revision %d, bundle sequence %d, level %d", s.Revision, s.Sequence, s.Level)},
		{"", fmt.Sprintf("%d entries, %d kube clusters, %d agents, %d join tokens", s.Entries, s.KubeClusters, s.Agents, s.JoinTokens)},
		{"", fmt.Sprintf("%d authorities, %d members, %d terms of the seal, %d foreign bundles", s.Authorities, s.Members, s.SealTerms, s.Foreign)},
	}
}
