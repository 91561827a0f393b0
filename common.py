"""What all four scripts need: flags, data, augmentation, backbones, k-NN, processes, log.

Read a script first and come here only for the how. The file is ordered as data travels; what a
script calls, by section:

  flags         base_parser, number, parse, fill_from_recipe, check_shared_flags; fail, say
  randomness    rng, lr_scale, set_lr
  data          load_data, training_batches
  augmentation  augment, which training_batches calls
  backbones     make_backbone, batch_stats_only, at_least_float32
  k-NN monitor  monitor, embedding_std, effective_rank
  processes     setup_processes, world_size, all_reduce_sum, gather_batch, average_gradients
  checkpoint    open_run, save_run
  log           Log: add at every step, write every few, event for an evaluation
  signals       graceful_stop, run
  pictures      draw_views, draw_grid

All else serves these. No method's recipe lives here, nothing here calls back into a script, and
importing it has no side effect.

Every random draw is a function of a key, see `rng`. No generator state is ever saved, and a resumed
run equals an uninterrupted one: to the bit on a CPU, up to the order of its sums on a GPU.
"""
import argparse
import collections
import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import typing

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from torchvision.transforms.v2 import functional as TF

SMALL = 96              # images up to this side live on the device and get the 3x3 stem
BAD_FRACTION = 0.01     # a run goes on without this share of undecodable images

# These settings do not change what is computed. The data are compared by their file names.
FREE_ON_RESUME = {"data", "out", "workers", "log_every", "eval_every", "max_steps", "compile"}


# ---- flags ---------------------------------------------------------------------------------------
def fail(sentence):
    """Bad input: one sentence on stderr, exit status 2, no traceback."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def say(line):
    """Print once, however many processes there are."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def number(kind, low, high=math.inf):
    """argparse type: a finite number of `kind` from low to high, both included."""
    noun = "a whole number" if kind is int else "a number"
    span = f"of at least {low}" if high == math.inf else f"from {low} to {high}"

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {span}")
    return parse


def default_workers():
    """This process's share of the cores that its job may use, at most 16."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def base_parser(doc, recipes, archs):
    """The flags that all scripts share. What is left open, `fill_from_recipe` fills in."""
    names = "".join(f"{name:>14}" for name in recipes)
    table = ["recipes, chosen by --data and --image-size; flags without a default take theirs:",
             f"{'':>16}{names}"]
    for key in recipes["shapes"]:
        values = "".join(f"{str(recipe[key]):>14}" for recipe in recipes.values())
        table.append(f"{key:>16}{values}")

    p = Parser(description=(doc or "").split("\n")[0], epilog="\n".join(table), allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", default="shapes", help="shapes (drawn in memory, the default) | cifar10 | "
        "cifar100 | stl10 | fake | folder with train/ and val/ or test/ of class folders | "
        "any other folder of images, without labels")
    add("--out", help="folder of all that the run leaves (default: runs/<script>)")
    add("--arch", choices=archs, help="backbone")
    add("--image-size", type=number(int, 8),
        help="pixels (default: the images' own size up to 96, else 224)")
    add("--epochs", type=number(int, 1), help="passes over the training images")
    add("--batch-size", type=number(int, 2), help="images per batch, over all processes")
    add("--lr", type=number(float, 0), help="peak learning rate at this batch size")
    add("--weight-decay", type=number(float, 0), help="0 = none")
    add("--warmup-epochs", type=number(float, 0),
        help="linear, then cosine to 0; 0 = none (default: the recipe's; a tenth of --epochs if "
        "that is too long)")
    add("--workers", type=number(int, 0), default=default_workers(),
        help="processes that decode files (default: the cores, up to 16)")
    add("--seed", type=number(int, 0, 2 ** 63), default=0,
        help="of weights, data order and augmentation (default: 0)")
    add("--device", choices=("cuda", "mps", "cpu"),
        help="default: cuda where there is one, else cpu; mps is untested")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None,
        help="bfloat16 forward passes, losses in float32 (default: where a GPU has it)")
    add("--sync-bn", action="store_true",
        help="BatchNorm over the GPUs of all processes (torch's SyncBatchNorm)")
    add("--compile", action="store_true", help="torch.compile the backbone")
    add("--log-every", type=number(int, 1), default=10, help="steps (default: 10)")
    add("--eval-every", type=number(int, 1), help="epochs between k-NN evaluations")
    add("--max-steps", type=number(int, 0), default=0,
        help="stop after this step of the unchanged schedule; 0 = no limit (default)")
    add("--baseline", action="store_true",
        help="the base method alone: same initial weights, data order, augmentation")
    return p


def parse(p, argv, of_enhancement):
    """The flags in argv. Those of the enhancement that --baseline leaves aside are named."""
    args = p.parse_args(argv)
    idle = [name for name in of_enhancement if getattr(args, name) != p.get_default(name)]
    if args.baseline and idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        say(f"with --baseline these do nothing: {flags}")
    return args


def recipe_name(data_name, image_size):
    """Which of a script's RECIPES and AUGMENTATION belongs to these images."""
    if data_name == "shapes":
        return "shapes"
    return "small" if image_size <= SMALL else "imagenet"


def fill_from_recipe(args, recipes, data, device, script):
    """Fill the flags left open, most of them from the recipe of the data."""
    if args.image_size is None:
        args.image_size = data.size if data.size <= SMALL else 224
    recipe = recipe_name(data.name, args.image_size)

    warmup_is_open = args.warmup_epochs is None
    for key, value in recipes[recipe].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if warmup_is_open and args.warmup_epochs >= args.epochs:
        args.warmup_epochs = args.epochs / 10

    suffix = "-baseline" if args.baseline else ""
    args.out = os.path.expanduser(args.out or f"runs/{script}{suffix}")
    args.script = script
    args.device = device.type
    if args.bf16 is None:
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        args.bf16 = device.type == "cuda" and supported


def check_shared_flags(args, data, world):
    """Settings that go wrong in every script end in a sentence."""
    if args.images_per_step > len(data.train):
        tasks = " or --tasks" if args.images_per_step > args.batch_size else ""
        fail(f"--batch-size {args.batch_size}: one step takes {args.images_per_step} images, "
             f"there are only {len(data.train)} training images; lower it{tasks}")
    folder = os.path.realpath(os.path.expanduser(args.data))
    if args.data not in BUILT_IN and os.path.realpath(args.out) == folder:
        fail(f"--out {args.out}: is the folder of the images, which the run's pictures would join")
    if args.warmup_epochs > args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs}: more than --epochs {args.epochs}")
    if args.sync_bn and (args.device != "cuda" or world == 1):
        fail("--sync-bn: needs several processes, one GPU each")


