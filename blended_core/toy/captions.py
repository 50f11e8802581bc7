"""What people say about scenes of the embedded world, and which pictures a sentence is true of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import BACKGROUNDS, OBJECTS

_OPENINGS = ("", "", "a picture of ", "a photo of ", "an image of ", "a drawing of ", "there is ", "an emoji of ", "this is ")
_ADJECTIVES = ("", "", "", "nice ", "beautiful ", "big ", "small ", "little ", "cute ", "cartoon ", "pretty ", "single ")
_PLACES = (
    "in the {}",
    "on the {}",
    "at the {}",
    "in front of the {}",
    "with {} behind",
    "and {}",
    "in a {}",
    "by the {}",
    "at {}",
    "in {}",
)
_EMPTY = ("{}", "a {}", "the {}", "an empty {}", "only {}", "nothing but {}", "just the {}", "a {} with nothing on it", "plain {}", "a {} scene",
          "a {} landscape", "a {} background")  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A sentence and its meaning. ``thing`` None means that no object is shown; ``background`` None means any."""

    text: str
    thing: str | None
    background: str | None

    def is_true_of(self, things: frozenset[str], background: str) -> bool:
        """Whether the sentence describes a picture that shows these objects before this background."""
        if self.background is not None and self.background != background:
            return False
        return not things if self.thing is None else self.thing in things


def article(noun: str) -> str:
    """'an apple', 'a dog'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe(rng: np.random.Generator, things: frozenset[str], background: str) -> Caption:
    """A varied true sentence: synonyms, colours, openings, with the background in half of the cases."""

    def one_of(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    place = one_of(BACKGROUNDS[background])
    if not things:
        return Caption(one_of(_OPENINGS) + one_of(_EMPTY).format(place), None, background)
    thing = sorted(things)[int(rng.integers(len(things)))]
    kind = OBJECTS[thing]
    noun = thing if rng.uniform() < 0.6 else one_of(kind.synonyms)
    if rng.uniform() < 0.25 and kind.colour not in noun:
        noun = f"{kind.colour} {noun}"
    noun = one_of(_ADJECTIVES) + noun
    if rng.uniform() < 0.75:
        noun = article(noun)
    text, where = one_of(_OPENINGS) + noun, None
    if rng.uniform() < 0.5:
        text, where = f"{text} {one_of(_PLACES).format(place)}", background
    return Caption(text, thing, where)
