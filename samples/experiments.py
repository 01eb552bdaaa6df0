"""The experiments behind the README's tables: `clap_ppo.py` with other flags, or one part replaced.

    python samples/experiments.py                    # what there is, and what is still to run
    python samples/experiments.py defaults           # one experiment with all its seeds
    python samples/experiments.py all                # everything; hours
    python samples/experiments.py report             # the README's tables
    python samples/experiments.py pictures           # samples/guidance.png and samples/method.png
    python samples/experiments.py demo RUN LOG       # samples/demo, of an evaluated run and its log

Every run is a call of `clap_ppo.main` in runs/experiments/NAME-SEED, then of `evaluate.py`. What
finishes becomes a row of `samples/results.jsonl`; what is cut is resumed by the next call. When two
run side by side, give them other names, and one thread each (OMP_NUM_THREADS=1).
"""

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import clap_ppo  # noqa: E402
import evaluate  # noqa: E402

RESULTS = HERE / "results.jsonl"
RUNS = Path("runs/experiments")
PROMPTS = str(HERE / "prompts.txt")


# ==== 1. Parts of clap_ppo.py that an experiment replaces ========================================

def rollout_of_ddim(world, prompt_ids, starts, generator):
    """Reward-weighted regression: finished clips of plain DDIM, each from its own noise."""
    ids = prompt_ids.repeat_interleave(world.cfg.clips_per_prompt)
    latents = clap_ppo.sample(world, ids, clap_ppo.randn(world, len(ids), generator))
    return latents, {"latents": latents, "clip": torch.arange(len(ids)), "prompt_id": ids}

def regression_update(world, rows, generator):
    """Reward-weighted regression: the diffusion loss on own clips, weighted by exp(advantage).

    Each clip is noised to a random step of the sampler and the U-Net learns to predict the noise
    (Lee et al. 2023, arXiv 2302.12192, with the weights that DDPO, section 5, calls RWR).
    """
    cfg, optimizer, group = world.cfg, world.optimizer, world.optimizer.param_groups[0]
    weights = rows["advantage"].exp() / rows["advantage"].exp().mean()
    for _ in range(4):
        for at in torch.randperm(len(weights), generator=generator).chunk(cfg.updates_per_epoch):
            step = torch.randint(cfg.num_steps, (len(at),), generator=generator)
            noise = clap_ppo.randn(world, len(at), generator)
            alpha_bar = world.schedule[1][step].view(-1, 1, 1, 1)
            noisy = alpha_bar.sqrt() * rows["latents"][at] + (1 - alpha_bar).sqrt() * noise
            condition = {k: v if v is None else v[rows["prompt_id"][at]]
                         for k, v in world.condition.items()}
            predicted = clap_ppo.guided_prediction(world.unet, noisy, world.schedule[0][step],
                                                   condition, condition, 1)
            loss = ((predicted - noise).square().flatten(1).mean(dim=1) * weights[at]).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(group["params"], clap_ppo.MAX_GRAD_NORM)
            group["updates"] = n = group.get("updates", 0) + 1
            left = 1 - (n - 1) / (4 * cfg.epochs * cfg.updates_per_epoch)
            group["lr"] = cfg.learning_rate * min(n / clap_ppo.WARMUP_UPDATES, left)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "approx_kl": 0.0, "clip_fraction": 0.0, "grad_norm": norm.item()}

def attention_lora(unet, rank):
    """`add_lora` on the attention alone, as DDPO has it."""
    from peft import LoraConfig, get_peft_model
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return get_peft_model(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)).eval()

def with_guidance(scale):
    """`step_gaussian` of a policy that is guided wherever it acts."""
    return lambda *args: step_gaussian(*args[:5], max(scale, *args[5:], 1))

step_gaussian = clap_ppo.step_gaussian


# ==== 2. The experiments =========================================================================

SHORT = "--epochs 30 --eval-guidance 1"         # listened to as trained: what the weights learned
DDPO = ("--epochs 15 --clips-per-prompt 16 --noise-window 10 --no-shared-noise --kl-weight 0 "
        "--learning-rate 3e-4 --updates-per-epoch 2 --clip-range 6.25e-6 --lora-rank 4")

