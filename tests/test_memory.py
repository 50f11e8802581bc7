"""Memory that runs out: less at once, and the same picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blended_core.clip.model import Prompt
from blended_core.device import DeviceContext
from blended_core.edit import edit_picture
from blended_core.errors import BlendedError, BlendedWarning
from blended_core.memory import MemoryLimits, is_out_of_memory
from blended_core.options import EditOptions, preset
from blended_core.random import SeededRandom
from blended_core.sample import Models, Step, guided_step

from .tiny import random_picture, tiny_models

SIZE = 20
SHORT = {"steps": "3", "strength": 1.0, "candidates": 4, "batch": 4, "views": 6, "scale": 1000.0}


def run(models: Models, options: EditOptions) -> tuple[dict[int, Tensor], list[str]]:
    """(every candidate by its index, what was said of memory)."""
    assert models.clip is not None
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 5:15, 5:15] = 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", BlendedWarning)
        result = edit_picture(random_picture(SIZE, SIZE), mask, models.clip.prompt("a thing"), models, options)
    lines = [str(w.message) for w in said if "memory" in str(w.message)]
    return {c.index: c.edited for c in result.candidates}, lines


def limited(models: Models, unet: Callable[[Any, int], bool] = lambda *_: True, views: int = 10**6) -> Models:
    """The same networks on a device on which only some calls fit: ``unet(network, rows)``, and so many rows through CLIP."""
    network, clip = models.ddpm.network, models.clip
    assert clip is not None
    forward, encode = network.forward, clip.model.encode_image

    def small_unet(x: Tensor, *rest: Any) -> Any:
        if not unet(network, len(x)):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(x, *rest)

    def small_clip(pictures: Tensor) -> Any:
        if torch.is_grad_enabled() and len(pictures) > views:  # not where candidates are ranked
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")
        return encode(pictures)  # type: ignore[operator]

    network.forward = small_unet  # type: ignore[method-assign]
    clip.model.encode_image = small_clip  # type: ignore[assignment]
    return models


def alike(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(float((a[i] - b[i]).abs().max()) <= 1e-4 * max(1.0, float(a[i].abs().max())) for i in a)


@pytest.mark.parametrize("gradient", ["x0", "unet"])
@pytest.mark.parametrize(("rows", "said"), [(3, ["2 of 4"]), (1, ["2 of 4", "1 of 4"])])
def test_fewer_images_at_once(gradient: str, rows: int, said: list[str]) -> None:
    options = preset("best", gradient=gradient, **SHORT)
    plain, quiet = run(tiny_models(), options)
    found, lines = run(limited(tiny_models(), lambda _, n: n <= rows), options)
    assert quiet == [] and lines == [f"memory ran out; continuing with {s} images at once." for s in said]
    assert alike(plain, found)


@pytest.mark.parametrize("rows", [3, 1])
def test_fewer_pictures_are_scored_at_once(rows: int) -> None:
    options, models = preset("best", **SHORT), tiny_models()
    plain, _ = run(tiny_models(), options)
    assert models.clip is not None
    encode = models.clip.model.encode_image

    def small_clip(pictures: Tensor) -> Any:
        if not torch.is_grad_enabled() and len(pictures) > 8 * rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(pictures)  # type: ignore[operator]

    models.clip.model.encode_image = small_clip  # type: ignore[assignment]
    found, lines = run(models, options)
    assert lines == [f"memory ran out; pictures are scored, {n} at once." for n in {3: (2,), 1: (2, 1)}[rows]]
    assert list(found) == list(plain) and alike(plain, found), "the same order too"
    models.limits.reset()
    _, lines = run(models, replace(options, candidates=8))
    assert len(lines) == {3: 1, 1: 2}[rows], "learned by the first batch, known to the second"


def test_pictures_that_cannot_be_scored_are_not_lost() -> None:
    options, models = preset("best", **SHORT), tiny_models()
    plain, _ = run(tiny_models(), options)
    assert models.clip is not None
    encode = models.clip.model.encode_image

    def no_clip(pictures: Tensor) -> Any:
        if not torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(pictures)  # type: ignore[operator]

    models.clip.model.encode_image = no_clip  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BlendedWarning)
        mask = torch.zeros(1, 1, SIZE, SIZE)
        mask[..., 5:15, 5:15] = 1
        result = edit_picture(random_picture(SIZE, SIZE), mask, models.clip.prompt("a thing"), models, options)
    assert [c.index for c in result.candidates] == [0, 1, 2, 3] and [c.score.clip_distance for c in result.candidates] == [None] * 4
    assert alike(plain, {c.index: c.edited for c in result.candidates})
    (note,) = (n for n in result.notes if "score" in n)
    assert "in the order in which they were made" in note and "one at a time (CUDA out of memory" in note and "run on the CPU" in note
    assert note.options == ("device",)


def test_fewer_views_at_once() -> None:
    options = preset("best", **SHORT)
    plain, _ = run(tiny_models(), options)
    models = limited(tiny_models(), views=1)
    found, lines = run(models, options)
    assert [line.split("with ")[1] for line in lines] == [
        "2 of 4 images at once.", "1 of 4 images at once.", "3 of 6 views at once.", "1 of 6 views at once.",
    ]  # fmt: skip
    assert alike(plain, found)
    _, again = run(models, options)
    assert again == []  # what was learned is kept


def test_checkpointing_then_the_gradient_at_x0_if_it_is_allowed() -> None:
    options = preset("best", gradient="unet", **SHORT)
    plain, _ = run(tiny_models(), options)
    models = limited(tiny_models(), lambda network, _: network.gradient_checkpointing or not torch.is_grad_enabled())
    found, lines = run(models, options)
    assert lines[-1] == "memory ran out; continuing with gradient checkpointing, which is slower." and alike(plain, found)
    assert models.ddpm.network.gradient_checkpointing is False  # a step leaves the network as it was

    def never(*_: Any) -> bool:
        return not torch.is_grad_enabled()

    message = r"even with one image and one view at a time \(CUDA out of memory.*take the gradient at x̂0"
    with pytest.raises(BlendedError, match=message) as raised:
        run(limited(tiny_models(), never), options)
    assert "gradient" in raised.value.options
    allowed = preset("best", gradient="unet", x0_if_needed=True, **SHORT)
    other, lines = run(limited(tiny_models(), never), allowed)
    assert "as the options allow" in lines[-1]
    assert alike(other, run(tiny_models(), preset("best", gradient="x0", **SHORT))[0]) and not alike(other, plain)
    spared = tiny_models()
    spared.limits.x0 = True
    assert alike(plain, run(spared, options)[0])  # what one edit allowed is not allowed to the next


class Shared(DeviceContext):
    """A device on which another program's network gives up its room once, when it is asked."""

    asked = 0

    def make_room(self) -> bool:
        Shared.asked += 1
        return Shared.asked == 1


