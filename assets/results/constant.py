"""constant.py: the alignment of a prediction that has seen no image, to compare others with.

    python assets/results/constant.py --data DIR --encoder NAME --encoder-weights FILE

The prediction for each position is the mean of the normalised tokens of 2,000 training images. Its
mean patch cosine is measured on the held-out images on which val_alignment is measured, at the
patches of a SiT-x/4. It is printed and appended to constant.csv.
"""

import csv
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's top folder
import repa_mini


def targets(encoder, images):
    return torch.cat([encoder(repa_mini.to_unit(part)) for part in images.split(100)])


def main():
    args, _ = repa_mini.parse_options(None)
    encoder = repa_mini.TargetEncoder(args.encoder, 8, args.encoder_weights)
    images, _, val_images, _, _ = repa_mini.load_data(args.data)
    val_images = val_images[:: -(-len(val_images) // 1000)]  # those that `evaluate` takes
    chosen = torch.linspace(0, len(images) - 1, 2000).long()
    constant = F.normalize(targets(encoder, images[chosen]), dim=-1).mean(0)
    cosine = F.cosine_similarity(constant, targets(encoder, val_images), dim=-1).mean().item()
    weights = Path(args.encoder_weights).stem
    row = {"encoder": args.encoder, "weights": weights, "cosine": round(cosine, 4)}
    print(row)
    path = Path(__file__).with_name("constant.csv")
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
