# shellcheck shell=bash
# Sourced by the other scripts: sets up .venv from the lock files, and Debian's packages when root.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

say() { printf '\033[2m== %s\033[0m\n' "$*" >&2; }

need_debian() { # need_debian PACKAGE…: installs what is missing when root; otherwise returns 1 and names it
  local missing=()
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing Debian packages: ${missing[*]} (as root: apt-get install ${missing[*]})" >&2
    return 1
  fi
  say "installing Debian packages: ${missing[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null; }
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
    [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$candidate"; return; }
  done
  echo "no Python 3.11 or later found: apt-get install python3 (Debian 12), or set PYTHON" >&2
  return 1
}

set_up_venv() { # set_up_venv LOCKFILE: .venv holds exactly what the lock file names, and this package
  local lock=$1 python stamp
  stamp="$(cat "$lock" pyproject.toml | sha256sum | cut -d' ' -f1)"
  if [ -x .venv/bin/agentctl ] && grep -qsx "$stamp" .venv/.locked; then return; fi
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python 2>/dev/null) || { need_debian python3 && python=$(find_python); }
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null && ! { need_debian python3-venv && "$python" -c 'import ensurepip, venv' 2>/dev/null; }; then
      echo "$python can't make the virtual environment .venv, which all scripts need. Do one of these and start again:" >&2
      echo "  sudo apt-get install python3-venv" >&2
      echo "  PYTHON=/path/to/python $0   (another Python, 3.11 or later, that has venv and ensurepip)" >&2
      return 1
    fi
    "$python" -m venv .venv || { rm -rf .venv; return 1; }
  fi
  say "installing $lock into .venv (once)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes -r requirements/build.txt -r "$lock"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation --editable .
  .venv/bin/python -m compileall -q agent || true
  echo "$stamp" >>.venv/.locked
}
