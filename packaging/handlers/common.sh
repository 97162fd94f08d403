# shellcheck shell=bash
# Shared by the handlers beside it, which source it; not executable, so it can't be asked for as a handler itself.
# Exit statuses: 1 it was tried and failed, 2 the arguments can't be used, 3 this camera's own policy does not allow it.

set -euo pipefail
export LC_ALL=C

fail() { # fail STATUS SENTENCE
  printf '%s\n' "$2" >&2
  exit "$1"
}

shown() { # shown TEXT: at most 80 characters of it, quoted, on one line
  local text=${1:0:80}
  printf '%s' "${text@Q}"
}

listed() { # listed NAME…: joined by commas
  local IFS=,
  local text="$*"
  printf '%s' "${text//,/, }"
}

reason() { # reason OUTPUT: the first line of what a program said
  local text=${1%%$'\n'*}
  printf '%s' "${text%.}"
}

split() { # split WHAT ARGUMENT…: fills the array `words` with the blank-separated names of all arguments
  local what=$1 argument part
  words=()
  for argument in "${@:2}"; do
    [[ $argument != *[[:cntrl:]]* ]] || fail 2 "$what: $(shown "$argument") holds a line break or another control character; separate the names by blanks"
    IFS=' ' read -ra part <<<"$argument"
    words+=("${part[@]}")
  done
  ((${#words[@]})) || fail 2 "$what: no name was given; name one or more, separated by blanks"
}

systemd_runs() {
  command -v systemctl >/dev/null && [[ $(systemctl is-system-running 2>/dev/null || true) != @(offline|) ]]
}

# ---- Services

to_unit() { # to_unit NAME: sets `unit`
  [[ $1 =~ ^[A-Za-z0-9_][A-Za-z0-9:_.@\\-]{0,199}$ ]] || fail 2 "services: $(shown "$1") is not the name of a unit; nothing was changed"
  case $1 in
    *.service | *.socket | *.timer | *.path) unit=$1 ;;
    *.target | *.slice | *.scope | *.mount | *.automount | *.swap | *.device)
      fail 2 "services: $1 is not a service; services, sockets, timers and paths can be named; nothing was changed" ;;
    *) unit=$1.service ;;
  esac
}

look_at() { # look_at UNIT: sets `state`, a table of its properties
  local key value
  state=()
  while IFS='=' read -r key value; do state[$key]=$value; done < <(
    systemctl show --property=Id,LoadState,ActiveState,SubState,Type,Result,NRestarts -- "$1"
  )
}

is_up() { # of the unit looked at last: it runs, or it did what a oneshot unit is there for
  [[ ${state[ActiveState]-} == @(active|reloading) ]] ||
    [[ ${state[Type]-} == oneshot && ${state[ActiveState]-} == inactive && ${state[Result]-} == success ]]
}

change_services() { # change_services start|stop|restart NAME…: in order, up to the first that fails
  local verb=$1 unit output word i did=() units=() restarts=()
  local -A state past=([start]=started [stop]=stopped [restart]=restarted)
  split services "${@:2}"
  for word in "${words[@]}"; do
    to_unit "$word"
    units+=("$unit")
  done
  systemd_runs || fail 1 "services: systemd does not run here, so no service can be ${past[$verb]}"
  for unit in "${units[@]}"; do
    look_at "$unit"
    [[ ${state[Id]-$unit} != camera-agent?(-*).service && $unit != camera-agent?(-*).service ]] ||
      fail 3 "services: $unit belongs to the agent itself; use the operation \"restart\" for it; nothing was changed"
    [[ ${state[LoadState]-} == loaded ]] ||
      fail 1 "services: $unit can't be used on this camera (${state[LoadState]:-systemd gives no answer}); nothing was changed"
  done
  for i in "${!units[@]}"; do
    unit=${units[i]}
    output=$(systemctl --no-ask-password "$verb" -- "$unit" 2>&1 </dev/null) || explain "$verb" "$unit" "$output"
    look_at "$unit"
    if [[ $verb == stop ]]; then
      [[ ${state[ActiveState]-} == @(inactive|failed) ]] || explain "$verb" "$unit" "it is ${state[ActiveState]-unknown} afterwards"
    else
      is_up || explain "$verb" "$unit" "it is ${state[ActiveState]-unknown} (${state[SubState]-}) afterwards"
    fi
    restarts+=("${state[NRestarts]-}")
    did+=("$unit")
  done
  if [[ $verb != stop ]]; then
    sleep "${CAMERA_AGENT_SETTLE_S:-2}"
    for i in "${!units[@]}"; do
      look_at "${units[i]}"
      { is_up && [[ ${state[NRestarts]-} == "${restarts[i]}" ]]; } ||
        fail 1 "services: ${units[i]} was ${past[$verb]} and did not stay up (${state[ActiveState]-}, ${state[Result]-}); ${past[$verb]}: $(listed "${did[@]}"); see journalctl -u ${units[i]}"
    done
  fi
  echo "${past[$verb]}: $(listed "${did[@]}")"
}

