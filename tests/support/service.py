"""A real service in a process of its own, with real Docker and the real Pulumi CLI."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
import httpx

from provisioner.settings import Settings
from provisioner.toolchain.environment import environment
from tests.support.ports import free_port
from tests.support.watched import PATIENCE_S, wait_until

ENGINE = "unix:///var/run/docker.sock"
STACK_LOCKED = "the stack is currently locked"
"""What the CLI says where somebody else's update is under way."""
_WHERE_THINGS_ARE = ("ledger", "state", "secrets_provider", "passphrase_file")
COMMAND = Path(sys.executable).parent / "machineuse"


class Service:
    """One service: start, stop, kill and restart it; talk to it by `http`; look behind it by `docker` and `pulumi`."""

    def __init__(
        self,
        project: Path,
        *,
        settings: dict[str, str],
        node: Mapping[str, object] | None = None,
        nodes: Sequence[Mapping[str, object]] | None = None,
        images: Mapping[str, str] | None = None,
        cluster_fields: Mapping[str, object] | None = None,
        beside: Service | None = None,
    ) -> None:
        """Make its cluster file: of one node on this machine's engine, changed by `node`, or of exactly these `nodes`.

        Or take over the file of the service `beside`, whose cluster it has too. `cluster_fields` are further `cluster:`
        keys. What is left on other engines than this machine's is theirs.
        """
        self.project = project
        self.cluster = beside.cluster if beside else f"t{secrets.token_hex(4)}"
        self.port = free_port()
        self.log_path = project / "serve.log"
        self.docker = docker.from_env()
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = {
            **os.environ,
            "MACHINEUSE_PROJECT_DIR": str(project),
            "MACHINEUSE_CLUSTER": self.cluster,
            "MACHINEUSE_PORT": str(self.port),
            "MACHINEUSE_LOG_FORMAT": "json",
            **{f"MACHINEUSE_{name.upper()}": value for name, value in settings.items()},
        }
        kept = {name: value for name, value in settings.items() if name in _WHERE_THINGS_ARE}
        self.settings = Settings.model_validate({"project_dir": project, "cluster": self.cluster, **kept})
        first = random.randrange(25000, 31000, 20)  # below the kernel's ephemeral ports; a range of its own per service
        self.ports = beside.ports if beside else range(first, first + 100)
        self._fields = dict(cluster_fields or {}) | ({} if images is None else {"images": dict(images)})
        local = {"id": "local", "host": ENGINE, "address": "127.0.0.1", **(node or {})}
        if beside:
            file = f"Pulumi.{self.cluster}.yaml"
            (project / file).write_text((beside.project / file).read_text())
        else:
            self.write_cluster_file([local] if nodes is None else nodes)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def write_cluster_file(self, nodes: Sequence[Mapping[str, object]]) -> None:
        """Write the cluster's file with these nodes, which get the service's range of ports unless they say theirs."""
        ports = {"first": self.ports.start, "last": self.ports.stop - 1}
        fields = {"nodes": [{"ports": ports, **node} for node in nodes], **self._fields}
        config = {f"cluster:{name}": value for name, value in fields.items()}
        (self.project / f"Pulumi.{self.cluster}.yaml").write_text(json.dumps({"config": config}))

    # ---- the process

    def start(self) -> None:
        """Start it and wait until it serves."""
        with self.log_path.open("ab") as out:
            self._process = subprocess.Popen(
                # It must not outlive a run of the tests that was killed.
                ["setpriv", "--pdeathsig", "KILL", str(COMMAND), "serve"],
                env=self.environment,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                if self.http.get("/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert self._process.poll() is None, f"the service ended:\n{self.log()}"
            assert time.monotonic() < deadline, f"the service does not serve:\n{self.log()}"
            time.sleep(0.05)

    def stop(self) -> int:
        """Ask it to stop and wait; return its exit code."""
        return self.end(signal.SIGTERM)

    def signal(self, how: signal.Signals) -> None:
        """Send it a signal and don't wait."""
        assert self._process is not None
        self._process.send_signal(how)

    def kill(self) -> int:
        """Kill it like a power cut would."""
        return self.end(signal.SIGKILL)

    def end(self, how: signal.Signals) -> int:
        """Send it a signal, unless it ended already, and wait; return its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(how)
        return self._process.wait(timeout=60)

    def end_if_running(self) -> None:
        """Kill it, if it has been started and not ended yet."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def log(self) -> str:
        """Return what it printed so far."""
        return self.log_path.read_text(errors="replace")

    def events(self, name: str = "", *, after: int = 0) -> list[dict[str, Any]]:
        """Return what it logged so far, from the entry `after` on; or only the entries with this name."""
        entries = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")][after:]
        return [entry for entry in entries if name in ("", entry["event"])]

    def clean_up(self) -> None:
        """Stop it and remove every container, volume, network and image that is labelled with its cluster."""
        self.end_if_running()
        self.http.close()
        mine = {"label": f"machineuse.cluster={self.cluster}"}
        for container in self.docker.containers.list(all=True, filters=mine, ignore_removed=True):
            container.remove(force=True)
        for volume in self.docker.volumes.list(filters=mine):
            volume.remove(force=True)
        for network in self.docker.networks.list(filters=mine):
            network.remove()
        for image in self.docker.images.list(filters=mine):
            self.docker.images.remove(image.id, force=True)
        self.docker.close()

    # ---- talking to it

    def create(self, *, wait_s: int = 60, **body: Any) -> dict[str, Any]:
        """Create an instance and return it."""
        answer = self.http.post("/v2/instances", json=body, headers={"Prefer": f"wait={wait_s}"})
        assert answer.status_code == 201, answer.text
        instance: dict[str, Any] = answer.json()
        return instance

    def get(self, instance_id: str) -> dict[str, Any]:
        """Return an instance."""
        answer = self.http.get(f"/v2/instances/{instance_id}")
        assert answer.status_code == 200, answer.text
        instance: dict[str, Any] = answer.json()
        return instance

    def post(self, path: str, *, wait_s: int = 60, **body: Any) -> httpx.Response:
        """Post to a path below /v2/instances/."""
        return self.http.post(f"/v2/instances/{path}", json=body or None, headers={"Prefer": f"wait={wait_s}"})

    def delete(self, instance_id: str, *, force: bool = False, wait_s: int = 60) -> httpx.Response:
        """Delete an instance."""
        return self.http.delete(
            f"/v2/instances/{instance_id}", params={"force": force}, headers={"Prefer": f"wait={wait_s}"}
        )

    def wait_for(self, instance_id: str, status: str, *, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait until an instance has a status; return it."""
        deadline = time.monotonic() + timeout_s
        while True:
            instance = self.get(instance_id)
            if instance["status"] == status:
                return instance
            assert time.monotonic() < deadline, f"{instance}\n{self.log()[-4000:]}"
            time.sleep(0.05)

    def events_of(self, instance_id: str) -> list[dict[str, Any]]:
        """Return what has happened to an instance, as the API tells it."""
        answer = self.http.get(f"/v2/instances/{instance_id}/events", params={"limit": 1000})
        events: list[dict[str, Any]] = answer.raise_for_status().json()
        return events

    def node(self, node_id: str = "local") -> dict[str, Any]:
        """Return a node."""
        node: dict[str, Any] = self.http.get(f"/v2/nodes/{node_id}").raise_for_status().json()
        return node

    def wait_for_node(self, node_id: str, status: str) -> dict[str, Any]:
        """Wait until a node has a status; return it."""
        return wait_until(
            lambda: found if (found := self.node(node_id))["status"] == status else None,
            what=f"node {node_id} is {status}",
        )

    # ---- looking behind it

    def pulumi(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run the Pulumi CLI in the project as an operator would: again where the service held the stack."""
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(
                ["pulumi", *arguments, "--non-interactive", "--color", "never"],
                cwd=self.project,
                env={**self.environment, **environment(self.settings), **extra},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if STACK_LOCKED not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(0.2)

    def machineuse(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run the command `machineuse` with this service's settings, as a person in a shell would."""
        return subprocess.run(
            [str(COMMAND), *arguments],
            cwd=self.project,
            env={**self.environment, **extra},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def assert_unchanged(self, *arguments: str) -> None:
        """Fail unless an operator's preview shows no changes; `--refresh` asks the nodes, too."""
        done = self.pulumi("preview", "--stack", self.cluster, "--expect-no-changes", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    def health(self) -> dict[str, Any]:
        """Return what it says of itself."""
        answer: dict[str, Any] = self.http.get("/health").raise_for_status().json()
        return answer

    def urns(self) -> list[str]:
        """Return the URNs in the cluster's stack."""
        state = json.loads(self.pulumi("stack", "export", "--stack", self.cluster).stdout)
        return [resource["urn"] for resource in state["deployment"].get("resources", [])]

    def container(self, instance_id: str) -> Any:
        """Return an instance's container, as Docker knows it."""
        return self.docker.containers.get(self.container_name(instance_id))

    def container_name(self, instance_id: str) -> str:
        """Return the name of an instance's container."""
        return f"machineuse-{self.cluster}-{instance_id}"

    def network(self) -> str:
        """Return the name of the cluster's network."""
        (network,) = self.docker.networks.list(filters={"label": f"machineuse.cluster={self.cluster}"})
        return str(network.name)

    def volumes(self) -> list[str]:
        """Return the names of the cluster's volumes."""
        return [v.name for v in self.docker.volumes.list(filters={"label": f"machineuse.cluster={self.cluster}"})]
