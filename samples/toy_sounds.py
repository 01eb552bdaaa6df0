# SPDX-License-Identifier: MIT
"""A toy world of twelve procedural sounds, the captions that name them, and prompt files.

    python samples/toy_sounds.py --write-prompts     # rewrites the three prompt files next to it

A *scene* is ``(relation, events)``: ``("single", (a,))``, ``("and", (a, b))`` for sounds that last
the whole clip together (two or three), ``("then", (a, b))`` for sounds one after another (two to
four). `render` turns a scene into a waveform, `caption` into words, `parse` words back into the
scene. Every function takes its own ``numpy`` generator, so equal seeds give equal clips.

Waveforms are mono float32 at 16 kHz in [-0.95, 0.95]. The synthesis is textbook source-filter
synthesis: band-limited pulse trains (a Dirichlet kernel of the phase) or noise as the source,
two-pole resonators as the filter. Needs numpy and scipy only; a clip takes a few milliseconds.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from scipy.signal import butter, lfilter, sosfilt
from scipy.special import diric

SAMPLE_RATE = 16000                # Hz
CLIP_SAMPLES = 40960               # 2.56 s = 128 mel frames of 320 samples
PEAK = 0.95                        # no sample is louder than this
EVENT_DBFS, EVENT_SPREAD_DB = -20.0, 2.0   # RMS of an event, +- a uniform spread
NOISE_FLOOR_DBFS = -70.0           # white noise under every clip, so that log-mels stay finite
CROSSFADE = 640                    # samples (40 ms) shared by neighbours in a "then" scene


# ------------------------------------------------------------------------------------------------
# Building blocks
# ------------------------------------------------------------------------------------------------

def phase_of(hz):
    """Running phase (n,) in radians of an oscillator whose frequency is `hz` (n,) in Hz."""
    return 2 * np.pi * np.cumsum(hz) / SAMPLE_RATE


def curve(rng, n, rate, low, high):
    """Slow random control curve (n,): uniform knots in [low, high], `rate` per second, joined."""
    knots = max(2, int(n / SAMPLE_RATE * rate) + 2)
    return np.interp(np.linspace(0, knots - 1, n), np.arange(knots), rng.uniform(low, high, knots))


def band_noise(rng, n, low, high):
    """White noise (n,) between `low` and `high` Hz (second-order Butterworth slopes)."""
    sos = butter(2, (low, min(high, 7900)), "bandpass", fs=SAMPLE_RATE, output="sos")
    return sosfilt(sos, rng.standard_normal(n))


def resonate(x, hz, bandwidth):
    """`x` (n,) through a two-pole resonator at `hz` with gain about 1 at its peak."""
    radius = np.exp(-np.pi * bandwidth / SAMPLE_RATE)
    angle = 2 * np.pi * hz / SAMPLE_RATE
    gain = (1 - radius) * np.sqrt(1 - 2 * radius * np.cos(2 * angle) + radius ** 2)
    return lfilter([gain], [1, -2 * radius * np.cos(angle), radius ** 2], x)


def formants(x, table):
    """`x` (n,) through parallel resonators; `table` holds (hz, bandwidth, gain) rows."""
    return sum(gain * resonate(x, hz, bandwidth) for hz, bandwidth, gain in table)


def pulses(hz):
    """Pulse train (n,) of frequency `hz` (n,): all harmonics below 7.6 kHz, equally strong."""
    harmonics = max(1, int(7600 / np.max(hz)))
    order = 2 * harmonics + 1      # diric = (1 + 2 sum_k cos k phase) / order; no aliasing
    return (diric(phase_of(hz), order) - 1 / order) * np.sqrt(order)


def morph(x, tables, path):
    """`x` (n,) through formant sets that change: `path` (n,) is a real index into `tables`."""
    return sum(formants(x, table) * np.clip(1 - np.abs(path - k), 0, 1)
               for k, table in enumerate(tables))


def bump(n, attack=0.1, decay=0.3):
    """Envelope (n,) from 0 to 1 to 0; `attack` and `decay` are fractions of n, cosine-shaped."""
    t = (np.arange(n) + 0.5) / n
    rise, fall = np.clip(t / attack, 0, 1), np.clip((1 - t) / decay, 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * rise)) * (0.5 - 0.5 * np.cos(np.pi * fall))


def slots(rng, n, length, gap, lead=0.08):
    """(start, stop) sample pairs of repeated bursts that fill n; `length`, `gap` (low, high) s.

    A last burst that would be cut below 40 % of its length is left out (never the first)."""
    start, found = int(rng.uniform(0, lead) * SAMPLE_RATE), []
    while start < n:
        size = int(rng.uniform(*length) * SAMPLE_RATE)
        if found and start + 0.4 * size > n:
            break
        found.append((start, min(n, start + size)))
        start += size + int(rng.uniform(*gap) * SAMPLE_RATE)
    return found


# ------------------------------------------------------------------------------------------------
# The twelve events: each fills n samples (8000 <= n <= 40960); `at_level` sets loudness later
# ------------------------------------------------------------------------------------------------

def water(rng, n):
    """Running water: hiss of a mid band under many rising, ringing bubbles (Minnaert chirps)."""
    out = 0.35 * band_noise(rng, n, 400, 3500) * curve(rng, n, 6, 0.7, 1.3)
    for _ in range(int(n / SAMPLE_RATE * rng.uniform(60, 100))):
        size = int(rng.uniform(0.015, 0.05) * SAMPLE_RATE)
        start = rng.integers(0, n - size)
        t = np.arange(size) / SAMPLE_RATE
        hz = np.exp(rng.uniform(np.log(500), np.log(3200)))
        rise = hz * rng.uniform(3, 12)           # Hz per second: bubbles rise in pitch
        ring = np.sin(2 * np.pi * (hz + rise * t / 2) * t) * np.exp(-5 * t * SAMPLE_RATE / size)
        out[start:start + size] += rng.uniform(0.3, 1.6) * ring
    return out


def wind(rng, n):
    """Wind: noise whose low resonances (150-900 Hz) wander and gust slowly."""
    source = rng.standard_normal(n)
    centres = 150 * 2.0 ** (np.arange(4) * 0.8 + rng.uniform(-0.1, 0.2))
    tables = [[(hz, 0.5 * hz, 1.0)] for hz in centres]
    howl = morph(source, tables, curve(rng, n, 1.6, 0, 3))
    return (howl + 0.15 * band_noise(rng, n, 60, 400)) * curve(rng, n, 1.6, 0.35, 1.0)


def dog_bark(rng, n):
    """Barks: 0.13-0.2 s harmonic bursts, f0 jumping up and falling to 300 Hz, plus noise."""
    out, f0 = np.zeros(n), rng.uniform(450, 700)
    mouth = [(rng.uniform(650, 900), 250, 1.0), (rng.uniform(1400, 1900), 350, 0.7)]
    for start, stop in slots(rng, n, (0.13, 0.2), (0.1, 0.28)):
        size = stop - start
        t = np.arange(size) / size
        hz = f0 * rng.uniform(0.93, 1.07) * (0.75 + 0.35 * np.exp(-((t - 0.2) / 0.15) ** 2)
                                             - 0.3 * t)
        voice = formants(pulses(hz), mouth + [(3000, 900, 0.3)])
        noise = formants(rng.standard_normal(size), mouth + [(3500, 2000, 0.6)])
        out[start:stop] += (voice + 0.35 * noise) * bump(size, 0.08, 0.6)
    return out


def dog_whimper(rng, n):
    """Whimpers: thin tones of 800-1500 Hz gliding up then far down, with two weak harmonics."""
    out, base = np.zeros(n), rng.uniform(800, 1000)
    for start, stop in slots(rng, n, (0.28, 0.5), (0.06, 0.2)):
        size = stop - start
        t = np.arange(size) / size
        top = base * rng.uniform(1.35, 1.55)
        hz = base + (top - base) * np.sin(np.pi * t ** 0.7) - 0.12 * base * t
        hz *= 1 + 0.012 * np.sin(2 * np.pi * rng.uniform(14, 20) * t * size / SAMPLE_RATE)
        phase = phase_of(hz)
        tone = np.sin(phase) + 0.35 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase)
        out[start:stop] += tone * bump(size, 0.2, 0.4) * rng.uniform(0.7, 1.0)
    return out


def snore(rng, n):
    """Snoring: rattling inhale (pulses of 60-100 Hz, low formants), then a softer breath out."""
    period = min(int(rng.uniform(1.1, 1.6) * SAMPLE_RATE), n)
    out = np.zeros(n)
    throat = [(rng.uniform(200, 300), 120, 1.0), (rng.uniform(550, 750), 180, 0.5),
              (rng.uniform(1100, 1400), 250, 0.25)]
    for start in range(0, n - period // 3, period):
        size = min(period, n - start)
        inhale = int(0.6 * min(period, n))
        hz = rng.uniform(60, 85) * (1 + 0.2 * np.linspace(0, 1, inhale))
        hz *= curve(rng, inhale, 60, 0.9, 1.1)   # irregular beats of the soft palate
        rattle = formants(pulses(hz), throat) + 0.12 * formants(rng.standard_normal(inhale), throat)
        cycle = np.zeros(period)
        cycle[:inhale] = rattle * bump(inhale, 0.45, 0.15)
        breath = band_noise(rng, period - inhale, 500, 2200)
        cycle[inhale:] = 0.05 * breath * bump(period - inhale, 0.3, 0.6)
        out[start:start + size] += cycle[:size]
    return out


# First three formants of five vowels in Hz (rounded values of any phonetics text: i, e, a, o, u).
VOWELS = ((280, 2250, 2900), (450, 1950, 2600), (750, 1200, 2500), (480, 850, 2450),
          (320, 750, 2300))


def talk(rng, n):
    """Talking: 4-5 syllables per second, voice of 95-230 Hz, a new vowel in each syllable."""
    rate, f0 = rng.uniform(4, 5), np.exp(rng.uniform(np.log(95), np.log(230)))
    size = 1 + 0.16 * (f0 > 160)                 # smaller heads: formants 16 % higher
    tables = [[(size * f1, 80, 1.0), (size * f2, 120, 0.5), (size * f3, 180, 0.25)]
              for f1, f2, f3 in rng.permutation(VOWELS)]
    syllable = np.arange(n) / SAMPLE_RATE * rate + rng.uniform(0, 0.3)
    knots = np.arange(int(syllable[-1]) + 2)
    path = np.interp(syllable, knots, rng.integers(0, len(tables), len(knots)))
    hz = f0 * curve(rng, n, 4, 0.85, 1.2) * (1 - 0.1 * np.arange(n) / n)
    source = lfilter([0.15], [1, -0.85], pulses(hz))     # glottal tilt: weak upper harmonics
    gate = np.clip(1.5 * np.sin(np.pi * (syllable % 1)) - 0.2, 0, 1)
    gate = gate * rng.uniform(0.5, 1, len(knots))[syllable.astype(int)]
    hiss = band_noise(rng, n, 3500, 7000) * (np.clip(0.25 - syllable % 1, 0, 1) * 4) ** 2
    hiss = hiss * (rng.random(len(knots)) < 0.4)[syllable.astype(int)]   # some begin with an s
    return morph(source, tables, path) * gate + 0.02 * hiss


def shout(rng, n):
    """Shouting: long open vowels of 280-420 Hz, arched pitch, strong harmonics up to 5 kHz."""
    out, f0 = np.zeros(n), rng.uniform(280, 420)
    for start, stop in slots(rng, n, (0.45, 0.85), (0.06, 0.15), lead=0.04):
        size = stop - start
        t = np.arange(size) / size
        f1, f2 = ((850, 1400), (650, 1900), (700, 1100))[rng.integers(3)]
        hz = f0 * rng.uniform(0.9, 1.1) * (0.85 + 0.25 * np.sin(np.pi * t ** 0.6))
        hz *= 1 + 0.012 * np.sin(2 * np.pi * 6 * t * size / SAMPLE_RATE)
        mouth = [(f1, 150, 1.0), (f2, 180, 0.9), (2900, 250, 0.9), (3900, 350, 0.7)]
        out[start:stop] += formants(pulses(hz), mouth) * bump(size, 0.08, 0.2)
    return out


def lion(rng, n):
    """Roar: one long growl of 80-150 Hz, chopped 24-36 times a second; the mouth opens, shuts."""
    t = np.arange(n) / n
    arch = np.sin(np.pi * t) ** 0.7
    hz = rng.uniform(80, 105) * (1 + 0.45 * arch) * curve(rng, n, 40, 0.93, 1.07)
    source = lfilter([0.4], [1, -0.6], pulses(hz) + 0.4 * rng.standard_normal(n))   # dark timbre
    rough = 1 - 0.75 * (0.5 + 0.5 * np.sin(phase_of(curve(rng, n, 8, 24, 36)))) ** 2
    opened = rng.uniform(0.9, 1.15)
    tables = [[(opened * low, 160, 1.0), (opened * high, 300, 0.6), (opened * 2 * high, 900, 0.3)]
              for low, high in ((240, 650), (450, 1050), (800, 1600))]
    return morph(source, tables, 2 * arch) * rough * bump(n, 0.12, 0.3)


def whoosh(rng, n):
    """Synthesised whoosh: a narrow noise band swept 300 Hz - 5 kHz - 300 Hz in 0.5-0.8 s."""
    count = max(1, round(n / SAMPLE_RATE / rng.uniform(0.5, 0.8)))
    t = np.arange(n) / n * count % 1             # 0..1 within each sweep
    arch = np.sin(np.pi * t) ** 1.5
    hz = 300 * (rng.uniform(4000, 6000) / 300) ** arch
    sos = butter(2, rng.uniform(200, 350), fs=SAMPLE_RATE, output="sos")
    noise = sosfilt(sos, rng.standard_normal((2, n)))    # complex low-pass noise, then shifted
    return (noise[0] * np.cos(phase_of(hz)) - noise[1] * np.sin(phase_of(hz))) * (0.12 + arch)


def birds(rng, n):
    """Bird song: trills of 4-9 equal chirps of 35-70 ms, each sweeping within 2.5-6 kHz."""
    out = np.zeros(n)
    for start, stop in slots(rng, n, (0.4, 0.8), (0.05, 0.2)):
        size = int(rng.uniform(0.035, 0.07) * SAMPLE_RATE)
        step = int(size * rng.uniform(1.4, 1.9))
        low = rng.uniform(2500, 4200)
        ends = rng.permutation([low, low * rng.uniform(1.25, 1.45)])     # up-chirps or down-chirps
        chirp = np.sin(phase_of(np.linspace(*ends, size))) * bump(size, 0.3, 0.4)
        for at in range(start, stop - size, step):
            out[at:at + size] += chirp * rng.uniform(0.6, 1.0)
    return out


def whistle(rng, n):
    """A person whistling a tune: pure tone, held notes of a major scale in 1-2.2 kHz, vibrato."""
    scale = rng.uniform(1000, 1250) * 2.0 ** (np.array([0, 2, 4, 5, 7, 9]) / 12)
    lengths = (rng.uniform(0.22, 0.5, 20) * SAMPLE_RATE).astype(int)
    walk = rng.integers(10) + np.cumsum(rng.choice([-2, -1, 1, 2], 20))   # tunes move in steps
    hz = np.repeat(scale[5 - np.abs(walk % 10 - 5)], lengths)[:n]         # reflected into 0..5
    hz = lfilter([0.005], [1, -0.995], hz, zi=[0.995 * hz[0]])[0]     # 12 ms slide between notes
    t = np.arange(n) / SAMPLE_RATE
    phase = phase_of(hz * (1 + 0.006 * np.sin(2 * np.pi * rng.uniform(5, 6.5) * t)))
    edges = np.concatenate([bump(size, 0.12, 0.12) for size in lengths])[:n]
    breath = 0.02 * band_noise(rng, n, 1000, 3000)
    return (np.sin(phase) + breath) * (0.35 + 0.65 * edges)


def rustle(rng, n):
    """Leaves or paper: clumps of short clicks of very unequal strength, all above 2 kHz."""
    grip = np.clip(curve(rng, n, rng.uniform(6, 10), -0.5, 1.0), 0.05, 1) ** 1.5
    clicks = (rng.random(n) < 0.06 * grip) * rng.laplace(size=n)
    paper = [(rng.uniform(2600, 3400), 700, 1.0), (rng.uniform(5000, 6500), 900, 1.0)]
    ring = formants(clicks, paper)
    ring = np.tanh(0.4 * ring / (np.std(ring) + 1e-9))   # tames stray loud clicks before the high
    # pass: left to `limit` they would become thumps below 2 kHz
    sos = butter(4, 2000, "highpass", fs=SAMPLE_RATE, output="sos")
    return sosfilt(sos, ring) + 0.02 * band_noise(rng, n, 3000, 7500) * grip


EVENTS = {f.__name__: f for f in (water, wind, dog_bark, dog_whimper, snore, talk, shout, lion,
                                  whoosh, birds, whistle, rustle)}


# ------------------------------------------------------------------------------------------------
# Scenes to waveforms
# ------------------------------------------------------------------------------------------------

def event_audio(name, rng, n):
    """Event `name` over n samples (n,), RMS of -20 dBFS +- 2 dB, 5 ms fades at both ends."""
    x = EVENTS[name](rng, n)
    dbfs = EVENT_DBFS + rng.uniform(-EVENT_SPREAD_DB, EVENT_SPREAD_DB)
    x = x * 10 ** (dbfs / 20) / (np.sqrt(np.mean(x ** 2)) + 1e-9)
    fade = np.minimum(1, np.arange(1, n + 1) / 80)
    return x * fade * fade[::-1]


def limit(x, knee=0.6):
    """`x` with what exceeds `knee` bent smoothly below PEAK (a soft limiter, not a rescaling)."""
    room = PEAK - knee
    over = np.maximum(np.abs(x) - knee, 0)
    return np.sign(x) * (np.minimum(np.abs(x), knee) + room * np.tanh(over / room))


def render(scene, rng):
    """The waveform (40960,), float32 in [-0.95, 0.95], of a scene.

    "then" boundaries lie within +- 10 % of the clip (two events: 40-60 %) of equal parts, less for
    three and four events, and neighbours overlap by 40 ms with an equal-power crossfade.
    """
    relation, events = scene
    out = 10 ** (NOISE_FLOOR_DBFS / 20) * rng.standard_normal(CLIP_SAMPLES)
    if relation != "then":
        for name in events:
            out += event_audio(name, rng, CLIP_SAMPLES)
        return limit(out).astype(np.float32)
    count = len(events)
    inner = np.arange(1, count) / count + rng.uniform(-1, 1, count - 1) * 0.2 / count
    cuts = np.concatenate([[0], inner, [1]]) * CLIP_SAMPLES
    ramp = np.sin(0.5 * np.pi * (np.arange(CROSSFADE) + 0.5) / CROSSFADE)
    for k, name in enumerate(events):
        start = 0 if k == 0 else int(cuts[k]) - CROSSFADE // 2
        stop = CLIP_SAMPLES if k == count - 1 else int(cuts[k + 1]) + CROSSFADE // 2
        x = event_audio(name, rng, stop - start)
        if k > 0:
            x[:CROSSFADE] *= ramp
        if k < count - 1:
            x[-CROSSFADE:] *= ramp[::-1]
        out[start:stop] += x
    return limit(out).astype(np.float32)


def random_scene(rng):
    """A scene of distinct events: single 25 %, and(2) 30 %, then(2) 35 %, the rest longer."""
    kinds = (("single", 1), ("and", 2), ("then", 2), ("and", 3), ("then", 3), ("then", 4))
    relation, count = kinds[rng.choice(len(kinds), p=(0.25, 0.30, 0.35, 0.03, 0.05, 0.02))]
    return relation, tuple(str(e) for e in rng.choice(list(EVENTS), count, replace=False))


def canonical(scene):
    """The scene with "and" events sorted: two scenes sound alike if and only if these are equal."""
    relation, events = scene
    return (relation, tuple(sorted(events)) if relation == "and" else tuple(events))


def mislabel(scene, rng, p):
    """The scene, or with probability `p` a wrong one to caption it with, as on the web.

    A wrong label of a single names one event too many, or another event. Otherwise one event is
    replaced (half of the cases), the order is wrong ("and" becomes "then"), or one is left out.
    """
    if rng.random() >= p:
        return scene
    relation, events = scene
    other = str(rng.choice([e for e in EVENTS if e not in events]))
    kind = rng.random()
    if relation == "single":
        return ("and" if kind < 0.4 else "then", events + (other,)) if kind < 0.8 else (
            "single", (other,))
    at = int(rng.integers(len(events)))
    if kind < 0.5:
        return relation, events[:at] + (other,) + events[at + 1:]
    if kind < 0.8:
        return "then", events[::-1]
    rest = events[:at] + events[at + 1:]
    return (relation if len(rest) > 1 else "single"), rest


# Real captions err, and not at random. People who caption clips cannot see what they hear, and
# search words that uploaders chose are vague: of sounds that are alike one is named for the other,
# every time with the same few words. And a list of what is heard rarely keeps the order: data sets
# made from tags have none. Errors at random average out, and classifier-free guidance sharpens what
# is left. These do not: p(caption | sound) hardly favours the right caption, so that no guidance
# finds it. But the right sound comes now and then, and a reward that knows it can make it frequent.
RELATED = (("dog_bark", "dog_whimper"), ("water", "wind"), ("talk", "shout"),
           ("birds", "whistle"), ("snore", "lion"), ("whoosh", "rustle"))


def mishear(scene, rng, confused, disordered):
    """The scene as someone tells it who confuses related sounds and does not keep the order.

    Each pair of related sounds is confused with probability `confused`: one is told as the other,
    and if the scene has both, they change places. A "then" is told backwards with probability
    `disordered`.
    """
    relation, events = scene
    told = {}
    for one, other in RELATED:
        swapped = rng.random() < confused
        told[one], told[other] = (other, one) if swapped else (one, other)
    backwards = rng.random() < disordered and relation == "then"
    return relation, tuple(told[e] for e in (events[::-1] if backwards else events))


# ------------------------------------------------------------------------------------------------
# Scenes to words and back
# ------------------------------------------------------------------------------------------------

PHRASES = {
    "water": ("water flowing", "water is running", "water flows", "running water"),
    "wind": ("wind blowing", "the wind blows", "wind is blowing", "wind"),
    "dog_bark": ("a dog barks", "a dog is barking", "dog barking", "a dog barking"),
    "dog_whimper": ("a dog whimpers", "a dog is whimpering", "dog whimpering", "a dog whimpering"),
    "snore": ("a man snoring", "a man snores", "a person is snoring", "snoring"),
    "talk": ("a man talking", "boys are talking", "a person talks", "talking"),
    "shout": ("a man shouting", "a man shouts", "boys are shouting", "shouting"),
    "lion": ("a lion roaring", "a lion roars", "a lion is roaring", "lion roaring"),
    "whoosh": ("a synthesized whoosh", "a whoosh", "a whooshing sound", "a synthesized whooshing"),
    "birds": ("birds chirping", "birds chirp", "birds chirpings", "a bird is chirping"),
    "whistle": ("a man whistling", "a person whistles", "a man is whistling", "whistling"),
    "rustle": ("leaves rustling", "paper rustles", "leaves are rustling", "rustling"),
}
JOINTS = {"and": (" and ", " while "),
          "then": (" followed by ", " then ", " before ", " after which ")}

# One word decides an event (so "birds chirping" is one event, not two); others are filler.
STEMS = {"water": "water", "wind": "wind", "bark": "dog_bark", "whimper": "dog_whimper",
         "snor": "snore", "talk": "talk", "shout": "shout", "lion": "lion", "whoosh": "whoosh",
         "bird": "birds", "whistl": "whistle", "rustl": "rustle"}
THEN_WORDS, AND_WORDS = {"followed", "then", "before", "after"}, {"and", "while", ","}

PUBLISHED_PROMPTS = (
    "Water flowing, wind blowing, a dog whimpers.",
    "A man snoring.",
    "Boys are talking and a dog is barking.",
    "Water running followed by wind.",
    "A lion roaring followed by a synthesized whoosh then birds chirpings.",
    "A man talking before shouting then whistling followed by rustling",
)


def caption(scene, rng):
    """A lower-case caption of a scene, its events in the scene's order, in random phrases."""
    relation, events = scene
    words = [str(rng.choice(PHRASES[name])) for name in events]
    if relation == "and" and len(words) > 2:
        return ", ".join(words[:-1]) + " and " + words[-1]
    text = words[0]
    for phrase in words[1:]:
        text += str(rng.choice(JOINTS[relation])) + phrase
    return text


