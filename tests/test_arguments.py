"""Flags: the recipe's numbers as defaults, sizes as people write them, and help for each."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable

import pytest
import torch
from programs import tiny_digits_model
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

import export
import main
import main_training
import reparam
from main_arguments import parse_main_arguments
from models.elastic import Elastic, make_elastic

PARSERS = {"main.py": parse_main_arguments, "reparam.py": reparam.parse_arguments}


def parsed(monkeypatch: pytest.MonkeyPatch, *flags: str, program: str = "main.py") -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", [program, *flags])
    return PARSERS[program]()


def parser_of(monkeypatch: pytest.MonkeyPatch, parse: Callable[[], argparse.Namespace]) -> argparse.ArgumentParser:
    """The parser that a function makes and parses with."""
    made, parse_args = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: made.append(self) or parse_args(self))
    with contextlib.suppress(SystemExit):  # it may ask for an argument
        parse()
    return made[-1]


# The paper's recipe (appendix) and, where it says nothing, DeiT's.
SHARED = {
    "opt": "adamw",
    "weight_decay": 0.05,
    "aa": "rand-m9-mstd0.5-inc1",
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "reprob": 0.25,
    "repeated_aug": 3,
    "color_jitter": 0.3,
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "hflip": 0.5,
    "proxy_samples": 1024,
    "progressive_epochs": 50,
    "dropout_ratio": 0.875,
    "macs_convention": "linear",
    "clip_grad": None,
    "amp": None,
    "seed": 0,
}
STAGES = {
    "pretrain": {"epochs": 300, "lr": 5e-4, "min_lr": 1e-5, "warmup_epochs": 5, "drop_path": 0.1, "ema_decay": 0.99996},
    "piad": {"epochs": 300, "lr": 5e-4, "min_lr": 1e-5, "warmup_epochs": 0, "drop_path": 0.0, "ema_decay": 0.99996},
    "finetune": {"epochs": 30, "lr": 5e-5, "min_lr": 1e-6, "warmup_epochs": 0, "drop_path": 0.1},
}


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_the_recipe(monkeypatch: pytest.MonkeyPatch, stage: str):
    args = vars(parsed(monkeypatch, "--stage", stage))
    expected = SHARED | STAGES[stage]
    assert {key: args[key] for key in expected} == expected


def test_the_stage_is_piad_unless_told(monkeypatch: pytest.MonkeyPatch):
    assert vars(parsed(monkeypatch)) == vars(parsed(monkeypatch, "--stage", "piad"))


@pytest.mark.parametrize("order", [("--lr", "0.1", "--stage", "finetune"), ("--stage=finetune", "--lr", "0.1")])
def test_a_flag_beats_the_recipe_wherever_it_stands(monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]):
    args = parsed(monkeypatch, *order)
    assert (args.lr, args.epochs) == (0.1, STAGES["finetune"]["epochs"])


@pytest.mark.parametrize(("batch_size", "processes"), [(512, 1), (64, 1), (128, 8)])
def test_learning_rate_scales_with_the_global_batch(monkeypatch: pytest.MonkeyPatch, batch_size: int, processes: int):
    args = parsed(monkeypatch, "--batch-size", str(batch_size))
    monkeypatch.setattr(main_training, "world", lambda: (0, processes))
    training = main.start_training(args, tiny_digits_model(), 10, torch.device("cpu"))
    rates = [group["lr"] for group in training.optimizer.param_groups]
    assert rates == pytest.approx([5e-4 * batch_size * processes / 512] * len(rates))


def test_training_is_made_as_the_flags_say(monkeypatch: pytest.MonkeyPatch):
    training = main.start_training(parsed(monkeypatch), tiny_digits_model(), 10, torch.device("cpu"))
    assert type(training.optimizer) is torch.optim.AdamW
    assert isinstance(training.mixup, Mixup) and isinstance(training.loss_fn, SoftTargetCrossEntropy)
    mixup = training.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing, mixup.num_classes) == (0.8, 1.0, 0.1, 10)
    assert training.ema.decay == 0.99996 and training.clip_grad is None and training.amp is None
    # As in DeiT, only matrices decay: no bias, no norm, no token, no position.
    decays = {id(p): group["weight_decay"] for group in training.optimizer.param_groups for p in group["params"]}
    for name, parameter in training.model.named_parameters():
        decayed = name.endswith("weight") and "norm" not in name
        assert decays[id(parameter)] == (0.05 if decayed else 0.0), name


def test_training_without_mixup_smooths_labels(monkeypatch: pytest.MonkeyPatch):
    args = parsed(monkeypatch, "--mixup", "0", "--cutmix", "0", "--smoothing", "0.2", "--ema-decay", "0")
    training = main.start_training(args, tiny_digits_model(), 10, torch.device("cpu"))
    assert training.mixup is None and training.ema is None
    # 0.8 on the class, 0.2 spread over all four.
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    wanted = torch.tensor([0.05, 0.05, 0.85, 0.05])
    loss = training.loss_fn(logits, torch.tensor([2]))
    torch.testing.assert_close(loss, -(wanted * logits.log_softmax(-1)).sum())


@pytest.mark.parametrize(("flags", "fused"), [((), True), (("--amp",), False)])
def test_half_precision_on_a_cpu_trains_without_fused_attention(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], fused: bool
):
    """PyTorch's fused attention is slow there. The averaged weights run in the same way."""
    training = main.start_training(parsed(monkeypatch, *flags), tiny_digits_model(), 10, torch.device("cpu"))
    blocks = [*training.model.blocks, *training.ema.module.blocks]
    assert {block.attn.fused_attn for block in blocks} == {fused}


