"""`python -m services.prefill`: one prefill worker."""

import sys

from services.prefill.worker import PrefillWorker
from services.worker.start import start

if __name__ == "__main__":
    sys.exit(start(PrefillWorker))
