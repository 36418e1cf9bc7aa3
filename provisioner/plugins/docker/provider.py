"""The docker plugin as a whole."""

from __future__ import annotations

from typing import ClassVar

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.plugins.base import PluginServicer
from provisioner.plugins.docker import containers, networks, volumes
from provisioner.plugins.policy import DeletePolicy
from stacks.names import CONTAINER_TYPE, NETWORK_TYPE, VOLUME_TYPE


class DockerProvider(PluginServicer):
    """Serves Volume, Container and Network; a provider resource is configured with how its engine is reached."""

    package: ClassVar[str] = "docker"
    version: ClassVar[str] = "5.2.0"
    config_keys: ClassVar[frozenset[str]] = frozenset({"host", "certPath", "sshOpts"})

    def __init__(self, *, hosts: DockerHosts, policy: DeletePolicy, engine_address: str = "") -> None:
        """Reach engines through `hosts`, and ask `policy` before every delete."""
        super().__init__(
            {
                CONTAINER_TYPE: containers.ContainerType(hosts, policy),
                NETWORK_TYPE: networks.NetworkType(hosts, policy),
                VOLUME_TYPE: volumes.VolumeType(hosts, policy),
            },
            engine_address=engine_address,
        )
