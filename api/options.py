"""What the commands of `machineuse` have in common: which cluster, and where it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provisioner.errors import SettingsError

if TYPE_CHECKING:
    from provisioner.settings import Settings

DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Where everything is kept (default: .machineuse in the checkout).")
]
ClusterOption = Annotated[str | None, typer.Option("--cluster", help="Which Pulumi.<cluster>.yaml (default: local).")]


def read_settings(**given: Any) -> Settings:
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