# ---- randomness and schedule ---------------------------------------------------------------------
def rng(*key):
    """CPU generator that is a function of the numbers and strings `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def lr_scale(step, total, warmup):
    """Linear warm-up to 1 over `warmup` steps, then half a cosine to 0 at step `total`."""
    if step < warmup:
        return min(1, (step + 1) / warmup)          # warmup need not be whole
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(opts, scale):
    """lr = base_lr * scale. Groups are looked up each time: `load_state_dict` replaces them."""
    for opt in opts.values():
        for group in opt.param_groups:
            base_lr = group.setdefault("base_lr", group["lr"])
            group["lr"] = base_lr * scale


# ---- data ----------------------------------------------------------------------------------------
class Data(typing.NamedTuple):
    """What --data names."""
    name: str
    train: typing.Any           # uint8 (N, 3, S, S), or a list of file names
    train_labels: typing.Any    # int64 (N,), -1 = none; or None
    test: typing.Any
    test_labels: typing.Any
    size: int                   # side of the images in pixels; of large ones, the median
    classes: typing.Any         # their names, or None
    fingerprint: str            # of class and file names: resume compares it


SHAPES = ["disc", "ring", "square", "frame", "triangle", "cross", "star", "moon", "stripes",
          "checks"]


def draw_shapes(n, seed):
    """n drawn images of ten classes: (uint8 (n, 3, 32, 32), int64 (n,)).

    Each is a wallpaper of one small figure with random turn, scale, shift, colours, shading, noise.
    A crop shows the figure too, so its class survives augmentation; pixels tell it badly."""
    g = rng(seed)
    label = torch.arange(n) % len(SHAPES)
    u = torch.rand(n, 7, 1, 1, generator=g)
    turn, scale, shift_a, shift_b, dark, light_x, light_y = u.unbind(1)

    # a, b: coordinates within a tile, turned; r, box: distances from its centre.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    turn = 2 * math.pi * turn
    half = 0.3 + 0.3 * scale
    a = (turn.cos() * x - turn.sin() * y) / half + 2 * shift_a
    b = (turn.sin() * x + turn.cos() * y) / half + 2 * shift_b
    a = 1.15 * (a % 2 - 1)
    b = 1.15 * (b % 2 - 1)
    r = (a ** 2 + b ** 2).sqrt()
    box = torch.maximum(a.abs(), b.abs())

    # How deep inside the figure a pixel lies, in half tiles; negative outside.
    depth = {
        "disc": 0.95 - r,
        "ring": 0.2 - (r - 0.7).abs(),
        "square": 0.8 - box,
        "frame": 0.17 - (box - 0.7).abs(),
        "triangle": 0.5 - torch.maximum(-b, 0.87 * a.abs() + 0.5 * b),
        "cross": torch.minimum(0.3 - torch.minimum(a.abs(), b.abs()), 1 - box),
        "star": 0.65 + 0.35 * torch.cos(5 * torch.atan2(b, a)) - r,
        "moon": torch.minimum(1 - r, ((a - 0.5) ** 2 + b ** 2).sqrt() - 0.8),
        "stripes": 0.4 - b.abs(),
        "checks": 0.3 * torch.sin(math.pi * a / 1.15) * torch.sin(math.pi * b / 1.15),
    }
    depth = torch.stack([depth[name] for name in SHAPES])[label, torch.arange(n)]
    mask = (depth * 14 * half + 0.5).clamp(0, 1)[:, None]

    # The figure is lighter than the ground, or darker, by half of the range; both have a tint.
    tint = 0.15 * torch.rand(2, n, 3, 1, 1, generator=g) - 0.075
    ink = torch.where(dark < 0.5, 0.25, -0.25)[:, None]
    figure = ink + tint[0]
    ground = ink + tint[1]
    shade = 0.3 * ((light_x - 0.5) * x + (light_y - 0.5) * y)[:, None]
    noise = 0.06 * torch.randn(n, 3, 32, 32, generator=g)
    image = 0.5 + mask * figure - (1 - mask) * ground + (shade + noise)
    return (image.clamp(0, 1) * 255).byte(), label


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif",
                  ".avif")
GIGAPIXEL = 10 ** 9


def decode(path):
    """The image in a file, upright: uint8 (3, H, W). OSError, with the reason, if there is none."""
    # One limit for all formats, in place of Pillow's own, which PNGs with long texts exceed.
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = GIGAPIXEL
    PngImagePlugin.MAX_TEXT_MEMORY = GIGAPIXEL
    try:
        with Image.open(path) as image:
            if image.width * image.height > GIGAPIXEL:
                raise OSError("more than a gigapixel")
            if image.format in ("JPEG", "MPO"):         # a telephone's JPEG with a second image
                # Fast, but not for every file or name, and not in every build of torchvision.
                with contextlib.suppress(RuntimeError, AttributeError):
                    return torchvision.io.decode_image(path, "RGB", apply_exif_orientation=True)

            deep = image.mode == "I" and image.format in ("PNG", "PPM")
            deep = deep or image.mode.startswith("I;16")
            image = ImageOps.exif_transpose(image)
            if deep:
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise OSError("neither 8 nor 16 bits per channel")
            return TF.pil_to_tensor(image.convert("RGB"))
    except Exception as error:                  # Pillow raises a dozen types for broken files
        raise OSError(str(error) or type(error).__name__) from error


def central_square(images, size, resize=None):
    """Shorter side to `resize` (default `size`), antialiased, then the central square of `size`."""
    h, w = images.shape[-2:]
    if max(h, w) > 3 * min(h, w):               # a strip would be resized to gigabytes
        images = TF.center_crop(images, [min(h, 3 * w), min(w, 3 * h)])
    images = TF.resize(images, [resize or size], antialias=True)
    return TF.center_crop(images, [size, size])


class Squares(torch.utils.data.Dataset):
    """Item i: (central square of file i, uint8 (3, S, S), or None; i; {path: why not})."""
    def __init__(self, paths, size, resize=None):
        # An array, whose memory forked workers share: the names in a list would be copied to each.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.size = size
        self.resize = resize

    def __getitem__(self, i):
        path = os.fsdecode(self.paths[i])
        try:
            image = decode(path)
        except OSError as error:
            return None, i, {path: str(error)}
        return central_square(image, self.size, self.resize), i, {}


class Crops(torch.utils.data.Dataset):
    """Item (epoch, i): (a random crop of file i per view, uint8 (m, 3, S, S); i; {path: why not}).

    The next file that can be decoded stands in for one that cannot."""
    def __init__(self, paths, size, views, augmentation, seed):
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.size = size
        self.views = views
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, key):
        epoch, first = key
        bad = {}
        # A few more than may be bad: if the storage has gone, no file at all can be decoded.
        tries = min(len(self.paths), 100 + math.ceil(BAD_FRACTION * len(self.paths)))
        for i in range(first, first + tries):
            i = i % len(self.paths)
            path = os.fsdecode(self.paths[i])
            try:
                image = decode(path)
            except OSError as error:
                bad[path] = str(error)
                continue
            u = torch.rand(self.views, BOX_DRAWS, generator=rng(self.seed, epoch, first))
            boxes = random_boxes(u, *image.shape[1:], self.augmentation["crop"],
                                 self.augmentation["ratio"])
            size = [self.size, self.size]
            crops = [TF.resized_crop(image, *box, size, antialias=True)
                     for box in boxes.int().tolist()]
            return torch.stack(crops), i, bad
        return None, first, bad


def join_items(items):
    """Items of a data set -> (images (n, ...) or None, n indices, {path: why not})."""
    images, index, bad = [], [], {}
    for image, i, complaints in items:
        bad.update(complaints)
        if image is not None:
            images.append(image)
            index.append(i)
    return torch.stack(images) if images else None, index, bad


def leave_signals_to_the_main_process(worker):
    """It ends its workers itself: Ctrl-C and a group's SIGTERM must not cost the batch at work."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


