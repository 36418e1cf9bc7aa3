"""The gRPC base of our plugins, over real connections, with a resource type that only remembers."""

# ruff: noqa: ARG002 - the signatures are the base class's and gRPC's

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import grpc
import pytest
from google.protobuf import empty_pb2
from pulumi.runtime.proto import engine_pb2_grpc, provider_pb2, provider_pb2_grpc

from provisioner.errors import NodeUnreachable, PortTaken, StillWanted
from provisioner.plugins.base import PluginServicer
from provisioner.plugins.failures import describe, read_code
from provisioner.plugins.host import PluginHost
from provisioner.plugins.resources import (
    Call,
    Change,
    ChangeKind,
    Checked,
    Created,
    Difference,
    Failure,
    Found,
    ResourceType,
)
from provisioner.plugins.sessions import Recent
from provisioner.plugins.values import UNKNOWN, Properties, has_unknowns, to_plain, to_struct

TOKEN = "toy:index:Thing"
URN = f"urn:pulumi:c1::p::{TOKEN}::a"


@dataclass
class Thing(ResourceType):
    """Does what the test says, and remembers."""

    computed: ClassVar[frozenset[str]] = frozenset({"address"})
    calls: list[tuple[str, str]] = field(default_factory=list)
    error: Exception | None = None
    busy: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_go_on: threading.Event = field(default_factory=threading.Event)
    replaced: bool | None = None
    cancelled: bool | None = None

    def check(self, call: Call, *, olds: Properties, news: Properties) -> Checked:
        failures = (Failure("size", "too big"),) if news.get("size") == 9 else ()
        return Checked(inputs=news | {"color": "red"}, failures=failures)

    def diff(self, call: Call, *, id: str, old_inputs: Any, old_outputs: Any, news: Properties) -> Difference:
        if old_outputs.get("size") == news.get("size"):
            return Difference()
        return Difference({"size": Change(ChangeKind.UPDATE, replace=True)})

    def create(self, call: Call, *, inputs: Properties) -> Created:
        self.calls.append((str(call.config["host"]), call.name))
        if self.error is not None:
            raise self.error
        if inputs.get("slow"):
            self.busy.release()
            assert self.may_go_on.wait(10)
        call.progress("half")
        call.warn("careful")
        return Created(id="1", outputs=inputs | {"address": "x", "nothing": None, "list": [1, {"a": 0.5}]})

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        if id == "out of reach":
            raise NodeUnreachable("It does not answer.")
        return None if id == "gone" else Found(id=id, inputs=inputs, outputs=outputs | {"seen": True})

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        self.replaced = call.replacing
        self.cancelled = call.cancelled.is_set()


class Toy(PluginServicer):
    package: ClassVar[str] = "toy"
    version: ClassVar[str] = "1.2.3"
    config_keys: ClassVar[frozenset[str]] = frozenset({"host"})


@pytest.fixture
def thing() -> Thing:
    return Thing()


@pytest.fixture
def host(thing: Thing) -> Iterator[PluginHost]:
    with PluginHost([Toy({TOKEN: thing})]) as host:
        yield host


@contextmanager
def connect(
    host: PluginHost, *, config: str | None = "one", engine: str = ""
) -> Iterator[provider_pb2_grpc.ResourceProviderStub]:
    """Connect as an engine does for one provider resource."""
    port = host.debug_providers.partition(":")[2]
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = provider_pb2_grpc.ResourceProviderStub(channel)
        stub.Handshake(provider_pb2.ProviderHandshakeRequest(engine_address=engine))
        if config is not None:
            stub.Configure(provider_pb2.ConfigureRequest(args=to_struct({"host": config})))
        yield stub


def create(
    stub: provider_pb2_grpc.ResourceProviderStub, urn: str = URN, *, preview: bool = False, **inputs: Any
) -> Any:
    return stub.Create(provider_pb2.CreateRequest(urn=urn, properties=to_struct(inputs), preview=preview))


def test_every_provider_resource_has_its_own_configuration(host: PluginHost, thing: Thing) -> None:
    with connect(host, config="one") as one, connect(host, config="two") as two:
        create(one)
        create(two, urn=URN.replace("::a", "::b"))
        create(one)
    assert thing.calls == [("one", "a"), ("two", "b"), ("one", "a")]


