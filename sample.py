"""sample.py: what a checkpoint of repa_mini.py can show.

    python sample.py --ckpt runs/.../checkpoint.pt               a grid of samples, one class a row
    python sample.py --ckpt C --num-samples 50000 --npz S.npz    an array for ADM's evaluator
    python sample.py --ckpt C --trajectory [--output T.gif]      from noise to image
    python sample.py --ckpt C --alignment                        hidden tokens beside the encoder's
    python sample.py --ckpt C --cknna                            how each layer is like the encoder
    python sample.py --ckpt C --fd                               Fréchet distance to real images

The first three need the checkpoint alone. The others need images and an encoder: those of the
training run, or what --data, --encoder and --encoder-weights say.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import repa_mini
from repa_mini import (
    SiT,
    TargetEncoder,
    UserError,
    count,
    interpolant,
    seed_for,
    to_pixels,
    to_unit,
)

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which hidden states are looked at


# ---- 1. The SDE sampler; the ODE's is in repa_mini.py
def score_from_velocity(v, x, t, path_type="linear"):
    """grad log p_t(x) = (r v - x) / (sigma^2 - r sigma' sigma), r = alpha / alpha' (Section 2).
    v and x: (N, C, H, W); t: a number in (0, 1]. On the linear path it is -(x + (1 - t) v) / t."""
    alpha, sigma, d_alpha, d_sigma = interpolant(x.new_tensor(t), path_type)
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
    """Euler-Maruyama on dx = (v - w_t/2 score) dt + sqrt(w_t) dW, backwards in time (Section 2).
    w_t = 2t on both paths, as the authors have it. num_steps - 1 noisy steps lead from t = 1 to
    0.04, and a last one without noise to 0. Arguments and result as for `sample_ode`; `generator`,
    on noise's device, makes the noise that is added reproducible."""
    times = [*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]
    x = noise
    for t, t_next in tqdm(list(zip(times, times[1:])), "sampling", leave=False):
        scale = cfg_scale if guidance_low <= t <= guidance_high else 1
        v = repa_mini.guided_velocity(model, x, t, y, scale)
        w = 2 * t
        drift = v - w / 2 * score_from_velocity(v, x, t, path_type)
        x = x + (t_next - t) * drift
        if t_next > 0:
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + math.sqrt(w * (t - t_next)) * eps
    return x


# ---- 2. Samples
def load_model(state, device, projector=False):
    """The EMA model of a checkpoint in evaluation mode, with or without its projector."""
    sit, weights = dict(state["sit"]), state["ema"]
    if not projector:
        sit["z_dim"] = 0
        weights = {k: p for k, p in weights.items() if not k.startswith("projectors.")}
    model = SiT(**sit)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


def starting_noise(seed, numbers):
    """x(1) (N, 3, 32, 32), which depends on the seed and an image's number, not on its batch."""
    seeds = [seed_for("sample", seed, number) for number in numbers]
    seeded = [torch.Generator().manual_seed(s) for s in seeds]
    return torch.stack([torch.randn(3, 32, 32, generator=g) for g in seeded])


def draw_samples(args, state):
    """uint8 samples (N, 3, 32, 32): image i is of the i-th class asked for, round and round."""
    model = load_model(state, args.device)
    compiled = args.compile
    if compiled is None:
        compiled = args.device.type == "cuda" and args.num_samples >= 1000
    if compiled:
        repa_mini.compile_in_place([model], args.device)
    labels = torch.tensor([args.classes[i % len(args.classes)] for i in range(args.num_samples)])
    guidance = dict(guidance_low=args.guidance_low, guidance_high=args.guidance_high)
    guidance["cfg_scale"] = args.cfg_scale
    images = []
    for numbers in tqdm(torch.arange(len(labels)).split(args.batch_size), "batches"):
        noise = starting_noise(args.seed, numbers.tolist()).to(args.device)
        y = labels[numbers].to(args.device)
        with args.autocast:
            if args.mode == "ode":
                x = repa_mini.sample_ode(model, noise, y, args.num_steps, args.heun, **guidance)
            else:
                g = torch.Generator(args.device)
                g.manual_seed(seed_for("sde", args.seed, int(numbers[0])))
                path = state["config"]["path_type"]
                x = sample_sde(
                    model, noise, y, args.num_steps, **guidance, path_type=path, generator=g
                )
        images.append(to_pixels(x).cpu())
    return torch.cat(images)


def write_samples(args, images):
    """The array and the folder of PNGs that --npz and --save-dir ask for."""
    if args.npz:
        np.savez(args.npz, arr_0=images.permute(0, 2, 3, 1).numpy())
        print(f"wrote {args.npz}")
    if args.save_dir:
        Path(args.save_dir).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(tqdm(images, "writing")):
            to_pil_image(image).save(Path(args.save_dir, f"{i:06d}.png"))
        print(f"wrote {args.save_dir}")


def show_samples(args, state):
    """A grid with one class a row, or whatever --npz and --save-dir ask for."""
    images = draw_samples(args, state)
    write_samples(args, images)
    if args.output or not (args.npz or args.save_dir):
        rows = len(args.classes)
        columns = math.ceil(len(images) / rows)
        grid = torch.zeros(columns * rows, 3, 32, 32, dtype=torch.uint8)
        grid[: len(images)] = images
        grid = grid.unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)  # class by class
        path = output_path(args, "samples.png")
        save_image(grid / 255, path, nrow=columns)
        print(f"wrote {path}")


