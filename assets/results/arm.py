"""arm.py: repa_mini.py for the runs of the results. It takes the same options.

    python assets/results/arm.py --cache-targets [...]
    CONTROL=1 python assets/results/arm.py --cache-targets [...]

Two things differ. The cached targets are kept in runs/targets-*.pt, since many runs need the same
ones. And with CONTROL=1 each image of a training batch gets the targets of another image of the
batch: the targets keep their statistics, but say nothing about the image.
"""

import hashlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's top folder
import repa_mini

compute_targets = repa_mini.compute_targets
training_losses = repa_mini.training_losses


def targets_on_disk(encoder, images):
    """compute_targets in float32, or what an earlier run has computed for encoder and images."""
    digest = hashlib.sha256(images.numpy().tobytes())
    for name, p in encoder.state_dict().items():
        digest.update(name.encode() + p.numpy().tobytes())
    path = Path("runs", f"targets-{digest.hexdigest()[:16]}.pt")
    if not path.exists():
        encoder.model.to(memory_format=torch.channels_last)  # faster for CNNs
        part = path.with_suffix(f".{os.getpid()}")
        with torch.autocast(images.device.type, enabled=False):
            torch.save(compute_targets(encoder, images), part)
        part.replace(path)
    return torch.load(path, mmap=True)  # in memory once, however many runs read it


def losses_with_other_targets(model, x, noise, t, y, z=None, path_type="linear"):
    if model.training and z is not None:
        z = z[torch.arange(len(z)) - 1]
    return training_losses(model, x, noise, t, y, z, path_type)


if __name__ == "__main__":
    repa_mini.compute_targets = targets_on_disk
    if os.environ.get("CONTROL"):
        repa_mini.training_losses = losses_with_other_targets
    repa_mini.main()
