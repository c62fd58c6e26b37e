"""The stages of tests/kubernetes/run. A stage changes or injures the cluster and proves that it did; streams run meanwhile.

Streams are those of `muster bench --soak` in a pod of their own: each is compared with what it gave before anything was done.
"""

import argparse
import base64
import contextlib
import http.server
import json
import os
import pathlib
import re
import shlex
import ssl
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/kubernetes"
NAMESPACE = "muster-test"
RELEASE = "demo"
STREAMS = 16


class Failed(Exception):
    """A promise that was not kept."""


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def command(*args, check=True, stdin=None, timeout=300, env=None):
    done = subprocess.run([str(a) for a in args], input=stdin, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)
    if check and done.returncode:
        raise Failed(f"{' '.join(map(str, args))}: {done.stderr.strip() or done.stdout.strip()}")
    return done


def kubectl(*args, **kwargs):
    return command("kubectl", "--namespace", NAMESPACE, *args, **kwargs).stdout


def get(*args):
    return json.loads(kubectl("get", *args, "--output=json"))


def apply(*objects):
    kubectl("apply", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))


def eventually(what, probe, timeout=120, every=0.5):
    """The first result that is not None or False."""
    end, last = time.monotonic() + timeout, None
    while time.monotonic() < end:
        try:
            found = probe()
            if found:
                return found
        except (Failed, KeyError, IndexError) as error:
            last = error
        time.sleep(every)
    raise Failed(f"{what}: not within {timeout} s" + (f" ({last})" if last else ""))


def secret(name, key):
    return base64.b64decode(get("secret", name)["data"][key]).decode()


def condition(item, kind):
    return next((c["status"] for c in item["status"].get("conditions", []) if c["type"] == kind), "Unknown")


