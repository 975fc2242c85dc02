package attestor

import (
	"bytes"
	"errors"
	"strconv"
)

var (
	errStat   = errors.New("parsing /proc/PID/stat: it has not the fields that it should")
	errStatus = errors.New("parsing /proc/PID/status: no user ID in it")
)

// parseStartTime gives field 22 of /proc/PID/stat (proc_pid_stat(5)): clock ticks between boot and the
// start of the process.
func parseStartTime(stat []byte) (uint64, error) { return statField(stat, 22) }

// exiting reports whether PF_EXITING (include/linux/sched.h) is in field 9 of /proc/PID/stat: the thread is on its way
// out, which it may be made to be for long. The flag is never taken back.
func exiting(stat []byte) (bool, error) {
	const pfExiting = 0x4
	flags, err := statField(stat, 9)
	return flags&pfExiting != 0, err
}

// statField gives a number. Field 2 is the program's name in parentheses, which the process chooses: it may hold
// spaces, parentheses and newlines, so fields are counted from the last parenthesis.
func statField(stat []byte, number int) (uint64, error) {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, errStat
	}
	fields := bytes.Fields(stat[i+1:])
	const first = 3 // the number of the field after the name
	if len(fields) <= number-first {
		return 0, errStat
	}
	n, err := strconv.ParseUint(string(fields[number-first]), 10, 64)
	if err != nil {
		return 0, errStat
	}
	return n, nil
}

// parseStatusUID gives the effective user ID of /proc/PID/status (proc_pid_status(5)). The name that the
// process chooses comes first, with newlines escaped.
func parseStatusUID(status []byte) (uint32, error) {
	for line := range bytes.Lines(status) {
		rest, ok := bytes.CutPrefix(line, []byte("Uid:"))
		if !ok {
			continue
		}
		fields := bytes.Fields(rest) // real, effective, saved, file system
		if len(fields) != 4 {
			return 0, errStatus
		}
		n, err := strconv.ParseUint(string(fields[1]), 10, 32)
		if err != nil {
			return 0, errStatus
		}
		return uint32(n), nil
	}
	return 0, errStatus
}
