"""Does it work? Trains a grid of methods, convolutions and seeds, and writes RESULTS.md.

    python experiment/study.py digits                              # within an hour on two cores
    python experiment/study.py cifar10_subset --data_dir PATH      # hours on a CPU
    python experiment/study.py cifar10 --data_dir PATH             # for GPUs
    python experiment/study.py                                     # only writes RESULTS.md anew, from the records

PATH is CIFAR-10 as a tree of image files, train/<class>/* and test/<class>/*. Every run is a command of main.py in a
process of its own, as many at a time as there are GPUs, or else CPU cores (--jobs). A run that is done has a line in
results/STUDY.jsonl; the same command goes on where an interrupted one stopped, in the middle of a run, too. To train
everything anew, give another --out.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from experiment.results import read_records, records_file, write_results
from utils import options
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
TEACHER = "TEACHER"  # in the flags of a run, stands for the checkpoint of the pretrained teacher
SETTINGS = ("num_students", "lambda", "miu")  # that sweeps are drawn over


# Of OD, one at a time; the last three are of λ = 0.8.
CHANGES = {
    **{f"students_{value}": f"--num_students={value}" for value in (1, 2, 4, 8)},
    **{f"lambda_{value}": f"--lambda={value}" for value in (0, 0.3, 2)},
    **{f"miu_{value}": f"--miu={value}" for value in (0.3, 3)},
    **{f"temperature_{value}": f"--temperature={value}" for value in (1, 2)},
    "detached": "--lambda=0.8 --detach_teacher",
    "rampup": "--lambda=0.8 --rampup_epochs=10",
    "released": "--lambda=0.8 --kl_reduction=element",
}


class Study(NamedTuple):
    """A grid. Each of its networks has a pretrained teacher; changes are made with the first network and convolution.

    Attributes:
        flags: of every run.
        students: of the methods that train several.
        changes_seeds: how many of the seeds are for changes, too.
        changes: of OD with the pretrained teacher, names in CHANGES but for those that are methods, or the default.
        changes_teacher_free: the same of OD without.
    """

    flags: tuple[str, ...]
    models: tuple[str, ...]
    convs: tuple[str, ...]
    students: int
    epochs: int
    seeds: int
    changes_seeds: int
    changes: tuple[str, ...] = tuple(name for name in CHANGES if name not in ("students_4", "lambda_0"))
    changes_teacher_free: tuple[str, ...] = ("lambda_0", "lambda_0.3", "lambda_2", "detached")


STUDIES = {
    "digits": Study(  # with all of them, every network is right
        ("--dataset=digits", "--train_size=300", "--train_batch_size=32"),
        ("resnet_20",), ("depthwise", "group", "shift"), 4, 40, 5, 3,
    ),
    "cifar10_subset": Study(
        ("--dataset=folder", "--train_size=10000", "--val_size=2500"),
        ("resnet_20",), ("depthwise", "shift"), 2, 30, 3, 1,
        ("students_4", "temperature_2", "detached", "rampup", "released"), ("lambda_0", "detached"),
    ),
    "cifar10": Study(("--dataset=folder",), ("resnet_20", "resnet_56"), ("depthwise", "group", "shift"), 4, 60, 3, 1),
}  # fmt: skip


class Run(NamedTuple):
    """One run of main.py; `flags` are those of its variant alone."""

    study: str
    variant: str
    model: str
    conv: str | None
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in (self.model, self.conv, self.variant, self.seed) if part is not None)

    @property
    def teacher(self) -> "Run | None":
        """The run that trains the pretrained teacher that this one learns from, if it does."""
        if any(TEACHER in flag for flag in self.flags):
            return Run(self.study, "teacher", self.model, None, 0, ("--pretrain",))
        return None


def grid(name: str) -> Iterator[Run]:
    """The runs of a study but for those of its teachers, method by method."""
    study = STUDIES[name]
    flags_of = methods(study)
    for variant, flags in flags_of.items():
        for model in study.models:
            for conv in study.convs:
                for seed in range(study.seeds):
                    yield Run(name, variant, model, conv, seed, flags)
    for method, changes in (("od", study.changes), ("od_teacher_free", study.changes_teacher_free)):
        for change in changes:
            flags = (*flags_of[method], *CHANGES[change].split())  # of two like flags the last one holds
            for seed in range(study.changes_seeds):
                yield Run(name, f"{method}_{change}", study.models[0], study.convs[0], seed, flags)


def methods(study: Study) -> dict[str, tuple[str, ...]]:
    """The variants that are compared for every network and convolution, and their flags.

    λ = 0 and μ = 0 (no pretrained teacher) are OD's special cases; λ = 0.8 is that of the paper's recipe, there with a
    KL that is weaker by the number of classes.
    """
    teacher, students, strong = f"--teacher_dir={TEACHER}", f"--num_students={study.students}", "--lambda=0.8"
    return {
        "scratch": ("--method=scratch",),
        "kd": ("--method=kd", teacher),
        "od": (students, teacher),
        "od_lambda_0": (students, teacher, "--lambda=0"),
        "od_lambda_0.8": (students, teacher, strong),
        "od_teacher_free": (students,),
        "od_teacher_free_lambda_0.8": (students, strong),
        "dml": ("--method=dml", students),
        "one": ("--method=one", students),
    }


class Runner:
    """Trains the runs of a study, several at a time, in folders of `out`, and records what they achieved."""

    def __init__(self, out: Path, data_dir: Path | None, jobs: int | None):
        self.out, self.data_dir = out, data_dir
        image = next(data_dir.glob("train/*/*"), None) if data_dir else None
        self.format = f", of {image.suffix[1:].lower().replace('jpeg', 'jpg')} files" if image else ""
        gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
        self.jobs = jobs or gpus or cores
        self.slots = SimpleQueue()
        for i in range(self.jobs):
            self.slots.put(
                {"CUDA_VISIBLE_DEVICES": str(i % gpus)}
                if gpus
                else {"OMP_NUM_THREADS": str(max(1, cores // self.jobs))}
            )
        self.pool = ThreadPoolExecutor(self.jobs)
        self.processes, self.stopped = set(), False

    def run(self, name: str) -> None:
        """Train and record what has no record yet.

        Raises:
            UserError: the folder of a run holds another one; or a run failed, and the others were done all the same.
        """
        done = {record["run"] for record in read_records(self.out, name)}
        missing = [run for run in grid(name) if run.name not in done]
        needed = dict.fromkeys(run.teacher for run in missing if run.teacher)
        needed = [run for run in needed if run.name not in done or not self.exported(run).exists()]
        for run in (*needed, *missing):
            self.check_folder(run)
        teachers = {run: self.pool.submit(self.train, run) for run in needed}
        # Those that wait for a teacher come last, so that none occupies a thread just to wait.
        missing.sort(key=lambda run: run.teacher in teachers)
        futures = {self.pool.submit(self.train, run, teachers.get(run.teacher)): run for run in missing}
        futures |= {future: run for run, future in teachers.items()}
        print(
            f"{name}: {len(done)} runs are recorded, {len(futures)} are to be done, {self.jobs} at a time", flush=True
        )
        failed = []
        for count, future in enumerate(as_completed(futures), start=1):
            run, record = futures[future], future.result()
            if record is None:
                failed.append(self.log(run))
                print(f"{count}/{len(futures)} {run.name} FAILED, see {self.log(run)}", flush=True)
                continue
            if run.name not in done:  # as a teacher may be, whose checkpoint is gone
                with open(records_file(self.out, name), "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            outcome = "diverged" if "diverged" in record else f"{record['test']:.2f} % on the test set"
            print(f"{count}/{len(futures)} {run.name}: {outcome}", flush=True)
            write_results(self.out)
        if failed:
            raise UserError(
                f"{len(failed)} runs failed, such as that of {failed[0]}: mend it and give the command again"
            )

    def check_folder(self, run: Run) -> None:
        """Raise a UserError if what the run's folder holds was trained with other flags, or other defaults."""
        path = self.job_dir(run) / "config.json"
        if not path.exists():
            return
        was = json.loads(path.read_text(encoding="utf-8"))
        now = options.configuration(options.parse("main", self.command(run)[1:]))
        for name in sorted(set(now) - options.MAY_CHANGE | {"num_epochs"}):
            if now[name] not in (None, was.get(name)):  # None: main.py settles it later
                raise UserError(
                    f"{path.parent} was trained with --{name} {was.get(name)}, not {now[name]}: delete it, or give "
                    "another --out"
                )

    def train(self, run: Run, teacher: Future | None = None) -> dict[str, Any] | None:
        """The record of the run, trained unless its report is there; None if it failed."""
        if teacher and teacher.result() is None:
            return None
        slot = self.slots.get()
        try:
            if not self.stopped and not (self.job_dir(run) / "report.json").exists():
                self.log(run).parent.mkdir(parents=True, exist_ok=True)
                with open(self.log(run), "a", encoding="utf-8") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-u", *self.command(run), "--resume"],
                        cwd=ROOT, env=os.environ | slot, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True,  # Ctrl-C reaches this process alone, which tells the others
                    )  # fmt: skip
                    self.processes.add(process)
                    process.wait()
                    self.processes.remove(process)
            return self.record(run)
        finally:
            self.slots.put(slot)

    def stop(self) -> None:
        """End the runs in order: each saves where it is."""
        self.stopped = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self.processes):
            process.terminate()
        self.pool.shutdown()

    def command(self, run: Run) -> list[str]:
        study = STUDIES[run.study]
        flags = [*study.flags, *([f"--data_dir={self.data_dir.resolve()}"] if self.data_dir else [])]
        flags += ["--arch=resnet", f"--teacher_model={run.model}", f"--num_epochs={study.epochs}"]
        flags += [f"--conv={run.conv}"] if run.conv else []
        teacher = str(self.exported(run.teacher)) if run.teacher else ""
        own = [flag.replace(TEACHER, teacher) for flag in run.flags]
        return ["main.py", *flags, *own, f"--seed={run.seed}", f"--job_dir={self.job_dir(run)}"]

    def job_dir(self, run: Run) -> Path:
        return self.out.resolve() / "study" / run.study / run.name

    def log(self, run: Run) -> Path:
        return self.job_dir(run).with_suffix(".log")

    def exported(self, teacher: Run) -> Path:
        return self.job_dir(teacher) / f"{teacher.model}.pt"

    def record(self, run: Run) -> dict[str, Any] | None:
        """What is kept of a run: its settings, accuracies and costs, and what it ran on; None if it did not end.

        Of one whose loss was not finite in the end, its settings and the line that says so.
        """
        try:
            config = json.loads((self.job_dir(run) / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        kept = {"run": run.name, "variant": run.variant, "model": run.model, "conv": run.conv, "seed": run.seed}
        kept |= {"settings": {name: config[name] for name in SETTINGS}}
        try:
            report = json.loads((self.job_dir(run) / "report.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            last = self.log(run).read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
            finite = not last.startswith("error: the loss is not finite")
            return None if finite else kept | {"diverged": last.split(": ")[1]}
        students = [row for row in report["networks"] if row["name"].startswith("student")]
        online = [row for row in report["networks"] if row["name"].startswith("online")]
        best = next((row for row in students if row["name"].endswith("best")), report["networks"][0])
        study = STUDIES[run.study]
        return kept | {
            "val": best["val"],
            "test": best["test"],
            "students": [{"val": row["val"], "test": row["test"]} for row in students],
            "online_teacher": {"val": online[0]["val"], "test": online[0]["test"]} if online else None,
            "params": best["params"],
            "macs": best["macs"],
            "data": report["notes"][0] + self.format,
            "flags": shlex.join([*study.flags, f"--num_epochs={study.epochs}", *run.flags]),
            "environment": {key: report["environment"][key] for key in ("device", "execution", "torch")},
        }


def main(args: argparse.Namespace) -> None:
    if args.jobs is not None and args.jobs < 1:
        raise UserError("--jobs must be 1 or more")
    if args.study:
        if "--dataset=folder" in STUDIES[args.study].flags and not args.data_dir:
            raise UserError(f"the study {args.study} needs --data_dir, CIFAR-10 as a tree of image files")
        runner = Runner(args.out, args.data_dir, args.jobs)
        records_file(args.out, args.study).parent.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            runner.run(args.study)
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
    parser.add_argument("--data_dir", type=Path, metavar="PATH", help="of the images, for the studies of CIFAR-10")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU, or else one a core)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "experiment", metavar="PATH", help="where everything is written"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()
    run_script(lambda: main(ARGS))
