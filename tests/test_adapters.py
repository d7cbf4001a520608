"""Each family's mixer, patched against unpatched, and what is recognised and refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from patching import assert_equal_models, assert_patched_mixer_agrees, first, relative
from remote_style import HyenaFilter, HyenaOperator, MonarchMixerSequenceMixing, Safari, build
from torch import nn

from hf_flashfftconv.adapters import find_adapter, register_adapter, supported_classes, survey
from hf_flashfftconv.adapters.base import Adapter, PatchedMixer
from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import patch_model, patch_report

pytestmark = pytest.mark.no_cover

WIDTH, L_MAX = 8, 66
LENGTHS = (1, 2, 37, 65, 66)


def check_mixer(mixer: nn.Module) -> None:
    assert_patched_mixer_agrees(mixer, [torch.randn(2, length, WIDTH) for length in LENGTHS])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_hyenadna(dropout: float) -> None:
    check_mixer(build(HyenaOperator, WIDTH, L_MAX, dropout=dropout))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.3},
        {"activation": nn.SiLU()},
        {"return_state": True},
        {"normalized": True},
        {"bias": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_safari(options: dict) -> None:
    check_mixer(build(Safari.HyenaOperator, WIDTH, L_MAX, **options))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("additions", [False, True])
def test_m2(bidirectional: bool, residual: bool, additions: bool) -> None:
    flags = {"bidirectional": bidirectional, "residual_long_conv": residual, "hyena_training_additions": additions}
    check_mixer(build(MonarchMixerSequenceMixing, WIDTH, L_MAX, dropout=0.3, **flags))


@pytest.mark.parametrize("compiled", [False, True])
def test_m2_keeps_no_stacks_for_anomaly_detection(compiled: bool) -> None:
    mixer = patch_model(build(MonarchMixerSequenceMixing, WIDTH, L_MAX, residual_long_conv=True, bidirectional=True))
    runner = torch.compile(mixer, backend="aot_eager") if compiled else mixer
    with torch.autograd.set_detect_anomaly(True):
        mixed = runner(torch.randn(2, L_MAX, WIDTH))[0]
        outside = mixed * 2
        assert torch.is_anomaly_enabled()
    nodes = [mixed.grad_fn]
    for node in nodes:
        assert "traceback_" not in node.metadata
        nodes += [inner for inner, _ in node.next_functions if inner is not None and inner not in nodes]
    assert "traceback_" in outside.grad_fn.metadata


@pytest.mark.parametrize("mixer_class", [HyenaOperator, Safari.HyenaOperator, MonarchMixerSequenceMixing])
def test_gates_matter(mixer_class: type[nn.Module]) -> None:
    # The checks above can fail: exchanging the two gates is far outside of the tolerance.
    mixer = build(mixer_class, WIDTH, L_MAX)
    swapped = copy.deepcopy(mixer)
    projection = swapped.in_proj if hasattr(swapped, "in_proj") else swapped.in_linear
    with torch.no_grad():
        for tensor in (projection.weight, projection.bias, swapped.short_filter.weight, swapped.short_filter.bias):
            tensor[: 2 * WIDTH] = tensor[: 2 * WIDTH].roll(WIDTH, 0)
    u = torch.randn(2, 20, WIDTH)
    with pytest.raises(AssertionError):
        assert_equal_models(patch_model(swapped), mixer, lambda m: first(m(u)))


@pytest.mark.parametrize("mixer_class", [HyenaOperator, Safari.HyenaOperator, MonarchMixerSequenceMixing])
def test_too_long_a_sequence_raises(mixer_class: type[nn.Module]) -> None:
    patched = patch_model(build(mixer_class, WIDTH, L_MAX))
    with pytest.raises(ValueError, match=r"sequence length 67 exceeds l_max=66.*" + mixer_class.__name__):
        patched(torch.randn(1, 67, WIDTH))


def test_arguments_unknown_to_the_operator_reach_the_original() -> None:
    u = torch.randn(1, 5, WIDTH)
    with pytest.raises(TypeError, match="attention_mask"):
        patch_model(build(HyenaOperator, WIDTH, L_MAX))(u, attention_mask=None)
    safari = build(Safari.HyenaOperator, WIDTH, L_MAX)
    expected = safari(u, seqlen=5)
    assert relative(patch_model(safari)(u, seqlen=5), expected) <= 1e-5


class Changed(HyenaOperator):
    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return super().forward(u) + u


class Derived(HyenaOperator):
    """A subclass that keeps the forward, as FSDP and parametrizations generate."""


class IgnoresUseBias(HyenaFilter):
    def forward(self, x: torch.Tensor, length: int, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return HyenaFilter.forward(self, x, length, k, bias)


IgnoresUseBias.__name__ = "HyenaFilter"


class FlashMMSequenceMixing(MonarchMixerSequenceMixing):
    pass


def hyena(change: Callable[[nn.Module], object] = lambda m: None, **options: object) -> nn.Module:
    mixer = build(HyenaOperator, WIDTH, L_MAX, **options)
    change(mixer)
    return mixer


def m2(change: Callable[[nn.Module], object]) -> nn.Module:
    mixer = build(MonarchMixerSequenceMixing, WIDTH, L_MAX, residual_long_conv=True, bidirectional=True)
    change(mixer)
    return mixer


def safari(**options: object) -> nn.Module:
    return build(Safari.HyenaOperator, WIDTH, L_MAX, **options)


def quantise(linear: nn.Module) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


def replace_filter(mixer: nn.Module) -> None:
    mixer.filter_fn = IgnoresUseBias(WIDTH, L_MAX, bias=False)


REFUSED = {
    "order": (lambda: hyena(order=3), "order 3"),
    "short filter": (lambda: hyena(short_filter_order=4), "4 taps and padding .* is not causal"),
    "dilation": (lambda: hyena(lambda m: setattr(m.short_filter, "dilation", (2,))), "dilation"),
    "groups": (lambda: hyena(lambda m: setattr(m, "short_filter", nn.Conv1d(24, 24, 3, padding=2))), "groups"),
    "no conv": (lambda: hyena(lambda m: setattr(m, "short_filter", nn.Identity())), "is Identity, not Conv1d"),
    "projection": (lambda: hyena(lambda m: setattr(m, "in_proj", nn.Linear(8, 16))), "in_proj maps"),
    "quantised": (lambda: hyena(lambda m: quantise(m.out_proj)), "out_proj is quantised.*int8"),
    "quantised filter": (
        lambda: hyena(lambda m: quantise(m.filter_fn.implicit_filter[0])),
        "implicit_filter is quantised",
    ),
    "no attribute": (lambda: hyena(lambda m: delattr(m, "l_max")), "has no attribute l_max"),
    "type": (lambda: hyena(lambda m: setattr(m, "d_model", 8.0)), "d_model is float, not int"),
    "bias": (lambda: hyena(lambda m: setattr(m.filter_fn, "bias", nn.Parameter(torch.ones(3)))), "bias has shape"),
    "use_bias": (lambda: hyena(replace_filter), "use_bias=False, which its forward ignores"),
    "dropout": (lambda: hyena(lambda m: setattr(m, "dropout", nn.Identity())), "dropout is not a Dropout"),
    "subclass": (lambda: build(Changed, WIDTH, L_MAX), "overridden by the class Changed"),
    "instance": (lambda: hyena(lambda m: setattr(m, "forward", lambda u: u)), "operator is overridden on the instance"),
    "filter": (
        lambda: hyena(lambda m: setattr(m.filter_fn, "forward", min)),
        "filter_fn is overridden on the instance",
    ),
    "hook": (lambda: hyena(lambda m: m.filter_fn.register_forward_hook(print)), "hooks on filter_fn"),
    "bidirectional": (lambda: hyena(lambda m: setattr(m.filter_fn, "bidirectional", True)), "bidirectional"),
    "heads": (lambda: safari(num_heads=2), "num_heads 2"),
    "blocks": (lambda: safari(num_blocks=3), "num_blocks 3"),
    "inner factor": (lambda: safari(inner_factor=2), "inner_factor 2"),
    "outer mixing": (lambda: safari(outer_mixing=True), "outer_mixing"),
    "ffn": (lambda: safari(post_order_ffn=True), "post_order_ffn"),
    "flashfft": (lambda: m2(lambda m: setattr(m.filter_fn, "flashfft", print)), "flashfft is set"),
    "fused": (lambda: build(FlashMMSequenceMixing, WIDTH, L_MAX), "own fused kernels"),
    "directions": (lambda: m2(lambda m: setattr(m.filter_fn2, "bidirectional", False)), "disagrees with filter_fn2"),
    "no reverse": (lambda: m2(lambda m: setattr(m.filter_fn2, "filter_rev", None)), "no method filter_rev"),
    "no filter": (lambda: m2(lambda m: setattr(m.filter_fn, "filter", None)), "no method filter"),
    "no second": (lambda: m2(lambda m: delattr(m, "filter_fn2")), "has no attribute filter_fn2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str) -> None:
    make, reason = REFUSED[case]
    refused, accepted = make(), build(HyenaOperator, WIDTH, L_MAX)
    before = type(refused), dict(vars(refused))
    with pytest.raises(PatchError, match=reason):
        patch_model(refused)
    report = patch_report(patch_model(nn.Sequential(refused, accepted)))
    assert [row.status for row in report.rows] == ["left alone", "replaced"]
    assert (type(refused), dict(vars(refused))) == before


def fork(change: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> type[nn.Module]:
    """A class that has the name and the structure of the published operator, and a formula of its own."""

    def forward(self: nn.Module, u: torch.Tensor) -> torch.Tensor:
        return change(self, u)

    return type("HyenaOperator", (HyenaOperator,), {"forward": forward})


def noncausal(self: nn.Module, u: torch.Tensor) -> torch.Tensor:
    return HyenaOperator.forward(self, u.flip(1)).flip(1)


FORKS = {
    "residual": (lambda self, u: HyenaOperator.forward(self, u) + u, "computes something else.*off by"),
    "noncausal": (noncausal, "computes something else"),
    "scale": (lambda self, u: 1.01 * HyenaOperator.forward(self, u), "off by 0.0099"),
    "shape": (lambda self, u: HyenaOperator.forward(self, u)[:, 1:], r"shape \(1, 6, 8\)"),
}


@pytest.mark.parametrize("case", FORKS)
@pytest.mark.parametrize("training", [False, True])
def test_fork_with_another_formula_is_refused(case: str, training: bool) -> None:
    change, reason = FORKS[case]
    mixer = build(fork(change), WIDTH, L_MAX, dropout=0.3).train(training)
    state, generator = dict(vars(mixer)), torch.get_rng_state()
    with pytest.raises(PatchError, match=reason):
        patch_model(mixer)
    assert vars(mixer) == state and torch.equal(torch.get_rng_state(), generator)
    check_mixer(build(fork(HyenaOperator.forward), WIDTH, L_MAX))


def test_module_that_fits_no_published_code_is_refused() -> None:
    class Pair(HyenaFilter):
        def filter(self, length: int) -> tuple[torch.Tensor, None]:
            return super().filter(length), None

    class Unpacking(HyenaOperator):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            k, _ = self.filter_fn.filter(u.shape[1])
            k = k[0].transpose(0, 1)
            x0, x1, v = self.short_filter(self.in_proj(u).transpose(1, 2))[..., : u.shape[1]].split(self.d_model, dim=1)
            v = self.filter_fn(v * x1, u.shape[1], k=k, bias=self.filter_fn.bias)
            return self.out_proj((v * x0).transpose(1, 2))

    Unpacking.__name__ = "HyenaOperator"
    mixer = build(Unpacking, WIDTH, L_MAX)
    mixer.filter_fn = Pair(WIDTH, L_MAX)
    assert mixer(torch.randn(2, 9, WIDTH)).shape == (2, 9, WIDTH)
    with pytest.raises(PatchError, match="published code fails"):
        patch_model(mixer)


def test_modules_that_cannot_be_tried_are_judged_by_structure() -> None:
    def missing_kernel(self: nn.Module, u: torch.Tensor) -> torch.Tensor:
        raise ImportError("no such kernel")

    assert patch_report(patch_model(build(fork(missing_kernel), WIDTH, L_MAX))).replaced == 1
    calls: list[int] = []
    hooked = build(HyenaOperator, WIDTH, L_MAX)
    hooked.in_proj.register_forward_hook(lambda *_: calls.append(1))
    patch_model(hooked)
    assert calls == []
    assert patch_report(patch_model(build(HyenaOperator, WIDTH, L_MAX).to("meta"))).replaced == 1


def test_recognised_by_the_names_of_base_classes() -> None:
    mixer = build(Derived, WIDTH, L_MAX)
    check_mixer(mixer)
    assert find_adapter(mixer).family == "hyenadna"
    assert find_adapter(nn.Linear(2, 2)) is None


def test_a_registered_family_is_served() -> None:
    class Doubler(nn.Module):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return 2 * u

    class PatchedDoubler(PatchedMixer):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return u + u

    from hf_flashfftconv import adapters

    known = list(adapters._ADAPTERS)
    try:
        register_adapter(Adapter("doubler", frozenset({"Doubler"}), lambda module: None, PatchedDoubler))
        assert "Doubler" in supported_classes()
        assert [finding.name for finding in survey(nn.Sequential(nn.Tanh(), Doubler()))] == ["1"]
        assert torch.equal(patch_model(Doubler())(torch.ones(3)), 2 * torch.ones(3))
    finally:
        adapters._ADAPTERS[:] = known
