"""The `cuda` backend's gradients of [`fft_conv`]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cuda, extension, filters, long_plan, plan, tables
from .reference import Gradients


def backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    causal: bool,
    needs: Sequence[bool] = (True,) * 6,
) -> Gradients:
    """Gradients (du, dk, dskip, dpre, dpost, dk_rev) of a supported call, each in its operand's dtype.

    Of sequences that take more than a thread block, what is not in `needs` is None and costs no pass back.
    """
    with cuda.device_guard(u.device):
        chosen = cuda.plan_of(u, k, k_rev, causal, backward=True)
        operands = u, k, skip, pre_gate, post_gate, k_rev
        if not chosen.on_one_block:
            return _backward_in_passes(dy, operands, chosen, needs)
        call = cuda.Call(chosen, *operands)
        call.operand("grad_output", dy)
        du = call.result("grad_u")
        dpre = None if pre_gate is None else call.result("grad_pre_gate")
        dpost = None if post_gate is None else call.result("grad_post_gate")
        splits = extension.call("fft_conv_backward_splits", call.parameters)
        scratch_bytes = extension.call("fft_conv_backward_scratch", call.parameters)
        # One sum for each part of the batch, added up in a fixed order: the same call gives the same bits.
        partial = call.buffer("grad_filter", (splits, k.shape[0], call.plan.fft_size), torch.float32)
        call.buffer("scratch", (scratch_bytes,), torch.uint8)
        call.launch("backward")
        total = partial[0] if splits == 1 else partial.sum(0)
        dk, dskip, dk_rev = filters.tap_gradients(total, k, skip, k_rev, u.shape[2])
    return du, dk, dskip, dpre, dpost, dk_rev


def _backward_in_passes(dy: Tensor, operands: cuda.Operands, chosen: plan.Plan, needs: Sequence[bool]) -> Gradients:
    """The same for longer sequences, some channels at a time: dpost is a forward pass; du and dpre are one in reverse.

    Both leave the transforms of their inputs behind where gradients of taps are wanted, which are made of these.
    """
    u, k, skip, pre_gate, post_gate, k_rev = operands
    dpost = _like(post_gate, needs[4])
    dpre = _like(pre_gate, needs[3])
    du = _like(u, needs[0] or dpre is not None)
    taps = filters.TapGradients(k, skip, k_rev, u.shape[2]) if needs[1] or needs[2] or needs[5] else None
    for channels, tensors in cuda.channel_blocks(chosen, operands, backward=True):

        def part(x: Tensor | None, channels: slice = channels) -> Tensor | None:
            return None if x is None else x[:, channels]

        call = cuda.Call(chosen, *tensors)
        kept = [] if taps is None else [_KeptTransforms(call), _KeptTransforms(call)]
        passes = (
            {"u": part(u), "pre_gate": part(pre_gate), "post_gate": part(dy), "output": part(dpost)},
            {
                "u": part(dy),
                "pre_gate": part(post_gate),
                "post_gate": part(pre_gate),
                "output": part(du),
                "second_gate": None if dpre is None else part(u),
                "second_output": part(dpre),
            },
        )
        for reverse, arguments in enumerate(passes):
            if arguments["output"] is None and not kept:
                continue
            for name, x in arguments.items():
                call.operand(name, x)
            call.parameters.reverse = reverse
            # Without an output, the products with the other windows would be in vain.
            if call.plan.windows:
                call.parameters.windows = 1 if arguments["output"] is None else call.plan.windows
            if kept:
                kept[reverse].pass_to(call.parameters)
            call.launch("forward")
        if taps is not None:
            _tap_gradients(call, kept, taps, channels)
    dk, dskip, dk_rev = (None, None, None) if taps is None else taps.results()
    return du if needs[0] else None, dk, dskip, dpre, dpost, dk_rev


class _KeptTransforms:
    """Where a pass leaves the transforms of its inputs, and the scales of its pairs."""

    def __init__(self, call: cuda.Call) -> None:
        batch, channels, length = call.u.shape
        pairs = channels * ((batch + 1) // 2)
        shape = pairs, call.plan.blocks(length), call.plan.fft_size
        self.words = torch.empty(shape, dtype=torch.int32, device=call.u.device)
        self.scales = torch.empty((pairs,), dtype=torch.float32, device=call.u.device)

    def pass_to(self, parameters: extension.Parameters) -> None:
        parameters.transforms, parameters.pair_scales = self.words.data_ptr(), self.scales.data_ptr()


def _tap_gradients(
    call: cuda.Call, kept: Sequence[_KeptTransforms], taps: filters.TapGradients, channels: slice
) -> None:
    inputs, gradients = kept
    windows, size = max(1, call.plan.windows), call.plan.fft_size
    pairs, blocks, _ = inputs.words.shape
    parameters = extension.TapParameters()
    parameters.transforms, parameters.scales = inputs.words.data_ptr(), inputs.scales.data_ptr()
    parameters.reverse_transforms, parameters.reverse_scales = gradients.words.data_ptr(), gradients.scales.data_ptr()
    parameters.channels = call.u.shape[1]
    parameters.pairs, parameters.blocks = pairs // parameters.channels, blocks
    parameters.windows, parameters.fft_size = windows, size
    sums = torch.empty((parameters.channels, windows, size, 2), dtype=torch.float32, device=call.u.device)
    parameters.sums = sums.data_ptr()
    # Of the transforms, which are not quite unitary.
    if call.plan.is_long:
        scale = long_plan.transform_scale(size, call.plan.half)
    else:
        scale = tables.outer_scales(size // tables.COLUMNS, max(1, call.plan.cluster))[0] * tables.COLUMNS**-0.5
    parameters.factor = 1 / (scale**2 * size)
    taps.pass_to(parameters, channels)
    extension.launch("fft_conv_tap_gradient", parameters, call.stream)


def _like(x: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else None
