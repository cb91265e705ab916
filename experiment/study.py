"""Train the runs of a study, one process of main.py each, and write RESULTS.md.

    python experiment/study.py digits                               # within an hour on two cores
    python experiment/study.py cifar100 --data_dir PATH             # days on two cores; cifar10: a night
    python experiment/study.py cifar100 --data_dir PATH --only 'depthwise-*-0'   # one table, one seed
    python experiment/study.py cifar100 --data_dir PATH --check     # evaluates the kept networks again
    python experiment/study.py                                      # writes RESULTS.md from the records

studies.py lists the runs. PATH is the data set as a tree of image files, train/<class>/* and test/<class>/*. A finished
run has a record in results/STUDY.jsonl, and results/students/ keeps the networks that the runs of seed 0 exported. The
same command continues an interrupted study, also in the middle of a run. Give another --out to train everything again.

--check prints the recorded and the found test accuracy of each kept network; the exit code is 1 if any two differ.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import checkpoint, options  # before torch: utils undoes settings of OpenMP

# isort: split
import torch

import data
from data.loader import Batches
from experiment.results import networks_folder, read_records, records_file, trained, write_results
from experiment.studies import STUDIES, Row, Table
from utils.device import apply_execution, cores, pick_device, pick_execution
from utils.engine import DIVERGED
from utils.errors import UserError
from utils.metrics import accuracy
from utils.options import MAY_CHANGE
from utils.setup import run_script

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("num_students", "lambda", "miu")
ACCURACIES, COSTS = ("val", "test", "val_top5", "test_top5"), ("params", "macs")
POLL = 0.2  # seconds between looks at the runs in training
PATHS = ("data_dir", "teacher_dir", "job_dir")  # of the machine that trained a network; not kept with it


class Run(NamedTuple):
    """One run of main.py: a row of a table, with a seed."""

    study: str
    table: Table
    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.table.key}-{self.row.variant}-{self.seed}"

    @property
    def flags(self) -> str:
        """Flags of main.py, without the paths and the seed."""
        table = "" if "--pretrain" in self.row.flags else self.table.flags
        return " ".join(filter(None, (STUDIES[self.study].flags, table, self.row.flags)))

    @property
    def teacher(self) -> "Run | None":
        """The run that trains the pretrained teacher of this one, if it has one."""
        return next((run for run in grid(self.study) if run.row.variant == self.row.teacher), None)


def grid(study: str, only: str = "*") -> Iterator[Run]:
    """The runs of a study whose names match the pattern `only`, in training order."""
    for table in STUDIES[study].tables:
        runs = [Run(study, table, row, seed) for row in table.rows for seed in range(row.seeds or STUDIES[study].seeds)]
        yield from (run for run in sorted(runs, key=lambda run: run.seed) if fnmatch(run.name, only))


class Runner:
    """Trains the runs of a study, several at a time, in folders of `out`, and records their results."""

    def __init__(self, out: Path, data_dir: Path | None, jobs: int | None):
        self.out, self.data_dir = out.resolve(), data_dir
        gpus, cpus = torch.cuda.device_count(), cores()
        self.jobs = jobs or gpus or cpus
        threads = {"OMP_NUM_THREADS": str(max(1, cpus // self.jobs))}
        # Environment variables of each run that may be started now.
        self.slots = [{"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else threads for i in range(self.jobs)]
        self.waiting: list[Run] = []
        self.running: dict[Run, tuple[subprocess.Popen, dict[str, str]]] = {}
        self.commits: dict[Run, str | None] = {}  # of the code that the runs started with

    def run(self, study: str, only: str = "*") -> None:
        """Train and record the runs without a record, and the teachers that they need.

        Raises:
            UserError: no run matches; the folder of a run belongs to another one; a run failed (after all others).
        """
        if not (runs := list(grid(study, only))):
            raise UserError(f"the study {study} has no run '{only}': its runs have names like {next(grid(study)).name}")
        done = {record["run"] for record in read_records(self.out, study)}
        self.waiting = [run for run in runs if run.name not in done]
        missing = [run.teacher for run in self.waiting if run.teacher and not self.exported(run.teacher).exists()]
        self.waiting = [*dict.fromkeys(run for run in missing if run not in self.waiting), *self.waiting]
        for run in self.waiting:
            self.check_folder(run)
        for folder in (self.out / "study" / study, networks_folder(self.out, study)):
            folder.mkdir(parents=True, exist_ok=True)
        print(f"{study}: {len(done)} runs are recorded, {len(self.waiting)} to do, {self.jobs} at a time", flush=True)
        for run in [run for run in self.waiting if self.read(run, "report.json")]:
            self.waiting.remove(run)
            self.keep(run)
        failed = []
        try:
            while (ready := self.next_run()) or self.running:
                if ready and self.slots:
                    self.start(ready)
                    continue
                time.sleep(POLL)
                for run in [run for run, (process, _) in self.running.items() if process.poll() is not None]:
                    self.slots.append(self.running.pop(run)[1])
                    if not self.keep(run):
                        failed.append(run)
                        print(f"{run.name} FAILED, see {self.log(run)}", flush=True)
        finally:  # after Ctrl-C or an error, the others save their state
            for process, _ in self.running.values():
                process.terminate()
            for process, _ in self.running.values():
                process.wait()
        failed += self.waiting  # their teachers failed
        if failed:
            log = self.log(failed[0])
            raise UserError(f"{len(failed)} runs failed, such as that of {log}: give the command again afterwards")

    def next_run(self) -> Run | None:
        """The first waiting run that needs no teacher, or a trained one."""
        return next((run for run in self.waiting if not run.teacher or self.exported(run.teacher).exists()), None)

    def start(self, run: Run) -> None:
        self.waiting.remove(run)
        slot, self.commits[run] = self.slots.pop(0), _commit()
        with open(self.log(run), "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", *self.command(run), "--resume"],
                cwd=ROOT, env=os.environ | slot, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others in order
            )  # fmt: skip
        self.running[run] = process, slot

    def command(self, run: Run) -> list[str]:
        paths = ["--job_dir", str(self.job_dir(run))]
        if run.teacher:
            paths += ["--teacher_dir", str(self.exported(run.teacher))]
        if self.data_dir:
            paths += ["--data_dir", str(self.data_dir.resolve())]
        return ["main.py", *shlex.split(run.flags), "--seed", str(run.seed), *paths]

    def check_folder(self, run: Run) -> None:
        """Raise a UserError if the run's folder has a run with other flags, or other defaults."""
        if not (was := self.read(run, "config.json")):
            return
        now = options.parse("main", self.command(run)[1:]).recorded()
        for name in sorted(set(now) - MAY_CHANGE | {"num_epochs"}):
            if now[name] not in (None, was.get(name)):  # None: settled by main.py
                raise UserError(
                    f"{self.job_dir(run)} was trained with --{name} {was.get(name)}, not {now[name]}: delete it, or "
                    "give another --out"
                )

    def read(self, run: Run, name: str) -> dict[str, Any] | None:
        """The content of a JSON file of the run; None if it does not exist."""
        path = self.job_dir(run) / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def job_dir(self, run: Run) -> Path:
        return self.out / "study" / run.study / run.name

    def log(self, run: Run) -> Path:
        return self.job_dir(run).with_suffix(".log")

    def exported(self, run: Run) -> Path:
        """Where the network is kept that a run of seed 0 exported."""
        return networks_folder(self.out, run.study) / f"{run.name}.pt"

    def keep(self, run: Run) -> bool:
        """Append the record, keep the exported network of seed 0, and write RESULTS.md. False if the run failed."""
        if not (record := self.record(run)):
            return False
        if run.seed == 0 and "diverged" not in record:
            (exported,) = self.job_dir(run).glob("*.pt")
            content = checkpoint.load(exported)
            content.meta.config.update(dict.fromkeys(PATHS))
            checkpoint.save(self.exported(run), content)
        if run.name not in {known["run"] for known in read_records(self.out, run.study)}:
            with open(records_file(self.out, run.study), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        outcome = "diverged" if "diverged" in record else f"{record['test']:.2f} % on the test set"
        print(f"{run.name}: {outcome}; {len(self.waiting)} to do", flush=True)
        write_results(self.out)
        return True

    def record(self, run: Run) -> dict[str, Any] | None:
        """A run's settings, accuracies, costs and environment; only its settings if it diverged; None if it failed."""
        if not (config := self.read(run, "config.json")):
            return None
        kept = {"run": run.name, "table": run.table.key, "variant": run.row.variant, "model": config["teacher_model"]}
        kept |= {"conv": config["conv"], "seed": run.seed, "settings": {name: config[name] for name in SETTINGS}}
        if not (report := self.read(run, "report.json")):
            last = self.log(run).read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
            finite = not last.startswith(f"error: {DIVERGED}")
            return None if finite else kept | {"diverged": last.split(": ")[1]}
        networks, environment = report["networks"], report["environment"]
        (chosen,) = (row for row in networks if row["exported"])
        by_role = {row["role"]: row for row in networks}
        online = by_role.get("online_teacher")
        return kept | {
            **_values(chosen, ACCURACIES),
            "students": [_values(row, ACCURACIES) for row in networks if row["role"] == "student"],
            "online_teacher": _values(online, ACCURACIES + COSTS) if online else None,
            "teacher": _values(by_role["standard"], ACCURACIES) if config["teacher_dir"] else None,
            "disagreement": report["disagreement"],
            **_values(chosen, COSTS),
            "data": report["data"],
            "start": report["start"],
            "flags": run.flags + (f" --teacher_dir {{{run.row.teacher}}}" if run.row.teacher else ""),
            "environment": {key: environment[key] for key in ("device", "threads", "execution", "precision", "torch")},
            "seconds": round(report["seconds"]),
            "commit": self.commits.get(run),
        }


def check(out: Path, study: str, data_dir: Path | None, only: str = "*") -> bool:
    """Score the kept networks of the runs `only` on the test set; return whether all have their recorded accuracies.

    Raises:
        UserError: no network is kept, or the data is not that of the study.
    """
    recorded = {record["run"]: f"{record['test']:.2f}" for record in trained(read_records(out, study))}
    paths = sorted(networks_folder(out, study).glob(f"{only}.pt"))
    if not paths:
        raise UserError(f"{networks_folder(out, study)} has no networks '{only}' to check")
    device = pick_device("auto")
    apply_execution(pick_execution("auto", "fp32", device))
    dataset, differ = None, []
    for path in paths:
        network, meta = checkpoint.load_network(path)
        dataset = dataset or data.load(meta.config["dataset"], data_dir, meta.config["val_size"], cores())
        test = dataset.normalized_as(meta.mean, meta.std, meta.classes, path)
        batches = Batches(test.test, meta.config["eval_batch_size"], test.mean, test.std, device)
        found = f"{accuracy(network.to(device), batches).top1:.2f}"
        expected = recorded.get(path.stem, "none")
        differ += [path.stem] if found != expected else []
        print(f"{path.stem}: recorded {expected}, found {found}{' DIFFERENT' * (found != expected)}", flush=True)
    print(f"{len(paths) - len(differ)} of {len(paths)} networks have their recorded test accuracy")
    return not differ


def _values(row: dict[str, Any], keys: Sequence[str]) -> dict[str, float]:
    return {key: row[key] for key in keys if key in row}


def _commit() -> str | None:
    """The commit that is checked out, None outside of a git repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def main(args: argparse.Namespace) -> None:
    if args.jobs is not None and args.jobs < 1:
        raise UserError("--jobs must be 1 or more")
    if not args.study and (args.check or args.only != "*"):
        raise UserError("--check and --only are about one study: name it, too")
    if args.study:
        if STUDIES[args.study].data and not args.data_dir:
            raise UserError(f"the study {args.study} needs --data_dir, {STUDIES[args.study].data}")
        if args.check:
            sys.exit(0 if check(args.out, args.study, args.data_dir, args.only) else 1)
        runner = Runner(args.out, args.data_dir, args.jobs)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            runner.run(args.study, args.only)
        except KeyboardInterrupt:
            print("interrupted: the runs are saved; the same command continues them", file=sys.stderr)
            sys.exit(130)
    write_results(args.out)
    print(f"wrote {args.out / 'RESULTS.md'}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        "experiment/study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", choices=tuple(STUDIES), help="without one: only write RESULTS.md")
    parser.add_argument("--data_dir", type=Path, metavar="PATH", help="of the images, for the studies of CIFAR")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only the runs whose names match")
    parser.add_argument("--check", action="store_true", help="score the kept networks again instead of training")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU, or else one a core)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "experiment", metavar="PATH", help="where everything is written"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()
    run_script(lambda: main(ARGS))
