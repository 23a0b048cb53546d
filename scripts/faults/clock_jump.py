"""The wall clock jumps by hours, forwards and back, under load.

python -m scripts.faults.clock_jump

Needs libfaketime (apt-get install libfaketime), which is preloaded into the server's processes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from scripts.faults.harness import Baseline, Load, Report, Uploads, check_end, main, serve

JUMPS = ("+3h", "-3h", "+400d", "-400d", "+0")


def run(folder: Path, *, seconds: float) -> Report:
    """Move the server's clock by each of the jumps, for ``seconds`` each."""
    report = Report()
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        report.figure("skipped", "libfaketime is not installed")
        return report
    offset = folder / "offset"
    offset.write_text("+0\n")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    flags = ("--max-wait-seconds", "30", "--step-timeout", "20", "--head-timeout", "10", "--body-timeout", "10")
    with serve(folder, *flags, environment=environment) as server:
        load, uploads = Load(server), Uploads(server.client)
        before = Baseline.of(server)
        created = []
        with load:
            for jump in JUMPS:
                offset.write_text(f"{jump}\n")
                ends = time.monotonic() + seconds
                while time.monotonic() < ends:
                    uploads.one()
                    time.sleep(0.1)
                created.append(server.client.post("/v1/completions", json={"prompt": "x"}).json()["created"])
        moved = [round((moment - time.time()) / 3600) for moment in created]
        report.check("the server's clock was off by, hours", moved, holds=moved == [3, -3, 9600, -9600, 0])
        load.report(report)
        failed = sum(load.counts.values()) - load.counts["right"]
        report.check("requests that failed", failed, holds=failed == 0)
        restarts = int(server.value("engine_restarts_total"))
        report.check("restarts of the engine", restarts, holds=restarts == 0)
        uploads.report(report)
        check_end(report, server, load, before)
    return report


if __name__ == "__main__":
    main(run, __doc__ or "", seconds=3.0)
