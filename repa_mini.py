"""repa_mini: REPresentation Alignment for diffusion transformers, the whole method in one file.

REPA (Yu et al., ICLR 2025, arXiv 2410.06940) trains a diffusion transformer, here SiT, to predict the velocity of a
path from data to noise, and pulls an early hidden state of it, which sees a *noisy* image, towards what a frozen
self-supervised encoder says about the *clean* image:

    x_t        = alpha_t x + sigma_t eps                         interpolant: t = 0 is data, t = 1 is noise
    v          = alpha'_t x + sigma'_t eps                       its velocity (linear path: v = eps - x)
    L_velocity = mean || v_theta(x_t, t, y) - v ||^2
    L_REPA     = - mean over patches n of cos( y*[n], h_phi(h_t[n]) )       y* = encoder(x), h_phi = projector
    L          = L_velocity + lambda L_REPA

Run `python repa_mini.py --smoke` (a minute on a CPU, no download) or `python repa_mini.py` (CIFAR-10, one GPU)."""

import argparse
import colorsys
import copy
import math
import os
import signal
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm


class UserError(ValueError):
    """A mistake of the user's, as a sentence: what was given, what is allowed, what to do."""


# ---- 1. SiT (Ma et al. 2024, arXiv 2401.08740): a vision transformer conditioned by adaLN-Zero, and REPA's projector
class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        """t (N,) in [0, 1] -> (N, D): 128 cosines and sines, then a two-layer MLP."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t.float()[:, None] * frequencies  # (N, 128), in float32 as the authors have it
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y):
        """y (N,) -> (N, D). In training y becomes the null label `num_classes` with probability `dropout_prob`."""
        if self.training and self.dropout_prob > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout_prob, self.num_classes, y)
        return self.embedding_table(y)


def modulate(x, shift, scale):  # x (N, T, D); shift and scale (N, D), the same for every token
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        """x (N, T, D) -> (N, T, D); shifts, scales and gates are made of the condition c (N, D) and start at zero."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # each (N, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, out_features):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        """Tokens x (N, T, D), condition c (N, D) -> (N, T, patch_size^2 * channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_position_table(hidden_size, grid_size):
    """Fixed 2-D sine-cosine table (grid_size^2, hidden_size): first half columns, second half rows (as in MAE)."""
    quarter = hidden_size // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, D/2)
    columns, rows = axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, dim=0)  # token = row * grid + column
    return torch.cat([columns, rows], dim=1).float()


def xavier(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """SiT with REPA's projector. Keys and shapes of the state dict are the authors', so checkpoints interchange.
    forward(x (N, C, H, W), t (N,), y (N,)) -> velocity (N, C, H, W), z_tilde (N, T, z_dim), with T patches. z_tilde is
    the hidden state after block `encoder_depth`, projected; with `z_dim=0` there is no projector and z_tilde is None.
    `num_classes` is also the null label. Raises ValueError for an encoder depth or a label dropout that cannot be."""

    def __init__(self, input_size=32, patch_size=2, in_channels=3, hidden_size=384, depth=12, num_heads=6,
                 num_classes=10, class_dropout_prob=0.1, encoder_depth=4, z_dim=384, projector_dim=2048):  # fmt: skip
        super().__init__()
        if not (1 <= encoder_depth <= depth and 0 <= class_dropout_prob < 1):
            raise UserError(f"depth {encoder_depth} not in 1..{depth} or dropout {class_dropout_prob} not in [0, 1)")
        self.in_channels, self.patch_size, self.grid_size = in_channels, patch_size, input_size // patch_size
        self.num_classes, self.class_dropout_prob, self.encoder_depth = num_classes, class_dropout_prob, encoder_depth
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_position_table(hidden_size, self.grid_size)[None], requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        # Xavier for linear layers, std 0.02 for embeddings, zero for modulation and output (adaLN-Zero).
        self.apply(xavier)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        # The projector comes last, so that with and without REPA one seed draws the same SiT weights.
        self.projectors = nn.ModuleList()
        if z_dim > 0:
            widths = [hidden_size, projector_dim, projector_dim, z_dim]
            first, second, third = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
            self.projectors.append(nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third).apply(xavier))

    def unpatchify(self, tokens):
        """(N, T, p*p*C) -> (N, C, H, W)."""
        n, g, p, c = len(tokens), self.grid_size, self.patch_size, self.in_channels
        x = tokens.reshape(n, g, g, p, p, c)  # row, column, row in patch, column in patch, channel
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, g * p, g * p)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        z_tilde = None
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if i == self.encoder_depth and self.projectors:  # h_t, the hidden state that REPA aligns
                z_tilde = self.projectors[0](x)
        return self.unpatchify(self.final_layer(x, c)), z_tilde


