"""A container's properties: from inputs to the Docker API's JSON, and from `docker inspect` to outputs.

The outputs are all those that the official plugin records, so that it takes our state for its own: what it reads back
is read back here, what it only remembers is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from provisioner.plugins.docker.properties import (
    CAPABILITIES,
    CPUS,
    FLAG,
    LABELS,
    MOUNTS,
    NETWORK_MODE,
    NUMBER,
    PORTS,
    RESTART,
    TEXT,
    TEXT_MAP,
    TEXT_SET,
    TEXTS,
    ULIMITS,
    Property,
    nano_cpus,
)
from provisioner.plugins.docker.shared import read_labels
from provisioner.plugins.values import Properties
from stacks.names import PIDS_LABEL

MIB = 1024 * 1024

TABLE: dict[str, Property] = {
    "name": Property(TEXT, required=True),
    "image": Property(TEXT, required=True),
    "labels": Property(LABELS),
    "capabilities": Property(CAPABILITIES),
    "command": Property(TEXTS),
    "containerReadRefreshTimeoutMilliseconds": Property(NUMBER, replace=False, default=15000),
    "cpus": Property(CPUS, replace=False, drifts=True),
    "entrypoints": Property(TEXTS),
    "envs": Property(TEXT_SET),
    "hostname": Property(TEXT),
    "init": Property(FLAG),
    "logDriver": Property(TEXT),
    "logOpts": Property(TEXT_MAP),
    "maxRetryCount": Property(NUMBER, replace=False, drifts=True),
    "memory": Property(NUMBER, replace=False, drifts=True),
    "memoryReservation": Property(NUMBER, replace=False, drifts=True),
    "memorySwap": Property(NUMBER, replace=False),
    "mounts": Property(MOUNTS),
    "mustRun": Property(FLAG, replace=False, default=True),
    "networkMode": Property(NETWORK_MODE, default="bridge"),
    "ports": Property(PORTS),
    "readOnly": Property(FLAG),
    "removeVolumes": Property(FLAG, replace=False, default=True),
    "restart": Property(RESTART, replace=False, default="no"),
    "securityOpts": Property(TEXT_SET),
    "shmSize": Property(NUMBER),
    "start": Property(FLAG, replace=False, default=True),
    "stdinOpen": Property(FLAG),
    "stopSignal": Property(TEXT),
    "stopTimeout": Property(NUMBER),
    "storageOpts": Property(TEXT_MAP),
    "tmpfs": Property(TEXT_MAP),
    "tty": Property(FLAG),
    "ulimits": Property(ULIMITS),
    "user": Property(TEXT),
    "waitTimeout": Property(NUMBER, replace=False, default=60),
    "workingDir": Property(TEXT),
}
"""The inputs that are taken. `mustRun: false` in the outputs means "should run, but does not"."""

COMPUTED = frozenset(
    {
        "bridge",
        "command",
        "entrypoints",
        "healthcheck",
        "hostname",
        "init",
        "ipcMode",
        "logDriver",
        "networkDatas",
        "platform",
        "runtime",
        "shmSize",
        "stopSignal",
        "stopTimeout",
        "user",
        "workingDir",
    }
)

# What the official plugin records although this plugin takes no such input.
_UNUSED: Mapping[str, Any] = {
    "attach": False,
    "cgroupParent": None,
    "cgroupnsMode": None,
    "containerLogs": None,
    "cpuPeriod": None,
    "cpuQuota": None,
    "destroyGraceSeconds": None,
    "deviceReadBps": [],
    "deviceReadIops": [],
    "deviceRequests": [],
    "deviceWriteBps": [],
    "deviceWriteIops": [],
    "devices": [],
    "dns": None,
    "dnsOpts": None,
    "dnsSearches": None,
    "gpus": None,
    "groupAdds": None,
    "hosts": [],
    "logs": False,
    "networksAdvanced": [],
    "pidMode": None,
    "rm": False,
    "sysctls": None,
    "uploads": [],
    "volumes": [],
    "wait": False,
}


def to_config(inputs: Properties) -> dict[str, Any]:
    """Return what the Docker API is to be asked for."""
    labels = read_labels(inputs)
    config: dict[str, Any] = {
        "Image": inputs["image"],
        "Labels": labels,
        "Tty": inputs.get("tty") or False,
        "OpenStdin": inputs.get("stdinOpen") or False,
        "HostConfig": _host_config(inputs, labels=labels),
    }
    for key, name in (
        ("command", "Cmd"),
        ("entrypoints", "Entrypoint"),
        ("envs", "Env"),
        ("hostname", "Hostname"),
        ("stopSignal", "StopSignal"),
        ("stopTimeout", "StopTimeout"),
        ("user", "User"),
        ("workingDir", "WorkingDir"),
    ):
        if inputs.get(key):
            config[name] = inputs[key]
    if inputs.get("ports"):
        config["ExposedPorts"] = {_port_key(port): {} for port in inputs["ports"]}
    return config


def _host_config(inputs: Properties, *, labels: Mapping[str, str]) -> dict[str, Any]:
    capabilities = inputs.get("capabilities") or {}
    config: dict[str, Any] = {
        # "bridge" in so many words: Docker's own default is recorded as "default", which reads as a change.
        "NetworkMode": inputs.get("networkMode") or "bridge",
        "ReadonlyRootfs": inputs.get("readOnly") or False,
        "CapAdd": capabilities.get("adds") or [],
        "CapDrop": capabilities.get("drops") or [],
        "SecurityOpt": inputs.get("securityOpts") or [],
        "Mounts": [
            {
                "Type": mount["type"],
                "Source": mount.get("source") or "",
                "Target": mount["target"],
                "ReadOnly": mount.get("readOnly") or False,
            }
            for mount in inputs.get("mounts") or []
        ],
        "Ulimits": [
            {"Name": limit["name"], "Soft": limit["soft"], "Hard": limit["hard"]}
            for limit in inputs.get("ulimits") or []
        ],
        **to_limits(inputs),
    }
    if inputs.get("ports"):
        bindings: dict[str, list[dict[str, str]]] = {}
        for port in inputs["ports"]:
            binding = {"HostIp": port.get("ip") or "", "HostPort": str(port.get("external") or "")}
            bindings.setdefault(_port_key(port), []).append(binding)
        config["PortBindings"] = bindings
    if inputs.get("shmSize"):
        config["ShmSize"] = inputs["shmSize"] * MIB
    if inputs.get("init"):
        config["Init"] = True
    if inputs.get("logDriver") or inputs.get("logOpts"):
        config["LogConfig"] = {"Type": inputs.get("logDriver") or "", "Config": inputs.get("logOpts") or {}}
    if inputs.get("storageOpts"):
        config["StorageOpt"] = inputs["storageOpts"]
    if inputs.get("tmpfs"):
        config["Tmpfs"] = inputs["tmpfs"]
    if labels.get(PIDS_LABEL, "").isdecimal():
        config["PidsLimit"] = int(labels[PIDS_LABEL])
    return config


def to_limits(inputs: Properties) -> dict[str, Any]:
    """Return the part of the API's JSON that `docker update` can change, too."""
    limits: dict[str, Any] = {
        "RestartPolicy": {
            "Name": inputs.get("restart") or "no",
            "MaximumRetryCount": inputs.get("maxRetryCount") or 0,
        }
    }
    if inputs.get("cpus"):
        limits["NanoCpus"] = nano_cpus(inputs["cpus"])
    if inputs.get("memory"):
        limits["Memory"] = inputs["memory"] * MIB
        # Twice the memory is Docker's own default; said here because an update does not know it.
        limits["MemorySwap"] = 2 * limits["Memory"]
    if inputs.get("memorySwap"):
        swap = inputs["memorySwap"]
        limits["MemorySwap"] = swap * MIB if swap > 0 else swap
    if inputs.get("memoryReservation"):
        limits["MemoryReservation"] = inputs["memoryReservation"] * MIB
    return limits


