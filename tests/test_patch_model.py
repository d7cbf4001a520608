"""patch_model, unpatch_model and patch_report on whole models: equality, restoration, bad input."""

import copy
import json
import pickle
from collections.abc import Callable

import pytest
import torch
from model_factory import dna_ids, tiny_hyena, tiny_hyenadna, tiny_hyenadna_classifier, tiny_m2bert
from patching import assert_equal_models, relative, snapshot
from remote_style import BertConfig, BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, HyenaOperator, build
from torch import nn

from hf_flashfftconv import patch as patching_module
from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import PatchReport, patch_model, patch_report, unpatch_model

MODELS = {
    "hyenadna": tiny_hyenadna,
    "hyenadna-classifier": tiny_hyenadna_classifier,
    "hyena": tiny_hyena,
    "m2bert": tiny_m2bert,
    "remote-hyenadna": lambda: build(HyenaDNAForCausalLM, HyenaConfig()),
    "remote-m2": lambda: build(BertForMaskedLM, BertConfig()),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def logits(ids: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: model(ids).logits


@every_model
def test_patched_equals_unpatched(make: Callable[[], nn.Module]) -> None:
    model = make()
    untouched, patched = copy.deepcopy(model), copy.deepcopy(model)
    state = snapshot(untouched)
    assert patch_model(patched) is patched
    assert list(patched.state_dict()) == list(model.state_dict())
    for length in (1, 37, model.config.to_dict().get("max_seq_len", 66)):
        assert_equal_models(patched, model, logits(dna_ids(length=length)))
    assert snapshot(untouched) == state


@every_model
def test_unpatch_restores_every_bit(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = snapshot(model)
    expected = model(dna_ids()).logits
    patch_model(model)
    model(dna_ids())
    with torch.no_grad():
        model(dna_ids())
    assert unpatch_model(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(dna_ids()).logits, expected)


def test_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hyenadna()
    patched = patch_model(copy.deepcopy(model))
    with torch.no_grad():
        patched.get_submodule(patch_report(patched).rows[0].name).filter_fn.bias.mul_(1.01)
    with pytest.raises(AssertionError):
        assert_equal_models(patched, model, logits(dna_ids()))


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


def test_copies_and_pickles_are_patched_models_of_their_own() -> None:
    model = build(HyenaDNAForCausalLM, HyenaConfig())
    expected = model(dna_ids()).logits
    patch_model(model, backend="torch", cache_bytes=1000)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        caches = {module._flashfftconv.cache for module in twin.modules() if hasattr(module, "_flashfftconv")}
        assert len(caches) == 1 and caches.pop().max_bytes == 1000
        assert patch_report(twin).rows == patch_report(model).rows
        assert relative(twin(dna_ids()).logits, expected) <= 1e-5
        unpatch_model(twin)
        assert torch.equal(twin(dna_ids()).logits, expected)
        assert patch_report(model).replaced == 2


def test_state_dict_survives_a_pickle() -> None:
    model = tiny_m2bert()
    state = pickle.loads(pickle.dumps(patch_model(copy.deepcopy(model)).state_dict()))
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
