package workloadapi

import (
	"context"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
)

// benchmarkCall makes calls on an open connection, one after the other. The CPU time it reports is that of the
// client and the server together: the agent's part is less.
func benchmarkCall(b *testing.B, call func(context.Context, workload.SpiffeWorkloadAPIClient) error) {
	f := start(b, withLimits(Limits{CallsPerSecond: 1 << 20}))
	client, ctx := f.client("web"), f.ctx()
	if err := call(ctx, client); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	before := cpu()
	for b.Loop() {
		if err := call(ctx, client); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
}

// cpu is the time that this process has used, in nanoseconds.
func cpu() int64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		panic(err)
	}
	return r.Utime.Nano() + r.Stime.Nano()
}

func BenchmarkFetchX509SVID(b *testing.B) {
	benchmarkCall(b, func(ctx context.Context, c workload.SpiffeWorkloadAPIClient) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	})
}

func BenchmarkFetchJWTSVID(b *testing.B) {
	benchmarkCall(b, func(ctx context.Context, c workload.SpiffeWorkloadAPIClient) error {
		_, err := c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"test"}})
		return err
	})
}

func BenchmarkValidateJWTSVID(b *testing.B) {
	f := start(b, withLimits(Limits{CallsPerSecond: 1 << 20}))
	client, ctx := f.client("web"), f.ctx()
	req := &workload.ValidateJWTSVIDRequest{Audience: "test", Svid: f.d.token("spiffe://example.org/web", nil, nil)}
	before := cpu()
	for b.Loop() {
		if _, err := client.ValidateJWTSVID(ctx, req); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
}

// BenchmarkRotation is one new state rendered and pushed to a stream that is open.
func BenchmarkRotation(b *testing.B) {
	f := start(b)
	a, c := f.d.update(f.d.svid("/web", "")), f.d.update(f.d.svid("/web", ""))
	stream := f.x509("web")
	must(stream.Recv())
	f.source.set("web", a)
	must(stream.Recv())
	b.ReportAllocs()
	before := cpu()
	for b.Loop() {
		fresh := *c // a pointer that nothing is cached for
		a, c = c, a
		f.source.set("web", &fresh)
		if _, err := stream.Recv(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
}
