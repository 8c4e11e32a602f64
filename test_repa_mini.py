"""Statements about the method and the program, checked: the method first, then a run, then faults.
Reference numbers come from the methods' own code, on weights and inputs of `wave` and `fill`:
SiT, loss, interpolant and samplers from the REPA authors' repository (sihyun-yu/REPA, commit
67f7145), the DINOv2 tokens from facebookresearch/dinov2 (b8931f7) with REPA's preprocessing, CKNNA
from minyoungg/platonic-rep (dcd76ba).
"""

import contextlib
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

os.environ["TQDM_DISABLE"] = "1"  # so that stderr holds nothing but complaints

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import repa_mini
import sample
from repa_mini import SIT_MODELS, SiT, TargetEncoder, UserError, interpolant, sample_ode

torch.set_num_threads(1)  # as quick for small models, and not slowed down by a busy machine
HERE = Path(__file__).parent
TINY = dict(hidden_size=48, depth=3, num_heads=3, encoder_depth=2, z_dim=20, projector_dim=32)
LABELS = "y_embedder.embedding_table.weight"


def wave(shape, w, phase=0.0):
    return torch.sin(w * torch.arange(math.prod(shape), dtype=torch.float64) + phase).reshape(shape)


def fill(state):
    filled = {}
    for k, (name, p) in enumerate(sorted(state.items()), start=1):
        scale = 0.1 if p.ndim < 2 else 1 / math.sqrt(p[0].numel())
        filled[name] = scale * wave(p.shape, 1.7, 0.37 * k)
    return filled


def close(a, b, tolerance):
    a = torch.as_tensor(a, dtype=torch.float64).detach()
    b = torch.as_tensor(b, dtype=torch.float64).detach()
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


def seeded(use, seed=0, number=0):
    return torch.Generator().manual_seed(repa_mini.seed_for(use, seed, number))


def at(t, path_type):  # interpolant at one time, as four Python floats
    return [float(a) for a in interpolant(torch.tensor(t, dtype=torch.float64), path_type)]


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


def test_a_vanilla_and_a_repa_model_draw_the_same_weights():
    states = []
    for z_dim in (0, 20):
        torch.manual_seed(3)
        states.append(SiT(**{**TINY, "z_dim": z_dim}).state_dict())
    vanilla, repa = states
    assert all(torch.equal(p, repa[name]) for name, p in vanilla.items())


SIZES = {  # of the authors' models: parameters (4 channels, 1000 classes), heads, encoder depth
    "SiT-S/2": (39515664, 6, 4),  # theirs with decoder_hidden_size=384
    "SiT-B/4": (137771328, 12, 4),
    "SiT-L/2": (465955600, 16, 8),
    "SiT-XL/2": (683242512, 16, 8),
}
LAYERS = """x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 projectors.0.0 projectors.0.2
            projectors.0.4 final_layer.linear final_layer.adaLN_modulation.1"""
LAYERS_OF_A_BLOCK = "attn.qkv attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1"


@pytest.mark.parametrize("name", SIZES)
def test_state_dict_has_the_authors_keys_and_sizes(name):
    size = SIT_MODELS[name]
    with torch.device("meta"):
        model = SiT(**size, in_channels=4, num_classes=1000, z_dim=768)
    state = model.state_dict()
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, size["num_heads"], size["encoder_depth"]) == SIZES[name]
    layers = LAYERS.split()
    for i in range(size["depth"]):
        layers += [f"blocks.{i}.{layer}" for layer in LAYERS_OF_A_BLOCK.split()]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(state) == expected | {"pos_embed", LABELS}
    d, p = size["hidden_size"], size["patch_size"]
    assert state["x_embedder.proj.weight"].shape == (d, 4, p, p)
    assert state["final_layer.linear.weight"].shape == (p * p * 4, d)


def reference_sit():
    """Model of the authors' numbers: `fill`ed weights in float64, but its own position table."""
    model = SiT(**TINY, input_size=8).double().eval()
    state = model.state_dict()
    model.load_state_dict({**fill(state), "pos_embed": state["pos_embed"]})
    return model


T, Y = torch.tensor([0.3, 0.85], dtype=torch.float64), torch.tensor([3, 10])  # 10: null


def test_sit_draws_nothing_once_it_is_built():
    model, x, before = reference_sit().train(), wave((2, 3, 8, 8), 0.9), torch.get_rng_state()
    assert torch.equal(model(x, T, Y)[0], model(x, T, Y)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_sit_computes_the_authors_velocity_and_hidden_state():
    v, z = [a.detach() for a in reference_sit()(wave((2, 3, 8, 8), 0.9), T, Y)]
    first = [-0.3123258, -0.2891413, 0.0982973, 0.1745056, -0.7099031, -0.5008366]
    last = [0.0577936, 0.0222462, 0.7612500, 0.6756787]
    assert close(v.flatten()[:6], first, 1e-6) and close(v.flatten()[-4:], last, 1e-6)
    assert close([v.mean(), v.std()], [0.1155190, 0.4264541], 1e-6)
    first = [0.1501603, 0.0130920, -0.2238826, 0.1810051, 0.0985679, -0.2568624]
    assert close(z.flatten()[:6], first, 1e-6) and z.shape == (2, 16, 20)
    assert close([z.mean(), z.std()], [0.0068759, 0.1421358], 1e-6)


# With the authors' SiT in evaluation mode (theirs drops labels in training) and their SILoss, in
# whose place of random numbers t and the noise were put: the norms of the gradients of loss.mean()
# + 0.5 proj_loss.mean(), and sum(p * wave(p.shape, 0.3)) of the parameters after
# clip_grad_norm_(1.0) and a step of AdamW(lr=1e-3, weight_decay=0).
STEP = {
    "x_embedder.proj.weight": (0.5325303, 0.0643542),
    LABELS: (0.1036428, 0.1028783),
    "blocks.1.adaLN_modulation.1.bias": (0.0960328, -0.0470923),
    "final_layer.linear.weight": (1.3880530, 0.0032076),
    "projectors.0.2.weight": (0.0017798, 0.0153498),
}


def test_losses_gradients_and_an_optimizer_step_are_the_authors():
    model = reference_sit()
    x, noise, z = wave((2, 3, 8, 8), 0.9), wave((2, 3, 8, 8), 0.7, 0.2), wave((2, 16, 20), 1.3, 0.4)
    velocity_loss, projection_loss = repa_mini.training_losses(model, x, noise, T, Y, z)
    assert close(velocity_loss, 0.9749852, 1e-6) and close(projection_loss, -0.0045037, 1e-6)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
    (velocity_loss + 0.5 * projection_loss).backward()
    parameters = dict(model.named_parameters())
    for name, (norm, _) in STEP.items():
        assert close(parameters[name].grad.norm(), norm, 1e-6), name
    assert close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), 1.8357975, 1e-6)
    optimizer.step()
    for name, (_, after) in STEP.items():
        p = parameters[name]
        assert close((p * wave(p.shape, 0.3)).sum(), after, 1e-6), name


# ---- 2. Targets
def tiny_dino(grid_size=4):
    sizes = dict(embed_dim=32, depth=2, num_heads=2)
    return TargetEncoder("vit_small_patch14_dinov2", grid_size, pretrained=False, **sizes)


