"""Checks of Python and the installed packages."""

from __future__ import annotations

import sys
from importlib import metadata

from packaging.requirements import Requirement

from server.doctor.findings import Finding, failed, ok, warning

DISTRIBUTION = "prelude-server"
_NAMED = ("torch", "transformers", "peft", "numba", "triton")
"""Packages whose versions are shown."""


def check_packages(distribution: str = DISTRIBUTION) -> list[Finding]:
    """Check Python and every package that the distribution requires.

    Args:
        distribution: Name of an installed distribution.
    """
    version = metadata.version(distribution)
    python = ".".join(map(str, sys.version_info[:3]))
    findings = [ok("python", f"Python {python}, {distribution} {version}")]
    missing, wrong = [], []
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version_of(requirement.name)
        if found is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} (needed: {requirement.specifier})")
    if missing:
        advice = f"pip install {distribution}"
        findings.append(failed("packages", f"not installed: {', '.join(missing)}", advice))
    if wrong:
        advice = f"pip install --upgrade {distribution}, in an environment without other applications"
        findings.append(failed("packages", f"other versions than required: {', '.join(wrong)}", advice))
    if not missing and not wrong:
        findings.append(
            ok("packages", ", ".join(f"{name} {found}" for name in _NAMED if (found := _version_of(name))))
        )
    return findings


def check_kernels(*, has_gpu: bool) -> list[Finding]:
    """Check that the kernels of the device that will serve are installed."""
    name, extra = ("triton", "the CUDA build of torch") if has_gpu else ("numba", f"'{DISTRIBUTION}[cpu]'")
    if _version_of(name) is not None:
        return []
    text = f"{name} is not installed: the server uses torch's own kernels, which are slower"
    return [warning("kernels", text, f"pip install {extra}" if not has_gpu else f"install {extra}")]


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
