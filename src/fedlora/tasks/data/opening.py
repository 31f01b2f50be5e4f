"""Files opened as bounded streams of bytes and of text, packed by gzip or not, in any encoding."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import AfterValidator

from fedlora.core.component import MODEL_CONFIG, Positive, dataclass
from fedlora.core.errors import ConfigError, DataError, first_line

LONGEST_ROW = 32 << 20
"""The most characters of one row."""

UNPACKED_GB = 2.0
"""The most gigabytes that a file unpacks to, unless ``max_unpacked_gb`` is set."""

_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as that of UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP = b"\x1f\x8b"
LFS = (b"version https://git-lfs", "is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder")
"""How such a pointer begins, and what is said of it."""
_TWICE = "is packed by gzip twice: unpack it once"
_NOT_TEXT = (
    (_GZIP, "is packed by gzip: end its name in .gz"),
    (b"PK\x03\x04", "is a zip archive or an Excel file: unpack it, or save the sheet as csv"),
    (b"BZh", "is packed by bzip2: unpack it"),
    (b"\xfd7zXZ\x00", "is packed by xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is packed by zstd: unpack it"),
    (b"PAR1", "is a parquet file: end its name in .parquet"),
    (b"\xd0\xcf\x11\xe0", "is an old Excel file: save the sheet as csv"),
    (b"\x89PNG", "is an image: name a file of rows"),
    (b"\xff\xd8\xff", "is an image: name a file of rows"),
    LFS,
)


def _delimiter(text: str) -> str:
    if len(text) != 1 or text in '"\r\n\0':
        raise ConfigError(
            f"data.delimiter = {text!r}, but fields are separated by one character, which is no quote and no line "
            'break: use ";", "\\t" or "|"'
        )
    return text


def _encoding(name: str) -> str:
    try:
        "a".encode(name)
    except (LookupError, UnicodeError) as error:
        raise ConfigError(
            f'data.encoding = {name!r} is not a text encoding of Python: use "utf-8", "latin-1", "cp1252" or another'
        ) from error
    return name


Delimiter = Annotated[str, AfterValidator(_delimiter)]
"""The character between two fields of a csv or tsv."""
Encoding = Annotated[str, AfterValidator(_encoding)]
"""The name of a text encoding."""
Format = Literal["csv", "tsv", "json", "jsonl", "ndjson", "parquet", "arrow", "txt", "conll"]
"""The format of a file of rows, by which it usually ends."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Reading:
    """How files are read; what is None is at its default.

    Args:
        delimiter: the character between two fields of a csv or tsv; by default a comma, in a tsv a tab.
        encoding: of text files, by default UTF-8; a byte order mark has precedence.
        max_unpacked_gb: the most gigabytes that a ``.gz``, parquet or arrow file may unpack to; by default
            ``UNPACKED_GB``.
        format: of files whose ending names none, or which end in ``.txt``.

    Raises:
        ConfigError: there is no such encoding, or ``delimiter`` is not one character.
    """

    delimiter: Delimiter | None = None
    encoding: Encoding | None = None
    max_unpacked_gb: Positive | None = None
    format: Format | None = None


@contextmanager
def open_bytes(file: Path, reading: Reading) -> Iterator[IO[bytes]]:
    """A file's content, unpacked where its name ends in ``.gz``.

    Raises:
        DataError: it cannot be opened. Reading raises it too, where the packed file is damaged or unpacks to too much.
    """
    try:
        raw = file.open("rb")
    except OSError as error:
        raise DataError(
            f"'{file}' cannot be read ({error.strerror or error}): correct the path or its rights"
        ) from error
    with raw:
        if file.suffix.lower() != ".gz":
            yield raw
            return
        with closing(io.BufferedReader(_Unpacked(raw, file, reading.max_unpacked_gb or UNPACKED_GB))) as unpacked:
            yield unpacked


