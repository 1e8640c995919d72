"""A classifier from an encoder: a linear head on its features, fitted to labels; the encoder stays as it is.

    python -m studies.linear_probe --model vit_small_patch14_dinov2 --model-kwargs num_classes=0 img_size=98 \
        --checkpoint FILE --data-path cifar10 --train-images 10000 --output probe.safetensors

The head is scikit-learn's logistic regression on standardized features of images that are drawn once from train/.
Prints top-1 (percent) on val/. The file is opened like any other weights: it says its model and preprocessing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from arguments import Parser, add_common_arguments, number, open_network, positive
from datasets import Images, check_labels, drawn, eval_loader, open_splits
from fidelity import Evaluator
from files import check_output_dir, write_text
from models.backbone import Backbone
from models.loading import fit_head
from models.targets import output_of
from supernet import Network
from supernet.saving import save_weights
from utils import UserError, init_processes, progress_bar, run_program, say, seed_everything


def batches_of(args: argparse.Namespace, network: Network, images: Images) -> DataLoader:
    """Batches of the images, prepared as the network asks, and of their labels."""
    return eval_loader(images, network.preprocessing, batch_size=args.batch_size, workers=args.workers)


def features_of(args: argparse.Namespace, network: Network, images: Images) -> tuple[np.ndarray, np.ndarray]:
    """The features (images, D) of the network and the labels (images,)."""
    batches, device = batches_of(args, network, images), next(network.model.parameters()).device
    network.model.eval()
    with torch.inference_mode():
        found = [(output_of(network.model, x.to(device), "features"), y) for x, y in progress_bar(batches, "features")]
    return tuple(torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))


def fit_probe(model: Backbone, features: np.ndarray, labels: np.ndarray, classes: int, strength: float) -> None:
    """Gives the model a linear head that is fitted to features (images, D) and labels (images,).

    strength: C of LogisticRegression, the inverse of its regularization.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    found = LogisticRegression(C=strength, max_iter=1000).fit((features - mean) / std, labels)
    weight = found.coef_ / std  # the head takes features as they are
    fit_head(model, classes, remake=True)
    head = model.get_classifier()
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight))
        head.bias.copy_(torch.as_tensor(found.intercept_ - weight @ mean))


def main() -> None:
    args = parse_arguments()
    device = init_processes(args)
    seed_everything(args.seed)
    check_output_dir(args.output.parent, "--output")
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output} is not a .safetensors file: give a name that ends so")
    train, val = open_splits(args.data_set, args.data_path, index=args.index)
    check_labels(train, args.data_set, "a linear probe", "give a data set with labels")
    network = open_network(args, plain_weights=True)
    if network.model.num_classes:
        raise UserError(
            f"{network.source or network.name} has a head of {network.model.num_classes} classes: give an encoder"
        )
    network.model.to(device)
    train = drawn(train, args.train_images, args.seed)
    fit_probe(network.model, *features_of(args, network, train), train.num_classes, args.strength)
    val = drawn(val, args.val_images or len(val), args.seed)
    top1 = Evaluator("logits", batches_of(args, network, val), device, labels=True)(network.model)["top1"]
    network.target, network.stamp = "logits", None  # other weights than those that were opened
    save_weights(args.output, network.model)
    write_text(args.output.with_suffix(".json"), json.dumps(network.describe(), indent=1) + "\n")
    say(f"written: {args.output}")
    print(json.dumps({"file": args.output.name, "train_images": len(train), "val_images": len(val), "top1": top1}))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    group = parser.add_argument_group("probe")
    group.add_argument("--train-images", type=positive, default=10_000, metavar="N", help="to fit on (default: 10,000)")
    group.add_argument("--val-images", type=positive, metavar="N", help="images of val/ to use (default: all)")
    group.add_argument(
        "--strength",
        type=number(float, 1e-9),
        default=0.01,
        metavar="C",
        help="inverse of the regularization (default: 0.01)",
    )
    group.add_argument("--output", type=Path, required=True, metavar="FILE", help="weights to write, .safetensors")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
