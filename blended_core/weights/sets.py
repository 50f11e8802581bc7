"""The sets of weights in a file: one network several times, inside wrappers, trained and averaged.

A set is found by a tensor that every network of its kind has, the anchor. Whatever stands before the anchor's name is the prefix of the set, so wrappers
such as 'module.', '_orig_mod.', 'state_dict.model.' or 'clip_model.' need no list. Two kinds of averaged weights have other names, and are matched with a
set that has the network's own: those of latent-diffusion's LitEma, whose names have no dots, and those of torch_ema, which is a list in the order of the
parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import BlendedError

Shapes = Mapping[str, Sequence[int]]

ROOT = "root"
"""Name of the set whose tensors have no prefix."""
AVERAGED = {"ema", "modelema", "netema", "averaged", "average", "avg", "swa", "polyak", "shadow"}
"""Words in a prefix that say that the weights are an average over the training."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Ends of the names of what normalization layers count. They are no parameters."""
SHADOW = "shadow_params."
"""End of the prefix of a list of parameters of torch_ema."""
MAX_LISTED, MAX_NAME_SHOWN = 8, 60
"""Sets that a message lists, and characters of a name in a file that it shows."""


@dataclass(frozen=True)
class WeightSet:
    """One network among the tensors of a file.

    Attributes:
        name: what chooses the set: the prefix without its last dot, or 'root'.
        prefix: before the names of the tensors in the file. Names of LitEma follow it without dots, and those of torch_ema as numbers.
        names: name in the network → name in the file, in the order of the file.
        averaged: whether the weights are an average over the training (EMA, SWA), by the words of their prefix.
        complete: whether the parts that every network of this kind has are present.
    """

    name: str
    prefix: str
    names: Mapping[str, str]
    averaged: bool
    complete: bool = True


def weight_sets(shapes: Shapes, anchor: str, parts: Sequence[str] = ()) -> tuple[WeightSet, ...]:
    """The sets of weights in a file, the best one first: complete ones, then averaged ones, then those with a short prefix.

    Args:
        shapes: name → shape of every tensor in the file, in the order of the file.
        anchor: name of a tensor that every network of the kind has, and no other network.
        parts: beginnings of names; a set is complete if it has each of them.
    """
    averages = [*_without_dots(shapes, anchor), *_lists(shapes)]
    others = {name for _, members in averages for name in members}
    prefixes = {key[: -len(anchor)] for key in shapes if (key == anchor or key.endswith("." + anchor))}
    tables: dict[str, dict[str, str]] = {prefix: {} for prefix in prefixes}
    for key in shapes:
        if key not in others and (prefix := _longest(key, prefixes)) is not None:
            tables[prefix][key[len(prefix) :]] = key

    def complete(names: Mapping[str, str]) -> bool:
        return all(any(name.startswith(part) for name in names) for part in parts)

    sets = [
        WeightSet(prefix.removesuffix(".") or ROOT, prefix, names, is_averaged(prefix), complete(names)) for prefix, names in tables.items()
    ]
    model = max(sets, key=lambda s: (s.complete, len(s.names)), default=None)  # the network's own names, for averages that have others
    if model is not None:
        fitted = _Names(model.names, shapes)
        for prefix, members in averages:
            names = fitted.list(members) if prefix.endswith(SHADOW) else fitted.without_dots(prefix, members)
            sets.append(WeightSet(prefix.rpartition(".")[0] or prefix, prefix, names, True, bool(names) and complete(names)))
    return tuple(sorted(sets, key=lambda s: (not s.complete, not s.averaged, len(s.prefix), s.prefix)))


def choose_set(sets: Sequence[WeightSet], name: str) -> WeightSet:
    """The set with a name, or the only one that has this name as a part of its own.

    Raises:
        BlendedError: if there is none, or more than one; the text lists the sets.
    """
    wanted = name.strip().strip(".")
    found = [s for s in sets if s.name == wanted] or [s for s in sets if wanted in s.name.split(".")]
    if len(found) != 1:
        kind = "no set of weights" if not found else f"{len(found)} sets of weights"
        raise BlendedError(
            f"it holds {kind} named {wanted[:100]!r}; it holds {listed(sets)}. Give one of these names.", option="ddpm_weights"
        )
    if not found[0].names:
        raise BlendedError(
            f"the weights {found[0].name!r} are a list without names that does not fit the network beside it; use another set.",
            option="ddpm_weights",
        )
    return found[0]


