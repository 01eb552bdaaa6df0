"""The experiments behind the README's tables: `clap_ppo.py` with other flags, or one part replaced.

    python samples/experiments.py                    # what there is, and what is still to run
    python samples/experiments.py defaults           # one experiment with all its seeds
    python samples/experiments.py all                # everything; start it twice for two cores
    python samples/experiments.py report             # the README's tables, and samples/results.png

Every run is a call of `clap_ppo.main` in runs/experiments/NAME-SEED. What finishes becomes a row of
`samples/results.jsonl`; what is cut is resumed by the next call; what another process is working on
is left to it. One thread per process (OMP_NUM_THREADS=1) is best when several run side by side.
"""

import json
import re
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clap_ppo  # noqa: E402

RESULTS = HERE / "results.jsonl"
RUNS = Path("runs/experiments")
PROMPTS = str(HERE / "prompts.txt")


# ==== 1. Parts of clap_ppo.py that an experiment replaces ========================================

def sum_log_prob(x, mean, sigma):
    """The log-prob of a whole step: the sum over latent elements, not their mean."""
    return x[0].numel() * gaussian_log_prob(x, mean, sigma)


def global_advantages(rewards, clip=5.0):
    """Advantages among all clips of the epoch, whatever their prompts."""
    return group_advantages(rewards.reshape(1, -1), clip).view_as(rewards)


def rollout_with_last_step(policy, prompt_ids, starts, cfg, generator):
    """`rollout`, and the rows of the last step, which it samples but does not record."""
    calls = []

    def recorded(policy, latents, step, ids, eta):
        calls[:] = [(latents, step, ids, *denoise(policy, latents, step, ids, eta))]
        return calls[0][-2:]

    with mock.patch.object(clap_ppo, "denoise", recorded):
        latents, rows = rollout(policy, prompt_ids, starts, cfg, generator)
    before, step, ids, mean, sigma = calls[0]
    last = {"latents": before, "next_latents": latents, "prompt_id": ids,
            "log_prob": clap_ppo.gaussian_log_prob(latents, mean, sigma),
            "step": torch.full_like(ids, step), "clip": torch.arange(len(ids))}
    return latents, {key: torch.cat([value, last[key]]) for key, value in rows.items()}


def rollout_of_ddim(policy, prompt_ids, starts, cfg, generator):
    """Reward-weighted regression: finished clips of plain DDIM, each from its own noise."""
    ids = prompt_ids.repeat_interleave(cfg.clips_per_prompt)
    latents = clap_ppo.sample(policy, ids, clap_ppo.randn(policy, len(ids), generator))
    return latents, {"latents": latents, "clip": torch.arange(len(ids)), "prompt_id": ids}


def regression_update(policy, optimizer, rows, cfg, done, generator):
    """Reward-weighted regression: the diffusion loss on own clips, weighted by exp(advantage).

    Each clip is noised to a random step of the sampler and the U-Net learns to predict the noise
    (Lee et al. 2023, arXiv 2302.12192, with the weights that DDPO, section 5, calls RWR).
    """
    parameters, count = optimizer.param_groups[0]["params"], len(rows["clip"])
    weights = rows["advantage"].exp() / rows["advantage"].exp().mean()
    log = dict.fromkeys(["loss", "approx_kl", "clip_fraction", "kl_base", "grad_norm"], 0.0)
    for _ in range(cfg.passes):
        for at in torch.randperm(count, generator=generator).chunk(cfg.updates_per_epoch):
            step = torch.randint(cfg.num_steps, (len(at),), generator=generator)
            noise = clap_ppo.randn(policy, len(at), generator)
            alpha_bar = policy.schedule.alpha_bar_t[step].view(-1, 1, 1, 1)
            noisy = alpha_bar.sqrt() * rows["latents"][at] + (1 - alpha_bar).sqrt() * noise
            condition = {k: v if v is None else v[rows["prompt_id"][at]]
                         for k, v in policy.condition.items()}
            predicted = clap_ppo.guided_prediction(policy.unet, noisy,
                                                   policy.schedule.timesteps[step], condition,
                                                   condition, 1)
            loss = ((predicted - noise).square().flatten(1).mean(dim=1) * weights[at]).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            log["grad_norm"], log["loss"] = max(log["grad_norm"], norm.item()), loss.item()
            done += 1
            warmup = min(1.0, done / max(1, cfg.warmup_updates))
            optimizer.param_groups[0]["lr"] = cfg.learning_rate * warmup
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {**log, "updates": done}


