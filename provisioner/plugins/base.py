"""The gRPC side of a Pulumi plugin, once for all of ours.

`PluginServicer` answers what the engine (CLI 3.256) asks: Handshake, Attach, GetPluginInfo, GetSchema, CheckConfig,
DiffConfig, Configure, Cancel, and per resource Check, Diff, Create, Read, Update, Delete. The latter it hands to the
package's resource types (`resources.ResourceType`) as plain Python. Invoke, Call and Construct stay unimplemented.

Calls on one URN are serialised: a CLI that was killed leaves a create running here, and the next run's create of the
same resource must wait for it, to adopt what it made.
"""

# ruff: noqa: ARG002 - the signatures are gRPC's

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar

import grpc
import structlog
from google.protobuf import empty_pb2, message
from pulumi.runtime.proto import plugin_pb2, provider_pb2, provider_pb2_grpc

from provisioner.errors import InvalidRequest, MachineuseError, NodeUnreachable
from provisioner.plugins.failures import describe, status_of
from provisioner.plugins.resources import Call, ChangeKind, Difference, Failure, ResourceType
from provisioner.plugins.sessions import (
    CONNECTIONS_KEPT,
    SESSIONS_KEPT,
    Connection,
    KeyedLocks,
    Recent,
    Session,
)
from provisioner.plugins.values import UNKNOWN, Properties, has_unknowns, to_plain, to_struct

log = structlog.get_logger(__name__)

_HIDDEN = ("__defaults", "__internal")
_KINDS = {
    (ChangeKind.ADD, False): provider_pb2.PropertyDiff.ADD,
    (ChangeKind.ADD, True): provider_pb2.PropertyDiff.ADD_REPLACE,
    (ChangeKind.DELETE, False): provider_pb2.PropertyDiff.DELETE,
    (ChangeKind.DELETE, True): provider_pb2.PropertyDiff.DELETE_REPLACE,
    (ChangeKind.UPDATE, False): provider_pb2.PropertyDiff.UPDATE,
    (ChangeKind.UPDATE, True): provider_pb2.PropertyDiff.UPDATE_REPLACE,
}

S = TypeVar("S", bound="PluginServicer")
Q = TypeVar("Q", bound=message.Message)
A = TypeVar("A", bound=message.Message)


def _answering_errors(method: Callable[[S, Q, grpc.ServicerContext], A]) -> Callable[[S, Q, grpc.ServicerContext], A]:
    """Turn what a method raises into a status that the engine can show."""

    @functools.wraps(method)
    def guarded(self: S, request: Q, context: grpc.ServicerContext) -> A:
        try:
            return method(self, request, context)
        except MachineuseError as error:
            log.info(
                "plugin call failed",
                package=self.package,
                call=method.__name__,
                urn=getattr(request, "urn", ""),
                error=error.message,
                detail=error.detail,
            )
            context.abort(status_of(error), describe(error))
        except Exception as error:  # the outermost frame: the engine must get an answer
            log.exception("plugin call crashed", package=self.package, call=method.__name__)
            context.abort(grpc.StatusCode.ABORTED, f"{type(error).__name__}: {error} [internal_error]")
        raise AssertionError("unreachable: abort raises")

    return guarded


class _ResourceRequest(Protocol):
    @property
    def urn(self) -> str: ...