def _port_key(port: Mapping[str, Any]) -> str:
    return f"{port['internal']}/{port.get('protocol') or 'tcp'}"


def read_outputs(live: Mapping[str, Any], *, inputs: Properties) -> Properties:
    """Return the outputs of a container as Docker describes it; `inputs` for what Docker does not know."""
    config, host_config, network = live["Config"], live["HostConfig"], live["NetworkSettings"]
    running = bool(live["State"]["Running"])
    swap = host_config.get("MemorySwap") or 0
    policy = host_config.get("RestartPolicy") or {}
    return {
        **_UNUSED,
        "bridge": network.get("Bridge", ""),
        "capabilities": _read_capabilities(host_config),
        "command": config.get("Cmd") or [],
        "containerReadRefreshTimeoutMilliseconds": inputs.get("containerReadRefreshTimeoutMilliseconds", 15000),
        "cpuSet": host_config.get("CpusetCpus") or "",
        "cpuShares": host_config.get("CpuShares") or 0,
        "cpus": _write_cpus(host_config.get("NanoCpus") or 0),
        "domainname": config.get("Domainname") or "",
        "entrypoints": config.get("Entrypoint") or [],
        "envs": inputs.get("envs") or [],
        "exitCode": None if running else live["State"].get("ExitCode", 0),
        "healthcheck": _read_healthcheck(config.get("Healthcheck")),
        "hostname": config.get("Hostname") or "",
        "id": live["Id"],
        "image": live["Image"] if str(inputs.get("image", "")).startswith("sha256:") else config["Image"],
        "init": host_config.get("Init") or False,
        "ipcMode": host_config.get("IpcMode") or "",
        "labels": [
            {"label": item["label"], "value": item["value"]}
            for item in inputs.get("labels") or []
            if (config.get("Labels") or {}).get(item["label"]) == item["value"]
        ],
        "logDriver": host_config["LogConfig"]["Type"],
        "logOpts": (host_config["LogConfig"].get("Config") or {}) if inputs.get("logOpts") else None,
        "maxRetryCount": policy.get("MaximumRetryCount") or 0,
        "memory": (host_config.get("Memory") or 0) // MIB,
        "memoryReservation": (host_config.get("MemoryReservation") or 0) // MIB,
        "memorySwap": swap // MIB if swap > 0 else swap,
        "mounts": [_read_mount(mount) for mount in host_config.get("Mounts") or []],
        "mustRun": inputs.get("mustRun", True) and (running or not inputs.get("start", True)),
        "name": live["Name"].lstrip("/"),
        "networkDatas": [_read_network(name, data) for name, data in sorted((network.get("Networks") or {}).items())],
        "networkMode": host_config.get("NetworkMode") or "bridge",
        "platform": live.get("Platform") or "linux",
        "ports": _read_ports(host_config.get("PortBindings") or {}, published=network.get("Ports") or {}),
        "privileged": host_config.get("Privileged") or False,
        "publishAllPorts": host_config.get("PublishAllPorts") or False,
        "readOnly": host_config.get("ReadonlyRootfs") or False,
        "removeVolumes": inputs.get("removeVolumes", True),
        "restart": policy.get("Name") or "no",
        "runtime": host_config.get("Runtime") or "",
        "securityOpts": host_config.get("SecurityOpt") or [],
        "shmSize": (host_config.get("ShmSize") or 0) // MIB,
        "start": inputs.get("start", True),
        "stdinOpen": config.get("OpenStdin") or False,
        "stopSignal": config.get("StopSignal") or "",
        "stopTimeout": config.get("StopTimeout") or 0,
        "storageOpts": host_config.get("StorageOpt") or None,
        "tmpfs": host_config.get("Tmpfs") or None,
        "tty": config.get("Tty") or False,
        "ulimits": [
            {"hard": limit["Hard"], "name": limit["Name"], "soft": limit["Soft"]}
            for limit in (host_config.get("Ulimits") or [] if inputs.get("ulimits") else [])
        ],
        "user": config.get("User") or "",
        "usernsMode": host_config.get("UsernsMode") or "",
        "waitTimeout": inputs.get("waitTimeout", 60),
        "workingDir": config.get("WorkingDir") or "",
    }


