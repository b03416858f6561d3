"""Opening the folder of a run: a new one, one to go on with, or a clear refusal."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from accelerate import Accelerator

from diffalign.config import load_yaml, save_yaml, to_dict
from diffalign.errors import UserError
from diffalign.training.checkpoints import find_checkpoints, resolve_checkpoint, space_errors
from diffalign.training.config import RunConfig
from diffalign.training.run_log import METRICS_FILE

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_WHAT_A_RUN_WRITES = (
    CONFIG_FILE,
    METRICS_FILE,
    "heldout.jsonl",
    "best",
    "README.md",
    "samples",
    "logs",
    "unet",
    "checkpoint-*",
    ".checkpoint-*",
    ".processes",
    "pytorch_lora_weights.safetensors",
    "*_comfyui.safetensors",
    # Of a reward model.
    "best-*.safetensors",
    "report.json",
    "reward.json",
    "head.safetensors",
    "model.safetensors",
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_MAY_CHANGE_ON_RESUME = {
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "max_train_steps",
    "report_to",
    "process_timeout",
    "check_first",
    "dry_run",
}


def open_run_folder(config: RunConfig, output_dir: Path, accelerator: Accelerator) -> Path | None:
    """Make the run's folder ready and write its ``config.yaml``.

    Returns:
        The checkpoint to resume from, or None for a run that starts at step 0.

    Raises:
        UserError: the folder holds another run and neither resuming nor overwriting was asked for, or it cannot be
            written.
    """
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = resolve_checkpoint(output_dir, config.resume_from_checkpoint)
        if checkpoint is None:
            logger.warning("no checkpoint in %s yet: starting at step 0", output_dir)
        _say_what_changed(config, output_dir)
    elif _holds_a_run(output_dir) and not config.overwrite_output_dir:
        newest = [path.name for path in find_checkpoints(output_dir)][-1:]
        raise UserError(
            f"output_dir {output_dir} holds another run (newest checkpoint: {newest[0] if newest else 'none'}). "
            "Go on with it by --resume_from_checkpoint latest, choose another --output_dir, or delete its results "
            "with --overwrite_output_dir."
        )
    if accelerator.is_main_process:
        _prepare(config, output_dir)
    accelerator.wait_for_everyone()
    return checkpoint


def _prepare(config: RunConfig, output_dir: Path) -> None:
    if config.overwrite_output_dir and not config.resume_from_checkpoint:
        for pattern in _WHAT_A_RUN_WRITES:
            for path in output_dir.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with space_errors(output_dir):
            save_yaml(config, output_dir / CONFIG_FILE)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"output_dir {output_dir} cannot be written: {error}. Choose another --output_dir.") from error


def _holds_a_run(output_dir: Path) -> bool:
    return (output_dir / METRICS_FILE).exists() or bool(find_checkpoints(output_dir))


def _say_what_changed(config: RunConfig, output_dir: Path) -> None:
    path = output_dir / CONFIG_FILE
    if not path.exists():
        return
    before, now = load_yaml(path), to_dict(config)
    for name in now.keys() - _MAY_CHANGE_ON_RESUME:
        if name in before and before[name] != now[name]:
            logger.warning("resuming with %s = %r where the run had %r", name, now[name], before[name])
