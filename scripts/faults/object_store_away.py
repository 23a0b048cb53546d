"""The object store is unavailable, then slow, under load and uploads.

python -m scripts.faults.object_store_away --rounds 5

A proxy in front of moto's S3 server cuts connections, or delays the data.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

from scripts.faults.harness import Baseline, Load, Proxy, Report, Uploads, check_end, main, serve
from tests.prompt_store.s3_server import BUCKET, s3_server
from tests.support.waiting import seconds_until


def run(folder: Path, *, rounds: int, seconds: float) -> Report:
    """Cut the connections to the object store ``rounds`` times, for ``seconds`` each, then make it slow."""
    report = Report()
    with s3_server() as s3, closing(Proxy(s3.port)) as proxy:
        environment = {**os.environ, **s3.environment, "AWS_ENDPOINT": f"http://127.0.0.1:{proxy.port}"}
        flags = ("--cache", str(folder / "cache"), "--catalog", f"sqlite:///{folder / 'catalog.sqlite3'}")
        with serve(folder, *flags, store=f"s3://{BUCKET}/faults", environment=environment) as server:
            server.client.timeout = 120
            load, uploads = Load(server), Uploads(server.client)
            before = Baseline.of(server)
            recovery_seconds = []
            with load:
                for _ in range(rounds):
                    uploads.one()
                    proxy.cut()
                    ends = time.monotonic() + seconds
                    while time.monotonic() < ends:
                        uploads.one()
                        time.sleep(0.1)
                    proxy.mend()
                    recovery_seconds.append(seconds_until(uploads.one, 60))
                proxy.delay = 0.5
                began = time.monotonic()
                report.check("upload to the slow object store", "accepted", holds=uploads.one())
                report.figure("time of that upload, s", f"{time.monotonic() - began:.1f}")
                proxy.delay = 0.0
            report.figure("times the object store was unavailable", f"{rounds}, {seconds:.0f} s each")
            report.figure("longest time until uploads are accepted, s", f"{max(recovery_seconds):.2f}")
            load.report(report)
            failed = sum(load.counts.values()) - load.counts["right"]
            report.check("requests for cached soft prompts that failed", failed, holds=failed == 0)
            uploads.report(report)
            check_end(report, server, load, before)
    return report


if __name__ == "__main__":
    main(run, __doc__ or "", rounds=5, seconds=3.0)
