"""Statements about the method and the program, checked. `pytest` runs all of them in less than two minutes on a CPU.

Reference numbers come from the methods' own code, on weights and inputs that the formulas `wave` and `fill` give:
SiT, loss, interpolant and samplers from the REPA authors' repository (sihyun-yu/REPA, commit 67f7145), the DINOv2
tokens from facebookresearch/dinov2 (b8931f7) with REPA's preprocessing, CKNNA from minyoungg/platonic-rep (dcd76ba).
"""

import contextlib
import csv
import functools
import io
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import repa_mini
import sample
from repa_mini import SIT_MODELS, SiT, TargetEncoder, interpolant, repa_loss, sample_ode, sample_sde, training_losses

torch.set_num_threads(1)  # as quick for small models, also on a busy machine; child processes, too, get the same bits
HERE = Path(__file__).parent
TINY = dict(hidden_size=48, depth=3, num_heads=3, patch_size=8, encoder_depth=2, projector_dim=32, z_dim=20)
DINO = "vit_small_patch14_dinov2"


def wave(shape, w, phase=0.0):
    return torch.sin(w * torch.arange(math.prod(shape), dtype=torch.float64) + phase).reshape(shape)


def fill(state, offset=0):
    filled = {}
    for k, (name, p) in enumerate(sorted(state.items())):
        scale = 0.1 if p.ndim < 2 else 1 / math.sqrt(p[0].numel())
        filled[name] = scale * wave(p.shape, 1.7, 0.37 * (k + 1 + offset))
    return filled


def close(a, b, tolerance):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


def random_sit(seed=0, **kwargs):
    """A small SiT whose every weight is random, so that no gate is closed."""
    torch.manual_seed(seed)
    model = SiT(**{**TINY, **kwargs})
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model


def batch(n=4, size=32, z_dim=20, tokens=16, seed=0):
    """x, noise, t, y, z for a SiT of TINY's shape."""
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.rand(n, 3, size, size, generator=g) * 2 - 1, torch.randn(n, 3, size, size, generator=g)
    return x, noise, torch.rand(n, generator=g), torch.arange(n) % 10, torch.randn(n, tokens, z_dim, generator=g)


def encoder_like(embed_dim=32, grid_size=4, **kwargs):
    torch.manual_seed(0)
    return TargetEncoder(DINO, grid_size, pretrained=False, embed_dim=embed_dim, depth=2, num_heads=2, **kwargs)


# ---- The program learns


