"""One part of the check, in a process of its own.

python -m scripts.gpu.part NAME --results FILE [--dry]
"""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path

from scripts.gpu.models import dry_scale, full_scale
from scripts.gpu.results import Results

PARTS = {
    "ceilings": "ceilings",
    "kernels": "kernels",
    "tests": "suite",
    "steps": "steps",
    "adapters": "adapters",
    "mixed": "mixed",
    "loads": "loads",
    "peers": "peers",
}
"""The module of each part, which is imported alone: imports count towards the part's time."""


class Warnings(logging.Handler):
    """Adds the server's warnings to the results: for example that it does without graphs."""

    def __init__(self, results: Results) -> None:
        super().__init__(logging.WARNING)
        self._results, self._seen = results, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Add a message that is new."""
        message = record.getMessage()[:300]
        if message not in self._seen:
            self._seen.add(message)
            self._results.add("warning", note=message)


def main() -> None:
    """Run the part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines to append to")
    parser.add_argument("--dry", action="store_true", help="rehearse with a tiny model on a CPU")
    arguments = parser.parse_args()
    scale = dry_scale() if arguments.dry else full_scale()
    results = Results(arguments.results, arguments.part, judges_speed=not scale.is_dry)
    logging.getLogger("server").addHandler(Warnings(results))
    importlib.import_module(f"scripts.gpu.{PARTS[arguments.part]}").run(results, scale)


if __name__ == "__main__":
    main()
