{{- define "prelude.labels" -}}
app.kubernetes.io/name: {{ .Release.Name }}
{{- end }}

{{- define "prelude.image" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag }}"
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{/* What all pods have. */}}
{{- define "prelude.pod" -}}
automountServiceAccountToken: false
# A Service named 'prelude' would set PRELUDE_PORT to a URL.
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Where pods of servers run; those of Ray's head and ingress have no need of it. */}}
{{- define "prelude.placement" -}}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "prelude.resources" -}}
requests: {cpu: {{ .Values.cpus | quote }}, memory: {{ .Values.memory }}}
limits:
  memory: {{ .Values.memory }}
  {{- with int .Values.gpus }}
  nvidia.com/gpu: {{ . | quote }}
  {{- end }}
{{- end }}