def test_others_give_up_their_room_first() -> None:
    options = preset("best", **SHORT)
    plain, _ = run(tiny_models(), options)
    models = limited(replace(tiny_models(), context=Shared()), lambda _, n: n <= 2 or Shared.asked > 0)
    found, lines = run(models, options)
    assert lines == ["memory ran out; networks that this step does not need were unloaded."]
    assert models.limits == MemoryLimits() and alike(plain, found)
    models = limited(replace(tiny_models(), context=Shared()), lambda _, n: n <= 2)
    found, lines = run(models, options)
    assert lines == ["memory ran out; continuing with 2 of 4 images at once."] and alike(plain, found)
    models.limits.reset()
    assert models.limits == MemoryLimits()


def test_a_picture_that_came_out_otherwise_says_so() -> None:
    def never(*_: Any) -> bool:
        return not torch.is_grad_enabled()

    mask = torch.ones(1, 1, SIZE, SIZE)
    for allowed, needed in ((limited(tiny_models(), never), True), (tiny_models(), False)):
        options = preset("best", gradient="unet", x0_if_needed=True, **SHORT)
        assert allowed.clip is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BlendedWarning)
            result = edit_picture(random_picture(SIZE, SIZE), mask, allowed.clip.prompt("a thing"), allowed, options)
        assert any("taken at x̂0, as the options allow" in note for note in result.notes) == allowed.limits.x0 == needed


def test_images_that_influence_one_another_stay_together() -> None:
    options = preset("official", algorithm="local", background_scale=1.0, **SHORT)
    plain, _ = run(tiny_models(), options)
    found, lines = run(limited(tiny_models(), views=4), options)
    assert lines and not any("images" in line for line in lines) and alike(plain, found)
    with pytest.raises(BlendedError, match=r"batch of 4.*use a batch of 1") as raised:
        run(limited(tiny_models(), lambda _, n: n <= 2), options)
    assert "batch" in raised.value.options
    spared = tiny_models()
    spared.limits.rows = 2  # learned by another edit
    assert alike(plain, run(spared, options)[0])


def test_removal_needs_no_views() -> None:
    models = limited(tiny_models(), lambda _, n: n == 0)
    mask = torch.ones(1, 1, SIZE, SIZE)
    nothing = Prompt((), (), torch.zeros(0, 0))
    with warnings.catch_warnings(), pytest.raises(BlendedError, match="half precision"):
        warnings.simplefilter("ignore", BlendedWarning)
        edit_picture(random_picture(SIZE, SIZE), mask, nothing, models, preset("best", **SHORT))
    assert models.limits == MemoryLimits(rows=1)


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_out_of_memory(
        ValueError("out of memory")
    )

    def broken(*_: Any) -> bool:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(limited(tiny_models(), broken), preset("best", **SHORT))


def test_every_image_keeps_its_own_mask_and_source() -> None:
    """In the graph a batch may have a picture and a mask for each image."""
    options = preset("best", background_scale=300.0, views=4, scale=1000.0, gradient="unet")
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    masks, sources = torch.zeros(3, 1, 16, 16), torch.rand(3, 3, 16, 16) * 2 - 1
    for row in range(3):
        masks[row, :, 2 + row : 12, 1 : 9 + 2 * row] = 1

    def step(rows: int | None) -> Step:
        models = tiny_models()
        models.limits.rows = rows
        assert models.clip is not None
        schedule = models.ddpm.config.respaced("10")
        with models.context.autograd():
            return guided_step(models, x, 5, schedule, options, models.clip.prompt("a"), masks, SeededRandom(0), range(3), sources)

    whole = step(None)
    for rows in (1, 2):
        parts = step(rows)
        assert parts.images == whole.images and torch.allclose(parts.x, whole.x, atol=1e-5)
        assert whole.gradient is not None and parts.gradient is not None and parts.clip_distance is not None
        assert torch.allclose(parts.gradient, whole.gradient, atol=1e-4 * float(whole.gradient.abs().max()))
        assert parts.clip_distance.shape == (3,) and parts.shift == pytest.approx(whole.shift, rel=1e-4)
