"""Evaluating models on what the data allow: fidelity to the whole network, and with labels accuracy or k-NN."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import Accuracy
from models.backbone import Backbone
from models.targets import outputs_of
from utils import reduce_sum, world

Batches = Iterable[tuple[Tensor, Tensor]]  # images (B, C, height, width), labels (B,)

# What an Evaluator finds, by its name in reports.
ACCURACY = ("top1", "top5", "loss", "knn")
FIDELITY = ("agreement", "kl", "token_cosine", "token_cosine_p5", "feature_cosine")
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the k-NN classifier: DINO's
KEPT = 2**30  # bytes of the whole network's outputs that each process keeps; the others are computed for each model
PERCENTILE, RESOLUTION = 0.05, 1e-5  # of the cosines of tokens, and how exact it is


class Evaluator:
    """Evaluates models of one target on the same images.

    With labels: top1, top5 (percent) and loss for the target "logits"; for "features" and "tokens" knn (percent), the
    accuracy of a classifier by the 20 nearest of the training images, as in DINO.
    With the whole network, without labels: agreement of the top-1 (percent) and kl, the KL divergence of the
    predictions (nats), for "logits"; the mean cosine of the features and of each token, and its 5th percentile over all
    tokens, for the others.
    """

    def __init__(
        self,
        target: str,
        batches: Batches,
        device: torch.device,
        *,
        labels: bool,
        training: Batches | None = None,
        whole: Backbone | None = None,
        amp: torch.dtype | None = None,
        whole_amp: torch.dtype | None = None,
    ):
        """batches: this process's share of the images, the same at each pass.  labels: whether their labels count.

        training: this process's share of the images among which neighbours are searched, with labels; needed with
        labels for the targets "features" and "tokens".  whole: the whole network, on the device.  amp: dtype of
        autocast.  whole_amp: that of the whole network, where it differs.
        """
        self.target, self.batches, self.device = target, batches, device
        self.labels, self.training, self.whole = labels, training, whole
        self.amp, self.whole_amp = amp, amp if whole_amp is None else whole_amp
        self.kept: list[dict[str, Tensor]] = []  # outputs of the whole network, of the first batches
        self.room = KEPT

    @torch.inference_mode()
    def __call__(self, model: Backbone) -> dict[str, float]:
        """What is known of a model on the device, over the images of all processes; a collective call."""
        model.eval()
        accuracy = fidelity = None
        if self.labels:
            accuracy = Accuracy(self.device) if self.target == "logits" else self._neighbours(model)
        if self.whole is not None:
            fidelity = Divergence(self.device) if self.target == "logits" else Cosines(self.device, self.target)
        for number, (images, labels) in enumerate(self.batches):
            images = images.to(self.device, non_blocking=True)
            found = self._outputs(model, images, self.amp)
            if accuracy:
                output = found["logits" if self.target == "logits" else "features"]
                accuracy.update(output, labels.to(self.device, non_blocking=True))
            if fidelity:
                fidelity.update(found, self._expected(number, images))
        return {key: value for part in (accuracy, fidelity) if part for key, value in part.finalize().items()}

    def _outputs(self, model: Backbone, images: Tensor, amp: torch.dtype | None) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, dtype=amp, enabled=amp is not None):
            return {name: output.float() for name, output in outputs_of(model, images, self.target).items()}

    def _expected(self, number: int, images: Tensor) -> dict[str, Tensor]:
        """The outputs of the whole network for a batch."""
        if number < len(self.kept):
            return {name: output.to(self.device) for name, output in self.kept[number].items()}
        outputs = self._outputs(self.whole.eval(), images, self.whole_amp)
        size = sum(output.nbytes for output in outputs.values())
        if number == len(self.kept) and size <= self.room:
            self.kept.append({name: output.cpu() for name, output in outputs.items()})
            self.room -= size
        return outputs

    def _neighbours(self, model: Backbone) -> Neighbours:
        """The features of all training images, in the order of the processes."""
        found = [
            (self._outputs(model, images.to(self.device), self.amp)["features"], labels)
            for images, labels in self.training
        ]
        features = torch.cat([features for features, _ in found])
        return Neighbours(*gathered(features, torch.cat([labels for _, labels in found]).to(self.device)))


def gathered(*tensors: Tensor) -> list[Tensor]:
    """The rows (n, ...) of all processes, where n may differ between them, in the order of the processes."""
    rank, ranks = world()
    counts = torch.zeros(ranks, dtype=torch.long, device=tensors[0].device)
    counts[rank] = len(tensors[0])
    reduce_sum(counts)
    start = int(counts[:rank].sum())
    whole = [tensor.new_zeros(int(counts.sum()), *tensor.shape[1:]) for tensor in tensors]
    for place, tensor in zip(whole, tensors, strict=True):
        place[start : start + len(tensor)] = tensor
    reduce_sum(*whole)
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# Collectors: update() with each batch, then finalize(), which sums over the processes


class Neighbours:
    """knn: the accuracy (percent) of a vote of the nearest training images, each weighted by exp(cosine / 0.07)."""

    def __init__(self, features: Tensor, labels: Tensor):
        """features: of the training images, (n, D).  labels: (n,)."""
        self.features, self.labels = F.normalize(features, dim=1), labels
        self.totals = torch.zeros(2, dtype=torch.float64, device=features.device)  # correct, images

    def update(self, features: Tensor, labels: Tensor) -> None:
        """features: (B, D).  labels: (B,)."""
        cosines = F.normalize(features, dim=1) @ self.features.mT  # (B, n)
        nearest, places = cosines.topk(min(NEIGHBOURS, len(self.labels)), dim=1)
        votes = features.new_zeros(len(features), int(self.labels.max()) + 1)
        votes.scatter_add_(1, self.labels[places], (nearest / TEMPERATURE).exp())
        correct = (votes.argmax(1) == labels).sum()
        self.totals += torch.stack([correct, correct.new_tensor(len(labels))])

    def finalize(self) -> dict[str, float]:
        reduce_sum(self.totals)
        correct, images = self.totals.tolist()
        return {"knn": 100 * correct / images}


class Divergence:
    """agreement: how often the top-1 is that of the whole network (percent).  kl: of its prediction, mean (nats)."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # agreeing, KL, images

    def update(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Both: "logits" (B, classes)."""
        found, expected = found["logits"], expected["logits"]
        agreeing = (found.argmax(1) == expected.argmax(1)).sum()
        before, after = (logits.double().log_softmax(1) for logits in (expected, found))
        kl = F.kl_div(after, before, reduction="sum", log_target=True)
        self.totals += torch.stack([agreeing.double(), kl, kl.new_tensor(len(found))])

    def finalize(self) -> dict[str, float]:
        reduce_sum(self.totals)
        agreeing, kl, images = self.totals.tolist()
        return {"agreement": 100 * agreeing / images, "kl": max(kl / images, 0.0)}  # rounding may give less


class Cosines:
    """feature_cosine and token_cosine: means over images and over tokens.  token_cosine_p5: the 5th percentile.

    The percentile is read off a histogram: its size does not grow with the number of tokens, and its counts, which are
    whole numbers, have the same sum over any number of processes. It is exact to RESOLUTION.
    """

    def __init__(self, device: torch.device, target: str):
        names = ("features", "tokens") if target == "tokens" else ("features",)
        self.totals = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in names}  # sum, number
        # Number of tokens by 1 - cosine, in units of the resolution.
        self.histogram = torch.zeros(round(2 / RESOLUTION) + 1, dtype=torch.long, device=device)

    def update(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Both: "features" (B, D) and, of the target tokens, "tokens" (B, N, D)."""
        for name, total in self.totals.items():
            cosines = F.cosine_similarity(found[name].double(), expected[name].double(), dim=-1)
            total += torch.stack([cosines.sum(), cosines.new_tensor(cosines.numel())])
            if name == "tokens":  # one that is not a number counts as the lowest
                places = ((1 - cosines.nan_to_num(-1.0)) / RESOLUTION).round().long().clamp(0, len(self.histogram) - 1)
                self.histogram += torch.bincount(places.flatten(), minlength=len(self.histogram))

    def finalize(self) -> dict[str, float]:
        reduce_sum(*self.totals.values(), self.histogram)
        means = {name: (total / number).item() for name, (total, number) in self.totals.items()}
        found = {"feature_cosine": means["features"]}
        if "tokens" in means:
            counts = self.histogram.flip(0).cumsum(0)  # from the lowest cosine up
            below = int((counts < PERCENTILE * counts[-1]).sum())
            found |= {
                "token_cosine": means["tokens"],
                "token_cosine_p5": 1 - RESOLUTION * (len(counts) - 1 - below),
            }
        return found
