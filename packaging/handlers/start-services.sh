#!/bin/bash
# start-services.sh USER SERVICES: starts the units that SERVICES names, separated by blanks (AWS-Start-Application).
set -euo pipefail
# shellcheck source=packaging/handlers/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"
change_services start "${@:2}"
