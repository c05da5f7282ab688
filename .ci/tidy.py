"""Strip blanks from the ends of lines, and end each file with one newline: `python .ci/tidy.py FILE…`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def tidy(text: str) -> str:
    """The text without trailing blanks; an empty one stays empty."""
    stripped = re.sub(r"[ \t]+(?=\n|\Z)", "", text).rstrip("\n")
    return stripped + "\n" if stripped else ""


def main() -> None:
    """Rewrite the files that are not tidy; those who call see by the change that there were some."""
    for path in map(Path, sys.argv[1:]):
        before = path.read_text(encoding="utf-8")
        after = tidy(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"tidied {path}")


if __name__ == "__main__":
    main()
