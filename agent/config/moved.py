"""Targets that agent.toml has given another place, or does not have any more, since the fleet set them."""

from __future__ import annotations

from dataclasses import replace

from agent.config import records
from agent.config import trial as trials
from agent.config.apply import Components
from agent.config.desired import Problem
from agent.config.records import Keeper
from agent.logs import get_logger

log = get_logger("config")


async def leave_old_places(keeper: Keeper, components: Components) -> None:
    """Put the site's own files back where targets were, and forget that they were put there.

    What the fleet wants of them is then not in force, and is tried anew at their new place. A trial that they are part of is
    taken back.
    """
    kept = keeper.kept
    moved = {name for name, place in kept.placed.items() if components.place(name) != place}
    if not moved:
        return
    log.warning("agent.toml has other places for targets", targets=sorted(moved))
    for name in moved:
        await components.leave(kept.placed[name], records.decode(kept.originals.get(name)))
    trial = kept.trial
    if trial and moved & set(trial.changed):
        words = f"agent.toml was changed during the trial: {', '.join(sorted(moved))}"
        problems = [*trial.problems, Problem("/targets", words, "trial_interrupted")]
        trial = replace(
            trials.reverting(trial, problems), changed=tuple(name for name in trial.changed if name not in moved)
        )
    await keeper.keep(
        replace(
            kept,
            trial=trial,
            placed={name: place for name, place in kept.placed.items() if name not in moved},
            originals={name: content for name, content in kept.originals.items() if name not in moved},
            owed={name: content for name, content in kept.owed.items() if name not in moved},
        )
    )
