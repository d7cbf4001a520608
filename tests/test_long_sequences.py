"""Models that work on slices of a sequence: the same results, and memory that does not grow where it should not."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_factory import dna_ids, tiny_hyena, tiny_hyenadna, tiny_m2bert
from patching import assert_equal_models, relative, snapshot
from peft import LoraConfig, get_peft_model
from remote_style import BertConfig, BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, build
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.models import HyenaDNAConfig
from hf_flashfftconv.models import HyenaDNAForCausalLM as NativeHyenaDNA
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model
from hf_flashfftconv.sequences import disable_long_sequences, enable_long_sequences
from hf_flashfftconv.slices import copy_rows, over_channels, over_slices
from hf_flashfftconv.sparsity import sparsify_model

pytestmark = pytest.mark.no_cover

MODELS = {
    "hyenadna": tiny_hyenadna,
    "hyena": tiny_hyena,
    "m2bert": tiny_m2bert,
    "remote-hyenadna": lambda: build(HyenaDNAForCausalLM, HyenaConfig()),
    "remote-m2": lambda: build(BertForMaskedLM, BertConfig()),
}
Maker = Callable[[], nn.Module]
# Neither divides the length or the channels, and the slices are shorter than some of the tests' halos.
SIZES = {"positions": 13, "channels": 5}


def logits(model: nn.Module) -> torch.Tensor:
    return model(dna_ids()).logits


def loss(model: nn.Module) -> torch.Tensor:
    ids = dna_ids()
    labels = ids.masked_fill(torch.arange(ids.shape[1]) % 5 == 0, -100)
    return model(ids, labels=labels).loss


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_same_logits_and_gradients(make: Maker) -> None:
    original = make()
    model = enable_long_sequences(copy.deepcopy(original), **SIZES)
    assert_equal_models(model, original, logits)
    with torch.no_grad():
        assert relative(logits(model.eval()), logits(original.eval())) <= 1e-5


@pytest.mark.parametrize("positions", [1, 2, 59, 10_000])
def test_slices_of_any_size(positions: int) -> None:
    original = tiny_hyenadna().double()
    model = enable_long_sequences(copy.deepcopy(original), positions, channels=1)
    assert_equal_models(model, original, logits, tolerance=1e-12)


@pytest.mark.parametrize("make", [tiny_hyenadna, tiny_hyena])
def test_the_loss_makes_no_whole_logits(make: Maker) -> None:
    original, shapes = make().train(), []
    model = enable_long_sequences(copy.deepcopy(original), **SIZES)
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    assert_equal_models(model, original, loss)
    assert max(shapes) == SIZES["positions"]
    ids = dna_ids()
    assert model(ids, labels=ids).logits is None
    summed = model(ids, labels=ids, num_items_in_batch=2).loss
    assert relative(summed, original(ids, labels=ids, num_items_in_batch=2).loss) <= 1e-5


def test_with_gradient_checkpointing_and_autocast() -> None:
    original = tiny_hyenadna().train()
    model = enable_long_sequences(copy.deepcopy(original), **SIZES)
    model.gradient_checkpointing_enable()
    assert_equal_models(model, original, loss)
    exact = logits(original)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(logits(model), exact) <= 1.1 * relative(logits(original), exact)


def test_lora() -> None:
    config = LoraConfig(target_modules=["in_linear", "out_linear"], init_lora_weights=False)
    original = get_peft_model(tiny_m2bert(), config)
    model = enable_long_sequences(copy.deepcopy(original), **SIZES)
    assert patch_report(model).replaced == 2
    assert_equal_models(model, original, logits)


def test_sparse_filters_stay_sparse() -> None:
    original = sparsify_model(tiny_hyenadna(), 0.25)
    assert_equal_models(enable_long_sequences(copy.deepcopy(original), **SIZES), original, logits)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("positions", [13, 24, 40])
def test_cut_filters_stay_cut(make: Maker, positions: int) -> None:
    original = patch_model(make(), filter_length=24, taper=0.25)
    sliced = enable_long_sequences(copy.deepcopy(original), positions, channels=5)
    assert_equal_models(sliced, original, logits)
    later = patch_model(enable_long_sequences(make(), positions, channels=5), filter_length=24, taper=0.25)
    with torch.no_grad():
        assert relative(logits(later.eval()), logits(original.eval())) <= 1e-5


def test_cut_filters_on_sequences_longer_than_they_were() -> None:
    original, ids = patch_model(tiny_hyenadna(), filter_length=24), dna_ids(length=200)
    assert_equal_models(
        enable_long_sequences(copy.deepcopy(original), **SIZES), original, lambda model: model(ids).logits
    )


def test_a_cache_is_refused_and_generation_goes_without() -> None:
    model, ids = tiny_hyenadna(), dna_ids(1, 20)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    enable_long_sequences(model, **SIZES)
    with pytest.raises(RuntimeError, match="a model with a cache needs use_cache=False"):
        model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False), expected)


def test_undone_exactly() -> None:
    model = tiny_hyenadna()
    before = snapshot(model)
    patch_model(model, backend="torch")
    patched = snapshot(model)
    enable_long_sequences(model, **SIZES)
    enable_long_sequences(model, positions=3, channels=2)
    assert {module._flashfftconv.backend for module in model.modules() if hasattr(module, "_flashfftconv")} == {"torch"}
    with pytest.raises(PatchError, match=r"mixer works on slices .* call unshard_sequence and disable_long_sequences"):
        unpatch_model(model)
    assert disable_long_sequences(model) is model
    assert [row[:2] for row in snapshot(model)[0]] == [row[:2] for row in patched[0]]
    unpatch_model(model)
    assert snapshot(model) == before


def test_what_cannot_be_sliced_is_refused() -> None:
    model = tiny_hyenadna()
    before = snapshot(model)
    with pytest.raises(ValueError, match="positions must be at least 1, got 0"):
        enable_long_sequences(model, positions=0)
    with pytest.raises(ValueError, match="channels must be at least 1, got -1"):
        enable_long_sequences(model, channels=-1)
    with pytest.raises(PatchError, match="found no long convolution"):
        enable_long_sequences(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="str"):
        enable_long_sequences("model")
    handle = model.hyena.backbone.layers[1].mixer.filter_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(PatchError, match=r"1\.mixer cannot work on slices: hooks on filter_fn"):
        enable_long_sequences(model)
    handle.remove()
    assert snapshot(model) == before
    enable_long_sequences(model, **SIZES)
    model.hyena.backbone.layers[1].mixer.filter_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks on the filters"):
        logits(model)
    with pytest.raises(ValueError, match="sequence length 131 exceeds l_max=130"):
        enable_long_sequences(tiny_hyenadna())(torch.full((1, 131), 7))


def test_trainer(tmp_path: Path) -> None:
    losses = []
    for sliced in (False, True):
        torch.manual_seed(0)
        model = tiny_hyenadna()
        if sliced:
            enable_long_sequences(model, **SIZES)
        settings = TrainingArguments(
            tmp_path / str(sliced),
            max_steps=3,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_checkpointing=sliced,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
        )
        data = [{"input_ids": ids, "labels": ids} for ids in dna_ids().repeat(4, 1)]
        trainer = Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data[:2])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def peak_bytes(model: nn.Module, ids: torch.Tensor, train: bool) -> int:
    """The most memory that a pass holds at a time beside what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if train:
            model(ids, labels=ids).loss.backward()
        else:
            with torch.no_grad():
                model(ids, labels=ids)
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_units(layers: int, length: int, train: bool, slices: int) -> float:
    """The same in units of one float32 tensor `(length, channels)`."""
    model = patch_model(NativeHyenaDNA(HyenaDNAConfig(d_model=16, n_layer=layers, filter_order=32, max_seq_len=length)))
    model.train(train)
    if train:
        model.gradient_checkpointing_enable()
    if slices > 1:
        enable_long_sequences(model, positions=length // slices, channels=1)
    return peak_bytes(model, torch.randint(7, 11, (1, length)), train) / (4 * length * model.config.d_model)


def test_memory_of_inference() -> None:
    """Embedding, residual stream, norm, two gates, taps, output, and the slices and blocks in work; for any depth."""
    whole, sliced = (peak_units(2, 1 << 13, False, slices) for slices in (1, 16))
    assert 6 < sliced < 9 < 15 < whole
    assert peak_units(4, 1 << 13, False, 16) == pytest.approx(sliced, rel=0.05)
    assert peak_units(2, 1 << 12, False, 16) == pytest.approx(sliced, rel=0.15), "it grows with the length alone"


def test_memory_of_training() -> None:
    """With checkpointing a layer more keeps its input, one float32 tensor, and nothing else that grows."""
    whole, sliced, few = (peak_units(2, 1 << 12, True, slices) for slices in (1, 16, 4))
    assert sliced < 16 < 40 < whole
    # Each checkpoint also has 5 KB for the state of the random numbers, 0.02 of a unit.
    assert peak_units(4, 1 << 12, True, 4) - few == pytest.approx(2.5, abs=0.3)


@pytest.mark.parametrize("size", [None, 1, 2, 4, 9])
@pytest.mark.parametrize("known", [None, 0, 3])
def test_slices_see_what_is_before_them(size: int | None, known: int | None) -> None:
    """Sums over four positions, for each of which a slice must have got three more."""
    x, halo = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True), 3
    before = None if known is None else torch.randn(2, known, 4, dtype=torch.float64)

    def sums(part: Tensor, extra: int) -> tuple[Tensor]:
        padded = torch.nn.functional.pad(part, (0, 0, halo - extra, 0))
        return (padded.unfold(1, halo + 1, 1).sum(-1),)

    whole = x if before is None else torch.cat([before, x], 1)
    expected = torch.nn.functional.pad(whole, (0, 0, halo, 0)).unfold(1, halo + 1, 1).sum(-1)[:, whole.shape[1] - 9 :]
    (joined,) = over_slices(sums, x, size, before=before, halo=halo)
    torch.testing.assert_close(joined, expected)
    with torch.no_grad():
        torch.testing.assert_close(over_slices(sums, x, size, before=before, halo=halo)[0], expected)


def test_rows_are_copied_in_units_of_any_size() -> None:
    for dtype, columns, start in itertools.product((torch.bfloat16, torch.float32), (24, 23), (0, 8, 1)):
        x = torch.randn(4, 5, 32).to(dtype)[:, :, start : start + columns]
        to = torch.zeros(4, 3, 5, 32, dtype=dtype)
        copy_rows(to[:, 1, :, :columns], x)
        assert torch.equal(to[:, 1, :, :columns], x)
        assert to.count_nonzero() == x.count_nonzero()
        assert torch.equal(copy_rows(torch.empty(columns, 5, 4, dtype=dtype).permute(2, 1, 0), x), x)


def test_blocks_of_channels_are_joined_like_any() -> None:
    x = torch.randn(2, 9, 4, requires_grad=True)
    for size in (None, 1, 2, 4):
        assert torch.equal(over_channels(lambda a, b, c: a + b, size, x, x, None), 2 * x)
