"""Records to batches: formats, filters, deduplication, tokenization, Arrow, windows of rows."""

from cdpvae.data.collator import DynamicPaddingCollator, VAECollator
from cdpvae.data.dataset import InstructionDataset, PreprocessedDataset
from cdpvae.data.formats import Example
from cdpvae.data.loader import (
    Window,
    WindowLoader,
    WindowPlan,
    WindowSampler,
    evaluation_batches,
)
from cdpvae.data.tokenization import LlamaTokenizerWrapper

__all__ = [
    "DynamicPaddingCollator",
    "Example",
    "InstructionDataset",
    "LlamaTokenizerWrapper",
    "PreprocessedDataset",
    "VAECollator",
    "Window",
    "WindowLoader",
    "WindowPlan",
    "WindowSampler",
    "evaluation_batches",
]
