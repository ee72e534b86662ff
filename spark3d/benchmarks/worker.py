"""One measurement in a process of its own: a job as JSON in, its result as one line of JSON out.

python -m spark3d.benchmarks.worker 2 '{"measure": "time", ...}'
"""

import json
import sys

import torch

from spark3d.benchmarks.cases import Job
from spark3d.benchmarks.core import run_job
from spark3d.benchmarks.meter import machine
from spark3d.benchmarks.profile import profile_run


def main() -> None:
    """Run the job given on the command line with so many threads."""
    threads, text = sys.argv[1:]
    torch.set_num_threads(int(threads))
    job = Job.from_dict(json.loads(text))
    do = profile_run if job.measure == "profile" else run_job
    result = {"result": do(job), "machine": machine(int(threads))}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
