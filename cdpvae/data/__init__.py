"""What training reads: tokenizer, processed rows, samplers, collator, loaders, augmentation."""

from cdpvae.data.augmentation import TextAugmenter
from cdpvae.data.collator import DynamicPaddingCollator, VAECollator
from cdpvae.data.dataset import InstructionDataset, PreprocessedDataset
from cdpvae.data.example import Example
from cdpvae.data.loader import Loader, Window, WindowLoader, evaluation_batches
from cdpvae.data.sampler import WindowPlan, WindowSampler
from cdpvae.data.token_budget import TokenBudgetSampler
from cdpvae.data.tokenizer import LlamaTokenizerWrapper

__all__ = [
    "DynamicPaddingCollator",
    "Example",
    "InstructionDataset",
    "LlamaTokenizerWrapper",
    "Loader",
    "PreprocessedDataset",
    "TextAugmenter",
    "TokenBudgetSampler",
    "VAECollator",
    "Window",
    "WindowLoader",
    "WindowPlan",
    "WindowSampler",
    "evaluation_batches",
]
