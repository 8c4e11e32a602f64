"""repa_mini: REPA, representation alignment for diffusion transformers, in one file.

REPA (Yu et al., ICLR 2025, arXiv 2410.06940) trains a diffusion transformer, here SiT, to predict
the velocity of a path from data to noise. It adds one term to the loss: an early hidden state of
the transformer, which sees a *noisy* image, is projected by a small MLP and pulled, patch by patch,
towards what a frozen self-supervised encoder says about the *clean* image.

    x_t        = alpha_t x + sigma_t eps        the interpolant; t = 0 is data and t = 1 is noise
    v          = alpha'_t x + sigma'_t eps      its velocity, on the linear path v = eps - x
    L_velocity = mean of (v_theta(x_t, t, y) - v)^2
    L_REPA     = - mean over patches n of cos(z[n], z_tilde[n])
    L          = L_velocity + lambda L_REPA

Here x is a clean image, y its class, eps Gaussian noise and v_theta the transformer. The target z
is encoder(x), which the paper calls y*; the projected hidden state z_tilde is h_phi(h_t). There is
no VAE: images have 32 x 32 pixels. "Section" in a comment means a section of the paper.
"""

import argparse
import contextlib
import copy
import csv
import functools
import math
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from timm.layers import GELUTanh, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

progress = functools.partial(tqdm, disable=None)  # a progress bar, if stderr is a terminal


class UserError(ValueError):
    """A mistake of the user's, which ends the program with one sentence."""


