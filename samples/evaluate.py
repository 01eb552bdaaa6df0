"""A finished run before a judge that PPO never saw: statistics, curve, listening page.

    python samples/evaluate.py runs/toy-1                                    # base against tuned
    python samples/evaluate.py runs/toy-1 --guidance 1 2 5 --best-of 2 8     # and what is free
    python samples/evaluate.py runs/toy-1 --snapshots                        # reward against judge
    python samples/evaluate.py --pool listener-*.json                        # blind tests, pooled

Never grade with the model that was trained on: the judge is another CLAP. Base and tuned play the
held-out prompts from the same noise; intervals are 95 %, by bootstrap over prompts or Wilson's.
Writes evaluation.json, curve.png and a page with a blind test, listen.html, into the run.
"""

import argparse
import base64
import hashlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clap_ppo  # noqa: E402
from clap_ppo import UserError  # noqa: E402

# ==== 1. The judge ===============================================================================

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
    waveforms = torchaudio.functional.resample(waveforms, sample_rate, rate)
    waveforms = waveforms[:, :extractor.nb_max_samples]     # longer ones would be cropped at random
    embeds = []
    for chunk in waveforms.split(32):
        features = extractor(list(chunk.numpy()), sampling_rate=rate, return_tensors="pt")
        output = judge.get_audio_features(**features.to(judge.device)).pooler_output
        embeds.append(F.normalize(output.float(), dim=-1).cpu())
    return torch.cat(embeds)

class Clips(NamedTuple):
    """n clips of each of M prompts, as heard by reward and judge."""
    waveforms: Tensor        # (M, n, samples)
    reward: Tensor           # (M, n)
    judge: Tensor            # (M, n, M), cosine of each clip with *every* prompt
    embeds: Tensor           # (M, n, E), the judge's audio embeddings

@torch.no_grad()
def make_clips(world, judge, adapter: dict[str, Tensor], n: int, guidance: float | None = None,
               seed: int | None = None) -> Clips:
    """Clips of the prompts that `clap_ppo.play` plays; without a seed, its noise if n is too."""
    cfg = replace(world.cfg, eval_guidance=guidance or world.cfg.eval_guidance)
    world = clap_ppo.World(**{**vars(world), "cfg": cfg})
    world.unet.load_state_dict(adapter, strict=False)
    prompts = world.held_out or world.train
    first = len(world.train) if world.held_out else 0
    ids = torch.arange(first, first + len(prompts)).repeat_interleave(n)
    generator = torch.Generator().manual_seed(cfg.seed + 999 if seed is None else seed)
    noise = clap_ppo.randn(world, len(ids), generator)
    found = []
    for at in clap_ppo.progress(torch.arange(len(ids)).split(max(cfg.micro_batch, 32)), "clips"):
        rows, rate = ids[at].to(world.device), world.pipeline.vocoder.config.sampling_rate
        heard, reward = clap_ppo.score(world, clap_ppo.sample(world, rows, noise[at]), rows)
        found.append((heard, reward, judge_audio_embeds(judge, heard, rate)))
    heard, reward, embeds = (torch.cat(x).unflatten(0, (len(prompts), n)) for x in zip(*found))
    tokens = judge.processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    texts = judge.get_text_features(**tokens.to(judge.device)).pooler_output.float().cpu()
    return Clips(heard, reward, embeds @ F.normalize(texts, dim=-1).T, embeds)

def best_of(clips: Clips, n: int) -> Clips:
    """Of every n clips of a prompt the one with the highest reward: what n reward calls buy."""
    groups = Clips(*(x.unflatten(1, (-1, n)) for x in clips))                  # (M, groups, n, ...)
    prompt, group = torch.arange(len(clips.reward))[:, None], torch.arange(groups.reward.shape[1])
    return Clips(*(x[prompt, group, groups.reward.argmax(dim=2)] for x in groups))

# ==== 2. Statistics ==============================================================================

def recognised(clips: Clips) -> Tensor:
    """(M, n) bool: the judge picks the clip's own prompt among all M (chance 1/M)."""
    return clips.judge.argmax(dim=-1) == torch.arange(len(clips.judge))[:, None]

def per_prompt_metrics(clips: Clips) -> dict[str, Tensor]:
    """Each figure of merit as its mean over the clips of a prompt, (M,).

    diversity: mean pairwise cosine distance of a prompt's clips under the judge; diversity_right:
    the same among its recognised clips (NaN with fewer than two), since mistakes are diverse, too.
    loudness: RMS in dB of full scale. broken: silent (below -60 dBFS) or clipped (1 % of samples).
    """
    own, right, n = torch.arange(len(clips.reward)), recognised(clips), clips.reward.shape[1]
    loudness = 10 * clips.waveforms.square().mean(dim=-1).clamp(min=1e-12).log10()
    at_full_scale = (clips.waveforms.abs() > 0.999).float().mean(dim=-1)
    metrics = dict(reward=clips.reward, judge_score=clips.judge[own, :, own], recognition=right,
                   loudness=loudness, broken=(loudness < -60) | (at_full_scale > 0.01))
    metrics = {name: value.float().mean(dim=1) for name, value in metrics.items()}
    distance = 1 - clips.embeds @ clips.embeds.mT
    pairs = ~torch.eye(n, dtype=torch.bool).expand_as(distance)
    both_right = right[:, :, None] & right[:, None, :]
    for name, chosen in (("diversity", pairs), ("diversity_right", pairs & both_right)):
        metrics[name] = (distance * chosen).sum(dim=(1, 2)) / chosen.sum(dim=(1, 2))
    return metrics

def bootstrap(values: Tensor, draws: int = 2000) -> dict[str, float] | None:
    """Mean over prompts and its 95 % percentile bootstrap interval; values (M,), NaNs left out."""
    values = values[~values.isnan()]
    if len(values) == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"value": values.mean().item(), "low": low, "high": high}

def wilson(successes: float, n: int) -> dict[str, float] | None:
    """A share with its 95 % Wilson score interval; None of nothing."""
    if n == 0:
        return None
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
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
    n, own, after = base.reward.shape[1], torch.arange(len(base.judge)), per_prompt_metrics(tuned)
    gain = tuned.judge[own, :, own] - base.judge[own, :, own]
    right, was_right = recognised(tuned), recognised(base)
    mended, broke = (right & ~was_right).sum().item(), (was_right & ~right).sum().item()
    return {"base": figures(base), "best_of_n": figures(best_of(base, n)), "tuned": figures(tuned),
            "tuned_minus_base": {name: bootstrap(after[name] - values)
                                 for name, values in per_prompt_metrics(base).items()},
            "mended": mended, "broke": broke, "wins": wilson(mended, mended + broke),
            "preference": wilson(((gain > 0).sum() + 0.5 * (gain == 0).sum()).item(), gain.numel()),
            "n": n, "clips": gain.numel()}

def over_optimised(rows: list[dict]) -> list[int]:
    """Epochs at which the reward is above, and the judge below, what the judge's best epoch had."""
    found, best = [], (-1.0, -1.0)
    for row in rows:
        reward, judge = row["reward"]["value"], row["judge_score"]["value"]
        found += [row["epoch"]] if reward > best[0] and judge < best[1] else []
        best = (reward, judge) if judge >= best[1] else best
    return found


def show(cell: dict | None) -> str:
    """A figure with its interval."""
    return "-" if cell is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**cell)

def print_evaluation(result: dict) -> None:
    """The table base / best-of-n / tuned, and what else was asked for."""
    columns = "base", "best_of_n", "tuned", "tuned_minus_base"
    print(f"{'(n = %d)' % result['n']:<16}" + "".join(f"{title:>27}" for title in columns))
    for name in result["base"]:
        print(f"{name:<16}" + "".join(f"{show(result[c][name]):>27}" for c in columns))
    print(f"of {result['clips']} clips training mended {result['mended']} and broke "
          f"{result['broke']}: of pairs with one right clip tuned wins {show(result['wins'])}\n"
          f"the judge prefers tuned to base in {show(result['preference'])} of all pairs")
    names = "recognition", "judge_score", "reward", "diversity"
    for title in (title for title in ("guidance", "best_of", "snapshots") if result.get(title)):
        print(f"\n{title:<20}" + "".join(f"{name:>27}" for name in names))
        for row in result[title]:
            print(f"{row['label']:<20}" + "".join(f"{show(row[name]):>27}" for name in names))
    for epoch in over_optimised(result.get("snapshots", [])):
        print(f"warning: epoch {epoch} has more reward and less of the judge than an earlier one: "
              "over-optimisation", file=sys.stderr)

# ==== 3. The page and the curve ==================================================================

def mel_picture(waveform: Tensor, sample_rate: int, bands: int = 32, frames: int = 48) -> str:
    """Mel spectrogram of a waveform (samples,), 60 dB deep: base64 of 4 bits a cell, by columns."""
    import torchaudio
    filters = torchaudio.functional.melscale_fbanks(513, 0, sample_rate / 2, bands, sample_rate)
    hop = math.ceil(len(waveform) / frames)
    spectrum = torch.stft(waveform, 1024, hop, window=torch.hann_window(1024), return_complex=True)
    decibels = 20 * (filters.T @ spectrum.abs()[:, :frames]).clamp(min=1e-6).log10()
    levels = ((decibels - decibels.max() + 60) / 4).clamp(0, 15).round().byte().T.flatten()
    return base64.b64encode((levels[::2] * 16 + levels[1::2]).numpy().tobytes()).decode()

def save_clips(folder: Path, base: Clips, tuned: Clips, prompts: list[str], rate: int,
               kind: str = "wav") -> list[dict]:
    """Each prompt's first clip of base and tuned, in listen/; rows that say which is which.

    In the blind test nothing may give a side away: files are named by a hash of what is in them,
    and the louder clip of a pair is turned down to the RMS of the other.
    """
    import soundfile
    (folder / "listen").mkdir(exist_ok=True)
    rows, pair = [], {"base": base, "tuned": tuned}
    for i, prompt in enumerate(prompts):
        rows.append({"prompt": prompt})
        rms = {side: c.waveforms[i, 0].square().mean().sqrt().item() for side, c in pair.items()}
        level = max(min(rms.values()), 0.01)             # silence does not silence the other clip
        for side, clips in pair.items():
            waveform = clips.waveforms[i, 0] * min(1.0, level / max(rms[side], 1e-6))
            digest = hashlib.sha256(waveform.numpy().tobytes()).hexdigest()[:16]
            soundfile.write(folder / f"listen/{digest}.{kind}", waveform.numpy(), rate)
            rows[-1][side] = {"file": f"listen/{digest}.{kind}", "mel": mel_picture(waveform, rate),
                              "reward": round(clips.reward[i, 0].item(), 4),
                              "judge": round(clips.judge[i, 0, i].item(), 4)}
    return rows

def save_page(folder: Path, cfg, rows: list[dict], result: dict, metrics: list[dict], rate: int,
              **more) -> None:
    """listen.html, the page beside this script, and data.js, what it shows of this run."""
    model = "the small bundled model of synthetic sounds" if cfg.preset == "toy" else cfg.model
    about = (f"Held-out prompts, by {model}: the original and the fine-tuned model from the same "
             "starting noise, played equally loud.")
    identity = hashlib.sha256(json.dumps([r["prompt"] for r in rows]).encode()).hexdigest()[:12]
    facts = {key: getattr(cfg, key) for key in ("model", "clap", "seed", "epochs")}
    data = {"name": folder.name, "id": f"{folder.name}-{identity}", "about": about, "facts": facts,
            "rows": rows, "seconds": cfg.seconds, "sample_rate": rate, "evaluation": result,
            "metrics": [{k: r.get(k) for k in ("epoch", "reward", "eval_reward")} for r in metrics],
            **more}
    (folder / "data.js").write_text(f"window.CLAP_PPO_RUN = {json.dumps(data)};\n")
    (folder / "listen.html").write_bytes((HERE / "listen.html").read_bytes())

def save_curve(path: Path, metrics: list[dict], result: dict) -> None:
    """The reward by epoch, of the rollouts and of held-out prompts, and what the judge says."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for key, alpha, of in (("reward", 0.3, "an epoch's"), ("reward_mean", 0.7, "the last epochs'")):
        axes.plot([r["epoch"] for r in metrics], [r[key] for r in metrics], color="C0", alpha=alpha,
                  label=f"reward of {of} rollouts")
    kept = {0: result["base"]["reward"]["value"], len(metrics): result["tuned"]["reward"]["value"],
            **{r["epoch"]: r["eval_reward"] for r in metrics if "eval_reward" in r}}
    axes.plot(*zip(*sorted(kept.items())), "o-", color="C0", label="reward on held-out prompts")
    if judged := [(r["epoch"], r["judge_score"]["value"]) for r in result.get("snapshots", [])]:
        axes.plot(*zip((0, result["base"]["judge_score"]["value"]), *judged), "s-", color="C1",
                  label="judge on held-out prompts")
    axes.set(xlabel="epoch (0: the base model)", ylabel="cosine of clip and prompt")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")

# ==== 4. Listeners ===============================================================================

def pool_listeners(paths: list[str]) -> dict[str, dict | None]:
    """Preference and recognition rates of what listeners downloaded at the end of a blind test.

    Answers of one listener are not independent: of few listeners the true intervals are wider.
    """
    answers, seen, runs = [], set(), set()
    for path in paths:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            answers += data["answers"]
            for answer in data["answers"]:
                side = answer["chosen" if answer["task"] == "preference" else "side"]
                assert side in ("base", "tuned", "none"), f"an answer says {side!r}"
            listener, runs = data["listener"], runs | {data["run"]}
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{path}: not a download of the listening page ({error})") from None
        if listener in seen or len(runs) > 1:
            raise UserError(f"{path}: a listener again, or another run; pool each listener once")
        seen.add(listener)
    worth = {"tuned": 1.0, "none": 0.5, "base": 0.0}             # no difference counts half
    wins = [worth[answer["chosen"]] for answer in answers if answer["task"] == "preference"]
    rates = {"preference": wilson(sum(wins), len(wins))}
    for side in ("base", "tuned"):
        right = [a["right"] for a in answers if a["task"] == "recognition" and a["side"] == side]
        rates[f"recognition_{side}"] = wilson(sum(right), len(right))
    return rates

# ==== 5. Command line ============================================================================

def evaluate(run: Path, judge: str = "", noises: int = 4, guidance=(), best=(),
             snapshots: bool = False) -> dict:
    """Everything about a finished run; writes its files and returns what evaluation.json holds."""
    cfg, _ = clap_ppo.parse_args(["--resume", str(run)])
    world = clap_ppo.load_world(cfg)
    state = clap_ppo.load_checkpoint(run, world)
    if state["epoch"] < cfg.epochs:
        raise UserError(f"{run}: not finished; go on with clap_ppo.py --resume {run}")
    judge = judge or ("samples/toy/judge" if cfg.preset == "toy" else "laion/larger_clap_general")
    ear, tuned = load_judge(clap_ppo.bundled(judge), world.device), state["ema"]
    untuned = {name: torch.zeros_like(weight) for name, weight in tuned.items()}
    base, after = (make_clips(world, ear, adapter, noises) for adapter in (untuned, tuned))
    result = compare(base, after)
    result["guidance"] = [{"label": f"{name}, guidance {scale:g}", "scale": scale, "model": name,
                           **figures(make_clips(world, ear, adapter, noises, scale))}
                          for name, adapter in (("base", untuned), ("tuned", tuned))
                          for scale in guidance]
    many = make_clips(world, ear, untuned, noises * max(best), seed=0) if best else ()
    result["best_of"] = [{"label": f"base, best of {n}", "n": n, **figures(best_of(
        Clips(*(x[:, :noises * n] for x in many)), n))} for n in best]
    kept = {int(f.stem[6:]): load_file(f) for f in (run / "adapter").glob("epoch-*.safetensors")}
    result["snapshots"] = [
        {"label": str(e), "epoch": e, **figures(make_clips(world, ear, adapter, noises))}
        for e, adapter in sorted({**kept, cfg.epochs: tuned}.items()) if snapshots]
    (run / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print_evaluation(result)
    save_curve(run / "curve.png", state["metrics"], result)
    rate, prompts = world.pipeline.vocoder.config.sampling_rate, world.held_out or world.train
    save_page(run, cfg, save_clips(run, base, after, prompts, rate), result, state["metrics"], rate)
    print(f"\nlisten: {run}/listen.html   curve: {run}/curve.png")
    return result

def main(argv=None) -> int:
    """Exit code: 0, or 2 after one line about a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("run", nargs="?", default="runs/toy-1", help="a finished run's directory")
    parser.add_argument("--judge", default="", help="a transformers ClapModel: folder or hub id")
    parser.add_argument("--noises", type=int, default=4, help="clips per held-out prompt")
    parser.add_argument("--guidance", type=float, nargs="+", default=[], help="scales to compare")
    parser.add_argument("--best-of", type=int, nargs="+", default=[], help="n of base's best of n")
    parser.add_argument("--snapshots", action="store_true", help="the run's snapshots, by epoch")
    parser.add_argument("--pool", nargs="+", metavar="FILE", help="downloads of the blind test")
    args = parser.parse_args(argv)
    try:
        if args.pool:
            print("\n".join(f"{k:<18}{show(v)}" for k, v in pool_listeners(args.pool).items()))
        else:
            evaluate(Path(args.run), *(vars(args)[k] for k in ("judge", "noises", "guidance",
                                                               "best_of", "snapshots")))
        return 0
    except UserError as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
