"""What the server adds to the records of its log."""

from __future__ import annotations

import logging
from typing import Any


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a record; empty where it has none."""
    fields: dict[str, Any] = vars(record).get("fields", {})
    return fields
