"""repa_mini: REPA, representation alignment for diffusion transformers, in one file.

REPA (Yu et al., ICLR 2025, arXiv 2410.06940) trains a diffusion transformer, here SiT, to predict
the velocity of a path from data to noise. It adds one term to the loss: an early hidden state of
the transformer, which sees a *noisy* image, is projected by a small MLP and pulled, patch by patch,
towards what a frozen self-supervised encoder says about the *clean* image.

    x_t        = alpha_t x + sigma_t eps        the interpolant; t = 0 is data and t = 1 is noise
    v          = alpha'_t x + sigma'_t eps      its velocity, on the linear path v = eps - x
    z          = encoder(x)                     the target, which the paper calls y*
    z_tilde    = h_phi(h_t)                     the MLP, or projector, of the hidden state h_t
    L_velocity = mean of (v_theta(x_t, t, y) - v)^2
    L_REPA     = - mean over images and patches of cos(z, z_tilde)
    L          = L_velocity + lambda L_REPA

x is a clean image of class y, with 32 x 32 pixels (there is no VAE), and eps is Gaussian noise. In
shapes N counts images, C colours, H and W pixels and T tokens, one for each patch; D is the width
of a token. "Section" means a section of the paper. sample.py shows what a run learned.
"""

import argparse
import contextlib
import copy
import csv
import math
import random
import sys
from collections import OrderedDict, defaultdict
from datetime import datetime
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from timm.layers import GELUTanh, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch.optim import AdamW
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it


class UserError(ValueError):
    """A mistake of the user's, which ends the program with one sentence."""


