"""Deliberate faults in the code, one at a time: do the tests notice? Not collected by pytest.

    python tests/faults.py           # all of them
    python tests/faults.py resume    # those whose names contain a word

Each fault replaces a piece of text in a copy of the project and runs the tests that should fail. Prints a table; ends
with code 1 if a fault survives, or if the text to replace is no longer there exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """`before` becomes `after` in the file `path`; `tests` are arguments of pytest."""

    name: str
    path: str
    before: str
    after: str
    tests: str


FAULTS = [
    Fault("reconstruction: the filters of the spatial stage stay", "model/reconstruct.py",
          "s = s + _conjugate_gradients(normal, residual)", "s = s + 0 * _conjugate_gradients(normal, residual)",
          "tests/test_reconstruct.py"),
    Fault("reconstruction: old statistics of BatchNorm", "model/reconstruct.py",
          "        norm.reset_running_stats()\n", "        pass\n", "tests/test_reconstruct.py"),
    Fault("budget: the costliest convolutions first", "utils/cost.py",
          "sorted(costs, key=costs.get)", "sorted(costs, key=costs.get, reverse=True)",
          "tests/test_budget.py -k energy"),
    Fault("loss: temperature not squared", "utils/losses.py", "temperature**2 * total", "temperature * total",
          "tests/test_losses.py"),
    Fault("loss: KL in the other direction", "utils/losses.py",
          "F.kl_div(log_students, log_teacher.expand_as(log_students)",
          "F.kl_div(log_teacher.expand_as(log_students), log_students", "tests/test_losses.py"),
    Fault("loss: gradient into the pretrained teacher", "utils/losses.py",
          "_at_least_float32(pretrained_logits.detach())", "_at_least_float32(pretrained_logits)",
          "tests/test_losses.py"),
    Fault("loss: mean over students", "utils/losses.py", "return num_students * F.cross_entropy",
          "return F.cross_entropy", "tests/test_losses.py"),
    Fault("loss: KDCL learns from the largest logits", "utils/losses.py", ".amin(0)", ".amax(0)",
          "tests/test_losses.py"),
    Fault("loss: OKDDip's attention over the other dimension", "utils/losses.py", "dim=-1).permute(1, 2, 0)",
          "dim=1).permute(1, 2, 0)", "tests/test_losses.py"),
    Fault("loss: labels of the online teacher are not smoothed", "utils/losses.py",
          "F.cross_entropy(teacher_logits, targets, label_smoothing=label_smoothing)",
          "F.cross_entropy(teacher_logits, targets)", "tests/test_losses.py"),
    Fault("method: OKDDip exports any student", "utils/methods.py", "return [num_students - 1]",
          "return range(num_students)", "tests/test_methods.py -k leader"),
    Fault("method: ONE not detached", "utils/methods.py", "    detaches = True\n", "    detaches = False\n",
          "tests/test_losses.py"),
    Fault("method: temperature of DML", "utils/methods.py", "fewest_students, lam, temperature = 4, 2, 1.0, 1.0",
          "fewest_students, lam, temperature = 4, 2, 1.0, 4.0", "tests/test_options.py"),
    Fault("method: KD without a teacher", "utils/methods.py", "if not config.teacher_dir or config.miu == 0:",
          "if config.miu == 0:", "tests/test_options.py"),
    Fault("block: ReLU after the addition", "model/resnet.py",
          "return conv_norm_relu(self.conv2, self.bn2, out, residual=self.shortcut(x))",
          "return conv_norm_relu(self.conv2, self.bn2, out, residual=self.shortcut(x)).relu()",
          "tests/test_networks.py"),
    Fault("block: cheap convolutions from the input side", "model/conv.py",
          "range(count - number_to_prune(count, pruned_num), count)", "range(number_to_prune(count, pruned_num))",
          "tests/test_networks.py"),
    Fault("online teacher: features of one student", "model/online.py", "torch.cat(features, dim=1)",
          "torch.cat(features[:1] * len(features), dim=1)", "tests/test_online.py"),
    Fault("loader: one flip for the whole batch", "data/loader.py", "torch.rand((count, 1), generator=generator)",
          "torch.rand((1, 1), generator=generator).expand(count, 1)", "tests/test_data.py"),
    Fault("crops: every image is mirrored", "data/crops.py", "if torch.rand(1) < 0.5 else crop", "",
          "tests/test_crops.py"),
    Fault("crops: decoded below the size", "data/crops.py", "if factor <= allowed", "if factor <= 2 * allowed",
          "tests/test_crops.py"),
    Fault("loader: the same order in every epoch", "data/loader.py", "return seed * 1_000_003 + epoch",
          "return seed * 1_000_003", "tests/test_data.py"),
    Fault("split: not stratified", "data/sources.py", "drawn = order[np.argsort(share[order], kind=\"stable\")]",
          "drawn = order", "tests/test_data.py"),
    Fault("data: repeated images not counted", "data/sources.py",
          "sum(map(set(known).__contains__, training))", "sum(map(set(known[:1]).__contains__, training))",
          "tests/test_data.py tests/test_report.py"),
    Fault("folders: loops", "data/files.py", "    known.add(real)\n", "", "tests/test_folder.py -k links"),
    Fault("images: transparency on black", "data/images.py", '"white"', '"black"', "tests/test_images.py"),
    Fault("labels: a path twice", "data/files.py", "lines.setdefault(path, reader.line_num) != reader.line_num",
          "False", "tests/test_labels.py"),
    Fault("top-5: ties count", "utils/metrics.py", "((logits > own) | ((logits == own) & earlier))", "(logits > own)",
          "tests/test_evaluation.py"),
    Fault("top-5: six", "utils/metrics.py", "ranks < 5", "ranks < 6", "tests/test_evaluation.py"),
    Fault("disagreement: of ordered pairs", "utils/metrics.py", "students * (students - 1)", "students * students",
          "tests/test_evaluation.py"),
    Fault("schedule: warm-up by epochs", "utils/engine.py", "(epoch - 1 + share) / epochs", "epoch / epochs",
          "tests/test_schedule.py tests/test_engine.py"),
    Fault("resume: momentum is lost", "model/weights.py", "buffers.get(str(i), torch.zeros_like(own[i]))",
          "torch.zeros_like(own[i])", "tests/test_engine_resume.py tests/test_resume.py"),
    Fault("resume: random state is lost", "utils/engine.py", "set_random_state(begun.random)", "pass",
          "tests/test_engine_resume.py tests/test_resume.py"),
    Fault("resume: other images are taken", "utils/checkpoint.py", "was and given and was != given", "False",
          "tests/test_resume.py tests/test_engine_resume.py tests/test_teacher.py"),
    Fault("lock: not taken", "utils/files.py", "fcntl.lockf(file, kind | fcntl.LOCK_NB)",
          "fcntl.lockf(file, fcntl.LOCK_UN)", "tests/test_interruption.py -k second_run"),
    Fault("lock: a fresh foreign lock is ignored", "utils/files.py", "age < FRESH", "age < 0",
          "tests/test_lock.py"),
    Fault("files: written in place", "utils/files.py", 'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")',
          "temporary = path", "tests/test_checkpoint.py tests/test_paths.py"),
    Fault("checkpoint: code is run", "model/weights.py",
          'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False', "tests/test_payloads.py"),
    Fault("checkpoint: the first of several state dicts", "model/published.py",
          "if len(fitting) > 1 and file.wrapper not in WRAPPERS:", "if False:", "tests/test_saved.py -k several"),
    Fault("checkpoint: counters in half precision", "model/published.py",
          'key.endswith("num_batches_tracked") and value.is_floating_point()', "False", "tests/test_saved.py -k half"),
    Fault("checkpoint: not finite weights pass", "model/weights.py",
          "if not value.to(own[key].dtype).isfinite().all():", "if False:",
          "tests/test_checkpoint.py tests/test_teacher.py"),
    Fault("report: the wrong student is exported", "utils/engine.py", "self.learner.students[self.best.student]",
          "self.learner.students[0]", "tests/test_scripts.py tests/test_report.py"),
    Fault("report: ratios upside down", "utils/tables.py", "else before / after", "else after / before",
          "tests/test_tables.py tests/test_report.py"),
    Fault("kernels: a residual of another shape", "model/kernels/conditions.py",
          "if residual is not None and not _fits(residual, x.dtype, size):", "if False:",
          "tests/test_fused_conditions.py"),
    Fault("kernels: hooks are skipped", "model/kernels/conditions.py", "        or module._forward_hooks\n", "",
          "tests/test_fused_conditions.py"),
    Fault("convolution: strided 1 x 1 as it is", "model/subsample.py", "if skips and conv.padding in",
          "if False and conv.padding in", "tests/test_conv.py tests/test_fused.py"),
    Fault("weights: kernels without their scale", "model/conv.py",
          "columns[..., :rank] = u[..., :rank] * root[:, None]", "columns[..., :rank] = u[..., :rank]",
          "tests/test_inherit.py"),
    Fault("export: normalization left out", "utils/export.py", "return self.network((images - self.mean) / self.std)",
          "return self.network(images)", "tests/test_export.py"),
    Fault("export: BatchNorm folded with another eps", "utils/export.py", "mean, var, eps, *affine)",
          "mean, var, 10 * eps + 0.1, *affine)", "tests/test_export.py"),
    Fault("distributed: gradients of one share", "utils/engine.py",
          "(processes * weight * losses[\"loss\"])", "(weight * losses[\"loss\"])", "tests/test_distributed.py"),
    Fault("distributed: variance without the means", "utils/distributed.py",
          "variance = (shares * (variances + (means - mean) ** 2)).sum(0)", "variance = (shares * variances).sum(0)",
          "tests/test_distributed.py"),
    Fault("signals: nothing is saved", "utils/interruption.py", "if first and not self._deferred:", "if first:",
          "tests/test_signals.py -k deferred"),
    Fault("options: an unknown flag is ignored", "utils/options.py", "    if unknown:\n", "    if False:\n",
          "tests/test_options.py"),
]  # fmt: skip


def survives(fault: Fault) -> str | None:
    """None if the tests notice the fault; else what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*_cache", "downloads", "students")
        shutil.copytree(ROOT, copy, ignore=ignored)
        path = copy / fault.path
        text = path.read_text()
        if text.count(fault.before) != 1:
            return f"{fault.path} has the text {text.count(fault.before)} times"
        path.write_text(text.replace(fault.before, fault.after))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests.split()]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=copy, env=one_thread, capture_output=True, text=True, check=False)
    return {0: "SURVIVES", 1: None}.get(result.returncode, f"pytest ends with code {result.returncode}")


def main() -> int:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    failures = 0
    for fault in (fault for fault in FAULTS if word in fault.name):
        started = time.monotonic()
        problem = survives(fault)
        failures += problem is not None
        print(f"{problem or 'caught':<10}  {time.monotonic() - started:4.0f} s  {fault.name}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
