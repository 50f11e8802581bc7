"""The photographs and drawings that world 2 is built from: package, file, author and license of each.

``make_world2`` reads this table, and writes the notice of licenses from it.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAINING, HELD_BACK = "training", "held back"


@dataclass(frozen=True)
class Photograph:
    """One landscape photograph. ``ground`` is the word for what it shows; ``split`` says whether training may see it."""

    name: str
    ground: str
    package: str
    path: str
    author: str
    license: str
    split: str = TRAINING

    @property
    def file(self) -> str:
        """Its name among the world's data."""
        return f"{self.name}.jpg"


@dataclass(frozen=True)
class Design:
    """One emoji set: a package of SVG drawings."""

    name: str
    package: str
    author: str
    license: str


DESIGNS: tuple[Design, ...] = (
    Design("noto", "@iconify-json/noto", "Google Inc. (Noto Emoji)", "Apache-2.0"),
    Design("twemoji", "@iconify-json/twemoji", "Twitter, Inc. and other contributors (Twemoji)", "CC-BY-4.0"),
    Design("fluent", "@iconify-json/fluent-emoji", "Microsoft Corporation (Fluent Emoji)", "MIT"),
    Design("emojione", "@iconify-json/emojione", "Emoji One and the EmojiTwo contributors", "CC-BY-4.0"),
)

# Each word and the name of its drawing, the same in all four sets.
DRAWINGS: dict[str, str] = {
    "apple": "red-apple",
    "balloon": "balloon",
    "butterfly": "butterfly",
    "cactus": "cactus",
    "car": "sport-utility-vehicle",
    "castle": "castle",
    "cat": "cat-face",
    "dog": "dog-face",
    "fish": "tropical-fish",
    "frog": "frog",
    "mushroom": "mushroom",
    "pumpkin": "jack-o-lantern",
    "rocket": "rocket",
    "rose": "rose",
    "sunflower": "sunflower",
    "tree": "deciduous-tree",
}


def _lomiri(name: str, ground: str, file: str, author: str, license_: str, split: str = TRAINING) -> Photograph:
    return Photograph(name, ground, "lomiri-wallpapers-16.04", f"usr/share/backgrounds/{file}.jpg", author, license_, split)


def _lxqt(name: str, ground: str, file: str, split: str = TRAINING) -> Photograph:
    return Photograph(name, ground, "lxqt-themes", f"usr/share/lxqt/wallpapers/{file}", "Razor and LXQt teams", "LGPL-2.1+", split)


def _plasma(name: str, ground: str, folder: str, author: str, split: str = TRAINING) -> Photograph:
    path = f"usr/share/wallpapers/{folder}/contents/images"
    return Photograph(
        name, ground, "plasma-workspace-wallpapers", path, author, "LGPL-3 (the picture's metadata); GPL-2+ (the package)", split
    )


def _mate(name: str, ground: str, file: str, author: str, split: str = TRAINING) -> Photograph:
    return Photograph(name, ground, "mate-backgrounds", f"usr/share/backgrounds/mate/nature/{file}.jpg", author, "GPL-2+", split)


def _tux(name: str, ground: str, split: str = TRAINING) -> Photograph:
    path = f"usr/share/tuxpaint/templates/{name}.jpg"
    return Photograph(name, ground, "tuxpaint-data", path, "Bill Kendrick", "GPL-2+", split)


PHOTOGRAPHS: tuple[Photograph, ...] = (
    _lomiri("aitzgorri", "mountains", "aitzgorri_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0"),
    _lomiri("picosdeeuropa", "mountains", "picosdeeuropa_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0", HELD_BACK),
    _lomiri("life", "forest", "life_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0"),
    _lomiri("sunrise", "sunset", "sunset_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0"),
    _lomiri("seeding", "meadow", "seeding_by_Clements_Engelhardt", "Clemens Engelhardt", "CC0-1.0"),
    _lomiri("dragonfly", "forest", "Dragonfly_by_Bolly", "Bolly", "CC-BY-SA-4.0"),
    _lomiri("bridge", "sky", "Bridge_by_Sander_Klootwijk", "Sander Klootwijk", "CC-BY-SA-4.0"),
    _lxqt("valendas", "mountains", "Valendas.png"),
    _lxqt("after_the_rain", "sunset", "after-the-rain.jpg"),
    _lxqt("cloud", "sky", "cloud.png"),
    _lxqt("flowers", "meadow", "flowers.png"),
    _lxqt("fog", "meadow", "fog.jpg"),
    _lxqt("hills", "mountains", "this-is-not-windows.jpg", HELD_BACK),
    _lxqt("appleflower", "meadow", "appleflower.png"),
    _plasma("by_the_water", "lake", "BytheWater", "Maciej Wiklo"),
    _plasma("cold_ripple", "lake", "ColdRipple", "Risto Saukonpää"),
    _plasma("darkest_hour", "night", "DarkestHour", "Risto Saukonpää"),
    _plasma("evening_glow", "sunset", "EveningGlow", "Ian Hex", HELD_BACK),
    _plasma("fallen_leaf", "forest", "FallenLeaf", "Martin Klapetek"),
    _plasma("kite", "sky", "Kite", "Risto Saukonpää"),
    _plasma("one_stands_out", "meadow", "OneStandsOut", "Risto Saukonpää"),
    _plasma("path", "forest", "Path", "Risto Saukonpää"),
    _plasma("summer_1am", "sunset", "summer_1am", "Risto Saukonpää"),
    _mate("dune", "desert", "Dune", "Marco Cogoni, Hylke Bons"),
    _mate("storm", "sky", "Storm", "Sergey Nazarov", HELD_BACK),
    _mate("green_meadow", "meadow", "GreenMeadow", "Timothy Schellhase, Lapo Calamandrei"),
    _mate("wood", "desert", "Wood", "Jean-François Fortin Tam"),
    _tux("burnt_bark", "rocks"),
    _tux("cliff", "rocks", HELD_BACK),
    _tux("corn_maze", "meadow"),
    _tux("mossy_log", "forest"),
    _tux("mudstone", "rocks"),
    _tux("ocean_splash", "lake"),
    _tux("ocean_waves", "lake", HELD_BACK),
    _tux("redwoods_above", "forest"),
    _tux("rocks", "rocks"),
    _tux("sheep", "meadow", HELD_BACK),
    _tux("sun_behind_clouds", "sky"),
    _tux("sun_behind_leaves", "forest", HELD_BACK),
    _tux("trees_above", "forest"),
    _tux("trees_at_dusk", "sunset"),
)
"""Grounds that the drawn ones have too (meadow, desert, night, lake, snow, sunset) share their word."""
