"""sample.py: what a checkpoint of repa_mini.py can show.

    python sample.py --ckpt RUN                   a grid of samples, with one class a row
    python sample.py --ckpt RUN --trajectory      the way from noise to an image (.png or .gif)
    python sample.py --ckpt RUN --losses          held-out losses by noise level
    python sample.py --ckpt RUN --alignment       hidden tokens beside the tokens of the encoder
    python sample.py --ckpt RUN --cknna           how similar each block is to the encoder

RUN is the folder of a run or a checkpoint file. The weights are always the moving average (EMA).
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import repa_mini
from repa_mini import UserError, interpolant, to_pixels, to_unit

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # t of the hidden states


# ---- 1. The SDE sampler (the ODE sampler is in repa_mini.py)
def score_from_velocity(v, x, t, path_type="linear"):
    """grad log p_t(x) = (r v - x) / (sigma^2 - r sigma' sigma) with r = alpha / alpha' (Section 2).
    v and x: (N, C, H, W); t: a number in (0, 1]. On the linear path it is -(x + (1 - t) v) / t."""
    alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(t), path_type)
    r = alpha / d_alpha
    return (r * v - x) / (sigma**2 - r * d_sigma * sigma)


@torch.no_grad()
def sample_sde(
    model,
    noise,
    y,
    num_steps=250,
    cfg_scale=1.0,
    guidance_low=0.0,
    guidance_high=1.0,
    path_type="linear",
    generator=None,
):
    """Euler-Maruyama on dx = (v - w_t / 2 score) dt + sqrt(w_t) dW from t = 1 to 0 (Section 2).
    w_t = 2t on both paths, as in the authors' code. The last step, from t = 0.04, adds no noise.
    `generator` is on the device of `noise`. The rest is as in `sample_ode`."""
    times = torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist()
    x = noise
    for t, t_next in zip(times, [*times[1:], 0.0]):
        scale = cfg_scale if guidance_low <= t <= guidance_high else 1.0
        v = repa_mini.guided_velocity(model, x, t, y, scale)
        w = 2 * t
        drift = v - w / 2 * score_from_velocity(v, x, t, path_type)
        x = x + (t_next - t) * drift
        if t_next > 0:
            eps = torch.randn(x.shape, generator=generator, device=x.device)
            x = x + math.sqrt(w * (t - t_next)) * eps
    return x


# ---- 2. Samples
def starting_noise(seed, numbers):
    """x at t = 1, (N, 3, 32, 32). The noise of an image follows from the seed and its number."""
    images = []
    for number in numbers:
        g = torch.Generator().manual_seed(repa_mini.seed_for("sample", seed, number))
        images.append(torch.randn(3, 32, 32, generator=g))
    return torch.stack(images)


def show_samples(args, run):
    """A grid with one class a row. The classes take turns from sample to sample."""
    options = dict(num_steps=args.num_steps, cfg_scale=args.cfg_scale)
    options.update(guidance_low=args.guidance_low, guidance_high=args.guidance_high)
    classes, samples = torch.tensor(args.classes), []
    batches = torch.arange(args.num_samples).split(args.batch_size)
    for numbers in tqdm(batches, "sampling", disable=None):
        y = classes[numbers % len(classes)].to(run.device)
        noise = starting_noise(args.seed, numbers.tolist()).to(run.device)
        if args.mode == "ode":
            x = repa_mini.sample_ode(run.model, noise, y, heun=args.heun, **options)
        else:
            seed = repa_mini.seed_for("sde", args.seed, int(numbers[0]))
            options["generator"] = torch.Generator(run.device).manual_seed(seed)
            x = sample_sde(run.model, noise, y, path_type=run.path_type, **options)
        samples.append(to_pixels(x).cpu())
        if args.save_dir is not None:
            for number, image in zip(numbers, samples[-1]):
                to_pil_image(image).save(args.save_dir / f"{number:06d}.png")
    samples = torch.cat(samples)  # (N, 3, 32, 32) uint8
    if args.npz is not None:
        np.savez(args.npz, arr_0=samples.permute(0, 2, 3, 1).numpy())
    if args.output is not None:
        rows, columns = len(classes), math.ceil(len(samples) / len(classes))
        grid = torch.zeros(rows, columns, 3, 32, 32)
        for k in range(rows):
            of_class = samples[k::rows]
            grid[k, : len(of_class)] = of_class / 255
        save_image(grid.flatten(0, 1), args.output, nrow=columns)


# ---- 3. From noise to image
def show_trajectory(args, run):
    """x_t along Euler's method and, below it, the clean image that x_t and its velocity predict.
    A strip shows eight moments. An animation, if the output is a .gif, shows all of them."""
    y = torch.tensor(args.classes, device=run.device)
    x, pairs = starting_noise(args.seed, range(len(y))).to(run.device), []
    times = [i / args.num_steps for i in range(args.num_steps, -1, -1)]
    for t, t_next in zip(times, times[1:]):
        scale = args.cfg_scale if args.guidance_low <= t <= args.guidance_high else 1.0
        v = repa_mini.guided_velocity(run.model, x, t, y, scale)
        # x_t = alpha x + sigma eps and v = alpha' x + sigma' eps are solved for the clean image x.
        alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(t), run.path_type)
        clean = (d_sigma * x - sigma * v) / (alpha * d_sigma - d_alpha * sigma)
        pairs.append(torch.stack([x, clean]))
        x = x + (t_next - t) * v
    pairs.append(torch.stack([x, x]))
    pixels = to_pixels(torch.stack(pairs)).cpu()  # (time, x_t or clean, class, 3, 32, 32)
    if args.output.suffix == ".gif":
        frames = [to_pil_image(make_grid(pair.flatten(0, 1), nrow=len(y))) for pair in pixels]
        waits = [60] * args.num_steps + [2000]  # milliseconds
        options = dict(append_images=frames[1:], duration=waits, loop=0)
        frames[0].save(args.output, save_all=True, **options)
    else:
        shown = torch.linspace(0, args.num_steps, min(8, len(times))).long()
        rows = pixels[shown].permute(2, 1, 0, 3, 4, 5).flatten(0, 2)  # (class, kind, time)
        save_image(rows / 255, args.output, nrow=len(shown))
        print("columns: t =", ", ".join(f"{times[i]:.2f}" for i in shown))


# ---- 4. Losses by noise level
def held_out_images(args, run):
    """At most --num-samples held-out images (N, 3, 32, 32) and labels, spread over all of them."""
    _, _, images, labels, _ = repa_mini.load_data(args.data or run.config["data"])
    chosen = torch.linspace(0, len(images) - 1, min(args.num_samples, len(images))).long()
    return images[chosen], labels[chosen]


def load_encoder(args, run):
    """The encoder of the run, or the one that --encoder and --encoder-weights name."""
    name, weights = run.config["encoder"], run.config["encoder_weights"]
    if args.encoder is not None:
        name, weights = args.encoder, "download"
    weights = args.encoder_weights or weights
    return repa_mini.TargetEncoder(name, run.model.grid_size, weights).to(run.device)


def show_losses(args, run):
    """A table of the velocity loss and, for a run with a projector, of the alignment, which is the
    mean cosine of z_tilde and z. Each of ten times t sees the same images, labels and noise."""
    images, labels = held_out_images(args, run)
    encoder = load_encoder(args, run) if run.model.projectors else None
    rows = [defaultdict(float, t=i / 20) for i in range(1, 20, 2)]  # 0.05, 0.15, ...
    batches = torch.arange(len(images)).split(100)
    for numbers in tqdm(batches, "losses", disable=None):
        x, y = to_unit(images[numbers].to(run.device)), labels[numbers].to(run.device)
        noise = starting_noise(0, numbers.tolist()).to(run.device)
        z = None
        if encoder is not None:
            z = encoder(x)
        share = len(x) / len(images)
        for row in rows:
            t = x.new_full((len(x),), row["t"])
            losses = repa_mini.training_losses(run.model, x, noise, t, y, z, run.path_type)
            row["velocity_loss"] += share * losses[0].item()
            if z is not None:
                row["alignment"] -= share * losses[1].item()
    write_table(args.output, rows)


def write_table(path, rows):
    """Write dicts with equal keys as a CSV file, and print it."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: round(value, 5) for name, value in row.items()})
    print(path.read_text().strip())


# ---- 5. Representations: hidden states beside what the encoder says (Section 3)
def run_model(run, x, t, numbers):
    """x_t of clean images x, with the noise of their numbers, and the model's z_tilde for x_t.
    The model is told no class, so that all it knows of the image comes from x_t."""
    alpha, sigma, _, _ = interpolant(torch.tensor(t), run.path_type)
    x_t = alpha * x + sigma * starting_noise(0, numbers).to(x.device)
    y = torch.full((len(x),), run.model.num_classes, device=x.device)
    _, z_tilde = run.model(x_t, x.new_full((len(x),), t), y)
    return x_t, z_tilde


def pca_colours(targets, *others):
    """Colours (..., 3) in [0, 1] of tokens (..., D). Equal directions have equal colours. Axes and
    ranges are those of the principal components of `targets`, whose colours come first."""
    unit = [F.normalize(tokens.cpu().double(), dim=-1) for tokens in (targets, *others)]
    flat = unit[0].flatten(0, -2)  # (all tokens of the targets, D)
    _, vectors = torch.linalg.eigh(flat.T.cov())  # the eigenvalues ascend
    basis = vectors[:, -3:].flip(1)  # (D, 3), with the largest component first
    low, high = (flat @ basis).quantile(flat.new_tensor([0.02, 0.98]), dim=0)
    return [((tokens @ basis - low) / (high - low)).clamp(0, 1).float() for tokens in unit]


def show_alignment(args, run):
    """A picture with three rows for each image: the image and its x_t; the tokens of the encoder
    and z_tilde as colours; and their cosine, patch by patch, black for 0 or less, white for 1."""
    if not run.model.projectors:
        raise UserError("this run has no projector; --cknna works without one")
    images, _ = held_out_images(args, run)
    x, grid = to_unit(images.to(run.device)), run.model.grid_size
    z = load_encoder(args, run)(x).float()
    photos, tokens, cosines = [x], [z], [torch.ones(z.shape[:2])]  # of the clean image
    for t in TIMES:
        x_t, z_tilde = run_model(run, x, t, range(len(x)))
        photos.append(x_t)
        tokens.append(z_tilde.float())
        cosines.append(F.cosine_similarity(tokens[-1], z, dim=-1))
    columns = []
    for photo, colours, cosine in zip(photos, pca_colours(*tokens), cosines):
        photo = (photo / 2 + 0.5).clamp(0, 1)
        colours = colours.mT.unflatten(2, (grid, grid))  # (N, 3, g, g)
        greys = cosine.clamp(0, 1).view(-1, 1, grid, grid).expand(-1, 3, -1, -1)
        cells = [F.interpolate(part.cpu(), 64) for part in (photo, colours, greys)]
        columns.append(torch.stack(cells, dim=1))  # (N, 3 kinds of rows, 3, 64, 64)
    rows = torch.stack(columns, dim=2).flatten(0, 2)
    save_image(make_grid(rows, nrow=len(columns)), args.output)
    print(f"columns: the clean image, then t = {', '.join(map(str, TIMES))}")
    print("mean cosine:", ", ".join(f"{cosine.mean():.3f}" for cosine in cosines[1:]))


def cknna(a, b, topk=10):
    """CKNNA of features a (n, da) and b (n, db), whose rows belong to the same images: the unbiased
    centred kernel alignment, restricted to the pairs (i, j) in which j is among the `topk` nearest
    neighbours of i in a and in b (Huh et al. 2024, arXiv 2405.07987). It is 1 for equal
    neighbourhoods and about 0 for unrelated ones."""
    n = len(a)
    if not 2 <= topk < n or n < 4:
        raise UserError(f"CKNNA needs 2 <= topk < images > 3, not {topk} and {n}")
    kernels, masks = [], []
    for x in (a, b):
        x = F.normalize(x.double(), dim=1)
        kernel = (x @ x.T).fill_diagonal_(-math.inf)  # no image is its own neighbour
        nearest = kernel.topk(topk, dim=1).indices
        masks.append(torch.zeros_like(kernel).scatter_(1, nearest, 1))
        kernels.append(kernel.fill_diagonal_(0))

    def hsic(i, j):  # the unbiased estimator of Song et al. 2012
        mask = masks[i] * masks[j]
        k, m = kernels[i] * mask, kernels[j] * mask
        total = (k * m.T).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2))
        return (total - 2 * (k @ m).sum() / (n - 2)) / (n * (n - 3))

    return (hsic(0, 1) / ((hsic(0, 0) * hsic(1, 1)).sqrt() + 1e-6)).item()


