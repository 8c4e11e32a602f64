"""repa_mini: REPresentation Alignment for diffusion transformers, the whole method in one file.

REPA (Yu et al., ICLR 2025, arXiv 2410.06940) trains a diffusion transformer, here SiT, to predict
the velocity of a path from data to noise, and pulls an early hidden state of it, which sees a
*noisy* image, towards what a frozen self-supervised encoder says about the *clean* image:

    x_t        = alpha_t x + sigma_t eps                     interpolant: t = 0 is data, 1 is noise
    v          = alpha'_t x + sigma'_t eps                   its velocity (linear path: eps - x)
    L_velocity = mean || v_theta(x_t, t, y) - v ||^2
    L_REPA     = - mean over patches n of cos( y*[n], h_phi(h_t[n]) )
    L          = L_velocity + lambda L_REPA

y is the class, y* = encoder(x) the target, h_t the hidden state, h_phi the projector. To run it:
`python repa_mini.py --smoke` (a minute on a CPU) or `python repa_mini.py` (CIFAR-10, one GPU).
The sections named below are the paper's. sample.py shows what a trained model can do."""

import argparse
import copy
import csv
import io
import math
import random
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from timm.layers import GELUTanh, Mlp, PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Attention
from torch.optim import AdamW
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm


class UserError(ValueError):
    """A user's mistake, told in one sentence: `main` prints it without a traceback."""


