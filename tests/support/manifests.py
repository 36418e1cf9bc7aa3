"""Manifests of snapshots for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from provisioner.snapshots.manifest import ImageIdentity, Manifest


def make_manifest(**changes: Any) -> Manifest:
    """Return the manifest of a snapshot without parts, with these fields changed."""
    fields: dict[str, Any] = {
        "instance_id": "mu-1",
        "cluster": "local",
        "generation": 1,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "node_id": "local",
        "image": ImageIdentity(reference="browser", id="sha256:1"),
        "home_path": "/home/machine",
        "stopped_cleanly": True,
        "container_id": "c",
        "run_started_at": None,
        "parts": (),
        "changed_paths": 0,
    }
    return Manifest(**fields | changes)
