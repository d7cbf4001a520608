"""patch_model, unpatch_model and patch_report on whole models: equality, restoration, bad input."""

import copy
import json
import pickle
from collections.abc import Callable

import pytest
import torch
from family_models import Family, families, logits, mixers
from model_factory import dna_ids, tiny_hyenadna, tiny_hyenadna_classifier
from patching import assert_equal_models, relative, snapshot
from remote_style import BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, HyenaOperator, build
from torch import nn

from hf_flashfftconv import patch as patching_module
from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import PatchReport, patch_model, patch_report, unpatch_model

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("transforms_pay")]


@families()
def test_patched_equals_unpatched_and_nothing_else_changes(family: Family) -> None:
    model = family.make()
    # Some code keeps things on the module in its first call.
    expected = logits(model)
    untouched, patched = copy.deepcopy(model), copy.deepcopy(model)
    classes = {type(module): dict(vars(type(module))) for module in model.modules()}
    before = snapshot(untouched)
    assert patch_model(patched) is patched
    assert patch_report(patched).replaced == 2
    assert list(patched.state_dict()) == list(model.state_dict())
    for length in (1, 2, 37, family.longest or 90):
        assert_equal_models(patched, model, lambda m, length=length: logits(m, length))
    # The other model runs its own code still, and no class that both share has changed.
    assert snapshot(untouched) == before and not mixers(untouched)
    assert torch.equal(logits(untouched), expected)
    assert {type(module): dict(vars(type(module))) for module in untouched.modules()} == classes


@families(lambda family: family.longest is not None)
def test_longer_than_the_filters_is_an_error(family: Family) -> None:
    model, length = family.make(), family.longest + 1
    if not isinstance(model, BertForMaskedLM):  # Whose original wraps around without a word.
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            logits(model, length)
    with pytest.raises(ValueError, match=rf"{length}.*{family.longest}"):
        logits(patch_model(model), length)
    assert logits(model, family.longest).isfinite().all()


@families()
def test_unpatch_restores_every_bit(family: Family) -> None:
    model = family.make()
    expected = logits(model)
    before = snapshot(model)
    patch_model(model)
    logits(model)
    with torch.no_grad():
        logits(model)
    assert unpatch_model(model) is model
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)


@families()
def test_copies_and_pickles(family: Family) -> None:
    model = family.make()
    expected = logits(model)
    patch_model(model, backend="torch", cache_bytes=1000)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        caches = {mixer._flashfftconv.cache for mixer in mixers(twin)}
        assert len(caches) == 1 and caches.pop().max_bytes == 1000
        assert patch_report(twin).rows == patch_report(model).rows
        assert relative(logits(twin), expected) <= 1e-5
        assert torch.equal(logits(unpatch_model(twin)), expected)
        assert patch_report(model).replaced == 2
    state, other = pickle.loads(pickle.dumps(model.state_dict())), family.make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(logits(other), expected)


def test_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hyenadna()
    patched = patch_model(copy.deepcopy(model))
    with torch.no_grad():
        patched.get_submodule(patch_report(patched).rows[0].name).filter_fn.bias.mul_(1.01)
    with pytest.raises(AssertionError):
        assert_equal_models(patched, model, logits)


def test_classifiers_are_patched_too() -> None:
    model = tiny_hyenadna_classifier()
    assert_equal_models(patch_model(copy.deepcopy(model)), model, logits)


def test_patching_again_only_changes_the_backend() -> None:
    model = patch_model(tiny_hyenadna())
    classes = [type(module) for module in model.modules()]
    mixer = next(module for module in model.modules() if isinstance(module, nn.Module) and hasattr(module, "l_max"))
    expected = model(dna_ids()).logits
    assert patch_model(model, backend="torch") is model
    assert [type(module) for module in model.modules()] == classes
    assert mixer._flashfftconv.backend == "torch"
    assert torch.equal(model(dna_ids()).logits, expected)


def test_unpatching_an_unpatched_model_changes_nothing() -> None:
    model = tiny_hyenadna()
    before = snapshot(model)
    assert unpatch_model(model) is model
    assert unpatch_model(unpatch_model(patch_model(model))) is model
    assert snapshot(model) == before


def test_rolls_back_when_a_module_resists(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(HyenaDNAForCausalLM, HyenaConfig(n_layer=3))
    before = snapshot(model)
    calls = []

    def failing(module: nn.Module, *args: object) -> None:
        calls.append(module)
        if len(calls) == 3:
            raise RuntimeError("planted")
        patch(module, *args)

    patch = patching_module.patch_module
    monkeypatch.setattr(patching_module, "patch_module", failing)
    with pytest.raises(RuntimeError, match="planted"):
        patch_model(model)
    assert len(calls) == 3
    assert snapshot(model) == before


@pytest.mark.parametrize("bad", [None, "model", torch.ones(2)])
@pytest.mark.parametrize("function", [patch_model, unpatch_model, patch_report])
def test_not_a_module(function: Callable, bad: object) -> None:
    with pytest.raises(TypeError, match=type(bad).__name__):
        function(bad)


def test_bad_options_leave_the_model_alone() -> None:
    model = tiny_hyenadna()
    before = snapshot(model)
    with pytest.raises(PatchError, match=r"'flash'.*'auto', 'torch', 'cuda'"):
        patch_model(model, backend="flash")
    with pytest.raises(PatchError, match="-1"):
        patch_model(model, cache_bytes=-1)
    assert snapshot(model) == before


def test_nothing_to_patch_names_what_was_seen_and_what_is_supported() -> None:
    class Attention(nn.Module):
        pass

    with pytest.raises(PatchError, match=r"HyenaOperator.*MonarchMixerSequenceMixing.*2 x Attention"):
        patch_model(nn.Sequential(Attention(), Attention()))
    with pytest.raises(PatchError, match="only modules of torch"):
        patch_model(nn.Linear(2, 2))


def test_backend_asked_for_by_name_must_serve() -> None:
    model = patch_model(tiny_hyenadna(), backend="cuda")
    with pytest.raises(RuntimeError, match="cuda"):
        model(dna_ids())


def test_report_before_after_and_between() -> None:
    model = tiny_hyenadna()
    names = [f"hyena.backbone.layers.{i}.mixer" for i in range(2)]
    assert [(row.name, row.status) for row in patch_report(model).rows] == [(name, "not patched") for name in names]
    patch_model(model)
    planned = patch_report(model).rows[0]
    assert (planned.status, planned.original_class, planned.family) == ("replaced", "HyenaOperator", "hyenadna")
    assert (planned.backend, planned.length, planned.dtype) == ("torch", 130, "float32")
    model(dna_ids(length=50))
    used = patch_report(model).rows[0]
    assert (used.length, used.fft_size) == (50, 100)
    assert patch_report(nn.Linear(2, 2)).rows == ()


def test_report_prints_as_text_html_and_json() -> None:
    mixers = nn.ModuleDict({"good": build(HyenaOperator, 8, 20), "bad": build(HyenaOperator, 8, 20, order=3)})
    report = patch_report(patch_model(mixers))
    assert isinstance(report, PatchReport) and report.replaced == 1
    lines = str(report).splitlines()
    assert lines[0].split() == list(report.to_dict()[0])
    assert "replaced" in lines[1] and "order 3: only order 2 is supported" in lines[2]
    assert lines[-1] == "1 of 2 long convolutions replaced"
    assert "<td>order 3: only order 2 is supported</td>" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
