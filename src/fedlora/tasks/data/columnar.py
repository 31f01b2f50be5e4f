"""Bounds on what files in the formats of Arrow unpack to, which may be thousands of times their size."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlora.core.errors import DataError
from fedlora.core.later import pyarrow
from fedlora.tasks.data.opening import LFS, UNPACKED_GB, Reading, too_large

RATIO = 10
"""How many times its own size such a file may unpack to, if that is more than the bound."""
_ROWS = 1 << 16
_AT_ONCE = 1 << 28


def check_parquet(plain: Path, file: Path, reading: Reading) -> None:
    """Refuses a parquet file that unpacks to too much.

    Its metadata have the size of each column without compression, but not without dictionaries. Columns with less than
    a byte for each value are therefore read once, in small parts.

    Args:
        plain: where it lies.
        file: its name for messages.
        reading: the bound.

    Raises:
        DataError: it is too large, or has no rows.
    """
    _check_start(plain, file)
    with pyarrow.parquet.ParquetFile(str(plain)) as opened:
        held = opened.metadata
        if not held.num_rows:  # the reader would ask for batches of no rows
            raise DataError(f"'{file}' has no rows, but one row at least is needed: fill it or name another file")
        groups = [held.row_group(number) for number in range(held.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        _check((column.total_uncompressed_size for column in columns), plain, file, reading)
        packed = {one.path_in_schema for one in columns if one.num_values > one.total_uncompressed_size}
        if packed:
            largest = max(one.total_uncompressed_size for one in columns if one.path_in_schema in packed)
            rows = min(_ROWS, max(1, _AT_ONCE // max(1, largest)))
            parts = opened.iter_batches(rows, columns=sorted(packed))
            _check((part.nbytes for part in parts), plain, file, reading)


def check_arrow(plain: Path, file: Path, reading: Reading) -> bool:
    """Refuses an Arrow file whose compressed batches unpack to too much; see ``check_parquet``.

    Returns:
        Whether it is of the file format, and not a stream.
    """
    _check_start(plain, file)
    with pyarrow.memory_map(str(plain)) as mapped:
        is_file: bool = mapped.read(6) == b"ARROW1"
        mapped.seek(8 if is_file else 0)
        _check(_declared(mapped), plain, file, reading)
        mapped.seek(0)
        if is_file:
            opened: Any = pyarrow.ipc.open_file(mapped)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(mapped))
        _check((batch.nbytes for batch in batches), plain, file, reading)
    return is_file


def _declared(mapped: Any) -> Iterator[int]:
    """The sizes of batches, as their compressed buffers give them: nothing is unpacked.

    A message is a FlatBuffers table (https://arrow.apache.org/docs/format/Columnar.html#ipc-recordbatch-message), each
    compressed buffer begins with its size when unpacked, and one that is not compressed with -1.
    """
    for message in _messages(mapped):
        with suppress(struct.error):  # reading has a sentence for what is damaged
            yield from _unpacked(message)


def _unpacked(message: Any) -> Iterator[int]:
    held, body = message.metadata.to_pybytes(), memoryview(message.body)
    table = _table(held, _at(held, _table(held, 0), 2))  # the header of the message
    if message.type == "dictionary":
        table = _table(held, _at(held, table, 1))
    buffers, packed = _at(held, table, 2), _at(held, table, 3)
    if not buffers or not packed:
        return
    first = _table(held, buffers)
    (count,) = struct.unpack_from("<I", held, first)
    for start, size in struct.iter_unpack("<qq", held[first + 4 : first + 4 + 16 * count]):
        if size >= 8:
            yield max(0, struct.unpack_from("<q", body, start)[0])


def _messages(mapped: Any) -> Iterator[Any]:
    """The batches of a stream up to its end, or to what cannot be read, for which reading has a sentence."""
    with suppress(ValueError, OSError):
        for message in pyarrow.ipc.MessageReader.open_stream(mapped):
            if message.body is not None and message.type in ("record batch", "dictionary"):
                yield message


def _table(held: bytes, place: int) -> int:
    """Where a FlatBuffers table is that the offset at ``place`` leads to."""
    return place + int(struct.unpack_from("<I", held, place)[0])


def _at(held: bytes, table: int, field: int) -> int:
    """Where a field of a FlatBuffers table is; 0 where it is absent."""
    fields = table - struct.unpack_from("<i", held, table)[0]
    (size,) = struct.unpack_from("<H", held, fields)
    within = 4 + 2 * field
    offset = struct.unpack_from("<H", held, fields + within)[0] if within < size else 0
    return table + offset if offset else 0


def _check_start(plain: Path, file: Path) -> None:
    with plain.open("rb") as opened:
        if opened.read(len(LFS[0])) == LFS[0]:
            raise DataError(f"'{file}' {LFS[1]}")


def _check(sizes: Iterable[int], plain: Path, file: Path, reading: Reading) -> None:
    gigabytes = reading.max_unpacked_gb or UNPACKED_GB
    left = max(int(gigabytes * 1e9), RATIO * plain.stat().st_size)
    for size in sizes:
        left -= size
        if left < 0:
            raise too_large(file, gigabytes)
