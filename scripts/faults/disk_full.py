"""The disk of the store is full during uploads.

python -m scripts.faults.disk_full

Mounts a small file system for the store, which needs root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.faults.harness import Baseline, Load, Report, Server, Uploads, check_end, main, serve

MAX_UPLOADS = 2000


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[bool]:
    """Mount a file system of ``mebibytes`` at ``folder``; yields whether that worked."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run(folder: Path, *, mebibytes: int) -> Report:
    """Fill the disk of a new server."""
    report = Report()
    with small_disk(folder / "store", mebibytes) as is_mounted:
        if not is_mounted:
            report.figure("skipped", "no file system can be mounted here (not root, or no rights)")
            return report
        with serve(folder) as server:
            fill(server, report, ballast_bytes=mebibytes * 2**20 // 4)
    return report


def fill(server: Server, report: Report, *, ballast_bytes: int) -> None:
    """Upload until the disk is full, check the answers, and make room again.

    Args:
        server: A server whose store has a small file system to itself.
        report: Receives the findings.
        ballast_bytes: Size of a file that is deleted to make room.

    Raises:
        RuntimeError: If the disk does not fill up.
    """
    store = server.folder / "store"
    ballast = store / "ballast"
    ballast.write_bytes(bytes(ballast_bytes))
    load, uploads = Load(server), Uploads(server.client)
    before = Baseline.of(server)
    with load:
        while uploads.one():
            if len(uploads.acknowledged) > MAX_UPLOADS:
                raise RuntimeError("the disk does not fill up")
        full = [uploads.one() for _ in range(10)]
        report.check("uploads acknowledged on the full disk", sum(full), holds=not any(full))
        is_served = load.ask_each(server.client)
        report.check("answers while the disk is full", "unchanged", holds=is_served and server.is_ready())
        ballast.unlink()
        report.check("upload after room was made", "accepted", holds=uploads.one())
    load.report(report)
    uploads.report(report)
    check_end(report, server, load, before)
    staged = [path for path in (store / "staging").rglob("*") if path.is_file()]
    left = [path.name for path in staged if path.name != "lock"]
    report.check("files left in the staging area", left or 0, holds=not left)


if __name__ == "__main__":
    main(run, __doc__ or "", mebibytes=24)
