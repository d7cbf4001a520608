"""Spectra of filters that stay the same are kept, and none is stale; without a GPU."""

import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from fake_kernels import FakeLibrary, fake
from torch import Tensor

from hf_flashfftconv.ops import cuda, filters, plan

__all__ = ["fake"]


def forward(k: Tensor, skip: Tensor | None = None, k_rev: Tensor | None = None, length: int = 64) -> None:
    cuda.forward(torch.zeros(1, k.shape[0], length, dtype=torch.bfloat16), k, skip, None, None, k_rev, True)


def prepared(fake: FakeLibrary) -> int:
    """Spectra made since this was last asked."""
    count = sum(name == "fft_conv_filter_spectrum" for name, _ in fake.calls)
    fake.calls.clear()
    return count


def test_launches_are_on_the_current_stream(fake: FakeLibrary) -> None:
    forward(torch.randn(2, 8))
    assert fake.calls == [("fft_conv_filter_spectrum", 77), ("fft_conv_forward", 77)]


def test_a_spectrum_is_kept_while_the_filter_stays_the_same(fake: FakeLibrary) -> None:
    k, skip, k_rev = torch.randn(2, 8), torch.randn(2), torch.randn(2, 9)
    for _ in range(3):
        forward(k, skip, k_rev)
    forward(k, skip, k_rev, length=65)
    assert prepared(fake) == 1
    forward(k, skip)
    forward(k, None, k_rev)
    forward(k.clone(), skip, k_rev)
    forward(k, skip, k_rev, length=7)
    forward(k, skip, k_rev, length=300)
    assert prepared(fake) == 5
    forward(k, skip, k_rev)
    assert prepared(fake) == 0


@pytest.mark.parametrize("name", ["k", "skip", "k_rev"])
def test_no_spectrum_is_stale(fake: FakeLibrary, name: str) -> None:
    filter_ = {"k": torch.randn(2, 8), "skip": torch.randn(2), "k_rev": torch.randn(2, 9)}
    x, shape = filter_[name], filter_[name].shape

    def swap(new: Tensor) -> None:
        x.data = new

    def load() -> None:
        torch.nn.ParameterList([torch.nn.Parameter(x, requires_grad=False)])[0].copy_(torch.randn_like(x))

    changes = {
        "in place": lambda: x.mul_(2),
        "through a view": lambda: x[:1].zero_(),
        "detached": lambda: x.detach().add_(1),
        "loaded": load,
        "swapped": lambda: swap(torch.randn_like(x)),
        # The second memory may well be the first again.
        "swapped twice": lambda: (swap(torch.empty(0)), swap(torch.randn(shape))),
        "set": lambda: x.set_(torch.randn_like(x)),
    }
    for change, apply in changes.items():
        forward(**filter_)
        prepared(fake)
        apply()
        forward(**filter_)
        assert prepared(fake) == 1, change


def test_one_entry_for_each_filter(fake: FakeLibrary) -> None:
    k = torch.randn(2, 8)
    for _ in range(3):
        forward(k.mul_(2))
    assert len(cuda._spectra._entries) == 1


@pytest.mark.parametrize("name", ["k", "skip", "k_rev"])
def test_spectra_of_what_is_trained_are_not_kept(fake: FakeLibrary, name: str) -> None:
    filter_ = {"k": torch.randn(2, 8), "skip": torch.randn(2), "k_rev": torch.randn(2, 9)}
    forward(**filter_)
    filter_[name].requires_grad_()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            forward(**filter_)
            forward(**filter_)
    assert prepared(fake) == 5
    assert not cuda._spectra._entries


def test_inference_tensors_have_no_version_and_are_not_kept(fake: FakeLibrary) -> None:
    with torch.inference_mode():
        k = torch.randn(2, 8)
        forward(k)
        forward(k.mul_(2))
        assert prepared(fake) == 2
    assert not cuda._spectra._entries
    k = torch.randn(2, 8)
    with torch.inference_mode():
        forward(k)
        forward(k)
    assert prepared(fake) == 1


def test_subclasses_are_not_kept(fake: FakeLibrary) -> None:
    class Scaled(Tensor):
        pass

    k = torch.randn(2, 8).as_subclass(Scaled)
    forward(k)
    assert not cuda._spectra._entries


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_dead_filter_drops_its_spectrum(fake: FakeLibrary, index: int) -> None:
    tensors = [torch.randn(2, 8), torch.randn(2), torch.randn(2, 9)]
    forward(*tensors)
    assert len(cuda._spectra._entries) == 1
    tensors[index] = None
    gc.collect()
    assert not cuda._spectra._entries


