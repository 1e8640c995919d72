"""The training loop and the evaluation loop, held against sums done by hand on models of a few weights."""

from __future__ import annotations

import copy
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from programs import assert_same, tiny_digits_model
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import engine
from engine import Run, evaluate, train_one_epoch
from files import CheckpointFolder, load_checkpoint
from logs import RunLog
from training import LossReader, Progress, Training
from utils import UserError

CPU = torch.device("cpu")
CLASSES = 7


def toy() -> nn.Module:
    """Images (B, 1, 2, 2) to CLASSES logits, with a dropout that makes training random."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, CLASSES))


def toy_batches(steps: int = 5, size: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(steps, size, 1, 2, 2, generator=generator)
    targets = torch.randint(CLASSES, (steps, size), generator=generator)
    return list(zip(images, targets, strict=True))


def toy_training(model: nn.Module | None = None, lr: float = 0.1, **more: Any) -> Training:
    model = model or toy()
    arguments = {"loss_fn": nn.CrossEntropyLoss(), "device": CPU, "seed": 3, **more}
    return Training(model, torch.optim.AdamW(model.parameters(), lr=lr), **arguments)


class Chosen:
    """A regime of which only the choice matters."""

    sizes_per_step = 1

    def __init__(self, choose: Callable[..., int]):
        self.choose = choose

    def step_scalars(self) -> dict[str, float]:
        return {}


def train(training: Training, batches: list, epoch: int = 0, start_step: int = 0, **more: Any) -> AverageMeter:
    losses = AverageMeter()
    steps = start_step + len(batches)
    train_one_epoch(training, batches, epoch, steps=steps, losses=losses, start_step=start_step, **more)
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# evaluate()


@pytest.mark.parametrize("size", [1, 4, 10])
def test_evaluate_is_the_mean_over_images(size: int):
    logits = torch.randn(10, 1, 1, CLASSES, generator=torch.Generator().manual_seed(4))
    targets = torch.arange(10) % CLASSES
    correct = {1: 0, 5: 0}
    loss = 0.0
    for row, target in zip(logits.view(10, CLASSES).tolist(), targets.tolist(), strict=True):
        place = sorted(row, reverse=True).index(row[target])
        for k in correct:
            correct[k] += place < k
        loss += math.log(sum(math.exp(value) for value in row)) - row[target]
    assert 0 < correct[1] < correct[5] < 10  # or the test would say little
    found = evaluate(nn.Flatten(), zip(logits.split(size), targets.split(size), strict=True), CPU)
    assert found["top1"] == pytest.approx(10 * correct[1])
    assert found["top5"] == pytest.approx(10 * correct[5])
    assert found["loss"] == pytest.approx(loss / 10, rel=1e-6)
    assert found.keys() == {"top1", "top5", "loss"}


def test_evaluate_knows_fewer_classes_than_five():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).view(3, 1, 1, 2)
    found = evaluate(nn.Flatten(), [(logits, torch.tensor([0, 1, 1]))], CPU)
    assert found["top1"] == pytest.approx(200 / 3) and found["top5"] == pytest.approx(100)


def test_evaluate_runs_in_eval_mode_and_keeps_no_graph():
    model = toy().train()
    first, again = (evaluate(model, toy_batches(), CPU)["loss"] for _ in range(2))
    assert first == again
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_sums_over_the_ranks(monkeypatch: pytest.MonkeyPatch):
    """The other rank has 6 images, all right, at a loss of 1.5 each."""
    theirs = torch.tensor([6.0, 6.0, 9.0, 6.0], dtype=torch.float64)
    monkeypatch.setattr(engine, "reduce_sum", lambda totals: totals.add_(theirs))
    logits = torch.tensor([[5.0, 0, 0, 0, 0, 0, 0], [5.0, 0, 0, 0, 0, 0, 0]]).view(2, 1, 1, 7)
    found = evaluate(nn.Flatten(), [(logits, torch.tensor([0, 1]))], CPU)
    own = F.cross_entropy(logits.view(2, 7), torch.tensor([0, 1]), reduction="sum").item()
    assert found["top1"] == pytest.approx(100 * 7 / 8)
    assert found["loss"] == pytest.approx((own + 9) / 8)


# ---------------------------------------------------------------------------------------------------------------------
# train_one_epoch()


def test_losses_are_the_mean_over_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    training = toy_training(model, lr=0.0)
    counts = (6, 2, 1)
    batches = [(images[:n], targets[:n]) for (images, targets), n in zip(toy_batches(3), counts, strict=True)]
    losses = train(training, batches)
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        assert losses.avg == pytest.approx(F.cross_entropy(model(images), targets).item(), rel=1e-6)
    assert losses.count == 9


def test_a_step_is_the_optimizers_step_on_the_gradient_of_the_loss():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    expected = copy.deepcopy(model)
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.5), nn.CrossEntropyLoss(), CPU, seed=0)
    batches = toy_batches(3)
    train(training, batches)
    for images, targets in batches:
        gradients = torch.autograd.grad(F.cross_entropy(expected(images), targets), list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_training_is_in_train_mode_and_random():
    training = toy_training(toy().eval(), lr=0.0)
    batches = toy_batches()
    first, other = train(training, batches), train(training, batches, epoch=1)
    assert training.model.training
    assert first.avg != other.avg  # another epoch, another dropout
    assert first.avg == train(training, batches).avg


def test_each_step_of_each_epoch_and_seed_draws_anew():
    drawn = []
    model = toy()
    model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1).item()))
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        train(toy_training(model, seed=seed), toy_batches(3), epoch=epoch)
    assert len(set(drawn)) == 9


def test_an_epoch_entered_in_its_middle_ends_the_same():
    batches = toy_batches()
    whole = toy_training()
    halves = copy.deepcopy(whole)
    train(whole, batches, epoch=2)
    train(halves, batches[:2], epoch=2)
    torch.rand(100)  # what is drawn in between does not matter
    train(halves, batches[2:], epoch=2, start_step=2)
    assert_same(halves.state_dict(), whole.state_dict())


def test_each_step_is_chosen_and_reported():
    chosen, told = [], []

    def choose(**place: int) -> int:
        chosen.append(place)
        return 40 + place["step"]

    losses = train(toy_training(), toy_batches(3), epoch=7, start_step=2, regime=Chosen(choose),
                   after_loss=lambda step, scalars: told.append((step, scalars)))  # fmt: skip
    assert chosen == [{"epoch": 7, "step": step, "rank": 0, "number": 0} for step in (2, 3, 4)]
    assert [(step, scalars["op_code"]) for step, scalars in told] == [(2, 42), (3, 43), (4, 44)]
    assert sum(scalars["loss"] for _, scalars in told) / 3 == pytest.approx(losses.avg)


def test_the_sub_network_is_chosen_before_the_step_runs():
    order = []
    model = toy()
    model.register_forward_hook(lambda *_: order.append("forward"))
    train(toy_training(model), toy_batches(2), regime=Chosen(lambda **_: order.append("choose") or 0))
    assert order == ["choose", "forward"] * 2


def test_mixup_makes_the_images_and_targets():
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    model.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    training = toy_training(model, mixup=lambda images, targets: (images * 3, targets.flip(0)))
    training.loss_fn = lambda logits, targets: seen.append(targets) or F.cross_entropy(logits, targets)
    ((images, targets),) = toy_batches(1)
    train(training, [(images, targets)])
    assert torch.equal(seen[0], images * 3) and torch.equal(seen[1], targets.flip(0))


def not_finite_at(step: int, value: float) -> Callable[[Tensor, Tensor], Tensor]:
    calls = []

    def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(None)
        return F.cross_entropy(logits, targets) * (value if len(calls) == step + 1 else 1.0)

    return loss_fn


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(value: float, name: str):
    training = toy_training(lr=0.25, loss_fn=not_finite_at(2, value))
    reference = copy.deepcopy(training)
    reference.loss_fn = nn.CrossEntropyLoss()
    with pytest.raises(UserError) as caught:
        train(training, toy_batches(), epoch=4, regime=Chosen(lambda **place: 10 * place["step"]))
    assert f"loss is {name} at epoch 4, step 2, op code 20, learning rate 0.25" in str(caught.value)
    train(reference, toy_batches()[:2], epoch=4)
    assert_same(training.state_dict(), reference.state_dict())


class OnDevice:
    """A loss on a CUDA device, as far as LossReader can tell."""

    is_cuda = True

    def __init__(self, value: float):
        self.value = value

    def to(self, _device: str, non_blocking: bool) -> Tensor:
        assert non_blocking
        return torch.tensor(self.value)


def test_losses_of_a_device_are_read_some_steps_late(monkeypatch: pytest.MonkeyPatch):
    """The device is never waited for by the newest steps; a loss that is not finite is still that of its own step."""
    waited = []
    event = lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: waited.append(None))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "Event", event)
    losses, seen = AverageMeter(), []
    reader = LossReader(toy_training(), 2, losses, lambda step, scalars: seen.append((step, scalars["loss"])))
    for step in range(6):
        reader.add(step, 1, [step], {}, OnDevice(float("nan") if step == 3 else step))
    assert seen == [(0, 0.0), (1, 1.0)] and len(waited) == 2 == 6 - LossReader.LATE
    with pytest.raises(UserError, match="loss is nan at epoch 2, step 3, op code 3"):
        reader.read()
    assert seen[-1] == (2, 2.0) and losses.count == 3


def test_several_ranks_agree_on_stopping_every_few_steps(monkeypatch: pytest.MonkeyPatch):
    """One that is alone looks at each step; agreement costs a message, so several look now and then."""
    asked = []
    monkeypatch.setattr(engine, "stop_if_asked", lambda collective: asked.append(collective))
    run = SimpleNamespace(
        progress=Progress(), loader=SimpleNamespace(steps=50), scheduler=Mock(), checkpoint_steps=0, _save=None
    )
    for ranks, expected in ((1, list(range(1, 51))), (2, [20, 40, 50])):
        monkeypatch.setattr(engine, "world", lambda ranks=ranks: (0, ranks))
        found = []
        for step in range(50):
            asked.clear()
            Run._after_step(run, step, lambda: None)
            found += [step + 1] * len(asked)
        assert found == expected


# ---------------------------------------------------------------------------------------------------------------------
# One update: clipping, scaling, averaging, precision


class OneWeight(nn.Module):
    """Four weights whose gradient is the mean image times `steepness`."""

    def __init__(self, steepness: float = 1.0):
        super().__init__()
        self.weight, self.steepness = nn.Parameter(torch.zeros(4)), steepness

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight * self.steepness


def one_weight_training(steepness: float = 1.0, **more: Any) -> Training:
    model = OneWeight(steepness)
    arguments = {"loss_fn": lambda outputs, _targets: outputs.mean(), "device": CPU, "seed": 0, **more}
    return Training(model, torch.optim.SGD(model.parameters(), lr=1.0), **arguments)


def batch_of(*image: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(image, dtype=torch.float32).view(1, 1, 2, 2), torch.tensor([0])


@pytest.mark.parametrize(("clip_grad", "moved"), [(None, [3.0, 0, 4, 0]), (6.0, [3.0, 0, 4, 0]), (2.5, [1.5, 0, 2, 0])])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_to_their_norm(clip_grad: float | None, moved: list[float], scaled: bool):
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    training = one_weight_training(clip_grad=clip_grad, scaler=scaler)
    train(training, [batch_of(3, 0, 4, 0)])
    torch.testing.assert_close(training.model.weight.detach(), -torch.tensor(moved))


def test_gradients_do_not_add_up_over_steps():
    training = one_weight_training()
    train(training, [batch_of(1, 0, 0, 0), batch_of(0, 1, 0, 0)])
    assert training.model.weight.tolist() == [-1, -1, 0, 0]


def test_an_overflow_under_float16_skips_the_step_and_is_counted():
    training = one_weight_training(scaler=torch.amp.GradScaler("cpu"), steepness=1e35)
    scale = training.scaler.get_scale()
    train(training, [batch_of(1, 0, 0, 0)])
    assert training.model.weight.tolist() == [0, 0, 0, 0]
    assert training.skipped_steps == 1 and training.scaler.get_scale() < scale
    assert training.state_dict()["skipped_steps"] == 1
    training.model.steepness = 1.0
    train(training, [batch_of(1, 0, 0, 0)])
    assert training.model.weight.tolist() == [-1, 0, 0, 0] and training.skipped_steps == 1


def test_averaged_weights_follow_after_each_step():
    """average <- decay * average + (1 - decay) * weights; timm's average begins with the weights after two steps."""
    training = one_weight_training()
    training.ema = ModelEmaV3(training.model, decay=0.75)
    batches = [batch_of(1, 0, 0, 0), batch_of(2, 4, 0, 0), batch_of(0, 0, 8, 0)]
    weights = torch.cumsum(torch.stack([-images.flatten() for images, _ in batches]), dim=0)
    train(training, batches)
    torch.testing.assert_close(training.ema.module.weight.detach(), 0.75 * weights[1] + 0.25 * weights[2])
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in training.ema.parameters())


