"""Trains a diffusion model that predicts v on world 2, or on a folder of one's own pictures, on a CPU or a GPU.

    python -m blended_core.training.ddpm2 --init FILE.safetensors --out runs/ddpm2 --minutes 600 --bf16

writes ``state.pt`` (everything needed to continue; the same command continues) and ``ddpm.safetensors`` (averaged weights in half precision
with their configuration). The learning rate is constant until the last part of ``--minutes`` (``--cool``), where it falls to zero, so a
run can be given more time later: raise ``--minutes``. On SIGTERM it finishes the step, writes its state and ends. ``--pictures FOLDER`` takes square crops of the pictures of a folder in place of world 2.

The loss is the squared error of v, without a limit to its weight at low noise, and in addition the squared error of x̂0 at an
eighth of the resolution (an error there is seen as a change of tone). 30 % of the timesteps are u² of all, which is dense at the
clean end. With ``--ramp`` a network that knows world 1 keeps its objects while designs, sizes, places and photographs come in. The variance is trained for steps as long as samplers of few steps take. Auxiliary heads read its inner features during training (see :class:`blended_core.training.ddpm.AuxiliaryHeads`).
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adm.unet import UNet
from ..io.atomic import replacing
from ..schedule import Schedule
from ..toy.world2 import PHOTOGRAPHIC, SIDE, SIZES, WORDS, random_scene, render
from ..toy.world2_sources import HELD_BACK, TRAINING
from .ddpm import (
    CLASS_WEIGHT,
    COARSE_WEIGHT,
    CONFIG,
    MAX_STEP_SECONDS,
    VARIANCE_PENALTY,
    AuxiliaryHeads,
    Muon,
    load_fitting,
    sample_timesteps,
)

DIFFUSION = {"schedule": "linear", "steps": 1000, "rescale_timesteps": True, "objective": "v"}
EMPTY, PLAIN_EMPTY = 0.2, 0.08
"""Share of scenes without an object, at the greatest and the least difficulty: grounds are what an edit must continue."""
PLAIN_SIZE = 40 / SIDE
"""The one size of objects at the least difficulty."""
CLEAN_SHARE = 0.3
"""Share of timesteps that are u² of all."""
TONE, TONE_LIMIT = 4.0, 25.0
"""Weight of the loss at an eighth of the resolution, and the limit of 1/(1 − ᾱ) in it."""
STRIDES = (10, 20, 25, 40)
"""Of 1000 timesteps: those of samplers with 100, 50, 40 and 25 steps, for which the variance is trained."""
BOUND, NARROWEST = 0.02, 0.05
"""Weight of the variational bound, and the least distance between the bounds of the log variance that it is divided by."""
FRACTION = -0.6
"""Where between its bounds the variance begins: near the least, which suits a network that is right on most pixels."""
LEVELS = (0, 50, 100, 200, 350, 500, 700)
"""Timesteps whose errors are printed."""
SAVE_EVERY = 180.0
"""Seconds between two writes of the state."""

Batch = Callable[[np.random.Generator, int, float], tuple[Tensor, Tensor]]
"""(generator, size, difficulty 0 to 1) → ([B, 3, 64, 64] in −1..1, the object's number in each, or 0)."""


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Seconds of training: on a CPU those of computing on each thread, so that a run at low priority loses no time to other processes."""
    threads = torch.get_num_threads()
    return (lambda: time.process_time() / threads) if device.type == "cpu" else time.monotonic


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """[B, 3, H, W] in −1..1 of 8-bit pictures."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def scenes_batch(split: str = TRAINING) -> Batch:
    """Scenes of world 2 with none or one object. At difficulty 0 they are those of world 1: one design, one size, centered, drawn grounds."""

    def batch(rng: np.random.Generator, size: int, difficulty: float) -> tuple[Tensor, Tensor]:
        sides = tuple(PLAIN_SIZE + difficulty * (side - PLAIN_SIZE) for side in SIZES)
        empty = PLAIN_EMPTY + difficulty * (EMPTY - PLAIN_EMPTY)
        scenes = [
            random_scene(
                rng,
                objects=int(rng.uniform() > empty),
                size=(sides[0], sides[1]),
                wander=0.08 * difficulty,
                variety=difficulty,
                split=split,
                photographic=PHOTOGRAPHIC * difficulty,
            )
            for _ in range(size)
        ]
        kinds = [WORDS.index(s.objects[0].name) + 1 if s.objects else 0 for s in scenes]
        return to_tensor([render(s) for s in scenes]), torch.tensor(kinds)

    return batch


def folder_batch(folder: Path) -> Batch:
    """Random square crops of the pictures of a folder, mirrored in half of the cases; their objects have no names."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    pictures = [Image.open(path, formats=("JPEG", "PNG", "WEBP")).convert("RGB") for path in files]
    if not pictures:
        raise SystemExit(f"{folder} holds no .png, .jpg, .jpeg or .webp picture.")

    def crop(rng: np.random.Generator) -> np.ndarray:
        picture = pictures[int(rng.integers(len(pictures)))]
        short = min(picture.size)
        side = float(np.exp(rng.uniform(np.log(min(SIDE, short)), np.log(short))))
        left, top = rng.uniform() * (picture.width - side), rng.uniform() * (picture.height - side)
        piece = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))
        return piece[:, ::-1] if rng.uniform() < 0.5 else piece

    def batch(rng: np.random.Generator, size: int, _difficulty: float) -> tuple[Tensor, Tensor]:
        return to_tensor([crop(rng) for _ in range(size)]), torch.zeros(size, dtype=torch.long)

    return batch


def timesteps(rng: np.random.Generator, batch: int, steps: int) -> Tensor:
    """Those of :func:`sample_timesteps`, of which CLEAN_SHARE are replaced by u² of all."""
    t = sample_timesteps(rng, batch, steps)
    clean = torch.from_numpy((rng.uniform(size=batch) ** 2 * steps).astype(np.int64).clip(0, steps - 1))
    return torch.where(torch.from_numpy(rng.uniform(size=batch) < CLEAN_SHARE), clean, t)


def loss_of_v(
    model: nn.Module, x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(squared error of v, squared error of x̂0's tone, variational bound over the bounds' distance, which trains the variance alone)."""

    def at(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)[t].to(x0.device)[:, None, None, None]

    a, s = at(schedule.sqrt_alphas_cumprod), at(schedule.sqrt_one_minus_alphas_cumprod)
    x_t = a * x0 + s * noise
    v, fraction = model(x_t, t.to(x0.device).float()).float().chunk(2, dim=1)
    predicted = a * x_t - s * v
    mse = (v - (a * noise - s * x0)).square().mean()
    weight = (1 / s.square()).clamp(max=TONE_LIMIT)
    tone = (weight * F.avg_pool2d(predicted - x0, 8).square()).mean()

    # From t to an earlier timestep in one step, as samplers of few steps go: between neighbors both bounds of the variance are the same.
    earlier = (t - torch.tensor(STRIDES)[torch.randint(len(STRIDES), t.shape, generator=generator)]).clamp(min=0)
    cumulative = torch.as_tensor(schedule.alphas_cumprod, dtype=torch.float64)
    now, before = cumulative[t], cumulative[earlier]
    beta = (1 - now / before).clamp(min=1e-8)
    low, high = (torch.log(b)[:, None, None, None].float().to(x0.device) for b in (beta * (1 - before) / (1 - now), beta))
    c1 = (before.sqrt() * beta / (1 - now))[:, None, None, None].float().to(x0.device)
    log_variance = low + (fraction + 1) / 2 * (high - low)
    difference = c1 * (x0 - predicted.detach())  # the x_t parts of both means cancel
    kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + difference.square() * (-log_variance).exp())
    beyond = F.relu(fraction.abs() - 1).square().mean()
    # The wider the bounds, the larger the gradient of the fraction: divided, so that low noise does not decide alone.
    share = (t > earlier).float().to(x0.device) / (high - low).clamp(min=NARROWEST).flatten()
    return mse, tone, (kl.flatten(1).mean(1) * share).mean() / math.log(2) + VARIANCE_PENALTY * beyond


