"""Finds out when an instance can be used, as soon as it can: asks its browser every few hundredths of a second.

The converger makes volume and container and hands the instance over with `watch`. From then on the instance is ready
when its browser answers, or, without a browser, when its container has stayed up for a moment. It is given up when its
container keeps ending, or when `ready_timeout_s` has passed; time in which its node does not answer is not counted, and
the others do not wait for such a node.
One that was given up and answers later, because its machine was slow or its browser was mended, is taken back.

Nothing here survives a crash, nor has to: `step` finds every instance in the ledger that is waited for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar

import structlog

from provisioner import lifecycle
from provisioner.browser_status import Ask, BrowserStatus, BrowserStatusClient, agent_url, ask_all
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.inventory import ContainerState, describe_container, read_last_log
from provisioner.errors import DockerError, NodeUnreachable, NotFound, NotReady
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord
from provisioner.settings import Settings
from provisioner.states import UP, Status, Wanted
from stacks.names import Names
from stacks.spec import NodeSpec

log = structlog.get_logger(__name__)

FIRST_POLL_S = 0.02
LAST_POLL_S = 0.5
POLL_COST_S = 0.002
"""What one poll may take of a core: with many instances waited for, each is asked less often."""
LOOK_EVERY_S = 1.0
"""How often the container behind a browser that doesn't answer yet is looked at."""
GRACE_S = 0.6
"""How long a container without a browser must stay up."""
MOST_RESTARTS = 3
"""A container whose command ended this often will not come up."""

ASKED_ON_SILENT_NODES = 4
"""Browsers that are asked at the same time on nodes that do not answer: each may cost its whole time limit."""

REVISIT_EVERY_STEPS = 6
"""How often failed instances are looked at: whether they work after all."""

T = TypeVar("T")


class Outcome(Enum):
    """What a look at a container says."""

    WAIT = auto()
    READY = auto()
    GONE = auto()  # there is no container, or it is stopped and stays so
    FAILED = auto()


@dataclass(slots=True)
class Watch:
    """What is known of one instance that is waited for."""

    record: InstanceRecord
    node: NodeSpec
    began: float
    deadline: float
    look_at: float
    restarts_before: int | None = None
    """How often the container of an instance that was up before had been restarted by then."""
    restarts: int = 0
    exit_code: int | None = None
    oom_killed: bool = False
    up_since: float | None = None
    gone: int = 0
    """How many looks in a row found the container stopped or missing."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)


def is_awaited(record: InstanceRecord) -> bool:
    """Say whether the engine did its part, and only the browser's answer is missing."""
    return (
        record.wanted is Wanted.RUNNING
        and record.settled_generation < record.generation
        and record.applied_generation == record.generation
    )


