"""Inputs for the kernels and checks of what they return, for the emulation on a CPU and for a GPU alike."""

import math

import torch
from numerics import (
    BFLOAT16,
    EMULATOR_ROW,
    EMULATOR_WHOLE,
    FLOAT16,
    FLOAT32_TF32,
    error,
    gradient_violations,
    reach,
    row_errors,
    violations,
)
from torch import Tensor

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops.emulator import fft_conv_emulated
from hf_flashfftconv.ops.plan import Plan
from hf_flashfftconv.ops.reference import fft_conv_float64

BOUNDS = {bounds.dtype: bounds for bounds in (BFLOAT16, FLOAT16, FLOAT32_TF32)}
DTYPES = list(BOUNDS)
GATES = ("pre_gate", "post_gate")
ALL = ("skip", *GATES, "k_rev")

Arguments = dict[str, Tensor]


def case(plan: Plan) -> dict[str, int]:
    """A length and numbers of taps that need this transform, odd wherever it is not the longest of its kind."""
    size, folded = plan[:2]
    if folded:
        return {"length": size - 3, "taps": size, "reverse_taps": size - 5}
    return {"length": size // 2 + size // 4 + 1, "taps": size // 4 - 2, "reverse_taps": size // 8 + 1}


def make(
    length: int,
    taps: int,
    options: tuple[str, ...] = (),
    *,
    reverse_taps: int = 0,
    batch: int = 3,
    channels: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    filter_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Arguments:
    """Random arguments of fft_conv with outputs of the order of one, and gates that are not centred at zero."""
    sequence = (batch, channels, length)
    arguments = {
        "u": torch.randn(sequence),
        "k": torch.randn(channels, taps) / taps**0.5,
        "skip": torch.randn(channels),
    }
    arguments |= {name: torch.randn(sequence) + 1 for name in GATES}
    if reverse_taps:
        arguments["k_rev"] = torch.randn(channels, reverse_taps) / reverse_taps**0.5
    dtypes = {"k": filter_dtype, "k_rev": filter_dtype, "skip": filter_dtype}
    wanted = [name for name in arguments if name in ("u", "k", *options)]
    return {name: arguments[name].to(device, dtypes.get(name, dtype)) for name in wanted}


def oracle(arguments: Arguments, causal: bool = True) -> Tensor:
    return fft_conv_float64(**arguments, causal=causal)


def check_values(y: Tensor, arguments: Arguments, causal: bool = True, reference: Tensor | None = None) -> None:
    """Output within the bounds of its dtype."""
    size = reach(**arguments)
    reference = oracle(arguments, causal) if reference is None else reference
    found = violations(y, reference, BOUNDS[arguments["u"].dtype], size)
    assert not found, found


def gradients(arguments: Arguments, dy: Tensor, causal: bool = True, backend: str = "cuda") -> tuple[Tensor, Arguments]:
    """The output and the gradients of all arguments."""
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    y = fft_conv(**leaves, causal=causal, backend=backend)
    y.backward(dy)
    return y.detach(), {name: x.grad for name, x in leaves.items()}


def check(arguments: Arguments, causal: bool = True) -> None:
    """Output and all gradients of the cuda backend within the bounds."""
    u = arguments["u"]
    # Not orthogonal to u, so that the gradient of skip, one number per channel, is not what is left of cancellation.
    dy = (torch.randn_like(u.float()) + u / u.float().abs().mean()).to(u.dtype)
    y, reference = check_gradients(arguments, dy, causal)
    check_values(y, arguments, causal, reference)


def check_gradients(arguments: Arguments, dy: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
    """All gradients of the cuda backend within the bounds. Returns its output and the one in float64."""
    y, actual = gradients(arguments, dy, causal)
    leaves = {name: x.double().requires_grad_() for name, x in arguments.items()}
    reference = oracle(leaves, causal)
    reference.backward(dy.double())
    found = []
    for name, x in arguments.items():
        assert actual[name].dtype == x.dtype, name
        found += gradient_violations(name, actual[name], leaves[name].grad, BOUNDS[dy.dtype])
    assert not found, found
    return y, reference.detach()


def check_against_emulator(arguments: Arguments, plan: Plan, causal: bool = True) -> None:
    """The sharp check: hardly more error than the same algorithm in the same precision in plain PyTorch."""
    reference = oracle(arguments, causal)
    y = fft_conv(**arguments, causal=causal, backend="cuda")
    emulated = fft_conv_emulated(**arguments, causal=causal, radices=(plan.fft_size // 256, 16, 16), folded=plan.folded)
    size = reach(**arguments)
    whole = error(y, reference), error(emulated, reference)
    worst = row_errors(y, reference, size).max().item(), row_errors(emulated, reference, size).max().item()
    assert whole[0] <= EMULATOR_WHOLE * whole[1] and worst[0] <= EMULATOR_ROW * worst[1], (whole, worst)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors equal to x that lie differently in memory."""
    batch, channels, length = x.shape
    views = {"time first": x.movedim(2, 0).contiguous().movedim(0, 2), "channels first": x.mT.contiguous().mT}
    views["batch inside"] = x.transpose(0, 1).contiguous().transpose(0, 1)
    for offset in range(1, 8):
        for gap in (0, offset % 3 + 1):
            rows = torch.full((batch * channels * (length + gap) + offset,), math.nan, dtype=x.dtype, device=x.device)
            shape = (batch, channels, length + gap)
            views[f"offset {offset}, gap {gap}"] = rows[offset:].view(shape)[..., :length].copy_(x)
    return views


def check_layouts(arguments: Arguments) -> None:
    """The same bits however the sequences lie in memory, forward and backward."""
    dy = torch.randn_like(arguments["u"].float()).to(arguments["u"].dtype)
    y, expected = gradients(arguments, dy)
    views = {name: layouts(arguments[name]) for name in ("u", *GATES)} | {"dy": layouts(dy)}
    for name in views["u"]:
        strange = {x: views[x][name] for x in views}
        strange_dy = strange.pop("dy")
        actual, grads = gradients(arguments | strange, strange_dy)
        assert torch.equal(actual, y), name
        assert all(torch.equal(grads[x], expected[x]) for x in arguments), name


def check_not_finite(arguments: Arguments, name: str, value: float, *, shared: bool) -> None:
    """A value in row (3, 1) of an argument or of the gradient `dy` reaches that row and that channel's filter alone.

    If `shared`, two rows share a transform.
    """
    dy = torch.randn_like(arguments["u"].float()).to(arguments["u"].dtype)
    y, expected = gradients(arguments, dy)
    (dy if name == "dy" else arguments[name])[3, 1, 17] = value
    actual, grads = gradients(arguments, dy)
    reached = actual if name in ("u", "pre_gate") else grads["u"]
    assert not reached[3, 1].isfinite().any()
    # A row that shares a transform with it is rounded differently now, all others have the same bits.
    others = torch.ones(y.shape[:2], dtype=torch.bool)
    others[2 if shared else 3 : 4, 1] = False
    for changed, clean in ((actual, y), *((grads[x], expected[x]) for x in ("u", *GATES))):
        assert torch.equal(changed[others], clean[others])
        assert error(changed[2, 1], clean[2, 1].double()) < 4e-3
    assert not grads["k"][1].isfinite().any()
    assert torch.equal(grads["k"][[0, 2]], expected["k"][[0, 2]])


def check_memory(length: int, batch: int, channels: int, share: float) -> None:
    """A gated forward pass on a GPU with a filter that changes takes so many times its output's memory beside it."""
    arguments = make(length, length, GATES, batch=1, channels=channels, device="cuda")
    arguments |= {name: x.expand(batch, channels, length) for name, x in arguments.items() if x.dim() == 3}
    arguments["k"].requires_grad_()
    with torch.no_grad():
        first = {name: x[:1] if x.dim() == 3 else x for name, x in arguments.items()}
        check_values(fft_conv(**arguments, backend="cuda")[:1], first)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = fft_conv(**arguments, backend="cuda")
    output = y.numel() * y.element_size()
    assert torch.cuda.max_memory_allocated() - before - output <= share * output
