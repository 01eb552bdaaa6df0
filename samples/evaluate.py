"""A finished run before a judge that PPO never saw: statistics, curve, listening page.

    python samples/evaluate.py runs/seed-0                                   # base against tuned
    python samples/evaluate.py runs/seed-0 --guidance 1 2 5 --best-of 2 8    # and what is free
    python samples/evaluate.py runs/seed-0 --snapshots                       # reward against judge
    python samples/evaluate.py --pool listener-*.json                        # blind tests, pooled

Never grade with the model that was trained on: the judge is another CLAP. Base and tuned model make
clips of the held-out prompts (of the training prompts, if none is held out) from the same noise;
intervals are 95 %, by bootstrap over prompts or Wilson's. Writes evaluation.json, curve.png and a
page with a blind test, listen.html, into the run. A run with a reward of your own is evaluated from
Python, `evaluate.main([run], reward=mine)`, as it was trained with `clap_ppo.main`.
"""

import argparse
import base64
import hashlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clap_ppo  # noqa: E402
from clap_ppo import UserError  # noqa: E402

# ==== 1. The judge ====
def load_judge(judge: str, device="cpu"):
    """A `transformers.ClapModel` with its processor attached: a folder or a hub id."""
    from transformers import ClapModel, ClapProcessor
    try:
        model = ClapModel.from_pretrained(judge, dtype=torch.float32).to(device).eval()
        model.processor = ClapProcessor.from_pretrained(judge)
    except Exception as error:
        raise UserError(f"--judge {judge}: no ClapModel, or no network: {error}") from None
    return model

@torch.no_grad()
def judge_audio_embeds(judge, waveforms: Tensor, sample_rate: int) -> Tensor:
    """Normalised audio embeddings (N, E) of waveforms (N, samples)."""
    import torchaudio
    extractor = judge.processor.feature_extractor
    rate = extractor.sampling_rate
    embeds = []
    for chunk in waveforms.split(32):
        chunk = torchaudio.functional.resample(chunk, sample_rate, rate)
        chunk = chunk[:, :extractor.nb_max_samples]     # longer ones are cropped at random
        features = extractor(list(chunk.numpy()), sampling_rate=rate, return_tensors="pt")
        output = judge.get_audio_features(**features.to(judge.device)).pooler_output
        embeds.append(F.normalize(output.float(), dim=-1).cpu())
    return torch.cat(embeds)

def is_bundled(path: str, name: str) -> bool:
    """Whether a model or CLAP is the bundled one, by whatever path it was given."""
    return Path(clap_ppo.bundled(path)).resolve() == HERE / name

class Clips(NamedTuple):
    """n clips of each of M prompts, as heard by reward and judge."""
    waveforms: Tensor        # (M, n, samples)
    reward: Tensor           # (M, n)
    judge: Tensor            # (M, n, M), cosine of each clip with *every* prompt
    embeds: Tensor           # (M, n, E), the judge's audio embeddings

def compared_prompts(setup) -> list[str]:
    """The prompts of which `score_held_out` makes clips."""
    if setup.num_train < len(setup.prompts):
        return setup.prompts[setup.num_train:]
    return setup.prompts

@torch.no_grad()
def make_clips(setup, judge, n: int, guidance: float | None = None, seed: int = 999) -> Clips:
    """n clips of each compared prompt, by the weights that are in the U-Net now.

    guidance: another than the run's. With n = EVAL_CLIPS they are those that the run itself scored.
    """
    cfg = setup.cfg
    if guidance is not None:
        setup.cfg = replace(cfg, eval_guidance=guidance)
    try:
        waveforms, reward = clap_ppo.score_held_out(setup, n, seed)
    finally:
        setup.cfg = cfg
    rate = setup.pipeline.vocoder.config.sampling_rate
    embeds = judge_audio_embeds(judge, waveforms, rate).unflatten(0, (-1, n))
    tokens = judge.processor.tokenizer(compared_prompts(setup), padding=True, truncation=True,
                                       return_tensors="pt")
    texts = judge.get_text_features(**tokens.to(judge.device)).pooler_output
    texts = F.normalize(texts.float(), dim=-1).cpu()
    return Clips(waveforms.unflatten(0, (-1, n)), reward, embeds @ texts.T, embeds)

def make_base_clips(setup, *args) -> Clips:
    """The same, by the model as it was before training."""
    with setup.unet.disable_adapter():
        return make_clips(setup, *args)

def best_of(clips: Clips, n: int) -> Clips:
    """Of every n clips of a prompt the one with the highest reward: what n reward calls buy."""
    groups = Clips._make([x.unflatten(1, (-1, n)) for x in clips])  # (M, groups, n, ...)
    best = groups.reward.argmax(dim=2)                              # (M, groups)
    prompt = torch.arange(best.shape[0])[:, None]
    group = torch.arange(best.shape[1])
    return Clips._make([x[prompt, group, best] for x in groups])    # (M, groups, ...)

# ==== 2. Statistics ====
def recognised(clips: Clips) -> Tensor:
    """(M, n) bool: the judge picks the clip's own prompt among all M (chance 1/M)."""
    return clips.judge.argmax(dim=-1) == torch.arange(len(clips.judge))[:, None]

def own_scores(clips: Clips) -> Tensor:
    """(M, n): the judge's cosine of each clip and its own prompt."""
    own = torch.arange(len(clips.judge))
    return clips.judge[own, :, own]

def per_prompt_metrics(clips: Clips) -> dict:
    """Each figure of merit as its mean over the clips of a prompt, (M,).

    diversity: mean pairwise cosine distance of a prompt's clips under the judge; diversity_right:
    the same among its recognised clips (NaN with fewer than two), since mistakes are diverse, too.
    loudness: RMS in dB of full scale. broken: silent (below -60 dBFS) or clipped (1 % of samples).
    """
    right, n = recognised(clips), clips.reward.shape[1]
    power = clips.waveforms.square().mean(dim=-1)
    loudness = 10 * power.clamp(min=1e-12).log10()
    at_full_scale = (clips.waveforms.abs() > 0.999).float().mean(dim=-1)
    of_clips = {"reward": clips.reward, "judge_score": own_scores(clips),
                "recognition": right, "loudness": loudness,
                "broken": (loudness < -60) | (at_full_scale > 0.01)}
    metrics = {}
    for name, values in of_clips.items():
        metrics[name] = values.float().mean(dim=1)
    distance = 1 - clips.embeds @ clips.embeds.mT                           # (M, n, n)
    pairs = ~torch.eye(n, dtype=torch.bool).expand_as(distance)
    right_pairs = pairs & right[:, :, None] & right[:, None, :]
    for name, chosen in (("diversity", pairs), ("diversity_right", right_pairs)):
        metrics[name] = (distance * chosen).sum(dim=(1, 2)) / chosen.sum(dim=(1, 2))
    return metrics

def bootstrap(values: Tensor, draws: int = 2000) -> dict | None:
    """Mean over prompts and its 95 % percentile bootstrap interval; values (M,), NaNs left out."""
    values = values[~values.isnan()]
    count = len(values)
    if count == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (draws, count), generator=generator)
    means = values[drawn].mean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"value": values.mean().item(), "low": low, "high": high}

def wilson(successes: float, n: int) -> dict | None:
    """A share with its 95 % Wilson score interval; None of nothing."""
    if n == 0:
        return None
    z, p = 1.959964, successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    shrink = 1 + z * z / n
    return {"value": p, "low": (centre - half) / shrink, "high": (centre + half) / shrink}

def figures(clips: Clips) -> dict:
    """Every figure of merit with its interval."""
    return {name: bootstrap(values) for name, values in per_prompt_metrics(clips).items()}

def compare(base: Clips, tuned: Clips) -> dict:
    """Base, best of n and tuned, their paired differences, and what training did to single clips.

    mended, broke: clips that only tuned, only base gets right; wins: the former among both.
    preference: share of same-noise pairs in which the judge scores tuned higher, ties half; where
    both are right that is a coin flip, so it cannot come near 1.
    """
    n = base.reward.shape[1]
    before, after, differences = per_prompt_metrics(base), per_prompt_metrics(tuned), {}
    for name in before:
        differences[name] = bootstrap(after[name] - before[name])
    right, was_right = recognised(tuned), recognised(base)
    mended = (right & ~was_right).sum().item()
    broke = (was_right & ~right).sum().item()
    gain = own_scores(tuned) - own_scores(base)
    ties = (gain == 0).sum().item()
    preferred = (gain > 0).sum().item() + 0.5 * ties
    return {"base": figures(base), "best_of_n": figures(best_of(base, n)),
            "tuned": figures(tuned), "tuned_minus_base": differences,
            "mended": mended, "broke": broke, "wins": wilson(mended, mended + broke),
            "preference": wilson(preferred, gain.numel()), "n": n, "clips": gain.numel()}

def over_optimised(rows: list) -> list[int]:
    """Epochs at which the reward is above, and the judge below, what the judge's best epoch had."""
    found, best_reward, best_judge = [], -1.0, -1.0
    for row in rows:
        reward, judge = row["reward"]["value"], row["judge_score"]["value"]
        if judge >= best_judge:
            best_reward, best_judge = reward, judge
        elif reward > best_reward:
            found.append(row["epoch"])
    return found

def show(cell: dict | None) -> str:
    """A figure with its interval."""
    if cell is None:
        return "-"
    return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"

def print_line(label: str, width: int, cells: list[str]) -> None:
    """One line of a table."""
    print(f"{label:<{width}}" + "".join(f"{cell:>27}" for cell in cells))

def print_evaluation(result: dict, kind: str = "held-out prompts") -> None:
    """The table base / best-of-n / tuned, and what else was asked for; kind: of the prompts."""
    columns = ["base", "best_of_n", "tuned", "tuned_minus_base"]
    print(f"{kind} (n = {result['n']})")
    print_line("", 16, columns)
    for name in result["base"]:
        print_line(name, 16, [show(result[column][name]) for column in columns])
    print(f"of {result['clips']} clips training mended {result['mended']} and broke "
          f"{result['broke']}: of pairs with one right clip tuned wins {show(result['wins'])}\n"
          f"the judge prefers tuned to base in {show(result['preference'])} of all pairs")
    names = ["recognition", "judge_score", "reward", "diversity"]
    for title in ("guidance", "best_of", "snapshots"):
        if result.get(title):
            print()
            print_line(title, 20, names)
            for row in result[title]:
                print_line(row["label"], 20, [show(row[name]) for name in names])
    for epoch in over_optimised(result.get("snapshots", [])):
        print(f"warning: epoch {epoch} has more reward and less of the judge than an earlier one: "
              "over-optimisation", file=sys.stderr)

# ==== 3. The page and the curve ====
def mel_picture(waveform: Tensor, sample_rate: int, bands: int = 32, frames: int = 48) -> str:
    """Mel spectrogram of a waveform (samples,), 60 dB deep: base64 of 4 bits a cell, by columns."""
    import torchaudio
    filters = torchaudio.functional.melscale_fbanks(513, 0, sample_rate / 2, bands, sample_rate)
    hop = math.ceil(len(waveform) / frames)
    window = torch.hann_window(1024)
    spectrum = torch.stft(waveform, 1024, hop, window=window, return_complex=True)
    mel = filters.T @ spectrum.abs()[:, :frames]
    decibels = 20 * mel.clamp(min=1e-6).log10()
    levels = ((decibels - decibels.max() + 60) / 4).clamp(0, 15).round().byte().T.flatten()
    pairs = levels[::2] * 16 + levels[1::2]
    return base64.b64encode(pairs.numpy().tobytes()).decode()

def save_clips(folder: Path, base: Clips, tuned: Clips, prompts: list[str], rate: int,
               kind: str = "wav") -> list:
    """Each prompt's first clip of base and tuned, in listen/; rows that say which is which.

    In the blind test nothing may give a side away: files are named by a hash of what is in them,
    and the louder clip of a pair is turned down to the RMS of the other.
    """
    import soundfile
    (folder / "listen").mkdir(exist_ok=True)
    rows, sides = [], {"base": base, "tuned": tuned}
    for i, prompt in enumerate(prompts):
        row, rms = {"prompt": prompt}, {}
        for side, clips in sides.items():
            rms[side] = clips.waveforms[i, 0].square().mean().sqrt().item()
        level = max(min(rms.values()), 0.01)            # silence does not silence the other clip
        for side, clips in sides.items():
            waveform = clips.waveforms[i, 0] * min(1.0, level / max(rms[side], 1e-6))
            digest = hashlib.sha256(waveform.numpy().tobytes()).hexdigest()[:16]
            file = f"listen/{digest}.{kind}"
            soundfile.write(folder / file, waveform.numpy(), rate)
            row[side] = {"file": file, "mel": mel_picture(waveform, rate),
                         "reward": round(clips.reward[i, 0].item(), 4),
                         "judge": round(clips.judge[i, 0, i].item(), 4)}
        rows.append(row)
    return rows

def save_page(folder: Path, cfg, rows: list, result: dict, metrics: list, rate: int,
              kind: str = "held-out prompts", name: str = "") -> None:
    """listen.html, the page beside this script, and data.js, what it shows of this run."""
    model = cfg.model
    if is_bundled(cfg.model, "toy/pipeline"):
        model = "the small bundled model of synthetic sounds"
    about = (f"{kind.capitalize()}, by {model}: the original and the fine-tuned model from the "
             "same starting noise, played equally loud.")
    prompts = [row["prompt"] for row in rows]
    identity = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]
    here = f"{clap_ppo.HERE}/"                          # not to be told: this machine's folders
    facts = {"model": cfg.model.removeprefix(here), "clap": cfg.clap.removeprefix(here),
             "seed": cfg.seed, "epochs": cfg.epochs}
    curve = []
    for row in metrics:
        curve.append({key: row.get(key) for key in ("epoch", "reward", "eval_reward")})
    data = {"name": name or folder.name, "id": f"{folder.name}-{identity}", "about": about,
            "facts": facts, "rows": rows, "seconds": cfg.seconds, "sample_rate": rate,
            "evaluation": result, "metrics": curve}
    (folder / "data.js").write_text(f"window.CLAP_PPO_RUN = {json.dumps(data)};\n")
    (folder / "listen.html").write_bytes((HERE / "listen.html").read_bytes())

def save_curve(path: Path, metrics: list, result: dict,
               kind: str = "held-out prompts") -> None:
    """The reward by epoch, of the rollouts and of the compared prompts, and what the judge says."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in metrics]
    kept = {0: result["base"]["reward"]["value"], len(metrics): result["tuned"]["reward"]["value"]}
    for row in metrics:
        if "eval_reward" in row:
            kept[row["epoch"]] = row["eval_reward"]
    for key, alpha, of in (("reward", 0.3, "an epoch's"), ("reward_mean", 0.7, "the last epochs'")):
        axes.plot(epochs, [row[key] for row in metrics], color="C0", alpha=alpha,
                  label=f"reward of {of} rollouts")
    epochs = sorted(kept)
    axes.plot(epochs, [kept[epoch] for epoch in epochs], "o-", color="C0",
              label=f"reward on {kind}")
    if result.get("snapshots"):
        judged = {0: result["base"]["judge_score"]["value"]}
        for row in result["snapshots"]:
            judged[row["epoch"]] = row["judge_score"]["value"]
        axes.plot(list(judged), list(judged.values()), "s-", color="C1", label=f"judge on {kind}")
    axes.set(xlabel="epoch (0: the base model)", ylabel="reward; judge: cosine of clip and prompt")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")

# ==== 4. Listeners ====
def pool_listeners(paths: list[str]) -> dict:
    """Preference and recognition rates of what listeners downloaded at the end of a blind test.

    Answers of one listener are not independent: of few listeners the true intervals are wider.
    """
    worth = {"tuned": 1.0, "none": 0.5, "base": 0.0}            # no difference counts half
    wins, right = [], {"base": [], "tuned": []}
    listeners, runs = set(), set()
    for path in paths:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            for answer in data["answers"]:
                if answer["task"] == "preference":
                    wins.append(worth[answer["chosen"]])
                else:
                    right[answer["side"]].append(answer["right"])
            listener = data["listener"]
            runs.add(data["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a download of the listening page ({error})") from None
        if listener in listeners or len(runs) > 1:
            raise UserError(f"{path}: a listener again, or another run; pool each listener once")
        listeners.add(listener)
    rates = {"preference": wilson(sum(wins), len(wins))}
    for side in ("base", "tuned"):
        rates[f"recognition_{side}"] = wilson(sum(right[side]), len(right[side]))
    return rates

# ==== 5. Command line ====
def evaluate(run: Path, judge: str = "", noises: int = 4, guidance=(), best=(),
             snapshots: bool = False, reward: Callable | None = None) -> dict:
    """Everything about a finished run; writes its files and returns what evaluation.json holds.

    judge: a folder or hub id; noises: clips per prompt; guidance: scales to compare; best: numbers
    of clips to choose one of; reward: the run's own, if it had one.
    """
    from peft import set_peft_model_state_dict
    for flag, values in (("noises", [noises]), ("guidance", guidance), ("best-of", best)):
        for value in values:
            if not 1 <= value <= 1e9:                   # NaN is not, either
                raise UserError(f"--{flag} {value}: use 1 or more")
    cfg, _ = clap_ppo.parse_args(["--resume", str(run)])
    setup, metrics = clap_ppo.resume_run(cfg, run, reward)
    if len(metrics) < cfg.epochs:
        raise UserError(f"{run}: not finished; go on with clap_ppo.py --resume {run}")
    if not judge:
        judge = "laion/larger_clap_general"
        if is_bundled(cfg.clap, "toy/clap.pt"):         # it knows the bundled model's sounds alone
            judge = str(HERE / "toy/judge")
    ear = load_judge(judge, setup.device)
    base, tuned = make_base_clips(setup, ear, noises), make_clips(setup, ear, noises)
    result = compare(base, tuned)
    result["guidance"] = []
    for name, make in (("base", make_base_clips), ("tuned", make_clips)):
        for scale in guidance:
            row = {"label": f"{name}, guidance {scale:g}", "scale": scale, "model": name}
            result["guidance"].append(row | figures(make(setup, ear, noises, scale)))
    result["best_of"] = []
    if best:
        many = make_base_clips(setup, ear, noises * max(best), None, 0)     # other noise: seed 0
    for n in best:
        some = Clips._make([x[:, :noises * n] for x in many])
        row = {"label": f"base, best of {n}", "n": n}
        result["best_of"].append(row | figures(best_of(some, n)))
    result["snapshots"] = []
    if snapshots:
        kept, final = {}, clap_ppo.adapter_state(setup.unet)
        for file in (run / "adapter").glob("epoch-*.safetensors"):
            kept[int(file.stem[6:])] = load_file(file)
        # Copies, since these are the U-Net's own; loaded last, so they are in it again at the end.
        kept[cfg.epochs] = {name: weight.clone() for name, weight in final.items()}
        for epoch in sorted(kept):
            set_peft_model_state_dict(setup.unet, kept[epoch])
            row = {"label": str(epoch), "epoch": epoch}
            result["snapshots"].append(row | figures(make_clips(setup, ear, noises)))
    (run / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    prompts, rate = compared_prompts(setup), setup.pipeline.vocoder.config.sampling_rate
    kind = "training prompts" if setup.num_train == len(setup.prompts) else "held-out prompts"
    print_evaluation(result, kind)
    save_curve(run / "curve.png", metrics, result, kind)
    save_page(run, cfg, save_clips(run, base, tuned, prompts, rate), result, metrics, rate, kind)
    print(f"\nlisten: {run}/listen.html   curve: {run}/curve.png")
    return result

def main(argv=None, reward: Callable | None = None) -> int:
    """Exit code: 0, or 2 after one line about a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("run", nargs="?", default="runs/seed-0", help="a finished run's directory")
    parser.add_argument("--judge", default="", help="a transformers ClapModel: folder or hub id")
    parser.add_argument("--noises", type=int, default=4, help="clips per held-out prompt")
    parser.add_argument("--guidance", type=float, nargs="+", default=[], help="scales to compare")
    parser.add_argument("--best-of", type=int, nargs="+", default=[], help="n of base's best of n")
    parser.add_argument("--snapshots", action="store_true", help="the run's snapshots, by epoch")
    parser.add_argument("--pool", nargs="+", metavar="FILE", help="downloads of the blind test")
    args = parser.parse_args(argv)
    try:
        if args.pool:
            for name, rate in pool_listeners(args.pool).items():
                print(f"{name:<18}{show(rate)}")
        else:
            evaluate(Path(args.run), args.judge, args.noises, args.guidance, args.best_of,
                     args.snapshots, reward)
        return 0
    except (UserError, OSError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
