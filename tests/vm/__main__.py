"""scripts/rauc-vm: updates by RAUC verity bundles in a virtual machine, with power cuts, as a table."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from tests.vm import image
from tests.vm.cases import CASES, Bench
from tests.vm.drive import Camera, Unexpected


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "camera-agent-vm"
    parser = argparse.ArgumentParser(prog="rauc-vm", description=__doc__)
    parser.add_argument("--cache", type=Path, default=cache, metavar="DIR", help=f"kernel, Debian, images ({cache})")
    parser.add_argument(
        "--only", action="append", choices=[case.name for case in CASES], help="only this case, and those it needs"
    )
    parser.add_argument("--all", action="store_true", help="more cut points, and an image whose agent never starts")
    parser.add_argument("-v", "--verbose", action="store_true", help="say all that happens")
    arguments = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        print("rauc-vm: the libraries of Python 3.11 are needed, which is what Debian 12 runs", file=sys.stderr)
        return 2
    began = time.monotonic()
    folder = arguments.cache.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kernel, release = image.kernel(folder)
    base = image.debian(folder, kernel.parent.parent / "lib" / "modules" / release, release)
    images = image.Images(folder / "run", base)
    disks = folder / "run" / "disks"
    print(f"images made in {time.monotonic() - began:.0f} s", file=sys.stderr)
    camera = Camera(images, disks, kernel, verbose=arguments.verbose)
    try:
        return show(Bench(camera, images), arguments.only, everything=arguments.all, began=began)
    finally:
        camera.close()
        if not arguments.verbose:
            shutil.rmtree(folder / "run", ignore_errors=True)


def show(bench: Bench, only: list[str] | None, *, everything: bool, began: float) -> int:
    """Run the cases and print the table; the number of those that failed."""
    camera, rows, failed = bench.camera, [], 0
    for case in CASES:
        if (only and case.name not in only and not case.always) or (case.more and not everything):
            continue
        print(f"== {case.words}", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            words, verdict = case.run(bench, everything), "ok"
        except Unexpected as error:
            words, verdict = str(error).strip().splitlines()[-1], "FAILED"
            failed += 1
            bench.begin_anew()
        rows.append((verdict, case.words, words, time.monotonic() - started))
        print(f"   {verdict}: {words}", file=sys.stderr, flush=True)
        if verdict == "FAILED" and case.always:
            break
    boots = sorted(camera.boots) or [0.0]
    print(f"\n{camera.software}, QEMU without KVM")
    for verdict, title, words, took in rows:
        print(f"{verdict:6}  {title:58}  {took:4.0f} s  {words}")
    print(f"{camera.cuts} power cuts tried, every other one losing the drives' caches ({camera.lost} writes), {len(camera.boots)} starts of {boots[0]:.0f} to {boots[-1]:.0f} s, "
          f"{time.monotonic() - began:.0f} s in all, {failed} failed")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
