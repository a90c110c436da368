"""Controls: a group is sampled with what was made of another group's references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...errors import EasyRefError
from ..groups import GroupPicture
from ..trials import Trial, Variant


class OtherGroups:
    """The references of the next group for each group of each variant; the last one gets those of
    the first.

    Args:
        trials: all of one method in the run, those of other processes included.

    Raises:
        EasyRefError: there is only one group.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        groups: dict[Variant, dict[str, tuple[GroupPicture, ...]]] = {}
        for trial in trials:
            groups.setdefault(trial.variant, {}).setdefault(trial.group, trial.references)
        self._references: dict[tuple[Variant, str], tuple[GroupPicture, ...]] = {}
        for variant, by_name in groups.items():
            names = list(by_name)
            if len(names) < 2:
                raise EasyRefError(
                    f"{variant.method} samples a group with the references of another one, but "
                    f"there is only the group {names[0]!r}. Add groups, or leave "
                    f"{variant.method} out."
                )
            for name, other in zip(names, [*names[1:], names[0]], strict=True):
                self._references[variant, name] = by_name[other]

    def swapped(self, trial: Trial) -> Trial:
        """A trial with the references of another group."""
        return replace(trial, references=self._references[trial.variant, trial.group])
