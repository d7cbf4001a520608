"""Training: the Trainer with checkpoints and resume, mixed precision, adapters, and placement on devices."""

from pathlib import Path

import pytest
import torch
from model_factory import dna_ids, tiny_hyena, tiny_hyenadna, tiny_hyenadna_classifier, tiny_m2bert
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_flashfftconv.models import HyenaDNAForCausalLM

REPEAT = torch.tensor([7, 8, 8, 10, 9, 7, 10])


def dataset(size: int = 64, length: int = 28) -> list[dict[str, torch.Tensor]]:
    """A repeated motif at random phases: learnt within a few steps."""
    generator = torch.Generator().manual_seed(1)
    phases = torch.randint(0, len(REPEAT), (size,), generator=generator)
    rows = [REPEAT[(torch.arange(length) + phase) % len(REPEAT)] for phase in phases]
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **overrides) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **{
            "max_steps": 30,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 5,
            "save_strategy": "no",
            **overrides,
        },
    )


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_hyena, tiny_m2bert])
def test_thirty_steps_of_the_trainer_lower_the_loss(build, tmp_path: Path) -> None:
    trainer = Trainer(build(), arguments(tmp_path), train_dataset=dataset())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0], losses


def test_a_classifier_trains(tmp_path: Path) -> None:
    rows = [{"input_ids": dna_ids(1, 20, seed=i)[0], "labels": torch.tensor(i % 2)} for i in range(16)]
    for row in rows:
        row["input_ids"][::3] = 7 + row["labels"]
    trainer = Trainer(tiny_hyenadna_classifier(num_labels=2), arguments(tmp_path), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_hyena])
def test_resuming_from_a_checkpoint_continues_the_same_run(build, tmp_path: Path) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = Trainer(build(), arguments(tmp_path, **options), train_dataset=dataset())
    whole.train()
    rest = Trainer(build(), arguments(tmp_path, **options), train_dataset=dataset())
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), rest.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    loaded = type(whole.model).from_pretrained(tmp_path / "checkpoint-8")
    assert torch.equal(loaded(dna_ids()).logits, whole.model.eval()(dna_ids()).logits)


def test_gradient_checkpointing_and_bf16_in_the_trainer(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "bf16": True, "max_steps": 15, "gradient_accumulation_steps": 2}
    trainer = Trainer(tiny_hyenadna(), arguments(tmp_path, **options), train_dataset=dataset())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_m2bert])
def test_autocast_stays_close_to_float32(build) -> None:
    model, ids = build(), dna_ids()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    # Were the filter networks computed in bfloat16, the error of these models would be 17 % and 43 %.
    assert ((logits - model(ids).logits).norm() / model(ids).logits.norm()).item() < 0.03


def test_low_rank_adapters_train_load_and_merge(tmp_path: Path) -> None:
    tiny_hyenadna().save_pretrained(tmp_path / "base")
    model, ids = HyenaDNAForCausalLM.from_pretrained(tmp_path / "base"), dna_ids()
    expected = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["in_proj", "out_proj"], r=2, init_lora_weights=False))
    assert not torch.allclose(adapted(ids).logits, expected)
    adapted(ids, labels=ids).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained and all("lora" in name for name in trained)
    logits = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(HyenaDNAForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, logits, atol=1e-4)
    assert torch.allclose(adapted.merge_and_unload()(ids).logits, logits, atol=1e-4)


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_m2bert])
def test_device_maps_with_a_block_on_disk(build, tmp_path: Path) -> None:
    model, ids = build(), dna_ids()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path, device_map="cpu")(ids).logits, model(ids).logits)
    names = {type(module).__name__ for module in model.modules()}
    assert names >= set(model._no_split_modules)
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    others = [name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(tuple(blocks))]
    device_map = {name: "cpu" for name in blocks + others} | {blocks[-1]: "disk"}
    options = {"offload_folder": tmp_path / "offload", "offload_buffers": True}
    offloaded = type(model).from_pretrained(tmp_path, device_map=device_map, **options)
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"cpu", "meta"}
    assert torch.equal(offloaded(ids).logits, model(ids).logits)
