"""The formats that can be converted, and the error of all of them."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """The formats. The values are those of the option ``--format``."""

    TGIS = "tgis"
    CARTRIDGE = "cartridge"
    CHATGLM = "chatglm"
    KOBOLDAI = "koboldai"
    PEFT_PICKLE = "peft"


class ImportFileError(Exception):
    """A file cannot be converted. The message names the file and says why."""
