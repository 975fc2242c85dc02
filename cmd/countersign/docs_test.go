package main

import (
	"testing"

	"countersign.io/countersign/cmd/internal/clidoc"
)

var docFlags = clidoc.NewFlags()

func TestCLIPage(t *testing.T) { clidoc.CheckPage(t, newRoot(), docFlags) }

func TestManPages(t *testing.T) { clidoc.CheckMan(t, newRoot(), docFlags) }

func TestEveryCommandIsWhole(t *testing.T) {
	clidoc.CheckWhole(t, newRoot(), 30, "countersign server run", "countersign dev", "countersign install kube")
}
