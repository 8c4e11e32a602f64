"""figures.py: assets/results.png and the table of results, from the CSV files of this folder.

    pip install matplotlib && python assets/results/figures.py

Of each run ARM-SEED.csv (its metrics.csv) and its last row in distances.csv count; whatever is not
there is left out. Up is better in all three pictures."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path("assets/results")
ARMS = {  # where the arm is aligned, and its colour
    "vanilla": ("-", "black"),
    "repa2": ("block 2", "tab:blue"),
    "repa4": ("block 4", "tab:green"),
    "repa6": ("block 6", "tab:red"),
    "control6": ("block 6, to another image's targets", "tab:orange"),
}
SEEDS = {"0": "-", "1": "--"}  # and their lines
JUDGES = {"lite2": ("EfficientNet-Lite2", "o"), "judge": ("judge.py", "x")}


def read(path):  # a CSV's rows, none if it is not there
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curve(run, column):  # {step: number}, where the run has measured it
    rows = read(FOLDER / f"{run}.csv")
    return {int(row["step"]): float(row[column]) for row in rows if row.get(column)}


def below(number, reference):  # in percent
    return 100 * (1 - number / reference)


def draw(distances):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for place, (arm, (_, colour)) in enumerate(ARMS.items()):
        for seed, line in SEEDS.items():
            run, vanilla = f"{arm}-{seed}", f"vanilla-{seed}"
            style = dict(color=colour, linestyle=line, marker=".", label=run)
            alignment, losses = curve(run, "val_alignment"), curve(run, "val_velocity_loss")
            if alignment:
                middle.plot(list(alignment), list(alignment.values()), **style)
            if losses and arm != "vanilla":
                references = curve(vanilla, "val_velocity_loss")
                ahead = {s: below(losses[s], references[s]) for s in losses if s in references}
                left.plot(list(ahead), list(ahead.values()), **style)
            for offset, (column, (_, marker)) in zip((-0.15, 0.15), JUDGES.items()):
                ours, theirs = distances.get(run, {}), distances.get(vanilla, {})
                same_step = ours.get("step") == theirs.get("step")
                if arm != "vanilla" and same_step and ours.get(column) and theirs.get(column):
                    percent = below(float(ours[column]), float(theirs[column]))
                    right.scatter(place + offset, percent, color=colour, marker=marker)
    for axes in (left, right):
        axes.axhline(0, color="black", linewidth=1)
    left.set(xlabel="step", ylabel="velocity loss, % below vanilla's")
    middle.set(xlabel="step", ylabel="alignment (mean patch cosine)")
    right.set(ylabel="Fréchet distance, % below vanilla's", xlim=(0.5, len(ARMS) - 0.5))
    right.set_xticks(range(1, len(ARMS)), list(ARMS)[1:])
    for name, marker in JUDGES.values():
        right.scatter([], [], color="grey", marker=marker, label=name)
    for axes in (left, middle, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig("assets/results.png", dpi=90)


def table(distances):
    columns = "run, aligned at, held-out velocity loss, alignment, FD Lite2, FD judge, accuracy"
    print(f"| {columns.replace(', ', ' | ')} |")
    print("| --- " * 7 + "|")
    named = {f"{arm}-{seed}": place for arm, (place, _) in ARMS.items() for seed in SEEDS}
    for run, place in {**named, "train": "real training images"}.items():
        curves = [curve(run, column) for column in ("val_velocity_loss", "val_alignment")]
        cells = [f"{x[max(x)]:.4f}" if x else "-" for x in curves]  # of the last step
        for column, digits in dict(lite2=".1f", judge=".2f", accuracy=".1%").items():
            text = distances.get(run, {}).get(column)
            cells.append(format(float(text), digits) if text else "-")
        if set(cells) != {"-"}:
            print(f"| `{run}` | {place} | {' | '.join(cells)} |")


if __name__ == "__main__":
    distances = {row["run"]: row for row in read(FOLDER / "distances.csv")}
    draw(distances)
    table(distances)
