# SPDX-License-Identifier: MIT
"""Train the toy world of clap_ppo.py from seeds: a text-to-audio model, a reward and a judge.

    python samples/make_toy.py                  # everything, all in order: about 90 core minutes
    python samples/make_toy.py --stage unet     # one stage; its inputs must exist
    python samples/make_toy.py --fast --out DIR # tiny budgets, to check that all stages run

Everything is an instance of the class that the real models use, in the file format they use:

    samples/toy/pipeline/   diffusers.AudioLDMPipeline   (VAE, U-Net, text encoder, vocoder, DDIM)
    samples/toy/clap.pt     laion_clap's CLAP, with clap.json for its sizes       -> the reward
    samples/toy/judge/      transformers.ClapModel, trained apart                 -> the judge

    STAGE render     seeded procedural sounds with captions                         toy_sounds.py
    STAGE text       tokenizer, and a text encoder that learns to name a caption's events
    STAGE vae        AutoencoderKL: log-mel (1, 128, 64) <-> latents (8, 16, 8)
    STAGE vocoder    SpeechT5HifiGan: log-mel -> waveform; starts as an oscillator bank
    STAGE unet       the diffusion model; its captions confuse related sounds and their order, as
                     real ones do, and so does what it plays: what PPO is there to mend
    STAGE clap       the reward model, contrastive, on true captions
    STAGE judge      another CLAP: other class, sizes, seed and clips, vocoded and noisy copies too
    STAGE export     half precision, written to --out

A stage that was cut goes on from its last minute; a finished one is skipped. A stage that is asked
for by name takes what it builds on from --out if the build folder does not have it, and `export`
then replaces the U-Net alone: `--stage unet`, `--stage export` make another U-Net for the VAE, text
encoder, vocoder, reward and judge that are there (45 minutes with `--threads 1`, as it was made).
"""

import argparse
import json
import math
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import toy_sounds  # noqa: E402  (beside this file)

SAMPLE_RATE = 16000
HOP = 320                    # 50 mel frames per second: 2.56 s -> 128 frames
FRAMES, MELS = 128, 64
MAX_TOKENS = 77              # laion_clap pads every caption to 77 tokens
EMBED = 64                   # width of the text embedding that conditions the U-Net
# The U-Net's captions (toy_sounds.mishear, toy_sounds.mislabel): the share of sounds told as the
# one that they resemble, of "then" captions told backwards, and of those wrong at random.
PLAIN_CAPTIONS = 0, 0, 0.1
CONFUSING_CAPTIONS = 0.5, 0.5, 0.1


# ------------------------------------------------------------------------------------------------
# Shared pieces: features, resumable training
# ------------------------------------------------------------------------------------------------

def log_mel(waveforms: torch.Tensor, n_fft: int = 1024, hop: int = HOP, mels: int = MELS):
    """Log-mel spectrogram, standardised to about unit range: what VAE and vocoder speak.

    Args: waveforms (B, samples) at 16 kHz. Returns: (B, samples // hop, mels).
    """
    import torchaudio
    key = (n_fft, hop, mels)
    if key not in _MEL_CACHE:
        _MEL_CACHE[key] = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=n_fft, hop_length=hop, n_mels=mels, f_max=8000, power=1,
            norm="slaney", mel_scale="slaney")
    mel = _MEL_CACHE[key](waveforms)[..., :-1].transpose(1, 2)     # the last, half-empty frame goes
    return (torch.log(mel.clamp(min=1e-5)) + 6.0) / 2.5            # -11.5 .. 2 -> -2.2 .. 3.2


_MEL_CACHE: dict = {}


