"""Patched models in Trainer: mixed precision, checkpointing of activations, resuming, loading without the patch."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from family_models import Family, families, logits
from model_factory import dna_ids
from patching import relative
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_flashfftconv.patch import patch_model, patch_report

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("transforms_pay", "_nothing_old_to_collect")]

# Of losses in 16 bits, each of which is off by its own rounding.
NOISE = 2e-2

# What losses in float16 are multiplied by. At the 65536 that PyTorch starts from, gradients of most of these models
# overflow and steps are skipped, where it is close those of one model and not of the other: their losses tell nothing.
LOSS_SCALE = 64


@pytest.fixture(scope="module")
def _nothing_old_to_collect() -> Iterator[None]:
    """Trainer collects garbage when it starts, which takes longer than these trainings where much is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = dna_ids(batch=1, length=24, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, folder: Path, **options: object) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    trainer = Trainer(model, TrainingArguments(**{**defaults, **options}), train_dataset=Samples())
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler(init_scale=LOSS_SCALE)
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@families()
def test_trainer_learns_the_same_and_resumes(family: Family, tmp_path: Path) -> None:
    reference = train(family.make(), tmp_path)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = train(patch_model(family.make()), tmp_path, **options)
    assert relative(losses(trainer), losses(reference)) <= 1e-4
    assert patch_report(trainer.model).replaced == 2
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = train(patch_model(family.make()), tmp_path, resume_from_checkpoint=checkpoint)
    for name, parameter in resumed.model.named_parameters():
        assert relative(parameter, trainer.model.get_parameter(name)) <= 1e-6, name
    model = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4").eval()
    assert patch_report(model).replaced == 0
    assert relative(logits(model), logits(trainer.model.eval())) <= 1e-5


@families()
def test_trainer_in_bfloat16_with_gradient_checkpointing(family: Family, tmp_path: Path) -> None:
    plain = losses(train(patch_model(family.make()), tmp_path, bf16=True))
    for reentrant in (False, True):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = train(patch_model(family.make()), tmp_path, bf16=True, **options)
        assert relative(losses(trainer), plain) <= 1e-6
    # By steps so small that roundings do not grow from one to the next, whatever the processor makes of bfloat16.
    small = {"bf16": True, "learning_rate": 1e-4}
    trainer, reference = (train(model, tmp_path, **small) for model in (patch_model(family.make()), family.make()))
    assert relative(losses(trainer), losses(reference)) <= NOISE


@families()
def test_scaled_losses_in_float16(family: Family) -> None:
    # What Trainer does with `fp16`, which needs a GPU; on a CPU it trains in float32 without a word.
    runs = []
    for model in (family.make(), patch_model(family.make())):
        optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
        for _ in range(3):
            with torch.autocast("cpu", torch.float16):
                loss = model(dna_ids(), labels=dna_ids()).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            runs.append(loss.item())
        assert scaler.get_scale() == LOSS_SCALE  # No gradient has overflowed.
    unpatched, patched = torch.tensor(runs).chunk(2)
    assert (unpatched.diff() != 0).all()
    assert relative(patched, unpatched) <= NOISE


@pytest.mark.gpu
@families()
def test_trainer_in_float16_on_a_gpu(family: Family, tmp_path: Path) -> None:
    runs = []
    for model in (family.make(), patch_model(family.make())):
        for module in model.modules():
            if hasattr(module, "phi"):  # The table of spectral units, which is no buffer.
                module.phi = module.phi.cuda()
        trainer = train(model, tmp_path, fp16=True, use_cpu=False)
        assert next(model.parameters()).is_cuda
        assert trainer.accelerator.scaler.get_scale() == LOSS_SCALE  # No gradient has overflowed.
        runs.append(losses(trainer))
    assert runs[0].isfinite().all()
    assert relative(runs[1], runs[0]) <= NOISE
