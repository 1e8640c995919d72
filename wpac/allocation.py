"""How much each dim of a contracted model matters to the loss, computed from the statistics without running the model.

A mask table can be made from this without training.
"""

from __future__ import annotations

import numpy as np
import torch

from models.backbone import Backbone, modules_of

from .compensation import DAMPING, ordered_layer
from .statistics import Statistics


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
