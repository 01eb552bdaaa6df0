"""Chapter two: what `clap_ppo.py` claims, tried out. Read it after the script, from top to bottom.

    pytest test_clap_ppo.py                 # nearly everything, about four minutes, two cores
    pytest test_clap_ppo.py -k clipping     # one chapter, by a word in its tests' names
    pytest test_clap_ppo.py -m slow         # full-size CLAP, killed processes: three more minutes
    pytest test_clap_ppo.py -m soak         # 30 kills of the real process

A claim about a sampler, a loss or a reward is worth what an independent reference says of it. So
the sampler is held against diffusers' own DDIM step, the densities against torch.distributions,
the gradients against REINFORCE written by hand, and the finished adapter against a pipeline that
has never heard of this script. Where a model is needed for the argument only, `Painter` is it: a
network of one matrix, small enough that every number can be foreseen. Where the real classes are
the point, it is the bundled toy world, with budgets of seconds.

    1  a denoising step is a Gaussian policy          7  nothing is lost: resume, bad input
    2  replaying a trajectory gives ratio 1           8  the promises on the box
    3  the reward                                     9  hear it: the page
    4  the advantage                                 10  real models
    5  what clipping does, case by case              11  kill it, starve it, feed it nonsense
    6  all of it learns                              12  every number has an owner

CLAP_PPO_TOY=DIR tries another toy world of the same layout than `samples/toy`.
"""

import argparse
import ast
import copy
import dataclasses
import doctest
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")     # read once, when huggingface_hub is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributions import Normal, kl_divergence  # noqa: E402

import clap_ppo  # noqa: E402
from clap_ppo import UserError  # noqa: E402

HERE = Path(__file__).resolve().parent
TOY = Path(os.environ["CLAP_PPO_TOY"]) if "CLAP_PPO_TOY" in os.environ else None
TOY_FLAGS = [] if TOY is None else [
    "--model", str(TOY / "pipeline"), "--clap", str(TOY / "clap.pt"), "--judge", str(TOY / "judge")]
TINY = ["--prompts-per-epoch", "2", "--clips-per-prompt", "4", "--num-steps", "5", "--epochs", "3",
        "--updates-per-epoch", "2", "--passes", "1", "--noise-window", "2", "--noise-until", "1",
        "--eval-noises", "2", "--micro-batch", "8", "--device", "cpu"]
TRAIN_PROMPTS = ["birds chirp", "water flows", "snoring", "a dog is barking then talking"]
HELD_OUT = ["a lion roaring", "wind blowing", "a man snores while leaves rustling"]


# =================================================================================================
# 0. The cast
# =================================================================================================

def make_scheduler(**changes):
    """AudioLDM's DDIM scheduler, or one with other settings."""
    from diffusers import DDIMScheduler
    settings = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear",
                    clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return DDIMScheduler(**{**settings, **changes})


class Painter(nn.Module):
    """The smallest network that is a policy: the exact noise prediction for data that is N(0, I),
    sqrt(1 - alpha_bar_t) x_t, plus a shift that depends on the prompt. `to_q` is the name that
    LoRA looks for. Latents are (2, 2, 4), so D = 16."""

    SHAPE = (2, 2, 4)

    def __init__(self, prompts: int):
        super().__init__()
        self.alpha_bar = make_scheduler().alphas_cumprod
        self.to_q = nn.Linear(prompts, math.prod(self.SHAPE), bias=False)
        self.to_q.weight.data = 0.3 * torch.randn(self.to_q.weight.shape, generator=seeded(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, latents, timesteps, class_labels, encoder_hidden_states=None):
        noise_share = (1 - self.alpha_bar[timesteps]).sqrt().reshape(-1, 1, 1, 1)
        shift = self.dropout(self.to_q(class_labels)).reshape(latents.shape)
        return SimpleNamespace(sample=noise_share * latents + shift)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def painter_policy(num_steps=10, prompts=2, scheduler=None, adapter_noise=0.0, **changes):
    """(policy, LoRA weights) of a Painter; `adapter_noise` moves the adapter away from the base."""
    unet = Painter(prompts)
    torch.manual_seed(2)
    weights = clap_ppo.add_lora(unet, 4)
    for weight in weights:
        weight.data += adapter_noise * torch.randn(weight.shape, generator=seeded(3))
    condition = {"class_labels": torch.eye(prompts), "encoder_hidden_states": None}
    nothing = {"class_labels": torch.full((prompts, prompts), 0.1), "encoder_hidden_states": None}
    policy = clap_ppo.Policy(
        unet=unet, schedule=clap_ppo.ddim_schedule(scheduler or make_scheduler(), num_steps),
        prediction_type="epsilon", condition=condition, uncondition=nothing, guidance_scale=1.0,
        latent_shape=Painter.SHAPE, micro_batch=64, dtype=torch.float32)
    return dataclasses.replace(policy, **changes), weights


def config(*flags: str) -> clap_ppo.Config:
    """The Config of a tiny command line; a prompt file is named, never read."""
    return clap_ppo.parse_args(["--prompts", "unread.txt", *TOY_FLAGS, *TINY, *flags])[0]


def roll(policy, cfg, starts=(1, 3), ids=(0, 1), seed=0):
    """A rollout of two groups whose noise windows begin at different steps."""
    return clap_ppo.rollout(policy, torch.tensor(ids), torch.tensor(starts), cfg, seeded(seed))


def new_state() -> dict:
    """What `train` starts from when there is no checkpoint."""
    return {"epoch": 0, "updates": 0, "best": {}, "average": {}, "metrics": []}


def moved(rows: dict, clip_count: int) -> torch.Tensor:
    """Some advantages (R,), one per clip, handed to each of its rows."""
    return torch.linspace(-1, 1, clip_count)[rows["clip"]]


def module(name: str):
    """samples/NAME.py as a module."""
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location(name, HERE / f"samples/{name}.py")
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    """A training file with the held-out file beside it, where the script looks for it."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("# four\n\n" + "\n".join(TRAIN_PROMPTS) + "\n")
    (folder / "eval_prompts.txt").write_text("\n".join(HELD_OUT) + "\n")
    return folder / "prompts.txt"


@pytest.fixture(scope="session")
def world(prompt_file):
    """The toy world, loaded once, with guidance. Tests leave it as they found it."""
    return clap_ppo.load_world(config("--prompts", str(prompt_file), "--guidance-scale", "2.5"))


@pytest.fixture(scope="session")
def clap(world):
    """The toy reward model."""
    return clap_ppo.load_clap(world.cfg.clap, world.pipeline.tokenizer)


NETWORK_CUT = """
import socket, sys
def refuse(*args, **kwargs):
    open(LOG, "a").write(repr(args[1:]) + "\\n")
    raise OSError("the network is cut in this test")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = socket.gethostbyname = refuse
import clap_ppo
sys.exit(clap_ppo.main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def finished_run(prompt_file, tmp_path_factory):
    """One whole run from the command line, guided, in a process whose network is cut.

    HF_HUB_OFFLINE is *not* set there and the cache is empty: whatever wants to fetch will try, and
    be noted. (Raising alone would prove nothing, since the hub's client swallows such errors.)
    """
    folder = tmp_path_factory.mktemp("runs")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"PYTHONPATH": str(HERE), "HF_HOME": str(folder / "empty-cache")}
    flags = ["--prompts", str(prompt_file), *TOY_FLAGS, *TINY, "--guidance-scale", "2.5",
             "--learning-rate", "0.02", "--warmup-updates", "0", "--out", str(folder / "run")]
    done = subprocess.run(
        [sys.executable, "-c", f"LOG = {str(folder / 'network.log')!r}{NETWORK_CUT}", *flags],
        env=env, cwd=folder, capture_output=True, text=True)
    return SimpleNamespace(
        code=done.returncode, out=done.stdout, err=done.stderr, folder=folder / "run",
        network=folder / "network.log",
        metrics=[json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
        if done.returncode == 0 else [])


# =================================================================================================
# 1. A denoising step is a Gaussian policy
# =================================================================================================

SCHEDULES = [dict(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one,
                  prediction_type=prediction)
             for spacing, offset, to_one, prediction in itertools.product(
                 ("leading", "trailing", "linspace"), (0, 1), (True, False),
                 ("epsilon", "v_prediction"))]


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("num_steps", [10, 7])
@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
def test_a_step_and_its_log_prob_agree_with_diffusers_and_torch(settings, num_steps, eta):
    """diffusers draws x_{t-1}; we name the Gaussian it was drawn from. With the same noise both
    must land on the same x_{t-1}, at every step of every kind of schedule, and the density there
    must be torch's. Seven steps do not divide 1000, which is where a formula for the previous
    timestep goes wrong. Where the last step has sigma 0, x_{t-1} is certain and has no density:
    asking for one must fail rather than return infinity."""
    scheduler = make_scheduler(**settings)
    schedule = clap_ppo.ddim_schedule(scheduler, num_steps)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    for step, t in enumerate(scheduler.timesteps):
        latents, output, noise = torch.randn(3, 2, 4, 3, 5, generator=seeded(step))
        a_t, a_prev = schedule.alpha_bar_t[step], schedule.alpha_bar_prev[step]
        sigma = clap_ppo.ddim_sigma(a_t, a_prev, eta)
        mean = clap_ppo.ddim_mean(output, latents, a_t, a_prev, sigma, settings["prediction_type"])
        theirs = scheduler.step(output, t, latents, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + sigma * noise, theirs, rtol=2e-5, atol=2e-5)
        if sigma == 0:
            assert step == num_steps - 1
            with pytest.raises(ValueError, match="sigma is 0"):
                clap_ppo.gaussian_log_prob(theirs, mean, sigma)
            continue
        log_prob = clap_ppo.gaussian_log_prob(theirs, mean, sigma)
        reference = Normal(mean, sigma).log_prob(theirs).flatten(1).mean(dim=1)
        torch.testing.assert_close(log_prob, reference, rtol=1e-5, atol=1e-5)


def test_without_eta_there_is_no_noise_and_eta_scales_it():
    """sigma is linear in eta, and each row may have its own eta: that is what a noise window is."""
    a_t, a_prev = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.8, 0.8, 0.8])
    sigma = clap_ppo.ddim_sigma(a_t, a_prev, torch.tensor([0.0, 0.5, 1.0]))
    full = math.sqrt((1 - 0.8) / (1 - 0.5) * (1 - 0.5 / 0.8))      # DDIM's Eq. 16 by hand
    torch.testing.assert_close(sigma, torch.tensor([0.0, 0.5 * full, full]))


def test_the_log_prob_is_a_mean_so_a_larger_latent_changes_nothing():
    """exp(difference of sums) over D = 16,384 elements overflows after one update. With the mean,
    one value repeated a thousand times has the log-prob of one value."""
    x, mean, sigma = torch.tensor([[0.3, -1.2]]), torch.tensor([[0.1, 0.4]]), torch.tensor([0.7])
    one = clap_ppo.gaussian_log_prob(x, mean, sigma)
    many = clap_ppo.gaussian_log_prob(x.repeat(1, 1000), mean.repeat(1, 1000), sigma)
    torch.testing.assert_close(one, many)
    by_hand = sum(-0.5 * (d / 0.7) ** 2 - math.log(0.7) - 0.5 * math.log(2 * math.pi)
                  for d in (0.2, -1.6)) / 2
    assert one.item() == pytest.approx(by_hand, abs=1e-6)


