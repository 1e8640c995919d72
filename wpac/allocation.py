"""How much of the loss hangs on each dim, read off the statistics without running anything: sizes without training."""

from __future__ import annotations

import numpy as np
import torch

from models.backbone import Backbone, modules_of

from .compensation import DAMPING, ordered_layer
from .statistics import Statistics


@torch.no_grad()
def dim_errors(model: Backbone, statistics: Statistics, damping: float = DAMPING) -> dict[str, np.ndarray]:
    """What each dim of a contracted model adds to the loss when it is cut and compensated: module key -> (width,).

    To second order, in the metric G of the loss: with S = L L^T of a last layer's inputs and A = W L, cutting to the
    first k loses sum_{j >= k} a_j^T G a_j. For an attention the dims of q and k lose scores, too: dim i changes the
    cost by g_i q_i at a token, taken as independent. statistics: as contract() leaves them.
    """
    errors = {}
    for key, module in modules_of(model).items():
        outputs = statistics.outputs[key]
        weight, _ = ordered_layer(model, module)
        effect = weight @ torch.linalg.cholesky(outputs.damped(damping))  # (D, n)
        lost = (effect * (outputs.metric @ effect)).sum(0).view(module.width, module.heads).sum(1)
        if module.parts == 3:
            tokens = statistics.tokens[key]
            square = tokens.scores()[0].diagonal(dim1=1, dim2=2) / tokens.weight[0, :, None].clamp(min=1e-300)
            lost = lost + (square * tokens.gradient.diagonal(dim1=1, dim2=2)).sum(0)  # (H, d) -> (d,)
        errors[key] = lost.cpu().numpy()
    return errors
