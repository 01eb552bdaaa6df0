"""Fine-tune a text-to-audio diffusion model with PPO, so that you hear what you asked for.

    python clap_ppo.py --prompts samples/prompts.txt                      # bundled toy model, CPU
    python clap_ppo.py --prompts prompts.txt --preset audioldm            # a real model, one GPU
    python clap_ppo.py --resume runs/NAME                                 # go on where it stopped

A diffusion model turns noise x_T into a clip x_0 in T denoising steps. DDIM with noise makes each
step a draw from a Gaussian, x_{t-1} ~ N(mean(x_t, prompt), sigma_t^2), so the sampler is a
stochastic policy, the step is its action, and the probability of every action is known exactly.
That is all that policy gradients need. The reward arrives once, at the end: the cosine similarity
of clip and prompt under CLAP. One epoch:

    STEP 1  choose P prompts, and for each the short window of steps in which noise is added
    STEP 2  roll out K clips per prompt; keep x_t, x_{t-1} and log pi(x_{t-1} | x_t) of noisy steps
    STEP 3  decode the clips to sound and score them with CLAP
    STEP 4  advantage: how much better a clip is than the other clips of the same prompt
    STEP 5  clipped PPO on the shuffled table of (clip, step) rows
    STEP 6  log, checkpoint; every few epochs ask a judge that was never trained against

Then base and tuned model make clips from the same noise, for prompts neither PPO nor the choice of
checkpoint has seen, and the judge says what was gained.

Notation: latents = x_t (B, C, H, W), alpha_bar_t = the cumulative product of DDPM (DDIM's paper
writes alpha_t), noise_pred = eps_theta, P prompts, K clips per prompt, B = P * K, T steps, R rows
of the table, D = C * H * W latent elements.

Where this differs from DDPO (Black et al. 2023), and why:
    1. The K clips of a prompt start from one noise x_T. The policy does not choose x_T, so its luck
       need not enter the advantage, and the path to the noisy steps is computed once per prompt.
    2. Noise is added in a short window of steps only (2 of 10), plain DDIM elsewhere. Reward
       differences within a group then come from those actions, and only those are trained. The
       windows lie early (`--noise-until`), where it is decided which sounds there will be.
       `--noise-window all --noise-until 1 --no-shared-noise` is the textbook policy, same code; the
       README compares them, and what the next two items choose, in runs of three seeds.
    3. Advantages use the statistics of this epoch's K clips of the prompt, no running buffer.
    4. The last step is sampled but not trained: its sigma is so small that its log-prob is noise.
    5. The ratio before an epoch's first update is asserted to be 1.
    6. Judged and saved is an average of the last epochs' weights (EMA): the last ones wobble.

References: DDIM, Song et al. 2021 (arXiv 2010.02502). DDPO, Black et al. 2023 (2305.13301). PPO,
Schulman et al. 2017 (1707.06347). CLAP, Wu et al. 2023 (2211.06687). LoRA, Hu et al. 2021
(2106.09685). Noise windows: MixGRPO (2507.21802); shared noise: DanceGRPO (2505.07818).
"""

import argparse
import base64
import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ==== 1. The policy: a denoising step is a Gaussian (torch only: copy it) ========================

class Schedule(NamedTuple):
    """The T denoising steps, most noise first: timesteps (T,) int64; the signal power before and
    after each step, alpha_bar_t and alpha_bar_prev (T,) float32."""
    timesteps: Tensor
    alpha_bar_t: Tensor
    alpha_bar_prev: Tensor

def ddim_schedule(scheduler, num_steps: int, device="cpu") -> Schedule:
    """The schedule of a `diffusers.DDIMScheduler` with `num_steps` steps.

    Everything is read from the scheduler, so its spacing, steps_offset and set_alpha_to_one count.
    As in diffusers, the step from t arrives at t - 1000 // T (for 1000 training steps), which is
    not always the next element of `timesteps`; below 0 it arrives at `final_alpha_cumprod`.
    """
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.cpu().long()
    previous = timesteps - scheduler.config.num_train_timesteps // num_steps
    alphas_cumprod = scheduler.alphas_cumprod.float()
    alpha_bar_prev = torch.where(previous >= 0, alphas_cumprod[previous.clamp(min=0)],
                                 scheduler.final_alpha_cumprod.float())
    return Schedule(timesteps.to(device), alphas_cumprod[timesteps].to(device),
                    alpha_bar_prev.to(device))

def ddim_sigma(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, eta) -> Tensor:
    """Standard deviation of the noise a step adds (DDIM, Eq. 16); eta 0 gives 0, eta 1 DDPM's."""
    beta = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    return eta * beta.sqrt()

def ddim_mean(model_output: Tensor, latents: Tensor, alpha_bar_t: Tensor, alpha_bar_prev: Tensor,
              sigma: Tensor, prediction_type: str = "epsilon") -> Tensor:
    """Mean of x_{t-1} given x_t (DDIM, Eq. 12), in float32 whatever the network ran in.

    Half precision here would cost more than the clip range: rounding x_t to bfloat16 moves the
    ratio by 6e-4 at the last step that is trained (2e-5 at early ones), and PPO clips at 1e-4.

    Args:
        model_output: (B, C, H, W), the network's guided output.
        latents: (B, C, H, W), x_t.
        alpha_bar_t, alpha_bar_prev, sigma: (B,) or scalars.
        prediction_type: what the network predicts, "epsilon" or "v_prediction".
    Returns: (B, C, H, W) float32.
    Raises: ValueError for another prediction_type.
    """
    model_output, latents = model_output.float(), latents.float()
    a_t, a_prev, sigma = (torch.as_tensor(x, dtype=torch.float32, device=latents.device)
                          .reshape(-1, *[1] * (latents.dim() - 1))
                          for x in (alpha_bar_t, alpha_bar_prev, sigma))
    if prediction_type == "epsilon":
        eps = model_output
        x0 = (latents - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    elif prediction_type == "v_prediction":      # v = sqrt(abar) eps - sqrt(1 - abar) x_0
        x0 = a_t.sqrt() * latents - (1 - a_t).sqrt() * model_output
        eps = a_t.sqrt() * model_output + (1 - a_t).sqrt() * latents
    else:
        raise ValueError(f"prediction_type {prediction_type!r}: not 'epsilon' or 'v_prediction'")
    # sqrt(abar_prev) x_0 + (the direction that points to x_t); the clamp guards rounding at eta 1
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * eps

def gaussian_log_prob(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Log-density of x under N(mean, sigma^2), in nats per latent element: the mean over elements.

    The mean, not the sum: a sum grows with the number of elements, D = 1,024 for the toy's clips
    and 16,384 for AudioLDM's of 5.12 s, and so would what a clip range means. exp(difference of
    means) is the D-th root of the true ratio, the length-normalised ratio of GSPO (Zheng et al.
    2025), and `clip_range` is nats per element.

    >>> gaussian_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1))    # -log(2 pi) / 2
    tensor([-0.9189])

    Args: x, mean (B, ...) float32; sigma (B,) or scalar.
    Returns: (B,).
    Raises: ValueError where sigma is 0: plain DDIM is deterministic and has no density.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    if (sigma <= 0).any():
        raise ValueError("sigma is 0 (eta 0, or the last step with set_alpha_to_one): no density")
    sigma = sigma.reshape(-1, *[1] * (x.dim() - 1))
    log_prob = -((x - mean) ** 2) / (2 * sigma ** 2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(dim=1)

def guided_prediction(unet, latents: Tensor, timesteps: Tensor, condition: dict, uncondition: dict,
                      guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): uncond + scale * (cond - uncond).

    The guided prediction *is* the policy: what was sampled with guidance is replayed with it. At
    scale 1 the unconditional pass is skipped, here and in the replay, and a step costs half.

    Args:
        unet: called as unet(latents, timesteps, **condition), returns an object with `.sample`.
        latents: (B, C, H, W) float32. timesteps: (B,) int64.
        condition, uncondition: keyword tensors with leading dimension B.
    Returns: (B, C, H, W) float32.
    """
    if guidance_scale == 1:
        return unet(latents, timesteps, **condition).sample.float()
    both = {k: v if v is None else torch.cat([uncondition[k], v]) for k, v in condition.items()}
    output = unet(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), **both).sample
    uncond, cond = output.float().chunk(2)
    return uncond + guidance_scale * (cond - uncond)


# ==== 2. Advantage and loss (torch only: copy it) ================================================

def group_advantages(rewards: Tensor, clip: float = 5.0) -> Tensor:
    """Advantage of each clip among the clips of its prompt: (r - mean) / std, clipped to +-clip.

    Per prompt, because prompts differ in difficulty by more than clips do: with global statistics
    every clip of an easy prompt would be reinforced, good or bad. A group whose rewards are all
    equal teaches nothing; its advantages are 0, and the caller drops its rows.

    >>> group_advantages(torch.tensor([[1, 2, 3], [7, 7, 7]]))
    tensor([[-1.2247,  0.0000,  1.2247],
            [ 0.0000,  0.0000,  0.0000]])

    Args: rewards (P, K), any real dtype; K >= 2 clips of each of P prompts.
    Returns: (P, K) float32.
    Raises: ValueError for another shape, K < 2 or a reward that is not finite.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, K) with K >= 2, got {tuple(rewards.shape)}")
    rewards = rewards.float()
    if not rewards.isfinite().all():
        raise ValueError("a reward is not finite")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = centred.square().mean(dim=1, keepdim=True).sqrt()
    advantages = torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(centred))
    return advantages.clamp(-clip, clip)

