"""What the model families share as transformers models: initialisation, shared frequencies, checked loading."""

import math
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..errors import CheckpointError
from .hyena import HyenaExponentialModulation, HyenaFilter, HyenaPositionalEmbedding, HyenaSin


class LongConvPreTrainedModel(PreTrainedModel):
    """Base class of the models of this package.

    The filter networks stay in float32 when a model is loaded in half precision: rounding the positions to bfloat16
    would change every tap by several percent.
    """

    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ("filter_fn", "filter_fn2")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d):
            bound = 1 / math.sqrt(module.in_channels // module.groups * module.kernel_size[0])
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, HyenaSin):
            if isinstance(module.freq, nn.Parameter):
                init.constant_(module.freq, module.w)
        elif isinstance(module, HyenaPositionalEmbedding):
            z, t = module.table()
            init.copy_(module.z, z)
            init.copy_(module.t, t)
        elif isinstance(module, HyenaExponentialModulation):
            init.copy_(module.deltas, module.table())
        elif isinstance(module, HyenaFilter):
            init.normal_(module.bias)
        else:
            super()._init_weights(module)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Adds the sine frequencies, which one module shares between all layers of a filter, to the tied weights."""
        tied = dict(super().get_expanded_tied_weights_keys(all_submodels))
        for prefix, module in self.named_modules():
            if isinstance(module, HyenaFilter):
                tied.update({f"{prefix}.{k}": f"{prefix}.{v}" for k, v in module._tied_weights_keys.items()})
        return tied

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Keeps a tied weight on the list of missing ones when a checkpoint has it under none of its names."""
        tied = self.all_tied_weights_keys
        found = {source for alias, source in tied.items() if alias not in loading_info.missing_keys}
        absent = (set(tied.values()) - found) & loading_info.missing_keys
        super().mark_tied_weights_as_initialized(loading_info)
        loading_info.missing_keys |= absent

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint as [`~transformers.PreTrainedModel.from_pretrained`] does, but never half of one.

        Heads may be missing, as when fine-tuning starts from a language model; weights of the base model may not,
        except buffers, which the configuration determines.

        Raises:
            CheckpointError: If the file is truncated, if weights of the base model are missing, or if a shape differs
                from the configuration's and `ignore_mismatched_sizes=True` was not passed.
        """
        want_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise CheckpointError(f"{pretrained_model_name_or_path}: damaged safetensors file: {error}") from error
        problems = _missing_weights(model, info["missing_keys"])
        if not ignore_mismatched:
            problems += [
                f"{key} has shape {tuple(found)} instead of {tuple(wanted)}"
                for key, found, wanted in sorted(info["mismatched_keys"])
            ]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise CheckpointError(
                f"{pretrained_model_name_or_path} does not hold a {cls.__name__} of its configuration: {shown}"
            )
        return (model, info) if want_info else model


def check_inputs(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Raises `ValueError` unless exactly one of the two is given and holds at least one token."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is not None and given.shape[1] == 0:
        raise ValueError(f"The input of shape {tuple(given.shape)} has no tokens; at least one is needed.")


def _missing_weights(model: PreTrainedModel, missing: set[str]) -> list[str]:
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    # Aliases are not listed: they are missing from every checkpoint. Buffers have been computed anew.
    needed = {
        name for name, _ in model.named_parameters() if name.startswith(base) and not name.startswith(f"{base}pooler.")
    }
    return [f"{name} is missing" for name in sorted(missing & needed)]
