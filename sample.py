"""sample.py: what a checkpoint of repa_mini.py can show.

    python sample.py --ckpt runs/.../checkpoint.pt                     a grid of samples, one class a row
    python sample.py --ckpt C --num-samples 1000 --npz samples.npz     an array for ADM's evaluator (or --save-dir DIR)
    python sample.py --ckpt C --trajectory                             from noise to image, a strip of a few times
    python sample.py --ckpt C --alignment                              hidden tokens beside the encoder's, as colours
    python sample.py --ckpt C --cknna                                  which layer sees what the encoder sees, a table
    python sample.py --ckpt C --fd                                     the Fréchet distance to real images

The first three need the checkpoint alone. The others need images and an encoder: those of the training run, or what
--data, --encoder and --encoder-weights say."""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import repa_mini
from repa_mini import SiT, TargetEncoder, UserError, autocast, interpolant, to_pixels, to_unit


def load_model(state, device, projector=False, compiled=False):
    """The EMA model of a checkpoint in evaluation mode; without its projector, which sampling has no use for."""
    sit = state["sit"] if projector else {**state["sit"], "z_dim": 0}
    weights = {name: p for name, p in state["ema"].items() if projector or not name.startswith("projectors.")}
    model = SiT(**sit)
    model.load_state_dict(weights)
    if compiled:
        model.compile()
    return model.to(device).eval().requires_grad_(False)


# ---- Sampling
def seeded_noise(seed, numbers, shape=(3, 32, 32)):
    """Noise (N, *shape) that depends on the seed and each image's number, not on the batch it is drawn in."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in numbers]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def draw_samples(model, args, path_type, device):
    """uint8 samples (N, 3, 32, 32) and their classes (N,): image i is of the i-th class asked for, round and round."""
    classes = args.classes or range(model.num_classes)
    labels = torch.tensor([classes[i % len(classes)] for i in range(args.num_samples or 10 * len(classes))])
    options = dict(cfg_scale=args.cfg_scale, guidance_low=args.guidance_low, guidance_high=args.guidance_high)
    images = []
    for numbers in tqdm(torch.arange(len(labels)).split(args.batch_size), "sampling"):
        noise, y = seeded_noise(args.seed, numbers.tolist()).to(device), labels[numbers].to(device)
        with autocast(device):
            if args.mode == "ode":
                x = repa_mini.sample_ode(model, noise, y, args.num_steps or 50, args.heun, **options)
            else:
                g = torch.Generator(device).manual_seed(args.seed * 1_000_003 + int(numbers[0]))
                options |= dict(path_type=path_type, generator=g)
                x = repa_mini.sample_sde(model, noise, y, args.num_steps or 250, **options)
        images.append(to_pixels(x).cpu())
    return torch.cat(images), labels


@torch.no_grad()
def trajectory(model, args, path_type, device, columns=8):
    """A strip (3, H, W): for a few classes x_t from t = 1 to 0, and below it the clean image that x_t and v predict."""
    y = torch.tensor(list(args.classes or range(model.num_classes))[:8], device=device)
    times = torch.linspace(1, 0, (args.num_steps or 50) + 1, dtype=torch.float64).tolist()
    shown = sorted(set(torch.linspace(0, len(times) - 2, columns - 1).long().tolist()))
    guidance = args.cfg_scale, args.guidance_low, args.guidance_high
    x, steps = repa_mini.sampling_steps(model, seeded_noise(args.seed, range(len(y))).to(device), y, times, *guidance)
    noisy, clean = [], []
    for i, (t, t_next, scale) in enumerate(tqdm(steps, "sampling")):
        with autocast(device):
            v = repa_mini.guided_velocity(model, x, t, y, scale, torch.float32)
        if i in shown:
            alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(t, dtype=x.dtype), path_type)
            noisy.append(x)
            clean.append((d_sigma * x - sigma * v) / (alpha * d_sigma - d_alpha * sigma))  # linear path: x - t v
        x = x + (t_next - t) * v
    rows = torch.stack([torch.stack([*noisy, x], 1), torch.stack([*clean, x], 1)], 1)  # (class, 2, time, 3, 32, 32)
    print(f"columns: t = {', '.join(f'{times[i]:.2f}' for i in shown)}, 0; rows: x_t, predicted clean image, per class")
    return make_grid(to_pixels(rows.flatten(0, 2)).cpu() / 255, nrow=len(noisy) + 1)


# ---- Representations (the paper's Section 3: what the hidden states know, compared with what the encoder knows)
def load_targets(args, config, grid_size, device):
    """The encoder and the held-out images and labels of the training run, or those that the options name."""
    name, weights = args.encoder or config["encoder"], args.encoder_weights
    if not args.encoder and not weights:
        weights = config["encoder_weights"]
    built_in = config["smoke"] and name == repa_mini.DEFAULT_ENCODER
    torch.manual_seed(0)  # the random weights of --smoke's encoder
    encoder = TargetEncoder(name, grid_size, weights, **(repa_mini.TINY_DINOV2 if built_in else {})).to(device)
    images, _, val_images, val_labels, _ = repa_mini.load_data(args.data or config["data"], config["smoke"])
    return encoder, images, val_images, val_labels


def pca_colours(targets, *others):
    """RGB in [0, 1] for tokens (..., D): one basis of three principal components and one scale, fitted on `targets`
    and applied to all, so that equal colours mean equal features. Returns a list, the targets' colours first."""
    torch.manual_seed(0)
    targets, *others = [x.cpu().double() for x in (targets, *others)]
    tokens = targets.flatten(0, -2)
    _, _, basis = torch.pca_lowrank(tokens, q=3)  # (D, 3); centres by itself
    projected = (tokens - tokens.mean(0)) @ basis
    low, high = projected.quantile(0.02, dim=0), projected.quantile(0.98, dim=0)
    colours = [((x - tokens.mean(0)) @ basis - low) / (high - low) for x in (targets, *others)]
    return [colour.clamp(0, 1).float() for colour in colours]


