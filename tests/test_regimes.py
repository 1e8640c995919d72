"""Training regimes that PIAD is compared with: how much each drops, what dropping does, and resuming a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import PIAD, Road, run
from tiny import random_backbone, random_data
from torch.nn import functional as F

from models.backbone import full_widths
from models.elastic import make_elastic
from models.macs import count_macs
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from piad.regimes import REGIMES

RATIO = 0.5  # not the default 0.875: the patch embedding has a large share of the tiny backbone's MACs
OTHERS = [name for name in REGIMES if name != "piad"]


def make_regime(name: str, table: MaskTable | None = None) -> ProgressiveDropout:
    model = make_elastic(random_backbone(patch_size=16))
    regime = REGIMES[name](model, [random_data(8)], ratio=RATIO, epochs=1, seed=0, table=table)
    model.train()
    return regime


def kept_share(regime: ProgressiveDropout) -> float:
    """The share of the MACs of the modules that the step keeps after choose()."""
    full = regime.table.widths(0)
    kept = dict(full)
    for index, block in enumerate(regime.model.blocks):
        for kind, module in (("attn", block.attn), ("mlp", block.mlp)):
            key = f"{index}.{kind}"
            mask = getattr(regime, "masks", {}).get(key)
            kept[key] = module.width if mask is None else int(mask.sum()) * regime.units.sizes[key]
    macs = [regime.units.total(widths) for widths in (kept, full)]
    return macs[0] / macs[1]


@pytest.mark.parametrize("name", ["channel", "weighted-channel", "layer"])
def test_half_of_the_ratio_is_dropped_on_average(name: str):
    regime = make_regime(name)
    shares = []
    for step in range(400):
        assert regime.choose(epoch=0, step=step, rank=0) == 0
        shares.append(kept_share(regime))
    assert np.mean(shares) == pytest.approx(1 - regime.share / 2, abs=0.04)
    assert np.std(shares) > 0.02


def test_without_dropout_the_whole_network_is_trained():
    regime = make_regime("none")
    regime.choose(epoch=0, step=0, rank=0)
    assert kept_share(regime) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_tables_are_fixed_from_the_start_and_reach_the_ratio(name: str):
    regime = make_regime(name)
    table = regime.table
    regime.begin_epoch(0)
    assert regime.table is table
    table.check(full_widths(regime.model), "the model")
    gone = 1 - count_macs(regime.model, table.widths(-1)) / regime.network_macs
    assert RATIO - 0.05 < gone < RATIO + (0.2 if name == "layer" else 0.05)  # the last step may be large
    if name in ("none", "channel"):
        shares = [{key: width / full for (key, width), full in zip(row.items(), table.rows[0].values(), strict=True)}
                  for row in table.rows]  # fmt: skip
        assert all(max(row.values()) - min(row.values()) <= 1 / 8 for row in shares)
    if name == "layer":
        assert all(width in (0, table.rows[0][key]) for row in table.rows for key, width in row.items())
    if name == "weighted-channel":
        piad = make_regime("piad")
        piad.begin_epoch(0)
        assert table.rows == piad.table.rows


def test_dropping_units_equals_setting_their_weights_to_zero():
    regime = make_regime("channel")
    model, (images, targets) = regime.model, random_data(4)
    zeroed = copy.deepcopy(random_backbone(patch_size=16))
    regime.choose(epoch=0, step=3, rank=0)
    with torch.no_grad():
        for index, block in enumerate(zeroed.blocks):
            attn, mlp = block.attn, block.mlp
            dims = ~regime.masks[f"{index}.attn"].repeat_interleave(regime.units.sizes[f"{index}.attn"])
            units = ~regime.masks[f"{index}.mlp"].repeat_interleave(regime.units.sizes[f"{index}.mlp"])
            assert dims.any()
            assert units.any()
            attn.qkv.weight.view(3, attn.num_heads, attn.head_dim, -1)[:, :, dims] = 0
            attn.qkv.bias.view(3, attn.num_heads, attn.head_dim)[:, :, dims] = 0
            mlp.fc2.weight[:, units] = 0
    torch.testing.assert_close(model(images), zeroed(images))
    F.cross_entropy(model(images), targets).backward()
    units = regime.masks["0.mlp"].repeat_interleave(regime.units.sizes["0.mlp"])
    rows = model.blocks[0].mlp.fc1.weight.grad.abs().sum(1)
    assert (rows[~units] == 0).all()
    assert (rows[units] > 0).all()
    # In eval mode nothing is dropped.
    torch.testing.assert_close(model.eval()(images), random_backbone(patch_size=16)(images))


@pytest.mark.parametrize("name", OTHERS)
def test_regimes_where_units_are_not_equal(name: str):
    """11 dims per head are five units of 2 and one of 1; 165 hidden units are 20 of 8 and one of 5."""
    model = make_elastic(random_backbone(patch_size=16, embed_dim=33, mlp_ratio=5))
    regime = REGIMES[name](model, [random_data(8)], ratio=RATIO, epochs=1, seed=0, table=None)
    model.train()
    regime.choose(epoch=0, step=0, rank=0)
    assert model(random_data(2)[0]).isfinite().all()
    if name == "none":
        assert regime.table.rows[0] == full_widths(model)
        assert all(row["0.attn"] % 2 == 0 and row["0.mlp"] % 8 == 0 for row in regime.table.rows if row["0.attn"] < 11)
    if hasattr(regime, "masks"):
        assert {key: len(mask) for key, mask in regime.masks.items()} == {
            f"{block}.{kind}": count for block in range(2) for kind, count in {"attn": 6, "mlp": 21}.items()
        }


@pytest.mark.parametrize("name", REGIMES)
def test_draws_are_the_same_after_resuming(name: str):
    first = make_regime(name)
    first.begin_epoch(0)
    resumed = make_regime(name, MaskTable.from_json(json.loads(json.dumps(first.state_dict()["mask_table"]))))
    images, _ = random_data(2)

    def outputs(regime: ProgressiveDropout, **key: int) -> torch.Tensor:
        regime.choose(**{"epoch": 1, "step": 2, "rank": 0} | key)
        return regime.model(images).detach()

    torch.testing.assert_close(outputs(first), outputs(resumed), rtol=0, atol=0)
    if name != "none":
        assert any(not torch.equal(outputs(first), outputs(first, step=step)) for step in range(3, 8))
        assert all(torch.equal(outputs(first), outputs(first, rank=rank)) for rank in range(1, 5))
        first.per_rank = True
        assert any(not torch.equal(outputs(first), outputs(first, rank=rank)) for rank in range(1, 5))


@pytest.mark.parametrize("name", OTHERS)
def test_each_regime_trains_and_resumes_through_main(name: str, road: Road, tmp_path: Path):
    flags = [*PIAD, "--regime", name, "--epochs", 2, "--dropout-ratio", RATIO, "--checkpoint", road.contracted]
    run("main.py", *flags, "--output-dir", tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert json.loads(log.splitlines()[-1])["top1_full"] > 15  # of ten classes
    last = tmp_path / "checkpoint_1.pth"
    weights = road.weights(last)
    last.unlink()
    run("main.py", *flags, "--resume", "auto", "--output-dir", tmp_path)
    assert (tmp_path / "log.txt").read_text() == log
    assert all(torch.equal(value, weights[key]) for key, value in road.weights(last).items())
