"""fla's long convolutions, S4D, S4's FFTConv, LongConv, H3 and STU: patched against unpatched, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from family_style import H3, S4D, STU, FFTConv, ImplicitLongConvolution, LongConv, LongConvolution
from patching import assert_patched_mixer_agrees, first, relative, snapshot
from torch import nn

from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model

pytestmark = pytest.mark.no_cover

WIDTH = 8
# Below half, about half of, below, at and beyond the filters' 40 taps.
LENGTHS = (1, 2, 20, 21, 39, 40)
BEYOND = (*LENGTHS, 41, 90)
Maker = Callable[[], nn.Module]

MIXERS: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "fla": (lambda: LongConvolution(WIDTH, 40), BEYOND),
    "fla-implicit": (lambda: ImplicitLongConvolution(WIDTH, 40), BEYOND),
    "s4d": (lambda: S4D(WIDTH, dropout=0.2), LENGTHS),
    "s4d-last": (lambda: S4D(WIDTH, transposed=False), LENGTHS),
    "s4": (lambda: FFTConv(WIDTH, dropout=0.2), LENGTHS),
    "s4-bounded": (lambda: FFTConv(WIDTH, 40, transposed=False), BEYOND),
    "s4-bidirectional": (lambda: FFTConv(WIDTH, 40, bidirectional=True), BEYOND),
    "s4-drop-kernel": (lambda: FFTConv(WIDTH, drop_kernel=0.3), LENGTHS),
    "long-conv": (lambda: LongConv(WIDTH, 40), BEYOND),
    "long-conv-bidirectional": (lambda: LongConv(WIDTH, 40, bidirectional=True, dropout=0.2), BEYOND),
    "long-conv-last": (lambda: LongConv(WIDTH, 40, transposed=False, kernel_dropout=0.3), BEYOND),
    "h3": (lambda: H3(WIDTH), LENGTHS),
    "h3-heads": (lambda: H3(WIDTH, head_dim=4, l_max=40), BEYOND),
    "stu": (lambda: STU(WIDTH, 40), LENGTHS),
    "stu-hankel": (lambda: STU(WIDTH, 40, use_hankel_L=True), LENGTHS),
}
every_mixer = pytest.mark.parametrize("make", [make for make, _ in MIXERS.values()], ids=MIXERS)


def input_of(mixer: nn.Module, length: int) -> torch.Tensor:
    return torch.randn(2, WIDTH, length) if getattr(mixer, "transposed", False) else torch.randn(2, length, WIDTH)


@pytest.mark.parametrize("case", MIXERS)
def test_agrees(case: str) -> None:
    make, lengths = MIXERS[case]
    mixer = make()
    assert_patched_mixer_agrees(mixer, [input_of(mixer, length) for length in lengths])


@every_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_less_accurate_than_unpatched(make: Maker, dtype: torch.dtype) -> None:
    mixer = make().eval()
    u = input_of(mixer, 40).to(dtype)
    exact = first(mixer(u.float()))
    # Behind a norm, and behind a linear layer.
    for x in (u.float(), u):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            unpatched = first(mixer(x))
            patched = first(patch_model(copy.deepcopy(mixer))(x))
        assert patched.dtype == unpatched.dtype
        assert relative(patched, exact) <= max(1.1 * relative(unpatched, exact), 1e-6)


@pytest.mark.parametrize("case", ["fla", "fla-implicit", "long-conv", "stu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(case: str, dtype: torch.dtype) -> None:
    mixer = MIXERS[case][0]().eval()
    u = input_of(mixer, 40).to(dtype).float()
    exact = first(mixer(u))
    # The published code has no transform for such filters.
    assert relative(first(patch_model(mixer).to(dtype)(u.to(dtype))), exact) <= 10 * torch.finfo(dtype).eps


@every_mixer
def test_filters_are_kept_until_the_weights_change(make: Maker) -> None:
    mixer = make().eval()
    u = input_of(mixer, 21)
    patched = patch_model(copy.deepcopy(mixer))
    generated = []
    generate = type(patched).generate
    type(patched).generate = lambda self, *args: generated.append(1) or generate(self, *args)
    try:
        with torch.no_grad():
            patched(u)
            once = len(generated)
            patched(u)
            assert len(generated) == once > 0
            for (name, parameter), other in zip(patched.named_parameters(), mixer.parameters(), strict=True):
                parameter.mul_(1.1)
                other.mul_(1.1)
                assert relative(first(patched(u)), first(mixer(u))) <= 1e-5, name
            assert len(generated) > once
    finally:
        del type(patched).generate


@every_mixer
def test_unpatching_restores_everything(make: Maker) -> None:
    mixer = make().eval()
    u = input_of(mixer, 21)
    before, expected = snapshot(mixer), first(mixer(u))
    patch_model(mixer)
    mixer(u)
    unpatch_model(mixer)
    assert snapshot(mixer) == before
    assert torch.equal(first(mixer(u)), expected)


def test_a_table_that_is_a_plain_attribute_is_watched_too() -> None:
    mixer = STU(WIDTH, 40).eval()
    patched = patch_model(copy.deepcopy(mixer))
    u = input_of(mixer, 40)
    with torch.no_grad():
        patched(u)
        for m in (mixer, patched):
            m.phi.mul_(2)
        assert relative(patched(u), mixer(u)) <= 1e-5


CALLS = {
    "state": (FFTConv(WIDTH, 40), {"state": "any"}, "a state or a rate was given"),
    "rate": (LongConv(WIDTH, 40), {"rate": 2.0}, "a rate or lengths were given"),
    "lengths": (LongConv(WIDTH, 40), {"lengths": torch.tensor([20, 9])}, "a rate or lengths were given"),
    "generation": (H3(WIDTH), {"inference_params": {}}, "inference_params were given"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_for_the_original(case: str) -> None:
    mixer, options, reason = CALLS[case]
    mixer = copy.deepcopy(mixer).eval()
    patched = patch_model(copy.deepcopy(mixer))
    u = input_of(mixer, 20)
    assert torch.equal(first(patched(u, **options)), first(mixer(u, **options)))
    assert reason in patch_report(patched).rows[0].reason
    patched(u)
    assert not patch_report(patched).rows[0].reason


def test_dropped_taps_and_long_inputs_run_the_original() -> None:
    dropping = patch_model(FFTConv(WIDTH, drop_kernel=0.3)).train()
    dropping(input_of(dropping, 20))
    assert "drops taps" in patch_report(dropping).rows[0].reason
    unit = STU(WIDTH, 40)
    u = input_of(unit, 41)
    expected = unit(u)
    assert torch.equal(patch_model(unit)(u), expected)
    assert "longer than the 40 positions of phi" in patch_report(unit).rows[0].reason


@pytest.mark.parametrize("case", ["s4d", "s4", "long-conv", "h3"])
def test_hooks_on_a_kernel_run_in_every_call(case: str) -> None:
    mixer = MIXERS[case][0]().eval()
    patched, calls = patch_model(copy.deepcopy(mixer)), []
    patched.kernel.register_forward_hook(lambda *_: calls.append(1))
    u = input_of(mixer, 20)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(first(patched(u)), first(mixer(u)))
    assert len(calls) == 2
    mixer.kernel.register_forward_hook(print)
    with pytest.raises(PatchError, match="hooks on kernel"):
        patch_model(mixer)


def changed(mixer: nn.Module, name: str, value: object) -> nn.Module:
    setattr(mixer, name, value)
    return mixer


def growing(mixer: nn.Module) -> nn.Module:
    mixer.kernel.register_buffer("l_kernel", torch.tensor(0))
    return mixer


def quantised(mixer: nn.Module) -> nn.Module:
    weight = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)
    mixer.output_linear.weight = weight
    return mixer


REFUSED = {
    "shape": (lambda: changed(LongConvolution(WIDTH, 9), "hidden_size", 4), r"not \(4, taps\)"),
    "children": (lambda: changed(LongConvolution(WIDTH, 9), "extra", nn.Tanh()), "it has sub-modules: extra"),
    "network": (lambda: changed(ImplicitLongConvolution(WIDTH, 9), "mlp", nn.Linear(3, 8)), "mlp is Linear"),
    "channels": (lambda: FFTConv(WIDTH, channels=2), "only one filter a channel"),
    "dplr": (lambda: growing(FFTConv(WIDTH)), r"changes its weights in the forward pass \(DPLR\)"),
    "block fft": (lambda: LongConv(WIDTH, 40, block_fft_conv=True), "learns its transform"),
    "many": (lambda: LongConv(WIDTH, 40, channels=2), "only one filter a channel"),
    "skip": (lambda: changed(S4D(WIDTH), "D", nn.Parameter(torch.ones(4))), "D has shape"),
    "fused": (lambda: H3(WIDTH, use_fast_fftconv=True), "own fused kernels"),
    "wrapped": (lambda: changed(H3(WIDTH), "q_proj", nn.Sequential(nn.Linear(8, 8))), "q_proj is Sequential"),
    "quantised": (lambda: quantised(H3(WIDTH)), "output_linear is quantised"),
    "dense": (lambda: STU(WIDTH, 40, use_approx=False), "mix channels densely"),
    "library": (lambda: STU(WIDTH, 40, flash_fft=print), "another FFT library"),
    "wraps": (lambda: STU(WIDTH, 40, n=64), "64 points wraps around for 40 positions"),
    "instance": (lambda: changed(S4D(WIDTH), "forward", print), "overridden on the instance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(PatchError, match=reason):
        patch_model(make())


@every_mixer
def test_forks_are_refused(make: Maker) -> None:
    mixer = make().eval()
    published = type(mixer)

    def forward(self: nn.Module, u: torch.Tensor) -> object:
        y = published.forward(self, u)
        return (1.01 * y[0], y[1]) if isinstance(y, tuple) else 1.01 * y

    mixer.__class__ = type(published.__name__, (published,), {"forward": forward})
    with pytest.raises(PatchError, match="computes something else"):
        patch_model(mixer)
