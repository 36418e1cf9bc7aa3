"""Reads `Pulumi.<cluster>.yaml`, the reviewed description of a cluster; writes a first one where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from provisioner.errors import SettingsError
from stacks.spec import BROWSER_IMAGE, DEFAULT_IMAGE, FIELDS, ClusterSpec

_FIRST = f"""\
# One cluster: its nodes, and which image runs for which name. Change it, then restart the service or run `pulumi up`.
config:
  cluster:nodes:
    - id: local
      host: unix:///var/run/docker.sock
      address: localhost # where clients reach the instances' ports
      bind_ip: 127.0.0.1 # where those ports are published
      ports: {{ first: 21000, last: 24999 }}
      max_instances: 50
  cluster:images:
    {DEFAULT_IMAGE}: {BROWSER_IMAGE}
"""


def path_of(project_dir: Path, *, cluster: str) -> Path:
    """Return where the cluster's file is."""
    return project_dir / f"Pulumi.{cluster}.yaml"


def read_cluster(project_dir: Path, *, cluster: str) -> ClusterSpec:
    """Return the cluster as its file describes it, writing a first file where there is none. Raises SettingsError."""
    path = path_of(project_dir, cluster=cluster)
    if not path.exists():
        path.write_text(_FIRST)
    try:
        document = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path.name} is not YAML: {error}") from error
    config: dict[str, Any] = document.get("config") or {}
    fields = {name: config[f"cluster:{name}"] for name in FIELDS if f"cluster:{name}" in config}
    try:
        return ClusterSpec.model_validate({"name": cluster, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"{path.name}: cluster:{where}: {first['msg']}") from error
