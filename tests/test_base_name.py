"""The default name of the base model."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.app import _default_name


def test_a_directory_is_named_by_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Llama").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "Llama")
    assert _default_name(str(tmp_path / "Llama")) == "Llama"
    assert _default_name(f"{tmp_path}/Llama/") == "Llama"
    assert _default_name(str(tmp_path / "current")) == "Llama"
    monkeypatch.chdir(tmp_path / "Llama")
    assert _default_name(".") == "Llama"


def test_a_hub_id_is_unchanged() -> None:
    assert _default_name("org/Llama") == "org/Llama"


def test_a_directory_of_the_hubs_cache_is_named_by_its_hub_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--Llama" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    assert _default_name(str(snapshot)) == "org/Llama"
