"""Chapter two: what `clap_ppo.py` claims, tried out. Read it after the script, from top to bottom.

    pytest test_clap_ppo.py                 # nearly everything, under four minutes on two cores
    pytest test_clap_ppo.py -m slow         # full-size CLAP, a killed process

A claim is worth what an independent reference says of it: here diffusers' own DDIM step,
torch.distributions, a stock pipeline. Any model will do: `Painter`, one matrix; else the toy.
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import doctest
import functools
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")     # read once, when huggingface_hub is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from torch import nn
from torch.distributions import Normal, kl_divergence

import clap_ppo
from clap_ppo import UserError

HERE = Path(__file__).resolve().parent
TOY = HERE / "samples/toy"
README = (HERE / "README.md").read_text()
sys.path[:0] = [str(HERE / "samples"), str(TOY)]
import bench, evaluate, experiments, make_toy, pictures, toy_sounds  # noqa: E401, I001

TINY = ["--prompts-per-epoch", "2", "--clips-per-prompt", "4", "--num-steps", "5", "--epochs", "3",
        "--updates-per-epoch", "2", "--noisy-steps", "2", "--seconds", "2.56",
        "--micro-batch", "3"]                    # which does not divide the 8 rows of an update
TRAIN_PROMPTS = ["birds chirp", "water flows", "snoring", "a dog is barking then talking"]
HELD_OUT = ["a lion roaring", "wind blowing", "a man snores while leaves rustling"]

# ==== 0. The cast ================================================================================
def make_scheduler(**changes):
    """AudioLDM's DDIM scheduler, or one with other settings."""
    from diffusers import DDIMScheduler
    audioldm = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear",
                    clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return DDIMScheduler(**audioldm | changes)

class Painter(nn.Module):
    """Exact noise prediction for N(0, I) data, plus a shift by prompt. LoRA looks for `to_q`."""
    device = torch.device("cpu")
    def __init__(self, prompts: int, shape: tuple):
        super().__init__()
        self.config = SimpleNamespace(in_channels=shape[0])
        self.alpha_bar = make_scheduler().alphas_cumprod
        self.to_q = nn.Linear(prompts, math.prod(shape), bias=False)
        self.to_q.weight.data = 0.3 * torch.randn(self.to_q.weight.shape, generator=seeded(1))
        self.dropout = nn.Dropout(0.5)
    def forward(self, latents, timesteps, class_labels, encoder_hidden_states=None):
        noise_share = (1 - self.alpha_bar[timesteps]).sqrt().reshape(-1, 1, 1, 1)
        shift = self.dropout(self.to_q(class_labels)).reshape(latents.shape)
        return SimpleNamespace(sample=noise_share * latents + shift)

def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

def config(**changes) -> clap_ppo.Config:
    """The Config of a tiny command line, with changes."""
    return dataclasses.replace(clap_ppo.parse_args(TINY)[0], **changes)

def trainable(unet) -> list:
    return [weight for weight in unet.parameters() if weight.requires_grad]

def painter_setup(adapter_noise=0.0, **changes) -> clap_ppo.Setup:
    """Prompts "up" and "down" like large and small latents, (2, 2, 4) a second. Plain SGD."""
    defaults = {"num_steps": 10, "eval_guidance": 1.0, "seconds": 1.0, "lora_rank": 4}
    cfg = config(**defaults | changes)
    vocoder = dict(upsample_rates=[80, 100], sampling_rate=16000, model_in_dim=4)   # two frames / s
    pipeline = SimpleNamespace(
        unet=Painter(2, (2, round(2 * cfg.seconds), 4)), scheduler=make_scheduler(),
        vae=SimpleNamespace(config=SimpleNamespace(block_out_channels=[1])),        # halves nothing
        vocoder=SimpleNamespace(config=SimpleNamespace(**vocoder)))
    def reward(waveforms, sample_rate, prompts):
        size = waveforms.shape[1] ** 0.5 / 4     # of the mean's own deviation
        return torch.tensor([size if p == "up" else -size for p in prompts]) * waveforms.mean(dim=1)
    conditions = {"class_labels": torch.eye(2)}, {"class_labels": torch.full((2, 2), 0.1)}
    setup = clap_ppo.make_setup(cfg, ["up", "down"], 2, pipeline, conditions, reward)
    for weight in trainable(setup.unet):
        weight.data += adapter_noise * torch.randn(weight.shape, generator=seeded(3))
    setup.optimizer = torch.optim.SGD(trainable(setup.unet), lr=cfg.learning_rate)
    return setup

def roll(setup):
    return clap_ppo.rollout(setup, torch.tensor([0, 1]), seeded(0))

def replay(setup, rows: dict) -> tuple:
    """Log-prob (R,), mean and sigma of recorded actions under today's weights."""
    mean, sigma = clap_ppo.policy(setup, rows, clap_ppo.ETA, setup.condition)
    return clap_ppo.gaussian_log_prob(rows["next_latents"], mean, sigma), mean, sigma

@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    """A training file with the held-out file beside it, where the script looks for it."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("# four\n\n" + "\n".join(TRAIN_PROMPTS) + "\n")
    (folder / "eval_prompts.txt").write_text("\n".join(HELD_OUT) + "\n")
    return folder / "prompts.txt"

def load(*flags) -> clap_ppo.Setup:
    """The Setup of a command line."""
    cfg, _ = clap_ppo.parse_args([str(flag) for flag in flags])
    return clap_ppo.load_setup(cfg, *clap_ppo.split_prompts(cfg))

@pytest.fixture(scope="session")
def setup(prompt_file):
    """The toy's, loaded once. Tests leave it as they found it."""
    return load("--prompts", prompt_file, *TINY)

@pytest.fixture(scope="session")
def clap(setup):
    return setup.reward.args[0]

run_process = functools.partial(subprocess.run, capture_output=True, text=True)
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
def run_flags(prompt_file):
    """A run of three epochs, which is still warming up when it ends."""
    return ["--prompts", str(prompt_file), "--model", str(TOY / "pipeline"), "--clap",
            str(TOY / "clap.pt"), *TINY, "--eval-guidance", "2.5", "--learning-rate", "0.1"]

@pytest.fixture(scope="session")
def finished_run(run_flags, tmp_path_factory):
    """That run, by the script *alone* in a folder, with the network cut and attempts noted."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(HERE / "clap_ppo.py", folder)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    code = f"LOG = {str(folder / 'network.log')!r}{NETWORK_CUT}"
    done = run_process([sys.executable, "-c", code, *run_flags], cwd=folder,
                       env={**env, "HF_HOME": str(folder / "empty-cache")})
    assert done.returncode == 0, done.stderr[-2000:]
    return SimpleNamespace(out=done.stdout, folder=folder / "runs/seed-0",
                           network=folder / "network.log")

# ==== 1. A denoising step is a Gaussian policy ===================================================
@pytest.mark.parametrize("spacing, offset, one, num_steps, eta", list(itertools.product(
    ("leading", "trailing", "linspace"), (0, 1), (True, False), (10, 7), (0.3, 1.0))))
def test_a_step_is_that_of_diffusers(spacing, offset, one, num_steps, eta):
    """Seven steps do not divide 1000, where a formula for the previous timestep goes wrong."""
    scheduler = make_scheduler(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=one)
    timesteps, alpha_bar_t, alpha_bar_prev = clap_ppo.ddim_schedule(scheduler, num_steps)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    for step, t in enumerate(scheduler.timesteps):
        latents, output, noise = torch.randn(3, 2, 4, 3, 5, generator=seeded(step))
        bars = alpha_bar_t[step], alpha_bar_prev[step]
        sigma = clap_ppo.ddim_sigma(*bars, eta)
        mean = clap_ppo.ddim_mean(output, latents, *bars, sigma)
        theirs = scheduler.step(output, t, latents, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + sigma * noise, theirs, rtol=2e-5, atol=2e-5)
        assert sigma > 0 or step == num_steps - 1

@pytest.mark.parametrize("kind, settings, complaint", [
    ("DDIMScheduler", {}, "clip_sample=True"),          # the library's own default
    ("DDIMScheduler", {"prediction_type": "v_prediction"}, "prediction_type=v_prediction"),
    ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding=True"),
    ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True}, "zero_snr=True"),
    ("DDPMScheduler", {"clip_sample": False}, "DDPMScheduler")])
def test_a_schedule_that_would_be_computed_wrongly_is_refused(kind, settings, complaint):
    """Its steps would be off by 10 % and more, and nothing else would say so."""
    import diffusers
    scheduler = getattr(diffusers, kind)(**settings)
    with pytest.raises(UserError, match=complaint):
        clap_ppo.ddim_schedule(scheduler, 10)

def test_log_prob_and_kl_are_those_of_torch_per_element_and_each_row_has_its_own_sigma():
    """A sum would grow with the latents. One row without noise spoils a table."""
    x, mean, base = torch.randn(3, 3, 2, 4, 3, generator=seeded(0))
    sigma = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    reference = Normal(mean, sigma).log_prob(x).mean(dim=(1, 2, 3))
    for size in ((1, 1, 1, 1), (1, 1, 10, 100)):
        log_prob = clap_ppo.gaussian_log_prob(x.repeat(size), mean.repeat(size), sigma)
        torch.testing.assert_close(log_prob, reference, rtol=1e-5, atol=1e-5)
    reference = kl_divergence(Normal(mean, sigma), Normal(base, sigma)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(clap_ppo.gaussian_kl(mean, base, sigma), reference)
    with pytest.raises(UserError, match="sigma is 0"):
        clap_ppo.gaussian_log_prob(x, mean, sigma * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1))

def test_half_precision_goes_in_and_float32_comes_out_and_never_nan():
    """A ratio is clipped at 1e-4; bfloat16 has steps of 4e-3. At eta 1 no variance may be left."""
    latents, output = torch.randn(2, 2, 4, 3, 5, generator=seeded(0)).bfloat16()
    numbers = torch.tensor(0.5), torch.tensor(0.8), torch.tensor(0.2)
    mean = clap_ppo.ddim_mean(output, latents, *numbers)
    assert torch.equal(mean, clap_ppo.ddim_mean(output.float(), latents.float(), *numbers))
    bars = torch.tensor(1e-8), torch.tensor(0.6)        # 1 - 0.6 - sigma^2 is -3e-8 in float32
    sigma = clap_ppo.ddim_sigma(*bars, 1.0)
    assert clap_ppo.ddim_mean(output, latents, *bars, sigma).isfinite().all()

def naive_rollout(setup, own_noise: bool) -> tuple:
    """What it means, clip by clip, by diffusers: latents, {(clip, step): (x_t, x_{t-1})}."""
    cfg, K = setup.cfg, setup.cfg.clips_per_prompt
    scheduler, visited, generator = make_scheduler(), {}, seeded(0)
    def draw(count):
        return torch.randn(count, 1, *setup.latent_shape, generator=generator)
    clips = list(draw(2 * K) if own_noise else draw(2).repeat_interleave(K, dim=0))     # x_T
    scheduler.set_timesteps(cfg.num_steps)
    for step, t in enumerate(scheduler.timesteps):
        noisy = step < cfg.noisy_steps
        noise = draw(2 * K) if noisy else clips         # without eta it does not count
        for c, x in enumerate(clips):
            with torch.no_grad():
                out = setup.unet(x, t[None], setup.condition["class_labels"][c // K][None]).sample
            clips[c] = scheduler.step(out, t, x, eta=clap_ppo.ETA if noisy else 0.0,
                                      variance_noise=noise[c]).prev_sample
            if noisy:
                visited[c, step] = (x[0], clips[c][0])
    return torch.cat(clips), visited

@pytest.mark.parametrize("noisy_steps, own_noise, eta", [
    (2, False, 1.0), (1, False, 0.5), (6, False, 1.0), (2, True, 1.0), (6, True, 1.0)])
def test_a_rollout_is_what_a_naive_loop_gives(monkeypatch, noisy_steps, own_noise, eta):
    """Asked in chunks, unguided. Each noisy step of each clip is a row; the last step never is."""
    monkeypatch.setattr(clap_ppo, "ETA", eta)
    monkeypatch.setattr(clap_ppo, "ROWS_AT_ONCE", 3)
    if own_noise:
        monkeypatch.setattr(clap_ppo, "starting_latents", experiments.own_starting_latents)
    setup = painter_setup(0.2, num_steps=7, noisy_steps=noisy_steps, eval_guidance=3.0)
    latents, rows = roll(setup)
    expected, visited = naive_rollout(setup, own_noise)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    found = list(zip(rows["clip_id"].tolist(), rows["step"].tolist(), strict=True))
    assert sorted(found) == sorted(visited) and max(rows["step"]) == noisy_steps - 1
    assert rows["prompt_id"].tolist() == [clip // 4 for clip, _ in found]
    for row, place in enumerate(found):
        for name, x in zip(("latents", "next_latents"), visited[place], strict=True):
            torch.testing.assert_close(rows[name][row], x, rtol=1e-4, atol=1e-5)

# ==== 2. Replaying a trajectory gives ratio 1 ====================================================
def test_the_micro_batch_does_not_cut_what_needs_no_gradient(learner, tmp_path):
    """20 calls of the U-Net in the rollout, in the same 64 micro-batches old and new log-probs."""
    setup = learner(epochs=1, prompts_per_epoch=16, num_steps=20, noisy_steps=4, micro_batch=8)
    calls = Counter()
    setup.unet.base_model.model.register_forward_pre_hook(
        lambda _, args: calls.update([(torch.is_grad_enabled(), len(args[0]))]))
    clap_ppo.train(setup, tmp_path, [])
    assert calls.pop((True, 8)) == calls.pop((False, 8)) == 16 * 8 * 4 / 8
    assert calls.total() <= 60 and max(rows for _, rows in calls) <= clap_ppo.ROWS_AT_ONCE

def test_prompts_repeat_only_if_there_are_too_few_and_held_out_ones_are_never_drawn():
    setup = painter_setup()
    setup.prompts.append("held out")
    drawn = [clap_ppo.choose_prompts(setup, seeded(seed)).tolist() for seed in range(20)]
    assert [0, 1] in drawn and [1, 0] in drawn and all(len(set(ids)) == 2 for ids in drawn)
    setup.cfg, setup.num_train = dataclasses.replace(setup.cfg, prompts_per_epoch=4), 3
    assert set(clap_ppo.choose_prompts(setup, seeded(0)).tolist()) == {0, 1, 2}

def update_once(setup, rows, advantages=None, epoch=0):
    """An update, by default with advantages that rise from -1 to 1 from clip to clip."""
    if advantages is None:
        clips = rows["clip_id"]
        advantages = torch.linspace(-1, 1, clips.max() + 1)[clips]
    return clap_ppo.update(setup, {**rows, "advantage": advantages}, epoch, seeded(0))

def on_a_gpu(setup, error: float, dtype="float32"):
    """A copy of `setup` on an emulated GPU: its output depends on the batch, by `error` of it."""
    cfg = dataclasses.replace(setup.cfg, num_steps=10, noisy_steps=3, micro_batch=5)
    timesteps, alpha_bar_t, alpha_bar_prev = clap_ppo.ddim_schedule(make_scheduler(), 10)
    unet = copy.deepcopy(setup.unet)
    def kernels(module, args, output):
        x = output.sample
        noise = torch.randn(x.shape, generator=seeded(len(x))) * x.detach().float().std() * error
        return SimpleNamespace(sample=x + noise.to(x.dtype))
    unet.base_model.model.register_forward_hook(kernels)
    return dataclasses.replace(
        setup, unet=unet, cfg=cfg, optimizer=torch.optim.AdamW(trainable(unet)),
        dtype=getattr(torch, dtype), timesteps=timesteps, alpha_bar_t=alpha_bar_t,
        alpha_bar_prev=alpha_bar_prev)

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
PRECISIONS = [("float32", 1e-7), ("float32", 0.012), ("bfloat16", 0.012)]
def break_replay(setup, rows: dict, fault: str) -> tuple:
    """A copy of both with one of four errors that have happened to people."""
    broken = dataclasses.replace(setup, unet=copy.deepcopy(setup.unet))
    inner = broken.unet.base_model.model
    if fault == "dropout":
        inner.conv_out = nn.Sequential(nn.Dropout(0.1), inner.conv_out).train()
    elif fault == "weights":
        inner.conv_out.bias.data += 0.1
    wrong = {"step": {"step": rows["step"] + 1}, "prompt": {"prompt_id": 1 - rows["prompt_id"]}}
    return broken, rows | wrong.get(fault, {})

@pytest.mark.parametrize("dtype, error", PRECISIONS)
@pytest.mark.parametrize("family", ["toy", slow("audioldm"), slow("audioldm2")])
def test_the_ratio_starts_at_one_and_a_broken_replay_stops_the_run(
        setup, narrow, monkeypatch, family, dtype, error):
    """Whatever the kernels do. Not by chance: the rollout's own log-probs are other numbers."""
    if family != "toy":
        setup = narrow_setup(narrow(family), loud=100)
    seen, real = [], clap_ppo.ppo_loss
    monkeypatch.setattr(clap_ppo, "ppo_loss", lambda *args: seen.append(args) or real(*args))
    emulated = on_a_gpu(setup, error, dtype)
    _, rows = roll(emulated)
    for fault in ("dropout", "step", "prompt", "weights"):
        with pytest.raises(UserError, match="log_prob_gap.*dropout.*another timestep"):
            update_once(*break_replay(emulated, rows, fault))
    log = update_once(emulated, rows)
    assert [len(log_prob) for log_prob, *_ in seen[:3]] == [5, 5, 2]
    for log_prob, old_log_prob, _, clip_range in seen[:3]:
        assert torch.equal(log_prob, old_log_prob)
        assert clip_range * math.prod(setup.latent_shape) == pytest.approx(1.6)     # an action's
    assert log["log_prob_gap"] > (1e-5 if error > 1e-6 else 0)