@contextlib.contextmanager
def told_as(sentence):
    """Tell whatever a library raises in this block as one sentence, in a UserError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{sentence} ({reason})") from error


# ---- 1. SiT: a vision transformer conditioned by adaLN-Zero (Ma et al. 2024, arXiv 2401.08740)
def position_table(dim, g):
    """Embeddings (g * g, dim) of a grid of patches, row by row: sines and cosines of the column in
    the first half of an embedding, of the row in the second half."""
    frequencies = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(g)[:, None] * frequencies  # (g, dim / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (g, dim / 2)
    columns = waves.repeat(g, 1)  # of 0, 1, 2, ..., 0, 1, 2, ...
    rows = waves.repeat_interleave(g, dim=0)  # of 0, 0, 0, ..., 1, 1, 1, ...
    return torch.cat([columns, rows], dim=1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        first, second = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t):  # (N,) in [0, 1], which SiT does not scale by 1000 -> (N, D)
        frequencies = 10000 ** (-torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * frequencies  # (N, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)  # the last is "no class"

    def forward(self, y):  # (N,) -> (N, D)
        return self.embedding_table(y)


def modulate(x, shift, scale):  # x (N, T, D); shift and scale (N, D), the same for every token
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):  # tokens x (N, T, D), condition c (N, D) -> (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, out_features):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):  # tokens x (N, T, D), condition c (N, D) -> (N, T, out_features)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def init_linear(module):  # Xavier for the weights, zero for the biases
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """SiT with REPA's projector. The keys of its state dict are those of the authors' code.

    forward(x (N, C, H, W), t (N,), y (N,)) -> velocity (N, C, H, W), z_tilde (N, T, z_dim).
    z_tilde is the projected output of block `encoder_depth`, counted from 1 (Section 3.3), or None
    if z_dim is 0. The label `num_classes` is the null label, which stands for "no class".
    """

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
        if not 1 <= encoder_depth <= depth:
            raise UserError(f"there is no block {encoder_depth}; the blocks are 1 to {depth}")
        self.patch_size, self.grid_size = patch_size, input_size // patch_size
        self.num_classes, self.encoder_depth = num_classes, encoder_depth
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        table = position_table(hidden_size, self.grid_size)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.init_weights()
        # The projector draws its weights last, so that the others are the same without it.
        self.projectors = nn.ModuleList()  # a list, as in the authors' code, of one or none
        if z_dim > 0:
            first = nn.Linear(hidden_size, projector_dim)
            second = nn.Linear(projector_dim, projector_dim)
            third = nn.Linear(projector_dim, z_dim)
            projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
            self.projectors.append(projector.apply(init_linear))

    def init_weights(self):
        self.apply(init_linear)
        weight = self.x_embedder.proj.weight  # (D, C, p, p), a linear layer of a patch's pixels
        nn.init.xavier_uniform_(weight.view(len(weight), -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]:
            nn.init.normal_(layer.weight, std=0.02)
        for module in [*self.blocks, self.final_layer]:
            nn.init.zeros_(module.adaLN_modulation[1].weight)  # adaLN-Zero: gates are 0 at first
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, tokens):  # (N, T, p * p * C) -> (N, C, H, W)
        g, p = self.grid_size, self.patch_size
        x = tokens.reshape(-1, g, g, p, p, tokens.shape[2] // p**2)  # (N, row, column, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, row, p, column, p)
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


SIT_SIZES = {  # of the SiT paper, with the encoder depths of the REPA authors; Ti is ours
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


def build_encoder(name, weights):
    if weights == "random":
        torch.manual_seed(0)  # so that every run gets the same random weights
        return timm.create_model(name, pretrained=False)
    if weights == "download":
        return timm.create_model(name, pretrained=True)
    state = timm.models.load_state_dict(weights, weights_only=True)  # runs no code of the file
    if not state:
        raise UserError("the file holds no weights")
    # pretrained=True would download weights. With a state dict in its config timm takes that
    # instead, after converting the names of other releases, and raises if a tensor does not fit.
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state})


class TargetEncoder(nn.Module):
    """A frozen timm encoder: images (N, 3, H, W) in [-1, 1] -> z (N, grid_size**2, embed_dim).

    A ViT gives its last patch tokens, after its final norm if it has one. A CNN gives its feature
    map at stride 16. `weights` is "download", "random", or a .safetensors or .pth file. Raises
    UserError for an encoder that cannot be built or does not give one token for each patch.
    """

    def __init__(self, name=DINOV2, grid_size=16, weights="download"):
        super().__init__()
        advice = "try another --encoder, or a file for --encoder-weights"
        with told_as(f"encoder {name} with weights {weights} does not work; {advice}"):
            self.model = build_encoder(name, weights).eval().requires_grad_(False)
            # In timm, "reduction" is the number of pixels from one token to the next, for every
            # block of a ViT or, in the order of forward_intermediates, every stage of a CNN.
            strides = [layer["reduction"] for layer in self.model.feature_info]
            self.is_vit = hasattr(self.model, "num_prefix_tokens")
            if self.is_vit:
                self.size = (grid_size * strides[-1], grid_size * strides[-1])
                self.model.set_input_size(self.size)  # resamples the position embeddings
            else:
                self.size = (grid_size * 16, grid_size * 16)
                self.stage = strides.index(16)
            shape = self.tokens(torch.zeros(1, 3, *self.size)).shape
        if len(shape) != 3 or shape[1] != grid_size**2:
            raise UserError(f"encoder {name} gives {tuple(shape)}, not {grid_size**2} tokens")
        self.grid_size, self.embed_dim = grid_size, shape[2]
        for key in ("mean", "std"):  # of the pixels that the encoder was trained on
            value = torch.tensor(self.model.pretrained_cfg[key]).view(3, 1, 1)
            self.register_buffer(key, value, persistent=False)

    def tokens(self, pixels):
        if self.is_vit:
            prefix = self.model.num_prefix_tokens  # the class token and registers come first
            return self.model.forward_features(pixels)[:, prefix:]
        options = dict(indices=[self.stage], intermediates_only=True, stop_early=True)
        (feature_map,) = self.model.forward_intermediates(pixels, **options)  # (N, D, g, g)
        return feature_map.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def forward(self, images):
        x = ((images + 1) / 2 - self.mean) / self.std
        return self.tokens(F.interpolate(x, self.size, mode="bicubic"))  # like the authors


# ---- 3. Losses
def interpolant(t, path_type="linear"):
    """alpha, sigma and their derivatives by t, each in the shape of t (Section 2)."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    assert path_type == "cosine"
    alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha


def repa_loss(z_tilde, z):
    """L_REPA: minus the mean cosine of z_tilde and z, both (N, T, D) (Section 3.3).
    It is computed in float32, since squares of half-precision numbers can overflow."""
    return -F.cosine_similarity(z_tilde.float(), z.float(), dim=-1).mean()


