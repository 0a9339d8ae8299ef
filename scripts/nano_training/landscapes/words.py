"""Captions of landscapes: from a few words to several sentences.

A caption that says no time means day, no style means flat, no weather means a clear sky. Smaller
things may go without saying, except in the exam, whose captions say all that is examined.
"""

from __future__ import annotations

from random import Random

from .scene import SKY, Landscape, Part, held_out_landscapes

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
PLURALS = {"sheep": "sheep", "fish": "fish", "cactus": "cacti"}
NAMES = {
    "house": ("house", "house", "cottage"),
    "round tree": ("tree", "round tree", "leafy tree"),
    "fir tree": ("fir tree", "fir", "pine tree"),
    "palm tree": ("palm tree", "palm"),
    "rabbit": ("rabbit", "brown rabbit"),
    "cow": ("cow", "spotted cow"),
    "sailing boat": ("sailing boat", "sailboat", "boat"),
    "duck": ("duck", "yellow duck"),
    "fish": ("fish", "orange fish"),
    "balloon": ("hot air balloon", "balloon"),
}
TIMES = {
    "day": ("by day", "on a bright day", "in the daytime"),
    "dawn": ("at dawn", "at dawn", "at daybreak", "at sunrise"),
    "sunset": ("at sunset", "at sunset", "in the evening", "at dusk"),
    "night": ("at night", "at night", "by night"),
}
GROUNDS = {
    "meadow": ("a meadow", "a green meadow", "a grassy meadow"),
    "field": ("a wheat field", "a golden field", "a ploughed field"),
    "desert": ("a desert", "the desert", "sand dunes in a desert"),
    "beach": ("a beach", "a sandy beach by the sea", "the beach"),
    "sea": ("the sea", "the open sea", "the ocean"),
    "lake": ("a lake", "a small lake", "a blue lake in the grass"),
}
SNOWY = {
    "field": ("a snowy field", "a field under snow"),
    "lake": ("a lake in the snow", "a lake with snowy shores"),
    "meadow": ("a snowy meadow", "a meadow under snow"),
}
SEASONS = {
    "spring": ("in spring", "in springtime", "on a spring day"),
    "summer": ("in summer", "in the summer"),
    "autumn": ("in autumn", "in the fall", "in autumn colours"),
    "winter": ("in winter", "in the winter"),
}
BACKDROPS = {
    "mountains": ("mountains", "snowy mountains", "high mountains"),
    "hills": ("hills", "green hills", "rolling hills"),
    "city": ("a city", "a city skyline", "tall buildings"),
}
WEATHERS = {
    "clear": ("under a clear sky", "with a cloudless sky"),
    "clouds": ("with clouds in the sky", "under a cloudy sky", "with a few clouds"),
    "rain": ("in the rain", "on a rainy day", "while it rains"),
    "snow": ("in falling snow", "while it snows", "with snowflakes in the air"),
    "fog": ("in fog", "in thick fog", "in the mist"),
}
STYLES = {
    "flat": ("flat illustration", "flat vector art", "simple flat picture"),
    "outlined": ("outlined drawing", "comic drawing with black outlines", "ink outline drawing"),
    "watercolour": ("watercolour painting", "watercolor", "textured watercolour"),
    "pastel": ("pastel picture", "picture in soft pastel colours", "pale pastel drawing"),
    "neon": ("neon picture", "neon drawing with glowing lines", "picture of neon lights"),
    "paper cut": ("paper cut picture", "papercut with layered paper", "collage of cut paper"),
    "pixel art": ("pixel art picture", "pixel art", "picture in retro pixel art"),
}


def caption(scene: Landscape, random: Random, *, brief: float = 0.1, full: bool = False) -> str:
    """One of many wordings for a landscape.

    brief: the share of captions of a few words.
    full: say everything that is not as it is where nothing is said.
    """
    if not full and random.random() < brief:
        return _brief(scene, random)
    wording = random.random()
    if wording < 0.2:
        text = _list(scene, random, full)
    elif wording < 0.6:
        text = _sentence(scene, random, full)
    else:
        text = _description(scene, random, full)
    if random.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text if text.endswith(".") or random.random() < 0.6 else f"{text}."


