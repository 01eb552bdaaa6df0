# SPDX-License-Identifier: MIT
"""Train the toy world of clap_ppo.py from seeds: a text-to-audio model, a reward and a judge.

    python samples/toy/make_toy.py                  # everything: about 90 core minutes
    python samples/toy/make_toy.py --stage unet     # one stage; its inputs must exist
    python samples/toy/make_toy.py --fast --out DIR # tiny budgets, to check that all stages run

Everything is an instance of the class that the real models use, in the file format they use:

    STAGE text       tokenizer, and a text encoder that learns to name a caption's events
    STAGE vae        diffusers.AutoencoderKL: log-mel (1, 128, 64) <-> latents (8, 16, 8)
    STAGE vocoder    SpeechT5HifiGan: log-mel -> waveform; starts as an oscillator bank
    STAGE unet       UNet2DConditionModel, on captions that err
    STAGE clap       laion_clap's CLAP, contrastive, on true captions: the reward
    STAGE judge      transformers.ClapModel, of other sizes and seed, on other clips: the judge
    STAGE export     pipeline/ (diffusers.AudioLDMPipeline), clap.pt, judge/ in half precision

PPO needs a model with something left to mend. So for its last 350 training steps the U-Net has
captions that, in half of the cases, take a sound for a related one (a bark for a whimper, water for
wind) or reverse the order. It knows every sound by then, but learns not to trust the words: asked
for barks, it plays barks now and then. Classifier-free guidance, which amplifies what a caption
changes in the prediction, would mend errors at random, as these average out. Of errors that are
always the same it finds few; a reward that tells sounds apart can find all: toy_sounds.RELATED.

A finished stage is skipped. One that is asked for by name takes what it builds on from --out, if
the build folder, OUT.build, does not have it: `--stage unet`, then `--stage export` make another
U-Net for the VAE, text encoder, vocoder, reward and judge that are there, and replace it alone (45
minutes with `--threads 1`, as it was made).
"""

import argparse
import json
import math
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import toy_sounds
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SAMPLE_RATE = 16000
HOP = 320                    # 50 mel frames per second: 2.56 s -> 128 frames
FRAMES, MELS = 128, 64
MAX_TOKENS = 77              # laion_clap pads every caption to 77 tokens
EMBED = 64                   # width of the text embedding that conditions the U-Net
SPLITS = {"train": (16000, 1), "judge": (9000, 2)}     # number of clips, seed


# ==== 1. Features and training ====
def log_mel(waveforms):
    """Log-mels (B, samples // 320, 64) of waveforms (B, samples), scaled to -2.2 .. 3.2."""
    from torchaudio.transforms import MelSpectrogram
    transform = MelSpectrogram(SAMPLE_RATE, n_fft=1024, hop_length=HOP, n_mels=MELS, f_max=8000,
                               power=1, norm="slaney", mel_scale="slaney")
    mel = transform(waveforms)[..., :-1].transpose(1, 2)     # the last, half-empty frame goes
    return (torch.log(mel.clamp(min=1e-5)) + 6.0) / 2.5


def to_float(waves_int16):
    return torch.from_numpy(waves_int16.astype(np.float32) / 32767)


def blocks(rows, size, name):
    """The next `size` of the rows, again and again, with a progress bar."""
    for start in tqdm(range(0, len(rows), size), desc=name, mininterval=20):
        yield rows[start:start + size]


