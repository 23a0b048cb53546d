"""Send a server valid and invalid requests, and check every answer against its OpenAPI document.

    python -m scripts.fuzz_api [--cases 5000] [--seed 1] [--url URL]

Without ``--url`` the script starts a server on the embedded model. Every answer must have a status and a body that
the document describes for its path. None may be a server error, except 503 with ``overloaded_waiting``: a request
that sets a very short ``timeout`` gets it by design.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.server import serving
from server.demo.tour import MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY

CHECKS = (
    "no_server_error",
    "errors_in_openais_shape",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
COVERAGE_CASES = 1400
"""Number of cases that schemathesis's coverage phase makes, whatever the requested number."""

NUM_OPERATIONS = 26


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run.

    Attributes:
        num_cases: Number of requests sent.
        failures: Each failed check with its operation.
        log: The output of schemathesis.
    """

    num_cases: int
    failures: list[str]
    log: str


def fuzz(url: str, *, cases: int, seed: int, phases: str = "examples,coverage,fuzzing") -> Report:
    """Send at least about ``cases`` requests.

    Args:
        url: A server; its soft prompts will be changed and deleted.
        cases: The requested number of requests.
        seed: The same seed gives the same requests.
        phases: The phases of schemathesis to run, separated by commas.

    Raises:
        RuntimeError: If schemathesis writes no report.
    """
    num_coverage = COVERAGE_CASES if "coverage" in phases else 0
    per_operation = max(1, (cases - num_coverage) // (NUM_OPERATIONS * 3 // 4))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{url}/openapi.json",
            "--checks",
            ",".join(CHECKS),
        ]
        command += ["--phases", phases, "--max-examples", str(per_operation), "--seed", str(seed), "--no-shrink"]
        command += ["--exclude-path", "/v1/events"]  # its stream does not end
        command += ["--continue-on-failure", "--suppress-health-check", "all", "--workers", "1"]
        command += ["--report", "json", "--report-json-path", str(report), "--warnings", "off", "--no-color"]
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "scripts.fuzz_checks", "PYTHONPATH": str(Path.cwd())}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if not report.exists():
            raise RuntimeError(f"schemathesis did not run: {ran.stdout}{ran.stderr}")
        found = json.loads(report.read_text())
    failures = [
        f"{failure['title']}: {operation}" for failure in found["failures"] for operation in failure["operations"]
    ]
    failures += [f"error: {error}" for error in found["errors"]]
    return Report(found["test_cases"]["generated"], failures, ran.stdout)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url")
    args = parser.parse_args()
    if args.url is not None:
        report = fuzz(args.url.rstrip("/"), cases=args.cases, seed=args.seed)
    else:
        flags = ("--dtype", "float32", "--max-model-len", "64", "--kv-cache-memory", "64MiB", "--allow-other-base")
        with tempfile.TemporaryDirectory() as store, serving(MODEL_DIRECTORY, Path(store), *flags) as url:
            upload_soft_prompts(url)
            report = fuzz(url, cases=args.cases, seed=args.seed)
    print(report.log)
    print(f"{report.num_cases} cases, {len(report.failures)} failures")
    sys.exit(1 if report.failures or report.num_cases < args.cases else 0)


def upload_soft_prompts(url: str) -> None:
    """Upload the soft prompts that the document's examples name."""
    for name in ("sentiment", "dates"):
        folder = SOFT_PROMPTS_DIRECTORY / name
        files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
        httpx.post(f"{url}/v1/prompts", data={"id": name}, files=files).raise_for_status()


if __name__ == "__main__":
    main()
