"""`machineuse node`: a cluster's nodes, seen and changed from the command line.

Each command edits `Pulumi.<cluster>.yaml`, where the next person looks, and a running service takes it over. They read
the ledger beside the service, and work without one. Each imports what it needs itself, so that none waits for the
others' parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from api.options import ClusterOption, DataDirOption, read_settings
from api.tables import show_table
from provisioner.errors import Conflict, DockerError, InvalidRequest, LedgerMismatch, NotFound, SettingsError

if TYPE_CHECKING:
    from provisioner.ledger import Ledger
    from provisioner.ledger.records import InstanceRecord, NodeRecord
    from provisioner.settings import Settings
    from stacks.spec import Availability, ClusterSpec, NodeSpec

app = typer.Typer(help="See, add, close, empty and remove the cluster's nodes.", no_args_is_help=True)

NodeId = Annotated[str, typer.Argument(metavar="ID", help="The node's id.")]


@app.command("list")
def list_nodes(data_dir: DataDirOption = None, cluster: ClusterOption = None) -> None:
    """List the nodes that the file names, with what the service last saw of them."""
    settings = read_settings(data_dir=data_dir, cluster=cluster)
    spec = _read(settings)
    with _ledger(settings) as ledger:
        seen = {node.id: node for node in ledger.nodes.list()} if ledger else {}
        records = ledger.instances.all() if ledger else []
    rows = [_row(node, seen=seen.get(node.id), records=records) for node in spec.nodes]
    troubles = [(node.id, seen[node.id].error) for node in spec.nodes if node.id in seen]
    named = {node.id for node in spec.nodes}
    for node_id in sorted({record.node_id for record in records if record.body} - named):
        counts = _count(record for record in records if record.node_id == node_id and record.body)
        rows.append([node_id, seen[node_id].host if node_id in seen else "", "", "not in the file", counts, ""])
        troubles.append((node_id, "It has instances: put it back and drain it, or give it up (remove --force)."))
    columns = ("id", "host", "status", "availability", "instances", "labels")
    show_table(columns, rows, folding=("instances", "labels"))
    for node_id, trouble in troubles:  # below the table: each is one line, however wide the terminal is
        if trouble:
            typer.echo(f"{node_id}: {trouble}")
    if seen and not _service_runs(settings):
        typer.echo("No service runs: the status is as it was last seen.")


@app.command()
def add(
    node_id: NodeId,
    host: Annotated[str, typer.Option(help="unix://PATH, tcp://HOST:PORT or ssh://USER@HOST[:PORT].")],
    address: Annotated[
        str | None, typer.Option(help="Where clients reach the instances' ports (default: the host's name).")
    ] = None,
    bind_ip: Annotated[
        str | None, typer.Option(help="The node's address that those ports are bound to (default: 127.0.0.1).")
    ] = None,
    ports: Annotated[str | None, typer.Option(help="Which ports, FIRST-LAST (default: 21000-24999).")] = None,
    max_instances: Annotated[int | None, typer.Option(help="How many instances at most (default: 50).")] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, for callers to ask for; may be repeated.")] = None,
    cert_path: Annotated[
        Path | None, typer.Option(help="The directory of ca.pem, cert.pem and key.pem for tcp://.")
    ] = None,
    ssh_opt: Annotated[list[str] | None, typer.Option(help="One argument for ssh; may be repeated.")] = None,
    volume: Annotated[str | None, typer.Option(help="docker or ebs: what homes are on (default: docker).")] = None,
    cloud_instance_id: Annotated[str | None, typer.Option(help="Which cloud machine it is, for ebs.")] = None,
    cloud_zone: Annotated[str | None, typer.Option(help="In which zone that is.")] = None,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Add it even if its engine does not answer.")] = False,
    data_dir: DataDirOption = None,
    cluster: ClusterOption = None,
) -> None:
    """Add a node, once its Docker engine answers."""
    from provisioner.clusterfile import read_cluster
    from provisioner.clustertext import add_node
    from stacks.spec import machine_in

    settings = read_settings(data_dir=data_dir, cluster=cluster)
    given: dict[str, Any] = {
        "id": node_id,
        "host": host,
        "address": address or machine_in(host) or "localhost",
        "bind_ip": bind_ip,
        "ports": None if ports is None else _port_range(ports),
        "max_instances": max_instances,
        "labels": dict(_label(one) for one in label) if label else None,
        "cert_path": None if cert_path is None else str(cert_path.expanduser().absolute()),
        "ssh_opts": ssh_opt or None,
        "volume": volume,
        "cloud": _cloud(cloud_instance_id, cloud_zone),
    }
    entry = {key: value for key, value in given.items() if value is not None}
    _refuse_unreachable_ports(host, bind_ip=bind_ip)
    read_cluster(settings.project_dir, cluster=settings.cluster)  # writes a first one
    spec = _try(settings, lambda text: add_node(text, entry))  # refuses what is wrong before the engine is asked
    if not unchecked:
        typer.echo(_ask_engine(settings, spec, spec.nodes[-1]))
    _edit(settings, lambda text: add_node(text, entry))
    typer.echo(f"Node {node_id} is added.")
    _tell_next(settings)


@app.command()
def cordon(node_id: NodeId, data_dir: DataDirOption = None, cluster: ClusterOption = None) -> None:
    """Let a node get nothing new; what it has goes on."""
    from stacks.spec import Availability

    settings = read_settings(data_dir=data_dir, cluster=cluster)
    _set(settings, node_id, Availability.CORDONED, said="cordoned: it gets nothing new, and what it has goes on")
    _tell_next(settings)


@app.command()
def uncordon(node_id: NodeId, data_dir: DataDirOption = None, cluster: ClusterOption = None) -> None:
    """Let a node take instances again, after a cordon or a drain."""
    from stacks.spec import Availability

    settings = read_settings(data_dir=data_dir, cluster=cluster)
    _set(settings, node_id, Availability.ACTIVE, said="active: it takes instances again")
    _tell_next(settings)


@app.command()
def drain(
    node_id: NodeId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Stay until the node is empty.")] = True,
    data_dir: DataDirOption = None,
    cluster: ClusterOption = None,
) -> None:
    """Empty a node: its instances are moved elsewhere one by one, and nothing new comes."""
    from stacks.spec import Availability

    settings = read_settings(data_dir=data_dir, cluster=cluster)
    _set(settings, node_id, Availability.DRAINING, said="draining: its instances are moved elsewhere one by one")
    with _ledger(settings) as ledger:
        if ledger is None:
            typer.echo("There is no ledger yet, so there are no instances either.")
            return
        if not wait:
            _tell_next(settings)
            return
        from api.drain_progress import follow

        follow(ledger, node_id=node_id, heartbeat_s=settings.heartbeat_s)


@app.command()
def remove(
    node_id: NodeId,
    force: Annotated[
        bool, typer.Option("--force", help="The node is gone for good: give up what is on it. Asks first.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    data_dir: DataDirOption = None,
    cluster: ClusterOption = None,
) -> None:
    """Remove an empty node. Dormant instances that slept there stay, and are revived elsewhere."""
    from provisioner.clustertext import remove_node
    from provisioner.leaving import bodies_on

    settings = read_settings(data_dir=data_dir, cluster=cluster)
    with _ledger(settings) as ledger:
        if ledger is None:
            raise LedgerMismatch(
                "There is no ledger, so whether the node is empty is unknown.",
                resolution="Set MACHINEUSE_DATA_DIR to the service's data directory.",
            )
        there = bodies_on(ledger, node_id=node_id)
        named = True
        try:
            _try(settings, lambda text: remove_node(text, node_id))  # refuses the last node, and one that is none
        except NotFound:
            if not there:
                raise
            named = False  # somebody has taken it out of the file, and the service waits for what is there
        if there and not force:
            raise Conflict(
                f"Node {node_id} still has instances: {_count(there)}.",
                resolution=f"Run `machineuse node drain {node_id}` first; or, if the node is gone for good,"
                f" `machineuse node remove {node_id} --force`.",
            )
        if there:
            _give_up(ledger, there, yes=yes)
        sleeping = [record for record in ledger.instances.on_node(node_id) if not record.body]
        away = ledger.nodes.is_offline(node_id)
    if named:
        _edit(settings, lambda text: remove_node(text, node_id))
    typer.echo(f"Node {node_id} is removed.")
    if sleeping:
        typer.echo(
            f"{len(sleeping)} dormant instance(s) slept there; they are revived elsewhere, from the snapshot store."
        )
    if away:
        typer.echo("It does not answer: what it has of this cluster (copies of profiles too) stays on its disk.")
    _tell_next(settings)


# ---- how


def _read(settings: Settings) -> ClusterSpec:
    """Return the cluster as its file says; a look, or a typing error in `--cluster`, must not write a first file."""
    from provisioner.clusterfile import path_of, read_cluster

    path = path_of(settings.project_dir, cluster=settings.cluster)
    if not path.exists():
        raise SettingsError(
            f"There is no {path.name}, so there is no cluster '{settings.cluster}' yet.",
            resolution="Correct --cluster, or begin it with `machineuse serve` or `machineuse node add`.",
        )
    return read_cluster(settings.project_dir, cluster=settings.cluster)


def _edit(settings: Settings, change: Callable[[str], str]) -> ClusterSpec:
    from provisioner.clusteredit import edit_cluster

    return edit_cluster(settings.project_dir, cluster=settings.cluster, change=change)


def _try(settings: Settings, change: Callable[[str], str]) -> ClusterSpec:
    """Return the cluster as an edit would make it, which is not written. Raises what the edit would."""
    from provisioner.clusterfile import parse_cluster, path_of, read_text

    _read(settings)
    path = path_of(settings.project_dir, cluster=settings.cluster)
    return parse_cluster(change(read_text(path)), cluster=settings.cluster, file=path.name)


def _set(settings: Settings, node_id: str, availability: Availability, *, said: str) -> None:
    from provisioner.clustertext import set_availability

    known = _read(settings).node(node_id)
    if known is not None and known.availability is availability:
        typer.echo(f"Node {node_id} is {said} (as before).")
        return
    _edit(settings, lambda text: set_availability(text, node_id, availability))
    typer.echo(f"Node {node_id} is {said}.")


@contextmanager
def _ledger(settings: Settings) -> Iterator[Ledger | None]:
    """Give the cluster's ledger, or None where there is none yet."""
    from provisioner.ledger import Ledger

    try:
        ledger = Ledger.open(settings.ledger_location)
    except LedgerMismatch:
        yield None
        return
    try:
        yield ledger
    finally:
        ledger.close()


