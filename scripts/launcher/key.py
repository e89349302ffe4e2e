"""`./scripts/key NAME [OPTION...]`: a new API key and the line that admits it."""

from __future__ import annotations

import secrets
import sys

from common.errors import SettingError
from gateway.keys import HASH, NAME, digest, given_keys

KEY_BYTES = 24


USAGE = "usage: ./scripts/key NAME [running=N] [requests=N] [tokens=N] [priority]"


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    name, *options = words or [""]
    if not NAME.fullmatch(name) or name.startswith("-"):
        print(f"{USAGE}; a name has letters, digits, dots, dashes and underscores, and begins with no dash", file=sys.stderr)
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
