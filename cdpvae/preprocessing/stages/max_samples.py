"""`max_samples`: how many candidates take part, so that just this many are kept.

The result is that of the inputs cut after the record that completes the number: near-duplicates
are sought among exactly the records read. As a later record can join two clusters and so remove
one that was kept, the cut is found by deciding growing, then shrinking beginnings of the
candidates; it depends on nothing but the records.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.deduplicate import Decisions

Decide = Callable[[Candidates, int], Decisions]


def candidates_needed(
    max_samples: int, candidates: Candidates, decide: Decide, more: Callable[[], bool]
) -> int | None:
    """Length of the beginning that keeps `max_samples`, or None when the inputs keep fewer.

    more: appends the next shard to `candidates`, or returns False at the end. The beginning ends
    with all pairs of a record; that record's surplus pairs are the caller's to drop.
    """
    wanted = max_samples
    while True:
        while len(candidates) < wanted and more():
            pass
        record_ids = candidates.record_ids()
        count = _end_of_record(record_ids, min(wanted, len(candidates)) - 1)
        kept = decide(candidates, count).kept
        if len(kept) >= max_samples:
            break
        if count < wanted:
            return None
        # As many as the share kept so far promises, and some.
        promised = 1.1 * count * max_samples / max(len(kept), 1)
        wanted = max(count + 1, int(min(promised, 4 * count)))
    while (shorter := _end_of_record(record_ids, kept[max_samples - 1])) < count:
        # A beginning's clusters are parts of the whole's: at least as many are kept.
        count, kept = shorter, decide(candidates, shorter).kept
    return count


def _end_of_record(record_ids: np.ndarray, index: int) -> int:
    """Candidates up to the last one of the record that candidate `index` belongs to."""
    if index < 0:
        return 0
    return int(np.searchsorted(record_ids, record_ids[index], side="right"))
