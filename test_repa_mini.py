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
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch.optim import AdamW
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import repa_mini
import sample
from repa_mini import SiT, TargetEncoder, UserError, draw_shapes, interpolant, sample_ode
from sample import starting_noise

torch.set_num_threads(1)  # quick enough, also on a busy machine
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
        patch.setitem(repa_mini.SIT_MODELS, "SiT-Ti/8", TI_8)
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
    assert same_state(vanilla, model.state_dict())  # whatever needs no projector
    for name, p in model.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert not p.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert abs(p.std() / 0.02 - 1) < 0.03 and p.abs().max() > 0.06, name  # normal
        elif name != "pos_embed":  # patches, too
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert abs(p.std() / (bound / math.sqrt(3)) - 1) < 0.03, name  # uniform


LAYERS = """x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 projectors.0.0 projectors.0.2
projectors.0.4 blocks.0.attn.qkv blocks.0.attn.proj blocks.0.mlp.fc1 blocks.0.mlp.fc2
blocks.0.adaLN_modulation.1 final_layer.linear final_layer.adaLN_modulation.1"""
SIZES = {  # the authors' parameters, heads and encoder depth
    "SiT-S/2": (39515664, 6, 4),  # theirs with decoder_hidden_size=384
    "SiT-B/4": (137771328, 12, 4),
    "SiT-L/2": (465955600, 16, 8),
    "SiT-XL/2": (683242512, 16, 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_state_dict_has_the_authors_keys_and_sizes(name):
    size = repa_mini.SIT_MODELS[name]
    with torch.device("meta"):
        model = SiT(**size, in_channels=4, num_classes=1000, z_dim=768)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, size["num_heads"], size["encoder_depth"]) == SIZES[name]
    assert model.x_embedder.proj.weight.ndim == 4  # a convolution
    expected = {"pos_embed", LABELS}
    for layer in LAYERS.split():
        expected.update([f"{layer}.weight", f"{layer}.bias"])
    assert expected == {k for k in model.state_dict() if not re.match(r"blocks\.[1-9]", k)}


# The numbers are those of the authors' SiT in evaluation mode (in training it drops labels) and of
# their SILoss, with this t and this noise instead of random ones.
def test_velocities_losses_and_gradients_are_the_authors():
    norms = {  # of some gradients
        "x_embedder.proj.weight": 0.5325303,
        LABELS: 0.1036428,
        "final_layer.linear.weight": 1.3880530,
        "projectors.0.2.weight": 0.0017798,
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
    assert close(v.flatten()[-4:], [0.0577936, 0.0222462, 0.7612500, 0.6756787], 2e-6)
    assert close(z_tilde[0, 0, :4], [0.1501603, 0.0130920, -0.2238826, 0.1810051])
    z = wave((2, 16, 20), 1.3, 0.4)
    velocity_loss, repa_loss = repa_mini.training_losses(model, x, noise, t, y, z)
    assert close(velocity_loss, 0.9749852) and close(repa_loss, -0.0045037)
    (velocity_loss + 0.5 * repa_loss).backward()
    for name, norm in norms.items():
        assert close(model.get_parameter(name).grad.norm(), norm), name
    assert close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), 1.8357975)


# ---- 2. Targets
FIT = """test_vit3 vit_small_patch14_reg4_dinov2 vit_base_patch16_siglip_224 test_resnet test_nfnet
eva02_tiny_patch14_224 sam2_hiera_tiny convnext_atto mobilenetv3_small_050 test_mambaout"""
UNFIT = "nonsense levit_128 vit_tiny_r_s16_p8_224 inception_v3 swin_tiny_patch4_window7_224"


def test_dinov2_tokens_are_the_dinov2_authors_and_frozen():
    encoder = TargetEncoder(DINOV2, 16, "random")
    table = TargetEncoder(DINOV2, 37, "random").model.pos_embed  # the grid of its training
    square = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)  # without the class token
    square = F.interpolate(square, (16, 16), mode="bicubic", antialias=True)
    assert close(encoder.model.pos_embed[:, 1:], square.flatten(2).transpose(1, 2), 1e-7)
    encoder.model.load_state_dict(fill(encoder.model.state_dict()))
    images = ((wave((2, 3, 32, 32), 0.013) + 1) * 127.5).round().requires_grad_()
    z = encoder(images / 127.5 - 1)
    assert close(z[0, 0, :4], [0.0468843, 0.0420644, 0.1103932, 0.0460610])
    assert close(z[-1, -1, -4:], [0.0163876, 0.1133859, -0.0425858, 0.1057935])
    assert not z.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.model.modules())


def test_cnn_targets_are_the_map_at_stride_16_row_by_row():
    encoder = TargetEncoder("tf_efficientnet_lite0", 2, "random")
    x = torch.rand(2, 3, 32, 32) * 2 - 1  # mean and std are 1/2
    maps = encoder.model.forward_intermediates(x, intermediates_only=True)
    assert encoder.embed_dim == 112 and maps[3].shape == (2, 112, 2, 2)
    assert close(encoder(x)[:, 1], maps[3][:, :, 0, 1])  # token 1 is row 0, column 1


@pytest.mark.parametrize("name", FIT.split())
def test_an_encoder_gives_one_token_for_each_patch(name):
    encoder = TargetEncoder(name, 4, "random")
    z = encoder(torch.rand(2, 3, 32, 32))
    assert same_state(encoder.state_dict(), TargetEncoder(name, 4, "random").state_dict())
    assert z.shape == (2, 16, encoder.embed_dim) and not torch.equal(z[0], z[1])


