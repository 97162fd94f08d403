"""The sandbox is what the agent will be tested against: devices with real certificates over MQTT 5, real files, real processes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from awscrt import io as crt_io
from awscrt import mqtt5
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from agent import settings_file
from agent.sandbox import fleet as fleets
from agent.sandbox import pipeline, pipelinectl, seed
from agent.sandbox.aws import PACKAGE_PARENT, Aws
from agent.sandbox.camera import install_first, make_camera, to_toml
from agent.sandbox.proxy import Proxy
from agent.sandbox.scene import EXIF_IFD

LIMIT_S = 30
NOT_AUTHORISED = 0x87


class Device:
    """The least MQTT 5 client that can play a camera."""

    def __init__(self, port: int, client_id: str, ca: str, certificate: str, key: str) -> None:
        loop = asyncio.get_running_loop()
        self.inbox: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.links: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        tls = crt_io.TlsContextOptions.create_client_with_mtls(certificate.encode(), key.encode())
        tls.override_default_trust_store(ca.encode())

        def hand_over(queue: asyncio.Queue[Any], item: Any) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, item)

        self.client = mqtt5.Client(
            mqtt5.ClientOptions(
                host_name="localhost",
                port=port,
                tls_ctx=crt_io.ClientTlsContext(tls),
                connect_options=mqtt5.ConnectPacket(client_id=client_id, keep_alive_interval_sec=30),
                min_reconnect_delay_ms=50,
                max_reconnect_delay_ms=200,
                on_publish_callback_fn=lambda d: hand_over(
                    self.inbox, (d.publish_packet.topic, json.loads(d.publish_packet.payload))
                ),
                on_lifecycle_event_connection_success_fn=lambda d: hand_over(self.links, ("up", d)),
                on_lifecycle_event_connection_failure_fn=lambda d: hand_over(self.links, ("refused", d)),
                on_lifecycle_event_disconnection_fn=lambda d: hand_over(self.links, ("down", d)),
                on_lifecycle_event_stopped_fn=lambda d: hand_over(self.links, ("stopped", d)),
            )
        )
        self.client.start()

    async def link(self, wanted: str) -> Any:
        """Wait until the connection is `up`, `refused`, `down` or `stopped`."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                state, data = await self.links.get()
                if state == wanted:
                    return data

    async def subscribe(self, *filters: str) -> list[int]:
        packet = mqtt5.SubscribePacket([mqtt5.Subscription(f, qos=mqtt5.QoS.AT_LEAST_ONCE) for f in filters])
        return list((await asyncio.wrap_future(self.client.subscribe(packet))).reason_codes)

    async def publish(self, topic: str, body: Any) -> int:
        packet = mqtt5.PublishPacket(topic=topic, payload=json.dumps(body).encode(), qos=mqtt5.QoS.AT_LEAST_ONCE)
        return int((await asyncio.wrap_future(self.client.publish(packet))).puback.reason_code)

    async def receive(self, ending: str) -> Any:
        """The next message whose topic ends so."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                topic, body = await self.inbox.get()
                if topic.endswith(ending):
                    return body

    async def close(self) -> None:
        self.client.stop()
        await self.link("stopped")


@contextlib.asynccontextmanager
async def device(aws: Aws, identity: seed.Identity, name: str, port: int | None = None) -> AsyncIterator[Device]:
    ca = await asyncio.to_thread(aws.ca_pem)
    client = Device(port or aws.mqtt_port, name, ca, identity.certificate_pem, identity.private_key_pem)
    try:
        yield client
    finally:
        await client.close()


async def eventually(question: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(LIMIT_S):
        while not (answer := await question()):
            await asyncio.sleep(0.05)
    return answer


def wait_until(question: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (answer := question()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return answer


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    with Aws(tmp_path_factory.mktemp("aws")) as running:
        yield running


@pytest.fixture(scope="module")
def fleet(aws: Aws) -> seed.Fleet:
    return seed.seed(aws)


@pytest.fixture
def name() -> str:
    return f"cam-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def identity(aws: Aws, fleet: seed.Fleet, name: str) -> seed.Identity:
    return seed.register_camera(aws, name)


async def test_job_reaches_a_device_and_its_end_is_kept(
    aws: Aws, fleet: seed.Fleet, name: str, identity: seed.Identity, tmp_path: Path
) -> None:
    content = os.urandom(50_000)
    artifact = tmp_path / f"{name}.bin"
    artifact.write_bytes(content)
    url = await asyncio.to_thread(seed.upload, aws, artifact)
    jobs = f"$aws/things/{name}/jobs"
    async with device(aws, identity, name) as camera:
        await camera.link("up")
        assert await camera.subscribe(f"{jobs}/notify-next", f"{jobs}/+/update/+") == [1, 1]
        document = {"version": "1.0", "operation": "update", "urls": [seed.presigned(url)]}
        job = await asyncio.to_thread(seed.create_job, aws, fleet, f"job-{name}", document)
        execution = (await camera.receive("notify-next"))["execution"]
        assert execution["jobId"] == job
        assert execution["jobDocument"]["operation"] == "update"
        received = execution["jobDocument"]["urls"][0]
        assert received.startswith(f"http://localhost:{aws.http_port}/")

        def download() -> tuple[int, str, bytes]:
            request = urllib.request.Request(received, headers={"Range": "bytes=40000-"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers["Content-Range"], answer.read()

        assert await asyncio.to_thread(download) == (206, "bytes 40000-49999/50000", content[40000:])
        with pytest.raises(urllib.error.HTTPError, match="403"):
            await asyncio.to_thread(urllib.request.urlopen, received.partition("?")[0], timeout=10)

        update = {
            "status": "SUCCEEDED",
            "expectedVersion": 1,
            "statusDetails": {"reason_code": "ok"},
            "clientToken": "t",
        }
        assert await camera.publish(f"{jobs}/{job}/update", update) == 0
        assert (await camera.receive("/update/accepted"))["clientToken"] == "t"
        assert await camera.receive("notify-next") == {"timestamp": pytest.approx(time.time(), abs=60)}
    ended = await asyncio.to_thread(seed.job_execution, aws, job, name)
    assert (ended["status"], ended["statusDetails"]) == ("SUCCEEDED", {"reason_code": "ok"})


async def test_job_for_one_thing_can_be_cancelled(
    aws: Aws, fleet: seed.Fleet, name: str, identity: seed.Identity
) -> None:
    job = await asyncio.to_thread(seed.create_job, aws, fleet, f"job-{name}", {"version": "1.0"}, things=[name])
    await asyncio.to_thread(seed.cancel_job, aws, job, force=True)
    assert (await asyncio.to_thread(seed.job_execution, aws, job, name))["status"] == "CANCELED"


async def test_named_shadow_both_ways(aws: Aws, name: str, identity: seed.Identity) -> None:
    shadow = f"$aws/things/{name}/shadow/name/config"
    async with device(aws, identity, name) as camera:
        await camera.link("up")
        await camera.subscribe(f"{shadow}/update/delta", f"{shadow}/update/accepted")
        version = await asyncio.to_thread(seed.set_desired, aws, name, {"agent": {"log": {"level": "debug"}}})
        delta = await camera.receive("delta")
        assert (delta["version"], delta["state"]) == (version, {"agent": {"log": {"level": "debug"}}})
        await camera.publish(f"{shadow}/update", {"state": {"reported": delta["state"]}, "clientToken": "t2"})
        while (await camera.receive("accepted")).get("clientToken") != "t2":
            pass
    state = await asyncio.to_thread(seed.shadow_state, aws, name)
    assert state["reported"] == state["desired"]
    assert "delta" not in state
    assert await asyncio.to_thread(seed.shadow_state, aws, name, shadow="status") == {}


async def test_reports_go_through_the_rule(aws: Aws, fleet: seed.Fleet, name: str, identity: seed.Identity) -> None:
    async with device(aws, identity, name) as camera:
        await camera.link("up")
        for kind in ("report", "event"):
            assert (
                await camera.publish(f"$aws/rules/camera_fleet/cameras/{name}/{kind}", {"seq": 1, "a": {"b": 2}}) == 0
            )

    async def messages() -> list[dict[str, Any]]:
        return [m for m in await asyncio.to_thread(seed.take_messages, aws, fleet) if m["thing"] == name]

    assert await eventually(messages) == [
        {"thing": name, "kind": kind, "body": {"seq": 1, "a": {"b": 2}}} for kind in ("report", "event")
    ]


async def test_policy_keeps_a_camera_to_itself(aws: Aws, name: str, identity: seed.Identity) -> None:
    async with device(aws, identity, name) as camera:
        await camera.link("up")
        other = "$aws/things/cam-other"
        assert await camera.subscribe(f"{other}/jobs/notify-next", f"$aws/things/{name}/shadow/name/config/get/+") == [
            NOT_AUTHORISED,
            1,
        ]
        assert await camera.publish(f"{other}/shadow/name/config/update", {}) == NOT_AUTHORISED
        assert await camera.publish("$aws/rules/camera_fleet/cameras/cam-other/report", {}) == NOT_AUTHORISED
    async with device(aws, identity, "cam-other") as impostor:
        refusal = await impostor.link("refused")
        assert refusal.connack_packet.reason_code == NOT_AUTHORISED


async def test_claim_provisions_with_a_request_of_its_own_key(aws: Aws, fleet: seed.Fleet) -> None:
    serial = uuid.uuid4().hex[:8]
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "camera")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    create, provision = (
        "$aws/certificates/create-from-csr/json",
        f"$aws/provisioning-templates/{fleet.template}/provision/json",
    )
    async with device(aws, fleet.claim, f"provisioning-{serial}") as claim:
        await claim.link("up")
        filters = [f"{topic}/{end}" for topic in (create, provision) for end in ("accepted", "rejected")]
        assert await claim.subscribe(*filters) == [1, 1, 1, 1]

        for bad in ({"certificateSigningRequest": "nonsense"}, {}, []):
            await claim.publish(create, bad)
            rejected = await claim.receive("create-from-csr/json/rejected")
            assert (rejected["statusCode"], rejected["errorCode"]) == (400, "InvalidParameters")

        pem = csr.public_bytes(serialization.Encoding.PEM).decode()
        await claim.publish(create, {"certificateSigningRequest": pem})
        made = await claim.receive("create-from-csr/json/accepted")
        assert sorted(made) == ["certificateId", "certificateOwnershipToken", "certificatePem"]
        certificate = x509.load_pem_x509_certificate(made["certificatePem"].encode())
        assert certificate.public_key() == key.public_key()

        await claim.publish(provision, {"certificateOwnershipToken": "wrong", "parameters": {"SerialNumber": serial}})
        assert (await claim.receive("provision/json/rejected"))["errorCode"] == "InvalidCertificateOwnershipToken"
        token = made["certificateOwnershipToken"]
        await claim.publish(provision, {"certificateOwnershipToken": token, "parameters": {"SerialNumber": serial}})
        thing = (await claim.receive("provision/json/accepted"))["thingName"]
        assert await claim.publish("$aws/certificates/create/json", {}) == NOT_AUTHORISED
    assert thing == f"cam-{serial}"
    members = await asyncio.to_thread(aws.client("iot").list_things_in_thing_group, thingGroupName=fleet.group)
    assert thing in members["things"]
    plain_key = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    own = seed.Identity("", made["certificatePem"], plain_key.decode())
    async with device(aws, own, thing) as camera:
        await camera.link("up")
        assert await camera.subscribe(f"$aws/things/{thing}/jobs/notify-next") == [1]


async def test_broker_behind_the_proxy_is_cut_and_comes_back(aws: Aws, name: str, identity: seed.Identity) -> None:
    async with Proxy(aws.mqtt_port) as proxy, device(aws, identity, name, proxy.port) as camera:
        await camera.link("up")
        await proxy.cut()
        await camera.link("down")
        await camera.link("refused")
        await proxy.restore()
        await camera.link("up")
        assert await camera.publish(f"$aws/rules/camera_fleet/cameras/{name}/event", {}) == 0


@contextlib.asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1000):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_proxy_plays_the_faults_of_a_network() -> None:
    async with echo_server() as target, Proxy(target) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.blackhole()
        writer.write(b"two")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.readexactly(3)
        await proxy.restore()
        assert await reader.readexactly(3) == b"two"
        proxy.delay_s = 0.05
        before = time.monotonic()
        writer.write(b"three")
        assert await reader.readexactly(5) == b"three"
        assert time.monotonic() - before >= 0.1
        port = proxy.port
        await proxy.cut()
        await proxy.cut()
        with pytest.raises(ConnectionError):
            await reader.readexactly(1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await proxy.restore()
        assert proxy.port == port
        again, second = await asyncio.open_connection("127.0.0.1", port)
        second.write(b"back")
        assert await again.readexactly(4) == b"back"
        assert proxy.accepted == 2
        for end in (writer, second):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()


async def test_whole_sandbox_starts_signs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with fleets.running(tmp_path, cameras=2, agents=False, settings={"jobs": {"commands": "allow"}}) as sandbox:
        assert [camera.thing for camera in sandbox.cameras] == ["cam-0001", "cam-0002"]
        loaded = [await asyncio.to_thread(settings_file.load, camera.config_file) for camera in sandbox.cameras]
        assert [(s.cloud.port, s.jobs.commands) for s in loaded] == [(sandbox.proxy.port, "allow")] * 2
        artifact = await asyncio.to_thread(pipeline.build_artifact, tmp_path / "artifacts", "1.1.0")
        document = await asyncio.to_thread(fleets.update_document, sandbox, artifact, "1.1.0", counter=2)
        manifest = json.loads(base64.b64decode(document["manifest"]["payload"]))
        assert (manifest["version"], manifest["security_counter"]) == ("1.1.0", 2)
        assert await asyncio.to_thread((sandbox.cameras[0].keys_dir / "root.json").is_file)
        roots = [camera.pipeline_root for camera in sandbox.cameras]
        pids = [sandbox.aws.pid, *[await asyncio.to_thread(pipelinectl.running, root) for root in roots]]
        assert all([pid and await asyncio.to_thread(running, pid) for pid in pids])
    assert not any([pid and await asyncio.to_thread(running, pid) for pid in pids])


def test_sandbox_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, complaint in ((["--things", "0"], "at least one"), (["--dir", str(tmp_path)], "is not empty")):
        command = [sys.executable, "-m", "agent.sandbox", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE_PARENT)
        assert answer.returncode == 2
        assert complaint in answer.stderr


def test_aws_keeps_its_state_over_a_restart_and_says_why_it_cannot_start(tmp_path: Path) -> None:
    aws = Aws(tmp_path)
    with aws:
        ports, ca = (aws.http_port, aws.mqtt_port), aws.ca_pem()
        aws.client("iot").create_thing(thingName="cam-1")
        with pytest.raises(RuntimeError, match="started already"):
            aws.start()
        with pytest.raises(OSError, match="in use"):
            Aws(tmp_path / "other", http_port=aws.http_port).start()
        first = aws.pid
    assert not Path(f"/proc/{first}").exists()
    with aws:
        assert (aws.http_port, aws.mqtt_port) == ports
        assert aws.ca_pem() == ca
        assert [thing["thingName"] for thing in aws.client("iot").list_things()["things"]] == ["cam-1"]


def test_aws_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from agent.sandbox.aws import Aws; "
        "aws = Aws(pathlib.Path(sys.argv[1])); aws.start(); print(aws.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
    )
    with parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert running(pid)
        parent.kill()
    wait_until(lambda: not running(pid))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_orphans_stay_below_and_are_ended() -> None:
    program = (
        "import subprocess; from agent.sandbox import orphans; orphans.adopt(); print(orphans.end_all()); "
        "subprocess.run(['sh', '-c', 'sleep 600 & exit']); print(list(orphans.descendants().values())); "
        "print(orphans.end_all()); print(orphans.descendants())"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['sleep 600']", "['sleep 600']", "{}"]


def test_artifact_is_reproducible_and_says_what_it_is(tmp_path: Path) -> None:
    one = pipeline.build_artifact(tmp_path / "a", "1.1.0", "blurry:4")
    two = pipeline.build_artifact(tmp_path / "b", "1.1.0", "blurry:4")
    assert one.read_bytes() == two.read_bytes()
    assert pipeline.build_artifact(tmp_path / "b", "1.1.0").read_bytes() != one.read_bytes()
    with pytest.raises(ValueError, match="no behaviour"):
        pipeline.build_artifact(tmp_path, "1.2.0", "wobbly")
    digest = install_first(tmp_path / "root", one, "1.1.0")
    current = tmp_path / "root" / "current"
    assert str(current.readlink()) == f"slots/{digest}"
    assert (current / "VERSION").read_text() == "1.1.0\n"
    assert "--behaviour blurry:4 " in (current / "pipeline").read_text()
    assert os.access(current / "pipeline", os.X_OK)
    assert os.access(current / "probe", os.X_OK)


def test_camera_is_whole(aws: Aws, fleet: seed.Fleet, tmp_path: Path) -> None:
    camera = make_camera(
        tmp_path / "camera", aws, fleet, serial="77", interval_s=0.1, settings={"telemetry": {"interval_s": 5}}
    )
    try:
        loaded = settings_file.load(camera.config_file)
        assert (loaded.cloud.port, loaded.telemetry.interval_s) == (aws.mqtt_port, 5)
        assert loaded.provisioning.parameters == {"SerialNumber": "77"}
        assert len(str(loaded.api_socket)) < 100
        assert loaded.api_socket == camera.socket
        assert (camera.handler_dir.stat().st_mode & 0o777, camera.handler_dir.is_dir()) == (0o755, True)
        said = subprocess.run([camera.handler_dir / "hello.sh", "root", "a", "fail"], capture_output=True, check=False)
        assert (said.returncode, said.stderr) == (3, b"asked to fail\n")
        assert b"as root: a fail" in said.stdout

        target = loaded.updates.targets["pipeline"]
        assert target.probe
        assert target.restart
        wait_until(lambda: subprocess.run(target.probe, capture_output=True, check=False).returncode == 0)
        newest = pipeline.newest_image(camera.images)
        assert newest
        taken = Image.open(io.BytesIO(newest.read_bytes())).getexif().get_ifd(EXIF_IFD)
        day = newest.parent.parent.name
        assert taken[0x9003].startswith(day.replace("-", ":"))
        assert newest.name == f"{taken[0x9003].replace(':', '').replace(' ', 'T')}.{taken[0x9291]}Z.jpg"

        first = pipelinectl.running(camera.pipeline_root)
        subprocess.run(target.restart, check=True)
        assert pipelinectl.running(camera.pipeline_root) not in (None, first)
        subprocess.run(camera.pipelinectl("stop"), check=True)
        stopped = subprocess.run(target.probe, capture_output=True, text=True, check=False)
        assert (stopped.returncode, stopped.stderr) == (1, "pipeline: the pipeline does not run\n")
        assert subprocess.run(camera.pipelinectl("status"), capture_output=True, check=False).returncode == 3
    finally:
        camera.close()


def test_pipeline_takes_a_new_configuration_and_refuses_a_bad_one(aws: Aws, fleet: seed.Fleet, tmp_path: Path) -> None:
    camera = make_camera(tmp_path / "camera", aws, fleet, interval_s=30)
    log = camera.pipeline_root / "run" / "pipeline.log"
    target = settings_file.load(camera.config_file).config.targets["pipeline"]
    try:
        assert target.check
        assert isinstance(target.apply, list)
        candidate = tmp_path / "candidate.json"
        for document, complaint in (
            ({"interval_s": 900}, "interval_s: 900 is not between 0.05 and 60"),
            ({"interval_s": "1"}, "interval_s: must be a number"),
            ({"quality": 80}, "interval_s: missing"),
            ({"interval_s": 1, "qality": 80}, "qality: unknown key"),
            ({"interval_s": 1, "overlay": "x" * 65}, "overlay: longer than 64 characters"),
        ):
            candidate.write_text(json.dumps(document))
            check = [part.replace("{path}", str(candidate)) for part in target.check]
            answer = subprocess.run(check, capture_output=True, text=True, check=False)
            assert (answer.returncode, answer.stderr) == (1, f"{candidate}: {complaint}\n")
        wait_until(lambda: "started" in log.read_text())
        target.path.write_text('{"interval_s": "soon"}')
        subprocess.run(target.apply, check=True)
        wait_until(lambda: "configuration not taken: interval_s: must be a number" in log.read_text())
        target.path.write_text('{"interval_s": 0.1, "overlay": "new"}')
        subprocess.run(target.apply, check=True)
        wait_until(lambda: len(list(camera.images.rglob("*.jpg"))) >= 5)
        assert not [p for p in camera.images.rglob("*.part") if time.time() - p.stat().st_mtime > 5]
    finally:
        camera.close()
    assert log.read_text().endswith("stopped\n")


def test_pipeline_ends_with_its_owner(tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    (root / "run").mkdir(parents=True)
    (root / "config.json").write_text('{"interval_s": 0.1}')
    install_first(root, pipeline.build_artifact(tmp_path, "1.0.0", "silent"), "1.0.0")
    owner = subprocess.Popen(["sleep", "60"])
    try:
        pipelinectl.write_pid_file(root / "run" / "owner.pid", owner.pid)
        pipelinectl.start(root)
        pid = wait_until(lambda: pipelinectl.running(root))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        wait_until(lambda: pipelinectl.running(root) is None)
        assert not running(pid)
        assert not list(root.rglob("*.jpg")), "a silent pipeline writes nothing"
    finally:
        owner.kill()
        owner.wait()
        pipelinectl.stop(root)


def test_toml_is_read_back_as_it_was() -> None:
    import tomllib

    document = {"name": 'a "b" \\ ü', "n": 1, "x": {"on": True, "list": ["a", "b"], "y": {"z": 0.5}}, "empty": {}}
    assert tomllib.loads(to_toml(document)) == {key: value for key, value in document.items() if key != "empty"}
