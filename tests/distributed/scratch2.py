import sys, time
from tests.distributed.test_sharded_clipper import *


def many(part):
    failed = {}
    for check in CHECKS:
        if part not in check.__name__:
            continue
        torch.manual_seed(0)
        t = time.time()
        try:
            check()
            failed[check.__name__] = round(time.time() - t, 2)
        except BaseException:
            failed[check.__name__] = traceback.format_exc()
    return failed


if __name__ == "__main__":
    for rank, r in enumerate(run_processes(2, many, sys.argv[1] if len(sys.argv) > 1 else "")):
        for k, v in r.items():
            if rank == 0 or isinstance(v, str):
                print(rank, k, v)