@contextlib.contextmanager
def as_user_error(sentence):
    """Turn any exception inside this context, mostly a library's, into a sentence for the user."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise UserError(f"{sentence} ({reason[:200]})") from error


# ---- 1. SiT (Ma et al. 2024, arXiv 2401.08740), a vision transformer with DiT's adaLN-Zero blocks.
# The names and shapes of its weights are those of the REPA authors' code.
class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * 128, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):  # (N,) -> (N, D)
        # DiT has these frequencies for t up to 1000. SiT keeps them, though its t is at most 1.
        frequencies = 10000 ** (-torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def modulated_norm(x, shift, scale):  # x (N, T, D); the others (N, D)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):  # (N, T, D) and (N, D) -> (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated_norm(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim, out_features):
        super().__init__()
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):  # -> (N, T, out_features)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """SiT with REPA's projector: x (N, C, H, W), t (N,), y (N,) -> velocity in the shape of x, and
    z_tilde (N, T, z_dim), which is None if z_dim is 0. The projector sees the output of SiT's block
    number encoder_depth, counted from 1 (Section 3.3). y = num_classes is the null label."""

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=3,
        hidden_size=384,
        depth=12,
        num_heads=6,
        num_classes=10,
        encoder_depth=4,
        z_dim=384,
        projector_dim=2048,
    ):
        super().__init__()
        self.patch_size, self.grid_size = patch_size, input_size // patch_size
        self.num_classes, self.encoder_depth = num_classes, encoder_depth
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        # The Sequential only gives the table the authors' name. Its last row is for "no class".
        labels = nn.Embedding(num_classes + 1, hidden_size)
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=labels))
        # The position table (T, D): sines and cosines of a patch's column, then of its row.
        patch = torch.arange(self.grid_size**2)[:, None]  # (T, 1)
        frequencies = 10000 ** (-torch.arange(hidden_size // 4) / (hidden_size // 4))
        column = (patch % self.grid_size) * frequencies  # (T, D / 4)
        row = (patch // self.grid_size) * frequencies
        table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.init_weights()
        # The projector's weights are drawn after all others. So runs of one seed, with and without
        # REPA, start from the same SiT.
        self.projectors = nn.ModuleList()  # a list, as in the authors' code
        if z_dim > 0:
            first = nn.Linear(hidden_size, projector_dim)
            second = nn.Linear(projector_dim, projector_dim)
            third = nn.Linear(projector_dim, z_dim)
            projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
            self.projectors.append(projector.apply(init_linear))

    def init_weights(self):
        self.apply(init_linear)
        # The patch embedding is drawn as a linear layer from C * p * p pixels to D numbers.
        weight = self.x_embedder.proj.weight  # (D, C, p, p)
        nn.init.xavier_uniform_(weight.view(len(weight), -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-Zero: with these weights and all biases 0, shifts, scales, gates and v_theta are 0.
        for module in [*self.blocks, self.final_layer]:
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, tokens):  # (N, T, p * p * C) -> (N, C, H, W)
        g, p = self.grid_size, self.patch_size
        # A patch has a row and a column in the image, and a pixel has i and j in its patch.
        x = tokens.reshape(-1, g, g, p, p, tokens.shape[2] // p**2)  # (N, row, column, i, j, C)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, row, i, column, j)
        return x.reshape(len(x), -1, g * p, g * p)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        z_tilde = None
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if i == self.encoder_depth and self.projectors:
                z_tilde = self.projectors[0](x)  # x is h_t
        return self.unpatchify(self.final_layer(x, c)), z_tilde


# Ti is ours. The REPA authors chose the encoder_depth of B, L and XL; for S and Ti it is depth / 3.
SIT_SIZES = {
    "Ti": dict(hidden_size=128, depth=6, num_heads=4, encoder_depth=2, projector_dim=512),
    "S": dict(hidden_size=384, depth=12, num_heads=6, encoder_depth=4),
    "B": dict(hidden_size=768, depth=12, num_heads=12, encoder_depth=4),
    "L": dict(hidden_size=1024, depth=24, num_heads=16, encoder_depth=8),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16, encoder_depth=8),
}
SIT_MODELS = {}  # "SiT-S/2", ... -> keyword arguments of SiT
for size_name, size in SIT_SIZES.items():
    for patch_size in (2, 4, 8):
        SIT_MODELS[f"SiT-{size_name}/{patch_size}"] = dict(size, patch_size=patch_size)


# ---- 2. Targets: what a frozen encoder says about the clean image, patch by patch (Section 3.3)
DINOV2 = "vit_small_patch14_dinov2.lvd142m"


class TargetEncoder(nn.Module):
    """A frozen timm encoder: images (N, 3, H, W) in [-1, 1] -> z (N, grid_size**2, embed_dim), the
    patch tokens of a ViT or the feature map of a CNN at stride 16. `weights` is "download",
    "random" or a file (.safetensors, .pth). Raises UserError for an encoder that does not fit."""

    def __init__(self, name=DINOV2, grid_size=16, weights="download"):
        super().__init__()
        self.grid_size = grid_size
        advice = "try another --encoder, a file for --encoder-weights, or --smoke"
        with as_user_error(f"encoder {name} with weights {weights} does not work; {advice}"):
            torch.manual_seed(0)  # random weights are the same in every run
            self.model = timm.create_model(name, pretrained=(weights == "download"))
            if weights not in ("download", "random"):
                state = timm.models.load_state_dict(weights)  # reads the file
                state.pop("mask_token", None)  # in DINOv2's own file
                self.model.load_state_dict(state)
            config = self.model.pretrained_cfg
            self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
            self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))
            # The side of its input is chosen so that the encoder has as many tokens as SiT.
            self.is_vit = hasattr(self.model, "num_prefix_tokens")  # in timm, only ViTs have it
            if self.is_vit:
                self.side = grid_size * self.model.patch_embed.patch_size[0]
                self.model.set_input_size((self.side, self.side))  # resamples pos_embed
            else:
                self.side = grid_size * 16  # for the feature map at stride 16
            self.eval().requires_grad_(False)
            z = self(torch.zeros(1, 3, 32, 32))  # a trial run
        if z.shape[1] != grid_size**2:
            raise UserError(f"encoder {name} gives {z.shape[1]} tokens, not {grid_size**2}")
        self.embed_dim = z.shape[2]

    @torch.no_grad()
    def forward(self, images):
        x = ((images + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, self.side, mode="bicubic")
        if self.is_vit:
            tokens = self.model.forward_features(x)
            return tokens[:, self.model.num_prefix_tokens :]  # only patch tokens
        # A CNN gives a feature map (N, channels, h, w) for each stage. The one at stride 16 is the
        # last that is not smaller than SiT's grid.
        maps = self.model.forward_intermediates(x, intermediates_only=True)
        large = [m for m in maps if m.shape[-1] >= self.grid_size]
        return large[-1].flatten(2).transpose(1, 2)


# ---- 3. Losses
def interpolant(t, path_type="linear"):
    """alpha, sigma and their derivatives by t, each in the shape of t (Section 2)."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    assert path_type == "cosine"
    alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha


def repa_loss(z_tilde, z):
    """L_REPA for z_tilde and z, both (N, T, z_dim), in float32, since norms could overflow."""
    return -F.cosine_similarity(z_tilde.float(), z.float(), dim=-1).mean()


def training_losses(model, x, noise, t, y, z=None, path_type="linear"):
    """L_velocity and L_REPA, two scalars (Sections 2 and 3.3); without z the second is None.
    x: clean images (N, C, H, W) in [-1, 1]; noise: like x; t: (N,) in [0, 1]; y: labels (N,), some
    of which are the null label; z: targets (N, T, z_dim)."""
    alpha, sigma, d_alpha, d_sigma = interpolant(t.view(-1, 1, 1, 1), path_type)
    x_t = alpha * x + sigma * noise
    v = d_alpha * x + d_sigma * noise
    v_theta, z_tilde = model(x_t, t, y)
    velocity_loss = F.mse_loss(v_theta.float(), v)
    if z is None:
        return velocity_loss, None
    return velocity_loss, repa_loss(z_tilde, z)


# ---- 4. Sampler: from noise at t = 1 to an image at t = 0. The SDE is in sample.py.
def guided_velocity(model, x, t, y, cfg_scale=1.0):
    """Classifier-free guidance, v_null + cfg_scale (v_y - v_null) (Ho & Salimans 2022).
    x: (N, C, H, W); t: one number for all images; y: (N,). A scale of 1 means no guidance."""
    t = torch.full((len(x),), t, device=x.device)
    v_y = model(x, t, y)[0].float()
    if cfg_scale == 1:
        return v_y
    v_null = model(x, t, torch.full_like(y, model.num_classes))[0].float()
    return v_null + cfg_scale * (v_y - v_null)


@torch.no_grad()
def sample_ode(
    model, noise, y, num_steps=50, heun=False, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0
):
    """Integrate the ODE dx/dt = v_theta(x, t, y) of Section 2 from t = 1 to 0, by Euler's or Heun's
    method. noise: x at t = 1, (N, C, H, W); y: (N,). Returns x at t = 0. Guidance acts in the steps
    that start at guidance_low <= t <= guidance_high (Kynkäänniemi et al. 2024)."""
    x = noise
    for k in range(num_steps, 0, -1):
        t, t_next = k / num_steps, (k - 1) / num_steps
        scale = cfg_scale if guidance_low <= t <= guidance_high else 1.0
        v = guided_velocity(model, x, t, y, scale)
        if heun and t_next > 0:  # the authors end with Euler's step
            v_next = guided_velocity(model, x + (t_next - t) * v, t_next, y, scale)
            v = (v + v_next) / 2
        x = x + (t_next - t) * v
    return x


# ---- 5. Data: uint8 tensors of images (N, 3, 32, 32)
def to_unit(pixels):  # uint8 -> float in [-1, 1]
    return pixels.float() / 127.5 - 1


def to_pixels(x):  # float in [-1, 1] -> uint8, for sample.py
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_shapes(n, seed):
    """n images (n, 3, 32, 32) uint8 and labels (n,) of ten classes, each a polygon with its hue."""
    rng = random.Random(seed)
    images, labels = [], torch.arange(n) % 10
    for label in labels.tolist():
        image = Image.new("RGB", (128, 128), f"hsv(0, 0%, {rng.uniform(0, 40)}%)")
        circle = rng.uniform(48, 80), rng.uniform(48, 80), rng.uniform(34, 46)
        colour = f"hsv({36 * label}, {rng.uniform(80, 100)}%, {rng.uniform(70, 100)}%)"
        ImageDraw.Draw(image).regular_polygon(circle, 3 + label, fill=colour)
        images.append(pil_to_tensor(image.reduce(4)))
    return torch.stack(images), labels


def read_image(path):
    """The middle square of an image file, (3, 32, 32) uint8, on white where it is transparent."""
    with as_user_error(f"cannot read image {path}; repair or remove it"):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return pil_to_tensor(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC))


