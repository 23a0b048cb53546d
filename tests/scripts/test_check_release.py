"""A release is refused if its parts contradict each other."""

from __future__ import annotations

import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from scripts.check_release import EXTRAS, ROOT, faults_of_release, faults_of_wheel

FILES = ("pyproject.toml", "CHANGELOG.md", "CITATION.cff")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TAG = f"v{PROJECT['version']}"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """This version as it is released: the changelog has no heading for later changes."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    path = tmp_path / "CHANGELOG.md"
    released = path.read_text().replace("## Unreleased\n", "")
    heading = f"## {PROJECT['version']} - 2026-11-30"
    path.write_text(re.sub(r"^## .*$", heading, released, count=1, flags=re.MULTILINE))
    return tmp_path


def test_this_version_can_be_released(copy: Path) -> None:
    assert faults_of_release(TAG, copy) == []
    assert set(PROJECT["optional-dependencies"]) >= EXTRAS


def test_the_changelog_awaits_a_release_or_names_this_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] in ("Unreleased", PROJECT["version"])


def test_unreleased_changes_refuse_a_release(copy: Path) -> None:
    path = copy / "CHANGELOG.md"
    path.write_text(path.read_text().replace("\n## ", "\n## Unreleased\n\n## ", 1))
    assert faults_of_release(TAG, copy) == [
        f"the newest heading of CHANGELOG.md is 'Unreleased', not '{PROJECT['version']} - DATE'"
    ]


def test_another_tag_is_refused(copy: Path) -> None:
    assert faults_of_release("v9.9.9", copy) == [f"the tag is v9.9.9, and pyproject.toml has {PROJECT['version']}"]


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff"])
def test_a_file_that_was_forgotten_is_named(copy: Path, name: str) -> None:
    path = copy / name
    path.write_text(path.read_text().replace(PROJECT["version"], "0.0.1"))
    (fault,) = faults_of_release(TAG, copy)
    assert name in fault


METADATA = """Metadata-Version: 2.4
Name: prelude-server
Summary: A server
License-Expression: Apache-2.0
Requires-Python: >=3.11
Keywords: llm
Description-Content-Type: text/markdown
""" + "".join(f"Provides-Extra: {extra}\n" for extra in sorted(EXTRAS))


def wheel(folder: Path, metadata: str, *names: str) -> Path:
    path = folder / "prelude_server-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("prelude_server-1.dist-info/METADATA", f"{metadata}\n# Prelude\n")
        for name in names:
            archive.writestr(name, "")
    return path


WHOLE = ("server/py.typed", "prompt_store/py.typed", "prelude_server-1.dist-info/licenses/LICENSE")


def test_a_whole_wheel_has_no_faults(tmp_path: Path) -> None:
    assert faults_of_wheel(wheel(tmp_path, METADATA, *WHOLE)) == []


def test_what_a_wheel_lacks_is_named(tmp_path: Path) -> None:
    metadata = (
        METADATA.replace("Summary: A server\n", "").replace("Provides-Extra: cpu\n", "").replace("markdown", "plain")
    )
    faults = faults_of_wheel(wheel(tmp_path, metadata, "server/py.typed", "tests/test_a.py"))
    assert [fault.partition(": ")[2] for fault in faults] == [
        "no Summary",
        "no readme",
        "no extra cpu",
        "no prompt_store/py.typed",
        "no license",
        "holds tests",
    ]


def test_the_workflows_call_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for step in job["steps"]:
                words = str(step.get("run", "")).split()
                if words[:1] == ["make"]:
                    called |= {word for word in words[1:] if "=" not in word}
    assert {"check-wheel", "sbom"} <= called
    assert called <= targets


def test_only_publishing_may_get_an_identity_and_only_from_a_tag() -> None:
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert release[True] == {"push": {"tags": ["v*"]}}, "YAML reads the key 'on' as true"
    assert release["permissions"] == {"contents": "read"}
    may = {name: job.get("permissions", {}) for name, job in release["jobs"].items()}
    assert may == {"build": {}, "publish": {"id-token": "write"}, "release": {"contents": "write"}}


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml", "config.yml"])
def test_the_templates_of_issues_are_forms(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert "contact_links" in form or {"name", "description", "body"} <= form.keys()
