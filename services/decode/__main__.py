"""`python -m services.decode`: one decode worker."""

import sys

from services.decode.worker import DecodeWorker
from services.worker.start import start

if __name__ == "__main__":
    sys.exit(start(DecodeWorker))
