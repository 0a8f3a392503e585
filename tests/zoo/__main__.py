"""``python -m tests.zoo > docs/zoo.md`` writes the page; ``python -m tests.zoo NAME ...`` tells of some only."""

import sys
import time

from tests.zoo.report import everything, page, run

if __name__ == "__main__":
    started = time.perf_counter()
    rows = run(sys.argv[1:] or everything())
    if not sys.argv[1:]:
        print(page(rows))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