def train(args, name, module, loss_fn, steps, lr, batch, betas=(0.9, 0.99), weight_decay=0.0,
          ema_decay=None):
    """The module after `steps` steps of AdamW; from build/NAME.pt, if it was trained before.

    loss_fn(step, generator, batch) -> scalar loss. With `ema_decay`: averaged weights.
    """
    done = args.build / f"{name}.pt"
    if done.exists():
        module.load_state_dict(torch.load(done, weights_only=True))
        return module.eval()
    if args.fast:
        steps, batch = 3, 4
    optimizer = torch.optim.AdamW(module.parameters(), lr, betas, weight_decay=weight_decay)
    ema = {key: value.clone() for key, value in module.state_dict().items()}
    module.train()
    bar = tqdm(range(steps), desc=name, mininterval=20)
    for step in bar:
        # A warm-up of 100 steps, and a cosine from 1 to 0.05 of the learning rate.
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        warm = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm
        generator = torch.Generator().manual_seed(step)
        loss = loss_fn(step, generator, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if ema_decay:
            decay = min(ema_decay, (step + 1) / (step + 10))
            for key, value in module.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
    if ema_decay:
        module.load_state_dict(ema)
    torch.save(module.state_dict(), done)
    return module.eval()


def exported(args, stage, name, kind):
    """Module `name` of an earlier export, or None if `stage` has to make, or has made, its own."""
    folder = args.out / "pipeline" / name
    own = args.build / f"{stage}.pt"
    if args.stage in (None, stage) or own.exists() or not folder.exists():
        return None
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


# ==== 2. Clips ====
def render(args, split):
    """Clips of a split, rendered once: scenes (list of N) and int16 waveforms (N, 40960)."""
    waves_file = args.build / f"{split}.npy"
    scenes_file = args.build / f"{split}.json"
    if not scenes_file.exists():
        clips, seed = SPLITS[split]
        if args.fast:
            clips = 16
        size = min(clips, 100)
        scenes, waves = [], []
        for i in tqdm(range(clips // size), desc=f"render {split}", mininterval=20):
            rng = np.random.default_rng(seed * 100_000 + i)
            drawn = [toy_sounds.random_scene(rng) for _ in range(size)]
            for scene in drawn:
                wave = toy_sounds.render(scene, rng)
                waves.append((wave * 32767).astype(np.int16))
            scenes += drawn
        np.save(waves_file, np.stack(waves))
        scenes_file.write_text(json.dumps(scenes))
    return json.loads(scenes_file.read_text()), np.load(waves_file, mmap_mode="r")


def mels_of(args, split):
    """Log-mels (N, 128, 64) of a split, half precision, computed once."""
    file = args.build / f"{split}_mel.pt"
    if not file.exists():
        _, waves = render(args, split)
        mels = []
        for block in blocks(waves, 100, file.stem):
            mels.append(log_mel(to_float(block)).half())
        torch.save(torch.cat(mels), file)
    return torch.load(file, weights_only=True)


# ==== 3. STAGE text: tokenizer and text encoder ====
def make_tokenizer():
    """RobertaTokenizer (byte-level BPE): every toy word is one token; other text falls to bytes."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer
    words = toy_sounds.vocabulary()
    words += [word.title() for word in words]
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(20 * [" ".join(words)], vocab_size=1200, min_frequency=1,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, add_prefix_space=True,
                            model_max_length=MAX_TOKENS)


def write_caption(scene, rng):
    """A caption as people type it: sometimes with a capital letter, sometimes with a full stop."""
    text = toy_sounds.caption(scene, rng)
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text += "."
    return text


def embed_captions(tokenizer, encoder, captions):
    """Normalised text embeddings (N, 64)."""
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return F.normalize(encoder(**tokens).text_embeds, dim=-1)


def text_stage(args):
    """Tokenizer, and a text encoder (AudioLDM has CLAP's) that is trained to name the events."""
    from transformers import ClapTextConfig, ClapTextModelWithProjection
    tokenizer = make_tokenizer()
    encoder = exported(args, "text", "text_encoder", ClapTextModelWithProjection)
    if encoder is not None:
        return tokenizer, encoder
    torch.manual_seed(11)
    encoder = ClapTextModelWithProjection(ClapTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=192, max_position_embeddings=MAX_TOKENS + 3, projection_dim=EMBED,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    names = list(toy_sounds.EVENTS)
    head = nn.Linear(EMBED, 6 * len(names))

    def loss_fn(step, generator, batch):
        rng = np.random.default_rng(step)
        scenes = [toy_sounds.random_scene(rng) for _ in range(batch)]
        captions = [write_caption(scene, rng) for scene in scenes]
        # To be named of each event: 0 absent, 1 all the time, 2-5 first to fourth.
        labels = torch.zeros(batch, len(names), dtype=torch.long)
        for label, (relation, events) in zip(labels, scenes, strict=True):
            for place, event in enumerate(events):
                label[names.index(event)] = 2 + place if relation == "then" else 1
        logits = 10 * head(embed_captions(tokenizer, encoder, captions))
        return F.cross_entropy(logits.view(-1, 6), labels.view(-1))

    module = nn.ModuleDict({"encoder": encoder, "head": head})
    train(args, "text", module, loss_fn, steps=2000, lr=2e-3, batch=128)
    return tokenizer, encoder.eval()


# ==== 4. STAGE vae, STAGE vocoder ====
def vae_stage(args):
    """AutoencoderKL with factor 8: log-mel (B, 1, 128, 64) -> latents (B, 8, 16, 8)."""
    from diffusers import AutoencoderKL
    vae = exported(args, "vae", "vae", AutoencoderKL)
    if vae is not None:
        return vae
    torch.manual_seed(12)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(16, 16, 32, 64),
        down_block_types=4 * ("DownEncoderBlock2D",), up_block_types=4 * ("UpDecoderBlock2D",),
        layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False, scaling_factor=1.0)
    mels = mels_of(args, "train")

    def loss_fn(step, generator, batch):
        clips = torch.randint(len(mels), (batch,), generator=generator)
        mel = mels[clips].float()[:, None]
        posterior = vae.encode(mel).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(output, mel) + 0.5 * F.l1_loss(output, mel) + 2e-3 * kl

    return train(args, "vae", vae, loss_fn, steps=1500, lr=2e-3, batch=16)


@torch.no_grad()
def encode(vae, mels):
    return vae.encode(mels.float()[:, None]).latent_dist.mode()


@torch.no_grad()
def make_vocoder():
    """SpeechT5HifiGan that starts as a bank of oscillators, one per mel band."""
    # A small HiFi-GAN does not find pure tones (whistle, birds) in minutes. While the mel stands
    # still, a convolutional vocoder can only sound harmonics of its frame rate (50 Hz), so these
    # are put in. Training then finds amplitudes, noise and transients.
    import torchaudio
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
    torch.manual_seed(13)
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=MELS, sampling_rate=SAMPLE_RATE, upsample_initial_channel=64,
        upsample_rates=[20, 16], upsample_kernel_sizes=[40, 32], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]], normalize_before=False, initializer_range=0.02))
    filters = torchaudio.functional.melscale_fbanks(
        513, 0, 8000, MELS, SAMPLE_RATE, "slaney", "slaney")
    centre = torch.linspace(0, 8000, 513)[filters.argmax(dim=0)]
    centre = (centre / 50).round() * 50                # Hz, harmonics of 50
    first, second = vocoder.upsampler                  # weights: (in, out, taps)
    for conv in (vocoder.conv_pre, first, second, vocoder.conv_post):
        conv.bias.zero_()
        conv.weight.mul_(0.2)

    # conv_pre passes the bands on.
    bands = torch.arange(MELS)
    vocoder.conv_pre.weight[bands, bands, 3] += 1.0
    vocoder.conv_pre.bias[bands] = -1.0                # quiet bands stay quiet
    # The first upsampler (x20, 1 kHz) turns a band into an oscillation relative to the nearest
    # multiple of 1 kHz, as a pair of phases.
    taps = torch.arange(40) - 10
    window = torch.hann_window(40)
    for band in range(MELS):
        carrier = int(torch.round(centre[band] / 1000))
        hz = centre[band] - 1000 * carrier
        beat = 2 * math.pi * hz / 1000 * taps + 2.4 * band
        first.weight[band, 2 * carrier] += window * beat.cos()
        first.weight[band, 2 * carrier + 1] -= window * beat.sin()
    # The second (x16) moves it up to its frequency.
    taps = torch.arange(32) - 8
    window = 0.1 * torch.hann_window(32)
    for carrier in range(9):
        angle = 2 * math.pi * 1000 * carrier / SAMPLE_RATE * taps
        for output, sign in ((0, 1), (1, -1)):         # two opposite copies: the leaky ReLU
            second.weight[2 * carrier, output] += sign * window * angle.cos()
            second.weight[2 * carrier + 1, output] += sign * window * angle.sin()
    vocoder.conv_post.weight[0, :2, 3] += torch.tensor([1.0, -1.0])
    return vocoder


