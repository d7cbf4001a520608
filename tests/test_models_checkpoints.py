"""State-dict layout of the published checkpoints, saving and loading, and refusal of damaged or foreign files."""

import json
from pathlib import Path

import pytest
import torch
from model_factory import dna_ids, hub_state_dict, tiny_hyena, tiny_hyenadna, tiny_hyenadna_classifier, tiny_m2bert
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_flashfftconv.errors import CheckpointError
from hf_flashfftconv.models import (
    HyenaDNAConfig,
    HyenaDNAForCausalLM,
    HyenaDNAForSequenceClassification,
    HyenaDNAModel,
    HyenaLMConfig,
    HyenaLMForCausalLM,
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    convert_state_dict,
)

HUB_HYENADNA = {"emb_dim": 5, "activation_freq": 10, "tie_word_embeddings": False}


def on_meta(model_class: type, config: object) -> torch.nn.Module:
    with torch.device("meta"):
        return model_class(config)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("d_model", "n_layer", "max_seq_len", "parameters"),
    [
        (128, 2, 1026, 438_144),
        (256, 2, 1026, 1_645_184),
        (128, 2, 16_386, 438_144),
        (256, 4, 32_770, 3_281_664),
        (256, 8, 160_002, 6_554_624),
        (256, 8, 450_002, 6_554_624),
        (256, 8, 1_000_002, 6_554_624),
    ],
    ids=["tiny-1k", "tiny-1k-d256", "tiny-16k", "small-32k", "medium-160k", "medium-450k", "large-1m"],
)
def test_hyenadna_sizes(d_model: int, n_layer: int, max_seq_len: int, parameters: int) -> None:
    config = HyenaDNAConfig(d_model=d_model, n_layer=n_layer, max_seq_len=max_seq_len, **HUB_HYENADNA)
    model = on_meta(HyenaDNAForCausalLM, config)
    assert model.num_parameters() == parameters
    buffers = n_layer * (6 * max_seq_len + d_model)
    assert sum(buffer.numel() for buffer in model.buffers()) == buffers


