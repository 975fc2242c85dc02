//go:build !integration

package integration

import (
	"flag"
	"fmt"
	"runtime"
)

func closeNodes() {} // there are none

// together has three tests run for every two cores, unless told otherwise: they wait for processes most of the time.
func together() error {
	flag.Parse()
	if n := flag.Lookup("test.parallel"); n.Value.String() == fmt.Sprint(runtime.GOMAXPROCS(0)) {
		return n.Value.Set(fmt.Sprint((runtime.GOMAXPROCS(0)*3 + 1) / 2))
	}
	return nil
}
