"""figures.py: the README's figure and table, from what run.sh has left.

    pip install matplotlib && python assets/results/figures.py

It reads ARM-SEED.csv (metrics.csv of a run), distances.csv and losses-ARM-SEED.csv in
assets/results, for whatever arms and seeds are there, draws assets/results.png and prints the
table. Lines are means over the seeds, the shaded range is from the smallest to the largest.
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path("assets/results")
ARMS = {  # arm -> what it is, and its colour
    "vanilla": ("vanilla", "black"),
    "repa2": ("REPA at block 2", "tab:green"),
    "control2": ("another image's targets", "tab:orange"),
    "random2": ("encoder with random weights", "tab:purple"),
}


def read(path):
    """The rows of a CSV file, as dicts; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def runs_of(arm):
    """The names of the arm's runs: ARM-SEED."""
    return sorted(path.stem for path in FOLDER.glob(f"{arm}-[0-9].csv"))


def curves(arm, column):
    """{run: {step: value}} of metrics.csv, without the empty cells."""
    result = {}
    for run in runs_of(arm):
        rows = read(FOLDER / f"{run}.csv")
        points = {int(row["step"]): float(row[column]) for row in rows if row.get(column)}
        if points:
            result[run] = points
    return result


def judged(arm, column):
    """{run: {step: value}} of distances.csv."""
    result = {}
    for row in read(FOLDER / "distances.csv"):
        if row["run"].rsplit("-", 1)[0] == arm:
            result.setdefault(row["run"], {})[int(row["step"])] = float(row[column])
    return result


def by_noise(arm):
    """{run: {t: held-out velocity loss}} of losses-RUN.csv."""
    result = {}
    for run in runs_of(arm):
        rows = read(FOLDER / f"losses-{run}.csv")
        if rows:
            result[run] = {float(row["t"]): float(row["velocity_loss"]) for row in rows}
    return result


def ahead_of_vanilla(values, reference):
    """Percent by which each run is below the vanilla run of its seed, {run: {x: percent}}."""
    result = {}
    for run, points in values.items():
        vanilla = reference.get(f"vanilla-{run[-1]}", {})
        shared = [x for x in points if x in vanilla]
        if shared:
            result[run] = {x: 100 * (1 - points[x] / vanilla[x]) for x in shared}
    return result


def step_of_loss(loss, points):
    """The step at which a run's loss, interpolated between evaluations, falls to `loss`, or None.

    points: {step: held-out loss} of the run.
    """
    steps = sorted(points)
    for before, after in zip(steps, steps[1:]):
        if points[before] >= loss >= points[after]:
            share = (points[before] - loss) / (points[before] - points[after])
            return round(before + share * (after - before))
    return None


def plot(axis, runs, label, colour):
    """The mean over the runs as a line, the range over them as a shade."""
    if not runs:
        return
    shared = sorted(set.intersection(*[set(points) for points in runs.values()]))
    columns = [[points[x] for points in runs.values()] for x in shared]
    means = [sum(column) / len(column) for column in columns]
    lows, highs = [min(column) for column in columns], [max(column) for column in columns]
    axis.fill_between(shared, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axis.plot(shared, means, color=colour, marker=".", label=f"{label} ({len(runs)})")


def draw():
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    losses = {arm: curves(arm, "val_velocity_loss") for arm in ARMS}
    levels = {arm: by_noise(arm) for arm in ARMS}
    for arm, (label, colour) in ARMS.items():
        if arm != "vanilla":
            plot(axes[0], ahead_of_vanilla(losses[arm], losses["vanilla"]), label, colour)
            plot(axes[2], ahead_of_vanilla(levels[arm], levels["vanilla"]), label, colour)
        plot(axes[1], curves(arm, "val_alignment"), label, colour)
    for axis in (axes[0], axes[2]):
        axis.axhline(0, color="black", linewidth=1)
    axes[0].set(xlabel="step", ylabel="held-out velocity loss, % below vanilla's")
    axes[1].set(xlabel="step", ylabel="alignment (mean patch cosine)")
    axes[2].set(xlabel="noise level t", ylabel="held-out velocity loss, % below vanilla's")
    axes[1].legend(fontsize="small", title="runs (number of seeds)", loc="center")
    figure.savefig("assets/results.png", dpi=90)


def cell(runs, form, seeds):
    """Mean and range over the runs at their last step; how many they are, if not all seeds."""
    values = [points[max(points)] for points in runs.values()]
    if not values:
        return "not measured"
    few = "" if len(values) == seeds else f"; seeds: {len(values)}"
    mean = format(sum(values) / len(values), form)
    return f"{mean} ({min(values):{form}} to {max(values):{form}}{few})"


def table():
    print("| runs | seeds | velocity loss | alignment | labels | rotations | Lite2 | class seen |")
    print("| --- " * 8 + "|")
    for arm, (label, _) in ARMS.items():
        seeds = len(runs_of(arm))
        cells = [label, str(seeds)]
        cells.append(cell(curves(arm, "val_velocity_loss"), ".4f", seeds))
        cells.append(cell(curves(arm, "val_alignment"), ".3f", seeds))
        for column, form in dict(labels=".2f", rotations=".2f", kin=".0f", accuracy=".1%").items():
            cells.append(cell(judged(arm, column), form, seeds))
        print(f"| {' | '.join(cells)} |")
    for row in read(FOLDER / "distances.csv"):
        if row["run"] == "floor":
            print(f"floor: {row}")
    losses = {}
    for path in sorted(FOLDER.glob("long-*.csv")):
        points = {int(row["step"]): float(row["val_velocity_loss"]) for row in read(path)}
        losses[path.stem] = {step: points[step] for step in points if step % 1000 == 0}
    print("run, step, held-out loss, step at which long-vanilla has this loss")
    for run, points in losses.items():
        for step in points:
            if step % 4000 == 0:
                same = step_of_loss(points[step], losses.get("long-vanilla", {}))
                print(f"{run} {step} {points[step]:.4f} {same}")


if __name__ == "__main__":
    draw()
    table()
