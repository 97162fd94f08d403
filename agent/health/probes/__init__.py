"""Doctor's checks: why this camera does not report, or why it has no images, and what to do.

Standard library only, so that agentctl can run them at once and with the daemon down; the daemon runs the same ones.
"""

from agent.health.probes.model import Check, Finding, Site
from agent.health.probes.runner import UnknownCheckError, list_checks, run_checks

__all__ = ["Check", "Finding", "Site", "UnknownCheckError", "list_checks", "run_checks"]
