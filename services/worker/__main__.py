"""`python -m services.worker LAUNCHES WORDS`: one rank of a worker, started by its rank 0 with the file descriptors of two sockets."""

import sys

from common.service import leave
from services.worker.rank import serve

if __name__ == "__main__":
    if len(sys.argv) != 3 or not all(word.isdecimal() for word in sys.argv[1:]):
        print("ranks are started by their worker: python -m services.prefill --tp N --pp N", file=sys.stderr)
        leave(2)
    leave(serve(int(sys.argv[1]), int(sys.argv[2])))
