"""Fixtures that the tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from timm.models.vision_transformer import VisionTransformer
from tiny import VARIANTS, random_backbone, random_data
from torch import Tensor

if TYPE_CHECKING:
    from programs import Road

# Examples that are the same at every run, and no limit on their time: other work on the machine is no failure.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.fixture
def backbone() -> VisionTransformer:
    """A tiny random backbone of the plain kind, float64."""
    return random_backbone()


@pytest.fixture(params=VARIANTS)
def any_backbone(request: pytest.FixtureRequest) -> VisionTransformer:
    """Each kind of tiny random backbone in turn, float64."""
    return random_backbone(request.param)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """8 random images and their targets, float64."""
    return random_data(8)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes find together (see ranks.rank_work), one entry a rank."""
    from ranks import rank_work, run_in_ranks

    return run_in_ranks(rank_work, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """The files of a whole road through the real programs."""
    from programs import walk_the_road

    return walk_the_road(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