# ---- 1. SiT (Ma et al. 2024, arXiv 2401.08740): a vision transformer conditioned by adaLN-Zero
class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        layers = nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(*layers)

    def forward(self, t):  # (N,) in [0, 1] -> (N, D)
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t.float()[:, None] * frequencies  # (N, 128), in float32 as the authors have it
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # float64 in a float64 model


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
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, out_features):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):  # tokens x (N, T, D), condition c (N, D) -> (N, T, p*p*C)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def xavier(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """SiT with REPA's projector. Keys and shapes of the state dict are the authors'.
    forward(x (N, C, H, W), t (N,), y (N,)) -> velocity (N, C, H, W), z_tilde (N, T, z_dim), with T
    patches. z_tilde is h_phi(h_t), the projected hidden state after block `encoder_depth`, or None
    if `z_dim` is 0. `num_classes` is also the null label, which draw_batch gives to dropped labels:
    forward itself draws nothing. Raises ValueError for a depth or a dropout that cannot be."""

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=3,
        hidden_size=384,
        depth=12,
        num_heads=6,
        num_classes=10,
        class_dropout_prob=0.1,
        encoder_depth=4,
        z_dim=384,
        projector_dim=2048,
    ):
        super().__init__()
        if not (1 <= encoder_depth <= depth and 0 <= class_dropout_prob < 1):
            raise UserError(f"give a block from 1 to {depth}, and a label dropout in [0, 1)")
        self.patch_size, self.grid_size = patch_size, input_size // patch_size
        self.num_classes, self.encoder_depth = num_classes, encoder_depth
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        label_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)
        self.y_embedder = nn.ModuleDict({"embedding_table": label_table})  # the authors' key
        table = build_sincos2d_pos_embed([self.grid_size, self.grid_size], hidden_size)  # (T, D)
        row_sin, column_sin, row_cos, column_cos = table.chunk(4, dim=1)  # timm's order
        table = torch.cat([column_sin, column_cos, row_sin, row_cos], dim=1)  # the authors' order
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        # Xavier for linear layers, std 0.02 for embeddings, zero for modulation and output.
        self.apply(xavier)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as a linear layer
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedding in (label_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        # The projector comes last: with and without REPA one seed draws the same SiT weights.
        self.projectors = nn.ModuleList()  # of one, named as the authors'
        if z_dim > 0:
            first = nn.Linear(hidden_size, projector_dim)
            second = nn.Linear(projector_dim, projector_dim)
            third = nn.Linear(projector_dim, z_dim)
            projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
            self.projectors.append(projector.apply(xavier))

    def unpatchify(self, tokens):  # (N, T, p*p*C) -> (N, C, H, W)
        g, p = self.grid_size, self.patch_size
        x = tokens.unflatten(1, (g, g)).unflatten(3, (p, p, -1))  # (N, row, column, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, row, p, column, p)
        return x.flatten(4, 5).flatten(2, 3)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)  # (N, D)
        z_tilde = None
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if i == self.encoder_depth and self.projectors:  # x is h_t, which REPA aligns
                z_tilde = self.projectors[0](x)
        return self.unpatchify(self.final_layer(x, c)), z_tilde


# The SiT paper's sizes with the REPA authors' encoder depths. Ti and its depth are ours (README).
SIT_SIZES = {
    "Ti": dict(hidden_size=128, depth=6, num_heads=4, encoder_depth=4),
    "S": dict(hidden_size=384, depth=12, num_heads=6, encoder_depth=4),
    "B": dict(hidden_size=768, depth=12, num_heads=12, encoder_depth=4),
    "L": dict(hidden_size=1024, depth=24, num_heads=16, encoder_depth=8),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16, encoder_depth=8),
}
SIT_MODELS = {}  # "SiT-S/2" and so on: the keyword arguments of SiT
for letter, size in SIT_SIZES.items():
    for patch_size in (2, 4, 8):
        SIT_MODELS[f"SiT-{letter}/{patch_size}"] = dict(size, patch_size=patch_size)


# ---- 2. Targets y*: a frozen encoder's view of the clean image, one token a patch (Section 3.3)
DEFAULT_ENCODER = "vit_small_patch14_dinov2.lvd142m"


def load_timm(name, weights=None, input_size=None, **options):
    """A timm model, with the weights of a local file if one is given, tried on one image of
    `input_size`: some take only images of their own size. Raises ValueError."""
    torch.manual_seed(2410)  # where no weights are loaded, the random ones are always the same
    try:
        if weights:
            state = timm.models.load_state_dict(weights, weights_only=True)  # executes nothing
            options.update(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state))
        model = timm.create_model(name, **options)
        if input_size:
            model.eval()(torch.zeros(1, 3, input_size, input_size))
        return model
    except Exception as error:  # timm, torch and the hub raise many types
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        advice = "check name, network or --encoder-weights (some encoders take one image size only)"
        raise UserError(f"cannot use encoder {name} {weights or ''}({why}): {advice}") from error


class TargetEncoder(nn.Module):
    """A frozen timm encoder: images (N, 3, H, W) in [-1, 1] -> tokens (N, grid_size^2, embed_dim).
    Images are resized so that the encoder's own grid is `grid_size`. A ViT gives its final-norm
    patch tokens without class and register tokens, a CNN its feature map at stride 16. `weights` is
    a local .safetensors or .pth file; without it timm downloads them, unless `pretrained` is False.
    `kwargs` change the architecture. Raises ValueError for what cannot be used or loaded."""

    def __init__(self, name=DEFAULT_ENCODER, grid_size=16, weights=None, pretrained=True, **kwargs):
        super().__init__()
        with torch.device("meta"):  # a look at the architecture, without memory or weights
            probe = load_timm(name, pretrained=False, **kwargs)
        is_vit = hasattr(probe, "num_prefix_tokens")
        layers = getattr(probe, "feature_info", [])  # of each block of a ViT, or stage of a CNN
        stride = layers[-1]["reduction"] if is_vit else 16  # pixels a token, along a side
        fitting = [i for i, layer in enumerate(layers) if layer["reduction"] == stride]
        if not fitting:
            raise UserError(f"encoder {name} has no feature map at stride 16: try another")
        self.layer, self.input_size = fitting[-1], grid_size * stride
        self.shape = grid_size**2, layers[self.layer]["num_chs"]  # of one image's tokens
        self.embed_dim = self.shape[1]
        if is_vit:
            kwargs["img_size"] = self.input_size
        # With num_classes=0 timm would let missing tensors pass: first load, then drop the head.
        self.model = load_timm(name, weights, self.input_size, pretrained=pretrained, **kwargs)
        self.model.reset_classifier(0)
        self.requires_grad_(False).eval()
        for key in ("mean", "std"):
            value = torch.tensor(probe.pretrained_cfg[key]).view(3, 1, 1)
            self.register_buffer(key, value, persistent=False)

    def preprocess(self, images):
        """(N, 3, H, W) in [-1, 1] -> normalised, resized (bicubic, as the authors do)."""
        x = ((images + 1) / 2 - self.mean) / self.std
        return F.interpolate(x, size=(self.input_size, self.input_size), mode="bicubic")

    @torch.no_grad()
    def forward(self, images):
        options = dict(indices=[self.layer], norm=True, intermediates_only=True, stop_early=True)
        (x,) = self.model.forward_intermediates(self.preprocess(images), **options)
        return x.flatten(2).transpose(1, 2)  # (N, D, g, g) -> (N, g*g, D)


# ---- 3. Losses
def at_least_float32(x):  # squares of half-precision numbers over- and underflow
    return x.to(torch.promote_types(x.dtype, torch.float32))


def interpolant(t, path_type="linear"):
    """alpha, sigma and their time derivatives, in t's shape: t = 0 is data, 1 noise (Section 2).
    Raises ValueError for a path that is neither "linear" nor "cosine"."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path_type == "cosine":
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha
    raise UserError(f"path type {path_type} is unknown; choose linear or cosine")


