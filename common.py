"""Mechanism shared by the four scripts: data, augmentation, backbones, evaluation, processes, checkpoint, log.

Read a script first and come here only for the how. No method's recipe lives in this file, nothing here calls back into a
script, and importing it has no side effect. Every random draw is a function of a key, see `rng`: no generator state is ever
saved, and a resumed run equals an uninterrupted one: on a CPU to the bit, on a GPU up to the order of its sums.
"""
import argparse, contextlib, datetime, errno, functools, hashlib, json, math, os, platform, signal, sys, time
from collections import namedtuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional as TF

SMALL = 96              # images up to this side live on the device as one uint8 tensor and get the 3x3 stem
BAD_FRACTION = 0.01     # a run goes on without this share of undecodable images, each of them named
FREE_ON_RESUME = {"out", "workers", "log_every", "eval_every", "max_steps", "compile"}     # do not change what is computed


# ---- command line ---------------------------------------------------------------------------------------------------
def fail(sentence):
    """Bad input: one sentence on stderr, exit status 2, no traceback."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def number(kind, low, high=math.inf):
    """argparse type: a finite number of `kind` in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):             # a whole number of 400 digits has no float
            finite = False
        if not (finite and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'} "
                                             f"{f'>= {low}' if high == math.inf else f'in [{low}, {high}]'}")
        return value
    return parse


def cores_per_process():
    """Cores for each process that torchrun starts on this machine, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def base_parser(description, recipes, archs):
    """The flags that all scripts share. A default of None is filled in by `resolve` from the recipe that --data selects."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    def flag(name, kind, text, **kw):
        key = name[2:].replace("-", "_")
        listed = "" if key not in recipes["shapes"] else "; " + ", ".join(f"{r}: {v[key]}" for r, v in recipes.items())
        p.add_argument(name, type=kind, help=(text + listed).replace("%", "%%"), **kw)
    flag("--data", str, "shapes (drawn in memory) | cifar10 | cifar100 | stl10 | fake | folder with train/ and val/ or test/ of class "
         "folders | folder of images without classes", default="shapes")
    flag("--classes", str, "file of class names, one per line: only these class folders, as for ImageNet-100 (default: all)")
    flag("--out", str, "folder of log, checkpoint, backbone and picture (default: runs/<script>)")
    flag("--arch", str, "backbone", choices=archs)
    flag("--image-size", number(int, 8), "pixels (default: the images' own size up to 96, 224 above)")
    flag("--epochs", number(int, 1), "passes over the training images")
    flag("--batch-size", number(int, 2), "images per batch, over all processes")
    flag("--lr", number(float, 0), "peak learning rate at this batch size")
    flag("--weight-decay", number(float, 0), "0 = none")
    flag("--warmup-epochs", number(float, 0), "linear warm-up, then cosine to 0; 0 = none")
    flag("--workers", number(int, 0), "decoding processes per process, for images above 96 px (default: this process's share of the cores, up to 16)",
         default=cores_per_process())
    flag("--seed", number(int, 0), "seed of weights, data order and augmentation (default: 0)", default=0)
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
                   help="bfloat16 autocast around forward passes; losses stay float32 (default: where the GPU has it)")
    p.add_argument("--sync-bn", action="store_true", help="BatchNorm over the batch of all processes; not in passes of a single task, which one process holds")
    p.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    flag("--log-every", number(int, 1), "steps between log lines (default: 10)", default=10)
    flag("--eval-every", number(int, 1), "epochs between k-NN evaluations")
    flag("--max-steps", number(int, 0), "stop after this step of the unchanged schedule; 0 = no limit (default)", default=0)
    p.add_argument("--baseline", action="store_true", help="the base method alone: same initial weights, data order, augmentation")
    return p, flag


def resolve(args, recipes, data, script):
    """Fill the flags left open from the recipe of the data; returns the recipe's name."""
    name = "shapes" if data.name == "shapes" else "small" if (args.image_size or data.size) <= SMALL else "imagenet"
    args.image_size = args.image_size or (data.size if data.size <= SMALL else 224)
    args.out, args.script = args.out or f"runs/{script}" + ("-baseline" if args.baseline else ""), script
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for key, value in recipes[name].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return name


# ---- randomness, schedule, parameters -------------------------------------------------------------------------------
def rng(*key):
    """CPU generator that is a function of the numbers and strings `key`."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little"))


def lr_scale(step, total, warmup):
    """Linear warm-up to 1 over `warmup` steps, then half a cosine to 0 at `total`: a pure function of the step."""
    if step < warmup:
        return (step + 1) / max(warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(opts, scale):
    """lr = base_lr * scale. Groups are looked up each time: `load_state_dict` replaces them."""
    for opt in opts.values():
        for group in opt.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * scale


@torch.no_grad()
def ema_update(target, online, decay):
    """target <- decay * target + (1 - decay) * online for parameters; buffers (BatchNorm statistics) are copied."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - decay)
    if buffers := list(target.buffers()):
        torch._foreach_copy_(buffers, list(online.buffers()))


@contextlib.contextmanager
def batch_stats_only(module):
    """Train-mode BatchNorm uses the statistics of its batch and leaves its buffers alone, as inner loops need."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    try:
        for m in norms:
            m.track_running_stats = False
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


# ---- processes ------------------------------------------------------------------------------------------------------
def setup_distributed():
    """(rank, world, device) from torchrun's environment; without it one process on one GPU or the CPU."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            fail(f"--nproc-per-node: process {local} of this machine has no GPU, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:       # gloo beside nccl: what the processes agree about on the host must not wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))     # the others wait for evaluations
    return rank, world, device


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