def test_a_head_that_learns_nothing_is_not_trained(monkeypatch: pytest.MonkeyPatch):
    """DDP would wait for its gradient. The teacher is left without what the whole network does not use."""
    args = parsed(monkeypatch, "--teacher-model", "self", "--distillation-type", "soft", "--distillation-alpha", "1")
    teacher = make_elastic(tiny_digits_model())
    training = main.start_training(args, tiny_digits_model(), 10, torch.device("cpu"), teacher, "features")
    fixed = {name for name, parameter in training.model.named_parameters() if not parameter.requires_grad}
    assert fixed == {"head.weight", "head.bias"}
    found = training.runner(torch.randn(2, 1, 16, 16))
    training.distillation(None, found, training.expected(torch.randn(2, 1, 16, 16)), None).backward()
    assert all(parameter.grad is not None for parameter in training.model.parameters() if parameter.requires_grad)
    assert not isinstance(training.distillation.teacher.model.blocks[0], Elastic)


def test_augmentation_flags_reach_the_loader(monkeypatch: pytest.MonkeyPatch):
    flags = ["--aa", "none", "--color-jitter", "0.1", "--scale", "0.5", "0.9", "--hflip", "0", "--reprob", "0.7"]
    found = main.augmentation(parsed(monkeypatch, *flags))
    assert found["auto_augment"] is None and found["color_jitter"] == 0.1 and found["hflip"] == 0
    assert list(found["scale"]) == [0.5, 0.9] and found["re_prob"] == 0.7
    assert main.augmentation(parsed(monkeypatch))["auto_augment"] == "rand-m9-mstd0.5-inc1"


@pytest.mark.parametrize(("flags", "amp"), [(["--amp"], torch.bfloat16), (["--amp", "float16"], torch.float16)])
def test_mixed_precision(monkeypatch: pytest.MonkeyPatch, flags: list[str], amp: torch.dtype):
    assert parsed(monkeypatch, *flags, "--seed", "1").amp == amp


def test_sizes_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch):
    args = parsed(monkeypatch, "--macs", "2.4G", "850m", "3e9", "--params", "12M", "500K", "--op-code", "0", "-1", "7")
    assert args.macs == [2.4e9, 850e6, 3e9] and args.params == [12e6, 500e3] and args.op_code == [0, -1, 7]


@pytest.mark.parametrize("text", ["", "G", "2.4T", "2,4G", "-3M", "0", "nan", "inf", "1e400", "2.4GB"])
def test_what_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, text: str):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, f"--macs={text}")
    assert stop.value.code == 2
    assert f"{text!r} is not an amount such as 2.4G or 12M" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch-size", "--proxy-samples", "--epochs", "--frontier", "--eval-every"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_counts_are_one_or_more(monkeypatch: pytest.MonkeyPatch, capsys, flag: str, value: str):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, f"{flag}={value}")
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err


def test_model_arguments_are_typed(monkeypatch: pytest.MonkeyPatch):
    for program in PARSERS:
        args = parsed(monkeypatch, "--model-kwargs", "img_size=98", "mlp_ratio=3.5", "class_token=False", "x=avg",
                      program=program)  # fmt: skip
        assert args.model_kwargs == {"img_size": 98, "mlp_ratio": 3.5, "class_token": False, "x": "avg"}


@pytest.mark.parametrize("flag", ["--eval-ema", "--use-ema"])
def test_averaged_weights_are_asked_for(monkeypatch: pytest.MonkeyPatch, flag: str):
    assert parsed(monkeypatch, flag).use_ema and not parsed(monkeypatch).use_ema


@pytest.mark.parametrize("parse", [*PARSERS.values(), export.parse_arguments])
def test_every_flag_has_help_in_a_named_group(monkeypatch: pytest.MonkeyPatch, parse: Callable[[], argparse.Namespace]):
    parser = parser_of(monkeypatch, parse)
    assert parser.description
    shown = parser.format_help()  # also fills in each %(default)s
    for group in parser._action_groups:
        for action in group._group_actions:
            flag = (action.option_strings or [action.metavar])[0]
            assert action.help and action.help.strip(), flag
            assert flag in shown
            if flag != "-h":
                assert group.title not in ("options", "optional arguments", "positional arguments"), flag
