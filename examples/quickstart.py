"""Train a HyenaDNA on real DNA with fast convolutions, drop most frequencies of its filters, save it and load it again.

    python examples/quickstart.py                  a tiny model from scratch, on the genome of phage lambda
    python examples/quickstart.py --model REPO     the same, starting from a HyenaDNA of the Hub or in a folder

Prints one table, and writes the model and `quickstart.png` to `--output`.
"""

import argparse
import gzip
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_flashfftconv import densify_model, patch_model, patch_report, save_pretrained, sparsify_model, unpatch_model
from hf_flashfftconv.models import HyenaDNAConfig, HyenaDNAForCausalLM, HyenaDNATokenizer

GENOME = Path(__file__).parent / "data" / "lambda_phage_NC_001416.fa.gz"
COMPLEMENT = str.maketrans("ACGT", "TGCA")
LENGTH = 512  # bases in a window
KEPT = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.0075)  # fractions of the filters' frequencies to try


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="repository or folder of a HyenaDNA to start from")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--keep", type=float, default=0.06, help="fraction of frequencies to keep (default: 0.06)")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder to write to")
    args = parser.parse_args()

    set_seed(0)
    model, tokenizer = load(args.model) if args.model else new_model()
    train, held_out = (
        tokenizer(part, add_special_tokens=False, return_tensors="pt")["input_ids"] for part in windows(read_genome())
    )
    table = [("before training", perplexity(model, held_out))]

    patch_model(model)  # the one switch: from here on the long convolutions are fast
    history = fit(model, train, held_out, args.steps, 1e-4 if args.model else 6e-3, args.output)
    table.append(("trained", perplexity(model, held_out)))
    print(f"\n{patch_report(model)}\n")

    patched = logits_and_gradients(model, held_out[:4])
    unpatched = logits_and_gradients(unpatch_model(model), held_out[:4])
    patch_model(model)

    curve = []
    for kept in KEPT:
        sparsify_model(model, kept, calibration=train[:8])
        curve.append(perplexity(model, held_out))
        densify_model(model)

    sparsify_model(model, args.keep, calibration=train[:8])
    table.append((f"sparse, {args.keep:.0%} of the frequencies", perplexity(model, held_out)))
    save_pretrained(model, args.output, tokenizer=tokenizer)
    reloaded = patch_model(AutoModelForCausalLM.from_pretrained(args.output).to(model.device))
    table.append(("sparse, saved and reloaded", perplexity(reloaded, held_out)))

    print(f"{'lambda phage, windows never trained on':<40} perplexity (4 = guessing one of four bases)")
    for name, value in table:
        print(f"  {name:<38} {value:10.4f}")
    print("Relative differences")
    for name, a, b in zip(("logits", "gradients"), patched, unpatched, strict=True):
        print(f"  {f'patched to unpatched, {name}':<38} {relative_difference(a, b):10.1e}")
    logits = [logits_and_gradients(m, held_out[:4])[0] for m in (reloaded, model)]
    print(f"  {'reloaded to saved, logits':<38} {relative_difference(*logits):10.1e}")
    plot(history, curve, table[1][1], model.config.quantization_config.masks, args.output / "quickstart.png")


def new_model() -> tuple[HyenaDNAForCausalLM, HyenaDNATokenizer]:
    """A HyenaDNA so small that it trains in a minute without a GPU."""
    # With 180 position frequencies (`emb_dim` is one more than twice that) its filters can follow the period of codons,
    # three bases: the strongest rhythm of a genome that is nearly all genes.
    config = HyenaDNAConfig(d_model=64, n_layer=2, filter_order=32, emb_dim=361, max_seq_len=LENGTH + 2)
    return HyenaDNAForCausalLM(config), HyenaDNATokenizer(model_max_length=LENGTH + 2)


def load(name: str) -> tuple[HyenaDNAForCausalLM, HyenaDNATokenizer]:
    """A model, dense even if it was saved sparse, and its tokenizer from the Hub or from a folder."""
    return densify_model(AutoModelForCausalLM.from_pretrained(name)), AutoTokenizer.from_pretrained(name)


