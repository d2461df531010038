"""Write text from latents: of given instructions, between two of them, or from the prior.

python -m cdpvae.generate --checkpoint checkpoints/checkpoint-1000 --text "Describe a trip."
python -m cdpvae.generate --checkpoint ... --text "first" "second" --interpolate --num-steps 7
python -m cdpvae.generate --checkpoint ... --samples 5 --temperature 0.8 --top-p 0.9
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch

from cdpvae.batch import PackedText
from cdpvae.command_line import parse_options, run


@dataclasses.dataclass
class GenerateOptions:
    """What to write, and how."""

    checkpoint: str = ""
    """checkpoint-N directory of a training run"""
    text: tuple[str, ...] = ()
    """instructions to encode; each is answered from its z = mu"""
    interpolate: bool = False
    """walk from the first --text to the second"""
    num_steps: int = 7
    """latents on that walk, ends included"""
    mode: str = "slerp"
    """linear or slerp"""
    samples: int = 0
    """texts from z ~ N(0, I)"""
    max_length: int = 256
    """tokens per text"""
    temperature: float = 0.0
    """0 is greedy"""
    top_p: float = 1.0
    """nucleus of the sampling"""
    seed: int = 0
    backbone: str | None = None
    """the base weights, where they moved since training"""
    device: str | None = None


def generate(argv: Sequence[str] | None = None) -> None:
    """Parse, load, write. Raises ValueError for what a user can cause."""
    options = parse_options(GenerateOptions, "Write text from the latents of a cdpvae.", argv)
    check(options)
    from cdpvae.evaluation.checkpoint import open_run

    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    generator = torch.Generator(device=opened.model.device).manual_seed(options.seed)
    labels, z = latents(options, opened, generator)
    ids = opened.model.generate(
        z,
        max_length=options.max_length,
        temperature=options.temperature,
        top_p=options.top_p,
        generator=generator,
    )
    for label, row in zip(labels, ids.tolist(), strict=True):
        print(f"{label}  {opened.tokenizer.decode(row)}")


def check(options: GenerateOptions) -> None:
    """Raises ValueError for options that ask for nothing or contradict each other."""
    if not options.checkpoint:
        raise ValueError("--checkpoint is needed: a checkpoint-N directory")
    if options.interpolate and len(options.text) != 2:
        raise ValueError(f"--interpolate walks between two texts; --text gives {len(options.text)}")
    if bool(options.samples) == bool(options.text):
        raise ValueError("give either --text or --samples")


def latents(options: GenerateOptions, opened, generator) -> tuple[list[str], torch.Tensor]:
    """-> a label for every row, and z (rows, Z)."""
    model = opened.model
    latent = model.config.latent
    if latent.kind == "none":
        raise ValueError(f"checkpoint={options.checkpoint!r} was trained with --latent none")
    if options.samples:
        z = torch.randn(
            options.samples, latent.latent_dim, generator=generator, device=model.device
        )
        return [f"z~N(0,I) {n + 1}:" for n in range(options.samples)], z
    ids = [opened.tokenizer.encode_instruction(text) for text in options.text]
    with torch.no_grad():
        mu = model.posterior(PackedText.from_lists(ids).to(model.device)).mu
    if not options.interpolate:
        return [f"{n + 1}:" for n in range(len(ids))], mu
    z = model.interpolate(mu[0], mu[1], options.num_steps, options.mode)
    labels = [f"{step / (options.num_steps - 1):.2f}:" for step in range(options.num_steps)]
    return labels, z


def main(argv: Sequence[str] | None = None) -> int:
    return run(generate, argv)


if __name__ == "__main__":
    sys.exit(main())
