"""Check that a release is consistent: ``python scripts/check_release.py v0.2.0 dist/*.whl``.

The tag, the package's version, CITATION.cff and the newest heading of the changelog name one version, the changelog
has a date, and the wheel's metadata has what a reader of PyPI needs. Needs no package but Python's own.
"""

from __future__ import annotations

import email
import re
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

EXTRAS = {"cpu", "cuda", "postgres", "objects", "tracing", "train"}
"""What users install. The other extras are for work on the project."""


def faults_of_release(tag: str, root: Path = ROOT) -> list[str]:
    """What contradicts a tag ``vX.Y.Z``."""
    version = str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])
    faults = []
    if tag != f"v{version}":
        faults.append(f"the tag is {tag}, and pyproject.toml has {version}")
    heading = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = heading[1] if heading else ""
    if not re.fullmatch(re.escape(version) + r" - \d{4}-\d{2}-\d{2}", newest):
        faults.append(f"the newest heading of CHANGELOG.md is {newest!r}, not '{version} - DATE'")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text():
        faults.append(f"CITATION.cff does not name {version}")
    return faults


def faults_of_wheel(path: Path) -> list[str]:
    """What a wheel's metadata lacks."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(
            wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
        )
    faults = [
        f"no {field}"
        for field in ("Summary", "License-Expression", "Requires-Python", "Keywords")
        if not metadata[field]
    ]
    if metadata["Description-Content-Type"] != "text/markdown" or "# Prelude" not in str(metadata.get_payload()):
        faults.append("no readme")
    missing = EXTRAS - set(metadata.get_all("Provides-Extra", []))
    faults += [f"no extra {extra}" for extra in sorted(missing)]
    faults += [f"no {name}" for name in ("server/py.typed", "prompt_store/py.typed") if name not in names]
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        faults.append("no license")
    foreign = sorted({name.partition("/")[0] for name in names if not name.startswith(("server/", "prompt_store/"))})
    faults += [f"holds {name}" for name in foreign if not name.endswith(".dist-info")]
    return [f"{path.name}: {fault}" for fault in faults]


def main() -> None:
    """Check, and exit with status 1 and the faults if there are any."""
    tag, *wheels = sys.argv[1:]
    faults = faults_of_release(tag) if tag != "-" else []
    faults += [fault for wheel in wheels for fault in faults_of_wheel(Path(wheel))]
    print("\n".join(faults) or "consistent")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
