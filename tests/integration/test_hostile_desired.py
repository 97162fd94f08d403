"""Whatever a shadow or a job asks for: no crash, old or new and nothing in between, and an answer that the shadow can hold."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import settings_file
from agent.config import desired as wishes
from agent.config import layers
from agent.config.formats import render
from agent.config.records import Outcome
from agent.config.reported import LEAST_BYTES
from agent.errors import CloudError, RefusedError
from tests.fakes_shadow import LIMIT_BYTES, ShadowCloud, _depth
from tests.integration.test_configuration import FINAL, OWN, Camera, Cut, Site
from tests.unit.test_desired_schema import ODD
from tests.unit.test_desired_schema import documents as likely

HEADROOM = 256
"""Bytes that a state needs beside desired, with what the service may count besides."""
UNTRIED = ("rejected", "reverted")


def size(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass"))


class HostileCloud(ShadowCloud):
    """Holds what no service would: lists for objects, null in arrays, text that is none; counts updates and refusals."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        self.refused: list[str] = []

    def want_raw(self, document: Any) -> None:
        """As no service would take it."""
        self.desired = document
        asyncio.get_running_loop().call_soon(self.on_desired)
        self._accept()

    def offer(self, document: Any) -> None:
        """As the service takes it, if it does."""
        with contextlib.suppress(CloudError, UnicodeError):
            self.want(document)

    @property
    def delta(self) -> Any:
        return super().delta if isinstance(self.desired, dict) else {"agent": {}}

    def take(self, reported: dict[str, Any]) -> int:
        self.updates += 1
        json.dumps(reported, allow_nan=False, ensure_ascii=False).encode()
        assert _depth(reported) <= max(5, _depth(self.desired)), reported
        desired = self.desired
        self.desired = {"bytes": "x" * size(desired)}  # what counts is its size alone
        try:
            return super().take(reported)
        except CloudError as error:
            self.refused.append(error.code)
            assert size(desired) > LIMIT_BYTES - HEADROOM - LEAST_BYTES, "it reports more than there is room for"
            raise
        finally:
            self.desired = desired


class Programs(Site):
    """A site whose candidate files, which come and go, are not looked at."""

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.pipeline, self.lens) if path.exists()}


