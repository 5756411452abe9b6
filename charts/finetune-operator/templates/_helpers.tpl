{{- define "finetune.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride }}
{{- else if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- /* Cluster-wide names contain the namespace, so releases with the same name in two namespaces do not collide. */ -}}
{{- define "finetune.clusterName" -}}
{{ printf "%s-%s" .Release.Namespace (include "finetune.fullname" .) }}
{{- end }}

{{- define "finetune.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "finetune.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "finetune.fullname" .) }}
{{- else -}}
{{ required "serviceAccount.name is needed where serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end -}}
{{- end }}

{{- define "finetune.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- /* finetune-trainer in the same registry path as the operator image. */ -}}
{{- define "finetune.trainerImage" -}}
{{- $folder := dir .Values.image.repository -}}
{{- .Values.trainerImage | default (printf "%sfinetune-trainer:%s" (eq $folder "." | ternary "" (printf "%s/" $folder)) .Chart.AppVersion) -}}
{{- end }}

{{- /* Permissions of the operator in each namespace that it serves. */ -}}
{{- define "finetune.rules" -}}
# Jobs: read. Only the operator writes their status. finalizers is needed for blockOwnerDeletion in children.
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [list, watch]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [update]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers]
  verbs: [update]
# The child of an attempt: created once, never changed, deleted when its end is recorded. get: to see who owns it.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
{{- if eq .Values.backend "trainjob" }}
- apiGroups: [trainer.kubeflow.org]
  resources: [trainjobs]
  verbs: [get, list, watch, create, delete]
# The pod template of a TrainJob: created before it, deleted with it.
- apiGroups: [trainer.kubeflow.org]
  resources: [trainingruntimes]
  verbs: [get, create, delete]
{{- else }}
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, delete]
{{- end }}
# Root causes are read from pods. Their controllers create and delete them.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# Run config and report. patch is needed to grant it: a job's pods may patch that job's report and nothing else.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch]
# ServiceAccount, permissions and NetworkPolicy of a job's pods: created once, garbage-collected with the job.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, create]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
# Run volumes. The operator never deletes claims.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create]
# Single Secrets by name, to report that one or its key is missing. Never list or watch.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}

{{- /* Permissions that only a ClusterRole can grant. */ -}}
{{- define "finetune.clusterRules" -}}
# Pods on a node with the out-of-service taint can no longer write.
- apiGroups: [""]
  resources: [nodes]
  verbs: [get]
# To notice that the training-operator or Kubeflow Trainer is installed later.
- apiGroups: [apiextensions.k8s.io]
  resources: [customresourcedefinitions]
  verbs: [list, watch]
{{- if .Values.namespaces }}
# To notice that a served namespace is deleted and created again.
- apiGroups: [""]
  resources: [namespaces]
  verbs: [list, watch]
{{- end }}
{{- end }}