@torch.no_grad()
def alignment_picture(model, encoder, images, path_type, times=(0.1, 0.3, 0.5, 0.7, 0.9), cell=64):
    """Three rows an image, (3, H, W): the image and its x_t; the encoder's tokens and h_phi(h_t); their cosines."""
    x = to_unit(images)
    y = torch.full((len(x),), model.num_classes if model.class_dropout_prob else 0, device=x.device)
    noise = seeded_noise(0, range(len(x))).to(x)
    z, noisy, hidden = F.normalize(encoder(x), dim=-1), [], []
    for t in times:
        alpha, sigma, _, _ = interpolant(torch.tensor(t), path_type)
        noisy.append(alpha * x + sigma * noise)
        hidden.append(F.normalize(model(noisy[-1], x.new_full((len(x),), t), y)[1], dim=-1))
    grid = model.grid_size
    colours = [c.mT.reshape(len(x), 3, grid, grid) for c in pca_colours(z, *hidden)]
    cosines = [torch.ones_like(z[..., 0])] + [(h * z).sum(-1) for h in hidden]
    cosines = [c.clamp(0, 1).reshape(-1, 1, grid, grid).expand(-1, 3, -1, -1) for c in cosines]
    tops = [(v / 2 + 0.5).clamp(0, 1) for v in (x, *noisy)]
    rows = [torch.stack([F.interpolate(c.cpu(), cell) for c in row], 1) for row in (tops, colours, cosines)]
    print(f"columns: clean, then t = {', '.join(map(str, times))}; rows, for each of {len(x)} held-out images:")
    print(
        "  1 the image and x_t; 2 the encoder's tokens, then the projected hidden tokens, equal colour = equal feature"
    )
    print("  3 their cosine, patch by patch: black 0 or less, white 1")
    print("  mean cosine: " + ", ".join(f"{(h * z).sum(-1).mean():.3f} at t = {t}" for h, t in zip(hidden, times)))
    return make_grid(torch.stack(rows, 1).flatten(0, 2), nrow=1 + len(times))