named_files = set()     # bad ones: this process names each once


def read_files(name, files, batches, workers, device):
    """Yield (images (n, ...) on `device`, their n indices) of `files`, a Squares or Crops.

    A file that cannot be decoded is named, with the reason; too many of `files` end the run."""
    # Python 3.14 no longer forks by default. Workers would start slowly, and a signal that comes
    # before `leave_signals_to_the_main_process` has run would kill them.
    how = "fork" if workers and sys.platform == "linux" else None
    loader = torch.utils.data.DataLoader(
        files, batch_sampler=batches, num_workers=workers, collate_fn=join_items,
        worker_init_fn=leave_signals_to_the_main_process, multiprocessing_context=how,
        pin_memory=device.type == "cuda")
    n = len(files.paths)
    allowed = min(math.ceil(BAD_FRACTION * n), n - 1)       # one image at least has to be left
    left_out = set()
    for images, index, bad in loader:
        for path in sorted(set(bad) - named_files):
            print(f"left out: {path} cannot be decoded ({bad[path]})", file=sys.stderr)
        named_files.update(bad)
        left_out.update(bad)
        if len(left_out) > allowed:
            fail(f"--data {name}: over {BAD_FRACTION:.0%} of {n} images cannot be decoded")
        if images is not None:
            yield images.to(device, non_blocking=True), index


def square_batches(name, images, size, workers, device, resize=None):
    """Yield (uint8 (n, 3, S, S) on `device`, their n indices) in order, nothing random.

    images: a uint8 tensor (N, 3, H, W) or a list of file names."""
    batch = 512 if size <= SMALL else 128               # a ResNet-50 at 224 px needs 10 MB an image
    chunks = [index.tolist() for index in torch.arange(len(images)).split(batch)]
    if torch.is_tensor(images):
        for index in chunks:
            yield central_square(images[index].to(device), size), index
    else:
        yield from read_files(name, Squares(images, size, resize), chunks, workers, device)


def list_images(folder):
    """Sorted names, relative to `folder`, of the images at every depth below it.

    Left out: names that begin with a dot, Synology's @eaDir, folders met a second time by a link,
    and runs of these scripts, which hold pictures. Files of other kinds are counted in one line."""
    names, others, seen = [], collections.Counter(), {}
    prefix = os.path.join(folder, "")
    for where, folders, files in os.walk(folder, onerror=say, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            say(f"passed over: {where} is {seen[real]} again, by a link")
            folders.clear()
            continue
        if where != folder and {"log.jsonl", "views.png"} <= set(files):
            say(f"passed over: {where} is a run")
            folders.clear()
            continue
        seen[real] = where
        folders[:] = sorted(f for f in folders if not f.startswith((".", "@eaDir")))
        for file in files:
            if file.startswith("."):
                continue
            suffix = os.path.splitext(file)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                names.append(os.path.join(where, file).removeprefix(prefix))
            else:
                others[suffix or "without a suffix"] += 1
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(9))
        say(f"passed over in {folder}: {others.total()} files ({counts})")
    return sorted(names)


def list_classes(folder):
    """(file names, labels int64 (N,), class names) of a folder of class folders."""
    found = list_images(folder)
    names = [name for name in found if os.sep in name]
    if names and len(names) < len(found):
        say(f"passed over in {folder}: {len(found) - len(names)} images in no class folder")
    class_of = [name.split(os.sep)[0] for name in names]
    classes, labels = np.unique(class_of, return_inverse=True)
    return names, torch.from_numpy(labels), classes.tolist()


def find_splits(name):
    """(training folder, test folder) in `name`; the second is None for images without classes."""
    try:
        entries = os.listdir(name)
    except OSError as error:
        fail(f"--data {name}: cannot be read ({error.strerror})")
    splits = [entry for entry in entries if entry.lower() in ("train", "val", "test")]
    splits = [entry for entry in splits if os.path.isdir(os.path.join(name, entry))]
    for entry in splits:
        if entry != entry.lower():
            fail(f"--data {name}: has a folder {entry}/; rename it to {entry.lower()}/")
    if not splits:
        return name, None

    train = os.path.join(name, "train")
    test = os.path.join(name, "val" if "val" in splits else "test")
    if "train" not in splits:
        fail(f"--data {name}: has {splits[0]}/ but no train/ folder")
    if splits == ["train"]:
        fail(f"--data {name}: has train/ but neither val/ nor test/; to train without labels "
             f"name {train}")
    if os.path.realpath(train) == os.path.realpath(test):
        fail(f"--data {name}: {test} is {train} by a link; its accuracy would mean nothing")
    return train, test


def load_folder(name, image_size, workers):
    """A folder of images, with or without classes, as `Data`."""
    train_dir, test_dir = find_splits(name)
    test = []
    train_labels = test_labels = classes = None
    if test_dir is None:
        train = list_images(train_dir)
    else:
        train, train_labels, classes = list_classes(train_dir)
        test, test_labels, test_classes = list_classes(test_dir)
        unshared = sorted(set(classes) ^ set(test_classes))
        if unshared:
            fail(f"--data {name}: {train_dir} and {test_dir} must have the same class folders with "
                 f"images; only one of them has {', '.join(unshared[:5])}")
    if not train:
        where = "in a class folder of" if test_dir else "in"
        fail(f"--data {name}: there is no image {where} {train_dir}")
    listing = "\n".join([*(classes or []), *train, *test])
    fingerprint = hashlib.sha256(os.fsencode(listing)).hexdigest()[:12]
    train = [os.path.join(train_dir, file) for file in train]
    test = [os.path.join(test_dir, file) for file in test]

    # The size of the images is the median of a sample's shorter sides.
    shapes = {}
    for path in train[::math.ceil(len(train) / 64)]:
        with contextlib.suppress(OSError):          # named, and counted, when all files are read
            shapes[path] = decode(path).shape[-2:]
    if not shapes:
        fail(f"--data {name}: cannot decode {train[0]}")
    size = int(np.median([min(shape) for shape in shapes.values()]))
    if size <= SMALL:
        # They are read once, and all have one size. Labels follow those that can be decoded.
        size = image_size or size
        other = [path for path, shape in shapes.items() if shape != (size, size)]
        if other and not image_size:
            height, width = shapes[other[0]]
            say(f"not all images are {size} x {size} ({other[0]} is {width} x {height}): they are "
                "resized and cut to that, the median of the shorter sides; --image-size chooses "
                "another")
        train, kept = decode_all(name, train, size, workers)
        if classes:
            train_labels = train_labels[kept]
            test, kept = decode_all(name, test, size, workers)
            test_labels = test_labels[kept]
    return Data(name, train, train_labels, test, test_labels, size, classes, fingerprint)