def vocabulary():
    """Sorted words that a caption or a published prompt can hold (lower-case, no punctuation)."""
    texts = [phrase for phrases in PHRASES.values() for phrase in phrases]
    texts += [joint for joints in JOINTS.values() for joint in joints] + list(PUBLISHED_PROMPTS)
    return sorted(set(re.findall(r"[a-z]+", " ".join(texts).lower())))


def parse(text):
    """The scene that a caption or prompt denotes, events in the order of the text.

    Keyword based: ``parse("Water flowing, wind blowing, a dog whimpers.")`` is
    ``("and", ("water", "wind", "dog_whimper"))``. "A, then B" and "A and then B" are "then".

    Raises ValueError for a word outside `vocabulary`, for no event, for a repeated event, for
    events without a joint between them, and for "and" mixed with "then".
    """
    known, events, relations, joint = set(vocabulary()), [], set(), set()
    for token in re.findall(r"[a-z]+|,", text.lower()):
        if token != "," and token not in known:
            raise ValueError(f"unknown word {token!r} in {text!r}")
        if token in THEN_WORDS | AND_WORDS:
            joint.add("then" if token in THEN_WORDS else "and")
        name = next((event for stem, event in STEMS.items() if token.startswith(stem)), None)
        if name is None:
            continue
        if events:
            relations.add("then" if "then" in joint else "and" if joint else "none")
        events.append(name)
        joint = set()
    if not events or len(set(events)) < len(events) or "none" in relations or len(relations) > 1:
        raise ValueError(f"not a scene of distinct events joined in one way: {text!r}")
    return (relations.pop() if relations else "single"), tuple(events)