def training_losses(model, x, noise, t, y, z=None, path_type="linear"):
    """L_velocity and L_REPA, two scalars (Sections 2 and 3.3); without z the second is None.

    x: clean images (N, C, H, W) in [-1, 1]; noise: like x; t: (N,) in [0, 1]; y: labels (N,), some
    of which are the null label; z: targets (N, T, D).
    """
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
    """Classifier-free guidance (Ho & Salimans 2022): v_null + cfg_scale (v_y - v_null).
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
    """Integrate dx/dt = v_theta(x, t, y) from t = 1 to 0, by Euler's or Heun's method (Section 2).

    noise: x at t = 1, (N, C, H, W); y: (N,). Returns x at t = 0. Guidance acts in the steps that
    start at guidance_low <= t <= guidance_high (Kynkäänniemi et al. 2024).
    """
    x = noise
    for i in range(num_steps):
        t, t_next = 1 - i / num_steps, 1 - (i + 1) / num_steps
        scale = cfg_scale if guidance_low <= t <= guidance_high else 1.0
        v = guided_velocity(model, x, t, y, scale)
        if heun and t_next > 0:  # the last step is Euler's, like in the authors' code
            v_next = guided_velocity(model, x + (t_next - t) * v, t_next, y, scale)
            v = (v + v_next) / 2
        x = x + (t_next - t) * v
    return x


# ---- 5. Data: all images in one uint8 tensor (N, 3, 32, 32), which fits on the GPU
def to_unit(pixels):  # uint8 -> float in [-1, 1]
    return pixels.float() / 127.5 - 1


def to_pixels(x):  # float in [-1, 1] -> uint8
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_shapes(n, seed):
    """n images (n, 3, 32, 32) uint8 and labels (n,): ten polygons, each in a hue of its own."""
    rng = random.Random(seed)
    images, labels = [], torch.arange(n) % 10
    for label in labels.tolist():
        corners = 3 + label // 2
        rotation = 180 / corners * (label % 2)  # odd classes are turned by half a corner
        circle = rng.uniform(48, 80), rng.uniform(48, 80), rng.uniform(34, 46)  # x, y, radius
        colour = f"hsv({36 * label}, {rng.uniform(80, 100)}%, {rng.uniform(70, 100)}%)"
        image = Image.new("RGB", (128, 128), f"hsv(0, 0%, {rng.uniform(0, 40)}%)")
        ImageDraw.Draw(image).regular_polygon(circle, corners, rotation, fill=colour)
        images.append(pil_to_tensor(image.reduce(4)))  # to 32 x 32 pixels
    return torch.stack(images), labels


def read_image(path):
    """The middle square of an image file, (3, 32, 32) uint8, on white where it is transparent."""
    with told_as(f"cannot read image {path}; repair or remove it"), Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return pil_to_tensor(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC))


def load_folder(folder):
    """Images (N, 3, 32, 32) uint8, labels (N,) and class names of FOLDER/CLASS/IMAGE."""
    dataset = ImageFolder(folder, loader=read_image)
    skipped = sum(path.is_file() for path in Path(folder).glob("*/**/*")) - len(dataset)
    if skipped > 0:
        print(f"{folder}: {skipped} files are skipped, since they are not named like images")
    images, labels = zip(*progress(dataset, f"reading {folder}"))
    return torch.stack(images), torch.tensor(labels), dataset.classes


def load_cifar10(train):
    """The same three for CIFAR-10's training or test images, downloaded to ./data once."""
    with told_as("cannot download CIFAR-10; try --data FOLDER or --smoke"):
        dataset = CIFAR10("data", train, download=True)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
    return images, torch.tensor(dataset.targets), dataset.classes


def load_data(name):
    """Training images and labels, held-out images and labels, class names. Raises UserError.
    The name is cifar10, shapes, or a folder. The folder holds train/ and one of test/ and val/; or
    else it holds the classes themselves, and every 50th image is held out."""
    if name == "shapes":
        return *draw_shapes(4000, seed=0), *draw_shapes(200, seed=1), list("0123456789")
    train, test = Path(name, "train"), Path(name, "test")
    if not test.is_dir():
        test = Path(name, "val")
    if name == "cifar10":
        images, labels, classes = load_cifar10(train=True)
        val_images, val_labels, val_classes = load_cifar10(train=False)
    elif train.is_dir() and test.is_dir():
        images, labels, classes = load_folder(train)
        val_images, val_labels, val_classes = load_folder(test)
    elif train.is_dir() and any(path.is_dir() for path in train.iterdir()):
        # With images in it, train/ would be a class of that name.
        raise UserError(f"{name} has train/ with classes in it, but neither test/ nor val/")
    else:
        images, labels, classes = load_folder(name)
        held_out = torch.arange(1, len(images) + 1) % 50 == 0
        val_images, val_labels, val_classes = images[held_out], labels[held_out], classes
        images, labels = images[~held_out], labels[~held_out]
    if classes != val_classes:
        raise UserError(f"{train} has the classes {classes}, but {test} has {val_classes}")
    if len(val_images) == 0:
        raise UserError(f"{name} has fewer than 50 images, so that none is held out")
    for label, class_name in enumerate(classes):
        if not (labels == label).any():
            raise UserError(f"class {class_name} of {name} has no training image")
    return images, labels, val_images, val_labels, classes


