"""The Auto classes: native classes by default, the repository's own code when the user trusts it."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from model_factory import (
    dna_ids,
    remote_hyenadna_repo,
    tiny_hyena,
    tiny_hyenadna,
    tiny_hyenadna_classifier,
    tiny_m2bert,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_flashfftconv import models


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return remote_hyenadna_repo(tmp_path / "hyenadna")


@pytest.mark.parametrize(
    ("auto_class", "build", "expected"),
    [
        (AutoModel, tiny_hyenadna, models.HyenaDNAModel),
        (AutoModelForCausalLM, tiny_hyenadna, models.HyenaDNAForCausalLM),
        (AutoModelForSequenceClassification, tiny_hyenadna_classifier, models.HyenaDNAForSequenceClassification),
        (AutoModel, tiny_hyena, models.HyenaLMModel),
        (AutoModelForCausalLM, tiny_hyena, models.HyenaLMForCausalLM),
        (AutoModel, tiny_m2bert, models.M2BertModel),
        (AutoModelForMaskedLM, tiny_m2bert, models.M2BertForMaskedLM),
        (AutoModelForSequenceClassification, tiny_m2bert, models.M2BertForSequenceClassification),
    ],
)
def test_saved_models_load_through_the_auto_classes(auto_class, build, expected: type, tmp_path: Path) -> None:
    model, ids = build(), dna_ids()
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is expected and type(loaded.config) is type(model.config)
    state, reference = loaded.base_model(ids).last_hidden_state, model.base_model(ids).last_hidden_state
    assert torch.equal(state, reference)
    assert type(auto_class.from_config(loaded.config)) is expected


def test_a_hub_repository_loads_natively_unless_its_code_is_trusted(repo: Path) -> None:
    ids = dna_ids()
    for _ in range(2):  # the order of loading must not matter
        native = AutoModelForCausalLM.from_pretrained(repo)
        assert type(native) is models.HyenaDNAForCausalLM
        remote = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
        assert type(remote).__module__.startswith("transformers_modules.")
        assert type(remote.config).__name__ == "HyenaConfig"
        assert torch.allclose(remote(ids).logits, native(ids).logits, atol=1e-4)
        assert type(AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=False)) is models.HyenaDNAForCausalLM
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        assert type(auto_class.from_pretrained(repo)).__module__.startswith("hf_flashfftconv.")
        trusted = auto_class.from_pretrained(repo, trust_remote_code=True)
        assert type(trusted).__module__.startswith("transformers_modules.")


def test_gradients_are_those_of_the_remote_code_and_its_failures_are_not_shared(repo: Path) -> None:
    ids = dna_ids()
    native = AutoModelForCausalLM.from_pretrained(repo)
    remote = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    for model in (native, remote):
        model(input_ids=ids, labels=ids).loss.backward()
    theirs = dict(remote.named_parameters())
    for name, parameter in native.named_parameters():
        scale = theirs[name].grad.norm()
        assert (parameter.grad - theirs[name].grad).norm() < 1e-3 * scale, name
    with pytest.raises(RuntimeError, match="shared tensors"):
        remote.save_pretrained(repo / "again")
    with pytest.raises(TypeError, match="attention_mask"):
        remote(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert not hasattr(remote, "generate")


def test_tables_are_those_of_the_remote_code_bit_for_bit(repo: Path) -> None:
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True, max_seq_len=1026)
    remote = AutoModel.from_config(config, trust_remote_code=True).backbone.layers[0].mixer.filter_fn
    native = tiny_hyenadna(max_seq_len=1026).hyena.backbone.layers[0].mixer.filter_fn
    for name, table in remote.named_buffers():
        assert torch.equal(native.get_buffer(name), table), name


def test_the_tokenizer_follows_the_same_rule(repo: Path) -> None:
    native, remote = AutoTokenizer.from_pretrained(repo), AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    assert type(native) is models.HyenaDNATokenizer
    assert type(remote).__module__.startswith("transformers_modules.")
    for text in ("ACGTN", "acgtR", "", "A" * 200):
        assert native(text, truncation=True) == remote(text, truncation=True)
    assert type(AutoTokenizer.from_pretrained(repo)) is models.HyenaDNATokenizer


def test_pipelines_find_model_and_tokenizer(repo: Path) -> None:
    generator = pipeline("text-generation", model=str(repo))
    assert type(generator.model) is models.HyenaDNAForCausalLM
    text = generator("ACGTACGT", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("ACGTACGT")


def test_a_natively_saved_copy_refers_to_no_missing_code(repo: Path, tmp_path: Path) -> None:
    config = json.loads((repo / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(repo).save_pretrained(tmp_path / "copy")
    assert "auto_map" not in json.loads((tmp_path / "copy" / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "someone/model--configuration_hyena.HyenaConfig"
    kept = models.HyenaDNAConfig(**config).to_dict()["auto_map"]
    assert kept == {"AutoConfig": "someone/model--configuration_hyena.HyenaConfig"}


def test_configurations_are_ordinary_objects() -> None:
    config = AutoConfig.for_model("hyenadna", d_model=24)
    assert type(config) is models.HyenaDNAConfig and config.d_model == 24
    assert type(pickle.loads(pickle.dumps(config))) is models.HyenaDNAConfig
    assert type(copy.deepcopy(config)) is models.HyenaDNAConfig


def test_registering_again_changes_nothing() -> None:
    before = {name: CONFIG_MAPPING[name] for name in ("hyenadna", "hyena_lm", "m2_bert")}
    models.register()
    assert {name: CONFIG_MAPPING[name] for name in before} == before


def test_an_earlier_registration_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class OtherConfig(PreTrainedConfig):
        model_type = "hyenadna"

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "hyenadna", OtherConfig)
    models.register()
    assert CONFIG_MAPPING["hyenadna"] is OtherConfig
    tiny_hyenadna().save_pretrained(tmp_path)
    assert type(models.HyenaDNAForCausalLM.from_pretrained(tmp_path).config) is models.HyenaDNAConfig
    assert type(AutoModelForCausalLM.from_config(tiny_hyenadna().config)) is models.HyenaDNAForCausalLM


def test_a_later_registration_of_somebody_else_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherConfig(PreTrainedConfig):
        model_type = "hyenadna"

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "hyenadna", CONFIG_MAPPING["hyenadna"])
    AutoConfig.register("hyenadna", OtherConfig)
    assert type(AutoConfig.for_model("hyenadna")) is OtherConfig
