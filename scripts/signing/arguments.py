"""The command line of scripts/sign-update."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import commands, root_commands

Run = Callable[[argparse.Namespace], int]

DESCRIPTION = """Signs updates, off-line, on an engineer's machine.

sign-update keys DIR                     make keys and DIR/root.json
sign-update key FILE                     make one key, for somebody who signs elsewhere
sign-update root show|new|sign|check     the keys that cameras trust, and the next version of them
sign-update manifest … ARTIFACT          describe an update in a file that is signed in turn
sign-update sign FILE --key KEY          add a signature
sign-update verify FILE --root root.json what a camera would say of it
sign-update job … ARTIFACT               print the job document of an update

KEY is a PEM file, a name in DIR/keys.json, or pkcs11:token=…;object=… (RFC 7512). Private keys stay where they are;
only root.json goes to the cameras. docs/signing.md leads through it."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="sign-update",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _keys(verbs)
    _root(verbs)
    _manifest(verbs)
    _sign(verbs)
    _job(verbs)
    return result


def _verb(verbs: Any, name: str, run: Run, words: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=words, description=words, allow_abbrev=False)
    verb.set_defaults(run=run, usage=verb.error)
    return verb


def _secrets(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("secrets", "without these options they are asked for on a terminal")
    group.add_argument(
        "--passphrase-file", type=Path, metavar="FILE", help="passphrase of PEM files; or SIGN_UPDATE_PASSPHRASE"
    )
    group.add_argument("--pin-file", type=Path, metavar="FILE", help="PIN of tokens; or SIGN_UPDATE_PIN")
    group.add_argument("--module", default="", metavar="FILE", help="PKCS#11 library of tokens without module-path=")


def _yes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--yes", action="store_true", help="do not ask on a terminal before signing")


def _keys(verbs: Any) -> None:
    keys = _verb(verbs, "keys", root_commands.keys, "make keys and root.json")
    keys.add_argument("directory", type=Path, metavar="DIR")
    keys.add_argument("--expires-days", type=int, default=3650, metavar="D", help="life of root.json (default 3650)")
    for role in ("release", "emergency"):
        keys.add_argument(
            f"--{role}", type=int, metavar="N", help=f"{role} keys to make (default 1; 0 with --{role}-key)"
        )
        keys.add_argument(
            f"--{role}-key",
            action="append",
            default=[],
            metavar="KEY",
            help=f"a {role} key that is there: PEM, private or public, or pkcs11:…",
        )
        keys.add_argument(
            f"--{role}-threshold", type=int, default=1, metavar="N", help="how many must sign (default 1)"
        )
    keys.add_argument("--encrypt", action="store_true", help="ask for a passphrase for the new keys")
    _secrets(keys)
    key = _verb(verbs, "key", root_commands.key, "make one key, NAME.key.pem and NAME.pub.pem")
    key.add_argument("file", type=Path, metavar="NAME.key.pem")
    key.add_argument("--encrypt", action="store_true", help="ask for a passphrase for it")
    _secrets(key)


def _root(verbs: Any) -> None:
    root = verbs.add_parser("root", help="show, renew, sign and check root documents", allow_abbrev=False)
    verbs = root.add_subparsers(dest="root_command", required=True, metavar="show|new|sign|check")
    show = _verb(verbs, "show", root_commands.root_show, "say what is in a root document and what it lacks")
    show.add_argument("file", type=Path, metavar="FILE")
    new = _verb(verbs, "new", root_commands.root_new, "write DIR/<N+1>.root.json, which emergency keys then sign")
    new.add_argument("--keys", type=Path, required=True, metavar="DIR")
    for role in ("release", "emergency"):
        new.add_argument(
            f"--add-{role}", action="append", default=[], metavar="KEY", help="PEM, private or public, or pkcs11:…"
        )
        new.add_argument(f"--{role}-threshold", type=int, metavar="N", help="how many must sign (default: as before)")
    new.add_argument(
        "--remove", action="append", default=[], metavar="KEYID", help="its first 6 characters or more, or its name"
    )
    new.add_argument("--expires-days", type=int, default=3650, metavar="D", help="life of the new root (default 3650)")
    new.add_argument(
        "--sign", action="store_true", help="sign with the emergency keys of both versions that are at hand"
    )
    _secrets(new)
    sign = _verb(verbs, "sign", root_commands.root_sign, "add the signature of an emergency key")
    sign.add_argument("file", type=Path, metavar="FILE")
    sign.add_argument("--key", action="append", required=True, metavar="KEY")
    sign.add_argument(
        "--keys", type=Path, metavar="DIR", help="folder whose names --key may use (default: that of FILE)"
    )
    sign.add_argument(
        "--previous", type=Path, metavar="FILE", help="the version before (default: looked for beside FILE)"
    )
    _yes(sign)
    _secrets(sign)
    check = _verb(verbs, "check", root_commands.root_check, "say whether cameras that trust OLD will take NEW")
    check.add_argument("old", type=Path, metavar="OLD")
    check.add_argument("new", type=Path, metavar="NEW")


def _terms(verb: argparse.ArgumentParser, *, required: bool) -> None:
    verb.add_argument("--target", required=required, help="update target of the camera, as in [updates.targets.NAME]")
    verb.add_argument("--installer", choices=["app", "deb", "rauc", "agent"], required=required)
    verb.add_argument("--name", help="product, whose security counter it is (deb: its Package)")
    verb.add_argument("--version", help="newer than what is installed, in Debian's order (deb, rauc: as they say)")
    verb.add_argument(
        "--counter", type=int, required=required, help="security counter; lower ones are refused after a commit"
    )
    verb.add_argument("--id", default="", help="name of the document (default NAME-VERSION-random)")
    verb.add_argument(
        "--stable-for", type=float, default=120, metavar="S", help="all must be well so long (default 120)"
    )
    verb.add_argument("--deadline", type=float, default=900, metavar="S", help="time for the trial (default 900)")
    verb.add_argument(
        "--min-capture-ratio",
        type=float,
        default=0.8,
        metavar="R",
        help="least share of the image rate before (default 0.8)",
    )
    verb.add_argument(
        "--offline-policy",
        choices=["commit", "roll_back"],
        default="commit",
        help="a camera that was off-line before: leave the cloud out of the trial, or demand it",
    )
    verb.add_argument("--restart", choices=["none", "unit", "reboot"], help="default unit; reboot for rauc")
    verb.add_argument(
        "--rollback", choices=["yes", "no"], default="yes", help="whether the version before can come back"
    )
    verb.add_argument(
        "--compatible", action="append", default=[], metavar="KIND", help="kind of camera it fits (default all)"
    )
    verb.add_argument(
        "--requires", action="append", default=[], metavar="NAME=VERSION", help="least version of another product"
    )
    verb.add_argument(
        "--arch", choices=["any", "x86_64", "aarch64", "armv7l"], help="default any (deb: its Architecture)"
    )
    verb.add_argument("--expires-days", type=int, default=365, metavar="D", help="life of the signature (default 365)")
    verb.add_argument("--expires", metavar="INSTANT", help="the same as an instant, 2026-12-31T00:00:00Z")
    verb.add_argument("--emergency", action="store_true", help="sign with the emergency keys too")
    verb.add_argument("--allow-downgrade", action="store_true", help="may replace a newer version; implies --emergency")


def _manifest(verbs: Any) -> None:
    manifest = _verb(
        verbs, "manifest", commands.manifest, "write the manifest of an update, signed by the keys at hand"
    )
    manifest.add_argument("--keys", type=Path, metavar="DIR", help="folder of `keys`; without it nothing is signed")
    manifest.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default NAME-VERSION.manifest.json; must not exist"
    )
    _terms(manifest, required=True)
    manifest.add_argument("artifact", type=Path, metavar="ARTIFACT")
    _yes(manifest)
    _secrets(manifest)


