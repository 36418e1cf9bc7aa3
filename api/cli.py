"""The command `machineuse`. Each command imports what it needs itself, so that none waits for the others' parts."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from api.logs import quiet_logs
from api.node_cli import app as nodes
from api.options import ClusterOption, DataDirOption, read_settings
from api.snapshot_cli import app as snapshots
from api.tables import show_table
from provisioner.errors import MachineuseError

if TYPE_CHECKING:
    from provisioner.ledger.records import InstanceRecord
    from provisioner.settings import Settings

app = typer.Typer(
    name="machineuse",
    help="Browsers on demand on machines you own, each one a Pulumi resource.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(nodes, name="node")
app.add_typer(snapshots, name="snapshots")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to serve on (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on; 0 takes a free one (default: 8000).")] = None,
    data_dir: DataDirOption = None,
    cluster: ClusterOption = None,
) -> None:
    """Serve the REST API and keep the cluster as it is wanted."""
    settings = read_settings(host=host, port=port, data_dir=data_dir, cluster=cluster)
    from api.serve import serve as run

    run(settings)


@app.command()
def setup(tests: Annotated[bool, typer.Option(help="Also what the tests need.")] = False) -> None:
    """Set up what this machine lacks; does nothing where all is there."""
    from provisioner.toolchain.__main__ import main as run

    raise typer.Exit(run(["setup", "--tests"] if tests else ["setup"]))


@app.command()
def env(data_dir: DataDirOption = None, cluster: ClusterOption = None) -> None:
    """Print what makes a plain `pulumi` work on the cluster, with the passwords it takes: eval "$(machineuse env)"."""
    for name, value in _pulumi_environment(read_settings(data_dir=data_dir, cluster=cluster)).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def pulumi(context: typer.Context) -> None:
    """Run the Pulumi CLI on the cluster: `machineuse pulumi preview`."""
    from provisioner.toolchain import require_pulumi

    settings = read_settings()
    environment = os.environ | _pulumi_environment(settings)
    os.chdir(settings.project_dir)
    cli = str(require_pulumi())
    os.execve(cli, [cli, *context.args], environment)


@app.command()
def instances(data_dir: DataDirOption = None, cluster: ClusterOption = None) -> None:
    """List the instances that the ledger knows, whether the service runs or not."""
    from provisioner.leaving import is_away, service_runs
    from provisioner.ledger import Ledger

    settings = read_settings(data_dir=data_dir, cluster=cluster)
    ledger = Ledger.open(settings.ledger_location)
    try:
        records = ledger.instances.all()
        away = {node.id for node in ledger.nodes.list() if is_away(node)}
        served = service_runs(ledger, heartbeat_s=settings.heartbeat_s)
    finally:
        ledger.close()
    columns = ("id", "status", "node", "debug port", "stream port", "image", "under way")
    rows = [_row(record, away=record.node_id in away) for record in records]
    show_table(columns, rows, folding=("image", "under way"))
    for record in records:  # below the table: each is one line, however wide the terminal is
        if record.error_message:
            typer.echo(f"{record.id}: {record.error_message}")
    if records and not served:
        typer.echo("No service runs: the status is as it was last seen.")


def main() -> None:
    """Run the command; what we raise on purpose becomes one message, without a stack trace."""
    quiet_logs()
    try:
        app()
    except MachineuseError as error:
        detail = f"\n{error.detail}" if error.detail else ""
        print(f"machineuse: {error.explain()}{detail}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _row(record: InstanceRecord, *, away: bool) -> list[str]:
    node = f"{record.node_id} (offline)" if away and record.body else record.node_id
    ports = ["" if port is None else str(port) for port in (record.debug_port, record.stream_port)]
    shown = [record.id, record.status.value, node, *ports]
    return [*shown, record.image_requested, record.operation or ""]


def _pulumi_environment(settings: Settings) -> dict[str, str]:
    from provisioner.toolchain import environment

    return environment(settings) | {"PULUMI_STACK": settings.cluster, "MACHINEUSE_CLUSTER": settings.cluster}