def test_each_row_has_its_own_sigma_and_one_zero_among_them_is_refused():
    """A table of rows mixes steps, so sigma is a column; a single step without noise spoils it."""
    x, sigma = torch.zeros(3, 2, 2), torch.tensor([0.5, 1.0, 2.0])
    log_prob = clap_ppo.gaussian_log_prob(x, x, sigma)
    torch.testing.assert_close(log_prob, -sigma.log() - 0.5 * math.log(2 * math.pi))
    with pytest.raises(ValueError, match="sigma is 0"):
        clap_ppo.gaussian_log_prob(x, x, torch.tensor([0.5, 0.0, 2.0]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_half_precision_goes_in_and_float32_comes_out(prediction_type):
    """A ratio is clipped at 1e-4; bfloat16 has steps of 4e-3. So rounding may happen in the network
    and nowhere else: the result is the one of the same numbers written in float32."""
    latents, output = torch.randn(2, 2, 4, 3, 5, generator=seeded(0)).bfloat16()
    numbers = torch.tensor([0.5, 0.6]), torch.tensor([0.8, 0.9]), torch.tensor([0.2, 0.1])
    mean = clap_ppo.ddim_mean(output, latents, *numbers, prediction_type)
    assert mean.dtype == torch.float32
    exact = clap_ppo.ddim_mean(output.float(), latents.float(), *numbers, prediction_type)
    assert torch.equal(mean, exact)


def test_a_network_that_predicts_something_else_is_refused():
    """Treating a prediction of x_0 as one of noise would train, and train nonsense."""
    with pytest.raises(ValueError, match="sample.*epsilon"):
        clap_ppo.ddim_mean(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 0.5, 0.8, 0.1, "sample")


class Ledger(nn.Module):
    """A network that notes its calls and whose output is known: latents + labels + t / 1000."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, latents, timesteps, class_labels, encoder_hidden_states):
        assert encoder_hidden_states is None
        self.batches.append(len(latents))
        rows = class_labels + timesteps[:, None] / 1000
        return SimpleNamespace(sample=latents + rows[:, :, None, None])


def test_guidance_goes_from_the_unconditional_prediction_past_the_conditional_one():
    """uncond + scale * (cond - uncond): at scale 3 and predictions 1 and 2 it is 4. The other
    order, or the other sign, steers away from the prompt and still sounds like something."""
    unet, latents = Ledger(), torch.randn(2, 1, 2, 2, generator=seeded(0))
    cond = {"class_labels": torch.tensor([[2.0], [5.0]]), "encoder_hidden_states": None}
    uncond = {"class_labels": torch.tensor([[1.0], [1.0]]), "encoder_hidden_states": None}
    t = torch.tensor([500, 250])
    guided = clap_ppo.guided_prediction(unet, latents, t, cond, uncond, 3.0)
    expected = torch.tensor([1 + 3 * (2 - 1) + 0.500, 1 + 3 * (5 - 1) + 0.250]).view(2, 1, 1, 1)
    torch.testing.assert_close(guided, latents + expected)
    assert unet.batches == [4], "both halves in one call"


def test_guidance_of_one_skips_the_unconditional_pass():
    """At scale 1 the unconditional prediction cancels out, so it is not computed: half the cost."""
    unet, latents = Ledger(), torch.zeros(2, 1, 2, 2)
    cond = {"class_labels": torch.tensor([[2.0], [5.0]]), "encoder_hidden_states": None}
    guided = clap_ppo.guided_prediction(unet, latents, torch.tensor([0, 0]), cond, {}, 1.0)
    torch.testing.assert_close(guided[:, 0, 0, 0], torch.tensor([2.0, 5.0]))
    assert unet.batches == [2]


def naive_rollout(policy, scheduler, starts, cfg, generator):
    """What a rollout means, clip by clip, with diffusers' own scheduler and no cleverness: (latents
    (B, C, H, W), {(clip, step): (x_t, x_{t-1})}). Only the order in which noise is drawn is shared
    with the script: starting noises first, then at each step one block for the noisy clips."""
    group = [g for g in range(len(starts)) for _ in range(cfg.clips_per_prompt)]
    size = len(starts) if cfg.shared_noise else len(group)
    noise = torch.randn(size, *policy.latent_shape, generator=generator)
    clips = [noise[g if cfg.shared_noise else c] for c, g in enumerate(group)]
    scheduler.set_timesteps(cfg.num_steps)
    visited = {}
    for step, t in enumerate(scheduler.timesteps):
        noisy = [c for c, g in enumerate(group) if starts[g] <= step < starts[g] + cfg.window]
        block = dict(zip(noisy, torch.randn(len(noisy), *policy.latent_shape, generator=generator)))
        for c, g in enumerate(group):
            x = clips[c][None]
            with torch.no_grad():
                out = policy.unet(x, t[None], policy.condition["class_labels"][g:g + 1]).sample
                empty = policy.unet(x, t[None], policy.uncondition["class_labels"][g:g + 1]).sample
            out = empty + policy.guidance_scale * (out - empty)
            eta, draw = (cfg.eta, block[c][None]) if c in block else (0.0, torch.zeros_like(x))
            clips[c] = scheduler.step(out, t, x, eta=eta, variance_noise=draw).prev_sample[0]
            visited[c, step] = (x[0], clips[c])
    return torch.stack(clips), visited


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("flags, starts", [
    (["--noise-window", "2"], (1, 3)),
    (["--noise-window", "1", "--eta", "0.5"], (0, 5)),
    (["--noise-window", "all"], (0, 0)),
    (["--noise-window", "2", "--no-shared-noise"], (1, 3)),
    (["--noise-window", "all", "--no-shared-noise"], (0, 0)),
], ids=["window", "short-window", "all", "own-noise", "textbook"])
def test_a_rollout_is_what_a_naive_loop_over_diffusers_scheduler_gives(flags, starts, guidance):
    """The trunk walked once per group, the batching by step, the micro-batches: all of it is speed.
    What comes out is what a loop over single clips gives, and the table says what happened."""
    cfg = config("--num-steps", "7", *flags)
    policy, _ = painter_policy(7, guidance_scale=guidance, micro_batch=3, adapter_noise=0.2)
    latents, rows = roll(policy, cfg, starts)
    expected, visited = naive_rollout(policy, make_scheduler(), starts, cfg, seeded(0))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    for clip, step, x, following in zip(rows["clip"].tolist(), rows["step"].tolist(),
                                        rows["latents"], rows["next_latents"]):
        torch.testing.assert_close(x, visited[clip, step][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(following, visited[clip, step][1], rtol=1e-4, atol=1e-5)


# =================================================================================================
# 2. Replaying a trajectory gives ratio 1
# =================================================================================================

def test_the_clips_of_a_group_share_their_starting_noise_and_their_path_to_the_window():
    """x_T is not the policy's doing, so within a group it is the same: what tells the clips of a
    group apart afterwards is what the policy did in the window. Groups share nothing."""
    cfg, (policy, _) = config("--num-steps", "10"), painter_policy(10)
    _, rows = roll(policy, cfg, starts=(0, 3))
    first, second = (rows["latents"][(rows["step"] == step) & (rows["prompt_id"] == prompt)]
                     for step, prompt in ((0, 0), (3, 1)))
    for group in (first, second):
        assert len(group) == 4
        assert (group - group[:1]).abs().max() == 0
    after = rows["next_latents"][rows["step"] == 0]
    assert (after[1:] - after[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    same_start = rows["latents"][(rows["step"] == 0)][0]
    assert (same_start - roll(policy, cfg, starts=(0, 0))[1]["latents"][4]).abs().max() > 0.01


def test_without_shared_noise_every_clip_starts_alone():
    """--no-shared-noise is textbook DDPO: the luck of x_T is back in the advantage."""
    policy, _ = painter_policy(10)
    _, rows = roll(policy, config("--num-steps", "10", "--no-shared-noise"), starts=(0, 0))
    start = rows["latents"][rows["step"] == 0].flatten(1)
    assert len(start) == 8
    assert torch.pdist(start).min() > 0.01


@pytest.mark.parametrize("window, starts, expected", [
    ("2", (1, 3), {(c, s) for c in range(4) for s in (1, 2)} | {(c, s) for c in range(4, 8)
                                                                for s in (3, 4)}),
    ("1", (0, 5), {(c, 0) for c in range(4)} | {(c, 5) for c in range(4, 8)}),
    ("all", (0, 0), {(c, s) for c in range(8) for s in range(6)}),
])
def test_the_table_holds_each_noisy_step_of_each_clip_once_and_never_the_last(
        window, starts, expected):
    """Of seven steps, 0 to 6, the last is sampled but not trained: its sigma is so small that its
    log-prob is mostly rounding. Steps without noise have no log-prob at all."""
    policy, _ = painter_policy(7)
    _, rows = roll(policy, config("--num-steps", "7", "--noise-window", window), starts)
    pairs = list(zip(rows["clip"].tolist(), rows["step"].tolist()))
    assert len(pairs) == len(expected)
    assert set(pairs) == expected
    assert rows["prompt_id"].tolist() == [c // 4 for c, _ in pairs]
    assert all(len(column) == len(pairs) for column in rows.values())


def test_the_recorded_log_prob_is_that_of_the_recorded_tensors():
    """A row is evidence: from its x_t and its step anybody can compute the Gaussian again, and find
    the density of its x_{t-1} under it. The network may run in bfloat16; the row is float32."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-4)):
        policy, _ = painter_policy(10, adapter_noise=0.2, dtype=dtype)
        cfg = config("--num-steps", "10", "--eta", "0.7")
        _, rows = roll(policy, cfg)
        assert {rows[k].dtype for k in ("latents", "next_latents", "log_prob")} == {torch.float32}
        log_prob, mean, sigma = clap_ppo.replay(policy, rows, torch.arange(len(rows["clip"])), cfg)
        reference = Normal(mean, sigma.view(-1, 1, 1, 1)).log_prob(rows["next_latents"])
        for again in (log_prob, reference.mean(dim=(1, 2, 3))):
            torch.testing.assert_close(again, rows["log_prob"], rtol=0, atol=tolerance)


def test_outside_the_window_and_without_noise_the_path_is_plain_ddim():
    """With eta near 0 a rollout is the deterministic sampler that evaluation uses, from the same
    starting noise; so what is learned in rollouts is learned for evaluation."""
    policy, _ = painter_policy(10)
    cfg = config("--num-steps", "10", "--eta", "0.001")
    latents, rows = roll(policy, cfg, starts=(0, 0))
    start, ids = (rows[k][rows["step"] == 0] for k in ("latents", "prompt_id"))
    plain = clap_ppo.sample(policy, ids, start)
    torch.testing.assert_close(latents, plain, rtol=0, atol=0.01)
    noisy, _ = roll(policy, config("--num-steps", "10", "--eta", "1"), starts=(0, 0))
    assert (noisy - plain).abs().max() > 0.1


def test_the_bundled_model_replays_its_rollout_with_ratio_one(world):
    """The real U-Net, guided, rolled out in batches of 8 and replayed in batches of 3: the ratio
    may differ from 1 by float32 rounding of another batch shape, and by nothing else."""
    _, rows = roll(world.policy, world.cfg, starts=(0, 2))
    everything = torch.arange(len(rows["clip"]))
    with torch.no_grad():
        log_prob = torch.cat([clap_ppo.replay(world.policy, rows, at, world.cfg)[0]
                              for at in everything.split(3)])
    ratio = (log_prob - rows["log_prob"]).exp()
    assert clap_ppo.check_on_policy(world.policy, rows, everything, ratio, world.cfg) <= 1e-6


def test_every_epoch_of_a_run_begins_with_ratio_one(finished_run):
    """The check is made in every epoch and its result logged, to 1e-6 in float32."""
    assert finished_run.code == 0, finished_run.err
    assert [row["epoch"] for row in finished_run.metrics] == [1, 2, 3]
    for row in finished_run.metrics:
        assert 0 <= row["ratio_error"] <= 1e-6
        assert row["approx_kl"] > 0, "and the update moved the policy"


def update_once(policy, rows, cfg, seed=0, optimizer=None, advantages=None, done=0):
    """`update` with an optimizer whose step is proportional to the gradient: nothing is hidden."""
    weights = [p for p in policy.unet.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(weights, lr=cfg.learning_rate)
    advantages = moved(rows, cfg.clips_per_epoch) if advantages is None else advantages
    rows = {**rows, "advantage": advantages}
    return clap_ppo.update(policy, optimizer, rows, cfg, done, seeded(seed))


@pytest.mark.parametrize("fault, cause", [
    ("dropout", "training mode.*dropout"), ("next step", r"timestep.*\+1"),
    ("previous step", "timestep.*-1"), ("halves", "halves are swapped"),
    ("weights", "cause unknown")])
def test_a_broken_replay_stops_the_run_and_names_the_cause(world, fault, cause):
    """If nothing was learned since the rollout and the ratio is not 1, PPO would optimise an error.
    Four errors that have happened to people, committed on purpose between rollout and update; and a
    fifth that the check cannot know, which it admits."""
    policy, cfg = copy.deepcopy(world.policy), world.cfg
    _, rows = roll(policy, cfg, starts=(1, 2))
    if fault == "dropout":
        policy.unet.conv_out = nn.Sequential(nn.Dropout(0.1), policy.unet.conv_out).train()
    elif fault.endswith("step"):
        rows["step"] = rows["step"] + (1 if fault == "next step" else -1)
    elif fault == "halves":
        def swap(module, args, kwargs):
            halves = kwargs["class_labels"].chunk(2)
            return args, {**kwargs, "class_labels": torch.cat(halves[::-1])}
        policy.unet.register_forward_pre_hook(swap, with_kwargs=True)
    else:
        policy.unet.conv_out.bias.data += 0.5
    with pytest.raises(UserError, match=f"on-policy.*{cause}"):
        update_once(policy, rows, cfg)


def test_the_check_names_the_cause_when_the_last_step_has_no_noise_too():
    """While it tries other timesteps it meets a step with sigma 0. That is no reason to fail with
    another message than the one it was going to give."""
    policy, _ = painter_policy(5, scheduler=make_scheduler(set_alpha_to_one=True))
    cfg = config("--num-steps", "5")
    _, rows = roll(policy, cfg, starts=(0, 2))
    policy.unet.to_q.base_layer.weight.data += 0.5
    with pytest.raises(UserError, match="on-policy.*cause unknown"):
        update_once(policy, rows, cfg)


# =================================================================================================
# 3. The reward
# =================================================================================================

def tone(hz: float, sample_rate: int, seconds: float = 2.0) -> torch.Tensor:
    """A tone with two overtones (1, samples): something that has a pitch."""
    t = torch.arange(int(seconds * sample_rate)) / sample_rate
    return sum(0.3 / k * torch.sin(2 * math.pi * k * hz * t) for k in (1, 2, 3))[None]


def noises(count: int, samples: int) -> torch.Tensor:
    """Different clips (count, samples): noise of rising strength, each with its own tone in it."""
    strength = torch.linspace(0.01, 0.3, count)[:, None]
    tones = torch.cat([tone(200 + 60 * i, 16000, samples / 16000) for i in range(count)])
    return tones + strength * torch.randn(count, samples, generator=seeded(5))


@pytest.mark.parametrize("seconds", [1.0, 2.56, 7.3], ids=["short", "fits", "too-long"])
def test_a_clip_scores_the_same_alone_in_any_batch_and_twice(clap, seconds):
    """The package crops clips that are too long at random, so the same clip scored differently from
    call to call and an advantage measured dice. Ours is a function of clip and prompt alone."""
    clips = noises(35, int(seconds * 16000))
    prompts = [TRAIN_PROMPTS[i % 4] for i in range(35)]
    together = clap_ppo.clap_reward(clap, clips, 16000, prompts)
    assert together.shape == (35,) and together.abs().max() <= 1
    assert torch.equal(together, clap_ppo.clap_reward(clap, clips, 16000, prompts))
    for i in (0, 17, 34):
        alone = clap_ppo.clap_reward(clap, clips[i:i + 1], 16000, prompts[i:i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    assert together.std() > 0, "and it is not a constant"


def test_long_clips_keep_their_beginning_and_short_ones_repeat_whole():
    """`fit_length` by hand; then through the model, at its own rate: what lies behind its window
    does not count, and what lies in it does."""
    clip = torch.tensor([[1.0, 2.0, 3.0]])
    assert clap_ppo.fit_length(clip, 7).tolist() == [[1, 2, 3, 1, 2, 3, 0]]
    assert clap_ppo.fit_length(clip, 5).tolist() == [[1, 2, 3, 0, 0]]
    assert clap_ppo.fit_length(clip, 3).tolist() == [[1, 2, 3]]
    assert clap_ppo.fit_length(clip, 2).tolist() == [[1, 2]]


def test_what_lies_behind_the_models_window_does_not_count(clap):
    """The same, through the model and at its own sample rate."""
    rate, window = clap.audio_cfg.sample_rate, clap.audio_cfg.clip_samples
    long = noises(1, 2 * window)
    whole = clap_ppo.clap_audio_embeds(clap, long, rate)
    torch.testing.assert_close(whole, clap_ppo.clap_audio_embeds(clap, long[:, :window], rate),
                               rtol=0, atol=1e-5)
    other = clap_ppo.clap_audio_embeds(clap, long[:, window:] * 0.1, rate)
    assert (whole - other).abs().max() > 1e-3


def test_the_sample_rate_matters(clap):
    """A tone recorded at 44.1 kHz is the same tone. Declared as 16 kHz it would be one and a half
    octaves lower and almost three times as long: another sound, and another embedding."""
    same, other = tone(600, clap.audio_cfg.sample_rate), tone(600, 44100)
    reference = clap_ppo.clap_audio_embeds(clap, same, clap.audio_cfg.sample_rate)
    right = clap_ppo.clap_audio_embeds(clap, other, 44100)
    wrong = clap_ppo.clap_audio_embeds(clap, other, 16000)
    assert (reference - right).norm() < 0.25 * (reference - wrong).norm()


@pytest.mark.parametrize("sample_rate", [16, 16.0, 44.1, 0, 10 ** 6, None, "16000"])
def test_a_sample_rate_that_no_audio_has_is_refused(clap, sample_rate):
    """16 is kHz. CLAP would resample to that, answer without complaint, and wrongly."""
    with pytest.raises(ValueError, match="sample_rate"):
        clap_ppo.clap_reward(clap, torch.zeros(1, 4000), sample_rate, ["snoring"])


@pytest.mark.parametrize("shape", [(4000,), (1, 1, 4000)])
def test_waveforms_of_another_shape_or_of_integers_are_refused(clap, shape):
    """(samples,) would be read as that many clips of one sample; int16 as 30,000 times too loud."""
    with pytest.raises(ValueError, match="waveforms"):
        clap_ppo.clap_reward(clap, torch.zeros(shape), 16000, ["snoring"])
    with pytest.raises(ValueError, match="waveforms"):
        clap_ppo.clap_reward(clap, torch.zeros(1, 4000, dtype=torch.int16), 16000, ["snoring"])


def test_each_clip_is_scored_against_its_own_prompt(clap):
    """Rewards of a list of prompts are those of the single prompts, whatever else was asked before
    (text embeddings are kept) and however often a prompt stands in the list."""
    clips, prompts = noises(4, 16000), ["snoring", "talking", "snoring", "wind blowing"]
    together = clap_ppo.clap_reward(clap, clips, 16000, prompts)
    audio = clap_ppo.clap_audio_embeds(clap, clips, 16000)
    torch.testing.assert_close(audio.norm(dim=1), torch.ones(4))
    for i, prompt in enumerate(prompts):
        tokens = clap.tokenizer(prompt, padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt")
        text = torch.nn.functional.normalize(clap.get_text_embedding(dict(tokens))[0], dim=0)
        assert together[i].item() == pytest.approx((audio[i] @ text).item(), abs=1e-5)


@pytest.fixture
def checkpoint(world, tmp_path):
    """Writes a CLAP checkpoint the way the official ones were written, with changes; the path."""
    sizes = json.loads(Path(world.cfg.clap).with_suffix(".json").read_text())
    model = clap_ppo.build_clap(sizes)

    def write(change=lambda state: None):
        state = {f"module.{k}": v for k, v in model.state_dict().items()}
        state["module.text_branch.embeddings.position_ids"] = torch.arange(10)[None]
        change(state)
        torch.save({"epoch": 7, "name": "official", "best": np.float64(0.5), "state_dict": state,
                    "args": argparse.Namespace(lr=0.1)}, tmp_path / "clap.pt")
        (tmp_path / "clap.json").write_text(json.dumps(sizes))
        return str(tmp_path / "clap.pt"), model

    return write


def test_a_checkpoint_in_the_official_format_loads_whole(checkpoint, world):
    """The published files come from a DataParallel training ("module."), from an older transformers
    (position_ids), and were pickled with a numpy scalar and the command line's Namespace."""
    path, model = checkpoint()
    loaded = clap_ppo.load_clap(path, world.pipeline.tokenizer).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())


WEIGHT = "module.audio_projection.0.weight"


@pytest.mark.parametrize("change, complaint", [
    (lambda state: state.pop(WEIGHT), "audio_projection.0.weight is missing"),
    (lambda state: state.update({"module.extra.weight": torch.ones(1)}), "extra.weight is unknown"),
    (lambda state: state.update({WEIGHT: torch.ones(3, 3)}),
     "audio_projection.0.weight has another size"),
], ids=["missing", "unexpected", "wrong-size"])
def test_a_weight_that_does_not_fit_is_named(checkpoint, world, change, complaint):
    """load_state_dict(strict=False) would leave such a weight random and score with it."""
    path, _ = checkpoint(change)
    with pytest.raises(UserError, match=complaint):
        clap_ppo.load_clap(path, world.pipeline.tokenizer)


class Malice:
    """Unpickled without restriction, it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("save", [
    torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))], ids=["zip", "pickle"])
def test_a_malicious_checkpoint_does_not_run(checkpoint, world, tmp_path, save):
    """A .pt file is a program. Only tensors and an explicit list of harmless types are let in."""
    path, _ = checkpoint()
    save({"state_dict": {}, "gift": Malice(tmp_path / "pwned")}, Path(path))
    with pytest.raises(UserError, match="not a checkpoint of weights"):
        clap_ppo.load_clap(path, world.pipeline.tokenizer)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x04garbage", None])
def test_a_file_that_is_no_checkpoint_is_refused(checkpoint, world, content):
    """Also one that torch can load, but that holds a list."""
    path, _ = checkpoint()
    Path(path).write_bytes(content) if content is not None else torch.save([1, 2], path)
    with pytest.raises(UserError, match="--clap .*not a checkpoint"):
        clap_ppo.load_clap(path, world.pipeline.tokenizer)


def test_a_tokenizer_without_vocabulary_is_noticed(world):
    """Offline, transformers can hand out a tokenizer that maps every prompt to the same few tokens.
    Every reward would then be of the same prompt, and nothing would look wrong."""
    real = world.pipeline.tokenizer

    def empty(prompts, **kwargs):
        return real(["wind" for _ in prompts], **kwargs)

    with pytest.raises(UserError, match="tokenizer"):
        clap_ppo.load_clap(world.cfg.clap, empty)


def test_a_whole_run_asks_nothing_of_the_network(finished_run):
    """CLAP built, loaded, trained against, evaluated, with no connection attempted."""
    assert finished_run.code == 0, finished_run.err
    assert not finished_run.network.exists(), finished_run.network.read_text()


def test_a_reward_of_five_lines_takes_claps_place(prompt_file, tmp_path):
    """Any function (waveforms, sample_rate, prompts) -> (N,) is a reward. This one likes loud."""
    def loudness(waveforms, sample_rate, prompts):
        assert waveforms.shape == (8, round(2.56 * sample_rate)) and sample_rate == 16000
        assert [prompts[i:i + 4] for i in (0, 4)] == [[prompts[0]] * 4, [prompts[4]] * 4]
        asked.append(10 * waveforms.square().mean(dim=1).log10())
        return asked[-1]

    asked = []
    mine = clap_ppo.load_world(config("--prompts", str(prompt_file), "--epochs", "1",
                                      "--judge-every", "0"))
    mine.reward = loudness
    clap_ppo.train(mine, tmp_path, new_state())
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["reward"] == pytest.approx(asked[0].mean().item(), rel=1e-5)


# =================================================================================================
# 4. The advantage
# =================================================================================================

def test_an_advantage_says_how_much_better_a_clip_is_than_its_siblings():
    """By hand: rewards 0, 1, 1, 2 have mean 1 and standard deviation sqrt(1/2). Integers will do:
    a reward may be a count of stars."""
    advantages = clap_ppo.group_advantages(torch.tensor([[0, 1, 1, 2]]))
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor([[-math.sqrt(2), 0.0, 0.0, math.sqrt(2)]]))


def test_prompts_do_not_compete():
    """Every clip of the easy prompt beats every clip of the hard one. With one mean for all, the
    hard prompt's best clip would be punished; per prompt, both groups say the same thing."""
    hard, easy = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.7, 0.8, 0.9])
    advantages = clap_ppo.group_advantages(torch.stack([hard, easy]))
    torch.testing.assert_close(advantages[0], advantages[1], rtol=1e-4, atol=1e-4)
    assert advantages[0, 2] > 1
    wide = clap_ppo.group_advantages(torch.stack([hard, 10 * easy]))
    torch.testing.assert_close(wide, advantages, rtol=1e-4, atol=1e-4)


def test_an_outlier_is_clipped():
    """One of 101 clips that is better than all others stands 10 deviations off; 5 is enough."""
    rewards = torch.zeros(1, 101)
    rewards[0, 50] = 1
    assert clap_ppo.group_advantages(rewards)[0, 50] == 5
    assert clap_ppo.group_advantages(-rewards)[0, 50] == -5
    assert clap_ppo.group_advantages(rewards, clip=3.0)[0, 50] == 3
    assert clap_ppo.group_advantages(rewards, clip=20.0)[0, 50] == pytest.approx(10, rel=1e-4)


def test_a_group_without_spread_teaches_nothing():
    """All equal, there is no better or worse; dividing by a spread of 0 would make NaN of it, and
    dividing by a rounding error would make a signal of it."""
    equal = clap_ppo.group_advantages(torch.tensor([[7, 7, 7], [1, 2, 3]]))
    assert equal[0].tolist() == [0, 0, 0] and equal[1, 2] > 1
    thirds = torch.full((1, 16), 1 / 3)
    thirds[0, 0] += 6e-8
    assert clap_ppo.group_advantages(thirds).tolist() == [[0.0] * 16]


@pytest.mark.parametrize("rewards, complaint", [
    (torch.ones(4, 1), "K >= 2"), (torch.ones(4), "K >= 2"), (torch.ones(2, 2, 2), "K >= 2"),
    (torch.tensor([[1, math.nan]]), "not finite"), (torch.tensor([[1, math.inf]]), "not finite")])
def test_rewards_that_cannot_be_compared_are_refused(rewards, complaint):
    """A group of one has no siblings. A NaN would spread over its whole group."""
    with pytest.raises(ValueError, match=complaint):
        clap_ppo.group_advantages(rewards)


# =================================================================================================
# 5. What clipping does, case by case
# =================================================================================================

@pytest.mark.parametrize("advantage, ratio, loss, gradient", [
    (+1, 1.1, -1.1, -1.1),      # good, more likely, within the range: push on
    (+1, 1.5, -1.2, 0.0),       # good, made likely enough: stop
    (+1, 0.5, -0.5, -0.5),      # good, yet less likely: the wrong way, so pull back
    (-1, 0.9, +0.9, +0.9),      # bad, less likely, within the range: push on
    (-1, 0.5, +0.8, 0.0),       # bad, made unlikely enough: stop
    (-1, 1.5, +1.5, +1.5),      # bad, yet more likely: the wrong way, so pull back
    (-2, 1.5, +3.0, +3.0),      # twice as bad: twice the loss, twice the pull
])
def test_clipping_stops_what_went_far_enough_and_nothing_else(advantage, ratio, loss, gradient):
    """The clip range is 0.2, so the ratio may go to 1.2 or 0.8. The gradient is the one on the
    log-prob: of -A * ratio it is -A * ratio again, and of a clipped value it is 0."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    value, info = clap_ppo.ppo_loss(log_prob, torch.zeros(1), torch.tensor([float(advantage)]), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert log_prob.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert info["ratio"].item() == pytest.approx(ratio, rel=1e-5)
    assert not info["ratio"].requires_grad
    assert info["clip_fraction"] == float(abs(ratio - 1) > 0.2)


def test_at_ratio_one_ppo_is_reinforce():
    """Before the first update nothing is clipped and grad ratio = grad log_prob, so the gradient is
    the policy gradient, -mean(A * grad log_prob), for every weight of the adapter."""
    policy, weights = painter_policy(adapter_noise=0.2)
    cfg = config("--num-steps", "10")
    _, rows = roll(policy, cfg)
    advantages, everything = moved(rows, 8), torch.arange(len(rows["clip"]))

    def gradients(loss):
        return torch.autograd.grad(loss, weights)

    log_prob, _, _ = clap_ppo.replay(policy, rows, everything, cfg)
    ppo = gradients(clap_ppo.ppo_loss(log_prob, rows["log_prob"], advantages, 1e-4)[0])
    log_prob, _, _ = clap_ppo.replay(policy, rows, everything, cfg)
    reinforce = gradients(-(advantages * log_prob).mean())
    for ours, theirs in zip(ppo, reinforce):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_loss_is_a_mean_over_rows():
    """So that the learning rate does not depend on how many rows a minibatch has."""
    log_prob, advantages = torch.tensor([0.05, -0.1, 0.3]), torch.tensor([1.0, -1.0, 1.0])
    once = clap_ppo.ppo_loss(log_prob, torch.zeros(3), advantages, 0.2)
    twice = clap_ppo.ppo_loss(log_prob.repeat(2), torch.zeros(6), advantages.repeat(2), 0.2)
    assert once[0].item() == pytest.approx(twice[0].item(), rel=1e-6)
    assert once[0].item() == pytest.approx(
        (-math.exp(0.05) + math.exp(-0.1) - 1.2) / 3, rel=1e-5)
    assert once[1]["clip_fraction"] == pytest.approx(1 / 3)


def test_approx_kl_estimates_the_kl_and_is_never_negative():
    """(ratio - 1) - log ratio, averaged over samples of the old policy. Between N(0, 1) and N(m, 1)
    the KL is m^2 / 2. Each single term is non-negative, the plain -log ratio is not; and at a
    log-ratio of 1e-4 float32 must not lose the 5e-9 that is left."""
    x = torch.randn(200_000, generator=seeded(0))
    old, new = Normal(0.0, 1.0).log_prob(x), Normal(0.3, 1.0).log_prob(x)
    estimate = clap_ppo.ppo_loss(new, old, torch.zeros(len(x)), 0.2)[1]["approx_kl"]
    assert estimate == pytest.approx(0.3 ** 2 / 2, rel=0.02)
    for log_ratio in (-0.5, -1e-4, 0.0, 1e-4, 0.5):
        term = clap_ppo.ppo_loss(torch.tensor([log_ratio]), torch.zeros(1), torch.zeros(1), 0.2)
        exact = math.expm1(log_ratio) - log_ratio
        assert term[1]["approx_kl"] >= 0
        assert term[1]["approx_kl"] == pytest.approx(exact, rel=1e-2, abs=1e-12)


def test_the_kl_to_the_base_is_the_closed_form_of_two_gaussians():
    """Equal sigmas: ||difference of means||^2 / (2 sigma^2), per element as everything here."""
    mean, base = torch.randn(2, 3, 2, 4, 4, generator=seeded(0))
    sigma = torch.tensor([0.3, 1.0, 2.0])
    column = sigma.view(3, 1, 1, 1)
    reference = kl_divergence(Normal(mean, column), Normal(base, column)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(clap_ppo.gaussian_kl(mean, base, sigma), reference)


# =================================================================================================
# 6. All of it learns
# =================================================================================================

@pytest.fixture
def painter_world(monkeypatch):
    """A world of one prompt that likes large latents and one that likes small ones, with a Painter
    as its policy. The "decoder" hands the latents on, so the reward is known in closed form."""
    monkeypatch.setattr(clap_ppo, "decode", lambda pipeline, latents, *rest: latents.flatten(1))

    def make(*flags, learning_rate=0.03):
        cfg = config("--num-steps", "6", "--clips-per-prompt", "8", "--judge-every", "0",
                     "--learning-rate", str(learning_rate), *flags)
        policy, weights = painter_policy(6, micro_batch=cfg.micro_batch)

        def reward(waveforms, sample_rate, prompts):
            sign = torch.tensor([1.0 if p == "up" else -1.0 for p in prompts])
            return sign * waveforms.mean(dim=1)

        return SimpleNamespace(
            cfg=cfg, prompts=["up", "down"], train_ids=[0, 1], held_out_ids=[], pipeline=None,
            sample_rate=16000, reward=reward, judge=None, policy=policy,
            optimizer=torch.optim.AdamW(weights, lr=cfg.learning_rate, weight_decay=0.0))

    return make


def plain_reward(world) -> float:
    """Mean reward of plain DDIM from 64 fixed noises for each prompt."""
    ids = torch.tensor([0, 1]).repeat_interleave(64)
    noise = torch.randn(128, *Painter.SHAPE, generator=seeded(9))
    latents = clap_ppo.sample(world.policy, ids, noise)
    return world.reward(latents.flatten(1), 16000, [world.prompts[i] for i in ids]).mean().item()


@pytest.mark.parametrize("flags", [[], ["--noise-window", "all", "--no-shared-noise"]],
                         ids=["window", "textbook"])
def test_a_small_policy_learns_what_its_prompts_want(painter_world, tmp_path, flags):
    """Through the whole loop, STEP 1 to 6. Nobody differentiates the reward: it is only asked."""
    world = painter_world("--epochs", "30", *flags)
    before = plain_reward(world)
    clap_ppo.train(world, tmp_path, new_state())
    assert plain_reward(world) > before + 0.5


def test_with_the_sign_of_the_advantage_flipped_it_unlearns(painter_world, tmp_path, monkeypatch):
    """The same loop, told that worse is better. A loop that improves either way measures luck."""
    world, ours = painter_world("--epochs", "30"), clap_ppo.group_advantages
    monkeypatch.setattr(clap_ppo, "group_advantages", lambda *args: -ours(*args))
    before = plain_reward(world)
    clap_ppo.train(world, tmp_path, new_state())
    assert plain_reward(world) < before - 0.5


@pytest.fixture
def watched(monkeypatch):
    """What `update` is given in every epoch, and the rewards that led to it."""
    calls, real = [], clap_ppo.update

    def watch(policy, optimizer, rows, cfg, done, generator):
        calls.append(SimpleNamespace(rows=rows, done=done))
        return real(policy, optimizer, rows, cfg, done, generator)

    monkeypatch.setattr(clap_ppo, "update", watch)
    return calls


def watch_rewards(world) -> list:
    asked, real = [], world.reward
    world.reward = lambda *args: asked.append(real(*args)) or asked[-1]
    return asked


def test_every_row_carries_the_advantage_of_its_clip(painter_world, tmp_path, watched):
    """Rows of one clip may stand anywhere in the table; what they carry is their clip's advantage
    among the clips of its own prompt."""
    world = painter_world("--epochs", "2")
    rewards = watch_rewards(world)
    clap_ppo.train(world, tmp_path, new_state())
    for call, reward in zip(watched, rewards):
        expected = clap_ppo.group_advantages(reward.view(2, 8)).flatten()
        torch.testing.assert_close(call.rows["advantage"], expected[call.rows["clip"]])
        assert len(call.rows["advantage"]) == 2 * 8 * 2


@pytest.mark.parametrize("until, expected", [("1", {0, 1, 2, 3}), ("0.5", {0, 1})])
def test_windows_fall_everywhere_in_their_part_of_the_path(
        painter_world, tmp_path, watched, until, expected):
    """With 6 steps and a window of 2, windows begin at 0 to 3: the last step, 5, is never in one.
    --noise-until 0.5 keeps them within the first three steps."""
    world = painter_world("--epochs", "12", "--noise-until", until)
    clap_ppo.train(world, tmp_path, new_state())
    begins = set()
    for call in watched:
        for clip in range(16):
            steps = call.rows["step"][call.rows["clip"] == clip].sort().values.tolist()
            assert len(steps) == 2 and steps[1] == steps[0] + 1
            begins.add(steps[0])
    assert begins == expected


def test_every_epoch_has_its_own_noise_and_a_seed_fixes_it(painter_world, tmp_path, watched):
    """Epochs differ in noise, windows and order of prompts, and no prompt comes twice in one. Equal
    seeds repeat all of it, another seed none; `done` counts the optimizer's steps so far."""
    def first_epochs(count, *flags):
        watched.clear()
        world = painter_world("--epochs", str(count), *flags)
        clap_ppo.train(world, tmp_path, new_state())
        return [call.rows["latents"].sum().item() for call in watched]

    noises = first_epochs(6)
    assert len(set(noises)) == 6
    assert [call.done for call in watched] == [0, 2, 4, 6, 8, 10]
    assert all(call.rows["prompt_id"].unique().tolist() == [0, 1] for call in watched)
    assert first_epochs(1) == noises[:1]
    assert first_epochs(1, "--seed", "1")[0] not in noises


@pytest.mark.parametrize("ema, shares", [
    ("0", [0, 0, 0, 1]), ("0.5", [1 / 8, 1 / 8, 1 / 4, 1 / 2]), ("0.9", [1 / 4] * 4)])
def test_the_saved_adapter_is_an_average_over_epochs(
        painter_world, tmp_path, monkeypatch, ema, shares):
    """--ema 0.5: the last epoch counts for half, the one before for a quarter. As long as there are
    few epochs it is their plain mean, so that the untrained first weights do not linger."""
    after, real = [], clap_ppo.update

    def watch(policy, *args):
        info = real(policy, *args)
        after.append(clap_ppo.adapter_state(policy.unet))
        return info

    monkeypatch.setattr(clap_ppo, "update", watch)
    kept = clap_ppo.train(painter_world("--epochs", "4", "--ema", ema), tmp_path, new_state())
    for name, weight in kept["adapter"].items():
        expected = sum(share * epoch[name] for share, epoch in zip(shares, after))
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(saved["adapter"][k], v) for k, v in after[-1].items())


def test_groups_whose_clips_score_alike_are_left_out(painter_world, tmp_path, watched):
    """"down" gives every clip the same reward here. Its rows would only dilute the gradient."""
    world = painter_world("--epochs", "1")
    real = world.reward
    world.reward = lambda w, rate, prompts: torch.where(
        torch.tensor([p == "up" for p in prompts]), real(w, rate, prompts), torch.tensor(0.25))
    clap_ppo.train(world, tmp_path, new_state())
    rows = watched[0].rows
    assert rows["prompt_id"].tolist() == [0] * 16
    up = rows["advantage"][rows["step"] == rows["step"].min()]
    assert len(up) == 8 and up.mean().abs() < 1e-5 and up.std() > 0.5
    world.reward = lambda w, rate, prompts: torch.full((len(w),), 0.25)
    with pytest.raises(UserError, match="same reward"):
        clap_ppo.train(world, tmp_path, new_state())


def test_a_reward_that_is_not_a_number_stops_the_run_and_names_the_prompt(painter_world, tmp_path):
    """Otherwise it spreads through the advantage into every weight."""
    world = painter_world("--epochs", "1")
    world.reward = lambda w, rate, prompts: torch.tensor(
        [math.nan if p == "down" else 1.0 for p in prompts])
    world.run = tmp_path
    with pytest.raises(UserError, match="'down' has the reward nan.*not-finite.pt"):
        clap_ppo.train(world, tmp_path, new_state())
    saved = torch.load(tmp_path / "not-finite.pt", weights_only=True)
    assert saved["prompt"] == "down" and saved["waveform"].dim() == 1


def test_train_steps_draws_that_many_rows_of_every_clip(painter_world, tmp_path, watched):
    """--train-steps 2 of 5 noisy steps: two rows of each clip, other ones in other clips."""
    world = painter_world("--epochs", "1", "--noise-window", "all", "--train-steps", "2")
    clap_ppo.train(world, tmp_path, new_state())
    rows = watched[0].rows
    pairs = set(zip(rows["clip"].tolist(), rows["step"].tolist()))
    assert len(pairs) == len(rows["clip"]) == 32
    assert torch.bincount(rows["clip"]).tolist() == [2] * 16
    assert len(rows["step"].unique()) == 5


def adapter_copy(policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.unet.parameters() if p.requires_grad]


def test_the_micro_batch_changes_memory_and_speed_but_not_the_result():
    """Gradients of micro-batches add up to the gradient of the minibatch's mean, also when the last
    one is smaller. Plain SGD without a norm limit, because Adam hides a wrong scale."""
    results = []
    for micro_batch in (64, 3, 1):
        cfg = config("--num-steps", "10", "--micro-batch", str(micro_batch), "--passes", "2",
                     "--learning-rate", "0.5", "--max-grad-norm", "0", "--kl-weight", "0.1",
                     "--warmup-updates", "0", "--clip-range", "0.5")
        policy, _ = painter_policy(10, adapter_noise=0.2, micro_batch=micro_batch)
        _, rows = roll(policy, cfg)
        start = adapter_copy(policy)
        info = update_once(policy, rows, cfg)
        results.append((adapter_copy(policy), info))
    assert max((a - b).abs().max() for a, b in zip(start, results[0][0])) > 1e-2
    for weights, info in results[1:]:
        for ours, reference in zip(weights, results[0][0]):
            torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)
        for key in ("loss", "approx_kl", "clip_fraction", "kl_base", "grad_norm"):
            assert info[key] == pytest.approx(results[0][1][key], rel=1e-3, abs=1e-6)


