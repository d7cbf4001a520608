"""Filters are generated once in evaluation, and never used when anything that they depend on has changed."""

import copy
from collections.abc import Callable

import pytest
import torch
from patching import relative
from remote_style import HyenaOperator, MonarchMixerSequenceMixing, build
from torch import nn

from hf_flashfftconv import fft_conv
from hf_flashfftconv.adapters import base
from hf_flashfftconv.patch import patch_model

WIDTH = 8


class Counter:
    """Counts how often the network of a filter runs."""

    def __init__(self, filter_fn: nn.Module):
        self.count = 0
        self.forward = type(filter_fn.modulation).forward
        self.filter_fn = filter_fn

    def __enter__(self) -> "Counter":
        def counting(module: nn.Module, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            self.count += module is self.filter_fn.modulation
            return self.forward(module, t, x)

        type(self.filter_fn.modulation).forward = counting
        return self

    def __exit__(self, *_: object) -> None:
        type(self.filter_fn.modulation).forward = self.forward


@pytest.fixture
def mixer() -> nn.Module:
    return patch_model(build(HyenaOperator, WIDTH, 66))


def check_fresh(mixer: nn.Module, u: torch.Tensor) -> None:
    """The output is that of a mixer that has never cached anything."""
    fresh = patch_model(copy.deepcopy(mixer), cache_bytes=0)
    assert torch.equal(mixer(u), fresh(u))


def test_generated_once_a_length_in_evaluation(mixer: nn.Module) -> None:
    u = torch.randn(2, 40, WIDTH)
    with Counter(mixer.filter_fn) as generated:
        with torch.no_grad():
            outputs = [mixer(u) for _ in range(3)]
        assert generated.count == 1
        with torch.inference_mode():
            mixer(u)
        assert generated.count == 1
        with torch.no_grad():
            mixer(u[:, :7])
            mixer(u[:, :7])
        assert generated.count == 2
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


def test_a_smaller_bound_forgets_what_is_kept(mixer: nn.Module) -> None:
    u = torch.randn(2, 40, WIDTH)
    cache = mixer._flashfftconv.cache
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixer(u)
        kept = {type(module).__name__ for module in cache._entries}
        assert {"HyenaFilter", "Linear"} <= kept
        patch_model(mixer, cache_bytes=1 << 20)
        assert len(cache._entries) == 3
        patch_model(mixer, cache_bytes=0)
        assert not cache._entries
        mixer(u)
        assert not cache._entries


def test_never_kept_under_grad_or_while_training(mixer: nn.Module) -> None:
    u = torch.randn(2, 40, WIDTH)
    with Counter(mixer.filter_fn) as generated:
        mixer(u), mixer(u)
        assert generated.count == 2
        mixer.train()
        with torch.no_grad():
            mixer(u), mixer(u)
        assert generated.count == 4
    assert not mixer._flashfftconv.cache._entries


def add_in_place(mixer: nn.Module) -> None:
    mixer.filter_fn.implicit_filter[0].weight.add_(0.1)


def new_parameter(mixer: nn.Module) -> None:
    linear = mixer.filter_fn.implicit_filter[0]
    linear.weight = nn.Parameter(linear.weight + 0.1)


def new_storage(mixer: nn.Module) -> None:
    linear = mixer.filter_fn.implicit_filter[0]
    linear.weight.data = linear.weight.data + 0.1


def loaded_state(mixer: nn.Module) -> None:
    mixer.load_state_dict({name: 1.1 * tensor for name, tensor in mixer.state_dict().items()})


def buffer(mixer: nn.Module) -> None:
    mixer.filter_fn.modulation.deltas.mul_(0.5)


def attribute(mixer: nn.Module) -> None:
    mixer.filter_fn.modulation.shift = 0.5


def other_dtype(mixer: nn.Module) -> None:
    mixer.filter_fn.double()


def other_class(mixer: nn.Module) -> None:
    class Scaled(type(mixer.filter_fn)):
        def filter(self, length: int) -> torch.Tensor:
            return 2 * super().filter(length)

    mixer.filter_fn.__class__ = Scaled


def other_layer(mixer: nn.Module) -> None:
    mixer.filter_fn.implicit_filter[2] = nn.Linear(8, 8)


def written_through_data_then_eval(mixer: nn.Module) -> None:
    mixer.filter_fn.implicit_filter[0].weight.data.add_(0.1)
    mixer.eval()


def adapter_switched(mixer: nn.Module) -> None:
    class Switched(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.base_layer, self.switches = layer, {"scale": 3.0}

        @property
        def weight(self) -> torch.Tensor:
            return self.base_layer.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.switches["scale"] * self.base_layer(x)

    mixer.filter_fn.implicit_filter[0] = Switched(mixer.filter_fn.implicit_filter[0])
    mixer(torch.randn(2, 40, WIDTH))
    mixer.filter_fn.implicit_filter[0].switches["scale"] = 2.0


def hook(mixer: nn.Module) -> None:
    mixer.filter_fn.modulation.register_forward_hook(lambda module, args, output: 2 * output)


CHANGES = [
    add_in_place,
    new_parameter,
    new_storage,
    loaded_state,
    buffer,
    attribute,
    other_dtype,
    other_class,
    other_layer,
    written_through_data_then_eval,
    adapter_switched,
    hook,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_dropped_on_any_change(mixer: nn.Module, change: Callable[[nn.Module], None]) -> None:
    u = torch.randn(2, 40, WIDTH)
    with torch.no_grad():
        before = mixer(u)
        change(mixer)
        check_fresh(mixer, u)
        assert relative(mixer(u), before) > 1e-7
        check_fresh(mixer, u)


def test_autocast_has_filters_of_its_own(mixer: nn.Module) -> None:
    u = torch.randn(2, 40, WIDTH)
    with torch.no_grad():
        full = mixer(u)
        with torch.autocast("cpu", torch.bfloat16):
            check_fresh(mixer, u)
        assert torch.equal(mixer(u), full)


def test_memory_is_bounded_and_a_pass_does_not_evict_itself() -> None:
    length = 64
    one = WIDTH * length * 4
    model = patch_model(nn.Sequential(*[build(HyenaOperator, WIDTH, 66) for _ in range(3)]), cache_bytes=2 * one)
    cache = model[0]._flashfftconv.cache

    def kept() -> list[list[int]]:
        return [[key[0] for key in cache._entries.get(mixer.filter_fn, {})] for mixer in model]

    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(1, length, WIDTH))
            assert kept() == [[64], [64], []]
        model(torch.randn(1, 32, WIDTH))
        assert kept() == [[32], [64], [32]] or kept() == [[32], [32], [32]]
        assert sum(e.bytes for entries in cache._entries.values() for e in entries.values()) <= 2 * one


def test_both_directions_and_filters_are_kept() -> None:
    mixer = patch_model(build(MonarchMixerSequenceMixing, WIDTH, 66, bidirectional=True, residual_long_conv=True))
    with torch.no_grad(), Counter(mixer.filter_fn) as first, Counter(mixer.filter_fn2) as second:
        for _ in range(3):
            mixer(torch.randn(1, 20, WIDTH))
        assert (first.count, second.count) == (2, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kept_tensors_are_constants_of_fixed_identity(mode: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the operator in turn computes from them, a spectrum, is kept by the identity of constants.
    calls = []

    def recording(u: torch.Tensor, k: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
        calls.append((k, arguments["k_rev"], arguments["skip"]))
        return fft_conv(u, k, **arguments)

    mixer = patch_model(build(MonarchMixerSequenceMixing, WIDTH, 66, bidirectional=True))
    monkeypatch.setattr(base, "fft_conv", recording)
    with mode():
        mixer(torch.randn(1, 20, WIDTH)), mixer(torch.randn(1, 20, WIDTH))
    for first, second in zip(*calls, strict=True):
        assert first is second and first.is_contiguous()
        assert not first.requires_grad and not first.is_inference()


def test_a_dead_model_frees_its_filters() -> None:
    mixer = patch_model(build(HyenaOperator, WIDTH, 66))
    cache = mixer._flashfftconv.cache
    with torch.no_grad():
        mixer(torch.randn(1, 20, WIDTH))
    assert len(cache._entries) == 1
    mixer.filter_fn = build(HyenaOperator, WIDTH, 66).filter_fn
    assert len(cache._entries) == 0