def knn_accuracy(features, labels, topk=10):
    """How often an image's class wins the vote of its `topk` nearest neighbours.
    Each neighbour votes for its own class, and its cosine is the weight of its vote."""
    features = F.normalize(features.double(), dim=1)
    cosine = (features @ features.T).fill_diagonal_(-math.inf)
    weights, nearest = cosine.topk(topk, dim=1)
    votes = cosine.new_zeros(len(labels), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], weights)
    return (votes.argmax(dim=1) == labels).double().mean().item()


def show_cknna(args, run):
    """A table: for each block and t, CKNNA with the encoder and the accuracy of the neighbours."""
    images, labels = held_out_images(args, run)
    encoder, states = load_encoder(args, run), []

    def keep(block, inputs, output):
        states.append(output.mean(1).float().cpu())  # the mean over patches

    for block in run.model.blocks:
        block.register_forward_hook(keep)
    targets, pooled = [], {}
    batches = torch.arange(len(images)).split(100)
    for numbers in tqdm(batches, "hidden states", disable=None):
        x = to_unit(images[numbers].to(run.device))
        targets.append(encoder(x).mean(1).float().cpu())
        for t in TIMES:
            states.clear()
            run_model(run, x, t, numbers.tolist())  # fills `states`, block by block
            for i, state in enumerate(states, start=1):
                pooled.setdefault((i, t), []).append(state)
    z, rows = torch.cat(targets), []
    for i in range(1, len(run.model.blocks) + 1):
        row = {"block": i}
        for t in TIMES:
            row[f"cknna t={t}"] = cknna(torch.cat(pooled[i, t]), z, args.topk)
        for t in TIMES:
            row[f"knn t={t}"] = knn_accuracy(torch.cat(pooled[i, t]), labels, args.topk)
        rows.append(row)
    write_table(args.output, rows)
    print(f"the encoder's own knn: {knn_accuracy(z, labels, args.topk):.4f}")


