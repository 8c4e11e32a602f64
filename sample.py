"""sample.py: what a checkpoint of repa_mini.py can show.

    python sample.py --ckpt RUN                          a grid of samples, one class a row
    python sample.py --ckpt RUN --trajectory             from noise to image (.png or .gif)
    python sample.py --ckpt RUN --losses                 held-out losses by noise level
    python sample.py --ckpt RUN --alignment              hidden tokens beside the encoder's
    python sample.py --ckpt RUN --cknna                  how like the encoder each block is

RUN is the folder of a run, or a checkpoint. The model is always the moving average (EMA). Images
and encoder are those of the run, unless --data, --encoder and --encoder-weights name others.
"""

import argparse
import csv
import functools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

import repa_mini
from repa_mini import SiT, TargetEncoder, UserError, interpolant, progress, to_pixels, to_unit

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which hidden states are looked at


# ---- 1. The SDE sampler (that of the ODE is in repa_mini.py)
def score_from_velocity(v, x, t, path_type="linear"):
    """grad log p_t(x) = (r v - x) / (sigma^2 - r sigma' sigma), r = alpha / alpha' (Section 2).
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

    w_t = 2t on both paths, as in the authors' code. After num_steps - 1 steps with noise, from
    t = 1 to t = 0.04, one step without noise leads to t = 0. The arguments and the result are those
    of `sample_ode`; `generator`, on the device of `noise`, draws the noise that is added.
    """
    times = [*torch.linspace(1, 0.04, num_steps).tolist(), 0.0]
    x = noise
    for t, t_next in zip(times, times[1:]):
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
    """x at t = 1, (N, 3, 32, 32), from the seed and the number of each image alone."""
    images = []
    for number in numbers:
        g = torch.Generator().manual_seed(repa_mini.seed_for("sample", seed, number))
        images.append(torch.randn(3, 32, 32, generator=g))
    return torch.stack(images)


def draw_samples(args, run):
    """uint8 samples (N, 3, 32, 32). The classes asked for take turns, image by image."""
    guidance = dict(guidance_low=args.guidance_low, guidance_high=args.guidance_high)
    guidance["cfg_scale"] = args.cfg_scale
    labels = torch.tensor(args.classes).repeat(args.num_samples)[: args.num_samples]
    samples = []
    for numbers in progress(torch.arange(args.num_samples).split(args.batch_size), "batches"):
        noise = starting_noise(args.seed, numbers.tolist()).to(run.device)
        y = labels[numbers].to(run.device)
        with run.autocast():
            if args.mode == "ode":
                x = repa_mini.sample_ode(run.model, noise, y, args.num_steps, args.heun, **guidance)
            else:
                g = torch.Generator(run.device)
                g.manual_seed(repa_mini.seed_for("sde", args.seed, int(numbers[0])))
                guidance.update(path_type=run.path_type, generator=g)
                x = sample_sde(run.model, noise, y, args.num_steps, **guidance)
        samples.append(to_pixels(x).cpu())
    samples = torch.cat(samples)
    if args.npz is not None:
        np.savez(args.npz, arr_0=samples.permute(0, 2, 3, 1).numpy())
    if args.save_dir is not None:
        for i, image in enumerate(samples):
            to_pil_image(image).save(Path(args.save_dir, f"{i:06d}.png"))
    return samples


def show_samples(args, run):
    """A grid with one class a row."""
    samples = draw_samples(args, run)
    if args.output is None:  # --npz or --save-dir is enough
        return
    rows, columns = len(args.classes), math.ceil(len(samples) / len(args.classes))
    grid = torch.zeros(columns * rows, 3, 32, 32, dtype=torch.uint8)
    grid[: len(samples)] = samples
    grid = grid.unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)  # class by class
    save_image(grid / 255, args.output, nrow=columns)


# ---- 3. From noise to image
@torch.no_grad()
def trajectory(model, noise, y, args, path_type):
    """Euler's method, step by step: x_t, and the clean image that x_t and its velocity predict.

    noise: x at t = 1, (N, 3, 32, 32); y: (N,). Returns the T times, and both as (T, N, 3, 32, 32).
    The prediction is x of x_t = alpha x + sigma eps and v = alpha' x + sigma' eps.
    """
    times = torch.linspace(1, 0, args.num_steps + 1).tolist()
    x, noisy, clean = noise, [], []
    for t, t_next in zip(times, times[1:]):
        scale = args.cfg_scale if args.guidance_low <= t <= args.guidance_high else 1.0
        v = repa_mini.guided_velocity(model, x, t, y, scale)
        alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(t), path_type)
        noisy.append(x)
        clean.append((d_sigma * x - sigma * v) / (alpha * d_sigma - d_alpha * sigma))
        x = x + (t_next - t) * v
    return times, torch.stack([*noisy, x]), torch.stack([*clean, x])


def show_trajectory(args, run):
    """A strip of eight moments, or an animation of all of them if the output is a .gif."""
    y = torch.tensor(args.classes, device=run.device)
    noise = starting_noise(args.seed, range(len(y))).to(run.device)
    with run.autocast():
        times, noisy, clean = trajectory(run.model, noise, y, args, run.path_type)
    pixels = to_pixels(torch.stack([noisy, clean])).cpu()  # (kind, time, class, 3, 32, 32)
    if Path(args.output).suffix == ".gif":
        frames = []
        for both in pixels.transpose(0, 1):
            frames.append(to_pil_image(make_grid(both.flatten(0, 1), nrow=len(y))))
        waits = [60] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(args.output, save_all=True, append_images=frames[1:], duration=waits, loop=0)
        print("above: x_t; below: the clean image that is predicted from it")
        return
    shown = torch.linspace(0, len(times) - 1, min(8, len(times))).long()
    rows = pixels[:, shown].permute(2, 0, 1, 3, 4, 5).flatten(0, 2)  # (class, kind, time)
    save_image(rows / 255, args.output, nrow=len(shown))
    print("columns: t =", ", ".join(f"{times[i]:.2f}" for i in shown))
    print("rows, for each class: x_t, and the clean image that is predicted from it")


# ---- 4. Losses by noise level
@torch.no_grad()
def losses_at(run, images, labels, t):
    """Held-out velocity loss and alignment (None without a projector) at one time t."""
    velocity_sum, cosine_sum, z = 0.0, 0.0, None
    for numbers in torch.arange(len(images)).split(100):
        x, y = to_unit(images[numbers].to(run.device)), labels[numbers].to(run.device)
        noise = starting_noise(0, numbers.tolist()).to(run.device)
        times = x.new_full((len(x),), t)
        with run.autocast():
            if run.encoder is not None:
                z = run.encoder(x)
            losses = repa_mini.training_losses(run.model, x, noise, times, y, z, run.path_type)
        velocity_sum += len(x) * losses[0].item()
        if z is not None:
            cosine_sum -= len(x) * losses[1].item()
    if z is None:
        return velocity_sum / len(images), None
    return velocity_sum / len(images), cosine_sum / len(images)


def show_losses(args, run):
    """A table with a row for each of ten noise levels; images and noise are the same in each."""
    images, labels = held_out_images(args, run)
    rows = [["t", "velocity_loss", "alignment"]]
    for i in progress(range(10), "noise levels"):
        t = round(0.05 + i / 10, 2)
        rows.append([t, *losses_at(run, images, labels, t)])
    write_table(args.output, rows)


# ---- 5. Representations: hidden states beside what the encoder says (Section 3)
def held_out_images(args, run):
    """At most --num-samples held-out images (N, 3, 32, 32) and labels, spread over all of them."""
    _, _, images, labels, _ = repa_mini.load_data(args.data or run.config["data"])
    chosen = torch.linspace(0, len(images) - 1, min(args.num_samples, len(images))).long()
    return images[chosen], labels[chosen]


def noisy_images(x, t, numbers, path_type):
    """x_t of clean images x (N, 3, 32, 32) at a time t, with the noise of the images' numbers."""
    alpha, sigma, _, _ = interpolant(torch.tensor(t), path_type)
    return alpha * x + sigma * starting_noise(0, numbers).to(x.device)