def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float):
    """Clipped surrogate loss of PPO (Schulman et al. 2017, Eq. 7) and what to log about it.

    ratio = pi_new / pi_old. Advantage positive: raising the ratio pays until 1 + clip_range, then
    the gradient is 0. Advantage negative: lowering it pays until 1 - clip_range. A row that moved
    the *wrong* way keeps its gradient: the minimum takes the pessimistic of both surrogates.

    Args: log_prob, old_log_prob, advantages (B,); log-probs in nats per latent element, so
        clip_range is too.
    Returns: scalar loss, and {"ratio": (B,), "approx_kl", "clip_fraction"} without gradient;
        approx_kl = mean((ratio - 1) - log ratio), which estimates KL(old, new) and is never
        negative (Schulman 2020, http://joschu.net/blog/kl-approx.html), in nats per element.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        info = {"ratio": ratio.detach(),
                "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean(),
                "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean()}
    return loss, info

def gaussian_kl(mean: Tensor, mean_base: Tensor, sigma: Tensor) -> Tensor:
    """KL of two Gaussians of equal sigma, ||mean - mean_base||^2 / (2 sigma^2), nats per element.

    Args: means (B, ...); sigma (B,). Returns: (B,).
    """
    return (mean - mean_base).square().flatten(1).mean(dim=1) / (2 * sigma ** 2)


# ==== 3. Configuration ===========================================================================

HERE = Path(__file__).resolve().parent

class UserError(ValueError):
    """A mistake of the caller's or of the environment: printed as one line, exit code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))      # one line, whatever a value contains

def option(default, help: str, *limits, choices=None):
    """A config field that becomes a command-line flag; `limits`: smallest and largest value."""
    return field(default=default, metadata={"help": help, "limits": limits, "choices": choices})

@dataclass(frozen=True)
class Config:
    """Every setting of a run; flags are made from the fields. The defaults are the toy preset's."""
    prompts: str = option("", "text file, one training prompt per line; # starts a comment line")
    eval_prompts: str = option("", "held-out prompts (default: eval_FILE beside --prompts FILE if "
                               "there is one, else every fourth training prompt)")
    preset: str = option("toy", "named set of defaults", choices=("toy", "audioldm", "audioldm2"))
    out: str = option("", "run directory, must not exist (default: runs/PRESET-1, -2, ...)")
    model: str = option("samples/toy/pipeline", "AudioLDM or AudioLDM2 pipeline: folder or hub id")
    clap: str = option("samples/toy/clap.pt", "the reward: a laion-clap checkpoint, a file or "
                       "OWNER/REPO/FILE on the hub")
    judge: str = option("samples/toy/judge", "a transformers ClapModel that is only asked, never "
                        "trained against: folder or hub id")
    seconds: float = option(2.56, "length of a clip", 0.1, 60)
    num_steps: int = option(10, "T, denoising steps per clip, usually 10 to 50", 2, 1000)
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 = none, half the cost", 1, 50)
    eta: float = option(1.0, "noise of a noisy step in units of DDPM's; without noise a step has "
                        "no probability", 1e-3, 1)
    noise_window: str = option("2", "number of consecutive noisy steps per clip, or 'all'")
    noise_until: float = option(0.4, "the windows lie in this first part of the steps", 1e-3, 1)
    shared_noise: bool = option(True, "the clips of a prompt start from one noise x_T")
    train_steps: int = option(0, "noisy steps per clip that are trained, drawn at random; 0 = all",
                              0, 1000)
    epochs: int = option(55, "rounds of rollout and update", 1, 10 ** 6)
    prompts_per_epoch: int = option(8, "P, prompts per epoch", 1, 10 ** 4)
    clips_per_prompt: int = option(16, "K; a clip's advantage is relative to the other clips of "
                                  "its prompt", 2, 1000)
    updates_per_epoch: int = option(4, "optimiser steps per pass over an epoch's rows", 1, 1000)
    passes: int = option(2, "passes over an epoch's rows, usually 1 to 4", 1, 100)
    learning_rate: float = option(2e-3, "Adam's step size for the LoRA weights", 1e-9, 1)
    warmup_updates: int = option(10, "optimiser steps over which the learning rate rises from 0: "
                                 "Adam's first steps have size lr in every weight", 0, 10 ** 6)
    clip_range: float = option(1e-4, "PPO's clip range in nats per element for D = 16,384 latents: "
                               "1.6 nats per clip; scaled by 16384 / D for others", 1e-9, 1)
    kl_weight: float = option(0.0, "weight of the KL to the base model, per element", 0, 1000)
    ema: float = option(0.9, "the judged and saved adapter averages the last epochs' weights with "
                        "this decay per epoch; 0 = the last weights", 0, 0.999)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 = never", 0, 1e6)
    lora_rank: int = option(8, "rank of the adapter's weight updates", 1, 1024)
    micro_batch: int = option(128, "clips per network call: memory, never the result", 1, 10 ** 4)
    eval_noises: int = option(4, "clips per held-out prompt, and the n of best-of-n", 1, 1000)
    judge_every: int = option(10, "epochs between questions to the judge; 0 = never", 0, 10 ** 6)
    gradient_checkpointing: bool = option(False, "less memory for more time (AudioLDM only)")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto = cuda if there is one")
    dtype: str = option("float32", "the U-Net's precision; the policy's maths is always float32",
                        choices=("float32", "bfloat16", "float16"))
    seed: int = option(0, "seed of everything random", 0, 2 ** 40)

    @property
    def window(self) -> int:
        """Length of the noise window in steps."""
        return self.num_steps if self.noise_window == "all" else int(self.noise_window)

    @property
    def clips_per_epoch(self) -> int:
        return self.prompts_per_epoch * self.clips_per_prompt


# Named sets of defaults, nothing else; any flag overrides them. For the real models: guidance is
# their pipelines' own default; fewer steps than theirs, as rollouts are the cost; a learning rate
# for a U-Net 4 to 7 times as wide as the toy's; a clip of 5.12 s has latents of D = 16,384.
REAL = dict(clap="lukewys/laion_clap/630k-audioset-best.pt", judge="laion/larger_clap_general",
            seconds=5.12, num_steps=20, guidance_scale=2.5, epochs=100, learning_rate=1e-4,
            dtype="bfloat16")
PRESETS: dict[str, dict] = {
    "toy": {},
    "audioldm": dict(REAL, model="cvssp/audioldm-s-full-v2", micro_batch=16),
    "audioldm2": dict(REAL, model="cvssp/audioldm2", guidance_scale=3.5, micro_batch=8),
}

def check_config(cfg: Config) -> Config:
    """The config itself; UserError with flag, value and remedy where a value cannot work."""
    for f in dataclasses.fields(cfg):
        value, limits = getattr(cfg, f.name), f.metadata["limits"]
        if limits and not limits[0] <= value <= limits[1]:
            raise UserError(f"--{f.name.replace('_', '-')} {value}: use {limits[0]} to {limits[1]} "
                            f"({f.metadata['help']})")
    window, trainable = cfg.noise_window, cfg.num_steps - 1      # the last step is never trained
    if window != "all" and not (window.isdecimal() and 1 <= int(window) <= trainable):
        raise UserError(f"--noise-window {window}: use 1 to {trainable}, which is --num-steps less "
                        "the last step, or 'all'")
    if cfg.train_steps > min(cfg.window, trainable):
        raise UserError(f"--train-steps {cfg.train_steps}: use at most the noisy steps that can be "
                        f"trained, {min(cfg.window, trainable)}, or 0 for all of them")
    return cfg

def parse_args(argv=None) -> tuple[Config, str]:
    """Config of a command line, and the run directory to resume ("" for a new run)."""
    def refuse(message: str):                    # one line, instead of argparse's page of usage
        raise UserError(f"{message}; --help lists all flags")
    parser = argparse.ArgumentParser(
        prog="clap_ppo.py", description=__doc__.split("\n\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100, max_help_position=32))
    parser.error = refuse
    parser.add_argument("--resume", default="", metavar="RUN", help="continue this run directory; "
                        "only --epochs, --micro-batch and --device may be given beside it")
    for f in dataclasses.fields(Config):
        text, limits, choices = (f.metadata[k] for k in ("help", "limits", "choices"))
        if f.default != "":
            text += f" (default: {f.default}" + (", {} to {})".format(*limits) if limits else ")")
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=choices, metavar=None if choices else f.type.__name__.upper())
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=text, **kind)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    resume = given.pop("resume")
    if resume:
        return resume_config(Path(resume), given), resume
    if not given.get("prompts"):
        raise UserError("--prompts FILE is missing: one prompt per line; samples/prompts.txt suits "
                        "the toy model")
    return check_config(Config(**{**PRESETS[given.get("preset", "toy")], **given})), ""

def resume_config(run: Path, given: dict) -> Config:
    """Config of an earlier run, with more epochs if asked for."""
    try:
        cfg = Config(**json.loads((run / "config.json").read_text()))
        for f in dataclasses.fields(cfg):
            if not isinstance(getattr(cfg, f.name), (int, float) if f.type is float else f.type):
                raise TypeError(f"{f.name} is no {f.type.__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume {run}: not a run directory of this program ({error})") from None
    for name in sorted(set(given) - {"epochs", "micro_batch", "device"}):
        raise UserError(f"--{name.replace('_', '-')} cannot change in a resumed run: leave it out")
    return check_config(dataclasses.replace(cfg, **given))


# ==== 4. Prompts =================================================================================

def warn(message: str) -> None:
    """One line on the error stream; the run goes on."""
    print(f"warning: {message}", file=sys.stderr)

