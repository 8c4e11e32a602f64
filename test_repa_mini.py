"""Statements about the method and the program, checked: the method first, then a run, then faults.

Reference numbers come from the methods' own code, on weights and inputs of `wave` and `fill`: SiT,
losses, interpolant and samplers from the REPA authors' repository (sihyun-yu/REPA, commit 67f7145),
the DINOv2 tokens from facebookresearch/dinov2 (b8931f7) with REPA's preprocessing.
"""

import contextlib
import copy
import csv
import functools
import importlib.util
import io
import itertools
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import repa_mini
import sample
from repa_mini import SIT_MODELS, SiT, TargetEncoder, UserError, interpolant, sample_ode

torch.set_num_threads(1)  # as quick for small models, and not slowed down by a busy machine
HERE = Path(__file__).parent
TINY = dict(hidden_size=48, depth=3, num_heads=3, encoder_depth=2, z_dim=20, projector_dim=32)
TI_8 = dict(hidden_size=32, depth=3, num_heads=2, encoder_depth=2, projector_dim=24, patch_size=8)
DINOV2 = "vit_small_patch14_dinov2.lvd142m"
LABELS = "y_embedder.embedding_table.weight"


@pytest.fixture(autouse=True, scope="session")
def small_models_and_no_network():
    create_model = timm.create_model

    def create_small(name, **options):
        if name.startswith("vit"):
            options.update(embed_dim=32, depth=2, num_heads=2)
        return create_model(name, **options)

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", create_small)
        patch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
        patch.setattr("timm.models._builder.load_state_dict_from_url", no_network)
        patch.setattr("urllib.request.urlopen", no_network)
        patch.setitem(SIT_MODELS, "SiT-Ti/8", TI_8)
        yield


def wave(shape, w, phase=0.0):
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(w * numbers + phase).reshape(shape).float()


def fill(state):
    filled = {}
    for k, (name, p) in enumerate(sorted(state.items()), start=1):
        scale = 0.1 if p.ndim < 2 else 1 / math.sqrt(p[0].numel())
        filled[name] = scale * wave(p.shape, 1.7, 0.37 * k)
    return filled


def close(a, b, tolerance=1e-5):
    a, b = [torch.as_tensor(v).detach().double() for v in (a, b)]
    return a.shape == b.shape and (a - b).abs().max() <= tolerance


# ---- 1. SiT
def test_initialisation_tensor_by_tensor():
    """Zeros for adaLN-Zero and biases, std 0.02 for embeddings, Xavier-uniform elsewhere."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, depth=2, num_heads=4, encoder_depth=1, num_classes=100)
    for name, p in SiT(**sizes, z_dim=128, projector_dim=512).named_parameters():
        if name == "pos_embed":
            assert not p.requires_grad
        elif name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert p.abs().max() == 0, name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert abs(p.std() / 0.02 - 1) < 0.03 and p.abs().max() > 0.06, name  # normal
        else:  # the patch embedding counts as a linear layer from 2 * 2 * 3 numbers
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert abs(p.std() / (bound / math.sqrt(3)) - 1) < 0.03, name  # uniform


def test_a_vanilla_and_a_repa_model_of_one_seed_share_their_weights():
    states = []
    for z_dim in (0, 20):
        torch.manual_seed(3)
        states.append(SiT(**{**TINY, "z_dim": z_dim}).state_dict())
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())


SIZES = {  # of the authors' models: parameters (4 channels, 1000 classes), heads, encoder depth
    "SiT-S/2": (39515664, 6, 4),  # theirs with decoder_hidden_size=384
    "SiT-B/4": (137771328, 12, 4),
    "SiT-L/2": (465955600, 16, 8),
    "SiT-XL/2": (683242512, 16, 8),
}
LAYERS = "x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 projectors.0.0 projectors.0.2 "
LAYERS += "projectors.0.4 final_layer.linear final_layer.adaLN_modulation.1"
BLOCK = "attn.qkv attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1"


@pytest.mark.parametrize("name", SIZES)
def test_the_state_dict_has_the_authors_keys_and_sizes(name):
    size, layers = SIT_MODELS[name], LAYERS.split()
    with torch.device("meta"):
        model = SiT(**size, in_channels=4, num_classes=1000, z_dim=768)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, size["num_heads"], size["encoder_depth"]) == SIZES[name]
    for i in range(size["depth"]):
        layers += [f"blocks.{i}.{layer}" for layer in BLOCK.split()]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(model.state_dict()) == expected | {"pos_embed", LABELS}
    p, d = size["patch_size"], size["hidden_size"]
    assert model.x_embedder.proj.weight.shape == (d, 4, p, p)
    assert len(model.state_dict()[LABELS]) == 1001  # the null label has a row of its own


X, T, Y = wave((2, 3, 8, 8), 0.9), torch.tensor([0.3, 0.85]), torch.tensor([3, 10])  # 10: null


def reference_sit():
    """The model of the authors' numbers: `fill`ed weights, but its own position table."""
    model = SiT(**TINY, input_size=8)
    state = model.state_dict()
    model.load_state_dict({**fill(state), "pos_embed": state["pos_embed"]})
    return model


def test_sit_computes_the_authors_numbers_and_draws_none():
    model, before = reference_sit(), torch.get_rng_state()
    position = model.pos_embed[0, 6]  # row 1, column 2
    assert close(position[:4], [0.9092974, 0.8006131, 0.4176768, 0.1986693])
    assert close(position[24:28], [0.8414710, 0.4476708, 0.2137807, 0.0998334])
    with torch.no_grad():
        v, z_tilde = model(X, T, Y)
    assert close(v.flatten()[:4], [-0.3123258, -0.2891413, 0.0982973, 0.1745056])
    assert close(v.flatten()[-4:], [0.0577936, 0.0222462, 0.7612500, 0.6756787])
    assert close([v.mean(), v.std()], [0.1155190, 0.4264541])
    assert z_tilde.shape == (2, 16, 20)
    assert close(z_tilde[0, 0, :4], [0.1501603, 0.0130920, -0.2238826, 0.1810051])
    assert close([z_tilde.mean(), z_tilde.std()], [0.0068759, 0.1421358])
    assert torch.equal(before, torch.get_rng_state())


# With the authors' SiT in evaluation mode (theirs drops labels in training) and their SILoss, in
# whose place of random numbers t and the noise were put: the norms of the gradients of loss.mean()
# + 0.5 proj_loss.mean(), and sum(p * wave(p.shape, 0.3)) of the parameters after
# clip_grad_norm_(1.0) and a step of AdamW(lr=1e-3, weight_decay=0).
STEP = {
    "x_embedder.proj.weight": (0.5325303, 0.0643542),
    LABELS: (0.1036428, 0.1028783),
    "final_layer.linear.weight": (1.3880530, 0.0032076),
    "projectors.0.2.weight": (0.0017798, 0.0153498),
}


def test_losses_gradients_and_an_optimizer_step_are_the_authors():
    model = reference_sit()
    noise, z = wave((2, 3, 8, 8), 0.7, 0.2), wave((2, 16, 20), 1.3, 0.4)
    velocity_loss, repa_loss = repa_mini.training_losses(model, X, noise, T, Y, z)
    assert close(velocity_loss, 0.9749852) and close(repa_loss, -0.0045037)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
    (velocity_loss + 0.5 * repa_loss).backward()
    for name, (norm, _) in STEP.items():
        assert close(model.get_parameter(name).grad.norm(), norm), name
    assert close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), 1.8357975)
    optimizer.step()
    for name, (_, after) in STEP.items():
        p = model.get_parameter(name)
        assert close((p * wave(p.shape, 0.3)).sum(), after), name


# ---- 2. Targets
def test_dinov2_tokens_are_the_dinov2_authors():
    encoder = TargetEncoder(DINOV2, 16, "random")
    encoder.model.load_state_dict(fill(encoder.model.state_dict()))
    images = ((wave((2, 3, 32, 32), 0.013) + 1) * 127.5).round()
    z = encoder(images / 127.5 - 1)
    assert z.shape == (2, 256, 32) and encoder.embed_dim == 32
    assert close(z[0, 0, :4], [0.0468843, 0.0420644, 0.1103932, 0.0460610])
    assert close(z[0, 100, :4], [0.0361490, 0.0009721, 0.0470739, 0.0667836])
    assert close(z[-1, -1, -4:], [0.0163876, 0.1133859, -0.0425858, 0.1057935])
    assert close([z.mean(), z.std()], [0.0490329, 0.0930159])


