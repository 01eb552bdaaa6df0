"""Chapter two: what `clap_ppo.py` claims, tried out. Read it after the script, from top to bottom.

    pytest test_clap_ppo.py                 # nearly everything, under three minutes on two cores
    pytest test_clap_ppo.py -k clipping     # one chapter, by a word in its tests' names
    pytest test_clap_ppo.py -m slow         # full-size CLAP, a killed process

A claim about a sampler, a loss or a reward is worth what an independent reference says of it: here
diffusers' own DDIM step, torch.distributions, REINFORCE by hand, a pipeline that has never heard of
this script. Where a model is needed for the argument only, `Painter` is it, a network of one matrix
of which every number can be foreseen; else it is the bundled toy world, with budgets of seconds.
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
import bench, evaluate, experiments  # noqa: E401, E402

TINY = ["--prompts-per-epoch", "2", "--clips-per-prompt", "4", "--num-steps", "5", "--epochs", "3",
        "--updates-per-epoch", "2", "--noise-window", "2", "--noise-until", "1",
        "--micro-batch", "8", "--device", "cpu"]
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

def painter_world(*flags: str, adapter_noise=0.0, scheduler=None) -> clap_ppo.World:
    """Two prompts, "up" that likes large latents and "down" that likes small ones, and a Painter as
    the policy. `adapter_noise` moves the adapter away from the base."""
    cfg = config("--num-steps", "10", "--kl-weight", "0", "--eval-guidance", "1", *flags)
    torch.manual_seed(2)
    unet = clap_ppo.add_lora(Painter(2), 4)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data += adapter_noise * torch.randn(weight.shape, generator=seeded(3))

    def reward(waveforms, sample_rate, prompts):
        return torch.tensor([1.0 if p == "up" else -1.0 for p in prompts]) * waveforms.mean(dim=1)

    return clap_ppo.World(
        cfg=cfg, train=["up", "down"], held_out=[], reward=reward, unet=unet, pipeline=PIPELINE,
        optimizer=torch.optim.SGD(weights, lr=cfg.learning_rate),     # proportional to the gradient
        condition={"class_labels": torch.eye(2), "encoder_hidden_states": None},
        uncondition={"class_labels": torch.full((2, 2), 0.1), "encoder_hidden_states": None},
        schedule=clap_ppo.ddim_schedule(scheduler or make_scheduler(), cfg.num_steps),
        prediction_type="epsilon", latent_shape=Painter.SHAPE, device=torch.device("cpu"))

def roll(world, starts=(1, 3), seed=0):
    """A rollout of two groups whose noise windows begin at different steps."""
    return clap_ppo.rollout(world, torch.tensor([0, 1]), torch.tensor(starts), seeded(seed))

def replayed(world, rows):
    return clap_ppo.replay(world, rows, torch.arange(len(rows["clip"])))

def moved(rows: dict, clip_count: int) -> torch.Tensor:
    """Some advantages (R,), one per clip, handed to each of its rows."""
    return torch.linspace(-1, 1, clip_count)[rows["clip"]]

@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    """A training file with the held-out file beside it, where the script looks for it."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("# four\n\n" + "\n".join(TRAIN_PROMPTS) + "\n")
    (folder / "eval_prompts.txt").write_text("\n".join(HELD_OUT) + "\n")
    return folder / "prompts.txt"

@pytest.fixture(scope="session")
def world(prompt_file):
    """The toy world, loaded once, with guidance for listening. Tests leave it as they found it."""
    return clap_ppo.load_world(config("--prompts", str(prompt_file), "--eval-guidance", "2.5"))

@pytest.fixture(scope="session")
def clap(world):
    return world.reward.args[0]

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
    run = folder / "runs/toy-1"
    return SimpleNamespace(out=done.stdout, folder=run, network=folder / "network.log", metrics=[
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])

# ==== 1. A denoising step is a Gaussian policy ===================================================

SCHEDULES = [dict(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one,
                  prediction_type=prediction)
             for spacing, offset, to_one, prediction in itertools.product(
                 ("leading", "trailing", "linspace"), (0, 1), (True, False),
                 ("epsilon", "v_prediction"))]

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
        mean = clap_ppo.ddim_mean(output, latents, *bars, sigma, settings["prediction_type"])
        theirs = scheduler.step(output, t, latents, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + sigma * noise, theirs, rtol=2e-5, atol=2e-5)
        if sigma == 0:
            assert step == num_steps - 1
            with pytest.raises(AssertionError, match="sigma is 0"):
                clap_ppo.gaussian_log_prob(theirs, mean, sigma)
            continue
        log_prob = clap_ppo.gaussian_log_prob(theirs, mean, sigma)
        reference = Normal(mean, sigma).log_prob(theirs).flatten(1).mean(dim=1)
        torch.testing.assert_close(log_prob, reference, rtol=1e-5, atol=1e-5)

def test_the_log_prob_is_a_mean_and_each_row_has_its_own_sigma():
    """A sum would grow with the latents. One step without noise spoils a table of rows."""
    x, mean, sigma = torch.tensor([[0.3, -1.2]]), torch.tensor([[0.1, 0.4]]), torch.tensor([0.7])
    by_hand = sum(-0.5 * (d / 0.7) ** 2 - math.log(0.7) - 0.5 * math.log(2 * math.pi)
                  for d in (0.2, -1.6)) / 2
    for repeats in (1, 1000):
        again = clap_ppo.gaussian_log_prob(x.repeat(1, repeats), mean.repeat(1, repeats), sigma)
        assert again.item() == pytest.approx(by_hand, abs=1e-5)
    x, sigma = torch.zeros(3, 2, 2), torch.tensor([0.5, 1.0, 2.0])
    log_prob = clap_ppo.gaussian_log_prob(x, x, sigma)
    torch.testing.assert_close(log_prob, -sigma.log() - 0.5 * math.log(2 * math.pi))
    with pytest.raises(AssertionError, match="sigma is 0"):
        clap_ppo.gaussian_log_prob(x, x, torch.tensor([0.5, 0.0, 2.0]))

