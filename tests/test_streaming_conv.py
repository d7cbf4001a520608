"""StreamingConv: any way to cut a sequence into pieces gives the convolution of the whole."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import BOUNDS, error
from torch import Tensor

from hf_flashfftconv.functional import fft_conv
from hf_flashfftconv.ops.reference import fft_conv_float64
from hf_flashfftconv.streaming import StreamingConv


def signal(batch: int = 2, channels: int = 3, length: int = 100, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs, filters whose outputs are of order 1, and skip weights."""
    k = torch.randn(channels, length) / math.sqrt(length)
    return [torch.randn(batch, channels, length).to(dtype), k, torch.randn(channels)]


def appended(stream: StreamingConv, u: Tensor, pieces: list[int]) -> Tensor:
    return torch.cat([stream.append(piece) for piece in u.split(pieces, dim=-1)], dim=-1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.one_of(st.just(1), st.integers(1, 6), st.integers(1, 90)), min_size=1, max_size=40),
    block_size=st.sampled_from([1, 2, 3, 8, 128]),
    batch=st.integers(1, 3),
    room=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_pieces_make_the_whole(pieces: list[int], block_size: int, batch: int, room: int, seed: int) -> None:
    torch.manual_seed(seed)
    length = sum(pieces)
    u, k, skip = signal(batch, 2, length + room)
    u = u[..., :length]
    y = appended(StreamingConv(k, skip, block_size=block_size), u, pieces)
    expected = fft_conv_float64(u, k, skip=skip)
    assert y.dtype == u.dtype
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert error(y, expected) <= BOUNDS[torch.float32].whole


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), block_size=st.sampled_from([1, 4, 16]))
def test_truncated_selected_copied_and_extended_streams_go_on_exactly(data: st.DataObject, block_size: int) -> None:
    torch.manual_seed(0)
    u, k, skip = signal(3, 2, 120)
    stream, seen = StreamingConv(k[:, :30], skip, block_size=block_size), u[..., :0]
    for _ in range(data.draw(st.integers(1, 12))):
        change = data.draw(st.sampled_from(["none", "truncate", "select", "copy"]))
        if change == "truncate":
            stream.truncate(data.draw(st.integers(max(0, stream.length - 9), stream.length)))
            seen = seen[..., : stream.length]
        elif change == "select":
            rows = torch.tensor(data.draw(st.lists(st.integers(0, len(seen) - 1), min_size=1, max_size=4)))
            stream.select(rows)
            seen = seen[rows]
        elif change == "copy":
            stale, stream = stream, copy.deepcopy(stream)
            if stale.length < stale.max_length:
                stale.append(torch.full((len(seen), 2, 1), 1e6))
        piece = torch.randn(len(seen), 2, data.draw(st.integers(1, 20)))
        seen = torch.cat([seen, piece], dim=-1)
        if seen.shape[-1] > stream.max_length:
            k = k if k.shape[1] >= seen.shape[-1] else torch.cat([k, torch.randn(2, 250) / 10], dim=-1)
            stream.extend(k[:, : seen.shape[-1] + 7])
        y = stream.append(piece)
        expected = fft_conv_float64(seen, k, skip=skip)[..., -piece.shape[-1] :]
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_every_dtype_is_as_exact_as_the_whole_convolution(dtype: torch.dtype) -> None:
    u, k, skip = signal(2, 4, 700, dtype)
    if dtype == torch.float64:
        k, skip = k.double(), skip.double()
    y = appended(StreamingConv(k, skip, block_size=16), u, [300, *[1] * 250, 150])
    expected = fft_conv_float64(u, k, skip=skip)
    assert y.dtype == dtype
    assert error(y, expected) <= max(1.02 * error(fft_conv(u, k, skip=skip), expected), BOUNDS[dtype].whole / 10)


def points_transformed(monkeypatch: pytest.MonkeyPatch, length: int, prompt: int) -> tuple[int, int]:
    """Points of all forward transforms, and of the largest, that decoding up to `length` one by one takes."""
    points = []
    rfft = torch.fft.rfft
    with monkeypatch.context() as patch:
        patch.setattr(torch.fft, "rfft", lambda x, n, **options: points.append(n) or rfft(x, n=n, **options))
        appended(StreamingConv(torch.randn(1, length)), torch.randn(1, 1, length), [prompt, *[1] * (length - prompt)])
    return sum(points), max(points)