def all_weights(unet, rank):
    """In place of LoRA: every weight of the U-Net is trained; a copy stays as the base model."""
    unet.base = {k: v.clone() for k, v in unet.state_dict().items()}
    return [p.requires_grad_(True) for p in unet.parameters()]


def all_weights_state(unet):
    """In place of `adapter_state`: the whole U-Net's weights."""
    return {k: v.detach().clone() for k, v in unet.state_dict().items()}


@contextmanager
def all_weights_disabled(unet):
    """In place of `adapter_disabled`: the base model's weights, for a while."""
    tuned = all_weights_state(unet)
    unet.load_state_dict(unet.base)
    yield
    unet.load_state_dict(tuned)


rollout, denoise = clap_ppo.rollout, clap_ppo.denoise
gaussian_log_prob, group_advantages = clap_ppo.gaussian_log_prob, clap_ppo.group_advantages
SUM = dict(gaussian_log_prob=sum_log_prob, RATIO_TOLERANCE={torch.float32: 1e-2})
REGRESSION = dict(rollout=rollout_of_ddim, update=regression_update)
FULL = dict(add_lora=all_weights, adapter_state=all_weights_state,
            load_adapter_state=lambda unet, state: unet.load_state_dict(state),
            adapter_disabled=all_weights_disabled)
ATTENTION = dict(LORA_TARGETS=["to_q", "to_k", "to_v", "to_out.0"])


# ==== 2. The experiments =========================================================================

SHORT = "--epochs 12 --judge-every 0"                  # 1,536 clips; nothing is chosen by the judge
ALL = f"{SHORT} --noise-window all --noise-until 1"
DDPO = ("--epochs 6 --judge-every 0 --noise-window all --noise-until 1 --no-shared-noise "
        "--guidance-scale 5 --learning-rate 3e-4 --warmup-updates 0 --prompts-per-epoch 16 "
        "--passes 1 --updates-per-epoch 2 --clip-range 6.25e-6 --ema 0 --lora-rank 4")