def test_bfloat16_on_the_cpu():
    """The linear layers run in bfloat16; weights, gradients and loss stay float32, and the loss is nearly the same."""
    images, targets = torch.randn(4, 1, 16, 16), torch.tensor([1, 2, 3, 4])
    found = {}
    for amp in (None, torch.bfloat16):
        torch.manual_seed(0)
        model = tiny_digits_model()
        outputs = []
        model.blocks[0].mlp.fc1.register_forward_hook(lambda _m, _i, output, kept=outputs: kept.append(output.dtype))
        training = toy_training(model, lr=1e-3, amp=amp)
        found[amp] = train(training, [(images, targets)]).avg
        assert outputs == [amp or torch.float32]
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        assert evaluate(model, [(images, targets)], CPU, amp)["loss"] > 0
        assert outputs[1] == (amp or torch.float32)
    assert found[torch.bfloat16] == pytest.approx(found[None], rel=0.02)
    assert found[torch.bfloat16] != found[None]


# ---------------------------------------------------------------------------------------------------------------------
# State


def test_progress_goes_round():
    progress = Progress(epoch=3, step=2, best_epoch=1, best_score=71.5)
    progress.losses.update(1.5, 4)
    progress.losses.update(0.25, 2)
    state = json.loads(json.dumps(progress.state_dict()))  # plain values alone
    found = Progress.from_state(state)
    assert (found.epoch, found.step, found.best_epoch, found.best_score) == (3, 2, 1, 71.5)
    assert (found.losses.sum, found.losses.count) == (6.5, 6)
    found.losses.update(2.0, 2)
    assert found.losses.avg == pytest.approx((4 * 1.5 + 2 * 0.25 + 2 * 2.0) / 8)


