# SPDX-License-Identifier: MIT
"""What an epoch costs, and how much of it is not the networks' own time.

    python samples/bench.py                                        # the toy, as a run uses it
    python samples/bench.py --preset audioldm2 --micro-batches 8 16 32

Real architectures are built at full size with random weights and prompts: nothing is downloaded.
Per micro-batch, after a warm-up: seconds of an epoch of `clap_ppo.train`, those in each network,
"overhead", which is the epoch over their sum, and on a GPU peak memory.
"""

import argparse
import io
import sys
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clap_ppo

PRESETS = {"toy": [], "audioldm": ["--model", "cvssp/audioldm-s-full-v2"],
           "audioldm2": ["--model", "cvssp/audioldm2"]}
LEVELS = dict(down_block_types=["DownBlock2D"] + 3 * ["CrossAttnDownBlock2D"],
              up_block_types=3 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"],
              block_out_channels=[128, 256, 384, 640], layers_per_block=2, sample_size=128,
              in_channels=8, out_channels=8)
HEADS = {"audioldm": 32, "audioldm2": [4, 8, 12, 20]}
VAE_CHANNELS = [128, 256, 512]
VOCODER_CHANNELS = 1024


def build_pipeline(preset: str, prompts: int, device) -> tuple:
    """The parts of a full-size pipeline that an epoch uses, and conditions for make_setup."""
    import diffusers
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
    torch.manual_seed(0)
    with torch.device(device):
        if preset == "audioldm":
            unet = diffusers.UNet2DConditionModel.from_config(LEVELS | dict(
                attention_head_dim=HEADS[preset], cross_attention_dim=LEVELS["block_out_channels"],
                class_embed_type="simple_projection", class_embeddings_concat=True,
                projection_class_embeddings_input_dim=512))
            # As in `load_pipeline`.
            unet.forward = partial(unet.forward, encoder_hidden_states=None)
            condition = {"class_labels": torch.randn(prompts, 512) / 512 ** 0.5}
        else:
            unet = diffusers.AudioLDM2UNet2DConditionModel.from_config(LEVELS | dict(
                attention_head_dim=HEADS[preset], cross_attention_dim=4 * [[None, 768, 1024]]))
            condition = {"encoder_hidden_states": torch.randn(prompts, 8, 768),
                         "encoder_hidden_states_1": torch.randn(prompts, 20, 1024),
                         "encoder_attention_mask_1": torch.ones(prompts, 20, dtype=torch.int64)}
        vae = diffusers.AutoencoderKL(
            in_channels=1, out_channels=1, down_block_types=3 * ["DownEncoderBlock2D"],
            up_block_types=3 * ["UpDecoderBlock2D"], latent_channels=8, layers_per_block=2,
            block_out_channels=VAE_CHANNELS)
        vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
            model_in_dim=64, sampling_rate=16000, upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4], upsample_initial_channel=VOCODER_CHANNELS))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1)
    pipeline = SimpleNamespace(unet=unet, vae=vae, vocoder=vocoder, scheduler=scheduler)
    for part in (unet, vae, vocoder):
        part.eval().requires_grad_(False)
    pipeline.mel_spectrogram_to_waveform = partial(
        diffusers.AudioLDMPipeline.mel_spectrogram_to_waveform, pipeline)
    return pipeline, (condition, condition)


def build_setup(cfg: clap_ppo.Config, preset: str) -> clap_ppo.Setup:
    """What `clap_ppo.load_setup` makes; but for the toy, of random weights."""
    from transformers import BatchEncoding
    prompts, num_train = clap_ppo.split_prompts(cfg)
    if preset == "toy":
        return clap_ppo.load_setup(cfg, prompts, num_train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline, conditions = build_pipeline(preset, len(prompts), device)
    tiny = {"htsat": {"embed_dim": 96, "depths": [2, 2, 6, 2]}}
    clap = clap_ppo.build_clap(clap_ppo.OFFICIAL | tiny).to(device)
    ones = torch.ones(1, 77, dtype=torch.int64)

    def tokenizer(*args, **kwargs):
        return BatchEncoding({"input_ids": 9 * ones, "attention_mask": ones})

    clap.tokenizer = tokenizer
    reward = partial(clap_ppo.clap_reward, clap)
    return clap_ppo.make_setup(cfg, prompts, num_train, pipeline, conditions, reward)


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


def main(argv=None) -> None:
    """Prints one line per micro-batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="toy")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=None)
    parser.add_argument("flags", nargs="*", help="flags of clap_ppo.py, after --")
    args = parser.parse_args(argv)
    prompts = str(clap_ppo.HERE / "samples/prompts.txt")
    cfg, _ = clap_ppo.parse_args(["--prompts", prompts] + PRESETS[args.preset] + args.flags)
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
        overhead = total / sum(within.values())
        parts = ", ".join([f"{part} {seconds:.2f} s" for part, seconds in within.items()])
        print(f"micro-batch {micro_batch:>3}: epoch {total:.2f} s ({parts})  overhead "
              f"{overhead:.3f}  {clips / total:.1f} clips/s", flush=True)
        if cuda:
            print(f"    peak {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB", flush=True)


if __name__ == "__main__":
    try:
        main()
    except clap_ppo.UserError as error:
        sys.exit(f"bench.py: {error}")
