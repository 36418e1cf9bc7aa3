"""docker:index/network:Network."""

from __future__ import annotations

from typing import Any

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.networks import create_network, find_network, remove_network
from provisioner.errors import DockerError, NodeUnreachable
from provisioner.plugins.docker.properties import (
    FLAG,
    LABELS,
    TEXT,
    TEXT_MAP,
    Property,
    as_declared,
    compare,
    keep_wording,
)
from provisioner.plugins.docker.shared import DockerResources, is_ours, read_labels, write_labels
from provisioner.plugins.policy import DeleteDecision
from provisioner.plugins.resources import Call, Created, Found
from provisioner.plugins.values import Properties

TABLE = {
    "name": Property(TEXT, required=True),
    "labels": Property(LABELS),
    "driver": Property(TEXT),
    "internal": Property(FLAG),
    "options": Property(TEXT_MAP),
    "ipamDriver": Property(TEXT, default="default"),
}
ATTEMPTS = 3


class NetworkType(DockerResources):
    """A network. One of ours that is as it should be is adopted; one of ours that is not is made anew."""

    table = TABLE
    computed = frozenset({"driver", "ipamConfigs", "scope"})

    def create(self, call: Call, *, inputs: Properties) -> Created:
        host = self._host(call)
        live = self._make(host, inputs)
        return Created(id=live["Id"], outputs=read_outputs(live))

    def _make(self, host: DockerHost, inputs: Properties) -> dict[str, Any]:
        name, labels = inputs["name"], read_labels(inputs)
        for _ in range(ATTEMPTS):
            id = create_network(
                host,
                name,
                labels=labels,
                driver=inputs.get("driver") or "bridge",
                options=inputs.get("options") or {},
                internal=inputs.get("internal") or False,
            )
            live = find_network(host, id or name)
            if live is None:
                continue  # somebody removed it in between
            if id is not None:
                return live
            if not is_ours(live.get("Labels"), wanted=labels):
                raise DockerError(
                    f"The network {name} on {host.url} exists, but it was not made for this resource.",
                    detail=f"its labels: {live.get('Labels')}",
                    resolution="Rename or remove it.",
                )
            if not compare(TABLE, old_inputs=inputs, old_outputs=read_outputs(live), news=inputs).changes:
                return live
            remove_network(host, live["Id"])
        raise DockerError(f"The network {name} on {host.url} comes and goes; it could not be made.")

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        live = find_network(self._host(call), id)
        if live is None:
            return None
        now = keep_wording(TABLE, olds=outputs, news=read_outputs(live))
        return Found(id=id, inputs=as_declared(TABLE, inputs=inputs, outputs=now), outputs=now)

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        del inputs

        def remove(host: DockerHost, decision: DeleteDecision) -> None:
            del decision
            try:
                remove_network(host, id)
            except NodeUnreachable as error:
                if call.replacing:
                    raise
                # Its node left the cluster (or all goes): nobody would wait for a machine that may never be back.
                call.warn(f"{error.message} Its network is left there.")

        self._delete(call, kind="network", name=str(outputs.get("name") or id), outputs=outputs, remove=remove)


def read_outputs(live: dict[str, Any]) -> Properties:
    """Return the outputs of a network as Docker describes it."""
    ipam = live.get("IPAM") or {}
    return {
        "attachable": live.get("Attachable", False),
        "driver": live["Driver"],
        "id": live["Id"],
        "ingress": live.get("Ingress", False),
        "internal": live.get("Internal", False),
        "ipamConfigs": [
            {
                "auxAddress": config.get("AuxiliaryAddresses") or {},
                "gateway": config.get("Gateway", ""),
                "ipRange": config.get("IPRange", ""),
                "subnet": config.get("Subnet", ""),
            }
            for config in ipam.get("Config") or []
        ],
        "ipamDriver": ipam.get("Driver", "default"),
        "ipamOptions": ipam.get("Options") or {},
        "ipv6": live.get("EnableIPv6", False),
        "labels": write_labels(live.get("Labels")),
        "name": live["Name"],
        "options": live.get("Options") or {},
        "scope": live.get("Scope", "local"),
    }
