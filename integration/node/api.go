package node

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// administrator is a client with every right, which dials in the node's network.
func (n *Node) administrator() (*http.Client, error) {
	conf, err := clientcmd.BuildConfigFromFlags("", n.path("pki/admin.kubeconfig"))
	if err != nil {
		return nil, err
	}
	conf.Dial = n.Dial
	return rest.HTTPClientFor(conf)
}

// Kubeconfig is the administrator's, for a process in the node.
func (n *Node) Kubeconfig() string { return n.path("pki/admin.kubeconfig") }

// Dial connects to a numeric address in the node's network.
func (n *Node) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.Enter(func() (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// StatusError is an answer of the API server's other than success.
type StatusError struct {
	Code int
	Text string
}

func (e *StatusError) Error() string { return e.Text }

// Missing reports whether the API server said that there is no such object.
func Missing(err error) bool {
	var s *StatusError
	return errors.As(err, &s) && s.Code == http.StatusNotFound
}

func (n *Node) request(ctx context.Context, method, path, contentType string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, n.URL+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	res, err := n.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode >= 300 {
		defer res.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(res.Body, 8192))
		return nil, &StatusError{res.StatusCode, fmt.Sprintf("%s %s: %s: %s", method, path, res.Status, text)}
	}
	return res, nil
}

// Do is one call of the administrator's: in and out as JSON, nil for none.
func (n *Node) Do(ctx context.Context, method, path string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
	}
	return n.call(ctx, method, path, "application/json", body, out)
}

func (n *Node) call(ctx context.Context, method, path, contentType string, body []byte, out any) error {
	res, err := n.request(ctx, method, path, contentType, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil || out == nil {
		return err
	}
	return json.Unmarshal(answer, out)
}

// kind is what the API server calls the objects of a kind in a path.
type kind struct {
	Name       string `json:"name"`
	Kind       string `json:"kind"`
	Namespaced bool   `json:"namespaced"`
}

type object struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string `yaml:"kind"`
	Metadata   struct {
		Name, Namespace string
	} `yaml:"metadata"`
	Items []yaml.Node `yaml:"items"`
}

// Path is where the API server has an object.
func (n *Node) objectPath(ctx context.Context, o object) (string, error) {
	base := "/apis/" + o.APIVersion
	if !strings.Contains(o.APIVersion, "/") {
		base = "/api/" + o.APIVersion
	}
	n.mu.Lock()
	k, ok := n.kinds[base][o.Kind]
	n.mu.Unlock()
	if !ok {
		var list struct{ Resources []kind }
		if err := n.Do(ctx, http.MethodGet, base, nil, &list); err != nil {
			return "", err
		}
		kinds := map[string]kind{}
		for _, r := range list.Resources {
			if !strings.Contains(r.Name, "/") {
				kinds[r.Kind] = r
			}
		}
		n.mu.Lock()
		n.kinds[base] = kinds
		n.mu.Unlock()
		if k, ok = kinds[o.Kind]; !ok {
			return "", fmt.Errorf("the API server has no %s in %s", o.Kind, o.APIVersion)
		}
	}
	if k.Namespaced {
		ns := o.Metadata.Namespace
		if ns == "" {
			ns = "default"
		}
		base += "/namespaces/" + ns
	}
	return base + "/" + k.Name + "/" + o.Metadata.Name, nil
}

// Apply applies the documents of a YAML stream, on the server's side, in their order. What a custom resource definition among
// them defines is waited for.
func (n *Node) Apply(ctx context.Context, manifest string) error {
	return n.each(manifest, false, func(o object, doc []byte) error {
		return n.poll(ctx, "the kind "+o.Kind, func() error {
			path, err := n.objectPath(ctx, o)
			if err == nil {
				err = n.call(ctx, http.MethodPatch, path+"?fieldManager=integration&force=true", "application/apply-patch+yaml", doc, nil)
			}
			if err != nil && !Missing(err) {
				return final{fmt.Errorf("applying %s %s: %w", o.Kind, o.Metadata.Name, err)}
			}
			return err
		})
	})
}

