"""The whole conversion: read a foreign soft prompt, write a PEFT directory."""

from __future__ import annotations

from pathlib import Path

from server.client.importers.base_config import read_base_config
from server.client.importers.formats import Imported, read_foreign
from server.client.importers.kinds import Format
from server.client.importers.writing import write_peft_directory


def convert(
    source: Path, out: Path, *, wanted: Format | None = None, base: str | None = None, base_config: Path | None = None
) -> Imported:
    """Convert a soft prompt of another program to a PEFT directory.

    Args:
        source: The other program's file or directory.
        out: The directory to write.
        wanted: The format; None recognises it.
        base: The base model that the configuration names.
        base_config: The base's ``config.json`` or its directory; ChatGLM's files need it.

    Raises:
        ImportFileError: If the source cannot be converted.
        OSError: If a file cannot be read or written.
    """
    shape = None if base_config is None else read_base_config(base_config)
    imported = read_foreign(source, wanted=wanted, base=shape)
    config = dict(imported.config)
    if base is not None:
        config["base_model_name_or_path"] = base
    write_peft_directory(out, config, imported.tensors)
    return imported