def train(name, module, loss_fn, args, steps, lr, batch, betas=(0.9, 0.99), weight_decay=0.0,
          ema_decay=None):
    """Module trained for `steps` steps of AdamW (warm-up, cosine), resumable; build/name.pt.

    loss_fn(step, generator, batch) -> scalar loss. With `ema_decay` the averaged weights are saved.
    """
    done, partial = args.build / f"{name}.pt", args.build / f"{name}.partial"
    if done.exists():
        module.load_state_dict(torch.load(done, weights_only=True))
        return module.eval()
    steps, batch = (3, 4) if args.fast else (int(steps * args.scale), batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=betas,
                                  weight_decay=weight_decay)
    ema = {k: v.detach().clone() for k, v in module.state_dict().items()} if ema_decay else None
    start = 0
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], state["step"]
    module.train()
    saved, smooth = time.time(), None
    bar = tqdm(range(start, steps), desc=name, mininterval=20, initial=start, total=steps)
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        warm = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        loss = loss_fn(step, generator, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if ema is not None:
            decay = min(ema_decay, (step + 1) / (step + 10))
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    ema[key].lerp_(value, 1 - decay)
                else:
                    ema[key].copy_(value)
        if time.time() - saved > 60:
            torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(),
                        "ema": ema, "step": step + 1}, str(partial) + ".tmp")
            Path(str(partial) + ".tmp").replace(partial)
            saved = time.time()
    if ema is not None:
        module.load_state_dict(ema)
    torch.save(module.state_dict(), done)
    partial.unlink(missing_ok=True)
    print(f"{name}: {steps} steps, smoothed loss {smooth:.4f}", flush=True)
    return module.eval()


def exported(args, stage, name, kind):
    """The module `name` of an earlier export, or None if `stage` has to make, or has made, its own.
    """
    folder, own = args.out / "pipeline" / name, args.build / f"{stage}.pt"
    if args.stage in (None, stage) or own.exists() or not folder.exists():
        return None
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def draw(generator, high, n):
    return torch.randint(high, (n,), generator=generator)


# ------------------------------------------------------------------------------------------------
# STAGE render
# ------------------------------------------------------------------------------------------------

def _render_block(job):
    seed, n = job
    rng = np.random.default_rng(seed)
    scenes = [toy_sounds.random_scene(rng) for _ in range(n)]
    waves = [toy_sounds.render(scene, rng) for scene in scenes]
    return scenes, (np.stack(waves) * 32767).astype(np.int16)