def test_on_a_cpu_in_float32_rollout_and_replay_are_equal():
    """In any company. The gap is below 1e-6; one above the limit stops the run, and so does NaN."""
    setup, idx = painter_setup(0.1), torch.tensor([6, 1, 3, 15])
    _, rows = roll(setup)
    again, _, _ = replay(setup, clap_ppo.take(rows, idx))
    torch.testing.assert_close(again, rows["log_prob"][idx])
    assert setup.unet.base_model.model.to_q.scaling == {"default": 1}       # at any rank
    assert update_once(setup, rows)["log_prob_gap"] < 1e-6
    for off in (1.1 * clap_ppo.MAX_LOG_PROB_GAP, math.nan):
        with pytest.raises(UserError, match="log_prob_gap"):
            update_once(setup, rows | {"log_prob": rows["log_prob"] + off})

def test_two_threads_give_the_same_bytes_every_time(request):
    """Some kernels add in any order, from 32,768 elements on, and a seed then ends elsewhere."""
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    found = set()
    for _ in range(20):
        setup = painter_setup(0.2, seconds=256, clips_per_prompt=8, micro_batch=64,
                              updates_per_epoch=1, learning_rate=100.0)    # the last bits count
        update_once(setup, roll(setup)[1])
        found.add(safetensors.torch.save(clap_ppo.adapter_state(setup.unet)))
    assert len(found) == 1 and 32 * math.prod(setup.latent_shape) > 32_768      # 32 rows

# ==== 3. The reward ==============================================================================
def tone(hz: float, sample_rate: int, seconds: float = 2.0) -> torch.Tensor:
    t = torch.arange(int(seconds * sample_rate)) / sample_rate
    return sum(0.3 / k * torch.sin(2 * math.pi * k * hz * t) for k in (1, 2, 3))[None]

@pytest.mark.parametrize("length, repeats", [(0.3, 3), (0.6, 1), (1.0, 1), (1.5, 1)])
def test_long_clips_keep_their_beginning_and_short_ones_repeat_whole(clap, length, repeats):
    """What reaches the audio tower, for clips of a share of its length."""
    size, given = clap.audio_cfg.clip_samples, []
    hook = clap["audio_branch"].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    clip = torch.rand(1, int(length * size), generator=seeded(0))
    clap_ppo.clap_reward(clap, clip, clap.audio_cfg.sample_rate, ["x"])
    hook.remove()
    heard = torch.cat([clip] * repeats, dim=1)[:, :size]
    assert torch.equal(given[0]["waveform"], nn.functional.pad(heard, (0, size - heard.shape[1])))

def test_the_sample_rate_matters(clap):
    def rewards(rate, declared):
        return clap_ppo.clap_reward(clap, tone(600, rate).repeat(4, 1), declared, TRAIN_PROMPTS)
    reference, right, wrong = rewards(48000, 48000), rewards(44100, 44100), rewards(44100, 16000)
    assert (reference - right).norm() < 0.25 * (reference - wrong).norm()

def test_each_clip_is_scored_against_its_own_prompt_as_by_the_package(clap, package):
    """By laion_clap's own class, with the same checkpoint, clip by clip; and without dice."""
    state = torch.load(TOY / "clap.pt", weights_only=True)["state_dict"]
    package.load_state_dict({name: weight.float() for name, weight in state.items()})
    rate, size = clap.audio_cfg.sample_rate, clap.audio_cfg.clip_samples
    clips = torch.cat([tone(hz, rate, 11)[:, :size] for hz in (200, 300, 400, 500)])
    clips[3] *= 5                                       # too loud
    prompts = ["snoring", "a dog barking", "snoring", "wind blowing then " * 24]     # 74 tokens
    ours = clap_ppo.clap_reward(clap, clips, rate, prompts)
    assert torch.equal(ours, clap_ppo.clap_reward(clap, clips, rate, prompts))
    for clip, prompt, reward in zip(clips, prompts, ours, strict=True):
        tokens = clap.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            audio = package.get_audio_embedding([{"waveform": clip.clamp(-1, 1)}])
            text = package.get_text_embedding(dict(tokens))
        assert reward.item() == pytest.approx((audio @ text.T).item(), abs=1e-5)     # of length 1

@pytest.mark.parametrize("waveforms, rate", [
    (torch.zeros(48000), 48000), (torch.zeros(1, 48000).short(), 48000), (torch.zeros(1, 99), 16)])
def test_sounds_of_another_shape_type_or_unit_are_refused(clap, waveforms, rate):
    with pytest.raises(ValueError, match="float waveforms"):
        clap_ppo.clap_reward(clap, waveforms, rate, ["x"])

NUMBERS = torch.tensor([1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("returned, complaint", [
    (NUMBERS.tolist(), ""), (NUMBERS.numpy(), ""), (NUMBERS[:, None], ""), (NUMBERS.double(), ""),
    (NUMBERS.clone().requires_grad_() * 1, ""), (torch.zeros(8), r"reward returned .*\[8\]"),
    (torch.tensor(0.5), r"reward returned .*\[\]"), ((NUMBERS, {}), "reward returned .*tuple"),
    (None, "reward returned .*NoneType"), (["good"] * 4, "returned .*list.*, not 4 numbers"),
    (NUMBERS / torch.tensor([1, 1, 0, 1]), "clip of 'down' is not finite"),
    (NUMBERS * math.nan, "clip of 'up' is not finite")])
def test_a_reward_is_any_n_finite_numbers_or_refused(monkeypatch, returned, complaint):
    """Twice as many would be dealt to the wrong clips."""
    monkeypatch.setattr(clap_ppo, "decode", lambda setup, latents: latents.flatten(1))
    setup = dataclasses.replace(painter_setup(), reward=lambda *args: returned)
    given = setup, torch.zeros(4, *setup.latent_shape), torch.tensor([0, 1])
    if complaint:
        with pytest.raises(UserError, match=complaint):
            clap_ppo.score_clips(*given)
    else:
        _, rewards = clap_ppo.score_clips(*given)
        assert torch.equal(rewards, NUMBERS.view(2, 2)) and not rewards.requires_grad

def save_as_official(file: Path, model, changes: dict) -> str:
    """A CLAP checkpoint as the official ones: module., position_ids, numpy scalar, Namespace."""
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(10)[None]
    state = {k: v for k, v in (state | changes).items() if v is not None}
    torch.save({"epoch": 7, "name": "official", "best": np.float64(0.5), "state_dict": state,
                "args": argparse.Namespace(lr=0.1)}, file)
    return str(file)

@pytest.fixture(scope="module")
def package():
    """The toy's CLAP as laion_clap's own class, with random weights."""
    return make_toy.make_clap(json.loads((TOY / "clap.json").read_text())).eval()

@pytest.fixture
def clap_file(tmp_path) -> Path:
    """Where a CLAP checkpoint may be saved; its sizes are there."""
    shutil.copy(TOY / "clap.json", tmp_path)
    return tmp_path / "clap.pt"

@pytest.mark.filterwarnings("error:.*numpy.core")
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_a_checkpoint_in_the_official_format_loads_whole(clap_file, package, clap, core):
    """Whichever numpy runs, and whichever wrote the file: 1 and 2 name the scalar's module so."""
    path, state = save_as_official(clap_file, package, {}), package.state_dict()
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, re.sub(rb"numpy\._?core(?=\.multiarray\n)", core, content))
    loaded = clap_ppo.load_clap(path, clap.tokenizer).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.items())
    assert {k.split(".")[0] for k in state.keys() - loaded.keys()} == {
        "audio_transform", "text_transform", "logit_scale_a", "logit_scale_t"}

