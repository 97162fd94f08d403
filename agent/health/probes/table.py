"""The list of checks: the first failure that is shown is the root cause."""

from agent.health.probes import local, network
from agent.health.probes.model import Check

CHECKS = (
    Check("config", "configuration file", "critical", local.check_config),
    Check("clock", "clock", "critical", local.check_clock),
    Check("disk", "disk space", "critical", local.check_disk, ("config",)),
    Check("identity", "certificate and key files", "critical", local.check_identity, ("config",)),
    Check("certificate", "certificate's validity", "critical", local.check_certificate, ("identity", "clock")),
    Check("key", "key belongs to certificate", "critical", local.check_key, ("identity",)),
    Check("link", "network link", "critical", network.check_link, ("config",)),
    Check("route", "default route", "critical", network.check_route, ("link",)),
    Check("dns", "name of the endpoint", "critical", network.check_dns, ("route",),
          silent=("no name server answers", "check the name servers: `cat /etc/resolv.conf`, `resolvectl status`")),
    Check("tcp", "connection to the endpoint", "critical", network.check_tcp, ("dns",),
          silent=("a firewall drops the packets, or the network is cut off", "allow outgoing TCP 8883 or 443 in the firewall")),
    Check("tls", "TLS with the endpoint", "critical", network.check_tls, ("tcp", "clock", "certificate", "key")),
    Check("daemon", "agent's daemon", "critical", network.check_daemon, ("config", "disk")),
    Check("mqtt", "session with the cloud", "critical", network.check_mqtt, ("daemon", "tls")),
    Check("capture", "images from the sources", "critical", local.check_capture, ("config", "disk"), 3.5,
          ("the disk or network share of the images hangs", "see `mount` and `sudo dmesg | tail`")),
)  # fmt: skip