# ---- 6. Options
SMOKE = dict(data="shapes", encoder="test_vit", encoder_weights="random")  # what --smoke stands for
SMOKE.update(model="SiT-Ti/4", batch_size=16, learning_rate=2e-3)
SMOKE.update(max_train_steps=200, eval_every=100, device="cpu")


def build_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a minute on a CPU, without downloads")
    add("--data", default="cifar10", help="cifar10, shapes (built in), or a folder")
    add("--model", default="SiT-S/2", choices=SIT_MODELS, metavar="SiT-S/2")
    add("--encoder", default=DINOV2, help="a timm ViT or CNN")
    add("--encoder-weights", default="download", help="download, random, or a file")
    add("--encoder-depth", type=int, help="aligned block (default: the model's)")
    add("--proj-coeff", type=float, default=0.5, help="lambda; 0 is a vanilla SiT")
    add("--repa-stop-step", type=int, default=10**9, help="no REPA loss from here on")
    add("--cache-targets", action=argparse.BooleanOptionalAction, help="compute them all, once")
    add("--path-type", default="linear", choices=["linear", "cosine"])
    add("--cfg-prob", type=float, default=0.1, help="share of labels dropped")
    add("--batch-size", type=int, default=256, help="images in a step")
    add("--learning-rate", type=float, default=1e-4, help="AdamW's, constant")
    add("--max-train-steps", type=int, default=100_000, help="length of the run")
    add("--eval-every", type=int, default=1000, help="steps between evaluations and saves")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--device", help="cuda, cuda:1, mps, cpu (default: a GPU if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the device's")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output-dir", metavar="FOLDER", help="default: a new one in runs/")
    place.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder")
    return parser


def parse_options(argv):
    """The options, and the checkpoint of --resume. An option is what is typed, else what the
    checkpoint says, else what --smoke says, else its default."""
    parser, checkpoint = build_parser(), None
    args = parser.parse_args(argv)  # a first look, only for --smoke and --resume
    if args.smoke:
        parser.set_defaults(**SMOKE)
    if args.resume is not None:
        checkpoint = load_checkpoint(args.resume)
        parser.set_defaults(**checkpoint["config"])
    args = parser.parse_args(argv)  # with the new defaults; what is typed still wins
    numbers = args.batch_size, args.max_train_steps, args.eval_every
    if min(numbers) < 1 or "" in vars(args).values():
        parser.error("an option is empty, or a number of steps or images is below 1")
    if not (args.learning_rate >= 0 and args.proj_coeff >= 0 and 0 <= args.cfg_prob <= 1):
        parser.error("--learning-rate, --proj-coeff or --cfg-prob is out of range")
    if args.resume is not None:
        path = Path(args.resume)
        args.output_dir = str(path if path.is_dir() else path.parent)
    elif args.output_dir is None:
        args.output_dir = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    elif Path(args.output_dir, "checkpoint.pt").exists():
        parser.error(f"{args.output_dir} holds a run; --resume {args.output_dir} continues it")
    return args, checkpoint


# ---- 7. Training
def seed_for(*use):
    """A seed for a use such as ("batch", seed, step). Other uses get unrelated random numbers, and
    unlike hash(), Random gives a text the same number in every process."""
    return random.Random(repr(use)).getrandbits(63)


def draw_batch(images, labels, null_label, step, args):
    """Draw all that is random in a training step, with a generator that only depends on the seed
    and the step. So a resumed run and a run without REPA see the same batches.

    Returns images x (N, 3, 32, 32) in [-1, 1]; noise like x; times t (N,) in [0, 1]; labels y (N,),
    some of which are replaced by the null label; and index (N,), the numbers of the images.
    """
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
    """ema <- decay * ema + (1 - decay) * model. The decay is the paper's 0.9999 from step 90,000.
    With 0.9999 from the start, 82% of the initial weights would be left after 2,000 steps."""
    decay = min(0.9999, (1 + step) / (10 + step))
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, 1 - decay)


