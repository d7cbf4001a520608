"""The `hf-flashfftconv` command: look at a model, make its filters sparse, measure, describe this installation."""

import argparse
import contextlib
import logging
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .errors import FlashFFTConvError, PatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_DISTRIBUTIONS = ("torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "peft", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs the command.

    Args:
        arguments (`Sequence[str]`, *optional*): The command line without the program's name; by default `sys.argv[1:]`.

    Returns:
        `int`: The exit status: 0, or 1 after an error, whose message goes to standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        report = options.run(options)
    except (FlashFFTConvError, OSError, ValueError) as error:
        sys.stderr.write(f"hf-flashfftconv: {error}\n")
        return 1
    sys.stdout.write(f"{report}\n")
    return 0


def inspect(options: argparse.Namespace) -> str:
    """Reports which long convolutions of a model are replaced by `patch_model`, and how sparse its filters are."""
    from .patch import patch_model, patch_report
    from .sparsity import sparsity_report

    model = _load_model(options.model, options.trust_remote_code)
    with contextlib.suppress(PatchError):  # the report gives the reasons
        patch_model(model)
    title = f"{type(model).__name__}, {model.num_parameters():,} parameters"
    return f"{title}\n\n{patch_report(model)}\n\n{sparsity_report(model)}"


def sparsify(options: argparse.Namespace) -> str:
    """Makes the filters of a model sparse, saves it, and publishes it on request."""
    from .hub import push_to_hub, save_pretrained
    from .sparsity import sparsify_model, sparsity_report

    model = _load_model(options.model, options.trust_remote_code)
    tokenizer = _load_tokenizer(options.model, options.trust_remote_code)
    sparsify_model(model, options.keep, by=options.by, layers=options.layers)
    lines = [f"{sparsity_report(model)}", f"saved to {save_pretrained(model, options.output, tokenizer=tokenizer)}"]
    if options.push:
        lines.append(f"pushed to {push_to_hub(model, options.push, tokenizer=tokenizer).commit_url}")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> str:
    """Measures this package and its rivals on the current GPU."""
    import torch

    from .bench import bench

    if options.plot and not find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install 'hf-flashfftconv[plot]'")
    report = bench(
        options.lengths,
        batch=options.batch,
        channels=options.channels,
        dtype=getattr(torch, options.dtype),
        gated=not options.plain,
        filter_length=options.filter_length,
        long=options.long,
        quick=options.quick,
    )
    if options.json:
        report.save_json(options.json)
    if options.plot:
        report.save_plot(options.plot)
    return f"{report}"


def measure_model(options: argparse.Namespace) -> str:
    """Measures a model unpatched, patched and compiled."""
    import torch

    from .bench import bench_model

    report = bench_model(
        _load_model(options.model, options.trust_remote_code, options.random_weights),
        batch=options.batch,
        length=options.length,
        mode=options.mode,
        dtype=getattr(torch, options.dtype),
        compiled=options.compile,
        compile_mode=options.compile_mode,
        **({} if options.cache_bytes is None else {"cache_bytes": options.cache_bytes}),
    )
    if options.json:
        report.save_json(options.json)
    return f"{report}"


def env(options: argparse.Namespace) -> str:
    """Describes this installation, for bug reports."""
    import torch

    from . import __version__
    from .ops import extension

    library = extension.load()
    facts = {
        "hf-flashfftconv": __version__,
        "CUDA library": library if isinstance(library, str) else f"{extension.PATH}",
        "Python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _DISTRIBUTIONS},
        "torch's CUDA": torch.version.cuda or "none (CPU build)",
    }
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        facts[f"GPU {index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _load_model(source: str, trust_remote_code: bool, random_weights: bool = False) -> "PreTrainedModel":
    """Loads a model with the head that it was saved with, or makes it from its configuration alone."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    architecture = (config.architectures or ["Model"])[0]
    auto_classes = {
        "Model": transformers.AutoModel,
        "ForCausalLM": transformers.AutoModelForCausalLM,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "ForTextEncoding": transformers.AutoModelForSequenceClassification,  # M2-BERT's sentence embeddings
    }
    for ending, auto_class in auto_classes.items():
        if architecture.endswith(ending):
            if random_weights:
                return auto_class.from_config(config, trust_remote_code=trust_remote_code)
            return auto_class.from_pretrained(source, trust_remote_code=trust_remote_code)
    raise ValueError(f"{source} is a {architecture}; supported are class names that end in {', '.join(auto_classes)}")


def _load_tokenizer(source: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer is saved with the model: %s", error)
        return None


def _keep(text: str) -> int | float:
    """A fraction has a decimal point (or is written like 1e-2), a number of blocks has none."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction nor a number of blocks") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-flashfftconv", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", metavar="REPO_OR_DIR", help="repository on the Hugging Face Hub, or folder")
    model.add_argument("--trust-remote-code", action="store_true", help="run the model code of the repository")

    command = commands.add_parser("inspect", parents=[model], help="what is patched, what is sparse")
    command.set_defaults(run=inspect)

    command = commands.add_parser("sparsify", parents=[model], help="make the filters of a model sparse and save it")
    command.add_argument("--keep", type=_keep, required=True, help="fraction to keep, or a number of blocks per filter")
    command.add_argument("--by", choices=("bins", "energy"), default="bins", help="what the fraction counts")
    command.add_argument(
        "--layers", nargs="+", metavar="NAME", help="filters to choose, wildcards allowed; default: all"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="where to save")
    command.add_argument("--push", metavar="REPO", help="publish it there, too")
    command.set_defaults(run=sparsify)

    command = commands.add_parser("bench", help="times, memory and errors on this GPU, beside those of rivals")
    command.add_argument(
        "--lengths", nargs="+", type=_positive, metavar="L", help="sequence lengths; default: 256 to 32768"
    )
    command.add_argument("--filter-length", type=_positive, metavar="K", help="longest filters; default: no limit")
    command.add_argument("--batch", type=_positive, default=64, metavar="B")
    command.add_argument("--channels", type=_positive, default=768, metavar="H")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    command.add_argument("--plain", action="store_true", help="without gates")
    command.add_argument("--long", action="store_true", help="lengths from 65536 to 4194304, unless given")
    command.add_argument("--quick", action="store_true", help="two lengths only, unless given, and fewer repetitions")
    command.add_argument("--json", metavar="FILE", help="write the results there, too")
    command.add_argument("--plot", metavar="FILE", help="draw time over length there; needs matplotlib")
    command.set_defaults(run=measure)

    command = commands.add_parser("bench-model", parents=[model], help="a model unpatched, patched and compiled")
    command.add_argument("--random-weights", action="store_true", help="make the model from its configuration alone")
    command.add_argument("--batch", type=_positive, default=1, metavar="B")
    command.add_argument("--length", type=_positive, default=1024, metavar="L")
    command.add_argument("--mode", choices=("inference", "training"), default="inference")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of autocast")
    command.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    command.add_argument("--compile-mode", metavar="MODE", help="of torch.compile, such as reduce-overhead")
    command.add_argument("--cache-bytes", type=int, metavar="N", help="bound on filters that are kept; 0 keeps none")
    command.add_argument("--json", metavar="FILE", help="write the results there, too")
    command.set_defaults(run=measure_model)

    command = commands.add_parser("env", help="versions and devices, for bug reports")
    command.set_defaults(run=env)
    return parser


if __name__ == "__main__":
    sys.exit(main())
