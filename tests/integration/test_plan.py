"""Planning a job: the same judgement as for a real one, and nothing is begun."""

import asyncio

import pytest

from agent.errors import RefusedError
from agent.jobs.engine import Engine
from agent.jobs.plan import as_delivered
from agent.store import Store
from tests.fakes import JobsService

RESTART = {"version": "1.0", "operation": "restart"}


class Work:
    name = "restart"
    refuse = None

    def check(self, document):
        if self.refuse:
            raise self.refuse

    async def plan(self, document):
        return [f"restart {document['target']}"]

    async def run(self, job):
        raise AssertionError("a plan runs nothing")


@pytest.fixture
async def engine(tmp_path):
    store = await Store.open(tmp_path / "state.db")
    work = Work()
    facts = {"os.id": "debian"}
    made = Engine(store=store, jobs=JobsService(), operations={"restart": work}, allow=["restart"], facts=lambda: facts)
    made.work, made.store = work, store
    yield made
    assert await store.read(lambda t: t.jobs()) == []
    await store.close()


async def test_a_document_that_would_be_taken(engine):
    plan = await engine.plan(RESTART)
    assert (plan["accepted"], plan["operation"], plan["code"]) == (True, "restart", "ok")
    assert plan["steps"] == ["restart agent"]
    assert (await engine.plan({**RESTART, "conditions": [{"key": "os.id", "value": "debian"}]}))["accepted"]


@pytest.mark.parametrize(
    ("document", "code"),
    [
        (None, "bad_document"),
        ([], "bad_document"),
        ({}, "bad_document"),
        ({**RESTART, "x": 1}, "bad_document"),
        ({**RESTART, "operation": "format"}, "unknown_operation"),
        ({"operation": "update"}, "not_allowed"),
        ({**RESTART, "target": "${aws:iot:parameter:target}"}, "placeholder_unresolved"),
        ({**RESTART, "conditions": [{"key": "os.id", "value": "ubuntu"}]}, "condition_not_met"),
        ({**RESTART, "conditions": [{"key": "colour", "value": "red"}]}, "condition_unknown"),
    ],
)
async def test_a_document_that_would_be_refused_says_why(engine, document, code):
    plan = await engine.plan(document)
    assert not plan["accepted"]
    assert plan["code"] == code
    assert plan["message"]
    assert plan["steps"] == []


async def test_what_the_operation_refuses_is_told(engine):
    engine.work.refuse = RefusedError("unknown_target", "there is no such target", "use another")
    plan = await engine.plan(RESTART)
    assert (plan["code"], plan["message"], plan["hint"]) == ("unknown_target", "there is no such target", "use another")


async def test_a_document_nested_beyond_reason_is_refused_and_harms_nothing(engine):
    deep = []
    for _ in range(900):
        deep = [deep]
    assert (await engine.plan({**RESTART, "target": deep}))["code"] == "bad_document"
    assert (await asyncio.gather(*(engine.plan(RESTART) for _ in range(5))))[4]["accepted"]


def test_placeholders_of_presigned_urls_stand_for_their_url():
    url = "https://s3.eu-west-1.amazonaws.com/bucket/key"
    for kind in ("s3-presigned-url", "s3-presigned-url-v2"):
        assert as_delivered({"urls": [f"${{aws:iot:{kind}:{url}}}"], "n": 1}) == {"urls": [url], "n": 1}
    assert as_delivered("${aws:iot:parameter:x}") == "${aws:iot:parameter:x}"