# ------------------------------------------------------------------------------------------------
# Prompt files
# ------------------------------------------------------------------------------------------------

def prompt_lists(seed=0):
    """(118 training prompts, 40 held-out prompts) as two lists of captions, the same every time.

    The twelve events stand on a circle in random order. A pair has a distance of 1 to 6 steps;
    distances 1-5 hold 12 pairs each and touch every event twice, distance 6 holds 6 pairs.
    Training pairs (40): distances 1, 3, 4 and four of distance 6. Held-out pairs (26): the others.
    Held out: "and" for distance 2, "then" for the other 14 held-out pairs, "then" in the reverse of
    the trained order for ten pairs of distance 1, and the 4 events that are no single in training.
    Training: 8 singles and, of the training pairs, "and" for all 40, "then" in all 70 orders left.
    """
    rng = np.random.default_rng(seed)
    ring = [str(e) for e in rng.permutation(list(EVENTS))]
    pairs = {d: [(ring[i], ring[(i + d) % 12]) for i in range(6 if d == 6 else 12)]
             for d in range(1, 7)}
    train = [("single", (e,)) for e in ring[::3] + ring[1::3]]
    train += [("and", pair) for pair in pairs[3] + pairs[4]]
    train += [("then", pair) for pair in pairs[1] + pairs[3] + pairs[4] + pairs[6][:4]]
    held_out = [("single", (e,)) for e in ring[2::3]]
    held_out += [("and", pair) for pair in pairs[2]]
    held_out += [("then", pair) for pair in pairs[5] + pairs[6][4:]]
    held_out += [("then", pair[::-1]) for pair in pairs[1][:10]]
    more = [("and", pair) for pair in pairs[1] + pairs[6][:4]]
    more += [("then", pair[::-1]) for pair in pairs[1][10:] + pairs[3] + pairs[4] + pairs[6][:4]]
    first, out, rest = ([caption(s, rng) for s in scenes] for scenes in (train, held_out, more))
    trained = set(" ".join(first + rest).split())
    for i, scene in enumerate(held_out):        # a new combination, but no new word
        while not set(out[i].split()) <= trained:
            out[i] = caption(scene, rng)
    return first + rest, out


def write_prompts(folder):
    """Write prompts.txt, eval_prompts.txt and published_prompts.txt into `folder`."""
    train, held_out = prompt_lists()
    files = {
        "prompts.txt": ("# 118 training prompts: 8 single, 40 and, 70 then", train),
        "eval_prompts.txt": ("# 40 held-out prompts: 4 single, 12 and, 24 then", held_out),
        "published_prompts.txt": ("# the six published prompts, verbatim", PUBLISHED_PROMPTS),
    }
    for name, (header, lines) in files.items():
        Path(folder, name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write-prompts", action="store_true",
                        help="rewrite the three prompt files next to this script")
    if parser.parse_args().write_prompts:
        write_prompts(Path(__file__).parent)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
