"""Our Python language host: lets the plain Pulumi CLI run Python programs where the official host cannot be had.

The CLI starts `pulumi-language-python` (a launcher that runs this module with the project's own interpreter), reads a
port from its first line, and speaks gRPC to it: "run the program in this directory". The SDK's own in-process server,
the one behind the Automation API's inline programs, does the work; this module adds the calls that only the CLI makes,
and runs the entry point as `python .` would.
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2
from pulumi import RunError
from pulumi.automation._server import LanguageServer
from pulumi.runtime.proto import language_pb2, language_pb2_grpc, plugin_pb2

_MAX_MESSAGE_BYTES = 400 * 1024 * 1024
"""The size that Pulumi's engine and SDKs allow: state of thousands of resources goes through one message."""

_RUNNER = frozenset({__file__, "<frozen runpy>"})


class LanguageHost(LanguageServer):
    """Answers one engine; one program is run at a time."""

    def __init__(self, engine_address: str | None, *, stop: Callable[[], object]) -> None:
        super().__init__(lambda: None)
        self._engine_address = engine_address
        self._stop = stop

    def Handshake(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002
        """Take the engine's address, which newer engines send here and not as an argument."""
        self._engine_address = request.engine_address or self._engine_address
        return language_pb2.LanguageHandshakeResponse()

    def Run(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Run the program that the request names and report how it ended."""
        program = Path(request.info.program_directory, request.info.entry_point)
        os.chdir(request.pwd or request.info.program_directory)
        sys.argv = [str(program), *request.args]
        self.program = lambda: _run_file(program)
        del request.args[:]
        request.args.append(self._engine_address or "")
        response = super().Run(request, context)  # type: ignore[no-untyped-call]
        # The SDK has logged the error already; told again in the answer, the engine would show it twice.
        return language_pb2.RunResponse(bail=True) if response.error else response

    def GetPluginInfo(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002
        """Say which version this is."""
        return plugin_pb2.PluginInfo(version="1.0.0")

    def InstallDependencies(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: ARG002
        """Install nothing: this interpreter already has the locked dependencies."""
        yield language_pb2.InstallDependenciesResponse(stdout=b"The dependencies come from `make run`.\n")

    def GetProgramDependencies(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002
        """List the Python packages that the program can import."""
        found = sorted((package.metadata["Name"], package.version) for package in distributions())
        return language_pb2.GetProgramDependenciesResponse(
            dependencies=[language_pb2.DependencyInfo(name=name, version=version) for name, version in found]
        )

    def RuntimeOptionsPrompts(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002
        """Ask nothing."""
        return language_pb2.RuntimeOptionsResponse()

    def Cancel(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002
        """Stop serving, once this call is answered."""
        self._stop()
        return empty_pb2.Empty()


def _run_file(program: Path) -> None:
    """Run a directory with a `__main__.py`, or one file, as `python PROGRAM` would.

    Raises RunError, whose text the engine shows as it is, with the program's own lines of the traceback only.
    """
    sys.path.insert(0, str(program if program.is_dir() else program.parent))
    try:
        runpy.run_path(str(program), run_name="__main__")
    except RunError:
        raise
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            text = exit_.code if isinstance(exit_.code, str) else f"the program exited with code {exit_.code}"
            raise RunError(text) from exit_
    except Exception as error:
        own = itertools.dropwhile(lambda frame: frame.filename in _RUNNER, traceback.extract_tb(error.__traceback__))
        what = "".join(traceback.format_exception_only(error)).strip()
        raise RunError(f"{what}\n{''.join(traceback.format_list(list(own)))}".strip()) from error


def main(arguments: list[str]) -> None:
    """Print the port and serve until the CLI ends us."""
    stopped = threading.Event()
    # An interrupt reaches the whole process group. The CLI decides what to do about it and ends us in the end; a Python
    # traceback in the middle of its output helps nobody.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    addresses = [argument for argument in arguments if not argument.startswith("-")]
    server = grpc.server(
        ThreadPoolExecutor(max_workers=4),
        options=[
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ],
    )
    host = LanguageHost(addresses[0] if addresses else None, stop=stopped.set)
    language_pb2_grpc.add_LanguageRuntimeServicer_to_server(host, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)  # noqa: T201 - the plugin protocol: the first line is the port
    stopped.wait()
    server.stop(grace=0.2).wait()
    os._exit(0)  # a program that was interrupted may sit in a thread that Python would wait for


if __name__ == "__main__":
    main(sys.argv[1:])
