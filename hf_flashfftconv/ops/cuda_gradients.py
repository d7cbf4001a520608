"""The `cuda` backend's gradients of [`fft_conv`]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cuda, extension, filters, long_plan, plan, tables
from .reference import Gradients

# du, dpre, dpost
Outputs = Sequence[Tensor | None]


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
    """Gradients (du, dk, dskip, dpre, dpost, dk_rev) of a supported call, in the dtype and layout of the operands.

    What is not in `needs` is None and costs no pass back.
    """
    with cuda.device_guard(u.device):
        chosen = cuda.plan_of(u, k, k_rev, causal, backward=True)
        return _backward_in_parts(dy, (u, k, skip, pre_gate, post_gate, k_rev), chosen, needs)


def _backward_in_parts(dy: Tensor, operands: cuda.Operands, chosen: plan.Plan, needs: Sequence[bool]) -> Gradients:
    """The same, some channels at a time."""
    u, k, skip, pre_gate, post_gate, k_rev = operands
    dpost = _like(post_gate, needs[4])
    dpre = _like(pre_gate, needs[3])
    du = _like(u, needs[0] or dpre is not None)
    taps = filters.TapGradients(k, skip, k_rev, u.shape[2]) if needs[1] or needs[2] or needs[5] else None
    for channels, tensors in cuda.channel_blocks(chosen, operands, backward=True):
        call = cuda.Call(chosen, *tensors)
        dy_part, *outputs = (cuda.of_channels(x, channels) for x in (dy, du, dpre, dpost))
        if chosen.has_backward:
            sums = _launch(call, dy_part, outputs, taps is not None)
        else:
            sums = _passes(call, dy_part, tensors, outputs, taps is not None)
        if taps is None or sums is None:
            continue
        sums.channels, sums.fft_size, sums.windows = tensors[0].shape[1], chosen.fft_size, max(1, chosen.windows)
        sums.folded = chosen.folded
        sums.factor = 1 / (_transform_scale(chosen) ** 2 * chosen.fft_size)
        taps.pass_to(sums, channels)
        extension.launch("fft_conv_tap_gradient", sums, call.stream)
    dk, dskip, dk_rev = (None, None, None) if taps is None else taps.results()
    return du if needs[0] else None, dk, dskip, dpre, dpost, dk_rev


def _launch(call: cuda.Call, dy: Tensor | None, outputs: Outputs, sums_wanted: bool) -> extension.TapParameters | None:
    """One launch. Returns the sums that gradients of taps are made of, if wanted."""
    for name, x in zip(("grad_output", "grad_u", "grad_pre_gate", "grad_post_gate"), (dy, *outputs), strict=True):
        call.operand(name, x)
    if call.plan.cluster:
        call.buffer("scratch", (extension.call("fft_conv_backward_scratch", call.parameters),), torch.uint8)
    sums = extension.TapParameters() if sums_wanted else None
    if sums is not None:
        sums.splits = extension.call("fft_conv_backward_splits", call.parameters)
        shape = call.u.shape[1], sums.splits, call.plan.fft_size, 2
        sums.sums = call.buffer("grad_filter", shape, torch.float32).data_ptr()
    call.launch("backward")
    return sums


def _passes(
    call: cuda.Call, dy: Tensor | None, operands: cuda.Operands, outputs: Outputs, sums_wanted: bool
) -> extension.TapParameters | None:
    """The same in two launches: dpost is a forward pass; du and dpre are one in reverse.

    Both leave the transforms of their inputs behind where sums are wanted, which are made of these.
    """
    u, _, _, pre_gate, post_gate, _ = operands
    du, dpre, dpost = outputs
    kept = [_KeptTransforms(call), _KeptTransforms(call)] if sums_wanted else []
    passes = (
        {"u": u, "pre_gate": pre_gate, "post_gate": dy, "output": dpost},
        {
            "u": dy,
            "pre_gate": post_gate,
            "post_gate": pre_gate,
            "output": du,
            "second_gate": None if dpre is None else u,
            "second_output": dpre,
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
    return _sums_of_kept(call, *kept) if kept else None


class _KeptTransforms:
    """Where a pass leaves the transforms of its inputs, and the scales of its pairs."""

    def __init__(self, call: cuda.Call) -> None:
        batch, channels, length = call.u.shape
        pairs = channels * call.plan.pairs(batch)
        shape = pairs, call.plan.blocks(length), call.plan.fft_size
        self.words = call.memory(shape, torch.int32)
        self.scales = call.memory((pairs,), torch.float32)

    def pass_to(self, parameters: extension.Parameters) -> None:
        parameters.transforms, parameters.pair_scales = self.words.data_ptr(), self.scales.data_ptr()


def _sums_of_kept(call: cuda.Call, inputs: _KeptTransforms, gradients: _KeptTransforms) -> extension.TapParameters:
    pairs, blocks, _ = inputs.words.shape
    channels, windows = call.u.shape[1], max(1, call.plan.windows)
    sums = extension.TapParameters(pairs=pairs // channels, blocks=blocks, splits=1)
    sums.transforms, sums.scales = inputs.words.data_ptr(), inputs.scales.data_ptr()
    sums.reverse_transforms, sums.reverse_scales = gradients.words.data_ptr(), gradients.scales.data_ptr()
    sums.sums = call.memory((channels, windows, call.plan.fft_size, 2), torch.float32).data_ptr()
    return sums


def _transform_scale(chosen: plan.Plan) -> float:
    """Of the transforms, which are not quite unitary."""
    if chosen.is_long:
        return long_plan.transform_scale(chosen.fft_size, chosen.folded)
    return tables.outer_scales(chosen.fft_size // tables.COLUMNS, max(1, chosen.cluster))[0] * tables.COLUMNS**-0.5


def _like(x: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else None
