"""Rewards: random steps, the policy's loss, selection, functions and servers, `krea2 reward`."""

import itertools
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_reference import TINY
from krea2_model import Krea2Pipeline, Krea2Transformer, sigma_schedule
from krea2_model.cli.main import main
from krea2_training import rewards as rewards_module
from krea2_training.config import RewardConfig, read_config
from krea2_training.data.cache import Texts
from krea2_training.data.prompts import Selection
from krea2_training.flow import generator_of
from krea2_training.grpo import (
    Policy,
    Step,
    advantages_of,
    clipped_loss,
    diversity_of,
    random_steps,
)
from krea2_training.reward import reward
from krea2_training.rewards import Reward
from krea2_training.settings.sections import Adapter
from krea2_training.weights.roles import Roles

MEAN, DEVIATION = 0.8, 0.5  # of the toy's images, a Gaussian


def toy_moments(sigma):
    """Mean and variance of the toy's noisy images at a time."""
    return (1 - sigma) * MEAN, ((1 - sigma) * DEVIATION) ** 2 + sigma**2


def toy_velocity(x, sigma, deviation=DEVIATION):
    """E[noise - image | x] of images from N(MEAN, deviation)."""
    variance = ((1 - sigma) * deviation) ** 2 + sigma**2
    gain = (sigma - (1 - sigma) * deviation**2) / variance
    return gain * (x - (1 - sigma) * MEAN) - MEAN


def run_toy(steps, deviation=DEVIATION):
    """Mean and variance at the end of a rollout from noise; each step is linear in x."""
    mean, variance = 0.0, 1.0
    for step in steps:
        x = torch.tensor([0.0, 1.0], dtype=torch.float64)
        after = step.mean(x, toy_velocity(x, step.now, deviation))
        gain = float(after[1] - after[0])
        mean, variance = float(after[0]) + gain * mean, gain**2 * variance + step.noise**2
    return mean, variance


@pytest.mark.parametrize("level", [0.3, 0.7, 1.5])
def test_random_steps_have_the_marginals_of_the_ode(level):
    """Exactly for images without spread at any number of steps, and in the limit for others."""
    sigmas = sigma_schedule(6, 0.9)
    for index in range(1, 7):
        mean, variance = run_toy(random_steps(sigmas, level)[:index], deviation=0.0)
        assert mean == pytest.approx((1 - sigmas[index]) * MEAN, abs=1e-9)
        assert variance == pytest.approx(sigmas[index] ** 2, abs=1e-9)
    sigmas = sigma_schedule(1000, 0.9)
    for index in (500, 1000):
        expected = toy_moments(sigmas[index])
        assert run_toy(random_steps(sigmas, level)[:index]) == pytest.approx(expected, abs=0.02)
        ode = [Step(now, then) for now, then in itertools.pairwise(sigmas[: index + 1])]
        assert run_toy(ode) == pytest.approx(expected, abs=0.02)


def test_a_small_step_is_the_paper_s():
    """`x + (v + s^2/(2t) (x + (1-t) v)) dt`, with s = a sqrt(t/(1-t)) and dt below 0."""
    x, v = torch.randn(2, 50, dtype=torch.float64, generator=generator_of(0, 0))
    now, level, errors = 0.6, 0.7, []
    for change in (1e-2, 1e-3):
        step = random_steps([0.9, now, now - change, 0.0], level)[1]
        s = level * math.sqrt(now / (1 - now))
        assert step.noise == pytest.approx(s * math.sqrt(change))
        paper = x - change * (v + s**2 / (2 * now) * (x + (1 - now) * v))
        errors.append(float((step.mean(x, v) - paper).abs().max()))
    assert errors[1] < 1e-4 and errors[1] < errors[0] / 90, "of second order"
    ode = Step(now, 0.5)
    torch.testing.assert_close(ode.mean(x, v), x - (now - 0.5) * v)
    steps = random_steps(sigma_schedule(5, 0.5), level)
    assert steps[-1].noise == 0 and all(0 < step.noise <= step.then for step in steps[:-1])


