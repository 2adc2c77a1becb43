"""ConvLLaVA: a five-stage ConvNeXt, a two-layer projector and a Vicuna (paper, section 3.1 and figure 1b).

    model = ConvLLaVA.from_pretrained("ConvLLaVA-sft-1536", device="cuda", dtype=torch.bfloat16)
    prompt, _ = encode_conversation(model.tokenizer, [(1, "What is this?", None)])
    for tokens in model.generate([prompt], [square(read_image("cat.jpg"), model.resolution)]):
        print(tokens)
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from convnext import HF_NAMES, ConvNeXt
from data.conversation import IGNORE, IMAGE_TOKEN
from data.weights import REPLACED, assign, find_tensors, read_json, replacing, require, write_tensors
from llama import KVCache, Llama, LlamaConfig, Tokenizer

PROJECTOR = "model.mm_projector."
VISION = "model.vision_tower.vision_tower."
LOSS_CHUNK = 2048  # labelled positions whose logits exist at the same time


class ConvLLaVA(nn.Module):
    """vision: image to map; projector: map to visual tokens; llama: visual and text tokens to text."""

    def __init__(self, vision, llama, tokenizer=None, resolution=1536, max_length=2048):
        super().__init__()
        self.vision, self.llama, self.tokenizer = vision, llama, tokenizer
        self.resolution = resolution  # of the square images that it was trained on, in pixels
        self.max_length = max_length  # tokens of a training sample, visual ones included
        hidden = llama.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(vision.dims[-1], hidden), nn.GELU(), nn.Linear(hidden, hidden))

    @property
    def device(self):
        return self.projector[0].weight.device

    def encode_images(self, images):
        """Images [(3, H, W)] -> visual tokens [(N, hidden)]: rows of the map from the top, projected.

        Entries that are visual tokens already are returned as they are: an image of many questions is encoded once.
        """
        tokens = list(images)
        for shape in sorted({image.shape for image in images if image.dim() == 3}):  # one batch for each size
            which = [i for i, image in enumerate(images) if image.shape == shape]
            pixels = [images[i].to(self.device, non_blocking=images[i].is_pinned()) for i in which]
            pixels = torch.stack(pixels).to(self.projector[0].weight.dtype)
            maps = self.vision(pixels).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
            for i, projected in zip(which, self.projector(maps)):
                tokens[i] = projected
        return tokens

    def forward(self, input_ids, images=(), labels=None, divisor=None):
        """Ids [(T,)], -200 where the next image goes, and images [(3, H, W)], or their visual tokens, in that order.

        Without labels: logits (B, T', V), T' with the visual tokens spliced in, shorter rows padded on the right.
        With labels [(T,)], -100 for none: the sum of the tokens' cross entropies over `divisor`, which is by
        default the number of labels here, so that the loss is their mean.
        """
        tokens = self.encode_images(images)
        embeds, targets = splice(self.llama.embed_tokens, input_ids, tokens, labels)
        if labels is None:
            return self.llama(embeds=pad(embeds))
        embeds, targets = pad(embeds), pad(targets, IGNORE)
        if not len(images) and self.training:  # the vision takes part all the same, so that DDP finds its gradients
            size = self.vision.compression
            embeds = embeds + 0 * self.encode_images([torch.zeros(3, size, size)])[0].sum()
        hidden = self.llama.hidden(embeds)
        return next_token_loss(self.llama, hidden, targets, divisor)

    @torch.inference_mode()
    def generate(self, prompts, images=(), max_new_tokens=512, temperature=0.0, top_p=1.0, generator=None):
        """Prompts [(T,)] and their images or visual tokens; yields for each step one token id per prompt.

        The id is None where a prompt's answer has ended. Temperature 0 is greedy. Ends with every prompt's </s>, after
        max_new_tokens, or at the context's end.
        """
        limit = self.llama.config.max_position_embeddings
        rows, _ = splice(self.llama.embed_tokens, prompts, self.encode_images(images))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        longest = int(lengths.max())
        if longest >= limit:
            raise ValueError(f"the prompt has {longest} tokens with the image's, and the model reads {limit}: "
                             "use a smaller resolution or a shorter text")
        steps = min(max_new_tokens, limit - longest)
        embeds = pad(rows, left=True)
        padding = longest - lengths if (lengths != longest).any() else None
        cache = KVCache(self.llama.config, len(rows), longest + steps, self.device, embeds.dtype)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for step in range(steps):
            logits = self.llama.lm_head(self.llama.hidden(embeds, cache, padding)[:, -1]).float()  # (B, V)
            chosen = choose(logits, temperature, top_p, generator)
            yield [None if end else token for token, end in zip(chosen.tolist(), ended.tolist())]
            ended |= chosen == Tokenizer.eos
            if ended.all():
                return
            embeds = self.llama.embed_tokens(chosen)[:, None]

    @classmethod
    def from_backbones(cls, vision, llm, resolution, stage5=None, device="cpu"):
        """Joins pretrained parts, in float32, with a new projector: where phase 1 starts.

        vision: an OpenCLIP file or a ConvNeXt folder; llm: a Llama folder; stage5: (depth, dim) of a new fifth stage.
        """
        vision = ConvNeXt.from_pretrained(vision, device, torch.float32)
        llama, tokenizer = Llama.from_pretrained(llm, device, torch.float32), Tokenizer.of(llm)
        with torch.device(device):
            if stage5 and len(vision.stages) == 4:
                vision.add_stage(*stage5)
            return cls(vision, llama, tokenizer, resolution, min(2048, llama.config.max_position_embeddings))

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, vision_tower=None):
        """Loads a checkpoint in the released layout.

        The vision weights are taken from `vision_tower` where given, else from the checkpoint's own tensors, its
        vision_tower/ folder, or the folder that mm_vision_tower names. Raises ValueError where one lacks.
        """
        path = Path(path)
        if not path.is_dir():
            older = Path(f"{path}{REPLACED}")
            interrupted = f": a save was interrupted, rename {older} to it" if older.is_dir() else ""
            raise ValueError(f"there is no checkpoint folder at {path}{interrupted}")
        config, fields = LlamaConfig.from_json(path / "config.json"), read_json(path / "config.json")
        require(path / "config.json", fields, mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad",
                mm_use_im_start_end=False, mm_use_im_patch_token=False)
        resolution, max_length = (fields.get(key, default) for key, default in (
            ("mm_vision_resolution", 1536), ("tokenizer_model_max_length", 2048)))
        named = fields.get("mm_vision_tower") or ""
        if not (isinstance(resolution, int) and isinstance(max_length, int) and isinstance(named, str)):
            raise ValueError(f"{path}/config.json: mm_vision_resolution and tokenizer_model_max_length should be whole "
                             "numbers and mm_vision_tower a name")
        tokenizer = Tokenizer.of(path)
        language, inside, projector = find_tensors(path), {}, {}
        for prefix, part in ((VISION, inside), (PROJECTOR, projector)):
            part |= {k.removeprefix(prefix): language.pop(k) for k in list(language) if k.startswith(prefix)}
        with torch.device("meta"):
            llama = Llama(config)
        llama.load_named(language, path, device, dtype)
        dtype = llama.norm.weight.dtype  # one for all: published vision weights may have another
        towers = [path / "vision_tower"] + ([named, path.parent / Path(named).name] if named else [])
        tower = vision_tower or next((tower for tower in towers if (Path(tower) / "config.json").is_file()), None)
        if inside and not vision_tower:
            vision = ConvNeXt.from_named(inside, HF_NAMES, path, device, dtype)
        elif tower:
            vision = ConvNeXt.from_pretrained(tower, device, dtype)
        else:
            raise ValueError(f"{path} comes without vision weights: download {named or 'them'} and give its folder "
                             "with --vision-tower")
        with torch.device("meta"):
            model = cls(vision, llama, tokenizer, resolution, max_length)
        names = {name: name for name in model.projector.state_dict()}
        assign(model.projector, projector, names, f"{path} ({PROJECTOR}*)", device, dtype)
        return model.eval()

    def save_pretrained(self, folder, dtype=None):
        """Writes a checkpoint in the released layout; one that is there already is replaced when this is whole."""
        with replacing(folder) as new:
            self.write(new, dtype)

    def write(self, folder, dtype=None):
        """Writes the files of a checkpoint into a folder that is there."""
        dtype = dtype or self.llama.norm.weight.dtype
        projector = {PROJECTOR + name: value for name, value in self.projector.state_dict().items()}
        write_tensors(folder, self.llama.named_tensors() | projector, dtype)
        self.vision.save_pretrained(folder / "vision_tower", dtype, self.resolution)
        self.llama.write_configs(folder, dtype, dict(
            architectures=["LlavaLlamaForCausalLM"], model_type="llava", mm_vision_tower="vision_tower",
            mm_projector_type="mlp2x_gelu", mm_hidden_size=self.vision.dims[-1], mm_vision_resolution=self.resolution,
            image_aspect_ratio="pad", tokenizer_model_max_length=self.max_length, use_mm_proj=True))
        self.tokenizer.save(folder, self.max_length)


def splice(embed_tokens, input_ids, visual_tokens, labels=None):
    """Puts each image's visual tokens where input_ids hold -200: embeddings [(T', hidden)] and labels [(T',)]."""
    images, embeds, targets = iter(visual_tokens), [], []
    places = [(torch.as_tensor(ids) == IMAGE_TOKEN).nonzero().flatten().tolist() for ids in input_ids]
    wanted = sum(map(len, places))
    if wanted != len(visual_tokens):
        raise ValueError(f"input_ids hold {wanted} image tokens, and there are {len(visual_tokens)} images")
    for row, ids in enumerate(input_ids):
        ids = torch.as_tensor(ids, device=embed_tokens.weight.device)
        text = embed_tokens(ids.clamp(min=0))
        label = torch.full_like(ids, IGNORE) if labels is None else torch.as_tensor(labels[row], device=ids.device)
        parts, kept, start = [], [], 0
        for end in places[row]:
            visual = next(images).to(text.dtype)
            parts += [text[start:end], visual]
            kept += [label[start:end], label.new_full((len(visual),), IGNORE)]
            start = end + 1
        embeds.append(torch.cat(parts + [text[start:]]))
        targets.append(torch.cat(kept + [label[start:]]))
    return embeds, targets


def pad(rows, value=0, left=False):
    """Rows [(T, ...)] of different lengths -> (B, longest T, ...)."""
    side = "left" if left else "right"
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def next_token_loss(llama, hidden, targets, divisor=None):
    """Cross entropy of hidden states (B, T, C) against the next position's targets (B, T); logits only for those."""
    labelled = targets[:, 1:] != IGNORE
    hidden, targets = hidden[:, :-1][labelled], targets[:, 1:][labelled]  # (N, C), (N,)
    return sum_of_losses(llama.lm_head, hidden, targets) / max(1, len(targets) if divisor is None else divisor)


def sum_of_losses(head, hidden, targets):
    """Sum of the cross entropies of hidden states (N, C) against targets (N,), LOSS_CHUNK of them at a time."""
    one = lambda h, t: F.cross_entropy(head(h).float(), t, reduction="sum")
    if len(targets) <= LOSS_CHUNK:
        return one(hidden, targets)
    return sum(checkpoint(one, h, t, use_reentrant=False)
               for h, t in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)))


def choose(logits, temperature, top_p, generator=None):
    """Next tokens (B,) from logits (B, V): the likeliest, or a draw from the smallest set that holds top_p."""
    if temperature < 1e-6:  # to divide by it could overflow
        return logits.argmax(-1)
    ranked, order = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1).sort(-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked > top_p] = 0  # the first token always stays
    return order.gather(-1, torch.multinomial(ranked, 1, generator=generator)).squeeze(-1)