class PluginServicer(provider_pb2_grpc.ResourceProviderServicer):
    """Serves one Pulumi package; subclasses say which, and bring its resource types."""

    package: ClassVar[str]
    version: ClassVar[str]
    config_keys: ClassVar[frozenset[str]] = frozenset()
    """What a provider resource of the package may be configured with."""
    schema: ClassVar[str] = ""
    """The package's schema as JSON, for tools that ask; empty = name and version only."""

    def __init__(self, resource_types: Mapping[str, ResourceType], *, engine_address: str = "") -> None:
        """Serve `resource_types`, by type token; `engine_address` is for a plugin that one engine started."""
        self._types = dict(resource_types)
        self._own_engine = engine_address
        self._sessions: Recent[str, Session] = Recent(Session, keep=SESSIONS_KEPT, forget=Session.close)
        self._connections: Recent[str, Connection] = Recent(
            lambda _: Connection(session=self._sessions.get(self._own_engine)), keep=CONNECTIONS_KEPT
        )
        self._locks = KeyedLocks()

    def close(self) -> None:
        """Drop all connections to engines."""
        self._connections.clear()
        self._sessions.clear()

    # --- the plugin as a whole ---

    @_answering_errors
    def Handshake(
        self, request: provider_pb2.ProviderHandshakeRequest, context: grpc.ServicerContext
    ) -> provider_pb2.ProviderHandshakeResponse:
        connection = self._connection(context)
        connection.session = self._sessions.get(request.engine_address)
        connection.config = None  # an earlier connection may have come from the same port
        return provider_pb2.ProviderHandshakeResponse()

    @_answering_errors
    def Attach(self, request: plugin_pb2.PluginAttach, context: grpc.ServicerContext) -> empty_pb2.Empty:
        self._connection(context).session = self._sessions.get(request.address)
        return empty_pb2.Empty()

    @_answering_errors
    def GetPluginInfo(self, request: empty_pb2.Empty, context: grpc.ServicerContext) -> plugin_pb2.PluginInfo:
        return plugin_pb2.PluginInfo(version=self.version)

    @_answering_errors
    def GetSchema(
        self, request: provider_pb2.GetSchemaRequest, context: grpc.ServicerContext
    ) -> provider_pb2.GetSchemaResponse:
        minimal = f'{{"name": "{self.package}", "version": "{self.version}"}}'
        return provider_pb2.GetSchemaResponse(schema=self.schema or minimal)

    @_answering_errors
    def CheckConfig(
        self, request: provider_pb2.CheckRequest, context: grpc.ServicerContext
    ) -> provider_pb2.CheckResponse:
        unknown = set(to_plain(request.news)) - self.config_keys - {"version", *_HIDDEN}
        return provider_pb2.CheckResponse(
            inputs=request.news,
            failures=[
                provider_pb2.CheckFailure(
                    property=key, reason=f"The {self.package} plugin of Machineuse has no '{key}'."
                )
                for key in sorted(unknown)
            ],
        )

    @_answering_errors
    def DiffConfig(self, request: provider_pb2.DiffRequest, context: grpc.ServicerContext) -> provider_pb2.DiffResponse:
        olds, news = to_plain(request.olds), to_plain(request.news)
        changed = sorted(key for key in self.config_keys if olds.get(key) != news.get(key))
        # Never a replacement of the provider: that would replace everything it serves.
        changes = provider_pb2.DiffResponse.DIFF_SOME if changed else provider_pb2.DiffResponse.DIFF_NONE
        return provider_pb2.DiffResponse(changes=changes, diffs=changed)

    @_answering_errors
    def Configure(
        self, request: provider_pb2.ConfigureRequest, context: grpc.ServicerContext
    ) -> provider_pb2.ConfigureResponse:
        self._connection(context).config = to_plain(request.args)
        return provider_pb2.ConfigureResponse(supportsPreview=True)

    @_answering_errors
    def Cancel(self, request: empty_pb2.Empty, context: grpc.ServicerContext) -> empty_pb2.Empty:
        self._connection(context).session.cancelled.set()
        return empty_pb2.Empty()

    # --- resources ---

    @_answering_errors
    def Check(self, request: provider_pb2.CheckRequest, context: grpc.ServicerContext) -> provider_pb2.CheckResponse:
        call, kind = self._begin(request, context)
        checked = kind.check(call, olds=to_plain(request.olds), news=to_plain(request.news))
        return provider_pb2.CheckResponse(
            inputs=to_struct(checked.inputs), failures=[_failure(failure) for failure in checked.failures]
        )

    @_answering_errors
    def Diff(self, request: provider_pb2.DiffRequest, context: grpc.ServicerContext) -> provider_pb2.DiffResponse:
        call, kind = self._begin(request, context)
        difference = kind.diff(
            call,
            id=request.id,
            old_inputs=to_plain(request.old_inputs),
            old_outputs=to_plain(request.olds),
            news=to_plain(request.news),
        )
        answer = _difference(difference, ignore=set(request.ignoreChanges))
        if answer.replaces:
            call.session.replacing.add(request.urn)
        return answer

    @_answering_errors
    def Create(self, request: provider_pb2.CreateRequest, context: grpc.ServicerContext) -> provider_pb2.CreateResponse:
        call, kind = self._begin(request, context)
        inputs = to_plain(request.properties)
        if request.preview:
            outputs = {key: value for key, value in inputs.items() if key not in _HIDDEN}
            outputs.update({key: UNKNOWN for key in kind.computed if key not in inputs})
            return provider_pb2.CreateResponse(properties=to_struct(outputs))
        _refuse_unknowns(inputs)
        with self._alone(request):
            created = kind.create(call, inputs=inputs)
        return provider_pb2.CreateResponse(id=created.id, properties=to_struct(created.outputs))

    @_answering_errors
    def Read(self, request: provider_pb2.ReadRequest, context: grpc.ServicerContext) -> provider_pb2.ReadResponse:
        call, kind = self._begin(request, context)
        outputs = to_plain(request.properties)
        try:
            found = kind.read(call, id=request.id, inputs=to_plain(request.inputs), outputs=outputs)
        except NodeUnreachable as error:
            # One silent node must not keep an operator from seeing what became of all others. Only of an operator: the
            # service refreshes to find out, and leaves silent nodes out itself.
            if not (self._own_engine and outputs):
                raise
            call.warn(f"{error.explain()} Taken to be as it is recorded.")
            return provider_pb2.ReadResponse(id=request.id, inputs=request.inputs, properties=request.properties)
        if found is None:
            return provider_pb2.ReadResponse()
        return provider_pb2.ReadResponse(
            id=found.id, inputs=to_struct(found.inputs), properties=to_struct(found.outputs)
        )

    @_answering_errors
    def Update(self, request: provider_pb2.UpdateRequest, context: grpc.ServicerContext) -> provider_pb2.UpdateResponse:
        call, kind = self._begin(request, context)
        olds, news = to_plain(request.olds), to_plain(request.news)
        if request.preview:
            outputs = olds | {key: value for key, value in news.items() if key not in _HIDDEN}
            return provider_pb2.UpdateResponse(properties=to_struct(outputs))
        _refuse_unknowns(news)
        with self._alone(request):
            outputs = kind.update(
                call, id=request.id, old_inputs=to_plain(request.old_inputs), old_outputs=olds, news=news
            )
        return provider_pb2.UpdateResponse(properties=to_struct(outputs))

    @_answering_errors
    def Delete(self, request: provider_pb2.DeleteRequest, context: grpc.ServicerContext) -> empty_pb2.Empty:
        call, kind = self._begin(request, context)
        with self._alone(request):
            kind.delete(call, id=request.id, inputs=to_plain(request.old_inputs), outputs=to_plain(request.properties))
        return empty_pb2.Empty()

    # --- without an engine ---

    def create_ahead(self, urn: str, *, config: Mapping[str, Any], news: Properties) -> None:
        """Create a resource that an engine is about to ask for: its own create waits for this one, and adopts.

        `config` and `news` are what the engine will come with. Raises what creating raises; the engine's create meets
        the same then, and tells it.
        """
        token, name = urn.split("::")[2].split("$")[-1], urn.split("::")[-1]
        kind = self._types[token]
        call = Call(urn=urn, name=name, config=config, session=self._sessions.get(""))
        inputs = kind.check(call, olds={}, news=news).inputs
        self._locks.acquire(urn)
        try:
            kind.create(call, inputs=inputs)
        finally:
            self._locks.release(urn)

    # --- behind them ---

    def _connection(self, context: grpc.ServicerContext) -> Connection:
        return self._connections.get(context.peer())

    def _begin(self, request: Any, context: grpc.ServicerContext) -> tuple[Call, ResourceType]:
        connection = self._connection(context)
        if connection.config is None:
            raise InvalidRequest(f"The {self.package} plugin was not configured before it was used.")
        token = request.type or request.urn.split("::")[2].split("$")[-1]
        kind = self._types.get(token)
        if kind is None:
            raise InvalidRequest(
                f"The {self.package} plugin of Machineuse does not know the resource type '{token}'.",
                resolution=f"It knows {', '.join(sorted(self._types))}.",
            )
        call = Call(
            urn=request.urn,
            name=request.name or request.urn.split("::")[-1],
            config=connection.config,
            session=connection.session,
            timeout_s=getattr(request, "timeout", 0.0) or None,
        )
        return call, kind

    @contextmanager
    def _alone(self, request: _ResourceRequest) -> Iterator[None]:
        self._locks.acquire(request.urn)
        try:
            yield
        finally:
            self._locks.release(request.urn)


def _failure(failure: Failure) -> provider_pb2.CheckFailure:
    return provider_pb2.CheckFailure(property=failure.property, reason=failure.reason)


def _difference(difference: Difference, *, ignore: set[str]) -> provider_pb2.DiffResponse:
    changes = {key: change for key, change in difference.changes.items() if key not in ignore}
    return provider_pb2.DiffResponse(
        changes=provider_pb2.DiffResponse.DIFF_SOME if changes else provider_pb2.DiffResponse.DIFF_NONE,
        diffs=sorted(changes),
        replaces=sorted(key for key, change in changes.items() if change.replace),
        deleteBeforeReplace=difference.delete_before_replace,
        hasDetailedDiff=True,
        detailedDiff={
            key: provider_pb2.PropertyDiff(kind=_KINDS[change.kind, change.replace]) for key, change in changes.items()
        },
    )


def _refuse_unknowns(properties: Properties) -> None:
    unknown = sorted(key for key, value in properties.items() if has_unknowns(value))
    if unknown:
        raise InvalidRequest(f"Not known, but needed now: {', '.join(unknown)}.")
