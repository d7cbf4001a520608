"""What the causal models remember between the calls of step-by-step decoding."""

import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..streaming import BLOCK_SIZE, StreamingConv
from .hyena import HyenaFilter, HyenaOperator

# The name of a cache among a model's outputs and the arguments that `generate` passes. The models take both.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HyenaCacheLayer(CacheLayerMixin):
    """State of one Hyena operator: the last inputs of its short convolution, and the stream of the long one.

    Args:
        max_length (`int`): The longest sequence that the operator has filters for.
        block_size (`int`, *optional*, defaults to 128): See [`StreamingConv`].
    """

    supports_early_init = False

    def __init__(self, max_length: int, block_size: int = BLOCK_SIZE):
        super().__init__()
        self.max_length = max_length
        self.block_size = block_size
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.is_initialized = False
        self._long: StreamingConv | None = None
        # What the short convolution still reaches, and with `record_past` what it may be cropped back to.
        self._short: Tensor | None = None
        self._reach = 0

    @torch.compiler.disable
    def mix(self, operator: HyenaOperator, u: Tensor) -> Tensor:
        """The forward of `operator` for the next positions `(batch, positions, d_model)`, given those before them.

        Raises:
            ValueError: The sequence becomes longer than the filters, or its batch or dtype has changed.
        """
        length = u.shape[1]
        stream = self._with_room(operator.filter_fn, self.get_seq_length() + length)
        x = operator.in_proj(u).transpose(1, 2)
        seen, past = x.detach(), 0
        if self._short is not None:
            if self._short.shape[0] != x.shape[0]:
                raise ValueError(f"The cache holds a batch of {self._short.shape[0]} sequences, got {x.shape[0]}.")
            past = min(self._reach, self._short.shape[-1])
            x = torch.cat([self._short[..., self._short.shape[-1] - past :], x], dim=-1)
            seen = torch.cat([self._short, seen], dim=-1) if self.record_past else x.detach()
        mixed = operator.short_filter(x)
        reach = mixed.shape[-1] - x.shape[-1]
        x0, x1, v = mixed[..., past : past + length].split(operator.d_model, dim=1)
        gated = operator.dropout(v * x1)
        y = stream.append(gated)
        self._long, self._reach, self.is_initialized = stream, reach, True
        self._keep(seen if self.record_past else seen[..., max(0, seen.shape[-1] - reach) :])
        return operator.out_proj((x0 * _NoGradient.apply(y, gated)).transpose(1, 2))

    def get_seq_length(self) -> int:
        """The number of positions so far."""
        return 0 if self._long is None else self._long.length

    def get_max_length(self) -> int:
        """The longest sequence that there are filters for."""
        return self.max_length

    # Its name in the first releases of transformers 5.
    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask, which these models do not have."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("A Hyena layer has no keys and values; see HyenaCacheLayer.mix.")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("A Hyena layer has no keys and values; see HyenaCacheLayer.mix.")

    @property
    def is_croppable(self) -> bool:
        """Whether positions can be taken back."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Remembers enough from now on for [`crop`] to take positions back, as assisted decoding needs it."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last positions back, down to where the last `crop` was or recording began.

        Args:
            tokens_to_remove (`int`): Minus the number of positions to remove. A positive number is the length to keep,
                as in the first releases of transformers 5.

        Raises:
            RuntimeError: More positions than were recorded would be removed.
        """
        # Some releases of transformers pass a tensor.
        length, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)
        removed = max(0, length - tokens_to_remove) if tokens_to_remove > 0 else min(-tokens_to_remove, length)
        if self._long is None or self._short is None:
            return
        kept = self._short.shape[-1] - removed
        if kept < min(self._reach, length - removed):
            raise RuntimeError(
                f"Cannot remove {removed} positions from a cache that has not recorded them: call "
                "`activate_past_recording` before they are added, or keep a `copy.deepcopy` of the cache."
            )
        self._long.truncate(length - removed)
        self._keep(self._short[..., max(0, kept - self._reach) : kept])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the sequences of the batch by those with these indices, as beam search needs it."""
        if self._long is not None and self._short is not None:
            self._long.select(beam_idx)
            self._keep(self._short.index_select(0, beam_idx.to(self._short.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences of the batch with these indices, or where a mask is true."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence of the batch."""
        if self._short is not None:
            self.reorder_cache(torch.arange(self._short.shape[0]).repeat_interleave(repeats))

    def _keep(self, short: Tensor) -> None:
        # A copy: a view would hold on to the projections of the whole prompt.
        with torch.inference_mode(False), torch.no_grad():
            self._short = short.clone()

    def _with_room(self, filter_fn: HyenaFilter, length: int) -> StreamingConv:
        """The stream, whose taps are generated for twice the length whenever it outgrows them."""
        stream = self._long
        if stream is not None and length <= stream.max_length:
            return stream
        k, skip = _taps(filter_fn, max(length, min(self.max_length, 1 << max(8, length.bit_length()))))
        if stream is None:
            return StreamingConv(k, skip, block_size=self.block_size)
        stream.extend(k)
        return stream


class HyenaCache(Cache):
    """Cache of [`HyenaDNAForCausalLM`] and [`HyenaLMForCausalLM`]; `generate` makes one unless `use_cache=False`.

    Passed as `past_key_values`, or as `cache`, the name that transformers has for it from 5.24 on, it lets a model go
    on from the positions that it holds, with one token or many, exactly as if it saw the whole sequence. A prompt costs
    one forward pass, a token after it O(log^2 L) in the length L so far: see [`StreamingConv`]. `copy.deepcopy` keeps a
    state to come back to. A cache is for evaluation: a model in training mode makes none, and no gradients flow through
    it.

    With B sequences of width D, a layer has room for L positions, a power of two above their number (at least 256, at
    most `max_seq_len` unless filters are cut): B D L elements of the model's dtype, at most B D L float32, and 12 D L
    bytes for filters.

    Args:
        config ([`HyenaDNAConfig`] or [`HyenaLMConfig`]): The configuration of the model.
        block_size (`int`, *optional*, defaults to 128): See [`StreamingConv`].

    Example:

    ```python
    >>> cache = HyenaCache(model.config)
    >>> model(prompt, past_key_values=cache)
    >>> logits = model(token, past_key_values=cache).logits
    ```
    """

    def __init__(self, config: PreTrainedConfig, block_size: int = BLOCK_SIZE):
        # Filters that are cut have no taps beyond the cut, at any length.
        longest = config.max_seq_len if config.truncation is None else sys.maxsize
        super().__init__(layers=[HyenaCacheLayer(longest, block_size) for _ in range(config.n_layer)])


def _taps(filter_fn: HyenaFilter, length: int) -> tuple[Tensor, Tensor | None]:
    """Causal taps `(channels, length)` and skip weights of a filter, also of one that accelerate has offloaded.

    The taps that a cut takes away are zeros.
    """
    aligned: Any = nullcontext()
    if hasattr(filter_fn, "_hf_hook"):
        from accelerate.utils import align_module_device

        aligned = align_module_device(filter_fn)
    with torch.inference_mode(False), torch.no_grad(), aligned:
        k = filter_fn.filter(length)[0].transpose(0, 1)
        return F.pad(k, (0, length - k.shape[-1])).contiguous(), filter_fn.bias.clone() if filter_fn.use_bias else None


class _NoGradient(torch.autograd.Function):
    """Passes `y` on, and raises an error where a gradient of it with respect to `source` is asked for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        raise RuntimeError("No gradients flow through a cache: call the model without past_key_values and use_cache.")