def first_line(error: Exception) -> str:
    """The first line of a library's message, at most 200 characters."""
    if isinstance(error, pickle.UnpicklingError):        # torch's text tells how to run it anyway
        return "a file holds more than weights, which is refused because it could run code"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

def progress_bar(items, label: str):
    """tqdm over items; on a terminal only, and gone when done."""
    from tqdm import tqdm
    return tqdm(items, desc=label, leave=False, disable=not sys.stderr.isatty())

def read_prompts(path: str) -> dict[str, str]:
    """{prompt: "file, line n"} of a UTF-8 file, one prompt per line; blank lines and # skipped.

    Raises: UserError naming file and line if it is missing, not UTF-8 text, or has no prompt.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"prompt file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"prompt file {path}, line {line}: not UTF-8 text; save it so") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        prompt, here = " ".join(line.split()), f"{path}, line {number}"
        if "\0" in prompt:
            raise UserError(f"prompt file {here}: a NUL byte, so this is a binary file")
        if prompt in found:
            warn(f"{here}: the same prompt as in {found[prompt]}; they count as one")
        elif prompt and not prompt.startswith("#"):
            found[prompt] = here
    if not found:
        raise UserError(f"prompt file {path}: no prompt in it; write one per line")
    return found

def split_prompts(cfg: Config) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out prompts as `read_prompts` gives them, without a prompt in common."""
    train, file = read_prompts(cfg.prompts), Path(cfg.prompts)
    beside = file.with_name("eval_" + file.name)
    if cfg.eval_prompts or beside.exists():
        held_out = read_prompts(cfg.eval_prompts or str(beside))
        for prompt in (p for p in train if p in held_out):
            raise UserError(f"{held_out[prompt]}: this held-out prompt is a training prompt too "
                            f"({train[prompt]}); remove one of them")
        return train, held_out
    if len(train) < 8:
        raise UserError(f"{cfg.prompts} has {len(train)} prompts, too few to hold some out: "
                        "give at least 8, or --eval-prompts FILE")
    held_out = dict(list(train.items())[3::4])
    print(f"no --eval-prompts: every fourth prompt is held out ({len(held_out)} of them)")
    return {p: line for p, line in train.items() if p not in held_out}, held_out


# ==== 5. The model: a stock pipeline with a LoRA adapter =========================================

def bundled(path: str) -> str:
    """`path`, or the file of that name beside this script if there is none below here."""
    return str(HERE / path) if not Path(path).exists() and (HERE / path).exists() else path

def load_pipeline(model: str, device: torch.device):
    """AudioLDMPipeline or AudioLDM2Pipeline in float32 and eval mode, with a DDIM scheduler.

    Args: model: a folder written by `save_pretrained`, or a hub id (downloaded once, cached).
    Raises: UserError for a folder that is no pipeline, another kind of pipeline, no network, or a
        scheduler whose process is not DDIM's.
    """
    if Path(model).exists() and not Path(model, "model_index.json").is_file():
        raise UserError(f"--model {model}: no model_index.json, so not a diffusers pipeline folder")
    import_libraries()
    import diffusers
    from transformers import GPT2LMHeadModel
    parts = {}
    try:
        kind = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
        if kind == "AudioLDM2Pipeline":        # its index names GPT2Model, which cannot generate
            parts["language_model"] = GPT2LMHeadModel.from_pretrained(
                model, subfolder="language_model")
        elif kind != "AudioLDMPipeline":
            raise UserError(f"--model {model}: a {kind}; AudioLDMPipeline and AudioLDM2Pipeline "
                            "are supported")
        pipeline = getattr(diffusers, kind).from_pretrained(model, dtype=torch.float32, **parts)
    except UserError:
        raise
    except Exception as error:
        remedy = ("the folder is incomplete or damaged" if Path(model).exists() else
                  "no such folder, and the hub cannot be reached or does not know it; "
                  "the bundled model needs no network: --preset toy")
        raise UserError(f"--model {model}: {remedy} ({first_line(error)})") from None
    settings = pipeline.scheduler.config
    if ("beta_start" not in settings or settings.get("clip_sample") or settings.get("thresholding")
            or settings.prediction_type not in ("epsilon", "v_prediction")):
        name = type(pipeline.scheduler).__name__
        raise UserError(f"--model {model}: its {name} has no betas, or clips or predicts samples: "
                        "its steps are not the Gaussians of DDIM")
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(settings)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).eval().requires_grad_(False)
    return pipeline

def import_libraries() -> None:
    """Import torchaudio before those that import it in passing and hide why it failed."""
    try:
        import torchaudio  # noqa: F401
    except Exception as error:
        raise UserError(f"torchaudio does not load ({first_line(error)}); "
                        "install the versions of requirements.txt together") from None
    import diffusers
    import transformers
    for library in (diffusers, transformers):                  # one line per epoch is output enough
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="torch.meshgrid")             # laion_clap's HTSAT

@torch.no_grad()
def encode_prompts(pipeline, prompts: list[str]) -> tuple[dict, dict]:
    """The U-Net's keyword arguments for N prompts, and those of its unconditional pass.

    The one function that knows how the model is conditioned: everything after it passes the
    dictionaries on, row by row. AudioLDM: class_labels (N, E), normalised. AudioLDM2: eight states
    of its language model, the T5 states padded to the longest prompt, and their mask; one prompt at
    a time, as the language model hears the padding: also that of "", which is padded to its prompt.
    """
    device, count = pipeline.unet.device, len(prompts)
    if hasattr(pipeline, "language_model"):                     # each tensor (2, ...): "", prompt
        rows = [pipeline.encode_prompt(prompt, device, 1, True) for prompt in prompts]
        longest = max(mask.shape[1] for _, mask, _ in rows)
        both = {"encoder_hidden_states": [generated for _, _, generated in rows],
                "encoder_hidden_states_1": [F.pad(states, (0, 0, 0, longest - states.shape[1]))
                                            for states, _, _ in rows],
                "encoder_attention_mask_1": [F.pad(mask, (0, longest - mask.shape[1]))
                                             for _, mask, _ in rows]}
        both = {key: torch.stack(value) for key, value in both.items()}
        return {k: v[:, 1] for k, v in both.items()}, {k: v[:, 0] for k, v in both.items()}
    tokenizer = pipeline.tokenizer
    tokens = tokenizer([*prompts, ""], padding="max_length", truncation=True, return_tensors="pt",
                       max_length=tokenizer.model_max_length).to(device)
    embeds = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
    embeds = F.normalize(embeds.text_embeds, dim=-1)
    return ({"class_labels": embeds[:-1], "encoder_hidden_states": None},
            {"class_labels": embeds[-1:].expand(count, -1), "encoder_hidden_states": None})

def free_text_encoders(pipeline) -> None:
    """Every prompt is encoded: the encoders, which may be larger than the U-Net, can go."""
    for name in ("text_encoder", "text_encoder_2", "projection_model", "language_model"):
        if hasattr(pipeline, name):
            setattr(pipeline, name, None)
    torch.cuda.empty_cache()

def check_prompts(pipeline, model: str, prompts: dict[str, str]) -> None:
    """Warnings for prompts that the model cannot take whole: too long, or words it never saw."""
    tokenizer, file = pipeline.tokenizer, Path(model, "vocabulary.txt")
    known = set(file.read_text().split()) if file.exists() else None
    unknown = {}
    for prompt, line in prompts.items():
        ids, limit = tokenizer(prompt)["input_ids"], tokenizer.model_max_length
        if len(ids) > limit:
            warn(f"{line}: a prompt of {len(ids)} tokens is cut to {limit}; lost: "
                 f"{tokenizer.decode(ids[limit - 1:-1])!r}")
        words = "".join(c if c.isalpha() else " " for c in prompt.lower()).split()
        unknown.update((w, line) for w in words if known and w not in known)
    if unknown:
        warn(f"the bundled model never saw these words: {', '.join(sorted(unknown))} "
             f"({next(iter(unknown.values()))}); for an open vocabulary use --preset audioldm")


# The attention, as everywhere; and the layers through which an AudioLDM U-Net hears its prompt: it
# has no cross-attention to text, class_embedding feeds the time embedding of every ResNet block.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "class_embedding"]

def add_lora(unet, rank: int) -> list[torch.nn.Parameter]:
    """The trainable weights of a LoRA adapter (Hu et al. 2021) on a U-Net that is frozen itself.

    Each matrix W becomes W + B A with B zero at first, so the policy starts as the base model.
    """
    from peft import LoraConfig, inject_adapter_in_model
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)
    inject_adapter_in_model(config, unet).eval()
    return [p for p in unet.parameters() if p.requires_grad]

@contextmanager
def adapter_disabled(unet):
    """Within it the U-Net is exactly the base model: the reference policy costs no memory."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)

def adapter_state(unet) -> dict[str, Tensor]:
    """The adapter's weights, on the CPU, under the names that diffusers and peft load."""
    from peft import get_peft_model_state_dict
    return {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(unet).items()}

def load_adapter_state(unet, state: dict[str, Tensor]) -> None:
    """Put weights that `adapter_state` gave back into the U-Net."""
    from peft import set_peft_model_state_dict
    set_peft_model_state_dict(unet, state)


# ==== 6. Rollouts ================================================================================

@dataclass
class Policy:
    """What turns noise into latents, and what a replay must share with the rollout."""
    unet: torch.nn.Module
    schedule: Schedule
    prediction_type: str
    condition: dict          # U-Net keyword tensors, one row per prompt
    uncondition: dict        # the same for the pass without the prompt
    guidance_scale: float
    latent_shape: tuple      # (C, H, W)
    micro_batch: int
    dtype: torch.dtype       # the network's; everything else is float32

    @property
    def device(self) -> torch.device:
        return self.schedule.timesteps.device

