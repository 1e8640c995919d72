"""Run by torchrun: goes through programs with their real main()s, and each rank writes down what it saw and holds.

Arguments: a JSON file with a list of command lines, and a folder, which gets <number of the command>.<rank>.pt:
a list of the training steps, the weights and the mask table at the end. Nothing for a program that does not train.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import unwrap_model

from engine import Run

sys.path.insert(0, str(Path(__file__).parent))
from programs import run

FIT = Run.fit


def watched_fit(self: Run, epochs: int) -> None:
    """Run.fit() that keeps, of each step, the op code, what the model and the loss were given, and the gradients."""
    training, model = self.training, unwrap_model(self.training.model)
    steps: list[dict[str, Any]] = []
    loss_fn, step, choose = training.loss_fn, training.optimizer.step, self.regime.choose if self.regime else None

    def chosen(**place: int) -> int:
        steps.append({**place, "op_code": choose(**place)})
        return steps[-1]["op_code"]

    def given(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            if choose is None:
                steps.append({})
            steps[-1]["images"] = inputs[0].clone()

    def lossy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        steps[-1]["targets"] = targets.clone()
        return loss_fn(logits, targets)

    def stepped(*args: Any, **kwargs: Any) -> Any:
        steps[-1]["before"] = {name: value.detach().clone() for name, value in model.named_parameters()}
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        steps[-1]["gradients"] = {name: value.grad.clone() for name, value in trained}
        return step(*args, **kwargs)

    if self.regime:
        self.regime.choose = chosen
    model.register_forward_pre_hook(given)
    training.loss_fn, training.optimizer.step = lossy, stepped
    FIT(self, epochs)
    watched_fit.seen = {
        "steps": steps,
        "model": model.state_dict(),
        "model_ema": training.ema.module.state_dict() if training.ema else None,
        "mask_table": self.regime.table.to_json() if self.regime else None,
    }


def main() -> None:
    commands, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    Run.fit = watched_fit
    start = dist.init_process_group  # the programs share one group: gloo does not like to be started again
    dist.init_process_group = lambda *args, **kwargs: None if dist.is_initialized() else start(*args, **kwargs)
    for number, command in enumerate(commands):
        watched_fit.seen = None
        run(*command)
        if watched_fit.seen:
            torch.save(watched_fit.seen, folder / f"{number}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