def _sign(verbs: Any) -> None:
    sign = _verb(verbs, "sign", commands.sign, "show a manifest and add signatures to it")
    sign.add_argument("file", type=Path, metavar="FILE")
    sign.add_argument("--key", action="append", default=[], metavar="KEY")
    _trust(sign, required=False)
    _yes(sign)
    _secrets(sign)
    verify = _verb(verbs, "verify", commands.verify, "say what a camera would say of a manifest or job document")
    verify.add_argument("file", type=Path, metavar="FILE")
    _trust(verify, required=True)
    verify.add_argument("--artifact", type=Path, metavar="ARTIFACT", help="look whether this is the signed one")


def _job(verbs: Any) -> None:
    job = _verb(verbs, "job", commands.job, "sign an artifact and print the job document")
    _trust(job, required=True)
    job.add_argument("--manifest", type=Path, metavar="FILE", help="a manifest that is signed already")
    job.add_argument(
        "--url",
        action="append",
        required=True,
        help="http(s)://…, s3://BUCKET/KEY, iot-stream:STREAM/FILE or a presigned-url placeholder; several are tried in turn",
    )
    job.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there instead of printing it")
    _terms(job, required=False)
    job.add_argument(
        "artifact", type=Path, nargs="?", metavar="ARTIFACT", help=".tar.gz or .tar.zst (app, agent), .deb, or bundle"
    )
    _yes(job)
    _secrets(job)


def _trust(verb: argparse.ArgumentParser, *, required: bool) -> None:
    group = verb.add_mutually_exclusive_group(required=required)
    group.add_argument("--keys", type=Path, metavar="DIR", help="folder that `keys` made")
    group.add_argument("--root", type=Path, metavar="FILE", help="root document, or a folder of them")
