"""Chapter two: what `clap_ppo.py` claims, tried out. Read it after the script, from top to bottom.

    pytest test_clap_ppo.py                 # nearly everything, under three minutes on two cores
    pytest test_clap_ppo.py -k clipping     # one chapter, by a word in its tests' names
    pytest test_clap_ppo.py -m slow         # full-size CLAP, a killed process

A claim about a sampler, a loss or a reward is worth what an independent reference says of it: here
diffusers' own DDIM step, torch.distributions, REINFORCE by hand, a pipeline that has never heard of
this script. Where a model is needed for the argument only, `Painter` is it, a network of one matrix
of which every number can be foreseen; else it is the bundled toy setup, with budgets of seconds.
"""

import argparse
import contextlib
import copy
import dataclasses
import doctest
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
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
TOY = HERE / "samples/toy"
sys.path.insert(0, str(HERE / "samples"))
import bench, evaluate, experiments, make_toy  # noqa: E401, E402

TINY = ["--prompts-per-epoch", "2", "--clips-per-prompt", "4", "--num-steps", "5", "--epochs", "3",
        "--updates-per-epoch", "2", "--noise-window", "2", "--noise-until", "1",
        "--micro-batch", "8"]
TRAIN_PROMPTS = ["birds chirp", "water flows", "snoring", "a dog is barking then talking"]
HELD_OUT = ["a lion roaring", "wind blowing", "a man snores while leaves rustling"]

# ==== 0. The cast ================================================================================

def make_scheduler(**changes):
    """AudioLDM's DDIM scheduler, or one with other settings."""
    from diffusers import DDIMScheduler
    return DDIMScheduler(**{**dict(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1), **changes})

class Painter(nn.Module):
    """The exact noise prediction for data that is N(0, I), sqrt(1 - alpha_bar_t) x_t, plus a shift
    that depends on the prompt. `to_q` is the name that LoRA looks for. D = 16."""
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

def config(*flags: str) -> clap_ppo.Config:
    """The Config of a tiny command line; a prompt file is named, never read."""
    return clap_ppo.parse_args(["--prompts", "unread.txt", *TINY, *flags])[0]

PIPELINE = SimpleNamespace(vocoder=SimpleNamespace(config=SimpleNamespace(sampling_rate=16000)))

def painter_setup(*flags: str, adapter_noise=0.0, scheduler=None) -> clap_ppo.Setup:
    """Two prompts, "up" that likes large latents and "down" that likes small ones, and a Painter as
    the policy. `adapter_noise` moves the adapter away from the base."""
    cfg = config("--num-steps", "10", "--eval-guidance", "1", *flags)
    torch.manual_seed(2)
    unet = clap_ppo.add_lora(Painter(2), 4)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data += adapter_noise * torch.randn(weight.shape, generator=seeded(3))

    def reward(waveforms, sample_rate, prompts):
        return torch.tensor([1.0 if p == "up" else -1.0 for p in prompts]) * waveforms.mean(dim=1)

    return clap_ppo.Setup(
        cfg=cfg, prompts=["up", "down"], num_train=2, pipeline=PIPELINE, reward=reward,
        reward_name="reward", unet=unet,
        optimizer=torch.optim.SGD(weights, lr=cfg.learning_rate),     # proportional to the gradient
        scaler=torch.amp.GradScaler("cpu", enabled=cfg.dtype == "float16"),
        condition={"class_labels": torch.cat([torch.eye(2), torch.full((2, 2), 0.1)])},
        schedule=clap_ppo.ddim_schedule(scheduler or make_scheduler(), cfg.num_steps),
        latent_shape=Painter.SHAPE, sample_rate=16000, device=torch.device("cpu"),
        dtype=torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype))

def roll(setup, starts=(1, 3), seed=0):
    """A rollout of two groups whose noise windows begin at different steps."""
    return clap_ppo.rollout(setup, torch.tensor([0, 1]), torch.tensor(starts), seeded(seed))

def replayed(setup, rows):
    return clap_ppo.replay(setup, rows)

def moved(rows: dict, clip_count: int) -> torch.Tensor:
    """Some advantages (R,), one per clip, handed to each of its rows."""
    return torch.linspace(-1, 1, clip_count)[rows["clip_id"]]

@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    """A training file with the held-out file beside it, where the script looks for it."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("# four\n\n" + "\n".join(TRAIN_PROMPTS) + "\n")
    (folder / "eval_prompts.txt").write_text("\n".join(HELD_OUT) + "\n")
    return folder / "prompts.txt"

def load(*flags: str) -> clap_ppo.Setup:
    """The Setup of a command line."""
    cfg = clap_ppo.parse_args(flags)[0]
    return clap_ppo.load_setup(cfg, *clap_ppo.split_prompts(cfg))

@pytest.fixture(scope="session")
def setup(prompt_file):
    """The toy's, loaded once, with guidance for held-out prompts. Tests leave it as they found it."""
    return load("--prompts", str(prompt_file), *TINY, "--eval-guidance", "2.5")

@pytest.fixture(scope="session")
def clap(setup):
    return setup.reward.args[0]

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
    """A whole run of the script copied *alone* into an empty folder, model and CLAP given as paths,
    in a process whose network is cut: whatever wants to fetch will try, and be noted."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(HERE / "clap_ppo.py", folder)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    flags = ["--prompts", str(prompt_file), "--model", str(TOY / "pipeline"), "--clap",
             str(TOY / "clap.pt"), *TINY, "--eval-guidance", "2.5", "--learning-rate", "0.1"]
    done = subprocess.run(
        [sys.executable, "-c", f"LOG = {str(folder / 'network.log')!r}{NETWORK_CUT}", *flags],
        env={**env, "HF_HOME": str(folder / "empty-cache")}, cwd=folder, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run = folder / "runs/seed-0"
    return SimpleNamespace(out=done.stdout, folder=run, network=folder / "network.log", metrics=[
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])

# ==== 1. A denoising step is a Gaussian policy ===================================================

SCHEDULES = [dict(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one)
             for spacing, offset, to_one in itertools.product(
                 ("leading", "trailing", "linspace"), (0, 1), (True, False))]

@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("num_steps", [10, 7])
@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
def test_a_step_and_its_log_prob_agree_with_diffusers_and_torch(settings, num_steps, eta):
    """With the same noise both land on the same x_{t-1}, and the density there is torch's. Seven
    steps do not divide 1000, which is where a formula for the previous timestep goes wrong."""
    scheduler = make_scheduler(**settings)
    timesteps, alpha_bar_t, alpha_bar_prev = clap_ppo.ddim_schedule(scheduler, num_steps)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    for step, t in enumerate(scheduler.timesteps):
        latents, output, noise = torch.randn(3, 2, 4, 3, 5, generator=seeded(step))
        bars = alpha_bar_t[step], alpha_bar_prev[step]
        sigma = clap_ppo.ddim_sigma(*bars, eta)
        mean = clap_ppo.ddim_mean(output, latents, *bars, sigma)
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

def test_the_log_prob_is_a_mean_and_each_row_has_its_own_sigma():
    """A sum would grow with the latents. One step without noise spoils a table of rows."""
    x, mean, sigma = torch.tensor([[0.3, -1.2]]), torch.tensor([[0.1, 0.4]]), torch.tensor(0.7)
    by_hand = sum(-0.5 * (d / 0.7) ** 2 - math.log(0.7) - 0.5 * math.log(2 * math.pi)
                  for d in (0.2, -1.6)) / 2
    for repeats in (1, 1000):
        again = clap_ppo.gaussian_log_prob(x.repeat(1, repeats), mean.repeat(1, repeats), sigma)
        assert again.item() == pytest.approx(by_hand, abs=1e-5)
    x, sigma = torch.zeros(3, 2, 2, 1), torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    log_prob = clap_ppo.gaussian_log_prob(x, x, sigma)
    torch.testing.assert_close(log_prob, -sigma.flatten().log() - 0.5 * math.log(2 * math.pi))
    with pytest.raises(ValueError, match="sigma is 0"):
        clap_ppo.gaussian_log_prob(x, x, sigma * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1))

def test_half_precision_goes_in_and_float32_comes_out():
    """A ratio is clipped at 1e-4; bfloat16 has steps of 4e-3."""
    latents, output = torch.randn(2, 2, 4, 3, 5, generator=seeded(0)).bfloat16()
    numbers = torch.tensor(0.5), torch.tensor(0.8), torch.tensor(0.2)
    mean = clap_ppo.ddim_mean(output, latents, *numbers)
    assert torch.equal(mean, clap_ppo.ddim_mean(output.float(), latents.float(), *numbers))

def test_held_out_clips_are_those_of_a_guided_sampler_of_diffusers(monkeypatch):
    """Classifier-free guidance of the noise prediction, plain DDIM, the same noise: in the script it
    is the means that are combined. Its scale is none of the policy's."""
    monkeypatch.setattr(clap_ppo, "decode", lambda setup, latents: latents.flatten(1))
    for scale in (1.0, 3.0):
        setup, scheduler = painter_setup("--eval-guidance", str(scale), adapter_noise=0.3), (
            make_scheduler())
        found, _ = clap_ppo.score_held_out(setup, clips=2, seed=5)
        x, labels = torch.randn(4, *Painter.SHAPE, generator=seeded(5)), torch.eye(2)
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            with torch.no_grad():
                asked, empty = (setup.unet(x, t.expand(4), class_labels).sample for class_labels in (
                    labels.repeat_interleave(2, dim=0), torch.full((4, 2), 0.1)))
            x = scheduler.step(empty + scale * (asked - empty), t, x).prev_sample
        torch.testing.assert_close(found, x.flatten(1), rtol=1e-4, atol=1e-5)

def naive_rollout(setup, scheduler, starts, generator):
    """What a rollout means, clip by clip, with diffusers' own scheduler: latents, {(clip, step):
    (x_t, x_{t-1})}. Only the order in which noise is drawn is shared with the script."""
    cfg = setup.cfg
    group = [g for g in range(len(starts)) for _ in range(cfg.clips_per_prompt)]
    noise = torch.randn(len(group), *setup.latent_shape, generator=generator)
    shared = cfg.starting_noise == "shared"
    clips = [noise[g * cfg.clips_per_prompt if shared else c] for c, g in enumerate(group)]
    scheduler.set_timesteps(cfg.num_steps)
    visited = {}
    for step, t in enumerate(scheduler.timesteps):
        noise = torch.randn(len(group), *setup.latent_shape, generator=generator)
        for c, g in enumerate(group):
            x = clips[c][None]
            with torch.no_grad():
                out = setup.unet(x, t[None], setup.condition["class_labels"][g:g + 1]).sample
            noisy = starts[g] <= step < starts[g] + cfg.noise_window
            clips[c] = scheduler.step(out, t, x, eta=clap_ppo.ETA if noisy else 0.0,
                                      variance_noise=noise[c][None]).prev_sample[0]
            if noisy:
                visited[c, step] = (x[0], clips[c])
    return torch.stack(clips), visited