def test_on_a_fixed_batch_the_velocity_loss_halves_and_the_alignment_rises():
    images, labels = repa_mini.draw_shapes(8, seed=0)
    x, z = repa_mini.to_unit(images), encoder_like()(repa_mini.to_unit(images))
    torch.manual_seed(0)
    model = SiT(hidden_size=64, depth=3, num_heads=2, patch_size=8, encoder_depth=2, projector_dim=64, z_dim=32)
    noise, t = torch.randn_like(x), torch.linspace(0.1, 0.9, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    history = []
    for _ in range(150):
        velocity_loss, projection_loss = training_losses(model, x, noise, t, labels, z)
        history.append((velocity_loss.item(), -projection_loss.item()))
        optimizer.zero_grad()
        (velocity_loss + 0.5 * projection_loss).backward()
        optimizer.step()
    assert history[-1][0] < history[0][0] / 2
    assert history[-1][1] > history[0][1] + 0.3


def test_the_velocity_loss_is_the_mean_square_and_the_sum_is_weighted_by_lambda(tiny_run):
    """metrics.csv's losses are those of the equations: with frozen weights, lambda scales only the gradient."""
    x, noise, t, y, z = batch()
    model = random_sit().eval()
    velocity_loss, projection_loss = training_losses(model, x, noise, t, y, z)
    x_t = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * noise
    v, z_tilde = model(x_t, t, y)
    assert close(velocity_loss.detach(), ((v - (noise - x)) ** 2).mean().detach(), 1e-6)
    assert close(projection_loss.detach(), -F.cosine_similarity(z_tilde, z, dim=-1).mean().detach(), 1e-6)
    grads = {}
    for weight in (0.0, 0.5, 1.0):
        _, metrics, recorded = tiny_run(
            "--max-train-steps", "1", "--proj-coeff", str(weight), "--learning-rate", "1e-3"
        )
        grads[weight] = float(metrics[0]["grad_norm"])
    assert grads[0.0] < grads[0.5] < grads[1.0]


# ---- SiT


@pytest.mark.parametrize("size, patch, channels, z_dim", [(32, 8, 3, 20), (32, 16, 4, 7), (16, 4, 1, 0)])
def test_shapes(size, patch, channels, z_dim):
    model = SiT(**{**TINY, "input_size": size, "patch_size": patch, "in_channels": channels, "z_dim": z_dim})
    for n in (1, 3):
        v, z = model(torch.randn(n, channels, size, size), torch.rand(n), torch.arange(n))
        assert v.shape == (n, channels, size, size)
        assert z is None if z_dim == 0 else z.shape == (n, (size // patch) ** 2, z_dim)
    assert any("projectors" in name for name in model.state_dict()) == (z_dim > 0)


def test_at_initialisation_the_velocity_is_zero_and_blocks_are_identities():
    model = SiT(**TINY)
    x, _, t, y, _ = batch()
    assert model(x, t, y)[0].abs().max() == 0
    tokens, c = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert torch.equal(model.blocks[0](tokens, c), tokens)


def test_unpatchify_inverts_patchify():
    model = SiT(**{**TINY, "patch_size": 4})
    x = torch.randn(2, 3, 32, 32)
    patches = x.reshape(2, 3, 8, 4, 8, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 64, 48)  # row, column, in-patch, channel
    assert torch.equal(model.unpatchify(patches), x)


def test_position_table_has_columns_in_its_first_half_and_rows_in_its_second():
    table = repa_mini.sincos_position_table(16, 4).reshape(4, 4, 16)
    assert torch.equal(table[0, :, :8], table[3, :, :8]) and torch.equal(table[:, 0, 8:], table[:, 3, 8:])
    assert not torch.equal(table[0, 0, :8], table[0, 1, :8]) and not torch.equal(table[0, 0, 8:], table[1, 0, 8:])
    assert close(table[1, 2, 0], math.sin(2), 1e-7) and close(table[1, 2, 8], math.sin(1), 1e-7)


def test_labels_are_dropped_at_the_given_rate_in_training_and_never_in_evaluation():
    embedder = repa_mini.LabelEmbedder(10, 8, dropout_prob=0.3)
    y = torch.zeros(20000, dtype=torch.long)
    torch.manual_seed(0)
    dropped = (embedder.train()(y) == embedder.embedding_table.weight[10]).all(dim=1).double().mean().item()
    assert abs(dropped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20000)
    assert (embedder.eval()(y) == embedder.embedding_table.weight[0]).all()
    without = repa_mini.LabelEmbedder(10, 8, dropout_prob=0.0).train()
    assert len(without.embedding_table.weight) == 10 and (without(y) == without.embedding_table.weight[0]).all()


def test_the_repa_term_reaches_the_aligned_blocks_and_nothing_behind_them():
    model = random_sit(depth=4, encoder_depth=2)
    x, noise, t, y, z = batch()
    z.requires_grad_()
    training_losses(model, x, noise, t, y, z)[1].backward()
    assert z.grad is None  # the encoder's side is a constant
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any(re.match(r"blocks\.[23]\.|final_layer", name) for name in reached)
    wanted = ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "projectors.0.4.weight", "x_embedder.proj.weight"]
    assert set(wanted) <= reached


def test_initialisation_tensor_by_tensor():
    """adaLN-Zero as the authors have it: zeros where named, std 0.02 for embeddings, Xavier-uniform elsewhere."""
    torch.manual_seed(0)
    model = SiT(hidden_size=256, depth=2, num_heads=4, encoder_depth=1, num_classes=100, z_dim=128, projector_dim=512)
    for name, p in model.named_parameters():
        if name == "pos_embed":
            assert not p.requires_grad
        elif name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert p.abs().max() == 0, name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert abs(p.std() / 0.02 - 1) < 0.03 and abs(p.mean()) < 0.001 and p.abs().max() > 0.06, name
        else:  # the patch embedding counts as a linear layer from 2 * 2 * 3 numbers
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.98 * bound < p.abs().max() <= bound and abs(p.std() / (bound / math.sqrt(3)) - 1) < 0.03, name


def test_a_vanilla_and_a_repa_model_draw_the_same_weights():
    models = []
    for z_dim in (0, 20):
        torch.manual_seed(3)
        models.append(SiT(**{**TINY, "z_dim": z_dim}).state_dict())
    assert all(torch.equal(p, models[1][name]) for name, p in models[0].items())


# Parameters and keys of the authors' models: 4 channels, 1000 classes, z_dim 768, projector 2048 (their S with
# decoder_hidden_size=384).
SIZES = {
    "SiT-XL/2": (683242512, 298),
    "SiT-XL/4": (683131968, 298),
    "SiT-XL/8": (683519232, 298),
    "SiT-L/2": (465955600, 258),
    "SiT-L/4": (465857344, 258),
    "SiT-L/8": (466201600, 258),
    "SiT-B/2": (137845008, 138),
    "SiT-B/4": (137771328, 138),
    "SiT-B/8": (138029568, 138),
    "SiT-S/2": (39515664, 138),
    "SiT-S/4": (39478848, 138),
    "SiT-S/8": (39608064, 138),
}
BLOCK_SHAPES = {
    "attn.qkv.weight": (3, 1),
    "attn.qkv.bias": (3,),
    "attn.proj.weight": (1, 1),
    "attn.proj.bias": (1,),
    "mlp.fc1.weight": (4, 1),
    "mlp.fc1.bias": (4,),
    "mlp.fc2.weight": (1, 4),
    "mlp.fc2.bias": (1,),
    "adaLN_modulation.1.weight": (6, 1),
    "adaLN_modulation.1.bias": (6,),
}  # in multiples of the width


@pytest.mark.parametrize("name", SIZES)
def test_state_dict_has_the_authors_keys_shapes_and_parameter_counts(name):
    with torch.device("meta"):
        model = SiT(**SIT_MODELS[name], in_channels=4, num_classes=1000, z_dim=768, projector_dim=2048)
    shapes = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    assert (sum(p.numel() for p in model.parameters()), len(shapes)) == SIZES[name]
    d, p = SIT_MODELS[name]["hidden_size"], SIT_MODELS[name]["patch_size"]
    expected = {
        "pos_embed": (1, (32 // p) ** 2, d),
        "x_embedder.proj.weight": (d, 4, p, p),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (1001, d),
        "projectors.0.0.weight": (2048, d),
        "projectors.0.0.bias": (2048,),
        "projectors.0.2.weight": (2048, 2048),
        "projectors.0.2.bias": (2048,),
        "projectors.0.4.weight": (768, 2048),
        "projectors.0.4.bias": (768,),
        "final_layer.linear.weight": (p * p * 4, d),
        "final_layer.linear.bias": (p * p * 4,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    for i in range(SIT_MODELS[name]["depth"]):
        for key, multiples in BLOCK_SHAPES.items():
            expected[f"blocks.{i}.{key}"] = tuple(d * m for m in multiples)
    assert shapes == expected


def test_sit_computes_the_authors_velocity_and_hidden_state():
    model = SiT(
        input_size=8, patch_size=2, hidden_size=48, depth=3, num_heads=3, encoder_depth=2, z_dim=20, projector_dim=32
    )
    state = model.double().eval().state_dict()
    model.load_state_dict({**fill(state), "pos_embed": state["pos_embed"]})
    v, z = model(wave((2, 3, 8, 8), 0.9), torch.tensor([0.3, 0.85], dtype=torch.float64), torch.tensor([3, 10]))
    v, z = v.detach(), z.detach()
    v8 = [-0.3123258255173321, -0.28914131230997636, 0.0982973237910795, 0.17450558412700504]
    v8 += [-0.7099031433390016, -0.5008365420855203, -0.9086893742518143, -0.8125160797948506]
    v4 = [0.057793648060639594, 0.02224624298648291, 0.7612499782069576, 0.6756786678263673]
    z8 = [0.15016029409580706, 0.013092017117601953, -0.2238826380448469, 0.18100511697078364]
    z8 += [0.09856789644176397, -0.25686239416785767, 0.10141837308732768, 0.13501573255816565]
    assert close(v.flatten()[:8], v8, 1e-5) and close(v.flatten()[-4:], v4, 1e-5)
    assert close([v.mean(), v.std()], [0.11551897556851014, 0.42645409946744933], 1e-5)
    assert close(z.flatten()[:8], z8, 1e-5)
    assert close([z.mean(), z.std()], [0.006875908990702176, 0.14213578313234784], 1e-5)
    assert z.shape == (2, 16, 20) and sum(p.numel() for p in model.parameters()) == 151760 and len(state) == 48
    first = [0.9092974066734314, 0.8006131052970886, 0.4176768362522125, 0.19866932928562164]
    middle = [0.8414709568023682, 0.4476708471775055, 0.21378067135810852, 0.0998334139585495]
    assert close(state["pos_embed"][0, 6, :4], first, 1e-7) and close(state["pos_embed"][0, 6, 24:28], middle, 1e-7)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_float32_losses_and_gradients_are_those_of_float64(path_type):
    losses, grads = [], []
    for dtype in (torch.float64, torch.float32):
        model = random_sit().eval().to(dtype)
        x, noise, t, y, z = batch()
        both = training_losses(model, x.to(dtype), noise.to(dtype), t.to(dtype), y, z.to(dtype), path_type)
        assert all(loss.dtype == dtype for loss in both)
        (both[0] + 0.5 * both[1]).backward()
        losses.append(torch.stack(both).detach().double())
        grads.append([p.grad.double() for p in model.parameters() if p.grad is not None])
    assert close(losses[0] / losses[1], [1.0, 1.0], 2e-6)
    for exact, single in zip(*grads):
        assert (single - exact).norm() <= 2e-5 * exact.norm()


def test_model_and_encoder_compile_to_one_graph_each_and_keep_their_keys():
    """As on CUDA, but only the tracing, which with fullgraph fails at whatever would break the graph."""
    model, encoder = random_sit().train(), encoder_like()
    x, noise, t, y, z = batch()

    def numbers():
        torch.manual_seed(0)  # of the dropped labels
        return [*training_losses(model, x, noise, t, y, z), encoder(x).mean()]

    keys, plain = list(model.state_dict()), torch.stack(numbers())
    for module in (model, encoder):
        module.compile(fullgraph=True, backend="eager")
    assert list(model.state_dict()) == keys
    assert close(torch.stack(numbers()).detach(), plain.detach(), 1e-6)
    assert sample_ode(model.eval(), noise, y, 2, cfg_scale=2.0, guidance_high=0.5).isfinite().all()


# ---- Targets


def test_dinov2_tokens_are_the_dinov2_authors():
    encoder = TargetEncoder(DINO, 16, pretrained=False, embed_dim=32, depth=2, num_heads=2).double()
    encoder.model.load_state_dict(fill(encoder.model.state_dict()))
    images = ((wave((2, 3, 32, 32), 0.013) + 1) * 127.5).round()
    z = encoder(images / 127.5 - 1)
    token0 = [0.046884293422227, 0.0420643536124418, 0.11039323106784714]
    token0 += [0.04606097737511984, -0.06245657383340924, 0.2188645194585914]
    token100 = [0.03614898883294877, 0.0009720976667364919, 0.04707391271794743]
    token100 += [0.06678358925785656, -0.05495643907750049, 0.19199145522022773]
    last = [-0.030097315902437312, 0.07453327664330185, 0.01638758941900187]
    last += [0.11338592789125193, -0.04258580295419484, 0.10579347344796064]
    assert z.shape == (2, 256, 32)
    assert (
        close(z[0, 0, :6], token0, 1e-5) and close(z[0, 100, :6], token100, 1e-5) and close(z[-1, -1, -6:], last, 1e-5)
    )
    assert close([z.mean(), z.std()], [0.04903293647947656, 0.09301586024427604], 1e-5)


def test_the_encoder_is_frozen_and_stays_in_evaluation_mode():
    encoder = encoder_like()
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not encoder(x).requires_grad


def test_the_encoder_sees_imagenet_normalised_pixels_at_its_own_size():
    encoder, seen = encoder_like(), []
    encoder.model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(torch.stack([torch.ones(3, 32, 32), -torch.ones(3, 32, 32)]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert seen[0].shape == (2, 3, 56, 56)  # a grid of 4 patches of 14 pixels
    assert close(seen[0][0].mean((1, 2)), (1 - mean) / std, 1e-5) and close(seen[0][1].mean((1, 2)), -mean / std, 1e-5)


@pytest.mark.parametrize(
    "name, prefix",
    [
        ("vit_small_patch14_dinov2", 1),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_small_patch16_dinov3", 5),
        ("vit_base_patch16_224.mae", 1),
        ("vit_base_patch16_clip_224", 1),
        ("vit_base_patch16_siglip_224", 0),
        ("vit_tiny_patch16_224", 1),
    ],
)
def test_vit_targets_are_the_normalised_tokens_without_class_and_registers(name, prefix):
    encoder = TargetEncoder(name, grid_size=4, pretrained=False, depth=1, embed_dim=64, num_heads=1)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = encoder(x)
    size = 4 * encoder.model.patch_embed.patch_size[0]
    pixels = F.interpolate(((x + 1) / 2 - encoder.mean) / encoder.std, (size, size), mode="bicubic")
    tokens = encoder.model.forward_features(pixels)
    assert tokens.shape == (2, 16 + prefix, 64) and encoder.embed_dim == 64 and encoder.shape == (16, 64)
    assert torch.equal(z, tokens[:, prefix:])
    assert encoder.mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg(name).mean)


def test_cnn_targets_are_the_map_at_stride_16_row_by_row():
    encoder = TargetEncoder("tf_efficientnet_lite0", grid_size=2, pretrained=False)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    maps = encoder.model.forward_intermediates(((x + 1) / 2 - encoder.mean) / encoder.std, intermediates_only=True)
    assert encoder.embed_dim == 112 and maps[3].shape == (2, 112, 2, 2)
    assert close(encoder(x)[:, 1], maps[3][:, :, 0, 1], 1e-5)  # token 1 is row 0, column 1


# ---- Losses


def test_repa_loss_is_minus_one_for_equal_plus_one_for_opposite_tokens_and_blind_to_length():
    z = torch.randn(3, 5, 7)
    assert close(repa_loss(z, z), -1, 1e-6) and close(repa_loss(-z, z), 1, 1e-6)
    other, lengths = torch.randn(3, 5, 7), torch.rand(3, 5, 1) * 100 + 0.01
    assert close(repa_loss(other * lengths, z / lengths), repa_loss(other, z), 1e-6)


def test_repa_loss_is_the_authors():
    assert close(repa_loss(wave((3, 5, 7), 1.3, 0.4), wave((3, 5, 7), 0.7)), 0.011408185623404515, 1e-10)


# alpha, sigma and their derivatives at t = 0, 0.25, 0.5, 0.9, from the authors' interpolant
INTERPOLANT = {
    "linear": ([1.0, 0.75, 0.5, 0.1], [0.0, 0.25, 0.5, 0.9], [-1.0] * 4, [1.0] * 4),
    "cosine": (
        [1.0, 0.9238795325112867, 0.7071067811865476, 0.15643446504023092],
        [0.0, 0.3826834323650898, 0.7071067811865475, 0.9876883405951378],
        [0.0, -0.6011177298843463, -1.1107207345395915, -1.5514572174249892],
        [1.5707963267948966, 1.4512265760697154, 1.1107207345395915, 0.24572668306931938],
    ),
}


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_interpolant_is_the_authors_and_its_velocity_the_derivative(path_type):
    t = torch.tensor([0.0, 0.25, 0.5, 0.9], dtype=torch.float64)
    for ours, theirs in zip(interpolant(t, path_type), INTERPOLANT[path_type]):
        assert close(ours, theirs, 1e-10)
    x, eps, h = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64), 1e-6
    alpha, sigma, d_alpha, d_sigma = interpolant(t, path_type)
    ahead, behind = (interpolant(t + s, path_type) for s in (h, -h))
    slope = ((ahead[0] - behind[0]) * x + (ahead[1] - behind[1]) * eps) / (2 * h)
    assert close(d_alpha * x + d_sigma * eps, slope, 1e-8)
    assert interpolant(t.half(), path_type)[0].dtype == torch.float32


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_t_0_is_data_and_t_1_is_noise(path_type):
    alpha, sigma, _, _ = interpolant(torch.tensor([0.0, 1.0], dtype=torch.float64), path_type)
    assert close(alpha, [1.0, 0.0], 1e-12) and close(sigma, [0.0, 1.0], 1e-12)


# ---- Samplers


class Field:
    """A model whose velocity is `velocity(x, t, y)`; counts its evaluations."""

    def __init__(self, velocity, num_classes=10):
        self.velocity, self.num_classes, self.calls, self.rows = velocity, num_classes, 0, 0

    def __call__(self, x, t, y):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.velocity(x, t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)), None


def reference_field():
    c = lambda y: torch.where(y == 10, 0, y + 1).double()  # noqa: E731
    return Field(lambda x, t, y: torch.tanh(x) * (1 + t) + 0.1 * c(y))


ODE = {  # 8 steps of the authors' samplers
    "euler": (
        dict(),
        [-0.05749113897635772, 0.08115711783429458, 0.1542284805358647, 0.07156601702130416]
        + [-0.18329285153293995, -0.3320994084604417, -0.40376428934283337, -0.29996777776410727],
    ),
    "heun": (
        dict(heun=True),
        [-0.05609721451560356, 0.11365880987627501, 0.19626825425375344, 0.10249066029248946]
        + [-0.1818555469161468, -0.36150823167045787, -0.4415406636375068, -0.3244133834704943],
    ),
    "guidance": (
        dict(cfg_scale=2.5),
        [-0.1439567840518317, -0.0068599266857392385, 0.06354062724217469, -0.016176403564927472]
        + [-0.4496609867455593, -0.6212203119757964, -0.7070934643653455, -0.5831324686509207],
    ),
    "interval": (
        dict(heun=True, cfg_scale=2.5, guidance_low=0.2, guidance_high=0.7),
        [-0.10373867169371703, 0.06557052681571143, 0.14722878971323933, 0.054496924824492525]
        + [-0.3278151375870874, -0.5166695240289482, -0.602076238510379, -0.4772880324481044],
    ),
}


@pytest.mark.parametrize("name", ODE)
def test_sample_ode_is_the_authors(name):
    options, expected = ODE[name]
    x = sample_ode(reference_field(), wave((2, 1, 2, 2), 0.8), torch.tensor([0, 2]), num_steps=8, **options)
    assert close(x.flatten(), expected, 1e-10)


def test_euler_is_first_and_heun_second_order():
    """dx/dt = x has x(0) = x(1) / e; halving the step divides Euler's error by 2 and Heun's by 4."""
    noise, y = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    for heun, order in ((False, 1), (True, 2)):
        field = Field(lambda x, t, y: x)
        errors = [abs(sample_ode(field, noise, y, n, heun).item() - math.exp(-1)) for n in (200, 400)]
        # Heun's last step is Euler's, whose single error of second order leaves the order as it is
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.02)


def test_guidance_scale_1_is_no_guidance_and_scale_0_is_unconditional():
    noise, y = wave((3, 1, 2, 2), 0.8), torch.tensor([0, 2, 5])
    field = reference_field()
    plain = sample_ode(field, noise, y, 4, cfg_scale=1.0)
    assert (field.calls, field.rows) == (4, 12)  # one evaluation of the model a step
    null = torch.full_like(y, 10)
    assert close(sample_ode(field, noise, y, 4, cfg_scale=0.0), sample_ode(field, noise, null, 4), 1e-12)
    outside = dict(cfg_scale=3.0, guidance_low=0.9, guidance_high=0.95)  # no step of four starts there
    assert torch.equal(sample_ode(field, noise, y, 4, **outside), plain)


@pytest.mark.parametrize("heun", [False, True])
def test_guidance_doubles_the_batch_only_inside_its_interval(heun):
    """t = 1, .75, .5, .25: both ends of [0.5, 0.75] count; Heun's second evaluation follows its step's start."""
    field = reference_field()
    sample_ode(field, wave((2, 1, 2, 2), 0.8), torch.tensor([0, 2]), 4, heun, 2.0, 0.5, 0.75)
    assert field.rows == (2 + 4 + 4 + 2 if not heun else 4 + 8 + 8 + 2)  # the last step is Euler's


def gaussian_velocity(t, x, path_type, mean=0.5, std=0.7):
    """E[v | x_t = x] for data N(mean, std^2), as (slope, offset): the velocity is linear in x."""
    alpha, sigma, d_alpha, d_sigma = (float(a) for a in interpolant(torch.tensor(t, dtype=torch.float64), path_type))
    slope = (d_alpha * alpha * std**2 + d_sigma * sigma) / (alpha**2 * std**2 + sigma**2)
    return slope * x + (d_alpha - slope * alpha) * mean


def gaussian_field(path_type, mean, std):
    return Field(lambda x, t, y: gaussian_velocity(t.flatten()[0].item(), x, path_type, mean, std))


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("heun", [False, True])
def test_ode_on_gaussian_data_follows_its_recursion_and_converges_to_the_data(path_type, heun):
    mean, std, y = 0.5, 0.7, torch.zeros(3, dtype=torch.long)
    noise = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    x, n = noise.clone(), 20
    for i in range(n):  # the recursion, by hand
        t, t_next = 1 - i / n, 1 - (i + 1) / n
        v = gaussian_velocity(t, x, path_type, mean, std)
        if heun and i < n - 1:
            v = (v + gaussian_velocity(t_next, x + (t_next - t) * v, path_type, mean, std)) / 2
        x = x + (t_next - t) * v
    field = gaussian_field(path_type, mean, std)
    assert close(sample_ode(field, noise, y, n, heun), x, 1e-9)
    fine = sample_ode(field, noise, y, 2000, heun).flatten()
    assert close(fine[1], mean, 1e-3) and close((fine[2] - fine[0]) / 3, std, 2e-3)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_sde_on_gaussian_data_has_the_mean_and_variance_of_its_recursion(path_type):
    """x' = x + dt (v - w/2 s) + sqrt(w |dt|) eps with w = 2t, to t = 0.04, then a step without noise to 0."""
    for mean, std, steps in ((0.5, 0.7, 30), (0.0, 1.0, 250)):
        times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
        m, var = 0.0, 1.0
        for t, t_next in zip(times[:-1], times[1:]):
            alpha, sigma, _, _ = (float(a) for a in interpolant(torch.tensor(t, dtype=torch.float64), path_type))
            spread = alpha**2 * std**2 + sigma**2  # the score of N(alpha mean, spread) is (alpha mean - x) / spread
            drift = lambda x: gaussian_velocity(t, x, path_type, mean, std) - t * (alpha * mean - x) / spread  # noqa: E731, B023
            dt, slope = t_next - t, drift(1.0) - drift(0.0)
            m, var = m + dt * drift(m), (1 + dt * slope) ** 2 * var + (2 * t * abs(dt) if t_next > 0 else 0)
        n = 40000
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64)
        y = torch.zeros(n, dtype=torch.long)
        x = sample_sde(gaussian_field(path_type, mean, std), noise, y, steps, path_type=path_type, generator=g)
        assert abs(x.mean().item() - m) < 5 * math.sqrt(var / n)
        assert abs(x.var().item() / var - 1) < 5 * math.sqrt(2 / n)
        if std == 1.0:
            assert abs(var - 1) < 0.02


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_sde_step_by_step_with_guidance_equals_a_hand_computation(path_type):
    noise, y, g = wave((2, 1, 2, 2), 0.8), torch.tensor([0, 2]), torch.Generator()
    x = noise.clone()
    g.manual_seed(7)
    for t, t_next in ((1.0, 0.68), (0.68, 0.36), (0.36, 0.04), (0.04, 0.0)):
        alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(t, dtype=torch.float64), path_type)
        c = (y + 1).view(-1, 1, 1, 1).double()
        v = torch.tanh(x) * (1 + t) + (2.5 * 0.1 * c if 0.3 <= t <= 0.7 else 0.1 * c)  # the null label adds nothing
        r = alpha / d_alpha
        score = (r * v - x) / (sigma**2 - r * d_sigma * sigma)
        x = x + (t_next - t) * (v - t * score)
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * torch.randn(x.shape, generator=g, dtype=torch.float64)
    g.manual_seed(7)
    options = dict(cfg_scale=2.5, guidance_low=0.3, guidance_high=0.7, path_type=path_type, generator=g)
    assert close(sample_sde(reference_field(), noise, y, 4, **options), x, 1e-10)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_score_from_velocity_inverts_the_velocity_of_a_score(path_type):
    """For data N(0, s^2) score and velocity are both known."""
    x, s = torch.linspace(-2, 2, 5, dtype=torch.float64), 0.7
    for t in (0.04, 0.5, 0.9):
        alpha, sigma, _, _ = interpolant(torch.tensor(t, dtype=torch.float64), path_type)
        v = gaussian_velocity(t, x, path_type, 0.0, s)
        score = repa_mini.score_from_velocity(v, x, t, path_type)
        assert close(score, -x / (alpha**2 * s**2 + sigma**2), 1e-9)


def test_integrating_in_float32_changes_less_than_a_grey_level(monkeypatch):
    """As on devices that have no float64."""
    model = random_sit(seed=1).eval()
    noise, y = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    exact = sample_ode(model, noise, y, 50, cfg_scale=1.5)
    dtypes = []
    model.register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
    monkeypatch.setattr(torch, "float64", torch.float32)
    single = sample_ode(model, noise, y, 50, cfg_scale=1.5)
    assert set(dtypes) == {torch.float32} and single.dtype == torch.float32
    assert 0 < (single - exact).abs().max() < 1 / 127.5


# ---- Data
def test_built_in_shapes_have_their_hue_and_never_repeat():
    images, labels = repa_mini.draw_shapes(200, seed=0)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8 and labels.bincount().tolist() == [20] * 10
    assert torch.equal(images, repa_mini.draw_shapes(200, seed=0)[0])
    assert len(images.flatten(1).unique(dim=0)) == 200
    red, green, blue = images.double().unbind(1)
    across, up = red - (green + blue) / 2, (green - blue) * math.sqrt(3) / 2
    hue = torch.atan2(up.flatten(1).sum(1), across.flatten(1).sum(1)) / (2 * math.pi) * 10
    assert ((hue - labels + 5) % 10 - 5).abs().max() < 0.2  # in tenths of the circle
    coloured = (images.max(1).values.int() - images.min(1).values.int() > 40).flatten(1).double()
    assert coloured.mean(1).min() > 0.02  # every image has some colour
    for k in range(10):  # and no pixel of a class can be learned by heart: in grey levels
        assert images[labels == k].double().std(0).max(0).values.min() > 15


def test_built_in_classes_differ_in_shape():
    images, labels = repa_mini.draw_shapes(400, seed=0)
    mask = images.max(1).values.int() - images.min(1).values.int() > 40  # coloured, not grey
    width, height = mask.any(1).double().sum(1), mask.any(2).double().sum(1)
    fill = mask.double().sum((1, 2)) / (width * height)  # of the bounding box
    shapes = {
        name: (width[labels == k].mean() / height[labels == k].mean(), fill[labels == k].mean())
        for k, name in enumerate(repa_mini.SHAPES)
    }
    for name, (ratio, _) in shapes.items():
        assert ratio > 1.5 if "wide" in name else ratio < 0.7 if "tall" in name else 0.9 < ratio < 1.1
    fills = [shapes[name][1] for name in ("square", "disc", "diamond", "star")]
    assert all(a > b + 0.1 for a, b in zip(fills, fills[1:]))


def test_pixels_and_unit_interval_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(repa_mini.to_pixels(repa_mini.to_unit(pixels)), pixels)
    assert repa_mini.to_unit(pixels)[[0, 255]].tolist() == [-1, 1]
    assert repa_mini.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def write_plain_images(folder, classes=("cat", "dog"), n=6, mode="RGB", size=(32, 32)):
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.new("RGB", size, (40 * i, 100 * k, 10)).convert(mode).save(folder / name / f"{i}.png")


def test_a_folder_without_a_test_split_holds_out_a_seeded_part_of_every_class(tmp_path):
    write_plain_images(tmp_path, ("a", "b", "c"), n=6)
    images, labels, val_images, val_labels, classes = repa_mini.load_data(tmp_path)
    assert classes == ["a", "b", "c"] and val_labels.bincount().tolist() == [1, 1, 1] and len(images) == 15
    together = torch.cat([images, val_images]).flatten(1).unique(dim=0)
    assert len(together) == 18  # nothing lost, nothing twice
    assert torch.equal(val_images, repa_mini.load_data(tmp_path)[2])


def test_a_folder_with_train_and_test_keeps_them_apart(tmp_path):
    write_plain_images(tmp_path / "train", n=5)
    write_plain_images(tmp_path / "test", n=2)
    images, labels, val_images, val_labels, classes = repa_mini.load_data(tmp_path)
    assert (len(images), len(val_images), classes) == (10, 4, ["cat", "dog"])
    assert labels.tolist() == [0] * 5 + [1] * 5 and images[1, :, 0, 0].tolist() == [40, 0, 10]


# ---- Training


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """Run the program in-process on few shapes with a small model. Returns the exit code, the rows of metrics.csv and
    what every training step saw (x, noise, t, y, the label embeddings, the target)."""
    size = dict(hidden_size=16, depth=2, num_heads=2, encoder_depth=1, patch_size=8)
    monkeypatch.setitem(SIT_MODELS, "SiT-Ti/4", size)
    shapes = [*repa_mini.draw_shapes(40, seed=0), *repa_mini.draw_shapes(20, seed=1), [str(k) for k in range(10)]]
    monkeypatch.setattr(repa_mini, "load_data", lambda folder, smoke=False: shapes)
    inner, recorded = training_losses, []

    def recording(model, x, noise, t, y, z=None, path_type="linear"):
        embedded = []
        hook = model.y_embedder.register_forward_hook(lambda module, inputs, out: embedded.append(out.detach()))
        losses = inner(model, x, noise, t, y, z, path_type)
        hook.remove()
        if model.training:
            recorded.append((x, noise, t, y, embedded[0], z))
        return losses

    monkeypatch.setattr(repa_mini, "training_losses", recording)
    count = iter(range(100))

    def run(*options, folder=None):
        recorded.clear()
        folder = folder or tmp_path / f"run{next(count)}"
        common = "--smoke --projector-dim 16 --batch-size 8 --max-train-steps 4 --log-every 2 --eval-every 4"
        common += " --checkpointing-steps 4 --num-steps 2 --cfg-scale 1"
        code = repa_mini.main([*common.split(), "--output-dir", str(folder), *options])
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        run.folder = folder
        return code, rows, list(recorded)

    return run


def test_a_vanilla_and_a_repa_run_share_start_batches_noise_times_and_dropped_labels(tiny_run):
    code, _, with_repa = tiny_run("--max-train-steps", "8", "--cfg-prob", "0.5", "--learning-rate", "1e-12")
    _, _, vanilla = tiny_run(
        "--max-train-steps", "8", "--cfg-prob", "0.5", "--learning-rate", "1e-12", "--proj-coeff", "0"
    )
    assert code == 0 and len(with_repa) == len(vanilla) == 8
    for ours, theirs in zip(with_repa, vanilla):  # the embeddings show the weights and which labels were dropped
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4]))
        assert close(ours[4], theirs[4], 1e-9)
        assert ours[5] is not None and theirs[5] is None
    assert not torch.equal(with_repa[0][0], with_repa[1][0]) and not torch.equal(with_repa[0][1], with_repa[1][1])


