"""Write the tables of experiments into their READMEs: python experiments/fill_tables.py experiments/lc_lenet300

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
    """Columns in which nothing stands are left out."""
    head = ["", "epochs", "layers", "MACs", "parameters", "train loss", "train error, %", "test error, %",
            "as extracted, %", "of the reference"]  # fmt: skip
    lines = []
    for row in rows:
        reference = "" if row["cell"].startswith("deeptwist") else row["accuracy_before_last_distortion"]
        shown = (row.get("train_accuracy"), row["accuracy"], row.get("accuracy_extracted"), reference)
        errors = [f"{100 - float(x):.2f}" if x else "" for x in shown]
        layers = row["ranks"] if len(row["ranks"]) < 60 else ""
        sizes = [f"{int(row[unit]):,}" for unit in ("macs", "params")]
        lines.append([row["cell"], row.get("epochs", ""), layers, *sizes, row.get("train_loss", ""), *errors])
    for name, ranks, macs, params, log_loss, train, test in paper:
        epochs = "300" if name.endswith("reference") else PAPER_EPOCHS
        lines.append([name, epochs, ranks, f"{macs:,}", f"{params:,}", f"1e{log_loss}", train, test, "", ""])
    shown_columns = [i for i in range(len(head)) if any(line[i] for line in lines)]
    marks = [["---", "---:"][i > 2] for i in shown_columns]
    cells = [[line[i] for i in shown_columns] for line in (head, *lines)]
    written = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([written[0], f"|{'|'.join(marks)}|", *written[1:]])


if __name__ == "__main__":
    main()
