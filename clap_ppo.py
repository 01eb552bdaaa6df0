# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11,<2.15", "torchaudio>=2.11,<2.12", "torchvision>=0.26,<0.29.2", "tqdm>=4.66",
#     "diffusers>=0.41,<0.43", "transformers>=5.17,<6", "laion-clap==1.1.7", "peft>=0.21,<0.22",
#     "accelerate>=1.10", "soundfile>=0.12", "matplotlib>=3.8",
# ]
# [tool.uv]
# override-dependencies = ["numpy>=2"]   # laion-clap's numpy<2 has no wheels for Python 3.13
# ///
r"""Fine-tune a text-to-audio diffusion model with PPO, so that you hear what you asked for.

    python clap_ppo.py --prompts samples/prompts.txt              # the bundled toy model, on a CPU
    python clap_ppo.py --resume runs/seed-0                       # go on where that run stopped
    python clap_ppo.py --prompts prompts.txt --model cvssp/audioldm2 --eval-guidance 3.5 \
        --clap lukewys/laion_clap/630k-audioset-best.pt --seconds 5.12 --num-steps 20 \
        --learning-rate 1e-4 --micro-batch 8                      # a real model, on one GPU

A diffusion model turns noise x_T into a clip x_0 in T denoising steps. Its x are latents: small
tensors into which an autoencoder packs a mel spectrogram (loudness by time and pitch), from which a
vocoder makes sound. DDIM with noise makes each step a draw from a Gaussian, x_{t-1} ~ N(mean(x_t,
prompt), sigma_t^2). So the sampler is a stochastic policy, a step its action, and the probability
of an action is known: all that policy gradients need. The reward comes at the end: CLAP, two
networks trained to embed a sound and its caption alike, says how well they match. One epoch:

    STEP 1  choose P prompts, and for each the few steps in which noise is added
    STEP 2  roll out K clips per prompt; keep x_t and x_{t-1} of the noisy steps
    STEP 3  decode the clips to sound and score them with CLAP
    STEP 4  advantage: how much better a clip is than the other clips of the same prompt
    STEP 5  clipped PPO on the shuffled table of (clip, step) rows
    STEP 6  log and checkpoint; every few epochs, score plain DDIM clips of held-out prompts

Part I is the method, from one denoising step to the loop; part II what it needs. Notation: latents
= x_t (B, C, H, W), alpha_bar_t = the cumulative product of DDPM (DDIM's paper writes alpha_t),
P prompts, K clips per prompt, B = P * K, T steps, R rows of the table, D = C * H * W elements.

Where this differs from DDPO (Black et al. 2023), and why:
    1. The K clips of a prompt start from one x_T: its luck need not enter the advantage.
    2. Noise is added in three early steps, where it is decided which sounds there will be; the
       others are plain DDIM. Textbook: `--noise-window 10 --noise-until 1 --starting-noise own`.
    3. Advantages use the statistics of this epoch's K clips of the prompt, no running buffer.
    4. The policy is trained without classifier-free guidance, at half the cost.
    5. The last step is sampled but not trained: its sigma is so small that its log-prob is noise.
    6. Old log-probs are computed anew in the batches of the update, so the ratio begins at 1.

References: DDIM, Song et al. 2021 (arXiv 2010.02502). DDPO, Black et al. 2023 (2305.13301). PPO,
Schulman et al. 2017 (1707.06347). CLAP, Wu et al. 2023 (2211.06687). LoRA, Hu et al. 2021
(2106.09685). Noise windows: MixGRPO (2507.21802); shared noise: DanceGRPO (2505.07818).
"""

import argparse
import dataclasses
import html
import inspect
import io
import json
import math
import re
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Callable

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

# ################################### Part I: the method ###################################
# ==== 1. A denoising step is a Gaussian (sections 1 and 2 need torch only: copy them) ====
def ddim_schedule(scheduler, num_steps: int) -> tuple:
    """T steps of diffusers' DDIM scheduler, most noise first: timesteps (T,) for the network;
    alpha_bar_t, alpha_bar_prev (T, 1, 1, 1), the shares of signal power in x_t and x_{t-1}.
    """
    scheduler.set_timesteps(num_steps)  # its spacing, steps_offset, set_alpha_to_one count
    timesteps = scheduler.timesteps.cpu().long()
    # As in diffusers, the step from t arrives at t - 1000 // T, for 1000 training steps. That is
    # not always the next element of `timesteps`: 7 steps do not divide 1000.
    previous = timesteps - scheduler.config.num_train_timesteps // num_steps
    alpha_bar = scheduler.alphas_cumprod.float().view(-1, 1, 1, 1)
    # The last step arrives below 0. With set_alpha_to_one that means no noise at all, and sigma 0;
    # AudioLDM's scheduler arrives at the first training step's little noise instead.
    alpha_bar_prev = alpha_bar[previous.clamp(min=0)]
    alpha_bar_prev[previous < 0] = scheduler.final_alpha_cumprod.float()
    return timesteps, alpha_bar[timesteps], alpha_bar_prev

def ddim_sigma(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, eta) -> Tensor:
    """Standard deviation of the noise that a step adds (DDIM, Eq. 16)."""
    # sigma = eta sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev)
    # eta 0 is plain DDIM, eta 1 adds as much noise as DDPM; a tensor gives each row its own.
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    return eta * variance.sqrt()

