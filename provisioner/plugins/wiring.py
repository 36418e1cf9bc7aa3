"""Builds a plugin for a plain `pulumi up`, where no control plane runs: from the environment's settings alone."""

from __future__ import annotations

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import LedgerMismatch, LedgerUnavailable
from provisioner.guard import LedgerGuard
from provisioner.ledger import Ledger
from provisioner.plugins.base import PluginServicer
from provisioner.plugins.policy import DeletePolicy, RefuseWithoutLedger
from provisioner.settings import Settings


def build_plugin(package: str, *, engine_address: str) -> PluginServicer:
    """Return the plugin of that package; it deletes nothing that this machine's ledger does not allow."""
    settings = Settings()
    hosts = DockerHosts(base_dir=settings.project_dir, timeout_s=settings.node_timeout_s)
    policy = _open_policy(settings)
    if package == "docker":
        from provisioner.plugins.docker.provider import DockerProvider

        return DockerProvider(hosts=hosts, policy=policy, engine_address=engine_address)
    from provisioner.plugins.machineuse.servicer import MachineusePlugin
    from provisioner.snapshots.location import open_store
    from provisioner.volumes.location import open_regions

    store = open_store(settings)
    regions = open_regions(settings)
    return MachineusePlugin(store=store, hosts=hosts, policy=policy, regions=regions, engine_address=engine_address)


def _open_policy(settings: Settings) -> DeletePolicy:
    try:
        return LedgerGuard(Ledger.open(settings.ledger_location), stop_timeout_s=settings.stop_timeout_s)
    except (LedgerMismatch, LedgerUnavailable):
        return RefuseWithoutLedger()