def pick(images, rows):
    """The images at `rows`, from a tensor or a list of file names."""
    if torch.is_tensor(images):
        return images[rows]
    return [images[i] for i in rows.tolist()]


def decode_all(name, paths, size, workers):
    """(uint8 (n, 3, S, S), their n indices) of the files that can be decoded."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    kept = []
    for batch, index in square_batches(name, paths, size, workers, images.device):
        images[len(kept):len(kept) + len(index)] = batch
        kept += index
    return images[:len(kept)], kept


def load_torchvision(name):
    """One of torchvision's data sets, downloaded to .data/ if need be, as `Data`."""
    several = world_size() > 1
    downloads = int(os.environ.get("LOCAL_RANK", 0)) == 0       # the first process of a machine
    if several and not downloads:
        dist.barrier()                              # until the files are there
    kind = getattr(torchvision.datasets, name.upper())
    splits = ("train+unlabeled", "test") if name == "stl10" else (True, False)
    try:
        train = kind(".data", splits[0], download=True)
        test = kind(".data", splits[1], download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        fail(f"--data {name}: not found under .data/, and the download failed ({reason})")
    if several and downloads:
        dist.barrier()                              # they are: the others go on

    def tensors(dataset):
        images = torch.as_tensor(dataset.data)
        if name == "stl10":
            return images, torch.as_tensor(dataset.labels).long()
        images = images.movedim(3, 1).contiguous()          # CIFAR's channels come last
        return images, torch.as_tensor(dataset.targets).long()

    images, labels = tensors(train)
    test_images, test_labels = tensors(test)
    return Data(name, images, labels, test_images, test_labels, size=images.shape[-1],
                classes=train.classes, fingerprint=name)


BUILT_IN = ("shapes", "cifar10", "cifar100", "stl10", "fake")


def load_data(name, image_size=None, workers=0):
    """Everything that --data can name, as `Data`. Bad input ends in `fail`."""
    if name in BUILT_IN and os.path.isdir(name):
        say(f"--data {name}: the built-in data; the folder of that name is ./{name}")
    folder = os.path.expanduser(name)
    if name == "shapes":
        data = Data(name, *draw_shapes(4000, 1), *draw_shapes(1000, 2), 32, SHAPES, name)
    elif name == "fake":
        x = torch.randint(256, (640, 3, 32, 32), generator=rng("fake"), dtype=torch.uint8)
        y = torch.arange(640) % 10
        data = Data(name, x[:512], y[:512], x[512:], y[512:], 32, list("0123456789"), name)
    elif name in BUILT_IN:
        data = load_torchvision(name)
    elif os.path.isdir(folder):
        data = load_folder(folder, image_size, workers)
    else:
        fail(f"--data {name}: no such folder, and not one of {', '.join(BUILT_IN)}")

    if image_size and torch.is_tensor(data.train):
        data = data._replace(train=central_square(data.train, image_size), size=image_size)
        if data.test_labels is not None:
            data = data._replace(test=central_square(data.test, image_size))
    return data


def training_batches(data, augmentations, args, rank, world, device, start, stop):
    """Yield, for each step in [start, stop), (views, index): this process's share of the batch.

    Of args it reads images_per_step, image_size, seed and workers; of data, name and train.
    augmentations: one for each view. views (m, n, 3, S, S) float; index: the n images they show.
    Files are cropped, for all views, by the first augmentation's crop and ratio.
    Order = f(seed, epoch), crops of files = f(seed, epoch, image), all else = f(seed, step, view):
    the views depend neither on the number of processes, nor on workers or the device."""
    batch_size = args.images_per_step
    per_epoch = len(data.train) // batch_size
    n = batch_size // world
    share = slice(rank * n, (rank + 1) * n)

    def batches():
        """For each step the keys (epoch, i) of this process's images, see `Crops`."""
        for step in range(start, stop):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == start:
                order = torch.randperm(len(data.train), generator=rng(args.seed, epoch))
            of_all = order[batch * batch_size:(batch + 1) * batch_size]
            yield [(epoch, i) for i in of_all[share].tolist()]

    def from_memory():
        train = data.train.to(device)
        for keys in batches():
            index = [i for _, i in keys]
            images = train[to_device(torch.tensor(index), device)]
            yield images[:, None].expand(-1, len(augmentations), -1, -1, -1), index

    if torch.is_tensor(data.train):
        loader = from_memory()
        size = args.image_size
    else:
        files = Crops(data.train, args.image_size, len(augmentations), augmentations[0], args.seed)
        loader = read_files(data.name, files, batches(), args.workers, device)
        size = None                             # they were cropped when they were read

    def views_of(images, step):
        # The draws are made for the joined batch of all processes, each takes its share. The key
        # has a fourth number, so that it differs from every (seed, epoch, i) of `Crops`.
        views = []
        for v, augmentation in enumerate(augmentations):
            g = rng(args.seed, step, v, 0)
            colour_order = torch.randperm(4, generator=g).tolist()
            u = torch.rand(batch_size, AUGMENT_DRAWS, generator=g)[share]
            view = augment(images[:, v], to_device(u, device), colour_order, augmentation, size)
            views.append(view)
        return torch.stack(views)

    # Nothing here holds the views while the step runs, or each would be in memory twice.
    for step, (images, index) in enumerate(loader, start):
        yield views_of(images, step), index


# ---- augmentation: batched, one draw per sample --------------------------------------------------
BOX_DRAWS = 22          # random numbers of a box: ten tries of area and of aspect ratio, a position
AUGMENT_DRAWS = 32      # random numbers of a view: those of its box, and ten more


def random_boxes(u, height, width, scale, ratio):
    """Boxes (n, 4) of top, left, height, width, by the rule of torchvision's RandomResizedCrop.

    u (n, BOX_DRAWS) uniform in [0, 1); scale: the range of the share of the image's area; ratio:
    the range of width / height. The first of ten tries that fits counts. In strips often none does:
    then it is the largest box of an allowed ratio, at a random place, torchvision's is central."""
    area = (scale[0] + (scale[1] - scale[0]) * u[:, :10]) * height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(log_low + (log_high - log_low) * u[:, 10:20])
    w = (area * aspect).sqrt().round()
    h = (area / aspect).sqrt().round()
    # An eleventh try, which always fits.
    w = F.pad(w, (0, 1), value=min(width, round(height * ratio[1])))
    h = F.pad(h, (0, 1), value=min(height, round(width / ratio[0])))

    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    w = w.gather(1, first).squeeze(1)
    h = h.gather(1, first).squeeze(1)
    top = (u[:, 20] * (height - h + 1)).floor()
    left = (u[:, 21] * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=1)


def crop_resize(x, boxes, size):
    """Box i of image i, enlarged: x (n, 3, H, W), boxes (n, 4) -> (n, 3, size, size).

    A box of more pixels than `size` would be sampled, not averaged; images in memory have none."""
    top, left, h, w = boxes.T[..., None]
    centre = (torch.arange(size, device=x.device) + 0.5) / size     # of the new pixels, 0 to 1
    rows = (top + h * centre) / x.shape[2]                          # (n, size), 0 to 1
    columns = (left + w * centre) / x.shape[3]

    rows = rows[:, :, None].expand(-1, -1, size)
    columns = columns[:, None, :].expand(-1, size, -1)
    places = 2 * torch.stack([columns, rows], dim=3) - 1            # (n, size, size, 2), -1 to 1
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)


