"""judge.py: how far samples are from real images, in the features of three networks.

    python assets/results/judge.py train --data DIR --task labels --judge runs/labels.pt
    python assets/results/judge.py train --data DIR --task rotations --judge runs/rotations.pt
    python assets/results/judge.py score --data DIR --judges runs/labels.pt runs/rotations.pt \
        --kin LITE2 --output assets/results/distances.csv --runs floor runs/RUN [...]

Two judges are ResNet-10s of half the width, which no run was trained towards. They are trained
here, on the same images as the runs: one to tell the classes, the other without any label, to tell
by how many quarter turns an image is rotated. The third, with --kin, is EfficientNet-Lite2 with
ImageNet weights from a file, the larger sibling of the network that gives the targets.

`score` draws 5,000 samples of each run, or as many as --samples says (EMA, 25 Euler steps, no
guidance, equally many of each class, the same noise for every run), and appends a row: the Frechet
distance of their features to those of all held-out images, by each judge, and the share of samples
that the first judge gives the class that they were drawn for. "floor" stands for as many training
images.
"""

import argparse
import csv
import sys
from pathlib import Path

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


def augment(x, flip):
    """Images (N, 3, 32, 32), each moved by up to 4 pixels; with `flip` half of them mirrored."""
    n = len(x)
    windows = F.pad(x, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 9, 9, 32, 32)
    x = windows[torch.arange(n), :, torch.randint(9, (n,)), torch.randint(9, (n,))]
    if flip:
        x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(-1), x)
    return x


def rotate(x):
    """Images, each rotated by 0 to 3 quarter turns, and the numbers of turns."""
    turns = torch.randint(4, (len(x),))
    rotated = x.clone()
    for k in (1, 2, 3):
        rotated[turns == k] = x[turns == k].rot90(k, (2, 3))
    return rotated, turns


@torch.no_grad()
def look(judge, images):
    """uint8 images -> pooled features (N, D) and predicted classes (N,)."""
    maps = [judge.eval().forward_features(repa_mini.to_unit(x)) for x in images.split(500)]
    features = judge.forward_head(torch.cat(maps), pre_logits=True)
    return features, judge.get_classifier()(features).argmax(1)


def look_as_kin(encoder, images):
    """uint8 images -> the mean tokens of EfficientNet-Lite2 at stride 16 (N, D)."""
    batches = tqdm(images.split(100), "kin", disable=None)
    return torch.cat([encoder(repa_mini.to_unit(x)).mean(1) for x in batches])


def draw(checkpoint, n, autocast):
    """n samples (n, 3, 32, 32) uint8 of a checkpoint, and the classes that they are of."""
    model = repa_mini.SiT(**checkpoint["sit"])
    model.load_state_dict(checkpoint["ema"])
    model.eval().requires_grad_(False).compile()
    images, labels = [], torch.arange(n) % 10
    for numbers in tqdm(torch.arange(n).split(100), "samples", disable=None):
        noise = sample.starting_noise(0, numbers.tolist())
        with autocast:
            x = repa_mini.sample_ode(model, noise, labels[numbers], num_steps=25)
        images.append(repa_mini.to_pixels(x))
    return torch.cat(images), labels


def frechet_distance(a, b):
    """|mean a - mean b|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)) of features a (n, D) and b (m, D).

    The trace of the root is that of (Ca^(1/2) Cb Ca^(1/2))^(1/2), which is symmetric.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()  # root @ root.T is Ca
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def train(args, autocast):
    images, labels, val_images, val_labels, _ = repa_mini.load_data(args.data)
    torch.manual_seed(args.seed)
    is_rotations = args.task == "rotations"
    judge = make_judge(4 if is_rotations else int(labels.max()) + 1).train()
    forward = torch.compile(judge)
    optimizer = torch.optim.SGD(judge.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, args.epochs * steps)
    for epoch in range(args.epochs):
        order = torch.randperm(len(images))[: 128 * steps]
        for index in tqdm(order.split(128), f"epoch {epoch + 1}", disable=None):
            x, y = augment(repa_mini.to_unit(images[index]), flip=True), labels[index]
            if is_rotations:
                x, y = rotate(x)
            with autocast:
                loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if is_rotations:
        torch.manual_seed(0)
        val_images, val_labels = rotate(val_images)
    accuracy = (look(judge, val_images)[1] == val_labels).double().mean().item()
    print(f"{args.task}: held-out accuracy {accuracy:.4f}")
    torch.save(dict(judge=judge.state_dict(), task=args.task, accuracy=accuracy), args.judge)


def score(args, autocast):
    images, labels, val_images, _, _ = repa_mini.load_data(args.data)
    judges = {}
    for path in args.judges:
        saved = torch.load(path, weights_only=True)
        judge = make_judge(len(saved["judge"]["fc.bias"]))
        judge.load_state_dict(saved["judge"])
        judges[saved["task"]] = (judge, look(judge, val_images)[0])
    if args.kin is not None:
        kin = repa_mini.TargetEncoder("tf_efficientnet_lite2", 8, args.kin)
        kin.model.to(memory_format=torch.channels_last)
        real_kin = look_as_kin(kin, val_images)
    for name in args.runs:
        if name == "floor":
            chosen = torch.linspace(0, len(images) - 1, args.samples).long()
            run, step, fake, drawn = name, 0, images[chosen], labels[chosen]
        else:
            checkpoint = repa_mini.load_checkpoint(name)
            run, step = Path(name).name, checkpoint["step"]
            fake, drawn = draw(checkpoint, args.samples, autocast)
        row = dict(run=run, step=step, samples=len(fake))
        for task, (judge, real) in judges.items():
            features, predicted = look(judge, fake)
            row[task] = round(frechet_distance(features, real), 3)
            if task == "labels":
                row["accuracy"] = round((predicted == drawn).double().mean().item(), 4)
        if args.kin is not None:
            row["kin"] = round(frechet_distance(look_as_kin(kin, fake), real_kin), 3)
        is_new = not Path(args.output).exists()
        with open(args.output, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "score"])
    parser.add_argument("--data", required=True, help="the folder that the runs were trained on")
    parser.add_argument("--task", choices=["labels", "rotations"], help="for train")
    parser.add_argument("--judge", help="for train: the file to write")
    parser.add_argument("--epochs", type=int, default=8, help="for train")
    parser.add_argument("--seed", type=int, default=0, help="for train")
    parser.add_argument("--judges", nargs="+", help="for score: files of judges, labels first")
    parser.add_argument("--kin", help="for score: a file with weights of tf_efficientnet_lite2")
    parser.add_argument("--runs", nargs="+", help="for score: folders of runs, or floor")
    parser.add_argument("--output", default="distances.csv", help="for score: a CSV")
    parser.add_argument("--samples", type=int, default=5000, help="for score: how many of a run")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    is_bfloat16 = options.dtype == "bfloat16"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16)
    dict(train=train, score=score)[options.what](options, autocast)