def test_half_precision_goes_in_and_float32_comes_out():
    """A ratio is clipped at 1e-4; bfloat16 has steps of 4e-3. A prediction of x_0 is refused."""
    latents, output = torch.randn(2, 2, 4, 3, 5, generator=seeded(0)).bfloat16()
    numbers = torch.tensor([0.5, 0.6]), torch.tensor([0.8, 0.9]), torch.tensor([0.2, 0.1])
    mean = clap_ppo.ddim_mean(output, latents, *numbers)
    assert torch.equal(mean, clap_ppo.ddim_mean(output.float(), latents.float(), *numbers))
    with pytest.raises(AssertionError, match="cannot use 'sample'"):
        clap_ppo.ddim_mean(output, latents, *numbers, "sample")

def test_guidance_goes_from_the_unconditional_prediction_past_the_conditional_one():
    """At scale 3 and predictions 1 and 2 it is 4. At scale 1 the unconditional half cancels out, so
    it is not computed."""
    batches = []

    def unet(latents, timesteps, class_labels):
        batches.append(len(latents))
        labels = class_labels + timesteps[:, None] / 1000
        return SimpleNamespace(sample=latents + labels[..., None])

    latents, t = torch.randn(2, 1, 2, generator=seeded(0)), torch.tensor([500, 250])
    cond, uncond = ({"class_labels": torch.tensor(x)} for x in ([[2.0], [5.0]], [[1.0], [1.0]]))
    for scale, expected in ((3.0, [4.5, 13.25]), (1.0, [2.5, 5.25])):
        guided = clap_ppo.guided_prediction(unet, latents, t, cond, uncond, scale)
        torch.testing.assert_close(guided, latents + torch.tensor(expected).view(2, 1, 1))
    assert batches == [4, 2]

def naive_rollout(world, scheduler, starts, generator):
    """What a rollout means, clip by clip, with diffusers' own scheduler: latents, {(clip, step):
    (x_t, x_{t-1})}. Only the order in which noise is drawn is shared with the script."""
    cfg = world.cfg
    group = [g for g in range(len(starts)) for _ in range(cfg.clips_per_prompt)]
    size = len(starts) if cfg.shared_noise else len(group)
    noise = torch.randn(size, *world.latent_shape, generator=generator)
    clips = [noise[g if cfg.shared_noise else c] for c, g in enumerate(group)]
    scheduler.set_timesteps(cfg.num_steps)
    visited = {}
    for step, t in enumerate(scheduler.timesteps):
        noisy = [c for c, g in enumerate(group) if starts[g] <= step < starts[g] + cfg.noise_window]
        block = dict(zip(noisy, torch.randn(len(noisy), *world.latent_shape, generator=generator)))
        for c, g in enumerate(group):
            x = clips[c][None]
            with torch.no_grad():
                out = world.unet(x, t[None], world.condition["class_labels"][g:g + 1]).sample
            eta, draw = (clap_ppo.ETA, block[c][None]) if c in block else (0.0, torch.zeros_like(x))
            clips[c] = scheduler.step(out, t, x, eta=eta, variance_noise=draw).prev_sample[0]
            visited[c, step] = (x[0], clips[c])
    return torch.stack(clips), visited

@pytest.mark.parametrize("flags, starts, eta", [
    (["--noise-window", "2"], (1, 3), 1.0),
    (["--noise-window", "1"], (0, 5), 0.5),
    (["--noise-window", "7"], (0, 0), 1.0),
    (["--noise-window", "2", "--no-shared-noise"], (1, 3), 1.0),
    (["--noise-window", "999", "--no-shared-noise"], (0, 0), 1.0),
], ids=["window", "short-window", "all", "own-noise", "textbook"])
def test_a_rollout_is_what_a_naive_loop_over_diffusers_scheduler_gives(
        monkeypatch, flags, starts, eta):
    """One path per group until its clips part, the micro-batches: all is speed. The guidance of
    listening is none of a rollout's."""
    monkeypatch.setattr(clap_ppo, "ETA", eta)
    world = painter_world("--num-steps", "7", "--micro-batch", "3", "--eval-guidance", "3",
                          *flags, adapter_noise=0.2)
    latents, rows = roll(world, starts)
    expected, visited = naive_rollout(world, make_scheduler(), starts, seeded(0))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    for row, (clip, step) in enumerate(zip(rows["clip"].tolist(), rows["step"].tolist())):
        for name, x in zip(("latents", "next_latents"), visited[clip, step]):
            torch.testing.assert_close(rows[name][row], x, rtol=1e-4, atol=1e-5)

# ==== 2. Replaying a trajectory gives ratio 1 ====================================================

