"""The short filter of patched mixers: computed with the gates where it is a plain convolution, else called."""

import copy
from collections.abc import Callable

import pytest
import torch
from patching import assert_equal_models, relative
from remote_style import HyenaOperator, MonarchMixerSequenceMixing, Safari
from torch import Tensor, nn

from hf_flashfftconv.adapters import base
from hf_flashfftconv.patch import patch_model, unpatch_model

LENGTH = 30
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "hyenadna": lambda: HyenaOperator(6, LENGTH),
    "safari": lambda: Safari.HyenaOperator(6, LENGTH),
    "m2": lambda: MonarchMixerSequenceMixing(6, LENGTH, bidirectional=True, residual_long_conv=True),
    "m2 with dropout": lambda: MonarchMixerSequenceMixing(6, LENGTH, dropout=0.5, hyena_training_additions=True),
}
EVERY_MIXER = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The gates of all calls of the fused operation."""
    gates: list[int] = []

    def spy(*args: Tensor, gate: int, **kwargs: str) -> tuple[Tensor, Tensor]:
        gates.append(gate)
        return operation(*args, gate=gate, **kwargs)

    operation = base.gated_short_conv
    monkeypatch.setattr(base, "gated_short_conv", spy)
    return gates


def mix(mixer: nn.Module) -> Tensor:
    torch.manual_seed(1)
    u = torch.randn(2, LENGTH - 3, 6)
    torch.manual_seed(2)
    y = mixer(u)
    return y[0] if isinstance(y, tuple) else y


@EVERY_MIXER
@pytest.mark.parametrize("training", [True, False])
def test_plain(fused: list[int], make: Callable[[], nn.Module], training: bool) -> None:
    mixer = make().train(training)
    patched = patch_model(copy.deepcopy(mixer))
    fused.clear()
    assert_equal_models(patched, mixer, mix)
    assert fused == [1 if isinstance(mixer, MonarchMixerSequenceMixing) else 0]
    assert torch.equal(mix(unpatch_model(patched)), mix(mixer))


def observe(conv: nn.Module) -> nn.Module:
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    return conv


def bind(conv: nn.Module) -> nn.Module:
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)
    return conv


class Wrapped(nn.Module):
    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)


CHANGES = {"hooked": observe, "bound": bind, "wrapped": Wrapped, "normed": nn.utils.parametrizations.weight_norm}


@EVERY_MIXER
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_not_plain(fused: list[int], make: Callable[[], nn.Module], change: Callable[[nn.Module], nn.Module]) -> None:
    mixer = make()
    patched = patch_model(copy.deepcopy(mixer))
    fused.clear()
    for module in (mixer, patched):
        module.short_filter = change(module.short_filter)
    assert_equal_models(patched, mixer, mix)
    assert not fused


@EVERY_MIXER
def test_no_less_accurate_in_bfloat16(make: Callable[[], nn.Module]) -> None:
    mixer = make().eval()
    reference = mix(mixer)
    patched = patch_model(copy.deepcopy(mixer))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        original, actual = mix(mixer), mix(patched)
    # Both have the error of filters in bfloat16; with few channels, fewer roundings may add to it as well as take away.
    assert relative(actual, reference) <= 1.1 * relative(original, reference)
