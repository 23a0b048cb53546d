"""Files with a secret that several servers share."""

from __future__ import annotations

from pathlib import Path

from server.errors import ConfigurationError

MIN_SECRET_BYTES = 32
"""Minimum length of a secret, in bytes."""


def read_secret(path: Path, name: str) -> bytes:
    """Read a secret.

    Args:
        path: The file; white space at its ends does not count.
        name: What the file is, for messages.

    Raises:
        ConfigurationError: If the file cannot be read, or the secret is too short.
    """
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(f"the {name} file {path} cannot be read: {error}") from error
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"the {name} file {path} holds {len(secret)} bytes; at least {MIN_SECRET_BYTES} random ones are "
            "needed, such as those of 'openssl rand -hex 32'"
        )
    return secret
