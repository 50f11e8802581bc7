"""Trains the embedded diffusion model on the embedded world, on a CPU or a GPU.

    python -m blended_core.training.ddpm --out runs/ddpm --minutes 100

It writes ``state.pt`` (the state of the training, from which the same command resumes) and ``ddpm.safetensors`` (averaged weights in half
precision with their configuration). ``--init FILE.safetensors`` starts from such weights without the state of the optimizers. On a CPU,
one single-threaded process per core is faster than one process with several threads, which synchronize at every layer:

    torchrun --nproc-per-node 2 -m blended_core.training.ddpm --threads 1 --batch 8 …

``--batch`` is the batch of one process; the processes average their gradients. The network predicts x0. Unlike ε and v, x0 does not require a
small network to reproduce the noise, and errors are not amplified at high noise levels (Li & He, "Back to Basics", 2025). The variance
is learned as by Nichol & Dhariwal (2021). Muon (Jordan, 2024) updates the matrices, AdamW the other parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adm.unet import UNet, UNetConfig
from ..io.atomic import replacing
from ..schedule import Schedule
from ..toy.models import GUIDANCE_SCALE, SIDE
from ..toy.world import OBJECTS, Scene, random_scene, render

CONFIG = UNetConfig(
    image_size=SIDE,
    model_channels=32,
    channel_mult=(1, 2, 4, 5),
    conv_resample=False,  # average pooling instead of convolutions saves a quarter of the multiplications
    num_res_blocks=1,
    attention_downsampling=(4, 8),
    num_head_channels=32,
    use_scale_shift_norm=True,
)
DIFFUSION = {"schedule": "linear", "steps": 1000, "rescale_timesteps": True, "objective": "x0"}
WEIGHT_LIMIT = 4.0
VARIANCE_PENALTY = 100.0
EMPTY_SHARE = 0.08
"""Fraction of scenes without an object."""
CLASSES = len(OBJECTS) + 1
CLASS_WEIGHT, COARSE_WEIGHT = 0.02, 0.5
"""Weights of the two losses of :class:`AuxiliaryHeads`."""
MAX_STEP_SECONDS = 10.0
"""A step counts for at most this time, so that a suspended machine does not shorten the training."""


class Muon(torch.optim.Optimizer):
    """Momentum with approximately orthogonalized updates, by five Newton–Schulz steps per matrix."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(torch.lerp(p.grad, buffer, group["momentum"]).flatten(1))
                scale = math.sqrt(max(1.0, update.shape[0] / update.shape[1]))
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """[m, n] → approximately U·Vᵀ of the singular value decomposition, by the quintic iteration of Muon."""
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def head_input(channels: int) -> nn.Module:
    """The first layers of an auxiliary head."""
    return nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU())


