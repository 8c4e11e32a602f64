"""step.py: how much longer a training step with cached targets takes than a vanilla one.

    OMP_NUM_THREADS=1 TIMM_FUSED_ATTN=0 python assets/results/step.py

Both are SiT-Ti/4 with 64 images, in bfloat16, compiled, on the CPU. They take turns, ten steps
each, ten times. The median of the ratio and its range are printed.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's top folder
import repa_mini

torch.manual_seed(0)
X, NOISE, T = torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32), torch.rand(64)
Y, Z = torch.randint(10, (64,)), torch.randn(64, 64, 112).half()


def make(z_dim):
    model = repa_mini.SiT(**repa_mini.SIT_MODELS["SiT-Ti/4"], z_dim=z_dim)
    model.compile()
    return model, torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0, fused=True)


def seconds(model, optimizer, z, steps=10):
    start = time.perf_counter()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss, repa_loss = repa_mini.training_losses(model, X, NOISE, T, Y, z)
            if z is not None:
                loss = loss + 0.5 * repa_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return (time.perf_counter() - start) / steps


vanilla, repa = make(0), make(112)
seconds(*vanilla, None), seconds(*repa, Z)  # compiles and warms up
ratios = []
for _ in range(10):
    without, with_repa = seconds(*vanilla, None), seconds(*repa, Z)
    ratios.append(with_repa / without)
    print(f"vanilla {without:.3f} s, REPA {with_repa:.3f} s a step")
print(f"ratio {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
