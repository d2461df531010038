"""What training reads: tokenizer, processed rows, samplers, collator, loaders, augmentation."""

from cdpvae.data.augmentation import TextAugmenter
from cdpvae.data.collator import DynamicPaddingCollator, VAECollator
from cdpvae.data.dataset import InstructionDataset, PreprocessedDataset
from cdpvae.data.example import Example
from cdpvae.data.loader import Loader, StepBatch, StepLoader, evaluation_batches
from cdpvae.data.sampler import RowCountSampler, StepRows
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
    "StepBatch",
    "StepLoader",
    "StepRows",
    "RowCountSampler",
    "evaluation_batches",
]
