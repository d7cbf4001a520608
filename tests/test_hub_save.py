"""The files of a saved model: weights, configuration, loader, card; old ones replaced as a whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from model_factory import dna_ids, remote_hyenadna_repo, tiny_hyenadna, tiny_m2bert
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

import hf_flashfftconv.hub
from hf_flashfftconv import patch_model, save_pretrained, sparsify_model
from hf_flashfftconv.errors import CheckpointError
from hf_flashfftconv.models import HyenaDNATokenizer
from hf_flashfftconv.sparsity import sparsity_report

SHIM = "flashfftconv_shim.py"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(dna_ids()).logits


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def remote(tmp_path: Path) -> PreTrainedModel:
    repo = remote_hyenadna_repo(tmp_path / "remote")
    return AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).eval()


def test_sparse_native_model(tmp_path: Path) -> None:
    model = sparsify_model(tiny_hyenadna(), 0.3)
    folder = save_pretrained(model, tmp_path / "a" / "b", tokenizer=HyenaDNATokenizer(model_max_length=130))
    assert files(tmp_path / "a") == {"b"}
    assert files(folder) == {
        "README.md",
        "config.json",
        SHIM,
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "flashfft_sparse"
    assert config["auto_map"] == {
        "AutoConfig": "flashfftconv_shim.HyenaDNAConfig",
        "AutoModel": "flashfftconv_shim.HyenaDNAModel",
        "AutoModelForCausalLM": "flashfftconv_shim.HyenaDNAForCausalLM",
        "AutoModelForSequenceClassification": "flashfftconv_shim.HyenaDNAForSequenceClassification",
    }
    compile((folder / SHIM).read_text(), SHIM, "exec")
    for trust in (None, True):
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        assert torch.equal(logits(loaded), logits(model))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        assert tokenizer("ACGT")["input_ids"] == [7, 8, 9, 10, 1]
        # a model that came through the loader file is saved with it again
        again = save_pretrained(loaded, tmp_path / f"again-{trust}", tokenizer=tokenizer)
        assert files(again) == files(folder)
        assert (again / SHIM).read_text() == (folder / SHIM).read_text()
        assert json.loads((again / "config.json").read_text())["auto_map"] == config["auto_map"]


def test_plain_saving_keeps_the_loader(tmp_path: Path) -> None:
    folder = save_pretrained(sparsify_model(tiny_hyenadna(), 0.3), tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / SHIM).read_text() == (folder / SHIM).read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert type(again).__module__.endswith("flashfftconv_shim")
    assert torch.equal(logits(again), logits(loaded))


def test_sparse_remote_code_model(remote: PreTrainedModel, tmp_path: Path) -> None:
    sparsify_model(remote, 0.3)
    folder = save_pretrained(remote, tmp_path / "saved")
    assert {SHIM, "modeling_hyena.py", "configuration_hyena.py"} <= files(folder)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "flashfftconv_shim.HyenaConfig"
    assert auto_map["AutoModelForCausalLM"] == "modeling_hyena.HyenaDNAForCausalLM"
    assert auto_map["AutoModelForSequenceClassification"] == "modeling_hyena.HyenaDNAForSequenceClassification"
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__module__.endswith("modeling_hyena")
    assert torch.equal(logits(loaded), logits(remote))
    native = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(native) - logits(remote)).norm() < 1e-5 * logits(remote).norm()
    again = save_pretrained(loaded, tmp_path / "again")
    assert files(again) == files(folder)
    assert (again / SHIM).read_text() == (folder / SHIM).read_text()
    assert json.loads((again / "config.json").read_text())["auto_map"] == auto_map


def test_code_of_another_repository_moves_into_the_folder(
    remote: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = dict(remote.config.auto_map)
    remote.config.auto_map = {key: f"someone/hyena--{value}" for key, value in names.items()}
    del remote.config.auto_map["AutoModelForCausalLM"]
    remote.config.auto_map["AutoModelForTokenClassification"] = "someone/hyena--heads.Tagger"
    remote.config.auto_map["AutoTokenizer"] = ["someone/hyena--tokens.Tokenizer", None]
    # classes that were imported without an Auto class are not copied by transformers itself
    for cls in (type(remote), type(remote.config)):
        monkeypatch.setattr(cls, "_auto_class", None)
    folder = save_pretrained(sparsify_model(remote, 0.3), tmp_path / "saved")
    expected = {**names, "AutoConfig": "flashfftconv_shim.HyenaConfig"}
    expected["AutoModelForTokenClassification"] = "someone/hyena--heads.Tagger"
    expected["AutoTokenizer"] = ["someone/hyena--tokens.Tokenizer", None]
    assert {"modeling_hyena.py", "configuration_hyena.py"} <= files(folder)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == expected


def test_dense_models(remote: PreTrainedModel, tmp_path: Path) -> None:
    """A dense model needs the package only if its code is here; its card does not speak of sparsity."""
    native = save_pretrained(tiny_m2bert(), tmp_path / "native")
    assert SHIM in files(native)
    assert "AutoModelForMaskedLM" in json.loads((native / "config.json").read_text())["auto_map"]
    plain = save_pretrained(remote, tmp_path / "plain")
    assert SHIM not in files(plain)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=True)), logits(remote))
    for folder in (native, plain):
        text = (folder / "README.md").read_text()
        assert "parsity" not in text and "frequency-sparse" not in text


@pytest.mark.parametrize("sparse", [False, True])
def test_patched_models_are_saved_as_they_were(sparse: bool, remote: PreTrainedModel, tmp_path: Path) -> None:
    for name, model in {"remote": remote, "native": tiny_hyenadna()}.items():
        if sparse:
            sparsify_model(model, 0.3)
        expected = logits(model)
        before = save_pretrained(model, tmp_path / name / "before" / "model")
        patch_model(model)
        after = save_pretrained(model, tmp_path / name / "after" / "model")
        assert files(before) == files(after)
        same = [path for path in files(before) if path != "README.md"]
        assert all((before / path).read_bytes() == (after / path).read_bytes() for path in same)
        loaded = AutoModelForCausalLM.from_pretrained(after, trust_remote_code=True)
        assert torch.equal(logits(loaded), expected)


def test_card(tmp_path: Path) -> None:
    model = sparsify_model(tiny_hyenadna(), 0.3)
    options = {"base_model": "LongSafari/hyenadna-tiny-1k-seqlen-hf", "license": "bsd-3-clause", "tags": ["dna"]}
    card = ModelCard.load(save_pretrained(model, tmp_path / "sparse", **options) / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == options["base_model"] and data["base_model_relation"] == "quantized"
    assert data["license"] == "bsd-3-clause" and data["library_name"] == "transformers"
    assert {"dna", "flashfftconv", "frequency-sparse", "hyenadna"} <= set(data["tags"])
    assert sparsity_report(model).to_markdown() in card.content
    (snippet,) = (part.split("```")[0] for part in card.content.split("```python\n")[1:])
    compile(snippet, "snippet", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("sparse")' in snippet
    model.config._name_or_path = "someone/model"
    assert ModelCard.load(save_pretrained(model, tmp_path / "other") / "README.md").data.base_model == "someone/model"
    model.config._name_or_path = str(tmp_path)
    assert ModelCard.load(save_pretrained(model, tmp_path / "third") / "README.md").data.base_model is None


def test_existing_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(sparsify_model(tiny_hyenadna(), 0.3), folder, max_shard_size="20KB")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    (folder / "plot.png").write_bytes(b"kept")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = sparsify_model(tiny_hyenadna(), 0.6)
    save_pretrained(model, folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert (folder / "notes" / "a.txt").read_text() == "kept" and (folder / "plot.png").read_bytes() == b"kept"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    assert files(tmp_path) == {"model"}


@pytest.mark.parametrize("moment", ["card", "first rename", "second rename"])
def test_a_failed_save_leaves_the_old_files(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pretrained(sparsify_model(tiny_hyenadna(), 0.3), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    replace = hf_flashfftconv.hub.os.replace
    calls: list[object] = []

    def fail_at(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == {"first rename": 1, "second rename": 2}[moment]:
            fail()
        replace(source, target)

    if moment == "card":
        monkeypatch.setattr(hf_flashfftconv.hub.ModelCard, "from_template", fail)
    else:
        monkeypatch.setattr(hf_flashfftconv.hub.os, "replace", fail_at)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(sparsify_model(tiny_hyenadna(), 0.6), folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert files(tmp_path) == {"model"}


class PlainConfig(PreTrainedConfig):
    model_type = "plain-test"


class PlainModel(PreTrainedModel):
    """A transformers model from an importable module that no repository carries."""

    config_class = PlainConfig

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.mixer = tiny_hyenadna().hyena.backbone.layers[0].mixer
        self.post_init()


def test_model_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparsify_model(PlainModel(PlainConfig()), 0.3)
    folder = save_pretrained(model, tmp_path / "model")
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "flashfftconv_shim.PlainConfig", "AutoModel": "flashfftconv_shim.PlainModel"}
    assert f"from {__name__} import PlainModel as _PlainModel" in (folder / SHIM).read_text()
    monkeypatch.setattr(PlainModel, "__module__", "__main__")
    with pytest.raises(CheckpointError, match="PlainModel is defined in a script"):
        save_pretrained(model, tmp_path / "script")
    assert files(tmp_path) == {"model"}


def refuse(case: str, tmp_path: Path) -> tuple[nn.Module, Path]:
    if case == "not a transformers model":
        return nn.Linear(2, 2), tmp_path / "model"
    if case == "adapters":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(tiny_hyenadna(), LoraConfig(target_modules=["in_proj"])), tmp_path / "model"
    (tmp_path / "file").write_text("kept")
    return tiny_hyenadna(), tmp_path / "file"


@pytest.mark.parametrize(
    ("case", "message"),
    [("not a transformers model", "got Linear"), ("adapters", "merge_and_unload"), ("file", "file is a file")],
)
def test_what_cannot_be_saved_is_refused(case: str, message: str, tmp_path: Path) -> None:
    model, target = refuse(case, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(model, target)
    assert files(tmp_path) == ({"file"} if case == "file" else set())


def test_wrapped_models_are_unwrapped(tmp_path: Path) -> None:
    model = tiny_hyenadna()
    wrappers: list[Callable[[nn.Module], nn.Module]] = [nn.DataParallel, torch.compile]
    for wrap in wrappers:
        folder = save_pretrained(wrap(model), tmp_path / "model")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
