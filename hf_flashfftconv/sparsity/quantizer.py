"""Sparse checkpoints as transformers knows quantised ones: the entry in `config.json` and the plug-in that reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..adapters.repair import declare_shared_weights
from ..errors import CheckpointError, SparsityError
from .checkpoint import check_checkpoint
from .filters import find_filters, is_sparse, make_dense
from .pattern import FrequencyMask
from .planning import apply_masks, plan_masks

QUANT_METHOD = "flashfft_sparse"
FORMAT_VERSION = 1
MAX_LAYERS = 4096


class FlashFFTSparseConfig(QuantizationConfigMixin):
    """
    Frequency sparsity as the `quantization_config` of a transformers model.

    Either a wish, passed to `from_pretrained` to sparsify a dense checkpoint while it loads, or the masks themselves,
    as they stand in the `config.json` of a sparse checkpoint.

    Args:
        keep (`int` or `float`, *optional*):
            How much to keep, see [`sparsify_model`].
        by (`str`, *optional*, defaults to `"bins"`):
            What a fraction refers to, see [`sparsify_model`].
        layers (`list[str]`, *optional*):
            Names or patterns of the filters; all by default.
        block (`int`, *optional*):
            Neighbouring bins that are kept or dropped together.
        masks (`dict[str, dict]`, *optional*):
            [`FrequencyMask.to_dict`] for each sparse filter, named from the base model on (no head prefix).
        format_version (`int`, *optional*, defaults to 1):
            Version of this entry.

    Raises:
        CheckpointError: If the entry is not one that this version of the package writes.
    """

    def __init__(
        self,
        keep: int | float | None = None,
        by: str = "bins",
        layers: Sequence[str] | None = None,
        block: int | None = None,
        masks: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"format_version {format_version!r:.200} of {QUANT_METHOD} is not supported; "
                f"this version of hf_flashfftconv reads {FORMAT_VERSION}"
            )
        if quant_method != QUANT_METHOD or unknown:
            raise CheckpointError(f"not an entry of {QUANT_METHOD}: {quant_method!r:.200}, {list(unknown)!r:.200}")
        if (keep is None) == (masks is None):
            raise CheckpointError(f"{QUANT_METHOD} needs keep or masks, got keep={keep!r:.200}, masks={masks!r:.200}")
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        if masks is None:
            self.keep, self.by, self.block = keep, by, block
            self.layers = None if layers is None else list(layers)
        else:
            self.masks = masks
            self.frequency_masks()

    def frequency_masks(self) -> dict[str, FrequencyMask]:
        """The masks of a checkpoint by filter name; raises [`CheckpointError`] on an entry that cannot be one."""
        if not isinstance(self.masks, dict) or not 0 < len(self.masks) <= MAX_LAYERS:
            raise CheckpointError(f"masks must be a dict of 1 to {MAX_LAYERS} filters, got {self.masks!r:.200}")
        result = {}
        for name, entry in self.masks.items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.]{1,512}", name):
                raise CheckpointError(f"not the name of a filter: {name!r:.200}")
            try:
                result[name] = FrequencyMask.from_dict(entry)
            except SparsityError as error:
                raise CheckpointError(f"the mask of {name} is not valid: {error}") from error
        return result


class FlashFFTSparseQuantizer(HfQuantizer):
    """Gives a model its sparse filters before its weights load, or chooses them after a dense checkpoint has loaded."""

    quantization_config: FlashFFTSparseConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            masks = self.quantization_config.frequency_masks()
            filters = find_filters(model)
            names = {base_name(model, name): name for name in filters}
            try:
                apply_masks(model, {names.get(name, name): mask for name, mask in masks.items()})
            except SparsityError as error:
                raise CheckpointError(f"the sparse filters of the checkpoint do not fit the model: {error}") from error
            if checkpoint_files is not None:
                sparse = {name: filters[names[name]] for name in masks}
                check_checkpoint(checkpoint_files, sparse, model.base_model_prefix)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            wish: Any = self.quantization_config
            apply_masks(model, plan_masks(model, wish.keep, by=wish.by, layers=wish.layers, block=wish.block))
            mark_sparse(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        for module in find_filters(model).values():
            if is_sparse(module):
                make_dense(module)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        # called when a model is saved; older remote code shares parameters without saying so, which would fail there
        declare_shared_weights(model)
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def base_name(model: nn.Module, name: str) -> str:
    """A module's name seen from the base model, so that a checkpoint fits the base model and every head alike."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix and hasattr(model, prefix) else name


def mark_sparse(model: nn.Module) -> None:
    """Tells transformers about the masks of a model, so that saving, loading and training treat it as sparse."""
    if not isinstance(model, PreTrainedModel):
        return
    sparse = {name: module for name, module in find_filters(model).items() if is_sparse(module)}
    config = FlashFFTSparseConfig(
        masks={base_name(model, name): module.frequency_mask.to_dict() for name, module in sparse.items()}
    )
    model.hf_quantizer = FlashFFTSparseQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config


def unmark_sparse(model: nn.Module) -> None:
    """Undoes [`mark_sparse`], also on a model that was loaded from a sparse checkpoint."""
    if isinstance(model, PreTrainedModel):
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        for name in ("quantization_config", "_is_quantized"):
            model.config.__dict__.pop(name, None)


def register() -> None:
    """Makes `from_pretrained` understand sparse checkpoints; calling it again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(FlashFFTSparseConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(FlashFFTSparseQuantizer)
