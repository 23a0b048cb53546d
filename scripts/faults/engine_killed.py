"""The engine process is killed repeatedly, under load.

python -m scripts.faults.engine_killed --rounds 50
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

from scripts.faults.harness import Baseline, Load, Report, Uploads, check_end, main, serve
from tests.support.waiting import seconds_until


def run(folder: Path, *, rounds: int) -> Report:
    """Kill the engine ``rounds`` times, at random moments."""
    report, rng = Report(), random.Random(0)
    with serve(folder, "--pin", "intent") as server:
        load, uploads = Load(server), Uploads(server.client)
        before = Baseline.of(server)
        seconds = []
        with load:
            for _ in range(rounds):
                time.sleep(rng.uniform(0.2, 1.0))
                uploads.one()
                server.engine.kill()
                seconds_until(lambda: not server.is_ready(), 5)
                seconds.append(seconds_until(server.is_ready, 120))
        report.figure("times the engine was killed", rounds)
        restarts = server.value("engine_restarts_total")
        report.check("restarts counted", int(restarts), holds=restarts == rounds)
        times = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}"
        report.figure("time until ready, s: median, maximum", times)
        load.report(report)
        uploads.report(report)
        check_end(report, server, load, before)
    return report


if __name__ == "__main__":
    main(run, __doc__ or "", rounds=50)
