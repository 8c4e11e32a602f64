"""figures.py: the README's figure, grids and table, from what run.sh has left.

    pip install matplotlib && python assets/results/figures.py

RUN.csv and distances.csv make assets/results.png, the table and the steps to vanilla's last value;
runs/RUN-grid.png make assets/grids.png. What is not there is left out."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

FOLDER = Path("assets/results")
ARMS = {  # where the arm is aligned, and its colour
    "vanilla": ("-", "black"),
    "repa2": ("block 2", "tab:blue"),
    "repa4": ("block 4", "tab:green"),
    "repa6": ("block 6", "tab:red"),
    "control4": ("block 4, another image's targets", "tab:orange"),
}
SEEDS = {"0": "-", "1": "--"}  # and their lines
RUNS = {f"{arm}-{seed}": arm for arm in ARMS for seed in SEEDS}


def read(path):  # a CSV's rows, none if it is not there
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curve(run, column):  # {step: number}, where the run has measured it
    rows = read(FOLDER / f"{run}.csv")
    return {int(row["step"]): float(row[column]) for row in rows if row.get(column)}


def judged(run, column):  # the same of distances.csv
    rows = read(FOLDER / "distances.csv")
    return {int(row["step"]): float(row[column]) for row in rows if row["run"] == run}


def vanilla_of(run):  # of the same seed
    return f"vanilla-{run[-1]}"


def draw():
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for run, arm in RUNS.items():
        style = dict(color=ARMS[arm][1], linestyle=SEEDS[run[-1]], marker=".", label=run)
        distances, alignment = judged(run, "judge"), curve(run, "val_alignment")
        losses, reference = [curve(r, "val_velocity_loss") for r in (run, vanilla_of(run))]
        ahead = {s: 100 * (1 - losses[s] / reference[s]) for s in losses if s in reference}
        if distances:
            left.plot(list(distances), list(distances.values()), **style)
        if ahead and arm != "vanilla":
            middle.plot(list(ahead), list(ahead.values()), **style)
        if alignment:
            right.plot(list(alignment), list(alignment.values()), **style)
    for row in read(FOLDER / "constant.csv"):
        if row["weights"] == "tf_efficientnet_lite0":
            right.axhline(float(row["cosine"]), color="grey", linewidth=1, label="constant")
    middle.axhline(0, color="black", linewidth=1)
    left.set(xlabel="step", ylabel="Fréchet distance (the judge's)")
    middle.set(xlabel="step", ylabel="held-out velocity loss, % below vanilla's")
    right.set(xlabel="step", ylabel="alignment (mean patch cosine)")
    left.legend(fontsize="x-small")
    right.legend(fontsize="x-small")
    figure.savefig("assets/results.png", dpi=90)


def table():
    head = "run, aligned at, steps, velocity loss, alignment, FD judge, FD Lite2, class seen"
    print(f"| {head.replace(', ', ' | ')} |")
    print("| --- " * 8 + "|")
    for run, place in [(r, ARMS[a][0]) for r, a in RUNS.items()] + [
        ("train", "real training images")
    ]:
        steps = curve(run, "loss")
        cells = [f"{max(steps):,}" if steps else "-"]
        for column in ("val_velocity_loss", "val_alignment"):
            values = curve(run, column)
            cells.append(f"{values[max(values)]:.4f}" if values else "-")
        for column, form in dict(judge=".2f", lite2=".0f", accuracy=".1%").items():
            cells.append(" / ".join(format(x, form) for x in judged(run, column).values()) or "-")
        if set(cells[1:]) != {"-"}:
            print(f"| `{run}` | {place} | {' | '.join(cells)} |")


def steps_to(value, values):
    """The step by which {step: number} falls to the value, on straight lines between its points."""
    points = list(values.items())
    if points[0][1] <= value:
        return points[0][0]
    for (s, a), (s_next, b) in zip(points, points[1:]):
        if a > value >= b:
            return s + (s_next - s) * (a - value) / (a - b)


def speed():
    measures = {"velocity loss": (curve, "val_velocity_loss")}
    measures["Fréchet distance (judge)"] = (judged, "judge")
    for name, (get, column) in measures.items():
        for run in RUNS:
            goal, values = get(vanilla_of(run), column), get(run, column)
            last = max(values, default=None)
            if last in goal and run != vanilla_of(run):
                step = steps_to(goal[last], values)
                when = "not reached" if step is None else f"by step {step:.0f}"
                print(f"{run}, {name} of vanilla at step {last}: {when}")


def grids(runs=("vanilla-0", "repa4-0", "control4-0")):
    """The first eight columns side by side."""
    paths = [Path("runs", f"{run}-grid.png") for run in runs]
    pictures = [Image.open(path) for path in paths if path.exists()]
    if pictures:
        width, height = pictures[0].size
        both = Image.new("RGB", ((width + 16) * len(pictures) - 16, height), "white")
        for i, picture in enumerate(pictures):
            both.paste(picture, ((width + 16) * i, 0))
        both.save("assets/grids.png", optimize=True)


if __name__ == "__main__":
    draw()
    table()
    speed()
    grids()
