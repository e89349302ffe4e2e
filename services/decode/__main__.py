"""`python -m services.decode`: one decode worker."""

from common.service import checked, leave
from common.settings import WorkerSettings

if __name__ == "__main__":
    checked(WorkerSettings, "decode")

    from services.decode.worker import DecodeWorker
    from services.worker.start import start

    leave(start(DecodeWorker))