def spectral_loss(output, target):
    """L1 of log-mels and log-magnitudes at several resolutions: right spectra, free phases."""
    loss = 2 * F.l1_loss(log_mel(output), log_mel(target))
    for n_fft in (256, 512, 1024, 2048):
        stft = partial(torch.stft, n_fft=n_fft, hop_length=n_fft // 4,
                       window=torch.hann_window(n_fft), return_complex=True)
        made = stft(output).abs()
        real = stft(target).abs()
        loss = loss + F.l1_loss(torch.log(made + 0.03), torch.log(real + 0.03))
        loss = loss + (made - real).norm() / real.norm()
    return loss


def vocoder_stage(args):
    """The vocoder, trained on excerpts of 0.64 s."""
    vocoder = make_vocoder()
    _, waves = render(args, "train")
    mels = mels_of(args, "train")
    frames = 32

    def loss_fn(step, generator, batch):
        clips = torch.randint(len(mels), (batch,), generator=generator).tolist()
        starts = torch.randint(FRAMES - frames + 1, (batch,), generator=generator).tolist()
        mel, wave = [], []
        for clip, start in zip(clips, starts, strict=True):
            stop = start + frames
            mel.append(mels[clip, start:stop])
            wave.append(waves[clip, start * HOP:stop * HOP])
        output = vocoder(torch.stack(mel).float())
        return spectral_loss(output, to_float(np.stack(wave)))

    return train(args, "vocoder", vocoder, loss_fn, steps=2500, lr=2e-3, batch=16,
                 betas=(0.8, 0.99))


