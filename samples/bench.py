"""What an epoch costs, and how much of it is not the networks' own time.

    python samples/bench.py                                        # the toy, as a run uses it
    python samples/bench.py --preset audioldm                      # the real architecture
    python samples/bench.py --preset audioldm2 --micro-batches 4 8 16

Real architectures are built at full size from their configurations with random weights: speed and
memory do not depend on what the weights are, so nothing is downloaded. Prompts are random vectors.
Per micro-batch, one epoch after a warm-up: seconds of each phase, the share of the epoch that the
same U-Net, decoder and CLAP calls take alone ("overhead" is the epoch over that), clips per second
and peak memory. All in one process; compare ratios rather than seconds between machines.
"""

import argparse
import functools
import json
import math
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clap_ppo  # noqa: E402

LEVELS = dict(down_block_types=["DownBlock2D"] + 3 * ["CrossAttnDownBlock2D"],
              up_block_types=3 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"],
              block_out_channels=[128, 256, 384, 640], layers_per_block=2, sample_size=128,
              in_channels=8, out_channels=8)


def build_pipeline(preset: str, prompts: int, device) -> tuple[SimpleNamespace, dict]:
    """The parts of a full-size pipeline that an epoch uses, and the conditions of random prompts.

    Parameters: AudioLDM (s-full-v2) 185 M, AudioLDM2 347 M in the U-Net, as published.
    """
    import diffusers
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
    torch.manual_seed(0)
    with torch.device(device):
        if preset == "audioldm":
            unet = diffusers.UNet2DConditionModel(
                **LEVELS, attention_head_dim=32, cross_attention_dim=LEVELS["block_out_channels"],
                class_embed_type="simple_projection", class_embeddings_concat=True,
                projection_class_embeddings_input_dim=512)
            condition = {"class_labels": torch.nn.functional.normalize(torch.randn(prompts, 512)),
                         "encoder_hidden_states": None}
        else:
            unet = diffusers.AudioLDM2UNet2DConditionModel(
                **LEVELS, attention_head_dim=[4, 8, 12, 20],
                cross_attention_dim=4 * [[None, 768, 1024]])
            condition = {"encoder_hidden_states": torch.randn(prompts, 8, 768),
                         "encoder_hidden_states_1": torch.randn(prompts, 20, 1024),
                         "encoder_attention_mask_1": torch.ones(prompts, 20, dtype=torch.int64)}
        vae = diffusers.AutoencoderKL(
            in_channels=1, out_channels=1, down_block_types=3 * ["DownEncoderBlock2D"],
            up_block_types=3 * ["UpDecoderBlock2D"], block_out_channels=[128, 256, 512],
            latent_channels=8, layers_per_block=2)
        vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
            model_in_dim=64, sampling_rate=16000, upsample_initial_channel=1024,
            upsample_rates=[5, 4, 2, 2, 2], upsample_kernel_sizes=[16, 16, 8, 4, 4]))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1)
    pipeline = SimpleNamespace(unet=unet, vae=vae, vocoder=vocoder, scheduler=scheduler)
    for part in (unet, vae, vocoder):
        part.eval().requires_grad_(False)
    pipeline.mel_spectrogram_to_waveform = functools.partial(
        diffusers.AudioLDMPipeline.mel_spectrogram_to_waveform, pipeline)
    return pipeline, condition


def build_world(cfg: clap_ppo.Config) -> clap_ppo.World:
    """What `clap_ppo.load_world` makes, with `clap` beside; but for the toy, of random weights."""
    if cfg.preset == "toy":
        world = clap_ppo.load_world(cfg)
        world.clap = world.reward.args[0]
        return world
    device = torch.device("cuda" if cfg.device == "auto" and torch.cuda.is_available() else "cpu")
    prompts = [f"prompt {i}" for i in range(64)]
    pipeline, condition = build_pipeline(cfg.preset, len(prompts), device)
    clap = clap_ppo.build_clap("HTSAT-tiny").to(device)
    clap.tokenizer = lambda prompts, **_: {"input_ids": torch.randint(3, 50000, (1, 77)),
                                           "attention_mask": torch.ones(1, 77, dtype=torch.int64)}
    unet = clap_ppo.add_lora(pipeline.unet, cfg.lora_rank)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])
    return clap_ppo.World(
        cfg=cfg, train=prompts, held_out=[], pipeline=pipeline, clap=clap, unet=unet,
        reward=functools.partial(clap_ppo.clap_reward, clap), optimizer=optimizer,
        condition=condition, uncondition=condition, prediction_type="epsilon",
        schedule=clap_ppo.ddim_schedule(pipeline.scheduler, cfg.num_steps, device),
        latent_shape=(8, math.ceil(cfg.seconds * 25), 16), device=device)


