"""Distillation: the losses against plain references, every family, and runs with a teacher through the real program."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from programs import (
    CLASSES,
    COMMON,
    DIGITS,
    MODEL,
    MODEL_KWARGS,
    NAME,
    PIAD,
    TRAIN,
    Road,
    assert_same,
    run,
    save_subnetwork,
)
from test_families import FAMILIES, some_widths
from test_unlabelled import encoder, no_labels, photos, unlabelled  # noqa: F401 fixtures
from timm.utils import AverageMeter
from tiny import SHAPE, draw_parameters, random_backbone, random_data
from torch import Tensor
from torch.nn import functional as F

import supernet
from datasets import preprocessing
from engine import train_one_epoch
from files import load_checkpoint
from models.backbone import blocks_of, create_backbone, full_widths
from models.elastic import make_elastic, set_widths
from models.parts import EMBEDDING
from piad.distillation import BlockTokens, Distillation, StudentOutputs, Teacher, check_teacher, distance
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from training import Training
from utils import UserError

CPU = torch.device("cpu")
TEACH = ["--teacher-model", "self", "--distillation-type", "soft"]
ALONE = [*TEACH, "--distillation-alpha", "1"]


# ---------------------------------------------------------------------------------------------------------------------
# The losses


def softmax(row: list[float], tau: float) -> list[float]:
    total = sum(math.exp(value / tau) for value in row)
    return [math.exp(value / tau) / total for value in row]


def reference(student: Tensor, teacher: Tensor, kind: str, tau: float) -> float:
    """The mean over images of tau^2 * KL(teacher || student), or of the cross-entropy with the teacher's class."""
    found = 0.0
    for own, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        if kind == "hard":
            found -= math.log(softmax(own, 1.0)[theirs.index(max(theirs))])
        else:
            p, q = softmax(theirs, tau), softmax(own, tau)
            found += tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return found / len(student)


def never(*_: Tensor) -> Tensor:
    raise AssertionError("the loss of the labels was computed")


