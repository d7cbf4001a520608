"""What all families share: the description of a family, and the base of the classes that patched modules get.

A family is one file with a check that recognises its mixer modules by structure, and a subclass of [`PatchedMixer`]
whose `forward` restates the original one with a single `fft_conv` for gates, long convolution and skip term.
"""

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PatchError
from ..functional import fft_conv, gated_short_conv
from ..ops.short_conv import MAX_TAPS
from ..ops.truncation import Truncation, kept_taps
from .cache import FilterCache, Filters, may_cache
from .precision import WidenedFilter, keeping_float32
from .structure import has_hooks, is_plain
from .truncation import cuts_itself, truncation_of


@dataclass(frozen=True)
class Adapter:
    """One family of mixer modules.

    Args:
        family (`str`): The name in reports.
        class_names (`frozenset[str]`): Names that the class of a module, or one of its bases, must have.
        check (`Callable`): Raises `Unsupported` with the reason if the module is not safe to patch.
        mixer (`type[PatchedMixer]`): Supplies the new `forward`.
        claims (`Callable`, *optional*): Tells families apart that share a class name; by default all are claimed.
        input_shape (`Callable`, *optional*): The shape of an input of a given length, or the nearest one there is; by
            default `(1, length, d_model)` with `length` up to `l_max`, attributes of the module.
    """

    family: str
    class_names: frozenset[str]
    check: Callable[[nn.Module], None]
    mixer: "type[PatchedMixer]"
    claims: Callable[[nn.Module], bool] = lambda module: True
    input_shape: Callable[[Any, int], tuple[int, ...]] = lambda module, length: (
        1,
        min(length, module.l_max),
        module.d_model,
    )


class Usage(NamedTuple):
    """What the convolution of a patched module was last called with; `reverse_taps` of 0 for a causal one."""

    channels: int
    length: int
    taps: int
    reverse_taps: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class PatchState:
    """All that patching adds to a module: one attribute, outside of its parameters, buffers and state dict.

    `bypass` tells why the last call ran the original code, if it did. `twin` marks the module of the last check, which
    must not run it.
    """

    family: str
    backend: str = "auto"
    cache: FilterCache = field(default_factory=FilterCache)
    widened: list[WidenedFilter] | None = None
    last: Usage | None = None
    bypass: str = ""
    twin: bool = False
    truncation: Truncation | None = None
    # Filters that cut themselves, each with its truncation before patching.
    own_truncations: list[tuple[Any, Truncation | None]] = field(default_factory=list)


