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

x is a clean image, y its class, eps Gaussian noise, and v_theta the transformer. The target z is
encoder(x), which the paper calls y*. h_t is the output of an early block of the transformer, the
projector h_phi is the small MLP, and z_tilde = h_phi(h_t). There is no VAE: images have 32 x 32
pixels. In shapes N counts images, C colours, H and W pixels and T tokens, one for each patch; D is
the width of a token. "Section" means a section of the paper. sample.py shows what a run learned.
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
import torch._dynamo
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
def as_user_error(sentence):
    """Around calls of a library: turn whatever they raise into a UserError of one sentence."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]  # without line breaks
        raise UserError(f"{sentence} ({reason})") from error


# ---- 1. SiT: a vision transformer conditioned by adaLN-Zero (Ma et al. 2024, arXiv 2401.08740).
# The layers have the names of the authors' code, so that weights can be exchanged.
def position_table(dim, g):
    """Embeddings (g * g, dim) of a grid of patches, row by row. The first half of an embedding says
    the column of its patch, the second half the row, each in dim / 4 sines and dim / 4 cosines."""
    frequencies = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(g)[:, None] * frequencies  # (g, dim / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (g, dim / 2)
    columns = waves.repeat(g, 1)  # of the patches in columns 0, 1, 2, ..., 0, 1, 2, ...
    rows = waves.repeat_interleave(g, dim=0)  # of the patches in rows 0, 0, 0, ..., 1, 1, 1, ...
    return torch.cat([columns, rows], dim=1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        first, second = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t):  # (N,) -> (N, D)
        # DiT has these frequencies, too, for t up to 1000. SiT's authors keep them for t up to 1.
        frequencies = 10000 ** (-torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * frequencies  # (N, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)  # and the null label

    def forward(self, y):  # (N,) -> (N, D)
        return self.embedding_table(y)


def modulated_norm(x, shift, scale):  # x (N, T, D); the others (N, D)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):  # tokens x (N, T, D), condition c (N, D) -> (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated_norm(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, out_features):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):  # tokens x (N, T, D), condition c (N, D) -> (N, T, out_features)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """SiT with REPA's projector.

    forward(x (N, C, H, W), t (N,), y (N,)) -> velocity (N, C, H, W), z_tilde (N, T, z_dim).
    z_tilde is the projected output of SiT's block number `encoder_depth`, counted from 1 (Section
    3.3), or None if z_dim is 0. The label `num_classes` is the null label, meaning "no class".
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
        # The projector's weights are drawn after all others, so that one seed gives the same SiT
        # with and without a projector.
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
        # adaLN-Zero. The biases of all linear layers are 0 already. With weights of 0, too, all
        # shifts, scales and gates are 0 at first, and (last line) so is the velocity.
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
                z_tilde = self.projectors[0](x)  # here x is the hidden state h_t
        return self.unpatchify(self.final_layer(x, c)), z_tilde


# S to XL are the sizes of the SiT paper, and Ti is ours. For B, L and XL, encoder_depth is that of
# the REPA authors, who train no S. For S and Ti we align the block at a third of the depth.
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


def build_encoder(name, weights):
    if weights == "random":
        torch.manual_seed(0)  # so that every run gets the same random weights
        return timm.create_model(name, pretrained=False)
    if weights == "download":
        return timm.create_model(name, pretrained=True)
    # To load a local file with timm, one puts its path into pretrained_cfg, which is timm's record
    # of where the weights of a model are.
    source = {"file": weights}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source)


def choose_layer(model):
    """The number and the stride of the layer whose output is the target: the last block of a ViT,
    or the stage of a CNN with stride 16. The stride is the number of pixels from one token to the
    next: 14 in every block of DINOv2, but 2, 4, 8, 16 and 32 in the stages of a ResNet. timm calls
    it "reduction", and lists the layers in feature_info as forward_intermediates numbers them."""
    strides = [layer["reduction"] for layer in model.feature_info]
    if strides[0] == strides[-1]:  # a ViT, since all its blocks have the same stride
        return len(strides) - 1, strides[-1]
    return strides.index(16), 16