class Readiness:
    """Waits for many instances at once, in one thread."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        cluster: Cluster,
        hosts: DockerHosts,
        settings: Settings,
        changes: Changes,
        ask: Ask = ask_all,
    ) -> None:
        self._ledger = ledger
        self._ask = ask
        self._cluster = cluster
        self._hosts = hosts
        self._settings = settings
        self._changes = changes
        self._names = Names(cluster.name)
        self._steps = 0
        self._silent: frozenset[str] = frozenset()
        """Nodes that do not answer, as far as the heartbeats know."""
        self._few = asyncio.Semaphore(ASKED_ON_SILENT_NODES)
        self._answering: dict[str, int] = {}
        """The failed instances whose browser answered at the last look, and their container's restarts by then."""
        self._watches: dict[str, Watch] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._client: BrowserStatusClient
        self._writers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="machineuse-ready-ledger")
        self._lookers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="machineuse-ready-docker")

    def start(self) -> None:
        """Start the thread, and wait for everything that the ledger says is waited for.

        Raises what keeps the thread from running: that there are too many open files, say.
        """
        if self._thread is not None:
            return
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="machineuse-readiness", daemon=True)
        self._thread.start()
        started.result()
        self.step()

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """End the thread; what is not ready by then is waited for after the next start."""
        with self._lock:
            loop, self._loop = self._loop, None
        if self._thread is None or self._stopping is None or loop is None:
            return
        loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(timeout_s)
        self._lookers.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=True)

    def step(self) -> None:
        """Watch every instance of the ledger that is waited for and not watched yet."""
        self._silent = frozenset(node.id for node in self._ledger.nodes.list() if node.misses)
        for record in self._ledger.instances.unsettled():
            self.watch(record)
        self._steps += 1
        if self._steps % REVISIT_EVERY_STEPS == 0:
            self.revisit_failed()

    def revisit_failed(self) -> None:
        """Take back the failed instances whose browser answers after all, at two looks, without a restart between."""
        urls: dict[str, str] = {}
        records = {record.id: record for record in self._ledger.instances.failed()}
        for record in records.values():
            node = self._cluster.node(record.node_id)
            if node is None or node.id in self._silent:
                continue
            if record.wanted is Wanted.RUNNING and record.debug_port is not None:
                urls[record.id] = agent_url(node, debug_port=record.debug_port)
        before, self._answering = self._answering, {}
        for instance_id, status in self._ask(urls).items():
            restarts = self._count_restarts(records[instance_id]) if status.ready else None
            if restarts is None:
                continue
            self._answering[instance_id] = restarts
            if before.get(instance_id) == restarts:
                self._take_back(records[instance_id])

    def _count_restarts(self, record: InstanceRecord) -> int | None:
        """Return how often its container was restarted; None when it does not run: its port is somebody else's then."""
        node = self._cluster.node(record.node_id)
        try:
            name = self._names.docker_container(record.id)
            state = describe_container(self._hosts.of(node), name=name) if node is not None else None
        except DockerError:
            return None
        return state.restart_count if state is not None and state.running else None

    def _take_back(self, record: InstanceRecord) -> None:
        generation = record.generation
        try:
            self._ledger.instances.change(record.id, lambda r, _: lifecycle.note_ready(r, generation=generation))
        except NotFound:
            return  # deleted meanwhile
        log.info("ready after all", instance=record.id)
        self._changes.notify(record.id)

    def watch(self, record: InstanceRecord) -> None:
        """Wait for this instance from now on; safe to call from any thread, and more than once."""
        node = self._cluster.node(record.node_id)
        if node is None or not is_awaited(record):
            return
        with self._lock:
            known = self._watches.get(record.id)
            if self._loop is None or (known is not None and known.record.generation == record.generation):
                return
            now = time.monotonic()
            watch = Watch(
                record=record,
                node=node,
                began=now,
                deadline=now + self._settings.ready_timeout_s,
                look_at=now + (LOOK_EVERY_S if record.debug_port is not None else 0.0),
            )
            self._watches[record.id] = watch
            self._loop.call_soon_threadsafe(self._begin, watch)

    # ---- in the thread

    def _run(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._serve(started))
        except Exception as error:  # the outermost frame of the thread
            if started.done():
                raise
            started.set_exception(error)  # whoever started it would wait for ever

    async def _serve(self, started: Future[None]) -> None:
        self._stopping = asyncio.Event()
        async with BrowserStatusClient() as client:
            self._client = client
            self._loop = asyncio.get_running_loop()
            started.set_result(None)
            await self._stopping.wait()
            tasks = [watch.task for watch in list(self._watches.values()) if watch.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, watch: Watch) -> None:
        watch.task = asyncio.create_task(self._follow(watch))
        watch.task.add_done_callback(lambda task: self._end(watch, task))

    def _end(self, watch: Watch, task: asyncio.Task[None]) -> None:
        with self._lock:
            if self._watches.get(watch.record.id) is watch:
                del self._watches[watch.record.id]
        if not task.cancelled() and (error := task.exception()) is not None:
            # `step` starts it anew
            log.error("waiting for an instance failed", instance=watch.record.id, error=str(error), exc_info=error)

    async def _follow(self, watch: Watch) -> None:
        while self._watches.get(watch.record.id) is watch:
            if watch.record.debug_port is not None:
                status = await self._ask_browser(watch.node, debug_port=watch.record.debug_port)
                if status is not None and status.ready:
                    await self._ready(watch)
                    return
            if time.monotonic() >= watch.look_at and await self._look(watch):
                return
            await asyncio.sleep(self._pause_s(watch))

    async def _ask_browser(self, node: NodeSpec, *, debug_port: int) -> BrowserStatus | None:
        """Ask a browser; those of silent nodes, which may go on while their engine hangs, a few at a time."""
        url = agent_url(node, debug_port=debug_port)
        if node.id not in self._silent:
            return await self._client.ask(url)
        async with self._few:
            return await self._client.ask(url)

    def _pause_s(self, watch: Watch) -> float:
        waited_s = time.monotonic() - watch.began
        wanted_s = FIRST_POLL_S if waited_s < 4 else min(waited_s / 100, LAST_POLL_S)
        return max(wanted_s, POLL_COST_S * len(self._watches))

    async def _look(self, watch: Watch) -> bool:
        """Look at the container and decide; return whether the waiting is over."""
        every_s = LOOK_EVERY_S if watch.record.debug_port is not None else LOOK_EVERY_S / 5
        watch.look_at = time.monotonic() + every_s
        if not await self._in(self._writers, lambda: self._still_awaited(watch.record)):
            return True
        if watch.node.id in self._silent:  # whoever looks there waits, and others for him
            watch.deadline = max(watch.deadline, time.monotonic() + self._settings.ready_timeout_s)
            return False
        name = self._names.docker_container(watch.record.id)
        host = self._hosts.of(watch.node)
        before = time.monotonic()
        try:
            state = await self._in(self._lookers, lambda: describe_container(host, name=name))
        except NodeUnreachable:
            watch.deadline += time.monotonic() - before + LOOK_EVERY_S  # not the browser's fault
            return False
        except DockerError as error:
            log.warning("look at a container failed", instance=watch.record.id, error=error.message)
            return False
        outcome, reason = judge(watch, state, now=time.monotonic())
        if outcome is Outcome.READY:
            await self._ready(watch)
        elif outcome is Outcome.GONE and (watch.record.status in UP or watch.record.repair):
            await self._lost(watch, reason=reason)
        elif outcome is not Outcome.WAIT:
            await self._failed(watch, reason=reason)
        return outcome is not Outcome.WAIT

    def _still_awaited(self, record: InstanceRecord) -> bool:
        now = self._ledger.instances.find(record.id)
        return now is not None and now.generation == record.generation and is_awaited(now)

    async def _ready(self, watch: Watch) -> None:
        generation = watch.record.generation
        await self._change(watch, lambda r: lifecycle.note_ready(r, generation=generation))
        log.info("ready", instance=watch.record.id, waited_s=round(time.monotonic() - watch.began, 3))

    async def _lost(self, watch: Watch, *, reason: str) -> None:
        """Have the container of an instance that was up before made again: its home is still there."""

        def decide(record: InstanceRecord) -> Update | None:
            if record.generation != watch.record.generation or not is_awaited(record):
                return None
            settled = dataclasses.replace(record, settled_generation=record.generation)
            return lifecycle.wish_repaired(settled, reason=reason)

        await self._change(watch, decide)

    async def _failed(self, watch: Watch, *, reason: str) -> None:
        name = self._names.docker_container(watch.record.id)
        host = self._hosts.of(watch.node)
        try:
            said = await self._in(self._lookers, lambda: read_last_log(host, name=name))
        except DockerError:
            said = ""
        reason += f" Its last words: {said}" if said else ""
        log.warning("not ready", instance=watch.record.id, reason=reason)
        await self._change(watch, lambda r: give_up(r, generation=watch.record.generation, reason=reason))

    async def _change(self, watch: Watch, decide: Callable[[InstanceRecord], Update | None]) -> None:
        def write() -> None:
            try:
                self._ledger.instances.change(watch.record.id, lambda r, _: decide(r))
            except NotFound:
                return  # deleted meanwhile
            self._changes.notify(watch.record.id)
            self._changes.work.set()

        await self._in(self._writers, write)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function)


