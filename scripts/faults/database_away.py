"""The catalog's database is unavailable for a while, under load and uploads.

python -m scripts.faults.database_away --rounds 5

Needs a PostgreSQL server, like the tests (PRELUDE_TEST_POSTGRES). A proxy in front of it cuts the connections.
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
    """Cut the connections to the database ``rounds`` times, for ``seconds`` each."""
    report = Report()
    with postgres_url() as direct:
        url = sa.make_url(direct)
        with closing(Proxy(url.port or 5432)) as proxy:
            url = url.set(host="127.0.0.1", port=proxy.port)
            with serve(folder, "--catalog", url.render_as_string(hide_password=False)) as server:
                load, uploads = Load(server), Uploads(server.client)
                before = Baseline.of(server)
                recovery_seconds, all_refused = [], True
                with load:
                    for _ in range(rounds):
                        uploads.one()
                        proxy.cut()
                        seconds_until(lambda: server.value("catalog_available") == 0, 10)
                        ends = time.monotonic() + seconds
                        while time.monotonic() < ends:
                            all_refused &= not uploads.one() and server.is_ready()
                            time.sleep(0.1)
                        proxy.mend()
                        recovery_seconds.append(seconds_until(uploads.one, 30))
                report.figure("times the database was unavailable", f"{rounds}, {seconds:.0f} s each")
                report.check("meanwhile: ready, and uploads refused", "always", holds=all_refused)
                times = f"{statistics.median(recovery_seconds):.2f}, {max(recovery_seconds):.2f}"
                report.figure("time until uploads are accepted, s: median, maximum", times)
                load.report(report)
                failed = sum(load.counts.values()) - load.counts["right"]
                report.check("requests for known soft prompts that failed", failed, holds=failed == 0)
                uploads.report(report)
                check_end(report, server, load, before, collects=False)
    return report


if __name__ == "__main__":
    main(run, __doc__ or "", rounds=5, seconds=3.0)