class TargetEncoder(nn.Module):
    """A frozen timm encoder: images (N, 3, H, W) in [-1, 1] -> z (N, grid_size**2, embed_dim).

    A ViT gives its last patch tokens, after its final norm if it has one. A CNN gives its feature
    map at stride 16. `weights` is "download", "random", or a .safetensors or .pth file. Raises
    UserError for an encoder that cannot be built or does not give one token for each patch.
    """

    def __init__(self, name=DINOV2, grid_size=16, weights="download"):
        super().__init__()
        advice = "try another --encoder, or a file for --encoder-weights"
        with as_user_error(f"encoder {name} with weights {weights} does not work; {advice}"):
            self.model = build_encoder(name, weights)
            for key in ("mean", "std"):  # of the pixels that the encoder was trained on
                value = torch.tensor(self.model.pretrained_cfg[key]).view(3, 1, 1)
                self.register_buffer(key, value, persistent=False)
            # The image is enlarged, so that the encoder has as many tokens as SiT.
            self.layer, stride = choose_layer(self.model)
            self.size = (grid_size * stride, grid_size * stride)  # 16 * 14 = 224 for DINOv2
            if hasattr(self.model, "set_input_size"):
                self.model.set_input_size(self.size)  # resamples position embeddings
            self.eval().requires_grad_(False)
            z = self(torch.zeros(1, 3, *self.size))  # a trial run, to see the shape
        if z.shape[1] != grid_size**2:
            raise UserError(f"encoder {name} gives {z.shape[1]} tokens, not {grid_size**2}")
        self.grid_size, self.embed_dim = grid_size, z.shape[2]

    @torch.no_grad()
    def forward(self, images):
        x = ((images + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, self.size, mode="bicubic")  # like the authors
        maps = self.model.forward_intermediates(
            x,
            indices=[self.layer],
            norm=True,  # the final norm of a ViT, which a CNN ignores
            stop_early=True,  # later stages of a CNN are not computed
            intermediates_only=True,  # a list of maps, here one (N, embed_dim, g, g)
        )
        return maps[0].flatten(2).transpose(1, 2)


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
    It is computed in float32, since squares of float16 numbers can overflow."""
    return -F.cosine_similarity(z_tilde.float(), z.float(), dim=-1).mean()


def training_losses(model, x, noise, t, y, z=None, path_type="linear"):
    """L_velocity and L_REPA, two scalars (Sections 2 and 3.3); without z the second is None.

    x: clean images (N, C, H, W) in [-1, 1]; noise: like x; t: (N,) in [0, 1]; y: labels (N,), some
    of which are the null label; z: targets (N, T, z_dim).
    """
    alpha, sigma, d_alpha, d_sigma = interpolant(t.view(-1, 1, 1, 1), path_type)
    x_t = alpha * x + sigma * noise
    v = d_alpha * x + d_sigma * noise
    v_theta, z_tilde = model(x_t, t, y)
    velocity_loss = F.mse_loss(v_theta.float(), v)
    if z is None:
        return velocity_loss, None
    return velocity_loss, repa_loss(z_tilde, z)


# ---- 4. Sampler: from noise at t = 1 to an image at t = 0 (sample.py uses all of its options)
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
        # 1 - i / num_steps would give 0.19999999999999996 for 0.2, an end of the interval perhaps.
        t, t_next = (num_steps - i) / num_steps, (num_steps - i - 1) / num_steps
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


def to_pixels(x):  # float in [-1, 1] -> uint8, for sample.py
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_shapes(n, seed):
    """n images (n, 3, 32, 32) uint8 and labels (n,) of ten classes: polygons with 3 to 7 corners,
    upright or turned, each class in a hue of its own."""
    rng = random.Random(seed)
    images, labels = [], torch.arange(n) % 10
    for label in labels.tolist():
        corners = 3 + label // 2
        rotation = 180 / corners * (label % 2)  # odd classes are turned
        circle = rng.uniform(48, 80), rng.uniform(48, 80), rng.uniform(34, 46)  # x, y, radius
        colour = f"hsv({36 * label}, {rng.uniform(80, 100)}%, {rng.uniform(70, 100)}%)"
        image = Image.new("RGB", (128, 128), f"hsv(0, 0%, {rng.uniform(0, 40)}%)")
        ImageDraw.Draw(image).regular_polygon(circle, corners, rotation, fill=colour)
        images.append(pil_to_tensor(image.reduce(4)))  # to 32 x 32 pixels
    return torch.stack(images), labels


def read_image(path):
    """The middle square of an image file, (3, 32, 32) uint8, on white where it is transparent."""
    with as_user_error(f"cannot read image {path}; repair or remove it"), Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return pil_to_tensor(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC))


def open_folder(folder):
    """The dataset of FOLDER/CLASS/IMAGE. Says how many other files it skips."""
    dataset = ImageFolder(folder, loader=read_image)
    skipped = sum(path.is_file() for path in Path(folder).rglob("*")) - len(dataset)
    if skipped > 0:
        print(f"{folder}: {skipped} files are skipped, which are not images in a class's folder")
    return dataset


def read_all(dataset):
    """All images (N, 3, 32, 32) uint8 and labels (N,) of a dataset of pairs."""
    pairs = [dataset[i] for i in progress(range(len(dataset)), "reading images")]
    images, labels = zip(*pairs)
    return torch.stack(images), torch.tensor(labels)


def load_data(name):
    """Training images and labels, held-out images and labels, class names. Raises UserError.

    The name is cifar10, shapes, or a folder. A folder holds train/CLASS/IMAGE with test/CLASS/IMAGE
    or val/CLASS/IMAGE; or it holds CLASS/IMAGE, and then every 50th image is held out.
    """
    if name == "shapes":
        return *draw_shapes(4000, seed=0), *draw_shapes(200, seed=1), list("0123456789")
    folder = Path(name)
    if name == "cifar10":
        with as_user_error("cannot download CIFAR-10; try --data FOLDER or --smoke"):
            train = CIFAR10("data", train=True, transform=pil_to_tensor, download=True)
            test = CIFAR10("data", train=False, transform=pil_to_tensor)
    elif any(path.is_dir() for path in folder.glob("train/*")):
        held_out = "test" if (folder / "test").is_dir() else "val"
        train, test = open_folder(folder / "train"), open_folder(folder / held_out)
    else:  # the folder holds the classes; one of them may be called train, with images in it
        train = test = open_folder(folder)
    if train.classes != test.classes:
        difference = f"{train.classes} in {train.root}, but {test.classes} in {test.root}"
        raise UserError(f"the classes differ: {difference}")
    images, labels = read_all(train)
    if train is not test:
        val_images, val_labels = read_all(test)
    elif len(images) < 50:
        raise UserError(f"{name} has fewer than 50 images, so that none is held out")
    else:
        is_held_out = torch.arange(len(images)) % 50 == 49
        val_images, val_labels = images[is_held_out], labels[is_held_out]
        images, labels = images[~is_held_out], labels[~is_held_out]
    for label, class_name in enumerate(train.classes):
        if not (labels == label).any():  # perhaps because its only image is held out
            raise UserError(f"class {class_name} of {name} has no training image")
    return images, labels, val_images, val_labels, train.classes


# ---- 6. Options
SMOKE = dict(data="shapes", encoder="test_vit", encoder_weights="random")  # what --smoke stands for
SMOKE.update(model="SiT-Ti/4", batch_size=16, learning_rate=2e-3)
SMOKE.update(max_train_steps=200, eval_every=100, device="cpu")


def build_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a minute on a CPU, without downloads")
    add("--data", default="cifar10", help="cifar10, shapes (built in), or a folder")
    add("--model", default="SiT-S/2", choices=SIT_MODELS, metavar="MODEL", help="SiT-S/2, ...")
    add("--encoder", default=DINOV2, help="a timm ViT or CNN")
    add("--encoder-weights", default="download", help="download, random, or a file")
    add("--encoder-depth", type=int, help="aligned block (default: the model's)")
    add("--proj-coeff", type=float, default=0.5, help="lambda; 0 is a vanilla SiT")
    add("--repa-stop-step", type=int, default=10**9, help="no REPA loss from this step on")
    yes_or_no = argparse.BooleanOptionalAction
    add("--cache-targets", action=yes_or_no, help="compute every target once, before training")
    add("--path-type", default="linear", choices=["linear", "cosine"])
    add("--cfg-prob", type=float, default=0.1, help="share of labels dropped")
    add("--batch-size", type=int, default=256, help="images in a step")
    add("--learning-rate", type=float, default=1e-4, help="AdamW's, constant")
    add("--max-train-steps", type=int, default=100_000, help="length of the run")
    add("--eval-every", type=int, default=1000, help="steps between evaluations and saves")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--device", help="cuda, cuda:1, mps, cpu (default: a GPU if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the device's")
    add("--compile", action=yes_or_no, help="default: on CUDA")
    place = parser.add_mutually_exclusive_group()
    folder = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    place.add_argument("--output-dir", default=folder, help="default: a new one in runs/")
    place.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder")
    return parser


def parse_options(argv):
    """The options, and the checkpoint of --resume or None.

    An option is what is typed, else what the checkpoint says, else what --smoke says, else its
    default. So argv is parsed twice: first to find --smoke and --resume, and then again with what
    they say as the defaults.
    """
    parser, checkpoint, defaults = build_parser(), None, {}
    args = parser.parse_args(argv)
    if "" in vars(args).values():  # such as --data "$DATA" if that variable is not set
        parser.error("an option is empty")
    if args.smoke:
        defaults.update(SMOKE)
    if args.resume is not None:
        checkpoint = load_checkpoint(args.resume)
        defaults.update(checkpoint["config"])  # every option of the run
        run = Path(args.resume)  # which may have been moved since, so its output_dir is replaced
        defaults["output_dir"] = str(run if run.is_dir() else run.parent)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if min(args.batch_size, args.max_train_steps, args.eval_every) < 1:
        parser.error("a number of images or steps is below 1")
    if not (args.learning_rate >= 0 and args.proj_coeff >= 0 and 0 <= args.cfg_prob <= 1):
        parser.error("--learning-rate, --proj-coeff or --cfg-prob is out of range")
    if checkpoint is None and Path(args.output_dir, "checkpoint.pt").exists():
        parser.error(f"{args.output_dir} holds a run; --resume {args.output_dir} continues it")
    if checkpoint is not None and checkpoint["step"] >= args.max_train_steps:
        parser.exit(message=f"the run is finished, at step {checkpoint['step']}\n")
    return args, checkpoint


# ---- 7. Training
def seed_for(*use):
    """A seed for a use such as ("batch", seed, step). Different uses get unrelated seeds. Unlike
    hash(), Random makes the same number of a text in every process."""
    return random.Random(repr(use)).getrandbits(63)


def draw_batch(images, labels, null_label, step, args):
    """Draw all that is random in a training step, with a generator that only depends on the seed
    and the step. So all runs of one seed, with or without REPA, resumed or not, see the same
    batches, if they are on the same kind of device.

    Returns images x (N, 3, 32, 32) in [-1, 1], drawn with replacement; noise like x; times t (N,)
    in [0, 1]; labels y (N,), some of which are replaced by the null label; and index (N,), the
    numbers of the images.
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
    """ema <- decay * ema + (1 - decay) * model. The paper's decay is 0.9999, with which 82% of the
    initial weights would be left after 2,000 steps. So ours starts lower, and is 0.9999 from step
    90,000 on."""
    decay = min(0.9999, (1 + step) / (10 + step))
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, 1 - decay)