# ---- 6. Options
SAMPLING = dict(classes=None, seed=0, num_steps=None)
SAMPLING.update(cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0)
GRID = dict(SAMPLING, mode="ode", heun=False, num_samples=None, batch_size=100)
GRID.update(npz=None, save_dir=None)
HELD_OUT = dict(data=None, encoder_weights=None, num_samples=1000)
# A view has its function, the endings of its output, and its options with their defaults.
VIEWS = {
    "samples": (show_samples, [".png"], GRID),
    "trajectory": (show_trajectory, [".png", ".gif"], SAMPLING),
    "losses": (show_losses, [".csv"], HELD_OUT),
    "alignment": (show_alignment, [".png"], dict(HELD_OUT, num_samples=4)),
    "cknna": (show_cknna, [".csv"], dict(HELD_OUT, encoder=None, topk=10)),
}
ALWAYS = ["ckpt", "view", "output", "device", "dtype"]  # the options of every view


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter  # keeps its lines
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="folder of a run, or a checkpoint")
    add("--output", type=Path, help="default: a new file beside the checkpoint")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.set_defaults(view="samples")
    views = parser.add_mutually_exclusive_group()
    for view in ("trajectory", "losses", "alignment", "cknna"):
        views.add_argument(f"--{view}", action="store_const", dest="view", const=view)
    add("--classes", type=int, nargs="+", help="numbers; default: all")
    add("--seed", type=int, help="of the noise; default: 0")
    add("--num-steps", type=int, help="default: 50, for sde 250")
    add("--cfg-scale", type=float, help="default: 1, no guidance")
    add("--guidance-low", type=float, help="guidance from this t on; default: 0")
    add("--guidance-high", type=float, help="guidance up to this t; default: 1")
    add("--mode", choices=["ode", "sde"], help="default: ode")
    add("--heun", action="store_true", default=None, help="not Euler's method")
    add("--num-samples", type=int, help="how many images")
    add("--batch-size", type=int, help="samples at a time; default: 100")
    add("--save-dir", type=Path, help="new folder for a PNG of each sample")
    add("--npz", type=Path, help="new file for an array of all samples")
    add("--topk", type=int, help="neighbours; default: 10")
    add("--data", help="cifar10, shapes or a folder; default: the run's")
    add("--encoder", help="a timm model; default: the run's")
    add("--encoder-weights", help="download, random, or a file")
    return parser


