"""A library of styles: words, pictures and LoRAs that belong together, as plain files.

A style is a folder of its name with `style.json`, the pictures that it names, and a thumbnail.
Several are mixed by weights, see `style_mixing`. Those that come with the package are in
`styles_built_in`; one of the user's of the same name takes its place. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import counted, is_number, is_whole

STYLE_FILE, THUMBNAIL = "style.json", "thumbnail.webp"
BUILT_IN = Path(__file__).parent / "styles_built_in"
# Where the prompt stands in a style's words; without it they follow the prompt.
PLACE = "{prompt}"
MAX_WEIGHT, MAX_LORA_STRENGTH, MAX_PICTURES = 2.0, 100.0, 8
# Settings that a style may suggest, each with its least value.
SETTINGS = {"steps": 1, "guidance": 0, "width": 16, "height": 16}

# Of style.json.
_ENTRIES = ("words", "negative", "pictures", "picture_strength", "loras", "settings")
_NAME = re.compile(r"[^\W_](?:[\w \-'&,+]{0,58}[\w'+])?")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)
_PICTURE = re.compile(r"[\w \-]+\.(png|jpg|jpeg|webp)", re.IGNORECASE)
_MAX_FILE, _MAX_TEXT, _THUMBNAIL_SIDE = 100_000, 10_000, 128
_SMALLEST = 16  # side of a picture, as in styles.py, which imports torch


class StyleError(ValueError):
    """A style that is not there or is broken: its name, what was expected, what to do."""


@dataclass(frozen=True)
class SavedStyle:
    """A style of a library.

    words: added to a prompt: behind it, or around it where they hold `{prompt}`.
    pictures: files and weights of pictures whose style is taken over (`StyleTransfer`).
    picture_strength: how strongly. loras: names or paths, and strengths.
    settings: suggested values by name, of `SETTINGS`.
    folder: where it lies; None until it is saved.
    """

    name: str
    words: str = ""
    negative: str = ""
    pictures: tuple[tuple[str, float], ...] = ()
    picture_strength: float = 1.0
    loras: tuple[tuple[str, float], ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None

    def __post_init__(self):
        check_name(self.name)
        for what, text in (("words", self.words), ("negative", self.negative)):
            if not isinstance(text, str) or len(text) > _MAX_TEXT:
                raise self._error(
                    f"{what} is {text!r:.60}; expected a text of at most {_MAX_TEXT} characters"
                )
            if text.count(PLACE) > 1:
                raise self._error(f"{what} has {PLACE} several times; expected it once at most")
            if re.search("[\ud800-\udfff]", text):
                raise self._error(f"{what} has half a character: {text!r:.60}; expected whole ones")
        self._check_pairs("pictures", self.pictures, 0, MAX_WEIGHT * 5)
        self._check_pairs("loras", self.loras, -MAX_LORA_STRENGTH, MAX_LORA_STRENGTH)
        if len(self.pictures) > MAX_PICTURES:
            raise self._error(
                f"there are {len(self.pictures)} pictures; expected at most {MAX_PICTURES}"
            )
        if not (is_number(self.picture_strength) and 0 <= self.picture_strength <= 10):
            raise self._error(f"picture_strength is {self.picture_strength!r}; expected 0 to 10")
        if not isinstance(self.settings, Mapping):
            raise self._error(f"settings is {self.settings!r:.80}; expected names and numbers")
        for name, value in self.settings.items():
            kind = is_number if name == "guidance" else is_whole
            if name not in SETTINGS or not kind(value) or not SETTINGS[name] <= value <= 16384:
                expected = ", ".join(SETTINGS)
                raise self._error(f"settings has {name}: {value!r}; expected numbers of {expected}")
        if not (self.words.strip() or self.negative.strip() or self.pictures or self.loras):
            raise StyleError(f"Style {self.name} is empty; expected words, pictures or LoRAs.")

    def _error(self, problem: str) -> StyleError:
        return StyleError(f"Style {self.name}: {problem}.")

    def _check_pairs(self, what: str, pairs: Any, low: float, high: float) -> None:
        for pair in pairs:
            if (
                not isinstance(pair, (list, tuple))
                or len(pair) != 2
                or not isinstance(pair[0], str)
                or not (is_number(pair[1]) and low <= pair[1] <= high)
            ):
                raise self._error(
                    f"{what} has {pair!r:.80}; expected a name and a number from {low:g} to "
                    f"{high:g}"
                )
            parts = re.split(r"[/\\]", pair[0])
            if self.folder is not None and (".." in parts or parts[0] == "" or ":" in parts[0]):
                raise self._error(f"{what} names {pair[0]!r:.80}, which leads out of its folder")

    @property
    def is_built_in(self) -> bool:
        return self.folder is not None and self.folder.parent == BUILT_IN

    @property
    def thumbnail(self) -> Path | None:
        """Its small picture, None without one."""
        path = None if self.folder is None else self.folder / THUMBNAIL
        return path if path is not None and path.is_file() else None

    def picture_paths(self) -> list[Path]:
        """The pictures' files. Raises StyleError for one that is not there."""
        paths = [Path(self.folder or "") / file for file, _ in self.pictures]
        for path in paths:
            if not path.is_file():
                raise self._error(f"{path} is not there; put the picture back, or save the style")
        return paths

    def summary(self) -> str:
        """A line that lists its parts."""
        parts = [self.words] if self.words else []
        if self.negative:
            parts.append(f"not {self.negative}")
        if count := len(self.pictures):
            parts.append(f"{counted(count, 'picture')} at {self.picture_strength:g}")
        parts += [f"LoRA {name}:{strength:g}" for name, strength in self.loras]
        parts += [f"{name} {value:g}" for name, value in self.settings.items()]
        return "; ".join(parts)


