# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11,<2.15", "torchaudio>=2.11,<2.12", "torchvision>=0.26,<0.29.2",
#     "diffusers>=0.41,<0.43", "transformers>=5.17,<6", "laion-clap==1.1.7", "peft>=0.21,<0.22",
#     "accelerate>=1.10", "soundfile>=0.12", "matplotlib>=3.8", "tqdm>=4.66",
# ]
# [tool.uv]
# override-dependencies = ["numpy>=2"]   # laion-clap's numpy<2 has no wheels for Python 3.13
# ///
"""Fine-tune a text-to-audio diffusion model with PPO, so that you hear what you asked for.

    python clap_ppo.py --prompts samples/prompts.txt                      # bundled toy model, CPU
    python clap_ppo.py --prompts prompts.txt --preset audioldm            # a real model, one GPU
    python clap_ppo.py --resume runs/NAME                                 # go on where it stopped

`uv run` in place of `python` first installs what the script needs.

A diffusion model turns noise x_T into a clip x_0 in T denoising steps. DDIM with noise makes each
step a draw from a Gaussian, x_{t-1} ~ N(mean(x_t, prompt), sigma_t^2), so the sampler is a
stochastic policy, the step is its action, and the probability of every action is known exactly.
That is all that policy gradients need. The reward arrives once, at the end: the cosine similarity
of clip and prompt under CLAP. One epoch:

    STEP 1  choose P prompts, and for each the step (or a few of them) in which noise is added
    STEP 2  roll out K clips per prompt; keep x_t, x_{t-1} and log pi(x_{t-1} | x_t) of noisy steps
    STEP 3  decode the clips to sound and score them with CLAP
    STEP 4  advantage: how much better a clip is than the other clips of the same prompt
    STEP 5  clipped PPO on the shuffled table of (clip, step) rows
    STEP 6  log, checkpoint; every few epochs, score plain DDIM clips of held-out prompts

Then base and tuned model play the held-out prompts from the same noise, to compare by ear.

Notation: latents = x_t (B, C, H, W), alpha_bar_t = the cumulative product of DDPM (DDIM's paper
writes alpha_t), noise_pred = eps_theta, P prompts, K clips per prompt, B = P * K, T steps, R rows
of the table, D = C * H * W latent elements.

Where this differs from DDPO (Black et al. 2023), and why:
    1. The K clips of a prompt start from one noise x_T. The policy does not choose x_T, so its luck
       need not enter the advantage.
    2. Noise is added in one early step, where it is decided which sounds there will be; the others
       are plain DDIM. Reward differences within a group then come from this one action, and only
       it is trained. Its x_t is the same for all K clips, so the U-Net answers once for all of
       them. The textbook policy is the same code with `--noise-window 10 --no-shared-noise`.
    3. Advantages use the statistics of this epoch's K clips of the prompt, no running buffer.
    4. The policy is trained without classifier-free guidance, at half the cost; its KL term pulls
       it to the base model *with* guidance: PPO for what the reward knows, a pull to what guidance
       knows already.
    5. The last step is sampled but not trained: its sigma is so small that its log-prob is noise.
    6. The ratio before an epoch's first update is asserted to be 1.
    7. Played and kept is an average of the last epochs' weights (EMA): the last ones wobble.

References: DDIM, Song et al. 2021 (arXiv 2010.02502). DDPO, Black et al. 2023 (2305.13301). PPO,
Schulman et al. 2017 (1707.06347). CLAP, Wu et al. 2023 (2211.06687). LoRA, Hu et al. 2021
(2106.09685). Noise windows: MixGRPO (2507.21802); shared noise: DanceGRPO (2505.07818).
"""

import argparse
import dataclasses
import html
import json
import math
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

progress = partial(tqdm, leave=False, disable=None)      # on a terminal only, gone when done

# ==== 1. The policy: a denoising step is a Gaussian (torch only: copy it) ========================