def now(device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Calls:
    """Counts the calls of a module by batch shape and gradient, to repeat them alone."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.seen, self.real = module, {}, module.forward
        module.forward = self.forward

    def forward(self, *args, **kwargs):
        first = args[0]["waveform"] if isinstance(args[0], dict) else args[0]
        key = tuple(first.shape), torch.is_grad_enabled()
        count, _ = self.seen.get(key, (0, None))
        self.seen[key] = count + 1, (args, kwargs)
        return self.real(*args, **kwargs)

    def alone(self, device, dtype) -> float:
        """Seconds that the counted calls take in a bare loop, gradients included."""
        self.module.forward, total = self.real, 0.0
        for (_, grad), (count, (args, kwargs)) in self.seen.items():
            times = []
            for _ in range(4):
                began = now(device)
                with (torch.set_grad_enabled(grad),
                      torch.autocast(device.type, dtype, enabled=dtype != torch.float32)):
                    output = self.real(*args, **kwargs)
                if grad:
                    output.sample.float().square().mean().backward()
                    self.module.zero_grad(set_to_none=True)
                times.append(now(device) - began)
            total += count * min(times[1:])
        return total


def epoch(world, generator: torch.Generator) -> dict[str, float]:
    """Seconds of each phase of one epoch."""
    cfg, device = world.cfg, world.device
    times, began = {}, now(device)

    def lap(name):
        nonlocal began
        times[name], began = now(device) - began, now(device)

    prompt_ids, starts = clap_ppo.choose_prompts(world, generator)
    latents, rows = clap_ppo.rollout(world, prompt_ids, starts, generator)
    lap("rollout")
    waveforms = clap_ppo.decode(world.pipeline, latents, cfg.seconds)
    lap("decode")
    asked = [world.train[i] for i in prompt_ids.tolist() for _ in range(cfg.clips_per_prompt)]
    world.reward(waveforms, 16000, asked)
    lap("reward")
    rewards = torch.randn(len(prompt_ids), cfg.clips_per_prompt, generator=generator)
    advantages = clap_ppo.group_advantages(rewards).flatten().to(device)  # random CLAP: all alike
    clap_ppo.update(world, {**rows, "advantage": advantages[rows["clip"]]}, generator)
    lap("update")
    return times


def main() -> None:
    """Prints one line per micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=["toy", *clap_ppo.PRESETS], default="toy")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=None)
    parser.add_argument("--save", default="", help="a file to which each line is added as JSON")
    parser.add_argument("flags", nargs="*", help="flags of clap_ppo.py after --, such as "
                        "-- --dtype float16 --clips-per-prompt 8")
    args = parser.parse_args()
    prompts = str(Path(clap_ppo.__file__).parent / "samples/prompts.txt")
    cfg, _ = clap_ppo.parse_args(["--prompts", prompts, "--preset", args.preset, *args.flags])
    world = build_world(cfg)
    cuda, dtype = world.device.type == "cuda", getattr(torch, cfg.dtype)
    name = (torch.cuda.get_device_name(world.device) if cuda else
            f"CPU, {torch.get_num_threads()} threads")
    size = sum(p.numel() for p in world.unet.parameters() if not p.requires_grad)
    clips = cfg.prompts_per_epoch * cfg.clips_per_prompt
    print(f"{args.preset} on {name}: U-Net {size / 1e6:.0f} M, {cfg.dtype}, T = {cfg.num_steps}, "
          f"window {cfg.noise_window}, {clips} clips per epoch", flush=True)
    for micro_batch in args.micro_batches or [cfg.micro_batch]:
        world.cfg = replace(cfg, micro_batch=micro_batch)
        epoch(world, torch.Generator().manual_seed(0))                       # warm-up
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        counted = [Calls(m) for m in (world.unet.base_model.model, world.pipeline.vae.decoder,
                                      world.pipeline.vocoder, world.clap.audio_branch)]
        times = epoch(world, torch.Generator().manual_seed(1))
        peak = (torch.cuda.max_memory_allocated() if cuda else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 30
        alone = sum(calls.alone(world.device, dtype if calls is counted[0] else torch.float32)
                    for calls in counted)
        total = sum(times.values())
        phases = "  ".join(f"{phase} {seconds:.2f} s" for phase, seconds in times.items())
        print(f"micro-batch {micro_batch:>3}: epoch {total:.2f} s  ({phases})  overhead "
              f"{total / alone:.3f}  {clips / total:.1f} clips/s  peak {peak:.1f} GiB", flush=True)
        if args.save:
            row = {"name": "bench", "seed": 0, "preset": args.preset, "device": name,
                   "micro_batch": micro_batch, "clips": clips, "seconds": round(total, 2),
                   "overhead": round(total / alone, 3), "peak_gib": round(peak, 2),
                   "flags": " ".join(args.flags)}
            with open(args.save, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    try:
        main()
    except clap_ppo.UserError as error:
        sys.exit(f"bench.py: {error}")