def test_an_update_makes_the_steps_it_was_asked_for_and_raises_good_actions():
    """Two passes in three minibatches are six steps. Afterwards, actions with a positive advantage
    are likelier than they were and the others less likely."""
    cfg = config("--num-steps", "10", "--passes", "2", "--updates-per-epoch", "3",
                 "--learning-rate", "0.2", "--clip-range", "0.5", "--warmup-updates", "0")
    policy, _ = painter_policy(10, adapter_noise=0.1)
    _, rows = roll(policy, cfg)
    info = update_once(policy, rows, cfg)
    assert info["updates"] == 6 and info["approx_kl"] > 0 and info["kl_base"] == 0
    with torch.no_grad():
        log_prob, _, _ = clap_ppo.replay(policy, rows, torch.arange(len(rows["clip"])), cfg)
    gain, advantages = log_prob - rows["log_prob"], moved(rows, 8)
    assert (gain * advantages).mean() > 1e-4
    assert torch.corrcoef(torch.stack([gain, advantages]))[0, 1] > 0.3


def test_the_clip_range_is_scaled_to_the_size_of_the_latents():
    """1e-4 nats per element belong to 16,384 elements: 1.6 nats per clip. The same 1.6 nats over 16
    elements are 0.1 per element; there, and not at 1e-4, must the update begin to clip."""
    policy, _ = painter_policy(10, adapter_noise=0.1)
    cfg = config("--num-steps", "10", "--clip-range", "1e-4", "--passes", "3",
                 "--learning-rate", "0.2", "--warmup-updates", "0")
    _, rows = roll(policy, cfg)
    info = update_once(policy, rows, cfg)
    assert info["approx_kl"] > 1e-8 and info["clip_fraction"] == 0
    tight = dataclasses.replace(cfg, clip_range=1e-9)
    policy, _ = painter_policy(10, adapter_noise=0.1)
    assert update_once(policy, rows, tight)["clip_fraction"] > 0.3


def test_the_kl_term_pulls_the_policy_back_to_the_base():
    """Without any advantage only the KL term speaks. The adapter starts away from the base and must
    come nearer; without the term nothing moves at all."""
    def gap(policy, rows, cfg):
        everything = torch.arange(len(rows["clip"]))
        with torch.no_grad():
            _, mean, sigma = clap_ppo.replay(policy, rows, everything, cfg)
            with clap_ppo.adapter_disabled(policy.unet):
                _, base, _ = clap_ppo.replay(policy, rows, everything, cfg)
        return clap_ppo.gaussian_kl(mean, base, sigma).mean().item()

    for weight in ("0", "1"):
        cfg = config("--num-steps", "10", "--kl-weight", weight, "--passes", "3",
                     "--learning-rate", "0.5", "--warmup-updates", "0")
        policy, _ = painter_policy(10, adapter_noise=0.3)
        _, rows = roll(policy, cfg)
        before = gap(policy, rows, cfg)
        info = update_once(policy, rows, cfg, advantages=torch.zeros(len(rows["clip"])))
        after = gap(policy, rows, cfg)
        if weight == "0":
            assert after == before
        else:
            assert after < 0.9 * before
            assert after < info["kl_base"] <= before * 1.001
            assert info["loss"] == pytest.approx(info["kl_base"], rel=1e-3)


def test_with_the_adapter_disabled_the_network_is_exactly_the_base():
    """Bit for bit, since the reference policy is not a copy but the same weights; and afterwards,
    even after an error, the adapter is on again."""
    asked = torch.ones(1, *Painter.SHAPE), torch.tensor([500]), torch.eye(2)[:1]
    policy, _ = painter_policy(adapter_noise=0.5)
    base, tuned = Painter(2).eval()(*asked).sample, policy.unet(*asked).sample
    assert (base - tuned).abs().max() > 0.01
    with clap_ppo.adapter_disabled(policy.unet):
        assert torch.equal(policy.unet(*asked).sample, base)
    assert torch.equal(policy.unet(*asked).sample, tuned)
    with pytest.raises(RuntimeError), clap_ppo.adapter_disabled(policy.unet):
        raise RuntimeError
    assert torch.equal(policy.unet(*asked).sample, tuned)


def test_a_new_adapter_changes_nothing_and_the_bundled_unet_is_base_without_it(world):
    """LoRA's B is zero at first: the policy starts at the base, bit for bit, in the real U-Net."""
    noise = torch.randn(2, *world.policy.latent_shape, generator=seeded(0))
    ids = torch.tensor([0, 1])
    with_adapter = clap_ppo.sample(world.policy, ids, noise)
    with clap_ppo.adapter_disabled(world.policy.unet):
        assert torch.equal(clap_ppo.sample(world.policy, ids, noise), with_adapter)
    trained = [p for p in world.policy.unet.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    assert {id(p) for p in trained} == {id(p) for p in world.optimizer.param_groups[0]["params"]}


def test_the_learning_rate_warms_up_over_the_whole_run():
    """Adam's first steps have size lr in every weight, however small the gradient, so lr rises from
    near 0; counted from the start of the run, or every epoch would warm up again."""
    class Diary(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])

    rates, cfg = [], config("--num-steps", "10", "--learning-rate", "0.5", "--warmup-updates", "10",
                            "--updates-per-epoch", "4")
    policy, weights = painter_policy(10)
    _, rows = roll(policy, cfg)
    for done in (0, 8):
        update_once(policy, rows, cfg, optimizer=Diary(weights, lr=0.5), done=done)
    assert rates == pytest.approx([0.05, 0.10, 0.15, 0.20, 0.45, 0.50, 0.50, 0.50])


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights():
    """One NaN in Adam's state is for ever."""
    policy, _ = painter_policy(10)
    cfg = config("--num-steps", "10")
    _, rows = roll(policy, cfg)
    start = adapter_copy(policy)
    with pytest.raises(UserError, match="gradient is not finite"):
        update_once(policy, rows, cfg, advantages=torch.full((len(rows["clip"]),), math.nan))
    assert all(torch.equal(a, b) for a, b in zip(start, adapter_copy(policy)))


def test_gradients_are_scaled_down_to_the_norm_that_was_asked_for():
    """--max-grad-norm bounds the step; what is logged is the norm before."""
    for limit, moves_by in ((1e-3, 1e-3), (0.0, None)):
        cfg = config("--num-steps", "10", "--learning-rate", "1", "--max-grad-norm", str(limit),
                     "--updates-per-epoch", "1", "--warmup-updates", "0")
        policy, _ = painter_policy(10, adapter_noise=0.2)
        _, rows = roll(policy, cfg)
        start = adapter_copy(policy)
        norm = update_once(policy, rows, cfg)["grad_norm"]
        step = torch.cat([(a - b).flatten() for a, b in zip(start, adapter_copy(policy))]).norm()
        assert step.item() == pytest.approx(moves_by or norm, rel=1e-3)
        assert norm > 2e-3


# =================================================================================================
# 7. Nothing is lost: resume, bad input
# =================================================================================================

def run_main(capsys, *flags: str) -> tuple[int, str]:
    """Exit code of a command line, and what it wrote to stderr."""
    capsys.readouterr()
    code = clap_ppo.main([str(flag) for flag in flags])
    return code, capsys.readouterr().err


def results(run: Path) -> tuple:
    """All that a run found out: adapter, metrics without their wall time, evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    return ((run / "adapter/adapter.safetensors").read_bytes(), rows,
            json.loads((run / "evaluation.json").read_text()))


@pytest.fixture(scope="module")
def run_flags(prompt_file):
    """A run of three epochs that asks the judge in each and is still warming up when it ends."""
    return ["--prompts", str(prompt_file), *TOY_FLAGS, *TINY, "--judge-every", "1",
            "--warmup-updates", "10", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def straight_run(run_flags, tmp_path_factory):
    """The results of that run when nothing disturbs it."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert clap_ppo.main([*run_flags, "--out", str(run)]) == 0
    return results(run)


def test_two_epochs_and_one_more_are_three(run_flags, straight_run, tmp_path, capsys):
    """`--resume RUN --epochs 3` goes on where two epochs ended, to the same bytes: adapter,
    optimizer, warm-up and every random number are those of the run that was never cut."""
    run = tmp_path / "run"
    assert run_main(capsys, *run_flags, "--epochs", 2, "--out", run)[0] == 0
    assert len(results(run)[1]) == 2
    assert run_main(capsys, "--resume", run, "--epochs", 3)[0] == 0
    assert results(run) == straight_run


@pytest.mark.parametrize("moment", [1, 3, 4], ids=["first-epoch", "second-rollout", "second-judge"])
def test_a_run_cut_at_any_moment_resumes_to_the_same_bytes(
        run_flags, straight_run, tmp_path, capsys, monkeypatch, moment):
    """Ctrl-C while rewards are computed: before anything was saved; in the second epoch's rollout;
    and at its end, when the weights have moved on but the checkpoint has not."""
    run, real, calls = tmp_path / "run", clap_ppo.clap_reward, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(clap_ppo, "clap_reward", interrupted)
        try:
            assert run_main(capsys, *run_flags, "--out", run)[0] != 0
        except KeyboardInterrupt:
            pass
    assert len(calls) == moment and not (run / "evaluation.json").exists()
    assert run_main(capsys, "--resume", run)[0] == 0
    assert results(run) == straight_run


def test_a_seed_makes_a_run_and_another_seed_another(run_flags, straight_run, tmp_path, capsys):
    """Equal seeds give equal bytes, also in one process, where torch's own generator moved on."""
    for seed, same in ((0, True), (1, False)):
        run = tmp_path / str(seed)
        assert run_main(capsys, *run_flags, "--seed", seed, "--out", run)[0] == 0
        assert (results(run)[0] == straight_run[0]) is same


def test_the_judge_hears_the_adapter_it_is_given(world):
    """Not the weights of the moment; these are back when it has answered."""
    before = clap_ppo.adapter_state(world.policy.unet)
    other = {k: v + 0.5 * torch.randn(v.shape, generator=seeded(i))
             for i, (k, v) in enumerate(before.items())}
    same, changed = clap_ppo.ask_judge(world, before), clap_ppo.ask_judge(world, other)
    assert abs(same["judge_score"] - changed["judge_score"]) > 0.01
    after = clap_ppo.adapter_state(world.policy.unet)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert clap_ppo.ask_judge(world, before) == same


def test_asking_the_judge_does_not_disturb_the_training(run_flags, straight_run, tmp_path, capsys):
    """The judge hears the averaged adapter; then training goes on with the weights it had."""
    run = tmp_path / "run"
    assert run_main(capsys, *run_flags, "--judge-every", 0, "--out", run)[0] == 0
    for alone, judged in zip(results(run)[1], straight_run[1]):
        assert judged.items() > alone.items(), "the same figures, and the judge's"


