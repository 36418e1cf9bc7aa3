"""How long a changing call waits for its outcome: `Prefer: wait=N` (RFC 7240), or the service's default.

A service that is being stopped lets nobody wait any longer: every waiting call answers with the instance as it is.
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated

from fastapi import Depends, Header, Request, Response

from api.services import Services
from provisioner.changes import Changes
from provisioner.ledger.records import InstanceRecord

MAX_WAIT_S = 300
_ALL = "all calls"

_QUOTED_OR_NOT = re.compile(r'\s*wait\s*=\s*(?:"(\d{1,9})"|(\d{1,9}))\s*', re.ASCII | re.IGNORECASE)


def parse_wait(prefer: str | None) -> int | None:
    """Return the seconds that a Prefer header asks for, at most 300; None where it asks for none that we know."""
    for preference in (prefer or "").split(","):
        found = _QUOTED_OR_NOT.fullmatch(preference.split(";")[0])
        if found:
            return min(int(found[1] or found[2]), MAX_WAIT_S)
    return None


class Stopping:
    """Says to every call that waits, whichever loop it waits in, that the service is being stopped."""

    def __init__(self) -> None:
        self._begun = False
        self._calls = Changes()

    def set(self) -> None:
        """Let nobody wait any longer."""
        self._begun = True
        self._calls.notify(_ALL)

    async def wait(self) -> None:
        """Return once the service is being stopped."""
        with self._calls.subscribe(_ALL) as changed:
            if not self._begun:
                await changed.wait()


class Waiter:
    """Waits for one call's outcome, as long as its caller prefers."""

    def __init__(
        self,
        request: Request,
        response: Response,
        prefer: Annotated[
            str | None,
            Header(
                description=f"`wait=N`: wait up to N seconds (0 to {MAX_WAIT_S}) for the outcome; 0 returns at once."
            ),
        ] = None,
    ) -> None:
        self._services: Services = request.app.state.services
        self._stopping: Stopping = request.app.state.stopping
        preferred_s = parse_wait(", ".join(request.headers.getlist("prefer")) or prefer)
        if preferred_s is not None:
            response.headers["Preference-Applied"] = f"wait={preferred_s}"
        self._timeout_s = self._services.settings.default_wait_s if preferred_s is None else float(preferred_s)

    async def outcome(self, wished: InstanceRecord) -> InstanceRecord | None:
        """Return the instance as it is when its wish has come to an end or the time is up; None when it is gone.

        Raises what `InstanceService.outcome` raises.
        """
        instances = self._services.instances
        outcome = asyncio.create_task(instances.outcome(wished, timeout_s=self._timeout_s))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({outcome, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if outcome.done():
                return outcome.result()
        finally:
            stopping.cancel()
            outcome.cancel()
        return await instances.outcome(wished, timeout_s=0)


WaiterDep = Annotated[Waiter, Depends()]
"""Gives a handler the waiter of its request."""