def repa_loss(z_tilde, z):
    """L_REPA = - mean over patches n of cos(z[n], z_tilde[n]), both (..., D) (Section 3.3).
    A scalar in [-1, 1]. The encoder's side z is a constant."""
    z_tilde, z = at_least_float32(z_tilde), at_least_float32(z.detach())
    return -F.cosine_similarity(z_tilde, z, dim=-1).mean()


def training_losses(model, x, noise, t, y, z=None, path_type="linear"):
    """L_velocity and L_REPA, two scalars (Sections 2 and 3.3); without z the second is None.
    x: clean images (N, C, H, W); noise like x; t: (N,) in [0, 1]; y: labels (N,), of which the
    caller has dropped some; z: targets (N, T, D). The loss is L_velocity + lambda L_REPA."""
    alpha, sigma, d_alpha, d_sigma = interpolant(t.view(-1, 1, 1, 1), path_type)
    x_t = alpha * x + sigma * noise
    v = d_alpha * x + d_sigma * noise
    v_theta, z_tilde = model(x_t, t, y)
    velocity_loss = F.mse_loss(at_least_float32(v_theta), v)
    if z is None:
        return velocity_loss, None
    return velocity_loss, repa_loss(z_tilde, z)


# ---- 4. Sampler: from noise at t = 1 to an image at t = 0
def guided_velocity(model, x, t, y, scale):
    """Classifier-free guidance (Ho & Salimans 2022): v_null + scale (v_y - v_null); 1 is none.
    x: (N, C, H, W); t: a number in [0, 1]; y: (N,). `model(x, t, y)` returns (velocity, ...)."""
    if scale != 1:  # with the class and without it, in one batch
        x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, model.num_classes)])
    v = model(x, x.new_full((len(x),), t), y)[0].to(x.dtype)
    if scale == 1:
        return v
    v_y, v_null = v.chunk(2)
    return v_null + scale * (v_y - v_null)


@torch.no_grad()
def sample_ode(
    model, noise, y, num_steps=50, heun=False, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0
):
    """Integrate dx/dt = v_theta(x, t, y) from t = 1 to 0 with Euler's or Heun's method (Section 2).
    noise: x(1), (N, C, H, W); y: (N,). Returns x(0) in noise's shape and dtype. Guidance acts in
    the steps that start at guidance_low <= t <= guidance_high (Kynkäänniemi et al. 2024)."""
    times = [1 - i / num_steps for i in range(num_steps + 1)]
    x = noise
    for t, t_next in tqdm(list(zip(times, times[1:])), "sampling", leave=False):
        scale = cfg_scale if guidance_low <= t <= guidance_high else 1
        v = guided_velocity(model, x, t, y, scale)
        if heun and t_next > 0:  # the last step stays Euler's, as the authors have it
            v_next = guided_velocity(model, x + (t_next - t) * v, t_next, y, scale)
            v = (v + v_next) / 2
        x = x + (t_next - t) * v
    return x


# ---- 5. Data: a split is one uint8 tensor (N, 3, 32, 32), small enough to live on the device
# The ten classes of --smoke: number of corners (40: a disc), and degrees by which they are turned.
POLYGONS = [(3, 0), (3, 180), (4, 0), (4, 45), (5, 0), (5, 180), (6, 0), (6, 30), (8, 0), (40, 0)]


def to_unit(pixels):  # uint8 -> float in [-1, 1]
    return pixels.float() / 127.5 - 1