def pca_colours(targets, *others):
    """Colours (..., 3) in [0, 1] of tokens (..., D); equal directions get equal colours.

    The three principal components and their ranges are those of `targets`. Returns a list, with
    the colours of the targets first.
    """
    unit = [F.normalize(tokens.cpu().double(), dim=-1) for tokens in (targets, *others)]
    tokens = unit[0].flatten(0, -2)
    _, vectors = torch.linalg.eigh(tokens.T.cov())  # eigenvalues ascend
    basis = vectors[:, -3:].flip(1)  # (D, 3)
    projected = [(x - tokens.mean(0)) @ basis for x in unit]
    flat = projected[0].flatten(0, -2)
    low, high = flat.quantile(0.02, dim=0), flat.quantile(0.98, dim=0)
    return [((p - low) / (high - low)).clamp(0, 1).float() for p in projected]


@torch.no_grad()
def alignment_picture(model, encoder, images, path_type, cell=64):
    """Three rows for each image, with a column for the clean image and one for each of TIMES.

    The rows show the image and its x_t; the encoder's tokens and z_tilde as colours; and their
    cosine, patch by patch, black for 0 or less and white for 1. Returns a picture (3, H, W) in
    [0, 1] and the mean cosine at each of TIMES.
    """
    x, grid = to_unit(images), model.grid_size
    y = torch.full((len(x),), model.num_classes, device=x.device)
    z, noisy, hidden = encoder(x), [], []
    for t in TIMES:
        noisy.append(noisy_images(x, t, range(len(x)), path_type))
        hidden.append(model(noisy[-1], x.new_full((len(x),), t), y)[1])
    cosines = [F.cosine_similarity(h, z, dim=-1) for h in hidden]  # each (N, T)
    colours = [c.mT.unflatten(2, (grid, grid)) for c in pca_colours(z, *hidden)]
    greys = []
    for cosine in [torch.ones_like(cosines[0]), *cosines]:
        greys.append(cosine.clamp(0, 1).reshape(-1, 1, grid, grid).expand(-1, 3, -1, -1))
    photos = [(image / 2 + 0.5).clamp(0, 1) for image in (x, *noisy)]
    rows = []
    for row in (photos, colours, greys):
        cells = [F.interpolate(part.cpu().float(), cell) for part in row]
        rows.append(torch.stack(cells, dim=1))
    picture = make_grid(torch.stack(rows, dim=1).flatten(0, 2), nrow=1 + len(TIMES))
    return picture, [cosine.mean().item() for cosine in cosines]


def show_alignment(args, run):
    """Hidden tokens and the encoder's tokens, side by side, for a few held-out images."""
    if run.encoder is None:
        raise UserError("this run has no projector; --cknna works without one")
    images, _ = held_out_images(args, run)
    images = images.to(run.device)
    picture, cosines = alignment_picture(run.model, run.encoder, images, run.path_type)
    save_image(picture, args.output)
    print(f"columns: the clean image, then t = {', '.join(map(str, TIMES))}")
    print("rows, for each image: x_t; the encoder's tokens and the projected hidden tokens;")
    print("and their cosine, patch by patch, from 0 (black) to 1 (white)")
    print("mean cosine:", ", ".join(f"{c:.3f} at t = {t}" for c, t in zip(cosines, TIMES)))


def cknna(a, b, topk=10):
    """CKNNA of features a (n, da) and b (n, db); row i of both is of one image.

    It is the unbiased centred kernel alignment, restricted to the pairs (i, j) in which j is among
    the `topk` nearest neighbours of i in a and in b (Huh et al. 2024, arXiv 2405.07987). It is 1
    for equal neighbourhoods and about 0 for unrelated ones. Raises UserError for too few images.
    """
    n = len(a)
    if not 2 <= topk < n or n < 4:
        raise UserError(f"CKNNA of {n} images with {topk} neighbours needs 2 <= topk < images > 3")
    kernels, masks = [], []
    for x in (a, b):
        x = F.normalize(x.double(), dim=1)
        kernel = (x @ x.T).fill_diagonal_(-math.inf)  # nobody is their own neighbour
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
    Each neighbour votes for its own class, with its cosine as the weight."""
    features = F.normalize(features.double(), dim=1)
    cosine = (features @ features.T).fill_diagonal_(-math.inf)
    weights, nearest = cosine.topk(topk, dim=1)
    votes = cosine.new_zeros(len(labels), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], weights)
    return (votes.argmax(dim=1) == labels).double().mean().item()


@torch.no_grad()
def pooled_states(run, images):
    """The encoder's tokens (n, D) and hidden states {(block, t): (n, D)}, means over patches."""
    model, states = run.model, {}  # block number -> its output in the last forward pass

    def keep(i, block, inputs, output):
        states[i] = output.mean(1)

    for i, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(functools.partial(keep, i))
    targets, pooled = [], {}
    for numbers in progress(torch.arange(len(images)).split(100), "hidden states"):
        x = to_unit(images[numbers].to(run.device))
        y = torch.full((len(x),), model.num_classes, device=x.device)
        targets.append(run.encoder(x).mean(1).float().cpu())
        for t in TIMES:
            x_t = noisy_images(x, t, numbers.tolist(), run.path_type)
            model(x_t, x.new_full((len(x),), t), y)
            for i, state in states.items():
                pooled.setdefault((i, t), []).append(state.float().cpu())
    return torch.cat(targets), {key: torch.cat(batches) for key, batches in pooled.items()}


