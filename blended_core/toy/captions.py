"""Captions of scenes of the embedded world, and which images a caption matches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import BACKGROUNDS, OBJECTS

_OPENINGS = ("", "", "a picture of ", "a photo of ", "an image of ", "a drawing of ", "there is ", "an emoji of ", "this is ")
_ADJECTIVES = ("", "", "", "nice ", "beautiful ", "big ", "small ", "little ", "cute ", "cartoon ", "pretty ", "single ")
_PLACEMENTS = (
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
    """A sentence and its meaning. ``object_name`` None: no object is visible. ``background`` None: any background."""

    text: str
    object_name: str | None
    background: str | None

    def matches(self, objects: frozenset[str], background: str) -> bool:
        """Whether the caption matches an image that shows these objects on this background."""
        if self.background is not None and self.background != background:
            return False
        return not objects if self.object_name is None else self.object_name in objects


def article(noun: str) -> str:
    """'an apple', 'a dog'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe(rng: np.random.Generator, objects: frozenset[str], background: str) -> Caption:
    """A random caption that matches the image, with varied openings, synonyms and colors. Half of the captions name the background."""

    def choose(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    place = choose(BACKGROUNDS[background])
    if not objects:
        return Caption(choose(_OPENINGS) + choose(_EMPTY).format(place), None, background)
    object_name = sorted(objects)[int(rng.integers(len(objects)))]
    object_class = OBJECTS[object_name]
    noun = object_name if rng.uniform() < 0.6 else choose(object_class.synonyms)
    if rng.uniform() < 0.25 and object_class.color not in noun:
        noun = f"{object_class.color} {noun}"
    noun = choose(_ADJECTIVES) + noun
    if rng.uniform() < 0.75:
        noun = article(noun)
    text, where = choose(_OPENINGS) + noun, None
    if rng.uniform() < 0.5:
        text, where = f"{text} {choose(_PLACEMENTS).format(place)}", background
    return Caption(text, object_name, where)
