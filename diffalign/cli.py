"""The ``diffalign`` command. Nothing heavy is imported before it is known what is asked for."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from diffalign import __version__
from diffalign.errors import DiffalignError, UserError, did_you_mean

COMMANDS = {
    "demo": ("diffalign.app.demo:main", "align the bundled model on the bundled pairs, with a report at the end"),
    "train": ("diffalign.app.train:main", "fine-tune a model with a method: diffalign train dpo --config FILE"),
    "estimate": ("diffalign.app.estimate:main", "predict memory and time of a run for a card, before it is loaded"),
    "train-reward": ("diffalign.app.train_reward:main", "train a reward model of your own on preference pairs"),
    "sample": ("diffalign.app.evaluate:sample", "draw images of one model for a list of prompts"),
    "grid": ("diffalign.app.evaluate:grid", "compare models side by side: rows are prompts, columns models"),
    "label": ("diffalign.app.label:main", "choose between images on a local page; votes become pairs to train on"),
    "eval": ("diffalign.app.evaluate:evaluate", "draw, score and compare models; ends with a report"),
    "compare-rewards": ("diffalign.app.evaluate:compare_rewards", "agreement of rewards with choices and each other"),
    "captions": ("diffalign.app.captions:main", "make a caption for each image of the pairs of a set (for DCPO)"),
    "pairs": ("diffalign.app.pairs:main", "make preference pairs of a model's own samples, chosen by rewards"),
    "difficulty": ("diffalign.app.difficulty:main", "sort pairs from easy to hard and keep the easy ones"),
    "iterate": ("diffalign.app.iterate:main", "rounds of drawing, scoring and training, each on the last one's model"),
    "rewards": ("diffalign.app.rewards:main", "list the rewards, and show what each measures and how it is hacked"),
    "score": ("diffalign.app.score:main", "score images by rewards, to JSONL or CSV"),
    "serve-reward": ("diffalign.app.serve_reward:main", "serve rewards over HTTP to runs elsewhere"),
    "doctor": ("diffalign.app.doctor:main", "tell what is installed, what works and what would break"),
    "recipes": ("diffalign.app.recipes:main", "list, show and copy the configs that come with diffalign"),
}
"""Name -> (module:function that takes the words after the name and returns the exit code, what it does)."""


_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def usage() -> str:
    """Return the text of ``diffalign --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: diffalign COMMAND ...",
            "",
            "Align text-to-image diffusion models with what people prefer.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  --help    show this text; after a command, its own: diffalign grid --help",
            "  --version show the version",
            "  --debug   show the traceback of an error (also: DIFFALIGN_DEBUG=1)",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 something to put right, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in words:
        words.remove("--debug")
        os.environ["DIFFALIGN_DEBUG"] = "1"
    return guard(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, *rest = words
    if name in ("--version", "-V"):
        print(f"diffalign {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f" Commands: {', '.join(COMMANDS)}."
        raise UserError(f"there is no command {name!r}.{hint}")
    module, _, function = COMMANDS[name][0].partition(":")
    code: int = getattr(importlib.import_module(module), function)(rest)
    return code


def guard(function: Callable[[], int | None]) -> int:
    """Run a function and turn the errors a user can put right into one line on stderr and an exit code.

    For scripts: ``sys.exit(guard(main))``. With DIFFALIGN_DEBUG=1 the traceback is shown.
    """
    try:
        code = function() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("diffalign: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; what Python would still flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DiffalignError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in _DISK_FULL
        if os.environ.get("DIFFALIGN_DEBUG", "0") not in ("", "0") or not (full or isinstance(error, DiffalignError)):
            raise
        text = (
            f"no space left on the disk of {getattr(error, 'filename', None) or 'the output'}" if full else str(error)
        )
        print(f"diffalign: error: {text}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
