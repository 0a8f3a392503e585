"""Without the judge, its tests are skipped; what they share is not looked at for examples, which would import it."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("spmd_types") else ["group.py", "operators.py", "program.py"]