@pytest.mark.parametrize("prompt", [1, 3000])
def test_a_position_costs_little(monkeypatch: pytest.MonkeyPatch, prompt: int) -> None:
    length = 4096
    total, largest = points_transformed(monkeypatch, length, prompt)
    # A transform of each size up to twice the length for every part of that size, beside the prompt's own.
    assert total <= (length - prompt) * 2 * math.log2(length) + 8 * length
    assert largest <= 2 * length


def test_memory_is_bounded() -> None:
    u, k, _ = signal(4, 8, 2048, torch.bfloat16)
    stream = StreamingConv(k)
    for piece in u.split([700, *[1] * 1348], dim=-1):
        stream.append(piece)
        held = [x for x in vars(stream).values() if isinstance(x, Tensor)]
        state = sum(x.untyped_storage().nbytes() for x in held if x is not stream._k)
        assert state <= 4 * 8 * 2048 * (2 + 4)
        assert sum(x.untyped_storage().nbytes() for x in stream._spectra.values()) <= 8.5 * 8 * 2048


def test_taps_that_come_later_are_used() -> None:
    u, k, _ = signal(1, 2, 40)
    # The first transform of a block is made while the filter ends inside of it.
    stream = StreamingConv(k[:, :6], block_size=4)
    outputs = [appended(stream, u[..., :6], [1] * 6)]
    stream.extend(k)
    outputs.append(appended(stream, u[..., 6:], [1] * 34))
    assert error(torch.cat(outputs, dim=-1), fft_conv_float64(u, k)) <= BOUNDS[torch.float32].whole


def test_inference_mode_may_come_and_go_and_no_graph_is_held() -> None:
    u, k, _ = signal(1, 2, 60)
    k.requires_grad_()
    u.requires_grad_()
    stream, outputs = StreamingConv(k, block_size=4), []
    for start in range(0, 60, 5):
        with torch.inference_mode(start % 2 == 0):
            outputs.append(stream.append(u[..., start : start + 5]))
            stream.select(torch.tensor([0]))
    assert not any(y.requires_grad for y in outputs)
    torch.testing.assert_close(torch.cat(outputs, dim=-1), fft_conv(u, k).detach(), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_streams() -> None:
    _, k, skip = signal()
    assert appended(StreamingConv(k, skip, block_size=2), torch.zeros(0, 3, 20), [4] * 5).shape == (0, 3, 20)


def test_a_stream_that_was_emptied_takes_another_batch() -> None:
    u, k, skip = signal(3, 2, 40)
    stream = StreamingConv(k, skip, block_size=4)
    stream.append(torch.randn(1, 2, 30, dtype=torch.float64))
    stream.truncate(0)
    assert error(appended(stream, u, [20, 20]), fft_conv_float64(u, k, skip=skip)) <= BOUNDS[torch.float32].whole


def test_errors_leave_the_stream_as_it_was() -> None:
    u, k, skip = signal()
    for arguments, message in [
        ((k[0],), r"k must have shape .*\(100,\)"),
        ((k[:, :0],), r"\(3, 0\)"),
        ((k, skip[:2]), r"skip must have shape \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            StreamingConv(*arguments)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        StreamingConv(k, block_size=0)
    stream = StreamingConv(k, skip, block_size=8)
    stream.append(u[..., :50])
    for wrong, message in [
        (u[:, :2, :1], r"u must have shape \(batch, 3"),
        (u[..., :0], "positions >= 1"),
        (u[..., :51], "101 positions, more than its filters' 100 taps"),
        (u[:1, :, :1], "batch 2.* got batch 1"),
        (u[..., :1].double(), "float32.*got.*float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.append(wrong)
    with pytest.raises(ValueError, match="cannot truncate a stream of length 50 to 51"):
        stream.truncate(51)
    with pytest.raises(ValueError, match=r"k must have shape \(3, at least 100\), got \(3, 99\)"):
        stream.extend(k[:, :99])
    expected = fft_conv_float64(u, k, skip=skip)[..., 50:]
    assert error(appended(stream, u[..., 50:], [1] * 50), expected) <= BOUNDS[torch.float32].whole


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    u, k, skip = (x.cuda() for x in signal(2, 16, 1500, dtype))
    y = appended(StreamingConv(k, skip), u, [900, *[1] * 400, 200])
    expected = fft_conv_float64(u, k, skip=skip)
    assert error(y, expected) <= BOUNDS[dtype].whole
