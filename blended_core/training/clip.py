"""Trains the embedded CLIP, an open_clip model with a small custom configuration, on the embedded world.

    python -m blended_core.training.clip --out runs/clip --minutes 25

The training images resemble the images that guidance gives to CLIP: whole scenes and masked regions with gray outside; clean, noisy or
blurred; warped. With ``--estimates``, some are x̂0 of noised scenes, as guidance sees them in early steps. The loss matches each
caption with every image of the batch that it describes. The same command resumes a stopped training; ``--init FILE.safetensors``
starts from weights without the state of the optimizer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adm.load import load_ddpm
from ..clip.words import WORDS, WordTokenizer
from ..device import DeviceContext
from ..diffusion import q_sample
from ..io.atomic import replacing
from ..toy.captions import Caption, describe
from ..toy.corrupt import corrupted
from ..toy.models import DDPM, SIDE
from ..toy.world import BACKGROUNDS, OBJECTS, Placed, Scene, random_scene, render

CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "width": 128, "heads": 4, "layers": 2},
}
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CORRUPTED = "corrupted"
"""Label of a corrupted object. It matches no object, and no empty scene either: otherwise blobs would satisfy prompts for an empty scene."""
ESTIMATE_LEVELS = {True: (100, 760), False: (50, 600)}
"""object intact → range of noise levels of 1000: from a level at which the object is still visible to the first level of an edit of strength 0.75.
Corrupted objects get less noise, because the diffusion model restores objects at high noise levels."""


def vocabulary() -> dict[str, list[int]]:
    """Word of a caption → its token; token 0 fills up short texts."""
    rng = np.random.default_rng(0)
    used: set[str] = set()
    for _ in range(3000):
        for background in BACKGROUNDS:
            for things in (frozenset(), frozenset({list(OBJECTS)[int(rng.integers(len(OBJECTS)))]})):
                used.update(WORDS.findall(describe(rng, things, background).text.lower()))
    return {word: [token] for token, word in enumerate(sorted(used), 1)}


def shape_mask(rng: np.random.Generator, box: tuple[float, float, float, float]) -> np.ndarray:
    """[64, 64] float32, 1 inside a random ellipse, rectangle or rounded rectangle with these bounds (fractions)."""
    x0, y0, x1, y1 = box
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE + 0.5 / SIDE
    u, v = np.abs(2 * xx - x0 - x1) / max(x1 - x0, 1e-3), np.abs(2 * yy - y0 - y1) / max(y1 - y0, 1e-3)
    power = float(rng.choice([2.0, 4.0, 16.0]))
    inside: np.ndarray = ((u**power + v**power) <= 1).astype(np.float32)
    return inside


def coverage(mask: np.ndarray, placed: Placed) -> float:
    """The fraction of the inner disc of an object that is inside the mask."""
    yy, xx = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE + 0.5 / SIDE
    disc = (xx - placed.x) ** 2 + (yy - placed.y) ** 2 <= (0.4 * placed.size) ** 2
    return float(mask[disc].mean()) if disc.any() else 0.0


Sample = tuple[Scene, np.ndarray, bool]
"""A scene, its image [64, 64, 3] uint8, and whether its objects are intact."""

Estimate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(images [N, 64, 64, 3] uint8, noise levels [N] of 1000) → images."""