def test_an_epoch_shows_every_image_once_flipped_or_not(tiny_run):
    _, _, steps = tiny_run("--max-train-steps", "5", "--proj-coeff", "0")  # 5 batches of 8 are the 40 images
    images = repa_mini.to_unit(repa_mini.draw_shapes(40, seed=0)[0])
    seen = torch.cat([x for x, *_ in steps])
    plain, flipped = (
        (seen[:, None] == images[None]).flatten(2).all(2),
        (seen[:, None] == images.flip(-1)).flatten(2).all(2),
    )
    assert (plain | flipped).any(0).all() and 5 < flipped.any(1).sum() < 35


def test_metrics_have_one_row_per_log_interval_and_evaluation(tiny_run):
    _, rows, _ = tiny_run("--max-train-steps", "7", "--log-every", "2", "--eval-every", "3")
    assert [int(row["step"]) for row in rows] == [2, 3, 4, 6, 7]
    assert list(rows[0]) == repa_mini.COLUMNS
    assert rows[0]["velocity_loss"] and not rows[0]["val_alignment"]
    assert rows[1]["val_velocity_loss"] and rows[1]["val_alignment"] and not rows[1]["velocity_loss"]
    assert rows[3]["velocity_loss"] and rows[3]["val_velocity_loss"] and float(rows[3]["images_per_second"]) > 0
    assert sorted(f.name for f in tiny_run.folder.glob("*.png")) == [f"samples_{s:07d}.png" for s in (3, 6, 7)]
    assert Image.open(tiny_run.folder / "samples_0000007.png").size == (342, 342)


