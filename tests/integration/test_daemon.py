"""The real agent process against the local AWS: starts, stops, is killed, is restarted, and tells the truth each time."""

import asyncio
import json
import os
import signal
import socket
import sys

import pytest

from agent.sandbox import pipeline, seed
from agent.sandbox.fleet import running, update_document

FINAL = ("SUCCEEDED", "FAILED", "REJECTED", "TIMED_OUT", "CANCELED")
QUICK = {"telemetry": {"interval_s": 2}, "config": {"trial_s": 5}}


async def command(*argv, **environment):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *argv,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def agentctl(camera, *argv):
    code, out, err = await command("agent.ctl", *argv, AGENTCTL_SOCKET=camera.socket)
    return code, out + err


async def until(what, condition, limit_s=90):
    """Poll the other process until `condition` is true; its last value when it never is."""
    last = None
    try:
        async with asyncio.timeout(limit_s):
            while True:
                last = await condition()
                if last:
                    return last
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"{what}: not within {limit_s} s, last seen {last!r}")


async def online(camera):
    async def connected():
        code, out = await agentctl(camera, "status", "--json")
        return code == 0 and json.loads(out)["cloud"]["state"] == "connected"

    await until("connected", connected)


async def job_end(sandbox, job_id, thing="cam-0001"):
    async def ended():
        try:
            execution = await asyncio.to_thread(seed.job_execution, sandbox.aws, job_id, thing)
        except Exception:
            return None
        return execution if execution["status"] in FINAL else None

    return await until(f"job {job_id} ended", ended)


async def create_job(sandbox, job_id, document):
    await asyncio.to_thread(seed.create_job, sandbox.aws, sandbox.fleet, job_id, document)


# ---- the command line ----------------------------------------------------------------------------------------------


async def test_check_config_says_what_is_wrong(tmp_path):
    config = tmp_path / "agent.toml"
    config.write_text("[cloud]\nendpont = 'x'\n")
    code, _, err = await command("agent", "check-config", str(config))
    assert code == 2
    assert err == f"camera-agent: {config}: cloud.endpont: unknown key, did you mean endpoint?\n"
    code, _, err = await command("agent", "run", "--config", str(config))
    assert code == 2
    code, _, err = await command("agent", "run", "--config", str(tmp_path / "none.toml"))
    assert (code, err) == (2, f"camera-agent: {tmp_path}/none.toml: no such file\n")
    config.write_text("")
    code, out, _ = await command("agent", "check-config", str(config))
    assert (code, out) == (0, f"{config}: ok\n")
    code, _, err = await command("agent", "fly")
    assert code == 2


async def test_a_state_folder_that_cannot_be_used_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    config = tmp_path / "agent.toml"
    config.write_text(f"[paths]\nstate_dir = '{tmp_path}/file/state'\nruntime_dir = '{tmp_path}/run'\n")
    code, _, err = await command("agent", "run", "--config", str(config))
    assert code == 1
    assert f"{tmp_path}/file/state" in err
    assert "Traceback" not in err


async def test_without_a_cloud_it_runs_and_says_why_it_is_offline_and_notifies_systemd(tmp_path):
    pytest.importorskip("systemd.daemon", reason="systemd-python is not installed, so nothing would be notified")
    config = tmp_path / "agent.toml"
    config.write_text(f"[paths]\nstate_dir = '{tmp_path}/state'\nruntime_dir = '{tmp_path}/run'\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.setblocking(False)
        loop = asyncio.get_running_loop()
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "4000000"}
        agent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "agent",
            "run",
            "--config",
            str(config),
            env=environment,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            messages = []
            async with asyncio.timeout(60):
                while messages.count("WATCHDOG=1") < 2:
                    messages.append((await loop.sock_recv(notify, 4096)).decode())
            assert messages[0] == "READY=1"
            assert any(message.startswith("STATUS=") for message in messages)
            code, out, _ = await command("agent.ctl", "status", "--json", AGENTCTL_SOCKET=tmp_path / "run/api.sock")
            assert code == 0
            assert json.loads(out)["agent"]["uptime_s"] < 1000
            cloud = json.loads(out)["cloud"]
            assert (cloud["state"], cloud["code"]) == ("offline", "not_configured")
            assert cloud["hint"]
            second, _, err = await command("agent", "run", "--config", str(config))
            assert second == 1
            assert "another camera-agent works on" in err
            await asyncio.to_thread((tmp_path / "run/api.sock").unlink)
            second, _, err = await command("agent", "run", "--config", str(config))
            assert (second, "another camera-agent works on" in err) == (1, True)
        finally:
            agent.send_signal(signal.SIGTERM)
            _, err = await agent.communicate()
        assert agent.returncode == 0, err.decode()
        assert not (tmp_path / "run/api.sock").exists()
        code, out, _ = await command("agent.ctl", "status", "--json", AGENTCTL_SOCKET=tmp_path / "run/api.sock")
        assert code == 3
        assert json.loads(out)["last_known"]["status"]["agent"]["pid"] == agent.pid


# ---- with the cloud ------------------------------------------------------------------------------------------------


async def test_a_job_to_restart_the_agent_is_proven_by_the_restart(tmp_path):
    async with running(tmp_path, settings=QUICK) as sandbox:
        camera = sandbox.cameras[0]
        await online(camera)
        started = json.loads((await agentctl(camera, "status", "--json"))[1])["agent"]["started_at"]
        await create_job(sandbox, "again", {"version": "1.0", "operation": "restart"})
        end = await job_end(sandbox, "again")
        assert (end["status"], end["statusDetails"]["message"]) == ("SUCCEEDED", "the agent was restarted")
        await online(camera)
        assert json.loads((await agentctl(camera, "status", "--json"))[1])["agent"]["started_at"] > started
        assert await sandbox.stop_agent(camera) == 0


@pytest.mark.parametrize("behaviour", ["good", "blurry:4"])
async def test_kill_9_during_a_trial_ends_the_update_once_with_the_truth(tmp_path, behaviour):
    async with running(tmp_path, settings=QUICK) as sandbox:
        camera = sandbox.cameras[0]
        await online(camera)

        async def reference():
            _, out = await agentctl(camera, "capture", "--json")
            return json.loads(out)["sources"]["front"]["reference_samples"] >= 16

        await until("a reference of the images", reference)
        before = (camera.pipeline_root / "current").resolve()
        artifact = await asyncio.to_thread(pipeline.build_artifact, tmp_path, "1.1.0", behaviour)
        document = await asyncio.to_thread(update_document, sandbox, artifact, "1.1.0", stable_for_s=8, deadline_s=120)
        await create_job(sandbox, "update", document)

        async def on_trial():
            _, out = await agentctl(camera, "update", "--json")
            return "TRIAL" in out

        await until("on trial", on_trial)
        assert await sandbox.stop_agent(camera, signal.SIGKILL) == -signal.SIGKILL
        assert (camera.pipeline_root / "current").resolve() != before
        await sandbox.start_agent(camera)
        end = await job_end(sandbox, "update")
        after = (camera.pipeline_root / "current").resolve()
        if behaviour == "good":
            assert end["status"] == "SUCCEEDED", end
            assert after != before
        else:
            assert (end["status"], end["statusDetails"]["reason_code"]) == ("FAILED", "capture_worse"), end
            assert after == before
        _, out = await agentctl(camera, "jobs", "--json")
        assert [job["status"] for job in json.loads(out)["jobs"]] == [end["status"]]
