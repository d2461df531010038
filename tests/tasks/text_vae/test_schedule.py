"""The schedule of a step: the fall of word dropout, and what interventions make of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cdpvae.collapse import AdaptiveInterventionScheduler
from cdpvae.config import parse_settings
from cdpvae.tasks.text_vae.schedule import Schedule

STEP_BATCH = SimpleNamespace(epoch=0, target_divisor=10, row_divisor=None)


def dropped(steps, **loss):
    settings = parse_settings({"loss": {"beta_cycles": 1, **loss}})
    interventions = AdaptiveInterventionScheduler.of(settings)
    schedule = Schedule(settings, 100, interventions)
    return [schedule(step, STEP_BATCH).word_dropout for step in steps], interventions, schedule


def test_word_dropout_falls_linearly_to_its_setting():
    way, *_ = dropped(
        [0, 10, 20, 40, 99],
        word_dropout=0.2,
        word_dropout_start=1.0,
        word_dropout_fall_ratio=0.4,
    )
    assert way == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])


def test_without_a_start_it_stays():
    assert dropped([0, 50], word_dropout=0.3)[0] == [0.3, 0.3]


def test_what_an_intervention_moved_is_where_it_falls_to():
    _, interventions, schedule = dropped([], word_dropout=0.2, word_dropout_start=0.6)
    interventions.now["word_dropout"] = 0.1
    assert schedule(25, STEP_BATCH).word_dropout == pytest.approx(0.35)


def test_the_order_term_does_its_work_and_goes():
    settings = parse_settings(
        {
            "model": {"positional_slots": 4},
            "loss": {"beta_cycles": 1, "order_weight": 2.0, "order_fall_ratio": 0.5},
        }
    )
    schedule = Schedule(settings, 100, AdaptiveInterventionScheduler.of(settings))
    weights = [schedule(step, STEP_BATCH).weights["order"] for step in (0, 25, 50, 99)]
    assert weights == pytest.approx([2.0, 1.0, 0.0, 0.0])
