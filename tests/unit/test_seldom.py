"""Log lines that a stranger can cause: one a minute of each kind, the others counted."""

from structlog.testing import capture_logs

from agent.cloud.seldom import Seldom
from agent.logs import get_logger


def test_one_a_minute_of_each_kind_and_the_number_left_out():
    now = [0.0]
    seldom = Seldom(get_logger("test"), clock=lambda: now[0])
    with capture_logs() as lines:
        for second in range(150):
            now[0] = float(second)
            seldom.warning("odd", topic="a")
        seldom.warning("other")
    assert [(line["event"], line.get("left_out")) for line in lines] == [
        ("odd", None),
        ("odd", 59),
        ("odd", 59),
        ("other", None),
    ]