def test_metrics_are_the_means_of_the_steps_and_of_the_held_out_images(tiny_run):
    _, rows, steps = tiny_run("--learning-rate", "1e-12", "--cfg-prob", "0")
    torch.manual_seed(0)
    state = torch.load(tiny_run.folder / "checkpoint.pt", weights_only=True)
    model = SiT(**state["sit"])
    model.load_state_dict(state["ema"])
    with torch.no_grad():
        losses = [torch.stack(training_losses(model, x, noise, t, y, z)) for x, noise, t, y, _, z in steps[:2]]
    expected = torch.stack(losses).mean(0).tolist()
    assert [float(rows[0][k]) for k in ("velocity_loss", "repa_loss")] == pytest.approx(expected, rel=1e-5)
    images, labels = repa_mini.draw_shapes(20, seed=1)
    g = torch.Generator().manual_seed(0)
    noise, t = torch.randn(20, 3, 32, 32, generator=g), torch.rand(20, generator=g)
    torch.manual_seed(0)
    z = TargetEncoder(repa_mini.DEFAULT_ENCODER, 4, **repa_mini.TINY_DINOV2)(repa_mini.to_unit(images)).half()
    with torch.no_grad():
        v, r = training_losses(model.eval(), repa_mini.to_unit(images), noise, t, labels, z)
    measured = [float(rows[-1][k]) for k in ("val_velocity_loss", "val_alignment")]
    assert measured == pytest.approx([v.item(), -r.item()], rel=1e-5)


def test_a_vanilla_run_loads_no_encoder_and_has_no_projector(tiny_run, monkeypatch):
    monkeypatch.setattr(repa_mini, "TargetEncoder", None)
    code, rows, _ = tiny_run("--proj-coeff", "0")
    state = repa_mini.load_checkpoint(tiny_run.folder / "checkpoint.pt")
    assert code == 0 and not rows[-1]["repa_loss"] and not rows[-1]["val_alignment"]
    assert not any(name.startswith("projectors") for name in state["model"])


def test_repa_stops_at_the_given_step(tiny_run):
    _, rows, steps = tiny_run("--repa-stop-step", "2")
    assert [z is not None for *_, z in steps] == [True, True, False, False]
    assert rows[0]["repa_loss"] and not rows[1]["repa_loss"] and rows[1]["val_alignment"]


def test_cached_targets_give_the_losses_of_fresh_ones(tiny_run, capsys):
    _, fresh, _ = tiny_run("--max-train-steps", "8")
    _, cached, steps = tiny_run("--max-train-steps", "8", "--cache-targets")
    assert "--cache-targets takes" in capsys.readouterr().out
    assert all(z.dtype == torch.half for *_, z in steps)
    for a, b in zip(fresh, cached):
        for column in ("velocity_loss", "repa_loss", "grad_norm"):
            assert float(b[column]) == pytest.approx(float(a[column]), rel=2e-3)


def test_the_ema_follows_the_weights_with_a_decay_that_grows(tiny_run, monkeypatch):
    decays, inner = [], repa_mini.get_ema_multi_avg_fn
    monkeypatch.setattr(repa_mini, "get_ema_multi_avg_fn", lambda decay: decays.append(decay) or inner(decay))
    tiny_run("--max-train-steps", "1", "--learning-rate", "1e-2")
    state = repa_mini.load_checkpoint(tiny_run.folder / "checkpoint.pt")
    torch.manual_seed(0)
    start = SiT(**state["sit"]).state_dict()
    for name, ema in state["ema"].items():
        assert close(ema, 0.1 * start[name] + 0.9 * state["model"][name], 1e-6), name
    assert any((p - start[name]).abs().max() > 1e-3 for name, p in state["model"].items())
    assert decays == [0.1]


def test_without_learning_the_weights_stay_and_the_clip_is_at_one(tiny_run, monkeypatch):
    norms, inner = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, limit: norms.append(limit) or inner(p, limit))
    _, rows, _ = tiny_run("--learning-rate", "1e-12")
    assert norms == [1.0] * 4
    state = repa_mini.load_checkpoint(tiny_run.folder / "checkpoint.pt")
    torch.manual_seed(0)
    assert all(close(p, state["model"][name], 1e-10) for name, p in SiT(**state["sit"]).state_dict().items())


# ---- sample.py


@pytest.fixture
def checkpoint(tiny_run):
    assert tiny_run("--cfg-prob", "0.1")[0] == 0
    return tiny_run.folder / "checkpoint.pt"


def show(checkpoint, *options):
    return sample.main(["--ckpt", str(checkpoint), "--num-steps", "2", "--device", "cpu", *options])


def test_a_checkpoint_alone_is_sampled_as_its_model_says(checkpoint):
    assert show(checkpoint, "--classes", "3", "--num-samples", "2", "--npz", str(checkpoint.with_suffix(".npz"))) == 0
    state = torch.load(checkpoint, weights_only=True)
    model = SiT(**state["sit"]).eval()
    model.load_state_dict(state["ema"])
    noise = torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1)])
    expected = repa_mini.to_pixels(sample_ode(model, noise, torch.tensor([3, 3]), 2)).permute(0, 2, 3, 1)
    array = sample.np.load(checkpoint.with_suffix(".npz"))["arr_0"]
    assert array.shape == (2, 32, 32, 3) and array.dtype == sample.np.uint8
    assert (torch.from_numpy(array).int() - expected.int()).abs().max() <= 1


def test_an_image_is_the_same_whatever_the_batch_size(checkpoint, tmp_path):
    arrays = []
    for size in ("2", "7"):
        assert show(checkpoint, "--num-samples", "7", "--batch-size", size, "--npz", str(tmp_path / "a.npz")) == 0
        arrays.append(sample.np.load(tmp_path / "a.npz")["arr_0"].astype(int))
    assert abs(arrays[0] - arrays[1]).max() <= 1
    assert abs(arrays[0][0] - arrays[0][1]).max() > 10


@pytest.mark.parametrize("mode", [["--mode", "ode", "--heun"], ["--mode", "sde"]])
def test_grids_and_folders_of_samples(checkpoint, tmp_path, mode):
    assert show(checkpoint, *mode, "--cfg-scale", "1.5", "--guidance-low", "0.1", "--guidance-high", "0.8") == 0
    assert Image.open(checkpoint.parent / "samples.png").size == (342, 342)  # ten classes, one a row
    assert (
        show(checkpoint, *mode, "--classes", "1", "4", "--num-samples", "5", "--save-dir", str(tmp_path / "png")) == 0
    )
    assert sorted(f.name for f in (tmp_path / "png").iterdir()) == [f"{i:06d}.png" for i in range(5)]
    assert Image.open(tmp_path / "png" / "000000.png").size == (32, 32)


def test_trajectory_ends_in_the_sample_and_predicts_clean_images(checkpoint):
    options = "--classes 0 1 --num-steps 8 --seed 3".split()
    assert show(checkpoint, "--trajectory", *options) == 0
    assert show(checkpoint, "--output", str(checkpoint.parent / "samples.png"), "--num-samples", "2", *options) == 0
    strip, samples = Image.open(checkpoint.parent / "trajectory.png"), Image.open(checkpoint.parent / "samples.png")
    assert strip.size == (2 + 34 * 8, 2 + 34 * 4)
    for row, sampled in ((0, 0), (1, 0), (2, 1), (3, 1)):
        cell = strip.crop((2 + 34 * 7, 2 + 34 * row, 34 * 8, 34 * (row + 1)))
        assert cell.tobytes() == samples.crop((2, 2 + 34 * sampled, 34, 34 * (sampled + 1))).tobytes()
    # an exact velocity predicts the clean image from any t: v = eps - x
    clean, args = torch.rand(1, 3, 32, 32) - 0.5, sample.build_parser().parse_args(["--ckpt", "x", "--num-steps", "8"])
    field = Field(lambda x, t, y: (x - clean) / t, num_classes=1)
    picture = sample.trajectory(field, args, "linear", torch.device("cpu"))
    for column in range(8):
        cell = picture[:, 36:68, 2 + 34 * column : 34 + 34 * column]
        assert close(cell, repa_mini.to_pixels(clean)[0] / 255, 1.01 / 255)