# ---- 3. From noise to image
@torch.no_grad()
def trajectory(model, noise, y, times, args, path_type):
    """Euler's method, step by step: x_t, and the clean image that x_t and its velocity predict.
    noise: x(1), (N, 3, 32, 32); y: (N,); times: T numbers from 1 to 0. Both are (T, N, 3, 32, 32).
    x_t = alpha x + sigma eps and v = alpha' x + sigma' eps, solved for x; linear: x_t - t v."""
    x = noise
    noisy, clean = [], []
    for t, t_next in zip(times, times[1:]):
        scale = args.cfg_scale if args.guidance_low <= t <= args.guidance_high else 1
        with args.autocast:
            v = repa_mini.guided_velocity(model, x, t, y, scale)
        alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(t), path_type)
        noisy.append(x)
        clean.append((d_sigma * x - sigma * v) / (alpha * d_sigma - d_alpha * sigma))
        x = x + (t_next - t) * v
    return torch.stack([*noisy, x]), torch.stack([*clean, x])


def show_trajectory(args, state):
    """A strip of eight moments, or an animation of all steps if --output is a .gif."""
    model = load_model(state, args.device)
    y = torch.tensor(args.classes, device=args.device)
    times = torch.linspace(1, 0, args.num_steps + 1).tolist()
    noise = starting_noise(args.seed, range(len(y))).to(args.device)
    both = torch.stack(trajectory(model, noise, y, times, args, state["config"]["path_type"]))
    pixels = to_pixels(both).cpu()  # (noisy or clean, time, class, 3, 32, 32)
    path = output_path(args, "trajectory.png")
    if path.suffix == ".gif":
        rows = pixels.transpose(0, 1).flatten(1, 2)  # (time, noisy then clean, 3, 32, 32)
        frames = [to_pil_image(make_grid(row, nrow=len(y))) for row in rows]
        waits = [60] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=waits, loop=0)
        print(f"wrote {path}: above x_t, below the clean image predicted from it, per class")
    else:
        shown = torch.linspace(0, len(times) - 2, 7).long().unique().tolist() + [len(times) - 1]
        rows = pixels[:, shown].permute(2, 0, 1, 3, 4, 5).flatten(0, 2)  # (class, kind, time)
        save_image(rows / 255, path, nrow=len(shown))
        print("columns: t =", *(f"{times[i]:.2f}" for i in shown), "; rows: per class x_t, and")
        print(f"the clean image predicted from it; wrote {path}")


