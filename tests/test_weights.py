"""Reading weights of any model: sets of weights, file formats, hostile and damaged files."""

from __future__ import annotations

import time

import pytest

from blended_core.errors import BlendedError
from blended_core.weights.sets import choose_set, weight_sets

ANCHOR, PARTS = "time_embed.0.weight", ("output_blocks.",)
OWN = {"time_embed.0.weight": (4, 2), "input_blocks.0.0.weight": (2, 3), "output_blocks.0.0.weight": (2, 2), "out.2.bias": (6,)}


def under(prefix: str) -> dict[str, tuple[int, ...]]:
    """The small network with a prefix."""
    return {prefix + name: shape for name, shape in OWN.items()}


# --- sets of weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "net_EMA.",
        "netEMA.",
        "ModelEMA.",
        "averaged_model.module.",
        "swa_model.module.",
        "params_ema.",
        "state_dict_ema.module.",
        "EMAModel.x.",
    ],
)
def test_an_average_is_recognized_by_a_word_of_its_prefix(prefix: str) -> None:
    best, other = weight_sets({**under("m."), **under(prefix), prefix + "n_averaged": ()}, ANCHOR, PARTS)
    assert (best.prefix, best.averaged, other.prefix, other.averaged) == (prefix, True, "m.", False)
    assert best.names == {**{name: prefix + name for name in OWN}, "n_averaged": prefix + "n_averaged"}
    assert not any(s.averaged for s in weight_sets({**under("schema."), **under("temax.")}, ANCHOR, PARTS))


def test_averages_with_other_names_are_matched_with_the_network() -> None:
    for container in ("", "state_dict."):
        lit = {f"{container}model_ema.diffusion_model{name.replace('.', '')}": shape for name, shape in OWN.items()}
        counts = {f"{container}model_ema.decay": (), f"{container}model_ema.num_updates": ()}
        best, other = weight_sets({**under(f"{container}model.diffusion_model."), **lit, **counts}, ANCHOR, PARTS)
        assert (best.name, best.averaged, dict(best.names)) == (f"{container}model_ema", True, dict(zip(OWN, lit, strict=True)))
        assert other.name == f"{container}model.diffusion_model" and other.complete
        shadow = {f"{container}ema.shadow_params.{i}": shape for i, shape in enumerate(OWN.values())}
        best, other = weight_sets({**under("model."), "model.betas": (9,), **shadow, "ema.decay": ()}, ANCHOR, PARTS)
        assert best.names == {**dict(zip(OWN, shadow, strict=True)), "betas": "model.betas"} and best.averaged and best.complete
    unfit = {f"ema.shadow_params.{i}": (5, 5) for i in range(len(OWN))}
    first, second = weight_sets({**under("model."), **unfit}, ANCHOR, PARTS)
    assert first.name == "model" and not second.complete
    with pytest.raises(BlendedError, match=r"shadow_params.*does not fit"):
        choose_set((first, second), second.name)


def test_a_set_is_chosen_by_its_name_or_a_part_of_it() -> None:
    sets = weight_sets({**under(""), **under("a.ema."), **under("b.model."), **under("c.model.")}, ANCHOR, PARTS)
    assert [choose_set(sets, name).prefix for name in ("root", "ema", "a.ema", "b.model.", "b")] == [
        "",
        "a.ema.",
        "a.ema.",
        "b.model.",
        "b.model.",
    ]
    for name, says in (
        ("model", "2 sets of weights named 'model'"),
        ("none", "no set of weights named 'none'; it holds a.ema .averaged., root"),
    ):
        with pytest.raises(BlendedError, match=says) as caught:
            choose_set(sets, name)
        assert caught.value.options == ("ddpm_weights",)


def test_the_search_for_sets_takes_time_in_proportion_to_the_names() -> None:
    many = range(40000)
    for shapes in (
        {f"p{i}.{name}": shape for i in many for name, shape in OWN.items()},
        {**{f"p{i}.time_embed0weight": (4, 2) for i in many}, **{f"m.{i}": () for i in range(2000)}, **under("m.")},
        {**{f"p{i}.shadow_params.0": (4, 2) for i in many}, **{f"m.{i}": () for i in range(2000)}, **under("m.")},
        {**{"." * i + "x": () for i in range(500)}, **under("")},
    ):
        began = time.process_time()
        assert weight_sets(shapes, ANCHOR, PARTS)
        assert time.process_time() - began < 20  # some tenths; minutes where every name is compared with every prefix
