"""Engines behind certificates and behind SSH: who is let in, and what is said to whoever is not."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import psutil
import pytest

from provisioner.docker_hosts.containers import find_container
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.errors import NodeUnreachable
from stacks.spec import NodeSpec
from tests.support.certificates import CertificateAuthority
from tests.support.engines import Engine
from tests.support.watched import wait_until

LIMIT_S = 2.0


@pytest.fixture(scope="module")
def near() -> Iterator[Engine]:
    with Engine(browser_image=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def secured() -> Iterator[Engine]:
    with Engine("tcp", browser_image=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def behind_ssh() -> Iterator[Engine]:
    with Engine("ssh", browser_image=False) as engine:
        yield engine


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[DockerHosts]:
    hosts = DockerHosts(base_dir=tmp_path, timeout_s=LIMIT_S)
    yield hosts
    hosts.close()


def refusal(host: DockerHost) -> str:
    """Return what a user is told of an engine that can't be talked to."""
    with pytest.raises(NodeUnreachable) as caught:
        host.ping()
    text = caught.value.explain()
    assert host.url in text
    assert "\n" not in text
    return text


# ---- certificates


def test_with_its_certificate_a_client_is_let_in(secured: Engine, hosts: DockerHosts) -> None:
    host = hosts.get(secured.url, cert_path=secured.cert_path)
    host.ping()
    assert host.info()["DockerRootDir"].endswith("/data")
    assert find_container(host, "nobody") is None


def test_a_path_of_certificates_may_be_relative_to_the_project(
    secured: Engine, hosts: DockerHosts, tmp_path: Path
) -> None:
    assert secured.cert_path is not None
    shutil.copytree(secured.cert_path, tmp_path / "certificates" / "node-b")
    hosts.get(secured.url, cert_path="certificates/node-b").ping()


def test_without_a_certificate_nobody_is_let_in(secured: Engine, hosts: DockerHosts, tmp_path: Path) -> None:
    assert "it wants TLS, and the node has no cert_path" in refusal(hosts.get(secured.url))
    assert "ca.pem can't be read (No such file or directory)" in refusal(hosts.get(secured.url, cert_path="nowhere"))
    assert secured.cert_path is not None
    shutil.copytree(secured.cert_path, tmp_path / "broken")
    (tmp_path / "broken" / "cert.pem").write_text("no certificate")
    assert "a file in cert_path is no certificate or key" in refusal(hosts.get(secured.url, cert_path="broken"))


@pytest.mark.parametrize("file", ["ca.pem", "cert.pem", "key.pem"])
def test_a_certificate_that_goes_while_it_is_in_use_is_told_of(
    secured: Engine, hosts: DockerHosts, tmp_path: Path, file: str
) -> None:
    assert secured.cert_path is not None
    shutil.copytree(secured.cert_path, tmp_path / "client")
    host = hosts.get(secured.url, cert_path="client")
    host.ping()
    (tmp_path / "client" / file).rename(tmp_path / file)
    assert "a file of the node's cert_path is gone" in refusal(host)
    (tmp_path / file).rename(tmp_path / "client" / file)
    host.ping()


@pytest.mark.parametrize("days", [2, -1])
def test_a_client_with_a_certificate_of_another_authority_or_an_expired_one_is_refused(
    secured: Engine, hosts: DockerHosts, tmp_path: Path, days: int
) -> None:
    authority = secured.authority if days < 0 else CertificateAuthority(tmp_path / "other")
    authority.issue(tmp_path / "client", days=days)
    shutil.copy(Path(secured.cert_path or "") / "ca.pem", tmp_path / "client" / "ca.pem")
    text = refusal(hosts.get(secured.url, cert_path="client"))
    assert "certificate" in text
    assert "another CA" in text or "expired" in text


def test_an_engine_with_a_certificate_of_another_authority_is_not_trusted(
    secured: Engine, hosts: DockerHosts, tmp_path: Path
) -> None:
    CertificateAuthority(tmp_path / "other").issue(tmp_path / "client")
    assert "its certificate is not signed by our ca.pem" in refusal(hosts.get(secured.url, cert_path="client"))


def test_an_engine_with_a_certificate_for_another_name_is_not_trusted(secured: Engine, hosts: DockerHosts) -> None:
    passing = Passing(secured.address, 2376)
    host = hosts.get(f"tcp://127.0.0.1:{passing.port}", cert_path=secured.cert_path)
    assert "its certificate is for another name" in refusal(host)