def parse_options(argv):
    """The options and the checkpoint. Raises UserError for an option that the view ignores."""
    args = build_parser().parse_args(argv)
    _, endings, options = VIEWS[args.view]
    for name, value in vars(args).items():
        if name not in [*options, *ALWAYS] and value is not None:
            option = "--" + name.replace("_", "-")
            raise UserError(f"the view {args.view} does not use {option}")
        if value is None:
            setattr(args, name, options.get(name))
    for number in (args.num_samples, args.num_steps, args.batch_size, args.topk):
        if number is not None and number < 1:
            raise UserError("a number of images, steps or neighbours is below 1")
    checkpoint = repa_mini.load_checkpoint(args.ckpt)
    if "classes" in options:
        check_sampling(args, checkpoint)
    choose_outputs(args, endings)
    return args, checkpoint


def check_sampling(args, checkpoint):
    """Fill in the defaults that depend on the run. Raises UserError for options at odds."""
    classes = dict(enumerate(checkpoint["classes"]))
    names = ", ".join(f"{i} {name}" for i, name in classes.items())
    args.classes = args.classes or list(classes)
    if not set(args.classes) <= set(classes):
        raise UserError(f"--classes {args.classes} are not all among {names}")
    print(f"classes: {names}", file=sys.stderr)  # prints all names
    args.num_samples = args.num_samples or 10 * len(args.classes)
    args.num_steps = args.num_steps or (250 if args.mode == "sde" else 50)
    if args.mode == "sde" and args.heun:
        raise UserError("--heun is a method for --mode ode; leave one out")
    is_finite = math.isfinite(args.cfg_scale)
    if not is_finite or not 0 <= args.guidance_low <= args.guidance_high <= 1:
        raise UserError("--cfg-scale is finite, 0 <= --guidance-low <= --guidance-high <= 1")
    if args.cfg_scale != 1 and checkpoint["config"]["cfg_prob"] == 0:
        raise UserError("--cfg-scale needs a run with --cfg-prob above 0")


