"""Losses of a script beside those of the options, guidance through a decoder, what an edit accepts, and short descriptions of large objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blended_core.device import pull_back
from blended_core.diffusion import q_sample
from blended_core.edit import edit_picture
from blended_core.errors import BlendedError
from blended_core.guidance import Guidance
from blended_core.losses import LossTerm, RangeLoss, StepInput, differentiate
from blended_core.mask import EditMask
from blended_core.options import preset
from blended_core.random import SeededRandom
from blended_core.result import EditResult
from blended_core.sample import Models, Step, edit_steps, guidance_from, guided_step

from . import tiny

SIZE = tiny.SIZE
CLIP = tiny.tiny_clip()
PROMPT = CLIP.prompt("a tree")
MASK = torch.zeros(1, 1, SIZE, SIZE)
MASK[..., 3:13, 4:12] = 1
SOURCE = tiny.random_picture(SIZE, SIZE, seed=8) * 2 - 1
INDEX = 30


@dataclass(frozen=True)
class Redness:
    """A loss as a script would write it: how much red is missing inside the mask. A negative scale asks for less red."""

    scale: float
    name: str = "redness"

    def __call__(self, image: Tensor, step: StepInput) -> LossTerm:
        def missing_red(picture: Tensor) -> Tensor:
            return ((1 - picture[:, :1]) * step.mask).mean((1, 2, 3))

        return differentiate(missing_red, image, self.scale)


def red_inside(pictures: Tensor) -> Tensor:
    """The mean of the red channel inside the mask; [B, 3, S, S] → [B]."""
    return (pictures[:, :1] * MASK).sum((1, 2, 3)) / MASK.sum()


def step_input(batch: int, model: Any) -> StepInput:
    schedule = model.config.respaced(100)
    x = q_sample(SOURCE, INDEX, SeededRandom(0).noise("start", INDEX, range(batch), (3, SIZE, SIZE)), schedule)
    return StepInput(x, INDEX, schedule, range(batch), SeededRandom(0), MASK, SOURCE)


# --- a third loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["x0", "unet"])
@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["without a prompt", "with a prompt"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_loss_of_a_script_moves_a_step_in_its_direction(gradient: str, prompt: Any, sampler: str) -> None:
    models = tiny.tiny_models(tiny.gaussian_model())
    inputs = step_input(2, models.ddpm)
    options = preset("best", gradient=gradient, views=2, sampler=sampler, reference_size=0)

    def stepped(*losses: Redness) -> Step:
        return guided_step(
            models, inputs.x, INDEX, inputs.schedule, options, prompt, MASK, inputs.random, inputs.images, SOURCE, losses=list(losses)
        )

    less, plain, more = stepped(Redness(-1000.0)), stepped(), stepped(Redness(1000.0))
    assert (red_inside(more.x) > red_inside(plain.x) + 1e-3).all() and (red_inside(plain.x) > red_inside(less.x) + 1e-3).all()
    untouched = more.x - plain.x
    assert torch.allclose(untouched[:, 1:], torch.zeros(()), atol=1e-5), "the loss is about red alone"
    assert torch.allclose(untouched * (1 - MASK), torch.zeros(()), atol=1e-5), "the loss is about the inside alone"
    assert (plain.gradient is None) == (prompt is None) and more.gradient is not None and more.shift > 0


@pytest.mark.parametrize("text", [None, "", "a tree"])
@pytest.mark.parametrize("algorithm", ["blended", "local"])
def test_a_loss_of_a_script_changes_the_whole_edit(text: str | None, algorithm: str) -> None:
    models, picture = tiny.tiny_models(tiny.gaussian_model()), (SOURCE + 1) / 2
    options = preset("best", steps="20", candidates=2, views=2, algorithm=algorithm, enforce_background=True, context=1.0, reference_size=0)

    def edited(*losses: Redness) -> list[Tensor]:
        result = edit_picture(picture, MASK, text, models, options, losses=list(losses))
        return [result.picture(c) for c in sorted(result.candidates, key=lambda c: c.index)]

    less, plain, more = edited(Redness(-3000.0)), edited(), edited(Redness(3000.0))
    for darker, usual, redder in zip(less, plain, more, strict=True):
        assert red_inside(redder) > red_inside(usual) + 0.05 > red_inside(darker) + 0.1
        assert torch.equal(torch.where(MASK > 0, 0.0, redder), torch.where(MASK > 0, 0.0, picture)), "the outside is the original"


def test_a_loss_alone_needs_no_clip() -> None:
    models = Models(tiny.gaussian_model())
    result = edit_picture((SOURCE + 1) / 2, MASK, None, models, preset("best", steps="5", candidates=1), losses=[Redness(1000.0)])
    assert result.candidates[0].score.clip_distance is None and result.notes == []


@pytest.mark.parametrize("gradient", ["x0", "unet"])
def test_the_value_of_a_loss_of_a_script_is_reported_beside_the_others(gradient: str) -> None:
    models = tiny.tiny_models()
    inputs, loss = step_input(2, models.ddpm), Redness(700.0)
    options = preset("best", gradient=gradient, views=2, reference_size=0).guidance
    for prompt, names in ((PROMPT, {"clip", "range", "redness"}), (None, {"redness"})):
        guided = guidance_from(options, models, prompt, [loss])(models.ddpm, inputs)
        assert set(guided.values) == names
        assert torch.allclose(guided.values["redness"], loss(guided.prediction.x0, inputs).value)
        assert not any(value.requires_grad for value in guided.values.values())
    together = guidance_from(options, models, PROMPT, [loss])(models.ddpm, inputs).gradient
    apart = [
        guidance_from(options, models, prompt, losses)(models.ddpm, inputs).gradient for prompt, losses in ((PROMPT, []), (None, [loss]))
    ]
    assert together is not None and apart[0] is not None and apart[1] is not None
    assert torch.allclose(together, apart[0] + apart[1], atol=1e-5 * float(together.abs().max())), "the gradients add"


def test_a_loss_of_a_script_keeps_images_apart_in_a_split_batch() -> None:
    options, whole, split = preset("best", gradient="unet", views=2), tiny.tiny_models(), tiny.tiny_models()
    split.limits.rows = 1
    inputs = step_input(3, whole.ddpm)
    steps = [
        guided_step(models, inputs.x, INDEX, inputs.schedule, options, PROMPT, MASK, inputs.random, inputs.images, SOURCE, [Redness(500.0)])
        for models in (whole, split)
    ]
    assert torch.allclose(steps[0].x, steps[1].x, atol=1e-4) and steps[0].images == steps[1].images


def test_where_guidance_by_the_prompt_is_off_a_loss_of_a_script_still_acts() -> None:
    models, options = tiny.tiny_models(), preset("best", steps="10", strength=1.0, views=2, start=0.5, end=1.0)
    steps = list(edit_steps(models, SOURCE, EditMask.of(MASK), PROMPT, options, SeededRandom(0), [0], [Redness(100.0)]))
    assert all(step.gradient is not None for step in steps)
    assert [step.clip_distance is None for step in steps] == [True] * 5 + [False] * 5


@pytest.mark.parametrize("scale", [1.0, -3.0, 0.0])
def test_differentiate_gives_the_value_and_the_gradient_of_the_weighted_loss(scale: float) -> None:
    image = torch.randn(3, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        term = differentiate(lambda x: x.pow(3).sum((1, 2, 3)), image, scale)
    assert torch.allclose(term.value, image.pow(3).sum((1, 2, 3)))
    assert torch.allclose(term.gradient, scale * 3 * image.square())
    assert term.direct is None and not term.value.requires_grad and not term.gradient.requires_grad and not image.requires_grad


# --- a decoder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_network", [False, True])
@pytest.mark.parametrize("decode", [lambda x: 2 * x, lambda x: 2 * x[:, [2, 0, 1]] + 0.3], ids=["double", "double and shift"])
def test_guidance_through_a_decoder_has_the_gradient_of_the_composed_function(
    through_network: bool, decode: Callable[[Tensor], Tensor]
) -> None:
    models = tiny.tiny_models()
    inputs, losses = step_input(2, models.ddpm), (Redness(300.0), RangeLoss(50.0))
    guided = Guidance(losses, through_network, decode)(models.ddpm, inputs)
    x = inputs.x.clone().requires_grad_()
    x0 = models.ddpm.predict(x, INDEX, inputs.schedule).x0
    variable = x
    if not through_network:
        variable = x0 = x0.detach().requires_grad_()
    image = decode(x0)
    redness = ((1 - image[:, :1]) * MASK).mean((1, 2, 3))
    excess = ((image.abs() - 1).clamp(min=0) ** 2).mean((1, 2, 3))
    (expected,) = torch.autograd.grad(-(300 * redness + 50 * excess).sum(), variable)
    assert guided.gradient is not None and bool((excess > 0).all())
    assert torch.allclose(guided.gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(guided.values["redness"], redness, atol=1e-5) and torch.allclose(guided.values["range"], excess, rtol=1e-4)
    assert torch.allclose(guided.prediction.x0, x0.detach()), "the prediction is not decoded"


def test_a_decoder_reaches_the_clip_loss_too() -> None:
    """Of an affine decoder x0 → 2·x0 the gradient is twice that at the doubled estimate."""
    models = tiny.tiny_models()
    inputs = step_input(2, models.ddpm)
    guidance = guidance_from(preset("best", views=3, reference_size=0).guidance, models, PROMPT)
    guided = replace(guidance, decode=lambda x0: 2 * x0)(models.ddpm, inputs)
    doubled = [loss(2 * guided.prediction.x0, inputs) for loss in guidance.losses]
    assert guided.gradient is not None
    expected = -2 * (doubled[0].gradient + doubled[1].gradient)
    assert torch.allclose(guided.gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(guided.values["clip"], doubled[0].value)


# --- what an edit accepts ---------------------------------------------------------------------------------------------

PICTURE = tiny.random_picture(20, 24)
EDITED = torch.zeros(1, 1, 20, 24)
EDITED[..., 4:16, 5:19] = 1
QUICK = preset("best", steps="3", candidates=2, views=2)


def test_a_prompt_may_be_a_plain_text() -> None:
    models = tiny.tiny_models()
    assert models.clip is not None
    plain, encoded = (edit_picture(PICTURE, EDITED, p, models, QUICK) for p in ("a tree", models.clip.prompt("a tree")))
    other = edit_picture(PICTURE, EDITED, "a dog", models, QUICK)
    assert all(torch.equal(a.edited, b.edited) for a, b in zip(plain.candidates, encoded.candidates, strict=True))
    assert not any(torch.equal(a.edited, b.edited) for a in plain.candidates for b in other.candidates)
    for empty in ("", "  \n"):
        removed, nothing = (edit_picture(PICTURE, EDITED, p, models, QUICK) for p in (empty, None))
        assert all(torch.equal(a.edited, b.edited) for a, b in zip(removed.candidates, nothing.candidates, strict=True))


def test_a_text_without_clip_is_refused_by_name() -> None:
    with pytest.raises(BlendedError, match=r"the prompt 'a tree' was given without a CLIP model") as raised:
        edit_picture(PICTURE, EDITED, "a tree", Models(tiny.tiny_model()), QUICK)
    assert raised.value.options == ("clip",)
    assert edit_picture(PICTURE, EDITED, " ", Models(tiny.tiny_model()), QUICK).source_distance is None


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a path": (lambda _: "photo.jpg", r"is a str; give a tensor, for a file: read_{name}"),
    "8 bit": (lambda v: (v * 255).to(torch.uint8), r"has dtype torch\.uint8; give floating-point values in 0\.\.1"),
    "-1 to 1": (lambda v: 2 * v - 1, r"has values from -1 to 1; give 0\.\.1, for a {name} in −1\.\.1: \({name} \+ 1\) / 2"),
    "0 to 255": (lambda v: 255 * v, r"has values from 0 to 255; give 0\.\.1, for a {name} in 0\.\.255: {name} / 255"),
}


@pytest.mark.parametrize("name", ["picture", "mask"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_picture_or_mask_of_another_kind_is_refused_by_name(name: str, wrong: str) -> None:
    change, message = WRONG[wrong]
    picture = PICTURE.clone()
    picture[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    given = {"picture": picture, "mask": EDITED}
    edit_picture(**given, prompt=None, models=tiny.tiny_models(), options=QUICK)
    with pytest.raises(BlendedError, match=f"the {name} " + message.replace("{name}", name)):
        edit_picture(**{**given, name: change(given[name])}, prompt=None, models=tiny.tiny_models(), options=QUICK)


@pytest.mark.parametrize("values", [(-0.2, 1.1), (0.0, 12.0)], ids=["overshoot", "high dynamic range"])
def test_a_little_beyond_0_and_1_is_accepted(values: tuple[float, float]) -> None:
    picture = PICTURE.clone()
    picture[0, 0, 0, :2] = torch.tensor(values)
    result = edit_picture(picture, EDITED, None, tiny.tiny_models(), QUICK)
    outside = (EDITED == 0).expand_as(picture)
    assert all(torch.equal(result.picture(c)[outside], picture[outside]) for c in result.candidates)


# --- short descriptions -----------------------------------------------------------------------------------------------


def test_large_objects_are_described_in_a_line() -> None:
    models = tiny.tiny_models()
    seen: list[Step] = []
    started: list[EditResult] = []
    result = edit_picture(PICTURE, EDITED, "a tree", models, QUICK, on_step=seen.append, on_start=started.append)
    without = edit_picture(PICTURE, EDITED, None, Models(tiny.tiny_model()), QUICK)
    soft = EditMask.of(torch.linspace(0, 1, 30).view(1, 1, 5, 6), "soft")
    described = [
        models,
        Models(tiny.tiny_model()),
        *seen,
        *result.candidates,
        *without.candidates,
        *started,
        result,
        without,
        result.mask,
        soft,
    ]
    for thing in described:
        text = repr(thing)
        assert len(text) < 200 and "tensor(" not in text and "\n" not in text, text
        assert text.startswith(type(thing).__name__ + "(")
    assert "2 candidates of a 24×20 picture" in repr(result) and "24×20, binary, 35.0% inside" in repr(result.mask)
    assert "6×5, soft" in repr(soft) and "2 of 2" in repr(seen[-1]) and "on cpu" in repr(models)
    assert "CLIP distance none" in repr(without.candidates[0])


def test_two_losses_of_one_name_are_refused() -> None:
    models = tiny.tiny_models()
    with pytest.raises(BlendedError, match="two losses are named 'clip'"):
        guidance_from(preset("best").guidance, models, PROMPT, [Redness(1.0, name="clip")])


def test_a_loss_without_a_name_is_refused() -> None:
    def nameless(image: Tensor, step: StepInput) -> LossTerm:
        return differentiate(lambda x: x.mean(dim=(1, 2, 3)), image)

    with pytest.raises(BlendedError, match="has no name"):
        Guidance((nameless,))  # type: ignore[arg-type]


def test_a_bool_mask_is_refused_with_the_right_advice() -> None:
    with pytest.raises(BlendedError, match=r"torch\.bool.*mask\.float\(\)"):
        edit_picture(tiny.random_picture(SIZE, SIZE), MASK > 0, None, tiny.tiny_models())


def test_a_step_with_the_loss_of_a_script_alone_asks_memory_for_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    models = tiny.tiny_models()

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("out of memory")

    monkeypatch.setattr(models.ddpm, "predict", full)
    options = preset("best", steps="10")
    with pytest.warns(UserWarning) as warned, pytest.raises(BlendedError, match="even with one image at a time"):
        guided_step(
            models, SOURCE.expand(2, -1, -1, -1), 5, models.ddpm.config.respaced("10"), options, None, MASK, SeededRandom(0), [0, 1],
            losses=[Redness(1.0)],
        )  # fmt: skip
    assert not any("views" in str(w.message) for w in warned)


def test_inputs_and_predictions_of_a_step_are_described_in_short() -> None:
    models = tiny.tiny_models()
    schedule = models.ddpm.config.respaced("10")
    step = StepInput(SOURCE, 5, schedule, [0], SeededRandom(0), MASK, SOURCE)
    guided = guidance_from(preset("best", views=2).guidance, models, PROMPT)(models.ddpm, step)
    for value in (step, guided, guided.prediction, RangeLoss()(SOURCE, step)):
        assert len(repr(value)) < 200, repr(value)[:300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_pulled_back_as_torch_does_with_its_argument(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
    layer = torch.nn.Conv2d(3, 5, 3, dtype=dtype)
    cotangent = torch.randn(2, 5, 6, 6, generator=generator).mul(1e-3).to(dtype)
    (expected,) = torch.autograd.grad(layer(x).tanh(), x, cotangent)
    assert torch.equal(pull_back(layer(x).tanh(), x, cotangent), expected)
    with torch.no_grad():  # as a caller between two forward passes
        output = torch.enable_grad()(lambda: layer(x).tanh())()
        assert torch.equal(pull_back(output, x, cotangent), expected)