def _read_capabilities(host_config: Mapping[str, Any]) -> Properties | None:
    adds, drops = host_config.get("CapAdd") or [], host_config.get("CapDrop") or []
    return {"adds": adds, "drops": drops} if adds or drops else None


def _read_mount(mount: Mapping[str, Any]) -> Properties:
    return {
        "bindOptions": None,
        "readOnly": mount.get("ReadOnly") or None,
        "source": mount.get("Source") or "",
        "target": mount["Target"],
        "tmpfsOptions": None,
        "type": mount["Type"],
        "volumeOptions": None,
    }


def _read_network(name: str, data: Mapping[str, Any]) -> Properties:
    return {
        "gateway": data.get("Gateway") or "",
        "globalIpv6Address": data.get("GlobalIPv6Address") or "",
        "globalIpv6PrefixLength": data.get("GlobalIPv6PrefixLen") or 0,
        "ipAddress": data.get("IPAddress") or "",
        "ipPrefixLength": data.get("IPPrefixLen") or 0,
        "ipv6Gateway": data.get("IPv6Gateway") or "",
        "macAddress": data.get("MacAddress") or "",
        "networkName": name,
    }


def _read_ports(bindings: Mapping[str, Any], *, published: Mapping[str, Any]) -> list[Properties]:
    """Return the ports as they were asked for, so that a stopped container has them too.

    Only a port that the engine was free to choose is taken from what is published now.
    """
    ports: list[Properties] = []
    for key, wanted in bindings.items():
        internal, _, protocol = key.partition("/")
        for index, binding in enumerate(wanted or []):
            external = int(binding.get("HostPort") or 0)
            live = published.get(key) or []
            if not external and index < len(live):
                external = int(live[index].get("HostPort") or 0)
            ports.append(
                {
                    "external": external,
                    "internal": int(internal),
                    "ip": binding.get("HostIp") or "0.0.0.0",
                    "protocol": protocol or "tcp",
                }
            )
    return sorted(ports, key=lambda port: (port["internal"], port["protocol"], port["ip"], port["external"]))