def vocoded_split(args, split, n):
    """The first n clips of a split through VAE and vocoder: what the models will sound like."""
    file = args.build / f"{split}_vocoded.npy"
    if not file.exists():
        vae = vae_stage(args)
        vocoder = vocoder_stage(args)
        waves = []
        with torch.no_grad():
            for mel in blocks(mels_of(args, split)[:n], 50, file.stem):
                mel = vae.decode(encode(vae, mel)).sample[:, 0]
                wave = vocoder(mel).clamp(-1, 1) * 32767
                waves.append(wave.numpy().astype(np.int16))
        np.save(file, np.concatenate(waves))
    return np.load(file, mmap_mode="r")


# ==== 5. STAGE unet ====
def make_unet():
    """U-Net conditioned through class_labels, as AudioLDM's."""
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
    unet.class_embedding.weight.data.mul_(8)    # numbers in embeddings of length 1 are small
    return unet


@torch.no_grad()
def erring_captions(scenes, tokenizer, encoder, shares):
    """Embeddings (3, N, 64) of three captions of each scene, all three with the same error."""
    confused, disordered, wrong = shares    # of mishear, mislabel
    rng = np.random.default_rng(4)
    named = []
    for scene in scenes:
        scene = toy_sounds.mishear(scene, rng, confused, disordered)
        named.append(toy_sounds.mislabel(scene, rng, wrong))
    embeds = []
    for _ in range(3):
        captions = [write_caption(scene, rng) for scene in named]
        for block in blocks(captions, 500, "captions"):
            embeds.append(embed_captions(tokenizer, encoder, block))
    return torch.cat(embeds).view(3, len(scenes), EMBED)


