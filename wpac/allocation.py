"""How much each dim of a contracted model matters to the loss, computed from the statistics without running the model.

A mask table can be made from this without training, and another one later: the losses are kept beside the weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from files import atomic_file, load_checkpoint
from models.backbone import Backbone, modules_of
from utils import UserError

from .compensation import DAMPING, ordered_layer
from .statistics import Statistics

DIM_LOSSES = "dim_losses.safetensors"


@torch.no_grad()
def dim_errors(model: Backbone, statistics: Statistics, damping: float = DAMPING) -> dict[str, np.ndarray]:
    """Estimates how much the loss rises with each dim that is cut from a contracted model and compensated.

    Returns module key -> (width,). The estimate is of second order, in the metric G of the loss. With S = L L^T the
    covariance of the inputs of a module's last layer W, and A = W L with columns a_j, keeping the first k inputs loses
    sum_{j >= k} a_j^T G a_j. In attention, q and k lose a part of the scores as well: dim i of q changes the cost by
    g_i q_i at each token, and these changes are treated as independent.

    statistics: with outputs, after contract(), which moves them into the new coordinates.
    """
    errors = {}
    for key, module in modules_of(model).items():
        outputs = statistics.outputs[key]
        weight, _ = ordered_layer(model, module)
        effect = weight @ torch.linalg.cholesky(outputs.damped(damping))  # (D, n)
        lost = (effect * (outputs.metric @ effect)).sum(0).view(module.width, module.heads).sum(1)
        if module.parts == 3:
            tokens = statistics.tokens[key]
            square = tokens.score_moments()[0].diagonal(dim1=1, dim2=2) / tokens.weight[0, :, None].clamp(min=1e-300)
            lost = lost + (square * tokens.gradient.diagonal(dim1=1, dim2=2)).sum(0)  # (H, d) -> (d,)
        errors[key] = lost.cpu().numpy()
    return errors


def save_dim_losses(path: Path, losses: dict[str, np.ndarray], stamp: str) -> None:
    """Writes what dim_errors() found, atomically. stamp: hexadecimal, of the weights that it belongs to."""
    tensors = {key: torch.from_numpy(loss) for key, loss in losses.items()}
    with atomic_file(path) as temporary:
        save_file(tensors | {"stamp": torch.tensor(int(stamp, 16))}, temporary)


def load_dim_losses(path: Path, model: Backbone, stamp: str) -> dict[str, np.ndarray]:
    """Reads a file of save_dim_losses().

    stamp: of the weights of the model. Raises UserError if the file is missing or damaged, or was made for another
    model or for other weights.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: the loss of each dim is needed, which reparam.py --method best writes")
    tensors = load_checkpoint(path)
    found_stamp, modules = tensors.pop("stamp", None), modules_of(model)
    if found_stamp is None or found_stamp.numel() != 1 or found_stamp.item() != int(stamp, 16):
        raise UserError(f"{path} was made for other weights; make it again with reparam.py --method best")
    for key in tensors.keys() | modules.keys():
        found, needed = tensors.get(key), modules.get(key)
        right = found is not None and needed is not None and found.shape == (needed.width,)
        if not (right and found.dtype == torch.float64 and found.isfinite().all()):
            raise UserError(f"{path} does not hold the losses of this model: {key} is missing or of another kind")
    return {key: tensors[key].numpy() for key in modules}