def test_the_encoders_position_table_is_resampled_as_by_the_authors():
    table = TargetEncoder(DINOV2, 37, "random").model.pos_embed  # the grid of its training
    resampled = TargetEncoder(DINOV2, 16, "random").model.pos_embed
    square = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)  # without the class token
    square = F.interpolate(square, (16, 16), mode="bicubic", antialias=True)
    assert close(resampled[:, 1:], square.flatten(2).transpose(1, 2), 1e-7)


VITS = [("vit_small_patch14_reg4_dinov2", 5, 56), ("vit_base_patch16_siglip_224", 0, 64)]


@pytest.mark.parametrize("name, prefix, size", VITS)  # class and register tokens; pixels
def test_vit_targets_are_frozen_patch_tokens(name, prefix, size):
    encoder, config = TargetEncoder(name, 4, "random"), timm.get_pretrained_cfg(name)
    mean, std = [torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std)]
    x = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    pixels = F.interpolate(((x + 1) / 2 - mean) / std, (size, size), mode="bicubic")
    tokens = encoder.model.forward_features(pixels)  # after the last norm
    assert tokens.shape == (2, 16 + prefix, 32)
    assert torch.equal(encoder(x), tokens[:, prefix:]) and not encoder(x).requires_grad
    assert not any(module.training for module in encoder.model.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_cnn_targets_are_the_map_at_stride_16_row_by_row():
    encoder = TargetEncoder("tf_efficientnet_lite0", 2, "random")
    x = torch.rand(2, 3, 32, 32) * 2 - 1  # already of the right size, and with mean and std 1/2
    maps = encoder.model.forward_intermediates(x, intermediates_only=True)
    assert encoder.embed_dim == 112 and maps[3].shape == (2, 112, 2, 2)
    assert close(encoder(x)[:, 1], maps[3][:, :, 0, 1])  # token 1 is row 0, column 1


FIT = "test_vit3 eva02_tiny_patch14_224 vit_small_patch16_dinov3 test_resnet convnext_atto "
FIT += "mobilenetv3_small_050 test_nfnet test_mambaout sam2_hiera_tiny"
UNFIT = {"nonsense": "Unknown model", "levit_128": "does not work"}
UNFIT.update({"vit_tiny_patch16_224.x": "Invalid pretrained tag", "inception_v3": "not 16 tokens"})


@pytest.mark.parametrize("name", [*FIT.split(), *UNFIT])
def test_an_encoder_gives_one_token_for_each_patch_or_is_refused(name):
    if name in UNFIT:
        with pytest.raises(UserError, match=f"encoder {name} .*{UNFIT[name]}"):
            TargetEncoder(name, 4, "random")
    else:
        encoder = TargetEncoder(name, 4, "random")
        z = encoder(torch.rand(2, 3, 32, 32) * 2 - 1)
        assert z.shape == (2, 16, encoder.embed_dim) and not torch.equal(z[0], z[1])


def test_random_weights_are_always_the_same_but_a_download_is_the_default():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(TargetEncoder("test_vit", 4, "random").state_dict())
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())
    with pytest.raises(UserError, match="encoder test_vit .*no network"):
        TargetEncoder("test_vit", 4)


ENCODERS = {DINOV2: ("norm.bias", 37), "test_efficientnet": ("conv_stem.weight", 14)}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_file_of_weights_is_loaded_to_the_last_bit_or_refused(tmp_path, name):
    key, grid_size = ENCODERS[name]
    weights = timm.create_model(name).state_dict()
    for p in weights.values():
        p.copy_(torch.rand(p.shape))
    mask = {"mask_token": torch.zeros(1, 32)}  # it is in the DINOv2 authors' own file
    path, safe = tmp_path / "weights.pth", tmp_path / "weights.safetensors"
    torch.save({**weights, **mask} if name == DINOV2 else weights, path)
    save_file(weights, safe)
    for file in (path, safe):
        loaded = TargetEncoder(name, grid_size, str(file)).model.state_dict()
        assert all(torch.equal(p, weights[k]) for k, p in loaded.items())
    missing = {k: p for k, p in weights.items() if k != key}
    misshapen = {**weights, key: torch.zeros(7)}
    extra = {**weights, key + ".x": torch.zeros(3)}
    for state in (missing, misshapen, extra, {}):
        torch.save({"model": state}, path)
        words = f"encoder {name} .*weights.pth.*{key if state else 'no weights'}"
        with pytest.raises(UserError, match=words) as error:
            TargetEncoder(name, grid_size, str(path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ---- 3. Losses
def test_repa_loss_is_the_authors_whatever_the_lengths_of_the_tokens():
    z_tilde, z = wave((3, 5, 7), 1.3, 0.4), wave((3, 5, 7), 0.7)
    loss, lengths = repa_mini.repa_loss(z_tilde, z), torch.rand(3, 5, 1) * 100 + 0.01
    assert close(loss, 0.011408185623404515, 1e-7)
    assert close(repa_mini.repa_loss(z_tilde * lengths, z / lengths), loss, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-6, 1.0, 6e4])
def test_repa_loss_is_exact_in_half_precision(dtype, length):
    z_tilde, z = F.normalize(wave((2, 3, 5, 16), 1.3), dim=-1).unbind()
    z_tilde, z = (length * z_tilde).to(dtype), (z + z_tilde).to(dtype)  # squares of 6e4 overflow
    exact = -F.cosine_similarity(z_tilde.double(), z.double(), dim=-1).mean()
    for loss in (repa_mini.repa_loss(z_tilde, z), repa_mini.repa_loss(z, z_tilde)):
        assert loss.dtype == torch.float32 and close(loss, exact, 1e-6)


PATHS = {  # alpha, sigma and their derivatives at t = 0.25 and 0.9
    "linear": [[0.75, 0.1], [0.25, 0.9], [-1, -1], [1, 1]],
    "cosine": [[0.92388, 0.15643], [0.38268, 0.98769], [-0.60112, -1.55146], [1.45123, 0.24573]],
}


@pytest.mark.parametrize("path_type", PATHS)
def test_the_interpolant_is_the_authors(path_type):
    values = interpolant(torch.tensor([0.25, 0.9]), path_type)
    assert close(torch.stack(values), PATHS[path_type])
    with pytest.raises((AssertionError, UserError)):
        interpolant(torch.zeros(1), "spiral")


# ---- 4. Sampler
class Field:
    """A model of velocity tanh(x) (1 + t) + 0.1 c: c is y + 1 for a class, 0 for the null label."""

    num_classes = 10

    def __call__(self, x, t, y):
        t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)
        return torch.tanh(x) * (1 + t) + 0.1 * torch.where(y == 10, 0, y + 1), None


GUIDED = dict(cfg_scale=2.5, guidance_low=0.25, guidance_high=0.75)  # both ends are steps
SAMPLES = {  # the first numbers after 8 steps of the authors' samplers
    "Euler": (dict(), [-0.0574911, 0.0811571, 0.1542285]),
    "Heun": (dict(heun=True), [-0.0560972, 0.1136588, 0.1962683]),
    "guidance": (dict(cfg_scale=2.5), [-0.1439568, -0.0068599, 0.0635406]),
    "interval": (dict(heun=True, **GUIDED), [-0.1110910, 0.0579281, 0.1390977]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_the_authors(name):
    options, expected = SAMPLES[name]
    noise, y = wave((2, 1, 2, 2), 0.8), torch.tensor([0, 2])
    x = sample_ode(Field(), noise, y, num_steps=8, **options)
    assert close(x.flatten()[:3], expected, 1e-6)


# ---- 5. Data
SIDES = [1.08, 0.16, 0.99, 0.19, 0.71, 0.29, 0.69, 0.30, 0.58, 0.37]  # lowest row by height


def test_built_in_shapes_have_their_hue_and_outline_and_never_repeat():
    images, labels = repa_mini.draw_shapes(200, seed=0)
    assert images.shape == (200, 3, 32, 32) and labels.tolist() == list(range(10)) * 20
    both = torch.cat([images, repa_mini.draw_shapes(200, seed=1)[0]])
    assert len(both.flatten(1).unique(dim=0)) == 400
    red, green, blue = images.double().sum((2, 3)).T
    hue = torch.atan2((green - blue) * math.sqrt(3) / 2, red - (green + blue) / 2)
    assert ((hue / math.tau * 10 - labels + 5) % 10 - 5).abs().max() < 0.2
    masks = images.max(1).values.int() - images.min(1).values.int() > 60  # coloured, not grey
    rows = [[row for row in mask.sum(1).tolist() if row > 0] for mask in masks]
    sides = torch.tensor([row[-2] / len(row) for row in rows])
    assert close(sides.view(20, 10).mean(0), SIDES, 0.06)
    assert 10 < min(map(len, rows)) < 16 and 20 < max(map(len, rows)) <= 24


def test_pixels_and_the_unit_interval_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(repa_mini.to_pixels(repa_mini.to_unit(pixels)), pixels)
    assert repa_mini.to_unit(pixels)[[0, 255]].tolist() == [-1, 1]
    assert repa_mini.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("size", [(96, 32), (32, 64), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "turned", "transparent"])
def test_images_of_any_kind_are_cropped_at_their_centre(tmp_path, mode, size):
    image, exif = to_pil_image(torch.rand(3, size[1], size[0])), Image.Exif()
    centre = ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC)
    if mode == "turned":  # by a quarter, which its orientation says
        exif[0x0112] = 6
        centre = centre.transpose(Image.Transpose.ROTATE_270)
    elif mode == "transparent":
        image.putalpha(0)
        centre = Image.new("RGB", (32, 32), "white")
    else:
        image = image.convert(mode)
        centre = ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.BICUBIC)
    image.save(tmp_path / "0.png", exif=exif)
    assert close(repa_mini.read_image(tmp_path / "0.png"), pil_to_tensor(centre), 1)