def unet_stage(args):
    """The parts of a pipeline but for the vocoder; the U-Net is trained on captions that err."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1)                         # AudioLDM's settings
    vae = vae_stage(args)
    tokenizer, encoder = text_stage(args)
    scenes, _ = render(args, "train")
    file = args.build / "train_latents.pt"
    if not file.exists():
        parts = blocks(mels_of(args, "train"), 100, file.stem)
        latents = [encode(vae, mels) for mels in parts]
        torch.save(torch.cat(latents), file)
    latents = torch.load(file, weights_only=True)                       # (N, 8, 16, 8)
    if vae.config.scaling_factor == 1:      # an exported VAE has its own
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
    latents = latents * vae.config.scaling_factor
    empty = embed_captions(tokenizer, encoder, [""]).detach()
    alpha_bar = scheduler.alphas_cumprod
    unet = make_unet()

    def loss_fn(texts, step, generator, batch):
        clips = torch.randint(len(latents), (batch,), generator=generator)
        variant = torch.randint(3, (batch,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < 0.1       # for guidance
        condition = torch.where(dropped, empty, texts[variant, clips])
        t = torch.randint(1000, (batch,), generator=generator)
        x0 = latents[clips]
        noise = torch.randn(x0.shape, generator=generator)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        noise_pred = unet(noisy, t, encoder_hidden_states=None, class_labels=condition).sample
        snr = (a / (1 - a)).flatten()       # min-SNR-5 weights (Hang et al. 2023)
        weight = torch.clamp(snr, max=5.0) / snr
        error = (noise_pred - noise).square().mean(dim=(1, 2, 3))
        return (weight * error).mean()

    def fit(name, shares, steps, lr, ema_decay):
        texts = None
        if not (args.build / f"{name}.pt").exists():
            texts = erring_captions(scenes, tokenizer, encoder, shares)
        train(args, name, unet, partial(loss_fn, texts), steps, lr, batch=64, weight_decay=0.01,
              ema_decay=ema_decay)

    # Captions that say what is heard come first, those that confuse last, and for a short time. On
    # the second kind alone the U-Net would never tell related sounds apart.
    if not (args.build / "unet.pt").exists():
        fit("unet-first", (0, 0, 0.1), steps=5500, lr=1.5e-3, ema_decay=0.999)
    fit("unet", (0.5, 0.5, 0.1), steps=350, lr=7e-4, ema_decay=0.99)
    return vae, encoder, tokenizer, unet, scheduler


# ==== 6. STAGE clap, STAGE judge ====
def train_clap(args, name, module, features_of, embed, split, vocoded, seed):
    """A CLAP trained on the clips of a split, the first of them a second time, vocoded.

    features_of(waves) -> (N, 1, frames, 64) in dB; embed(features, tokens) -> audio, text (B, D).
    """
    tokenizer = make_tokenizer()
    if not (args.build / f"{name}.pt").exists():
        scenes, waves = render(args, split)
        waves = np.concatenate([waves, vocoded_split(args, split, vocoded)])
        scenes = scenes + scenes[:vocoded]
        features = features_of(waves)

    def loss_fn(step, generator, batch):
        rng = np.random.default_rng(seed + step)
        clips = torch.randint(len(features), (batch,), generator=generator)
        gain = 4 * torch.randn(batch, 1, 1, 1, generator=generator)
        picked = [scenes[i] for i in clips.tolist()]
        captions = [write_caption(scene, rng) for scene in picked]
        tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        audio, text = embed(features[clips].float() + gain, tokens)
        # InfoNCE in both directions (Radford et al. 2021); clips of one scene share a label.
        cosine = F.normalize(audio, dim=-1) @ F.normalize(text, dim=-1).T
        logits = module.logit_scale_a.exp().clamp(max=50) * cosine
        label = torch.tensor([picked.index(scene) for scene in picked])
        target = (label[:, None] == label[None]).float()
        target = target / target.sum(dim=1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    return train(args, name, module, loss_fn, steps=1800, lr=2e-3, batch=64, weight_decay=0.01)


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
    """laion_clap's own CLAP with random weights, no download; sizes: what `clap_sizes` returns."""
    # `import laion_clap` fetches three tokenizers, and its constructor 500 MB of RoBERTa. So its
    # classes are imported from the package's folder, under the name that it gives them itself.
    from importlib.util import find_spec
    from unittest import mock

    from transformers import RobertaConfig, RobertaModel
    folder = find_spec("laion_clap").submodule_search_locations[0]
    if folder not in sys.path:
        sys.path.append(folder)
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    from clap_module import htsat
    from clap_module import model as clap_model
    roberta = RobertaConfig(**sizes["roberta"])

    def make_htsat(audio_cfg, *_):
        return htsat.HTSAT_Swin_Transformer(config=audio_cfg, **sizes["htsat"])

    def make_roberta(_):
        return RobertaModel(roberta)

    # While the model is made, "download RoBERTa" means "make one from its configuration".
    with (mock.patch.object(clap_model, "create_htsat_model", make_htsat),
          mock.patch.object(RobertaModel, "from_pretrained", make_roberta)):
        clap = clap_model.CLAP(sizes["embed_dim"], sizes["audio_cfg"], sizes["text_cfg"],
                               joint_embed_shape=sizes["joint_embed_shape"])
    # The class knows RoBERTa's width only as a literal, 768.
    clap.text_projection[0] = nn.Linear(roberta.hidden_size, clap.joint_embed_shape)
    return clap.eval().requires_grad_(False)


def clap_stage(args):
    """The reward: laion_clap's own classes, small."""
    from torchaudio.functional import resample
    torch.manual_seed(15)
    clap = make_clap(clap_sizes(len(make_tokenizer()))).requires_grad_(True)
    branch = clap.audio_branch
    branch.spectrogram_extractor.requires_grad_(False)
    branch.logmel_extractor.requires_grad_(False)

    @torch.no_grad()
    def features_of(waves):
        features = []
        for block in blocks(waves, 50, "clap features"):
            x = resample(to_float(block), SAMPLE_RATE, clap.audio_cfg.sample_rate)
            features.append(branch.logmel_extractor(branch.spectrogram_extractor(x)))
        return torch.cat(features)

    def embed(features, tokens):
        # HTSAT's forward without the extractors and its augmentation of spectrograms.
        x = branch.bn0(features.transpose(1, 3)).transpose(1, 3)
        x = branch.forward_features(branch.reshape_wav2img(x))["embedding"]
        return clap.audio_projection(x), clap.encode_text(tokens, "cpu")

    return train_clap(args, "clap", clap, features_of, embed, "train", vocoded=6000, seed=0)


