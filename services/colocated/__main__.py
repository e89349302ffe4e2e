"""`python -m services.colocated`: one colocated worker."""

from common.service import checked, leave
from common.settings import WorkerSettings

if __name__ == "__main__":
    checked(WorkerSettings, "colocated")

    from services.colocated.worker import ColocatedWorker
    from services.worker.start import start

    leave(start(ColocatedWorker))
