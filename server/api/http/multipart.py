"""The multipart body of an upload, parsed as it arrives. Files go to the store's staging area, never into memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE
from server.errors import InvalidRequestError, MediaTypeError, PayloadTooLargeError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # defined for type checkers only

FILES_FIELD = "files"
FILENAMES = (CONFIG_FILE, WEIGHTS_FILE)

MAX_PARTS = 64
MAX_FIELD_BYTES = 64 * 1024

_WRITE_BYTES = 1024 * 1024
"""Received bytes are collected up to this size, so that a thread is used less often."""

_LINGER_BYTES = 32 * 1024 * 1024
_LINGER_SECONDS = 5.0


class FileSink(Protocol):
    """The destination of one file."""

    def write(self, data: bytes, /) -> object:
        """Append bytes; raises PromptTooLargeError beyond the store's limit."""
        ...

    def close(self) -> object:
        """Flush the file to the disk."""
        ...


class UploadParser:
    """Reads one multipart body. ``feed`` writes to the disk, so call it in a thread.

    Args:
        content_type: The request's ``Content-Type``.
        open_file: Opens the staged file for one of ``FILENAMES``.
        text_fields: Names of the text fields to keep; others are skipped.

    Raises:
        MediaTypeError: If the body is not multipart.
    """

    def __init__(self, content_type: str, open_file: Callable[[str], FileSink], text_fields: Collection[str]) -> None:
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
        self._text_fields = text_fields
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
            InvalidRequestError: If the body is malformed, or has a file that is not allowed.
            PromptTooLargeError: If a file exceeds the store's limit.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError(f"the body is not valid multipart: {error}") from error

    def texts(self) -> Mapping[str, list[str]]:
        """The values of each text field, once the whole body was fed.

        Raises:
            InvalidRequestError: If the body ended early.
        """
        if not self._is_complete:
            raise InvalidRequestError("the multipart body ends before its last boundary")
        return self._texts

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
        """Return one of ``FILENAMES``. Only these constants become paths, never a text from the client."""
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
        if self._field not in self._text_fields:
            return
        try:
            text = self._text.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"{self._field}: not UTF-8", param=self._field) from error
        self._texts.setdefault(self._field, []).append(text)

    def _end(self) -> None:
        self._is_complete = True


async def bounded(stream: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    """The bytes of a stream, at most ``limit``, however they are framed.

    Raises:
        PayloadTooLargeError: If there are more.
    """
    received = 0
    async for chunk in stream:
        received += len(chunk)
        if received > limit:
            raise PayloadTooLargeError(f"the upload exceeds the limit of {limit} bytes")
        yield chunk


async def gathered(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of a stream in larger chunks."""
    pending = bytearray()
    async for chunk in stream:
        pending += chunk
        if len(pending) >= _WRITE_BYTES:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)


async def discard_rest(stream: AsyncIterator[bytes]) -> None:
    """Read on for a while after an error: closing the connection while the client still sends loses the response."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            discarded = 0
            async for chunk in stream:
                discarded += len(chunk)
                if discarded > _LINGER_BYTES:
                    return
