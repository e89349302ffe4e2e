"""`python -m services.prefill`: one prefill worker."""

from common.service import checked, leave
from common.settings import WorkerSettings

if __name__ == "__main__":
    checked(WorkerSettings, "prefill")

    from services.prefill.worker import PrefillWorker
    from services.worker.start import start

    leave(start(PrefillWorker))