def _service_runs(settings: Settings) -> bool:
    from provisioner.leaving import service_runs

    with _ledger(settings) as ledger:
        return ledger is not None and service_runs(ledger, heartbeat_s=settings.heartbeat_s)


def _tell_next(settings: Settings) -> None:
    if _service_runs(settings):
        typer.echo("The service takes it over within seconds.")
    else:
        typer.echo("No service runs: it counts from the next `machineuse serve` or `pulumi up` on.")


def _row(node: NodeSpec, *, seen: NodeRecord | None, records: list[InstanceRecord]) -> list[str]:
    return [
        node.id,
        node.host,
        seen.status.value if seen else "not seen yet",
        node.availability.value,
        _count(record for record in records if record.node_id == node.id),
        ", ".join(f"{key}={value}" for key, value in sorted({**(seen.labels if seen else {}), **node.labels}.items())),
    ]


def _count(records: Any) -> str:
    counts = Counter(record.status.value for record in records)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "none"


def _ask_engine(settings: Settings, spec: ClusterSpec, node: NodeSpec) -> str:
    """Return what a new node's engine says of itself, in one line. Raises DockerError; Conflict for a known one."""
    from provisioner.docker_hosts.hosts import DockerHosts
    from provisioner.docker_hosts.inventory import find_owner

    hosts = DockerHosts(base_dir=settings.project_dir, timeout_s=settings.node_timeout_s)
    try:
        host = hosts.of(node)
        info = host.info()
        with _ledger(settings) as ledger:
            owner = find_owner(host, cluster=spec.name, ledger_id=ledger.id) if ledger else None
    except DockerError as error:  # without its detail: the reason is in the message, and one line is what is read
        resolution = f"{error.resolution or ''} (--unchecked adds it all the same.)".strip()
        raise type(error)(f"Node '{node.id}' is not added: {error.message}", resolution=resolution) from error
    finally:
        hosts.close()
    if owner not in (None, node.id) and spec.node(str(owner)) is not None:
        raise Conflict(
            f"Node '{node.id}' is not added: behind {node.host} is the engine of node '{owner}'.",
            resolution=f"To reach node '{owner}' that way, change its host in the cluster's file.",
        )
    memory_gb = int(info.get("MemTotal") or 0) / 2**30
    return (
        f"Its engine answers: {info.get('Name')}, Docker {info.get('ServerVersion')}, {info.get('NCPU')} CPUs,"
        f" {memory_gb:.0f} GB."
    )


