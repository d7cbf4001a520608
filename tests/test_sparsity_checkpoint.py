"""Sparse checkpoints through transformers: saving, loading, training, and files that must be refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factory import dna_ids, remote_hyenadna_repo, tiny_hyena, tiny_hyenadna, tiny_m2bert
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_flashfftconv import patch_model
from hf_flashfftconv.errors import CheckpointError, SparsityError
from hf_flashfftconv.sparsity import FlashFFTSparseConfig, FrequencyMask, densify_model, sparsify_model, sparsity_report
from hf_flashfftconv.sparsity.filters import find_filters
from hf_flashfftconv.sparsity.quantizer import FlashFFTSparseQuantizer, register

pytestmark = pytest.mark.no_cover

FILTER = "backbone.layers.0.mixer.filter_fn"
MASK = {"fft_size": 260, "ranges": [[0, 20], [30, 40]]}


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(dna_ids() if ids is None else ids).logits


def masks_of(model: nn.Module) -> list[FrequencyMask]:
    return [module.frequency_mask for module in find_filters(model).values()]


@pytest.fixture
def sparse(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = sparsify_model(tiny_hyenadna(), 0.3)
    model.save_pretrained(tmp_path / "sparse")
    return model, tmp_path / "sparse"


@pytest.fixture
def edit(sparse: tuple[PreTrainedModel, Path]) -> Callable[[Any], Path]:
    """Returns the folder of a sparse checkpoint with another quantisation entry."""

    def write(entry: Any) -> Path:
        path = sparse[1] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": entry}))
        return sparse[1]

    return write


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_hyena, tiny_m2bert])
def test_round_trip(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = sparsify_model(build(), 0.3, by="energy")
    model.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if build is tiny_m2bert else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path)
    assert masks_of(loaded) == masks_of(model)
    assert torch.equal(logits(loaded), logits(model))
    assert sparsity_report(loaded) == sparsity_report(model)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix not in (".json",)] == [".safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == _saved_keys(build(), tmp_path / "dense")
    dense = build()
    assert torch.equal(logits(densify_model(loaded)), logits(dense))


def _saved_keys(model: PreTrainedModel, folder: Path) -> set[str]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors").keys()


def test_heads_and_base_model_share_a_checkpoint(sparse: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = sparse
    base = AutoModel.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = model.hyena(dna_ids()).last_hidden_state
        assert torch.equal(base(dna_ids()).last_hidden_state, expected)
        assert torch.equal(classifier.hyena(dna_ids()).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    entry = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert entry == json.loads((folder / "config.json").read_text())["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again.hyena(dna_ids()).last_hidden_state, expected)


def test_sharded_round_trip(tmp_path: Path) -> None:
    model = sparsify_model(tiny_hyenadna(), 0.3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_version_1_entries_stay_readable(edit: Callable[[Any], Path]) -> None:
    entry = {"quant_method": "flashfft_sparse", "format_version": 1, "masks": {FILTER: MASK}}
    model = AutoModelForCausalLM.from_pretrained(edit(entry))
    first, second = find_filters(model).values()
    assert first.frequency_mask == FrequencyMask(260, ((0, 20), (30, 40)))
    assert not hasattr(second, "frequency_mask")
    assert model.config.quantization_config.to_dict() == entry


@pytest.mark.parametrize("wish", [{"keep": 0.3}, {"keep": 0.6, "by": "energy", "layers": ["*.1.*"], "block": 3}])
def test_dense_checkpoint_is_sparsified_while_it_loads(wish: dict, tmp_path: Path) -> None:
    tiny_hyenadna().save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=FlashFFTSparseConfig(**wish))
    expected = sparsify_model(tiny_hyenadna(), wish["keep"], **{k: v for k, v in wish.items() if k != "keep"})
    assert torch.equal(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")), logits(expected))
    with pytest.raises(SparsityError, match=r"got 7\.5"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=FlashFFTSparseConfig(keep=7.5))


def test_wishes_are_json() -> None:
    wish = FlashFFTSparseConfig(keep=0.5, by="energy", layers=("*.0.*",))
    again = FlashFFTSparseConfig.from_dict(json.loads(wish.to_json_string()))
    assert again.to_dict() == wish.to_dict()


def test_register_twice_is_harmless() -> None:
    before = AUTO_QUANTIZER_MAPPING["flashfft_sparse"], AUTO_QUANTIZATION_CONFIG_MAPPING["flashfft_sparse"]
    register()
    after = AUTO_QUANTIZER_MAPPING["flashfft_sparse"], AUTO_QUANTIZATION_CONFIG_MAPPING["flashfft_sparse"]
    assert before == after == (FlashFFTSparseQuantizer, FlashFFTSparseConfig)


def test_half_precision_keeps_the_masks(sparse: tuple[PreTrainedModel, Path]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(sparse[1], dtype=torch.bfloat16)
    assert masks_of(loaded) == masks_of(sparse[0])
    assert (logits(loaded) - logits(sparse[0])).norm() < 0.05 * logits(sparse[0]).norm()


def test_a_loaded_model_becomes_dense_without_a_trace(sparse: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    loaded = densify_model(AutoModelForCausalLM.from_pretrained(sparse[1]))
    tiny_hyenadna().save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert vars(loaded).keys() == vars(dense).keys()
    assert vars(loaded.config).keys() == vars(dense.config).keys()
    assert torch.equal(logits(loaded), logits(dense))


def test_transformers_can_dequantize(sparse: tuple[PreTrainedModel, Path]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(sparse[1])
    loaded.dequantize()
    assert not sparsity_report(loaded) and not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded), logits(tiny_hyenadna()))


def _train(model: PreTrainedModel, folder: Path, steps: int, resume: bool = False) -> list[float]:
    data = [{"input_ids": row, "labels": row} for row in dna_ids(batch=8, length=64)]
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=10,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("remote", [False, True])
def test_trainer_trains_saves_and_resumes(remote: bool, patched: bool, tmp_path: Path) -> None:
    def load() -> PreTrainedModel:
        if not remote:
            return tiny_hyenadna()
        repo = remote_hyenadna_repo(tmp_path / "remote")
        return AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)

    model = sparsify_model(load(), 0.3)
    masks = masks_of(model)
    weight = find_filters(model).popitem()[1].implicit_filter[0].weight.detach().clone()
    if patched:
        patch_model(model)
    losses = _train(model, tmp_path / "run", steps=20)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert not torch.equal(find_filters(model).popitem()[1].implicit_filter[0].weight, weight)
    assert masks_of(model) == masks
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-20", trust_remote_code=remote)
    assert masks_of(checkpoint) == masks
    # the last step is logged before it is taken
    expected = logits(model.eval())
    assert (logits(checkpoint.eval()) - expected).norm() < 1e-5 * expected.norm()
    resumed = _train(sparsify_model(load(), 0.3), tmp_path / "run", steps=22, resume=True)
    assert resumed[:20] == losses and len(resumed) == 22
    assert resumed[-1] < 1.1 * min(losses)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "flashfft_sparse"}, "keep or masks"),
        ({"masks": {}}, "1 to 4096 filters, got {}"),
        ({"masks": [MASK]}, "masks must be a dict"),
        ({"masks": {FILTER: MASK}, "format_version": 2}, "format_version 2"),
        ({"masks": {FILTER: MASK}, "format_version": "x" * 10_000}, "format_version"),
        ({"masks": {FILTER: MASK}, "backend": "someone/kernels"}, "backend"),
        ({"masks": {FILTER: MASK}, "keep": 0.5}, "keep=0.5"),
        ({"masks": {"../../x": MASK}}, "'../../x'"),
        ({"masks": {FILTER: {**MASK, "ranges": [[0, 132]]}}}, "outside bins 0 .. 130"),
        ({"masks": {FILTER: {**MASK, "ranges": [[-3, 5]]}}}, "-3"),
        ({"masks": {FILTER: {**MASK, "ranges": [[4, 9], [1, 3]]}}}, "out of order"),
        ({"masks": {FILTER: {**MASK, "ranges": [[0, 1e3]]}}}, "1000.0"),
        ({"masks": {FILTER: {**MASK, "ranges": []}}}, "at least one bin"),
        ({"masks": {FILTER: {**MASK, "fft_size": 258}}}, "needs a mask of fft_size 260, got 258"),
        ({"masks": {FILTER: {**MASK, "fft_size": 10**400}}}, "fft_size"),
        ({"masks": {FILTER: {"fft_size": 200_000, "ranges": [[2 * i, 2 * i + 1] for i in range(50_000)]}}}, "50000"),
        ({"masks": {"backbone.layers.7.mixer.filter_fn": MASK}}, "backbone.layers.7.mixer.filter_fn"),
        ({"masks": {f"layer.{i}": MASK for i in range(5000)}}, "1 to 4096"),
        ({"masks": {"backbone.layers.0.mixer": MASK}}, "no filter"),
    ],
)
def test_hostile_entries_are_refused(entry: dict, message: str, edit: Callable[[Any], Path]) -> None:
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(edit({"quant_method": "flashfft_sparse", **entry}))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_truncated_weights_are_refused(sparse: tuple[PreTrainedModel, Path]) -> None:
    weights = sparse[1] / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
            AutoModelForCausalLM.from_pretrained(sparse[1])


def test_foreign_weights_are_refused(sparse: tuple[PreTrainedModel, Path]) -> None:
    weights = sparse[1] / "model.safetensors"
    tensors = load_file(weights)
    key = f"hyena.{FILTER}.implicit_filter.0.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"nothing for {key[6:]}".replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(sparse[1])
    save_file({**tensors, key: torch.zeros(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\(3, 3\) for .* expected shape \(16, 5\)"):
        AutoModelForCausalLM.from_pretrained(sparse[1])
    torch.save(tensors, sparse[1] / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"\.safetensors files in one folder, got .*pytorch_model\.bin"):
        AutoModelForCausalLM.from_pretrained(sparse[1])


def test_weights_outside_the_folder_are_refused(sparse: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    (sparse[1] / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    keys = load_file(tmp_path / "elsewhere.safetensors").keys()
    save_file({"x": torch.zeros(1)}, sparse[1] / "inside.safetensors", {"format": "pt"})
    files = {**dict.fromkeys(keys, "../elsewhere.safetensors"), "x": "inside.safetensors"}
    index = sparse[1] / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with pytest.raises(CheckpointError, match="in one folder"):
        AutoModelForCausalLM.from_pretrained(sparse[1])


def test_another_length_is_refused(sparse: tuple[PreTrainedModel, Path]) -> None:
    config = AutoConfig.from_pretrained(sparse[1], max_seq_len=66)
    with pytest.raises(CheckpointError, match="66 taps and needs a mask of fft_size 132, got 260"):
        AutoModelForCausalLM.from_pretrained(sparse[1], config=config)