def ddim_mean(noise_pred: Tensor, latents: Tensor, alpha_bar_t: Tensor, alpha_bar_prev: Tensor,
              sigma: Tensor) -> Tensor:
    """Mean (B, C, H, W) of x_{t-1} given x_t (DDIM, Eq. 12), in float32.

    noise_pred, latents (B, C, H, W); the others tensors, scalar or (B, 1, 1, 1).
    """
    # Whatever the network ran in, this is float32: rounding x_t to bfloat16 moves the ratio by 6e-4
    # at the last trained step (2e-5 at early ones), and PPO clips at 1e-4.
    eps, x_t = noise_pred.float(), latents.float()
    # x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, solved for x_0
    x_0 = (x_t - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()
    # mean = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - sigma^2) eps: less noise than in x_t, in its
    # direction; the missing variance, sigma^2, will be drawn anew. The clamp: rounding at eta 1.
    variance_left = (1 - alpha_bar_prev - sigma ** 2).clamp(min=0)
    return alpha_bar_prev.sqrt() * x_0 + variance_left.sqrt() * eps

def gaussian_log_prob(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Log-density (B,) of x under N(mean, sigma^2), in nats (natural log) per latent element.

    x, mean (B, ...) float32; sigma a scalar or (B, 1, ...), above 0. Here it is -log(2 pi) / 2:
    >>> gaussian_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor(1.0))
    tensor([-0.9189])
    """
    if not (sigma > 0).all():  # what plain DDIM does has no density, only certainty
        raise ValueError("sigma is 0 (eta 0, or the last step with set_alpha_to_one)")
    # log N = -(x - mean)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2, for each element
    log_prob = -(x - mean) ** 2 / (2 * sigma ** 2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    # The mean over the D elements, not their sum. A sum grows with D, 1,024 for the toy's clips and
    # 16,384 for AudioLDM's of 5.12 s, and with it what a clip range means. exp(difference of means)
    # is the D-th root of the true ratio: GSPO's length-normalised ratio (Zheng et al. 2025).
    return log_prob.flatten(1).mean(1)

def gaussian_kl(mean: Tensor, mean_base: Tensor, sigma: Tensor) -> Tensor:
    """KL (B,) of two Gaussians of equal sigma, in nats per latent element; arguments as above."""
    # ||mean - mean_base||^2 / (2 sigma^2): exact, where approx_kl below is an estimate.
    return ((mean - mean_base) ** 2 / (2 * sigma ** 2)).flatten(1).mean(1)

# ==== 2. Advantage and loss ====
def group_advantages(rewards: Tensor, floor: float = 0.1) -> Tensor:
    """How much better each clip is than the other clips of its prompt, in standard deviations.

    (P, K) rewards of K clips for each of P prompts -> (P, K); smaller deviations count as `floor`.
    >>> group_advantages(torch.tensor([[1, 2, 3], [7, 7, 7]]))
    tensor([[-1.2247,  0.0000,  1.2247],
            [ 0.0000,  0.0000,  0.0000]])
    """
    # Among the clips of one prompt, since prompts differ in difficulty by more than their clips do:
    # with one mean for all, whatever an easy prompt gave would be reinforced, bad clips included.
    # (PPO for games trains a second network, the critic, to guess this mean.)
    centred = rewards - rewards.float().mean(1, keepdim=True)  # (P, K) - (P, 1)
    std = centred.square().mean(1, keepdim=True).sqrt()  # of these K, not K - 1
    # Clips that are all nearly alike say little, but divided by a tiny deviation their differences,
    # CLAP's noise, would count as much as those between a right and a wrong clip: hence the floor.
    return centred / std.clamp(min=floor)

def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor,
             clip_range: float) -> tuple:
    """Clipped surrogate loss of PPO (Schulman et al. 2017, Eq. 7), scalar, and a dict to log.

    log_prob, old_log_prob, advantages (B,), log-probs in nats per latent element.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()             # pi_new / pi_old, 1 before the first update
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    # Advantage > 0: raising the ratio pays until 1 + clip_range, then the gradient is 0. Below 0:
    # lowering it pays until 1 - clip_range. The minimum is the pessimistic of both: a row that
    # moved the *wrong* way, a good action that became rare, keeps its gradient.
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        # KL(old, new) = E_old[-log ratio]; adding ratio - 1, whose mean is 0, makes every term
        # non-negative (Schulman 2020, joschu.net/blog/kl-approx.html). expm1: at a log-ratio of
        # 1e-4 float32 would lose the 5e-9 that is left of the difference.
        approx_kl = (torch.expm1(log_ratio) - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip_range).float().mean()
    return loss, {"approx_kl": approx_kl, "clip_fraction": clip_fraction}

# ==== 3. Settings ====
# What nobody needs to turn. What one may want to turn is a field of Config, and so a flag.
ETA = 1.0               # noise of a noisy step in units of DDPM's; with less, less is explored
WARMUP_UPDATES = 10     # Adam's first steps have size lr in every weight, so lr rises from 0
MAX_GRAD_NORM = 1.0     # an emergency brake: healthy norms are a hundred times smaller
REPLAY_LIMIT = 0.06     # difference of rollout and replay on a GPU, times 1 / sqrt(D)
EVAL_EVERY = 20         # epochs between scores of held-out prompts, and between snapshots
EVAL_CLIPS = 2          # clips of each held-out prompt, always of the same noises
SAME = 0.1              # a prompt whose reward changed by less is called neither better nor worse
HERE = Path(__file__).resolve().parent

class UserError(ValueError):
    """A mistake of the caller's or of the environment: printed as one line, exit code 2."""

@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. A field is a flag, --num-steps 20; `--help` prints this class."""
    prompts: str = "prompts.txt"    # one training prompt per line; # starts a comment
    eval_prompts: str = ""          # held-out ones; else those of eval_FILE beside it, or a quarter
    out: str = ""                   # folder of the run, new or empty; else runs/seed-SEED
    model: str = "samples/toy/pipeline"  # AudioLDM or AudioLDM2: folder or hub id
    clap: str = "samples/toy/clap.pt"  # laion-clap file, or OWNER/REPO/FILE of the hub
    seconds: float = 2.56           # length of a clip; at most 10, CLAP hears no more
    num_steps: int = 10             # T, denoising steps per clip; usual: 10 to 50
    noise_window: int = 3           # consecutive noisy steps per clip
    noise_until: float = 0.3        # they lie in this first part of the steps
    starting_noise: str = "shared"  # x_T of a prompt's clips: shared, or each its own
    eval_guidance: float = 1.0      # guidance of the clips that are compared; 1: none
    epochs: int = 80                # rounds of rollout and update
    prompts_per_epoch: int = 16     # P
    clips_per_prompt: int = 8       # K, clips compared with each other; at best 8 or more
    updates_per_epoch: int = 4      # optimiser steps, each on its share of the rows
    learning_rate: float = 4e-3     # Adam's; 1e-4 is usual for a real model
    # How far one epoch may move the policy: an action whose log-prob moved further has no gradient.
    # In nats per latent element for Stable Diffusion's 4 x 64 x 64 = 16,384; 1e-4, DDPO's own, is
    # a factor of 5 for an action. Scaled by 16,384 / D, to 1.6e-3 for the toy. Usual: 1e-5 to 1e-3.
    clip_range: float = 1e-4
    kl_weight: float = 0.0          # pulls back to the base model; usual: 0 to 0.1
    lora_rank: int = 8              # rank of the adapter's weight updates
    micro_batch: int = 128          # rows per network call: memory, never the result
    dtype: str = "auto"             # of the U-Net: float32, bfloat16, float16; auto: by device
    seed: int = 0                   # of everything random

    def __post_init__(self):
        check_settings(self)

@dataclasses.dataclass
class Setup:
    """All that a run works with; `load_setup` in part II makes it."""
    cfg: Config
    prompts: list          # training prompts, then held-out ones; a prompt's id is its place
    num_train: int         # how many of them are training prompts
    condition: dict        # the U-Net's keyword tensors: N prompts, then N times the empty one
    pipeline: object       # the stock diffusers pipeline, whose VAE and vocoder decode
    reward: Callable       # (waveforms (N, samples), sample_rate, prompts) -> (N,)
    reward_name: str
    unet: nn.Module        # the policy: the pipeline's U-Net with an adapter (LoRA)
    optimizer: object      # AdamW on the adapter's weights
    scaler: object         # GradScaler of a float16 U-Net; else it does nothing
    schedule: list         # timesteps, alpha_bar_t, alpha_bar_prev, T rows each
    latent_shape: tuple    # (C, H, W)
    sample_rate: int       # of the waveforms, in Hz
    device: torch.device
    dtype: torch.dtype     # of the U-Net; all else is float32

# ==== 4. The policy acts: rollout ====
def take(rows: dict, at: Tensor) -> dict:
    """The rows `at` (indices or a mask) of a table, which is a dictionary of tensors (R, ...)."""
    return {name: column[at] for name, column in rows.items()}

def policy(setup: Setup, rows: dict, eta) -> tuple:
    """The Gaussian of each row's x_{t-1}: mean (R, C, H, W) and sigma (R, 1, 1, 1).

    rows: "latents" x_t (R, C, H, W), "step" (place in the schedule), "prompt_id", "input_id" (R,),
    equal where x_t, step and prompt are. eta: a number or (R, 1, 1, 1).
    """
    # The U-Net is asked once for all rows that would ask it the same: `one_of_each` picks any of
    # them, `back` hands its answer to all. Rollout and update both come through here.
    distinct, back = rows["input_id"].unique(return_inverse=True)
    one_of_each = torch.empty_like(distinct)
    one_of_each[back] = torch.arange(len(back), device=setup.device)
    answers = []
    for at in one_of_each.split(setup.cfg.micro_batch):
        asked = take(rows, at)
        timesteps = setup.schedule[0][asked["step"]]
        condition = take(setup.condition, asked["prompt_id"])
        # Only the network runs in half precision, if at all.
        with torch.autocast(setup.device.type, setup.dtype, setup.dtype != torch.float32):
            answers.append(setup.unet(asked["latents"], timesteps, **condition).sample)
    noise_pred = torch.cat(answers)[back]
    alpha_bar_t = setup.schedule[1][rows["step"]]
    alpha_bar_prev = setup.schedule[2][rows["step"]]
    sigma = ddim_sigma(alpha_bar_t, alpha_bar_prev, eta)
    return ddim_mean(noise_pred, rows["latents"], alpha_bar_t, alpha_bar_prev, sigma), sigma

def randn(setup: Setup, rows: int, generator: Generator) -> Tensor:
    """Noise (rows, C, H, W), drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(rows, *setup.latent_shape, generator=generator).to(setup.device)

def choose_prompts(setup: Setup, generator: Generator) -> tuple:
    """STEP 1: the ids of P prompts (P,), and the first noisy step (P,) of each one's clips."""
    cfg, P = setup.cfg, setup.cfg.prompts_per_epoch
    order = torch.randperm(setup.num_train, generator=generator)
    prompt_ids = order.repeat(math.ceil(P / len(order)))[:P]  # repeats, if there are too few
    # A window of W steps begins at 0 ... end - W; the last step is in it only if all steps are.
    end = min(cfg.num_steps - 1, round(cfg.noise_until * cfg.num_steps))
    first_noisy = torch.randint(max(1, end - cfg.noise_window + 1), (P,), generator=generator)
    return prompt_ids.to(setup.device), first_noisy.to(setup.device)

@torch.no_grad()
def rollout(setup: Setup, prompt_ids: Tensor, first_noisy: Tensor,
            generator: Generator) -> tuple:
    """STEP 2: K clips for each of P prompts, with noise in the window that begins at first_noisy.

    Returns the finished latents (B, C, H, W), group by group, and the table of R noisy steps: what
    `policy` takes, "next_latents" x_{t-1}, their "log_prob" and "clip_id", the place in latents.
    """
    # One prompt with K = 3 clips and T = 4 steps, of which step 1 is noisy:
    #   step 0   x_T is one for all three: the U-Net is asked once, all three go to the mean
    #   step 1   x_t is still one, the U-Net is asked once; three draws around the mean are three
    #            actions: three rows of the table, equal in x_t and input_id, different in x_{t-1}
    #   step 2 and 3   three different x_t: three questions, each goes to its own mean; no rows
    cfg, K = setup.cfg, setup.cfg.clips_per_prompt
    prompt_ids = prompt_ids.repeat_interleave(K)                # (P,) -> (B,)
    first_noisy = first_noisy.repeat_interleave(K)
    clip_ids = torch.arange(len(prompt_ids), device=setup.device)
    start_ids = clip_ids                # until noise parts them, clips of one start are one
    if cfg.starting_noise == "shared":
        start_ids = clip_ids - clip_ids % K                     # the group's first clip
    latents = randn(setup, len(clip_ids), generator)[start_ids]         # x_T
    table = []
    for step in range(cfg.num_steps):
        input_ids = torch.where(step <= first_noisy, start_ids, clip_ids)
        rows = {"latents": latents, "step": torch.full_like(clip_ids, step),
                "prompt_id": prompt_ids, "clip_id": clip_ids,
                "input_id": input_ids + step * len(clip_ids)}   # no two steps share one
        noisy = (first_noisy <= step) & (step < first_noisy + cfg.noise_window)
        mean, sigma = policy(setup, rows, ETA * noisy.view(-1, 1, 1, 1))
        # The action. Where sigma is 0 there is no choice: plain DDIM goes to the mean.
        latents = mean + sigma * randn(setup, len(clip_ids), generator)
        rows["next_latents"] = latents
        if step < cfg.num_steps - 1:    # the last step is not trained
            rows, mean, sigma = take(rows, noisy), mean[noisy], sigma[noisy]
            rows["log_prob"] = gaussian_log_prob(rows["next_latents"], mean, sigma)
            table.append(rows)
    return latents, {name: torch.cat([rows[name] for rows in table]) for name in table[0]}

# ==== 5. The policy learns: update ====
def replay(setup: Setup, rows: dict) -> tuple:
    """Log-prob (R,), mean and sigma of recorded actions under today's weights."""
    mean, sigma = policy(setup, rows, ETA)
    return gaussian_log_prob(rows["next_latents"], mean, sigma), mean, sigma

def check_on_policy(setup: Setup, difference: Tensor) -> float:
    """Root mean square of replayed minus rolled-out log-probs (R,); UserError if too large."""
    # The cheapest bug detector there is: nothing was learned since the rollout, so its replay must
    # give the same log-probs. On a CPU it does. A GPU's other kernels, in TF32 or bfloat16, are off
    # by 1 % of the output: 0.01 to 0.04 / sqrt(D), more in late steps. Bugs: 0.004 at any D.
    error = difference.square().mean().sqrt().item()
    limit = REPLAY_LIMIT / math.sqrt(math.prod(setup.latent_shape))
    if setup.device.type == "cpu" and setup.dtype == torch.float32:
        limit = 1e-6
    if not error <= limit:              # NaN is not
        raise UserError(
            f"on-policy check: rollout and replay differ by {error:.1e}, limit {limit:.1e}. "
            "Usual causes: dropout (not in eval mode), another timestep, another row's "
            "prompt, moved weights, half precision; if barely more, TF32 or GPU kernels")
    return error

def optimizer_step(setup: Setup, number: int) -> float:
    """Step `number` of the run, from 0, on the gradients that have added up; their norm."""
    cfg, optimizer, scaler = setup.cfg, setup.optimizer, setup.scaler
    # The rate rises while Adam's averages are young, then falls to 0, or CLAP's noise is learned.
    left, group = 1 - number / (cfg.epochs * cfg.updates_per_epoch), optimizer.param_groups[0]
    group["lr"] = cfg.learning_rate * min((number + 1) / WARMUP_UPDATES, left)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM).item()
    # float16 overflows now and then: the scaler skips that step and halves its scale. With nothing
    # left to halve it is a fault: one NaN in Adam's state would stay there.
    if not math.isfinite(norm) and scaler.get_scale() <= 1:
        raise UserError("the gradient is not finite: lower --learning-rate")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm

def update(setup: Setup, rows: dict, epoch: int, generator: Generator) -> dict:
    """STEP 5: clipped PPO on the R rows of `rollout`, with "advantage"; returns what to log."""
    cfg, count = setup.cfg, len(rows["step"])
    clip_range = cfg.clip_range * 16384 / math.prod(setup.latent_shape)
    order = torch.randperm(count, generator=generator).to(setup.device)
    minibatches = order.tensor_split(cfg.updates_per_epoch)
    # pi_old is the policy as it is now, asked in the very micro-batches of the update, so that the
    # ratio is exactly 1 at the first one. The log-probs of the rollout would not do: its batches
    # had other shapes, so on a GPU other kernels answered, with rounding as large as clip_range.
    rows["old_log_prob"], rows["mean_base"] = rows["log_prob"].clone(), rows["latents"].clone()
    with torch.no_grad():
        for minibatch in minibatches:
            for at in minibatch.split(cfg.micro_batch):
                rows["old_log_prob"][at] = replay(setup, take(rows, at))[0]
                if cfg.kl_weight:
                    with setup.unet.disable_adapter():  # where the base model would go
                        rows["mean_base"][at] = replay(setup, take(rows, at))[1]
    error = check_on_policy(setup, rows["old_log_prob"] - rows["log_prob"])
    log = {"replay_error": error, "grad_norm": 0.0}
    for i, minibatch in enumerate(minibatches):
        for at in minibatch.split(cfg.micro_batch):
            part = take(rows, at)
            log_prob, mean, sigma = replay(setup, part)
            loss, info = ppo_loss(log_prob, part["old_log_prob"], part["advantage"], clip_range)
            if cfg.kl_weight:
                info["kl_base"] = gaussian_kl(mean, part["mean_base"], sigma).mean()
                loss = loss + cfg.kl_weight * info["kl_base"]
            # Gradients add up to that of the minibatch's mean. The micro-batch costs memory and
            # time, and changes nothing else. (Several GPUs would add up theirs here, too.)
            setup.scaler.scale(loss * len(at) / len(minibatch)).backward()
            info["loss"] = loss
            for name, value in info.items():                    # means over all rows
                log[name] = log.get(name, 0) + value.detach() * len(at) / count
        norm = optimizer_step(setup, epoch * cfg.updates_per_epoch + i)
        if math.isfinite(norm):                                 # or the scaler skipped the step
            log["grad_norm"] = max(log["grad_norm"], norm)
    return {name: float(value) for name, value in log.items()}

