"""The object store fails and is slow, under load and uploads.

python -m scripts.faults.object_store_away --rounds 5

moto's S3 server stands behind a proxy that cuts connections, or holds each of them up.
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
    """Cut the way to the object store so many times, then make it slow."""
    report = Report()
    with s3_server() as s3, closing(Proxy(s3.port)) as proxy:
        environment = {**os.environ, **s3.environment, "AWS_ENDPOINT": f"http://127.0.0.1:{proxy.port}"}
        flags = ("--cache", str(folder / "cache"), "--catalog", f"sqlite:///{folder / 'catalog.sqlite3'}")
        with serve(folder, *flags, store=f"s3://{BUCKET}/faults", environment=environment) as server:
            server.client.timeout = 120
            load, uploads = Load(server), Uploads(server.client)
            before = Baseline.of(server)
            back = []
            with load:
                for _ in range(rounds):
                    uploads.one()
                    proxy.cut()
                    ends = time.monotonic() + seconds
                    while time.monotonic() < ends:
                        uploads.one()
                        time.sleep(0.1)
                    proxy.mend()
                    back.append(seconds_until(uploads.one, 60))
                proxy.delay = 0.5
                began = time.monotonic()
                report.check("uploads while it is slow", "taken", holds=uploads.one())
                report.figure("one of them took, s", f"{time.monotonic() - began:.1f}")
                proxy.delay = 0.0
            report.figure("times the object store was away", f"{rounds}, {seconds:.0f} s each")
            report.figure("uploads taken again after at most, s", f"{max(back):.2f}")
            load.report(report)
            failed = sum(load.counts.values()) - load.counts["right"]
            report.check("requests for cached soft prompts that failed", failed, holds=failed == 0)
            uploads.report(report)
            check_end(report, server, load, before)
    return report


if __name__ == "__main__":
    main(run, __doc__ or "", rounds=5, seconds=3.0)
