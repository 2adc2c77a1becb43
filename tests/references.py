"""The numbers of independent implementations, for test_references.py.

    pip install transformers protobuf timm && python tests/references.py     # writes tests/golden/

Small random models are written by transformers and timm themselves, in their own layouts, beside what they make of
some inputs. A live comparison leaves timm out where it cannot be imported; what is stored has it.
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
DEPTHS, DIMS = (1, 1, 2, 1, 1), (8, 12, 16, 20, 24)
SIZES = ((128, 128), (250, 391))  # height and width
LLAMAS = {  # layers 2, hidden 32; name: key-value heads, theta, epsilon, tied embeddings
    "mha": (4, 10_000.0, 1e-5, False), "gqa": (2, 500_000.0, 1e-6, False), "tied": (1, 1_000_000.0, 1e-5, True)}
POSITIONS = (0, 1, 1000, 1999, 2000, 3998, 3999)  # of 4,000, whose logits are kept
IMAGES = {"down": (300, 500, 96), "up": (41, 30, 96), "same": (96, 96, 96)}  # height, width, resolution
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. ")
CONVERSATIONS = (  # (images, question, answer) each
    [(1, "What is the total?", "12.50")],
    [(0, "Hello, who are you?", "A model.")],
    [(1, "Read all of the text.", "Tea 3.20\nTotal 3.20"), (0, "And the date?", "2019-03-04"), (0, "Is it late?", "")],
    [(1, "Qu'est-ce que c'est, 猫か?", "Un café à 42 €.\n\n猫 \U0001F600!")],
    [(2, "Which  of both?", "  The second one \t."), (0, "12345678901234567890", "0.001")],
    [(1, "What do </s> and <image> mean? <s> <unk>", "</s> ends; <image> stays.")],
)


def random_input(*shape):
    return torch.from_numpy(np.random.RandomState(sum(shape)).standard_normal(shape).astype(np.float32))


def random_ids(length, vocabulary):
    return torch.from_numpy(np.random.RandomState(length).randint(3, vocabulary, (1, length)))


def picture(height, width):
    """Noise over a gradient: sharp edges and smooth parts."""
    noise = np.random.RandomState(height).randint(0, 90, (height, width, 3))
    slope = np.linspace(0, 165, height)[:, None, None] + np.zeros((height, width, 1))
    return Image.fromarray((noise + slope).astype(np.uint8))


def randomise(model, std=0.2):
    """Weights far from their initial values, so that no mistake hides behind a zero or a one."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * std + (1.0 if value.dim() == 1 and "bias" not in name else 0))
    return model.eval()


def convnexts(folder, expected):
    from transformers import ConvNextConfig, ConvNextModel
    for stages in (4, 5):
        model = randomise(ConvNextModel(ConvNextConfig(
            depths=DEPTHS[:stages], hidden_sizes=DIMS[:stages], num_stages=stages, drop_path_rate=0.0)))
        model.save_pretrained(folder / f"convnext-hf-{stages}")
        for height, width in SIZES:
            found = model(random_input(1, 3, height, width)).last_hidden_state
            expected[f"convnext-hf-{stages}-{height}x{width}"] = found
    return model


def timm_convnexts(folder, expected):
    from timm.layers import LayerNorm, LayerNorm2d
    from timm.models.convnext import ConvNeXt, ConvNeXtStage
    norms = dict(norm_layer=partial(LayerNorm2d, eps=1e-6), norm_layer_cl=partial(LayerNorm, eps=1e-6))
    for stages in (4, 5):
        model = ConvNeXt(depths=DEPTHS[:4], dims=DIMS[:4])
        if stages == 5:  # timm builds four
            model.stages.append(ConvNeXtStage(DIMS[3], DIMS[4], stride=2, depth=DEPTHS[4], **norms))
        randomise(model)
        tensors = {f"visual.trunk.{k}": v for k, v in model.state_dict().items() if not k.startswith("head.fc")}
        tensors |= {"logit_scale": torch.ones(()), "text.transformer.resblocks.0.ln_1.weight": torch.ones(4)}
        save_file(tensors, folder / f"convnext-timm-{stages}.safetensors")
        for height, width in SIZES:
            found = model.stages(model.stem(random_input(1, 3, height, width)))
            expected[f"convnext-timm-{stages}-{height}x{width}"] = found


def small_llama(vocabulary, heads, theta, eps, tied):
    from transformers import LlamaConfig, LlamaForCausalLM
    return randomise(LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=heads, max_position_embeddings=4096, rms_norm_eps=eps, tie_word_embeddings=tied,
        rope_parameters={"rope_theta": theta, "rope_type": "default"}, attn_implementation="eager")))


