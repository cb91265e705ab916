"""Does it work? Trains the runs of a study and writes RESULTS.md.

    python experiment/study.py digits                               # within an hour on two cores
    python experiment/study.py cifar100 --data_dir PATH             # days on two cores
    python experiment/study.py cifar10 --data_dir PATH              # a night on two cores
    python experiment/study.py cifar100 --data_dir PATH --only 'depthwise-*-0'   # one table, one seed
    python experiment/study.py cifar100 --data_dir PATH --check     # scores the kept networks on the test set again
    python experiment/study.py                                      # only writes RESULTS.md, from the records

studies.py lists the runs. PATH is the data set as a tree of image files, train/<class>/* and test/<class>/*. Every run
is a process of main.py; as many run at a time as there are GPUs, or else CPU cores (--jobs). A finished run has a
record in results/STUDY.jsonl, and results/students/ keeps the networks that the runs of seed 0 exported. The same
command continues an interrupted study, also in the middle of a run. To train everything again, give another --out.

--check needs no training: it prints the recorded and the found test accuracy of each kept network, and ends with code 1
if they differ for one of them.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path
from threading import Condition
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
        for seed in range(max(row.seeds for row in table.rows)):
            for row in table.rows:
                run = Run(study, table, row, seed)
                if seed < row.seeds and fnmatch(run.name, only):
                    yield run


class Runner:
    """Trains the runs of a study, several at a time, in folders of `out`, and records what they achieved."""

    def __init__(self, out: Path, data_dir: Path | None, jobs: int | None):
        self.out, self.data_dir = out, data_dir
        gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
        self.jobs = jobs or gpus or cores
        threads = {"OMP_NUM_THREADS": str(max(1, cores // self.jobs))}
        self.slots = [{"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else threads for i in range(self.jobs)]
        self.pool = ThreadPoolExecutor(self.jobs)
        self.processes, self.stopped = set(), False
        self.changed = Condition()  # guards the three below, and the records
        self.waiting, self.running, self.failed = [], [], []

    def run(self, study: str, only: str = "*") -> None:
        """Train and record the runs without a record, and the teachers that they need.

        Raises:
            UserError: no run matches; the folder of a run belongs to another one; a run failed (after all others).
        """
        runs = list(grid(study, only))
        if not runs:
            raise UserError(f"the study {study} has no run '{only}': its runs are called as {next(grid(study)).name}")
        done = {record["run"] for record in read_records(self.out, study)}
        self.waiting = [run for run in runs if run.name not in done]
        teachers = dict.fromkeys(run.teacher for run in self.waiting if run.teacher)
        self.waiting = [run for run in teachers if run not in self.waiting and not self.is_done(run)] + self.waiting
        for run in self.waiting:
            self.check_folder(run)
        print(f"{study}: {len(done)} runs are recorded, {len(self.waiting)} to do, {self.jobs} at a time", flush=True)
        futures = [self.pool.submit(self.work, slot) for slot in self.slots]
        wait(futures)
        for future in futures:
            future.result()
        if self.failed:
            log = self.log(self.failed[0])
            raise UserError(f"{len(self.failed)} runs failed, such as that of {log}: give the command again afterwards")

    def work(self, slot: dict[str, str]) -> None:
        """Train one run after another until none is left.

        Args:
            slot: environment variables of these runs.
        """
        while run := self.next_run():
            try:
                record = self.train(run, slot)
                with self.changed:
                    if record:
                        self.keep(run, record)
                    elif not self.stopped:
                        self.failed.append(run)
                        print(f"{run.name} FAILED, see {self.log(run)}", flush=True)
            finally:
                with self.changed:  # also after an error: other threads may be waiting for this run
                    self.running.remove(run)
                    self.changed.notify_all()

    def next_run(self) -> Run | None:
        """The first waiting run whose teacher is trained; waits for teachers in training. None at the end."""
        with self.changed:
            while not self.stopped:
                ready = [run for run in self.waiting if not run.teacher or self.is_done(run.teacher)]
                if ready:
                    self.waiting.remove(ready[0])
                    self.running.append(ready[0])
                    return ready[0]
                if not self.running:
                    self.failed += self.waiting  # their teachers did
                    self.waiting = []
                    return None
                self.changed.wait()
        return None

    def train(self, run: Run, slot: dict[str, str]) -> dict[str, Any] | None:
        """Train the run unless its report exists. Returns its record, None if it failed."""
        if not self.stopped and not (self.job_dir(run) / "report.json").exists():
            self.log(run).parent.mkdir(parents=True, exist_ok=True)
            with open(self.log(run), "a", encoding="utf-8") as log:
                process = subprocess.Popen(
                    [sys.executable, "-u", *self.command(run), "--resume"],
                    cwd=ROOT, env=os.environ | slot, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others in order
                )  # fmt: skip
                self.processes.add(process)
                process.wait()
                self.processes.remove(process)
        return self.record(run)

    def stop(self) -> None:
        """Terminate the runs, which save their state, and wait for them."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()
        with self.changed:
            self.changed.notify_all()
        self.pool.shutdown()

    def command(self, run: Run) -> list[str]:
        paths = ["--job_dir", str(self.job_dir(run))]
        if run.teacher:
            paths += ["--teacher_dir", str(self.exported(run.teacher))]
        if self.data_dir:
            paths += ["--data_dir", str(self.data_dir.resolve())]
        return ["main.py", *shlex.split(run.flags), "--seed", str(run.seed), *paths]

    def check_folder(self, run: Run) -> None:
        """Raise a UserError if the run's folder has a run with other flags, or other defaults."""
        path = self.job_dir(run) / "config.json"
        if not path.exists():
            return
        was = json.loads(path.read_text(encoding="utf-8"))
        now = options.parse("main", self.command(run)[1:]).recorded()
        for name in sorted(set(now) - MAY_CHANGE | {"num_epochs"}):
            if now[name] not in (None, was.get(name)):  # None: settled by main.py
                raise UserError(
                    f"{path.parent} was trained with --{name} {was.get(name)}, not {now[name]}: delete it, or give "
                    "another --out"
                )

    def job_dir(self, run: Run) -> Path:
        return self.out.resolve() / "study" / run.study / run.name

    def log(self, run: Run) -> Path:
        return self.job_dir(run).with_suffix(".log")

    def exported(self, run: Run) -> Path:
        """Where the network is kept that a run of seed 0 exported."""
        return networks_folder(self.out.resolve(), run.study) / f"{run.name}.pt"

    def is_done(self, teacher: Run) -> bool:
        return self.exported(teacher).exists()

    def keep(self, run: Run, record: dict[str, Any]) -> None:
        """Append the record, keep the exported network of seed 0, and write RESULTS.md."""
        if run.seed == 0 and "diverged" not in record:
            (exported,) = self.job_dir(run).glob("*.pt")
            content = checkpoint.load(exported)
            content.meta.config.update(dict.fromkeys(PATHS))
            self.exported(run).parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(self.exported(run), content)
        if run.name not in {known["run"] for known in read_records(self.out, run.study)}:
            with open(records_file(self.out, run.study), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        outcome = "diverged" if "diverged" in record else f"{record['test']:.2f} % on the test set"
        print(f"{run.name}: {outcome}; {len(self.waiting)} to do", flush=True)
        write_results(self.out)

    def record(self, run: Run) -> dict[str, Any] | None:
        """A run's settings, accuracies, costs and environment; only its settings if it diverged; None if it failed."""
        try:
            config = json.loads((self.job_dir(run) / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        kept = {"run": run.name, "table": run.table.key, "variant": run.row.variant, "model": config["teacher_model"]}
        kept |= {"conv": config["conv"], "seed": run.seed, "settings": {name: config[name] for name in SETTINGS}}
        try:
            report = json.loads((self.job_dir(run) / "report.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            last = self.log(run).read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
            finite = not last.startswith(f"error: {DIVERGED}")
            return None if finite else kept | {"diverged": last.split(": ")[1]}
        networks = report["networks"]
        (chosen,) = (row for row in networks if row["exported"])
        (standard,) = (row for row in networks if row["role"] == "standard")
        online = [row for row in networks if row["role"] == "online_teacher"]
        environment = report["environment"]
        return kept | {
            **_accuracies(chosen),
            "students": [_accuracies(row) for row in networks if row["role"] == "student"],
            "online_teacher": _accuracies(online[0]) | _costs(online[0]) if online else None,
            "teacher": _accuracies(standard) if config["teacher_dir"] else None,
            "disagreement": report["disagreement"],
            **_costs(chosen),
            "data": report["data"],
            "start": report["start"],
            "flags": run.flags + (f" --teacher_dir {{{run.row.teacher}}}" if run.row.teacher else ""),
            "environment": {key: environment[key] for key in ("device", "threads", "execution", "precision", "torch")},
            "seconds": round(report["seconds"]),
            "commit": _commit(),
        }


def check(out: Path, study: str, data_dir: Path | None) -> bool:
    """Score the kept networks of a study on its test set; return whether all accuracies are those of the records.

    Raises:
        UserError: no network is kept, or the data is not that of the study.
    """
    recorded = {record["run"]: f"{record['test']:.2f}" for record in trained(read_records(out, study))}
    paths = sorted(networks_folder(out, study).glob("*.pt"))
    if not paths:
        raise UserError(f"{networks_folder(out, study)} has no networks to check")
    device = pick_device("auto")
    apply_execution(pick_execution("auto", device))
    dataset, differ = None, []
    for path in paths:
        network, meta = checkpoint.load_network(path)
        config = meta.config
        dataset = dataset or data.load(config["dataset"], data_dir, config["val_size"], cores())
        test = dataset.normalized_as(meta.mean, meta.std, meta.classes, path)
        batches = Batches(test.test, config["eval_batch_size"], test.mean, test.std, device)
        found = f"{accuracy(network.to(device), batches).top1:.2f}"
        expected = recorded.get(path.stem, "none")
        differ += [path.stem] if found != expected else []
        print(f"{path.stem}: recorded {expected}, found {found}{' DIFFERENT' * (found != expected)}", flush=True)
    print(f"{len(paths) - len(differ)} of {len(paths)} networks have their recorded test accuracy")
    return not differ


def _accuracies(row: dict[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in ("val", "test", "val_top5", "test_top5") if key in row}


def _costs(row: dict[str, Any]) -> dict[str, int]:
    return {key: row[key] for key in ("params", "macs")}


def _commit() -> str | None:
    """The commit that is checked out, None outside of a git repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(args: argparse.Namespace) -> None:
    if args.jobs is not None and args.jobs < 1:
        raise UserError("--jobs must be 1 or more")
    if args.check and not args.study:
        raise UserError("--check scores the networks of one study: name it, too")
    if args.study:
        if STUDIES[args.study].data and not args.data_dir:
            raise UserError(f"the study {args.study} needs --data_dir, {STUDIES[args.study].data}")
        if args.check:
            sys.exit(0 if check(args.out, args.study, args.data_dir) else 1)
        runner = Runner(args.out, args.data_dir, args.jobs)
        records_file(args.out, args.study).parent.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            runner.run(args.study, args.only)
        except KeyboardInterrupt:
            runner.stop()
            print(
                "interrupted: the runs are saved where they are; the same command goes on from there", file=sys.stderr
            )
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
