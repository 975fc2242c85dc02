package attestor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"countersign.io/countersign/identity"
)

const (
	ctrA = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961"
	ctrB = "d4e8e05a546c86b6443f101966c618e47753ed01fa9929cae00d3b692f7a9f80"
)

// v1 is a cgroup file of version 1 with one path in all hierarchies.
func v1(path string) string {
	var b strings.Builder
	for _, c := range []string{"12:hugetlb:", "11:blkio:", "10:cpuset:", "8:net_cls,net_prio:", "6:cpu,cpuacct:", "4:memory:", "2:pids:", "1:name=systemd:"} {
		b.WriteString(c + path + "\n")
	}
	return b.String()
}

func v2(path string) string { return "0::" + path + "\n" }

func TestParseCgroups(t *testing.T) {
	a, staticUID := podA, "a1b2c3d4e5f60718293a4b5c6d7e8f90"
	_a := strings.ReplaceAll(podA, "-", "_")
	for _, c := range []struct {
		name, file string
		want       Place
	}{
		// Runtimes and drivers, by quality of service.
		{"containerd systemd burstable", v2("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + _a + ".slice/cri-containerd-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"containerd systemd besteffort v1", v1("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + _a + ".slice/cri-containerd-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"containerd systemd guaranteed", v2("/kubepods.slice/kubepods-pod" + _a + ".slice/cri-containerd-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"containerd cgroupfs burstable v1", v1("/kubepods/burstable/pod" + a + "/" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"containerd cgroupfs besteffort", v2("/kubepods/besteffort/pod" + a + "/" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"containerd cgroupfs guaranteed", v2("/kubepods/pod" + a + "/" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"containerd cgroupfs, kubelet systemd", v1("/kubepods-besteffort-pod" + _a + ".slice:cri-containerd:" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"containerd cgroupfs, kubelet systemd, below the service", "1:name=systemd:/system.slice/containerd.service/kubepods-burstable-pod" + _a + ".slice:cri-containerd:" + ctrA + "\n", Place{PodUID: a, ContainerID: ctrA}},
		{"CRI-O systemd", v2("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + _a + ".slice/crio-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"CRI-O with crun's sub-cgroup", v2("/kubepods.slice/kubepods-pod" + _a + ".slice/crio-" + ctrA + ".scope/container"), Place{PodUID: a, ContainerID: ctrA}},
		{"CRI-O cgroupfs", v1("/kubepods/burstable/pod" + a + "/crio-" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"CRI-O monitor", v2("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + _a + ".slice/crio-conmon-" + ctrA + ".scope"), Place{PodUID: a}},
		{"cri-dockerd systemd", v1("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + _a + ".slice/docker-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"cri-dockerd systemd, UID with dashes", v1("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + a + ".slice/docker-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"cri-dockerd cgroupfs", v1("/kubepods/burstable/pod" + a + "/" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"pod without a container's cgroup", v2("/kubepods.slice/kubepods-pod" + _a + ".slice"), Place{PodUID: a}},
		{"static pod systemd", v2("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + staticUID + ".slice/cri-containerd-" + ctrA + ".scope"), Place{PodUID: staticUID, ContainerID: ctrA}},
		{"static pod cgroupfs", v1("/kubepods/burstable/pod" + staticUID + "/" + ctrA), Place{PodUID: staticUID, ContainerID: ctrA}},

		// Kubelets that are not at the root.
		{"kind systemd", v2("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + _a + ".slice/cri-containerd-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"kind seen from outside of its node", v2("/system.slice/docker-" + ctrB + ".scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + _a + ".slice/cri-containerd-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"kind cgroupfs v1", v1("/docker/" + ctrB + "/kubelet/kubepods/besteffort/pod" + a + "/" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"nested in a container", v2("/kubepods/pod" + a + "/" + ctrA + "/init.scope"), Place{PodUID: a, ContainerID: ctrA}},

		// Seen from the agent's private cgroup namespace.
		{"private systemd", v2("/../../kubepods-burstable-pod" + _a + ".slice/cri-containerd-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"private systemd, other quality", v2("/../../../kubepods-besteffort.slice/kubepods-besteffort-pod" + _a + ".slice/crio-" + ctrA + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"private cgroupfs", v2("/../../pod" + a + "/" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"private cgroupfs, other quality", v2("/../../../burstable/pod" + a + "/" + ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"private, a service of the host", v2("/../../../../system.slice/nginx.service"), Place{Unit: "nginx.service"}},

		// Hybrid: version 2 may know less.
		{"hybrid", v1("/kubepods/burstable/pod"+a+"/"+ctrA) + v2("/system.slice/containerd.service"), Place{PodUID: a, ContainerID: ctrA}},
		{"hybrid, both", v1("/kubepods/pod"+a+"/"+ctrA) + v2("/kubepods/pod"+a+"/"+ctrA), Place{PodUID: a, ContainerID: ctrA}},
		{"some hierarchies unused", "3:rdma:/\n2:misc:/\n1:memory:/kubepods/pod" + a + "/" + ctrA + "\n", Place{PodUID: a, ContainerID: ctrA}},

		// A pod that makes cgroups of its own which look like another's.
		{"imitates by systemd name", v2("/kubepods.slice/kubepods-pod" + _a + ".slice/cri-containerd-" + ctrA + ".scope/kubepods.slice/kubepods-pod" + strings.ReplaceAll(podB, "-", "_") + ".slice/cri-containerd-" + ctrB + ".scope"), Place{PodUID: a, ContainerID: ctrA}},
		{"imitates by cgroupfs name", v1("/kubepods/burstable/pod" + a + "/" + ctrA + "/kubepods/burstable/pod" + podB + "/" + ctrB), Place{PodUID: a, ContainerID: ctrA}},
		{"imitates by joined name", v2("/kubepods/pod" + a + "/" + ctrA + "/kubepods-pod" + podB + ".slice:cri-containerd:" + ctrB), Place{PodUID: a, ContainerID: ctrA}},
		{"imitates in the pod's own cgroup", v2("/kubepods/pod" + a + "/pod" + podB + "/" + ctrB), Place{PodUID: a}},
		{"container is the one just below", v2("/kubepods/pod" + a + "/x/" + ctrB), Place{PodUID: a}},

		// Plain processes.
		{"root", v2("/"), Place{}},
		{"service", v2("/system.slice/nginx.service"), Place{Unit: "nginx.service"}},
		{"template", v2("/system.slice/system-getty.slice/getty@tty1.service"), Place{Unit: "getty@tty1.service"}},
		{"escaped", v2(`/system.slice/dev-disk-by\x2dlabel.service`), Place{Unit: `dev-disk-by\x2dlabel.service`}},
		{"escaped for the file system", v2("/system.slice/_cpu.service"), Place{Unit: "cpu.service"}},
		{"delegated service", v2("/system.slice/app.service/worker-1"), Place{Unit: "app.service"}},
		{"session", v2("/user.slice/user-1000.slice/session-3.scope"), Place{Unit: "session-3.scope"}},
		{"init", v2("/init.scope"), Place{Unit: "init.scope"}},
		{"user's own unit imitates", v2("/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service"), Place{Unit: "user@1000.service"}},
		{"user's own cgroup imitates", v2("/user.slice/user-1000.slice/user@1000.service/system.slice/nginx.service"), Place{Unit: "user@1000.service"}},
		{"no unit above", v2("/machines/nginx.service"), Place{}},
		{"v1 systemd decides", v1("/system.slice/nginx.service") + v2("/"), Place{Unit: "nginx.service"}},
		{"docker keeps version 2 in its unit", v1("/docker/"+ctrA) + v2("/system.slice/containerd.service"), Place{}},
		{"docker keeps version 2 in its unit, first", v2("/system.slice/containerd.service") + v1("/docker/"+ctrA), Place{}},
		{"docker", v2("/system.slice/docker-" + ctrA + ".scope"), Place{Unit: "docker-" + ctrA + ".scope"}},
		{"podman pod", v2("/machine.slice/machine-libpod_pod_" + ctrB + ".slice/libpod-" + ctrA + ".scope"), Place{Unit: "libpod-" + ctrA + ".scope"}},
		{"the kubelet's own", v2("/kubepods.slice"), Place{}},
		{"a folder called podcasts", v2("/srv/podcasts"), Place{}},
		{"colons in a name", "0::/a:b:c/d\n", Place{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseCgroups([]byte(c.file))
			if err != nil || got != c.want {
				t.Errorf("got %+v, %v\nwant %+v\nof %s", got, err, c.want, c.file)
			}
		})
	}
}

func TestParseCgroupsRefuses(t *testing.T) {
	for _, c := range []struct{ name, file, want string }{
		{"empty", "", "empty"},
		{"no path", "0:\n", "ID:CONTROLLERS:PATH"},
		{"relative path", "0::kubepods\n", "ID:CONTROLLERS:PATH"},
		{"an empty line", "0::/\n\n", "ID:CONTROLLERS:PATH"},
		{"two pods", "2:memory:/kubepods/pod" + podA + "/" + ctrA + "\n1:name=systemd:/kubepods/pod" + podB + "/" + ctrA + "\n", "contradict"},
		{"two containers", "2:memory:/kubepods/pod" + podA + "/" + ctrA + "\n1:name=systemd:/kubepods/pod" + podA + "/" + ctrB + "\n", "contradict"},
		{"versions 1 and 2 differ", v1("/kubepods/pod"+podA+"/"+ctrA) + v2("/kubepods/pod"+podB+"/"+ctrA), "contradict"},
		{"bad UID systemd", v2("/kubepods.slice/kubepods-podx.slice/cri-containerd-" + ctrA + ".scope"), "no pod UID"},
		{"bad UID cgroupfs", v2("/kubepods/podx/" + ctrA), "no pod UID"},
		{"upper-case UID", v2("/kubepods/pod" + strings.ToUpper(podA) + "/" + ctrA), "no pod UID"},
		{"an unreadable pod around a good one", v2("/kubepods/podx/kubepods/pod" + podB + "/" + ctrB), "no pod UID"},
		{"unknown quality", v2("/kubepods.slice/kubepods-swappy-podx.slice"), "no pod UID"},
		{"container in the agent's own pod", v2("/../crio-" + ctrA + ".scope"), "agent's own"},
		{"container in the agent's own pod, cgroupfs", v2("/../" + ctrA), "agent's own"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseCgroups([]byte(c.file))
			if !errors.Is(err, identity.ErrUnauthenticated) || !strings.Contains(err.Error(), c.want) || got != (Place{}) {
				t.Errorf("got %+v, %v; want an error with %q", got, err, c.want)
			}
		})
	}
}

// On version 1 the first thread of a process is at the root of every hierarchy once it is exiting, which a pod can make last
// (by a page that its own file server does not give, say) while its other threads live on. It is not a plain process.
func TestCgroupsOfExitingThread(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "task", "7"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "cgroup"), []byte(v1("/")))
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &Peer{pid: 7, pidfd: -1, dir: fd}
	defer p.Close()
	_, err = byCgroups(p)
	wantChanged(t, "the thread is gone", err)
	for flags, want := range map[string]bool{"4194560": false, "4194564": true, "4": true, "0": false} {
		writeFile(t, filepath.Join(dir, "task", "7", "stat"), []byte("7 (a) b) S 1 7 7 0 -1 "+flags+" 1 2 3 4 5 6 7 8 20 0 1 0 9 10\n"))
		place, err := byCgroups(p)
		if want {
			wantChanged(t, "flags "+flags, err)
		} else if err != nil || place != (Place{}) {
			t.Errorf("flags %s: got %+v, %v", flags, place, err)
		}
	}
	writeFile(t, filepath.Join(dir, "task", "7", "stat"), []byte("7 (a) S 1"))
	if _, err := byCgroups(p); !errors.Is(err, identity.ErrUnavailable) {
		t.Errorf("a stat without flags: got %v", err)
	}
}