def cknna(a, b, topk=10):
    """CKNNA of features a (n, da) and b (n, db), row i of both from one image: centred kernel alignment restricted to
    the pairs (i, j) with j among i's `topk` nearest neighbours in a and in b (Huh et al. 2024, arXiv 2405.07987;
    unbiased). 1 for equal neighbourhoods, about 0 for unrelated ones. Raises ValueError unless 2 <= topk < n > 3."""
    n = len(a)
    if not 2 <= topk < n or n < 4:
        raise UserError(f"CKNNA of {n} images with {topk} neighbours: give at least 4 images and 2 <= topk < images")
    kernels = [F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T for x in (a, b)]
    masks = []
    for kernel in kernels:
        kernel.fill_diagonal_(-math.inf)  # nobody is their own neighbour
        masks.append(torch.zeros_like(kernel).scatter_(1, kernel.topk(topk, dim=1).indices, 1))
        kernel.fill_diagonal_(0)

    def hsic(i, j):  # the unbiased estimator of Song et al. 2012
        first, second = (kernels[x] * masks[i] * masks[j] for x in (i, j))
        total = (first * second.T).sum() + first.sum() * second.sum() / ((n - 1) * (n - 2))
        return (total - 2 * (first @ second).sum() / (n - 2)) / (n * (n - 3))

    return (hsic(0, 1) / ((hsic(0, 0) * hsic(1, 1)).sqrt() + 1e-6)).item()


def knn_accuracy(features, labels, topk=10):
    """How often the majority class of an image's nearest neighbours (cosine, itself left out) is its own."""
    features = F.normalize(features.double(), dim=1)
    nearest = (features @ features.T).fill_diagonal_(-math.inf).topk(topk, dim=1).indices
    return (labels[nearest].mode(dim=1).values == labels).double().mean().item()


@torch.no_grad()
def representation_table(model, encoder, images, labels, path_type, topk, times=(0.1, 0.3, 0.5, 0.7, 0.9)):
    """Lines of a CSV: CKNNA with the encoder and accuracy of the neighbours' vote, for each layer (rows) and t.
    Features are hidden states and patch tokens, averaged over the patches. The model is given the null label, so that
    nothing tells it the class (one trained without label dropout has no null label and is given class 0)."""
    targets, pooled = [], [[[] for _ in times] for _ in model.blocks]
    outputs = {}  # of the blocks in the last forward pass, filled by hooks
    for block in model.blocks:
        block.register_forward_hook(lambda block, _, x: outputs.update({block: x.mean(1).float().cpu()}))
    for batch in tqdm(torch.arange(len(images)).split(100), "hidden states"):
        x = to_unit(images[batch].to(model.pos_embed.device))
        y = torch.full((len(x),), model.num_classes if model.class_dropout_prob else 0, device=x.device)
        noise = seeded_noise(0, batch.tolist()).to(x)
        with autocast(x.device):
            targets.append(encoder(x).mean(1).float().cpu())
            for i, t in enumerate(times):
                alpha, sigma, _, _ = interpolant(torch.tensor(t), path_type)
                model(alpha * x + sigma * noise, x.new_full((len(x),), t), y)
                for layer, block in enumerate(model.blocks):
                    pooled[layer][i].append(outputs[block])
    z = torch.cat(targets)
    lines = [",".join(["layer", *(f"cknna t={t}" for t in times), *(f"knn t={t}" for t in times)])]
    for layer, batches in enumerate(pooled, start=1):
        features = [torch.cat(x) for x in batches]
        numbers = [cknna(f, z, topk) for f in features] + [knn_accuracy(f, labels, topk) for f in features]
        lines.append(",".join([str(layer), *(f"{number:.4f}" for number in numbers)]))
    accuracy = knn_accuracy(z, labels, topk)
    print(f"{len(images)} held-out images, {topk} neighbours; the vote on the encoder's own features: {accuracy:.4f}")
    return lines


# ---- Quality
def frechet_distance(a, b):
    """|mean a - mean b|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)) for features a (n, D), b (m, D), in float64; n < D is fine.
    The trace of the root is that of the symmetric (Ca^(1/2) Cb Ca^(1/2))^(1/2), whose eigenvalues are real."""
    a, b = a.double(), b.double()
    if min(len(a), len(b)) < 2:
        raise UserError(f"the Fréchet distance of {len(a)} and {len(b)} images: give at least 2 of each")
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()  # root @ root.T = Ca
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


