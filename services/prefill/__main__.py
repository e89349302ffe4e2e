"""`python -m services.prefill`: one prefill worker."""

from common.service import leave
from services.prefill.worker import PrefillWorker
from services.worker.start import start

if __name__ == "__main__":
    leave(start(PrefillWorker))
