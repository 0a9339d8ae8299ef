"""Distillation: roles on one base, the direction of the student, `krea2 distil`."""

import json
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_reference import TINY
from krea2_model import Krea2Pipeline, Krea2Transformer, nano
from krea2_model.checkpoints.transformer import save_transformer
from krea2_model.cli.main import main
from krea2_training.config import DistilConfig, read_config
from krea2_training.data.cache import Cache, Texts
from krea2_training.data.shapes import ASPECTS
from krea2_training.distil import FAKE, STUDENT, TEACHER, TrajectoryMatching, distil
from krea2_training.engine.loop import TrainingStopped
from krea2_training.engine.world import ALONE
from krea2_training.flow import generator_of
from krea2_training.forecast import forecast
from krea2_training.session import Session
from krea2_training.settings.methods import Distil
from krea2_training.settings.sections import Adapter
from krea2_training.weights.base import TrainingBackend
from krea2_training.weights.roles import Roles
from parity import assert_close, relative_error


@pytest.fixture(params=["lora", "dora", "lokr"])
def roles(request):
    torch.manual_seed(0)
    model = Krea2Transformer(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    found = Roles(model, Adapter(method=request.param, rank=2), (STUDENT, FAKE))
    for role in (STUDENT, FAKE):
        for name, parameter in found.parameters(role).items():
            if name.endswith("up"):
                torch.nn.init.normal_(parameter, std=0.5)
    return found


def inputs():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 8, 8, generator=generator)
    text = torch.randn(2, 5, TINY.hidden_size, generator=generator)
    return latents, torch.tensor([0.3, 0.8]), text


@pytest.mark.parametrize("aspects, shapes", [([], 7), (["1:1", "1:2"], 2)])
def test_batches_have_the_shapes_of_the_settings(tmp_path, aspects, shapes):
    settings = {"prompts.path": tmp_path, "prompts.aspects": aspects, "model.transformer": "nano",
                "output.path": tmp_path / "x.safetensors"}  # fmt: skip
    config = read_config(None, settings, DistilConfig)
    found = [config.prompts.draw_size(512, Random(number), ASPECTS) for number in range(200)]
    assert len(set(found)) == shapes
    square = found.count((512, 512)) / len(found)
    assert 0.4 < square < 0.6


def test_roles_share_a_base_and_nothing_else(roles):
    torch.manual_seed(0)
    plain = Krea2Transformer(TINY)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = plain(*inputs())
        at_rest = roles.model(*inputs())
        outputs = {}
        for role in (STUDENT, FAKE, TEACHER):
            with roles.acting(role) as model:
                outputs[role] = model(*inputs())
    assert torch.equal(outputs[TEACHER], expected)
    assert torch.equal(outputs[STUDENT], at_rest)
    assert not torch.allclose(outputs[STUDENT], expected, atol=1e-3)
    assert not torch.allclose(outputs[FAKE], outputs[STUDENT], atol=1e-3)
    student, fake = roles.parameters(STUDENT), roles.parameters(FAKE)
    assert student and fake and not student.keys() & fake.keys()
    assert all(p.requires_grad for p in (*student.values(), *fake.values()))


def test_blocks_are_computed_again_in_the_role_they_had(roles):
    """The backward pass comes when the model is in another role."""

    def gradients(backend):
        with roles.acting(FAKE) as model:
            loss = model(*inputs(), **backend).square().mean()
        loss.backward()
        found = {n: p.grad.clone() for n, p in roles.parameters(FAKE).items()}
        assert all(p.grad is None for p in roles.parameters(STUDENT).values())
        roles.model.zero_grad(set_to_none=True)
        return found

    held = gradients({})
    again = gradients({"backend": TrainingBackend(lambda: roles.acting(FAKE))})
    assert held.keys() == again.keys()
    for name, gradient in held.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


class OfGaussians(TrajectoryMatching):
    """With velocities of known distributions in place of a network's.

    The teacher's data are N(2, 0.5^2) with the prompt and N(1, 0.5^2) without it. Student and fake
    model know one number each, the picture that they always expect.
    """

    def __init__(self, settings, guidance, optimisers, student, fake):
        self.settings, self.guidance, self.optimisers = settings, guidance, optimisers
        self.seed, self.schedules, self._fake = 0, [[1.0, 0.6, 0.0]], [fake]
        self.world = ALONE
        self.known = {STUDENT: student, FAKE: fake}

    def _velocity(self, role, latents, times, texts):
        t = times[:, None, None, None]
        if role in self.known:
            return (latents - self.known[role]) / t
        mean, variance = texts.taps.flatten()[0], 0.25
        gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
        return (latents - (mean + gain * (latents - (1 - t) * mean))) / t


