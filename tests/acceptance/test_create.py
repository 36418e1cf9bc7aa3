"""Creating: what is asked for becomes real limits on a real container, or is refused at once with a reason."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from stacks.names import Names
from stacks.spec import BROWSER_IMAGE, SECCOMP_PROFILE
from tests.support.browsing import version_of
from tests.support.containers import execute
from tests.support.service import Service
from tests.support.shell_image import shell_image
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
TINY = {"memory_gb": 0.125, "cpu_cores": 1}
MAX_INSTANCES = 6


@pytest.fixture(scope="module")
def shell() -> Iterator[str]:
    """Give the name of an image whose command is a shell, and that has no browser."""
    with shell_image(docker.from_env(), command=["/bin/sh"]) as name:
        yield name


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service], shell: str) -> Service:
    """Give a service with a small node, a catalogue of two names, and a quick look at disks."""
    images = {"ubuntu:22.04": BROWSER_IMAGE, "team/tools:1": shell}
    return start_service(node={"max_instances": MAX_INSTANCES}, images=images, disk_check_s=0.3, sample_s=0.5)


@pytest.fixture(scope="module")
def browser(service: Service) -> dict[str, Any]:
    """Give one browser to all tests that only look at it."""
    instance = service.create(config=SMALL)
    assert instance["status"] == "running", instance
    return instance


@contextmanager
def created(service: Service, **body: Any) -> Iterator[dict[str, Any]]:
    """Create an instance for a while; its removal shares an update with what comes next."""
    instance = service.create(**body)
    try:
        yield instance
    finally:
        service.delete(instance["id"], force=True, wait_s=0)


def run_in(service: Service, instance: dict[str, Any], *command: str) -> str:
    """Run a command in the instance's container and return what it prints."""
    return execute(service.container(instance["id"]), *command).strip()


def refusal(answer: httpx.Response, status: int) -> dict[str, str]:
    """Return the body of a refusal, which must have that status."""
    assert answer.status_code == status, answer.text
    body: dict[str, str] = answer.json()
    assert body["detail"]
    return body


def events_of(service: Service, instance: dict[str, Any], kind: str) -> list[str]:
    """Return what the instance's events of a kind say."""
    return [event["message"] for event in service.events_of(instance["id"]) if event["kind"] == kind]


# ---- size


def test_memory_and_cores_become_limits_of_the_containers_own_cgroup(service: Service, browser: dict[str, Any]) -> None:
    script = """
        if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
            cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.swap.max; cat /sys/fs/cgroup/cpu.max
        else
            cat /sys/fs/cgroup/memory/memory.limit_in_bytes
            echo 0
            echo $(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us)
        fi
    """
    memory, swap, quota, period = run_in(service, browser, "sh", "-c", script).split()
    assert int(memory) == 512 * 2**20
    assert int(swap) == 0
    assert int(quota) == 1 * int(period)
    limits = service.container(browser["id"]).attrs["HostConfig"]
    assert limits["MemorySwap"] == limits["Memory"] == 512 * 2**20  # no swap on top


def test_every_config_field_is_kept_as_it_was_asked_for(service: Service, shell: str) -> None:
    config = {"memory_gb": 0.25, "cpu_cores": 2, "disk_gb": 1.5, "idle_timeout_minutes": 7, "auto_snapshot": False}
    with created(service, image=shell, config=config) as instance:
        assert instance["config"] == config
        assert service.get(instance["id"])["config"] == config


def test_the_defaults_are_the_contracts(service: Service, shell: str) -> None:
    with created(service, image=shell, wait_s=0) as instance:
        assert instance["config"] == {
            "memory_gb": 2,
            "cpu_cores": 2,
            "disk_gb": 10,
            "idle_timeout_minutes": 30,
            "auto_snapshot": True,
        }


@pytest.mark.parametrize(("field", "size"), [("memory_gb", 100_000), ("cpu_cores", 4000)])
def test_a_size_that_no_node_could_ever_have_is_refused(service: Service, field: str, size: int) -> None:
    body = refusal(service.http.post("/v2/instances", json={"config": {field: size}}), 400)
    assert body["code"] == "invalid_request"
    assert field in body["detail"]
    assert "more than any node has" in body["detail"]


def test_a_full_node_is_503_with_when_to_retry(service: Service, shell: str) -> None:
    made: list[str] = []
    try:
        for _ in range(MAX_INSTANCES + 1):
            answer = service.http.post(
                "/v2/instances", json={"image": shell, "config": TINY}, headers={"Prefer": "wait=0"}
            )
            if answer.status_code != 201:
                break
            made.append(answer.json()["id"])
        body = refusal(answer, 503)
        assert body["code"] == "insufficient_resources"
        assert f"{MAX_INSTANCES} instances" in body["detail"]
        assert int(answer.headers["retry-after"]) > 0
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda instance_id: service.delete(instance_id, force=True), made))
    with created(service, image=shell, config=TINY) as instance:  # and there is room again
        assert instance["status"] == "running"