def load_data(name):
    """Training images (N, 3, 32, 32) uint8 and labels (N,), held-out images and labels, and the
    names of the classes. `name` is cifar10, shapes, or a folder with train/CLASS/IMAGE and
    test/CLASS/IMAGE. Instead of test there may be val. Raises UserError or OSError."""
    if name == "shapes":
        classes = [f"{corners} corners" for corners in range(3, 13)]
        return *draw_shapes(4000, seed=0), *draw_shapes(200, seed=1), classes
    if name == "cifar10":
        with as_user_error("cannot download CIFAR-10; try --data FOLDER or --smoke"):
            train = CIFAR10("data", train=True, transform=pil_to_tensor, download=True)
            test = CIFAR10("data", train=False, transform=pil_to_tensor)
    else:
        held_out = "test" if Path(name, "test").is_dir() else "val"
        train = ImageFolder(Path(name, "train"), loader=read_image)
        test = ImageFolder(Path(name, held_out), loader=read_image)
    if train.classes != test.classes:
        raise UserError(f"{name}: {train.classes} to train on, but {test.classes} held out")
    data = []
    for dataset in (train, test):
        # dataset[i] is an image, as a uint8 tensor, and its label.
        pairs = [dataset[i] for i in tqdm(range(len(dataset)), "reading images", disable=None)]
        images, labels = zip(*pairs)
        data += [torch.stack(images), torch.tensor(labels)]
    return *data, train.classes


# ---- 6. Options
# What --smoke stands for. test_vit is a tiny ViT that timm has for tests.
SMOKE = dict(data="shapes", encoder="test_vit", encoder_weights="random")
SMOKE.update(model="SiT-Ti/4", batch_size=16, learning_rate=2e-3)
SMOKE.update(max_train_steps=200, eval_every=100, device="cpu")