def test_hyenadna_names_and_shapes() -> None:
    d, lmax = 128, 1026
    model = on_meta(HyenaDNAForCausalLM, HyenaDNAConfig(d_model=d, n_layer=2, max_seq_len=lmax, **HUB_HYENADNA))
    expected = {
        "hyena.backbone.embeddings.word_embeddings.weight": (16, d),
        "hyena.backbone.ln_f.weight": (d,),
        "hyena.backbone.ln_f.bias": (d,),
        "lm_head.weight": (16, d),
    }
    layer = {
        "mixer.in_proj.weight": (3 * d, d),
        "mixer.in_proj.bias": (3 * d,),
        "mixer.out_proj.weight": (d, d),
        "mixer.out_proj.bias": (d,),
        "mixer.short_filter.weight": (3 * d, 1, 3),
        "mixer.short_filter.bias": (3 * d,),
        "mixer.filter_fn.bias": (d,),
        **{f"mixer.filter_fn.{name}": shape for name, shape in filter_shapes(d, 64, 5, lmax).items()},
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
        **{f"norm{i}.{name}": (d,) for i in (1, 2) for name in ("weight", "bias")},
    }
    expected |= {f"hyena.backbone.layers.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}
    assert shapes(model) == expected


def filter_shapes(d: int, width: int, emb_dim: int, lmax: int, ends: tuple[str, ...] = ("",)) -> dict[str, tuple]:
    names: dict[str, tuple] = {
        "pos_emb.z": (1, lmax, emb_dim),
        "pos_emb.t": (1, lmax, 1),
        "modulation.deltas": (1, 1, d),
    }
    for end in ends:
        for i, fan_in in ((0, emb_dim), (2, width), (4, width)):
            names[f"implicit_filter{end}.{i}.weight"] = (width, fan_in)
            names[f"implicit_filter{end}.{i}.bias"] = (width,)
            names[f"implicit_filter{end}.{i + 1}.freq"] = (1, width)
        names[f"implicit_filter{end}.6.weight"] = (d, width)
    return names


def test_hyena_lm_names_and_shapes() -> None:
    model = on_meta(HyenaLMForCausalLM, HyenaLMConfig())
    found = shapes(model)
    name = "hyena.backbone.layers.17.mixer."
    assert found[f"{name}in_proj.weight"] == (2592, 864)
    assert found[f"{name}short_filter.weight"] == (2592, 1, 3)
    expected = {f"{name}filter_fn.{key}": shape for key, shape in filter_shapes(864, 64, 33, 2048).items()}
    assert expected.items() <= found.items()
    assert found["hyena.backbone.layers.17.mlp.fc1.weight"] == (1728, 864)
    assert found["hyena.backbone.embeddings.word_embeddings.weight"] == (50264, 864)
    assert isinstance(model.get_parameter(f"{name}filter_fn.pos_emb.z"), torch.nn.Parameter)


def test_m2_bert_names_and_shapes() -> None:
    fields = {"hyena_filter_order": 128, "use_monarch_mlp": True, "use_positional_encodings": True}
    config = M2BertConfig(vocab_size=30528, max_position_embeddings=2048, residual_long_conv=True, **fields)
    model = on_meta(M2BertForMaskedLM, config)
    d, found = 768, shapes(model)
    mixer = {
        "in_linear.weight": (3 * d, d),
        "in_linear.bias": (3 * d,),
        "out_linear.weight": (d, d),
        "out_linear.bias": (d,),
        "short_filter.weight": (3 * d, 1, 3),
        "short_filter.bias": (3 * d,),
    }
    for name in ("filter_fn", "filter_fn2"):
        mixer[f"{name}.bias"] = (d,)
        table = filter_shapes(d, 128, 5, 2048, ends=("", "_rev"))
        mixer |= {f"{name}.{key}": shape for key, shape in table.items()}
    layer = {
        **{f"attention.{name}": shape for name, shape in mixer.items()},
        "mlp.gated_layers.weight": (4, 1536, 192),
        "mlp.wo.weight": (4, 192, 768),
        "mlp.wo.bias": (d,),
        "mlp.layernorm.weight": (d,),
        "mlp.layernorm.bias": (d,),
    }
    expected = {f"bert.encoder.layer.{i}.{name}": shape for i in range(12) for name, shape in layer.items()}
    expected |= {
        "bert.embeddings.position_ids": (1, 2048),
        "bert.embeddings.word_embeddings.weight": (30528, d),
        "bert.embeddings.position_embeddings.weight": (2048, d),
        "bert.embeddings.token_type_embeddings.weight": (2, d),
        "bert.embeddings.LayerNorm.weight": (d,),
        "bert.embeddings.LayerNorm.bias": (d,),
        "cls.predictions.transform.dense.weight": (d, d),
        "cls.predictions.transform.dense.bias": (d,),
        "cls.predictions.transform.LayerNorm.weight": (d,),
        "cls.predictions.transform.LayerNorm.bias": (d,),
        "cls.predictions.decoder.weight": (30528, d),
        "cls.predictions.decoder.bias": (30528,),
    }
    assert found == expected
    attention = model.bert.encoder.layer[0].attention
    assert sum(parameter.numel() for parameter in attention.parameters()) == 2_922_240


BUILDERS = [tiny_hyenadna, tiny_hyenadna_classifier, tiny_hyena, tiny_m2bert]


@pytest.mark.parametrize("build", BUILDERS)
def test_save_and_load_give_the_same_outputs(build, tmp_path: Path) -> None:
    model, ids = build(), dna_ids()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # Frequencies are stored once and shared again after loading.
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.endswith((".3.freq", ".5.freq", "_rev.1.freq"))]  # noqa: SIM118
    assert loaded.num_parameters() == model.num_parameters()
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kept", ["implicit_filter.1.freq", "implicit_filter.5.freq"])
def test_any_name_of_the_shared_frequency_will_do(kept: str, tmp_path: Path) -> None:
    model = tiny_hyenadna()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    state = {n: v.clone() for n, v in model.state_dict().items() if not n.endswith("freq") or n.endswith(kept)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(HyenaDNAForCausalLM.from_pretrained(tmp_path)(dna_ids()).logits, model(dna_ids()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", BUILDERS)
def test_half_precision_keeps_the_filters_and_the_residual_stream(build, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = build(), dna_ids()
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype)
    for name, value in half.state_dict().items():
        assert value.dtype in (torch.float32 if "filter_fn" in name else dtype, torch.int64), name
    outputs = half(ids, output_hidden_states=True)
    error = (outputs.logits.double() - model(ids).logits).norm() / model(ids).logits.norm()
    assert error < (0.03 if dtype is torch.bfloat16 else 0.004)
    if build is not tiny_m2bert:
        assert outputs.hidden_states[1].dtype is torch.float32
    half.save_pretrained(tmp_path / "half")
    again = type(model).from_pretrained(tmp_path / "half")
    assert again.dtype is dtype and torch.equal(again(ids).logits, outputs.logits)


def test_tables_missing_from_a_checkpoint_are_rebuilt(tmp_path: Path) -> None:
    for model in (tiny_hyenadna(), tiny_m2bert()):
        model.save_pretrained(tmp_path)
        tables = ("pos_emb.t", "modulation.deltas", "position_ids")
        kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.endswith(tables)}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(type(model).from_pretrained(tmp_path)(dna_ids()).logits, model(dna_ids()).logits)


def test_a_language_model_starts_a_classifier(tmp_path: Path) -> None:
    model = tiny_hyenadna()
    model.save_pretrained(tmp_path)
    classifier = HyenaDNAForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert classifier(dna_ids()).logits.shape == (2, 5)
    assert classifier.score.weight.abs().sum() > 0
    backbone = HyenaDNAModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(dna_ids()).last_hidden_state, model.hyena(dna_ids()).last_hidden_state)
    backbone.save_pretrained(tmp_path / "base")
    assert torch.equal(
        HyenaDNAForCausalLM.from_pretrained(tmp_path / "base").hyena(dna_ids()).last_hidden_state,
        model.hyena(dna_ids()).last_hidden_state,
    )
    masked = tiny_m2bert()
    masked.save_pretrained(tmp_path / "m2")
    encoder = M2BertForSequenceClassification.from_pretrained(tmp_path / "m2")
    assert torch.equal(encoder.bert(dna_ids()).last_hidden_state, masked.bert(dna_ids()).last_hidden_state)


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "gone",
    [
        "hyena.backbone.layers.1.mixer.filter_fn.implicit_filter.2.weight",
        "hyena.backbone.layers.0.mixer.filter_fn.implicit_filter.1.freq",
        "hyena.backbone.layers.0.mixer.filter_fn.bias",
        "hyena.backbone.layers.1.mixer.in_proj.weight",
        "hyena.backbone.ln_f.bias",
    ],
)
def test_missing_weights_are_refused_by_name(gone: str, tmp_path: Path) -> None:
    tiny_hyenadna().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {key: value for key, value in state.items() if key != gone})
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.") + " is missing"):
        HyenaDNAForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("build", [tiny_hyena, tiny_m2bert])