def test_progress_at_an_epochs_start_has_no_losses():
    found = Progress.from_state(Progress(epoch=1).state_dict())
    assert (found.epoch, found.step, found.losses.count, found.best_epoch) == (1, 0, 0, None)


def full_training(**more: Any) -> Training:
    training = toy_training(**more)
    training.ema = ModelEmaV3(training.model, decay=0.5)
    training.scaler = torch.amp.GradScaler("cpu")
    return training


def test_training_state_goes_round(tmp_path: Path):
    training = full_training()
    train(training, toy_batches())
    training.skipped_steps = 2
    state = training.state_dict()
    assert state.keys() == {"model", "optimizer", "model_ema", "scaler", "skipped_steps"}
    torch.save(state, tmp_path / "state.pth")
    found = full_training()
    found.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for one in (training, found):
        train(one, toy_batches(seed=1), epoch=1)
    assert_same(found.state_dict(), training.state_dict())


@pytest.mark.parametrize("missing", ["model", "optimizer", "model_ema", "scaler", "skipped_steps"])
def test_state_that_lacks_something_is_of_another_run(missing: str):
    state = full_training().state_dict()
    del state[missing]
    with pytest.raises(UserError, match=f"the checkpoint is of another run: KeyError '{missing}'"):
        full_training().load_state_dict(state)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_state_of_another_model_is_of_another_run(part: str):
    other = full_training(model=nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, CLASSES))).state_dict()
    with pytest.raises(UserError, match="the checkpoint is of another run"):
        full_training().load_state_dict(full_training().state_dict() | {part: other[part]})


