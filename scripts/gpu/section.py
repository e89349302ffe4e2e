"""One section of `./scripts/gpu_check` in a process of its own: a line of JSON, `["name", result]`, for each result as it comes."""

from __future__ import annotations

import importlib
import json
import sys
import traceback


def main() -> int:
    name, model = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    try:
        for result in importlib.import_module(f"scripts.gpu.{name}").results(model):
            print(json.dumps(result), flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps(["error", f"{type(error).__name__}: {error}"[:500]]), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
