"""Reads `Pulumi.<cluster>.yaml`, the reviewed description of a cluster; writes a first one where there is none.

Whoever writes the file by hand is told of a mistake in one line: file, line, the node by its id, what is wrong there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from provisioner.errors import SettingsError
from stacks.spec import (
    BROWSER_IMAGE,
    DEFAULT_IMAGE,
    FIELDS,
    LOOPBACK,
    CloudIdentity,
    ClusterSpec,
    NodeSpec,
    OfflinePolicy,
    PortRange,
)

NAMESPACE = "cluster:"
"""What our keys of the file's `config` begin with; all others are Pulumi's, or somebody else's."""
NODES = f"{NAMESPACE}nodes"

_FIRST = f"""\
# One cluster: its nodes, and which image runs for which name. Change it here, or with `machineuse node`: the running
# service takes a change over within seconds; where none runs, `pulumi up` does.
config:
  {NODES}:
    - id: local
      host: unix:///var/run/docker.sock
      address: localhost # where clients reach the instances' ports
      bind_ip: 127.0.0.1 # where those ports are published
      ports: {{ first: 21000, last: 24999 }}
      max_instances: 50
  cluster:images:
    {DEFAULT_IMAGE}: {BROWSER_IMAGE}
"""

_MODELS: Mapping[str, type[BaseModel]] = {
    "nodes": NodeSpec,
    "ports": PortRange,
    "cloud": CloudIdentity,
    "offline": OfflinePolicy,
}
"""Which model a key's value is, to say what is allowed there."""


def path_of(project_dir: Path, *, cluster: str) -> Path:
    """Return where the cluster's file is."""
    return project_dir / f"Pulumi.{cluster}.yaml"


def read_cluster(project_dir: Path, *, cluster: str) -> ClusterSpec:
    """Return the cluster as its file describes it, writing a first file where there is none. Raises SettingsError."""
    path = path_of(project_dir, cluster=cluster)
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(_FIRST)
    return parse_cluster(read_text(path), cluster=cluster, file=path.name)


def read_text(path: Path) -> str:
    """Return the file's text, line ends as they are. Raises SettingsError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"{path.name} can't be read: {said}.", detail=f"{os.fspath(path)}: {error}") from error


def parse_cluster(text: str, *, cluster: str, file: str) -> ClusterSpec:
    """Return the cluster that this text describes. Raises SettingsError, naming `file` and the line."""
    config = load(text, file=file).get("config") or {}
    if not isinstance(config, dict):
        raise _mistake(text, file=file, path=("config",), said="config: it should be a list of keys and values.")
    for key in config:
        if isinstance(key, str) and key.startswith(NAMESPACE) and key.removeprefix(NAMESPACE) not in FIELDS:
            allowed = ", ".join(f"{NAMESPACE}{name}" for name in FIELDS)
            raise _mistake(text, file=file, path=("config", key), said=f"{key} is unknown; allowed are {allowed}.")
    fields = {name: config[f"{NAMESPACE}{name}"] for name in FIELDS if f"{NAMESPACE}{name}" in config}
    try:
        spec = ClusterSpec.model_validate({"name": cluster, **fields})
    except ValidationError as error:
        location: tuple[int | str, ...] = error.errors()[0]["loc"]
        path = ("config", f"{NAMESPACE}{location[0]}", *location[1:]) if location else ("config", NODES)
        raise _mistake(text, file=file, path=path, said=explain(error, fields=fields)) from error
    if not spec.nodes:
        raise _mistake(text, file=file, path=("config", NODES), said=f"{NODES}: a cluster needs at least one node.")
    if (clash := find_clash(spec)) is not None:
        index, said = clash
        raise _mistake(text, file=file, path=("config", NODES, index), said=said)
    return spec


def find_clash(spec: ClusterSpec) -> tuple[int, str] | None:
    """Return which node gets in the way of an earlier one, by its place, and how; None where none does.

    Two nodes on one engine would take each other's containers for their own. With one port at one address twice, a
    client of one node's instance would find itself in another's browser.
    """
    engines: dict[tuple[str, tuple[str, ...]], NodeSpec] = {}
    addresses: dict[str, list[NodeSpec]] = {}
    for index, node in enumerate(spec.nodes):
        other = engines.setdefault((node.host, node.ssh_opts), node)
        if other is not node:
            return index, f"node '{node.id}': node '{other.id}' has the host {node.host} already."
        address = "localhost" if node.address in LOOPBACK else node.address.lower()
        neighbours = addresses.setdefault(address, [])
        for other in neighbours:
            if node.ports.first <= other.ports.last and other.ports.first <= node.ports.last:
                return index, (
                    f"node '{node.id}': its ports {node.ports.first}-{node.ports.last} overlap those of node"
                    f" '{other.id}', {other.ports.first}-{other.ports.last}, at the same address {other.address}: give"
                    " one of them other ports, or another address."
                )
        neighbours.append(node)
    return None


def load(text: str, *, file: str) -> dict[str, Any]:
    """Return the YAML document as plain values; an empty one as an empty map. Raises SettingsError."""
    try:
        document = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = error.problem if isinstance(error, MarkedYAMLError) else None
        said = " ".join((problem or str(error)).split())  # in one line, and that is all: what it quotes is in the file
        raise SettingsError(f"{file}{line}: it is not YAML: {said}.") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"{file}: it should be a list of keys and values, such as config.")
    return document


def explain(error: ValidationError, *, fields: Mapping[str, Any]) -> str:
    """Return the first mistake in one sentence: the node by its id, unknown keys with what is allowed."""
    problems = error.errors()
    first = problems[0]
    location: list[int | str] = list(first["loc"])
    subject = ""
    parts = location
    if len(location) > 1 and location[0] == "nodes" and isinstance(location[1], int):
        subject, parts = f"{_name_node(fields, location[1])}: ", location[2:]
    elif location:
        parts = [f"{NAMESPACE}{location[0]}", *location[1:]]
    said = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        within = next((part for part in reversed(location[:-1]) if isinstance(part, str)), "")
        model = _MODELS.get(within)
        allowed = ", ".join(model.model_fields) if model is not None else ""
        parts, said = parts[:-1], f"'{location[-1]}' is unknown" + (f"; allowed are {allowed}" if allowed else "")
    elif first["type"] != "missing" and isinstance(first["input"], str | int | float):
        said += f", and it is '{first['input']}'"
    where = ".".join(str(part) for part in parts)
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{subject}{where}{': ' if where else ''}{said}.{more}"


def compose(text: str) -> Node | None:
    """Return the document as nodes that know where in the text they are; the text must be YAML."""
    root: Node | None = YAML(typ="safe", pure=True).compose(text)
    return root


def _name_node(fields: Mapping[str, Any], index: int) -> str:
    node = fields["nodes"][index]
    known = node.get("id") if isinstance(node, dict) else None
    return f"node '{known}'" if isinstance(known, str) else f"node {index + 1}"


def _mistake(text: str, *, file: str, path: Sequence[int | str], said: str) -> SettingsError:
    return SettingsError(f"{file}, line {_line_of(text, path)}: {said}")


def _line_of(text: str, path: Sequence[int | str]) -> int:
    """Return the number of the line where the value of that path is, or as much of the path as there is."""
    node = compose(text)
    line = 0
    for part in path:
        if isinstance(node, MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1
