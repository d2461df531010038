"""Score generated text against references, each score from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextScores:
    """Hold the scores of one corpus.

    bleu4: corpus BLEU (sacreBLEU, with the settings in `signature`).
    rouge_l: mean F1 of the texts.
    exact_match: share of texts that equal their reference.
    token_accuracy: equal ids at equal positions over reference length; None without ids.
    texts: how many were scored.
    """

    bleu4: float
    rouge_l: float
    exact_match: float
    token_accuracy: float | None
    signature: str
    texts: int


class ReconstructionMetrics:
    """Collect hypothesis/reference pairs, then score them as one corpus.

    BLEU: Papineni et al. 2002, tokenised and smoothed as sacreBLEU's signature says (Post 2018).
    ROUGE-L: Lin 2004, F1 of the longest common subsequence, with stemming off.
    """

    def __init__(self) -> None:
        # Imported here: nltk and scipy come with it, two seconds at the start of every process.
        from rouge_score.rouge_scorer import RougeScorer

        self._hypotheses: list[str] = []
        self._references: list[str] = []
        self._equal_ids = self._reference_ids = 0
        self._rouge = RougeScorer(["rougeL"], use_stemmer=False)

    def update(
        self,
        hypotheses: Sequence[str],
        references: Sequence[str],
        hypothesis_ids: Sequence[Sequence[int]] | None = None,
        reference_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Add texts, and their ids where token accuracy is wanted.

        hypotheses, references: one reference for each hypothesis.
        hypothesis_ids, reference_ids: their ids, without special tokens; both or neither.

        Raises ValueError when the lists differ in length or only one side has ids.
        """
        # Refuse lists that do not belong together.
        if (hypothesis_ids is None) != (reference_ids is None):
            missing = "hypothesis_ids" if hypothesis_ids is None else "reference_ids"
            raise ValueError(f"{missing} is None but the other ids are not; give both or neither")
        lists = (hypotheses, references, hypothesis_ids, reference_ids)
        lengths = {len(values) for values in lists if values is not None}
        if len(lengths) != 1:
            raise ValueError(f"lists of {sorted(lengths)} texts; give one reference per hypothesis")

        # Texts are scored at the end; ids are counted at once.
        self._hypotheses += hypotheses
        self._references += references
        if hypothesis_ids is not None and reference_ids is not None:
            for ours, theirs in zip(hypothesis_ids, reference_ids, strict=True):
                self._equal_ids += sum(a == b for a, b in zip(ours, theirs, strict=False))
                self._reference_ids += len(theirs)

    def compute(self) -> TextScores:
        """Score everything added so far. Raises ValueError when no text was added."""
        if not self._references:
            raise ValueError("no text to score; call update first")
        # Imported here for the same reason as above.
        from sacrebleu.metrics import BLEU

        bleu = BLEU()
        corpus = bleu.corpus_score(self._hypotheses, [self._references])
        # The other scores are means over the texts.
        pairs = list(zip(self._hypotheses, self._references, strict=True))
        rouge = [self._rouge.score(ref, hyp)["rougeL"].fmeasure for hyp, ref in pairs]
        return TextScores(
            # Equal texts come out a last bit above 100.
            bleu4=min(corpus.score / 100, 1.0),
            rouge_l=sum(rouge) / len(rouge),
            exact_match=sum(hyp == ref for hyp, ref in pairs) / len(pairs),
            token_accuracy=self._equal_ids / self._reference_ids if self._reference_ids else None,
            signature=str(bleu.get_signature()),
            texts=len(pairs),
        )