// Delete deletes the documents' objects, last first; those that are not there are no error. It does not wait for their end.
func (n *Node) Delete(ctx context.Context, manifest string) error {
	return n.each(manifest, true, func(o object, _ []byte) error {
		path, err := n.objectPath(ctx, o)
		if err == nil {
			err = n.Do(ctx, http.MethodDelete, path, &metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationBackground)}, nil)
		}
		if err != nil && !Missing(err) {
			return fmt.Errorf("deleting %s %s: %w", o.Kind, o.Metadata.Name, err)
		}
		return nil
	})
}

func (n *Node) each(manifest string, backward bool, f func(object, []byte) error) error {
	type document struct {
		o    object
		data []byte
	}
	var docs []document
	in := yaml.NewDecoder(strings.NewReader(manifest))
	for {
		var doc yaml.Node
		err := in.Decode(&doc)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading a manifest: %w", err)
		}
		var o object
		if err := doc.Decode(&o); err != nil {
			return fmt.Errorf("reading a manifest: %w", err)
		}
		if o.Kind == "" {
			continue // an empty document
		}
		data, err := yaml.Marshal(&doc)
		if err != nil {
			return err
		}
		docs = append(docs, document{o, data})
	}
	for i := range docs {
		if backward {
			i = len(docs) - 1 - i
		}
		if err := f(docs[i].o, docs[i].data); err != nil {
			return err
		}
	}
	return nil
}

// Event is one of a watch.
type Event struct {
	Type   string // ADDED, MODIFIED, DELETED
	Object json.RawMessage
}

// Watch calls f for each object of a collection and each change, until it says that it has seen enough. It begins anew when the
// API server ends the watch, or is away.
func (n *Node) Watch(ctx context.Context, path string, query url.Values, f func(Event) (enough bool, err error)) error {
	for {
		enough, err := n.watch(ctx, path, query, f)
		var stop final
		if enough || errors.As(err, &stop) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(100 * time.Millisecond): // an API server that is away is not asked at full speed
		}
	}
}

// final is an error that asking again does not help.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

func (n *Node) watch(ctx context.Context, path string, query url.Values, f func(Event) (bool, error)) (bool, error) {
	var list struct {
		Metadata metav1.ListMeta
		Items    []json.RawMessage
	}
	if err := n.Do(ctx, http.MethodGet, path+"?"+query.Encode(), nil, &list); err != nil {
		return false, err
	}
	for _, item := range list.Items {
		if enough, err := f(Event{"ADDED", item}); enough || err != nil {
			return enough, wrapFinal(err)
		}
	}
	q := url.Values{"watch": {"1"}, "resourceVersion": {list.Metadata.ResourceVersion}}
	for k, v := range query {
		q[k] = v
	}
	res, err := n.request(ctx, http.MethodGet, path+"?"+q.Encode(), "application/json", nil)
	if err != nil {
		return false, err
	}
	defer res.Body.Close()
	in := json.NewDecoder(bufio.NewReader(res.Body))
	for {
		var ev Event
		if err := in.Decode(&ev); err != nil {
			return false, err
		}
		if ev.Type == "ERROR" {
			return false, fmt.Errorf("watching %s: %s", path, ev.Object)
		}
		if enough, err := f(ev); enough || err != nil {
			return enough, wrapFinal(err)
		}
	}
}

func wrapFinal(err error) error {
	if err == nil {
		return nil
	}
	return final{err}
}

// WaitFor waits until the object of that name in a collection is there and as wanted; two minutes at the most.
func WaitFor[T any](ctx context.Context, n *Node, path, name, what string, ok func(*T) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	last := json.RawMessage("nothing")
	err := n.Watch(ctx, path, url.Values{"fieldSelector": {"metadata.name=" + name}}, func(ev Event) (bool, error) {
		last = ev.Object
		o := new(T)
		if err := json.Unmarshal(ev.Object, o); err != nil {
			return false, err
		}
		return ev.Type != "DELETED" && ok(o), nil
	})
	if err != nil {
		return fmt.Errorf("waiting until %s: %w; the last seen of %s: %.3000s", what, err, name, last)
	}
	return nil
}

// WaitGone waits until there is no object of that name.
func (n *Node) WaitGone(ctx context.Context, path, name string) error {
	return n.pollFor(ctx, 2*time.Minute, "the end of "+name, func() error {
		err := n.Do(ctx, http.MethodGet, path+"/"+name, nil, nil)
		if Missing(err) {
			return nil
		}
		return errors.Join(err, errors.New("it is still there"))
	})
}