def llamas(folder, expected):
    for name, settings in LLAMAS.items():
        model = small_llama(128, *settings)
        model.save_pretrained(folder / f"llama-{name}")
        expected[f"llama-{name}"] = model(random_ids(4000, 128)).logits[0, list(POSITIONS)]


def whole(folder, expected, vision):
    """A checkpoint in the released layout, and the same put together from its parts."""
    llama = small_llama(768, 2, 10_000.0, 1e-5, False)
    projector = randomise(torch.nn.Sequential(torch.nn.Linear(DIMS[4], 32), torch.nn.GELU(), torch.nn.Linear(32, 32)))
    path = folder / "convllava"
    llama.save_pretrained(path)
    vision.save_pretrained(path / "vision_tower")
    tensors = load_file(path / "model.safetensors")
    tensors |= {f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()}
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | dict(
        model_type="llava", mm_projector_type="mlp2x_gelu", mm_hidden_size=DIMS[4], mm_vision_tower="vision_tower",
        mm_vision_resolution=128, image_aspect_ratio="pad", tokenizer_model_max_length=2048)
    (path / "config.json").write_text(json.dumps(config))
    ids = random_ids(30, 768)[0]
    visual = vision(random_input(1, 3, 192, 256)).last_hidden_state.flatten(2).transpose(1, 2)  # 3x4 of 64 pixels
    embed = llama.get_input_embeddings()
    embeds = torch.cat([embed(ids[None, :10]), projector(visual), embed(ids[None, 10:])], dim=1)
    expected["whole-embeds"], expected["whole-logits"] = embeds[0], llama(inputs_embeds=embeds).logits[0]
    expected["whole-loss"] = F.cross_entropy(expected["whole-logits"][-11:-1], ids[-10:])
    said = []
    for _ in range(64):
        said.append(llama(inputs_embeds=embeds).logits[0, -1].argmax())
        embeds = torch.cat([embeds, embed(said[-1][None, None])], dim=1)
    expected["whole-greedy"] = torch.stack(said)


def preprocessed(expected):
    import transformers
    # with Pillow, as in LLaVA: newer ones' CLIPImageProcessor resizes with torchvision where that is installed
    clip_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    mean = [0.48145466, 0.4578275, 0.40821073]
    std = [0.26862954, 0.26130258, 0.27577711]
    for name, (height, width, resolution) in IMAGES.items():
        side = max(height, width)
        padded = np.empty((side, side, 3), np.uint8)
        padded[:] = (122, 116, 104)
        top, left = (side - height) // 2, (side - width) // 2
        padded[top:top + height, left:left + width] = np.asarray(picture(height, width))
        processor = clip_processor(
            do_resize=True, size={"shortest_edge": resolution}, resample=3, do_center_crop=True, do_normalize=True,
            crop_size={"height": resolution, "width": resolution}, image_mean=mean, image_std=std)
        pixels = processor(Image.fromarray(padded), return_tensors="pt").pixel_values[0]
        expected[f"image-{name}"] = torch.as_tensor(pixels)


def tokens(folder):
    from transformers import LlamaTokenizer
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZER, legacy=False, add_bos_token=False)
    first = lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    after = lambda text: tokenizer.encode("</s>" + text, add_special_tokens=False)[1:]  # no dummy prefix there
    found = []
    for turns in CONVERSATIONS:
        ids, labels, start, encode = [1], [-100], SYSTEM, first
        for images, question, answer in turns:
            start += "USER: "
            for _ in range(images):
                piece = encode(start)
                ids, labels = ids + piece + [-200], labels + [-100] * (len(piece) + 1)
                start, encode = "\n", first
            prompt = f"{start}{question} ASSISTANT:"
            piece, silent = encode(f"{prompt} {answer}"), len(encode(prompt))
            ids, labels = ids + piece + [2], labels + [-100] * silent + piece[silent:] + [2]
            start, encode = "", after
        found.append({"turns": turns, "ids": ids, "labels": labels})
    (folder / "tokens.json").write_text(json.dumps(found))


@torch.no_grad()
def write_references(folder):
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    expected = {}
    vision = convnexts(folder, expected)
    llamas(folder, expected)
    whole(folder, expected, vision)
    preprocessed(expected)
    tokens(folder)
    try:
        timm_convnexts(folder, expected)
    except ImportError as error:
        print(f"without timm: {error}", file=sys.stderr)
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    import timm  # noqa: F401  # before anything is removed
    with tempfile.TemporaryDirectory(dir=GOLDEN.parent) as scratch:
        write_references(Path(scratch) / "golden")
        shutil.rmtree(GOLDEN)
        (Path(scratch) / "golden").rename(GOLDEN)
