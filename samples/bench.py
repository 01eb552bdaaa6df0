"""What an epoch costs, and how much of it is not the networks' own time.

    python samples/bench.py                                        # the toy, as a run uses it
    python samples/bench.py --preset audioldm --device cuda        # the real architecture
    python samples/bench.py --preset audioldm2 --device cuda --micro-batches 4 8 16

Real architectures are built at full size from their configurations with random weights: speed and
memory do not depend on what the weights are, so nothing is downloaded. Prompts are random vectors.
Per micro-batch, one epoch after a warm-up: seconds of each phase, the share of the epoch that the
same U-Net, decoder and CLAP calls take alone ("overhead" is the epoch over that), clips per second
and peak memory. All in one process; compare ratios rather than seconds between machines.
"""

import argparse
import functools
import json
import resource
import sys
import time
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


def build_world(cfg: clap_ppo.Config) -> SimpleNamespace:
    """What `clap_ppo.load_world` makes, for the toy; else with random weights."""
    if cfg.preset == "toy":
        return clap_ppo.load_world(cfg)
    device = torch.device(cfg.device)
    prompts = [f"prompt {i}" for i in range(64)]
    pipeline, condition = build_pipeline(cfg.preset, len(prompts), device)
    sizes = clap_ppo.package_folder() / "clap_module/model_configs/HTSAT-tiny.json"
    clap = clap_ppo.build_clap(json.loads(sizes.read_text())).to(device)
    clap.text_cache = {prompt: torch.nn.functional.normalize(torch.randn(512), dim=0).to(device)
                       for prompt in prompts}
    policy = clap_ppo.make_policy(pipeline, condition, condition, cfg)
    return SimpleNamespace(
        cfg=cfg, prompts=prompts, train_ids=list(range(len(prompts))), pipeline=pipeline,
        policy=policy, reward=lambda *args: clap_ppo.clap_reward(clap, *args), clap=clap,
        sample_rate=16000, optimizer=clap_ppo.make_optimizer(policy, cfg))


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
    cfg, policy, device = world.cfg, world.policy, world.policy.device
    times, began = {}, now(device)

    def lap(name):
        nonlocal began
        times[name], began = now(device) - began, now(device)

    prompt_ids, starts = clap_ppo.choose_prompts(world, generator)
    latents, rows = clap_ppo.rollout(policy, prompt_ids, starts, cfg, generator)
    lap("rollout")
    waveforms = clap_ppo.decode(world.pipeline, latents, cfg.seconds)
    lap("decode")
    asked = [world.prompts[i] for i in prompt_ids.tolist() for _ in range(cfg.clips_per_prompt)]
    rewards = world.reward(waveforms, world.sample_rate, asked)
    lap("reward")
    rewards = torch.randn(len(rewards), generator=generator)     # random CLAP: all alike
    advantages = clap_ppo.group_advantages(rewards.view(len(prompt_ids), -1))
    rows = clap_ppo.training_rows(rows, advantages, cfg.train_steps, generator)
    clap_ppo.update(policy, world.optimizer, rows, cfg, 0, generator)
    lap("update")
    return times


def main() -> None:
    """Prints one line per micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=list(clap_ppo.PRESETS), default="toy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=None)
    parser.add_argument("--save", default="", help="a file to which each line is added as JSON")
    parser.add_argument("flags", nargs="*", help="flags of clap_ppo.py after --, such as "
                        "-- --dtype float16 --clips-per-prompt 8")
    args = parser.parse_args()
    prompts = str(Path(clap_ppo.__file__).parent / "samples/prompts.txt")
    cfg, _ = clap_ppo.parse_args(["--prompts", prompts, "--preset", args.preset, "--device",
                                  args.device, *args.flags])
    world = build_world(cfg)
    device = world.policy.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads")
    trained = sum(p.numel() for p in world.optimizer.param_groups[0]["params"])
    size = sum(p.numel() for p in world.policy.unet.parameters()) - trained
    print(f"{args.preset} on {name}: U-Net {size / 1e6:.0f} M, {cfg.dtype}, T = {cfg.num_steps}, "
          f"window {cfg.noise_window}, {cfg.clips_per_epoch} clips per epoch", flush=True)
    for micro_batch in args.micro_batches or [world.policy.micro_batch]:
        world.policy.micro_batch = micro_batch
        epoch(world, torch.Generator().manual_seed(0))                       # warm-up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clap = world.clap if hasattr(world, "clap") else world.reward.__closure__[0].cell_contents
        counted = [Calls(m) for m in (world.policy.unet, world.pipeline.vae.decoder,
                                      world.pipeline.vocoder, clap.audio_branch)]
        times = epoch(world, torch.Generator().manual_seed(1))
        peak = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 30
        alone = sum(calls.alone(device, world.policy.dtype if calls is counted[0] else
                                torch.float32) for calls in counted)
        total = sum(times.values())
        phases = "  ".join(f"{phase} {seconds:.2f} s" for phase, seconds in times.items())
        print(f"micro-batch {micro_batch:>3}: epoch {total:.2f} s  ({phases})  overhead "
              f"{total / alone:.3f}  {cfg.clips_per_epoch / total:.1f} clips/s  "
              f"peak {peak:.1f} GiB", flush=True)
        if args.save:
            row = {"name": "bench", "seed": 0, "preset": args.preset, "device": name,
                   "micro_batch": micro_batch, "clips": cfg.clips_per_epoch,
                   "seconds": round(total, 2), "overhead": round(total / alone, 3),
                   "peak_gib": round(peak, 2), "flags": " ".join(args.flags)}
            with open(args.save, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    try:
        main()
    except clap_ppo.UserError as error:
        sys.exit(f"bench.py: {error}")