@pytest.mark.parametrize("window, starts", [(2, (1, 3)), (1, (0, 5)), (7, (0, 0))])
def test_the_table_holds_each_noisy_step_of_each_clip_once_and_never_the_last(window, starts):
    """Of seven steps, 0 to 6, the last is sampled but not trained."""
    _, rows = roll(painter_world("--num-steps", "7", "--noise-window", str(window)), starts)
    expected = [(clip, step) for clip in range(8)
                for step in range(starts[clip // 4], min(6, starts[clip // 4] + window))]
    assert sorted(zip(rows["clip"].tolist(), rows["step"].tolist())) == expected
    assert rows["prompt_id"].tolist() == [clip // 4 for clip in rows["clip"].tolist()]

@pytest.mark.parametrize("flag, rows_asked", [("--shared-noise", 2), ("--no-shared-noise", 8)])
def test_the_unet_answers_once_for_all_clips_that_are_still_one(flag, rows_asked):
    """Eight clips in two groups, noisy in one step. Whichever rows a minibatch has, in any order, a
    row's log-prob is its own."""
    world, asked = painter_world("--noise-window", "1", "--num-steps", "5", flag), []
    world.unet.base_model.model.register_forward_pre_hook(lambda _, x: asked.append(len(x[0])))
    _, rows = roll(world, starts=(0, 2))
    assert asked[0] == rows_asked and asked[3:] == [8, 8] and sum(asked) == (
        2 + 5 + 5 + 8 + 8 if rows_asked == 2 else 5 * 8)
    asked.clear()
    replayed(world, rows)
    assert asked == [rows_asked]
    at = torch.tensor([6, 1, 3, 7])
    torch.testing.assert_close(clap_ppo.replay(world, rows, at)[0], rows["log_prob"][at])

@pytest.mark.parametrize("until, expected", [("1", {0, 1, 2, 3}), ("0.5", {0, 1})])
def test_windows_fall_everywhere_in_their_part_of_the_path(until, expected):
    """Of 6 steps, the last, 5, is never in a window of 2; --noise-until 0.5 keeps them within the
    first three. Prompts repeat only if there are too few."""
    world, begins, counts = painter_world("--num-steps", "6", "--noise-until", until), set(), []
    for seed in range(20):
        ids, starts = clap_ppo.choose_prompts(world, seeded(seed))
        begins |= set(starts.tolist())
        assert sorted(ids.tolist()) == [0, 1]
        counts.append(ids[0].item())
    assert begins == expected and 0 < sum(counts) < 20
    world.cfg = dataclasses.replace(world.cfg, prompts_per_epoch=4)
    assert sorted(clap_ppo.choose_prompts(world, seeded(0))[0].tolist()) == [0, 0, 1, 1]

def test_every_epoch_of_a_run_begins_with_ratio_one_and_asks_nothing_of_the_network(finished_run):
    """The check is logged, to 1e-6 in float32; CLAP was built without a connection attempted."""
    assert [row["epoch"] for row in finished_run.metrics] == [1, 2, 3]
    for row in finished_run.metrics:
        assert 0 <= row["ratio_error"] <= 1e-6 and row["approx_kl"] > 0
    rewards = [row["reward"] for row in finished_run.metrics]
    assert finished_run.metrics[2]["reward_mean"] == pytest.approx(sum(rewards) / 3)
    assert not finished_run.network.exists(), finished_run.network.read_text()

def update_once(world, rows, seed=0, advantages=None):
    advantages = moved(rows, 8) if advantages is None else advantages
    return clap_ppo.update(world, {**rows, "advantage": advantages}, seeded(seed))

def replay_broken(world, fault: str, dtype: str):
    """An update of a copy of `world` after one of four errors that have happened to people."""
    world = clap_ppo.World(**{**vars(world), "unet": copy.deepcopy(world.unet),
                              "cfg": dataclasses.replace(world.cfg, dtype=dtype)})
    world.optimizer = torch.optim.SGD(world.unet.parameters(), lr=0.1)
    _, rows = roll(world, starts=(1, 2))
    inner = world.unet.base_model.model
    if fault == "dropout":
        inner.conv_out = nn.Sequential(nn.Dropout(0.1), inner.conv_out).train()
    elif fault == "step":
        rows["step"] = rows["step"] + 1
    elif fault == "halves":                     # of the batch: each row has another's prompt
        inner.register_forward_pre_hook(lambda module, args, kwargs: (args, {
            k: v.roll(len(args[0]) // 2, 0) if torch.is_tensor(v) else v
            for k, v in kwargs.items()}), with_kwargs=True)
    elif fault == "weights":
        inner.conv_out.bias.data += 0.5
    return update_once(world, rows)

FAULTS = ["dropout", "step", "halves", "weights"]

@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 1e-3)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_replay_stops_the_run_in_any_precision(world, fault, dtype, bound):
    """Rounding does not stop it."""
    assert replay_broken(world, "none", dtype)["ratio_error"] <= bound
    with pytest.raises(UserError, match="on-policy check.*dropout.*other timesteps"):
        replay_broken(world, fault, dtype)

def test_in_half_precision_single_rows_may_be_off_but_not_most():
    """Other batch shapes pick other kernels: one row of 64 may be off by twice the clip range."""
    tiny, one, most = torch.ones(3, 64)
    tiny[7], one[7] = 1 + 3e-6, 1 + 2e-3
    most += 2e-3
    assert clap_ppo.check_on_policy(one, "bfloat16", 1e-3) == pytest.approx(2e-3 / 8, rel=1e-3)
    for ratio, dtype in ((tiny, "float32"), (most, "bfloat16"), (one * math.nan, "bfloat16")):
        with pytest.raises(UserError, match="on-policy"):
            clap_ppo.check_on_policy(ratio, dtype, 1e-3)

# ==== 3. The reward ==============================================================================

def tone(hz: float, sample_rate: int, seconds: float = 2.0) -> torch.Tensor:
    t = torch.arange(int(seconds * sample_rate)) / sample_rate
    return sum(0.3 / k * torch.sin(2 * math.pi * k * hz * t) for k in (1, 2, 3))[None]

@pytest.mark.parametrize("window, heard", [
    (7, [1, 2, 3, 1, 2, 3, 0]), (5, [1, 2, 3, 0, 0]), (3, [1, 2, 3]), (2, [1, 2])])
def test_long_clips_keep_their_beginning_and_short_ones_repeat_whole(window, heard):
    """What reaches the network of a CLAP that listens to `window` samples."""
    given = []
    stub = SimpleNamespace(
        audio_cfg=SimpleNamespace(sample_rate=48000, clip_samples=window),
        encode_audio=lambda x, _: given.append(x["waveform"]) or {"embedding": torch.ones(1, 4)},
        audio_projection=lambda x: x, logit_scale_a=torch.zeros(1), tokenizer=lambda *_, **__: {},
        get_text_embedding=lambda tokens: torch.ones(1, 4) / 2)
    reward = clap_ppo.clap_reward(stub, torch.tensor([[0.1, 0.2, 0.3]]), 48000, ["x"])
    torch.testing.assert_close(10 * given[0], torch.tensor([heard]).float())
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
            text = clap.get_text_embedding(dict(tokens))[0]
            sound = clap.encode_audio({"waveform": clip[None]}, "cpu")["embedding"]
            cosine = torch.cosine_similarity(text, clap.audio_projection(sound)[0], dim=0)
        assert reward.item() == pytest.approx(cosine.item(), abs=1e-5)

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
    model = clap_ppo.build_clap(json.loads((TOY / "clap.json").read_text()))
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
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    with pytest.raises(AssertionError, match="tokenizer has lost its vocabulary"):
        clap_ppo.load_clap(path, lambda prompts, **more: clap.tokenizer(["wind"], **more))

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
    with pytest.raises(UserError, match="--clap .*clap.pt: damaged, of another size, or with code"):
        clap_ppo.load_clap(path, clap.tokenizer)
    assert not (tmp_path / "pwned").exists()

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

def test_an_outlier_is_clipped():
    """One of 101 clips that is better than all others stands 10 deviations off; 5 is enough."""
    rewards = torch.zeros(1, 101)
    rewards[0, 50] = 2
    assert clap_ppo.group_advantages(rewards)[0, 50] == 5
    assert clap_ppo.group_advantages(-rewards)[0, 50] == -5
    assert clap_ppo.group_advantages(rewards, clip=20.0)[0, 50] == pytest.approx(10, rel=1e-4)

def test_a_group_of_little_spread_teaches_little_and_one_without_nothing():
    """Divided by its own deviation, the noise of alike clips would count as much as success."""
    equal = clap_ppo.group_advantages(torch.tensor([[7, 7, 7], [1, 2, 3]]))
    assert equal[0].tolist() == [0, 0, 0] and equal[1, 2] > 1
    alike = torch.tensor([[0.50, 0.52, 0.48], [0.0, 0.2, -0.2]])
    found = clap_ppo.group_advantages(alike, floor=0.1)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.2, -0.2]))
    assert found[1, 1] == pytest.approx(1.5 ** 0.5)              # its own deviation is larger

@pytest.mark.parametrize("rewards, complaint", [
    (torch.ones(4, 1), "K >= 2"), (torch.ones(4), "K >= 2"), (torch.ones(1, 2) / 0, "not finite")])
def test_rewards_that_cannot_be_compared_are_refused(rewards, complaint):
    with pytest.raises(AssertionError, match=complaint):
        clap_ppo.group_advantages(rewards)

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
    assert info["ratio"].item() == pytest.approx(ratio) and not info["ratio"].requires_grad
    assert info["clip_fraction"] == float(abs(ratio - 1) > 0.2)

def test_at_ratio_one_clipped_ppo_is_reinforce():
    """Before the first update the gradient is -mean(A * grad log_prob), for every weight."""
    world = painter_world(adapter_noise=0.2)
    _, rows = roll(world)
    advantages, weights = moved(rows, 8), world.optimizer.param_groups[0]["params"]
    loss, _ = clap_ppo.ppo_loss(replayed(world, rows)[0], rows["log_prob"], advantages, 1e-4)
    ppo = torch.autograd.grad(loss, weights)
    reinforce = torch.autograd.grad(-(advantages * replayed(world, rows)[0]).mean(), weights)
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
    sigma = torch.tensor([0.3, 1.0, 2.0])
    column = sigma.view(3, 1, 1, 1)
    reference = kl_divergence(Normal(mean, column), Normal(base, column)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(clap_ppo.gaussian_kl(mean, base, sigma), reference)

# ==== 6. All of it learns ========================================================================

@pytest.fixture
def learner(monkeypatch):
    """A painter's world for `train`, whose "decoder" hands the latents on, so that the reward is
    known in closed form; what `update` is given in every epoch is kept in `learner.rows`."""
    real = clap_ppo.update
    monkeypatch.setattr(clap_ppo, "decode", lambda pipeline, latents, *rest: latents.flatten(1))
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)

    def watch(world, rows, generator):
        make.rows.append(rows)
        info = real(world, rows, generator)
        make.after.append(clap_ppo.adapter_state(world.unet))
        return info

    def make(*flags):
        make.rows, make.after = [], []
        world = painter_world("--num-steps", "6", "--clips-per-prompt", "8", "--learning-rate",
                              "0.03", *flags)
        world.optimizer = torch.optim.AdamW(world.optimizer.param_groups[0]["params"], lr=0.03)
        return world

    monkeypatch.setattr(clap_ppo, "update", watch)
    return make

@pytest.mark.parametrize("flags", [[], ["--noise-window", "999", "--no-shared-noise"]],
                         ids=["window", "textbook"])
@pytest.mark.parametrize("sign", [1, -1], ids=["", "sign-flipped"])
def test_a_small_policy_learns_what_its_prompts_want(learner, tmp_path, monkeypatch, flags, sign):
    """Through the whole loop. Told that worse is better, it unlearns: it does not measure luck."""
    world, ours = learner("--epochs", "30", *flags), clap_ppo.group_advantages
    monkeypatch.setattr(clap_ppo, "group_advantages", lambda *args: sign * ours(*args))
    monkeypatch.setattr(clap_ppo, "EVAL_NOISES", 64)

    def plain_reward():
        return clap_ppo.play(world, clap_ppo.adapter_state(world.unet))[1].mean().item()

    before = plain_reward()
    clap_ppo.train(world, tmp_path, {"epoch": 0, "ema": {}, "metrics": []})
    assert sign * (plain_reward() - before) > 0.5

def test_every_row_carries_the_advantage_of_its_clip(learner, tmp_path):
    world, rewards = learner("--epochs", "2"), []
    real = world.reward
    world.reward = lambda *args: rewards.append(real(*args)) or rewards[-1]
    clap_ppo.train(world, tmp_path, {"epoch": 0, "ema": {}, "metrics": []})
    for rows, reward in zip(learner.rows, rewards):
        expected = clap_ppo.group_advantages(reward.view(2, 8)).flatten()
        torch.testing.assert_close(rows["advantage"], expected[rows["clip"]])
        assert len(rows["advantage"]) == 2 * 8 * 2

def test_every_epoch_has_its_own_noise_and_a_seed_fixes_it(learner, tmp_path):
    def first_epochs(count, *flags):
        world = learner("--epochs", str(count), "--noise-window", "999", *flags)
        clap_ppo.train(world, tmp_path, {"epoch": 0, "ema": {}, "metrics": []})
        return [rows["latents"][rows["step"] == 0].sum().item() for rows in learner.rows]     # x_T

    found = first_epochs(6)
    assert len(set(found)) == 6
    assert first_epochs(1) == found[:1]
    assert first_epochs(1, "--seed", "1")[0] not in found

@pytest.mark.parametrize("decay, shares", [
    (0.0, [0, 0, 0, 1]), (0.5, [1 / 8, 1 / 8, 1 / 4, 1 / 2]), (0.9, [1 / 4] * 4)])
def test_the_kept_adapter_is_an_average_over_epochs(learner, tmp_path, monkeypatch, decay, shares):
    """Of few epochs it is the plain mean. It is what is played and saved every few epochs."""
    monkeypatch.setattr(clap_ppo, "EMA_DECAY", decay)
    monkeypatch.setattr(clap_ppo, "EVAL_EVERY", 2)
    world = learner("--epochs", "4")
    kept = clap_ppo.train(world, tmp_path, {"epoch": 0, "ema": {}, "metrics": []})
    for name, weight in kept.items():
        expected = sum(share * epoch[name] for share, epoch in zip(shares, learner.after))
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(saved["adapter"][k], v) for k, v in learner.after[-1].items())
    evals = [row.get("eval_reward") for row in saved["metrics"]]
    assert [value is None for value in evals] == [True, False, True, False]
    assert evals[3] == clap_ppo.play(world, kept)[1].mean().item()

