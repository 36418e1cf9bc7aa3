"""The `machineuse` package: `Snapshot`, `Restore`, `CloudVolume` and `Claim`, resources that no other provider has."""

from provisioner.plugins.machineuse.servicer import MachineusePlugin

__all__ = ["MachineusePlugin"]