def ddim_schedule(scheduler, num_steps: int, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """T denoising steps, most noise first: timesteps, alpha_bar_t, alpha_bar_prev, each (T,).

    timesteps (int64) are what the network is told; alpha_bar_t and alpha_bar_prev (float32) are the
    shares of signal power in x_t and in x_{t-1}. scheduler: a `diffusers.DDIMScheduler`.
    """
    scheduler.set_timesteps(num_steps)         # its spacing, steps_offset, set_alpha_to_one count
    timesteps = scheduler.timesteps.cpu().long()
    # As in diffusers, the step from t arrives at t - 1000 // T, for 1000 training steps. That is
    # not always the next element of `timesteps`: 7 steps do not divide 1000.
    previous = timesteps - scheduler.config.num_train_timesteps // num_steps
    # The last step arrives below 0. With set_alpha_to_one that means no noise at all, and sigma 0;
    # AudioLDM's scheduler arrives at the first training step's little noise instead.
    abar, last = scheduler.alphas_cumprod.float(), scheduler.final_alpha_cumprod.float()
    alpha_bar_prev = torch.where(previous >= 0, abar[previous.clamp(min=0)], last)
    return timesteps.to(device), abar[timesteps].to(device), alpha_bar_prev.to(device)

def ddim_sigma(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, eta) -> Tensor:
    """Standard deviation of the noise that a step adds (DDIM, Eq. 16)."""
    # sigma = eta sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev)
    # eta 0 is plain DDIM, eta 1 adds as much noise as DDPM. A tensor gives each row its own eta,
    # which is how a noise window is made.
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    return eta * variance.sqrt()

def ddim_mean(model_output: Tensor, latents: Tensor, alpha_bar_t: Tensor, alpha_bar_prev: Tensor,
              sigma: Tensor, prediction_type: str = "epsilon") -> Tensor:
    """Mean (B, C, H, W) of x_{t-1} given x_t (DDIM, Eq. 12), in float32.

    model_output, latents (B, C, H, W); the other tensors (B,) or scalars; prediction_type is what
    the network predicts, "epsilon" or "v_prediction".
    """
    assert prediction_type in ("epsilon", "v_prediction"), f"cannot use {prediction_type!r}"
    # Whatever the network ran in: rounding x_t to bfloat16 moves the ratio by 6e-4 at the last step
    # that is trained (2e-5 at early ones), and PPO clips at 1e-4.
    model_output, latents = model_output.float(), latents.float()
    a_t, a_prev, sigma = (torch.as_tensor(x, device=latents.device).float().reshape(-1, 1, 1, 1)
                          for x in (alpha_bar_t, alpha_bar_prev, sigma))     # (B,) -> (B, 1, 1, 1)
    # x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps: the network tells one of the two, solve for both.
    if prediction_type == "epsilon":
        eps = model_output
        x0 = (latents - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    else:                                        # it predicts v = sqrt(abar) eps - sqrt(1-abar) x_0
        x0 = a_t.sqrt() * latents - (1 - a_t).sqrt() * model_output
        eps = a_t.sqrt() * model_output + (1 - a_t).sqrt() * latents
    # mean = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - sigma^2) eps: less noise than in x_t, in its
    # direction; the variance that is missing, sigma^2, will be drawn anew. The clamp guards against
    # rounding at eta 1.
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * eps

def gaussian_log_prob(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Log-density (B,) of x under N(mean, sigma^2), in nats per latent element.

    >>> gaussian_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1))    # -log(2 pi) / 2
    tensor([-0.9189])

    x, mean (B, ...) float32; sigma (B,) or scalar, above 0.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    # Plain DDIM is deterministic: what it does has no density, only certainty.
    assert (sigma > 0).all(), "sigma is 0 (eta 0, or the last step with set_alpha_to_one)"
    sigma = sigma.reshape(-1, *[1] * (x.dim() - 1))
    # log N = -(x - mean)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2, for each element
    log_prob = -((x - mean) ** 2) / (2 * sigma ** 2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    # The mean over the D elements, not their sum. A sum grows with D, 1,024 for the toy's clips and
    # 16,384 for AudioLDM's of 5.12 s, and with it what a clip range means. exp(difference of means)
    # is the D-th root of the true ratio: GSPO's length-normalised ratio (Zheng et al. 2025).
    return log_prob.flatten(1).mean(dim=1)

def guided_prediction(unet, latents: Tensor, timesteps: Tensor, condition: dict, uncondition: dict,
                      guidance_scale: float) -> Tensor:
    """Prediction (B, C, H, W) with classifier-free guidance (Ho & Salimans 2022), in float32.

    unet(latents, timesteps, **condition) returns an object with `.sample`; latents (B, C, H, W),
    timesteps (B,); condition and uncondition are keyword tensors with leading dimension B.
    """
    # The *guided* prediction is the policy: what was sampled with guidance is replayed with it.
    if guidance_scale == 1:                      # the unconditional part cancels out: half the cost
        return unet(latents, timesteps, **condition).sample.float()
    both = {k: v if v is None else torch.cat([uncondition[k], v]) for k, v in condition.items()}
    output = unet(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), **both).sample
    uncond, cond = output.float().chunk(2)
    return uncond + guidance_scale * (cond - uncond)        # from uncond towards cond, and past it

# ==== 2. Advantage and loss (torch only: copy it) ================================================

def group_advantages(rewards: Tensor, clip: float = 5.0, floor: float = 0.1) -> Tensor:
    """How much better each clip is than the other clips of its prompt, in standard deviations.

    >>> group_advantages(torch.tensor([[1, 2, 3], [7, 7, 7]]))
    tensor([[-1.2247,  0.0000,  1.2247],
            [ 0.0000,  0.0000,  0.0000]])

    (P, K) rewards of K >= 2 clips for each of P prompts -> (P, K) float32, clipped to +-clip.
    A deviation below `floor` counts as `floor`, in units of the reward.
    """
    assert rewards.dim() == 2 and rewards.shape[1] >= 2, f"not (P, K >= 2): {tuple(rewards.shape)}"
    rewards = rewards.float()                    # a reward may count stars
    assert rewards.isfinite().all(), "a reward is not finite"        # it would spread to its group
    # Among the clips of one prompt, since prompts differ in difficulty by more than their clips do:
    # with one mean for all, whatever an easy prompt gave would be reinforced, bad clips included.
    centred = rewards - rewards.mean(dim=1, keepdim=True)            # (P, K) - (P, 1)
    std = centred.square().mean(dim=1, keepdim=True).sqrt()          # of these K clips, not K - 1
    # Clips that are all nearly alike say little, but divided by a tiny deviation their differences,
    # CLAP's noise, would count as much as those between a right and a wrong clip: hence the floor.
    return (centred / std.clamp(min=floor)).clamp(-clip, clip)   # no lucky clip owns the update

def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float):
    """Clipped surrogate loss of PPO (Schulman et al. 2017, Eq. 7), and what to log about it.

    log_prob, old_log_prob, advantages (B,), log-probs in nats per latent element. Returns a scalar,
    and {"ratio": (B,), "approx_kl", "clip_fraction"} without gradient.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()                      # pi_new / pi_old, 1 before the first update
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    # Advantage > 0: raising the ratio pays until 1 + clip_range, then the gradient is 0. Below 0:
    # lowering it pays until 1 - clip_range. The minimum is the pessimistic of both: a row that
    # moved the *wrong* way, a good action that became rare, keeps its gradient.
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        # KL(old, new) = E_old[-log ratio]; adding ratio - 1, whose mean is 0, makes every term
        # non-negative (Schulman 2020, joschu.net/blog/kl-approx.html). expm1: at a log-ratio of
        # 1e-4 float32 would lose the 5e-9 that is left of the difference.
        info = {"ratio": ratio.detach(),
                "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean(),
                "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean()}
    return loss, info

def gaussian_kl(mean: Tensor, mean_base: Tensor, sigma: Tensor) -> Tensor:
    """KL (B,) of two Gaussians of equal sigma (B,), means (B, ...), in nats per latent element."""
    # ||mean - mean_base||^2 / (2 sigma^2): exact, where approx_kl above is an estimate.
    return (mean - mean_base).square().flatten(1).mean(dim=1) / (2 * sigma ** 2)

# ==== 3. Configuration ===========================================================================

HERE = Path(__file__).resolve().parent

# What nobody needs to turn. What one may want to turn is a field of Config, and so a flag.
ETA = 1.0                  # noise of a noisy step in units of DDPM's; with less, less is explored
WARMUP_UPDATES = 10        # Adam's first steps have size lr in every weight, so lr rises from 0
MAX_GRAD_NORM = 1.0        # an emergency brake: healthy norms are a hundred times smaller
EMA_DECAY = 0.9            # per epoch: what is kept averages the last ten or so
EVAL_EVERY = 25            # epochs between looks at the held-out prompts, and between snapshots
EVAL_NOISES = 2            # clips of each held-out prompt, from the same noises at each look

class UserError(ValueError):
    """A mistake of the caller's or of the environment: printed as one line, exit code 2."""

def option(default, help: str, *limits):
    """A config field that becomes a flag; limits: smallest and largest number, or all choices."""
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})

