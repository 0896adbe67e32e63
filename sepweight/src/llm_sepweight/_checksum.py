"""Checksums of files: XXH3 with 128 bits, which runs at the speed of memory. They find damage, not deceit."""

from __future__ import annotations

import re
from typing import Any

import xxhash

PREFIX = "xxh3_128:"
CHECKSUM = re.compile(PREFIX + "[0-9a-f]{32}")


class Checksum:
    """The checksum of bytes that come piece by piece, in order.

    >>> both = Checksum()
    >>> both.update(b"first "), both.update(b"second")
    (None, None)
    >>> both.text == checksum(b"first second")
    True
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, data: Any) -> None:
        self._hash.update(data)

    @property
    def text(self) -> str:
        """As it stands in a manifest."""
        return PREFIX + self._hash.hexdigest()


def checksum(data: Any) -> str:
    """The checksum of a bytes-like object, as it stands in a manifest: what `xxh128sum` prints of such a file.

    >>> checksum(b"")
    'xxh3_128:99aa06d3014798d86001c324468d497f'
    """
    return PREFIX + xxhash.xxh3_128(data).hexdigest()
