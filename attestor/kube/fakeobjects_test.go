package kube

import (
	"encoding/json"
	"net/http"
	"strconv"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// fakeObjects are the namespaces or the ReplicaSets of a fakeAPI: a list of one page, and a watch.
type fakeObjects struct {
	mu       sync.Mutex
	all      map[string]metav1.PartialObjectMetadata // by name
	revision int
	streams  map[chan podEvent]bool
}

// set adds or changes one.
func (o *fakeObjects) set(name, uid string, edit func(*metav1.PartialObjectMetadata)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.revision++
	m := metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"},
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(uid), ResourceVersion: strconv.Itoa(o.revision)},
	}
	edit(&m)
	if o.all == nil {
		o.all = map[string]metav1.PartialObjectMetadata{}
	}
	o.all[name] = m
	for c := range o.streams {
		c <- podEvent{"MODIFIED", m}
	}
}

func (o *fakeObjects) serveAll(f *fakeAPI, what string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Query().Get("watch") == "" {
			if !f.allowed(w, r, "list "+what) {
				return
			}
			o.mu.Lock()
			defer o.mu.Unlock()
			l := metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadataList", APIVersion: "meta.k8s.io/v1"}}
			l.ResourceVersion = strconv.Itoa(o.revision + 1)
			for _, m := range o.all {
				l.Items = append(l.Items, m)
			}
			json.NewEncoder(w).Encode(l)
			return
		}
		if !f.allowed(w, r, "watch "+what) {
			return
		}
		c := make(chan podEvent, 100)
		o.mu.Lock()
		if o.streams == nil {
			o.streams = map[chan podEvent]bool{}
		}
		o.streams[c] = true
		from, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
		for _, m := range o.all { // what came between the list and the watch
			if rev, _ := strconv.Atoi(m.ResourceVersion); rev >= from {
				c <- podEvent{"MODIFIED", m}
			}
		}
		o.mu.Unlock()
		defer func() {
			o.mu.Lock()
			defer o.mu.Unlock()
			delete(o.streams, c)
		}()
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		for {
			select {
			case <-r.Context().Done():
				return
			case e := <-c:
				json.NewEncoder(w).Encode(e)
				w.(http.Flusher).Flush()
			}
		}
	}
}

func (o *fakeObjects) serveOne(f *fakeAPI, what string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		f.gets.Add(1)
		if !f.allowed(w, r, "get "+what) {
			return
		}
		o.mu.Lock()
		defer o.mu.Unlock()
		if m, ok := o.all[r.PathValue("name")]; ok {
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(m)
			return
		}
		f.status(w, http.StatusNotFound, metav1.StatusReasonNotFound, "no such object")
	}
}