def judge(watch: Watch, state: ContainerState | None, *, now: float) -> tuple[Outcome, str]:
    """Decide from one more look at the container, and from those before; the text says why."""
    if state is None or state.state in ("exited", "dead", "removing"):
        watch.gone += 1
        what = "is gone" if state is None else f"stopped with exit code {state.exit_code}"
        return (Outcome.GONE, f"Its container {what}.") if watch.gone > 1 else (Outcome.WAIT, "")
    watch.gone = 0
    if watch.restarts_before is None:
        watch.restarts_before = state.restart_count if watch.record.status in UP else 0
    restarts = state.restart_count - watch.restarts_before
    if not state.running:
        watch.exit_code, watch.oom_killed = state.exit_code, state.oom_killed
    if restarts != watch.restarts or not state.running:
        watch.up_since = None
    else:
        watch.up_since = watch.up_since or now
    watch.restarts = restarts
    if watch.record.debug_port is None and watch.up_since is not None and now - watch.up_since >= GRACE_S:
        return Outcome.READY, ""
    if restarts >= MOST_RESTARTS and (not state.running or restarts >= 2 * MOST_RESTARTS):
        return Outcome.FAILED, _tell_end(watch)
    if now < watch.deadline:
        return Outcome.WAIT, ""
    waited = f"within {watch.deadline - watch.began:.0f} s"
    if watch.restarts:
        return Outcome.FAILED, f"It did not come up {waited}. {_tell_end(watch)}"
    return Outcome.FAILED, f"Its browser did not answer {waited}, though its container is {state.state}."


def _tell_end(watch: Watch) -> str:
    ended = f"Its container's command ended {watch.restarts} times"
    if watch.oom_killed:
        return f"{ended}: it was killed because it needs more than its {watch.record.memory_gb:g} GB of memory."
    return f"{ended}, last with exit code {watch.exit_code}." if watch.exit_code is not None else f"{ended}."


def give_up(record: InstanceRecord, *, generation: int, reason: str) -> Update | None:
    """Give up an instance that won't come up: back to its snapshot if it was only just restored, else failed."""
    if record.restore_generation is not None and not record.repair and record.status is Status.CREATING:
        # Nobody used what was restored yet: back to the snapshot, from which it can be revived again.
        error = NotReady(f"It was restored, but can't be used. {reason}", resolution="Its snapshot is kept.")
        return lifecycle.note_revive_failed(record, generation=generation, error=error)
    return lifecycle.note_failed(
        record, generation=generation, error=NotReady(reason, resolution="Delete it, and create it differently.")
    )
