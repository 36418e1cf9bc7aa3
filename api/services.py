"""What the API needs of the rest of the service: the one place where the two are joined."""

from __future__ import annotations

from typing import Annotated, Protocol

from fastapi import Depends, Request

from provisioner.cluster import Cluster
from provisioner.ledger import Ledger
from provisioner.service import InstanceService
from provisioner.settings import Settings


class Services(Protocol):
    """The parts that request handlers use; a replica has them all."""

    @property
    def settings(self) -> Settings:
        """Return the service's settings."""

    @property
    def cluster(self) -> Cluster:
        """Return what the cluster's file says."""

    @property
    def ledger(self) -> Ledger:
        """Return the ledger, which every reading handler answers from."""

    @property
    def instances(self) -> InstanceService:
        """Return the verbs, which every changing handler calls."""

    @property
    def is_leading(self) -> bool:
        """Say whether this is the replica that changes the nodes."""


def _of_request(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_of_request)]
"""Gives a handler the services that its app was made with."""