def judge_stage(args):
    """The judge, which nothing is trained against: 16 kHz, window, hop and sizes of its own."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel
    torch.manual_seed(16)
    config = ClapConfig(
        text_config=dict(vocab_size=len(make_tokenizer()), hidden_size=80, num_hidden_layers=2,
                         num_attention_heads=4, intermediate_size=160, projection_dim=96,
                         max_position_embeddings=MAX_TOKENS + 3, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0),
        audio_config=dict(num_mel_bins=64, spec_size=64, patch_size=4, patch_stride=[4, 4],
                          patch_embeds_hidden_size=24, depths=[2, 2, 2],
                          num_attention_heads=[3, 6, 12], num_hidden_layers=3, hidden_size=96,
                          projection_dim=96, num_classes=12, window_size=4,
                          hidden_dropout_prob=0.0, drop_path_rate=0.0),
        projection_dim=96)
    extractor = ClapFeatureExtractor(
        feature_size=64, sampling_rate=SAMPLE_RATE, hop_length=768, max_length_s=3,
        fft_window_size=1536, frequency_min=40, frequency_max=8000, truncation="rand_trunc",
        padding="pad")
    judge = ClapModel(config)

    def features_of(waves):
        features = []
        for i, block in enumerate(blocks(waves, 100, "judge features")):
            rng = np.random.default_rng(100 * i)
            level = rng.uniform(-70, -35, size=(len(block), 1))        # of added noise, in dB
            noise = rng.standard_normal(block.shape).astype(np.float32)
            noisy = block.astype(np.float32) / 32767 + 10 ** (level / 20) * noise
            mels = extractor(list(noisy), sampling_rate=SAMPLE_RATE, return_tensors="np")
            features.append(mels["input_features"].astype(np.float16))
        return torch.from_numpy(np.concatenate(features))

    def embed(features, tokens):
        audio = judge.get_audio_features(input_features=features).pooler_output
        text = judge.get_text_features(**tokens).pooler_output
        return audio, text

    train_clap(args, "judge", judge, features_of, embed, "judge", vocoded=5000, seed=10_000_000)
    return judge, extractor


# ==== 7. STAGE export, command line ====
def export_stage(args):
    """Everything in half precision under --out, in the formats of the real models."""
    from diffusers import AudioLDMPipeline
    from transformers import ClapProcessor
    vae, encoder, tokenizer, unet, scheduler = unet_stage(args)
    made = [name for name in STAGES if (args.build / f"{name}.pt").exists()]
    if made == ["unet"]:                    # the rest of an earlier export stays, byte for byte
        unet.half().save_pretrained(args.out / "pipeline" / "unet")
        return

    vocoder = vocoder_stage(args)
    pipeline = AudioLDMPipeline(vae, encoder, tokenizer, unet, scheduler, vocoder)
    pipeline.to(torch.float16).save_pretrained(args.out / "pipeline")
    words = "\n".join(toy_sounds.vocabulary()) + "\n"
    (args.out / "pipeline" / "vocabulary.txt").write_text(words)

    state = dict(clap_stage(args).half().state_dict())
    torch.save({"epoch": 0, "name": "toy", "state_dict": state}, args.out / "clap.pt")
    sizes = json.dumps(clap_sizes(len(tokenizer)), indent=1) + "\n"
    (args.out / "clap.json").write_text(sizes)

    judge, extractor = judge_stage(args)
    judge.half().save_pretrained(args.out / "judge")
    ClapProcessor(extractor, tokenizer).save_pretrained(args.out / "judge")


STAGES = {"text": text_stage, "vae": vae_stage, "vocoder": vocoder_stage, "unet": unet_stage,
          "clap": clap_stage, "judge": judge_stage, "export": export_stage}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=list(STAGES), help="only this stage (default: all)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    parser.add_argument("--fast", action="store_true", help="16 clips, 3 steps: a smoke test")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    args.build = args.out.with_name(args.out.name + ".build")
    args.build.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage in (None, name):
            stage(args)


if __name__ == "__main__":
    main()
