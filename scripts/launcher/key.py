"""`./scripts/key NAME [OPTION...]`: a new API key and the line that admits it."""

from __future__ import annotations

import secrets
import sys

from common.errors import SettingError
from gateway.keys import HASH, NAME, digest, given_keys

KEY_BYTES = 24


def main(words: list[str]) -> int:
    name, *options = words or [""]
    if not NAME.fullmatch(name):
        print("usage: ./scripts/key NAME [running=N] [requests=N] [tokens=N] [priority]", file=sys.stderr)
        return 2
    key = secrets.token_hex(KEY_BYTES)
    line = " ".join([f"{name}:{HASH}:{digest(key).hex()}", *options])
    try:
        given_keys(line, None)
    except SettingError as error:
        print(f"./scripts/key: {error}", file=sys.stderr)
        return 2
    print(f"the key of {name}, shown this once: {key}", file=sys.stderr)
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
