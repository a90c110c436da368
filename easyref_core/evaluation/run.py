"""A benchmark run: groups -> trials -> images -> scores -> tables and the page; resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EasyRefError
from ..untrusted import escaped
from .generate import generate
from .methods import Method
from .metrics import Metric
from .plain_trials import plain_trial
from .planning import batches_of, make_variants, plan_trials, share_of
from .processes import Processes, join
from .protocols import PRESETS, chosen_methods, read_preset_groups
from .scoring import chunks_of, read_scores, score
from .store import RESULTS, RUN, TRIALS, VERSION, OtherRun, RunFolder, TrialState, writing
from .trials import NEWER, Trial, Variant
from .usable import PictureIndex, usable_groups

if TYPE_CHECKING:
    from .settings import BenchSettings

MakeMethods = Callable[["BenchSettings", Sequence[Trial], torch.device], Mapping[str, Method]]
"""The methods that trials name, by name; each process makes its own."""
MakeMetrics = Callable[["BenchSettings", torch.device], tuple[Sequence[Metric], Sequence[str]]]
"""The metrics whose models are there, and a sentence for each that is left out."""

_MOST_NOTES = 100


@dataclass(frozen=True)
class BenchSummary:
    """Results of a run.

    Attributes:
        done, failed: images.
        notes: what was left out, a sentence each.
        table: means over all groups, as text.
    """

    folder: Path
    done: int
    failed: int
    notes: tuple[str, ...]
    table: str


def run_bench(
    settings: BenchSettings,
    *,
    make_methods: MakeMethods | None = None,
    make_metrics: MakeMetrics | None = None,
    keep: Callable[[Variant], bool] = lambda variant: True,
    overwrite: bool = False,
) -> BenchSummary | None:
    """Run a benchmark, or go on with one that was stopped.

    Args:
        make_methods, make_metrics: in place of those that the settings name.
        keep: whether a combination of varied values is to be generated.
        overwrite: begin anew, and replace what an earlier run has left in settings.out.

    Returns:
        None in all processes but the first, which writes for all.

    Raises:
        EasyRefError: groups, models or settings that cannot be used; a run that was made with other
            settings; a folder in which another run works; a full disk.
    """
    processes = join(settings.device)
    run = _Run(settings, processes, keep, overwrite)
    with ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(run.opened()))
        return run.through(make_methods or _methods, make_metrics or _metrics)


def _methods(
    settings: BenchSettings, trials: Sequence[Trial], device: torch.device
) -> Mapping[str, Method]:
    from .methods.load import load_methods
    from .methods.settings import generation_settings

    return load_methods(generation_settings(settings, device), trials)


def _metrics(
    settings: BenchSettings, device: torch.device
) -> tuple[Sequence[Metric], Sequence[str]]:
    from .metrics.load import load_metrics

    models = {"clip": settings.clip, "dino": settings.dino, "faces": settings.faces}
    return load_metrics(**models, offline=settings.offline, device=device)


@dataclass(frozen=True)
class _Plan:
    """What the first process tells the others."""

    trials: list[Trial]
    notes: list[str]


class _Run:
    """One run, in one process."""

    def __init__(
        self,
        settings: BenchSettings,
        processes: Processes,
        keep: Callable[[Variant], bool],
        overwrite: bool,
    ) -> None:
        self._settings = settings
        self._processes = processes
        self._keep = keep
        self._overwrite = overwrite
        self._folder = RunFolder(settings.out)
        self._index = PictureIndex()

    def opened(self) -> AbstractContextManager[None]:
        """The run's folder, for this process alone."""
        settings = self._settings
        models = (settings.base, settings.base_config, settings.adapter, settings.mllm)
        more = (settings.ip_adapter, settings.image_encoder, *settings.vary.adapter)
        inputs = [settings.groups, *filter(None, (*models, *more))]
        return self._folder.opened(self._overwrite, inputs)

    def through(self, make_methods: MakeMethods, make_metrics: MakeMetrics) -> BenchSummary | None:
        settings, processes, folder = self._settings, self._processes, self._folder
        plan = processes.on_main(self._planned)
        processes.check_shared(folder.path)
        metrics, missing = make_metrics(settings, processes.device)
        methods = make_methods(settings, plan.trials, processes.device)
        identities = _plain({name: method.identity() for name, method in methods.items()})
        processes.on_main(lambda: self._begin(plan, identities, metrics))
        batches = batches_of(plan.trials, settings.batch_size)
        batches = share_of(batches, processes.count, processes.index)
        with self._bar("generating", sum(map(len, batches))) as bar:
            generate(methods, batches, folder, bar.update)
        processes.wait()
        chunks = chunks_of(plan.trials)[processes.index :: processes.count]
        with self._bar("scoring", sum(map(len, chunks)) * len(metrics)) as bar:
            score(metrics, chunks, folder, bar.update)
        processes.wait()
        if not processes.is_main:
            return None
        return self._results(plan, identities, metrics, [*plan.notes, *missing])

    def _planned(self) -> _Plan:
        """Groups are read, and every picture is decoded once."""
        settings, folder, notes = self._settings, self._folder, list[str]()
        preset = PRESETS[settings.protocol]
        self._check_settings({})
        groups = read_preset_groups(settings.protocol, Path(settings.groups), notes)
        self._index = PictureIndex(folder.path / "work" / "pictures.json")
        with self._bar("reading groups", len(groups)) as bar:
            groups = usable_groups(groups, preset.pairing, self._index, notes, bar.update)
        methods = chosen_methods(settings, notes)
        most = max(len(group.pictures) for group in groups) - (preset.pairing == "others")
        variants = [v for v in make_variants(settings, methods, preset, most) if self._keep(v)]
        if not variants:
            raise EasyRefError("All combinations are left out: there is nothing to generate.")
        images = settings.images or preset.images
        trials = plan_trials(groups, variants, settings.seed, images, preset.pairing)
        asked = max(variant.references for variant in variants)
        if asked > most:
            notes.append(
                f"No group has the {asked} references that are asked for; most are {most}."
            )
        return _Plan(trials, notes)

    def _check_settings(self, methods: Mapping[str, Any]) -> None:
        """
        Raises:
            OtherRun: the folder holds a run with other settings, or with other methods than these.
        """
        from ..training.recipe import differences
        from .settings import FREE, as_json

        if not (self._folder.path / RUN).exists():
            return
        earlier = self._folder.read_json(RUN)  # which `opened` has checked
        before, now = {**NEWER, **earlier["settings"]}, as_json(self._settings)
        for name in FREE:
            before.pop(name, None)
            now.pop(name, None)
        changed = differences(before, now)
        if methods:
            changed += differences(earlier["methods"], methods)
        if earlier["version"] != VERSION:
            changed.append(f"version of the folder: {earlier['version']!r} -> {VERSION}")
        if changed:
            raise OtherRun(self._folder.path, changed)

    def _begin(self, plan: _Plan, methods: Mapping[str, Any], metrics: Sequence[Metric]) -> None:
        """Write what the run is, or compare it with what it was when it was begun.

        Args:
            methods: their identities.

        Raises:
            OtherRun: it was another.
        """
        from ..training.recipe import differences
        from .settings import as_json

        folder = self._folder
        self._check_settings(methods)
        trials = _plain({trial.path: plain_trial(trial) for trial in plan.trials})
        changed = list(self._index.changed)
        if (folder.path / TRIALS).exists():
            with suppress(EasyRefError, TypeError, KeyError):  # damaged: written again
                before = {
                    item["path"]: item | {"variant": {**NEWER, **item["variant"]}}
                    for item in folder.read_json(TRIALS)
                }
                changed += differences(before, trials)
        if changed:
            raise OtherRun(folder.path, changed)
        folder.write_json(  # first: it makes the folder a run's
            RUN,
            {
                "settings": as_json(self._settings),
                "methods": methods,
                "metrics": [metric.identity() for metric in metrics],
                "version": VERSION,
            },
            indent=1,
        )
        with writing(folder.path):
            self._index.save()
        folder.write_json(TRIALS, list(trials.values()), indent=1)

    def _results(
        self,
        plan: _Plan,
        methods: Mapping[str, Any],
        metrics: Sequence[Metric],
        notes: list[str],
    ) -> BenchSummary:
        from . import table
        from .page.write import write_page
        from .rating.rate import plain_preferences
        from .settings import as_json

        folder, trials = self._folder, plan.trials
        columns = table.columns_of(metrics)
        lost = TrialState("failed", "its image is damaged; give the same command again")
        states = {trial.path: folder.state(trial) or lost for trial in trials}
        scores = read_scores(metrics, trials, folder, states, notes)
        failed = [trial for trial in trials if states[trial.path].status != "done"]
        if failed:
            notes.append(
                f"{len(failed)} of {len(trials)} images could not be made; the first, "
                f"{escaped(failed[0].path)}: {states[failed[0].path].error}"
            )
        if len(notes) > _MOST_NOTES:
            notes[_MOST_NOTES:] = [f"And {len(notes) - _MOST_NOTES} notes more."]
        table.write_rows(folder, table.rows_of(trials, states, scores), columns)
        table.write_times(folder, trials, states)
        summaries = table.summaries(trials, states, scores, columns)
        try:  # votes for images that are still the same
            preferences = plain_preferences(folder, trials, states)
        except EasyRefError as error:
            preferences = []
            notes.append(str(error))
        folder.write_json(
            RESULTS,
            {
                "settings": as_json(self._settings),
                "methods": methods,
                "metrics": [metric.identity() for metric in metrics],
                "columns": [table.plain_column(column) for column in columns],
                "summaries": summaries,
                "preferences": preferences,
                "notes": notes,
            },
            indent=1,
        )
        write_page(folder.path)
        done = len(trials) - len(failed)
        shown = table.text_table(summaries, columns)
        return BenchSummary(folder.path, done, len(failed), tuple(notes), shown)

    def _bar(self, what: str, total: int) -> Any:
        """Progress of the first process, on stderr."""
        from tqdm import tqdm

        return tqdm(desc=what, total=total, disable=not self._processes.is_main)


def _plain(content: Any) -> Any:
    """As it is after it was written to JSON and read again."""
    return json.loads(json.dumps(content))
