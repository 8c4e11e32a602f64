"""judge.py: a judge of samples from another family than the encoders, trained on the data alone.

    python assets/results/judge.py train --data DIR --output judge.pt
    python assets/results/judge.py score --judge judge.pt --data DIR --samples S.npz --output J.csv

It is a ResNet-10 of half the width that classifies the images. Two numbers judge samples: the
Fréchet distance of its pooled features to those of the held-out images, and how often it sees the
class that a sample was drawn for. `--samples train` judges 2,000 training images instead."""

import argparse
import csv
import math
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


def make_judge(num_classes):
    size = dict(channels=(32, 64, 128, 256), stem_width=16)
    judge = timm.create_model("resnet10t", num_classes=num_classes, **size)
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
    images, labels, val_images, val_labels, classes = repa_mini.load_data(args.data)
    torch.manual_seed(args.seed)
    judge = make_judge(len(classes)).train()
    optimizer = torch.optim.SGD(judge.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = args.epochs * math.ceil(len(images) / 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    for epoch in range(args.epochs):
        for index in tqdm(torch.randperm(len(images)).split(128), f"epoch {epoch + 1}"):
            optimizer.zero_grad()
            logits = judge(augment(repa_mini.to_unit(images[index])))
            F.cross_entropy(logits, labels[index]).backward()
            optimizer.step()
            schedule.step()
    accuracy = (look(judge, val_images)[1] == val_labels).double().mean().item()
    print(f"held-out accuracy {accuracy:.4f}")
    state = dict(judge=judge.state_dict(), classes=classes, accuracy=accuracy)
    torch.save(state, args.output)


def score(args):
    images, labels, val_images, _, classes = repa_mini.load_data(args.data)
    state = torch.load(args.judge, weights_only=True)
    if classes != state["classes"]:
        raise repa_mini.UserError(f"the judge knows {state['classes']}, the data have {classes}")
    judge = make_judge(len(classes))
    judge.load_state_dict(state["judge"])
    if args.samples == "train":
        chosen = sample.evenly(2000, len(images))
        images, labels = images[chosen], labels[chosen]
    else:
        images = torch.from_numpy(np.load(args.samples)["arr_0"]).permute(0, 3, 1, 2)
        labels = torch.arange(len(images)) % len(classes)  # sample.py draws the classes in turn
    (features, predicted), (val_features, _) = look(judge, images), look(judge, val_images)
    distance = sample.frechet_distance(features, val_features)
    accuracy = (predicted == labels).double().mean().item()
    row = dict(name=args.name or args.samples, step=args.step, samples=len(images))
    row.update(distance=round(distance, 4), accuracy=round(accuracy, 4))
    with open(args.output, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:  # a new file
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{key} {value}" for key, value in row.items()))


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=["train", "score"])
    parser.add_argument("--data", required=True, help="the folder that the runs were trained on")
    parser.add_argument("--output", required=True, help="train: the judge's file; score: a CSV")
    parser.add_argument("--epochs", type=repa_mini.count, default=15, help="for train")
    parser.add_argument("--seed", type=int, default=0, help="for train")
    parser.add_argument("--judge", default="judge.pt", help="for score: what train wrote")
    parser.add_argument("--samples", default="train", help="for score: .npz of sample.py, or train")
    parser.add_argument("--name", help="for score: the run's, for the CSV")
    parser.add_argument("--step", help="for score: the run's, for the CSV")
    args = parser.parse_args(argv)
    dict(train=train, score=score)[args.what](args)


if __name__ == "__main__":
    sys.exit(repa_mini.main(program=run))
