#!/bin/bash
# install-packages.sh USER PACKAGES: installs the Debian packages that PACKAGES names, separated by blanks (AWS-Install-Application).
set -euo pipefail
# shellcheck source=packaging/handlers/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"
change_packages install "${@:2}"