def test_a_reward_that_is_not_a_number_stops_the_run_and_names_the_prompt(learner, tmp_path):
    world = learner("--epochs", "1")
    world.reward = lambda w, rate, prompts: torch.tensor(
        [math.nan if p == "down" else 1.0 for p in prompts])
    with pytest.raises(UserError, match="clip of 'down' is not finite"):
        clap_ppo.train(world, tmp_path, {"epoch": 0, "ema": {}, "metrics": []})

def test_the_micro_batch_changes_memory_and_speed_but_not_the_result(monkeypatch):
    """Also when the last one is smaller. Plain SGD, because Adam hides a wrong scale."""
    monkeypatch.setattr(clap_ppo, "MAX_GRAD_NORM", math.inf)
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    results = []
    for micro_batch in ("64", "3"):
        world = painter_world("--micro-batch", micro_batch, "--learning-rate", "0.5",
                              "--kl-weight", "0.1", "--clip-range", "0.5", adapter_noise=0.2)
        _, rows = roll(world)
        start = clap_ppo.adapter_state(world.unet)
        info = update_once(world, rows)
        results.append((clap_ppo.adapter_state(world.unet), info))
    (one, info), (other, other_info) = results
    assert max((start[k] - v).abs().max() for k, v in one.items()) > 1e-2
    for name, weight in other.items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-5)
    for key in ("loss", "approx_kl", "clip_fraction", "kl_base", "grad_norm"):
        assert other_info[key] == pytest.approx(info[key], rel=1e-3, abs=1e-6)

def test_an_update_raises_good_actions_and_its_rate_warms_up_over_the_whole_run():
    """Of a run's 30 steps lr rises over ten, while it falls over all of them to 0."""
    world = painter_world("--updates-per-epoch", "6", "--learning-rate", "0.2", "--epochs", "5",
                          "--clip-range", "0.5", adapter_noise=0.1)
    rates, step, (_, rows) = [], world.optimizer.step, roll(world)
    world.optimizer.step = lambda: (rates.append(world.optimizer.param_groups[0]["lr"]), step())
    info = update_once(world, rows)
    with torch.no_grad():
        gain, advantages = replayed(world, rows)[0] - rows["log_prob"], moved(rows, 8)
    assert (gain * advantages).mean() > 1e-4 and info["approx_kl"] > 0
    assert torch.corrcoef(torch.stack([gain, advantages]))[0, 1] > 0.3
    update_once(world, roll(world)[1])
    assert rates == pytest.approx([0.2 * min(n / 10, 1 - (n - 1) / 30) for n in range(1, 13)])

def test_the_clip_range_is_scaled_to_the_size_of_the_latents(monkeypatch):
    """1.6 nats per clip, whether spread over 16,384 elements or over 16."""
    seen, real = [], clap_ppo.ppo_loss
    monkeypatch.setattr(clap_ppo, "ppo_loss", lambda *args: seen.append(args[3]) or real(*args))
    world = painter_world("--clip-range", "1e-4")
    update_once(world, roll(world)[1])
    assert seen[0] == pytest.approx(1e-4 * 16384 / 16)

@pytest.mark.parametrize("weight", ["0", "0.5"])
def test_the_kl_term_pulls_the_policy_to_the_base_with_guidance(monkeypatch, weight):
    """Without any advantage only the KL term speaks; without the term nothing moves at all."""
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    world = painter_world("--kl-weight", weight, "--kl-guidance", "3", "--learning-rate", "0.5",
                          "--updates-per-epoch", "6", adapter_noise=0.3)
    _, rows = roll(world)

    def gap():
        given = rows["latents"], world.schedule[0][rows["step"]]
        labels = torch.eye(2)[rows["prompt_id"]]
        with torch.no_grad():
            _, mean, sigma = replayed(world, rows)
            with world.unet.disable_adapter():
                asked = world.unet(*given, labels).sample
                empty = world.unet(*given, torch.full_like(labels, 0.1)).sample
            bars = (bar[rows["step"]] for bar in world.schedule[1:])
            guided = clap_ppo.ddim_mean(empty + 3 * (asked - empty), given[0], *bars, sigma)
        return clap_ppo.gaussian_kl(mean, guided, sigma).mean().item()

    before, info = gap(), update_once(world, rows, advantages=torch.zeros(len(rows["clip"])))
    if weight == "0":
        assert gap() == before and "kl_base" not in info
    else:
        assert gap() < 0.9 * before and gap() < info["kl_base"] <= before * 1.001
        assert info["loss"] == pytest.approx(0.5 * info["kl_base"], rel=1e-3)

def test_the_base_model_is_the_adapter_switched_off_or_of_zeros_or_new(world):
    """Bit for bit, in the real U-Net. `play` leaves the weights as they were."""
    noise = torch.randn(2, *world.latent_shape, generator=seeded(0))
    ids, new = torch.tensor([0, 1]), clap_ppo.adapter_state(world.unet)
    assert {id(p) for p in world.unet.parameters() if p.requires_grad} == {
        id(p) for p in world.optimizer.param_groups[0]["params"]}
    base = clap_ppo.sample(world, ids, noise)
    other = {k: v + 0.5 * torch.randn(v.shape, generator=seeded(0)) for k, v in new.items()}
    world.unet.load_state_dict(other, strict=False)
    assert (clap_ppo.sample(world, ids, noise) - base).abs().max() > 0.01
    with world.unet.disable_adapter():
        assert torch.equal(clap_ppo.sample(world, ids, noise), base)
    zeros = clap_ppo.play(world, {k: torch.zeros_like(v) for k, v in new.items()})
    assert all(torch.equal(clap_ppo.adapter_state(world.unet)[k], v) for k, v in other.items())
    world.unet.load_state_dict(new, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(zeros, clap_ppo.play(world, new)))

def test_gradients_are_limited_and_one_that_is_not_finite_stops_before_the_weights(monkeypatch):
    """One NaN in Adam's state is for ever. What is logged is the norm before."""
    monkeypatch.setattr(clap_ppo, "MAX_GRAD_NORM", 1e-3)
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    world = painter_world("--learning-rate", "1", "--updates-per-epoch", "1", adapter_noise=0.2)
    start, (_, rows) = clap_ppo.adapter_state(world.unet), roll(world)
    with pytest.raises(UserError, match="gradient is not finite"):
        update_once(world, rows, advantages=torch.full((len(rows["clip"]),), math.nan))
    world.optimizer.zero_grad()
    norm = update_once(world, rows)["grad_norm"]
    step = torch.cat([(v - start[k]).flatten()
                      for k, v in clap_ppo.adapter_state(world.unet).items()]).norm()
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
    assert longer[1][2]["lr"] == pytest.approx(0.01 / 6) and before[1]["lr"] == 0.01 / 4
    assert run_main(capsys, "--resume", run)[0] == 0 and results(run) == longer

@pytest.mark.parametrize("moment", [1, 2, 4], ids=["first-epoch", "second-rollout", "at-the-end"])
def test_a_run_cut_at_any_moment_resumes_to_the_same_bytes(
        run_flags, straight_run, tmp_path, capsys, monkeypatch, moment):
    """Ctrl-C before anything was saved; in the second epoch; and when the weights have moved on but
    the checkpoint is not written."""
    run, real, calls = tmp_path / "run", clap_ppo.score, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(clap_ppo, "score", interrupted)
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

def test_a_file_is_the_old_one_or_the_new_one_never_half(tmp_path):
    def half(path):
        path.write_text("ne")
        raise OSError("No space left on device")

    clap_ppo.write(tmp_path / "file", b"old")
    with pytest.raises(OSError):
        clap_ppo.write(tmp_path / "file", half)
    assert (tmp_path / "file").read_text() == "old"

@pytest.mark.parametrize("content", [b"", b"half a checkp", {"a": 1}, "malice", "prompts"], ids=str)
def test_a_run_that_is_damaged_malicious_or_of_other_prompts_is_left_alone(
        cut_run, tmp_path, capsys, content):
    run = Path(shutil.copytree(cut_run, tmp_path / "run"))
    file, complaint = run / "checkpoint.pt", "checkpoint.pt: damaged, or with code in it"
    if content == "prompts":
        saved = json.loads((run / "config.json").read_text())
        complaint = "prompt files have changed"
        (tmp_path / "p.txt").write_text("snoring\nwind blowing\n")
        (run / "config.json").write_text(json.dumps({**saved, "prompts": str(tmp_path / "p.txt")}))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        gift = {"epoch": 1, "gift": Malice(tmp_path / "pwned")}
        torch.save(gift if content == "malice" else content, file)
    before = file.read_bytes()
    code, err = run_main(capsys, "--resume", run, "--epochs", 3)
    assert code == 2 and complaint in err and len(err.splitlines()) == 1
    assert file.read_bytes() == before and not (tmp_path / "pwned").exists()

# ==== 8. Bad input ===============================================================================