class Malice:                                   # unpickled, it leaves a file behind
    def __init__(self, path):
        self.path = str(path)
    def __reduce__(self):
        return open, (self.path, "w")

WEIGHT = "module.audio_projection.0.weight"
@pytest.mark.parametrize("changes, complaint", [
    ({WEIGHT: None}, "Missing key"), ({WEIGHT: torch.ones(3, 3)}, "size mismatch"),
    ({"module.extra": torch.ones(1)}, "Unexpected key"), ({WEIGHT: Malice("pwned")}, ""),
    ({"module.audio_branch.patch_embed.mel_conv2d.weight": torch.ones(1)}, "mel_conv2d"),
    (b"", ""), (b"not a checkpoint", "")])
def test_a_clap_that_does_not_fit_or_holds_code_is_refused(
        clap_file, package, clap, monkeypatch, changes, complaint):
    """A missing weight would stay random and score. And a .pt file is a program."""
    monkeypatch.chdir(clap_file.parent)
    if isinstance(changes, bytes):
        clap_file.write_bytes(changes)
    else:
        save_as_official(clap_file, package, changes)
    with pytest.raises(UserError, match=f"--clap .*clap.pt: no usable file, .*{complaint}"):
        clap_ppo.load_clap(str(clap_file), clap.tokenizer)
    assert not Path("pwned").exists()

# ==== 4. The advantage ===========================================================================
@pytest.mark.parametrize("rewards, advantages", [
    ([[0, 1, 1, 2]], [[-2 ** 0.5, 0, 0, 2 ** 0.5]]),    # mean 1, deviation sqrt(1/2); stars will do
    ([[7, 7, 7]], [[0, 0, 0]]),                         # without spread: nothing
    ([[0.1, 0.3, 0.5], [5, 7, 9]], 2 * [[-1.5 ** 0.5, 0, 1.5 ** 0.5]]),  # prompts do not compete
    # Divided by its deviation, the noise of alike clips would count as much as success.
    ([[0.50, 0.52, 0.48], [0.0, 0.2, -0.2]], [[0, 0.2, -0.2], [0, 1.5 ** 0.5, -1.5 ** 0.5]]),
], ids=["stars", "equal", "prompts", "little-spread"])
def test_an_advantage_says_how_much_better_a_clip_is_than_others_of_its_prompt(rewards, advantages):
    found = clap_ppo.group_advantages(torch.tensor(rewards))
    torch.testing.assert_close(found, torch.tensor(advantages, dtype=torch.float32))

# ==== 5. What clipping does, case by case ========================================================
def test_clipping_stops_what_went_far_enough_and_nothing_else():
    """The gradient of a row's term on its log-prob is -A * ratio, or 0 where clipped."""
    advantages, ratio, terms, gradients = torch.tensor([
        (+3, 1.0, -3.0, -3.0),      # at ratio 1 clipped PPO is REINFORCE
        (+1, 1.1, -1.1, -1.1),      # good, more likely, within the range: push on
        (+1, 1.5, -1.2, 0.0),       # good, made likely enough: stop
        (+1, 0.5, -0.5, -0.5),      # good, yet less likely: the wrong way, so pull back
        (-1, 0.9, +0.9, +0.9),      # bad, less likely, within the range: push on
        (-1, 0.5, +0.8, 0.0),       # bad, made unlikely enough: stop
        (-1, 1.5, +1.5, +1.5),      # bad, yet more likely: the wrong way, so pull back
        (-2, 1.5, +3.0, +3.0),      # twice as bad: twice the loss, twice the pull
    ]).T
    log_prob = ratio.log().requires_grad_()
    loss, info = clap_ppo.ppo_loss(log_prob, torch.zeros(8), advantages, 0.2)
    loss.backward()
    torch.testing.assert_close(loss, terms.mean())
    torch.testing.assert_close(8 * log_prob.grad, gradients)
    assert info["clip_fraction"] == 5 / 8 and not info["approx_kl"].requires_grad

def test_approx_kl_estimates_the_kl_and_is_never_negative():
    """Between N(0, 1) and N(m, 1) the KL is m^2 / 2. At a log-ratio of 1e-4, 5e-9 must be left."""
    x = torch.randn(200_000, generator=seeded(0))
    old, new = Normal(0.0, 1.0).log_prob(x), Normal(0.3, 1.0).log_prob(x)
    estimate = clap_ppo.ppo_loss(new, old, torch.zeros(len(x)), 0.2)[1]["approx_kl"]
    assert estimate == pytest.approx(0.3 ** 2 / 2, rel=0.02)
    for log_ratio in (-0.5, -1e-4, 0.0, 1e-4, 0.5):
        _, info = clap_ppo.ppo_loss(torch.tensor([log_ratio]), torch.zeros(1), torch.zeros(1), 0.2)
        exact = math.expm1(log_ratio) - log_ratio
        assert info["approx_kl"] >= 0 and info["approx_kl"] == pytest.approx(exact, 1e-2, 1e-12)

ROW, COLUMN = torch.zeros(8), torch.zeros(8, 1)
@pytest.mark.parametrize("function, given", [
    (clap_ppo.group_advantages, [ROW]), (clap_ppo.group_advantages, [COLUMN]),
    (clap_ppo.group_advantages, [torch.zeros(2, 2, 2)]), (clap_ppo.ppo_loss, [COLUMN, ROW, ROW, 1]),
    (clap_ppo.ppo_loss, [ROW, COLUMN, ROW, 1]), (clap_ppo.ppo_loss, [ROW, ROW, COLUMN, 1])])
def test_a_column_is_refused_where_rows_or_groups_belong(function, given):
    """Groups of one clip would give zeros, rows and a column a table of 64, both without a word."""
    with pytest.raises(UserError, match=r"not \(P, K\), with K of 2|not all \(B,\)"):
        function(*given)

# ==== 6. All of it learns ========================================================================
@pytest.fixture
def learner(monkeypatch):
    """Makes a painter's setup for `train`, whose "decoder" hands the latents on."""
    monkeypatch.setattr(clap_ppo, "decode", lambda setup, latents: latents.flatten(1))
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    def make(rate=0.03, **changes):
        few = dict(num_steps=6, clips_per_prompt=8, learning_rate=rate, micro_batch=64)
        setup = painter_setup(**few | changes)
        setup.optimizer = torch.optim.AdamW(trainable(setup.unet))
        return setup
    return make

@pytest.mark.parametrize("sign", [1, -1], ids=["", "sign-flipped"])
def test_a_policy_learns_what_its_prompts_want(learner, tmp_path, monkeypatch, sign):
    """Through the whole loop. Told that worse is better, it unlearns: it does not measure luck."""
    setup, ours = learner(epochs=30, noisy_steps=2), clap_ppo.group_advantages
    monkeypatch.setattr(clap_ppo, "group_advantages", lambda *args: sign * ours(*args))
    def plain_reward():
        return clap_ppo.score_held_out(setup, clips=64)[1].mean().item()
    before = plain_reward()
    clap_ppo.train(setup, tmp_path, [])
    assert sign * (plain_reward() - before) > 0.5

def test_every_epoch_has_its_own_noise_and_a_seed_fixes_it(learner, tmp_path):
    """So has what is held out. Epoch 0 of seed 1 is not epoch 1 of seed 0: seeds share nothing."""
    def rewards(epochs, seed):                   # of one policy, since it hardly learns
        setup, metrics = learner(rate=1e-9, epochs=epochs, seed=seed), []
        clap_ppo.train(setup, tmp_path, metrics)
        return [round(row["reward"], 4) for row in metrics]
    found = rewards(6, seed=0)
    assert len(set(found)) == 6 and rewards(1, seed=0) == found[:1]
    assert len({*found, *rewards(3, seed=1)}) == 9
    held_out = [clap_ppo.score_held_out(learner(seed=seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(held_out[0], held_out[1]) and not torch.equal(held_out[1], held_out[2])

def test_every_few_epochs_weights_are_kept_and_clips_scored(learner, tmp_path, monkeypatch):
    monkeypatch.setattr(clap_ppo, "EVAL_EVERY", 2)
    setup, metrics = learner(epochs=4), []
    clap_ppo.train(setup, tmp_path, metrics)
    second, fourth = (metrics[i]["eval_reward"] for i in (1, 3))
    assert fourth == clap_ppo.score_held_out(setup)[1].mean().item() != second
    assert sum("eval_reward" in row for row in metrics) == 2
    assert setup.optimizer.param_groups[0]["lr"] == pytest.approx(0.03 / 8)     # of 8 updates
    files = [(tmp_path / f"adapter/epoch-{n}.safetensors").read_bytes() for n in (2, 4)]
    assert files[1] == safetensors.torch.save(clap_ppo.adapter_state(setup.unet)) != files[0]
    assert metrics[3]["reward_mean"] == (metrics[2]["reward"] + metrics[3]["reward"]) / 2

def test_what_is_logged_are_means_over_rows(learner, tmp_path, monkeypatch):
    """Recomputed where no count divides the next: a mean of means would be another number."""
    setup = learner(epochs=1, prompts_per_epoch=3, clips_per_prompt=5, updates_per_epoch=4,
                    micro_batch=3, clip_range=0.2, seed=1)
    kept, metrics = {"ppo_loss": [], "optimizer_step": [], "score_clips": []}, []
    for name in kept:
        def keep(*args, name=name, real=getattr(clap_ppo, name)):  # noqa: B008
            kept[name].append((args, real(*args)))
            return kept[name][-1][1]
        monkeypatch.setattr(clap_ppo, name, keep)
    clap_ppo.train(setup, tmp_path, metrics)
    columns = zip(*[args[:3] for args, _ in kept["ppo_loss"]], strict=True)
    log_prob, old_log_prob, advantages = [torch.cat(column).detach() for column in columns]
    log_ratio, clip_range = log_prob - old_log_prob, 0.2 / 16
    ratio, rewards = log_ratio.exp(), kept["score_clips"][0][1][1]
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    norms = [norm for _, norm in kept["optimizer_step"]]
    expected = {
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean().item(),
        "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean().item(),
        "loss": -torch.minimum(ratio * advantages, clipped * advantages).mean().item(),
        "grad_norm": max(norms), "reward": rewards.mean().item(),
        "reward_spread": sum(group.std().item() for group in rewards) / 3}     # of a prompt's clips
    assert {name: metrics[0][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert len(ratio) == 30 and max(norms) > norms[-1] and 0 < expected["clip_fraction"] < 1

def test_the_micro_batch_changes_memory_and_speed_but_not_the_result(monkeypatch):
    """Also when the last one is smaller. Plain SGD, because Adam hides a wrong scale."""
    monkeypatch.setattr(clap_ppo, "MAX_GRAD_NORM", math.inf)
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    results = []
    for micro_batch in (64, 3):
        setup = painter_setup(0.2, micro_batch=micro_batch, learning_rate=0.5, kl_weight=0.1,
                              clip_range=8192)
        start, (_, rows) = copy.deepcopy(clap_ppo.adapter_state(setup.unet)), roll(setup)
        info = update_once(setup, rows) | clap_ppo.adapter_state(setup.unet)
        info.pop("log_prob_gap")
        results.append(info)
    assert max((start[name] - results[0][name]).abs().max() for name in start) > 1e-2
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5)

def test_an_update_raises_good_actions_and_its_rate_warms_up_over_the_whole_run():
    """Sixteen rows do not divide evenly: torch.chunk would give six of the seven updates."""
    setup = painter_setup(0.1, updates_per_epoch=7, learning_rate=0.2, epochs=5, clip_range=8.2)
    rates, step, (_, rows) = [], setup.optimizer.step, roll(setup)
    setup.optimizer.step = lambda: (rates.append(setup.optimizer.param_groups[0]["lr"]), step())
    advantages = torch.linspace(-1, 1, 8)[rows["clip_id"]]
    info = update_once(setup, rows, advantages)
    with torch.no_grad():
        gain = replay(setup, rows)[0] - rows["log_prob"]
    assert (gain * advantages).mean() > 1e-4 and info["approx_kl"] > 0
    assert torch.corrcoef(torch.stack([gain, advantages]))[0, 1] > 0.3
    update_once(setup, roll(setup)[1], epoch=1)
    assert rates == pytest.approx([0.2 * min(n / 10, 1 - (n - 1) / 35) for n in range(1, 15)])

@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_kl_term_pulls_the_policy_to_the_base(monkeypatch, weight):
    """Without any advantage only the KL term speaks; without the term nothing moves at all."""
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    setup = painter_setup(0.3, kl_weight=weight, learning_rate=0.5, updates_per_epoch=6)
    _, rows = roll(setup)
    @torch.no_grad()
    def distance():
        _, mean, sigma = replay(setup, rows)
        with setup.unet.disable_adapter():
            _, base, _ = replay(setup, rows)
        return clap_ppo.gaussian_kl(mean, base, sigma).mean().item()
    before, info = distance(), update_once(setup, rows, advantages=torch.zeros(len(rows["step"])))
    if weight == 0:
        assert distance() == before and "kl_base" not in info
    else:
        assert distance() < 0.9 * before and distance() < info["kl_base"] <= before * 1.001
        assert info["loss"] == pytest.approx(0.5 * info["kl_base"], rel=1e-3)

def test_gradients_are_limited_and_one_that_is_not_finite_stops_the_run(monkeypatch):
    """One NaN in Adam's state is for ever. What is logged is the norm before."""
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    setup = painter_setup(learning_rate=1.0, epochs=10**6)
    weights, vector = trainable(setup.unet), nn.utils.parameters_to_vector
    def push(number, slope):                     # gradients that are all `slope`
        (slope * sum(weight.sum() for weight in weights)).backward()
        return clap_ppo.optimizer_step(setup, number)
    for number, slope in ((0, 5.0), (1, 3.0)):
        before = vector(weights).detach().clone()
        assert push(number, slope) == pytest.approx(slope * len(before) ** 0.5)
        assert (vector(weights) - before).norm().item() == pytest.approx(1, rel=1e-3)
    for slope in (math.nan, math.inf):
        with pytest.raises(UserError, match="gradient is not finite"):
            push(2, slope)

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
    """All that a run found out: adapter, metrics without their wall time, sounds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    sounds = {file.name: file.read_bytes() for file in (run / "clips").iterdir()}
    return (run / "adapter/adapter_model.safetensors").read_bytes(), rows, sounds

def refused(folder: Path, capsys, *flags) -> str:
    """The one line that a command line gets. It changes no file below a folder, but for locks."""
    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*")
                if path.is_file() and path.name != "lock"}
    before = contents()
    code, err = run_main(capsys, *flags)
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert code == 2 and len(lines) == 1 and contents() == before, err
    return lines[0]

def copy_run(run: Path, folder: Path, **changes) -> Path:
    """A copy of a run in a folder, with changes of its config."""
    copied = Path(shutil.copytree(run, folder / "run"))
    saved = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(saved | changes))
    return copied

@contextlib.contextmanager
def cut(function: str, call: int, file=None):
    """Ctrl-C at the `call`-th call of a function, if `file` is given, of those that write it."""
    real, calls = getattr(clap_ppo, function), itertools.count(1)
    def interrupted(*args):
        if getattr(args[0], "name", None) == file and next(calls) == call:
            raise KeyboardInterrupt
        return real(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clap_ppo, function, interrupted)
        yield

def test_a_run_cut_anywhere_resumes_to_the_same_bytes(run_flags, finished_run, tmp_path, capsys):
    """Before there is a checkpoint, between metrics.jsonl and it, when only clips are missing."""
    run, log = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    flags = [*run_flags, "--out", run]
    for place, epochs in ((["update", 1], 0), (["update", 2], 1),
                          (["write_file", 1, "checkpoint.pt"], 2), (["finish", 1], 3)):
        with cut(*place):
            code, err = run_main(capsys, *flags)
        assert code == 130 and "--resume" in err and not (run / "clips").exists()
        assert epochs == 0 or len(log.read_text().splitlines()) == epochs
        flags = ["--resume", run]
    assert run_main(capsys, *flags)[0] == 0
    assert results(run) == results(finished_run.folder)

@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bytes(run_flags, finished_run, tmp_path):
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
    assert results(tmp_path / "run") == results(finished_run.folder)

def test_a_finished_run_goes_on_elsewhere_or_is_finished_again(finished_run, tmp_path, capsys):
    """Model and CLAP may be given anew. A caller's grad mode and random numbers are kept."""
    run = copy_run(finished_run.folder, tmp_path, prompts="gone", model="/gone", clap="/gone/clap")
    saved, state = json.loads((run / "config.json").read_text()), torch.get_rng_state()
    flags = ["--resume", run, "--epochs", 4]
    assert "--model /gone: no usable folder" in refused(run, capsys, *flags)
    given = {"model": f"{TOY}/pipeline", "clap": f"{TOY}/clap.pt"}
    with torch.no_grad():
        flags += ["--model", given["model"], "--clap", given["clap"]]
        assert run_main(capsys, *flags)[0] == 0 and not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads((run / "config.json").read_text()) == saved | given | {"epochs": 4}
    before, longer = results(finished_run.folder), results(run)
    assert longer[1][:3] == before[1] and len(longer[1]) == 4 and longer[0] != before[0]
    assert run_main(capsys, "--resume", run)[0] == 0 and results(run) == longer
    assert "of more epochs than --epochs 3" in refused(run, capsys, "--resume", run, "--epochs", 3)

@pytest.mark.parametrize("number", [1, 2])
def test_a_file_is_the_old_or_the_new_one_whichever_write_fills_the_disk(
        tmp_path, monkeypatch, number):
    clap_ppo.write_file(tmp_path / "file", b"old")
    write, calls = Path.write_bytes, itertools.count(1)
    def half(path, content):
        if next(calls) != number:
            return write(path, content)
        write(path, content[:2])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", half)
    with contextlib.suppress(OSError):
        clap_ppo.write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() in ("old", "new") and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize("change, complaint", [
    (b"", "cannot go on"), (b"half a checkp", "cannot go on"), ({"a": 1}, "cannot go on"),
    ({"gift": Malice("pwned")}, "cannot go on"), ("rank", "another base model"),
    ("layers", "another base model"), ("byte", "damaged")], ids=str)
def test_a_run_that_does_not_fit_is_left_alone(
        finished_run, tmp_path, capsys, monkeypatch, change, complaint):
    monkeypatch.chdir(tmp_path)
    run = copy_run(finished_run.folder, tmp_path, lora_rank=3 if change == "rank" else 8)
    file, state = run / "checkpoint.pt", torch.load(run / "checkpoint.pt")
    if isinstance(change, bytes):
        file.write_bytes(change)
    elif change == "byte":                       # of a tensor, as on a bad disk
        content, tensor = bytearray(file.read_bytes()), next(iter(state["adapter"].values()))
        content[content.index(tensor.numpy().tobytes()) + 2] ^= 0x40
        file.write_bytes(content)
    elif change == "layers":                     # peft itself would leave one of them random
        state["adapter"].pop(min(state["adapter"]))
        torch.save(state, file)
    elif change != "rank":
        torch.save(change, file)
    said = refused(tmp_path, capsys, "--resume", run, "--epochs", 4)
    assert re.search(f"checkpoint.pt: .*{complaint}", said) and not Path("pwned").exists()

def quiet(waveforms, sample_rate, prompts):
    return -waveforms.square().mean(dim=1)

@pytest.mark.parametrize("loader, weight", [
    ("load_clap", "audio_projection.2.bias"), ("load_pipeline", "conv_out.bias")])
def test_a_run_goes_on_with_its_own_clap_and_base_model_alone(
        finished_run, tmp_path, capsys, monkeypatch, loader, weight):
    """A name does not tell: here one weight of what it stands for is another one."""
    run, real = copy_run(finished_run.folder, tmp_path), getattr(clap_ppo, loader)
    def other(*args):
        model = real(*args)
        getattr(model, "unet", model).get_parameter(weight).data[0] += 1
        return model
    monkeypatch.setattr(clap_ppo, loader, other)
    assert "another base model or reward" in refused(run, capsys, "--resume", run, "--epochs", 4)

def test_a_run_remembers_its_reward(run_flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert clap_ppo.main([*run_flags, "--epochs", "1", "--out", str(run)], reward=quiet) == 0
    assert "another base model or reward" in refused(run, capsys, "--resume", run, "--epochs", 2)
    assert evaluate.main([str(run)]) == 2 and "reward" in capsys.readouterr().err
    assert clap_ppo.main(["--resume", str(run), "--epochs", "2"], reward=quiet) == 0
    assert evaluate.main([str(run), "--noises", "1"], reward=quiet) == 0

@pytest.mark.slow
def test_an_epoch_is_saved_before_it_is_shown(run_flags, tmp_path):
    """`| head -1` closes the pipe: one line on stderr, and the epoch that it hid is kept."""
    command = shlex.join([sys.executable, str(HERE / "clap_ppo.py"), *run_flags])
    done = run_process(f"{command} | head -1", shell=True, cwd=tmp_path)
    assert "4 training" in done.stdout and len(done.stderr.splitlines()) <= 1, done.stderr
    assert torch.load(tmp_path / "runs/seed-0/checkpoint.pt")["metrics"][0]["epoch"] == 1

def test_one_process_works_in_a_folder_at_a_time(run_flags, finished_run, tmp_path, capsys):
    """The lock file stays; what counts is who holds it, and a killed process holds nothing."""
    run, new = copy_run(finished_run.folder, tmp_path), tmp_path / "new"
    new.mkdir()
    with FileLock(run / "lock"), FileLock(new / "lock"):
        for flags in (["--resume", run], [*run_flags, "--out", run], [*run_flags, "--out", new]):
            assert "another process is at work" in refused(tmp_path, capsys, *flags)
    assert run_main(capsys, "--resume", run)[0] == 0

# ==== 8. Settings, prompts and bad input =========================================================
@pytest.mark.parametrize("model, real", [
    ("samples/toy/pipeline", False), ("./samples/toy/pipeline/", False), (f"{TOY}/pipeline", False),
    (f"{TOY}/judge/../pipeline", False), ("samples/toy", True), ("cvssp/audioldm2", True)])
def test_a_real_model_begins_with_other_settings(monkeypatch, model, real):
    """The bundled one is known by its place, however that is written. A flag wins over either."""
    monkeypatch.chdir(HERE)
    begins = vars(clap_ppo.Config(model=model)) | (clap_ppo.REAL_MODEL if real else {})
    assert vars(clap_ppo.parse_args(["--model", model])[0]) == begins
    cfg, _ = clap_ppo.parse_args(["--model", model, "--num-steps", "7", "--clap", "mine.pt"])
    assert vars(cfg) == begins | {"num_steps": 7, "clap": "mine.pt"}

@pytest.fixture(scope="module")
def bad(tmp_path_factory, finished_run):
    """A folder full of things that are not what they should be; commands are given in it."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "latin.txt").write_bytes("snoring\nV\u00f6gel\n".encode("latin-1"))
    saved = (finished_run.folder / "config.json").read_text()
    for name, text in {
            "empty.txt": "# only\n\n   \n# comments\n", "good.txt": "snoring\nbirds chirp\n",
            "same.txt": "wind blowing\nSnoring.\n", "header.txt": "id,caption\n1,a dog barks\n",
            "words.txt": "snoring\na helicopter\n", "nothing/config.json": saved,
            "broken/config.json": "{}]", "odd/config.json": '{"epochs": "ten"}',
            "old/config.json": saved.replace("noisy_steps", "noise_window")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("clap.pt", "clap.json"):
        shutil.copy(TOY / name, folder)
    for name in ("music", "clipping", "velocity", "pickled"):
        shutil.copytree(TOY / "pipeline", folder / name)
    index = (folder / "music/model_index.json").read_text()
    (folder / "music/model_index.json").write_text(index.replace("AudioLDM", "MusicLDM"))
    make_scheduler(clip_sample=True).save_pretrained(folder / "clipping/scheduler")
    make_scheduler(prediction_type="v_prediction").save_pretrained(folder / "velocity/scheduler")
    next((folder / "pickled/unet").glob("*.safetensors")).unlink()
    torch.save({"weight": Malice("pwned")}, folder / "pickled/unet/diffusion_pytorch_model.bin")
    return folder

CLAP = ["--clap", str(TOY / "judge/../clap.pt")]
@pytest.mark.parametrize("flags, complaint", [
    ("", "prompts prompts.txt: .*No such file.*samples/prompts.txt"),
    ("--prompts empty.txt", "empty.txt: no prompt"), ("--prompts words.txt", " of helicopter: "),
    ("--prompts latin.txt", "latin.txt: 'utf-8' codec.*samples/prompts.txt"),
    ("--prompts header.txt", "header.txt: 'id,caption' is a line of.*one prompt a"),
    ("--eval-prompts same.txt", "'snoring' is trained on and held out: remove"),
    ("--clips-per-prompt 1", "--clips-per-prompt 1: use 2 to"), ("--micro-batch 0", " 0: use"),
    ("--seconds 12", "--seconds 12.0: use 0.1 to 10"), ("--learning-rate nan", "nan: use 1e-09 to"),
    ("--dtype float16", "--dtype: invalid choice: 'float16'"), ("--no-such-flag", "unrecognized"),
    ("--noisy-steps two", "--noisy-steps: invalid int value: 'two'"), ("--noisy-steps 0", "0: use"),
    ("--noisy-steps 5", "--noisy-steps 5: use .* to 4"), ("--num-steps 1001", "1001: .*1000"),
    ("--updates-per-epoch 9", "--updates-per-epoch 9: use .* to 8"),
    ("--model music", "--model music: .*a MusicLDMPipeline is not supported"),
    ("--clap clap.pt --model nobody/has-this", "--model nobody/has-this: no usable folder"),
    ("--clap clap.pt --model clipping", "clip_sample=T"), ("--clap good.txt", "good.txt: no us"),
    ("--clap clap.pt --model velocity", "prediction_type=v_prediction"),
    ("--clap clap.pt --model pickled", "--model pickled: no usable folder"),
    # told before the model is loaded, which could not be, either
    ("--clap clap.pt --model music --out good.txt/run", "Not a directory: 'good.txt/run'"),
    ("--clap nobody/repo/x.pt", "--clap nobody/repo/x.pt: no usable file"),
    ("--out nothing", "--out nothing: not empty; .*--resume nothing"),
    ("--resume nowhere", "nowhere: not a run.*No such file"), ("--resume odd", "odd: not a run"),
    ("--resume nothing --seed 5 --lora-rank 1", "lora_rank and seed cannot change"),
    ("--resume broken", "broken: not a run"), ("--resume old", "old: not a run.*noise_window")])
def test_a_mistake_gets_one_line_and_exit_code_2(bad, monkeypatch, capsys, flags, complaint):
    monkeypatch.chdir(bad)
    monkeypatch.setattr("logging.raiseExceptions", False)        # of pytest's closed streams
    if flags and not flags.startswith("--resume"):
        flags = " ".join(["--prompts good.txt", *TINY, flags])
    assert re.search(complaint, refused(bad, capsys, *flags.split()))

def test_a_prompt_may_have_marks_and_what_sounds_alike_is_one(tmp_path, capsys):
    accepted = ["[SFX] a dog barks", "wind,rain", 'a man says,"hello"', "{adjective} dog",
                "#1 hit song", "2,000 birds", "a piano in C", "a piano in C#", "a kid", '"a" b']
    lines = ["\ufeffsnoring", "# a note", "#", "## more", *accepted, "Snoring!", "  SNORING. ",
             "water\u2028flows", "rain\0  falls", ""]
    (tmp_path / "mine.txt").write_text("\r\n".join(lines), encoding="utf-8")
    prompts = clap_ppo.read_prompts(tmp_path / "mine.txt")
    assert list(prompts.values()) == ["SNORING.", *accepted, "water flows", "rain falls"]
    assert "2 lines repeat" in capsys.readouterr().out

def test_a_line_of_a_table_or_list_is_no_prompt(tmp_path):
    for line in ("/data/a/001.wav", "001.wav|a dog barks", "1. a dog barks", "2) a dog barks",
                 "- a dog barks", "* a dog barks", '"a dog barks",', '"a dog barks"', "[", "{",
                 '7,"a dog, a man"', "7;a dog barks", "id,caption", "caption", "file_name,caption",
                 "1\ta dog barks", '{"caption": "a dog barks"}', '["a dog barks"]'):
        (tmp_path / "mine.txt").write_text(f"wind blowing\n{line}\n")
        with pytest.raises(UserError, match="is a line of a list or table"):
            clap_ppo.read_prompts(tmp_path / "mine.txt")

def test_prompt_files_of_any_length_work(tmp_path):
    def split(lines, **more):
        (tmp_path / "mine.txt").write_text("\n".join(lines), encoding="utf-8")
        cfg = config(prompts=str(tmp_path / "mine.txt"), **more)
        prompts, num_train = clap_ppo.split_prompts(cfg)
        return prompts[:num_train], prompts[num_train:]
    assert split(["snoring", "wind blowing"]) == (["snoring", "wind blowing"], [])
    assert split("abcdefgh") == (list("abcefg"), ["d", "h"])
    _, held_out = split(f"wind {i}" for i in range(1000))
    assert held_out == [f"wind {i}" for i in range(19, 1000, 20)]      # from all over the file
    assert sum(split(["a dog barks", *"abc", "A dog barks.", *"defg"]), []) == [
        "A dog barks.", *"abdef", "c", "g"]      # what sounds alike is one prompt, on one side
    (tmp_path / "eval_mine.txt").write_text("rain\n")
    (tmp_path / "other.txt").write_text("hail\n")
    assert split("abcdefgh")[1] == ["rain"]
    assert split("abcdefgh", eval_prompts=str(tmp_path / "other.txt"))[1] == ["hail"]

def test_a_single_prompt_trains_in_an_empty_folder_and_is_played_itself(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("snoring\n")
    (tmp_path / "run").mkdir()
    flags = ["--prompts", tmp_path / "one.txt", *TINY, "--epochs", 1, "--out", tmp_path / "run"]
    assert clap_ppo.main([str(flag) for flag in flags]) == 0
    assert evaluate.main([str(tmp_path / "run"), "--noises", "2"]) == 0
    out = capsys.readouterr().out
    assert '"prompts": ["snoring"]' in (tmp_path / "run/index.html").read_text()
    assert "1 training, 0 held-out prompts" in out and "\ntraining prompts, original" in out
    assert re.search(r"training prompts \(n = 2\); recognition by chance: 1.000\n.*\n"
                     r"reward( +-?\d\.\d{3}){4}\n(.*\n)*recognition( +-){4}\n", out)
    assert "Training prompts, by " in (tmp_path / "run/data.js").read_text()

def test_what_clap_does_not_read_of_a_prompt_is_said_before_the_run(monkeypatch, capsys):
    """CLAP reads 77 tokens, 75 of them words. A tokenizer without vocabulary is refused."""
    from transformers import RobertaTokenizer
    words = ("water flows then wind blowing then snoring then birds chirp then " * 8).split()
    fits, too_long = " ".join(words[:75]), " ".join(words[:75] + ["whistling"])
    pipeline = clap_ppo.load_pipeline(str(TOY / "pipeline"))
    pipeline.tokenizer.model_max_length = 512
    monkeypatch.setattr(clap_ppo, "load_pipeline", lambda *args: pipeline)
    monkeypatch.setattr(clap_ppo, "load_clap", lambda *args: 1 / 0)
    for prompts, lost in ((["snoring", too_long], "whistling"), (["snoring", fits], "")):
        with pytest.raises(ZeroDivisionError):
            clap_ppo.load_setup(config(), prompts, len(prompts))
        said = capsys.readouterr().err
        assert len(said.splitlines()) == bool(lost) and lost in said
    pipeline.tokenizer = RobertaTokenizer(vocab={"<s>": 0, "</s>": 2, "<unk>": 3}, merges=[])
    with pytest.raises(UserError, match="its tokenizer reads 'birds chirp' as nothing"):
        clap_ppo.load_setup(config(), TRAIN_PROMPTS, 4)

# ==== 9. Files that others load ==================================================================
def test_a_run_leaves_what_was_promised_and_asks_nothing_of_the_network(finished_run):
    """Every epoch began with ratio 1, to 1e-6 in float32."""
    run, (_, metrics, _) = finished_run.folder, results(finished_run.folder)
    assert not finished_run.network.exists(), finished_run.network.read_text()
    assert all(0 <= row["log_prob_gap"] <= 1e-6 and row["approx_kl"] > 0 for row in metrics)
    assert {path.name for path in run.iterdir()} == {
        "lock", "config.json", "metrics.jsonl", "checkpoint.pt", "adapter", "clips"}
    assert clap_ppo.Config(**json.loads((run / "config.json").read_text())).eval_guidance == 2.5
    assert len(list((run / "clips").iterdir())) == 2 * len(HELD_OUT)
    assert b".default." not in (run / "adapter/adapter_model.safetensors").read_bytes()  # peft's
    assert (run / "adapter/adapter_config.json").exists() and not list(run.rglob("tmp-*"))
    assert len(re.findall(r"^epoch \d/3  reward_mean ", finished_run.out, flags=re.M)) == 3
    assert re.search(r"guidance 2.5: reward \S+ -> \S+\nof 3 prompts \d clearly better, \d clearly "
                     r"worse, others within 0.1\nlisten: runs/seed-0/clips$", finished_run.out)

def stock_pipeline(model: Path, adapter: Path | None = None):
    """A pipeline that knows nothing of this script, with an adapter as the README loads it."""
    import diffusers
    import peft
    from transformers import GPT2LMHeadModel
    kind, parts = json.loads((model / "model_index.json").read_text())["_class_name"], {}
    if kind == "AudioLDM2Pipeline":
        parts["language_model"] = GPT2LMHeadModel.from_pretrained(model / "language_model")
    pipe = getattr(diffusers, kind).from_pretrained(model, dtype=torch.float32, **parts)
    if adapter:
        peft.PeftModel.from_pretrained(pipe.unet, adapter)       # changes pipe.unet
    pipe.set_progress_bar_config(disable=True)
    return pipe

def test_the_adapter_gives_the_tuned_clips_in_a_plain_pipeline(finished_run):
    """From the same noise it sings what the run's clips sing. (PCM has steps of 3e-5.)"""
    import soundfile
    heard, noise = [], torch.randn(clap_ppo.EVAL_CLIPS * 3, 8, 16, 8, generator=seeded(999))
    for side, adapter in (("original", None), ("fine-tuned", finished_run.folder / "adapter")):
        pipe = stock_pipeline(TOY / "pipeline", adapter)
        heard.append(pipe(HELD_OUT[2], latents=noise[clap_ppo.EVAL_CLIPS * 2][None],
                          num_inference_steps=5, guidance_scale=2.5,
                          audio_length_in_s=2.56).audios[0].clip(-1, 1))
        saved, rate = soundfile.read(finished_run.folder / f"clips/002-{side}.wav")
        np.testing.assert_allclose(heard[-1], saved, rtol=0, atol=2e-4)
        assert rate == 16000 and len(saved) == 40960
    assert np.abs(heard[0] - heard[1]).max() > 5e-4
    weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 96       # A and B of each layer that LORA_LAYERS names

@pytest.mark.parametrize("family, seconds", [
    ("toy", 0.29), ("toy", 0.335), ("toy", 2.56), ("audioldm2", 0.335), slow("audioldm2", 2.57),
    slow("audioldm", 0.335)])
def test_clips_are_those_of_the_stock_pipeline(narrow, prompt_file, tmp_path, family, seconds):
    """With an adapter that is not zero. Always rounding up fails at 0.335 s, never at 0.29 s."""
    model = narrow(family)
    setup = load("--prompts", prompt_file, "--model", model, *CLAP, "--seconds", seconds,
                 "--num-steps", 4, "--noisy-steps", 1)
    for weight in trainable(setup.unet):
        weight.data += 0.05 * torch.randn(weight.shape, generator=seeded(0))
    setup.unet.peft_config["default"].save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(
        safetensors.torch.save(clap_ppo.adapter_state(setup.unet)))
    pipe = stock_pipeline(model, tmp_path)
    noise = torch.randn(3, *setup.latent_shape, generator=seeded(1))
    for scale in (1.0, 2.5):
        setup.cfg = dataclasses.replace(setup.cfg, eval_guidance=scale)
        ours, _ = clap_ppo.score_held_out(setup, clips=1, seed=1)
        for i, prompt in enumerate(HELD_OUT):
            start = {"latents": noise[i:i + 1]} if i else {"generator": seeded(1)}   # its own shape
            theirs = pipe(prompt, **start, num_inference_steps=4, guidance_scale=scale,
                          audio_length_in_s=seconds).audios[0]
            np.testing.assert_allclose(ours[i], np.clip(theirs, -1, 1), rtol=0, atol=3e-4)

def test_prompts_are_encoded_in_chunks_as_the_pipeline_does_in_one():
    pipe = clap_ppo.load_pipeline(str(TOY / "pipeline"))
    prompts = [f"{a} then {b}" for a in TRAIN_PROMPTS for b in TRAIN_PROMPTS] * 9        # 144
    with torch.no_grad():
        empty, full = pipe._encode_prompt(prompts, torch.device("cpu"), 1, True).chunk(2)
    for found, expected in zip(clap_ppo.encode_prompts(pipe, prompts), (full, empty), strict=True):
        torch.testing.assert_close(found["class_labels"], expected, rtol=1e-5, atol=1e-6)

@pytest.mark.slow
def test_twenty_thousand_prompts_load_in_two_minutes_and_nine_gigabytes(tmp_path):
    words = itertools.permutations((TOY / "pipeline/vocabulary.txt").read_text().split(), 3)
    prompts = [" ".join(three) for three in itertools.islice(words, 20_000)]
    (tmp_path / "many.txt").write_text("\n".join(prompts))
    code = ("import test_clap_ppo; setup = test_clap_ppo.load('--prompts', 'many.txt'); "
            "assert setup.condition['class_labels'].shape == (20_000, 64)")
    done = run_process(f'ulimit -v 9000000; {sys.executable} -c "{code}"', shell=True, timeout=120,
                       cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE})
    assert done.returncode == 0, done.stderr[-2000:]

def test_importing_the_script_does_nothing_and_sections_one_to_three_need_torch_alone(tmp_path):
    """Nor do its guards vanish under `python -O`, as assertions do."""
    heavy = ["diffusers", "transformers", "peft", "laion_clap", "torchaudio", "matplotlib"]
    source = (HERE / "clap_ppo.py").read_text()
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))
    begin, end = (source.index(f"# ==== {n}. ") for n in (1, 4))
    imports = "import math, torch\nimport torch.nn.functional as F\nfrom torch import Tensor\n"
    (tmp_path / "core.py").write_text(imports + source[begin:end])
    code = (f"import sys, doctest; sys.path.append({str(HERE)!r}); import clap_ppo, core; "
            f"print([m for m in {heavy} if m in sys.modules], doctest.testmod(core)); "
            f"clap_ppo.main(['--help'])")
    done = run_process([sys.executable, "-c", code], cwd=tmp_path)
    assert done.stdout.startswith("[] TestResults(failed=0, attempted=2)") and done.stderr == ""
    for field in dataclasses.fields(clap_ppo.Config):
        assert f"    {field.name}: {field.type.__name__} = " in done.stdout
    assert done.returncode == 0 and doctest.testmod(clap_ppo).failed == 0

def test_the_script_and_requirements_name_the_same_packages():
    block = re.search(r"# /// script\n(.*?)# ///\n", (HERE / "clap_ppo.py").read_text(), re.S)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    lines = {line.split("#")[0].strip() for line in open(HERE / "requirements.txt")} - {""}
    others = lines.symmetric_difference(metadata["dependencies"])       # of tests and samples
    assert {re.match(r"\w+", line)[0] for line in others} <= {"pytest", "scipy"}

FEW = [*TINY, "--epochs", "1", "--eval-prompts", "few.txt"]
MADE_SMALL = {                  # a documented command: what makes it small
    "clap_ppo.py --prompts": [*FEW, "--clap", "samples/toy/clap.pt"], "clap_ppo.py --resume": [],
    "samples/evaluate.py runs": ["--noises", "1"], "samples/evaluate.py --pool": [],
    "samples/bench.py": ["--", *TINY], "samples/experiments.py": [], "samples/pictures.py": [],
    "samples/toy/toy_sounds.py": []}
ELSEWHERE = (                   # or who runs it
    "git clone", "pip install", "pytest",               # .ci/run
    "PYTHONPATH=",                                      # test_documented_code_works
    "python samples/bench.py --preset",                 # test_the_benchmark_times_...
    "python samples/toy/make_toy.py")                   # test_all_stages_of_the_toy_run_...

def documented_calls() -> list:
    """What README, docstrings and demo tell to run with Python, from the script's name on."""
    texts = [README]
    for script in sorted([*HERE.glob("*.py"), *HERE.glob("samples/**/*.py")]):
        texts.append(ast.get_docstring(ast.parse(script.read_text())))
    texts.append((HERE / "samples/demo/README.md").read_text())
    start, commands = r"(?:PYTHONPATH=\S+ )?(?:python|uv run|pytest|pip|git)\s", []
    for text in texts:
        commands += re.findall(rf"^ *({start}[^`#\n]*)", text.replace("\\\n", " "), flags=re.M)
        spans = re.sub("```.*?```", "", text, flags=re.S)
        commands += re.findall(rf"`({start}[^`]*)`", spans)
    calls = [re.search(r"\S+\.py\b.*", " ".join(command.split()))[0] for command in commands
             if not command.startswith(ELSEWHERE)]
    return list(dict.fromkeys(calls))                   # `uv run` and `python` alike

def test_documented_commands_work_where_a_clone_has_them(narrow, tmp_path, monkeypatch, capsys):
    """In the order of the documents. A narrow model and few prompts stand for real ones."""
    for name in ("clap_ppo.py", "README.md"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "samples", tmp_path / "samples")
    shutil.copytree(narrow("audioldm2"), tmp_path / "narrow")
    shutil.copy(tmp_path / "samples/demo/log.txt", tmp_path)
    for name in ("samples/audiocaps_style_prompts.txt", "prompts.txt"):
        shutil.copy(HERE / "samples/published_prompts.txt", tmp_path / name)
    (tmp_path / "few.txt").write_text("\n".join([*HELD_OUT, "a whoosh then whistling"]))
    heard = {"task": "preference", "prompt": "wind", "score": 1}
    answers = {"listener": "a", "run": "seed-0", "answers": [heard]}
    (tmp_path / "listener-a.json").write_text(json.dumps(answers))
    real_main, real_evaluate = clap_ppo.main, evaluate.evaluate
    monkeypatch.setattr(clap_ppo, "main", lambda argv: real_main([*argv, *FEW]))
    monkeypatch.setattr(evaluate, "evaluate", lambda run, judge, noises, guidance, best, snapshots:
                        real_evaluate(run, judge, 1, guidance[:2], best[:1], snapshots))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])       # to which the scripts add their folders
    kept = [path.read_bytes() for path in (Path("README.md"), *Path("samples").glob("*.txt"))]
    results, runs = Path("samples/results.jsonl"), itertools.count()
    for call in documented_calls():
        more = [more for start, more in MADE_SMALL.items() if call.startswith(start)][0]
        if call.startswith("clap_ppo.py --prompts"):
            more = [*more, "--out", f"runs/seed-{next(runs)}"]
        script, *flags = shlex.split(call.replace("cvssp/audioldm2", "narrow"))
        monkeypatch.setattr(sys, "argv", [script, *flags, *more])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stopped:
            assert not stopped.code, (call, capsys.readouterr().err)
        if call.endswith("report"):                 # the tables of README are current
            assert Path("README.md").read_bytes() == kept[0]
            lines = [line for line in results.read_text().splitlines() if '"seed": 4' not in line]
            results.write_text("\n".join(lines) + "\n")       # so that seed 4 is to run
    assert kept[1:] == [path.read_bytes() for path in Path("samples").glob("*.txt")]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    new = {(row["name"], row.get("label")): row for row in rows if row["seed"] == 4}
    base, tuned = new["ppo", "0"], new["ppo", None]["tuned"]
    assert new["free", "base, guidance 1"]["reward"] == base["reward"] != tuned["reward"]
    assert new["free", "tuned, guidance 1"]["reward"] == tuned["reward"]
    assert new["pull", "0"]["reward"] == base["reward"] and base["minutes"] == 0
    metrics = json.loads(Path("runs/experiments/ppo-4/metrics.jsonl").read_text())
    assert new["ppo", None]["minutes"] == pytest.approx(metrics["seconds"] / 60, abs=1e-5)
    links = re.findall(r"\]\((.*?)\)", Path("samples/demo/README.md").read_text())
    assert len(links) == 2 + 2 * 5 and all(Path("samples/demo", link).exists() for link in links)

def test_documented_code_works(prompt_file, finished_run, tmp_path, monkeypatch, capsys):
    stock, step, loud = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    stock = stock.replace("samples/toy", str(TOY)).replace("runs/seed-0", str(finished_run.folder))
    held_out = str(prompt_file.with_name("eval_prompts.txt"))
    budget = str([*TINY, "--epochs", "1", "--eval-prompts", held_out])[1:-1]
    loud = loud.replace('"--epochs", "5"', budget).replace("sqrt()", "sqrt() + 100")
    monkeypatch.chdir(tmp_path)
    for code, shown in ((step, r"tensor\(\[-?\d.*\]\)"), (loud, "reward 100"), (stock, "40960")):
        with contextlib.suppress(SystemExit):
            exec(code, {})
        assert re.search(shown, capsys.readouterr().out)

# ==== 10. The judge, its page, the samples scripts ===============================================
def test_captions_name_the_related_sound_and_turn_the_order():
    scene, rng = ("then", ("dog_bark", "wind")), np.random.default_rng(0)
    for shares, told in ((1, 0), ("dog_whimper", "water")), ((0, 1), ("wind", "dog_bark")):
        assert toy_sounds.mishear(scene, rng, *shares) == ("then", told)

def test_the_judge_recognises_what_the_toy_world_plays():
    """Each sound alone, and pairs in this order and not in the other; at another sample rate."""
    import torchaudio
    judge, rng = evaluate.load_judge(str(TOY / "judge")), np.random.default_rng(0)
    events = list(toy_sounds.EVENTS)
    pairs = list(zip(events, events[5:] + events[:5], strict=True))
    scenes = [("single", (event,)) for event in events] + [("then", pair) for pair in pairs]
    others = [("then", pair[::-1]) for pair in pairs]
    captions = [toy_sounds.caption(scene, rng) for scene in scenes + others]
    tokens = judge.processor.tokenizer(captions, padding=True, return_tensors="pt")
    waves = torch.stack([torch.from_numpy(toy_sounds.render(scene, rng)) for scene in scenes])
    assert waves.shape == (24, 40960) and 0.3 < waves.abs().max() < 0.95
    waves = torchaudio.functional.resample(waves, 16000, 32000)
    with torch.no_grad():
        texts = judge.get_text_features(**tokens).pooler_output
        heard = evaluate.judge_audio_embeds(judge, waves, 32000) @ texts.T
    assert (heard.argmax(dim=1) == torch.arange(24)).sum() >= 22