def test_a_browser_beyond_its_disk_gb_runs_on_and_says_so_once(service: Service) -> None:
    with created(service, config=SMALL | {"disk_gb": 0.02}) as instance:
        run_in(service, instance, "sh", "-c", "head -c 30000000 /dev/zero > /tmp/much")
        wait_until(lambda: service.get(instance["id"])["disk_over"])
        wait_until(lambda: service.get(instance["id"])["resources"]["disk_percent"] > 100)
        over = service.get(instance["id"])
        assert over["status"] in ("running", "idle")
        assert over["disk_bytes"] > 30_000_000
        assert "Chrome" in version_of(instance)["Browser"]
        run_in(service, instance, "sh", "-c", "head -c 1000000 /dev/zero >> /tmp/much")
        wait_until(lambda: service.get(instance["id"])["disk_bytes"] > over["disk_bytes"])
        assert len(events_of(service, instance, "disk_over")) == 1


def test_the_home_counts_as_disk_too_and_less_in_it_is_an_event_again(service: Service, shell: str) -> None:
    with created(service, image=shell, config=TINY | {"disk_gb": 0.01}) as instance:
        script = "for i in 1 2 3 4 5 6 7 8 9 10; do cat /lib/*/libc.so.6; done > /home/machine/much"
        run_in(service, instance, "sh", "-c", script)
        wait_until(lambda: service.get(instance["id"])["disk_over"])
        run_in(service, instance, "sh", "-c", ": > /home/machine/much")
        wait_until(lambda: not service.get(instance["id"])["disk_over"])
        assert len(events_of(service, instance, "disk_over")) == len(events_of(service, instance, "disk_back")) == 1


# ---- image


def test_the_default_image_is_the_projects_browser_and_the_instance_says_so(
    service: Service, browser: dict[str, Any]
) -> None:
    assert browser["image_requested"] == "ubuntu:22.04"
    assert browser["image"] == BROWSER_IMAGE
    base = service.docker.images.get(BROWSER_IMAGE).labels["machineuse.base"]
    assert browser["image_base"] == base
    assert base in events_of(service, browser, "create")[0]
    assert service.container(browser["id"]).attrs["Config"]["Image"] == BROWSER_IMAGE


def test_an_entry_of_the_clusters_own_catalogue_stands_for_its_image(service: Service, shell: str) -> None:
    with created(service, image="team/tools:1", config=TINY) as instance:
        assert instance["status"] == "running"
        assert instance["image_requested"] == "team/tools:1"
        assert instance["image"] == shell
        assert service.container(instance["id"]).attrs["Config"]["Image"] == shell


def test_an_image_without_a_browsers_ports_runs_and_has_none(service: Service, shell: str) -> None:
    with created(service, image=shell, config=TINY) as instance:
        assert instance["status"] == "running"
        assert instance["debug_port"] is None
        assert instance["stream_port"] is None
        assert instance["urls"] == {"debug": None, "stream": None}
        assert run_in(service, instance, "sh", "-c", "echo it works") == "it works"


def test_an_image_whose_command_ends_at_once_fails_and_says_how_it_ended(service: Service) -> None:
    with (
        shell_image(service.docker, command=["/bin/sh", "-c", "exit 3"]) as image,
        created(service, image=image, config=TINY) as instance,
    ):
        assert instance["status"] == "failed"
        assert instance["error"]["code"] == "not_ready"
        assert "exit code 3" in instance["error"]["message"]


def test_an_image_that_neither_node_nor_registry_has_is_refused(service: Service) -> None:
    body = refusal(service.http.post("/v2/instances", json={"image": "127.0.0.1:9/nobody/has-this:1"}), 400)
    assert body["code"] == "unknown_image"
    assert "127.0.0.1:9/nobody/has-this:1" in body["detail"]


# ---- place


def test_the_preferred_node_is_used_and_an_unknown_one_refused(service: Service, shell: str) -> None:
    body = refusal(service.http.post("/v2/instances", json={"node_preference": "atlantis"}), 400)
    assert body["code"] == "unknown_node"
    assert "local" in body["detail"]  # which ones there are
    with created(service, image=shell, config=TINY, node_preference="local", wait_s=0) as instance:
        assert instance["node_id"] == "local"


def test_a_port_that_a_foreign_process_holds_is_left_alone(service: Service, browser: dict[str, Any]) -> None:
    taken = {browser["debug_port"], browser["stream_port"]}
    next_port = next(port for port in service.ports if port not in taken)
    with listening_on(next_port), created(service, wait_s=0, config=SMALL) as instance:
        assert next_port not in (instance["debug_port"], instance["stream_port"])