def test_tls_where_the_engine_has_none_is_said_so(secured: Engine, hosts: DockerHosts) -> None:
    passing = Passing(secured.socket)
    host = hosts.get(f"tcp://127.0.0.1:{passing.port}", cert_path=secured.cert_path)
    assert "it does not speak TLS" in refusal(host)


def test_an_engine_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, secured: Engine) -> None:
    monkeypatch.setattr("provisioner.docker_hosts.hosts.MINIMUM_API", "9.99")
    text = refusal(DockerHost(f"unix://{secured.socket}"))
    assert "too old: it speaks API 1." in text
    assert "Machineuse needs 9.99" in text


# ---- names and addresses


@pytest.mark.parametrize("scheme", ["tcp", "ssh"])
def test_a_wrong_host_name_or_port_is_named(hosts: DockerHosts, behind_ssh: Engine, scheme: str) -> None:
    assert "its host name is unknown" in refusal(hosts.get(f"{scheme}://nowhere.invalid:2376"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ssh_opts = behind_ssh.ssh_opts if scheme == "ssh" else ()
    assert "nothing listens there" in refusal(hosts.get(f"{scheme}://127.0.0.1:{port}", ssh_opts=ssh_opts))


@pytest.mark.parametrize("fixture", ["secured", "behind_ssh"])
def test_a_machine_without_a_network_costs_the_time_limit_and_comes_back(
    request: pytest.FixtureRequest, hosts: DockerHosts, fixture: str
) -> None:
    engine: Engine = request.getfixturevalue(fixture)
    host = hosts.get(engine.url, cert_path=engine.cert_path, ssh_opts=engine.ssh_opts)
    host.ping()
    engine.unplug()
    try:
        assert "does not answer" in refusal(host)
        new = DockerHosts(timeout_s=0.5).get(engine.url, cert_path=engine.cert_path, ssh_opts=engine.ssh_opts)
        assert "does not answer" in refusal(new)
    finally:
        engine.plug()
    wait_until(lambda: answers(host), what="the engine answers again")
    engine.freeze()
    try:
        assert "does not answer" in refusal(host)
    finally:
        engine.thaw()
    wait_until(lambda: answers(host), what="the engine answers again")


@pytest.mark.parametrize("fixture", ["near", "secured", "behind_ssh"])
def test_who_waits_for_a_frozen_engine_is_told_when_it_is_given_up(
    request: pytest.FixtureRequest, hosts: DockerHosts, fixture: str
) -> None:
    engine: Engine = request.getfixturevalue(fixture)
    host = hosts.get(engine.url, cert_path=engine.cert_path, ssh_opts=engine.ssh_opts)
    api = host.slow_api
    engine.freeze()
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(host.call, "list images", api.images)  # would wait for ten minutes
            assert wait([waiting], timeout=1).not_done
            host.hang_up()
            with pytest.raises(NodeUnreachable, match="does not answer"):
                waiting.result(timeout=10)
    finally:
        engine.thaw()
    wait_until(lambda: answers(host), what="the engine answers again")
    assert host.call("list images", host.slow_api.images) == []


@pytest.mark.parametrize("fixture", ["near", "secured", "behind_ssh"])
def test_the_work_of_updates_is_given_up_before_what_takes_its_time(
    request: pytest.FixtureRequest, hosts: DockerHosts, fixture: str
) -> None:
    engine: Engine = request.getfixturevalue(fixture)
    host = hosts.get(engine.url, cert_path=engine.cert_path, ssh_opts=engine.ssh_opts)
    slow, work = host.slow_api, host.work_api
    assert slow.images() == work.images() == []  # both have a connection: opening one has a time limit of its own
    engine.freeze()
    try:
        with ThreadPoolExecutor(2) as pool:
            patient = pool.submit(host.call, "list images", slow.images)
            waiting = pool.submit(host.call, "list images", work.images)
            assert wait([patient, waiting], timeout=1).not_done == {patient, waiting}
            host.hang_up(only_work=True)
            with pytest.raises(NodeUnreachable, match="does not answer"):
                waiting.result(timeout=10)
            assert not patient.done()
            engine.thaw()
            assert patient.result(timeout=30) == []
    finally:
        engine.thaw()


# ---- ssh


def test_an_engine_behind_ssh_is_reached_through_one_process(behind_ssh: Engine, hosts: DockerHosts) -> None:
    host = hosts.get(behind_ssh.url, ssh_opts=behind_ssh.ssh_opts)
    for _ in range(3):
        host.ping()
        host.slow_api.images()
    assert len(tunnels()) == 1

    os.kill(tunnels()[0].pid, signal.SIGKILL)
    wait_until(lambda: answers(host), what="another tunnel is opened")
    behind_ssh.restart()
    wait_until(lambda: answers(host), what="the tunnel to the restarted machine is opened")
    assert len(tunnels()) == 1
    host.close()
    assert tunnels() == []


def test_the_tunnel_of_a_node_that_is_removed_is_closed(behind_ssh: Engine, hosts: DockerHosts) -> None:
    stays, goes = NodeSpec(id="a"), NodeSpec.model_validate(behind_ssh.node("b"))
    kept, gone = hosts.of(stays), hosts.of(goes)
    gone.ping()
    hosts.keep_only([stays, goes])
    assert len(tunnels()) == 1
    hosts.keep_only([stays])
    assert tunnels() == []
    assert hosts.of(stays) is kept
    assert hosts.of(goes) is not gone


def test_no_tunnel_outlives_its_process(behind_ssh: Engine) -> None:
    program = (
        "import sys, time; from provisioner.docker_hosts.hosts import DockerHosts;"
        "host = DockerHosts().get(sys.argv[1], ssh_opts=sys.argv[2:]); host.ping(); print('open', flush=True);"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, behind_ssh.url, *behind_ssh.ssh_opts], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "open\n" in iter(process.stdout.readline, "")
    (tunnel,) = tunnels(psutil.Process(process.pid))
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not is_alive(tunnel), what="the tunnel has ended")


def test_many_threads_share_the_tunnel(behind_ssh: Engine, hosts: DockerHosts) -> None:
    host = hosts.get(behind_ssh.url, ssh_opts=behind_ssh.ssh_opts)
    threads = [threading.Thread(target=host.ping) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tunnels()) == 1


def test_the_socket_on_the_other_side_may_be_another_one(behind_ssh: Engine, hosts: DockerHosts) -> None:
    ssh_opts = behind_ssh.ssh_opts
    hosts.get(f"{behind_ssh.url}:22{behind_ssh.socket}", ssh_opts=ssh_opts).ping()
    host = hosts.get(f"{behind_ssh.url}/run/user/1000/docker.sock", ssh_opts=ssh_opts)
    assert "there is no Docker socket that the SSH user may use" in refusal(host)


def test_an_unknown_or_changed_host_key_is_refused(behind_ssh: Engine, hosts: DockerHosts, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    options = [f"UserKnownHostsFile={known}" if "KnownHosts" in word else word for word in behind_ssh.ssh_opts]
    assert "its SSH host key is not known here" in refusal(hosts.get(behind_ssh.url, ssh_opts=options))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    known.write_text(f"{behind_ssh.address} {(tmp_path / 'other.pub').read_text()}")
    again = hosts.get(behind_ssh.url, ssh_opts=[*options, "-v"])
    assert "its SSH host key is not the one that is known" in refusal(again)


def test_a_key_that_the_host_does_not_know_is_refused(behind_ssh: Engine, hosts: DockerHosts, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    options = ["key" if word.endswith("login_key") else word for word in behind_ssh.ssh_opts]  # relative, too
    assert "ssh is not let in" in refusal(hosts.get(behind_ssh.url, ssh_opts=options))


# ---- helpers


def answers(host: DockerHost) -> bool:
    try:
        host.ping()
    except NodeUnreachable:
        return False
    return True


def tunnels(process: psutil.Process | None = None) -> list[psutil.Process]:
    children = (process or psutil.Process()).children()
    return [child for child in children if child.name() == "ssh" and is_alive(child)]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


class Passing:
    """A port of loopback behind which something else is: a TCP port, or a Unix socket."""

    def __init__(self, target: str | Path, port: int = 0) -> None:
        self._target: tuple[str, int] | str = (str(target), port) if port else str(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            family = socket.AF_INET if isinstance(self._target, tuple) else socket.AF_UNIX
            server = socket.socket(family)
            server.connect(self._target)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass
