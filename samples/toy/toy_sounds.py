# SPDX-License-Identifier: MIT
"""A toy world of twelve procedural sounds, the captions that name them, and prompt files.

    python samples/toy/toy_sounds.py      # rewrites the prompt files, one folder up

A *scene* is ``(relation, events)``: ``("single", (a,))``, ``("and", (a, b))`` for two or three
sounds that last the whole clip together, ``("then", (a, b))`` for two to four one after another.
`render` turns a scene into a waveform, `caption` into words; equal seeds of the ``numpy`` generator
give equal clips. Waveforms are mono float32 at 16 kHz in [-0.95, 0.95]. This is textbook
source-filter synthesis: the source is a pulse train or noise, the filter a set of resonators.
"""

import re
from pathlib import Path

import numpy as np
from numpy import arange, clip, cos, exp, log, pi, sin, sqrt, zeros
from scipy.signal import butter, lfilter, sosfilt
from scipy.special import diric

SAMPLE_RATE = 16000                # Hz
CLIP_SAMPLES = 40960               # 2.56 s = 128 mel frames of 320 samples
KNEE, PEAK = 0.6, 0.95             # louder samples than the knee are limited to below the peak
EVENT_DBFS = -20.0                 # RMS of an event in dB of full scale,
EVENT_SPREAD_DB = 2.0              # plus or minus up to this much, uniformly
NOISE_FLOOR_DBFS = -70.0           # white noise under every clip, so that log-mels stay finite
CROSSFADE = 640                    # samples (40 ms) shared by neighbours in a "then" scene


# ==== 1. Building blocks ====
def phase_of(hz):
    """Running phase (n,) in radians of an oscillator whose frequency is `hz` (n,) in Hz."""
    return 2 * pi * np.cumsum(hz) / SAMPLE_RATE


def duration(rng, low, high):
    """A random time between `low` and `high` seconds, in samples."""
    return int(rng.uniform(low, high) * SAMPLE_RATE)


def curve(rng, n, rate, low, high):
    """Slow random control curve (n,): uniform knots in [low, high], `rate` per second, joined."""
    count = max(2, int(n / SAMPLE_RATE * rate) + 2)
    knots = rng.uniform(low, high, count)
    place = np.linspace(0, count - 1, n)
    return np.interp(place, arange(count), knots)


def band_noise(rng, n, low, high):
    """White noise (n,) between `low` and `high` Hz (second-order Butterworth slopes)."""
    sos = butter(2, (low, high), "bandpass", fs=SAMPLE_RATE, output="sos")
    return sosfilt(sos, rng.standard_normal(n))


def formants(x, table):
    """`x` (n,) through parallel two-pole resonators; `table`: rows (hz, bandwidth, gain at hz)."""
    out = zeros(len(x))
    for hz, bandwidth, gain in table:
        radius = exp(-pi * bandwidth / SAMPLE_RATE)
        angle = 2 * pi * hz / SAMPLE_RATE
        unity = (1 - radius) * sqrt(1 - 2 * radius * cos(2 * angle) + radius ** 2)
        denominator = [1, -2 * radius * cos(angle), radius ** 2]
        out += gain * lfilter([unity], denominator, x)
    return out


def pulses(hz):
    """Pulse train (n,) of frequency `hz` (n,): all harmonics below 7.6 kHz, equally strong."""
    harmonics = max(1, int(7600 / np.max(hz)))
    order = 2 * harmonics + 1      # diric = (1 + 2 sum_k cos k phase) / order; no aliasing
    return (diric(phase_of(hz), order) - 1 / order) * sqrt(order)


def morph(x, tables, path):
    """`x` (n,) through formant sets that change: `path` (n,) is a real index into `tables`."""
    out = zeros(len(x))
    for k, table in enumerate(tables):
        nearness = clip(1 - np.abs(path - k), 0, 1)
        out += formants(x, table) * nearness
    return out


def bump(n, attack, decay):
    """Envelope (n,) from 0 to 1 to 0; `attack` and `decay` are fractions of n, cosine-shaped."""
    t = (arange(n) + 0.5) / n
    rise = 0.5 - 0.5 * cos(pi * clip(t / attack, 0, 1))
    fall = 0.5 - 0.5 * cos(pi * clip((1 - t) / decay, 0, 1))
    return rise * fall


def bursts(rng, n, length, gap, lead=0.08):
    """(start, stop) sample pairs of repeated bursts that fill n; `length`, `gap`: (low, high) s."""
    start = duration(rng, 0, lead)
    found = []
    while start < n:
        size = duration(rng, *length)
        if found and start + 0.4 * size > n:
            break                  # a last burst of which less than 40 % would be heard
        found.append((start, min(n, start + size)))
        start += size + duration(rng, *gap)
    return found


# ==== 2. The twelve events: n samples each, 8000 <= n <= 40960, at any level ====
def water(rng, n):
    """Running water: hiss of a mid band under many rising, ringing bubbles (Minnaert chirps)."""
    out = 0.35 * band_noise(rng, n, 400, 3500)
    out *= curve(rng, n, 6, 0.7, 1.3)
    count = int(n / SAMPLE_RATE * rng.uniform(60, 100))
    for _ in range(count):
        size = duration(rng, 0.015, 0.05)
        start = rng.integers(0, n - size)
        t = arange(size) / SAMPLE_RATE
        hz = exp(rng.uniform(log(500), log(3200)))
        rise = hz * rng.uniform(3, 12)           # Hz per second: bubbles rise in pitch
        ring = sin(2 * pi * (hz + rise * t / 2) * t)
        ring *= exp(-5 * t * SAMPLE_RATE / size)
        out[start:start + size] += rng.uniform(0.3, 1.6) * ring
    return out


def wind(rng, n):
    """Wind: noise whose low resonances (150-900 Hz) wander and gust slowly."""
    source = rng.standard_normal(n)
    octaves = arange(4) * 0.8 + rng.uniform(-0.1, 0.2)
    centres = 150 * 2.0 ** octaves
    tables = [[(hz, 0.5 * hz, 1.0)] for hz in centres]
    howl = morph(source, tables, curve(rng, n, 1.6, 0, 3))
    rumble = 0.15 * band_noise(rng, n, 60, 400)
    return (howl + rumble) * curve(rng, n, 1.6, 0.35, 1.0)


def dog_bark(rng, n):
    """Barks: 0.13-0.2 s harmonic bursts, f0 jumping up and falling to 300 Hz, plus noise."""
    out = zeros(n)
    f0 = rng.uniform(450, 700)
    mouth = [(rng.uniform(650, 900), 250, 1.0),
             (rng.uniform(1400, 1900), 350, 0.7)]
    for start, stop in bursts(rng, n, (0.13, 0.2), (0.1, 0.28)):
        size = stop - start
        t = arange(size) / size
        jump = exp(-((t - 0.2) / 0.15) ** 2)
        hz = f0 * rng.uniform(0.93, 1.07) * (0.75 + 0.35 * jump - 0.3 * t)
        voice = formants(pulses(hz), mouth + [(3000, 900, 0.3)])
        noise = rng.standard_normal(size)
        noise = formants(noise, mouth + [(3500, 2000, 0.6)])
        out[start:stop] += (voice + 0.35 * noise) * bump(size, 0.08, 0.6)
    return out


def dog_whimper(rng, n):
    """Whimpers: thin tones of 800-1500 Hz gliding up then far down, with two weak harmonics."""
    out = zeros(n)
    base = rng.uniform(800, 1000)
    for start, stop in bursts(rng, n, (0.28, 0.5), (0.06, 0.2)):
        size = stop - start
        t = arange(size) / size
        top = base * rng.uniform(1.35, 1.55)
        hz = base + (top - base) * sin(pi * t ** 0.7) - 0.12 * base * t
        trembling = rng.uniform(14, 20)
        hz *= 1 + 0.012 * sin(2 * pi * trembling * t * size / SAMPLE_RATE)
        phase = phase_of(hz)
        tone = sin(phase) + 0.35 * sin(2 * phase) + 0.2 * sin(3 * phase)
        tone *= bump(size, 0.2, 0.4)
        out[start:stop] += tone * rng.uniform(0.7, 1.0)
    return out


def snore(rng, n):
    """Snoring: rattling inhale (pulses of 60-100 Hz, low formants), then a softer breath out."""
    out = zeros(n)
    period = min(duration(rng, 1.1, 1.6), n)
    inhale = int(0.6 * period)
    throat = [(rng.uniform(200, 300), 120, 1.0),
              (rng.uniform(550, 750), 180, 0.5),
              (rng.uniform(1100, 1400), 250, 0.25)]
    for start in range(0, n - period // 3, period):
        hz = rng.uniform(60, 85) * (1 + 0.2 * np.linspace(0, 1, inhale))
        hz *= curve(rng, inhale, 60, 0.9, 1.1)   # irregular beats of the soft palate
        rattle = formants(pulses(hz), throat)
        rattle += 0.12 * formants(rng.standard_normal(inhale), throat)
        rattle *= bump(inhale, 0.45, 0.15)
        breath = 0.05 * band_noise(rng, period - inhale, 500, 2200)
        breath *= bump(period - inhale, 0.3, 0.6)
        cycle = np.concatenate([rattle, breath])
        out[start:start + period] += cycle[:n - start]
    return out


# First three formants of five vowels in Hz (rounded values of any phonetics text: i, e, a, o, u).
VOWELS = ((280, 2250, 2900), (450, 1950, 2600), (750, 1200, 2500),
          (480, 850, 2450), (320, 750, 2300))


def talk(rng, n):
    """Talking: 4-5 syllables per second, voice of 95-230 Hz, a new vowel in each syllable."""
    rate = rng.uniform(4, 5)
    f0 = exp(rng.uniform(log(95), log(230)))
    vowels = rng.permutation(VOWELS) * 1.0
    if f0 > 160:
        vowels *= 1.16                           # a smaller head has higher formants
    tables = []
    for f1, f2, f3 in vowels:
        tables.append([(f1, 80, 1.0), (f2, 120, 0.5), (f3, 180, 0.25)])

    # The voice, in syllables: sample i is in syllable index[i], at part[i] of it, 0..1.
    syllable = arange(n) / SAMPLE_RATE * rate + rng.uniform(0, 0.3)
    index = syllable.astype(int)
    part = syllable % 1
    count = index[-1] + 2
    spoken = rng.integers(0, len(tables), count)
    path = np.interp(syllable, arange(count), spoken)
    hz = f0 * curve(rng, n, 4, 0.85, 1.2)
    hz *= 1 - 0.1 * arange(n) / n
    source = lfilter([0.15], [1, -0.85], pulses(hz))     # glottal tilt: weak upper harmonics
    gate = clip(1.5 * sin(pi * part) - 0.2, 0, 1)
    gate *= rng.uniform(0.5, 1, count)[index]

    # Some syllables begin with an s.
    hiss = band_noise(rng, n, 3500, 7000)
    hiss *= (clip(0.25 - part, 0, 1) * 4) ** 2
    hiss *= (rng.random(count) < 0.4)[index]
    return morph(source, tables, path) * gate + 0.02 * hiss


def shout(rng, n):
    """Shouting: long open vowels of 280-420 Hz, arched pitch, strong harmonics up to 5 kHz."""
    out = zeros(n)
    f0 = rng.uniform(280, 420)
    vowels = ((850, 1400), (650, 1900), (700, 1100))
    for start, stop in bursts(rng, n, (0.45, 0.85), (0.06, 0.15), lead=0.04):
        size = stop - start
        t = arange(size) / size
        f1, f2 = vowels[rng.integers(3)]
        hz = f0 * rng.uniform(0.9, 1.1)
        hz = hz * (0.85 + 0.25 * sin(pi * t ** 0.6))
        hz *= 1 + 0.012 * sin(2 * pi * 6 * t * size / SAMPLE_RATE)
        mouth = [(f1, 150, 1.0), (f2, 180, 0.9),
                 (2900, 250, 0.9), (3900, 350, 0.7)]
        voice = formants(pulses(hz), mouth)
        out[start:stop] += voice * bump(size, 0.08, 0.2)
    return out


def lion(rng, n):
    """Roar: one long growl of 80-150 Hz, chopped 24-36 times a second; the mouth opens, shuts."""
    t = arange(n) / n
    arch = sin(pi * t) ** 0.7
    hz = rng.uniform(80, 105) * (1 + 0.45 * arch)
    hz *= curve(rng, n, 40, 0.93, 1.07)
    growl = pulses(hz) + 0.4 * rng.standard_normal(n)
    source = lfilter([0.4], [1, -0.6], growl)            # dark timbre
    chop = phase_of(curve(rng, n, 8, 24, 36))
    rough = 1 - 0.75 * (0.5 + 0.5 * sin(chop)) ** 2
    opened = rng.uniform(0.9, 1.15)
    tables = []
    for low, high in ((240, 650), (450, 1050), (800, 1600)):
        tables.append([(opened * low, 160, 1.0),
                       (opened * high, 300, 0.6),
                       (opened * 2 * high, 900, 0.3)])
    return morph(source, tables, 2 * arch) * rough * bump(n, 0.12, 0.3)


def whoosh(rng, n):
    """Synthesised whoosh: a narrow noise band swept 300 Hz - 5 kHz - 300 Hz in 0.5-0.8 s."""
    count = max(1, round(n / SAMPLE_RATE / rng.uniform(0.5, 0.8)))
    t = arange(n) / n * count % 1                # 0..1 within each sweep
    arch = sin(pi * t) ** 1.5
    hz = 300 * (rng.uniform(4000, 6000) / 300) ** arch
    sos = butter(2, rng.uniform(200, 350), fs=SAMPLE_RATE, output="sos")
    real, imaginary = sosfilt(sos, rng.standard_normal((2, n)))     # low-pass noise,
    phase = phase_of(hz)                                            # moved up to hz
    return (real * cos(phase) - imaginary * sin(phase)) * (0.12 + arch)


def birds(rng, n):
    """Bird song: trills of 4-9 equal chirps of 35-70 ms, each sweeping within 2.5-6 kHz."""
    out = zeros(n)
    for start, stop in bursts(rng, n, (0.4, 0.8), (0.05, 0.2)):
        size = duration(rng, 0.035, 0.07)
        step = int(size * rng.uniform(1.4, 1.9))
        low = rng.uniform(2500, 4200)
        high = low * rng.uniform(1.25, 1.45)
        first, last = rng.permutation([low, high])       # up-chirps or down-chirps
        phase = phase_of(np.linspace(first, last, size))
        chirp = sin(phase) * bump(size, 0.3, 0.4)
        for i in range(start, stop - size, step):
            out[i:i + size] += chirp * rng.uniform(0.6, 1.0)
    return out


def whistle(rng, n):
    """A person whistling a tune: pure tone, held notes of a major scale in 1-2.2 kHz, vibrato."""
    semitones = np.array([0, 2, 4, 5, 7, 9])
    scale = rng.uniform(1000, 1250) * 2.0 ** (semitones / 12)
    lengths = (rng.uniform(0.22, 0.5, 20) * SAMPLE_RATE).astype(int)
    first = rng.integers(10)
    walk = first + np.cumsum(rng.choice([-2, -1, 1, 2], 20))   # tunes move in steps,
    notes = scale[5 - np.abs(walk % 10 - 5)]                   # reflected into 0..5
    hz = np.repeat(notes, lengths)[:n]
    at_rest = [0.995 * hz[0]]
    hz, _ = lfilter([0.005], [1, -0.995], hz, zi=at_rest)      # 12 ms slide between notes
    t = arange(n) / SAMPLE_RATE
    hz *= 1 + 0.006 * sin(2 * pi * rng.uniform(5, 6.5) * t)
    held = [bump(size, 0.12, 0.12) for size in lengths]
    held = np.concatenate(held)[:n]
    breath = 0.02 * band_noise(rng, n, 1000, 3000)
    return (sin(phase_of(hz)) + breath) * (0.35 + 0.65 * held)


def rustle(rng, n):
    """Leaves or paper: clumps of short clicks of very unequal strength, all above 2 kHz."""
    grip = curve(rng, n, rng.uniform(6, 10), -0.5, 1.0)
    grip = clip(grip, 0.05, 1) ** 1.5
    clicks = (rng.random(n) < 0.06 * grip) * rng.laplace(size=n)
    paper = [(rng.uniform(2600, 3400), 700, 1.0),
             (rng.uniform(5000, 6500), 900, 1.0)]
    ring = formants(clicks, paper)
    # Stray loud clicks are tamed before the high pass; the limiter would make thumps of them.
    ring = np.tanh(0.4 * ring / (np.std(ring) + 1e-9))
    sos = butter(4, 2000, "highpass", fs=SAMPLE_RATE, output="sos")
    return sosfilt(sos, ring) + 0.02 * band_noise(rng, n, 3000, 7500) * grip


EVENTS = {f.__name__: f for f in (water, wind, dog_bark, dog_whimper, snore, talk, shout, lion,
                                  whoosh, birds, whistle, rustle)}


# ==== 3. Scenes and their waveforms ====
# Relation, number of events, and the share of such scenes among random ones.
KINDS = (("single", 1, 0.25), ("and", 2, 0.30), ("then", 2, 0.35),
         ("and", 3, 0.03), ("then", 3, 0.05), ("then", 4, 0.02))


def random_scene(rng):
    """A random scene of distinct events."""
    shares = [share for _, _, share in KINDS]
    kind = rng.choice(len(KINDS), p=shares)
    relation, count, _ = KINDS[kind]
    events = rng.choice(list(EVENTS), count, replace=False)
    return relation, tuple(events.tolist())


def event_audio(name, rng, n):
    """Event `name` over n samples (n,), RMS of -20 dBFS +- 2 dB, 5 ms fades at both ends."""
    x = EVENTS[name](rng, n)
    dbfs = EVENT_DBFS + rng.uniform(-EVENT_SPREAD_DB, EVENT_SPREAD_DB)
    rms = sqrt(np.mean(x ** 2)) + 1e-9
    x = x * 10 ** (dbfs / 20) / rms
    fade = np.minimum(1, arange(1, n + 1) / 80)
    return x * fade * fade[::-1]


def render(scene, rng):
    """The waveform (40960,), float32 in [-0.95, 0.95], of a scene."""
    relation, events = scene
    count = len(events)
    out = 10 ** (NOISE_FLOOR_DBFS / 20) * rng.standard_normal(CLIP_SAMPLES)
    ends = arange(count + 1) / count
    if relation == "then":         # of two events, parts of 40-60 %; of more, they vary less
        ends[1:-1] += rng.uniform(-1, 1, count - 1) * 0.2 / count
    ends = (ends * CLIP_SAMPLES).astype(int)
    # Neighbours overlap by a crossfade of equal power: sin^2 + cos^2 = 1.
    ramp = sin(0.5 * pi * (arange(CROSSFADE) + 0.5) / CROSSFADE)
    for k, name in enumerate(events):
        start, stop = 0, CLIP_SAMPLES
        if relation == "then":
            start = max(0, ends[k] - CROSSFADE // 2)
            stop = min(CLIP_SAMPLES, ends[k + 1] + CROSSFADE // 2)
        x = event_audio(name, rng, stop - start)
        if start > 0:
            x[:CROSSFADE] *= ramp
        if stop < CLIP_SAMPLES:
            x[-CROSSFADE:] *= ramp[::-1]
        out[start:stop] += x

    # A soft limiter: what exceeds the knee is bent smoothly below the peak.
    room = PEAK - KNEE
    below = np.minimum(np.abs(out), KNEE)
    above = np.maximum(np.abs(out) - KNEE, 0)
    out = np.sign(out) * (below + room * np.tanh(above / room))
    return out.astype(np.float32)


# ==== 4. Captions that err ====
def mislabel(scene, rng, p):
    """The scene, or with probability `p` a wrong one to caption it with, as on the web."""
    if rng.random() >= p:
        return scene
    relation, events = scene
    others = [event for event in EVENTS if event not in events]
    other = str(rng.choice(others))
    kind = rng.random()
    if relation == "single":
        if kind < 0.4:                           # one event too many
            return "and", events + (other,)
        if kind < 0.8:
            return "then", events + (other,)
        return "single", (other,)                # another event

    i = int(rng.integers(len(events)))
    before, after = events[:i], events[i + 1:]
    if kind < 0.5:                               # one event is replaced
        return relation, before + (other,) + after
    if kind < 0.8:                               # a wrong order, of which "and" has none
        return "then", events[::-1]
    rest = before + after                        # one is left out
    if len(rest) == 1:
        return "single", rest
    return relation, rest


# Real captions err, and not at random. People who caption clips cannot see what they hear, and the
# search words of uploaders are vague: of two sounds that are alike, one is named as the other, each
# time with the same few words. And lists of sounds rarely keep the order. Such errors do not
# average out: p(caption | sound) hardly favours the right caption, so no guidance finds it. But the
# right sound comes now and then, and a reward that knows it can make it frequent.
RELATED = (("dog_bark", "dog_whimper"), ("water", "wind"), ("talk", "shout"),
           ("birds", "whistle"), ("snore", "lion"), ("whoosh", "rustle"))


def mishear(scene, rng, confused, disordered):
    """The scene as named by someone who confuses related sounds and does not keep the order.

    confused: the probability, for each pair of RELATED, that each of the two is named as the other;
    disordered: that the events of a "then" are named backwards.
    """
    relation, events = scene
    names = {}
    for one, other in RELATED:
        names[one], names[other] = one, other
        if rng.random() < confused:
            names[one], names[other] = other, one
    if rng.random() < disordered and relation == "then":
        events = events[::-1]
    return relation, tuple(names[event] for event in events)


# ==== 5. Scenes to words ====
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
    texts = list(PUBLISHED_PROMPTS)
    for choices in (PHRASES | JOINTS).values():
        texts += choices
    words = re.findall(r"[a-z]+", " ".join(texts).lower())
    return sorted(set(words))


# ==== 6. Prompt files ====
def prompt_lists():
    """(118 training prompts, 40 held-out prompts) as two lists of captions, the same every time."""
    def scenes(relation, groups):
        return [(relation, events) for events in groups]

    def backwards(pairs):
        return [pair[::-1] for pair in pairs]

    # The twelve events stand on a circle. Pairs at a distance of 1 to 5 steps: 12 of each, in which
    # every event comes twice. At 6 steps, across the circle: 6.
    rng = np.random.default_rng(0)
    ring = rng.permutation(list(EVENTS)).tolist()
    alone = [(event,) for event in ring]
    pairs = {}
    for steps in range(1, 7):
        turned = ring[steps:] + ring[:steps]
        pairs[steps] = list(zip(ring, turned, strict=True))

    # Training: 8 single events; 40 pairs, at 1, 3, 4 and four at 6 steps, all of them as "and" and,
    # but for ten at 1 step, as "then" in both orders (70).
    far = pairs[3] + pairs[4]
    across = pairs[6][:4]
    first = scenes("single", alone[::3] + alone[1::3])
    first += scenes("and", far)
    first += scenes("then", pairs[1] + far + across)
    rest = scenes("and", pairs[1] + across)
    rest += scenes("then", backwards(pairs[1][10:] + far + across))
    # Held out: 4 single events, the 26 other pairs, and those ten in the order not trained.
    held_out = scenes("single", alone[2::3])
    held_out += scenes("and", pairs[2])
    held_out += scenes("then", pairs[5] + pairs[6][4:6])
    held_out += scenes("then", backwards(pairs[1][:10]))

    prompts = [caption(scene, rng) for scene in first]
    eval_prompts = [caption(scene, rng) for scene in held_out]
    prompts += [caption(scene, rng) for scene in rest]
    known = set(" ".join(prompts).split())
    for i, scene in enumerate(held_out):         # a new combination, but no new word
        while not set(eval_prompts[i].split()) <= known:
            eval_prompts[i] = caption(scene, rng)
    return prompts, eval_prompts


def write_prompts():
    """Writes prompts.txt, eval_prompts.txt and published_prompts.txt, one folder up."""
    folder = Path(__file__).resolve().parents[1]
    train, held_out = prompt_lists()
    for name, header, prompts in (
            ("prompts.txt", "118 training prompts: 8 single, 40 and, 70 then", train),
            ("eval_prompts.txt", "40 held-out prompts: 4 single, 12 and, 24 then", held_out),
            ("published_prompts.txt", "the six published prompts, verbatim", PUBLISHED_PROMPTS)):
        text = "\n".join(["# " + header, *prompts]) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_prompts()
