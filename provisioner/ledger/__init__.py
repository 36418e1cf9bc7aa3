"""The ledger: what is wanted, what was observed, and what happened. The only SQL of the project."""

from __future__ import annotations

from pathlib import Path

from provisioner.errors import LedgerMismatch
from provisioner.ledger.database import Database
from provisioner.ledger.events import Events
from provisioner.ledger.instances import Instances
from provisioner.ledger.leftovers import Leftovers
from provisioner.ledger.node_images import NodeImages
from provisioner.ledger.nodes import Nodes
from provisioner.ledger.samples import Samples


class Ledger:
    """One cluster's ledger: its tables by name, and its id."""

    def __init__(self, database: Database, ledger_id: str) -> None:
        self._database = database
        self.id = ledger_id
        self.path = database.path
        self.instances = Instances(database)
        self.nodes = Nodes(database)
        self.node_images = NodeImages(database)
        self.events = Events(database)
        self.samples = Samples(database)
        self.leftovers = Leftovers(database)

    @classmethod
    def create(cls, path: Path) -> Ledger:
        """Open the ledger at `path`, making it first if there is none; bring its schema up to date."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        database = Database(path)
        database.migrate()
        return cls(database, database.make_id())

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Open a ledger that exists; raise LedgerMismatch when there is none: no ledger is not "no instances"."""
        if not path.is_file():
            raise LedgerMismatch(
                f"There is no ledger at {path}, so what this cluster should contain is unknown.",
                resolution="Set MACHINEUSE_DATA_DIR to the data directory of the service that runs this cluster"
                " (a new cluster gets one from `machineuse serve`).",
            )
        database = Database(path)
        database.migrate()
        return cls(database, database.ledger_id())

    def fact(self, name: str) -> str | None:
        """Return a fact about the cluster that was written down, or None."""
        return self._database.fact(name)

    def write_fact(self, name: str, value: str) -> None:
        """Write down a fact about the cluster, in place of what it was before."""
        self._database.write_fact(name, value)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()
