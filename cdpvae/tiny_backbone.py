"""Train a small Llama and its tokenizer on text, for machines that have no weights.

    python -m cdpvae.tiny_backbone --input pairs.jsonl --output DIR [--steps N] [--hidden D] ...

The result is an ordinary Hugging Face directory. Input: whatever `cdpvae.preprocess` reads, such
as `.jsonl` pairs or `.txt` lines. `--tie-embeddings`, `--head-dim` and `--kv-heads` make the other
shapes of Llama that exist. A fair language model of a corpus that is tokenised already:

    ... --tokenizer word --dropout 0.2 --tie-embeddings --epochs 8 --validation-input valid.txt

`cdpvae/sample/backbone.py` says how the model is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.sample.backbone import BackboneOptions, make_backbone


def train(argv: Sequence[str] | None = None) -> None:
    """Parse, train, print. Raises ValueError for what a user can cause."""
    options = parse_options(BackboneOptions, "Train a tokenizer and a small Llama on text.", argv)
    record = make_backbone(options)
    print(
        f"{options.output}: validation {record['validation_nll_per_token']:.3f} nats/token, "
        f"{record['validation_nll_per_response']:.2f} nats per response given its instruction, "
        f"{record['seconds']} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(train, argv)


if __name__ == "__main__":
    sys.exit(main())
