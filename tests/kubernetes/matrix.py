"""Renders the chart for every file of values and every version of Kubernetes, and checks what comes out, without a cluster.

    matrix.py HELM ROOT [OUT_DIR]

Every object of Kubernetes itself must be valid by that version's own schema, strictly: no unknown field. Objects of
extensions, whose schemas are not at hand, are named below, and no other kind may be without a schema. Beside that: every
port says its protocol (server-side apply needs it on old clusters), every Service and policy selects pods of the chart, the
configuration is TOML with keys that Muster has, and alerts and dashboard name metrics that Muster has. The newest version's
objects are left in OUT_DIR.
"""

import collections
import functools
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import yaml
from kubernetes_validate import utils

VERSIONS = [f"1.{minor}" for minor in range(28, 38)]
# Kinds that are not Kubernetes' own.
EXTENSIONS = {
    "cert-manager.io/v1": {"Certificate", "Issuer"},
    "monitoring.coreos.com/v1": {"PodMonitor", "PrometheusRule"},
    "gateway.networking.k8s.io/v1": {"BackendTLSPolicy", "GRPCRoute", "HTTPRoute"},
    "inference.networking.k8s.io/v1": {"InferencePool"},
}
# Files of values that need a version.
NEEDS = {"image-volume": 31}
# A schema file is read once, not once for every object.
utils.schema_contents = functools.cache(utils.schema_contents)
utils.all_versions = functools.cache(utils.all_versions)


def known_keys(root, role):
    """Keys of a role, as the page has them that is written from their declarations."""
    page = (root / "docs/configuration.md").read_text()
    tables = [page.split(f"<!-- {part}:begin -->")[1].split(f"<!-- {part}:end -->")[0] for part in (role, "both")]
    return {key for table in tables for key in re.findall(r"^\| `(\w+)` \|", table, re.M)}


def walk(node, path=""):
    yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from walk(child, f"{path}.{key}")


def pod_labels(item):
    if item["kind"] == "Pod":
        return item["metadata"]["labels"]
    return item["spec"].get("template", {}).get("metadata", {}).get("labels") if "spec" in item else None


def selected(selector, pods):
    return any(selector.items() <= labels.items() for labels in pods)


class Matrix:
    def __init__(self, helm, root):
        self.helm, self.root = helm, root
        self.chart = root / "helm/muster"
        self.problems, self.valid, self.extensions = [], collections.Counter(), collections.Counter()
        self.seen = set()
        self.keys = {role: known_keys(root, role) for role in ("router", "worker")}
        self.unknown = collections.defaultdict(set)
        self.problems += self.metrics()

    def metrics(self):
        known = set(re.findall(r'"(muster_\w+)"', (self.root / "crates/telemetry/src/names.rs").read_text()))
        for path in ("rules/muster.yaml", "dashboards/muster.json"):
            used = set(re.findall(r"\bmuster_\w+", (self.chart / path).read_text()))
            for name in sorted(used):
                if name not in known and re.sub("_(bucket|sum|count)$", "", name) not in known:
                    yield f"helm/muster/{path}: no such metric: {name}"

    def template(self, values, version):
        command = [self.helm, "template", "demo", self.chart, "--namespace=muster", f"--kube-version={version}", f"--values={values}"]
        return subprocess.run(command, capture_output=True, text=True)

    def run(self, values, version):
        name = values.name.removesuffix("-values.yaml")
        done = self.template(values, version)
        at = f"{name}, Kubernetes {version}"
        if int(version.split(".")[1]) < NEEDS.get(name, 0):
            if done.returncode == 0 or f"1.{NEEDS[name]}" not in done.stderr:
                self.problems.append(f"{at}: should be refused, naming 1.{NEEDS[name]}: {done.stderr.strip()}")
            return ""
        if done.returncode:
            self.problems.append(f"{at}: {done.stderr.strip()}")
            return ""
        items = [item for item in yaml.safe_load_all(done.stdout) if item]
        names = collections.Counter((item["kind"], item["metadata"]["name"]) for item in items)
        self.problems += [f"{at}: {kind} {name} is there {n} times" for (kind, name), n in names.items() if n > 1]
        pods = [labels for item in items if (labels := pod_labels(item))]
        for item in items:
            self.check(item, version, f"{at}: {item['kind']} {item['metadata']['name']}", pods)
        return done.stdout

    def check(self, item, version, at, pods):
        kind, spec = item["kind"], item.get("spec", {})
        if kind in EXTENSIONS.get(item["apiVersion"], ()):
            self.extensions[kind] += 1
            return
        self.valid[version] += 1
        # The same object with the same version is held against the schema once.
        mark = (version, json.dumps(item, sort_keys=True))
        if mark not in self.seen:
            self.seen.add(mark)
            try:
                utils.validate(item, version, strict=True)
            except utils.SchemaNotFoundError as error:
                self.problems.append(f"{at}: {error.message}; an extension belongs into matrix.py's list")
            except utils.ValidationError as error:
                self.problems.append(f"{at}: {'.'.join(map(str, error.path))}: {error.message}")
        for path, node in walk(item):
            if isinstance(node, dict) and ("containerPort" in node or (path.rsplit(".", 2)[-2:-1] == ["ports"] and "port" in node)):
                if "protocol" not in node:
                    self.problems.append(f"{at}: {path}: a port without protocol")
        if kind == "Service" and not selected(spec["selector"], pods):
            self.problems.append(f"{at}: selects no pod of the chart")
        if kind in ("NetworkPolicy", "PodDisruptionBudget"):
            selector = spec.get("podSelector", spec.get("selector"))["matchLabels"]
            if not selected(selector, pods):
                self.problems.append(f"{at}: selects no pod of the chart")
        if kind == "ConfigMap" and "muster.toml" in item["data"]:
            for role, table in tomllib.loads(item["data"]["muster.toml"]).items():
                self.unknown[role] |= table.keys() - self.keys[role]


def main():
    helm, root = sys.argv[1], pathlib.Path(sys.argv[2])
    matrix = Matrix(helm, root)
    files = sorted((matrix.chart / "ci").glob("*-values.yaml"))
    for values in files:
        for version in VERSIONS:
            text = matrix.run(values, version)
        if len(sys.argv) > 3:
            (pathlib.Path(sys.argv[3]) / values.name).write_text(text)
    for role, keys in matrix.unknown.items():
        matrix.problems += [f"[{role}]: no such key: {key}" for key in sorted(keys)]
    for problem in matrix.problems:
        print(problem, file=sys.stderr)
    extensions = ", ".join(f"{kind} {n}" for kind, n in sorted(matrix.extensions.items()))
    print(f"{len(files)} files of values x {len(VERSIONS)} versions of Kubernetes: {sum(matrix.valid.values())} objects, {len(matrix.seen)} different")
    print(f"without a schema here: {extensions}")
    sys.exit(bool(matrix.problems))


if __name__ == "__main__":
    main()
