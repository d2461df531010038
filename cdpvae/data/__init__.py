"""Records to batches: formats, filters, deduplication, tokenization, Arrow, windows of rows."""

from cdpvae.data.budget import TokenBudgetSampler
from cdpvae.data.collator import DynamicPaddingCollator, VAECollator
from cdpvae.data.dataset import InstructionDataset, PreprocessedDataset
from cdpvae.data.formats import Example
from cdpvae.data.loader import Loader, Window, WindowLoader, evaluation_batches
from cdpvae.data.sampling import WindowPlan, WindowSampler
from cdpvae.data.tokenization import LlamaTokenizerWrapper

__all__ = [
    "DynamicPaddingCollator",
    "Example",
    "InstructionDataset",
    "LlamaTokenizerWrapper",
    "Loader",
    "PreprocessedDataset",
    "TokenBudgetSampler",
    "VAECollator",
    "Window",
    "WindowLoader",
    "WindowPlan",
    "WindowSampler",
    "evaluation_batches",
]