@pytest.mark.parametrize("flags, starts, eta", [
    (["--noise-window", "2"], (1, 3), 1.0),
    (["--noise-window", "1"], (0, 5), 0.5),
    (["--noise-window", "7"], (0, 0), 1.0),
    (["--noise-window", "2", "--starting-noise", "own"], (1, 3), 1.0),
    (["--noise-window", "7", "--starting-noise", "own"], (0, 0), 1.0),
], ids=["window", "short-window", "all", "own-noise", "textbook"])
def test_a_rollout_is_what_a_naive_loop_over_diffusers_scheduler_gives(
        monkeypatch, flags, starts, eta):
    """One path per group until its clips part, the micro-batches: all is speed. The guidance of
    listening is none of a rollout's."""
    monkeypatch.setattr(clap_ppo, "ETA", eta)
    setup = painter_setup("--num-steps", "7", "--micro-batch", "3", "--eval-guidance", "3",
                          *flags, adapter_noise=0.2)
    latents, rows = roll(setup, starts)
    expected, visited = naive_rollout(setup, make_scheduler(), starts, seeded(0))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    for row, (clip, step) in enumerate(zip(rows["clip_id"].tolist(), rows["step"].tolist())):
        for name, x in zip(("latents", "next_latents"), visited[clip, step]):
            torch.testing.assert_close(rows[name][row], x, rtol=1e-4, atol=1e-5)

# ==== 2. Replaying a trajectory gives ratio 1 ====================================================