def test_alignment_picture_and_table_of_a_checkpoint(checkpoint, capsys):
    assert show(checkpoint, "--alignment", "--num-samples", "2") == 0
    assert Image.open(checkpoint.parent / "alignment.png").size == (2 + 66 * 6, 2 + 66 * 6)
    assert show(checkpoint, "--cknna", "--topk", "3") == 0
    lines = (checkpoint.parent / "cknna.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("layer,cknna t=0.1") and len(lines[1].split(",")) == 11
    assert "20 held-out images" in capsys.readouterr().out
    assert show(checkpoint, "--fd", "--num-samples", "12") == 0
    assert "12 samples, 20 val images" in capsys.readouterr().out


class Patches(nn.Module):
    """An encoder whose tokens are the patches themselves, and a model whose only block sees those of x_t."""

    num_classes, class_dropout_prob, grid_size = 10, 0.1, 4

    def __init__(self):
        super().__init__()
        self.blocks, self.pos_embed = nn.ModuleList([nn.Identity()]), nn.Parameter(torch.zeros(1))

    def forward(self, x, t=None, y=None):
        tokens = F.unfold(x, 8, stride=8).mT
        return tokens if t is None else (x, self.blocks[0](tokens))


def test_likeness_of_noisy_patches_to_clean_ones_falls_with_the_noise(capsys):
    images, labels = repa_mini.draw_shapes(60, seed=0)
    picture = sample.alignment_picture(Patches(), Patches(), images[:2], "linear")
    cosines = [float(word) for word in re.findall(r"([0-9.]+) at t", capsys.readouterr().out)]
    assert cosines == sorted(cosines, reverse=True) and cosines[0] > 0.9 and cosines[-1] < 0.3
    white = picture[:, 2 + 66 * 2 : 66 * 3]  # the third row: the clean column white, then darker and darker
    means = [white[:, :, 2 + 66 * i : 66 * (i + 1)].mean().item() for i in range(6)]
    assert means[0] == 1 and means == sorted(means, reverse=True) and close(means[1:4], cosines[:3], 0.1)
    header, row = sample.representation_table(Patches(), Patches(), images, labels, "linear", 10)
    cknna = dict(zip(header.split(","), map(float, row.split(","))))
    assert 0.9 < cknna["cknna t=0.1"] < 0.9999 and cknna["cknna t=0.1"] > cknna["cknna t=0.5"] > cknna["cknna t=0.9"]


def test_cknna_works_without_a_projector(tiny_run):
    tiny_run("--proj-coeff", "0")
    assert show(tiny_run.folder / "checkpoint.pt", "--cknna", "--topk", "3") == 0


def test_equal_features_have_equal_colours():
    targets = torch.randn(2, 16, 12)
    colours = sample.pca_colours(targets, targets.clone(), targets.flip(1))
    assert torch.equal(colours[0], colours[1]) and torch.equal(colours[0].flip(1), colours[2])
    assert colours[0].min() == 0 and colours[0].max() == 1 and colours[0].std() > 0.1


CKNNA = {(40, 16, 24, 5): 0.688997824777114, (64, 8, 32, 10): 0.4237325717766288}  # n, da, db, k


@pytest.mark.parametrize("sizes", CKNNA)
def test_cknna_is_that_of_the_platonic_representation_hypothesis(sizes):
    n, da, db, k = sizes
    a = wave((n, da), 1.1)
    b = a @ wave((da, db), 0.6) + 0.3 * wave((n, db), 2.3)
    assert abs(sample.cknna(F.normalize(a, dim=1), F.normalize(b, dim=1), k) - CKNNA[sizes]) < 1e-6


def test_cknna_is_one_for_equal_features_and_blind_to_rotation_and_scale():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 8, generator=g).double(), torch.randn(50, 12, generator=g).double()
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g).double())[0]
    assert sample.cknna(a, a) == pytest.approx(1, abs=1e-4)
    assert sample.cknna(3 * a @ rotation, 0.1 * b) == pytest.approx(sample.cknna(a, b), abs=1e-9)
    assert abs(sample.cknna(a, b)) < 0.3


def test_knn_accuracy_of_separate_and_of_random_features():
    labels = torch.arange(100) % 5
    g = torch.Generator().manual_seed(0)
    assert sample.knn_accuracy(F.one_hot(labels, 5) + 0.01 * torch.randn(100, 5, generator=g), labels) == 1
    assert sample.knn_accuracy(torch.randn(100, 5, generator=g), labels) < 0.4
    # Pairs of neighbours of different classes: nobody votes for themselves, so the nearest one is always wrong.
    pairs = torch.eye(50, dtype=torch.float64).repeat_interleave(2, dim=0)
    assert sample.knn_accuracy(pairs, torch.arange(100) % 2, topk=1) == 0


def test_frechet_distance_is_the_closed_form_and_zero_for_equal_sets():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=g).double()
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # mean 0, covariance 1, exactly
    scales, shift = torch.tensor([1.0, 2, 3, 0.5, 0.1, 4]).double(), torch.arange(6).double()
    expected = (shift**2).sum() + ((scales - 1) ** 2).sum()
    assert sample.frechet_distance(a, a * scales + shift) == pytest.approx(expected.item(), rel=1e-9)
    mixed = a @ torch.randn(6, 6, generator=g).double()  # covariances that do not commute
    other = a * scales
    eigenvalues = torch.linalg.eigvals(other.T.cov() @ mixed.T.cov()).real.clamp(min=0)
    closed = other.var(0).sum() + mixed.var(0).sum() - 2 * eigenvalues.sqrt().sum()
    assert sample.frechet_distance(other, mixed) == pytest.approx(closed.item(), rel=1e-6)
    few = torch.randn(10, 64, generator=g)  # fewer samples than dimensions
    assert abs(sample.frechet_distance(few, few.flip(0))) < 1e-5
    assert sample.frechet_distance(few, few + 1) == pytest.approx(64, rel=1e-6)


# ---- Faults and mistakes: a run survives being killed, interrupted, out of disk space and out of numbers, and whatever
# a user gets wrong ends with one sentence on stderr and exit code 2


OPTIONS = "--smoke --model SiT-Ti/8 --projector-dim 16 --batch-size 4 --max-train-steps 6 --num-steps 2 --cfg-scale 1"
OPTIONS = f"{OPTIONS} --log-every 2 --eval-every 3 --checkpointing-steps 2".split()
draw_shapes = repa_mini.draw_shapes


class silent:  # tqdm without its bar, so that stderr holds nothing but complaints
    def __init__(self, iterable, *args, **kwargs):
        self.iterable, self.write = iterable, print

    def __iter__(self):
        return iter(self.iterable)

    def set_postfix(self, values):
        assert all(isinstance(value, float) for value in values.values())


@contextlib.contextmanager
def tiny():
    """A SiT-Ti/8 of two blocks, 40 training and 20 held-out shapes, and no progress bars."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = dict(hidden_size=16, depth=2, num_heads=2, encoder_depth=1, patch_size=8)
        patch.setitem(repa_mini.SIT_MODELS, "SiT-Ti/8", sizes)
        patch.setattr(repa_mini, "draw_shapes", lambda n, seed: draw_shapes({4000: 40, 200: 20}[n], seed))
        patch.setattr(repa_mini, "tqdm", silent)
        patch.setattr(sample, "tqdm", silent)
        yield


def run(main, *argv):
    with tiny():
        return main([str(word) for word in argv])


def train(folder, *argv):
    return run(repa_mini.main, *OPTIONS, "--output-dir", folder, *argv)


def resume(folder, *argv):
    return run(repa_mini.main, "--resume", "--output-dir", folder, *argv)


def complaint(capsys, code):
    """The one line that a mistake leaves on stderr."""
    error = capsys.readouterr().err
    assert code == 2
    assert error.endswith("\n") and error.count("\n") == 1, error
    return error


def bits(x):
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.numpy().tobytes()
    if isinstance(x, dict):
        return {name: bits(value) for name, value in x.items()}
    return [bits(value) for value in x] if isinstance(x, (list, tuple)) else x


def table(folder):
    """metrics.csv as dicts, without the one column that no two runs share."""
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def steps(folder):
    return [int(row["step"]) for row in table(folder)]


def outcome(folder):
    """All that a finished run leaves behind, to the last bit: metrics, weights, EMA, optimizer, unlogged losses."""
    state = repa_mini.load_checkpoint(folder / "checkpoint.pt")
    assert state["metrics"] == (folder / "metrics.csv").read_text()
    assert not list(folder.glob("*.part"))
    names = "sit classes step rows model ema optimizer scaler".split()
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    return table(folder), pictures, {name: bits(state[name]) for name in names}


def every_step(monkeypatch, action):
    """Call action(n) in the n-th training step from now on, after the gradients."""
    clip, count = nn.utils.clip_grad_norm_, iter(range(1, 10**6))

    def clip_and_act(*args, **kwargs):
        norm = clip(*args, **kwargs)
        action(next(count))
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip_and_act)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of six steps, with checkpoints at 0, 2, 4 and 6. To be read, not written."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vanilla")
    assert train(folder, *"--proj-coeff 0 --cfg-prob 0 --max-train-steps 1".split()) == 0
    return folder


@pytest.fixture
def checkpoint_at_4(tmp_path):
    """A run stopped at step 4 of 6: its folder and the bytes of its checkpoint."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        every_step(patch, lambda n: n == 4 and os.kill(os.getpid(), signal.SIGTERM))
        assert train(folder) == 143
    assert repa_mini.load_checkpoint(folder / "checkpoint.pt")["step"] == 4
    return folder, (folder / "checkpoint.pt").read_bytes()


def test_cached_targets_that_fit_nowhere_are_refused_with_their_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "sysconf", lambda name: 1)  # a computer with a byte of memory
    huge = torch.zeros(1, dtype=torch.uint8).expand(50_000, 3, 32, 32)  # as many images as CIFAR-10 has
    few = repa_mini.draw_shapes(20, seed=0)
    labels = torch.zeros(1, dtype=torch.long).expand(50_000)
    monkeypatch.setattr(repa_mini, "load_data", lambda *args: (huge, labels, *few, [*"0123456789"]))
    monkeypatch.setitem(repa_mini.TINY_DINOV2, "embed_dim", 384)
    assert train(tmp_path / "run", "--model", "SiT-S/4", "--cache-targets") == 2
    output, error = capsys.readouterr()
    assert "--cache-targets takes 4.9 GB" in output and "leave out --cache-targets" in error


# ---- Killed
LONG = "--max-train-steps 40 --log-every 3 --eval-every 8 --checkpointing-steps 1".split()


def train_and_be_killed(folder, argv, moment):
    """For a child process. The moments lie in the second checkpoint that the child writes."""
    save, sync, replace, count = torch.save, os.fsync, os.replace, iter(range(10**6))

    def now(at):
        return at == moment and next(count) == 1

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def save_or_die(state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        if now("half written"):
            file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            file.flush()
            kill()
        file.write(buffer.getvalue())

    def sync_or_die(number):
        return kill() if now("written, not synced") else sync(number)

    def replace_or_die(source, target):
        if now("synced, not renamed"):
            kill()
        replace(source, target)
        if now("renamed"):
            kill()

    torch.save, os.fsync, os.replace = save_or_die, sync_or_die, replace_or_die
    run(repa_mini.main, *argv, "--output-dir", folder)


def test_a_run_killed_at_any_moment_keeps_a_whole_checkpoint_and_goes_on_to_the_same_bits(tmp_path):
    assert train(tmp_path / "whole", *LONG) == 0
    context = multiprocessing.get_context("forkserver")  # imports once, and forks before torch has threads
    context.set_forkserver_preload(["timm", "torchvision", "pytest", "repa_mini", "sample"])
    folder, rng, reached = tmp_path / "killed", random.Random(0), 0
    checkpoint = folder / "checkpoint.pt"
    exact = ["half written", "written, not synced", "synced, not renamed", "renamed"]
    for moment in [*exact, None, None, None, "half written"]:
        begun = checkpoint.exists()
        before = checkpoint.stat().st_mtime_ns if begun else 0
        argv = ["--resume"] if begun else [*OPTIONS, *LONG]
        child = context.Process(target=train_and_be_killed, args=(folder, argv, moment))
        child.start()
        if moment is None:  # anywhere within the next steps
            while child.is_alive() and checkpoint.stat().st_mtime_ns == before:
                child.join(0.002)
            child.join(rng.uniform(0, 0.03))
            child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        step = repa_mini.load_checkpoint(checkpoint)["step"]
        assert reached <= step < 40
        reached = step
    assert (folder / "checkpoint.part").exists()  # the half that the last one left
    assert resume(folder) == 0
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_rows_past_the_checkpoint_are_dropped_and_none_is_doubled_or_missing(tmp_path, monkeypatch):
    every = "--max-train-steps 7 --log-every 1 --eval-every 2 --checkpointing-steps 3".split()
    assert train(tmp_path / "whole", *every) == 0
    with monkeypatch.context() as patch:
        every_step(patch, lambda n: 1 / (n - 6))  # as sudden as a kill: nothing cleans up
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "run", *every)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    with monkeypatch.context() as patch:
        every_step(patch, lambda n: 1 / (n - 1))
        with pytest.raises(ZeroDivisionError):
            resume(tmp_path / "run")
    assert steps(tmp_path / "run") == [1, 2, 3]  # the checkpoint's
    assert resume(tmp_path / "run") == 0
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# ---- Interrupted
VARIANTS = ["", "--proj-coeff 0", "--cache-targets --repa-stop-step 4 --path-type cosine --seed 7"]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_run_interrupted_again_and_again_equals_an_uninterrupted_one(tmp_path, monkeypatch, capsys, options):
    # 10 batches an epoch: the 12 steps go into the second; a stop after each number of steps falls before, on and
    # after rows, evaluations and checkpoints.
    argv = [*"--max-train-steps 12 --log-every 3 --eval-every 4 --checkpointing-steps 5".split(), *options.split()]
    assert train(tmp_path / "whole", *argv) == 0
    folder, done = tmp_path / "run", 0
    for number, count in [(15, 1), (2, 1), (15, 2), (2, 3), (15, 1), (2, 3)]:
        with monkeypatch.context() as patch:
            every_step(patch, lambda n: n == count and os.kill(os.getpid(), number))
            capsys.readouterr()
            assert (resume(folder) if done else train(folder, *argv)) == {2: 130, 15: 143}[number]
        done += count  # the step in hand was finished, and no other begun
        assert repa_mini.load_checkpoint(folder / "checkpoint.pt")["step"] == done
        hint = f"to go on: python repa_mini.py --resume --output-dir {folder}"
        assert hint in capsys.readouterr().out.splitlines()[-1]
    assert resume(folder) == 0
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_run_made_longer_equals_one_that_was_long_from_the_start(tmp_path, finished):
    assert train(tmp_path / "long", "--max-train-steps", 12) == 0
    assert train(tmp_path / "run") == 0
    assert resume(tmp_path / "run", "--max-train-steps", 12) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "long")


