"""How many candidates take part, so that exactly `max_samples` are kept to train on.

The result is that of the inputs cut after the record that completes the number: near-duplicates
are looked for among exactly the records read. As a later record can join two clusters and so remove
a record that was kept, the cut is found by deciding about growing, then about shrinking beginnings
of the candidates; it depends on nothing but the records.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.deduplicate import Decisions

Decide = Callable[[Candidates, int], Decisions]


def candidates_needed(
    max_samples: int,
    candidates: Candidates,
    decide: Decide,
    append_next_shard: Callable[[], bool],
    held_out: int = 0,
) -> int | None:
    """Return the length of the beginning that keeps `max_samples`; None when all inputs keep fewer.

    max_samples: how many candidates are to be kept.
    candidates: the candidates of the shards read so far.
    decide: decides which candidates of a beginning are kept.
    append_next_shard: appends the next shard to `candidates`, or returns False at the end.
    held_out: candidates from files of the validation split, all read and in front; they are no
        samples.

    The beginning ends with all pairs of a record; the caller drops the surplus ones among them.
    """

    def samples(count: int) -> np.ndarray:
        kept = decide(candidates, count).kept
        return kept[kept >= held_out]

    # Grow the beginning until it keeps enough.
    wanted = held_out + max_samples
    while True:
        while len(candidates) < wanted and append_next_shard():
            pass
        record_ids = candidates.record_ids()
        count = _end_of_record(record_ids, min(wanted, len(candidates)) - 1)
        kept = samples(count)
        if len(kept) >= max_samples:
            break
        if count < wanted:
            return None
        # Take as many as the share kept so far promises, and some more.
        seen = count - held_out
        promised = 1.1 * seen * max_samples / max(len(kept), 1)
        wanted = max(count + 1, held_out + int(min(promised, 4 * seen)))
    # Shrink it to the record that completes the number.
    while (shorter := _end_of_record(record_ids, kept[max_samples - 1])) < count:
        # A beginning's clusters are parts of the whole's: at least as many are kept.
        count, kept = shorter, samples(shorter)
    return count


def _end_of_record(record_ids: np.ndarray, index: int) -> int:
    """Return how many candidates there are up to the end of the record of candidate `index`."""
    if index < 0:
        return 0
    return int(np.searchsorted(record_ids, record_ids[index], side="right"))