@torch.no_grad()
def pooled_features(encoder, images, device):
    """What the encoder's own head pools (class token or average) for uint8 images: (N, D)."""
    features = []
    for batch in tqdm(images.split(100), "features"):
        x = ((to_unit(batch.to(device)) + 1) / 2 - encoder.mean) / encoder.std
        x = F.interpolate(x, size=(encoder.input_size, encoder.input_size), mode="bicubic")
        with autocast(device):
            features.append(encoder.model(x).float().cpu())
    return torch.cat(features)


# ---- Command line
def build_parser():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint.pt of a run")
    add("--output", metavar="FILE", help="the picture or table (default: beside the checkpoint)")
    add("--mode", default="ode", choices=["ode", "sde"], help="the sampler")
    add("--heun", action="store_true", help="Heun's method instead of Euler's")
    add("--num-steps", type=int, help="steps of the sampler (default: 50 for ode, 250 for sde)")
    add("--cfg-scale", type=float, default=1.0, help="guidance scale; 1 is none")
    add("--guidance-low", type=float, default=0.0, help="guidance acts from this t on")
    add("--guidance-high", type=float, default=1.0, help="guidance acts up to this t")
    add("--classes", type=int, nargs="+", metavar="K", help="class numbers (default: all)")
    add("--num-samples", type=int, help="images to draw or to look at (default: 10 a class; 1000 for --fd, --cknna)")
    add("--seed", type=int, default=0, help="of the noise")
    add("--batch-size", type=int, default=100, help="images at a time")
    add("--save-dir", metavar="FOLDER", help="write each image as a PNG of its own")
    add("--npz", metavar="FILE", help="write all images as arr_0, uint8 (N, 32, 32, 3), for ADM's evaluator")
    what = parser.add_mutually_exclusive_group().add_argument
    what("--trajectory", action="store_true", help="a strip from noise to image, Euler's method")
    what("--alignment", action="store_true", help="hidden tokens and the encoder's side by side")
    what("--cknna", action="store_true", help="a table of each layer's likeness to the encoder")
    what("--fd", action="store_true", help="the Fréchet distance to real images in --encoder's features")
    add("--topk", type=int, default=10, help="neighbours for --cknna")
    add("--split", default="val", choices=["val", "train"], help="the images that --fd compares with")
    add("--data", metavar="FOLDER", help="images (default: the training run's)")
    add("--encoder", metavar="NAME", help="a timm model (default: the training run's)")
    add("--grid-size", type=int, default=16, help="the encoder of --fd sees images of that many patches a side")
    add("--encoder-weights", metavar="FILE", help="its weights (default: the training run's, or timm downloads them)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--no-compile", action="store_true", help="no torch.compile on CUDA")
    return parser