# ---------------------------------------------------------------------------------------------------------------------
# A run


class Batches:
    """A loader of toy batches, other ones in each epoch."""

    def __init__(self, steps: int = 5):
        self.steps = steps

    def batches(self, epoch: int, start_step: int = 0) -> list[tuple[Tensor, Tensor]]:
        return toy_batches(self.steps, seed=epoch)[start_step:]


class Recorder:
    """A regime that chooses nothing and writes down what it is asked."""

    table, sizes_per_step = (None,), 1

    def __init__(self):
        self.begun: list[int] = []

    def begin_epoch(self, epoch: int) -> None:
        self.begun.append(epoch)

    def choose(self, **place: int) -> int:
        return 0

    def step_scalars(self) -> dict[str, float]:
        return {"macs_share": 0.5}

    def epoch_scalars(self) -> dict[str, float]:
        return {"op_codes": len(self.begun)}

    def state_dict(self) -> dict[str, Any]:
        return {"mask_table": {"begun": list(self.begun)}}

    def save(self, folder: Path) -> None:
        (folder / "table").write_text(str(self.begun))


def make_run(folder: Path, top1: list[float], *, epochs: int, keep_every: int = 0, **more: Any) -> Run:
    training = more.pop("training", None) or toy_training(lr=0.2)
    scores = iter(top1)
    scheduler, _ = create_scheduler_v2(training.optimizer, num_epochs=epochs, min_lr=0.01, warmup_epochs=0)
    return Run(
        training,
        more.pop("loader", Batches()),
        CheckpointFolder(folder, {"lr": 0.2}, keep_every),
        RunLog(folder, 0, 0),
        scheduler,
        more.pop("progress", Progress()),
        evaluate_epoch=lambda: {"top1": next(scores)},
        **more,
    )


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in folder.glob("checkpoint_*.pth"))


