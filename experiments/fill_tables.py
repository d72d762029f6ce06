"""Write the tables of the experiments on learning-compression into their READMEs:
python experiments/fill_tables.py experiments/lc_lenet300

results.csv goes between `<!-- table -->` and `<!-- end -->`, earlier.csv, the runs of earlier schedules, between
`<!-- earlier -->` and `<!-- end earlier -->`.
"""

import csv
import sys
from pathlib import Path

# rank per layer, MACs, parameters, log10 of the training loss, training and test error
PAPER = {
    "lc_lenet300": [
        ("the paper, reference", "300 100 10", 266_200, 266_610, "-3.68", "0.00", "1.98"),
        ("the paper, lambda 0.25e-3", "35 16 9", 45_330, 46_150, "-4.11", "0.00", "1.87"),
        ("the paper, lambda 1e-3", "24 10 9", 31_006, 31_826, "-4.02", "0.00", "2.06"),
        ("the paper, lambda 2e-3", "18 9 9", 24_102, 24_922, "-3.88", "0.00", "2.39"),
    ],
    "lc_lenet5": [
        ("the paper, reference", "20 50 500 10", 2_293_000, 431_080, "-6.27", "0.00", "0.55"),
        ("the paper, lambda 0.4e-3", "5 5 14 9", 328_390, 26_855, "-3.73", "0.01", "0.75"),
        ("the paper, lambda 1.0e-3", "4 5 9 9", 295_970, 20_310, "-3.27", "0.01", "0.82"),
        ("the paper, lambda 1.1e-3", "3 3 9 9", 199_650, 19_165, "-2.28", "0.16", "1.33"),
    ],
}
# of the reference, of all L steps and of the factors, according to the authors' code
PAPER_EPOCHS = "300 + 900 + 200 to 300"


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        readme = (folder / "README.md").read_text()
        for file, mark, end, paper in (
            ("results.csv", "<!-- table -->", "<!-- end -->", PAPER.get(folder.name, [])),
            ("earlier.csv", "<!-- earlier -->", "<!-- end earlier -->", []),
        ):
            if (folder / file).is_file() and mark in readme:
                with open(folder / file, newline="") as lines:
                    rows = list(csv.DictReader(lines))
                head, _, rest = readme.partition(mark)
                readme = f"{head}{mark}\n{table(rows, paper)}\n{end}{rest.partition(end)[2]}"
        (folder / "README.md").write_text(readme)


def table(rows: list[dict[str, str]], paper: list[tuple[str, str, int, int, str, str, str]]) -> str:
    lines = [
        "| | epochs | layers | MACs | parameters | train loss | train error, % | test error, % | of the reference |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        loss, train = row.get("train_loss", ""), row.get("train_accuracy", "")
        reference = "" if row["cell"].startswith("deeptwist") else row["accuracy_before_last_distortion"]
        shown = (train, row["accuracy"], reference)
        errors = [f"{100 - float(x):.2f}" if x else "" for x in shown]
        layers = row["ranks"] if len(row["ranks"]) < 60 else ""
        sizes = [f"{int(row[unit]):,}" for unit in ("macs", "params")]
        lines.append(f"| {' | '.join([row['cell'], row.get('epochs', ''), layers, *sizes, loss, *errors])} |")
    for name, ranks, macs, params, log_loss, train, test in paper:
        epochs = "300" if name.endswith("reference") else PAPER_EPOCHS
        lines.append(f"| {name} | {epochs} | {ranks} | {macs:,} | {params:,} | 1e{log_loss} | {train} | {test} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