def _refuse_unreachable_ports(host: str, *, bind_ip: str | None) -> None:
    """Refuse a node elsewhere whose ports would be bound to its own loopback, by default, where nobody reaches them."""
    from stacks.spec import machine_in

    name = machine_in(host)
    if bind_ip is None and name not in (None, "localhost", "::1") and not str(name).startswith("127."):
        raise InvalidRequest(
            f"The instances' ports would be bound to 127.0.0.1 on {name}, where nothing reaches them from here.",
            resolution="Give --bind-ip: an address of that node, best one of a private network.",
        )


def _port_range(text: str) -> dict[str, int]:
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit()):
        raise InvalidRequest(f"--ports: '{text}' is no range.", resolution="Write it as 21000-24999.")
    return {"first": int(first), "last": int(last)}


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidRequest(f"--label: '{text}' is no label.", resolution="Write it as zone=cellar.")
    return key, value


def _cloud(instance_id: str | None, zone: str | None) -> dict[str, str] | None:
    if instance_id is None and zone is None:
        return None
    if instance_id is None or zone is None:
        raise InvalidRequest("--cloud-instance-id and --cloud-zone belong together.")
    return {"instance_id": instance_id, "zone": zone}


def _give_up(ledger: Ledger, there: list[InstanceRecord], *, yes: bool) -> None:
    """Give up, once asked, what instances have on a node that is gone for good."""
    from provisioner import lifecycle

    lost = [record.id for record in there if record.last_verified is None]
    kept = [record for record in there if record.last_verified is not None]
    for record in kept:
        assert record.last_verified is not None
        typer.echo(f"{record.id} is kept: it will be dormant, {lifecycle.tell_loss(record.last_verified)}.")
    for instance_id in lost:
        typer.echo(f"{instance_id} is LOST: it has no snapshot.")
    if not yes and not typer.confirm(f"Give up {len(there)} instance(s) on this node, {len(lost)} of them for ever?"):
        raise typer.Exit(1)
    for record in there:
        try:
            ledger.instances.change(record.id, lambda r, _: lifecycle.wish_abandoned(r))
        except NotFound:
            continue  # deleted meanwhile
