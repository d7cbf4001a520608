"""The kernel for clusters of blocks without a GPU; see test_kernels_emulated.py."""

import math

import pytest
import torch
from kernel_cases import DTYPES, GATES, check, check_values, gradients, make
from test_kernels_emulated import emulation, in_natural_order, library

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import cuda, cuda_gradients, filters
from hf_flashfftconv.ops.plan import CLUSTERS, Plan

__all__ = ["emulation", "library"]


def plan(arguments: dict[str, torch.Tensor]) -> Plan:
    return cuda.plan_of(arguments["u"], arguments["k"], arguments.get("k_rev"), True)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters(cluster: int) -> None:
    arguments = make(8192 * cluster, 8192 * cluster, ("skip", *GATES), batch=1, channels=1)
    assert plan(arguments) == Plan(8192 * cluster, True, 0, cluster)
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [(), ("pre_gate",), ("post_gate", "skip")], ids="+".join)
def test_dtypes_and_options(dtype: torch.dtype, options: tuple[str, ...]) -> None:
    arguments = make(10001, 10001, options, dtype=dtype, batch=3, channels=2)
    assert plan(arguments).cluster == 2
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


def test_both_sides() -> None:
    arguments = make(18001, 18001, ("k_rev", "skip", *GATES), reverse_taps=14000, batch=2, channels=1)
    assert plan(arguments).cluster == 4
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


def test_sequences_of_any_size() -> None:
    """What one block sees of a sequence says little of the others, and one half little of the other half."""
    arguments = make(32768, 32768, batch=6, channels=1)
    u = arguments["u"].float()
    u[0] *= 1e-20
    u[1, :, 16384:] *= 1e20
    u[2, :, 256:] *= 1e-3
    u[3] = 0
    u[4, 0, 5000] = math.nan
    arguments["u"] = u.to(torch.bfloat16)
    y = fft_conv(**arguments, backend="cuda")
    assert y[4].isnan().all() and not y[3].any()
    rest = {name: x[[0, 1, 2, 3, 5]] if name == "u" else x for name, x in arguments.items()}
    check_values(y[[0, 1, 2, 3, 5]], rest)


@pytest.mark.parametrize(
    "length, taps, options, dtype, channels",
    [
        (16384, 16384, ("skip", *GATES), torch.bfloat16, 2),
        (20000, 20000, GATES, torch.bfloat16, 2),
        (18000, 40000, ("pre_gate",), torch.float16, 1),
        (9000, 9000, ("k_rev", "post_gate"), torch.float32, 3),
    ],
)
def test_gradients(length: int, taps: int, options: tuple[str, ...], dtype: torch.dtype, channels: int) -> None:
    arguments = make(
        length, taps, options, reverse_taps=300 if "k_rev" in options else 0, channels=channels, dtype=dtype
    )
    assert cuda.plan_of(arguments["u"], arguments["k"], arguments.get("k_rev"), True, backward=True).cluster
    check(arguments)


@pytest.mark.parametrize("options", [(), GATES], ids=["plain", "gated"])
def test_gradients_that_are_not_wanted_change_no_other(options: tuple[str, ...]) -> None:
    arguments = make(9000, 9000, ("skip", *options), batch=3, channels=1)
    assert cuda.plan_of(arguments["u"], arguments["k"], None, True, backward=True).cluster
    operands = [arguments.get(name) for name in ("u", "k", "skip", *GATES, "k_rev")]
    dy = torch.randn_like(arguments["u"])
    expected = cuda_gradients.backward(dy, *operands, True)
    for wanted in ({0}, {1}, {2}, {4}, {0, 3, 4}, {1, 4}, {0, 1}):
        needs = [i in wanted and x is not None for i, x in enumerate(operands)]
        if not any(needs):
            continue
        for gradient, reference, need in zip(
            cuda_gradients.backward(dy, *operands, True, needs), expected, needs, strict=True
        ):
            assert not need or torch.equal(gradient, reference), wanted


@pytest.mark.parametrize(
    "plan", [Plan(16384, True, 0, 2), Plan(32768, True, 0, 4), Plan(65536, True, 2, 8)], ids=str
)
def test_taps_by_position_have_the_same_spectra(plan: Plan) -> None:
    k = torch.randn(70000 if plan.windows else 12000, 10).mT
    k_rev = None if plan.windows else torch.randn(9000, 10).mT
    by_channel = k.contiguous(), None, None if k_rev is None else k_rev.contiguous()
    expected, actual = (filters.prepare(*taps, 70000, plan, 0) for taps in (by_channel, (k, None, k_rev)))
    assert torch.equal(actual.scale, expected.scale)
    error = in_natural_order(actual) - in_natural_order(expected)
    # Up to 16,384 points taps by channel take no passes.
    assert error.norm() <= (0 if plan.fft_size > 16384 else 1e-4) * in_natural_order(expected).norm()


@pytest.mark.parametrize("length, taps", [(12000, 10000), (10000, 12000)])
def test_taps_by_position_have_gradients_by_position(length: int, taps: int) -> None:
    arguments = make(length, taps, ("k_rev", "skip"), reverse_taps=300, channels=11, batch=1)
    dy = torch.randn_like(arguments["u"])
    _, expected = gradients(arguments, dy)
    by_position = {name: arguments[name].mT.contiguous().mT for name in ("k", "k_rev")}
    _, actual = gradients(arguments | by_position, dy)
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).float().norm() / gradient.float().norm()
        assert difference <= (1e-5 if gradient.dtype == torch.float32 else 1e-3), name
        assert actual[name].stride() == by_position.get(name, gradient).stride()