@pytest.mark.parametrize("window, starts", [(2, (1, 3)), (1, (0, 5)), (7, (0, 0))])
def test_the_table_holds_each_noisy_step_of_each_clip_once_and_never_the_last(window, starts):
    """Of seven steps, 0 to 6, the last is sampled but not trained."""
    _, rows = roll(painter_setup("--num-steps", "7", "--noise-window", str(window)), starts)
    expected = [(clip, step) for clip in range(8)
                for step in range(starts[clip // 4], min(6, starts[clip // 4] + window))]
    assert sorted(zip(rows["clip_id"].tolist(), rows["step"].tolist())) == expected
    assert rows["prompt_id"].tolist() == [clip // 4 for clip in rows["clip_id"].tolist()]

@pytest.mark.parametrize("noise, rows_asked", [("shared", 2), ("own", 8)])
def test_the_unet_answers_once_for_all_clips_that_are_still_one(noise, rows_asked):
    """Eight clips in two groups, noisy in one step. Whichever rows a minibatch has, in any order, a
    row's log-prob is its own."""
    setup, asked = painter_setup("--noise-window", "1", "--num-steps", "5",
                                  "--starting-noise", noise), []
    setup.unet.base_model.model.register_forward_pre_hook(lambda _, x: asked.append(len(x[0])))
    _, rows = roll(setup, starts=(0, 2))
    assert asked[0] == rows_asked and asked[3:] == [8, 8] and sum(asked) == (
        2 + 5 + 5 + 8 + 8 if rows_asked == 2 else 5 * 8)
    asked.clear()
    replayed(setup, rows)
    assert asked == [rows_asked]
    at = torch.tensor([6, 1, 3, 7])
    again = clap_ppo.replay(setup, clap_ppo.take(rows, at))[0]
    torch.testing.assert_close(again, rows["log_prob"][at])

@pytest.mark.parametrize("until, expected", [("1", {0, 1, 2, 3}), ("0.5", {0, 1})])
def test_windows_fall_everywhere_in_their_part_of_the_path(until, expected):
    """Of 6 steps, the last, 5, is never in a window of 2; --noise-until 0.5 keeps them within the
    first three. Prompts repeat only if there are too few."""
    setup, begins, counts = painter_setup("--num-steps", "6", "--noise-until", until), set(), []
    for seed in range(20):
        ids, starts = clap_ppo.choose_prompts(setup, seeded(seed))
        begins |= set(starts.tolist())
        assert sorted(ids.tolist()) == [0, 1]
        counts.append(ids[0].item())
    assert begins == expected and 0 < sum(counts) < 20
    setup.cfg = dataclasses.replace(setup.cfg, prompts_per_epoch=4)
    assert sorted(clap_ppo.choose_prompts(setup, seeded(0))[0].tolist()) == [0, 0, 1, 1]

def test_every_epoch_of_a_run_begins_with_ratio_one_and_asks_nothing_of_the_network(finished_run):
    """The check is logged, to 1e-6 in float32; CLAP was built without a connection attempted."""
    assert [row["epoch"] for row in finished_run.metrics] == [1, 2, 3]
    for row in finished_run.metrics:
        assert 0 <= row["replay_error"] <= 1e-6 and row["approx_kl"] > 0
    rewards = [row["reward"] for row in finished_run.metrics]
    assert finished_run.metrics[2]["reward_mean"] == pytest.approx(sum(rewards) / 3)
    assert not finished_run.network.exists(), finished_run.network.read_text()

def update_once(setup, rows, seed=0, advantages=None, epoch=0):
    advantages = moved(rows, 8) if advantages is None else advantages
    return clap_ppo.update(setup, {**rows, "advantage": advantages}, epoch, seeded(seed))

@contextlib.contextmanager
def gpu(setup, error: float, dtype="float32"):
    """A copy of `setup`, with a step of noise among the first three of ten, on an emulated GPU, whose
    kernels depend on the batch's shape: the U-Net's output is off by `error` of it. In TF32 and
    bfloat16 that is 1 %, in float32 1e-7."""
    cfg = dataclasses.replace(setup.cfg, num_steps=10, noise_window=1, noise_until=0.3)
    copied = dataclasses.replace(setup, unet=copy.deepcopy(setup.unet), cfg=cfg,
                                 dtype=getattr(torch, dtype),
                                 schedule=clap_ppo.ddim_schedule(make_scheduler(), 10))
    copied.optimizer = torch.optim.SGD(
        [p for p in copied.unet.parameters() if p.requires_grad], lr=0.1)
    copied.scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")

    def kernels(module, args, output):
        x = output.sample
        noise = torch.randn(x.shape, generator=seeded(len(x))) * x.detach().float().std() * error
        return SimpleNamespace(sample=x + noise.to(x.dtype))

    copied.unet.base_model.model.register_forward_hook(kernels)
    real = clap_ppo.check_on_policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clap_ppo, "check_on_policy", lambda setup, *args: real(
            dataclasses.replace(setup, device=torch.device("cuda")), *args))
        yield copied

PRECISIONS = [("float32", 1e-7), ("float32", 0.012), ("bfloat16", 0.012), ("float16", 0.0015)]

@pytest.mark.parametrize("dtype, error", PRECISIONS)
def test_the_ratio_starts_at_one_whatever_the_kernels_do(setup, monkeypatch, dtype, error):
    """Not by chance: the log-probs of the rollout, asked in other batches, are other numbers."""
    seen, real = [], clap_ppo.ppo_loss
    monkeypatch.setattr(clap_ppo, "ppo_loss", lambda *args: seen.append(args) or real(*args))
    with gpu(setup, error, dtype) as emulated:
        _, rows = roll(emulated, starts=(1, 2))
        log = update_once(emulated, rows)
    assert torch.equal(seen[0][0], seen[0][1])
    assert log["replay_error"] > (1e-5 if error > 1e-6 else 0)

@pytest.mark.parametrize("dtype, error", PRECISIONS)
def test_rounding_neither_stops_a_run_nor_clips_its_rows(learner, tmp_path, dtype, error):
    """Twenty epochs, against the same on a CPU in float32."""
    metrics = {}
    for name, *more in (("exact", 0.0, "float32"), ("gpu", error, dtype)):
        with gpu(learner("--epochs", "20", "--clip-range", "1e-5"), *more) as emulated:
            weights = emulated.optimizer.param_groups[0]["params"]
            emulated.optimizer = torch.optim.AdamW(weights)
            clap_ppo.train(emulated, tmp_path, metrics.setdefault(name, []))
    clipped = {name: sum(row["clip_fraction"] for row in rows) / 20
               for name, rows in metrics.items()}
    assert len(metrics["gpu"]) == 20 and 0 < clipped["gpu"] <= clipped["exact"] + 0.02

FAULTS = ["dropout", "step", "halves", "weights"]

def replay_broken(setup, fault: str):
    """An update after one of four errors that have happened to people, in early steps, which tell
    them apart the least."""
    _, rows = roll(setup, starts=(1, 2))
    inner = setup.unet.base_model.model
    if fault == "dropout":
        inner.conv_out = nn.Sequential(nn.Dropout(0.1), inner.conv_out).train()
    elif fault == "step":
        rows["step"] = rows["step"] + 1
    elif fault == "halves":                     # of the batch: each row has another's prompt
        inner.register_forward_pre_hook(lambda module, args, kwargs: (args, {
            k: v.roll(len(args[0]) // 2, 0) if torch.is_tensor(v) else v
            for k, v in kwargs.items()}), with_kwargs=True)
    elif fault == "weights":
        inner.conv_out.bias.data += 0.1
    return update_once(setup, rows)

@pytest.mark.parametrize("dtype, error", PRECISIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_replay_stops_the_run_in_any_precision(setup, fault, dtype, error):
    """Rounding does not stop it."""
    with gpu(setup, error, dtype) as emulated:
        assert replay_broken(emulated, "none")["replay_error"] < 2e-3
        with pytest.raises(UserError, match="on-policy check.*dropout.*another timestep"):
            replay_broken(emulated, fault)

def test_on_a_cpu_in_float32_rollout_and_replay_are_equal():
    setup = painter_setup()
    assert clap_ppo.check_on_policy(setup, torch.tensor([1e-7, 0.0])) < 1e-6
    for off in (1e-5, math.nan):
        with pytest.raises(UserError, match="on-policy"):
            clap_ppo.check_on_policy(setup, torch.tensor([0.0, off]))

# ==== 3. The reward ==============================================================================

def tone(hz: float, sample_rate: int, seconds: float = 2.0) -> torch.Tensor:
    t = torch.arange(int(seconds * sample_rate)) / sample_rate
    return sum(0.3 / k * torch.sin(2 * math.pi * k * hz * t) for k in (1, 2, 3))[None]

@pytest.mark.parametrize("window, heard", [
    (7, [1, 2, 3, 1, 2, 3, 0]), (5, [1, 2, 3, 0, 0]), (3, [1, 2, 3]), (2, [1, 2])])
def test_long_clips_keep_their_beginning_and_short_ones_repeat_whole(window, heard):
    """What reaches the network of a CLAP that listens to `window` samples."""
    given = []

    class Stub(nn.ModuleDict):                   # of both towers, and of the tokenizer
        audio_cfg = SimpleNamespace(sample_rate=48000, clip_samples=window)

        def tokenizer(self, *args, **kwargs):
            from transformers import BatchEncoding
            return BatchEncoding({"input_ids": torch.ones(1, 1), "attention_mask": torch.ones(1, 1)})

    class Tower(nn.Module):
        def forward(self, x, *args, **kwargs):
            given.append(x)
            output = {"embedding": torch.ones(1, 4)} if isinstance(x, dict) else torch.ones(1, 4) / 2
            return output if isinstance(x, dict) else SimpleNamespace(pooler_output=output)

    stub = Stub({"audio_branch": Tower(), "text_branch": Tower(), "audio_projection": nn.Identity(),
                 "text_projection": nn.Identity(), "parameters_of": nn.Linear(1, 1)})
    reward = clap_ppo.clap_reward(stub, torch.tensor([[0.1, 0.2, 0.3]]), 48000, ["x"])
    torch.testing.assert_close(10 * given[0]["waveform"], torch.tensor([heard]).float())
    assert reward.item() == pytest.approx(1)

def test_the_sample_rate_matters(clap):
    def rewards(rate, declared):
        return clap_ppo.clap_reward(clap, tone(600, rate).repeat(4, 1), declared, TRAIN_PROMPTS)

    reference, right, wrong = rewards(48000, 48000), rewards(44100, 44100), rewards(44100, 16000)
    assert (reference - right).norm() < 0.25 * (reference - wrong).norm()

def test_each_clip_is_scored_against_its_own_prompt_alone_or_in_a_batch(clap):
    """The reward is the cosine of two embeddings that anybody can compute, and no dice."""
    clips, prompts = torch.cat([tone(hz, 16000, 1) for hz in (200, 300, 400, 500)]), [
        "snoring", "talking", "snoring", "wind blowing"]
    together = clap_ppo.clap_reward(clap, clips, 16000, prompts)
    assert torch.equal(together, clap_ppo.clap_reward(clap, clips, 16000, prompts))
    import torchaudio
    cfg = clap.audio_cfg
    clips = torchaudio.functional.resample(clips, 16000, cfg.sample_rate)
    clips = clips.repeat(1, cfg.clip_samples // clips.shape[1])
    clips = nn.functional.pad(clips, (0, cfg.clip_samples - clips.shape[1]))
    for clip, prompt, reward in zip(clips, prompts, together):
        tokens = clap.tokenizer(prompt, padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt")
        with torch.no_grad():
            text = clap["text_projection"](clap["text_branch"](**tokens).pooler_output)
            sound = clap["audio_branch"]({"waveform": clip[None]}, device="cpu")["embedding"]
            cosine = torch.cosine_similarity(text, clap["audio_projection"](sound))
        assert reward.item() == pytest.approx(cosine.item(), abs=1e-5)

def test_two_towers_and_two_projections_are_what_the_package_calls_clap(clap):
    """laion_clap's own class, with the same checkpoint."""
    package = make_toy.make_clap(json.loads((TOY / "clap.json").read_text())).eval()
    state = torch.load(TOY / "clap.pt", weights_only=True)["state_dict"]
    package.load_state_dict({name: weight.float() for name, weight in state.items()})
    clip = tone(300, clap.audio_cfg.sample_rate, 2)
    clip = nn.functional.pad(clip, (0, clap.audio_cfg.clip_samples - clip.shape[1]))
    tokens = clap.tokenizer("a dog barking", padding="max_length", max_length=77,
                            return_tensors="pt")
    with torch.no_grad():
        theirs = torch.cosine_similarity(
            package.get_audio_embedding([{"waveform": clip[0]}]),
            package.get_text_embedding(dict(tokens)))
    ours = clap_ppo.clap_reward(clap, clip, clap.audio_cfg.sample_rate, ["a dog barking"])
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)

@pytest.mark.parametrize("waveforms, rate", [
    (torch.zeros(48000), 48000), (torch.zeros(1, 48000).short(), 48000), (torch.zeros(1, 99), 16)])
def test_sounds_of_another_shape_type_or_unit_are_refused(clap, waveforms, rate):
    with pytest.raises(ValueError, match="float waveforms"):
        clap_ppo.clap_reward(clap, waveforms, rate, ["x"])

@pytest.mark.parametrize("convert", [
    lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x[:, None], lambda x: x.double(),
    lambda x: x.clone().requires_grad_() * 1], ids=["list", "numpy", "column", "double", "graph"])
def test_a_reward_may_be_any_n_numbers(monkeypatch, convert):
    monkeypatch.setattr(clap_ppo, "decode", lambda setup, latents: latents.flatten(1))
    setup, numbers = painter_setup(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    setup.reward = lambda *args: convert(numbers)
    _, rewards = clap_ppo.score_clips(setup, torch.zeros(4, *Painter.SHAPE), torch.tensor([0, 1]))
    assert torch.equal(rewards, torch.tensor([[1.0, 2.0], [3.0, 4.0]])) and not rewards.requires_grad

@pytest.mark.parametrize("returned, shape", [
    (torch.zeros(8), r"\[8\]"), (torch.tensor(0.5), r"\[\]"), ((torch.zeros(4), {}), "tuple"),
    (None, "NoneType"), (["good"] * 4, "list")], ids=["2n", "mean", "with-info", "none", "words"])
def test_a_reward_that_is_not_n_numbers_is_refused_by_name_and_shape(monkeypatch, returned, shape):
    """Twice as many would be dealt to the wrong clips."""
    monkeypatch.setattr(clap_ppo, "decode", lambda setup, latents: latents.flatten(1))
    setup = dataclasses.replace(painter_setup(), reward=lambda *args: returned, reward_name="mine")
    with pytest.raises(UserError, match=f"reward mine returned .*{shape}.*not 4 numbers"):
        clap_ppo.score_clips(setup, torch.zeros(4, *Painter.SHAPE), torch.tensor([0, 1]))

def save_as_official(file: Path, model, change=lambda state: None, **more):
    """A CLAP checkpoint as the official ones were written: by a DataParallel training, an older
    transformers (position_ids), with a numpy scalar and the command line's Namespace."""
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(10)[None]
    change(state)
    torch.save({"epoch": 7, "name": "official", "best": np.float64(0.5), "state_dict": state,
                "args": argparse.Namespace(lr=0.1), **more}, file)

@pytest.fixture
def checkpoint(tmp_path):
    model = make_toy.make_clap(json.loads((TOY / "clap.json").read_text()))
    shutil.copy(TOY / "clap.json", tmp_path)

    def write(*change, **more):
        save_as_official(tmp_path / "clap.pt", model, *change, **more)
        return str(tmp_path / "clap.pt"), model.state_dict()

    return write

@pytest.mark.filterwarnings("error:.*numpy.core")
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_a_checkpoint_in_the_official_format_loads_whole(checkpoint, clap, core):
    """Whichever numpy runs, and whichever wrote the file: 1 and 2 name the scalar's module so."""
    path, state = checkpoint()
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, re.sub(rb"numpy\._?core(?=\.multiarray\n)", core, content))
    loaded = clap_ppo.load_clap(path, clap.tokenizer).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.items())
    left_out = state.keys() - loaded.keys()
    assert {k.split(".")[0] for k in left_out} == {
        "audio_transform", "text_transform", "logit_scale_a", "logit_scale_t"}
    with pytest.raises(UserError, match="tokenizer has lost its vocabulary"):
        clap_ppo.load_clap(path, lambda prompts: clap.tokenizer(["wind"] * len(prompts)))

class Malice:                                   # unpickled, it leaves a file behind
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")

WEIGHT = "module.audio_projection.0.weight"

@pytest.mark.parametrize("change", [
    lambda state: state.pop(WEIGHT), lambda state: state.update({"module.extra": torch.ones(1)}),
    lambda state: state.update({WEIGHT: torch.ones(3, 3)}), "malice", b"", b"not a checkpoint"],
    ids=["missing", "unexpected", "wrong-size", "malice", "empty", "garbage"])
def test_a_clap_that_does_not_fit_or_holds_code_is_refused(checkpoint, clap, tmp_path, change):
    """A missing weight would stay random and score. And a .pt file is a program."""
    path, _ = checkpoint(*[change] * callable(change), gift=Malice(tmp_path / "pwned")
                         if change == "malice" else 0)
    if isinstance(change, bytes):
        Path(path).write_bytes(change)
    with pytest.raises(UserError, match="--clap .*clap.pt: .*damaged, of another size, or with code"):
        clap_ppo.load_clap(path, clap.tokenizer)
    assert not (tmp_path / "pwned").exists()

def test_a_fusion_checkpoint_is_refused_by_that_name(checkpoint, clap):
    path, _ = checkpoint(lambda state: state.update(
        {"module.audio_branch.patch_embed.mel_conv2d.weight": torch.ones(1)}))
    with pytest.raises(UserError, match="fusion checkpoint"):
        clap_ppo.load_clap(path, clap.tokenizer)

# ==== 4. The advantage ===========================================================================

def test_an_advantage_says_how_much_better_a_clip_is_than_its_siblings():
    """Rewards 0, 1, 1, 2 have mean 1 and standard deviation sqrt(1/2). Integers will do: stars."""
    advantages = clap_ppo.group_advantages(torch.tensor([[0, 1, 1, 2]]))
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor([[-math.sqrt(2), 0.0, 0.0, math.sqrt(2)]]))

def test_prompts_do_not_compete():
    """With one mean for all, the hard prompt's best clip would be punished."""
    hard, easy = torch.tensor([0.1, 0.3, 0.5]), torch.tensor([0.5, 0.7, 0.9])
    advantages = clap_ppo.group_advantages(torch.stack([hard, 10 * easy]))
    torch.testing.assert_close(advantages[0], advantages[1], rtol=1e-4, atol=1e-4)
    assert advantages[0, 2] > 1

def test_a_group_of_little_spread_teaches_little_and_one_without_nothing():
    """Divided by its own deviation, the noise of alike clips would count as much as success."""
    equal = clap_ppo.group_advantages(torch.tensor([[7, 7, 7], [1, 2, 3]]))
    assert equal[0].tolist() == [0, 0, 0] and equal[1, 2] > 1
    alike = torch.tensor([[0.50, 0.52, 0.48], [0.0, 0.2, -0.2]])
    found = clap_ppo.group_advantages(alike, floor=0.1)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.2, -0.2]))
    assert found[1, 1] == pytest.approx(1.5 ** 0.5)              # its own deviation is larger

def test_no_clip_of_a_small_group_can_own_the_update():
    """Of K clips, one that is better than all others stands sqrt(K - 1) deviations off."""
    rewards = torch.zeros(1, 8)
    rewards[0, 5] = 100
    assert clap_ppo.group_advantages(rewards)[0, 5] == pytest.approx(7 ** 0.5)

# ==== 5. What clipping does, case by case ========================================================

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
    """The clip range is 0.2. The gradient on the log-prob: -A * ratio, or 0 where clipped."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    value, info = clap_ppo.ppo_loss(log_prob, torch.zeros(1), torch.tensor([float(advantage)]), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert log_prob.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert not info["approx_kl"].requires_grad
    assert info["clip_fraction"] == float(abs(ratio - 1) > 0.2)

def test_at_ratio_one_clipped_ppo_is_reinforce():
    """Before the first update the gradient is -mean(A * grad log_prob), for every weight."""
    setup = painter_setup(adapter_noise=0.2)
    _, rows = roll(setup)
    advantages, weights = moved(rows, 8), setup.optimizer.param_groups[0]["params"]
    loss, _ = clap_ppo.ppo_loss(replayed(setup, rows)[0], rows["log_prob"], advantages, 1e-4)
    ppo = torch.autograd.grad(loss, weights)
    reinforce = torch.autograd.grad(-(advantages * replayed(setup, rows)[0]).mean(), weights)
    for ours, theirs in zip(ppo, reinforce):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

def test_the_clipped_loss_is_a_mean_over_rows():
    """So that the learning rate does not depend on how many rows a minibatch has."""
    log_prob, advantages = torch.tensor([0.05, -0.1, 0.3]), torch.tensor([1.0, -1.0, 1.0])
    loss, info = clap_ppo.ppo_loss(log_prob, torch.zeros(3), advantages, 0.2)
    assert loss.item() == pytest.approx((-math.exp(0.05) + math.exp(-0.1) - 1.2) / 3, rel=1e-5)
    assert info["clip_fraction"] == pytest.approx(1 / 3)

def test_approx_kl_estimates_the_kl_and_is_never_negative():
    """Between N(0, 1) and N(m, 1) the KL is m^2 / 2. At a log-ratio of 1e-4, 5e-9 must be left."""
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
    sigma = torch.tensor([0.3, 1.0, 2.0]).view(3, 1, 1, 1)
    reference = kl_divergence(Normal(mean, sigma), Normal(base, sigma)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(clap_ppo.gaussian_kl(mean, base, sigma), reference)

# ==== 6. All of it learns ========================================================================

@pytest.fixture
def learner(monkeypatch):
    """A painter's setup for `train`, whose "decoder" hands the latents on, so that the reward is
    known in closed form; what `update` is given in every epoch is kept in `learner.rows`."""
    real = clap_ppo.update
    monkeypatch.setattr(clap_ppo, "decode", lambda setup, latents: latents.flatten(1))
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)

    def watch(setup, rows, epoch, generator):
        make.rows.append(rows)
        return real(setup, rows, epoch, generator)

    def make(*flags):
        make.rows = []
        setup = painter_setup("--num-steps", "6", "--clips-per-prompt", "8", "--learning-rate",
                              "0.03", *flags)
        setup.optimizer = torch.optim.AdamW(setup.optimizer.param_groups[0]["params"], lr=0.03)
        return setup

    monkeypatch.setattr(clap_ppo, "update", watch)
    return make

@pytest.mark.parametrize("flags", [[], ["--noise-window", "6", "--starting-noise", "own"]],
                         ids=["window", "textbook"])
@pytest.mark.parametrize("sign", [1, -1], ids=["", "sign-flipped"])
def test_a_small_policy_learns_what_its_prompts_want(learner, tmp_path, monkeypatch, flags, sign):
    """Through the whole loop. Told that worse is better, it unlearns: it does not measure luck."""
    setup, ours = learner("--epochs", "30", *flags), clap_ppo.group_advantages
    monkeypatch.setattr(clap_ppo, "group_advantages", lambda *args: sign * ours(*args))

    def plain_reward():
        return clap_ppo.score_held_out(setup, clips=64)[1].mean().item()

    before = plain_reward()
    clap_ppo.train(setup, tmp_path, [])
    assert sign * (plain_reward() - before) > 0.5

def test_every_row_carries_the_advantage_of_its_clip(learner, tmp_path):
    setup, rewards = learner("--epochs", "2"), []
    real = setup.reward
    setup.reward = lambda *args: rewards.append(real(*args)) or rewards[-1]
    clap_ppo.train(setup, tmp_path, [])
    for rows, reward in zip(learner.rows, rewards):
        expected = clap_ppo.group_advantages(reward.view(2, 8)).flatten()
        torch.testing.assert_close(rows["advantage"], expected[rows["clip_id"]])
        assert len(rows["advantage"]) == 2 * 8 * 2

def test_every_epoch_has_its_own_noise_and_a_seed_fixes_it(learner, tmp_path):
    def first_epochs(count, *flags):
        setup = learner("--epochs", str(count), "--noise-window", "6", *flags)
        clap_ppo.train(setup, tmp_path, [])
        return [rows["latents"][rows["step"] == 0].sum().item() for rows in learner.rows]     # x_T

    found = first_epochs(6)
    assert len(set(found)) == 6
    assert first_epochs(1) == found[:1]
    assert first_epochs(1, "--seed", "1")[0] not in found

def test_every_few_epochs_the_weights_are_kept_and_score_held_out_prompts(
        learner, tmp_path, monkeypatch):
    from safetensors.torch import load_file
    monkeypatch.setattr(clap_ppo, "EVAL_EVERY", 2)
    setup, metrics = learner("--epochs", "4"), []
    clap_ppo.train(setup, tmp_path, metrics)
    evals = [row.get("eval_reward") for row in metrics]
    assert [value is None for value in evals] == [True, False, True, False]
    assert evals[3] == clap_ppo.score_held_out(setup)[1].mean().item() != evals[1]
    saved, now = (load_file(tmp_path / "adapter/epoch-4.safetensors"),
                  clap_ppo.adapter_state(setup.unet))
    assert saved.keys() == now.keys() and all(torch.equal(saved[k], now[k]) for k in now)
    assert not torch.equal(saved[k := min(saved)], load_file(
        tmp_path / "adapter/epoch-2.safetensors")[k])
    latest = [row["reward"] for row in metrics[2:]]
    assert metrics[3]["reward_mean"] == pytest.approx(sum(latest) / 2)

def test_a_reward_that_is_not_a_number_stops_the_run_and_names_the_prompt(learner, tmp_path):
    setup = learner("--epochs", "1")
    setup.reward = lambda w, rate, prompts: torch.tensor(
        [math.nan if p == "down" else 1.0 for p in prompts])
    with pytest.raises(UserError, match="clip of 'down' is not finite"):
        clap_ppo.train(setup, tmp_path, [])

def test_the_micro_batch_changes_memory_and_speed_but_not_the_result(monkeypatch):
    """Also when the last one is smaller. Plain SGD, because Adam hides a wrong scale."""
    monkeypatch.setattr(clap_ppo, "MAX_GRAD_NORM", math.inf)
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    results = []
    for micro_batch in ("64", "3"):
        setup = painter_setup("--micro-batch", micro_batch, "--learning-rate", "0.5",
                              "--kl-weight", "0.1", "--clip-range", "0.5", adapter_noise=0.2)
        _, rows = roll(setup)
        start = copy.deepcopy(clap_ppo.adapter_state(setup.unet))
        info = update_once(setup, rows)
        results.append((clap_ppo.adapter_state(setup.unet), info))
    (one, info), (other, other_info) = results
    assert max((start[k] - v).abs().max() for k, v in one.items()) > 1e-2
    for name, weight in other.items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-5)
    for key in ("loss", "approx_kl", "clip_fraction", "kl_base", "grad_norm"):
        assert other_info[key] == pytest.approx(info[key], rel=1e-3, abs=1e-6)

def test_an_update_raises_good_actions_and_its_rate_warms_up_over_the_whole_run():
    """Of a run's 30 steps lr rises over ten, while it falls over all of them to 0."""
    setup = painter_setup("--updates-per-epoch", "6", "--learning-rate", "0.2", "--epochs", "5",
                          "--clip-range", "0.5", adapter_noise=0.1)
    rates, step, (_, rows) = [], setup.optimizer.step, roll(setup)
    setup.optimizer.step = lambda: (rates.append(setup.optimizer.param_groups[0]["lr"]), step())
    info = update_once(setup, rows)
    with torch.no_grad():
        gain, advantages = replayed(setup, rows)[0] - rows["log_prob"], moved(rows, 8)
    assert (gain * advantages).mean() > 1e-4 and info["approx_kl"] > 0
    assert torch.corrcoef(torch.stack([gain, advantages]))[0, 1] > 0.3
    update_once(setup, roll(setup)[1], epoch=1)
    assert rates == pytest.approx([0.2 * min(n / 10, 1 - (n - 1) / 30) for n in range(1, 13)])

def test_the_clip_range_is_scaled_to_the_size_of_the_latents(monkeypatch):
    """1.6 nats per clip, whether spread over 16,384 elements or over 16."""
    seen, real = [], clap_ppo.ppo_loss
    monkeypatch.setattr(clap_ppo, "ppo_loss", lambda *args: seen.append(args[3]) or real(*args))
    setup = painter_setup("--clip-range", "1e-4")
    update_once(setup, roll(setup)[1])
    assert seen[0] == pytest.approx(1e-4 * 16384 / 16)

def test_rows_that_do_not_divide_evenly_still_give_every_update():
    """Seven updates of eight rows: torch.chunk would give four."""
    setup = painter_setup("--updates-per-epoch", "7", "--noise-window", "1", adapter_noise=0.1)
    steps, step = [], setup.optimizer.step
    setup.optimizer.step = lambda: (steps.append(1), step())
    update_once(setup, roll(setup)[1])
    assert len(steps) == 7

@pytest.mark.parametrize("weight", ["0", "0.5"])
def test_the_kl_term_pulls_the_policy_to_the_base(monkeypatch, weight):
    """Without any advantage only the KL term speaks; without the term nothing moves at all."""
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    setup = painter_setup("--kl-weight", weight, "--learning-rate", "0.5",
                          "--updates-per-epoch", "6", adapter_noise=0.3)
    _, rows = roll(setup)

    def gap():
        with torch.no_grad():
            _, mean, sigma = replayed(setup, rows)
            with setup.unet.disable_adapter():
                _, base, _ = replayed(setup, rows)
        return clap_ppo.gaussian_kl(mean, base, sigma).mean().item()

    before, info = gap(), update_once(setup, rows, advantages=torch.zeros(len(rows["clip_id"])))
    if weight == "0":
        assert gap() == before and "kl_base" not in info
    else:
        assert gap() < 0.9 * before and gap() < info["kl_base"] <= before * 1.001
        assert info["loss"] == pytest.approx(0.5 * info["kl_base"], rel=1e-3)

def test_the_base_model_is_the_adapter_switched_off_or_new(setup):
    """Bit for bit, in the real U-Net."""
    rows = {"latents": torch.randn(2, *setup.latent_shape, generator=seeded(0)),
            "step": torch.zeros(2, dtype=torch.long), "prompt_id": torch.arange(2),
            "input_id": torch.arange(2)}
    assert {id(p) for p in setup.unet.parameters() if p.requires_grad} == {
        id(p) for p in setup.optimizer.param_groups[0]["params"]}
    moved_setup = dataclasses.replace(setup, unet=copy.deepcopy(setup.unet))
    for weight in moved_setup.unet.parameters():
        weight.data += weight.requires_grad * 0.1
    with torch.no_grad():
        base = clap_ppo.policy(setup, rows, 1.0)[0]
        assert (clap_ppo.policy(moved_setup, rows, 1.0)[0] - base).abs().max() > 0.01
        with moved_setup.unet.disable_adapter():
            assert torch.equal(clap_ppo.policy(moved_setup, rows, 1.0)[0], base)

def test_gradients_are_limited_and_one_that_is_not_finite_stops_before_the_weights(monkeypatch):
    """One NaN in Adam's state is for ever. What is logged is the norm before."""
    monkeypatch.setattr(clap_ppo, "MAX_GRAD_NORM", 1e-3)
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    setup = painter_setup("--learning-rate", "1", "--updates-per-epoch", "1", adapter_noise=0.2)
    start, (_, rows) = copy.deepcopy(clap_ppo.adapter_state(setup.unet)), roll(setup)
    with pytest.raises(UserError, match="gradient is not finite"):
        update_once(setup, rows, advantages=torch.full((len(rows["clip_id"]),), math.nan))
    setup.optimizer.zero_grad()
    norm = update_once(setup, rows)["grad_norm"]
    step = torch.cat([(v - start[k]).flatten()
                      for k, v in clap_ppo.adapter_state(setup.unet).items()]).norm()
    assert step.item() == pytest.approx(1e-3, rel=1e-2) and norm > 2e-3

# ==== 7. Stop and resume =========================================================================

def run_main(capsys, *flags) -> tuple[int, str]:
    """Exit code of a command line, and what it wrote to stderr."""
    capsys.readouterr()
    try:
        code = clap_ppo.main([str(flag) for flag in flags])
    except SystemExit as stopped:                # argparse
        code = stopped.code
    return code, capsys.readouterr().err

def results(run: Path) -> tuple:
    """All that a run found out: adapter, metrics without their wall time, page with rewards."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    return (run / "adapter/adapter_model.safetensors").read_bytes(), rows, (
        re.sub("<title>.*?</title>", "", (run / "index.html").read_text()))

@pytest.fixture(scope="module")
def run_flags(prompt_file):
    """A run of three epochs, which is still warming up when it ends."""
    return ["--prompts", str(prompt_file), *TINY, "--learning-rate", "0.01"]

@pytest.fixture(scope="module")
def straight_run(run_flags, tmp_path_factory):
    """The results of that run when nothing disturbs it."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert clap_ppo.main([*run_flags, "--out", str(run)]) == 0
    return results(run)

@pytest.fixture(scope="module")
def cut_run(run_flags, tmp_path_factory):
    run = tmp_path_factory.mktemp("cut") / "run"
    assert clap_ppo.main([*run_flags, "--epochs", "2", "--out", str(run)]) == 0
    return run

def test_a_finished_run_goes_on_for_more_epochs_or_is_finished_again(cut_run, tmp_path, capsys):
    """The learning rate, which had fallen, follows the new length: the third of three epochs."""
    run = Path(shutil.copytree(cut_run, tmp_path / "run"))
    before = results(run)[1]
    assert run_main(capsys, "--resume", run, "--epochs", 3)[0] == 0
    longer = results(run)
    assert longer[1][:2] == before and len(longer[1]) == 3
    assert run_main(capsys, "--resume", run)[0] == 0 and results(run) == longer
    code, err = run_main(capsys, "--resume", run, "--epochs", 2)
    assert code == 2 and "3 epochs are done" in err and results(run) == longer

@pytest.mark.parametrize("moment", [1, 2, 4], ids=["first-epoch", "second-rollout", "at-the-end"])
def test_a_run_cut_at_any_moment_resumes_to_the_same_bytes(
        run_flags, straight_run, tmp_path, capsys, monkeypatch, moment):
    """Ctrl-C before anything was saved; in the second epoch; and when the weights have moved on but
    the checkpoint is not written."""
    run, real, calls = tmp_path / "run", clap_ppo.score_clips, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(clap_ppo, "score_clips", interrupted)
        code, err = run_main(capsys, *run_flags, "--out", run)
    assert code == 130 and "--resume" in err and not (run / "index.html").exists()
    assert run_main(capsys, "--resume", run)[0] == 0
    assert results(run) == straight_run

@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bytes(run_flags, straight_run, tmp_path):
    """SIGKILL, which no program can catch, after each of four waits."""
    flags = [*run_flags, "--out", str(tmp_path / "run")]
    for wait in (0.2, 1.0, 1.8, 2.6):
        process = subprocess.Popen([sys.executable, HERE / "clap_ppo.py", *flags], cwd=HERE,
                                   stdout=subprocess.PIPE, text=True)
        process.stdout.readline()                       # loaded; the run directory exists
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait)
        process.kill()
        process.communicate()
        flags = ["--resume", str(tmp_path / "run")]
    assert clap_ppo.main(flags) == 0
    assert results(tmp_path / "run") == straight_run

def test_a_file_is_the_old_one_or_the_new_one_and_a_full_disk_leaves_nothing(
        tmp_path, monkeypatch):
    def half(path, content):
        with open(path, "wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    clap_ppo.write_file(tmp_path / "file", b"old")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError):
        clap_ppo.write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize("content", [b"", b"half a checkp", {"a": 1}, "malice", "lora"], ids=str)
def test_a_run_that_is_damaged_malicious_or_of_another_model_is_left_alone(
        cut_run, tmp_path, capsys, content):
    run = Path(shutil.copytree(cut_run, tmp_path / "run"))
    file, complaint = run / "checkpoint.pt", "cannot go on from checkpoint.pt"
    if content == "lora":
        saved = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**saved, "lora_rank": 3}))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        gift = {"epoch": 1, "gift": Malice(tmp_path / "pwned")}
        torch.save(gift if content == "malice" else content, file)
    before = file.read_bytes()
    code, err = run_main(capsys, "--resume", run, "--epochs", 3)
    assert code == 2 and complaint in err and len(err.splitlines()) == 1
    assert file.read_bytes() == before and not (tmp_path / "pwned").exists()

def test_a_run_goes_on_elsewhere_without_its_prompt_files(cut_run, tmp_path, capsys, monkeypatch):
    """The prompts are in the checkpoint; model and CLAP may be given anew."""
    run = Path(shutil.copytree(cut_run, tmp_path / "run"))
    saved = json.loads((run / "config.json").read_text())
    gone = {"prompts": "gone.txt", "model": "/gone/pipeline", "clap": "/gone/clap.pt"}
    (run / "config.json").write_text(json.dumps({**saved, **gone}))
    monkeypatch.chdir(tmp_path)
    assert run_main(capsys, "--resume", "run", "--epochs", 3)[0] == 2
    assert run_main(capsys, "--resume", "run", "--epochs", 3, "--model", TOY / "pipeline", "--clap",
                    TOY / "clap.pt")[0] == 0
    assert len(results(tmp_path / "run")[1]) == 3

