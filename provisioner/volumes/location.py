"""Which cloud the service's volumes are in: by its settings."""

from __future__ import annotations

from provisioner.settings import Settings
from provisioner.volumes.cloud import Regions
from provisioner.volumes.ec2 import Ec2Options, Ec2Regions


def open_regions(settings: Settings) -> Regions:
    """Return the cloud's regions; nothing is connected yet."""
    return Ec2Regions(
        Ec2Options(
            endpoint=settings.ec2_endpoint,
            volume_type=settings.ebs_type,
            encrypted=settings.ebs_encrypted,
            kms_key=settings.ebs_kms_key,
        )
    )