def read_lines(
    source: Path | IO[bytes], reading: Reading, newline: str | None = None, any_length: bool = False
) -> Iterator[str]:
    """The lines of a text file with their ends, decoded as they are needed.

    Args:
        source: the file, or an open stream of bytes such as standard input.
        reading: its encoding, and the bound on its size.
        newline: as for ``open``: None turns all line ends into ``\\n``; ``""`` keeps them.
        any_length: whether a line may have more than ``LONGEST_ROW`` characters.

    Raises:
        DataError: the file cannot be read, is no text in this encoding, or has a line that is too long.
    """
    longest = -1 if any_length else LONGEST_ROW
    if isinstance(source, Path):
        with open_bytes(source, reading) as opened:
            yield from _decoded(opened, str(source), reading, newline, longest)
    else:
        yield from _decoded(source, "standard input", reading, newline, longest)


def _decoded(opened: IO[bytes], name: str, reading: Reading, newline: str | None, longest: int) -> Iterator[str]:
    buffered: Any = opened
    start = bytes(buffered.peek(32)[:32])
    _check_start(start, name)
    marked = next((encoding for mark, encoding in _BOMS if start.startswith(mark)), None)
    encoding = marked or reading.encoding or "utf-8"
    text = io.TextIOWrapper(buffered, encoding=encoding, newline=newline)
    number = 0
    try:
        while line := text.readline(longest + 1 if longest >= 0 else -1):
            number += 1
            if 0 <= longest < len(line):
                raise DataError(
                    f"line {number} of '{name}' has more than {longest:,} characters, but a row is no longer than "
                    "that: split or remove it"
                )
            if "\0" in line:
                raise DataError(
                    f"line {number} of '{name}' has a NUL character, but text has none: correct the file, or name its "
                    'encoding, as in data.encoding = "utf-16-le"'
                )
            yield line
    except UnicodeError as error:
        raise _undecodable(name, number, encoding, error) from error
    finally:
        if not buffered.closed:
            text.detach()


def _check_start(start: bytes, name: str) -> None:
    for magic, what in _NOT_TEXT:
        if start.startswith(magic):
            raise DataError(f"'{name}' {_TWICE if magic == _GZIP and name.lower().endswith('.gz') else what}")


def _undecodable(name: str, number: int, encoding: str, error: UnicodeError) -> DataError:
    """The error for bytes that are no text, after ``number`` lines that are."""
    found = ""
    if isinstance(error, UnicodeDecodeError):  # its object is the block that was read after those lines
        number += error.object[: error.start].count(b"\n")
        found = f" (byte 0x{error.object[error.start]:02x})"
    return DataError(
        f"line {number + 1} of '{name}' is no {encoding.upper().removesuffix('-SIG')} text{found}: name the encoding "
        'that the file has, as in data.encoding = "latin-1", or save it as UTF-8'
    )


def too_large(file: Path, gigabytes: float) -> DataError:
    """The error for a file that unpacks to more than it may."""
    return DataError(
        f"'{file}' unpacks to more than {gigabytes:g} GB, which is the most that is read: set data.max_unpacked_gb if "
        "that is its true size"
    )


class _Unpacked(io.RawIOBase):
    """The content of a packed file, up to a bound."""

    def __init__(self, raw: IO[bytes], file: Path, gigabytes: float) -> None:
        self._source, self._file, self._gigabytes = gzip.GzipFile(fileobj=raw), file, gigabytes
        self._left = int(gigabytes * 1e9)

    def readable(self) -> bool:
        """See ``io.IOBase``: yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See ``io.RawIOBase``.

        Raises:
            DataError: the packed file is damaged, or unpacks to more than the bound.
        """
        try:
            chunk = self._source.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"'{self._file}' cannot be unpacked ({first_line(error)}): it is damaged or no gzip file; copy or pack "
                "it again"
            ) from error
        self._left -= len(chunk)
        if self._left < 0:
            raise too_large(self._file, self._gigabytes)
        buffer[: len(chunk)] = chunk
        return len(chunk)
