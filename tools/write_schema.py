#!/usr/bin/env python3
"""Writes docs/results.schema.json, the JSON Schema of a result file, from results/record.py.

python3 tools/write_schema.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from results import file

TO = Path(file.__file__).parent.parent / "docs" / "results.schema.json"

if __name__ == "__main__":
    file.write_text(TO, json.dumps(file.schema(), indent=1) + "\n")
