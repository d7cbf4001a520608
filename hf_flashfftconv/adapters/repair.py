"""What transformers 5 cannot save of older remote code: parameters shared without a declaration.

HyenaDNA and M2-BERT use one sine module in all layers of a filter network, so its `freq` has several names in the state
dict; M2-BERT also sets the weight of its language modelling head to that of the embedding. transformers 5 refuses to
save such a model, Trainer checkpoints included, and expects a dictionary in `_tied_weights_keys` where older code has a
list. A module with several names is declared there: whatever loads the file builds the same module. A parameter shared
by different modules is written under each of its names instead, since the loader of undeclared code leaves what is
missing in a file at random values.
"""

from collections import defaultdict
from typing import Any

from torch import Tensor, nn

_SAVED = "_flashfftconv_repair"
_DECLARATIONS = ("_tied_weights_keys", "all_tied_weights_keys")


def declare_shared_weights(model: nn.Module) -> None:
    """Makes every transformers model within `model` one that can be saved; changes nothing where all is declared."""
    for module in model.modules():
        if isinstance(getattr(module, "all_tied_weights_keys", None), dict) and _SAVED not in vars(module):
            _declare(module)


def undeclare_shared_weights(model: nn.Module) -> None:
    """Undoes [`declare_shared_weights`]."""
    for module in model.modules():
        saved: dict[str, Any] | None = vars(module).pop(_SAVED, None)
        if saved is None:
            continue
        for name in _DECLARATIONS:
            vars(module).pop(name, None)
        vars(module).update(saved["attributes"])
        for key in [key for key, hook in module._state_dict_hooks.items() if hook is _write_copies]:
            del module._state_dict_hooks[key]


def _declare(module: nn.Module) -> None:
    declared = module._tied_weights_keys
    same_module, copies = _undeclared(module)
    if isinstance(declared, dict | None) and not same_module and not copies:
        return
    attributes = {name: vars(module)[name] for name in _DECLARATIONS if name in vars(module)}
    vars(module)[_SAVED] = {"attributes": attributes, "copies": copies}
    module._tied_weights_keys = {**(declared if isinstance(declared, dict) else {}), **same_module}
    module.all_tied_weights_keys = {**module.all_tied_weights_keys, **same_module}
    if copies:
        module.register_state_dict_post_hook(_write_copies)


def _undeclared(module: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Further names of shared parameters: with the first name where they mean the same module, and all others."""
    names = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in module.all_tied_weights_keys:
            names[id(parameter)].append(name)
    same_module, copies = {}, []
    for first, *aliases in names.values():
        for alias in aliases:
            if _owner(module, alias) is _owner(module, first):
                same_module[alias] = first
            else:
                copies.append(alias)
    return same_module, copies


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _write_copies(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in vars(module)[_SAVED]["copies"]:
        tensor: Any = state_dict.get(prefix + name)
        # With keep_vars the caller wants the parameters themselves.
        if type(tensor) is Tensor and not tensor.is_meta:
            state_dict[prefix + name] = tensor.clone()