def test_dinov2_tokens_are_the_dinov2_authors():
    encoder = tiny_dino(16).double()
    encoder.model.load_state_dict(fill(encoder.model.state_dict()))
    images = ((wave((2, 3, 32, 32), 0.013) + 1) * 127.5).round()
    z = encoder(images / 127.5 - 1)
    assert z.shape == (2, 256, 32) and encoder.embed_dim == 32
    assert close(z[0, 0, :5], [0.0468843, 0.0420644, 0.1103932, 0.0460610, -0.0624566], 1e-6)
    assert close(z[0, 100, :5], [0.0361490, 0.0009721, 0.0470739, 0.0667836, -0.0549564], 1e-6)
    assert close(z[-1, -1, -4:], [0.0163876, 0.1133859, -0.0425858, 0.1057935], 1e-6)
    assert close([z.mean(), z.std()], [0.0490329, 0.0930159], 1e-6)


def test_the_encoder_is_frozen_and_in_evaluation_mode():
    encoder = tiny_dino()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(torch.rand(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_a_mistake_in_the_encoders_own_code_is_a_traceback(train, monkeypatch):
    monkeypatch.setattr(TargetEncoder, "preprocess", lambda self, images: images.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        train()


VITS = {  # class and register tokens, pixels for 4 x 4 patches
    "vit_small_patch14_reg4_dinov2": (5, 56),
    "vit_base_patch16_siglip_224": (0, 64),
}


@pytest.mark.parametrize("name", VITS)
def test_vit_targets_are_the_normalised_tokens_without_class_and_registers(name):
    prefix, size = VITS[name]
    encoder = TargetEncoder(name, 4, pretrained=False, depth=1, embed_dim=64, num_heads=1)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    config = timm.get_pretrained_cfg(name)
    mean, std = [torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std)]
    pixels = F.interpolate(((x + 1) / 2 - mean) / std, (size, size), mode="bicubic")
    tokens = encoder.model.forward_features(pixels)
    assert tokens.shape == (2, 16 + prefix, 64) and encoder.embed_dim == 64
    assert torch.equal(encoder(x), tokens[:, prefix:])


def test_cnn_targets_are_the_map_at_stride_16_row_by_row():
    encoder = TargetEncoder("tf_efficientnet_lite0", grid_size=2, pretrained=False)
    x = torch.rand(2, 3, 32, 32) * 2 - 1  # already of the right size, and with mean and std 1/2
    maps = encoder.model.forward_intermediates(x, intermediates_only=True)
    assert encoder.embed_dim == 112 and maps[3].shape == (2, 112, 2, 2)
    assert close(encoder(x)[:, 1], maps[3][:, :, 0, 1], 1e-5)  # token 1 is row 0, column 1


SMALL = dict(depth=1, embed_dim=24, num_heads=1)
DINOV2 = "vit_small_patch14_dinov2.lvd142m"
ENCODERS = {  # changes, a tensor of its file, the file's own grid size
    DINOV2: (SMALL, "norm.bias", 37),
    "test_efficientnet": (dict(), "conv_stem.weight", 14),
}


def weights_of(name, changes):
    torch.manual_seed(1)
    state = timm.create_model(name, pretrained=False, **changes).state_dict()
    return {k: torch.rand_like(p) if p.is_floating_point() else p for k, p in state.items()}


@pytest.mark.parametrize("fault", [None, "missing", "shape", "extra"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_weights_are_loaded_to_the_last_bit_or_refused(tmp_path, name, fault):
    changes, key, grid_size = ENCODERS[name]
    weights, path = weights_of(name, changes), tmp_path / "weights.safetensors"
    save_file(weights, path)
    if fault is None:
        loaded = TargetEncoder(name, grid_size, str(path), **changes).model.state_dict()
        assert len(loaded) > 10 and all(torch.equal(p, weights[k]) for k, p in loaded.items())
    faults = {
        "missing": {},
        "shape": {key: torch.zeros(7)},
        "extra": {"blocks.7.x": torch.zeros(3)},
    }
    weights.update(faults.get(fault, {}))
    if fault == "missing":
        del weights[key]
    if name == DINOV2:
        weights["mask_token"] = torch.zeros(1, 24)  # in its authors' own file, too
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    if fault is None:
        assert TargetEncoder(name, grid_size, str(path), **changes)
    else:
        with pytest.raises(UserError, match=rf"cannot use encoder {name} .*weights.pth") as error:
            TargetEncoder(name, grid_size, str(path), **changes)
        assert "\n" not in str(error.value)


UNUSABLE = {
    "nonsense": "Unknown model",
    "vit_tiny_patch16_224.nonsense": "Invalid pretrained tag",
    "levit_128": "some encoders take one image size only",
    "vit_tiny_patch16_224.augreg_in21k": "no network",  # whose weights cannot be downloaded
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_encoder_that_cannot_be_used_is_refused_in_a_sentence(name, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    with pytest.raises(UserError, match=f"cannot use encoder {name}.*{UNUSABLE[name]}"):
        TargetEncoder(name, 8, pretrained="augreg" in name)


# ---- 3. Losses
def test_repa_loss_is_the_authors_and_minus_the_cosine_whatever_the_lengths():
    z_tilde, z = wave((3, 5, 7), 1.3, 0.4), wave((3, 5, 7), 0.7)
    loss = repa_mini.repa_loss(z_tilde, z)
    assert close(loss, 0.011408185623404515, 1e-10)
    lengths = torch.rand(3, 5, 1).double() * 100 + 0.01
    assert close(repa_mini.repa_loss(z_tilde * lengths, z / lengths), loss, 1e-10)
    assert close(repa_mini.repa_loss(z, z), -1, 1e-6) and close(repa_mini.repa_loss(-z, z), 1, 1e-6)
    with pytest.raises(ValueError, match="spiral is unknown; choose linear or cosine"):
        interpolant(torch.zeros(1), "spiral")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-6, 1.0, 6e4])
def test_the_repa_loss_of_half_precision_tokens_of_any_length_is_exact(dtype, length):
    torch.manual_seed(0)
    z_tilde, z = F.normalize(torch.randn(2, 3, 5, 16), dim=-1).unbind()
    z_tilde, z = (length * z_tilde).to(dtype), (z + z_tilde).to(dtype)  # squares of 6e4 overflow
    exact = -F.cosine_similarity(z_tilde.double(), z.double(), dim=-1).mean()
    for loss in (repa_mini.repa_loss(z_tilde, z), repa_mini.repa_loss(z, z_tilde)):
        assert loss.dtype == torch.float32 and close(loss, exact, 1e-6)


# ---- 4. Samplers
class Field:
    """A model whose velocity is `velocity(x, t, y)`."""

    num_classes = 10

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, x, t, y):
        return self.velocity(x, t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)), None


def reference_field():
    """tanh(x) (1 + t) + 0.1 c with c = y + 1 for a class and 0 for the null label."""

    def velocity(x, t, y):
        return torch.tanh(x) * (1 + t) + 0.1 * torch.where(y == 10, 0, y + 1).double()

    return Field(velocity)


NOISE, CLASSES = wave((2, 1, 2, 2), 0.8), torch.tensor([0, 2])
GUIDED = dict(cfg_scale=2.5, guidance_low=0.25, guidance_high=0.75)  # both ends are steps
# The first numbers after 8 steps of the authors' euler_sampler, or 6 of euler_maruyama_sampler with
# `wave` in the place of randn_like; for this their null label, 1000, was taken for 10.
SAMPLES = {
    "Euler": (dict(), [-0.057491139, 0.081157118, 0.154228481]),
    "Heun": (dict(heun=True), [-0.056097215, 0.113658810, 0.196268254]),
    "guidance": (dict(cfg_scale=2.5), [-0.143956784, -0.006859927, 0.063540627]),
    "interval": (dict(heun=True, **GUIDED), [-0.111091001, 0.057928053, 0.139097724]),
    "SDE, interval": (GUIDED, [-0.073807130, 0.442961454, 0.399577078]),
    "SDE, cosine": (dict(path_type="cosine"), [-0.058688096, 0.838516146, 0.779200346]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_the_authors(name, monkeypatch):
    options, expected = SAMPLES[name]
    monkeypatch.setattr(torch, "randn", lambda shape, **options: wave(shape, 1.1))
    sampler, num_steps = (sample.sample_sde, 6) if "SDE" in name else (sample_ode, 8)
    x = sampler(reference_field(), NOISE, CLASSES, num_steps, **options)
    assert close(x.flatten()[:3], expected, 1e-8)


# ---- 5. Data
def test_built_in_shapes_have_their_hue_their_outline_and_never_repeat():
    images, labels = repa_mini.draw_shapes(200, seed=0)
    assert images.shape == (200, 3, 32, 32) and labels.tolist() == list(range(10)) * 20
    assert torch.equal(images, repa_mini.draw_shapes(200, seed=0)[0])
    both = torch.cat([images, repa_mini.draw_shapes(200, seed=1)[0]])
    assert len(both.flatten(1).unique(dim=0)) == 400
    red, green, blue = images.double().sum((2, 3)).T
    hue = torch.atan2((green - blue) * math.sqrt(3) / 2, red - (green + blue) / 2) / math.tau * 10
    assert ((hue - labels + 5) % 10 - 5).abs().max() < 0.2  # in tenths of the circle
    mask = images.max(1).values.int() - images.min(1).values.int() > 60  # coloured, not grey
    width, height = mask.any(1).double().sum(1), mask.any(2).double().sum(1)
    size = torch.maximum(width, height)
    assert 12 <= size.min() < 16 and 20 < size.max() <= 24
    for k, (corners, angle) in enumerate(repa_mini.POLYGONS):  # each against a large one
        large = Image.new("L", (400, 400))
        ImageDraw.Draw(large).regular_polygon((200, 200, 150), corners, angle, fill=1)
        large = torch.from_numpy(np.array(large)).bool()
        share = large.sum() / (large.any(0).sum() * large.any(1).sum())  # of its bounding box
        ours = (mask.sum((1, 2)) / (width * height))[labels == k].mean()
        assert close(ours, share, 0.06), k


def test_pixels_and_the_unit_interval_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(repa_mini.to_pixels(repa_mini.to_unit(pixels)), pixels)
    assert repa_mini.to_unit(pixels)[[0, 255]].tolist() == [-1, 1]
    assert repa_mini.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def write_images(folder, images, labels):
    """FOLDER/<class>/<number>.png from uint8 images; the classes are a to j."""
    for i, (image, label) in enumerate(zip(images, labels)):
        path = Path(folder, "abcdefghij"[label], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)


def test_every_50th_image_is_held_out_or_those_in_a_folder_named_test(tmp_path):
    images, labels = repa_mini.draw_shapes(120, seed=0)
    order = labels.argsort(stable=True)  # as they lie on the disk, class by class
    images, labels = images[order], labels[order]
    held_out = torch.arange(120) % 50 == 0
    write_images(tmp_path / "plain", images, labels)
    write_images(tmp_path / "split" / "train", images[::2], labels[::2])
    write_images(tmp_path / "split" / "test", images[1::2], labels[1::2])
    splits = {
        "plain": (images[~held_out], labels[~held_out], images[held_out], labels[held_out]),
        "split": (images[::2], labels[::2], images[1::2], labels[1::2]),
    }
    for folder, expected in splits.items():
        *data, classes = repa_mini.load_data(str(tmp_path / folder))
        assert all(torch.equal(a, b) for a, b in zip(data, expected))
        assert classes == list("abcdefghij")


@pytest.mark.parametrize("size", [(96, 32), (32, 64), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "turned"])
def test_images_of_any_mode_and_shape_are_cropped_at_their_centre(tmp_path, mode, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, exif = Image.fromarray(noise).convert(mode.replace("turned", "RGB")), Image.Exif()
    exif[0x0112] = 3 if mode == "turned" else 1  # the orientation: by 180 degrees, or upright
    image.save(tmp_path / "0.png", exif=exif)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    centre = image.convert("RGB").crop((left, top, left + side, top + side))
    centre = centre.rotate(180) if mode == "turned" else centre
    centre = pil_to_tensor(centre.resize((32, 32), Image.Resampling.BICUBIC))
    assert close(repa_mini.read_image(tmp_path / "0.png"), centre, 1)


def test_without_a_folder_the_data_is_cifar10(tmp_path, monkeypatch):
    """A tiny archive in CIFAR-10's layout of pickles, with torchvision's checksums switched off."""
    images, labels = repa_mini.draw_shapes(12, seed=0)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        two = slice(2 * i, 2 * i + 2)
        content = {"data": images[two].flatten(1).numpy(), "labels": labels[two].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    monkeypatch.chdir(tmp_path)
    *data, classes = repa_mini.load_data()
    expected = images[:10], labels[:10], images[10:], labels[10:]
    assert all(torch.equal(a, b) for a, b in zip(data, expected))
    assert classes == list("abcdefghij")


# ---- 6. The random numbers of a step
def drawn(step, n=40, seed=0, batch_size=8, cfg_prob=0.5):
    """draw_batch of n of the built-in images; the null label is 10."""
    args = SimpleNamespace(seed=seed, batch_size=batch_size, cfg_prob=cfg_prob)
    return repa_mini.draw_batch(*repa_mini.draw_shapes(n, seed=0), step, 10, args)


def test_every_step_is_drawn_anew_from_seed_and_step_and_an_epoch_shows_every_image_once():
    orders = [torch.cat([drawn(5 * e + i)[4] for i in range(5)]).tolist() for e in range(2)]
    assert all(sorted(order) == list(range(40)) for order in orders) and orders[0] != orders[1]
    assert len(set(torch.cat([drawn(i, n=42)[4] for i in range(5)]).tolist())) == 40  # 2 left out
    for other in (drawn(4), drawn(3, seed=1), drawn(8)):
        assert not any(torch.equal(a, b) for a, b in zip(other, drawn(3)))
    uses = itertools.product(repa_mini.USES, (0, 1, 2), range(2000))
    seeds = [repa_mini.seed_for(*use) % 2**32 for use in uses]  # the bits that a CPU keeps
    assert len(set(seeds)) == len(seeds)  # no two uses share a seed


def test_a_batch_is_what_its_index_flips_and_labels_say():
    images, labels = repa_mini.draw_shapes(40, seed=0)
    flips, times, noises, drops = [], [], [], []
    for step in range(60):
        x, noise, t, y, index, flip = drawn(step, batch_size=16, cfg_prob=0.3)
        plain = images[index].float() / 127.5 - 1
        assert torch.equal(x[~flip], plain[~flip]) and torch.equal(x[flip], plain[flip].flip(-1))
        dropped = y == 10
        assert torch.equal(y[~dropped], labels[index][~dropped])
        flips, times = flips + [flip], times + [t]
        noises, drops = noises + [noise.flatten(1)[:, :50]], drops + [dropped]
    flips, times, noises, drops = [torch.cat(v).double() for v in (flips, times, noises, drops)]
    n = len(flips)
    assert abs(flips.mean() - 0.5) < 4 * math.sqrt(0.25 / n)
    assert abs(drops.mean() - 0.3) < 4 * math.sqrt(0.21 / n)
    uniform = (torch.arange(n) + 0.5) / n
    assert (times.sort().values - uniform).abs().max() < 2 / math.sqrt(n)  # Kolmogorov-Smirnov
    assert abs(noises.mean()) < 0.02 and abs(noises.std() - 1) < 0.02
    assert not (drawn(0, cfg_prob=0.0)[3] == 10).any()


# ---- 7. A run
TI_8 = dict(hidden_size=32, depth=3, num_heads=2, encoder_depth=2, patch_size=8)
COMMON = "--smoke --model SiT-Ti/8 --projector-dim 24 --batch-size 16 --max-train-steps 4"
COMMON += " --learning-rate 1e-3 --log-every 1 --eval-every 100 --checkpointing-steps 100"
Run = namedtuple("Run", "code rows state folder out err")


@pytest.fixture(autouse=True, scope="session")
def small_models():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIT_MODELS, "SiT-Ti/8", TI_8)
        yield


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
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def run_program(folder, *argv):
    """The exit code and all that a run has left in its folder."""
    code, out, err = call(repa_mini.main, ["--device", "cpu", *argv])
    rows, state = [], {}
    if (folder / "metrics.csv").is_file():
        with open(folder / "metrics.csv", newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    with contextlib.suppress(UserError, OSError):
        state = repa_mini.load_checkpoint(folder / "checkpoint.pt")
    return Run(code, rows, state, folder, out, err)


def new_run(photos, folder, options=""):
    argv = [*COMMON.split(), "--data", photos, "--output-dir", folder, *options.split()]
    return run_program(folder, *argv)


@pytest.fixture
def train(tmp_path, photos, monkeypatch):
    """train(options, resume=FOLDER or None) runs the program; two batches are an epoch. Its grids
    show noise, since to sample them would take most of the time; `finished` and `trained` do it."""
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


def refused(code, err):
    """A mistake of the user's, told in one sentence."""
    return code == 2 and "error: " in err and err.count("\n") == 1


def by_the_equations(sit, photos, args, coeff=0.5, stop=10**9, path_type="linear", lr=1e-3):
    """The training loop a second time, in plain lines. Yields what every step should leave."""
    images, labels, _, _, classes = repa_mini.load_data(photos)
    encoder = TargetEncoder("test_vit", 4, pretrained=False)
    torch.manual_seed(repa_mini.seed_for("weights", args.seed))
    model = SiT(**sit)
    p = {name: q for name, q in model.named_parameters() if q.requires_grad}
    ema = {name: q.detach().clone() for name, q in p.items()}
    optimizer = torch.optim.AdamW(p.values(), lr, (0.9, 0.999), 1e-8, weight_decay=0.0)
    for s in itertools.count():
        x, eps, t, y, _, _ = repa_mini.draw_batch(images, labels, s, len(classes), args)
        u = t.view(-1, 1, 1, 1)
        if path_type == "linear":
            x_t, v = (1 - u) * x + u * eps, eps - x
        else:
            c, d, k = torch.cos(math.pi / 2 * u), torch.sin(math.pi / 2 * u), math.pi / 2
            x_t, v = c * x + d * eps, k * (c * eps - d * x)
        v_theta, z_tilde = model(x_t, t, y)
        row = {"velocity_loss": ((v_theta - v) ** 2).mean()}
        row["loss"] = row["velocity_loss"]
        if coeff > 0 and s < stop:
            z = encoder(x)  # of the image as it was flipped
            cosine = (z * z_tilde).sum(-1) / (z.norm(dim=-1) * z_tilde.norm(dim=-1))
            row["repa_loss"] = -cosine.mean()
            row["loss"] = row["velocity_loss"] + coeff * row["repa_loss"]
        optimizer.zero_grad()
        row["loss"].backward()
        grads = [q.grad for q in p.values() if q.grad is not None]
        norm = row["grad_norm"] = torch.sqrt(sum((g**2).sum() for g in grads))
        for g in grads:
            g *= min(1.0, 1.0 / norm.item())
        optimizer.step()
        decay = min(0.9999, (1 + s) / (10 + s))
        ema = {name: decay * ema[name] + (1 - decay) * p[name].detach() for name in p}
        yield row, {name: q.detach().clone() for name, q in p.items()}, ema


OTHER = "--seed 7 --proj-coeff 2 --learning-rate 3e-3 --cfg-prob 0.5 --path-type cosine"
ARMS = {  # options, and the same for the plain loop
    "": dict(),
    OTHER: dict(coeff=2.0, lr=3e-3, path_type="cosine"),
    "--proj-coeff 0": dict(coeff=0.0),
    "--repa-stop-step 2": dict(stop=2),
    "--cache-targets": dict(),
}


@pytest.mark.parametrize("options", ARMS)
def test_a_run_is_what_the_equations_say_after_every_step(train, photos, options):
    """Each step's weights come from a run that is resumed with one more step."""
    run = train(f"{options} --max-train-steps 1")
    assert run.code == 0, run.err
    seed, cfg_prob = (7, 0.5) if options == OTHER else (0, 0.1)
    args = SimpleNamespace(seed=seed, batch_size=16, cfg_prob=cfg_prob)
    steps = by_the_equations(run.state["sit"], photos, args, **ARMS[options])
    half = 2e-4 if options == "--cache-targets" else 0  # the cache is in half precision
    for s, (row, weights, ema) in enumerate(itertools.islice(steps, 5), start=1):  # two epochs
        if s > 1:
            run = train(f"--max-train-steps {s}", resume=run.folder)
        logged = run.rows[-1]
        assert logged["step"] == s
        assert {name for name in logged if not name.startswith("val")} == {"step", *row}
        for name, value in row.items():
            assert logged[name] == pytest.approx(value.item(), rel=2e-4, abs=half + 2e-6), (s, name)
        for kind, expected in (("model", weights), ("ema", ema)):
            for name, value in expected.items():
                assert close(run.state[kind][name], value, 2e-5 + half), (s, kind, name)


def ema_of(run):
    model = SiT(**run.state["sit"]).eval().requires_grad_(False)
    model.load_state_dict(run.state["ema"])
    return model


def grid_cells(path, columns):
    """The images of a grid, row by row: (N, 3, 32, 32)."""
    picture = pil_to_tensor(Image.open(path))
    assert (picture.shape[1] - 2) % 34 == 0 and picture.shape[2] == 2 + 34 * columns
    cells = picture[:, 2:, 2:].unfold(1, 32, 34).unfold(2, 32, 34)  # (3, row, column, 32, 32)
    return cells.flatten(1, 2).transpose(0, 1)


def same_pixels(a, b):
    """To a grey level, since sums may be taken in another order."""
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1


def test_evaluation_and_grid_are_those_of_the_ema(finished, photos):
    _, _, images, labels, _ = repa_mini.load_data(photos)
    x, model = repa_mini.to_unit(images), ema_of(finished)
    g = seeded("evaluation")
    noise, t = torch.randn(x.shape, generator=g), torch.rand(len(x), generator=g)
    z = TargetEncoder("test_vit", 4, pretrained=False)(x)
    velocity_loss, projection_loss = repa_mini.training_losses(model, x, noise, t, labels, z)
    last = finished.rows[-1]
    assert last["val_velocity_loss"] == pytest.approx(velocity_loss.item(), rel=1e-5)
    assert last["val_alignment"] == pytest.approx(-projection_loss.item(), rel=1e-3)
    y = torch.arange(4).repeat_interleave(10)  # one class a row
    noise = torch.randn(40, 3, 32, 32, generator=seeded("grid"))
    cells = grid_cells(finished.folder / "samples_0000004.png", columns=10)
    assert same_pixels(cells, repa_mini.to_pixels(sample_ode(model, noise, y, 50)))


def test_the_loss_falls_and_the_alignment_rises(train):
    run = train("--max-train-steps 60 --log-every 20 --learning-rate 1e-2")
    first, last = run.rows[0], run.rows[-1]
    assert last["velocity_loss"] < 0.95 * first["velocity_loss"] < 1.2  # from 1.4
    assert last["repa_loss"] < first["repa_loss"] - 0.1 < -0.6  # from 0
    assert last["val_velocity_loss"] < 1.1 and last["val_alignment"] > 0.8  # from 1.5 and 0


def test_rows_are_means_since_the_last_row_and_come_when_they_should(train, finished):
    run = train("--max-train-steps 5 --log-every 2 --eval-every 3")
    assert [row["step"] for row in run.rows] == [2, 3, 4, 5]
    assert set(run.rows[1]) == {"step", "val_velocity_loss", "val_alignment"}
    single = finished.rows  # the same steps, logged one by one
    for name in ("loss", "velocity_loss", "repa_loss", "grad_norm"):
        for row, a, b in ((run.rows[0], *single[:2]), (run.rows[2], *single[2:])):
            assert row[name] == pytest.approx((a[name] + b[name]) / 2, rel=1e-6)
    pictures = sorted(path.name for path in run.folder.glob("*.png"))
    assert pictures == ["samples_0000003.png", "samples_0000005.png"]


def test_a_vanilla_run_needs_no_encoder_and_shares_its_batches(train, finished, monkeypatch):
    monkeypatch.setattr(repa_mini, "TargetEncoder", None)
    run = train("--proj-coeff 0 --max-train-steps 1")
    assert run.code == 0 and not {"repa_loss", "val_alignment"} & set(run.rows[0])
    assert not any(name.startswith("projectors") for name in run.state["model"])
    assert run.rows[0]["velocity_loss"] == finished.rows[0]["velocity_loss"]  # exactly


def test_options_reach_the_model(train):
    state = train("--max-train-steps 1 --encoder-depth 3 --cfg-prob 0").state
    given = dict(encoder_depth=3, class_dropout_prob=0, num_classes=4, z_dim=64, projector_dim=24)
    assert state["sit"] == {**TI_8, **given}
    assert len(state["model"][LABELS]) == 4  # without label dropout there is no null label


# ---- 8. Precision, compilation, device, memory
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_close_to_float32_and_a_run_may_change_it(train, finished, dtype):
    run = train(f"--dtype {dtype}")
    assert all(p.dtype == torch.float32 for p in run.state["model"].values())
    for ours, exact in zip(run.rows[1:], finished.rows[1:]):  # the first velocity is zero
        assert ours["velocity_loss"] == pytest.approx(exact["velocity_loss"], rel=1e-3)
        assert ours["velocity_loss"] != exact["velocity_loss"]
    for s, other in ((5, "float32"), (6, dtype)):
        run = train(f"--max-train-steps {s} --dtype {other}", resume=run.folder)
        assert run.code == 0, run.err
        assert bool(run.state["scaler"]) == (other == "float16")


def test_under_fp16_a_step_that_overflows_is_skipped_and_its_norm_left_out(train, monkeypatch):
    """The first scale is far too large, the second is 2^10."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-50)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run = train("--dtype float16")
    assert run.state["scaler"]["scale"] == 2.0**10
    assert {state["step"].item() for state in run.state["optimizer"]["state"].values()} == {3}
    assert "grad_norm" not in run.rows[0] and "loss" in run.rows[0]
    assert all(row["grad_norm"] < 10 for row in run.rows[1:])  # unscaled


def test_a_compiled_run_is_the_uncompiled_one(train, monkeypatch):
    """aot_eager traces and splits forward and backward as on CUDA, without a compiler. After the
    stop the projector stays where it is, though AdamW has momentum for it."""
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", backend)
    options = "--repa-stop-step 2 --max-train-steps 3"
    plain, compiled = train(options), train(f"{options} --compile")
    assert "compiling" in compiled.out and "compiling" not in plain.out
    assert list(compiled.state["model"]) == list(plain.state["model"])
    stopped = train("--repa-stop-step 2 --max-train-steps 2").state["model"]
    for name, p in compiled.state["model"].items():
        assert close(p, plain.state["model"][name], 1e-5), name
        stays = "projectors" in name or name == "pos_embed"
        assert stays == close(p, stopped[name], 1e-5), name


def test_targets_that_do_not_fit_are_refused_with_their_size():
    huge = torch.zeros(1, dtype=torch.uint8).expand(10**12, 3, 32, 32)
    with pytest.raises(UserError, match=r"no room for 1024000\.0 GB .*leave out --cache-targets"):
        repa_mini.compute_targets(tiny_dino(), huge, contextlib.nullcontext())


def test_the_default_dtype_is_what_the_device_does_best(monkeypatch):
    zeros = torch.zeros(1)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: zeros)  # as if CUDA were here
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert repa_mini.pick_device("cuda")[1:] == (dtype, ("cuda", dtype, True))


@pytest.mark.parametrize("option", ["--no-compile", "--batch-size"])
def test_what_the_machine_lacks_is_told_with_a_way_out(train, monkeypatch, option):
    def lacking(*args, **kwargs):
        kind = RuntimeError if option == "--no-compile" else torch.OutOfMemoryError
        raise kind("no C compiler, or no memory")

    monkeypatch.setattr(repa_mini, "draw_batch", lacking)
    monkeypatch.setattr(torch, "compile", lacking)
    run = train("--compile" if option == "--no-compile" else "--no-compile")
    assert refused(run.code, run.err) and option in run.err


# ---- 9. Stopped, killed, resumed
def bits(x):
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.numpy().tobytes()
    if isinstance(x, dict):
        return {name: bits(value) for name, value in x.items()}
    return [bits(value) for value in x] if isinstance(x, (list, tuple)) else x


def left_behind(run):
    """All that a finished run leaves, to the last bit; its options apart, which name its folder."""
    assert not list(run.folder.glob("*.part"))
    state = {name: bits(value) for name, value in run.state.items() if name != "config"}
    pictures = {path.name: path.read_bytes() for path in run.folder.glob("*.png")}
    return (run.folder / "metrics.csv").read_text(), pictures, state


LONG = "--max-train-steps 7 --log-every 2 --eval-every 3 --checkpointing-steps 3"
CACHED = "--cache-targets --repa-stop-step 4 --dtype float16 --seed 7"


@pytest.mark.parametrize("options", ["", "--proj-coeff 0", CACHED])
def test_a_run_stopped_again_and_again_equals_an_uninterrupted_one(train, monkeypatch, options):
    """Ctrl-C in the step that is named; rows past the last checkpoint are lost, and made anew."""
    whole = train(f"{LONG} {options}")
    real, folder, stop_at = repa_mini.draw_batch, None, None

    def interrupted(images, labels, step, null_label, args):
        if step == stop_at:
            raise KeyboardInterrupt
        return real(images, labels, step, null_label, args)

    monkeypatch.setattr(repa_mini, "draw_batch", interrupted)
    stop_at = 2
    run = train(f"{LONG} {options}")
    assert run.code == 130 and "no checkpoint yet" in run.out
    for stop_at in (4, 3, 6):
        run = train(resume=folder) if folder else train(f"{LONG} {options}")
        folder = run.folder
        assert (run.code, run.state["step"], run.err) == (130, stop_at // 3 * 3, "")
        assert f"--resume {folder}" in run.out
    stop_at = None
    run = train(resume=folder)
    assert run.code == 0 and left_behind(run) == left_behind(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["checkpoint.part", "metrics.csv", "samples_0000002.png"])
def test_on_a_full_disk_the_checkpoint_before_is_whole_and_a_sentence_says_why(train, name):
    folder = train("--max-train-steps 1").folder
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/full")
    run = train("--max-train-steps 2", resume=folder)
    assert refused(run.code, run.err) and "No space left on device" in run.err
    assert run.state["step"] == 1


def test_a_run_may_move_its_data_and_change_its_intervals(train, finished, photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "copy")
    folder = train("--max-train-steps 2").folder
    options = "--max-train-steps 4 --log-every 1 --eval-every 7 --checkpointing-steps 9"
    options += " --seed 0 --batch-size 16 --encoder-depth 2 --smoke"  # the checkpoint's own values
    run = train(f"{options} --data {moved} --no-compile --dtype float32", resume=folder)
    assert run.code == 0, run.err
    assert bits(run.state["model"]) == bits(finished.state["model"])
    again = new_run(photos, folder)
    assert refused(again.code, again.err) and f"{folder} is there" in again.err
    next(moved.glob("train/a/*.png")).unlink()
    run = train(f"--data {moved} --max-train-steps 5", resume=folder)
    assert refused(run.code, run.err) and "44" in run.err and "43" in run.err


CHANGES = "--learning-rate 0.1,--model SiT-S/8,--seed 1,--cfg-prob 0.2,--batch-size 5"
CHANGES += ",--proj-coeff 0.25,--path-type cosine,--encoder-depth 1,--projector-dim 8"
CHANGES += ",--encoder vit_tiny_patch16_224,--repa-stop-step 3,--cache-targets"


@pytest.mark.parametrize("option", CHANGES.split(","))
def test_resume_refuses_what_contradicts_the_checkpoint_and_names_it(train, finished, option):
    run = train(f"{option} --max-train-steps 8", resume=finished.folder)
    name = option.split()[0][2:].replace("-", "_")
    assert refused(run.code, run.err) and name in run.err and run.state["step"] == 4


# ---- 10. Numbers that are not finite, files that are no checkpoint
@pytest.mark.parametrize("name", ["velocity_loss", "repa_loss", "grad_norm"])
def test_numbers_that_are_not_finite_stop_the_run_before_a_checkpoint(train, monkeypatch, name):
    folder = train("--max-train-steps 2").folder
    honest = repa_mini.training_losses

    def losses(*args):
        pair = dict(zip(("velocity_loss", "repa_loss"), honest(*args)))
        if name in pair:
            pair[name] = pair[name] * torch.nan
        else:
            pair["velocity_loss"].register_hook(lambda gradient: gradient * torch.inf)
        return tuple(pair.values())

    monkeypatch.setattr(repa_mini, "training_losses", losses)
    run = train("--max-train-steps 9 --log-every 50 --checkpointing-steps 3", resume=folder)
    assert refused(run.code, run.err) and run.state["step"] == 2
    assert re.search(f"({name}|loss) is no longer finite.*--learning-rate", run.err)


class Trap:
    """A pickle that creates a file when it is opened without care."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("kind", ["truncated", "text", "another dict", "a list", "code"])
def test_files_of_another_kind_are_refused_and_not_executed(train, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    contents = {"another dict": dict(model={}, steps=1), "a list": [1, 2], "code": dict(ema=Trap())}
    torch.save(contents.get(kind, dict(ema=torch.zeros(1000))), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    if kind == "text":
        path.write_text("not a checkpoint\n" * 100)
    for mmap in (False, True):
        with pytest.raises(UserError, match="no checkpoint"):
            repa_mini.load_checkpoint(path, mmap)
    with pytest.raises(UserError, match="cannot use encoder vit_tiny_patch16_224"):
        TargetEncoder("vit_tiny_patch16_224", 4, path)
    run = train(resume=tmp_path)
    assert refused(run.code, run.err) and str(path) in run.err
    assert not (tmp_path / "executed").exists()


# ---- 11. Mistakes on the command line: one sentence, exit code 2, and no folder
MISTAKES = {
    "--model SiT-M/2": "invalid choice: 'SiT-M/2'",
    "--encoder-depth 4": "give a block from 1 to 3",
    "--batch-size 45": "44 images",
    "--learning-rate nan": "number from 0",
    "--checkpointing-steps 99999999999": "whole number from 1",
    "--cfg-prob 1.0": "[0, 1)",
    "--encoder-weights nowhere.pth": "nowhere.pth",
    "--data nowhere": "nowhere",
    "--device cuda:99": "device cuda:99 is not here",
    "--device meta": "device meta is not here",
    "--enc vit_tiny_patch16_224": "unrecognized arguments",  # not taken for --encoder
    "--resume x": "not allowed with argument --output-dir",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_one_sentence_before_a_folder_is_made(train, mistake):
    run = train(mistake)
    assert refused(run.code, run.err) and MISTAKES[mistake] in run.err
    assert not run.folder.exists()


def test_a_data_folder_must_be_one_of_whole_images_in_classes(train, tmp_path):
    images, labels = repa_mini.draw_shapes(20, seed=0)
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "hollow", images, labels)
    (tmp_path / "hollow" / "nobody").mkdir()
    write_images(tmp_path / "unequal" / "train", images, labels)
    write_images(tmp_path / "unequal" / "test", images[:5], labels[:5])
    write_images(tmp_path / "truncated", images, labels)
    broken = tmp_path / "truncated" / "b" / "001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    expected = dict(empty="empty", hollow="nobody", unequal="test/ ['a', 'b', 'c', 'd', 'e']")
    expected["truncated"] = str(Path("b", "001.png"))
    for folder, words in expected.items():
        run = train(f"--data {tmp_path / folder}")
        assert refused(run.code, run.err) and words in run.err, run.err


def test_without_a_network_cifar10_is_missed_in_a_sentence_with_a_way_out(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.chdir(tmp_path)  # where no ./data is
    code, _, err = call(repa_mini.main, ["--proj-coeff", "0", "--device", "cpu"])
    assert code == 2 and "CIFAR-10" in err and "Network is unreachable" in err
    assert "--data" in err and "--smoke" in err


# ---- 12. sample.py
@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    """A run whose model knows something, so that every option changes its samples."""
    options = "--cfg-prob 0.3 --max-train-steps 40 --learning-rate 1e-2 --path-type cosine"
    return new_run(photos, tmp_path_factory.mktemp("trained") / "run", options)


def show(run, *options):
    """sample.py with 2 steps, unless the options say otherwise."""
    argv = ["--ckpt", run.folder / "checkpoint.pt", "--num-steps", 2, "--device", "cpu"]
    return call(sample.main, [*argv, *options])


def start(numbers, seed=0):
    """The noise that image `number` starts from."""
    generators = [seeded("sample", seed, i) for i in numbers]
    return torch.stack([torch.randn(3, 32, 32, generator=g) for g in generators])


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
    code, _, err = show(run, "--num-samples", 6, "--npz", path, *options.split())
    assert code == 0, err
    return torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("options", [*ODE, *SDE])
def test_every_option_of_the_samplers_does_what_it_does_in_python(trained, tmp_path, options):
    model, usual = ema_of(trained), dict(noise=start(range(6)), y=torch.arange(6) % 4, num_steps=2)
    plain = repa_mini.to_pixels(sample_ode(model, **usual))
    if options in ODE:
        x = sample_ode(model, **{**usual, **ODE[options]})
    else:
        usual.update(SDE[options], path_type="cosine", generator=seeded("sde"))
        x = sample.sample_sde(model, **usual)
    x = repa_mini.to_pixels(x)
    assert same_pixels(samples_of(trained, tmp_path / "s.npz", options), x)
    assert same_pixels(x, plain) == (options in ("", "--batch-size 4"))


def test_a_grid_has_one_class_a_row_whatever_the_number(trained, tmp_path):
    options = ["--classes", 2, 0, 3, "--num-samples", 7, "--output", tmp_path / "grid.png"]
    assert show(trained, *options)[0] == 0
    cells = grid_cells(tmp_path / "grid.png", columns=3)
    y = torch.tensor([2, 0, 3, 2, 0, 3, 2])
    images = repa_mini.to_pixels(sample_ode(ema_of(trained), start(range(7)), y, 2))
    assert same_pixels(cells[[0, 3, 6, 1, 4, 7, 2]], images)
    assert cells[[5, 8]].max() == 0


def test_samples_are_written_one_by_one_and_never_among_others(trained, tmp_path):
    folder = tmp_path / "png"
    argv = ["--num-samples", 3, "--save-dir", folder, "--npz", tmp_path / "s.npz"]
    assert show(trained, *argv)[0] == 0
    array = np.load(tmp_path / "s.npz")["arr_0"]
    pictures = [np.array(Image.open(folder / f"00000{i}.png")) for i in range(3)]
    assert array.dtype == np.uint8 and np.array_equal(np.stack(pictures), array)
    assert not (trained.folder / "samples.png").exists()
    code, _, err = show(trained, "--num-samples", 1, "--save-dir", folder)
    assert refused(code, err) and "not empty" in err


def test_a_trajectory_ends_in_the_sample_and_predicts_clean_images(trained, tmp_path):
    options = "--trajectory --classes 1 3 --seed 3 --cfg-scale 2 --guidance-high 0.9 --num-steps 9"
    strip, animation = tmp_path / "t.png", tmp_path / "t.gif"
    code, out, err = show(trained, *options.split(), "--output", strip)
    assert code == 0 and "t = 1.00 0.89" in out, err
    assert show(trained, *options.split(), "--output", animation)[0] == 0
    model, y, noise = ema_of(trained), torch.tensor([1, 3]), start(range(2), seed=3)
    last = repa_mini.to_pixels(sample_ode(model, noise, y, 9, cfg_scale=2.0, guidance_high=0.9))
    cells = grid_cells(strip, columns=8).unflatten(0, (2, 2, 8))  # class, kind, time
    assert same_pixels(cells[:, 0, 0], repa_mini.to_pixels(noise))
    assert same_pixels(cells[:, 0, -1], last) and same_pixels(cells[:, 1, -1], last)
    x, t = noise, 1.0
    for column, scale in ((0, 1), (1, 2.0)):  # t = 1 lies above the interval, 8/9 in it
        v = repa_mini.guided_velocity(model, x, t, y, scale)
        alpha, sigma, d_alpha, d_sigma = at(t, "cosine")
        eps = (d_alpha * x - alpha * v) / (d_alpha * sigma - alpha * d_sigma)
        clean = (x - sigma * eps) / alpha if alpha > 0.1 else v / d_alpha
        assert same_pixels(cells[:, 1, column], repa_mini.to_pixels(clean))
        x, t = x - v / 9, 8 / 9
    with Image.open(animation) as frames:
        assert frames.n_frames == 10 and frames.size == (2 + 2 * 34, 2 + 2 * 34)


def test_the_alignment_picture_shows_tokens_and_their_cosines(trained, photos, tmp_path):
    path = tmp_path / "alignment.png"
    code, out, err = show(trained, "--alignment", "--num-samples", 2, "--output", path)
    assert code == 0, err
    picture = pil_to_tensor(Image.open(path))[0].double() / 255
    assert picture.shape == (2 + 66 * 6, 2 + 66 * 6)  # clean and five times; three rows each
    x = repa_mini.to_unit(repa_mini.load_data(photos)[2][[0, 19]])
    model, z = ema_of(trained), TargetEncoder("test_vit", 4, pretrained=False)(x)
    printed = [float(word) for word in re.findall(r"(-?[0-9.]+) at t", out)]
    for i, t in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
        alpha, sigma, _, _ = at(t, "cosine")
        x_t, null = alpha * x + sigma * start(range(2)), torch.tensor([4, 4])
        cosine = F.cosine_similarity(model(x_t, torch.full((2,), t), null)[1], z, dim=-1)
        assert close(printed[i], cosine.mean(), 2e-3)
        left = 2 + 66 * (i + 1)
        greys = picture[2 + 66 * 2 : 66 * 3, left : left + 64][8::16, 8::16]  # first image, row 3
        assert close(greys.flatten(), cosine[0].clamp(0, 1), 0.01)


def test_equal_directions_have_equal_colours():
    torch.manual_seed(0)
    targets = F.normalize(torch.randn(2, 16, 12) * 3.0 ** -torch.arange(12), dim=-1)  # clear axes
    colours = sample.pca_colours(targets, 3 * targets, targets.flip(1))
    assert close(colours[0], colours[1], 1e-6) and close(colours[0].flip(1), colours[2], 1e-6)
    assert colours[0].min() == 0 and colours[0].max() == 1
    for i in range(3):  # the largest components are the first channels
        pair = torch.stack([colours[0][..., i].flatten(), targets[..., i].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.9


CKNNA = {(40, 16, 24, 5): 0.688997824777114, (64, 8, 32, 10): 0.4237325717766288}  # n, da, db, k


@pytest.mark.parametrize("sizes", CKNNA)
def test_cknna_is_that_of_the_platonic_representation_hypothesis(sizes):
    n, da, db, k = sizes
    a = wave((n, da), 1.1)
    b = a @ wave((da, db), 0.6) + 0.3 * wave((n, db), 2.3)
    assert close(sample.cknna(a, b, k), CKNNA[sizes], 1e-6)
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
    code, out, err = show(trained, "--cknna", "--topk", 3, "--num-samples", 10, "--output", path)
    assert code == 0 and "10 held-out images, 3 neighbours" in out, err
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["1", "2", "3"] and len(rows[0]) == 11
    _, _, images, labels, _ = repa_mini.load_data(photos)
    chosen = torch.linspace(0, 19, 10).long()
    x, model = repa_mini.to_unit(images[chosen]), ema_of(trained)
    z = TargetEncoder("test_vit", 4, pretrained=False)(x).mean(1)
    alpha, sigma, _, _ = at(0.5, "cosine")
    x_t, states = alpha * x + sigma * start(range(10)), []
    model.blocks[1].register_forward_hook(lambda block, _, out: states.append(out.mean(1)))
    model(x_t, torch.full((10,), 0.5), torch.full((10,), 4))
    expected = sample.cknna(states[0], z, 3), sample.knn_accuracy(states[0], labels[chosen], 3)
    assert close([float(rows[1][f"{kind} t=0.5"]) for kind in ("cknna", "knn")], expected, 2e-3)


def test_frechet_distance_is_the_closed_form_and_zero_for_equal_sets():
    torch.manual_seed(0)
    a = torch.randn(500, 6).double() @ torch.randn(6, 6).double()
    b = torch.randn(500, 6).double() * torch.arange(1, 7) + 2
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.var(0) + b.var(0)).sum()
    assert close(sample.frechet_distance(a, b), expected - 2 * roots.sum(), 1e-6)
    few = torch.randn(10, 64)  # fewer samples than dimensions
    assert close(sample.frechet_distance(few, few + 1), 64, 1e-4)
    with pytest.raises(UserError, match="give 2 or more"):
        sample.frechet_distance(few[:1], few)


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_frechet_distance_is_appended_to_a_table(trained, photos, tmp_path, split):
    path = tmp_path / "fd.csv"
    folder = photos if split == "val" else photos / "train"  # that has no splits of its own
    options = f"--fd --num-samples 6 --split {split} --grid-size 6 --cfg-scale 2 --data {folder}"
    options += f" --output {path}"
    fake = samples_of(trained, tmp_path / "s.npz", options)
    assert show(trained, *options.split(), "--seed", 1, "--heun", "--num-steps", 3)[0] == 0
    with open(path, newline="") as file:
        first, second = csv.DictReader(file)
    encoder = TargetEncoder("test_vit", 6, pretrained=False)
    real = repa_mini.load_data(folder)[2 if split == "val" else 0]
    a, b = [encoder.model(encoder.preprocess(repa_mini.to_unit(images))) for images in (fake, real)]
    distance = float(first.pop("distance"))
    assert distance == pytest.approx(sample.frechet_distance(a, b), rel=1e-3)
    expected = dict(step="40", encoder="test_vit", samples="6", images=str(len(real)), split=split)
    expected.update(sampler="ode", steps="2", guidance="2.0 in 0.0 to 1.0", seed="0")
    assert first == expected
    assert [second[name] for name in ("sampler", "steps", "seed")] == ["heun", "3", "1"]


SAMPLE_MISTAKES = {
    "--classes 4": "give 0 to 3",
    "--guidance-low 0.8 --guidance-high 0.2": "0 <= --guidance-low <= --guidance-high <= 1",
    "--cfg-scale nan": "give a number",
    "--encoder test_vit2 --alignment --encoder-weights nowhere.pth": "nowhere.pth",
    "--fd --num-samples 1 --output a.csv": "give 2 or more",
    "--output nowhere/samples.png": "nowhere/samples.png",
    "--npz samples.png": "a .npz file in a folder that is there",
    "--trajectory --npz a.npz": "are for samples",
    "--trajectory --mode sde": "leave out --mode sde",
    "--trajectory --heun": "leave out --heun",
    "--fd --cknna": "not allowed with",
    "--ckpt absent.pt": "absent.pt",
}


@pytest.mark.parametrize("mistake", SAMPLE_MISTAKES)
def test_a_mistake_in_sampling_is_told(trained, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    code, _, err = show(trained, *mistake.split())
    assert refused(code, err) and SAMPLE_MISTAKES[mistake] in err, err
    assert not list(tmp_path.iterdir())


def test_what_a_run_cannot_show_is_told(train, tmp_path):
    run = train("--proj-coeff 0 --cfg-prob 0 --max-train-steps 1")
    assert "--cfg-prob above 0" in show(run, "--cfg-scale", 2)[2]
    assert "vanilla run" in show(run, "--alignment")[2]
    code, _, err = show(run, "--cknna", "--topk", 3, "--output", tmp_path / "t.csv")
    assert code == 0, err  # needs no projector, and no null label


# ---- 13. The README
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_commands_of_the_readme_run_as_a_user_types_them(tmp_path):
    argv = [sys.executable, HERE / "repa_mini.py", "--smoke", "--max-train-steps", "3"]
    argv += ["--batch-size", "4", "--model", "SiT-Ti/8"]  # to be quicker
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", folder.name) and folder.name in done.stdout
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint.pt", "metrics.csv", "samples_0000003.png"]
    assert Image.open(folder / names[2]).size == (342, 342)
    state = repa_mini.load_checkpoint(folder / "checkpoint.pt")
    assert state["config"]["encoder"] == "test_vit" and state["data"]["images"] == 4000


def test_the_readme_names_functions_and_options_that_exist():
    named = re.findall(r"`(repa_mini|sample)\.(?!py\b)([A-Za-z_]\w*)", README)
    assert len(named) >= 10
    for module, name in named:
        assert hasattr({"repa_mini": repa_mini, "sample": sample}[module], name), name
    known = "".join(call(module.main, ["--help"])[1] for module in (repa_mini, sample))
    foreign = {"--gpu", "--fid", "--input1", "--input2", "--legacy", "--weighting"}  # of others
    for option in set(re.findall(r"(?<![-\w])--[a-z][a-z0-9-]*", README)) - foreign:
        assert option in known, option


def section(words):
    """The README from the heading that contains `words` on, up to the next of its level."""
    match = re.search(rf"^(#+) [^\n]*{words}.*?(?=^\1 |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match, f"the README has no heading with {words}"
    return match[0]


def moved_by(loss, model):
    """The names of the parameters whose gradient is not zero."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_one_batch_step_by_step():
    code = re.search(r"```python\n(.*?)```", section("One batch"), re.DOTALL)[1]
    left = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, left)
    step, model = SimpleNamespace(**left), left["model"]
    assert step.x.shape == (64, 3, 32, 32) and step.z.shape == step.z_tilde.shape == (64, 64, 64)
    assert not step.v_theta.any()  # so the loss is that of the answer zero
    assert close(step.velocity_loss, (step.noise - step.x).square().mean(), 1e-6)
    assert step.velocity_loss.item() == pytest.approx(1 + step.x.square().mean().item(), rel=0.05)
    assert -0.15 < -step.projection_loss < 0.15
    final_layer = {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert moved_by(step.velocity_loss, model) == final_layer
    gates = {f"blocks.{i}.adaLN_modulation.1" for i in range(model.encoder_depth)}
    layers = {"projectors.0.0", "projectors.0.2", "projectors.0.4", "x_embedder.proj", *gates}
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert moved_by(step.projection_loss, model) == expected
    for gate in gates:  # rows: shift, scale, gate of the attention, then of the MLP
        rows = model.get_submodule(gate).weight.grad.chunk(6)
        assert [bool(part.any()) for part in rows] == [False, False, True] * 2


def test_the_exercises_apply_and_train(photos, tmp_path):
    """Lines with - or a space are the old text, with + or a space the new; ... parts the hunks."""
    blocks = re.findall(r"```diff\n(.*?)```", section("Exercises"), re.DOTALL)
    assert len(blocks) >= 3
    for number, block in enumerate(blocks):
        source = (HERE / "repa_mini.py").read_text(encoding="utf-8")
        for hunk in re.split(r"^ ?\.\.\.\n", block, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        path = tmp_path / f"exercise_{number}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.SIT_MODELS["SiT-Ti/8"] = TI_8
        argv = [*COMMON.split(), "--data", photos, "--output-dir", tmp_path / path.stem]
        code, _, err = call(module.main, [*argv, "--max-train-steps", 2, "--device", "cpu"])
        assert code == 0, err