def test_likelihood_and_divergence_are_torch_s():
    step = Step(0.7, 0.5, 0.3)
    x, after, v, other = torch.randn(4, 3, 16, 4, 4, generator=generator_of(0, 1))
    ours, theirs = (
        torch.distributions.Normal(step.mean(x, velocity), step.noise) for velocity in (v, other)
    )
    expected = ours.log_prob(after).mean(dim=(1, 2, 3))
    torch.testing.assert_close(step.log_likelihood(after, step.mean(x, v)), expected)
    expected = torch.distributions.kl_divergence(ours, theirs).mean(dim=(1, 2, 3))
    torch.testing.assert_close(step.divergence(v, other), expected)


def test_advantages_are_normalised_within_the_group():
    scores, others = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([100.0, 100.0, 0.0, 0.0])
    one = (scores - 3) / scores.std(correction=0)
    torch.testing.assert_close(advantages_of([scores], [2.0], 1e-4), one)
    both = (3 * one + torch.tensor([1.0, 1.0, -1.0, -1.0])) / 4
    torch.testing.assert_close(advantages_of([scores, others], [3.0, 1.0], 1e-4), both)
    same = torch.full((4,), 0.1)
    torch.testing.assert_close(advantages_of([scores, same], [1.0, 1.0], 1e-4), one / 2)
    assert advantages_of([same, same + 1], [1.0, 1.0], 1e-4) is None


def test_the_loss_is_ppo_s():
    change = torch.tensor([0.0, 0.1, 0.1, -0.1, -0.1], requires_grad=True)
    advantages = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    loss, clipped = clipped_loss(change, advantages, 0.05)
    up, down = math.exp(0.1), math.exp(-0.1)
    assert loss.tolist() == pytest.approx([-2, -1.05, up, -down, 0.95])
    assert clipped.tolist() == [0, 1, 0, 0, 1]
    loss.sum().backward()
    assert change.grad.tolist() == pytest.approx([-2, 0, up, -down, 0]), "no gradient where clipped"
    assert clipped_loss(change, advantages, 0)[1].sum() == 0