explain() { # explain VERB UNIT OUTPUT: ends the handler; says what is done (from change_services: did, units, i) and what is not
  local status=1 hint="see journalctl -u $2" rest=("${units[@]:i+1}")
  case $3 in
    *"ccess denied"* | *"uthentication required"* | *"ot authorized"*)
      status=3 hint="the polkit rules of this camera (/etc/polkit-1/rules.d/50-camera-agent.rules) must name the unit and \"$1\"" ;;
  esac
  fail "$status" "services: could not $1 $2: $(reason "$3"); done before: $(listed "${did[@]:-none}"); not tried: $(listed "${rest[@]:-none}"); $hint"
}

# ---- Packages

change_packages() { # change_packages install|remove NAME[=VERSION]…: by the root helper, which knows the camera's policy
  local helper=${CAMERA_AGENT_PACKAGES_HELPER:-/usr/libexec/camera-agent/packages}
  local results=${CAMERA_AGENT_PACKAGES_RUN:-/run/camera-agent-packages}
  local word id request unit output='' code text patience=60
  split packages "${@:2}"
  for word in "${words[@]}"; do
    [[ $word =~ ^[a-z0-9][A-Za-z0-9.+~:=-]*$ ]] || fail 2 "packages: $(shown "$word") is not NAME or NAME=VERSION of a Debian package; nothing was changed"
  done
  id=$(</proc/sys/kernel/random/uuid)
  id=${id%%-*}
  request="$1 $id ${words[*]}"
  request=${request// /_} request=${request//=/@} request=${request//+/\\x2b} request=${request//\~/\\x7e}
  if systemd_runs; then
    unit=camera-agent-packages@$request.service
    ((${#unit} <= 255)) || fail 2 "packages: the list is too long for one step; name fewer packages, the others in another step; nothing was changed"
    output=$(systemctl --no-ask-password start -- "$unit" 2>&1 </dev/null) || true
    # An upgrade of dbus or systemd may cut systemctl off; the unit goes on, so what counts is its state and its result.
    until [[ -e $results/$id ]]; do
      case $(systemctl show --property=ActiveState --value -- "$unit" 2>/dev/null || echo unknown) in
        activating | deactivating) ;;
        unknown) ((patience-- > 0)) || break ;;
        *) break ;;
      esac
      sleep 1
    done
  elif ((EUID == 0)); then
    # A session of its own: ending the handler must not end apt in the middle of unpacking.
    setsid --wait "$helper" "$request" >/dev/null 2>&1 </dev/null || true
  else
    fail 1 "packages: systemd does not run here and the agent is not root, so apt can't be used"
  fi
  if [[ ! -e $results/$id ]]; then
    case $output in
      *"ccess denied"* | *"uthentication required"* | *"ot authorized"*)
        fail 3 "packages: the agent may not start camera-agent-packages@.service; install polkitd and /etc/polkit-1/rules.d/51-camera-agent-packages.rules" ;;
    esac
    fail 1 "packages: no result from camera-agent-packages@.service: $(reason "${output:-it ended early}"); is it installed, and was it killed? see journalctl -u 'camera-agent-packages@*'"
  fi
  {
    read -r code
    text=$(cat)
  } <"$results/$id"
  [[ $code =~ ^[0-9]{1,3}$ ]] || fail 1 "packages: $results/$id can't be read"
  ((code == 0)) || fail "$code" "$text"
  printf '%s\n' "$text"
}