@pytest.mark.parametrize("guidance, mean", [(0.0, 2.0), (1.0, 3.0)])
def test_the_student_finds_the_teacher_s_pictures(guidance, mean):
    """A point is nearest to a Gaussian at its mean; guidance of 1 moves it by one difference."""
    student, fake = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimisers = [torch.optim.Adam([p], lr=0.1) for p in (student, fake)]
    matching = OfGaussians(Distil(), guidance, optimisers[1:], student, fake)
    texts, empty = (Texts(torch.full((4, 1, 1, 1), value)) for value in (2.0, 1.0))
    empty = Texts(empty.taps[:1])
    for number in range(80):
        batch = matching.begin(number, (4, 16, 2, 2), texts, number)
        matching.follow([batch], 1)
        measured = matching.loss(batch, empty)
        measured.loss.backward()
        optimisers[0].step()
        optimisers[0].zero_grad()
    assert abs(student.item() - mean) < 0.1
    assert abs(fake.item() - student.item()) < 0.2


def test_times_are_in_the_interval_of_their_step():
    matching = OfGaussians(Distil(), 0.0, [], torch.tensor(0.0), torch.tensor(0.0))
    noise = torch.randn(64, 16, 2, 2)
    walk = matching._walk(noise, [1.0, 0.6, 0.0], Texts(torch.ones(64, 1, 1, 1)))
    chosen = matching._choose(walk, generator_of(0, 0))
    assert {round(time, 4) for time in chosen.times.tolist()} == {1.0, 0.6}
    for time, tau in zip(chosen.times.tolist(), chosen.tau.tolist(), strict=True):
        low, high = (0.6, 1.0) if time == 1 else (0.0, 0.6)
        assert low < tau <= high + 1e-6
    first = chosen.times == 1
    assert torch.equal(chosen.latents[first], noise[first])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red circle\na blue star on white\n")
    return file


def config_of(prompts, output, **settings):
    defaults = {
        "prompts.path": prompts, "prompts.size": 64, "model.transformer": "nano",
        "output.path": output, "adapter.rank": 2, "distil.steps": [2, 4],
        "distil.fake_updates": 1, "training.steps": 2, "training.batch": 1,
        "samples.every": 0, "memory.device": "cpu",
    }  # fmt: skip
    settings = {name.replace("__", "."): value for name, value in settings.items()}
    return read_config(None, defaults | settings, DistilConfig)


def test_what_is_distilled_is_a_few_step_lora(prompts, tmp_path):
    whole = distil(config_of(prompts, tmp_path / "whole.safetensors"))

    def stop(step, record):
        assert record["fake loss"] > 0
        raise KeyboardInterrupt

    config = config_of(prompts, tmp_path / "parts.safetensors")
    with pytest.raises(KeyboardInterrupt):
        distil(config, stop)
    parts, expected = load_file(distil(config)), load_file(whole)
    assert all(torch.equal(parts[name], expected[name]) for name in expected)
    assert parts.keys() == expected.keys() and not any(".layer" in name for name in expected)
    with safe_open(whole, "pt") as file:
        assert file.metadata()["krea2.steps"] == "4"
        assert json.loads(file.metadata()["krea2.training"])["distil"]["steps"] == [2, 4]
    pipeline = Krea2Pipeline.nano("raw")
    assert pipeline.load_lora(whole).is_complete
    assert (pipeline.preset.steps, pipeline.preset.guidance) == (4, 0)


def of_turbo(tmp_path, **settings):
    """Settings of a run whose student begins as nano's Turbo."""
    files = {"transformer": nano.TRANSFORMERS["turbo"], "text_encoder": nano.text_encoder_file(),
             "vae": nano.VAE}  # fmt: skip
    files = {f"model__{name}": str(path) for name, path in files.items()}
    return {**files, "distil__teacher": "nano", **settings}


