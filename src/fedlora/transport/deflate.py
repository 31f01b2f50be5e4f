"""Huffman coding of bytes: raw deflate streams (RFC 1951), decoded within a stated size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from fedlora.core.errors import WireError
from fedlora.transport.framing import Reader, varint

_WINDOW, _MEMORY = -15, 9  # a stream without header and checksum; blocks of 2 ** 15 bytes, each with its own table


def deflate(raw: NDArray[np.uint8]) -> bytes:
    """The length of a deflate stream, and the stream: literals only, as there is nothing to find in random bytes."""
    coder = zlib_ng.compressobj(1, zlib_ng.DEFLATED, _WINDOW, _MEMORY, zlib_ng.Z_HUFFMAN_ONLY)
    stream = coder.compress(raw.data) + coder.flush()
    return varint(len(stream)) + stream


def longest(size: int) -> int:
    """The most bytes of a stream of ``size`` bytes: stored blocks cost five bytes each, more would carry nothing."""
    return size + size // 256 + 64


def inflate(reader: Reader, size: int) -> NDArray[np.uint8]:
    """The inverse of ``deflate``; allocates no more than ``size`` bytes.

    Args:
        reader: at the length of the stream.
        size: the most bytes that the stream may hold.

    Raises:
        WireError: it is no such stream, holds more, or ends before or after its last block.
    """
    stream = reader.take(reader.varint(longest(size)))
    decoder = zlib_ng.decompressobj(_WINDOW)
    try:
        raw = decoder.decompress(stream, size + 1)
    except zlib_ng.error as error:  # type: ignore[misc]  # its stubs take the class for an instance
        raise WireError("bytes that are not a deflate stream") from error
    if len(raw) > size or not decoder.eof or decoder.unused_data:
        raise WireError(f"a deflate stream of other than {size} bytes, or of other than its own length")
    return np.frombuffer(raw, np.uint8)