def to_pixels(x):  # float in [-1, 1] -> uint8
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_shapes(n, seed):
    """n images (n, 3, 32, 32) uint8 and labels (n,): class k is POLYGONS[k] in the hue k/10."""
    rng = random.Random(seed)
    images, labels = [], torch.arange(n) % len(POLYGONS)
    for label in labels.tolist():
        circle = (rng.uniform(48, 80), rng.uniform(48, 80), rng.uniform(34, 46))  # centre, radius
        colour = f"hsv({36 * label}, {rng.uniform(80, 100)}%, {rng.uniform(70, 100)}%)"
        image = Image.new("RGB", (128, 128), f"hsv(0, 0%, {rng.uniform(0, 40)}%)")
        corners, degrees = POLYGONS[label]
        ImageDraw.Draw(image).regular_polygon(circle, corners, degrees, fill=colour)
        images.append(pil_to_tensor(image.reduce(4)))  # to 32 x 32, with soft edges
    return torch.stack(images), labels


def read_image(path):
    """An upright image, cropped to its middle square: (3, 32, 32) uint8. Raises ValueError."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # Pillow raises many types
        raise UserError(f"cannot read {path} ({error}): mend it or take it out") from error
    return pil_to_tensor(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC))


def load_split(dataset):
    """A dataset of pairs (uint8 tensor, label) -> images (N, 3, 32, 32), labels (N,)."""
    images, labels = zip(*tqdm(dataset, "loading images"))
    return torch.stack(images), torch.tensor(labels)


def load_data(folder=None, smoke=False):
    """A folder of images, the built-in shapes, or CIFAR-10 (downloaded once, to ./data).
    Returns training images (N, 3, 32, 32) uint8 and labels (N,), held-out images and labels, and
    class names. Of a folder without train/ and test/ every 50th image is held out."""
    if folder and Path(folder, "train").is_dir():
        train = ImageFolder(Path(folder, "train"), loader=read_image)
        test = ImageFolder(Path(folder, "test"), loader=read_image)
        if train.classes != test.classes:
            raise UserError(f"{folder}: train/ has {train.classes}, test/ {test.classes}")
        return *load_split(train), *load_split(test), train.classes
    if folder:
        listing = ImageFolder(folder, loader=read_image)
        images, labels = load_split(listing)
        val = torch.arange(len(images)) % 50 == 0
        return images[~val], labels[~val], images[val], labels[val], listing.classes
    if smoke:
        return *draw_shapes(4000, seed=0), *draw_shapes(200, seed=1), list("0123456789")
    try:
        train = CIFAR10("data", train=True, transform=pil_to_tensor, download=True)
        test = CIFAR10("data", train=False, transform=pil_to_tensor, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download CIFAR-10 ({error}): try --data or --smoke") from error
    return *load_split(train), *load_split(test), train.classes


# ---- 6. Training
# What random numbers are drawn for; the last two in sample.py.
USES = ["weights", "order", "batch", "grid", "evaluation", "sample", "sde"]


def seed_for(use, seed, number=0):
    """A seed of its own for each use, such as the batch of step `number`: the digits of the run's
    seed, seven of number, one of use. seed_for("batch", 3, 12) is 3 0000012 2."""
    return (10 * (10_000_000 * seed + number) + USES.index(use)) % 2**63


def draw_batch(images, labels, step, null_label, args):
    """All that is random in a training step, from the seed and the step alone: a resumed run gets
    the batches of an uninterrupted one, and a run with REPA those of a run without.
    Returns x (N, 3, 32, 32) in [-1, 1], noise like x, t (N,) in [0, 1], labels y (N,) of which some
    are dropped, index (N,) of the images, and flip (N,), True where an image is mirrored."""
    n, device = args.batch_size, images.device
    epoch, i = divmod(step, len(images) // n)  # a last batch that would not be full is left out
    # Each step draws its epoch's order anew, so that a resumed run need not remember it.
    g = torch.Generator(device).manual_seed(seed_for("order", args.seed, epoch))
    index = torch.randperm(len(images), generator=g, device=device)[i * n : (i + 1) * n]
    g = torch.Generator(device).manual_seed(seed_for("batch", args.seed, step))
    flip = torch.rand(n, generator=g, device=device) < 0.5
    x = to_unit(images[index])
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    noise = torch.randn(x.shape, generator=g, device=device)
    t = torch.rand(n, generator=g, device=device)
    dropped = torch.rand(n, generator=g, device=device) < args.cfg_prob
    return x, noise, t, torch.where(dropped, null_label, labels[index]), index, flip


def pick_device(name, dtype=None):
    """The named device (ValueError if it is not here; default: the accelerator or the CPU), dtype
    (default: bfloat16 on CUDA, float16 on a T4, else float32), and autocast to it, for all uses."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name or here)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each backend has its own types for a device that is not there
        raise UserError(f"device {name} is not here; {here} is") from error
    if dtype is None and device.type == "cuda":
        dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    dtype = getattr(torch, dtype or "float32")
    return device, dtype, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_in_place(modules, device):
    """torch.compile every module, after a trial: ValueError if the machine lacks a compiler."""
    try:
        torch.compile(nn.SiLU())(torch.ones(2, device=device))  # the trial
    except Exception as error:  # a missing C compiler or Triton shows in many types
        raise UserError("torch.compile does not work on this machine: --no-compile") from error
    for module in modules:
        module.compile()
    print("compiling in the first step, about a minute")


