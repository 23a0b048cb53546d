"""The database of the catalog goes away and comes back, under load and uploads.

python -m scripts.faults.database_away --rounds 5

It takes a PostgreSQL server, as the tests do (PRELUDE_TEST_POSTGRES); a proxy in front of it fails, not the server.
"""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from scripts.faults.harness import Baseline, Load, Proxy, Report, Uploads, check_end, main, serve
from tests.prompt_store.databases import postgres_url
from tests.support.waiting import seconds_until


def run(folder: Path, *, rounds: int, seconds: float) -> Report:
    """Cut the way to the database so many times, each for so many seconds."""
    report = Report()
    with postgres_url() as direct:
        url = sa.make_url(direct)
        with closing(Proxy(url.port or 5432)) as proxy:
            url = url.set(host="127.0.0.1", port=proxy.port)
            with serve(folder, "--catalog", url.render_as_string(hide_password=False)) as server:
                load, uploads = Load(server), Uploads(server.client)
                before = Baseline.of(server)
                back, is_told = [], True
                with load:
                    for _ in range(rounds):
                        uploads.one()
                        proxy.cut()
                        seconds_until(lambda: server.value("catalog_available") == 0, 10)
                        ends = time.monotonic() + seconds
                        while time.monotonic() < ends:
                            is_told &= not uploads.one() and server.is_ready()
                            time.sleep(0.1)
                        proxy.mend()
                        back.append(seconds_until(uploads.one, 30))
                report.figure("times the database was away", f"{rounds}, {seconds:.0f} s each")
                report.check("meanwhile: ready, and uploads refused", "always", holds=is_told)
                times = f"{statistics.median(back):.2f}, {max(back):.2f}"
                report.figure("uploads taken again after, s: median, longest", times)
                load.report(report)
                failed = sum(load.counts.values()) - load.counts["right"]
                report.check("requests for known soft prompts that failed", failed, holds=failed == 0)
                uploads.report(report)
                check_end(report, server, load, before, collects=False)
    return report


if __name__ == "__main__":
    main(run, __doc__ or "", rounds=5, seconds=3.0)