@pytest.mark.parametrize("length", [4, 6])
def test_resuming_a_run_that_is_long_enough_changes_nothing(tmp_path, finished, length):
    assert train(tmp_path / "run") == 0
    assert resume(tmp_path / "run", "--max-train-steps", length) == 0
    assert outcome(tmp_path / "run") == outcome(finished)


def test_after_a_run_signals_have_their_usual_meaning(finished):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---- Out of disk space
@contextlib.contextmanager
def full_disk(kind, folder):
    """A file that grows beyond 100 kB meets the file size limit, or every write to the temporary file meets ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if kind == "no space":
        (folder / "checkpoint.part").symlink_to("/dev/full")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["no space", "file too large"])
def test_a_full_disk_leaves_the_previous_checkpoint_untouched(checkpoint_at_4, finished, capsys, kind):
    folder, before = checkpoint_at_4
    with full_disk(kind, folder):
        code = resume(folder, "--eval-every", 100, "--max-train-steps", 8)  # its first file is the checkpoint of step 6
    error = complaint(capsys, code)
    assert f"cannot write {folder / 'checkpoint.pt'}" in error and "the one before is untouched" in error
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob("*.part"))
    assert resume(folder) == 0  # there is room again
    assert outcome(folder) == outcome(finished)


@pytest.mark.parametrize("name", ["metrics.csv", "samples_0000006.png"])
def test_a_full_disk_met_elsewhere_is_answered_too(checkpoint_at_4, finished, capsys, name):
    folder, before = checkpoint_at_4
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/full")
    error = complaint(capsys, resume(folder))
    assert "No space left on device" in error and "make room" in error
    assert (folder / "checkpoint.pt").read_bytes() == before
    (folder / name).unlink()
    assert resume(folder) == 0
    assert outcome(folder) == outcome(finished)


def test_ctrl_c_before_the_first_step_ends_without_a_traceback(tmp_path, monkeypatch, finished, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(repa_mini, "load_data", interrupted)
    assert train(tmp_path / "run") == 130 and not (tmp_path / "run").exists()
    monkeypatch.setattr(sample, "draw_samples", interrupted)
    assert run(sample.main, "--ckpt", finished / "checkpoint.pt", "--device", "cpu") == 130
    assert capsys.readouterr().err == ""


# ---- Out of numbers
def not_finite(what, at, monkeypatch):
    """From training step `at` on the velocity loss, the REPA loss, or nothing but the gradient is not finite."""
    honest, count = repa_mini.training_losses, iter(range(1, 10**6))

    def losses(*args, **kwargs):
        velocity, projection = honest(*args, **kwargs)
        if torch.is_grad_enabled() and next(count) >= at:  # evaluations do not count
            if what == "gradient":
                velocity = velocity.clone()
                velocity.register_hook(lambda gradient: gradient * torch.inf)
            velocity = velocity * torch.nan if what == "velocity" else velocity
            projection = projection + torch.inf if what == "REPA" else projection  # its gradient stays finite
        return velocity, projection

    monkeypatch.setattr(repa_mini, "training_losses", losses)


@pytest.mark.parametrize("what", ["velocity", "REPA", "gradient"])
@pytest.mark.parametrize("every", ["--log-every 1", "--log-every 100"])  # seen by the row, or by the checkpoint
def test_numbers_that_are_not_finite_stop_the_run_before_a_checkpoint_is_written(
    checkpoint_at_4, finished, monkeypatch, capsys, what, every
):
    folder, before = checkpoint_at_4
    with monkeypatch.context() as patch:
        not_finite(what, 2, patch)
        error = complaint(capsys, resume(folder, *every.split()))
    assert "step 6: velocity loss, REPA loss, gradient norm are " in error
    numbers = [float(number) for number in error.split(" are ")[1].split(", not finite")[0].split(", ")]
    finite = dict(velocity=[False, True, False], REPA=[True, False, True], gradient=[True, True, False])[what]
    assert torch.tensor(numbers).isfinite().tolist() == finite and str(folder) in error
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob("*.part")) and 6 not in steps(folder)
    assert resume(folder) == 0
    assert outcome(folder) == outcome(finished)


def test_the_first_step_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    not_finite("velocity", 2, monkeypatch)
    assert "step 2: " in complaint(capsys, train(tmp_path / "run", "--log-every", 5, "--checkpointing-steps", 5))


def test_a_stop_does_not_save_numbers_that_are_not_finite(checkpoint_at_4, monkeypatch, capsys):
    folder, before = checkpoint_at_4
    not_finite("velocity", 2, monkeypatch)
    every_step(monkeypatch, lambda n: n == 2 and os.kill(os.getpid(), signal.SIGTERM))
    rarely = "--max-train-steps 10 --log-every 100 --checkpointing-steps 100".split()
    assert "step 6: " in complaint(capsys, resume(folder, *rarely))
    assert (folder / "checkpoint.pt").read_bytes() == before


# ---- Half precision
def test_under_fp16_a_step_that_overflows_is_skipped_and_does_not_end_the_run(tmp_path, monkeypatch):
    """As on a GPU without bf16; the CPU's autocast stands in. The first scale is far too large, the second is 2^10."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-50)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(repa_mini, "autocast", lambda device: torch.autocast(device.type, torch.float16))
    assert train(tmp_path / "whole") == 0
    state = repa_mini.load_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    assert state["scaler"]["scale"] == 2.0**10 and state["optimizer"]["state"][1]["step"] == 5  # of 6
    assert all(p.isfinite().all() for p in state["model"].values())
    for row in table(tmp_path / "whole"):
        assert float(row["velocity_loss"] or 0) < 2 and float(row["grad_norm"] or 0) < 2  # without the scale
    with monkeypatch.context() as patch:
        every_step(patch, lambda n: n == 1 and os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path / "run") == 143
    assert resume(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-6, 1e-3, 1.0, 250.0, 6e4])
def test_the_repa_loss_of_half_precision_tokens_of_any_length_is_exact(dtype, length):
    torch.manual_seed(0)
    z_tilde, z = F.normalize(torch.randn(2, 3, 5, 16), dim=-1).unbind()
    z_tilde, z = (length * z_tilde).to(dtype), (z + z_tilde).to(dtype)  # squares of 1e-6 vanish, of 6e4 overflow
    exact = -F.cosine_similarity(z_tilde.double(), z.double(), dim=-1).mean()
    for loss in (repa_mini.repa_loss(z_tilde, z), repa_mini.repa_loss(z, z_tilde)):
        assert loss.dtype == torch.float32
        assert abs(loss.item() - exact.item()) < 1e-6
    assert exact < -0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 6e4])
def test_the_velocity_loss_of_half_precision_predictions_is_exact(dtype, size):
    torch.manual_seed(0)
    prediction = (size * torch.rand(4, 3, 8, 8)).to(dtype)  # squares of 6e4 overflow, of 1e-4 vanish
    x, noise, t = torch.zeros(4, 3, 8, 8, dtype=dtype), torch.zeros(4, 3, 8, 8, dtype=dtype), torch.rand(4).to(dtype)
    loss, _ = repa_mini.training_losses(lambda x_t, t, y: (prediction, None), x, noise, t, None)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(prediction.double().square().mean().item(), rel=1e-6)


def test_zero_tokens_have_a_finite_loss_and_gradient():
    z_tilde = torch.zeros(1, 2, 4, requires_grad=True)
    loss = repa_mini.repa_loss(z_tilde, torch.zeros(1, 2, 4))
    loss.backward()
    assert loss.item() == 0 and z_tilde.grad.isfinite().all()


def test_float64_stays_float64():
    torch.manual_seed(0)
    x, noise, prediction, z = torch.randn(4, 2, 3, 8, 8, dtype=torch.float64)
    t = torch.rand(2, dtype=torch.float64)
    losses = repa_mini.training_losses(lambda x_t, t, y: (prediction, prediction), x, noise, t, None, z)
    assert [loss.dtype for loss in losses] == [torch.float64] * 2
    assert losses[0].item() == pytest.approx((prediction - (noise - x)).square().mean().item(), rel=1e-14)
    assert losses[1].item() == pytest.approx(-F.cosine_similarity(prediction, z, dim=-1).mean().item(), rel=1e-13)


