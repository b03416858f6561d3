#!/usr/bin/env python
"""What few steps cost and what a reward in the distillation buys, on the shapes world, held-out prompts, several runs.

    python benchmarks/shapes_distil.py --out benchmarks/results/shapes_distil.json

Students: ``lcd`` (recipe shapes-lcd), ``rg_lcd`` (shapes-rg_lcd: the reward through the decoder), ``rg_lcd-proxy``
(by the latent proxy), and ``rg_lcd-checker``, whose proxy learns the checker, a reward without a gradient. Each is
trained with every seed in a process of its own and drawn in 1, 2, 4 and 8 steps by plain diffusers, LCMScheduler,
without guidance: from timestep 999, as it does by itself, and from 799 (strength 0.8), where an error of the network
counts 26 times in the predicted image and not 157 times (5 and 15 on SDXL's schedule). The teacher is drawn in 25 and
50 steps of its own scheduler with the guidance in the middle of what is distilled. All draw the same prompts with the
same seeds. A record holds mean reward and scores, the win rate by the simulated annotators against the teacher at 50
steps and against plain LCD of the same seed, steps and start, the diversity of several images a prompt, and the power
spectrum. Wall time is that of the teacher's and a student's steps taken in turns, in the end. A record that is there
is kept; a student that is trained already (``--runs``) is not trained again; ``--again`` repeats both.
``python benchmarks/render_results.py`` makes a table of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign.app import console
from diffalign.assets import resolve
from diffalign.config import from_dict, load_yaml
from diffalign.evaluation.draw import iterate_images
from diffalign.evaluation.shapes import Judgement, heldout_prompts, judge
from diffalign.evaluation.spectrum import fine_power, radial_power
from diffalign.evaluation.stats import win_rate
from diffalign.pipelines import load_family
from diffalign.pipelines.schedulers import make_scheduler
from diffalign.recipes import find
from diffalign.rewards import load_reward
from diffalign.shapes import scene
from diffalign.trainers.lcd import LCDConfig
from diffalign.training.scoring import within_group_distance

BASE, REWARD = "shapes-sdxl", "shapes-clip"
STUDENTS: dict[str, tuple[str, list[str]]] = {
    "lcd": ("shapes-lcd", []),
    "rg_lcd": ("shapes-rg_lcd", []),
    "rg_lcd-proxy": ("shapes-rg_lcd-proxy", []),
    # Its unit is a share of facts, a tenth of a logit: so is beta's.
    "rg_lcd-checker": (
        "shapes-rg_lcd-proxy",
        ["--rewards", "shapes-checker", "--expert_scale", "10", "--reward_scale", "0.5"],
    ),
}
PLAIN = "lcd"
STUDENT_STEPS, TEACHER_STEPS = (1, 2, 4, 8), (25, 50)
STRENGTHS = (1.0, 0.8)
"""Where students start, as shares of all timesteps."""
BATCH = 32
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the records are added to")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="held-out prompts, one image each")
    parser.add_argument("--diverse", type=int, nargs=2, default=(64, 8), metavar=("PROMPTS", "IMAGES"))
    parser.add_argument("--rounds", type=int, default=9, help="turns of the timing")
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes_distil"), help="folder of the training runs")
    parser.add_argument("--train", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of all trainings")
    parser.add_argument("--again", action="store_true", help="repeat what is there")
    args = parser.parse_args()
    console.set_up()

    bench = Bench(args)
    for steps in TEACHER_STEPS[::-1]:
        bench.measure("teacher", None, steps)
    for student in args.students:
        for seed in args.seeds:
            for strength, steps in product(STRENGTHS, STUDENT_STEPS):
                bench.measure(student, seed, steps, strength)
    bench.references()
    bench.timing()


class Bench:
    """The file, the prompts, and what has been read so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.out
        self.trained: set[tuple[str, int]] = set()
        self.result: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"records": []}
        recipe = load_yaml(find("shapes-lcd"))
        distilled = from_dict(LCDConfig, recipe, "shapes-lcd")
        self.guidance = distilled.middle_guidance_scale
        # The sampler's grid must be the solver's, or it stops at timesteps that nothing was learnt at.
        self.sampler = {
            "original_inference_steps": distilled.num_ddim_timesteps,
            "timestep_scaling": distilled.timestep_scaling_factor,
        }
        self.prompts = heldout_prompts(args.images)
        self.reward = load_reward(REWARD)
        self.result |= {
            "images": len(self.prompts),
            "diverse": list(args.diverse),
            "teacher_guidance": self.guidance,
            "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
            "versions": {name: version(name) for name in LIBRARIES},
        }

    def record(self, *key: Any) -> dict[str, Any] | None:
        """The record of this name, seed, steps and strength, if it is there."""
        return next((r for r in self.result["records"] if key_of(r) == key), None)

    def measure(self, name: str, seed: int | None, steps: int, strength: float = 1.0) -> None:
        """Draw one model in so many steps, judge, and add the record."""
        key = (name, seed, steps, strength)
        if self.record(*key) and not self.args.again:
            print(f"{name} seed {seed} in {steps} steps, strength {strength:g}: has a record")
            return
        lora, facts = (None, {}) if seed is None else self.train(name, seed)
        pipe, guidance = self.pipeline(lora, strength)
        images = draw(pipe, self.prompts, range(len(self.prompts)), steps, guidance)
        judged = judge(images, self.prompts)
        record = {"name": name, "seed": seed, "steps": steps, "strength": strength}
        record |= self.scores(images, judged) | facts
        record["diversity"] = self.diversity(pipe, steps, guidance)
        if name == "teacher":
            record["utilities"] = [round(float(u), 5) for u in judged.annotator]
        else:
            teacher = self.record("teacher", None, TEACHER_STEPS[-1], 1.0)
            assert teacher is not None
            rate = win_rate(judged.annotator, np.array(teacher["utilities"]))
            record["win_rate"] = [round(x, 4) for x in (rate.rate, rate.low, rate.high)]
            record |= self.against_plain(*key, judged.annotator)
        kept = [r for r in self.result["records"] if key_of(r) != key]
        self.result["records"] = [*kept, record]
        self.write()
        print(
            json.dumps(
                {k: record[k] for k in ("name", "seed", "steps", "strength", "reward", "checker") if k in record}
            )
        )

    def against_plain(
        self, name: str, seed: int | None, steps: int, strength: float, utilities: np.ndarray
    ) -> dict[str, Any]:
        """The win rate of a student with a reward against the one without, drawn alike, if that was drawn."""
        file = f"utilities-{steps}-{strength:g}.json"
        own, plain = (self.args.runs / f"{n}-{seed}" / file for n in (name, PLAIN))
        own.write_text(json.dumps(utilities.tolist()))
        if name == PLAIN or not plain.is_file():
            return {}
        rate = win_rate(utilities, np.array(json.loads(plain.read_text())))
        return {"win_rate_plain": [round(x, 4) for x in (rate.rate, rate.low, rate.high)]}

    def pipeline(self, lora: Path | None, strength: float = 1.0) -> tuple[DiffusionPipeline, float]:
        """The teacher with its guidance, or a student with LCM's sampler and none."""
        pipe = DiffusionPipeline.from_pretrained(resolve(BASE))
        if lora is None:
            return pipe, self.guidance
        pipe.scheduler = make_scheduler(f"lcm:strength={strength:g}", pipe.scheduler.config, **self.sampler)
        pipe.load_lora_weights(str(lora))
        pipe.fuse_lora()
        return pipe, 1.0

    def train(self, name: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The folder of a trained student, and what its training took."""
        run = self.args.runs / f"{name}-{seed}"
        done = run / "training.json"
        if not done.is_file() or (self.args.again and (name, seed) not in self.trained):
            recipe, own = STUDENTS[name]
            command = [sys.executable, "-m", "diffalign", "train", "--config", recipe, "--seed", str(seed)]
            changed = [word for setting in self.args.train for word in flag(setting)]
            command += ["--output_dir", str(run), "--overwrite_output_dir", *own, *changed]
            start = time.monotonic()
            # wait4 tells of this process alone; getrusage would give the largest of all that ran before.
            _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
            if code := os.waitstatus_to_exitcode(status):
                raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            facts = {
                "train_seconds": round(time.monotonic() - start, 1),
                "step_seconds": round(float(np.median([row["step_seconds"] for row in rows])), 4),
                "train_steps": len(rows),
                "peak_memory_mib": round(usage.ru_maxrss / 1024),
                "train_command": "diffalign " + " ".join(command[3:]),
            }
            if "proxy_accuracy" in rows[-1]:
                for part, chosen in (("first", rows[:20]), ("last", rows[-20:])):
                    known = [row["proxy_accuracy"] for row in chosen if "proxy_accuracy" in row]
                    facts[f"proxy_accuracy_{part}"] = round(float(np.mean(known)), 4)
            done.write_text(json.dumps(facts))
            self.trained.add((name, seed))
        return run, json.loads(done.read_text())

    def scores(self, images: Sequence[Image.Image], judged: Judgement) -> dict[str, Any]:
        """Mean scores of images of the held-out prompts, and their power."""
        pixels = as_tensor(images)
        middles, power = radial_power(pixels)
        return {
            "reward": round(float(self.reward(pixels, self.prompts).rewards.mean()), 4),
            "checker": round(float(judged.checker.mean()), 4),
            "annotator": round(float(judged.annotator.mean()), 4),
            "fine_power": float(f"{fine_power(middles, power).mean():.4g}"),
            "spectrum": [float(f"{value:.4g}") for value in power.mean(0)],
        }

    def diversity(self, pipe: DiffusionPipeline, steps: int, guidance: float) -> float:
        """Root mean squared distance of 16-pixel thumbnails to the others of their prompt, averaged."""
        count, each = self.args.diverse
        prompts = [prompt for prompt in self.prompts[:count] for _ in range(each)]
        images = draw(pipe, prompts, range(len(self.prompts), len(self.prompts) + len(prompts)), steps, guidance)
        small = torch.nn.functional.interpolate(as_tensor(images), size=(16, 16), mode="area").flatten(1)
        groups = torch.arange(len(prompts)) // each
        return round(float(within_group_distance(small, groups).mean()), 5)

    def references(self) -> None:
        """Scores and power of true pictures of the prompts, as they are and through the VAE."""
        if "references" in self.result and not self.args.again:
            return
        rng = np.random.default_rng(0)
        true = [scene.render(scene.complete(scene.parse(prompt), rng)) for prompt in self.prompts]
        family = load_family(BASE)
        decoded = family.decode_latents(family.encode_images(as_tensor(true), chunk=BATCH), chunk=BATCH)
        passed = [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in decoded]
        self.result["references"] = {
            name: self.scores(images, judge(images, self.prompts))
            for name, images in (("renderings", true), ("renderings through the VAE", passed))
        }
        self.result["frequencies"] = [round(float(f), 6) for f in radial_power(as_tensor(true[:1]))[0]]
        self.write()

    def timing(self) -> None:
        """Wall time an image of each sampler, in seconds: all of them in turns, medians over the rounds."""
        if "seconds" in self.result and not self.args.again:
            return
        teacher, guidance = self.pipeline(None)
        student = DiffusionPipeline.from_pretrained(resolve(BASE))
        # A LoRA that is folded into the weights costs nothing, so any student takes the base model's time.
        student.scheduler = make_scheduler("lcm", student.scheduler.config, **self.sampler)
        ways = {f"teacher {n}": (teacher, n, guidance) for n in TEACHER_STEPS}
        ways |= {f"student {n}": (student, n, 1.0) for n in STUDENT_STEPS}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(self.args.rounds + 1):
            for name, (pipe, steps, scale) in ways.items():
                start = time.perf_counter()
                draw(pipe, self.prompts[:BATCH], range(len(self.prompts[:BATCH])), steps, scale)
                if turn:  # The first turn warms up.
                    taken[name].append((time.perf_counter() - start) / len(self.prompts[:BATCH]))
        self.result["seconds"] = {name: float(f"{np.median(values):.4g}") for name, values in taken.items()}
        self.write()

    def write(self) -> None:
        """Write the result; the file is complete or as it was."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.result, indent=1) + "\n")
        os.replace(aside, self.path)


def key_of(record: dict[str, Any]) -> tuple[str, int | None, int, float]:
    """What tells records apart."""
    return record["name"], record["seed"], record["steps"], record["strength"]


def draw(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
) -> list[Image.Image]:
    """Images through plain diffusers."""
    return list(
        iterate_images(pipe, prompts, seeds, num_inference_steps=steps, guidance_scale=guidance, batch_size=BATCH)
    )


def as_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def flag(setting: str) -> list[str]:
    """name=value as words of the command line."""
    name, _, value = setting.partition("=")
    return [f"--{name}", value]


if __name__ == "__main__":
    main()