def quiet(waveforms, sample_rate, prompts):
    return -waveforms.square().mean(dim=1)

def test_a_run_remembers_what_its_reward_was_called(run_flags, tmp_path, capsys):
    """Resumed, or evaluated, with CLAP, it would be another run."""
    run = tmp_path / "run"
    flags = [*run_flags, "--epochs", "1", "--out", str(run)]
    assert clap_ppo.main(flags, reward=quiet) == 0
    code, err = run_main(capsys, "--resume", run, "--epochs", 2)
    assert code == 2 and "its reward was quiet" in err
    assert evaluate.main([str(run)]) == 2 and "quiet" in capsys.readouterr().err
    assert clap_ppo.main(["--resume", str(run), "--epochs", "2"], reward=quiet) == 0
    assert evaluate.main([str(run), "--noises", "1"], reward=quiet) == 0

def test_an_epoch_is_saved_before_it_is_shown(run_flags, tmp_path):
    """`| head -1` closes the pipe: one line on stderr, and the epochs shown are kept."""
    command = [sys.executable, str(HERE / "clap_ppo.py"), *run_flags, "--out", str(tmp_path / "run")]
    done = subprocess.run(f"{shlex.join(command)} | head -2", shell=True, capture_output=True,
                          text=True, cwd=tmp_path)
    assert "epoch 1/3" in done.stdout and len(done.stderr.splitlines()) <= 1, done.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 1 and clap_ppo.main(["--resume", str(tmp_path / "run")]) == 0

# ==== 8. Bad input ===============================================================================

