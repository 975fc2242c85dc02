package csi

import (
	"context"
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// provisioner stands for the pods that ask for volumes: the suite wants something to create them, and an inline volume is never created.
type provisioner struct {
	csispec.UnimplementedControllerServer
	w *world
}

func (p *provisioner) ControllerGetCapabilities(context.Context, *csispec.ControllerGetCapabilitiesRequest) (*csispec.ControllerGetCapabilitiesResponse, error) {
	return &csispec.ControllerGetCapabilitiesResponse{Capabilities: []*csispec.ControllerServiceCapability{{Type: &csispec.ControllerServiceCapability_Rpc{
		Rpc: &csispec.ControllerServiceCapability_RPC{Type: csispec.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME},
	}}}}, nil
}

func (p *provisioner) CreateVolume(context.Context, *csispec.CreateVolumeRequest) (*csispec.CreateVolumeResponse, error) {
	r := p.w.request(1)
	return &csispec.CreateVolumeResponse{Volume: &csispec.Volume{VolumeId: r.VolumeId, VolumeContext: r.VolumeContext}}, nil
}

func (p *provisioner) DeleteVolume(context.Context, *csispec.DeleteVolumeRequest) (*csispec.DeleteVolumeResponse, error) {
	return &csispec.DeleteVolumeResponse{}, nil
}

// TestSanity runs the suite of the Kubernetes CSI project that every driver is held to. The volumes that it mounts are those of a pod, mounted as the
// kubelet does: read-only, at the path that it uses.
func TestSanity(t *testing.T) {
	if flag.Lookup("test.count").Value.String() != "1" { // the suite's framework runs once in a process, and refuses the flag
		if out, err := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestSanity$", "-test.count=1").CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	w := newWorld(t)
	n := w.start()
	l, err := net.Listen("unix", filepath.Join(w.dir, "controller.sock"))
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	csispec.RegisterControllerServer(g, &provisioner{w: w})
	csispec.RegisterIdentityServer(g, n.d)
	go g.Serve(l)
	t.Cleanup(g.Stop)

	conf := sanity.NewTestConfig()
	conf.Address, conf.ControllerAddress = "unix://"+n.d.cfg.Socket, "unix://"+l.Addr().String()
	conf.TargetPath, conf.StagingPath = filepath.Join(w.dir, "target"), ""
	kubelet := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		path := w.request(1).TargetPath
		switch r := req.(type) {
		case *csispec.NodePublishVolumeRequest:
			r.Readonly = true
			if r.TargetPath != "" {
				r.TargetPath = path
			}
		case *csispec.NodeUnpublishVolumeRequest:
			if r.TargetPath != "" {
				r.TargetPath = path
			}
		}
		err := invoke(ctx, method, req, reply, cc, opts...)
		if r, ok := reply.(*csispec.GetPluginCapabilitiesResponse); ok { // the provisioner
			r.Capabilities = append(r.Capabilities, &csispec.PluginCapability{Type: &csispec.PluginCapability_Service_{
				Service: &csispec.PluginCapability_Service{Type: csispec.PluginCapability_Service_CONTROLLER_SERVICE},
			}})
		}
		return err
	}
	conf.DialOptions = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"), grpc.WithUnaryInterceptor(kubelet)}
	conf.CheckPath = func(string) (sanity.PathKind, error) {
		if w.mounts.count() > 0 {
			return sanity.PathIsDir, nil
		}
		return sanity.PathIsNotFound, nil
	}
	suite, report := ginkgo.GinkgoConfiguration()
	suite.FocusStrings = []string{"Identity Service", "Node Service"} // there is no controller to test
	report.NoColor = true
	sc := sanity.GinkgoTest(&conf)
	gomega.RegisterFailHandler(ginkgo.Fail)
	ginkgo.RunSpecs(t, "Countersign CSI driver", suite, report)
	sc.Finalize()
	if w.mounts.binds < 3 {
		t.Errorf("the suite has mounted %d volumes", w.mounts.binds)
	}
	w.wantNothing()
}