@torch.no_grad()
def compute_targets(encoder, images, autocast):
    """Tokens (N, T, D) of all uint8 images, in half precision, where the images lie.
    Raises ValueError if there is no room for them."""
    shape = (len(images), *encoder.shape)
    try:
        targets = torch.empty(shape, dtype=torch.float16, device=images.device)
    except RuntimeError as error:
        size = f"{2e-9 * math.prod(shape):.1f} GB of targets"  # two bytes a number
        raise UserError(f"no room for {size}: leave out --cache-targets") from error
    for i in tqdm(range(0, len(images), 100), "computing targets"):
        with autocast:
            targets[i : i + 100] = encoder(to_unit(images[i : i + 100]))
    return targets


@torch.no_grad()
def evaluate(model, images, labels, targets, path_type, autocast):
    """Held-out velocity loss and, with targets (N, T, D), mean patch cosine, as {name: number}.
    Noise and times are the same in every evaluation of every run. All images are one batch."""
    g = torch.Generator().manual_seed(seed_for("evaluation", seed=0))
    noise = torch.randn(images.shape, generator=g).to(images.device)
    t = torch.rand(len(images), generator=g).to(images.device)
    with autocast:
        losses = training_losses(model, to_unit(images), noise, t, labels, targets, path_type)
    if targets is None:
        return dict(val_velocity_loss=losses[0].item())
    return dict(val_velocity_loss=losses[0].item(), val_alignment=-losses[1].item())


def means(history, scaled):
    """{name: mean} of {name: [numbers of the steps since the last row]}. All must be finite, or it
    raises ValueError. But fp16's GradScaler (`scaled`) skips steps whose gradients overflow: there
    all but the loss may be infinite, and is left out."""
    result = {}
    for name, values in history.items():
        values = torch.stack(values).cpu()
        finite = values[values.isfinite()]
        if len(finite) < len(values) and (name == "loss" or not scaled):
            raise UserError(f"{name} is no longer finite: try a smaller --learning-rate")
        if len(finite) > 0:
            result[name] = finite.mean().item()
    return result


def write_metrics(path, rows):
    """Rows {column: number} as CSV; its columns are what has been logged so far."""
    columns = dict.fromkeys(name for row in rows for name in row)  # each once, in order
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def save_checkpoint(path, state):
    """Write to a temporary file, rename: `path` always holds one complete checkpoint."""
    buffer, part = io.BytesIO(), path.with_suffix(".part")
    torch.save(state, buffer)  # to the file itself it would not raise OSError on a full disk
    part.write_bytes(buffer.getbuffer())
    part.replace(path)


def load_checkpoint(path, mmap=False):
    """A checkpoint, on the CPU; nothing in it is executed, with mmap only what is used is read."""
    open(path, "rb").close()  # raises if there is no such file, or a folder, or no permission
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch, zip and pickle raise many types
        raise UserError(f"{path} is truncated, no checkpoint, or would execute code") from error
    if not isinstance(state, dict) or "ema" not in state:
        raise UserError(f"{path} is no checkpoint of repa_mini.py")
    return state