@pytest.fixture(scope="module")
def bad(tmp_path_factory, cut_run):
    """A folder full of things that are not what they should be; commands are given in it."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("# only\n\n   \n# comments\n")
    (folder / "latin.txt").write_bytes("snoring\nV\u00f6gel\n".encode("latin-1"))
    (folder / "good.txt").write_text("snoring\nbirds chirp\n")
    (folder / "same.txt").write_text("wind blowing\nSnoring.\n")
    for name, text in (("header", "id,caption\n1,a dog barks\n"), ("quoted", '7,"a dog, a man"\n'),
                       ("tabs", "1\ta dog barks\n"), ("lines", '{"caption": "a dog barks"}\n'),
                       ("list", '["a dog barks"]\n')):
        (folder / f"{name}.txt").write_text(text)
    (folder / "nothing").mkdir()
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text((cut_run / "config.json").read_text())
    for name, text in (("broken", "{}]"), ("old", '{"eta": 1.0}'), ("odd", '{"epochs": "ten"}')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    for name in ("music", "clipping", "velocity", "pickled"):
        shutil.copytree(TOY / "pipeline", folder / name)
    index = json.loads((folder / "music/model_index.json").read_text())
    (folder / "music/model_index.json").write_text(
        json.dumps({**index, "_class_name": "MusicLDMPipeline"}))
    make_scheduler(clip_sample=True).save_pretrained(folder / "clipping/scheduler")
    make_scheduler(prediction_type="v_prediction").save_pretrained(folder / "velocity/scheduler")
    next((folder / "pickled/unet").glob("*.safetensors")).unlink()
    torch.save({"weight": Malice(folder / "pwned")},
               folder / "pickled/unet/diffusion_pytorch_model.bin")
    return folder

GOOD, CLAP = ["--prompts", "good.txt", *TINY], ["--clap", str(TOY / "judge/../clap.pt")]

@pytest.mark.parametrize("flags, complaint", [
    ([], "prompts prompts.txt: .*No such file.*samples/prompts.txt"),
    (["--prompts", "gone.txt"], "gone.txt: .*No such file.*samples/prompts.txt"),
    (["--prompts", "empty.txt"], "empty.txt: no prompt in it"),
    (["--prompts", "latin.txt"], "latin.txt: 'utf-8' codec.*samples/prompts.txt"),
    (["--prompts", "header.txt"], "header.txt: 'id,caption' is CSV or JSON; one prompt a"),
    (["--prompts", "quoted.txt"], "is CSV or JSON"),
    (["--prompts", "tabs.txt"], "is CSV or JSON"),
    (["--prompts", "lines.txt"], "is CSV or JSON"),
    (["--prompts", "list.txt"], "is CSV or JSON"),
    ([*GOOD, "--eval-prompts", "same.txt"], "'snoring' is trained on and held out: remove"),
    ([*GOOD, "--clips-per-prompt", "1"], "--clips-per-prompt 1: use 2 to"),
    ([*GOOD, "--seconds", "12"], "--seconds 12.0: use 0.1 to 10"),
    ([*GOOD, "--learning-rate", "nan"], "--learning-rate nan: use 1e-09 to"),
    ([*GOOD, "--micro-batch", "0"], "--micro-batch 0: use"),
    ([*GOOD, "--dtype", "half"], "--dtype: invalid choice: 'half'"),
    ([*GOOD, "--noise-window", "two"], "--noise-window: invalid int value: 'two'"),
    ([*GOOD, "--noise-until", "0.2"], "--noise-window 2: use 1 to 1, the steps before"),
    ([*GOOD, "--updates-per-epoch", "9"], "--updates-per-epoch 9: more than clips"),
    ([*GOOD, "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ([*GOOD, "--model", "music"], "--model music: needs its own --clap"),
    ([*GOOD, *CLAP, "--model", "nobody/has-this"], "--model nobody/has-this: .*needs no network"),
    ([*GOOD, *CLAP, "--model", "music"], "a MusicLDMPipeline is not supported"),
    ([*GOOD, *CLAP, "--model", "clipping"], "its scheduler is not plain DDIM"),
    ([*GOOD, *CLAP, "--model", "velocity"], "its scheduler is not plain DDIM"),
    ([*GOOD, *CLAP, "--model", "pickled"], "--model pickled: no usable folder"),
    ([*GOOD, "--clap", "nobody/repo/x.pt"], "--clap nobody/repo/x.pt: not found here or on the hub"),
    ([*GOOD, "--clap", "good.txt"], "--clap good.txt: .*damaged"),
    ([*GOOD, "--out", "run"], "--out run: not empty; .*--resume run"),
    ([*GOOD, "--out", "good.txt/run"], "Not a directory: 'good.txt/run'"),
    (["--resume", "nowhere"], "--resume nowhere: not a run.*No such file"),
    (["--resume", "run"], "--resume run: cannot go on from checkpoint.pt.*No such file"),
    (["--resume", "run", "--seed", "5", "--lora-rank", "1"], "lora_rank and seed cannot change"),
    (["--resume", "broken"], "--resume broken: not a run"),
    (["--resume", "old"], "--resume old: not a run.*eta"),
    (["--resume", "odd"], "--resume odd: not a run"),
], ids=lambda x: " ".join(x).replace(" ".join(TINY), "") if isinstance(x, list) else "")
def test_a_mistake_gets_one_line_with_the_remedy_and_exit_code_2(
        bad, monkeypatch, capsys, flags, complaint):
    monkeypatch.chdir(bad)
    before = {p for p in bad.rglob("*") if p.is_file()}
    code, err = run_main(capsys, *flags)
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert code == 2 and len(lines) == 1 and re.search(complaint, lines[0]), err
    assert {p for p in bad.rglob("*") if p.is_file()} == before

def test_prompt_files_of_any_length_work(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeffsnoring\r\n# comment\r\nwind  blowing\r\n  snoring \r\n".encode())

    def split(*flags):
        prompts, num_train = clap_ppo.split_prompts(config("--prompts", str(file), *flags))
        return prompts[:num_train], prompts[num_train:]

    assert split() == (["snoring", "wind blowing"], [])
    file.write_text("\n".join(f"wind {i}" for i in range(8)))
    train, held_out = split()
    assert held_out == ["wind 3", "wind 7"] and len(train) == 6 and not set(train) & set(held_out)
    file.write_text("\n".join(f"wind {i}" for i in range(1000)))
    places = [int(prompt.split()[1]) for prompt in split()[1]]
    assert len(places) == 50 and max(places) > 950 and np.diff(places).max() == 20  # all over it
    file.write_text("\n".join(["a dog barks", "b", "c", "A dog barks.", "d", "e", "f", "g", "h"]))
    train, held_out = split()                    # what sounds alike is one prompt, on one side
    assert len(train) + len(held_out) == 8
    (tmp_path / "eval_mine.txt").write_text("rain\n")
    assert split()[1] == ["rain"]
    (tmp_path / "other.txt").write_text("hail\n")
    assert split("--eval-prompts", str(tmp_path / "other.txt"))[1] == ["hail"]

def test_a_single_prompt_trains_in_an_empty_folder_and_is_played_itself(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("snoring\n")
    (tmp_path / "run").mkdir()
    flags = ["--prompts", tmp_path / "one.txt", *TINY, "--epochs", 1, "--out", tmp_path / "run"]
    assert clap_ppo.main([str(flag) for flag in flags]) == 0
    out = capsys.readouterr().out
    assert "1 training, 0 held-out prompts" in out and "training prompts: reward" in out
    assert evaluate.main([str(tmp_path / "run"), "--noises", "1"]) == 0
    assert "Training prompts" in (tmp_path / "run/data.js").read_text()

def test_a_folder_that_cannot_be_made_is_told_before_anything_is_loaded(monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("snoring\n")
    monkeypatch.setattr(clap_ppo, "load_pipeline", None)
    assert clap_ppo.main(["--prompts", str(tmp_path / "prompts.txt"), "--out",
                          str(tmp_path / "prompts.txt/run")]) == 2

def test_guards_stand_when_python_optimises_asserts_away():
    code = ("import clap_ppo, torch\nx = torch.zeros(1, 2)\n"
            "clap_ppo.gaussian_log_prob(x, x, torch.tensor(0.0))")
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=HERE, capture_output=True)
    assert b"ValueError: sigma is 0" in done.stderr

def test_the_part_of_a_prompt_that_clap_does_not_read_is_said_before_the_run(
        monkeypatch, capsys):
    """CLAP reads 77 tokens, also where the model's tokenizer takes 512."""
    class Loaded(Exception):
        pass

    def stop(*args):
        raise Loaded

    long = "water flows then wind blowing then snoring then birds chirp then " * 8 + "helicopter"
    pipeline = clap_ppo.load_pipeline(str(TOY / "pipeline"))
    pipeline.tokenizer.model_max_length = 512
    monkeypatch.setattr(clap_ppo, "load_pipeline", lambda *args: pipeline)
    monkeypatch.setattr(clap_ppo, "load_clap", stop)
    for prompts, lines in ((["snoring", long], 1), (TRAIN_PROMPTS, 0)):
        with pytest.raises(Loaded):
            clap_ppo.load_setup(config(), prompts, len(prompts))
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
    with pytest.raises(Loaded):
        clap_ppo.load_setup(config(), [long], 1)
    said = capsys.readouterr().err
    assert "helicopter" in said and "cut to 77 tokens" in said and "snoring then" in said

# ==== 9. Files that others load ==================================================================

def test_a_run_leaves_what_was_promised(finished_run):
    import soundfile
    run = finished_run.folder
    assert clap_ppo.Config(**json.loads((run / "config.json").read_text())).eval_guidance == 2.5
    assert len(list((run / "clips").iterdir())) == 2 * len(HELD_OUT)
    for i, side in itertools.product(range(3), ("original", "fine-tuned")):
        wave, rate = soundfile.read(run / f"clips/{i:03}-{side}.wav")
        assert rate == 16000 and wave.shape == (40960,) and np.abs(wave).max() > 0
    assert b".default." not in (run / "adapter/adapter_model.safetensors").read_bytes()  # peft's
    assert (run / "adapter/adapter_config.json").exists() and not list(run.rglob("tmp-*"))
    assert len(re.findall(r"^epoch \d/3  reward_mean ", finished_run.out, flags=re.M)) == 3
    assert re.search(r"held-out prompts: reward \S+ -> \S+, better for \d of 3", finished_run.out)

def stock_pipeline(model, adapter: Path | None = None):
    """A pipeline that knows nothing of this script, with an adapter as the README loads it."""
    import diffusers
    import peft
    from transformers import GPT2LMHeadModel
    kind = json.loads((Path(model) / "model_index.json").read_text())["_class_name"]
    parts = {} if kind == "AudioLDMPipeline" else {
        "language_model": GPT2LMHeadModel.from_pretrained(model, subfolder="language_model")}
    pipe = getattr(diffusers, kind).from_pretrained(model, dtype=torch.float32, **parts)
    if adapter:
        peft.PeftModel.from_pretrained(pipe.unet, adapter)       # changes pipe.unet
    pipe.set_progress_bar_config(disable=True)
    return pipe

def test_the_adapter_gives_the_tuned_clips_in_a_plain_pipeline(finished_run):
    """From the same noise it sings what the run's clips sing. (PCM has steps of 3e-5.)"""
    import soundfile
    run, heard = finished_run.folder, {}
    noise = torch.randn(clap_ppo.EVAL_CLIPS * 3, 8, 16, 8, generator=seeded(999))[:1]
    for side, adapter in (("original", None), ("fine-tuned", run / "adapter")):
        pipe = stock_pipeline(TOY / "pipeline", adapter)
        heard[side] = pipe(HELD_OUT[0], latents=noise, num_inference_steps=5, guidance_scale=2.5,
                           audio_length_in_s=2.56).audios[0]
        saved, _ = soundfile.read(run / f"clips/000-{side}.wav")
        np.testing.assert_allclose(np.clip(heard[side], -1, 1), saved, rtol=0, atol=2e-4)
    assert np.abs(heard["fine-tuned"] - heard["original"]).max() > 5e-4

def compare_with_stock(model: Path, folder: Path, seconds: float) -> None:
    """Held-out clips of three prompts, with an adapter that is not zero, against a stock pipeline's:
    length, guidance, conditions, sampler, decoder."""
    (folder / "three.txt").write_text("\n".join(HELD_OUT))
    setup = load("--prompts", str(folder / "three.txt"), "--model", str(model), *CLAP, "--seconds",
                 str(seconds), "--num-steps", "4")
    for weight in setup.optimizer.param_groups[0]["params"]:
        weight.data += 0.05 * torch.randn(weight.shape, generator=seeded(0))
    setup.unet.peft_config["default"].save_pretrained(folder)
    clap_ppo.save_adapter(setup, folder / "adapter_model.safetensors")
    pipe = stock_pipeline(model, folder)
    noise = torch.randn(3, *setup.latent_shape, generator=seeded(1))
    for scale in (1.0, 2.5):
        setup.cfg = dataclasses.replace(setup.cfg, eval_guidance=scale)
        ours, _ = clap_ppo.score_held_out(setup, clips=1, seed=1)
        for i, prompt in enumerate(HELD_OUT):
            theirs = pipe(prompt, latents=noise[i:i + 1], num_inference_steps=4,
                          guidance_scale=scale, audio_length_in_s=seconds).audios[0]
            np.testing.assert_allclose(ours[i], np.clip(theirs, -1, 1), rtol=0, atol=3e-4)

@pytest.mark.parametrize("seconds", [0.29, 2.01, 2.56])
def test_clips_of_any_length_are_those_of_the_stock_pipeline(tmp_path, seconds):
    """At 0.29 and 2.01 s rounding up before cutting off would add a frame."""
    compare_with_stock(TOY / "pipeline", tmp_path, seconds)

def test_prompts_are_encoded_in_chunks_as_the_pipeline_does_in_one():
    pipe = clap_ppo.load_pipeline(str(TOY / "pipeline"))
    prompts = [f"{a} then {b}" for a in TRAIN_PROMPTS for b in TRAIN_PROMPTS] * 9        # 144
    with torch.no_grad():
        empty, full = pipe._encode_prompt(prompts, torch.device("cpu"), 1, True).chunk(2)
    found = clap_ppo.encode_prompts(pipe, prompts)["class_labels"]
    torch.testing.assert_close(found, torch.cat([full, empty]), rtol=1e-5, atol=1e-6)