# ==== 6. The loop ====
def train(setup: Setup, run: Path, metrics: list) -> None:
    """The PPO loop, from the epoch after the last one in `metrics`, a list of one row per epoch."""
    cfg, done = setup.cfg, len(metrics)
    for epoch in tqdm(range(done, cfg.epochs), initial=done, total=cfg.epochs, disable=None):
        began = time.time()
        # Random numbers belong to the epoch, not to the process: a resumed run repeats them.
        generator = Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
        prompt_ids, first_noisy = choose_prompts(setup, generator)              # STEP 1
        latents, rows = rollout(setup, prompt_ids, first_noisy, generator)      # STEP 2
        _, rewards = score_clips(setup, latents, prompt_ids)                    # STEP 3
        advantages = group_advantages(rewards)                                  # STEP 4
        # The reward comes at the end, for a whole clip: all its noisy steps share the advantage.
        rows["advantage"] = advantages.flatten().to(setup.device)[rows["clip_id"]]
        info = update(setup, rows, epoch, generator)                            # STEP 5
        row = {"epoch": epoch + 1, "reward": rewards.mean().item()} | info      # STEP 6
        metrics.append(row)
        # Which prompts were drawn decides an epoch's reward, but not the mean of the last epochs.
        latest = [r["reward"] for r in metrics[-EVAL_EVERY:]]
        row["reward_mean"] = sum(latest) / len(latest)
        row["reward_spread"] = rewards.std(1).mean().item()
        row["seconds"] = round(time.time() - began, 2)
        if (epoch + 1) % EVAL_EVERY == 0:
            row["eval_reward"] = score_held_out(setup)[1].mean().item()
            snapshot = safetensors.torch.save(adapter_state(setup.unet))
            write_file(run / f"adapter/epoch-{epoch + 1}.safetensors", snapshot)
        save_checkpoint(setup, run, metrics)    # saved before it is shown
        shown = "reward_mean reward_spread approx_kl clip_fraction seconds eval_reward".split()
        text = [f"{name} {row[name]:.3g}" for name in shown if name in row]
        tqdm.write(f"epoch {epoch + 1}/{cfg.epochs}  " + "  ".join(text))
        sys.stdout.flush()

