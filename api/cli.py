"""The command `machineuse`. Each command imports what it needs itself, so that none waits for the others' parts."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provisioner.errors import MachineuseError, SettingsError

if TYPE_CHECKING:
    from provisioner.settings import Settings
    from provisioner.snapshots.keyfile import KeyFile

app = typer.Typer(
    name="machineuse",
    help="Browsers on demand on machines you own, each one a Pulumi resource.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where everything is kept [default: .machineuse in the checkout].")
]
Cluster = Annotated[str | None, typer.Option("--cluster", help="Which Pulumi.<cluster>.yaml [default: local].")]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to serve on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on; 0 takes a free one [default: 8000].")] = None,
    data_dir: DataDir = None,
    cluster: Cluster = None,
) -> None:
    """Serve the REST API and keep the cluster as it is wanted."""
    settings = _read_settings(host=host, port=port, data_dir=data_dir, cluster=cluster)
    from api.serve import serve as run

    run(settings)


@app.command()
def setup(tests: Annotated[bool, typer.Option(help="Also what the tests need.")] = False) -> None:
    """Set up what this machine lacks; does nothing where all is there."""
    from provisioner.toolchain.__main__ import main as run

    raise typer.Exit(run(["setup", "--tests"] if tests else ["setup"]))


@app.command()
def env(data_dir: DataDir = None, cluster: Cluster = None) -> None:
    """Print what makes a plain `pulumi` work on the cluster: eval "$(machineuse env)"."""
    for name, value in _pulumi_environment(_read_settings(data_dir=data_dir, cluster=cluster)).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def pulumi(context: typer.Context) -> None:
    """Run the Pulumi CLI on the cluster: `machineuse pulumi preview`."""
    from provisioner.toolchain import require_pulumi

    settings = _read_settings()
    environment = os.environ | _pulumi_environment(settings)
    os.chdir(settings.project_dir)
    cli = str(require_pulumi())
    os.execve(cli, [cli, *context.args], environment)


@app.command()
def instances(data_dir: DataDir = None, cluster: Cluster = None) -> None:
    """List the instances that the ledger knows, whether the service runs or not."""
    from rich.console import Console
    from rich.table import Table

    from provisioner.ledger import Ledger

    settings = _read_settings(data_dir=data_dir, cluster=cluster)
    ledger = Ledger.open(settings.ledger_path)
    try:
        records = ledger.instances.all()
    finally:
        ledger.close()
    table = Table(box=None, pad_edge=False)
    for column in ("id", "status", "node", "debug port", "stream port"):
        table.add_column(column, no_wrap=True)
    for column in ("image", "under way", "error"):
        table.add_column(column, overflow="fold")
    for record in records:
        ports = ("" if port is None else str(port) for port in (record.debug_port, record.stream_port))
        table.add_row(
            record.id,
            record.status.value,
            record.node_id,
            *ports,
            record.image_requested,
            record.operation or "",
            record.error_message or "",
        )
    Console().print(table)


snapshots = typer.Typer(help="The keys that snapshots are encrypted with.", no_args_is_help=True)
app.add_typer(snapshots, name="snapshots")


@snapshots.command("new-key")
def new_key(data_dir: DataDir = None) -> None:
    """Make the key file, with a first key."""
    settings = _read_settings(data_dir=data_dir)
    keys = _key_file(settings)
    typer.echo(f"Key {keys.create().primary_id} is in {keys.path}.")
    typer.echo(_KEEP_A_COPY)
    if settings.snapshot_keys is None:
        typer.echo(f"To use it: export MACHINEUSE_SNAPSHOT_KEYS={shlex.quote(str(keys.path))}")


@snapshots.command("rotate-key")
def rotate_key(data_dir: DataDir = None) -> None:
    """Add a key, which new snapshots are encrypted with from now on; the others stay, to read the old ones."""
    keys = _key_file(_read_settings(data_dir=data_dir))
    typer.echo(f"New snapshots are encrypted with key {keys.rotate().primary_id} of {keys.path}.")
    typer.echo(_KEEP_A_COPY)


@snapshots.command("drop-key")
def drop_key(
    key_id: Annotated[int, typer.Argument(help="As `machineuse snapshots keys` shows it.")],
    force: Annotated[bool, typer.Option("--force", help="Though snapshots are encrypted with it.")] = False,
    data_dir: DataDir = None,
    cluster: Cluster = None,
) -> None:
    """Remove a key from the file: no snapshot that is encrypted with it can be read any more."""
    settings = _read_settings(data_dir=data_dir, cluster=cluster)
    keys = _key_file(settings)
    users = [] if force else _encrypted_with(settings, key_id)
    if users:
        raise SettingsError(
            f"Key {key_id} is still needed for {len(users)} snapshots, {users[0]} among them.",
            resolution="A snapshot is taken anew when its instance goes dormant again; --force gives it up.",
        )
    keys.drop(key_id)
    typer.echo(f"Key {key_id} is no longer in {keys.path}.")


@snapshots.command("keys")
def list_keys(data_dir: DataDir = None) -> None:
    """List the ids of the keys in the file, oldest first, and which one is in use."""
    keyset = _key_file(_read_settings(data_dir=data_dir)).load()
    for key_id in keyset.ids:
        typer.echo(f"{key_id}{' (encrypts new snapshots)' if key_id == keyset.primary_id else ''}")


_KEEP_A_COPY = (
    "Keep a copy of this file, not where the snapshots are: whoever has it can read them, and without it they are lost."
)


def _key_file(settings: Settings) -> KeyFile:
    from provisioner.snapshots.location import find_key_file

    return find_key_file(settings)


def _encrypted_with(settings: Settings, key_id: int) -> list[str]:
    from provisioner.ledger import Ledger
    from provisioner.snapshots.location import open_store

    ledger, store = Ledger.open(settings.ledger_path), open_store(settings)
    try:
        manifests = [manifest for record in ledger.instances.all() for manifest in store.list(record.id)]
    finally:
        ledger.close()
    return [str(each.id) for each in manifests if each.encryption and each.encryption.key_id == key_id]


def main() -> None:
    """Run the command; what we raise on purpose becomes one message, without a stack trace."""
    try:
        app()
    except MachineuseError as error:
        detail = f"\n{error.detail}" if error.detail else ""
        print(f"machineuse: {error.explain()}{detail}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _read_settings(**given: Any) -> Settings:
    """Build the settings from the environment and the given options."""
    from pydantic import ValidationError
    from pydantic_settings.exceptions import SettingsError as Unreadable

    from provisioner.settings import Settings

    options = {name: value for name, value in given.items() if value is not None}
    if "data_dir" in options:
        options["data_dir"] = options["data_dir"].expanduser().absolute()  # a shell's path, not the checkout's
    try:
        return Settings(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        name = "_".join(str(part) for part in problem["loc"]).upper()
        raise SettingsError(f"MACHINEUSE_{name}: {problem['msg']}.") from error
    except Unreadable as error:
        raise SettingsError(
            f"A setting can't be read: {error}.",
            resolution="""Lists are written as JSON: MACHINEUSE_TOKENS='["<a long secret>"]'.""",
        ) from error


def _pulumi_environment(settings: Settings) -> dict[str, str]:
    from provisioner.toolchain import environment

    return environment(settings) | {"PULUMI_STACK": settings.cluster, "MACHINEUSE_CLUSTER": settings.cluster}
