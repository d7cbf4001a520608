"""Reads checkpoints that the authors' own training code wrote."""

import re

import torch

_RENAMES = (
    (r"^model\.", ""),  # the wrapper of the training framework
    (r"^backbone\.", "hyena.backbone."),
    (r"\.(mixer|mlp)\.layer\.", r".\1."),  # the wrapper of activation checkpointing
)


def convert_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the keys of an original Hyena, HyenaDNA or M2-BERT checkpoint to those of the models of this package.

    ```python
    weights = torch.load("weights.ckpt", weights_only=True)["state_dict"]
    config = HyenaDNAConfig.from_original_config("config.json")
    model = HyenaDNAForCausalLM.from_pretrained(None, config=config, state_dict=convert_state_dict(weights))
    ```

    Args:
        state_dict (`dict[str, torch.Tensor]`): The original tensors; names that need no change are kept.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors under new names.
    """
    converted = {}
    for key, value in state_dict.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        converted[key] = value
    return converted