# name: (what the README calls it, seeds, flags, replaced parts)
EXPERIMENTS: dict[str, tuple] = {
    "defaults": ("the defaults, whole run", 5, "", {}),
    "long": ("ten times as long", 1, "--epochs 1000", {}),
    "short": ("**the defaults**", 3, SHORT, {}),
    "ppo-alone": ("no KL: PPO alone", 3, f"{SHORT} --kl-weight 0", {}),
    "kl-alone": ("advantages 0: the pull alone", 3, SHORT,
                 dict(group_advantages=torch.zeros_like)),
    "kl-plain": ("KL to the base without guidance", 3, f"{SHORT} --kl-guidance 1", {}),
    "two-steps": ("noise in two steps", 3, f"{SHORT} --noise-window 2", {}),
    "all-steps": ("noise in all 10 steps, 9 trained", 3, f"{SHORT} --noise-window 10", {}),
    "own-noise": ("each clip its own starting noise", 3, f"{SHORT} --no-shared-noise", {}),
    "ddpo": ("DDPO's published settings, 10 steps", 3, DDPO,
             dict(add_lora=attention_lora, step_gaussian=with_guidance(5), EMA_DECAY=0.0,
                  WARMUP_UPDATES=1)),
    "regression": ("reward-weighted regression", 3, f"{SHORT} --updates-per-epoch 2",
                   dict(rollout=rollout_of_ddim, update=regression_update)),
    "no-clipping": ("no clipping", 3, f"{SHORT} --clip-range 1", {}),
    "group-2": ("64 prompts x 2 clips", 3,
                f"{SHORT} --prompts-per-epoch 64 --clips-per-prompt 2", {}),
    "guidance": ("guidance 2 in rollout and training", 3, SHORT,
                 dict(step_gaussian=with_guidance(2))),
}


# ==== 3. Running them ===========================================================================

def rounded(value):
    """A JSON value with its floats cut to 5 significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value

def write_row(row: dict) -> None:
    """One line at the end of the results, in one write, so that two processes do not mix theirs."""
    with open(RESULTS, "ab", buffering=0) as file:
        file.write((json.dumps(rounded(row)) + "\n").encode())

def read_rows() -> list[dict]:
    """All results so far, in the order in which the experiments stand above."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    order = [*EXPERIMENTS, "free", "bench"]
    return sorted((json.loads(line) for line in lines), key=lambda r: (
        order.index(r["name"]), r["seed"], r.get("epoch", 0)))

def runs_of(rows: list[dict], name: str) -> list[dict]:
    """The finished runs of an experiment, by seed."""
    return [r for r in rows if r["name"] == name and "tuned" in r]

def seeds_done(name: str) -> set[int]:
    """The seeds of which the results hold rows."""
    return {r["seed"] for r in read_rows() if r["name"] == name}

def run_one(name: str, seed: int) -> None:
    """Train and evaluate, or go on with it, and add its rows; nothing if they are there already."""
    if seed in seeds_done(name):
        return
    _, _, flags, parts = EXPERIMENTS[name]
    run = RUNS / f"{name}-{seed}"
    argv = (["--resume", str(run)] if (run / "config.json").exists() else
            ["--prompts", PROMPTS, "--seed", str(seed), "--out", str(run), *flags.split()])
    with ExitStack() as stack:
        for part, replacement in parts.items():
            stack.enter_context(mock.patch.object(clap_ppo, part, replacement))
        print(f"\n=== {name}, seed {seed}: {' '.join(argv)}", flush=True)
        if clap_ppo.main(argv) != 0:
            return
        # Beside the whole runs, what is free: guidance, and the base model's best of 4.
        whole = name == "defaults"
        result = evaluate.evaluate(
            run, noises=12 if whole else 4, snapshots=name == "long", best=(4,) if whole else (),
            guidance=(1, 1.5, 2, 3, 5, 7) if whole else ())
    for row in result.pop("snapshots"):
        write_row({"name": name, "seed": seed, "epoch": row["epoch"], **{
            k: row[k]["value"] for k in ("reward", "judge_score", "recognition", "diversity")}})
    for row in [*result.pop("best_of"), *result.pop("guidance")]:
        write_row({"name": "free", "seed": seed, **row})
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_row({"name": name, "seed": seed, "flags": flags,
               "minutes": sum(row["seconds"] for row in metrics) / 60, **result})


# ==== 4. The README's tables =====================================================================