# ---- Files that are no checkpoint
class Trap:
    """A pickle that creates a file when it is opened without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def bad_file(kind, path, whole):
    """Write something that is not what it should be to `path`; returns the file that must not come into being."""
    trap = path.with_name("executed")
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "missing its end":
        path.write_bytes(whole[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint\n" * 100)
    elif kind == "another dict":
        torch.save(dict(model={}, ema={}, opt={}, steps=1), path)
    elif kind == "a list":
        torch.save([1, 2, 3], path)
    elif kind == "another model":  # the projector is not of this file's shape
        state = torch.load(io.BytesIO(whole), weights_only=True)
        state["ema"]["projectors.0.0.weight"] = torch.zeros(3, 3)
        torch.save(state, path)
    elif kind == "code in a pickle":
        path.write_bytes(pickle.dumps(Trap(trap), protocol=2))
        pickle.loads(path.read_bytes()).close()  # the trap works
    elif kind == "code in a zip":
        torch.save(dict(config=Trap(trap), model=Trap(trap)), path)
        torch.load(path, weights_only=False)["config"].close()
    assert trap.exists() == kind.startswith("code")
    trap.unlink(missing_ok=True)
    return trap


BAD = ["truncated", "missing its end", "empty", "text", "another dict", "a list", "code in a pickle", "code in a zip"]
WHICH = dict.fromkeys(["another dict", "a list", "another model"], "is of another program or model")
WHICH |= dict.fromkeys(["text", "code in a pickle", "code in a zip"], "is no checkpoint or has code in it")
WHICH["absent"] = "does not exist"


@pytest.mark.parametrize("kind", [*BAD, "another model", "absent"])
def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_is_executed(tmp_path, finished, capsys, kind):
    path = tmp_path / "checkpoint.pt"
    trap = bad_file(kind, path, (finished / "checkpoint.pt").read_bytes())
    for use in (lambda: resume(tmp_path), lambda: run(sample.main, "--ckpt", path)):
        error = complaint(capsys, use())
        assert f"cannot use checkpoint {path}, which {WHICH.get(kind, 'is truncated')}: " in error
    with pytest.raises(ValueError, match="cannot use checkpoint"):
        repa_mini.load_checkpoint(path)
    assert not trap.exists()
    assert [p.name for p in tmp_path.iterdir()] == ([] if kind == "absent" else ["checkpoint.pt"])


# ---- Where a run goes
def test_without_an_output_folder_every_run_gets_a_fresh_one_and_says_which(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/002-kept").mkdir()
    names = ["runs/003-SiT-Ti-8-repa", "runs/004-SiT-Ti-8-vanilla", "runs/005-SiT-Ti-8-repa"]
    for name, coeff in zip(names, (0.5, 0, 0.5)):
        assert run(repa_mini.main, *OPTIONS, "--max-train-steps", 1, "--proj-coeff", coeff) == 0
        assert name in capsys.readouterr().out
        assert repa_mini.load_checkpoint(Path(name, "checkpoint.pt"))["step"] == 1
    assert sorted(str(path) for path in Path("runs").iterdir()) == ["runs/002-kept", *names]
    Path("runs/999-last").mkdir()
    for name in ("runs/1000-SiT-Ti-8-repa", "runs/1001-SiT-Ti-8-repa"):
        assert run(repa_mini.main, *OPTIONS, "--max-train-steps", 1) == 0
        assert f"in {name}\n" in capsys.readouterr().out


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, capsys):
    before = outcome(finished)
    error = complaint(capsys, train(finished))
    assert str(finished) in error and "--resume" in error
    assert outcome(finished) == before


def test_a_metrics_csv_that_is_already_there_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("mine")
    assert "already holds a run" in complaint(capsys, train(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert (tmp_path / "metrics.csv").read_text() == "mine"


def test_an_output_folder_that_is_a_file_or_lies_in_one_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(repa_mini, "compute_targets", None)  # before the long part begins
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in complaint(capsys, train(tmp_path / "file"))
    assert str(tmp_path / "file") in complaint(capsys, train(tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_needs_to_know_the_folder(capsys):
    assert "--output-dir" in complaint(capsys, run(repa_mini.main, "--resume"))


CONTRADICTIONS = ["--learning-rate 0.1", "--model SiT-S/8", "--seed 1", "--cfg-prob 0.2", "--batch-size 5"]
CONTRADICTIONS += ["--proj-coeff 0.25", "--path-type cosine", "--encoder-depth 2", "--encoder vit_tiny_patch16_224"]
CONTRADICTIONS += ["--projector-dim 8", "--repa-stop-step 3", "--data .", "--cache-targets"]


@pytest.mark.parametrize("options", CONTRADICTIONS)
def test_resume_refuses_what_contradicts_the_checkpoint_and_names_it(finished, capsys, options):
    before = outcome(finished)
    error = complaint(capsys, resume(finished, *options.split(), "--max-train-steps", 8))
    option, *value = options.split()
    has = repa_mini.load_checkpoint(finished / "checkpoint.pt")["config"][option[2:].replace("-", "_")]
    assert f"{option} {value[0] if value else True} (not {has}) contradicts the checkpoint" in error
    assert outcome(finished) == before


def test_resume_names_every_option_that_contradicts(finished, capsys):
    error = complaint(capsys, resume(finished, *"--seed 1 --batch-size 5 --encoder-depth 13".split()))
    assert (
        "--seed 1 (not 0)" in error and "--batch-size 5 (not 4)" in error and "--encoder-depth 13 (not None)" in error
    )


def test_resume_may_change_length_intervals_device_and_the_look_of_the_samples(tmp_path):
    folder = tmp_path / "run"
    assert train(folder) == 0
    options = "--smoke --log-every 1 --eval-every 8 --checkpointing-steps 8 --num-steps 3 --cfg-scale 2 --device cpu"
    assert resume(folder, *options.split(), "--no-compile", "--max-train-steps", 8) == 0
    assert steps(folder) == [2, 3, 4, 6, 7, 8]
    config = repa_mini.load_checkpoint(folder / "checkpoint.pt")["config"]
    assert (config["log_every"], config["num_steps"], config["cfg_scale"], config["max_train_steps"]) == (1, 3, 2.0, 8)


# ---- Mistakes on the command line: the option, and what the sentence must name
MISTAKES = {
    "--model SiT-M/2": "SiT-{Ti,S,B,L,XL}/{2,4,8}",
    "--encoder-depth 0": "from 1",
    "--encoder-depth -1": "from 1",
    "--encoder-depth 3": "1 to 2",
    "--encoder-depth 13 --model SiT-S/8": "1 to 12",
    "--batch-size 0": "from 1",
    "--batch-size 41": "40 training images",
    "--batch-size 2.5": "invalid int value: '2.5'",
    "--learning-rate 0": "positive",
    "--learning-rate -0.1": "positive",
    "--learning-rate nan": "positive",
    "--learning-rate inf": "positive",
    "--max-train-steps 0": "from 1",
    "--log-every 0": "from 1",
    "--eval-every 0": "from 1",
    "--checkpointing-steps -5": "from 1",
    "--num-steps 0": "from 1",
    "--repa-stop-step 0": "from 1",
    "--projector-dim 0": "from 1",
    "--cfg-prob 1.0": "[0, 1)",
    "--cfg-prob -0.1": "[0, 1)",
    "--cfg-prob nan": "[0, 1)",
    "--cfg-scale 2 --cfg-prob 0": "--cfg-prob 0",
    "--cfg-scale inf": "a number",
    "--proj-coeff -0.5": "from 0",
    "--proj-coeff nan": "from 0",
    "--proj-coeff text": "invalid float value: 'text'",
    "--path-type spiral": "linear or cosine",
    "--seed -1": "from 0",
    "--device nonsense": "cpu is",
    "--device cuda:99": " is",
    "--device meta": "cpu is",
    "--encoder nonsense": "timm.list_models()",
    "--encoder vit_tiny_patch16_224.nonsense": "Invalid pretrained tag",
    "--encoder resnet18.a1_in1k --encoder-weights nowhere.pth": ".safetensors or .pth",
    "--data nowhere": "<class>/<image>",
    "--nonsense 1": "unrecognized arguments",
    "--enc vit_tiny_patch16_224": "unrecognized arguments",  # not taken for --encoder
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_one_sentence_before_a_folder_is_made(tmp_path, capsys, mistake):
    error = complaint(capsys, train(tmp_path / "run", *mistake.split()))
    assert MISTAKES[mistake] in error
    assert mistake.split()[0] in error or mistake.split()[1] in error
    assert not (tmp_path / "run").exists()


def test_a_device_error_of_many_lines_becomes_one_sentence(monkeypatch):
    def no_device(*args, **kwargs):  # what CUDA says of a GPU too many
        raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range\nCompile with ...")

    monkeypatch.setattr(torch, "Generator", no_device)
    with pytest.raises(ValueError, match="device cuda:7 is not here") as caught:
        repa_mini.pick_device("cuda:7")
    assert "\n" not in str(caught.value)


# ---- No network
def no_network(*args, **kwargs):
    raise urllib.error.URLError("Network is unreachable")


def test_without_a_network_cifar10_is_missed_in_a_sentence_with_a_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no ./data is
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    argv = [word for word in OPTIONS if word != "--smoke"]
    error = complaint(capsys, run(repa_mini.main, *argv, "--proj-coeff", 0, "--device", "cpu"))
    assert "CIFAR-10" in error and "Network is unreachable" in error and "--data" in error and "--smoke" in error
    assert not Path("runs").exists()


def test_without_a_network_encoder_weights_are_missed_in_a_sentence_with_a_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm.models._hub.hf_hub_download", no_network)
    error = complaint(capsys, train(tmp_path / "run", "--encoder", "vit_tiny_patch16_224"))
    assert "vit_tiny_patch16_224" in error and "Network is unreachable" in error
    assert "--encoder-weights" in error and "--smoke" in error
    assert not (tmp_path / "run").exists()


# ---- Encoder weights
SMALL = dict(embed_dim=24, depth=1, num_heads=3)
ENCODERS = {  # name: a small variant, the grid whose position table needs no resizing, one of its tensors
    "vit_tiny_patch16_224": (SMALL, 14, "blocks.0.attn.qkv.weight"),  # supervised, with a head
    "vit_small_patch14_dinov2.lvd142m": (SMALL, 37, "blocks.0.ls1.gamma"),
    "tf_efficientnet_lite0": ({}, 4, "blocks.1.0.bn1.running_var"),  # a CNN
}


def random_weights(name, **changes):
    torch.manual_seed(1)
    state = timm.create_model(name, **changes).state_dict()  # random, running statistics too
    return {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_weights_that_fit_are_loaded_to_the_last_bit(tmp_path, name, suffix):
    changes, grid_size, _ = ENCODERS[name]
    weights, path = random_weights(name, **changes), tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    encoder = repa_mini.TargetEncoder(name, grid_size, str(path), **changes)
    loaded = bits(encoder.model.state_dict())
    heads = [key for key in weights if key.startswith(("head", "classifier"))]
    assert loaded == {key: value for key, value in bits(weights).items() if key not in heads}
    assert (len(heads) == 2) == ("dinov2" not in name)


@pytest.mark.parametrize("fault", ["a tensor is missing", "a tensor has another shape", "a tensor too many", "no head"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_weights_that_do_not_fit_are_refused(tmp_path, name, fault):
    changes, grid_size, key = ENCODERS[name]
    weights, path = random_weights(name, **changes), tmp_path / "weights.pth"
    if fault == "a tensor is missing":
        weights.pop(key)
    elif fault == "a tensor has another shape":
        weights[key] = weights[key][:-1].clone()
    elif fault == "a tensor too many":
        weights["blocks.7.extra"] = torch.zeros(3)
    elif "dinov2" in name:
        pytest.skip("DINOv2 has no head to miss")
    else:
        weights = {key: value for key, value in weights.items() if not key.startswith(("head", "classifier"))}
    torch.save(weights, path)
    with pytest.raises(ValueError, match=f"cannot make encoder {name}.*weights.pth.*give exactly its tensors") as error:
        repa_mini.TargetEncoder(name, grid_size, str(path), **changes)
    assert "\n" not in str(error.value)


def test_the_dinov2_authors_own_file_has_a_mask_token_and_fits(tmp_path):
    name = "vit_small_patch14_dinov2.lvd142m"
    weights = random_weights(name, **SMALL)
    torch.save({**weights, "mask_token": torch.zeros(1, 24)}, tmp_path / "dinov2.pth")
    encoder = repa_mini.TargetEncoder(name, 37, str(tmp_path / "dinov2.pth"), **SMALL)
    assert bits(encoder.model.state_dict()) == bits(weights)


def test_the_command_line_takes_encoder_weights_that_fit_and_no_others(tmp_path, capsys):
    weights, path = random_weights("vit_tiny_patch16_224"), tmp_path / "weights.safetensors"
    argv = ["--max-train-steps", 1, "--encoder", "vit_tiny_patch16_224", "--encoder-weights", path]
    save_file(weights, path)
    assert train(tmp_path / "run", *argv) == 0
    state = repa_mini.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["sit"]["z_dim"] == 192 and state["config"]["encoder_weights"] == str(path)
    weights.pop("norm.weight")
    save_file(weights, path)
    capsys.readouterr()
    error = complaint(capsys, train(tmp_path / "other", *argv))
    assert "norm.weight" in error and str(path) in error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_no_weights_are_refused_and_nothing_in_them_is_executed(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *args, **kwargs: pytest.fail("downloads others"))
    path, buffer = tmp_path / "weights.pth", io.BytesIO()
    torch.save({"patch_embed.proj.weight": torch.zeros(192, 3, 16, 16)}, buffer)
    trap = bad_file(kind, path, buffer.getvalue())
    code = train(tmp_path / "run", "--encoder", "vit_tiny_patch16_224", "--encoder-weights", path)
    assert f"{path}" in (sentence := complaint(capsys, code)) and "give exactly its tensors" in sentence
    assert not trap.exists() and not (tmp_path / "run").exists()


# ---- Images
def write_images(folder, classes=("a", "b"), n=3, size=(32, 32)):
    rng = random.Random(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(folder / name / f"{i}.png")


def test_a_run_on_a_folder_of_images_works(tmp_path):
    write_images(tmp_path / "images", ("cat", "dog", "owl"), size=(40, 48))
    assert train(tmp_path / "run", "--max-train-steps", 1, "--data", tmp_path / "images") == 0
    assert repa_mini.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["classes"] == ["cat", "dog", "owl"]


def test_resume_refuses_a_folder_whose_classes_have_changed(tmp_path, capsys):
    write_images(tmp_path / "images", ("cat", "dog"))
    assert train(tmp_path / "run", "--max-train-steps", 1, "--data", tmp_path / "images") == 0
    write_images(tmp_path / "images", ("owl",))
    before = outcome(tmp_path / "run")
    error = complaint(capsys, resume(tmp_path / "run", "--max-train-steps", 2))
    assert "['cat', 'dog', 'owl']" in error and "['cat', 'dog']" in error and outcome(tmp_path / "run") == before


def test_a_data_folder_must_be_one_of_images_in_classes(tmp_path, capsys):
    def refusal(folder):
        error = complaint(capsys, train(tmp_path / "run", "--data", folder))
        assert str(folder) in error and "FOLDER/<class>/<image>" in error and not (tmp_path / "run").exists()
        return error

    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty")
    write_images(tmp_path / "flat", ["."])
    refusal(tmp_path / "flat")
    write_images(tmp_path / "hollow")
    (tmp_path / "hollow" / "nobody").mkdir()
    assert "nobody" in refusal(tmp_path / "hollow")
    (tmp_path / "hollow" / "nobody" / "notes.txt").write_text("no image")
    assert "nobody" in refusal(tmp_path / "hollow")


@pytest.mark.parametrize("broken", ["text", "truncated", "empty"])
def test_a_broken_image_is_named(tmp_path, capsys, broken):
    write_images(tmp_path / "images")
    path = tmp_path / "images" / "b" / "1.png"
    path.write_bytes(dict(text=b"no image", truncated=path.read_bytes()[:1000], empty=b"")[broken])
    assert str(path) in complaint(capsys, train(tmp_path / "run", "--data", tmp_path / "images"))


def test_a_test_split_must_have_the_classes_of_the_training_split(tmp_path, capsys):
    write_images(tmp_path / "images" / "train", ("a", "b"))
    write_images(tmp_path / "images" / "test", ("a", "c"))
    error = complaint(capsys, train(tmp_path / "run", "--data", tmp_path / "images"))
    assert "['a', 'b']" in error and "['a', 'c']" in error


@pytest.mark.parametrize("size", [(32, 32), (96, 32), (32, 64), (64, 64), (33, 32)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK"])
def test_images_of_any_mode_and_shape_are_cropped_at_their_centre(tmp_path, mode, size):
    rng = random.Random(0)
    image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).convert(mode)
    if mode == "RGBA":
        image.putalpha(255)
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.tiff")
    with tiny():
        images, labels, classes = repa_mini.load_folder(tmp_path)
    assert images.dtype == torch.uint8 and images.shape == (1, 3, 32, 32)
    assert labels.tolist() == [0] and classes == ["a"]
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    if size != (33, 32):  # whose centre lies half a pixel off the grid
        centre = image.convert("RGB").crop((left, top, left + side, top + side))
        centre = centre.resize((32, 32), Image.Resampling.BICUBIC)
        assert images[0].permute(1, 2, 0).numpy().tobytes() == centre.tobytes()


def test_large_images_are_cropped_before_they_are_shrunk(tmp_path):
    image = Image.new("RGB", (128, 64), "red")  # its middle square is green and blue
    image.paste("lime", (32, 0, 64, 64))
    image.paste("blue", (64, 0, 96, 64))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png")
    with tiny():
        images, _, _ = repa_mini.load_folder(tmp_path)
    lime, blue = torch.tensor([[0], [255], [0]]), torch.tensor([[0], [0], [255]])
    assert (images[0, :, 5, 1:14] == lime).all() and (images[0, :, 5, 18:31] == blue).all()


# ---- sample.py
SAMPLE_MISTAKES = {
    "--classes 10": "0 to 9",
    "--classes 3 -1": "0 to 9",
    "--guidance-low 0.8 --guidance-high 0.2": "0 <= --guidance-low <= --guidance-high <= 1",
    "--guidance-low -0.1": "0 <= --guidance-low",
    "--guidance-high nan": "0 <= --guidance-low",
    "--cfg-scale nan": "give a number",
    "--num-steps 0": "from 1",
    "--num-samples 0": "from 1",
    "--batch-size -1": "from 1",
    "--seed -1": "from 0 to 2^31 - 1",
    "--mode euler": "choose from",
    "--device nonsense": "cpu is",
    "--data nowhere --fd": "a folder of <class>/<image>",
    "--encoder-weights nowhere.pth --fd": ".safetensors or .pth",
    "--fd --num-samples 1": "at least 2 of each",
    "--grid-size 1000": "1 to 128",
    "--encoder nonsense --alignment": "nonsense",
    "--cknna --topk 1": "topk",
    "--cknna --topk 20": "topk",
    "--cknna --num-samples 3 --topk 2": "at least 4 images",
    "--nonsense": "unrecognized arguments",
    "--output nowhere/samples.png": "nowhere/samples.png",
    "--output samples.nonsense": "samples.nonsense",
    "--npz nowhere/samples.npz": "a .npz in a folder that is there",
    "--npz samples.png": "a .npz in a folder that is there",
    "--trajectory --mode sde": "--trajectory",
    "--mode sde --heun": "--heun",
    "--fd --cknna": "not allowed with",
}


@pytest.mark.parametrize("mistake", SAMPLE_MISTAKES)
def test_a_mistake_in_sampling_is_answered_with_one_sentence(tmp_path, monkeypatch, finished, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    argv = f"--output a.{'csv' if '--cknna' in mistake else 'png'} --num-steps 1 --device cpu {mistake}".split()
    assert SAMPLE_MISTAKES[mistake] in complaint(capsys, run(sample.main, "--ckpt", finished / "checkpoint.pt", *argv))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mistake, sentence", [("--cfg-scale 2", "label dropout"), ("--alignment", "vanilla run")])
def test_a_vanilla_run_without_label_dropout_has_neither_guidance_nor_alignment(vanilla, capsys, mistake, sentence):
    assert sentence in complaint(capsys, run(sample.main, "--ckpt", vanilla / "checkpoint.pt", *mistake.split()))


def test_alignment_shows_no_more_images_than_there_are(tmp_path, finished):
    picture = tmp_path / "alignment.png"
    argv = ["--alignment", "--num-samples", 10**12, "--output", picture, "--device", "cpu"]
    assert run(sample.main, "--ckpt", finished / "checkpoint.pt", *argv) == 0
    assert Image.open(picture).size == (6 * 66 + 2, 20 * 3 * 66 + 2)  # the 20 that are held out


def test_sampling_needs_a_checkpoint(capsys):
    assert "--ckpt" in complaint(capsys, run(sample.main))


# ---- The same mistakes in Python
class Still(nn.Module):
    """A model for the samplers, without motion."""

    num_classes, class_dropout_prob = 10, 0.1

    def forward(self, x, t, y):
        return torch.zeros_like(x), None


def draw(classes=(3,), dropout=0.1, sampler=repa_mini.sample_ode, num_steps=2, **options):
    model = Still()
    model.class_dropout_prob = dropout
    return sampler(model, torch.zeros(len(classes), 3, 4, 4), torch.tensor(classes), num_steps, **options)


@pytest.mark.parametrize("sampler", [repa_mini.sample_ode, repa_mini.sample_sde])
def test_the_samplers_refuse_guidance_and_classes_that_make_no_sense(sampler):
    for options, sentence in [
        (dict(num_steps=0), "1 step or more"),
        (dict(cfg_scale=float("nan")), "a number"),
        (dict(cfg_scale=float("inf")), "a number"),
        (dict(guidance_low=0.6, guidance_high=0.4), "0 <= low <= high"),
        (dict(guidance_low=-0.1), "0 <= low"),
        (dict(guidance_high=1.1), "high <= 1"),
        (dict(cfg_scale=2.0, dropout=0), "label dropout"),
        (dict(classes=(3, 11)), "give 0 to 9"),
        (dict(classes=(3, 10), dropout=0), "give 0 to 9"),  # which has no null label
        (dict(classes=(-1, 3)), "give 0 to 9"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            draw(sampler=sampler, **options)
    assert draw(sampler=sampler, cfg_scale=2.0).shape == (1, 3, 4, 4)  # what makes sense is drawn
    assert draw(sampler=sampler, dropout=0).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("depth", [0, 13, -1])
def test_sit_refuses_an_encoder_depth_outside_its_blocks(depth):
    with pytest.raises(ValueError, match=rf"depth {depth} not in 1\.\.12"):
        repa_mini.SiT(encoder_depth=depth)


@pytest.mark.parametrize("probability", [1.0, -0.5, math.nan])
def test_sit_refuses_a_label_dropout_that_is_no_probability_below_one(probability):
    with pytest.raises(ValueError, match=rf"dropout {probability} not in \[0, 1\)"):
        repa_mini.SiT(class_dropout_prob=probability)


@pytest.mark.parametrize("name", ["levit_128", "vit_tiny_r_s16_p8_224"])
def test_an_encoder_that_cannot_give_one_token_per_patch_is_refused(name):
    """The first takes images of one size only, the second's patches are not pixels' but those of a CNN's map."""
    with pytest.raises(ValueError, match=f"cannot make encoder {name} .*try another"):
        TargetEncoder(name, 8, pretrained=False)