def luma(x):
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def brightness(x, factor):
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def contrast(x, factor):
    mean = luma(x.mean((2, 3), keepdim=True))
    return torch.lerp(mean, x, factor[:, None, None, None]).clamp_(0, 1)


def saturation(x, factor):
    return torch.lerp(luma(x), x, factor[:, None, None, None]).clamp_(0, 1)


def hue(x, turn):
    """Turn the hue of image i by turn_i turns, in [-0.5, 0.5]: RGB -> HSV -> RGB.

    Red lies at 0 turns, green at 1/3, blue at 2/3. A channel is highest up to 1/6 turn from its own
    hue, lowest from 1/3 turn on, linear between."""
    r, g, b = x.unbind(1)
    low = x.amin(1)
    high = x.amax(1)
    chroma = (high - low).clamp(min=1e-6)
    sextant = choose(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4)
    sextant = choose(high == r, (g - b) / chroma, sextant)
    angle = sextant / 6 + turn[:, None, None]

    # near: 1/2 at the channel's own hue, 0 at the opposite one. Two turns more: frac needs >= 0.
    own = torch.arange(3, device=x.device)[:, None, None] / 3
    near = (angle[:, None] + (2 - own)).frac_().sub_(0.5).abs_()
    share = near.mul_(6).sub_(1).clamp_(0, 1)
    return torch.lerp(low[:, None], high[:, None], share)


