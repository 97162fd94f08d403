#!/bin/bash
# download-file.sh USER URL PATH [sha256=HEX] [mode=0644]: fetches URL to PATH, the whole file or none (AWS-Download-File).
# URL may end with #sha256=HEX. A cut download goes on where it stopped, also in a later job for the same URL and PATH.
set -euo pipefail
# shellcheck source=packaging/handlers/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"
readonly policy=${CAMERA_AGENT_DOWNLOAD_ALLOW:-/etc/camera-agent/download.allow}
readonly longest_wait_s=${CAMERA_AGENT_DOWNLOAD_WAIT_S:-30} most_failures=8 most_tries=200

read_policy() { # sets folders, and plain: the hosts that may be asked without TLS
  local line number=0 owner mode
  folders=() plain=(localhost 127.0.0.1 '[::1]')
  if [[ ! -e $policy ]]; then
    folders=(/var/lib/camera-agent/files)
    return
  fi
  read -r owner mode < <(stat -Lc '%u 0%a' -- "$policy")
  if [[ $owner != 0 && $owner != "$EUID" ]] || ((mode & 022)); then
    fail 3 "download: $policy can be changed by others (chown root, chmod go-w); nothing is allowed until it is mended"
  fi
  while read -r line || [[ $line ]]; do
    ((number += 1))
    line=${line%%#*}
    line=${line%"${line##*[![:space:]]}"}
    case $line in
      '') ;;
      /*) folders+=("$(realpath -m -- "$line")") ;;
      http://?*) line=${line#http://} && plain+=("${line%/}") ;;
      *) fail 3 "download: line $number of $policy is neither a folder nor http://HOST; nothing is allowed until it is mended" ;;
    esac
  done <"$policy"
}

read_url() { # read_url URL: sets url, sha256 and shown_url, which holds no secret
  local pattern='^(https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?([/?][^[:space:][:cntrl:]"<>\^`{|}]*)?$' host
  url=${1%%#*}
  shown_url=${url%%\?*}
  [[ $url =~ $pattern ]] || fail 2 "download: the URL can't be used; it must be https://HOST/… without a user or password in it"
  if [[ $1 == *'#'* ]]; then
    [[ ${1#*#} =~ ^sha256=([0-9A-Fa-f]{64})$ ]] || fail 2 "download: what follows # in the URL is not sha256= and 64 hexadecimal digits"
    sha256=${BASH_REMATCH[1],,}
    [[ $url =~ $pattern ]]
  fi
  [[ ${BASH_REMATCH[1]} == http ]] || return 0
  for host in "${plain[@]}"; do
    if [[ $host == "${BASH_REMATCH[2]}" || $host == "${BASH_REMATCH[2]}${BASH_REMATCH[3]}" ]]; then return 0; fi
  done
  fail 3 "download: $shown_url is not https; where that is meant, put http://${BASH_REMATCH[2]} into $policy"
}

read_options() { # read_options OPTION…: sets sha256 and mode
  local option
  for option in "$@"; do
    case $option in
      '') ;;
      sha256=*)
        [[ ${option#*=} =~ ^[0-9A-Fa-f]{64}$ ]] || fail 2 "download: sha256= needs 64 hexadecimal digits"
        option=${option#*=}
        [[ ! $sha256 || $sha256 == "${option,,}" ]] || fail 2 "download: the URL and the argument name different checksums"
        sha256=${option,,} ;;
      mode=*)
        mode=${option#*=}
        [[ $mode =~ ^0?[0-7]{3}$ ]] || fail 2 "download: mode= needs three octal digits, such as 0644" ;;
      *) fail 2 "download: $(shown "$option") is not known here; sha256=HEX and mode=OCTAL are" ;;
    esac
  done
}

read_path() { # read_path PATH: sets target and folder, with every link and .. resolved, when it may be written
  local allowed
  [[ $1 == /* && $1 != */ && $1 != *[[:cntrl:]]* ]] || fail 2 "download: $(shown "$1") is not the absolute path of a file"
  target=$(realpath -m -- "$1" 2>/dev/null) || fail 2 "download: $(shown "$1") leads nowhere"
  folder=${target%/*}
  case $target in
    /var/lib/camera-agent/files/*) ;;
    /var/lib/camera-agent/* | /etc/camera-agent/*) fail 3 "download: $target belongs to the agent itself" ;;
  esac
  for allowed in "${folders[@]}"; do
    if [[ $target == "${allowed%/}"/* ]]; then
      [[ ! -d $target ]] || fail 2 "download: $target is a folder; give the path of the file"
      return
    fi
  done
  fail 3 "download: $target is outside the folders that this camera allows ($(listed "${folders[@]:-none}")); add its folder to $policy"
}

not_writable() {
  fail 1 "download: $(id -un) can't write in $folder; change its owner, or name it in ReadWritePaths= (systemctl edit camera-agent.service)"
}

room_for() { # room_for FILE: sets size, its bytes, and room, how many more the disk takes: 64 MiB or 5 % stay free
  local free all
  size=$(stat -c %s -- "$1")
  read -r free all < <(df --output=avail,size -B1 -- "$folder" | tail -n 1)
  room=$((free - (all / 20 < 67108864 ? all / 20 : 67108864)))
  ((room > 0)) || no_space
}

no_space() {
  rm -f -- "$partial" "$headers"
  fail 1 "download: not enough space in $folder for $shown_url (64 MiB or 5 % of the disk stay free); $target is as it was"
}

header() { # header NAME FILE: its value in the last answer of FILE
  awk -v name="${1,,}:" '/^HTTP\// { value = "" } tolower($1) == name { $1 = ""; sub(/^ /, ""); sub(/\r$/, ""); value = $0 } END { print value }' "$2" 2>/dev/null || true
}

ask() { # ask: one request; sets code, curl's status, http and said. Only what was begun with the same ETag, or has a checksum, is gone on with
  local etag more=() answers=$headers
  room_for "$partial"
  etag=$(header etag "$headers")
  if ((size)) && [[ $etag == '"'* || $sha256 ]]; then
    answers=$answer resumed=1 more=(--continue-at "$size")
    if [[ $etag == '"'* ]]; then more+=(--header "If-Range: $etag"); fi
  else
    start_again
  fi
  code=0
  # The file size limit holds where the server does not say how much there is.
  http=$(ulimit -c 0 -f $(((size + room) / 1024 + 1)) && exec curl --disable --silent --show-error --fail --globoff \
    --location --max-redirs 5 --proto "=${url%%:*}" --proto-redir =https --connect-timeout 20 --speed-limit 500 --speed-time 60 \
    --max-filesize "$room" --dump-header "$answers" --output "$partial" --stderr "$errors" --write-out '%{http_code}' \
    "${more[@]}" -- "$url" </dev/null 2>/dev/null) || code=$?
  said=$(tail -n 1 -- "$errors" 2>/dev/null | cut -d'?' -f1 | cut -c-200)
}

start_again() {
  rm -f -- "$headers"
  : >"$partial"
  size=0 resumed=0
}

judge() { # of one request: returns 0 when the file is whole, 1 to try again; ends the handler where that is of no use
  case $code:$http in
    0:416 | 22:416) # nothing after what is here: whole if the sizes agree
      [[ $(header content-range "$answer") == "bytes */$size" ]] && return 0
      start_again
      return 1 ;;
    0:200) return 0 ;;
    0:206) ((resumed)) && return 0
      fail 1 "download: $shown_url: HTTP 206 although the whole file was asked for" ;;
    0:*) fail 1 "download: $shown_url: HTTP $http is no file" ;;
    22:408 | 22:425 | 22:429 | 22:5??) return 1 ;;
    22:401 | 22:403) fail 1 "download: $shown_url: HTTP $http; a presigned URL may have expired, or its role may not read the object: make the job again" ;;
    22:*) fail 1 "download: $shown_url: HTTP $http" ;;
    33:* | 36:*) # another file by now, or a server without ranges
      start_again
      return 1 ;;
    1:* | 3:* | 47:*) fail 1 "download: $shown_url: ${said:-not possible} (redirects: at most 5, to https only)" ;;
    60:* | 77:*) fail 1 "download: $shown_url: the server's certificate is not trusted; check this camera's clock and ca-certificates; ${said:-}" ;;
    23:* | 63:* | 153:*) no_space ;;
    *) return 1 ;;
  esac
}