def listed(sets: Sequence[WeightSet]) -> str:
    """'ema (averaged), model' for a message; at most :data:`MAX_LISTED` sets."""
    names = [s.name[:MAX_NAME_SHOWN] + (" (averaged)" if s.averaged else "") for s in sets[:MAX_LISTED]]
    return ", ".join(names) + (f" and {len(sets) - MAX_LISTED} more" if len(sets) > MAX_LISTED else "")


def is_averaged(prefix: str) -> bool:
    """Whether a prefix has a word for averaged weights: 'model_ema.', 'netEMA.', 'averaged_model.module.'; not 'schema.'."""
    return any(word.lower() in AVERAGED for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", prefix))


def _longest(key: str, prefixes: set[str]) -> str | None:
    """The longest of these prefixes that a name begins with. Each ends with a dot, or is empty."""
    end = len(key)
    while end > 0:
        end = key.rfind(".", 0, end) + 1
        if key[:end] in prefixes:
            return key[:end]
        end -= 1
    return "" if "" in prefixes else None


def _without_dots(shapes: Shapes, anchor: str) -> Iterator[tuple[str, list[str]]]:
    """(prefix, names) of every set whose names have lost their dots, as 'model_ema.diffusion_modeltime_embed0weight'."""
    bare = anchor.replace(".", "")
    starts = {key[: -len(bare)] for key in shapes if key.endswith(bare)} if bare != anchor else set()
    # Of one container there is one set, so each name is compared with the prefixes of its own container alone.
    by_container = {start.rpartition(".")[0]: start for start in sorted(starts, reverse=True)}
    members: dict[str, list[str]] = {start: [] for start in by_container.values()}
    for key in shapes if members else ():
        start = by_container.get(key.rpartition(".")[0])
        if start is not None and key.startswith(start):
            members[start].append(key)
    return iter(members.items())


def _lists(shapes: Shapes) -> Iterator[tuple[str, list[str]]]:
    """(prefix, names in order) of every list of parameters of torch_ema."""
    found: dict[str, dict[int, str]] = {}
    for key in shapes:
        if m := re.fullmatch(r"((?:.*\.)?shadow_params\.)(\d{1,6})", key):
            found.setdefault(m[1], {})[int(m[2])] = key
    return ((prefix, [members[i] for i in sorted(members)]) for prefix, members in found.items())


class _Names:
    """The names of a network for averaged weights that are stored under other names.

    Args:
        own: name in the network → name in the file.
        shapes: of the file.
    """

    def __init__(self, own: Mapping[str, str], shapes: Shapes) -> None:
        self.own, self.shapes = own, shapes
        self.statistics = {name: key for name, key in own.items() if name.endswith(STATISTICS)}
        self.bare = {name.replace(".", ""): name for name in own}
        counted = [name for name in own if name not in self.statistics]
        # Buffers of a diffusion process (betas, …) may stand at the top level, where the network itself has no parameters.
        self.parameters = {len(names): names for names in ([name for name in counted if "." in name], counted)}

    def without_dots(self, prefix: str, members: Sequence[str]) -> dict[str, str]:
        """Name in the network → name in the file, for names without dots after a prefix. An average has parameters only, so what normalization
        layers count is taken from the trained weights."""
        return {**self.statistics, **{self.bare[m[len(prefix) :]]: m for m in members if m[len(prefix) :] in self.bare}}

    def list(self, members: Sequence[str]) -> dict[str, str]:
        """The same for a list in the order of the parameters; empty if the shapes differ."""
        parameters = self.parameters.get(len(members), [])
        if not parameters or any(
            tuple(self.shapes[self.own[a]]) != tuple(self.shapes[b]) for a, b in zip(parameters, members, strict=True)
        ):
            return {}
        return {**self.own, **dict(zip(parameters, members, strict=True))}
