"""The projections of a patched mixer: read in place, bias in the same product, weights cast once under autocast."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from patching import relative
from remote_style import HyenaOperator, MonarchMixerSequenceMixing, build
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hf_flashfftconv import fft_conv
from hf_flashfftconv.patch import patch_model

WIDTH, LENGTH = 8, 40


@pytest.fixture
def mixer() -> nn.Module:
    return patch_model(build(HyenaOperator, WIDTH, 66))


def operations(work: Callable[[], object]) -> Counter:
    """How often each operation runs."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    return Counter(event.name for event in found.events())


@pytest.mark.parametrize("shape", [(3, 4, 10), (1, 4, 7), (2, 1, 1), (0, 4, 5)])
def test_channel_major_outputs_are_one_matrix(shape: tuple[int, ...]) -> None:
    u, k = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1], 5, dtype=torch.float64)
    y = fft_conv(u, k, channel_major=True)
    assert torch.equal(y, fft_conv(u, k))
    rows = y.mT.flatten(0, 1)
    assert rows.data_ptr() == y.data_ptr() and rows.shape == (shape[0] * shape[2], shape[1])
    # What fast matrix products ask of their operands.
    assert y.stride(2) == 1 and y.stride(1) % 8 == 0
    tensors = (u, k, None, None, None, None, True, "torch", True)
    torch.library.opcheck(torch.ops.hf_flashfftconv.fft_conv.default, tensors)
    assert torch.autograd.gradcheck(
        lambda u, k: fft_conv(u, k, channel_major=True), (u.requires_grad_(), k.requires_grad_())
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_the_output_projection_copies_nothing(mixer: nn.Module, batch: int) -> None:
    y = mixer.mix(torch.randn(batch, LENGTH, WIDTH)).detach()
    found = operations(lambda: mixer.project(mixer.out_proj, y))
    assert found["aten::addmm"] == 1 and not found["aten::clone"] and not found["aten::add_"]
    assert relative(mixer.project(mixer.out_proj, y), mixer.out_proj(y)) <= 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_its_gradient_comes_with_positions_side_by_side(mixer: nn.Module, autocast: bool) -> None:
    strides = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mixer.mix(torch.randn(3, LENGTH, WIDTH))
        y.register_hook(lambda dy: strides.append(dy.stride()))
        mixer.project(mixer.out_proj, y).float().square().sum().backward()
    assert strides == [(LENGTH, 1, 3 * LENGTH)]


def test_hooks_of_the_projections_see_what_they_saw(mixer: nn.Module) -> None:
    seen = []
    for layer in (mixer.in_proj, mixer.out_proj):
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixer(torch.randn(2, LENGTH, WIDTH))
    assert seen == [((2, LENGTH, WIDTH), (2, LENGTH, 3 * WIDTH)), ((2, LENGTH, WIDTH), (2, LENGTH, WIDTH))]


def casts(mixer: nn.Module, u: Tensor) -> int:
    """Tensors that are cast to another dtype in one call under autocast."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return operations(lambda: mixer(u))["aten::_to_copy"]


@pytest.mark.parametrize("make", [HyenaOperator, MonarchMixerSequenceMixing], ids=lambda cls: cls.__name__)
def test_weights_are_cast_once(make: type[nn.Module]) -> None:
    kept, cast = (patch_model(build(make, WIDTH, 66), cache_bytes=size) for size in (1 << 20, 0))
    u = torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert torch.equal(*(m(u) if isinstance(m(u), Tensor) else m(u)[0] for m in (kept, cast)))
    first, again = casts(kept, u), casts(kept, u)
    assert first == again <= casts(cast, u) - 4


def in_place(mixer: nn.Module) -> None:
    mixer.out_proj.weight.mul_(2)


def bias(mixer: nn.Module) -> None:
    mixer.in_proj.bias.add_(1)


def new_parameter(mixer: nn.Module) -> None:
    mixer.in_proj.weight = nn.Parameter(2 * mixer.in_proj.weight)


def data_then_eval(mixer: nn.Module) -> None:
    mixer.out_proj.weight.data.mul_(2)
    mixer.eval()


def new_layer(mixer: nn.Module) -> None:
    mixer.out_proj = nn.Linear(WIDTH, WIDTH)


def subclass(mixer: nn.Module) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mixer.out_proj.__class__ = Doubled


@pytest.mark.parametrize(
    "change", [in_place, bias, new_parameter, data_then_eval, new_layer, subclass], ids=lambda change: change.__name__
)
def test_cast_weights_follow_any_change(mixer: nn.Module, change: Callable[[nn.Module], None]) -> None:
    u = torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = mixer(u)
        change(mixer)
        actual = mixer(u)
    assert relative(actual, before) > 1e-2
    patch_model(mixer, cache_bytes=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(actual, mixer(u))


def test_cast_weights_push_no_filter_out(mixer: nn.Module) -> None:
    taps = WIDTH * LENGTH * 4
    patch_model(mixer, cache_bytes=taps)
    u, cache = torch.randn(2, LENGTH, WIDTH), mixer._flashfftconv.cache
    with torch.no_grad():
        mixer(u)
        with torch.autocast("cpu", torch.bfloat16):
            mixer.project(mixer.out_proj, u)
    assert [key[0] for entries in cache._entries.values() for key in entries] == [LENGTH]