@pytest.mark.slow
def test_all_stages_of_the_toy_run_and_its_unet_alone_is_made_anew(prompt_file, tmp_path):
    out = tmp_path / "toy"
    command = [sys.executable, TOY / "make_toy.py", "--fast", "--threads", "1", "--out", out]
    for more in ([], ["--stage", "unet"], ["--stage", "export"]):
        done = run_process([*command, *more])
        assert done.returncode == 0, done.stderr[-2000:]
    setup = load("--prompts", prompt_file, "--model", out / "pipeline", "--clap", out / "clap.pt",
                 *TINY)
    assert update_once(setup, roll(setup)[1])["log_prob_gap"] < 1e-5
    assert evaluate.load_judge(str(out / "judge"))

@pytest.mark.parametrize("adapter, eta, guidance", [
    (False, 1, 5), (False, 1, 1), (True, 1, None), (False, 0, None)])
def test_the_pull_is_to_the_guided_base_where_there_is_noise(monkeypatch, adapter, eta, guidance):
    monkeypatch.setattr(experiments, "PULL_GUIDANCE", guidance)
    setup = painter_setup(0.3)
    _, rows = roll(setup)
    with contextlib.nullcontext() if adapter else setup.unet.disable_adapter():
        mean, sigma = experiments.policy_with_pull(setup, rows, eta, setup.condition)
        if guidance:
            conditions = setup.empty_condition["class_labels"], setup.condition["class_labels"]
            outputs = [setup.unet(rows["latents"], setup.timesteps[rows["step"]],
                                  labels[rows["prompt_id"]]).sample for labels in conditions]
            bars = setup.alpha_bar_t[rows["step"]], setup.alpha_bar_prev[rows["step"]]
            guided = torch.lerp(*outputs, guidance)
            expected = clap_ppo.ddim_mean(guided, rows["latents"], *bars, sigma)
        else:
            expected, _ = clap_ppo.policy(setup, rows, eta, setup.condition)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)