def is_ready(pod):
    return condition(pod, "Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


def pods(component):
    return get("pods", f"--selector=app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={component}")["items"]


def container(name, args, image, mounts=True):
    """A container of Muster's image with a client's certificate."""
    spec = {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": args,
        "securityContext": {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if mounts:
        spec["volumeMounts"] = [{"name": "tls", "mountPath": "/tls", "readOnly": True}]
    return spec


CLIENT = ["--ca=/tls/ca.crt", "--cert=/tls/tls.crt", "--key=/tls/tls.key"]


def pod(name, spec, node=None, role="client"):
    body = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "fsGroup": 65532},
        "containers": [spec],
    }
    if role:
        body["volumes"] = [{"name": "tls", "secret": {"secretName": f"{RELEASE}-tls-{role}", "defaultMode": 0o440}}]
    if node:
        body["nodeName"] = node
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": body}


class Soak:
    """Streams in a pod of their own, and what they tell once a second."""

    def __init__(self, image, node):
        url = f"--grpc=https://{RELEASE}-router:50051"
        args = ["bench", "--soak=3h", "--json", url, f"--concurrency={STREAMS}", *CLIENT]
        kubectl("delete", "pod", "soak", "--ignore-not-found", "--wait")
        apply(pod("soak", container("soak", args, image), node))
        eventually("the streams' pod runs", lambda: get("pod", "soak")["status"]["phase"] == "Running")
        self.last, self.pause, self.lock = None, 0, threading.Lock()
        self.logs = subprocess.Popen(
            ["kubectl", "--namespace", NAMESPACE, "logs", "--follow", "soak"], stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self.read, daemon=True).start()
        eventually("streams run", lambda: self.last and self.last["streams"] >= STREAMS)

    def read(self):
        for line in self.logs.stdout:
            if line.startswith("{"):
                with self.lock:
                    self.last = json.loads(line)
                    self.pause = max(self.pause, self.last["pause_ms"])

    def begin(self):
        with self.lock:
            self.pause = 0
            return dict(self.last)

    def more(self, count, timeout=120):
        """Waits until so many more streams have ended."""
        goal = self.last["streams"] + count
        eventually(f"{count} more streams", lambda: self.last["streams"] >= goal, timeout)

    def end(self, before):
        """What came since `before`; nothing of it may have failed."""
        self.more(STREAMS)
        with self.lock:
            now, pause = dict(self.last), self.pause
        streams, tokens = now["streams"] - before["streams"], now["tokens"] - before["tokens"]
        if now["failed"] or now["different"]:
            raise Failed(f"{now['failed']} streams failed, {now['different']} differ: {now.get('last_error')}")
        return {"streams": streams, "tokens": tokens, "failed": 0, "different": 0, "longest pause, ms": pause}

    def stop(self):
        self.logs.terminate()
        kubectl("delete", "pod", "soak", "--grace-period=1", "--ignore-not-found")


class Suite:
    def __init__(self, args):
        self.args = args
        self.results = []
        nodes = [n for n in json.loads(command("kubectl", "get", "nodes", "--output=json").stdout)["items"] if condition(n, "Ready") == "True"]
        self.nodes = sorted(n["metadata"]["name"] for n in nodes)
        if len(self.nodes) < 2:
            raise SystemExit(f"two nodes are needed, there are {self.nodes}")
        self.soak = None
        self.revision = 1

    # The cluster.

    def helm(self, *args, image=None, check=True):
        name, _, tag = (image or self.args.image).rpartition(":")
        values = [f"--set=image.repository={name}", f"--set-string=image.tag={tag}", f"--values={HERE / 'values.yaml'}"]
        return command("helm", "--namespace", NAMESPACE, *args, *values, check=check, timeout=600)

    def upgrade(self, *sets, image=None, check=True, wait=True):
        more = ["--wait", "--timeout=5m"] if wait else []
        return self.helm("upgrade", RELEASE, ROOT / "helm/muster", *more, *sets, image=image, check=check)

    def status(self):
        """What each router says of its cluster."""
        name = f"status-{time.monotonic_ns()}"
        args = ["status", "--json", f"--grpc=https://{RELEASE}-router:50051", *CLIENT]
        apply(pod(name, container("status", args, self.args.image), self.nodes[0]))
        try:
            eventually("status", lambda: get("pod", name)["status"]["phase"] in ("Succeeded", "Failed"))
            text = kubectl("logs", name)
            reports = [json.loads(line) for line in text.splitlines() if line.startswith("[")]
            if not reports:
                raise Failed(text)
            return reports[0][0]
        finally:
            kubectl("delete", "pod", name, "--grace-period=0", "--force", "--wait=false", check=False)

    def settled(self, workers, timeout=150):
        """Waits until so many workers serve, with two copies of all experts, and both routers are ready."""

        def probe():
            report = self.status()
            serving = [w for w in report["workers"] if w["state"] == "serving" and w["experts"] > 0]
            return report["health"] == "ready" and len(serving) == workers == len(report["workers"]) and report

        report = eventually(f"{workers} workers hold everything", probe, timeout, 1)
        eventually("routers are ready", lambda: len([p for p in pods("router") if is_ready(p)]) == 2, timeout)
        return report

    def spread(self):
        """Sees to it that routers and workers are on more nodes than one, as whoever loses a node wishes."""
        for component in ("router", "worker"):
            on = {p["spec"]["nodeName"] for p in pods(component)}
            if len(on) > 1:
                continue
            node = on.pop()
            command("kubectl", "cordon", node)
            try:
                kubectl("delete", "pod", pods(component)[0]["metadata"]["name"])
                self.settled(2)
            finally:
                command("kubectl", "uncordon", node)

    @contextlib.contextmanager
    def forward(self):
        """Ports of this machine that lead to the routers' Service: (http, grpc)."""
        forward = subprocess.Popen(
            ["kubectl", "--namespace", NAMESPACE, "port-forward", f"service/{RELEASE}-router", ":8080", ":50051"],
            stdout=subprocess.PIPE, text=True,
        )
        try:
            ports = {}
            while len(ports) < 2:
                line = forward.stdout.readline()
                if not line:
                    raise Failed("kubectl port-forward ended")
                if found := re.match(r"Forwarding from 127\.0\.0\.1:(\d+) -> (\d+)", line):
                    ports[found[2]] = found[1]
            yield ports["8080"], ports["50051"]
        finally:
            forward.terminate()

    # Stages.

    def install(self):
        command("kubectl", "create", "namespace", NAMESPACE, check=False)
        began = time.monotonic()
        self.helm("upgrade", "--install", RELEASE, ROOT / "helm/muster", "--wait", "--timeout=4m")
        took = time.monotonic() - began
        test = command("helm", "--namespace", NAMESPACE, "test", RELEASE, timeout=300)
        if "Phase:          Succeeded" not in test.stdout and "Succeeded" not in test.stdout:
            raise Failed(test.stdout)
        report = self.settled(2)
        return {"ready after, s": round(took, 1), "useful, s": max(w["useful_ms"] for w in report["workers"]) / 1000,
                "full, s": max(w["full_ms"] for w in report["workers"]) / 1000}

    def clients(self):
        """Clients that others wrote get the golden tokens through the Service."""
        with tempfile.TemporaryDirectory() as directory, self.forward() as (http_port, grpc_port):
            authority = pathlib.Path(directory) / "ca.crt"
            authority.write_text(secret(f"{RELEASE}-tls-client", "ca.crt"))
            env = os.environ | {"SSL_CERT_FILE": str(authority), "OPENAI_API_KEY": secret(f"{RELEASE}-api-key", "key")}
            model, python = ROOT / "models/demo", sys.executable
            command(python, ROOT / "tests/python/openai_client.py", f"https://localhost:{http_port}", model, env=env)
            command(python, ROOT / "tests/python/grpc_client.py", f"localhost:{grpc_port}", model, env=env)
            wrong = env | {"OPENAI_API_KEY": "muster-" + "0" * 64}
            refused = command(python, ROOT / "tests/python/openai_client.py", f"https://localhost:{http_port}", model, env=wrong, check=False)
            if "401" not in refused.stderr:
                raise Failed(f"a wrong key is not refused: {refused.stderr[-400:]}")
        return {"openai": "golden tokens", "grpcio": "golden tokens", "a wrong key": "401"}

    def scale(self):
        """kubectl scale 2 -> 4 -> 2 under streams."""
        before = self.soak.begin()
        target = f"statefulset/{RELEASE}-worker"
        kubectl("scale", target, "--replicas=4")
        report = self.settled(4)
        held = sorted(w["experts"] for w in report["workers"])
        kubectl("scale", target, "--replicas=2")
        eventually("two pods are gone", lambda: len(pods("worker")) == 2)
        self.settled(2)
        return self.soak.end(before) | {"experts of four": held}

    def delete_worker(self):
        """A worker's pod is deleted, then another one killed without grace."""
        before = self.soak.begin()
        old = {p["metadata"]["name"]: p["metadata"]["uid"] for p in pods("worker")}
        kubectl("delete", "pod", f"{RELEASE}-worker-0", "--wait")
        self.settled(2)
        kubectl("delete", "pod", f"{RELEASE}-worker-1", "--grace-period=0", "--force")
        eventually("both pods are new", lambda: all(old[p["metadata"]["name"]] != p["metadata"]["uid"] for p in pods("worker")))
        self.settled(2)
        return self.soak.end(before)

    def drain_node(self):
        """kubectl drain, within the disruption budgets."""
        self.spread()
        before = self.soak.begin()
        node = self.nodes[-1]
        moved = [p["metadata"]["name"] for p in pods("worker") + pods("router") if p["spec"]["nodeName"] == node]
        if not moved:
            raise Failed(f"nothing of ours is on {node}")
        try:
            command("kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", f"--pod-selector=app.kubernetes.io/instance={RELEASE}", "--timeout=240s", timeout=300)
            if any(p["spec"].get("nodeName") == node for p in pods("worker") + pods("router") if is_ready(p)):
                raise Failed(f"pods are still on {node}")
            self.settled(2)
        finally:
            command("kubectl", "uncordon", node)
        return self.soak.end(before) | {"moved": len(moved)}

    def cut_node(self):
        """A node is cut off the network, and healed."""
        if not self.args.cut:
            return "left out: no --cut"
        node = self.nodes[-1]
        self.spread()
        before = self.soak.begin()
        command(*shlex.split(self.args.cut))
        try:
            command("kubectl", "wait", f"node/{node}", "--for=condition=Ready=Unknown", "--timeout=120s", timeout=150)
            self.soak.more(2 * STREAMS)
        finally:
            command(*shlex.split(self.args.heal))
        command("kubectl", "wait", f"node/{node}", "--for=condition=Ready", "--timeout=120s", timeout=150)
        self.settled(2, 240)
        return self.soak.end(before)

    def images(self, component):
        return {p["metadata"]["uid"]: p["spec"]["containers"][0]["image"] for p in pods(component) if is_ready(p)}

    def rolling_upgrade(self):
        """helm upgrade of workers and routers, and helm rollback."""
        before = self.soak.begin()
        old = {c: self.images(c) for c in ("worker", "router")}
        next_image = self.args.next or self.args.image
        # A changed setting, so that every pod is replaced also where the image is the same.
        sets = ["--set=router.config.max_queue=512", "--set=workers.defaults.config.max_queue=32"]
        self.upgrade(*sets, image=next_image)
        self.settled(2)
        new = {c: self.images(c) for c in ("worker", "router")}
        for component in new:
            if old[component].keys() & new[component].keys():
                raise Failed(f"not every {component} was replaced")
        upgraded = self.soak.end(before)
        before = self.soak.begin()
        command("helm", "--namespace", NAMESPACE, "rollback", RELEASE, "--wait", "--timeout=5m", timeout=400)
        self.settled(2)
        back = {c: self.images(c) for c in ("worker", "router")}
        if any(new[c].keys() & back[c].keys() for c in back):
            raise Failed("not every pod was replaced by the rollback")
        return {"upgrade": upgraded, "rollback": self.soak.end(before)}

    def lose_leader(self):
        """The router that leads is killed without grace; another one holds the Lease then."""
        lease = lambda: get("lease", f"{RELEASE}-leader")["spec"]["holderIdentity"]
        before, leader = self.soak.begin(), eventually("a leader", lease)
        kubectl("delete", "pod", leader.split("/")[0], "--grace-period=0", "--force")
        began = time.monotonic()
        eventually("another one leads", lambda: lease() not in ("", leader))
        took = time.monotonic() - began
        self.settled(2)
        return self.soak.end(before) | {"another leads after, s": round(took, 1)}

    def autoscaler(self):
        """The autoscaler follows muster_worker_pressure, here through a metrics API of our own."""
        if not self.args.metrics_host:
            return "left out: no --metrics-host"
        before = self.soak.begin()
        with MetricsApi(self.args.metrics_host) as metrics:
            pool = {"name": "worker", "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 4, "metricType": "External",
                    "behavior": {"scaleUp": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 15}]},
                                 "scaleDown": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 15}]}}}}
            self.upgrade(f"--set-json=workers.pools={json.dumps([pool])}")
            replicas = lambda: get("statefulset", f"{RELEASE}-worker")["spec"]["replicas"]
            metrics.value = "2400m"
            eventually("four workers are wanted", lambda: replicas() == 4, 180)
            self.settled(4)
            metrics.value = "100m"
            eventually("two workers are wanted", lambda: replicas() == 2, 180)
            eventually("two pods are gone", lambda: len(pods("worker")) == 2)
            self.settled(2)
            if not metrics.asked:
                raise Failed("nobody asked for the metric")
        result = self.soak.end(before)
        self.upgrade()
        kubectl("scale", f"statefulset/{RELEASE}-worker", "--replicas=2")
        self.settled(2)
        return result

    def intruder(self):
        """A pod without a certificate can neither call a worker nor pose as one."""
        worker_ip = pods("worker")[0]["status"]["podIP"]
        cases = {
            "joins without a certificate": (["worker", f"--join={RELEASE}-routers:50051", "--listen=0.0.0.0:7070", "--insecure-plaintext"], None, "speaks TLS and this process does not"),
            "joins as a client": (["worker", f"--join={RELEASE}-routers:50051", "--listen=0.0.0.0:7070", *FILES], "client", "it takes a certificate of a worker"),
            "asks a worker without a certificate": (["router", "--model=demo", f"--worker={worker_ip}:7070", "--http=127.0.0.1:0", "--grpc=127.0.0.1:0", "--connect-timeout=5s"], None, "speaks TLS and this process does not"),
            "asks a worker as a client": (["router", "--model=demo", f"--worker={worker_ip}:7070", "--http=127.0.0.1:0", "--grpc=127.0.0.1:0", "--connect-timeout=5s", *FILES], "client", "it takes a certificate of a router"),
            "asks a router without a key": (["status", f"--grpc=https://{RELEASE}-router:50051", "--ca=/tls/ca.crt"], "client", "this needs an API key"),
        }
        names = []
        for number, (what, (args, role, said)) in enumerate(cases.items()):
            name = f"intruder-{number}"
            apply(pod(name, container("intruder", args, self.args.image, mounts=bool(role)), self.nodes[0], role))
            names.append(name)
            try:
                eventually(what, lambda: re.search(said, kubectl("logs", name)), 60)
            except Failed as error:
                raise Failed(f"{error}: {kubectl('logs', name)[-600:]}") from error
        report = self.status()
        kubectl("delete", "pod", *names, "--grace-period=0", "--force")
        if len(report["workers"]) != 2:
            raise Failed(f"the routers know strangers: {[w['address'] for w in report['workers']]}")
        return {"refused": list(cases)}

    def rbac(self):
        """The routers' ServiceAccount may do what it must and nothing else."""
        who = f"--as=system:serviceaccount:{NAMESPACE}:{RELEASE}-router"

        def may(verb, what, *more):
            return command("kubectl", "--namespace", NAMESPACE, "auth", "can-i", verb, what, who, *more, check=False).stdout.strip() == "yes"

        must = [("list", "endpointslices.discovery.k8s.io"), ("watch", "endpointslices.discovery.k8s.io"),
                ("create", "leases.coordination.k8s.io"), ("get", f"leases.coordination.k8s.io/{RELEASE}-leader"), ("update", f"leases.coordination.k8s.io/{RELEASE}-leader")]
        verbs = ("get", "list", "watch", "create", "update", "patch", "delete")
        never = [(verb, what) for verb in verbs for what in ("secrets", "pods", "configmaps", "services", "statefulsets.apps", "pods/exec", "events", "leases.coordination.k8s.io/other", "rolebindings.rbac.authorization.k8s.io", "nodes")
                 if (verb, what) != ("create", "leases.coordination.k8s.io/other")]
        wrong = [f"may not {v} {w}" for v, w in must if not may(v, w)] + [f"may {v} {w}" for v, w in never if may(v, w)]
        wrong += [f"may {v} endpointslices" for v in ("create", "update", "patch", "delete") if may(v, "endpointslices.discovery.k8s.io")]
        wrong += ["may list all namespaces' endpointslices"] if may("list", "endpointslices.discovery.k8s.io", "--all-namespaces") else []
        if wrong:
            raise Failed("; ".join(wrong))
        return {"may": len(must), "may not": len(never) + 5}

    def mended(self):
        """What is wrong is told in logs, events and readiness, and mended without a restart."""
        told = {}
        # The role is taken away: what was seen stays, the log says what is missing.
        before = self.soak.begin()
        binding = get("rolebinding", f"{RELEASE}-router")
        kubectl("delete", "rolebinding", f"{RELEASE}-router")
        kubectl("delete", "pod", pods("router")[0]["metadata"]["name"], "--wait=false")
        eventually("the log names what is denied", lambda: "endpointslices" in logs("router"), 120)
        for key in ("resourceVersion", "uid", "creationTimestamp", "managedFields"):
            binding["metadata"].pop(key, None)
        apply(binding)
        self.settled(2)
        told["RBAC"] = self.soak.end(before)
        # A model that is not there yet, in a release of its own.
        kubectl("apply", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "nothing"}}))
        sets = ["--set=router.replicas=1", "--set=workers.pools[0].name=worker", "--set=workers.pools[0].replicas=0",
                "--set=model.source=existingPath", "--set=model.existingPath.path=/absent", "--set=podDisruptionBudget.enabled=false"]
        self.helm("install", "broken", ROOT / "helm/muster", *sets)
        try:
            def said(what):
                name = [p for p in get("pods", "--selector=app.kubernetes.io/instance=broken,app.kubernetes.io/component=router")["items"]][0]
                events = kubectl("get", "events", f"--field-selector=involvedObject.name={name['metadata']['name']}")
                restarts = sum(c["restartCount"] for c in name["status"].get("containerStatuses", []))
                if restarts:
                    raise Failed("it restarts instead of waiting")
                return what in events and what in kubectl("logs", name["metadata"]["name"]) and not is_ready(name)

            eventually("a missing model is named", lambda: said("/absent"), 90)
            told["model"] = "named in log, event and readiness; no restart"
            # Mended: the model is the embedded one, and there are workers.
            sets = ["--set=router.replicas=1", "--set=workers.pools[0].name=worker", "--set=workers.pools[0].replicas=0", "--set=podDisruptionBudget.enabled=false"]
            self.helm("upgrade", "broken", ROOT / "helm/muster", *sets)
            eventually("no workers is named", lambda: "have no live worker" in kubectl("get", "events") , 120)
            told["no workers"] = "named in event and readiness"
            kubectl("scale", "statefulset/broken-worker", "--replicas=1")
            eventually("it is ready then", lambda: any(is_ready(p) for p in get("pods", "--selector=app.kubernetes.io/instance=broken,app.kubernetes.io/component=router")["items"]), 120)
            # The certificate's Secret is of another cluster: the pod waits, and takes the right one when it comes.
            good = get("secret", "broken-tls-worker")["data"]
            other = get("secret", f"{RELEASE}-tls-worker")["data"]
            kubectl("patch", "secret", "broken-tls-worker", "--type=merge", f"--patch={json.dumps({'data': {'tls.key': other['tls.key']}})}")
            # Nobody could take over what it holds.
            kubectl("delete", "pod", "broken-worker-0", "--grace-period=0", "--force")
            eventually("a wrong key is named", lambda: "is not that of the certificate" in kubectl("logs", "broken-worker-0") and "is not that of the certificate" in kubectl("get", "events"), 120)
            kubectl("patch", "secret", "broken-tls-worker", "--type=merge", f"--patch={json.dumps({'data': {'tls.key': good['tls.key']}})}")
            eventually("it takes the right one", lambda: is_ready(get("pod", "broken-worker-0")), 180)
            if get("pod", "broken-worker-0")["status"]["containerStatuses"][0]["restartCount"]:
                raise Failed("it was restarted")
            told["secret"] = "named in log and event; mended without a restart"
        finally:
            command("helm", "--namespace", NAMESPACE, "uninstall", "broken", "--wait", timeout=300, check=False)
        refused = self.upgrade("--set=router.replicas=-1", check=False, wait=False)
        if refused.returncode == 0 or "replicas" not in refused.stderr:
            raise Failed(f"router.replicas=-1 is not refused: {refused.stderr}")
        told["values"] = "refused by the schema"
        return told

    STAGES = ("clients", "intruder", "rbac", "scale", "delete_worker", "drain_node", "lose_leader", "rolling_upgrade", "autoscaler", "mended", "cut_node")

    def run(self):
        only = self.args.only.split(",") if self.args.only else self.STAGES
        failed = False
        began = time.monotonic()
        for name in ("install", *[s for s in self.STAGES if s in only]):
            say(name)
            at = time.monotonic()
            try:
                result = getattr(self, name)()
                outcome = "ok" if not isinstance(result, str) else result
            except (Failed, subprocess.TimeoutExpired) as error:
                result, outcome, failed = None, f"FAILED: {error}", True
            self.results.append((name, outcome, result, round(time.monotonic() - at)))
            say(f"{name}: {outcome} {json.dumps(result) if isinstance(result, dict) else ''}")
            if failed:
                self.explain()
                break
            if name == "install":
                self.soak = Soak(self.args.image, self.nodes[0])
        if self.soak:
            total = self.soak.last
            self.soak.stop()
            say(f"streams in all: {json.dumps(total)}")
        if self.args.table:
            self.table(self.args.table)
        say(f"{len(self.results)} stages in {round(time.monotonic() - began)} s: " + ", ".join(f"{n} {t} s" for n, _, _, t in self.results))
        if not self.args.keep:
            command("helm", "--namespace", NAMESPACE, "uninstall", RELEASE, "--wait", timeout=300, check=False)
            command("kubectl", "delete", "namespace", NAMESPACE, "--timeout=120s", check=False, timeout=150)
        return 1 if failed else 0

    def table(self, file):
        """The stages as a table of Markdown."""
        lines = ["| stage | seconds | streams | failed | different | longest pause | beside |", "|---|---|---|---|---|---|---|"]
        for name, outcome, result, took in self.results:
            parts = [result] if isinstance(result, dict) else [{}]
            if isinstance(result, dict) and any(isinstance(value, dict) for value in result.values()):
                parts = [value for value in result.values() if isinstance(value, dict)]
            streams = sum(part.get("streams", 0) for part in parts)
            pause = max((part.get("longest pause, ms", 0) for part in parts), default=0)
            known = ("streams", "tokens", "failed", "different", "longest pause, ms")
            beside = result.items() if isinstance(result, dict) else [("outcome", outcome)]
            beside = "; ".join(f"{key}: {value}" for key, value in beside if key not in known and not isinstance(value, dict))
            figures = f"{streams} | 0 | 0 | {pause} ms" if streams else " | | | "
            lines.append(f"| {name} | {took} | {figures} | {beside} |")
        pathlib.Path(file).write_text("\n".join(lines) + "\n")

    def explain(self):
        say(kubectl("get", "pods", "--output=wide", check=False))
        say(kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-3000:])
        for component in ("router", "worker"):
            say(logs(component)[-6000:])


