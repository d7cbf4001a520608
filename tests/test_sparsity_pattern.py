"""Frequency masks: validation, storage, and the choice of bins by energy."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flashfftconv.errors import SparsityError
from hf_flashfftconv.sparsity.pattern import MAX_RANGES, FrequencyMask, select_masks


def bins_of(mask: FrequencyMask) -> list[int]:
    return mask.as_tensor().nonzero().flatten().tolist()


def falling(bins: int, rate: float = 0.1) -> torch.Tensor:
    return torch.exp(-rate * torch.arange(bins, dtype=torch.float64))


@given(st.integers(1, 200).flatmap(lambda half: st.tuples(st.just(half), st.sets(st.integers(0, half), min_size=1))))
def test_any_set_of_bins_survives_ranges_tensor_and_json(case: tuple[int, set[int]]) -> None:
    half, bins = case
    mask = FrequencyMask.from_ranges(2 * half, [(f, f + 1) for f in bins])
    assert bins_of(mask) == sorted(bins)
    assert mask.kept == len(bins)
    assert mask.density == len(bins) / (half + 1)
    assert all(stop < start for (_, stop), (start, _) in zip(mask.ranges, mask.ranges[1:], strict=False))
    assert FrequencyMask.from_dict(json.loads(json.dumps(mask.to_dict()))) == mask
    assert len({mask, FrequencyMask.from_dict(mask.to_dict())}) == 1


def test_ranges_are_merged() -> None:
    assert FrequencyMask.from_ranges(64, [(20, 30), (0, 5), (5, 7), (25, 33)]).ranges == ((0, 7), (20, 33))


def test_low_pass() -> None:
    assert FrequencyMask.low_pass(64, 5).ranges == ((0, 5),)
    assert FrequencyMask.low_pass(64, 0.5).kept == 17
    assert FrequencyMask.low_pass(198, 0.3).kept == 30
    assert FrequencyMask.low_pass(64, 1.0).kept == 33


def test_comb_is_symmetric() -> None:
    assert bins_of(FrequencyMask.comb(32, 8)) == [0, 8, 16]
    mask = FrequencyMask.comb(32, 8, residues=(1,))
    kept = {f % 8 for f in bins_of(mask)}
    assert kept == {1, 7}
    with pytest.raises(SparsityError, match="divide fft_size 32, got 5"):
        FrequencyMask.comb(32, 5)


@pytest.mark.parametrize(
    ("fft_size", "ranges", "message"),
    [
        (0, ((0, 1),), "got 0"),
        (33, ((0, 1),), "got 33"),
        (32.0, ((0, 1),), "got 32.0"),
        (True, ((0, 1),), "got True"),
        (32, (), "at least one bin"),
        (32, ((0, 18),), "outside bins 0 .. 16"),
        (32, ((-1, 4),), "outside"),
        (32, ((4, 4),), "empty"),
        (32, ((8, 10), (2, 4)), "out of order"),
        (32, ((2, 4), (4, 6)), "out of order"),
        (32, ((0, 2.5),), "pair"),
        (32, ((0, True),), "pair"),
        (32, ((0, 1, 2),), "pair"),
        (4 * MAX_RANGES, tuple((2 * i, 2 * i + 1) for i in range(MAX_RANGES + 1)), f"at most {MAX_RANGES}"),
    ],
)
def test_impossible_masks_are_refused(fft_size: int, ranges: tuple, message: str) -> None:
    with pytest.raises(SparsityError, match=message):
        FrequencyMask(fft_size, ranges)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"fft_size": 32},
        {"fft_size": 32, "ranges": [[0, 4]], "code": "x"},
        {"fft_size": 32, "ranges": {}},
        {"fft_size": 32, "ranges": "0-4"},
        {"fft_size": 32, "ranges": [4]},
        {"fft_size": 32, "ranges": [[0, [1]]]},
        {"fft_size": "32", "ranges": [[0, 4]]},
        {"fft_size": 32, "ranges": []},
    ],
)
def test_foreign_entries_are_refused(entry: object) -> None:
    with pytest.raises(SparsityError):
        FrequencyMask.from_dict(entry)


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("block", [1, 7, None])
def test_fraction_of_bins_is_honoured_to_a_block(keep: float, block: int | None) -> None:
    energy = falling(513)[torch.randperm(513)]
    mask = FrequencyMask.from_energy(energy, keep, block=block)
    width = block or 1024 // 256
    assert keep * 513 <= mask.kept < keep * 513 + width
    if block == 1:
        dropped = energy[~mask.as_tensor()]
        assert not len(dropped) or energy[mask.as_tensor()].min() >= dropped.max()


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_fraction_of_energy_is_reached_with_the_fewest_blocks(keep: float) -> None:
    energy = falling(513)[torch.randperm(513)]
    kept = FrequencyMask.from_energy(energy, keep, by="energy", block=1).as_tensor()
    share = energy[kept].sum() / energy.sum()
    assert share >= keep * (1 - 1e-9)
    assert share - energy[kept].min() / energy.sum() < keep


def test_count_of_blocks_is_exact() -> None:
    energy = falling(513)
    for count in (1, 3, 129):
        assert FrequencyMask.from_energy(energy, count, block=4).kept == min(4 * count, 513)
    with pytest.raises(SparsityError, match="from 1 to 129, got 130"):
        FrequencyMask.from_energy(energy, 130, block=4)


def test_one_budget_goes_where_the_energy_is() -> None:
    narrow, wide = falling(257, rate=1.0), falling(257, rate=0.02)
    masks = select_masks({"narrow": narrow / narrow.sum(), "wide": wide / wide.sum()}, 0.25, block=1)
    assert masks["narrow"].kept < masks["wide"].kept / 4
    kept = masks["narrow"].kept + masks["wide"].kept
    assert kept == -(-514 // 4)
    energies = select_masks({"narrow": narrow, "wide": wide}, 0.9, by="energy", block=1)
    assert energies["narrow"].kept < energies["wide"].kept / 4


def test_every_filter_keeps_a_block_of_a_small_budget() -> None:
    energies = {"loud": 1e6 * falling(257, rate=0.001), "faint": 1e-6 * falling(257)}
    masks = select_masks(energies, 0.01, block=1)
    assert masks["faint"].ranges == ((0, 1),)
    assert masks["loud"].kept == 5


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, float("nan"), "0.5", None, True, [0.5]])
@pytest.mark.parametrize("by", ["bins", "energy"])
def test_impossible_amounts_are_refused(keep: object, by: str) -> None:
    with pytest.raises(SparsityError, match="keep"):
        FrequencyMask.from_energy(falling(33), keep, by=by)


def test_unusable_energies_are_refused() -> None:
    with pytest.raises(SparsityError, match="NaN"):
        select_masks({"layers.3": torch.full((9,), torch.nan)}, 0.5)
    with pytest.raises(SparsityError, match=r"layers\.3: the filter is zero"):
        select_masks({"layers.3": torch.zeros(9)}, 0.5, by="energy")
    with pytest.raises(SparsityError, match="shape"):
        select_masks({"layers.3": torch.ones(3, 3)}, 0.5)
    with pytest.raises(SparsityError, match="'loudness'"):
        select_masks({"layers.3": torch.ones(9)}, 0.5, by="loudness")
    for block in (0, 10, 2.0):
        with pytest.raises(SparsityError, match="block"):
            select_masks({"layers.3": torch.ones(9)}, 0.5, block=block)