# ############## Part II: what the method needs (a first reader may stop here) ##############
# ==== 7. Prompts ====
def read_prompts(path: str) -> dict:
    """The prompts of a text file, one per line, by what can be heard of them."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # -sig: Windows' mark may lead it
    except (OSError, ValueError) as error:
        raise UserError(f"prompts {path}: {error}; to begin, take samples/prompts.txt")
    prompts = {}
    for line in text.splitlines():
        if re.search(r'^[\[{]|\t\S|,"|^[^\s,]+,\S+$', line):
            raise UserError(f"prompts {path}: {line!r} is CSV or JSON; one prompt a line")
        prompt = " ".join(line.split())
        heard = re.sub(r"[^\w ]", "", prompt.lower())  # "A dog barks." is "a dog barks"
        if heard and not prompt.startswith("#"):
            prompts[heard] = prompt
    if not prompts:
        raise UserError(f"prompts {path}: no prompt in it; write one a line")
    return prompts

def split_prompts(cfg: Config) -> tuple:
    """Training prompts, then held-out ones, none of fewer than 8; how many are for training."""
    train, held_out = read_prompts(cfg.prompts), {}
    beside = Path(cfg.prompts).with_name("eval_" + Path(cfg.prompts).name)
    if cfg.eval_prompts or beside.exists():
        held_out = read_prompts(cfg.eval_prompts or beside)
        for heard in train.keys() & held_out.keys():  # it would show memory, not skill
            raise UserError(f"{train[heard]!r} is trained on and held out: remove one")
    elif len(train) >= 8:
        every = max(4, len(train) // 50)  # a quarter, 50 at most, from all over the file
        for heard in list(train)[every - 1::every][:50]:
            held_out[heard] = train.pop(heard)
    return list(train.values()) + list(held_out.values()), len(train)

# ==== 8. The model: a stock pipeline with a LoRA adapter ====
def bundled(path: str) -> str:
    """What stands under that name beside this script, if anything does; else `path` itself."""
    return str(HERE / path) if (HERE / path).exists() else path

def load_pipeline(model: str, device="cpu"):
    """AudioLDM(2)Pipeline in float32, eval mode; model: a `save_pretrained` folder or a hub id."""
    import torchaudio  # noqa: F401    first: if it is broken, those that import it hide why
    import diffusers
    import transformers
    for library in (diffusers, transformers):  # one line an epoch is talk enough
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    model, parts = bundled(model), {}
    try:
        kind = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
        if kind == "AudioLDM2Pipeline":  # its index names GPT2Model, which cannot generate
            parts["language_model"] = transformers.GPT2LMHeadModel.from_pretrained(
                model, subfolder="language_model")
        elif kind != "AudioLDMPipeline":
            raise ValueError(f"a {kind} is not supported")
        pipeline = getattr(diffusers, kind).from_pretrained(model, dtype=torch.float32, **parts)
        config = pipeline.scheduler.config
        plain = type(pipeline.scheduler) is diffusers.DDIMScheduler
        if not plain or config.clip_sample or config.prediction_type != "epsilon":
            raise ValueError("its scheduler is not plain DDIM that predicts noise")
    except Exception as error:  # whatever a library finds wrong with a folder
        raise UserError(f"--model {model}: no usable folder, nor to be had from the hub; "
                        f"the bundled model needs no network ({str(error)[:200]})")
    if not parts:  # AudioLDM's U-Net does not use it, but asks for it
        pipeline.unet.forward = partial(pipeline.unet.forward, encoder_hidden_states=None)
    pipeline.vae.to(memory_format=torch.channels_last)  # convolutions are faster so
    return pipeline.to(device)  # in eval mode, as `from_pretrained` leaves it

@torch.no_grad()
def encode_prompts(pipeline, prompts: list) -> dict:
    """The U-Net's keyword tensors, 2 N rows: of N prompts, then of the empty one in their place."""
    device = pipeline.unet.device
    if not hasattr(pipeline, "language_model"):
        # AudioLDM: a vector (N, E). By 64 prompts, each padded to 512 tokens; the empty one once.
        labels = []
        for first in range(0, len(prompts), 64):
            labels.append(pipeline._encode_prompt(prompts[first:first + 64], device, 1, False))
        empty = pipeline._encode_prompt(prompts[:1], device, 1, True)[:1]
        labels.append(empty.expand(len(prompts), -1))
        return {"class_labels": torch.cat(labels)}
    # AudioLDM2, one prompt at a time, since its language model hears the padding: T5 states
    # (2, L, E), their mask (2, L), what GPT2 adds (2, 8, E'); 2: the empty prompt and this one.
    names = "encoder_hidden_states_1", "encoder_attention_mask_1", "encoder_hidden_states"
    encoded = [pipeline.encode_prompt(prompt, device, 1, True) for prompt in prompts]
    condition = {}
    for name, pairs in zip(names, zip(*encoded)):
        tensors = [pair[1] for pair in pairs] + [pair[0] for pair in pairs]
        condition[name] = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return condition

# The transformer blocks, and the layers through which an AudioLDM U-Net hears its prompt.
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in",
               "proj_out", "time_emb_proj", "class_embedding"]

def add_lora(unet, rank: int):
    """The U-Net as a `peft.PeftModel` whose only trainable weights are LoRA's (Hu et al. 2021)."""
    from peft import LoraConfig, get_peft_model
    # A layer's matrix W becomes W + B A, with B zero at first: the policy starts as the base model,
    # and is the base model again within `unet.disable_adapter()`.
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS)
    return get_peft_model(unet, lora).eval()

def adapter_state(unet) -> dict:
    """The adapter's weights by peft's names; `peft.set_peft_model_state_dict` puts them back."""
    from peft import get_peft_model_state_dict
    return get_peft_model_state_dict(unet, save_embedding_layers=False)