@pytest.mark.parametrize("name", UNFIT.split())
def test_any_other_encoder_is_refused(name):
    with pytest.raises(UserError, match=f"encoder {name} "):
        TargetEncoder(name, 8, "random")
    with pytest.raises(UserError, match="encoder test_vit .*no network"):
        TargetEncoder("test_vit", 4)  # a download is the default


@pytest.mark.parametrize("name", [DINOV2, "test_efficientnet"])
def test_a_file_of_weights_is_loaded_or_refused(tmp_path, name):
    weights = timm.create_model(name).state_dict()
    for p in weights.values():
        p.copy_(torch.rand(p.shape))
    path, safe = tmp_path / "weights.pth", tmp_path / "weights.safetensors"
    torch.save({**weights, "mask_token": torch.zeros(1, 32)}, path)  # as DINOv2's authors do
    save_file(weights, safe)
    for file in (path, safe):
        assert same_state(TargetEncoder(name, 37, str(file)).model.state_dict(), weights)
    key, value = weights.popitem()
    misshapen, extra = {key: torch.zeros(7)}, {key: value, key + ".x": torch.zeros(3)}
    for state in (weights, {**weights, **misshapen}, {**weights, **extra}, {}):
        torch.save({"model": state} if state else {}, path)
        match = f"encoder {name} .*weights.pth.*({key}|Missing)"
        with pytest.raises(UserError, match=match) as error:
            TargetEncoder(name, 37, str(path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ---- 3. Losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-6, 1.0, 6e4])  # the square of 6e4 overflows
def test_repa_loss_is_the_authors_for_any_length(dtype, length):
    z_tilde, z = wave((3, 5, 7), 1.3, 0.4), wave((3, 5, 7), 0.7)
    assert close(repa_mini.repa_loss(z_tilde, z), 0.011408185623404515, 1e-7)
    z_tilde, z = (length * z_tilde).to(dtype), z.to(dtype)
    exact = -F.cosine_similarity(z_tilde.double(), z.double(), dim=-1).mean()
    for loss in (repa_mini.repa_loss(z_tilde, z), repa_mini.repa_loss(z, z_tilde)):
        assert loss.dtype == torch.float32 and close(loss, exact, 1e-6)


def test_the_interpolant_is_the_authors():
    times = torch.tensor([0.25, 0.9])
    linear = [[0.75, 0.1], [0.25, 0.9], [-1, -1], [1, 1]]
    cosine = [[0.92388, 0.15643], [0.38268, 0.98769], [-0.60112, -1.55146], [1.45123, 0.24573]]
    assert close(torch.stack(interpolant(times, "linear")), linear)
    assert close(torch.stack(interpolant(times, "cosine")), cosine)
    with pytest.raises((AssertionError, UserError)):
        interpolant(times, "spiral")


# ---- 4. Samplers
def field(x, t, y):
    """A model of velocity tanh(x) (1 + t) + 0.1 c: c is y + 1 for a class, 0 for the null label."""
    t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)
    return torch.tanh(x) * (1 + t) + 0.1 * torch.where(y == 10, 0, y + 1), None


