"""The model card: README.md of a saved model, in the form of the Hugging Face hub.

Nothing in it depends on when or where it was written, so that the same model has the same card.
Form: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from cdpvae.config import ModelConfig, Settings
from cdpvae.config.renames import by_key

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Where a run happened to be, and how it was cut into pieces, says nothing of the model.
PLACES = {
    "training.output_dir",
    "training.ds_config",
    "training.resume",
    "training.stop_after",
    "data.processed_dir",
}
# What stands at the top, by the kind of latent.
WHAT_WRITES = {
    "none": "A Llama with LoRA and no latent, the baseline of those that have one.",
    "": "Soft prompts made from a latent vector steer a Llama with LoRA.",
}
LOADING = """\
```python
from cdpvae import LlamaSoftPromptVAE

model = LlamaSoftPromptVAE.from_pretrained("PATH_OR_HUB_ID")  # backbone=... where it lies elsewhere
```"""


def model_card(
    library: ModelCardData,
    config: ModelConfig,
    *,
    settings: Settings | None = None,
    counts: Mapping[str, Any] | None = None,
    step: int | None = None,
    figures: Mapping[str, float] | None = None,
) -> ModelCard:
    """Write the card of a model; what is not known is left out, and said to be.

    library: what every model of this library has: its name, licence, tags.
    config: of the network.
    settings: of the run that trained it.
    counts: of records and rows, from the manifest of the processed data.
    step, figures: of the latest evaluation on validation rows.
    """
    # The front matter, which the hub reads.
    base = config.backbone
    is_hub_id = HUB_ID.fullmatch(base) is not None and not Path(base).is_dir()
    content = library.to_dict() | {"pipeline_tag": "text-generation"}
    content["tags"] = sorted({*content.get("tags", []), "cdpvae", "lora", "peft", "text-vae"})
    if is_hub_id:
        content["base_model"] = base
    front = ModelCardData(**content)
    # The text: what it is, how to load it, how good it is, what made it.
    base_text = f"`{base}`" if is_hub_id else f"`{Path(base).name}` (a local directory)"
    what = WHAT_WRITES.get(config.latent.kind, WHAT_WRITES[""])
    if config.reads_instruction:
        what += " It reads the instruction before it writes the response."
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        "# A Llama with a latent space\n",
        f"{what} These files hold what was trained; the base weights, {base_text}, are not "
        "among them and have their own licence.\n",
        "## Loading\n",
        f"{LOADING}\n",
        "## Validation\n",
        _figures(step, figures),
        "## Data\n",
        _counts(counts),
        "## Settings\n",
        _settings(config, settings),
    ]
    return ModelCard("\n".join(parts))


def _figures(step: int | None, figures: Mapping[str, float] | None) -> str:
    if not figures:
        return "Not evaluated.\n"
    table = _table(("figure", "value"), ((name, f"{v:.6g}") for name, v in figures.items()))
    return f"After step {step}. Likelihoods are nats per sequence.\n\n{table}"


def _counts(counts: Mapping[str, Any] | None) -> str:
    if not counts:
        return "No counts known.\n"
    # Reasons are added up: the manifest has them one by one.
    rows = (
        (name, f"{sum(value.values()) if isinstance(value, dict) else value:,}")
        for name, value in counts.items()
        if isinstance(value, int | dict)
    )
    return _table(("records and rows", "count"), rows)


def _settings(config: ModelConfig, settings: Settings | None) -> str:
    """Return the network's settings, and of the run those that are not the default."""
    rows = {f"model.{key}": v for key, v in by_key(config.model_dump(mode="json")).items()}
    for key in ("model.backbone", "model.tokenizer"):
        if rows[key] is not None and Path(rows[key]).is_dir():
            rows[key] = Path(rows[key]).name
    if settings is not None:
        default = by_key(json.loads(Settings().dump()))
        for key, value in by_key(json.loads(settings.dump())).items():
            is_news = not key.startswith("model.") and default.get(key) != value
            if is_news and key not in PLACES:
                rows[key] = value
    table = _table(("setting", "value"), ((k, f"`{json.dumps(v)}`") for k, v in rows.items()))
    note = "" if settings is None else "\nFurther settings of the run have their default.\n"
    return table + note


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(lines) + "\n"
