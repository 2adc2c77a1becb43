"""ConvLLaVA on transformers' modules, as their users would write it: a peer of this project for `bench.py peers`.

    python tests/with_transformers.py data/nano/convllava-nano data/nano/examples/receipt.png "What is the total?"

As a program it imports nothing of this project but constants.
"""
import sys
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessorPil, ConvNextConfig, ConvNextModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer)

from references import CLIP_MEAN, CLIP_STD, IGNORE, PAD_COLOUR, SYSTEM

PROJECTOR = "model.mm_projector."


# ---- Models with the weights of ours, which they share in memory ----
def llama_of(model):
    return LlamaForCausalLM.from_pretrained(None, config=LlamaConfig(**asdict(model.config)),
                                            state_dict=model.published_tensors(), dtype=model.norm.weight.dtype)


def convnext_of(model):
    from convnext import HF_NAMES, published_name
    tensors = {published_name(name, HF_NAMES): value for name, value in model.state_dict().items()}
    config = ConvNextConfig(num_stages=len(model.dims), depths=model.depths, hidden_sizes=model.dims)
    return ConvNextModel.from_pretrained(None, config=config, state_dict=tensors, dtype=next(model.parameters()).dtype)


# ---- An answer ----
def make_processor(side):
    """transformers' CLIP processor that resizes with Pillow, as LLaVA's did."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=3,
                                 image_mean=CLIP_MEAN, image_std=CLIP_STD)


def square(path, processor):
    """LLaVA's expand2square, then the processor: (3, H, W)."""
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), PAD_COLOUR)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return torch.from_numpy(np.stack(processor(canvas).pixel_values))[0]


@torch.inference_mode()
def answer(checkpoint, path, question):
    """The greedy answer of a checkpoint in the released layout, in float32."""
    # the parts
    llama = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    vision = ConvNextModel.from_pretrained(f"{checkpoint}/vision_tower", dtype=torch.float32)
    tokenizer = LlamaTokenizer.from_pretrained(checkpoint, legacy=False, add_bos_token=False)
    weights = {name.removeprefix(PROJECTOR): value.float()
               for name, value in load_file(f"{checkpoint}/model.safetensors").items() if name.startswith(PROJECTOR)}
    hidden, width = weights["0.weight"].shape
    projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    projector.load_state_dict(weights)

    # the prompt, with the visual tokens between two pieces of text
    pixels = square(path, make_processor(llama.config.mm_vision_resolution))
    features = vision(pixels[None]).last_hidden_state  # (1, C, H', W')
    visual = projector(features.flatten(2).transpose(1, 2))  # (1, N, hidden)
    before = [tokenizer.bos_token_id, *tokenizer.encode(SYSTEM + "USER: ", add_special_tokens=False)]
    behind = tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False)
    embed = llama.get_input_embeddings()
    prompt = torch.cat([embed(torch.tensor([before])), visual, embed(torch.tensor([behind]))], dim=1)  # (1, T, hidden)

    tokens = llama.generate(inputs_embeds=prompt, do_sample=False, max_new_tokens=512)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


# ---- Training ----
def make_training_step(vision, projector, llama, micros, num_labels, lr, max_norm):
    """A function that takes a step of phase 3 and returns its (loss, norm of the gradient).

    micros: dicts of lists of input_ids, labels and images, an image for each sample, behind its first token.
    """
    trained = [*projector.parameters(), *llama.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0, fused=True)

    def loss_of(micro):
        with torch.no_grad():
            pixels = torch.stack(micro["images"]).to(vision.dtype)
            features = vision(pixels).last_hidden_state  # (B, C, H', W')
        visual = projector(features.flatten(2).transpose(1, 2))  # (B, N, hidden)

        # each row's text and visual tokens, padded to the longest row
        embeds, labels = [], []
        for ids, label, tokens in zip(micro["input_ids"], micro["labels"], visual):
            text = llama.get_input_embeddings()(ids.clamp(min=0))  # (T, hidden)
            embeds.append(torch.cat([text[:1], tokens.to(text.dtype), text[2:]]))
            labels.append(torch.cat([label[:1], label.new_full((len(tokens),), IGNORE), label[2:]]))
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in embeds], batch_first=True)
        return llama(inputs_embeds=pad_sequence(embeds, batch_first=True), attention_mask=mask,
                     labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE), use_cache=False,
                     num_items_in_batch=num_labels).loss

    def step():
        total = 0.0
        for micro in micros:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(micro)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total, norm.item()
    return step


if __name__ == "__main__":
    print(answer(*sys.argv[1:]))