class AuxiliaryHeads(nn.Module):
    """Small heads on intermediate features of the UNet, used only during training (deep supervision, Lee et al. 2015).

    One head classifies the object from the middle block. The other heads predict the downsampled image from each coarser resolution of the
    decoder. The inner blocks thus get a direct gradient from the first step on. Supervised inner features make the training of
    diffusion models several times faster (Yu et al., "Representation Alignment", 2025).
    """

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        with torch.no_grad():
            self.record_output(model.middle_block, "middle")
            for i, block in enumerate(model.output_blocks):
                self.record_output(block, str(i))
            device = next(model.parameters()).device
            model(torch.zeros(1, 3, SIDE, SIDE, device=device), torch.zeros(1, device=device))
        channels = {name: output.shape[1] for name, output in self.features.items()}
        self.kind = nn.Sequential(
            head_input(channels["middle"]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels["middle"], CLASSES)
        )
        # The first block of each resolution comes before the upsampling. The finest resolution has the main loss.
        levels = [str(i) for i in range(0, len(model.output_blocks), CONFIG.num_res_blocks + 1)][:-1]
        self.pictures = nn.ModuleDict({name: nn.Sequential(head_input(channels[name]), nn.Conv2d(channels[name], 3, 1)) for name in levels})

    def record_output(self, module: nn.Module, name: str) -> None:
        """Records the latest output of a module."""

        def hook(_module: nn.Module, _given: Any, output: Tensor) -> None:
            self.features[name] = output

        module.register_forward_hook(hook)

    def forward(self, x0: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy of the object, mean squared error of the downsampled images) for the latest forward pass of the UNet."""
        class_loss = F.cross_entropy(self.kind(self.features["middle"].float()), labels)
        errors = []
        for name, head in self.pictures.items():
            small: Tensor = head(self.features[name].float())
            errors.append((small - F.adaptive_avg_pool2d(x0, (small.shape[-2], small.shape[-1]))).square().mean())
        return class_loss, torch.stack(errors).mean()


def training_loss(model: nn.Module, x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(mean squared error of x̂0 with the weights of v, variational bound in bits per dimension). The bound trains only the variance."""

    def at(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)[t].to(x0.device)[:, None, None, None]

    x_t = at(schedule.sqrt_alphas_cumprod) * x0 + at(schedule.sqrt_one_minus_alphas_cumprod) * noise
    predicted, fraction = model(x_t, t.to(x0.device).float()).float().chunk(2, dim=1)
    # An error of v is an error of x̂0 divided by √(1 − ᾱ). The limit keeps nearly clean levels from dominating the loss.
    weight = (1 / at(1 - schedule.alphas_cumprod)).clamp(max=WEIGHT_LIMIT)
    mse = (weight * (predicted - x0).square()).mean()

    c1 = at(schedule.posterior_mean_coef1)
    low, high = at(schedule.posterior_log_variance_clipped), at(np.log(schedule.betas))
    log_variance = low + (fraction + 1) / 2 * (high - low)
    difference = c1 * (x0 - predicted.detach())  # the terms of x_t in both means cancel
    kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + difference.square() * (-log_variance).exp())
    # A fraction outside −1..1 is a variance outside β̃..β.
    excess = F.relu(fraction.abs() - 1).square().mean()
    return mse, kl.flatten(1).mean(1).mean() / math.log(2) + VARIANCE_PENALTY * excess


def sample_timesteps(rng: np.random.Generator, batch: int, steps: int) -> Tensor:
    """Random levels: half stratified over 0.35…0.75 of the steps, which determine the object, half over 0.03…0.85.

    A tenth are uniform over all levels. Above 0.85 hardly anything of a 64×64 image is visible.
    """
    place = (np.arange(batch) + rng.uniform(size=batch)) / batch
    u = np.where(np.arange(batch) % 2, 0.35 + 0.4 * place, 0.03 + 0.82 * place)
    anywhere = rng.uniform(size=batch) < 0.1
    u = np.where(anywhere, rng.uniform(size=batch), u)
    return torch.as_tensor((u * steps).astype(np.int64).clip(0, steps - 1))


