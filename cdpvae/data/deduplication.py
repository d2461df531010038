"""Removing repeated records: the first one in reading order stays.

Exact duplicates share the MD5 of `instruction + "\\n" + response` (the description's key; MD5 is
a fingerprint here, not a safeguard).
"""

from __future__ import annotations

import hashlib


def exact_key(instruction: str, response: str) -> bytes:
    """The 16 bytes that two exact duplicates share."""
    text = f"{instruction}\n{response}".encode()
    return hashlib.md5(text, usedforsecurity=False).digest()


class ExactDeduplicator:
    """Remembers every record it was shown, in 16 bytes each."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_duplicate(self, instruction: str, response: str) -> bool:
        """True when the same texts were shown before."""
        key = exact_key(instruction, response)
        if key in self._seen:
            return True
        self._seen.add(key)
        return False
