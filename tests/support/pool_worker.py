"""One worker of `Pool`: jobs come on standard input, results go to standard output, everything else to stderr."""

import importlib
import os
import pickle

from hvd_slowmo.comm import naming
from support.pool import Failed


def main() -> None:
    jobs = os.fdopen(os.dup(0), "rb")
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps library output out of the results
    # Each framework has its own Horovod, and the tests of one framework do not need the other's.
    importlib.import_module(os.environ["POOL_HOROVOD"]).init()
    while True:
        try:
            job, arguments, fatal = pickle.load(jobs)
        except EOFError:
            break
        module, name = job.split(":")
        naming.forget()  # every job is a training of its own
        try:
            result = getattr(importlib.import_module(module), name)(**arguments)
        except Exception as error:
            result = Failed(type(error).__name__, str(error))
        pickle.dump(result, results)
        results.flush()
        if fatal:
            os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
