"""Makes samples/demo from a finished run of the bundled model: its figures, its page, a few clips.

    python clap_ppo.py --prompts samples/prompts.txt | tee log.txt
    python samples/make_demo.py runs/toy-1 log.txt

The page shows 12 of the run's held-out prompts and, from the same adapter, the six prompts that the
method was published with: in the toy's voice, so they show what PPO changed here and nothing about
the published model. Clips become MP3 to keep the repository small.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import soundfile
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clap_ppo  # noqa: E402


def published_rows(run: Path, folder: Path, cfg: clap_ppo.Config) -> list[dict]:
    """Rows of the page for the six published prompts, clips written to `folder`/clips."""
    cfg = replace(cfg, eval_prompts=str(HERE / "published_prompts.txt"))
    world = clap_ppo.load_world(cfg)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    clap_ppo.load_adapter_state(world.policy.unet, (state["best"] or state)["adapter"])
    settings = world.held_out_ids, 1, cfg.seed + 999, "published prompts"
    tuned = clap_ppo.make_clips(world, *settings)
    with clap_ppo.adapter_disabled(world.policy.unet):
        base = clap_ppo.make_clips(world, *settings)
    prompts = world.prompts[len(world.train_ids):]
    rows = clap_ppo.save_clips(folder, base, tuned, prompts, world.sample_rate)
    note = "one of the method's six published prompts, in the toy's voice"
    return [{**row, "note": note} for row in rows]


def main(run: Path, log: Path, demo: Path = HERE / "demo") -> None:
    """Replaces `demo` by what is worth keeping of `run` and by what it printed."""
    cfg = clap_ppo.Config(**json.loads((run / "config.json").read_text()))
    text = (run / "data.js").read_text()
    data = json.loads(text.removeprefix("window.CLAP_PPO_RUN = ").removesuffix(";\n"))
    shutil.rmtree(demo, ignore_errors=True)
    demo.mkdir()
    shutil.copy(log, demo / "log.txt")
    held_out = data["rows"][::max(1, len(data["rows"]) // 12)][:12]
    data["rows"] = published_rows(run, demo, cfg) + held_out
    for row in data["rows"]:
        for side in ("base", "tuned"):
            source = demo / row[side]["file"]
            waveform, rate = soundfile.read(source if source.exists() else run / row[side]["file"])
            source.unlink(missing_ok=True)
            row[side]["file"] = str(Path(row[side]["file"]).with_suffix(".mp3"))
            soundfile.write(demo / row[side]["file"], waveform, rate)
    data["name"], data["id"] = "the bundled model", "demo-" + data["id"]
    data["about"] += (" Sounds and models are small and synthetic: the page shows what PPO changed "
                      "in this toy, not how a real model sounds.")
    (demo / "data.js").write_text(f"window.CLAP_PPO_RUN = {json.dumps(data)};\n")
    for name in ("config.json", "metrics.jsonl", "evaluation.json", "curve.png", "index.html"):
        shutil.copy(run / name, demo / name)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1], "evaluation.json").is_file():
        sys.exit("usage: python samples/make_demo.py RUN LOG, a finished run and its output")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