@pytest.fixture
def policy():
    torch.manual_seed(0)
    model = Krea2Transformer(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    roles = Roles(model, Adapter(rank=2), ("policy",))
    for parameter in roles.parameters("policy").values():
        torch.nn.init.normal_(parameter, std=0.1)
    return Policy(roles, clip=0.0, kl=0.0, batch=3)


def roll_out(policy, random=(0, 2)):
    texts = Texts(torch.randn(1, 5, 12, TINY.text_hidden_dim, generator=generator_of(0, 2)))
    noise = torch.randn(4, 16, 4, 4, generator=generator_of(0, 3))
    steps = random_steps(sigma_schedule(4, 0.5), 0.7)
    rollout = policy.roll_out(texts, noise, steps, random, generator_of(0, 4))
    rollout.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    return rollout


def test_the_policy_s_gradient_is_that_of_a_formula(policy):
    """On the policy itself, `-A (after - mean) / (s^2 D) d mean`, through another graph."""
    rollout = roll_out(policy)
    assert len(rollout.steps) == 2 and [step.now for step in rollout.steps][0] == 1
    parameters = list(policy.roles.parameters("policy").values())
    losses = list(policy.losses(rollout))
    assert [len(one.loss) for one in losses] == [3, 1, 3, 1]
    own = torch.autograd.grad(sum(one.loss.sum() for one in losses), parameters)
    total = torch.zeros(())
    fused = rollout.texts.fuse(policy.roles.model).detach()
    for step, before, after in zip(rollout.steps, rollout.before, rollout.after, strict=True):
        velocity = policy.roles.model(before, torch.full((4,), step.now), fused.expand(4, -1, -1))
        with torch.no_grad():
            error = (after - step.mean(before, velocity)) / (step.noise**2 * before[0].numel())
            weight = -rollout.advantages[:, None, None, None] * error * step.factor
        total = total + (weight * velocity).sum()
    for mine, expected in zip(own, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-6)
    assert sum(float(gradient.abs().sum()) for gradient in own) > 0


def test_the_reference_is_the_model_without_its_adapter(policy):
    policy.kl = 0.5
    rollout = roll_out(policy)
    found = next(policy.losses(rollout))
    step, before, fused = rollout.steps[0], rollout.before[0][:3], None
    velocities = []
    for role in ("policy", "base"):
        with torch.no_grad(), policy.roles.acting(role) as model:
            fused = rollout.texts.fuse(model).expand(3, -1, -1)
            velocities.append(model(before, torch.full((3,), step.now), fused))
    expected = step.divergence(*velocities)
    assert (expected > 0).all()
    torch.testing.assert_close(found.divergence, expected, rtol=1e-4, atol=1e-8)
    free = -rollout.advantages[:3]
    torch.testing.assert_close(found.loss.detach(), free + 0.5 * expected, rtol=1e-3, atol=1e-5)


def test_without_noise_a_rollout_is_the_sampler_s(policy):
    from krea2_model import denoise

    rollout = roll_out(policy, random=())
    assert not rollout.steps
    fused = rollout.texts.fuse(policy.roles.model).expand(4, -1, -1)
    noise = torch.randn(4, 16, 4, 4, generator=generator_of(0, 3))
    sigmas = sigma_schedule(4, 0.5)
    with torch.no_grad():
        *_, (_, expected, _) = denoise(policy.roles.model, noise, fused, sigmas=sigmas, guidance=0)
    torch.testing.assert_close(rollout.latents, expected, atol=1e-4, rtol=1e-4)


def test_diversity_is_the_distance_of_pairs():
    pictures = torch.stack([torch.full((2, 2, 3), value) for value in (0.0, 0.5, 1.0)])
    assert diversity_of(pictures) == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_dull_prompts_rest_and_come_back():
    selection, seen = Selection(4, 0, rest=2), []
    for _ in range(10):
        chosen = selection.choose(2)
        selection.advance([index for index in chosen if index == 3])
        seen += chosen
    turns = [place for place, index in enumerate(seen) if index == 3]
    assert len(turns) == 2 and seen.count(0) >= 5
    # A choice that came to nothing is made again, also by another process with the notes.
    other = Selection(4, 0, rest=2)
    other.notes.update(json.loads(json.dumps(selection.notes)))
    assert selection.choose(3) == selection.choose(3) == other.choose(3)


SCORES = """
import numpy as np
def brightness(pictures, rows):
    return pictures.mean(axis=(1, 2, 3))
def level(pictures, rows):
    return [float(row["level"]) for row in rows]
def few(pictures, rows):
    return [1.0]
def nan(pictures, rows):
    return [float("nan")] * len(rows)
def words(pictures, rows):
    return ["good"] * len(rows)
def broken(pictures, rows):
    return 1 / 0
"""
ROWS = [{"prompt": "a red circle", "level": "0.5"}, {"prompt": "a star", "level": "2"}]
PICTURES = np.linspace(0, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)


@pytest.fixture
def scores(tmp_path):
    file = tmp_path / "score.py"
    file.write_text(SCORES)
    return file


def test_a_reward_is_a_function_of_pictures_and_rows(scores):
    expected = PICTURES.mean(axis=(1, 2, 3))
    assert Reward(f"{scores}:brightness")(PICTURES, ROWS).tolist() == pytest.approx(expected)
    assert Reward(f"{scores}:level")(PICTURES, ROWS).tolist() == [0.5, 2]
    assert Reward("operator:length_hint").name == "operator:length_hint"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("few", r"score.py:few gave scores of shape \(1,\); expected .* 2 pictures"),
        ("nan", r"score.py:nan gave nan for a picture of 'a red circle'"),
        ("words", r"score.py:words gave \['good', 'good'\]; expected a finite number"),
        ("broken", r"score.py:broken failed: ZeroDivisionError"),
        ("none", r"has no function none; it has brightness, level"),
    ],
)
def test_wrong_answers_are_named(scores, name, expected):
    with pytest.raises(ValueError, match=expected):
        Reward(f"{scores}:{name}")(PICTURES, ROWS)


def test_rewards_that_are_not_there(tmp_path):
    for name, expected in (
        (f"{tmp_path / 'gone.py'}:score", r"reward.rewards has .*gone.py, which is not there"),
        ("no_such_module:score", r"no_such_module cannot be loaded: .*No module named"),
        ("score", r"reward.rewards has 'score'; expected file.py:function"),
    ):
        with pytest.raises(ValueError, match=expected):
            Reward(name)
    (tmp_path / "wrong.py").write_text("raise ValueError('of its own')")
    with pytest.raises(ValueError, match=r"wrong.py cannot be loaded: .*of its own"):
        Reward(f"{tmp_path / 'wrong.py'}:score")