# The sizes of the SiT paper with REPA's encoder depths, and a Ti for laptops.
NAMES = ("hidden_size", "depth", "num_heads", "encoder_depth")
SIZES = dict(Ti=(128, 6, 4, 2), S=(384, 12, 6, 4), B=(768, 12, 12, 4), L=(1024, 24, 16, 8), XL=(1152, 28, 16, 8))
SIT_MODELS = {f"SiT-{s}/{p}": dict(zip(NAMES, size), patch_size=p) for s, size in SIZES.items() for p in (2, 4, 8)}


# ---- 2. Targets: what a frozen encoder says about the clean image, one token per SiT patch (the paper's Section 3.3)
DEFAULT_ENCODER = "vit_small_patch14_dinov2.lvd142m"
TINY_DINOV2 = dict(pretrained=False, embed_dim=64, depth=2, num_heads=2)  # with seeded random weights, for --smoke


class TargetEncoder(nn.Module):
    """A frozen timm encoder: images (N, 3, H, W) in [-1, 1] -> patch tokens (N, grid_size^2, embed_dim).
    Images are normalised and resized (bicubic, as the authors do) so that the encoder's own grid is grid_size. A ViT
    gives its final-norm tokens without class and register tokens, a CNN its feature map at stride 16. `weights` is a
    local .safetensors or .pth file, of which nothing is executed; without it timm downloads them. `timm_kwargs` change
    the architecture. Raises ValueError for an unknown encoder, a file that does not fit and a failed download."""

    def __init__(self, name=DEFAULT_ENCODER, grid_size=16, weights=None, pretrained=True, **timm_kwargs):
        super().__init__()
        try:
            with torch.device("meta"):  # a look at the architecture, without memory or weights
                probe = timm.create_model(name, pretrained=False, **timm_kwargs)
            self.is_vit = hasattr(probe, "patch_embed") and hasattr(probe, "num_prefix_tokens")
            if self.is_vit:
                self.input_size, self.embed_dim = grid_size * probe.patch_embed.patch_size[0], probe.embed_dim
                timm_kwargs["img_size"] = self.input_size
            else:
                self.stage = max(i for i, stage in enumerate(probe.feature_info) if stage["reduction"] == 16)
                self.input_size, self.embed_dim = grid_size * 16, probe.feature_info[self.stage]["num_chs"]
            if weights:
                state = timm.models.load_state_dict(weights, weights_only=True)
                timm_kwargs["pretrained_cfg_overlay"] = dict(state_dict=state or {"": None})  # {}: timm would download
            self.model = timm.create_model(name, pretrained=bool(weights) or pretrained, **timm_kwargs)
            self.model.reset_classifier(0)  # not before: with num_classes=0 timm lets missing tensors pass
            self.requires_grad_(False).eval()
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(probe.pretrained_cfg[key]).view(3, 1, 1), persistent=False)
            self.shape = (grid_size**2, self.embed_dim)  # of one image's tokens
            self(torch.zeros(1, 3, 32, 32)).view(1, *self.shape)  # fails with an encoder whose input size is fixed
        except Exception as error:  # timm raises many types
            advice = "give exactly its tensors" if weights else "check network; try another, --encoder-weights, --smoke"
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(f"cannot make encoder {name} from {weights or 'the network'} ({why}): {advice}") from error

    def train(self, mode=True):
        return super().train(False)  # frozen: dropout and batch statistics stay in evaluation mode

    @torch.no_grad()
    def forward(self, images):
        x = ((images + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bicubic")
        if self.is_vit:
            return self.model.forward_features(x)[:, self.model.num_prefix_tokens :]
        (x,) = self.model.forward_intermediates(x, indices=[self.stage], intermediates_only=True, stop_early=True)
        return x.flatten(2).transpose(1, 2)  # (N, D, g, g) -> (N, g*g, D)


# ---- 3. Losses
def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def interpolant(t, path_type="linear"):
    """alpha, sigma and their time derivatives at t, in t's shape: t = 0 is data, t = 1 is noise (Section 2)."""
    t = at_least_float32(t)
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path_type == "cosine":
        angle = t * math.pi / 2
        return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()
    raise UserError(f"path type {path_type} is unknown; choose linear or cosine")


def repa_loss(z_tilde, z):
    """L_REPA = - mean over patches of cos(z[n], z_tilde[n]); both (..., D); a scalar in [-1, 1] (Section 3.3).
    In float32 or better whatever comes in: squared lengths of half-precision tokens over- and underflow."""
    z_tilde = F.normalize(at_least_float32(z_tilde), dim=-1)
    z = F.normalize(at_least_float32(z.detach()), dim=-1)
    return -(z_tilde * z).sum(dim=-1).mean()


def training_losses(model, x, noise, t, y, z=None, path_type="linear"):
    """(L_velocity, L_REPA) for clean images x and noise (N, C, H, W), times t and labels y (N,), targets z (N, T, D).
    Without z the second is NaN, not measured. The loss is their sum, the second weighted with lambda."""
    alpha, sigma, d_alpha, d_sigma = interpolant(t.view(-1, 1, 1, 1), path_type)
    x_t = alpha * x + sigma * noise
    v = d_alpha * x + d_sigma * noise
    v_theta, z_tilde = model(x_t, t, y)
    velocity_loss = F.mse_loss(at_least_float32(v_theta), v)
    return velocity_loss, torch.full_like(velocity_loss, torch.nan) if z is None else repa_loss(z_tilde, z)


# ---- 4. Samplers: from noise at t = 1 to an image at t = 0, in float64 (float32 where a device has none)
def guided_velocity(model, x, t, y, cfg_scale, dtype):
    """Classifier-free guidance, v_null + scale (v_y - v_null): x (N, C, H, W), t a number, y (N,); model in `dtype`."""
    x_in, t_in = x.to(dtype), torch.full((len(x),), t, dtype=dtype, device=x.device)
    if cfg_scale == 1:
        return model(x_in, t_in, y)[0].to(x.dtype)
    y_both = torch.cat([y, torch.full_like(y, model.num_classes)])
    v, v_null = model(torch.cat([x_in, x_in]), torch.cat([t_in, t_in]), y_both)[0].to(x.dtype).chunk(2)
    return v_null + cfg_scale * (v - v_null)


def sampling_steps(model, noise, y, times, cfg_scale, low, high):
    """x(1) (N, C, H, W) in float64 (float32 on MPS, which has none); [(t, t_next, scale), ...]. Raises ValueError."""
    if not (len(times) > 1 and 0 <= low <= high <= 1 and math.isfinite(cfg_scale)):
        given = f"{len(times) - 1} steps, guidance {cfg_scale} for {low} <= t <= {high}"
        raise UserError(f"{given}: give 1 step or more, a number, and 0 <= low <= high <= 1")
    if cfg_scale != 1 and getattr(model, "class_dropout_prob", None) == 0:
        raise UserError(f"guidance scale {cfg_scale} needs a model trained with label dropout; for this one give 1")
    if y.min() < 0 or y.max() >= model.num_classes + (getattr(model, "class_dropout_prob", 1) > 0):  # the null label
        raise UserError(f"classes {y.min()} to {y.max()} were asked for; give 0 to {model.num_classes - 1}")
    scales = [cfg_scale if low <= t <= high else 1.0 for t in times]
    return noise.to(torch.float32 if noise.device.type == "mps" else torch.float64), list(zip(times, times[1:], scales))


@torch.no_grad()
def sample_ode(model, noise, y, num_steps=50, heun=False, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0):
    """Integrate dx/dt = v_theta(x, t, y) from t = 1 to 0 with Euler's or Heun's method.
    noise: (N, C, H, W) = x(1); y: (N,). Returns x(0) in noise's shape and dtype. Guidance acts in the steps that
    start at guidance_low <= t <= guidance_high. `model(x, t, y)` returns (velocity, ...). Raises ValueError."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    x, steps = sampling_steps(model, noise, y, times, cfg_scale, guidance_low, guidance_high)
    for t, t_next, scale in tqdm(steps, "sampling", leave=False):
        v = guided_velocity(model, x, t, y, scale, noise.dtype)
        if heun and t_next > 0:  # the last step stays Euler's, as the authors have it
            v = (v + guided_velocity(model, x + (t_next - t) * v, t_next, y, scale, noise.dtype)) / 2
        x = x + (t_next - t) * v
    return x.to(noise.dtype)


def score_from_velocity(v, x, t, path_type="linear"):
    """grad log p_t(x) = (r v - x) / (sigma^2 - r sigma' sigma) with r = alpha / alpha', for t > 0 (Section 2)."""
    alpha, sigma, d_alpha, d_sigma = interpolant(torch.as_tensor(t, dtype=x.dtype, device=x.device), path_type)
    r = alpha / d_alpha
    return (r * v - x) / (sigma**2 - r * d_sigma * sigma)


@torch.no_grad()
def sample_sde(model, noise, y, num_steps=250, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0,
               path_type="linear", generator=None):  # fmt: skip
    """Euler-Maruyama on dx = (v - w_t/2 score) dt + sqrt(w_t) dW backwards in time, with w_t = 2t on both paths.
    Arguments, result and errors as for `sample_ode`. num_steps - 1 noisy steps run from t = 1 to 0.04, then one
    without noise to 0. `generator`, on noise's device, makes the noise reproducible."""
    times = [*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]
    x, steps = sampling_steps(model, noise, y, times, cfg_scale, guidance_low, guidance_high)
    for t, t_next, scale in tqdm(steps, "sampling", leave=False):
        v = guided_velocity(model, x, t, y, scale, noise.dtype)
        w = 2 * t
        x = x + (t_next - t) * (v - w / 2 * score_from_velocity(v, x, t, path_type))
        if t_next > 0:
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + math.sqrt(w * (t - t_next)) * eps
    return x.to(noise.dtype)


# ---- 5. Data: every split is one uint8 tensor (N, 3, 32, 32), small enough to live on the device
SHAPES = dict(disc=(1, 1, 2), square=(0.8, 0.8, 9), diamond=(1.1, 1.1, 1), star=(1.3, 1.3, 0.6))  # widths, exponent
SHAPES |= dict(wide_disc=(1.2, 0.5, 2), tall_disc=(0.5, 1.2, 2), wide_bar=(1.1, 0.35, 9), tall_bar=(0.35, 1.1, 9))
SHAPES |= dict(wide_diamond=(1.3, 0.6, 1), tall_diamond=(0.6, 1.3, 1))


def to_unit(pixels):  # uint8 -> float in [-1, 1]
    return pixels.float() / 127.5 - 1


def to_pixels(x):  # float in [-1, 1] -> uint8
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_shapes(n, seed):
    """n images (uint8) and labels: class k is a superellipse |u / a|^p + |v / b|^p = 1, with (a, b, p) from SHAPES and
    the hue k/10. Place, size, shade and background vary, so that no pixel can be learned by heart."""
    g, labels = torch.Generator().manual_seed(seed), torch.arange(n) % 10
    radius, cx, cy, value, saturation, grey = torch.rand(6, n, 1, 1, generator=g)
    axis, radius = torch.arange(32) + 0.5, 8 + 3 * radius  # pixels
    a, b, p = torch.tensor(list(SHAPES.values()))[labels].T[..., None, None]
    u, v = ((axis - 13 - 6 * cx) / radius / a).abs(), ((axis[:, None] - 13 - 6 * cy) / radius / b).abs()
    mask = (radius * torch.minimum(a, b) * (1 - (u**p + v**p) ** (1 / p)) + 0.5).clamp(0, 1)[:, None]  # soft edges
    hue = torch.tensor([colorsys.hsv_to_rgb(k / 10, 1, 1) for k in range(10)])[labels, :, None, None]
    colour = (0.7 + 0.3 * value[:, None]) * (1 - (0.8 + 0.2 * saturation[:, None]) * (1 - hue))
    pixels = mask * colour + (1 - mask) * 0.4 * grey[:, None]
    return (255 * pixels).round().to(torch.uint8), labels


def load_folder(path):
    """FOLDER/<class>/<image> -> images, labels, class names. Any image is centre-cropped to a square and resized."""
    try:
        listing = ImageFolder(path)
        images = torch.empty(len(listing), 3, 32, 32, dtype=torch.uint8)
        for i, (path, _) in enumerate(tqdm(listing.samples, "loading images")):  # an error below names the image
            with Image.open(path) as image:
                images[i] = pil_to_tensor(ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.BICUBIC))
    except Exception as error:  # Pillow raises many types
        raise UserError(f"cannot read {path} ({error}): --data takes FOLDER/<class>/<image>, none broken") from error
    return images, torch.tensor(listing.targets), listing.classes


def load_data(folder=None, smoke=False):
    """A folder of images, the built-in shapes, or CIFAR-10 (downloaded once, to ./data), all uint8.
    Returns training images (N, 3, 32, 32) and labels (N,), held-out images and labels, class names."""
    if folder:
        train, test = Path(folder, "train"), Path(folder, "test")
        images, labels, classes = load_folder(train if train.is_dir() else folder)
        if train.is_dir() and test.is_dir():
            val_images, val_labels, val_classes = load_folder(test)
            if val_classes != classes:
                raise UserError(f"{test} has the classes {val_classes}, and {train} {classes}: make them equal")
            return images, labels, val_images, val_labels, classes
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        members = [order[labels[order] == label] for label in range(len(classes))]
        val = torch.cat([m[: max(1, len(m) // 50)] for m in members])  # a seeded 2%, of every class at least one
        train = torch.cat([m[max(1, len(m) // 50) :] for m in members])
        return images[train], labels[train], images[val], labels[val], classes
    if smoke:
        return *draw_shapes(4000, seed=0), *draw_shapes(200, seed=1), list(SHAPES)
    try:
        train, test = [CIFAR10("data", train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download CIFAR-10 ({error}): check the network, or try --data or --smoke") from error
    images, val_images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test)]
    return images, torch.tensor(train.targets), val_images, torch.tensor(test.targets), train.classes


# ---- 6. Training
COLUMNS = "step velocity_loss repa_loss grad_norm val_velocity_loss val_alignment images_per_second".split()
CHECKPOINT = "config sit classes step rows metrics model ema optimizer scaler".split()


def pick_device(name=None):
    """The named device, or the first there is of CUDA, MPS and CPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.Generator(name or best).device  # needs a device that is there
    except Exception as error:
        raise UserError(f"device {name} is not here ({' '.join(str(error).split())[:80]}); {best} is") from error


def autocast(device):
    """bf16 on GPUs that have it natively, fp16 on older ones (their gradients are scaled), float32 elsewhere."""
    native = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8
    return torch.autocast(device.type, torch.bfloat16 if native else torch.float16, enabled=device.type == "cuda")


@torch.no_grad()
def compute_targets(encoder, images, flips=(False,), where=None):
    """The encoder's tokens for uint8 images, plain or flipped: (len(flips), N, T, D), in half precision on `where`."""
    targets = torch.empty(len(flips), len(images), *encoder.shape, dtype=torch.half, device=where or images.device)
    for i in tqdm(range(0, len(images), 100), "computing targets"):
        x = to_unit(images[i : i + 100])
        with autocast(x.device):
            for j, flip in enumerate(flips):
                targets[j, i : i + 100] = encoder(x.flip(-1) if flip else x)
    return targets


@torch.no_grad()
def evaluate(model, images, labels, targets, path_type):
    """Mean velocity loss and mean patch cosine (NaN without targets), with noise and times that never change."""
    g, sums = torch.Generator().manual_seed(0), torch.zeros(2, device=images.device)
    for i in tqdm(range(0, len(images), 100), "evaluating", leave=False):
        x, y, z = to_unit(images[i : i + 100]), labels[i : i + 100], None if targets is None else targets[i : i + 100]
        noise, t = torch.randn(x.shape, generator=g).to(x), torch.rand(len(x), generator=g).to(x)
        with autocast(x.device):
            sums += len(x) * torch.stack(training_losses(model, x, noise, t, y, z, path_type))
    return (sums / len(images) * sums.new_tensor([1, -1])).tolist()


def save_checkpoint(path, state):
    """Write to a temporary file, sync, rename: `path` always holds one complete checkpoint."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); the one before is untouched: make room, --resume") from error


def load_checkpoint(path):
    """A checkpoint on the CPU; nothing in the file is executed. Raises ValueError with the reason."""
    state = None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # do the weights fit this SiT?
            SiT(**state["sit"]).load_state_dict(state["ema"], assign=True)
        return {name: state[name] for name in CHECKPOINT}
    except Exception as error:
        kinds = dict(FileNotFoundError="does not exist", UnpicklingError="is no checkpoint or has code in it")
        kind = "is of another program or model" if state else kinds.get(type(error).__name__, "is truncated")
        raise UserError(f"cannot use checkpoint {path}, which {kind}: give a whole one of repa_mini.py") from error


def train(args, state=None):
    """Train as the options say, going on from `state`, a checkpoint, if there is one. Returns the exit code."""
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # TF32
    if device.type == "cpu" and not args.smoke:
        print("training on a CPU will be slow; --smoke is a run of one minute")

    # Encoder, data, folder of the run, model. Pixels, labels and the held-out targets stay on the device.
    sit = SIT_MODELS[args.model] | dict(class_dropout_prob=args.cfg_prob, projector_dim=args.projector_dim)
    sit["encoder_depth"] = args.encoder_depth or sit["encoder_depth"]
    encoder = cache = None
    if args.proj_coeff > 0:
        torch.manual_seed(0)
        tiny = TINY_DINOV2 if args.smoke and args.encoder == DEFAULT_ENCODER else {}
        encoder = TargetEncoder(args.encoder, 32 // sit["patch_size"], args.encoder_weights, **tiny).to(device)
    *data, classes = load_data(args.data, args.smoke)
    images, labels, val_images, val_labels = [tensor.to(device) for tensor in data]
    if args.batch_size > len(images):
        raise UserError(f"--batch-size {args.batch_size} is more than the {len(images)} training images")
    number = 1 + max([int(n) for p in Path("runs").glob("*") if (n := p.name.split("-")[0]).isdecimal()], default=0)
    name = f"runs/{number:03d}-{args.model.replace('/', '-')}-{'repa' if args.proj_coeff else 'vanilla'}"
    folder = Path(args.output_dir or name)
    folder.mkdir(parents=True, exist_ok=bool(args.output_dir))
    val_images, val_labels = [x[:: math.ceil(len(x) / 2000)] for x in (val_images, val_labels)]  # at most 2,000
    sit |= dict(num_classes=len(classes), z_dim=encoder.embed_dim if encoder else 0)
    torch.manual_seed(args.seed)
    model = SiT(**sit).to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.0, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    if device.type == "cuda" and not args.no_compile:
        torch._inductor.config.fallback_random = True  # compiled or not, the same labels are dropped
        for module in filter(None, [model, ema, encoder]):
            module.compile()
    val_targets = compute_targets(encoder, val_images)[0] if encoder else None
    if encoder and args.cache_targets:
        size = 2 * len(images) * 2 * math.prod(encoder.shape) / 1e9  # GB: plain and flipped, two bytes each
        free = 0.7 * torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else 0  # the rest is to train
        ram = 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        print(f"--cache-targets takes {size:.1f} GB; of the GPU it may fill {free:.0f}, of the RAM {ram:.0f}")
        if size > max(free, ram):
            raise UserError(f"the cached targets ({size:.1f} GB) fit nowhere here; leave out --cache-targets")
        place = device if size <= free else torch.device("cpu")
        cache = compute_targets(encoder, images, (False, True), place)
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    start, rows, metrics = 0, [], ",".join(COLUMNS) + "\n"
    if state:
        if classes != state["classes"]:
            raise UserError(f"the images have the classes {classes}, the checkpoint's had {state['classes']}")
        start, rows, metrics = state["step"], list(state["rows"].to(device)), state["metrics"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    print(f"{args.model} with {sum(p.numel() for p in model.parameters()):,} parameters on {device}, in {folder}")
    intervals = (args.log_every, args.eval_every, args.checkpointing_steps)
    grid_labels = torch.arange(min(10, len(classes)), device=device).repeat_interleave(10)  # one class a row
    grid_noise = torch.randn(len(grid_labels), 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    stop, clock, timed = [], None, 0
    for signum in (signal.SIGINT, signal.SIGTERM):  # the step in hand is finished first
        signal.signal(signum, lambda signum, frame: stop.append(signum))
    steps = range(start, max(start, args.max_train_steps) + 1)  # the last of them only logs, evaluates and saves
    for step in (bar := tqdm(steps, "training", initial=start, total=args.max_train_steps)):
        # Logs, evaluations and checkpoints. Only where one is due does the host wait for the device, and no clock runs.
        last, stopping, row, table = step >= args.max_train_steps, bool(stop), {}, torch.empty(0, 4)
        due = [step > start and (last or step % every == 0) for every in intervals]
        log, judge, save = due[0], due[1], due[2] or stopping or step == 0
        if rows and (log or save or clock is None):
            table = torch.stack(rows).cpu()
            bad = ~table[:, 3].isfinite() | ~(table[:, 2].isfinite() | scaler.is_enabled())  # a scaler skips overflows
            if bad.any():
                at, what = step - len(rows) + 1 + bad.int().argmax(), ", ".join(f"{x:.4g}" for x in table[bad][0, :3])
                way_out = f"try a smaller --learning-rate; the checkpoint in {folder} is the last good one"
                raise UserError(f"step {at}: velocity loss, REPA loss, gradient norm are {what}, not finite: {way_out}")
        if log:
            row = dict(zip(COLUMNS[1:4], torch.where(table.isfinite(), table, torch.nan).nanmean(dim=0).tolist()))
            row["images_per_second"] = timed / (time.perf_counter() - clock) if clock else torch.nan
            rows, table = [], table[:0]
        if judge:
            row |= dict(zip(COLUMNS[4:6], evaluate(ema, val_images, val_labels, val_targets, args.path_type)))
            with autocast(device):
                x = sample_ode(ema, grid_noise, grid_labels, args.num_steps, cfg_scale=args.cfg_scale)
            save_image(to_pixels(x) / 255, folder / f"samples_{step:07d}.png", nrow=10)
        if row:
            row = {"step": step} | {name: value for name, value in row.items() if not math.isnan(value)}
            bar.write(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
            bar.set_postfix({name: row[name] for name in COLUMNS[1:3] + COLUMNS[6:] if name in row})
            metrics += ",".join(str(row.get(name, "")) for name in COLUMNS) + "\n"
        if save:
            values = dict(config=vars(args), sit=sit, classes=classes, step=step, rows=table, metrics=metrics)
            save_checkpoint(folder / "checkpoint.pt", values | {k: part.state_dict() for k, part in parts.items()})
        if row or step == start:  # on --resume without the rows past the checkpoint
            (folder / "metrics.csv").write_text(metrics)
        if log or judge or save or clock is None:  # the first step, in which the model is compiled, is not timed
            clock, timed = time.perf_counter() if step > start else None, 0
        if last or stopping:
            break

        # A batch. Its random numbers depend on the seed and the step alone (the order of the images on the epoch):
        # a resumed run draws what an uninterrupted one draws, and a run with REPA what one without draws.
        epoch, i = divmod(step, len(images) // args.batch_size)
        if step == start or i == 0:
            torch.manual_seed(args.seed * 1_000_003 - 1 - epoch)
            order = torch.randperm(len(images), device=device)
        torch.manual_seed(args.seed * 1_000_003 + step)
        index = order[i * args.batch_size : (i + 1) * args.batch_size]
        flip = torch.rand(len(index), device=device) < 0.5
        x = to_unit(torch.where(flip[:, None, None, None], images[index].flip(-1), images[index]))
        noise, t = torch.randn_like(x), torch.rand(len(x), device=device)
        # The losses: L = L_velocity + lambda L_REPA.
        with autocast(device):
            z = None
            if encoder and step < args.repa_stop_step:
                z = encoder(x) if cache is None else cache[flip.long().to(place), index.to(place)].to(device)
            velocity_loss, projection_loss = training_losses(model, x, noise, t, labels[index], z, args.path_type)
        loss = velocity_loss if z is None else velocity_loss + args.proj_coeff * projection_loss
        # The update, then the moving average of the weights, which evaluation and sampling use.
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        decay = min(0.9999, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
        rows.append(torch.stack([velocity_loss, projection_loss, grad_norm, loss]).detach())
        timed += len(x)
    print(f"step {step}, {folder}/checkpoint.pt; to go on: python repa_mini.py --resume --output-dir {folder}")
    return 128 + stop[0] if stopping else 0


# ---- 7. Command line
COUNT, POSITIVE = range(1, 2**62).__contains__, lambda x: 0 < x < math.inf
OPTIONS = {  # name: default (or type, where there is none), what is allowed, help (also the answer to a mistake)
    "smoke": (False, None, "a run of one minute on a CPU, on built-in data"),
    "data": (str, os.path.isdir, "a folder of <class>/<image>, or of train/ and test/ with that (default: CIFAR-10)"),
    "model": ("SiT-S/2", SIT_MODELS.__contains__, "SiT-{Ti,S,B,L,XL}/{2,4,8}: size and patch"),
    "encoder": (DEFAULT_ENCODER, timm.is_model, "a timm ViT or CNN for the targets; timm.list_models() names them"),
    "encoder_weights": (str, os.path.isfile, "a file of its weights, .safetensors or .pth (default: downloaded)"),
    "encoder_depth": (int, COUNT, "the block whose hidden state is aligned, from 1 (default: the model's)"),
    "projector_dim": (2048, COUNT, "width of the projector, from 1"),
    "proj_coeff": (0.5, lambda x: 0 <= x < math.inf, "lambda, the weight of the REPA loss, from 0: the vanilla SiT"),
    "repa_stop_step": (10**9, COUNT, "no REPA loss from this step on (arXiv 2505.16792), from 1"),
    "cache_targets": (False, None, "compute all targets once and keep them in memory"),
    "path_type": ("linear", ("linear", "cosine").__contains__, "the interpolant: linear or cosine"),
    "cfg_prob": (0.1, lambda p: 0 <= p < 1, "label dropout for classifier-free guidance, in [0, 1)"),
    "batch_size": (256, COUNT, "images a step, from 1"),
    "learning_rate": (1e-4, POSITIVE, "AdamW's, constant, positive"),
    "max_train_steps": (100_000, COUNT, "length of the run, from 1"),
    "log_every": (100, COUNT, "steps between rows of metrics.csv, from 1"),
    "eval_every": (5000, COUNT, "steps between evaluations and sample grids, from 1"),
    "checkpointing_steps": (5000, COUNT, "steps between checkpoints, from 1"),
    "num_steps": (50, COUNT, "Euler steps of the sample grids, from 1"),
    "cfg_scale": (1.0, math.isfinite, "guidance scale of the sample grids, a number; 1 is none"),
    "seed": (0, range(2**31).__contains__, "of weights, batches, noise and times, from 0 to 2^31 - 1"),
    "device": (str, pick_device, "cuda, mps or cpu (default: the first there is; with --smoke cpu)"),
    "no_compile": (False, None, "no torch.compile on CUDA"),
    "output_dir": (str, lambda path: not os.path.isfile(path), "a folder for the run (default: a new one in runs/)"),
    "resume": (False, None, "go on from --output-dir's checkpoint, with its options"),
}
MAY_CHANGE = "output_dir resume device no_compile max_train_steps log_every eval_every checkpointing_steps".split()
MAY_CHANGE += ["num_steps", "cfg_scale"]
SMOKE = dict(model="SiT-Ti/4", projector_dim=512, batch_size=16, learning_rate=2e-3, max_train_steps=200, num_steps=20)
SMOKE |= dict(cfg_scale=2.0, log_every=40, eval_every=200, checkpointing_steps=200, device="cpu")


def check_options(args, config=None):
    """Every mistake that shows before a model is built or a file is read. Raises ValueError with a sentence."""
    for name, (_, allowed, sentence) in OPTIONS.items():
        option, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if allowed and value is not None and not allowed(value):
            raise UserError(f"{option} {value} will not do: it is {sentence}")
    wrong = [name for name in config or () if name not in MAY_CHANGE and getattr(args, name) != config[name]]
    if wrong:
        given = ", ".join(f"--{n.replace('_', '-')} {getattr(args, n)} (not {config[n]})" for n in wrong)
        raise UserError(f"{given} contradicts the checkpoint: leave it out, or start another run")
    ours = [Path(args.output_dir or os.devnull, name) for name in ("checkpoint.pt", "metrics.csv")]
    if (args.encoder_depth or 1) > (depth := SIT_MODELS[args.model]["depth"]):
        raise UserError(f"--encoder-depth {args.encoder_depth} is beyond {args.model}: give 1 to {depth}")
    if args.cfg_prob == 0 and args.cfg_scale != 1:
        raise UserError(f"--cfg-scale {args.cfg_scale} needs label dropout: with --cfg-prob 0 give --cfg-scale 1")
    if args.resume and not args.output_dir:
        raise UserError("--resume needs --output-dir, the folder of the run to go on with")
    if any(path.exists() for path in ours) and not args.resume:
        raise UserError(f"--output-dir {args.output_dir} already holds a run: add --resume, or give another folder")


def main(argv=None):
    """Parse, check, train. Returns the exit code: 0, 2 after a mistake of the user's, 130 or 143 when stopped."""
    parser, state = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False), None
    for name, (default, _, sentence) in OPTIONS.items():
        how = dict(type=default) if isinstance(default, type) else dict(type=type(default), default=default)
        how = dict(action="store_true") if default is False else how
        parser.add_argument("--" + name.replace("_", "-"), help=sentence + " [%(default)s]" * ("default" in how), **how)
    try:
        args = parser.parse_args(argv)
        parser.set_defaults(**SMOKE if args.smoke else {})
        if args.resume and args.output_dir:
            state = load_checkpoint(Path(args.output_dir, "checkpoint.pt"))
            parser.set_defaults(**state["config"])
        args = parser.parse_args(argv)
        check_options(args, state and state["config"])
        return train(args, state)
    except (UserError, OSError) as error:
        advice = ": make room, or give another folder" if isinstance(error, OSError) else ""
        print(f"repa_mini: {error}{advice}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:  # before the first step; argparse has printed its sentence or help
        return getattr(stop, "code", 130)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