def gaussian_blur(x, sigma):
    """Blur image i of x (n, 3, S, S) with sigma_i pixels, reflected at the border; 0 = not at all.

    The kernel spans a tenth of the image, as in SimCLR. Blurring is a matrix (S, S) per axis."""
    size = x.shape[2]
    radius = max(1, round((0.1 * size - 1) / 2))
    tap = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.exp(-0.5 * (tap / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)                       # (n, taps)

    # sees[j, i, t] = 1 where tap t of the new pixel i falls on the old pixel j.
    eye = torch.eye(size, device=x.device)[None]
    padded = F.pad(eye, (radius, radius), mode="reflect")[0]
    sees = padded.unfold(1, 2 * radius + 1, 1)                          # (S, S, taps)
    blur = torch.einsum("nt,jit->nij", weight, sees)[:, None]           # (n, 1, new, old)
    return blur @ x @ blur.mT                                           # columns, then rows


def augment(images, u, colour_order, augmentation, size=None):
    """One view of each image, a pure function of the random numbers that it is given.

    images (n, 3, H, W) uint8 -> (n, 3, S, S) float, normalised. u (n, AUGMENT_DRAWS) uniform in
    [0, 1); colour_order: a permutation of the four colour operations; augmentation: a view's, see
    AUGMENTATION in a script; size: S, or None for images that are cropped already."""
    box_draws, draws = u[:, :BOX_DRAWS], u[:, BOX_DRAWS:]
    flip, jitter, *strengths, gray, blur, sigma, solarize = draws.unbind(1)
    x = images.float().div_(255)
    if size:
        boxes = random_boxes(box_draws, *x.shape[2:], augmentation["crop"], augmentation["ratio"])
        x = crop_resize(x, boxes, size)
    x = choose(below(flip, augmentation["flip"]), x.flip(3), x)

    operations = (brightness, contrast, saturation, hue)
    jittered = jitter < augmentation["jitter_p"]
    for i in colour_order:
        strength = augmentation["jitter"][i]
        if not strength:
            continue
        change = (2 * strengths[i] - 1) * strength * jittered
        if operations[i] is hue:
            x = hue(x, change)
        else:
            x = operations[i](x, 1 + change)

    if augmentation["gray_p"]:
        x = choose(below(gray, augmentation["gray_p"]), luma(x), x)
    if augmentation["blur_p"]:
        x = gaussian_blur(x, (0.1 + 1.9 * sigma) * (blur < augmentation["blur_p"]))
    if augmentation["solarize_p"]:
        inverted = torch.minimum(x, 1 - x)
        x = choose(below(solarize, augmentation["solarize_p"]), inverted, x)
    return normalize(x, augmentation)


def choose(condition, a, b):
    """a where the condition holds, else b, both finite: faster than torch.where on a CPU."""
    return torch.lerp(b, a, condition.to(b.dtype))


def below(u, p):
    return (u < p)[:, None, None, None]


def normalize(x, stats):
    """stats: any dict with the channels' "mean" and "std", such as an augmentation."""
    return (x - per_channel(stats["mean"], x)) / per_channel(stats["std"], x)


def denormalize(x, stats):
    """For pictures: the inverse of `normalize`."""
    return (x * per_channel(stats["std"], x) + per_channel(stats["mean"], x)).clamp(0, 1)


def per_channel(numbers, x):
    return to_device(torch.tensor(numbers), x.device)[:, None, None]


def to_device(x, device):
    """A CPU tensor on `device` without waiting: only pinned memory is copied asynchronously."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


# ---- backbones -----------------------------------------------------------------------------------
def make_backbone(arch, image_size):
    """(module without classifier, feature dimension).

    resnet18 and resnet50 are torchvision's: weights load there with fc = Identity. Images up to 96
    px get a 3x3 stem of stride 1, those up to 32 px no max-pool. resnet_tiny is for laptops.

    A ResNet's blocks start as identities, as is usual [Goyal et al. 2017, Section 5.1]: else the
    inner steps of a fresh network overshoot (results/tc2.md, row 8)."""
    if arch == "resnet_tiny":
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks = [basic_block(16, 16), basic_block(16, 32), basic_block(32, 64)]
        return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 64

    net = getattr(torchvision.models, arch)(weights=None, zero_init_residual=True)
    dim = net.fc.in_features
    net.fc = nn.Identity()
    if image_size <= SMALL:
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    if image_size <= 32:
        net.maxpool = nn.Identity()
    return net, dim


def basic_block(inputs, outputs):
    """torchvision's residual block; it halves the resolution where it widens."""
    block = torchvision.models.resnet.BasicBlock
    if inputs == outputs:
        return block(inputs, outputs)
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
    return block(inputs, outputs, 2, shortcut)


@contextlib.contextmanager
def batch_stats_only(module):
    """BatchNorm in train mode uses the statistics of its batch and leaves its buffers alone.

    Inner loops need that: their passes are not passes of the network that is trained."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [(m, name, b) for m in norms for name, b in m.named_buffers()]
    try:
        for m, name, b in buffers:
            setattr(m, name, b.clone())         # the passes below move the copies
        yield
    finally:
        for m, name, b in buffers:
            setattr(m, name, b)


def at_least_float32(x):
    """What comes out of autocast: bfloat16 becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- k-NN monitor --------------------------------------------------------------------------------
@torch.no_grad()
def extract_features(backbone, data_name, images, size, stats, workers, device):
    """(features (n, d) float32 on `device`, the n indices of their images), not augmented.

    images: a tensor or file names. Large images are cut to the central 224 / 256."""
    was_training = backbone.training
    backbone.eval()
    resize = round(size * 256 / 224) if size > SMALL else None
    features, kept = [], []
    for x, index in square_batches(data_name, images, size, workers, device, resize):
        features.append(backbone(normalize(x.float() / 255, stats)).float())
        kept += index
    backbone.train(was_training)
    return torch.cat(features), torch.tensor(kept)


@torch.no_grad()
def nearest(bank, queries, k, metric):
    """(similarities (N, k), indices (N, k)) of the k nearest rows of bank (M, d) to queries (N, d).

    metric: cosine, or euclidean, whose similarity is minus the distance, in float32 or float64. The
    bank is read in parts: it may fill half of the memory."""
    centre = bank.mean(0)           # distances lose the digits that a common offset takes
    similarities, indices = [], []
    for q in queries.split(1024):
        best = torch.empty(len(q), 0, device=q.device)
        index = torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
        for start in range(0, len(bank), 65536):
            part = bank[start:start + 65536]
            if metric == "cosine":
                near = F.normalize(q, dim=1) @ F.normalize(part, dim=1).T
            else:
                near = -torch.cdist(q - centre, part - centre)
            near, row = near.topk(min(k, len(part)), dim=1)
            best = torch.cat([best, near], dim=1)
            index = torch.cat([index, start + row], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            index = index.gather(1, order)
        similarities.append(best)
        indices.append(index)
    return torch.cat(similarities), torch.cat(indices)


def vote(near, labels, metric, temperature=0.07):
    """Predicted classes (N,) from similarities (N, k) and the neighbours' labels (N, k).

    euclidean: majority, for the papers' 5-NN; cosine: weights exp(cos / temperature), the field's.
    A tie goes to the lower class: of 500 classes a quarter of the 5-NN votes may tie, which costs
    up to three points against the nearest one's class."""
    weight = torch.ones_like(near)
    if metric == "cosine":
        weight = ((near - 1) / temperature).exp()
    votes = torch.zeros(len(near), int(labels.max()) + 1, dtype=near.dtype, device=near.device)
    return votes.scatter_add_(1, labels, weight).argmax(1)


def knn_accuracy(bank, bank_labels, queries, query_labels, k=5, metric="euclidean"):
    """Top-1 accuracy in percent of k nearest neighbours: bank (M, d), queries (N, d)."""
    near, index = nearest(bank, queries, k, metric)
    predicted = vote(near, bank_labels[index], metric)
    return 100 * (predicted == query_labels).float().mean().item()


def embedding_std(z):
    """sqrt(d) times the mean standard deviation of a dimension of z (n, d), rows of unit norm.

    1 = isotropic, 0 = collapsed."""
    return F.normalize(z, dim=1).std(0).mean() * z.shape[1] ** 0.5


def effective_rank(z):
    """exp(entropy of the normalised singular values) of the centred z (n, d): 1 to min(n, d)."""
    s = torch.linalg.svdvals((z - z.mean(0)).float())
    p = s / s.sum().clamp(min=1e-12)
    return torch.special.entr(p).sum().exp()


def monitor(backbone, data, args, stats, device):
    """k-NN accuracy in percent, both protocols; {} without labels. backbone None: of raw pixels.

    Of at most 20,000 training and 10,000 test images; on a CPU a fifth, to save minutes."""
    if data.test_labels is None:
        return {}
    share = 5 if device.type == "cpu" else 1

    def features_of(images, labels, limit):
        rows = (labels >= 0).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=rng(0))[:limit]]    # files come by class
        x, kept = extract_features(backbone or nn.Flatten(), data.name, pick(images, rows),
                                   args.image_size, stats, args.workers, device)
        return x, labels[rows][kept].to(device)

    bank, bank_labels = features_of(data.train, data.train_labels, 20000 // share)
    queries, labels = features_of(data.test, data.test_labels, 10000 // share)
    features = (bank, bank_labels, queries, labels)
    found = {"knn5": knn_accuracy(*features),
             "knn200_cosine": knn_accuracy(*features, k=200, metric="cosine")}
    if backbone is not None:
        found["rank_h"] = effective_rank(queries).item()
    return found


# ---- processes -----------------------------------------------------------------------------------
def setup_processes(device_name):
    """(rank, world, device) from torchrun's environment; one process without it."""
    named_files.clear()                         # of a run before, in a notebook
    env = os.environ
    rank = int(env.get("RANK", 0))
    world = int(env.get("WORLD_SIZE", 1))
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in env]
    if tasks > 1 and "RANK" in missing:
        fail(f"srun started {tasks} tasks without RANK: each would train by itself in the same "
             "folder; start one torchrun per machine")
    if world == 1 and rank > 0:
        fail(f"RANK is {rank}, but WORLD_SIZE is not set: start with torchrun, or unset RANK")
    if world > 1 and missing:
        fail(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start with torchrun, or "
             "unset WORLD_SIZE")

    device = choose_device(device_name)
    if world > 1:
        # gloo beside nccl: what the processes agree about on the host must not wait for the GPU.
        # The others wait for the first one's evaluations, hence two hours.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world, device


def choose_device(name):
    """The device of --device; without a name this process's GPU, or else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: this machine has none")
    if name != "cuda":
        return torch.device(name)

    local = int(os.environ.get("LOCAL_RANK", 0))
    found = torch.cuda.device_count()
    if local >= found:
        fail(f"--device cuda: process {local} of this machine has no GPU, there are {found}")
    torch.cuda.set_device(local)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", local)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


class AllReduceSum(torch.autograd.Function):
    """Sum over processes that autograd sees: its backward pass is itself, at every order."""
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllReduceSum.apply(grad.contiguous())


def all_reduce_sum(x):
    return AllReduceSum.apply(x) if world_size() > 1 else x


def alike_on_all_processes(value):
    """Whether `value` is the same everywhere."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return all(other == value for other in values)


def gather_batch(z, dim=0):
    """Every process's `z` joined along `dim`, in rank order.

    If all processes compute the same loss on the result, `average_gradients` gives the gradient of
    one process on the joined batch."""
    if world_size() == 1:
        return z
    slots = [torch.zeros_like(z) for _ in range(world_size())]
    slots[dist.get_rank()] = z
    return all_reduce_sum(torch.cat(slots, dim))


def average_gradients(params):
    """The mean of .grad over processes, by one all-reduce of all gradients laid end to end.

    No DDP wrapper: it silently skips the gradients of `autograd.grad` and `functional_call`, which
    is how the bi-level steps take theirs."""
    if world_size() == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


# ---- checkpoint ----------------------------------------------------------------------------------
def save(path, state):
    """Write beside `path`, then rename: a kill or a full disk never costs the previous file.

    A string is written as it is, anything else by torch.save."""
    try:
        with open(path + ".tmp", "wb") as file:
            if isinstance(state, str):
                file.write(state.encode())
            else:
                torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:        # torch.save reports a full disk as either
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        reason = str(error).split("\n")[0]
        fail(f"cannot write {path} ({reason}); the previous one, if any, is untouched")


def save_run(args, step, nets, opts, stats, settings):
    """backbone.pt, what other programs load (see README), and then last.pt, all that resumes.

    In this order, so that a run killed between the two does its last epoch again."""
    weights = {k: v.cpu() for k, v in nets["backbone"].state_dict().items()}
    save(f"{args.out}/backbone.pt",
         {"arch": args.arch, "image_size": args.image_size,
          "small_images": args.image_size <= SMALL, "mean": stats["mean"], "std": stats["std"],
          "state_dict": weights})
    save(f"{args.out}/last.pt",
         {"step": step, "settings": settings, "nets": nets.state_dict(),
          "opts": {name: opt.state_dict() for name, opt in opts.items()}})


def load_torch(path, flag, keys):
    """A dict of tensors and plain values with `keys`, or `fail`. No pickled code is ever run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = [k for k in keys if k not in state]
    except Exception as error:          # torch.load raises a dozen types for files not its own
        fail(f"{flag}: {path} cannot be read as a checkpoint ({type(error).__name__})")
    if missing:
        fail(f"{flag}: {path} is not a checkpoint of this project, it has no {', '.join(missing)}")
    return state


def read_log(out):
    """The rows of log.jsonl; damaged lines, such as a kill in mid-line leaves, are passed over."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(f"{out}/log.jsonl", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def open_run(args, argv, data, nets, opts, rank):
    """Go on from --out/last.pt, or start a run and its log. Returns (steps done, settings)."""
    settings = {**vars(args), "images": len(data.train), "classes": len(data.classes or ()),
                "file_names": data.fingerprint}
    step = 0
    if os.path.exists(f"{args.out}/last.pt"):
        step = resume(args.out, settings, nets, opts)
    compared = {name: settings[name] for name in settings.keys() - FREE_ON_RESUME}
    if not alike_on_all_processes([step, sorted(compared.items())]):
        fail(f"--data {args.data}, --out {args.out}: the processes do not see the same files, "
             "last.pt or settings; name folders that all machines share")
    if rank == 0:
        open_log(args.out, argv, settings, nets, step)
        for name, value in settings.items():
            print(f"{name:>16}  {value}")
        what = f"goes on from step {step}" if step else "starts"
        print(f"{what} in {args.out}", flush=True)
    return step, settings


def resume(out, settings, nets, opts):
    """Load last.pt, a run of the same settings, into nets and opts. Returns the steps done."""
    state = load_torch(f"{out}/last.pt", f"--out {out}", ("step", "settings", "nets", "opts"))
    differ = []
    for name, value in settings.items():
        before = state["settings"].get(name)
        if before != value and name not in FREE_ON_RESUME:
            differ.append(f"{name} {before} -> {value}")
    if differ:
        if settings["data"] != state["settings"]["data"]:
            differ.insert(0, f"data {state['settings']['data']} -> {settings['data']}")
        fail(f"--out {out}: holds a run with other settings ({'; '.join(differ)}); choose another "
             "--out or repeat its settings")

    nets.load_state_dict(state["nets"])
    for name, opt in opts.items():
        opt.load_state_dict(state["opts"][name])
    return state["step"]


def open_log(out, argv, settings, nets, step):
    """Begin log.jsonl, or cut it after `step`: the rows that follow are written again."""
    parameters = {name: sum(map(torch.numel, net.parameters())) for name, net in nets.items()}
    header = {"argv": argv, "settings": settings, "processes": world_size(),
              "parameters": parameters, "torch": torch.__version__}
    rows = []
    if step:
        rows = [row for row in read_log(out) if row.get("step", 0) <= step]
    if not rows or "settings" not in rows[0]:           # a new run, or its log was lost
        rows.insert(0, header)
    rows[0]["settings"] = settings                      # a run's data may have moved

    try:
        os.makedirs(out, exist_ok=True)
    except FileExistsError:
        fail(f"--out {out}: is a file; name a folder")
    except OSError as error:
        fail(f"--out {out}: {error}")
    save(f"{out}/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# ---- log -----------------------------------------------------------------------------------------
class Log:
    """log.jsonl and the progress line. limits: {term: (limit, sentence)}; above it, one warning."""
    def __init__(self, args, rank, stop, limits):
        self.out = args.out
        self.device = args.device
        self.images_per_step = args.images_per_step
        self.rank = rank
        self.stop = stop
        self.limits = dict(limits)
        self.names = []                         # of the terms
        self.pending = {}                       # {step: their values}, since the last `write`
        self.knn = ""
        self.clock = time.perf_counter()        # at the last line
        self.draw_at = self.clock + 60          # when curves.png is drawn next

    def add(self, step, terms):
        """The terms of a step, {name: tensor}: this does not wait for the GPU, `write` does."""
        if not self.names:                      # a sign of life: the first line may take minutes
            self.show(f"step {step}/{self.stop}  is done", live=True)
        self.names = list(terms)
        self.pending[step] = torch.stack([value.float() for value in terms.values()])

    def write(self, nets, lr):
        """A line on the steps since the last one. Terms or weights that are not finite end it."""
        steps = list(self.pending)
        own = torch.stack(list(self.pending.values()))                  # (steps, terms)
        table = (all_reduce_sum(own) / world_size()).tolist()           # a row for each step
        seconds = (time.perf_counter() - self.clock) / len(steps)
        self.pending = {}
        for step, row in zip(steps, table):
            for name, value in zip(self.names, row):
                if not math.isfinite(value):
                    self.fail_not_finite(step, name)
                self.warn(step, name, value)
        weights = nets.state_dict()
        finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
        if not all(finite):
            self.fail_not_finite(steps[-1], list(weights)[finite.index(False)])

        rate = self.images_per_step / seconds
        last = dict(zip(self.names, table[-1]))
        self.append(step=steps[-1], lr=lr, images_per_s=round(rate, 1), **last)
        shown = "  ".join(f"{name} {last[name]:.3f}" for name in self.names[:3])
        speed = f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
        left = datetime.timedelta(seconds=round(seconds * (self.stop - steps[-1])))
        self.show(f"step {steps[-1]}/{self.stop}  {shown}{self.knn}  {speed} img/s  {left} left",
                  live=True)

    def event(self, step, **found):
        """A line on what an evaluation found, numbers or tensors."""
        found = {name: float(value) for name, value in found.items()}
        for name, value in found.items():
            self.warn(step, name, value)
        if "knn5" in found:
            self.knn = f"  knn5 {found['knn5']:.1f}"
        self.append(step=step, **found)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.show(f"step {step}  {shown}")

    def warn(self, step, name, value):
        """A term above its limit warns, once."""
        limit, sentence = self.limits.get(name, (math.inf, ""))
        if value > limit:
            del self.limits[name]
            warning = f"{name} {value:.3g} > {limit}: {sentence}"
            self.append(step=step, warning=warning)
            self.show(f"step {step}  warning: {warning}")

    def append(self, **row):
        """A line of log.jsonl and, once a minute, curves.png: a killed run leaves a picture too.

        A long log takes seconds to draw: that is kept to a hundredth of the time."""
        if self.rank == 0:
            with open(f"{self.out}/log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            start = time.perf_counter()
            if start > self.draw_at:
                plot_curves(self.out)
                end = time.perf_counter()
                self.draw_at = end + max(60, 100 * (end - start))
        self.clock = time.perf_counter()                    # an evaluation is not training time

    def show(self, line, live=False):
        """Print; on a terminal a live line is overwritten by the next one."""
        if self.rank == 0:
            terminal = sys.stdout.isatty()
            clear = "\r\033[K" if terminal else ""
            print(clear + line, end="" if live and terminal else "\n", flush=True)

    def end(self, line):
        if self.rank == 0:
            plot_curves(self.out)
        self.show(line)
        if self.device == "cpu" and others_use_the_cores():
            self.show("the cores were shared: if it was with other programs, OMP_NUM_THREADS=1 is "
                      "several times faster")
        if dist.is_initialized():
            dist.barrier()                      # none leaves while another one still writes
            dist.destroy_process_group()

    def fail_not_finite(self, step, name):
        """End the run: a term or a weight is not finite."""
        if self.rank == 0:
            plot_curves(self.out)
            print(f"error: {name} is not finite at step {step}; the last checkpoint in {self.out}, "
                  "if there is one, is good", file=sys.stderr)
        raise SystemExit(1)


def others_use_the_cores():
    """Whether more threads ran in the last minute than this program has.

    OpenMP's threads wait for the slowest, busily: two of them on a shared core lose to one."""
    if not hasattr(os, "getloadavg"):               # Windows
        return False
    load, _, _ = os.getloadavg()
    threads = torch.get_num_threads()
    return threads > 1 and load > threads + 0.5


# ---- signals -------------------------------------------------------------------------------------
@contextlib.contextmanager
def graceful_stop():
    """Yields a function that says, alike on all processes, which signal has come; 0 for none.

    Ctrl-C and SIGTERM let the step finish. A second Ctrl-C ends the program at once."""
    first = []                                      # the first signal, and when it came

    def note(signum, frame):
        if not first:
            first.extend([signum, time.monotonic()])
            if int(os.environ.get("RANK", 0)) == 0:
                os.write(2, b"\nfinishing what is under way, then saving; Ctrl-C again ends at "
                         b"once\n")
            return
        # torchrun repeats the terminal's Ctrl-C at once: that is no second one. A scheduler repeats
        # its SIGTERM some time before it kills: what is under way may still be saved.
        if signum == signal.SIGINT and time.monotonic() - first[1] > 1:
            raise KeyboardInterrupt

    def stop_signal():
        agreed = torch.tensor(first[0] if first else 0)
        if world_size() > 1:                        # on the host: gloo, no wait for the GPU
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.item()

    before = {}
    if threading.current_thread() is threading.main_thread():       # others may not set handlers
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_signal
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run(main, advice="lower --batch-size, --image-size, or the number of views, masks, tasks or "
        "inner steps"):
    """Call main() as a program: what is not the program's fault ends in one sentence.

    advice: what to do where memory runs out."""
    for stream in (sys.stdout, sys.stderr):
        # Names of any bytes on any terminal; in a file the lines of both keep their order.
        if hasattr(stream, "reconfigure"):              # a notebook's has not
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # what is still unwritten goes nowhere
        raise SystemExit(141) from None                     # as the shell reports SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"cannot write ({error}); what was written before is untouched")
    except RuntimeError as error:
        if world_size() > 1 and re.search("(closed|reset) by peer", str(error)):
            fail("another process has ended; if it could give a reason, it stands in its output")
        if not re.search("out of memory|ALLOC_FAILED|can't allocate memory", str(error)):
            raise
        reason = str(error).split(". ")[0].split("\n")[0]
        fail(f"memory ran out ({reason}): {advice}")


# ---- pictures ------------------------------------------------------------------------------------
def plot_curves(out):
    """curves.png from log.jsonl: a panel for all terms whose names begin with the same letters."""
    from matplotlib.figure import Figure        # takes a second; pyplot would choose a backend
    panels = collections.defaultdict(dict)
    for row in read_log(out):
        if "step" not in row:                   # the header
            continue
        for name in set(row) - {"step", "images_per_s", "warning"}:
            title = re.match("[a-z]*", name.removeprefix("raw_pixels_")).group()
            panels[title].setdefault(name, []).append((row["step"], row[name]))
    if not panels:
        return

    first = [title for title in ("loss", "knn") if title in panels]
    titles = first + sorted(set(panels) - set(first))
    height = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(15, 4 * height), layout="constrained")
    for i, title in enumerate(titles, 1):
        axis = figure.add_subplot(height, 3, i)
        colours = {}                            # raw pixels come last, in the colour of their curve
        for name, points in sorted(panels[title].items()):
            steps, values = zip(*points[::math.ceil(len(points) / 2000)])       # 2,000 suffice
            if name.startswith("raw_pixels"):
                colour = colours.get(name.removeprefix("raw_pixels_"), "gray")
                axis.axhline(values[0], color=colour, linestyle="--", label=name)
            else:
                line, = axis.plot(steps, values, ".-" if len(points) < 60 else "-", label=name)
                colours[name] = line.get_color()
        if title == "loss":                     # from 1e-3 to 100 in one panel, with zero
            axis.set_yscale("symlog", linthresh=0.1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(f"{out}/curves.png", dpi=110)


def draw_grid(path, rows, title=""):
    """Labelled rows of pictures: rows {label: (n, 3, S, S) in [0, 1]}, the same n for all."""
    from matplotlib.figure import Figure
    pictures = torch.cat([row.float().cpu() for row in rows.values()])
    columns = len(pictures) // len(rows)
    step = pictures.shape[-1] + 2                       # two pixels between pictures
    grid = torchvision.utils.make_grid(pictures, columns, pad_value=1)

    figure = Figure(figsize=(1.5 * columns + 1, 1.5 * len(rows)), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(grid.permute(1, 2, 0).numpy())
    axis.set_yticks([step * (i + 0.5) for i in range(len(rows))], map(printable, rows))
    axis.set_xticks([])
    axis.set_title(printable(title))
    figure.savefig(path, dpi=100, bbox_inches="tight")


def printable(name):
    """A name of any bytes as text for matplotlib, which would set $..$ as mathematics."""
    return os.fsencode(name).decode(errors="replace").replace("$", r"\$")


def draw_views(args, data, views, index, augmentations):
    """views.png: eight images and their views as the network sees them. Look at your data."""
    shown = index[:8]
    if torch.is_tensor(data.train):
        images = data.train[shown]
    else:
        images = torch.stack([central_square(decode(data.train[i]), args.image_size)
                              for i in shown])
    rows = {"image": images / 255}
    for v, augmentation in enumerate(augmentations):
        rows[f"view {v + 1}"] = denormalize(views[v, :8], augmentation)
    draw_grid(f"{args.out}/views.png", rows)
