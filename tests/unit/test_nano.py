"""krea2-nano paints what the prompt says: tests that ask for meaning, without ComfyUI.

Pictures are read back by plain image analysis (scripts/nano_training/judge.py). Shares asked for
here are lower than what benchmarks/nano_accuracy.py measures on 120 prompts, since few prompts
scatter more; each is still far above chance.
"""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from krea2_model import Krea2Pipeline, NegativeGuidance, nano, schedule
from krea2_model.checkpoints.text_encoder import load_vision_tower
from krea2_model.config import Preset
from krea2_model.nano import encoder as nano_encoder
from krea2_model.nano.encoder import checksum
from nano_training.judge import Reading, background_colour, colour_name, judge, read_thing, read_two
from nano_training.scenes import COLOURS, SHAPES, Scene, Thing, draw, held_out_prompts


@pytest.fixture(scope="module")
def raw(tokenizer_folder) -> Krea2Pipeline:
    return Krea2Pipeline.nano("raw")


@pytest.fixture(scope="module")
def turbo(tokenizer_folder) -> Krea2Pipeline:
    return Krea2Pipeline.nano()


@pytest.fixture(params=nano.VARIANTS)
def either(request) -> Krea2Pipeline:
    return request.getfixturevalue(request.param)


def paint(pipeline, *prompts, **options) -> np.ndarray:
    """Pictures (N, H, W, 3) in [0, 1]; Raw's in a third of its steps, which show the same."""
    if pipeline.preset.name == "raw" and "sigmas" not in options:
        options = {"steps": 10} | options
    return pipeline(list(prompts), **{"output_type": "np", "seed": 1} | options)


def share_right(pictures, scenes) -> dict[str, float]:
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    parts = {part for verdict in verdicts for part in verdict}
    return {part: float(np.mean([v[part] for v in verdicts if part in v])) for part in parts}


@pytest.fixture(scope="module")
def exam():
    """Six held-out prompts about one thing, three about two."""
    return held_out_prompts()[:6] + held_out_prompts()[-3:]


def test_exam_is_made_of_what_training_never_shows(exam):
    assert all(scene.is_held_out for _, scene in held_out_prompts())
    assert len(held_out_prompts()) == 120


@pytest.mark.parametrize("scene", [
    Scene((Thing("star", "pink", "top right", "small"),), "black"),
    Scene((Thing("ring", "cyan"),), "white"),
    Scene((Thing("triangle", "yellow", "bottom", outlined=True),), "purple"),
    Scene((Thing("circle", "red", "left"), Thing("square", "blue", "right")), "yellow"),
    Scene((Thing("square", "green", "top"), Thing("star", "white", "bottom")), "red"),
])  # fmt: skip
@pytest.mark.parametrize("size", [(128, 128), (160, 96), (96, 160)])
def test_judge_reads_what_is_drawn_and_nothing_else(scene, size):
    assert all(judge(draw(scene, *size), scene).values())
    other = Scene((Thing("circle", "orange", "bottom left"),) * len(scene.things), "green")
    assert not any(judge(draw(scene, *size), other).values())


def test_paints_combinations_it_never_saw(either, exam):
    prompts, scenes = zip(*exam, strict=True)
    shares = share_right(paint(either, *prompts), scenes)
    assert shares["background"] >= 0.75
    assert shares["colour"] >= 0.75
    assert shares["shape"] >= 0.6
    assert shares["place"] >= 0.75


def test_settings_travel_in_the_file(raw, turbo):
    assert raw.preset == Preset("raw", steps=28, guidance=3.5, mu=None, size=128)
    assert turbo.preset == Preset("turbo", steps=8, guidance=0.0, mu=1.15, size=128)


def test_order_of_two_things(either):
    one, other = paint(
        either, "a red circle left of a blue square", "a blue square left of a red circle"
    )
    assert [thing.colour for thing in read_two(one, side_by_side=True)] == ["red", "blue"]
    assert [thing.colour for thing in read_two(other, side_by_side=True)] == ["blue", "red"]