def test_unknown_names_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot make encoder nonsense"):
        repa_mini.TargetEncoder("nonsense")
    with pytest.raises(ValueError, match="path type spiral is unknown; choose linear or cosine"):
        repa_mini.interpolant(torch.tensor(0.5), "spiral")
    with pytest.raises(ValueError, match="device nonsense is not here"):
        repa_mini.pick_device("nonsense")
    with pytest.raises(ValueError, match="cannot read"):
        repa_mini.load_folder(tmp_path / "nowhere")


# ---- The commands of the README


def test_smoke_and_sampling_as_a_user_runs_them(tmp_path):
    smoke = [sys.executable, HERE / "repa_mini.py", "--smoke", "--max-train-steps", "10", "--num-steps", "2"]
    done = subprocess.run(smoke, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "001-SiT-Ti-4-repa"
    assert sorted(f.name for f in folder.iterdir()) == ["checkpoint.pt", "metrics.csv", "samples_0000010.png"]
    grid = [
        sys.executable,
        HERE / "sample.py",
        "--ckpt",
        folder / "checkpoint.pt",
        "--num-samples",
        "20",
        "--num-steps",
        "2",
    ]
    done = subprocess.run(grid, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert Image.open(folder / "samples.png").size == (2 + 34 * 2, 2 + 34 * 10)


def test_the_readme_names_functions_that_exist():
    table = re.search(r"## Paper to code\n(.*?)\n## ", (HERE / "README.md").read_text(), re.S).group(1)
    named = re.findall(r"`(repa_mini|sample)\.(\w+)", table)
    assert len(named) >= 10
    for module, name in named:
        assert hasattr({"repa_mini": repa_mini, "sample": sample}[module], name), name