def landscape_prompts(count: int = 120) -> list[tuple[str, Landscape]]:
    """The exam: prompts for landscapes that training never shows, and what they ask for."""
    random = Random("landscape prompts")
    return [(caption(scene, random, full=True), scene) for scene in held_out_landscapes(count)]


def _brief(scene: Landscape, random: Random) -> str:
    """The few words that leave most of a picture open."""
    words = [_ground(scene, random)]
    if scene.parts:
        words.append(_part(scene.parts[0], random))
    words.append(f"{_ground(scene, random)} {_when(scene, random, full=True)}".strip())
    text = random.choice(words)
    return _style(scene, text, random) if scene.style != "flat" else text


def _list(scene: Landscape, random: Random, full: bool) -> str:
    """Facts with commas between them, as people write prompts."""
    facts = [_ground(scene, random)]
    for part in _spoken(scene, random, full):
        facts.append(f"{_part(part, random)} {_where(part, random)}")
    if scene.backdrop and (full or random.random() < 0.85):
        facts.append(f"{random.choice(BACKDROPS[scene.backdrop])} in the background")
    facts += _light(scene, random, full)
    random.shuffle(facts)
    weather = _weather(scene, random, full)
    when = _when(scene, random, full)
    facts += [fact for fact in (when, weather) if fact]
    if scene.style != "flat" or random.random() < 0.2:
        style = random.choice(STYLES[scene.style])
        facts.insert(0 if random.random() < 0.4 else len(facts), style)
    return ", ".join(facts)


def _sentence(scene: Landscape, random: Random, full: bool) -> str:
    """One sentence that goes from the things to their surroundings."""
    parts = _spoken(scene, random, full)
    names = [_part(part, random) + _aside(part, random, full) for part in parts]
    place = f"{_on(scene)} {_ground(scene, random)}"
    text = f"{_and(names)} {place}" if names else _ground(scene, random)
    if scene.backdrop and (full or random.random() < 0.85):
        backdrop = random.choice(BACKDROPS[scene.backdrop])
        text += random.choice(
            (
                f" in front of {backdrop}",
                f" with {backdrop} in the background",
                f" and {backdrop} behind",
            )
        )
    for fact in (_when(scene, random, full), _weather(scene, random, full)):
        text += f" {fact}" if fact else ""
    for fact in _light(scene, random, full):
        text += f", {fact}"
    return _style(scene, text, random)


def _description(scene: Landscape, random: Random, full: bool) -> str:
    """Several sentences, as captioning models write them."""
    text = _ground(scene, random)
    for fact in (_when(scene, random, full), _weather(scene, random, full)):
        text += f" {fact}" if fact else ""
    sentences = [_style(scene, text, random)]
    for part in _spoken(scene, random, full):
        name, where = _part(part, random), _where(part, random)
        verb = "is" if part.count == 1 else "are"
        stands = {
            "house": "stands",
            "castle": "stands",
            "windmill": "stands",
            "lighthouse": "stands",
            "sailing boat": "sails",
            "bird": "flies",
            "balloon": "floats",
        }.get(part.kind, verb)
        if part.count > 1 and stands != verb:
            stands = {"flies": "fly"}.get(stands, stands.removesuffix("s"))
        there = f"{where} there {verb} {name}"
        sentences.append(there if random.random() < 0.5 else f"{name} {stands} {where}")
    if scene.backdrop and (full or random.random() < 0.85):
        backdrop = random.choice(BACKDROPS[scene.backdrop])
        verb = "rises" if scene.backdrop == "city" and not backdrop.endswith("s") else "rise"
        sentences.append(
            random.choice(
                (
                    f"{backdrop} {verb} in the background",
                    f"{backdrop} {verb} on the horizon",
                    f"behind it {verb} {backdrop}",
                )
            )
        )
    for fact in _light(scene, random, full):
        sentences.append(fact)
    return ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "."