def write_images(folder, images, labels, classes="abcdefghij"):
    """FOLDER/<class>/<number>.png from uint8 images."""
    for i, (image, label) in enumerate(zip(images, labels)):
        path = Path(folder, classes[label], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)


def split(data, images, labels, held_out, classes="abcdefghij"):
    """Whether load_data gave these images and labels, of which some are held out."""
    expected = images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    return all(torch.equal(a, b) for a, b in zip(data, expected)) and data[4] == list(classes)


def test_every_50th_image_is_held_out_or_those_in_test_or_val(tmp_path, capsys):
    images, labels = repa_mini.draw_shapes(100, seed=0)
    labels, order = labels.sort(stable=True)  # as they lie on the disk
    images, number = images[order], torch.arange(100)
    for name in ("test", "val"):
        write_images(tmp_path / name / "train", images[::2], labels[::2])
        write_images(tmp_path / name / name, images[1::2], labels[1::2])
        data = repa_mini.load_data(str(tmp_path / name))
        assert split(data, images, labels, number % 2 == 1)
    classes = ["cat", "dog", *"efghijk", "train"]  # which is a class here
    write_images(tmp_path / "plain", images, labels, classes)
    (tmp_path / "plain" / "dog" / "more").mkdir()
    for name in ("dog/more/notes.txt", "train/0.avif"):
        assert "skipped" not in capsys.readouterr().out
        (tmp_path / "plain" / name).write_text("no image that torchvision knows")
    data = repa_mini.load_data(str(tmp_path / "plain"))
    assert split(data, images, labels, number % 50 == 49, classes)
    assert "plain: 2 files are skipped" in capsys.readouterr().out


def test_a_data_folder_without_what_it_needs_is_refused(tmp_path, capsys):
    folder, images = tmp_path / "data", repa_mini.draw_shapes(50, seed=0)[0]

    def told(words):
        code, _, err = call(repa_mini.main, [*COMMON.split(), "--data", folder])
        return refused(code, err) and words in err

    folder.mkdir()
    assert told(str(folder))  # it is empty
    write_images(folder, images[:49], [0] * 49)
    assert told("fewer than 50 images")  # none is held out
    write_images(folder, images[49:], [1])  # the 50th image is the only one of class b
    assert told("class b of")
    (folder / "nobody").mkdir()
    assert told("nobody")
    (folder / "nobody").rmdir()
    broken = folder / "a" / "005.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert told(str(broken))
    write_images(folder / "train", images[:3], [0, 1, 2])
    assert told("neither test/ nor val/")
    write_images(folder / "test", images[:2], [0, 1])
    assert told("['a', 'b', 'c'], but")


def test_cifar10_is_read_from_its_archive_or_missed_in_a_sentence(tmp_path, monkeypatch):
    """A tiny archive in CIFAR-10's layout of pickles, with torchvision's checksums switched off."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="CIFAR-10; try --data FOLDER or --smoke .*no network"):
        repa_mini.load_data("cifar10")
    images, labels = repa_mini.draw_shapes(60, seed=0)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, x, y in zip(names, images.split(10), labels.split(10)):
        content = {"data": x.flatten(1).numpy(), "labels": y.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    assert split(repa_mini.load_data("cifar10"), images, labels, torch.arange(60) >= 50)


# ---- 6. The random numbers of a step
def drawn(step, seed=0):
    """draw_batch of 40 of the built-in images; the null label is 10."""
    args = SimpleNamespace(seed=seed, batch_size=16, cfg_prob=0.3)
    return repa_mini.draw_batch(*repa_mini.draw_shapes(40, seed=0), 10, step, args)


def test_a_batch_is_what_its_index_and_labels_say():
    images, labels = repa_mini.draw_shapes(40, seed=0)
    batches = [drawn(step) for step in range(60)]
    x, noise, t, y, index = [torch.cat(parts) for parts in zip(*batches)]
    is_dropped, n = y == 10, len(y)
    assert torch.equal(x, images[index].float() / 127.5 - 1)
    assert torch.equal(y[~is_dropped], labels[index][~is_dropped])
    assert abs(is_dropped.float().mean() - 0.3) < 4 * math.sqrt(0.21 / n)
    uniform = (torch.arange(n) + 0.5) / n
    assert (t.sort().values - uniform).abs().max() < 2 / math.sqrt(n)  # Kolmogorov-Smirnov
    assert abs(noise.mean()) < 0.005 and abs(noise.std() - 1) < 0.005
    assert (index.bincount(minlength=40) - 24).abs().max() < 4 * math.sqrt(24)


def test_other_steps_and_other_seeds_draw_other_numbers():
    assert all(torch.equal(a, b) for a, b in zip(drawn(3), drawn(3)))
    batches = [drawn(2), drawn(3), drawn(4)]
    batches += [drawn(3, seed) for seed in (1, 2**24, 2**32)]
    for a, b in itertools.combinations(batches, 2):
        assert not any(torch.equal(p, q) for p, q in zip(a, b))


# ---- 7. A run
COMMON = "--smoke --model SiT-Ti/8 --max-train-steps 4 --learning-rate 1e-3 --eval-every 1"
Run = namedtuple("Run", "code rows state folder out err")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """44 training and 20 held-out images of four classes, as PNGs."""
    folder = tmp_path_factory.mktemp("photos")
    for split, n, seed in (("train", 110, 0), ("test", 50, 1)):
        images, labels = repa_mini.draw_shapes(n, seed)
        write_images(folder / split, images[labels < 4], labels[labels < 4])
    return folder


def call(main, argv):
    """main(argv) with the exit code, stdout and stderr."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, str):  # Python prints it, and the exit code is 1
        return 1, out.getvalue(), f"{err.getvalue()}{code}\n"
    return code, out.getvalue(), err.getvalue()


def refused(code, err):
    """A mistake of the user's, told in one sentence. Before it, argparse shows its usage."""
    return code in (1, 2) and err.partition("error: ")[2].count("\n") == 1


def run_program(folder, *argv):
    """The exit code and all that a run has left in its folder."""
    code, out, err = call(repa_mini.main, argv)
    state = {"rows": []}
    with contextlib.suppress(UserError):
        state = repa_mini.load_checkpoint(folder)
    return Run(code, state["rows"], state, folder, out, err)


def new_run(photos, folder, options=""):
    argv = [*COMMON.split(), "--data", photos, "--output-dir", folder, *options.split()]
    return run_program(folder, *argv)


@pytest.fixture
def train(tmp_path, photos, monkeypatch):
    """train(options, resume=FOLDER or None) runs the program. Its grids show noise, since to sample
    them would take most of the time; `finished` samples."""
    monkeypatch.setattr(repa_mini, "sample_ode", lambda model, noise, y: noise)
    numbers = itertools.count()

    def run(options="", resume=None):
        if resume:
            return run_program(resume, "--resume", resume, *options.split())
        return new_run(photos, tmp_path / f"run{next(numbers)}", options)

    return run


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    """A finished run of four steps with REPA. To be read, not written."""
    return new_run(photos, tmp_path_factory.mktemp("finished") / "run")


OTHER = "--seed 7 --proj-coeff 2 --learning-rate 3e-3 --cfg-prob 0.5 --path-type cosine"
ARMS = ["", OTHER, "--proj-coeff 0", "--repa-stop-step 2", "--cache-targets"]