@pytest.mark.parametrize(
    ("top1", "keep_every", "expected"),
    [
        ([10, 20, 30, 40, 50, 60], 0, [4, 5]),
        ([10, 50, 20, 30, 40, 45], 0, [1, 4, 5]),
        ([10, 50, 20, 60, 40, 45], 0, [3, 4, 5]),
        ([10, 50, 50, 50, 50, 50], 0, [1, 4, 5]),  # the first of equals
        ([10, 50, 20, 30, 40, 45], 3, [1, 2, 4, 5]),
        ([90, 50, 20, 30, 40, 45], 2, [0, 1, 3, 4, 5]),
    ],
)
def test_the_last_two_the_best_and_each_nth_checkpoint_are_kept(
    tmp_path: Path, top1: list[float], keep_every: int, expected: list[int]
):
    run = make_run(tmp_path, top1, epochs=6, keep_every=keep_every)
    run.fit(6)
    assert kept(tmp_path) == expected
    assert run.progress.best_score == max(top1) and run.progress.best_epoch == top1.index(max(top1))
    for epoch in expected:
        state = load_checkpoint(tmp_path / f"checkpoint_{epoch}.pth")
        assert (state["epoch"], state["step"]) == (epoch + 1, 0)
        assert state["best_score"] == max(top1[: epoch + 1])
        assert state["settings"] == {"lr": 0.2}
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_holds_the_weights_of_its_epoch(tmp_path: Path):
    training = toy_training(lr=0.2)
    start = copy.deepcopy(training)
    make_run(tmp_path, [1, 2], epochs=4, training=training).fit(2)
    scheduler, _ = create_scheduler_v2(start.optimizer, num_epochs=4, min_lr=0.01, warmup_epochs=0)
    for epoch in range(2):
        scheduler.step(epoch)
        train(start, toy_batches(seed=epoch), epoch=epoch)
        state = load_checkpoint(tmp_path / f"checkpoint_{epoch}.pth")
        assert_same({key: state[key] for key in ("model", "optimizer")}, {
            "model": start.model.state_dict(), "optimizer": start.optimizer.state_dict()
        })  # fmt: skip


