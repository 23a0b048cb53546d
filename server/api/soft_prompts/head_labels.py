"""The names of the labels of a classification head."""

from __future__ import annotations

from collections.abc import Mapping

from prompt_store.files.adapter_config import read_config
from prompt_store.types import CONFIG_FILE, PromptVersion
from server.api.soft_prompts.async_store import AsyncPromptStore


async def known_labels(store: AsyncPromptStore, version: PromptVersion) -> list[str] | None:
    """The names of a head's labels, from the version's metadata or its configuration file.

    Returns:
        One name per label; None if neither has them, or the version has no head.
    """
    if version.num_labels is None:
        return None
    names = head_label_names(version.metadata, version.num_labels)
    if names is None:
        data = await store.read_file(version.name, version.version, CONFIG_FILE)
        names = head_label_names(read_config(data), version.num_labels)
    return names


def head_label_names(source: Mapping[str, object], num_labels: int) -> list[str] | None:
    """Names of a head's labels in a JSON object: ``labels`` (a list), or transformers' ``id2label``.

    Returns:
        One unique name per label, or None if the object does not have them.
    """
    names = source.get("labels")
    by_id = source.get("id2label")
    if names is None and isinstance(by_id, Mapping):
        names = [by_id.get(str(index)) for index in range(num_labels)]
    if not isinstance(names, list) or len(names) != num_labels:
        return None
    texts = [name for name in names if isinstance(name, str) and name]
    return texts if len(set(texts)) == num_labels else None
