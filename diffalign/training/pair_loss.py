"""The core of every loss on preference pairs.

A pair gives four numbers: the denoising error of the policy on the chosen image (m_w) and on the rejected one (m_l),
and those of the reference (r_w, r_l). The images of a pair are noised with one noise to one timestep, and an error is
the mean of squares over the latent's elements, in float32. A method is a function of these numbers
(:meth:`PairTrainer.loss`); those few that need the predictions themselves find them in :class:`PairErrors` too.

A method that noises differently overrides :meth:`PairTrainer.noised`; one that measures errors in another space
overrides :meth:`PairTrainer.errors`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from diffalign.config import field
from diffalign.diffusion.error import per_sample_mse
from diffalign.errors import UserError
from diffalign.training.config import PairConfig
from diffalign.training.loop import Needs, Trainer
from diffalign.training.pairs import Captions, PairBatch, PairBatches, pair_batches


@dataclass(frozen=True)
class PairErrors:
    """What B pairs give a loss. Predictions hold the chosen halves first, then the rejected ones."""

    m_w: Tensor
    """Policy error on the chosen image, (B,), float32, with gradient."""
    m_l: Tensor
    """Policy error on the rejected image, (B,)."""
    r_w: Tensor | None
    """Reference error on the chosen image, (B,); None for methods without a reference."""
    r_l: Tensor | None
    label: Tensor
    """Probability that the chosen image is preferred, (B,) in [0.5, 1]."""
    policy: Tensor
    """The policy's predictions, (2B, C, h, w), in the dtype of the forward pass."""
    reference: Tensor | None
    """The reference's predictions, (2B, C, h, w)."""
    target: Tensor
    """What both should have predicted, (2B, C, h, w)."""

    @property
    def against_reference(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(m_w, m_l, r_w, r_l), for methods that asked for a reference."""
        assert self.r_w is not None and self.r_l is not None
        return self.m_w, self.m_l, self.r_w, self.r_l

    def swapped(self) -> PairErrors:
        """The same pairs with the other image preferred."""
        return PairErrors(
            m_w=self.m_l,
            m_l=self.m_w,
            r_w=self.r_l,
            r_l=self.r_w,
            label=1 - self.label,
            policy=_other_half_first(self.policy),
            reference=None if self.reference is None else _other_half_first(self.reference),
            target=_other_half_first(self.target),
        )

    def metrics(self) -> dict[str, Tensor]:
        """Scalars that say the same for every method, so that runs of different methods can be compared."""
        m_w, m_l = self.m_w.detach(), self.m_l.detach()
        report = {"chosen_error": m_w.mean(), "rejected_error": m_l.mean()}
        if self.r_w is None or self.r_l is None:
            return {"pair_accuracy": share_above_zero(m_l - m_w), **report}
        return {
            "implicit_accuracy": share_above_zero((self.r_w - m_w) - (self.r_l - m_l)),
            **report,
            "chosen_error_vs_reference": (m_w - self.r_w).mean(),
            "rejected_error_vs_reference": (m_l - self.r_l).mean(),
        }


def _other_half_first(values: Tensor) -> Tensor:
    return torch.cat(values.chunk(2)[::-1])


def share_above_zero(values: Tensor) -> Tensor:
    """Share of values above 0, a value of 0 counted as half; a scalar in [0, 1]."""
    return ((values > 0).float() + 0.5 * (values == 0).float()).mean()


def both_orders(loss: Callable[[PairErrors], Tensor], errors: PairErrors) -> Tensor:
    """The expected loss of each pair under its label: ``p L(w, l) + (1 - p) L(l, w)``, (B,).

    Args:
        loss: errors -> (B,), the loss where the chosen image is preferred for certain.
        errors: of the pairs, with p = ``errors.label``.
    """
    p = errors.label.to(errors.m_w.dtype)
    return p * loss(errors) + (1 - p) * loss(errors.swapped())


def safeguard_scale(residual_w: Tensor, residual_l: Tensor, mu: float, per_pair: bool = False) -> Tensor:
    """By how much to shrink the rejected image's gradient so that, to first order, the chosen error does not rise.

    Fu et al., "Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models", 2025, arXiv
    2511.03317. With g the gradient of the mean squared error with respect to the predictions, which is proportional to
    the residual,

        lambda = 1 where <g_w, g_l> <= 0, else clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1)

    Args:
        residual_w, residual_l: prediction minus target on the chosen and the rejected image, (B, C, h, w).
        mu: safety margin in [0, 1]; larger shrinks more. Published: 0.2 to 0.9, see docs/methods/loss-variants.md.
        per_pair: one lambda for each pair. The published form has one for the whole micro-batch of a process, so it
            depends on the batch size.

    Returns:
        lambda in [0, 1], without gradient: (B,) per pair, else a scalar.
    """
    w, losing = (
        residual.detach().flatten(1).to(torch.promote_types(residual.dtype, torch.float32))
        for residual in (residual_w, residual_l)
    )
    inner, own = (w * losing).mean(1), w.square().mean(1)
    if not per_pair:
        inner, own = inner.mean(), own.mean()
    scale = ((1 - mu) * own / (inner + 1e-9)).clamp(0, 1)
    return torch.where(inner <= 0, torch.ones_like(scale), scale)


@dataclass(kw_only=True)
class PairLossConfig(PairConfig):
    """What every loss on pairs can be told."""

    safeguard: Literal["none", "sdpo", "sdpo_per_pair"] = field(
        "none",
        help="Shrink the rejected image's gradient where it would worsen the chosen one's error (Diffusion-SDPO): one "
        "factor for a process's micro-batch, as published, or one for each pair.",
    )
    safeguard_mu: float = field(
        0.6, help="Margin of the safeguard in [0, 1]; larger is safer. Published with DPO: 0.9 (SD1.5), 0.6 (SDXL)."
    )

    two_pass_gradient: bool = field(
        False,
        help="For small cards: take the two images of a pair through the policy one after the other, and again in the "
        "backward pass. The same gradient, activations of one image instead of two, one forward pass more.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("safeguard_mu", 0 <= self.safeguard_mu <= 1, "in [0, 1]")
        if self.safeguard != "none" and self.ties == "keep":
            raise UserError(
                "safeguard protects the chosen image, and a tie has none: use ties drop, or safeguard none"
            )


PairLoss = TypeVar("PairLoss", bound=PairLossConfig)


class PairTrainer(Trainer[PairLoss, PairBatch]):
    """A method that learns from pairs: one forward pass of the policy on both images, one of the reference if needed.

    A subclass gives :meth:`loss`, and says in ``needs`` whether it has a reference.
    """

    needs: ClassVar[Needs] = Needs(reference=True, policy_passes=2)
    captions: ClassVar[Captions] = "prompt"
    """What each image is conditioned on: the pair's prompt, or a caption of its own."""
    batches: PairBatches

    @abstractmethod
    def loss(self, errors: PairErrors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each pair, (B,), and the method's own metrics (scalars) beside the shared ones."""

    def make_batches(self) -> PairBatches:
        return pair_batches(self.config, self.family, self.accelerator, captions=self.captions)

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The noised latents that both networks see and what they should predict, each (2B, C, h, w)."""
        process = self.family.noise_process
        x_t = process.add_noise(batch.latents, batch.noise, batch.timesteps)
        return x_t, process.target(batch.latents, batch.noise, batch.timesteps)

    def errors(self, batch: PairBatch) -> PairErrors:
        """Run the policy, and the reference before it where the method has one."""
        x_t, target = self.noised(batch)
        reference = r_w = r_l = None
        if self.needs.reference:
            with self.policy.reference() as network:
                reference = self._predict(batch, x_t, lambda run: run(network))
                r_w, r_l = per_sample_mse(reference, target).chunk(2)
        policy = self.policy
        recomputed = policy.recomputed if self.config.two_pass_gradient else lambda run: run(policy.denoiser)
        model_pred = self._predict(batch, x_t, recomputed)
        m_w, m_l = per_sample_mse(model_pred, target).chunk(2)
        return PairErrors(m_w, m_l, r_w, r_l, batch.label, model_pred, reference, target)

    def _predict(
        self, batch: PairBatch, x_t: Tensor, with_network: Callable[[Callable[[nn.Module], Tensor]], Tensor]
    ) -> Tensor:
        """Predictions on both images of each pair, (2B, C, h, w), the same way for policy and reference: rounding
        depends on how many images a network sees at once."""
        text, passes = batch.text(), 2 if self.config.two_pass_gradient else 1

        def predict(rows: slice, network: nn.Module) -> Tensor:
            own = {name: value[rows] for name, value in text.items()}
            return self.family.predict(network, x_t[rows], batch.timesteps[rows], own, batch.sizes[rows])

        size = len(x_t) // passes
        parts = [slice(first, first + size) for first in range(0, len(x_t), size)]
        return torch.cat([with_network(partial(predict, rows)) for rows in parts])

    def compute_loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        errors = self.errors(batch)
        report = errors.metrics()
        if self.config.safeguard != "none":
            errors, scale = self._safeguarded(errors)
            report["safeguard_lambda"] = scale.mean()
        losses, own = self.loss(errors)
        return losses.mean(), {**{name: value.detach() for name, value in own.items()}, **report}

    def _safeguarded(self, errors: PairErrors) -> tuple[PairErrors, Tensor]:
        """The errors with the rejected one's gradient shrunk; its value stays."""
        residual_w, residual_l = (errors.policy.detach().float() - errors.target).chunk(2)
        per_pair = self.config.safeguard == "sdpo_per_pair"
        scale = safeguard_scale(residual_w, residual_l, self.config.safeguard_mu, per_pair)
        fixed = errors.m_l.detach()
        return replace(errors, m_l=fixed + scale * (errors.m_l - fixed)), scale