def _spoken(scene: Landscape, random: Random, full: bool) -> list[Part]:
    """The parts that a caption names: the first always."""
    return [
        part for index, part in enumerate(scene.parts) if full or not index or random.random() < 0.9
    ]


def _part(part: Part, random: Random) -> str:
    """A part's number, colour and kind: "three fir trees"."""
    name = random.choice(NAMES.get(part.kind, (part.kind,)))
    if part.kind == "sailing boat":
        return _boat(part, name, random)
    if part.count == 1:
        return _article(f"{part.colour} {name}")
    number = NUMBERS[part.count]
    if part.kind in ("bird", "flower") and random.random() < 0.5:
        number = random.choice(("some", "a few"))
    return " ".join(f"{number} {part.colour} {_plural(name)}".split())


def _boat(part: Part, name: str, random: Random) -> str:
    if part.count > 1:
        return f"{NUMBERS[part.count]} {_plural(name)} with {part.colour} sails"
    sail = random.choice((f"with {_article(part.colour)} sail", f"with {part.colour} sails"))
    return f"{_article(name)} {sail}"


def _plural(name: str) -> str:
    first, _, last = name.rpartition(" ")
    return f"{first} {PLURALS.get(last, last + 's')}".strip()


def _where(part: Part, random: Random) -> str:
    if part.side == "centre":
        return random.choice(("in the middle", "in the centre", "in the center"))
    above = part.habitat == SKY and random.random() < 0.4
    if above:
        return f"in the sky on the {part.side}"
    return random.choice((f"on the {part.side}", f"on the {part.side} side", f"at the {part.side}"))


def _aside(part: Part, random: Random, full: bool) -> str:
    """Its side, behind the name of a part, mostly."""
    return f" {_where(part, random)}" if full or random.random() < 0.7 else ""


def _light(scene: Landscape, random: Random, full: bool) -> list[str]:
    if not scene.light or not (full or random.random() < 0.7):
        return []
    name = "full moon" if scene.light == "moon" and random.random() < 0.3 else scene.light
    if scene.side == "centre":
        return [
            random.choice(
                (
                    f"the {name} in the middle of the sky",
                    f"the {name} in the centre",
                    f"the {name} is in the middle",
                )
            )
        ]
    side = scene.side
    return [
        random.choice(
            (
                f"the {name} on the {side}",
                f"the {name} is on the {side}",
                f"the {name} in the upper {side}",
                f"the {name} shines on the {side} side",
            )
        )
    ]


def _when(scene: Landscape, random: Random, full: bool) -> str:
    facts = []
    if scene.season:
        facts.append(random.choice(SEASONS[scene.season]))
    if scene.time != "day" or random.random() < 0.3:
        facts.append(random.choice(TIMES[scene.time]))
    return " ".join(facts)


def _weather(scene: Landscape, random: Random, full: bool) -> str:
    if scene.weather == "clear" and random.random() < 0.7:
        return ""
    if scene.weather == "clouds" and not full and random.random() < 0.15:
        return ""
    return random.choice(WEATHERS[scene.weather])


def _ground(scene: Landscape, random: Random) -> str:
    if scene.is_snowy and random.random() < 0.7:
        return random.choice(SNOWY[scene.ground])
    names = GROUNDS[scene.ground]
    return names[0] if scene.season or scene.is_snowy else random.choice(names)


def _on(scene: Landscape) -> str:
    return {
        "meadow": "on",
        "field": "on",
        "desert": "in",
        "beach": "at",
        "sea": "on",
        "lake": "at",
    }[scene.ground]


def _style(scene: Landscape, text: str, random: Random) -> str:
    """A text with the words of its style before or after it."""
    if scene.style == "flat" and random.random() < 0.75:
        return text
    style = random.choice(STYLES[scene.style])
    if random.random() < 0.6:
        return f"{_article(style)} of {text}"
    return f"{text}, {style}"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _article(words: str) -> str:
    words = " ".join(words.split())
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
