"""How the server's processes log: text for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType

from server.config import LogFormat

FIELDS = "fields"
"""Attribute of a log record with more JSON fields: ``logger.info(..., extra={FIELDS: {...}})``."""

LEVEL_VARIABLE = "PRELUDE_LOG_LEVEL"
FORMAT_VARIABLE = "PRELUDE_LOG_FORMAT"

_LIBRARIES = ("transformers", "huggingface_hub")
"""Those that bring a handler of their own, which would write lines of another form, or each line twice."""

_TALKATIVE = ("httpx", "httpx2", "httpcore")
"""Those that log every request that this process makes; it is ours that matter."""

logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``pid``, ``message``, and the ``FIELDS``."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        fields = getattr(record, FIELDS, None)
        if isinstance(fields, Mapping):
            line |= fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


def configure(level: str, form: LogFormat, *, process: str = "") -> None:
    """Send everything that is logged to the standard error.

    Args:
        level: Python's level name.
        form: How each line looks.
        process: A word that marks a text line as another process's.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonFormatter())
        sys.excepthook = _log_crash
    else:
        mark = f"{process} " if process else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {mark}%(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=form == "json")
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "DEBUG" else logging.WARNING)


def variables() -> dict[str, str]:
    """The variables by which another process of the server logs as this one does."""
    root = logging.getLogger()
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in root.handlers)
    return {LEVEL_VARIABLE: logging.getLevelName(root.level), FORMAT_VARIABLE: "json" if is_json else "text"}


def configure_from_variables(process: str) -> None:
    """Log as the process does that has started this one."""
    form: LogFormat = "json" if os.environ.get(FORMAT_VARIABLE) == "json" else "text"
    configure(os.environ.get(LEVEL_VARIABLE, "INFO"), form, process=process)


def _log_crash(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        logger.critical("the process ends by an error", exc_info=(kind, error, traceback))