field.num_classes = 10
GUIDED = dict(cfg_scale=2.5, guidance_low=0.25, guidance_high=0.75)  # both ends are steps
SAMPLES = {  # the authors' first numbers
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
        x = sample.sample_sde(field, noise, y, num_steps=6, **options)
    else:
        x = sample_ode(field, noise, y, num_steps=8, **options)
    assert close(x.flatten()[:3], expected, 1e-6)


def test_guidance_includes_the_ends_of_its_interval():
    noise, y = wave((1, 1, 2, 2), 0.8), torch.tensor([2])
    plain = sample_ode(field, noise, y)  # in 50 steps
    for end in (0.2, 0.3, 0.6, 0.7, 0.9):  # a step starts at each of them
        options = dict(cfg_scale=3.0, guidance_low=end, guidance_high=end)
        assert not torch.equal(sample_ode(field, noise, y, **options), plain), end
    assert torch.equal(sample_ode(field, noise, y, 50), plain)


# ---- 5. Data
def test_shapes_have_their_hue_and_outline():
    images, labels, held_out, _, classes = repa_mini.load_data("shapes")
    assert images.shape == (4000, 3, 32, 32) and labels.tolist() == list(range(10)) * 400
    assert classes[0] == "3 corners" and len(classes) == 10
    assert len(torch.cat([images, held_out]).flatten(1).unique(dim=0)) == 4200  # none twice
    red, green, blue = images.double().sum((2, 3)).T
    hue = torch.atan2((green - blue) * math.sqrt(3) / 2, red - (green + blue) / 2)
    assert ((hue / math.tau * 10 - labels + 5) % 10 - 5).abs().max() < 0.2
    masks = images.amax(1).int() - images.amin(1).int() > 60  # coloured, not grey
    areas, heights = masks.sum((1, 2)), masks.any(2).sum(1)
    expected = [0.621, 1.002, 0.752, 0.865, 0.773, 0.829, 0.782, 0.811, 0.785, 0.803]
    assert close((areas / heights**2).view(400, 10).mean(0), expected, 0.005)  # a square has 1


@pytest.mark.parametrize("size", [(96, 32), (32, 64), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA"])
def test_images_are_turned_and_cropped(tmp_path, mode, size):
    image, exif = to_pil_image(torch.rand(3, size[1], size[0])).convert(mode), Image.Exif()
    seen = image.convert("RGB")
    if mode == "RGBA":  # all transparent
        image.putalpha(0)
        seen = Image.new("RGB", size, "white")
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "0.png", exif=exif)
    seen = seen.transpose(Image.Transpose.ROTATE_270)
    centre = ImageOps.fit(seen, (32, 32), Image.Resampling.BICUBIC)
    assert close(repa_mini.read_image(tmp_path / "0.png"), pil_to_tensor(centre), 1)


def write_images(folder, images, labels):
    for i, image in enumerate(images):
        path = Path(folder, "abcdefghij"[labels[i]], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)


def test_the_right_images_are_held_out(tmp_path, monkeypatch):
    images, labels = draw_shapes(100, seed=0)
    labels, order = labels.sort(stable=True)  # as they lie on the disk
    images, classes = images[order], list("abcdefghij")
    expected = images[::2], labels[::2], images[1::2], labels[1::2]
    for name in ("test", "val"):
        write_images(tmp_path / name / "train", images[::2], labels[::2])
        write_images(tmp_path / name / name, images[1::2], labels[1::2])
    (tmp_path / "val" / "train" / "a" / "notes.txt").write_text("no image")

    class SmallCIFAR10(list):
        def __init__(self, root, train, transform, download=False):
            self.classes = classes
            images, labels = expected[:2] if train else expected[2:]
            pictures = [transform(to_pil_image(image)) for image in images]
            super().__init__(zip(pictures, labels.tolist()))

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="CIFAR-10.* --data FOLDER or --smoke .*no network"):
        repa_mini.load_data("cifar10")
    monkeypatch.setattr(repa_mini, "CIFAR10", SmallCIFAR10)
    for name in ("test", "val", "cifar10"):
        *data, names = repa_mini.load_data(name)
        assert all(torch.equal(a, b) for a, b in zip(data, expected)) and names == classes


def test_a_wrong_data_folder_is_refused(tmp_path):
    folder, images = tmp_path / "data", draw_shapes(3, seed=0)[0]

    def is_told(word):
        return word in call(repa_mini.main, f"{COMMON} --data {folder}").mistake

    assert is_told(str(folder / "train"))
    write_images(folder / "train", images, [0, 1, 2])
    assert is_told(str(folder / "val"))  # there is neither this nor test/
    write_images(folder / "test", images[:2], [0, 1])
    assert is_told(f"{folder}: ['a', 'b', 'c'] to train on, but ['a', 'b'] held out")
    write_images(folder / "test", images, [0, 1, 2])
    broken = folder / "test" / "c" / "002.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert is_told(str(broken))
    (folder / "train" / "nobody").mkdir()
    assert is_told("nobody")  # a class without an image


# ---- 6. A run
def test_a_batch_follows_from_seed_and_step():
    (images, labels), batches = draw_shapes(40, seed=0), []
    uses = [(0, step) for step in range(60)] + [(1, 3), (2**24, 3), (2**32, 3), (0, 3)]
    for seed, step in uses:
        args = SimpleNamespace(seed=seed, batch_size=16, cfg_prob=0.3)
        batches.append(repa_mini.draw_batch(images, labels, 10, step, args))
    x, noise, t, y, index = [torch.cat(parts) for parts in zip(*batches[:60])]
    is_dropped, n = y == 10, len(y)
    assert torch.equal(x, images[index].float() / 127.5 - 1)
    assert torch.equal(y[~is_dropped], labels[index][~is_dropped])
    assert abs(is_dropped.float().mean() - 0.3) < 4 * math.sqrt(0.21 / n)
    uniform = (torch.arange(n) + 0.5) / n
    assert (t.sort().values - uniform).abs().max() < 1.4 / math.sqrt(n)  # Kolmogorov-Smirnov
    assert abs(noise.mean()) < 0.005 and abs(noise.std() - 1) < 0.005
    assert (index.bincount(minlength=40) - 24).abs().max() < 4 * math.sqrt(24)
    assert all(torch.equal(a, b) for a, b in zip(batches[3], batches[63]))
    for parts in zip(*batches[2:5], *batches[60:63]):  # no two of them are equal
        assert len(torch.stack(parts).flatten(1).unique(dim=0)) == 6


COMMON = "--smoke --model SiT-Ti/8 --max-train-steps 4 --learning-rate 1e-3 --eval-every 1"
OTHER = "--seed 7 --proj-coeff 2 --learning-rate 3e-3 --cfg-prob 0.5 --path-type cosine"
ARMS = {  # options, and the number of images in each call of the encoder
    OTHER: [1, 16, 20, 16, 20, 16, 20, 16, 20],  # a trial, then batch and evaluation
    "--proj-coeff 0": [],
    "--repa-stop-step 2": [1, 16, 20, 16, 20, 20, 20],
    "--cache-targets": [1, 100, 12, 20, 20, 20, 20],
}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """56 training and 20 held-out images of four classes, as PNGs."""
    folder = tmp_path_factory.mktemp("photos")
    for name, n, seed in (("train", 140, 0), ("test", 50, 1)):
        images, labels = draw_shapes(n, seed)
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
    told = re.search(r"error: (.*)\n\Z", err)  # before it, argparse shows its usage
    mistake = told[1] if told and code in (1, 2) else ""
    return SimpleNamespace(code=code, out=out.getvalue(), err=err, mistake=mistake)


@pytest.fixture(scope="session")
def train(photos, tmp_path_factory):
    """train(options) is a new run, train(options, folder) resumes one. Samples take one step."""

    def run(options="", folder=None):
        if folder is None:
            folder = tmp_path_factory.mktemp("run") / "run"
            options = f"{COMMON} --data {photos} --output-dir {folder} {options}"
        else:
            options = f"--resume {folder} {options}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repa_mini, "sample_ode", functools.partial(sample_ode, num_steps=1))
            done = call(repa_mini.main, options)
        done.folder, done.state, done.rows = folder, None, []
        if (folder / "checkpoint.pt").exists():
            done.state = repa_mini.load_checkpoint(folder)
            done.rows = done.state["metrics"]
        return done

    return run


@pytest.fixture(scope="session")
def finished(train):
    """A run of four steps with REPA. To be read, not written, like the next two."""
    return train()


@pytest.fixture(scope="session")
def trained(train):
    """A run whose model knows something, so that every option of sample.py changes its samples."""
    options = "--cfg-prob 0.3 --max-train-steps 40 --eval-every 20 --learning-rate 1e-2"
    run = train(f"{options} --path-type cosine")
    first, last = run.rows
    assert last["val_velocity_loss"] < first["val_velocity_loss"]
    assert last["val_alignment"] > first["val_alignment"] > 0.5  # it begins at 0
    return run


@pytest.fixture(scope="session")
def vanilla(train):
    """A run without a projector, whose labels were never dropped."""
    return train("--proj-coeff 0 --cfg-prob 0 --path-type cosine")


@pytest.fixture
def encoded(monkeypatch):
    """For each call of an encoder, the number of its images and whether autocast was on."""
    calls, forward = [], TargetEncoder.forward

    def noted_forward(encoder, images):
        calls.append((len(images), torch.is_autocast_enabled("cpu")))
        return forward(encoder, images)

    monkeypatch.setattr(TargetEncoder, "forward", noted_forward)
    return calls


@pytest.mark.parametrize("options", ARMS)
def test_a_run_is_what_the_equations_say(train, encoded, options):
    """The training loop a second time, in plain lines."""
    run = train(f"{options} --encoder-depth 3")
    assert encoded == [(n, False) for n in ARMS[options]]
    args = SimpleNamespace(**run.state["config"])
    images, labels, _, _, _ = repa_mini.load_data(args.data)
    images, labels = torch.cat([images, images.flip(3)]), torch.cat([labels, labels])
    encoder, z_dim = TargetEncoder("test_vit", 4, "random"), 64 if args.proj_coeff else 0
    torch.manual_seed(repa_mini.seed_for("weights", args.seed))
    model = SiT(**{**TI_8, "encoder_depth": 3}, num_classes=4, z_dim=z_dim)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = AdamW(model.parameters(), args.learning_rate, weight_decay=0, fused=True)
    for step in range(4):
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
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = (1 + step) / (10 + step)
        for average, p in zip(ema.parameters(), model.parameters()):
            average.copy_(decay * average + (1 - decay) * p.detach())
        logged = {k: v for k, v in run.rows[step].items() if not k.startswith("val")}
        assert logged == pytest.approx(expected, rel=2e-4, abs=2e-6)
    for part, ours in (("model", model), ("ema", ema), ("optimizer", optimizer)):
        torch.testing.assert_close(run.state[part], ours.state_dict(), rtol=0, atol=3e-5)


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
    return close(pixels, ((x + 1) * 127.5).clamp(0, 255), 0.6)  # rounded


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_held_out_losses_are_those_of_the_ema(train, encoded, monkeypatch, path_type):
    """In float32, on at most 1,000 images, here every second of 1,250, 100 at a time."""
    images, labels = draw_shapes(1250, seed=0)
    data = images[:20], labels[:20], images, labels, list("abcdefghij")
    monkeypatch.setattr(repa_mini, "load_data", lambda name: data)
    options = f"--path-type {path_type} --dtype bfloat16"
    run = train(f"{options} --learning-rate 1e-2 --max-train-steps 1")
    assert encoded[2:] == [(100, False)] * 6 + [(25, False)]  # after trial and batch
    x, y, model = repa_mini.to_unit(images[::2]), labels[::2], ema_of(run)
    g, z = seeded("evaluation"), TargetEncoder("test_vit", 4, "random")(x)
    noise, t = torch.randn(x.shape, generator=g), torch.rand(625, generator=g)
    a, b = repa_mini.training_losses(model, x, noise, t, y, z, path_type)
    assert close(run.rows[0]["val_velocity_loss"], a) and close(run.rows[0]["val_alignment"], -b)


def table_of(path):
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_rows_are_means_and_grids_are_samples(train, finished, trained):
    run = train("--max-train-steps 3 --eval-every 2")
    first, second, third = finished.rows[:3]  # the same steps, one by one
    for name in ("velocity_loss", "repa_loss"):
        assert close(run.rows[0][name], (first[name] + second[name]) / 2, 1e-6)
    assert run.rows[0]["val_velocity_loss"] == second["val_velocity_loss"]
    assert run.rows[1:] == [third] and table_of(run.folder / "metrics.csv") == run.rows
    assert len(list(run.folder.glob("samples_000000[23].png"))) == 2
    y = torch.arange(4).repeat_interleave(10)  # one class a row
    noise = torch.randn(40, 3, 32, 32, generator=seeded("grid"))
    cells = grid_cells(trained.folder / "samples_0000040.png", columns=10)
    assert shows(cells, sample_ode(ema_of(trained), noise, y, 1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_close_to_float32(train, finished, encoded, dtype):
    run = train(f"--dtype {dtype} --cache-targets")
    assert {n for n, is_autocast in encoded if is_autocast} == {100, 12}  # only cached targets
    assert all(p.dtype == torch.float32 for p in run.state["model"].values())
    for ours, exact in zip(run.rows[1:], finished.rows[1:]):  # row 0 is equal
        assert 0 < abs(ours["velocity_loss"] - exact["velocity_loss"]) < 1e-3
        assert close(ours["val_velocity_loss"], exact["val_velocity_loss"], 1e-3)
    means = [some.state["optimizer"]["state"][1]["exp_avg"] for some in (run, finished)]
    assert close(means[0].norm() / means[1].norm(), 1, 0.01)  # unscaled
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
    assert run.state["optimizer"]["state"][1]["step"] == 3


def test_a_compiled_run_is_the_uncompiled_one(train, monkeypatch):
    """aot_eager splits forward and backward as on CUDA, but needs no compiler."""
    compiled = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(SiT, "compile", compiled)
    plain = train("--max-train-steps 2").state["model"]
    assert not torch._dynamo.utils.counters["stats"]
    state = train("--max-train-steps 2 --compile").state["model"]
    assert torch._dynamo.utils.counters["stats"] and list(state) == list(plain)
    assert all(close(state[name], plain[name]) for name in plain)


# ---- 7. Stopped, killed, resumed
@pytest.mark.parametrize("options", ["", "--proj-coeff 0", "--cache-targets --dtype float16"])
def test_a_stopped_run_equals_a_whole_one(train, monkeypatch, options):
    """By Ctrl-C in a step, or killed between a save and its rename."""
    options += " --seed 7 --eval-every 3 --max-train-steps"
    whole, folder = train(f"{options} 7"), train(f"{options} 3").folder
    steps, rename = "repa_mini.update_ema", "pathlib.Path.replace"
    for name, calls, last_saved in ((steps, 1, 3), (rename, 0, 3), (steps, 3, 6)):
        effects = [DEFAULT] * calls + [KeyboardInterrupt]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(name, Mock(wraps=repa_mini.update_ema, side_effect=effects))
            train("--max-train-steps 7", folder)
        assert repa_mini.load_checkpoint(folder)["step"] == last_saved
    run = train("--max-train-steps 7", folder)
    assert run.code == 0 and run.rows == whole.rows
    for part in ("model", "ema", "optimizer", "scaler"):
        torch.testing.assert_close(run.state[part], whole.state[part], rtol=0, atol=0)
    assert len(list(folder.iterdir())) == len(list(whole.folder.iterdir()))
    for path in whole.folder.glob("[!c]*"):  # all but checkpoint.pt
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["checkpoint.part", "metrics.csv", "samples_0000002.png"])
def test_a_run_goes_on_although_the_disk_is_full(train, name):
    folder = train("--max-train-steps 1").folder
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/full")
    run = train("--max-train-steps 3", folder)
    assert run.code == 0 and re.search("cannot save or draw: .*(No space|cannot write)", run.out)
    (folder / name).unlink()
    run = train("--max-train-steps 4", folder)
    assert run.code == 0 and [row["step"] for row in run.rows] == [1, 2, 3, 4]


def test_which_value_of_an_option_wins(finished):
    expected = dict(data="cifar10", model="SiT-S/2", path_type="linear", encoder=DINOV2)
    expected.update(encoder_weights="download", encoder_depth=4, proj_coeff=0.5, cfg_prob=0.1)
    expected.update(batch_size=256, learning_rate=1e-4, max_train_steps=100_000, eval_every=1000)
    args, _ = repa_mini.parse_options([])
    assert expected.items() <= vars(args).items()
    args, _ = repa_mini.parse_options("--smoke --learning-rate 5e-2".split())
    assert (args.learning_rate, args.max_train_steps) == (5e-2, 200)
    options = f"--resume {finished.folder} --smoke --max-train-steps 9"
    args, _ = repa_mini.parse_options(options.split())
    assert (args.learning_rate, args.max_train_steps) == (1e-3, 9)


def test_what_is_typed_on_resume_takes_effect(train, monkeypatch, tmp_path):
    folder = train("--cache-targets --repa-stop-step 0").folder.rename(tmp_path / "moved")
    options = "--no-cache-targets --learning-rate 5e-2 --max-train-steps 5 --repa-stop-step 5"
    after = train(options, folder)
    assert after.code == 0 and ["repa_loss" in row for row in after.rows] == 4 * [False] + [True]
    assert not after.state["config"]["cache_targets"]
    assert after.state["optimizer"]["param_groups"][0]["lr"] == 5e-2
    again = train("", folder)
    assert again.code == 0 and "the run is finished" in again.err and again.rows == after.rows
    monkeypatch.chdir(folder)
    call(repa_mini.main, "--resume checkpoint.pt --max-train-steps 6")
    assert repa_mini.load_checkpoint(folder)["step"] == 6


def test_infinite_numbers_are_not_saved(train):
    folder = train("--max-train-steps 2").folder
    run = train("--max-train-steps 6 --learning-rate 1e30 --eval-every 4", folder)
    assert "loss is not finite; --resume the run, or start again, with a smaller" in run.mistake
    run = train("--max-train-steps 6 --learning-rate 1e-4", folder)
    assert run.code == 0 and [row["step"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    run = train("--learning-rate 1e30 --eval-every 4")
    assert "is not finite" in run.mistake and not run.rows
    same_folder = f"--output-dir {run.folder}"
    assert train(same_folder).code == 0  # the folder holds no run yet
    assert f"{run.folder} holds a run; --resume" in train(same_folder).mistake


@pytest.mark.parametrize("kind", ["truncated", "code", "a missing key"])
def test_a_strange_file_is_refused(finished, monkeypatch, tmp_path, kind):
    class Trap:  # opened without care, it creates a file
        def __reduce__(self):
            return open, ("executed", "w")

    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "checkpoint.pt", dict(finished.state)
    if kind == "a missing key":
        del content["classes"]
    if kind == "code":
        content["metrics"] = Trap()
    torch.save(content, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    assert f"cannot load {path}" in call(repa_mini.main, f"--resume {tmp_path}").mistake
    with pytest.raises(UserError, match="encoder test_vit .*checkpoint.pt"):
        TargetEncoder("test_vit", 4, str(path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("options", ["--model SiT-S/8", "--proj-coeff 0", "--data shapes"])
def test_a_checkpoint_of_another_model_is_refused(train, finished, options):
    run = train(f"{options} --max-train-steps 5", finished.folder)
    assert "do not fit the model" in run.mistake and run.state["step"] == 4


# ---- 8. Mistakes on the command line, and what is printed
def test_a_mistake_is_told_before_a_folder_is_made(train):
    mistakes = {  # what is told, and options that it is told for
        "invalid choice: 'SiT-M/2'": ["--model SiT-M/2"],
        "the blocks 1 to 3": ["--encoder-depth 4", "--encoder-depth 0"],
        "nowhere.pth": ["--encoder-weights nowhere.pth"],
        "device cuda:99 does not work; try --device cpu": ["--device cuda:99"],
        "unrecognized arguments": ["--enc vit_tiny_patch16_224"],  # not taken for --encoder
        "not allowed with argument --output-dir": ["--resume x"],
        "below 1": ["--batch-size 0", "--max-train-steps 0", "--eval-every 0"],
        "is below 0": ["--learning-rate=-1", "--proj-coeff=-1", "--cfg-prob=-1"],
    }
    for sentence, several in mistakes.items():
        for options in several:
            run = train(options)
            assert sentence in run.mistake and not run.folder.exists(), options


def test_a_full_memory_is_told_but_not_a_bug(train, monkeypatch):
    errors = [torch.OutOfMemoryError("tried to allocate 80 GiB"), AttributeError]
    monkeypatch.setattr(repa_mini, "draw_batch", Mock(side_effect=errors))
    assert "--batch-size" in train().mistake
    with pytest.raises(AttributeError):
        train()


def test_a_run_counts_on_and_its_decay_has_a_cap(train, finished, tmp_path, monkeypatch):
    progress = Mock(wraps=repa_mini.tqdm)
    monkeypatch.setattr(repa_mini, "tqdm", progress)
    torch.save({**finished.state, "step": 999_999}, tmp_path / "checkpoint.pt")
    run = train("--max-train-steps 1000000 --learning-rate 1", tmp_path)
    assert progress.call_args.kwargs == dict(initial=999_999, total=1_000_000, disable=None)
    assert "step 1000000: " in run.out
    for name, before in finished.state["ema"].items():
        assert close(run.state["ema"][name], before.lerp(run.state["model"][name], 1e-4), 1e-6)


def test_the_first_command_of_the_readme_runs(tmp_path, monkeypatch):
    argv = [sys.executable, HERE / "repa_mini.py", "--smoke", "--max-train-steps", "3"]
    argv += ["--batch-size", "4", "--model", "SiT-Ti/8"]  # to be quicker
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name in done.stdout
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint.pt", "metrics.csv", "samples_0000003.png"]
    assert Image.open(folder / names[2]).size == (342, 342)


# ---- 9. sample.py
def show(folder, options):
    return call(sample.main, f"--ckpt {folder} --device cpu {options}")


def held_out(run, n, t):
    """n of the 20 held-out images of a run, their labels, and x_t on the cosine path."""
    _, _, images, labels, _ = repa_mini.load_data(run.state["config"]["data"])
    chosen = torch.linspace(0, 19, n).long()
    x = repa_mini.to_unit(images[chosen])
    alpha, sigma, _, _ = interpolant(torch.tensor(t), "cosine")
    return x, labels[chosen], alpha * x + sigma * starting_noise(0, range(n))


OPTIONS = {  # options of sample.py, and the same in Python
    "": dict(),
    "--batch-size 4": dict(),
    "--dtype bfloat16": dict(),
    "--heun --num-steps 3": dict(heun=True, num_steps=3),
    "--cfg-scale 3 --guidance-high 0.7": dict(cfg_scale=3.0, guidance_high=0.7),
    "--cfg-scale 3 --guidance-low 0.7": dict(cfg_scale=3.0, guidance_low=0.7),
    "--seed 5": dict(noise=starting_noise(5, range(6))),
    "--classes 3 1": dict(y=torch.tensor([3, 1] * 3)),
    "--mode sde --batch-size 3": dict(),
    "--mode sde --batch-size 3 --cfg-scale 2 --num-steps 4": dict(cfg_scale=2, num_steps=4),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_does_what_it_does_in_python(trained, tmp_path, options):
    noise, y, model = starting_noise(0, range(6)), torch.arange(6) % 4, ema_of(trained)
    assert torch.equal(noise[3], torch.randn(3, 32, 32, generator=seeded("sample", 0, 3)))
    usual, parts = dict(noise=noise, y=y, num_steps=2), []
    changed = {**usual, **OPTIONS[options]}
    if "sde" in options:
        for k in (0, 3):  # each batch has noise of its own
            changed.update(noise=noise[k : k + 3], y=y[k : k + 3], generator=seeded("sde", 0, k))
            parts.append(sample.sample_sde(model, path_type="cosine", **changed))
    else:
        parts.append(sample_ode(model, **changed))
    path = tmp_path / "s.npz"
    done = show(trained.folder, f"--num-samples 6 --npz {path} --num-steps 2 {options}")
    assert done.code == 0, done.err
    pixels = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
    assert shows(pixels, torch.cat(parts)) == (options != "--dtype bfloat16")
    assert shows(pixels, sample_ode(model, **usual)) == (options in ("", "--batch-size 4"))


def test_samples_are_written_once(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = ["--output grid.png", "--npz s.npz", "--save-dir png"]
    options = "--classes 2 0 3 --num-samples 7 --num-steps 2"
    done = show(trained.folder, " ".join([options, *outputs]))
    assert "classes: 0 a, 1 b, 2 c, 3 d" in done.err
    assert not list(trained.folder.glob("samples.*"))
    y = torch.tensor([2, 0, 3, 2, 0, 3, 2])
    x = sample_ode(ema_of(trained), starting_noise(0, range(7)), y, 2)
    monkeypatch.setattr(repa_mini, "guided_velocity", None)
    for option, told in zip(outputs, ("grid.png already", "s.npz already", "png is not empty")):
        assert told in show(trained.folder, option).mistake
    cells = grid_cells("grid.png", columns=3)  # one class a row
    assert shows(cells[[0, 3, 6, 1, 4, 7, 2]], x) and not cells[[5, 8]].any()
    pictures = np.stack([np.array(Image.open(f"png/00000{i}.png")) for i in range(7)])
    assert np.array_equal(pictures, np.load("s.npz")["arr_0"])
    assert shows(torch.tensor(pictures).permute(0, 3, 1, 2), x)


def test_a_trajectory_ends_in_the_sample(trained, tmp_path):
    options = "--trajectory --classes 1 3 --seed 3 --cfg-scale 3 --guidance-high 0.5 --num-steps 9"
    done = show(trained.folder, f"{options} --output {tmp_path}/t.png")
    assert "t = 1.00, 0.89" in done.out
    model, y, x = ema_of(trained), torch.tensor([1, 3]), starting_noise(3, range(2))
    cells = grid_cells(tmp_path / "t.png", columns=8).unflatten(0, (2, 2, 8))
    assert shows(cells[:, 0, 0], x)
    last = sample_ode(model, x, y, 9, cfg_scale=3.0, guidance_high=0.5)
    assert shows(cells[:, 0, -1], last) and shows(cells[:, 1, -1], last)
    x = x - repa_mini.guided_velocity(model, x, 1.0, y) / 9  # not guided yet
    v = repa_mini.guided_velocity(model, x, 8 / 9, y)
    alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(8 / 9), "cosine")
    assert shows(cells[:, 1, 1], (d_sigma * x - sigma * v) / (alpha * d_sigma - d_alpha * sigma))
    show(trained.folder, f"{options} --output {tmp_path}/t.gif")
    with Image.open(tmp_path / "t.gif") as frames:
        assert frames.n_frames == 10 and frames.size == (70, 70)


def test_losses_by_noise_level(trained, vanilla, monkeypatch):
    """150 images go through in two batches. A run without a projector has no alignment."""
    images, labels = draw_shapes(150, seed=1)
    x, y, noise = repa_mini.to_unit(images), labels % 4, starting_noise(0, range(150))
    monkeypatch.setattr(repa_mini, "load_data", lambda name: (None, None, images, y, None))
    model, z = ema_of(trained), TargetEncoder("test_vit", 4, "random")(x)
    show(trained.folder, "--losses")
    rows = table_of(trained.folder / "losses.csv")
    assert close([row["t"] for row in rows], (torch.arange(10) + 0.5) / 10)
    for row in rows:
        t = torch.full((150,), row["t"])
        losses = repa_mini.training_losses(model, x, noise, t, y, z, "cosine")
        assert close([row["velocity_loss"], -row["alignment"]], losses, 3e-5)
    show(vanilla.folder, "--losses")
    assert list(table_of(vanilla.folder / "losses.csv")[0]) == ["t", "velocity_loss"]


def test_the_alignment_picture(trained):
    done = show(trained.folder, "--alignment --num-samples 2")
    picture = pil_to_tensor(Image.open(trained.folder / "alignment.png")).double() / 255
    assert picture.shape == (3, 2 + 66 * 6, 2 + 66 * 6)
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


def test_equal_directions_have_equal_colours():
    torch.manual_seed(0)
    targets = F.normalize(torch.randn(2, 300, 40) * 0.97 ** torch.arange(40), dim=-1)
    colours, scaled, turned = sample.pca_colours(targets, 3 * targets, targets.flip(1))
    assert close(colours, scaled, 1e-6) and close(colours.flip(1), turned, 1e-6)
    flat = targets.flatten(0, 1).double()
    _, _, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    p = flat @ axes[:3].T  # the largest component is the first channel
    low, high = p.quantile(0.02, dim=0), p.quantile(0.98, dim=0)
    expected = ((p - low) / (high - low)).clamp(0, 1)
    for a, b in zip(colours.flatten(0, 1).T, expected.T):  # the sign of an axis is free
        assert close(a, b) or close(a, 1 - b)


@pytest.mark.parametrize("k, expected", [(5, 0.688997824777), (10, 0.423732571777)])
def test_cknna_is_its_authors(k, expected):
    n, da, db = (40, 16, 24) if k == 5 else (64, 8, 32)
    a = wave((n, da), 1.1)
    b = a @ wave((da, db), 0.6) + 0.3 * wave((n, db), 2.3)
    assert close(sample.cknna(a, b, k), expected)
    assert close(sample.cknna(3 * a, a), 1, 1e-4)
    for few, topk in ((3, 2), (10, 1), (10, 10)):
        with pytest.raises(UserError, match="CKNNA"):
            sample.cknna(a[:few], b[:few], topk)


def test_neighbours_vote_with_their_cosine():
    pairs = torch.eye(50).repeat_interleave(2, dim=0)  # of different classes
    assert sample.knn_accuracy(pairs, torch.arange(100) % 2, topk=1) == 0
    angles = torch.tensor([0.0, 0.1, 1.2, 1.2])  # one near one beats two far ones
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert sample.knn_accuracy(features, torch.tensor([1, 1, 0, 0]), topk=3) == 1


def test_the_cknna_table(trained):
    show(trained.folder, "--cknna --topk 3 --num-samples 10")
    rows = table_of(trained.folder / "cknna.csv")
    assert [row["block"] for row in rows] == [1, 2, 3] and len(rows[0]) == 11
    (x, labels, x_t), model, states = held_out(trained, 10, 0.5), ema_of(trained), []
    z = TargetEncoder("test_vit", 4, "random")(x).mean(1)
    model.blocks[1].register_forward_hook(lambda block, _, out: states.append(out.mean(1)))
    model(x_t, torch.full((10,), 0.5), torch.full((10,), 4))
    assert close(rows[1]["cknna t=0.5"], sample.cknna(states[0], z, 3), 2e-5)
    assert close(rows[1]["knn t=0.5"], sample.knn_accuracy(states[0], labels, 3), 2e-5)


def test_the_encoder_is_the_runs_or_typed(trained, tmp_path, monkeypatch):
    config = {**trained.state["config"], "encoder_weights": "RUNS"}
    torch.save({**trained.state, "config": config}, tmp_path / "checkpoint.pt")
    encoder = Mock(side_effect=UserError("no encoder"))
    monkeypatch.setattr(repa_mini, "TargetEncoder", encoder)
    expected = {
        "--alignment": ("test_vit", 4, "RUNS"),
        "--cknna --encoder test_vit2": ("test_vit2", 4, "download"),
        "--cknna --encoder-weights w.pth": ("test_vit", 4, "w.pth"),
        "--cknna --encoder test_vit2 --encoder-weights w.pth": ("test_vit2", 4, "w.pth"),
    }
    for options, arguments in expected.items():
        assert "no encoder" in show(tmp_path, options).mistake
        assert encoder.call_args.args == arguments


def test_a_mistake_in_sampling_is_told(vanilla, tmp_path, monkeypatch):
    mistakes = {
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repa_mini, "guided_velocity", None)  # found out before
    for options, sentence in mistakes.items():
        assert sentence in show(vanilla.folder, options).mistake, options
        assert not list(tmp_path.iterdir()), options


def test_default_names_are_new_and_output_is_ascii(trained, tmp_path, monkeypatch):
    """Class names go to stderr, where Python escapes what the terminal cannot show."""
    monkeypatch.chdir(tmp_path)
    torch.save({**trained.state, "classes": ["caf\u00e9", *"bcd"]}, "checkpoint.pt")
    for name in ("samples.png", "samples-2.png", "samples-3.png"):
        done = show("checkpoint.pt", "--num-steps 1")
        assert done.code == 0 and done.out.isascii() and "0 caf" in done.err
        assert Path(name).stat().st_size > 100


@pytest.mark.parametrize("part, wrong", [("ema", {"pos_embed": 3}), ("sit", {"colour": "red"})])
def test_a_checkpoint_that_does_not_fit_is_told(trained, tmp_path, part, wrong):
    state = {**trained.state, part: {**trained.state[part], **wrong}}
    torch.save(state, tmp_path / "checkpoint.pt")
    done = show(tmp_path, "--num-steps 1")
    assert str(tmp_path) in done.mistake and len(done.err) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


# ---- 10. The README and its exercises
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_what_exists(monkeypatch):
    named = re.findall(r"`(repa_mini|sample)\.(?!py\b)([A-Za-z_]\w*)", README)
    assert len(named) >= 10
    for module, name in named:
        assert hasattr(sys.modules[module], name), name
    monkeypatch.setattr(sys, "argv", ["sample.py", "--help"])
    sample_help = call(lambda words: runpy.run_path(sample.__file__, run_name="__main__"), "").out
    known = call(repa_mini.main, "--help").out + sample_help
    assert known.isascii()
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


@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("assets/exercises/*.diff")))
def test_an_exercise_applies_and_trains(tmp_path, photos, name):
    source, diff = HERE / "repa_mini.py", HERE / "assets" / "exercises" / f"{name}.diff"
    changed = tmp_path / "repa_mini.py"
    changed.write_bytes(source.read_bytes())
    subprocess.run(["git", "apply", "-v", diff], cwd=tmp_path, check=True, capture_output=True)
    assert changed.read_bytes() != source.read_bytes() and diff.read_text().count("\n") <= 25
    program = runpy.run_path(str(changed))
    program["SIT_MODELS"]["SiT-Ti/8"] = TI_8
    options = f"--data {photos} --output-dir {tmp_path}/run --max-train-steps 2"
    run = call(program["main"], f"{COMMON} {options}")
    assert run.code == 0, run.err
