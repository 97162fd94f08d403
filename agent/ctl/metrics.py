"""`agentctl metrics`: every measurement as OpenMetrics text, as Prometheus scrapes it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from agent.ctl import output
from agent.ctl.client import Client, garbled
from agent.ctl.exits import ANSWERED


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = "Print all measurements as OpenMetrics text, or as JSON."


def run(arguments: Namespace, client: Client) -> int:
    if arguments.json:
        output.show_json(client.get("/v1/metrics", metrics=list))
    else:
        text = client.text("/metrics").removesuffix("\n")
        if not text.endswith("# EOF"):
            raise garbled("it is not OpenMetrics text")
        output.show(text)
    return ANSWERED
