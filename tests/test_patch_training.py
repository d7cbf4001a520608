"""Trainer runs, checkpoints and shared weights of patched models."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import MixerConfig, MixerForCausalLM, family_model
from model_factory import dna_ids, tiny_hyenadna, tiny_m2bert
from patching import relative, snapshot
from remote_style import BertConfig, BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, build, write_repository
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments

from hf_flashfftconv.adapters.repair import declare_shared_weights, undeclare_shared_weights
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model

REMOTE = {
    "hyenadna": (lambda: build(HyenaDNAForCausalLM, HyenaConfig()), AutoModelForCausalLM),
    "m2": (lambda: build(BertForMaskedLM, BertConfig()), AutoModelForMaskedLM),
}
every_remote = pytest.mark.parametrize(("make", "auto_class"), REMOTE.values(), ids=REMOTE)


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


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
    assert relative(reloaded(dna_ids()).logits, expected) <= 1e-6


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


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = dna_ids(batch=1, length=48, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, folder: Path, **options: object) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    trainer = Trainer(model, TrainingArguments(**{**defaults, **options}), train_dataset=Samples())
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize(
    "make",
    [tiny_hyenadna, REMOTE["hyenadna"][0], lambda: family_model("stripedhyena")],
    ids=["native", "remote", "stripedhyena"],
)
def test_trainer_learns_the_same_and_resumes(make: Callable, tmp_path: Path) -> None:
    reference = train(make(), tmp_path / "reference", save_strategy="no")
    trainer = train(patch_model(make()), tmp_path / "patched")
    assert relative(losses(trainer), losses(reference)) <= 1e-4
    assert patch_report(trainer.model).replaced == 2
    checkpoint = str(tmp_path / "patched" / "checkpoint-2")
    resumed = train(patch_model(make()), tmp_path / "patched", resume_from_checkpoint=checkpoint)
    for name, parameter in resumed.model.named_parameters():
        assert relative(parameter, trainer.model.get_parameter(name)) <= 1e-6, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [tiny_hyenadna, lambda: family_model("evo2-hcl")], ids=["native", "evo2"])
def test_trainer_in_bfloat16_with_gradient_checkpointing(make: Callable, reentrant: bool, tmp_path: Path) -> None:
    options = {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "save_strategy": "no",
    }
    reference = train(make(), tmp_path, bf16=True, save_strategy="no")
    trainer = train(patch_model(make()), tmp_path, **options)
    assert relative(losses(trainer), losses(reference)) <= 1e-2


@pytest.mark.parametrize(
    ("make", "model_class", "config"),
    [
        (REMOTE["hyenadna"][0], HyenaDNAForCausalLM, HyenaConfig()),
        *(
            (lambda name=name: family_model(name), MixerForCausalLM, MixerConfig(name))
            for name in ("stripedhyena", "evo2-hcm", "fla", "s4d", "h3")
        ),
    ],
    ids=["hyenadna", "stripedhyena", "evo2", "fla", "s4d", "h3"],
)
def test_trainer_checkpoint_loads_into_an_unpatched_model(
    make: Callable, model_class: type, config: object, tmp_path: Path
) -> None:
    trainer = train(patch_model(make()), tmp_path, save_steps=4)
    model = model_class.from_pretrained(tmp_path / "checkpoint-4", config=config).eval()
    trainer.model.eval()
    assert relative(model(dna_ids()).logits, trainer.model(dna_ids()).logits) <= 1e-5
