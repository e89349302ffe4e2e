"""`python -m services.colocated`: one colocated worker."""

from common.service import leave
from services.colocated.worker import ColocatedWorker
from services.worker.start import start

if __name__ == "__main__":
    leave(start(ColocatedWorker))
