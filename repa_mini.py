"""repa_mini: REPA, representation alignment for diffusion transformers, in one file.

REPA (Yu et al., ICLR 2025, arXiv 2410.06940) trains a diffusion transformer, here SiT, to predict
the velocity of a path from data to noise. It adds one term to the loss: an early hidden state of
the transformer, which sees a *noisy* image, is projected by a small MLP and pulled, patch by patch,
towards what a frozen self-supervised encoder says about the *clean* image.

    x_t        = alpha_t x + sigma_t eps        the interpolant; t = 0 is data and t = 1 is noise
    v          = alpha'_t x + sigma'_t eps      its velocity, on the linear path v = eps - x
    L_velocity = mean of (v_theta(x_t, t, y) - v)^2
    L_REPA     = - mean over images and patches of cos(z, z_tilde)
    L          = L_velocity + lambda L_REPA

    x, y, eps  a clean image, its class, and Gaussian noise
    v_theta    the transformer's prediction of v
    h_t        the output of an early block of the transformer
    z_tilde    h_phi(h_t), where the projector h_phi is the small MLP
    z          the target, encoder(x), which the paper calls y*

There is no VAE: images have 32 x 32 pixels. In shapes N counts images, C colours, H and W pixels
and T tokens, one for each patch; D is the width of a token. "Section" means a section of the paper.
sample.py shows what a run learned.
"""

import argparse
import contextlib
import copy
import csv
import functools
import math
import random
import sys
from collections import defaultdict
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

progress = functools.partial(tqdm, disable=None)  # no bar unless stderr is a terminal
torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it


class UserError(ValueError):
    """A mistake of the user's, which ends the program with one sentence."""


@contextlib.contextmanager
def as_user_error(sentence):
    """Any exception inside this context becomes a UserError of one sentence."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        raise UserError(f"{sentence} ({reason[:200]})") from error


# ---- 1. SiT (Ma et al. 2024, arXiv 2401.08740), a vision transformer with DiT's adaLN-Zero blocks.
# The names and shapes of its weights are those of the REPA authors' code.
def position_table(dim, g):
    """Embeddings (g * g, dim) of the patches of a g x g grid, row by row. As in the authors' code,
    dim / 2 numbers for the column of a patch come first, and dim / 2 for its row follow."""
    frequencies = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    patch = torch.arange(g * g)
    parts = []
    for position in (patch % g, patch // g):  # the columns of all patches, then their rows
        angles = position[:, None] * frequencies  # (g * g, dim / 4)
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):  # (N,) -> (N, D)
        # DiT has these frequencies for t up to 1000. SiT keeps them, but does not multiply its t,
        # which goes up to 1, by 1000. So most of the angles are small.
        frequencies = 10000 ** (-torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * frequencies  # (N, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, dim):
        super().__init__()
        # The last row is for the null label, which means "no class".
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):  # (N,) -> (N, D)
        return self.embedding_table(y)


def modulated_norm(x, shift, scale):  # x (N, T, D); the others (N, D)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):  # tokens x (N, T, D), condition c (N, D) -> (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated_norm(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim, out_features):
        super().__init__()
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):  # tokens x (N, T, D), condition c (N, D) -> (N, T, out_features)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """SiT with REPA's projector: x (N, C, H, W), t (N,), y (N,) -> velocity in the shape of x, and
    z_tilde (N, T, z_dim), which is None if z_dim is 0. The projector sees the output of block
    number `encoder_depth` (Section 3.3). This counts SiT's own blocks, from 1 on, not those of the
    target encoder; the name is the authors'. y = num_classes is the null label."""

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
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        table = position_table(hidden_size, self.grid_size)
        # (1, T, D); a parameter that is not trained, as in the authors' code
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.init_weights()
        # The projector's weights are drawn after all others. So runs of one seed, with and without
        # REPA, start from the same SiT.
        self.projectors = nn.ModuleList()  # a list, as in the authors' code, of one or none
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
        nn.init.xavier_uniform_(weight.flatten(1))  # a view, so that weight itself is changed
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]:
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-Zero: with weights of 0, and biases of 0 from init_linear, all shifts, scales and
        # gates are 0 at first.
        for module in [*self.blocks, self.final_layer]:
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)  # so the velocity is 0 at first, too

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
                z_tilde = self.projectors[0](x)  # here x is the hidden state h_t
        return self.unpatchify(self.final_layer(x, c)), z_tilde