def beginning(path: Path) -> dict[str, Tensor]:
    """Weights to begin from, the variance anew. Of a network that predicts x0 the output's sign is flipped: v is nearly −x0 at high noise."""
    weights: dict[str, Tensor] = load_file(path)
    with safe_open(str(path), "pt") as file:
        objective = json.loads((file.metadata() or {}).get("diffusion", "{}")).get("objective")
    if objective == "x0":
        for name in ("out.2.weight", "out.2.bias"):
            weights[name][:3] *= -1
    weights["out.2.weight"][3:] = 0
    weights["out.2.bias"][3:] = FRACTION
    return weights


@torch.no_grad()
def errors(model: nn.Module, x0: Tensor, schedule: Schedule, levels: tuple[int, ...]) -> list[tuple[float, float]]:
    """(RMS, low-frequency RMS) of x̂0 in 1/255 of one pass at each timestep."""
    found = []
    for level in levels:
        t = torch.full((len(x0),), level)
        a, s = float(schedule.sqrt_alphas_cumprod[level]), float(schedule.sqrt_one_minus_alphas_cumprod[level])
        x_t = a * x0 + s * torch.randn(x0.shape, generator=torch.Generator().manual_seed(level)).to(x0.device)
        v = model(x_t, t.float().to(x0.device)).float().chunk(2, dim=1)[0]
        wrong = (a * x_t - s * v - x0) * 127.5
        found.append((float(wrong.square().mean().sqrt()), float(F.avg_pool2d(wrong, 8).square().mean().sqrt())))
    return found


