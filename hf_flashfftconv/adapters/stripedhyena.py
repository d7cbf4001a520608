"""StripedHyena and Evo 1: a gated convolution whose filter is a sum of decaying oscillations, a "modal" filter.

With s = (x2, x1, v) the short causal convolution of the input, split within each head, g = x1 v, and the poles p and
residues r of S states a channel,

    x2 (conv(g, k) + D g),    k[t] = Re sum_s r_s p_s^t

The projections lie outside of this module. A call with `inference_params` starts a generation and leaves there the last
inputs of the short convolution and the final state of the recurrence that the filter is; the original code goes on.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, PatchedMixer
from .cache import Filters
from .structure import attribute, check_floating, check_forward, check_shape, require

MIXERS = frozenset({"ParallelHyenaFilter"})
ENGINE = "HyenaInferenceEngine"
# Positions at a time for the state: bounds the memory of the powers of all poles.
_BLOCK = 1024


class PatchedStripedHyena(PatchedMixer):
    """The parallel forward of StripedHyena's filter: `(batch, length, 3 * hidden_size)` to a third of the channels."""

    channel_major = True
    own_filter = frozenset({"poles", "residues"})

    def forward(self, u: Tensor, inference_params: Any = None, padding_mask: Any = None, *args: Any) -> Any:
        if inference_params is not None and self.layer_idx in inference_params.fir_state_dict:
            return self.original_forward(u, inference_params, padding_mask, *args)
        reason = self.unserved(u, inference_params)
        if reason is not None:
            return self.bypass(reason, u, inference_params, padding_mask, *args)
        s, last_inputs = self.short_convolution(u, inference_params, padding_mask)
        out_gate, in_gate, v = self.split(s)
        y = self.convolve_uncast(self, v, in_gate, out_gate).to(self.output_dtype(v))
        if inference_params is not None:
            inference_params.fir_state_dict[self.layer_idx] = last_inputs
            with torch.autocast(u.device.type, enabled=False):
                self.keep_state(inference_params, in_gate * v)
        return y.transpose(1, 2), inference_params

    def unserved(self, u: Tensor, inference_params: Any) -> str | None:
        """Why this call is left to the original code."""
        if self.h is not None:
            return "its filter was computed in advance"
        if inference_params is not None and self.config.get("prefill_style", "fft") != "fft":
            return "prefill_style is not fft"
        return None

    def short_convolution(self, u: Tensor, inference_params: Any, padding_mask: Any, **options: Any) -> Any:
        """The engine's own, with its last inputs: models in 16 bits have learnt with its order of roundings."""
        options |= {"inference_params": inference_params, "padding_mask": padding_mask}
        filters = self.fir_fn, u, self.short_filter_weight, self.short_filter_bias, u.shape[1]
        return self.engine.parallel_fir(*filters, fir_length=self.short_filter_length, **options)

    def output_dtype(self, v: Tensor) -> torch.dtype:
        """The dtype of the original's output for the value `v`; the skip weights are in float32 under autocast."""
        return torch.promote_types(v.dtype, self.D.dtype)

    def keep_state(self, inference_params: Any, g: Tensor) -> None:
        """What the original continues with after the gated input `g` `(batch, hidden_size, length)`."""
        poles = torch.view_as_complex(self.poles.float()).squeeze(-1)
        inference_params.state_dict[self.layer_idx] = final_state(poles.log(), g)

    def split(self, s: Tensor) -> tuple[Tensor, ...]:
        """Output gate, input gate and value, `(batch, hidden_size, length)` each."""
        if not self.column_split_hyena:
            return s.split(self.hidden_size, dim=1)
        heads = s.unflatten(1, (self.num_attention_heads, 3, -1))
        return tuple(part.flatten(1, 2) for part in heads.unbind(2))

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        poles = torch.view_as_complex(self.poles.float()).squeeze(-1)
        residues = torch.view_as_complex(self.residues.float()).squeeze(-1)
        return modal_taps(poles.log(), residues, length), None, self.D


def modal_taps(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """Filters `(channels, length)` from their states `(channels, states)`, complex or real, in float32.

    One state after another in real numbers: the powers of all states at once are what the original needs memory for.
    """
    t = torch.arange(length, device=log_poles.device, dtype=torch.float32)
    k = torch.zeros((), device=log_poles.device)
    for log_pole, residue in zip(log_poles.unbind(1), residues.unbind(1), strict=True):
        if not log_pole.is_complex():
            k = k + residue[:, None] * torch.exp(log_pole[:, None] * t)
            continue
        decay, angle = (log_pole.real[:, None] * t).exp(), log_pole.imag[:, None] * t
        k = k + decay * (residue.real[:, None] * angle.cos() - residue.imag[:, None] * angle.sin())
    return k


def final_state(log_poles: Tensor, g: Tensor) -> Tensor:
    """The state `(batch, channels, states)` that the recurrence x <- p x + g has after the last position of `g`."""
    state = torch.zeros((), dtype=log_poles.dtype, device=g.device)
    for part in g.float().split(_BLOCK, dim=-1):
        length = part.shape[-1]
        powers = torch.exp(log_poles[..., None] * torch.arange(length - 1, -1, -1, device=g.device))
        state = state * torch.exp(log_poles * length) + torch.einsum("bdl,dsl->bds", part.to(powers.dtype), powers)
    return state


def check_engine(module: nn.Module) -> int:
    """What StripedHyena's filter and its successor in Evo 2 have in common; returns the number of channels."""
    width = attribute(module, "hidden_size", int)
    engine = attribute(module, "engine", object)
    name = type(engine).__name__
    plain = name == ENGINE and not {"parallel_fir", "parallel_iir"} & vars(engine).keys()
    require(plain, f"its engine is {name}, not {ENGINE} as published")
    require(getattr(module, "fir_fn", None) is F.conv1d, "use_flash_depthwise: another library is active")
    require(not getattr(module, "use_flashfft", False), "use_flashfft: another FFT library is active")
    # F.conv1d, which is called then, runs through the taps of the filter from the last to the first.
    require(getattr(module, "long_fir_threshold", None) is None, "long_fir_threshold cuts and reverses the filter")
    require(not getattr(module, "print_activations", False), "print_activations logs values that would not exist")
    check_shape(module, "short_filter_weight", (3 * width, 1, attribute(module, "short_filter_length", int)))
    heads = attribute(module, "num_attention_heads", int)
    require(width % heads == 0, f"{width} channels cannot be split into {heads} heads")
    check_floating(module, "the filter")
    return width


def _check(module: nn.Module) -> None:
    check_forward(module, MIXERS, "the filter")
    width = check_engine(module)
    groups = attribute(module, "hyena_filter_groups", int)
    require(groups == 1, f"hyena_filter_groups {groups}: only 1 is supported")
    require(getattr(module, "short_filter_bias", None) is not None, "short_filter_bias is missing")
    states = attribute(module, "state_size", int)
    for name in ("poles", "residues"):
        check_shape(module, name, (width, states, 1, 2))
    check_shape(module, "D", (width,))


def projected_shape(module: Any, length: int) -> tuple[int, ...]:
    return 1, length, 3 * module.hidden_size


STRIPEDHYENA = Adapter("stripedhyena", MIXERS, _check, PatchedStripedHyena, input_shape=projected_shape)