def test_the_demo_shows_what_rose_most_of_each_kind(tmp_path):
    gains = {"a then b": 0.1, "c then d": 0.5, "a and b": 0.2, "wind": 0.3, "rain": -0.1}
    rows = [{"prompt": prompt, "base": {"judge": 1}, "tuned": {"judge": 1 + gain}}
            for prompt, gain in gains.items()]
    (tmp_path / "data.js").write_text(f"window.CLAP_PPO_RUN = {json.dumps({'rows': rows})};\n")
    found = [row["prompt"] for row in pictures.changed_most(tmp_path)]
    assert found == ["c then d", "wind", "a and b", "a then b", "rain"]

def make_clips(judge, **more) -> evaluate.Clips:
    """Clips of M prompts from judge scores (M, n, M), the rest filled in."""
    count, n, _ = judge.shape
    return evaluate.Clips(**dict(
        waveforms=torch.full((count, n, 100), 0.1), reward=torch.zeros(count, n), judge=judge,
        embeds=torch.ones(count, n, 1)) | more)

def test_diversity_loudness_and_broken_clips_mean_what_they_say():
    """The judge hears prompt 0, but for one clip: prompts 1 and 2 have no two recognised ones."""
    judge = torch.eye(3)[:1].repeat(3, 2, 1)
    judge[2, 0] = torch.tensor([0, 0, 1])
    waveforms = torch.full((3, 2, 100), 0.1)
    waveforms[1] = torch.tensor([[0.0], [1.0]])                      # silence, and clipping
    embeds = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]] + 2 * [[[1.0, 0.0], [0.0, 1.0]]])
    found = evaluate.per_prompt_metrics(make_clips(judge, embeds=embeds, waveforms=waveforms))
    assert found["diversity"].tolist() == [0, 1, 1]
    assert found["diversity_right"].isnan().tolist() == [False, True, True]
    assert found["broken"].tolist() == [0, 1, 0]
    assert found["loudness"][0].item() == pytest.approx(-20, abs=1e-3)

def test_a_judge_that_always_hears_the_prompt_has_a_recognition_of_one():
    """One that always hears the next prompt has 0. Where two of four prompts are mended and two
    broken, nothing is known, however many clips there are: those of a prompt are alike."""
    ear = torch.eye(4)[:, None].repeat(1, 2, 1)
    deaf = ear.roll(1, dims=2)
    half = torch.cat([ear[:, :1], deaf[:, :1]], dim=1)
    for judge, share in ((ear, 1), (deaf, 0), (half, 0.5)):
        metrics = evaluate.per_prompt_metrics(make_clips(judge))
        assert metrics["recognition"].tolist() == metrics["judge_score"].tolist() == [share] * 4
    first_two, last_two = torch.cat([ear[:2], deaf[2:]]), torch.cat([deaf[:2], ear[2:]])
    for base, tuned, mended, broke, wins in (
            (half, ear, 4, 0, 1), (ear, half, 0, 4, 0), (first_two, last_two, 4, 4, 0.5)):
        found = evaluate.compare(make_clips(base), make_clips(tuned))
        assert (found["mended"], found["broke"], found["clips"]) == (mended, broke, 8)
        assert found["wins"]["value"] == wins
    assert found["wins"] == {"value": 0.5, "low": 0, "high": 1}
    found = evaluate.compare(make_clips(deaf), make_clips(ear))
    assert found["best_of_n"]["recognition"]["value"] == 0      # of the base model

def test_best_of_n_takes_the_clip_that_the_reward_likes_best():
    reward = torch.tensor([[0.1, 0.9, 0.5, 0.6], [0.8, 0.2, 0.3, 0.4]])
    judge = torch.arange(16.0).reshape(2, 4, 2)
    best = evaluate.best_of(make_clips(judge, reward=reward), 2)
    torch.testing.assert_close(best.reward, torch.tensor([[0.9, 0.6], [0.8, 0.4]]))
    assert torch.equal(best.judge, torch.stack([judge[0, [1, 3]], judge[1, [0, 3]]]))

def test_an_interval_is_the_published_one_and_one_prompt_has_none():
    interval = evaluate.bootstrap(torch.randn(400, generator=seeded(0)))
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 / 20, rel=0.15)
    for alike in (torch.ones(1), torch.ones(9)):
        assert evaluate.bootstrap(alike) == {"value": 1, "low": None, "high": None}
    sums, counts = torch.tensor([[9.0, 0.0], [9.0, 1.0]]).repeat(1, 50)     # all of 9, none of 1
    interval = evaluate.bootstrap(sums, counts)
    assert interval["value"] == pytest.approx(0.9) and 0.8 < interval["low"] < interval["high"] < 1

def test_more_reward_with_less_of_the_judge_is_over_optimisation():
    rows = [{"epoch": e, "reward": {"value": r}, "judge_score": {"value": j}} for e, r, j in (
        (10, 0.3, 0.5), (20, 0.6, 0.4), (30, 0.2, 0.4), (40, 0.6, 0.7), (50, 0.7, 0.6))]
    assert evaluate.over_optimised(rows) == [20, 50]

NASTY = ["<script>window.pwned = 1</script> wind", 'a "quoted" \'dog\' & <b>cat</b>',
         "a bird \U0001f426", "\u0643\u0644\u0628 \u064a\u0646\u0628\u062d",
         "</script><img src=x onerror='window.pwned = 1'>"]