def train(args):
    """Train as the options say, with --resume from the checkpoint in that folder on."""
    state = load_checkpoint(Path(args.resume, "checkpoint.pt")) if args.resume else {}
    device, dtype, autocast = pick_device(args.device, args.dtype)
    torch.set_float32_matmul_precision("high")  # TF32

    # Encoder and data. All pixels stay on the device.
    encoder = None
    if args.proj_coeff > 0:
        grid_size = 32 // SIT_MODELS[args.model]["patch_size"]
        encoder = TargetEncoder(
            args.encoder, grid_size, args.encoder_weights, pretrained=not args.smoke
        ).to(device)  # --smoke downloads nothing
    *splits, classes = load_data(args.data, args.smoke)
    images, labels, val_images, val_labels = [tensor.to(device) for tensor in splits]
    if args.batch_size > len(images):
        raise UserError(f"--batch-size {args.batch_size} is more than the {len(images)} images")
    data = dict(images=len(images), classes=classes)
    if state and data != state["data"]:
        raise UserError(f"the checkpoint was trained on {state['data']}, here are {data}")
    every = math.ceil(len(val_images) / 1000)  # at most 1,000 are looked at, in one batch
    val_images, val_labels = val_images[::every], val_labels[::every]
    val_targets = compute_targets(encoder, val_images, autocast) if encoder else None

    # The model, its moving average, the optimizer, and how far they have come.
    torch.manual_seed(seed_for("weights", args.seed))
    sit = dict(SIT_MODELS[args.model], num_classes=len(classes), class_dropout_prob=args.cfg_prob)
    sit.update(encoder_depth=args.encoder_depth, projector_dim=args.projector_dim)
    sit["z_dim"] = encoder.embed_dim if encoder else 0
    model = SiT(**sit).to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = AdamW(model.parameters(), args.learning_rate, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    start, rows = state.get("step", 0), state.get("rows", [])
    for name, part in parts.items():
        if state.get(name):  # a scaler that was off has no state
            part.load_state_dict(state[name])
    del state  # its tensors have been copied: they need not stay in memory
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=bool(args.resume))
    print(f"{args.model} on {device}, {len(images)} images, in {folder}")
    if args.compile or (args.compile is None and device.type == "cuda"):
        compile_in_place([m for m in (model, ema, encoder) if m], device)
    if encoder and args.cache_targets:
        cached = compute_targets(encoder, images, autocast)
        cached_flipped = compute_targets(encoder, images.flip(-1), autocast)
    grid_labels = torch.arange(min(10, len(classes)), device=device).repeat_interleave(10)
    g = torch.Generator().manual_seed(seed_for("grid", seed=0))
    grid_noise = torch.randn(len(grid_labels), 3, 32, 32, generator=g).to(device)

    history = {}  # what the steps since the last row have logged
    bar = tqdm(range(start, args.max_train_steps), "training", initial=start)
    for step in bar:
        # 1. A batch: clean images, noise, times, labels, of which some are dropped.
        x, noise, t, y, index, flip = draw_batch(images, labels, step, len(classes), args)

        # 2. The losses: L = L_velocity + lambda L_REPA.
        with autocast:
            if encoder is None or step >= args.repa_stop_step:
                z = None
            elif args.cache_targets:
                z = torch.where(flip[:, None, None], cached_flipped[index], cached[index])
            else:
                z = encoder(x)
            model.projectors.requires_grad_(z is not None)  # frozen without targets
            velocity_loss, proj_loss = training_losses(model, x, noise, t, y, z, args.path_type)
        loss = velocity_loss
        logged = dict(velocity_loss=velocity_loss)
        if z is not None:
            loss = loss + args.proj_coeff * proj_loss
            logged["repa_loss"] = proj_loss

        # 3. The update, and the moving average of the weights, which evaluation and sampling use.
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        decay = min(0.9999, (1 + step) / (10 + step))  # small at first, to forget the start
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 1 - decay)  # decay average + (1 - decay) p
        logged.update(loss=loss, grad_norm=grad_norm)
        for name, value in logged.items():
            history.setdefault(name, []).append(value.detach())

        # 4. Now and then: log, evaluate, save. Only here does the host wait for the device.
        done, row = step + 1, {}
        last = done == args.max_train_steps
        save = last or done % args.checkpointing_steps == 0
        if save or done % args.log_every == 0:
            row |= means(history, scaler.is_enabled())  # raises: no NaN is ever saved
            history.clear()
        if last or done % args.eval_every == 0:
            row |= evaluate(ema, val_images, val_labels, val_targets, args.path_type, autocast)
            with autocast:
                samples = sample_ode(ema, grid_noise, grid_labels)
            save_image(to_pixels(samples) / 255, folder / f"samples_{done:07d}.png", nrow=10)
        if row:
            rows.append({"step": done, **row})
            write_metrics(folder / "metrics.csv", rows)
            bar.write(", ".join(f"{name} {value:.5g}" for name, value in rows[-1].items()))
        if save:
            state = {name: part.state_dict() for name, part in parts.items()}
            state.update(config=vars(args), sit=sit, data=data, step=done, rows=rows)
            save_checkpoint(folder / "checkpoint.pt", state)


