"""Where log entries go: one readable line each on a terminal, JSON elsewhere, and JSON in the data directory.

Everything goes through the standard library's handlers, so what uvicorn, alembic and others log looks the same.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path
from typing import Literal, TextIO

import structlog
from structlog.typing import Processor

MAX_FILE_BYTES = 5_000_000
FILES_KEPT = 4

OURS = ("api", "provisioner", "stacks")
"""Packages that log from level INFO on; everybody else only warns."""


def configure_logs(
    *, log_format: Literal["auto", "text", "json"], directory: Path | None = None, stream: TextIO | None = None
) -> None:
    """Send log entries to `stream` (standard error by default) and, as JSON, to rotating files in `directory`."""
    stream = stream or sys.stderr
    terminal = stream.isatty()
    as_text = log_format == "text" or (log_format == "auto" and terminal)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.stdlib.PositionalArgumentsFormatter(),
    ]
    to_stream = logging.StreamHandler(stream)
    to_stream.setFormatter(_text_formatter(shared, colors=terminal) if as_text else _json_formatter(shared))
    handlers: list[logging.Handler] = [to_stream]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        to_file = logging.handlers.RotatingFileHandler(
            directory / "machineuse.log", maxBytes=MAX_FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"
        )
        to_file.setFormatter(_json_formatter(shared))
        handlers.append(to_file)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),  # what passes is the handlers' affair
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def quiet_logs() -> None:
    """Leave warnings only, on standard error: for commands, whose output people read."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


def _text_formatter(shared: list[Processor], *, colors: bool) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=colors, sort_keys=False, pad_event_to=24, exception_formatter=structlog.dev.plain_traceback
            ),
        ],
    )


def _json_formatter(shared: list[Processor]) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