class AllReduceSum(torch.autograd.Function):
    """Sum over processes that autograd sees: its backward is itself, so it can be differentiated twice."""
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


def gather_batch(z, dim=0):
    """Concatenate every process's `z` along `dim`, in rank order. If all processes then compute the same loss on the result,
    `average_gradients` gives the gradient of one process on the joined batch."""
    if world_size() == 1:
        return z
    slots = [torch.zeros_like(z) for _ in range(world_size())]
    slots[dist.get_rank()] = z
    return all_reduce_sum(torch.cat(slots, dim))


def average_gradients(params):
    """Mean of .grad over processes, one all-reduce of all gradients laid end to end. No DDP wrapper: it silently skips
    gradients taken by `autograd.grad` and `functional_call`, which is how the bi-level steps take theirs."""
    if world_size() > 1:
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= world_size()
        for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes, of inputs (n, C, ...), with statistics that autograd follows from process to process, on a CPU too
    (torch's own needs a GPU). A pass within `batch_stats_only`, such as a task's own, keeps to the statistics of its batch."""
    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not (self.training and self.track_running_stats and world_size() > 1):
            return super().forward(x)
        wide, axes, shape = x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        var, mean = gather_batch(torch.stack(torch.var_mean(wide, axes, correction=0))[None]).unbind(1)       # (processes, C) each, of equal batches
        var, mean = var.mean(0) + mean.var(0, correction=0), mean.mean(0)
        with torch.no_grad():
            n = world_size() * x.numel() / x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (wide * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


def sync_batch_norms(nets):
    for m in nets.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.__class__ = SyncBatchNorm                                 # the same parameters under the same names: checkpoints do not change


# ---- augmentation: batched, one draw per sample ---------------------------------------------------------------------
def random_boxes(n, height, width, scale, ratio, g):
    """n boxes (top, left, height, width) by the rule of torchvision's RandomResizedCrop: 10 tries, then the centre."""
    area, log_ratio = torch.empty(n, 10).uniform_(*scale, generator=g), torch.empty(n, 10).uniform_(*map(math.log, ratio), generator=g)
    area, aspect = area * height * width, log_ratio.exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    u = torch.rand(n, 2, generator=g)
    top, left = (u[:, 0] * (height - h + 1)).floor(), (u[:, 1] * (width - w + 1)).floor()
    fall_w = round(height * ratio[1]) if width / height > ratio[1] else width
    fall_h = round(width / ratio[0]) if width / height < ratio[0] else height
    fallback = torch.tensor([(height - fall_h) // 2, (width - fall_w) // 2, fall_h, fall_w], dtype=torch.float32)
    return torch.where(fits[:, None], torch.stack([top, left, h, w], 1), fallback)


def _resize_matrix(start, length, size_in, size_out):
    """(n, size_out, size_in) rows of the antialiased bilinear filter that maps [start, start + length) to size_out pixels."""
    scale = (length / size_out)[:, None]
    pixel = torch.arange(size_in, device=start.device) + 0.5
    centre = start[:, None] + (torch.arange(size_out, device=start.device) + 0.5) * scale
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weight = (pixel - centre[..., None]).abs_().div_(-scale.clamp(min=1)[..., None]).add_(1).clamp_(min=0).mul_(inside[:, None])
    return weight / weight.sum(-1, keepdim=True)


def crop_resize(images, boxes, flip, size):
    """Resize box i of image i to (size, size) and mirror it where flip: crop, resize and flip are linear and separable, so all
    three are one matrix per axis. images (n, 3, H, W) float, boxes (n, 4), flip (n,) bool -> (n, 3, size, size)."""
    top, left, h, w = boxes.unbind(1)
    rows, cols = _resize_matrix(top, h, images.shape[2], size), _resize_matrix(left, w, images.shape[3], size)
    cols = torch.where(flip[:, None, None], cols.flip(1), cols)
    return rows[:, None] @ images @ cols[:, None].mT


def gaussian_blur(x, sigma):
    """Blur image i of x (n, 3, S, S) with sigma_i pixels (0 = leave alone), reflected at the border; the kernel spans a tenth
    of the image, as in SimCLR."""
    radius = max(1, round((0.1 * x.shape[2] - 1) / 2))
    tap = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.exp(-0.5 * (tap / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)                                                        # (n, taps)
    eye = F.pad(torch.eye(x.shape[2], device=x.device)[None], (radius, radius), mode="reflect")[0]
    along = torch.einsum("nt,jit->nij", weight, eye.unfold(1, 2 * radius + 1, 1))[:, None]               # (n, 1, S, S)
    return along @ x @ along.mT


def _luma(x):
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def grayscale(x):
    return _luma(x).expand_as(x)


def brightness(x, f):
    return (x * f[:, None, None, None]).clamp_(0, 1)


def contrast(x, f):
    return torch.lerp(_luma(x).mean((2, 3), keepdim=True), x, f[:, None, None, None]).clamp_(0, 1)


def saturation(x, f):
    return torch.lerp(_luma(x), x, f[:, None, None, None]).clamp_(0, 1)


def hue(x, f):
    """Turn the HSV hue by f_i turns, f in [-.5, .5]. Channel c is v - chroma * clamp(min(k, 4 - k), 0, 1), k = (n_c + h) mod 6."""
    r, g, b = x.unbind(1)
    v = x.amax(1)
    chroma = v - x.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    h = torch.where(v == r, (g - b) / safe, torch.where(v == g, (b - r) / safe + 2, (r - g) / safe + 4)) + 6 * f[:, None, None]
    k = (h[:, None] + torch.arange(5, 0, -2, device=x.device)[:, None, None]).remainder_(6)
    return v[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def to_device(x, device):
    """A small CPU tensor, without waiting for the GPU: only copies from pinned memory are asynchronous."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def augment(images, recipe, g, size=None, crop=True, share=slice(None), total=None):
    """One view of every image. The draws are made for the joined batch of `total` images, of which this process holds `share`: the
    views do not depend on the number of processes, nor on the device.

    images (n, 3, H, W) uint8 -> (n, 3, S, S) float, normalised. recipe: see RECIPES in a script. crop=False: only flip, S = H."""
    total, device = total or len(images), images.device
    boxes = to_device(random_boxes(total, *images.shape[2:], recipe["crop"], recipe["ratio"], g)[share], device) if crop else None
    orders = [torch.randperm(4, generator=g).tolist() for _ in range(4)]
    u = to_device(torch.rand(total, 10, generator=g)[share], device)
    flip, jittered = u[:, 0] < recipe["flip"], u[:, 1] < recipe["jitter_p"]
    x = images.float().div_(255)
    x = crop_resize(x, boxes, flip, size or x.shape[2]) if crop else torch.where(flip[:, None, None, None], x.flip(3), x)
    ops = (brightness, contrast, saturation, hue)
    factors = [(2 * u[:, 2 + i] - 1) * recipe["jitter"][i] * jittered + (i < 3) for i in range(4)]
    start = share.start or 0
    for quarter, order in enumerate(orders):        # the order of the four operations is drawn for each quarter of the joined batch
        rows = slice(*(min(max(-(-q * total // 4) - start, 0), len(x)) for q in (quarter, quarter + 1)))
        part = x[rows]
        for i in order if recipe["jitter_p"] and len(part) else ():
            part = ops[i](part, factors[i][rows].clamp(min=0) if i < 3 else factors[i][rows])
        x[rows] = part
    pick = lambda column, p: (u[:, column] < p)[:, None, None, None]
    if recipe["gray_p"]:
        x = torch.where(pick(6, recipe["gray_p"]), grayscale(x), x)
    if recipe["blur_p"]:
        x = gaussian_blur(x, (0.1 + 1.9 * u[:, 8]) * (u[:, 7] < recipe["blur_p"]))
    if recipe["solarize_p"]:
        x = torch.where(pick(9, recipe["solarize_p"]) & (x >= 0.5), 1 - x, x)
    return normalize(x, recipe["mean"], recipe["std"])


@functools.cache
def constant(values, device):
    return torch.tensor(values, device=device)[:, None, None]


def normalize(x, mean, std):
    return (x - constant(tuple(mean), x.device)) / constant(tuple(std), x.device)


# ---- data -----------------------------------------------------------------------------------------------------------
# train, test: uint8 (N, 3, S, S), or a list of file names; *_labels: int64 (N,), -1 = none, or None; size: pixels of an image's side;
# classes: their names, or None; files: names of the training images where they came as files, or None
Data = namedtuple("Data", "name train train_labels test test_labels size classes files", defaults=(None, None))


SHAPES = ["disc", "ring", "square", "frame", "triangle", "cross", "star", "moon", "stripes", "checks"]


def draw_shapes(n, seed):
    """n 32x32 wallpapers of ten classes: one small figure each, repeated with random turn, scale, shift, colours, shading and noise. A crop
    shows the figure too, so its class survives augmentation; pixels tell it badly. Returns (uint8 (n, 3, 32, 32), int64 (n,))."""
    g = rng(seed)
    label, u = torch.arange(n) % 10, torch.rand(n, 7, 1, 1, generator=g).unbind(1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    turn, half = 2 * math.pi * u[0], 0.3 + 0.3 * u[1]                                       # half the side of a tile
    a = 1.15 * (((turn.cos() * x - turn.sin() * y) / half + 2 * u[2]) % 2 - 1)              # coordinates in a tile
    b = 1.15 * (((turn.sin() * x + turn.cos() * y) / half + 2 * u[3]) % 2 - 1)
    r, box, wave = (a ** 2 + b ** 2).sqrt(), torch.maximum(a.abs(), b.abs()), lambda t: torch.sin(math.pi * t / 1.15)
    depth = [0.95 - r, 0.2 - (r - 0.7).abs(), 0.8 - box, 0.17 - (box - 0.7).abs(),          # disc, ring, square, frame
             0.5 - torch.maximum(-b, 0.87 * a.abs() + 0.5 * b),                             # triangle
             torch.minimum(0.3 - torch.minimum(a.abs(), b.abs()), 1 - box),                 # cross
             0.65 + 0.35 * torch.cos(5 * torch.atan2(b, a)) - r,                            # star
             torch.minimum(1 - r, ((a - 0.5) ** 2 + b ** 2).sqrt() - 0.8),                  # moon
             0.4 - b.abs(), 0.3 * wave(a) * wave(b)]                                        # stripes, checks
    mask = (torch.stack(depth)[label, torch.arange(n)] * 14 * half + 0.5).clamp(0, 1)[:, None]
    tint = 0.15 * torch.rand(2, n, 3, 1, 1, generator=g) - 0.075
    ink = torch.where(u[4] < 0.5, 0.25, -0.25)[:, None]
    shade = 0.3 * ((u[5] - 0.5) * x + (u[6] - 0.5) * y)[:, None] + 0.06 * torch.randn(n, 3, 32, 32, generator=g)
    image = 0.5 + mask * (ink + tint[0]) - (1 - mask) * (ink + tint[1]) + shade
    return (image.clamp(0, 1) * 255).byte(), label


def decode(path):
    """uint8 (3, H, W), upright; OSError where no decoder can read the file."""
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"\x89PNG":
                with Image.open(path) as image:
                    image.verify()                              # of damaged pixels torchvision's decoder dies, and the run with it
        image = torchvision.io.decode_image(path, "RGB", apply_exif_orientation=True)
        return TF.to_dtype(image if image.ndim == 3 else image[0], torch.uint8, scale=True)     # a 16-bit PNG; the first of an animation's frames
    except (RuntimeError, AttributeError):                      # BMP, TIFF, a wrong suffix, or a torchvision without decoders
        return decode_slowly(path)
    except OSError:
        raise
    except Exception as error:                                  # Pillow raises a dozen types for broken files
        raise OSError(str(error)) from error


def decode_slowly(path):
    """As `decode`, by Pillow."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.mode in ("I", "F"):
                raise OSError("neither 8 nor 16 bits per channel")
            return TF.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        raise OSError(str(error)) from error


def fit(images, size, resize=None):
    """Shorter side to `resize` (default `size`), antialiased, then the central square of `size`."""
    if images.shape[-2:] == (size, size):
        return images
    h, w = images.shape[-2:]
    if max(h, w) > 3 * min(h, w):                               # a strip of one pixel by thousands would be resized to gigabytes
        images = TF.center_crop(images, [min(h, 3 * w), min(w, 3 * h)])
    return TF.center_crop(TF.resize(images, [resize or size], antialias=True), [size, size])


def _collate(items):
    kept = [item for item in items if item[0] is not None]
    return (torch.stack([x for x, _, _ in kept], 1) if kept else None), [i for _, i, _ in kept], [p for *_, bad in items for p in bad]


def _worker_signals(_):
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)                                        # Ctrl-C and a group's SIGTERM are for the main process, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Files(torch.utils.data.Dataset):
    """Decodes in workers. views > 0: item (epoch, i) -> that many random crops; views = 0: item i -> the central square. With each item comes
    the index of the file it was read from."""
    def __init__(self, name, paths, size, resize=None, seed=0, views=0, recipe=None):
        self.name, self.paths, self.size, self.resize = name, paths, size, resize
        self.seed, self.views, self.recipe = seed, views, recipe

    def __getitem__(self, key):
        epoch, first = key if self.views else (0, key)
        bad = []
        for i in range(first, first + (len(self.paths) if self.views else 1)):      # while training, a bad file's successor serves
            try:
                image = decode(self.paths[i % len(self.paths)])
            except OSError:
                bad.append(self.paths[i % len(self.paths)])
                continue
            if not self.views:
                return fit(image, self.size, self.resize)[None], i, bad
            boxes = random_boxes(self.views, *image.shape[1:], self.recipe["crop"], self.recipe["ratio"], rng(self.seed, epoch, first))
            crops = [TF.resized_crop(image, *box, [self.size] * 2, antialias=True) for box in boxes.int().tolist()]
            return torch.stack(crops), i % len(self.paths), bad
        return None, first, bad

    def batches(self, sampler, workers, device):
        """Yield (views or 1, n, 3, S, S) uint8 on `device` and the n indices. A bad file is named once; too many end the run."""
        seen = set()
        for x, index, bad in torch.utils.data.DataLoader(self, batch_sampler=sampler, num_workers=workers, collate_fn=_collate,
                                                         worker_init_fn=_worker_signals, pin_memory=device.type == "cuda"):
            for path in sorted(set(bad) - seen):
                print(f"left out: {path} cannot be decoded", file=sys.stderr)
            seen.update(bad)
            if len(seen) > math.ceil(BAD_FRACTION * len(self.paths)):
                fail(f"--data {self.name}: {path} and others, over {BAD_FRACTION:.0%} of {len(self.paths)} images, cannot be decoded")
            if x is not None:
                yield x.to(device, non_blocking=True), index


def squares(name, images, size, workers, device, resize=None):
    """Yield (uint8 (n, 3, S, S) on `device`, their n indices) over a tensor or a list of files, in order, nothing random."""
    batch = 512 if size <= SMALL else 128                       # a ResNet-50 at 224 px needs 10 MB per image
    chunks = [range(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    if torch.is_tensor(images):
        yield from ((fit(images[c.start:c.stop].to(device), size), c) for c in chunks)
    else:
        yield from ((x[0], i) for x, i in Files(name, images, size, resize).batches(chunks, workers, device))


def decode_all(name, paths, size, workers):
    """(uint8 (n, 3, S, S), their n indices) of the files that can be decoded; ([], []) for none."""
    chunks = list(squares(name, paths, size, workers, torch.device("cpu")))
    return torch.cat([x for x, _ in chunks]) if chunks else [], [i for _, index in chunks for i in index]


def _load_torchvision(name):
    sets, root = torchvision.datasets, ".data"
    if name == "fake":
        pair = [sets.FakeData(n, (3, 32, 32), 10, random_offset=o) for n, o in ((512, 0), (128, 512))]
        return [(torch.stack([TF.pil_to_tensor(x) for x, _ in s]), torch.tensor([int(y) for _, y in s])) for s in pair], list("0123456789")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local > 0:
        dist.barrier()                                                                  # the first process of a machine downloads
    try:
        make = (lambda s: sets.STL10(root, s, download=True)) if name == "stl10" else \
               (lambda s: getattr(sets, name.upper())(root, s == "train+unlabeled", download=True))
        pair = [make("train+unlabeled"), make("test")]
    except (OSError, RuntimeError) as error:
        fail(f"--data {name}: not found under {root}/, and the download failed ({str(error).splitlines()[0]})")
    if local == 0 and world_size() > 1:
        dist.barrier()
    return [(torch.as_tensor(s.data if name == "stl10" else s.data.transpose(0, 3, 1, 2)).contiguous(),
             torch.as_tensor(s.labels if name == "stl10" else s.targets).long()) for s in pair], pair[0].classes


class ClassFolders(torchvision.datasets.ImageFolder):
    """Folder of class folders, of which `only` (a list of names, or None for all) count."""
    def __init__(self, root, only=None):
        self.only = only
        super().__init__(root)

    def find_classes(self, directory):
        classes, _ = super().find_classes(directory)
        if missing := sorted(set(self.only or ()) - set(classes)):
            fail(f"--classes: {directory} has no class folder {', '.join(missing[:5])}" + f" and {len(missing) - 5} more" * (len(missing) > 5))
        classes = [c for c in classes if not c.startswith(".") and (self.only is None or c in self.only)]
        return classes, {c: i for i, c in enumerate(classes)}


def without_loops(name, files):
    """`files`, or `fail` where links lead to one folder by two ways: its images would count twice."""
    real = {}
    for folder in sorted({os.path.dirname(f) for f in files}):
        if (other := real.setdefault(os.path.realpath(folder), folder)) != folder:
            fail(f"--data {name}: {other} and {folder} are the same folder, by a link; its images would count twice")
    return files


def read_classes(path):
    """The class names in a file, one per line; None for no file."""
    if path is None:
        return None
    try:
        with open(path) as file:
            names = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--classes {path}: cannot be read ({error})")
    return names or fail(f"--classes {path}: names no class")


def class_hash(classes):
    """What to print of a class list so that two people can compare theirs: number and first digits of the SHA-256 of the sorted names, one per line."""
    return None if classes is None else f"{len(classes)}, sha256 {hashlib.sha256(chr(10).join(sorted(classes)).encode()).hexdigest()[:12]}"


def _list_folder(name, only=None):
    """([(train files, labels), (test files, labels)], classes); labels and classes are None, the test part empty for a folder without classes."""
    train_dir, test_dirs = os.path.join(name, "train"), [d for s in ("val", "test") if os.path.isdir(d := os.path.join(name, s))]
    if not os.path.isdir(train_dir) and not test_dirs:
        files = sorted(os.path.join(root, f) for root, _, names in os.walk(name, followlinks=True) for f in names)
        if only:
            fail(f"--classes: {name} has no class folders to choose from")
        return [(without_loops(name, [f for f in files if f.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)]), None), ([], None)], None
    if not os.path.isdir(train_dir):
        fail(f"--data {name}: has {test_dirs[0]} but no train/ folder")
    if not test_dirs:
        fail(f"--data {name}: has train/ but neither val/ nor test/; to train without labels name {train_dir}")
    try:
        train, test = (ClassFolders(d, only) for d in (train_dir, test_dirs[0]))
    except FileNotFoundError as error:                                              # a class folder without images, or no class folder
        fail(f"--data {name}: {str(error).split('. Supp')[0]}")
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
        fail(f"--data {name}: {train_dir} and {test_dirs[0]} must have the same class folders; only one of them has {odd}")
    return [(without_loops(name, [f for f, _ in s.samples]), torch.tensor(s.targets)) for s in (train, test)], train.classes


def one_spelling(name):
    """What --data names, or "A -> B" of two of them, with folders by their real paths: to compare."""
    return " -> ".join(os.path.realpath(part) if os.path.isdir(part) else part for part in name.split(" -> "))


def load_data(name, image_size=None, workers=0, only=None):
    """Everything that --data can name, as Data; only: a file of class names. Bad input ends in `fail`."""
    files, only = None, read_classes(only)
    if only and not os.path.isdir(name):
        fail(f"--classes: goes with a folder of class folders, not with --data {name}")
    if name == "shapes":
        sets, classes = [draw_shapes(4000, 1), draw_shapes(1000, 2)], SHAPES
    elif name in ("cifar10", "cifar100", "stl10", "fake"):
        sets, classes = _load_torchvision(name)
    elif not os.path.isdir(name):
        fail(f"--data {name}: no such folder, and not one of shapes, cifar10, cifar100, stl10, fake")
    else:
        (sets, classes), shapes = _list_folder(name, only), []
        files = sets[0][0]
        for path in sets[0][0][::max(1, len(sets[0][0]) // 16)][:16]:
            with contextlib.suppress(OSError):                                  # a bad file is named, and counted, when all are read
                shapes.append(decode(path).shape[-2:])
        if not shapes:
            fail(f"--data {name}: no images in it" if not sets[0][0] else f"--data {name}: cannot decode {sets[0][0][0]}")
        if max(map(max, shapes)) > SMALL:
            return Data(name, *sets[0], *sets[1], max(SMALL + 1, min(map(min, shapes))), classes, files)
        for split, (paths, labels) in enumerate(sets):
            x, kept = decode_all(name, paths, image_size or min(map(min, shapes)), workers)
            sets[split] = x, labels if labels is None else labels[kept]
            files = files if split else [paths[i] for i in kept]
    size = image_size or sets[0][0].shape[-1]
    return Data(name, *(part for x, labels in sets for part in (fit(x, size) if len(x) else x, labels)), size, classes, files)


def training_views(data, recipes, image_size, batch_size, seed, rank, world, device, workers, start, stop, labelled=False):
    """Yield, for each step in [start, stop), one augmented view per recipe of this process's share of the batch: a list of
    (n, 3, S, S) floats; labelled: (that list, their labels (n,)). Order = f(seed, epoch), crops of files = f(seed, epoch, image), all else = f(seed, step, view)."""
    per_epoch, n = len(data.train) // batch_size, batch_size // world
    share, layout = slice(rank * n, (rank + 1) * n), torch.channels_last if device.type == "cuda" else torch.contiguous_format
    def indices():
        for step in range(start, stop):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == start:
                order = torch.randperm(len(data.train), generator=rng(seed, epoch))
            yield epoch, order[i * batch_size:(i + 1) * batch_size][share]
    if torch.is_tensor(data.train):
        images = data.train.to(device)
        batches = (([images[to_device(i, device)]] * len(recipes), i) for _, i in indices())
    else:
        files = Files(data.name, data.train, image_size, None, seed, len(recipes), recipes[0])
        batches = files.batches(([(epoch, i) for i in index.tolist()] for epoch, index in indices()), workers, device)
    for step, (views, index) in enumerate(batches, start):
        views = [augment(x, recipe, rng(seed, step, v, 0), image_size, torch.is_tensor(data.train), share, batch_size).contiguous(memory_format=layout)
               for v, (x, recipe) in enumerate(zip(views, recipes))]
        yield (views, to_device(data.train_labels[index], device)) if labelled else views


# ---- backbones ------------------------------------------------------------------------------------------------------
def make_backbone(arch, image_size):
    """(module without classifier, feature dimension). resnet18/50 are torchvision's, so their weights load there with fc = Identity;
    images up to 96 px get a 3x3 stem of stride 1, those up to 32 px no max-pool. resnet_tiny is for laptops."""
    if arch == "resnet_tiny":
        block = torchvision.models.resnet.BasicBlock
        down = lambda i, o: block(i, o, 2, nn.Sequential(nn.Conv2d(i, o, 1, 2, bias=False), nn.BatchNorm2d(o)))
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        return nn.Sequential(stem, block(16, 16), down(16, 32), down(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 64
    net = getattr(torchvision.models, arch)(weights=None)
    dim, net.fc = net.fc.in_features, nn.Identity()
    if image_size <= SMALL:
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    if image_size <= 32:
        net.maxpool = nn.Identity()
    return net, dim


# ---- evaluation -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def extract_features(backbone, images, size, mean, std, workers, device, name=""):
    """(features (n, d) float32 on `device`, indices (n,) of the images they belong to) of a frozen backbone, without augmentation."""
    was_training, found, kept = backbone.training, [], []
    backbone.eval()
    for x, index in squares(name, images, size, workers, device, round(size * 256 / 224) if size > SMALL else None):
        found.append(backbone(normalize(x.float() / 255, mean, std)).float())
        kept += index
    backbone.train(was_training)
    return torch.cat(found), torch.tensor(kept)


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, query_labels, k=5, metric="euclidean", temperature=0.07):
    """Top-1 accuracy in percent of k nearest neighbours, a list of them for a list of k: metric "euclidean", majority vote (the papers' protocol),
    or "cosine", votes weighted by exp(cos / temperature) (the field's). bank (M, d), queries (N, d), labels int64; a tie goes to the lower class."""
    if metric == "cosine":
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    else:                                                                       # centred: cdist loses the digits that a common offset takes
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    classes, ks = int(bank_labels.max()) + 1, [k] if isinstance(k, int) else k
    correct = torch.zeros(len(ks), device=queries.device)
    size = max(1, min(1024, 2 ** 28 // len(bank)))                              # at most a gigabyte of distances
    for q, y in zip(queries.split(size), query_labels.split(size)):
        near = q @ bank.T if metric == "cosine" else torch.cdist(q, bank)
        near, index = near.topk(min(max(ks), len(bank)), dim=1, largest=metric == "cosine")
        weight = ((near - 1) / temperature).exp() if metric == "cosine" else torch.ones_like(near)
        for i, few in enumerate(ks):
            votes = torch.zeros(len(q), classes, device=q.device).scatter_add_(1, bank_labels[index[:, :few]], weight[:, :few])
            correct[i] += (votes.argmax(1) == y).sum()
    found = [100 * c / len(queries) for c in correct.tolist()]
    return found[0] if isinstance(k, int) else found


def embedding_std(z):
    """sqrt(d) times the mean standard deviation of a dimension of the l2-normalised rows of z (n, d): 1 = isotropic, 0 = collapsed."""
    return F.normalize(z, dim=1).std(0).mean() * z.shape[1] ** 0.5


def effective_rank(z):
    """exp(entropy of the normalised singular values) of the centred z (n, d), between 1 and min(n, d)."""
    s = torch.linalg.svdvals((z - z.mean(0)).float())
    p = s / s.sum().clamp(min=1e-12)
    return torch.special.entr(p).sum().exp()


def monitor(backbone, data, args, recipe, device):
    """k-NN accuracy, both protocols, of at most 20,000 bank and 10,000 test images; {} for images without labels. backbone None:
    of raw pixels."""
    if data.train_labels is None:
        return {}
    pick = lambda labels, limit: (ok := (labels >= 0).nonzero()[:, 0])[torch.randperm(len(ok), generator=rng(0))[:limit]]
    part = []
    for images, labels, limit in ((data.train, data.train_labels, 20000), (data.test, data.test_labels, 10000)):
        rows = pick(labels, limit)
        images = images[rows.to(images.device)] if torch.is_tensor(images) else [images[i] for i in rows]
        x, kept = extract_features(backbone or nn.Flatten(), images, args.image_size, recipe["mean"], recipe["std"], args.workers, device, data.name)
        part += [x, labels[rows][kept].to(device)]
    found = {"knn5": knn_accuracy(*part), "knn200_cosine": knn_accuracy(*part, k=200, metric="cosine")}
    return {**found, "rank_h": effective_rank(part[2]).item()} if backbone else found


# ---- checkpoint, log ------------------------------------------------------------------------------------------------
def save(path, state):
    """Write beside `path`, a text as it is and anything else by torch.save, then rename: a kill or a full disk never costs the previous file."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(state.encode()) if isinstance(state, str) else torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:                    # torch.save reports a full disk as either
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        fail(f"cannot write {path} ({str(error).partition(chr(10))[0]}); the previous one, if any, is untouched")


def save_run(args, step, nets, opts, recipe):
    """backbone.pt: what other programs load, see README. last.pt: everything needed to resume; it comes second, so that a run killed between
    the two does its last epoch again."""
    save(f"{args.out}/backbone.pt", {"arch": args.arch, "image_size": args.image_size, "small_images": args.image_size <= SMALL, "mean": recipe["mean"],
                                     "std": recipe["std"], "state_dict": {k: v.cpu() for k, v in nets["backbone"].state_dict().items()}})
    save(f"{args.out}/last.pt", {"step": step, "settings": vars(args), "nets": nets.state_dict(),
                                 "opts": {k: o.state_dict() for k, o in opts.items()}})


def load_torch(path, flag, keys):
    """A dict of tensors and plain values with `keys`, or `fail` naming `flag`: no pickled code is ever run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = [k for k in keys if k not in state]
    except Exception as error:          # torch.load raises a dozen types for files that are not its own
        fail(f"{flag}: {path} cannot be read as a checkpoint ({type(error).__name__}: {str(error)[:80].partition(chr(10))[0]})")
    if missing:
        fail(f"{flag}: {path} is not a checkpoint of this project, it has no {', '.join(missing)}")
    return state


def open_run(args, nets, opts, rank, **facts):
    """Resume from --out/last.pt if it is there, else start its log. Returns the step to go on from."""
    log, last = f"{args.out}/log.jsonl", f"{args.out}/last.pt"
    if args.sync_bn:
        sync_batch_norms(nets)
    if args.compile:
        torch._dynamo.config.recompile_limit = 16                               # views, tasks, parts and evaluations differ in shape
        nets["backbone"].compile()
    settings, step, rows = vars(args), 0, []
    if os.path.exists(last):
        state = load_torch(last, f"--out {args.out}", ("step", "settings", "nets", "opts"))
        differ = [f"{k} {state['settings'].get(k)} -> {v}" for k, v in settings.items() if state["settings"].get(k) != v and k not in FREE_ON_RESUME]
        if differ:
            fail(f"--out {args.out}: holds a run with other settings ({'; '.join(differ)}); choose another --out or repeat its settings")
        nets.load_state_dict(state["nets"])
        for k, opt in opts.items():
            opt.load_state_dict(state["opts"][k])
        step = state["step"]
        lines = open(log).readlines() if os.path.exists(log) else []
        rows = [r for line in lines if line.endswith("\n") and (r := json.loads(line)).get("step", 0) <= step]
    if rank == 0:
        try:
            os.makedirs(args.out, exist_ok=True)
            header = {"argv": sys.argv, "settings": settings, "torch": torch.__version__, "torchvision": torchvision.__version__,
                      "python": platform.python_version(), "parameters": {k: sum(p.numel() for p in n.parameters()) for k, n in nets.items()}, **facts}
            save(log, "".join(json.dumps(r) + "\n" for r in rows or [header]))      # rows after the checkpoint are written again
        except OSError as error:
            fail(f"--out {args.out}: {error}")
        print("\n".join(f"{k:>16}  {v}" for k, v in {**settings, **facts}.items()))
        print(f"goes on from step {step}" if step else "starts", "in", args.out, flush=True)
    return step


class Log:
    """log.jsonl and the progress line. `add` never waits for the GPU; `write` does, warns once of each term above its limit, and ends the
    run if a value is not finite. limits: {term: (limit, sentence)}; batch: images per step."""
    def __init__(self, out, batch, rank, world, start, stop, limits):
        self.out, self.batch, self.rank, self.world, self.start, self.stop = out, batch, rank, world, start, stop
        self.limits = dict(limits)
        self.pending, self.seconds, self.done, self.clock, self.knn = [], 0.0, 0, time.perf_counter(), ""
        self.drawn = self.clock

    def add(self, step, terms):
        self.pending.append((step, terms))

    def write(self, lr):
        names = list(self.pending[-1][1])
        values = torch.stack([torch.stack([t.float() for t in terms.values()]) for _, terms in self.pending])
        if self.world > 1:
            dist.all_reduce(values)                                             # the mean over processes, and alike on all of them
        values, now = (values / self.world).tolist(), time.perf_counter()
        for (step, _), row in zip(self.pending, values):
            if not all(map(math.isfinite, row)):
                if self.rank == 0:
                    plot_curves(self.out)
                good = f"{self.out}/last.pt" if os.path.exists(f"{self.out}/last.pt") else "none yet"
                print(f"error: not finite at step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in zip(names, row))
                      + f"; last good checkpoint: {good}", file=sys.stderr)
                raise SystemExit(1)
        took, count, pending, self.pending, self.clock = now - self.clock, len(self.pending), self.pending, [], now
        self.seconds, self.done = self.seconds + took, self.done + count
        self.event(step=step, lr=lr, images_per_s=round(self.batch * count / took, 1), **dict(zip(names, values[-1])))
        self.show(f"step {step}/{self.stop}  " + "  ".join(f"{k} {v:.3f}" for k, v in list(zip(names, values[-1]))[:3]) + self.knn
                  + f"  {self.batch * count / took:.0f} img/s  {self.seconds / self.done * (self.stop - step):.0f} s left", live=True)
        for name in [n for n in names if n in self.limits]:
            (limit, sentence), worst = self.limits[name], max((row[names.index(name)], step) for (step, _), row in zip(pending, values))
            if worst[0] > limit:
                self.event(step=worst[1], warning=f"{name} {worst[0]:.3g} > {limit}: {sentence}")
                del self.limits[name]

    def event(self, **row):
        if self.rank == 0:
            row = {k: v.item() if torch.is_tensor(v) else v for k, v in row.items()}
            with open(f"{self.out}/log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if "lr" not in row:
                self.show("  ".join(f"{k} {v}" if isinstance(v, (str, int)) else f"{k} {v:.4g}" for k, v in row.items()))
                self.knn = f"  knn5 {row['knn5']:.1f}" if "knn5" in row else self.knn
                if time.perf_counter() > self.drawn + 60:                       # a run that is killed leaves a picture too
                    plot_curves(self.out)
                    self.drawn = time.perf_counter()
        self.clock = time.perf_counter()                                        # an evaluation does not count as training time

    def show(self, line, live=False):
        if self.rank == 0:
            tty = sys.stdout.isatty()
            print("\r\033[K" * tty + line, end="" if live and tty else "\n", flush=True)

    def end(self, line):
        if self.rank == 0:
            plot_curves(self.out)
        self.show(line)
        if self.world > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def graceful_stop():
    """Yields a function that tells, after every step and alike on all processes, which signal (SIGINT, SIGTERM) has come, or 0.
    A second Ctrl-C ends the program at once."""
    seen, since = [0], [math.inf]
    def note(signum, _):
        if time.monotonic() - since[0] > 1:             # torchrun repeats the terminal's Ctrl-C at once: that is not a second one
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        seen[0], since[0] = signum, min(since[0], time.monotonic())
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    def agreed():
        if world_size() > 1:
            flag = torch.tensor(seen[0])                # on the host: gloo, no wait for the GPU
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            return flag.item()
        return seen[0]
    try:
        yield agreed
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):         # as cuBLAS and cuDNN say it
            raise
        fail(f"GPU memory ran out ({str(error).split('. ')[0]}): lower --batch-size, --image-size, or the number of views, masks, tasks or inner steps; use --bf16")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"cannot write {error.filename or 'the log'} ({error}); the last checkpoint is untouched")
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def plot_curves(out):
    """curves.png from log.jsonl: losses, k-NN accuracy, learning rate, collapse indicators."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in open(f"{out}/log.jsonl")][1:]
    names = sorted({k for r in rows for k in r} - {"step", "images_per_s", "warning"})
    groups = {"learning rate": "lr", "losses": "loss", "k-NN top-1 (%)": "knn raw", "collapse: std, cosine": "std cos_z", "effective rank": "rank", "task conflict": "conflict",
              "head: columns, norms": "live_columns zero_columns l21 frobenius"}
    panels = {title: [n for n in names if n.startswith(tuple(starts.split()))] for title, starts in groups.items()}
    panels = {title: keys for title, keys in {**panels, "other": [n for n in names if not any(n in p for p in panels.values())]}.items() if keys}
    if not panels:
        return
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(15, 4 * -(-len(panels) // 3)), layout="constrained", squeeze=False)
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if key in r]
            if key.startswith("raw"):
                axis.axhline(points[0][1], linestyle="--", color="gray" if "cosine" in key else "black", label=key)
            else:
                axis.plot(*zip(*points), ".-" if len(points) < 60 else "-", label=key)
        if title in ("losses", "other", "head: columns, norms"):                        # from 1e-3 to 100 in one panel, zero included
            axis.set_yscale("symlog", linthresh=0.1 if title == "losses" else 1e-3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    figure.savefig(f"{out}/curves.png", dpi=110)
    plt.close(figure)
