"""The numbers of independent implementations, for test_references.py.

    pip install transformers protobuf timm && python tests/references.py     # writes tests/golden/

transformers and timm write small random models, each in its own layout. Beside them stand
expected.safetensors, what these models compute from some inputs, attention.safetensors, where the
Llamas look, and tokens.json, conversations as tokens. Where timm is not installed, write_references
leaves its part out; tests/golden has it.
"""
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = Path(__file__).parent / "tokenizer"

# ConvNeXt: depths and widths of the stages, and the images, height and width
DEPTHS, DIMS = (1, 1, 2, 1, 1), (8, 12, 16, 20, 24)
SIZES = ((128, 128), (250, 391))

# Llama, of 2 layers and a hidden size of 32
LLAMAS = {
    "mha": dict(kv_heads=4, theta=10_000.0, eps=1e-5, tied=False),
    "gqa": dict(kv_heads=2, theta=500_000.0, eps=1e-6, tied=False),
    "tied": dict(kv_heads=1, theta=1_000_000.0, eps=1e-5, tied=True),
}
PROMPT_LENGTHS, LENGTH = (9, 4), 13  # two prompts in a batch, and the tokens with the 4 that follow
POSITIONS = (0, 1, 1000, 1999, 2000, 3998, 3999)  # of 4,000: those whose logits are stored

# Preprocessing: height, width, resolution
IMAGES = {"down": (300, 500, 96), "up": (41, 30, 96), "same": (96, 96, 96)}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
PAD_COLOUR = (122, 116, 104)

# Tokens: each turn is (number of images, question, answer)
IMAGE_TOKEN, IGNORE, BOS, EOS = -200, -100, 1, 2
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. ")
CONVERSATIONS = (
    [(1, "What is the total?", "12.50")],
    [(0, "Hello, who are you?", "A model.")],
    [(1, "Read all of the text.", "Tea 3.20\nTotal 3.20"), (0, "And the date?", "2019-03-04"),
     (0, "Is it late?", "")],
    [(1, "Qu'est-ce que c'est, 猫か?", "Un café à 42 €.\n\n猫 \U0001F600!")],
    [(2, "Which  of both?", "  The second one \t."), (0, "12345678901234567890", "0.001")],
    [(1, "What do </s> and <image> mean? <s> <unk>", "</s> ends; <image> stays.")],
)


# ---- Inputs, which do not depend on torch's random numbers ----

def random_input(*shape):
    random = np.random.RandomState(sum(shape))
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


def random_ids(length, vocabulary):
    """Ids (1, length), none of them a special token."""
    random = np.random.RandomState(length)
    return torch.from_numpy(random.randint(3, vocabulary, (1, length)))


def picture(height, width):
    """Noise over a gradient: sharp edges and smooth parts."""
    noise = np.random.RandomState(height).randint(0, 90, (height, width, 3))
    slope = np.linspace(0, 165, height)[:, None, None] + np.zeros((height, width, 1))
    return Image.fromarray((noise + slope).astype(np.uint8))


# ---- Models ----

def randomise(model, std=0.2):
    """Weights far from their initial values, so that no mistake hides behind a zero or a one."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            is_scale = value.dim() == 1 and "bias" not in name
            mean = 1.0 if is_scale else 0.0
            value.copy_(mean + std * torch.randn_like(value))
    return model.eval()


def write_convnexts(folder, expected):
    """transformers' ConvNeXt of four and of five stages; returns that of five."""
    from transformers import ConvNextConfig, ConvNextModel
    for stages in (4, 5):
        config = ConvNextConfig(depths=DEPTHS[:stages], hidden_sizes=DIMS[:stages],
                                num_stages=stages, drop_path_rate=0.0)
        model = randomise(ConvNextModel(config))
        model.save_pretrained(folder / f"convnext-hf-{stages}")
        for height, width in SIZES:
            features = model(random_input(1, 3, height, width)).last_hidden_state  # (1, C, H', W')
            expected[f"convnext-hf-{stages}-{height}x{width}"] = features
    return model