def write_small(state_path: Path, path: Path) -> None:
    """Writes what is needed to continue in a sixth of the size: averaged weights and heads in half precision, no optimizers."""
    state = torch.load(state_path, map_location="cpu", weights_only=True)
    halves = {name: {k: v.half() for k, v in weights.items()} for name, weights in (("model", state["ema"]), ("readers", state["readers"]))}
    with replacing(path) as part:
        torch.save({**halves, "step": state["step"], "elapsed": state["elapsed"], "optimizers": {}}, part)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ddpm2"))
    parser.add_argument("--minutes", type=float, default=600, help="of training in all (%(default)s)")
    parser.add_argument("--cool", type=float, default=0.25, help="last share of the minutes, in which the learning rate falls to zero")
    parser.add_argument("--ramp", type=float, default=0, help="minutes over which the scenes grow from those of world 1 to world 2")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.5, help="factor on all learning rates (%(default)s)")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16")
    parser.add_argument("--init", type=Path, help="weights to begin from, of a network that predicts v or x0")
    parser.add_argument("--pictures", type=Path, help="train on the pictures of this folder instead of world 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", type=Path, metavar="FILE", help="write the state without optimizers, in half precision, to FILE and end")
    args = parser.parse_args()
    if args.small:
        write_small(args.out / "state.pt", args.small)
        return
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    schedule = Schedule("linear", 1000)
    batch_of = folder_batch(args.pictures) if args.pictures else scenes_batch()
    model = UNet(CONFIG).to(device)
    if args.init:
        print(load_fitting(model, beginning(args.init)), flush=True)
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim >= 2 and n.startswith(("input_blocks", "middle", "output")) and not n.startswith("input_blocks.0.")
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    heads = AuxiliaryHeads(model).to(device)
    base = {"adamw": 1e-3 * args.lr, "readers": 1e-2 * args.lr, "muon": 0.02 * args.lr}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(others, base["adamw"], betas=(0.9, 0.98), weight_decay=0.0),
        "readers": torch.optim.AdamW(heads.parameters(), base["readers"], betas=(0.9, 0.98), weight_decay=0.0),
        "muon": Muon(matrices, base["muon"]),
    }
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, elapsed = 0, 0.0
    state_path = args.out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["readers"])
        ema = {k: v.float() for k, v in state.get("ema", state["model"]).items()}  # a small state has one copy of the weights
        step, elapsed = state["step"], state["elapsed"]
        for name, optimizer in optimizers.items():
            if name in state["optimizers"]:
                optimizer.load_state_dict(state["optimizers"][name])
        print(f"continues at step {step}, minute {elapsed / 60:.1f}", flush=True)

    def save() -> None:
        whole = {
            "model": model.state_dict(),
            "readers": heads.state_dict(),
            "ema": ema,
            "step": step,
            "elapsed": elapsed,
            "optimizers": {k: o.state_dict() for k, o in optimizers.items()},
        }
        with replacing(state_path) as part:
            torch.save(whole, part)
        meta = {"format": "pt", "unet": json.dumps(CONFIG.to_dict()), "diffusion": json.dumps(DIFFUSION), "trained_steps": str(step)}
        with replacing(args.out / "ddpm.safetensors") as part:
            save_file({k: v.half().contiguous() for k, v in ema.items()}, str(part), metadata=meta)

    def tell() -> None:
        shadow = UNet(CONFIG).to(device)
        shadow.load_state_dict(ema)
        parts = []
        for split, pictures in checks.items():
            rows = errors(shadow, pictures, schedule, LEVELS)
            parts.append(split + " " + " ".join(f"{t}:{rms:.1f}/{low:.2f}" for t, (rms, low) in zip(LEVELS, rows, strict=True)))
        print("  error of x̂0, all/low frequency, in 1/255: " + "; ".join(parts), flush=True)

    splits = {"pictures": batch_of} if args.pictures else {"training": batch_of, "held back": scenes_batch(HELD_BACK)}
    checks = {split: make(np.random.default_rng(12345), 32, 1.0)[0].to(device) for split, make in splits.items()}
    if args.ramp:
        checks["world 1"] = batch_of(np.random.default_rng(12345), 32, 0.0)[0].to(device)
    start = step
    clock = stopwatch(device)
    average, last, saved, told = None, clock(), time.monotonic(), -math.inf
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    while (progress := elapsed / (60 * args.minutes)) < 1 and not stopped:
        factor = min(1.0, (step - start + 1) / 100, (1 - progress) / max(args.cool, 1e-6))
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = base[name] * factor
        rng = np.random.default_rng((args.seed, step))
        difficulty = min(1.0, elapsed / (60 * args.ramp)) if args.ramp else 1.0
        x0, kinds = (t.to(device) for t in batch_of(rng, args.batch, difficulty))
        draws = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        noise = torch.randn(x0.shape, generator=draws).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            mse, tone, bound = loss_of_v(model, x0, timesteps(rng, args.batch, schedule.steps), noise, schedule, draws)
            named, coarse = heads(x0, kinds)
        loss = mse + TONE * tone + BOUND * bound + (0 if args.pictures else CLASS_WEIGHT) * named + COARSE_WEIGHT * coarse
        loss.backward()
        norm = nn.utils.clip_grad_norm_([*others, *heads.parameters()], 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        losses = np.array([mse.item(), tone.item(), bound.item(), named.item(), coarse.item()])
        average = losses if average is None else 0.98 * average + 0.02 * losses
        now = clock()
        elapsed, last = elapsed + min(now - last, MAX_STEP_SECONDS), now  # a machine that slept did not train
        if step % 50 == 0:
            shown = "  ".join(f"{n} {a:.4f}" for n, a in zip(("v", "tone", "bound", "naming", "coarse"), average, strict=True))
            print(
                f"step {step} {elapsed / 60:.1f} min  {shown}  norm {float(norm):.2f}  lr×{factor:.2f}  difficulty {difficulty:.2f}",
                flush=True,
            )
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()
        if elapsed - told > 600:
            tell()
            told, last = elapsed, clock()
    save()
    tell()


if __name__ == "__main__":
    main()
