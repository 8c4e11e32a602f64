"""Seconds of a training step, targets given: pairs of settings in turn in one process.

    python assets/results/seconds.py --output assets/results/seconds.csv

Writes the median of the rounds and, for the second of each pair, the ratio with its range.
"""

import argparse
import contextlib
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import repa_mini  # noqa: E402


def make_step(name, n, repa, dtype, projector_dim):
    """A function that makes one training step of n images."""
    torch.manual_seed(0)
    sit = dict(repa_mini.SIT_MODELS[name], projector_dim=projector_dim)
    model = repa_mini.SiT(**sit, z_dim=112 if repa else 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0, fused=True)
    x, y = torch.rand(n, 3, 32, 32) * 2 - 1, torch.randint(0, 10, (n,))
    z = torch.randn(n, model.grid_size**2, 112) if repa else None
    precision = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def step():
        noise, t = torch.randn_like(x), torch.rand(n)
        with precision:
            losses = repa_mini.training_losses(model, x, noise, t, y, z)
        optimizer.zero_grad()
        sum(loss for loss in losses if loss is not None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def compare(names, steps, rounds, repeats):
    """Rows {what, seconds, ratio, low, high}: how much longer the second takes than the first."""
    for step in steps:
        step()
    times = [[], []]
    for _ in range(rounds):
        for step, record in zip(steps, times):
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            record.append((time.perf_counter() - start) / repeats)
    ratios = [b / a for a, b in zip(*times)]
    first = dict(what=names[0], seconds=statistics.median(times[0]), ratio="", low="", high="")
    second = dict(what=names[1], seconds=statistics.median(times[1]))
    second.update(ratio=statistics.median(ratios), low=min(ratios), high=max(ratios))
    return [first, second]


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--output", required=True)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for names, settings in [
        (
            ["SiT-Ti/4, batch 64, vanilla", "SiT-Ti/4, batch 64, REPA"],
            [("SiT-Ti/4", 64, False, None, 512), ("SiT-Ti/4", 64, True, None, 512)],
        ),
        (
            ["SiT-S/4, batch 32, float32", "SiT-S/4, batch 32, bfloat16"],
            [("SiT-S/4", 32, True, None, 2048), ("SiT-S/4", 32, True, torch.bfloat16, 2048)],
        ),
    ]:
        steps = [make_step(*setting) for setting in settings]
        rows += compare(names, steps, args.rounds, args.repeats)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)
            print(rounded)
