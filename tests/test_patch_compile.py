"""Patched models under torch.compile."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from family_models import family_model
from model_factory import dna_ids, tiny_hyenadna, tiny_m2bert
from patching import assert_equal_models, relative
from remote_style import BertConfig, BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, build
from torch import nn

from hf_flashfftconv.adapters.swap import is_patched
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model

MODELS = {
    "hyenadna": lambda: tiny_hyenadna(n_layer=1),
    "m2bert": lambda: tiny_m2bert(num_hidden_layers=1),
    "remote-hyenadna": lambda: build(HyenaDNAForCausalLM, HyenaConfig(n_layer=1)),
    "remote-m2": lambda: build(BertForMaskedLM, BertConfig()),
    **{
        name: lambda name=name: family_model(name, n_layer=1)
        for name in ("stripedhyena", "evo2-hcl", "evo2-hcm", "fla", "s4d", "stu")
    },
}


def logits(model: nn.Module) -> torch.Tensor:
    return model(dna_ids()).logits


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_compiles_as_one_graph(make: Callable[[], nn.Module]) -> None:
    model = make()
    patched = patch_model(copy.deepcopy(model))
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    assert_equal_models(patched, model, lambda m: logits(compiled if m is patched else m))
    assert all(row.reason == "" for row in patch_report(compiled).rows)
    assert [row.name for row in patch_report(compiled).rows] == [row.name for row in patch_report(model).rows]


def test_lengths_modes_and_unpatching_in_compiled_code() -> None:
    model = MODELS["remote-hyenadna"]()
    compiled = torch.compile(patch_model(copy.deepcopy(model)), fullgraph=True, backend="eager")
    for length, training in ((40, True), (40, False), (41, False), (66, False)):
        compiled.train(training)
        ids = dna_ids(length=length)
        assert relative(compiled(ids).logits, model(ids).logits) <= 1e-5
        with torch.no_grad():
            assert relative(compiled(ids).logits, model(ids).logits) <= 1e-5
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sequence length 67 exceeds l_max=66"):
        compiled(dna_ids(length=67))
    unpatch_model(compiled)
    assert torch.equal(logits(compiled), logits(model))


def test_patching_a_compiled_model() -> None:
    model = MODELS["remote-hyenadna"]()
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits(compiled)
        assert patch_model(compiled) is compiled
        assert relative(logits(compiled), expected) <= 1e-5
    assert any(map(is_patched, model.modules()))


def test_mixer_compiled_in_place() -> None:
    model = patch_model(MODELS["remote-hyenadna"]())
    expected = logits(model)
    next(filter(is_patched, model.modules())).compile(fullgraph=True, backend="eager")
    assert relative(logits(model), expected) <= 1e-5
