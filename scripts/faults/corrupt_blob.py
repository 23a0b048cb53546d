"""A stored file is corrupted on the disk.

python -m scripts.faults.corrupt_blob
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from scripts.faults.harness import Baseline, Load, Report, Server, Uploads, check_end, main, serve


def run(folder: Path, *, count: int) -> Report:
    """Corrupt files of a new server."""
    report = Report()
    with serve(folder) as server:
        damage(server, report, count=count)
    return report


def damage(server: Server, report: Report, *, count: int) -> None:
    """Change one byte in each of ``count`` files before their first use, then use them."""
    load, uploads = Load(server), Uploads(server.client)
    before = Baseline.of(server)
    with load:
        for _ in range(count):
            uploads.one()
        blobs = [path for path in (server.folder / "store" / "blobs").rglob("*") if path.is_file()]
        for weights in uploads.acknowledged.values():
            digest = hashlib.sha256(weights).hexdigest()
            (path,) = [path for path in blobs if digest in str(path).replace("/", "")]
            data = bytearray(weights)
            data[-1] ^= 1
            path.chmod(0o644)
            path.write_bytes(data)
        codes = [ask(server.client, name) for name in uploads.acknowledged]
        report.check("answers from corrupted files", codes.count(200), holds=200 not in codes)
        report.figure("statuses for corrupted files", ", ".join(map(str, sorted(set(codes)))))
        counted = int(server.value('soft_prompt_corrupt_total{tier="disk"}'))
        report.check("corrupted files counted by the metric", f"{counted} of {count}", holds=counted == count)
        again = Uploads(server.client)
        healed = [again.one() or True for _ in range(count)]
        codes = [ask(server.client, name) for name in uploads.acknowledged]
        report.check("served after a new upload", codes.count(200), holds=codes == [200] * len(healed))
    load.report(report)
    uploads.report(report)
    check_end(report, server, load, before)


def ask(client: object, name: str) -> int:
    """Return the status of one completion."""
    body = {"model": name, "prompt": "x", "max_tokens": 2}
    return int(client.post("/v1/completions", json=body).status_code)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(run, __doc__ or "", count=5)
