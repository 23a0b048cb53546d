"""The flags match the settings."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import typer

from server.cli import FLAGS, settings_from
from server.command_line.flags import parse_bytes
from server.config import EngineSettings, HttpSettings, Settings, StoreSettings


def test_every_setting_has_a_flag() -> None:
    flags = {(flag.section, flag.field) for flag in FLAGS}
    sections: tuple[type[Any], ...] = (EngineSettings, StoreSettings, HttpSettings)
    settings = {(section, field.name) for section in sections for field in fields(section)}
    settings |= {(Settings, "served_model_name"), (Settings, "log_level"), (Settings, "log_format")}
    settings |= {(Settings, "otlp_traces_endpoint"), (Settings, "replica_name")}
    assert flags == settings


def test_defaults_of_the_flags_are_the_settings_defaults() -> None:
    values = {flag.name: flag.default for flag in FLAGS} | {"model": "m"}
    assert settings_from(values) == Settings(engine=EngineSettings(model="m"))


def test_every_flag_has_a_separate_variable() -> None:
    assert {flag.name: flag.variable for flag in FLAGS}["max_model_len"] == "PRELUDE_MAX_MODEL_LEN"
    assert len({flag.variable for flag in FLAGS}) == len(FLAGS)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        StoreSettings().location = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        (4096, 4096),
        ("512MiB", 512 * 2**20),
        ("2GiB", 2 * 2**30),
        ("2 gib", 2 * 2**30),
        ("3KB", 3000),
        ("1GB", 10**9),
    ],
)
def test_sizes_are_parsed(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5GiB", "MiB", "1TiB", "12 apples", "1e9"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_bytes(text)