def pick_device(name=None, dtype=None):
    """The device (default: a GPU if there is one) and the dtype for autocast: by default bfloat16
    on CUDA, float16 on older cards such as a T4, and float32 elsewhere. Raises UserError."""
    if name is None and torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator().type
    with told_as(f"device {name} does not work here; try --device cpu"):
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device).item()
    if dtype is None and device.type == "cuda":
        is_recent = torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = "bfloat16" if is_recent else "float16"
    return device, getattr(torch, dtype or "float32")


@torch.no_grad()
def compute_targets(encoder, images):
    """The targets (N, T, D) of uint8 images, in half precision, on the images' device. Those of
    CIFAR-10 and its mirror images take 19.7 GB for SiT-S/2, and 4.9 GB for SiT-S/4."""
    shape = len(images), encoder.grid_size**2, encoder.embed_dim
    targets = torch.empty(shape, dtype=torch.float16, device=images.device)
    for i in progress(range(0, len(images), 100), "computing targets"):
        targets[i : i + 100] = encoder(to_unit(images[i : i + 100]))
    return targets


@torch.no_grad()
def evaluate(model, encoder, images, labels, path_type):
    """The held-out velocity loss and, with an encoder, the mean cosine of the patches, as a dict.
    Noise and times are the same in every evaluation of every run."""
    g = torch.Generator().manual_seed(seed_for("evaluation"))
    noise = torch.randn(images.shape, generator=g).to(images.device)
    t = torch.rand(len(images), generator=g).to(images.device)
    means, z = defaultdict(float), None
    for i in torch.arange(len(images), device=images.device).split(100):
        x, share = to_unit(images[i]), len(i) / len(images)
        if encoder is not None:
            z = encoder(x)
        losses = training_losses(model, x, noise[i], t[i], labels[i], z, path_type)
        means["val_velocity_loss"] += share * losses[0].item()
        if encoder is not None:
            means["val_alignment"] += share * -losses[1].item()  # minus L_REPA is the cosine
    return means


def draw_grid(model, path):
    """Write samples without guidance, one class a row, always from the same noise."""
    device = model.pos_embed.device
    y = torch.arange(min(10, model.num_classes), device=device).repeat_interleave(10)
    g = torch.Generator().manual_seed(seed_for("grid"))
    noise = torch.randn(len(y), 3, 32, 32, generator=g).to(device)
    save_image(to_pixels(sample_ode(model, noise, y)) / 255, path, nrow=10)


def save(folder, checkpoint):
    """Write checkpoint.pt and metrics.csv. The rename keeps checkpoint.pt whole at any time.
    Raises OSError."""
    part = folder / "checkpoint.part"
    try:
        torch.save(checkpoint, part)
    except RuntimeError as error:  # torch's error when the disk is full
        raise OSError(f"cannot write {part}: {error}") from error
    part.replace(folder / "checkpoint.pt")
    columns = max(checkpoint["rows"], key=len)  # a row without REPA has fewer
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(checkpoint["rows"])


