"""The `cuda` backend's gradients of [`fft_conv`]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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

    Of sequences that take more than a thread block, what is not in `needs` is None and costs no pass back.
    """
    with cuda.device_guard(u.device):
        chosen = cuda.plan_of(u, k, k_rev, causal, backward=True)
        operands = u, k, skip, pre_gate, post_gate, k_rev
        if not chosen.on_one_block:
            return _backward_in_parts(dy, operands, chosen, needs)
        call = cuda.Call(chosen, *operands)
        call.operand("grad_output", dy)
        du = call.result("grad_u")
        dpre = None if pre_gate is None else call.result("grad_pre_gate")
        dpost = None if post_gate is None else call.result("grad_post_gate")
        partial = _partial_sums(call, k, skip, k_rev)
        call.launch("backward")
        dk, dskip, dk_rev = map(_total, partial, (k, skip, k_rev))
    return du, dk, dskip, dpre, dpost, dk_rev


def _partial_sums(call: cuda.Call, k: Tensor, skip: Tensor | None, k_rev: Tensor | None) -> list[Tensor | None]:
    """Of the gradients of taps and skip connections, (splits, ...): one for each part of the batch."""
    splits, length = extension.call("fft_conv_backward_splits", call.parameters), call.u.shape[2]
    taps, taps_rev = min(k.shape[1], length), 0 if k_rev is None else min(k_rev.shape[1], length - 1)
    call.parameters.taps, call.parameters.taps_rev = taps, taps_rev

    def memory(name: str, *shape: int) -> Tensor:
        return call.buffer(name, (splits, *shape), torch.float32)

    return [
        memory("grad_filter", k.shape[0], taps),
        None if skip is None else memory("grad_skip", skip.shape[0]),
        None if k_rev is None else memory("grad_filter_rev", k_rev.shape[0], taps_rev),
    ]


def _total(partial: Tensor | None, operand: Tensor | None) -> Tensor | None:
    """Of partial sums, in a fixed order: the same call gives the same bits. Taps that do not matter get zero."""
    if partial is None or operand is None:
        return None
    total = partial[0] if len(partial) == 1 else partial.sum(0)
    if total.shape != operand.shape:
        total = nn.functional.pad(total, (0, operand.shape[1] - total.shape[1]))
    total = total.to(operand.dtype)
    return total if operand.is_contiguous() else torch.empty_like(operand).copy_(total)


def _backward_in_parts(dy: Tensor, operands: cuda.Operands, chosen: plan.Plan, needs: Sequence[bool]) -> Gradients:
    """The same for longer sequences, some channels at a time."""
    u, k, skip, pre_gate, post_gate, k_rev = operands
    dpost = _like(post_gate, needs[4])
    dpre = _like(pre_gate, needs[3])
    du = _like(u, needs[0] or dpre is not None)
    taps = filters.TapGradients(k, skip, k_rev, u.shape[2]) if needs[1] or needs[2] or needs[5] else None
    for channels, tensors in cuda.channel_blocks(chosen, operands, backward=True):
        call = cuda.Call(chosen, *tensors)
        dy_part, *outputs = (None if x is None else x[:, channels] for x in (dy, du, dpre, dpost))
        if chosen.has_turns:
            sums = _turns(call, dy_part, outputs, taps is not None)
        else:
            sums = _passes(call, dy_part, tensors, outputs, taps is not None)
        if taps is None or sums is None:
            continue
        sums.channels, sums.fft_size, sums.windows = tensors[0].shape[1], chosen.fft_size, max(1, chosen.windows)
        sums.factor = 1 / (_transform_scale(chosen) ** 2 * chosen.fft_size)
        taps.pass_to(sums, channels)
        extension.launch("fft_conv_tap_gradient", sums, call.stream)
    dk, dskip, dk_rev = (None, None, None) if taps is None else taps.results()
    return du if needs[0] else None, dk, dskip, dpre, dpost, dk_rev


def _turns(
    call: cuda.Call, dy: Tensor | None, outputs: Outputs, sums_wanted: bool
) -> extension.TapParameters | None:
    """One launch, in which every pair has two turns. Returns the sums that gradients of taps are made of, if wanted."""
    for name, x in zip(("grad_output", "grad_u", "grad_pre_gate", "grad_post_gate"), (dy, *outputs), strict=True):
        call.operand(name, x)
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
        pairs = channels * ((batch + 1) // 2)
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
        return long_plan.transform_scale(chosen.fft_size, chosen.half)
    return tables.outer_scales(chosen.fft_size // tables.COLUMNS, max(1, chosen.cluster))[0] * tables.COLUMNS**-0.5


def _like(x: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else None