def colour_share(pictures: np.ndarray, name: str) -> float:
    """Share of pixels that are nearest to a colour."""
    palette = np.array(list(COLOURS.values()), dtype=np.float32) / 255
    distance = np.square(pictures[..., None, :] - palette).sum(axis=-1)
    return float((distance.argmin(axis=-1) == list(COLOURS).index(name)).mean())


def share_of_named_colour(pipeline, **options) -> float:
    """How much of pictures is the one colour that their prompt names: "blue", and nothing else."""
    names = ["blue", "red", "yellow"] * 4
    pictures = paint(pipeline, *names, seed=list(range(12)), **options)
    return float(np.mean([colour_share(p, n) for p, n in zip(pictures, names, strict=True)]))


@pytest.fixture(scope="module")
def unguided(raw) -> float:
    """How much Raw follows the prompt without guidance, in the steps of Turbo."""
    return share_of_named_colour(raw, sigmas=schedule.sigma_schedule(8, 1.15), guidance=0)


def test_guidance_strengthens_the_prompt(raw, unguided):
    """The sign matters: guidance leads towards the prompt, not away from it."""
    sigmas = schedule.sigma_schedule(8, 1.15)
    assert share_of_named_colour(raw, sigmas=sigmas, guidance=3.5) > 1.3 * unguided > 0


def test_turbo_has_guidance_built_in(turbo, unguided):
    assert share_of_named_colour(turbo) > 1.25 * unguided


def test_negative_prompt_removes_what_it_names(raw):
    seeds = list(range(8))
    without = paint(raw, *["blue"] * 8, seed=seeds, guidance=0, steps=8)
    against = paint(raw, *[""] * 8, negative_prompt="blue", seed=seeds, guidance=3.5, steps=8)
    assert colour_share(without, "blue") > 0.1
    assert colour_share(against, "blue") < 0.25 * colour_share(without, "blue")


@pytest.fixture(scope="module")
def scenes() -> list[tuple[str, str, str, str]]:
    """Two colours of one thing, the colour behind it, and its shape."""
    random = Random("two colours")
    return [(*random.sample(list(COLOURS), 3), SHAPES[index % len(SHAPES)]) for index in range(8)]


def paint_scenes(pipeline, wording: str, scenes, **options) -> np.ndarray:
    """Pictures of scenes, by a wording with fields for their parts."""
    prompts = [wording.format(*scene) for scene in scenes]
    return paint(pipeline, *prompts, seed=list(range(len(prompts))), **options)


@pytest.fixture(scope="module")
def plain(turbo, scenes) -> list[Reading | None]:
    """The things of scenes that are given both colours."""
    return list(map(read_thing, paint_scenes(turbo, "a {0} {1} {3} on a {2} background", scenes)))


def share_of_first(things, scenes) -> float:
    """How often a thing has the first colour of its scene."""
    found = [
        t is not None and t.colour == scene[0] for t, scene in zip(things, scenes, strict=True)
    ]
    return float(np.mean(found))


@pytest.mark.parametrize("weight, least, most", [(1, 0.9, 1), (0, 0, 0.4), (-1, 0, 0.1)])
def test_weights_of_0_and_below_take_a_colour_away(turbo, scenes, weight, least, most):
    wording = f"a ({{0}}:{weight}) {{3}} on a {{2}} background"
    pictures = paint_scenes(turbo, wording, scenes, prompt_weights=True)
    assert least <= share_of_first(map(read_thing, pictures), scenes) <= most


def test_weights_above_1_strengthen_a_colour(turbo, scenes, plain):
    """Of two colours of one thing it is the heavier that is seen, and the shape stays."""
    wording = "a ({0}:1.5) {1} {3} on a {2} background"
    heavy = list(map(read_thing, paint_scenes(turbo, wording, scenes, prompt_weights=True)))
    assert share_of_first(heavy, scenes) >= share_of_first(plain, scenes) + 0.25
    shapes = [t is not None and t.shape == scene[3] for t, scene in zip(heavy, scenes, strict=True)]
    assert np.mean(shapes) >= 0.9