@pytest.mark.parametrize("options", ARMS)
def test_a_run_is_what_the_equations_say_after_every_step(train, photos, monkeypatch, options):
    """The training loop a second time, in plain lines."""
    states = []
    keep = lambda folder, state: states.append(copy.deepcopy(state))  # noqa: E731
    monkeypatch.setattr(repa_mini, "save", keep)
    assert train(f"{options} --encoder-depth 3").code == 0 and len(states) == 4
    args, coeff = SimpleNamespace(**states[0]["config"]), states[0]["config"]["proj_coeff"]
    sit = {**TI_8, "encoder_depth": 3, "num_classes": 4, "z_dim": 64 if coeff else 0}
    images, labels, _, _, _ = repa_mini.load_data(photos)
    images, labels = torch.cat([images, images.flip(3)]), torch.cat([labels, labels])
    encoder = TargetEncoder("test_vit", 4, "random")
    torch.manual_seed(repa_mini.seed_for("weights", args.seed))
    model = SiT(**sit)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, (0.9, 0.999), 1e-8, weight_decay=0.0
    )
    for s, state in enumerate(states):
        x, noise, t, y, _ = repa_mini.draw_batch(images, labels, 4, s, args)
        alpha, sigma, d_alpha, d_sigma = interpolant(t[:, None, None, None], args.path_type)
        v_theta, z_tilde = model(alpha * x + sigma * noise, t, y)
        velocity_loss = ((v_theta - d_alpha * x - d_sigma * noise) ** 2).mean()
        row = {"velocity_loss": velocity_loss, "loss": velocity_loss}
        if coeff and s < args.repa_stop_step:
            z = encoder(x)
            if args.cache_targets:
                z = z.half().float()
            cosine = (z * z_tilde).sum(-1) / (z.norm(dim=-1) * z_tilde.norm(dim=-1))
            row["repa_loss"] = -cosine.mean()
            row["loss"] = velocity_loss + coeff * row["repa_loss"]
        optimizer.zero_grad()
        row["loss"].backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        row["grad_norm"] = torch.sqrt(sum((g**2).sum() for g in grads))
        for g in grads:
            g *= min(1.0, 1.0 / row["grad_norm"].item())
        optimizer.step()
        decay = (1 + s) / (10 + s)
        for average, p in zip(ema.parameters(), model.parameters()):
            average.copy_(decay * average + (1 - decay) * p.detach())
        logged = {k: v for k, v in state["rows"][-1].items() if not k.startswith("val")}
        assert logged.pop("step") == state["step"] == s + 1 and set(logged) == set(row)
        for name, value in row.items():
            assert logged[name] == pytest.approx(value.item(), rel=2e-4, abs=2e-6), (s, name)
        for kind, net in (("model", model), ("ema", ema)):
            for name, p in net.state_dict().items():
                assert close(state[kind][name], p, 3e-5), (s, kind, name)


def test_the_decay_of_the_moving_average_rises_to_its_cap():
    for step, decay in ((0, 0.1), (8, 0.5), (10**6, 0.9999)):
        ema, model = nn.Linear(1, 1), nn.Linear(1, 1)
        nn.init.zeros_(ema.weight)
        nn.init.ones_(model.weight)
        repa_mini.update_ema(ema, model, step)
        assert close(ema.weight, [[1 - decay]], 1e-6)


def ema_of(run):
    model = SiT(**run.state["sit"]).eval().requires_grad_(False)
    model.load_state_dict(run.state["ema"])
    return model


def seeded(*use):
    return torch.Generator().manual_seed(repa_mini.seed_for(*use))


def grid_cells(path, columns):
    """The images of a grid, row by row: (N, 3, 32, 32)."""
    picture = pil_to_tensor(Image.open(path))
    assert (picture.shape[1] - 2) % 34 == 0 and picture.shape[2] == 2 + 34 * columns
    cells = picture[:, 2:, 2:].unfold(1, 32, 34).unfold(2, 32, 34)  # (3, row, column, 32, 32)
    return cells.flatten(1, 2).transpose(0, 1)


def same_pixels(a, b):
    """To a grey level, since sums may be taken in another order."""
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1


def test_a_grid_shows_samples_of_the_ema_with_one_class_a_row(finished):
    y = torch.arange(4).repeat_interleave(10)
    noise = torch.randn(40, 3, 32, 32, generator=seeded("grid"))
    images = sample_ode(ema_of(finished), noise, y, 50)
    cells = grid_cells(finished.folder / "samples_0000004.png", columns=10)
    assert same_pixels(cells, repa_mini.to_pixels(images))


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_the_held_out_losses_are_those_of_the_ema(train, monkeypatch, path_type):
    """On at most 1,000 images, which go through the model a hundred at a time."""
    images, labels = repa_mini.draw_shapes(1250, seed=0)
    data = images[:20], labels[:20], images, labels, list("abcdefghij")
    monkeypatch.setattr(repa_mini, "load_data", lambda name: data)
    run = train(f"--path-type {path_type} --learning-rate 1e-2 --max-train-steps 1")
    images, labels, model = images[::2], labels[::2], ema_of(run)
    g, encoder = seeded("evaluation"), TargetEncoder("test_vit", 4, "random")
    noise, t = torch.randn(images.shape, generator=g), torch.rand(625, generator=g)
    x, sizes = repa_mini.to_unit(images), []
    a, b = repa_mini.training_losses(model, x, noise, t, labels, encoder(x), path_type)
    assert run.rows[0]["val_velocity_loss"] == pytest.approx(a.item(), rel=1e-5)
    assert run.rows[0]["val_alignment"] == pytest.approx(-b.item(), rel=1e-4)
    model.register_forward_hook(lambda model, inputs, outputs: sizes.append(len(inputs[0])))
    repa_mini.evaluate(model, None, images, labels, path_type)
    assert sizes == [100] * 6 + [25]


def test_the_loss_falls_and_the_alignment_rises(train):
    run = train("--max-train-steps 60 --eval-every 20 --learning-rate 1e-2")
    first, last = run.rows[0], run.rows[-1]
    assert last["velocity_loss"] < 0.95 * first["velocity_loss"] < 1.2  # from 1.4
    assert last["repa_loss"] < first["repa_loss"] - 0.1 < -0.6  # from 0
    assert last["val_velocity_loss"] < 1.1 and last["val_alignment"] > 0.8  # from 1.5 and 0


def test_rows_are_means_since_the_last_row(train, finished):
    run = train("--max-train-steps 3 --eval-every 2")
    first, second, third = finished.rows[:3]  # the same steps, one by one
    for name in ("loss", "velocity_loss", "repa_loss", "grad_norm"):
        assert run.rows[0][name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-6)
    assert run.rows[0]["val_velocity_loss"] == second["val_velocity_loss"]
    assert run.rows[1:] == [third]
    with open(run.folder / "metrics.csv", newline="") as file:
        table = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert table == run.rows
    pictures = sorted(path.name for path in run.folder.glob("*.png"))
    assert pictures == ["samples_0000002.png", "samples_0000003.png"]


def test_a_vanilla_run_needs_no_encoder_and_shares_its_batches(train, finished, monkeypatch):
    monkeypatch.setattr(repa_mini, "TargetEncoder", None)
    run = train("--proj-coeff 0 --cfg-prob 0 --max-train-steps 1")
    assert run.code == 0 and not {"repa_loss", "val_alignment"} & set(run.rows[0])
    assert run.rows[0]["velocity_loss"] == finished.rows[0]["velocity_loss"]  # exactly
    assert len(run.state["model"][LABELS]) == 5  # there is always a null label


REAL_RUN = dict(data="cifar10", model="SiT-S/2", encoder=DINOV2, encoder_weights="download")
REAL_RUN.update(encoder_depth=None, proj_coeff=0.5, cfg_prob=0.1, path_type="linear")
REAL_RUN.update(batch_size=256, learning_rate=1e-4, max_train_steps=100_000, eval_every=1000)


def test_the_real_run_is_the_papers_and_asks_for_pretrained_weights(photos, tmp_path):
    args, checkpoint = repa_mini.parse_options([])
    assert vars(args).items() >= REAL_RUN.items() and checkpoint is None
    options = f"--data {photos} --device cpu --output-dir {tmp_path}/run --encoder test_vit"
    code, _, err = call(repa_mini.main, options.split())
    assert refused(code, err) and "no network" in err


