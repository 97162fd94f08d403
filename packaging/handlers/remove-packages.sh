#!/bin/bash
# remove-packages.sh USER PACKAGES: removes the Debian packages that PACKAGES names, separated by blanks (AWS-Remove-Application).
set -euo pipefail
# shellcheck source=packaging/handlers/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"
change_packages remove "${@:2}"
