"""Sparsifies the filters of a live model, and undoes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..errors import SparsityError
from .calibration import ModelInputs
from .filters import find_filters, is_sparse, make_dense
from .planning import Pattern, apply_masks, plan_masks
from .quantizer import FlashFFTSparseQuantizer, mark_sparse, unmark_sparse

Model = TypeVar("Model", bound=nn.Module)


def sparsify_model(
    model: Model,
    pattern_or_keep: Pattern,
    *,
    by: str = "bins",
    layers: Sequence[str] | None = None,
    block: int | None = None,
    calibration: ModelInputs | None = None,
) -> Model:
    """
    Zeroes part of the spectrum of a model's long filters (frequency sparsity, section 3.3 of arXiv:2311.05908).

    The weights stay as they are and go on training; the masks act on the filters that they generate. Each filter is
    masked at twice its full length, with one mask for all its channels. A causal filter stays causal: what masking
    moves to its negative lags is dropped, see [`sparsity_report`]. Works on patched and unpatched models alike.

    Transformers models save, load and train as usual where this package is imported. Where it is not, remote code would
    run with dense filters and no more than a warning: share models by [`hf_flashfftconv.save_pretrained`] or
    [`hf_flashfftconv.push_to_hub`], which add a loader file. A sparse filter is always generated at full length, so
    training on much shorter sequences costs more than with dense filters.

    Args:
        model (`nn.Module`):
            A model with Hyena filters; changed in place. It may be wrapped (PEFT, torch.compile, data parallel).
        pattern_or_keep (`int`, `float`, [`FrequencyMask`] or `Mapping[str, FrequencyMask]`):
            A `float` in (0, 1] is the fraction to keep, of what `by` says; an `int` is the exact number of blocks of
            neighbouring bins to keep in each filter. Or one mask for all filters, or masks by filter name.
        by (`str`, *optional*, defaults to `"bins"`):
            `"bins"`: one budget of bins for the whole model, spread over its filters by energy. `"energy"`: every
            filter keeps the fewest bins that hold this share of its energy.
        layers (`Sequence[str]`, *optional*):
            Names of the filter modules to sparsify, wildcards allowed; all by default.
        block (`int`, *optional*):
            Number of neighbouring bins that are kept or dropped together. Defaults to a 256th of the FFT size.
        calibration (`torch.Tensor` or `Mapping[str, Any]`, *optional*):
            One batch for the model, its first argument or its keyword arguments. Bins then count by their effect on the
            model's output for this batch; by default they count by their share of the filter's energy.

    Returns:
        `nn.Module`: The same model.

    Raises:
        SparsityError: If the model has no filters, a filter is sparse already, or the pattern is impossible or does not
            fit; the model is left as it was.

    Example:

    ```python
    >>> model = sparsify_model(model, 0.25)
    >>> print(sparsity_report(model))
    ```
    """
    target = unwrap(model)
    quantizer = getattr(target, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, FlashFFTSparseQuantizer):
        method = quantizer.quantization_config.quant_method
        raise SparsityError(f"the model is quantised with {method}; only unquantised models can be sparsified")
    apply_masks(target, plan_masks(target, pattern_or_keep, by=by, layers=layers, block=block, calibration=calibration))
    mark_sparse(target)
    return model


def densify_model(model: Model) -> Model:
    """
    Undoes [`sparsify_model`] bit for bit, also on a model that was loaded sparse; a dense model is left as it is.

    Args:
        model (`nn.Module`): The model; changed in place.

    Returns:
        `nn.Module`: The same model.
    """
    target = unwrap(model)
    sparse = [module for module in find_filters(target).values() if is_sparse(module)]
    for module in sparse:
        make_dense(module)
    if sparse:
        unmark_sparse(target)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, torch.compile and data-parallel wrappers; any other module itself."""
    inner: nn.Module | None = model
    while inner is not None and not isinstance(inner, PreTrainedModel):
        peft = getattr(inner, "get_base_model", None)
        inner = peft() if callable(peft) else getattr(inner, "_orig_mod", getattr(inner, "module", None))
    return model if inner is None else inner
