"""The set-up's parts for real: the plain Pulumi CLI on our language host, and Docker engines found and started."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.errors import SetupError
from provisioner.settings import Settings
from provisioner.toolchain import docker_engine, pulumi_cli
from provisioner.toolchain.environment import environment
from provisioner.toolchain.language import launcher_dir, provide_language_host
from provisioner.toolchain.progress import Step
from provisioner.toolchain.pulumi_cli import provide_pulumi, require_pulumi
from tests.support.watched import wait_until

PROGRAM = """
import pulumi
from lib import GREETING

class Thing(pulumi.ComponentResource):
    def __init__(self, name):
        super().__init__("tests:index:Thing", name)
        self.register_outputs({})

Thing("one")
pulumi.export("greeting", GREETING)
"""


class PlainProject:
    """A Pulumi project of its own and the plain CLI, as an operator's shell would run it."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self.directory = directory
        self.env = env

    def write(self, program: str) -> None:
        (self.directory / "src/__main__.py").write_text(program)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["pulumi", *arguments, "--non-interactive", "--color", "never"],
            cwd=self.directory,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed


@pytest.fixture
def project(tmp_path: Path) -> PlainProject:
    settings = Settings(data_dir=tmp_path / "data", project_dir=tmp_path)
    settings.state_dir.mkdir(parents=True)
    settings.passphrase_path.write_text("secret")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/lib.py").write_text('GREETING = "hello"\n\ndef fail():\n    return {}["missing"]\n')
    (tmp_path / "Pulumi.yaml").write_text("name: tiny\nruntime: python\nmain: src/\n")
    env = {**os.environ, **environment(settings)}
    # Ours is what is tested, also on a machine that has the official one.
    provide_language_host_even_if_official_is_there(env)
    made = PlainProject(tmp_path, env)
    made.write(PROGRAM)
    assert made.run("stack", "init", "dev")[0] == 0
    return made


