"""What can be wrong with a record or an input, named by constants that can be counted.

A problem of one record takes the record's place (`RawRecord.problem`). An input of which nothing
can be read raises `Unreadable` instead; `source.Source` completes its message with the file name.
"""

from __future__ import annotations

# A longer line, element of an array or row of a table is skipped without being held in memory.
MAX_RECORD_BYTES = 64 * 2**20

TOO_LONG = f"record is longer than the limit of {MAX_RECORD_BYTES // 2**20} MiB"
NOT_UTF8 = "record is not UTF-8"
NUL_BYTES = "record holds NUL bytes"
DAMAGED = "file is damaged from here on"


class Unreadable(ValueError):
    """Nothing of the input can be read; the message says why."""