def render(args, split: str, clips: int, seed: int):
    """Clips of one split, rendered once. Returns scenes (list) and int16 waveforms (N, 40960)."""
    from multiprocessing import get_context
    waves_file, scenes_file = args.build / f"{split}.npy", args.build / f"{split}.json"
    if not scenes_file.exists():
        clips = 16 if args.fast else int(clips * args.scale)
        block = min(clips, 100)
        jobs = [(seed * 100_000 + i, block) for i in range(clips // block)]
        scenes, waves = [], []
        with get_context("spawn").Pool(args.threads) as pool:
            for block_scenes, block_waves in tqdm(pool.imap(_render_block, jobs), total=len(jobs),
                                                  desc=f"render {split}", mininterval=20):
                scenes += block_scenes
                waves.append(block_waves)
        np.save(waves_file, np.concatenate(waves))
        scenes_file.write_text(json.dumps(scenes))
    scenes = [(relation, tuple(events)) for relation, events in json.loads(scenes_file.read_text())]
    return scenes, np.load(waves_file, mmap_mode="r")


def train_split(args):
    return render(args, "train", 16000, seed=1)


def judge_split(args):
    return render(args, "judge", 9000, seed=2)


def test_split(args):
    return render(args, "test", 500, seed=3)


def to_float(waves_int16: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(waves_int16.astype(np.float32) / 32767)


def mels_of(args, split):
    """Log-mels (N, 128, 64) of a split, half precision, computed once."""
    file = args.build / f"{split}_mel.pt"
    if not file.exists():
        _, waves = {"train": train_split, "judge": judge_split, "test": test_split}[split](args)
        torch.save(torch.cat([log_mel(to_float(waves[i:i + 100])).half()
                              for i in range(0, len(waves), 100)]), file)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------
# STAGE text: tokenizer and text encoder
# ------------------------------------------------------------------------------------------------

def make_tokenizer():
    """RobertaTokenizer (byte-level BPE): every toy word is one token; other text falls to bytes.

    Token ids start as RoBERTa's do: <s> 0, <pad> 1, </s> 2, <unk> 3.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    corpus = [" ".join(toy_sounds.vocabulary() + [w.title() for w in toy_sounds.vocabulary()])] * 20
    bpe.train_from_iterator(corpus, vocab_size=1200, min_frequency=1,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    model = json.loads(bpe.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]],
                            add_prefix_space=True, model_max_length=MAX_TOKENS)


def write_caption(scene, rng):
    """A caption as people type it: sometimes with a capital letter, sometimes with a full stop."""
    text = toy_sounds.caption(scene, rng)
    text = text[0].upper() + text[1:] if rng.random() < 0.4 else text
    return text + "." if rng.random() < 0.3 else text


def tokenize(tokenizer, captions):
    """Token ids and mask (B, L) of captions, padded to the batch's longest."""
    tokens = tokenizer(captions, padding="longest", truncation=True, max_length=MAX_TOKENS,
                       return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def make_text_encoder(vocab_size):
    from transformers import ClapTextConfig, ClapTextModelWithProjection
    torch.manual_seed(11)
    return ClapTextModelWithProjection(ClapTextConfig(
        vocab_size=vocab_size, hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=192, max_position_embeddings=MAX_TOKENS + 3, projection_dim=EMBED,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def attributes(scene):
    """What the text encoder must name: per event 0 absent, 1 all the time, 2-5 first to fourth."""
    relation, events = scene
    labels = torch.zeros(len(toy_sounds.EVENTS), dtype=torch.long)
    names = list(toy_sounds.EVENTS)
    for position, event in enumerate(events):
        labels[names.index(event)] = 2 + position if relation == "then" else 1
    return labels


def text_stage(args):
    """Text encoder (in place of CLAP's pre-trained one), trained to name events and their order."""
    from transformers import ClapTextModelWithProjection
    tokenizer = make_tokenizer()
    if encoder := exported(args, "text", "text_encoder", ClapTextModelWithProjection):
        return tokenizer, encoder
    encoder = make_text_encoder(len(tokenizer))
    head = nn.Linear(EMBED, len(toy_sounds.EVENTS) * 6)
    module = nn.ModuleDict({"encoder": encoder, "head": head})

    def loss_fn(step, generator, batch):
        rng = np.random.default_rng(step)
        scenes = [toy_sounds.random_scene(rng) for _ in range(batch)]
        tokens = tokenize(tokenizer, [write_caption(scene, rng) for scene in scenes])
        embeds = F.normalize(encoder(**tokens).text_embeds, dim=-1)
        logits = 10 * module["head"](embeds)
        labels = torch.stack([attributes(scene) for scene in scenes])
        return F.cross_entropy(logits.view(-1, 6), labels.view(-1))

    train("text", module, loss_fn, args, steps=2000, lr=2e-3, batch=128)
    return tokenizer, encoder.eval()


@torch.no_grad()
def embed_captions(tokenizer, encoder, captions):
    embeds = [encoder(**tokenize(tokenizer, captions[i:i + 500])).text_embeds
              for i in range(0, len(captions), 500)]
    return F.normalize(torch.cat(embeds), dim=-1)


# ------------------------------------------------------------------------------------------------
# STAGE vae, STAGE vocoder
# ------------------------------------------------------------------------------------------------

def vae_stage(args):
    """AutoencoderKL with factor 8: log-mel (B, 1, 128, 64) -> latents (B, 8, 16, 8)."""
    from diffusers import AutoencoderKL
    if vae := exported(args, "vae", "vae", AutoencoderKL):
        return vae
    torch.manual_seed(12)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(16, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False, scaling_factor=1.0)
    mels = mels_of(args, "train")

    def loss_fn(step, generator, batch):
        mel = mels[draw(generator, len(mels), batch)].float()[:, None]
        posterior = vae.encode(mel).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(output, mel) + 0.5 * F.l1_loss(output, mel) + 2e-3 * kl

    return train("vae", vae, loss_fn, args, steps=1500, lr=2e-3, batch=16)


def make_vocoder():
    """SpeechT5HifiGan that starts as a bank of oscillators, one per mel band.

    A small HiFi-GAN does not find pure tones (whistle, birds) in minutes. A convolutional vocoder
    can only sound harmonics of its frame rate (50 Hz) when the mel stands still, so they are put
    in: conv_pre passes the bands on; the first upsampler (x20, 1 kHz) turns a band into an
    oscillation relative to the nearest multiple of 1 kHz, as a pair of phases; the second (x16)
    moves it up to its frequency. Training then finds amplitudes, noise and transients.
    """
    import torchaudio
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
    torch.manual_seed(13)
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=MELS, sampling_rate=SAMPLE_RATE, upsample_initial_channel=64,
        upsample_rates=[20, 16], upsample_kernel_sizes=[40, 32], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]], normalize_before=False, initializer_range=0.02))
    filters = torchaudio.functional.melscale_fbanks(513, 0, 8000, MELS, SAMPLE_RATE, "slaney",
                                                    "slaney")
    centre = torch.linspace(0, 8000, 513)[filters.argmax(dim=0)]
    centre = (centre / 50).round() * 50                                   # Hz, harmonics of 50
    with torch.no_grad():
        for conv in (vocoder.conv_pre, vocoder.conv_post, *vocoder.upsampler):
            conv.bias.zero_()
        bands = torch.arange(MELS)
        vocoder.conv_pre.weight.mul_(0.2)
        vocoder.conv_pre.weight[bands, bands, 3] += 1.0
        vocoder.conv_pre.bias[bands] = -1.0                               # quiet bands stay quiet
        first, second = (layer.weight for layer in vocoder.upsampler)     # (in, out, taps)
        first.mul_(0.2), second.mul_(0.2)
        slow, fast = torch.arange(40) - 10, torch.arange(32) - 8
        for band in range(MELS):
            carrier = int(torch.round(centre[band] / 1000))
            beat = 2 * math.pi * (centre[band] - 1000 * carrier) / 1000 * slow + 2.4 * band
            window = torch.hann_window(40)
            first[band, 2 * carrier] += window * beat.cos()
            first[band, 2 * carrier + 1] -= window * beat.sin()
        for carrier in range(9):
            angle = 2 * math.pi * 1000 * carrier / SAMPLE_RATE * fast
            for output in range(2):                # two opposite copies survive the leaky ReLU
                sign = 1 - 2 * output
                second[2 * carrier, output] += 0.1 * sign * torch.hann_window(32) * angle.cos()
                second[2 * carrier + 1, output] += 0.1 * sign * torch.hann_window(32) * angle.sin()
        vocoder.conv_post.weight.mul_(0.2)
        vocoder.conv_post.weight[0, :2, 3] += torch.tensor([1.0, -1.0])
    return vocoder


def spectral_loss(output, target):
    """L1 of log-mels and log-magnitudes at several resolutions: right spectra, free phases."""
    loss = 2 * F.l1_loss(log_mel(output), log_mel(target))
    for n_fft in (256, 512, 1024, 2048):
        window = torch.hann_window(n_fft)
        spec = [torch.stft(w, n_fft, n_fft // 4, window=window, return_complex=True).abs()
                for w in (output, target)]
        loss = loss + F.l1_loss(*[torch.log(s + 0.03) for s in spec])
        loss = loss + (spec[0] - spec[1]).norm() / spec[1].norm()
    return loss


def vocoder_stage(args):
    """The vocoder, trained on excerpts of 0.64 s."""
    vocoder = make_vocoder()
    _, waves = train_split(args)
    mels = mels_of(args, "train")
    frames = 32

    def loss_fn(step, generator, batch):
        clips = draw(generator, len(mels), batch).tolist()
        starts = draw(generator, FRAMES - frames + 1, batch).tolist()
        mel = [mels[c, s:s + frames] for c, s in zip(clips, starts, strict=True)]
        mel = torch.stack(mel).float()
        wave = to_float(np.stack([waves[c, s * HOP:(s + frames) * HOP]
                                  for c, s in zip(clips, starts, strict=True)]))
        return spectral_loss(vocoder(mel), wave)

    return train("vocoder", vocoder, loss_fn, args, steps=2500, lr=2e-3, batch=16,
                 betas=(0.8, 0.99))


@torch.no_grad()
def vocoded_split(args, split, n):
    """The first n clips of a split through VAE and vocoder: what the models will sound like."""
    file = args.build / f"{split}_vocoded.npy"
    if not file.exists():
        vae, vocoder, mels = vae_stage(args), vocoder_stage(args), mels_of(args, split)[:n]
        parts = []
        for i in tqdm(range(0, len(mels), 50), desc=f"vocoded {split}", mininterval=20):
            mel = mels[i:i + 50].float()[:, None]
            mel = vae.decode(vae.encode(mel).latent_dist.mode()).sample[:, 0]
            parts.append((vocoder(mel).clamp(-1, 1) * 32767).numpy().astype(np.int16))
        np.save(file, np.concatenate(parts))
    return np.load(file, mmap_mode="r")


# ------------------------------------------------------------------------------------------------
# STAGE unet
# ------------------------------------------------------------------------------------------------

def make_scheduler():
    from diffusers import DDIMScheduler  # AudioLDM's settings
    return DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear",
                         clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@torch.no_grad()
def latents_of(args, vae):
    """Latents (N, 8, 16, 8) of the training clips, not scaled yet, computed once."""
    file = args.build / "train_latents.pt"
    if not file.exists():
        mels = mels_of(args, "train")
        torch.save(torch.cat([vae.encode(mels[i:i + 100].float()[:, None]).latent_dist.mode()
                              for i in range(0, len(mels), 100)]), file)
    return torch.load(file, weights_only=True)


def unet_stage(args):
    """U-Net conditioned through class_labels, as AudioLDM's; trained on captions that err."""
    from diffusers import UNet2DConditionModel
    torch.manual_seed(14)
    channels = (32, 64, 96)
    unet = UNet2DConditionModel(
        sample_size=(FRAMES // 8, MELS // 8), in_channels=8, out_channels=8,
        block_out_channels=channels, layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=channels, class_embed_type="simple_projection",
        class_embeddings_concat=True, projection_class_embeddings_input_dim=EMBED)
    with torch.no_grad():
        unet.class_embedding.weight.mul_(8)   # unit-norm embeddings are small numbers: 1/8 each
    vae = vae_stage(args)
    tokenizer, encoder = text_stage(args)
    scenes, _ = train_split(args)
    latents = latents_of(args, vae)
    if vae.config.scaling_factor == 1:         # an exported VAE has its own
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
    latents = latents * vae.config.scaling_factor
    # Captions that say what is heard come first, those that confuse last, and for a short time: so
    # the U-Net knows each sound and the order, and has learned not to trust the words. From scratch
    # on the second kind alone it would never tell them apart, and PPO would have little to find.
    texts = {}
    for kind, shares in (("unet-first", PLAIN_CAPTIONS), ("unet", CONFUSING_CAPTIONS)):
        if (args.build / f"{kind}.pt").exists():
            continue
        # Three captions for each clip, all of the same scene: who tells it errs once and for good.
        confused, disordered, wrong = shares
        rng = np.random.default_rng(4)
        told = [toy_sounds.mislabel(toy_sounds.mishear(scene, rng, confused, disordered), rng,
                                    wrong) for scene in scenes]
        texts[kind] = torch.stack([
            embed_captions(tokenizer, encoder, [write_caption(s, rng) for s in told])
            for _ in range(3)])
    empty = embed_captions(tokenizer, encoder, [""])
    abar = make_scheduler().alphas_cumprod

    def loss_fn(kind, step, generator, batch):
        clips, variant = draw(generator, len(latents), batch), draw(generator, 3, batch)
        x0, condition = latents[clips], texts[kind][variant, clips]
        dropped = torch.rand(batch, 1, generator=generator) < 0.1      # for guidance
        condition = torch.where(dropped, empty, condition)
        t = draw(generator, 1000, batch)
        noise = torch.randn(x0.shape, generator=generator)
        a = abar[t].view(-1, 1, 1, 1)
        prediction = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, encoder_hidden_states=None,
                          class_labels=condition).sample
        snr = (a / (1 - a)).flatten()                                  # min-SNR-5 weights
        weight = torch.clamp(snr, max=5.0) / snr
        return (weight * (prediction - noise).square().mean(dim=(1, 2, 3))).mean()

    if not (args.build / "unet.pt").exists():
        train("unet-first", unet, partial(loss_fn, "unet-first"), args, steps=5500, lr=1.5e-3,
              batch=64, ema_decay=0.999, weight_decay=0.01)
    train("unet", unet, partial(loss_fn, "unet"), args, steps=350, lr=7e-4, batch=64,
          ema_decay=0.99, weight_decay=0.01)
    return vae, tokenizer, encoder, unet


# ------------------------------------------------------------------------------------------------
# STAGE clap, STAGE judge
# ------------------------------------------------------------------------------------------------

def contrastive_loss(audio, text, scenes, log_scale):
    """InfoNCE both ways (Radford et al. 2021); clips of one scene share the positive label.

    Args: audio, text (B, D), not normalised; scenes: list of B hashables; log_scale: scalar.
    """
    cosine = F.normalize(audio, dim=-1) @ F.normalize(text, dim=-1).T
    logits = log_scale.exp().clamp(max=50) * cosine
    ids = {scene: i for i, scene in enumerate(dict.fromkeys(scenes))}
    label = torch.tensor([ids[scene] for scene in scenes])
    target = (label[:, None] == label[None]).float()
    target = target / target.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def clap_sizes(vocab_size):
    """clap.json: a laion_clap model configuration, and the sizes that its names do not reach."""
    return {
        "embed_dim": 96, "joint_embed_shape": 128,
        "audio_cfg": {"audio_length": 64, "clip_samples": 61440, "mel_bins": 64,
                      "sample_rate": 24000, "window_size": 1024, "hop_size": 1000, "fmin": 50,
                      "fmax": 8000, "class_num": 12, "model_type": "HTSAT", "model_name": "tiny"},
        "text_cfg": {"context_length": 77, "vocab_size": vocab_size, "width": 96, "heads": 4,
                     "layers": 2, "model_type": "roberta"},
        "htsat": {"spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "num_classes": 12,
                  "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 8,
                  "ape": True},
        "roberta": {"vocab_size": vocab_size, "hidden_size": 96, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "intermediate_size": 192,
                    "max_position_embeddings": MAX_TOKENS + 3, "type_vocab_size": 1,
                    "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.0,
                    "attention_probs_dropout_prob": 0.0},
    }


def make_clap(sizes):
    """laion_clap's own CLAP module with random weights, built without any download.

    sizes: a model configuration of the package (what `clap_sizes` returns), with "htsat" and
    "roberta", the keyword arguments of its towers.
    """
    from importlib.util import find_spec
    from unittest import mock

    from transformers import RobertaConfig, RobertaModel
    # `import laion_clap` fetches three tokenizers, and its constructor 500 MB of RoBERTa. So its
    # classes are imported from the package's folder, under the name that it gives them itself.
    folder = find_spec("laion_clap").submodule_search_locations[0]
    if folder not in sys.path:
        sys.path.append(folder)
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    from clap_module import htsat
    from clap_module import model as clap_model
    # While the model is made, "download RoBERTa" means "make one from its configuration".
    roberta = RobertaConfig(**sizes["roberta"])

    def make_htsat(audio_cfg, *_):
        return htsat.HTSAT_Swin_Transformer(config=audio_cfg, **sizes["htsat"])

    def make_roberta(name):
        return RobertaModel(roberta)

    with (mock.patch.object(clap_model, "create_htsat_model", make_htsat),
          mock.patch.object(RobertaModel, "from_pretrained", make_roberta)):
        clap = clap_model.CLAP(sizes["embed_dim"], sizes["audio_cfg"], sizes["text_cfg"],
                               joint_embed_shape=sizes["joint_embed_shape"])
    # The class knows RoBERTa's width only as a literal, 768.
    clap.text_projection[0] = nn.Linear(roberta.hidden_size, clap.joint_embed_shape)
    return clap.eval().requires_grad_(False)


def clap_features(clap, waves):
    """The log-mel input of laion_clap's audio branch, (N, 1, frames, 64), from int16 clips."""
    import torchaudio
    parts = []
    for i in tqdm(range(0, len(waves), 50), desc="clap features", mininterval=20):
        x = torchaudio.functional.resample(to_float(waves[i:i + 50]), SAMPLE_RATE,
                                           clap.audio_cfg.sample_rate)
        with torch.no_grad():
            branch = clap.audio_branch
            parts.append(branch.logmel_extractor(branch.spectrogram_extractor(x)))
    return torch.cat(parts)


def clap_audio(clap, features):
    """Audio embeddings from log-mels: HTSAT's forward without the extractor and its SpecAugment."""
    branch = clap.audio_branch
    x = branch.bn0(features.transpose(1, 3)).transpose(1, 3)
    return clap.audio_projection(branch.forward_features(branch.reshape_wav2img(x))["embedding"])


def clap_stage(args):
    """The reward: laion_clap's own classes, small."""
    tokenizer = make_tokenizer()
    torch.manual_seed(15)
    clap = make_clap(clap_sizes(len(tokenizer))).requires_grad_(True)
    clap.audio_branch.spectrogram_extractor.requires_grad_(False)
    clap.audio_branch.logmel_extractor.requires_grad_(False)
    if not (args.build / "clap.pt").exists():
        scenes, waves = train_split(args)
        n = 16 if args.fast else 6000
        features = clap_features(clap, np.concatenate([waves, vocoded_split(args, "train", n)]))
        scenes = scenes + scenes[:n]

    def loss_fn(step, generator, batch):
        rng = np.random.default_rng(step)
        clips = draw(generator, len(features), batch)
        gain = 4 * torch.randn(batch, 1, 1, 1, generator=generator)            # dB
        picked = [scenes[i] for i in clips.tolist()]
        tokens = tokenize(tokenizer, [write_caption(s, rng) for s in picked])
        return contrastive_loss(clap_audio(clap, features[clips] + gain),
                                clap.encode_text(tokens, "cpu"), picked, clap.logit_scale_a)

    clap = train("clap", clap, loss_fn, args, steps=1800, lr=2e-3, batch=64, weight_decay=0.01)
    return clap, tokenizer


def make_judge(vocab_size):
    """ClapModel and feature extractor: 16 kHz, other window, hop, sizes, seed than the reward."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel
    torch.manual_seed(16)
    config = ClapConfig(
        text_config=dict(vocab_size=vocab_size, hidden_size=80, num_hidden_layers=2,
                         num_attention_heads=4, intermediate_size=160, projection_dim=96,
                         max_position_embeddings=MAX_TOKENS + 3, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0),
        audio_config=dict(num_mel_bins=64, spec_size=64, patch_size=4, patch_stride=[4, 4],
                          patch_embeds_hidden_size=24, depths=[2, 2, 2],
                          num_attention_heads=[3, 6, 12], num_hidden_layers=3, hidden_size=96,
                          projection_dim=96, num_classes=12,
                          window_size=4, hidden_dropout_prob=0.0, drop_path_rate=0.0),
        projection_dim=96)
    extractor = ClapFeatureExtractor(
        feature_size=64, sampling_rate=SAMPLE_RATE, hop_length=768, max_length_s=3,
        fft_window_size=1536, frequency_min=40, frequency_max=8000, truncation="rand_trunc",
        padding="pad")
    return ClapModel(config), extractor


def _judge_block(job):
    waves, seed = job
    _, extractor = make_judge(100)
    rng = np.random.default_rng(seed)
    noisy = waves.astype(np.float32) / 32767
    level = rng.uniform(-70, -35, size=(len(noisy), 1))                        # dBFS of added noise
    noisy = noisy + 10 ** (level / 20) * rng.standard_normal(noisy.shape).astype(np.float32)
    out = extractor(list(noisy), sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"]
    return out.astype(np.float16)


def judge_features(args, waves):
    from multiprocessing import get_context
    jobs = [(np.asarray(waves[i:i + 100]), i) for i in range(0, len(waves), 100)]
    with get_context("spawn").Pool(args.threads) as pool:
        blocks = tqdm(pool.imap(_judge_block, jobs), total=len(jobs), desc="judge features",
                      mininterval=20)
        return torch.from_numpy(np.concatenate(list(blocks)))


def judge_stage(args):
    """The judge: never trained against; knows vocoded and noisy clips."""
    tokenizer = make_tokenizer()
    judge, extractor = make_judge(len(tokenizer))
    if not (args.build / "judge.pt").exists():
        scenes, waves = judge_split(args)
        n = 16 if args.fast else 5000
        features = judge_features(args, np.concatenate([waves, vocoded_split(args, "judge", n)]))
        scenes = scenes + scenes[:n]

    def loss_fn(step, generator, batch):
        rng = np.random.default_rng(step + 10_000_000)
        clips = draw(generator, len(features), batch)
        gain = 4 * torch.randn(batch, 1, 1, 1, generator=generator)
        picked = [scenes[i] for i in clips.tolist()]
        tokens = tokenize(tokenizer, [write_caption(s, rng) for s in picked])
        heard = features[clips].float() + gain
        audio = judge.get_audio_features(input_features=heard).pooler_output
        text = judge.get_text_features(**tokens).pooler_output
        return contrastive_loss(audio, text, picked, judge.logit_scale_a)

    return train("judge", judge, loss_fn, args, steps=1800, lr=2e-3, batch=64,
                 weight_decay=0.01), extractor, tokenizer


# ------------------------------------------------------------------------------------------------
# STAGE export
# ------------------------------------------------------------------------------------------------

def export_stage(args):
    """Everything in half precision under --out, in the formats of the real models."""
    from diffusers import AudioLDMPipeline
    from transformers import ClapProcessor
    vae, tokenizer, encoder, unet = unet_stage(args)
    if [name for name in STAGES if (args.build / f"{name}.pt").exists()] == ["unet"]:
        # Made for the rest of an earlier export, which stays as it is, byte for byte.
        return unet.half().save_pretrained(args.out / "pipeline" / "unet")
    pipeline = AudioLDMPipeline(vae, encoder, tokenizer, unet, make_scheduler(),
                                vocoder_stage(args))
    pipeline.to(torch.float16).save_pretrained(args.out / "pipeline")
    (args.out / "pipeline" / "vocabulary.txt").write_text("\n".join(toy_sounds.vocabulary()) + "\n")
    clap, _ = clap_stage(args)
    state = {k: v.half() if v.is_floating_point() else v for k, v in clap.state_dict().items()}
    torch.save({"epoch": 0, "name": "toy", "state_dict": state}, args.out / "clap.pt")
    (args.out / "clap.json").write_text(json.dumps(clap_sizes(len(tokenizer)), indent=1) + "\n")
    judge, extractor, _ = judge_stage(args)
    judge.half().save_pretrained(args.out / "judge")
    ClapProcessor(extractor, tokenizer).save_pretrained(args.out / "judge")
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"wrote {args.out}: {size / 2**20:.1f} MiB")


STAGES = {"render": lambda a: (train_split(a), judge_split(a), test_split(a)), "text": text_stage,
          "vae": vae_stage, "vocoder": vocoder_stage, "unet": unet_stage, "clap": clap_stage,
          "judge": judge_stage, "export": export_stage}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=list(STAGES), help="only this stage (default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "toy", help="folder to write")
    parser.add_argument("--build", type=Path, default=None,
                        help="folder for rendered clips and checkpoints (default: OUT with .build)")
    parser.add_argument("--fast", action="store_true",
                        help="16 clips, 3 steps a stage: a smoke test")
    parser.add_argument("--scale", type=float, default=1.0, help="scales clips and steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the batches")
    args = parser.parse_args()
    args.build = args.build or args.out.with_name(args.out.name + ".build")
    args.build.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name in [args.stage] if args.stage else STAGES:
        start = time.time()
        STAGES[name](args)
        print(f"stage {name}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
