// Package v1alpha1 holds the custom resources of group countersign.io as Go types. What a field means, and what may be in it, is said
// by the CustomResourceDefinitions in deploy/chart/crds, which the API server enforces.
package v1alpha1

import (
	"encoding/json"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Group is the API group, Version the version of it.
const (
	Group   = "countersign.io"
	Version = "v1alpha1"
)

// AddToScheme makes the types known to a client.
func AddToScheme(s *runtime.Scheme) {
	gv := schema.GroupVersion{Group: Group, Version: Version}
	s.AddKnownTypes(gv, &WorkloadIdentity{}, &WorkloadIdentityList{}, &FederatedTrustDomain{}, &FederatedTrustDomainList{}, &KubeCluster{}, &KubeClusterList{})
	metav1.AddToGroupVersion(s, gv)
}

// Status is what the statuses have in common.
type Status struct {
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	LastError          string             `json:"lastError,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
}

// WorkloadIdentity says which pods get which SPIFFE ID.
type WorkloadIdentity struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   WorkloadIdentitySpec   `json:"spec"`
	Status WorkloadIdentityStatus `json:"status,omitzero"`
}

// WorkloadIdentitySpec is what is asked for.
type WorkloadIdentitySpec struct {
	PodSelector       *metav1.LabelSelector `json:"podSelector,omitempty"`
	NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector,omitempty"`
	SPIFFEIDTemplate  string                `json:"spiffeIDTemplate"`
	X509TTL           *metav1.Duration      `json:"x509TTL,omitempty"`
	JWTTTL            *metav1.Duration      `json:"jwtTTL,omitempty"`
	DNSNames          []string              `json:"dnsNames,omitempty"`
	FederatesWith     []string              `json:"federatesWith,omitempty"`
	Hint              string                `json:"hint,omitempty"`
}

// WorkloadIdentityStatus is what came of it.
type WorkloadIdentityStatus struct {
	Status      `json:",inline"`
	PodsMatched int64    `json:"podsMatched"`
	Entries     []string `json:"entries,omitempty"`
}

// WorkloadIdentityList is a list.
type WorkloadIdentityList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []WorkloadIdentity `json:"items"`
}

// FederatedTrustDomain is another trust domain whose identities are verified here.
type FederatedTrustDomain struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   FederatedTrustDomainSpec   `json:"spec"`
	Status FederatedTrustDomainStatus `json:"status,omitzero"`
}

// FederatedTrustDomainSpec is what is asked for.
type FederatedTrustDomainSpec struct {
	TrustDomain       string `json:"trustDomain"`
	BundleEndpointURL string `json:"bundleEndpointURL"`
	Profile           string `json:"profile"`
	EndpointSPIFFEID  string `json:"endpointSPIFFEID,omitempty"`
	InitialBundle     string `json:"initialBundle,omitempty"`
}

// FederatedTrustDomainStatus is what came of it.
type FederatedTrustDomainStatus struct {
	Status       `json:",inline"`
	Sequence     int64        `json:"sequence,omitempty"`
	LastRefresh  *metav1.Time `json:"lastRefresh,omitempty"`
	PinnedBundle string       `json:"pinnedBundle,omitempty"`
}

// FederatedTrustDomainList is a list.
type FederatedTrustDomainList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []FederatedTrustDomain `json:"items"`
}

// KubeCluster is another kube cluster whose pods have identities here.
type KubeCluster struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   KubeClusterSpec `json:"spec"`
	Status Status          `json:"status,omitzero"`
}

// KubeClusterSpec is what is asked for.
type KubeClusterSpec struct {
	Issuer        string   `json:"issuer"`
	Audience      string   `json:"audience"`
	JWKS          string   `json:"jwks,omitempty"`
	JWKSURL       string   `json:"jwksURL,omitempty"`
	CAPEM         string   `json:"caPEM,omitempty"`
	Kubeconfig    string   `json:"kubeconfig,omitempty"`
	TokenReview   bool     `json:"tokenReview,omitempty"`
	AgentAccounts []string `json:"agentAccounts,omitempty"`
	DefaultID     string   `json:"defaultID,omitempty"`
	NoDefaultID   bool     `json:"noDefaultID,omitempty"`
}

// KubeClusterList is a list.
type KubeClusterList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []KubeCluster `json:"items"`
}

// clone copies by way of JSON: there are few of these objects, and all of them came from JSON.
func clone[T any](in *T) *T {
	raw, err := json.Marshal(in)
	out := new(T)
	if err == nil {
		err = json.Unmarshal(raw, out)
	}
	if err != nil {
		panic(fmt.Sprintf("copying a %T: %v", in, err)) // cannot be: it has no field that JSON cannot have
	}
	return out
}

// DeepCopyObject is runtime.Object's.
func (in *WorkloadIdentity) DeepCopyObject() runtime.Object { return clone(in) }

// DeepCopyObject is runtime.Object's.
func (in *WorkloadIdentityList) DeepCopyObject() runtime.Object { return clone(in) }

// DeepCopyObject is runtime.Object's.
func (in *FederatedTrustDomain) DeepCopyObject() runtime.Object { return clone(in) }

// DeepCopyObject is runtime.Object's.
func (in *FederatedTrustDomainList) DeepCopyObject() runtime.Object { return clone(in) }

// DeepCopyObject is runtime.Object's.
func (in *KubeCluster) DeepCopyObject() runtime.Object { return clone(in) }

// DeepCopyObject is runtime.Object's.
func (in *KubeClusterList) DeepCopyObject() runtime.Object { return clone(in) }