@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run; flags are made from the fields. The defaults are the toy preset's."""
    # what from, what to
    prompts: str = option("prompts.txt", "one training prompt per line; # starts a comment line")
    eval_prompts: str = option("", "held-out prompts; without, eval_FILE beside FILE, or a quarter")
    preset: str = option("toy", "named set of defaults", "toy", "audioldm", "audioldm2")
    out: str = option("", "run directory, must not exist; without, runs/PRESET-1, -2, ...")
    model: str = option("samples/toy/pipeline", "AudioLDM or AudioLDM2 pipeline: folder or hub id")
    clap: str = option("samples/toy/clap.pt", "the reward, a laion-clap file, or OWNER/REPO/FILE")
    # the policy and its rollouts
    seconds: float = option(2.56, "length of a clip; CLAP hears 10 s", 0.1, 10)
    num_steps: int = option(10, "T, denoising steps per clip, usually 10 to 50", 2, 999)
    noise_window: int = option(1, "consecutive noisy steps per clip; T or more: all", 1, 999)
    noise_until: float = option(0.3, "they lie in this first part of the steps", 1e-3, 1)
    shared_noise: bool = option(True, "the clips of a prompt start from one noise x_T")
    # PPO
    epochs: int = option(100, "rounds of rollout and update", 1, 10 ** 6)
    prompts_per_epoch: int = option(16, "P, prompts per epoch", 1, 10 ** 4)
    clips_per_prompt: int = option(8, "K, clips per prompt, compared with each other", 2, 1000)
    updates_per_epoch: int = option(4, "optimiser steps, each on its share of the rows", 1, 1000)
    learning_rate: float = option(4e-3, "Adam's step size for the LoRA weights", 1e-9, 1)
    clip_range: float = option(1e-4, "PPO's, in nats per element of D = 16,384 latents", 1e-9, 1)
    kl_weight: float = option(0.05, "weight of the KL to the base model, per element", 0, 1000)
    kl_guidance: float = option(5.0, "classifier-free guidance of that base model", 1, 50)
    eval_guidance: float = option(2.0, "guidance of what is played; 1 = none, half the cost", 1, 50)
    lora_rank: int = option(8, "rank of the adapter's weight updates", 1, 1024)
    # the machine
    micro_batch: int = option(128, "clips per network call: memory, never the result", 1, 10 ** 4)
    device: str = option("auto", "auto: the GPU if there is one", "auto", "cpu")
    dtype: str = option("float32", "of the U-Net alone", "float32", "bfloat16", "float16")
    seed: int = option(0, "seed of everything random", 0, 2 ** 40)

    def __post_init__(self):
        """UserError with flag, value and remedy where a value cannot work."""
        for f in dataclasses.fields(self):
            value, limits = getattr(self, f.name), f.metadata["limits"]
            text = isinstance(value, str)      # a number's limits refuse NaN too
            if limits and not (value in limits if text else limits[0] <= value <= limits[1]):
                wanted = (" or " if text else " to ").join(map(str, limits))
                raise UserError(f"--{f.name.replace('_', '-')} {value}: use {wanted}")

# Named sets of defaults, nothing else; any flag overrides them. For the real models: both guidances
# are their pipelines' default; fewer steps than theirs, as rollouts are the cost; a learning rate
# for a U-Net 4 to 7 times as wide as the toy's; a clip of 5.12 s has latents of D = 16,384.
REAL = dict(clap="lukewys/laion_clap/630k-audioset-best.pt", seconds=5.12, num_steps=20,
            kl_guidance=2.5, eval_guidance=2.5, learning_rate=1e-4, micro_batch=8, dtype="bfloat16")
PRESETS = {"audioldm": dict(REAL, model="cvssp/audioldm-s-full-v2", micro_batch=16),
           "audioldm2": dict(REAL, model="cvssp/audioldm2", kl_guidance=3.5, eval_guidance=3.5)}

def parse_args(argv=None) -> tuple[Config, Path | None]:
    """Config of a command line, and the run directory to resume, None for a new run.

    argparse answers a flag it does not know, or a value of another type, with one line and exit 2.
    """
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run directory")
    for f in dataclasses.fields(Config):       # a flag that is not given leaves no trace
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=f"{f.metadata['help']} (default: {str(f.default) or 'none'})")
    given = vars(parser.parse_args(argv))
    run = given.pop("resume")
    if run is None:
        return Config(**{**PRESETS.get(given.get("preset"), {}), **given}), None
    try:
        # Another learning rate in mid-run would make a run that no command line describes. These
        # three change its length, memory and place, and no result.
        fixed = set(given) - {"epochs", "micro_batch", "device"}
        assert not fixed, f"{' and '.join(sorted(fixed))} cannot change in mid-run"
        return Config(**{**json.loads((run / "config.json").read_text()), **given}), run
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--resume {run}: not a run that can go on so: {error}") from None

# ==== 4. Prompts =================================================================================

def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one per line, without blank lines, # lines and repetitions."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")        # -sig: Windows' mark may lead it
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {path}: {error}; to begin, take samples/prompts.txt") from None
    lines = (" ".join(line.split()) for line in text.splitlines())           # "a  dog " is "a dog"
    prompts = list(dict.fromkeys(x for x in lines if x and not x.startswith("#")))
    if not prompts:
        raise UserError(f"prompts {path}: no prompt in it; write one per line")
    return prompts