def write_timm_convnexts(folder, expected):
    """timm's ConvNeXt of four and of five stages, under the names of an OpenCLIP file."""
    from timm.layers import LayerNorm, LayerNorm2d
    from timm.models.convnext import ConvNeXt, ConvNeXtStage
    norms = dict(norm_layer=partial(LayerNorm2d, eps=1e-6),
                 norm_layer_cl=partial(LayerNorm, eps=1e-6))
    for stages in (4, 5):
        model = ConvNeXt(depths=DEPTHS[:4], dims=DIMS[:4])
        if stages == 5:  # timm builds four
            model.stages.append(
                ConvNeXtStage(DIMS[3], DIMS[4], stride=2, depth=DEPTHS[4], **norms))
        randomise(model)

        # an OpenCLIP file holds a text tower too, and no classifier
        tensors = {f"visual.trunk.{name}": value for name, value in model.state_dict().items()
                   if not name.startswith("head.fc")}
        tensors["logit_scale"] = torch.ones(())
        tensors["text.transformer.resblocks.0.ln_1.weight"] = torch.ones(4)
        save_file(tensors, folder / f"convnext-timm-{stages}.safetensors")

        for height, width in SIZES:
            stem = model.stem(random_input(1, 3, height, width))
            expected[f"convnext-timm-{stages}-{height}x{width}"] = model.stages(stem)


def make_llama(vocabulary, kv_heads, theta, eps, tied):
    from transformers import LlamaConfig, LlamaForCausalLM
    return randomise(LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=4096,
        rms_norm_eps=eps, tie_word_embeddings=tied,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        attn_implementation="eager")))


def write_llamas(folder, expected):
    for name, settings in LLAMAS.items():
        model = make_llama(128, **settings)
        model.save_pretrained(folder / f"llama-{name}")
        logits = model(random_ids(4000, 128)).logits  # (1, 4000, 128)
        expected[f"llama-{name}"] = logits[0, list(POSITIONS)]


def padded_ids():
    """Ids (2, LENGTH), of which each row's first are padding, and the number of these (2,)."""
    padding = torch.tensor([max(PROMPT_LENGTHS) - length for length in PROMPT_LENGTHS])
    return random_ids(2 * LENGTH, 128).view(2, LENGTH), padding


def write_attentions(folder):
    """attention.safetensors: what each position from the prompts' last on looks at, by the Llamas in the folder."""
    from transformers import LlamaForCausalLM
    ids, padding = padded_ids()
    is_text = torch.arange(LENGTH) >= padding[:, None]  # (2, LENGTH)
    attentions = {}
    for name in LLAMAS:
        model = LlamaForCausalLM.from_pretrained(folder / f"llama-{name}", attn_implementation="eager")
        layers = model(ids, attention_mask=is_text.long(), output_attentions=True).attentions
        # [(2, heads, LENGTH, LENGTH)] -> (layers, 2, heads, positions, LENGTH)
        attentions[name] = torch.stack(layers)[:, :, :, max(PROMPT_LENGTHS) - 1:].contiguous()
    save_file(attentions, folder / "attention.safetensors")


def write_convllava(folder, expected, vision):
    """A checkpoint in the released layout, and what its parts compute when put together by hand."""
    llama = make_llama(768, kv_heads=2, theta=10_000.0, eps=1e-5, tied=False)
    projector = randomise(torch.nn.Sequential(
        torch.nn.Linear(DIMS[4], 32), torch.nn.GELU(), torch.nn.Linear(32, 32)))

    # the checkpoint
    path = folder / "convllava"
    llama.save_pretrained(path)
    vision.save_pretrained(path / "vision_tower")
    tensors = load_file(path / "model.safetensors")
    for name, value in projector.state_dict().items():
        tensors[f"model.mm_projector.{name}"] = value
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config |= dict(
        model_type="llava", mm_projector_type="mlp2x_gelu", mm_hidden_size=DIMS[4],
        mm_vision_tower="vision_tower", mm_vision_resolution=128, image_aspect_ratio="pad",
        tokenizer_model_max_length=2048)
    (path / "config.json").write_text(json.dumps(config))

    # 10 tokens, an image of 3x4 visual tokens, and 20 tokens, the last 10 of which have labels
    ids = random_ids(30, 768)[0]
    features = vision(random_input(1, 3, 192, 256)).last_hidden_state  # (1, C, 3, 4)
    visual = projector(features.flatten(2).transpose(1, 2))  # (1, 12, hidden)
    embed = llama.get_input_embeddings()
    embeds = torch.cat([embed(ids[None, :10]), visual, embed(ids[None, 10:])], dim=1)  # (1, 42, C)
    logits = llama(inputs_embeds=embeds).logits[0]  # (42, vocabulary)
    expected["whole-embeds"] = embeds[0]
    expected["whole-logits"] = logits
    expected["whole-loss"] = F.cross_entropy(logits[-11:-1], ids[-10:])

    # 64 greedy tokens, each from the full sequence
    greedy = []
    for _ in range(64):
        token = llama(inputs_embeds=embeds).logits[0, -1].argmax()
        greedy.append(token)
        embeds = torch.cat([embeds, embed(token[None, None])], dim=1)
    expected["whole-greedy"] = torch.stack(greedy)