def load_setup(cfg: Config, prompts: list, num_train: int, reward=None) -> Setup:
    """Everything that a run needs, loaded and checked; `reward` takes the place of CLAP's."""
    device, dtype = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        device, dtype = torch.device("cuda"), torch.bfloat16
        if not torch.cuda.is_bf16_supported(including_emulation=False):  # as on a T4
            dtype = torch.float16
    if cfg.dtype != "auto":
        dtype = getattr(torch, cfg.dtype)
    pipeline = load_pipeline(cfg.model, device)
    # The tokenizer of both families is RoBERTa's, which is CLAP's too; CLAP reads 77 tokens.
    tokenizer, limit = pipeline.tokenizer, min(77, pipeline.tokenizer.model_max_length)
    for ids in tokenizer(prompts)["input_ids"]:
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1:-1])
            print(f"warning: prompt cut to {limit} tokens, lost: {lost!r}", file=sys.stderr)
    reward_name = getattr(reward or clap_reward, "__name__", type(reward).__name__)
    if reward is None:
        reward = partial(clap_reward, load_clap(cfg.clap, tokenizer, device))
    condition = encode_prompts(pipeline, prompts)
    # Every prompt is encoded: the encoders, which may be larger than the U-Net, can go.
    for name in ("text_encoder", "text_encoder_2", "projection_model", "language_model"):
        setattr(pipeline, name, None)
    # The latents' shape, as diffusers computes it; the VAE halves at all of its levels but one.
    vocoder, channels = pipeline.vocoder.config, pipeline.unet.config.in_channels
    frames = int(cfg.seconds / (math.prod(vocoder.upsample_rates) / vocoder.sampling_rate))
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    latent_shape = channels, math.ceil(frames / factor), vocoder.model_in_dim // factor
    torch.manual_seed(cfg.seed)                 # LoRA's A matrices are random
    unet = add_lora(pipeline.unet, cfg.lora_rank)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    schedule = [table.to(device) for table in ddim_schedule(pipeline.scheduler, cfg.num_steps)]
    return Setup(cfg, prompts, num_train, condition, pipeline, reward, reward_name, unet,
                 optimizer, scaler, schedule, latent_shape, vocoder.sampling_rate, device, dtype)

# ==== 9. The reward: CLAP, made dependable ====
# The sizes of LAION's checkpoints, but for those of the audio tower, which is tiny or base.
OFFICIAL = {
    "audio_cfg": {"sample_rate": 48000, "clip_samples": 480000, "window_size": 1024,
                  "hop_size": 480, "mel_bins": 64, "fmin": 50, "fmax": 14000},
    "roberta": {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
                "layer_norm_eps": 1e-5}, "joint_embed_shape": 512}

def build_clap(sizes: dict) -> nn.ModuleDict:
    """CLAP with random weights: an audio and a text tower, each with a projection to one space."""
    from importlib.util import find_spec
    from types import SimpleNamespace
    from transformers import RobertaConfig, RobertaModel
    # `import laion_clap` fetches three tokenizers, and its CLAP class 500 MB of RoBERTa that the
    # checkpoint then replaces. So the audio tower is imported from the package's own folder.
    sys.path.append(find_spec("laion_clap").submodule_search_locations[0])
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    from clap_module.htsat import HTSAT_Swin_Transformer
    audio_cfg, shared = SimpleNamespace(**sizes["audio_cfg"]), sizes["joint_embed_shape"]
    audio = HTSAT_Swin_Transformer(config=audio_cfg, **sizes["htsat"])
    text = RobertaModel(RobertaConfig(**sizes["roberta"]))
    clap = nn.ModuleDict({"audio_branch": audio, "text_branch": text})
    for side, width in (("audio", audio.num_features), ("text", text.config.hidden_size)):
        clap[side + "_projection"] = nn.Sequential(
            nn.Linear(width, shared), nn.ReLU(), nn.Linear(shared, shared))
    clap.audio_cfg = audio_cfg
    return clap.eval()

def load_clap(checkpoint: str, tokenizer, device="cpu") -> nn.ModuleDict:
    """CLAP of a laion-clap checkpoint, a file or OWNER/REPO/FILE; tokenizer: RoBERTa's."""
    import numpy as np
    from huggingface_hub import hf_hub_download
    # A .pt file is a program. Besides weights the official ones hold a numpy scalar and the command
    # line of their training: these types are let in, the scalar by its names in numpy 1 and 2.
    scalar = np.float64(0).__reduce__()[0]
    allowed = [(scalar, "numpy.core.multiarray.scalar"), argparse.Namespace, np.dtype,
               (scalar, "numpy._core.multiarray.scalar"), np.dtypes.Float64DType]
    # What training needed and scoring does not. Any other weight that is left over is an error.
    unused = r"logit_scale|audio_transform|text_transform|text_branch.embeddings.position_ids"
    path, weights = Path(bundled(checkpoint)), {}
    try:
        if not path.is_file():  # fetched once; a download that was cut goes on
            owner, repo, file = checkpoint.split("/", 2)
            path = Path(hf_hub_download(f"{owner}/{repo}", file))
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True)
        for name, weight in state.get("state_dict", state).items():
            name = name.removeprefix("module.")
            if not re.match(unused, name):
                weights[name] = weight
        width = len(weights["audio_branch.patch_embed.proj.weight"])
        depths = [2, 2, 6 if width == 96 else 12, 2]            # HTSAT-tiny, HTSAT-base
        sizes = OFFICIAL | {"htsat": {"embed_dim": width, "depths": depths}}
        if path.with_suffix(".json").exists():  # another CLAP brings its sizes
            sizes = json.loads(path.with_suffix(".json").read_text())
        clap = build_clap(sizes)
        clap.load_state_dict(weights)  # strict: a weight left random would score nonsense
    except Exception as error:
        if any("mel_conv2d" in name for name in weights):
            error = "a fusion checkpoint (mel_conv2d); use one without"
        raise UserError(f"--clap {path}: not found here or on the hub, damaged, of another "
                        f"size, or with code in it: {str(error)[:200]}")
    # Offline, a tokenizer may come without its vocabulary, and then all prompts are one.
    one, other = tokenizer(["a dog barking", "wind blowing"])["input_ids"]
    if one == other:
        raise UserError("--model: its tokenizer has lost its vocabulary")
    clap.tokenizer = tokenizer
    return clap.to(device)