def split_prompts(cfg: Config) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; nothing is held out of fewer than 8."""
    train = read_prompts(cfg.prompts)
    beside = Path(cfg.prompts).with_name("eval_" + Path(cfg.prompts).name)
    file = cfg.eval_prompts or (str(beside) if beside.exists() else "")
    # Without a file of its own, every fourth prompt is held out; of very few, none.
    held_out = read_prompts(file) if file else train[3::4][:50] if len(train) >= 8 else []
    if file and (both := sorted(set(held_out) & set(train))):    # the result would praise memory
        raise UserError(f"{both[0]!r} is a training prompt, and held out in {file}: remove one")
    return [prompt for prompt in train if prompt not in held_out], held_out

def check_prompts(pipeline, prompts: list[str]) -> None:
    """Warns of prompts that the model cannot take whole: too long, or with words it never saw."""
    tokenizer, limit = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    for ids in tokenizer(prompts)["input_ids"]:
        if lost := tokenizer.decode(ids[limit - 1:-1]):
            print(f"warning: a prompt is cut to {limit} tokens; lost: {lost!r}", file=sys.stderr)
    vocabulary = Path(pipeline.name_or_path, "vocabulary.txt")   # only the bundled model has one
    words = set("".join(c if c.isalpha() else " " for c in " ".join(prompts).lower()).split())
    if vocabulary.exists() and (unknown := words - set(vocabulary.read_text().split())):
        print(f"warning: words that the bundled model never saw: {', '.join(sorted(unknown))}; for "
              "an open vocabulary use --preset audioldm", file=sys.stderr)

# ==== 5. The model: a stock pipeline with a LoRA adapter =========================================

def bundled(path: str) -> str:
    """`path`, or the file of that name beside this script if there is none below here."""
    return str(HERE / path) if not Path(path).exists() and (HERE / path).exists() else path

def load_pipeline(model: str, device="cpu"):
    """AudioLDMPipeline or AudioLDM2Pipeline in float32 and eval mode.

    model: a folder written by `save_pretrained`, or a hub id (downloaded once, then cached).
    """
    import torchaudio  # noqa: F401    first: if it is broken, those that import it hide why
    import diffusers
    import transformers
    for library in (diffusers, transformers):                    # one line an epoch is talk enough
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    model, parts = bundled(model), {}
    try:
        kind = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
        assert kind in ("AudioLDMPipeline", "AudioLDM2Pipeline"), f"a {kind} is not supported"
        if kind == "AudioLDM2Pipeline":        # its index names GPT2Model, which cannot generate
            parts["language_model"] = transformers.GPT2LMHeadModel.from_pretrained(
                model, subfolder="language_model")
        pipeline = getattr(diffusers, kind).from_pretrained(model, dtype=torch.float32, **parts)
        # Both families come with plain DDIM. A scheduler that clips x_0, or of another kind, takes
        # other steps than the Gaussians of section 1.
        ddim = type(pipeline.scheduler) is diffusers.DDIMScheduler
        assert ddim and not pipeline.scheduler.config.clip_sample, "its scheduler is not plain DDIM"
    except Exception as error:                 # whatever a library finds wrong with a folder
        raise UserError(f"--model {model}: no usable folder, nor to be had from the hub; --preset "
                        f"toy needs no network ({str(error)[:200]})") from None
    pipeline.vae.to(memory_format=torch.channels_last)           # convolutions are faster so
    return pipeline.to(device)                 # in eval mode, as `from_pretrained` leaves it

@torch.no_grad()
def encode_prompts(pipeline, prompts: list[str]) -> tuple[dict, dict]:
    """The U-Net's keyword tensors for N prompts, and those of its pass without prompt, N rows each.

    The one function that knows how a model is conditioned: everything after it hands them on.
    """
    device = pipeline.unet.device
    if hasattr(pipeline, "language_model"):
        # AudioLDM2. One prompt at a time, since its language model hears the padding. Each gives T5
        # states (2, L, E), their mask (2, L) and what GPT2 adds, (2, 8, E'); 2: "" and the prompt.
        names = "encoder_hidden_states_1", "encoder_attention_mask_1", "encoder_hidden_states"
        columns = zip(*(pipeline.encode_prompt(prompt, device, 1, True) for prompt in prompts))
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)     # -> (N, L, 2, ...)
        both = {n: pad([x.transpose(0, 1) for x in column]) for n, column in zip(names, columns)}
        return {k: v[:, :, 1] for k, v in both.items()}, {k: v[:, :, 0] for k, v in both.items()}
    # AudioLDM: one vector (N, E), which joins the time embedding; no cross-attention to text.
    uncondition, condition = pipeline._encode_prompt(prompts, device, 1, True).chunk(2)
    return ({"class_labels": condition, "encoder_hidden_states": None},
            {"class_labels": uncondition, "encoder_hidden_states": None})

def add_lora(unet, rank: int):
    """The U-Net as a `peft.PeftModel` whose only trainable weights are LoRA's (Hu et al. 2021)."""
    from peft import LoraConfig, get_peft_model
    # The attention, as everywhere; and the layers through which an AudioLDM U-Net hears its prompt.
    # Each of their matrices W becomes W + B A, with B zero at first: the policy starts as the base
    # model, and is the base model again within `unet.disable_adapter()`, without a copy of it.
    targets = ["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "class_embedding"]
    return get_peft_model(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)).eval()

def adapter_state(unet) -> dict[str, Tensor]:
    """The adapter's weights, copied to the CPU; `load_state_dict(strict=False)` puts them back."""
    return {k: v.detach().cpu().clone() for k, v in unet.named_parameters() if v.requires_grad}

# ==== 6. Rollouts ================================================================================

World = SimpleNamespace
# All that a run needs, in one namespace, which `load_world` in section 9 makes:
#     cfg                      the Config
#     train, held_out          lists of prompts; a prompt's id is its place in train + held_out
#     pipeline                 the stock pipeline, whose VAE and vocoder decode
#     reward                   function (waveforms (N, samples), sample_rate, prompts) -> (N,)
#     unet, optimizer          the policy, a U-Net with its adapter, and AdamW on the adapter
#     condition, uncondition   the U-Net's keyword tensors, with and without prompt, a row per id
#     schedule                 timesteps, alpha_bar_t, alpha_bar_prev, each (T,)
#     prediction_type          what the U-Net predicts, "epsilon" or "v_prediction"
#     latent_shape, device     (C, H, W), and where the networks are

