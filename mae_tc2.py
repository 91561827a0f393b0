"""MAE with task conflict calibration (TC2): one file, read beside the papers.

A masked autoencoder sees a quarter of an image's patches and draws the rest. TC2 takes random masks
for the views of an image: it splits each batch into K "tasks", lets the autoencoder adapt to a
task's support masks, and judges it on the query masks. Two small networks rewrite every visible
token, between encoder and decoder, as a combination of factors that all tasks share.

  MAE     He et al. 2022, arXiv 2111.06377: Section 3, Appendix A
  TC2     Guo et al., "Exploring Transferability of Self-Supervised Learning by Task Conflict
          Calibration": Eqs. 1-7, Algorithm 1, and what it says of G-SSL

One step, [TC2 Algorithm 1]:
  split the batch into K tasks of n images, draw m masks of each image         lines 2-3
  Z = tokens of class and visible patches, after the decoder's first layer, `embed`
  S = mean and covariance of Z
  f_v, f_w <- a step on the support masks, then one on the query masks         line 4   Eqs. 4, 5
  theta_k  <- theta - beta_1 grad L_support(theta)           for each task     line 5   Eq. 6
  theta    <- theta - beta_2 mean_k grad L_query(theta_k)                      line 5   Eq. 7

  paper             here                       shape, meaning
  X_tr, x^2; K      tasks; --tasks             (K, n, 3, H, W): this process's images, whole
  x^1; m            orders; --masks            (K, m, n, L) orders of L patches, the first T seen
  support, query    [:half], [half:]           the first m // 2 masks, and the others
  f_theta           autoencoder                encoder and decoder
  z_j               Z                          (K, m, n, 1 + T, d) tokens, mean 0, norm sqrt(d);
                                               d: the decoder's width
  S                 S                          (d + 1, d) mean, then covariance, of all tokens
  f_v, V            factor_net, V              (d, n_f) columns: factors shared by all tasks
  f_w, W_j          weight_net, W              (..., n_f) f_w(z_j), the weights of one token
  f_w(z_j) V^T      z_hat                      (..., d) goes to the decoder, scaled back
  L_ssl, L_sse      reconstruction_loss        mean squared error of the masked patches
  alpha_1..4        TC2_LR                     one Adam for f_v and f_w
  beta_1, beta_2    --inner-lr, --lr           plain gradient descent, AdamW

  python mae_tc2.py                                            drawn shapes, two minutes on a laptop
  python mae_tc2.py --data /imagenet100                        one GPU; plain MAE: --baseline
  torchrun --nproc-per-node 4 mae_tc2.py --data /imagenet100   whole tasks: 8 need --tasks 8

Controls:
  --baseline --masks 4     MAE at equal masks (drawn shapes: 2); in TC2 the query half moves theta
  --baseline --epochs N    MAE at equal compute: N = 6 times TC2's (drawn shapes: 3.4), by FLOPs
  --inner-lr 0             no inner loop: the support masks train f_v and f_w alone
  --without calibration    plain first-order MAML; f_v, f_w train beside it, for the log

Result (results/mae.md): at CPU scale TC2 trains, and does not beat MAE at equal images or at equal
compute; not run at ImageNet scale.

Deviations from the papers. As in simclr_tc2.py, with the numbers and the evidence of results/tc2.md
(results/mae.md says which more of its rows hold here):
  (1)  V is orthonormal by QR.
  (2)  f_w has a skip path z V.
  (5)  Eq. 7 is first order by default.
  (6)  Eqs. 1-2 are means over samples, Eq. 7 over tasks.
  (7)  n_f = d / 2.
Here alone, with the numbers of results/mae.md, not those of tc2.md:
  (8)  Tokens are calibrated one by one, not the image's vector: the decoder has to see z_hat.
  (9)  Tokens are standardised before calibration and scaled back after it.
  (10) L_sse is MAE's mean, the sum divided by the number of pixels.
  (11) The whole image is the target, not in the support set: it has no masked patch.
  (12) f_v and f_w learn through the decoder as it is.
  (13) Up to 96 px the frequencies of the positions end near 1 / 30, not near 1e-4.
  (14) Raw pixels as target on drawn shapes.
  (15) Features are the mean of the patch tokens.
Below Eq. 2 the paper prints W_j = f_w(z_j) V^T; that has d entries, not n_f, so W_j = f_w(z_j).
"""
import argparse
import contextlib
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (Log, all_reduce_sum, at_least_float32, average_gradients, base_parser,
                    check_shared_flags, denormalize, draw_grid, draw_views, effective_rank, fail,
                    fill_from_recipe, graceful_stop, load_data, lr_scale, monitor, number, open_run,
                    parse, recipe_name, rng, run, save_run, say, set_lr, setup_processes,
                    to_device, training_batches, world_size)

SCRIPT = "mae_tc2"
TC2_LR = 3e-3           # alpha_1 .. alpha_4 at the peak of the schedule; the paper states none

# Width, blocks, heads of the encoder; width, blocks of the decoder, whose heads are 32 wide.
ARCHS = {"vit_micro": (96, 2, 3), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6),
         "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16)}