# name: (what the README calls it, seeds, flags, replaced parts)
EXPERIMENTS: dict[str, tuple] = {
    "defaults": ("the defaults, whole run", 5, "", {}),
    "long": ("ten times as long", 1, "--epochs 550 --judge-every 25", {}),
    "wide": ("16 prompts x 8 clips, whole run", 1,
             "--prompts-per-epoch 16 --clips-per-prompt 8", {}),
    "short": ("**the defaults**", 3, SHORT, {}),
    "all-steps": ("noise in all 10 steps, 9 trained", 3, ALL, {}),
    "all-steps-5": ("... 5 random ones trained", 3, f"{ALL} --train-steps 5", {}),
    "all-steps-2": ("... 2 random ones trained", 3, f"{ALL} --train-steps 2", {}),
    "last-step": ("... 5 random ones, the last step among them", 3, f"{ALL} --train-steps 5",
                  dict(rollout=rollout_with_last_step)),
    "own-noise": ("each clip its own starting noise", 3, f"{SHORT} --no-shared-noise", {}),
    "ddpo": ("DDPO's published settings, 10 steps", 3, DDPO, ATTENTION),
    "regression": ("reward-weighted regression", 3, f"{SHORT} --passes 4 --updates-per-epoch 2",
                   REGRESSION),
    "regression-slow": ("... with a quarter of the learning rate", 3, f"{SHORT} --passes 4 "
                        "--updates-per-epoch 2 --learning-rate 5e-4", REGRESSION),
    "sum": ("sum of log-probs, clip range 0.2", 3, f"{SHORT} --clip-range 0.0125", SUM),
    "global": ("one mean and deviation for all prompts", 3, SHORT,
               dict(group_advantages=global_advantages)),
    "no-clipping": ("no clipping", 3, f"{SHORT} --clip-range 1", {}),
    "group-2": ("64 prompts x 2 clips", 3,
                f"{SHORT} --prompts-per-epoch 64 --clips-per-prompt 2", {}),
    "group-4": ("32 prompts x 4 clips", 3,
                f"{SHORT} --prompts-per-epoch 32 --clips-per-prompt 4", {}),
    "group-8": ("16 prompts x 8 clips", 3,
                f"{SHORT} --prompts-per-epoch 16 --clips-per-prompt 8", {}),
    "guidance": ("guidance 2 in rollout, training and evaluation", 3,
                 f"{SHORT} --guidance-scale 2", {}),
    "kl-0.01": ("KL weight 0.01", 3, f"{SHORT} --kl-weight 0.01", {}),
    "kl-0.1": ("KL weight 0.1", 3, f"{SHORT} --kl-weight 0.1", {}),
    "rank-1": ("LoRA rank 1", 3, f"{SHORT} --lora-rank 1", {}),
    "rank-4": ("LoRA rank 4", 3, f"{SHORT} --lora-rank 4", {}),
    "rank-16": ("LoRA rank 16", 3, f"{SHORT} --lora-rank 16", {}),
    "full": ("all weights, a tenth of the learning rate", 3, f"{SHORT} --learning-rate 2e-4", FULL),
}


# ==== 3. Running them ===========================================================================

def rounded(value):
    """A JSON value with its floats cut to 5 significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_row(row: dict) -> None:
    """One line at the end of the results, in one write, so that two processes do not mix theirs."""
    line = json.dumps(rounded(row)) + "\n"
    with open(RESULTS, "ab", buffering=0) as file:
        file.write(line.encode())


def read_rows() -> list[dict]:
    """All results so far, in the order in which the experiments stand above."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    order = [*EXPERIMENTS, "best-of-n", "bench", "cost"]
    return sorted(rows, key=lambda r: (order.index(r["name"]), r["seed"], r.get("n", 0),
                                       r.get("epoch", 0)))


def run_one(name: str, seed: int) -> None:
    """Train and evaluate, or go on with it, and add its rows; nothing if they are there already."""
    if finished(name, seed):
        return
    _, _, flags, parts = EXPERIMENTS[name]
    run = RUNS / f"{name}-{seed}"
    argv = ["--prompts", PROMPTS, "--seed", str(seed), "--out", str(run), *flags.split()]
    if not (run / "evaluation.json").exists():
        with ExitStack() as stack:
            for part, replacement in parts.items():
                stack.enter_context(mock.patch.object(clap_ppo, part, replacement))
            if name == "long":
                stack.enter_context(mock.patch.object(clap_ppo, "ask_judge", ask_held_out))
            if (run / "config.json").exists():
                argv = ["--resume", str(run)]
            print(f"\n=== {name}, seed {seed}: {' '.join(argv)}", flush=True)
            if clap_ppo.main(argv) != 0:             # such as: another process is working on it
                return
    try:
        with clap_ppo.locked(run):
            if not finished(name, seed):
                write_rows(name, seed, flags, run)
    except clap_ppo.UserError as error:
        print(error)


def finished(name: str, seed: int) -> bool:
    """Whether the results hold this run."""
    return any((r["name"], r["seed"]) == (name, seed) and "tuned" in r for r in read_rows())


def ranges(metrics: list[dict]) -> dict[str, list[float]]:
    """Smallest and largest value of each logged metric."""
    values = {k: [r[k] for r in metrics if k in r] for k in metrics[-1] if k != "held_out"}
    return {k: [min(v), max(v)] for k, v in values.items()}