# S to XL are the sizes of SiT, and Ti is ours. The REPA authors chose the encoder_depth of B, L and
# XL. For S and Ti we take a third of the depth. Only Ti has a smaller projector.
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
    """A frozen timm encoder: images (N, 3, H, W) in [-1, 1] -> z (N, grid_size**2, embed_dim).
    z are the patch tokens of a ViT, after its final norm if it has one, or the feature map of a CNN
    at stride 16. `weights` is "download", "random", or a .safetensors or .pth file. Raises
    UserError for an encoder that cannot be built or does not give one token for each patch."""

    def __init__(self, name=DINOV2, grid_size=16, weights="download"):
        super().__init__()
        advice = "try another --encoder, a file for --encoder-weights, or --smoke"
        refusal = f"encoder {name} with weights {weights} does not work; {advice}"
        with as_user_error(refusal):
            with torch.random.fork_rng():  # leaves torch's random numbers as they were
                torch.manual_seed(0)  # random weights are the same in every run
                self.model = timm.create_model(name, pretrained=(weights == "download"))
            if weights not in ("download", "random"):
                state = timm.models.load_state_dict(weights)  # reads the file
                # The file of DINOv2's authors also has a mask_token, for training. Any other
                # difference from timm's model is refused by load_state_dict.
                state.pop("mask_token", None)
                self.model.load_state_dict(state)
            # The pixels that the encoder was trained on were normalised with these numbers.
            for key in ("mean", "std"):
                value = torch.tensor(self.model.pretrained_cfg[key]).view(3, 1, 1)
                self.register_buffer(key, value, persistent=False)
            # Only a ViT has class and register tokens, whose number timm calls num_prefix_tokens.
            # All other encoders are treated as CNNs.
            self.is_vit = hasattr(self.model, "num_prefix_tokens")
            # Images are resized, so that the encoder has as many tokens as SiT.
            self.grid_size = grid_size
            if self.is_vit:
                side = grid_size * self.model.patch_embed.patch_size[0]  # 16 * 14 for DINOv2
                self.model.set_input_size((side, side))  # resamples the position embeddings
            else:
                side = grid_size * 16  # for the feature map at stride 16
            self.size = (side, side)
            self.eval().requires_grad_(False)
            z = self(torch.zeros(1, 3, 32, 32))  # a trial run, to see the shape
            if z.shape[1] != grid_size**2:
                raise UserError(f"encoder {name} gives {z.shape[1]} tokens, not {grid_size**2}")
        self.embed_dim = z.shape[2]

    @torch.no_grad()
    def forward(self, images):
        x = ((images + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, self.size, mode="bicubic")  # after normalising, like the authors
        if self.is_vit:
            tokens = self.model.forward_features(x)  # after a final norm
            return tokens[:, self.model.num_prefix_tokens :]  # without class and register tokens
        # A CNN has a feature map (N, channels, h, w) for each stage. We take the last one that has
        # the size of SiT's grid.
        maps = self.model.forward_intermediates(x, intermediates_only=True)
        fitting = [m for m in maps if m.shape[-1] == self.grid_size]
        if not fitting:
            raise UserError("this encoder has no feature map of the size of SiT's grid")
        return fitting[-1].flatten(2).transpose(1, 2)


# ---- 3. Losses
def interpolant(t, path_type="linear"):
    """alpha, sigma and their derivatives by t, each in the shape of t (Section 2)."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    assert path_type == "cosine"
    alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha


def repa_loss(z_tilde, z):
    """L_REPA: minus the mean cosine of z_tilde and z, both (N, T, z_dim) (Section 3.3).
    It is computed in float32, since the squares of a z_tilde in float16 can overflow."""
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


# ---- 4. Sampler: from noise at t = 1 to an image at t = 0
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
    method. (The paper's samples are those of an SDE, which is in sample.py.)
    noise: x at t = 1, (N, C, H, W); y: (N,). Returns x at t = 0. Guidance acts in the steps that
    start at guidance_low <= t <= guidance_high (Kynkäänniemi et al. 2024)."""
    x = noise
    for k in range(num_steps, 0, -1):
        t, t_next = k / num_steps, (k - 1) / num_steps
        scale = cfg_scale if guidance_low <= t <= guidance_high else 1.0
        v = guided_velocity(model, x, t, y, scale)
        # Like the authors, we take the last step by Euler's method.
        if heun and t_next > 0:
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
    """n images (n, 3, 32, 32) uint8 and labels (n,) of ten classes: polygons with 3 to 12 corners,
    each class in a hue of its own, on black to grey."""
    rng = random.Random(seed)
    images, labels = [], torch.arange(n) % 10
    for label in labels.tolist():
        image = Image.new("RGB", (128, 128), f"hsv(0, 0%, {rng.uniform(0, 40)}%)")
        circle = rng.uniform(48, 80), rng.uniform(48, 80), rng.uniform(34, 46)  # x, y, radius
        colour = f"hsv({36 * label}, {rng.uniform(80, 100)}%, {rng.uniform(70, 100)}%)"
        ImageDraw.Draw(image).regular_polygon(circle, 3 + label, fill=colour)
        images.append(pil_to_tensor(image.reduce(4)))  # to 32 x 32 pixels
    return torch.stack(images), labels


def read_image(path):
    """The middle square of an image file, (3, 32, 32) uint8, on white where it is transparent."""
    with as_user_error(f"cannot read image {path}; repair or remove it"):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return pil_to_tensor(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC))


