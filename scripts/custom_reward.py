"""A reward of one's own, used in training (Diffusion-DPO on pairs that it chose) and in a grid. Copy and change it.

In other commands it is scripts/custom_reward.py:Warm. This takes minutes on a CPU, and can be stopped and run again.
"""

from diffalign.config import parse_args
from diffalign.evaluation.grid import GridConfig, run_grid
from diffalign.making.pairs import PairsConfig, run_pairs
from diffalign.rewards import Reward, register
from diffalign.trainers.dpo import DPOConfig, DPOTrainer


class Warm(Reward):
    """How much redder than blue a picture is, -1 to 1."""

    name, uses_prompt, differentiable = "warm", False, True

    def score(self, images, prompts, metadata):  # images (n, 3, H, W) in [0, 1]
        return (images[:, 0] - images[:, 2]).mean((1, 2))


if __name__ == "__main__":
    register("warm", Warm)
    few = "--rewards warm --max_prompts 128 --num_images_per_prompt 8 --output_dir runs/warm/pairs"
    run_pairs(parse_args(PairsConfig, ["--config", "shapes-pairs-making", *few.split()]))
    short = "--dataset_name runs/warm/pairs --max_train_steps 200 --output_dir runs/warm/dpo"
    DPOTrainer(parse_args(DPOConfig, ["--config", "shapes-dpo", *short.split()])).train()
    grid = "--models runs/warm/dpo --scorer warm --prompts_file shapes-heldout --output_dir runs/warm/grid"
    run_grid(parse_args(GridConfig, ["--pretrained_model_name_or_path", "shapes-sdxl", *grid.split()]))