def write_rows(name: str, seed: int, flags: str, run: Path) -> None:
    """The rows of a finished run: its evaluation, and what `ask_held_out` noted on the way."""
    cfg = json.loads((run / "config.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    since = 0
    for row in metrics:
        if "held_out" in row:
            rewards = [r["reward"] for r in metrics[since:row["epoch"]]]
            since = row["epoch"]
            write_row({"name": name, "seed": seed, "epoch": row["epoch"],
                       "rollout_reward": sum(rewards) / len(rewards),
                       "reward": row["monitor_reward"], "judge_score": row["judge_score"],
                       "held_out": row["held_out"]})
    write_row({"name": name, "seed": seed, "flags": flags,
               "clips": cfg["epochs"] * cfg["prompts_per_epoch"] * cfg["clips_per_prompt"],
               "seconds": sum(row["seconds"] for row in metrics), "ranges": ranges(metrics),
               **json.loads((run / "evaluation.json").read_text())})


def ask_held_out(world, adapter: dict) -> dict:
    """`ask_judge`, and in the row the figures of the held-out prompts, which choose nothing."""
    row = ask_judge(world, adapter)
    unet, current = world.policy.unet, clap_ppo.adapter_state(world.policy.unet)
    clap_ppo.load_adapter_state(unet, adapter)
    clips = clap_ppo.make_clips(world, world.held_out_ids, 4, world.cfg.seed + 999, "held out")
    clap_ppo.load_adapter_state(unet, current)
    held_out = clap_ppo.per_prompt_metrics(clips)
    return {**row, "held_out": {k: v.nanmean().item() for k, v in held_out.items()}}


ask_judge = clap_ppo.ask_judge


def best_of_n(most: int = 44) -> None:
    """The base model's best of n by the reward, n up to the reward calls that a whole run spends.

    55 epochs x 128 clips = 7,040 calls; for 40 prompts x 4 clips that is 44 calls per clip.
    """
    if any(r["name"] == "best-of-n" for r in read_rows()):
        return
    cfg, _ = clap_ppo.parse_args(["--prompts", PROMPTS])
    world = clap_ppo.load_world(cfg)
    clips = clap_ppo.make_clips(world, world.held_out_ids, 4 * most, 0, "best of n")
    for n in (1, 2, 4, 8, 16, most):
        groups = clap_ppo.Clips(*(x[:, :4 * n].unflatten(1, (4, n)).flatten(0, 1) for x in clips))
        best = (x.squeeze(1).unflatten(0, (-1, 4)) for x in clap_ppo.best_of(groups))
        figures = clap_ppo.per_prompt_metrics(clap_ppo.Clips(*best))
        write_row({"name": "best-of-n", "seed": 0, "n": n,
                   **{k: clap_ppo.bootstrap(v) for k, v in figures.items()}})


# ==== 4. The README's tables and figure ==========================================================

def spread(values: list[float], digits: int = 2, sign: str = "+") -> str:
    """Mean and 95 % t-interval over seeds as "mean ± half"; the mean alone of one seed."""
    from scipy import stats
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:{sign}.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def runs_of(rows: list[dict], name: str) -> list[dict]:
    """The finished runs of an experiment, by seed."""
    return [r for r in rows if r["name"] == name and "tuned" in r]


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |"
                     for cells in [head, ["---"] * len(head), *lines])


def seeds_table(rows: list[dict]) -> str:
    """The whole runs with the default settings, seed by seed, and their means."""
    runs = runs_of(rows, "defaults")
    columns = ["recognition", "judge_score", "reward", "diversity", "diversity_right"]

    def means(chosen):
        def mean(side, metric):
            return sum(r[side][metric]["value"] for r in chosen) / len(chosen)
        pairs = [f"{mean('base', c):.2f} → {mean('tuned', c):.2f}" for c in columns]
        return [*pairs, f"{mean('tuned_minus_base', 'loudness'):+.1f} dB",
                f"{mean('best_of_n', 'recognition'):.2f}"]

    def interval(cell, sign=""):
        return f"{cell['value']:{sign}.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"

    lines = [[str(r["seed"]), *means([r]), interval(r["tuned_minus_base"]["recognition"], "+"),
              interval(r["preference"])] for r in runs]
    lines.append(["mean", *means(runs), spread([gain(r, "recognition") for r in runs]),
                  spread([r["preference"]["value"] for r in runs], sign="")])
    return table(["seed", *(c.replace("_", " ") for c in columns[:4]), "of recognised clips",
                  "loudness", "base, best of 4", "gain in recognition", "preference"], lines)


def gain(run: dict, metric: str) -> float:
    """Tuned minus base."""
    return run["tuned_minus_base"][metric]["value"]


def ablation_table(rows: list[dict], names: list[str]) -> str:
    """What each change does to a short run: gains, and the difference to the defaults' gain."""
    reference = {r["seed"]: gain(r, "judge_score") for r in runs_of(rows, "short")}
    lines = []
    for name in names:
        runs = runs_of(rows, name)
        if not runs:
            continue
        against = [gain(r, "judge_score") - reference[r["seed"]] for r in runs]
        lines.append([EXPERIMENTS[name][0], spread([gain(r, "recognition") for r in runs]),
                      spread([gain(r, "judge_score") for r in runs]),
                      "" if name == "short" else spread(against),
                      spread([gain(r, "diversity") for r in runs]),
                      f"{sum(r['seconds'] for r in runs) / len(runs) / 60:.1f} min"])
    return table(["changed", "recognition", "judge score", "judge score against the defaults",
                  "diversity", "training"], lines)


def methods_table(rows: list[dict]) -> str:
    """One clip as it comes: of the base model, of its best of n by the reward, with guidance, and
    after PPO; with what it costs. Guidance: the base models of experiments that train with it."""
    steps = clap_ppo.Config().num_steps
    found = [("base" if r["n"] == 1 else f"base, best of {r['n']}", steps * r["n"], r)
             for r in rows if r["name"] == "best-of-n"]
    for name in ("guidance", "ddpo"):
        scale = re.search(r"--guidance-scale (\S+)", EXPERIMENTS[name][2])[1]
        found += [(f"base, guidance {scale}", 2 * steps, r["base"])
                  for r in runs_of(rows, name)[:1]]
    found += [(f"PPO, seed {r['seed']}", steps, r["tuned"]) for r in runs_of(rows, "defaults")]
    return table(["", "U-Net passes", "recognition", "judge score", "reward"], [
        [label, str(cost), *(f"{r[m]['value']:.2f} [{r[m]['low']:.2f}, {r[m]['high']:.2f}]"
                             for m in ("recognition", "judge_score", "reward"))]
        for label, cost, r in found])


def long_table(rows: list[dict], epochs=(25, 50, 75, 100, 150, 200, 250, 300, 400, 550)) -> str:
    """The run that goes on ten times as long: what reward and judge say on the way."""
    lines = []
    for r in (r for r in rows if r["name"] == "long" and r.get("epoch") in epochs):
        h = r["held_out"]
        lines.append([str(r["epoch"]), f"{r['rollout_reward']:.2f}", f"{r['reward']:.2f}",
                      f"{r['judge_score']:.2f}", f"{h['reward']:.2f}", f"{h['judge_score']:.2f}",
                      f"{h['recognition']:.2f}", f"{h['diversity']:.2f}",
                      f"{h['diversity_right']:.2f}", f"{h['loudness']:.1f} dB"])
    return table(["epoch", "reward of the rollouts", "of plain DDIM", "judge", "held out: reward",
                  "judge", "recognition", "diversity", "of recognised clips", "loudness"], lines)


def alarms(rows: list[dict]) -> list[int]:
    """Epochs of the long run at which `clap_ppo.keep_best` warns of over-optimisation."""
    best, found = None, []
    for r in (r for r in rows if r["name"] == "long" and "epoch" in r):
        if best is None or r["judge_score"] >= best["judge_score"]:
            best = r
        elif r["reward"] > best["reward"]:
            found.append(r["epoch"])
    return found


def metrics_table(rows: list[dict]) -> str:
    """What each logged metric means, and where it lay in the five whole runs."""
    found = [r["ranges"] for r in runs_of(rows, "defaults")]

    def span(key):
        low, high = min(r[key][0] for r in found), max(r[key][1] for r in found)
        return f"{low:.2g} to {high:.2g}"
    return table(["metric", "in the five runs", "what it is", "healthy"], [
        [f"`{key}`" + (f", `{short}`" if short else ""), span(key), meaning, healthy]
        for key, short, meaning, healthy in METRICS])


def bench_table(rows: list[dict]) -> str:
    """The rows that `samples/bench.py --save samples/results.jsonl` has added."""
    return table(["preset", "device", "micro-batch", "clips", "epoch", "epoch over the networks "
                  "alone", "peak memory", "flags"],
                 [[r["preset"], r["device"], str(r["micro_batch"]), str(r["clips"]),
                   f"{r['seconds']:.1f} s", f"{r['overhead']:.2f}", f"{r['peak_gib']:.1f} GiB",
                   f"`{r['flags']}`" if r["flags"] else "defaults"]
                  for r in rows if r["name"] == "bench"])


METRICS = [
    ("reward", "", "mean CLAP reward of the epoch's clips",
     "wobbles with the prompts drawn; its trend rises"),
    ("reward_spread", "spread", "standard deviation within a prompt's clips, mean over prompts",
     "clearly above 0: without it there is nothing to learn from"),
    ("loss", "", "the clipped surrogate, negative", "says nothing about progress"),
    ("approx_kl", "kl", "KL of the epoch's old policy and the new one, nats per latent element",
     "without a trend"),
    ("clip_fraction", "clipped", "share of rows whose ratio left the clip range",
     "some rows, never most"),
    ("kl_base", "", "KL to the base model, nats per element; with `--kl-weight` only",
     "levels off"),
    ("grad_norm", "grad", "largest gradient norm of the epoch's updates", "no jumps"),
    ("ratio_error", "", "largest distance of the ratio from 1 before the first update",
     "below the tolerance, or the run stops"),
    ("lr", "", "learning rate", "constant after the warm-up"),
    ("seconds", "", "wall time of the epoch", "constant, if nothing else runs"),
    ("judge_score", "judge", "what the judge says of the averaged adapter, on training prompts",
     "rises with the reward"),
    ("monitor_reward", "", "what the reward says of the same clips", "rises with the judge"),
]


def log_block() -> str:
    """What the run of samples/demo printed: beginning, last epoch, evaluation."""
    lines = (HERE / "demo/log.txt").read_text().splitlines()
    epochs = [i for i, line in enumerate(lines) if line.startswith("epoch ")]
    evaluation = range(lines.index(next(x for x in lines if x.startswith("held-out"))) - 1,
                       lines.index(next(x for x in lines if x.startswith("preference"))) + 1)
    kept = lines[:epochs[0] + 2] + ["..."] + [lines[i] for i in [epochs[-1], *evaluation]]
    return "\n".join(["```", *kept, "```"])


ABLATIONS = [name for name, value in EXPERIMENTS.items() if "--judge-every 0" in value[2]]


def blocks(rows: list[dict]) -> dict[str, str]:
    """The README's generated parts, by the name in their markers."""
    return {"log": log_block(), "seeds": seeds_table(rows), "methods": methods_table(rows),
            "ablations": ablation_table(rows, ABLATIONS), "long": long_table(rows),
            "metrics": metrics_table(rows), "bench": bench_table(rows)}


def fill(text: str, parts: dict[str, str]) -> str:
    """`text` with what stands between the lines <!-- NAME --> and <!-- /NAME --> replaced.

    Raises: ValueError if a pair of markers is missing.
    """
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        if not 0 <= text.find(begin) < text.find(end):
            raise ValueError(f"README.md: no lines {begin.strip()} and {end.strip()}")
        text = text[:text.find(begin)] + begin + part + "\n" + text[text.find(end):]
    return text


def point(text: str) -> str:
    """`text` with its links into clap_ppo.py at the lines where functions and sections begin."""
    script = (HERE.parent / "clap_ppo.py").read_text().splitlines()
    at = {}
    for number, line in enumerate(script, start=1):
        if found := re.match(r"(?:def|class) (\w+)", line):
            at[f"`{found[1]}`"] = number
        elif found := re.match(r"# ==== (\d+)\. ", line):
            at[f"section {found[1]}"] = number
    return re.sub(r"\[([^]]+)\]\(clap_ppo\.py#L\d+\)",
                  lambda m: f"[{m[1]}](clap_ppo.py#L{at.get(m[1], 1)})", text)


def report() -> None:
    """Puts tables and line numbers into README.md and draws samples/results.png."""
    rows, readme = read_rows(), HERE.parent / "README.md"
    readme.write_text(point(fill(readme.read_text(), blocks(rows))))
    draw(rows, HERE / "results.png")


def draw(rows: list[dict], path: Path) -> None:
    """Left: the gain of each short run. Right: the long run, reward against judge."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = [n for n in ABLATIONS if runs_of(rows, n)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6), layout="constrained",
                                         width_ratios=[3, 2])
    for y, name in enumerate(reversed(names)):
        values = [gain(r, "judge_score") for r in runs_of(rows, name)]
        left.plot(values, [y] * len(values), "o", color="C0", alpha=0.5)
        left.plot(sum(values) / len(values), y, "|", color="black", markersize=14)
    labels = [EXPERIMENTS[n][0].replace("*", "") for n in reversed(names)]
    left.set_yticks(range(len(names)), labels)
    left.axvline(0, color="grey", linewidth=0.8)
    left.set(xlabel="gain in judge score on held-out prompts: one dot per seed, their mean")
    long = [r for r in rows if r["name"] == "long" and "epoch" in r]
    epochs = [r["epoch"] for r in long]
    right.plot(epochs, [r["rollout_reward"] for r in long], "k--", label="reward of the rollouts")
    for metric in ("reward", "judge_score", "recognition", "diversity"):
        right.plot(epochs, [r["held_out"][metric] for r in long], label=f"held out: {metric}")
    for epoch in alarms(rows):
        right.axvline(epoch, color="C3", linewidth=0.8, linestyle=":")
    right.axvline(clap_ppo.Config().epochs, color="grey", linewidth=0.8)
    right.set(xlabel="epoch (grey: where a default run ends)", ylim=(0, 1.3))
    right.legend(loc="upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ==== 5. Command line ===========================================================================

def main(argv: list[str]) -> None:
    """Runs what is named; without a name, lists what there is and how much of it is done."""
    if not argv:
        done = [row["name"] for row in read_rows() if "tuned" in row]
        for name, (_, seeds, flags, parts) in EXPERIMENTS.items():
            print(f"{name:<16} {done.count(name)} of {seeds} seeds   {flags} "
                  f"{'with other ' + ', '.join(parts) if parts else ''}")
    elif argv == ["report"]:
        report()
    else:
        names = [*EXPERIMENTS, "best-of-n"] if argv == ["all"] else argv
        for name in names:
            if name not in {*EXPERIMENTS, "best-of-n"}:
                sys.exit(f"{name}: not one of all, report, {', '.join(EXPERIMENTS)}, best-of-n")
        for seed in range(5):                             # all experiments' first seeds come first
            for name in names:
                if name == "best-of-n":
                    best_of_n()
                elif seed < EXPERIMENTS[name][1]:
                    run_one(name, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
