{{/* Names, labels and the parts of pods that several templates share. */}}

{{- define "muster.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end -}}

{{- define "muster.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What selects pods of a component: (dict "context" $ "component" "router"). */}}
{{- define "muster.selector" -}}
app.kubernetes.io/name: muster
app.kubernetes.io/instance: {{ .context.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of an object: the same arguments. */}}
{{- define "muster.labels" -}}
{{ include "muster.selector" . }}
app.kubernetes.io/version: {{ .context.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .context.Release.Service }}
helm.sh/chart: {{ .context.Chart.Name }}-{{ .context.Chart.Version | replace "+" "_" }}
{{- with .context.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods. The chart's version is not among them, or a new chart would restart what it did not change. */}}
{{- define "muster.podLabels" -}}
{{ include "muster.selector" . }}
{{- with .context.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "muster.routerAccount" -}}
{{- with .Values.router.serviceAccount -}}
{{- .name | default (ternary (printf "%s-router" (include "muster.fullname" $)) "default" .create) -}}
{{- end -}}
{{- end -}}

{{- define "muster.workerAccount" -}}
{{- with .Values.workers.serviceAccount -}}
{{- .name | default (ternary (printf "%s-worker" (include "muster.fullname" $)) "default" .create) -}}
{{- end -}}
{{- end -}}

{{/* Secret with the certificate of a role: (dict "context" $ "role" "router"). */}}
{{- define "muster.tlsSecret" -}}
{{- if eq .context.Values.tls.mode "existingSecrets" -}}
{{- get .context.Values.tls.existingSecrets .role -}}
{{- else -}}
{{- printf "%s-tls-%s" (include "muster.fullname" .context) .role -}}
{{- end -}}
{{- end -}}

{{- define "muster.apiKeysSecret" -}}
{{- if eq .Values.apiKeys.mode "existingSecret" -}}
{{- .Values.apiKeys.existingSecret -}}
{{- else -}}
{{- printf "%s-api-keys" (include "muster.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* DNS names under which clients reach the routers, as a YAML list. */}}
{{- define "muster.dnsNames" -}}
{{- $service := printf "%s-router" (include "muster.fullname" .) -}}
- {{ $service }}
- {{ $service }}.{{ .Release.Namespace }}
- {{ $service }}.{{ .Release.Namespace }}.svc
- {{ $service }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
- localhost
{{- end -}}

{{/* IP addresses among tls.names. */}}
{{- define "muster.isIp" -}}
{{- if or (regexMatch "^[0-9]+(\\.[0-9]+){3}$" .) (contains ":" .) -}}yes{{- end -}}
{{- end -}}

{{- define "muster.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "muster.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* A table of TOML: (dict "name" "router" "own" DICT "more" DICT). JSON's scalars and lists are TOML's. */}}
{{- define "muster.toml" -}}
[{{ .name }}]
{{- range $key, $value := .own }}
{{ $key }} = {{ toRawJson $value }}
{{- end }}
{{- range $key, $value := .more }}
{{ $key }} = {{ toRawJson $value }}
{{- end }}
{{- end -}}

{{/* Keys of both roles. */}}
{{- define "muster.commonConfig" -}}
log: {{ .Values.log.level | quote }}
log_format: {{ .Values.log.format | quote }}
admin: "0.0.0.0:9090"
{{- if eq .Values.tls.mode "off" }}
insecure_plaintext: true
{{- else }}
tls_cert: /etc/muster/tls/tls.crt
tls_key: /etc/muster/tls/tls.key
tls_ca: /etc/muster/tls/ca.crt
{{- end }}
{{- end -}}

{{- define "muster.routerConfig" -}}
{{- $name := include "muster.fullname" . -}}
{{- $own := include "muster.commonConfig" . | fromYaml -}}
{{- $_ := set $own "http" "0.0.0.0:8080" -}}
{{- $_ := set $own "grpc" "0.0.0.0:50051" -}}
{{- $_ := set $own "replicas" .Values.expertReplicas -}}
{{- $_ := set $own "drain_timeout" (printf "%ds" (int64 .Values.router.drainTimeoutSeconds)) -}}
{{- $_ := set $own "leave_after" (printf "%ds" (int64 .Values.router.leaveAfterSeconds)) -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "demo" -}}{{- $_ := set $own "model" "demo" -}}
{{- else if eq $model.source "download" -}}{{- $_ := set $own "model" $model.download.repository -}}
{{- else if eq $model.source "existingPath" -}}{{- $_ := set $own "model" $model.existingPath.path -}}
{{- else if eq $model.source "image" -}}{{- $_ := set $own "model" (printf "/model/%s" (trimPrefix "/" $model.image.path) | trimSuffix "/") -}}
{{- else -}}{{- $_ := set $own "model" "/model" -}}
{{- end -}}
{{- with $model.servedName -}}{{- $_ := set $own "model_name" . -}}{{- end -}}
{{- if eq .Values.discovery "kubernetes" -}}
{{- $_ := set $own "discover" (list (printf "kubernetes:%s/%s-workers" .Release.Namespace $name)) -}}
{{- $_ := set $own "lease" (printf "kubernetes:%s/%s-leader" .Release.Namespace $name) -}}
{{- else -}}
{{- $_ := set $own "discover" (list (printf "dns:%s-workers.%s.svc:7070" $name .Release.Namespace)) -}}
{{- end -}}
{{- if eq .Values.apiKeys.mode "off" -}}{{- $_ := set $own "insecure_no_keys" true -}}
{{- else -}}{{- $_ := set $own "api_keys" "/etc/muster/keys/keys" -}}
{{- end -}}
{{- include "muster.toml" (dict "name" "router" "own" $own "more" .Values.router.config) -}}
{{- end -}}

{{/* Pools with the defaults filled in, as a YAML list. Lists and maps of a pool replace the defaults'; but `autoscaling` is merged. */}}
{{- define "muster.pools" -}}
{{- $pools := list -}}
{{- range $given := .Values.workers.pools -}}
{{- $pool := deepCopy $.Values.workers.defaults -}}
{{- range $key, $value := $given -}}
{{- if eq $key "autoscaling" -}}
{{- range $inner, $setting := $value -}}{{- $_ := set $pool.autoscaling $inner $setting -}}{{- end -}}
{{- else -}}
{{- $_ := set $pool $key $value -}}
{{- end -}}
{{- end -}}
{{- $pools = append $pools $pool -}}
{{- end -}}
{{- toYaml (dict "pools" $pools) -}}
{{- end -}}

{{/* The [worker] table of a pool: (dict "context" $ "pool" POOL). */}}
{{- define "muster.workerConfig" -}}
{{- $own := include "muster.commonConfig" .context | fromYaml -}}
{{- $_ := set $own "listen" "0.0.0.0:7070" -}}
{{- $_ := set $own "join" (list (printf "%s-routers.%s.svc:50051" (include "muster.fullname" .context) .context.Release.Namespace)) -}}
{{- $_ := set $own "share" "none" -}}
{{- $_ := set $own "memory" .pool.memory -}}
{{- $_ := set $own "drain_timeout" (printf "%ds" (int64 .pool.drainTimeoutSeconds)) -}}
{{- with .pool.domain -}}{{- $_ := set $own "domain" . -}}{{- end -}}
{{- include "muster.toml" (dict "name" "worker" "own" $own "more" .pool.config) -}}
{{- end -}}

{{/* Spread constraints, those without a selector with one: (dict "constraints" LIST "selector" DICT). */}}
{{- define "muster.spread" -}}
{{- $selector := .selector -}}
{{- $constraints := list -}}
{{- range .constraints -}}
{{- $constraints = append $constraints (hasKey . "labelSelector" | ternary . (set (deepCopy .) "labelSelector" (dict "matchLabels" $selector))) -}}
{{- end -}}
{{- toYaml $constraints -}}
{{- end -}}

{{/* A quantity, of Kubernetes or of Muster, in bytes; nothing when it is written in a way that is not understood here. */}}
{{- define "muster.bytes" -}}
{{- $text := toString . -}}
{{- if kindIs "float64" . -}}{{- $text = printf "%.0f" . -}}{{- end -}}
{{- $units := dict "" 1 "B" 1 "k" 1000 "kB" 1000 "M" 1000000 "MB" 1000000 "G" 1000000000 "GB" 1000000000 "T" 1000000000000 "TB" 1000000000000 "Ki" 1024 "KiB" 1024 "Mi" 1048576 "MiB" 1048576 "Gi" 1073741824 "GiB" 1073741824 "Ti" 1099511627776 "TiB" 1099511627776 -}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text -}}
{{- if and $number (hasKey $units $unit) -}}
{{- printf "%.0f" (mulf (float64 $number) (get $units $unit)) -}}
{{- end -}}
{{- end -}}

{{/* apiVersions that older clusters lack. */}}
{{- define "muster.policyVersion" -}}
policy/{{ if .Capabilities.APIVersions.Has "policy/v1" }}v1{{ else }}v1beta1{{ end }}
{{- end -}}

{{- define "muster.autoscalingVersion" -}}
autoscaling/{{ if .Capabilities.APIVersions.Has "autoscaling/v2" }}v2{{ else }}v2beta2{{ end }}
{{- end -}}

{{/* Whether there is a test pod: whether it is wanted, and has something that routers take for a key. */}}
{{- define "muster.hasTest" -}}
{{- if .Values.tests.enabled -}}
{{- if ne .Values.tls.mode "off" -}}
{{- include "muster.tlsSecret" (dict "context" . "role" "client") -}}
{{- else if has .Values.apiKeys.mode (list "generated" "off") -}}
yes
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A container of the test pod: (dict "context" $ "secure" BOOL "key" BOOL "args" LIST). */}}
{{- define "muster.testContainer" -}}
image: {{ include "muster.image" .context }}
imagePullPolicy: {{ .context.Values.image.pullPolicy }}
args:
  {{- toYaml .args | nindent 2 }}
  - --grpc={{ .secure | ternary "https" "http" }}://{{ include "muster.fullname" .context }}-router:{{ .context.Values.router.service.grpcPort }}
  {{- if .secure }}
  - --ca=/etc/muster/tls/ca.crt
  - --cert=/etc/muster/tls/tls.crt
  - --key=/etc/muster/tls/tls.key
  {{- end }}
{{- if .key }}
env:
  - name: MUSTER_API_KEY
    valueFrom:
      secretKeyRef:
        name: {{ include "muster.fullname" .context }}-api-key
        key: key
{{- end }}
resources:
  requests:
    cpu: 50m
    memory: 64Mi
  limits:
    memory: 256Mi
securityContext:
  {{- include "muster.containerSecurity" .context | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  {{- if .secure }}
  - name: tls
    mountPath: /etc/muster/tls
    readOnly: true
  {{- end }}
{{- end -}}
