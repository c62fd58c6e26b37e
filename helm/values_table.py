#!/usr/bin/env python3
"""Writes the table of values in helm/muster/README.md, in the style of helm-docs, from the comments of values.yaml.

    helm/values_table.py            write it
    helm/values_table.py --check    say whether it is in step, and name values without a comment

A comment that begins with `# --` explains the key below it. Needs PyYAML.
"""

import json
import pathlib
import sys

import yaml

CHART = pathlib.Path(__file__).parent / "muster"
BEGIN, END = "<!-- values:begin -->\n", "<!-- values:end -->\n"
KINDS = {dict: "object", list: "list", str: "string", bool: "bool", int: "int", float: "float"}


def explanation(lines, line):
    """The comment that ends right above `line`, or nothing."""
    text = []
    for above in reversed(lines[:line]):
        above = above.strip()
        if not above.startswith("#"):
            break
        text.insert(0, above.removeprefix("#").strip())
        if above.startswith("# --"):
            return " ".join(text).removeprefix("--").strip()
    return None


def rows(node, lines, path=()):
    """(key, kind, default, explanation) of every value; a map is one value if its comment explains it as a whole."""
    for key, value in node.value:
        at = (*path, key.value)
        text = explanation(lines, key.start_mark.line)
        if text is None and isinstance(value, yaml.MappingNode) and value.value:
            yield from rows(value, lines, at)
            continue
        default = yaml.safe_load(yaml.serialize(value))
        yield ".".join(at), KINDS[type(default)], json.dumps(default, ensure_ascii=False), text


def main():
    source = (CHART / "values.yaml").read_text()
    found = list(rows(yaml.compose(source), source.splitlines()))
    bare = [key for key, _, _, text in found if not text]
    if bare:
        sys.exit(f"values.yaml: no comment beginning with `# --` above {', '.join(bare)}")
    table = "| Key | Type | Default | Description |\n|---|---|---|---|\n"
    for key, kind, default, text in found:
        cells = (key, kind, f"`{default}`", text)
        table += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    readme = CHART / "README.md"
    old = readme.read_text()
    head, rest = old.split(BEGIN)
    new = head + BEGIN + table + END + rest.split(END)[1]
    if sys.argv[1:] == ["--check"]:
        if new != old:
            sys.exit("helm/muster/README.md: the table is not in step with values.yaml; run helm/values_table.py")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        readme.write_text(new)


if __name__ == "__main__":
    main()