@pytest.fixture(scope="module")
def bad(tmp_path_factory, cut_run):
    """A folder full of things that are not what they should be; commands are given in it."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("# only\n\n   \n# comments\n")
    (folder / "latin.txt").write_bytes("snoring\nV\u00f6gel\n".encode("latin-1"))
    (folder / "good.txt").write_text("snoring\nbirds chirp\n")
    (folder / "same.txt").write_text("wind blowing\nsnoring\n")
    (folder / "nothing").mkdir()
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text((cut_run / "config.json").read_text())
    for name, text in (("broken", "{}]"), ("old", '{"eta": 1.0}'), ("odd", '{"epochs": "ten"}')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    for name in ("music", "clipping", "pickled"):
        shutil.copytree(TOY / "pipeline", folder / name)
    index = json.loads((folder / "music/model_index.json").read_text())
    (folder / "music/model_index.json").write_text(
        json.dumps({**index, "_class_name": "MusicLDMPipeline"}))
    make_scheduler(clip_sample=True).save_pretrained(folder / "clipping/scheduler")
    next((folder / "pickled/unet").glob("*.safetensors")).unlink()
    torch.save({"weight": Malice(folder / "pwned")},
               folder / "pickled/unet/diffusion_pytorch_model.bin")
    return folder

GOOD = ["--prompts", "good.txt", *TINY]

@pytest.mark.parametrize("flags, complaint", [
    ([], "prompts prompts.txt: .*No such file.*samples/prompts.txt"),
    (["--prompts", "gone.txt"], "gone.txt: .*No such file.*samples/prompts.txt"),
    (["--prompts", "empty.txt"], "empty.txt: no prompt in it"),
    (["--prompts", "latin.txt"], "latin.txt: 'utf-8' codec.*samples/prompts.txt"),
    ([*GOOD, "--eval-prompts", "same.txt"], "'snoring' is a training prompt.*same.txt: remove one"),
    ([*GOOD, "--clips-per-prompt", "1"], "--clips-per-prompt 1: use 2 to 1000"),
    ([*GOOD, "--seconds", "12"], "--seconds 12.0: use 0.1 to 10"),
    ([*GOOD, "--learning-rate", "nan"], "--learning-rate nan: use 1e-09 to 1"),
    ([*GOOD, "--device", "mps"], "--device mps: use auto or cpu"),
    ([*GOOD, "--noise-window", "two"], "--noise-window: invalid int value: 'two'"),
    ([*GOOD, "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ([*GOOD, "--model", "nobody/has-this"], "--model nobody/has-this: .*--preset toy"),
    ([*GOOD, "--model", "music"], "a MusicLDMPipeline is not supported"),
    ([*GOOD, "--model", "clipping"], "its scheduler is not plain DDIM"),
    ([*GOOD, "--model", "pickled"], "--model pickled: no usable folder"),
    ([*GOOD, "--clap", "nobody/repo/x.pt"], "--clap nobody/repo/x.pt: no file, nor on the hub"),
    ([*GOOD, "--clap", "good.txt"], "--clap good.txt: damaged"),
    ([*GOOD, "--out", "run"], "--out run: exists; .*--resume run"),
    (["--resume", "nowhere"], "--resume nowhere: not a run.*No such file"),
    (["--resume", "run", "--seed", "5", "--lora-rank", "1"], "lora_rank and seed cannot change"),
    (["--resume", "broken"], "--resume broken: not a run"),
    (["--resume", "old"], "--resume old: not a run.*eta"),
    (["--resume", "odd"], "--resume odd: not a run"),
], ids=lambda x: " ".join(x).replace(" ".join(TINY), "") if isinstance(x, list) else "")
def test_a_mistake_gets_one_line_with_the_remedy_and_exit_code_2(
        bad, monkeypatch, capsys, flags, complaint):
    monkeypatch.chdir(bad)
    before = {p for p in bad.rglob("*")}
    code, err = run_main(capsys, *flags)
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert code == 2 and len(lines) == 1 and re.search(complaint, lines[0]), err
    assert {p for p in bad.rglob("*")} == before

def test_prompt_files_of_any_length_work(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeffsnoring\r\n# comment\r\nwind  blowing\r\n  snoring \r\n".encode())
    assert clap_ppo.split_prompts(config("--prompts", str(file))) == (
        ["snoring", "wind blowing"], [])
    file.write_text("\n".join(f"wind {i}" for i in range(8)))
    train, held_out = clap_ppo.split_prompts(config("--prompts", str(file)))
    assert held_out == ["wind 3", "wind 7"] and len(train) == 6 and not set(train) & set(held_out)
    (tmp_path / "eval_mine.txt").write_text("rain\n")
    assert clap_ppo.split_prompts(config("--prompts", str(file)))[1] == ["rain"]

def test_a_single_prompt_trains_and_is_played_itself(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("snoring\n")
    flags = ["--prompts", tmp_path / "one.txt", *TINY, "--epochs", 1, "--out", tmp_path / "run"]
    assert clap_ppo.main([str(flag) for flag in flags]) == 0
    out = capsys.readouterr().out
    assert "1 training, 0 held-out prompts" in out and "training prompts: reward" in out

def test_what_the_model_cannot_take_in_is_said_before_the_run(world, capsys):
    """The part of a prompt that is cut, and words that the toy never heard."""
    long = "water flows then wind blowing then snoring then birds chirp then " * 8 + "helicopter"
    clap_ppo.check_prompts(world.pipeline, ["snoring", "a Xylophone plays", long])
    cut, unknown = capsys.readouterr().err.splitlines()
    assert "helicopter" in cut and "cut to" in cut and "snoring then" in cut
    assert all(w in unknown for w in ("helicopter, plays, xylophone", "--preset audioldm"))
    clap_ppo.check_prompts(world.pipeline, TRAIN_PROMPTS + HELD_OUT)
    assert capsys.readouterr().err == ""

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

def play_snippet(run: Path, folder: Path, monkeypatch, noise: torch.Tensor) -> dict:
    """The first held-out clip from given noise by adapter/load.py, run as it stands in a stock
    pipeline that knows nothing of this script; and by the same pipeline without the adapter."""
    monkeypatch.chdir(folder)
    script = (run / "adapter/load.py").read_text()
    cfg = json.loads((run / "config.json").read_text())
    heard = {}
    for side, code in (("fine-tuned", script), ("original", re.sub("peft.Peft.*", "", script))):
        names = {"__file__": str(run / "adapter/load.py")}
        exec(code, names)
        assert (folder / "tuned.wav").exists() and "clap_ppo" not in code
        heard[side] = names["pipe"](
            HELD_OUT[0], latents=noise, num_inference_steps=5, audio_length_in_s=2.56,
            guidance_scale=cfg["eval_guidance"]).audios[0]
    return heard

def test_the_adapter_gives_the_tuned_clips_in_a_plain_pipeline(finished_run, tmp_path, monkeypatch):
    """From the same noise it sings what the run's clips sing. (PCM has steps of 3e-5.)"""
    import soundfile
    noise = torch.randn(4 * len(HELD_OUT), 8, 16, 8, generator=seeded(999))[:1]
    heard = play_snippet(finished_run.folder, tmp_path, monkeypatch, noise)
    for side, audio in heard.items():
        saved, _ = soundfile.read(finished_run.folder / f"clips/000-{side}.wav")
        np.testing.assert_allclose(np.clip(audio, -1, 1), saved, rtol=0, atol=2e-4)
    assert np.abs(heard["fine-tuned"] - heard["original"]).max() > 5e-4

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
               for f in dataclasses.fields(clap_ppo.Config) if f.type is not bool)
    assert doctest.testmod(clap_ppo).failed == 0