def test_a_file_is_the_old_one_or_the_new_one_never_half(tmp_path):
    """Disk full, power cut: what is written is a temporary file; only a finished one is renamed."""
    file = tmp_path / "checkpoint.pt"
    file.write_text("old")

    def half(path):
        path.write_text("ne")
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        clap_ppo.write_atomically(file, half)
    assert file.read_text() == "old"
    clap_ppo.write_atomically(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content, complaint", [
    (None, "No such file"),
    (b"", "no prompt"),
    (b"# only\n\n   \n# comments\n", "no prompt"),
    (b"snoring\nwind \x00 blowing\n", "line 2.*binary"),
    (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1.*not UTF-8"),
    ("snoring\n# gr\u00fcn\nV\u00f6gel\n".encode("latin-1"), "line 2.*not UTF-8"),
], ids=["missing", "empty", "comments", "binary", "image", "latin-1"])
def test_a_prompt_file_that_cannot_be_used_is_named_with_its_line(
        tmp_path, capsys, monkeypatch, content, complaint):
    """One line on stderr, exit code 2, nothing written."""
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    refused(capsys, tmp_path, monkeypatch, ["--prompts", file], f"mine.txt.*{complaint}")


def refused(capsys, folder, monkeypatch, flags, complaint):
    """Asserts that a command ends with code 2, one line that matches, and no file more or less."""
    monkeypatch.chdir(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, err = run_main(capsys, *flags)
    lines = [x for x in err.splitlines() if x.strip()]
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("clap_ppo.py: "), err
    assert re.search(complaint, lines[0]), lines[0]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("flags, complaint", [
    (["--clips-per-prompt", "1"], "--clips-per-prompt 1.*2.*other clips"),
    (["--eta", "0"], "--eta 0.*without noise"),
    (["--eta", "nan"], "--eta nan"),
    (["--eta", "-1"], "--eta -1"),
    (["--noise-window", "0"], "--noise-window 0.*use 1 to 4"),
    (["--noise-window", "5"], "--noise-window 5.*use 1 to 4.*last step"),
    (["--noise-window", "two"], "--noise-window two"),
    (["--num-steps", "1"], "--num-steps 1"),
    (["--train-steps", "3"], "--train-steps 3.*at most.*2"),
    (["--learning-rate", "0"], "--learning-rate 0"),
    (["--learning-rate", "inf"], "--learning-rate inf"),
    (["--micro-batch", "0"], "--micro-batch 0"),
    (["--epochs", "0"], "--epochs 0"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_settings_that_leave_nothing_to_train_are_refused_with_the_remedy(
        prompt_file, tmp_path, capsys, monkeypatch, flags, complaint):
    """The value as it was given, and what would work instead."""
    refused(capsys, tmp_path, monkeypatch,
            ["--prompts", prompt_file, *TOY_FLAGS, *TINY, *flags], complaint)


def test_without_prompts_the_flag_is_asked_for(tmp_path, capsys, monkeypatch):
    """The shortest wrong command is `python clap_ppo.py`."""
    refused(capsys, tmp_path, monkeypatch, [], "--prompts.*samples/prompts.txt")


def test_held_out_prompts_must_not_be_trained_on(prompt_file, tmp_path, capsys, monkeypatch):
    """Otherwise the evaluation would praise memory."""
    (tmp_path / "eval.txt").write_text("wind blowing\nsnoring\n")
    refused(capsys, tmp_path, monkeypatch,
            ["--prompts", prompt_file, "--eval-prompts", tmp_path / "eval.txt", *TOY_FLAGS],
            "eval.txt, line 2.*prompts.txt, line 5")


def test_too_few_prompts_to_hold_some_out_are_refused(tmp_path, capsys, monkeypatch):
    """Seven prompts and no held-out file."""
    (tmp_path / "mine.txt").write_text("".join(f"wind {i}\n" for i in range(7)))
    refused(capsys, tmp_path, monkeypatch, ["--prompts", tmp_path / "mine.txt", *TOY_FLAGS],
            "7 prompts.*--eval-prompts")


def test_without_a_held_out_file_a_quarter_is_held_out_and_said(tmp_path, capsys):
    """The same quarter every time."""
    lines = [f"wind {i}" for i in range(12)]
    (tmp_path / "mine.txt").write_text("\n".join(lines))
    cfg = config("--prompts", str(tmp_path / "mine.txt"))
    train, held_out = clap_ppo.split_prompts(cfg)
    assert sorted([*train, *held_out]) == sorted(lines) and len(held_out) == 3
    assert (train, held_out) == clap_ppo.split_prompts(cfg)
    assert "3" in capsys.readouterr().out


@pytest.mark.parametrize("make, complaint", [
    (lambda folder: folder.mkdir(), "not a diffusers pipeline"),
    (lambda folder: folder.write_text("hello"), "not a diffusers pipeline"),
    (lambda folder: (folder.mkdir(), (folder / "model_index.json").write_text("{broken")),
     "--model .*"),
    (lambda folder: (folder.mkdir(), (folder / "model_index.json").write_text(
        '{"_class_name": "AudioLDMPipeline", "vae": ["diffusers", "AutoencoderKL"]}')),
     "--model .*incomplete"),
    (lambda folder: (folder.mkdir(), (folder / "model_index.json").write_text(
        '{"_class_name": "MusicLDMPipeline"}')), "MusicLDMPipeline"),
], ids=["empty-folder", "a-file", "broken-json", "incomplete", "another-kind"])
def test_a_model_folder_that_is_not_one_is_refused(
        prompt_file, tmp_path, capsys, monkeypatch, make, complaint):
    """In one line, not in the traceback of a library."""
    make(tmp_path / "model")
    refused(capsys, tmp_path, monkeypatch,
            ["--prompts", prompt_file, *TOY_FLAGS, "--model", tmp_path / "model"], complaint)


def test_a_hub_id_without_network_names_the_bundled_alternative(
        prompt_file, tmp_path, capsys, monkeypatch):
    """The hub's own message is about caches and tokens; what helps is the model that is here."""
    refused(capsys, tmp_path, monkeypatch,
            ["--prompts", prompt_file, "--model", "nobody/has-this-model"], "--preset toy")


@pytest.mark.parametrize("flag", ["--clap", "--judge"])
def test_a_reward_or_judge_that_is_none_is_refused(
        prompt_file, tmp_path, capsys, monkeypatch, flag):
    """A text file is neither."""
    file = tmp_path / "thing"
    file.write_text("neither weights nor a folder")
    refused(capsys, tmp_path, monkeypatch,
            ["--prompts", prompt_file, *TOY_FLAGS, *TINY, flag, file], f"{flag} .*thing")


def test_an_existing_run_directory_is_never_overwritten(prompt_file, tmp_path, capsys, monkeypatch):
    """And the way to go on with it is named."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").write_text("three days of work")
    refused(capsys, tmp_path, monkeypatch,
            ["--prompts", prompt_file, *TOY_FLAGS, *TINY, "--out", tmp_path / "run"],
            "exists already.*--resume")


@pytest.mark.parametrize("given, complaint", [
    (["--resume", "nowhere"], "--resume nowhere.*not a run"),
    (["--resume", "run", "--eta", "0.5"], "--eta cannot change"),
    (["--resume", "broken"], "--resume broken.*not a run"),
])
def test_only_a_run_can_be_resumed_and_only_its_length_changed(
        prompt_file, tmp_path, capsys, monkeypatch, given, complaint):
    """Another eta in the middle of a run would make a run that no command line describes."""
    for name, text in (("run", json.dumps(dataclasses.asdict(config()))), ("broken", "{}]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    refused(capsys, tmp_path, monkeypatch, given, complaint)


def test_repeated_prompts_are_merged_and_said(tmp_path, capsys):
    """Spaces do not make another prompt; a byte order mark and Windows line ends are no prompts."""
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeffsnoring\r\n# comment\r\nwind  blowing\r\n  snoring \r\n".encode())
    assert clap_ppo.read_prompts(str(file)) == {
        "snoring": f"{file}, line 1", "wind blowing": f"{file}, line 3"}
    err = capsys.readouterr().err
    assert re.search(r"line 4.*line 1", err) and len(err.splitlines()) == 1


def test_what_the_model_cannot_take_in_is_said_before_the_run(tmp_path, capsys):
    """A prompt of more than 77 tokens is cut, and the part that is lost named; words that the toy
    never heard are named, with the preset that knows all words."""
    long = "water flows then wind blowing then snoring then birds chirp then " * 8 + "helicopter"
    (tmp_path / "prompts.txt").write_text("snoring\na Xylophone plays\n" + long + "\n")
    (tmp_path / "eval_prompts.txt").write_text("wind blowing\n")
    clap_ppo.load_world(config("--prompts", str(tmp_path / "prompts.txt")))
    err = capsys.readouterr().err
    cut = re.search(r".*cut.*", err).group()
    assert "helicopter" in cut and "prompts.txt, line 3" in cut
    unknown = re.search(r".*never.*", err).group()
    assert all(w in unknown for w in ("xylophone", "plays", "helicopter", "--preset audioldm"))
    assert "water" not in unknown


# =================================================================================================
# 8. The promises on the box
# =================================================================================================

SOURCE = Path(clap_ppo.__file__).read_text()
TREE = ast.parse(SOURCE)


def test_a_run_leaves_what_was_promised(finished_run):
    """Every file, readable by the program that it is for."""
    import soundfile
    assert finished_run.code == 0, finished_run.err
    run = finished_run.folder
    evaluation = json.loads((run / "evaluation.json").read_text())
    for column in ("base", "best_of_n", "tuned", "tuned_minus_base"):
        for name in ("reward", "judge_score", "recognition", "loudness", "broken"):
            cell = evaluation[column][name]
            assert cell["low"] - 1e-6 <= cell["value"] <= cell["high"] + 1e-6
    assert 0 <= evaluation["preference"]["low"] <= evaluation["preference"]["high"] <= 1
    saved = clap_ppo.Config(**json.loads((run / "config.json").read_text()))
    assert saved.guidance_scale == 2.5 and saved.epochs == 3
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = page_data(run)["rows"]
    assert [row["prompt"] for row in rows] == HELD_OUT and (run / "index.html").exists()
    for row in rows:
        wave, rate = soundfile.read(run / row["tuned"]["file"])
        assert rate == 16000 and wave.shape == (40960,) and np.abs(wave).max() > 0
    assert not list(run.rglob("*.tmp"))
    assert len(re.findall(r"^epoch \d/3 ", finished_run.out, flags=re.M)) == 3


def test_the_printed_snippet_gives_the_tuned_clips_in_a_plain_pipeline(finished_run, monkeypatch):
    """The proof of the adapter: the lines that the run printed, run as they stand, in a pipeline
    that knows nothing of this script. From the same starting noise it sings what the run's tuned
    clip sings, and without the adapter what its base clip does. (PCM has steps of 3e-5.)"""
    import soundfile
    assert finished_run.code == 0, finished_run.err
    snippet = (finished_run.folder / "adapter/load.py").read_text()
    assert snippet.strip() in finished_run.out
    monkeypatch.chdir(finished_run.folder.parent)
    noise = torch.randn(2 * len(HELD_OUT), *(8, 16, 8), generator=seeded(999))
    with_adapter, without = {}, {}
    exec(snippet, {"prompt": HELD_OUT[0]}, with_adapter)
    exec(re.sub(r"(?m)^(pipe\.unet|audio| ).*", "", snippet), {}, without)
    assert with_adapter["audio"].shape == (1, 40960)
    heard = {}
    for name, pipe in (("tuned", with_adapter["pipe"]), ("base", without["pipe"])):
        pipe.set_progress_bar_config(disable=True)
        heard[name] = [pipe(HELD_OUT[i], latents=noise[2 * i:2 * i + 1], num_inference_steps=5,
                            guidance_scale=2.5, audio_length_in_s=2.56).audios[0] for i in (0, 2)]
        for i, audio in zip((0, 2), heard[name]):
            row = page_data(finished_run.folder)["rows"][i]
            saved, _ = soundfile.read(finished_run.folder / row[name]["file"])
            gain = np.sqrt((saved ** 2).mean() / (audio ** 2).mean())     # pairs are equally loud
            assert 0.5 < gain < 1.001
            np.testing.assert_allclose(gain * np.clip(audio, -1, 1), saved, rtol=0, atol=2e-4)
    difference = np.abs(np.array(heard["tuned"]) - np.array(heard["base"])).max()
    assert difference > 5e-4, "the tuned clips are not the base's"


def test_the_judge_keeps_the_best_adapter_and_says_when_the_reward_misleads(capsys):
    """The reward can be fooled; the judge was never trained against. When one rises and the other
    falls, the earlier adapter stays and the terminal says so."""
    row = {"epoch": 10, "judge_score": 0.5, "monitor_reward": 0.3}
    first = clap_ppo.keep_best({}, row, {"a": 1})
    row = {"epoch": 20, "judge_score": 0.4, "monitor_reward": 0.6}
    assert clap_ppo.keep_best(first, row, {"a": 2}) == first
    assert re.search("epoch 20.*epoch 10", capsys.readouterr().err)
    better = clap_ppo.keep_best(first, {**row, "judge_score": 0.7}, {"a": 2})
    assert better["epoch"] == 20 and better["adapter"] == {"a": 2}
    assert not capsys.readouterr().err


def make_clips(judge, reward=None, embeds=None, waveforms=None) -> clap_ppo.Clips:
    """Clips of M prompts from judge scores (M, n, M), the rest filled in."""
    count, n, _ = judge.shape
    return clap_ppo.Clips(
        torch.full((count, n, 100), 0.1) if waveforms is None else waveforms,
        torch.zeros(count, n) if reward is None else reward, judge,
        torch.ones(count, n, 1) if embeds is None else embeds)


def test_a_judge_that_always_hears_the_prompt_has_a_recognition_of_one():
    """And one that always hears the next prompt has 0; one that hears half of the clips, 1/2."""
    ear = torch.eye(4)[:, None].repeat(1, 2, 1)
    deaf = ear.roll(1, dims=2)
    metrics = clap_ppo.per_prompt_metrics(make_clips(ear))
    assert metrics["recognition"].tolist() == [1, 1, 1, 1]
    assert metrics["judge_score"].tolist() == [1, 1, 1, 1]
    assert clap_ppo.per_prompt_metrics(make_clips(deaf))["recognition"].tolist() == [0, 0, 0, 0]
    half = torch.cat([ear[:, :1], deaf[:, :1]], dim=1)
    assert clap_ppo.per_prompt_metrics(make_clips(half))["recognition"].tolist() == [0.5] * 4


def test_diversity_loudness_and_broken_clips_mean_what_they_say():
    """Equal clips have diversity 0, unrelated ones 1. A tenth of full scale is -20 dB. Silence and
    clipping are broken. The judge hears prompt 0 everywhere, so prompt 1 has no two recognised
    clips and its diversity among those is unknown: left out of the mean, not counted as 0."""
    judge = torch.zeros(2, 2, 2)
    judge[:, :, 0] = 1
    embeds = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    waveforms = torch.full((2, 2, 100), 0.1)
    waveforms[1, 0] = 0.0
    waveforms[1, 1] = 1.0
    metrics = clap_ppo.per_prompt_metrics(make_clips(judge, embeds=embeds, waveforms=waveforms))
    torch.testing.assert_close(metrics["diversity"], torch.tensor([0.0, 1.0]))
    assert metrics["diversity_right"][0] == 0 and metrics["diversity_right"][1].isnan()
    assert clap_ppo.bootstrap(metrics["diversity_right"])["value"] == 0
    assert metrics["loudness"][0].item() == pytest.approx(-20, abs=1e-3)
    assert metrics["broken"].tolist() == [0, 1]


def test_best_of_n_takes_the_clip_that_the_reward_likes_best():
    """By the reward, since that is what a user could ask; the judge then says what it was worth."""
    reward = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])
    judge = torch.arange(12.0).reshape(2, 3, 2)
    best = clap_ppo.best_of(make_clips(judge, reward))
    assert best.reward.tolist() == [[pytest.approx(0.9)], [pytest.approx(0.8)]]
    assert torch.equal(best.judge, torch.stack([judge[0, 1:2], judge[1, 0:1]]))
    assert best.waveforms.shape == (2, 1, 100)


def test_the_preference_rate_counts_pairs_in_which_tuned_is_better():
    """Pairs share prompt and noise; a tie is half. Only the clip's own prompt counts."""
    low = torch.zeros(3, 2, 3)
    high = low + torch.eye(3)[:, None]
    assert clap_ppo.compare(make_clips(low), make_clips(high))["preference"]["value"] == 1
    assert clap_ppo.compare(make_clips(high), make_clips(low))["preference"]["value"] == 0
    assert clap_ppo.compare(make_clips(low), make_clips(low))["preference"]["value"] == 0.5
    elsewhere = low + (1 - torch.eye(3))[:, None]
    assert clap_ppo.compare(make_clips(low), make_clips(elsewhere))["preference"]["value"] == 0.5
    result = clap_ppo.compare(make_clips(low), make_clips(high))
    assert result["tuned_minus_base"]["judge_score"]["value"] == 1
    assert result["preference"]["high"] == pytest.approx(1) and result["preference"]["low"] < 0.7


@pytest.mark.parametrize("successes, n, low, high", [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962),
    (7, 10, 0.3968, 0.8922)])
def test_wilsons_interval_has_its_published_values(successes, n, low, high):
    """Unlike the textbook interval it stays within [0, 1] and is not empty at 0 or 1."""
    interval = clap_ppo.wilson(successes, n)
    assert interval["value"] == successes / n
    assert interval["low"] == pytest.approx(low, abs=2e-4)
    assert interval["high"] == pytest.approx(high, abs=2e-4)


def test_the_bootstrap_interval_is_that_of_a_mean():
    """For 400 values of standard deviation 1 the mean is known to 1.96 / 20."""
    values = torch.randn(400, generator=seeded(0)) + 3
    interval = clap_ppo.bootstrap(values)
    assert interval["value"] == pytest.approx(values.mean().item(), abs=1e-5)
    assert interval["value"] - interval["low"] == pytest.approx(1.96 / 20, rel=0.15)
    assert interval["high"] - interval["value"] == pytest.approx(1.96 / 20, rel=0.15)
    assert interval == clap_ppo.bootstrap(values), "the same numbers every time"
    assert clap_ppo.bootstrap(torch.ones(5)) == {"value": 1, "low": 1, "high": 1}


def test_evaluation_starts_base_and_tuned_from_the_same_noise(world):
    """Before any training both are the same clips, whatever the batches they are made in."""
    def clips(seed):
        return clap_ppo.make_clips(world, world.held_out_ids, 2, seed, "test")

    tuned, again = clips(seed=4), clips(seed=4)
    with clap_ppo.adapter_disabled(world.policy.unet):
        base = clips(seed=4)
    for other in (again, base):
        assert all(torch.equal(a, b) for a, b in zip(tuned, other))
    assert tuned.judge.shape == (3, 2, 3) and tuned.waveforms.shape == (3, 2, 40960)
    assert not torch.equal(tuned.waveforms[:, 0], tuned.waveforms[:, 1]), "each its own noise"
    assert not torch.equal(clips(seed=5).waveforms, tuned.waveforms)


def test_the_steps_of_the_docstring_are_those_of_the_code():
    """STEP 1 to 6 are announced, and each tags a line of the loop, in that order."""
    docstring = ast.get_docstring(TREE, clean=False)
    code = SOURCE.replace(docstring, "")
    assert re.findall(r"^ *STEP (\d)", docstring, flags=re.M) == list("123456")
    assert re.findall(r"# *STEP (\d)", code) == list("123456")


def test_the_examples_in_the_docstrings_are_true():
    """Each `>>>` is run."""
    tested = doctest.testmod(clap_ppo)
    assert tested.failed == 0 and tested.attempted >= 3


def test_importing_the_script_does_nothing():
    """No output, none of the heavy packages: `--help` answers as fast as torch imports, and a
    function can be imported from it into another project."""
    heavy = ["diffusers", "transformers", "peft", "laion_clap", "torchaudio", "torchvision",
             "matplotlib", "soundfile", "accelerate"]
    code = (f"import sys; import clap_ppo; print([m for m in {heavy} if m in sys.modules]); "
            "clap_ppo.main(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(HERE)},
                          capture_output=True, text=True)
    first, *rest = done.stdout.splitlines()
    assert first == "[]" and done.stderr == "" and done.returncode == 0
    for field in dataclasses.fields(clap_ppo.Config):
        assert f"--{field.name.replace('_', '-')}" in " ".join(rest)


def test_every_flag_is_read_somewhere():
    """A flag that is accepted and never read is a lie. Outside of Config, or in its properties."""
    fields, read = {f.name for f in dataclasses.fields(clap_ppo.Config)}, set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if owner in ("cfg", "c", "self"):
                read.add(node.attr)
    assert fields - read == set()


def test_functions_are_short_enough_to_read_at_once_and_say_what_they_do():
    """At most 62 lines with the docstring; every public function and class has one."""
    public = [node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions
            if f.end_lineno - f.lineno + 1 > 62} == {}
    assert [n.name for n in public if not n.name.startswith("_") and not ast.get_docstring(n)] == []
    assert [i for i, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100] == []


def commands(text: str) -> list[list[str]]:
    """The arguments of each line that calls the script."""
    lines = re.findall(r"^\s*(?:\$ )?python clap_ppo\.py\b.*$", text, flags=re.M)
    return [shlex.split(line.replace("$ ", ""), comments=True)[2:] for line in lines]


@pytest.mark.parametrize("document", ["clap_ppo.py", "README.md"])
def test_the_documented_commands_are_understood(document, tmp_path, monkeypatch):
    """Every command that a reader can copy, from the docstring and from the README. A run that is
    to be resumed is put there first."""
    if not (HERE / document).exists():
        pytest.skip(f"{document} does not exist")
    text = (HERE / document).read_text() if document != "clap_ppo.py" else clap_ppo.__doc__
    found = commands(text)
    assert found
    monkeypatch.chdir(tmp_path)
    for arguments in found:
        if "--resume" in arguments:
            run = Path(arguments[arguments.index("--resume") + 1])
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.json").write_text(json.dumps(dataclasses.asdict(config())))
        if "--help" in arguments:
            with pytest.raises(SystemExit):
                clap_ppo.parse_args(arguments)
        else:
            assert isinstance(clap_ppo.parse_args(arguments)[0], clap_ppo.Config), arguments


def test_a_preset_is_only_a_set_of_defaults():
    """Named values, each of them a flag, each of which a flag overrides."""
    fields = {f.name for f in dataclasses.fields(clap_ppo.Config)}
    for preset, values in clap_ppo.PRESETS.items():
        assert set(values) <= fields
        cfg, _ = clap_ppo.parse_args(["--prompts", "p.txt", "--preset", preset, "--seed", "5"])
        assert (cfg.preset, cfg.seed) == (preset, 5)
        assert all(getattr(cfg, name) == value for name, value in values.items())
    cfg, _ = clap_ppo.parse_args(["--prompts", "p.txt", "--preset", "audioldm", "--epochs", "3"])
    assert cfg.epochs == 3 and cfg.learning_rate == clap_ppo.PRESETS["audioldm"]["learning_rate"]


def test_every_requirement_is_used(world):
    """Imported by one of our files, or (two of them) by a package that does not say so: diffusers
    loads with accelerate, laion_clap imports torchvision."""
    lines = [x.split("#")[0].strip() for x in (HERE / "requirements.txt").read_text().splitlines()]
    names = [re.match(r"[\w-]+", x).group().replace("-", "_") for x in lines if x]
    imported = set()
    for file in [*HERE.glob("*.py"), *(HERE / "samples").glob("*.py")]:
        text = file.read_text()
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", text, flags=re.M))
        imported |= set(re.findall(r"find_spec\(\"(\w+)\"\)", text))
    unused = set(names) - imported
    assert unused <= {"accelerate", "torchvision"} and unused <= set(sys.modules)


def held_out_pairs() -> tuple[set, set]:
    """Pairs of events that meet in a held-out prompt, and in a training prompt."""
    sounds = module("toy_sounds")

    def pairs(name):
        scenes = [sounds.canonical(sounds.parse(p)) for p in
                  clap_ppo.read_prompts(str(HERE / f"samples/{name}.txt"))]
        return {frozenset(pair) for _, events in scenes
                for pair in itertools.combinations(events, 2)}

    return pairs("eval_prompts"), pairs("prompts")


def test_the_held_out_prompts_ask_for_what_was_never_asked_in_training():
    """No prompt in common, and at least half of the held-out pairs of events meet in no training
    prompt. All of them, and the six published prompts, are in the toy's words."""
    sounds = module("toy_sounds")
    scenes = {name: [sounds.canonical(sounds.parse(p)) for p in
                     clap_ppo.read_prompts(str(HERE / f"samples/{name}.txt"))]
              for name in ("prompts", "eval_prompts", "published_prompts")}
    assert len(scenes["published_prompts"]) == 6
    assert not set(scenes["prompts"]) & set(scenes["eval_prompts"]), "not even in other words"
    held_out, trained = held_out_pairs()
    assert len(held_out - trained) >= len(held_out) / 2


def test_the_bundled_world_is_small():
    """A clone should not cost more than a few songs: 16 MiB, in half precision."""
    folder = TOY or HERE / "samples/toy"
    assert 0 < sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 16 * 2 ** 20


def test_the_toy_world_is_rebuilt_by_its_script(tmp_path):
    """`make_toy.py --fast`: every stage with a budget of three steps, and what comes out loads."""
    done = subprocess.run([sys.executable, str(HERE / "samples/make_toy.py"), "--fast", "--out",
                           str(tmp_path / "toy"), "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pipeline = clap_ppo.load_pipeline(str(tmp_path / "toy/pipeline"), torch.device("cpu"))
    clap = clap_ppo.load_clap(str(tmp_path / "toy/clap.pt"), pipeline.tokenizer)
    judge = clap_ppo.load_judge(str(tmp_path / "toy/judge"))
    embeds = clap_ppo.encode_prompts(pipeline, ["snoring", "talking"])[0]["class_labels"]
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(2))
    mel_rate = pipeline.vocoder.config.sampling_rate
    assert clap_ppo.clap_reward(clap, tone(300, mel_rate), mel_rate, ["snoring"]).isfinite().all()
    assert judge.config.projection_dim > 0


# =================================================================================================
# 9. Hear it: the page, in a real browser
# =================================================================================================

NASTY = ["<script>window.pwned = 1</script> wind", 'a "quoted" \'dog\' & <b>cat</b>',
         "a bird \U0001f426", "\u0643\u0644\u0628 \u064a\u0646\u0628\u062d",
         "</script><img src=x onerror='window.pwned = 1'>"]
PAGE_PROMPTS = NASTY + [f"prompt number {i} of a long file, all different" for i in range(59)]


@pytest.fixture(scope="session")
def page_folder(tmp_path_factory) -> Path:
    """The page of a run with 64 prompts. Base clips are low tones, tuned clips high and louder."""
    run = tmp_path_factory.mktemp("page") / "run"
    run.mkdir()
    count = len(PAGE_PROMPTS)
    own = torch.eye(count)[:, None]

    def clips(first, level, judge):
        pitches = [first + 10 * i for i in range(count)]
        waveforms = torch.cat([level * tone(pitch, 16000, 2.56) for pitch in pitches])[:, None]
        return clap_ppo.Clips(waveforms, torch.rand(count, 1, generator=seeded(first)),
                              judge * own, torch.ones(count, 1, 4))

    base, tuned = clips(200, 0.1, 0.3), clips(2000, 0.5, 0.6)
    rows = clap_ppo.save_clips(run, base, tuned, PAGE_PROMPTS, 16000)
    metrics = [{"epoch": i + 1, "reward": 0.3 + 0.004 * i, "loss": 0.123456789012,
                **({"judge_score": 0.4} if i % 10 == 9 else {})} for i in range(100)]
    clap_ppo.save_page(run, config(), rows, clap_ppo.compare(base, tuned), metrics, 16000)
    return run


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, driven by playwright; neither is needed to use this project."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium",
                                             args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, page_folder):
    """The page as a double click opens it, offline; errors in its scripts fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    asked, errors = [], []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((page_folder / "index.html").as_uri())
    yield page
    assert errors == [] and [url for url in asked if not url.startswith(("file:", "blob:"))] == []
    context.close()


def page_data(folder: Path) -> dict:
    text = (folder / "data.js").read_text()
    return json.loads(text.removeprefix("window.CLAP_PPO_RUN = ").removesuffix(";\n"))


def test_nothing_about_a_clip_file_tells_which_model_made_it(page_folder):
    """Both clips of a pair are equally loud, as long, and named by a hash; the hash is no order."""
    import soundfile
    rows = page_data(page_folder)["rows"]
    lower_name = 0
    for row in rows:
        waves = {side: soundfile.read(page_folder / row[side]["file"])[0]
                 for side in ("base", "tuned")}
        level = {side: 10 * math.log10((wave ** 2).mean()) for side, wave in waves.items()}
        assert level["base"] == pytest.approx(level["tuned"], abs=0.05), "decibels"
        assert waves["base"].shape == waves["tuned"].shape == (40960,)
        for side in waves:
            assert re.fullmatch(r"clips/[0-9a-f]{16}\.wav", row[side]["file"])
        lower_name += row["base"]["file"] < row["tuned"]["file"]
        assert (row["base"]["judge"], row["tuned"]["judge"]) == (0.3, 0.6), "of its own prompt"
    assert 16 <= lower_name <= 48, "of 64"


def test_a_silent_clip_stays_silent_and_does_not_silence_the_other(tmp_path):
    """Equal loudness with silence would be silence."""
    import soundfile
    silent = make_clips(torch.zeros(1, 1, 1), waveforms=torch.zeros(1, 1, 40960))
    loud = make_clips(torch.zeros(1, 1, 1), waveforms=tone(440, 16000, 2.56)[None])
    row, = clap_ppo.save_clips(tmp_path, silent, loud, ["wind"], 16000)
    waves = [soundfile.read(tmp_path / row[side]["file"])[0] for side in ("base", "tuned")]
    assert not waves[0].any() and (waves[1] ** 2).mean() ** 0.5 == pytest.approx(0.01, rel=0.02)


def test_the_mel_picture_is_where_the_sound_is():
    """Four bits a cell, columns of 32 bands: a tone lights its band, silence before it none."""
    import base64
    wave = torch.cat([torch.zeros(20480), tone(3000, 16000)[0, :20480]])
    cells = base64.b64decode(clap_ppo.mel_picture(wave, 16000))
    picture = np.array([[b >> 4, b & 15] for b in cells]).reshape(48, 32)
    assert picture[:20].max() == 0 and (picture[30:44].max(axis=1) >= 13).all()
    mel = [2595 * math.log10(1 + hertz / 700) for hertz in (3000, 8000)]
    assert abs(picture[30:44].sum(axis=0).argmax() - (33 * mel[0] / mel[1] - 1)) <= 1


def test_the_page_of_64_prompts_is_light(page_folder):
    """Under 200 KiB besides the clips."""
    files = [page_folder / name for name in ("index.html", "data.js")]
    assert sum(file.stat().st_size for file in files) < 200 * 1024


def test_the_demo_shows_the_page_of_today():
    """samples/demo/index.html is the copy that a run makes: made again when the page changes."""
    page = (HERE / "samples/listen.html").read_bytes()
    assert (HERE / "samples/demo/index.html").read_bytes() == page


def test_every_player_loads_its_clip(page, page_folder):
    """From disk, in a browser: 64 rows, two players each, all with their 2.56 seconds."""
    players = "[...document.querySelectorAll('#rows audio')]"
    page.evaluate(f"{players}.forEach(a => a.load())")
    page.wait_for_function(f"{players}.every(a => a.readyState > 0)")
    assert page.evaluate(f"{players}.map(a => a.duration)") == [2.56] * 128
    files = page.evaluate(f"{players}.map(a => a.getAttribute('src'))")
    assert files == [row[side]["file"] for row in page_data(page_folder)["rows"]
                     for side in ("base", "tuned")]


def test_prompts_are_text_whatever_they_contain(page):
    """Tags, quotes, emoji and Arabic appear as written, and nothing in them runs."""
    assert page.locator("#rows h3").all_text_contents() == PAGE_PROMPTS
    assert page.evaluate("window.pwned") is None


def test_rows_sort_by_what_was_gained(page, page_folder):
    """The table of results is that of evaluation.json."""
    page.select_option("#sort", "reward")
    rows = sorted(page_data(page_folder)["rows"],
                  key=lambda row: row["base"]["reward"] - row["tuned"]["reward"])
    assert page.locator("#rows h3").all_text_contents() == [row["prompt"] for row in rows]
    assert "0.300 [0.300, 0.300]" in page.locator("#summary").text_content()


def start_blind_test(page, size="8"):
    page.locator("#to-blind").focus()
    page.keyboard.press("Enter")
    page.select_option("#size", size)
    page.keyboard.press("Escape")
    page.locator("button.main").focus()
    page.keyboard.press("Enter")


def test_the_blind_test_by_keyboard_and_its_rates(page, tmp_path, capsys):
    """Eight pairs and sixteen clips, answered with keys alone: this listener recognises every tuned
    clip and no base clip, and prefers tuned in six pairs, base in one, neither in one. A reload in
    the middle loses nothing. The rates on the page are those that Python finds in the downloaded
    file, and that pooling finds in it."""
    start_blind_test(page)
    state = "JSON.parse(localStorage.getItem(KEY))"
    for question in range(24):
        assert f"Question {question + 1} of 24" in page.locator("#stage").text_content()
        item = page.evaluate(f"{state}.plan[{question}]")
        if question in (3, 15):
            page.reload()
            page.evaluate("mode('blind')")
            assert page.evaluate(f"{state}.given.length") == question
        if item["task"] == "pairs":
            page.keyboard.press("a")
            source = page.evaluate("document.getElementById('player').getAttribute('src')")
            assert source == page.evaluate(f"run.rows[{item['row']}].{item['a']}.file")
            tuned = "1" if item["a"] == "tuned" else "2"
            page.keyboard.press("0" if question == 0 else {"1": "2", "2": "1"}[tuned]
                                if question == 1 else tuned)
        else:
            page.keyboard.press("p")
            own = page.evaluate(f"run.rows[{item['row']}].prompt")
            right = item["captions"].index(own)
            assert len(set(item["captions"])) == 4
            page.keyboard.press(str(1 + (right if item["side"] == "tuned" else (right + 1) % 4)))
    with page.expect_download() as download:
        page.keyboard.press("j")
    file = tmp_path / "listener.json"
    download.value.save_as(file)
    data, pool = json.loads(file.read_text()), module("pool_listeners")
    answers, listeners = pool.read_answers([str(file)])
    rates = pool.pooled_rates(answers)
    assert listeners == 1 and [rate["value"] for rate in rates.values()] == [6.5 / 8, 0, 1]
    for name, rate in rates.items():
        shown = page.locator(f"#{name}").text_content()
        assert [float(x) for x in re.findall(r"[\d.]+", shown)] == pytest.approx(
            [rate["value"], rate["low"], rate["high"]], abs=5.1e-4)
        assert data["rates"][name] == pytest.approx(rate)
    assert pool.main([str(file)]) == 0 and "0.812 [" in capsys.readouterr().out
    with page.expect_download() as download:
        page.keyboard.press("c")
    download.value.save_as(tmp_path / "listener.csv")
    assert len((tmp_path / "listener.csv").read_text().splitlines()) >= 25


def test_going_back_takes_an_answer_back(page):
    """A slip of the finger is not an answer."""
    start_blind_test(page)
    page.keyboard.press("1")
    page.keyboard.press("Backspace")
    assert page.evaluate("state.given") == []
    page.keyboard.press("2")
    assert page.evaluate("state.given") == ["b"]


def test_the_blind_order_cannot_be_predicted(page):
    """Of 2,000 plans: the tuned clip is A in half of the questions, at every place; prompts and
    sides of single clips come in any order; the own caption is at each of the four places. Bounds
    are four standard deviations wide."""
    found = page.evaluate("""() => {
        const count = (list, size) => list.reduce((n, i) => (n[i]++, n), Array(size).fill(0));
        const plans = [...Array(2000)].map(() => makePlan(8));
        const at = i => plans.map(plan => plan[i]);
        return {
            a: [...Array(8).keys()].map(i => at(i).filter(x => x.a === "tuned").length),
            first: count(at(0).map(x => x.row), 64),
            side: [8, 15, 23].map(i => at(i).filter(x => x.side === "tuned").length),
            caption: count(at(10).map(x => x.captions.indexOf(run.rows[x.row].prompt)), 4),
            tied: plans.filter(plan => plan[0].a === plan[1].a).length};
    }""")
    for count in [*found["a"], *found["side"], found["tied"]]:
        assert abs(count - 1000) <= 4 * math.sqrt(500)
    assert all(abs(n - 500) <= 4 * math.sqrt(375) for n in found["caption"])
    assert sum(found["first"]) == 2000 and max(found["first"]) <= 31.25 + 5 * math.sqrt(31.25)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_accessible_and_fits_a_phone(page, scheme, width):
    """No finding of axe, the checker behind most audits, in both modes; no sideways scrolling."""
    axe = Path(os.environ.get("AXE_JS", "node_modules/axe-core/axe.min.js"))
    if not axe.exists():
        pytest.skip("axe-core is not there (npm install axe-core; AXE_JS=.../axe.min.js)")
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.evaluate(axe.read_text())

    def findings():
        result = page.evaluate("axe.run(document, {resultTypes: ['violations', 'passes']})")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert len(result["passes"]) >= 10
        return [(v["id"], v["nodes"][0]["target"]) for v in result["violations"]]

    assert findings() == []
    start_blind_test(page)
    assert findings() == []
    page.evaluate("state.given = state.plan.slice(0, -16).map(() => 'a'); drawStage(true)")
    assert findings() == []
    page.evaluate("state.given = state.plan.map(x => x.captions ? 0 : 'a'); drawStage(true)")
    assert findings() == []


@pytest.mark.parametrize("text, complaint", [
    ("not json", "not a download"), ("{}", "not a download"), ("[]", "not a download"),
    ('{"listener": "1", "run": "r", "answers": [{"task": "preference", "chosen": "me"}]}', "'me'")])
def test_files_that_no_listener_made_are_not_pooled(tmp_path, capsys, text, complaint):
    """One line that names the file, exit code 2."""
    (tmp_path / "l.json").write_text(text)
    assert module("pool_listeners").main([str(tmp_path / "l.json")]) == 2
    err = capsys.readouterr().err
    assert "l.json" in err and complaint in err and len(err.splitlines()) == 1


def test_no_listener_counts_twice_and_no_two_runs_are_mixed(tmp_path, capsys):
    """Copies of a file, and files of another run, would make intervals that are too narrow."""
    answers = [{"task": "preference", "chosen": "tuned"}, {"task": "preference", "chosen": "none"}]
    for name, listener, run in (("a", "1", "r"), ("b", "2", "r"), ("c", "1", "r"), ("d", "3", "s")):
        data = {"listener": listener, "run": run, "answers": answers}
        (tmp_path / name).write_text(json.dumps(data))
    pool, paths = module("pool_listeners"), {name: str(tmp_path / name) for name in "abcd"}
    assert pool.main([paths["a"], paths["b"]]) == 0
    assert "2 listeners, 4 answers" in (out := capsys.readouterr().out) and "0.750 [" in out
    assert pool.main([paths["a"], paths["c"]]) == 2 and "again" in capsys.readouterr().err
    assert pool.main([paths["a"], paths["d"]]) == 2 and "one run" in capsys.readouterr().err
    assert pool.main([]) == 2


# =================================================================================================
# 10. Real models: both families, the official formats, full-size CLAP; random weights, no download
# =================================================================================================

def toy_part(name: str) -> Path:
    return (TOY or HERE / "samples/toy") / name


def small_audioldm(folder: Path) -> None:
    """AudioLDM's architecture, four levels whose cross-attention attends to itself, but narrow;
    text encoder, VAE and vocoder are the toy's."""
    from diffusers import AudioLDMPipeline, UNet2DConditionModel
    pipe = AudioLDMPipeline.from_pretrained(toy_part("pipeline"), dtype=torch.float32)
    torch.manual_seed(0)
    widths = [8, 16, 24, 40]
    pipe.unet = UNet2DConditionModel(
        **{**module("bench").LEVELS, "block_out_channels": widths, "layers_per_block": 1},
        cross_attention_dim=widths, attention_head_dim=4, norm_num_groups=8,
        class_embed_type="simple_projection", class_embeddings_concat=True,
        projection_class_embeddings_input_dim=64)
    pipe.save_pretrained(folder)


def small_audioldm2(folder: Path) -> None:
    """AudioLDM2's architecture: CLAP and T5 encoders, GPT2 that continues them, a U-Net with two
    cross-attentions. As on the hub, the index names GPT2Model, a class that cannot generate."""
    from diffusers import (AudioLDM2Pipeline, AudioLDM2ProjectionModel,
                           AudioLDM2UNet2DConditionModel, AudioLDMPipeline)
    from transformers import (ClapFeatureExtractor, ClapModel, GPT2Config, GPT2LMHeadModel,
                              T5Config, T5EncoderModel, T5Tokenizer)
    toy = AudioLDMPipeline.from_pretrained(toy_part("pipeline"), dtype=torch.float32)
    clap = ClapModel.from_pretrained(toy_part("judge"), dtype=torch.float32)
    words = (toy_part("pipeline") / "vocabulary.txt").read_text().split()
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -5.0)]
    vocabulary += [("\u2581" + word, -3.0) for word in words]
    torch.manual_seed(0)
    language_model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=10))
    language_model.config.max_new_tokens = 8
    unet = AudioLDM2UNet2DConditionModel(
        **{**module("bench").LEVELS, "block_out_channels": [8, 16, 24, 40], "layers_per_block": 1},
        cross_attention_dim=4 * [[None, 24, 32]], attention_head_dim=4, norm_num_groups=8)
    AudioLDM2Pipeline(
        vae=toy.vae, text_encoder=clap, text_encoder_2=T5EncoderModel(T5Config(
            vocab_size=len(vocabulary) + 100, d_model=32, d_kv=8, d_ff=32, num_layers=2,
            num_heads=4)),
        projection_model=AudioLDM2ProjectionModel(clap.config.projection_dim, 32, 24),
        language_model=language_model, tokenizer=toy.tokenizer,
        tokenizer_2=T5Tokenizer(vocab=vocabulary, model_max_length=64),
        feature_extractor=ClapFeatureExtractor(), unet=unet, scheduler=toy.scheduler,
        vocoder=toy.vocoder).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["language_model"] = ["transformers", "GPT2Model"]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def real_checkpoint(tmp_path_factory):
    """A full-size HTSAT-tiny + RoBERTa checkpoint with random weights, as LAION wrote its own."""
    sizes = clap_ppo.package_folder() / "clap_module/model_configs/HTSAT-tiny.json"
    torch.manual_seed(0)
    state = clap_ppo.build_clap(json.loads(sizes.read_text())).state_dict()
    state = {f"module.{k}": v for k, v in state.items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    file = tmp_path_factory.mktemp("clap") / "630k-audioset-best.pt"
    torch.save({"epoch": 7, "name": "official", "state_dict": state, "loss": np.float64(0.5),
                "args": argparse.Namespace(lr=0.1)}, file)
    yield file
    file.unlink()


@pytest.fixture(scope="session", params=["audioldm", "audioldm2"])
def real_run(request, real_checkpoint, prompt_file, tmp_path_factory):
    """Two epochs of each family from saved folders, with the full-size CLAP as reward."""
    folder = tmp_path_factory.mktemp(request.param)
    {"audioldm": small_audioldm, "audioldm2": small_audioldm2}[request.param](folder / "model")
    flags = ["--prompts", prompt_file, "--preset", request.param, "--model", folder / "model",
             "--clap", real_checkpoint, "--judge", toy_part("judge"), "--device", "cpu", "--dtype",
             "float32", "--seconds", "2.56", "--num-steps", "5", "--prompts-per-epoch", "2",
             "--clips-per-prompt", "4", "--micro-batch", "8", "--epochs", "2", "--judge-every", "1",
             "--eval-noises", "1", "--learning-rate", "0.02", "--warmup-updates", "0",
             "--out", folder / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", None)
        assert clap_ppo.main([str(flag) for flag in flags]) == 0
    return SimpleNamespace(folder=folder / "run", flags=flags)


@pytest.mark.slow
def test_real_architectures_run_from_their_folders_on_policy(real_run):
    """Rollouts, full-size reward and updates, and in every epoch the ratio begins at 1."""
    rows = results(real_run.folder)[1]
    assert len(rows) == 2
    for row in rows:
        assert row["ratio_error"] <= 1e-6 and row["approx_kl"] > 0 and row["reward_spread"] > 0


@pytest.mark.slow
def test_real_architectures_resume_to_the_same_bytes(real_run, tmp_path, capsys):
    """One epoch, then --resume for the second. (AudioLDM's is the toy's.)"""
    if "audioldm2" not in real_run.flags:
        return
    flags = [*real_run.flags[:-1], tmp_path / "run", "--epochs", 1]
    assert run_main(capsys, *flags)[0] == 0
    assert run_main(capsys, "--resume", tmp_path / "run", "--epochs", 2)[0] == 0
    assert results(tmp_path / "run")[0] == results(real_run.folder)[0]


@pytest.mark.slow
def test_the_snippet_gives_the_tuned_clips_in_both_families(real_run):
    """The printed lines, as they stand, in a stock pipeline: the same clips from the same noise."""
    import soundfile
    names = {}
    exec((real_run.folder / "adapter/load.py").read_text(), {"prompt": HELD_OUT[0]}, names)
    noise = torch.randn(len(HELD_OUT), *(8, 16, 8), generator=seeded(999))
    row = page_data(real_run.folder)["rows"][0]
    cfg = json.loads((real_run.folder / "config.json").read_text())
    audio = names["pipe"](HELD_OUT[0], latents=noise[:1], num_inference_steps=5,
                          guidance_scale=cfg["guidance_scale"], audio_length_in_s=2.56).audios[0]
    for side, same in (("tuned", True), ("base", False)):
        saved, _ = soundfile.read(real_run.folder / row[side]["file"])
        gain = np.sqrt((saved ** 2).mean() / (audio ** 2).mean())
        assert bool(np.abs(gain * np.clip(audio, -1, 1) - saved).max() < 1e-3) is same


def test_the_conditions_of_audioldm2_do_not_depend_on_the_batch(tmp_path):
    """Alone or beside a longer prompt: the same language model states, and T5 states whose padding
    is masked away."""
    small_audioldm2(tmp_path / "model")
    pipe = clap_ppo.load_pipeline(str(tmp_path / "model"), torch.device("cpu"))
    alone, _ = clap_ppo.encode_prompts(pipe, ["snoring"])
    both, _ = clap_ppo.encode_prompts(pipe, ["snoring", "a dog barking then a lion roaring"])
    assert torch.equal(alone["encoder_hidden_states"], both["encoder_hidden_states"][:1])
    length = alone["encoder_attention_mask_1"].shape[1]
    assert both["encoder_attention_mask_1"].sum(dim=1).tolist()[0] == length
    assert both["encoder_attention_mask_1"].shape[1] > length
    x, t = torch.randn(1, 8, 16, 8, generator=seeded(0)), torch.tensor([500])
    one = pipe.unet(x, t, **alone).sample
    other = pipe.unet(x, t, **{k: v[:1] for k, v in both.items()}).sample
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (pipe.unet(x, t, **{k: v[1:] for k, v in both.items()}).sample - one).abs().max() > 1e-4


@pytest.mark.slow
def test_a_full_size_music_checkpoint_is_built_as_htsat_base(tmp_path, world):
    """Music checkpoints hold a larger audio tower; a general one under such a name is refused."""
    sizes = clap_ppo.package_folder() / "clap_module/model_configs/HTSAT-base.json"
    state = clap_ppo.build_clap(json.loads(sizes.read_text())).state_dict()
    file = tmp_path / "music_audioset_epoch_15_esc_90.14.pt"
    torch.save({"state_dict": state}, file)
    loaded = clap_ppo.load_clap(str(file), world.pipeline.tokenizer)
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        v.numel() for k, v in loaded.named_parameters() if k in state) > 190e6
    file.rename(tmp_path / "630k.pt")
    with pytest.raises(UserError, match="does not fit HTSAT-tiny.json: .* and 247 more"):
        clap_ppo.load_clap(str(tmp_path / "630k.pt"), world.pipeline.tokenizer)


@pytest.mark.slow
def test_a_truncated_download_is_refused(real_checkpoint, tmp_path, world):
    """Half a file: one line, not a traceback."""
    data = real_checkpoint.read_bytes()
    (tmp_path / "half.pt").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="half.pt: not a checkpoint of weights; it is damaged"):
        clap_ppo.load_clap(str(tmp_path / "half.pt"), world.pipeline.tokenizer)


