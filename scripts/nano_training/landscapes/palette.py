"""Colours of landscapes: of the sky, of the hour on things, of grounds and of painted things."""

from __future__ import annotations

from .canvas import Colour, mix, scale
from .scene import Landscape

COLOURS: dict[str, Colour] = {
    "red": (214, 62, 54),
    "yellow": (246, 200, 66),
    "blue": (58, 112, 196),
    "white": (246, 242, 234),
    "pink": (242, 130, 170),
    "orange": (232, 136, 54),
    "black": (46, 42, 52),
    "": (200, 200, 200),
}
SNOW: Colour = (240, 246, 252)
WINDOW: Colour = (255, 222, 128)

# From the top of the sky to the horizon, the colour of the hour on things, and the sun's or moon's.
SKIES: dict[str, list[tuple[float, Colour]]] = {
    "day": [(0.0, (74, 158, 222)), (1.0, (196, 230, 244))],
    "dawn": [(0.0, (142, 146, 214)), (0.55, (238, 178, 200)), (1.0, (255, 222, 186))],
    "sunset": [(0.0, (88, 52, 122)), (0.5, (226, 88, 88)), (1.0, (255, 186, 92))],
    "night": [(0.0, (12, 18, 54)), (1.0, (48, 64, 122))],
}
TINTS: dict[str, Colour] = {
    "day": (1.0, 1.0, 1.0),
    "dawn": (0.98, 0.88, 0.95),
    "sunset": (0.92, 0.7, 0.66),
    "night": (0.4, 0.46, 0.68),
}
SUNS: dict[str, Colour] = {
    "day": (255, 226, 92),
    "dawn": (255, 196, 120),
    "sunset": (255, 232, 150),
    "night": (246, 240, 212),
}
MOONLIGHT: Colour = (24, 40, 96)
GREY: Colour = (150, 160, 172)
GRASS: dict[str, Colour] = {
    "": (112, 176, 84),
    "spring": (138, 196, 92),
    "summer": (96, 164, 70),
    "autumn": (190, 158, 76),
    "winter": SNOW,
}
WHEAT: Colour = (230, 190, 88)
SAND: Colour = (238, 212, 156)
DUNE: Colour = (226, 168, 98)
WATER: Colour = (52, 132, 178)
MOUNTAIN: Colour = (104, 116, 156)
HILL: Colour = (102, 156, 118)


def sky_stops(scene: Landscape) -> list[tuple[float, Colour]]:
    """The colours of the sky from its top (0) to the horizon (1)."""
    dull = {"rain": 0.5, "snow": 0.42, "fog": 0.42}.get(scene.weather, 0.0)
    grey = scale(GREY, TINTS[scene.time])
    if scene.weather in ("snow", "fog"):
        grey = mix(grey, (255, 255, 255), 0.3 if scene.time != "night" else 0.05)
    return [(place, mix(colour, grey, dull)) for place, colour in SKIES[scene.time]]


def light_of(scene: Landscape):
    tint = TINTS[scene.time]
    if scene.weather == "rain":
        tint = scale((tint[0] * 255, tint[1] * 255, tint[2] * 255), 0.86)
        tint = (tint[0] / 255, tint[1] / 255, tint[2] / 255)

    def light(colour: Colour) -> Colour:
        if colour == WINDOW:
            return colour
        if scene.time == "night":
            # Moonlight: darker and bluer, and yet with hues that can be told apart.
            return mix(scale(colour, (0.56, 0.59, 0.76)), MOONLIGHT, 0.16)
        return scale(colour, tint)

    return light


def haze(scene: Landscape) -> Colour:
    """The colour that far things fade to, before the time of day colours it."""
    horizon = sky_stops(scene)[-1][1]
    if scene.time == "night":
        return scale(mix(horizon, MOONLIGHT, -0.19), (1.78, 1.7, 1.31))
    tint = TINTS[scene.time]
    red, green, blue = (h / t for h, t in zip(horizon, tint, strict=True))
    return red, green, blue