def load_checkpoint(path):
    """The checkpoint of a run, from its folder or its checkpoint.pt. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    keys = "model ema optimizer scaler step metrics config sit classes".split()
    with as_user_error(f"cannot load {path}, or it is of another version"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = {key: saved[key] for key in keys}
        checkpoint["config"]["output_dir"] = str(path.parent)  # the run may have moved
    return checkpoint


def build_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a minute on a CPU")
    add("--data", default="cifar10", help="cifar10, shapes, or a folder")
    add("--model", default="SiT-S/2", choices=SIT_MODELS)
    add("--encoder", default=DINOV2, help="a timm ViT or CNN")
    add("--encoder-weights", default="download", help="download, random, or a file")
    add("--encoder-depth", type=int, help="the block of SiT to align")
    add("--proj-coeff", type=float, default=0.5, help="lambda; 0 is a vanilla SiT")
    add("--repa-stop-step", type=int, default=10**9, help="no REPA loss from then on")
    yes_no = argparse.BooleanOptionalAction  # --no-compile, too, for --resume
    add("--cache-targets", action=yes_no, help="compute them first: 20 GB for S/2")
    add("--path-type", default="linear", choices=["linear", "cosine"])
    add("--cfg-prob", type=float, default=0.1, help="share of labels dropped")
    add("--batch-size", type=int, default=256, help="images in a step")
    add("--learning-rate", type=float, default=1e-4, help="AdamW's, constant")
    add("--max-train-steps", type=int, default=100_000, help="length of the run")
    add("--eval-every", type=int, default=1000, help="steps between evaluations")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--compile", action=yes_no, help="faster on a GPU")
    place = parser.add_mutually_exclusive_group()
    folder = f"runs/{datetime.now():%Y%m%d-%H%M%S-%f}"
    place.add_argument("--output-dir", default=folder, help="default: a new one")
    place.add_argument("--resume", metavar="FOLDER", help="continue this run")
    return parser


def parse_options(argv):
    """The options, and the checkpoint of --resume or None. What is typed wins over the checkpoint,
    the checkpoint over --smoke, and --smoke over the defaults."""
    parser, checkpoint = build_parser(), None
    args = parser.parse_args(argv)  # to see --smoke and --resume
    if args.smoke:
        parser.set_defaults(**SMOKE)
    if args.resume is not None:
        checkpoint = load_checkpoint(args.resume)
        parser.set_defaults(**checkpoint["config"])  # a value for every option
    args = parser.parse_args(argv)  # what is typed replaces these defaults
    base = SIT_MODELS[args.model]
    if args.encoder_depth is None:
        args.encoder_depth = base["encoder_depth"]
    if not 1 <= args.encoder_depth <= base["depth"]:
        parser.error(f"--encoder-depth is not one of the blocks 1 to {base['depth']}")
    if min(args.batch_size, args.max_train_steps, args.eval_every) < 1:
        parser.error("a number of images or steps is below 1")
    if min(args.learning_rate, args.proj_coeff, args.cfg_prob) < 0:
        parser.error("--learning-rate, --proj-coeff or --cfg-prob is below 0")
    with as_user_error(f"device {args.device} does not work; try --device cpu"):
        torch.ones(1, device=args.device).item()
    if checkpoint is None and Path(args.output_dir, "checkpoint.pt").exists():
        parser.error(f"{args.output_dir} holds a run; --resume continues it")
    if checkpoint is not None and checkpoint["step"] >= args.max_train_steps:
        parser.exit(message="the run is finished; --max-train-steps can extend it\n")
    return args, checkpoint


# ---- 7. Training
def seed_for(*use):
    """A seed for a use such as ("batch", seed, step). Different uses get unrelated seeds."""
    return random.Random(str(use)).getrandbits(63)


def draw_batch(images, labels, null_label, step, args):
    """What is random in a step depends only on the seed and the step, with or without REPA. Returns
    images x (N, 3, 32, 32) in [-1, 1], noise like x, times t (N,) in [0, 1], labels y (N,), some of
    them replaced by the null label, and index (N,), the numbers of the images."""
    n, device = args.batch_size, images.device
    g = torch.Generator(device).manual_seed(seed_for("batch", args.seed, step))
    index = torch.randint(len(images), (n,), generator=g, device=device)  # with replacement
    x = to_unit(images[index])
    noise = torch.randn(x.shape, generator=g, device=device)
    t = torch.rand(n, generator=g, device=device)
    is_dropped = torch.rand(n, generator=g, device=device) < args.cfg_prob
    y = torch.where(is_dropped, null_label, labels[index])
    return x, noise, t, y, index


@torch.no_grad()
def update_ema(ema, model, step):
    """ema <- decay * ema + (1 - decay) * model. The paper's decay is 0.9999. Ours starts at 0.1 and
    rises to 0.9999 in 90,000 steps, so that a short run does not average over its first weights."""
    decay = min(0.9999, (1 + step) / (10 + step))
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, 1 - decay)


@torch.no_grad()
def evaluate(model, encoder, images, labels, path_type):
    """The velocity loss and, with an encoder, the mean cosine of the patches, on at most 1,000 of
    the images, always with the same noise and times."""
    every = math.ceil(len(images) / 1000)
    images, labels = images[::every], labels[::every]
    g = torch.Generator().manual_seed(seed_for("evaluation"))
    noise = torch.randn(images.shape, generator=g).to(images.device)
    t = torch.rand(len(images), generator=g).to(images.device)
    means = defaultdict(float)
    for part in torch.arange(len(images)).split(100):
        x, y = to_unit(images[part]), labels[part]
        z = None if encoder is None else encoder(x)
        l_velocity, l_repa = training_losses(model, x, noise[part], t[part], y, z, path_type)
        means["val_velocity_loss"] += l_velocity.item() * len(x) / len(images)
        if z is not None:
            means["val_alignment"] += -l_repa.item() * len(x) / len(images)
    return means


def draw_grid(model, path, device):
    """Write samples without guidance, one class a row, always from the same noise."""
    y = torch.arange(min(10, model.num_classes)).repeat_interleave(10)
    g = torch.Generator().manual_seed(seed_for("grid"))
    noise = torch.randn(len(y), 3, 32, 32, generator=g).to(device)
    x = sample_ode(model, noise, y.to(device))
    save_image((x + 1) / 2, path, nrow=10)


def save(folder, checkpoint):
    """Write checkpoint.pt and metrics.csv. The rename keeps checkpoint.pt whole at any time."""
    part = folder / "checkpoint.part"
    with as_user_error(f"cannot write {part}"):
        torch.save(checkpoint, part)
    part.replace(folder / "checkpoint.pt")
    columns = "step velocity_loss repa_loss val_velocity_loss val_alignment".split()
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(checkpoint["metrics"])


def train(args, checkpoint=None):
    """Train as the options say, from the checkpoint on if there is one."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    encoder, z_dim = None, 0
    if args.proj_coeff > 0:
        grid_size = 32 // SIT_MODELS[args.model]["patch_size"]
        encoder = TargetEncoder(args.encoder, grid_size, args.encoder_weights).to(device)
        z_dim = encoder.embed_dim
    *tensors, classes = load_data(args.data)
    images, labels, val_images, val_labels = [tensor.to(device) for tensor in tensors]
    # Instead of random flips, mirror images are added, so that their targets can be cached, too.
    images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)
    sit = dict(SIT_MODELS[args.model], encoder_depth=args.encoder_depth)
    sit.update(num_classes=len(classes), z_dim=z_dim)
    torch.manual_seed(seed_for("weights", args.seed))
    model = SiT(**sit).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = AdamW(model.parameters(), args.learning_rate, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start, metrics = 0, []
    if checkpoint is not None:
        start, metrics = checkpoint["step"], checkpoint["metrics"]
        with as_user_error("weights do not fit the model, data or encoder"):
            model.load_state_dict(checkpoint["model"])
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["lr"] = args.learning_rate
        if checkpoint["scaler"]:  # the run was in float16
            scaler.load_state_dict(checkpoint["scaler"])
    if args.compile:
        model.compile()  # in place: all names stay
    cached_targets = None
    if args.cache_targets and encoder is not None:
        shape = len(images), grid_size**2, z_dim
        cached_targets = torch.empty(shape, dtype=torch.float16, device=device)
        for i in tqdm(range(0, len(images), 100), "computing targets", disable=None):
            with autocast:
                cached_targets[i : i + 100] = encoder(to_unit(images[i : i + 100]))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"training in {folder}")
    history = defaultdict(list)  # the losses of the steps since the last evaluation
    last = args.max_train_steps
    for step in tqdm(range(start, last), "training", initial=start, total=last, disable=None):
        # 1. A batch: images, noise, times and labels.
        x, noise, t, y, index = draw_batch(images, labels, len(classes), step, args)
        with autocast:
            # 2. The targets: what the encoder says about the clean images.
            z = None
            if encoder is not None and step < args.repa_stop_step:
                z = encoder(x) if cached_targets is None else cached_targets[index]
            # 3. The loss: L = L_velocity + lambda L_REPA.
            l_velocity, l_repa = training_losses(model, x, noise, t, y, z, args.path_type)
            loss = l_velocity
            history["velocity_loss"].append(l_velocity.detach())
            if z is not None:
                loss = l_velocity + args.proj_coeff * l_repa
                history["repa_loss"].append(l_repa.detach())
        # 4. The update of the weights and of their moving average.
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # the scaler does nothing unless dtype is float16
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        update_ema(ema, model, step)
        # 5. Now and then: evaluate, save, draw. Reading a loss makes the CPU wait for the GPU.
        done = step + 1
        if done % args.eval_every == 0 or done == last:
            row = {name: torch.stack(losses).mean().item() for name, losses in history.items()}
            history.clear()
            row.update(evaluate(ema, encoder, val_images, val_labels, args.path_type))
            # This is checked before the save, so that the last checkpoint stays usable.
            if not math.isfinite(row["val_velocity_loss"]):
                advice = "--resume the run, or start again, with a smaller --learning-rate"
                raise UserError(f"the held-out loss is not finite; {advice}")
            metrics.append({"step": done, **row})
            tqdm.write(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
            state = dict(model=model.state_dict(), ema=ema.state_dict())
            state.update(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            state.update(step=done, metrics=metrics, config=vars(args), sit=sit, classes=classes)
            try:
                save(folder, state)
                draw_grid(ema, folder / f"samples_{done:07d}.png", device)
            except (UserError, OSError) as error:
                tqdm.write(f"cannot save or draw: {error}")


def main(argv=None):
    """Run the command line. A mistake of the user's ends the program with one sentence."""
    try:
        train(*parse_options(argv))
    except torch.OutOfMemoryError:
        sys.exit("error: memory is full; try a smaller --batch-size or --no-cache-targets")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