def choose_outputs(args, endings):
    """Choose the default output, and find out before any work whether all can be written."""
    if args.output is None and args.npz is None and args.save_dir is None:
        folder = args.ckpt if args.ckpt.is_dir() else args.ckpt.parent
        args.output, number = folder / (args.view + endings[0]), 2
        while args.output.exists():
            args.output = folder / f"{args.view}-{number}{endings[0]}"
            number += 1
    outputs = [(args.output, endings), (args.npz, [".npz"])]
    if args.save_dir is not None:
        args.save_dir.mkdir(parents=True, exist_ok=True)
        if any(args.save_dir.iterdir()):
            raise UserError(f"--save-dir {args.save_dir} is not empty")
        outputs.append((args.save_dir / "000000.png", [".png"]))
    for path, allowed in outputs:
        if path is None:
            continue
        if path.suffix not in allowed:
            raise UserError(f"{path} does not end in {' or '.join(allowed)}")
        if path.exists():
            raise UserError(f"{path} already exists; give another name")
        path.touch()
        path.unlink()


def main(argv=None):
    """Run the command line. A mistake of the user's ends the program with one sentence."""
    try:
        args, checkpoint = parse_options(argv)
        with repa_mini.as_user_error(f"device {args.device} does not work here"):
            device = torch.ones(1, device=args.device).device
        with repa_mini.as_user_error(f"the model in {args.ckpt} does not fit repa_mini.py"):
            model = repa_mini.SiT(**checkpoint["sit"])
            model.load_state_dict(checkpoint["ema"])
        model = model.to(device).eval().requires_grad_(False)
        dtype = getattr(torch, args.dtype)
        run = SimpleNamespace(model=model, device=device, config=checkpoint["config"])
        run.path_type = run.config["path_type"]
        show, _, _ = VIEWS[args.view]
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            show(args, run)
        for path in (args.output, args.npz, args.save_dir):
            if path is not None:
                print(f"wrote {path}", file=sys.stderr)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