# ---- 4. Representations: what the hidden states know, beside what the encoder knows (Section 3)
def load_encoder(args, state, grid_size):
    """The encoder that the options name, or that of the training run. Returns it and its name."""
    config = state["config"]
    name, weights = args.encoder or config["encoder"], args.encoder_weights
    if not args.encoder and not weights:
        weights = config["encoder_weights"]
    pretrained = not (config["smoke"] and not args.encoder)
    return TargetEncoder(name, grid_size, weights, pretrained).to(args.device), name


def real_images(args, state, split="val"):
    """Images (N, 3, 32, 32) uint8 and labels (N,) of a split, "train" or "val"."""
    folder, smoke = args.data or state["config"]["data"], state["config"]["smoke"]
    if folder and Path(folder, "train").is_dir():  # no need to read the other split
        name = dict(train="train", val="test")[split]
        return repa_mini.load_split(ImageFolder(Path(folder, name), loader=repa_mini.read_image))
    images, labels, val_images, val_labels, _ = repa_mini.load_data(folder, smoke)
    return dict(train=(images, labels), val=(val_images, val_labels))[split]


def evenly(n, total):
    """At most n numbers of images, spread over all of them."""
    return torch.linspace(0, total - 1, min(n, total)).long()


def noisy_images(x, t, numbers, path_type):
    """x_t for clean images x (N, 3, 32, 32) at one time t; the noise is that of their numbers."""
    alpha, sigma, _, _ = interpolant(torch.tensor(t), path_type)
    return alpha * x + sigma * starting_noise(0, numbers).to(x)


def no_label(model, n):
    """The null label n times, so that nothing tells the class (or the last class, without one)."""
    table = model.y_embedder["embedding_table"].weight
    return torch.full((n,), len(table) - 1, device=table.device)


def pca_colours(targets, *others):
    """RGB in [0, 1] for tokens (..., D): equal directions have equal colours.
    The basis, three principal components, and the scale are fitted on `targets` and applied to all.
    Returns a list, the targets' colours first."""
    torch.manual_seed(0)  # pca_lowrank is a randomised algorithm
    unit = [F.normalize(x.cpu().double(), dim=-1) for x in (targets, *others)]
    tokens = unit[0].flatten(0, -2)
    mean = tokens.mean(0)
    _, _, basis = torch.pca_lowrank(tokens, q=3)  # (D, 3); it centres by itself
    projected = (tokens - mean) @ basis
    low, high = projected.quantile(0.02, dim=0), projected.quantile(0.98, dim=0)
    projected = [(x - mean) @ basis for x in unit]
    return [((p - low) / (high - low)).clamp(0, 1).float() for p in projected]


@torch.no_grad()
def alignment_picture(model, encoder, images, path_type, cell=64):
    """Three rows for each image, one column for the clean image and one for each of TIMES.
    The image and its x_t; the encoder's tokens and h_phi(h_t) as colours; their cosine, patch by
    patch, black for 0 or less and white for 1. Returns a picture (3, H, W) in [0, 1] and the mean
    cosine at each of TIMES."""
    x, grid = to_unit(images), model.grid_size
    noisy = [noisy_images(x, t, range(len(x)), path_type) for t in TIMES]
    y = no_label(model, len(x))
    z = encoder(x)
    hidden = [model(x_t, x.new_full((len(x),), t), y)[1] for x_t, t in zip(noisy, TIMES)]
    cosines = [F.cosine_similarity(h, z, dim=-1) for h in hidden]  # each (N, T)
    colours = [c.mT.unflatten(2, (grid, grid)) for c in pca_colours(z, *hidden)]
    greys = [torch.ones_like(cosines[0]), *cosines]
    greys = [c.clamp(0, 1).reshape(-1, 1, grid, grid).expand(-1, 3, -1, -1) for c in greys]
    photos = [(v / 2 + 0.5).clamp(0, 1) for v in (x, *noisy)]
    rows = []
    for row in (photos, colours, greys):
        rows.append(torch.stack([F.interpolate(c.cpu().float(), cell) for c in row], dim=1))
    picture = make_grid(torch.stack(rows, dim=1).flatten(0, 2), nrow=1 + len(TIMES))
    return picture, [c.mean().item() for c in cosines]


def show_alignment(args, state):
    """Hidden tokens and the encoder's side by side, for a few held-out images."""
    if not state["sit"]["z_dim"]:
        raise UserError(f"{args.ckpt} is of a vanilla run, without a projector: try --cknna")
    model = load_model(state, args.device, projector=True)
    encoder, name = load_encoder(args, state, model.grid_size)
    if encoder.embed_dim != state["sit"]["z_dim"]:
        raise UserError(f"the run was aligned with {state['config']['encoder']}, not with {name}")
    images, _ = real_images(args, state)
    images = images[evenly(args.num_samples, len(images))].to(args.device)
    path_type = state["config"]["path_type"]
    picture, cosines = alignment_picture(model, encoder, images, path_type)
    path = output_path(args, "alignment.png")
    save_image(picture, path)
    print(f"columns: clean, then t = {', '.join(map(str, TIMES))}; rows, for each held-out image:")
    print("  1 the image and x_t; 2 the encoder's tokens, then the projected hidden tokens")
    print("  3 their cosine, patch by patch: black 0 or less, white 1")
    print("  mean cosine: " + ", ".join(f"{c:.3f} at t = {t}" for c, t in zip(cosines, TIMES)))
    print(f"wrote {path}")


def cknna(a, b, topk=10):
    """CKNNA of features a (n, da) and b (n, db), row i of both from one image.
    Centred kernel alignment, unbiased, restricted to the pairs (i, j) with j among i's `topk`
    nearest neighbours in a and in b (Huh et al. 2024, arXiv 2405.07987). 1 for equal
    neighbourhoods, about 0 for unrelated ones. Raises ValueError unless 2 <= topk < n > 3."""
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
        k, l = kernels[i] * mask, kernels[j] * mask  # noqa: E741
        total = (k * l.T).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2))
        return (total - 2 * (k @ l).sum() / (n - 2)) / (n * (n - 3))

    return (hsic(0, 1) / ((hsic(0, 0) * hsic(1, 1)).sqrt() + 1e-6)).item()


def knn_accuracy(features, labels, topk=10):
    """How often an image's class wins the vote of its nearest neighbours, itself left out.
    Each of `topk` neighbours votes for its class with its cosine."""
    features = F.normalize(features.double(), dim=1)
    cosine = (features @ features.T).fill_diagonal_(-math.inf)
    weights, nearest = cosine.topk(topk, dim=1)
    votes = cosine.new_zeros(len(labels), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], weights)
    return (votes.argmax(dim=1) == labels).double().mean().item()


@torch.no_grad()
def pooled_states(model, encoder, images, args, path_type):
    """The encoder's tokens (n, D) and hidden states {(block, t): (n, D)}, averaged over patches."""
    states = {}  # of one forward pass, filled by hooks
    for i, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda block, _, x, i=i: states.update({i: x.mean(1)}))
    targets, pooled = [], {}
    for numbers in tqdm(torch.arange(len(images)).split(100), "hidden states"):
        x = to_unit(images[numbers].to(args.device))
        y = no_label(model, len(x))
        with args.autocast:
            targets.append(encoder(x).mean(1).float().cpu())
            for t in TIMES:
                x_t = noisy_images(x, t, numbers.tolist(), path_type)
                model(x_t, x.new_full((len(x),), t), y)
                for i, state in states.items():
                    pooled.setdefault((i, t), []).append(state.float().cpu())
    return torch.cat(targets), {key: torch.cat(batches) for key, batches in pooled.items()}


