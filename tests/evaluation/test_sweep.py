"""Which models are drawn, each at which settings."""

from __future__ import annotations

from diffalign.evaluation.sweep import SweepConfig


def test_a_student_is_swept_over_steps_by_its_own_sampler_beside_a_teacher_that_is_not() -> None:
    config = SweepConfig(
        pretrained_model_name_or_path="m",
        output_dir="o",
        models=[
            "{model: base, name: teacher, steps: 25, guidance: 5}",
            {"model": "base", "name": "student", "scheduler": "lcm", "guidance": 1},
        ],
        steps=[1, 2, 4, 8],
    )
    variants = config.variants()
    drawn = [(spec.steps, spec.guidance, spec.scheduler) for spec in variants.values()]
    assert drawn == [(25, 5.0, None), *((count, 1.0, "lcm") for count in (1, 2, 4, 8))]
    assert len({spec.name for spec in variants.values()}) == 5