class PatchedMixer(nn.Module):
    """Base of the classes that patched modules get, in front of the module's own class.

    Sub-modules are called: quantisation, LoRA, offloading and the hooks of other libraries live there. Only of layers
    that are nothing but what their class does, the weights are read: those of a short filter for the kernel that also
    multiplies its outputs, those of a projection to keep them in the dtype of autocast.
    """

    _flashfftconv: PatchState
    _flashfftconv_original: type[nn.Module]
    # Of a mixer that holds its filter itself, the tensors that make it; all others keep the dtype of the model.
    own_filter: frozenset[str] = frozenset()
    # What has been built on a patched class within this package and must be undone before patching is.
    undo_first: str | None = None

    def original_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The unpatched code, for calls that the patched one does not cover; it knows nothing of a `filter_length`."""
        if self._flashfftconv.truncation is not None and not all(map(cuts_itself, self.filter_modules())):
            raise PatchError(
                f"this call of {self._flashfftconv_original.__name__} would run the original code with whole filters: "
                "filter_length allows neither hooks on the filters nor further arguments"
            )
        return self._flashfftconv_original.forward(self, *args, **kwargs)

    def bypass(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """[`original_forward`], with the reason in the report."""
        if not torch.compiler.is_compiling():
            self._flashfftconv.bypass = f"the last call ran the original code: {reason}"
        return self.original_forward(*args, **kwargs)

    def filter_modules(self) -> list[nn.Module]:
        """The modules whose methods generate the filters, and which are no longer called themselves.

        A mixer that holds its filter itself, in the parameters `own_filter`, is its only filter module.
        """
        # Also asked of modules that are not patched yet.
        return [self] if getattr(self, "own_filter", None) else [self.filter_fn]

    @property
    def channel_major(self) -> bool:
        """Whether the output of the long convolution goes straight to a projection.

        Dropout in between would draw in the order of memory, and so drop other values than in the original.
        """
        return False

    def covered(self) -> bool:
        """Whether the patched code may run: no hook was put on the filters since, which it would leave out."""
        return not any(has_hooks(filter_fn) for filter_fn in self.filter_modules() if filter_fn is not self)

    def checked_length(self, u: Tensor) -> int:
        """The length of `u` `(batch, length, channels)`; raises `ValueError` if there are no filters for it."""
        length = u.shape[-2]
        if length > self.l_max and self.truncation is None:
            name = self._flashfftconv_original.__name__
            raise ValueError(f"sequence length {length} exceeds l_max={self.l_max}, the longest filter of this {name}")
        return length

    @property
    def truncation(self) -> Truncation | None:
        """What is kept of the filters, which all filters of a module have in common."""
        filter_fn = self.filter_modules()[0]
        return None if filter_fn is self else truncation_of(filter_fn, self._flashfftconv.truncation)

    def short_filtered(self, z: Tensor, gate: int, dropout: nn.Module | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Input, input gate and output gate of the long convolution, from projections `z` `(batch, 3 width, length)`.

        `gate` is the third of the channels that the output gate comes from. There is no input gate where it has been
        multiplied already; active dropout acts on that product.
        """
        conv = self.short_filter
        if is_plain(conv, nn.Conv1d) and conv.kernel_size[0] <= MAX_TAPS:
            backend = self._flashfftconv.backend
            out_gate, v = gated_short_conv(z, conv.weight, conv.bias, gate=gate, backend=backend)
            if dropout is not None and (dropout.training or not is_plain(dropout, nn.Dropout)):
                v = dropout(v)
            return v, None, out_gate
        thirds = list(conv(z)[..., : z.shape[-1]].split(self.d_model, dim=1))
        out_gate = thirds.pop(gate)
        in_gate, v = thirds
        if dropout is not None and dropout.training and dropout.p > 0:
            return dropout(v * in_gate), None, out_gate
        return v, in_gate, out_gate

    def project(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer` of `x` `(batch, length, channels)`.

        A linear layer copies a batch of transposed matrices, and adds its bias in another pass. So it gets one matrix
        of all positions, which the output of [`convolve`] is, transposed.
        """
        if not is_plain(layer, nn.Linear):
            return layer(x)
        batch, length, _ = x.shape
        rows, cast = x.flatten(0, 1), self._cast_weights(layer, x)
        y = layer(rows) if cast is None else F.linear(rows, *cast)
        return y.view(batch, length, y.shape[1])

    def _cast_weights(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias in the dtype of autocast, which would cast them in every pass; None where it is to do so."""
        device = x.device.type
        cache = self._flashfftconv.cache
        if not torch.is_autocast_enabled(device) or not may_cache(self) or cache.max_bytes == 0:
            return None
        weight, bias = layer.weight, layer.bias
        if weight.dtype != torch.float32:
            return None
        dtype = torch.get_autocast_dtype(device)

        def cast() -> Filters:
            return weight.to(dtype), None if bias is None else bias.to(dtype), None

        return cache.get(layer, (None, dtype), cast)[:2]

    def convolve(
        self,
        filter_fn: nn.Module,
        u: Tensor,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        bidirectional: bool = False,
    ) -> Tensor:
        """Gates, long convolution with the filters of `filter_fn`, and skip term on `u` `(batch, channels, length)`.

        If `channel_major`, it is one matrix in memory, channels by positions of all sequences; see [`project`].
        """
        state = self._flashfftconv
        k, k_rev, skip = self._filters(filter_fn, u, bidirectional)
        if not torch.compiler.is_compiling():
            _, channels, length = u.shape
            reverse_taps = 0 if k_rev is None else k_rev.shape[1]
            state.last = Usage(channels, length, k.shape[1], reverse_taps, u.dtype, u.device)
            state.bypass = ""
        return fft_conv(
            u,
            k,
            skip=skip,
            pre_gate=pre_gate,
            post_gate=post_gate,
            k_rev=k_rev,
            backend=state.backend,
            channel_major=self.channel_major,
        )

    def convolve_uncast(
        self, filter_fn: nn.Module, u: Tensor, pre_gate: Tensor | None = None, post_gate: Tensor | None = None
    ) -> Tensor:
        """[`convolve`] in the dtype of `u` under autocast too, as families do that call torch.fft on what they have."""
        with torch.autocast(u.device.type, enabled=False):
            return self.convolve(filter_fn, u, pre_gate, post_gate)

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        """Causal taps `(channels, taps)`, anticausal taps or `None`, and the weights of the skip term."""

        def taps(method: str) -> Tensor:
            return getattr(filter_fn, method)(length)[0].transpose(0, 1)

        return taps("filter"), taps("filter_rev") if bidirectional else None, _skip(filter_fn)

    def _filters(self, filter_fn: nn.Module, u: Tensor, bidirectional: bool) -> Filters:
        """[`generate`] for `u` `(batch, channels, length)`, cut, or what it returned in an earlier call."""
        device, state, truncation = u.device.type, self._flashfftconv, self.truncation
        length = kept_taps(u.shape[-1], truncation)

        def generate() -> Filters:
            with nullcontext() if state.widened is None else torch.autocast(device, enabled=False):
                k, k_rev, skip = self.generate(filter_fn, length, bidirectional)
            if truncation is None or cuts_itself(filter_fn):
                return k, k_rev, skip
            return truncation.apply(k.mT).mT, None if k_rev is None else truncation.apply(k_rev.mT).mT, skip

        if torch.compiler.is_compiling():
            return generate()
        if not may_cache(self):
            state.cache.drop(filter_fn)
            return generate()
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return state.cache.get(filter_fn, (length, autocast, truncation), generate)

    def train(self, mode: bool = True) -> "PatchedMixer":
        # See FilterCache: weights written through `.data` between two evaluations leave no other trace.
        for part in self.modules():
            self._flashfftconv.cache.drop(part)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "PatchedMixer":
        if self._flashfftconv.widened is not None:
            fn = keeping_float32(fn, self.filter_modules())
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is generated: copies and pickles name what it is generated from.
        bases = type(self).__bases__
        if self._flashfftconv_original not in bases:
            return super().__reduce_ex__(protocol)
        return new_patched, bases, *super().__reduce_ex__(protocol)[2:]


def _skip(filter_fn: nn.Module) -> Tensor:
    """The weight D of the skip term."""
    bias = filter_fn.bias
    if bias.is_meta and hasattr(filter_fn, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(filter_fn):
            bias = filter_fn.bias
    return bias if getattr(filter_fn, "use_bias", True) else 0 * bias


@functools.cache
def patched_class(mixer: Any, original: Any) -> Any:
    """The subclass of a module's own class that makes it a patched module; one for each pair of classes."""
    attributes = {"__module__": original.__module__, "_flashfftconv_original": original}
    name = f"FlashFFT{original.__name__}"
    return types.new_class(name, (mixer, original), exec_body=lambda body: body.update(attributes))


def new_patched(mixer: Any, original: Any) -> Any:
    """An empty module of the patched class, for copies to fill."""
    cls = patched_class(mixer, original)
    return cls.__new__(cls)