def spread(values: list[float], sign: str = "+") -> str:
    """Mean and 95 % t-interval over seeds as "mean ± half"; the mean alone of one seed."""
    from scipy import stats
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:{sign}.2f}"
    return f"{mean:{sign}.2f} ± {stats.t.ppf(0.975, len(values) - 1) * stats.sem(values):.2f}"

def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |"
                     for cells in [head, ["---"] * len(head), *lines])

def gain(run: dict, metric: str) -> float:
    """Tuned minus base."""
    return run["tuned_minus_base"][metric]["value"]

def seeds_table(rows: list[dict]) -> str:
    """The whole runs with the default settings, seed by seed, and their means."""
    runs, columns = runs_of(rows, "defaults"), ("recognition", "reward", "diversity")

    def cells(chosen):
        def mean(side, metric):
            return sum(r[side][metric]["value"] for r in chosen) / len(chosen)
        return [f"{mean('base', c):.2f} → {mean('tuned', c):.2f}" for c in columns] + [
            f"{sum(r['mended'] for r in chosen)} : {sum(r['broke'] for r in chosen)}"]

    lines = [[str(r["seed"]), *cells([r]), f"{gain(r, 'recognition'):+.2f}"] for r in runs]
    lines.append(["all", *cells(runs), spread([gain(r, "recognition") for r in runs])])
    return table(["seed", *columns, "mended : broken", "gain"], lines)

def free_table(rows: list[dict]) -> str:
    """One clip as it comes, over seeds: of the base model, with guidance, of its best of 4; after
    PPO; and what it costs."""
    steps, lines = clap_ppo.Config().num_steps, []
    free = [r for r in rows if r["name"] == "free" and r.get("label") not in
            ("tuned, guidance 5", "tuned, guidance 7")]          # too much, see the text
    for label in dict.fromkeys(r["label"] for r in free):
        found = [r for r in free if r["label"] == label]
        cost = steps * found[0].get("n", 1) * (1 if found[0].get("scale") == 1 else 2)
        lines.append([label, str(cost), *(
            spread([r[key]["value"] for r in found], "")
            for key in ("recognition", "diversity"))])
    return table(["", "U-Net passes", "recognition", "diversity"], lines)

def ablation_table(rows: list[dict]) -> str:
    """What each change does to a short run, listened to as it was trained; differences paired,
    where base model and noise are the defaults' too, so not with another guidance."""
    reference = {r["seed"]: r for r in runs_of(rows, "short")}
    lines = []
    for name, (title, *_) in EXPERIMENTS.items():
        if runs := runs_of(rows, name) if name not in ("defaults", "long") else []:
            base, tuned = (sum(r[side]["recognition"]["value"] for r in runs) / len(runs)
                           for side in ("base", "tuned"))
            alike = all(r["base"] == reference[r["seed"]]["base"] for r in runs)
            against = [r["tuned"]["judge_score"]["value"]
                       - reference[r["seed"]]["tuned"]["judge_score"]["value"] for r in runs]
            lines.append([title, f"{base:.2f} → {tuned:.2f}",
                          spread(against) if alike and name != "short" else ""])
    return table(["changed", "recognition", "judge score against the defaults"], lines)

def long_table(rows: list[dict], epochs=(100, 200, 300, 400, 600, 800, 1000)) -> str:
    """The run that goes on ten times as long, on held-out prompts."""
    found = [r for r in rows if r["name"] == "long" and r.get("epoch") in epochs]
    return table(["epoch", *(str(r["epoch"]) for r in found)], [
        [name.replace("_", " "), *(f"{r[name]:.2f}" for r in found)]
        for name in ("reward", "recognition")])

def bench_table(rows: list[dict]) -> str:
    """The rows that `samples/bench.py --save samples/results.jsonl` has added."""
    return table(["preset", "device", "clips", "epoch", "over the networks alone", "memory"], [
        [r["preset"], r["device"], str(r["clips"]), f"{r['seconds']:.1f} s", f"{r['overhead']:.2f}",
         f"{r['peak_gib']:.1f} GiB"] for r in rows if r["name"] == "bench"])

def log_block() -> str:
    """What the run of samples/demo printed, without most of its epochs."""
    lines = (HERE / "demo/log.txt").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("epoch "))
    return "\n".join(["```", *lines[:3], "...", *lines[last:], "```"])