def show_cknna(args, state):
    """A table: for each block and t, CKNNA with the encoder and the accuracy of the neighbours."""
    model = load_model(state, args.device)
    encoder, _ = load_encoder(args, state, model.grid_size)
    images, labels = real_images(args, state)
    chosen = evenly(args.num_samples, len(images))
    images, labels = images[chosen], labels[chosen]
    z, pooled = pooled_states(model, encoder, images, args, state["config"]["path_type"])
    rows = [["layer"] + [f"cknna t={t}" for t in TIMES] + [f"knn t={t}" for t in TIMES]]
    for i in range(1, len(model.blocks) + 1):
        row = [cknna(pooled[i, t], z, args.topk) for t in TIMES]
        row += [knn_accuracy(pooled[i, t], labels, args.topk) for t in TIMES]
        rows.append([i] + [f"{number:.4f}" for number in row])
    path = output_path(args, "cknna.csv")
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    print(path.read_text().strip())
    print(f"the vote on the encoder's own features: {knn_accuracy(z, labels, args.topk):.4f}")
    print(f"{len(images)} held-out images, {args.topk} neighbours; wrote {path}")


# ---- 5. Quality
def frechet_distance(a, b):
    """|mean a - mean b|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)) for features a (n, D) and b (m, D).
    In float64; n < D is fine: the trace of the root is that of the symmetric
    (Ca^(1/2) Cb Ca^(1/2))^(1/2), whose eigenvalues are real. Raises ValueError for n or m < 2."""
    if min(len(a), len(b)) < 2:
        raise UserError(f"the Fréchet distance of {len(a)} and {len(b)} images: give 2 or more")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()  # root @ root.T = Ca
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * cross).item()


@torch.no_grad()
def pooled_features(encoder, images, device):
    """What the encoder's own head pools (class token or average) for uint8 images: (N, D)."""
    features = []
    for batch in tqdm(images.split(100), "features"):
        x = encoder.preprocess(to_unit(batch.to(device)))
        features.append(encoder.model(x).cpu())  # in float32 on every device
    return torch.cat(features)


def show_fd(args, state):
    """The Fréchet distance of samples to real images in an encoder's features, one row of a CSV."""
    encoder, name = load_encoder(args, state, args.grid_size)
    real, _ = real_images(args, state, args.split)
    fake = draw_samples(args, state)
    write_samples(args, fake)
    features = [pooled_features(encoder, images, args.device) for images in (fake, real)]
    row = {
        "step": state["step"],
        "encoder": name,
        "samples": len(fake),
        "images": len(real),
        "split": args.split,
        "sampler": "heun" if args.heun else args.mode,
        "steps": args.num_steps,
        "guidance": f"{args.cfg_scale} in {args.guidance_low} to {args.guidance_high}",
        "seed": args.seed,
        "distance": round(frechet_distance(*features), 4),
    }
    path = output_path(args, "fd.csv")
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    print("compare only equal numbers and encoders; REPA's own encoder flatters REPA")
    print(f"appended to {path}")


# ---- 6. Command line
ENDINGS = {  # of --output
    show_samples: [".png", ".jpg"],
    show_trajectory: [".png", ".jpg", ".gif"],
    show_alignment: [".png", ".jpg"],
    show_cknna: [".csv"],
    show_fd: [".csv"],
}


