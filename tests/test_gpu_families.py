"""The further families on a device: as near to the float32 model as the unpatched one, and served by the kernels."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from family_style import H3, S4D, STU, FFTConv, HyenaCascade, LongConv, LongConvolution, ParallelHyenaFilter
from patching import assert_equal_models, first, relative
from torch import nn

from hf_flashfftconv.patch import patch_model, patch_report

pytestmark = pytest.mark.gpu

WIDTH, LENGTH = 64, 1000
Maker = Callable[[], nn.Module]
GATED: dict[str, Maker] = {
    "stripedhyena": lambda: ParallelHyenaFilter(WIDTH),
    "hcl": lambda: HyenaCascade(WIDTH),
    "hcm": lambda: HyenaCascade(WIDTH, 128),
    "hcs": lambda: HyenaCascade(WIDTH, 7),
}
OTHERS: dict[str, Maker] = {
    "fla": lambda: LongConvolution(WIDTH, 1500),
    "s4d": lambda: S4D(WIDTH, transposed=False),
    "s4": lambda: FFTConv(WIDTH, 1500, bidirectional=True, transposed=False),
    "long-conv": lambda: LongConv(WIDTH, 1500, transposed=False),
    "h3": lambda: H3(WIDTH, head_dim=4),
}
every_mixer = pytest.mark.parametrize("make", (GATED | OTHERS).values(), ids=GATED | OTHERS)
every_gated = pytest.mark.parametrize("make", GATED.values(), ids=GATED)


def on_device(make: Maker) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A mixer, its patched copy and an input."""
    mixer = make().cuda().eval()
    width = 3 * WIDTH if hasattr(mixer, "short_filter_weight") else WIDTH
    return mixer, patch_model(copy.deepcopy(mixer)), torch.randn(2, LENGTH, width).bfloat16().float().cuda()


@every_mixer
def test_float32(make: Maker) -> None:
    mixer, patched, u = on_device(make)
    with torch.no_grad():
        assert relative(first(patched(u)), first(mixer(u))) <= 1e-5
    mixer, patched = mixer.train(), patched.train()
    weights = torch.linspace(-1, 1, first(mixer(u)).numel(), device="cuda")
    gradients = []
    for model in (mixer, patched):
        (first(model(u)).flatten() * weights).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        assert (expected is None) == (actual is None)
        assert expected is None or relative(actual, expected) <= 1e-5


@every_mixer
def test_autocast(make: Maker) -> None:
    mixer, patched, u = on_device(make)
    with torch.no_grad():
        exact = first(mixer(u))
        with torch.autocast("cuda", torch.bfloat16):
            expected, actual = first(mixer(u)), first(patched(u))
    assert actual.dtype == expected.dtype
    # The README names what is worse than the original by more than a tenth.
    assert relative(actual, exact) <= max(1.2 * relative(expected, exact), 1e-5)


@every_gated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_served_by_the_kernels(make: Maker, dtype: torch.dtype) -> None:
    mixer, patched, u = on_device(make)
    exact = first(mixer(u))
    for model in (mixer, patched):
        for name, parameter in model.named_parameters():
            if "poles" not in name and name != "residues":
                parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        expected, actual = first(mixer(u.to(dtype))), first(patched(u.to(dtype)))
    [row] = patch_report(patched).rows
    assert (row.backend, row.reason) == ("cuda", "")
    # The README names what is worse than the original by more than a tenth.
    assert relative(actual, exact) <= (1.1 if dtype == torch.bfloat16 else 1.75) * relative(expected, exact)


@every_gated
def test_generation(make: Maker) -> None:
    _, patched, u = on_device(make)
    states = SimpleNamespace(fir_state_dict={}, fir_inner_state_dict={}, state_dict={})
    with torch.no_grad():
        expected = first(patched(u))
        patched(u[:, :-8], inference_params=states)
        for t in range(LENGTH - 8, LENGTH):
            assert relative(first(patched(u[:, t : t + 1], inference_params=states)), expected[:, t : t + 1]) <= 1e-4


@pytest.mark.parametrize("name", ["stripedhyena", "hcl"])
def test_compiled(name: str) -> None:
    mixer, patched, u = on_device(GATED[name])
    compiled = torch.compile(patched, fullgraph=True)
    with torch.no_grad():
        assert relative(first(compiled(u)), first(mixer(u))) <= 1e-5


def test_spectral_units() -> None:
    unit = STU(WIDTH, LENGTH)
    unit.phi = unit.phi.cuda()
    u = torch.randn(2, LENGTH, WIDTH, device="cuda")
    assert_equal_models(patch_model(copy.deepcopy(unit.cuda())), unit, lambda m: m(u).cpu())