@torch.no_grad()
def clap_reward(clap, waveforms: Tensor, sample_rate: int, prompts: list) -> Tensor:
    """Cosine (N,) of waveforms (N, samples), floats in [-1, 1], and prompts under CLAP, on CPU."""
    import torchaudio
    # (samples,) would be taken for clips of one sample, and int16 is 30,000 times too loud. At the
    # wrong rate, 16 for 16 kHz or 16000 left as it is, CLAP answers without complaint, and wrongly.
    if waveforms.dim() != 2 or not waveforms.is_floating_point() or sample_rate < 8000:
        raise ValueError("not float waveforms (N, samples) and a sample_rate in Hz")
    # One could backpropagate through CLAP, decoder and sampler instead (DRaFT): faster,
    # over-optimises sooner, and only for rewards that have a gradient. PPO takes any.
    length, rate = clap.audio_cfg.clip_samples, clap.audio_cfg.sample_rate
    device, embeds, texts = next(clap.parameters()).device, [], {}
    for x in waveforms.float().clamp(-1, 1).split(16):
        # CLAP hears 10 s at 48 kHz. It learned shorter clips as whole repetitions, then zeros. Of
        # longer ones the package takes a random part, so that no score can be had twice.
        x = torchaudio.functional.resample(x.to(device), sample_rate, rate)
        x = x.repeat(1, max(1, length // x.shape[1]))[:, :length]
        x = F.pad(x, (0, length - x.shape[1]))
        embeds.append(clap["audio_branch"]({"waveform": x}, device=device)["embedding"])
    audio = F.normalize(clap["audio_projection"](torch.cat(embeds)))    # (N, E)
    for prompt in set(prompts):  # alone: others in a batch change the last bits
        tokens = clap.tokenizer([prompt], padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt").to(device)
        text = clap["text_branch"](tokens["input_ids"], tokens["attention_mask"])
        texts[prompt] = F.normalize(clap["text_projection"](text.pooler_output))[0]
    text = torch.stack([texts[prompt] for prompt in prompts])                   # (N, E)
    return (audio * text).sum(1).cpu()

# ==== 10. Clips: decoded, scored, compared before and after ====
@torch.no_grad()
def decode(setup: Setup, latents: Tensor) -> Tensor:
    """Waveforms (B, samples) in [-1, 1] on the CPU of finished latents: VAE, then vocoder."""
    pipeline, waveforms = setup.pipeline, []
    for chunk in latents.split(4):  # a vocoder's activations are large: slower by eights
        mel = pipeline.vae.decode(chunk / pipeline.vae.config.scaling_factor).sample
        waveforms.append(pipeline.mel_spectrogram_to_waveform(mel))
    samples = int(setup.cfg.seconds * setup.sample_rate)
    return torch.cat(waveforms)[:, :samples].clamp(-1, 1)

def score_clips(setup: Setup, latents: Tensor, prompt_ids: Tensor) -> tuple:
    """STEP 3: waveforms (P * n, samples) and rewards (P, n) of n finished clips of P prompts."""
    waveforms, prompts = decode(setup, latents), []
    for prompt_id in prompt_ids.tolist():
        prompts += [setup.prompts[prompt_id]] * (len(latents) // len(prompt_ids))
    found = setup.reward(waveforms, setup.sample_rate, prompts)
    try:
        rewards = torch.as_tensor(found).detach().float().cpu().view(len(prompts))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"the reward {setup.reward_name} returned "
                        f"{getattr(found, 'shape', type(found))}, not {len(prompts)} numbers")
    for prompt, reward in zip(prompts, rewards):
        if not reward.isfinite():  # through the advantage it would reach every weight
            raise UserError(f"the reward of a clip of {prompt!r} is not finite")
    return waveforms, rewards.view(len(prompt_ids), -1)

@torch.no_grad()
def score_held_out(setup: Setup, clips: int = EVAL_CLIPS, seed: int = 999) -> tuple:
    """Waveforms (M * n, samples), rewards (M, n): n plain DDIM clips of each held-out prompt."""
    # The same seed is the same noise. `first` is 0, and all prompts are taken, if none is held out.
    scale, first = setup.cfg.eval_guidance, setup.num_train % len(setup.prompts)
    eval_ids = torch.arange(first, len(setup.prompts), device=setup.device)
    ids = eval_ids.repeat_interleave(clips)
    generator = Generator().manual_seed(setup.cfg.seed + seed)
    rows = {"latents": randn(setup, len(ids), generator), "prompt_id": ids}
    rows["input_id"] = torch.arange(len(ids), device=setup.device)
    for step in range(setup.cfg.num_steps):
        rows["step"] = torch.full_like(ids, step)
        mean, _ = policy(setup, rows, 0.0)
        # Classifier-free guidance (Ho & Salimans 2022) exaggerates what the prompt changes. Usually
        # it is applied to noise predictions; the mean of plain DDIM is linear in them.
        if scale != 1:
            empty = rows | {"prompt_id": ids + len(setup.prompts)}
            mean_of_empty, _ = policy(setup, empty, 0.0)
            mean = mean_of_empty + scale * (mean - mean_of_empty)
        rows["latents"] = mean
    return score_clips(setup, rows["latents"], eval_ids)

def finish(setup: Setup, run: Path) -> None:
    """Writes the adapter, before/after clips and a page that plays them; prints what was gained."""
    import soundfile
    setup.unet.peft_config["default"].save_pretrained(run / "adapter")
    weights = safetensors.torch.save(adapter_state(setup.unet))
    write_file(run / "adapter/adapter_model.safetensors", weights)
    with setup.unet.disable_adapter():
        sides = {"original": score_held_out(setup)}
    sides["fine-tuned"] = score_held_out(setup)
    before, after = (rewards.mean(1) for _, rewards in sides.values())
    change, prompts = after - before, setup.prompts[-len(after):]
    page = ("<!doctype html><html lang=en><meta charset=utf-8><title>Before and after</title>"
            "<meta name=viewport content='width=device-width'><style>audio {width: 28vw}</style>"
            "<main><h1>Before and after, with rewards: what changed most first</h1><table>"
            "<tr><th scope=col>prompt<th scope=col>original<th scope=col>fine-tuned")
    for i in change.abs().argsort(descending=True).tolist():
        prompt = html.escape(prompts[i])                # text, never a tag
        page += f"\n<tr><th scope=row>{prompt}"
        for side, (waveforms, rewards) in sides.items():
            name, wav = f"clips/{i:03}-{side}.wav", io.BytesIO()
            first = waveforms[i * rewards.shape[1]].numpy()
            soundfile.write(wav, first, setup.sample_rate, format="WAV")
            write_file(run / name, wav.getvalue())
            page += (f"<td>{rewards[i, 0]:.2f}<br>"
                     f"<audio controls src={name} aria-label='{prompt}, {side}'></audio>")
    page += """
</table></main><script>  // whatever begins to play, all else stops
addEventListener("play", event => document.querySelectorAll("audio").forEach(
    audio => audio === event.target || audio.pause()), true)</script>"""
    write_file(run / "index.html", page.encode())
    kind = "held-out" if setup.num_train < len(setup.prompts) else "training"
    better, worse = (change > SAME).sum(), (change < -SAME).sum()
    print(f"{kind} prompts, original -> fine-tuned, same noise, guidance {setup.cfg.eval_guidance}:"
          f" reward {before.mean():.3f} -> {after.mean():.3f}\nof {len(change)} prompts {better} "
          f"clearly better, {worse} clearly worse, others within {SAME}\nlisten: {run}/index.html")

# ==== 11. Files, flags, main ====
def write_file(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment it is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("tmp-" + path.name)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)       # what a full disk left of it

def save_checkpoint(setup: Setup, run: Path, metrics: list) -> None:
    """All that a finished epoch leaves behind. No random state: each epoch seeds its own."""
    state = {"adapter": adapter_state(setup.unet), "optimizer": setup.optimizer.state_dict(),
             "scaler": setup.scaler.state_dict(), "reward": setup.reward_name,
             "prompts": setup.prompts, "num_train": setup.num_train, "metrics": metrics}
    file = io.BytesIO()
    torch.save(state, file)
    write_file(run / "checkpoint.pt", file.getvalue())
    lines = [json.dumps(row) + "\n" for row in metrics]
    write_file(run / "metrics.jsonl", "".join(lines).encode())

def resume_run(cfg: Config, run: Path, reward: Callable = None) -> tuple:
    """A run's Setup as its last finished epoch left it, and its metrics, a row per epoch."""
    from peft import set_peft_model_state_dict
    try:
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        if len(state["metrics"]) > cfg.epochs:
            raise ValueError(f"{len(state['metrics'])} epochs are done, more than --epochs")
        setup = load_setup(cfg, state["prompts"], state["num_train"], reward)
        if state["reward"] != setup.reward_name:
            raise ValueError(f"its reward was {state['reward']}; hand it to main()")
        if state["adapter"].keys() != adapter_state(setup.unet).keys():
            raise ValueError("its adapter is of another --model")
        set_peft_model_state_dict(setup.unet, state["adapter"])
        setup.optimizer.load_state_dict(state["optimizer"])
        setup.scaler.load_state_dict(state["scaler"])
    except Exception as error:                  # whatever is wrong with the file
        raise UserError(f"--resume {run}: cannot go on from checkpoint.pt: {error}")
    return setup, state["metrics"]

CHOICES = {"starting_noise": ["shared", "own"], "dtype": "auto float32 bfloat16 float16".split()}
LEAST = {"seconds": 0.1, "num_steps": 2, "clips_per_prompt": 2, "kl_weight": 0, "seed": 0}
MOST = {"seconds": 10, "num_steps": 999}  # CLAP hears no more than 10 s

def check_settings(cfg: Config) -> None:
    """UserError with flag, value and remedy where a value cannot work."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        low, high = LEAST.get(f.name, 1e-9), MOST.get(f.name, 1e9)
        if f.type is not str and not low <= value <= high:      # NaN is not, either
            raise UserError(f"--{f.name.replace('_', '-')} {value}: use {low:g} to {high:g}")
    most = round(cfg.noise_until * cfg.num_steps)
    if cfg.noise_window > most:
        raise UserError(f"--noise-window {cfg.noise_window}: use 1 to {most}, or raise "
                        f"--noise-until {cfg.noise_until}")
    if cfg.updates_per_epoch > cfg.prompts_per_epoch * cfg.clips_per_prompt:
        raise UserError(f"--updates-per-epoch {cfg.updates_per_epoch}: more than clips per epoch")
    if cfg.model != Config.model and cfg.clap == Config.clap:
        raise UserError(f"--model {cfg.model}: needs its own --clap, since the bundled "
                        "one knows the twelve sounds of the bundled model and no other")

def parse_args(argv=None) -> tuple:
    """Config of a command line, and the run directory to resume, None for a new run."""
    parser = argparse.ArgumentParser(  # SUPPRESS: a flag not given leaves no trace
        usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
        description=inspect.getsource(Config), formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--resume", type=Path, help="the folder of a run to go on with")
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, type=f.type, choices=CHOICES.get(f.name))
    given = vars(parser.parse_args(argv))
    run = given.pop("resume", None)
    if run is None:
        return Config(**given), None
    try:
        fixed = given.keys() - {"epochs", "micro_batch", "model", "clap"}
        if fixed:
            raise ValueError(f"{' and '.join(sorted(fixed))} cannot change in mid-run")
        return Config(**json.loads((run / "config.json").read_text()) | given), run
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume {run}: not a run that can go on so: {error}")

def main(argv=None, reward: Callable = None) -> int:
    """A whole run. Exit code 0; 2 after one line about a mistake; 130 if stopped by Ctrl-C."""
    advice = ""
    try:
        cfg, run = parse_args(argv)
        if run is None:
            prompts, num_train = split_prompts(cfg)
            run, metrics = Path(cfg.out or f"runs/seed-{cfg.seed}"), []
            run.mkdir(parents=True, exist_ok=True)      # before anything slow is done
            if any(run.iterdir()):
                raise UserError(f"--out {run}: not empty; use another, or --resume {run}")
            setup = load_setup(cfg, prompts, num_train, reward)
            save_checkpoint(setup, run, metrics)
        else:
            setup, metrics = resume_run(cfg, run, reward)
        write_file(run / "config.json", json.dumps(vars(cfg), indent=1).encode())
        advice = f"; --resume {run} goes on (short of memory: lower --micro-batch)"
        print(f"{run}: {setup.num_train} training, "
              f"{len(setup.prompts) - setup.num_train} held-out prompts", flush=True)
        train(setup, run, metrics)
        finish(setup, run)
        return 0
    except KeyboardInterrupt:
        message, code = "stopped", 130
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, BrokenPipeError):
            sys.stdout = sys.stderr
        message, code = " ".join(str(error).split()), 2  # one line, whatever is in a value
    print(f"clap_ppo.py: {message}{advice}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