def step_gaussian(policy: Policy, latents: Tensor, steps: Tensor, prompt_ids: Tensor,
                  eta) -> tuple[Tensor, Tensor]:
    """Mean (B, C, H, W) and sigma (B,) of x_{t-1}, for rows at steps (B,) of their schedules.

    Args: latents (B, C, H, W); steps, prompt_ids (B,) int64; eta (B,) or a number.
    """
    condition, uncondition = ({k: v if v is None else v[prompt_ids] for k, v in table.items()}
                              for table in (policy.condition, policy.uncondition))
    schedule = policy.schedule
    with torch.autocast(policy.device.type, policy.dtype, enabled=policy.dtype != torch.float32):
        output = guided_prediction(policy.unet, latents, schedule.timesteps[steps], condition,
                                   uncondition, policy.guidance_scale)
    alpha_bars = schedule.alpha_bar_t[steps], schedule.alpha_bar_prev[steps]
    sigma = ddim_sigma(*alpha_bars, eta)
    return ddim_mean(output, latents, *alpha_bars, sigma, policy.prediction_type), sigma

@torch.no_grad()
def denoise(policy: Policy, latents: Tensor, step: int, prompt_ids: Tensor,
            eta) -> tuple[Tensor, Tensor]:
    """`step_gaussian` of one step for any number of rows, micro-batch by micro-batch."""
    steps = torch.full((len(latents),), step, device=latents.device)
    eta = torch.as_tensor(eta, dtype=torch.float32, device=latents.device).expand(len(latents))
    parts = [step_gaussian(policy, *chunk) for chunk in
             zip(*(x.split(policy.micro_batch) for x in (latents, steps, prompt_ids, eta)))]
    return torch.cat([mean for mean, _ in parts]), torch.cat([sigma for _, sigma in parts])

