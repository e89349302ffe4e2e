"""`python -m services.decode`: one decode worker."""

from common.service import leave
from services.decode.worker import DecodeWorker
from services.worker.start import start

if __name__ == "__main__":
    leave(start(DecodeWorker))