# ---- 7. Command line
SMOKE = dict(model="SiT-Ti/4", encoder="test_vit", projector_dim=512, batch_size=16, device="cpu")
SMOKE.update(learning_rate=2e-3, max_train_steps=200, log_every=40)  # test_vit: timm's tiny ViT
# Options that --resume may change: they move a run, or lengthen it, and leave it what it is.
FREE_ON_RESUME = ["resume", "output_dir", "data", "encoder_weights", "device", "dtype", "compile"]
FREE_ON_RESUME += ["max_train_steps", "log_every", "eval_every", "checkpointing_steps"]


def count(text):  # for argparse's type=
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def number(text):  # for argparse's type=
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return float(text)


def build_parser():
    # Without the usage an error is a single line.
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a run of a minute on a CPU, without any download")
    add("--data", metavar="DIR", help="of <class>/<image>, or of train/ and test/ with that")
    add("--model", default="SiT-S/2", choices=SIT_MODELS, metavar="M", help=", ".join(SIT_MODELS))
    add("--encoder", default=DEFAULT_ENCODER, help="a timm ViT or CNN; timm.list_models() has them")
    add("--encoder-weights", metavar="FILE", help=".safetensors or .pth (default: a download)")
    add("--encoder-depth", type=count, help="aligned block, from 1 (default: the model's)")
    add("--projector-dim", type=count, default=2048, help="width of the projector")
    add("--proj-coeff", type=number, default=0.5, help="lambda; 0 is the vanilla SiT")
    add("--repa-stop-step", type=count, default=math.inf, help="no REPA loss from this step on")
    add("--cache-targets", action="store_true", help="compute all targets once, keep them")
    add("--path-type", default="linear", choices=["linear", "cosine"], help="the interpolant")
    add("--cfg-prob", type=number, default=0.1, help="label dropout, for guidance")
    add("--batch-size", type=count, default=256, help="images a step")
    add("--learning-rate", type=number, default=1e-4, help="AdamW's, constant")
    add("--max-train-steps", type=count, default=100_000, help="length of the run")
    add("--log-every", type=count, default=100, help="steps between means in metrics.csv")
    add("--eval-every", type=count, default=5000, help="steps between evaluations and grids")
    add("--checkpointing-steps", type=count, default=1000, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of all but evaluation")
    add("--device", help="cuda, mps, cpu (default: the first there is)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: the device's best)")
    add("--compile", action=argparse.BooleanOptionalAction, help="(default: on CUDA)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output-dir", metavar="DIR", help="a new folder (default: one in runs/)")
    place.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    return parser


def run(argv):
    """Parse and train. An option is what was typed; or else what the checkpoint of --resume has; or
    else what --smoke has; or else the parser's default."""
    parser = build_parser()
    args = parser.parse_args(argv)  # a first look: is there --smoke or --resume?
    if args.smoke:
        parser.set_defaults(**SMOKE)
    config = {}
    if args.resume:
        config = load_checkpoint(Path(args.resume, "checkpoint.pt"), mmap=True)["config"]
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    for name, value in config.items():
        if name not in FREE_ON_RESUME and getattr(args, name) != value:
            raise UserError(f"the checkpoint has another {name}, {value}: leave it out")
    args.encoder_depth = args.encoder_depth or SIT_MODELS[args.model]["encoder_depth"]
    args.output_dir = args.resume or args.output_dir or time.strftime("runs/%Y%m%d-%H%M%S")
    if not args.resume and Path(args.output_dir).exists():
        raise UserError(f"{args.output_dir} is there: --resume it, or give another --output-dir")
    try:
        train(args)
    except KeyboardInterrupt:
        saved = Path(args.output_dir, "checkpoint.pt").exists()
        way_on = f"--resume {args.output_dir} goes on from its last checkpoint"
        print(f"stopped; {way_on if saved else 'there is no checkpoint yet'}")
        raise


def main(argv=None, program=run):
    """Run this program, or sample.py's. Returns the exit code: 0, 2 (a mistake), 130 (stopped)."""
    try:
        program(argv)
        return 0
    except SystemExit as stop:  # argparse has printed its sentence, or the help
        return stop.code
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError:
        message = "the device's memory is full: try a smaller --batch-size or --model"
    except (UserError, OSError) as error:
        message = error
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