class Run:
    """A camera and its shadow over several runs of the agent, and what has to hold whenever it is quiet."""

    def __init__(self, folder: Path) -> None:
        self.site, self.cloud = Programs(folder, schema=False), HostileCloud()
        self.camera = Camera(self.site, self.cloud)
        self.jobs = 0

    async def start(self) -> None:
        self.camera = Camera(self.site, self.cloud)
        await self.camera.start()

    async def restart(self) -> None:
        await self.camera.stop()
        await self.start()

    @property
    def kept(self) -> Any:
        return self.camera.configuration._keeper.kept

    def verdict(self, reasons: list[str]) -> None:
        self.camera.verdict = lambda: reasons

    async def quiet(self) -> None:
        """Until it is quiet, stays so, and all holds."""
        await self._settle()
        updates = self.cloud.updates
        self.cloud.deliver(self.cloud.version, {})
        await self._settle()
        self.cloud.deliver(max(self.cloud.version - 1, 1), {"agent": {}})
        self.camera.configuration.look_again()
        await self._settle()
        assert self.cloud.updates == updates, "it goes on reporting"
        if self.cloud.online:
            self._reported_right()
            await self.camera.configuration.on_ready()
            await self._settle()
            assert self.cloud.updates == updates or self.cloud.refused, "a connect makes it report what is there"
            assert self.cloud.updates <= updates + 8
        await asyncio.to_thread(self._whole)

    async def _settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        await self.camera.quiet()
        while self.camera.configuration.state().get("waits_for"):
            await self.camera.quiet()
        if self.camera.task.done():
            self.camera.task.result()
            raise AssertionError("it has ended")

    def _whole(self) -> None:
        """Files, settings and what is told of them are those of the last known good configuration."""
        good, camera, configuration = self.kept.good.desired, self.camera, self.camera.configuration
        assert self.kept.trial is None
        assert not camera.lock.locked()
        candidate, problems = wishes.validate(self.site.document, good.as_json())
        assert candidate, problems
        running = camera.applied[-1] if camera.applied else settings_file.validate(self.site.document, "site")
        assert running == candidate.settings
        files = self.site.files()
        for name, file, syntax, own in (
            ("pipeline", "pipeline.json", "json", OWN),
            ("lens", "lens.toml", "toml", None),
        ):
            wanted = render(good.targets[name], syntax) if name in good.targets else own
            assert files.get(file) == wanted, name
        assert self.site.loaded.get("pipeline.service", OWN) == files["pipeline.json"]
        assert not [path.name for path in self.site.folder.iterdir() if path.name.startswith(".")]
        json.dumps([configuration.state(), configuration.effective(), configuration.wanted()], allow_nan=False)

    def _reported_right(self) -> None:
        state, cloud = self.camera.configuration.state(), self.cloud
        assert state["state"] in FINAL
        assert bool(state["errors"]) == (state["state"] in UNTRIED)
        room = LIMIT_BYTES - HEADROOM - size(cloud.desired)
        if room < LEAST_BYTES:
            return
        status = cloud.reported["status"]
        assert {key: status[key] for key in ("state", "desired_version")} == {
            key: state[key] for key in ("state", "desired_version")
        }
        assert size({"desired": cloud.desired, "reported": cloud.reported}) <= LIMIT_BYTES
        if room > 500:
            codes = {error["code"] for error in state["errors"]}
            assert bool(status["errors"]) == bool(codes)
            assert {error["code"] for error in status["errors"]} <= codes

    # ---- what happens to it ------------------------------------------------------------------------------------------

    async def want(self, document: Any, reasons: list[str], *, raw: bool, cut: int) -> None:
        """`cut`: the power goes at that step of the camera's work, and comes back."""
        raw = raw or not isinstance(document, dict)
        before, refused = self.kept.good, self.kept.refused
        self.verdict(reasons)
        self.cut(cut)
        (self.cloud.want_raw if raw else self.cloud.offer)(document)
        was_cut = await self._cut_or_quiet(reasons)
        await self.quiet()
        if self.cloud.online:
            again = refused is not None and refused == self.kept.refused
            await self.judged(self.cloud.desired, before, taken_back=bool(reasons) or was_cut or again)

    def cut(self, at: int) -> None:
        steps = self.camera.step
        steps.cut_at = steps.count + at if at else 0

    async def _cut_or_quiet(self, reasons: list[str]) -> bool:
        quiet = asyncio.create_task(self._settle())
        await asyncio.wait({quiet, self.camera.task}, return_when=asyncio.FIRST_COMPLETED)
        was_cut = self.camera.task.done()
        if was_cut:
            quiet.cancel()
            await asyncio.wait({quiet})
            with pytest.raises(Cut):
                self.camera.task.result()
            await self.restart()
            self.verdict(reasons)
        else:
            await quiet
        self.cut(0)
        return was_cut

    async def judged(self, document: Any, before: layers.InForce, *, taken_back: bool) -> None:
        """What became of the shadow's document is what had to become of it; `taken_back`: it could not stay, or could not before."""
        state, good = self.camera.configuration.state()["state"], self.kept.good
        assert good.fleet == before.fleet
        wanted, malformed = wishes.parse(document)
        if state == "applied":
            assert not malformed
            assert good.shadow.desired.digest == wanted.digest
            return
        assert good.shadow.desired.digest == before.shadow.desired.digest
        if malformed:
            assert state == "rejected"
        elif await asyncio.to_thread(
            takeable, self.site, layers.InForce(0, before.fleet, layers.Layer(wanted.agent, wanted.targets)).desired
        ):
            assert state == "reverted"
            assert taken_back

    async def job(self, patch: Mapping[str, Any], reasons: list[str], *, whole: bool, cancelled: str, cut: int) -> None:
        """`cancelled`: not, before it begins, or on trial."""
        self.jobs += 1
        before, event = self.kept.good, asyncio.Event()
        self.camera.verdict = lambda: (event.set() if cancelled == "on trial" else None, reasons)[1]
        shown, _ = await self.camera.configuration.judge_fleet(patch, whole=whole)
        self.cut(cut)
        asked = self._ask(patch, whole, event)
        if cancelled == "at once":
            asyncio.get_running_loop().call_soon(event.set)
        await asyncio.wait({asked, self.camera.task}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            asked.cancel()
            await asyncio.wait({asked})
        if was_cut := await self._cut_or_quiet(reasons):
            await self._settle()
            asked = self._ask(patch, whole, event)
        async with asyncio.timeout(20):
            outcome = await asked
        problems = json.dumps([problem.as_json() for problem in outcome.problems], allow_nan=False)
        assert (outcome.state == "applied") == (not outcome.problems), problems
        assert outcome.state != "rejected" or shown or cancelled, problems
        assert outcome.state != "reverted" or reasons or cancelled or was_cut or not self.cloud.online
        await self.quiet()
        good = self.kept.good
        document = layers.patched(wishes.Desired() if whole else before.fleet.desired, patch)
        wanted, malformed = wishes.parse(document)
        if outcome.state == "applied":
            assert not shown
            assert not malformed
            assert good.fleet.desired.digest == wanted.digest
        else:
            assert good.fleet == before.fleet

    def _ask(self, patch: Mapping[str, Any], whole: bool, cancelled: asyncio.Event) -> asyncio.Task[Outcome]:
        words: list[str] = []
        return asyncio.create_task(
            self.camera.configuration.set_fleet(
                f"J-{self.jobs}/1", patch, whole=whole, cancelled=cancelled, tell=words.append
            )
        )

    async def delete(self, *, forget: bool) -> None:
        before, refused = self.kept.good, self.kept.refused
        self.verdict([])
        self.cloud.delete(forget_version=forget)
        await self.quiet()
        if self.cloud.online:
            again = refused is not None and refused == self.kept.refused
            await self.judged(None, before, taken_back=again)


def takeable(site: Site, desired: wishes.Desired) -> bool:
    if wishes.validate(site.document, desired.as_json())[1]:
        return False
    try:
        for name, document in desired.targets.items():
            render(document, site.document["config"]["targets"][name].get("format", "json"))
    except RefusedError:
        return False
    return True


# ---- hostile documents -------------------------------------------------------------------------------------------------

text = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["\0", "\ud800", "~", "/", "~1", "", "a/b~c", "\u2028", "\x7f"]
)
numbers = (
    st.integers() | st.floats() | st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 2**70, -(2**63), 1e308, 5e-324])
)
words = st.sampled_from(
    ["agent", "targets", "pipeline", "lens", "capture", "sources", "front", "interval_s", "labels", "log", "level", "x"]
)
keys = words | words | text | st.just("k" * 100_000)
anything = st.recursive(
    st.none() | st.booleans() | numbers | text | st.sampled_from(ODD) | st.just("v" * 5_000) | st.just("w" * 20_000),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=4),
    max_leaves=10,
)