# ---- 8. Precision, compilation, device
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_close_to_float32_and_a_run_may_change_it(train, finished, dtype):
    run = train(f"--dtype {dtype}")
    assert all(p.dtype == torch.float32 for p in run.state["model"].values())
    for ours, exact in zip(run.rows[1:], finished.rows[1:]):  # the first velocity is zero
        for name in ("velocity_loss", "val_velocity_loss"):
            assert ours[name] == pytest.approx(exact[name], rel=1e-3)
            assert ours[name] != exact[name]
    for s, other in ((5, "float32"), (6, dtype)):
        run = train(f"--max-train-steps {s} --dtype {other}", resume=run.folder)
        assert run.code == 0 and bool(run.state["scaler"]) == (other == "float16"), run.err


def test_under_fp16_a_step_that_overflows_is_skipped(train, monkeypatch):
    """The first scale is far too large, the second is 2^10."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-50)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run = train("--dtype float16")
    assert run.state["scaler"]["scale"] == 2.0**10
    assert {state["step"].item() for state in run.state["optimizer"]["state"].values()} == {3}
    assert all(row["grad_norm"] < 10 for row in run.rows[1:])  # unscaled


@pytest.mark.parametrize("backend", ["aot_eager", "no such backend"])
def test_a_compiled_run_is_the_uncompiled_one_even_if_it_fails(train, monkeypatch, backend):
    """aot_eager splits forward and backward as on CUDA, but needs no compiler."""
    graphs = []

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compile = functools.partialmethod(nn.Module.compile, backend=compile_graph)
    monkeypatch.setattr(SiT, "compile", compile)
    plain = train("--max-train-steps 2 --repa-stop-step 1").state["model"]
    assert not graphs
    torch._dynamo.reset()
    with torch._dynamo.config.patch(suppress_errors=False):
        run = train("--max-train-steps 2 --repa-stop-step 1 --compile")
    assert run.code == 0 and graphs and list(run.state["model"]) == list(plain)
    assert all(close(p, plain[name]) for name, p in run.state["model"].items())


def test_the_default_dtype_is_what_the_device_does_best(monkeypatch):
    assert repa_mini.pick_device("cpu") == (torch.device("cpu"), torch.float32)
    zeros = torch.zeros(1)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: zeros)  # as if CUDA were here
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert repa_mini.pick_device("cuda")[1] == dtype
        assert repa_mini.pick_device("cuda", "float32")[1] == torch.float32


# ---- 9. Stopped, killed, resumed
def bits(x):
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.numpy().tobytes()
    if isinstance(x, dict):
        return {name: bits(value) for name, value in x.items()}
    return [bits(value) for value in x] if isinstance(x, (list, tuple)) else x


def left_behind(run):
    """All that a finished run leaves, to the last bit; its options apart, which name its folder."""
    assert run.code == 0 and not list(run.folder.glob("*.part")), run.err
    pictures = {path.name: path.read_bytes() for path in run.folder.glob("*.png")}
    return (run.folder / "metrics.csv").read_text(), pictures, bits({**run.state, "config": 0})


LONG = "--max-train-steps 7 --eval-every 3"
CACHED = "--cache-targets --repa-stop-step 4 --dtype float16 --seed 7"


@pytest.mark.parametrize("options", ["", "--proj-coeff 0", CACHED])
def test_a_run_stopped_again_and_again_equals_an_uninterrupted_one(train, monkeypatch, options):
    """By Ctrl-C in the step that is named, or killed between a save and its rename."""
    whole = train(f"{LONG} {options}")
    draw_batch, rename, stops = repa_mini.draw_batch, Path.replace, [2]

    def interrupted_draw(images, labels, null_label, step, args):
        if step in stops:
            raise KeyboardInterrupt
        return draw_batch(images, labels, null_label, step, args)

    def interrupted_rename(path, target):
        if "rename" in stops:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(repa_mini, "draw_batch", interrupted_draw)
    monkeypatch.setattr(Path, "replace", interrupted_rename)
    run = train(f"{LONG} {options}")
    assert run.code == 1 and "stopped; --resume continues" in run.err and not run.rows
    for stop, saved in ((4, 3), (3, 3), ("rename", 3), (6, 6), ("rename", 6)):
        stops[:] = [stop]
        run = train(resume=run.folder) if run.rows else train(f"{LONG} {options}")
        assert (run.code, run.state["step"]) == (1, saved)
    stops.clear()
    assert left_behind(train(resume=run.folder)) == left_behind(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["checkpoint.part", "metrics.csv", "samples_0000002.png"])
def test_on_a_full_disk_a_run_goes_on_and_saves_later(train, monkeypatch, name):
    folder = train("--max-train-steps 1").folder
    link = folder / name
    link.unlink(missing_ok=True)
    link.symlink_to("/dev/full")

    evaluate, calls = repa_mini.evaluate, []

    def make_room_before_the_third_step(*args):
        calls.append(args)
        if len(calls) == 2:
            link.unlink()
        return evaluate(*args)

    monkeypatch.setattr(repa_mini, "evaluate", make_room_before_the_third_step)
    run = train("--max-train-steps 3", resume=folder)
    assert run.code == 0 and run.out.count("cannot save") == 1, run.err
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    last = folder / name.replace("2", "4")
    last.unlink(missing_ok=True)
    last.symlink_to("/dev/full")
    run = train("--max-train-steps 4", resume=folder)  # whose last save cannot be tried again
    assert refused(run.code, run.err)
    assert "No space left" in run.err or "cannot write" in run.err


CASES = {"--smoke": (2e-3, 200), "--smoke --learning-rate 5e-2": (5e-2, 200)}
CASES.update({"--resume RUN": (1e-3, 4), "--resume RUN --smoke --max-train-steps 9": (1e-3, 9)})


@pytest.mark.parametrize("options", CASES)
def test_an_option_is_typed_else_the_checkpoints_else_smokes_else_its_default(finished, options):
    words = options.replace("RUN", str(finished.folder)).split()
    args, _ = repa_mini.parse_options(words)
    assert (args.learning_rate, args.max_train_steps) == CASES[options]


def test_what_is_typed_on_resume_takes_effect(train, monkeypatch, tmp_path):
    run = train("--cache-targets --max-train-steps 1")
    folder = run.folder.rename(tmp_path / "moved")
    monkeypatch.setattr(repa_mini, "compute_targets", None)  # the cache may no longer be made
    options = "--no-cache-targets --learning-rate 5e-2 --max-train-steps 2 --repa-stop-step 1"
    after = train(options, resume=folder)
    assert after.code == 0 and "repa_loss" not in after.rows[1], after.err
    assert after.state["optimizer"]["param_groups"][0]["lr"] == 5e-2
    weight = "blocks.0.mlp.fc1.weight"  # a step of AdamW is about as long as its learning rate
    assert (after.state["model"][weight] - run.state["model"][weight]).abs().max() > 1e-2
    again = run_program(folder, "--resume", folder / "checkpoint.pt")
    assert "the run is finished, at step 2" in again.out
    assert left_behind(again) == left_behind(after)
    monkeypatch.chdir(folder)
    for steps in ("3", "4"):
        run = run_program(folder, "--resume", "checkpoint.pt", "--max-train-steps", steps)
        assert run.code == 0 and run.state["step"] == int(steps), run.err


# ---- 10. Numbers that are not finite, files that are no checkpoint
def test_numbers_that_are_not_finite_are_not_saved_and_the_advice_helps(train, photos):
    folder = train("--max-train-steps 2").folder
    run = train("--max-train-steps 6 --learning-rate 1e30 --eval-every 4", resume=folder)
    assert refused(run.code, run.err) and "the loss is not finite" in run.err
    assert f"--resume {folder}" in run.err and "smaller --learning-rate" in run.err
    assert run.state["step"] == 2
    run = train("--max-train-steps 6 --learning-rate 1e-4", resume=folder)
    assert run.code == 0 and [row["step"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    run = train("--learning-rate 1e30 --eval-every 4")
    assert refused(run.code, run.err) and "start again" in run.err and not run.rows
    assert new_run(photos, run.folder).code == 0  # the folder holds no run yet
    again = new_run(photos, run.folder)
    assert refused(again.code, again.err) and f"--resume {run.folder}" in again.err


class Trap:
    """A pickle that creates a file when it is opened without care."""

    def __reduce__(self):
        return open, ("executed", "w")


FILES = {"list": [1, 2], "code": {"ema": Trap()}, "an EMA alone": {"ema": {}}}


@pytest.mark.parametrize("kind", ["truncated", "text", "a missing key", *FILES])
def test_a_file_of_another_kind_is_refused_and_not_executed(finished, monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "checkpoint.pt", dict(finished.state)
    if kind == "a missing key":
        del content["classes"]
    torch.save(FILES.get(kind, content), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("not a checkpoint\n" * 100)
    code, _, err = call(repa_mini.main, ["--resume", tmp_path])
    assert refused(code, err) and f"{path} is not a checkpoint" in err
    with pytest.raises(UserError, match="encoder test_vit .*checkpoint.pt"):
        TargetEncoder("test_vit", 4, str(path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("options", ["--model SiT-S/8", "--proj-coeff 0", "--data shapes"])
def test_a_checkpoint_of_another_model_is_refused(train, finished, options):
    run = train(f"{options} --max-train-steps 5", resume=finished.folder)
    assert refused(run.code, run.err) and "is of another model" in run.err
    assert run.state["step"] == 4


# ---- 11. Mistakes on the command line, and what is printed
MISTAKES = {  # and what the sentence says
    "--model SiT-M/2": "invalid choice: 'SiT-M/2'",
    "--encoder-depth 4": "there is no block 4; the blocks are 1 to 3",
    "--encoder-depth 0": "there is no block 0",
    "--encoder-weights nowhere.pth": "nowhere.pth",
    "--data nowhere": "nowhere",
    "--device cuda:99": "device cuda:99 does not work here; try --device cpu",
    "--enc vit_tiny_patch16_224": "unrecognized arguments",  # not taken for --encoder
    "--resume x": "not allowed with argument --output-dir",
}
for name in ("--batch-size", "--max-train-steps", "--eval-every"):
    MISTAKES[f"{name} 0"] = "below 1"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_a_folder_is_made(train, mistake):
    run = train(mistake)
    assert refused(run.code, run.err) and MISTAKES[mistake] in run.err, run.err
    assert not run.folder.exists()


def test_an_empty_option_is_the_users_mistake_and_ours_a_traceback(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for (
        option
    ) in "--data --encoder --encoder-weights --device --output-dir --resume --seed".split():
        code, _, err = call(repa_mini.main, [*COMMON.split(), option, ""])
        assert refused(code, err) and not list(tmp_path.iterdir()), option
    monkeypatch.setattr(repa_mini, "draw_batch", lambda *args: args.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        train()


def test_what_does_not_fit_into_the_memory_is_told_with_a_way_out(train, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(repa_mini, "draw_batch", fail)
    run = train()
    assert refused(run.code, run.err) and "--batch-size" in run.err


def test_a_resumed_run_counts_on_from_its_checkpoint(train, finished, tmp_path, monkeypatch):
    bars = []

    def progress(steps, name, **options):
        bars.append((name, options))
        return steps

    monkeypatch.setattr(repa_mini, "progress", progress)
    torch.save({**finished.state, "step": 99_999}, tmp_path / "checkpoint.pt")
    run = train("--max-train-steps 100000", resume=tmp_path)
    assert bars[-1] == ("training", dict(initial=99_999, total=100_000))
    assert "step 100000: " in run.out and run.rows[-1]["step"] == 100_000


# ---- 12. The README
def test_the_first_command_of_the_readme_runs_as_a_user_types_it(tmp_path):
    argv = [sys.executable, HERE / "repa_mini.py", "--smoke", "--max-train-steps", "3"]
    argv += ["--batch-size", "4", "--model", "SiT-Ti/8"]  # to be quicker
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name in done.stdout
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint.pt", "metrics.csv", "samples_0000003.png"]
    assert Image.open(folder / names[2]).size == (342, 342)


# ---- 12. sample.py
@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    """A run whose model knows something, so that every option changes its samples."""
    options = "--cfg-prob 0.3 --max-train-steps 40 --eval-every 40 --learning-rate 1e-2"
    options += " --path-type cosine"
    return new_run(photos, tmp_path_factory.mktemp("trained") / "run", options)


def show(run, *options):
    return call(sample.main, ["--ckpt", run.folder, "--device", "cpu", *options])


def start(numbers, seed=0):
    """The noise that image `number` starts from."""
    return torch.stack(
        [torch.randn(3, 32, 32, generator=seeded("sample", seed, i)) for i in numbers]
    )


def held_out(photos, n, t):
    """n held-out images, spread over the 20, their labels and noise, and x_t on the cosine path."""
    _, _, images, labels, _ = repa_mini.load_data(photos)
    chosen = torch.linspace(0, 19, n).long()
    x, noise = repa_mini.to_unit(images[chosen]), start(range(n))
    alpha, sigma, _, _ = interpolant(torch.tensor(t), "cosine")
    return x, labels[chosen], noise, alpha * x + sigma * noise


def table_of(path):
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


SDE_NUMBERS = {  # the first after 6 steps of the authors' sampler, with `wave` for randn_like
    "interval": (GUIDED, [-0.073807130, 0.442961454, 0.399577078]),
    "cosine": (dict(path_type="cosine"), [-0.058688096, 0.838516146, 0.779200346]),
}


@pytest.mark.parametrize("name", SDE_NUMBERS)
def test_samples_of_the_sde_are_the_authors(name, monkeypatch):
    options, expected = SDE_NUMBERS[name]
    monkeypatch.setattr(torch, "randn", lambda shape, **options: wave(shape, 1.1))
    noise, y = wave((2, 1, 2, 2), 0.8), torch.tensor([0, 2])
    assert close(sample.sample_sde(Field(), noise, y, 6, **options).flatten()[:3], expected)


ODE = {  # options of sample.py, and the same in Python
    "": dict(),
    "--batch-size 4": dict(),
    "--heun --num-steps 3": dict(heun=True, num_steps=3),
    "--cfg-scale 3": dict(cfg_scale=3.0),
    "--cfg-scale 3 --guidance-high 0.7": dict(cfg_scale=3.0, guidance_high=0.7),
    "--cfg-scale 3 --guidance-low 0.7": dict(cfg_scale=3.0, guidance_low=0.7),
    "--seed 5": dict(noise=start(range(6), seed=5)),
    "--classes 3 1": dict(y=torch.tensor([3, 1] * 3)),
}
SDE = {
    "--mode sde": dict(),
    "--mode sde --cfg-scale 2 --num-steps 4": dict(cfg_scale=2, num_steps=4),
}


def samples_of(run, path, options):
    argv = options.split() if "--num-steps" in options else ["--num-steps", 2, *options.split()]
    code, _, err = show(run, "--num-samples", 6, "--npz", path, *argv)
    assert code == 0, err
    return torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("options", [*ODE, *SDE])
def test_every_option_of_the_samplers_does_what_it_does_in_python(trained, tmp_path, options):
    model, usual = ema_of(trained), dict(noise=start(range(6)), y=torch.arange(6) % 4, num_steps=2)
    plain = repa_mini.to_pixels(sample_ode(model, **usual))
    if options in ODE:
        x = sample_ode(model, **{**usual, **ODE[options]})
    else:
        usual.update(SDE[options], path_type="cosine", generator=seeded("sde", 0, 0))
        x = sample.sample_sde(model, **usual)
    x = repa_mini.to_pixels(x)
    assert same_pixels(samples_of(trained, tmp_path / "s.npz", options), x)
    assert same_pixels(x, plain) == (options in ("", "--batch-size 4"))


def test_two_batches_of_the_sde_get_different_noise(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "starting_noise", lambda seed, n: torch.zeros(len(n), 3, 32, 32))
    options = "--mode sde --batch-size 3 --classes 1"
    images = samples_of(trained, tmp_path / "s.npz", options)
    assert not same_pixels(images[:3], images[3:])


def test_samples_are_in_float32_unless_another_dtype_is_given(trained, tmp_path):
    plain = samples_of(trained, tmp_path / "a.npz", "--dtype float32")
    assert torch.equal(samples_of(trained, tmp_path / "b.npz", ""), plain)
    half = samples_of(trained, tmp_path / "c.npz", "--dtype bfloat16")
    assert not torch.equal(half, plain) and (half.int() - plain.int()).abs().float().mean() < 1


def test_a_grid_has_one_class_a_row_whatever_the_number(trained, tmp_path):
    options = "--classes 2 0 3 --num-samples 7 --num-steps 2 --output".split()
    code, _, err = show(trained, *options, tmp_path / "grid.png")
    assert code == 0 and "classes: 0 a, 1 b, 2 c, 3 d" in err
    cells = grid_cells(tmp_path / "grid.png", columns=3)
    y = torch.tensor([2, 0, 3, 2, 0, 3, 2])
    images = repa_mini.to_pixels(sample_ode(ema_of(trained), start(range(7)), y, 2))
    assert same_pixels(cells[[0, 3, 6, 1, 4, 7, 2]], images)
    assert cells[[5, 8]].max() == 0


def test_samples_are_written_one_by_one_and_never_among_others(trained, tmp_path):
    folder, options = tmp_path / "png", "--num-samples 3 --batch-size 2 --num-steps 2".split()
    argv = [*options, "--save-dir", folder, "--npz", tmp_path / "s.npz"]
    assert show(trained, *argv)[0] == 0
    array = np.load(tmp_path / "s.npz")["arr_0"]
    pictures = [np.array(Image.open(folder / f"00000{i}.png")) for i in range(3)]
    assert array.dtype == np.uint8 and np.array_equal(np.stack(pictures), array)
    assert not list(trained.folder.glob("samples.*"))
    code, _, err = show(trained, "--save-dir", folder)
    assert refused(code, err) and "not empty" in err


def test_a_trajectory_ends_in_the_sample_and_predicts_clean_images(trained, tmp_path):
    options = "--trajectory --classes 1 3 --seed 3 --cfg-scale 2 --guidance-high 0.9 --num-steps 9"
    strip, animation = tmp_path / "t.png", tmp_path / "t.gif"
    code, out, err = show(trained, *options.split(), "--output", strip)
    assert code == 0 and "t = 1.00, 0.89" in out, err
    assert show(trained, *options.split(), "--output", animation)[0] == 0
    model, y, noise = ema_of(trained), torch.tensor([1, 3]), start(range(2), seed=3)
    last = repa_mini.to_pixels(sample_ode(model, noise, y, 9, cfg_scale=2.0, guidance_high=0.9))
    cells = grid_cells(strip, columns=8).unflatten(0, (2, 2, 8))  # class, kind, time
    assert same_pixels(cells[:, 0, 0], repa_mini.to_pixels(noise))
    assert same_pixels(cells[:, 0, -1], last) and same_pixels(cells[:, 1, -1], last)
    x, t = noise, 1.0
    for column, scale in ((0, 1), (1, 2.0)):  # t = 1 lies above the interval, 8/9 in it
        v = repa_mini.guided_velocity(model, x, t, y, scale)
        alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(t).double(), "cosine")
        eps = (d_alpha * x - alpha * v) / (d_alpha * sigma - alpha * d_sigma)
        clean = (x - sigma * eps) / alpha if alpha > 0.1 else v / d_alpha
        assert same_pixels(cells[:, 1, column], repa_mini.to_pixels(clean))
        x, t = x - v / 9, 8 / 9
    with Image.open(animation) as frames:
        assert frames.n_frames == 10 and frames.size == (2 + 2 * 34, 2 + 2 * 34)


def test_losses_by_noise_level_are_those_of_all_images_at_once(
    trained, photos, tmp_path, monkeypatch
):
    """150 images go through in two batches. A run without a projector has no alignment."""
    vanilla = new_run(photos, tmp_path / "vanilla", "--proj-coeff 0 --path-type cosine")
    images, labels = repa_mini.draw_shapes(150, seed=1)
    x, y, noise = repa_mini.to_unit(images), labels % 4, start(range(150))
    monkeypatch.setattr(repa_mini, "load_data", lambda name: (None, None, images, y, None))
    targets = TargetEncoder("test_vit", 4, "random")(x)
    for run, z in ((trained, targets), (vanilla, None)):
        path = tmp_path / f"{run.folder.name}.csv"
        code, _, err = show(run, "--losses", "--output", path)
        assert code == 0, err
        rows, model = table_of(path), ema_of(run)
        assert close([row["t"] for row in rows], (torch.arange(10) + 0.5) / 10)
        for row in rows:
            t = torch.full((150,), row["t"])
            losses = repa_mini.training_losses(model, x, noise, t, y, z, "cosine")
            assert close(row["velocity_loss"], losses[0], 3e-5)
            assert ("alignment" in row) == (z is not None)
            assert z is None or close(row["alignment"], -losses[1], 3e-5)


def test_the_alignment_picture_shows_tokens_and_their_cosines(trained, photos, tmp_path):
    path = tmp_path / "alignment.png"
    code, out, err = show(trained, "--alignment", "--num-samples", 2, "--output", path)
    assert code == 0, err
    picture = pil_to_tensor(Image.open(path)).double() / 255
    assert picture.shape == (3, 2 + 66 * 6, 2 + 66 * 6)  # clean and five times; three rows each
    printed = [float(word) for word in out.partition("mean cosine: ")[2].split(",")]
    model, encoder = ema_of(trained), TargetEncoder("test_vit", 4, "random")
    for i, t in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
        x, _, _, x_t = held_out(photos, 2, t)
        z_tilde = model(x_t, torch.full((2,), t), torch.tensor([4, 4]))[1]
        cosine = F.cosine_similarity(z_tilde, encoder(x), dim=-1)
        assert close(printed[i], cosine.mean(), 1e-3)
        left = 2 + 66 * (i + 1)
        rows = picture[:, 2:200, left : left + 64].unflatten(1, (3, 66))[:, :, :64]  # 1st image
        assert close(rows[:, 0, ::2, ::2], (x_t[0] / 2 + 0.5).clamp(0, 1), 0.01)
        colours = sample.pca_colours(encoder(x), z_tilde)[1][0].unflatten(0, (4, 4))
        assert close(rows[:, 1, 8::16, 8::16], colours.permute(2, 0, 1), 0.01)
        assert close(rows[0, 2, 8::16, 8::16].flatten(), cosine[0].clamp(0, 1), 0.01)


def test_equal_directions_have_equal_colours_also_if_the_spectrum_falls_slowly():
    torch.manual_seed(0)
    targets = F.normalize(torch.randn(2, 300, 40) * 0.97 ** torch.arange(40), dim=-1)
    colours, scaled, turned = sample.pca_colours(targets, 3 * targets, targets.flip(1))
    assert close(colours, scaled, 1e-6) and close(colours.flip(1), turned, 1e-6)
    flat = targets.flatten(0, 1).double()
    _, _, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for i in range(3):  # the largest component is the first channel
        p = flat @ axes[i]
        if (p * colours[..., i].flatten()).sum() < p.mean() * colours[..., i].sum():
            p = -p  # the sign of an axis is free
        low, high = p.quantile(0.02), p.quantile(0.98)
        assert close(colours[..., i].flatten(), ((p - low) / (high - low)).clamp(0, 1))


CKNNA = {(40, 16, 24, 5): 0.688997824777114, (64, 8, 32, 10): 0.4237325717766288}  # n, da, db, k


@pytest.mark.parametrize("sizes", CKNNA)
def test_cknna_is_that_of_the_platonic_representation_hypothesis(sizes):
    n, da, db, k = sizes
    a = wave((n, da), 1.1)
    b = a @ wave((da, db), 0.6) + 0.3 * wave((n, db), 2.3)
    assert close(sample.cknna(a, b, k), CKNNA[sizes])
    assert close(sample.cknna(3 * a, a), 1, 1e-4)
    for n, topk in ((3, 2), (10, 1), (10, 10)):
        with pytest.raises(UserError, match="2 <= topk < images > 3"):
            sample.cknna(a[:n], b[:n], topk)


def test_neighbours_vote_with_their_cosine_and_nobody_for_himself():
    labels = torch.arange(100) % 5
    assert sample.knn_accuracy(F.one_hot(labels, 5), labels) == 1
    pairs = torch.eye(50).repeat_interleave(2, dim=0)  # of different classes: always wrong
    assert sample.knn_accuracy(pairs, torch.arange(100) % 2, topk=1) == 0
    angles = torch.tensor([0.0, 0.1, 1.2, 1.2])  # one near neighbour beats two distant ones
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert sample.knn_accuracy(features, torch.tensor([1, 1, 0, 0]), topk=3) == 1


def test_the_cknna_table_is_that_of_the_hidden_states(trained, photos, tmp_path):
    path = tmp_path / "table.csv"
    code, _, err = show(trained, "--cknna", "--topk", 3, "--num-samples", 10, "--output", path)
    assert code == 0, err
    rows = table_of(path)
    assert [row["block"] for row in rows] == [1, 2, 3] and len(rows[0]) == 11
    (x, labels, _, x_t), model, states = held_out(photos, 10, 0.5), ema_of(trained), []
    z = TargetEncoder("test_vit", 4, "random")(x).mean(1)
    model.blocks[1].register_forward_hook(lambda block, _, out: states.append(out.mean(1)))
    model(x_t, torch.full((10,), 0.5), torch.full((10,), 4))
    expected = [sample.cknna(states[0], z, 3), sample.knn_accuracy(states[0], labels, 3)]
    assert close([rows[1][f"{kind} t=0.5"] for kind in ("cknna", "knn")], expected, 2e-5)


def test_frechet_distance_is_the_closed_form_and_zero_for_equal_sets():
    torch.manual_seed(0)
    a = torch.randn(500, 6).double() @ torch.randn(6, 6).double()
    b = torch.randn(500, 6).double() * torch.arange(1, 7) + 2
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.var(0) + b.var(0)).sum()
    assert close(sample.frechet_distance(a, b), expected - 2 * roots.sum(), 1e-6)
    few = torch.randn(10, 64)  # fewer samples than dimensions
    assert close(sample.frechet_distance(few, few + 1), 64, 1e-4)


TYPED = {  # options, and the encoder and weights that they mean for a run with RUNS weights
    "--alignment": ("test_vit", 4, "RUNS"),
    "--losses": ("test_vit", 4, "RUNS"),
    "--cknna --encoder-weights w.pth": ("test_vit", 4, "w.pth"),
    "--cknna --encoder test_vit2": ("test_vit2", 4, "download"),
    "--cknna --encoder test_vit2 --encoder-weights w.pth": ("test_vit2", 4, "w.pth"),
}


def with_config(run, folder, **changes):
    """The run in another folder, as if it had been trained with other options."""
    state = {**run.state, "config": {**run.state["config"], **changes}}
    torch.save(state, folder / "checkpoint.pt")
    return run._replace(folder=folder)


@pytest.mark.parametrize("options", TYPED)
def test_the_encoder_is_the_runs_own_unless_another_is_typed(
    trained, tmp_path, monkeypatch, options
):
    asked = []
    monkeypatch.setattr(repa_mini, "TargetEncoder", lambda *args: asked.append(args))
    run = with_config(trained, tmp_path, encoder_weights="RUNS")
    with pytest.raises(AttributeError):  # there is no encoder
        show(run, *options.split())
    assert asked == [TYPED[options]]


def test_the_runs_weights_are_a_file_or_pretrained_ones(trained, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit").state_dict(), weights)
    for saved, code in (("download", 1), (str(weights), 0)):
        done = show(with_config(trained, tmp_path, encoder_weights=saved), "--alignment")
        assert done[0] == code and ("no network" in done[2]) == (code == 1)


SAMPLE_MISTAKES = {
    "--classes 4": "not all among 0 a, 1 b, 2 c, 3 d",
    "--guidance-low 0.8 --guidance-high 0.2": "0 <= --guidance-low <= --guidance-high <= 1",
    "--num-steps 0": "below 1",
    "--cfg-scale nan": "--cfg-scale is finite",
    "--cknna --encoder-weights nowhere.pth": "nowhere.pth",
    "--cknna --topk 30": "CKNNA needs",
    "--losses --data nowhere": "nowhere",
    "--output nowhere/samples.png": "nowhere/samples.png",
    "--output samples.gif": "does not end in .png",
    "--npz samples.png": "does not end in .npz",
    "--mode sde --heun": "leave one out",
    "--losses --cknna": "not allowed with",
    "--ckpt absent.pt": "absent.pt",
    "--heun --cknna": "does not use --heun",
    "--topk 3": "does not use --topk",
    "--encoder test_vit": "does not use --encoder",
    "--trajectory --npz a.npz": "does not use --npz",
    "--trajectory --mode sde": "does not use --mode",
    "--seed 0 --losses": "does not use --seed",  # also if it is the default
    "--alignment --encoder test_vit": "does not use --encoder",
}


@pytest.mark.parametrize("mistake", SAMPLE_MISTAKES)
def test_a_mistake_in_sampling_is_told(trained, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repa_mini, "guided_velocity", None)  # it is found out before
    code, _, err = show(trained, *mistake.split())
    assert refused(code, err) and SAMPLE_MISTAKES[mistake] in err, err
    assert not list(tmp_path.iterdir())


def test_what_a_run_cannot_show_is_told(photos, tmp_path):
    run = new_run(photos, tmp_path / "run", "--proj-coeff 0 --cfg-prob 0 --max-train-steps 1")
    assert "--cfg-prob above 0" in show(run, "--cfg-scale", 2)[2]
    assert "no projector" in show(run, "--alignment")[2]
    assert show(run, "--cknna", "--topk", 3)[0] == 0  # needs no projector


def test_nothing_is_overwritten_and_a_default_name_is_new(trained, photos, tmp_path, monkeypatch):
    state = repa_mini.load_checkpoint(trained.folder)
    torch.save(state, tmp_path / "checkpoint.pt")
    argv = ["--ckpt", tmp_path / "checkpoint.pt", "--device", "cpu", "--num-steps", 1]
    for name in ("samples.png", "samples-2.png", "samples-3.png"):
        assert call(sample.main, argv)[0] == 0 and (tmp_path / name).stat().st_size > 100
    (tmp_path / "a.npz").write_text("precious")
    monkeypatch.setattr(repa_mini, "guided_velocity", None)
    for option in (("--output", tmp_path / "samples.png"), ("--npz", tmp_path / "a.npz")):
        code, _, err = call(sample.main, [*argv, *option])
        assert refused(code, err) and "already exists" in err
    assert (tmp_path / "a.npz").read_text() == "precious"


def test_a_checkpoint_that_does_not_fit_is_told(trained, tmp_path):
    ema = {**trained.state["ema"], "pos_embed": torch.zeros(3)}
    sit = {**trained.state["sit"], "colour": "red"}
    wrong = [{**trained.state, "ema": ema}, {**trained.state, "sit": sit}, {"ema": {}}, [1]]
    for state in wrong:
        torch.save(state, tmp_path / "checkpoint.pt")
        code, _, err = call(sample.main, ["--ckpt", tmp_path, "--device", "cpu", "--num-steps", 1])
        assert refused(code, err) and str(tmp_path) in err and len(err) < 600
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_help_and_what_is_printed_suit_an_ascii_terminal(trained, tmp_path):
    """Class names go to stderr, where Python escapes what the terminal cannot show."""
    torch.save({**trained.state, "classes": ["caf\u00e9", *"bcd"]}, tmp_path / "checkpoint.pt")
    argv = ["--ckpt", tmp_path, "--device", "cpu", "--num-steps", 1]
    code, out, err = call(sample.main, argv)
    assert code == 0 and out.isascii() and "0 caf" in err
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, sample.__file__, "--help"]
    assert subprocess.run(argv, env=environment, capture_output=True).returncode == 0


# ---- 13. The README and its exercises
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_functions_and_options_that_exist():
    named = re.findall(r"`(repa_mini|sample)\.(?!py\b)([A-Za-z_]\w*)", README)
    assert len(named) >= 10
    for module, name in named:
        assert hasattr({"repa_mini": repa_mini, "sample": sample}[module], name), name
    known = "".join(call(module.main, ["--help"])[1] for module in (repa_mini, sample))
    foreign = {"--gpu", "--fid", "--input1", "--input2"}  # of torch-fidelity
    for option in set(re.findall(r"(?<![-\w])--[a-z][a-z0-9-]*", README)) - foreign:
        assert option in known, option


def test_one_batch_step_by_step():
    code = re.search(r"```python\n(.*?)```", README[README.index("## One batch") :], re.DOTALL)[1]
    left = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, left)
    step = SimpleNamespace(**left)
    assert step.x.shape == (64, 3, 32, 32) and step.z.shape == step.z_tilde.shape == (64, 64, 64)
    assert not step.v_theta.any()  # so the loss is that of the answer zero
    assert close(step.velocity_loss, (step.noise - step.x).square().mean(), 1e-5)
    assert -0.2 < -step.projection_loss < 0.2


EXERCISES = sorted((HERE / "assets" / "exercises").glob("*.diff"))


@pytest.mark.parametrize("path", EXERCISES, ids=[path.stem for path in EXERCISES])
def test_an_exercise_applies_and_trains(photos, tmp_path, path):
    assert len(path.read_text().splitlines()) <= 25
    shutil.copy(HERE / "repa_mini.py", tmp_path)
    subprocess.run(["git", "apply", "-v", path], cwd=tmp_path, check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location(path.stem, tmp_path / "repa_mini.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (tmp_path / "repa_mini.py").read_text() != (HERE / "repa_mini.py").read_text()
    module.SIT_MODELS["SiT-Ti/8"] = SIT_MODELS["SiT-Ti/8"]
    argv = [*COMMON.split(), "--data", photos, "--output-dir", tmp_path / "run", "--device", "cpu"]
    code, _, err = call(module.main, [*argv, "--max-train-steps", 2, "--batch-size", 4])
    assert code == 0, err
