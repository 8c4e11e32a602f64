"""Statements about the method and the program, checked: the method first, then a run, then faults.

Reference numbers come from the methods' own code, on weights and inputs of `wave` and `fill`: SiT,
losses, interpolant and samplers from the REPA authors' repository (sihyun-yu/REPA, commit 67f7145),
the DINOv2 tokens from facebookresearch/dinov2 (b8931f7) with REPA's preprocessing.
"""

import contextlib
import copy
import csv
import functools
import io
import itertools
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

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

    no_network = Mock(side_effect=ConnectionError("no network"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", create_small)
        patch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
        patch.setattr("urllib.request.urlopen", no_network)
        patch.setitem(SIT_MODELS, "SiT-Ti/8", TI_8)
        yield


def wave(shape, w, phase=0.0):
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(w * numbers + phase).reshape(shape).float()


def fill(state):
    filled = {}
    for k, name in enumerate(sorted(state), start=1):
        p = state[name]
        scale = 0.1 if p.ndim < 2 else 1 / math.sqrt(p[0].numel())
        filled[name] = scale * wave(p.shape, 1.7, 0.37 * k)
    return filled


def close(a, b, tolerance=1e-5):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and (a - b).abs().max() <= tolerance


def same_state(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- 1. SiT
def test_initialisation_tensor_by_tensor():
    """Zeros for adaLN-Zero and biases, std 0.02 for embeddings, Xavier-uniform elsewhere."""
    sizes = dict(hidden_size=256, depth=2, num_heads=4, encoder_depth=1, num_classes=100)
    torch.manual_seed(0)
    vanilla = SiT(**sizes, z_dim=0).state_dict()
    torch.manual_seed(0)
    model = SiT(**sizes, z_dim=128, projector_dim=512)
    assert not model.pos_embed.requires_grad
    assert same_state(vanilla, model.state_dict())  # whatever needs no projector
    for name, p in model.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert not p.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert abs(p.std() / 0.02 - 1) < 0.03 and p.abs().max() > 0.06, name  # normal
        elif name != "pos_embed":  # patches of 2 * 2 * 3 numbers go through a linear layer
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert abs(p.std() / (bound / math.sqrt(3)) - 1) < 0.03, name  # uniform


LAYERS = """x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 projectors.0.0 projectors.0.2
projectors.0.4 blocks.0.attn.qkv blocks.0.attn.proj blocks.0.mlp.fc1 blocks.0.mlp.fc2
blocks.0.adaLN_modulation.1 final_layer.linear final_layer.adaLN_modulation.1"""
SIZES = {  # of the authors' models: parameters (4 channels, 1000 classes), heads, encoder depth
    "SiT-S/2": (39515664, 6, 4),  # theirs with decoder_hidden_size=384
    "SiT-B/4": (137771328, 12, 4),
    "SiT-L/2": (465955600, 16, 8),
    "SiT-XL/2": (683242512, 16, 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_state_dict_has_the_authors_keys_and_sizes(name):
    size = SIT_MODELS[name]
    with torch.device("meta"):
        model = SiT(**size, in_channels=4, num_classes=1000, z_dim=768)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, size["num_heads"], size["encoder_depth"]) == SIZES[name]
    assert model.x_embedder.proj.weight.ndim == 4  # a convolution
    expected = {"pos_embed", LABELS}
    for layer in LAYERS.split():
        expected.update([f"{layer}.weight", f"{layer}.bias"])
    assert expected == {k for k in model.state_dict() if not re.match(r"blocks\.[1-9]", k)}


# With the authors' SiT in evaluation mode (theirs drops labels in training) and their SILoss, in
# whose place of random numbers t and the noise were put: the norms of the gradients of loss.mean()
# + 0.5 proj_loss.mean(), and sum(p * wave(p.shape, 0.3)) of the parameters after
# clip_grad_norm_(1.0) and a step of AdamW(lr=1e-3, weight_decay=0).
def test_velocities_losses_gradients_and_an_optimizer_step_are_the_authors():
    norms_and_sums = {
        "x_embedder.proj.weight": (0.5325303, 0.0643542),
        LABELS: (0.1036428, 0.1028783),
        "final_layer.linear.weight": (1.3880530, 0.0032076),
        "projectors.0.2.weight": (0.0017798, 0.0153498),
    }
    model = SiT(**TINY, input_size=8)
    state = model.state_dict()
    model.load_state_dict({**fill(state), "pos_embed": state["pos_embed"]})
    x, noise = wave((2, 3, 8, 8), 0.9), wave((2, 3, 8, 8), 0.7, 0.2)
    t, y = torch.tensor([0.3, 0.85]), torch.tensor([3, 10])  # 10 is the null label
    random_state = torch.get_rng_state()
    v, z_tilde = model(x, t, y)
    assert torch.equal(random_state, torch.get_rng_state())
    assert close(v.flatten()[:4], [-0.3123258, -0.2891413, 0.0982973, 0.1745056])
    assert close(v.flatten()[-4:], [0.0577936, 0.0222462, 0.7612500, 0.6756787])
    assert close(v.mean(), 0.1155190) and close(v.std(), 0.4264541)
    assert close(z_tilde[0, 0, :4], [0.1501603, 0.0130920, -0.2238826, 0.1810051])
    assert close(z_tilde.mean(), 0.0068759) and close(z_tilde.std(), 0.1421358)
    z = wave((2, 16, 20), 1.3, 0.4)
    velocity_loss, repa_loss = repa_mini.training_losses(model, x, noise, t, y, z)
    assert close(velocity_loss, 0.9749852) and close(repa_loss, -0.0045037)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
    (velocity_loss + 0.5 * repa_loss).backward()
    for name, (norm, _) in norms_and_sums.items():
        assert close(model.get_parameter(name).grad.norm(), norm), name
    assert close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), 1.8357975)
    optimizer.step()
    for name, (_, after) in norms_and_sums.items():
        p = model.get_parameter(name)
        assert close((p * wave(p.shape, 0.3)).sum(), after), name


# ---- 2. Targets
FIT = "test_vit3 vit_small_patch14_reg4_dinov2 vit_base_patch16_siglip_224 test_resnet test_nfnet "
FIT += "eva02_tiny_patch14_224 convnext_atto mobilenetv3_small_050 test_mambaout sam2_hiera_tiny"
UNFIT = "nonsense levit_128 vit_tiny_patch16_224.x inception_v3 swin_tiny_patch4_window7_224"


def test_dinov2_tokens_are_the_dinov2_authors_and_frozen():
    encoder = TargetEncoder(DINOV2, 16, "random")
    encoder.model.load_state_dict(fill(encoder.model.state_dict()))
    images = ((wave((2, 3, 32, 32), 0.013) + 1) * 127.5).round().requires_grad_()
    z = encoder(images / 127.5 - 1)
    assert z.shape == (2, 256, 32) and encoder.embed_dim == 32
    assert close(z[0, 0, :4], [0.0468843, 0.0420644, 0.1103932, 0.0460610])
    assert close(z[-1, -1, -4:], [0.0163876, 0.1133859, -0.0425858, 0.1057935])
    assert close([z.mean(), z.std()], [0.0490329, 0.0930159])
    assert not z.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.model.modules())


def test_the_encoders_position_table_is_resampled_as_by_the_authors():
    table = TargetEncoder(DINOV2, 37, "random").model.pos_embed  # the grid of its training
    resampled = TargetEncoder(DINOV2, 16, "random").model.pos_embed
    square = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)  # without the class token
    square = F.interpolate(square, (16, 16), mode="bicubic", antialias=True)
    assert close(resampled[:, 1:], square.flatten(2).transpose(1, 2), 1e-7)


