# SPDX-License-Identifier: MIT
r"""Fine-tune a text-to-audio diffusion model with PPO, so that you hear what you asked for.

    python clap_ppo.py --prompts samples/prompts.txt              # the bundled toy model, on a CPU
    python clap_ppo.py --resume runs/seed-0                       # go on where that run stopped
    python clap_ppo.py --prompts prompts.txt --model cvssp/audioldm2      # a real model, on a GPU

A diffusion model turns noise x_T into a clip x_0 in T denoising steps. Its x are latents: small
tensors into which an autoencoder packs a mel spectrogram (loudness by time and pitch), from which a
vocoder makes sound. DDIM with noise makes each step a draw from a Gaussian, x_{t-1} ~ N(mean(x_t,
prompt), sigma_t^2). So the sampler is a stochastic policy, a step its action, and the probability
of an action is known: all that policy gradients need. The reward comes at the end: CLAP, two
networks trained to embed a sound and its caption alike, says how well they match. One epoch:

    STEP 1  choose P prompts
    STEP 2  roll out K clips per prompt; keep x_t and x_{t-1} of the steps with noise
    STEP 3  decode the clips to sound and score them with CLAP
    STEP 4  advantage: how much better a clip is than the other clips of the same prompt
    STEP 5  clipped PPO on the shuffled table of (clip, step) rows
    STEP 6  log and checkpoint; every few epochs, score plain DDIM clips of held-out prompts

Part I is the method, Part II what it needs. Notation: latents = x_t (B, C, H, W), alpha_bar_t = the
share of signal in x_t's power (DDIM's paper: alpha_t), P prompts, K clips per prompt, B = P * K,
T steps, R rows of the table, D = C * H * W elements. References: DDIM, Song et al. 2021 (arXiv
2010.02502). DDPO, Black et al. 2023 (2305.13301). PPO, Schulman et al. 2017 (1707.06347). CLAP, Wu
et al. 2023 (2211.06687). Noise in few steps: MixGRPO (2507.21802). One x_T a prompt: DanceGRPO
(2505.07818). Guidance: sampling with and without the prompt, and exaggerating the difference.
"""

import argparse
import dataclasses
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
# ==== 1. A denoising step is a Gaussian (sections 1 to 3 are the core: copy them) ====
class UserError(ValueError):
    """A mistake of the caller's or of the environment: printed as one line, exit code 2."""


def ddim_schedule(scheduler, num_steps: int) -> tuple:
    """T steps of diffusers' DDIM scheduler, most noise first: timesteps (T,) for the network;
    alpha_bar_t, alpha_bar_prev (T, 1, 1, 1), the shares of signal power in x_t and x_{t-1}.
    """
    # What the functions below do not compute would make them wrong by 10 % and more, unnoticed.
    computed = {"prediction_type": "epsilon", "clip_sample": False, "thresholding": False,
                "rescale_betas_zero_snr": False}        # with it, alpha_bar_T is 0
    for name, value in computed.items():
        kind, found = type(scheduler).__name__, scheduler.config.get(name)
        if kind != "DDIMScheduler" or found != value:
            raise UserError(f"{kind}, {name}={found}: not DDIMScheduler, {name}={value}")
    scheduler.set_timesteps(num_steps)  # by its timestep_spacing and steps_offset
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


