"""Frequency-sparse filters: masks, conversion of models, reports, and the transformers plug-in that loads them."""

from .conversion import densify_model, sparsify_model
from .pattern import FrequencyMask
from .quantizer import FlashFFTSparseConfig
from .report import FilterSparsity, SparsityReport, sparsity_report

__all__ = [
    "FilterSparsity",
    "FlashFFTSparseConfig",
    "FrequencyMask",
    "SparsityReport",
    "densify_model",
    "sparsify_model",
    "sparsity_report",
]
