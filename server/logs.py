"""Logging of the server's processes: text, or one JSON object per line."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO

from server.config import LogFormat

FIELDS = "fields"
"""Attribute of a log record with additional JSON fields: ``logger.info(..., extra={FIELDS: {...}})``."""

LEVEL_VARIABLE = "PRELUDE_LOG_LEVEL"
FORMAT_VARIABLE = "PRELUDE_LOG_FORMAT"
REPLICA_VARIABLE = "PRELUDE_REPLICA_NAME"

_LIBRARIES = ("transformers", "huggingface_hub")
"""Libraries that install their own handlers, which would write lines in another format, or twice."""

_VERBOSE = ("httpx", "httpx2", "httpcore")
"""Libraries that log every HTTP request of this process at level INFO."""

logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ``time`` (UTC), ``level``, ``logger``, ``pid``, ``message``, and the ``FIELDS``.

    Args:
        replica: Value of the field ``replica``; None leaves it out.
    """

    def __init__(self, replica: str | None = None) -> None:
        super().__init__()
        self.replica = replica

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if self.replica is not None:
            line["replica"] = self.replica
        fields = getattr(record, FIELDS, None)
        if isinstance(fields, Mapping):
            line |= fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to ``sys.stderr`` as it is when a line is written, because a progress display replaces it.

    Attributes:
        replica: Name of the server among the replicas of a cluster, if it has one.
    """

    replica: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


def configure(level: str, form: LogFormat, *, process: str = "", replica: str | None = None) -> None:
    """Log to standard error.

    Args:
        level: Python's level name.
        form: Format of a line.
        process: Name of the process in text lines.
        replica: Name of the server among the replicas of a cluster, in every line; None: it has none.
    """
    handler = _StandardError()
    if form == "json":
        handler.setFormatter(JsonFormatter(replica))
        sys.excepthook = _log_crash
    else:
        mark = "".join(f"{name} " for name in (replica, process) if name)
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {mark}%(name)s: %(message)s"))
    handler.replica = replica
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=form == "json")
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    for name in _VERBOSE:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "DEBUG" else logging.WARNING)


def is_json() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def variables() -> dict[str, str]:
    """Environment variables that make a child process log as this process does."""
    level = logging.getLevelName(logging.getLogger().level)
    found = {LEVEL_VARIABLE: level, FORMAT_VARIABLE: "json" if is_json() else "text"}
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _StandardError) and handler.replica is not None:
            found[REPLICA_VARIABLE] = handler.replica
    return found


def configure_from_variables(process: str) -> None:
    """Log as the parent process does; see ``variables``."""
    form: LogFormat = "json" if os.environ.get(FORMAT_VARIABLE) == "json" else "text"
    replica = os.environ.get(REPLICA_VARIABLE)
    configure(os.environ.get(LEVEL_VARIABLE, "INFO"), form, process=process, replica=replica)


def _log_crash(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        logger.critical("the process ends with an unhandled exception", exc_info=(kind, error, traceback))
