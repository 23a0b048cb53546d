"""Fields that the server adds to its log records."""

from __future__ import annotations

import logging
from typing import Any


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a record; empty if it has none."""
    fields: dict[str, Any] = vars(record).get("fields", {})
    return fields
