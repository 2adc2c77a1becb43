"""The three phases: the paper's tables, what train.py's arguments make of them, and a small run of each."""
import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, losses, metrics, refused, run_of
from conftest import run as run_program
from convllava import ConvLLaVA
from convnext import CONVNEXT_L, CONVNEXT_L_DAGGER, ConvNeXt
from data.conversation import IMAGE_TOKEN
from data.dataset import read_mixture
from data.images import check_resolution
from llama import Llama, LlamaConfig

NANO = ROOT / "data" / "nano"
CHECKPOINT = NANO / "convllava-nano"


# ---- The paper's tables 12 to 15 ----
STAGES_3_TO_5 = ("vision.stages.2", "vision.stages.3", "vision.stages.4")
LAST_18_BLOCKS = (*(f"vision.stages.2.blocks.{i}" for i in range(12, 27)), "vision.stages.3")


@pytest.mark.parametrize("table, phase, lr, batch, samples, trained", [
    ("table12", 1, 1e-3, 256, 558_000, ("projector",)),
    ("table12", 2, 2e-5, 128, 665_000, ("projector", "llama")),
    ("table13", 1, 1e-3, 256, 558_000, ("projector",)),
    ("table13", 2, 2e-5, 256, 1_200_000, (*LAST_18_BLOCKS, "projector", "llama")),
    ("table13", 3, 2e-5, 128, 665_000, ("projector", "llama")),
    ("table14", 1, 3e-4, 256, 1_200_000, ("vision.stages.4", "projector")),
    ("table14", 2, 2e-5, 256, 1_200_000, (*STAGES_3_TO_5, "projector", "llama")),
    ("table14", 3, 2e-5, 128, 665_000, ("projector", "llama")),
    ("table15", 1, 3e-4, 256, 2_000_000, ("vision.stages.4", "projector")),
    ("table15", 2, 2e-5, 256, 2_900_000, (*STAGES_3_TO_5, "projector", "llama")),
    ("table15", 3, 2e-5, 128, 665_000, ("projector", "llama"))])
def test_recipes_are_the_papers_tables(table, phase, lr, batch, samples, trained):
    run = run_of("--phase", phase, "--preset", "convllava-7b", "--recipe", table)
    assert (run.phase.lr, run.phase.batch, run.phase.samples) == (lr, batch, samples)
    assert run.phase.trained == trained

    # what is trained of a model of full size, to the last parameter
    has_stage5 = table in ("table14", "table15")
    model = full_size(CONVNEXT_L_DAGGER if has_stage5 else CONVNEXT_L)
    train.freeze(model, run.phase.trained)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == any(name.startswith(part + ".") for part in trained), name


@pytest.mark.parametrize("table, resolution, stage5", [
    ("table12", 768, None), ("table13", 768, None),
    ("table14", 1536, (6, 3072)), ("table15", 1536, (6, 3072))])
def test_four_stages_begin_at_768_pixels_and_five_at_1536(table, resolution, stage5):
    run = run_of("--phase", 1, "--preset", "convllava-7b", "--recipe", table)
    assert (run.resolution, run.stage5) == (resolution, stage5)


def test_phases_have_the_papers_names():
    names = ["projector initialization", "vision-language pretraining", "visual instruction tuning"]
    for table in ("table13", "table14", "table15"):
        assert [phase.name for phase in train.RECIPES[table]] == names
    assert [phase.name for phase in train.RECIPES["table12"]] == [names[0], names[2]]


def test_table_13_trains_the_last_18_of_convnexts_36_blocks():
    model = full_size(CONVNEXT_L)
    train.freeze(model, train.RECIPES["table13"][1].trained)
    blocks = [block for stage in model.vision.stages for block in stage.blocks]
    assert [block.gamma.requires_grad for block in blocks] == [False] * 18 + [True] * 18


def test_table_12_has_no_third_phase():
    with pytest.raises(ValueError, match="--recipe table12 has no phase 3: its last is 2"):
        run_of("--phase", 3, "--recipe", "table12")


@pytest.mark.parametrize("depth", [3, 6, 9])  # tables 10 and 11
def test_the_depth_of_stage_5_can_be_chosen(depth):
    run = run_of("--phase", 1, "--preset", "convllava-7b", "--stage5-depth", depth)
    assert run.stage5 == (depth, 3072)


