"""Run a module of the tests that imports the GPU code of vLLM, on a machine without a GPU.

    python -m tests.support.without_gpu MODULE

calls the module's ``main()``. Triton's kernels run in Triton's interpreter. vLLM's CPU build lacks the package
``flashinfer``; every module of it is an empty one with any attribute.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock


class _EmptyModules(MetaPathFinder, Loader):
    """Finds and creates modules of one package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """A module of the package."""
        is_part = f"{fullname}.".startswith(f"{self._package}.")
        return ModuleSpec(fullname, self, is_package=True) if is_part else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module with any attribute."""
        module: ModuleType = MagicMock(name=spec.name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def main() -> None:
    """Prepare, and run the module."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    # vLLM uses Triton on CPUs only if there is a backend of this name.
    importlib.import_module("triton.backends").backends["cpu"] = SimpleNamespace(
        driver=SimpleNamespace(is_active=lambda: True)
    )
    if importlib.util.find_spec("flashinfer") is None:
        sys.meta_path.append(_EmptyModules("flashinfer"))
    importlib.import_module(sys.argv[1]).main()


if __name__ == "__main__":
    main()
