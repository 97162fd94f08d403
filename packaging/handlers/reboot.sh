#!/bin/bash
# reboot.sh USER: status 194 asks the agent to reboot the camera; the step is done when the boot id has changed (AWS-Reboot).
set -euo pipefail
echo "a reboot is asked for"
exit 194
