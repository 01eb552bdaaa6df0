# SPDX-License-Identifier: MIT
"""A finished run before a judge that PPO never saw: statistics, curve, listening page.

    python samples/evaluate.py runs/seed-0                                   # base against tuned
    python samples/evaluate.py runs/seed-0 --guidance 1 2 5 --best-of 2 8    # and what is free
    python samples/evaluate.py runs/seed-0 --snapshots                       # reward against judge
    python samples/evaluate.py --pool listener-*.json                        # blind tests, pooled

Never grade with the model that was trained on: the judge is another CLAP. Base and tuned model make
clips of the held-out prompts (of the training prompts, if none is held out) from the same noise;
intervals are 95 %, by bootstrap over prompts. Writes evaluation.json, curve.png and a page with a
blind test, listen.html, into the run. A run with a reward of your own is evaluated from Python,
`evaluate.main([run], reward=mine)`, as it was trained with `clap_ppo.main`.
"""

import argparse
import glob
import hashlib
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clap_ppo
from clap_ppo import UserError


# ==== 1. The judge ====
def load_judge(judge: str, device="cpu"):
    """A `transformers.ClapModel` with its processor attached: a folder or a hub id."""
    from transformers import ClapModel, ClapProcessor
    try:
        model = ClapModel.from_pretrained(judge, dtype=torch.float32).to(device).eval()
        model.processor = ClapProcessor.from_pretrained(judge)
    except Exception as error:
        raise UserError(f"--judge {judge}: no ClapModel, or no network: "
                        f"{clap_ppo.cause(error)}") from error
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

class Clips(NamedTuple):
    """n clips of each of M prompts, as heard by reward and judge."""
    waveforms: Tensor        # (M, n, samples)
    reward: Tensor           # (M, n)
    judge: Tensor            # (M, n, M), cosine of each clip with *every* prompt
    embeds: Tensor           # (M, n, E), the judge's audio embeddings

def compared_prompts(setup) -> list[str]:
    """The prompts of which `score_held_out` makes clips: held-out ones, all if none is held out."""
    return setup.prompts[setup.num_train % len(setup.prompts):]

@torch.no_grad()
def make_clips(setup, judge, n: int, guidance: float | None = None, seed: int = 999) -> Clips:
    """n clips of each compared prompt, by the weights that are in the U-Net now; guidance: another
    than the run's. With n = EVAL_CLIPS they are those that the run itself scored."""
    if guidance is not None:
        setup = replace(setup, cfg=replace(setup.cfg, eval_guidance=guidance))
    waveforms, reward = clap_ppo.score_held_out(setup, n, seed)
    embeds = judge_audio_embeds(judge, waveforms, setup.sample_rate).unflatten(0, (-1, n))
    tokens = judge.processor.tokenizer(
        compared_prompts(setup), padding=True, truncation=True, return_tensors="pt")
    texts = judge.get_text_features(**tokens.to(judge.device)).pooler_output
    texts = F.normalize(texts.float(), dim=-1).cpu()
    return Clips(waveforms.unflatten(0, (-1, n)), reward, embeds @ texts.T, embeds)

def make_base_clips(setup, *args) -> Clips:
    """The same, by the model as it was before training."""
    with setup.unet.disable_adapter():
        return make_clips(setup, *args)

