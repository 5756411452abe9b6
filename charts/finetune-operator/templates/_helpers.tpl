{{- define "finetune.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride }}
{{- else if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- /* Cluster-wide names carry the namespace: releases of one name in two namespaces do not meet. */ -}}
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

{{- /* finetune-trainer in the folder of the operator's image. */ -}}
{{- define "finetune.trainerImage" -}}
{{- $folder := dir .Values.image.repository -}}
{{- .Values.trainerImage | default (printf "%sfinetune-trainer:%s" (eq $folder "." | ternary "" (printf "%s/" $folder)) .Chart.AppVersion) -}}
{{- end }}

{{- /* What the operator may do in each namespace that it serves. */ -}}
{{- define "finetune.rules" -}}
# The jobs themselves: read. Status is the operator's alone to write; finalizers, for blockOwnerDeletion in children.
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [list, watch]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [update]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers]
  verbs: [update]
# The child of an attempt: made once, never changed, deleted when its end is recorded. get: whose it is, if it exists.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
{{- if eq .Values.backend "trainjob" }}
- apiGroups: [trainer.kubeflow.org]
  resources: [trainjobs]
  verbs: [get, list, watch, create, delete]
# The pods that a TrainJob runs: made before it, deleted with it.
- apiGroups: [trainer.kubeflow.org]
  resources: [trainingruntimes]
  verbs: [get, create, delete]
{{- else }}
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, delete]
{{- end }}
# Root causes are read from pods; they are made and ended by their controllers.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# Run config and report. patch is held to be handed on: a job's pods may patch that job's report and nothing else.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch]
# Who a job's pods are, what they may do, who may reach them: made once, collected with the job.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, create]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
# Where the run is kept. Claims are never deleted by the operator.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create]
# One Secret by its name, to say that it or a key is missing. Never list or watch.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}

{{- /* What only a ClusterRole can give. */ -}}
{{- define "finetune.clusterRules" -}}
# A node that carries the out-of-service taint cannot write any more.
- apiGroups: [""]
  resources: [nodes]
  verbs: [get]
# To notice that training-operator or Kubeflow Trainer was installed later.
- apiGroups: [apiextensions.k8s.io]
  resources: [customresourcedefinitions]
  verbs: [list, watch]
{{- if .Values.namespaces }}
# To notice that a served namespace was deleted and made again.
- apiGroups: [""]
  resources: [namespaces]
  verbs: [list, watch]
{{- end }}
{{- end }}
