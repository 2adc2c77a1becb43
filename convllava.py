"""ConvLLaVA: a five-stage ConvNeXt, a two-layer projector and a Vicuna (paper, section 3.1 and figure 1b).

    model = ConvLLaVA.from_pretrained("ConvLLaVA-sft-1536", device="cuda", dtype=torch.bfloat16)
    print(model.answer("cat.jpg", "What is this?"))

The longer way, for those who want its parts:

    prompt, _ = encode_conversation(model.tokenizer, [(1, "What is this?", None)])    # 1 image
    pixels = square(read_image("cat.jpg"), model.resolution)                          # (3, 1536, 1536)
    for (token,) in model.generate([prompt], [pixels]):
        print(model.tokenizer.decode([token]))
"""
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from convnext import HF_NAMES, ConvNeXt
from data.conversation import IGNORE, IMAGE_TOKEN, Tokenizer, encode_conversation
from data.images import any_aspect, read_image, square
from data.weights import find_tensors, interrupted_saves, load_into, read_json, replacing, require, write_tensors
from llama import KVCache, Llama, LlamaConfig

LOSS_CHUNK = 2048  # labelled positions whose logits exist at the same time

# the parts of a released checkpoint, by what their names begin with; all other tensors are the language model's
PROJECTOR_PREFIX = "model.mm_projector."
VISION_PREFIX = "model.vision_tower.vision_tower."


class Spans(NamedTuple):
    """Which of a prompt's positions are an image's and which are text. Attention's keys have the same order."""
    images: list  # of (slice, rows, columns): an image's visual tokens, row by row
    texts: list  # of slices: before the first image, between two, and after the last, which is the question