def best_of(clips: Clips, n: int) -> Clips:
    """Of every n clips of a prompt the one with the highest reward: what n reward calls buy."""
    # (M, groups), a place in the group, then among all clips of the prompt
    best = clips.reward.unflatten(1, (-1, n)).argmax(dim=2)
    best += n * torch.arange(best.shape[1])
    prompt = torch.arange(len(best))[:, None]
    return Clips._make([x[prompt, best] for x in clips])

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
    of its recognised clips alone, since mistakes are diverse, too (NaN with fewer than two).
    loudness: RMS in dB of full scale. broken: silent (below -60 dBFS) or clipped (1 % of samples).
    """
    n = clips.reward.shape[1]
    right = recognised(clips)
    power = clips.waveforms.square().mean(dim=-1)
    loudness = 10 * power.clamp(min=1e-12).log10()
    at_full_scale = (clips.waveforms.abs() > 0.999).float().mean(dim=-1)
    broken = (loudness < -60) | (at_full_scale > 0.01)
    of_clips = {"reward": clips.reward, "judge_score": own_scores(clips), "recognition": right,
                "loudness": loudness, "broken": broken}
    metrics = {name: values.float().mean(dim=1) for name, values in of_clips.items()}
    distance = 1 - clips.embeds @ clips.embeds.mT                           # (M, n, n)
    pairs = ~torch.eye(n, dtype=torch.bool).expand_as(distance)
    right_pairs = pairs & right[:, :, None] & right[:, None, :]
    for name, chosen in (("diversity", pairs), ("diversity_right", right_pairs)):
        total = (distance * chosen).sum(dim=(1, 2))
        metrics[name] = total / chosen.sum(dim=(1, 2))
    return metrics

def bootstrap(sums: Tensor, counts: Tensor | None = None) -> dict | None:
    """sum(sums) / sum(counts) with its 95 % percentile bootstrap interval; None of nothing.

    sums, counts: (M,), of each prompt's clips. Without counts: a mean over prompts without NaNs.
    """
    if counts is None:
        counts = torch.ones_like(sums)
    known = (counts > 0) & ~sums.isnan()
    sums = sums[known]
    counts = counts[known]
    size = len(sums)
    if size == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    # Prompts are drawn, not clips: those of one prompt are alike, and would make it too narrow.
    drawn = torch.randint(size, (2000, size), generator=generator)
    values = sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)
    low, high = values.quantile(torch.tensor([0.025, 0.975])).tolist()
    if low == high:             # one prompt, or all alike: drawing says nothing about the others
        low = high = None
    return {"value": (sums.sum() / counts.sum()).item(), "low": low, "high": high}

def figures(clips: Clips) -> dict:
    """Every figure of merit with its interval; no recognition among fewer than four prompts."""
    found = {name: bootstrap(values) for name, values in per_prompt_metrics(clips).items()}
    if len(clips.judge) < 4:            # one prompt is always recognised
        found["recognition"] = None
    return found

def compare(base: Clips, tuned: Clips) -> dict:
    """Base, best of n and tuned, paired differences, and what training did to single clips.

    mended, broke: clips that only tuned, only base gets right; wins: the former among both.
    """
    n = base.reward.shape[1]
    before = per_prompt_metrics(base)
    after = per_prompt_metrics(tuned)
    differences = {}
    for name in before:
        differences[name] = bootstrap(after[name] - before[name])
    if len(base.judge) < 4:
        differences["recognition"] = None
    was_right = recognised(base)
    right = recognised(tuned)
    mended = (right & ~was_right).sum(dim=1)                                # (M,)
    broke = (was_right & ~right).sum(dim=1)
    return {
        "base": figures(base),
        "best_of_n": figures(best_of(base, n)),
        "tuned": figures(tuned),
        "tuned_minus_base": differences,
        "mended": mended.sum().item(),
        "broke": broke.sum().item(),
        "wins": bootstrap(mended, mended + broke),
        "n": n,
        "clips": right.numel(),
        "chance": 1 / len(right),
    }

def over_optimised(rows: list) -> list[int]:
    """Epochs at which the reward is above, and the judge below, what the judge's best epoch had."""
    found = []
    best_reward = best_judge = -1.0
    for row in rows:
        reward = row["reward"]["value"]
        judge = row["judge_score"]["value"]
        if judge >= best_judge:
            best_reward, best_judge = reward, judge
        elif reward > best_reward:
            found.append(row["epoch"])
    return found

def show(cell: dict | None) -> str:
    """A figure with its interval, where there is one."""
    if cell is None:
        return "-"
    if cell["low"] is None:
        return f"{cell['value']:.3f}"
    return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"

def print_line(label: str, width: int, cells: list[str]) -> None:
    """One line of a table."""
    print(f"{label:<{width}}" + "".join(f"{cell:>27}" for cell in cells))

def print_evaluation(result: dict, kind: str = "held-out prompts") -> None:
    """The table base / best-of-n / tuned, and what else was asked for; kind: of the prompts."""
    columns = ["base", "best_of_n", "tuned", "tuned_minus_base"]
    print(f"{kind} (n = {result['n']}); recognition by chance: {result['chance']:.3f}")
    print_line("", 16, columns)
    for name in result["base"]:
        print_line(name, 16, [show(result[column][name]) for column in columns])
    print(f"of {result['clips']} clips training mended {result['mended']} and broke "
          f"{result['broke']}: of pairs with one right clip tuned wins {show(result['wins'])}")
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
def mel_picture(waveform: Tensor, sample_rate: int) -> str:
    """Mel spectrogram of a waveform (samples,): 48 frames of 32 bands, a byte each, 60 dB deep."""
    import torchaudio
    hop = len(waveform) // 47
    transform = torchaudio.transforms.MelSpectrogram(sample_rate, 1024, hop_length=hop, n_mels=32)
    decibels = 10 * transform(waveform)[:, :48].clamp(min=1e-12).log10()
    levels = 255 + 255 / 60 * (decibels - decibels.max())
    return bytes(levels.clamp(min=0).T.flatten().int().tolist()).hex()

def save_clips(folder: Path, base: Clips, tuned: Clips, prompts: list[str], rate: int) -> list:
    """Each prompt's first clip of base and tuned, in listen/; rows that say which is which."""
    # In the blind test nothing may give a side away: files are named by a hash of what is in them,
    # and the louder clip of a pair is turned down to the RMS of the other.
    import soundfile
    (folder / "listen").mkdir(exist_ok=True)
    rows = []
    for i, prompt in enumerate(prompts):
        pair = torch.stack([base.waveforms[i, 0], tuned.waveforms[i, 0]])
        rms = pair.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        level = rms.min().clamp(min=0.01)               # silence does not silence the other clip
        pair *= (level / rms).clamp(max=1)
        row = {"prompt": prompt}
        for side, clips, waveform in (("base", base, pair[0]), ("tuned", tuned, pair[1])):
            digest = hashlib.sha256(waveform.numpy().tobytes()).hexdigest()[:16]
            file = f"listen/{digest}.wav"
            soundfile.write(folder / file, waveform.numpy(), rate)
            row[side] = {"file": file, "mel": mel_picture(waveform, rate),
                         "reward": clips.reward[i, 0].item(),
                         "judge": clips.judge[i, 0, i].item(),
                         "heard": prompts[clips.judge[i, 0].argmax()]}     # its own: recognised
        rows.append(row)
    add_anchors(rows, base)
    return rows

