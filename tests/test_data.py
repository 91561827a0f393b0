"""Everything before and after the network: files, data sets, batches, backbones, k-NN monitor.

The folders are built as people have them: hidden files, links in circles, broken, deep, turned and
misnamed images, names that are no text. Whatever is wrong with one file, it is named and left out;
whatever is wrong with a folder, the program ends in one sentence.
"""
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, PngImagePlugin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as TF

import common
import simclr_tc2
from conftest import ROOT

CPU = torch.device("cpu")
AS_IS = {"crop": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "jitter": (0.0, 0.0, 0.0, 0.0),
         "jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0,
         "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CROPPED = {**AS_IS, "crop": (0.2, 0.9), "ratio": (3 / 4, 4 / 3)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_test_hangs():
    """Links in a circle used to be followed for ever."""
    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def too_late(signum, frame):
    pytest.fail("hangs")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=common.rng("normal", seed))


def noise(height, width, *key):
    shape = (3, height, width)
    return torch.randint(0, 255, shape, generator=common.rng("noise", *key), dtype=torch.uint8)


def write(path, content=b""):
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def save_image(path, image):
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def class_folders(path, n=4, height=20, width=20, splits=("train", "test"), classes="ab"):
    """Class folders of PNG and JPEG files in turn."""
    for split in splits:
        for name in classes:
            for i in range(n):
                suffix = "png" if i % 2 else "jpg"
                image = noise(height, width, split, name, i)
                save_image(f"{path}/{split}/{name}/{i}.{suffix}", image)
    return path


def flat_folder(path, n, height=20, width=20):
    for i in range(n):
        save_image(f"{path}/{i:03}.png", noise(height, width, i))
    return path


def fails(capsys, function, *args):
    """The one sentence in which the program ends."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("left out: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), lines
    return errors[0]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes; a view takes no memory."""
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and not func.is_view:
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


# ---- one listing ---------------------------------------------------------------------------------
def test_hidden_names_are_left_out_at_every_level_and_other_files_are_counted(capsys):
    kept = ["6.JPEG", "a/1.jpg", "b/deep/er/5.TIFF"]
    hidden = [".x.png", "a/._1.jpg", "a/.git/2.jpg", "@eaDir/3.jpg", "b/deep/@eaDir/4.jpg"]
    others = ["notes.txt", "a/c.TXT", "a/d.txt", "a/1.json", "b/2.json", "README", ".DS_Store"]
    for name in kept + hidden + others:
        write(f".cache/{name}")             # the folder that is named may begin with a dot
    assert common.list_images(".cache") == kept
    said = capsys.readouterr().out
    assert said == "passed over in .cache: 6 files (3 .txt, 2 .json, 1 without a suffix)\n"


def test_all_suffixes_are_listed_in_any_case(capsys):
    suffixes = "jpg jpeg png bmp ppm pgm tif tiff webp gif avif JPG Jpeg PNG AVIF".split()
    names = [f"{i:02}.{suffix}" for i, suffix in enumerate(suffixes)]
    for name in names:
        write(f"d/{name}")
    assert common.list_images("d") == names and not capsys.readouterr().out


def test_links_in_circles_are_passed_over_with_a_line(capsys):
    for name in ("d/a/1.jpg", "d/b/c/2.jpg", "elsewhere/3.jpg"):
        write(name)
    os.symlink("../../d", "d/b/back")       # two such links used to be followed for ever
    os.symlink(".", "d/again")
    os.symlink("../a", "d/b/a")
    os.symlink("../elsewhere", "d/z")       # an ordinary link is followed
    os.symlink("loop", "d/loop")
    assert common.list_images("d") == ["a/1.jpg", "b/c/2.jpg", "z/3.jpg"]
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["passed over: d/again is d again, by a link",
                        "passed over: d/b/a is d/a again, by a link",
                        "passed over: d/b/back is d again, by a link"]


def test_a_run_below_its_own_data_is_no_data(capsys):
    """A run in ./runs of --data . leaves pictures there; the same command has to go on."""
    flat_folder("d", 3)
    before = common.load_data("d")
    save_image("d/runs/simclr_tc2/views.png", noise(20, 20))
    save_image("d/runs/simclr_tc2/curves.png", noise(20, 20))
    assert len(common.list_images("d")) == 5            # views.png alone does not make it a run
    write("d/runs/simclr_tc2/log.jsonl")
    capsys.readouterr()
    after = common.load_data("d")
    assert after.fingerprint == before.fingerprint and torch.equal(after.train, before.train)
    assert capsys.readouterr().out == "passed over: d/runs/simclr_tc2 is a run\n"


def test_lines_on_the_data_are_printed_by_the_first_process_alone(monkeypatch, capsys):
    flat_folder("d", 3)
    write("d/notes.txt")
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        common.load_data("d")
        assert capsys.readouterr().out.count("passed over in d: 1 files (1 .txt)") == times


def test_a_folder_that_may_not_be_read_is_said(monkeypatch, capsys):
    for name in ("d/a/1.jpg", "d/secret/2.jpg"):
        write(name)
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert common.list_images("d") == ["a/1.jpg"]
    assert "Permission denied: 'd/secret'" in capsys.readouterr().out


