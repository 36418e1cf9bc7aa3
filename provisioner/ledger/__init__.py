"""The ledger: what is wanted, what was observed, and what happened. The only SQL of the project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from provisioner.errors import LedgerMismatch
from provisioner.ledger.database import Database, Location
from provisioner.ledger.events import Events
from provisioner.ledger.instances import Instances
from provisioner.ledger.leases import Leases
from provisioner.ledger.leftovers import Leftovers
from provisioner.ledger.node_images import NodeImages
from provisioner.ledger.nodes import Nodes
from provisioner.ledger.postgresql import Listener
from provisioner.ledger.samples import Samples

_CLUSTER = "cluster"


class Ledger:
    """One cluster's ledger: its tables by name, and its id."""

    def __init__(self, database: Database, ledger_id: str) -> None:
        self._database = database
        self.id = ledger_id
        self.location = database.location
        self.instances = Instances(database)
        self.nodes = Nodes(database)
        self.node_images = NodeImages(database)
        self.events = Events(database)
        self.samples = Samples(database)
        self.leftovers = Leftovers(database)
        self.leases = Leases(database)

    @classmethod
    def create(cls, location: Location) -> Ledger:
        """Open the ledger there, making it first if there is none; bring its schema up to date.

        Raises LedgerUnavailable.
        """
        if isinstance(location, Path):
            location.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        database = Database(location)
        database.migrate()
        return cls(database, database.make_id())

    @classmethod
    def open(cls, location: Location) -> Ledger:
        """Open a ledger that exists; raise LedgerMismatch when there is none: no ledger is not "no instances".

        Raises LedgerUnavailable.
        """
        if isinstance(location, Path) and not location.is_file():
            raise LedgerMismatch(
                f"There is no ledger at {location}, so what this cluster should contain is unknown.",
                resolution="Set MACHINEUSE_DATA_DIR to the data directory of the service that runs this cluster"
                " (a new cluster gets one from `machineuse serve`).",
            )
        database = Database(location)
        if database.is_shared and database.revision() is None:
            raise LedgerMismatch(
                f"There is no ledger in {database.name}, so what this cluster should contain is unknown.",
                resolution="Set MACHINEUSE_LEDGER to the database of the service that runs this cluster"
                " (a new cluster gets its ledger from `machineuse serve`).",
            )
        database.migrate()
        return cls(database, database.ledger_id())

    def listen(self, changed: Callable[[str | None], None]) -> Listener | None:
        """Give a listener that calls `changed` with the id of every instance that another process changes.

        None as the id means that it may be any. Returns None for a ledger that tells nobody: it has to be looked at.
        """
        if not self._database.is_shared:
            return None

        def heard(message: str) -> None:
            token, _, instance_id = message.partition(" ")
            if token != self._database.token:
                changed(instance_id)

        return Listener(self._database.engine, heard=heard, again=lambda: changed(None))

    def claim(self, cluster: str) -> None:
        """Note that this is the ledger of that cluster, for ever. Raises LedgerMismatch where it is another one's."""
        self._database.settle_fact(_CLUSTER, cluster)
        self.check_cluster(cluster)

    def check_cluster(self, cluster: str) -> None:
        """Raise LedgerMismatch where this is known to be the ledger of another cluster."""
        owner = self.fact(_CLUSTER)
        if owner not in (None, cluster):
            raise LedgerMismatch(
                f"The ledger in {self._database.name} is that of cluster '{owner}', and this is cluster '{cluster}'.",
                resolution="Each cluster has a ledger of its own: set MACHINEUSE_LEDGER or MACHINEUSE_DATA_DIR, or name"
                " the cluster with MACHINEUSE_CLUSTER.",
            )

    def fact(self, name: str) -> str | None:
        """Return a fact about the cluster that was written down, or None."""
        return self._database.fact(name)

    def write_fact(self, name: str, value: str) -> None:
        """Write down a fact about the cluster, in place of what it was before."""
        self._database.write_fact(name, value)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()