def test_ports_that_are_taken_between_choice_and_start_are_replaced(service: Service) -> None:
    for _ in range(5):  # a race with the container, which the test wins nearly always
        with ExitStack() as held:
            instance = held.enter_context(created(service, wait_s=0, config=SMALL))
            try:
                held.enter_context(listening_on(instance["debug_port"]))
            except OSError:
                continue
            running = service.wait_for(instance["id"], "running")
            assert running["debug_port"] not in (instance["debug_port"], None)
            assert "Chrome" in version_of(running)["Browser"]
            told = events_of(service, instance, "ports")[-1]
            assert "is taken" in told
            assert str(running["debug_port"]) in told
            return
    pytest.fail("the container was always faster")


@contextmanager
def listening_on(port: int) -> Iterator[None]:
    """Hold a port like any other program of the machine would."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
        holder.listen()
        yield


# ---- the container


def test_the_container_has_no_rights_that_a_browser_does_not_need(service: Service, browser: dict[str, Any]) -> None:
    container = service.container(browser["id"])
    host = container.attrs["HostConfig"]
    assert container.attrs["Config"]["User"] == "1000:1000"
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert "no-new-privileges" in host["SecurityOpt"]
    profiles = [option.partition("=")[2] for option in host["SecurityOpt"] if option.startswith("seccomp=")]
    assert [json.loads(profile) for profile in profiles] == [json.loads(SECCOMP_PROFILE.read_text())]
    status = run_in(service, browser, "cat", "/proc/self/status")
    rights = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert rights["Uid"].split() == ["1000"] * 4
    assert int(rights["CapEff"], 16) == int(rights["CapBnd"], 16) == 0
    assert rights["NoNewPrivs"] == "1"
    assert rights["Seccomp"] == "2"  # filtered


def test_chromium_runs_in_its_own_sandbox(service: Service, browser: dict[str, Any]) -> None:
    script = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done"
    commands = [line for line in run_in(service, browser, "sh", "-c", script).splitlines() if "chromium" in line]
    assert any("--type=renderer" in command for command in commands)
    assert not any("--no-sandbox" in command for command in commands)


def test_the_container_is_limited_beyond_memory_and_cores(service: Service, browser: dict[str, Any]) -> None:
    host = service.container(browser["id"]).attrs["HostConfig"]
    assert host["PidsLimit"] == 1024
    assert host["ShmSize"] == 512 * 2**20
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    shm = run_in(service, browser, "sh", "-c", "df --output=size --block-size=1M /dev/shm | tail -n 1")
    assert int(shm) == 512


def test_container_volume_and_network_say_whose_they_are(service: Service, browser: dict[str, Any]) -> None:
    names = Names(service.cluster)
    container = service.container(browser["id"])
    volume = service.docker.volumes.get(names.docker_volume(browser["id"]))
    network = service.docker.networks.get(service.network())
    urns = service.urns()
    for labels, urn in (
        (container.labels, names.container_urn(browser["id"])),
        (volume.attrs["Labels"], names.volume_urn(browser["id"])),
    ):
        assert labels["machineuse.cluster"] == service.cluster
        assert labels["machineuse.instance"] == browser["id"]
        assert labels["machineuse.urn"] == urn
        assert urn in urns
        assert labels["machineuse.ledger"]
    assert network.attrs["Labels"]["machineuse.cluster"] == service.cluster
    assert network.attrs["Labels"]["machineuse.urn"] in urns


def test_ports_are_published_on_loopback_only(service: Service, browser: dict[str, Any]) -> None:
    published = service.container(browser["id"]).attrs["NetworkSettings"]["Ports"]
    assert published == {
        "9222/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(browser["debug_port"])}],
        "6080/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(browser["stream_port"])}],
    }
    assert browser["urls"] == {
        "debug": f"http://127.0.0.1:{browser['debug_port']}",
        "stream": f"http://127.0.0.1:{browser['stream_port']}/",
    }


def test_the_home_is_a_volume_of_its_own(service: Service, browser: dict[str, Any]) -> None:
    mounts = {mount["Destination"]: mount for mount in service.container(browser["id"]).attrs["Mounts"]}
    assert list(mounts) == ["/home/machine"]
    assert mounts["/home/machine"]["Name"] == Names(service.cluster).docker_volume(browser["id"])


def test_no_instance_reaches_another_ones_browser(service: Service, browser: dict[str, Any]) -> None:
    script = """
import socket, sys
with socket.socket() as probe:
    probe.settimeout(1)
    print(probe.connect_ex((sys.argv[1], 9222)))
"""
    with created(service, config=SMALL) as other:

        def connect(target: dict[str, Any]) -> str:
            networks = service.container(target["id"]).attrs["NetworkSettings"]["Networks"]
            return run_in(service, other, "python3", "-c", script, networks[service.network()]["IPAddress"])

        assert connect(other) == "0"  # its own, by the same address and port
        assert connect(browser) != "0"


def test_nothing_in_the_project_turns_the_sandbox_off() -> None:
    checkout = Path(__file__).resolve().parent.parent.parent
    sources = [path for path in (checkout / "images").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert not [path for path in sources if "--no-sandbox" in path.read_text(errors="replace")]
