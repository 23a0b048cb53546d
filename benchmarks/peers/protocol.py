"""How a benchmark talks to another process: a file name per task, a marked line of JSON per reply.

A task is a JSON file. The benchmark writes its name to the process's standard input. The reply is one line of
standard output with a mark, because libraries print there too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

MARK = "peer: "


def reply_line(value: object) -> str:
    """The line that carries a value."""
    return MARK + json.dumps(value)


def next_reply(lines: Iterable[str]) -> Any:
    """The value of the next line with the mark; others are skipped.

    Raises:
        EOFError: If the lines end first.
    """
    for line in lines:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise EOFError("the process ended without a reply")