def add_anchors(rows: list, base: Clips) -> None:
    """Gives a quarter of the rows a pair for the blind test that no careful listener gets wrong.

    A clip of the prompt against one of another prompt, by the base model, which no training has
    spoilt: where, to the judge, they differ most.
    """
    scores = base.judge[:, 0]                           # (M, M): each prompt's first clip, prompt
    gap, other = (scores.diag() - scores).max(dim=0)    # (M,): to the clip that fits it least
    for i in gap.argsort(descending=True)[:max(3, len(rows) // 4)]:
        if gap[i] > 0:
            rows[i]["anchor"] = {"own": rows[i]["base"]["file"],
                                 "other": rows[other[i]]["base"]["file"]}

def save_page(folder: Path, cfg, rows: list, result: dict, rate: int,
              kind: str = "held-out prompts") -> None:
    """listen.html, the page beside this script, and data.js, what it shows of this run."""
    about = (f"{kind.capitalize()}, by {cfg.model}: the original and the fine-tuned model from the "
             "same starting noise, played equally loud.")
    identity = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]   # of the clips, too
    data = {"name": folder.name, "id": identity, "about": about, "kind": kind,
            "rows": rows, "seconds": cfg.seconds, "sample_rate": rate, "evaluation": result}
    (folder / "data.js").write_text(f"window.CLAP_PPO_RUN = {json.dumps(data)};\n")
    shutil.copy(HERE / "listen.html", folder)

def save_curve(path: Path, metrics: list, result: dict, kind: str) -> None:
    """The reward by epoch, of the rollouts and of the compared prompts, and what the judge says."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    scores = {0: result["base"]["reward"]["value"]}
    for row in metrics:
        if "eval_reward" in row:
            scores[row["epoch"]] = row["eval_reward"]
    scores[len(metrics)] = result["tuned"]["reward"]["value"]
    epochs = [row["epoch"] for row in metrics]
    rewards = [row["reward_mean"] for row in metrics]
    axes.plot(epochs, rewards, color="C7", label="reward of the last epochs' rollouts")
    axes.plot(list(scores), list(scores.values()), "o-", label=f"reward on {kind}")
    if result["snapshots"]:
        epochs = [row["epoch"] for row in result["snapshots"]]
        judged = [row["judge_score"]["value"] for row in result["snapshots"]]
        axes.plot(epochs, judged, "s-", label=f"judge on {kind}")
    axes.set(xlabel="epoch (0: the base model)", ylabel="reward; judge: cosine of clip and prompt")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")

# ==== 4. Listeners ====
TASKS = ["preference", "recognition_base", "recognition_tuned", "anchor"]

def pool_listeners(paths: list[str]) -> dict:
    """Prints and returns the rates of what listeners downloaded at the end of a blind test. Answers
    of one listener are not independent: of few listeners the true intervals are wider."""
    sums = {task: Counter() for task in TASKS}          # of scores, by prompt
    counts = {task: Counter() for task in TASKS}
    listeners, runs = set(), set()
    left_out = 0
    matches = [glob.glob(path) or [path] for path in paths]    # where the shell left a * alone
    paths = sum(matches, [])
    for path in paths:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            listeners.add(data["listener"])
            runs.add(data["run"])
            anchors = [answer["score"] for answer in data["answers"] if answer["task"] == "anchor"]
            careless = min(anchors, default=1) < 1
            left_out += careless
            for answer in data["answers"]:
                task = answer["task"]
                if task == "anchor" or not careless:
                    sums[task][answer["prompt"]] += answer["score"]
                    counts[task][answer["prompt"]] += 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a download of the listening page ({error})") from None
    if len(listeners) < len(paths) or len(runs) > 1:
        raise UserError("--pool: a listener twice, or answers about several evaluations")
    print(f"left out: {left_out} of {len(listeners)} listeners, who took a clip of another prompt "
          "for the better one, or heard no difference")
    rates = {"listeners": len(listeners), "left_out": left_out}
    for task in TASKS:
        successes = torch.tensor(list(sums[task].values()))
        trials = torch.tensor(list(counts[task].values()))
        rates[task] = bootstrap(successes, trials)
        print(f"{task:<18}{show(rates[task])}")
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
    setup, metrics = clap_ppo.open_run(cfg, run, reward)
    if len(metrics) < cfg.epochs:
        raise UserError(f"{run}: not finished; go on with clap_ppo.py --resume {run}")
    if not judge:
        judge = "laion/larger_clap_general"
        if Path(cfg.clap).resolve() == HERE / "toy/clap.pt":
            judge = str(HERE / "toy/judge")             # it knows the bundled model's sounds alone
    ear = load_judge(judge, setup.device)
    base = make_base_clips(setup, ear, noises)
    tuned = make_clips(setup, ear, noises)
    result = compare(base, tuned) | {"guidance": [], "best_of": [], "snapshots": []}
    for name, make in (("base", make_base_clips), ("tuned", make_clips)):
        for scale in guidance:
            row = {"label": f"{name}, guidance {scale:g}", "scale": scale, "model": name}
            result["guidance"].append(row | figures(make(setup, ear, noises, scale)))
    for n in best:
        many = make_base_clips(setup, ear, noises * n, None, 0)             # other noise: seed 0
        row = {"label": f"base, best of {n}", "n": n}
        result["best_of"].append(row | figures(best_of(many, n)))
    if snapshots:
        files = {cfg.epochs: run / "adapter/adapter_model.safetensors"}
        for file in (run / "adapter").glob("epoch-*.safetensors"):
            files.setdefault(int(file.stem[6:]), file)
        for epoch, file in sorted(files.items()):       # at the end the tuned model is loaded again
            set_peft_model_state_dict(setup.unet, load_file(file))
            row = {"label": str(epoch), "epoch": epoch}
            result["snapshots"].append(row | figures(make_clips(setup, ear, noises)))
    (run / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    kind = "training prompts" if setup.num_train == len(setup.prompts) else "held-out prompts"
    print_evaluation(result, kind)
    save_curve(run / "curve.png", metrics, result, kind)
    rows = save_clips(run, base, tuned, compared_prompts(setup), setup.sample_rate)
    save_page(run, cfg, rows, result, setup.sample_rate, kind)
    print(f"\nlisten: {run}/listen.html   curve: {run}/curve.png")
    return result

def main(argv=None, reward: Callable | None = None) -> int:
    """Exit code: 0, or 2 after one line about a mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
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
            pool_listeners(args.pool)
        else:
            evaluate(Path(args.run), args.judge, args.noises, args.guidance, args.best_of,
                     args.snapshots, reward)
        return 0
    except (UserError, OSError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
