"""Reading a cluster's file: a mistake is one line that says where and what."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from provisioner.clusterfile import parse_cluster, path_of, read_cluster
from provisioner.errors import SettingsError
from stacks.spec import NodeSpec

HEAD = "config:\n  cluster:nodes:\n    - id: a\n    - id: b\n      host: ssh://b\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            f"{HEAD}      ports: {{ first: 80 }}\n",
            6,
            "node 'b': ports.first: Input should be greater than or equal to 10",
        ),
        (f"{HEAD}      max_instances: many\n", 6, "and it is 'many'."),
        (
            f"{HEAD}      ports: {{ first: 3000, last: 2000 }}\n",
            6,
            "node 'b': ports: ports.last must be above ports.first.",
        ),
        (f"{HEAD}      prots: 1\n", 6, "node 'b': 'prots' is unknown; allowed are id, host, "),
        (f"{HEAD}      ports: {{ frist: 1 }}\n", 6, "node 'b': ports: 'frist' is unknown; allowed are first, last."),
        (f"{HEAD}      availability: gone\n", 6, "node 'b': availability: Input should be 'active', 'cordoned' or "),
        (f"{HEAD}      volume: ebs\n", 4, "node 'b': volume: ebs needs cloud: "),
        (
            f"{HEAD}    - {{ id: c, host: 10.0.0.3:2376 }}\n",
            6,
            "node 'c': host: it should be unix:///PATH, tcp://HOST:PORT or",
        ),
        (f"{HEAD}    - host: ssh://c\n", 6, "node 3: id: Field required."),
        (f"{HEAD}    - {{ id: c, host: ssh://b }}\n", 6, "node 'c': node 'b' has the host ssh://b already."),
        (f"{HEAD}    - id: c\n", 6, "node 'c': node 'a' has the host unix:///var/run/docker.sock already."),
        (
            f"{HEAD}    - {{ id: c, host: tcp://b:2376, ports: {{ first: 24999, last: 30000 }} }}\n",
            6,
            "node 'c': its ports 24999-30000 overlap those of node 'b', 21000-24999, at the same address b: give one",
        ),
        (
            f"{HEAD}    - {{ id: c, host: tcp://127.0.0.1:2376 }}\n",
            6,
            "node 'c': its ports 21000-24999 overlap those of node 'a', 21000-24999, at the same address localhost",
        ),
        (f"{HEAD}    - id: a\n", 2, "two nodes are called 'a'."),
        (f"{HEAD}  cluster:node: []\n", 6, "cluster:node is unknown; allowed are cluster:nodes, "),
        (
            f"{HEAD}  cluster:offline: {{ action: run }}\n",
            6,
            "cluster:offline.action: Input should be 'wait' or 'move'",
        ),
        (f"{HEAD}  cluster:offline: {{ when: 1 }}\n", 6, "cluster:offline: 'when' is unknown; allowed are action, "),
        ("config:\n  cluster:nodes: []\n", 2, "cluster:nodes: a cluster needs at least one node."),
        ("config:\n  cluster:nodes: {}\n", 2, "cluster:nodes: "),
        (f"{HEAD}      id: c\n", 6, 'it is not YAML: found duplicate key "id"'),
        (f"{HEAD}   - id: c\n", 6, "it is not YAML: "),
        (f"{HEAD}\tid: c\n", 6, "it is not YAML: found character '\\t' that cannot start any token."),
        ("config: 3\n", 1, "config: it should be a list of keys and values"),
    ],
)
def test_a_mistake_is_one_line_with_file_line_and_node(text: str, line: int, said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_cluster(text, cluster="x", file="Pulumi.x.yaml")
    message = raised.value.message
    assert message.startswith(f"Pulumi.x.yaml, line {line}: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "host",
    [
        *("unix:///var/run/docker.sock", "tcp://10.0.0.3:2376", "tcp://[fd00::3]:2376", "tcp://node-b.example:2376/"),
        *("ssh://root@10.0.0.3", "ssh://b", "ssh://root@b:2222/run/user/1000/docker.sock"),
    ],
)
def test_an_engine_may_be_reached_by_socket_tcp_or_ssh(host: str) -> None:
    assert NodeSpec(id="a", host=host).host == host


@pytest.mark.parametrize(
    "host",
    [
        *("", "/var/run/docker.sock", "10.0.0.3:2376", "http://10.0.0.3:2375", "npipe:////./pipe/docker_engine"),
        *("unix://", "unix://run/docker.sock", "unix:///a\nb"),
        *(
            "tcp://",
            "tcp://10.0.0.3",
            "tcp://h:0",
            "tcp://h:99999",
            "tcp://h:x",
            "tcp://[::1",
            "tcp://u:p@h:1",
            "TCP://h:1",
        ),
        *("ssh://", "ssh://h:x", "ssh://root:secret@h"),
    ],
)
def test_what_is_no_engines_url_is_refused_before_anything_is_asked_there(host: str) -> None:
    with pytest.raises(ValidationError, match="it should be unix:///PATH, tcp://HOST:PORT or ssh://USER@HOST"):
        NodeSpec(id="a", host=host)


@pytest.mark.parametrize(
    "bind_ip", ["", "localhost", "b.example", "10.0.0.256", "10.0.0", "10.0.0.2:80", "fe80::1%eth0"]
)
def test_what_docker_would_take_for_every_address_is_none_to_bind_ports_to(bind_ip: str) -> None:
    with pytest.raises(ValidationError, match="it should be an IP address of the node"):
        NodeSpec(id="a", bind_ip=bind_ip)


@pytest.mark.parametrize("bind_ip", ["127.0.0.1", "10.0.0.2", "0.0.0.0", "::", "fd00::3"])
def test_ports_are_bound_to_one_address_or_to_all_if_so_asked(bind_ip: str) -> None:
    assert NodeSpec(id="a", bind_ip=bind_ip).bind_ip == bind_ip


def test_a_node_is_reached_where_its_engine_is_unless_the_file_says_otherwise() -> None:
    assert NodeSpec(id="a").address == "localhost"
    assert NodeSpec(id="a", host="ssh://root@far.example:2222").address == "far.example"
    assert NodeSpec(id="a", host="tcp://[fd00::3]:2376").address == "fd00::3"
    assert NodeSpec(id="a", host="tcp://10.0.0.3:2376", address="b.example").address == "b.example"


def test_one_ssh_server_may_lead_to_several_engines() -> None:
    more = "{ id: c, host: ssh://b, ssh_opts: [-p, '2202'], ports: { first: 25000, last: 25999 } }"
    text = f"{HEAD}      ssh_opts: [-p, '2201']\n    - {more}\n"
    assert [node.id for node in parse_cluster(text, cluster="x", file="x").nodes] == ["a", "b", "c"]


def test_a_document_that_is_no_map_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match="x: it should be a list of keys and values"):
        parse_cluster("- a\n", cluster="x", file="x")


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(SettingsError, match=r"\(1 more\)$"):
        parse_cluster(f"{HEAD}      prots: 1\n      hots: 2\n", cluster="x", file="x")


def test_keys_of_others_are_none_of_our_business() -> None:
    text = f"encryptionsalt: v1:abc\nsecretsprovider: passphrase\n{HEAD}  aws:region: eu\n  myapp:nodes: 3\n"
    assert [node.id for node in parse_cluster(text, cluster="x", file="x").nodes] == ["a", "b"]


def test_a_first_file_is_written_where_there_is_none(tmp_path: Path) -> None:
    spec = read_cluster(tmp_path, cluster="x")
    assert [node.id for node in spec.nodes] == ["local"]
    text = path_of(tmp_path, cluster="x").read_text()
    assert read_cluster(tmp_path, cluster="x") == spec
    assert path_of(tmp_path, cluster="x").read_text() == text


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path_of(tmp_path, cluster="x").write_bytes(b"config: \xff\n")
    with pytest.raises(SettingsError, match=r"Pulumi\.x\.yaml can't be read: it is not UTF-8"):
        read_cluster(tmp_path, cluster="x")
