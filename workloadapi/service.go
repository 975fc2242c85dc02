package workloadapi

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"countersign.io/countersign/identity"
)

// FetchX509SVID streams all identities of the caller with their keys and bundles.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return s.updates(stream, s.views.x509)
}

// FetchX509Bundles streams the X.509 bundles that the caller may use.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return s.updates(stream, s.views.x509Bundles)
}

// FetchJWTBundles streams the JWT bundles that the caller may use.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return s.updates(stream, s.views.jwtBundles)
}

func (s *Server) updates(stream grpc.ServerStream, view func(*identity.Update) (*message, error)) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(s.stopping, cancel)()
	attest, err := s.attest(ctx)
	if err != nil {
		return err
	}
	p := &pusher{stream: stream}
	first := true
	err = s.source.Updates(ctx, attest, func(u *identity.Update) error {
		if len(u.SVIDs) == 0 {
			return errNoIdentity()
		}
		if !first { // a process may leave its connection to another one
			if err := sameCaller(ctx); err != nil {
				return err
			}
		}
		first = false
		m, err := view(u)
		if err != nil {
			return err
		}
		return p.push(m)
	})
	switch {
	case stream.Context().Err() != nil && first:
		return inVain{stream.Context().Err()}
	case stream.Context().Err() != nil:
		return stream.Context().Err()
	case s.stopping.Err() != nil:
		return fmt.Errorf("%w: the agent is stopping: try again", identity.ErrUnavailable)
	case err == nil:
		return fmt.Errorf("%w: there are no updates at the moment: try again", identity.ErrUnavailable)
	}
	return inVain{err}
}

// inVain is an error of a call for which the Source was asked, which may have cost a member something.
type inVain struct{ error }

func (e inVain) Unwrap() error { return e.error }

func errNoIdentity() error {
	return fmt.Errorf("%w: no identity is issued for this workload: is there an entry that its selectors match?", identity.ErrDenied)
}

// FetchJWTSVID issues JWT-SVIDs for the audience (Workload API section 6.2.1).
func (s *Server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	var id spiffeid.ID
	var err error
	if req.SpiffeId != "" {
		if id, err = parseID(req.SpiffeId); err != nil {
			return nil, err
		}
	}
	switch n := len(req.Audience); {
	case n == 0:
		return nil, checkAudience("")
	case n > identity.MaxAudiences:
		return nil, fmt.Errorf("%w: %d audiences: at the most %d", identity.ErrInvalid, n, identity.MaxAudiences)
	}
	for _, aud := range req.Audience {
		if err := checkAudience(aud); err != nil {
			return nil, err
		}
	}
	attest, err := s.attest(ctx)
	if err != nil {
		return nil, err
	}
	svids, err := s.source.FetchJWT(ctx, attest, req.Audience, id)
	if err != nil {
		return nil, inVain{err}
	}
	if len(svids) == 0 {
		return nil, inVain{errNoIdentity()}
	}
	resp := &workload.JWTSVIDResponse{Svids: make([]*workload.JWTSVID, len(svids))}
	hints := uniqueHints{}
	for i := range svids {
		if !id.IsZero() && svids[i].ID != id {
			return nil, fmt.Errorf("fetching a JWT-SVID for %s: the source answered with one for %s", id, svids[i].ID)
		}
		resp.Svids[i] = &workload.JWTSVID{SpiffeId: svids[i].ID.String(), Svid: svids[i].Token, Hint: hints.take(svids[i].Hint)}
	}
	return resp, nil
}

