"""patch_model(filter_length=...): filters cut to their first taps, and sequences longer than those of the training."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factory import dna_ids, tiny_hyena, tiny_hyenadna, tiny_hyenadna_classifier, tiny_m2bert
from patching import assert_equal_models, relative, snapshot
from remote_style import (
    BertConfig,
    BertForMaskedLM,
    HyenaConfig,
    HyenaDNAForCausalLM,
    HyenaOperator,
    MonarchMixerSequenceMixing,
    Safari,
    build,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_flashfftconv import patch_model, patch_report, sparsify_model, unpatch_model
from hf_flashfftconv.errors import PatchError, SparsityError
from hf_flashfftconv.models import HyenaDNAConfig, M2BertConfig
from hf_flashfftconv.ops.truncation import Truncation

MODELS = {
    "hyenadna": tiny_hyenadna,
    "hyenadna-classifier": tiny_hyenadna_classifier,
    "hyena": tiny_hyena,
    "m2bert": tiny_m2bert,
    "remote-hyenadna": lambda: build(HyenaDNAForCausalLM, HyenaConfig()),
    "remote-m2": lambda: build(BertForMaskedLM, BertConfig()),
}
NATIVE = {name: MODELS[name] for name in ("hyenadna", "hyenadna-classifier", "hyena")}
MIXERS = {
    "hyenadna": lambda: build(HyenaOperator, 8, 66),
    "safari": lambda: build(Safari.HyenaOperator, 8, 66),
    "m2": lambda: build(MonarchMixerSequenceMixing, 8, 66, bidirectional=True, residual_long_conv=True),
    "m2-causal": lambda: build(MonarchMixerSequenceMixing, 8, 66, bidirectional=False),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def logits(ids: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(ids).logits


def filters_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "implicit_filter")]


def with_zeroed_taps(model: nn.Module, truncation: Truncation) -> nn.Module:
    """A copy whose filter modules return taps of which all but the kept ones are zero."""
    model = copy.deepcopy(model)

    def zeroed(generate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def taps(length: int, *args: Any, **kwargs: Any) -> Tensor:
            kept = truncation.apply(generate(length, *args, **kwargs))
            return nn.functional.pad(kept, (0, 0, 0, length - kept.shape[1]))

        return taps

    for filter_fn in filters_of(model):
        for method in ("filter", "filter_rev"):
            if hasattr(filter_fn, method):
                setattr(filter_fn, method, zeroed(getattr(filter_fn, method)))
    return model


def test_what_a_truncation_keeps() -> None:
    taps = torch.ones(1, 10, 2, dtype=torch.float64)
    assert torch.equal(Truncation(4).apply(taps), taps[:, :4])
    assert torch.equal(Truncation(12).apply(taps), taps)
    window = Truncation(8, 0.5).apply(taps)[0, :, 0]
    # Four taps on the way from one to zero, which the first tap that is cut would have.
    expected = [1, 1, 1, 1, *(0.5 + 0.5 * torch.cos(torch.pi * torch.arange(1, 5) / 5)).tolist()]
    assert torch.allclose(window, torch.tensor(expected).double(), atol=1e-7)
    # Of shorter filters, generated for a shorter sequence, the same taps have the same weights.
    assert torch.equal(Truncation(8, 0.5).apply(taps[:, :6])[0, :, 0], window[:6])


@every_model
@pytest.mark.parametrize("taper", [0.0, 0.3])
def test_equals_filters_with_zeroed_taps(make: Callable[[], nn.Module], taper: float) -> None:
    model = make()
    expected = with_zeroed_taps(model, Truncation(20, taper))
    patched = patch_model(copy.deepcopy(model), filter_length=20, taper=taper)
    for length in (11, 60):
        assert_equal_models(patched, expected, logits(dna_ids(length=length)))
    ids = dna_ids(length=60)
    with torch.no_grad():
        kept, again = patched(ids).logits, patched(ids).logits
    assert torch.equal(kept, again) and relative(kept, expected(ids).logits) <= 1e-5
    assert relative(patch_model(copy.deepcopy(model))(ids).logits, kept) > 1e-3


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("length", [100, 2500])
def test_sequences_longer_than_the_filters(make: Callable[[], nn.Module], length: int) -> None:
    mixer = make()
    u = torch.randn(1, length, 8)
    y = patch_model(copy.deepcopy(mixer), filter_length=10)(u)
    y = y[0] if isinstance(y, tuple) else y
    # No output reaches further than 10 + 2 positions: pieces of the training's length give them one after another.
    ahead = 10 if getattr(mixer, "bidirectional", False) else 0
    pieces = with_zeroed_taps(mixer, Truncation(10))
    checked = 0
    for start in range(0, length, 66 - 12 - ahead):
        first = max(0, start - 12)
        part = pieces(u[:, first : first + 66])
        part = (part[0] if isinstance(part, tuple) else part)[:, start - first :]
        own = part[:, : part.shape[1] - ahead if first + 66 < length else None]
        assert relative(y[:, start : start + own.shape[1]], own) <= 1e-5, start
        checked = max(checked, start + own.shape[1])
    assert checked == length


@pytest.mark.parametrize("make", NATIVE.values(), ids=NATIVE)
def test_native_models_keep_it_in_their_configuration(make: Callable[[], Any], tmp_path: Path) -> None:
    model = patch_model(make(), filter_length=24, taper=0.25)
    ids = dna_ids(length=300)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert (loaded.config.filter_length, loaded.config.filter_taper) == (24, 0.25)
    assert relative(loaded(ids).logits, expected) <= 1e-5
    assert patch_report(patch_model(loaded)).rows[0].filter_length == 24
    assert relative(loaded(ids).logits, expected) <= 1e-5
    # Unpatching gives back the model as it was loaded, a longer filter given in between included.
    patch_model(loaded, filter_length=50)
    assert loaded.config.filter_length == 50 and relative(loaded(ids).logits, expected) > 1e-4
    unpatch_model(loaded)
    assert (loaded.config.filter_length, loaded.config.filter_taper) == (24, 0.25)
    assert relative(loaded(ids).logits, expected) <= 1e-5


def test_auto_classes_load_it(tmp_path: Path) -> None:
    model = patch_model(tiny_hyenadna(), filter_length=24)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = dna_ids(length=150)
    assert relative(loaded(ids).logits, model(ids).logits) <= 1e-5


@every_model
def test_unpatching_restores_the_whole_filters(make: Callable[[], Any]) -> None:
    model = make()
    before, config, expected = snapshot(model), model.config.to_dict(), model(dna_ids()).logits
    patch_model(model, filter_length=7)
    twin = copy.deepcopy(model)
    for patched in (model, twin):
        assert snapshot(unpatch_model(patched)) == before and patched.config.to_dict() == config
        assert torch.equal(patched(dna_ids()).logits, expected)


@every_model
def test_patching_again_sets_it_anew(make: Callable[[], Any]) -> None:
    model = make()
    ids = dna_ids()
    with torch.no_grad():
        whole = patch_model(model)(ids).logits
        short = patch_model(model, filter_length=5)(ids).logits
        assert relative(short, whole) > 1e-3
        assert torch.equal(patch_model(model)(ids).logits, whole)


def test_filters_are_kept_once_for_all_longer_sequences() -> None:
    model = patch_model(build(HyenaDNAForCausalLM, HyenaConfig()), filter_length=20)
    with torch.no_grad():
        for length in (20, 40, 66, 100):
            model(dna_ids(length=length))
    cache = next(m._flashfftconv.cache for m in model.modules() if hasattr(m, "_flashfftconv"))
    assert [len(entries) for entries in cache._entries.values()] == [1, 1]


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("taper", [0.0, 0.5])
def test_the_report_tells_the_energy_that_is_cut(make: Callable[[], Any], taper: float) -> None:
    mixer = make()
    bidirectional = getattr(mixer, "bidirectional", False)
    shares = []
    with torch.no_grad():
        for filter_fn in filters_of(mixer):
            for method in ("filter", "filter_rev") if bidirectional else ("filter",):
                taps = getattr(filter_fn, method)(66)[0].double()
                kept = torch.zeros_like(taps)
                kept[:16] = Truncation(16, taper).apply(taps)
                shares.append((taps - kept).square().sum(0) / taps.square().sum(0))
    [row] = patch_report(patch_model(mixer, filter_length=16, taper=taper)).rows
    assert row.filter_length == 16
    assert row.energy_cut == pytest.approx(torch.cat(shares).mean().item(), rel=1e-4)
    assert row.energy_cut_worst == pytest.approx(torch.cat(shares).max().item(), rel=1e-4)
    [row] = patch_report(patch_model(mixer)).rows
    assert row.filter_length is row.energy_cut is row.energy_cut_worst is None


def test_the_report_names_the_short_transform() -> None:
    model = patch_model(tiny_hyenadna(), filter_length=100)
    with torch.no_grad():
        model(dna_ids(length=5000))
    row = patch_report(model).rows[0]
    assert (row.backend, row.length, row.fft_size) == ("torch", 5000, 1024)
    with torch.device("meta"):
        absent = patch_model(build(HyenaDNAForCausalLM, HyenaConfig()), filter_length=9)
    row = patch_report(absent).rows[0]
    assert row.filter_length == 9 and row.energy_cut is None


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"filter_length": 0}, "from 1 on, got 0"),
        ({"filter_length": -3}, "from 1 on, got -3"),
        ({"filter_length": 2.5}, r"from 1 on, got 2\.5"),
        ({"filter_length": True}, "from 1 on, got True"),
        ({"filter_length": 131}, r"layers\.0\.mixer: filter_length=131 exceeds l_max=130"),
        ({"taper": 0.5}, r"taper=0\.5 needs a filter_length"),
        ({"filter_length": 5, "taper": 1.5}, r"from 0 to 1, got 1\.5"),
        ({"filter_length": 5, "taper": float("nan")}, "from 0 to 1, got nan"),
    ],
)
def test_bad_values_change_nothing(options: dict[str, Any], reason: str) -> None:
    model = tiny_hyenadna()
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(PatchError, match=reason):
        patch_model(model, **options)
    assert snapshot(model) == before and model.config.to_dict() == config
    assert patch_report(patch_model(model, filter_length=130)).rows[0].energy_cut == 0


@pytest.mark.parametrize("config_class, longest", [(HyenaDNAConfig, "max_seq_len"), (M2BertConfig, "long_conv_l_max")])
def test_bad_configurations(config_class: Any, longest: str) -> None:
    with pytest.raises(ValueError, match="filter_length=51 exceeds 50"):
        config_class(filter_length=51, **{longest: 50})
    with pytest.raises(ValueError, match="from 1 on, got 0"):
        config_class(filter_length=0)
    with pytest.raises(ValueError, match=r"filter_taper=0\.1 needs a filter_length"):
        config_class(filter_taper=0.1)
    assert config_class().truncation is None


def test_sparse_filters_of_native_models_are_refused_both_ways() -> None:
    model = sparsify_model(tiny_hyenadna(), 0.5)
    with pytest.raises(PatchError, match="are sparse, and filter_length needs dense ones"):
        patch_model(model, filter_length=10)
    with pytest.raises(SparsityError, match="cut to filter_length=10"):
        sparsify_model(patch_model(tiny_hyenadna(), filter_length=10), 0.5)


def test_sparse_filters_of_remote_code_are_cut_after_their_mask() -> None:
    model = sparsify_model(build(HyenaDNAForCausalLM, HyenaConfig()), 0.5)
    expected = with_zeroed_taps(model, Truncation(20))
    ids = dna_ids(length=50)
    assert relative(patch_model(model, filter_length=20)(ids).logits, expected(ids).logits) <= 1e-5


def test_calls_of_the_original_code_are_refused() -> None:
    mixer = patch_model(build(HyenaOperator, 8, 66), filter_length=10)
    handle = mixer.filter_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(PatchError, match="would run the original code with whole filters"):
        mixer(torch.randn(1, 20, 8))
    handle.remove()
    mixer(torch.randn(1, 20, 8))
    # The code of a native model cuts its filters itself.
    model = patch_model(tiny_hyenadna(), filter_length=10)
    expected = model(dna_ids(length=200)).logits
    filters_of(model)[0].register_forward_hook(lambda *_: None)
    assert relative(model(dna_ids(length=200)).logits, expected) <= 1e-5