def test_the_script_and_requirements_name_the_same_packages():
    block = re.search(r"# /// script\n(.*?)# ///\n", (HERE / "clap_ppo.py").read_text(), re.S)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    lines = [line.split("#")[0].strip() for line in open(HERE / "requirements.txt")]
    assert {*metadata["dependencies"], "pytest>=8"} == {*lines} - {""}

README = (HERE / "README.md").read_text()

def test_the_documented_commands_and_python_blocks_work(prompt_file, tmp_path):
    """The README's Python runs in an empty folder, with a small budget."""
    lines = re.findall(r"^\s*python clap_ppo\.py\b.*$", README + clap_ppo.__doc__, flags=re.M)
    for arguments in (shlex.split(line, comments=True)[2:] for line in lines):
        assert "--resume" in arguments or clap_ppo.parse_args(arguments)
    step, loud = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    budget = [*TINY, "--epochs", "1", "--eval-prompts",
              str(prompt_file.with_name("eval_prompts.txt"))]
    loud = loud.replace('"--epochs", "5"', ", ".join(map(repr, budget)))
    loud = loud.replace("sqrt()", "sqrt() + 100")
    for code, shown in ((step, r"tensor\(\[-?\d.*\]\)"), (loud, "reward 100")):
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
             "--noises", str(clap_ppo.EVAL_NOISES)]
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
    world = painter_world()
    world.held_out, world.pipeline.name_or_path = NASTY, "a/model"
    clips = torch.zeros(len(NASTY), 1, 40960), torch.zeros(len(NASTY), 1)
    monkeypatch.setattr(clap_ppo, "play", lambda *args: clips)
    clap_ppo.finish(world, tmp_path, clap_ppo.adapter_state(world.unet))
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
    save_as_official(file, clap_ppo.build_clap("HTSAT-tiny"))
    yield file
    file.unlink()

@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["audioldm", "audioldm2"])
def test_real_architectures_run_from_their_folders(
        family, dtype, real_checkpoint, prompt_file, tmp_path, monkeypatch, capsys):
    """With the full-size CLAP. Resumed, the adapter has the same bytes; a broken replay stops it;
    in a stock pipeline of float32 the adapter gives the tuned clip."""
    import soundfile
    {"audioldm": small_audioldm, "audioldm2": small_audioldm2}[family](tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.setattr(clap_ppo, "WARMUP_UPDATES", 1)
    monkeypatch.setattr(clap_ppo, "EVAL_NOISES", 1)
    flags = ["--prompts", prompt_file, "--preset", family, "--model", tmp_path / "model", "--clap",
             real_checkpoint, *TINY, "--dtype", dtype, "--seconds", "2.56", "--learning-rate",
             "0.02", "--noise-until", "0.4", "--clip-range", "1e-5"]  # x 16 for D = 1,024
    assert run_main(capsys, *flags, "--epochs", 2, "--out", tmp_path / "run")[0] == 0
    adapter, rows, _ = results(tmp_path / "run")
    for row in rows:
        assert row["approx_kl"] > 0 and row["reward_spread"] > 0
        assert row["ratio_error"] <= (1e-6 if dtype == "float32" else 1e-4)
    world = clap_ppo.load_world(clap_ppo.parse_args(["--resume", str(tmp_path / "run")])[0])
    world.condition = {k: v * 100 if torch.is_tensor(v) and v.is_floating_point() else v
                       for k, v in world.condition.items()}      # random weights hardly hear it
    for fault in FAULTS:
        with pytest.raises(UserError, match="on-policy check"):
            replay_broken(world, fault, dtype)
    real, calls = clap_ppo.score, []

    def interrupted(*args):                      # in the second epoch
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(clap_ppo, "score", interrupted)
    assert run_main(capsys, *flags, "--epochs", 2, "--out", tmp_path / "cut")[0] == 130
    assert run_main(capsys, "--resume", tmp_path / "cut")[0] == 0
    assert results(tmp_path / "cut")[0] == adapter
    if dtype == "bfloat16":
        return
    noise = torch.randn(len(HELD_OUT), 8, 16, 8, generator=seeded(999))[:1]
    heard = play_snippet(tmp_path / "run", tmp_path, monkeypatch, noise)
    for side, other in (("fine-tuned", "original"), ("original", "fine-tuned")):
        saved, _ = soundfile.read(tmp_path / f"run/clips/000-{side}.wav")
        assert np.abs(np.clip(heard[side], -1, 1) - saved).max() < 1e-3
        assert np.abs(np.clip(heard[other], -1, 1) - saved).max() > 1e-3

def test_the_conditions_of_audioldm2_do_not_depend_on_the_batch(tmp_path):
    small_audioldm2(tmp_path / "model")
    pipe = clap_ppo.load_pipeline(str(tmp_path / "model"))
    alone, nothing = clap_ppo.encode_prompts(pipe, ["snoring"])
    both, _ = clap_ppo.encode_prompts(pipe, ["snoring", "a dog barking then a lion roaring"])
    assert torch.equal(alone["encoder_hidden_states"], both["encoder_hidden_states"][:1])
    length = alone["encoder_attention_mask_1"].shape[1]
    assert both["encoder_attention_mask_1"].sum(dim=1).tolist()[0] == length
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
    clap_ppo.load_clap(clap_ppo.PRESETS["audioldm"]["clap"], clap.tokenizer)
    assert asked == [("lukewys/laion_clap", "630k-audioset-best.pt")]