def estimator(device: torch.device, rng: np.random.Generator, weights: Path = DDPM) -> Estimate:
    """A function that adds noise of the given levels to images and returns x̂0 of a diffusion model."""
    model = load_ddpm(DeviceContext(device), weights, probe=None)
    schedule = model.config.respaced("1000")

    def estimate(pictures: np.ndarray, levels: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        index = torch.from_numpy(levels)
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
        with torch.no_grad():
            x0 = model.predict(q_sample(x, index, noise, schedule).to(device), index, schedule).x0.cpu()
        images: np.ndarray = (x0 * 127.5 + 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return images

    return estimate


class Examples:
    """An infinite stream of labeled images, from a pool of scenes that is replaced gradually.

    ``corrupt``: share of single objects that are corrupted; no caption matches their label :data:`CORRUPTED`. ``estimates``: share of
    images that are replaced by the result of ``estimate``.
    """

    def __init__(
        self, rng: np.random.Generator, size: int, corrupt: float = 0.0, estimates: float = 0.0, estimate: Estimate | None = None
    ) -> None:
        self.rng, self.corrupt = rng, corrupt
        self.estimates, self.estimate = estimates if estimate else 0.0, estimate
        self.pool: list[Sample] = []
        while len(self.pool) < size:
            self.pool += self._scenes(min(64, size - len(self.pool)))

    def _scene(self) -> Sample:
        scene = random_scene(self.rng, size=(26 / SIDE, 54 / SIDE))
        if len(scene.objects) == 1 and self.rng.uniform() < self.corrupt:
            picture = (corrupted(self.rng, scene) * 255).round().clip(0, 255).astype(np.uint8)
            return scene, picture, False
        return scene, render(scene), True

    def _scenes(self, count: int) -> list[Sample]:
        scenes = [self._scene() for _ in range(count)]
        noised = [i for i in range(count) if self.rng.uniform() < self.estimates]
        if noised and self.estimate:
            levels = np.array([self.rng.integers(*ESTIMATE_LEVELS[scenes[i][2]]) for i in noised])
            for i, picture in zip(noised, self.estimate(np.stack([scenes[i][1] for i in noised]), levels), strict=True):
                scenes[i] = (scenes[i][0], picture, scenes[i][2])
        return scenes

    def draw(self, batch: int, renew: int) -> tuple[Tensor, Tensor, list[tuple[frozenset[str], str]]]:
        """(images [B, 3, 64, 64] in −1..1, masks [B, 1, 64, 64], labels (objects, background)). ``renew`` scenes of the pool are replaced first."""
        rng = self.rng
        for sample in self._scenes(renew):
            self.pool[int(rng.integers(len(self.pool)))] = sample
        pictures: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        labels: list[tuple[frozenset[str], str]] = []
        while len(pictures) < batch:
            scene, picture, intact = self.pool[int(rng.integers(len(self.pool)))]
            mask = np.ones((SIDE, SIDE), np.float32)
            if rng.uniform() < 0.75:
                if scene.objects and rng.uniform() < 0.75:
                    placed = scene.objects[int(rng.integers(len(scene.objects)))]
                    half = placed.size / 2 * rng.uniform(0.85, 1.7, 2)
                    cx, cy = placed.x + rng.normal(0, 0.04), placed.y + rng.normal(0, 0.04)
                else:
                    half, (cx, cy) = rng.uniform(0.15, 0.4, 2), rng.uniform(0.2, 0.8, 2)
                mask = shape_mask(rng, (cx - half[0], cy - half[1], cx + half[0], cy + half[1]))
            shares = [coverage(mask, placed) for placed in scene.objects]
            if mask.mean() < 0.03 or any(0.1 < share < 0.55 for share in shares):
                continue  # the mask is too small, or an object is neither visible nor hidden
            objects = frozenset(p.name if intact else CORRUPTED for p, share in zip(scene.objects, shares, strict=True) if share >= 0.55)
            pictures.append(picture)
            masks.append(mask)
            labels.append((objects, scene.background))
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return x, torch.from_numpy(np.stack(masks))[:, None], labels


def degrade(x: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Augments images to resemble those of guidance: contrast, blur, noise, gray outside the mask, projective warp."""
    b = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(b, *shape, generator=generator) * (high - low) + low

    def chance(p: float) -> Tensor:
        return (torch.rand(b, 1, 1, 1, generator=generator) < p).float()

    x = torch.where(chance(0.4) > 0, x * uniform(0.6, 1.25, 1, 1, 1) + uniform(-0.2, 0.2, 3, 1, 1), x)
    for factor in (2, 4):
        blurred = F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear")
        x = torch.where(chance(0.2) > 0, blurred, x)
    sigma = uniform(0, 0.9, 1, 1, 1).square() * chance(0.6)
    x = x + sigma * torch.randn(x.shape, generator=generator)
    grid_noise = F.interpolate(torch.randn(b, 3, 8, 8, generator=generator), size=SIDE, mode="bicubic")
    x = (x + 0.3 * uniform(0, 1, 1, 1, 1) * chance(0.4) * grid_noise) * mask
    angle, scale = uniform(-0.3, 0.3), uniform(0.85, 1.3)
    theta = torch.zeros(b, 3, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos() * scale
    theta[:, 0, 1], theta[:, 1, 0] = -angle.sin() * scale, angle.sin() * scale
    theta[:, :2, 2] = uniform(-0.15, 0.15, 2)
    theta[:, 2, :2] = uniform(-0.25, 0.25, 2)
    theta[:, 2, 2] = 1
    apply = chance(0.6)[:, :, 0]
    theta = apply * theta + (1 - apply) * torch.eye(3)
    base = F.affine_grid(torch.eye(2, 3)[None].repeat(b, 1, 1), [b, 1, SIDE, SIDE], align_corners=False)
    points = torch.cat([base, torch.ones(b, SIDE, SIDE, 1)], -1) @ theta.transpose(1, 2)[:, None]
    return F.grid_sample(x, points[..., :2] / points[..., 2:].clamp(min=0.2), align_corners=False)


def match_matrix(captions: list[Caption], labels: list[tuple[frozenset[str], str]]) -> Tensor:
    """[captions, images]: 1 where the caption matches the image, else 0."""
    return torch.tensor([[float(c.matches(*t)) for t in labels] for c in captions])


def matching_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Symmetric cross-entropy. The target distribution of a caption (image) is uniform over all images (captions) that match it.

    An image without a matching caption is only a negative example.
    """
    rows = -(truth / truth.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    described = truth.sum(0) > 0
    columns = -(truth[:, described] / truth.sum(0)[described] * logits.log_softmax(0)[:, described]).sum(0).mean()
    return (rows + columns) / 2


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/clip"))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init", type=Path)
    parser.add_argument("--corrupt", type=float, default=0.0, help="share of single objects that are corrupted (default: %(default)s)")
    parser.add_argument(
        "--estimates", type=float, default=0.0, help="share of images that are x̂0 of the diffusion model (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    words = vocabulary()
    if args.init:
        with safe_open(str(args.init), "pt") as f:
            words = json.loads(f.metadata()["words"])
    # After the tokens of the words come those of other words, of the start and of the end.
    unknown = 1 + max(token for tokens in words.values() for token in tokens)
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": unknown + 3}}
    model = open_clip.CLIP(**config).to(device)
    if args.init:
        model.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    tokenizer = WordTokenizer(words, unknown, CONFIG["text_cfg"]["context_length"])
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, elapsed = 0, 0.0
    state_path = args.out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, elapsed = state["ema"], state["step"], state["elapsed"]

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(texts).to(device)

    def save() -> None:
        state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "step": step, "elapsed": elapsed}
        with replacing(state_path) as part:
            torch.save(state, part)
        meta = {
            "format": "pt",
            "config": json.dumps(CONFIG),
            "mean": json.dumps(MEAN),
            "std": json.dumps(STD),
            "words": json.dumps(words),
            "trained_steps": str(step),
        }
        save_file({k: v.half().contiguous() for k, v in ema.items()}, str(args.out / "clip.safetensors"), metadata=meta)

    def accuracy(noise: float) -> float:
        """Accuracy of zero-shot classification of masked regions with captions such as 'a dog', at a standard deviation of the noise."""
        rng = np.random.default_rng(999)
        pictures, truth = [], []
        for i in range(320):
            scene = random_scene(rng, objects=1)
            placed = scene.objects[0]
            half = placed.size * 0.6
            mask = shape_mask(rng, (placed.x - half, placed.y - half, placed.x + half, placed.y + half))
            x = torch.from_numpy(render(scene)).permute(2, 0, 1).float() / 127.5 - 1
            x = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            pictures.append(x * torch.from_numpy(mask))
            truth.append(list(OBJECTS).index(placed.name))
        ema_model = open_clip.CLIP(**config).to(device).eval()
        ema_model.load_state_dict(ema)
        with torch.no_grad():
            text = ema_model.encode_text(tokens([f"a {name}" for name in OBJECTS]), normalize=True)
            image = ema_model.encode_image(torch.stack(pictures).to(device), normalize=True)
        return float(((image @ text.T).argmax(1).cpu() == torch.tensor(truth)).float().mean())

    estimate = estimator(device, np.random.default_rng((args.seed, step, 1))) if args.estimates else None
    examples = Examples(np.random.default_rng((args.seed, step)), 6000, args.corrupt, args.estimates, estimate)
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    average, last = None, time.monotonic()
    while (progress := elapsed / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200, max(0.01, (1 - progress) / 0.6))
        x, mask, labels = examples.draw(args.batch, renew=8)
        captions = [describe(examples.rng, *t) for t in labels if CORRUPTED not in t[0]]
        image = model.encode_image(degrade(x, mask, generator).to(device), normalize=True)
        text = model.encode_text(tokens([c.text for c in captions]), normalize=True)
        loss = matching_loss(model.logit_scale.exp() * text @ image.T, match_matrix(captions, labels).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.0)
            decay = min(0.998, (1 + step) / (10 + step))
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        now = time.monotonic()
        elapsed, last = elapsed + now - last, now
        if step % 100 == 0:
            print(f"step {step} {elapsed / 60:.1f} min  loss {average:.3f}", flush=True)
        if step % 500 == 0:
            print(f"  accuracy: clean {accuracy(0.0):.3f}, noise 0.4 {accuracy(0.4):.3f}, noise 0.8 {accuracy(0.8):.3f}", flush=True)
            save()
    print(f"accuracy: clean {accuracy(0.0):.3f}, noise 0.4 {accuracy(0.4):.3f}, noise 0.8 {accuracy(0.8):.3f}", flush=True)
    save()


if __name__ == "__main__":
    main()
