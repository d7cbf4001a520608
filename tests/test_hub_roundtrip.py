"""Publishing to a Hub on this machine, and loading in fresh processes with, through and without the package."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from fakehub import LoopbackHub
from model_factory import dna_ids, remote_hyenadna_repo, tiny_hyenadna, tiny_m2bert
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import hf_flashfftconv
from hf_flashfftconv import patch_model, push_to_hub, save_pretrained, sparsify_model
from hf_flashfftconv.errors import CheckpointError
from hf_flashfftconv.models import HyenaDNATokenizer

LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

def check(model, name, bound=0.0):
    expected, ids = load_file(f"{folder}/expected.safetensors")[name], load_file(f"{folder}/ids.safetensors")["ids"]
    with torch.no_grad():
        output = model.eval()(ids)
    actual = output["logits"] if "logits" in output else output["last_hidden_state"]
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= bound, (name, error)
"""

# the package is installed here: hide it as an environment without it would
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_flashfftconv":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run_fresh(script: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """Runs a script in a new process where `folder` is defined; returns what it prints."""
    root = str(Path(hf_flashfftconv.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_MODULES_CACHE": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", f"folder = {str(folder)!r}\n{script}"],
        env={**os.environ, **settings, **(environment or {})},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, Path]]:
    """A Hub with a native and a remote-code sparse model, pushed by this process; and what they compute."""
    folder = tmp_path_factory.mktemp("published")
    remote_hyenadna_repo(folder / "source")
    remote = AutoModelForCausalLM.from_pretrained(folder / "source", trust_remote_code=True).eval()
    models = {"tester/native": tiny_hyenadna(), "tester/remote": remote}
    expected = {}
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        for repo_id, model in models.items():
            sparsify_model(model, 0.3)
            with torch.no_grad():
                expected[repo_id] = model(dna_ids()).logits
            patch_model(model)
            # without a tokenizer of this package, the loader of the remote code has no other reason to import it
            tokenizer = HyenaDNATokenizer() if model is not remote else None
            commit = push_to_hub(model, repo_id, tokenizer=tokenizer, license="mit", token="hf_loopback")
            assert commit.oid == hub.repositories[repo_id].head
        with torch.no_grad():
            bert = sparsify_model(tiny_m2bert(), 0.3)
            expected["bert"] = bert(dna_ids()).logits
            save_pretrained(bert, folder / "bert")
        save_file(expected, folder / "expected.safetensors")
        save_file({"ids": dna_ids()}, folder / "ids.safetensors")
        yield hub, folder


def test_pushed_files(published: tuple[LoopbackHub, Path]) -> None:
    hub, _ = published
    for repo_id in ("tester/native", "tester/remote"):
        files = hub.repositories[repo_id].files
        assert {"README.md", "config.json", "flashfftconv_shim.py", "model.safetensors"} <= files.keys()
        assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
        assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "flashfft_sparse"
        assert f'from_pretrained("{repo_id}"' in files["README.md"].decode()
    assert "modeling_hyena.py" in hub.repositories["tester/remote"].files


def test_through_the_loader_without_an_import(published: tuple[LoopbackHub, Path], tmp_path: Path) -> None:
    hub, folder = published
    script = f"""{LOAD}
from huggingface_hub import snapshot_download
assert "hf_flashfftconv" not in sys.modules
check(AutoModelForCausalLM.from_pretrained("tester/remote", trust_remote_code=True), "tester/remote")
check(AutoModelForCausalLM.from_pretrained("tester/native", trust_remote_code=True), "tester/native")
snapshot = snapshot_download("tester/native")
check(AutoModelForCausalLM.from_pretrained(snapshot, trust_remote_code=True), "tester/native")
"""
    run_fresh(script, folder, hub.environment(tmp_path))
    assert any(request.endswith("/model.safetensors") for request in hub.requests)


def test_with_the_package_imported(published: tuple[LoopbackHub, Path], tmp_path: Path) -> None:
    hub, folder = published
    script = f"""{LOAD}
import hf_flashfftconv
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("tester/native")
assert type(model).__module__.startswith("hf_flashfftconv.")
check(model, "tester/native")
check(AutoModelForCausalLM.from_pretrained("tester/remote", trust_remote_code=True), "tester/remote")
check(AutoModelForCausalLM.from_pretrained("tester/remote"), "tester/remote", bound=1e-5)
check(AutoModelForMaskedLM.from_pretrained(f"{{folder}}/bert"), "bert")
check(hf_flashfftconv.patch_model(model), "tester/native", bound=1e-5)
assert AutoTokenizer.from_pretrained("tester/native")("ACGT").input_ids == [7, 8, 9, 10, 1]
"""
    run_fresh(script, folder, hub.environment(tmp_path))


def test_without_the_package_the_error_names_it(published: tuple[LoopbackHub, Path], tmp_path: Path) -> None:
    hub, folder = published
    script = f"""{WITHOUT_PACKAGE}{LOAD}
for name in ("tester/native", "tester/remote", f"{{folder}}/bert"):
    for options in (dict(trust_remote_code=True), dict(trust_remote_code=False)):
        try:
            AutoModel.from_pretrained(name, **options)
        except (ImportError, ValueError) as error:
            print(json.dumps([name, options["trust_remote_code"], type(error).__name__, str(error)]))
        else:
            raise SystemExit(f"{{name}} loaded without the package")
"""
    errors = [json.loads(line) for line in run_fresh(script, folder, hub.environment(tmp_path)).splitlines()]
    assert len(errors) == 6
    for _, trusted, kind, message in errors:
        if trusted:
            assert kind == "ImportError" and "pip install hf_flashfftconv" in message
        else:
            assert "trust_remote_code=True" in message


def test_pushing_again_deletes_stale_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        model = tiny_hyenadna()
        push_to_hub(model, "tester/model", max_shard_size="20KB", token="hf_loopback")
        repository = hub.repositories["tester/model"]
        assert sum(name.endswith(".safetensors") for name in repository.files) > 1
        repository.commit({**repository.files, "plot.png": b"kept"})
        commits = len(repository.commits)
        push_to_hub(sparsify_model(model, 0.5), "tester/model", token="hf_loopback", commit_message="Sparser")
        assert len(repository.commits) == commits + 1
        assert [name for name in repository.files if "safetensors" in name] == ["model.safetensors"]
        assert "plot.png" in repository.files


def test_nothing_is_sent_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        with pytest.raises(CheckpointError, match="got Linear"):
            push_to_hub(torch.nn.Linear(2, 2), "tester/model")
        with pytest.raises(ValueError, match="Repo id"):
            push_to_hub(tiny_hyenadna(), "not/a/repo")
        assert not hub.requests