def ddim_sigma(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """Standard deviation of the noise that a step adds (DDIM, Eq. 16)."""
    # sigma = eta sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev)
    # eta 0 is plain DDIM, eta 1 adds as much noise as DDPM.
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    return eta * variance.sqrt()


def ddim_mean(noise_pred: Tensor, latents: Tensor, alpha_bar_t: Tensor, alpha_bar_prev: Tensor,
              sigma: Tensor) -> Tensor:
    """Mean (B, C, H, W) of x_{t-1} given x_t (DDIM, Eq. 12), in float32.

    noise_pred, latents (B, C, H, W); the others tensors, scalar or (B, 1, 1, 1).
    """
    # Whatever the network ran in, this is float32: rounding x_t to bfloat16 moves AudioLDM's ratio
    # by 6e-4 at the last trained step (2e-5 at early ones), and PPO clips it at 1e-4.
    eps, x_t = noise_pred.float(), latents.float()      # eps: the noise in x_t, as predicted
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
    if not (sigma > 0).all():  # plain DDIM is deterministic: it has no density
        raise UserError("sigma is 0 (eta 0, or the last step with set_alpha_to_one)")
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


# ==== 2. The reward: how well a sound matches its prompt under CLAP ====
@torch.no_grad()
def clap_reward(clap, waveforms: Tensor, sample_rate: int, prompts: list) -> Tensor:
    """Cosine (N,) of waveforms (N, samples), floats in [-1, 1], and N prompts, on the CPU."""
    import torchaudio
    # (samples,) would be taken for clips of one sample, and int16 is 30,000 times too loud. At the
    # wrong rate, 16 for 16 kHz or 16000 left as it is, CLAP answers without complaint, and wrongly.
    if waveforms.dim() != 2 or not waveforms.is_floating_point() or sample_rate < 8000:
        raise UserError("not float waveforms (N, samples) and a sample_rate in Hz")
    device = next(clap.parameters()).device
    length, rate = clap.audio_cfg.clip_samples, clap.audio_cfg.sample_rate
    embeds = []
    for x in waveforms.float().clamp(-1, 1).split(16):
        # CLAP hears 10 s at 48 kHz. It learned shorter clips as whole repetitions, then zeros. Of
        # longer ones the package takes a random part, so that no score can be had twice.
        x = torchaudio.functional.resample(x.to(device), sample_rate, rate)
        x = x.repeat(1, max(1, length // x.shape[1]))[:, :length]
        x = F.pad(x, (0, length - x.shape[1]))
        embeds.append(clap["audio_branch"]({"waveform": x}, device=device)["embedding"])
    audio = F.normalize(clap["audio_projection"](torch.cat(embeds)))    # (N, E)

    texts = {}
    for prompt in set(prompts):  # alone: others in a batch change the last bits
        tokens = clap.tokenizer([prompt], padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt").to(device)
        text = clap["text_branch"](tokens["input_ids"], tokens["attention_mask"])
        texts[prompt] = F.normalize(clap["text_projection"](text.pooler_output))[0]
    text = torch.stack([texts[prompt] for prompt in prompts])           # (N, E)
    return (audio * text).sum(1).cpu()


# ==== 3. Advantage and loss ====
def group_advantages(rewards: Tensor, floor: float = 0.1) -> Tensor:
    """How much better each clip is than the other clips of its prompt, in standard deviations.

    (P, K) rewards of K clips for each of P prompts -> (P, K); smaller deviations count as `floor`.
    >>> group_advantages(torch.tensor([[1, 2, 3], [7, 7, 7]]))
    tensor([[-1.2247,  0.0000,  1.2247],
            [ 0.0000,  0.0000,  0.0000]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise UserError(f"rewards {tuple(rewards.shape)}: not (P, K), with K of 2 or more")
    # Among the clips of one prompt, since prompts differ in difficulty by more than their clips do:
    # with one mean for all, whatever an easy prompt gave would be reinforced, bad clips included.
    # (PPO for games trains a second network, the critic, to guess this mean; DDPO keeps a buffer.)
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
    shapes = {log_prob.shape, old_log_prob.shape, advantages.shape}
    if len(shapes) > 1 or log_prob.dim() != 1:  # (B, 1) would become (B, B)
        raise UserError(f"log_prob, old_log_prob, advantages: not all (B,), but {shapes}")
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()             # pi_new / pi_old, 1 before the first update
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    # Advantage > 0: raising the ratio pays until 1 + clip_range, then the gradient is 0. Below 0:
    # lowering it pays until 1 - clip_range. The minimum is the pessimistic of both: a row that
    # moved the *wrong* way, a good action that became rare, keeps its gradient.
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        # KL(old, new) = E_old[-log ratio]; adding ratio - 1, whose mean is 0, makes every term
        # non-negative (joschu.net/blog/kl-approx.html); with log-probs per element it is the KL of
        # an action over D^2, a measure of movement. expm1 keeps the 5e-9 of a log-ratio of 1e-4.
        approx_kl = (torch.expm1(log_ratio) - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip_range).float().mean()
    return loss, {"approx_kl": approx_kl, "clip_fraction": clip_fraction}


# ==== 4. Settings ====
HERE = Path(globals().get("__file__", "x")).resolve().parent    # no file in a notebook
TOY = HERE / "samples/toy"
# What nobody needs to turn. What one may want to turn is a field of Config, and so a flag.
ETA = 1.0               # noise of a noisy step in units of DDPM's; with less, less is explored
WARMUP_UPDATES = 10     # Adam's first steps have size lr in every weight, so lr rises from 0
MAX_GRAD_NORM = 1.0     # an emergency brake: healthy norms are a hundred times smaller
MAX_LOG_PROB_GAP = 3e-3 # of rollout and update, in nats per element; see `update`
ROWS_AT_ONCE = 128      # per U-Net call: more is faster on a GPU; 0.01 GiB each
EVAL_EVERY = 20         # epochs from one score of held-out prompts to the next
EVAL_CLIPS = 2          # clips of each held-out prompt, always of the same noises


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. A field is a flag, --num-steps 20; `--help` prints this class."""
    prompts: str = "prompts.txt"    # one training prompt per line; "# " begins a comment
    eval_prompts: str = ""          # held-out ones; else those of eval_FILE beside it, or a quarter
    out: str = ""                   # folder of the run, new or empty; else runs/seed-SEED
    model: str = str(TOY / "pipeline")  # AudioLDM or AudioLDM2: folder or hub id
    clap: str = str(TOY / "clap.pt")  # laion-clap file, or OWNER/REPO/FILE of the hub
    seconds: float = 2.56           # length of a clip; at most 10, CLAP hears no more
    num_steps: int = 10             # T, denoising steps per clip; usual: 10 to 50
    noisy_steps: int = 3            # the first so many have noise, and are trained; 1 to T - 1
    eval_guidance: float = 1.0      # guidance of the clips that are compared; 1: none
    epochs: int = 80                # rounds of rollout and update
    prompts_per_epoch: int = 16     # P
    clips_per_prompt: int = 8       # K, clips compared with each other; at best 8 or more
    updates_per_epoch: int = 4      # optimiser steps, each on its share of the rows
    learning_rate: float = 4e-3     # Adam's
    # An epoch may change the probability of an action, all its D elements together, by a factor of
    # about e^1.6 = 5: beyond it an action pulls no further. In nats; usual: 0.2 to 16.
    clip_range: float = 1.6
    kl_weight: float = 0.0          # pulls back to the base model; usual: 0 to 0.1
    lora_rank: int = 8              # rank of the adapter's weight updates
    micro_batch: int = 128          # rows per gradient pass: memory and speed, never the result
    dtype: str = "auto"             # of the U-Net: float32, bfloat16; auto: what the GPU has
    seed: int = 0                   # of everything random


# What a model other than the bundled one starts from, where no flag says otherwise.
REAL_MODEL = {"clap": "lukewys/laion_clap/630k-audioset-best.pt", "seconds": 5.12,
              "num_steps": 20, "noisy_steps": 4, "eval_guidance": 3.5, "epochs": 300,
              "learning_rate": 3e-4, "micro_batch": 32}


@dataclasses.dataclass
class Setup:
    """All that a run works with; `make_setup` in Part II makes it."""
    cfg: Config
    prompts: list          # training prompts, then held-out ones; a prompt's id is its place
    num_train: int         # how many of them are training prompts
    condition: dict        # their embeddings: the U-Net's keyword tensors, a row per prompt
    empty_condition: dict  # those of the empty prompt, in the same shapes, for guidance
    pipeline: object       # the stock diffusers pipeline, whose VAE and vocoder decode
    reward: Callable       # (waveforms (N, samples), sample_rate, prompts) -> (N,)
    unet: nn.Module        # the policy: the pipeline's U-Net with an adapter (LoRA)
    optimizer: object      # AdamW on the adapter's weights
    timesteps: Tensor      # (T,)
    alpha_bar_t: Tensor    # (T, 1, 1, 1)
    alpha_bar_prev: Tensor
    latent_shape: tuple    # (C, H, W)
    sample_rate: int       # of the waveforms, in Hz
    device: torch.device
    dtype: torch.dtype     # of the U-Net; all else is float32
    fingerprint: list = None    # of base model and reward, which a run keeps to its end


# ==== 5. The policy acts: rollout ====
def take(rows: dict, idx: Tensor) -> dict:
    """The rows `idx` of a table, which is a dictionary of tensors (R, ...)."""
    return {name: column[idx] for name, column in rows.items()}


def policy(setup: Setup, rows: dict, eta: float, condition: dict) -> tuple:
    """The Gaussian of each row's x_{t-1}: mean (R, C, H, W) and sigma (R, 1, 1, 1).

    rows: "latents" x_t (R, C, H, W), "step" (a place in the schedule) and "prompt_id" (R,).
    """
    noise_pred = []
    for idx in torch.arange(len(rows["step"]), device=setup.device).split(ROWS_AT_ONCE):
        part = take(rows, idx)
        prompts = take(condition, part["prompt_id"])
        # Only the network runs in half precision, if at all.
        with torch.autocast(setup.device.type, setup.dtype, setup.dtype != torch.float32):
            output = setup.unet(part["latents"], setup.timesteps[part["step"]], **prompts)
        noise_pred.append(output.sample)
    alpha_bar_t = setup.alpha_bar_t[rows["step"]]
    alpha_bar_prev = setup.alpha_bar_prev[rows["step"]]
    sigma = ddim_sigma(alpha_bar_t, alpha_bar_prev, eta)
    mean = ddim_mean(torch.cat(noise_pred), rows["latents"], alpha_bar_t, alpha_bar_prev, sigma)
    return mean, sigma


def randn(setup: Setup, rows: int, generator: Generator) -> Tensor:
    """Noise (rows, C, H, W), drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(rows, *setup.latent_shape, generator=generator).to(setup.device)


def choose_prompts(setup: Setup, generator: Generator) -> Tensor:
    """STEP 1: the ids (P,) of training prompts, each once; again if there are fewer than P."""
    P = setup.cfg.prompts_per_epoch
    order = torch.randperm(setup.num_train, generator=generator)
    return order.repeat(math.ceil(P / len(order)))[:P].to(setup.device)


def starting_latents(setup: Setup, generator: Generator) -> Tensor:
    """x_T (B, C, H, W): one for each prompt, the same for its K clips."""
    # In DDPO each clip has its own, whose luck enters the advantage; on the toy that did not show.
    latents = randn(setup, setup.cfg.prompts_per_epoch, generator)
    return latents.repeat_interleave(setup.cfg.clips_per_prompt, dim=0)


@torch.no_grad()
def rollout(setup: Setup, prompt_ids: Tensor, generator: Generator) -> tuple:
    """STEP 2: K clips for each of P prompts, with noise in the first `noisy_steps` steps.

    prompt_ids (P,). Returns finished latents (B, C, H, W), a prompt's clips together, and the table
    of R = B * noisy_steps actions: "latents" x_t and "next_latents" x_{t-1} (R, C, H, W),
    "log_prob", "step", "prompt_id", "clip_id" (R,).
    """
    cfg = setup.cfg
    prompt_ids = prompt_ids.repeat_interleave(cfg.clips_per_prompt)             # (P,) -> (B,)
    clip_ids = torch.arange(len(prompt_ids), device=setup.device)               # (B,)
    latents = starting_latents(setup, generator)
    actions = []

    for step in range(cfg.num_steps):
        rows = {"latents": latents, "step": torch.full_like(clip_ids, step),
                "prompt_id": prompt_ids, "clip_id": clip_ids}
        if step < cfg.noisy_steps:
            # The action is drawn here: the mean, plus noise. In DDPO every step is an action, and
            # guided, at twice the cost. Here the early ones are, which decide what will be heard;
            # never the last, whose noise is so small that its log-prob is mostly rounding.
            mean, sigma = policy(setup, rows, ETA, setup.condition)
            latents = mean + sigma * randn(setup, len(mean), generator)
            rows["next_latents"] = latents
            rows["log_prob"] = gaussian_log_prob(latents, mean, sigma)
            actions.append(rows)
        else:
            # Plain DDIM goes to the mean: no choice, so nothing to learn from.
            latents, _ = policy(setup, rows, 0.0, setup.condition)

    table = {}
    for name in actions[0]:
        table[name] = torch.cat([rows[name] for rows in actions])
    return latents, table


# ==== 6. The policy learns: update ====
def optimizer_step(setup: Setup, number: int) -> float:
    """Update `number` of the run, from 0, on the gradients that have added up; their norm."""
    cfg, optimizer = setup.cfg, setup.optimizer
    # The rate rises while Adam's averages are young, then falls: late gradients are mostly noise.
    group = optimizer.param_groups[0]
    left = 1 - number / (cfg.epochs * cfg.updates_per_epoch)
    group["lr"] = cfg.learning_rate * min((number + 1) / WARMUP_UPDATES, left)
    norm = nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM).item()
    if not math.isfinite(norm):         # one NaN in Adam's state would stay there
        raise UserError("the gradient is not finite: lower --learning-rate")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def update(setup: Setup, rows: dict, epoch: int, generator: Generator) -> dict:
    """STEP 5: clipped PPO on the R rows of `rollout`, with "advantage"; returns what to log."""
    cfg, count = setup.cfg, len(rows["step"])
    clip_range = cfg.clip_range / math.prod(setup.latent_shape)  # log-probs are per element
    order = torch.randperm(count, generator=generator).to(setup.device)
    minibatches = order.tensor_split(cfg.updates_per_epoch)

    # Pass 1: log-probs under the old policy, without gradient. The weights are still those of the
    # rollout, and the micro-batches already those of pass 2, so that the ratio is exactly 1 at the
    # first update. The rollout's own log-probs (DDPO takes them) would not do: they are from other
    # batches, for which a GPU has other kernels, whose rounding can exceed the clip range.
    rows["old_log_prob"] = torch.empty_like(rows["log_prob"])
    with torch.no_grad():
        for minibatch in minibatches:
            for idx in minibatch.split(cfg.micro_batch):
                part = take(rows, idx)
                mean, sigma = policy(setup, part, ETA, setup.condition)
                rows["old_log_prob"][idx] = gaussian_log_prob(part["next_latents"], mean, sigma)
    gap = (rows["old_log_prob"] - rows["log_prob"]).square().mean().sqrt().item()
    # The cheapest bug detector there is: the same actions, asked twice under the same weights.
    # On a CPU the gap is below 1e-6, with a GPU's bfloat16 1e-4 to 2e-3; most bugs give 4e-3.
    if not gap <= MAX_LOG_PROB_GAP:     # NaN fails, too
        raise UserError(f"log_prob_gap {gap:.1e}, limit {MAX_LOG_PROB_GAP}: update and rollout "
                        "disagree about the same actions. Usual causes: dropout (not in eval "
                        "mode), another timestep, another row's prompt, moved weights")

    # Pass 2: gradient steps.
    log = {"log_prob_gap": gap, "grad_norm": 0.0}
    for i, minibatch in enumerate(minibatches):
        for idx in minibatch.split(cfg.micro_batch):
            part = take(rows, idx)
            mean, sigma = policy(setup, part, ETA, setup.condition)
            log_prob = gaussian_log_prob(part["next_latents"], mean, sigma)
            loss, info = ppo_loss(log_prob, part["old_log_prob"], part["advantage"], clip_range)
            if cfg.kl_weight:
                with torch.no_grad(), setup.unet.disable_adapter():     # the base model
                    mean_base, _ = policy(setup, part, ETA, setup.condition)
                info["kl_base"] = gaussian_kl(mean, mean_base, sigma).mean()
                loss = loss + cfg.kl_weight * info["kl_base"]
            # Gradients add up to that of the minibatch's mean. The micro-batch costs memory and
            # time, and changes nothing else. (Several GPUs would add up theirs here, too.)
            (loss * len(idx) / len(minibatch)).backward()
            info["loss"] = loss
            for name, value in info.items():                    # means over all rows
                log[name] = log.get(name, 0) + value.detach() * len(idx) / count
        norm = optimizer_step(setup, epoch * cfg.updates_per_epoch + i)
        log["grad_norm"] = max(log["grad_norm"], norm)
    return {name: float(value) for name, value in log.items()}


# ==== 7. The loop ====
def train(setup: Setup, run: Path, metrics: list) -> None:
    """The PPO loop, from the epoch after the last one in `metrics`, a list of one row per epoch."""
    cfg, done = setup.cfg, len(metrics)
    for epoch in tqdm(range(done, cfg.epochs), initial=done, total=cfg.epochs, disable=None):
        began = time.time()
        # Random numbers belong to the epoch, not to the process: a resumed run repeats them.
        generator = Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
        prompt_ids = choose_prompts(setup, generator)                           # STEP 1
        latents, rows = rollout(setup, prompt_ids, generator)                   # STEP 2
        _, rewards = score_clips(setup, latents, prompt_ids)                    # STEP 3, (P, K)
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
        save_checkpoint(setup, run, metrics)    # saved before it is shown
        shown = "reward_mean reward_spread approx_kl clip_fraction seconds eval_reward".split()
        text = [f"{name} {row[name]:.3g}" for name in shown if name in row]
        tqdm.write(f"epoch {epoch + 1}/{cfg.epochs}  " + "  ".join(text))
        sys.stdout.flush()


# ############## Part II: what the method needs (a first reader may stop here) ##############
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11,<2.15", "torchaudio>=2.11,<2.12", "torchvision>=0.26,<0.29.2", "tqdm>=4.66",
#     "diffusers>=0.41,<0.43", "transformers>=5.17,<5.40", "laion-clap==1.1.7",
#     "peft>=0.21,<0.22", "accelerate>=1.10", "soundfile>=0.12", "matplotlib>=3.8"]
# [tool.uv]
# override-dependencies = ["numpy>=2"]   # laion-clap's numpy<2 has no wheels for Python 3.13
# ///


# ==== 8. Prompts ====
# Lines of other kinds of lists: sound files, items, quotes, JSON, rows and heads of tables.
NO_PROMPT = re.compile(r"""
    .*\.(wav|mp3|flac|ogg)\b | (\d+[.)]|[-*•])\s | "[^"]*",?$ | [\[{]\s*(["\[{]|$) | .*\t |
    \d+[;|] | \d+,(?!\d{3}) | ((\w*_)?id|caption|prompt|file(_?name)?)([,;|]|$)""", re.I | re.X)


def read_prompts(path: str) -> dict:
    """The prompts of a text file, one per line, by what makes two of them the same."""
    prompts, count = {}, 0
    try:
        text = Path(path).read_text(encoding="utf-8-sig")   # -sig: Windows' mark
    except (OSError, ValueError) as error:
        raise UserError(f"prompts {path}: {error}; to begin: samples/prompts.txt") from error
    for line in text.replace("\0", "").split("\n"):
        prompt = " ".join(line.split())
        if not prompt or re.match(r"#([\s#]|$)", prompt):   # "#1 hit" is a prompt
            continue
        if NO_PROMPT.match(line.strip()):
            raise UserError(f"prompts {path}: {prompt!r} is a line of a list or table, not of "
                            "plain text; write one prompt a line")
        count += 1
        same = prompt.lower().rstrip(" .,;:!?")     # "A dog barks." is "a dog barks"
        prompts[same] = prompt
    if not prompts:
        raise UserError(f"prompts {path}: no prompt in it; write one a line")
    if count > len(prompts):
        print(f"{path}: {count - len(prompts)} lines repeat others: left out")
    return prompts


def split_prompts(cfg: Config) -> tuple:
    """Training prompts, then held-out ones, none of fewer than 8; how many are for training."""
    train, held_out = read_prompts(cfg.prompts), {}
    beside = Path(cfg.prompts).with_name("eval_" + Path(cfg.prompts).name)
    if cfg.eval_prompts or beside.exists():
        held_out = read_prompts(cfg.eval_prompts or beside)
        for same in train.keys() & held_out.keys():  # it would show memory, not skill
            raise UserError(f"{train[same]!r} is trained on and held out: remove one")
    elif len(train) >= 8:
        every = max(4, len(train) // 50)    # a quarter, 50 at most
        for same in list(train)[every - 1::every][:50]:
            held_out[same] = train.pop(same)
    return list(train.values()) + list(held_out.values()), len(train)


# ==== 9. The model: a stock pipeline with a LoRA adapter ====
def cause(error: BaseException) -> str:
    """What an error began with, in one line: libraries wrap it in guesses of their own."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load_pipeline(model: str, device="cpu"):
    """AudioLDM(2)Pipeline in float32, eval mode; model: a `save_pretrained` folder or a hub id."""
    import torchaudio  # noqa: F401, I001    if it is broken, those below would hide why
    import diffusers
    import transformers
    for library in (diffusers, transformers):  # one line an epoch is enough
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    parts = {}
    try:
        kind = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
        if kind == "AudioLDM2Pipeline":     # names GPT2Model, which cannot generate
            parts["language_model"] = transformers.GPT2LMHeadModel.from_pretrained(
                model, subfolder="language_model", dtype=torch.float32)
        elif kind != "AudioLDMPipeline":
            raise ValueError(f"a {kind} is not supported")
        pipeline = getattr(diffusers, kind).from_pretrained(model, dtype=torch.float32, **parts)
    except Exception as error:  # whatever a library finds wrong with a folder
        raise UserError(f"--model {model}: no usable folder, and not from the hub: "
                        f"{cause(error)}") from error
    if not parts:  # AudioLDM's U-Net does not use it, but asks for it
        pipeline.unet.forward = partial(pipeline.unet.forward, encoder_hidden_states=None)
    pipeline.vae.to(memory_format=torch.channels_last)  # convolutions are faster so
    return pipeline.to(device)  # in eval mode, as `from_pretrained` leaves it


@torch.no_grad()
def encode_prompts(pipeline, prompts: list) -> tuple:
    """The U-Net's keyword tensors, a row per prompt; and those of the empty one in their place."""
    device = pipeline.unet.device
    if not hasattr(pipeline, "language_model"):
        # AudioLDM: a vector (N, E). By 64 prompts, each padded to 512 tokens; the empty one once.
        chunks = [prompts[first:first + 64] for first in range(0, len(prompts), 64)]
        labels = [pipeline._encode_prompt(chunk, device, 1, False) for chunk in chunks]
        empty = pipeline._encode_prompt(prompts[:1], device, 1, True)[:1]
        empty = empty.expand(len(prompts), -1)
        return {"class_labels": torch.cat(labels)}, {"class_labels": empty}
    # AudioLDM2, one prompt at a time, since its language model hears the padding: T5 states
    # (2, L, E), their mask (2, L), what GPT2 adds (2, 8, E'); 2: the empty prompt and this one.
    names = "encoder_hidden_states_1", "encoder_attention_mask_1", "encoder_hidden_states"
    encoded = [pipeline.encode_prompt(prompt, device, 1, True) for prompt in prompts]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    condition, empty_condition = {}, {}
    for i, name in enumerate(names):
        condition[name] = pad([tensors[i][1] for tensors in encoded])
        empty_condition[name] = pad([tensors[i][0] for tensors in encoded])
    return condition, empty_condition


# The transformer blocks, and the layers through which an AudioLDM U-Net hears its prompt.
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in",
               "proj_out", "time_emb_proj", "class_embedding"]


def adapter_state(unet) -> dict:
    """The adapter's weights by peft's names; `peft.set_peft_model_state_dict` puts them back."""
    from peft import get_peft_model_state_dict
    return get_peft_model_state_dict(unet, save_embedding_layers=False)


def load_setup(cfg: Config, prompts: list, num_train: int, reward=None) -> Setup:
    """Everything that a run needs, loaded and checked; `reward` takes the place of CLAP's."""
    vocabulary = Path(cfg.model) / "vocabulary.txt"
    if vocabulary.exists():                     # the bundled model's
        words = set(re.findall(r"\w+", " ".join(prompts).lower()))
        unknown = ", ".join(sorted(words - set(vocabulary.read_text().split())))
        if unknown:
            raise UserError(f"the bundled model never heard of {unknown[:99]}: it knows twelve "
                            f"sounds, by the words of {vocabulary}; for others, use --model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and Path(cfg.model).resolve() != TOY / "pipeline":
        print("warning: no GPU found (an old driver?); this takes days", file=sys.stderr)
    pipeline = load_pipeline(cfg.model, device)
    # The tokenizer of both families is RoBERTa's, which is CLAP's too; CLAP reads 77 tokens.
    tokenizer, limit = pipeline.tokenizer, min(77, pipeline.tokenizer.model_max_length)
    for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True):
        if len(ids) < 3 or tokenizer.unk_token_id in ids:   # it lost its vocabulary
            raise UserError(f"--model {cfg.model}: its tokenizer reads {prompt!r} as nothing")
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1:-1])
            print(f"warning: prompt cut to {limit} tokens, lost: {lost!r}", file=sys.stderr)
    if reward is None:
        reward = partial(clap_reward, load_clap(cfg.clap, tokenizer, device))
    conditions = encode_prompts(pipeline, prompts)
    # Every prompt is encoded: the encoders, which may be larger than the U-Net, can go.
    for name in ("text_encoder", "text_encoder_2", "projection_model", "language_model"):
        setattr(pipeline, name, None)
    setup = make_setup(cfg, prompts, num_train, pipeline, conditions, reward)
    # A resumed run must find the same model and reward; their names may be the same by chance.
    weights = sum(weight.double().sum().item() for weight in setup.unet.parameters())
    _, rewards = score_clips(setup, randn(setup, 2, Generator()), torch.tensor([0]))
    setup.fingerprint = [weights] + rewards[0].tolist()
    return setup


