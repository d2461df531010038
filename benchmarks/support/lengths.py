"""Rows of token ids whose lengths are those of real data.

What packing saves depends on how unequal rows are, so lengths are never made up. They come from
text (`--lengths FILE`, anything `cdpvae.preprocess` reads), from processed data (`--data DIR`), or
from `lengths.json` beside this file: 512 (instruction, response) pairs of lengths, drawn at random
from the file and by the tokenizer that it names. These pairs have no text, so their ids are drawn
log-uniformly, which resembles word frequencies.

Make `lengths.json` anew: `python -m benchmarks.support.lengths FILE > lengths.json`.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdpvae.batch import SpecialTokens
from cdpvae.config import DataConfig
from cdpvae.data import LlamaTokenizerWrapper, PreprocessedDataset
from cdpvae.sample.texts import read_texts
from cdpvae.sample.tokenizer import train_tokenizer

SHIPPED = Path(__file__).with_name("lengths.json")
PLAIN_TOKENS = SpecialTokens(bos=1, eos=2, pad=0, unk=3, special=(0, 1, 2, 3))
SHIPPED_PAIRS, SHIPPED_VOCABULARIES, POSITIONS = 512, (4096, 32000), 2048


@dataclass(frozen=True)
class Row:
    """One training row, special tokens included. index: in the data set; keys random draws."""

    instruction: list[int]
    response: list[int]
    index: int


@dataclass(frozen=True)
class Corpus:
    """The rows of a run. tokens: special ids. source: where lengths and ids come from, in words."""

    rows: list[Row]
    tokens: SpecialTokens
    source: str

    @property
    def max_id(self) -> int:
        """Find the largest id in use."""
        return max(max(*row.instruction, *row.response) for row in self.rows)


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one optimizer step. with_view: it computes the augmented view."""

    micro_batches: list[list[Row]]
    with_view: bool

    @property
    def rows(self) -> list[Row]:
        """List the rows of all micro-batches."""
        return [row for rows in self.micro_batches for row in rows]

    @property
    def instruction_tokens(self) -> int:
        """Count the tokens of the instructions, without padding and views."""
        return sum(len(row.instruction) for row in self.rows)

    @property
    def response_tokens(self) -> int:
        """Count the tokens of the responses, without padding and soft prompts."""
        return sum(len(row.response) for row in self.rows)

    @property
    def target_tokens(self) -> int:
        """Count the predicted tokens: every response token but the first of its row."""
        return self.response_tokens - len(self.rows)


def step_batches(corpus: Corpus, micro_batch: int, accum: int, seed: int) -> Iterator[StepBatch]:
    """Draw step batches of shuffled rows without end; every other step computes the view.

    This is the description's `augmentation_probability` of 0.5, without its chance.
    micro_batch: rows per micro-batch. accum: micro-batches per step.
    Raises ValueError when the corpus has fewer rows than a step.
    """
    wanted = micro_batch * accum
    if len(corpus.rows) < wanted:
        raise ValueError(
            f"micro_batch={micro_batch} x accum={accum} needs {wanted} rows, the data has "
            f"{len(corpus.rows)}; give more data or smaller batches"
        )
    order: list[Row] = []
    with_view, shuffle = True, random.Random(seed)
    while True:
        # A rest that is too short for a step is dropped: no step has fewer rows than another.
        if len(order) < wanted:
            order = shuffle.sample(corpus.rows, len(corpus.rows))
        taken, order = order[:wanted], order[wanted:]
        cuts = range(0, wanted, micro_batch)
        yield StepBatch([taken[cut : cut + micro_batch] for cut in cuts], with_view)
        with_view = not with_view


def open_corpus(
    lengths: str | None,
    data: str | None,
    tokenizer: str | None,
    vocab_size: int,
    bounds: DataConfig,
    mean_response: int | None = None,
) -> Corpus:
    """Open the rows of a benchmark run; the module says where they can come from.

    lengths: a file of text, or None.
    data: a processed directory, or None.
    tokenizer: for `lengths`, a directory or hub id; without it a byte-level BPE of at most
        `vocab_size` (and 32,000) tokens is trained on the text itself.
    vocab_size: of the backbone; ids stay below it where the tokenizer or the ids are made here.
    bounds: rows with lengths outside are left out, as preprocessing does.
    mean_response: of the shipped lengths, which are multiplied with one factor; those that pass the
        bounds are cut there. None leaves them as they are.
    Raises ValueError for inputs that cannot be read or combined.
    """
    # An option without effect is refused, not ignored.
    if lengths and data:
        raise ValueError("--lengths and --data: give one of them")
    if tokenizer and not lengths:
        raise ValueError(f"--tokenizer {tokenizer}: it has no effect without --lengths")
    if mean_response and (lengths or data):
        raise ValueError(f"--mean-response {mean_response}: it has no effect with rows of your own")
    # The source, by what was given.
    if data:
        return _within(_processed(data), bounds)
    if lengths:
        return _within(_tokenised(lengths, tokenizer, vocab_size), bounds)
    return _within(_shipped(vocab_size, bounds, mean_response), bounds)


