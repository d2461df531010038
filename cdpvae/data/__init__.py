"""What training reads: tokenizer, processed rows, samplers, collator, loaders, augmentation."""

from cdpvae.data.augmentation import PackedAugmenter
from cdpvae.data.collator import VAECollator
from cdpvae.data.dataset import PreprocessedDataset, TokenDataset
from cdpvae.data.example import Example
from cdpvae.data.loader import Loader, StepBatch, StepLoader, evaluation_batches
from cdpvae.data.sampler import RowCountSampler, StepRows, StepSampler
from cdpvae.data.token_budget import TokenBudgetSampler
from cdpvae.data.tokenizer import LlamaTokenizerWrapper

__all__ = [
    "Example",
    "LlamaTokenizerWrapper",
    "Loader",
    "PackedAugmenter",
    "PreprocessedDataset",
    "RowCountSampler",
    "StepBatch",
    "StepLoader",
    "StepRows",
    "StepSampler",
    "TokenBudgetSampler",
    "TokenDataset",
    "VAECollator",
    "evaluation_batches",
]
