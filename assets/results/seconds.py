"""seconds.py: seconds of a training step on one CPU thread, pairs of settings in turn.

    python assets/results/seconds.py --output assets/results/seconds.csv

Targets are given. Writes, for each pair, the medians of the rounds and the ratio with its range."""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's top folder
import repa_mini

# The runs' own setting, and what differs from it in each pair.
USUAL = dict(model="SiT-Ti/4", n=64, repa=True, dtype="bfloat16", compiled=True, fused=False)
PAIRS = {
    ("vanilla", "REPA"): (dict(repa=False), dict()),
    ("bfloat16, compiled", "float32, not compiled"): (
        dict(),
        dict(dtype="float32", compiled=False),
    ),
    ("timm's own attention", "torch's fused attention"): (dict(), dict(fused=True)),
    ("SiT-S/4, bfloat16", "SiT-S/4, float32"): (
        dict(model="SiT-S/4", n=32),
        dict(model="SiT-S/4", n=32, dtype="float32"),
    ),
}


def make_step(model, n, repa, dtype, compiled, fused):
    """A function that makes one training step of n images."""
    torch.manual_seed(0)
    sit = dict(repa_mini.SIT_MODELS[model], projector_dim=512)
    sit = repa_mini.SiT(**sit, z_dim=112 if repa else 0).train()
    for block in sit.blocks:
        block.attn.fused_attn = fused
    if compiled:
        sit.compile()
    optimizer = torch.optim.AdamW(sit.parameters(), 1e-4, weight_decay=0, fused=True)
    _, _, autocast = repa_mini.pick_device("cpu", dtype)
    x, y = torch.rand(n, 3, 32, 32) * 2 - 1, torch.randint(0, 10, (n,))
    z = torch.randn(n, sit.grid_size**2, 112) if repa else None

    def step():
        noise, t = torch.randn_like(x), torch.rand(n)
        with autocast:
            losses = repa_mini.training_losses(sit, x, noise, t, y, z)
        optimizer.zero_grad()
        sum(loss for loss in losses if loss is not None).backward()
        torch.nn.utils.clip_grad_norm_(sit.parameters(), 1.0)
        optimizer.step()

    return step


def seconds(step, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for names, changes in PAIRS.items():
        first, second = [make_step(**{**USUAL, **change}) for change in changes]
        for step in (first, second):  # compile
            seconds(step, 2)
        times = []
        for _ in range(args.rounds):
            times.append((seconds(first, args.repeats), seconds(second, args.repeats)))
        a, b = [statistics.median(side) for side in zip(*times)]
        ratios = [second / first for first, second in times]
        row = {"first": names[0], "seconds": a, "second": names[1], "seconds of it": b}
        row.update(ratio=statistics.median(ratios), low=min(ratios), high=max(ratios))
        rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        print(rows[-1], flush=True)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