@pytest.mark.parametrize(("kind", "tau"), [("soft", 1.0), ("soft", 3.0), ("hard", 1.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("heads", [1, 2])
def test_deits_loss(kind: str, tau: float, alpha: float, heads: int):
    """Of two heads, the first learns from the labels, the second from the teacher; without labels, both from it."""
    images, targets = random_data(5)
    teacher = Teacher(random_backbone("distilled"), "logits")
    expected = teacher(images)
    logits = tuple(torch.randn(5, 7, dtype=torch.float64) for _ in range(heads))
    base = lambda found, labels: found.sum() * labels.sum()  # noqa: E731
    loss = Distillation(teacher, kind, alpha, tau)(
        never if alpha == 1 else base, {"logits": logits if heads > 1 else logits[0]}, expected, targets
    )
    found = [reference(own, expected["logits"], kind, tau) for own in logits]
    taught = sum(found) / heads if alpha == 1 else found[-1]
    assert loss.item() == pytest.approx((1 - alpha) * base(logits[0], targets).item() + alpha * taught, rel=1e-4)


def test_the_distance_of_tokens_is_relative_to_their_length():
    expected = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    assert distance(expected * 1.5, expected).item() == pytest.approx(0.25)
    assert distance(expected + torch.tensor([[[0.0, 5.0], [0.0, 0.0]]]), expected).item() == pytest.approx(0.5)
    assert distance(expected, torch.zeros(1, 2, 2)).isfinite()


@pytest.mark.parametrize(("depth", "numbers"), [(12, [3, 6, 9, 12]), (6, [2, 3, 5, 6]), (4, [1, 2, 3, 4]), (2, [1, 2])])
def test_tokens_are_compared_after_four_blocks(depth: int, numbers: list[int]):
    images, targets = random_data(3)
    whole, model = (random_backbone(depth=depth, seed=seed) for seed in range(2))
    outputs = StudentOutputs(model, "logits", tokens=True)(images)
    assert [*outputs] == ["logits", *(f"block {number}" for number in numbers)]
    tokens, wanted = model._pos_embed(model.patch_embed(images)), whole._pos_embed(whole.patch_embed(images))
    expected = []
    for number, (block, other) in enumerate(zip(model.blocks, whole.blocks, strict=True), 1):
        tokens, wanted = block(tokens), other(wanted)
        if number in numbers:
            expected.append(((tokens - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().item())
    teacher = Teacher(whole, "logits", tokens=True)
    given = teacher(images)
    kl = Distillation(teacher, "soft", 1.0, 1.0)(never, {"logits": outputs["logits"]}, given, targets)
    loss = Distillation(teacher, "soft", 1.0, 1.0, 3.0)(never, outputs, given, targets)
    assert loss.item() == pytest.approx(kl.item() + 3 * sum(expected) / len(expected), rel=1e-5)


def test_the_teacher_in_half_precision_gives_what_autocast_gives():
    images, _ = random_data(3, dtype=torch.float32)
    model = random_backbone("layer_scale", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model(images)
    size = sum(p.nbytes for p in model.parameters())
    teacher = Teacher(model, "logits", torch.bfloat16)
    assert torch.equal(teacher(images)["logits"], expected)
    assert sum(p.nbytes for p in teacher.model.parameters()) < 0.6 * size


# ---------------------------------------------------------------------------------------------------------------------
# A step of every family


DISTILLED = ("deit_tiny_distilled_patch16_224", SHAPE)


@pytest.mark.parametrize("family", [*FAMILIES, "distilled"])
def test_every_family_learns_from_its_whole_network(family: str):
    """From logits and tokens, cut; no gradient reaches the teacher, which sees the image that Mixup made."""
    name, kwargs = {**FAMILIES, "distilled": DISTILLED}[family]
    images, _ = random_data(4, dtype=torch.float32)
    for target in ("logits", "tokens"):
        kwargs = {**kwargs, "num_classes": 7 if target == "logits" else 0}
        whole, model = (draw_parameters(create_backbone(name, **kwargs)) for _ in range(2))
        before, given = {k: v.clone() for k, v in whole.state_dict().items()}, []
        make_elastic(model)
        check_teacher(whole, model, target, "the teacher")
        set_widths(model, some_widths(model))
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)
        whole.patch_embed.register_forward_pre_hook(lambda _m, inputs, kept=given: kept.append(inputs[0]))
        model.patch_embed.register_forward_pre_hook(lambda _m, inputs, kept=given: kept.append(inputs[0]))
        training = Training(
            model, torch.optim.SGD(model.parameters(), lr=1e-3), never, CPU, 0, labels=False,
            distillation=Distillation(Teacher(whole, target, tokens=True), "soft", 1.0, 1.0, tokens=2.0),
            runner=StudentOutputs(model, target, tokens=True),
            mixup=lambda x, y: (x + x.flip(0), y), grad_checkpointing=True,
        )  # fmt: skip
        losses, start = AverageMeter(), model.patch_embed.proj.weight.clone()
        train_one_epoch(training, [(images, None)], 0, steps=1, losses=losses)
        assert losses.avg > 0 and not torch.equal(model.patch_embed.proj.weight, start)
        assert all(torch.equal(x, images + images.flip(0)) for x in given) and len(given) == 2
        *_, last = training.runner(images)
        assert last == f"block {len(blocks_of(model))}" and not training.runner.tokens.kept
        assert not any(p.requires_grad or p.grad is not None for p in whole.parameters())
        assert_same(dict(whole.state_dict()), before)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_of_several_sizes_takes_the_mean_of_their_gradients(parts: int):
    """From one call of the teacher for the images; the sizes go from small to large."""
    images, targets = random_data(4)
    whole, model = random_backbone(), make_elastic(random_backbone(seed=1))
    full = full_widths(model)
    table = MaskTable([full, {key: width // 2 for key, width in full.items()}])
    regime = ProgressiveDropout(model, [], ratio=0.5, epochs=0, seed=0, table=table, sizes_per_step=2)
    teacher, called = Teacher(whole, "logits"), []
    whole.register_forward_pre_hook(lambda _m, inputs: called.append(len(inputs[0])))
    distillation = Distillation(teacher, "soft", 0.5, 1.0)
    base, losses = torch.nn.functional.cross_entropy, []
    for number in range(2):
        assert regime.choose(epoch=0, step=0, rank=0, number=number) == 1 - number
        losses.append(distillation(base, {"logits": model(images)}, teacher(images), targets))
    wanted = torch.autograd.grad(sum(losses) / 2, [*model.parameters()], allow_unused=True)
    called.clear()
    logged = AverageMeter()
    training = Training(
        model, torch.optim.SGD(model.parameters(), lr=0.0), base, CPU, 0, distillation=distillation,
        runner=StudentOutputs(model, "logits"), grad_accum_steps=parts,
    )  # fmt: skip
    train_one_epoch(training, [(images, targets)], 0, steps=1, losses=logged, regime=regime)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert logged.avg == pytest.approx((sum(losses) / 2).item()) and called == [4 // parts] * parts


def test_a_model_whose_tokens_are_kept_can_be_copied():
    """After a forward pass with gradients; the copy keeps tokens of its own."""
    model = random_backbone()
    kept, images = BlockTokens(model), random_data(2)[0]
    model(images)
    copied = copy.deepcopy(model)
    first = kept.take()
    copied(images)
    assert first and not kept.take()


# ---------------------------------------------------------------------------------------------------------------------
# The program


def piad(road: Road, *more: object) -> list[object]:
    """Training of the sizes of a mask table that is there already."""
    return ["main.py", "--stage", "piad", "--checkpoint", road.peelable, "--progressive-epochs", 0, *TRAIN, *more]


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_piad_on_photos_alone(road: Road, photos: Path, tmp_path: Path, no_labels: None):  # noqa: F811
    """No label is touched; the table stays; the best epoch is that of the least KL; a resumed run is the same."""
    flags = piad(road, *unlabelled(photos), *ALONE, "--distillation-tokens", 1, "--op-code-sampling", "log-macs",
                 "--sizes-per-step", 2, "--freeze-embedding", "--epochs", 3, "--ema-decay", 0.5)  # fmt: skip
    run(*flags, "--amp", "--output-dir", tmp_path / "a")
    state = load_checkpoint(tmp_path / "a/checkpoint_2.pth")
    table = {key: value for key, value in json.loads(road.mask_table.read_text()).items() if key != "meta"}
    assert {key: value for key, value in state["mask_table"].items() if key != "meta"} == table
    start = supernet.load(road.peelable).model.state_dict().items()
    moved = {name for name, value in start if not torch.equal(value, state["model"][name])}
    assert "blocks.0.mlp.fc1.weight" in moved and not any(name.startswith(EMBEDDING) for name in moved)
    lines = lines_of(tmp_path / "a")
    scores = [min(line["kl"], line["ema_kl"]) for line in lines]
    assert state["best_epoch"] == scores.index(min(scores)) and "top1" not in lines[0]
    assert state["settings"]["target"] == "logits" and lines[0]["agreement_full"] > 50
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/checkpoint_1.pth", tmp_path / "b")
    run(*flags, "--amp", "--resume", "auto", "--output-dir", tmp_path / "b")
    assert_same(load_checkpoint(tmp_path / "b/checkpoint_2.pth"), state)
    assert len(state["settings"]["teacher_stamp"]) == 14  # another teacher is another run


@pytest.mark.parametrize("stage", ["piad", "finetune"])
def test_an_encoder_learns_from_itself(
    stage: str, road: Road, encoder: list[str], photos: Path, tmp_path: Path, no_labels: None  # noqa: F811
):  # fmt: skip
    words = unlabelled(photos)
    run("reparam.py", *words, *encoder, "--method", "best", "--mask-table", "--no-eval", "--output-dir", tmp_path / "a")
    size = ["--progressive-epochs", 0] if stage == "piad" else ["--macs-ratio", 0.6]
    run("main.py", "--stage", stage, *words, *TRAIN, *size, *ALONE, "--epochs", 1, "--checkpoint", tmp_path / "a",
        "--output-dir", tmp_path / "b")  # fmt: skip
    names = {"piad": ["token_cosine_smallest", "token_cosine"], "finetune": ["token_cosine", "feature_cosine"]}[stage]
    assert {*names} <= lines_of(tmp_path / "b")[-1].keys()
    if stage == "finetune":
        config = json.loads((tmp_path / "b/config.json").read_text())
        assert config["grade"] == "compensated, then distilled" and config["target"] == "tokens"
        assert config["fidelity"]["token_cosine"] > 0.5


@pytest.fixture(scope="module")
def plain(road: Road, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The weights after an epoch with labels and a teacher, without random numbers, in batches of 128."""
    folder = tmp_path_factory.mktemp("plain")
    run(*exact(road), "--batch-size", 128, "--output-dir", folder)
    return load_checkpoint(folder / "checkpoint_0.pth")["model"]


def exact(road: Road) -> list[object]:
    return piad(road, *DIGITS, *TEACH, "--epochs", 1, "--mixup", 0, "--cutmix", 0, "--ema-decay", 0,
                "--opt", "sgd")  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        ["--batch-size", 64, "--grad-accum-steps", 2],
        ["--batch-size", 128, "--grad-checkpointing", "--compile", "eager", "--channels-last"],
    ],
)
def test_parts_checkpointing_and_compilation_change_nothing(more: list, road: Road, plain: dict, tmp_path: Path):
    run(*exact(road), *more, "--output-dir", tmp_path)
    found = load_checkpoint(tmp_path / "checkpoint_0.pth")["model"]
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_compiled_network_learns_the_same_from_labels_and_a_teacher(
    stage: str, road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled, of_torch = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda work, **flags: compiled.append(work) or of_torch(work, **flags))
    start = ["--checkpoint", road.pretrained / "checkpoint_3.pth"]
    if stage == "finetune":
        start = ["--checkpoint", road.peelable, "--macs-ratio", 0.6, "--drop-path", 0]
    words = ["main.py", "--stage", stage, *DIGITS, *TRAIN, *start, *TEACH, "--epochs", 1, "--warmup-epochs", 0]
    words += ["--mixup", 0, "--cutmix", 0, "--ema-decay", 0, "--opt", "sgd", "--distillation-tokens", 1]
    run(*words, "--output-dir", tmp_path / "plain")
    assert not compiled
    run(*words, "--torchcompile", "eager", "--output-dir", tmp_path / "compiled")
    assert len(compiled) == 2  # the teacher and what it teaches
    plain, found = (load_checkpoint(tmp_path / name / "checkpoint_0.pth")["model"] for name in ("plain", "compiled"))
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    line = lines_of(tmp_path / "compiled")[-1]
    assert "top1" in line and math.isfinite(line["train_loss"])


def test_another_network_teaches_pre_training(road: Road, tmp_path: Path):
    """A network that starts from random weights learns from labels and another's top-1, and comes nearer to it."""
    words = ["main.py", "--stage", "pretrain", *COMMON, *TRAIN, "--epochs", 2, "--warmup-epochs", 0]
    teacher = road.pretrained / "checkpoint_3.pth"
    flags = ["--teacher-path", teacher, "--distillation-type", "hard", "--distillation-alpha", 0.5]
    run(*words, "--output-dir", tmp_path / "alone")
    run(*words, *flags, "--output-dir", tmp_path / "taught")
    first, last = lines_of(tmp_path / "taught")
    assert last["train_loss"] < first["train_loss"]
    images = torch.randn(256, 1, 16, 16)
    paths = (teacher, tmp_path / "taught/checkpoint_1.pth", tmp_path / "alone/checkpoint_1.pth")
    given, taught, alone = (supernet.load(path, plain_weights=True).model(images) for path in paths)
    classes = given.argmax(1)
    assert F.cross_entropy(taught, classes) < F.cross_entropy(alone, classes)


def test_a_growing_table_learns_from_tokens_too(road: Road, tmp_path: Path):
    flags = [*TEACH, "--distillation-tokens", 1, "--epochs", 2, "--checkpoint", road.contracted]
    run("main.py", *PIAD, *flags, "--output-dir", tmp_path)
    first, last = lines_of(tmp_path)
    assert last["op_codes"] > first["op_codes"] > 1 and math.isfinite(last["train_loss"])


def test_new_weights_learn_from_a_teacher_alone(road: Road, photos: Path, tmp_path: Path, no_labels: None):  # noqa: F811
    """No data set says how many classes they have, so a flag does; without it, the error names the flag."""
    flags = ["--teacher-path", road.pretrained / "checkpoint_3.pth", *ALONE[2:], "--epochs", 1, "--warmup-epochs", 0]
    words = ["main.py", "--stage", "pretrain", *unlabelled(photos), *TRAIN, "--mixup", 0, "--cutmix", 0, *flags]
    with pytest.raises(UserError, match=f"the model has 1000 classes: .* or --model-kwargs num_classes={CLASSES}$"):
        run(*words, *MODEL, "--output-dir", tmp_path / "a")
    run(*words, *MODEL, f"num_classes={CLASSES}", "--output-dir", tmp_path / "b")
    assert {"kl", "agreement"} <= lines_of(tmp_path / "b")[-1].keys()


PHOTOS = ["--data-set", "images", "--data-path", "PHOTOS"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*TEACH[:2]], "--teacher-model self is given without --distillation-type"),
        ([*TEACH[2:]], "--distillation-type soft needs a teacher"),
        ([*TEACH, "--teacher-path", "PEELABLE"], "--teacher-model self is the network itself"),
        ([*TEACH, *PHOTOS], "--data-set images has no labels, which --stage piad needs: .* --distillation-alpha 1"),
        (["--progressive-epochs", "50", *ALONE, *PHOTOS], "--progressive-epochs 50 grows the mask table .* give 0"),
        (["--distillation-tokens", "1"], "--distillation-tokens 1 needs a teacher"),
        (["--teacher-path", "DEEPER", *TEACH[2:], "--distillation-tokens", "1"], "the teacher .* has other blocks"),
        (["--regime", "layer"], "--progressive-epochs 0 is for --regime piad, not layer"),
        (["--sizes-per-step", "2", "--regime", "layer"], "--sizes-per-step 2 is for --regime piad, not layer: give 1"),
        (["--progressive-epochs", "3", "--compensate"], "--compensate: a mask table that grows"),
        (["--torchcompile"], "--torchcompile: piad trains another network at each step"),
        (["--compensate"], "--compensate: .*compensation.safetensors does not exist"),
        (["--checkpoint", "PRETRAINED"], "mask_table.json"),
        (["--stage", "finetune", "--checkpoint", "PEELED", *TEACH], "is a sub-network, and the whole network that"),
        (["--stage", "pretrain", "--checkpoint", "OTHER", *TEACH], "the network at the start has no classifier head"),
        (["--teacher-path", "OTHER", *TEACH[2:]], "the teacher .* has no classifier head, the model has 10 classes"),
    ],
)
def test_what_does_not_fit_is_one_line(
    flags: list[str], said: str, road: Road, photos: Path, encoder: list[str], tmp_path: Path  # noqa: F811
):  # fmt: skip
    other = tmp_path / "other"
    places = {"PEELABLE": road.peelable, "PEELED": road.peeled, "PHOTOS": photos, "OTHER": other,
              "PRETRAINED": road.pretrained / "checkpoint_3.pth"}  # fmt: skip
    if "DEEPER" in flags:
        kwargs = {**MODEL_KWARGS, "num_classes": CLASSES, "depth": MODEL_KWARGS["depth"] + 1}
        model, places["DEEPER"] = create_backbone(NAME, **kwargs), tmp_path / "deeper"
        save_subnetwork(
            tmp_path / "deeper", model, name=NAME, model_kwargs=kwargs, preprocessing=preprocessing(model, {})
        )
    if "OTHER" in flags:
        run("reparam.py", *unlabelled(photos), *encoder, "--no-eval", "--output-dir", other)
        places["OTHER"] = other / "contracted.safetensors"
    flags = [places.get(flag, flag) for flag in flags]
    words = piad(road, *DIGITS)
    if "--stage" in flags:
        words.remove("--progressive-epochs"), words.remove(0)
    with pytest.raises(UserError, match=said):
        run(*words, "--macs-ratio", 0.5, *flags, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hard_teacher_needs_classes(road: Road, photos: Path, encoder: list[str], tmp_path: Path):  # noqa: F811
    with pytest.raises(UserError, match=r"--distillation-type hard needs classes, .* tokens: give soft"):
        run("main.py", "--stage", "pretrain", *unlabelled(photos), *encoder, *ALONE[:2], "--distillation-type", "hard",
            "--distillation-alpha", 1, "--output-dir", tmp_path / "out")  # fmt: skip
