"""Trains the judge of edits, a convolutional network, on the embedded world.

    python -m blended_core.training.judge --out runs/judge --minutes 20

It learns to classify the object inside the mask as one of the sixteen objects, regardless of objects outside. Fragments, mixtures of two
objects, scrambled objects and blobs in the colors of an object have the label "none". The same command resumes a stopped training. At
the end it prints the accuracy on new scenes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..evaluation.judge import ANSWERS, NONE, Judge, JudgeNetwork
from ..io.atomic import replacing
from ..toy.corrupt import corrupted, render_float
from ..toy.models import SIDE
from ..toy.world import FloatImage, Placed, random_scene, render
from .clip import coverage, shape_mask

SIZES = (24 / SIDE, 56 / SIDE)
CORRUPTED_SHARE = 0.3  # of the scenes with one object


class Cases:
    """An infinite stream of (image, mask, answer), from a pool of scenes that is replaced gradually."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.pool = [self._case() for _ in range(size)]

    def _case(self) -> tuple[FloatImage, tuple[Placed, ...], str]:
        """An image, its objects, and the label of the first object."""
        rng = self.rng
        scene = random_scene(rng, size=SIZES, centered=0.5)
        if len(scene.objects) != 1 or rng.uniform() >= CORRUPTED_SHARE:
            return render_float(scene), scene.objects, scene.objects[0].name if scene.objects else NONE
        return corrupted(rng, scene), scene.objects, NONE

    def draw(self, batch: int, renew: int) -> tuple[Tensor, Tensor]:
        """([B, 4, 64, 64]: images in −1..1 and masks; [B]: indices into ANSWERS). ``renew`` scenes of the pool are replaced first."""
        rng = self.rng
        for _ in range(renew):
            self.pool[int(rng.integers(len(self.pool)))] = self._case()
        rows: list[FloatImage] = []
        answers: list[int] = []
        while len(rows) < batch:
            picture, objects, label = self.pool[int(rng.integers(len(self.pool)))]
            target = objects[int(rng.integers(len(objects)))] if objects and rng.uniform() < 0.85 else None
            if target is not None:
                half, (cx, cy) = (
                    target.size / 2 * rng.uniform(0.95, 1.9, 2),
                    (target.x + rng.normal(0, 0.03), target.y + rng.normal(0, 0.03)),
                )
            else:
                half, (cx, cy) = rng.uniform(0.15, 0.42, 2), rng.uniform(0.3, 0.7, 2)
            mask = shape_mask(rng, (cx - half[0], cy - half[1], cx + half[0], cy + half[1]))
            shown = [coverage(mask, placed) for placed in objects]
            if mask.mean() < 0.03 or any(0.08 < share < 0.8 for share in shown) or sum(share >= 0.8 for share in shown) > 1:
                continue  # the mask is too small, or an object is neither visible nor hidden, or two are visible
            inside = [placed for placed, share in zip(objects, shown, strict=True) if share >= 0.8]
            answer = NONE if not inside else inside[0].name if len(objects) > 1 else label
            rows.append(np.concatenate([picture * 2 - 1, mask[..., None]], 2))
            answers.append(ANSWERS.index(answer))
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float(), torch.tensor(answers)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Augments images to resemble edits: contrast, blur, noise, and an affine warp of image and mask."""
    b = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(b, *shape, generator=generator) * (high - low) + low

    picture, mask = x[:, :3], x[:, 3:]
    picture = picture * uniform(0.75, 1.2, 1, 1, 1) + uniform(-0.12, 0.12, 3, 1, 1)
    blurred = F.interpolate(F.avg_pool2d(picture, 2), scale_factor=2, mode="bilinear")
    picture = torch.lerp(picture, blurred, uniform(-0.3, 1, 1, 1, 1).clamp(min=0))
    picture = picture + uniform(-0.06, 0.12, 1, 1, 1).clamp(min=0) * torch.randn(picture.shape, generator=generator)
    angle, scale = uniform(-0.2, 0.2), uniform(0.85, 1.15)
    flip = torch.where(torch.rand(b, generator=generator) < 0.2, -1.0, 1.0)
    theta = torch.stack(
        [
            torch.stack([flip * angle.cos() * scale, -angle.sin() * scale, uniform(-0.08, 0.08)], 1),
            torch.stack([flip * angle.sin() * scale, angle.cos() * scale, uniform(-0.08, 0.08)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [b, 4, SIDE, SIDE], align_corners=False)
    return F.grid_sample(torch.cat([picture.clamp(-1, 1), mask], 1), grid, padding_mode="border", align_corners=False)


def validation_cases(kind: str, count: int, seed: int = 12345) -> tuple[Tensor, Tensor, list[str]]:
    """Scenes that are not in the training data: images [B, 3, 64, 64], masks [B, 1, 64, 64] and labels.

    ``kind``: 'one' object inside the mask; 'two' objects, one of them inside the mask; 'empty' background inside the mask.
    """
    rng = np.random.default_rng((seed, ("one", "two", "empty").index(kind)))
    pictures, masks, labels = [], [], []
    for i in range(count):
        scene = random_scene(rng, objects={"one": 1, "two": 2, "empty": i % 2}[kind], size=(30 / SIDE, 46 / SIDE))
        if kind == "empty":
            cx, cy, half = 0.5, 0.5, 0.3
            if scene.objects:  # the mask must not cover the object
                placed = scene.objects[0]
                cx, cy, half = (0.22 if placed.x > 0.5 else 0.78), 0.5, 0.16
                if abs(placed.x - cx) < placed.size / 2 + half:
                    scene = replace(scene, objects=())
            label = NONE
        else:
            placed = scene.objects[i % len(scene.objects)]
            cx, cy, half, label = placed.x, placed.y, placed.size * 0.6, placed.name
        pictures.append(render(scene))
        masks.append(shape_mask(rng, (cx - half, cy - half, cx + half, cy + half)))
        labels.append(label)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(np.stack(masks))[:, None], labels


def accuracy(judge: Judge, kind: str, count: int = 1000) -> float:
    """Accuracy on validation scenes."""
    pictures, masks, labels = validation_cases(kind, count)
    correct = 0
    for i in range(0, count, 100):
        answers = judge(pictures[i : i + 100], masks[i : i + 100])
        correct += sum(v.answer == t for v, t in zip(answers, labels[i : i + 100], strict=True))
    return correct / count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/judge"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    network = JudgeNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, weight_decay=0.05)
    ema = {k: v.detach().clone() for k, v in network.state_dict().items()}
    step, elapsed, average = 0, 0.0, 0.0
    state_path, file = args.out / "state.pt", args.out / "judge.safetensors"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, elapsed = state["ema"], state["step"], state["elapsed"]

    def save() -> None:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step, "elapsed": elapsed}
        with replacing(state_path) as part:
            torch.save(state, part)
        halves = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in ema.items()}
        with replacing(file) as part:
            save_file(halves, str(part), metadata={"format": "pt", "trained_steps": str(step)})

    cases = Cases(np.random.default_rng((args.seed, step)), 6000)
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    last = time.monotonic()
    while (progress := elapsed / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200, max(0.01, (1 - progress) / 0.7))
        x, answers = cases.draw(args.batch, renew=12)
        loss = F.cross_entropy(network(augment(x, generator)), answers, label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in network.state_dict().items():
                ema[k] = v.clone() if not v.is_floating_point() else ema[k].lerp_(v, 1 - decay)
        step += 1
        average = loss.item() if average == 0.0 else 0.98 * average + 0.02 * loss.item()
        now = time.monotonic()
        elapsed, last = elapsed + now - last, now
        if step % 100 == 0:
            print(f"step {step} {elapsed / 60:.1f} min  loss {average:.4f}", flush=True)
        if step % 500 == 0:
            save()
            print("  " + ", ".join(f"{kind} {accuracy(Judge(file), kind, 300):.3f}" for kind in ("one", "two", "empty")), flush=True)
    save()
    print(
        "accuracy on 1000 validation scenes each: "
        + ", ".join(f"{kind} {accuracy(Judge(file), kind):.4f}" for kind in ("one", "two", "empty"))
    )


if __name__ == "__main__":
    main()