def check_options(args):
    """Every mistake that shows before a file is read. Raises ValueError with a sentence."""
    checks = {name: repa_mini.OPTIONS[name][1:] for name in ("seed", "data", "encoder", "encoder_weights", "device")}
    checks |= {name: (repa_mini.COUNT, "a number from 1") for name in ("num_steps", "num_samples", "batch_size")}
    checks["grid_size"] = range(1, 129).__contains__, "a number of patches a side, 1 to 128"
    checks["save_dir"] = lambda path: not Path(path).is_file(), "a folder"
    for name, endings in dict(npz=[".npz"], output=[".csv"] if args.cknna else [".png", ".jpg"]).items():
        fits = lambda path, endings=endings: Path(path).suffix in endings and Path(path).parent.is_dir()  # noqa: E731
        checks[name] = fits, f"a {' or '.join(endings)} in a folder that is there"
    for name, (allowed, sentence) in checks.items():
        if getattr(args, name) is not None and not allowed(getattr(args, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} will not do: it is {sentence}")
    if not (0 <= args.guidance_low <= args.guidance_high <= 1 and math.isfinite(args.cfg_scale)):
        given = f"--cfg-scale {args.cfg_scale} in {args.guidance_low} <= t <= {args.guidance_high}"
        raise UserError(f"{given} will not do: give a number and 0 <= --guidance-low <= --guidance-high <= 1")
    if args.heun and args.mode == "sde" or args.trajectory and (args.heun or args.mode == "sde"):
        raise UserError("--heun is for --mode ode, and --trajectory for neither --heun nor --mode sde: leave one out")


def run(args):
    check_options(args)
    device = repa_mini.pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    state = repa_mini.load_checkpoint(args.ckpt)
    config, folder = state["config"], Path(args.ckpt).parent
    if max(args.classes or [0]) >= state["sit"]["num_classes"]:
        raise UserError(
            f"--classes {max(args.classes)} is beyond the model: give 0 to {state['sit']['num_classes'] - 1}"
        )
    if args.alignment and not state["sit"]["z_dim"]:
        raise UserError(f"{args.ckpt} is a vanilla run, which has no projector to show: try --cknna")
    compiled = device.type == "cuda" and not args.no_compile and not args.cknna
    model = load_model(state, device, args.alignment, compiled)

    if args.trajectory:
        path = Path(args.output or folder / "trajectory.png")
        save_image(trajectory(model, args, config["path_type"], device), path)
    elif args.alignment:
        encoder, _, images, _ = load_targets(args, config, model.grid_size, device)
        if encoder.embed_dim != state["sit"]["z_dim"]:
            raise UserError(f"the run was aligned with {config['encoder']}: its projector does not fit {args.encoder}")
        path, n = Path(args.output or folder / "alignment.png"), min(args.num_samples or 4, len(images))
        some = torch.linspace(0, len(images) - 1, n).long()
        save_image(alignment_picture(model, encoder, images[some].to(device), config["path_type"]), path)
    elif args.cknna:
        encoder, _, images, labels = load_targets(args, config, model.grid_size, device)
        path = Path(args.output or folder / "cknna.csv")
        some = torch.linspace(0, len(images) - 1, min(args.num_samples or 1000, len(images))).long()
        lines = representation_table(model, encoder, images[some], labels[some], config["path_type"], args.topk)
        print("\n".join(lines))
        path.write_text("\n".join(lines) + "\n")
    elif args.fd:
        encoder, images, val_images, _ = load_targets(args, config, args.grid_size, device)
        args.num_samples = args.num_samples or 1000
        real = images if args.split == "train" else val_images
        fake, _ = draw_samples(model, args, config["path_type"], device)
        distance = frechet_distance(pooled_features(encoder, fake, device), pooled_features(encoder, real, device))
        name = args.encoder or config["encoder"]
        print(f"Fréchet distance {distance:.4g}: {len(fake)} samples, {len(real)} {args.split} images, {name}")
        print("compare only equal numbers and encoders; the encoder that REPA was trained towards flatters REPA")
        if name == repa_mini.DEFAULT_ENCODER and config["smoke"]:
            print("the built-in encoder's weights are random, so this number says nothing: give --encoder")
        return 0
    else:
        images, labels = draw_samples(model, args, config["path_type"], device)
        if args.npz:
            np.savez(args.npz, arr_0=images.permute(0, 2, 3, 1).numpy())
        for i, image in enumerate(tqdm(images, "writing") if args.save_dir else []):
            Path(args.save_dir).mkdir(parents=True, exist_ok=True)
            save_image(image / 255, Path(args.save_dir, f"{i:06d}.png"))
        path = Path(args.output or args.npz or args.save_dir or folder / "samples.png")
        if args.output or not (args.npz or args.save_dir):
            order = labels.argsort(stable=True)  # one class a row
            save_image(images[order] / 255, path, nrow=math.ceil(len(images) / len(labels.unique())))
    print(f"wrote {path}")
    return 0


def main(argv=None):
    """Returns the exit code: 0, 2 after a mistake of the user's, or 130 when stopped."""
    try:
        return run(build_parser().parse_args(argv))
    except (UserError, OSError) as error:
        advice = ": make room, or give another folder" if isinstance(error, OSError) else ""
        print(f"sample: {error}{advice}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:  # argparse has printed its sentence, or the help
        return getattr(stop, "code", 130)


if __name__ == "__main__":
    sys.exit(main())