// ValidateJWTSVID validates a JWT-SVID against the bundles that the caller may use (Workload API section
// 6.2.3). It returns all claims.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if err := checkAudience(req.Audience); err != nil {
		return nil, err
	}
	if req.Svid == "" {
		return nil, fmt.Errorf("%w: the JWT-SVID to validate is empty", identity.ErrInvalid)
	}
	attest, err := s.attest(ctx)
	if err != nil {
		return nil, err
	}
	u, err := s.source.Current(ctx, attest)
	if err != nil {
		return nil, inVain{err}
	}
	if len(u.SVIDs) == 0 {
		return nil, inVain{errNoIdentity()}
	}
	id, claims, err := validateJWT(req.Svid, req.Audience, s.now(), func(td spiffeid.TrustDomain) map[string]crypto.PublicKey {
		if b := u.Bundles[td]; b != nil {
			return s.views.bundle(b).keys
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	fields, err := structpb.NewStruct(claims)
	if err != nil {
		return nil, fmt.Errorf("%w: JWT-SVID not valid: its claims: %v", identity.ErrInvalid, err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: fields}, nil
}

// serviceDesc is the Workload API's with its unary methods served as streams of one message, which is the same on
// the wire. For a unary method gRPC asks no interceptor before it waits for the request, which may never come.
func (s *Server) serviceDesc() *grpc.ServiceDesc {
	d := workload.SpiffeWorkloadAPI_ServiceDesc
	d.Streams = slices.Clone(d.Streams)
	for _, m := range d.Methods {
		d.Streams = append(d.Streams, grpc.StreamDesc{StreamName: m.MethodName, ServerStreams: true, Handler: func(srv any, stream grpc.ServerStream) error {
			ctx, cancel := context.WithTimeout(stream.Context(), s.callTimeout)
			defer cancel()
			resp, err := m.Handler(srv, ctx, stream.RecvMsg, nil)
			if err != nil {
				return err
			}
			return stream.SendMsg(resp)
		}})
	}
	d.Methods = nil
	return &d
}

// call is around every call, reflection included.
func (s *Server) call(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	held, err := s.begin(stream.Context())
	if err != nil {
		return s.status(info.FullMethod, err)
	}
	defer s.admit.release(held, streams)
	err = handler(srv, stream)
	if err == nil {
		return nil
	}
	var vain inVain
	asked := errors.As(err, &vain)
	if asked {
		err = vain.error // status knows gRPC's own only bare
	}
	st := s.status(info.FullMethod, err)
	// A caller that leaves before it is refused pays too, or leaving would be the way around it: the question goes on.
	// The Source's other failures are not the caller's doing.
	if asked && (status.Code(st) == codes.PermissionDenied || stream.Context().Err() != nil) {
		if c, ok := connOf(stream.Context()); ok {
			s.admit.pay(c, workOfRefusal) // what it reads next waits, and not this answer
		}
	}
	return st
}

// begin checks the security header, which a request forged through a workload's server cannot carry (Workload
// Endpoint section 3), and counts the call against its caller.
func (s *Server) begin(ctx context.Context) (holder, error) {
	if v := metadata.ValueFromIncomingContext(ctx, "workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return holder{}, fmt.Errorf("%w: the request lacks the metadata workload.spiffe.io: true", identity.ErrInvalid)
	}
	c, ok := connOf(ctx)
	if !ok {
		return holder{}, fmt.Errorf("%w: the call has no caller", identity.ErrUnauthenticated)
	}
	return s.admit.hold(c, streams)
}

// status is the error in the words of the Workload Endpoint standard, section 6 and appendix A, which knows few
// codes. The text of an error that wraps no sentinel stays here: it was not written for strangers.
func (s *Server) status(method string, err error) error {
	var code codes.Code
	switch {
	case errors.Is(err, identity.ErrInvalid):
		code = codes.InvalidArgument
	case errors.Is(err, identity.ErrDenied), errors.Is(err, identity.ErrUnauthenticated), errors.Is(err, identity.ErrNotFound):
		code = codes.PermissionDenied
	case errors.Is(err, identity.ErrUnavailable), errors.Is(err, identity.ErrExhausted):
		code = codes.Unavailable
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	default:
		if st, ok := status.FromError(err); ok { // gRPC's own, such as Unimplemented or a message over the limit
			return st.Err()
		}
		s.log.Error("a Workload API call failed", "method", method, "error", err)
		return status.Error(codes.Internal, "internal error: see the agent's log")
	}
	s.log.Debug("a Workload API call was refused", "method", method, "code", code.String(), "error", err)
	return status.Error(code, err.Error())
}
