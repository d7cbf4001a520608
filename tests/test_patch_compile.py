"""Patched models under torch.compile."""

import copy
from collections.abc import Iterator

import pytest
import torch
from family_models import FAMILIES, Family, families, logits
from model_factory import dna_ids
from patching import assert_equal_models, relative

from hf_flashfftconv.adapters.swap import is_patched
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("transforms_pay")]


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@families()
def test_compiles_as_one_graph(family: Family) -> None:
    model = family.make(n_layer=1)
    patched = patch_model(copy.deepcopy(model))
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    assert_equal_models(patched, model, lambda m: logits(compiled if m is patched else m))
    assert all(row.reason == "" for row in patch_report(compiled).rows)
    assert [row.name for row in patch_report(compiled).rows] == [row.name for row in patch_report(model).rows]


def test_lengths_modes_and_unpatching_in_compiled_code() -> None:
    model = FAMILIES["hyenadna"].make(n_layer=1)
    compiled = torch.compile(patch_model(copy.deepcopy(model)), fullgraph=True, backend="eager")
    for length, training in ((40, True), (41, False), (66, False)):
        compiled.train(training)
        with torch.set_grad_enabled(training):
            assert relative(logits(compiled, length), logits(model, length)) <= 1e-5
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sequence length 67 exceeds l_max=66"):
        compiled(dna_ids(length=67))
    unpatch_model(compiled)
    assert torch.equal(logits(compiled), logits(model))


def test_patching_a_compiled_model() -> None:
    model = FAMILIES["hyenadna"].make(n_layer=1)
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits(compiled)
        assert patch_model(compiled) is compiled
        assert relative(logits(compiled), expected) <= 1e-5
    assert any(map(is_patched, model.modules()))


def test_mixer_compiled_in_place() -> None:
    model = patch_model(FAMILIES["hyenadna"].make(n_layer=1))
    expected = logits(model)
    next(filter(is_patched, model.modules())).compile(fullgraph=True, backend="eager")
    assert relative(logits(model), expected) <= 1e-5
