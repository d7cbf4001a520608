"""Publish a model on the Hugging Face Hub, load it from there, and check that it is the same model.

    hf auth login
    python examples/quickstart.py --output quickstart
    python examples/push_to_hub.py --model quickstart --repo YOUR_NAME/hyenadna-lambda-sparse

Works against the Hub that the environment variable HF_ENDPOINT names, as all of huggingface_hub does.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_flashfftconv import push_to_hub
from hf_flashfftconv.sparsity import sparsity_report

DNA = "ATGGAAGTCAACAAAAAGCAGCTGGCTGACATTTTCGGTGCGAGTATCCGTACC"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="folder to publish (default: quickstart)")
    parser.add_argument("--repo", required=True, help="repository to create or update, such as YOUR_NAME/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    commit = push_to_hub(model, args.repo, tokenizer=tokenizer, private=args.private, tags=["dna", "biology"])
    print(f"pushed {commit.commit_url}")

    # What others do. Without `import hf_flashfftconv` they add trust_remote_code=True: the repository's own loader file
    # then imports it, or asks for it by name.
    published = AutoModelForCausalLM.from_pretrained(args.repo, revision=commit.oid)
    tokenizer = AutoTokenizer.from_pretrained(args.repo, revision=commit.oid)

    input_ids = tokenizer(DNA, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before, after = (m.eval()(input_ids).logits for m in (model, published))
    print(sparsity_report(published))
    print(f"loaded it again: logits differ by {(before - after).abs().max():.1e}")


if __name__ == "__main__":
    main()
