"""`machineuse snapshots …`: the keys that snapshots are encrypted with."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from api.options import ClusterOption, DataDirOption, read_settings
from provisioner.errors import SettingsError

if TYPE_CHECKING:
    from provisioner.settings import Settings
    from provisioner.snapshots.keyfile import KeyFile

app = typer.Typer(help="The keys that snapshots are encrypted with.", no_args_is_help=True)


@app.command("new-key")
def new_key(data_dir: DataDirOption = None) -> None:
    """Make the key file, with a first key."""
    settings = read_settings(data_dir=data_dir)
    keys = _key_file(settings)
    typer.echo(f"Key {keys.create().primary_id} is in {keys.path}.")
    typer.echo(_KEEP_A_COPY)
    if settings.snapshot_keys is None:
        typer.echo(f"To use it: export MACHINEUSE_SNAPSHOT_KEYS={shlex.quote(str(keys.path))}")


@app.command("rotate-key")
def rotate_key(data_dir: DataDirOption = None) -> None:
    """Add a key, which new snapshots are encrypted with from now on; the others stay, to read the old ones."""
    keys = _key_file(read_settings(data_dir=data_dir))
    typer.echo(f"New snapshots are encrypted with key {keys.rotate().primary_id} of {keys.path}.")
    typer.echo(_KEEP_A_COPY)


@app.command("drop-key")
def drop_key(
    key_id: Annotated[int, typer.Argument(help="As `machineuse snapshots keys` shows it.")],
    force: Annotated[bool, typer.Option("--force", help="Though snapshots are encrypted with it.")] = False,
    data_dir: DataDirOption = None,
    cluster: ClusterOption = None,
) -> None:
    """Remove a key from the file: no snapshot that is encrypted with it can be read any more."""
    settings = read_settings(data_dir=data_dir, cluster=cluster)
    keys = _key_file(settings)
    users = [] if force else _encrypted_with(settings, key_id)
    if users:
        raise SettingsError(
            f"Key {key_id} is still needed for {len(users)} snapshot(s), {users[0]} among them.",
            resolution="A snapshot is taken anew when its instance goes dormant again; --force gives it up.",
        )
    keys.drop(key_id)
    typer.echo(f"Key {key_id} is no longer in {keys.path}.")


@app.command("keys")
def list_keys(data_dir: DataDirOption = None) -> None:
    """List the ids of the keys in the file, oldest first, and which one is in use."""
    keyset = _key_file(read_settings(data_dir=data_dir)).load()
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
    from provisioner.ledger.records import SnapshotState
    from provisioner.snapshots.location import open_store

    ledger, store = Ledger.open(settings.ledger_location), open_store(settings)
    try:
        records = ledger.instances.all()
        # Before the store is looked at: what is complete by then is found there.
        taking = [each.id for each in records for one in each.snapshots if one.state is SnapshotState.PENDING]
        if taking:
            raise SettingsError(
                f"A snapshot of {taking[0]} is being taken, maybe with key {key_id}.",
                resolution="Try again once it is taken.",
            )
        manifests = [manifest for record in records for manifest in store.list(record.id)]
    finally:
        ledger.close()
    return [str(each.id) for each in manifests if each.encryption and each.encryption.key_id == key_id]