PAGE_PROMPTS = NASTY + [f"prompt number {i} of a long file, all different" for i in range(11)]
def test_the_judge_hears_what_the_run_played(finished_run):
    """The same clips, so the same rewards; the last snapshot is the tuned model."""
    run = finished_run.folder
    flags = ["--judge", str(TOY / "judge"), "--guidance", "1", "--best-of", "1", "4", "--snapshots",
             "--noises", str(clap_ppo.EVAL_CLIPS)]
    assert evaluate.main([str(run), *flags]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    shown = re.search(r"reward (\S+) -> (\S+)\n", finished_run.out).groups()
    for side, reward in zip(("base", "tuned"), shown, strict=True):
        assert found[side]["reward"]["value"] == pytest.approx(float(reward), abs=6e-4)
    assert found["snapshots"][-1]["judge_score"] == found["tuned"]["judge_score"]
    assert [row["label"] for row in found["guidance"]] == ["base, guidance 1", "tuned, guidance 1"]
    assert found["guidance"][0]["reward"] != found["base"]["reward"]
    setup, _ = clap_ppo.open_run(clap_ppo.parse_args(["--resume", str(run)])[0], run)
    many = evaluate.make_base_clips(setup, evaluate.load_judge(str(TOY / "judge")), 8, None, 0)
    best = many.reward.unflatten(1, (2, 4)).amax(dim=2).mean().item()
    assert found["best_of"][1]["reward"]["value"] == pytest.approx(best, rel=1e-5)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate.main(["gone"]) == evaluate.main([str(run), "--judge", str(run)]) == 2

@pytest.fixture(scope="session")
def page_folder(tmp_path_factory) -> Path:
    """The page of a run with 16 prompts. Base clips are low tones, tuned clips high and louder."""
    import soundfile
    run, count = tmp_path_factory.mktemp("page"), len(PAGE_PROMPTS)
    def clips(first, level, judge):
        waveforms = torch.stack([level * tone(first + 10 * i, 16000, 0.1) for i in range(count)])
        return make_clips(judge * torch.eye(count)[:, None], waveforms=waveforms)
    base, tuned = clips(200, 0.1, 0.3), clips(2000, 0.5, 0.6)
    rows = evaluate.save_clips(run, base, tuned, PAGE_PROMPTS, 16000)
    for row in rows:                             # nothing about a file tells which model made it
        waves = [soundfile.read(run / row[side]["file"])[0] for side in ("base", "tuned")]
        assert (waves[0] ** 2).mean() == pytest.approx((waves[1] ** 2).mean(), rel=0.01)
    result = evaluate.compare(base, tuned)
    evaluate.save_page(run, config(), rows, result, 16000, "training prompts")
    return run

CHROMIUM = "/usr/bin/chromium"                   # apt-get install chromium
@pytest.fixture
def page(page_folder):
    """The page as a double click opens it, offline; errors in its scripts fail the test."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}")
    asked, errors = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((page_folder / "listen.html").as_uri())
        yield page
    assert errors == [] and [url for url in asked if not url.startswith(("file:", "blob:"))] == []

def check_one_plays_at_a_time(page):
    page.locator("h1").click()                          # or the browser lets nothing play
    for i in (0, 1):
        page.locator("audio").nth(i).evaluate("a => { a.loop = true; a.play().catch(() => 0) }")
    page.wait_for_function("(([a, b]) => a.paused > b.paused)(document.querySelectorAll('audio'))")

def test_the_plain_page_of_a_run_plays_its_clips_and_prompts_are_text(
        page, tmp_path, monkeypatch, capsys):
    """Tags, quotes, emoji and Arabic appear as written, and nothing in them runs."""
    assert page.locator("#rows h3").all_text_contents() == PAGE_PROMPTS
    assert page.locator("#kind").text_content() == "Training prompts, by the judge"
    setup = painter_setup()
    setup.prompts, setup.num_train = ["up", *NASTY], 1
    waves, rewards = torch.zeros(2 * len(NASTY), 40960), torch.tensor([[0.0, 9.0]] * len(NASTY))
    answers = [(waves, rewards), (waves, rewards - torch.arange(len(NASTY))[:, None])]
    monkeypatch.setattr(clap_ppo, "score_held_out", lambda *args: answers.pop(0))
    clap_ppo.finish(setup, tmp_path, [{"epoch": n, "reward_mean": n / 10} for n in (1, 2)])
    summary = "of 5 prompts 0 clearly better, 4 clearly worse"
    assert summary in capsys.readouterr().out
    page.goto((tmp_path / "index.html").as_uri())
    assert summary in page.locator("#summary").text_content()
    assert page.locator("th[scope=row]").all_text_contents() == NASTY[::-1]     # most changed first
    assert page.locator("td").all_text_contents() == [
        "0.00", "-4.00", "0.00", "-3.00", "0.00", "-2.00", "0.00", "-1.00", "0.00", "0.00"]
    assert "0.10 to 0.20" in page.locator("svg").get_attribute("aria-label")
    check_one_plays_at_a_time(page)
    players = "[...document.querySelectorAll('audio')].filter(a => a.duration == 2.56)"
    page.wait_for_function(f"{players}.length == {2 * len(NASTY)}")
    assert page.evaluate("window.pwned") is None

def test_a_blind_test_hides_sides_and_anchors_and_one_clip_plays_at_a_time(page):
    """By place. An anchor is two clips by the base model, one of them of another prompt."""
    base = {row["base"]["file"]: row["prompt"] for row in page.evaluate("run.rows")}
    seen = torch.zeros(10, 2)
    for plan in page.evaluate("Array.from({length: 500}, () => makePlan(8))"):
        seen += torch.tensor([[x["task"] == "anchor", x["a"]["score"]] for x in plan[2:12]])
        anchors = [item for item in plan if item["task"] in ("anchor", "practice")]
        assert len({item["prompt"] for item in plan[1:]}) == 11     # no pair's own clip is known
        for item, side in itertools.product(anchors, "ab"):
            assert item[side]["score"] == (base[item[side]["file"]] == item["prompt"])
    torch.testing.assert_close(seen / 500, torch.tensor([[0.2, 0.5]] * 10), atol=0.12, rtol=0)
    check_one_plays_at_a_time(page)

def test_anchors_are_where_the_judge_is_surest():
    judge = torch.diag(torch.tensor([0.1, 0.9, 0.2, 0.8, 0.7]))[:, None]
    rows = [{"base": {"file": str(i)}} for i in range(5)]
    evaluate.add_anchors(rows, make_clips(judge))
    assert ["anchor" in row for row in rows] == [False, True, False, True, True]

def test_the_blind_test_by_keyboard_and_its_rates(page, tmp_path, capsys):
    """This listener recognises tuned clips only and prefers them, but for one. A slip of the finger
    is taken back; a reload loses nothing; who got an anchor wrong is left out of the pool."""
    page.locator("#to-blind").press("Enter")
    for must_be_told in ("#device", "#room"):
        page.locator("#start button").press("Enter")
        assert page.evaluate("state") is None
        page.select_option(must_be_told, index=1)
    page.locator("#start button").press("Enter")
    page.evaluate("$('player').defaultPlaybackRate = 0.0625")
    page.keyboard.press("p")                            # half of this clip is not enough
    page.wait_for_function("$('player').currentTime > 0.01")
    page.evaluate("$('player').defaultPlaybackRate = 1")
    plan, slips = page.evaluate("state.plan"), [5, 15]
    undecided = [item["task"] for item in plan].index("preference")
    while (i := page.evaluate("state.given.length")) < len(plan):
        item = plan[i]
        for letter in "p" if "file" in item else "ab":
            page.evaluate("$('player').dispatchEvent(new Event('ended'))")  # of an earlier clip
            page.keyboard.press("1")
            assert "Before you answer, play" in page.locator("#status").text_content()
            page.keyboard.press(letter)
            assert page.locator("#player").get_attribute("src") == item.get(letter, item)["file"]
            page.wait_for_function(f"!unheard.includes('{letter}')")
        assert i < 2 or f"Question {i - 1} of 26" in page.locator("#stage").text_content()
        if "captions" in item:
            wrong = item["task"] == "recognition_base"
            key = 1 + (item["captions"].index(item["prompt"]) + wrong) % 4
        else:
            key = (i != undecided) * (1 if i == 0 or item["a"]["score"] else 2)
        page.keyboard.press(str(key if i not in slips else 1))
        if i in slips:
            slips.remove(i)
            page.keyboard.press("Backspace")
            page.reload()
    assert [page.locator(f"#{task}").text_content() for task in evaluate.TASKS] == [
        "0.938 [0.598, 0.993]", "0.000 [0.000, 0.324]", "1.000 [0.676, 1.000]",     # Wilson's
        "1.000 [0.342, 1.000]"]
    with page.expect_download() as download:
        page.keyboard.press("j")
    careful, careless, other = [str(tmp_path / name) for name in ("1", "2", "3")]
    download.value.save_as(careful)
    data = json.loads(Path(careful).read_text())
    assert (data["device"], data["room"], len(data["answers"])) == ("headphones", "quiet", 26)
    data |= {"listener": "2", "answers": [answer | {"score": 0.5} for answer in data["answers"]]}
    Path(careless).write_text(json.dumps(data))
    Path(other).write_text(json.dumps(data | {"run": "another"}))
    assert evaluate.main(["--pool", careful, careless]) == 0
    out = capsys.readouterr().out
    assert "left out: 1 of 2 listeners" in out
    assert re.findall(r"^\w+ +(\d\S+)", out, re.M) == ["0.938", "0.000", "1.000", "0.750"]
    for files in ([careful, careful], [careful, other], [__file__]):
        assert evaluate.main(["--pool", *files]) == 2

# ==== 11. Real models: the official formats, full-size CLAP, random weights ======================
SMALL = bench.LEVELS | dict(block_out_channels=[8, 16, 24, 40], layers_per_block=1,
                            attention_head_dim=4, norm_num_groups=8)
@pytest.mark.parametrize("preset", [slow("audioldm"), "audioldm2"])
def test_the_benchmark_times_an_epoch_of_each_real_model(preset, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LEVELS", SMALL)
    monkeypatch.setattr(bench, "HEADS", dict.fromkeys(bench.HEADS, 4))
    monkeypatch.setattr(bench, "VAE_CHANNELS", [32, 32, 32])
    monkeypatch.setattr(bench, "VOCODER_CHANNELS", 64)
    bench.main(["--preset", preset, "--micro-batches", "2", "--", *TINY, "--seconds", "0.64"])
    names, seconds = zip(*re.findall(r"([\w-]+) ([\d.]+) s", capsys.readouterr().out), strict=True)
    total, *parts = [float(value) for value in seconds]
    assert names == ("epoch", "U-Net", "VAE", "vocoder", "CLAP", "gradient") and min(parts) > 0
    assert 0.5 * total < sum(parts) <= total + 0.05

def test_the_overhead_is_what_no_network_and_no_gradient_took(setup, monkeypatch, capsys):
    """Six calls of equal length take half of an epoch; the first epoch, which takes longer, does
    not count."""
    clap, sizes = setup.reward.args[0], []
    calls = [(setup.unet, "forward"), (setup.pipeline.vae, "decode"), (torch.Tensor, "backward"),
             (setup.pipeline.vocoder, "forward"), (clap["audio_branch"], "forward"),
             (clap["text_branch"], "forward")]
    for owner, name in calls:
        monkeypatch.setattr(owner, name, lambda *args: time.sleep(0.05))
    def epoch(setup, folder, metrics):
        began = time.perf_counter()
        for owner, name in calls:
            getattr(owner, name)(torch.zeros(1))
        time.sleep(0.3 if metrics else 0.6)
        metrics.append({"seconds": time.perf_counter() - began})
        sizes.append(setup.cfg.micro_batch)
    monkeypatch.setattr(clap_ppo, "train", epoch)
    monkeypatch.setattr(bench, "build_setup", lambda *args: setup)
    bench.main(["--micro-batches", "8", "16"])
    for line in capsys.readouterr().out.splitlines()[1:]:
        assert float(re.search(r"overhead (\S+)", line)[1]) == pytest.approx(2, abs=0.15)
    assert sizes == [8, 8, 16, 16]

def small_audioldm(toy):
    """AudioLDM's architecture, but narrow; text encoder, VAE and vocoder are the toy's."""
    from diffusers import UNet2DConditionModel
    toy.unet = UNet2DConditionModel(
        **SMALL, cross_attention_dim=SMALL["block_out_channels"], class_embeddings_concat=True,
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=64)
    return toy

def small_audioldm2(toy):
    """AudioLDM2's; the text encoder is that of the judge, or random."""
    import diffusers as df
    import transformers as tr
    clap = tr.ClapModel.from_pretrained(TOY / "judge", dtype=torch.float32)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -5.0)]
    for word in (TOY / "pipeline/vocabulary.txt").read_text().split():
        words.append(("\u2581" + word, -3.0))
    gpt2 = tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=10))
    gpt2.config.max_new_tokens = 8
    t5 = tr.T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return df.AudioLDM2Pipeline(
        vae=toy.vae, text_encoder=clap, text_encoder_2=tr.T5EncoderModel(t5), language_model=gpt2,
        projection_model=df.AudioLDM2ProjectionModel(clap.config.projection_dim, 32, 24),
        tokenizer=toy.tokenizer, tokenizer_2=tr.T5Tokenizer(vocab=words, model_max_length=64),
        feature_extractor=tr.ClapFeatureExtractor(), scheduler=toy.scheduler, vocoder=toy.vocoder,
        unet=df.AudioLDM2UNet2DConditionModel(**SMALL, cross_attention_dim=4 * [[None, 24, 32]]))

@pytest.fixture(scope="session")
def narrow(tmp_path_factory):
    """The folder of a model, made at the first call; the toy's for "toy"."""
    @functools.cache
    def make(family: str) -> Path:
        if family == "toy":
            return TOY / "pipeline"
        folder, build = tmp_path_factory.mktemp(family), globals()[f"small_{family}"]
        torch.manual_seed(0)
        build(stock_pipeline(TOY / "pipeline")).save_pretrained(folder)
        index = folder / "model_index.json"     # on the hub it names a class that cannot generate
        index.write_text(index.read_text().replace("GPT2LMHeadModel", "GPT2Model"))
        return folder
    return make

def narrow_setup(folder: Path, loud: float):
    """With the toy's CLAP. A random U-Net whispers and hardly hears its prompt: both turned up."""
    setup = load("--prompts", f"{TOY}/../published_prompts.txt", "--model", folder, *CLAP, *TINY)
    setup.unet.base_model.model.conv_out.weight.data *= 3
    for name, value in setup.condition.items():
        if value.is_floating_point():
            setup.condition[name] = loud * value
    return setup

@pytest.mark.parametrize("family", ["audioldm", "audioldm2"])
def test_activations_computed_anew_on_a_gpu_are_the_same(narrow, monkeypatch, family):
    """Bit by bit, with their gradients, which need less memory so. A CPU is taken for a GPU."""
    from diffusers import ModelMixin
    found, blocks = [], []
    for device in (torch.device("cpu"), type("Device", (str,), {"type": "cuda"})("cpu")):
        monkeypatch.setattr(ModelMixin, "device", device)
        setup = narrow_setup(narrow(family), loud=1)
        setup.device = torch.device("cpu")
        for weight in trainable(setup.unet):            # else B = 0, and A has no gradient
            weight.data += 0.02 * torch.randn(weight.shape, generator=seeded(0))
        log_prob, mean, _ = replay(setup, roll(setup)[1])
        log_prob.sum().backward()
        found.append([mean, *[weight.grad for weight in trainable(setup.unet)]])
        blocks.append(["checkpoint" in str(vars(m).get("forward")) for m in setup.unet.modules()])
    assert sum(blocks[0]) == 0 and sum(blocks[1]) >= 20
    for plain, anew in zip(*found, strict=True):
        assert torch.equal(plain, anew) and plain.abs().max() > 0

@pytest.mark.slow
@pytest.mark.parametrize("family, dtype", [
    ("audioldm", "bfloat16"), ("audioldm2", "float32"), ("audioldm2", "bfloat16")])
def test_real_architectures_run_from_their_folders(
        narrow, family, dtype, prompt_file, tmp_path, monkeypatch, capsys):
    """With a full-size CLAP. Cut in the second epoch and resumed, all has the same bytes."""
    tiny = {"htsat": {"embed_dim": 96, "depths": [2, 2, 6, 2]}}
    model = clap_ppo.build_clap(clap_ppo.OFFICIAL | tiny)
    clap = save_as_official(tmp_path / "clap.pt", model, {})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    flags = ["--prompts", prompt_file, "--model", narrow(family), "--clap", clap, *TINY,
             "--dtype", dtype, "--learning-rate", 0.02, "--clip-range", 0.16, "--epochs", 2]
    assert run_main(capsys, *flags, "--out", tmp_path / "run")[0] == 0
    for row in results(tmp_path / "run")[1]:
        assert row["approx_kl"] > 0 and row["reward_spread"] > 0
    with cut("update", 2):
        assert run_main(capsys, *flags, "--out", tmp_path / "cut")[0] == 130
    assert run_main(capsys, "--resume", tmp_path / "cut")[0] == 0
    assert results(tmp_path / "cut") == results(tmp_path / "run")
    Path(clap).unlink()

@pytest.mark.parametrize("width, blocks", [(96, 6), (128, 12)])
def test_an_official_checkpoint_is_tiny_or_base_by_its_first_weight(
        clap_file, monkeypatch, width, blocks):
    asked, weight = [], {"module.audio_branch.patch_embed.proj.weight": torch.zeros(width, 1)}
    torch.save({"state_dict": weight}, clap_file.with_name("official.pt"))
    monkeypatch.setattr(clap_ppo, "build_clap", asked.append)
    with pytest.raises(UserError):
        clap_ppo.load_clap(str(clap_file.with_name("official.pt")), None)
    assert asked[0]["htsat"] == {"embed_dim": width, "depths": [2, 2, blocks, 2]}

def test_a_checkpoint_named_by_its_place_on_the_hub_is_fetched_once(clap, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download",
                        lambda *args: asked.append(args) or str(TOY / "clap.pt"))
    clap_ppo.load_clap(clap_ppo.REAL_MODEL["clap"], clap.tokenizer)
    assert asked == [("lukewys/laion_clap", "630k-audioset-best.pt")]