def provide_language_host_even_if_official_is_there(env: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as empty:
        patch.setenv("PATH", empty)
        lone = Path(empty, "pulumi")
        try:
            os.link(require_pulumi_on(env), lone)
        except OSError:
            shutil.copy2(require_pulumi_on(env), lone)
        launcher = provide_language_host(lone)
    assert launcher is not None
    env["PATH"] = f"{launcher.parent}:{env['PATH']}"


def require_pulumi_on(env: dict[str, str]) -> str:
    found = shutil.which("pulumi", path=env["PATH"])
    assert found is not None
    return found


class SecondEngine:
    """Where another `dockerd` than the machine's own can run beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "docker.sock"
        self.pid_file = directory / "docker.pid"
        self.started: list[int] = []

    def start(self, *more: str) -> int:
        name = f"machineuse-test-{secrets.token_hex(4)}"
        pid = docker_engine.start_engine(
            socket_path=self.socket,
            log=self.directory / "log",
            pid_file=self.pid_file,
            arguments=[
                *(f"--host=unix://{self.socket}", f"--pidfile={self.pid_file}"),
                *(f"--data-root={self.directory}/data", f"--exec-root={self.directory}/exec"),
                *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false"),
                *(f"--containerd-namespace={name}", f"--containerd-plugins-namespace={name}-plugins"),
                *more,
            ],
        )
        self.started.append(pid)
        return pid


@pytest.fixture
def second_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondEngine]:
    """Another engine, in a network namespace of its own.

    Without one it would change the machine's network: a `dockerd` without a bridge removes the `docker0` that the
    machine's own engine uses.
    """
    real = docker_engine._which("dockerd")
    # Not pytest's directory: a Unix socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="mu-", ignore_cleanup_errors=True) as directory:
        wrapper = Path(directory, "bin/dockerd")
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec unshare --net {real} "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        engine = SecondEngine(Path(directory))
        yield engine
        for pid in engine.started:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


class TestLanguageHost:
    def test_plain_up_and_preview_work(self, project: PlainProject) -> None:
        code, printed = project.run("up", "--yes")
        assert code == 0, printed
        assert 'greeting: "hello"' in printed
        code, printed = project.run("preview", "--expect-no-changes")
        assert code == 0, printed
        assert "tests:index:Thing::one" in project.run("stack", "--show-urns")[1]

    def test_runs_the_project_s_own_interpreter(self, project: PlainProject) -> None:
        project.write("import pulumi, sys\npulumi.export('prefix', sys.prefix)\n")
        code, printed = project.run("preview")
        assert code == 0, printed
        assert f'prefix: "{sys.prefix}"' in printed

    def test_shows_an_exception_once_with_the_programs_own_lines(self, project: PlainProject) -> None:
        project.write("import lib\nlib.fail()\n")
        code, printed = project.run("preview")
        assert code != 0
        assert printed.split("Diagnostics:")[1].count("KeyError: 'missing'") == 1
        assert 'src/__main__.py", line 2' in printed
        assert 'src/lib.py", line 4' in printed
        assert "runpy" not in printed
        assert "site-packages" not in printed

    def test_shows_a_refusal_as_its_sentence_alone(self, project: PlainProject) -> None:
        project.write("import pulumi\nraise pulumi.RunError('set MACHINEUSE_DATA_DIR first')\n")
        code, printed = project.run("preview")
        assert code != 0
        assert "error: set MACHINEUSE_DATA_DIR first" in printed
        assert "Traceback" not in printed

    def test_an_interrupt_ends_it_quietly(self, project: PlainProject, tmp_path: Path) -> None:
        running = tmp_path / "running"
        project.write(
            f"import pathlib, os, time\npathlib.Path({str(running)!r}).write_text(str(os.getpid()))\ntime.sleep(300)\n"
        )
        process = project.start("up", "--yes", "--skip-preview")
        wait_until(running.exists)
        host = wait_until(lambda: running.read_text())
        os.killpg(process.pid, signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "Traceback" not in printed
        assert "KeyboardInterrupt" not in printed
        wait_until(lambda: not Path("/proc", host).exists())

    def test_the_launcher_lives_in_the_virtual_environment(self) -> None:
        assert launcher_dir().is_relative_to(sys.prefix)


class TestPulumi:
    def test_is_there_after_the_set_up_and_is_not_got_twice(self) -> None:
        lines: list[str] = []
        cli = provide_pulumi(Step("Pulumi CLI", write=lines.append), project_dir=Path("/nowhere"))
        assert cli == require_pulumi()
        assert lines == []
        printed = subprocess.run([cli, "version"], capture_output=True, text=True, check=True).stdout
        assert tuple(int(part) for part in printed.strip().lstrip("v").split(".")[:2]) >= (3, 256)

    def test_a_network_without_a_way_out_is_told_within_seconds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # bound but not listening: whoever connects is refused
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
            refusal = pulumi_cli._download(Step("Pulumi CLI", write=lambda _line: None))
        assert "refused" in (refusal or "")
        assert list((tmp_path / "machineuse").iterdir()) == []


class TestDockerEngine:
    def test_finds_the_engine_of_this_machine(self) -> None:
        step = Step("Docker engine", write=lambda _line: None)
        docker_engine.provide_docker_engine(step)
        assert step.outcome.startswith("answers on")

    def test_starts_an_engine_that_outlives_us_in_spite_of_a_stale_pid_file(self, second_engine: SecondEngine) -> None:
        second_engine.pid_file.write_text(str(os.getpid()))  # a pid that a program of another name has now
        pid = second_engine.start()
        assert docker_engine.ping(second_engine.socket)
        assert os.getsid(pid) == pid

    def test_shows_the_log_of_an_engine_that_does_not_start(self, second_engine: SecondEngine) -> None:
        with pytest.raises(SetupError) as caught:
            second_engine.start("--no-such-option")
        assert "no-such-option" in (caught.value.detail or "")
