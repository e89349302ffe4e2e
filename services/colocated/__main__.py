"""`python -m services.colocated`: one colocated worker."""

import sys

from services.colocated.worker import ColocatedWorker
from services.worker.start import start

if __name__ == "__main__":
    sys.exit(start(ColocatedWorker))