// Pods are those of a namespace that a label selector matches.
func (n *Node) Pods(ctx context.Context, ns, selector string) ([]corev1.Pod, error) {
	var list corev1.PodList
	err := n.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+ns+"/pods?"+url.Values{"labelSelector": {selector}}.Encode(), nil, &list)
	return list.Items, err
}

// WaitReady waits until so many pods of a selector are ready, and returns them.
func (n *Node) WaitReady(ctx context.Context, ns, selector string, count int) (pods []corev1.Pod, err error) {
	err = n.pollFor(ctx, 3*time.Minute, fmt.Sprintf("%d ready pods of %s in %s", count, selector, ns), func() error {
		all, err := n.Pods(ctx, ns, selector)
		if err != nil {
			return err
		}
		pods = nil
		var state []string
		for _, p := range all {
			if PodReady(&p) {
				pods = append(pods, p)
			} else {
				state = append(state, describe(&p))
			}
		}
		if len(pods) != count || len(all) != count {
			return fmt.Errorf("%d of %d are ready: %s", len(pods), len(all), strings.Join(state, "; "))
		}
		return nil
	})
	return pods, err
}

// PodReady reports whether a pod says so, and is not about to end.
func PodReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return p.DeletionTimestamp == nil
		}
	}
	return false
}

func describe(p *corev1.Pod) string {
	out := fmt.Sprintf("%s %s", p.Name, p.Status.Phase)
	for _, c := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if w := c.State.Waiting; w != nil {
			out += fmt.Sprintf(" %s: %s %s", c.Name, w.Reason, w.Message)
		}
		if t := c.LastTerminationState.Terminated; t != nil {
			out += fmt.Sprintf(" %s ended with %d: %s", c.Name, t.ExitCode, t.Message)
		}
	}
	return out
}

// Logs are what a pod's container has written; of the only one, where no container is named.
func (n *Node) Logs(ctx context.Context, ns, pod, container string) (string, error) {
	res, err := n.request(ctx, http.MethodGet, "/api/v1/namespaces/"+ns+"/pods/"+pod+"/log?container="+container, "application/json", nil)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	return string(data), err
}

// Events are the messages of the events on an object of that name, "Reason: message" each.
func (n *Node) Events(ctx context.Context, ns, name string) ([]string, error) {
	var list corev1.EventList
	q := url.Values{"fieldSelector": {"involvedObject.name=" + name}}
	if err := n.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+ns+"/events?"+q.Encode(), nil, &list); err != nil {
		return nil, err
	}
	var out []string
	for _, e := range list.Items {
		out = append(out, e.Reason+": "+e.Message)
	}
	return out, nil
}

// Exec runs a program in a pod's running container, as that container's user would, and returns its output.
func (n *Node) Exec(ctx context.Context, ns, pod, container string, argv ...string) (string, error) {
	var p corev1.Pod
	if err := n.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+ns+"/pods/"+pod, nil, &p); err != nil {
		return "", err
	}
	c, err := containerOf(&p, container)
	if err != nil {
		return "", fmt.Errorf("running %s: %w", argv[0], err)
	}
	id := make([]byte, 8)
	rand.Read(id)
	return n.ctr(ctx, append([]string{"tasks", "exec", "--exec-id", hex.EncodeToString(id), c}, argv...)...)
}

// Signal sends a signal to a container's processes; one that ends by it is started again by the kubelet, where its pod says so.
func (n *Node) Signal(ctx context.Context, p *corev1.Pod, container string, s syscall.Signal) error {
	c, err := containerOf(p, container)
	if err == nil {
		_, err = n.ctr(ctx, "tasks", "kill", "--all", "--signal", strconv.Itoa(int(s)), c)
	}
	return err
}

// containerOf is what the runtime calls a container that runs; the only one, where none is named.
func containerOf(p *corev1.Pod, container string) (string, error) {
	for _, c := range append(p.Status.ContainerStatuses, p.Status.InitContainerStatuses...) {
		if c.Name != container && container != "" {
			continue
		}
		if c.State.Running == nil {
			return "", fmt.Errorf("container %s of pod %s does not run", c.Name, p.Name)
		}
		return strings.TrimPrefix(c.ContainerID, "containerd://"), nil
	}
	return "", fmt.Errorf("pod %s has no container %q", p.Name, container)
}