def read_genome() -> str:
    with gzip.open(GENOME, "rt") as lines:
        return "".join(line.strip().upper() for line in lines if not line.startswith(">"))


def windows(genome: str) -> tuple[list[str], list[str]]:
    """Overlapping windows of both strands to train on, and windows of every fifth stretch of the genome, held out."""
    stretches = [genome[i : i + 4 * LENGTH] for i in range(0, len(genome), 4 * LENGTH)]
    train = [stretch for i, stretch in enumerate(stretches) if i % 5 != 4]
    train += [stretch.translate(COMPLEMENT)[::-1] for stretch in train]
    return cut(train, step=LENGTH // 4), cut(stretches[4::5], step=LENGTH)


def cut(stretches: list[str], step: int) -> list[str]:
    return [stretch[i : i + LENGTH] for stretch in stretches for i in range(0, len(stretch) - LENGTH + 1, step)]


def fit(
    model: torch.nn.Module,
    train: torch.Tensor,
    held_out: torch.Tensor,
    steps: int,
    learning_rate: float,
    folder: Path,
) -> list[dict]:
    """Trains with the transformers Trainer, and returns what it logged."""
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        logging_steps=max(1, steps // 20),
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    datasets = [[{"input_ids": window, "labels": window} for window in part] for part in (train, held_out)]
    trainer = Trainer(model=model, args=settings, train_dataset=datasets[0], eval_dataset=datasets[1])
    trainer.train()
    return trainer.state.log_history


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """The number of equally likely bases that would be as hard to guess as the next one is for the model."""
    model.eval()
    losses = [model(batch, labels=batch).loss for batch in windows.to(model.device).split(8)]
    return math.exp(torch.stack(losses).mean())


def logits_and_gradients(model: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch = batch.to(model.device)
    output = model.eval()(batch, labels=batch)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    return output.logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def plot(history: list[dict], curve: list[float], dense: float, masks: dict[str, dict], file: Path) -> None:
    """How the model learned, how many frequencies its filters need, and which ones they keep."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, (training, dropping, kept) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")

    for key, label, style in (("loss", "training", "C0-"), ("eval_loss", "held out", "C1o-")):
        steps, losses = zip(*((entry["step"], entry[key]) for entry in history if key in entry), strict=True)
        training.plot(steps, [math.exp(loss) for loss in losses], style, markersize=4, label=label)
    training.axhline(4, color="gray", linestyle=":", label="guessing one of four")
    training.set(title="Training on the genome of phage lambda", xlabel="step", ylabel="perplexity per base")
    training.legend(frameon=False)

    dropping.plot([100 * fraction for fraction in KEPT], curve, "C1o-", markersize=4, label="held out, sparse")
    dropping.axhline(dense, color="C1", linestyle="--", label="held out, dense")
    dropping.set(title="Dropping frequencies of the filters", xlabel="frequencies kept (%)", xscale="log")
    dropping.set_xticks([100 * fraction for fraction in KEPT], [f"{100 * fraction:g}" for fraction in KEPT])
    dropping.minorticks_off()
    dropping.invert_xaxis()
    dropping.legend(frameon=False)
    for axes in (training, dropping):
        axes.set_ylim(min(dense, *curve) - 0.1, 4.2)

    for layer, mask in enumerate(masks.values(), 1):
        bands = [(start / mask["fft_size"], (stop - start) / mask["fft_size"]) for start, stop in mask["ranges"]]
        kept.broken_barh(bands, (layer - 0.4, 0.8), color="C1", linewidth=1)
    kept.axvline(1 / 3, color="black", linestyle=":", label="every third base: codons")
    kept.set(title="Frequencies that are kept", xlabel="cycles per base", ylabel="layer", xlim=(0, 0.5))
    kept.set(yticks=range(1, len(masks) + 1), ylim=(0.4, len(masks) + 1))
    kept.legend(frameon=False, loc="upper left")

    for axes in (training, dropping, kept):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