def test_outputs_come_back_as_they_were_given(host: PluginHost) -> None:
    with connect(host) as stub:
        answer = create(stub, size=3)
    assert answer.id == "1"
    assert to_plain(answer.properties) == {"size": 3, "address": "x", "nothing": None, "list": [1, {"a": 0.5}]}


def test_a_preview_creates_nothing_and_knows_what_it_cannot_know(host: PluginHost, thing: Thing) -> None:
    with connect(host) as stub:
        answer = create(stub, preview=True, size=UNKNOWN, __defaults=[])
    assert to_plain(answer.properties) == {"size": UNKNOWN, "address": UNKNOWN}
    assert thing.calls == []


def test_check_returns_inputs_and_failures(host: PluginHost) -> None:
    with connect(host) as stub:
        answer = stub.Check(provider_pb2.CheckRequest(urn=URN, news=to_struct({"size": 9})))
    assert to_plain(answer.inputs) == {"size": 9, "color": "red"}
    assert [(one.property, one.reason) for one in answer.failures] == [("size", "too big")]


def test_a_configuration_key_that_is_not_known_is_a_failure(host: PluginHost) -> None:
    with connect(host, config=None) as stub:
        news = to_struct({"host": "x", "version": "1", "__internal": {}, "certPath": "/x"})
        answer = stub.CheckConfig(provider_pb2.CheckRequest(urn=URN, news=news))
        assert [one.property for one in answer.failures] == ["certPath"]
        changed = stub.DiffConfig(
            provider_pb2.DiffRequest(olds=to_struct({"host": "a"}), news=to_struct({"host": "b"}))
        )
    assert (changed.changes, list(changed.diffs), list(changed.replaces)) == (
        provider_pb2.DiffResponse.DIFF_SOME,
        ["host"],
        [],
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PortTaken("Taken.", resolution="Wait."), grpc.StatusCode.ALREADY_EXISTS),
        (NodeUnreachable("Silence."), grpc.StatusCode.UNAVAILABLE),
        (StillWanted("Wanted."), grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
def test_an_error_of_ours_tells_what_to_do_and_its_code(
    host: PluginHost, thing: Thing, error: Any, status: grpc.StatusCode
) -> None:
    thing.error = error
    with connect(host) as stub, pytest.raises(grpc.RpcError) as caught:
        create(stub)
    assert caught.value.code() is status
    assert caught.value.details() == describe(error)
    assert read_code(f"1 error occurred:\n\t* {caught.value.details()}\n") == error.code


def test_a_bug_is_told_to_the_engine_as_a_failure_that_changed_nothing(host: PluginHost, thing: Thing) -> None:
    thing.error = ZeroDivisionError("oh")
    with connect(host) as stub, pytest.raises(grpc.RpcError) as caught:
        create(stub)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert "ZeroDivisionError: oh" in str(caught.value.details())


def test_calls_that_make_no_sense_are_refused(host: PluginHost) -> None:
    with connect(host, config=None) as stub, pytest.raises(grpc.RpcError, match="not configured"):
        create(stub)
    with connect(host) as stub, pytest.raises(grpc.RpcError, match=r"knows toy:index:Thing"):
        create(stub, urn="urn:pulumi:c1::p::toy:index:Other::a")
    with connect(host) as stub, pytest.raises(grpc.RpcError, match="needed now: size"):
        create(stub, size=UNKNOWN)


def test_a_resource_that_is_gone_reads_as_nothing(host: PluginHost) -> None:
    with connect(host) as stub:
        assert stub.Read(provider_pb2.ReadRequest(id="gone", urn=URN)).id == ""
        found = stub.Read(provider_pb2.ReadRequest(id="1", urn=URN, properties=to_struct({"size": 1})))
    assert (found.id, to_plain(found.properties)) == ("1", {"size": 1, "seen": True})


def test_an_operator_sees_what_is_out_of_reach_as_it_is_recorded_and_the_service_does_not(
    host: PluginHost, thing: Thing
) -> None:
    request = provider_pb2.ReadRequest(
        id="out of reach", urn=URN, inputs=to_struct({"size": 1}), properties=to_struct({"size": 1, "address": "x"})
    )
    with connect(host) as stub, pytest.raises(grpc.RpcError, match="It does not answer"):
        stub.Read(request)
    with PluginHost([Toy({TOKEN: thing}, engine_address="127.0.0.1:1")]) as own, connect(own) as stub:
        found = stub.Read(request)
        assert (found.id, found.inputs, found.properties) == (request.id, request.inputs, request.properties)
        with pytest.raises(grpc.RpcError, match="It does not answer"):  # nothing is recorded of what is to be imported
            stub.Read(provider_pb2.ReadRequest(id="out of reach", urn=URN))


def test_a_delete_knows_whether_it_makes_room_for_a_successor(host: PluginHost, thing: Thing) -> None:
    news = to_struct({"size": 2})
    with connect(host, engine="127.0.0.1:1") as stub, connect(host, engine="127.0.0.1:1") as another:
        stub.Delete(provider_pb2.DeleteRequest(id="1", urn=URN))
        assert thing.replaced is False
        answer = another.Diff(provider_pb2.DiffRequest(id="1", urn=URN, olds=to_struct({"size": 1}), news=news))
        assert (list(answer.replaces), answer.deleteBeforeReplace) == (["size"], True)
        stub.Delete(provider_pb2.DeleteRequest(id="1", urn=URN))
        assert thing.replaced is True
    with connect(host, engine="127.0.0.1:2") as next_run:
        next_run.Delete(provider_pb2.DeleteRequest(id="1", urn=URN))
    assert thing.replaced is False


def test_an_ignored_change_is_no_change(host: PluginHost) -> None:
    with connect(host) as stub:
        answer = stub.Diff(
            provider_pb2.DiffRequest(
                id="1", urn=URN, olds=to_struct({"size": 1}), news=to_struct({"size": 2}), ignoreChanges=["size"]
            )
        )
    assert answer.changes == provider_pb2.DiffResponse.DIFF_NONE


def test_calls_on_one_resource_wait_for_each_other_and_others_do_not(host: PluginHost, thing: Thing) -> None:
    with connect(host) as stub, connect(host) as another, ThreadPoolExecutor(3) as pool:
        first = pool.submit(create, stub, slow=True)
        assert thing.busy.acquire(timeout=10)
        second = pool.submit(create, another)
        create(another, urn=URN.replace("::a", "::b"))
        assert not second.done()
        assert [name for _, name in thing.calls] == ["a", "b"]
        thing.may_go_on.set()
        first.result(10)
        second.result(10)
    assert [name for _, name in thing.calls] == ["a", "b", "a"]


def test_progress_is_shown_by_the_engine_at_the_resource(host: PluginHost) -> None:
    heard: list[Any] = []

    class Engine(engine_pb2_grpc.EngineServicer):
        def Log(self, request: Any, context: Any) -> empty_pb2.Empty:
            heard.append((request.message, request.urn, request.ephemeral))
            return empty_pb2.Empty()

    server = grpc.server(ThreadPoolExecutor(1))
    engine_pb2_grpc.add_EngineServicer_to_server(Engine(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with connect(host, engine=f"127.0.0.1:{port}") as stub:
        create(stub)
        server.stop(0).wait()
        create(stub)  # an engine that is gone is nobody's error
    assert heard == [("half", URN, True), ("careful", URN, False)]


def test_an_interrupted_run_tells_its_calls_and_no_others(host: PluginHost, thing: Thing) -> None:
    request = provider_pb2.DeleteRequest(id="1", urn=URN)
    with connect(host, engine="127.0.0.1:1") as stub, connect(host, engine="127.0.0.1:2") as another:
        stub.Cancel(empty_pb2.Empty())
        stub.Delete(request)
        assert thing.cancelled is True
        another.Delete(request)
        assert thing.cancelled is False


def test_secrets_and_outputs_in_a_configuration_are_unwrapped() -> None:
    secret = {"4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270", "value": "s"}
    output = {"4dabf18193072939515e22adb298388d": "d0e6a833031e9bbcd3f4e8bde6ca49a4", "value": [1]}
    unknown = {"4dabf18193072939515e22adb298388d": "d0e6a833031e9bbcd3f4e8bde6ca49a4"}
    assert to_plain(to_struct({"a": secret, "b": output, "c": unknown})) == {"a": "s", "b": [1], "c": UNKNOWN}
    assert has_unknowns({"a": [{"b": UNKNOWN}]})
    assert not has_unknowns({"a": [{"b": 1}]})


def test_the_least_recently_used_is_forgotten() -> None:
    forgotten: list[str] = []
    recent = Recent(str.upper, keep=2, forget=forgotten.append)
    for key in ("a", "b", "a", "c"):
        recent.get(key)
    assert forgotten == ["B"]
    recent.clear()
    assert sorted(forgotten) == ["A", "B", "C"]