@pytest.mark.slow
def test_the_full_size_reward_costs_little_more_than_its_network(real_checkpoint, world):
    """Eight clips of 10 s: at most 1.3 times the bare forward pass of the audio tower."""
    import time
    clap = clap_ppo.load_clap(str(real_checkpoint), world.pipeline.tokenizer)
    clips = 0.1 * torch.randn(8, 480000, generator=seeded(0))

    def seconds(call):
        times = []
        for _ in range(2):
            began = time.perf_counter()
            with torch.no_grad():
                call()
            times.append(time.perf_counter() - began)
        return min(times)

    clap_ppo.clap_reward(clap, clips[:1], 48000, ["wind"])           # warm up, embed the text
    bare = seconds(lambda: clap.audio_branch({"waveform": clips}, None, device="cpu"))
    whole = seconds(lambda: clap_ppo.clap_reward(clap, clips, 48000, ["wind"] * 8))
    assert whole <= 1.3 * bare


def test_a_checkpoint_named_by_its_place_on_the_hub_is_fetched_once(monkeypatch, tmp_path):
    """OWNER/REPO/FILE goes through the hub's cache, which resumes and shows a bar; without network
    the message says what to do. A file of that name comes first."""
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        if repo.startswith("nobody"):
            raise OSError("offline")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    preset = clap_ppo.PRESETS["audioldm"]["clap"]
    assert clap_ppo.find_checkpoint(preset) == tmp_path / "630k-audioset-best.pt"
    assert asked == [("lukewys/laion_clap", "630k-audioset-best.pt")]
    with pytest.raises(UserError, match="nobody/repo/x.pt.*offline.*630k-audioset-best.pt"):
        clap_ppo.find_checkpoint("nobody/repo/x.pt")
    with pytest.raises(UserError, match="x.pt: no such file"):
        clap_ppo.find_checkpoint("x.pt")
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c.pt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert clap_ppo.find_checkpoint("a/b/c.pt") == Path("a/b/c.pt") and len(asked) == 2


