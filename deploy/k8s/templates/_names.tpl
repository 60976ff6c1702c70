{{- define "inward.name" -}}
{{- if contains "inward" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-inward" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "inward.labels" -}}
app.kubernetes.io/name: inward
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/*
The objects of one template for each model; called with (list $ "inward.api"). What an entry of `models` does not say is as for the first, but
for what belongs to a model: its revision, heads and adapters.
*/}}
{{- define "inward.each" -}}
{{- $root := index . 0 }}
{{- $template := index . 1 }}
{{- $own := dict "model" (dict "revision" "") "storage" (dict "heads" "" "adapters" "") }}
{{- range $one := concat (list dict) $root.Values.models }}
{{- $values := mergeOverwrite (deepCopy $root.Values) (ternary (deepCopy $own) dict (hasKey $one "name")) (omit $one "name") }}
---
{{ include $template (dict "Values" $values "Model" (get $one "name") "Release" $root.Release "Chart" $root.Chart "Files" $root.Files "Capabilities" $root.Capabilities) }}
{{- end }}
{{- end }}

{{/* Of the objects of one model. */}}
{{- define "inward.model" -}}
{{ include "inward.name" . }}{{ with get . "Model" }}-{{ . }}{{ end }}
{{- end }}

{{/* Called with (list $ "api"). */}}
{{- define "inward.component" -}}
{{ index . 1 }}{{ with get (index . 0) "Model" }}-{{ . }}{{ end }}
{{- end }}

{{/* What selects the pods of one component; called with (list $ "api"). */}}
{{- define "inward.selector" -}}
app.kubernetes.io/name: inward
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ include "inward.component" . }}
{{- end }}

{{/* There is one Redis for all models. */}}
{{- define "inward.redisSelector" -}}
{{ include "inward.selector" (list (dict "Release" .Release) "redis") }}
{{- end }}

{{- define "inward.keysSecret" -}}
{{ .Values.auth.existingSecret | default (printf "%s-keys" (include "inward.name" .)) }}
{{- end }}

{{- define "inward.redisSecret" -}}
{{ .Values.redis.existingSecret | default (printf "%s-redis" (include "inward.name" .)) }}
{{- end }}

{{- define "inward.hubSecret" -}}
{{ .Values.hub.existingSecret | default (printf "%s-hub" (include "inward.name" .)) }}
{{- end }}

{{/* Where pods may run, and as what; called with .Values.api or .Values.worker. */}}
{{- define "inward.placement" -}}
nodeSelector: {{- toYaml .nodeSelector | nindent 2 }}
tolerations: {{- toYaml .tolerations | nindent 2 }}
affinity: {{- toYaml .affinity | nindent 2 }}
{{- with .runtimeClass }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .priorityClass }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "inward.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "inward.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Settings of API and workers alike. */}}
{{- define "inward.settings" -}}
- name: INWARD_MODEL
  value: {{ .Values.model.id | quote }}
{{- with .Values.model.revision }}
- name: INWARD_REVISION
  value: {{ . | quote }}
{{- end }}
{{- if .Values.redis.urls }}
- name: INWARD_REDIS_URLS
  valueFrom: {secretKeyRef: {name: {{ include "inward.redisSecret" . }}, key: redis-urls}}
{{- else }}
- name: INWARD_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ include "inward.redisSecret" . }}, key: redis-url}}
{{- end }}
{{- if or .Values.hub.token .Values.hub.existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "inward.hubSecret" . }}, key: token}}
{{- end }}
{{- with get . "Model" }}
- name: INWARD_QUEUE
  value: {{ . }}
{{- end }}
{{- include "inward.moreSettings" .Values.model.settings }}
{{- end }}

{{- define "inward.moreSettings" -}}
{{- range $name, $value := . }}
- name: INWARD_{{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "inward.modelVolume" -}}
- name: models
{{- if .Values.storage.models }}
  persistentVolumeClaim: {claimName: {{ .Values.storage.models }}}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}