# ---- Images and text ----

def write_images(expected):
    """LLaVA's padding to a square, then transformers' CLIP processor."""
    import transformers
    # The processor that resizes with Pillow, as LLaVA's did. In newer versions CLIPImageProcessor
    # resizes with torchvision where that is installed.
    clip_processor = getattr(transformers, "CLIPImageProcessorPil", None)
    clip_processor = clip_processor or transformers.CLIPImageProcessor
    for name, (height, width, resolution) in IMAGES.items():
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        padded = np.empty((side, side, 3), np.uint8)
        padded[:] = PAD_COLOUR
        padded[top:top + height, left:left + width] = np.asarray(picture(height, width))

        processor = clip_processor(
            do_resize=True, size={"shortest_edge": resolution}, resample=3, do_center_crop=True,
            crop_size={"height": resolution, "width": resolution}, do_normalize=True,
            image_mean=CLIP_MEAN, image_std=CLIP_STD)
        pixels = processor(Image.fromarray(padded), return_tensors="pt").pixel_values[0]
        expected[f"image-{name}"] = torch.as_tensor(pixels)


def write_tokens(folder):
    """Conversations in the tokens of transformers' LlamaTokenizer, put together as LLaVA does."""
    from transformers import LlamaTokenizer
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZER, legacy=False, add_bos_token=False)

    def with_prefix(text):
        """At the start and after an image the text gets SentencePiece's dummy prefix, a space."""
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def without_prefix(text):
        """After </s> it does not: the text is encoded behind one, which is cut off again."""
        return tokenizer.encode("</s>" + text, add_special_tokens=False)[1:]

    conversations = []
    for turns in CONVERSATIONS:
        ids, labels = [BOS], [IGNORE]
        text, encode = SYSTEM, with_prefix
        for num_images, question, answer in turns:
            text += "USER: "
            for _ in range(num_images):
                before = encode(text)
                ids += before + [IMAGE_TOKEN]
                labels += [IGNORE] * (len(before) + 1)
                text, encode = "\n", with_prefix

            prompt = f"{text}{question} ASSISTANT:"
            num_prompt = len(encode(prompt))
            turn = encode(f"{prompt} {answer}") + [EOS]
            ids += turn
            labels += [IGNORE] * num_prompt + turn[num_prompt:]
            text, encode = "", without_prefix
        conversations.append({"turns": turns, "ids": ids, "labels": labels})
    (folder / "tokens.json").write_text(json.dumps(conversations))


@torch.no_grad()
def write_references(folder):
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    expected = {}
    vision = write_convnexts(folder, expected)
    write_llamas(folder, expected)
    write_convllava(folder, expected, vision)
    write_images(expected)
    write_tokens(folder)
    write_attentions(folder)
    try:
        write_timm_convnexts(folder, expected)
    except ImportError as error:
        print(f"without timm: {error}", file=sys.stderr)
    expected = {name: value.contiguous() for name, value in expected.items()}
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    import timm  # noqa: F401  # before anything is removed
    with tempfile.TemporaryDirectory(dir=GOLDEN.parent) as scratch:
        write_references(Path(scratch) / "golden")
        shutil.rmtree(GOLDEN)
        (Path(scratch) / "golden").rename(GOLDEN)