def test_cnn_targets_are_the_map_at_stride_16_row_by_row():
    encoder = TargetEncoder("tf_efficientnet_lite0", 2, "random")
    x = torch.rand(2, 3, 32, 32) * 2 - 1  # already of the right size, and with mean and std 1/2
    maps = encoder.model.forward_intermediates(x, intermediates_only=True)
    assert encoder.embed_dim == 112 and maps[3].shape == (2, 112, 2, 2)
    assert close(encoder(x)[:, 1], maps[3][:, :, 0, 1])  # token 1 is row 0, column 1
    encoder.grid_size = 3  # no stage has a map of this size
    with pytest.raises(UserError, match="^this encoder has no feature map"):
        with repa_mini.as_user_error("which lets a UserError pass"):
            encoder(x)


@pytest.mark.parametrize("name", FIT.split())
def test_an_encoder_gives_one_token_for_each_patch_and_random_weights_are_the_same(name):
    random_state = torch.get_rng_state()
    encoder, again = TargetEncoder(name, 4, "random"), TargetEncoder(name, 4, "random")
    assert torch.equal(random_state, torch.get_rng_state())
    assert same_state(encoder.state_dict(), again.state_dict())
    z = encoder(torch.rand(2, 3, 32, 32))
    assert z.shape == (2, 16, encoder.embed_dim) and not torch.equal(z[0], z[1])


@pytest.mark.parametrize("name", UNFIT.split())
def test_an_encoder_without_such_tokens_or_a_network_is_refused(name):
    with pytest.raises(UserError, match=f"encoder {name} "):
        TargetEncoder(name, 4, "random")
    with pytest.raises(UserError, match="encoder test_vit .*no network"):
        TargetEncoder("test_vit", 4)  # a download is the default


