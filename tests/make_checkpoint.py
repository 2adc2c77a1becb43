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
from llama import Llama, LlamaConfig, Tokenizer  # noqa: E402


def make_tokenizer(path, pieces):
    """A tokenizer of as many pieces, of made-up words."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(60_000)]
    lines = (" ".join(rng.choices(words, k=20)) for _ in range(20_000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(path.with_suffix("")), vocab_size=pieces, model_type="bpe",
        split_digits=True, byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    return Tokenizer(path)


def random_weights(model):
    """Fills a model on the meta device with views of one block of random numbers: it takes 128 MiB of memory."""
    block = (torch.randn(2 ** 26, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    tensors = {}
    for name, value in model.state_dict().items():
        if value.dim() == 1:
            tensors[name] = torch.full(value.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        else:
            row = value[0].numel()
            view = block.as_strided((len(value), row), ((len(block) - row) // len(value), 1))
            tensors[name] = view if value.dim() == 2 else view.reshape(value.shape)
    model.load_state_dict(tensors, assign=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with torch.device("meta"):
        model = ConvLLaVA(ConvNeXt(**CONVNEXT_L_DAGGER), Llama(LlamaConfig()))
    random_weights(model)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model.tokenizer = make_tokenizer(Path(scratch) / "tokenizer.model", model.llama.config.vocab_size)
            model.save_pretrained(folder)
    except (ValueError, OSError) as error:
        print(f"make_checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