class StyleLibrary:
    """The styles of a folder, and those that come with the package.

    folder: None is the user's own, `default_folder`. It need not be there.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        self.folder = default_folder() if folder is None else Path(folder)

    def names(self) -> list[str]:
        """The names of all styles, broken ones too, in order. Raises StyleError for no folder."""
        return sorted(self._places(), key=str.casefold)

    def styles(self) -> tuple[list[SavedStyle], list[str]]:
        """All styles that can be used, and what is wrong with the others."""
        found: list[SavedStyle] = []
        problems: list[str] = []
        try:
            places = self._places()
        except StyleError as error:  # those of the package are there all the same
            problems.append(str(error))
            places = _folders(BUILT_IN)
        for name in sorted(places, key=str.casefold):
            try:
                found.append(_read(places[name]))
            except StyleError as error:
                problems.append(str(error))
        return found, problems

    def get(self, name: str) -> SavedStyle:
        """The style of a name. Raises StyleError for one that is not there or broken."""
        places = self._places()
        if name not in places:
            lowered = {known.casefold(): known for known in places}
            near = difflib.get_close_matches(str(name).casefold(), lowered, 3, 0.5)
            hint = f" Did you mean {' or '.join(lowered[each] for each in near)}?" if near else ""
            raise StyleError(
                f"There is no style {name!r:.80} in {self.folder}; expected one of "
                f"{', '.join(sorted(places, key=str.casefold)) or 'none'}.{hint}"
            )
        return _read(places[name])

    def save(
        self,
        style: SavedStyle,
        pictures: Sequence[Any] = (),
        thumbnail: Any = None,
        replace: bool = False,
    ) -> SavedStyle:
        """Write a style, whole or not at all; returns it with its folder.

        pictures: in place of the names in `style.pictures`, each as `images.pictures.pixels_of`
            takes it; none copies those of `style.folder`. thumbnail: likewise; None takes the first
            picture. LoRAs of `style.folder` and of whole paths are copied too.
        replace: a style of this name may be there.
        """
        self._places()  # says what is wrong with the folder
        target = self.folder / style.name
        if target.exists() and not replace:
            raise StyleError(
                f"There is a style {style.name} in {self.folder}; choose another name, or replace "
                "it (--force, replace of the node)."
            )
        images = list(pictures) or style.picture_paths()
        if len(images) != len(style.pictures):
            raise StyleError(
                f"Style {style.name}: {counted(len(images), 'picture')} for "
                f"{counted(len(style.pictures), 'weight')}; expected one each."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=self.folder, prefix="."))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise self._error("cannot be written", error) from error
        try:
            weights = [weight for _, weight in style.pictures]
            names = [f"picture-{number}.png" for number in range(1, len(images) + 1)]
            for number, (image, name) in enumerate(zip(images, names, strict=True), 1):
                title = f"Style {style.name}: picture {number}"
                width, height = _save_picture(image, partial / name, 2048, title)
                if min(width, height) < _SMALLEST:
                    raise StyleError(
                        f"{title} is {width} x {height} px; expected at least {_SMALLEST} px a "
                        "side. Give a larger one."
                    )
            first = images[0] if images else style.thumbnail
            if (shown := first if thumbnail is None else thumbnail) is not None:
                title = f"Style {style.name}: the thumbnail"
                _save_picture(shown, partial / THUMBNAIL, _THUMBNAIL_SIDE, title)
            kept = {
                "words": style.words,
                "negative": style.negative,
                "pictures": list(zip(names, weights, strict=True)),
                "picture_strength": style.picture_strength if images else None,
                "loras": _copy_loras(style, partial),
                "settings": dict(style.settings),
            }
            given = {name: v for name, v in kept.items() if v or v == 0.0}  # a strength may be 0
            text = json.dumps(given, indent=2)
            (partial / STYLE_FILE).write_text(text + "\n", encoding="utf-8")
            _read(partial, style.name)  # else it would be saved and then refused
            if target.exists():
                self._replace(target, partial)
            else:
                partial.rename(target)
        finally:
            _remove(partial)
        return _read(target)

    def _replace(self, target: Path, new: Path) -> None:
        """Put a new folder of a style in the place of the old one; other files of that stay."""
        try:
            named = {picture for picture, _ in _read(target).pictures}
        except StyleError:
            named = set()
        old = new.with_name(f"{new.name}-old")
        target.rename(old)
        new.rename(target)
        for path in old.iterdir():
            is_ours = path.name in {STYLE_FILE, THUMBNAIL, *named}
            if not is_ours and not (target / path.name).exists():
                path.rename(target / path.name)
        _remove(old)

    def _places(self) -> dict[str, Path]:
        """Folders of styles by name; the user's take the place of those of the package."""
        try:
            own = _folders(self.folder)
        except FileNotFoundError:
            own = {}
        except OSError as error:
            raise self._error("cannot be read", error) from error
        return _folders(BUILT_IN) | own

    def _error(self, problem: str, error: OSError) -> StyleError:
        return StyleError(
            f"The folder of styles {self.folder} {problem} ({error.strerror or error}); expected a "
            "folder of yours. Choose another one (--style-folder, or KREA2_STYLES), or change its "
            "rights."
        )