def show_cknna(args, run):
    """A table: for each block and t, CKNNA with the encoder and the accuracy of the neighbours."""
    images, labels = held_out_images(args, run)
    z, pooled = pooled_states(run, images)
    rows = [["block"] + [f"cknna t={t}" for t in TIMES] + [f"knn t={t}" for t in TIMES]]
    for i in range(1, len(run.model.blocks) + 1):
        row = [cknna(pooled[i, t], z, args.topk) for t in TIMES]
        row += [knn_accuracy(pooled[i, t], labels, args.topk) for t in TIMES]
        rows.append([i, *row])
    write_table(args.output, rows)
    accuracy = knn_accuracy(z, labels, args.topk)
    print(
        f"{len(images)} held-out images; the encoder's own neighbours are right in {accuracy:.4f}"
    )


# ---- 6. Command line
SAMPLING = ["classes", "num_steps", "cfg_scale", "guidance_low", "guidance_high", "seed"]
SAMPLES = [*SAMPLING, "mode", "heun", "num_samples", "batch_size", "npz", "save_dir"]
ENCODING = ["data", "encoder", "encoder_weights"]
VIEWS = {  # view -> function, endings of its output, options that it uses
    "samples": (show_samples, [".png", ".jpg"], SAMPLES),
    "trajectory": (show_trajectory, [".png", ".jpg", ".gif"], SAMPLING),
    "losses": (show_losses, [".csv"], ["num_samples", *ENCODING]),
    "alignment": (show_alignment, [".png", ".jpg"], ["num_samples", *ENCODING]),
    "cknna": (show_cknna, [".csv"], ["num_samples", "topk", *ENCODING]),
}
DEFAULTS = dict(mode="ode", cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0, seed=0)
DEFAULTS.update(heun=False, batch_size=100, topk=10)