def fill(text: str, rows: list[dict]) -> str:
    """README text with what stands between the lines <!-- NAME --> and <!-- /NAME --> replaced."""
    tables = {"seeds": seeds_table, "free": free_table, "ablations": ablation_table,
              "long": long_table, "bench": bench_table}
    parts = {"log": log_block(), **{name: make(rows) for name, make in tables.items()}}
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        if begin in text:
            head, rest = text.split(begin)
            text = head + begin + part + "\n" + end + rest.split(end)[1]
    return text


# ==== 5. The pictures, and the demo ==============================================================

def draw_guidance(rows: list[dict]) -> None:
    """Recognition against diversity, one dot per guidance, base and tuned: 95 % over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from scipy import stats
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for model, colour, away in (("base", "C7", -13), ("tuned", "C1", 6)):
        found = [r for r in rows if r["name"] == "free" and r.get("model") == model]
        scales = (1, 1.5, 2, 3, 5, 7) if model == "base" else (1, 1.5, 2, 3)
        values = torch.tensor([[[r[key]["value"] for r in found if r["scale"] == scale]
                                for key in ("diversity_right", "recognition")] for scale in scales])
        seeds, (x, y) = values.shape[2], values.mean(dim=2).T
        half = stats.t.ppf(0.975, seeds - 1) * values.std(dim=2).T / seeds ** 0.5
        axes.errorbar(x, y, yerr=half[1], xerr=half[0], fmt="o-", color=colour, elinewidth=0.8,
                      label={"base": "base model", "tuned": "after PPO"}[model])
        for scale, *point in zip(scales, x.tolist(), y.tolist()):
            axes.annotate(f"{scale:g}", point, (5, away), textcoords="offset points", color=colour)
    axes.set(xlabel="diversity of a prompt's recognised clips (mean cosine distance)",
             ylabel="clips whose prompt is recognised",
             title="held-out prompts, five seeds; at each dot the guidance it was listened to with")
    axes.legend()
    figure.savefig(HERE / "guidance.png", dpi=110)

def draw_method(prompt="a man whistling then lion roaring", seed: int = 2, start: int = 1) -> None:
    """One group of clips of the bundled base model, from noise to advantage: nothing is a sketch.
    The paths are latents of 16 clips, in the direction in which the finished ones differ most."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    world = clap_ppo.load_world(clap_ppo.parse_args(["--prompts", PROMPTS])[0])
    cfg, generator = world.cfg, torch.Generator().manual_seed(seed)
    ids = torch.full((cfg.clips_per_prompt,), (world.train + world.held_out).index(prompt))
    end = start + cfg.noise_window
    paths = [clap_ppo.randn(world, 1, generator).expand(len(ids), -1, -1, -1)]
    for step in range(cfg.num_steps):
        noisy = start <= step < end
        mean, sigma = clap_ppo.denoise(world, paths[-1], step, ids, eta=float(noisy))
        noise = clap_ppo.randn(world, len(ids), generator)
        paths.append(mean + sigma.view(-1, 1, 1, 1) * noise if noisy else mean)
    waveforms, rewards = clap_ppo.score(world, paths[-1], ids)
    advantages = clap_ppo.group_advantages(rewards[None])[0]
    flat = torch.stack(paths).flatten(2)
    _, _, directions = torch.linalg.svd(flat[-1] - flat[-1].mean(dim=0), full_matrices=False)
    heights = (flat - flat[-1].mean(dim=0)) @ directions[0]
    figure, axes = plt.subplot_mosaic([["paths", "rewards", "best"], ["paths", "rewards", "worst"]],
                                      figsize=(11, 4.2), layout="constrained",
                                      width_ratios=[2.4, 1.3, 1.5])
    colour = plt.get_cmap("coolwarm_r")((advantages / 4 + 0.5).clamp(0, 1).numpy())
    for k, line in enumerate(heights.T):
        axes["paths"].plot(line, color=colour[k], linewidth=1.2)
    axes["paths"].plot(heights[:start + 1, 0], color="black", linewidth=2)
    axes["paths"].axvspan(start, end, color="gold", alpha=0.35)
    for x, text in ((0.05, "one\nnoise"), (start + 0.05, "one\naction"),
                    (end + 0.3, f"plain DDIM, to {len(ids)} different clips")):
        axes["paths"].text(x, 0.98, text, va="top", transform=axes["paths"].get_xaxis_transform())
    axes["paths"].margins(y=0.16)
    axes["paths"].set(xlabel="denoising step", title=f'{len(rewards)} clips of "{prompt}"',
                      ylabel="latents, main direction", xticks=range(cfg.num_steps + 1))
    order = rewards.argsort()
    axes["rewards"].barh(range(len(rewards)), rewards[order], color=colour[order])
    axes["rewards"].axvline(rewards.mean(), color="black", linewidth=1, linestyle="--")
    for y, k in enumerate(order.tolist()):
        axes["rewards"].text(max(0.0, rewards[k].item()) + 0.04, y, f"{advantages[k]:+.1f}",
                             va="center", fontsize=8)
    axes["rewards"].set(xlabel="CLAP reward (dashed: mean); at its end the advantage", yticks=[],
                        xlim=(min(0, rewards.min().item()) - 0.05, 1.25),
                        title="compared with each other")
    for name, k in (("best", order[-1]), ("worst", order[0])):
        axes[name].specgram(waveforms[k].numpy() + 1e-5, NFFT=512, noverlap=384, Fs=16000,
                            vmin=-110, cmap="magma")
        axes[name].set(title=f"{name}: {'made more' if name == 'best' else 'made less'} likely",
                       yticks=[], xticks=[])
    figure.savefig(HERE / "method.png", dpi=110)