def test_negative_without_guidance_removes_a_colour_and_nothing_else(turbo, scenes, plain):
    """The prompt names two colours, the negative the one that is seen without it."""
    pictures = paint_scenes(
        turbo, "a {0} {1} {3} on a {2} background", scenes, negative_guidance=NegativeGuidance(),
        negative_prompt=[f"a {t.colour} {s[3]}" for t, s in zip(plain, scenes, strict=True)],
    )  # fmt: skip
    after = [read_thing(picture) for picture in pictures]
    gone = [b is None or a.colour != b.colour for a, b in zip(plain, after, strict=True)]
    assert np.mean(gone) >= 0.75
    unchanged = [
        thing is not None
        and (thing.shape, thing.place) == (shape, "centre")
        and colour_name(background_colour(picture)) == behind
        for thing, picture, (_, _, behind, shape) in zip(after, pictures, scenes, strict=True)
    ]
    assert np.mean(unchanged) >= 0.85


def test_a_seed_is_a_picture(either):
    first = paint(either, "a green star", seed=5)
    assert np.array_equal(first, paint(either, "a green star", seed=5))
    other = paint(either, "a green star", seed=6)
    assert not np.allclose(first, other, atol=0.05)
    assert read_thing(first[0]).colour == read_thing(other[0]).colour == "green"


def test_batch_keeps_prompts_apart(either):
    prompts = ["a red circle", "a small blue square in the top left corner on a yellow background"]
    together = paint(either, *prompts, seed=[3, 4])
    alone = [paint(either, prompts[0], seed=3)[0], paint(either, prompts[1], seed=4)[0]]
    for batched, single in zip(together, alone, strict=True):
        assert np.abs(batched - single).max() < 0.01


@pytest.mark.parametrize(("width", "height"), [(160, 96), (96, 160)])
def test_other_aspect_ratios(either, width, height):
    (picture,) = paint(either, "a red circle on a white background", width=width, height=height)
    assert picture.shape == (height, width, 3)
    found = read_thing(picture)
    assert (found.colour, found.shape, found.place) == ("red", "circle", "centre")


def test_turbo_is_the_same_by_its_preset_and_by_hand(turbo):
    prompt = "a black triangle at the bottom"
    by_hand = paint(turbo, prompt, sigmas=schedule.sigma_schedule(8, 1.15), guidance=0)
    assert np.array_equal(paint(turbo, prompt), by_hand)


def test_long_and_short_wordings_agree(either):
    short, long = paint(
        either,
        "a yellow star on black",
        "A simple flat picture with clean edges that shows a big star that is yellow in the "
        "middle, the background is black, and nothing else.",
    )
    for picture in (short, long):
        found = read_thing(picture)
        assert (found.colour, found.shape) == ("yellow", "star")
        assert colour_name(background_colour(picture)) == "black"


def test_colours_survive_the_vae(raw):
    errors = []
    for name, colour in COLOURS.items():
        background = "black" if name != "black" else "white"
        picture = draw(Scene((Thing("square", name),), background))
        images = torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1
        decoded = raw.vae.decode(raw.vae.encode(images)) / 2 + 0.5
        inside = decoded[0, :, 50:78, 50:78] * 255
        errors.append(float((inside - torch.tensor(colour)[:, None, None]).abs().mean()))
    assert np.mean(errors) < 4 and max(errors) < 8, errors


def test_predictions_sharpen_towards_the_picture(raw):
    """What the model sees at each step comes closer to what it ends with."""
    seen = []
    final = raw(
        "a blue ring", output_type="latent",
        callback=lambda step, latents, predicted: seen.append(predicted),
    )  # fmt: skip
    distances = [float((predicted - final).square().mean()) for predicted in seen]
    assert distances[-1] == pytest.approx(0, abs=1e-8)
    assert distances[0] > distances[9] > distances[18]


