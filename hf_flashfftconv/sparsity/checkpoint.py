"""Checks on the files of a sparse checkpoint before its weights load."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError


def check_checkpoint(files: Sequence[str], filters: Mapping[str, nn.Module], prefix: str) -> None:
    """
    Refuses a checkpoint that would leave a sparse filter with random weights, which transformers only warns about.

    Args:
        files (`Sequence[str]`): Paths of the checkpoint's weight files.
        filters (`Mapping[str, nn.Module]`): The sparse filters to be loaded, named from the base model on.
        prefix (`str`): Name of the base model within a model with a head.

    Raises:
        CheckpointError: If a file is not a whole safetensors file beside the others, or lacks weights of a filter.
    """
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    if len(folders) > 1 or not all(os.fspath(file).endswith(".safetensors") for file in files):
        raise CheckpointError(f"a sparse checkpoint is .safetensors files in one folder, got {list(files)!r:.500}")
    shapes = {name: shape for file in files for name, shape in _read_shapes(file).items()}
    for filter_name, module in filters.items():
        # shared parameters are stored once, under any of their names
        aliases = defaultdict(list)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            aliases[parameter].append(name)
        for parameter, names in aliases.items():
            keys = [f"{start}{filter_name}.{name}" for name in names for start in ("", f"{prefix}.")]
            found = next((shapes[key] for key in keys if key in shapes), None)
            if found != tuple(parameter.shape):
                raise CheckpointError(
                    f"the checkpoint holds {found or 'nothing'} for {keys[0]}, expected shape {tuple(parameter.shape)}"
                )


def _read_shapes(file: str) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error
