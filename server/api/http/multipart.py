"""An upload's multipart body, parsed while it arrives: files go to the store's staging area, never into memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from prompt_store.files.strict_json import check_depth, finite_float, refuse_constant
from prompt_store.types import CONFIG_FILE, DEFAULT_ALIAS, WEIGHTS_FILE, Lineage, TaskType, check_name
from server.errors import InvalidRequestError, MediaTypeError, PayloadTooLargeError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # defined for type checkers only

FILES_FIELD = "files"
FILENAMES = (CONFIG_FILE, WEIGHTS_FILE)
TEXT_FIELDS = (
    "id", "alias", "description", "tags", "metadata", "lineage", "shared", "allow_other_base", "task_type",
)  # fmt: skip

MAX_PARTS = 64
MAX_FIELD_BYTES = 64 * 1024
MAX_TAGS = 32
MAX_JSON_DEPTH = 31
MAX_DESCRIPTION_CHARS = 4096

_WRITE_BYTES = 1024 * 1024
"""Arriving bytes are gathered up to this size, to pay for one hop to a thread and not for many."""

_LINGER_BYTES = 32 * 1024 * 1024
_LINGER_SECONDS = 5.0


class FileSink(Protocol):
    """Where one file's bytes go."""

    def write(self, data: bytes, /) -> object:
        """Append bytes; raises PromptTooLargeError beyond the store's limit."""
        ...

    def close(self) -> object:
        """Bring the file to the disk."""
        ...


@dataclass(frozen=True, slots=True)
class UploadFields:
    """The text fields of an upload.

    Attributes:
        name: The soft prompt's name.
        alias: The alias to move.
        description: Free text.
        tags: Words to list by.
        metadata: The uploader's own JSON object.
        lineage: Where the soft prompt comes from.
        shared: Whether it is for every tenant.
        allow_other_base: Whether the uploader knows that it names another base, and that it fits this one.
        task_type: What the uploader says that it was trained for, where the configuration does not.
    """

    name: str
    alias: str
    description: str
    tags: tuple[str, ...]
    metadata: dict[str, object]
    lineage: Lineage
    shared: bool
    allow_other_base: bool
    task_type: TaskType | None