def test_the_log_has_a_line_an_epoch_with_its_learning_rate(tmp_path: Path):
    make_run(tmp_path, [1, 2], epochs=4, eval_every=3).fit(4)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    cosine = [0.01 + (0.2 - 0.01) * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(cosine)
    assert ["top1" in line for line in lines] == [False, False, True, True]  # each third epoch, and the last
    assert all(line["train_loss"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("checkpoint_steps", "places"),
    [
        (0, [(1, 0), (2, 0)]),
        (2, [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]),
        (5, [(1, 0), (2, 0)]),
        (4, [(0, 4), (1, 0), (1, 4), (2, 0)]),
    ],
)
def test_a_checkpoint_is_written_each_few_steps_and_at_each_epochs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_steps: int, places: list[tuple[int, int]]
):
    saved, save = [], CheckpointFolder.save

    def noted(self: CheckpointFolder, epoch: int, state: dict[str, Any], best_epoch: int | None) -> None:
        saved.append((state["epoch"], state["step"]))
        save(self, epoch, state, best_epoch)

    monkeypatch.setattr(CheckpointFolder, "save", noted)
    regime = Recorder()
    make_run(tmp_path, [1, 2], epochs=2, checkpoint_steps=checkpoint_steps, regime=regime).fit(2)
    assert saved == places
    assert kept(tmp_path) == [0, 1]
    assert regime.begun == [0, 1] and (tmp_path / "table").read_text() == "[0, 1]"
    assert load_checkpoint(tmp_path / "checkpoint_1.pth")["mask_table"] == {"begun": [0, 1]}


def test_what_a_run_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tag -> its steps; speed and memory are the machine's, and not in log.txt, which is the same each time."""
    logged: dict[str, list[tuple[int, float]]] = {}

    def add(_self: SummaryWriter, tag: str, value: float, step: int) -> None:
        logged.setdefault(tag, []).append((step, value))

    monkeypatch.setattr(SummaryWriter, "add_scalar", add)
    monkeypatch.setattr(SummaryWriter, "add_figure", add)
    make_run(tmp_path, [1, 2], epochs=3, eval_every=3, regime=Recorder(), draw_widths=lambda: 7).fit(3)
    steps = {tag: [step for step, _ in values] for tag, values in logged.items()}
    assert steps.pop("loss") == steps.pop("op_code") == steps.pop("macs_share") == list(range(15))
    assert logged["op_codes"] == [(4, 1), (9, 2), (14, 3)]
    assert logged["widths"] == [(14, 7)] and steps.pop("widths") == steps.pop("top1") == [14]
    assert set(steps) == {"train_loss", "lr", "op_codes", "machine/images_per_second", "machine/peak_memory_MiB"}
    assert all(found == [4, 9, 14] for found in steps.values())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert all(resident / 2 < value <= resident for _, value in logged["machine/peak_memory_MiB"])
    assert "machine" not in (tmp_path / "log.txt").read_text()


def test_images_a_second_are_those_of_the_epochs_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of an epoch entered in its middle, those that were left: 2 steps of 6 images, 0.1 s each."""

    class Slow(Batches):
        def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in super().batches(epoch, start_step):
                time.sleep(0.1)
                yield batch

    found = []
    monkeypatch.setattr(
        RunLog, "machine", lambda _self, images_per_second, _memory, _step: found.append(images_per_second)
    )
    progress = Progress(step=3)
    progress.losses.update(1.0, 18)
    make_run(tmp_path, [1], epochs=1, loader=Slow(), progress=progress).fit(1)
    assert 0 < found[0] <= 60


def test_a_run_that_begins_inside_an_epoch_does_not_begin_the_epoch_again(tmp_path: Path):
    regime = Recorder()
    make_run(tmp_path, [1, 2], epochs=3, regime=regime, progress=Progress(epoch=1, step=3)).fit(3)
    assert regime.begun == [2]


def test_a_loss_that_is_not_finite_leaves_the_earlier_checkpoint(tmp_path: Path):
    training = toy_training(lr=0.2, loss_fn=not_finite_at(7, float("nan")))
    run = make_run(tmp_path, [1, 2], epochs=2, training=training)
    with pytest.raises(UserError, match=r"loss is nan at epoch 1, step 2, op code 0, learning rate 0\.105: "):
        run.fit(2)
    assert kept(tmp_path) == [0]
    state = load_checkpoint(tmp_path / "checkpoint_0.pth")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())
    assert not list(tmp_path.glob(".*"))


def test_a_step_beyond_the_epochs_end_is_of_other_data(tmp_path: Path):
    with pytest.raises(UserError, match="step 6 of an epoch, which has 5 of this data"):
        make_run(tmp_path, [1.0], epochs=1, progress=Progress(step=6)).fit(1)