def build_parser():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint.pt of a run")
    add("--output", metavar="FILE", help="the picture or table (default: beside the checkpoint)")
    add("--mode", default="ode", choices=["ode", "sde"], help="the sampler")
    add("--heun", action="store_true", help="Heun's method instead of Euler's")
    add("--num-steps", type=count, help="steps of the sampler (default: 50, for sde 250)")
    add("--cfg-scale", type=float, default=1.0, help="guidance scale; 1 is none")
    add("--guidance-low", type=float, default=0.0, help="guidance acts from this t on")
    add("--guidance-high", type=float, default=1.0, help="guidance acts up to this t")
    add("--classes", type=int, nargs="+", metavar="K", help="class numbers (default: all)")
    add("--num-samples", type=count, help="images (default: 10 a class; --alignment 4; else 1000)")
    add("--seed", type=int, default=0, help="of the noise")
    add("--batch-size", type=count, default=100, help="images at a time")
    add("--save-dir", metavar="DIR", help="write each sample as a PNG of its own")
    add("--npz", metavar="FILE", help="write all samples as arr_0, uint8 (N, 32, 32, 3)")
    parser.set_defaults(show=show_samples)
    what = parser.add_mutually_exclusive_group()
    show = dict(action="store_const", dest="show")
    what.add_argument("--trajectory", const=show_trajectory, help="from noise to image", **show)
    what.add_argument("--alignment", const=show_alignment, help="tokens side by side", **show)
    what.add_argument("--cknna", const=show_cknna, help="a table of likeness by layer", **show)
    what.add_argument("--fd", const=show_fd, help="Fréchet distance to real images", **show)
    add("--topk", type=count, default=10, help="neighbours for --cknna")
    add("--split", default="val", choices=["val", "train"], help="what --fd compares with")
    add("--data", metavar="DIR", help="images (default: the training run's)")
    add("--encoder", metavar="NAME", help="a timm model (default: the training run's)")
    add("--encoder-weights", metavar="FILE", help="its weights (default: the run's, or a download)")
    add("--grid-size", type=count, default=16, help="--fd's encoder sees so many patches a side")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: the device's best)")
    add("--compile", action=argparse.BooleanOptionalAction, help="(default: on CUDA, for 1000)")
    return parser


def output_path(args, name):
    return Path(args.output or Path(args.ckpt).with_name(name))


def check_paths(args):
    """Whatever is wrong with the paths shows before samples are drawn. Raises ValueError."""
    for option, path, endings in [
        ("--output", args.output, ENDINGS[args.show]),
        ("--npz", args.npz, [".npz"]),
    ]:
        if path and not (Path(path).suffix in endings and Path(path).parent.is_dir()):
            allowed = " or ".join(endings)
            raise UserError(f"{option} {path}: give a {allowed} file in a folder that is there")
    if (args.npz or args.save_dir) and args.show not in (show_samples, show_fd):
        raise UserError("--npz and --save-dir are for samples, alone or with --fd")
    if args.save_dir and Path(args.save_dir).exists() and any(Path(args.save_dir).iterdir()):
        raise UserError(f"--save-dir {args.save_dir} is not empty: earlier images would count, too")


def check_sampling(args, sit):
    """Whether the options of the samplers fit together and to the model. Raises ValueError."""
    if not (0 <= args.guidance_low <= args.guidance_high <= 1 and math.isfinite(args.cfg_scale)):
        given = f"--cfg-scale {args.cfg_scale} in {args.guidance_low} <= t <= {args.guidance_high}"
        raise UserError(f"{given}: give a number, and 0 <= --guidance-low <= --guidance-high <= 1")
    if args.cfg_scale != 1 and sit["class_dropout_prob"] == 0:
        raise UserError(f"--cfg-scale {args.cfg_scale} needs a run with --cfg-prob above 0")
    if args.mode == "sde" and (args.heun or args.show is show_trajectory):
        raise UserError("--heun and --trajectory follow the ODE: leave out --mode sde")
    if args.heun and args.show is show_trajectory:
        raise UserError("--trajectory uses Euler's method: leave out --heun")
    if min(args.classes) < 0 or max(args.classes) >= sit["num_classes"]:
        raise UserError(f"--classes {args.classes}: give 0 to {sit['num_classes'] - 1}")


def run(argv):
    """Parse, check, and show what was asked for."""
    args = build_parser().parse_args(argv)
    check_paths(args)
    args.device, _, args.autocast = repa_mini.pick_device(args.device, args.dtype)
    state = repa_mini.load_checkpoint(args.ckpt, mmap=True)
    args.classes = args.classes or list(range(state["sit"]["num_classes"]))
    check_sampling(args, state["sit"])
    defaults = {show_samples: 10 * len(args.classes), show_alignment: 4}
    args.num_samples = args.num_samples or defaults.get(args.show, 1000)
    args.num_steps = args.num_steps or (50 if args.mode == "ode" else 250)
    args.show(args, state)


def main(argv=None):
    """Returns the exit code, as repa_mini.main."""
    return repa_mini.main(argv, run)


if __name__ == "__main__":
    sys.exit(main())