@pytest.mark.parametrize("name", [DINOV2, "test_efficientnet"])
def test_a_file_of_weights_is_loaded_to_the_last_bit_or_refused(tmp_path, name):
    weights = timm.create_model(name).state_dict()
    for p in weights.values():
        p.copy_(torch.rand(p.shape))
    path, safe = tmp_path / "weights.pth", tmp_path / "weights.safetensors"
    more = {"mask_token": torch.zeros(1, 32)} if name == DINOV2 else {}  # its authors' file has it
    torch.save({**weights, **more}, path)
    save_file(weights, safe)
    for file in (path, safe):
        assert same_state(TargetEncoder(name, 37, str(file)).model.state_dict(), weights)
    key, value = weights.popitem()
    misshapen, extra = torch.zeros(7), torch.zeros(3)
    for wrong in ({}, {key: misshapen}, {key: value, key + ".x": extra}):
        torch.save({"model": {**weights, **wrong}}, path)
        with pytest.raises(UserError, match=f"encoder {name} .*weights.pth.*{key}") as error:
            TargetEncoder(name, 37, str(path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    torch.save({}, path)
    with pytest.raises(UserError, match=f"encoder {name} .*weights.pth.*Missing"):
        TargetEncoder(name, 37, str(path))


# ---- 3. Losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-6, 1.0, 6e4])  # in float16 the square of 6e4 overflows
def test_repa_loss_is_the_authors_whatever_the_length_of_a_token(dtype, length):
    z_tilde, z = wave((3, 5, 7), 1.3, 0.4), wave((3, 5, 7), 0.7)
    assert close(repa_mini.repa_loss(z_tilde, z), 0.011408185623404515, 1e-7)
    z_tilde, z = (length * z_tilde).to(dtype), z.to(dtype)
    exact = -F.cosine_similarity(z_tilde.double(), z.double(), dim=-1).mean()
    for loss in (repa_mini.repa_loss(z_tilde, z), repa_mini.repa_loss(z, z_tilde)):
        assert loss.dtype == torch.float32 and close(loss, exact, 1e-6)


def test_the_interpolant_is_the_authors():
    """alpha, sigma and their derivatives."""
    times = torch.tensor([0.25, 0.9])
    linear = [[0.75, 0.1], [0.25, 0.9], [-1, -1], [1, 1]]
    cosine = [[0.92388, 0.15643], [0.38268, 0.98769], [-0.60112, -1.55146], [1.45123, 0.24573]]
    assert close(torch.stack(interpolant(times, "linear")), linear)
    assert close(torch.stack(interpolant(times, "cosine")), cosine)
    with pytest.raises((AssertionError, UserError)):
        interpolant(times, "spiral")


# ---- 4. Samplers
class Field:
    """A model of velocity tanh(x) (1 + t) + 0.1 c: c is y + 1 for a class, 0 for the null label."""

    num_classes = 10

    def __call__(self, x, t, y):
        t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)
        return torch.tanh(x) * (1 + t) + 0.1 * torch.where(y == 10, 0, y + 1), None


GUIDED = dict(cfg_scale=2.5, guidance_low=0.25, guidance_high=0.75)  # both ends are steps
SAMPLES = {  # the first numbers of the authors' samplers, with `wave` for the noise of the SDE
    "Euler": (dict(), [-0.0574911, 0.0811571, 0.1542285]),
    "Heun": (dict(heun=True), [-0.0560972, 0.1136588, 0.1962683]),
    "guidance": (dict(cfg_scale=2.5), [-0.1439568, -0.0068599, 0.0635406]),
    "interval": (dict(heun=True, **GUIDED), [-0.1110910, 0.0579281, 0.1390977]),
    "SDE": (GUIDED, [-0.0738071, 0.4429615, 0.3995771]),
    "SDE, cosine": (dict(path_type="cosine"), [-0.0586881, 0.8385161, 0.7792003]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_the_authors(name, monkeypatch):
    options, expected = SAMPLES[name]
    noise, y = wave((2, 1, 2, 2), 0.8), torch.tensor([0, 2])
    if name.startswith("SDE"):
        monkeypatch.setattr(torch, "randn", lambda shape, **options: wave(shape, 1.1))
        x = sample.sample_sde(Field(), noise, y, num_steps=6, **options)
    else:
        x = sample_ode(Field(), noise, y, num_steps=8, **options)
    assert close(x.flatten()[:3], expected, 1e-6)


def test_guidance_includes_the_ends_of_its_interval():
    noise, y = wave((1, 1, 2, 2), 0.8), torch.tensor([2])
    plain = sample_ode(Field(), noise, y, 50)
    for end in (0.2, 0.3, 0.6, 0.7, 0.9):  # a step starts at each of them
        options = dict(cfg_scale=3.0, guidance_low=end, guidance_high=end)
        assert not torch.equal(sample_ode(Field(), noise, y, 50, **options), plain), end


# ---- 5. Data
def test_built_in_shapes_have_their_hue_and_outline_and_never_repeat():
    images, labels = repa_mini.draw_shapes(200, seed=0)
    assert images.shape == (200, 3, 32, 32) and labels.tolist() == list(range(10)) * 20
    both = torch.cat([images, repa_mini.draw_shapes(200, seed=1)[0]])
    assert len(both.flatten(1).unique(dim=0)) == 400
    red, green, blue = images.double().sum((2, 3)).T
    hue = torch.atan2((green - blue) * math.sqrt(3) / 2, red - (green + blue) / 2)
    assert ((hue / math.tau * 10 - labels + 5) % 10 - 5).abs().max() < 0.2
    masks = images.amax(1).int() - images.amin(1).int() > 60  # coloured, not grey
    sides = []  # width of the lowest row by height, which falls with the number of corners
    for widths in masks.sum(2):
        widths = widths[widths > 0]
        sides.append(widths[-2] / len(widths))
    expected = [1.08, 1.01, 0.71, 0.67, 0.59, 0.58, 0.55, 0.53, 0.52, 0.54]
    assert close(torch.stack(sides).view(20, 10).mean(0), expected, 0.06)


def test_pixels_and_the_unit_interval_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(repa_mini.to_pixels(repa_mini.to_unit(pixels)), pixels)
    assert repa_mini.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("size", [(96, 32), (32, 64), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "turned", "transparent"])
def test_images_of_any_kind_are_cropped_at_their_centre(tmp_path, mode, size):
    image, exif = to_pil_image(torch.rand(3, size[1], size[0])), Image.Exif()
    if mode in ("L", "LA", "P"):
        image = image.convert(mode)
    seen = image.convert("RGB")
    if mode == "turned":  # by a quarter, which its orientation says
        exif[0x0112] = 6
        seen = seen.transpose(Image.Transpose.ROTATE_270)
    if mode == "transparent":
        image.putalpha(0)
        seen = Image.new("RGB", size, "white")
    image.save(tmp_path / "0.png", exif=exif)
    centre = ImageOps.fit(seen, (32, 32), Image.Resampling.BICUBIC)
    assert close(repa_mini.read_image(tmp_path / "0.png"), pil_to_tensor(centre), 1)


def write_images(folder, images, labels, classes="abcdefghij"):
    """FOLDER/<class>/<number>.png from uint8 images."""
    for i, image in enumerate(images):
        path = Path(folder, classes[labels[i]], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)


def check_split(data, images, labels, held_out, classes="abcdefghij"):
    """load_data gave these images and labels, of which some are held out."""
    expected = images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    assert all(torch.equal(a, b) for a, b in zip(data, expected))
    assert data[4] == list(classes)


def test_the_images_in_test_or_val_are_held_out(tmp_path, capsys):
    images, labels = repa_mini.draw_shapes(100, seed=0)
    labels, order = labels.sort(stable=True)  # as they lie on the disk
    images, is_odd = images[order], torch.arange(100) % 2 == 1
    for name in ("test", "val"):
        folder = tmp_path / name
        write_images(folder / "train", images[::2], labels[::2])
        write_images(folder / name, images[1::2], labels[1::2])
        check_split(repa_mini.load_data(str(folder)), images, labels, is_odd)
    assert "files" not in capsys.readouterr().out
    (folder / "train" / "a" / "more").mkdir()
    (folder / "train" / "a" / "more" / "notes.txt").write_text("no image")
    check_split(repa_mini.load_data(str(folder)), images, labels, is_odd)
    assert f"{folder / 'train'}: 1 of 51 files are skipped" in capsys.readouterr().out


def test_a_data_folder_without_what_it_needs_is_refused(tmp_path):
    folder, images = tmp_path / "data", repa_mini.draw_shapes(3, seed=0)[0]

    def is_told(word):
        return word in call(repa_mini.main, f"{COMMON} --data {folder}").mistake

    folder.mkdir()
    assert is_told(str(folder / "train"))
    write_images(folder / "train", images, [0, 1, 2])
    assert is_told(str(folder / "val"))  # there is neither this nor test/
    write_images(folder / "test", images[:2], [0, 1])
    assert is_told(f"{folder} differ: ['a', 'b', 'c'] to train on, but ['a', 'b'] held out")
    write_images(folder / "test", images, [0, 1, 2])
    broken = folder / "test" / "c" / "002.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert is_told(str(broken))
    (folder / "train" / "nobody").mkdir()
    assert is_told("nobody")  # a class without an image


def test_cifar10_is_downloaded_or_missed_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="CIFAR-10.* --data FOLDER or --smoke .*no network"):
        repa_mini.load_data("cifar10")
    images, labels = repa_mini.draw_shapes(60, seed=0)

    class SmallCIFAR10(CIFAR10):
        classes = list("abcdefghij")
        target_transform = None

        def __init__(self, root, train=True, transform=None, download=False):
            chosen = slice(50) if train else slice(50, 60)
            self.data = images[chosen].permute(0, 2, 3, 1).numpy()
            self.targets = labels[chosen].tolist()
            self.transform = transform

    monkeypatch.setattr(repa_mini, "CIFAR10", SmallCIFAR10)
    check_split(repa_mini.load_data("cifar10"), images, labels, torch.arange(60) >= 50)


# ---- 6. The random numbers of a step
def drawn(step, seed=0):
    """draw_batch of 40 of the built-in images; the null label is 10."""
    args = SimpleNamespace(seed=seed, batch_size=16, cfg_prob=0.3)
    return repa_mini.draw_batch(*repa_mini.draw_shapes(40, seed=0), 10, step, args)


def test_a_batch_is_what_its_index_and_labels_say_and_differs_by_step_and_seed():
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
    assert all(torch.equal(a, b) for a, b in zip(drawn(3), batches[3]))
    batches = [*batches[2:5], drawn(3, seed=1), drawn(3, seed=2**24), drawn(3, seed=2**32)]
    for a, b in itertools.combinations(batches, 2):
        assert not any(torch.equal(p, q) for p, q in zip(a, b))


# ---- 7. A run
COMMON = "--smoke --model SiT-Ti/8 --max-train-steps 4 --learning-rate 1e-3 --eval-every 1"
OTHER = "--seed 7 --proj-coeff 2 --learning-rate 3e-3 --cfg-prob 0.5 --path-type cosine"
ARMS = ["", OTHER, "--proj-coeff 0", "--repa-stop-step 2", "--cache-targets"]
CACHED = "--cache-targets --repa-stop-step 4 --dtype float16 --seed 7"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """44 training and 20 held-out images of four classes, as PNGs."""
    folder = tmp_path_factory.mktemp("photos")
    for name, n, seed in (("train", 110, 0), ("test", 50, 1)):
        images, labels = repa_mini.draw_shapes(n, seed)
        write_images(folder / name, images[labels < 4], labels[labels < 4])
    return folder


def call(main, options):
    """main's exit code, what it printed, and the mistake of the user's that it told in one line."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(options.split())
        except SystemExit as stop:
            code = stop.code
    err = err.getvalue()
    if isinstance(code, str):  # Python prints it, and the exit code is 1
        code, err = 1, err + code + "\n"
    mistake = err.partition("error: ")[2]  # before it, argparse shows its usage
    if code not in (1, 2) or mistake.count("\n") != 1:
        mistake = ""
    return SimpleNamespace(code=code, out=out.getvalue(), err=err, mistake=mistake)


@pytest.fixture(scope="session")
def run_program(photos, tmp_path_factory):
    """run_program(options) is a new run, run_program(options, folder) resumes that in a folder."""

    def run(options="", folder=None):
        if folder is None:
            folder = tmp_path_factory.mktemp("run") / "run"
            options = f"{COMMON} --data {photos} --output-dir {folder} {options}"
        else:
            options = f"--resume {folder} {options}"
        done = call(repa_mini.main, options)
        done.folder, done.state, done.rows = folder, None, []
        if (folder / "checkpoint.pt").exists():
            done.state = repa_mini.load_checkpoint(folder)
            done.rows = done.state["rows"]
        return done

    return run


@pytest.fixture
def train(run_program, monkeypatch):
    """The same, but grids show noise, since to sample them would take most of the time."""
    monkeypatch.setattr(repa_mini, "sample_ode", lambda model, noise, *args, **options: noise)
    return run_program


@pytest.fixture(scope="session")
def finished(run_program):
    """A run of four steps with REPA. To be read, not written, like the next two."""
    return run_program()


@pytest.fixture(scope="session")
def trained(run_program):
    """A run whose model knows something, so that every option of sample.py changes its samples."""
    options = "--cfg-prob 0.3 --max-train-steps 40 --eval-every 40 --learning-rate 1e-2"
    return run_program(f"{options} --path-type cosine")


@pytest.fixture(scope="session")
def vanilla(run_program):
    """A run without a projector, whose labels were never dropped."""
    return run_program("--proj-coeff 0 --cfg-prob 0 --path-type cosine")


@pytest.mark.parametrize("options", ARMS)
def test_a_run_is_what_the_equations_say_after_every_step(train, monkeypatch, options):
    """The training loop a second time, in plain lines."""
    save, states = repa_mini.save, []

    def save_and_keep(folder, state):
        save(folder, state)
        states.append(copy.deepcopy(state))

    compute_targets = Mock(wraps=repa_mini.compute_targets)
    monkeypatch.setattr(repa_mini, "compute_targets", compute_targets)
    monkeypatch.setattr(repa_mini, "save", save_and_keep)
    if options == "--proj-coeff 0":
        monkeypatch.setattr(repa_mini, "TargetEncoder", None)
    assert train(f"{options} --encoder-depth 3").code == 0 and len(states) == 4
    args = SimpleNamespace(**states[0]["config"])
    assert compute_targets.called == bool(args.cache_targets)
    images, labels, _, _, _ = repa_mini.load_data(args.data)
    images, labels = torch.cat([images, images.flip(3)]), torch.cat([labels, labels])
    encoder, z_dim = TargetEncoder("test_vit", 4, "random"), 64 if args.proj_coeff else 0
    torch.manual_seed(repa_mini.seed_for("weights", args.seed))
    model = SiT(**{**TI_8, "encoder_depth": 3}, num_classes=4, z_dim=z_dim)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0)
    for step, state in enumerate(states):
        x, noise, t, y, _ = repa_mini.draw_batch(images, labels, 4, step, args)
        alpha, sigma, d_alpha, d_sigma = interpolant(t[:, None, None, None], args.path_type)
        v_theta, z_tilde = model(alpha * x + sigma * noise, t, y)
        loss = ((v_theta - d_alpha * x - d_sigma * noise) ** 2).mean()
        expected = {"step": step + 1, "velocity_loss": loss.item()}
        if args.proj_coeff and step < args.repa_stop_step:
            z = encoder(x)
            if args.cache_targets:
                z = z.half().float()
            repa_loss = -F.cosine_similarity(z, z_tilde, dim=2).mean()
            expected["repa_loss"] = repa_loss.item()
            loss = loss + args.proj_coeff * repa_loss
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        expected["grad_norm"] = math.sqrt(sum(grad.square().sum() for grad in grads))
        for grad in grads:
            grad /= max(1.0, expected["grad_norm"])
        optimizer.step()
        decay = (1 + step) / (10 + step)
        for average, p in zip(ema.parameters(), model.parameters()):
            average.copy_(decay * average + (1 - decay) * p.detach())
        logged = state["rows"][-1]
        held_out = {k: logged.pop(k) for k in list(logged) if k.startswith("val")}
        assert len(held_out) == (2 if z_dim else 1) and state["step"] == step + 1
        assert logged == pytest.approx(expected, rel=2e-4, abs=2e-6)
        torch.testing.assert_close(state["model"], model.state_dict(), rtol=0, atol=3e-5)
        torch.testing.assert_close(state["ema"], ema.state_dict(), rtol=0, atol=3e-5)


def test_the_decay_of_the_moving_average_has_a_cap():
    ema, model = torch.nn.ParameterList([torch.zeros(1)]), torch.nn.ParameterList([torch.ones(1)])
    repa_mini.update_ema(ema, model, 10**6)
    assert close(ema[0], [1e-4], 1e-6)


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


def shows(pixels, x):
    """Whether the pixels are those of x, to a grey level: sums may be taken in another order."""
    return close(pixels, repa_mini.to_pixels(x), 1)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_the_held_out_losses_are_those_of_the_ema(train, monkeypatch, path_type):
    """On at most 1,000 images, here every second of 1,250."""
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
    assert sizes == [100] * 6 + [25]  # so that what trains can also be evaluated


def test_the_losses_fall_and_the_alignment_rises(train):
    run = train("--max-train-steps 60 --eval-every 20 --learning-rate 1e-2")
    first, last = run.rows[0], run.rows[-1]
    assert last["velocity_loss"] < 0.95 * first["velocity_loss"] < 1.2  # from 1.4
    assert last["repa_loss"] < first["repa_loss"] - 0.1 < -0.6  # from 0
    assert last["val_velocity_loss"] < 1.1 and last["val_alignment"] > 0.8  # from 1.5 and 0


def table_of(path):
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_rows_are_means_since_the_last_row_and_grids_show_samples_of_the_ema(train, finished):
    run = train("--max-train-steps 3 --eval-every 2")
    first, second, third = finished.rows[:3]  # the same steps, one by one
    for name in ("velocity_loss", "repa_loss", "grad_norm"):
        assert run.rows[0][name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-6)
    assert run.rows[0]["val_velocity_loss"] == second["val_velocity_loss"]
    assert run.rows[1:] == [third] and table_of(run.folder / "metrics.csv") == run.rows
    pictures = sorted(path.name for path in run.folder.glob("*.png"))
    assert pictures == ["samples_0000002.png", "samples_0000003.png"]
    y = torch.arange(4).repeat_interleave(10)  # one class a row
    noise = torch.randn(40, 3, 32, 32, generator=seeded("grid"))
    cells = grid_cells(finished.folder / "samples_0000004.png", columns=10)
    assert shows(cells, sample_ode(ema_of(finished), noise, y, 50))


# ---- 8. Precision, compilation, device
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_close_to_float32_and_a_run_may_change_it(train, finished, dtype):
    run = train(f"--dtype {dtype}")
    assert all(p.dtype == torch.float32 for p in run.state["model"].values())
    for ours, exact in zip(run.rows[1:], finished.rows[1:]):  # the first velocity is zero
        for name in ("velocity_loss", "val_velocity_loss"):
            assert ours[name] == pytest.approx(exact[name], rel=1e-3)
            assert ours[name] != exact[name]
    run = train("--max-train-steps 5 --dtype float32", run.folder)
    assert run.code == 0 and not run.state["scaler"]
    run = train(f"--max-train-steps 6 --dtype {dtype}", run.folder)
    assert run.code == 0 and bool(run.state["scaler"]) == (dtype == "float16")


def test_under_fp16_a_step_that_overflows_is_skipped(train, monkeypatch):
    """The first scale is far too large, the second is 2^10."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-50)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run = train("--dtype float16 --eval-every 2")
    assert run.state["scaler"]["scale"] == 2.0**10
    assert {state["step"].item() for state in run.state["optimizer"]["state"].values()} == {3}
    assert all(row["grad_norm"] < 10 for row in run.rows)  # unscaled, without the skipped step


def test_a_compiled_run_is_the_uncompiled_one(train, monkeypatch):
    """aot_eager splits forward and backward as on CUDA, but needs no compiler."""
    graphs = []

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = functools.partialmethod(nn.Module.compile, backend=compile_graph)
    monkeypatch.setattr(SiT, "compile", compiled)
    plain = train("--max-train-steps 2").state["model"]
    assert not graphs
    state = train("--max-train-steps 2 --compile").state["model"]
    assert graphs and list(state) == list(plain)
    assert all(close(state[name], plain[name]) for name in plain)


# ---- 9. Stopped, killed, resumed
def check_same(run, other):
    """Two finished runs have left the same, to the last bit."""
    assert run.code == other.code == 0 and run.rows == other.rows, run.err + other.err
    for part in ("model", "ema", "scaler"):
        torch.testing.assert_close(run.state[part], other.state[part], rtol=0, atol=0)
    moments = [state["optimizer"]["state"] for state in (run.state, other.state)]
    torch.testing.assert_close(*moments, rtol=0, atol=0)
    names = sorted(path.name for path in run.folder.iterdir())
    assert names == sorted(path.name for path in other.folder.iterdir())
    for name in names[1:]:  # the first is checkpoint.pt
        assert (run.folder / name).read_bytes() == (other.folder / name).read_bytes()


@pytest.mark.parametrize("options", ["", "--proj-coeff 0", CACHED])
def test_a_run_stopped_again_and_again_equals_an_uninterrupted_one(train, monkeypatch, options):
    """By Ctrl-C in the step that is named, or killed between a save and its rename."""
    options += " --max-train-steps 7 --eval-every 3"
    whole = train(options)
    draw_batch, rename, stops = repa_mini.draw_batch, Path.replace, [4]

    def interrupted_draw(*args):
        if args[3] in stops:  # the step
            raise KeyboardInterrupt
        return draw_batch(*args)

    def interrupted_rename(path, target):
        if "rename" in stops:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(repa_mini, "draw_batch", interrupted_draw)
    monkeypatch.setattr(Path, "replace", interrupted_rename)
    run = train(options)
    assert run.code == 1 and "stopped; --resume" in run.err and run.state["step"] == 3
    for stop, saved in (("rename", 3), (6, 6), ("rename", 6)):
        stops[:] = [stop]
        run = train("", run.folder)
        assert (run.code, run.state["step"]) == (1, saved)
    stops.clear()
    check_same(train("", run.folder), whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["checkpoint.part", "metrics.csv", "samples_0000002.png"])
def test_on_a_full_disk_a_run_goes_on_but_its_last_save_has_to_work(train, name):
    folder = train("--max-train-steps 1").folder
    paths = [folder / name, folder / name.replace("2", "3")]
    for path in paths:
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")
    run = train("--max-train-steps 3", folder)
    assert run.out.count("cannot save or draw") == 2  # after steps 2 and 3
    assert "No space left" in run.mistake or "cannot write" in run.mistake
    for path in paths:
        path.unlink(missing_ok=True)
    run = train("--max-train-steps 4", folder)
    assert run.code == 0 and [row["step"] for row in run.rows] == [1, 2, 3, 4]


def test_an_option_is_typed_else_the_checkpoints_else_smokes_else_the_papers(finished):
    def parsed(options):
        args, _ = repa_mini.parse_options(options.split())
        return args

    args, smoke = parsed(""), parsed("--smoke --learning-rate 5e-2")
    assert (args.data, args.model, args.path_type) == ("cifar10", "SiT-S/2", "linear")
    assert (args.encoder, args.encoder_weights) == (DINOV2, "download")
    assert (args.encoder_depth, args.proj_coeff, args.cfg_prob) == (4, 0.5, 0.1)
    assert (args.batch_size, args.learning_rate) == (256, 1e-4)
    assert (args.max_train_steps, args.eval_every) == (100_000, 1000)
    assert (smoke.learning_rate, smoke.max_train_steps) == (5e-2, 200)
    args = parsed(f"--resume {finished.folder} --smoke --max-train-steps 9")
    assert (args.learning_rate, args.max_train_steps) == (1e-3, 9)


def test_what_is_typed_on_resume_takes_effect(train, monkeypatch, tmp_path):
    run = train("--cache-targets --max-train-steps 1")
    folder = run.folder.rename(tmp_path / "moved")
    monkeypatch.setattr(repa_mini, "compute_targets", None)  # the cache may no longer be made
    options = "--no-cache-targets --learning-rate 5e-2 --max-train-steps 2 --repa-stop-step 1"
    after = train(options, folder)
    assert after.code == 0 and "repa_loss" not in after.rows[1]
    weight = "blocks.0.mlp.fc1.weight"  # a step of AdamW is about as long as its learning rate
    assert (after.state["model"][weight] - run.state["model"][weight]).abs().max() > 1e-2
    again = train("", folder)
    assert "the run is finished, at step 2" in again.err
    check_same(again, after)
    monkeypatch.chdir(folder)
    call(repa_mini.main, "--resume checkpoint.pt --max-train-steps 3")
    assert repa_mini.load_checkpoint(folder)["step"] == 3


# ---- 10. Numbers that are not finite, files that are no checkpoint
def test_numbers_that_are_not_finite_are_not_saved_and_the_advice_helps(train):
    folder = train("--max-train-steps 2").folder
    run = train("--max-train-steps 6 --learning-rate 1e30 --eval-every 4", folder)
    assert (
        "the held-out loss is not finite" in run.mistake
        and "smaller --learning-rate" in run.mistake
    )
    assert "--resume" in run.mistake and run.state["step"] == 2
    run = train("--max-train-steps 6 --learning-rate 1e-4", folder)
    assert run.code == 0 and [row["step"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    run = train("--learning-rate 1e30 --eval-every 4")
    assert "start again" in run.mistake and not run.rows
    same_folder = f"--output-dir {run.folder}"
    assert train(same_folder).code == 0  # the folder holds no run yet
    assert f"--resume {run.folder}" in train(same_folder).mistake


@pytest.mark.parametrize("kind", ["truncated", "text", "code", "a missing key"])
def test_a_file_of_another_kind_is_refused_and_not_executed(finished, monkeypatch, tmp_path, kind):
    class Trap:  # a pickle that creates a file when it is opened without care
        def __reduce__(self):
            return open, ("executed", "w")

    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "checkpoint.pt", dict(finished.state)
    if kind == "a missing key":
        del content["classes"]
    if kind == "code":
        content["rows"] = Trap()
    torch.save(content, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    if kind == "text":
        path.write_text("not a checkpoint")
    assert f"cannot load {path}" in call(repa_mini.main, f"--resume {tmp_path}").mistake
    with pytest.raises(UserError, match="encoder test_vit .*checkpoint.pt"):
        TargetEncoder("test_vit", 4, str(path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("options", ["--model SiT-S/8", "--proj-coeff 0", "--data shapes"])
def test_a_checkpoint_of_another_model_is_refused(train, finished, options):
    run = train(f"{options} --max-train-steps 5", finished.folder)
    assert "does not fit --model" in run.mistake and run.state["step"] == 4


# ---- 11. Mistakes on the command line, and what is printed
MISTAKES = {  # and what the sentence says
    "--model SiT-M/2": "invalid choice: 'SiT-M/2'",
    "--encoder-depth 4": "the blocks 1 to 3",
    "--encoder-depth 0": "the blocks 1 to 3",
    "--encoder-weights nowhere.pth": "nowhere.pth",
    "--data nowhere": "nowhere",
    "--device cuda:99": "device cuda:99 does not work here; try --device cpu",
    "--enc vit_tiny_patch16_224": "unrecognized arguments",  # not taken for --encoder
    "--resume x": "not allowed with argument --output-dir",
    "--data=": "empty",
    "--output-dir=": "empty",
    "--batch-size 0": "below 1",
    "--max-train-steps 0": "below 1",
    "--eval-every 0": "below 1",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_told_before_a_folder_is_made(train, options):
    run = train(options)
    assert MISTAKES[options] in run.mistake and not run.folder.exists()


def test_a_full_memory_is_told_but_a_mistake_of_ours_is_a_traceback(train, monkeypatch):
    draw_batch = Mock(side_effect=torch.OutOfMemoryError("tried to allocate 80 GiB"))
    monkeypatch.setattr(repa_mini, "draw_batch", draw_batch)
    assert "--batch-size" in train().mistake
    draw_batch.side_effect = AttributeError
    with pytest.raises(AttributeError):
        train()


def test_a_resumed_run_counts_on_from_its_checkpoint(train, finished, tmp_path, monkeypatch):
    progress = Mock(side_effect=lambda steps, *words, **options: steps)
    monkeypatch.setattr(repa_mini, "progress", progress)
    torch.save({**finished.state, "step": 99_999}, tmp_path / "checkpoint.pt")
    run = train("--max-train-steps 100000", tmp_path)
    assert progress.call_args.kwargs == dict(initial=99_999, total=100_000)
    assert "step 100000: " in run.out and run.rows[-1]["step"] == 100_000


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
def show(run, options):
    return call(sample.main, f"--ckpt {run.folder} --device cpu {options}")


def start(numbers, seed=0):
    """The noise that the images of these numbers start from."""
    noise = [torch.randn(3, 32, 32, generator=seeded("sample", seed, i)) for i in numbers]
    return torch.stack(noise)


def held_out(run, n, t):
    """n of the 20 held-out images of a run, their labels, and x_t on the cosine path."""
    _, _, images, labels, _ = repa_mini.load_data(run.state["config"]["data"])
    chosen = torch.linspace(0, 19, n).long()
    x = repa_mini.to_unit(images[chosen])
    alpha, sigma, _, _ = interpolant(torch.tensor(t), "cosine")
    return x, labels[chosen], alpha * x + sigma * start(range(n))


OPTIONS = {  # options of sample.py, and the same in Python
    "": dict(),
    "--batch-size 4": dict(),
    "--heun --num-steps 3": dict(heun=True, num_steps=3),
    "--cfg-scale 3": dict(cfg_scale=3.0),
    "--cfg-scale 3 --guidance-high 0.7": dict(cfg_scale=3.0, guidance_high=0.7),
    "--cfg-scale 3 --guidance-low 0.7": dict(cfg_scale=3.0, guidance_low=0.7),
    "--seed 5": dict(noise=start(range(6), seed=5)),
    "--classes 3 1": dict(y=torch.tensor([3, 1] * 3)),
    "--mode sde": dict(),
    "--mode sde --cfg-scale 2 --num-steps 4": dict(cfg_scale=2, num_steps=4),
}


def samples_of(run, path, options):
    done = show(run, f"--num-samples 6 --npz {path} --num-steps 2 {options}")
    assert done.code == 0, done.err
    return torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_of_the_samplers_does_what_it_does_in_python(trained, tmp_path, options):
    model, usual = ema_of(trained), dict(noise=start(range(6)), y=torch.arange(6) % 4, num_steps=2)
    changed = {**usual, **OPTIONS[options]}
    if "sde" in options:
        changed.update(path_type="cosine", generator=seeded("sde", 0, 0))
        x = sample.sample_sde(model, **changed)
    else:
        x = sample_ode(model, **changed)
    pixels = samples_of(trained, tmp_path / "s.npz", options)
    assert shows(pixels, x)
    assert shows(pixels, sample_ode(model, **usual)) == (options in ("", "--batch-size 4"))


def test_batches_of_the_sde_differ_and_samples_are_in_float32(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "starting_noise", lambda seed, n: torch.zeros(len(n), 3, 32, 32))
    options = "--mode sde --batch-size 3 --classes 1"
    images = samples_of(trained, tmp_path / "a.npz", options)
    assert not close(images[:3], images[3:], 1)
    exact = samples_of(trained, tmp_path / "b.npz", f"{options} --dtype float32")
    half = samples_of(trained, tmp_path / "c.npz", f"{options} --dtype bfloat16")
    assert torch.equal(images, exact) and not torch.equal(images, half)


def test_samples_are_written_as_a_grid_and_one_by_one_and_never_among_others(trained, tmp_path):
    options = f"--output {tmp_path}/grid.png --save-dir {tmp_path}/png --npz {tmp_path}/s.npz"
    options += " --classes 2 0 3 --num-samples 7 --num-steps 2"
    assert "classes: 0 a, 1 b, 2 c, 3 d" in show(trained, options).err
    y = torch.tensor([2, 0, 3, 2, 0, 3, 2])
    x = sample_ode(ema_of(trained), start(range(7)), y, 2)
    cells = grid_cells(tmp_path / "grid.png", columns=3)  # one class a row
    assert shows(cells[[0, 3, 6, 1, 4, 7, 2]], x) and not cells[[5, 8]].any()
    pictures = [np.array(Image.open(tmp_path / "png" / f"00000{i}.png")) for i in range(7)]
    assert np.array_equal(np.stack(pictures), np.load(tmp_path / "s.npz")["arr_0"])
    assert shows(torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2), x)
    assert not list(trained.folder.glob("samples.*"))
    assert "not empty" in show(trained, f"--save-dir {tmp_path}/png").mistake


def test_a_trajectory_ends_in_the_sample_and_predicts_clean_images(trained, tmp_path):
    options = "--trajectory --classes 1 3 --seed 3 --cfg-scale 3 --guidance-high 0.5 --num-steps 9"
    done = show(trained, f"{options} --output {tmp_path}/t.png")
    assert "t = 1.00, 0.89" in done.out
    model, y, x = ema_of(trained), torch.tensor([1, 3]), start(range(2), seed=3)
    cells = grid_cells(tmp_path / "t.png", columns=8).unflatten(0, (2, 2, 8))  # class, kind, time
    assert shows(cells[:, 0, 0], x)
    last = sample_ode(model, x, y, 9, cfg_scale=3.0, guidance_high=0.5)
    assert shows(cells[:, 0, -1], last) and shows(cells[:, 1, -1], last)
    x = x - repa_mini.guided_velocity(model, x, 1.0, y) / 9  # not guided yet
    v = repa_mini.guided_velocity(model, x, 8 / 9, y)
    alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(8 / 9), "cosine")
    assert shows(cells[:, 1, 1], (d_sigma * x - sigma * v) / (alpha * d_sigma - d_alpha * sigma))
    show(trained, f"{options} --output {tmp_path}/t.gif")
    with Image.open(tmp_path / "t.gif") as frames:
        assert frames.n_frames == 10 and frames.size == (2 + 2 * 34, 2 + 2 * 34)


def test_losses_by_noise_level_are_those_of_all_images_at_once(trained, vanilla, monkeypatch):
    """150 images go through in two batches. A run without a projector has no alignment."""
    images, labels = repa_mini.draw_shapes(150, seed=1)
    x, y, noise = repa_mini.to_unit(images), labels % 4, start(range(150))
    monkeypatch.setattr(repa_mini, "load_data", lambda name: (None, None, images, y, None))
    model, z = ema_of(trained), TargetEncoder("test_vit", 4, "random")(x)
    show(trained, "--losses")
    rows = table_of(trained.folder / "losses.csv")
    assert close([row["t"] for row in rows], (torch.arange(10) + 0.5) / 10)
    for row in rows:
        t = torch.full((150,), row["t"])
        losses = repa_mini.training_losses(model, x, noise, t, y, z, "cosine")
        assert close([row["velocity_loss"], -row["alignment"]], losses, 3e-5)
    show(vanilla, "--losses")
    assert list(table_of(vanilla.folder / "losses.csv")[0]) == ["t", "velocity_loss"]


def test_the_alignment_picture_shows_tokens_and_their_cosines(trained):
    done = show(trained, "--alignment --num-samples 2")
    picture = pil_to_tensor(Image.open(trained.folder / "alignment.png")).double() / 255
    assert picture.shape == (3, 2 + 66 * 6, 2 + 66 * 6)  # clean and five times; three rows each
    printed = [float(word) for word in done.out.partition("mean cosine: ")[2].split(",")]
    model, encoder = ema_of(trained), TargetEncoder("test_vit", 4, "random")
    for i, t in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
        x, _, x_t = held_out(trained, 2, t)
        z, z_tilde = encoder(x), model(x_t, torch.full((2,), t), torch.tensor([4, 4]))[1]
        cosine = F.cosine_similarity(z_tilde, z, dim=-1)
        assert close(printed[i], cosine.mean(), 1e-3)
        left = 2 + 66 * (i + 1)
        rows = picture[:, 2:200, left : left + 64].unflatten(1, (3, 66))[:, :, :64]  # 1st image
        assert close(rows[:, 0, ::2, ::2], (x_t[0] / 2 + 0.5).clamp(0, 1), 0.01)
        colours = sample.pca_colours(z, z_tilde)[1][0].unflatten(0, (4, 4))
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


@pytest.mark.parametrize("k, expected", [(5, 0.688997824777), (10, 0.423732571777)])
def test_cknna_is_that_of_the_platonic_representation_hypothesis(k, expected):
    n, da, db = (40, 16, 24) if k == 5 else (64, 8, 32)
    a = wave((n, da), 1.1)
    b = a @ wave((da, db), 0.6) + 0.3 * wave((n, db), 2.3)
    assert close(sample.cknna(a, b, k), expected)
    assert close(sample.cknna(3 * a, a), 1, 1e-4)
    for few, topk in ((3, 2), (10, 1), (10, 10)):
        with pytest.raises(UserError, match="CKNNA"):
            sample.cknna(a[:few], b[:few], topk)


def test_neighbours_vote_with_their_cosine_and_nobody_for_himself():
    pairs = torch.eye(50).repeat_interleave(2, dim=0)  # of different classes: always wrong
    assert sample.knn_accuracy(pairs, torch.arange(100) % 2, topk=1) == 0
    angles = torch.tensor([0.0, 0.1, 1.2, 1.2])  # one near neighbour beats two distant ones
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert sample.knn_accuracy(features, torch.tensor([1, 1, 0, 0]), topk=3) == 1


def test_the_cknna_table_is_that_of_the_hidden_states(trained):
    show(trained, "--cknna --topk 3 --num-samples 10")
    rows = table_of(trained.folder / "cknna.csv")
    assert [row["block"] for row in rows] == [1, 2, 3] and len(rows[0]) == 11
    (x, labels, x_t), model, states = held_out(trained, 10, 0.5), ema_of(trained), []
    z = TargetEncoder("test_vit", 4, "random")(x).mean(1)
    model.blocks[1].register_forward_hook(lambda block, _, out: states.append(out.mean(1)))
    model(x_t, torch.full((10,), 0.5), torch.full((10,), 4))
    assert close(rows[1]["cknna t=0.5"], sample.cknna(states[0], z, 3), 2e-5)
    assert close(rows[1]["knn t=0.5"], sample.knn_accuracy(states[0], labels, 3), 2e-5)


def test_the_encoder_is_the_runs_unless_another_is_typed(trained, tmp_path, monkeypatch):
    config = {**trained.state["config"], "encoder_weights": "RUNS"}
    torch.save({**trained.state, "config": config}, tmp_path / "checkpoint.pt")
    encoder = Mock(side_effect=UserError("no encoder"))
    monkeypatch.setattr(repa_mini, "TargetEncoder", encoder)

    def asked_for(options):
        done = call(sample.main, f"--ckpt {tmp_path} --device cpu {options}")
        assert "no encoder" in done.mistake
        return encoder.call_args.args

    assert asked_for("--alignment") == ("test_vit", 4, "RUNS")
    assert asked_for("--cknna --encoder test_vit2") == ("test_vit2", 4, "download")
    assert asked_for("--cknna --encoder-weights w.pth") == ("test_vit", 4, "w.pth")
    options = "--cknna --encoder test_vit2 --encoder-weights w.pth"
    assert asked_for(options) == ("test_vit2", 4, "w.pth")


SAMPLE_MISTAKES = {
    "--classes 4": "not all among 0 a, 1 b, 2 c, 3 d",
    "--guidance-low 0.8 --guidance-high 0.2": "0 <= --guidance-low <= --guidance-high <= 1",
    "--num-steps 0": "below 1",
    "--cfg-scale nan": "--cfg-scale is finite",
    "--cfg-scale 2": "--cfg-prob above 0",
    "--alignment": "no projector",
    "--cknna --topk 30": "CKNNA needs",
    "--output nowhere/samples.png": "nowhere/samples.png",
    "--output samples.gif": "does not end in .png",
    "--npz samples.png": "does not end in .npz",
    "--mode sde --heun": "leave one out",
    "--losses --cknna": "not allowed with",
    "--ckpt absent.pt": "absent.pt",
    "--heun --cknna": "does not use --heun",
    "--topk 3": "does not use --topk",
    "--trajectory --npz a.npz": "does not use --npz",
    "--seed 0 --losses": "does not use --seed",  # also if it is the default
    "--alignment --encoder test_vit": "does not use --encoder",
}


@pytest.mark.parametrize("options", SAMPLE_MISTAKES)
def test_a_mistake_in_sampling_is_told(vanilla, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repa_mini, "guided_velocity", None)  # it is found out before
    assert SAMPLE_MISTAKES[options] in show(vanilla, options).mistake
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_a_default_name_is_new(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(trained.state, "checkpoint.pt")
    for name in ("samples.png", "samples-2.png", "samples-3.png"):
        assert call(sample.main, "--ckpt checkpoint.pt --device cpu --num-steps 1").code == 0
        assert Path(name).stat().st_size > 100
    Path("a.npz").write_text("precious")
    monkeypatch.setattr(repa_mini, "guided_velocity", None)
    for option in ("--output samples.png", "--npz a.npz"):
        assert "already exists" in show(trained, option).mistake
    assert Path("a.npz").read_text() == "precious"


@pytest.mark.parametrize("part, wrong", [("ema", {"pos_embed": 3}), ("sit", {"colour": "red"})])
def test_a_checkpoint_that_does_not_fit_is_told(trained, tmp_path, part, wrong):
    state = {**trained.state, part: {**trained.state[part], **wrong}}
    torch.save(state, tmp_path / "checkpoint.pt")
    done = call(sample.main, f"--ckpt {tmp_path} --device cpu --num-steps 1")
    assert str(tmp_path) in done.mistake and len(done.err) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_help_and_what_is_printed_suit_an_ascii_terminal(trained, tmp_path, monkeypatch):
    """Class names go to stderr, where Python escapes what the terminal cannot show."""
    torch.save({**trained.state, "classes": ["caf\u00e9", *"bcd"]}, tmp_path / "checkpoint.pt")
    done = call(sample.main, f"--ckpt {tmp_path} --device cpu --num-steps 1")
    assert done.code == 0 and done.out.isascii() and "0 caf" in done.err
    monkeypatch.setattr(sys, "argv", ["sample.py", "--help"])
    done = call(lambda words: runpy.run_path(sample.__file__, run_name="__main__"), "")
    assert done.out.isascii() and "--ckpt" in done.out


# ---- 13. The README and its exercises
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_functions_and_options_that_exist():
    named = re.findall(r"`(repa_mini|sample)\.(?!py\b)([A-Za-z_]\w*)", README)
    assert len(named) >= 10
    for module, name in named:
        assert hasattr({"repa_mini": repa_mini, "sample": sample}[module], name), name
    known = call(repa_mini.main, "--help").out + call(sample.main, "--help").out
    foreign = {"--gpu", "--fid", "--input1", "--input2"}  # of torch-fidelity
    for option in set(re.findall(r"(?<![-\w])--[a-z][a-z0-9-]*", README)) - foreign:
        assert option in known, option


def test_one_batch_step_by_step():
    code = re.search(r"```python\n(.*?)```", README[README.index("## One batch") :], re.DOTALL)[1]
    left = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, left)
    step = SimpleNamespace(**left)
    assert step.z.shape == step.z_tilde.shape == (64, 64, 64)
    assert not step.v_theta.any()  # so the loss is that of the answer zero
    assert close(step.velocity_loss, (step.noise - step.x).square().mean(), 1e-5)
    assert -0.2 < -step.projection_loss < 0.2


@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("assets/exercises/*.diff")))
def test_an_exercise_applies_and_trains(tmp_path, photos, name):
    path = HERE / "assets" / "exercises" / f"{name}.diff"
    assert len(path.read_text().splitlines()) <= 25
    shutil.copy(HERE / "repa_mini.py", tmp_path)
    subprocess.run(["git", "apply", "-v", path], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "repa_mini.py").read_text() != (HERE / "repa_mini.py").read_text()
    program = runpy.run_path(str(tmp_path / "repa_mini.py"))
    program["SIT_MODELS"]["SiT-Ti/8"] = TI_8
    options = f"--data {photos} --output-dir {tmp_path}/run --max-train-steps 2 --batch-size 4"
    run = call(program["main"], f"{COMMON} {options}")
    assert run.code == 0, run.err
