"""The words and the units of what is measured, for tables, pictures and the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """name: in a table.  label: says what it is.  unit: "%", "nats" or "cosine"."""

    name: str
    label: str
    unit: str

    def text(self, value: float) -> str:
        """The value as tables show it."""
        return {"%": f"{value:.2f}", "nats": f"{value:.2g}", "cosine": f"{value:.4f}"}[self.unit]

    def note(self) -> str:
        """What a table says below."""
        return f"{self.name}: {self.label}, {'with the whole network' if self.unit == 'cosine' else self.unit}."

    def with_unit(self, value: float) -> str:
        return self.text(value) + self.suffix

    @property
    def suffix(self) -> str:
        """The unit behind a value."""
        return "" if self.unit == "cosine" else f" {self.unit}"


# Those that need labels first; a table, a picture or a page with room for one measure shows the first that it has.
MEASURES = {
    "top1": Measure("top-1", "top-1 accuracy", "%"),
    "top5": Measure("top-5", "top-5 accuracy", "%"),
    "knn": Measure("k-NN", "accuracy of k-NN (20 neighbours)", "%"),
    "agreement": Measure("agreement", "same top-1 as the whole network", "%"),
    "kl": Measure("KL", "KL divergence from the whole network", "nats"),
    "token_cosine": Measure("tokens", "mean cosine of the tokens", "cosine"),
    "token_cosine_p5": Measure("tokens p5", "5th percentile of the tokens' cosines", "cosine"),
    "feature_cosine": Measure("features", "mean cosine of the features", "cosine"),
}
# unit -> what an axis with measures of it says
AXES = {"%": "%", "nats": "KL divergence, nats", "cosine": "cosine with the whole network"}


def measures_of(row: dict[str, Any]) -> dict[str, Measure]:
    """The measures that a row holds, in their order."""
    return {key: measure for key, measure in MEASURES.items() if key in row}


def curves_of(row: dict[str, Any]) -> dict[str, Measure]:
    """Those that pictures and the page show: all but the top-5, which follows the top-1."""
    return {key: measure for key, measure in measures_of(row).items() if key != "top5"}


def sentence(row: dict[str, Any]) -> str:
    """The measures of a row in a line."""
    names = {key: m.label if m.unit == "cosine" else m.name for key, m in measures_of(row).items()}
    return ", ".join(f"{name} {MEASURES[key].with_unit(row[key])}" for key, name in names.items())
