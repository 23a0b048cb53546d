"""Ids of requests, which server and ingress must choose alike: the ingress signs them."""

from __future__ import annotations

import re
import uuid

_ACCEPTED = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""Accepted incoming ids; they cannot forge a log line or a header."""


def request_id_of(incoming: str) -> str:
    """The id of a request: its ``X-Request-ID`` if that is acceptable, else a new one."""
    return incoming if _ACCEPTED.fullmatch(incoming) else uuid.uuid4().hex
