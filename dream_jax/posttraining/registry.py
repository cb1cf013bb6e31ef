"""The objectives by name. Only an objective whose code is complete has a name here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from dream_jax.posttraining.base import Objective
from dream_jax.posttraining.grpo import GroupRelative
from dream_jax.posttraining.preference_settings import PreferenceSettings
from dream_jax.posttraining.preferences import Preference
from dream_jax.posttraining.reward_settings import RewardSettings
from dream_jax.posttraining.supervised import Supervised

ObjectiveName = Literal["sft", "vrpo", "simpo", "grpo"]
"""The values of --objective. The keys of `OBJECTIVES` are the same."""

Groups = tuple[PreferenceSettings, RewardSettings]
"""The groups of settings that only some objectives read."""


class ObjectiveEntry(NamedTuple):
    """How an objective is made.

    make: makes the objective from the groups of settings; raises ValueError if values of them do not fit together.
    reads: the groups that the objective reads.
    """

    make: Callable[[PreferenceSettings, RewardSettings], Objective]
    reads: tuple[type[PreferenceSettings] | type[RewardSettings], ...] = ()


OBJECTIVES: Mapping[str, ObjectiveEntry] = {
    "sft": ObjectiveEntry(lambda _preferences, _rewards: Supervised()),
    "grpo": ObjectiveEntry(lambda _preferences, rewards: GroupRelative(rewards), (RewardSettings,)),
    "vrpo": ObjectiveEntry(lambda preferences, _rewards: Preference("vrpo", preferences), (PreferenceSettings,)),
    "simpo": ObjectiveEntry(lambda preferences, _rewards: Preference("simpo", preferences), (PreferenceSettings,)),
}
"""For each name of an objective, how it is made."""


def make_objective(name: str, preferences: PreferenceSettings, rewards: RewardSettings) -> Objective:
    """Returns the objective of a run.

    Raises:
      ValueError: there is no objective of this name, or its settings do not fit together.
    """
    return _entry(name).make(preferences, rewards)


def check_groups(name: str, preferences: PreferenceSettings, rewards: RewardSettings) -> None:
    """Raises ValueError if a setting has a value that is not its default, and the objective does not read its group."""
    reads = _entry(name).reads
    for group in (preferences, rewards):
        if type(group) in reads:
            continue
        given = [one.name for one in dataclasses.fields(group) if getattr(group, one.name) != one.default]
        if given:
            readers = [other for other, entry in OBJECTIVES.items() if type(group) in entry.reads]
            flags = ", ".join(f"--{one.replace('_', '-')}" for one in given)
            raise ValueError(
                f"{flags} has no effect with --objective {name}: leave it out, or give --objective {' or '.join(readers)}"
            )


def _entry(name: str) -> ObjectiveEntry:
    if name not in OBJECTIVES:
        raise ValueError(f"objective={name!r:.40} is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
