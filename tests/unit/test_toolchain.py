"""The set-up's decisions, with stand-ins for what it would download, build and start."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from provisioner.errors import SetupError
from provisioner.settings import Settings
from provisioner.toolchain import docker_engine, language, packages, pulumi_cli, test_tools, venv
from provisioner.toolchain.environment import environment
from provisioner.toolchain.progress import Reporter, Step

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it: its own cache, PATH and virtual environment, all below the directory returned."""
    for name in ("bin", "cache", "venv"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    return tmp_path


@pytest.fixture
def printed() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def step(printed: io.StringIO) -> Step:
    return Step("a step", write=lambda line: print(line, file=printed))


def put_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def put_cached_cli(machine: Path) -> Path:
    return put_script(machine / f"cache/machineuse/pulumi-{pulumi_cli.PULUMI_VERSION}/bin/pulumi", "echo v3.256.0")


class TestFindingPulumi:
    @pytest.mark.usefixtures("machine")
    def test_finds_none_on_an_empty_machine(self) -> None:
        assert pulumi_cli.find_pulumi() is None
        with pytest.raises(SetupError, match="not on this machine"):
            pulumi_cli.require_pulumi()

    @pytest.mark.parametrize("version", ["v3.256.0", "3.256.1", "v3.301.0"])
    def test_takes_one_on_path_that_is_new_enough(self, machine: Path, version: str) -> None:
        put_cached_cli(machine)
        cli = put_script(machine / "bin/pulumi", f"echo {version}")
        assert pulumi_cli.find_pulumi() == cli

    @pytest.mark.parametrize("body", ["echo v3.255.9", "echo v4.0.0", "echo", "exit 1"])
    def test_passes_over_one_on_path_that_will_not_do(self, machine: Path, body: str) -> None:
        put_script(machine / "bin/pulumi", body)
        assert pulumi_cli.find_pulumi() is None
        cached = put_cached_cli(machine)
        assert pulumi_cli.find_pulumi() == cached


class TestGettingPulumi:
    def test_builds_with_go_what_cannot_be_downloaded(
        self, machine: Path, step: Step, printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pulumi_cli, "_download", lambda _step: "no way out")
        put_script(
            machine / "bin/go",
            'while [ "$1" != -o ]; do shift; done\n'
            'mkdir -p "$(dirname "$2")"; printf "#!/bin/sh\\necho v3.256.0\\n" > "$2"; chmod +x "$2"',
        )
        (machine / "toolchain").mkdir()
        cli = pulumi_cli.provide_pulumi(step, project_dir=machine)
        assert cli == machine / "cache/machineuse/pulumi-3.256.0/bin/pulumi"
        assert "no way out" in printed.getvalue()
        assert pulumi_cli.provide_pulumi(step, project_dir=Path("/nowhere")) == cli

    def test_a_failed_build_leaves_nothing_behind_and_shows_what_go_said(
        self, machine: Path, step: Step, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pulumi_cli, "_download", lambda _step: "no way out")
        put_script(machine / "bin/go", "echo verifying module: checksum mismatch; exit 1")
        (machine / "toolchain").mkdir()
        with pytest.raises(SetupError) as caught:
            pulumi_cli.provide_pulumi(step, project_dir=machine)
        assert "checksum mismatch" in (caught.value.detail or "")
        assert [path.name for path in (machine / "cache/machineuse").iterdir()] == ["pulumi-3.256.0.lock"]

    def test_says_what_to_install_where_there_is_no_way_at_all(
        self, machine: Path, step: Step, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pulumi_cli, "_download", lambda _step: "no way out")
        monkeypatch.setenv("PATH", str(machine / "bin"))
        with pytest.raises(SetupError) as caught:
            pulumi_cli.provide_pulumi(step, project_dir=machine)
        assert "Install Pulumi 3.256.0" in (caught.value.resolution or "")

    def test_the_go_module_pins_the_same_version(self) -> None:
        pinned = re.findall(r"github.com/pulumi/pulumi/\w+/v3 v(\S+)", (CHECKOUT / "toolchain/go.mod").read_text())
        assert set(pinned) == {pulumi_cli.PULUMI_VERSION}


class TestEnvironment:
    def test_puts_the_cli_and_our_language_host_on_path_where_the_official_one_is_missing(
        self, machine: Path, tmp_path: Path
    ) -> None:
        cli = put_cached_cli(machine)
        given = environment(Settings(data_dir=tmp_path / "data"))
        first = Path(given["PATH"].split(":")[0])
        assert first == machine / "venv/libexec/machineuse"
        assert sys.executable in (first / "pulumi-language-python").read_text()
        assert (first / "pulumi").samefile(cli)
        assert given["PULUMI_BACKEND_URL"] == f"file://{tmp_path}/data/state"
        assert given["MACHINEUSE_DATA_DIR"] == f"{tmp_path}/data"

    def test_hands_on_where_everything_is_kept(self, machine: Path, tmp_path: Path) -> None:
        put_cached_cli(machine)
        kept = {"ledger": "postgresql://u:p@h/d", "state": "postgres://u:p@h/s", "passphrase_file": tmp_path / "shared"}
        given = environment(Settings(data_dir=tmp_path / "data", **kept))
        assert given["MACHINEUSE_LEDGER"] == "postgresql://u:p@h/d"
        assert given["PULUMI_BACKEND_URL"] == "postgres://u:p@h/s"
        assert given["PULUMI_CONFIG_PASSPHRASE_FILE"] == str(tmp_path / "shared")
        given = environment(Settings(data_dir=tmp_path / "data", secrets_provider="awskms://x"))
        assert not {"MACHINEUSE_LEDGER", "PULUMI_CONFIG_PASSPHRASE_FILE"} & given.keys()

    def test_leaves_the_official_language_host_alone(self, machine: Path, tmp_path: Path) -> None:
        cli = put_cached_cli(machine)
        put_script(cli.parent / "pulumi-language-python", "echo official")
        given = environment(Settings(data_dir=tmp_path / "data"))
        assert given["PATH"].split(":")[0] == str(cli.parent)
        assert not (machine / "venv/libexec").exists()

    def test_leaves_a_path_alone_that_has_all_it_takes(self, machine: Path, tmp_path: Path) -> None:
        put_script(machine / "bin/pulumi", "echo v3.300.0")
        put_script(machine / "bin/pulumi-language-python", "echo official")
        assert environment(Settings(data_dir=tmp_path))["PATH"] == os.environ["PATH"]

    def test_is_the_same_inside_itself(self, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        put_cached_cli(machine)
        once = environment(Settings(data_dir=tmp_path))
        for name, value in once.items():
            monkeypatch.setenv(name, value)
        assert environment(Settings(data_dir=tmp_path)) == once

    def test_does_not_take_another_checkouts_launcher_for_the_official_one(self, machine: Path) -> None:
        cli = put_cached_cli(machine)
        put_script(machine / "bin/pulumi-language-python", "exec /elsewhere/python -P -m provisioner.language_host")
        assert language.find_official_language_host(cli) is None


class TestRunningCommands:
    def test_shows_the_end_of_what_a_failed_command_printed(self, step: Step) -> None:
        with pytest.raises(SetupError, match="counting failed with exit code 3") as caught:
            step.run(["sh", "-c", "seq 1 100; exit 3"], what="counting", timeout_s=30)
        assert (caught.value.detail or "").splitlines()[-1] == "100"
        assert len((caught.value.detail or "").splitlines()) == 40

    def test_ends_a_command_and_its_children_when_time_is_up(self, step: Step) -> None:
        with pytest.raises(SetupError, match="took longer"):
            step.run(["sh", "-c", "sleep 600 & sleep 600"], what="sleeping", timeout_s=0.2)

    def test_says_so_when_a_command_is_not_there(self, step: Step) -> None:
        with pytest.raises(SetupError, match="could not be started"):
            step.run(["/nowhere/command"], what="nothing", timeout_s=1)

    def test_counts_lines_where_asked(self, step: Step) -> None:
        step.run(["seq", "1", "7"], what="building", timeout_s=30, count="packages")
        assert step.last_line == "building: 7 packages, 7"


class TestReporter:
    def test_prints_a_line_for_every_step_with_its_time(self, printed: io.StringIO) -> None:
        reporter = Reporter(printed)
        with reporter.step("Thing") as step:
            step.outcome = "found"
        assert re.fullmatch(r"✓ Thing: found \(\d+\.\d s\)\n", printed.getvalue())
        assert [result.outcome for result in reporter.results] == ["found"]

    def test_marks_the_step_that_failed(self, printed: io.StringIO) -> None:
        with pytest.raises(SetupError), Reporter(printed).step("Thing"):
            raise SetupError("no")
        assert printed.getvalue().startswith("✗ Thing: failed")

    def test_gives_signs_of_life_where_there_is_no_terminal(
        self, printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("provisioner.toolchain.progress._LINE_EVERY_S", 0.01)
        with Reporter(printed).step("Thing") as step:
            step.run(
                ["sh", "-c", "echo working; while ! [ -e /proc/$PPID/nowhere ]; do sleep 0.1; break; done"],
                what="work",
                timeout_s=30,
            )
        assert "  … Thing 0:00  working" in printed.getvalue()


class TestPackages:
    def test_says_the_exact_command_where_we_may_not_install(self, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(packages, "_is_debian", lambda: True)
        with pytest.raises(SetupError) as caught:
            packages.install_packages(step, ["docker.io"], reason="a Docker engine")
        assert caught.value.resolution == (
            "Run: sudo apt-get update && sudo apt-get install -y --no-install-recommends docker.io"
        )


class TestPostgresql:
    def test_is_there_after_the_set_up_and_is_not_got_twice(self) -> None:
        lines: list[str] = []
        step = Step("PostgreSQL server for tests", write=lines.append)
        test_tools.provide_postgresql(step)
        assert lines == []
        assert os.access(test_tools.postgresql_programs() / "initdb", os.X_OK)

    def test_says_the_exact_command_where_we_may_not_install(self, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
        def find_none() -> Path:
            raise SetupError("none")

        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(packages, "_is_debian", lambda: True)
        monkeypatch.setattr(test_tools, "postgresql_programs", find_none)
        with pytest.raises(SetupError) as caught:
            test_tools.provide_postgresql(step)
        assert "--no-install-recommends postgresql" in (caught.value.resolution or "")


class TestDockerEngine:
    def test_does_not_install_an_engine_without_being_root(
        self, machine: Path, step: Step, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("DOCKER_HOST", raising=False)
        monkeypatch.setattr(docker_engine, "DEFAULT_SOCKET", machine / "docker.sock")
        monkeypatch.setattr(docker_engine, "_which", lambda _name: None)
        monkeypatch.setattr(Path, "home", lambda: machine)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(SetupError, match="No Docker engine answers") as caught:
            docker_engine.provide_docker_engine(step)
        assert "docker.io" in (caught.value.resolution or "") or "Docker Desktop" in (caught.value.resolution or "")

    def test_says_which_engine_does_not_answer(
        self, machine: Path, step: Step, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{machine}/none.sock")
        with pytest.raises(SetupError, match=r"none\.sock"):
            docker_engine.provide_docker_engine(step)

    def test_removes_the_pid_file_of_an_engine_that_is_gone(self, tmp_path: Path) -> None:
        for content in (str(os.getpid()), "4194999", "rubbish"):
            (tmp_path / "docker.pid").write_text(content)
            docker_engine._remove_stale_pid_file(tmp_path / "docker.pid", of="dockerd")
            assert not (tmp_path / "docker.pid").exists()

    def test_keeps_the_pid_file_of_one_that_runs(self, tmp_path: Path) -> None:
        name = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
        (tmp_path / "docker.pid").write_text(str(os.getpid()))
        docker_engine._remove_stale_pid_file(tmp_path / "docker.pid", of=name)
        assert (tmp_path / "docker.pid").exists()

    def test_removes_only_a_socket_that_nobody_listens_on(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            docker_engine._remove_dead_socket(path)
            assert path.exists()
        docker_engine._remove_dead_socket(path)
        assert not path.exists()


class TestVirtualEnvironment:
    def test_is_current_until_the_lock_or_the_project_changes(self, tmp_path: Path) -> None:
        for name in (venv.LOCK, "pyproject.toml", ".venv/pyvenv.cfg", ".venv/bin/python"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        assert not venv.is_current(tmp_path)
        venv._stamp(tmp_path).write_text(venv._fingerprint(tmp_path))
        assert venv.is_current(tmp_path)
        (tmp_path / venv.LOCK).write_text("something newer")
        assert not venv.is_current(tmp_path)

    def test_the_set_up_needs_nothing_but_the_standard_library(self) -> None:
        code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); import provisioner.toolchain.__main__"
        subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd="/")

    def test_the_lock_has_every_dependency_with_hashes_and_names_no_index(self) -> None:
        lock = (CHECKOUT / venv.LOCK).read_text()
        locked = {line.split("==")[0].split("[")[0] for line in lock.splitlines() if re.match(r"[a-z0-9]", line)}
        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
        wanted = [
            *project["project"]["dependencies"],
            *project["project"]["optional-dependencies"]["dev"],
            *project["build-system"]["requires"],
        ]
        names = {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
        assert names <= locked
        assert lock.count("==") <= lock.count("--hash=sha256:")
        assert "://" not in lock
