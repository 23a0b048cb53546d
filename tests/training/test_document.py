"""docs/training.md matches the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.training.run_directory import RunDirectory
from server.training.settings import DEFAULTS, Method, TrainSettings
from tests.training.conftest import MakeSettings, Trained

DOCUMENT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
PROSE = " ".join(DOCUMENT.split())  # without line ends


def test_each_method_is_listed_with_its_learning_rate() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\de-\d) \| `(\w+)`", DOCUMENT, re.MULTILINE)

    assert [(name, float(rate)) for name, rate, _ in rows] == [
        (method.value, DEFAULTS[method].learning_rate) for method in Method
    ]


def test_methods_initialised_at_random_are_those_without_a_text() -> None:
    random = re.findall(r"^\| `(\w+)` \|[^|]*\| random \|", DOCUMENT, re.MULTILINE)

    assert random == [method.value for method in Method if not method.starts_from_text]


@pytest.mark.slow
def test_the_files_of_a_run_are_listed(
    settings: MakeSettings, trained: Trained, tmp_path: Path, curves: None
) -> None:
    trained(settings())
    written = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    table = DOCUMENT.split("## The run directory")[1].split("\n## ")[0]

    assert {name.rstrip("/") for name in re.findall(r"`([\w.]+/?)`", table)} >= written
    assert RunDirectory(tmp_path / "run").adapter.name in written


def test_documented_defaults_match_the_code() -> None:
    defaults = TrainSettings(model="m", data=Path("d"), name="n")

    assert f"`--alias` (`{defaults.alias}`)" in PROSE
    assert defaults.eval_fraction == 0.1
    assert "a tenth of the rows (`--eval-fraction`" in PROSE