def pick_device(name=None, dtype=None):
    """The device (default: a GPU if there is one) and the dtype for autocast (default: bfloat16 on
    CUDA, or float16 if the card is older than Ampere; float32 on other devices). Float32 products
    use TF32 where the card has it. Raises UserError."""
    if name is None and torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator().type
    with as_user_error(f"device {name} does not work here; try --device cpu"):
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device).item()
    if dtype is None and device.type == "cuda":
        is_recent = torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = "bfloat16" if is_recent else "float16"
    torch.set_float32_matmul_precision("high")  # TF32
    return device, getattr(torch, dtype or "float32")


@torch.no_grad()
def compute_targets(encoder, images):
    """The targets (N, T, z_dim) of uint8 images, in half precision, on the images' device."""
    shape = len(images), encoder.grid_size**2, encoder.embed_dim
    targets = torch.empty(shape, dtype=torch.float16, device=images.device)
    for i in progress(range(0, len(images), 100), "computing targets"):
        targets[i : i + 100] = encoder(to_unit(images[i : i + 100]))
    return targets


@torch.no_grad()
def evaluate(model, encoder, images, labels, path_type):
    """The held-out velocity loss and, with an encoder, the mean cosine of the patches, on at most
    1,000 of the images. Noise and times are always the same. Raises UserError if the loss is not
    finite."""
    every = math.ceil(len(images) / 1000)
    images, labels = images[::every], labels[::every]
    g = torch.Generator().manual_seed(seed_for("evaluation"))
    noise = torch.randn(images.shape, generator=g).to(images.device)
    t = torch.rand(len(images), generator=g).to(images.device)
    means = defaultdict(float)
    for i in torch.arange(len(images), device=images.device).split(100):
        x, weight = to_unit(images[i]), len(i) / len(images)
        z = None if encoder is None else encoder(x)
        l_velocity, l_repa = training_losses(model, x, noise[i], t[i], labels[i], z, path_type)
        means["val_velocity_loss"] += weight * l_velocity.item()
        if z is not None:
            cosine = -l_repa.item()
            means["val_alignment"] += weight * cosine
    if not math.isfinite(means["val_velocity_loss"]):
        advice = "--resume the run, or start again if it has no checkpoint yet,"
        raise UserError(f"the loss is not finite; {advice} with a smaller --learning-rate")
    return means


