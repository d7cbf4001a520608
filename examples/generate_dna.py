"""Let a HyenaDNA continue real DNA, step by step with a cache, and see what the cache is worth.

    python examples/quickstart.py                  trains a tiny model and saves it in the folder `quickstart`
    python examples/generate_dna.py                continues a stretch of phage lambda that it was not trained on

Prints the continuation, how alike it is to the genome, and bases per second with and without the cache.
"""

import argparse
import gzip
import time
from collections import Counter
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_flashfftconv import patch_model

GENOME = Path(__file__).parent / "data" / "lambda_phage_NC_001416.fa.gz"
START = 8192  # the first stretch that the quickstart holds out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="quickstart", help="repository or folder of a HyenaDNA (default: quickstart)"
    )
    parser.add_argument("--prompt", type=int, default=128, help="bases of the genome to go on from (default: 128)")
    parser.add_argument("--bases", type=int, default=256, help="bases to generate (default: 256)")
    args = parser.parse_args()

    set_seed(0)
    model = patch_model(AutoModelForCausalLM.from_pretrained(args.model)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with gzip.open(GENOME, "rt") as lines:
        genome = "".join(line.strip().upper() for line in lines if not line.startswith(">"))
    prompt = genome[START : START + args.prompt]
    input_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    bases = tokenizer("ACGT", add_special_tokens=False)["input_ids"]
    others = [token for token in range(model.get_input_embeddings().num_embeddings) if token not in bases]

    def continuation(**options: bool) -> tuple[str, float]:
        start = time.perf_counter()
        ids = model.generate(input_ids, max_new_tokens=args.bases, suppress_tokens=others, **options)
        seconds = time.perf_counter() - start
        return tokenizer.decode(ids[0, input_ids.shape[1] :]).replace(" ", ""), args.bases / seconds

    sampled, _ = continuation(do_sample=True)
    print(f"prompt        {prompt[-60:]}\ncontinuation  {sampled[:60]}\n")
    print(f"{'share of bases':<14} {'A':>6} {'C':>6} {'G':>6} {'T':>6}")
    for name, dna in (("genome", genome), ("continuation", sampled)):
        print(f"{name:<14} " + " ".join(f"{Counter(dna)[base] / len(dna):6.2f}" for base in "ACGT"))

    cached, fast = continuation(do_sample=False, use_cache=True)
    whole, slow = continuation(do_sample=False, use_cache=False)
    print(f"\nwith cache {fast:.0f} bases/s, without {slow:.0f} bases/s; the same bases: {cached == whole}")


if __name__ == "__main__":
    main()
