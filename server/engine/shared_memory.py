"""Shared memory that processes have created under random names, and leave behind if they are killed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PREFIX = "/dev/shm/psm_"  # noqa: S108 - where Python's multiprocessing puts it


def mapped_segments(group: int) -> set[Path]:
    """The segments that the processes of a process group have mapped."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end meanwhile, or belong to somebody else
            if os.getpgid(int(folder.name)) != group:
                continue
            for line in (folder / "maps").read_text().splitlines():
                _, _, path = line.partition(_PREFIX)
                if path and not path.endswith(" (deleted)"):
                    found.add(Path(_PREFIX + path))
    return found


def remove_segments(segments: Iterable[Path]) -> None:
    """Remove segments whose processes have ended; those that are gone already are ignored."""
    for segment in segments:
        segment.unlink(missing_ok=True)