def load_data(name):
    """Training images (N, 3, 32, 32) uint8 and labels (N,), held-out images and labels, and the
    names of the classes. `name` is cifar10, shapes, or a folder with train/CLASS/IMAGE and
    test/CLASS/IMAGE. Instead of test there may be val. Raises UserError or OSError."""
    if name == "shapes":
        images, labels = draw_shapes(4000, seed=0)
        val_images, val_labels = draw_shapes(200, seed=1)
        classes = [f"{corners} corners" for corners in range(3, 13)]
        return images, labels, val_images, val_labels, classes
    if name == "cifar10":
        with as_user_error("cannot download CIFAR-10; try --data FOLDER or --smoke"):
            train = CIFAR10("data", train=True, transform=pil_to_tensor, download=True)
            test = CIFAR10("data", train=False, transform=pil_to_tensor)
    else:
        folder = Path(name)
        held_out = "test" if (folder / "test").is_dir() else "val"
        train = ImageFolder(folder / "train", loader=read_image)
        test = ImageFolder(folder / held_out, loader=read_image)
        for dataset in (train, test):
            files = [path for path in Path(dataset.root).rglob("*") if path.is_file()]
            skipped = len(files) - len(dataset)  # files that are not images of a class
            if skipped > 0:
                print(f"{dataset.root}: {skipped} of {len(files)} files are skipped")
    if train.classes != test.classes:
        both = f"{train.classes} to train on, but {test.classes} held out"
        raise UserError(f"the classes in {name} differ: {both}")
    data = []
    for dataset in (train, test):
        # dataset[i] is an image, as a uint8 tensor, and its label.
        pairs = [dataset[i] for i in progress(range(len(dataset)), "reading images")]
        images, labels = zip(*pairs)
        data += [torch.stack(images), torch.tensor(labels)]
    return *data, train.classes


# ---- 6. Options
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What --smoke stands for. test_vit is a tiny ViT that timm has for tests.
SMOKE = dict(data="shapes", encoder="test_vit", encoder_weights="random")
SMOKE.update(model="SiT-Ti/4", batch_size=16, learning_rate=2e-3)
SMOKE.update(max_train_steps=200, eval_every=100, device="cpu")


