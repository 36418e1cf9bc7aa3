"""Samples of CPU, memory and disk in the ledger."""

from __future__ import annotations

from provisioner.ledger.database import Database


class Samples:
    """The table of samples."""

    def __init__(self, database: Database) -> None:
        self._database = database
