"""docker:index/volume:Volume."""

from __future__ import annotations

from typing import Any

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.volumes import ensure_volume, find_volume, remove_volume
from provisioner.errors import DockerError
from provisioner.plugins.docker.properties import (
    LABELS,
    TEXT,
    TEXT_MAP,
    Property,
    as_declared,
    keep_wording,
)
from provisioner.plugins.docker.shared import DockerResources, is_ours, read_labels, write_labels
from provisioner.plugins.policy import DeleteDecision
from provisioner.plugins.resources import Call, Created, Found
from provisioner.plugins.values import Properties
from stacks.names import LEDGER_LABEL, URN_LABEL

TABLE = {
    "name": Property(TEXT, required=True),
    "labels": Property(LABELS),
    "driver": Property(TEXT),
    "driverOpts": Property(TEXT_MAP),
}


class VolumeType(DockerResources):
    """A named volume. One that was made for the same URN and ledger is always adopted: its files are the point."""

    table = TABLE
    computed = frozenset({"driver", "mountpoint"})

    def create(self, call: Call, *, inputs: Properties) -> Created:
        host = self._host(call)
        name, labels = inputs["name"], read_labels(inputs)
        live = ensure_volume(
            host, name, labels=labels, driver=inputs.get("driver"), driver_opts=inputs.get("driverOpts")
        )
        if not is_ours(live.get("Labels"), wanted=labels) and (live.get("Labels") or {}) != labels:
            raise DockerError(
                f"The volume {name} on {host.url} exists, but it was not made for this resource.",
                detail=f"its labels: {live.get('Labels')}",
                resolution="Rename or remove it; Machineuse takes no volume that it did not make.",
            )
        device = (inputs.get("driverOpts") or {}).get("device")
        if device is not None and (live.get("Options") or {}).get("device") != device:
            live = self._point_elsewhere(host, live, inputs=inputs)
        return Created(id=name, outputs=read_outputs(live))

    def _point_elsewhere(self, host: DockerHost, live: dict[str, Any], *, inputs: Properties) -> dict[str, Any]:
        """Make the volume anew for another device: it only says what to mount, and nothing is lost with it."""
        name = inputs["name"]
        if "device" not in (live.get("Options") or {}):
            raise DockerError(
                f"The volume {name} on {host.url} has files of its own; it is not taken for one on a device.",
                detail=f"its options: {live.get('Options')}",
                resolution="Remove it by hand if they are not needed.",
            )
        remove_volume(host, name)
        return ensure_volume(
            host,
            name,
            labels=read_labels(inputs),
            driver=inputs.get("driver"),
            driver_opts=inputs.get("driverOpts"),
        )

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        live = find_volume(self._host(call), id)
        if live is None:
            return None
        now = keep_wording(TABLE, olds=outputs, news=read_outputs(live))
        return Found(id=id, inputs=as_declared(TABLE, inputs=inputs, outputs=now), outputs=now)

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        del inputs
        recorded = read_labels(outputs)

        def remove(host: DockerHost, decision: DeleteDecision) -> None:
            del decision
            live = find_volume(host, id)
            if live is not None and URN_LABEL in recorded and not is_ours(live.get("Labels"), wanted=recorded):
                raise DockerError(
                    f"The volume {id} on {host.url} is not the one that was made for this resource; it is kept.",
                    detail=f"its labels: {live.get('Labels')}; expected {URN_LABEL} and {LEDGER_LABEL} of {recorded}",
                    resolution="Remove it by hand if it is not needed.",
                )
            remove_volume(host, id)

        kind = "mount" if "device" in (outputs.get("driverOpts") or {}) else "volume"
        self._delete(call, kind=kind, name=id, outputs=outputs, remove=remove)


def read_outputs(live: dict[str, Any]) -> Properties:
    """Return the outputs of a volume as Docker describes it."""
    return {
        "cluster": None,
        "driver": live["Driver"],
        "driverOpts": live.get("Options") or None,
        "id": live["Name"],
        "labels": write_labels(live.get("Labels")),
        "mountpoint": live["Mountpoint"],
        "name": live["Name"],
    }
