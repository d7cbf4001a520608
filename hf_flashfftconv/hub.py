"""Saves and publishes models so that everybody can load them: safetensors, configuration, loader, model card."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters.repair import declare_shared_weights
from .errors import CheckpointError
from .shim import SHIM, auto_class_of, is_native, origin, write_shim
from .sparsity import sparsity_report
from .sparsity.conversion import unwrap

TAGS = ("flashfftconv", "long-convolution")
_WEIGHT_FILES = re.compile(r"model.*\.safetensors(\.index\.json)?")


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    max_shard_size: int | str = "5GB",
) -> Path:
    """
    Saves a model with all that loading it takes, in one step: the directory holds the old files or the new, no mixture.

    Written are the weights as safetensors, `config.json` (with the masks of a sparse model), the code of a remote-code
    model, a model card, and for sparse models and the models of this package a loader file: `AutoModel` with
    `trust_remote_code=True` then imports hf_flashfftconv, and asks for it by name where it is not installed.

    Args:
        model (`nn.Module`):
            A transformers model; patched, sparse, or neither. A patched model is saved like the model it was.
        directory (`str` or `os.PathLike`):
            Where to save. Other files in an existing directory stay; its weights, configuration and card are replaced.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Saved along.
        base_model (`str`, *optional*):
            Repository that the model derives from, for the card. By default the one that it was loaded from.
        license (`str`, *optional*):
            License identifier, for the card.
        tags (`Sequence[str]`, *optional*):
            Further tags, for the card.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            Size above which the weights are split.

    Returns:
        `Path`: The directory.

    Raises:
        CheckpointError: If the model is not a transformers model, carries PEFT adapters, or its class cannot be loaded
            elsewhere. Nothing is written.
    """
    target = _transformers_model(model)
    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, not a directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # beside the target: a rename is atomic within one file system only
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as work:
        new = Path(work, "new")
        card = {"base_model": base_model, "license": license, "tags": tags}
        _write(target, new, directory.name, tokenizer, max_shard_size, card)
        _exchange(new, directory, Path(work, "old"))
    return directory


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    max_shard_size: int | str = "5GB",
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload model with hf_flashfftconv",
    create_pr: bool = False,
) -> CommitInfo:
    """
    Publishes a model on the Hugging Face Hub: the files of [`save_pretrained`] in one commit.

    After training, publish with this function and not with `Trainer.push_to_hub`, which writes no loader file.

    Args:
        model (`nn.Module`):
            As in [`save_pretrained`], like `tokenizer`, `base_model`, `license`, `tags` and `max_shard_size`.
        repo_id (`str`):
            Repository to create or update. Its older weight files are deleted in the same commit.
        private (`bool`, *optional*):
            Whether a new repository is private.
        token (`str`, *optional*):
            Access token; by default the one that `hf auth login` has stored.
        commit_message (`str`, *optional*):
            Message of the commit.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead of committing to the main branch.

    Returns:
        `CommitInfo`: The commit, with its URL.

    Raises:
        CheckpointError: As in [`save_pretrained`]; nothing is uploaded.
    """
    target = _transformers_model(model)
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as work:
        new = Path(work, "new")
        card = {"base_model": base_model, "license": license, "tags": tags}
        _write(target, new, repo_id, tokenizer, max_shard_size, card)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=new,
            commit_message=commit_message,
            create_pr=create_pr,
            delete_patterns=["model*.safetensors", "model*.safetensors.index.json"],
        )


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    target = unwrap(model)
    if not isinstance(target, PreTrainedModel):
        raise CheckpointError(f"only transformers models can be saved, got {type(model).__name__}")
    if hasattr(model, "get_base_model") or getattr(target, "_hf_peft_config_loaded", False):
        raise CheckpointError("the model carries PEFT adapters; merge them (merge_and_unload) or save them with PEFT")
    return target


def _write(
    model: PreTrainedModel,
    folder: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
    card: dict[str, Any],
) -> None:
    folder.mkdir()
    # older remote code shares parameters without saying so, which transformers refuses to save
    declare_shared_weights(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    report = sparsity_report(model)
    native = is_native(type(model))
    if report or native:
        write_shim(model, tokenizer, folder)
    base_model = card["base_model"] or _repository_of(model)
    data = ModelCardData(
        library_name="transformers",
        base_model=base_model,
        base_model_relation="quantized" if base_model and report else None,
        license=card["license"],
        tags=[*TAGS, model.config.model_type, *(["frequency-sparse"] if report else []), *card["tags"]],
    )
    ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / "model_card.md"),
        name=name,
        architecture=origin(type(model)).__name__,
        auto_class=auto_class_of(type(model)),
        remote_code=not native,
        shim=f"{SHIM}.py" if report or native else None,
        report=report.to_markdown() if report else None,
        dropped=f"{1 - report.density:.0%}",
    ).save(folder / "README.md")


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Moves `new` to `target`; files of an existing `target` that `new` does not replace move into it."""
    if not target.exists():
        os.replace(new, target)
        return
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    for entry in old.iterdir():
        # weights of an earlier save would be loaded in the place of the new ones
        if not (target / entry.name).exists() and not _WEIGHT_FILES.fullmatch(entry.name):
            shutil.move(entry, target / entry.name)


def _repository_of(model: PreTrainedModel) -> str | None:
    """The Hub repository that a model was loaded from, if it was one."""
    name = str(getattr(model.config, "_name_or_path", ""))
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name) else None