@pytest.mark.parametrize("first", [2, 3, 4])  # table 9
def test_the_first_stage_that_phase_2_trains_can_be_chosen(first):
    stages = tuple(f"vision.stages.{i}" for i in range(first - 1, 5))
    assert run_of("--phase", 2, "--first-stage", first).phase.trained == (*stages, "projector", "llama")


def test_the_first_stage_of_a_recipe_with_four_stages_ends_with_the_fourth():
    run = run_of("--phase", 2, "--recipe", "table13", "--first-stage", 3)
    assert run.phase.trained == ("vision.stages.2", "vision.stages.3", "projector", "llama")


def test_a_depth_of_0_leaves_stage_5_out():
    run = run_of("--phase", 1, "--stage5-depth", 0)
    assert run.stage5 is None and run.phase.trained == ("projector",)


def full_size(sizes):
    """ConvLLaVA-7B without memory for its weights, and with one of the Llama's layers, which are alike."""
    with torch.device("meta"):
        return ConvLLaVA(ConvNeXt(**sizes), Llama(LlamaConfig(num_hidden_layers=1)))


# ---- What is trained ----
LLAMA = {"llama.embed_tokens", "llama.layers.0", "llama.layers.1", "llama.norm", "llama.lm_head"}
PROJECTOR = {"projector.0", "projector.2"}
TRAINED = {  # by each phase of table 15
    1: {"vision.stages.4"} | PROJECTOR,
    2: set(STAGES_3_TO_5) | PROJECTOR | LLAMA,
    3: PROJECTOR | LLAMA}


