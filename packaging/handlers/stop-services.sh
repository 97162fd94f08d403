#!/bin/bash
# stop-services.sh USER SERVICES: stops the units that SERVICES names, separated by blanks (AWS-Stop-Application).
set -euo pipefail
# shellcheck source=packaging/handlers/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"
change_services stop "${@:2}"
