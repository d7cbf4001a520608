"""The loader file in a saved model: what makes `AutoModel` import this package, or ask for it, before it loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto import modeling_auto

from .errors import CheckpointError

SHIM = "flashfftconv_shim"

_HEADER = '''"""Loads this model with hf_flashfftconv, whose import registers what the model needs."""

import hf_flashfftconv  # noqa: F401
'''


def write_shim(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """
    Adds the loader file to a folder that `save_pretrained` has just written, and points the `auto_map` to it.

    The file imports this package and defines a subclass of the configuration class. Where the model's code is not in
    the folder but in an installed package, such as this one, it does the same for the model classes.

    Args:
        model (`PreTrainedModel`): The saved model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The saved tokenizer.
        folder (`Path`): The folder.

    Raises:
        CheckpointError: If the model's class lives in a script, where nobody else can import it from.
    """
    model_class, config_class = origin(type(model)), origin(type(model.config))
    if model_class.__module__ == "__main__":
        raise CheckpointError(f"{model_class.__name__} is defined in a script; move it to a module that can be shipped")
    if model_class.__module__.startswith("transformers_modules.") and not _file(model_class, folder).exists():
        custom_object_save(model, folder)
    config = _read(folder / "config.json")
    classes = {"AutoConfig": config_class}
    if _file(model_class, folder).exists():
        known = {key: _in_folder(value, folder) for key, value in config.get("auto_map", {}).items()}
        own = {auto_class_of(model_class): f"{_file(model_class, folder).stem}.{model_class.__name__}"}
        auto_map = own | known
    else:
        auto_map = {}
        classes |= _registered_models(config_class) or {auto_class_of(model_class): model_class}
    auto_map |= {auto_class: f"{SHIM}.{cls.__name__}" for auto_class, cls in classes.items()}
    _write(folder / "config.json", {**config, "auto_map": auto_map})
    if tokenizer is not None and is_native(type(tokenizer)):
        classes["AutoTokenizer"] = origin(type(tokenizer))
        reference = [f"{SHIM}.{classes['AutoTokenizer'].__name__}", None]
        path = folder / "tokenizer_config.json"
        _write(path, {**_read(path), "auto_map": {"AutoTokenizer": reference}})
    (folder / f"{SHIM}.py").write_text(_source(classes, folder))


def is_native(cls: type) -> bool:
    """Whether a class belongs to this package, perhaps by way of a loader file."""
    return origin(cls).__module__.startswith(f"{__package__}.")


def origin(cls: type) -> type:
    """The class that a loader file has subclassed, or the class itself."""
    return next(base for base in cls.__mro__ if base.__module__.rpartition(".")[2] != SHIM)


def auto_class_of(model_class: type) -> str:
    """Name of the Auto class that loads a model class."""
    suffix = re.search(r"For[A-Z]\w*$", model_class.__name__)
    guess = f"AutoModel{suffix[0]}" if suffix else "AutoModel"
    known: str | None = getattr(model_class, "_auto_class", None)
    return known or (guess if hasattr(modeling_auto, guess) else "AutoModel")


def _registered_models(config_class: type) -> dict[str, type]:
    """All model classes of a configuration class, by the name of the Auto class that loads them."""
    names = [name for name in dir(modeling_auto) if name.startswith("AutoModel")]
    mappings = {name: getattr(modeling_auto, name)._model_mapping for name in names}
    return {name: mapping[config_class] for name, mapping in mappings.items() if config_class in mapping}


def _source(classes: dict[str, type], folder: Path) -> str:
    """The text of the loader file."""
    imports, definitions = [], []
    for cls in classes.values():
        imports.append(f"from {_module(cls, folder)} import {cls.__name__} as _{cls.__name__}\n")
        # transformers marks the classes that it finds here as code of this folder; subclasses keep the originals clean
        definitions.append(f"\n\nclass {cls.__name__}(_{cls.__name__}):\n    pass\n")
    return "".join([_HEADER, *dict.fromkeys(imports), *dict.fromkeys(definitions)])


def _module(cls: type, folder: Path) -> str:
    if _file(cls, folder).exists():
        return f".{_file(cls, folder).stem}"
    # published files outlive the inner layout of this package
    return f"{__package__}.models" if is_native(cls) else cls.__module__


def _file(cls: type, folder: Path) -> Path:
    return folder / f"{cls.__module__.rpartition('.')[2]}.py"


def _in_folder(reference: Any, folder: Path) -> Any:
    """A reference of an `auto_map` without the name of another repository, if its file is in the folder as well."""
    if not isinstance(reference, str):
        return reference
    local = reference.rpartition("--")[2]
    return local if (folder / f"{local.partition('.')[0]}.py").exists() else reference


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