DECODERS = {"vit_micro": (64, 1), "vit_tiny": (128, 4), "vit_small": (192, 4),
            "vit_base": (512, 8), "vit_large": (512, 8)}

# MAE Section 4: crop and flip, no colours.
WEAK = {"crop": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "jitter": (0, 0, 0, 0),
        "jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0,
        "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
IMAGENET = {**WEAK, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AUGMENTATION = {"shapes": WEAK, "small": WEAK, "imagenet": IMAGENET}

# imagenet: MAE Appendix A, lr = 1.5e-4 per 256 images, at 1,024 images and 400 epochs, where MAE
# has 4,096 and 800 to 1,600. The others are ours; small is untried at this length. masks and tasks:
# TC2 has 4 tasks, m is ours; the baseline has one of each. Only shapes has been run as it stands.
RECIPES = {
    "shapes": {"arch": "vit_micro", "epochs": 6, "batch_size": 16, "lr": 2e-3,
               "weight_decay": 0.05, "warmup_epochs": 0.5, "eval_every": 2, "patch_size": 4,
               "norm_pixels": False, "position_base": 30, "masks": 2, "tasks": 2},
    "small": {"arch": "vit_tiny", "epochs": 400, "batch_size": 512, "lr": 1e-3,
              "weight_decay": 0.05, "warmup_epochs": 20.0, "eval_every": 20, "patch_size": 4,
              "norm_pixels": True, "position_base": 30, "masks": 4, "tasks": 4},
    "imagenet": {"arch": "vit_base", "epochs": 400, "batch_size": 1024, "lr": 6e-4,
                 "weight_decay": 0.05, "warmup_epochs": 40.0, "eval_every": 20, "patch_size": 16,
                 "norm_pixels": True, "position_base": 1e4, "masks": 4, "tasks": 4},
}

# A term above its limit warns once, on the screen and in the log.
LIMITS = {"inner_step": (0.003, "the inner step is long beside the weights; if it stays so (in the "
                                "first steps it is ten times longer), that may cost accuracy: "
                                "lower --inner-lr")}


# ---- patches and masks ---------------------------------------------------------------------------
def patchify(x, p):
    """(..., 3, H, W) -> (..., L, 3 p p): patches row by row, each in the order channel, y, x.

    [MAE Section 3]"""
    return F.pixel_unshuffle(x, p).flatten(-2).mT


def unpatchify(patches, p, size):
    """The inverse of `patchify`: (..., L, 3 p p) -> (..., 3, size, size)."""
    return F.pixel_shuffle(patches.mT.unflatten(-1, (size // p, -1)), p)


def visible_patches(L, mask_ratio):
    """T, the number of patches that the encoder sees, of L in all."""
    return round(L * (1 - mask_ratio))


def draw_masks(args, n, progress, device):
    """Random orders (m, n, L) of the L patches, one per mask and image: the first T are visible.

    n: this process's images. A function of seed and progress alone. [MAE Section 3]"""
    L = (args.image_size // args.patch_size) ** 2
    generator = rng(args.seed, "masks", progress)
    # The draws are made for the joined batch of all processes, each sorts its share.
    u = torch.rand(args.masks, n * world_size(), L, generator=generator)
    first = this_rank() * n
    return to_device(u[:, first:first + n].argsort(-1), device)


def take_patches(patches, which):
    """The rows `which` (..., T) of patches (..., L, c): (..., T, c)."""
    return patches.gather(-2, which[..., None].expand(*which.shape, patches.shape[-1]))


def this_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def sincos_positions(dim, side, base=1e4):
    """Fixed positions (side^2, dim): a quarter each of sin y, cos y, sin x, cos x.

    The frequencies fall from 1 towards 1 / base, geometrically; on a grid of 8 x 8 those below
    1 / 30 are nearly constant. [MAE Appendix A]"""
    frequency = base ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    line = torch.arange(side, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    y = y.flatten()[:, None] * frequency
    x = x.flatten()[:, None] * frequency
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1).float()


# ---- model ---------------------------------------------------------------------------------------
class Block(nn.Module):
    """Pre-norm transformer block: (n, s, d) -> (n, s, d), for s tokens."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (n, heads, s, d / heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def draw_weights(net):
    """Xavier-uniform matrices, zero biases. [MAE Appendix A]"""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """ViT with a class token and fixed positions.

    With `visible` (n, T) it gives the tokens of the class and of these patches, (n, 1 + T, d);
    without, the features of evaluation (n, d), the mean over the tokens of all patches. d: here the
    encoder's width. [MAE Section 3]"""
    def __init__(self, image_size, patch_size, dim, depth, heads, position_base=1e4):
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = nn.Linear(3 * patch_size ** 2, dim)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        positions = sincos_positions(dim, image_size // patch_size, position_base)
        self.register_buffer("positions", positions)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, 1e-6)
        draw_weights(self)

    def tokens(self, x, visible=None):
        """x (n, 3, H, W) -> (n, 1 + T, d), the class token first; visible (n, T), None = all."""
        patches = patchify(x, self.patch_size)
        positions = self.positions.expand(len(x), -1, -1)
        if visible is not None:
            patches = take_patches(patches, visible)
            positions = take_patches(positions, visible)
        t = self.patch_embed(patches) + positions
        class_token = self.class_token.expand(len(x), -1, -1).to(t.dtype)
        return self.norm(self.blocks(torch.cat([class_token, t], dim=1)))

    def forward(self, x, visible=None):
        if visible is None:
            return self.tokens(x)[:, 1:].mean(1)
        return self.tokens(x, visible)


class Decoder(nn.Module):
    """`embed`: encoder tokens -> (..., d), what TC2 calibrates; `forward` predicts every patch.

    Its attention heads are 32 wide.     [MAE Section 3]"""
    def __init__(self, image_size, patch_size, encoder_dim, dim, depth, position_base=1e4):
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        positions = sincos_positions(dim, image_size // patch_size, position_base)
        self.register_buffer("positions", positions)
        self.blocks = nn.Sequential(*[Block(dim, dim // 32) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.predict = nn.Linear(dim, 3 * patch_size ** 2)
        draw_weights(self)

    def forward(self, t, order):
        """Tokens t (n, 1 + T, d) of the class and of the patches order[:, :T]; order (n, L)
        -> patches (n, L, 3 p p). A mask token stands in for each patch that is not visible."""
        L, T = order.shape[1], t.shape[1] - 1
        mask_tokens = self.mask_token.to(t.dtype).expand(len(t), L - T, -1)
        shuffled = torch.cat([t[:, 1:], mask_tokens], dim=1)

        place = order.argsort(1)        # the inverse: where in `order` each patch stands
        full = take_patches(shuffled, place) + self.positions
        full = torch.cat([t[:, :1], full], dim=1)
        full = self.norm(self.blocks(full))
        return self.predict(full[:, 1:])


class MaskedAutoencoder(nn.Module):
    """f_theta: encoder and decoder, over m masks of every image at once. [MAE Section 3]

    x (..., n, 3, H, W), orders (..., m, n, L) of which the first T patches are seen."""
    def __init__(self, nets, T, bf16):
        super().__init__()
        self.backbone = nets["backbone"]
        self.decoder = nets["decoder"]
        self.T = T
        self.bf16 = bf16

    def embed(self, x, orders):
        """Tokens (..., m, n, 1 + T, d) in the decoder's width, never in bfloat16."""
        # Each image under its m masks: (..., m, n, 3, H, W).
        images = x.unsqueeze(-5).expand(*orders.shape[:-1], -1, -1, -1)
        visible = orders[..., :self.T]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            t = self.backbone(images.flatten(0, -4), visible.flatten(0, -2))
            t = self.decoder.embed(t)
        return at_least_float32(t).unflatten(0, orders.shape[:-1])

    def decode(self, t, orders):
        """Predicted patches (..., m, n, L, 3 p p) from tokens t (..., m, n, 1 + T, d)."""
        with torch.autocast(t.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = self.decoder(t.flatten(0, -3), orders.flatten(0, -2))
        return at_least_float32(predicted).unflatten(0, orders.shape[:-1])

    def forward(self, x, orders, calibrated):
        """Predicted patches; calibrated: what happens to the tokens in between, a function."""
        return self.decode(calibrated(self.embed(x, orders)), orders)


def build_nets(args):
    """Encoder, decoder and f_v, f_w, drawn last: --baseline starts from the same autoencoder.

    [MAE Section 3]"""
    dim, depth, heads = ARCHS[args.arch]
    decoder_dim, decoder_depth = DECODERS[args.arch]
    sizes = (args.image_size, args.patch_size)
    encoder = Encoder(*sizes, dim, depth, heads, args.position_base)
    decoder = Decoder(*sizes, dim, decoder_dim, decoder_depth, args.position_base)
    nets = nn.ModuleDict({"backbone": encoder, "decoder": decoder})
    if not args.baseline:
        orthogonal = "qr" not in args.without
        skip = "skip" not in args.without
        nets["factor_net"] = FactorNet(decoder_dim, args.factors, orthogonal)
        nets["weight_net"] = WeightNet(decoder_dim, args.factors, skip)
    return nets


def build_opts(nets, args):
    """AdamW, beta_2 = 0.95 [MAE Appendix A], for encoder and decoder, without weight decay on
    biases, norms and tokens; Adam for f_v and f_w."""
    params = [*nets["backbone"].parameters(), *nets["decoder"].parameters()]
    matrices = [p for p in params if p.ndim == 2]
    others = [p for p in params if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": others, "weight_decay": 0}]
    opts = {"encoder": torch.optim.AdamW(groups, args.lr, (0.9, 0.95), fused=True)}
    if not args.baseline:
        factors = [*nets["factor_net"].parameters(), *nets["weight_net"].parameters()]
        opts["factors"] = torch.optim.Adam(factors, TC2_LR, fused=True)
    return opts


# ---- MAE -----------------------------------------------------------------------------------------
def normalize_patches(patches):
    """Each patch (..., 3 p p) with zero mean and unit variance. [MAE Section 3]"""
    std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - patches.mean(-1, keepdim=True)) / std


def target_patches(x, args):
    """What is to be predicted of x (..., 3, H, W): its patches (..., L, 3 p p)."""
    patches = patchify(x, args.patch_size)
    if args.norm_pixels:
        return normalize_patches(patches)
    return patches


def reconstruction_loss(predicted, target, order, T):
    """Mean squared error over the pixels of the masked patches, order[..., T:] -> scalar.

    predicted (..., n, L, 3 p p), target (n, L, 3 p p), order (..., n, L).
    [MAE Section 3] [TC2 Eqs. 4-7]"""
    masked = order[..., T:]
    target = target.expand_as(predicted)
    error = take_patches(predicted, masked) - take_patches(target, masked)
    return error.square().mean()


def mae_step(autoencoder, opt, x, orders, args):
    """One step of MAE on m masks of each image; the MAE paper has m = 1. [MAE Section 3]

    x (n, 3, H, W), orders (m, n, L)."""
    predicted = autoencoder.decode(autoencoder.embed(x, orders), orders)
    loss = reconstruction_loss(predicted, target_patches(x, args), orders, autoencoder.T)

    opt.zero_grad()
    loss.backward()
    average_gradients(autoencoder.parameters())
    opt.step()
    return {"loss_ssl": loss.detach()}


# ---- TC2 -----------------------------------------------------------------------------------------
# -- shared: tc2 --
def batch_summary(z):
    """S (d + 1, d): the mean in row 0, the covariance below it, of the M rows of z (..., d).

    The rows of all processes count; the covariance is divided by M - 1. [TC2 before Eq. 1]"""
    z = z.detach().flatten(0, -2)
    M = len(z) * world_size()
    mean = all_reduce_sum(z.sum(0)) / M
    covariance = all_reduce_sum((z - mean).T @ (z - mean)) / (M - 1)
    return torch.cat([mean[None], covariance])


def mlp(inputs, hidden, outputs):
    """Three linear layers with ReLU. [TC2 Appendix IV, of f_w; f_v has the same here]"""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(),
                         nn.Linear(hidden, hidden), nn.ReLU(),
                         nn.Linear(hidden, outputs))


class FactorNet(nn.Module):
    """f_v: S (d + 1, d) -> V (d, n_f). [TC2 question i]

    Each column of S, a dimension's mean and covariances, gives a row of V; then QR, with signs such
    that the diagonal of R is positive, makes the columns orthonormal. A network of the flattened S
    would have 134M parameters at d = n_f = 512, this one has 2.1M."""
    def __init__(self, dim, n_factors, orthogonal=True, hidden=256):
        super().__init__()
        # With fewer hidden units than columns V would lack full rank, and its QR a usable gradient.
        self.mlp = mlp(dim + 1, max(hidden, 2 * n_factors), n_factors)
        # More columns than rows cannot be orthonormal.
        self.orthogonal = orthogonal and n_factors <= dim

    def forward(self, S):
        V = self.mlp(S.T)
        if self.orthogonal:
            V, R = torch.linalg.qr(V)
            V = V * torch.where(R.diagonal() < 0, -1, 1)    # QR is unique up to these signs
        return V


class WeightNet(nn.Module):
    """f_w: z (..., d), V (d, n_f) -> W (..., n_f) = z V + MLP(z). [TC2 question ii]

    V is given: no gradient reaches f_v through the skip path. With QR a loss of cosines, such as
    SimCLR's, gives f_v none at all: L_v alone trains it. MAE's decoder sees z_hat itself, so that
    its loss reaches f_v. The MLP starts at zero: calibration starts as the projection on V."""
    def __init__(self, dim, n_factors, skip=True, hidden=128):
        super().__init__()
        # With fewer hidden units than factors W would lack full rank.
        self.mlp = mlp(dim, max(hidden, n_factors), n_factors)
        self.skip = skip
        if skip:
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, z, V):
        if self.skip:
            return z @ V.detach() + self.mlp(z)
        return self.mlp(z)


def calibrate(z, V, weight_net):
    """z_hat = f_w(z) V^T, (..., d) -> (..., d). [TC2 question iii]"""
    return weight_net(z, V) @ V.T


def factor_loss(z, V):
    """L_v = ||V^T V - I||^2 + ||Z - Z V V^T||^2, the second per row of z (..., d). [TC2 Eq. 1]"""
    identity = torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
    orthogonality = (V.T @ V - identity).square().sum()
    unexplained = (z - z @ V @ V.T).square().sum(-1).mean()
    return orthogonality + unexplained


def weight_loss(z, W, V):
    """L_w = ||z_j - W_j V^T||^2 + ||W_j||_1, the mean over samples; V is given. [TC2 Eq. 2]"""
    error = (z - W @ V.detach().T).square().sum(-1)
    sparsity = W.abs().sum(-1)
    return (error + sparsity).mean()


def mean_over_tasks(loss_fn, z_hat):
    """Mean of loss_fn(z_hat[k], k) over the K tasks, with one task's graph in memory at a time.

    The loss is differentiated to z_hat task by task. What is returned is linear in z_hat, with this
    value and this gradient, so that backward() goes on from there by the chain rule."""
    K = len(z_hat)
    value, gradients = 0, []
    for k in range(K):
        z = z_hat[k].detach().requires_grad_()
        loss = loss_fn(z, k) / K
        value = value + loss.detach()
        gradient, = torch.autograd.grad(loss, z)
        gradients.append(gradient)
    linear = (z_hat * torch.stack(gradients)).sum()
    return value + linear - linear.detach()


def update_factors(nets, opt, Z, S, on_support, on_query, lambda_v, lambda_s):
    """Stage 1, f_theta fixed: a step of f_v and f_w on the support, one on the query views.

    Z (K, m, n, ..., d) embeddings without graph; S (d + 1, d); on_support(z_hat, k) is the loss of
    the calibrated support views of task k, on_query(z_hat, k) sees all its views. L_v + lambda_s
    L_w is Eq. 3: L_v of all views in both steps, as in Eq. 1, L_w of the views of the step.
    lambda_v = 1 but for an ablation. [TC2 Eqs. 3-5]"""
    factor_net, weight_net = nets["factor_net"], nets["weight_net"]
    half = Z.shape[1] // 2

    # Eq. 4: a step on the support views.
    V = factor_net(S)
    W = weight_net(Z[:, :half], V)
    loss_support = mean_over_tasks(on_support, W @ V.T)
    loss_v = factor_loss(Z, V)
    loss_w = weight_loss(Z[:, :half], W, V)
    take_step(opt, loss_support + lambda_v * loss_v + lambda_s * loss_w)

    # Eq. 5: a step on the query views, at f'_v and f'_w. It does not differentiate through Eq. 4.
    # W of all views: on_query takes what it needs. SimCLR makes its anchors of the support views,
    # MAE leaves them out.
    V = factor_net(S)
    W = weight_net(Z, V)
    loss_query = mean_over_tasks(on_query, W @ V.T)
    loss_v = factor_loss(Z, V)
    loss_w = weight_loss(Z[:, half:], W[:, half:], V)
    take_step(opt, loss_query + lambda_v * loss_v + lambda_s * loss_w)

    return {"loss_factors_support": loss_support.detach(), "loss_v": loss_v.detach(),
            "loss_w": loss_w.detach(), "loss_factors_query": loss_query.detach()}


def take_step(opt, loss):
    opt.zero_grad()
    loss.backward()
    average_gradients(opt.param_groups[0]["params"])
    opt.step()


def inner_step(theta, loss, beta_1, second_order=False):
    """theta_k = theta - beta_1 grad loss(theta), for theta {name: tensor}. [TC2 Eq. 6]

    First order: theta_k are new leaves. Second order: they are functions of theta."""
    # materialize_grads: zeros for a parameter that the loss does not use.
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=second_order,
                                materialize_grads=True)
    theta_k = {name: p - beta_1 * g for (name, p), g in zip(theta.items(), grads)}
    if not second_order:
        theta_k = {name: p.detach().requires_grad_() for name, p in theta_k.items()}
    return theta_k


def add_gradient(theta, loss, at):
    """theta's .grad += the gradient of `loss` with respect to the weights `at`. [TC2 Eq. 7]

    at = theta_k: first order. at = theta: second order, through the graph of Eq. 6."""
    grads = torch.autograd.grad(loss, list(at.values()), materialize_grads=True)
    for p, g in zip(theta.values(), grads):
        if p.grad is None:
            p.grad = torch.zeros_like(p)        # in the memory layout of p: fused Adam needs that
        p.grad += g


@torch.no_grad()
def relative_change(theta_k, theta):
    """||theta_k - theta|| / ||theta||: the length of the inner step."""
    change = [theta_k[name] - theta[name] for name in theta]
    return nn.utils.get_total_norm(change) / nn.utils.get_total_norm(list(theta.values()))

# -- end shared --


def standardize_tokens(t):
    """(z, mean, std) of tokens t (..., d) = mean + std z: each z has zero mean and norm sqrt(d).

    Almost: 1e-6 is added to the variance."""
    mean = t.mean(-1, keepdim=True)
    std = (t.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    return (t - mean) / std, mean, std


def calibrated_tokens(t, V, weight_net):
    """Tokens t (..., d) with z replaced by z_hat, on their old scale. [TC2 question iii]"""
    z, mean, std = standardize_tokens(t)
    return mean + std * calibrate(z, V, weight_net)


# ---- one step ------------------------------------------------------------------------------------
def train_step(nets, opts, views, args, progress):
    """One step, optimisers included: views (1, K n, 3, H, W) of this process -> terms to log.

    loss_query        L_sse of Eq. 7: the error of the query masks at theta_k.
    loss_support      The error of the support masks before the inner step.
    loss_ssl          The error of all masks, the one loss of --baseline.
    inner_step        Length of the last task's inner step, divided by that of the weights. One of
                      0.004 ended 1.1 +- 1.1 points lower, one of 0.1 harms.
    loss_v, loss_w    Eqs. 1 and 2, as they stand in Eq. 5: loss_w of the query masks alone.
    loss_factors_*    The first terms of Eqs. 4 and 5.

    progress, the share of the training done, chooses the masks. [TC2 Algorithm 1]"""
    x = views[0]
    orders = draw_masks(args, len(x), progress, x.device)       # (m, K n, L), for all of this step
    T = visible_patches(orders.shape[-1], args.mask_ratio)
    autoencoder = MaskedAutoencoder(nets, T, args.bf16)
    if args.baseline:
        return mae_step(autoencoder, opts["encoder"], x, orders, args)
    K = args.tasks // world_size()                              # of this process
    half = args.masks // 2

    # Lines 2-3.
    tasks = x.unflatten(0, (K, -1))                             # (K, n, 3, H, W)
    targets = target_patches(tasks, args)                       # (K, n, L, 3 p p)
    orders = orders.unflatten(1, (K, -1)).transpose(0, 1)       # (K, m, n, L)
    with torch.no_grad():
        t = autoencoder.embed(tasks, orders)
        Z, mean, std = standardize_tokens(t)                    # (K, m, n, 1 + T, d)
    S = batch_summary(Z)

    # Line 4, Eqs. 4 and 5: f_theta is fixed, z_hat goes through its decoder. For task k
    # support_error gets (m // 2, n, 1 + T, d), query_error all m masks, of which it takes its half.
    def support_error(z_hat, k):
        t = mean[k, :half] + std[k, :half] * z_hat
        predicted = autoencoder.decode(t, orders[k, :half])
        return reconstruction_loss(predicted, targets[k], orders[k, :half], T)

    def query_error(z_hat, k):
        t = mean[k, half:] + std[k, half:] * z_hat[half:]
        predicted = autoencoder.decode(t, orders[k, half:])
        return reconstruction_loss(predicted, targets[k], orders[k, half:], T)

    lambda_v = 0 if "lv" in args.without else 1
    factor_terms = update_factors(nets, opts["factors"], Z, S, support_error, query_error, lambda_v,
                                  args.lambda_s)
    # From here on tokens are calibrated with these V and f_w; f_v has moved, so V is taken anew.
    V = nets["factor_net"](S).detach()

    def calibrated(t):
        if "calibration" in args.without:
            return t
        return calibrated_tokens(t, V, nets["weight_net"])

    # Line 5, Eqs. 6 and 7, task after task. f_v and f_w are fixed, they are no part of theta.
    theta = dict(autoencoder.named_parameters())
    opts["encoder"].zero_grad()
    support_losses = []
    query_losses = []
    with attention_kernel(args.second_order):
        for images, order, target in zip(tasks, orders, targets):
            theta_k = theta
            if args.inner_lr:
                predicted = autoencoder(images, order[:half], calibrated)
                loss_support = reconstruction_loss(predicted, target, order[:half], T)
                theta_k = inner_step(theta, loss_support, args.inner_lr, args.second_order)
                support_losses.append(loss_support.detach())

            # The autoencoder with the weights theta_k. No weight is shared under two names, so that
            # there is none to tie.
            inputs = (images, order[half:], calibrated)
            predicted = functional_call(autoencoder, theta_k, inputs, tie_weights=False)
            loss_query = reconstruction_loss(predicted, target, order[half:], T)

            # First order: the gradient at theta_k is given to theta as it is.
            at = theta if args.second_order else theta_k
            add_gradient(theta, loss_query / K, at)
            query_losses.append(loss_query.detach())

    # The length of the inner step is taken before theta moves.
    terms = {"loss_query": torch.stack(query_losses).mean()}
    if args.inner_lr:
        terms["loss_support"] = torch.stack(support_losses).mean()
        terms["inner_step"] = relative_change(theta_k, theta)
    average_gradients(theta.values())
    opts["encoder"].step()
    return {**terms, **factor_terms}


def attention_kernel(twice):
    """A kernel that can be differentiated twice, if need be: the fast ones cannot."""
    if twice:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


# ---- what is measured at evaluations -------------------------------------------------------------
@torch.no_grad()
def diagnose(nets, views, args):
    """The last batch under one mask each, at the present weights: terms to log.

    rank_z, rank_z_hat   Effective rank of all tokens, before and after calibration. It should not
                         fall to a few.
    cos_z_hat            Cosine of a token before and after calibration, at 1 it is not moved.
                         Calibrated here even with --without calibration.
    loss_*               Errors of the rows of reconstructions.png, which is drawn here: eight
                         images, masked, reconstructed, and reconstructed from calibrated tokens."""
    x = views[0]
    # Progress -1, which no step has: the same masks at every evaluation.
    orders = draw_masks(args, len(x), -1, x.device)[:1]                 # (1, n, L)
    T = visible_patches(orders.shape[-1], args.mask_ratio)
    autoencoder = MaskedAutoencoder(nets, T, args.bf16)
    t = autoencoder.embed(x, orders)                                    # (1, n, 1 + T, d)
    z, _, _ = standardize_tokens(t)
    found = {"rank_z": effective_rank(z.flatten(0, -2))}
    tokens = {"reconstruction": t}
    if not args.baseline:
        V = nets["factor_net"](batch_summary(z))
        z_hat = calibrate(z, V, nets["weight_net"])
        found["rank_z_hat"] = effective_rank(z_hat.flatten(0, -2))
        found["cos_z_hat"] = F.cosine_similarity(z_hat, z, dim=-1).mean()
        tokens["calibrated"] = calibrated_tokens(t, V, nets["weight_net"])

    # The first eight images, without and with calibration.
    x = x[:8]
    orders = orders[:, :8]
    target = target_patches(x, args)
    predictions = {}
    for name, t in tokens.items():
        predictions[name] = autoencoder.decode(t[:, :8], orders)
        found[f"loss_{name}"] = reconstruction_loss(predictions[name], target, orders, T)
    if this_rank() == 0:
        draw_reconstructions(x, orders[0, :, T:], predictions, args)
    return found


def draw_reconstructions(x, masked, predictions, args):
    """reconstructions.png: x (n, 3, size, size), then without its masked patches, then with these
    from each of predictions {name: (1, n, L, 3 p p)}. masked (n, L - T): their numbers."""
    patches = patchify(x, args.patch_size)
    hidden = torch.zeros_like(patches[..., :1]).scatter_(1, masked[..., None], 1)
    rows = {"original": patches, "masked": patches * (1 - hidden)}
    for name, predicted in predictions.items():
        if args.norm_pixels:                            # with the true patch's mean and scale
            std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            predicted = predicted * std + patches.mean(-1, keepdim=True)
        rows[name] = torch.where(hidden > 0, predicted[0], patches)

    stats = AUGMENTATION[recipe_name(args.data, args.image_size)]
    pictures = {}
    for name, row in rows.items():
        images = unpatchify(row, args.patch_size, args.image_size)
        pictures[name] = denormalize(images, stats)
    draw_grid(f"{args.out}/reconstructions.png", pictures)


# ---- for other programs --------------------------------------------------------------------------
def encoder_from_checkpoint(state):
    """The Encoder of a backbone.pt, with its weights; its patch size is read from their shape."""
    weights = state["state_dict"]
    pixels = weights["patch_embed.weight"].shape[1]                     # 3 p p
    patch_size = round((pixels / 3) ** 0.5)
    encoder = Encoder(state["image_size"], patch_size, *ARCHS[state["arch"]])
    encoder.load_state_dict(weights)                                    # positions among them
    return encoder


def to_torchvision(state_dict, patch_size):
    """The encoder's weights under the names of torchvision.models.vit_*.

    With `heads` = Identity that network gives our class token. Positions are a parameter there."""
    names = {"norm1": "ln_1.", "norm2": "ln_2.", "qkv": "self_attention.in_proj_",
             "proj": "self_attention.out_proj.", "mlp.0": "mlp.0.", "mlp.2": "mlp.3."}
    kernel = state_dict["patch_embed.weight"].unflatten(1, (3, patch_size, patch_size))
    positions = F.pad(state_dict["positions"], (0, 0, 1, 0))            # none for the class token
    found = {"class_token": state_dict["class_token"],
             "conv_proj.weight": kernel,
             "conv_proj.bias": state_dict["patch_embed.bias"],
             "encoder.pos_embedding": positions[None],
             "encoder.ln.weight": state_dict["norm.weight"],
             "encoder.ln.bias": state_dict["norm.bias"]}
    for key, value in state_dict.items():
        if key.startswith("blocks."):
            _, i, name = key.split(".", 2)                              # blocks.3.mlp.0.weight
            layer, kind = name.rsplit(".", 1)
            found[f"encoder.layers.encoder_layer_{i}.{names[layer]}{kind}"] = value
    return found


# ---- flags and checks ----------------------------------------------------------------------------
def parse_args(argv=None):
    p = base_parser(__doc__, RECIPES, tuple(ARCHS))
    add = p.add_argument
    add("--patch-size", type=number(int, 1), help="p, side of a patch in pixels")
    add("--mask-ratio", type=number(float, 0.05, 0.95), default=0.75,
        help="share of the patches that are masked (default: 0.75 as in MAE)")
    add("--norm-pixels", action=argparse.BooleanOptionalAction, default=None,
        help="normalise each target patch, MAE's better variant (default: yes; not for shapes, "
        "whose patches are often noise alone)")
    add("--masks", type=number(int, 1),
        help="m, random masks of each image per step (default: 4, shapes: 2; 1 with --baseline)")
    add("--tasks", type=number(int, 1),
        help="K, tasks per batch (default: 4 as in the paper, shapes: 2; --baseline has none)")
    add("--inner-lr", type=number(float, 0), default=0.01,
        help="beta_1 of Eq. 6; 0 = no inner loop (default: 0.01)")
    add("--second-order", action="store_true",
        help="differentiate Eq. 7 through Eq. 6 (default: first order)")
    add("--factors", type=number(int, 1),
        help="n_f, columns of V (default: d / 2, d the decoder's width; n_f = d, the paper's best, "
        "makes Eq. 1 zero with QR; above d there is no QR)")
    add("--lambda-s", type=number(float, 0), default=0.1,
        help="lambda_s of Eq. 3; 0 = no L_w (default: 0.1; paper: 0.001 to 1)")
    add("--without", nargs="+", default=[], choices=("qr", "skip", "lv", "calibration"),
        help="take away: the QR of V, the skip path of f_w, L_v, calibration in Eqs. 6-7")
    return parse(p, argv, ("tasks", "inner_lr", "second_order", "factors", "lambda_s",
                           "without"))


def fill_defaults(args, data, device):
    """Fill the flags left open."""
    if args.baseline:
        args.masks = args.masks or 1
        args.tasks = args.tasks or 1
    fill_from_recipe(args, RECIPES, data, device, SCRIPT)
    dim, _ = DECODERS[args.arch]
    args.factors = args.factors or dim // 2
    args.images_per_step = args.batch_size
    if args.factors == dim and "qr" not in args.without and not args.baseline:
        say(f"--factors {args.factors}: as many as dimensions, so that V is square and orthogonal: "
            "Eq. 1 is zero by construction")


def view_augmentations(args, data):
    """The augmentation of the one view, whose masks are the views of TC2."""
    return [AUGMENTATION[recipe_name(data.name, args.image_size)]]


def check_args(args, data, world):
    """Settings that do not go together end in a sentence."""
    if args.sync_bn:
        fail("--sync-bn: a ViT has no BatchNorm")
    check_shared_flags(args, data, world)
    if args.image_size % args.patch_size:
        fail(f"--patch-size {args.patch_size}: does not divide the image size {args.image_size}")
    patches = (args.image_size // args.patch_size) ** 2
    if not 0 < visible_patches(patches, args.mask_ratio) < patches:
        fail(f"--mask-ratio {args.mask_ratio}: leaves no patch visible, or none masked, of "
             f"{patches}")
    if args.batch_size % world:
        fail(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes")
    if args.baseline:
        return
    if args.batch_size % args.tasks:
        fail(f"--batch-size {args.batch_size}: must be a multiple of --tasks {args.tasks}")
    if args.tasks % world:
        fail(f"--tasks {args.tasks}: must be a multiple of the {world} processes, each holds whole "
             "tasks")
    if args.masks < 2:
        fail(f"--masks {args.masks}: TC2 needs at least 2, one for support and one for query")
    if args.compile and args.second_order:
        fail("--second-order: cannot go with --compile, whose backward pass has no derivative")


def main(argv=None):
    args = parse_args(argv)
    # -- shared: main --
    rank, world, device = setup_processes(args.device)
    data = load_data(args.data, args.image_size, args.workers)
    fill_defaults(args, data, device)
    check_args(args, data, world)
    augmentations = view_augmentations(args, data)

    torch.manual_seed(args.seed)                    # the same initial weights on every process
    nets = build_nets(args).to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        nets = nn.SyncBatchNorm.convert_sync_batchnorm(nets)
    if args.compile:
        torch._dynamo.config.recompile_limit = 16   # views, tasks, evaluations differ in shape
        torch._functorch.config.donated_buffer = False      # a `diagnose` may go backward twice
        nets["backbone"].compile()
    opts = build_opts(nets, args)

    # The schedule counts optimiser steps. An incomplete last batch is left out.
    per_epoch = len(data.train) // args.images_per_step
    total = args.epochs * per_epoch
    stop = total
    if args.max_steps:
        stop = min(stop, args.max_steps)
    argv = sys.argv[1:] if argv is None else argv
    start, settings = open_run(args, argv, data, nets, opts, rank)
    log = Log(args, rank, stop, LIMITS)

    def evaluate(backbone):
        if rank > 0:
            return {}
        return monitor(backbone, data, args, augmentations[0], device)

    with graceful_stop() as stop_signal:
        if data.test_labels is None:
            log.show(f"{args.data} has no train/ and val/ or test/ of class folders: training "
                     "without labels, the k-NN monitor is off")
        elif start == 0:                            # what the run has to beat
            log.show("step 0: k-NN before training ...", live=True)
            raw = evaluate(None) if torch.is_tensor(data.train) else {}
            raw = {f"raw_pixels_{name}": value for name, value in raw.items()}
            log.event(0, **evaluate(nets["backbone"]), **raw)

        if start >= stop:
            log.show(f"complete at step {start}: nothing is left to train")

        # `train_step` is one step of gradient descent. The lines around it look, log and save.
        batches = training_batches(data, augmentations, args, rank, world, device, start, stop)
        for step, (views, index) in enumerate(batches, start + 1):      # counts steps that are done
            if step == 1 and rank == 0:
                draw_views(args, data, views, index, augmentations)
            set_lr(opts, lr_scale(step - 1, total, args.warmup_epochs * per_epoch))
            terms = train_step(nets, opts, views, args, progress=(step - 1) / total)
            log.add(step, terms)

            signum = stop_signal()
            last = step == stop
            epoch_end = last or step % per_epoch == 0
            evaluate_now = last or (epoch_end and (step // per_epoch) % args.eval_every == 0)
            if epoch_end or signum or step % args.log_every == 0:
                log.write(nets, opts["encoder"].param_groups[0]["lr"])
            if signum and rank == 0:                # first: an evaluation may outlast the grace
                save_run(args, step, nets, opts, augmentations[0], settings)
            if evaluate_now:
                log.event(step, **evaluate(nets["backbone"]), **diagnose(nets, views, args))
            if epoch_end and rank == 0:
                save_run(args, step, nets, opts, augmentations[0], settings)
            if signum:
                log.end(f"stopped by signal {signum} after step {step}; the same command goes on")
                raise SystemExit(128 + signum)
    labels = " --data FOLDER-WITH-TRAIN-AND-VAL" if data.test_labels is None else ""
    log.end(f"done: {args.out}/backbone.pt, curves.png, views.png, log.jsonl; next: "
            f"python eval_linear.py {args.out}{labels}")
    # -- end shared --


if __name__ == "__main__":
    run(main)
