"""How well texts come back: greedy texts of held-out rows beside their references, scored."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.likelihood import EVALUATION_EPOCH
from cdpvae.evaluation.verdicts import Likelihoods
from cdpvae.metrics import ReconstructionMetrics


@dataclass(frozen=True)
class GeneratedText:
    """One row: its texts, and what was written from each source of z, with token ids."""

    instruction: str
    reference: str
    reference_ids: list[int]
    generated: dict[str, str]
    generated_ids: dict[str, list[int]]


@torch.no_grad()
def generate_texts(
    opened: OpenedRun, rows: RowSelection, max_length: int, seed: int
) -> list[GeneratedText]:
    """Write greedy texts of rows from z = mu and from z ~ q(z|x); from nothing without a latent.

    opened: the run.
    rows: which ones; none for a limit of 0.
    max_length: tokens per text.
    seed: of z ~ q(z|x).
    """
    model, texts = opened.model, []
    for batch in opened.rows(rows) if rows.limit else []:
        # Infer what each row's texts are written from.
        moved = batch.to(model.device)
        code = model.infer(moved.instruction)
        z = model.latent.mean(code)
        sources = {"no z": z}
        if z[0].numel():
            noise = model.training_noise(moved.sample_index, seed=seed, epoch=EVALUATION_EPOCH)
            sources = {"z=mu": z, "z~q": model.latent.sample(code, noise)}
        written = {
            source: model.generate(
                z, max_length=max_length, temperature=0, instruction=moved.instruction
            ).tolist()
            for source, z in sources.items()
        }
        # Put them beside the references.
        for row, (instruction, reference) in enumerate(opened.texts(batch)):
            ids = {source: opened.tokenizer.content(text[row]) for source, text in written.items()}
            texts.append(
                GeneratedText(
                    instruction=instruction,
                    reference=reference,
                    reference_ids=opened.tokenizer.content(batch.response.rows()[row].tolist()),
                    generated={s: opened.tokenizer.decode(i) for s, i in ids.items()},
                    generated_ids=ids,
                )
            )
    return texts


def score_sources(texts: list[GeneratedText]) -> dict[str, dict[str, float | None]]:
    """Return BLEU-4, ROUGE-L, exact match and token accuracy of each source, each 0 to 1."""
    sources = texts[0].generated if texts else {}
    return {source: _score(texts, source) for source in sources}


def _score(texts: list[GeneratedText], source: str) -> dict[str, float | None]:
    # Ids are compared as well: texts can be equal where tokens are not.
    metrics = ReconstructionMetrics()
    metrics.update(
        [text.generated[source] for text in texts],
        [text.reference for text in texts],
        [text.generated_ids[source] for text in texts],
        [text.reference_ids for text in texts],
    )
    scores = metrics.compute()
    return {
        "bleu4": scores.bleu4,
        "rouge_l": scores.rouge_l,
        "exact_match": scores.exact_match,
        "token_accuracy": scores.token_accuracy,
    }


def text_lines(texts: list[GeneratedText], show: int) -> list[str]:
    """Return the scores of each source, then `show` texts side by side."""
    lines = [
        f"from {source}: " + "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        for source, values in score_sources(texts).items()
    ]
    for text in texts[:show]:
        lines.append(f"\n  instruction: {text.instruction}\n  reference:   {text.reference}")
        lines += [f"  {source + ':':<12} {words}" for source, words in text.generated.items()]
    return lines


def write_texts(
    path: str, checkpoint: str, texts: list[GeneratedText], likelihoods: Likelihoods
) -> None:
    """Write scores, likelihoods and all texts as JSON; directories are made.

    path: of the file.
    checkpoint: as the user named it.
    texts, likelihoods: what was measured.
    """
    content = {
        "checkpoint": checkpoint,
        **likelihoods.to_json(),
        "scores": score_sources(texts),
        "texts": [asdict(text) for text in texts],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=2) + "\n")
