"""Distillation on prompts with regions: the sampler's velocities, their gradients, batches."""

import json

import pytest
import torch
from safetensors.torch import load_file

from krea2_model import Krea2Pipeline, Region, Regions
from krea2_training.commands import run_command
from krea2_training.config import KINDS, DistilConfig, read_config
from krea2_training.data.cache import Cache
from krea2_training.data.encoders import Encoders
from krea2_training.data.prompts import in_turn, read_prompts
from krea2_training.data.regional import PromptBatches, RegionalTexts, joined
from krea2_training.distil import FAKE, STUDENT, TEACHER, TrajectoryMatching, distil
from krea2_training.forecast import forecast
from krea2_training.session import Session
from krea2_training.settings.methods import Distil
from krea2_training.settings.sections import Adapter, Model
from krea2_training.weights.roles import Roles
from parity import assert_close

LEFT, RIGHT, ABOVE = [0, 0, 0.5, 1], [0.5, 0, 0.5, 1], [0, 0, 1, 0.6]
ROWS = [
    {"prompt": "", "regions": [{"prompt": "a red circle", "box": LEFT},
                               {"prompt": "a star", "box": RIGHT}]},
    {"prompt": "a grey background", "regions": [{"prompt": "a big blue square", "box": LEFT},
                                                {"prompt": "a lime ring", "box": RIGHT}]},
    {"prompt": "shapes", "regions": json.dumps([{"prompt": "a star", "box": ABOVE}])},
    {"prompt": "a red circle on white"},
    {"prompt": "blue"},
]  # fmt: skip


@pytest.fixture(scope="module")
def raw():
    return Krea2Pipeline.nano("raw")


@pytest.fixture(scope="module")
def batches():
    return PromptBatches(ROWS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, batches):
    model = Model(transformer="nano")
    found = Cache(
        tmp_path_factory.mktemp("cache"), Encoders(model, torch.device("cpu"), torch.float32)
    )
    found.fill([], ["", *batches.texts])
    return found


@pytest.fixture(scope="module")
def roles(raw):
    torch.manual_seed(2)
    model = Krea2Pipeline.nano("raw").transformer.float()
    found = Roles(model.requires_grad_(False), Adapter(rank=2), (STUDENT, FAKE))
    for name, parameter in found.parameters(STUDENT).items():
        if name.endswith("up"):
            torch.nn.init.normal_(parameter, std=0.02)
    return found


@pytest.fixture(scope="module")
def texts(batches, cache):
    """Of the two pictures with regions at the same places; their lengths differ."""
    found = batches.read([0, 1], [row["prompt"] for row in ROWS[:2]], cache, torch.device("cpu"))
    assert isinstance(found, RegionalTexts) and found.mask is not None
    return found


def matching(roles, **options):
    return TrajectoryMatching(roles, Distil(), 0.0, [], **options)


def test_velocities_are_those_of_a_run(raw, roles, texts):
    """One step from noise, of each picture by itself in the pipeline."""
    sampled = []
    for number, row in enumerate(ROWS[:2]):
        regions = [Region(**entry) for entry in row["regions"]]
        noise = raw.prepare_latents(1, width=64, height=64, seed=number)
        end = raw(row["prompt"], regions=regions, latents=noise, width=64, height=64, guidance=0,
                  sigmas=[1.0, 0.0], output_type="latent")  # fmt: skip
        sampled.append((noise, noise - end))
    latents = torch.cat([noise for noise, _ in sampled])
    expected = torch.cat([velocity for _, velocity in sampled])
    with torch.no_grad():
        found = matching(roles)._velocity(TEACHER, latents, torch.ones(2), texts)
    assert_close(found, expected, 1e-4, "a velocity with regions")


def test_texts_of_regions_are_fused_in_one_call(roles, texts, monkeypatch):
    """Processes that share the weights gather them as often as each other."""
    calls, fuse = [], roles.model.fuse_text
    monkeypatch.setattr(roles.model, "fuse_text", lambda *a, **n: calls.append(1) or fuse(*a, **n))
    with torch.no_grad():
        joined(texts, roles.model, torch.zeros(2, 16, 8, 8))
    assert len(calls) == 1


def test_options_of_regions_count(raw, roles, cache):
    """The factor of the prompt of all of the picture, as in a run."""
    row = {**ROWS[0], "regions": {"regions": ROWS[0]["regions"], "text_factor": 0.2}}
    texts = PromptBatches([row]).read([0], [row["prompt"]], cache, torch.device("cpu"))
    regions = Regions([Region(**entry) for entry in ROWS[0]["regions"]], text_factor=0.2)
    noise = raw.prepare_latents(1, width=64, height=64, seed=4)
    end = raw(row["prompt"], regions=regions, latents=noise, width=64, height=64, guidance=0,
              sigmas=[1.0, 0.0], output_type="latent")  # fmt: skip
    with torch.no_grad():
        found = matching(roles)._velocity(TEACHER, noise, torch.ones(1), texts)
    assert_close(found, noise - end, 1e-4, "a velocity with a factor")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_go_through_regions(roles, texts, checkpointing):
    """By masks instead of parts of the keys: the same numbers, and gradients of finite size."""
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(3))
    times = torch.tensor([0.4, 0.9])
    run = matching(roles, checkpointing=checkpointing)
    with torch.no_grad():
        expected = run._velocity(STUDENT, latents, times, texts)
    found = run._velocity(STUDENT, latents, times, texts)
    assert_close(found.detach(), expected, 1e-5, "with gradients on")
    gradients = torch.autograd.grad(found.square().mean(), roles.parameters(STUDENT).values())
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    parts = list(roles.parameters(STUDENT).values())
    step = [1e-3 * g / norm for g in gradients]
    with torch.no_grad():
        torch._foreach_add_(parts, step)
        above = run._velocity(STUDENT, latents, times, texts).square().mean()
        torch._foreach_sub_(parts, [2 * s for s in step])
        below = run._velocity(STUDENT, latents, times, texts).square().mean()
        torch._foreach_add_(parts, step)
    assert (above - below) / 2e-3 == pytest.approx(norm, rel=0.02)


