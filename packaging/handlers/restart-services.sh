#!/bin/bash
# restart-services.sh USER SERVICES: restarts the units that SERVICES names, separated by blanks (AWS-Restart-Application).
set -euo pipefail
# shellcheck source=packaging/handlers/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"
change_services restart "${@:2}"