def draw_grid(model, path):
    """Write samples without guidance, one class a row, always from the same noise."""
    y = torch.arange(min(10, model.num_classes)).repeat_interleave(10)
    g = torch.Generator().manual_seed(seed_for("grid"))
    noise = torch.randn(len(y), 3, 32, 32, generator=g)
    device = model.pos_embed.device
    x = sample_ode(model, noise.to(device), y.to(device))
    save_image((x + 1) / 2, path, nrow=10)


def save(folder, checkpoint):
    """Write checkpoint.pt and metrics.csv. The rename keeps checkpoint.pt whole at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "checkpoint.part"
    with as_user_error(f"cannot write {part}"):
        torch.save(checkpoint, part)
    part.replace(folder / "checkpoint.pt")
    columns = {}  # the names of all columns; a row without REPA has fewer than others
    for row in checkpoint["rows"]:
        columns.update(row)
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
    with as_user_error(f"cannot load {path} as a checkpoint of this version of repa_mini.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        return {key: checkpoint[key] for key in keys}  # a missing key is an error, too


def restore(checkpoint, parts, learning_rate):
    """Load the states of the parts, {"model": model, "ema": ...}; returns the step and the rows of
    metrics.csv. The learning rate is the option's, not the checkpoint's. Raises UserError."""
    advice = "it was made with another --model, --data, --encoder or --proj-coeff"
    with as_user_error(f"the model does not fit the checkpoint; perhaps {advice}"):
        for name, part in parts.items():
            if checkpoint[name]:  # the scaler has a state only in float16
                part.load_state_dict(checkpoint[name])
    parts["optimizer"].param_groups[0]["lr"] = learning_rate
    return checkpoint["step"], checkpoint["rows"]


def train(args, checkpoint=None):
    """Train as the options say, from the checkpoint on if there is one. Leaves checkpoint.pt,
    metrics.csv and samples_*.png in the folder args.output_dir."""
    device, dtype = pick_device(args.device, args.dtype)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    # The encoder, which fails early if it does not fit, and the images.
    encoder = None
    if args.proj_coeff > 0:
        grid_size = 32 // SIT_MODELS[args.model]["patch_size"]
        encoder = TargetEncoder(args.encoder, grid_size, args.encoder_weights).to(device)
    *tensors, classes = load_data(args.data)
    images, labels, val_images, val_labels = [tensor.to(device) for tensor in tensors]
    images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)  # mirror images

    # The model, its moving average (EMA) and the optimizer: new ones, or the checkpoint's.
    z_dim = 0 if encoder is None else encoder.embed_dim
    sit = dict(SIT_MODELS[args.model], num_classes=len(classes), z_dim=z_dim)
    if args.encoder_depth is not None:
        sit["encoder_depth"] = args.encoder_depth
    torch.manual_seed(seed_for("weights", args.seed))
    model = SiT(**sit).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    settings = dict(lr=args.learning_rate, weight_decay=0, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    start, rows = 0, []
    if checkpoint is not None:
        start, rows = restore(checkpoint, parts, args.learning_rate)
    if args.compile or (args.compile is None and device.type == "cuda"):
        # suppress_errors: if compiling fails, for example because there is no C compiler, torch
        # prints a warning and runs the model uncompiled.
        torch._dynamo.config.suppress_errors = True
        model.compile()
        ema.compile()
    cached_targets = None
    if encoder is not None and args.cache_targets:
        with autocast():
            cached_targets = compute_targets(encoder, images)
    folder = Path(args.output_dir)
    print(f"{args.model} on {device}, {len(images)} images with mirror images, in {folder}")

    history = defaultdict(list)  # what the steps since the last evaluation have logged
    steps = range(start, args.max_train_steps)
    for step in progress(steps, "training", initial=start, total=args.max_train_steps):
        # 1. A batch: images, noise, times and labels.
        x, noise, t, y, index = draw_batch(images, labels, len(classes), step, args)

        with autocast():
            # 2. The targets: what the encoder says about the clean images.
            z = None
            if encoder is not None and step < args.repa_stop_step:
                if cached_targets is not None:
                    z = cached_targets[index]
                else:
                    z = encoder(x)

            # 3. The loss: L = L_velocity + lambda L_REPA.
            l_velocity, l_repa = training_losses(model, x, noise, t, y, z, args.path_type)
            loss = l_velocity
            if z is not None:
                loss = l_velocity + args.proj_coeff * l_repa
                history["repa_loss"].append(l_repa.detach())

        # 4. The update of the weights and of their moving average.
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # the scaler does nothing unless dtype is float16
        if encoder is not None and z is None:
            # REPA has stopped, and the projector must not move. AdamW skips it if its gradients are
            # None, but compiled code makes them 0, and then momentum would still move it.
            model.projectors.zero_grad(set_to_none=True)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        update_ema(ema, model, step)
        history["loss"].append(loss.detach())
        history["velocity_loss"].append(l_velocity.detach())
        history["grad_norm"].append(grad_norm)

        # 5. Now and then: evaluate, save, draw. Reading a number makes the host wait for the
        # device, so it is done nowhere else.
        done = step + 1
        if done % args.eval_every == 0 or done == args.max_train_steps:
            row = {name: torch.stack(values).mean().item() for name, values in history.items()}
            history.clear()
            with autocast():
                # This raises a UserError, before anything is saved, if the loss is not finite.
                row.update(evaluate(ema, encoder, val_images, val_labels, args.path_type))
            rows.append({"step": done, **row})
            tqdm.write(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
            state = {name: part.state_dict() for name, part in parts.items()}
            # sample.py also needs the arguments of SiT and the names of the classes.
            state.update(step=done, rows=rows, config=vars(args), sit=sit, classes=classes)
            try:
                save(folder, state)
                with autocast():
                    draw_grid(ema, folder / f"samples_{done:07d}.png")
            except (UserError, OSError) as error:  # a full disk or, on Windows, an open file
                if done == args.max_train_steps:  # there is no next evaluation
                    raise
                tqdm.write(f"cannot save ({error}); the next evaluation will try again")


def main(argv=None):
    """Run the command line. A mistake of the user's ends the program with one sentence."""
    try:
        train(*parse_options(argv))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the memory is full; try a smaller --batch-size, or no --cache-targets")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()
