"""Kills the quickstart with SIGKILL at random moments and compares with a run left in peace.

    llmlabel run recipes/quickstart.yaml --output runs
    python benchmarks/kill_quickstart.py --whole runs/quickstart

The last start runs to the end. Every file of the two run folders must then have the same bytes,
except notes of times (run.json) and the lock. Writes benchmarks/results/kill_quickstart.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NOTES = {"run.json", "error.log", ".lock"}


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same: every file but notes and what a killed writer left behind."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in NOTES
        and not path.name.startswith((".tmp-", ".old-"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", type=Path, required=True, help="folder of the run in peace")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="longest life of a start")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recipe = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
    rng = np.random.default_rng(arguments.seed)
    died = []
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "llmlabel", "run", str(recipe), "--output", output]
        for moment in rng.uniform(8, arguments.seconds, arguments.kills):
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                time.sleep(moment)
                process.kill()
            run = Path(output) / "quickstart"
            kept = [p.parent.name for p in run.glob("*/kept.json")]
            blocks = len(list(run.glob("*/blocks/*.parquet")))
            died.append(
                {"after_seconds": round(float(moment), 1), "kept": len(kept), "blocks": blocks}
            )
            print(died[-1], flush=True)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        whole, killed = contents(arguments.whole), contents(Path(output) / "quickstart")
    differ = sorted(k for k in whole.keys() | killed.keys() if whole.get(k) != killed.get(k))
    result = {"kills": died, "files": len(whole), "differ": differ}
    print(f"{len(whole)} files, {len(differ)} differ {differ}")
    target = Path(__file__).parent / "results" / "kill_quickstart.json"
    target.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
