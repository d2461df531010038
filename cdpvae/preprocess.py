"""Turn records into the processed data that training reads.

    python -m cdpvae.preprocess --phase 1
    python -m cdpvae.preprocess --input records.jsonl more.json.gz --tokenizer DIR \\
        --processed-dir processed/mine --max-samples 10000 --decontaminate HumanEval.jsonl.gz
    python -m cdpvae.preprocess --input train.txt --validation-input valid.txt --tokenizer DIR

What happens to a record: `docs/data.md`; formats: `docs/formats.md`; on a cluster:
`docs/data_cluster.md`. A killed run continues when it is started again. A result from the same
inputs and settings is reused; `--overwrite` replaces a result from others.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_settings_and, run

# The settings that have flags here. Others may stand in a settings file, and are not used.
READS = ("data", "model.backbone", "model.tokenizer")


@dataclasses.dataclass
class PreprocessOptions:
    """Flags beside the settings."""

    overwrite: bool = False
    """replace processed data that other settings or inputs wrote"""


def preprocess(argv: Sequence[str] | None = None) -> None:
    """Parse the settings, process the data, print a table.

    Raises ValueError and OSError for what a user can cause.
    """
    settings, options = parse_settings_and(
        PreprocessOptions, "Turn records into the processed data that training reads.", argv, READS
    )
    # Heavy imports wait until the settings are known to be good.
    from cdpvae.data import LlamaTokenizerWrapper
    from cdpvae.preprocessing.pipeline import preprocess as process
    from cdpvae.preprocessing.report.terminal import terminal_report

    data, model = settings.data, settings.model
    wrapper = LlamaTokenizerWrapper.from_pretrained(
        model.tokenizer or model.backbone, data.max_instruction_tokens, data.max_response_tokens
    )
    print(terminal_report(process(data, wrapper, overwrite=options.overwrite)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `preprocess` -> exit status: 2 for what a user can cause, with one line on stderr."""
    return run(preprocess, argv)


if __name__ == "__main__":
    sys.exit(main())