class ConvLLaVA(nn.Module):
    """vision: image to map; projector: map to visual tokens; llama: visual and text tokens to text.

    resolution: side in pixels of the square images that it was trained on; max_length: tokens of a training sample,
    visual ones counted.
    """

    def __init__(self, vision, llama, tokenizer=None, resolution=1536, max_length=2048):
        super().__init__()
        self.vision, self.llama, self.tokenizer = vision, llama, tokenizer
        self.resolution, self.max_length = resolution, max_length
        hidden_size = llama.config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(vision.dims[-1], hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    @property
    def device(self):
        return self.projector[0].weight.device

    def encode_images(self, images):
        """Images [(3, H, W)] -> visual tokens [(N, hidden)]: the map's positions, row by row, projected.

        Entries that are visual tokens already are returned as they are: an image of many questions is encoded once.
        """
        tokens = list(images)
        sizes = sorted({image.shape for image in images if image.dim() == 3})
        for size in sizes:  # one batch for each
            indices = [i for i, image in enumerate(images) if image.shape == size]
            # a copy from pinned memory need not be waited for
            pixels = [images[i].to(self.device, non_blocking=images[i].is_pinned()) for i in indices]
            pixels = torch.stack(pixels).to(self.projector[0].weight.dtype)
            features = self.vision(pixels)  # (B, C, H', W')
            features = features.flatten(2).transpose(1, 2)  # (B, C, H', W') -> (B, N, C), N = H' * W'
            for i, projected in zip(indices, self.projector(features)):
                tokens[i] = projected  # (N, hidden)
        return tokens

    def forward(self, input_ids, images=(), labels=None, divisor=None):
        """input_ids: [(T,)], -200 in each image's place; images: in that order, [(3, H, W)], or visual tokens [(N, C)].

        Without labels: logits (B, T', V), T' with the visual tokens spliced in, shorter rows padded on the right.
        With labels [(T,)], -100 for none: the sum of the tokens' cross entropies over `divisor`, which is by
        default the number of labels here, so that the loss is their mean.
        """
        visual_tokens = self.encode_images(images)
        embeds, targets = splice(self.llama.embed_tokens, input_ids, visual_tokens, labels)
        if labels is None:
            return self.llama(embeds=pad(embeds))
        embeds, targets = pad(embeds), pad(targets, IGNORE)
        if not len(images) and self.training:
            # DDP expects a gradient for every parameter, so a text-only batch encodes a blank image, times zero.
            side = self.vision.compression
            blank, = self.encode_images([torch.zeros(3, side, side)])
            embeds = embeds + 0 * blank.sum()
        hidden = self.llama.hidden(embeds)  # (B, T', hidden)
        return next_token_loss(self.llama, hidden, targets, divisor)

    def answer(self, image, question, history=(), max_new_tokens=512, temperature=0.0, top_p=1.0, generator=None,
               on_text=None):
        """The answer to a question about an image, as text.

        image: a path, the visual tokens that `encode_image` made of one, or None for a question without an image.
        history: [(question, answer)] before this one. on_text: is called with each piece of text as it comes.
        Raises ValueError where the image cannot be read or the prompt is too long.
        """
        images = [] if image is None else [image if isinstance(image, torch.Tensor) else self.encode_image(image)]
        questions = [*history, (question, None)]
        num_images = [len(images)] + [0] * len(history)  # the image stands at the front of the first question
        turns = [(count, *turn) for count, turn in zip(num_images, questions)]
        prompt, _ = encode_conversation(self.tokenizer, turns)

        tokens, text = [], ""
        for (token,) in self.generate([prompt], images, max_new_tokens, temperature, top_p, generator):
            if token == self.tokenizer.eos:
                break
            tokens.append(token)
            longer = self.tokenizer.decode(tokens)
            if not longer.endswith("\ufffd"):  # it would be a character whose last tokens are still to come
                if on_text:
                    on_text(longer[len(text):])
                text = longer
        return text

    @torch.inference_mode()
    def encode_image(self, image, resolution=None, keep_ratio=False):
        """Transforms and encodes an image, read already or at a path: its visual tokens (N, hidden).

        resolution: in pixels, of the square or, with keep_ratio, of the short side (paper, section 4.3); by default the
        one that the model was trained on. Raises ValueError where that makes no visual token or too many.
        """
        self.check_resolution(resolution)
        resolution = resolution or self.resolution
        side = self.vision.compression
        limit = self.llama.config.max_position_embeddings
        is_path = isinstance(image, (str, os.PathLike))
        transform = any_aspect if keep_ratio else square
        pixels = transform(read_image(image) if is_path else image, resolution)  # (3, H, W)
        if (pixels.shape[1] // side) * (pixels.shape[2] // side) >= limit:
            name = image if is_path else "the image"
            raise ValueError(f"{name} makes more visual tokens than the {limit} tokens that the model reads: use a "
                             "smaller --resolution, or leave --any-aspect out")
        return self.encode_images([pixels])[0]

    def check_resolution(self, resolution=None):
        """Raises ValueError where no image of this resolution could be seen."""
        resolution = resolution or self.resolution
        side = self.vision.compression
        limit = self.llama.config.max_position_embeddings
        if resolution < side:
            raise ValueError(f"--resolution is {resolution}: it should be at least {side}, one visual token")
        if (resolution // side) ** 2 >= limit:  # before pixels are made of it
            raise ValueError(f"--resolution {resolution} makes more visual tokens than the {limit} tokens "
                             "that the model reads")

    def spans(self, prompt, images):
        """Where images (3, H, W) and text stand in a prompt (T,). In a batch, padding comes before that."""
        spans = Spans([], [])
        start = shift = 0  # shift: how much further right than in the prompt
        places = [i for i, token in enumerate(prompt) if token == IMAGE_TOKEN]
        for place, image in zip(places, images, strict=True):
            rows, columns = (pixels // self.vision.compression for pixels in image.shape[1:])
            spans.texts.append(slice(start, place + shift))
            start = place + shift + rows * columns
            spans.images.append((slice(place + shift, start), rows, columns))
            shift += rows * columns - 1
        spans.texts.append(slice(start, len(prompt) + shift))
        return spans

    @torch.inference_mode()
    def generate(self, prompts, images=(), max_new_tokens=512, temperature=0.0, top_p=1.0, generator=None):
        """Prompts [(T,)] and their images or visual tokens; yields for each step one token id per prompt.

        The id is None where a prompt's answer has ended. Temperature 0 is greedy. Ends with every prompt's </s>, after
        max_new_tokens, or at the context's end.
        """
        limit = self.llama.config.max_position_embeddings
        longest = max(len(prompt) for prompt in prompts)
        if longest >= limit:  # before it takes memory
            raise ValueError(f"the prompt has {longest} tokens, and the model reads {limit}: use a shorter text")

        # prompts of different lengths are padded on the left, so that all of them end where the answers begin
        rows, _ = splice(self.llama.embed_tokens, prompts, self.encode_images(images))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        longest = int(lengths.max())
        if longest >= limit:
            raise ValueError(f"the prompt has {longest} tokens with the image's, and the model reads {limit}: "
                             "use a smaller resolution or a shorter text")
        embeds = pad(rows, left=True)  # (B, longest, hidden)
        padding = longest - lengths if (lengths != longest).any() else None  # (B,)

        # the first step reads the prompts into the cache, each later one the token before it
        steps = min(max_new_tokens, limit - longest)
        cache = KVCache(self.llama.config, len(rows), longest + steps, self.device, embeds.dtype)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for _ in range(steps):
            last = self.llama.hidden(embeds, cache, padding)[:, -1]  # (B, hidden)
            logits = self.llama.lm_head(last)  # (B, V)
            if not logits.isfinite().all():
                raise ValueError("the model's scores are not finite: a weight is damaged, the training has diverged, or "
                                 "values are too large for float16, where --dtype bf16 holds them")
            chosen = choose(logits.float(), temperature, top_p, generator)  # (B,)
            yield [None if is_over else token for token, is_over in zip(chosen.tolist(), ended.tolist())]
            ended |= chosen == Tokenizer.eos
            if ended.all():
                return
            embeds = self.llama.embed_tokens(chosen)[:, None]  # (B, 1, hidden)

    @classmethod
    def from_backbones(cls, vision, llm, resolution, stage5=None, device="cpu"):
        """Joins pretrained parts, in float32, with a new projector: where phase 1 starts.

        vision: an OpenCLIP file or a ConvNeXt folder; llm: a Llama folder; stage5: (depth, dim) of a new fifth stage.
        """
        vision = ConvNeXt.from_pretrained(vision, device, torch.float32)
        llama = Llama.from_pretrained(llm, device, torch.float32)
        tokenizer = load_tokenizer(llm, llama.config)
        with torch.device(device):
            if stage5 and len(vision.stages) == 4:
                vision.add_stage(*stage5)
            # LLaVA trains with at most 2048 tokens
            return cls(vision, llama, tokenizer, resolution, min(2048, llama.config.max_position_embeddings))

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, vision_tower=None):
        """Loads a checkpoint in the released layout.

        vision_tower: a ConvNeXt folder to take in place of the checkpoint's own vision weights. Raises ValueError where
        a file is missing, damaged or of another model.
        """
        path = Path(path)
        if not path.is_dir():
            older = [save for save in interrupted_saves(path) if ".replaced-" in save.name]
            interrupted = f": a save was interrupted, rename {older[0]} to it" if older else ""
            raise ValueError(f"there is no checkpoint folder at {path}{interrupted}")
        config = LlamaConfig.from_json(path / "config.json")
        resolution, max_length, tower_name = read_multimodal_config(path / "config.json")
        tokenizer = load_tokenizer(path, config)

        # the checkpoint's tensors are the language model's, the projector's and, in some, the vision's
        language, projector, vision_tensors = find_tensors(path), {}, {}
        for prefix, part in ((VISION_PREFIX, vision_tensors), (PROJECTOR_PREFIX, projector)):
            for name in [name for name in language if name.startswith(prefix)]:
                part[name.removeprefix(prefix)] = language.pop(name)

        with torch.device("meta"):
            llama = Llama(config)
        llama.assign_published(language, path, device, dtype)
        dtype = llama.norm.weight.dtype  # one for all: published vision weights may have another
        if vision_tensors and not vision_tower:
            vision = ConvNeXt.from_tensors(vision_tensors, HF_NAMES, path, device, dtype)
        else:
            vision = ConvNeXt.from_pretrained(vision_tower or find_vision_tower(path, tower_name), device, dtype)

        with torch.device("meta"):
            model = cls(vision, llama, tokenizer, resolution, max_length)
        names = {name: name for name in model.projector.state_dict()}
        load_into(model.projector, projector, names, f"{path} ({PROJECTOR_PREFIX}*)", device, dtype)
        return model.eval()

    def save_pretrained(self, folder, dtype=None):
        """Writes a checkpoint in the released layout; one that is there already is replaced when this is complete."""
        with replacing(folder) as new:
            self.write_files(new, dtype)

    def write_files(self, folder, dtype=None):
        """Writes the files of a checkpoint into a folder that is there."""
        dtype = dtype or self.llama.norm.weight.dtype
        projector = {PROJECTOR_PREFIX + name: value for name, value in self.projector.state_dict().items()}
        write_tensors(folder, self.llama.published_tensors() | projector, dtype)
        self.vision.save_pretrained(folder / "vision_tower", dtype, self.resolution)
        self.llama.write_configs(folder, dtype, dict(
            architectures=["LlavaLlamaForCausalLM"], model_type="llava", mm_vision_tower="vision_tower",
            mm_projector_type="mlp2x_gelu", mm_hidden_size=self.vision.dims[-1],
            mm_vision_resolution=self.resolution, image_aspect_ratio="pad",
            tokenizer_model_max_length=self.max_length, use_mm_proj=True))
        self.tokenizer.save(folder, self.max_length)

    def with_weights(self, weights):
        """A copy of the model with other weights {name: tensor}, for example those gathered from a sharded model."""
        with torch.device("meta"):
            vision = ConvNeXt(self.vision.depths, self.vision.dims)
            model = ConvLLaVA(vision, Llama(self.llama.config), self.tokenizer, self.resolution, self.max_length)
        model.load_state_dict(weights, assign=True)
        return model


def load_tokenizer(folder, config):
    """The tokenizer of a Llama folder. Raises ValueError where it has another size than the embedding."""
    path = Path(folder) / "tokenizer.model"
    tokenizer = Tokenizer(path)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"{path} has {len(tokenizer)} pieces, and config.json says {config.vocab_size}")
    return tokenizer


def read_multimodal_config(path):
    """What a released config.json says beyond a Llama's: (resolution, max_length, name of the vision tower or "")."""
    fields = read_json(path)
    require(path, fields, mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad", mm_use_im_start_end=False,
            mm_use_im_patch_token=False)
    resolution = fields.get("mm_vision_resolution", 1536)
    max_length = fields.get("tokenizer_model_max_length", 2048)
    tower_name = fields.get("mm_vision_tower") or ""
    if not (isinstance(resolution, int) and isinstance(max_length, int) and isinstance(tower_name, str)):
        raise ValueError(f"{path}: mm_vision_resolution and tokenizer_model_max_length should be whole "
                         "numbers and mm_vision_tower a name")
    return resolution, max_length, tower_name


def find_vision_tower(path, name):
    """The ConvNeXt folder of a checkpoint: inside of it, where its config says, or one of that name beside it."""
    places = [path / "vision_tower"]
    if name:
        places += [Path(name), path.parent / Path(name).name]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ValueError(f"{path} comes without vision weights: download {name or 'them'} and give its folder "
                     "with --vision-tower")


def splice(embed_tokens, input_ids, visual_tokens, labels=None):
    """Puts each image's visual tokens where input_ids hold -200: embeddings [(T', hidden)] and labels [(T',)]."""
    places = [(torch.as_tensor(ids) == IMAGE_TOKEN).nonzero().flatten().tolist() for ids in input_ids]
    num_places = sum(len(row) for row in places)
    if num_places != len(visual_tokens):
        raise ValueError(f"input_ids hold {num_places} image tokens, and there are {len(visual_tokens)} images")

    visual_tokens = iter(visual_tokens)
    embeds, targets = [], []
    for row, ids in enumerate(input_ids):
        ids = torch.as_tensor(ids, device=embed_tokens.weight.device)
        text = embed_tokens(ids.clamp(min=0))  # (T, hidden), with a row in each image's place that is left out below
        label = torch.full_like(ids, IGNORE) if labels is None else torch.as_tensor(labels[row], device=ids.device)

        # text and images by turns, and the text after the last image
        embed_parts, label_parts, start = [], [], 0
        for place in places[row]:
            visual = next(visual_tokens).to(text.dtype)  # (N, hidden)
            embed_parts += [text[start:place], visual]
            label_parts += [label[start:place], label.new_full((len(visual),), IGNORE)]
            start = place + 1
        embeds.append(torch.cat([*embed_parts, text[start:]]))
        targets.append(torch.cat([*label_parts, label[start:]]))
    return embeds, targets


def pad(rows, value=0, left=False):
    """Rows [(T, ...)] of different lengths -> (B, longest T, ...)."""
    side = "left" if left else "right"
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def next_token_loss(llama, hidden, targets, divisor=None):
    """Cross entropy of hidden states (B, T, C) against the next position's targets (B, T).

    Only positions with a label become logits: in a sample of 576 visual tokens most have none.
    """
    targets = targets[:, 1:]  # each position predicts the next one
    labelled = targets != IGNORE
    hidden, targets = hidden[:, :-1][labelled], targets[labelled]  # (N, C), (N,)
    divisor = len(targets) if divisor is None else divisor
    return sum_of_losses(llama.lm_head, hidden, targets) / max(1, divisor)


def sum_of_losses(head, hidden, targets):
    """Sum of the cross entropies of hidden states (N, C) against targets (N,).

    Logits (N, V) are the largest tensor of a step. Above LOSS_CHUNK positions they are made in chunks, and made again
    in the backward pass.
    """
    chunk_loss = lambda h, t: F.cross_entropy(head(h).float(), t, reduction="sum")
    if len(targets) <= LOSS_CHUNK:
        return chunk_loss(hidden, targets)
    chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
    return sum(checkpoint(chunk_loss, h, t, use_reentrant=False) for h, t in chunks)


def choose(logits, temperature, top_p, generator=None):
    """Next tokens (B,) from logits (B, V): the likeliest, or a draw from the smallest set that holds top_p."""
    if temperature < 1e-6:  # greedy; to divide by it could overflow
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0, so that exp does not overflow
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)  # (B, V)
    before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens together
    probabilities[before > top_p] = 0  # the first token always stays
    drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    return order.gather(-1, drawn).squeeze(-1)