class UploadParser:
    """Reads one multipart body. Blocks on the disk, so ``feed`` belongs in a thread.

    Args:
        content_type: The request's ``Content-Type``.
        open_file: Opens the staged file of a legal filename.

    Raises:
        MediaTypeError: If the body is not multipart.
    """

    def __init__(self, content_type: str, open_file: Callable[[str], FileSink]) -> None:
        media_type, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if media_type != b"multipart/form-data" or not boundary:
            raise MediaTypeError("the body must be multipart/form-data, with fields 'id' and 'files'")
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_part_data": self._take_data,
            "on_part_end": self._end_part,
            "on_header_field": self._take_header_name,
            "on_header_value": self._take_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise InvalidRequestError(f"the body is not valid multipart: {error}") from error
        self._open_file = open_file
        self._seen_files: set[str] = set()
        self._texts: dict[str, list[str]] = {}
        self._num_parts = 0
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._field = ""
        self._text = bytearray()
        self._sink: FileSink | None = None
        self._is_complete = False

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body.

        Raises:
            InvalidRequestError: If the body is not well formed, or holds a file that an upload may not hold.
            PromptTooLargeError: If a file is over the store's limit.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError(f"the body is not valid multipart: {error}") from error

    def fields(self) -> UploadFields:
        """The text fields, once the whole body was fed.

        Raises:
            InvalidRequestError: If the body ended early, or a field is missing or not well formed.
        """
        if not self._is_complete:
            raise InvalidRequestError("the multipart body ends before its last boundary")
        if not self._texts.get("id"):
            raise InvalidRequestError("id: the name of the soft prompt is missing", param="id")
        description = self._single("description")
        if len(description) > MAX_DESCRIPTION_CHARS:
            raise InvalidRequestError(
                f"description: at most {MAX_DESCRIPTION_CHARS} characters, not {len(description)}",
                param="description",
            )
        if "\0" in description:  # which PostgreSQL cannot hold
            raise InvalidRequestError("description: NUL characters are not allowed", param="description")
        return UploadFields(
            name=_checked(self._single("id"), "name", param="id"),
            alias=_checked(self._single("alias") or DEFAULT_ALIAS, "alias", param="alias"),
            description=description,
            tags=self._tags(),
            metadata=self._json_object("metadata"),
            lineage=self._lineage(),
            shared=self._switch("shared"),
            allow_other_base=self._switch("allow_other_base"),
            task_type=self._task_type(),
        )

    def _single(self, field: str) -> str:
        values = self._texts.get(field, [""])
        if len(values) > 1:
            raise InvalidRequestError(f"{field}: sent {len(values)} times", param=field)
        return values[0]

    def _switch(self, field: str) -> bool:
        text = self._single(field)
        if text not in ("", "true", "false"):
            raise InvalidRequestError(f"{field}: must be true or false, not {text[:100]!r}", param=field)
        return text == "true"

    def _tags(self) -> tuple[str, ...]:
        """Repeated fields, comma-separated lists, or both."""
        words = [word.strip() for value in self._texts.get("tags", []) for word in value.split(",")]
        tags = tuple(dict.fromkeys(_checked(word, "tag", param="tags") for word in words if word))
        if len(tags) > MAX_TAGS:
            raise InvalidRequestError(f"tags: at most {MAX_TAGS}, not {len(tags)}", param="tags")
        return tags

    def _json_object(self, field: str) -> dict[str, object]:
        text = self._single(field)
        if not text:
            return {}
        try:
            value = json.loads(text, parse_constant=refuse_constant, parse_float=finite_float)
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be shown again
            check_depth(value, MAX_JSON_DEPTH)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{field}: not valid JSON: {error}", param=field) from error
        if not isinstance(value, dict):
            raise InvalidRequestError(f"{field}: must be a JSON object", param=field)
        return value

    def _task_type(self) -> TaskType | None:
        text = self._single("task_type")
        if text and text not in TaskType.__members__:
            raise InvalidRequestError(
                f"task_type: must be {' or '.join(TaskType)}, not {text[:100]!r}", param="task_type"
            )
        return TaskType(text) if text else None

    def _lineage(self) -> Lineage:
        try:
            return Lineage.parse(self._json_object("lineage"))
        except ValueError as error:
            raise InvalidRequestError(f"lineage: {error}", param="lineage") from error

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequestError(f"the body has more than {MAX_PARTS} parts")
        self._disposition = b""
        self._field = ""
        self._text.clear()
        self._sink = None

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is not None:
            self._sink = self._open_file(self._legal_filename(filename.decode("utf-8", "replace")))
        elif self._field == FILES_FIELD:
            raise InvalidRequestError(f"{FILES_FIELD}: a part has no filename", param=FILES_FIELD)

    def _legal_filename(self, filename: str) -> str:
        """One of the two filenames: constants, so nothing of the client's choosing becomes a path."""
        if self._field != FILES_FIELD:
            raise InvalidRequestError(
                f"file {filename[:100]!r} came in field {self._field[:100]!r}: send it in {FILES_FIELD!r}",
                param=FILES_FIELD,
            )
        if filename not in FILENAMES:
            raise InvalidRequestError(
                f"{FILES_FIELD}: {filename[:100]!r} is not accepted; an upload has {' and '.join(FILENAMES)}, "
                "without archives or other files",
                param=FILES_FIELD,
            )
        if filename in self._seen_files:
            raise InvalidRequestError(f"{FILES_FIELD}: {filename} was sent twice", param=FILES_FIELD)
        self._seen_files.add(filename)
        return filename

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])
            return
        if len(self._text) + end - start > MAX_FIELD_BYTES:
            raise InvalidRequestError(
                f"{self._field[:100]}: exceeds the limit of {MAX_FIELD_BYTES} bytes", param=self._field[:100]
            )
        self._text += data[start:end]

    def _end_part(self) -> None:
        if self._sink is not None:
            self._sink.close()
            return
        if self._field not in TEXT_FIELDS:
            return
        try:
            text = self._text.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"{self._field}: not UTF-8", param=self._field) from error
        self._texts.setdefault(self._field, []).append(text)

    def _end(self) -> None:
        self._is_complete = True


async def bounded(stream: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    """The stream's bytes, which may not be more than so many, however they are framed.

    Raises:
        PayloadTooLargeError: When there are more.
    """
    received = 0
    async for chunk in stream:
        received += len(chunk)
        if received > limit:
            raise PayloadTooLargeError(f"the upload exceeds the limit of {limit} bytes")
        yield chunk


async def gathered(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The stream's bytes in larger pieces."""
    pending = bytearray()
    async for chunk in stream:
        pending += chunk
        if len(pending) >= _WRITE_BYTES:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)


async def discard_rest(stream: AsyncIterator[bytes]) -> None:
    """Read on for a while after a refusal: a connection closed on a client that still sends loses the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            discarded = 0
            async for chunk in stream:
                discarded += len(chunk)
                if discarded > _LINGER_BYTES:
                    return


def _checked(text: str, what: str, *, param: str) -> str:
    try:
        return check_name(text, what)
    except ValueError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param) from error