@pytest.fixture
def server():
    """Answers in turn from a list, and keeps the questions."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            questions.append(json.loads(body))
            status, answer = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *arguments):
            pass

    questions, answers = [], []
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/score", questions, answers
        http.shutdown()
        thread.join()


def test_a_server_is_a_reward(server, monkeypatch):
    address, questions, answers = server
    monkeypatch.setattr(rewards_module, "_WAIT", 0)
    answers += [(503, "busy"), (200, '{"scores": [1, 2.5]}')]
    ask = Reward(address)
    assert ask(PICTURES, ROWS).tolist() == [1, 2.5]
    assert len(questions) == 2 and questions[1]["rows"] == ROWS
    assert questions[1]["images"][0].startswith("iVBOR")  # PNG
    for status, answer, expected in (
        (404, "no such model", r"refused the pictures: 404 .*no such model"),
        (200, "[1, 2]", r"answered '\[1, 2\]'; expected"),
        (200, '{"scores": [1]}', r"scores of shape \(1,\)"),
    ):
        answers.append((status, answer))
        with pytest.raises(ValueError, match=f"The reward {address} .*{expected}"):
            ask(PICTURES, ROWS)
    answers += [(500, "out of memory")] * 4
    with pytest.raises(ValueError, match=r"did not answer in 4 tries: 500 .*out of memory"):
        ask(PICTURES, ROWS)
    with pytest.raises(ValueError, match="cannot be sent a row"):
        ask(PICTURES, [{"prompt": "x", "picture": b"bytes"}] * 2)
    with pytest.raises(ValueError, match=r"did not answer in 4 tries: .*refused"):
        Reward("http://127.0.0.1:9/score")(PICTURES, ROWS)


def config_of(tmp_path, scores, name="result", prompts=("a red circle", "a star"), **settings):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    defaults = {
        "prompts.path": file, "prompts.size": 64, "reward.rewards": [f"{scores}:brightness"],
        "reward.group_size": 4, "reward.groups": 2, "reward.rollout_steps": 3,
        "reward.random_steps": 1, "model.transformer": "nano", "adapter.rank": 4,
        "training.steps": 4, "training.batch": 4, "training.warmup": 0, "training.decay": 0.0,
        "training.learning_rate": 3e-3, "samples.every": 0, "memory.device": "cpu",
        "output.path": tmp_path / f"{name}.safetensors",
    }  # fmt: skip
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    return read_config(None, defaults | settings, RewardConfig)


def test_the_reward_rises(tmp_path, scores):
    lines = []
    config = config_of(
        tmp_path, scores, prompts=["a red circle on a purple background"], reward__groups=1,
        reward__group_size=6, reward__random_steps=2, reward__noise=1.2, training__steps=8,
        training__batch=6, training__learning_rate=1e-2,
    )  # fmt: skip
    file = reward(config, lambda step, record: lines.append(record))
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.01
    assert lines[0]["kl"] == 0 and lines[-1]["kl"] > 0
    names = {"loss", "reward", "diversity", "dropped", "kl", "clipped"}
    assert names < lines[0].keys() and lines[0]["diversity"] > 0
    assert (tmp_path / "result" / "loss.png").is_file()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert "score.py:brightness" in metadata["krea2.training"]
    assert str(tmp_path) not in json.dumps(metadata), "no folders of this machine"
    assert Krea2Pipeline.nano("raw").load_lora(file).is_complete


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, scores):
    """Also where prompts rest, and an update has gone before in each step."""
    settings = {"reward__updates": 2, "reward__clip": 0.01, "reward__spread": 0.005}

    def stop(step, record):
        if step == 2:
            raise KeyboardInterrupt

    whole = load_file(reward(config_of(tmp_path, scores, "whole", **settings)))
    config = config_of(tmp_path, scores, "parts", **settings)
    with pytest.raises(KeyboardInterrupt):
        reward(config, stop)
    parts = load_file(reward(config))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = []
    for name in ("whole", "parts"):
        lines = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert any(line["dropped"] for line in logs[0]) and any(line["loss"] for line in logs[0])


def test_each_group_has_one_shape_of_its_row_or_of_the_settings(tmp_path):
    file, prompts = tmp_path / "sizes.py", tmp_path / "rows.csv"
    file.write_text(
        "def score(pictures, rows):\n"
        "    tall, wide = pictures.shape[1:3]\n"
        "    own = rows[0]\n"
        "    with open(__file__ + '.txt', 'a') as log:\n"
        "        log.write(f\"{own['prompt']},{wide},{tall}\\n\")\n"
        "    return pictures.mean(axis=(1, 2, 3))\n"
    )
    prompts.write_text("prompt,width,height,aspect\na,64,96,\nb,,,4:1\nc,,,\n")
    config = config_of(
        tmp_path, file, prompts__path=prompts, prompts__aspects=["1:1", "1:2"], training__steps=4,
        reward__rewards=[f"{file}:score"], reward__groups=3, reward__group_size=2,
        reward__rest=0, training__batch=1,
    )  # fmt: skip
    reward(config)
    found = {}
    for line in (tmp_path / "sizes.py.txt").read_text().splitlines():
        name, *sides = line.split(",")
        found.setdefault(name, set()).add(tuple(map(int, sides)))
    assert found == {"a": {(64, 96)}, "b": {(128, 32)}, "c": {(64, 64), (48, 96)}}
    prompts.write_text("prompt,width\na,64\n")
    with pytest.raises(ValueError, match=r"rows.csv, row 1: height is not set"):
        reward(config)


def test_a_reward_that_fails_leaves_the_steps_before(tmp_path, scores):
    file = tmp_path / "failing.py"
    file.write_text(
        "calls = []\n"
        "def score(pictures, rows):\n"
        "    calls.append(1)\n"
        "    return pictures.mean(axis=(1, 2, 3)) if len(calls) < 6 else 1 / 0\n"
    )
    config = config_of(tmp_path, scores, reward__rewards=[f"{file}:score"])
    with pytest.raises(ValueError, match="failing.py:score failed: ZeroDivisionError"):
        reward(config)
    steps = []
    other = config_of(tmp_path, scores, reward__rewards=[f"{file}:score"])
    file.write_text("def score(pictures, rows):\n    return pictures.mean(axis=(1, 2, 3))\n")
    rewards_module.sys.modules.pop("krea2_reward_failing", None)
    reward(other, lambda step, record: steps.append(step))
    assert steps == [3, 4], "two steps were made and saved"


def test_the_command(tmp_path, scores, capsys):
    (tmp_path / "prompts.csv").write_text("prompt,level\na star,1\na ring,2\n")
    output = tmp_path / "x.safetensors"
    (tmp_path / "run.toml").write_text(
        '[prompts]\npath = "prompts.csv"\nsize = 64\n[model]\ntransformer = "nano"\n'
        '[reward]\nrewards = ["score.py:brightness", "score.py:level"]\nweights = [1, 0.5]\n'
        "groups = 1\ngroup_size = 2\nrollout_steps = 2\nrandom_steps = 1\n[training]\nsteps = 1\n"
        '[samples]\nevery = 0\n[output]\npath = "x.safetensors"\n'
    )
    words = ["reward", str(tmp_path / "run.toml"), "--device", "cpu", "--rank", "2"]
    assert main([*words, "--dry-run"]) == 0
    assert "together" in capsys.readouterr().out and not output.exists()
    assert main(words) == 0
    assert output.is_file()
    line = json.loads((tmp_path / "x" / "log.jsonl").read_text())
    assert {"reward score.py:brightness", "reward score.py:level"} < line.keys()
    whole = (line["reward score.py:brightness"] + 0.5 * line["reward score.py:level"]) / 1.5
    assert line["reward"] == pytest.approx(whole, abs=1e-5)
    capsys.readouterr()
    prompts = tmp_path / "prompts.csv"
    for extra, expected in (
        (["--reward", "score", "--weights", "1"], "--reward has 'score'; expected file.py"),
        (["--weights", "1"], "--weights is [1.0]; expected 2 numbers other than 0"),
        (["--method", "full"], "--method is full; expected lora, dora or lokr"),
        (["--random-steps", "2"], "--random-steps is 2; expected 1 to 1"),
        (["--groups", "3"], f"--groups is 3; expected at most 2, the prompts of {prompts}"),
        (["--updates", "2"], "--updates is 2; expected at most reward.groups, 1"),
    ):
        output.unlink(missing_ok=True)
        assert main([*words, *extra]) == 2, extra
        assert expected in capsys.readouterr().err
