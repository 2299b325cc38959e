{{/* Names and what all pods have in common. */}}

{{- define "contraflow.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 39 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 39 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "contraflow.selector" -}}
app.kubernetes.io/name: contraflow
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "contraflow.labels" -}}
{{ include "contraflow.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "contraflow.image" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* The restricted profile of Pod Security Standards. */}}
{{- define "contraflow.podSecurity" -}}
{{ include "contraflow.podSpec" (dict "root" . "token" false) }}
{{- end }}

{{/* The same of a pod that speaks to the API server. */}}
{{- define "contraflow.podIdentity" -}}
{{ include "contraflow.podSpec" (dict "root" . "token" true) }}
{{- end }}

{{- define "contraflow.podSpec" -}}
automountServiceAccountToken: {{ .token }}
{{- with .root }}
securityContext:
  runAsNonRoot: true
  {{- toYaml .Values.securityContext | nindent 2 }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}