def load_checkpoint(path):
    """The checkpoint in a run's folder, or in the file itself, on the CPU. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    keys = ["model", "ema", "optimizer", "scaler", "step", "rows", "config", "sit", "classes"]
    with told_as(f"{path} is not a checkpoint of this version of repa_mini.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        return {key: checkpoint[key] for key in keys}


def restore(checkpoint, parts):
    """Load the states of the model, its EMA, the optimizer and the scaler. Raises UserError."""
    with told_as("the checkpoint is of another model"):
        for name, part in parts.items():
            if name != "scaler" or checkpoint[name]:  # its state is empty unless in float16
                part.load_state_dict(checkpoint[name])


def prepare_data(name, device):
    """`load_data` for training, on the device: with the mirror images of the training images, and
    with at most 1,000 of the held-out images."""
    images, labels, val_images, val_labels, classes = load_data(name)
    images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)
    every = math.ceil(len(val_images) / 1000)
    tensors = images, labels, val_images[::every], val_labels[::every]
    return *[tensor.to(device) for tensor in tensors], classes


def train(args, checkpoint=None):
    """Train as the options say, from the checkpoint on if there is one. Leaves checkpoint.pt,
    metrics.csv and samples_*.png in the folder args.output_dir."""
    if checkpoint is not None and checkpoint["step"] >= args.max_train_steps:
        print(f"the run is finished, at step {checkpoint['step']}; see --max-train-steps")
        return
    folder = Path(args.output_dir)
    device, dtype = pick_device(args.device, args.dtype)
    autocast = functools.partial(torch.autocast, device.type, dtype, dtype != torch.float32)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32

    # The encoder and the images. `sit` collects SiT's arguments, which sample.py needs, too.
    sit = dict(SIT_MODELS[args.model], z_dim=0)
    encoder = None
    if args.proj_coeff > 0:
        grid_size = 32 // sit["patch_size"]
        encoder = TargetEncoder(args.encoder, grid_size, args.encoder_weights).to(device)
        sit["z_dim"] = encoder.embed_dim
    if args.encoder_depth is not None:
        sit["encoder_depth"] = args.encoder_depth
    images, labels, val_images, val_labels, classes = prepare_data(args.data, device)
    sit["num_classes"] = len(classes)

    # The model, its moving average (EMA) and the optimizer: new ones, or the checkpoint's.
    torch.manual_seed(seed_for("weights", args.seed))
    model = SiT(**sit).to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    learning_rate = args.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    start, rows = 0, []
    if checkpoint is not None:
        start, rows = checkpoint["step"], checkpoint["rows"]
        restore(checkpoint, parts)
        optimizer.param_groups[0]["lr"] = learning_rate  # the option's, not the checkpoint's
    folder.mkdir(parents=True, exist_ok=True)
    counts = f"{len(images)} images of {len(classes)} classes, mirror images included"
    print(f"{args.model} on {device}, {counts}, in {folder}")
    if args.compile or (args.compile is None and device.type == "cuda"):
        torch._dynamo.config.suppress_errors = True  # if it fails, torch says so and goes on
        model.compile()
        ema.compile()
    if encoder is not None and args.cache_targets:
        with autocast():
            cached_targets = compute_targets(encoder, images)

    history = defaultdict(list)  # what the steps since the last evaluation have logged
    steps = range(start, args.max_train_steps)
    for step in progress(steps, "training", initial=start, total=args.max_train_steps):
        # 1. A batch: images, noise, times and labels.
        x, noise, t, y, index = draw_batch(images, labels, len(classes), step, args)

        with autocast():
            # 2. The targets: what the encoder says about the clean images.
            if encoder is None or step >= args.repa_stop_step:
                z = None
                # Compiled code gives unused parameters gradients of zero, with which momentum
                # would still move the projector.
                model.projectors.requires_grad_(False)
            elif args.cache_targets:
                z = cached_targets[index]
            else:
                z = encoder(x)

            # 3. The loss: L = L_velocity + lambda L_REPA.
            velocity_loss, repa_loss = training_losses(model, x, noise, t, y, z, args.path_type)
            loss = velocity_loss
            if z is not None:
                loss = velocity_loss + args.proj_coeff * repa_loss
                history["repa_loss"].append(repa_loss.detach())

        # 4. The update of the weights and of their moving average.
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # the scaler does nothing unless dtype is float16
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        update_ema(ema, model, step)
        history["loss"].append(loss.detach())
        history["velocity_loss"].append(velocity_loss.detach())
        history["grad_norm"].append(grad_norm)

        # 5. Now and then: evaluate, save, draw. Only here does the host wait for the device.
        done = step + 1
        is_last = done == args.max_train_steps
        if done % args.eval_every == 0 or is_last:
            row = {name: torch.stack(values).mean().item() for name, values in history.items()}
            history.clear()
            with autocast():
                row.update(evaluate(ema, encoder, val_images, val_labels, args.path_type))
            if not math.isfinite(row["val_velocity_loss"]):
                advice = f"--resume {folder}, or start again if it holds no checkpoint yet"
                raise UserError(f"the loss is not finite; {advice}, with a smaller --learning-rate")
            rows.append({"step": done, **row})
            tqdm.write(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
            state = {name: part.state_dict() for name, part in parts.items()}
            state.update(step=done, rows=rows, config=vars(args), sit=sit, classes=classes)
            try:
                save(folder, state)
                with autocast():
                    draw_grid(ema, folder / f"samples_{done:07d}.png")
            except OSError as error:  # a full disk, or on Windows a file that is open elsewhere
                if is_last:
                    raise
                tqdm.write(f"cannot save ({error}); the next evaluation will try again")


def main(argv=None):
    """Run the command line. A mistake of the user's ends the program with one sentence."""
    try:
        train(*parse_options(argv))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the memory is full; try a smaller --batch-size or --no-cache-targets")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()