@pytest.mark.parametrize("scheduler, settings, complaint", [
    ("DDIMScheduler", {"prediction_type": "v_prediction"}, None),
    ("PNDMScheduler", {"beta_schedule": "scaled_linear", "steps_offset": 1}, None),
    ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}, None),
    ("DDIMScheduler", {"prediction_type": "sample"}, "not the Gaussians"),
    ("DDIMScheduler", {"clip_sample": True}, "not the Gaussians"),
    ("FlowMatchEulerDiscreteScheduler", {}, "not the Gaussians")])
def test_other_schedulers_become_ddim_or_are_refused(tmp_path, scheduler, settings, complaint):
    """The same betas make the same process; a flow, or an x_0 that is clipped, is another one."""
    import diffusers
    import shutil
    shutil.copytree(toy_part("pipeline"), tmp_path / "model")
    changes = settings if "clip_sample" in settings or "Flow" in scheduler else {
        **settings, **({"clip_sample": False} if scheduler == "DDIMScheduler" else {})}
    getattr(diffusers, scheduler)(**changes).save_pretrained(tmp_path / "model/scheduler")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler]
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    if complaint:
        with pytest.raises(UserError, match=f"its {scheduler}.*{complaint}"):
            clap_ppo.load_pipeline(str(tmp_path / "model"), torch.device("cpu"))
    else:
        pipe = clap_ppo.load_pipeline(str(tmp_path / "model"), torch.device("cpu"))
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        assert pipe.scheduler.config.prediction_type == settings.get("prediction_type", "epsilon")


def test_the_micro_batch_is_halved_until_it_fits(capsys):
    """Before the first update, so that no epoch is lost; results do not depend on it."""
    policy, weights = painter_policy()
    real = policy.unet.forward

    def small_memory(latents, *args, **kwargs):
        if len(latents) > limit:
            raise torch.OutOfMemoryError("too much")
        return real(latents, *args, **kwargs)

    policy.unet.forward, limit = small_memory, 20
    clap_ppo.fit_micro_batch(policy, 1.0)
    assert policy.micro_batch == 16 and capsys.readouterr().err.count("out of memory") == 2
    assert all(weight.grad is None for weight in weights)
    limit = 0
    with pytest.raises(UserError, match="not even one clip"):
        clap_ppo.fit_micro_batch(policy, 1.0)


def test_gradient_checkpointing_changes_memory_and_nothing_else(world):
    """The same gradient; refused for AudioLDM2's U-Net, which would lose its masks."""
    grads = []
    for on in (False, True):
        policy = copy.deepcopy(world.policy)
        if on:
            policy.unet.enable_gradient_checkpointing()
        _, rows = roll(policy, world.cfg, starts=(0, 1))
        log_prob, _, _ = clap_ppo.replay(policy, rows, torch.arange(4), world.cfg)
        log_prob.mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.unet.parameters()
                                if p.requires_grad]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-8)
    policy = dataclasses.replace(painter_policy()[0])
    policy.unet = Painter(2)
    with pytest.raises(UserError, match="--gradient-checkpointing"):
        clap_ppo.make_optimizer(policy, config("--gradient-checkpointing"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rollouts_replay_on_policy(world, dtype):
    """The U-Net in half precision, the policy's maths in float32: the ratio stays within its
    tolerance, although rollout and replay call the network with other batches."""
    if dtype == "float16" and not torch.cuda.is_available():
        pytest.skip("float16 autocast needs a GPU")
    policy = dataclasses.replace(copy.deepcopy(world.policy), dtype=getattr(torch, dtype))
    _, rows = roll(policy, world.cfg, starts=(0, 2))
    update_once(policy, rows, world.cfg)


@pytest.mark.parametrize("preset, millions", [("audioldm", 185), ("audioldm2", 347)])
def test_the_bench_builds_the_published_architectures(preset, millions):
    """The number of parameters of the U-Net is the published one."""
    pipeline, _ = module("bench").build_pipeline(preset, 2, torch.device("meta"))
    assert round(sum(p.numel() for p in pipeline.unet.parameters()) / 1e6) == millions
    assert clap_ppo.PRESETS[preset]["num_steps"] == 20


@pytest.mark.slow
def test_the_bench_says_what_an_epoch_costs():
    """A small epoch of the toy; the overhead is a ratio, so at least about 1."""
    done = subprocess.run(
        [sys.executable, str(HERE / "samples/bench.py"), "--micro-batches", "8", "--",
         "--num-steps", "5", "--prompts-per-epoch", "2", "--clips-per-prompt", "4"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"micro-batch +(\d+): epoch .*rollout .*update .*overhead ([\d.]+)",
                       done.stdout)
    assert [size for size, _ in found] == ["8"]
    assert all(0.8 < float(overhead) < 5 for _, overhead in found)


def test_the_prompts_for_real_models_are_many_and_different():
    """150 to train on and 50 held out, none in both, of one to four sounds."""
    cfg = config("--prompts", str(HERE / "samples/audiocaps_style_prompts.txt"))
    train, held_out = clap_ppo.split_prompts(cfg)
    assert len(train) == 150 and len(held_out) == 50 and not set(train) & set(held_out)


# =================================================================================================
# 11. Kill it, starve it, feed it nonsense
# =================================================================================================

def start(*flags) -> subprocess.Popen:
    """The real script in a process of its own."""
    return subprocess.Popen([sys.executable, str(HERE / "clap_ppo.py"), *map(str, flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)


def kill_at_random_moments(run_flags, run: Path, kills: int, seed: int) -> None:
    """Starts a run, kills it without warning after a random time, resumes it, and so on; then lets
    it end. Moments lie between the first line of output and some seconds after it."""
    moments = seeded(seed)
    flags = [*run_flags, "--out", run]
    for _ in range(kills):
        process = start(*flags)
        process.stdout.readline()                       # loaded; the run directory exists
        try:
            process.wait(timeout=float(4 * torch.rand(1, generator=moments)))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        flags = ["--resume", run]
        if process.returncode == 0:
            break
    out, err = (process := start("--resume", run)).communicate()
    assert process.returncode == 0, err[-2000:]


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bytes(run_flags, straight_run, tmp_path):
    """SIGKILL, which no program can catch. The adapter, every logged figure but the wall time, and
    the evaluation are those of the run that was left alone."""
    kill_at_random_moments(run_flags, tmp_path / "run", kills=1, seed=1)
    assert results(tmp_path / "run") == straight_run


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_thirty_kills_change_nothing(run_flags, straight_run, tmp_path, seed):
    """Three kills in each of ten runs."""
    kill_at_random_moments(run_flags, tmp_path / "run", kills=3, seed=100 + seed)
    assert results(tmp_path / "run") == straight_run


@pytest.mark.slow
def test_a_signal_stops_the_run_and_says_how_to_go_on(run_flags, tmp_path):
    """SIGTERM, as a cluster sends it: exit code 143, one line, and what is on disk resumes."""
    process = start(*run_flags, "--out", tmp_path / "run")
    while not process.stdout.readline().startswith("epoch 1/"):
        assert process.poll() is None
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143 and "--resume" in err and "Traceback" not in err
    assert not (tmp_path / "run/evaluation.json").exists()


def test_ctrl_c_has_the_exit_code_of_its_signal(monkeypatch, capsys):
    """130 is 128 + SIGINT; a second signal finds the system's own handler and kills."""
    import signal

    def interrupted(*args):
        clap_ppo.stop(signal.SIGINT, None)

    before = signal.getsignal(signal.SIGINT)
    try:
        monkeypatch.setattr(clap_ppo, "run", interrupted)
        code, err = run_main(capsys, "--prompts", "x.txt")
        assert code == 130 and "--resume" in err
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_processes_cannot_work_on_one_run(tmp_path):
    """The lock is the system's: it goes with the process that held it, so it is never stale."""
    with clap_ppo.locked(tmp_path):
        with pytest.raises(UserError, match="another process is working on this run"):
            with clap_ppo.locked(tmp_path):
                pass
    with clap_ppo.locked(tmp_path):
        pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "checkpoint.pt.tmp"),
                                   RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing(
        run_flags, straight_run, tmp_path, capsys, monkeypatch, error):
    """In the second epoch the checkpoint cannot be written. The first one's is intact, and the run
    resumes from it to the same bytes."""
    run, real, calls = tmp_path / "run", torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        code, err = run_main(capsys, *run_flags, "--out", run)
    assert code == 2 and len(err.splitlines()) == 1
    assert "checkpoint.pt" in err and "--resume" in err
    assert torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert run_main(capsys, "--resume", run)[0] == 0
    assert results(run) == straight_run


@pytest.fixture(scope="module")
def cut_run(run_flags, tmp_path_factory):
    """A run of one epoch, to be resumed under bad conditions."""
    run = tmp_path_factory.mktemp("cut") / "run"
    assert clap_ppo.main([*run_flags, "--epochs", "1", "--out", str(run)]) == 0
    return run


def damaged(cut_run: Path, folder: Path) -> Path:
    import shutil
    shutil.copytree(cut_run, folder / "run")
    return folder / "run"


def test_a_run_whose_prompts_changed_is_not_resumed(cut_run, tmp_path, capsys):
    """Other prompts would make another run; the file that vanished is named."""
    run = damaged(cut_run, tmp_path)
    kept = json.loads((run / "prompts.json").read_text())
    (run / "prompts.json").write_text(json.dumps({**kept, "train": kept["train"][1:]}))
    code, err = run_main(capsys, "--resume", run)
    assert code == 2 and "prompt files have changed" in err and len(err.splitlines()) == 1
    cfg = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**cfg, "prompts": str(tmp_path / "gone.txt")}))
    code, err = run_main(capsys, "--resume", run)
    assert code == 2 and "gone.txt" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"half a checkp", pickle.dumps([1, 2]), [1, 2], {"a": 1}],
                         ids=["empty", "half", "pickle", "a list", "another dictionary"])
def test_a_damaged_run_checkpoint_is_refused(cut_run, tmp_path, capsys, content):
    """It is not overwritten either."""
    run = damaged(cut_run, tmp_path)
    if isinstance(content, bytes):
        (run / "checkpoint.pt").write_bytes(content)
    else:
        torch.save(content, run / "checkpoint.pt")
        content = (run / "checkpoint.pt").read_bytes()
    code, err = run_main(capsys, "--resume", run, "--epochs", 2)
    assert code == 2 and "checkpoint.pt: damaged" in err and len(err.splitlines()) == 1
    assert (run / "checkpoint.pt").read_bytes() == content


@pytest.mark.parametrize("change", [
    {"epochs": "ten"}, {"eta": None}, {"shared_noise": "yes"}, {"epochs": -1}, {"seed": 1.5},
    {"noise_window": 2}, {"unknown": 1}, {"prompts": ["a"]}], ids=str)
def test_a_damaged_config_is_refused(cut_run, tmp_path, capsys, change):
    """Wrong types, wrong values, unknown names: one line."""
    run = damaged(cut_run, tmp_path)
    cfg = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**cfg, **change}))
    code, err = run_main(capsys, "--resume", run)
    assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in err


def test_a_malicious_run_or_model_does_not_execute(cut_run, prompt_file, tmp_path, capsys):
    """Somebody else's run directory, or model folder with pickled weights."""
    import shutil
    run = damaged(cut_run, tmp_path)
    torch.save({"epoch": 1, "gift": Malice(tmp_path / "pwned")}, run / "checkpoint.pt")
    assert run_main(capsys, "--resume", run)[0] == 2
    model = tmp_path / "model"
    shutil.copytree(toy_part("pipeline"), model)
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        for file in (model / part).glob("*.safetensors"):
            file.unlink()
        name = "pytorch_model" if part == "text_encoder" else name
        torch.save({"weight": Malice(tmp_path / "pwned")}, model / part / f"{name}.bin")
    code, err = run_main(capsys, "--prompts", prompt_file, "--model", model, "--out",
                         tmp_path / "new")
    assert code == 2 and "--model" in err and "Traceback" not in err
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "new").exists()


def test_flags_that_change_no_result_may_change_on_resume(cut_run, tmp_path, capsys):
    """Epochs, micro-batch and device."""
    run = damaged(cut_run, tmp_path)
    assert run_main(capsys, "--resume", run, "--micro-batch", 4, "--device", "cpu")[0] == 0
    code, err = run_main(capsys, "--resume", run, "--lora-rank", 4)
    assert code == 2 and "--lora-rank cannot change" in err


NUMBERS = [f for f in dataclasses.fields(clap_ppo.Config) if f.metadata["limits"]]


@pytest.mark.parametrize("value", ["below", "above", "nan", "-inf"])
@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_every_number_has_limits_and_names_them(tmp_path, capsys, monkeypatch, field, value):
    """One line with flag, value and the range that works; nothing is loaded or written."""
    low, high = field.metadata["limits"]
    step = 1 if field.type is int else 1e-9
    text = {"below": low - step, "above": high + step if field.type is int else 1.01 * high + 1}
    given = str(text.get(value, value))
    flag = "--" + field.name.replace("_", "-")
    complaint = f"{flag} .*use {re.escape(str(low))} to {re.escape(str(high))}"
    if field.type is int and value not in text:
        complaint = f"{flag}: invalid int value: '{given}'.*--help"
    refused(capsys, tmp_path, monkeypatch, ["--prompts", "x", f"{flag}={given}"], complaint)