def _within(corpus: Corpus, bounds: DataConfig) -> Corpus:
    kept = [
        row
        for row in corpus.rows
        if bounds.min_instruction_tokens <= len(row.instruction) <= bounds.max_instruction_tokens
        and bounds.min_response_tokens <= len(row.response) <= bounds.max_response_tokens
    ]
    return Corpus(kept, corpus.tokens, corpus.source)


def _processed(directory: str) -> Corpus:
    split = PreprocessedDataset(directory, "train")
    rows = [
        Row(row["instruction_ids"], row["response_ids"], index)
        for index, row in enumerate(split[n] for n in range(len(split)))
    ]
    # The special ids are those of the tokenizer that the data names.
    manifest = split.manifest["tokenizer"]
    tokens = LlamaTokenizerWrapper.from_pretrained(manifest["name"]).special_tokens()
    name = Path(manifest["name"]).name
    return Corpus(rows, tokens, f"{Path(directory).name}, tokenised by {name}")


def _tokenised(file: str, tokenizer: str | None, vocab_size: int) -> Corpus:
    # Plain text is instruction and response at once, as preprocessing has it.
    pairs = [text.parts if len(text.parts) == 2 else text.parts * 2 for text in read_texts(file)[0]]
    if tokenizer:
        wrapper, name = LlamaTokenizerWrapper.from_pretrained(tokenizer), Path(tokenizer).name
    else:
        size = min(vocab_size, max(SHIPPED_VOCABULARIES))
        wrapper = LlamaTokenizerWrapper(train_tokenizer(pairs, size, POSITIONS))
        name = f"a byte-level BPE of {len(wrapper)} tokens trained on it"
    # Encoded as preprocessing does, special tokens included.
    instructions = wrapper.encode_instructions([pair[0] for pair in pairs])
    responses = wrapper.encode_responses([pair[1] for pair in pairs])
    rows = [Row(i, r, n) for n, (i, r) in enumerate(zip(instructions, responses, strict=True))]
    return Corpus(rows, wrapper.special_tokens(), f"{Path(file).name}, tokenised by {name}")


def _shipped(vocab_size: int, bounds: DataConfig, mean_response: int | None) -> Corpus:
    # The lengths are those of the shipped vocabulary that is nearest in size.
    content = json.loads(SHIPPED.read_text())
    size = min(vocab_size, max(SHIPPED_VOCABULARIES))
    nearest = min(content["pairs"], key=lambda name: abs(int(name) - size))
    pairs, source = content["pairs"][nearest], f"{content['source']}, {nearest} tokens; ids random"
    if mean_response:
        # How unequal they are stays; what a long row costs shows only where rows are long.
        factor = mean_response / statistics.mean(response for _, response in pairs)
        most = bounds.max_instruction_tokens, bounds.max_response_tokens
        pairs = [[min(round(n * factor), m) for n, m in zip(p, most, strict=True)] for p in pairs]
        source += f"; lengths x {factor:.2f}"
    draw, first = random.Random(0), max(PLAIN_TOKENS.special) + 1

    # Log-uniform ids: small ones are frequent, as words are.
    def text(count: int) -> list[int]:
        return [first + int((size - first) ** draw.random()) - 1 for _ in range(count)]

    rows = [
        Row([PLAIN_TOKENS.bos, *text(i - 1)], [PLAIN_TOKENS.bos, *text(r - 2), PLAIN_TOKENS.eos], n)
        for n, (i, r) in enumerate(pairs)
    ]
    return Corpus(rows, PLAIN_TOKENS, source)


def measure(file: str) -> dict:
    """Measure one file of text -> the content of `lengths.json`."""
    # For each vocabulary size the same number of rows that pass the default length bounds.
    pairs = {}
    for size in SHIPPED_VOCABULARIES:
        corpus = _within(_tokenised(file, None, size), DataConfig())
        chosen = random.Random(0).sample(corpus.rows, SHIPPED_PAIRS)
        pairs[str(size)] = [[len(row.instruction), len(row.response)] for row in chosen]
    source = f"{SHIPPED_PAIRS} rows of {Path(file).name}, byte-level BPE trained on it"
    return {"source": source, "pairs": pairs}


def main(argv: Sequence[str]) -> None:
    """Print the content of `lengths.json` for the file that argv names."""
    content = measure(argv[0])
    print(json.dumps(content, separators=(",", ":")))


if __name__ == "__main__":
    main(sys.argv[1:])
