"""How the session uses awscrt: its thread is never held up, its end is waited for, nothing piles up, nothing forks."""

from __future__ import annotations

import ast
import asyncio
import os
import time
from pathlib import Path

import pytest

import agent
from agent.cloud import connection as connection_module
from agent.cloud.connection import Connection
from agent.cloud.session import LONGEST_REQUEST_S
from agent.errors import CloudError
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import child, line_of, make_session, running

THING = "cam-7"
pytestmark = pytest.mark.usefixtures("readable_logs")
FORKING = {"fork", "forkpty", "preexec_fn", "multiprocessing", "ProcessPoolExecutor", "daemonize"}


@pytest.mark.conformance("C-SDK-01")
async def test_while_a_handler_blocks_the_loop_messages_are_acknowledged_and_pings_go_on(peer, cloud, identity):
    peer.connack_properties["server_keep_alive"] = 1
    script = """
        def block(topic, payload):
            if payload == b"block":
                tell("blocked")
                time.sleep(5)
                tell("free")

        async def main():
            session = make_session()
            session.subscribe("t/a", block)
            task = asyncio.create_task(session.run())
            await session.wait_connected()
            tell("READY")
            await asyncio.sleep(60)

        asyncio.run(main())
    """
    async with child(script, cloud, identity) as process:
        await line_of(process, "READY")
        peer.send("t/a", b"block")
        await line_of(process, "blocked")
        pings, acknowledged = len(peer.of(mqtt.PINGREQ)), len(peer.of(mqtt.PUBACK))
        for number in range(200):
            peer.send("t/a", b"%d" % number)
        await line_of(process, "free")
        assert len(peer.of(mqtt.PINGREQ)) - pings >= 3
        assert len(peer.of(mqtt.PUBACK)) - acknowledged >= 200
        assert peer.connections == 1


@pytest.mark.conformance("C-SDK-02")
async def test_callbacks_after_the_end_of_the_loop_are_harmless(peer, cloud, identity):
    script = """
        from agent.cloud.connection import Connection, Options

        async def main():
            loop = asyncio.get_running_loop()
            options = Options("cam-7", Cloud(endpoint="localhost", port=int(port), ca_file=Path(ca)), Path(certificate),
                              Path(key), None)
            connection, _ = await asyncio.to_thread(Connection.prepare, options, lambda *_: None, loop)
            connection.start()
            await connection.opened
            await connection.subscribe(["t/a"])
            return connection

        kept = asyncio.run(main())
        tell("closed")
        sys.stdin.read()
        kept.on_stopped(None)
        tell("end")
    """
    async with child(script, cloud, identity, stdin=True) as process:
        await line_of(process, "closed")
        for _ in range(20):
            peer.send("t/a", b"too late")
        await peer.until(lambda: len(peer.of(mqtt.PUBACK)) == 20)
        peer.cut()
        process.stdin.close()
        async with asyncio.timeout(60):
            output = (await process.stdout.read()).decode()
            await process.wait()
        assert (output, process.returncode) == ("end\n", 0)


class Stubborn:
    """An awscrt client that never stops; what is asked of it."""

    def __init__(self) -> None:
        self.stops: list[int] = []

    def start(self) -> None:
        pass

    def stop(self, packet) -> None:
        self.stops.append(int(packet.reason_code))