@pytest.mark.parametrize("flags, complaint", [
    (["--device", "tpu"], "--device tpu.*cpu or auto"),
    (["--preset", "stable-audio"], "--preset.*stable-audio.*audioldm2.*--help"),
    (["--no-such-flag"], "no-such-flag.*--help"),
    (["--device", "cuda:99"], "--device cuda:99.*cpu or auto"),
    (["--device", ""], "--device .*cpu or auto"),
    (["--clap", "nowhere.pt"], "--clap nowhere.pt: no such file"),
    (["--clap", "."], "--clap .: no such file"),
    (["--judge", "."], "--judge ."),
    (["--model", "."], "--model .: no model_index.json"),
    (["--noise-window", ""], "--noise-window"),
    (["--noise-window", "-1"], "--noise-window"),
    (["--noise-window", "1.5"], "--noise-window"),
    (["--noise-window", "\u00b2"], "--noise-window"),
    (["--eval-prompts", "gone.txt"], "gone.txt"),
    (["--out", "/proc/no/run"], "--out /proc/no/run"),
    (["--out", "/dev/null"], "--out /dev/null: exists"),
    (["--out", "/dev/null/run"], "--out /dev/null/run"),
    (["--out", "x" * 300], "--out x.*name too long"),
    (["--resume", ""], "--prompts.*missing|exists"),
], ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "")
def test_what_cannot_be_found_or_made_is_named(prompt_file, tmp_path, capsys, monkeypatch, flags,
                                               complaint):
    """Devices, files and folders: one line, no traceback, nothing written."""
    given = [] if flags[0] == "--resume" else ["--prompts", prompt_file, *TOY_FLAGS, *TINY]
    refused(capsys, tmp_path, monkeypatch, [*given, *flags], f"(?i){complaint}")


def test_any_bytes_are_prompts_or_one_line(tmp_path, capsys):
    """500 random files, from noise to almost prompts: clean prompts, or a UserError."""
    generator = np.random.default_rng(0)
    alphabet = ["a dog", "#", "\n", "\r\n", "\0", "\ufeff", "\u2028", " ", "\t", "\x0b", "\u0301"]
    for _ in range(500):
        if generator.random() < 0.3:
            data = generator.bytes(int(generator.integers(0, 60)))
        else:
            data = "".join(generator.choice(alphabet, generator.integers(0, 20))).encode()
        (tmp_path / "p.txt").write_bytes(data)
        try:
            prompts = clap_ppo.read_prompts(str(tmp_path / "p.txt"))
        except UserError as error:
            assert "p.txt" in str(error) and len(str(error).splitlines()) == 1
            continue
        for prompt, line in prompts.items():
            assert prompt == " ".join(prompt.split()) and prompt[0] != "#" and "\0" not in prompt
            assert re.search(r"line \d+$", line)


def test_saving_costs_little(world, tmp_path):
    """Under 2 % of an epoch of the default run, which takes some four seconds on two cores."""
    import time
    state = clap_ppo.adapter_state(world.policy.unet)
    metrics = [{"epoch": i, "reward": 0.1} for i in range(60)]
    began = time.perf_counter()
    clap_ppo.save_checkpoint(tmp_path, world.policy.unet, world.optimizer, epoch=1, updates=1,
                             best={"adapter": state}, average=state, metrics=metrics)
    assert time.perf_counter() - began < 0.08


# =================================================================================================
# 12. Every number has an owner
# =================================================================================================

README = (HERE / "README.md").read_text()
EXPERIMENTS = module("experiments")
ROWS = EXPERIMENTS.read_rows()


def percent(share: float) -> str:
    return f"{100 * share:.0f}"


def measured_claims() -> list[str]:
    """What the README says in running text, with its numbers computed from the committed rows, the
    configuration and the files they are about."""
    runs, cfg = EXPERIMENTS.runs_of(ROWS, "defaults"), clap_ppo.Config()
    long_cfg, short = (clap_ppo.parse_args(["--prompts", "p", *flags.split()])[0] for flags in
                       (EXPERIMENTS.EXPERIMENTS["long"][2], EXPERIMENTS.SHORT))

    def mean(side, metric):
        return sum(run[side][metric]["value"] for run in runs) / len(runs)

    def falls(metric):
        found = sorted(1 - r["tuned"][metric]["value"] / r["base"][metric]["value"] for r in runs)
        return f"{percent(found[0])} to {percent(found[-1])} %"

    def clock(seconds):
        return f"{round(seconds) // 60}:{round(seconds) % 60:02}"

    costs = [row for row in ROWS if row["name"] == "cost" and "wall_seconds" in row]
    walls = sorted(row["wall_seconds"] for row in costs)
    preference = sum(run["preference"]["value"] for run in runs) / len(runs)
    loudness = max(abs(run["tuned_minus_base"]["loudness"]["value"]) for run in runs)
    train, held_out = (len(clap_ppo.read_prompts(str(HERE / f"samples/{name}.txt")))
                       for name in ("prompts", "eval_prompts"))
    real, real_held_out = (len(clap_ppo.read_prompts(str(HERE / f"samples/{name}.txt"))) for name in
                           ("audiocaps_style_prompts", "eval_audiocaps_style_prompts"))
    unseen, seen = held_out_pairs()
    assert len(runs) == 5 and len(costs) == 6 and walls[-1] < 360          # "five", "under six"
    assert min(run["tuned_minus_base"]["recognition"]["low"] for run in runs) > 0
    assert long_cfg.epochs == 10 * cfg.epochs
    wrong = re.search(r"WRONG_CAPTIONS = ([\d.]+)", (HERE / "samples/make_toy.py").read_text())[1]
    return [
        f"of {percent(mean('base', 'recognition'))} % of its clips before and "
        f"{percent(mean('tuned', 'recognition'))} % after",
        f"took {clock(walls[0])} to {clock(walls[-1])} minutes",
        f"at most {max(row['peak_gib'] for row in costs):.1f} GiB of memory",
        f"{held_out} held-out prompts, {cfg.eval_noises} clips of each",
        f"all {held_out} (chance is {100 / held_out:.1f} %)",
        f"in {100 * preference:.1f} % of pairs", f"within {loudness:.1f} dB",
        f"falls*, by {falls('diversity')}", f"it falls by {falls('diversity_right')}",
        f"draws {cfg.prompts_per_epoch} prompts", f"a window of {cfg.window} consecutive",
        f"makes {cfg.clips_per_prompt} clips of each prompt", f"Every {cfg.judge_every} epochs",
        f"{short.epochs} epochs instead of {cfg.epochs}",
        f"asked every {long_cfg.judge_every} epochs",
        f"{percent(float(wrong))} % of the captions that the U-Net learned from are wrong",
        f"holds {train} training prompts", f"`samples/eval_prompts.txt` {held_out} held-out ones",
        f"{percent(len(unseen - seen) / len(unseen))} % of the pairs of events",
        f"has {real} prompts", f"{real_held_out} more in the file beside it", *lessons(runs)]


def lessons(runs: list[dict]) -> list[str]:
    """The README's conclusions from the experiments, with their numbers."""
    def recognised(row, side="tuned"):
        return row[side]["recognition"]["value"]

    best = {row["n"]: row["recognition"]["value"] for row in ROWS if row["name"] == "best-of-n"}
    tuned = sum(map(recognised, runs)) / len(runs)
    assert abs(tuned - best[2]) < 0.05 and tuned < best[4]             # "about as often", "less"
    guided = {name: recognised(EXPERIMENTS.runs_of(ROWS, name)[0], "base")
              for name in ("guidance", "ddpo")}
    long = [row for row in ROWS if row["name"] == "long" and "epoch" in row]
    kept, last = max(long, key=lambda row: row["judge_score"]), long[-1]
    assert last["rollout_reward"] < kept["rollout_reward"] and last["reward"] < kept["reward"]
    calls = runs[0]["clips"]

    def gains(name):
        return [EXPERIMENTS.gain(run, "judge_score") for run in EXPERIMENTS.runs_of(ROWS, name)]

    def seconds(name):
        return np.mean([run["seconds"] for run in EXPERIMENTS.runs_of(ROWS, name)])

    def differs(name):
        against = EXPERIMENTS.spread([a - b for a, b in zip(gains(name), gains("short"))], 4)
        mean, half = map(float, against.split(" ± "))
        return abs(mean) > half

    for name in ("all-steps", "all-steps-5", "all-steps-2", "rank-1", "full", "regression",
                 "regression-slow"):
        assert all(a < b for a, b in zip(gains(name), gains("short"))), f"{name}: in each seed"
    assert 1.8 < seconds("all-steps") / seconds("short") < 2.5              # "twice the time"
    assert max(np.mean(gains(name)) for name in ("regression", "regression-slow")) < 0.01
    assert max(np.mean(gains(name)) for name in ("guidance", "ddpo")) < 0.02
    alike = ("sum", "global", "no-clipping", "kl-0.01", "kl-0.1", "rank-4", "rank-16", "own-noise",
             "group-2", "group-4", "group-8")
    assert [name for name in alike if differs(name)] == []
    assert np.mean(gains("last-step")) == pytest.approx(np.mean(gains("all-steps-5")), abs=0.02)
    assert min(gains("group-2")) > 0
    flags = {name: clap_ppo.parse_args(["--prompts", "p", *value[2].split()])[0]
             for name, value in EXPERIMENTS.EXPERIMENTS.items()}
    assert flags["full"].learning_rate == clap_ppo.Config().learning_rate / 10
    wide = flags["wide"]
    hours = sum(row.get("seconds", 0) for row in ROWS if row["name"] not in ("defaults", "bench")
                ) / 3600
    return [
        f"{flags['short'].epochs * flags['short'].clips_per_epoch:,} clips",
        f"whose guidance is {flags['ddpo'].guidance_scale:g}",
        f"meant for {16384 // elements('toy')} times as many",
        f"*Rank {flags['rank-1'].lora_rank}, and", f"LoRA of rank {flags['short'].lora_rank} in",
        f"ranks {flags['rank-4'].lora_rank} and {flags['rank-16'].lora_rank} made no",
        f"took {hours:.1f} hours of one core",
        f"weights of {flags['kl-0.01'].kl_weight:g} and {flags['kl-0.1'].kl_weight:g}",
        f"groups of {flags['group-2'].clips_per_prompt} learned",
        f"with {wide.prompts_per_epoch} prompts x {wide.clips_per_prompt} clips (seed 0)",
        f"recognition {recognised(EXPERIMENTS.runs_of(ROWS, 'wide')[0]):.2f} against "
        f"{recognised(runs[0]):.2f}",
        "as the best of 2 of the base", "less often than the best of 4",
        f"{calls:,} reward calls", f"the best of {calls // 160} is what",
        f"{guided['guidance']:.2f} of the clips are recognised at scale 2, "
        f"{guided['ddpo']:.2f} at scale 5",
        f"best is epoch {kept['epoch']}",
        f"keeps (recognition {kept['held_out']['recognition']:.2f})",
        f"fewer clips are recognised ({last['held_out']['recognition']:.2f}) than of the base "
        f"model ({recognised(EXPERIMENTS.runs_of(ROWS, 'long')[0], 'base'):.2f})",
        f"at {len(EXPERIMENTS.alarms(ROWS))} of the {len(long)} questions"]


def preset_lines() -> list[str]:
    """The README's table of presets: sizes from the architectures, the rest from the presets."""
    bench, sizes = module("bench"), {}
    for preset in ("audioldm", "audioldm2"):
        pipeline, _ = bench.build_pipeline(preset, 2, torch.device("meta"))
        sizes[preset] = [sum(p.numel() for p in getattr(pipeline, part).parameters())
                         for part in ("unet", "vae", "vocoder")]
    sizes_of_clap = clap_ppo.package_folder() / "clap_module/model_configs/HTSAT-tiny.json"
    clap = clap_ppo.build_clap(json.loads(sizes_of_clap.read_text()))
    clap_size = sum(p.numel() for p in clap.parameters())
    from safetensors import safe_open
    unet = HERE / "samples/toy/pipeline/unet/diffusion_pytorch_model.safetensors"
    with safe_open(unet, "pt") as file:
        toy = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    lines = []
    for preset, values in clap_ppo.PRESETS.items():
        cfg = clap_ppo.Config(**values)
        model, size, weights = "bundled", f"{toy / 1e6:.1f} M", ""
        if preset in sizes:
            model, size = f"`{cfg.model}`", f"{sizes[preset][0] / 1e6:.0f} M"
            weights = f" {4 * (sum(sizes[preset]) + clap_size) / 1e9:.1f} GB"
        lines.append(f"| `{preset}` | {model} | {size} | {cfg.num_steps} | {cfg.guidance_scale:g} |"
                     f"{weights} |")
    return [*lines, f"U-Net of {toy / 1e6:.1f} M parameters"]


# Text with numbers that are no measurement, and the test that fails when the code says otherwise.
OWNED = {
    "Python 3.11 or 3.12": "test_every_requirement_is_used",
    "brackets are 95 % intervals, by bootstrap": "test_the_bootstrap_interval_is_that_of_a_mean",
    "± is a 95 % t-interval over seeds": "test_the_intervals_over_seeds_are_students",
    "± is a 95 % t-interval over the seeds": "test_the_intervals_over_seeds_are_students",
    "where an interval contains 0": "test_the_intervals_over_seeds_are_students",
    r"""\sigma_t = \eta \sqrt{\frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}}
    \sqrt{1-\frac{\bar\alpha_t}{\bar\alpha_{t-1}}}, \qquad
    \mu_t = \sqrt{\bar\alpha_{t-1}}\,\hat x_0 + \sqrt{1-\bar\alpha_{t-1}-\sigma_t^2}\;"""
    r"\epsilon_\theta(x_t)": "test_a_step_and_its_log_prob_agree_with_diffusers_and_torch",
    r"""\log \pi(x_{t-1} \mid x_t) = \frac{1}{D}\sum_d
    \left[-\frac{(x_{t-1}-\mu_t)_d^2}{2\sigma_t^2} - \log\sigma_t - \tfrac12\log 2\pi\right]""":
    "test_a_step_and_its_log_prob_agree_with_diffusers_and_torch",
    r"$\eta = 0$": "test_without_eta_there_is_no_noise_and_eta_scales_it",
    r"$`\rho = \pi_\theta(x_{t-1} \mid x_t) / \pi_\mathrm{old}(x_{t-1} \mid x_t)`$":
    "test_every_epoch_of_a_run_begins_with_ratio_one",
    r"L = -\,\mathbb{E}\left[\min\left(\rho A,\ \mathrm{clip}(\rho, 1-\varepsilon, "
    r"1+\varepsilon)\,A\right)\right]":
    "test_clipping_stops_what_went_far_enough_and_nothing_else",
    r"so $\rho$ must be 1;": "test_every_epoch_of_a_run_begins_with_ratio_one",
    "what would make the ratio differ from 1?": "test_every_epoch_of_a_run_begins_with_ratio_one",
    "Sections 1 and 2 of `clap_ppo.py` need torch only":
    "test_sections_one_and_two_need_nothing_but_torch",
    "`spread` near 0": "test_groups_whose_clips_score_alike_are_left_out",
    "(`clipped` near 1)": "test_clipping_stops_what_went_far_enough_and_nothing_else",
    "the ratio ... is off 1": "test_a_broken_replay_stops_the_run_and_names_the_cause",
}
# Names that contain digits, and the terms of licences.
NAMES = ["AudioLDM2", "runs/toy-1", "float32", "bfloat16", "630k-audioset-best.pt",
         "music_audioset_epoch_15_esc_90.14.pt", "CC BY-NC-SA 4.0", "CC0", "Apache 2.0"]


def without(text: str, part: str) -> tuple[str, bool]:
    """`text` with every occurrence of `part` taken out, however its lines are broken; and whether
    there was one. A number at the end of `part` must end there."""
    pattern = r"\s+".join(map(re.escape, part.split()))
    pattern = (r"(?<![\d.])" if part[0].isdigit() else "") + pattern
    pattern += r"(?![\d.]*\d)" if part[-1].isdigit() else ""
    text, count = re.subn(pattern, " ", text)
    return text, count > 0


def unowned(readme: str, claims: list[str]) -> list[str]:
    """What a README says that nothing vouches for: stale tables, claims that are not (or no longer)
    true, and digits that are left when everything with an owner is taken out."""
    wrong = []
    for name, part in EXPERIMENTS.blocks(ROWS).items():
        block = f"<!-- {name} -->\n{part}\n<!-- /{name} -->\n"
        wrong += [] if block in readme else [f"the table {name!r} is not that of the results"]
        readme = readme.replace(block, "")
    paper = r"\[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/([\d.]+)\)"
    for left, right in re.findall(paper, readme):
        wrong += [] if left == right and left in PAPERS else [f"arXiv {left} or {right}"]
    readme = re.sub(paper, "", readme)
    wrong += [] if EXPERIMENTS.point(readme) == readme else ["a link to a line of clap_ppo.py"]
    readme = re.sub(r"\(clap_ppo\.py#L\d+\)", "", readme)
    readme = re.sub(r"\[section [12]\]", "", readme)
    readme = FENCED.sub(lambda m: m[2] if m[1] == "math" else "", readme)
    minutes = re.findall(r"^\| (\d+) \|", readme, flags=re.M)
    wrong += [] if sum(map(int, minutes)) == 15 else ["the minutes do not add up to fifteen"]
    readme = re.sub(r"^\| \d+ \|", "", readme, flags=re.M)
    steps = re.findall(r"^(\d+)\. ", readme, flags=re.M)
    wrong += [] if steps == list("123456") else [f"steps {steps}"]
    readme = re.sub(r"^\d+\. ", "", readme, flags=re.M)
    for claim in [*claims, *OWNED, *NAMES]:
        readme, found = without(readme, claim)
        wrong += [] if found else [f"not in the README: {claim}"]
    return wrong + [f"nothing vouches for: {line}" for line in readme.splitlines()
                    if re.search(r"\d", line)]


FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.S | re.M)  # commands, examples: run below
PAPERS = {"2010.02502", "2305.13301", "1707.06347", "2211.06687", "2106.09685", "2507.21802",
          "2505.07818", "2507.18071", "2302.12192", "2301.12503", "2308.05734"}


@pytest.fixture(scope="module")
def claims() -> list[str]:
    """All that `unowned` needs; the full-size CLAP is built once to count its parameters."""
    return [*measured_claims(), *preset_lines()]


def test_every_number_in_the_readme_has_an_owner(claims):
    """A table made from `samples/results.jsonl`, a claim computed from it, or a test by name. After
    an experiment or an edit, `samples/experiments.py report` renews tables and line links."""
    assert unowned(README, claims) == []
    tests = {name for name in globals() if name.startswith("test_")}
    assert set(OWNED.values()) <= tests


def test_a_changed_number_in_the_readme_is_noticed(claims):
    """Each number in turn, with 1 added to its last digit: the test above would fail."""
    code = [(m.start(), m.end()) for m in FENCED.finditer(README)
            if m[1] != "math" and not README[:m.start()].endswith("<!-- log -->\n")]
    missed = []
    for number in re.finditer(r"\d+", README):
        if any(start < number.start() < end for start, end in code):
            continue
        end = number.end()
        changed = README[:end - 1] + str((int(README[end - 1]) + 1) % 10) + README[end:]
        if unowned(changed, claims) == []:
            missed.append(README[number.start() - 40:end + 20])
    assert missed == []


def test_the_intervals_over_seeds_are_students():
    """mean ± t s / sqrt(n), as scipy has it."""
    from scipy import stats
    for values in ([0.1, 0.2], [0.1, 0.2, 0.4], [0.1, 0.2, 0.4, 0.3, 0.0]):
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values),
                                     scale=stats.sem(values))
        mean, half = map(float, EXPERIMENTS.spread(values, digits=4).split(" ± "))
        assert (mean - half, mean + half) == pytest.approx((low, high), abs=2e-4)
    assert EXPERIMENTS.spread([0.25]) == "+0.25"


def test_every_experiment_was_run_with_all_its_seeds():
    """No row is missing, none is there twice, each has the flags of its experiment."""
    for name, (_, seeds, flags, _) in EXPERIMENTS.EXPERIMENTS.items():
        runs = EXPERIMENTS.runs_of(ROWS, name)
        assert [run["seed"] for run in runs] == list(range(seeds)), name
        assert {run["flags"] for run in runs} == {flags}, name
    assert [r["n"] for r in ROWS if r["name"] == "best-of-n"] == [1, 2, 4, 8, 16, 44]


def test_every_logged_metric_is_explained(finished_run):
    """The README's table has a line for each key of metrics.jsonl, with the name that the terminal
    shows beside it."""
    explained = {key: short for key, short, _, _ in EXPERIMENTS.METRICS}
    logged = {key for row in finished_run.metrics for key in row}
    assert logged == {*explained, "epoch"}
    line = next(x for x in finished_run.out.splitlines() if "judge" in x and x.startswith("epoch"))
    assert all(f"{short} " in line for short in explained.values() if short)


