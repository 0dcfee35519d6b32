"""How long the report of a run takes whose metrics.jsonl has 3 million lines.

python experiments/long_log/run.py
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from hjepa_jax.configs.shapes_tiny import get_config

NUM_LINES = 3_000_000
HERE = pathlib.Path(__file__).parent


def main() -> None:
    lines = (HERE.parent / "shapes_tiny" / "report" / "metrics.jsonl").read_text().splitlines()
    rests = [line.partition(",")[2] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        (workdir / "config.json").write_text(json.dumps(get_config().to_dict()))
        with (workdir / "metrics.jsonl").open("w") as file:
            for step in range(1, NUM_LINES + 1):
                file.write(f'{{"step": {step},{rests[step % len(rests)]}\n')
        size = (workdir / "metrics.jsonl").stat().st_size
        command = [sys.executable, "-m", "hjepa_jax.report", f"--workdir={workdir}"]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(f"{NUM_LINES:,} lines, {size / 1e9:.2f} GB: {seconds:.1f} s, {cpu:.1f} s of CPU")


if __name__ == "__main__":
    main()