def test_a_tied_embedding_must_be_there_under_one_of_its_names(build, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    name = next(key for key in model.state_dict() if key.endswith("word_embeddings.weight"))
    head = next(alias for alias, source in model.all_tied_weights_keys.items() if source == name)
    rewrite(tmp_path, lambda state: {head if key == name else key: value for key, value in state.items()})
    assert torch.equal(type(model).from_pretrained(tmp_path)(dna_ids()).logits, model(dna_ids()).logits)
    rewrite(tmp_path, lambda state: {key: value for key, value in state.items() if key != head})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + " is missing"):
        type(model).from_pretrained(tmp_path)


def test_trained_positions_of_m2_bert_must_be_there(tmp_path: Path) -> None:
    model = tiny_m2bert()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {key: value for key, value in state.items() if not key.endswith("pos_emb.z")})
    with pytest.raises(CheckpointError, match=r"filter_fn\.pos_emb\.z is missing"):
        M2BertForMaskedLM.from_pretrained(tmp_path)


def test_wrong_shapes_are_refused_with_both_shapes(tmp_path: Path) -> None:
    tiny_hyenadna().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_seq_len": 66}))
    with pytest.raises(CheckpointError, match=r"pos_emb\.t has shape \(1, 130, 1\) instead of \(1, 66, 1\)"):
        HyenaDNAForCausalLM.from_pretrained(tmp_path)
    shorter = HyenaDNAForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    table = shorter.hyena.backbone.layers[0].mixer.filter_fn.pos_emb
    assert all(torch.equal(a, b) for a, b in zip((table.z, table.t), table.table(), strict=True))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    tiny_hyenadna().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        HyenaDNAForCausalLM.from_pretrained(tmp_path)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_hyenadna().save_pretrained(tmp_path)
    save_file(hub_state_dict(tiny_m2bert()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not hold a HyenaDNAForCausalLM.* and \d\d more"):
        HyenaDNAForCausalLM.from_pretrained(tmp_path)


def test_constant_tables_of_another_library_are_ignored(tmp_path: Path) -> None:
    model = tiny_m2bert()
    model.save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.attention.filter_fn.flashfft.f_sqrt_N_fft"
    rewrite(tmp_path, lambda state: {**state, name: torch.zeros(4, 4, dtype=torch.bfloat16)})
    loaded, info = M2BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(dna_ids()).logits, model(dna_ids()).logits)


def test_older_m2_bert_repositories(tmp_path: Path) -> None:
    """Their model type is that of BERT, and their file a pickle of tensors with every alias in it."""
    model = tiny_m2bert()
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded, info = M2BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(dna_ids()).logits, model(dna_ids()).logits)


def test_checkpoints_of_the_original_code() -> None:
    model = tiny_hyenadna()
    wrapped = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("hyena.").replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer.")
        wrapped[f"model.{name}"] = value
    loaded = HyenaDNAForCausalLM.from_pretrained(None, config=model.config, state_dict=convert_state_dict(wrapped))
    assert torch.equal(loaded(dna_ids()).logits, model(dna_ids()).logits)
    composer = {f"model.{name}": value for name, value in tiny_m2bert().state_dict().items()}
    assert convert_state_dict(composer).keys() == tiny_m2bert().state_dict().keys()


def test_configurations_of_the_original_code(tmp_path: Path) -> None:
    layer = {"_name_": "hyena", "emb_dim": 5, "filter_order": 64, "local_order": 3, "l_max": 1026, "w": 10, "lr": 6e-4}
    original = {"d_model": 128, "n_layer": 2, "d_inner": 512, "vocab_size": 12, "embed_dropout": 0.1, "layer": layer}
    (tmp_path / "config.json").write_text(json.dumps(original))
    config = HyenaDNAConfig.from_original_config(tmp_path / "config.json", pad_vocab_size_multiple=8)
    assert on_meta(HyenaDNAForCausalLM, config).num_parameters() == 438_144
    assert config.activation_freq == 10
    text = HyenaLMConfig.from_original_config({**original, "layer": {**layer, "modulate": False}}, emb_dim=33)
    assert (text.modulate, text.max_seq_len, text.emb_dim, text.padded_vocab_size) == (False, 1026, 33, 16)
