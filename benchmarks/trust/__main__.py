"""What the page on trust states, measured again: `python -m benchmarks.trust [NAME ...] [--long] [--write]`.

Without `--write` nothing is written: each paragraph is printed as it comes out now, and the exit status is 1 where
something does not hold. With it the numbers go to NAME.json and the page to README.md of this folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime

from benchmarks.running import machine
from benchmarks.trust.paragraph import HERE, NAMES, kept, page, paragraph
from fisherviz.support.files import write_whole


def main() -> int:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--long", action="store_true", help="the whole measurements, which take hours")
    parser.add_argument("--write", action="store_true", help="keep the numbers and write the page")
    parser.add_argument("--page", action="store_true", help="write the page from the numbers that are kept, no more")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"no paragraph is called {', '.join(unknown)}; they are {', '.join(NAMES)}")
    broken = []
    for name in () if arguments.page else arguments.names or NAMES:
        module = paragraph(name)
        found = module.measure(arguments.long)
        print("\n\n".join([f"## {module.TITLE}", *module.words(found)]), flush=True)
        broken += [f"{name}: {sentence}" for sentence in module.broken(found)]
        if arguments.write:
            entry = {
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": machine(),
                "found": found,
            }
            halves = kept(name) | {"long" if arguments.long else "short": entry}
            write_whole(HERE / f"{name}.json", json.dumps(halves, indent=1, ensure_ascii=False) + "\n")
    if arguments.write or arguments.page:
        write_whole(HERE / "README.md", page())
    for sentence in broken:
        print(f"does not hold: {sentence}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
