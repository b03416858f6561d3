#!/usr/bin/env python
"""What processes exchange in a step, and how much of a step's time that may take: the tables of docs/scaling.md.

    python scripts/communication.py

Nothing is measured here. Bytes follow from the numbers that train; times assume that a link carries its bandwidth and
that nothing overlaps, so real steps lose less.
"""

from __future__ import annotations

from diffalign.estimation.tracing import networks
from diffalign.estimation.work import Model

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CARDS = 8
LINKS = {
    "NVLink, H100 (450 GB/s)": 450e9,
    "PCIe 4.0 x16 (32 GB/s)": 32e9,
    "100 Gbit/s network": 12.5e9,
    "10 Gbit/s network": 1.25e9,
}
"""Bandwidth of one card, each way."""
STEPS = {
    "LoRA r 8, DDP": 16.6,
    "LoRA r 64, DDP": 11.5,
    "all, DDP": 14.5,
    "all, ZeRO-2": 13.8,
    "all, FSDP2": 13.8,
}
"""Seconds of a step by `diffalign estimate`: sdxl-dpo-1x24gb on an RTX 4090, then sdxl-dpo-1x80gb on an H100, the last
three with --train_mode full --no_save_comfyui_lora --gradient_checkpointing."""


def exchanged(numbers: int, kind: str, cards: int, micro_batches: int) -> float:
    """Bytes that a card sends in a step of Diffusion-DPO.

    Args:
        numbers: that train.
        kind: "DDP": gradients in float32 are added up once a step, by a ring, each part going round twice. "FSDP2":
            weights in bfloat16 come together for the reference, for the forward and for the backward pass of each
            micro-batch, and gradients in float32 are added up and shared out. "ZeRO-2": the same but for the backward
            pass.
        cards: n; a ring moves (n - 1) / n of a tensor.
        micro_batches: of a step.
    """
    ring = (cards - 1) / cards
    if kind == "DDP":
        return 2 * ring * 4 * numbers
    gathers = 3 if kind == "FSDP2" else 2
    return micro_batches * ring * numbers * (2 * gathers + 4)


def main() -> None:
    sizes = {rank: networks(Model(SDXL, rank=rank)).trained for rank in (8, 64)}
    sizes[0] = networks(Model(SDXL, full=True)).trained
    rows = {
        "LoRA r 8, DDP": exchanged(sizes[8], "DDP", CARDS, 16),
        "LoRA r 64, DDP": exchanged(sizes[64], "DDP", CARDS, 32),
        "all, DDP": exchanged(sizes[0], "DDP", CARDS, 32),
        "all, ZeRO-2": exchanged(sizes[0], "ZeRO-2", CARDS, 32),
        "all, FSDP2": exchanged(sizes[0], "FSDP2", CARDS, 32),
    }
    print(f"| SDXL, {CARDS} cards | GB sent a step | " + " | ".join(LINKS) + " |")
    print("|" + "---|" * (2 + len(LINKS)))
    for name, size in rows.items():
        cells = []
        for bandwidth in LINKS.values():
            seconds = size / bandwidth
            cells.append(f"{seconds:.3g} s, {STEPS[name] / (STEPS[name] + seconds):.0%}")
        print(f"| {name} | {size / 1e9:.3g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
