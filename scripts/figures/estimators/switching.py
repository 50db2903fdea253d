"""E4: a nonlinear map, met on keys whose spread switches, without a learned parameter (switching_regression.py)."""

from __future__ import annotations

from matplotlib.figure import Figure

from scripts.figures.estimators.finding import Finding, curve
from scripts.figures.results import Row, legend
from scripts.figures.switching_regression import BANDWIDTHS, errors, process


def finding(sequences: int = 24, tokens: int = 192) -> Finding:
    k, v = process(sequences, tokens)
    spans = {"just after the switch": slice(tokens // 4, tokens // 4 + 16), "last half": slice(tokens // 2, tokens)}
    table: list[Row] = []
    late: dict[tuple[str, str], dict[float | None, float]] = {}
    for setting, unit in (("raw", False), ("unit", True)):
        found = errors(k, v, unit)
        for (name, h), by_token in found.items():
            late.setdefault((setting, name), {})[h] = by_token[spans["last half"]].mean().item()
        for name in dict.fromkeys(name for name, _ in found):
            of = late[setting, name]
            best = min(of, key=lambda h: of[h])
            row: Row = {"keys": setting, "estimator": name, "bandwidth": best}
            table.append(row | {span: found[name, best][at].mean().item() for span, at in spans.items()})
    least = {key: min(of.values()) for key, of in late.items()}

    def compare(setting: str, first: str, second: str) -> tuple[str, bool]:
        a, b = least[setting, first], least[setting, second]
        return f"{setting} keys, last half: {first} {a:.3f}, below {second} {b:.3f}", a < b

    checks = [compare(s, "local linear (order 1)", "softmax (order 0)") for s in ("raw", "unit")]
    checks += [compare(s, "least squares", "linear attention / t") for s in ("raw", "unit")]

    def draw(figure: Figure) -> None:
        for axes, setting in zip(figure.subplots(1, 2, sharey=True), ("raw", "unit"), strict=True):
            for i, name in enumerate(name for s, name in late if s == setting):
                of = late[setting, name]
                flat = None in of
                curve(axes, i, BANDWIDTHS, [of[None if flat else h] for h in BANDWIDTHS], name, marked=not flat)
            axes.set(xscale="log", yscale="log", xlabel="bandwidth h", title=f"{setting} keys, last half")
            axes.label_outer()
        figure.axes[0].set_ylabel("mean squared error")
        legend(figure)

    return Finding(
        "Switching regression, nothing learned",
        "A fit around each query follows a map that one linear map for all pairs can't hold: local linear regression "
        "is below softmax, and least squares below linear attention.",
        "Mean squared error of the next value, at the best bandwidth of the last half.",
        "Wang, Shi and Fox's talk (2025); a reconstruction, since its exact process is not published",
        table,
        draw,
        checks,
    )