@pytest.mark.parametrize("stream, elsewhere", [(0, False), (77, True)])
def test_what_is_kept_on_a_side_stream_is_allocated_by_another_thread(
    fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch, stream: int, elsewhere: bool
) -> None:
    """Private pools, such as that of a CUDA graph that warms up, take what the current thread allocates."""
    threads = []
    prepare = filters.prepare

    def noted(*arguments: object) -> filters.Spectrum:
        threads.append(threading.get_ident())
        return prepare(*arguments)

    monkeypatch.setattr(filters, "prepare", noted)
    monkeypatch.setattr(cuda, "_current_stream", lambda _: stream)
    forward(torch.randn(2, 8))
    forward(torch.randn(2, 8).requires_grad_())
    here = threading.get_ident()
    assert [x != here for x in threads] == [elsewhere, False]


def test_each_stream_has_its_own_spectra(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(2, 8)
    for stream in (77, 78, 77, 78):
        monkeypatch.setattr(cuda, "_current_stream", lambda _, stream=stream: stream)
        forward(k)
    assert prepared(fake) == 2


def test_captures_prepare_and_keep_nothing(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(2, 8)
    forward(k)
    monkeypatch.setattr(cuda, "_is_capturing", lambda: True)
    forward(k)
    forward(torch.randn(2, 8))
    assert prepared(fake) == 3
    assert len(cuda._spectra._entries) == 1


PLAN = plan.choose(64, 8, 0, True)
ENTRY = filters.spectrum_bytes(2, PLAN.points)


def test_filters_of_a_pass_do_not_push_each_other_out(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda._spectra, "max_bytes", 2 * ENTRY)
    layers = [torch.randn(2, 8) for _ in range(3)]
    for expected in (3, 1, 1, 1):
        for k in layers:
            forward(k)
        assert prepared(fake) == expected
    assert sum(x.spectrum.bytes for x in cuda._spectra._entries.values()) == 2 * ENTRY
    assert [cuda._spectra.keeps(k, None, None, PLAN) for k in layers] == [True, True, False]
    assert not cuda._spectra.keeps(layers[0], None, None, PLAN._replace(folded=True))


def test_what_has_not_been_used_for_long_gives_way(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda._spectra, "max_bytes", 2 * ENTRY)
    used, unused, new = (torch.randn(2, 8) for _ in range(3))
    forward(unused)
    # Two are asked for each time, as many as the bound has room for.
    for _ in range(filters._PATIENCE):
        forward(used)
        forward(new)
    assert prepared(fake) == 2 + filters._PATIENCE
    forward(used)
    assert cuda._spectra.keeps(new, None, None, PLAN)
    for expected in (1, 0):
        forward(new)
        forward(used)
        assert prepared(fake) == expected
    assert not cuda._spectra.keeps(unused, None, None, PLAN)


def test_the_bound_is_that_of_the_device(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total_memory=2 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    filters.cache_bytes.cache_clear()
    assert filters.cache_bytes(torch.device("cuda", 0)) == 256 << 20
    memory.total_memory = 80 << 30
    assert filters.cache_bytes(torch.device("cuda", 1)) == filters.cache_bytes(torch.device("cpu")) == 512 << 20
    filters.cache_bytes.cache_clear()
    k = torch.randn(2, 8)
    monkeypatch.setattr(cuda._spectra, "max_bytes", ENTRY - 1)
    assert not cuda._spectra.keeps(k, None, None, PLAN)
    forward(k)
    assert not cuda._spectra._entries
    monkeypatch.setattr(cuda._spectra, "max_bytes", ENTRY)
    assert cuda._spectra.keeps(k, None, None, PLAN)
    forward(k)
    assert len(cuda._spectra._entries) == 1
    cuda._spectra.clear()
    assert not cuda._spectra._entries


def test_workspace_of_large_spectra(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, room = plan.Plan(65536, True, 0, 8), []
    fake.fft_conv_filter_spectrum = lambda parameters, _: room.append(parameters._obj.work_channels) or 0
    for channels, workspace in ((50, 1), (50, 280), (50, 420), (5, 1)):
        monkeypatch.setattr(filters, "WORKSPACE_BYTES", workspace * chosen.fft_size)
        filters.prepare(torch.randn(channels, 9), None, None, 20, chosen, 0)
    assert room == [16, 32, 50, 5]


def test_passes_are_for_what_a_block_cannot_hold_and_for_taps_by_position(fake: FakeLibrary) -> None:
    passes: list[bool] = []
    fake.fft_conv_filter_spectrum = lambda parameters, _: passes.append(parameters._obj.work is not None) or 0
    by_channel, by_position = torch.randn(20, 9), torch.randn(9, 20).mT
    for largest in (16384, 8192):
        fake.fft_conv_largest_filter = lambda device, largest=largest: largest
        filters._largest_in_one_block.cache_clear()
        for size in (4096, 8192, 16384, 32768):
            for k in (by_channel, by_position):
                filters.prepare(k, None, None, 20, plan.Plan(size, True), 0)
    assert passes == 3 * [False] + [True, False] + 3 * [True] + 3 * [False] + 5 * [True]
