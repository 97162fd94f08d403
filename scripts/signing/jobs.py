"""The job document that carries a signed manifest, and the AWS commands that send it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.updates.addresses import is_usable, stream_of
from agent.updates.manifest import Manifest

from .errors import SigningError

MAX_DOCUMENT_BYTES = 32 * 1024
MAX_STREAM_BYTES = 24_000_000
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
S3_URL = re.compile(rf"s3://({BUCKET})/([!-~]+)")
PLACEHOLDER = re.compile(r"\$\{aws:iot:s3-presigned-url:https?://[!-|~]+\}")
S3_PLACE = re.compile(rf"https?://s3(?:[.-][a-z0-9-]+)?\.amazonaws\.com(?:\.cn)?/({BUCKET})/([!-|~]+)\}}")


def job_url(url: str) -> str:
    """The URL as the job document needs it: s3:// becomes a placeholder that AWS replaces by a signed URL."""
    match = S3_URL.fullmatch(url)
    if match and not set("{}$") & set(url):
        return f"${{aws:iot:s3-presigned-url:https://s3.amazonaws.com/{match[1]}/{match[2]}}}"
    if stream_of(url) or PLACEHOLDER.fullmatch(url) or (is_usable(url) and url.isascii()):
        return url
    raise SigningError(
        f"--url {url}: give http://, https://, s3://BUCKET/KEY, iot-stream:STREAM/FILE with FILE from 0 to 255, or "
        "${aws:iot:s3-presigned-url:https://…}, in ASCII"
    )


def job_document(manifest: Manifest, envelope: Mapping[str, Any], urls: Sequence[str]) -> str:
    """The JSON text for `aws iot create-job`. Raises SigningError."""
    document = {
        "version": "1.0",
        "operation": "update",
        "target": manifest.target,
        "manifest": envelope,
        "urls": [job_url(url) for url in urls],
    }
    text = json.dumps(document, indent=2, ensure_ascii=True) + "\n"
    if len(text) >= MAX_DOCUMENT_BYTES:
        raise SigningError(f"the job document has {len(text)} bytes, AWS takes less than {MAX_DOCUMENT_BYTES}")
    return text


def warnings(manifest: Manifest, urls: Sequence[str]) -> list[str]:
    """What will not work as it stands."""
    streams = [url for url in urls if stream_of(url)]
    if not streams or manifest.size <= MAX_STREAM_BYTES:
        return []
    alone = "" if len(streams) < len(urls) else "; give another URL"
    return [f"{streams[0]}: the artifact has {manifest.size} bytes, AWS IoT streams take {MAX_STREAM_BYTES}{alone}"]


def next_commands(manifest: Manifest, urls: Sequence[str], artifact: Path | None, document: Path | None) -> list[str]:
    """The commands that upload the artifact and send the job; what is in capitals is the engineer's to fill in."""
    local = shlex.quote(str(artifact or "ARTIFACT"))
    written = [job_url(url) for url in urls]
    places = [found for url in written if PLACEHOLDER.fullmatch(url) and (found := S3_PLACE.search(url))]
    commands = [f"aws s3 cp {local} {shlex.quote(f's3://{found[1]}/{found[2]}')}" for found in places]
    bucket, key = (places[0][1], places[0][2]) if places else ("BUCKET", "KEY")
    for stream in filter(None, map(stream_of, written)):
        files = json.dumps([{"fileId": stream[1], "s3Location": {"bucket": bucket, "key": key}}])
        commands.append(
            f"aws iot create-stream --stream-id {stream[0]} --files {shlex.quote(files)} "
            "--role-arn arn:aws:iam::ACCOUNT:role/ROLE"
        )
    place = f"file://{document or 'JOB.json'}"
    create = (
        f"aws iot create-job --job-id {re.sub('[^A-Za-z0-9_-]', '-', manifest.id)[:64]} "
        f"--targets arn:aws:iot:REGION:ACCOUNT:thinggroup/GROUP "
        f"--document {shlex.quote(place)}"
    )
    if any(PLACEHOLDER.fullmatch(url) for url in written):
        create += " --presigned-url-config roleArn=arn:aws:iam::ACCOUNT:role/ROLE,expiresInSec=3600"
    return [*commands, create]
