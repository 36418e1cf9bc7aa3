"""The environment in which a plain `pulumi preview` in the checkout works; the service's own engine uses it too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from provisioner.toolchain.language import provide_language_host
from provisioner.toolchain.pulumi_cli import require_pulumi

if TYPE_CHECKING:
    from provisioner.settings import Settings

_LOG_LIMIT_MIB = 50


def environment(settings: Settings) -> dict[str, str]:
    """Return what must be added to the process's environment for the Pulumi CLI to work on this data directory.

    Idempotent and fast; makes nothing in the data directory. PATH is the process's own with the CLI and, only where the
    official one is missing, our Python language host put in front. Raises SetupError where there is no Pulumi CLI.
    """
    cli = require_pulumi()
    return {
        "PATH": _path_with(cli),
        "PULUMI_HOME": str(settings.pulumi_home),
        "PULUMI_BACKEND_URL": settings.state_url,
        **({"PULUMI_CONFIG_PASSPHRASE_FILE": str(settings.passphrase_path)} if settings.needs_passphrase else {}),
        # Both packages of the program are served by plugins of the project. Without this the engine asks the internet
        # for their newest versions, at 0.8 s an update. Somebody who wants the official plugin sets it to false.
        "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": os.environ.get(
            "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION", "true"
        ),
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PULUMI_DIY_BACKEND_DISABLE_CHECKPOINT_BACKUPS": "true",
        "PULUMI_LOG_ROTATION_MAX_TOTAL_MB": str(_LOG_LIMIT_MIB),
        "MACHINEUSE_DATA_DIR": str(settings.data_dir),
        **({"MACHINEUSE_LEDGER": settings.ledger_text} if settings.ledger else {}),
    }


def _path_with(cli: Path) -> str:
    path = os.environ.get("PATH", os.defpath)
    launcher = provide_language_host(cli)
    in_front: list[str] = []
    if launcher is not None:
        in_front.append(str(launcher.parent))
    found = shutil.which("pulumi", path=os.pathsep.join([*in_front, path]))
    if found is None or not Path(found).samefile(cli):
        in_front.append(str(cli.parent))
    rest = [directory for directory in path.split(os.pathsep) if directory not in in_front]
    return os.pathsep.join([*in_front, *rest])
