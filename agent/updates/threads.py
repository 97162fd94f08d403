"""See `agent.host.threads`."""

from agent.host.threads import to_end

__all__ = ["to_end"]