def test_every_link_in_the_readme_resolves():
    """Files exist, anchors are headings, links into the script hit the function they name."""
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
               for h in re.findall(r"^#+ (.*)$", README, flags=re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 30
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        assert not path or (HERE / path).exists(), link
        if anchor and not path:
            assert anchor in anchors, link
    lines = SOURCE.splitlines()
    for name, number in re.findall(r"\[`(\w+)`\]\(clap_ppo\.py#L(\d+)\)", README):
        assert lines[int(number) - 1].startswith(f"def {name}("), name
    for name, number in re.findall(r"\[section (\d)\]\(clap_ppo\.py#L(\d+)\)", README):
        assert lines[int(number) - 1].startswith(f"# ==== {name}. "), name


SMALL = ["--prompts", "prompts.txt", *TINY, "--epochs", "1"]
CLAP_PPO, PYTHON = [sys.executable, str(HERE / "clap_ppo.py")], [sys.executable]
# Each command of the README, and what runs in its place: the same program with a small budget.
# None: the command of another test (which is named), or of .ci/run.
COMMANDS = {
    "pip install -r requirements.txt": None,                                         # .ci/run
    "pytest test_clap_ppo.py": None,                                                 # .ci/run
    "python clap_ppo.py --prompts samples/prompts.txt": [*CLAP_PPO, *SMALL, "--out", "runs/toy-1"],
    "python clap_ppo.py --resume runs/toy-1":
    [*CLAP_PPO, "--resume", "runs/toy-1", "--epochs", "2"],
    "python clap_ppo.py --prompts samples/audiocaps_style_prompts.txt --preset audioldm": None,
    "python clap_ppo.py --prompts samples/audiocaps_style_prompts.txt --preset audioldm2":
    None,                               # test_real_architectures_run_from_their_folders_on_policy
    "python samples/pool_listeners.py listener-*.json":
    None,                                    # test_the_blind_test_by_keyboard_and_its_rates
    "python samples/experiments.py": [*PYTHON, str(HERE / "samples/experiments.py")],
    "python samples/experiments.py report": None,     # test_every_number_in_the_readme_has_an_owner
    "python samples/bench.py --preset audioldm --device cuda --micro-batches 4 8 16 32":
    None,                                    # test_the_bench_says_what_an_epoch_costs
    "PYTHONPATH=path/to/clap-ppo python loud.py": None,    # test_an_own_reward_in_an_empty_folder
    "python samples/make_toy.py": None,      # test_the_toy_world_is_rebuilt_by_its_script
}


def test_every_command_of_the_readme_runs(prompt_file, tmp_path):
    """In the README's order, in a folder with a prompt file and nothing else."""
    shown = [line for language, block in FENCED.findall(README) if not language
             for line in block.splitlines() if re.match(r"(python|pip|pytest)\b", line)]
    shown += [span.replace("\n", " ") for span in
              re.findall(r"`([^`]*python [^`]*)`", FENCED.sub("", README))]
    assert set(shown) == set(COMMANDS)
    for name in ("prompts.txt", "eval_prompts.txt"):
        (tmp_path / name).write_text(prompt_file.with_name(name).read_text())
    for command in (c for c in COMMANDS.values() if c):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert (tmp_path / "runs/toy-1/index.html").exists()


def python_block(word: str) -> str:
    """The README's Python example that contains `word`."""
    return next(code for language, code in FENCED.findall(README)
                if language == "python" and word in code)


def test_the_step_of_the_readme_works_where_it_is_pasted(tmp_path):
    """A script of its own, in a folder of its own; it prints four log-probs that are plausible: an
    element of a Gaussian has -log(sigma) - log(2 pi e) / 2 nats on average."""
    (tmp_path / "step.py").write_text("import torch; torch.manual_seed(0)\n"
                                      + python_block("gaussian_log_prob"))
    done = subprocess.run([sys.executable, "step.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    shown = [float(x) for x in re.findall(r"-?\d+\.\d+", done.stdout)]
    schedule = clap_ppo.ddim_schedule(__import__("diffusers").DDIMScheduler(), 10)
    sigma = clap_ppo.ddim_sigma(schedule.alpha_bar_t[3], schedule.alpha_bar_prev[3], 1.0).item()
    expected = -math.log(sigma) - 0.5 * math.log(2 * math.pi * math.e)
    assert shown == pytest.approx([expected] * 4, abs=0.1)


def test_an_own_reward_in_an_empty_folder(prompt_file, tmp_path):
    """Copied from the README and run with a small budget. So that no other reward is taken for it,
    100 is added to the loudness; training with it goes on as before."""
    code = python_block("loudness")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    budget = [*TINY, "--epochs", "1", "--eval-prompts",
              str(prompt_file.with_name("eval_prompts.txt"))]
    small = code.replace('"--epochs", "5"', ", ".join(map(repr, budget)))
    small = small.replace(".sqrt()", ".sqrt() + 100")
    assert small.count("100") == 1 and str(budget[-1]) in small
    (tmp_path / "loud.py").write_text(small)
    done = subprocess.run([sys.executable, "loud.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads((tmp_path / "runs/toy-1/metrics.jsonl").read_text().splitlines()[0])
    assert 100 < row["reward"] < 101 and "reward 100" in done.stdout


def test_sections_one_and_two_need_nothing_but_torch(tmp_path):
    """Cut out, with four imports on top, they import and agree with the file they came from."""
    begin, end = (SOURCE.index(f"# ==== {n}. ") for n in (1, 3))
    head = ("import math\nfrom typing import NamedTuple\nimport torch\nfrom torch import Tensor\n")
    (tmp_path / "policy.py").write_text(head + SOURCE[begin:end])
    code = ("import sys, policy, torch; "
            "print(policy.group_advantages(torch.tensor([[1., 2., 3.]])).tolist(), "
            "[m for m in ('diffusers', 'transformers', 'peft', 'clap_ppo') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stderr == "" and done.stdout.startswith("[[-1.22") and done.stdout.endswith("[]\n")


def prose(source: str) -> list[tuple[int, str]]:
    """(line, text) of each comment and of each line of each docstring, doctests left out."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            text = re.sub(r"^ *>>>.*(?:\n *\S.*)*", lambda m: "\n" * m[0].count("\n"),
                          ast.get_docstring(node, clean=False), flags=re.M)
            found += [(node.body[0].lineno + i, x) for i, x in enumerate(text.splitlines())]
    return sorted(found)


def rounding_moves_the_ratio() -> bool:
    """How far x_t rounded to bfloat16 moves a row's ratio, at AudioLDM's last trained step of 20
    and at the second one."""
    schedule, moved = clap_ppo.ddim_schedule(make_scheduler(), 20), []
    latents, noise = torch.randn(2, 16, 8, 128, 16, generator=seeded(0))
    for step in (-2, 1):
        bars = schedule.alpha_bar_t[step], schedule.alpha_bar_prev[step]
        sigma = clap_ppo.ddim_sigma(*bars, 1.0)
        mean = clap_ppo.ddim_mean(noise, latents, *bars, sigma)
        action = mean + sigma * torch.randn(mean.shape, generator=seeded(1))
        rounded = clap_ppo.ddim_mean(noise, latents.bfloat16(), *bars, sigma)
        change = (clap_ppo.gaussian_log_prob(action, rounded, sigma)
                  - clap_ppo.gaussian_log_prob(action, mean, sigma))
        moved.append(f"{change.expm1().abs().mean():.0e}")
    return moved == ["6e-04", "2e-05"] and clap_ppo.Config().clip_range == 1e-4


def widths() -> tuple[float, float]:
    """How much wider AudioLDM's U-Net is than the toy's, at its first and at its last level."""
    toy = json.loads((HERE / "samples/toy/pipeline/unet/config.json").read_text())
    real = module("bench").LEVELS["block_out_channels"]
    return (real[0] / toy["block_out_channels"][0], real[-1] / toy["block_out_channels"][-1])


def elements(preset: str) -> int:
    """D of a preset: the toy's as its run printed it; AudioLDM's has 8 channels and a quarter of
    the 64 mel bands and of the 100 frames per second."""
    if preset == "toy":
        shape = re.search(r"latents \((\d+), (\d+), (\d+)\)", EXPERIMENTS.log_block())
        return math.prod(map(int, shape.groups()))
    return 8 * math.ceil(clap_ppo.Config(**clap_ppo.PRESETS[preset]).seconds * 100 / 4) * 64 // 4


def roberta_megabytes() -> float:
    from transformers import RobertaConfig, RobertaModel
    with torch.device("meta"):
        model = RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514))
    return sum(p.numel() for p in model.parameters()) * 4 / 1e6


# Each number, range and equation in a comment or docstring of clap_ppo.py: a check, or a test.
SCRIPT_OWNED = {
    "(2 of 10)": lambda: (clap_ppo.Config().window, clap_ppo.Config().num_steps) == (2, 10),
    "`--noise-window all --noise-until 1 --no-shared-noise`":
    lambda: config("--noise-window", "all", "--noise-until", "1", "--no-shared-noise"),
    "asserted to be 1": "test_every_epoch_of_a_run_begins_with_ratio_one",
    "t - 1000 // T (for 1000 training steps)":
    "test_a_step_and_its_log_prob_agree_with_diffusers_and_torch",
    "below 0 it arrives": "test_a_step_and_its_log_prob_agree_with_diffusers_and_torch",
    "eta 0 gives 0, eta 1 DDPM's": "test_without_eta_there_is_no_noise_and_eta_scales_it",
    "ratio by 6e-4 at the last step that is trained (2e-5 at early ones), and PPO clips at 1e-4":
    rounding_moves_the_ratio,
    "v = sqrt(abar) eps - sqrt(1 - abar) x_0":
    "test_a_step_and_its_log_prob_agree_with_diffusers_and_torch",
    "rounding at eta 1": "test_a_step_and_its_log_prob_agree_with_diffusers_and_torch",
    "D = 1,024 for the toy's clips and 16,384 for AudioLDM's of 5.12 s":
    lambda: (elements("toy"), elements("audioldm")) == (1024, 16384),
    "where sigma is 0": "test_each_row_has_its_own_sigma_and_one_zero_among_them_is_refused",
    "scale 1 the unconditional pass": "test_guidance_of_one_skips_the_unconditional_pass",
    "its advantages are 0": "test_a_group_without_spread_teaches_nothing",
    "K >= 2": "test_rewards_that_cannot_be_compared_are_refused",
    "K < 2": "test_rewards_that_cannot_be_compared_are_refused",
    "until 1 + clip_range": "test_clipping_stops_what_went_far_enough_and_nothing_else",
    "until 1 - clip_range": "test_clipping_stops_what_went_far_enough_and_nothing_else",
    "the gradient is 0": "test_clipping_stops_what_went_far_enough_and_nothing_else",
    "mean((ratio - 1) - log ratio)": "test_approx_kl_estimates_the_kl_and_is_never_negative",
    "||mean - mean_base||^2 / (2 sigma^2)":
    "test_the_kl_to_the_base_is_the_closed_form_of_two_gaussians",
    "N(mean, sigma^2)": "test_a_step_and_its_log_prob_agree_with_diffusers_and_torch",
    "N(mean(x_t, prompt), sigma_t^2)":
    "test_a_step_and_its_log_prob_agree_with_diffusers_and_torch",
    "exit code 2": "test_a_prompt_file_that_cannot_be_used_is_named_with_its_line",
    "4 to 7 times as wide as the toy's": lambda: [math.floor(x) for x in widths()] == [4, 6],
    "a clip of 5.12 s has latents of D = 16,384": lambda: elements("audioldm") == 16384,
    "at most 200 characters": lambda: len(clap_ppo.first_line(ValueError("x" * 900))) == 200,
    '(2, ...): "", prompt': "test_the_conditions_of_audioldm2_do_not_depend_on_the_batch",
    "(0: all of them)": "test_train_steps_draws_that_many_rows_of_every_clip",
    "500 MB of RoBERTa": lambda: round(roberta_megabytes(), -1) == 500,
    "waveforms (N, samples) in [-1, 1]": "test_a_clip_scores_the_same_alone_in_any_batch_and_twice",
    "on the CPU in [-1, 1]": "test_the_decoder_gives_waveforms_in_range",
    "Cosine similarity in [-1, 1]": "test_each_clip_is_scored_against_its_own_prompt",
    "Largest |ratio - 1|": "test_a_broken_replay_stops_the_run_and_names_the_cause",
    "(chance 1/M)": "test_a_judge_that_always_hears_the_prompt_has_a_recognition_of_one",
    "(below -60 dBFS)": "test_diversity_loudness_and_broken_clips_mean_what_they_say",
    "(1 % of samples at full scale)": "test_diversity_loudness_and_broken_clips_mean_what_they_say",
    "95 % percentile bootstrap": "test_the_bootstrap_interval_is_that_of_a_mean",
    "95 % Wilson": "test_wilsons_interval_has_its_published_values",
    "with 95 % intervals": "test_wilsons_interval_has_its_published_values",
    "60 dB deep: base64 of 4 bits a cell": "test_the_mel_picture_is_where_the_sound_is",
    "Exit code: 0; 2 after": "test_a_prompt_file_that_cannot_be_used_is_named_with_its_line",
    "128 + signal": "test_ctrl_c_has_the_exit_code_of_its_signal",
    "STEP 1 to 6": "test_the_steps_of_the_docstring_are_those_of_the_code",
}
# What is no number: symbols, types, names, citations.
SYMBOLS = (r"x_0|x_\{t-1\}|x_T|float32|bfloat16|int64|AudioLDM2|GPT2Model|T5|UTF-8|F401|STEP \d|"
           r"Eq\. \d+(?: and \d+)?|\(?\d{4}\.\d{5}\)?|\b(?:19|20)\d\d\b|"
           r"# ==== \d+\.|^ {4}\d\. ")


def test_every_number_in_a_comment_or_docstring_of_the_script_has_an_owner():
    """What is left without symbols and owned phrases has no digit; each owner says yes."""
    text, missing = "\n".join(text for _, text in prose(SOURCE)), []
    for phrase in SCRIPT_OWNED:
        text, found = without(text, phrase)
        missing += [] if found else [phrase]
    assert missing == [], "not in the script"
    text = re.sub(SYMBOLS, " ", text, flags=re.M)
    assert [line for line in text.splitlines() if re.search(r"\d", line)] == []
    for phrase, owner in SCRIPT_OWNED.items():
        assert owner in globals() if isinstance(owner, str) else owner(), phrase
    assert set(re.findall(r"\b\d{4}\.\d{5}\b", SOURCE)) <= PAPERS
    assert re.findall(r"^# ==== (\d+)\.", SOURCE, flags=re.M) == [str(i) for i in range(1, 12)]


def test_the_decoder_gives_waveforms_in_range(world, monkeypatch):
    """Of the length asked for, float32, and clipped where a vocoder is too loud."""
    vocode = world.pipeline.mel_spectrogram_to_waveform
    monkeypatch.setattr(world.pipeline, "mel_spectrogram_to_waveform", lambda mel: 99 * vocode(mel))
    waveforms = clap_ppo.decode(world.pipeline, torch.randn(5, 8, 16, 8), 1.0)
    assert waveforms.shape == (5, 16000) and waveforms.dtype == torch.float32
    assert waveforms.max() == 1 and waveforms.min() == -1


def documented_shapes(function) -> dict[str, tuple[str, ...]]:
    """{argument: its symbols} as the docstring has them, "latents (B, C, H, W)"; and "return"."""
    text = " ".join((function.__doc__ or "").split())
    shape = r"\(((?:[A-Z]\w*|samples|b)(?:, (?:[A-Z]\w*|samples))*),?\)"
    arguments = function.__code__.co_varnames[:function.__code__.co_argcount]
    found = {}
    for names, symbols in re.findall(r"((?:\w+, )*\w+):? " + shape, text):
        for name in names.split(", "):
            if name in arguments:
                found[name] = tuple(symbols.split(", "))
    for symbols in re.findall(r"Returns: " + shape, text):
        found["return"] = tuple(symbols.split(", "))
    return found


def test_the_shapes_in_the_docstrings_are_those_of_a_run(prompt_file, tmp_path, monkeypatch):
    """Every function whose docstring gives shapes is watched during a small run. Within a call a
    symbol stands for one size; a scalar may stand where "(B,) or scalar" is written."""
    checked, wrong = set(), []

    def watch(name, function):
        shapes = documented_shapes(inspect.unwrap(function))
        names = inspect.unwrap(function).__code__.co_varnames

        def watched(*args, **kwargs):
            result = function(*args, **kwargs)
            values = {**dict(zip(names, args)), **kwargs, "return": result}
            sizes = {}
            for argument, symbols in shapes.items():
                value = values.get(argument)
                if not isinstance(value, torch.Tensor) or (value.dim() == 0 and len(symbols) == 1):
                    continue
                checked.add((name, argument))
                if len(value.shape) != len(symbols) and "..." not in symbols:
                    wrong.append((name, argument, symbols, tuple(value.shape)))
                for symbol, size in zip(symbols, value.shape):
                    if sizes.setdefault(symbol, size) != size:
                        wrong.append((name, argument, symbols, tuple(value.shape)))
            return result
        return watched

    for name, function in list(vars(clap_ppo).items()):
        if inspect.isfunction(function) and documented_shapes(inspect.unwrap(function)):
            monkeypatch.setattr(clap_ppo, name, watch(name, function))
    assert clap_ppo.main(["--prompts", str(prompt_file), *TOY_FLAGS, *TINY, "--epochs", "1",
                          "--kl-weight", "0.1", "--guidance-scale", "2", "--clips-per-prompt", "3",
                          "--out", str(tmp_path / "run")]) == 0
    assert wrong == []
    assert len(checked) > 25 and len({name for name, _ in checked}) > 10, sorted(checked)


def test_the_parts_that_experiments_replace_are_what_they_are_called(monkeypatch):
    """The sum is D means; global advantages have one mean and deviation; the last step's rows are
    added, and they replay with ratio 1; with all weights disabled the network is the base."""
    x, mean = torch.randn(2, 3, *Painter.SHAPE, generator=seeded(0))
    torch.testing.assert_close(EXPERIMENTS.sum_log_prob(x, mean, 0.5), Normal(mean, 0.5).log_prob(x)
                               .flatten(1).sum(dim=1))
    found = EXPERIMENTS.global_advantages(torch.tensor([[0.0, 1.0], [4.0, 5.0]]))
    assert found.shape == (2, 2) and found[0].max() < 0 < found[1].min()
    policy, _ = painter_policy(adapter_noise=0.2)
    cfg = config("--num-steps", "10", "--noise-window", "all", "--noise-until", "1")
    assert roll(policy, cfg, starts=(0, 0))[1]["step"].max() == 8
    monkeypatch.setattr(clap_ppo, "rollout", EXPERIMENTS.rollout_with_last_step)
    latents, rows = roll(policy, cfg, starts=(0, 0))
    last = (rows["step"] == 9).nonzero().flatten()
    assert len(rows["step"]) == 80 and len(last) == 8
    torch.testing.assert_close(rows["next_latents"][last], latents[rows["clip"][last]])
    with torch.no_grad():
        log_prob, _, _ = clap_ppo.replay(policy, rows, torch.arange(80), cfg)
    torch.testing.assert_close(log_prob, rows["log_prob"], atol=1e-6, rtol=0)


def test_all_weights_can_be_trained_and_switched_off():
    """In place of LoRA: every parameter is trained, and the base model is there when asked for."""
    unet = Painter(2)
    weights, before = EXPERIMENTS.all_weights(unet, 8), unet.to_q.weight.detach().clone()
    assert {id(w) for w in weights} == {id(p) for p in unet.parameters()}
    weights[0].data += 1
    with EXPERIMENTS.all_weights_disabled(unet):
        assert torch.equal(unet.to_q.weight, before)
    assert torch.equal(unet.to_q.weight, before + 1)


def test_reward_weighted_regression_moves_towards_the_better_clips():
    """Of two clips, all +1 and all -1, the model learns the one with the larger advantage."""
    rows = {"latents": torch.stack([torch.ones(Painter.SHAPE), -torch.ones(Painter.SHAPE)]),
            "clip": torch.arange(2), "prompt_id": torch.tensor([0, 0])}
    cfg = config("--passes", "20", "--updates-per-epoch", "1", "--learning-rate", "0.05",
                 "--warmup-updates", "0")
    means = []
    for sign in (1, -1):
        policy, weights = painter_policy()
        rows["advantage"] = sign * torch.tensor([2.0, -2.0])
        EXPERIMENTS.regression_update(policy, torch.optim.Adam(weights), rows, cfg, 0, seeded(0))
        clip = clap_ppo.sample(policy, torch.tensor([0]), torch.zeros(1, *Painter.SHAPE))
        means.append(clip.mean().item())
    assert means[0] > means[1] + 0.5


@pytest.mark.slow
def test_every_experiment_runs_resumes_and_adds_its_rows_once(prompt_file, tmp_path, monkeypatch):
    """With one epoch of two prompts each; a second call, also after a cut, adds nothing twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EXPERIMENTS, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(EXPERIMENTS, "PROMPTS", str(prompt_file))
    small = " ".join([*TINY, "--epochs", "1", "--num-steps", "10"])
    for name, (title, _, flags, parts) in EXPERIMENTS.EXPERIMENTS.items():
        last = " --train-steps 0" if "--train-steps" not in flags else ""
        flags = f"{flags} {small}{last}".replace("--noise-window 2 --noise-until 1", "")
        monkeypatch.setitem(EXPERIMENTS.EXPERIMENTS, name, (title, 1, flags.strip(), parts))
    names = list(EXPERIMENTS.EXPERIMENTS)
    for name in names:
        EXPERIMENTS.main([name])
    rows = EXPERIMENTS.read_rows()
    assert [r["name"] for r in rows if "tuned" in r] == names
    (tmp_path / "results.jsonl").write_text("")
    EXPERIMENTS.main(names)
    assert EXPERIMENTS.read_rows() == rows