def _folders(root: Path) -> dict[str, Path]:
    """The folders of styles below another one, by name. Raises OSError."""
    paths = [path for path in root.iterdir() if not path.name.startswith(".")]
    return {path.name: path for path in paths if _may_be_style(path)}


def _may_be_style(path: Path) -> bool:
    """True for a folder with the file of a style, or one that cannot be looked into."""
    try:
        return (path / STYLE_FILE).is_file()
    except OSError:
        return True


def check_name(name: object) -> None:
    """Raise StyleError for what is no name of a style: it is that of a folder, on any system."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
        raise StyleError(
            f"The style's name is {name!r:.80}; expected up to 60 letters, digits, spaces and "
            "- ' & + , beginning with a letter or digit."
        )


def default_folder() -> Path:
    """The user's own library: KREA2_STYLES, or a folder of the user's data."""
    if chosen := os.environ.get("KREA2_STYLES"):
        return Path(chosen)
    if sys.platform == "win32":
        root = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Application Support"
    else:
        root = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return root / "krea2" / "styles"


def _read(folder: Path, name: str = "") -> SavedStyle:
    """The style of a folder. Raises StyleError for a broken one."""
    name, file = name or folder.name, folder / STYLE_FILE
    try:
        if file.stat().st_size > _MAX_FILE:
            raise ValueError("it is too large")
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        if unknown := sorted(found.keys() - set(_ENTRIES)):
            raise ValueError(f"it has {', '.join(unknown)}; {_expected(unknown[0])}")
        for entry in ("pictures", "loras"):
            found[entry] = _pairs_in(found, entry)
        for pair in found["pictures"]:
            if isinstance(pair, tuple) and pair and not _PICTURE.fullmatch(str(pair[0])):
                raise ValueError(
                    f"it names the picture {pair[0]!r:.80}; expected a file beside it that ends in "
                    ".png, .jpg or .webp"
                )
        return SavedStyle(name, **found, folder=folder)
    except StyleError as error:
        raise StyleError(f"{error} Mend {file}, or remove it.") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StyleError(
            f"Style {name} cannot be read ({reason}). Mend {file}, or remove it."
        ) from error


def _expected(entry: str) -> str:
    """Entries that a style may have in place of an unknown one, for a message."""
    near = difflib.get_close_matches(entry, [*_ENTRIES], 1, 0.7)
    hint = f", perhaps {near[0]} for {entry}" if near else ""
    if entry.startswith("reference"):
        hint = "; references of a LoRA are given beside a style, not in it"
    return f"expected {', '.join(_ENTRIES)}{hint}"


def _pairs_in(found: Mapping[str, Any], entry: str) -> tuple:
    """The pairs of an entry, each as it is where it is none, for `SavedStyle` to refuse."""
    pairs = found.get(entry, [])
    if not isinstance(pairs, list):
        raise ValueError(f'{entry} is {pairs!r:.80}; expected a list such as [["name", 1.0]]')
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in pairs)


def _remove(folder: Path) -> None:
    """Remove a folder of files, where it is there."""
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _copy_loras(style: SavedStyle, folder: Path) -> list[tuple[str, float]]:
    """Copy a style's LoRAs that are files beside it; all as the new style names them."""
    copies: dict[Path, str] = {}
    loras = []
    for file, strength in style.loras:
        source = Path(style.folder or "") / file
        is_beside = style.folder is not None or source.is_absolute()
        if is_beside and source.is_file():
            if source not in copies:
                taken = [name.casefold() for name in copies.values()]
                name, number = source.name, 2
                while name.casefold() in taken:  # LoRAs of several styles may have one name
                    name, number = f"{source.stem}-{number}{source.suffix}", number + 1
                shutil.copyfile(source, folder / name)
                copies[source] = name
            file = copies[source]
        loras.append((file, strength))
    return loras


def _save_picture(image: Any, path: Path, side: int, name: str) -> tuple[int, int]:
    """Write a picture at most so many pixels a side; returns its size. StyleError for none."""
    from PIL import Image

    from ..images.output_files import to_picture
    from ..images.pictures import pixels_of

    try:
        small = to_picture(pixels_of(image, name).movedim(0, -1).cpu().numpy())
    except ValueError as error:
        raise StyleError(str(error)) from error
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(path)
    return small.size