def batch_of_scenes(rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """([batch, 3, 64, 64] in −1..1, class of each object, 0 for none). Objects have one size and are in the middle, as in the region of an edit."""

    def scene() -> Scene:
        return random_scene(rng, objects=int(rng.uniform() > EMPTY_SHARE), size=(40 / SIDE, 40 / SIDE), centered=1.0)

    scenes = [scene() for _ in range(batch)]
    labels = [list(OBJECTS).index(s.objects[0].name) + 1 if s.objects else 0 for s in scenes]
    pictures = np.stack([render(s) for s in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels)


def load_fitting(model: nn.Module, weights: dict[str, Tensor]) -> str:
    """Copies the tensors whose names and shapes match those of the model, for a start from a different architecture. Returns a message."""
    own = model.state_dict()
    fitting = {k: v.float() for k, v in weights.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict({**own, **fitting})
    return f"{len(fitting)} of {len(own)} tensors loaded"


def average_gradients(parameters: Sequence[nn.Parameter], workers: int) -> None:
    """Replaces every gradient by its mean over the processes, with one all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= workers
    parts = torch.split(flat, [g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def broadcast_clock(seconds: float) -> float:
    """The elapsed time of the first process, so that all processes stop at the same step."""
    clock = torch.tensor([seconds], dtype=torch.float64)
    distributed.broadcast(clock, 0)
    return float(clock)


def save_weights(ema: dict[str, Tensor], config: UNetConfig, path: Path, step: int) -> None:
    """Saves half-precision weights, with the configuration in the metadata of the file."""
    meta = {"format": "pt", "unet": json.dumps(config.to_dict()), "diffusion": json.dumps(DIFFUSION), "trained_steps": str(step)}
    meta["guidance_scale"] = f"{GUIDANCE_SCALE:g}"
    save_file({k: v.half().contiguous() for k, v in ema.items()}, str(path), metadata=meta)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ddpm"))
    parser.add_argument(
        "--minutes",
        type=float,
        default=100,
        help="total training time; the learning rate decays over the last 60 %% (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.0, help="factor for all learning rates (default: %(default)s)")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--init", type=Path, help="safetensors file with initial weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    workers, worker = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if workers > 1:
        distributed.init_process_group("gloo")
    schedule = Schedule("linear", 1000)
    model = UNet(CONFIG).to(device)
    if args.init:
        print(f"worker {worker}: {load_fitting(model, load_file(args.init))}", flush=True)
    matrices = (
        [
            p
            for n, p in model.named_parameters()
            if p.ndim >= 2 and n.startswith(("input_blocks", "middle", "output")) and not n.startswith("input_blocks.0.")
        ]
        if args.optimizer == "muon"
        else []
    )
    chosen = {id(p) for p in matrices}
    heads = AuxiliaryHeads(model).to(device)
    trained = [*model.parameters(), *heads.parameters()]
    others = [p for p in model.parameters() if id(p) not in chosen]
    base = {"adamw": (1e-3 if matrices else 4e-4) * args.lr, "readers": 1e-2 * args.lr, "muon": 0.02 * args.lr}
    optimizers: dict[str, torch.optim.Optimizer] = {"adamw": torch.optim.AdamW(others, base["adamw"], betas=(0.9, 0.98), weight_decay=0.0)}
    optimizers["readers"] = torch.optim.AdamW(heads.parameters(), base["readers"], betas=(0.9, 0.98), weight_decay=0.0)
    if matrices:
        optimizers["muon"] = Muon(matrices, base["muon"])
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, elapsed = 0, 0.0
    state_path = args.out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["readers"])
        ema, step, elapsed = state["ema"], state["step"], state["elapsed"]
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "readers": heads.state_dict(),
            "ema": ema,
            "step": step,
            "elapsed": elapsed,
            "optimizers": {k: o.state_dict() for k, o in optimizers.items()},
        }
        with replacing(state_path) as part:
            torch.save(state, part)
        save_weights(ema, CONFIG, args.out / "ddpm.safetensors", step)

    fixed = np.random.default_rng(12345)
    val_x0 = batch_of_scenes(fixed, 32)[0].to(device)
    val_noise = torch.randn(val_x0.shape, generator=torch.Generator().manual_seed(1)).to(device)
    val_t = torch.linspace(10, 849, 32).long()
    average, last = None, time.monotonic()
    while (progress := elapsed / (60 * args.minutes)) < 1:
        factor = min(1.0, (step + 1) / 100, max(0.02, (1 - progress) / 0.6))
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = base[name] * factor
        rng = np.random.default_rng((args.seed, step, worker) if workers > 1 else (args.seed, step))
        x0, labels = (t.to(device) for t in batch_of_scenes(rng, args.batch))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(args.seed * 1_000_003 + step * workers + worker)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            mse, bound = training_loss(model, x0, sample_timesteps(rng, args.batch, schedule.steps), noise, schedule)
            class_loss, coarse_loss = heads(x0, labels)
        (mse + 0.01 * bound + CLASS_WEIGHT * class_loss + COARSE_WEIGHT * coarse_loss).backward()
        if workers > 1:
            average_gradients(trained, workers)
        norm = nn.utils.clip_grad_norm_([*others, *heads.parameters()], 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        losses = np.array([mse.item(), class_loss.item(), coarse_loss.item()])
        average = losses if average is None else 0.98 * average + 0.02 * losses
        now = time.monotonic()
        elapsed, last = elapsed + min(now - last, MAX_STEP_SECONDS), now
        if workers > 1:
            elapsed = broadcast_clock(elapsed)
        if step % 100 == 0 and worker == 0:
            ema_model = UNet(CONFIG).to(device)
            ema_model.load_state_dict(ema)
            with torch.no_grad():
                val, val_bound = training_loss(ema_model, val_x0, val_t, val_noise, schedule)
            print(
                f"step {step} {elapsed / 60:.1f} min  train {average[0]:.4f}  class {average[1]:.3f}  coarse {average[2]:.4f}  val(ema) {float(val):.4f}  bound {float(val_bound):.3f}  "
                f"norm {float(norm):.2f}  lr×{factor:.2f}",
                flush=True,
            )
            save()
    if worker == 0:
        save()
    if workers > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
