"""Shows how a node empties, until it is empty: a live line on a terminal, a line per change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import typer

from provisioner.errors import Conflict
from provisioner.leaving import Leaving, is_away, is_closed, service_runs, watch_leaving
from provisioner.ledger import Ledger

LOOK_EVERY_S = 0.5


def follow(ledger: Ledger, *, node_id: str, heartbeat_s: float) -> None:
    """Show what becomes of the node's instances until none is left; Ctrl-C ends the showing, not the draining."""
    try:
        if sys.stdout.isatty():
            _follow_live(ledger, node_id=node_id, heartbeat_s=heartbeat_s)
        else:
            _follow(ledger, node_id=node_id, heartbeat_s=heartbeat_s, say=typer.echo, show=lambda *_: None)
    except KeyboardInterrupt:
        typer.echo(
            f"\nThe service goes on draining node {node_id}. `machineuse node drain {node_id}` shows progress again;"
            f" `machineuse node uncordon {node_id}` stops it."
        )
        raise typer.Exit(130) from None
    typer.echo(f"Node {node_id} is empty.")


def _follow_live(ledger: Ledger, *, node_id: str, heartbeat_s: float) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("draining", total=None)

        def show(now: Leaving, most: int) -> None:
            doing = ", ".join(f"{instance_id}: {what}" for instance_id, what in list(now.moving.items())[:2])
            progress.update(task, total=most, completed=most - now.left, description=doing or "draining")

        def say(line: str) -> None:
            progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

        _follow(ledger, node_id=node_id, heartbeat_s=heartbeat_s, say=say, show=show)


def _follow(
    ledger: Ledger,
    *,
    node_id: str,
    heartbeat_s: float,
    say: Callable[[str], object],
    show: Callable[[Leaving, int], None],
) -> None:
    most = 0
    told: set[str] = set()
    there: set[str] = set()
    begun = False

    def say_once(line: str) -> None:
        if line not in told:
            told.add(line)
            say(line)

    while True:
        now = watch_leaving(ledger, node_id=node_id)
        ids = {*now.moving, *now.stuck, *now.waiting}
        for instance_id in sorted(there - ids):
            say(f"{instance_id} has left. {now.left} to go.")
        there, most = ids, max(most, now.left)
        node = next((node for node in ledger.nodes.list() if node.id == node_id), None)
        runs = service_runs(ledger, heartbeat_s=heartbeat_s)
        begun = begun or is_closed(node)
        if begun and not is_closed(node):
            raise Conflict(
                f"Node {node_id} takes instances again: its drain was stopped.",
                resolution=f"`machineuse node drain {node_id}` goes on with it.",
            )
        if not ids:
            if is_closed(node) or not runs:
                return
            time.sleep(LOOK_EVERY_S)  # until the service knows, one more may come
            continue
        say_once(f"{most} instance(s) to move.") if not told else None
        for instance_id, what in now.moving.items():
            say_once(f"{instance_id}: {what}")
        for instance_id, why in now.stuck.items():
            say_once(f"{instance_id} stays for now: {why}")
        if not runs:
            say_once("No service runs, and it is the service that moves instances: start it (`machineuse serve`).")
        elif is_away(node):
            say_once(f"Node {node_id} does not answer: what is on it waits for it.")
        show(now, most)
        time.sleep(LOOK_EVERY_S)