def make_demo(run: Path, log: Path, demo: Path = HERE / "demo") -> None:
    """Replaces samples/demo by the figures of an evaluated run, and by a page of 18 of its prompts:
    12 held-out ones, and the six that the method was published with, in the toy's voice."""
    cfg, _ = clap_ppo.parse_args(["--resume", str(run)])
    shutil.rmtree(demo, ignore_errors=True)
    demo.mkdir()
    shutil.copy(log, demo / "log.txt")
    for name in ("config.json", "metrics.jsonl", "evaluation.json", "curve.png"):
        shutil.copy(run / name, demo / name)
    ear, rows = evaluate.load_judge(str(HERE / "toy/judge")), []
    published = "one of the method's six published prompts, in the toy's voice"
    for file, step, note in ((HERE / "published_prompts.txt", 1, published),
                             (HERE / "eval_prompts.txt", 3, "")):
        world = clap_ppo.load_world(replace(cfg, prompts=PROMPTS, eval_prompts=str(file)))
        tuned = torch.load(run / "checkpoint.pt", weights_only=True)["ema"]
        base = {name: torch.zeros_like(weight) for name, weight in tuned.items()}
        clips = [evaluate.make_clips(world, ear, adapter, 1) for adapter in (base, tuned)]
        clips = [evaluate.Clips(*(x[::step][:12] for x in side)) for side in clips]
        clips = [side._replace(judge=side.judge[:, :, ::step]) for side in clips]
        found = evaluate.save_clips(demo, *clips, world.held_out[::step][:12], 16000, "mp3")
        rows += [{**row, "note": note} if note else row for row in found]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "evaluation.json").read_text())
    evaluate.save_page(demo, cfg, rows, result, metrics, 16000, name="the bundled model")


# ==== 6. Command line ===========================================================================

def main(argv: list[str]) -> None:
    """Runs what is named; without a name, lists what there is and how much of it is done."""
    command, readme = (argv or ["list"])[0], HERE.parent / "README.md"
    if command == "list":
        for name, (_, seeds, flags, parts) in EXPERIMENTS.items():
            print(f"{name:<12} {len(seeds_done(name))} of {seeds} seeds   {flags} "
                  f"{'with other ' + ', '.join(parts) if parts else ''}")
    elif command == "report":
        readme.write_text(fill(readme.read_text(), read_rows()))
    elif command == "pictures":
        draw_guidance(read_rows())
        draw_method()
    elif command == "demo":
        make_demo(*map(Path, argv[1:]))
    else:
        names = list(EXPERIMENTS) if command == "all" else argv
        if unknown := set(names) - set(EXPERIMENTS):
            sys.exit(f"{unknown.pop()}: not one of all, report, {', '.join(EXPERIMENTS)}")
        for seed in range(5):                             # all experiments' first seeds come first
            for name in names:
                if seed < EXPERIMENTS[name][1]:
                    run_one(name, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
