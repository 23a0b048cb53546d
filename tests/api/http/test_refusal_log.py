"""Log lines about refused connections: their fields and their number."""

from __future__ import annotations

import logging

import pytest

from server.api.http.refusal_log import LINES_PER_SECOND, Refusal, RefusalLog
from tests.support.log_records import fields_of


@pytest.fixture(autouse=True)
def _shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.api.http.refusal_log")


def test_a_line_has_the_known_fields(caplog: pytest.LogCaptureFixture) -> None:
    log = RefusalLog()
    log.log(Refusal(code="a", reason="because", status=431, request_id="r", client="1.2.3.4", tenant="acme"))
    log.log(Refusal(code="b", reason="no answer"))
    assert [fields_of(record) for record in caplog.records] == [
        {
            "request_id": "r",
            "tenant": "acme",
            "status": 431,
            "error": "a",
            "reason": "because",
            "client": "1.2.3.4",
        },
        {"error": "b", "reason": "no answer"},
    ]
    assert caplog.records[0].getMessage() == "refused: a, status 431, client 1.2.3.4, request r"


def test_lines_per_second_are_limited_and_omitted_lines_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 5.0
    log = RefusalLog(clock=lambda: now)
    for _ in range(1000):
        log.log(Refusal(code="flood", reason="x"))
    assert len(caplog.records) == LINES_PER_SECOND
    log.log(Refusal(code="other", reason="x"))
    assert len(caplog.records) == LINES_PER_SECOND + 1
    now = 6.0
    log.log(Refusal(code="flood", reason="x"))
    log.log(Refusal(code="flood", reason="x"))
    omitted = [fields_of(record).get("omitted") for record in caplog.records]
    assert omitted == [None] * (LINES_PER_SECOND + 1) + [1000 - LINES_PER_SECOND, None]
