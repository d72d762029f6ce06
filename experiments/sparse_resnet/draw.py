"""Draw results.csv and write it into the README's tables: python experiments/sparse_resnet/draw.py"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
SHARES = (40, 20, 10)
KINDS = {"low_rank": "low rank", "sparse": "sparse", "both": "both"}
TARGETS = {"weights": "nearest to the weights", "asymmetric": "asymmetric"}
DENSE = {"20": 91.73, "56": 93.39}
HEAD = ["| stored values | | low rank | sparse | both |", "|---:|---|---:|---:|---:|"]


def main() -> None:
    with open(HERE / "results.csv", newline="") as file:
        accuracy = {row["cell"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    readme = (HERE / "README.md").read_text()
    for group in ("20", "56", "trained"):
        before, rest = readme.split(f"<!-- {group} -->")
        found = rows(accuracy, group)
        table = [*HEAD, *found] if found else ["Has not run yet."]
        lines = [f"<!-- {group} -->", *table, f"<!-- end {group} -->"]
        readme = before + "\n".join(lines) + rest.split(f"<!-- end {group} -->")[1]
    (HERE / "README.md").write_text(readme)
    draw(accuracy)


def rows(accuracy: dict[str, float], group: str) -> list[str]:
    """The best of each line in bold; gaps were not run."""
    lines = []
    for share in SHARES:
        for target, title in TARGETS.items():
            found = [accuracy.get(f"{group}-{target}-{share}-{kind}") for kind in KINDS]
            best = max((x for x in found if x is not None), default=None)
            shown = ["" if x is None else f"**{x:.2f}**" if x == best else f"{x:.2f}" for x in found]
            if best is not None:
                lines.append(f"| {share} % | {title} | {' | '.join(shown)} |")
    return lines


def draw(accuracy: dict[str, float]) -> None:
    panels = {depth: dense for depth, dense in DENSE.items() if rows(accuracy, depth)}
    canvas = Figure(figsize=(1 + 4.5 * len(panels), 3.8), layout="constrained")
    every = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (depth, dense) in zip(every, panels.items(), strict=True):
        for target, style in (("asymmetric", "o-"), ("weights", "s:")):
            for i, (kind, title) in enumerate(KINDS.items()):
                found = [(s, accuracy.get(f"{depth}-{target}-{s}-{kind}")) for s in SHARES]
                points = [(share, x) for share, x in found if x is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{title}, {TARGETS[target]}")
        axes.axhline(dense, color="0.5", linewidth=1)
        axes.set(title=f"ResNet-{depth}, without training", xlabel="stored values, % of the convolutions' weights")
        axes.set_xticks(SHARES)
        axes.grid(alpha=0.3)
    every[0].set_ylabel("test accuracy, %")
    handles, labels = every[0].get_legend_handles_labels()
    canvas.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    canvas.savefig(HERE / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
