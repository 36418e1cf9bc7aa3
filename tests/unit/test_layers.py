"""The rules about who may import what. Each library that reaches outside the process has one door."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted(
    path
    for package in ("api", "provisioner", "stacks")
    for path in (ROOT / package).rglob("*.py")
    if "__pycache__" not in path.parts
)

DOORS = {
    "docker": ["provisioner.docker_hosts"],
    "requests": ["provisioner.docker_hosts"],
    "urllib3": ["provisioner.docker_hosts"],
    "boto3": ["provisioner.object_storage", "provisioner.kms", "provisioner.volumes.ec2"],
    "botocore": [
        "provisioner.aws_credentials",
        "provisioner.object_storage",
        "provisioner.kms",
        "provisioner.volumes.ec2",
    ],
    "types_boto3_s3": ["provisioner.object_storage"],
    "types_boto3_kms": ["provisioner.kms"],
    "types_boto3_ec2": ["provisioner.volumes.ec2"],
    "tink": ["provisioner.snapshots.keyset"],
    "zstandard": ["provisioner.snapshots.tars"],
    "pulumi": [
        "stacks",
        "provisioner.engine",
        "provisioner.language_host",
        "provisioner.plugins",
        "provisioner.toolchain.official_cli",
    ],
    "pulumi.automation": [
        "provisioner.engine",
        "provisioner.language_host",
        "provisioner.toolchain.official_cli",  # the SDK's own download of the CLI
    ],
    "semver": ["provisioner.toolchain.official_cli"],
    "pulumi_docker": ["stacks"],
    "grpc": ["provisioner.engine", "provisioner.language_host", "provisioner.plugins"],
    "google": ["provisioner.language_host", "provisioner.plugins"],
    "sqlalchemy": ["provisioner.ledger"],
    "alembic": ["provisioner.ledger"],
    "psycopg": ["provisioner.ledger"],
    "sqlite3": ["provisioner.ledger"],
    "fastapi": ["api"],
    "starlette": ["api"],
    "anyio": ["api"],
    "uvicorn": ["api"],
    "typer": ["api"],
    "rich": ["api", "provisioner.toolchain.progress"],
    "prometheus_client": ["api.routers.metrics"],
    "httpx": ["provisioner.browser_status"],
    "psutil": ["api.ports", "provisioner.machine", "provisioner.stack_locks"],
    "pydantic_settings": ["api.options", "provisioner.settings"],
    "ruamel": ["provisioner.clusterfile", "provisioner.clustertext"],
}
"""Library → the modules or packages that may import it."""

EVERYWHERE = {"pydantic", "structlog", "api", "provisioner", "stacks", *sys.stdlib_module_names}
"""What needs no door."""

THE_PROGRAM_IMPORTS = {"pulumi", "pulumi_docker", "pydantic", "stacks"}
"""What stacks/ may import besides the standard library, so that a Pulumi user can read it."""

AGENT = ROOT / "images" / "browser" / "machineuse_agent"
SQL = ("SELECT ", "INSERT ", "UPDATE ", "DELETE ", "WITH ", "CREATE ", "ALTER ", "DROP ", "TRUNCATE ", "PRAGMA ")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Give every module that a file imports, wherever in the file; `from a import b` gives a.b too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_layers_point_one_way() -> None:
    assert lint_imports(str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_library_is_imported_by_its_door_only(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path):
        for library, doors in DOORS.items():
            if is_in(imported, library):
                assert any(is_in(module, door) for door in doors), f"{module} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_library_comes_in_without_a_door(path: Path) -> None:
    without = {imported for imported in imports_of(path) if imported.partition(".")[0] not in EVERYWHERE}
    assert not {imported for imported in without if not any(is_in(imported, library) for library in DOORS)}


def test_an_import_is_seen_wherever_it_stands_and_told_from_another(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    for line in ("import docker.tls as tls", "from docker import errors", "from pulumi import automation"):
        path.write_text(f"def use() -> None:\n    {line}\n")
        assert any(
            is_in(imported, library) for imported in imports_of(path) for library in ("docker", "pulumi.automation")
        )
    path.write_text("import pulumi\nimport pulumi_docker\nfrom docker_hosts import docker\n")
    assert not any(
        is_in(imported, library) for imported in imports_of(path) for library in ("docker", "pulumi.automation")
    )


@pytest.mark.parametrize("path", sorted(AGENT.glob("*.py")), ids=lambda path: path.stem)
def test_the_agent_needs_nothing_but_the_image_s_own_python(path: Path) -> None:
    allowed = {AGENT.name, *sys.stdlib_module_names}
    assert not {imported for imported in imports_of(path) if imported.partition(".")[0] not in allowed}


@pytest.mark.parametrize("path", [p for p in SOURCES if name_of(p).startswith("stacks")], ids=name_of)
def test_the_program_imports_pulumi_and_pydantic_only(path: Path) -> None:
    allowed = THE_PROGRAM_IMPORTS | sys.stdlib_module_names
    if name_of(path) == "stacks.__main__":
        allowed |= {"provisioner"}
    foreign = {imported for imported in imports_of(path) if imported.partition(".")[0] not in allowed}
    assert not foreign


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sql_is_written_in_the_ledger_only(path: Path) -> None:
    if is_in(name_of(path), "provisioner.ledger"):
        return
    texts = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    assert not [text for text in texts if isinstance(text, str) and text.lstrip().startswith(SQL)]