def load_checkpoint(path):
    """The checkpoint of a run, on the CPU. The path is its folder or its checkpoint.pt. Raises
    UserError."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    # States of model, EMA, optimizer and scaler, the step, the rows of metrics.csv, the options,
    # the arguments of SiT, and the names of the classes:
    keys = "model ema optimizer scaler step rows config sit classes".split()
    with as_user_error(f"cannot load {path} as a checkpoint of this version of repa_mini.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        return {key: checkpoint[key] for key in keys}  # a missing key is an error, too


def build_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a minute on a CPU, no downloads")
    add("--data", default="cifar10", help="cifar10, shapes (built in), or a folder")
    add("--model", default="SiT-S/2", choices=SIT_MODELS)
    add("--encoder", default=DINOV2, help="a timm ViT or CNN")
    add("--encoder-weights", default="download", help="download, random, or a file")
    add("--encoder-depth", type=int, help="block of SiT to align (default: the model's)")
    add("--proj-coeff", type=float, default=0.5, help="lambda; 0 is a vanilla SiT")
    add("--repa-stop-step", type=int, default=10**9, help="no REPA loss from then on")
    yes_or_no = argparse.BooleanOptionalAction  # gives --compile and --no-compile
    add("--cache-targets", action=yes_or_no, help="compute all targets in advance")
    add("--path-type", default="linear", choices=["linear", "cosine"])
    add("--cfg-prob", type=float, default=0.1, help="share of labels dropped")
    add("--batch-size", type=int, default=256, help="images in a step")
    add("--learning-rate", type=float, default=1e-4, help="AdamW's, constant")
    add("--max-train-steps", type=int, default=100_000, help="length of the run")
    add("--eval-every", type=int, default=1000, help="steps from save to save")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--device", default=DEFAULT_DEVICE, help="cuda, cuda:1, mps, cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--compile", action=yes_or_no, help="torch.compile; faster on a GPU")
    place = parser.add_mutually_exclusive_group()
    folder = f"runs/{datetime.now():%Y%m%d-%H%M%S-%f}"
    place.add_argument("--output-dir", default=folder, help="default: a new one in runs/")
    place.add_argument("--resume", metavar="FOLDER", help="continue this run")
    return parser


def parse_options(argv):
    """The options, and the checkpoint of --resume or None. What is typed wins over the checkpoint,
    the checkpoint over --smoke, and --smoke over the defaults."""
    parser, checkpoint = build_parser(), None
    # 1. Parse once, to see whether --smoke and --resume are there.
    args = parser.parse_args(argv)
    if "" in vars(args).values():  # such as --data "$DATA" if that variable is not set
        parser.error("an option is empty")
    # 2. Replace the defaults. The checkpoint has a value for every option.
    if args.smoke:
        parser.set_defaults(**SMOKE)
    if args.resume is not None:
        checkpoint = load_checkpoint(args.resume)
        parser.set_defaults(**checkpoint["config"])
        folder = Path(args.resume)
        if folder.is_file():
            folder = folder.parent
        parser.set_defaults(output_dir=str(folder))  # the run may have been moved
    # 3. Parse again, so that what is typed replaces these defaults, and check the values.
    args = parser.parse_args(argv)
    base = SIT_MODELS[args.model]
    if args.encoder_depth is None:
        args.encoder_depth = base["encoder_depth"]
    if not 1 <= args.encoder_depth <= base["depth"]:
        parser.error(f"--encoder-depth is not one of the blocks 1 to {base['depth']}")
    if min(args.batch_size, args.max_train_steps, args.eval_every) < 1:
        parser.error("a number of images or steps is below 1")
    if not (args.learning_rate >= 0 and args.proj_coeff >= 0 and 0 <= args.cfg_prob <= 1):
        parser.error("--learning-rate, --proj-coeff or --cfg-prob is out of range")
    with as_user_error(f"device {args.device} does not work here; try --device cpu"):
        torch.ones(1, device=args.device).item()
    if checkpoint is None and Path(args.output_dir, "checkpoint.pt").exists():
        parser.error(f"{args.output_dir} holds a run; --resume {args.output_dir} continues it")
    if checkpoint is not None and checkpoint["step"] >= args.max_train_steps:
        finished = f"the run is finished, at step {checkpoint['step']}"
        parser.exit(message=f"{finished}; a larger --max-train-steps continues it\n")
    return args, checkpoint


# ---- 7. Training
def seed_for(*use):
    """A seed for a use such as ("batch", seed, step). Different uses get unrelated seeds. Python's
    generator, if its seed is a text, gives the same number in every process."""
    return random.Random(repr(use)).getrandbits(63)


def draw_batch(images, labels, null_label, step, args):
    """Draw all that is random in a training step, with a generator that only depends on the seed
    and the step. So runs of one seed on one kind of device see the same batches, with or without
    REPA, resumed or not. Returns images x (N, 3, 32, 32) in [-1, 1], drawn with replacement; noise
    like x; times t (N,) in [0, 1]; labels y (N,), some of which are replaced by the null label; and
    index (N,), the numbers of the images."""
    n, device = args.batch_size, images.device
    g = torch.Generator(device).manual_seed(seed_for("batch", args.seed, step))
    index = torch.randint(len(images), (n,), generator=g, device=device)
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
def compute_targets(encoder, images):
    """The targets (N, T, z_dim) of uint8 images, in float16, on the images' device. They take 20 GB
    for CIFAR-10 with mirror images, SiT-S/2 and DINOv2-S."""
    shape = len(images), encoder.grid_size**2, encoder.embed_dim
    targets = torch.empty(shape, dtype=torch.float16, device=images.device)
    for i in progress(range(0, len(images), 100), "computing targets"):
        targets[i : i + 100] = encoder(to_unit(images[i : i + 100]))
    return targets


@torch.no_grad()
def evaluate(model, encoder, images, labels, path_type):
    """The velocity loss and, with an encoder, the mean cosine of the patches, on at most 1,000 of
    the images, always with the same noise and times."""
    every = math.ceil(len(images) / 1000)
    images, labels = images[::every], labels[::every]
    g = torch.Generator().manual_seed(seed_for("evaluation"))  # on the CPU: equal for all devices
    noise = torch.randn(images.shape, generator=g).to(images.device)
    t = torch.rand(len(images), generator=g).to(images.device)
    means = defaultdict(float)
    for i in range(0, len(images), 100):
        part = slice(i, i + 100)
        x, y = to_unit(images[part]), labels[part]
        z = None if encoder is None else encoder(x)
        l_velocity, l_repa = training_losses(model, x, noise[part], t[part], y, z, path_type)
        share = len(x) / len(images)
        means["val_velocity_loss"] += share * l_velocity.item()
        if z is not None:
            cosine = -l_repa.item()
            means["val_alignment"] += share * cosine
    return means


def finite_mean(values):
    """The mean of a list of scalar tensors, losses or gradient norms, without those that are not
    finite. In float16 gradients may overflow. Then the scaler skips the step."""
    values = torch.stack(values)
    return values[values.isfinite()].mean().item()


def draw_grid(model, path):
    """Write samples without guidance, one class a row, always from the same noise."""
    y = torch.arange(min(10, model.num_classes)).repeat_interleave(10)
    g = torch.Generator().manual_seed(seed_for("grid"))
    noise = torch.randn(len(y), 3, 32, 32, generator=g)
    device = model.pos_embed.device
    x = sample_ode(model, noise.to(device), y.to(device))
    save_image((x + 1) / 2, path, nrow=10)  # clamps to [0, 1]


def save(folder, checkpoint):
    """Write checkpoint.pt and metrics.csv. The rename keeps checkpoint.pt whole at any time."""
    part = folder / "checkpoint.part"
    with as_user_error(f"cannot write {part}"):
        torch.save(checkpoint, part)
    part.replace(folder / "checkpoint.pt")
    columns = []
    for row in checkpoint["rows"]:  # any row may lack repa_loss, because of --repa-stop-step
        for name in row:
            if name not in columns:
                columns.append(name)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(checkpoint["rows"])


def train(args, checkpoint=None):
    """Train as the options say, from the checkpoint on if there is one. Leaves checkpoint.pt,
    metrics.csv and samples_*.png in the folder args.output_dir."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    is_mixed = dtype != torch.float32

    # The encoder is built before the images are read, so that a mistake in it shows at once.
    base = SIT_MODELS[args.model]
    encoder, z_dim = None, 0
    if args.proj_coeff > 0:
        encoder = TargetEncoder(args.encoder, 32 // base["patch_size"], args.encoder_weights)
        encoder.to(device)
        z_dim = encoder.embed_dim
    *tensors, classes = load_data(args.data)
    images, labels, val_images, val_labels = [tensor.to(device) for tensor in tensors]
    # Instead of random flips, mirror images are added, so that their targets can be cached, too.
    images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)

    # The model, its moving average (EMA) and the optimizer: new ones, or the checkpoint's.
    sit_args = dict(base, encoder_depth=args.encoder_depth, num_classes=len(classes), z_dim=z_dim)
    torch.manual_seed(seed_for("weights", args.seed))
    model = SiT(**sit_args).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start, rows = 0, []
    if checkpoint is not None:
        start, rows = checkpoint["step"], checkpoint["rows"]
        with as_user_error("the run does not fit --model, --data, --encoder or --proj-coeff"):
            model.load_state_dict(checkpoint["model"])
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # only runs in float16 have a state of the scaler
            scaler.load_state_dict(checkpoint["scaler"])
        optimizer.param_groups[0]["lr"] = args.learning_rate  # the option replaces the loaded one
    if args.compile:
        model.compile()  # in place, so that the weights keep their names
    cached_targets = None
    if args.cache_targets and encoder is not None and start < args.repa_stop_step:
        with torch.autocast(device.type, dtype, enabled=is_mixed):
            cached_targets = compute_targets(encoder, images)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{args.model} on {device}, {len(images)} images with mirror images, in {folder}")

    history = defaultdict(list)  # what the steps since the last evaluation have logged
    steps = range(start, args.max_train_steps)
    for step in progress(steps, "training", initial=start, total=args.max_train_steps):
        # 1. A batch: images, noise, times and labels.
        x, noise, t, y, index = draw_batch(images, labels, len(classes), step, args)

        with torch.autocast(device.type, dtype, enabled=is_mixed):
            # 2. The targets: what the encoder says about the clean images.
            z = None
            if encoder is not None and step < args.repa_stop_step:
                z = encoder(x) if cached_targets is None else cached_targets[index]

            # 3. The loss: L = L_velocity + lambda L_REPA.
            l_velocity, l_repa = training_losses(model, x, noise, t, y, z, args.path_type)
            loss = l_velocity
            if z is not None:
                loss = l_velocity + args.proj_coeff * l_repa
                history["repa_loss"].append(l_repa.detach())

        # 4. The update of the weights and of their moving average.
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # the scaler does nothing unless dtype is float16
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        update_ema(ema, model, step)
        history["velocity_loss"].append(l_velocity.detach())
        history["grad_norm"].append(grad_norm)

        # 5. Now and then: evaluate, save, draw. Numbers are read only here, since reading one makes
        # the CPU wait for the GPU.
        done = step + 1
        if done % args.eval_every == 0 or done == args.max_train_steps:
            # Losses and gradient norm are those of the model, the held-out values those of the EMA.
            row = {name: finite_mean(values) for name, values in history.items()}
            history.clear()
            # After --repa-stop-step the projector is no longer trained, but the alignment is still
            # measured with it.
            with torch.autocast(device.type, dtype, enabled=is_mixed):
                row.update(evaluate(ema, encoder, val_images, val_labels, args.path_type))
            # This is checked before the save, so that the last checkpoint stays usable.
            if not math.isfinite(row["val_velocity_loss"]):
                advice = "--resume the run, or start again, with a smaller --learning-rate"
                raise UserError(f"the held-out loss is not finite; {advice}")
            rows.append({"step": done, **row})
            tqdm.write(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
            state = dict(model=model.state_dict(), ema=ema.state_dict())
            state.update(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            # sample.py also needs the arguments of SiT and the names of the classes.
            state.update(step=done, rows=rows, config=vars(args), sit=sit_args, classes=classes)
            # If saving or drawing fails, for example on a full disk, the run goes on. It ends with
            # this error only after the last evaluation.
            try:
                save(folder, state)
                draw_grid(ema, folder / f"samples_{done:07d}.png")
            except (UserError, OSError) as error:
                tqdm.write(f"cannot save or draw: {error}")
                if done == args.max_train_steps:
                    raise


def main(argv=None):
    """Run the command line. A mistake of the user's ends the program with one sentence."""
    try:
        train(*parse_options(argv))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the memory is full; try a smaller --batch-size, or --no-cache-targets")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()
