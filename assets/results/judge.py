"""judge.py: how far samples are from real images, to two judges that no run was trained towards.

    python assets/results/judge.py train --data DIR --judge runs/judge.pt
    python assets/results/judge.py score --data DIR --judge runs/judge.pt --lite2 FILE \
        --output distances.csv --samples train runs/RUN-STEP.npz [...]

One is a ResNet-10 of half the width, trained here on the same images to tell their classes, and of
another family than the encoders. The other is EfficientNet-Lite2, kin of the encoder. For each .npz
of sample.py, and for 2,000 training images if "train" stands in its place, a row is appended: the
Fréchet distances of both judges' features to those of all held-out images, and the share of samples
that the ResNet gives the class they were drawn for."""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's top folder
import repa_mini
import sample


def make_judge():
    size = dict(channels=(32, 64, 128, 256), stem_width=16)
    judge = timm.create_model("resnet10t", num_classes=10, **size)
    judge.conv1[0].stride, judge.maxpool = (1, 1), torch.nn.Identity()  # for 32x32 images
    return judge.to(memory_format=torch.channels_last)  # faster on a CPU


def augment(x):  # (N, 3, 32, 32): each image moved by up to 4 pixels, half of them mirrored
    n = len(x)
    windows = F.pad(x, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 9, 9, 32, 32)
    x = windows[torch.arange(n), :, torch.randint(9, (n,)), torch.randint(9, (n,))]
    return torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(-1), x)


@torch.no_grad()
def look(judge, images):  # uint8 images -> pooled features (N, D) and predicted classes (N,)
    maps = [judge.eval().forward_features(repa_mini.to_unit(x)) for x in images.split(500)]
    features = judge.forward_head(torch.cat(maps), pre_logits=True)
    return features, judge.get_classifier()(features).argmax(1)


def train(args):
    images, labels, val_images, val_labels, _ = repa_mini.load_data(args.data)
    torch.manual_seed(args.seed)
    judge = make_judge().train()
    forward = torch.compile(judge)
    optimizer = torch.optim.SGD(judge.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, args.epochs * steps)
    for epoch in range(args.epochs):
        order = torch.randperm(len(images))[: 128 * steps]
        for index in tqdm(order.split(128), f"epoch {epoch + 1}"):
            x = augment(repa_mini.to_unit(images[index]))
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(forward(x), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    accuracy = (look(judge, val_images)[1] == val_labels).double().mean().item()
    print(f"held-out accuracy {accuracy:.4f}")
    torch.save(dict(judge=judge.state_dict(), accuracy=accuracy), args.judge)


def score(args):
    images, labels, val_images, _, _ = repa_mini.load_data(args.data)
    judge = make_judge()
    judge.load_state_dict(torch.load(args.judge, weights_only=True)["judge"])
    lite2 = repa_mini.TargetEncoder("tf_efficientnet_lite2", 8, args.lite2)
    lite2.model.to(memory_format=torch.channels_last)  # faster on a CPU
    real = look(judge, val_images)[0], sample.pooled_features(lite2, val_images, "cpu")
    chosen = torch.linspace(0, len(images) - 1, 2000).long()
    for name in args.samples:
        if name == "train":
            run, step, fake, drawn = name, 0, images[chosen], labels[chosen]
        else:
            run, step = Path(name).stem.rsplit("-", 1)
            fake = torch.from_numpy(np.load(name)["arr_0"]).permute(0, 3, 1, 2)
            drawn = torch.arange(len(fake)) % 10  # sample.py draws the classes in turn
        features, predicted = look(judge, fake)
        row = dict(run=run, step=step, samples=len(fake))
        row["judge"] = round(sample.frechet_distance(features, real[0]), 3)
        kin = sample.pooled_features(lite2, fake, "cpu")
        row["lite2"] = round(sample.frechet_distance(kin, real[1]), 2)
        row["accuracy"] = round((predicted == drawn).double().mean().item(), 4)
        with open(args.output, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:  # a new file
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=["train", "score"])
    parser.add_argument("--samples", nargs="+", help="for score: .npz files of sample.py, or train")
    parser.add_argument("--data", required=True, help="the folder that the runs were trained on")
    parser.add_argument("--judge", required=True, help="the judge's file")
    parser.add_argument("--epochs", type=repa_mini.count, default=8, help="for train")
    parser.add_argument("--seed", type=int, default=0, help="for train")
    parser.add_argument("--lite2", metavar="FILE", help="for score: EfficientNet-Lite2's weights")
    parser.add_argument("--output", default="distances.csv", help="for score: a CSV")
    args = parser.parse_args(argv)
    dict(train=train, score=score)[args.what](args)


if __name__ == "__main__":
    sys.exit(repa_mini.main(program=run))
