{{/* Names are fixed: one installation in a namespace, one agent on a node. The members' code knows them (docs/KUBERNETES.md). */}}

{{- define "countersign.labels" -}}
app.kubernetes.io/part-of: countersign
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "countersign.tag" -}}
{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "countersign.members.image" -}}
{{ .Values.members.image | default (printf "%s/countersign:%s" .Values.image.registry (include "countersign.tag" .)) }}
{{- end }}

{{- define "countersign.agent.image" -}}
{{ .Values.agent.image | default (printf "%s/countersign-agent:%s" .Values.image.registry (include "countersign.tag" .)) }}
{{- end }}

{{- define "countersign.server.yaml" -}}
{{- $accounts := .Values.members.agentAccounts | default (list (printf "%s/countersign-agent" .Release.Namespace)) -}}
{{- $bundle := dict "config_map" "countersign-bundle" "namespaces" .Values.bundle.namespaces "cluster_trust_bundle" .Values.bundle.clusterTrustBundle -}}
{{- $kube := dict "cluster" .Values.cluster "kubeconfig" "in-cluster" "namespace" .Release.Namespace "stateful_set" "countersign" "agent_accounts" $accounts "default_id" .Values.members.defaultID "bundle" $bundle "resources" .Values.resources -}}
{{- $conf := dict "version" 1 "trust_domain" .Values.trustDomain "data_dir" "/var/lib/countersign/data" "health" "0.0.0.0:8080" "kubernetes" $kube "log" (dict "format" .Values.logFormat) -}}
{{- toYaml (mustMergeOverwrite $conf (deepCopy .Values.members.config)) }}
{{- end }}

{{- define "countersign.agent.yaml" -}}
{{- $servers := .Values.agent.servers | default (list (printf "countersign.%s.svc:8443" .Release.Namespace)) -}}
{{- $conf := dict "version" 1 "trust_domain" .Values.trustDomain "servers" $servers "health" "0.0.0.0:8081" "attest" (dict "kube" (dict "cluster" .Values.cluster)) "log" (dict "format" .Values.logFormat) -}}
{{- if .Values.agent.caPin -}}
{{- $conf = set $conf "ca_pin" .Values.agent.caPin -}}
{{- else -}}
{{- $conf = set $conf "bundle_file" "/var/run/secrets/countersign.io/bundle.pem" -}}
{{- end -}}
{{- with .Values.agent.csi }}
{{- if .enabled -}}
{{- $conf = set $conf "csi" (dict "socket" (printf "%s/plugins/csi.countersign.io/csi.sock" .kubeletDir) "registration_dir" (printf "%s/plugins_registry" .kubeletDir) "kubelet_dir" .kubeletDir "audience" $.Values.audience) -}}
{{- end -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite $conf (deepCopy .Values.agent.config)) }}
{{- end }}

{{/* What PodSecurity "restricted" asks of a container. */}}
{{- define "countersign.restricted" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end }}