def test_a_batch_has_regions_at_the_same_places(batches):
    kinds = {(0, 1): 0, (2,): 0, (3, 4): 0}
    for number in range(300):
        chosen = batches.draw(4, number, seed=5)
        assert chosen == batches.draw(4, number, seed=5) and len(chosen) == 4
        (kind,) = {kind for kind in kinds for row in chosen if row in kind}
        kinds[kind] += 1
    assert kinds[(0, 1)] > 80 and kinds[(3, 4)] > 80 and 30 < kinds[(2,)] < 90, "as their rows"
    plain = PromptBatches(ROWS[3:])
    assert all(plain.draw(3, n, 1) == in_turn(2, 3, n, 1) for n in range(9)), "as without regions"
    assert "a red circle on the left" in batches.texts, "as a run says it"


@pytest.mark.parametrize(
    "regions, message",
    [
        ([{"prompt": "a", "box": LEFT, "end": 0.5}], "Row 2, regions: Region 1 .* from 0 to 0.5"),
        ([{"prompt": "a", "box": LEFT, "strength": 0}], "Region 1 has strength 0"),
        (b"regions", "regions is .*; expected a JSON list"),
        ([{"prompt": "a", "box": LEFT, "loras": [["x", 1]]}], "Region 1 has loras"),
        ([{"prompt": "a", "mask": "m.png"}], "training takes a prompt and a box"),
        ([{"prompt": " ", "box": LEFT}], "Row 2, regions: Region 1"),
        ({"regions": [{"prompt": "a", "box": LEFT}], "separate": 0.3}, "separate is 0.3"),
        ("[{", "cannot be read"),
    ],
)
def test_regions_that_training_cannot_paint_are_refused(regions, message):
    with pytest.raises(ValueError, match=message):
        PromptBatches([{"prompt": "a"}, {"prompt": "b", "regions": regions}])


def test_a_row_with_regions_needs_no_prompt(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "", **row}) + "\n" for row in ROWS))
    rows = read_prompts(file, regions=True)
    assert [row["prompt"] for row in rows][:2] == ["", "a grey background"]
    file.write_text(json.dumps(ROWS[0]) * 1 + "\n" + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ValueError, match="1 prompt more than once"):
        read_prompts(file, regions=True)
    for command in ("slider", "reward"):  # which paint no regions
        own = {"slider": {"slider.positive": "a", "slider.negative": "b"},
               "reward": {"reward.rewards": ["http://localhost:1"]}}[command]  # fmt: skip
        config = read_config(None, {
            "prompts.path": file, "model.transformer": "nano", "output.path": "x.safetensors", **own
        }, KINDS[command])  # fmt: skip
        for call in (run_command, forecast):
            with pytest.raises(ValueError, match="row 1 has regions, which this command does not"):
                call(config, *[lambda *_: None][: call is run_command])
    file.write_text(json.dumps({"prompt": "", "regions": "[]"}) + "\n")
    with pytest.raises(ValueError, match="row 1: prompt is ''"):
        read_prompts(file, regions=True)


def test_cells_of_other_tables():
    """A cell of CSV is a text, and Parquet fills what an entry lacks with nulls."""
    rows = [{"prompt": "a", "regions": cell} for cell in ("[]", " ", [], None, "")]
    assert PromptBatches(rows).regions == [None] * len(rows)
    entries = [{"prompt": "a", "box": LEFT, "strength": 0.5},
               {"prompt": "b", "box": RIGHT, "strength": None}]  # fmt: skip
    (regions,) = PromptBatches([{"prompt": "", "regions": entries}]).regions
    assert regions is not None and [one.strength for one in regions.regions] == [0.5, 1.0]


def config_of(rows, tmp_path, **more):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_config(None, {
        "prompts.path": file, "prompts.size": 64, "model.transformer": "nano",
        "output.path": tmp_path / "x.safetensors", "adapter.rank": 2, "distil.steps": [2],
        "distil.fake_updates": 1, "training.steps": 3, "training.batch": 2,
        "samples.every": 0, "memory.device": "cpu", **more,
    }, DistilConfig)  # fmt: skip


@pytest.mark.parametrize("call", [distil, forecast])
def test_a_region_without_a_place_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, call):
    """By the rule of a run; a larger picture has a place for it."""
    row = {"prompt": "a", "regions": [{"prompt": "b", "box": [0.1, 0.1, 0.15, 0.15]}]}
    config = config_of([ROWS[3], row], tmp_path)
    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("loaded"))
    message = "Row 2, regions: Region 1 covers less than half a token .*larger pictures"
    with pytest.raises(ValueError, match=message):
        call(config)
    PromptBatches([ROWS[3], row]).check_sizes([(128, 128)])


def test_a_run_on_a_table_with_regions(tmp_path):
    config = config_of(ROWS, tmp_path)
    losses = []
    tensors = load_file(distil(config, lambda step, record: losses.append(record["loss"])))
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
