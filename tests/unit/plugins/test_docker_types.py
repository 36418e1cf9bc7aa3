"""The docker types against a state that the official plugin recorded (tests/data/official-docker-state.json)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.plugins.docker import containers, networks, volumes
from provisioner.plugins.docker.container_values import TABLE, _write_cpus, _write_duration, read_outputs, to_config
from provisioner.plugins.docker.properties import keep_wording
from provisioner.plugins.policy import RefuseWithoutLedger
from provisioner.plugins.resources import Call, Change, ChangeKind, Checked, Difference
from provisioner.plugins.sessions import Session
from provisioner.plugins.values import UNKNOWN
from stacks.names import CONTAINER_TYPE, NETWORK_TYPE, VOLUME_TYPE

OFFICIAL = {
    one["type"]: one
    for one in json.loads((Path(__file__).parents[2] / "data" / "official-docker-state.json").read_text())["resources"]
}
CALL = Call(urn="urn:pulumi:c1::machineuse::docker::x", name="x", config={}, session=Session(""))
TYPES = {
    CONTAINER_TYPE: containers.ContainerType(DockerHosts(), RefuseWithoutLedger()),
    VOLUME_TYPE: volumes.VolumeType(DockerHosts(), RefuseWithoutLedger()),
    NETWORK_TYPE: networks.NetworkType(DockerHosts(), RefuseWithoutLedger()),
}
CONTAINER = OFFICIAL[CONTAINER_TYPE]


def program_inputs(inputs: Any) -> Any:
    """Take out what a plugin's Check put in: what the program itself sends."""
    if isinstance(inputs, list):
        return [program_inputs(item) for item in inputs]
    if isinstance(inputs, dict):
        filled_in = inputs.get("__defaults", [])
        return {k: program_inputs(v) for k, v in inputs.items() if k != "__defaults" and k not in filled_in}
    return inputs


def check(token: str, news: dict[str, Any]) -> Checked:
    return TYPES[token].check(CALL, olds={}, news=news)


def diff(token: str, news: dict[str, Any], **outputs: Any) -> Difference:
    recorded = OFFICIAL[token]
    return TYPES[token].diff(
        CALL,
        id=recorded["id"],
        old_inputs=recorded["inputs"],
        old_outputs=recorded["outputs"] | outputs,
        news=check(token, news).inputs,
    )


@pytest.mark.parametrize("token", [CONTAINER_TYPE, VOLUME_TYPE])
def test_check_fills_in_the_defaults_that_the_official_plugin_fills_in(token: str) -> None:
    checked = check(token, program_inputs(OFFICIAL[token]["inputs"]))
    assert checked.failures == ()
    assert checked.inputs == OFFICIAL[token]["inputs"]


@pytest.mark.parametrize("token", [CONTAINER_TYPE, VOLUME_TYPE])
def test_the_officials_state_needs_no_change(token: str) -> None:
    assert diff(token, program_inputs(OFFICIAL[token]["inputs"])).changes == {}


@pytest.mark.parametrize("empty", [None, [], {}])
def test_null_and_empty_are_the_same(empty: Any) -> None:
    nothing = {key: empty for key, value in CONTAINER["outputs"].items() if value in (None, [], {})}
    assert diff(CONTAINER_TYPE, program_inputs(CONTAINER["inputs"]), **nothing).changes == {}


@pytest.mark.parametrize(
    ("change", "replace"),
    [
        ({"memory": 2048}, False),
        ({"memorySwap": 2048}, False),
        ({"cpus": "1.5"}, False),
        ({"restart": "no"}, False),
        ({"image": "other:1"}, True),
        ({"name": "other"}, True),
        ({"labels": [{"label": "a", "value": "b"}]}, True),
        ({"envs": ["A=B"]}, True),
        ({"shmSize": 64}, True),
        ({"networkMode": "machineuse-c1"}, True),
        ({"ports": [{"internal": 9222, "external": 1}]}, True),
        ({"mounts": []}, True),
        ({"image": UNKNOWN}, True),
    ],
)
def test_a_changed_input_is_an_update_or_a_replacement(change: dict[str, Any], replace: bool) -> None:
    difference = diff(CONTAINER_TYPE, program_inputs(CONTAINER["inputs"]) | change)
    assert set(difference.changes) == set(change)
    assert {one.replace for one in difference.changes.values()} == {replace}
    assert difference.delete_before_replace


@pytest.mark.parametrize(
    "same",
    [
        {"cpus": "2"},
        {"ports": list(reversed(program_inputs(CONTAINER["inputs"]["ports"])))},
        {"capabilities": {"adds": [], "drops": ["cap_all"]}},
        {"securityOpts": list(reversed(CONTAINER["inputs"]["securityOpts"]))},
    ],
)
def test_the_same_in_other_words_is_no_change(same: dict[str, Any]) -> None:
    assert diff(CONTAINER_TYPE, program_inputs(CONTAINER["inputs"]) | same).changes == {}


def test_an_input_that_the_program_dropped_is_a_replacement() -> None:
    inputs = program_inputs(CONTAINER["inputs"])
    del inputs["memory"]
    assert diff(CONTAINER_TYPE, inputs).changes == {"memory": Change(ChangeKind.DELETE, replace=True)}


def test_what_the_program_never_said_is_left_alone() -> None:
    inputs = program_inputs(CONTAINER["inputs"])
    assert diff(CONTAINER_TYPE, inputs, hostname="other", user="0:0", stopSignal="SIGINT").changes == {}


