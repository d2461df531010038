"""Perplexity of texts under a Hugging Face causal language model that is not the one under test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdpvae.evaluation.checkpoint import OpenedRun
from cdpvae.evaluation.statistics import ratio_and_error


class TextScorer:
    """Scores texts with a causal language model, fp32 on a CPU and in its own dtype elsewhere.

    name: what figures call it. is_backbone: whether it is the backbone of the run itself.
    """

    def __init__(
        self, directory: str, tokenizer: str, device: torch.device, flag: str = "scorer"
    ) -> None:
        self.name, self.is_backbone, self._device = directory, False, device
        # On a CPU half precision is slower, and less exact.
        dtype = torch.float32 if device.type == "cpu" else "auto"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
            self._longest = getattr(model.config, "max_position_embeddings", None)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{flag}={directory!r} cannot be loaded: {reason}; give a directory of a causal "
                "language model with its tokenizer"
            ) from None
        # A scorer is never trained, so that dropout is off from here on.
        self._model = torch.nn.Module.to(model, device).eval()

    @classmethod
    def of(
        cls, opened: OpenedRun, scorer: str | None, backbone: str | None, flag: str = "scorer"
    ) -> TextScorer:
        """Open the scorer of a command.

        opened: the run.
        scorer: a directory or hub id; None takes the run's backbone with the run's tokenizer.
        backbone: the base weights, where they moved since training.
        flag: that names the scorer.

        Raises ValueError for a model that cannot be loaded.
        """
        if scorer is not None:
            return cls(scorer, scorer, opened.model.device, flag)
        # The run's own tokenizer: the backbone may bring none.
        directory = backbone or opened.settings.model.backbone
        own = cls(directory, str(opened.checkpoint / "tokenizer"), opened.model.device)
        own.is_backbone = True
        return own

    @property
    def note(self) -> str:
        """What a reader must know of the scorer."""
        if self.is_backbone:
            return (
                f"scored by the run's own backbone {self.name}, which favours its own habits; a "
                "model trained on the corpus with another seed (--scorer DIR) is the fair judge"
            )
        return f"scored by {self.name}"

    @torch.no_grad()
    def nats(self, texts: Sequence[str]) -> tuple[list[float], list[int]]:
        """Return -log p of every text in nats, and its scored tokens; a text of none has (0, 0).

        BOS, where the tokenizer has one, is given and not scored; the end is not scored, as texts
        may be cut. Tokens beyond the model's positions are left out.
        """
        nats, tokens = [], []
        for text in texts:
            # One text a pass: no padding, and no attention mask to get wrong.
            row = self._row(text)
            count = max(row.shape[1] - 1, 0)
            tokens.append(count)
            if not count:
                nats.append(0.0)
                continue
            # The first token is given; each other one is predicted from those before it.
            logits = self._model(input_ids=row[:, :-1]).logits[0].float()
            nats.append(float(F.cross_entropy(logits, row[0, 1:], reduction="sum")))
        return nats, tokens

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the last hidden state at the last token of every text -> (texts, D) fp32, CPU."""
        rows = []
        for text in texts:
            row = self._row(text)
            # A text without a token, for a tokenizer without BOS, is represented by its end.
            if not row.shape[1]:
                row = row.new_full((1, 1), self._tokenizer.eos_token_id)
            states = self._model(input_ids=row, output_hidden_states=True).hidden_states
            rows.append(states[-1][0, -1].float().cpu())
        return torch.stack(rows)

    def _row(self, text: str) -> torch.Tensor:
        """Return BOS, where there is one, and the tokens of a text -> (1, tokens) int64."""
        # Special tokens of the tokenizer's own choice would add an end here and there.
        bos = self._tokenizer.bos_token_id
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = ids if bos is None else [bos, *ids]
        return torch.tensor([ids[: self._longest]], dtype=torch.long, device=self._device)

    def perplexity(
        self, texts: Sequence[str], together: int = 1
    ) -> tuple[float, float | None, int]:
        """Return exp(nats per token) of texts, its standard error, and how many had a token.

        together: so many texts in a row are kin, and count as one for the error.
        """
        # Tokens count, not texts: long texts weigh more.
        nats, tokens = self.nats(texts)
        scored = sum(count > 0 for count in tokens)
        starts = range(0, len(texts), together)
        mean, error = ratio_and_error(
            [sum(nats[start : start + together]) for start in starts],
            [sum(tokens[start : start + together]) for start in starts],
        )
        value = math.exp(mean)
        return value, None if error is None else value * error, scored