def test_a_data_folder_that_may_not_be_read_ends_in_a_sentence(monkeypatch, capsys):
    class_folders("d")

    def forbidden(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", forbidden)
    assert "--data d: cannot be read (Permission denied)" in fails(capsys, common.load_data, "d")


def test_images_beside_the_class_folders_are_counted(capsys):
    class_folders("d", n=1)
    save_image("d/train/stray.png", noise(20, 20))
    assert len(common.list_classes("d/train")[0]) == 2
    assert "passed over in d/train: 1 images in no class folder" in capsys.readouterr().out


def test_an_image_of_the_right_size_is_cut_like_any_other():
    """The central 224 / 256, whether it was resized before or not."""
    image = noise(28, 28)
    assert torch.equal(common.central_square(image, 28), image)
    expected = common.TF.center_crop(common.TF.resize(image, [32], antialias=True), [28, 28])
    assert torch.equal(common.central_square(image, 28, 32), expected)


def test_labels_follow_the_class_folders():
    class_folders("d", classes=["b", "a", "a-b"], n=2)
    save_image("d/train/stray.png", noise(20, 20))
    save_image("d/train/a/x/deep.png", noise(20, 20))
    data = common.load_data("d")
    names, labels, classes = common.list_classes("d/train")
    assert data.classes == classes == ["a", "a-b", "b"]
    assert labels.dtype == torch.int64 and torch.equal(labels, data.train_labels)
    assert [classes[label] for label in labels] == [name.split("/")[0] for name in names]
    assert data.train_labels.bincount().tolist() == [3, 2, 2] and len(data.test) == 6
    for image, name in zip(data.train, names):
        assert torch.equal(image, common.decode(f"d/train/{name}"))


def test_classes_may_be_links_to_folders_elsewhere(capsys):
    class_folders("whole", classes="abc")
    for split in ("train", "test"):
        os.makedirs(f"part/{split}")
        for name in "ac":
            os.symlink(f"../../whole/{split}/{name}", f"part/{split}/{name}")
    data = common.load_data("part")
    assert data.classes == ["a", "c"] and len(data.train) == 8 and not capsys.readouterr().out


def test_fingerprint_is_that_of_what_is_in_the_folder(monkeypatch):
    class_folders("d3", classes="abc")
    shutil.copytree("d3", "far/away")
    where = os.path.abspath("d3")
    names = ("d3", "d3/", "./d3", where, "far/away")
    found = {common.load_data(name).fingerprint for name in names}
    monkeypatch.chdir("far")
    found.add(common.load_data("../d3").fingerprint)
    assert len(found) == 1

    flat_folder("flat", 3)
    found.add(common.load_data("flat").fingerprint)
    shutil.copy("flat/000.png", "flat/more.png")
    found.add(common.load_data("flat").fingerprint)
    for changed in ("away/train/a/more.png", "away/test/a/more.png"):
        shutil.copy("flat/000.png", changed)
        found.add(common.load_data("away").fingerprint)
    os.remove("away/train/b/0.jpg")
    found.add(common.load_data("away").fingerprint)
    for split in ("train", "test"):
        shutil.rmtree(f"away/{split}/c")
    found.add(common.load_data("away").fingerprint)
    assert len(found) == 7
    assert len({common.load_data(name).fingerprint for name in ("shapes", "fake")}) == 2


@pytest.mark.parametrize("made, word", [
    ("Train test", "has a folder Train/; rename it to train/"),
    ("train Val", "has a folder Val/; rename it to val/"),
    ("train", "has train/ but neither val/ nor test/; to train without labels name d/train"),
    ("test", "has test/ but no train/ folder"),
    ("val", "has val/ but no train/ folder"),
    ("", "there is no image in d"),
])
def test_splits_that_are_not_there_end_in_a_sentence(made, word, capsys):
    os.makedirs("d")
    class_folders("d", splits=made.split())
    assert f"--data d: {word}" in fails(capsys, common.load_data, "d")


def test_val_comes_before_test_and_may_not_be_train_by_a_link(capsys):
    class_folders("d", splits=("train", "val", "test"))
    shutil.rmtree("d/test")
    write("d/test/c/broken.png")
    assert len(common.load_data("d").test) == 8
    shutil.rmtree("d/val")
    os.symlink("train", "d/val")
    assert "d/val is d/train by a link" in fails(capsys, common.load_data, "d")


def test_a_folder_named_like_built_in_data_is_mentioned(capsys):
    os.makedirs("shapes")
    assert len(common.load_data("shapes").train) == 4000
    said = capsys.readouterr().out
    assert said == "--data shapes: the built-in data; the folder of that name is ./shapes\n"
    flat_folder("shapes", 3)
    assert len(common.load_data("./shapes").train) == 3 and not capsys.readouterr().out


# ---- one decoder per kind ------------------------------------------------------------------------
def test_jpeg_is_read_by_torchvision_and_by_pillow_where_that_fails(monkeypatch):
    image = Image.fromarray(noise(5, 4).permute(1, 2, 0).numpy()).resize((40, 30))
    image.save("x.jpg", quality=95)
    decode_image = torchvision.io.decode_image
    calls = []

    def counted(*args, **kw):
        calls.append(args)
        return decode_image(*args, **kw)

    def missing(*args, **kw):
        raise RuntimeError("Couldn't load the image extension.")

    monkeypatch.setattr(torchvision.io, "decode_image", counted)
    fast = common.decode("x.jpg")
    assert fast.shape == (3, 30, 40) and len(calls) == 1
    image.save("two.mpo", save_all=True, append_images=[image], quality=95)
    assert torch.equal(common.decode("two.mpo"), fast) and len(calls) == 2
    monkeypatch.setattr(torchvision.io, "decode_image", missing)
    slow = common.decode("x.jpg")
    monkeypatch.delattr(torchvision.io, "decode_image")         # as of a future release
    assert torch.equal(common.decode("x.jpg"), slow)
    assert (fast.int() - slow.int()).abs().max() <= 4


def test_one_wrong_bit_in_a_png_is_an_error():
    """torchvision's decoder dies of it, and the process with it."""
    save_image("whole.png", noise(40, 30))
    content = read("whole.png")
    for i in range(100, 1700, 300):
        wrong = bytearray(content)
        wrong[i] ^= 4
        write("broken.png", wrong)
        with pytest.raises(OSError):
            common.decode("broken.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "ppm", "tif", "webp", "gif"])
def test_broken_files_of_every_format_are_errors_with_a_reason(suffix):
    save_image(f"whole.{suffix}", noise(40, 30))
    content = read(f"whole.{suffix}")
    assert common.decode(f"whole.{suffix}").shape == (3, 40, 30)
    for wrong in (b"", b"no image", content[:12], content[:len(content) // 2]):
        write(f"broken.{suffix}", wrong)
        with pytest.raises(OSError) as error:
            common.decode(f"broken.{suffix}")
        assert str(error.value)
    with pytest.raises(OSError, match="No such file"):
        common.decode(f"missing.{suffix}")
    os.makedirs(f"folder.{suffix}")
    with pytest.raises(OSError, match="Is a directory"):
        common.decode(f"folder.{suffix}")


def test_sixteen_bits_are_read_alike_and_other_depths_are_refused():
    deep = (np.arange(72, dtype=np.uint16) * 900).reshape(8, 9)
    expected = torch.from_numpy((deep / 257).round().astype(np.uint8)).expand(3, 8, 9)
    for suffix in ("png", "tif", "pgm"):
        Image.fromarray(deep).save(f"deep.{suffix}")
        assert torch.equal(common.decode(f"deep.{suffix}"), expected), suffix
    write("twelve.pgm", b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 0))
    assert common.decode("twelve.pgm").flatten().tolist() == [255, 0] * 3
    Image.fromarray(np.full((8, 9), 0.5, dtype=np.float32)).save("float.tif")
    Image.fromarray(np.full((8, 9), 70000, dtype=np.int32)).save("whole.tif")
    for name in ("float.tif", "whole.tif"):
        with pytest.raises(OSError, match="neither 8 nor 16 bits per channel"):
            common.decode(name)


def test_one_size_limit_for_all_formats(monkeypatch):
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    suffixes = ("jpg", "png", "bmp", "ppm", "tif", "webp", "gif")
    for suffix in suffixes:
        image.save(f"x.{suffix}")
    # A header that claims 40,000 x 40,000 pixels.
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    content = read("x.png")
    write("huge.png", content[:16] + header + crc + content[33:])
    with pytest.raises(OSError, match="more than a gigapixel"):
        common.decode("huge.png")

    for limit in (800, 799):
        monkeypatch.setattr(common, "GIGAPIXEL", limit)
        for suffix in suffixes:
            if limit == 800:
                common.decode(f"x.{suffix}")
                continue
            with pytest.raises(OSError, match="more than a gigapixel"):
                common.decode(f"x.{suffix}")


def test_png_with_large_texts_and_profile_is_read(monkeypatch):
    image = Image.fromarray(noise(20, 20).permute(1, 2, 0).numpy())
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "x" * 3_000_000, zip=True)
    for i in range(30):
        texts.add_text(f"plain{i}", "y" * 3_000_000)
    image.save("texts.png", pnginfo=texts, icc_profile=bytes(3_000_000))
    assert torch.equal(common.decode("texts.png"), noise(20, 20))
    monkeypatch.setattr(common, "GIGAPIXEL", 10_000)        # what Pillow raises is no OSError
    with pytest.raises(OSError, match="too large"):
        common.decode("texts.png")


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tif"])
def test_every_format_is_turned_upright_by_its_exif(suffix):
    image = Image.new("RGB", (40, 20), (250, 0, 0))
    image.paste((0, 0, 250), (0, 0, 20, 20))        # the left half is blue
    deep = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    exif = image.getexif()
    exif[0x0112] = 6                                # turn by a quarter to the right
    image.save(f"turned.{suffix}", exif=exif, quality=95)
    deep.save("deep.png", exif=exif)
    for name in (f"turned.{suffix}", "deep.png"):
        turned = common.decode(name)
        assert turned.shape == (3, 40, 20)
        assert turned[0, 5, 10] < 20 and turned[0, 35, 10] > 230        # the upper half is


def test_files_of_every_colour_and_with_a_wrong_name_are_read():
    red = (200, 0, 0)
    blue = Image.new("RGB", (8, 9), (0, 0, 200))
    Image.new("L", (8, 9), 77).save("gray.png")
    Image.new("L", (8, 9), 77).save("gray.jpg")
    assert common.decode("gray.png").unique().tolist() == [77]
    assert common.decode("gray.jpg").unique().tolist() == [77]
    Image.new("1", (8, 9), 1).save("bit.png")
    assert common.decode("bit.png").unique().tolist() == [255]
    Image.new("CMYK", (8, 9)).save("cmyk.jpg")
    assert common.decode("cmyk.jpg").shape == (3, 9, 8)
    image = Image.new("RGB", (8, 9), red)
    for variant in (image, image.convert("RGBA"), image.quantize()):
        variant.save("x.png")
        assert common.decode("x.png")[:, 4, 4].tolist() == [200, 0, 0], variant.mode
    image.save("x.bmp")
    for suffix in ("png", "gif", "webp"):
        image.save(f"x.{suffix}", save_all=True, append_images=[blue], lossless=True)
    for suffix in ("bmp", "png", "gif", "webp"):
        os.rename(f"x.{suffix}", "wrong.jpg")       # of animations, the first frame
        assert common.decode("wrong.jpg")[:, 4, 4].tolist() == [200, 0, 0], suffix


def test_a_strip_of_one_pixel_by_thousands_is_cut_before_it_is_resized():
    row = torch.arange(9001.0).div(40).byte().expand(3, 1, 9001)
    with Largest() as largest:
        square = common.central_square(row, 32, 37)
    assert largest.bytes < 50_000 and square.shape == (3, 32, 32)
    assert square.unique().tolist() == [112]        # the middle pixel and its neighbours
    assert common.central_square(row.mT, 32).shape == (3, 32, 32)
    image = noise(40, 115)                          # ordinary images are not cut before
    expected = TF.center_crop(TF.resize(image, [36], antialias=True), [32, 32])
    assert torch.equal(common.central_square(image, 32, 36), expected)
    assert common.central_square(image[None, :, :32, :32], 32).data_ptr() == image.data_ptr()
    save_image("strip.png", row)
    files = common.Crops(["strip.png"], 24, 2, simclr_tc2.STRONG, 0)
    assert files[0, 0][0].shape == (2, 3, 24, 24)


# ---- what --data names ---------------------------------------------------------------------------
def test_shapes_are_deterministic_balanced_and_different_in_train_and_test():
    a = common.load_data("shapes")
    b = common.load_data("shapes")
    assert torch.equal(a.train, b.train) and torch.equal(a.test, b.test)
    assert a.train.dtype == torch.uint8 and a.train.shape == (4000, 3, 32, 32)
    assert a.train_labels.bincount().tolist() == [400] * 10
    assert a.test_labels.bincount().tolist() == [100] * 10
    assert not torch.equal(a.train[:1000], a.test)
    assert a.size == 32 and len(a.classes) == 10
    # One class differs from another by its figure, not by its brightness.
    brightness = a.train.float().mean((1, 2, 3))
    means = torch.stack([brightness[a.train_labels == c].mean() for c in range(10)])
    assert (means - brightness.mean()).abs().max() < brightness.std() / 2


def test_fake_data_are_deterministic_and_can_be_resized():
    a = common.load_data("fake")
    b = common.load_data("fake", image_size=16)
    assert torch.equal(a.train, common.load_data("fake").train)
    assert len(a.train) == 512 and len(a.test) == 128
    assert a.test_labels.unique().tolist() == list(range(10))
    assert b.size == 16 and b.train.shape == (512, 3, 16, 16) and b.test.shape == (128, 3, 16, 16)


class Cifar:
    """What torchvision's class has; images of one class are of one colour."""
    classes = ["cat", "dog"]

    def __init__(self, root, train, download):
        assert root == ".data" and download
        self.targets = [0, 1, 1] if train else [1, 0]
        self.data = np.zeros((len(self.targets), 32, 32, 3), dtype=np.uint8)
        self.data[..., 2] = 100 * np.array(self.targets)[:, None, None]


class Stl:
    classes = ["cat", "dog"]

    def __init__(self, root, split, download):
        assert split in ("train+unlabeled", "test")
        self.labels = np.array([0, 1, -1] if split != "test" else [1, 0])
        self.data = np.zeros((len(self.labels), 3, 96, 96), dtype=np.uint8)


def test_data_sets_of_torchvision_have_channels_first_and_labels(monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    monkeypatch.setattr(torchvision.datasets, "STL10", Stl)
    data = common.load_data("cifar10")
    assert data.train.shape == (3, 3, 32, 32) and data.test.shape == (2, 3, 32, 32)
    assert data.train[:, 2, 0, 0].tolist() == [0, 100, 100] and data.train[:, :2].max() == 0
    assert data.train_labels.tolist() == [0, 1, 1] and data.classes == ["cat", "dog"]
    data = common.load_data("stl10", image_size=48)
    assert data.train.shape == (3, 3, 48, 48) and data.train_labels.tolist() == [0, 1, -1]

    def offline(*args, **kw):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    sentence = fails(capsys, common.load_data, "cifar100")
    assert "--data cifar100: not found under .data/, and the download failed (no net" in sentence


def test_folders_of_small_images_are_read_at_once_and_large_ones_are_listed():
    small = common.load_data(class_folders("small"))
    assert small.train.dtype == torch.uint8 and small.train.shape == (8, 3, 20, 20)
    large = common.load_data(class_folders("large", height=110, width=140))
    assert large.size == 110 and len(large.train) == 8
    assert large.train_labels.tolist() == [0] * 4 + [1] * 4
    assert common.decode(large.train[0]).shape == (3, 110, 140)
    flat = common.load_data("large/train")
    assert flat.classes is None and flat.train_labels is None and flat.test_labels is None
    assert sorted(flat.train) == sorted(large.train)
    assert common.load_data("large", image_size=32).train == large.train
    home = common.load_data(os.path.join("~", os.path.relpath("small", os.path.expanduser("~"))))
    assert home.train.shape == (8, 3, 20, 20)


def test_size_is_the_median_and_small_images_of_other_sizes_are_named(capsys):
    flat_folder("d", 30, height=24, width=24)
    for i in (3, 9, 12, 20, 23, 29):
        save_image(f"d/{i:03}.png", noise(*[(8, 8), (300, 200)][i % 2], i))
    data = common.load_data("d")
    assert data.size == 24 and data.train.shape == (30, 3, 24, 24)
    said = capsys.readouterr().out
    assert said.startswith("not all images are 24 x 24 (d/003.png is 200 x 300): they are resized")
    assert said.count("\n") == 1 and said.count("d/0") == 1
    assert torch.equal(data.train[3], common.central_square(common.decode("d/003.png"), 24))

    assert common.load_data("d", image_size=32).train.shape == (30, 3, 32, 32)
    assert not capsys.readouterr().out                  # who names a size knows
    assert common.load_data(flat_folder("alike", 3)).size == 20 and not capsys.readouterr().out
    large = flat_folder("large", 9, height=150, width=120)
    save_image("large/000.png", noise(20, 20))          # the extreme used to count
    assert common.load_data(large).size == 120 and not capsys.readouterr().out
    flat_folder("uneven", 45, height=8, width=8)        # the sample is not the first 64 files
    for i in range(45, 100):
        save_image(f"uneven/{i:03}.png", noise(16, 16))
    assert common.load_data("uneven").size == 16


# ---- bad files -----------------------------------------------------------------------------------
def test_one_bad_file_in_a_hundred_is_named_and_left_out_and_no_more(capsys):
    save_image("good.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    for i in range(4):
        write(f"bad{i}.png", b"no")
    for size, allowed in ((300, 3), (301, 4), (20, 1)):
        common.named_files.clear()
        bad = [f"bad{i}.png" for i in range(allowed)]
        names = bad + ["good.png"] * (size - allowed)
        images, kept = common.decode_all("d", names, 8, 0)
        assert len(images) == size - allowed and kept == list(range(allowed, size))
        said = capsys.readouterr().err.splitlines()
        assert [line.split()[2] for line in said] == bad
        assert all("cannot be decoded (cannot identify image file" in line for line in said)
        if size != 301:
            sentence = fails(capsys, common.decode_all, "d", ["bad3.png", *names[:-1]], 8, 0)
            assert f"--data d: over 1% of {size} images cannot be decoded" in sentence


def test_labels_stay_with_their_images_when_a_file_is_left_out(capsys):
    class_folders("d")
    write("d/train/a/1.png", b"no")
    write("d/test/a/0.jpg", b"\xff\xd8\xff\xe0")
    data = common.load_data("d")
    assert data.train_labels.tolist() == [0] * 3 + [1] * 4
    assert data.test_labels.tolist() == [0] * 3 + [1] * 4
    assert torch.equal(data.train[1], common.decode("d/train/a/2.jpg"))
    said = capsys.readouterr().err
    assert said.count("left out: ") == 2 and "left out: d/test/a/0.jpg cannot be decoded (" in said


@pytest.mark.parametrize("size", [20, 120])
def test_a_split_of_one_image_that_cannot_be_read_ends_in_a_sentence(size, capsys):
    class_folders("d", height=size, width=size, n=2, splits=("train", "test"), classes="a")
    os.remove("d/test/a/0.jpg")
    write("d/test/a/1.png", b"no")
    args = Namespace(image_size=16, workers=0)

    def evaluate():
        common.monitor(None, common.load_data("d", 16), args, AS_IS, CPU)

    assert "--data d: " in fails(capsys, evaluate)


@pytest.mark.parametrize("size", [20, 120])
def test_a_run_goes_on_without_an_undecodable_image_and_names_it_once(size, capsys):
    class_folders("d", height=size, width=size)
    write("d/train/a/0.jpg", b"not an image")
    argv = ["--data", "d", "--arch", "resnet_tiny", "--image-size", "16", "--batch-size", "4",
            "--epochs", "2", "--workers", "0", "--baseline"]
    simclr_tc2.main([*argv, "--out", "r"])
    said = capsys.readouterr().err.splitlines()
    assert {line.partition(" (")[0] for line in said} == {
        "left out: d/train/a/0.jpg cannot be decoded"}
    write("d/train/a/2.jpg")
    sentence = fails(capsys, simclr_tc2.main, [*argv, "--out", "q"])
    assert "over 1% of 8 images cannot be decoded" in sentence


def spoil(pattern, content):
    """A function that builds class folders and spoils files there; content None removes them."""
    def build(path):
        class_folders(path)
        for where, _, files in os.walk(f"{path}/{pattern}"):
            for file in files:
                os.remove(f"{where}/{file}")
                if content is not None:
                    write(f"{where}/{file}", content)
    return build


def files_only(content, *names):
    def build(path):
        for name in names:
            write(f"{path}/{name}", content)
    return build


def change(command):
    """A function that builds class folders and runs a shell command there."""
    def build(path):
        class_folders(path)
        subprocess.run(command, shell=True, check=True, cwd=path)
    return build


def shell(command):
    def build(path):
        os.makedirs(path)
        subprocess.run(command, shell=True, check=True, cwd=path)
    return build


FIVE = [f"{i}.jpg" for i in range(5)]
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
HOPELESS = {
    "train-zero-byte": spoil("train", b""),
    "train-text": spoil("train", b"not an image"),
    "train-cut": spoil("train", PNG_HEAD + bytes(30)),
    "train-noise": spoil("train", bytes(range(256)) * 4),
    "train-html": spoil("train", b"<html></html>"),
    "train-empty": spoil("train", None),
    "train-one-class-spoiled": spoil("train/a", b"no"),
    "test-zero-byte": spoil("test", b""),
    "test-text": spoil("test", b"not an image"),
    "test-cut": spoil("test", PNG_HEAD + bytes(30)),
    "test-noise": spoil("test", bytes(range(256)) * 4),
    "test-html": spoil("test", b"<html></html>"),
    "test-empty": spoil("test", None),
    "plain-zero-byte": files_only(b"", *FIVE),
    "plain-text": files_only(b"no", *FIVE),
    "plain-gif": files_only(b"GIF89a", *FIVE),
    "plain-jpeg-head": files_only(b"\xff\xd8\xff\xe0", *FIVE),
    "plain-png-head": files_only(PNG_HEAD, *FIVE),
    "notes": files_only(b"hello", "a.txt", "b/c.md"),
    "hidden": files_only(b"", ".x/y.jpg", ".z.jpg"),
    "empty": shell(":"),
    "folders": shell("mkdir -p a/b/c"),
    "folders-named-like-images": shell("mkdir 0.jpg 1.jpg 2.jpg"),
    "dangling-links": shell("for i in 0 1 2 3 4; do ln -s /nowhere/x $i.jpg; done"),
    "link-to-itself": shell("ln -s . a; ln -s . b"),
    "no-test": change("rm -r test"),
    "no-train": change("rm -r train"),
    "other-class": change("mv test/a test/z"),
    "missing-class": change("rm -r test/a"),
    "hollow-class": change("rm train/a/*"),
    "no-class-folders": change("mv train/a/* train; rm -r train/a train/b"),
    "train-is-a-file": change("rm -r train; touch train"),
    "capitals": change("mv train Train"),
    "test-is-train": change("rm -r test; ln -s train test"),
    "two-bad-in-eight": change("for c in a b; do : > train/$c/0.jpg; done"),
    "too-few": change("rm train/?/[123].*"),
    "missing": shell("rmdir ../missing"),
}


def test_thirty_hopeless_folders_end_in_one_sentence_that_names_them(capsys):
    argv = ["--arch", "resnet_tiny", "--batch-size", "4", "--baseline", "--workers", "0",
            "--epochs", "1", "--out", "r", "--data"]
    assert len(HOPELESS) >= 30
    for name, build in HOPELESS.items():
        build(name)
        sentence = fails(capsys, simclr_tc2.main, [*argv, name])
        assert name in sentence or name == "too-few" and "2 training images" in sentence, sentence
        assert not os.path.exists("r"), name


# ---- batches -------------------------------------------------------------------------------------
def batches(data, recipes, start=0, stop=3, rank=0, world=1, workers=0, seed=0, size=20, batch=4):
    args = Namespace(images_per_step=batch, image_size=size, seed=seed, workers=workers)
    return list(common.training_batches(data, recipes, args, rank, world, CPU, start, stop))


def as_data(images, size=20):
    return common.Data("d", images, None, [], None, size, None, "d")


@pytest.mark.parametrize("in_memory", [True, False])
def test_order_is_a_function_of_seed_and_epoch(in_memory):
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 3, 8, 8)
    if not in_memory:
        flat = [f"d/{i}.png" for i in range(12)]
        for name, image in zip(flat, images):
            save_image(name, image)
        images = flat

    def epochs(seed):
        shown = []
        for views, index in batches(as_data(images), [AS_IS] * 2, 0, 6, seed=seed, size=8):
            assert ((views[0, :, 0, 0, 0] * 255).round().int().tolist()) == index
            shown += index
        return shown[:12], shown[12:]

    first, second = epochs(1)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert epochs(1) == (first, second) and epochs(2)[0] != first
    # A run that begins in mid-epoch goes on in the same order; what does not fill a batch is left.
    index = batches(as_data(images), [AS_IS], 4, 5, seed=1, size=8)[0][1]
    assert index == second[4:8]
    assert len(batches(as_data(images), [AS_IS], 0, 4, batch=5, size=8)) == 4
    index = batches(as_data(images), [AS_IS], 2, 3, seed=1, batch=5, size=8)[0][1]
    assert index == second[:5]


@pytest.mark.parametrize("size", [20, 128])
def test_crops_change_from_epoch_to_epoch_and_views_have_their_own_recipes(size):
    save_image("x.png", noise(size, size))
    images = ["x.png"] * 2
    if size == 20:
        images = torch.stack([common.decode("x.png")] * 2)
    recipes = [CROPPED, {**CROPPED, "solarize_p": 1.0}]
    steps = batches(as_data(images, size), recipes, 0, 3, size=size, batch=2)
    again = batches(as_data(images, size), recipes, 1, 3, size=size, batch=2)
    for views, _ in steps:
        assert views[0].amax() > 0.6 and views[1].amax() <= 0.5

    # No two crops of the three epochs are the same.
    plain = torch.cat([views[0] for views, _ in steps]).flatten(1)
    distance = torch.cdist(plain, plain, p=1) / plain.shape[1]
    distance.fill_diagonal_(1)
    assert distance.min() > 0.01
    for (views, index), (views_again, index_again) in zip(steps[1:], again):
        assert torch.equal(views, views_again) and index == index_again


@pytest.mark.parametrize("height, width", [(20, 24), (120, 150)])
def test_views_depend_neither_on_workers_nor_on_processes(height, width):
    data = common.load_data(class_folders("d", height=height, width=width, n=6))
    assert torch.is_tensor(data.train) == (height == 20)
    recipes = [simclr_tc2.STRONG] * 2
    whole = batches(data, recipes, 1, 4)
    parts = [batches(data, recipes, 1, 4, rank, world=2, workers=2) for rank in (0, 1)]
    assert len(whole) == 3
    for (views, index), (first, first_index), (second, second_index) in zip(whole, *parts):
        assert views.shape == (2, 4, 3, 20, 20) and not torch.equal(views[0], views[1])
        assert torch.equal(torch.cat([first, second], dim=1), views)
        assert first_index + second_index == index


def test_the_successor_of_a_bad_file_stands_in():
    flat_folder("d", 3, height=120, width=120)
    write("d/001.png", b"no")
    names = [f"d/{i:03}.png" for i in range(3)]
    files = common.Crops(names, 20, 2, CROPPED, 0)
    crops, index, bad = files[0, 1]
    assert index == 2 and list(bad) == ["d/001.png"] and crops.shape == (2, 3, 20, 20)
    write("d/002.png", b"no")
    assert files[0, 1][1] == 0                          # round the end
    write("d/000.png", b"no")
    crops, index, bad = files[0, 1]
    assert crops is None and sorted(bad) == names


def test_the_search_for_a_file_that_can_be_decoded_ends_before_the_last_of_many(monkeypatch):
    """Where the storage has gone: each worker would else try a million files for each image."""
    tried = []

    def decode(path):
        tried.append(path)
        raise OSError("stale file handle")

    monkeypatch.setattr(common, "decode", decode)
    names = [f"{i}.png" for i in range(5000)]
    crops, _, bad = common.Crops(names, 32, 2, CROPPED, 0)[0, 4990]
    allowed = common.BAD_FRACTION * len(names)
    assert crops is None and allowed < len(bad) == len(tried) < 200
    assert tried[0] == "4990.png" and tried[10] == "0.png"


def test_views_of_a_step_are_held_once():
    """The generator that made them waits while the step runs."""
    args = Namespace(images_per_step=4, image_size=20, seed=0, workers=0)
    images = noise(40, 40)[None].expand(8, -1, -1, -1)
    steps = common.training_batches(as_data(images), [CROPPED] * 2, args, 0, 1, CPU, 0, 2)
    views, _ = next(steps)
    held = [value for value in steps.gi_frame.f_locals.values() if torch.is_tensor(value)]
    assert views.is_floating_point() and not any(x.is_floating_point() for x in held)


def test_a_bad_file_is_named_once_in_all_epochs(capsys):
    flat_folder("d", 4, height=120, width=120)
    write("d/001.png", b"no")
    names = [f"d/{i:03}.png" for i in range(4)]
    steps = batches(as_data(names), [CROPPED], 0, 6, batch=2)
    shown = [i for _, index in steps for i in index]
    assert sorted(shown) == [0] * 3 + [2] * 6 + [3] * 3
    assert capsys.readouterr().err.count("left out: d/001.png cannot be decoded") == 1
    common.decode_all("d", names, 20, 0)                # nor by an evaluation
    assert not capsys.readouterr().err


def test_crops_of_files_are_those_of_random_resized_crop():
    """Where a crop lies is tested with the augmentation; here, that it is what lies there."""
    save_image("x.png", noise(130, 140))
    files = common.Crops(["x.png"], 32, 2, CROPPED, seed=5)
    for epoch in range(3):
        crops, index, bad = files[epoch, 0]
        u = torch.rand(2, common.BOX_DRAWS, generator=common.rng(5, epoch, 0))
        boxes = common.random_boxes(u, 130, 140, CROPPED["crop"], CROPPED["ratio"])
        for crop, box in zip(crops, boxes.int().tolist()):
            expected = TF.resized_crop(noise(130, 140), *box, [32, 32], antialias=True)
            assert torch.equal(crop, expected)
        assert index == 0 and bad == {}


def test_each_view_of_a_file_shows_its_own_crop():
    flat_folder("d", 4, height=130, width=140)
    names = [f"d/{i:03}.png" for i in range(4)]
    files = common.Crops(names, 20, 3, CROPPED, seed=0)
    (views, index), = batches(as_data(names), [CROPPED] * 3, 0, 1)
    assert sorted(index) == [0, 1, 2, 3]
    for j, i in enumerate(index):
        crops, _, _ = files[0, i]
        assert torch.equal((255 * views[:, j]).round(), crops.float())
        assert not torch.equal(crops[0], crops[1])


def test_small_images_stay_in_order_over_several_batches_of_files():
    names = []
    for i in range(600):                            # they are read in batches of 512
        names.append(f"d/{i:03}.png")
        save_image(names[-1], torch.full((3, 4, 4), i % 251, dtype=torch.uint8))
    write("d/300.png", b"no image")
    images, kept = common.decode_all("d", names, 4, 0)
    assert kept == [i for i in range(600) if i != 300] and images.shape == (599, 3, 4, 4)
    assert images[:, 0, 0, 0].tolist() == [i % 251 for i in kept]


def test_worker_processes_share_one_array_of_names():
    """An array without Python objects: a worker that counts references would copy their memory."""
    names = [f"d/train/class{i % 7}/{i}.jpg" for i in range(5000)] + ["d/\udcff\udcfe.jpg", "é"]
    for files in (common.Squares(names, 32), common.Crops(names, 32, 2, CROPPED, 0)):
        assert [os.fsdecode(path) for path in files.paths] == names
        assert not files.paths.dtype.hasobject
        held = [value for value in vars(files).values() if isinstance(value, (list, tuple))]
        assert not held


PROGRAM = """
import simclr_tc2, common, sys
common.draw_grid = common.plot_curves = lambda *args: None
argv = ["--data", sys.argv[1], "--arch", "resnet_tiny", "--image-size", "16", "--batch-size", "4",
        "--epochs", "1", "--workers", "1", "--baseline", "--out", "r"]
common.run(lambda: simclr_tc2.main([*argv, "--max-steps", "1"]))
common.run(lambda: simclr_tc2.main([*argv, "--max-steps", "2"]))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="has only file names that are UTF-8")
def test_names_that_are_not_utf8_without_docstrings_and_with_ascii_output():
    folder = os.fsdecode(b"d\xff")
    class_folders(folder, height=110, width=110, classes=["é", os.fsdecode(b"\xfe")])
    write(f"{folder}/train/é/more.jpg", b"no")
    write(f"{folder}/train/é/notes.txt")
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-OO", "-c", PROGRAM, folder], env=env,
                         capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    assert "goes on from step 1 in r" in run.stdout and "passed over in d\\udcff" in run.stdout
    assert run.stderr.count("d\\udcff/train/\\xe9/more.jpg cannot be decoded (") >= 1


# ---- randomness and schedule ---------------------------------------------------------------------
def test_rng_is_a_function_of_its_key():
    keys = [(0,), (1,), (2,), (12,), (1, 2), (2, 1), (0, 0), (1, 2, 0), (0, 1, 2), (1, 0, 2),
            (2 ** 33,), ("1",), ("a", 1), ("a1",)]
    state = torch.get_rng_state()
    first = torch.stack([torch.rand(8, generator=common.rng(*key)) for key in keys])
    second = torch.stack([torch.rand(8, generator=common.rng(*key)) for key in keys])
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert len(first[:, 0].unique()) == len(keys)


@pytest.mark.parametrize("total, warmup", [(100, 10), (7, 3), (20, 0), (5, 5)])
def test_lr_scale_warms_up_linearly_and_falls_to_zero_as_a_cosine(total, warmup):
    for step in range(total):
        expected = (step + 1) / warmup if warmup else 1
        if step >= warmup:
            expected = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        assert common.lr_scale(step, total, warmup) == pytest.approx(expected)
    assert common.lr_scale(total + 1, total + 1, warmup) == pytest.approx(0)
    assert common.lr_scale(3, 10, 7.5) == pytest.approx(4 / 7.5)
    # The step in which a warm-up of broken length ends does not overshoot.
    assert common.lr_scale(7, 10, 7.5) == 1 and common.lr_scale(0, 10, 0.1) == 1


def make_optimizers():
    a = nn.Parameter(torch.zeros(1))
    b = nn.Parameter(torch.zeros(1))
    c = nn.Parameter(torch.zeros(1))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.4}]
    return {"sgd": torch.optim.SGD(groups, lr=0.1), "adam": torch.optim.Adam([c], lr=0.01)}


def rates(opts, scale):
    common.set_lr(opts, scale)
    found = []
    for opt in opts.values():
        found += [group["lr"] for group in opt.param_groups]
    return found


def test_set_lr_scales_every_group_and_survives_a_checkpoint():
    opts = make_optimizers()
    for scale in (0.5, 0.2, 0.4):
        assert rates(opts, scale) == pytest.approx([0.1 * scale, 0.4 * scale, 0.01 * scale])
    fresh = make_optimizers()
    used = make_optimizers()
    rates(used, 0.3)
    for loaded in (fresh, used):
        for name, opt in loaded.items():
            opt.load_state_dict(opts[name].state_dict())
        assert rates(loaded, 0.7) == pytest.approx([0.07, 0.28, 0.007])


# ---- backbones -----------------------------------------------------------------------------------
@pytest.mark.parametrize("arch, size, width", [
    ("resnet18", 32, 512), ("resnet18", 64, 512), ("resnet18", 128, 512), ("resnet50", 32, 2048),
    ("resnet50", 96, 2048)])
def test_backbone_is_that_of_torchvision_with_the_stem_of_its_image_size(arch, size, width):
    net, dim = common.make_backbone(arch, size)
    reference = getattr(torchvision.models, arch)(weights=None)
    reference.fc = nn.Identity()
    if size <= 96:
        reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    if size <= 32:
        reference.maxpool = nn.Identity()
    last_norms = []
    for m in net.modules():
        if hasattr(m, "downsample"):
            last_norms.append(m.bn3 if arch == "resnet50" else m.bn2)
    assert len(last_norms) == (16 if arch == "resnet50" else 8)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):       # blocks start as identities
            assert bool(m.weight.any()) == (m not in last_norms)
    for m in last_norms:
        nn.init.ones_(m.weight)
    reference.load_state_dict(net.state_dict(), strict=True)

    shapes = []

    def note(module, inputs, out):
        shapes.append(out.shape[2:])

    reference.layer4.register_forward_hook(note)
    x = normal(2, 3, size, size)
    with torch.no_grad():
        out = net.eval()(x)
        torch.testing.assert_close(out, reference.eval()(x), rtol=1e-4, atol=1e-5)
    assert dim == width and out.shape == (2, width) and min(shapes[0]) >= 4


@pytest.mark.parametrize("size", [32, 64])
def test_tiny_backbone_gives_its_feature_dim_and_trains_every_parameter(size):
    net, dim = common.make_backbone("resnet_tiny", size)
    out = net(normal(4, 3, size, size))
    out.square().sum().backward()
    assert out.shape == (4, dim)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def conv_net():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5),
                        nn.BatchNorm1d(5))
    net(normal(6, 3, 6, 6))                         # running statistics away from their start
    return net


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
def test_batch_stats_only_uses_the_batch_leaves_buffers_alone_and_is_undone(breaks, sync):
    net = conv_net()
    twin = conv_net()
    if sync:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    x = 3 + 2 * normal(8, 3, 6, 6, seed=5)
    expected = twin(x)
    try:
        with common.batch_stats_only(net):
            out = net(x)
            # In bfloat16 torch's SyncBatchNorm reads its buffers on a GPU.
            assert net[1].running_mean is not None and net[4].num_batches_tracked is not None
            if breaks:
                raise KeyError
    except KeyError:
        pass
    assert_same_state(dict(net.named_buffers()), dict(conv_net().named_buffers()))
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.pow(3).sum(), list(net.parameters()))
    wanted = torch.autograd.grad(expected.pow(3).sum(), list(twin.parameters()))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)
    net(x)                                          # afterwards statistics are kept again
    assert_same_state(net.state_dict(), twin.state_dict())


# ---- k-NN ----------------------------------------------------------------------------------------
def slow_accuracy(bank, labels, queries, answers, k, metric):
    """One query and one neighbour at a time."""
    hits = 0
    for q, answer in zip(queries, answers.tolist()):
        near = []
        for b, label in zip(bank, labels.tolist()):
            cosine = float(q @ b / q.norm() / b.norm())
            if metric == "cosine":
                near.append((-cosine, label, math.exp(cosine / 0.07)))
            else:
                near.append((float((q - b).norm()), label, 1.0))
        votes = {}
        for _, label, weight in sorted(near)[:k]:
            votes[label] = votes.get(label, 0.0) + weight
        hits += max(votes, key=votes.get) == answer
    return 100 * hits / len(queries)


@pytest.mark.parametrize("metric, k, classes", [
    ("euclidean", 1, 4), ("euclidean", 7, 2), ("cosine", 1, 4), ("cosine", 9, 4)])
def test_knn_accuracy_equals_a_double_loop(metric, k, classes):
    bank = normal(80, 4, seed=1) + 0.5
    queries = normal(60, 4, seed=2) + 0.5
    labels = ((bank[:, 0] > 0.5) + 2 * (bank[:, 1] > 0.5)) % classes
    answers = ((queries[:, 0] > 0.5) + 2 * (queries[:, 1] > 0.5)) % classes
    bank = bank + normal(80, 4, seed=3)             # neither all right nor chance
    queries = queries + normal(60, 4, seed=4)
    accuracy = common.knn_accuracy(bank, labels, queries, answers, k, metric)
    assert isinstance(accuracy, float) and 20 < accuracy < 95
    assert accuracy == pytest.approx(slow_accuracy(bank, labels, queries, answers, k, metric))
    double = common.knn_accuracy(bank.double(), labels, queries.double(), answers, k, metric)
    assert abs(double - accuracy) < 2


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_is_the_sorted_list_and_reads_a_large_bank_in_parts(metric):
    bank = normal(140_000, 3, seed=1) + 0.3
    queries = normal(5, 3, seed=2)
    similarity, index = common.nearest(bank, queries, 20, metric)
    if metric == "cosine":
        expected = nn.functional.cosine_similarity(queries[:, None], bank[None], dim=2)
    else:
        expected = -(queries[:, None].double() - bank[None].double()).norm(dim=2)
    torch.testing.assert_close(similarity, expected.float().topk(20).values, rtol=0, atol=2e-4)
    torch.testing.assert_close(expected.gather(1, index).float(), similarity, rtol=0, atol=2e-4)
    assert all(len(set(row)) == 20 for row in index.tolist())
    assert {i // 65536 for i in index.flatten().tolist()} == {0, 1, 2}


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_knn_keeps_one_copy_of_the_bank(metric):
    bank = normal(200_000, 64)
    labels = torch.arange(200_000) % 10
    with Largest() as largest:
        common.knn_accuracy(bank, labels, bank[:3], labels[:3], 5, metric)
    assert 0 < largest.bytes < bank.numel() * 4 / 2


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_knn_is_full_on_separate_clusters_and_chance_on_random_labels(metric):
    labels = torch.arange(1000) % 10
    answers = torch.arange(1500) % 10               # more than one part of queries
    a = normal(1000, 10)
    b = normal(1500, 10, seed=1)
    bank = 10 * torch.eye(10)[labels] + 0.1 * a
    queries = 10 * torch.eye(10)[answers] + 0.1 * b
    assert common.knn_accuracy(bank, labels, queries, answers, metric=metric) == 100
    chance = common.knn_accuracy(a, labels, b, answers, metric=metric)
    assert abs(chance - 10) < 450 * math.sqrt(0.09 / 1500)


@pytest.mark.parametrize("k, metric, winner", [
    (3, "euclidean", 1),                            # two votes against one
    (3, "cosine", 0),                               # exp(1 / 0.07) > 2 exp(0.9 / 0.07)
    (1, "euclidean", 1), (1, "cosine", 0),          # nearest point and nearest direction differ
    (99, "euclidean", 1), (99, "cosine", 0)])       # k above the bank: everybody votes
def test_knn_votes_by_hand(k, metric, winner):
    bank = torch.tensor([[10.0, 0.0], [0.9, 0.19 ** 0.5], [0.9, -(0.19 ** 0.5)]])
    labels = torch.tensor([0, 1, 1])
    for answer in (0, 1):
        query = torch.tensor([[1.0, 0.0]])
        found = common.knn_accuracy(bank, labels, query, torch.tensor([answer]), k, metric)
        assert found == 100 * (answer == winner)


def test_votes_weigh_cosines_by_temperature_and_ties_go_to_the_lower_class():
    near = torch.tensor([[1.0, 0.9, 0.9]])
    labels = torch.tensor([[0, 1, 1]])
    assert common.vote(near, labels, "cosine", temperature=1.0).tolist() == [1]     # e < 2 exp(0.9)
    assert common.vote(near, labels, "cosine", temperature=0.07).tolist() == [0]
    tied = torch.tensor([[3, 1, 1, 3], [2, 0, 3, 1]])
    for metric in ("euclidean", "cosine"):
        assert common.vote(torch.full((2, 4), 0.5), tied, metric).tolist() == [1, 0]


def test_neighbours_of_nearly_collapsed_features_are_found():
    """Features that spread by 3e-4 around 1: distances by matrix products lose their digits."""
    y = torch.arange(10).repeat(100)
    x = normal(10, 64)[y] + 1.2 * normal(1000, 64, seed=1)
    collapsed = 1 + 3e-4 * x
    usual = common.knn_accuracy(x[:800], y[:800], x[800:], y[800:])
    found = common.knn_accuracy(collapsed[:800], y[:800], collapsed[800:], y[800:])
    assert usual > 85 and abs(found - usual) < 3


# 4000 rows, so that n or n - 1 does not matter; singular values 3 : 1.
FRAME = torch.cat([torch.eye(8), -torch.eye(8)]).repeat(250, 1)
TWO = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])


@pytest.mark.parametrize("statistic, z, value", [
    (common.embedding_std, normal(1, 8).repeat(9, 1), 0.0),
    (common.embedding_std, normal(4000, 32), 1.0),
    (common.embedding_std, FRAME, 1.0),
    (common.embedding_std, FRAME * (normal(4000, 1).abs() + 0.1), 1.0),     # whatever the lengths
    (common.embedding_std, FRAME[::8, :4], 0.5),            # on a line: in one of four dimensions
    (common.effective_rank, FRAME, 8.0),
    (common.effective_rank, 7 * FRAME + 5, 8.0),
    (common.effective_rank, TWO, 4 / 3 ** 0.75),
    (common.effective_rank, normal(20, 1) @ normal(1, 6, seed=1) + 5, 1.0),
    (common.effective_rank, torch.ones(9, 4), 1.0),         # collapsed
])
def test_collapse_statistics_have_their_closed_forms(statistic, z, value):
    tolerance = 0.01 if z.shape[1] == 32 else 2e-3
    assert float(statistic(z)) == pytest.approx(value, abs=tolerance)


# ---- features and monitor ------------------------------------------------------------------------
def test_large_images_are_resized_to_eight_sevenths_and_cut_to_the_middle():
    image = noise(120, 160)
    save_image("x.png", image)
    recipe = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    net = nn.Flatten().train()
    found, kept = common.extract_features(net, "d", ["x.png"], 112, recipe, 0, CPU)
    middle = TF.center_crop(TF.resize(image, [128], antialias=True), [112, 112])
    expected = TF.normalize(middle.float() / 255, recipe["mean"], recipe["std"])
    torch.testing.assert_close(found, expected.flatten()[None], rtol=0, atol=1e-5)
    assert kept.tolist() == [0] and net.training

    # Of small ones, all.
    found, _ = common.extract_features(net, "d", ["x.png"], 32, AS_IS, 0, CPU)
    middle = TF.center_crop(TF.resize(image, [32], antialias=True), [32, 32])
    torch.testing.assert_close(found, middle.flatten()[None] / 255, rtol=0, atol=1e-5)


def test_features_do_not_depend_on_workers_and_keep_the_places_of_their_images(capsys):
    flat_folder("d", 9, height=100, width=100)
    write("d/004.png", b"no")
    names = [f"d/{i:03}.png" for i in range(9)]
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 32 * 32)).train()
    one, kept = common.extract_features(net, "d", names, 32, AS_IS, 0, CPU)
    two, kept_too = common.extract_features(net, "d", names, 32, AS_IS, 2, CPU)
    assert torch.equal(one, two) and kept.tolist() == kept_too.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert net[1].num_batches_tracked == 0 and one.shape == (8, 3 * 32 * 32)


def test_features_of_large_images_are_taken_in_smaller_batches():
    """The memory of an evaluation does not follow --batch-size."""
    for size, expected in ((32, [300]), (112, [128, 128, 44])):
        seen = []

        def note(net, inputs, out):
            seen.append(len(out))

        net = nn.Sequential(nn.Flatten())
        net.register_forward_hook(note)
        images = torch.zeros(300, 3, size, size, dtype=torch.uint8)
        found, kept = common.extract_features(net, "d", images, size, AS_IS, 0, CPU)
        assert seen == expected and kept.tolist() == list(range(300)) and len(found) == 300


def test_the_monitor_keeps_labels_with_their_images_and_passes_over_those_without(capsys):
    labels = torch.randint(-1, 2, (300,), generator=common.rng(1))
    gray = (60 + 120 * labels.clamp(min=0)).to(torch.uint8)
    images = gray[:, None, None, None].repeat(1, 3, 8, 8)
    images[labels < 0] = noise(8, 8)
    args = Namespace(image_size=8, workers=0)
    data = common.Data("d", images[:200], labels[:200], images[200:], labels[200:], 8, "ab", "d")
    found = common.monitor(None, data, args, AS_IS, CPU)
    assert found == {"knn5": 100, "knn200_cosine": found["knn200_cosine"]}
    assert common.monitor(None, data._replace(test_labels=None), args, AS_IS, CPU) == {}

    for i, image in enumerate(images):
        save_image(f"d/{i:03}.png", image)
    for part in (range(200), range(200, 300)):
        bad = next(i for i in part if labels[i] == 1)
        write(f"d/{bad:03}.png", b"no")
    names = [f"d/{i:03}.png" for i in range(300)]
    data = data._replace(train=names[:200], test=names[200:])
    found = common.monitor(nn.Flatten(), data, args, AS_IS, CPU)
    assert found["knn5"] == 100 and found["rank_h"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("device, bank, queries", [("cpu", 4000, 2000), ("cuda", 20000, 10000)])
def test_every_subset_of_the_monitor_has_all_classes(device, bank, queries, monkeypatch):
    """Files come class by class."""
    train_labels = torch.arange(25000) // 2500
    test_labels = torch.arange(12000) // 1200
    names = [""] * 25000
    data = common.Data("x", names, train_labels, names[:12000], test_labels, 8, None, "x")
    seen = []

    def extract(net, name, images, *rest):
        return torch.zeros(len(images), 2), torch.arange(len(images))

    def accuracy(features, labels, query_features, query_labels, **kw):
        seen.extend([labels, query_labels])
        return 0.0

    monkeypatch.setattr(common, "extract_features", extract)
    monkeypatch.setattr(common, "knn_accuracy", accuracy)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args: x)     # no GPU is needed for it
    common.monitor(None, data, Namespace(image_size=8, workers=0), AS_IS, torch.device(device))
    assert [len(labels) for labels in seen[:2]] == [bank, queries]
    for labels in seen:
        assert labels.bincount(minlength=10).min() > len(labels) / 10 * 0.8


# ---- real images ---------------------------------------------------------------------------------
SAMPLE = os.path.join(ROOT, "..", "shared", "data", "imagenet_sample.tar")


@pytest.mark.skipif(not os.path.exists(SAMPLE), reason="no photographs in ../shared/data")
def test_real_photographs_are_read_as_pillow_reads_them():
    import tarfile
    with tarfile.open(SAMPLE) as tar:
        members = [m for m in tar.getmembers() if m.isfile()][::20]
        for member in members:
            write("x.JPEG", tar.extractfile(member).read())
            expected = np.asarray(Image.open("x.JPEG").convert("RGB")).astype(int)
            found = common.decode("x.JPEG").permute(1, 2, 0).numpy().astype(int)
            assert found.shape == expected.shape
            assert np.abs(found - expected).mean() < 1
    assert len(members) == 10


# ---- the monitor's numbers -----------------------------------------------------------------------
def test_the_monitor_has_five_and_two_hundred_neighbours_and_the_rank_of_the_test_images(
        monkeypatch):
    asked = []
    nearest = common.nearest

    def spy(bank, queries, k, metric):
        asked.append((k, metric))
        return nearest(bank, queries, k, metric)

    monkeypatch.setattr(common, "nearest", spy)
    data = common.load_data("fake", 8)
    found = common.monitor(nn.Flatten(), data, Namespace(image_size=8, workers=0), AS_IS, CPU)
    assert asked == [(5, "euclidean"), (200, "cosine")]
    x = data.test.flatten(1) / 255
    assert found["rank_h"] == pytest.approx(common.effective_rank(x).item(), rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_features_leave_the_mode_of_the_network_as_it_was(training):
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)).train(training)
    common.extract_features(net, "x", common.load_data("fake", 8).test, 8, AS_IS, 0, CPU)
    assert net.training == net[1].training == training


def test_images_of_96_px_count_as_small_when_they_are_cut():
    image = noise(120, 96)
    save_image("x.png", image)
    found, _ = common.extract_features(nn.Flatten(), "d", ["x.png"], 96, AS_IS, 0, CPU)
    expected = TF.center_crop(image, [96, 96]) / 255
    torch.testing.assert_close(found.view(3, 96, 96), expected)