METRICS_ROLE = "muster-test-external-metrics"
FILES = ["--tls-cert=/tls/tls.crt", "--tls-key=/tls/tls.key", "--tls-ca=/tls/ca.crt"]


def logs(component):
    return kubectl("logs", f"--selector=app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={component}", "--prefix", "--tail=60", check=False)


class MetricsApi:
    """An external metrics API with one metric, served from this machine."""

    def __init__(self, host):
        self.host, self.value, self.asked = host, "1200m", 0

    def __enter__(self):
        suite, self.directory = self, tempfile.TemporaryDirectory()
        cert, key = pathlib.Path(self.directory.name) / "c", pathlib.Path(self.directory.name) / "k"
        command("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=metrics", "-keyout", key, "-out", cert)
        group = "external.metrics.k8s.io/v1beta1"

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = self.path.split("?")[0].rstrip("/")
                if path == f"/apis/{group}":
                    body = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": [
                        {"name": "muster_worker_pressure", "singularName": "", "namespaced": True, "kind": "ExternalMetricValueList", "verbs": ["get"]}]}
                elif path.endswith("/muster_worker_pressure"):
                    suite.asked += 1
                    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                    body = {"kind": "ExternalMetricValueList", "apiVersion": group, "metadata": {}, "items": [
                        {"metricName": "muster_worker_pressure", "metricLabels": {}, "timestamp": now, "value": suite.value}]}
                else:
                    body = {"kind": "Status", "apiVersion": "v1", "status": "Success" if path in ("", "/healthz") else "Failure"}
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer((self.host, 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        apply(
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "metrics"}, "spec": {"ports": [{"port": 443, "targetPort": port, "protocol": "TCP"}]}},
            {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "metrics"}, "subsets": [{"addresses": [{"ip": self.host}], "ports": [{"port": port, "protocol": "TCP"}]}]},
            # What an adapter brings along: the autoscaler may ask.
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": METRICS_ROLE},
             "rules": [{"apiGroups": ["external.metrics.k8s.io"], "resources": ["*"], "verbs": ["get", "list"]}]},
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": METRICS_ROLE},
             "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": METRICS_ROLE},
             "subjects": [{"kind": "ServiceAccount", "name": "horizontal-pod-autoscaler", "namespace": "kube-system"}]},
            {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
             "spec": {"group": "external.metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
                      "insecureSkipTLSVerify": True, "service": {"name": "metrics", "namespace": NAMESPACE}}},
        )
        eventually("the metrics API is there", lambda: command("kubectl", "get", "--raw", f"/apis/{group}", check=False).returncode == 0, 60)
        return self

    def __exit__(self, *_):
        command("kubectl", "delete", "apiservice", "v1beta1.external.metrics.k8s.io", check=False)
        command("kubectl", "delete", "clusterrole,clusterrolebinding", METRICS_ROLE, check=False)
        self.server.shutdown()
        self.directory.cleanup()


def main():
    parser = argparse.ArgumentParser(prog="tests/kubernetes/run")
    parser.add_argument("--image", required="--list" not in sys.argv)
    parser.add_argument("--next")
    parser.add_argument("--cut")
    parser.add_argument("--heal")
    parser.add_argument("--metrics-host")
    parser.add_argument("--only", default="")
    parser.add_argument("--table")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(Suite.STAGES))
        return 0
    if bool(args.cut) != bool(args.heal):
        parser.error("--cut and --heal go together")
    unknown = set(filter(None, args.only.split(","))) - set(Suite.STAGES)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    return Suite(args).run()


if __name__ == "__main__":
    sys.exit(main())