@pytest.mark.conformance("C-SDK-03")
async def test_a_stop_sends_a_disconnect_and_waits_for_its_end_ten_seconds_at_most(monkeypatch):
    assert connection_module.STOP_TIMEOUT_S <= 10
    monkeypatch.setattr(connection_module, "STOP_TIMEOUT_S", 0.3)
    client = Stubborn()
    stubborn = Connection(lambda _: client, asyncio.get_running_loop())
    stubborn.start()
    stubborn.opened.set_result(False)
    began = time.monotonic()
    async with asyncio.timeout(10):
        await stubborn.close()
    assert time.monotonic() - began >= 0.3
    assert client.stops == [0]

    monkeypatch.setattr(connection_module, "STOP_TIMEOUT_S", 600)
    quick = Connection(lambda _: Stubborn(), asyncio.get_running_loop())
    quick.start()
    quick.opened.set_result(False)
    closing = asyncio.create_task(quick.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    await asyncio.to_thread(quick.on_stopped, None)
    async with asyncio.timeout(10):
        await closing


@pytest.mark.conformance("C-SDK-03")
async def test_stopping_takes_ten_seconds_at_most_also_when_the_other_side_takes_nothing_any_more(
    peer, cloud, identity
):
    session = make_session(THING, cloud, identity)
    async with running(session):
        for transport in [client.writer.transport for client in peer._live.values()]:
            transport.pause_reading()
        sending = [asyncio.create_task(session.publish("t", bytes(128 * 1024))) for _ in range(100)]
        await asyncio.sleep(0.5)
        began = time.monotonic()
    assert time.monotonic() - began <= 12
    results = await asyncio.gather(*sending, return_exceptions=True)
    assert {result.code for result in results if isinstance(result, CloudError)} == {"connection_ended", "offline"}


@pytest.mark.conformance("C-SDK-04")
async def test_what_is_under_way_is_connection_lost_and_what_waits_is_offline(peer, session):
    peer.silent_kinds = {mqtt.PUBLISH}
    bound = connection_module.IN_FLIGHT
    endings = {
        "connection_lost": [peer.cut, peer.close, lambda: peer.disconnect(0x87)],
        "connection_ended": [lambda: peer.disconnect(0x8B), lambda: peer.disconnect(0x8E)],
    }
    endings = [(code, end) for code, ends in endings.items() for end in ends]
    async with running(session):
        for number, (code, end) in enumerate(endings, 1):
            async with asyncio.timeout(20):
                await session.wait_connected()
            sending = [asyncio.create_task(session.publish(f"t/{number}", b"%d" % n)) for n in range(bound + 30)]
            await peer.until(lambda: len(peer.of(mqtt.PUBLISH)) == bound * number)
            end()
            results = await asyncio.gather(*sending, return_exceptions=True)
            assert all(isinstance(result, CloudError) and result.retryable for result in results)
            codes = [result.code for result in results]
            assert codes == [code] * bound + ["offline"] * 30
            with pytest.raises(CloudError) as caught:
                await session.publish("t", b"")
            assert caught.value.code == "offline"
        async with asyncio.timeout(20):
            await session.wait_connected()
        await asyncio.sleep(0.3)
    assert len(peer.of(mqtt.PUBLISH)) == bound * len(endings)  # nothing waited inside of awscrt
    print(f"{len(endings)} ends with {bound} messages under way and 30 waiting tried")


@pytest.mark.conformance("C-SDK-06")
async def test_requests_that_are_never_answered_end_and_leave_nothing(peer, session):
    assert LONGEST_REQUEST_S <= 30
    peer.drop_replies = True
    session.subscribe_replies("svc/+/+")
    async with running(session):
        asking = [asyncio.create_task(session.request(f"svc/{n}", {}, timeout_s=0.5)) for n in range(20)]
        asking += [asyncio.create_task(session.request(f"svc/{n}", {}, timeout_s=3600)) for n in range(20)]
        await peer.until(lambda: len(peer.of(mqtt.PUBLISH)) >= 20)
        results = await asyncio.gather(*asking[:20], return_exceptions=True)
        assert {getattr(result, "code", result) for result in results} == {"no_answer"}
        for task in asking[20:30]:
            task.cancel()
        await asyncio.wait(asking[20:30])
        peer.cut()
        results = await asyncio.gather(*asking[30:], return_exceptions=True)
        assert {getattr(result, "code", result) for result in results} <= {"connection_lost", "offline"}
        assert len(session._replies) == 0
    print("40 unanswered requests tried: 20 timed out, 10 cancelled, 10 cut")


@pytest.mark.conformance("C-SDK-06")
async def test_no_request_waits_longer_than_thirty_seconds(peer, session, monkeypatch):
    monkeypatch.setattr("agent.cloud.session.LONGEST_REQUEST_S", 0.3)
    session.subscribe_replies("svc/+/+")
    async with running(session):
        with pytest.raises(CloudError) as caught:
            async with asyncio.timeout(20):
                await session.request("svc/a", {}, timeout_s=3600)
        assert caught.value.code == "no_answer"
        assert len(session._replies) == 0


@pytest.mark.conformance("C-SDK-05")
def test_no_code_of_the_agent_forks():
    """Programs are started by subprocess alone, which forks and executes in C without running Python in between."""
    searched, found = 0, []
    for path in Path(agent.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {
                getattr(node, "attr", None),
                getattr(node, "id", None),
                getattr(node, "arg", None),
                *(
                    part
                    for alias in getattr(node, "names", [])
                    if isinstance(alias, ast.alias)
                    for part in alias.name.split(".")
                ),
                *((getattr(node, "module", None) or "").split(".") if isinstance(node, ast.ImportFrom) else ()),
            }
            found += [f"{path}:{node.lineno}: {name}" for name in names & FORKING]
        searched += 1
    assert not found
    print(f"{searched} files tried")


@pytest.mark.conformance("C-SDK-05")
async def test_starting_programs_while_connected_never_runs_python_in_a_fork(peer, cloud, identity):
    """os.fork raises an audit event, and whatever else forks with Python running in the child calls these hooks."""
    user = "nobody" if os.geteuid() == 0 else ""
    script = """
        import os
        from agent.host.processes import run

        def heard(event, _):
            if event in ("os.fork", "os.forkpty"):
                tell("forked by", event)

        sys.addaudithook(heard)
        os.register_at_fork(before=lambda: tell("forked before"), after_in_child=lambda: tell("forked child"))

        async def main():
            session = make_session()
            task = asyncio.create_task(session.run())
            await session.wait_connected()
            result = await run(["/bin/true"], timeout_s=20, cwd=Path("/"))
            tell("ran", result.exit_code)
            if arguments[0]:
                other = {"user": arguments[0], "extra_groups": [], "start_new_session": True, "umask": 0o77}
                process = await asyncio.create_subprocess_exec("/bin/true", **other)
                tell("ran as another", await process.wait())
            await session.publish("t", b"alive")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            tell("end")

        asyncio.run(main())
    """
    async with child(script, cloud, identity, user) as process, asyncio.timeout(60):
        output, _ = await process.communicate()
    assert b"ran 0" in output
    assert (b"ran as another 0" in output) == bool(user)
    assert b"end" in output
    assert b"forked" not in output, output.decode()
    assert peer.of(mqtt.PUBLISH)
