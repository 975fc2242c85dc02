package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// names answers for headless services as Kubernetes' DNS specification has it: SERVICE.NAMESPACE.svc.cluster.local with the
// addresses of the ready endpoints, and HOSTNAME.SERVICE... with one's own. It knows nothing else, and forwards nothing. (CoreDNS as
// a library would bring 150 modules more, the clients of clouds among them, and newer ones of those that Kubernetes is pinned to.)
type names struct {
	mu     sync.RWMutex // guards slices
	slices map[string]discoveryv1.EndpointSlice
}

const zone = ".svc.cluster.local."

// serveNames follows the endpoint slices and answers on UDP, until ctx ends. Answers are small: nobody needs TCP.
func (n *Node) serveNames(ctx context.Context) error {
	var conn net.PacketConn
	if err := n.Enter(func() (err error) {
		conn, err = net.ListenPacket("udp", DNSService+":53")
		return err
	}); err != nil {
		return fmt.Errorf("starting the name server: %w", err)
	}
	s := &names{slices: map[string]discoveryv1.EndpointSlice{}}
	n.done.Go(func() {
		_ = n.Watch(ctx, "/apis/discovery.k8s.io/v1/endpointslices", nil, func(ev Event) (bool, error) {
			var e discoveryv1.EndpointSlice
			if err := json.Unmarshal(ev.Object, &e); err != nil {
				return false, err
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if key := e.Namespace + "/" + e.Name; ev.Type == "DELETED" {
				delete(s.slices, key)
			} else {
				s.slices[key] = e
			}
			return false, nil
		})
	})
	n.done.Go(func() {
		buf := make([]byte, 1500)
		for {
			size, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer, err := s.answer(buf[:size]); err == nil {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	})
	context.AfterFunc(ctx, func() { conn.Close() })
	return nil
}

func (s *names) answer(query []byte) ([]byte, error) {
	var p dnsmessage.Parser
	head, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	addrs, known := s.lookup(strings.ToLower(q.Name.String()))
	reply := dnsmessage.Header{ID: head.ID, Response: true, Authoritative: true, RecursionDesired: head.RecursionDesired, RecursionAvailable: true}
	if !known {
		reply.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, reply)
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	if err := b.StartAnswers(); err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if q.Type == dnsmessage.TypeA && a.Is4() {
			if err := b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}, dnsmessage.AResource{A: a.As4()}); err != nil {
				return nil, err
			}
		}
	}
	return b.Finish()
}

// lookup gives the addresses under a name; known is true of a service that has none.
func (s *names) lookup(name string) (addrs []netip.Addr, known bool) {
	if name == "kubernetes.default"+zone {
		return []netip.Addr{netip.MustParseAddr(APIService)}, true
	}
	rest, ok := strings.CutSuffix(name, zone)
	parts := strings.Split(rest, ".")
	if !ok || len(parts) < 2 || len(parts) > 3 {
		return nil, false
	}
	service, ns, host := parts[len(parts)-2], parts[len(parts)-1], ""
	if len(parts) == 3 {
		host = parts[0]
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, e := range s.slices {
		if e.Namespace != ns || e.Labels[discoveryv1.LabelServiceName] != service {
			continue
		}
		known = known || host == ""
		for _, p := range e.Endpoints {
			if p.Conditions.Ready != nil && !*p.Conditions.Ready || host != "" && (p.Hostname == nil || *p.Hostname != host) {
				continue
			}
			for _, a := range p.Addresses {
				if addr, err := netip.ParseAddr(a); err == nil {
					addrs, known = append(addrs, addr), true
				}
			}
		}
	}
	return addrs, known
}