def module_of(name):
    """What a parameter is part of: "llama.layers.0.mlp.up_proj.weight" of "llama.layers.0"."""
    words = name.split(".")
    return ".".join(words[:3] if words[1] in ("stages", "layers") else words[:2])


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_all_parameters_of_the_trained_modules_are_trainable_and_no_others(model, phase):
    train.freeze(model, train.RECIPES["table15"][phase - 1].trained)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (module_of(name) in TRAINED[phase]), name


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_steps_change_the_trained_modules_and_leave_the_frozen_ones(model, phase):
    train.freeze(model, train.RECIPES["table15"][phase - 1].trained)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0)
    ids = torch.tensor([1, IMAGE_TOKEN, 7, 8, 9])
    for _ in range(3):
        model([ids], [torch.randn(3, 64, 64)], [ids.clamp(min=3)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert {module_of(name) for name in changed} == TRAINED[phase]


def test_a_recipe_that_trains_what_the_model_lacks_is_refused():
    fault = (r"the recipe trains vision.stages.4, and the model has 4 stages of \[3, 3, 27, 3\] blocks: "
             "choose another --recipe, or --stage5-depth 0")
    with pytest.raises(ValueError, match=fault):
        train.freeze(full_size(CONVNEXT_L), train.RECIPES["table15"][1].trained)


# ---- The learning rate, and a step's other settings ----
def test_the_learning_rate_warms_up_over_3_percent_of_the_steps():
    rates = [train.learning_rate(step, 1000, 2e-5) for step in range(1000)]
    assert rates[:30] == pytest.approx([2e-5 * step / 30 for step in range(1, 31)])
    assert rates[29] == max(rates) == 2e-5


def test_the_learning_rate_falls_to_zero_along_a_cosine():
    rates = [train.learning_rate(step, 1000, 2e-5) for step in range(1000)]
    assert rates[515] == pytest.approx(1e-5, rel=1e-12)  # half of the 970 steps after the warm-up
    assert rates[30:] == sorted(rates[30:], reverse=True) and 0 < rates[-1] < 1e-9


def test_the_peak_is_the_rate_of_both_steps_where_there_are_only_two():
    assert [train.learning_rate(step, 2, 1.0) for step in range(2)] == [1, 1]


def test_a_step_has_the_scheduled_rate_no_weight_decay_and_clipped_gradients(
        options, monkeypatch, tmp_path):
    """Tables 12 to 15, and clipping at a norm of 1, here of gradients made a hundred times as large.

    The norms of clipped gradients are within 1e-3 of what the logged norms, of before, let expect.
    """
    taken = []
    step, clip = torch.optim.AdamW.step, torch.nn.utils.clip_grad_norm_

    def recorded_step(optimizer, *arguments):
        group, = optimizer.param_groups
        norm = torch.stack([parameter.grad.norm() for parameter in group["params"]]).norm().item()
        taken.append((group["lr"], group["weight_decay"], norm))
        return step(optimizer, *arguments)

    def enlarged_clip(parameters, largest):
        for parameter in parameters:
            parameter.grad.mul_(100)
        return clip(parameters, largest)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", enlarged_clip)
    run = run_of(*options(steps=4), "--lr", 0.1)
    train.train(run, train.find_data(run)[0])

    rates, decays, norms = zip(*taken)
    assert rates == tuple(train.learning_rate(i, 4, 0.1) for i in range(4))
    assert set(decays) == {0}
    before = [line["grad_norm"] for line in metrics(tmp_path / "runs")]
    assert min(before) < 1 < max(before)
    assert norms == pytest.approx([min(1, norm) for norm in before], rel=1e-3)


# ---- The arguments, and what follows from them ----
@pytest.mark.parametrize("preset, phase, lr, batch, micro_batch, steps, workers, resolution", [
    ("nano", 1, 2e-3, 8, 8, 400, 1, 512),
    ("nano", 2, 8e-4, 8, 8, 1000, 1, None),
    ("nano", 3, 8e-4, 8, 8, 650, 1, None),
    ("convllava-7b", 1, 3e-4, 256, 4, None, 4, 1536),
    ("convllava-7b", 2, 2e-5, 256, 2, None, 4, None),
    ("convllava-7b", 3, 2e-5, 128, 4, None, 4, None)])
def test_a_phase_and_a_preset_settle_everything(
        preset, phase, lr, batch, micro_batch, steps, workers, resolution):
    """Without steps it is an epoch, and without a resolution the checkpoint's."""
    run = run_of("--phase", phase, "--preset", preset)
    assert (run.phase.lr, run.phase.batch, run.micro_batch) == (lr, batch, micro_batch)
    assert run.accumulation == batch // micro_batch
    assert (run.steps, run.workers, run.resolution) == (steps, workers, resolution)
    assert (run.args.save_every, run.args.keep, run.args.seed, run.sharded) == (250, 2, 0, False)


def test_what_follows_from_the_arguments_does_not_change_later():
    run = run_of("--phase", 1)
    with pytest.raises(FrozenInstanceError):
        run.steps = 3


@pytest.mark.parametrize("phase, validation", [
    (1, "val-captions.json"), (2, "val-captions.json"), (3, "val-instructions.json")])
def test_the_small_model_has_data_of_its_own(phase, validation):
    run = run_of("--phase", phase)
    assert run.is_generated
    pairs = read_mixture(NANO / f"phase{phase}.json")
    assert train.find_data(run) == (pairs, (NANO / "out" / validation, NANO / "out"))


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_recipe_has_a_mixture_for_each_phase_at_full_size(phase):
    run = run_of("--phase", phase, "--preset", "convllava-7b", "--recipe", "table14")
    mixture = ROOT / "data" / "table14" / f"phase{phase}.json"
    assert not run.is_generated and train.find_data(run) == (read_mixture(mixture), None)


@pytest.mark.parametrize("preset", ["nano", "convllava-7b"])
def test_data_that_are_named_replace_the_presets(preset):
    mixture = ROOT / "data" / "table14" / "phase1.json"
    run = run_of("--phase", 1, "--preset", preset, "--data", mixture)
    assert not run.is_generated and train.find_data(run) == (read_mixture(mixture), None)


def test_validation_images_are_in_the_first_image_folder():
    files = ["--data", "a.json", "b.json", "--images", "a", "b", "--val", __file__]
    sources, validation = train.find_data(run_of("--phase", 3, *files))
    assert sources == [("a.json", "a"), ("b.json", "b")] and validation == (__file__, "a")


def test_evaluating_needs_no_training_data(tmp_path):
    run = run_of("--phase", 3, "--evaluate", "any", "--val", __file__, "--images", tmp_path)
    assert not run.is_generated and train.find_data(run) == ([], (__file__, str(tmp_path)))


def test_evaluating_takes_the_checkpoints_resolution():
    assert run_of("--phase", 1).resolution == 512
    assert run_of("--phase", 1, "--evaluate", "any").resolution is None


@pytest.mark.parametrize("batch, micro_batch, world, nearest", [
    (8, 16, 3, 9), (8, 16, 7, 7), (128, 16, 12, 132), (256, 16, 24, 264), (5, 2, 1, 4), (250, 16, 4, 256)])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(
        batch, micro_batch, world, nearest):
    command = ["--phase", 1, "--micro-batch", micro_batch, "--batch"]
    fault = f"--batch {batch} does not divide .*the nearest that does is {nearest}$"
    with pytest.raises(ValueError, match=fault):
        run_of(*command, batch, world=world)
    run = run_of(*command, nearest, world=world)
    assert run.micro_batch * run.accumulation * world == nearest


def test_one_process_shards_nothing():
    assert not run_of("--phase", 3, "--parallel", "fsdp").sharded
    assert run_of("--phase", 3, "--parallel", "fsdp", world=2).sharded
    assert not run_of("--phase", 3, world=2).sharded


@pytest.mark.parametrize("resolution", [64, 22 * 64])
def test_a_resolution_that_leaves_room_for_text_is_accepted(resolution):
    check_resolution(resolution, compression=64, max_length=23 ** 2)


@pytest.mark.parametrize("resolution, fault", [
    (-64, "multiple of 64"), (0, "multiple of 64"), (32, "multiple of 64"), (1440, "multiple of 64"),
    (23 * 64, "makes 529 visual tokens, and a sample has at most 529 tokens")])
def test_a_resolution_that_leaves_no_room_for_text_is_refused(resolution, fault):
    with pytest.raises(ValueError, match=fault):
        check_resolution(resolution, compression=64, max_length=23 ** 2)


# ---- Wrong arguments, folders and files are told in one sentence, before training ----
@pytest.mark.parametrize("arguments, fault", [
    (["--seed", -1], "--seed is -1"),
    (["--seed", 2 ** 32], "--seed is 4294967296: take 0 to 4294967295"),
    (["--workers", -1], "--workers is -1"),
    (["--workers", 1000], "--workers is 1000: take 0 to 999"),
    (["--stage5-depth", 1000], "--stage5-depth is 1000: take 0 to 999"),
    (["--lr", "inf"], "--lr is inf"), (["--lr", 0], "--lr is 0"),
    (["--batch", 0], "--batch is 0"), (["--micro-batch", 0], "--micro-batch is 0"),
    (["--steps", 0], "--steps is 0"), (["--resolution", 0], "--resolution is 0"),
    (["--save-every", 0], "--save-every is 0"), (["--keep", 0], "--keep is 0")])
def test_arguments_out_of_range_are_refused(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        run_of("--phase", 1, *arguments)


@pytest.mark.parametrize("arguments, fault", [
    (["--recipe", "table12", "--stage5-depth", 3],
     "table12 has four stages and trains no stage 5: leave --stage5-depth out"),
    (["--first-stage", 2], "phase 1 of table15 trains no stages 2 to 4: leave --first-stage out")])
def test_parts_that_a_phase_does_not_train_cannot_be_chosen(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        run_of("--phase", 1, *arguments)


def test_the_largest_seed_is_accepted():
    assert run_of("--phase", 1, "--seed", 2 ** 32 - 1).args.seed == 2 ** 32 - 1


def test_a_phase_has_to_be_named():
    with pytest.raises(SystemExit, match="2"):
        train.arguments([])


@pytest.mark.parametrize("arguments, fault", [
    (["--data", "a.json", "b.json", "--images", "a"], "one folder for each file"),
    (["--images", "a"], "training needs --data"),
    (["--images", "a", "--val", __file__], "training needs --data"),
    (["--val", __file__], "training needs --data"),
    (["--evaluate", "any", "--val", __file__], "--val needs --images"),
    (["--data", __file__, "--images", "a", "--val", "gone.json"], "no file of .* questions at gone.json")])
def test_data_that_are_not_all_named_are_refused(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        train.find_data(run_of("--phase", 3, *arguments))


@pytest.mark.parametrize("arguments, words", [
    (["--data", "gone.json"], ["gone.json is missing"]),
    (["--images", "gone"], ["no image folder at gone"]),
    (["--vision", "gone.safetensors"], ["gone.safetensors"]),
    (["--resume"], ["leave --resume out"]),
    (["--batch", 5, "--micro-batch", 2], ["--batch 5 does not divide", "is 4"]),
    (["--resolution", 100], ["multiple of 64"]),
    (["--resolution", 6400], ["makes 10000 visual tokens"]),
    (["--phase", 2], ["phase1, which is no folder: run phase 1 first"]),
    (["--phase", 2, "--init", CHECKPOINT, "--stage5-depth", 3], ["--stage5-depth 3", "a stage 5 of 2 blocks"])])
def test_wrong_arguments_are_one_sentence(options, ended, tmp_path, arguments, words):
    refused(ended(train.main, *options(), *arguments), *words)
    assert not (tmp_path / "runs").exists()


def test_the_program_ends_with_one_sentence(command):
    refused(run_program(*command(phase=2)), "train.py: phase 2 starts from", "run phase 1 first")


@pytest.mark.parametrize("arguments", [[], ["--vision", "gone"], ["--llm", "gone"]])
def test_phase_1_at_full_size_needs_both_pretrained_parts(ended, tmp_path, arguments):
    start = ["--phase", 1, "--preset", "convllava-7b", "--out", tmp_path]
    done = ended(train.main, *start, *arguments)
    refused(done, "phase 1 starts from pretrained parts: give --vision and --llm")


def test_evaluating_at_full_size_needs_validation_data(ended, tmp_path):
    start = ["--phase", 1, "--preset", "convllava-7b", "--out", tmp_path]
    refused(ended(train.main, *start, "--evaluate", CHECKPOINT), "--evaluate needs --val")


def test_a_folder_that_holds_other_things_is_not_replaced(options, ended, tmp_path):
    (tmp_path / "runs" / "phase1").mkdir(parents=True)
    (tmp_path / "runs" / "phase1" / "notes.txt").write_text("mine")
    refused(ended(train.main, *options()), "phase1 holds notes.txt, which no save has written")
    assert not list((tmp_path / "runs").glob("*metrics*"))  # before training


def test_a_folder_without_the_images_is_told_in_a_sentence(command, forked, tmp_path):
    """By a data process, which ends then."""
    (tmp_path / "empty").mkdir()
    done = forked(*command(images=tmp_path / "empty"), "--workers", 1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("train.py: no sample can be read from here on: ")
    assert "there is no image" in sentence


def test_a_full_gpu_is_one_sentence(options, ended, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation.")
    monkeypatch.setattr(train, "train", full)
    refused(ended(train.main, *options()), "memory is full", "--micro-batch", "--checkpointing")


# ---- The data of a phase ----
def with_malformed(pages, folder, num_malformed, total):
    """Writes an annotation file of `total` captions, the first of which have no conversations."""
    entries = (json.loads((pages / "captions.json").read_text()) * 20)[:total]
    for i in range(num_malformed):
        entries[i] = {"id": entries[i]["id"], "image": entries[i]["image"]}
    (folder / "malformed.json").write_text(json.dumps(entries))
    return folder / "malformed.json"


def test_more_than_1_percent_malformed_samples_are_refused_before_training(
        options, ended, pages, tmp_path):
    file = with_malformed(pages, tmp_path, num_malformed=3, total=200)
    done = ended(train.main, *options(file))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for i in range(3):
        assert f"unreadable: {file}, sample {i}: it has no list of conversations" in done.stderr
    assert "train.py: 3 samples could not be read, more than 1%" in done.stderr.splitlines()[-1]
    assert metrics(tmp_path / "runs") == []  # no step
    assert not (tmp_path / "runs" / "phase1").exists()


def test_a_file_without_a_readable_sample_is_told_in_a_sentence(options, ended, pages, tmp_path):
    file = with_malformed(pages, tmp_path, num_malformed=3, total=3)
    refused(ended(train.main, *options(file)), "no sample can be read", f"{file}, sample 0: it has no list")


def test_1_percent_malformed_samples_are_named_and_left_out(options, capsys, pages, tmp_path):
    file = with_malformed(pages, tmp_path, num_malformed=2, total=200)
    run = run_of(*options(file, steps=2))
    train.train(run, train.find_data(run)[0])
    errors = capsys.readouterr().err
    assert errors.count("unreadable: ") == 2
    assert f"{file}, sample 1: it has no list of conversations" in errors
    assert "(2 unreadable samples)" in errors
    assert [line["unreadable"] for line in metrics(tmp_path / "runs")] == [2, 2]


def test_a_batch_larger_than_the_data_is_filled_up_with_samples_drawn_again(options, tmp_path):
    run = run_of(*options(batch=32, steps=1))  # of 24 captions
    sources, _ = train.find_data(run)
    *_, dataset, sampler = train.prepare(run, sources)
    batch, = sampler.global_batches()
    assert len(batch) == 32 and set(batch) == set(range(24))

    train.train(run, sources)
    line, = metrics(tmp_path / "runs")
    labels = [dataset[i]["labels"][1:] for i in batch]
    assert line["labels"] == sum(int((label >= 0).sum()) for label in labels)


# ---- Where a phase starts, and how one follows another ----
NANO_VISION = NANO / "backbones" / "open_clip_model.safetensors"
NANO_LLM = NANO / "backbones" / "vicuna-nano"


@pytest.mark.parametrize("arguments, vision, llm", [
    ([], NANO_VISION, NANO_LLM), (["--vision", "a"], "a", NANO_LLM),
    (["--vision", "a", "--llm", "b"], "a", "b")])
def test_phase_1_joins_pretrained_parts_and_a_new_stage_5(monkeypatch, arguments, vision, llm):
    """The small model's, where no others are named."""
    monkeypatch.setattr(ConvLLaVA, "from_backbones", lambda *sizes: sizes)
    run = run_of("--phase", 1, *arguments)
    assert train.load_model(run, None, "cpu") == (vision, llm, 512, (2, 320), "cpu")


@pytest.fixture(scope="module")
def published_weights():
    return ConvLLaVA.from_pretrained(CHECKPOINT, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_phase_starts_from_any_checkpoint(published_weights, phase):
    """With its weights and at its resolution; phase 1 at the preset's, which is the same here."""
    model = train.load_model(run_of("--phase", phase, "--init", CHECKPOINT), None, "cpu")
    assert model.resolution == 512
    weights = model.state_dict()
    assert weights.keys() == published_weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, published_weights[name]), name


@pytest.mark.parametrize("phase", [1, 3])
def test_a_phase_goes_on_at_another_resolution(phase):
    run = run_of("--phase", phase, "--init", CHECKPOINT, "--resolution", 256)
    assert train.load_model(run, None, "cpu").resolution == 256


@pytest.fixture(scope="module")
def three_phases(tmp_path_factory, backbones, pages):
    """The folder of a run of each phase: of two steps, and the third of an epoch of 24 samples."""
    folder = tmp_path_factory.mktemp("runs")
    start = ["--vision", backbones / "vision", "--llm", backbones / "llm", "--resolution", 64, "--batch", 4,
             "--data", pages / "instructions.json", "--images", pages, "--val", pages / "val.json",
             "--workers", 0, "--out", folder]
    for phase in (1, 2, 3):
        length = ["--preset", "convllava-7b", "--micro-batch", 2] if phase == 3 else ["--steps", 2]
        run = run_of("--phase", phase, *start, *length)
        sources, validation = train.find_data(run)
        train.evaluate(run, validation, train.train(run, sources))
    return folder


def test_three_phases_follow_each_other(three_phases):
    assert ConvLLaVA.from_pretrained(three_phases / "phase3").resolution == 64
    for phase in (1, 2, 3):
        assert not (three_phases / f"phase{phase}.partial").exists()


def test_a_phase_without_steps_is_an_epoch(three_phases):
    assert [len(losses(three_phases, phase)) for phase in (1, 2, 3)] == [2, 2, 24 // 4]


def test_a_phase_is_validated_on_every_question(three_phases):
    for phase in (1, 2, 3):
        validation = metrics(three_phases, phase)[-1]
        assert validation["val_loss"] > 0
        assert sum(total for _, total in validation["right"].values()) == 6


def test_phases_train_the_stages_of_table_15_after_each_other(three_phases):
    def kernel(phase, stage):
        tensors = load_file(three_phases / f"phase{phase}" / "vision_tower" / "model.safetensors")
        return tensors[f"encoder.stages.{stage - 1}.layers.0.dwconv.weight"]

    assert torch.equal(kernel(1, stage=1), kernel(2, stage=1))
    assert not torch.equal(kernel(1, stage=3), kernel(2, stage=3))
    assert torch.equal(kernel(2, stage=5), kernel(3, stage=5))


def test_a_data_process_that_is_not_forked_reads_the_same(
        command, options, forked, three_phases, pages, tmp_path):
    """As on macOS: it gets the dataset pickled. The losses of two steps are equal to the bit."""
    data, start = pages / "instructions.json", ["--init", three_phases / "phase2", "--dtype", "fp32"]
    run = run_of(*options(data, phase=3, out=tmp_path / "none"), *start)
    train.train(run, train.find_data(run)[0])

    done = forked(*command(data, phase=3, out=tmp_path / "one"), *start, "--workers", 1)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert losses(tmp_path / "none", 3) == losses(tmp_path / "one", 3)
    assert len(losses(tmp_path / "one", 3)) == 2
