"""What an epoch costs, and how much of it is not the networks' own time.

    python samples/bench.py                                        # the toy, as a run uses it
    python samples/bench.py --preset audioldm2 --micro-batches 4 8 16

Real architectures are built at full size with random weights and prompts: nothing is downloaded.
Per micro-batch, after a warm-up: seconds of an epoch of `clap_ppo.train`, those in each network,
"overhead", which is the epoch over their sum, and peak memory.
"""

import argparse
import functools
import io
import json
import math
import resource
import sys
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clap_ppo  # noqa: E402

LEVELS = dict(down_block_types=["DownBlock2D"] + 3 * ["CrossAttnDownBlock2D"],
              up_block_types=3 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"],
              block_out_channels=[128, 256, 384, 640], layers_per_block=2, sample_size=128,
              in_channels=8, out_channels=8)


def build_pipeline(preset: str, prompts: int, device) -> tuple[SimpleNamespace, dict]:
    """The parts of a full-size pipeline that an epoch uses, and conditions of random prompts."""
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
    clap, ones = clap_ppo.build_clap("HTSAT-tiny").to(device), torch.ones(1, 77, dtype=torch.int64)
    clap.tokenizer = lambda prompts, **_: {"input_ids": 9 * ones, "attention_mask": ones}
    unet = clap_ppo.add_lora(pipeline.unet, cfg.lora_rank)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])
    return clap_ppo.World(
        cfg=cfg, train=prompts, held_out=[], pipeline=pipeline, clap=clap, unet=unet,
        reward=functools.partial(clap_ppo.clap_reward, clap), optimizer=optimizer,
        condition=condition, uncondition=condition, prediction_type="epsilon",
        schedule=clap_ppo.ddim_schedule(pipeline.scheduler, cfg.num_steps, device),
        latent_shape=(8, math.ceil(cfg.seconds * 25), 16), device=device)


def epoch(world, number: int) -> float:
    """Seconds of one epoch of `clap_ppo.train`."""
    world.cfg = replace(world.cfg, epochs=number + 1)
    state = {"epoch": number, "metrics": [], "ema": {}}
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        clap_ppo.train(world, Path(folder), state)
    return state["metrics"][0]["seconds"]


def network_seconds(world) -> tuple[float, dict[str, float]]:
    """Seconds of an epoch, and those of them spent within each network and in the gradient."""
    seconds, places = {}, {
        "U-Net": (world.unet, "forward"), "VAE": (world.pipeline.vae, "decode"),
        "vocoder": (world.pipeline.vocoder, "forward"), "CLAP": (world.clap, "encode_audio"),
        "gradient": (torch.Tensor, "backward")}

    def now():
        if world.device.type == "cuda":
            torch.cuda.synchronize()           # after all that was asked of the device is done
        return time.perf_counter()

    def timed(name, function):
        def call(*args, **kwargs):
            began = now()
            result = function(*args, **kwargs)
            seconds[name] = seconds.get(name, 0) + now() - began
            return result
        return call

    with ExitStack() as stack:
        for name, (owner, method) in places.items():
            call = timed(name, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, call))
        return epoch(world, 1), seconds


def main() -> None:
    """Prints one line per micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=["toy", *clap_ppo.PRESETS], default="toy")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=None)
    parser.add_argument("--save", default="", help="a file to which each line is added as JSON")
    parser.add_argument("flags", nargs="*", help="flags of clap_ppo.py, after --")
    args = parser.parse_args()
    prompts = str(Path(clap_ppo.__file__).parent / "samples/prompts.txt")
    cfg, _ = clap_ppo.parse_args(["--prompts", prompts, "--preset", args.preset, *args.flags])
    world = build_world(cfg)
    cuda, clips = world.device.type == "cuda", cfg.prompts_per_epoch * cfg.clips_per_prompt
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.preset} on {name}: {cfg.dtype}, T = {cfg.num_steps}, {clips} clips", flush=True)
    for micro_batch in args.micro_batches or [cfg.micro_batch]:
        world.cfg = replace(cfg, micro_batch=micro_batch)
        epoch(world, 0)                                                      # warm-up
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        total, within = network_seconds(world)
        peak = (torch.cuda.max_memory_allocated() if cuda else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 30
        row = {"name": "bench", "seed": 0, "preset": args.preset, "device": name,
               "micro_batch": micro_batch, "clips": clips, "seconds": total,
               "overhead": round(total / sum(within.values()), 3), "peak_gib": round(peak, 2),
               "flags": " ".join(args.flags)}
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in within.items())
        print(f"micro-batch {micro_batch:>3}: epoch {total:.2f} s ({parts})  overhead "
              f"{row['overhead']}  {clips / total:.1f} clips/s  peak {peak:.1f} GiB", flush=True)
        if args.save:
            with open(args.save, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    try:
        main()
    except clap_ppo.UserError as error:
        sys.exit(f"bench.py: {error}")
