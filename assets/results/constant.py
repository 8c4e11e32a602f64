"""constant.py: the alignment of a prediction that has seen no image, the least that counts.

    python assets/results/constant.py --data DIR --model SiT-Ti/4 --encoder NAME [...]

For each position the prediction is the mean unit token of at most 2,000 training images, and its
mean patch cosine is measured on the held-out images that val_alignment is measured on. The options
are those of repa_mini.py; the ones that have nothing to do with the targets change nothing. A row
is appended to constant.csv."""

import csv
import math
import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's top folder
import repa_mini
from sample import evenly


def run(argv):
    parser = repa_mini.build_parser()
    if parser.parse_args(argv).smoke:
        parser.set_defaults(**repa_mini.SMOKE)
    args = parser.parse_args(argv)
    device, _, autocast = repa_mini.pick_device(args.device, args.dtype)
    grid_size = 32 // repa_mini.SIT_MODELS[args.model]["patch_size"]
    weights, pretrained = args.encoder_weights, not args.smoke
    encoder = repa_mini.TargetEncoder(args.encoder, grid_size, weights, pretrained).to(device)
    images, _, val_images, _, _ = repa_mini.load_data(args.data, args.smoke)
    images = images[evenly(2000, len(images))].to(device)
    val_images = val_images[:: math.ceil(len(val_images) / 1000)].to(device)  # as train() has it

    tokens = repa_mini.compute_targets(encoder, images, autocast).float()  # (N, T, D)
    constant = F.normalize(tokens, dim=-1).mean(0)  # (T, D)
    targets = repa_mini.compute_targets(encoder, val_images, autocast).float()
    cosine = F.cosine_similarity(constant, targets, dim=-1).mean().item()
    row = dict(encoder=args.encoder, weights=Path(args.encoder_weights or "random").stem)
    row.update(images=len(images), held_out=len(val_images), cosine=round(cosine, 4))
    print(row)
    with open(Path(__file__).with_name("constant.csv"), "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:  # a new file
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(repa_mini.main(program=run))
