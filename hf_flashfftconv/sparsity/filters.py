"""The implicit filters of a model, dense and sparse: how they are found, masked and restored."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..errors import SparsityError
from .pattern import FrequencyMask


def find_filters(model: nn.Module) -> dict[str, nn.Module]:
    """
    Finds the implicit filters of long convolutions by structure, wherever their code comes from.

    Args:
        model (`nn.Module`): Any module; its parameters may be on the meta device.

    Returns:
        `dict[str, nn.Module]`: Filter modules by name, in module order.
    """
    return {name: module for name, module in model.named_modules() if _is_filter(module)}


def _is_filter(module: nn.Module) -> bool:
    positions = getattr(getattr(module, "pos_emb", None), "z", None)
    return (
        any(cls.__name__ == "HyenaFilter" for cls in type(module).__mro__)
        and callable(getattr(module, "filter", None))
        and isinstance(positions, torch.Tensor)
        and positions.ndim == 3
        and hasattr(module, "modulation")
    )


def full_length(module: nn.Module) -> int:
    """Number of taps that a filter module can generate, the model's maximum length."""
    return int(module.pos_emb.z.shape[1])


def is_bidirectional(module: nn.Module) -> bool:
    """Whether a filter module also generates anticausal taps."""
    return hasattr(module, "implicit_filter_rev") and callable(getattr(module, "filter_rev", None))


def is_sparse(module: nn.Module) -> bool:
    """Whether a filter module runs with a frequency mask."""
    return isinstance(module, SparseFilter)


def dense_taps(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    All taps of a filter module without its mask.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: Taps at lags 0, 1, ... `(1, length, channels)`, and at lags
        -1, -2, ... of the same shape for a bidirectional filter.
    """
    source: Any = super(SparseFilter, module) if is_sparse(module) else module
    length = full_length(module)
    return _taps(source.filter(length)), _taps(source.filter_rev(length)) if is_bidirectional(module) else None


def filter_spectrum(forward: torch.Tensor, reverse: torch.Tensor | None) -> torch.Tensor:
    """
    The spectrum of a filter on the circle of twice its length, where negative lags sit in the upper half.

    Args:
        forward (`torch.Tensor`): Taps `(1, length, channels)` at lags 0, 1, ...
        reverse (`torch.Tensor`, *optional*): Taps of the same shape at lags -1, -2, ...

    Returns:
        `torch.Tensor`: Complex `(1, length + 1, channels)`.
    """
    kernel = forward if reverse is None else torch.cat([forward, reverse.flip(1)], dim=1)
    kernel = kernel if kernel.dtype == torch.float64 else kernel.float()
    return torch.fft.rfft(kernel, n=2 * forward.shape[1], dim=1)


def mask_taps(
    forward: torch.Tensor, reverse: torch.Tensor | None, mask: FrequencyMask
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Removes the bins outside `mask` from a filter.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Taps `(1, length, channels)` at lags 0, 1, ... and at lags -1, -2, ...
        The latter are not zero for a causal filter either, since a band-limited filter has no sharp edge.
    """
    spectrum = filter_spectrum(forward, reverse)
    spectrum = spectrum * mask.as_tensor(spectrum.device)[:, None]
    kernel = torch.fft.irfft(spectrum, n=mask.fft_size, dim=1).to(forward.dtype)
    length = forward.shape[1]
    return kernel[:, :length], kernel[:, length:].flip(1)


class SparseFilter:
    """
    Mixin that masks the spectrum of an implicit filter; a filter module becomes sparse by joining it to its class.

    The taps are generated at full length by the dense class, transformed at twice that length, masked, transformed back
    and cut to the lags that the dense filter has. So the result is differentiable with respect to the filter's weights,
    the same for every sequence length, and as causal as the dense filter: what the mask moves to the negative lags of a
    causal filter is dropped, where a circular convolution would let it read the future.

    `filter` is a pure function of the weights and of `frequency_mask`, which is never changed in place.
    """

    dense_class: type[nn.Module]
    frequency_mask: FrequencyMask

    def filter(self, L: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The first `L` causal taps, `(1, L, channels)`."""
        return self.masked(*args, **kwargs)[0][:, : self._checked(L)]

    def masked(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """All masked taps at lags 0, 1, ... and -1, -2, ..."""
        forward = super().filter(self.frequency_mask.fft_size // 2, *args, **kwargs)  # type: ignore[misc]
        return mask_taps(_taps(forward), None, self.frequency_mask)

    def _checked(self, length: int) -> int:
        if length > self.frequency_mask.fft_size // 2:
            raise SparsityError(f"length {length} exceeds the {self.frequency_mask.fft_size // 2} taps of this filter")
        return length

    def extra_repr(self) -> str:
        return f"kept_bins={self.frequency_mask.kept}/{self.frequency_mask.bins}"


class SparseBidirectionalFilter(SparseFilter):
    """A [`SparseFilter`] with anticausal taps: both halves form one circular filter, and no lag is dropped."""

    def filter_rev(self, L: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The first `L` anticausal taps, `(1, L, channels)`."""
        return self.masked(*args, **kwargs)[1][:, : self._checked(L)]

    def masked(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.frequency_mask.fft_size // 2
        dense: Any = super(SparseFilter, self)
        forward, reverse = dense.filter(length, *args, **kwargs), dense.filter_rev(length, *args, **kwargs)
        return mask_taps(_taps(forward), _taps(reverse), self.frequency_mask)


def check_mask(name: str, module: nn.Module, mask: FrequencyMask) -> None:
    """Raises a [`SparsityError`] unless `mask` can be put on the dense filter `module`."""
    if is_sparse(module):
        raise SparsityError(f"{name} is sparse already; call densify_model first to choose another mask")
    if getattr(module, "truncation", None) is not None:
        raise SparsityError(f"{name} is cut to filter_length={module.truncation.length}; a mask needs all taps")
    if mask.fft_size != 2 * full_length(module):
        raise SparsityError(
            f"{name} has {full_length(module)} taps and needs a mask of fft_size {2 * full_length(module)}, "
            f"got {mask.fft_size}"
        )


def make_sparse(module: nn.Module, mask: FrequencyMask) -> None:
    """Puts a mask on a dense filter module, in place; parameters, buffers and hooks stay."""
    dense: Any = type(module)
    module.__class__ = _sparse_class(dense, is_bidirectional(module))
    module.frequency_mask = mask


def make_dense(module: nn.Module) -> None:
    """Undoes [`make_sparse`] exactly."""
    module.__class__ = module.dense_class
    del module.frequency_mask


@functools.cache
def _sparse_class(dense: Any, bidirectional: bool) -> type[nn.Module]:
    mixin = SparseBidirectionalFilter if bidirectional else SparseFilter
    return type(f"Sparse{dense.__name__}", (mixin, dense), {"__module__": dense.__module__, "dense_class": dense})


def _taps(taps: Any) -> torch.Tensor:
    if not isinstance(taps, torch.Tensor) or taps.ndim != 3 or taps.shape[0] != 1:
        kind = tuple(taps.shape) if isinstance(taps, torch.Tensor) else type(taps).__name__
        raise SparsityError(f"a filter must return one tensor of shape (1, length, channels), got {kind}")
    return taps
