"""``cluster.yaml``: what is read from it, and what is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cluster.config import ClusterConfig, read_config
from server.cluster.replica.arguments import environment_of, secrets_of, serve_arguments
from server.errors import ConfigurationError

BASE = "bases:\n  - {name: demo, model: m, store: shared, catalog: 'postgresql://u:secret@h/d', %s}\n"


def read(folder: Path, text: str) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return read_config(path)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, text)
    return caught.value.message


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = read(tmp_path, BASE % "replicas: 2" + "api_key_file: keys\n")
    (base,) = config.bases
    assert base.model == str(tmp_path / "m")
    assert base.store == str(tmp_path / "shared")
    assert (config.directory, config.api_key_file) == (tmp_path / "prelude-cluster", tmp_path / "keys")
    assert (base.scaling.min, base.scaling.max) == (2, 2)


def test_sqlite_and_missing_storage_are_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRELUDE_STORE", raising=False)
    monkeypatch.delenv("PRELUDE_CATALOG", raising=False)
    sqlite = "bases: [{name: demo, model: m, store: s, catalog: 'sqlite:///x'}]"
    assert "SQLite belongs to one process" in refusal(tmp_path, sqlite)
    assert "PostgreSQL" in refusal(tmp_path, "bases: [{name: demo, model: m, store: s}]")
    assert "s3://BUCKET" in refusal(tmp_path, "bases: [{name: demo, model: m, catalog: 'postgresql://h/d'}]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE % "flags: {port: 1}", "set by the cluster"),
        (BASE % "flags: {max_num_seqs: 1}", "without their first dashes"),
        (BASE % "replicas: {min: 3, max: 2}", "min is 3"),
        (BASE % "replicas: 2" + "host: 0.0.0.0\n", "api_key_file"),
        (BASE % "replicas: 2" + "ray_address: auto\n", "ingress_secret_file"),
        (BASE % "replicas: 2" + "routing: {balance: 2, patience: 1.5}\n", "patience"),
        (BASE % "replica: 2", "replica"),
        (BASE % "replicas: 1" + BASE.removeprefix("bases:\n") % "replicas: 1", "two bases"),
        (BASE % "replicas: 1" + BASE.removeprefix("bases:\n").replace("demo", "other") % "replicas: 1", "its own"),
        ("bases: []", "bases"),
        ("[]", "fields"),
        (":", "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text) or (words == "its own" and "of its own" in refusal(tmp_path, text))


def test_no_password_is_among_the_arguments(tmp_path: Path) -> None:
    config = read(tmp_path, BASE % "flags: {pin: intent, enable-prefix-caching: false, base-alias: [a, b]}")
    (base,) = config.bases
    arguments = serve_arguments(config, base, tmp_path / "replica", secrets_of(config))
    assert "secret@" not in " ".join(arguments)
    assert "u:secret" not in repr(config)
    expected = "--pin intent --no-enable-prefix-caching --base-alias a --base-alias b"
    assert arguments[-7:] == expected.split()
    mine = {"RAY_X": "1", "PRELUDE_PORT": "1", "OMP_NUM_THREADS": "1", "HOME": "/h"}
    environment = environment_of(config, base, mine)
    assert environment == {
        "HOME": "/h",
        "PRELUDE_STORE": (tmp_path / "shared").as_uri(),
        "PRELUDE_CATALOG": "postgresql://u:secret@h/d",
    }


def test_secrets_are_made_once_and_are_private(tmp_path: Path) -> None:
    config = read(tmp_path, BASE % "replicas: 1" + "api_key_file: keys\n")
    first = secrets_of(config)
    text = first.ingress.read_text()
    assert len(text) == 64
    assert first.ingress.stat().st_mode & 0o077 == 0
    assert secrets_of(config) == first
    assert first.ingress.read_text() == text
    assert first.sessions is not None
    assert first.sessions.read_text() != text
