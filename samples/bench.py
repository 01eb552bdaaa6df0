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
from transformers import BatchEncoding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clap_ppo  # noqa: E402

# The flags of a run, as in the docstring of clap_ppo.py.
REAL = ("--clap lukewys/laion_clap/630k-audioset-best.pt --seconds 5.12 --num-steps 20 "
        "--learning-rate 1e-4 --micro-batch 8")
PRESETS = {"toy": "",
           "audioldm": f"--model cvssp/audioldm-s-full-v2 --eval-guidance 2.5 {REAL}",
           "audioldm2": f"--model cvssp/audioldm2 --eval-guidance 3.5 {REAL}"}
LEVELS = dict(down_block_types=["DownBlock2D"] + 3 * ["CrossAttnDownBlock2D"],
              up_block_types=3 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"],
              block_out_channels=[128, 256, 384, 640], layers_per_block=2, sample_size=128,
              in_channels=8, out_channels=8)


def build_pipeline(preset: str, rows: int, device) -> tuple[SimpleNamespace, dict]:
    """The parts of a full-size pipeline that an epoch uses, and random conditions."""
    import diffusers
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
    torch.manual_seed(0)
    with torch.device(device):
        if preset == "audioldm":
            unet = diffusers.UNet2DConditionModel.from_config(LEVELS | dict(
                attention_head_dim=32, cross_attention_dim=LEVELS["block_out_channels"],
                class_embed_type="simple_projection", class_embeddings_concat=True,
                projection_class_embeddings_input_dim=512))
            # As in `load_pipeline`.
            unet.forward = functools.partial(unet.forward, encoder_hidden_states=None)
            condition = {"class_labels": torch.nn.functional.normalize(torch.randn(rows, 512))}
        else:
            unet = diffusers.AudioLDM2UNet2DConditionModel.from_config(LEVELS | dict(
                attention_head_dim=[4, 8, 12, 20], cross_attention_dim=4 * [[None, 768, 1024]]))
            condition = {"encoder_hidden_states": torch.randn(rows, 8, 768),
                         "encoder_hidden_states_1": torch.randn(rows, 20, 1024),
                         "encoder_attention_mask_1": torch.ones(rows, 20, dtype=torch.int64)}
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


def build_setup(cfg: clap_ppo.Config, preset: str) -> clap_ppo.Setup:
    """What `clap_ppo.load_setup` makes; but for the toy, of random weights."""
    prompts, num_train = clap_ppo.split_prompts(cfg)
    if preset == "toy":
        return clap_ppo.load_setup(cfg, prompts, num_train)
    device, dtype = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        device, dtype = torch.device("cuda"), torch.bfloat16
    if cfg.dtype != "auto":
        dtype = getattr(torch, cfg.dtype)
    pipeline, condition = build_pipeline(preset, 2 * len(prompts), device)
    clap = clap_ppo.build_clap(
        clap_ppo.OFFICIAL | {"htsat": {"embed_dim": 96, "depths": [2, 2, 6, 2]}}).to(device)
    ones = torch.ones(1, 77, dtype=torch.int64)
    clap.tokenizer = lambda *args, **_: BatchEncoding({"input_ids": 9 * ones,
                                                       "attention_mask": ones})
    unet = clap_ppo.add_lora(pipeline.unet, cfg.lora_rank)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    schedule = clap_ppo.ddim_schedule(pipeline.scheduler, cfg.num_steps)
    # A mel frame lasts 10 ms, and the VAE makes one of four.
    latent_shape = (8, math.ceil(int(cfg.seconds / 0.01) / 4), 16)
    return clap_ppo.Setup(
        cfg=cfg, prompts=prompts, num_train=num_train, condition=condition, pipeline=pipeline,
        reward=functools.partial(clap_ppo.clap_reward, clap), reward_name="clap_reward",
        unet=unet, optimizer=torch.optim.AdamW(weights, weight_decay=1e-4),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        schedule=[table.to(device) for table in schedule], latent_shape=latent_shape,
        device=device, dtype=dtype)


def epoch(setup, metrics: list) -> float:
    """Seconds of the next epoch of `clap_ppo.train`."""
    setup.cfg = replace(setup.cfg, epochs=len(metrics) + 1)
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        clap_ppo.train(setup, Path(folder), metrics)
    return metrics[-1]["seconds"]


def network_seconds(setup, metrics: list) -> tuple[float, dict[str, float]]:
    """Seconds of an epoch, and those of them spent within each network and in the gradient."""
    clap, seconds = setup.reward.args[0], {}
    places = [("U-Net", setup.unet, "forward"), ("VAE", setup.pipeline.vae, "decode"),
              ("vocoder", setup.pipeline.vocoder, "forward"),
              ("CLAP", clap["audio_branch"], "forward"), ("CLAP", clap["text_branch"], "forward"),
              ("gradient", torch.Tensor, "backward")]

    def now():
        if setup.device.type == "cuda":
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
        for name, owner, method in places:
            call = timed(name, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, call))
        return epoch(setup, metrics), seconds


def main() -> None:
    """Prints one line per micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="toy")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=None)
    parser.add_argument("--save", default="", help="a file to which each line is added as JSON")
    parser.add_argument("flags", nargs="*", help="flags of clap_ppo.py, after --")
    args = parser.parse_args()
    prompts = str(clap_ppo.HERE / "samples/prompts.txt")
    flags = ["--prompts", prompts] + PRESETS[args.preset].split() + args.flags
    cfg, _ = clap_ppo.parse_args(flags)
    setup = build_setup(cfg, args.preset)
    cuda, clips = setup.device.type == "cuda", cfg.prompts_per_epoch * cfg.clips_per_prompt
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(setup.dtype).removeprefix("torch.")
    print(f"{args.preset} on {name}: {dtype}, T = {cfg.num_steps}, {clips} clips", flush=True)
    for micro_batch in args.micro_batches or [cfg.micro_batch]:
        setup.cfg, metrics = replace(cfg, micro_batch=micro_batch), []
        epoch(setup, metrics)                                                # warm-up
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        total, within = network_seconds(setup, metrics)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20      # GiB of KiB
        if cuda:
            peak = torch.cuda.max_memory_allocated() / 2 ** 30
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
