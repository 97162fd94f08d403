"""Every topic the agent uses, on one page, and the rules AWS IoT has for topics. Pure."""

from __future__ import annotations

from agent.errors import CloudError

MAX_TOPIC_BYTES = 256
MAX_SLASHES = 7
MAX_PAYLOAD_BYTES = 128 * 1024
MAX_FILTERS_PER_SUBSCRIBE = 8
MAX_SUBSCRIPTIONS = 50
RULES_PREFIX = "$aws/rules/"
SHARE_PREFIX = "$share/"
NEXT_JOB = "$next"


def jobs_notify_next(thing: str) -> str:
    """Notification: the head of the job list changed."""
    return f"$aws/things/{thing}/jobs/notify-next"


def job_get(thing: str, job_id: str = NEXT_JOB) -> str:
    """Request: describe a job execution, by default the next one."""
    return f"$aws/things/{thing}/jobs/{job_id}/get"


def job_update(thing: str, job_id: str) -> str:
    """Request: change the status of a job execution."""
    return f"$aws/things/{thing}/jobs/{job_id}/update"


def job_replies(thing: str) -> tuple[str, str]:
    """Filters of the answers to `job_get` and `job_update` for whatever job."""
    return job_get(thing, "+") + "/+", job_update(thing, "+") + "/+"


def shadow(thing: str, name: str) -> str:
    """Prefix of a shadow's topics; `name` empty is the classic shadow."""
    return f"$aws/things/{thing}/shadow" + (f"/name/{name}" if name else "")


def shadow_get(thing: str, name: str) -> str:
    """Request: the whole shadow."""
    return shadow(thing, name) + "/get"


def shadow_update(thing: str, name: str) -> str:
    """Request: change the shadow."""
    return shadow(thing, name) + "/update"


def shadow_delta(thing: str, name: str) -> str:
    """Notification: what is desired differs from what is reported."""
    return shadow(thing, name) + "/update/delta"


def stream_describe(thing: str, stream_id: str) -> str:
    """Request: which files a stream has."""
    return f"$aws/things/{thing}/streams/{stream_id}/describe/json"


def stream_get(thing: str, stream_id: str) -> str:
    """Request: blocks of a stream's file."""
    return f"$aws/things/{thing}/streams/{stream_id}/get/json"


def stream_replies(thing: str) -> tuple[str, ...]:
    """Filters of the answers to `stream_describe` and `stream_get` for whatever stream."""
    return tuple(f"$aws/things/{thing}/streams/+/{kind}/json" for kind in ("description", "data", "rejected"))


def stream_reply(topic: str) -> tuple[str, str]:
    """Stream id and kind (`description`, `data` or `rejected`) of an answer's topic."""
    return topic.split("/")[4], topic.split("/")[5]


def certificate_from_csr() -> str:
    """Request: a certificate for a certificate signing request."""
    return "$aws/certificates/create-from-csr/json"


def register_thing(template: str) -> str:
    """Request: make the thing of a provisioning template and activate its certificate."""
    return f"$aws/provisioning-templates/{template}/provision/json"


def report(prefix: str, thing: str) -> str:
    """Publish: one document for each telemetry window."""
    return f"{prefix}/{thing}/report"


def event(prefix: str, thing: str) -> str:
    """Publish: conditions that set or clear."""
    return f"{prefix}/{thing}/event"


def accepted(request: str) -> str:
    """Where the service answers `request` with success."""
    return request + "/accepted"


def rejected(request: str) -> str:
    """Where the service answers `request` with a refusal."""
    return request + "/rejected"


def problem(topic: str) -> str:
    """What is wrong with publishing to `topic`, in words; empty when it is fine.

    The first three levels of `$aws/rules/<rule>/` don't count, and reserved topics are exempt from the limit on slashes.
    """
    counted = topic
    if topic.startswith(RULES_PREFIX):
        _, separator, counted = topic.removeprefix(RULES_PREFIX).partition("/")
        if not separator or not counted:
            return "a topic below $aws/rules/ needs a rule name and a topic"
    if any(wildcard in topic for wildcard in "+#"):
        return "a topic to publish to can't hold the wildcards + and #"
    return _malformed(counted, reserved=topic.startswith("$aws/") and counted is topic)


def filter_problem(topic_filter: str) -> str:
    """What is wrong with subscribing to `topic_filter`, in words; empty when it is fine.

    The first two levels of `$share/<name>/` don't count. Basic Ingest topics go to the rules engine only.
    """
    counted = topic_filter
    if topic_filter.startswith(SHARE_PREFIX):
        name, separator, counted = topic_filter.removeprefix(SHARE_PREFIX).partition("/")
        if not separator or not name or any(wildcard in name for wildcard in "+#"):
            return "a filter below $share/ needs a name and a filter"
    if (counted + "/").startswith(RULES_PREFIX):
        return "topics below $aws/rules/ go to the rules engine only, nobody can subscribe to them"
    *parents, last = counted.split("/")
    if any("#" in level for level in parents) or ("#" in last and last != "#"):
        return "the wildcard # stands alone in the last level only"
    if any("+" in level and level != "+" for level in (*parents, last)):
        return "the wildcard + stands alone in its level only"
    return _malformed(counted, reserved=counted.startswith("$aws/"))


def _malformed(topic: str, *, reserved: bool) -> str:
    if not topic:
        return "the topic is empty"
    if "\0" in topic:
        return "the topic holds a null character"
    try:
        size = len(topic.encode())
    except UnicodeEncodeError:
        return "the topic is not valid Unicode"
    if size > MAX_TOPIC_BYTES:
        return f"the topic has {size} bytes, AWS IoT takes {MAX_TOPIC_BYTES}"
    if not reserved and topic.count("/") > MAX_SLASHES:
        return f"the topic has {topic.count('/')} slashes, AWS IoT takes {MAX_SLASHES}"
    return ""


def check_message(topic: str, size: int) -> None:
    """Raises CloudError for a message of `size` bytes that AWS IoT would close the connection over."""
    wrong = problem(topic)
    if wrong:
        raise CloudError("topic_not_valid", f"can't publish to {topic[:300]!r}: {wrong}")
    if size > MAX_PAYLOAD_BYTES:
        raise CloudError("packet_too_large", f"{size} bytes for {topic}: AWS IoT takes {MAX_PAYLOAD_BYTES}")


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a message on `topic` belongs to `topic_filter`. As in AWS IoT `a/#` does not match `a`."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if wanted[0] in ("+", "#") and topic.startswith("$"):
        return False
    for position, part in enumerate(wanted):
        if part == "#":
            return len(levels) > position
        if position >= len(levels) or part not in ("+", levels[position]):
            return False
    return len(wanted) == len(levels)