def _read_healthcheck(check: Mapping[str, Any] | None) -> Properties | None:
    if not check:
        return None
    return {
        "interval": _write_duration(check.get("Interval") or 0),
        "retries": check.get("Retries") or 0,
        "startInterval": _write_duration(check.get("StartInterval") or 0),
        "startPeriod": _write_duration(check.get("StartPeriod") or 0),
        "tests": check.get("Test") or [],
        "timeout": _write_duration(check.get("Timeout") or 0),
    }


def _write_cpus(nano: int) -> str | None:
    """Return billionths of a CPU as the official plugin writes them: `2.0`, `0.25`."""
    if not nano:
        return None
    whole, fraction = divmod(nano, 10**9)
    return f"{whole}.{f'{fraction:09d}'.rstrip('0') or '0'}"


def _write_duration(nanoseconds: int) -> str:
    """Return a duration as Go writes it: `0s`, `500ms`, `1m30s`."""
    if nanoseconds == 0:
        return "0s"
    for unit, size in (("ns", 1), ("µs", 10**3), ("ms", 10**6)):
        if nanoseconds < size * 1000 and size < 10**9:
            return f"{_trim(nanoseconds, size)}{unit}"
    minutes, rest = divmod(nanoseconds, 60 * 10**9)
    hours, minutes = divmod(minutes, 60)
    text = f"{_trim(rest, 10**9)}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def _trim(value: int, size: int) -> str:
    whole, fraction = divmod(value, size)
    if not fraction:
        return str(whole)
    digits = len(str(size)) - 1
    return f"{whole}.{str(fraction).zfill(digits).rstrip('0')}"