def randn(policy: Policy, rows: int, generator: torch.Generator) -> Tensor:
    """Noise (rows, C, H, W), drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(rows, *policy.latent_shape, generator=generator).to(policy.device)

def rollout(policy: Policy, prompt_ids: Tensor, starts: Tensor, cfg: Config,
            generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """K clips for each of P prompts, noisy in the steps [start, start + window) of their group.

    The trunk: up to a group's window the path is plain DDIM from the group's one starting noise,
    the same for all K clips, so it is walked once. The branches: from the window on, each clip
    draws its own noise. Without shared noise every clip has its own trunk.

    Args: prompt_ids, starts (P,) int64 on the policy's device.
    Returns: finished latents (B, C, H, W), group after group; and the table of noisy steps, tensors
        with leading dimension R: latents x_t, next_latents x_{t-1}, log_prob, step, clip (its row
        in the finished latents), prompt_id.
    """
    per_trunk = cfg.clips_per_prompt if cfg.shared_noise else 1
    ids, starts = (x.repeat_interleave(cfg.clips_per_prompt // per_trunk)
                   for x in (prompt_ids, starts))
    latents = randn(policy, len(ids), generator)
    for step in range(int(starts.max())):                                           # the trunk
        at = (starts > step).nonzero().flatten()
        latents[at], _ = denoise(policy, latents[at], step, ids[at], eta=0.0)
    latents, ids, starts = (x.repeat_interleave(per_trunk, dim=0) for x in (latents, ids, starts))
    table = []
    for step in progress_bar(range(int(starts.min()), cfg.num_steps), "roll out"):  # the branches
        at = (starts <= step).nonzero().flatten()
        noisy = step < starts[at] + cfg.window
        mean, sigma = denoise(policy, latents[at], step, ids[at], eta=cfg.eta * noisy)
        latents_t, latents[at] = latents[at], mean
        at, mean, sigma = at[noisy], mean[noisy], sigma[noisy]
        noise = randn(policy, len(at), generator)
        latents[at] = mean + sigma.reshape(-1, 1, 1, 1) * noise
        if step < cfg.num_steps - 1 and len(at):         # the last step is sampled, not trained
            table.append({"latents": latents_t[noisy], "next_latents": latents[at],
                          "log_prob": gaussian_log_prob(latents[at], mean, sigma),
                          "step": torch.full_like(at, step), "clip": at, "prompt_id": ids[at]})
    return latents, {key: torch.cat([part[key] for part in table]) for key in table[0]}

def training_rows(rows: dict, advantages: Tensor, train_steps: int,
                  generator: torch.Generator) -> dict:
    """The rows to learn from, each with its clip's "advantage".

    Of each clip `train_steps` rows, drawn at random (0: all of them), without the groups in which
    every clip got the same reward.

    Args: rows: the table of `rollout`; advantages (P, K).
    Raises: UserError if no row is left.
    """
    clip = rows["clip"].cpu()
    order = (clip + torch.rand(len(clip), generator=generator)).argsort()      # clip after clip
    keep = order.view(advantages.numel(), -1)[:, :train_steps or None].flatten()
    teaches = (advantages != 0).any(dim=1).repeat_interleave(advantages.shape[1]).cpu()
    keep = keep[teaches[clip[keep]]].to(rows["clip"].device)
    if len(keep) == 0:
        raise UserError("within every prompt all clips have the same reward: nothing to learn from;"
                        " use more --clips-per-prompt, a larger --noise-window or another reward")
    rows = {key: value[keep] for key, value in rows.items()}
    return {**rows, "advantage": advantages.to(keep.device).flatten()[rows["clip"]]}

@torch.no_grad()
def sample(policy: Policy, prompt_ids: Tensor, noise: Tensor) -> Tensor:
    """Latents (B, C, H, W) of plain, deterministic DDIM from given noise: how we evaluate."""
    latents = noise
    for step in range(len(policy.schedule.timesteps)):
        latents, _ = denoise(policy, latents, step, prompt_ids, eta=0.0)
    return latents

@torch.no_grad()
def decode(pipeline, latents: Tensor, seconds: float) -> Tensor:
    """Waveforms (B, samples) float32 on the CPU in [-1, 1] of latents: VAE decoder, then vocoder.

    Four clips at a time: a vocoder's activations are large, and more made it slower, not faster.
    """
    samples = round(seconds * pipeline.vocoder.config.sampling_rate)
    parts = []
    for chunk in progress_bar(latents.split(4), "decode"):
        mel = pipeline.vae.decode(chunk / pipeline.vae.config.scaling_factor).sample
        parts.append(pipeline.mel_spectrogram_to_waveform(mel)[:, :samples].clamp(-1, 1))
    return torch.cat(parts)


# ==== 7. The reward: CLAP, made dependable =======================================================

def package_folder() -> Path:
    """Where laion_clap is installed; found without importing it, which would fetch tokenizers."""
    from importlib.util import find_spec
    return Path(find_spec("laion_clap").submodule_search_locations[0])

def build_clap(sizes: dict) -> torch.nn.Module:
    """laion_clap's own CLAP module with random weights, built without any download.

    `import laion_clap` fetches three tokenizers, and its constructor 500 MB of RoBERTa weights that
    the checkpoint then replaces. So the model classes are imported from the package's folder, under
    the name that the package itself gives them, and RoBERTa is made from its configuration.

    Args: sizes: a laion_clap model configuration (its model_configs/*.json); for other sizes than
        the published ones, with "htsat" and "roberta": keyword arguments of these two towers.
    """
    from unittest import mock
    import_libraries()
    from transformers import RobertaConfig, RobertaModel
    if str(package_folder()) not in sys.path:
        sys.path.append(str(package_folder()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from clap_module import htsat, model as clap_model
    published = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
                     layer_norm_eps=1e-5)
    roberta = RobertaConfig(**sizes.get("roberta", published))
    stand_in = SimpleNamespace(from_pretrained=lambda name: RobertaModel(roberta))
    make_htsat = clap_model.create_htsat_model
    if "htsat" in sizes:
        make_htsat = lambda audio, *_: htsat.HTSAT_Swin_Transformer(config=audio, **sizes["htsat"])
    with (mock.patch.object(clap_model, "RobertaModel", stand_in),
          mock.patch.object(clap_model, "create_htsat_model", make_htsat)):
        clap = clap_model.CLAP(sizes["embed_dim"], sizes["audio_cfg"],
                               {**sizes["text_cfg"], "model_type": "roberta"},
                               joint_embed_shape=sizes.get("joint_embed_shape", 512))
    if roberta.hidden_size != 768:             # the class knows RoBERTa's width only as a literal
        clap.text_projection[0] = torch.nn.Linear(roberta.hidden_size, clap.joint_embed_shape)
    return clap.eval().requires_grad_(False)

def find_checkpoint(checkpoint: str) -> Path:
    """The file itself, or OWNER/REPO/FILE from the hub: fetched once, with a bar, resumable."""
    from huggingface_hub import hf_hub_download
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    owner, _, rest = checkpoint.partition("/")
    repo, _, name = rest.partition("/")
    remedy = "official checkpoints such as lukewys/laion_clap/630k-audioset-best.pt are on the hub"
    if not name or Path(owner).exists():
        raise UserError(f"--clap {checkpoint}: no such file; {remedy}")
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", name))
    except (OSError, ValueError) as error:
        raise UserError(f"--clap {checkpoint}: no such file, and the hub cannot be reached or does "
                        f"not know it ({first_line(error)}); {remedy}") from None

def load_clap(checkpoint: str, tokenizer, device="cpu") -> torch.nn.Module:
    """laion_clap's CLAP with the weights of a checkpoint, and `tokenizer` attached as .tokenizer.

    Sizes come from the .json beside the file if there is one, else from the package: HTSAT-base
    for music checkpoints, HTSAT-tiny for the others.

    Raises: UserError if the file is missing, holds more than weights, lacks a weight or has one too
        many, or if the tokenizer tells two prompts apart no better than an empty one would.
    """
    import numpy as np
    path = find_checkpoint(checkpoint)
    sizes = path.with_suffix(".json")
    if not sizes.exists():
        name = "HTSAT-base.json" if path.name.startswith("music") else "HTSAT-tiny.json"
        sizes = package_folder() / "clap_module/model_configs" / name
    clap = build_clap(json.loads(sizes.read_text()))
    # The official files hold these besides weights; whatever else a file wants to make is refused.
    allowed = [np.core.multiarray.scalar, np.dtype, np.dtypes.Float64DType, argparse.Namespace]
    try:
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()}
    except Exception:
        raise UserError(f"--clap {path}: not a checkpoint of weights; it is damaged, or holds more "
                        "than weights, which is refused because it could run code") from None
    state.pop("text_branch.embeddings.position_ids", None)     # a constant that old versions saved
    wanted = clap.state_dict()
    wrong = [f"{k} is missing" for k in wanted if k not in state]
    wrong += [f"{k} is unknown" for k in state if k not in wanted]
    wrong += [f"{k} has another size" for k in wanted
              if k in state and state[k].shape != wanted[k].shape]
    if wrong:
        raise UserError(f"--clap {path}: does not fit {sizes.name}: {wrong[0]} and "
                        f"{len(wrong) - 1} more")
    clap.load_state_dict(state)
    clap.to(device).tokenizer = tokenizer
    probe = clap_text_embeds(clap, ["a dog barking", "wind blowing"])
    if (probe[0] - probe[1]).abs().max() < 1e-4:
        raise UserError("the tokenizer maps different prompts to the same tokens: its vocabulary "
                        "did not load")
    return clap

@torch.no_grad()
def clap_text_embeds(clap, prompts: list[str]) -> Tensor:
    """Normalised text embeddings (N, E), computed once per prompt and kept.

    One at a time: in a batch, the other prompts would change the last bits.
    """
    cache = clap.__dict__.setdefault("text_cache", {})
    for prompt in prompts:
        if prompt not in cache:
            tokens = clap.tokenizer([prompt], padding="max_length", truncation=True, max_length=77,
                                    return_tensors="pt")
            cache[prompt] = clap.get_text_embedding(dict(tokens))[0]
    return torch.stack([cache[prompt] for prompt in prompts])

def fit_length(waveforms: Tensor, samples: int) -> Tensor:
    """Waveforms (N, samples): longer ones keep their beginning, shorter ones repeat, then zeros.

    CLAP was trained on such "repeatpad" clips. The package crops long clips at random, which makes
    a reward that differs from call to call; the beginning is as good and always the same.
    """
    repeats = max(1, samples // waveforms.shape[1])
    waveforms = waveforms.repeat(1, repeats)[:, :samples]
    return F.pad(waveforms, (0, samples - waveforms.shape[1]))

@torch.no_grad()
def clap_audio_embeds(clap, waveforms: Tensor, sample_rate: int) -> Tensor:
    """Normalised audio embeddings (N, E) of waveforms (N, samples) in [-1, 1] at sample_rate Hz.

    Raises: ValueError for another shape, or a sample rate that no audio has: CLAP fed with audio
        at the wrong rate answers without complaint, and wrongly.
    """
    import torchaudio
    if waveforms.dim() != 2 or not waveforms.is_floating_point():
        raise ValueError(f"waveforms must be float (N, samples), got {waveforms.dtype} "
                         f"{tuple(waveforms.shape)}")
    if not isinstance(sample_rate, int) or not 8000 <= sample_rate <= 192000:
        raise ValueError(f"sample_rate {sample_rate!r} is not in Hz between 8000 and 192000")
    cfg = clap.audio_cfg
    waveforms = waveforms.float().clamp(-1, 1).to(clap.logit_scale_a.device)
    waveforms = torchaudio.functional.resample(waveforms, sample_rate, cfg.sample_rate)
    waveforms = fit_length(waveforms, cfg.clip_samples)
    embeds = [clap.audio_projection(clap.encode_audio({"waveform": x}, x.device)["embedding"])
              for x in progress_bar(waveforms.split(32), "CLAP")]
    return F.normalize(torch.cat(embeds), dim=-1)

def clap_reward(clap, waveforms: Tensor, sample_rate: int, prompts: list[str]) -> Tensor:
    """Cosine similarity in [-1, 1] of each waveform and its prompt under CLAP, (N,) on the CPU.

    Any function (waveforms (N, samples), sample_rate, prompts) -> (N,) can take its place.
    """
    audio = clap_audio_embeds(clap, waveforms, sample_rate)
    return (audio * clap_text_embeds(clap, prompts)).sum(dim=1).cpu()


# ==== 8. PPO update ==============================================================================

RATIO_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 2e-5}

def replay(policy: Policy, rows: dict, at: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob (b,), mean and sigma of the recorded actions of rows `at`, under today's weights."""
    mean, sigma = step_gaussian(policy, rows["latents"][at], rows["step"][at],
                                rows["prompt_id"][at], cfg.eta)
    return gaussian_log_prob(rows["next_latents"][at], mean, sigma), mean, sigma

def fit_micro_batch(policy: Policy, eta: float) -> None:
    """Halves `policy.micro_batch` until a step and its gradient fit into memory.

    Raises: UserError if not even one clip fits.
    """
    while True:
        rows = policy.micro_batch
        at = torch.zeros(rows, dtype=torch.int64, device=policy.device)
        try:
            latents = torch.zeros(rows, *policy.latent_shape, device=policy.device)
            step_gaussian(policy, latents, at, at, eta)[0].mean().backward()
            return
        except torch.OutOfMemoryError:
            pass                                 # outside of this block its tensors are freed
        finally:
            policy.unet.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if rows == 1:
            raise UserError("not even one clip fits into memory: use shorter --seconds, "
                            "--gradient-checkpointing or --dtype bfloat16")
        policy.micro_batch = rows // 2
        warn(f"out of memory with {rows} clips per network call; going on with {rows // 2}")

def check_on_policy(policy: Policy, rows: dict, at: Tensor, ratio: Tensor, cfg: Config) -> float:
    """Largest |ratio - 1| before the first update of an epoch: the cheapest bug detector there is.

    Nothing has been learned since the rollout, so replaying it must give the same log-probs, up to
    the rounding of another batch shape. If not, PPO would optimise an error.

    Raises: UserError that names the cause it found by trying the likely ones.
    """
    error, tolerance = (ratio - 1).abs().max().item(), RATIO_TOLERANCE[policy.dtype]
    if error <= tolerance:
        return error
    cause = "cause unknown: compare the inputs of rollout and replay row by row"
    swapped = dataclasses.replace(policy, guidance_scale=1 - policy.guidance_scale)
    trials = {"the conditional and unconditional halves are swapped": (swapped, rows)}
    for shift in (-1, 1):
        steps = (rows["step"] + shift).clamp(0, cfg.num_steps - 2)
        trials[f"the rows' timesteps are {-shift:+d} steps off"] = policy, {**rows, "step": steps}
    for name, (tried_policy, tried_rows) in trials.items():
        with torch.no_grad():
            log_prob, _, _ = replay(tried_policy, tried_rows, at, cfg)
        if ((log_prob - rows["log_prob"][at]).exp() - 1).abs().max() <= tolerance:
            cause = name
    if any(module.training for module in policy.unet.modules()):
        cause = "the U-Net is in training mode, so dropout is on: call unet.eval()"
    raise UserError(f"on-policy check: the ratio before the first update is off 1 by {error:.1e}, "
                    f"more than {tolerance:.0e} for {policy.dtype}: {cause}")

def update(policy: Policy, optimizer, rows: dict, cfg: Config, done: int,
           generator: torch.Generator) -> dict:
    """Clipped PPO on a shuffled table of rows; STEP 5.

    Args: rows: R rows of `training_rows`; done: optimiser steps made before.
    Returns: means over the rows to log, and "updates", the optimiser steps made until now.
    """
    clip_range = cfg.clip_range * 16384 / math.prod(policy.latent_shape)
    weights, count, seen = optimizer.param_groups[0]["params"], len(rows["clip"]), []
    log = dict.fromkeys(["loss", "approx_kl", "clip_fraction", "kl_base", "grad_norm"], 0.0)
    for _ in range(cfg.passes):
        order = torch.randperm(count, generator=generator).to(policy.device)
        for minibatch in progress_bar(order.chunk(cfg.updates_per_epoch), "update"):
            ratios = []
            for at in minibatch.split(policy.micro_batch):
                log_prob, mean, sigma = replay(policy, rows, at, cfg)
                loss, info = ppo_loss(log_prob, rows["log_prob"][at], rows["advantage"][at],
                                      clip_range)
                if cfg.kl_weight:
                    with torch.no_grad(), adapter_disabled(policy.unet):
                        _, mean_base, _ = replay(policy, rows, at, cfg)
                    kl_base = gaussian_kl(mean, mean_base, sigma).mean()
                    loss, info["kl_base"] = loss + cfg.kl_weight * kl_base, kl_base.detach()
                (loss * len(at) / len(minibatch)).backward()      # accumulates the minibatch's mean
                ratios.append(info.pop("ratio"))
                seen.append((len(at), {"loss": loss.detach(), **info}))
            if "ratio_error" not in log:
                ratio = torch.cat(ratios)
                log["ratio_error"] = check_on_policy(policy, rows, minibatch, ratio, cfg)
            norm = torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm or math.inf)
            if not norm.isfinite():
                raise UserError("the gradient is not finite; lower --learning-rate, or use "
                                "--dtype float32")
            log["grad_norm"] = max(log["grad_norm"], norm.item())
            done += 1
            warmup = min(1.0, done / max(1, cfg.warmup_updates))
            optimizer.param_groups[0]["lr"] = cfg.learning_rate * warmup
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for size, info in seen:            # only now: .item() in the loop would wait for the GPU
        for key, value in info.items():
            log[key] += value.item() * size / count / cfg.passes
    return {**log, "updates": done}


# ==== 9. Evaluation: never grade with the model that was trained on ==============================

def load_judge(judge: str, device="cpu"):
    """A `transformers.ClapModel` with its processor attached; trained apart from the reward."""
    from transformers import ClapModel, ClapProcessor
    try:
        model = ClapModel.from_pretrained(judge, dtype=torch.float32).to(device).eval()
        model.processor = ClapProcessor.from_pretrained(judge)
    except Exception as error:
        raise UserError(f"--judge {judge}: no ClapModel there, or no network "
                        f"({first_line(error)})") from None
    return model

@torch.no_grad()
def judge_audio_embeds(judge, waveforms: Tensor, sample_rate: int) -> Tensor:
    """Normalised audio embeddings (N, E) of waveforms (N, samples) of the judge."""
    import torchaudio
    extractor = judge.processor.feature_extractor
    rate = extractor.sampling_rate
    waveforms = torchaudio.functional.resample(waveforms, sample_rate, rate)
    waveforms = waveforms[:, :extractor.nb_max_samples]     # longer ones would be cropped at random
    embeds = []
    for chunk in waveforms.split(32):
        features = extractor(list(chunk.numpy()), sampling_rate=rate, return_tensors="pt")
        output = judge.get_audio_features(**features.to(judge.device)).pooler_output
        embeds.append(F.normalize(output.float(), dim=-1).cpu())
    return torch.cat(embeds)

class Clips(NamedTuple):
    """n clips of each of M prompts, as heard by reward and judge."""
    waveforms: Tensor        # (M, n, samples)
    reward: Tensor           # (M, n)
    judge: Tensor            # (M, n, M), cosine of each clip with *every* prompt
    embeds: Tensor           # (M, n, E), the judge's audio embeddings

def make_clips(world, prompt_ids: list[int], n: int, seed: int, label: str) -> Clips:
    """Clips of plain DDIM, scored; equal seeds give equal starting noise whatever the weights."""
    policy, prompts = world.policy, [world.prompts[i] for i in prompt_ids]
    ids = torch.tensor(prompt_ids).repeat_interleave(n)
    noise = randn(policy, len(ids), torch.Generator().manual_seed(seed))
    waveforms, rewards, embeds = [], [], []
    for at in progress_bar(torch.arange(len(ids)).split(max(policy.micro_batch, 32)), label):
        latents = sample(policy, ids[at].to(policy.device), noise[at.to(policy.device)])
        waveforms.append(decode(world.pipeline, latents, world.cfg.seconds))
        asked = [world.prompts[i] for i in ids[at].tolist()]
        rewards.append(world.reward(waveforms[-1], world.sample_rate, asked))
        embeds.append(judge_audio_embeds(world.judge, waveforms[-1], world.sample_rate))
    waveforms, rewards, embeds = (torch.cat(parts).unflatten(0, (len(prompts), n))
                                  for parts in (waveforms, rewards, embeds))
    tokens = world.judge.processor.tokenizer(prompts, padding=True, truncation=True,
                                             return_tensors="pt").to(policy.device)
    with torch.no_grad():
        texts = world.judge.get_text_features(**tokens).pooler_output.cpu()
    return Clips(waveforms, rewards, embeds @ F.normalize(texts, dim=-1).T, embeds)

def best_of(clips: Clips) -> Clips:
    """The clip of each prompt with the highest reward: what n reward calls buy untrained."""
    best = clips.reward.argmax(dim=1)
    return Clips(*(x[torch.arange(len(x)), best][:, None] for x in clips))

def per_prompt_metrics(clips: Clips) -> dict[str, Tensor]:
    """Each figure of merit as its mean over the clips of a prompt, (M,).

    recognition: the judge picks the clip's own prompt among all M (chance 1/M). diversity: mean
    pairwise cosine distance of a prompt's clips under the judge; diversity_right: the same among
    its recognised clips (NaN with fewer than two), since a model that makes mistakes is diverse.
    loudness: RMS in dB of full scale. broken: clips that are silent (below -60 dBFS) or clipped
    (1 % of samples at full scale).
    """
    own, (_, n) = torch.arange(len(clips.reward)), clips.reward.shape
    right = clips.judge.argmax(dim=-1) == own[:, None]
    loudness = 10 * clips.waveforms.square().mean(dim=-1).clamp(min=1e-12).log10()
    at_full_scale = (clips.waveforms.abs() > 0.999).float().mean(dim=-1)
    metrics = {"reward": clips.reward, "judge_score": clips.judge[own, :, own],
               "recognition": right, "loudness": loudness,
               "broken": (loudness < -60) | (at_full_scale > 0.01)}
    metrics = {name: value.float().mean(dim=1) for name, value in metrics.items()}
    distance = 1 - clips.embeds @ clips.embeds.mT
    pairs = ~torch.eye(n, dtype=torch.bool).expand_as(distance)
    right_pairs = pairs & right[:, :, None] & right[:, None, :]
    for name, chosen in (("diversity", pairs), ("diversity_right", right_pairs)):
        metrics[name] = (distance * chosen).sum(dim=(1, 2)) / chosen.sum(dim=(1, 2))
    return metrics

def bootstrap(values: Tensor, draws: int = 2000) -> dict[str, float] | None:
    """Mean over prompts and its 95 % percentile bootstrap interval; values (M,), NaNs left out."""
    values = values[~values.isnan()]
    if len(values) == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"value": values.mean().item(), "low": low, "high": high}

def wilson(successes: float, n: int) -> dict[str, float]:
    """A share with its 95 % Wilson score interval.

    >>> {k: round(v, 2) for k, v in wilson(35, 50).items()}
    {'value': 0.7, 'low': 0.56, 'high': 0.81}
    """
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    shrink = 1 + z * z / n
    return {"value": p, "low": (centre - half) / shrink, "high": (centre + half) / shrink}

def compare(base: Clips, tuned: Clips) -> dict:
    """evaluation.json: base, best-of-n and tuned, their paired differences, the preference rate.

    preference: share of same-noise pairs in which the judge scores tuned above base; ties: half.
    """
    found = {"base": per_prompt_metrics(base), "best_of_n": per_prompt_metrics(best_of(base)),
             "tuned": per_prompt_metrics(tuned)}
    found["tuned_minus_base"] = {k: found["tuned"][k] - v for k, v in found["base"].items()}
    result = {name: {k: bootstrap(v) for k, v in m.items()} for name, m in found.items()}
    own = torch.arange(len(base.judge))
    gap = tuned.judge[own, :, own] - base.judge[own, :, own]
    wins = ((gap > 0).float() + 0.5 * (gap == 0).float()).sum().item()
    return {**result, "preference": wilson(wins, gap.numel()), "n": base.reward.shape[1]}

def print_evaluation(result: dict) -> None:
    """The table base / best-of-n / tuned with 95 % intervals."""
    def show(cell):
        return "-" if cell is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**cell)
    columns = {"base": "base", "best_of_n": f"best of {result['n']}", "tuned": "tuned",
               "tuned_minus_base": "tuned - base"}
    print("\nheld-out prompts" + "".join(f"{title:>27}" for title in columns.values()))
    for name in result["base"]:
        print(f"{name:<16}" + "".join(f"{show(result[c][name]):>27}" for c in columns))
    print(f"preference: the judge prefers tuned to base in {show(result['preference'])} of pairs")


# ==== 10. Files of a run =========================================================================

ADAPTER_FILE = "adapter.safetensors"
LOAD_AUDIOLDM = """import torch
from diffusers import AudioLDMPipeline
pipe = AudioLDMPipeline.from_pretrained({model!r}, dtype=torch.float32)
pipe.unet.load_lora_adapter({folder!r}, prefix=None, weight_name={file!r})
"""
LOAD_AUDIOLDM2 = """import torch                    # diffusers' own loader does not know this U-Net
from diffusers import AudioLDM2Pipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel
language_model = GPT2LMHeadModel.from_pretrained({model!r}, subfolder="language_model")
pipe = AudioLDM2Pipeline.from_pretrained({model!r}, language_model=language_model)
config = LoraConfig(r={rank}, lora_alpha={rank}, target_modules={targets})
inject_adapter_in_model(config, pipe.unet)
set_peft_model_state_dict(pipe.unet, load_file({folder!r} + "/" + {file!r}))
"""
GENERATE = """audio = pipe(prompt, num_inference_steps={steps}, guidance_scale={guidance},
             audio_length_in_s={seconds}).audios"""

def adapter_snippet(pipeline, cfg: Config, run: Path) -> str:
    """The lines that load the run's adapter into a plain pipeline."""
    load = LOAD_AUDIOLDM2 if hasattr(pipeline, "language_model") else LOAD_AUDIOLDM
    return (load + GENERATE).format(
        model=bundled(cfg.model), folder=str(run / "adapter"), file=ADAPTER_FILE,
        rank=cfg.lora_rank, targets=LORA_TARGETS, steps=cfg.num_steps,
        guidance=cfg.guidance_scale, seconds=cfg.seconds)

def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)`, flushed, then renamed: a file is the old or the new, never half.

    Raises: OSError with the file's name, also where torch would raise RuntimeError (disk full).
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
    except RuntimeError as error:
        raise OSError(errno.EIO, first_line(error), str(path)) from None
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)

def write_json(path: Path, value) -> None:
    """`value` as JSON, written atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))

def new_run_dir(cfg: Config) -> Path:
    """The directory of a new run, created; runs/PRESET-N unless --out names it."""
    number = 1
    while Path("runs", f"{cfg.preset}-{number}").exists():
        number += 1
    run = Path(cfg.out or f"runs/{cfg.preset}-{number}")
    try:
        run.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"--out {run}: exists already; choose another name, or go on with "
                        f"--resume {run}") from None
    except OSError as error:
        raise UserError(f"--out {run}: {error.strerror}") from None
    return run

@contextmanager
def locked(run: Path):
    """Keeps other processes out of `run`; the system's lock, so it goes when this process dies."""
    with open(run / ".lock", "w") as file:
        try:
            import fcntl                         # not on Windows; there runs are not locked
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            raise UserError(f"{run}: another process is working on this run") from None
        yield

def keep_prompts(run: Path, prompts: dict[str, list[str]]) -> None:
    """prompts.json of a new run; a resumed one must have the same prompts."""
    file, text = run / "prompts.json", json.dumps(prompts, indent=1) + "\n"
    if file.exists() and file.read_text() != text:
        raise UserError(f"--resume {run}: the prompt files have changed since this run began; "
                        f"{file} lists what they were")
    write_atomically(file, lambda path: path.write_text(text))

def load_checkpoint(run: Path) -> dict:
    """What `save_checkpoint` wrote, tensors and plain values only; else the state to begin with."""
    if not (run / "checkpoint.pt").exists():
        return {"epoch": 0, "updates": 0, "best": {}, "average": {}, "metrics": []}
    try:
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"epoch", "adapter", "metrics"} <= set(state):
            raise ValueError
        return state
    except Exception:
        raise UserError(f"{run / 'checkpoint.pt'}: damaged, or more than weights, which is refused;"
                        " restore it or begin a new run") from None

def save_checkpoint(run: Path, unet, optimizer, **state) -> None:
    """checkpoint.pt, metrics.jsonl. No random state: epochs make generators from their numbers."""
    state = {"adapter": adapter_state(unet), "optimizer": optimizer.state_dict(), **state}
    write_atomically(run / "checkpoint.pt", lambda path: torch.save(state, path))
    lines = "".join(json.dumps(row) + "\n" for row in state["metrics"])
    write_atomically(run / "metrics.jsonl", lambda path: path.write_text(lines))

def save_adapter(run: Path, state: dict[str, Tensor], snippet: str) -> None:
    """The LoRA weights as `adapter/adapter.safetensors`, and how to load them beside it."""
    from safetensors.torch import save_file
    (run / "adapter").mkdir(exist_ok=True)
    write_atomically(run / "adapter" / ADAPTER_FILE, lambda path: save_file(state, path))
    write_atomically(run / "adapter/load.py", lambda path: path.write_text(snippet + "\n"))

def mel_picture(waveform: Tensor, sample_rate: int, bands: int = 32, frames: int = 48) -> str:
    """Mel spectrogram of a waveform (samples,), 60 dB deep: base64 of 4 bits a cell, by columns."""
    import torchaudio
    filters = torchaudio.functional.melscale_fbanks(513, 0, sample_rate / 2, bands, sample_rate)
    hop = math.ceil(len(waveform) / frames)
    spectrum = torch.stft(waveform, 1024, hop, window=torch.hann_window(1024), return_complex=True)
    decibels = 20 * (filters.T @ spectrum.abs()[:, :frames]).clamp(min=1e-6).log10()
    levels = ((decibels - decibels.max() + 60) / 4).clamp(0, 15).round().byte().T.flatten()
    return base64.b64encode((levels[::2] * 16 + levels[1::2]).numpy().tobytes()).decode()

def save_clips(run: Path, base: Clips, tuned: Clips, prompts: list[str], rate: int) -> list[dict]:
    """Each prompt's first clip of base and tuned as WAV in clips/; rows that say which is which.

    In the blind test nothing may give a side away: files are named by a hash of what is in them,
    and the louder clip of a pair is turned down to the RMS of the other.
    """
    import soundfile
    (run / "clips").mkdir(exist_ok=True)
    rows = []
    for i, prompt in enumerate(prompts):
        rows.append({"prompt": prompt})
        pair = {"base": base, "tuned": tuned}
        rms = {side: c.waveforms[i, 0].square().mean().sqrt().item() for side, c in pair.items()}
        level = max(min(rms.values()), 0.01)             # silence does not silence the other clip
        for side, clips in pair.items():
            waveform = clips.waveforms[i, 0] * min(1.0, level / max(rms[side], 1e-6))
            name = f"clips/{hashlib.sha256(waveform.numpy().tobytes()).hexdigest()[:16]}.wav"
            soundfile.write(run / name, waveform.numpy(), rate)
            rows[-1][side] = {"file": name, "mel": mel_picture(waveform, rate),
                              "reward": round(clips.reward[i, 0].item(), 4),
                              "judge": round(clips.judge[i, 0, i].item(), 4)}
    return rows

def save_page(run: Path, cfg: Config, rows: list[dict], result: dict, metrics: list,
              rate: int) -> None:
    """index.html, the page of `samples/listen.html`, and data.js, what it shows of this run."""
    facts = {"model": cfg.model, "reward": cfg.clap, "judge": cfg.judge, "seed": cfg.seed,
             "epochs": cfg.epochs, "clips": f"{cfg.eval_noises} per prompt in the table"}
    toy = "the small bundled model of synthetic sounds" if cfg.model == Config.model else cfg.model
    identity = hashlib.sha256(json.dumps([r["prompt"] for r in rows]).encode()).hexdigest()[:12]
    data = {"name": run.name, "id": f"{run.name}-{identity}", "facts": facts, "rows": rows,
            "about": f"Held-out prompts, by {toy}: the original and the fine-tuned model from the "
                     "same starting noise, played equally loud.",
            "seconds": cfg.seconds, "sample_rate": rate, "evaluation": result, "metrics": [
                {k: r[k] for k in ("epoch", "reward", "judge_score") if k in r} for r in metrics]}
    script = f"window.CLAP_PPO_RUN = {json.dumps(data)};\n"
    write_atomically(run / "data.js", lambda path: path.write_text(script))
    html = (HERE / "samples/listen.html").read_bytes()
    write_atomically(run / "index.html", lambda path: path.write_bytes(html))

def save_curve(run: Path, metrics: list[dict]) -> None:
    """curve.png: the reward on training prompts by epoch, and what the judge says of it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot([r["epoch"] for r in metrics], [r["reward"] for r in metrics], label="reward (CLAP)")
    asked = [r for r in metrics if "judge_score" in r]
    axes.plot([r["epoch"] for r in asked], [r["judge_score"] for r in asked], "o-",
              label="judge, plain DDIM")
    axes.set(xlabel="epoch", ylabel="cosine of clip and prompt")
    axes.legend()
    write_atomically(run / "curve.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    plt.close(figure)


# ==== 11. The run ================================================================================

def make_policy(pipeline, condition: dict, uncondition: dict, cfg: Config) -> Policy:
    """The policy of a pipeline's U-Net and scheduler, for prompts as `encode_prompts` has them."""
    unet, vocoder = pipeline.unet, pipeline.vocoder.config
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    frames = cfg.seconds * vocoder.sampling_rate / math.prod(vocoder.upsample_rates)
    return Policy(
        unet=unet, schedule=ddim_schedule(pipeline.scheduler, cfg.num_steps, unet.device),
        prediction_type=pipeline.scheduler.config.prediction_type,
        condition=condition, uncondition=uncondition, guidance_scale=cfg.guidance_scale,
        micro_batch=cfg.micro_batch, dtype=getattr(torch, cfg.dtype), latent_shape=(
            unet.config.in_channels, math.ceil(frames / factor), vocoder.model_in_dim // factor))

def make_optimizer(policy: Policy, cfg: Config) -> torch.optim.Optimizer:
    """AdamW on the weights of a new LoRA adapter; the micro-batch is cut to what memory allows."""
    torch.manual_seed(cfg.seed)                  # LoRA's A matrices are random
    optimizer = torch.optim.AdamW(add_lora(policy.unet, cfg.lora_rank), lr=cfg.learning_rate,
                                  weight_decay=1e-4)
    if cfg.gradient_checkpointing:
        if type(policy.unet).__name__ != "UNet2DConditionModel":
            raise UserError("--gradient-checkpointing: diffusers' AudioLDM2 U-Net loses its masks "
                            "with it; leave it out and lower --micro-batch")
        policy.unet.enable_gradient_checkpointing()
    if policy.device.type == "cuda":
        fit_micro_batch(policy, cfg.eta)
    return optimizer

def find_device(name: str) -> torch.device:
    """The device of that name, if it is there; "auto": the GPU if there is one."""
    try:
        device = torch.device(name if name != "auto" else
                              "cuda" if torch.cuda.is_available() else "cpu")
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {first_line(error)}; use cpu or auto") from None

def load_world(cfg: Config) -> SimpleNamespace:
    """All that a run needs, loaded and checked."""
    train, held_out = split_prompts(cfg)
    device = find_device(cfg.device)
    pipeline = load_pipeline(bundled(cfg.model), device)
    check_prompts(pipeline, bundled(cfg.model), {**train, **held_out})
    clap = load_clap(bundled(cfg.clap), pipeline.tokenizer, device)
    judge = load_judge(bundled(cfg.judge), device)
    prompts = [*train, *held_out]
    policy = make_policy(pipeline, *encode_prompts(pipeline, prompts), cfg)
    free_text_encoders(pipeline)
    return SimpleNamespace(
        cfg=cfg, prompts=prompts, train_ids=list(range(len(train))),
        held_out_ids=list(range(len(train), len(prompts))), pipeline=pipeline, policy=policy,
        reward=lambda *args: clap_reward(clap, *args), judge=judge,
        sample_rate=pipeline.vocoder.config.sampling_rate, optimizer=make_optimizer(policy, cfg))

def train(world, run: Path, state: dict) -> dict:
    """The PPO loop, STEP 1 to 6, from `state["epoch"]` on. Returns the best adapter's record."""
    cfg, policy, optimizer = world.cfg, world.policy, world.optimizer
    metrics, updates, best, average = (state[k] for k in ("metrics", "updates", "best", "average"))
    for epoch in range(state["epoch"], cfg.epochs):
        began = time.time()
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
        prompt_ids, starts = choose_prompts(world, generator)                             # STEP 1
        latents, rows = rollout(policy, prompt_ids, starts, cfg, generator)               # STEP 2
        rewards = score(world, latents, prompt_ids)                                       # STEP 3
        advantages = group_advantages(rewards)                                            # STEP 4
        rows = training_rows(rows, advantages, cfg.train_steps, generator)
        info = update(policy, optimizer, rows, cfg, updates, generator)                   # STEP 5
        updates = info.pop("updates")
        decay = min(cfg.ema, epoch / (epoch + 1))            # a plain mean at first
        average = {k: v.lerp(average.get(k, v), decay)
                   for k, v in adapter_state(policy.unet).items()}
        row = {"epoch": epoch + 1, "reward": rewards.mean().item(),                       # STEP 6
               "reward_spread": rewards.std(dim=1).mean().item(), **info,
               "lr": optimizer.param_groups[0]["lr"], "seconds": round(time.time() - began, 2)}
        if cfg.judge_every and (epoch + 1 == cfg.epochs or (epoch + 1) % cfg.judge_every == 0):
            row.update(ask_judge(world, average))
            best = keep_best(best, row, average)
        metrics.append(row)
        print_epoch(row, cfg)
        save_checkpoint(run, policy.unet, optimizer, epoch=epoch + 1, updates=updates, best=best,
                        average=average, metrics=metrics)
    return best or {"epoch": cfg.epochs, "adapter": average}

def choose_prompts(world, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts (P,) of an epoch without repeats, and the first noisy step (P,) of each group."""
    cfg, device = world.cfg, world.policy.device
    order = torch.randperm(len(world.train_ids), generator=generator)
    rounds = math.ceil(cfg.prompts_per_epoch / len(order))
    ids = order.repeat(rounds)[:cfg.prompts_per_epoch]
    end = min(cfg.num_steps - 1, round(cfg.noise_until * cfg.num_steps))
    starts = torch.randint(max(0, end - cfg.window) + 1, ids.shape, generator=generator)
    return ids.to(device), starts.to(device)

def score(world, latents: Tensor, prompt_ids: Tensor) -> Tensor:
    """Rewards (P, K) of the finished latents (P * K, C, H, W)."""
    clips = world.cfg.clips_per_prompt
    waveforms = decode(world.pipeline, latents, world.cfg.seconds)
    prompts = [world.prompts[i] for i in prompt_ids.tolist() for _ in range(clips)]
    rewards = world.reward(waveforms, world.sample_rate, prompts)
    for prompt, reward, waveform in zip(prompts, rewards.tolist(), waveforms):
        if not math.isfinite(reward):
            file = world.run / "not-finite.pt"
            torch.save({"prompt": prompt, "waveform": waveform}, file)
            raise UserError(f"a clip of {prompt!r} has the reward {reward} (saved as {file}): did "
                            "the decoder overflow? Use --dtype float32")
    return rewards.view(len(prompt_ids), clips)

def ask_judge(world, adapter: dict) -> dict:
    """Judge and reward of an adapter's plain DDIM clips of training prompts, from fixed noise."""
    unet, current = world.policy.unet, adapter_state(world.policy.unet)
    load_adapter_state(unet, adapter)
    clips = make_clips(world, world.train_ids[:96], 1, world.cfg.seed + 77, "judge")
    load_adapter_state(unet, current)
    metrics = per_prompt_metrics(clips)
    return {"judge_score": metrics["judge_score"].mean().item(),
            "monitor_reward": metrics["reward"].mean().item()}

def keep_best(best: dict, row: dict, adapter: dict) -> dict:
    """The record with the highest judge score; says when the reward rises while the judge falls."""
    if not best or row["judge_score"] >= best["judge_score"]:
        return {**{k: row[k] for k in ("epoch", "judge_score", "monitor_reward")},
                "adapter": adapter}
    if row["monitor_reward"] > best["monitor_reward"]:
        warn(f"epoch {row['epoch']}: since epoch {best['epoch']} the reward rose but the judge "
             "fell: over-optimisation; that epoch's adapter is kept")
    return best

def print_totals(world, run: Path) -> None:
    """What the settings amount to, before the first minute is spent."""
    cfg, shape = world.cfg, world.policy.latent_shape
    trained = sum(p.numel() for p in world.optimizer.param_groups[0]["params"])
    print(f"{len(world.train_ids)} training prompts, {len(world.held_out_ids)} held out; run "
          f"directory {run}\n{cfg.epochs} epochs x {cfg.prompts_per_epoch} prompts x "
          f"{cfg.clips_per_prompt} clips = {cfg.epochs * cfg.clips_per_epoch} clips; "
          f"{cfg.passes * cfg.updates_per_epoch} updates per epoch\n"
          f"{trained:,} trainable parameters; latents {shape}, so the clip range is "
          f"{cfg.clip_range * 16384 / math.prod(shape):.1e} nats per element", flush=True)

def print_epoch(row: dict, cfg: Config) -> None:
    """One aligned line per epoch."""
    judge = f"  judge {row['judge_score']:.3f}" if "judge_score" in row else ""
    print(f"epoch {row['epoch']:>{len(str(cfg.epochs))}}/{cfg.epochs}  reward {row['reward']:.3f}  "
          f"spread {row['reward_spread']:.3f}  kl {row['approx_kl']:.1e}  clipped "
          f"{row['clip_fraction']:.2f}  grad {row['grad_norm']:.1e}  {row['seconds']:.1f} s{judge}",
          flush=True)

def run(cfg: Config, resume: str) -> None:
    """A whole run: load, train, evaluate, write everything."""
    world = load_world(cfg)
    world.run = Path(resume) if resume else new_run_dir(cfg)
    with locked(world.run):
        count = len(world.train_ids)
        keep_prompts(world.run, {"train": world.prompts[:count], "held_out": world.prompts[count:]})
        write_json(world.run / "config.json", dataclasses.asdict(cfg))
        state = load_checkpoint(world.run)
        if state["epoch"]:
            load_adapter_state(world.policy.unet, state["adapter"])
            world.optimizer.load_state_dict(state["optimizer"])
            print(f"resuming after epoch {state['epoch']}")
        print_totals(world, world.run)
        evaluate(world, world.run, train(world, world.run, state), state["metrics"])

def evaluate(world, run_dir: Path, best: dict, metrics: list[dict]) -> None:
    """Base and best adapter from the same noise; writes all files but the checkpoint."""
    cfg, unet = world.cfg, world.policy.unet
    load_adapter_state(unet, best["adapter"])
    why = ", which the judge likes best" if cfg.judge_every else ""
    print(f"evaluating the adapter of epoch {best['epoch']}{why}", flush=True)
    settings = world.held_out_ids, cfg.eval_noises, cfg.seed + 999
    tuned = make_clips(world, *settings, "tuned")
    with adapter_disabled(unet):
        base = make_clips(world, *settings, "base")
    result = compare(base, tuned)
    write_json(run_dir / "evaluation.json", result)
    snippet = adapter_snippet(world.pipeline, cfg, run_dir)
    save_adapter(run_dir, best["adapter"], snippet)
    save_curve(run_dir, metrics)
    print_evaluation(result)
    held_out = world.prompts[len(world.train_ids):]
    rows = save_clips(run_dir, base, tuned, held_out, world.sample_rate)
    save_page(run_dir, cfg, rows, result, metrics, world.sample_rate)
    print(f"\nlisten: {run_dir / 'index.html'}   curve: {run_dir / 'curve.png'}   the adapter:\n"
          f"{snippet}")

class Stopped(KeyboardInterrupt):
    """Raised by SIGINT (Ctrl-C) and SIGTERM, whose number is its argument."""

def stop(number: int, frame) -> None:
    """Signal handler: stops at once, since finished epochs are on disk; a second signal kills."""
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number)

def main(argv=None) -> int:
    """Exit code: 0; 2 after one line about a mistake or a full disk; 128 + signal if stopped."""
    try:
        run(*parse_args(argv))
        return 0
    except UserError as error:
        print(f"clap_ppo.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"clap_ppo.py: {error.filename or 'a file'}: {error.strerror or error}; what was "
              "saved before is intact, --resume goes on from it", file=sys.stderr)
        return 2
    except Stopped as signal_:
        print("\nclap_ppo.py: stopped; finished epochs are saved, --resume RUN goes on from the "
              "last one", file=sys.stderr)
        return 128 + signal_.args[0]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.exit(main())