def test_text_encoder_is_the_same_everywhere(monkeypatch, tmp_path):
    monkeypatch.setattr(nano, "cache_folder", lambda: tmp_path / "cache")
    file = nano.text_encoder_file()
    assert list((tmp_path / "cache").iterdir()) == [file]
    content = file.read_bytes()
    assert checksum(load_file(file)) == nano.TEXT_ENCODER_CHECKSUM
    # What is made is checked above; now it is only counted.
    made, tensors = [], {name: tensor.clone() for name, tensor in load_file(file).items()}
    monkeypatch.setattr(nano, "encoder_tensors", lambda: made.append(file) or tensors)
    changed = file.stat().st_mtime_ns
    assert nano.text_encoder_file().stat().st_mtime_ns == changed, "it was made a second time"
    # A damaged file is replaced, not believed.
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert nano.text_encoder_file().read_bytes() == content and len(made) == 1


def test_the_vision_tower_changes_no_tensor_for_text():
    """The transformer was trained on what these give."""
    tensors = load_file(nano.text_encoder_file())
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    assert checksum(text) == "c0179045d12550c559f3b5b49b0910dd0482a051ffebd431ff059466407bbcca"


@torch.no_grad()
def test_the_vision_tower_keeps_the_colours_of_patches():
    """Read off its tokens by least squares, learned on some pictures and tested on others."""
    tower = load_vision_tower(nano.text_encoder_file(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(24, 3, 8, 8, generator=generator)
    pictures = colours.repeat_interleave(32, dim=2).repeat_interleave(32, dim=3)
    seen = torch.cat([tower(picture).tokens for picture in pictures]).double()
    held = nano_encoder.CONSTANT_CHANNELS
    assert torch.equal(seen[:, :held], torch.full_like(seen[:, :held], nano_encoder.CONSTANT))
    embeddings = load_file(nano.text_encoder_file())["model.embed_tokens.weight"].float()
    sizes = [float(t.square().mean().sqrt()) for t in (seen, embeddings)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25
    inputs = torch.cat((seen[:, held:], torch.ones(len(seen), 1)), dim=1)
    wanted = colours.flatten(2).mT.flatten(0, 1).double()
    learned, tested = slice(0, 1024), slice(1024, None)
    weights = torch.linalg.lstsq(inputs[learned], wanted[learned]).solution
    missed = (inputs[tested] @ weights - wanted[tested]).square().mean()
    assert missed / wanted.var() < 0.03


@pytest.fixture
def generated(monkeypatch):
    """Spare a test the making of the text encoder, which another one checks."""
    tensors = load_file(nano.text_encoder_file())
    monkeypatch.setattr(nano, "encoder_tensors", lambda: tensors)
    nano._temporary_folder.cache_clear()


def test_text_encoder_needs_no_place_to_be_kept(monkeypatch, tmp_path, generated):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setattr(nano, "cache_folder", lambda: blocked / "cache")
    file = nano.text_encoder_file()
    assert checksum(load_file(file)) == nano.TEXT_ENCODER_CHECKSUM
    assert file == nano.text_encoder_file() and tmp_path not in file.parents
    nano._temporary_folder.cache_clear()
    assert not file.exists(), "a temporary file stayed"


def test_another_encoder_than_the_trained_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(nano, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(nano, "encoder_tensors", lambda: {"a": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="checksum"):
        nano.text_encoder_file()
    assert not list(tmp_path.iterdir())


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="'medium'; expected one of"):
        Krea2Pipeline.nano("medium")


def test_files_are_small():
    files = [*nano.TRANSFORMERS.values(), nano.VAE, nano.LORA, nano.REFERENCE_LORA]
    assert sum(file.stat().st_size for file in files) < 40e6


def test_a_user_without_a_home(monkeypatch, generated):
    """As in containers: no HOME, and no entry for the user's number."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(nano.Path, "home", staticmethod(no_home))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert nano.cache_folder() is None
    assert checksum(load_file(nano.text_encoder_file())) == nano.TEXT_ENCODER_CHECKSUM
