"""Writes a ConvLLaVA-7B of random bf16 weights in the released layout: 14 GB to measure loading and speed with.

    python tests/make_checkpoint.py /tmp/random-7b
    python sample.py data/nano/examples/receipt.png "What is the total?" --checkpoint /tmp/random-7b --max-new-tokens 16
"""
import argparse
import random
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from convllava import ConvLLaVA  # noqa: E402
from convnext import CONVNEXT_L_DAGGER, ConvNeXt  # noqa: E402
from data.conversation import Tokenizer  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402


def make_tokenizer(path, num_pieces):
    """Trains a tokenizer of so many pieces on made-up words."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(60_000)]
    lines = (" ".join(rng.choices(words, k=20)) for _ in range(20_000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(path.with_suffix("")), vocab_size=num_pieces, model_type="bpe",
        split_digits=True, byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    return Tokenizer(path)


def set_random_weights(model):
    """Gives a model on the meta device weights that are views of one block of random numbers: 128 MiB of memory."""
    block = (torch.randn(2 ** 26, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    tensors = {}
    for name, value in model.state_dict().items():
        if value.dim() == 1:
            tensors[name] = torch.full(value.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
            continue
        # each row begins a little further on in the block, and overlaps the next
        row = value[0].numel()
        stride = (len(block) - row) // len(value)
        view = block.as_strided((len(value), row), (stride, 1))
        tensors[name] = view.reshape(value.shape)
    model.load_state_dict(tensors, assign=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with torch.device("meta"):
        model = ConvLLaVA(ConvNeXt(**CONVNEXT_L_DAGGER), Llama(LlamaConfig()))
    set_random_weights(model)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model.tokenizer = make_tokenizer(Path(scratch) / "tokenizer.model", model.llama.config.vocab_size)
            model.save_pretrained(folder)
    except (ValueError, OSError) as error:
        print(f"make_checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