def test_a_container_that_stopped_is_started_in_place() -> None:
    stopped = diff(CONTAINER_TYPE, program_inputs(CONTAINER["inputs"]), mustRun=False, exitCode=1)
    assert stopped.changes == {"mustRun": Change(ChangeKind.UPDATE, replace=False)}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"privileged": True}, "privileged"),
        ({"healthcheck": {"tests": ["CMD", "true"]}}, "healthcheck"),
        ({"memory": "lots"}, "memory"),
        ({"memory": 1.5}, "memory"),
        ({"cpus": "many"}, "cpus"),
        ({"restart": "sometimes"}, "restart"),
        ({"ports": [{"external": 1}]}, "ports"),
        ({"mounts": [{"type": "volume", "target": "/x", "volumeOptions": {"noCopy": True}}]}, "mounts"),
        ({"mounts": [{"type": "npipe", "target": "/x"}]}, "mounts"),
        ({"labels": {"a": "b"}}, "labels"),
        ({"image": None}, "image"),
    ],
)
def test_check_names_the_input_that_does_not_fit(wrong: dict[str, Any], named: str) -> None:
    failures = check(CONTAINER_TYPE, program_inputs(CONTAINER["inputs"]) | wrong).failures
    assert [one.property for one in failures] == [named]
    assert named in failures[0].reason


def test_check_lets_pass_what_only_an_update_can_tell() -> None:
    news = program_inputs(CONTAINER["inputs"]) | {"image": UNKNOWN, "mounts": [{"source": UNKNOWN}]}
    assert check(CONTAINER_TYPE, news).failures == ()


def test_the_api_is_asked_for_exactly_the_limits() -> None:
    inputs = copy.deepcopy(CONTAINER["inputs"])
    inputs["labels"].append({"label": "machineuse.pids", "value": "256"})
    config = to_config(inputs)
    host = config["HostConfig"]
    assert config["Image"] == "machineuse/browser:bookworm"
    assert config["ExposedPorts"] == {"9222/tcp": {}, "6080/tcp": {}}
    assert host["PortBindings"]["9222/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": "21500"}]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (2**30, 2**30, 2 * 10**9)
    assert (host["PidsLimit"], host["ShmSize"], host["CapDrop"]) == (256, 2**29, ["ALL"])
    assert host["NetworkMode"] == "bridge"
    assert host["Mounts"] == [
        {"Type": "volume", "Source": "protoff-z-home", "Target": "/home/machine", "ReadOnly": False}
    ]
    assert host["RestartPolicy"] == {"Name": "unless-stopped", "MaximumRetryCount": 0}


def inspected(**state: Any) -> dict[str, Any]:
    """What `docker inspect` says about the container of the official state."""
    outputs = CONTAINER["outputs"]
    asked = to_config(CONTAINER["inputs"])
    return {
        "Id": CONTAINER["id"],
        "Name": "/protoff-z",
        "Image": "sha256:0",
        "Platform": "linux",
        "State": {"Running": True, "ExitCode": 0, **state},
        "Config": asked
        | {
            "Hostname": outputs["hostname"],
            "Domainname": "",
            "Cmd": None,
            "Entrypoint": outputs["entrypoints"],
            "User": outputs["user"],
            "WorkingDir": outputs["workingDir"],
        },
        "HostConfig": asked["HostConfig"]
        | {"LogConfig": {"Type": "json-file", "Config": {}}, "IpcMode": "private", "Runtime": "runc"},
        "NetworkSettings": {
            "Bridge": "",
            "Ports": {},
            "Networks": {
                "bridge": {
                    "Gateway": "172.17.0.1",
                    "IPAddress": "172.17.0.9",
                    "IPPrefixLen": 16,
                    "MacAddress": "02:42:ac:11:00:09",
                }
            },
        },
    }


def test_a_refresh_of_what_nobody_touched_is_the_record_itself() -> None:
    now = read_outputs(inspected(), inputs=CONTAINER["inputs"])
    assert keep_wording(TABLE, olds=CONTAINER["outputs"], news=now) == CONTAINER["outputs"]


def test_a_new_container_is_recorded_with_everything_that_the_official_plugin_records() -> None:
    now = read_outputs(inspected(), inputs=CONTAINER["inputs"])
    assert now == {key: value for key, value in CONTAINER["outputs"].items() if not key.startswith("__")}


def test_drift_ends_the_officials_private_notes_about_the_record() -> None:
    now = read_outputs(inspected(Running=False, ExitCode=137), inputs=CONTAINER["inputs"])
    kept = keep_wording(TABLE, olds=CONTAINER["outputs"], news=now)
    assert (kept["mustRun"], kept["exitCode"]) == (False, 137)
    assert "__pulumi_raw_state_delta" not in kept
    assert kept["__meta"] == CONTAINER["outputs"]["__meta"]
    assert kept["ports"] == CONTAINER["outputs"]["ports"]


def test_a_network_is_named_and_gets_dockers_own_address_management() -> None:
    checked = check(NETWORK_TYPE, {"name": "machineuse-c1", "driver": "bridge"})
    assert checked.inputs["ipamDriver"] == "default"
    assert checked.inputs["__defaults"] == ["ipamDriver"]
    assert [one.property for one in check(NETWORK_TYPE, {"ipv6": True}).failures] == ["ipv6", "name"]


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0s"), (5 * 10**8, "500ms"), (3 * 10**10, "30s"), (9 * 10**10, "1m30s"), (36 * 10**11, "1h0m0s"),
     (1_500_000_000, "1.5s"), (1500, "1.5µs"), (7, "7ns")],
)  # fmt: skip
def test_durations_are_written_as_go_writes_them(nanoseconds: int, text: str) -> None:
    assert _write_duration(nanoseconds) == text


@pytest.mark.parametrize(("nano", "text"), [(0, None), (2 * 10**9, "2.0"), (25 * 10**7, "0.25"), (1, "0.000000001")])
def test_cpus_are_written_as_the_official_plugin_writes_them(nano: int, text: str | None) -> None:
    assert _write_cpus(nano) == text
