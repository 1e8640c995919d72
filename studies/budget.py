"""What every method of studies.rivals_trained may use: the same network, images, teacher and number of epochs."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter
from torch import nn

from datasets import Images, TrainLoader, eval_loader, proxy_set
from engine import train_one_epoch
from main_training import augmentation, start_training
from studies.common import Batches
from supernet import Network
from training import Training


class Rule(Protocol):
    """Chooses what each step trains, as piad.progressive.ProgressiveDropout does."""

    sizes_per_step: int

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch."""

    def choose(self, *, epoch: int, step: int, rank: int, number: int = 0) -> int:
        """Sets the model to the size with this number in the step, and returns a number that names it."""

    def step_scalars(self) -> dict[str, float]:
        """Values to log for a step."""


@dataclass
class Budget:
    """What a method starts from and may use, at one learning rate and with one seed.

    network: pre-trained; methods change copies of it.  images: with labels.  settings: the arguments of main.py; the
    teacher, where there is one, is the network.  images_for_all_sizes: the number of images that were trained on once,
    for all sizes together.  images_for_each_size: the number for each size that is trained by itself.
    """

    network: Network
    images: Images
    settings: argparse.Namespace
    device: torch.device
    images_for_all_sizes: int = 0
    images_for_each_size: int = 0

    @property
    def model(self) -> VisionTransformer:
        return self.network.model

    @property
    def epochs(self) -> int:
        return self.settings.epochs

    def proxy(self) -> Batches:
        """Batches of the proxy set, on the device."""
        images = proxy_set(self.images, self.settings.proxy_samples, self.settings.seed)
        loader = eval_loader(images, self.network.preprocessing, batch_size=64, workers=self.settings.workers)
        return [(x.to(self.device), y.to(self.device)) for x, y in loader]

    def train(
        self,
        model: nn.Module,
        rule: Rule | None = None,
        *,
        taught: bool = True,
        training: type[Training] = Training,
        fields: dict[str, Any] | None = None,
        epochs: int | None = None,
    ) -> nn.Module:
        """Trains a model in place and returns its averaged weights as a model, in eval mode.

        rule: chooses the size that each step trains; without it, the whole model is trained.  taught: whether there is
        a teacher.  training: a subclass with another loss.  fields: values for the fields that the subclass adds.
        epochs: default: those of the settings.
        """
        settings, epochs = self.settings, self.epochs if epochs is None else epochs
        loader = TrainLoader(
            self.images,
            self.network.preprocessing,
            augmentation(settings),
            batch_size=settings.batch_size,
            workers=settings.workers,
            seed=settings.seed,
            repeats=settings.repeated_aug,
        )
        teacher = copy.deepcopy(self.model) if taught else None
        held = start_training(settings, model, self.model.num_classes, self.device, teacher, "logits")
        held = training(**vars(held), **(fields or {}))
        scheduler, _ = create_scheduler_v2(
            held.optimizer,
            num_epochs=epochs,
            min_lr=settings.min_lr,
            warmup_epochs=settings.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=loader.steps,
        )
        for epoch in range(epochs):
            if rule is not None:
                rule.begin_epoch(epoch)
            first = epoch * loader.steps
            scheduler.step_update(first)
            train_one_epoch(
                held,
                loader.batches(epoch),
                epoch,
                steps=loader.steps,
                losses=AverageMeter(),
                regime=rule,
                after_step=lambda step, _, first=first: scheduler.step_update(first + step + 1),
            )
        return (model if held.ema is None else held.ema.module).eval()

    def spend(self, for_all_sizes: float = 0, for_each_size: float = 0) -> None:
        """Adds the images of this many epochs to what was trained on."""
        self.images_for_all_sizes += round(for_all_sizes * len(self.images))
        self.images_for_each_size += round(for_each_size * len(self.images))