def step_gaussian(world: World, latents: Tensor, steps: Tensor, prompt_ids: Tensor, eta,
                  guidance: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean (B, C, H, W) and sigma (B,) of x_{t-1}, for rows at steps (B,) of the schedule.

    latents (B, C, H, W); steps, prompt_ids (B,) int64; eta (B,) or a number.
    """
    timesteps, *alpha_bars = (table[steps] for table in world.schedule)      # (T,) -> (B,)
    condition, uncondition = ({k: v if v is None else v[prompt_ids] for k, v in table.items()}
                              for table in (world.condition, world.uncondition))
    # The network alone runs in half precision, if any: latents, means and log-probs are float32.
    dtype = getattr(torch, world.cfg.dtype)
    with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
        output = guided_prediction(world.unet, latents, timesteps, condition, uncondition, guidance)
    sigma = ddim_sigma(*alpha_bars, eta)
    return ddim_mean(output, latents, *alpha_bars, sigma, world.prediction_type), sigma

@torch.no_grad()
def denoise(world: World, latents: Tensor, step: int, prompt_ids: Tensor, eta,
            guidance: float = 1.0) -> tuple[Tensor, Tensor]:
    """`step_gaussian` of one step for any number of rows, micro-batch by micro-batch."""
    # eta is a number, or one per row where some rows are in their noisy step and some are not.
    eta = torch.as_tensor(eta, dtype=torch.float32, device=world.device).expand(len(latents))
    rows = latents, torch.full_like(prompt_ids, step), prompt_ids, eta
    parts = zip(*(x.split(world.cfg.micro_batch) for x in rows))
    means, sigmas = zip(*(step_gaussian(world, *part, guidance) for part in parts))
    return torch.cat(means), torch.cat(sigmas)

def randn(world: World, rows: int, generator: torch.Generator) -> Tensor:
    """Noise (rows, C, H, W), drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(rows, *world.latent_shape, generator=generator).to(world.device)

def choose_prompts(world: World, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """STEP 1: the ids of P prompts (P,), and the first noisy step (P,) of each one's clips."""
    cfg, P = world.cfg, world.cfg.prompts_per_epoch
    order = torch.randperm(len(world.train), generator=generator)
    ids = order.repeat(math.ceil(P / len(order)))[:P]            # repeats only of too few prompts
    # A window of W noisy steps begins at 0 ... end - W, and never reaches the last step.
    end = min(cfg.num_steps - 1, round(cfg.noise_until * cfg.num_steps))
    starts = torch.randint(max(0, end - cfg.noise_window) + 1, ids.shape, generator=generator)
    return ids.to(world.device), starts.to(world.device)

def rollout(world: World, prompt_ids: Tensor, starts: Tensor,
            generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """STEP 2: K clips for each of P prompts, noisy in the steps [start, start + window).

    prompt_ids, starts (P,) int64. Returns the finished latents (B, C, H, W), group after group, and
    the table of noisy steps, tensors with leading dimension R: latents x_t, next_latents x_{t-1},
    log_prob, step, clip (its row in the finished latents), prompt_id, and input: the first row with
    the same x_t, which is what the U-Net is asked about.
    """
    cfg, K, table, count = world.cfg, world.cfg.clips_per_prompt, [], 0
    ids, starts = (x.repeat_interleave(K) for x in (prompt_ids, starts))
    clip = torch.arange(len(ids), device=world.device)
    # Until noise parts them, the clips of a group are one path: its first clip walks it for all.
    leader = clip - clip % K if cfg.shared_noise else clip
    x_T = randn(world, len(leader.unique()), generator)
    latents = x_T.repeat_interleave(len(clip) // len(x_T), dim=0)
    for step in progress(range(cfg.num_steps), "roll out"):
        lead = torch.where(starts >= step, leader, clip)
        asked, back = lead.unique(return_inverse=True)           # asked[back] is lead
        noisy = (starts <= step) & (step < starts + cfg.noise_window)
        mean, sigma = denoise(world, latents[asked], step, ids[asked], eta=ETA * noisy[asked])
        latents_t, latents, at = latents, mean[back], noisy.nonzero().flatten()
        # Where sigma is 0, x_{t-1} is the mean; elsewhere it is drawn around it.
        mean, sigma = latents[at], sigma[back][at]
        latents[at] = mean + sigma.reshape(-1, 1, 1, 1) * randn(world, len(at), generator)
        if step < cfg.num_steps - 1 and len(at):                 # the last step is not trained
            table.append({"latents": latents_t[at], "next_latents": latents[at],
                          "log_prob": gaussian_log_prob(latents[at], mean, sigma),
                          "step": torch.full_like(at, step), "clip": at, "prompt_id": ids[at],
                          "input": count + torch.searchsorted(at, lead[at])})
            count += len(at)
    return latents, {key: torch.cat([part[key] for part in table]) for key in table[0]}

def sample(world: World, prompt_ids: Tensor, latents: Tensor) -> Tensor:
    """Finished latents (B, C, H, W) of plain, deterministic DDIM from x_T: how we evaluate."""
    for step in range(world.cfg.num_steps):
        latents, _ = denoise(world, latents, step, prompt_ids, 0.0, world.cfg.eval_guidance)
    return latents

@torch.no_grad()
def decode(pipeline, latents: Tensor, seconds: float) -> Tensor:
    """Waveforms (B, samples) in [-1, 1] on the CPU of finished latents: VAE, then vocoder."""
    samples, parts = round(seconds * pipeline.vocoder.config.sampling_rate), []
    # A vocoder's activations are large: on a CPU eight clips at a time take it twice as long.
    for chunk in progress(latents.split(8), "decode"):
        mel = pipeline.vae.decode(chunk / pipeline.vae.config.scaling_factor).sample
        parts += [pipeline.mel_spectrogram_to_waveform(two) for two in mel.split(2)]
    return torch.cat(parts)[:, :samples].clamp(-1, 1)

# ==== 7. The reward: CLAP, made dependable =======================================================

def build_clap(sizes: dict | str) -> torch.nn.Module:
    """laion_clap's own CLAP module with random weights, built without any download.

    sizes: "HTSAT-tiny" or the like, a model configuration of the package; or such a dictionary, for
    towers of other sizes with "htsat" and "roberta", their keyword arguments.
    """
    from importlib.util import find_spec
    from unittest import mock
    from transformers import RobertaConfig, RobertaModel
    # `import laion_clap` fetches three tokenizers, and its constructor 500 MB of RoBERTa that the
    # checkpoint then replaces. So its model classes are imported from the package's folder, under
    # the name that the package itself gives them.
    folder = find_spec("laion_clap").submodule_search_locations[0]
    sys.path += [folder] * (folder not in sys.path)
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    from clap_module import htsat, model as clap_model
    if isinstance(sizes, str):
        sizes = json.loads(Path(folder, f"clap_module/model_configs/{sizes}.json").read_text())
    # While the model is made, "download RoBERTa" means "make one from its configuration".
    roberta = RobertaConfig(**sizes.get("roberta", dict(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)))
    make_htsat = clap_model.create_htsat_model if "htsat" not in sizes else (
        lambda audio, *_: htsat.HTSAT_Swin_Transformer(config=audio, **sizes["htsat"]))
    text = {**sizes["text_cfg"], "model_type": "roberta"}
    with (mock.patch.object(clap_model, "create_htsat_model", make_htsat),
          mock.patch.object(RobertaModel, "from_pretrained", lambda name: RobertaModel(roberta))):
        clap = clap_model.CLAP(sizes["embed_dim"], sizes["audio_cfg"], text,
                               joint_embed_shape=sizes.get("joint_embed_shape", 512))
    if roberta.hidden_size != 768:             # the class knows RoBERTa's width only as a literal
        clap.text_projection[0] = torch.nn.Linear(roberta.hidden_size, clap.joint_embed_shape)
    return clap.eval().requires_grad_(False)

def load_clap(checkpoint: str, tokenizer, device="cpu") -> torch.nn.Module:
    """laion_clap's CLAP with the weights of a checkpoint, and `tokenizer` attached as .tokenizer.

    checkpoint: a file, or OWNER/REPO/FILE on the hub; tokenizer: RoBERTa's, as the pipelines have.
    """
    import numpy as np
    from huggingface_hub import hf_hub_download
    path = Path(bundled(checkpoint))
    if not path.is_file():                     # fetched once; a download that was cut goes on
        try:
            owner, repo, file = checkpoint.split("/", 2)
            path = Path(hf_hub_download(f"{owner}/{repo}", file))
        except (OSError, ValueError) as error:
            raise UserError(f"--clap {checkpoint}: no file, nor on the hub: {error}") from None
    # The sizes stand beside the file. The official ones come alone; those for music have the larger
    # audio tower.
    beside, music = path.with_suffix(".json"), path.name.startswith("music")
    official = "HTSAT-base" if music else "HTSAT-tiny"
    clap = build_clap(json.loads(beside.read_text()) if beside.exists() else official)
    # A .pt file is a program. Besides weights the official ones hold a numpy scalar and the command
    # line of their training: these types are let in, the scalar by its names in numpy 1 and 2.
    scalar = np.float64(0).__reduce__()[0]
    allowed = [*((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
               np.dtype, np.dtypes.Float64DType, argparse.Namespace]
    try:
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()}
        state.pop("text_branch.embeddings.position_ids", None)   # old transformers saved it
        clap.load_state_dict(state)            # strict: a weight left random would score nonsense
    except Exception:
        raise UserError(f"--clap {path}: damaged, of another size, or with code in it") from None
    clap.to(device).tokenizer = tokenizer
    # Offline, a tokenizer may come without its vocabulary and map all prompts to the same tokens.
    one, other = clap_reward(clap, torch.ones(2, 48000), 48000, ["a dog barking", "wind blowing"])
    assert abs(one - other) > 1e-6, "the tokenizer has lost its vocabulary"
    return clap

@torch.no_grad()
def clap_reward(clap, waveforms: Tensor, sample_rate: int, prompts: list[str]) -> Tensor:
    """Cosine similarity in [-1, 1] of each waveform and its prompt under CLAP, (N,) on the CPU.

    waveforms (N, samples), float in [-1, 1], at sample_rate Hz.
    """
    import torchaudio
    # (samples,) would be taken for clips of one sample, and int16 is 30,000 times too loud. At the
    # wrong rate, 16 for 16 kHz or 16000 left as it is, CLAP answers without complaint, and wrongly.
    assert waveforms.dim() == 2 and waveforms.is_floating_point(), "waveforms: float (N, samples)"
    assert 8000 <= sample_rate <= 192000, f"sample_rate {sample_rate} is not in Hz"
    # CLAP hears 10 s at 48 kHz. It learned shorter clips as "repeatpad", whole repetitions and then
    # zeros. Of longer ones the package takes a random part, so that one clip scores differently
    # from call to call; the beginning is as good, and always the same.
    length, rate, audio = clap.audio_cfg.clip_samples, clap.audio_cfg.sample_rate, []
    for x in progress(waveforms.split(16), "CLAP"):
        x = x.float().clamp(-1, 1).to(clap.logit_scale_a.device)
        x = torchaudio.functional.resample(x, sample_rate, rate)
        x = x.repeat(1, max(1, length // x.shape[1]))[:, :length]
        x = F.pad(x, (0, length - x.shape[1]))
        audio.append(clap.encode_audio({"waveform": x}, x.device)["embedding"])
    audio = F.normalize(clap.audio_projection(torch.cat(audio)), dim=-1)     # (N, E)
    # Each prompt once, for it does not change, and alone: in a batch, the others would change its
    # last bits.
    texts = clap.__dict__.setdefault("texts", {})
    for prompt in set(prompts) - set(texts):
        tokens = clap.tokenizer([prompt], padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt")
        texts[prompt] = clap.get_text_embedding(dict(tokens))[0]
    return (audio * torch.stack([texts[prompt] for prompt in prompts])).sum(dim=1).cpu()

# ==== 8. PPO update ==============================================================================

def replay(world: World, rows: dict, at: Tensor,
           guidance: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob (b,), mean and sigma of the recorded actions of rows `at`, under today's weights."""
    # Rows of a group that have the same x_t share one answer of the U-Net, and its gradient.
    asked, back = rows["input"][at].unique(return_inverse=True)
    given = (rows[key][asked] for key in ("latents", "step", "prompt_id"))
    mean, sigma = (x[back] for x in step_gaussian(world, *given, ETA, guidance))
    return gaussian_log_prob(rows["next_latents"][at], mean, sigma), mean, sigma

def check_on_policy(ratio: Tensor, dtype: str, clip_range: float) -> Tensor:
    """How far the ratio (b,) is off 1 before an epoch's first update; UserError if too far."""
    # The cheapest bug detector there is: nothing was learned since the rollout, so replaying it
    # must give the same log-probs. If not, PPO would optimise an error. In float32 a row is off by
    # rounding only. In half precision another batch shape picks other kernels: single rows may be
    # off by more and nothing is wrong, so there the root mean square has to stay within the range.
    exact = dtype == "float32"
    error = (ratio - 1).abs().max() if exact else (ratio - 1).square().mean().sqrt()
    if not error <= (1e-6 if exact else clip_range):
        raise UserError(f"on-policy check: the ratio is off 1 by {error:.1e} before any update, so "
                        "rollout and replay differ. Usual causes: dropout (not in eval mode), "
                        "other timesteps, another row's prompt, latents in half precision")
    return error

def update(world: World, rows: dict, generator: torch.Generator) -> dict[str, float]:
    """STEP 5: clipped PPO on R rows of `rollout` with their "advantage"; returns what to log."""
    cfg, optimizer, group = world.cfg, world.optimizer, world.optimizer.param_groups[0]
    # 1e-4 x 16,384 = 1.6 nats bound the log-ratio of a whole clip: of fewer elements than
    # AudioLDM's latents have, each may move further.
    clip_range = cfg.clip_range * 16384 / math.prod(world.latent_shape)
    count, log = len(rows["clip"]), {"grad_norm": 0.0}
    if cfg.kl_weight:
        # Where the base model would go *with guidance*, for each row: a pull to what guidance knows
        # already, also where all K clips are alike and the reward is silent.
        with torch.no_grad(), world.unet.disable_adapter():
            parts = torch.arange(count, device=world.device).split(cfg.micro_batch)
            mean_base = torch.cat([replay(world, rows, at, cfg.kl_guidance)[1] for at in parts])
    order = torch.randperm(count, generator=generator).to(world.device)
    for minibatch in progress(order.chunk(cfg.updates_per_epoch), "update"):
        ratios = []
        for at in minibatch.split(cfg.micro_batch):
            log_prob, mean, sigma = replay(world, rows, at)
            loss, info = ppo_loss(log_prob, rows["log_prob"][at], rows["advantage"][at], clip_range)
            if cfg.kl_weight:
                info["kl_base"] = gaussian_kl(mean, mean_base[at], sigma).mean()
                loss = loss + cfg.kl_weight * info["kl_base"]
            # Gradients add up to the gradient of the minibatch's mean: the micro-batch costs
            # memory and time, and changes nothing else.
            (loss * len(at) / len(minibatch)).backward()
            ratios.append(info.pop("ratio"))
            # What is logged are means over all rows, added up on the device: .item() would wait
            # for the GPU in every micro-batch.
            for key, value in {"loss": loss, **info}.items():
                log[key] = log.get(key, 0) + value.detach() * len(at) / count
        # In the epoch's first minibatch the ratio is 1 and nothing is clipped; from the second one
        # on the policy has moved, and clipping keeps it near the one that rolled out.
        if "ratio_error" not in log:
            log["ratio_error"] = check_on_policy(torch.cat(ratios), cfg.dtype, clip_range)
        norm = torch.nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
        if not norm.isfinite():                                   # one NaN in Adam's state stays
            raise UserError("the gradient is not finite: lower --learning-rate")
        log["grad_norm"] = max(log["grad_norm"], norm)
        # The rate rises, then falls to 0 at the run's end, lest a long run learn CLAP's noise. The
        # optimiser keeps count of its steps, so that a checkpoint has it too.
        group["updates"] = n = group.get("updates", 0) + 1
        left = 1 - (n - 1) / (cfg.epochs * cfg.updates_per_epoch)
        group["lr"] = cfg.learning_rate * min(n / WARMUP_UPDATES, left)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {key: float(value) for key, value in {**log, "lr": group["lr"]}.items()}

# ==== 9. The run =================================================================================

def load_world(cfg: Config, reward: Callable | None = None) -> World:
    """Everything that a run needs, loaded and checked; `reward` takes the place of CLAP's."""
    train, held_out = split_prompts(cfg)
    device = "cuda" if cfg.device == "auto" and torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(cfg.model, device)
    check_prompts(pipeline, train + held_out)
    # The tokenizer of both families is RoBERTa's, which is CLAP's too.
    reward = reward or partial(clap_reward, load_clap(cfg.clap, pipeline.tokenizer, device))
    condition, uncondition = encode_prompts(pipeline, train + held_out)
    # Every prompt is encoded: the encoders, which may be larger than the U-Net, can go.
    for name in ("text_encoder", "text_encoder_2", "projection_model", "language_model"):
        setattr(pipeline, name, None)
    # The latents' shape: one mel frame per so many samples, frames and bands halved by the VAE at
    # all of its levels but one.
    channels, vocoder = pipeline.unet.config.in_channels, pipeline.vocoder.config
    frames = cfg.seconds * vocoder.sampling_rate / math.prod(vocoder.upsample_rates)
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    shape = channels, math.ceil(frames / factor), vocoder.model_in_dim // factor
    torch.manual_seed(cfg.seed)                # LoRA's A matrices are random
    unet = add_lora(pipeline.unet, cfg.lora_rank)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=cfg.learning_rate, weight_decay=1e-4)
    return World(
        cfg=cfg, train=train, held_out=held_out, pipeline=pipeline, reward=reward, unet=unet,
        optimizer=optimizer, condition=condition, uncondition=uncondition, latent_shape=shape,
        schedule=ddim_schedule(pipeline.scheduler, cfg.num_steps, device),
        prediction_type=pipeline.scheduler.config.prediction_type, device=torch.device(device))

def score(world: World, latents: Tensor, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
    """STEP 3: waveforms (B, samples) and rewards (B,) of finished latents (B, C, H, W)."""
    waveforms = decode(world.pipeline, latents, world.cfg.seconds)
    prompts = [(world.train + world.held_out)[i] for i in prompt_ids.tolist()]
    rewards = world.reward(waveforms, world.pipeline.vocoder.config.sampling_rate, prompts).float()
    if bad := [prompt for prompt, reward in zip(prompts, rewards) if not reward.isfinite()]:
        # Through the advantage it would reach every weight.
        raise UserError(f"the reward of a clip of {bad[0]!r} is not finite: use --dtype float32")
    return waveforms, rewards

def play(world: World, adapter: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms (M, n, samples) and rewards (M, n) of plain DDIM, n clips of each of M prompts.

    The held-out prompts or, if there are none, those of training. Every call has the same noise.
    """
    first, current = len(world.train) if world.held_out else 0, adapter_state(world.unet)
    ids = torch.arange(first, len(world.train + world.held_out), device=world.device)
    ids = ids.repeat_interleave(EVAL_NOISES)
    noise = randn(world, len(ids), torch.Generator().manual_seed(world.cfg.seed + 999))
    world.unet.load_state_dict(adapter, strict=False)
    waveforms, rewards = score(world, sample(world, ids, noise), ids)
    world.unet.load_state_dict(current, strict=False)            # training goes on where it was
    return waveforms.unflatten(0, (-1, EVAL_NOISES)), rewards.view(-1, EVAL_NOISES)

def write(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Bytes, or what `content(path)` saves; at any moment the file is the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("tmp-" + path.name)
    temporary.write_bytes(content) if isinstance(content, bytes) else content(temporary)
    temporary.replace(path)

def train(world: World, run: Path, state: dict) -> dict[str, Tensor]:
    """The PPO loop, from `state["epoch"]` on. Returns the averaged adapter."""
    cfg, K, metrics, ema = world.cfg, world.cfg.clips_per_prompt, state["metrics"], state["ema"]
    for epoch in range(state["epoch"], cfg.epochs):
        began = time.time()
        # Random numbers belong to the epoch, not to the process: a resumed run repeats them.
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
        prompt_ids, starts = choose_prompts(world, generator)                             # STEP 1
        latents, rows = rollout(world, prompt_ids, starts, generator)                     # STEP 2
        _, rewards = score(world, latents, prompt_ids.repeat_interleave(K))               # STEP 3
        advantages = group_advantages(rewards.view(-1, K)).flatten()                      # STEP 4
        # The reward arrives at the end, for a whole clip: all its noisy steps share the advantage.
        rows = {**rows, "advantage": advantages.to(world.device)[rows["clip"]]}
        info = update(world, rows, generator)                                             # STEP 5
        decay = min(EMA_DECAY, epoch / (epoch + 1))              # at first a plain mean
        ema = {k: v.lerp(ema.get(k, v), decay) for k, v in adapter_state(world.unet).items()}
        # Which prompts were drawn decides an epoch's reward, but not the mean of the last epochs.
        latest = [*(row["reward"] for row in metrics[1 - EVAL_EVERY:]), rewards.mean().item()]
        row = {"epoch": epoch + 1, "reward": latest[-1], **info,                          # STEP 6
               "reward_mean": sum(latest) / len(latest),
               "reward_spread": rewards.view(-1, K).std(dim=1).mean().item(),
               "seconds": round(time.time() - began, 2)}
        if (epoch + 1) % EVAL_EVERY == 0:
            row["eval_reward"] = play(world, ema)[1].mean().item()
            write(run / f"adapter/epoch-{epoch + 1}.safetensors", partial(save_file, ema))
        metrics.append(row)
        shown = "reward_mean reward_spread approx_kl clip_fraction seconds eval_reward".split()
        print(f"epoch {epoch + 1}/{cfg.epochs}", *(f"{k} {row[k]:.3g}" for k in shown if k in row),
              sep="  ", flush=True)
        # All that an epoch leaves behind. There is no state of a random generator to be kept.
        write(run / "checkpoint.pt", partial(torch.save, dict(
            epoch=epoch + 1, adapter=adapter_state(world.unet), ema=ema, metrics=metrics,
            optimizer=world.optimizer.state_dict(), prompts=[world.train, world.held_out])))
        write(run / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in metrics).encode())
    return ema

def load_checkpoint(run: Path, world: World) -> dict:
    """The state of the last finished epoch, put into `world`; else the state to begin with."""
    if not (run / "checkpoint.pt").exists():
        return {"epoch": 0, "metrics": [], "ema": {}}
    try:
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        world.unet.load_state_dict(state["adapter"], strict=False)
        world.optimizer.load_state_dict(state["optimizer"])
    except Exception:
        raise UserError(f"{run}/checkpoint.pt: damaged, or with code in it") from None
    if state["prompts"] != [world.train, world.held_out]:
        raise UserError(f"--resume {run}: the prompt files have changed since this run began")
    return state

def finish(world: World, run: Path, adapter: dict[str, Tensor]) -> None:
    """Writes the adapter, before/after clips and a page that plays them; prints what was gained."""
    import soundfile
    cfg, pipeline, prompts = world.cfg, world.pipeline, world.held_out or world.train
    rate, kind, model = pipeline.vocoder.config.sampling_rate, type(pipeline), pipeline.name_or_path
    # In peft's own format, so that one line loads it into a stock pipeline of either family.
    world.unet.peft_config["default"].save_pretrained(run / "adapter")
    write(run / "adapter/adapter_model.safetensors", partial(
        save_file, {name.replace(".default", ""): weight for name, weight in adapter.items()}))
    more = "" if "2" not in kind.__name__ else (                 # as in `load_pipeline`
        f", language_model=transformers.GPT2LMHeadModel.from_pretrained(\n    {model!r}, "
        "subfolder='language_model')")
    write(run / "adapter/load.py", f"""\
import diffusers, pathlib, peft, soundfile, torch, transformers
pipe = diffusers.{kind.__name__}.from_pretrained({model!r}, dtype=torch.float32{more})
peft.PeftModel.from_pretrained(pipe.unet, pathlib.Path(__file__).parent)     # changes pipe.unet
audio = pipe({prompts[0]!r}, num_inference_steps={cfg.num_steps},
             guidance_scale={cfg.eval_guidance}, audio_length_in_s={cfg.seconds}).audios[0]
soundfile.write("tuned.wav", audio, {rate})
""".encode())
    base = {name: torch.zeros_like(weight) for name, weight in adapter.items()}          # W + 0
    sides = {"original": play(world, base), "fine-tuned": play(world, adapter)}
    # The first clip of each prompt can be heard, the rewards below are means over all of them.
    page = ("<!doctype html><html lang=en><meta charset=utf-8><style>audio {width: 28vw}</style>"
            f"<meta name=viewport content='width=device-width'><title>{run.name}</title><table>")
    for i, prompt in enumerate(prompts):
        page += f"\n<tr><td>{html.escape(prompt)}"               # a prompt is text, never a tag
        for side, (waveforms, rewards) in sides.items():
            name, sound = f"clips/{i:03}-{side}.wav", waveforms[i, 0].numpy()
            write(run / name, lambda path: soundfile.write(path, sound, rate))
            page += f"<td>{side} {rewards[i, 0]:.2f}<br><audio controls src={name}></audio>"
    write(run / "index.html", (page + "\n</table>\n").encode())
    before, after = (rewards.mean(dim=1) for _, rewards in sides.values())
    print(f"{'held-out' if world.held_out else 'training'} prompts: reward {before.mean():.3f} -> "
          f"{after.mean():.3f}, better for {(after > before).sum()} of {len(prompts)}\n"
          f"listen: {run}/index.html")

def main(argv=None, reward: Callable | None = None) -> int:
    """A whole run. Exit code 0; 2 after one line about a mistake; 130 if stopped by Ctrl-C."""
    try:
        cfg, run = parse_args(argv)
        world = load_world(cfg, reward)
        if run is None:
            names = (f"runs/{cfg.preset}-{n}" for n in range(1, 10 ** 6))
            run = Path(cfg.out or next(name for name in names if not Path(name).exists()))
            if run.exists():
                raise UserError(f"--out {run}: exists; choose another name, or --resume {run}")
        state = load_checkpoint(run, world)
        write(run / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1).encode())
        print(f"{run}: {len(world.train)} training, {len(world.held_out)} held-out prompts",
              flush=True)
        finish(world, run, train(world, run, state))
        return 0
    except UserError as error:
        message, code = " ".join(str(error).split()), 2          # one line, whatever a value holds
    except torch.OutOfMemoryError:
        message, code = "out of GPU memory: lower --micro-batch, which changes no result", 2
    except KeyboardInterrupt:
        message, code = "stopped; --resume RUN goes on after the last finished epoch", 130
    print(f"clap_ppo.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
