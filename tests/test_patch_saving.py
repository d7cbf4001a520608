"""Saved and published patched models, with and without code of their own, and the repair of shared weights."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from fakehub import LoopbackHub
from family_models import Family, families, logits
from model_factory import dna_ids, tiny_hyenadna, tiny_m2bert
from patching import relative, snapshot
from remote_style import BertConfig, BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, build, write_repository
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_flashfftconv.adapters.repair import declare_shared_weights, undeclare_shared_weights
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model

REMOTE = {
    "hyenadna": (lambda: build(HyenaDNAForCausalLM, HyenaConfig()), AutoModelForCausalLM),
    "first": (lambda: build(HyenaDNAForCausalLM, HyenaConfig(first_revision=True)), AutoModelForCausalLM),
    "m2": (lambda: build(BertForMaskedLM, BertConfig()), AutoModelForMaskedLM),
}
every_remote = pytest.mark.parametrize(("make", "auto_class"), REMOTE.values(), ids=REMOTE)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        # transformers keeps a client, which may have taken another endpoint in an earlier test.
        client = huggingface_hub.HfApi(endpoint=hub.url)
        patch.setattr(transformers.utils.hub, "hf_api", lambda: client, raising=False)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield hub


@families()
def test_saved_and_pushed_models_load_without_the_patch(family: Family, hub: LoopbackHub, tmp_path: Path) -> None:
    expected, state = logits(family.make()), family.make().state_dict()
    model = patch_model(family.make())
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    model.push_to_hub("tester/model", token="hf_loopback")
    (tmp_path / "pushed").mkdir()
    for name, content in hub.repositories.pop("tester/model").files.items():
        (tmp_path / "pushed" / name).write_bytes(content)
    assert patch_report(model).replaced == 2
    for folder in ("saved", "pushed"):
        loaded, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert patch_report(loaded).replaced == 0 and loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        # A file is mapped at other alignments than fresh memory: the last bit of a product may differ.
        assert relative(logits(loaded.eval()), expected) <= 1e-5


@every_remote
def test_remote_code_is_patched_saved_and_loaded_unpatched(make: Callable, auto_class: type, tmp_path: Path) -> None:
    expected = make()(dna_ids()).logits
    model = auto_class.from_pretrained(write_repository(tmp_path / "repo", make()), trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert torch.equal(model(dna_ids()).logits, expected)
    patch_model(model)
    assert patch_report(model).replaced == 2
    assert relative(model(dna_ids()).logits, expected) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    reloaded, info = auto_class.from_pretrained(tmp_path / "saved", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert patch_report(reloaded).replaced == 0
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in make().state_dict().items())
    # A file is mapped at other alignments than fresh memory: the last bit of a product may differ.
    assert relative(reloaded(dna_ids()).logits, expected) <= 1e-5


@every_remote
def test_repair_is_needed_optional_and_undone(make: Callable, auto_class: type, tmp_path: Path) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises((RuntimeError, AttributeError)):
        patch_model(model, repair=False).save_pretrained(tmp_path / "unrepaired")
    assert "_flashfftconv_repair" not in vars(model)
    patch_model(model).save_pretrained(tmp_path / "repaired")
    unpatch_model(model)
    assert snapshot(model) == before
    with pytest.raises((RuntimeError, AttributeError)):
        model.save_pretrained(tmp_path / "unrepaired")


def test_one_module_is_written_once_and_one_parameter_of_two_modules_twice(tmp_path: Path) -> None:
    model = patch_model(build(BertForMaskedLM, BertConfig()))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"decoder.weight", "word_embeddings.weight"} <= names
    assert [name for name in names if name.startswith("attention.0.filter_fn.") and "freq" in name] == [
        "attention.0.filter_fn.implicit_filter.1.freq"
    ]
    state = model.state_dict(keep_vars=True)
    assert state["decoder.weight"] is state["word_embeddings.weight"]


def test_a_copy_of_a_repaired_model_is_repaired_and_restored(tmp_path: Path) -> None:
    model = build(BertForMaskedLM, BertConfig())
    before = snapshot(model)
    twin = copy.deepcopy(patch_model(model))
    unpatch_model(model)
    twin.save_pretrained(tmp_path)
    assert snapshot(unpatch_model(twin)) == snapshot(model) == before


def test_inner_models_can_be_saved_too(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(HyenaDNAForCausalLM, HyenaConfig())

    wrapper = patch_model(Wrapper())
    wrapper.inner.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_native_models_need_no_repair() -> None:
    for model in (tiny_hyenadna(), tiny_m2bert()):
        before = snapshot(model)
        declared = dict(model.all_tied_weights_keys)
        declare_shared_weights(model)
        if snapshot(model) == before:
            assert model.all_tied_weights_keys == declared
        undeclare_shared_weights(model)
        assert snapshot(model) == before