def make_setup(cfg: Config, prompts: list, num_train: int, pipeline, conditions: tuple,
               reward: Callable) -> Setup:
    """A Setup of loaded parts, with a new adapter, optimizer and schedule."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.checkpoint import checkpoint
    vocoder, vae, device = pipeline.vocoder.config, pipeline.vae.config, pipeline.unet.device
    dtype = getattr(torch, cfg.dtype, torch.float32)
    if cfg.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(False):
        dtype = torch.bfloat16
    # The latents' shape, as diffusers computes it; the VAE halves at all of its levels but one.
    frames = int(cfg.seconds / (math.prod(vocoder.upsample_rates) / vocoder.sampling_rate))
    factor = 2 ** (len(vae.block_out_channels) - 1)
    channels = pipeline.unet.config.in_channels
    latent_shape = channels, math.ceil(frames / factor), vocoder.model_in_dim // factor
    most = pipeline.scheduler.config.num_train_timesteps
    if cfg.num_steps > most:
        raise UserError(f"--num-steps {cfg.num_steps}: --model was trained with {most}")
    timesteps, alpha_bar_t, alpha_bar_prev = ddim_schedule(pipeline.scheduler, cfg.num_steps)
    if device.type == "cuda":
        # Backward passes compute activations anew, block by block: a tenth of the memory. (The
        # library's own switch hands AudioLDM2's blocks the wrong attention mask.)
        for block in pipeline.unet.modules():
            if type(block).__name__ in ("ResnetBlock2D", "Transformer2DModel"):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    # LoRA (Hu et al. 2021): a layer's matrix W becomes W + B A, with B zero at first. So the policy
    # starts as the base model, and is the base model again within `unet.disable_adapter()`.
    torch.manual_seed(cfg.seed)                 # the A matrices are random
    lora = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_rank, target_modules=LORA_LAYERS)
    unet = get_peft_model(pipeline.unet, lora).eval()
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=1e-4)
    condition, empty_condition = conditions
    return Setup(cfg, prompts, num_train, condition, empty_condition, pipeline, reward, unet,
                 optimizer, timesteps.to(device), alpha_bar_t.to(device),
                 alpha_bar_prev.to(device), latent_shape, vocoder.sampling_rate, device, dtype)


# ==== 10. CLAP, made dependable ====
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
    path, weights = Path(checkpoint), {}
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
        clap.load_state_dict(weights)   # strict: a random weight would score nonsense
    except Exception as error:
        raise UserError(f"--clap {path}: no usable file, and not from the hub: "
                        f"{cause(error)}") from error
    clap.tokenizer = tokenizer
    return clap.to(device)


# ==== 11. Clips: decoded, scored, compared before and after ====
@torch.no_grad()
def decode(setup: Setup, latents: Tensor) -> Tensor:
    """Waveforms (B, samples) in [-1, 1] on the CPU of finished latents: VAE, then vocoder."""
    pipeline, waveforms = setup.pipeline, []
    for chunk in latents.split(4):      # a vocoder's activations are large
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
    except (TypeError, ValueError, RuntimeError) as error:
        shape = getattr(found, "shape", type(found))
        raise UserError(f"the reward returned {shape}, not {len(prompts)} numbers") from error
    for prompt, reward in zip(prompts, rewards, strict=True):
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
    for step in range(setup.cfg.num_steps):
        rows["step"] = torch.full_like(ids, step)
        mean, _ = policy(setup, rows, 0.0, setup.condition)
        # Classifier-free guidance (Ho & Salimans 2022) exaggerates what the prompt changes. Usually
        # it is applied to noise predictions; the mean of plain DDIM is linear in them.
        if scale != 1:
            mean_of_empty, _ = policy(setup, rows, 0.0, setup.empty_condition)
            mean = mean_of_empty + scale * (mean - mean_of_empty)
        rows["latents"] = mean
    return score_clips(setup, rows["latents"], eval_ids)


SAME = 0.1      # a prompt whose reward changed by less is neither better nor worse


def finish(setup: Setup, run: Path, metrics: list) -> None:
    """Writes the adapter, before/after clips and a page that plays them; prints what was gained."""
    import soundfile
    setup.unet.peft_config["default"].save_pretrained(run / "adapter")
    weights = safetensors.torch.save(adapter_state(setup.unet))
    write_file(run / "adapter/adapter_model.safetensors", weights)
    with setup.unet.disable_adapter():
        sides = {"original": score_held_out(setup)}
    sides["fine-tuned"] = score_held_out(setup)
    before, after = [rewards.mean(1) for _, rewards in sides.values()]
    change, prompts = after - before, setup.prompts[-len(after):]
    kind = "held-out" if setup.num_train < len(setup.prompts) else "training"
    better, worse = (change > SAME).sum(), (change < -SAME).sum()
    summary = (f"{kind} prompts, original -> fine-tuned, same noise, guidance "
               f"{setup.cfg.eval_guidance}: reward {before.mean():.3f} -> {after.mean():.3f}\n"
               f"of {len(change)} prompts {better} clearly better, {worse} clearly worse, "
               f"others within {SAME}")

    listen = run / "clips"
    listen.mkdir(exist_ok=True)
    for side, (waveforms, rewards) in sides.items():
        first = waveforms.unflatten(0, rewards.shape)[:, 0]     # of each prompt's clips
        for i, waveform in enumerate(first):
            soundfile.write(listen / f"{i:03}-{side}.wav", waveform.numpy(), setup.sample_rate)
    page = HERE / "samples/run.html"
    if page.exists():                           # not where the script was copied alone
        rewards = {side: rewards[:, 0].tolist() for side, (_, rewards) in sides.items()}
        data = json.dumps({"summary": summary, "prompts": prompts, "rewards": rewards,
                           "change": change.tolist(), "metrics": metrics})
        data = data.replace("<", "\\u003c")     # no prompt is a tag
        listen, text = run / "index.html", page.read_text(encoding="utf-8")
        write_file(listen, text.replace("null /* data */", data).encode())
    print(f"{summary}\nlisten: {listen}")


# ==== 12. Files, flags, main ====
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
    adapter = adapter_state(setup.unet)
    if metrics and "eval_reward" in metrics[-1]:
        snapshot = run / f"adapter/epoch-{len(metrics)}.safetensors"
        write_file(snapshot, safetensors.torch.save(adapter))
    lines = [json.dumps(row) + "\n" for row in metrics]
    write_file(run / "metrics.jsonl", "".join(lines).encode())
    state = {"adapter": adapter, "optimizer": setup.optimizer.state_dict(),
             "metrics": metrics, "prompts": setup.prompts, "num_train": setup.num_train,
             "fingerprint": setup.fingerprint}
    file = io.BytesIO()
    torch.save(state, file)
    write_file(run / "checkpoint.pt", file.getvalue())      # last: the epoch is done


def open_run(cfg: Config, run: Path, reward: Callable = None) -> tuple:
    """A run's Setup as its last finished epoch left it, and its metrics, a row per epoch."""
    import zipfile

    from peft import set_peft_model_state_dict
    file = run / "checkpoint.pt"
    if not file.exists():
        prompts, num_train = split_prompts(cfg)
        return load_setup(cfg, prompts, num_train, reward), []
    try:
        damaged = zipfile.ZipFile(file).testzip()   # torch compares no checksums
        state = torch.load(file, map_location="cpu", weights_only=True)
        prompts, num_train, then = state["prompts"], state["num_train"], state["fingerprint"]
        metrics, adapter, optimizer = state["metrics"], state["adapter"], state["optimizer"]
    except Exception as error:                          # whatever is wrong with the file
        raise UserError(f"{file}: cannot go on from it: {cause(error)}") from error
    if damaged or len(metrics) > cfg.epochs:
        raise UserError(f"{file}: damaged, or of more epochs than --epochs {cfg.epochs}")
    setup = load_setup(cfg, prompts, num_train, reward)
    now = setup.fingerprint
    same = abs(now[0] - then[0]) < 0.01 and torch.allclose(
        torch.tensor(now), torch.tensor(then), rtol=0.01, atol=0.001)   # but for rounding
    if not same or adapter.keys() != adapter_state(setup.unet).keys():
        raise UserError(f"{file}: of another base model or reward: {then} then, {now} now")
    set_peft_model_state_dict(setup.unet, adapter)
    setup.optimizer.load_state_dict(optimizer)
    return setup, metrics


