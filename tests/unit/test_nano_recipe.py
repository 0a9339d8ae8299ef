"""The recipe of the next krea2-nano: every stage for a step, schedules by time, resuming, files."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from krea2_model import Krea2Pipeline, load_text_encoder, load_transformer, nano
from krea2_training.engine.loop import TrainingStopped
from krea2_training.engine.rates import Rates
from krea2_training.pretrain import new_transformer
from nano_training.loop import DEVICE, Stage, TimedRates, Timer
from nano_training.recipe.drawn import Artists, draw_chunk
from nano_training.recipe.plan import SHARES, TINY, Clock
from nano_training.recipe.pool import EncodedPool, Pixels, encode_captions, encode_pixels
from nano_training.recipe.run import FILES, RecipeRun, install
from nano_training.recipe.transformer import flow_loss
from nano_training.recipe.vae import side_of, train_vae
from nano_training.train_raw import CONFIG


class FakeTime:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def timed(seconds: float, clock: FakeTime, steps: int = 10**9, warmup: int = 0) -> TimedRates:
    return TimedRates(steps, warmup, 0.5, timer=Timer(seconds, clock))


def test_timed_rates_follow_their_clock():
    clock = FakeTime()
    rates = timed(100, clock, warmup=2)
    assert rates.left(0) == 1 and rates.factor(0) == pytest.approx(1 / 3)
    assert rates.factor(5) == 1
    clock.now = 75
    assert rates.left(6) == 0.25 and rates.factor(6) == pytest.approx(0.5)
    clock.now = 101
    assert rates.left(7) == 0 and rates.factor(7) == 0
    later = timed(100, clock)
    later.timer.resume(90)
    assert later.left(0) == pytest.approx(0.1)
    assert timed(100, FakeTime(), steps=4).left(4) == 0


def test_stages_share_the_time_that_is_left(monkeypatch):
    now = FakeTime()
    monkeypatch.setattr("nano_training.recipe.plan.time.monotonic", now)
    clock = Clock(480)
    assert sum(SHARES.values()) == pytest.approx(1)
    assert clock.seconds_of("vae") == pytest.approx(480 * SHARES["vae"])
    now.now = 240
    assert clock.seconds_of("turbo") > 240 * SHARES["turbo"]
    assert clock.seconds_of("exam") == pytest.approx(240)
    now.now = 500
    assert clock.seconds_of("exam") == 0


def quadratic(folder, rates, fail_at: int = -1):
    """A toy whose state is saved after each step; its buffer counts them."""
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("steps", torch.zeros(2))
    nn.init.ones_(model.weight)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    stage = Stage("toy", folder, model, [optimiser], rates, seconds_between_saves=-1)

    def loss_of_step(step):
        model.steps += 1
        return model.weight.square().sum() * (float("nan") if step == fail_at else 1)

    return stage, loss_of_step


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    clock = FakeTime()
    stage, loss_of_step = quadratic(tmp_path, timed(10, clock))

    def stops(step):
        clock.now += 1
        if step == 6:
            raise KeyboardInterrupt
        return loss_of_step(step)

    with pytest.raises(KeyboardInterrupt):
        stage.train(stops)
    again, loss_of_step = quadratic(tmp_path, timed(10, clock))
    assert again.step == 6 and again.model.steps.tolist() == [6, 6]
    clock.now += 50  # between the two
    assert again.rates.left(6) == pytest.approx(0.4)

    def goes_on(step):
        clock.now += 1
        return loss_of_step(step)

    again.train(goes_on)
    assert again.step == 10, "until its seconds are used"


def test_a_loss_that_is_not_finite_returns_to_what_was_saved(tmp_path):
    stage, loss_of_step = quadratic(tmp_path, Rates(8), fail_at=5)
    saved = []
    stage.on_saved = lambda: saved.append(float(stage.model.weight.detach()))
    stage.train(loss_of_step)
    assert stage.step == 8 and torch.isfinite(stage.model.weight).all()
    assert np.isfinite(saved).all() and stage.returns_left == 2
    stage, _ = quadratic(tmp_path / "never", Rates(3))
    with pytest.raises(TrainingStopped, match="The loss is nan"):
        stage.train(lambda step: stage.model.weight.sum() * float("nan"))


def test_chunks_are_the_same_again_and_have_what_each_kind_needs(tmp_path):
    for kind in ("practice", "scenes", "landscapes", "notebook", "references"):
        for index in range(3):
            chunk = draw_chunk(kind, index, 2, 4)
            again = draw_chunk(kind, index, 2, 4)
            assert np.array_equal(chunk.pictures, again.pictures)
            assert chunk.captions == again.captions and len(chunk.captions) == 2
            assert chunk.pictures.dtype == np.uint8
            height, width = chunk.pictures.shape[1:3]
            assert chunk.details.shape == (2, height // 16, width // 16) and chunk.details.any()
    assert {len(draw_chunk("references", i, 1, 9).references) for i in range(30)} == {0, 1, 2}
    artists = Artists(tmp_path, 0)
    artists.request("scenes", 2, 2)
    artists.request("scenes", 1, 2, "twice")
    first, second, twice = artists.take("scenes"), artists.take("scenes"), artists.take("twice")
    assert np.array_equal(first.pictures, twice.pictures) and first.captions == twice.captions
    assert not np.array_equal(first.captions, second.captions)
    assert artists.take("scenes", wait=True) is None and artists.waiting("scenes") == 0


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder(nano.text_encoder_file(), dtype=torch.float32)


def test_captions_encoded_together_are_those_encoded_alone(encoder):
    captions = ["a red circle", "the sea at night, two sailing boats on the left", ""]
    for caption, taps in zip(captions, encode_captions(encoder.to(DEVICE), captions), strict=True):
        alone = encoder.encode([caption])[0][0].bfloat16()
        assert taps.shape == alone.shape
        assert torch.allclose(taps.float(), alone.float(), atol=0.05, rtol=0.02)


def test_the_pool_gives_batches_of_one_size(encoder, tmp_path):
    artists = Artists(tmp_path, 0)
    artists.request("scenes", 2, 3)
    artists.request("landscapes", 1, 3)
    pipeline = Krea2Pipeline.nano("raw")
    pool = EncodedPool(artists, encoder, pipeline.vae)
    while pool.grow(("scenes", "landscapes"), wait=True):
        pass
    assert pool.size == 9
    for seed in range(8):
        batch = pool.batch(512, Random(seed))
        count, _, height, width = batch.latents.shape
        assert count == max(1, 512 * 4 // (height * width))
        assert batch.things.shape == (count, 1, height, width)
        assert batch.taps.shape[:2] == batch.mask.shape and len(batch.taps) == count


def test_the_loss_is_what_the_shipped_raw_was_trained_to_lower(encoder, tmp_path):
    """On scenes of 128 px, which it knows: encoding, captions, times and noise have to fit."""
    raw = Krea2Pipeline.nano("raw")
    pool = EncodedPool(Artists(tmp_path, 0), encoder, raw.vae)
    for index in range(6):
        chunk = draw_chunk("scenes", index, 8)
        if chunk.pictures.shape[1:3] == (128, 128):
            pool.add(chunk)
    model = load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.float32, device=DEVICE)
    batch = pool.batch(64 * 6, Random(1), empty=0)
    with torch.no_grad():
        loss = float(flow_loss(model, batch, Random(2), 3))
        batch.taps = batch.taps.roll(1, dims=0)
        wrong_captions = float(flow_loss(model, batch, Random(2), 3))
        untrained = float(flow_loss(new_transformer(CONFIG).to(DEVICE), batch, Random(2), 3))
    assert loss < 0.3 * untrained and loss < 0.8 * wrong_captions, (loss, wrong_captions, untrained)


def test_pixels_are_encoded_as_the_pipeline_does():
    pipeline = Krea2Pipeline.nano("raw")
    chunk = draw_chunk("scenes", 0, 2)
    images = torch.from_numpy(chunk.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = encode_pixels(pipeline.vae.to(DEVICE), torch.from_numpy(chunk.pictures))
    error = (latents.cpu() - pipeline.vae.cpu().encode(images)).abs().mean()
    assert error < 0.05, error


def test_crops_are_parts_of_pictures():
    pixels = Pixels()
    chunk = draw_chunk("landscapes", 0, 1)
    chunk.pictures = np.arange(256, dtype=np.uint8)[None, :, None, None].repeat(256, 2).repeat(3, 3)
    pixels.add(chunk)
    crops = pixels.batch(64, 5, Random(0))
    rows = (crops[:, 0, :, 0] + 1) * 127.5
    assert crops.shape == (5, 3, 64, 64)
    assert torch.allclose(rows.diff(dim=1), torch.ones(5, 63), atol=1e-3)
    assert len({round(float(row[0])) for row in rows}) > 1
    assert [side_of(share) for share in (0, 0.7, 0.9)] == [64, 128, 256]


def test_the_vae_trains_on_small_pictures_where_no_large_ones_are_ready(tmp_path):
    pixels = Pixels()
    pixels.add(draw_chunk("practice", 0, 2))
    sides = []
    batch = pixels.batch
    pixels.batch = lambda *asked: sides.append(batch(*asked).shape[-1]) or batch(*asked)
    vae = train_vae(tmp_path, pixels, lambda step: None, Rates(8), TINY)
    assert sides[0] == 64 and sides[-1] == 128
    assert all(torch.isfinite(weight).all() for weight in vae.state_dict().values())


def test_every_stage_writes_its_file_and_the_numbers(tmp_path, monkeypatch):
    output = tmp_path / "output"
    run = RecipeRun(output, tmp_path / "states", TINY, 600, workers=0)
    run.run()
    assert not run.failed
    assert {path.name for path in output.iterdir()} == {
        *FILES.values(),
        "report.json",
        "sheets.png",
    }
    assert sum(path.stat().st_size for path in output.iterdir()) < 45e6
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert {"turbo, scenes at 256 px", "raw, scenes at 128 px", "reference LoRA",
            "notebook LoRA"} <= set(report["exams"])  # fmt: skip
    assert all(f"{stage} seconds" in report for stage in SHARES)
    shipped = tmp_path / "nano"
    shipped.mkdir()
    monkeypatch.setattr(nano, "FOLDER", shipped)
    assert {path.name for path in install(output)} == set(FILES.values())
    (output / FILES["raw"]).unlink()
    with pytest.raises(ValueError, match="krea2_nano_raw"):
        install(output)
    # A LoRA that fails costs no exam.
    failing = RecipeRun(output, tmp_path / "states", TINY, 600, workers=0)
    failing.stage("lora", lambda: 1 / 0, needed=False)
    assert failing.failed == ["lora"] and "division" in failing.report.numbers["lora error"]
    with pytest.raises(ZeroDivisionError):
        failing.stage("raw", lambda: 1 / 0)
    # A second run goes on: every stage is over, and its states say so.
    again = RecipeRun(output, tmp_path / "states", replace(TINY, exam_scenes=1), 600, workers=0)
    assert again.rates("raw", 1, 0.5).left(1) == 0