fetch() { # until the file is whole: at most most_failures tries in a row that bring nothing
  local failures=0 number before wait_s=1
  for ((number = 0; number < most_tries; number++)); do
    before=$(stat -c %s -- "$partial")
    ask
    if judge; then return; fi
    if (($(stat -c %s -- "$partial") > before)); then failures=0 wait_s=1; else ((failures += 1)); fi
    ((failures < most_failures)) || break
    sleep $((wait_s < longest_wait_s ? wait_s : longest_wait_s))
    ((wait_s *= 2))
  done
  fail 1 "download: $shown_url: given up after $((number + (number < most_tries))) tries (HTTP ${http/000/none}; ${said:-no answer}); $(stat -c %s -- "$partial") bytes are kept for the next job"
}

clean_up() {
  rm -f -- "$answer" "$errors"
  [[ -s $partial ]] || rm -f -- "$partial" "$headers"
}

digest() { sha256sum <"$1" | cut -d' ' -f1; }

(($# >= 3)) || fail 2 "download: give the URL and the path of the file"
sha256='' mode=0644 resumed=0 code=0 http='' said=''
read_policy
read_url "$2"
read_options "${@:4}"
read_path "$3"
command -v curl >/dev/null || fail 1 "download: curl is not installed on this camera (apt-get install curl)"
mkdir -p -- "$folder" 2>/dev/null || not_writable
[[ $(realpath -- "$folder") == "$folder" ]] || fail 3 "download: $folder changed meanwhile"
if [[ $sha256 && -f $target && $(digest "$target") == "$sha256" ]]; then
  chmod -- "$mode" "$target"
  echo "already there: $target, sha256 $sha256"
  exit 0
fi
exec 9<"$folder"
flock -w 60 9 || fail 1 "download: another download into $folder is under way"
name=.${target##*/}
partial=$folder/$name.$(printf '%s' "$shown_url" | sha256sum | cut -c-16).part
headers=$partial.headers answer=$partial.answer errors=$partial.errors
trap clean_up EXIT
# Of earlier jobs with other URLs nothing is of use any more.
find "$folder" -maxdepth 1 -name "${name//[\\*?[]/?}.????????????????.part*" ! -name "${partial##*/}*" -delete 2>/dev/null || true
[[ ! -L $partial ]] || fail 3 "download: $partial is a link"
{ : >>"$partial"; } 2>/dev/null || not_writable

fetch
if [[ $sha256 && $(digest "$partial") != "$sha256" ]] && ((resumed)); then
  start_again
  fetch
fi
found=$(digest "$partial")
if [[ $sha256 && $found != "$sha256" ]]; then
  rm -f -- "$partial" "$headers"
  fail 1 "download: $shown_url has the sha256 $found, wanted was $sha256; $target is as it was"
fi
bytes=$(stat -c %s -- "$partial")
chmod -- "$mode" "$partial"
sync -- "$partial" || fail 1 "download: $folder: the disk did not take the file; $target is as it was"
[[ $(realpath -- "$folder") == "$folder" ]] || fail 3 "download: $folder changed meanwhile"
mv -fT -- "$partial" "$target" || fail 1 "download: $target can't be replaced"
sync -- "$folder" || true
rm -f -- "$headers"
if [[ $sha256 ]]; then checked="checked"; else checked="not checked, no sha256 was given"; fi
echo "$target: $bytes bytes from $shown_url, sha256 $found ($checked)"