def check_settings(cfg: Config) -> None:
    """UserError with flag, value and remedy where a value cannot work."""
    clips = cfg.prompts_per_epoch * cfg.clips_per_prompt
    limits = {"seconds": (0.1, 10), "num_steps": (2, 1e9), "noisy_steps": (1, cfg.num_steps - 1),
              "clips_per_prompt": (2, 1e9), "updates_per_epoch": (1, clips),
              "kl_weight": (0, 1e9), "seed": (0, 1e9)}
    for field in dataclasses.fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        low, high = limits.get(name, (1e-9, 1e9))
        if field.type is not str and not low <= value <= high:  # NaN fails, too
            raise UserError(f"--{name.replace('_', '-')} {value}: use {low:g} to {high:g}")


def parse_args(argv=None) -> tuple:
    """Config of a command line, and the run directory to resume, None for a new run."""
    parser = argparse.ArgumentParser(  # SUPPRESS: a flag not given leaves no trace
        usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS, add_help=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--resume", type=Path)
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        choices = ["auto", "float32", "bfloat16"] if field.name == "dtype" else None
        parser.add_argument(flag, type=field.type, choices=choices)
    given = vars(parser.parse_args(argv))
    if "help" in given:
        import inspect
        print(inspect.getsource(Config), "\nWith a real --model these begin at", REAL_MODEL,
              "\n--resume RUN goes on with the run in that folder.")
        raise SystemExit
    run = given.pop("resume", None)
    if run is None:
        if Path(given.get("model", Config.model)).resolve() != TOY / "pipeline":
            given = REAL_MODEL | given      # that path: however it is written
        cfg = Config(**given)
        check_settings(cfg)
    else:
        try:
            fixed = given.keys() - {"epochs", "micro_batch", "model", "clap"}
            if fixed:
                raise ValueError(f"{' and '.join(sorted(fixed))} cannot change in mid-run")
            cfg = Config(**json.loads((run / "config.json").read_text()) | given)
            check_settings(cfg)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--resume {run}: not a run that can go on so: {error}") from error
    return cfg, run


def main(argv=None, reward: Callable = None) -> int:
    """A whole run. Exit code 0; 2 after one line about a mistake; 130 if stopped by Ctrl-C."""
    from filelock import FileLock, Timeout
    advice = ""
    try:
        cfg, resumed = parse_args(argv)
        run = resumed or Path(cfg.out or f"runs/seed-{cfg.seed}").expanduser()
        run.mkdir(parents=True, exist_ok=True)          # before anything slow is done
        # The lock ends with the process. Random numbers and grad mode of a caller stay as they are.
        with FileLock(run / "lock", timeout=0), torch.random.fork_rng(), torch.enable_grad():
            if not resumed and {path.name for path in run.iterdir()} != {"lock"}:
                raise UserError(f"--out {run}: not empty; use another, or --resume {run}")
            setup, metrics = open_run(cfg, run, reward)
            write_file(run / "config.json", json.dumps(vars(cfg), indent=1).encode())
            advice = f"; --resume {run} goes on"
            print(f"{run}: {setup.num_train} training, {len(setup.prompts) - setup.num_train} "
                  f"held-out prompts; U-Net on {setup.device}, {setup.dtype}", flush=True)
            train(setup, run, metrics)
            finish(setup, run, metrics)
        return 0
    except KeyboardInterrupt:
        message, code = "stopped", 130
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        message, code = " ".join(str(error).split()), 2
        if isinstance(error, Timeout):
            message = f"{run}: another process is at work in it"
        if isinstance(error, torch.OutOfMemoryError):
            advice += f"; a smaller --micro-batch than {cfg.micro_batch} needs less"
        if isinstance(error, BrokenPipeError):
            sys.stdout = sys.stderr
    print(f"clap_ppo.py: {message}{advice}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # a console may lack the letters of a path
    sys.exit(main())
