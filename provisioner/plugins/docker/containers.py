"""docker:index/container:Container.

A create is: create (the image is pulled if the engine lacks it), start, inspect. What an interrupted create left behind
is found by the container's name, which is taken then: it is adopted when it is what is wanted, replaced when it is ours
but different, and an error when it is somebody else's. A container that could not be started is removed again, so that
its name and ports are free for the next attempt.
"""

from __future__ import annotations

from typing import Any

import structlog

from provisioner.docker_hosts.containers import (
    Inspected,
    create_container,
    find_container,
    remove_container,
    start_container,
    stop_container,
    update_container,
)
from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.images import pull_image
from provisioner.errors import DockerError, DockerNotFound, MachineuseError
from provisioner.plugins.docker.container_values import COMPUTED, TABLE, read_outputs, to_config, to_limits
from provisioner.plugins.docker.properties import as_declared, compare, keep_wording, same
from provisioner.plugins.docker.shared import DockerResources, is_ours, read_labels
from provisioner.plugins.policy import DeleteDecision
from provisioner.plugins.resources import Call, Created, Found
from provisioner.plugins.values import Properties

log = structlog.get_logger(__name__)

LIMITS = ("cpus", "maxRetryCount", "memory", "memoryReservation", "memorySwap", "restart")
"""What `docker update` can change."""
ATTEMPTS = 3
LEFTOVER_STOP_TIMEOUT_S = 10
_NO_IMAGE = "No such image"
_NAME_TAKEN = "is already in use by container"


class ContainerType(DockerResources):
    """A container; running, unless `start` is false."""

    table = TABLE
    computed = COMPUTED

    def create(self, call: Call, *, inputs: Properties) -> Created:
        host = self._host(call)
        container, is_new = self._make(call, host, inputs)
        if inputs.get("start", True):
            self._start(host, container, name=inputs["name"], undo=is_new)
        live = _inspect(host, container)
        outputs = read_outputs(live, inputs=inputs)
        # What is wanted: whether it keeps running is for whoever waits for it, and for the next refresh, to find out.
        outputs["mustRun"] = inputs.get("mustRun", True)
        return Created(id=live["Id"], outputs=outputs)

    def _make(self, call: Call, host: DockerHost, inputs: Properties) -> tuple[str, bool]:
        """Return the id of a container as wanted, and whether it never ran."""
        name, config = inputs["name"], to_config(inputs)
        for _ in range(ATTEMPTS):
            try:
                return create_container(host, name, config=config), True
            except DockerNotFound as error:
                if _NO_IMAGE not in (error.detail or ""):
                    raise
                pull_image(host, inputs["image"], report=call.progress)
            except DockerError as error:
                if _NAME_TAKEN not in (error.detail or ""):
                    raise
                live = find_container(host, name)
                if live is not None and self._adopt(host, live, inputs):
                    return live["Id"], live["State"]["Status"] == "created"
        raise DockerError(f"The container {name} on {host.url} comes and goes; it could not be made.")

    def _adopt(self, host: DockerHost, live: Inspected, inputs: Properties) -> bool:
        """Say whether the container that has the name is what is wanted; remove it if it is ours, but different."""
        name = inputs["name"]
        if not is_ours(live["Config"].get("Labels"), wanted=read_labels(inputs)):
            raise DockerError(
                f"The container {name} on {host.url} exists, but it was not made for this resource.",
                detail=f"its id: {live['Id']}; its labels: {live['Config'].get('Labels')}",
                resolution="Rename or remove it; Machineuse takes no container that it did not make.",
            )
        differs = _differences(live, inputs)
        log.info("container found", name=name, host=host.url, adopted=not differs, differs=differs)
        if not differs:
            return True
        if live["State"]["Running"]:
            stop_container(host, live["Id"], timeout_s=LEFTOVER_STOP_TIMEOUT_S)
        remove_container(host, live["Id"], kill=True)
        return False

    def _start(self, host: DockerHost, container: str, *, name: str, undo: bool) -> None:
        try:
            start_container(host, container)
        except MachineuseError:
            if undo:
                try:
                    remove_container(host, container, kill=True)
                except MachineuseError as error:  # the failure to start is what the caller must see
                    log.warning("container not removed", name=name, host=host.url, error=error.message)
            raise

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        host = self._host(call)
        live = find_container(host, id)
        if live is None:
            return None
        now = keep_wording(
            TABLE, olds=outputs, news=_forgive_missing_swap(host, read_outputs(live, inputs=inputs), inputs=inputs)
        )
        return Found(id=live["Id"], inputs=as_declared(TABLE, inputs=inputs, outputs=now), outputs=now)

    def update(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Properties:
        del old_inputs
        host = self._host(call)
        if any(not same(TABLE[key].kind, old_outputs.get(key), news.get(key)) for key in LIMITS):
            update_container(host, id, changes=to_limits(news))
        if news.get("mustRun", True) and news.get("start", True) and not old_outputs.get("mustRun", True):
            start_container(host, id)
        live = _inspect(host, id)
        outputs = _forgive_missing_swap(host, read_outputs(live, inputs=news), inputs=news)
        outputs["mustRun"] = news.get("mustRun", True)
        return keep_wording(TABLE, olds=old_outputs, news=outputs)

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        del inputs

        def remove(host: DockerHost, decision: DeleteDecision) -> None:
            if not decision.force:
                stop_container(host, id, timeout_s=decision.stop_timeout_s)
            remove_container(host, id, kill=True, anonymous_volumes=outputs.get("removeVolumes", True))

        self._delete(call, kind="container", name=str(outputs.get("name") or id), outputs=outputs, remove=remove)


def _inspect(host: DockerHost, container: str) -> Inspected:
    live = find_container(host, container)
    if live is None:
        raise DockerNotFound(f"The container {container} on {host.url} vanished while it was being made.")
    return live


def _differences(live: Inspected, inputs: Properties) -> list[str]:
    """Return the names of the properties in which a container is not what is wanted."""
    outputs = read_outputs(live, inputs=inputs)
    outputs["mustRun"] = inputs.get("mustRun", True)  # a stopped one is started
    config: dict[str, Any] = live["Config"]
    differs = list(compare(TABLE, old_inputs=inputs, old_outputs=outputs, news=inputs).changes)
    if set(inputs.get("envs") or []) - set(config.get("Env") or []):
        differs.append("envs")
    return differs


def _forgive_missing_swap(host: DockerHost, outputs: Properties, *, inputs: Properties) -> Properties:
    """Take the wanted swap limit for granted on a kernel that has none: it is not what anybody changed."""
    wanted = inputs.get("memorySwap")
    missing = wanted and outputs["memorySwap"] in (0, -1) and wanted != outputs["memorySwap"]
    if missing and not host.info().get("SwapLimit", True):
        return outputs | {"memorySwap": wanted}
    return outputs
