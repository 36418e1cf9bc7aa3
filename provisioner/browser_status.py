"""Asks a browser's own agent how it is: ready, last used when, how full its home is.

The project's browser image has an agent behind the debug port that answers `GET /machineuse/status` itself, without
the browser, and never counts that as use. Another image with a debug port has no such agent: its `GET /json/version`
tells at least whether the browser answers. All of it is untrusted: answers are bounded in time and size, and checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stacks.spec import NodeSpec

TIMEOUT_S = 1.5
CONCURRENCY = 64
_MOST_BYTES = 64 * 1024

_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BrowserStatus:
    """What is known of a browser that answered."""

    ready: bool
    """Whether its debug protocol answers."""
    last_activity_s: float | None = None
    """Seconds since a client last used it; None when nobody did yet, or nobody counts."""
    counts_activity: bool = False
    """Whether there is an agent that would know."""
    home_bytes: int | None = None


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    ready: bool
    last_activity_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    home_bytes: int | None = Field(default=None, ge=0)


def agent_url(node: NodeSpec, *, debug_port: int) -> str:
    """Return where the service reaches a debug port of that node: a local engine's where it binds it."""
    host = _EVERY_ADDRESS.get(node.bind_ip, node.bind_ip) if node.host.startswith("unix://") else node.address
    return f"http://[{host}]:{debug_port}" if ":" in host else f"http://{host}:{debug_port}"


Ask = Callable[[Mapping[str, str]], Mapping[str, BrowserStatus]]
"""Asks agents, by key and URL, and returns the answers of those that answered."""


class BrowserStatusClient:
    """Asks many agents at once; belongs to the event loop that it is entered in."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._client = httpx.AsyncClient(
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY),
            headers={"Host": "localhost"},  # Chromium refuses any other name
            trust_env=False,  # nodes are reached directly, not through a web proxy of the environment
            verify=False,  # plain HTTP only: saves loading certificates
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, url: str) -> BrowserStatus | None:
        """Return the browser's status; None when nobody answers in time."""
        async with self._slots:
            try:
                async with asyncio.timeout(self._timeout_s):
                    code, body = await self._get(f"{url}/machineuse/status")
                    if code == httpx.codes.OK:
                        answer = _parse(body)
                        if answer is not None:
                            return answer
                    code, _ = await self._get(f"{url}/json/version")
            except (httpx.HTTPError, TimeoutError):
                return None
        return BrowserStatus(ready=code == httpx.codes.OK)

    async def _get(self, url: str) -> tuple[int, bytes]:
        async with self._client.stream("GET", url) as response:
            body = b""
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > _MOST_BYTES:
                    break
        return response.status_code, body


def _parse(body: bytes) -> BrowserStatus | None:
    try:
        answer = _Answer.model_validate_json(body)
    except ValidationError:
        return None
    return BrowserStatus(
        ready=answer.ready,
        last_activity_s=answer.last_activity_s,
        counts_activity=True,
        home_bytes=answer.home_bytes,
    )


def ask_all(urls: Mapping[str, str]) -> dict[str, BrowserStatus]:
    """Ask every URL, many at once; return the status of each that answered, by the mapping's keys."""

    async def gather() -> dict[str, BrowserStatus]:
        async with BrowserStatusClient() as client:
            answers = await asyncio.gather(*(client.ask(url) for url in urls.values()))
        return {key: answer for key, answer in zip(urls, answers, strict=True) if answer is not None}

    return asyncio.run(gather()) if urls else {}