def build_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="RUN", help="folder of a run, or a checkpoint")
    add("--output", metavar="FILE", help="default: a new file beside the checkpoint")
    add("--mode", choices=["ode", "sde"], help="the sampler (default: ode)")
    add("--heun", action="store_true", default=None, help="Heun's method instead of Euler's")
    add("--num-steps", type=int, help="steps of the sampler (default: 50, for sde 250)")
    add("--cfg-scale", type=float, help="guidance scale (default: 1, no guidance)")
    add("--guidance-low", type=float, help="guidance acts from this t on (default: 0)")
    add("--guidance-high", type=float, help="guidance acts up to this t (default: 1)")
    add("--classes", type=int, nargs="+", metavar="K", help="numbers (default: all)")
    add("--num-samples", type=int, help="default: 10 a class, 4 for --alignment, else 1000")
    add("--seed", type=int, help="of the noise (default: 0)")
    add("--batch-size", type=int, help="samples at a time (default: 100)")
    add("--save-dir", metavar="FOLDER", help="write each sample as a PNG, without a grid")
    add("--npz", metavar="FILE", help="write all samples as arr_0, without a grid")
    parser.set_defaults(view="samples")
    views = parser.add_mutually_exclusive_group()
    for view in ("trajectory", "losses", "alignment", "cknna"):
        views.add_argument(f"--{view}", action="store_const", dest="view", const=view)
    add("--topk", type=int, help="neighbours (default: 10)")
    add("--data", metavar="FOLDER", help="images (default: the run's)")
    add("--encoder", metavar="NAME", help="a timm model (default: the run's)")
    add("--encoder-weights", metavar="FILE", help="download, random, or a file")
    add("--device", help="cuda, mps or cpu (default: a GPU if there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return parser


def parse_options(argv):
    """The options and the checkpoint. An option that the view does not use is an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    _, endings, used = VIEWS[args.view]
    for name in {**DEFAULTS, **dict.fromkeys([*SAMPLES, *ENCODING])}:
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and name not in used:
            parser.error(f"{option} is not used by --{args.view}")
        if value == "":
            parser.error(f"{option} is empty")
        if value is None:
            setattr(args, name, DEFAULTS.get(name))
    if args.mode == "sde" and args.heun:
        parser.error("--heun is a method for --mode ode")
    checkpoint = repa_mini.load_checkpoint(args.ckpt)
    classes = checkpoint["classes"]
    names = ", ".join(f"{i} {name}" for i, name in enumerate(classes))
    if args.classes is None:
        args.classes = list(range(len(classes)))
    elif min(args.classes) < 0 or max(args.classes) >= len(classes):
        parser.error(f"--classes {args.classes} are not among {ascii(names)}")
    if args.view in ("samples", "trajectory"):
        print("classes:", ascii(names).strip("'"))
    if args.num_samples is None:
        counts = {"samples": 10 * len(args.classes), "alignment": 4}
        args.num_samples = counts.get(args.view, 1000)
    if args.num_steps is None:
        args.num_steps = {"ode": 50, "sde": 250}[args.mode]
    if min(args.num_samples, args.num_steps, args.batch_size) < 1:
        parser.error("--num-samples, --num-steps and --batch-size are numbers from 1")
    check_outputs(args, endings)
    return args, checkpoint


def check_outputs(args, endings):
    """Find out before any work whether all outputs can be written, and that none exists."""
    if args.save_dir is not None:
        Path(args.save_dir).mkdir(parents=True, exist_ok=True)
        if any(Path(args.save_dir).iterdir()):
            raise UserError(f"--save-dir {args.save_dir} is not empty")
    if args.output is None and args.npz is None and args.save_dir is None:
        folder = Path(args.ckpt)
        if folder.is_file():
            folder = folder.parent
        args.output = folder / (args.view + endings[0])
    for path, allowed in [(args.output, endings), (args.npz, [".npz"])]:
        if path is None:
            continue
        if Path(path).suffix not in allowed:
            raise UserError(f"{path} does not end in {' or '.join(allowed)}")
        if Path(path).exists():
            raise UserError(f"{path} already exists; give another name with --output")
        Path(path).touch()  # raises OSError if it cannot be written
        Path(path).unlink()


def write_table(path, rows):
    """Write rows as a CSV file and print it."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    print(Path(path).read_text().strip())


def load_run(args, checkpoint):
    """The EMA model, the encoder if the view needs one, and what else the views use."""
    device, dtype = repa_mini.pick_device(args.device, args.dtype)
    torch.set_float32_matmul_precision("high")  # TF32, like the authors
    config, sit = checkpoint["config"], checkpoint["sit"]
    with repa_mini.told_as(f"the model of {args.ckpt} does not fit this version"):
        model = SiT(**sit)
        model.load_state_dict(checkpoint["ema"])
    model = model.to(device).eval().requires_grad_(False)
    encoder = None
    needs_projector = args.view in ("losses", "alignment")
    if args.view == "cknna" or (needs_projector and sit["z_dim"] > 0):
        name = args.encoder or config["encoder"]
        weights = args.encoder_weights or "download"
        if args.encoder is None and args.encoder_weights is None:
            weights = config["encoder_weights"]
        encoder = TargetEncoder(name, model.grid_size, weights).to(device)
        if needs_projector and encoder.embed_dim != sit["z_dim"]:
            raise UserError(f"the run was aligned with {config['encoder']}, not with {name}")
    autocast = functools.partial(torch.autocast, device.type, dtype, dtype != torch.float32)
    run = SimpleNamespace(model=model, encoder=encoder, device=device, autocast=autocast)
    run.config, run.path_type = config, config["path_type"]
    return run


def main(argv=None):
    """Run the command line. A mistake of the user's ends the program with one sentence."""
    try:
        args, checkpoint = parse_options(argv)
        show, _, _ = VIEWS[args.view]
        show(args, load_run(args, checkpoint))
        for path in (args.output, args.npz, args.save_dir):
            if path is not None:
                print(f"wrote {path}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
