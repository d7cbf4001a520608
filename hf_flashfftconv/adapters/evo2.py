"""Evo 2 (vortex): StripedHyena's successor with three kinds of filters in one class.

    x2 (conv(g, k) + D g),    g = x1 v

hcl: k[t] = sum_s r_s exp(t log_pole_s), as long as the input, in real numbers; hcm: 128 taps; hcs: 7 taps and no D. The
taps of hcm and hcs are shared by groups of neighbouring channels. x2, x1 and v alternate in the channels of the short
convolution (`interleave`) or follow each other. The projections, which may be in fp8, lie outside of this module.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.library import use_kernels
from .base import Adapter
from .cache import Filters
from .stripedhyena import PatchedStripedHyena, check_engine, final_state, modal_taps, projected_shape
from .structure import attribute, check_forward, check_shape, require

MIXERS = frozenset({"HyenaCascade"})
# From here on the original goes through the FFT too, and has a skip term.
FFT_TAPS = 128


class PatchedHyenaCascade(PatchedStripedHyena):
    """The parallel forward of Evo 2's filters: `(batch, length, 3 * hidden_size)` to a third of the channels."""

    own_filter = frozenset({"log_poles", "residues", "h"})

    def unserved(self, u: Tensor, inference_params: Any) -> str | None:
        if self.fir_inner_filter_length is None:
            return super().unserved(u, inference_params)
        return None if self.pays(u) else f"{self.fir_inner_filter_length} taps are faster without FFT here"

    def short_convolution(self, u: Tensor, inference_params: Any, padding_mask: Any, **options: Any) -> Any:
        dims = (self.hidden_size, self.num_attention_heads, self.hidden_size_per_attention_head, None, None)
        return super().short_convolution(u, inference_params, padding_mask, dims=dims)

    def pays(self, u: Tensor) -> bool:
        """Whether a transform is worth it for the taps of hcs: by the kernels of this package, not by torch.fft."""
        taps = self.fir_inner_filter_length
        if taps is None or taps >= FFT_TAPS or self._flashfftconv.twin:
            return True
        if torch.compiler.is_compiling():
            return u.is_cuda
        v = u[..., : self.hidden_size].transpose(1, 2)
        k = self.h[:1, 0].expand(self.hidden_size, taps)
        return use_kernels(v, k, None, True, self._flashfftconv.backend)

    def output_dtype(self, v: Tensor) -> torch.dtype:
        return super().output_dtype(v) if self.fir_inner_filter_length is None else v.dtype

    def keep_state(self, inference_params: Any, g: Tensor) -> None:
        if self.fir_inner_filter_length is None:
            inference_params.state_dict[self.layer_idx] = final_state(self.log_poles.float().squeeze(-1), g)
        else:
            inference_params.fir_inner_state_dict[self.layer_idx] = g[..., 1 - self.fir_inner_filter_length :]

    def split(self, s: Tensor) -> tuple[Tensor, ...]:
        x2, x1, v = [s[:, part::3] for part in range(3)] if self.config.get("interleave") else super().split(s)
        return (x1, x2, v) if self.hyena_flip_x1x2 else (x2, x1, v)

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        if self.fir_inner_filter_length is None:
            return modal_taps(self.log_poles.float().squeeze(-1), self.residues.float(), length), None, self.D
        k = self.h[:, 0].float()
        # F.conv1d, which serves short filters in the original, has the last tap first.
        k = k if self.fir_inner_filter_length >= FFT_TAPS else k.flip(-1)
        return k.repeat_interleave(self.hidden_size // self.hyena_filter_groups, 0), None, self.D


def _check(module: nn.Module) -> None:
    check_forward(module, MIXERS, "the filter")
    width = check_engine(module)
    groups = attribute(module, "hyena_filter_groups", int)
    attribute(module, "hyena_flip_x1x2", bool)
    alternating = attribute(module, "config", dict).get("interleave")
    require(not (alternating and module.column_split_hyena), "interleave and column_split_hyena are both set")
    taps = getattr(module, "fir_inner_filter_length", None)
    if taps is None:
        require(groups == width, f"hyena_filter_groups {groups} of {width} modal filters: only one a channel works")
        states = attribute(module, "state_size", int)
        check_shape(module, "log_poles", (width, states, 1))
        check_shape(module, "residues", (width, states))
    else:
        require(1 < groups <= width and width % groups == 0, f"{width} channels do not form {groups} groups")
        check_shape(module, "h", (groups, 1, taps))
    if taps is None or taps >= FFT_TAPS:
        check_shape(module, "D", (width,))
    else:
        require(getattr(module, "D", None) is None, f"D with {taps} taps, which have none as published")


EVO2 = Adapter("evo2", MIXERS, _check, PatchedHyenaCascade, input_shape=projected_shape)
