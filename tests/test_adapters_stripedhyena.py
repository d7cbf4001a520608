"""StripedHyena's and Evo 2's filters, patched against unpatched, and what is recognised and refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_models import generation_state
from family_style import HyenaCascade, HyenaInferenceEngine, ParallelHyenaFilter
from patching import assert_equal_models, assert_patched_mixer_agrees, first, relative, snapshot
from torch import nn

from hf_flashfftconv.adapters import find_adapter, stripedhyena
from hf_flashfftconv.errors import BackendError, PatchError
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model

WIDTH = 8
LENGTHS = (1, 2, 37, 64, 150)


def striped(**options: object) -> nn.Module:
    return ParallelHyenaFilter(WIDTH, **options).eval()


def cascade(taps: int | None = None, **options: object) -> nn.Module:
    return HyenaCascade(WIDTH, taps, **options).eval()


MIXERS = {
    "stripedhyena": striped,
    "unsplit": lambda: striped(column_split_hyena=False),
    "one-head": lambda: striped(heads=1),
    "hcl": cascade,
    "hcl-heads": lambda: cascade(interleave=False, column_split_hyena=True),
    "hcl-thirds": lambda: cascade(interleave=False),
    "hcl-flipped": lambda: cascade(hyena_flip_x1x2=True),
    "hcm": lambda: cascade(128),
    "hcm-ungrouped": lambda: cascade(130, groups=WIDTH),
    "hcs": lambda: cascade(7),
}
every_mixer = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
Maker = Callable[[], nn.Module]


def projected(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 3 * WIDTH)


@every_mixer
@pytest.mark.usefixtures("transforms_pay")
def test_agrees(make: Maker) -> None:
    assert_patched_mixer_agrees(make(), map(projected, LENGTHS))


@every_mixer
@pytest.mark.usefixtures("transforms_pay")
def test_padding_mask(make: Maker) -> None:
    mixer = make()
    mask = torch.ones(2, 37)
    mask[0, 30:] = mask[1, :5] = 0
    u = projected(37)
    assert_equal_models(patch_model(copy.deepcopy(mixer)), mixer, lambda m: m(u, padding_mask=mask)[0])
    assert relative(mixer(u, padding_mask=mask)[0], mixer(u)[0]) > 0.1


@every_mixer
@pytest.mark.usefixtures("transforms_pay")
def test_gates_and_directions_matter(make: Maker) -> None:
    mixer, other = make(), make()
    other.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        other.short_filter_weight.copy_(other.short_filter_weight.roll(1, 0))
    u = projected(20)
    with pytest.raises(AssertionError):
        assert_equal_models(patch_model(other), mixer, lambda m: m(u)[0])


@every_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("transforms_pay")
def test_16_bits_are_no_less_accurate_than_unpatched(make: Maker, dtype: torch.dtype) -> None:
    mixer = make()
    # Gated values have a few that are far larger than the rest: it takes many to average their rounding.
    u = projected(64, batch=32).to(dtype).float()
    exact = mixer(u)[0]
    patched = patch_model(copy.deepcopy(mixer))
    for x in (u, u.to(dtype)):
        with torch.autocast("cpu", dtype):
            unpatched, actual = mixer(x)[0], patched(x)[0]
        assert actual.dtype == unpatched.dtype
        # As the output projection reads them.
        assert relative(actual.to(dtype), exact) <= 1.1 * relative(unpatched.to(dtype), exact)
    # As these models are loaded: all in 16 bits but the poles and residues.
    for model in (mixer, patched):
        for name, parameter in model.named_parameters():
            if "poles" not in name and name != "residues":
                parameter.data = parameter.data.to(dtype)
    unpatched, actual = mixer(u.to(dtype))[0], patched(u.to(dtype))[0]
    assert actual.dtype == unpatched.dtype == dtype
    assert relative(actual, exact) <= 1.1 * relative(unpatched, exact)


@every_mixer
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.usefixtures("transforms_pay")
def test_generation_starts_with_the_state_of_the_original(make: Maker, length: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(stripedhyena, "_BLOCK", 16)
    mixer = make()
    patched = patch_model(copy.deepcopy(mixer))
    u = projected(46)
    expected, states, other = mixer(u)[0], generation_state(), generation_state()
    mixer(u[:, :length], inference_params=other)
    y, returned = patched(u[:, :length], inference_params=states)
    assert returned is states and patch_report(patched).rows[0].reason == ""
    assert relative(y, expected[:, :length]) <= 1e-5
    for name, value in vars(other).items():
        assert getattr(states, name).keys() == value.keys()
        for layer, state in value.items():
            assert getattr(states, name)[layer].dtype == state.dtype
            assert (
                relative(torch.view_as_real(getattr(states, name)[layer] + 0j), torch.view_as_real(state + 0j)) <= 1e-5
            )
    for t in range(length, 46):
        assert relative(patched(u[:, t : t + 1], inference_params=states)[0], expected[:, t : t + 1]) <= 1e-4


def test_other_prefill_styles_are_left_to_the_original() -> None:
    mixer = striped()
    mixer.config["prefill_style"] = "recurrence"
    patched, states = patch_model(copy.deepcopy(mixer)), generation_state()
    u = projected(20)
    assert torch.equal(patched(u, inference_params=states)[0], mixer(u, inference_params=generation_state())[0])
    assert "prefill_style is not fft" in patch_report(patched).rows[0].reason
    patched(u)
    assert not patch_report(patched).rows[0].reason


def test_filters_computed_in_advance_are_used() -> None:
    mixer = striped()
    patched = patch_model(copy.deepcopy(mixer))
    for m in (mixer, patched):
        m.h = torch.ones(WIDTH, 20)
    u = projected(20)
    assert torch.equal(patched(u)[0], mixer(u)[0])
    assert "computed in advance" in patch_report(patched).rows[0].reason


def test_a_few_taps_wait_for_the_kernels() -> None:
    mixer = cascade(7)
    patched = patch_model(copy.deepcopy(mixer))
    u = projected(20)
    assert torch.equal(patched(u)[0], mixer(u)[0])
    assert "7 taps are faster without FFT" in patch_report(patched).rows[0].reason
    with pytest.raises(BackendError):
        patch_model(patched, backend="cuda")(u)


@every_mixer
def test_unpatching_restores_everything(make: Maker) -> None:
    mixer, u = make(), projected(5)
    # The last check of patching runs the original, which leaves things behind on the module that it is run on.
    before = snapshot(mixer)
    patch_model(mixer)
    mixer(u)
    assert snapshot(unpatch_model(mixer)) == before
    expected = copy.deepcopy(mixer)(u)[0]
    assert torch.equal(unpatch_model(patch_model(mixer))(u)[0], expected)


@every_mixer
@pytest.mark.usefixtures("transforms_pay")
def test_filters_are_kept_until_the_weights_change(make: Maker) -> None:
    mixer = make()
    patched = patch_model(copy.deepcopy(mixer))
    u = projected(20)
    names = [name for name, _ in mixer.named_parameters() if name in type(patched).own_filter]
    assert names
    with torch.no_grad():
        patched(u)
        kept = patched._filters(patched, u.transpose(1, 2), False)[0]
        assert patched._filters(patched, u.transpose(1, 2), False)[0] is kept
        for name in names:
            for m in (mixer, patched):
                m.get_parameter(name).mul_(0.9)
            assert relative(patched(u)[0], mixer(u)[0]) <= 1e-5
        patched.train()
        assert patched._filters(patched, u.transpose(1, 2), False)[0] is not kept


@every_mixer
def test_float32_filters_keep_the_filter_and_nothing_else(make: Maker) -> None:
    mixer = patch_model(make(), float32_filters=True).bfloat16()
    kept = {name for name, parameter in mixer.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {name for name, _ in mixer.named_parameters()} & type(mixer).own_filter
    assert mixer(projected(20).bfloat16())[0].dtype == torch.bfloat16
    assert {p.dtype for p in unpatch_model(mixer).parameters()} <= {torch.float32, torch.bfloat16}


class OtherEngine(HyenaInferenceEngine):
    pass


def changed(make: Maker, name: str, value: object) -> nn.Module:
    mixer = make()
    setattr(mixer, name, value)
    return mixer


def with_own_method(mixer: nn.Module) -> nn.Module:
    mixer.engine.parallel_fir = print
    return mixer


REFUSED = {
    "engine": (lambda: changed(striped, "engine", OtherEngine()), "its engine is OtherEngine"),
    "engine method": (lambda: with_own_method(cascade()), "its engine is HyenaInferenceEngine, not .* as published"),
    "no engine": (lambda: changed(striped, "engine", None), "has no attribute engine"),
    "depthwise": (lambda: changed(cascade, "fir_fn", print), "use_flash_depthwise"),
    "flashfft": (lambda: striped(use_flashfft=True), "use_flashfft: another FFT library"),
    "threshold": (lambda: striped(long_fir_threshold=16), "long_fir_threshold cuts and reverses"),
    "groups": (lambda: striped(groups=2), "hyena_filter_groups 2: only 1"),
    "short bias": (lambda: changed(striped, "short_filter_bias", None), "short_filter_bias is missing"),
    "poles": (lambda: changed(striped, "poles", nn.Parameter(torch.ones(4, 3, 1, 2))), "poles has shape"),
    "heads": (lambda: changed(striped, "num_attention_heads", 3), "8 channels cannot be split into 3 heads"),
    "prints": (lambda: cascade(print_activations=True), "print_activations"),
    "both orders": (lambda: cascade(column_split_hyena=True), "interleave and column_split_hyena"),
    "modal groups": (lambda: changed(cascade, "hyena_filter_groups", 4), "only one a channel"),
    "fir groups": (lambda: changed(lambda: cascade(128), "hyena_filter_groups", 3), "do not form 3 groups"),
    "one group": (lambda: cascade(128, groups=1), "do not form 1 groups"),
    "skip": (lambda: changed(lambda: cascade(7), "D", nn.Parameter(torch.ones(8))), "D with 7 taps"),
    "instance": (lambda: changed(striped, "forward", print), "overridden on the instance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str) -> None:
    make, reason = REFUSED[case]
    mixer = make()
    with pytest.raises(PatchError, match=reason):
        patch_model(mixer)
    report = patch_report(patch_model(nn.Sequential(mixer, striped())))
    assert [row.status for row in report.rows] == ["left alone", "replaced"]


@pytest.mark.parametrize("make", [striped, cascade, lambda: cascade(128), lambda: cascade(7)])
def test_forks_are_refused(make: Maker) -> None:
    mixer = make()
    published = type(mixer)

    def forward(self: nn.Module, u: torch.Tensor, *args: object) -> tuple:
        return 1.01 * published.forward(self, u, *args)[0], None

    mixer.__class__ = type(published.__name__, (published,), {"forward": forward})
    attributes = dict(vars(mixer))
    with pytest.raises(PatchError, match="computes something else"):
        patch_model(mixer)
    assert vars(mixer) == attributes


def test_report_of_a_filter_without_a_longest_input() -> None:
    mixer = patch_model(cascade(128))
    [row] = patch_report(mixer).rows
    assert (row.family, row.status, row.length, row.backend) == ("evo2", "replaced", None, None)
    mixer(projected(200))
    [row] = patch_report(mixer).rows
    assert (row.length, row.backend, row.dtype) == (200, "torch", "float32")
    assert row.fft_size is not None and 327 <= row.fft_size < 400
    assert find_adapter(striped()).family == "stripedhyena"


def test_gradients_reach_the_poles_over_long_inputs() -> None:
    mixer = striped()
    u = projected(3000)
    assert_equal_models(patch_model(copy.deepcopy(mixer)), mixer, lambda m: first(m(u)))