def deep(levels: int, array: bool) -> Any:
    document: Any = 1
    for _ in range(levels):
        document = [document] if array else {"a": document}
    return document


@st.composite
def sized(draw: st.DrawFn) -> Any:
    filling, total = draw(st.sampled_from(["n", "ä", '"', "\0", "\U0001f4f7"])), draw(st.integers(3900, 8300))
    where = draw(st.sampled_from(["lens", "pipeline"]))
    most = total // (size(filling) - 2)
    part = draw(st.sampled_from(["one", "many"]))
    document: dict[str, Any] = (
        {"note": filling * most} if part == "one" else {f"n{n}": filling for n in range(most // 12)}
    )
    return {"agent": draw(st.sampled_from([{}, {"log": {"level": "debug"}}])), "targets": {where: document}}


nested = st.builds(deep, st.sampled_from([3, 4, 5, 6, 7, 8, 9, 40, 250]), st.booleans())
targets = st.fixed_dictionaries({}, optional={"pipeline": anything | nested, "lens": anything | nested})
plain = st.dictionaries(
    st.sampled_from(["fps", "tone", "a/b~c", "", "ä"]),
    st.integers(0, 9) | text | st.lists(st.integers(0, 9)),
    max_size=3,
)
fitting = st.fixed_dictionaries(
    {},
    optional={
        "agent": st.fixed_dictionaries(
            {},
            optional={
                "telemetry": st.fixed_dictionaries({"interval_s": st.integers(1, 5)}),
                "capture": st.sampled_from([{"slow_ratio": 0.5}, {"sources": {"front": {"interval_s": 2}}}]),
                "labels": st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(["x", "y" * 128]), max_size=8),
                "cloud": st.fixed_dictionaries({"keep_alive_s": st.integers(30, 33)}),
            },
        ),
        "targets": st.fixed_dictionaries({}, optional={"pipeline": plain, "lens": plain}),
    },
)
trees = st.builds(
    lambda name, levels: {"targets": {name: deep(levels, array=False)}},
    st.sampled_from(["pipeline", "lens"]),
    st.integers(1, 8),
)
documents = st.one_of(
    fitting,
    fitting,
    fitting,
    likely(),
    likely(),
    sized(),
    sized(),
    trees,
    anything,
    st.builds(lambda agent, its: {"agent": agent, "targets": its}, anything, targets),
    st.builds(lambda its: {"targets": its}, targets),
    nested.map(lambda tree: {"agent": tree}),
)
patches = st.one_of(
    fitting,
    fitting,
    fitting,
    likely().filter(lambda document: isinstance(document, dict)),
    likely().filter(lambda document: isinstance(document, dict)),
    sized(),
    sized(),
    trees,
    trees,
    st.dictionaries(keys, anything, max_size=3),
    st.builds(lambda its: {"targets": its}, targets),
    st.sampled_from(
        [
            {"agent": None},
            {"targets": None},
            {"agent": {"capture": None}, "targets": {"pipeline": None}},
            {"agent": {"telemetry": {"interval_s": {}}}},
            {"agent": {"labels": {"site": None}}},
        ]
    ),
)
reasons = st.sampled_from([[], [], [], ["dark"], ["d" * 9_000], ["\0\u2028 ä"]])
want = st.fixed_dictionaries(
    {
        "do": st.just("want"),
        "document": documents,
        "reasons": reasons,
        "raw": st.booleans(),
        "cut": st.just(0) | st.integers(0, 20),
    }
)
job = st.fixed_dictionaries(
    {
        "do": st.just("job"),
        "patch": patches,
        "reasons": reasons,
        "whole": st.booleans(),
        "cancelled": st.sampled_from(["", "", "at once", "on trial"]),
        "cut": st.just(0) | st.integers(0, 20),
    }
)
others = st.sampled_from(
    [
        {"do": "delete", "forget": False},
        {"do": "delete", "forget": True},
        *({"do": do} for do in ("restart", "off", "on", "back")),
    ]
)


async def carry_out(run: Run, step: dict[str, Any]) -> None:
    how = {key: value for key, value in step.items() if key != "do"}
    if step["do"] == "want":
        await run.want(**how)
    elif step["do"] == "job":
        await run.job(**how)
    elif step["do"] == "delete":
        await run.delete(**how)
    elif step["do"] == "restart":
        await run.restart()
        await run.quiet()
    elif step["do"] == "back":
        run.cloud.version //= 2
        await run.quiet()
    else:
        run.cloud.online = step["do"] == "on"
        if run.cloud.online:
            await run.camera.configuration.on_ready()
        await run.quiet()


async def whole(steps: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        run = Run(Path(folder))
        await run.start()
        try:
            await run.quiet()
            for step in [*steps, {"do": "on"}]:
                await carry_out(run, step)
        finally:
            await run.camera.stop()


@pytest.fixture
def blocked() -> Iterator[None]:
    blocker = BlockBuster(scanned_modules=["agent"])
    blocker.activate()
    try:
        yield
    finally:
        blocker.deactivate()


def examples(request: pytest.FixtureRequest, few: int) -> int:
    return 30 * few if request.config.getoption("--exhaustive", default=False) else few


QUIETLY = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def test_whatever_the_shadow_wants_the_camera_is_whole_and_says_so(
    blocked: None, request: pytest.FixtureRequest
) -> None:
    tried = 0

    @settings(max_examples=examples(request, 40), suppress_health_check=QUIETLY)
    @given(st.lists(want | want | others, min_size=3, max_size=5))
    def look(steps: list[dict[str, Any]]) -> None:
        nonlocal tried
        tried += sum(step["do"] == "want" for step in steps)
        asyncio.run(whole(steps))

    look()
    print(f"{tried} documents tried")


def test_whatever_jobs_ask_for_their_outcome_is_what_is_in_force(blocked: None, request: pytest.FixtureRequest) -> None:
    tried = 0

    @settings(max_examples=examples(request, 40), suppress_health_check=QUIETLY)
    @given(st.lists(job | job | want | others, min_size=3, max_size=5))
    def look(steps: list[dict[str, Any]]) -> None:
        nonlocal tried
        tried += sum(step["do"] in ("want", "job") for step in steps)
        asyncio.run(whole(steps))

    look()
    print(f"{tried} patches and documents tried")


async def test_documents_of_8100_to_8200_bytes(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """And some smaller ones. Where desired leaves no room the camera acts all the same, and tells as soon as there is room."""
    exhaustive = request.config.getoption("--exhaustive", default=False)
    step = 1 if exhaustive else 20  # where the mirror of targets, and where the state, just fits beside desired
    sizes = itertools.chain(range(3700, 4200, step), range(7600, 8100, step), range(8100, 8201))
    run, tried = Run(tmp_path), 0
    await run.start()
    try:
        for total in sizes:
            document = {"agent": {"telemetry": {"interval_s": total}}, "targets": {"lens": {"note": ""}}}
            document["targets"]["lens"]["note"] = "n" * (total - size(document))
            assert size(document) == total
            await run.want(document, [], raw=True, cut=0)
            state = run.camera.configuration.state()
            assert state["state"] == ("applied" if total <= wishes.MAX_BYTES else "rejected"), total
            assert [error["code"] for error in state["errors"]] == (["too_large"] if total > wishes.MAX_BYTES else [])
            tried += 1
        await run.want({"targets": {"lens": {"note": "short"}}}, [], raw=False, cut=0)
        assert run.cloud.reported["targets"] == {"lens": {"note": "short"}}
        assert run.cloud.delta == {}
    finally:
        await run.camera.stop()
    print(f"{tried} sizes tried")


async def test_plans_beside_changes_spoil_neither(tmp_path: Path) -> None:
    """A plan writes a candidate file too, while a job's own is judged, and while the target's file is written."""
    run, tried = Run(tmp_path), 0
    await run.start()
    try:
        configuration = run.camera.configuration
        for number in range(20):
            patch = {"targets": {"lens": {"n": number}, "pipeline": {"n": number}}}
            change = asyncio.create_task(configuration.set_fleet(f"J-{number}/1", patch))
            while not change.done():
                found = await asyncio.gather(*(configuration.judge_fleet(patch) for _ in range(2)))
                assert [problems for problems, _ in found] == [[], []]
                tried += 2
            assert (await change).state == "applied"
    finally:
        await run.camera.stop()
    print(f"{tried} plans beside 20 changes tried")