@pytest.mark.slow
def test_twenty_thousand_prompts_load_in_two_minutes_and_nine_gigabytes(tmp_path):
    (tmp_path / "many.txt").write_text("".join(f"a dog barks {i} times\n" for i in range(20_000)))
    code = f"""
import clap_ppo
cfg = clap_ppo.parse_args(["--prompts", {str(tmp_path / "many.txt")!r}])[0]
prompts, num_train = clap_ppo.split_prompts(cfg)
setup = clap_ppo.load_setup(cfg, prompts, num_train)
assert setup.condition["class_labels"].shape == (40_000, 64)"""
    done = subprocess.run(["bash", "-c", f"ulimit -v 9000000; {sys.executable} -c {shlex.quote(code)}"],
                          cwd=HERE, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]

def test_importing_the_script_does_nothing_and_sections_one_and_two_need_torch_alone(tmp_path):
    heavy = ["diffusers", "transformers", "peft", "laion_clap", "torchaudio", "matplotlib"]
    source = (HERE / "clap_ppo.py").read_text()
    begin, end = (source.index(f"# ==== {n}. ") for n in (1, 3))
    (tmp_path / "policy.py").write_text("import math\nimport torch\nfrom torch import Tensor\n"
                                        + source[begin:end])
    code = (f"import sys; sys.path.append({str(HERE)!r}); import clap_ppo, policy; "
            f"print([m for m in {heavy} if m in sys.modules]); clap_ppo.main(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stdout.startswith("[]") and done.stderr == "" and done.returncode == 0
    assert all(f"--{f.name.replace('_', '-')} " in done.stdout
               for f in dataclasses.fields(clap_ppo.Config))
    assert "T, denoising steps per clip" in done.stdout
    assert doctest.testmod(clap_ppo).failed == 0

def test_the_script_and_requirements_name_the_same_packages():
    block = re.search(r"# /// script\n(.*?)# ///\n", (HERE / "clap_ppo.py").read_text(), re.S)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    lines = [line.split("#")[0].strip() for line in open(HERE / "requirements.txt")]
    assert {*metadata["dependencies"], "pytest>=8"} == {*lines} - {""}

README = (HERE / "README.md").read_text()

def test_the_documented_commands_and_python_blocks_work(prompt_file, finished_run, tmp_path):
    """The README's Python runs in an empty folder, with a small budget."""
    commands = re.findall(r"^\s*(python clap_ppo\.py\b(?:.*\\\n)*.*)$", README + clap_ppo.__doc__,
                          flags=re.M)
    for command in commands:
        arguments = shlex.split(command.replace("\\\n", " "), comments=True)[2:]
        assert "--resume" in arguments or clap_ppo.parse_args(arguments)
    stock, step, loud = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    stock = stock.replace("samples/toy", str(TOY)).replace("runs/seed-0", str(finished_run.folder))
    budget = [*TINY, "--epochs", "1", "--eval-prompts",
              str(prompt_file.with_name("eval_prompts.txt"))]
    loud = loud.replace('"--epochs", "5"', ", ".join(map(repr, budget)))
    loud = loud.replace("sqrt()", "sqrt() + 100")
    for code, shown in ((step, r"tensor\(\[-?\d.*\]\)"), (loud, "reward 100"), (stock, "40960")):
        (tmp_path / "mine.py").write_text(code)
        done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
        assert done.returncode == 0 and re.search(shown, done.stdout), done.stderr[-2000:]

def test_the_generated_tables_of_the_readme_are_current():
    """`python samples/experiments.py report` would change nothing."""
    assert experiments.fill(README, experiments.read_rows()) == README

# ==== 10. The judge, its page, the samples scripts ===============================================

def make_clips(judge, reward=None, embeds=None, waveforms=None) -> evaluate.Clips:
    """Clips of M prompts from judge scores (M, n, M), the rest filled in."""
    count, n, _ = judge.shape
    return evaluate.Clips(
        torch.full((count, n, 100), 0.1) if waveforms is None else waveforms,
        torch.zeros(count, n) if reward is None else reward, judge,
        torch.ones(count, n, 1) if embeds is None else embeds)

def test_diversity_loudness_and_broken_clips_mean_what_they_say():
    """The judge hears prompt 0 everywhere, so prompt 1 has no two recognised clips: its diversity
    among those is left out of the mean. A tenth of full scale is -20 dB."""
    judge, waveforms = torch.eye(2)[:1].expand(2, 2, 2), torch.full((2, 2, 100), 0.1)
    embeds = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    waveforms[1] = torch.tensor([[0.0], [1.0]])                      # silence, and clipping
    metrics = evaluate.per_prompt_metrics(make_clips(judge, None, embeds, waveforms))
    assert metrics["diversity"].tolist() == metrics["broken"].tolist() == [0, 1]
    assert evaluate.bootstrap(metrics["diversity_right"])["value"] == 0
    assert metrics["loudness"][0].item() == pytest.approx(-20, abs=1e-3)

def test_a_judge_that_always_hears_the_prompt_has_a_recognition_of_one():
    """One that always hears the next prompt has 0. What training did to single clips is counted:
    mended, broken, and who wins where one of two is right."""
    ear = torch.eye(4)[:, None].repeat(1, 2, 1)
    deaf = ear.roll(1, dims=2)
    half = torch.cat([ear[:, :1], deaf[:, :1]], dim=1)
    for judge, share in ((ear, 1), (deaf, 0), (half, 0.5)):
        metrics = evaluate.per_prompt_metrics(make_clips(judge))
        assert metrics["recognition"].tolist() == metrics["judge_score"].tolist() == [share] * 4
    for base, tuned, mended, broke, wins, preference in (
            (half, ear, 4, 0, 1, 0.75), (ear, half, 0, 4, 0, 0.25),
            (half, half.flip(1), 4, 4, 0.5, 0.5)):
        found = evaluate.compare(make_clips(base), make_clips(tuned))
        assert (found["mended"], found["broke"], found["clips"]) == (mended, broke, 8)
        assert (found["wins"]["value"], found["preference"]["value"]) == (wins, preference)

def test_best_of_n_takes_the_clip_that_the_reward_likes_best():
    reward = torch.tensor([[0.1, 0.9, 0.5, 0.6], [0.8, 0.2, 0.3, 0.4]])
    judge = torch.arange(16.0).reshape(2, 4, 2)
    best = evaluate.best_of(make_clips(judge, reward), 2)
    torch.testing.assert_close(best.reward, torch.tensor([[0.9, 0.6], [0.8, 0.4]]))
    assert torch.equal(best.judge, torch.stack([judge[0, [1, 3]], judge[1, [0, 3]]]))

def test_intervals_have_their_published_values():
    for successes, n, low, high in ((0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (35, 50, 0.56, 0.81)):
        interval = evaluate.wilson(successes, n)
        assert (interval["low"], interval["high"]) == pytest.approx((low, high), abs=4e-3)
    interval = evaluate.bootstrap(torch.randn(400, generator=seeded(0)))
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 / 20, rel=0.15)

def test_more_reward_with_less_of_the_judge_is_over_optimisation():
    rows = [{"epoch": e, "reward": {"value": r}, "judge_score": {"value": j}} for e, r, j in (
        (10, 0.3, 0.5), (20, 0.6, 0.4), (30, 0.2, 0.4), (40, 0.6, 0.7), (50, 0.7, 0.6))]
    assert evaluate.over_optimised(rows) == [20, 50]

NASTY = ["<script>window.pwned = 1</script> wind", 'a "quoted" \'dog\' & <b>cat</b>',
         "a bird \U0001f426", "\u0643\u0644\u0628 \u064a\u0646\u0628\u062d",
         "</script><img src=x onerror='window.pwned = 1'>"]
PAGE_PROMPTS = NASTY + [f"prompt number {i} of a long file, all different" for i in range(11)]

def test_the_judge_hears_what_the_run_played(finished_run):
    """The same clips, so the same rewards; at guidance 1 others; the last snapshot is the tuned
    model, and the best of n the more rewarded the larger n."""
    run = finished_run.folder
    flags = ["--judge", str(TOY / "judge"), "--guidance", "1", "--best-of", "1", "4", "--snapshots",
             "--noises", str(clap_ppo.EVAL_CLIPS)]
    assert evaluate.main([str(run), *flags]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    for side, shown in zip(("base", "tuned"), re.search(r"reward (\S+) -> (\S+),",
                                                        finished_run.out).groups()):
        assert found[side]["reward"]["value"] == pytest.approx(float(shown), abs=6e-4)
    assert found["snapshots"][-1]["judge_score"] == found["tuned"]["judge_score"]
    assert [row["label"] for row in found["guidance"]] == ["base, guidance 1", "tuned, guidance 1"]
    assert found["guidance"][0]["reward"] != found["base"]["reward"]
    assert found["best_of"][1]["reward"]["value"] > found["best_of"][0]["reward"]["value"]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate.main(["gone"]) == evaluate.main([str(run), "--judge", str(run)]) == 2

@pytest.fixture(scope="session")
def page_folder(tmp_path_factory) -> Path:
    """The page of a run with 16 prompts. Base clips are low tones, tuned clips high and louder."""
    import soundfile
    run, count = tmp_path_factory.mktemp("page"), len(PAGE_PROMPTS)

    def clips(first, level, judge):
        waveforms = torch.cat([level * tone(first + 10 * i, 16000, 2.56) for i in range(count)])
        return evaluate.Clips(waveforms[:, None], torch.rand(count, 1, generator=seeded(first)),
                              judge * torch.eye(count)[:, None], torch.ones(count, 1, 4))

    base, tuned = clips(200, 0.1, 0.3), clips(2000, 0.5, 0.6)
    rows = evaluate.save_clips(run, base, tuned, PAGE_PROMPTS, 16000)
    for row in rows:                             # nothing about a file tells which model made it
        waves = [soundfile.read(run / row[side]["file"])[0] for side in ("base", "tuned")]
        assert (waves[0] ** 2).mean() == pytest.approx((waves[1] ** 2).mean(), rel=0.01)
    metrics = [{"epoch": 1, "reward": 0.3}, {"epoch": 2, "reward": 0.4, "eval_reward": 0.5}]
    evaluate.save_page(run, config(), rows, evaluate.compare(base, tuned), metrics, 16000)
    return run

@pytest.fixture
def page(page_folder):
    """The page as a double click opens it, offline; errors in its scripts fail the test."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    asked, errors = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium",
                                             args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((page_folder / "listen.html").as_uri())
        yield page
    assert errors == [] and [url for url in asked if not url.startswith(("file:", "blob:"))] == []

def test_the_plain_page_of_a_run_plays_its_clips_and_prompts_are_text(
        page, finished_run, tmp_path, monkeypatch):
    """Tags, quotes, emoji and Arabic appear as written, and nothing in them runs."""
    assert page.locator("#rows h3").all_text_contents() == PAGE_PROMPTS
    setup = painter_setup()
    setup.prompts, setup.num_train = ["up", *NASTY], 1
    clips = torch.zeros(2 * len(NASTY), 40960), torch.zeros(len(NASTY), 2)
    monkeypatch.setattr(clap_ppo, "score_held_out", lambda *args: clips)
    clap_ppo.finish(setup, tmp_path)
    for folder, prompts in ((finished_run.folder, HELD_OUT), (tmp_path, NASTY)):
        page.goto((folder / "index.html").as_uri())
        assert page.locator("td:first-child").all_text_contents() == prompts
        players = "[...document.querySelectorAll('audio')]"
        page.wait_for_function(f"{players}.every(a => a.duration == 2.56)")
        assert page.locator("audio").count() == 2 * len(prompts)
        assert page.evaluate("window.pwned") is None

def test_the_blind_test_by_keyboard_and_its_rates(page, page_folder, tmp_path, capsys):
    """This listener recognises tuned clips only and prefers them, but for one. A slip of the finger
    is taken back; a reload loses nothing. The rates shown are those that pooling finds."""
    page.locator("#to-blind").press("Enter")
    page.select_option("#size", "8")
    page.locator("button.main").press("Enter")
    state = "JSON.parse(localStorage.getItem(KEY))"
    page.keyboard.press("1")
    page.keyboard.press("Backspace")
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
            page.keyboard.press("0" if question == 0 else "1" if item["a"] == "tuned" else "2")
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
    rates = evaluate.pool_listeners([str(file)])
    assert [rate["value"] for rate in rates.values()] == [7.5 / 8, 0, 1]
    for name, rate in rates.items():
        shown = page.locator(f"#{name}").text_content()
        assert [float(x) for x in re.findall(r"[\d.]+", shown)] == pytest.approx(
            [rate["value"], rate["low"], rate["high"]], abs=5.1e-4)
    assert evaluate.main(["--pool", str(file)]) == 0 and "0.938 [" in capsys.readouterr().out
    for second, complaint in ((str(file), "listener again"), (__file__, "not a download")):
        assert evaluate.main(["--pool", str(file), second]) == 2
        assert complaint in capsys.readouterr().err

# ==== 11. Real models: the official formats, full-size CLAP, random weights ======================

def small_audioldm(folder: Path) -> None:
    """AudioLDM's architecture, but narrow; text encoder, VAE and vocoder are the toy's."""
    from diffusers import AudioLDMPipeline, UNet2DConditionModel
    pipe = AudioLDMPipeline.from_pretrained(TOY / "pipeline", dtype=torch.float32)
    torch.manual_seed(0)
    widths = [8, 16, 24, 40]
    pipe.unet = UNet2DConditionModel(
        **{**bench.LEVELS, "block_out_channels": widths, "layers_per_block": 1},
        cross_attention_dim=widths, attention_head_dim=4, norm_num_groups=8,
        class_embed_type="simple_projection", class_embeddings_concat=True,
        projection_class_embeddings_input_dim=64)
    pipe.save_pretrained(folder)

def small_audioldm2(folder: Path) -> None:
    """As on the hub, the index names GPT2Model, a class that cannot generate."""
    from diffusers import (AudioLDM2Pipeline, AudioLDM2ProjectionModel,
                           AudioLDM2UNet2DConditionModel, AudioLDMPipeline)
    from transformers import (ClapFeatureExtractor, ClapModel, GPT2Config, GPT2LMHeadModel,
                              T5Config, T5EncoderModel, T5Tokenizer)
    toy = AudioLDMPipeline.from_pretrained(TOY / "pipeline", dtype=torch.float32)
    clap = ClapModel.from_pretrained(TOY / "judge", dtype=torch.float32)
    words = (TOY / "pipeline/vocabulary.txt").read_text().split()
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -5.0)]
    vocabulary += [("\u2581" + word, -3.0) for word in words]
    torch.manual_seed(0)
    language_model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=10))
    language_model.config.max_new_tokens = 8
    unet = AudioLDM2UNet2DConditionModel(
        **{**bench.LEVELS, "block_out_channels": [8, 16, 24, 40], "layers_per_block": 1},
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
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("clap") / "630k-audioset-best.pt"
    save_as_official(file, make_toy.make_clap("HTSAT-tiny"))
    yield file
    file.unlink()

NARROW = {"audioldm": small_audioldm, "audioldm2": small_audioldm2}

def narrow_setup(family: str, folder: Path, loud: float, *flags: str):
    """A narrow real architecture with the toy's CLAP. A random U-Net whispers (its output has a
    standard deviation of a third) and hardly hears its prompt: both are turned up."""
    NARROW[family](folder / "model")
    (folder / "p.txt").write_text("\n".join(TRAIN_PROMPTS))
    setup = load("--prompts", str(folder / "p.txt"), "--model", str(folder / "model"), *CLAP, *TINY,
                 *flags)
    inner = setup.unet.base_model.model
    inner.conv_out.weight.data *= 3
    setup.condition = {k: v * loud if v.is_floating_point() else v
                       for k, v in setup.condition.items()}
    return setup

@pytest.mark.parametrize("family", NARROW)
def test_float16_has_the_gradient_of_float32(family, tmp_path, monkeypatch):
    """At AudioLDM's D = 16,384 most of it underflows without a loss scale, unnoticed."""
    setup, gradients = narrow_setup(family, tmp_path, 1), {}
    setup.latent_shape = (8, 128, 16)
    weights = setup.optimizer.param_groups[0]["params"]
    for weight in weights:                       # else B = 0, and A has no gradient
        weight.data += 0.02 * torch.randn(weight.shape, generator=seeded(0))
    _, rows = roll(setup, starts=(1, 2))

    def keep(setup, number):
        setup.scaler.unscale_(setup.optimizer)
        gradients[setup.dtype] = [w.grad.clone() for w in weights]
        setup.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(clap_ppo, "optimizer_step", keep)
    monkeypatch.setattr(clap_ppo, "check_on_policy", lambda *args: 0.0)
    for dtype in (torch.float32, torch.float16):
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        scaler.scale(torch.zeros(1))             # as if it had been used before
        setup.cfg = dataclasses.replace(setup.cfg, updates_per_epoch=1)
        update_once(dataclasses.replace(setup, dtype=dtype, scaler=scaler), dict(rows))
    full, half = gradients[torch.float32], gradients[torch.float16]
    assert all(gradient.abs().max() > 0 for gradient in half)
    cosine = torch.cosine_similarity(*(torch.cat([g.flatten() for g in side])[None]
                                       for side in (full, half)))
    assert cosine > 0.999

def test_a_loss_scale_survives_a_stop(run_flags, tmp_path):
    flags = [*run_flags, "--dtype", "float16", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert clap_ppo.main(flags) == 0
    cfg, run = clap_ppo.parse_args(["--resume", str(tmp_path / "run")])
    scaler = clap_ppo.resume_run(cfg, run)[0].scaler.state_dict()
    assert scaler["scale"] == 65536 and scaler["_growth_tracker"] == 2

@pytest.mark.parametrize("overflow, stops", [(1, False), (99, True)])
def test_float16_skips_a_step_that_overflows_but_not_for_ever(overflow, stops):
    """The scaler halves its scale until nothing is left to halve."""
    setup = painter_setup("--dtype", "float16", "--epochs", "100", adapter_noise=0.1)
    group = setup.optimizer.param_groups[0]
    before = group["params"][0].detach().clone()

    def step(number):
        loss = sum(w.sum() for w in group["params"]) * (math.inf if number < overflow else 1)
        setup.scaler.scale(loss).backward()
        return clap_ppo.optimizer_step(setup, number)

    if stops:
        with pytest.raises(UserError, match="gradient is not finite"):
            for number in range(99):
                step(number)
    else:
        assert step(0) == math.inf and torch.equal(group["params"][0], before)
        assert step(1) < math.inf and not torch.equal(group["params"][0], before)

@pytest.mark.slow
@pytest.mark.parametrize("dtype, error", PRECISIONS[1:])
@pytest.mark.parametrize("family", NARROW)
def test_a_broken_replay_stops_real_architectures_and_rounding_does_not(
        family, dtype, error, tmp_path):
    setup = narrow_setup(family, tmp_path, 100)
    with gpu(setup, error, dtype) as emulated:
        replay_broken(emulated, "none")
    for fault in FAULTS:
        with gpu(setup, error, dtype) as emulated:
            with pytest.raises(UserError, match="on-policy check"):
                replay_broken(emulated, fault)

@pytest.mark.slow
@pytest.mark.parametrize("family, dtype", [
    ("audioldm", "bfloat16"), ("audioldm2", "float32"), ("audioldm2", "float16")])
def test_real_architectures_run_from_their_folders(
        family, dtype, real_checkpoint, prompt_file, tmp_path, monkeypatch, capsys):
    """With the full-size CLAP. Cut in the second epoch and resumed, the adapter has the same bytes;
    in float32, clips of several lengths are those of the stock pipeline."""
    NARROW[family](tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    monkeypatch.setattr(clap_ppo, "EVAL_CLIPS", 1)
    flags = ["--prompts", prompt_file, "--model", tmp_path / "model", "--clap", real_checkpoint,
             *TINY, "--dtype", dtype, "--learning-rate", "0.02", "--noise-until", "0.4",
             "--clip-range", "1e-5"]                            # x 16 for D = 1,024
    assert run_main(capsys, *flags, "--epochs", 2, "--out", tmp_path / "run")[0] == 0
    adapter, rows, _ = results(tmp_path / "run")
    for row in rows:
        assert row["approx_kl"] > 0 and row["reward_spread"] > 0
    real, calls = clap_ppo.score_clips, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(clap_ppo, "score_clips", interrupted)
    assert run_main(capsys, *flags, "--epochs", 2, "--out", tmp_path / "cut")[0] == 130
    assert run_main(capsys, "--resume", tmp_path / "cut")[0] == 0
    assert results(tmp_path / "cut")[0] == adapter
    if dtype == "float32":
        for seconds in (0.29, 2.53):
            compare_with_stock(tmp_path / "model", tmp_path, seconds)

def test_the_conditions_of_audioldm2_do_not_depend_on_the_batch(tmp_path):
    small_audioldm2(tmp_path / "model")
    pipe = clap_ppo.load_pipeline(str(tmp_path / "model"))
    alone, nothing = ({k: v[i:i + 1] for k, v in clap_ppo.encode_prompts(pipe, ["snoring"]).items()}
                      for i in (0, 1))
    both = clap_ppo.encode_prompts(pipe, ["snoring", "a dog barking then a lion roaring"])
    assert torch.equal(alone["encoder_hidden_states"], both["encoder_hidden_states"][:1])
    length = alone["encoder_attention_mask_1"].shape[1]
    assert both["encoder_attention_mask_1"].sum(dim=1).tolist()[0] == length
    both = {k: v[:2] for k, v in both.items()}
    assert both["encoder_attention_mask_1"].shape[1] > length
    x, t = torch.randn(1, 8, 16, 8, generator=seeded(0)), torch.tensor([500])
    one = pipe.unet(x, t, **alone).sample
    other = pipe.unet(x, t, **{k: v[:1] for k, v in both.items()}).sample
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for different in ({k: v[1:] for k, v in both.items()}, nothing):
        assert (pipe.unet(x, t, **different).sample - one).abs().max() > 1e-4

def test_a_checkpoint_named_by_its_place_on_the_hub_is_fetched_once(clap, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download",
                        lambda *args: asked.append(args) or str(TOY / "clap.pt"))
    flags = re.search(r"--clap (\S+)", clap_ppo.__doc__)
    clap_ppo.load_clap(flags[1], clap.tokenizer)
    assert asked == [("lukewys/laion_clap", "630k-audioset-best.pt")]