def test_a_student_that_begins_as_turbo_has_raw_for_its_teacher(prompts, tmp_path, caplog):
    directions, begun = [], TrajectoryMatching._direction

    def seen(matching, image, chosen, texts, empty):
        times = chosen.tau[:, None, None, None]
        noisy = torch.lerp(image, chosen.noise, times)
        with torch.no_grad():
            expected = raw(noisy, chosen.tau, texts.fuse(raw), texts.mask)
            found = matching._velocity(TEACHER, noisy, chosen.tau, texts)
            student = matching._velocity(STUDENT, noisy, chosen.tau, texts)
        directions.append((found, expected.float(), student))
        return begun(matching, image, chosen, texts, empty)

    raw = Krea2Pipeline.nano("raw").transformer
    output = tmp_path / "refined.safetensors"
    settings = of_turbo(tmp_path, distil__guidance=0, memory__dtype="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrajectoryMatching, "_direction", seen)
        file = distil(config_of(prompts, output, **settings))
    for found, expected, student in directions:
        assert_close(found, expected, 1e-4, "the teacher's velocity")
        assert relative_error(student, expected) > 0.01, "the student is another model"
    assert "Train on Raw" not in caplog.text
    pipeline = Krea2Pipeline.nano()
    assert pipeline.load_lora(file).is_complete and pipeline.preset.guidance == 0


def test_a_quantised_teacher_is_not_quantised_again(prompts, tmp_path, monkeypatch):
    file = tmp_path / "fp8.safetensors"
    assert main(["convert", str(nano.TRANSFORMERS["raw"]), str(file), "--quantise", "fp8"]) == 0
    monkeypatch.setattr(Session, "encode", None)  # before anything is encoded
    settings = of_turbo(tmp_path, distil__teacher=str(file), memory__base="4bit")
    with pytest.raises(
        ValueError, match="distil.teacher is .*fp8.safetensors: memory.base is 4bit"
    ):
        distil(config_of(prompts, tmp_path / "x.safetensors", **settings))


@pytest.mark.parametrize(
    "teacher, message",
    [
        ("turbo", "a Turbo checkpoint; expected the Raw"),
        ("tiny", "other sizes"),
        ("nope.safetensors", "distil.teacher is 'nope.safetensors'. There is no file"),
        ("raw as the model", "model.transformer is a Raw, which is its own teacher"),
    ],
)
def test_a_teacher_has_to_be_the_raw_of_the_model(prompts, tmp_path, teacher, message):
    """In the forecast too."""
    files = {"turbo": nano.TRANSFORMERS["turbo"], "tiny": tmp_path / "tiny.safetensors",
             "raw as the model": "nano-raw"}  # fmt: skip
    save_transformer(Krea2Transformer(TINY), files["tiny"])
    settings = of_turbo(tmp_path, distil__teacher=str(files.get(teacher, teacher)))
    if teacher == "raw as the model":
        settings["model__transformer"] = "nano"
    config = config_of(prompts, tmp_path / "x.safetensors", **settings)
    for call in (distil, forecast):
        with pytest.raises(ValueError, match=message):
            call(config)


def test_a_teacher_s_content_counts_and_not_its_place(prompts, tmp_path):
    def run(teacher, steps):
        settings = of_turbo(tmp_path, distil__teacher=str(teacher), training__steps=steps)
        return distil(config_of(prompts, tmp_path / "x.safetensors", **settings))

    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    here.write_bytes(nano.TRANSFORMERS["raw"].read_bytes())
    run(here, 1)
    there.write_bytes(here.read_bytes())
    tensors = load_file(here)
    with safe_open(here, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, here, metadata)
    with pytest.raises(ValueError, match="has a run with other settings: teacher .another"):
        run(here, 2)
    run(there, 2)


def test_a_forecast_refuses_regions_that_a_run_refuses(tmp_path):
    (file := tmp_path / "rows.jsonl").write_text('{"prompt": "a", "regions": [{"prompt": "b"}]}')
    with pytest.raises(ValueError, match="Row 1, regions"):
        forecast(config_of(file, tmp_path / "x.safetensors"))


def test_a_share_of_prompts_is_empty(prompts, tmp_path, monkeypatch):
    asked, texts = [], Cache.texts

    def seen(cache, chosen, device):
        asked.append(chosen)
        return texts(cache, chosen, device)

    monkeypatch.setattr(Cache, "texts", seen)
    settings = {"training__batch": 4, "training__steps": 4, "distil__fake_updates": 1}
    distil(config_of(prompts, tmp_path / "x.safetensors", distil__dropout=0.5, **settings))
    found = [prompt for batch in asked if len(batch) == 4 for prompt in batch]
    assert len(found) == 16 and 3 < found.count("") < 13


def test_the_command_refuses_and_forecasts(prompts, tmp_path, capsys):
    words = ["distil", str(prompts), "--model", "nano", "--output", str(tmp_path / "x.safetensors")]
    assert main([*words, "--dry-run", "--device", "cpu"]) == 0
    assert "together" in capsys.readouterr().out
    for extra, expected in (
        (["--method", "full"], "--method is full; expected lora, dora or lokr"),
        (["--for-steps", "20"], "--for-steps is 20; expected"),
        (["--size", "100"], "--size is 100; expected a multiple of 16"),
    ):
        assert main([*words, *extra]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    words[1] = str(tmp_path / "empty.txt")
    assert main(words) == 2
    assert "holds no prompts" in capsys.readouterr().err


def test_a_fake_model_that_diverges_stops_the_run():
    student, fake = (torch.nn.Parameter(torch.tensor(value)) for value in (0.0, float("nan")))
    matching = OfGaussians(Distil(), 0.0, [], student, fake)
    texts = Texts(torch.ones(1, 1, 1, 1))
    with pytest.raises(TrainingStopped, match="fake model is nan"):
        matching.follow([matching.begin(0, (1, 16, 2, 2), texts, 0)], 1)
